r"""A mixture of normals, all of it learned:

.. math::
    p(z \mid x_t, t) = \sum_{m=1}^{M} \pi_m(x_t, t)\, N(z; \mu_m, \sigma_m^2).

Without a context the weights are constants. With one they depend on the state, while the
components stay where they are: the state picks among modes.

References:
    Jiang et al. 2017, VaDE (arXiv 1611.05148); Dilokthanakul et al. 2016 (arXiv 1611.02648).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import softplus

from vadd_pyro.distributions import NormalMixture
from vadd_pyro.models.priors.conditioning import Conditioned, Context, features_of, unit_scale
from vadd_pyro.process import MaskedBatch, check_size

__all__ = ["MixtureOfNormals"]


class MixtureOfNormals(nn.Module):
    """A mixture of diagonal normals with learned weights, means and scales, one site ``"z"``.

    Better than ``N(0, I)`` on data in clusters; on data along curves it needs more updates: worse
    after 4,000, within error after 12,000 (docs/zoo.md). Where the latent is not needed, the
    posterior should be the prior, which a normal guide cannot be: ``for_prior(prior, encoder,
    "mixture")`` tightens the bound there.

    Args:
        latent_dim: size ``d`` of ``z``.
        num_components: number ``M`` of normals.
        spread: standard deviation of the initial means.
        context: features of the state on which the weights depend, such as
            :class:`vadd_pyro.nn.StateFeatures`; None for an unconditional prior.
    """

    def __init__(
        self,
        latent_dim: int,
        num_components: int = 32,
        spread: float = 1.0,
        context: Context | None = None,
    ) -> None:
        super().__init__()
        check_size("latent_dim", latent_dim)
        check_size("num_components", num_components)
        self.latent_dim = latent_dim
        self.context = context
        self.logits = Conditioned(torch.zeros(num_components), context)
        self.z_loc = nn.Parameter(spread * torch.randn(num_components, latent_dim))
        self.z_raw = nn.Parameter(unit_scale(num_components, latent_dim))

    def forward(self, batch: MaskedBatch) -> NormalMixture:
        logits = self.logits(features_of(self.context, batch))
        return NormalMixture(logits, self.z_loc, softplus(self.z_raw) + 1e-4)
