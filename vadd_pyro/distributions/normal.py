r"""``Normal(loc, scale).to_event(1)`` in one kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import Independent, Normal
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution as TorchBase
from torch.distributions import constraints, kl_divergence, register_kl

__all__ = ["DiagonalNormal"]

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class DiagonalNormal(TorchDistribution):
    """``Normal(loc, scale).to_event(1)`` in one kernel, with closed-form KL to itself and to that.

    Args:
        loc: mean, ``(..., d)``.
        scale: standard deviation, ``(..., d)``, positive.
    """

    arg_constraints: ClassVar = {
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        if loc.shape != scale.shape:
            loc, scale = torch.broadcast_tensors(loc, scale)
        self.loc = loc
        self.scale = scale
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """``loc``."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """``scale ** 2``."""
        return self.scale.square()

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> DiagonalNormal:
        """The same law over a larger batch shape."""
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self
        shape = shape + self.event_shape
        return DiagonalNormal(
            self.loc.expand(shape), self.scale.expand(shape), validate_args=False
        )

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Reparameterised draws, ``sample_shape + batch_shape + (d,)``."""
        shape = torch.Size(sample_shape) + self.loc.shape
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return torch.addcmul(self.loc, self.scale, noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, the batch shape."""
        if self._validate_args:
            self._validate_sample(value)
        standard = (value - self.loc) / self.scale
        terms = standard.square() * -0.5 - self.scale.log()
        return terms.sum(-1) - self.event_shape[0] * _HALF_LOG_TWO_PI

    def entropy(self) -> Tensor:
        """Differential entropy in nats, the batch shape."""
        return self.scale.log().sum(-1) + self.event_shape[0] * (0.5 + _HALF_LOG_TWO_PI)

    def transport(self, u: Tensor) -> Tensor:
        """Points of the unit cube ``u (..., d)`` carried to this law, by its quantiles."""
        return self.loc + self.scale * torch.special.ndtri(u)

    def tempered(self, temperature: float) -> DiagonalNormal:
        """The same law with its scale multiplied."""
        return DiagonalNormal(self.loc, self.scale * temperature, validate_args=False)


@register_kl(DiagonalNormal, DiagonalNormal)
def _kl_diagonal(p: DiagonalNormal, q: DiagonalNormal) -> Tensor:
    ratio = p.scale / q.scale
    shift = (p.loc - q.loc) / q.scale
    return (0.5 * (ratio.square() + shift.square() - 1) - ratio.log()).sum(-1)


def _as_diagonal(distribution: TorchBase) -> DiagonalNormal:
    """``Normal.to_event(1)`` as a :class:`DiagonalNormal`; others have no closed form here."""
    base = getattr(distribution, "base_dist", None)
    if isinstance(base, Normal) and len(distribution.event_shape) == 1:
        return DiagonalNormal(base.loc, base.scale, validate_args=False)
    raise NotImplementedError(f"no closed-form KL between DiagonalNormal and {distribution}")


@register_kl(DiagonalNormal, Independent)
def _kl_diagonal_independent(p: DiagonalNormal, q: Independent) -> Tensor:
    return kl_divergence(p, _as_diagonal(q))


@register_kl(Independent, DiagonalNormal)
def _kl_independent_diagonal(p: Independent, q: DiagonalNormal) -> Tensor:
    return kl_divergence(_as_diagonal(p), q)
