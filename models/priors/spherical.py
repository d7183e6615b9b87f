r"""Directions: a latent on the sphere :math:`S^{d-1}`, uniform or concentrated by the state.

.. math::
    z = x / |x|, \qquad x \sim N(c(x_t, t), I_d), \qquad c = 0 \text{ without a context}

A sphere is compact and, with ``c = 0``, has no centre for the posteriors to crowd at. For NUTS
wrap the model in ``poutine.reparam(config={"z": ProjectedNormalReparam()})``, or in Pyro's
``MinimalReparam()``: the site then becomes a normal, ``"z_normal"``.

References:
    Davidson et al. 2018, hyperspherical VAE (arXiv 1804.00891), with another family.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vadd_pyro.distributions import ProjectedNormal
from vadd_pyro.models.priors.conditioning import Conditioned, Context, features_of
from vadd_pyro.process import MaskedBatch, check_size

__all__ = ["Spherical"]


class Spherical(nn.Module):
    """A projected normal, one site ``"z"`` of unit vectors.

    Args:
        latent_dim: size ``d`` of the vectors, at least 2; the sphere has one dimension less.
        context: features of the state that give the concentration, such as
            :class:`vadd_pyro.nn.StateFeatures`; None for the uniform law.
    """

    uniform: Tensor

    def __init__(self, latent_dim: int, context: Context | None = None) -> None:
        super().__init__()
        check_size("latent_dim", latent_dim, least=2)
        self.latent_dim = latent_dim
        self.context = context
        self.concentration: Conditioned | None = None
        if context is not None:
            self.concentration = Conditioned(torch.zeros(latent_dim), context)
        self.register_buffer("uniform", torch.zeros(latent_dim), persistent=False)

    def forward(self, batch: MaskedBatch) -> ProjectedNormal:
        if self.concentration is None:
            return ProjectedNormal(self.uniform)
        return ProjectedNormal(self.concentration(features_of(self.context, batch)))
