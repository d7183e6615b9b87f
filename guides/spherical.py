r"""A guide over directions: a projected normal with amortised concentration.

.. math::
    r(z \mid x_0, x_t) = \mathrm{PN}(c(x_0, x_t)), \qquad z = x / |x|, \; x \sim N(c, I_d)
"""

from __future__ import annotations

import pyro
from torch import Tensor

from vadd_pyro.distributions import ProjectedNormal
from vadd_pyro.guides.features import Features, Head
from vadd_pyro.process import MaskedBatch, check_size
from vadd_pyro.programs import Program

__all__ = ["AmortizedSpherical"]


class AmortizedSpherical(Program):
    """Samples ``"z"``, a unit vector, from a projected normal.

    Args:
        features: recognition features, such as :class:`vadd_pyro.nn.MLPFeatures`.
        latent_dim: size ``d`` of the vectors, at least 2.
        gain: factor of the head's outputs: how readily draws concentrate.
    """

    def __init__(self, features: Features, latent_dim: int, gain: float = 5.0) -> None:
        super().__init__()
        check_size("latent_dim", latent_dim, least=2)
        self.gain = float(gain)
        self.head = Head(features, latent_dim)

    def forward(self, batch: MaskedBatch) -> Tensor:
        with pyro.plate("data", len(batch), dim=-1):
            return pyro.sample("z", ProjectedNormal(self.gain * self.head(batch)))
