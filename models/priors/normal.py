r"""Normal priors: the paper's, a learned one, and one that sees the state.

``StandardNormal``
    :math:`p(z) = N(0, I)` (Xie et al. 2025).
``LearnedNormal``
    :math:`p(z) = N(m, s^2)` with learned mean and scale, or with both shifted by the state.
``ConditionalNormal``
    :math:`p(z \mid x_t, t) = N(m(x_t, t), s(x_t, t)^2)` from a network of the user's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vadd_pyro.distributions import DiagonalNormal
from vadd_pyro.models.priors.conditioning import LocationScale
from vadd_pyro.process import MaskedBatch, check_size
from vadd_pyro.programs import check_callable

__all__ = ["ConditionalNormal", "LearnedNormal", "StandardNormal"]


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


class LearnedNormal(LocationScale):
    """A normal with learned mean and scale.

    An affine map of the latent, which the first layer of any decoder contains already: without a
    context it adds nothing in law to :class:`StandardNormal`, only another path of training.

    Args:
        latent_dim: size ``d`` of ``z``.
        context: features of the state that shift mean and scale, such as
            :class:`vadd_pyro.nn.StateFeatures`; None for an unconditional prior.
    """

    def forward(self, batch: MaskedBatch) -> DiagonalNormal:
        return DiagonalNormal(*self.parameters_at(batch))


class ConditionalNormal(nn.Module):
    """A normal whose mean and scale are read off the state: ``p(z | x_t, t)``.

    Better than ``N(0, I)`` on 8-modes; on data along curves it needs more updates, and on circles
    it was still worse at one step after 12,000, so do not use it there (docs/zoo.md): where all
    is masked it is a normal like any other, and what it learns of the state helps later steps.

    Args:
        network: ``network(batch) -> (z_loc, z_scale)``, each ``(B, d)``, reading ``batch.x_t`` and
            ``batch.t`` only, such as :class:`vadd_pyro.nn.StateEncoder`.
    """

    def __init__(self, network: Callable[[MaskedBatch], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        check_callable("network", network)
        self.network = network
        self.latent_dim = getattr(network, "latent_dim", None)

    def forward(self, batch: MaskedBatch) -> DiagonalNormal:
        z_loc, z_scale = self.network(batch)
        return DiagonalNormal(z_loc, z_scale)
