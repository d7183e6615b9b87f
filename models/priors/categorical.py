r"""A categorical latent: ``C`` codes with learned probabilities and embeddings, summed out
exactly.

.. math::
    p(x_{\text{target}} \mid x_t) = \sum_{c=1}^{C} \pi_c \prod_i \mu_i(x_i \mid x_t, e_c, t)

needs no guide (:class:`vadd_pyro.guides.NoLatent`), has no gap and cannot collapse; its cost grows
with ``C``.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from vadd_pyro.process import MaskedBatch, check_size

__all__ = ["Categorical"]


class Categorical(nn.Module):
    """``C`` codes; the site ``"z"`` holds the code ``(B,)``, the decoder sees its embedding ``(B,
    d)``.

    Args:
        num_codes: ``C``.
        latent_dim: size ``d`` of a code's embedding.
    """

    def __init__(self, num_codes: int, latent_dim: int = 16) -> None:
        super().__init__()
        check_size("num_codes", num_codes)
        check_size("latent_dim", latent_dim)
        self.num_codes = num_codes
        self.latent_dim = latent_dim
        self.logits = nn.Parameter(torch.zeros(num_codes))
        self.embedding = nn.Embedding(num_codes, latent_dim)

    def forward(self, batch: MaskedBatch) -> Tensor:
        code = pyro.sample("z", dist.Categorical(logits=self.logits))
        return self.embedding(code)
