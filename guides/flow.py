r"""A guide that is a normalising flow conditional on the recognition features (zuko's splines).

.. math::
    r(z \mid x_0, x_t) = N(f(z); 0, I)\, \Big| \det \frac{\partial f(z; h)}{\partial z} \Big|,
    \qquad h = h(x_0, x_t)

References:
    Rezende and Mohamed 2015 (arXiv 1505.05770); Durkan et al. 2019 (arXiv 1906.04032).
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro
from torch import Tensor

from vadd_pyro.distributions import FlowDistribution
from vadd_pyro.guides.features import Features, Head
from vadd_pyro.process import MaskedBatch, check_size
from vadd_pyro.programs import Program

__all__ = ["AmortizedFlow"]


class AmortizedFlow(Program):
    """Samples ``"z"`` from a neural spline flow.

    Args:
        features: recognition features, such as :class:`vadd_pyro.nn.MLPFeatures`.
        latent_dim: size ``d`` of ``z``.
        num_transforms: spline layers.
        hidden_dims: widths of their networks.
        context_dim: numbers that the flow sees of the features.
        bins: pieces of a spline.
    """

    def __init__(
        self,
        features: Features,
        latent_dim: int,
        *,
        num_transforms: int = 2,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 32,
        bins: int = 8,
    ) -> None:
        from zuko.flows import NSF

        super().__init__()
        check_size("latent_dim", latent_dim)
        check_size("num_transforms", num_transforms)
        check_size("context_dim", context_dim)
        check_size("bins", bins, least=2)
        self.head = Head(features, context_dim)
        self.flow = NSF(
            latent_dim,
            context=context_dim,
            transforms=num_transforms,
            hidden_features=hidden_dims,
            bins=bins,
            passes=min(2, latent_dim),
        )

    def forward(self, batch: MaskedBatch) -> Tensor:
        law = FlowDistribution(self.flow(self.head(batch)))
        with pyro.plate("data", len(batch), dim=-1):
            return pyro.sample("z", law)
