r"""A hierarchy of normals, drawn from the top down:

.. math::
    z_L \sim N(0, I), \qquad z_l \sim N\big(m_l(z_{l+1}, x_t, t),\, s_l(z_{l+1}, x_t, t)^2\big),
    \quad l = L-1, \dots, 1.

Marginally, ``z_1`` is an infinite mixture of normals. The decoder sees ``z_1``, or all levels side
by side (``all_levels=True``), which keeps upper ones from collapsing.

References:
    Rezende et al. 2014 (arXiv 1401.4082); Sønderby et al. 2016 (arXiv 1602.02282).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pyro
import torch
from torch import Tensor, nn

from vadd_pyro.distributions import DiagonalNormal
from vadd_pyro.models.priors.conditioning import Conditioned, Context, features_of
from vadd_pyro.nn import normal_parameters
from vadd_pyro.process import MaskedBatch, check_size

__all__ = ["Hierarchical"]


class Hierarchical(nn.Module):
    """Two or more levels of normals with sites ``"z_L"``, ..., ``"z_1"``, drawn in that order.

    Better than ``N(0, I)`` on 8-modes, worse on tied tokens, elsewhere within the spread of seeds,
    which is larger than with one level (docs/zoo.md).

    Args:
        latent_dims: sizes of the levels from the top, ``(d_L, ..., d_1)``.
        context: features of the state that shift every level, such as
            :class:`vadd_pyro.nn.StateFeatures`; None for an unconditional prior.
        hidden_dim: width of the networks between levels.
        all_levels: give the decoder all levels side by side instead of ``z_1``.
    """

    def __init__(
        self,
        latent_dims: Sequence[int] = (2, 2),
        context: Context | None = None,
        *,
        hidden_dim: int = 64,
        all_levels: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(latent_dims, Sequence) or len(latent_dims) < 2:
            raise ValueError(f"latent_dims must name at least two levels, got {latent_dims!r}")
        check_size("hidden_dim", hidden_dim)
        for size in latent_dims:
            check_size("latent_dims", size)
        self.latent_dims = tuple(latent_dims)
        self.latent_dim = sum(latent_dims) if all_levels else latent_dims[-1]
        self.all_levels = all_levels
        self.context = context
        count = len(latent_dims)
        self.sites = {f"z_{count - i}": size for i, size in enumerate(latent_dims)}
        self.top: Conditioned | None = None
        if context is not None:
            self.top = Conditioned(torch.zeros(2 * latent_dims[0]), context)
        self.below = nn.ModuleList(
            nn.ModuleDict(
                {
                    "above": nn.Linear(above, hidden_dim),
                    "state": Conditioned(torch.zeros(hidden_dim), context),
                    "head": nn.Linear(hidden_dim, 2 * size),
                }
            )
            for above, size in itertools.pairwise(latent_dims)
        )

    def forward(self, batch: MaskedBatch) -> Tensor:
        h = features_of(self.context, batch)
        names = list(self.sites)
        raw = batch.t.new_zeros(2 * self.latent_dims[0]) if self.top is None else self.top(h)
        z = pyro.sample(names[0], DiagonalNormal(*normal_parameters(raw)))
        levels = [z]
        for name, layer in zip(names[1:], self.below, strict=True):
            hidden = torch.nn.functional.silu(layer["above"](z) + layer["state"](h))  # type: ignore[index]
            law = DiagonalNormal(*normal_parameters(layer["head"](hidden)))  # type: ignore[index]
            z = pyro.sample(name, law)
            levels.append(z)
        return torch.cat(levels, -1) if self.all_levels else z
