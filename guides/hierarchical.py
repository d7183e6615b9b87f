r"""Guides over several sites, each drawn given those before it.

.. math::
    r(z_L, \dots, z_1 \mid h) = \prod_l r(z_l \mid z_{\text{before } l}, h), \qquad h = h(x_0, x_t)

Top-down, in the model's order, closed-form KL divergences apply site by site; bottom-up
(``z_1`` first, as in the first hierarchical autoencoders) they do not, and log-densities are used.
Sites whose support is not all of space are drawn as normals and carried there.

References:
    Sønderby et al. 2016 (arXiv 1602.02282); Rezende et al. 2014 (arXiv 1401.4082).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from vadd_pyro.distributions import DiagonalNormal
from vadd_pyro.guides.features import Features, check_features
from vadd_pyro.nn import normal_parameters
from vadd_pyro.process import MaskedBatch, check_size
from vadd_pyro.programs import Program

__all__ = ["AmortizedHierarchical"]


class AmortizedHierarchical(Program):
    """Samples several sites from normals, in a chain.

    Args:
        features: recognition features, such as :class:`vadd_pyro.nn.MLPFeatures`.
        sites: size of each site by name, in the model's order, such as ``prior.sites``.
        top_down: draw them in that order; False for the reverse.
        hidden_dim: width of the network of each site.
        supports: constraint of each site that is not a real vector: ``torch.Size`` of its events
            and the constraint.
    """

    def __init__(
        self,
        features: Features,
        sites: Mapping[str, int],
        *,
        top_down: bool = True,
        hidden_dim: int = 64,
        supports: Mapping[str, tuple[torch.Size, constraints.Constraint]] | None = None,
    ) -> None:
        super().__init__()
        check_features(features)
        if not sites:
            raise ValueError("sites is empty: expected at least one name with its size")
        self.features = features
        self.supports = dict(supports or {})
        order = list(sites.items())
        self.order = order if top_down else order[::-1]
        self.layers = nn.ModuleList()
        before = 0
        for _, size in self.order:
            check_size("sites", size)
            layer = nn.ModuleDict(
                {
                    "features": nn.Linear(features.feature_dim, hidden_dim),  # type: ignore[attr-defined]
                    "head": nn.Linear(hidden_dim, 2 * size),
                }
            )
            if before:
                layer["before"] = nn.Linear(before, hidden_dim, bias=False)
            self.layers.append(layer)
            before += size

    def forward(self, batch: MaskedBatch) -> dict[str, Tensor]:
        h = self.features(batch)
        values: dict[str, Tensor] = {}
        before: list[Tensor] = []
        with pyro.plate("data", len(batch), dim=-1):
            for (name, _), layer in zip(self.order, self.layers, strict=True):
                hidden = layer["features"](h)  # type: ignore[index]
                if before:
                    hidden = hidden + layer["before"](torch.cat(before, -1))  # type: ignore[index]
                raw = layer["head"](torch.nn.functional.silu(hidden))  # type: ignore[index]
                law, flat = self._law(name, raw)
                values[name] = pyro.sample(name, law)
                before.append(flat(values[name]))
        return values

    def _law(self, name: str, raw: Tensor) -> tuple[Any, Callable[[Tensor], Tensor]]:
        """Distribution of a site, and the map from its values to vectors for the sites after."""
        loc, scale = normal_parameters(raw)
        if name not in self.supports:
            return DiagonalNormal(loc, scale), lambda value: value
        shape, support = self.supports[name]
        to_support = biject_to(support)
        inner = to_support.inverse_shape(shape)
        normal = dist.Normal(
            loc.reshape(loc.shape[:-1] + inner), scale.reshape(loc.shape[:-1] + inner)
        )
        law = dist.TransformedDistribution(normal.to_event(len(inner)), [to_support])

        def flat(value: Tensor) -> Tensor:
            leading = value.shape[: value.dim() - len(shape)]
            return to_support.inv(value).reshape(*leading, -1)

        return law, flat
