r"""Codes along the row, each depending on the one before: what tokens that are written together
owe to their neighbours.

.. math::
    p(x_{\text{target}} \mid x_t) = \sum_{c_1, \dots, c_D} \prod_i p(c_i \mid c_{i-1}, x_t, t)
    \prod_{i\ \text{target}} \mu_i(x_i \mid x_t, e_{c_i}, t) ,

a hidden Markov model over the row whose laws depend on what is visible. It needs no guide
(:class:`vadd_pyro.guides.NoLatent`) and has no gap: the forward recursion sums out all
:math:`C^D` combinations (:class:`~vadd_pyro.distributions.CodeChain`). One code for a row can say
``log C`` nats about it, a chain as much at every position.
"""

from __future__ import annotations

import pyro
import torch
from torch import Tensor, nn

from vadd_pyro.distributions import CodeChain
from vadd_pyro.models.priors.conditioning import Conditioned, Context, features_of
from vadd_pyro.process import MaskedBatch, check_size

__all__ = ["Chain"]

_SIZE = 32  # of the vectors by which codes follow each other


class Chain(nn.Module):
    """A chain of ``D`` codes of ``C`` values; the site ``"z"`` holds them as ``(B, D)``, the
    decoder sees an embedding at each position, ``(B, D, d)``.

    The decoder must take a latent at each position and look at it there alone, such as
    :class:`vadd_pyro.nn.LocalTransformerDecoder`.

    Args:
        num_codes: ``C``.
        length: ``D``.
        latent_dim: size ``d`` of a code's embedding.
        context: features of the state at each position, ``(B, D, F)``, on which the probabilities
            depend, such as :class:`vadd_pyro.nn.TransformerState`; None for constant ones.
    """

    def __init__(
        self, num_codes: int, length: int, latent_dim: int = 16, context: Context | None = None
    ) -> None:
        super().__init__()
        check_size("num_codes", num_codes)
        check_size("length", length)
        check_size("latent_dim", latent_dim)
        self.num_codes = num_codes
        self.length = length
        self.latent_dim = latent_dim
        self.context = context
        self.positions = nn.Parameter(torch.zeros(length, num_codes))
        self.shift = Conditioned(torch.zeros(num_codes), context)
        # A product of vectors moves faster than single numbers would under Adam.
        self.before = nn.Parameter(torch.randn(num_codes, _SIZE))
        self.after = nn.Parameter(torch.randn(num_codes, _SIZE))
        self.embedding = nn.Embedding(num_codes, latent_dim)

    def forward(self, batch: MaskedBatch) -> Tensor:
        features = features_of(self.context, batch)
        shape = (len(batch), self.length)
        if features is not None and features.shape[:-1] != shape:
            raise ValueError(
                f"context must give features of each position, shape {(*shape, 'F')}, such as "
                f"vadd_pyro.nn.PositionState, got {tuple(features.shape)}"
            )
        # In the precision of the weights: these are logits.
        with torch.autocast(self.positions.device.type, enabled=False):
            if features is not None:
                features = features.to(self.positions.dtype)
            potential = self.positions + self.shift(features)
            transition = self.before @ self.after.mT * _SIZE**-0.5
        codes = pyro.sample("z", CodeChain(transition, potential))
        return self.embedding(codes)
