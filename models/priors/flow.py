r"""A normalising flow as prior, with or without the state as its context:

.. math::
    p(z \mid x_t, t) = N(f(z); 0, I)\, \Big| \det \frac{\partial f(z; x_t, t)}{\partial z} \Big|.

References:
    Chen et al. 2017, variational lossy autoencoder (arXiv 1611.02731), for flows as priors; Durkan
    et al. 2019 (arXiv 1906.04032) for the splines, here zuko's.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from vadd_pyro.distributions import FlowDistribution
from vadd_pyro.models.priors.conditioning import Context, check_context
from vadd_pyro.process import MaskedBatch, check_size

__all__ = ["NormalizingFlow"]


class NormalizingFlow(nn.Module):
    """A neural spline flow over ``z``, one site ``"z"``.

    Give it the state as context: then it was among the best on data in clusters (docs/zoo.md).
    Without, keep to another prior unless training is long: the flow follows the posteriors as KL
    annealing draws them together, both lose information that they regain slowly, and in states
    that need no latent no simple guide equals it. After 4,000 updates it was worse than ``N(0,
    I)`` on curves. Shorter annealing collapses it.

    Args:
        latent_dim: size ``d`` of ``z``.
        context: features of the state, such as :class:`vadd_pyro.nn.StateFeatures`, which are
            reduced to ``context_dim`` numbers; None for an unconditional prior.
        num_transforms: spline layers.
        hidden_dims: widths of their networks.
        context_dim: numbers that the flow sees of a context.
        bins: pieces of a spline.
    """

    def __init__(
        self,
        latent_dim: int,
        context: Context | None = None,
        *,
        num_transforms: int = 3,
        hidden_dims: Sequence[int] = (64, 64),
        context_dim: int = 16,
        bins: int = 8,
    ) -> None:
        from zuko.flows import NSF

        super().__init__()
        check_size("latent_dim", latent_dim)
        check_size("num_transforms", num_transforms)
        check_size("context_dim", context_dim)
        check_size("bins", bins, least=2)
        check_context(context)
        self.latent_dim = latent_dim
        self.context = context
        self.reduce: nn.Linear | None = None
        if context is not None:
            self.reduce = nn.Linear(context.feature_dim, context_dim)  # type: ignore[attr-defined]
        self.flow = NSF(
            latent_dim,
            context=0 if context is None else context_dim,
            transforms=num_transforms,
            hidden_features=hidden_dims,
            bins=bins,
            passes=min(2, latent_dim),
        )

    def forward(self, batch: MaskedBatch) -> FlowDistribution:
        if self.context is None or self.reduce is None:
            return FlowDistribution(self.flow())
        return FlowDistribution(self.flow(self.reduce(self.context(batch))))
