r"""A guide that is a mixture of normals: for posteriors with several modes.

.. math::
    r(z \mid x_0, x_t) = \sum_{m=1}^{M} \pi_m N(\mu_m, \mathrm{diag}(\sigma_m^2))

Draws carry gradients (implicit reparameterisation, :mod:`vadd_pyro.distributions.mixture`).

References:
    Figurnov et al. 2018 (arXiv 1805.08498); Morningstar et al. 2021 (arXiv 2003.01687).
"""

from __future__ import annotations

import pyro
import torch
from torch import Tensor

from vadd_pyro.distributions import NormalMixture
from vadd_pyro.guides.features import Features, Head
from vadd_pyro.nn import normal_parameters
from vadd_pyro.process import MaskedBatch, check_size
from vadd_pyro.programs import Program

__all__ = ["AmortizedMixture"]


class AmortizedMixture(Program):
    """Samples ``"z"`` from a mixture of diagonal normals.

    Args:
        features: recognition features, such as :class:`vadd_pyro.nn.MLPFeatures`.
        latent_dim: size ``d`` of ``z``.
        num_components: number ``M`` of normals.
    """

    def __init__(self, features: Features, latent_dim: int, num_components: int = 4) -> None:
        super().__init__()
        check_size("latent_dim", latent_dim)
        check_size("num_components", num_components)
        self.latent_dim = latent_dim
        self.num_components = num_components
        self.head = Head(features, num_components * (1 + 2 * latent_dim))
        with torch.no_grad():  # components that start in one place stay in one place
            self.head.linear.bias[num_components:].normal_(std=0.5)

    def forward(self, batch: MaskedBatch) -> Tensor:
        logits, raw = self.head(batch).tensor_split([self.num_components], -1)
        raw = raw.unflatten(-1, (self.num_components, 2 * self.latent_dim))
        with pyro.plate("data", len(batch), dim=-1):
            return pyro.sample("z", NormalMixture(logits, *normal_parameters(raw)))
