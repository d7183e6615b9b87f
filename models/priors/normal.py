r"""Normal priors: the paper's, one that sees the state, and a learned mixture.

``StandardNormal``
    :math:`p(z) = N(0, I)` (Xie et al. 2025).
``ConditionalNormal``
    :math:`p(z \mid x_t, t) = N(m(x_t, t), s(x_t, t)^2)`.
``MixtureOfNormals``
    :math:`p(z) = \sum_k \pi_k N(m_k, s_k^2)`, all learned (Jiang et al. 2017, VaDE).
"""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from vadd_pyro.distributions import DiagonalNormal
from vadd_pyro.process import MaskedBatch, check_size
from vadd_pyro.programs import check_callable

__all__ = ["ConditionalNormal", "MixtureOfNormals", "StandardNormal"]


class StandardNormal(nn.Module):
    """``N(0, I)``, the prior of the paper.

    Args:
        latent_dim: size ``d`` of ``z``.
    """

    z_loc: Tensor
    z_scale: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        check_size("latent_dim", latent_dim)
        self.latent_dim = latent_dim
        self.register_buffer("z_loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("z_scale", torch.ones(latent_dim), persistent=False)

    def forward(self, batch: MaskedBatch) -> DiagonalNormal:
        return DiagonalNormal(self.z_loc, self.z_scale)


class ConditionalNormal(nn.Module):
    """A normal whose mean and scale are read off the state: ``p(z | x_t, t)``.

    Args:
        network: ``network(batch) -> (z_loc, z_scale)``, each ``(B, d)``, reading ``batch.x_t`` and
            ``batch.t`` only, such as :class:`vadd_pyro.nn.StateEncoder`.
    """

    def __init__(self, network: Callable[[MaskedBatch], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        check_callable("network", network)
        self.network = network

    def forward(self, batch: MaskedBatch) -> DiagonalNormal:
        z_loc, z_scale = self.network(batch)
        return DiagonalNormal(z_loc, z_scale)


class MixtureOfNormals(nn.Module):
    """A mixture of diagonal normals with learned weights, means and scales, one site ``"z"``.

    Args:
        latent_dim: size ``d`` of ``z``.
        num_components: number of normals.
        spread: standard deviation of the initial means.
    """

    def __init__(self, latent_dim: int, num_components: int = 32, spread: float = 1.0) -> None:
        super().__init__()
        check_size("latent_dim", latent_dim)
        check_size("num_components", num_components)
        self.latent_dim = latent_dim
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.z_loc = nn.Parameter(spread * torch.randn(num_components, latent_dim))
        self.z_raw = nn.Parameter(torch.full((num_components, latent_dim), 0.5413))

    def forward(self, batch: MaskedBatch) -> dist.MixtureSameFamily:
        components = dist.Normal(self.z_loc, softplus(self.z_raw) + 1e-4).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), components)
