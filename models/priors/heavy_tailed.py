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

import math

import pyro.distributions as dist

from vadd_pyro.models.priors.conditioning import Context, LocationScale
from vadd_pyro.process import MaskedBatch

__all__ = ["Laplace", "StudentT"]


class StudentT(LocationScale):
    """Student's t, one site ``"z"``.

    Args:
        latent_dim: size ``d`` of ``z``.
        df: degrees of freedom, above 2 so that the variance is finite; fixed.
        context: features of the state, such as :class:`vadd_pyro.nn.StateFeatures`; None for an
            unconditional prior.
    """

    def __init__(self, latent_dim: int, df: float = 5.0, context: Context | None = None) -> None:
        super().__init__(latent_dim, context)
        if not isinstance(df, int | float) or not 2 < df < math.inf:
            raise ValueError(
                f"df must be a number above 2, for a finite variance, and finite, got {df!r}"
            )
        self.df = float(df)

    def forward(self, batch: MaskedBatch) -> dist.Independent:
        loc, scale = self.parameters_at(batch)
        return dist.StudentT(self.df, loc, scale).to_event(1)


class Laplace(LocationScale):
    """Laplace, one site ``"z"``.

    Args:
        latent_dim: size ``d`` of ``z``.
        context: features of the state, such as :class:`vadd_pyro.nn.StateFeatures`; None for an
            unconditional prior.
    """

    def forward(self, batch: MaskedBatch) -> dist.Independent:
        loc, scale = self.parameters_at(batch)
        return dist.Laplace(loc, scale).to_event(1)
