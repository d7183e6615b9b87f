r"""Categorical latents: ``C`` codes summed out exactly, and products of ``L`` codes.

.. math::
    p(x_{\text{target}} \mid x_t) = \sum_{c} \pi_c(x_t, t) \prod_i \mu_i(x_i \mid x_t, e_c, t),
    \qquad c = (c_1, \dots, c_L), \quad \pi_c = \prod_l \pi_{l, c_l}, \quad e_c = \sum_l e_{l, c_l}

One code (``Categorical``) needs no guide (:class:`vadd_pyro.guides.NoLatent`) and has no gap; its
cost grows with ``C``. Probabilities that depend on the state may settle on one code before codes
differ, if features of the state are large: on text they did until these were divided by the root
of their number (docs/real_data.md). Constant ones did not. A product has :math:`C^L` combinations
at linear cost, and a guide of its own where they are too many to be summed.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from vadd_pyro.distributions import CodeCategorical, OneHotCodes
from vadd_pyro.models.priors.conditioning import Conditioned, Context, features_of
from vadd_pyro.process import MaskedBatch, check_size

__all__ = ["Categorical", "ProductOfCategoricals"]


class Categorical(nn.Module):
    """``C`` codes; the site ``"z"`` holds the code ``(B,)``, the decoder sees its embedding ``(B,
    d)``.

    Args:
        num_codes: ``C``.
        latent_dim: size ``d`` of a code's embedding.
        context: features of the state on which the probabilities depend, ``p(code | x_t, t)``,
            such as :class:`vadd_pyro.nn.StateFeatures`; None for constant ones.
    """

    def __init__(
        self, num_codes: int, latent_dim: int = 16, context: Context | None = None
    ) -> None:
        super().__init__()
        check_size("num_codes", num_codes)
        check_size("latent_dim", latent_dim)
        self.num_codes = num_codes
        self.latent_dim = latent_dim
        self.context = context
        self.logits = Conditioned(torch.zeros(num_codes), context)
        self.embedding = nn.Embedding(num_codes, latent_dim)

    def forward(self, batch: MaskedBatch) -> Tensor:
        logits = self.logits(features_of(self.context, batch))
        code = pyro.sample("z", dist.Categorical(logits=logits))
        return self.embedding(code)


class ProductOfCategoricals(nn.Module):
    """``L`` codes of ``C`` values; the site ``"z"`` holds them as ``(B, L)``, the decoder sees the
    sum of their embeddings ``(B, d)``.

    Up to 4,096 combinations are summed out exactly where the guide has no site of that name.

    Args:
        num_codes: ``C``.
        num_factors: ``L``.
        latent_dim: size ``d`` of an embedding.
        context: features of the state on which the probabilities depend; None for constant ones.
        one_hot: hold the codes as one-hot rows ``(B, L, C)``, as straight-through guides need.
            These collapsed on the toys (docs/zoo.md): prefer summing, or the score function.
    """

    def __init__(
        self,
        num_codes: int,
        num_factors: int,
        latent_dim: int = 16,
        context: Context | None = None,
        *,
        one_hot: bool = False,
    ) -> None:
        super().__init__()
        check_size("num_codes", num_codes)
        check_size("num_factors", num_factors)
        check_size("latent_dim", latent_dim)
        self.num_codes = num_codes
        self.num_factors = num_factors
        self.latent_dim = latent_dim
        self.context = context
        self.one_hot = one_hot
        self.logits = Conditioned(torch.zeros(num_factors, num_codes), context)
        self.embedding = nn.Parameter(torch.randn(num_factors, num_codes, latent_dim))

    def forward(self, batch: MaskedBatch) -> Tensor:
        logits = self.logits(features_of(self.context, batch))
        if self.one_hot:
            rows = pyro.sample("z", OneHotCodes(logits))
            return rows.flatten(-2) @ self.embedding.flatten(0, 1)
        code = pyro.sample("z", CodeCategorical(logits))
        factor = torch.arange(self.num_factors, device=code.device)
        return self.embedding[factor, code].sum(-2)
