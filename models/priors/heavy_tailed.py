r"""Priors with tails heavier than a normal's: Student's t and Laplace, coordinate by coordinate.

.. math::
    p(z) = \prod_j t_\nu\Big(\frac{z_j - m_j}{s_j}\Big) \frac1{s_j}, \qquad
    p(z) = \prod_j \frac{1}{2 s_j} e^{-|z_j - m_j| / s_j}

They forgive a guide that spreads some rows far out. Mean and scale may depend on the state.

References:
    Takahashi et al. 2018, Student-t variational autoencoder; Abiri and Ohlsson 2020 (arXiv
    2004.02581).
"""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from vadd_pyro.models.priors.conditioning import Conditioned, Context, features_of, unit_scale
from vadd_pyro.process import MaskedBatch, check_size

__all__ = ["Laplace", "StudentT"]


class _LocationScale(nn.Module):
    """Learned location and scale of every coordinate, standard before training.

    Args:
        latent_dim: size ``d`` of ``z``.
        context: features of the state that shift both; None for an unconditional prior.
    """

    def __init__(self, latent_dim: int, context: Context | None = None) -> None:
        super().__init__()
        check_size("latent_dim", latent_dim)
        self.latent_dim = latent_dim
        self.context = context
        self.z_loc = Conditioned(torch.zeros(latent_dim), context)
        self.z_raw = Conditioned(unit_scale(latent_dim), context)

    def _parameters_at(self, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        h = features_of(self.context, batch)
        return self.z_loc(h), softplus(self.z_raw(h)) + 1e-4


class StudentT(_LocationScale):
    """Student's t, one site ``"z"``.

    Args:
        latent_dim: size ``d`` of ``z``.
        df: degrees of freedom, above 2 so that the variance is finite; fixed.
        context: features of the state, such as :class:`vadd_pyro.nn.StateFeatures`; None for an
            unconditional prior.
    """

    def __init__(self, latent_dim: int, df: float = 5.0, context: Context | None = None) -> None:
        super().__init__(latent_dim, context)
        if not df > 2:
            raise ValueError(f"df must be above 2, for a finite variance, got {df!r}")
        self.df = float(df)

    def forward(self, batch: MaskedBatch) -> dist.Independent:
        loc, scale = self._parameters_at(batch)
        return dist.StudentT(self.df, loc, scale).to_event(1)


class Laplace(_LocationScale):
    """Laplace, one site ``"z"``.

    Args:
        latent_dim: size ``d`` of ``z``.
        context: features of the state, such as :class:`vadd_pyro.nn.StateFeatures`; None for an
            unconditional prior.
    """

    def forward(self, batch: MaskedBatch) -> dist.Independent:
        loc, scale = self._parameters_at(batch)
        return dist.Laplace(loc, scale).to_event(1)
