r"""Normal guides: independent coordinates, a low-rank and a full covariance.

.. math::
    r(z \mid x_0, x_t) = N(m, \mathrm{diag}(s^2)), \qquad N(m, W W^\top + \mathrm{diag}(s^2)),
    \qquad N(m, C C^\top)

with what is right of the bar read by a recognition network.

References:
    Kingma and Welling 2014 (arXiv 1312.6114); Xie et al. 2025 (arXiv 2505.17384), section 3; Ong
    et al. 2018 (arXiv 1701.03208) for the low rank.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from vadd_pyro.distributions import DiagonalNormal
from vadd_pyro.guides.features import Features, Head
from vadd_pyro.nn import normal_parameters
from vadd_pyro.process import MaskedBatch, check_size
from vadd_pyro.programs import Program, check_callable

__all__ = ["AmortizedLowRankNormal", "AmortizedMultivariateNormal", "AmortizedNormal"]


class AmortizedNormal(Program):
    """Samples ``"z"`` from a diagonal normal.

    Args:
        encoder: ``encoder(batch) -> (z_loc, z_scale)``, each ``(B, d)``, such as
            :class:`vadd_pyro.nn.MLPEncoder`. It may look at everything in the batch, and should
            see ``masked`` and ``target``.
    """

    def __init__(self, encoder: Callable[[MaskedBatch], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        check_callable("encoder", encoder)
        self.encoder = encoder

    def forward(self, batch: MaskedBatch) -> Tensor:
        z_loc, z_scale = self.encoder(batch)
        with pyro.plate("data", len(batch), dim=-1):
            return pyro.sample("z", DiagonalNormal(z_loc, z_scale))


class NormalEncoder(nn.Module):
    """Mean and scale from features: an encoder for :class:`AmortizedNormal`.

    Args:
        features: recognition features, such as :class:`vadd_pyro.nn.MLPFeatures`.
        latent_dim: size ``d`` of ``z``.
    """

    def __init__(self, features: Features, latent_dim: int) -> None:
        super().__init__()
        self.head = Head(features, 2 * latent_dim)

    def forward(self, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        return normal_parameters(self.head(batch))


class AmortizedLowRankNormal(Program):
    """Samples ``"z"`` from a normal with covariance ``W W^T + diag(s^2)``.

    Args:
        features: recognition features, such as :class:`vadd_pyro.nn.MLPFeatures`.
        latent_dim: size ``d`` of ``z``.
        rank: columns of ``W``.
    """

    def __init__(self, features: Features, latent_dim: int, rank: int = 1) -> None:
        super().__init__()
        check_size("latent_dim", latent_dim)
        check_size("rank", rank)
        self.latent_dim = latent_dim
        self.rank = rank
        self.head = Head(features, (2 + rank) * latent_dim)

    def forward(self, batch: MaskedBatch) -> Tensor:
        normal, factor = self.head(batch).split(
            [2 * self.latent_dim, self.rank * self.latent_dim], -1
        )
        z_loc, z_scale = normal_parameters(normal)
        factor = factor.unflatten(-1, (self.latent_dim, self.rank))
        law = dist.LowRankMultivariateNormal(z_loc, factor, z_scale.square())
        with pyro.plate("data", len(batch), dim=-1):
            return pyro.sample("z", law)


class AmortizedMultivariateNormal(Program):
    """Samples ``"z"`` from a normal with any covariance, by its Cholesky factor.

    Args:
        features: recognition features, such as :class:`vadd_pyro.nn.MLPFeatures`.
        latent_dim: size ``d`` of ``z``; the head has ``d (d + 3) / 2`` outputs.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, features: Features, latent_dim: int) -> None:
        super().__init__()
        check_size("latent_dim", latent_dim)
        self.latent_dim = latent_dim
        rows, columns = torch.tril_indices(latent_dim, latent_dim, -1)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.head = Head(features, 2 * latent_dim + len(rows))

    def forward(self, batch: MaskedBatch) -> Tensor:
        normal, lower = self.head(batch).split([2 * self.latent_dim, len(self.rows)], -1)
        z_loc, z_scale = normal_parameters(normal)
        cholesky = torch.diag_embed(z_scale)
        cholesky = cholesky.index_put(
            (torch.arange(len(batch), device=lower.device).unsqueeze(-1), self.rows, self.columns),
            lower,
        )
        law = dist.MultivariateNormal(z_loc, scale_tril=cholesky)
        with pyro.plate("data", len(batch), dim=-1):
            return pyro.sample("z", law)
