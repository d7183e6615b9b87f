"""A normalising flow of zuko as a Pyro distribution.

``pyro.contrib.zuko`` wraps flows too, but without a support, without ``sample`` apart from
``rsample``, and not under ``Predictive``.

References:
    Rezende and Mohamed 2015 (arXiv 1505.05770); Durkan et al. 2019 (arXiv 1906.04032) for the
    splines; zuko, Rozet et al. 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

if TYPE_CHECKING:
    from zuko.distributions import NormalizingFlow

__all__ = ["FlowDistribution"]


class FlowDistribution(TorchDistribution):
    """The law of a flow from a standard normal, over vectors of size ``d``.

    Args:
        flow: a distribution of zuko, what ``zuko.flows.NSF(...)(context)`` returns; its context
            ``(..., c)`` gives the batch shape.
        temperature: factor of the base's standard deviation.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, flow: NormalizingFlow, temperature: float = 1.0, validate_args: bool | None = None
    ) -> None:
        self.flow = flow
        self.temperature = temperature
        super().__init__(flow.batch_shape, flow.event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> FlowDistribution:
        """The same law over a larger batch shape."""
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self
        return FlowDistribution(self.flow.expand(shape), self.temperature, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, the batch shape."""
        if self._validate_args:
            self._validate_sample(value)
        noise, log_det = self.flow.transform.call_and_ladj(value)
        return self._base(noise) + log_det

    def _base(self, noise: Tensor) -> Tensor:
        if self.temperature == 1:
            return self.flow.base.log_prob(noise)
        scale = torch.full_like(noise, self.temperature)
        return torch.distributions.Normal(0.0, scale).log_prob(noise).sum(-1)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Reparameterised draws, ``sample_shape + batch_shape + (d,)``."""
        noise = self.flow.base.sample(torch.Size(sample_shape)) * self.temperature
        return self.flow.transform.inv(noise)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def transport(self, u: Tensor) -> Tensor:
        """Points of the unit cube ``u (..., d)`` carried to this law."""
        return self.flow.transform.inv(torch.special.ndtri(u) * self.temperature)

    def tempered(self, temperature: float) -> FlowDistribution:
        """The same flow from a base with its standard deviation multiplied."""
        return FlowDistribution(self.flow, self.temperature * temperature, validate_args=False)
