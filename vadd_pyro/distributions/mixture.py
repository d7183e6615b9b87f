r"""A mixture of diagonal normals whose draws carry gradients.

.. math::
    p(z) = \sum_k \pi_k \prod_j N(z_j; m_{kj}, s_{kj}^2)

A component is drawn, which has no derivative, but the draw as a whole has one: the distributional
transform :math:`u_j = F(z_j \mid z_{<j})` of a draw is uniform whatever the parameters, so with
``u`` held fixed (implicit reparameterisation, Figurnov et al. 2018, arXiv 1805.08498)

.. math::
    \frac{d z_j}{d \phi} = - \frac{1}{p(z_j \mid z_{<j})}
    \frac{d F(z_j \mid z_{<j}; \phi)}{d \phi}, \qquad
    F(z_j \mid z_{<j}) = \sum_k w_k(z_{<j}) \Phi\Big(\frac{z_j - m_{kj}}{s_{kj}}\Big),

with the weights ``w_k`` of the components given the coordinates before, through which gradients
flow from coordinate to coordinate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["NormalMixture"]

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class NormalMixture(TorchDistribution):
    """A mixture of ``M`` diagonal normals over vectors of size ``d``.

    Args:
        logits: unnormalised log-weights, ``(..., M)``.
        loc: means, ``(..., M, d)``.
        scale: standard deviations, ``(..., M, d)``, positive.
    """

    arg_constraints: ClassVar = {
        "logits": constraints.real_vector,
        "loc": constraints.independent(constraints.real, 2),
        "scale": constraints.independent(constraints.positive, 2),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, logits: Tensor, loc: Tensor, scale: Tensor, validate_args: bool | None = None
    ) -> None:
        shape = torch.broadcast_shapes(logits.shape[:-1], loc.shape[:-2], scale.shape[:-2])
        self.logits = logits.expand(shape + logits.shape[-1:])
        self.loc = loc.expand(shape + loc.shape[-2:])
        self.scale = scale.expand(shape + scale.shape[-2:])
        super().__init__(shape, loc.shape[-1:], validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture, ``(..., d)``."""
        return (self.logits.softmax(-1).unsqueeze(-1) * self.loc).sum(-2)

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate, ``(..., d)``."""
        weight = self.logits.softmax(-1).unsqueeze(-1)
        shift = self.loc - self.mean.unsqueeze(-2)  # whose squares cancel nothing
        return (weight * (self.scale.square() + shift.square())).sum(-2)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> NormalMixture:
        """The same law over a larger batch shape."""
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self
        return NormalMixture(
            self.logits.expand(shape + self.logits.shape[-1:]),
            self.loc.expand(shape + self.loc.shape[-2:]),
            self.scale.expand(shape + self.scale.shape[-2:]),
            validate_args=False,
        )

    def _log_components(self, value: Tensor) -> Tensor:
        """Log-density of each coordinate under each component, ``(..., M, d)``."""
        standard = (value.unsqueeze(-2) - self.loc) / self.scale
        return standard.square() * -0.5 - self.scale.log() - _HALF_LOG_TWO_PI

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, the batch shape."""
        if self._validate_args:
            self._validate_sample(value)
        weight = self.logits.log_softmax(-1)
        return torch.logsumexp(weight + self._log_components(value).sum(-1), -1)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws with gradients, ``sample_shape + batch_shape + (d,)``."""
        shape = torch.Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            probability = self.logits.softmax(-1).expand(shape + self.logits.shape[-1:])
            flat = probability.reshape(-1, probability.shape[-1])
            pick = torch.multinomial(flat, 1).reshape(shape)
            value = self._at(pick, torch.randn(shape + self.event_shape).to(self.loc))
        if not (torch.is_grad_enabled() and self._has_gradient()):
            return value
        return self._with_gradient(value)

    def _has_gradient(self) -> bool:
        return any(p.requires_grad for p in (self.logits, self.loc, self.scale))

    def _at(self, pick: Tensor, noise: Tensor) -> Tensor:
        """Component ``pick (...,)`` at standard normal ``noise (..., d)``."""
        index = pick[..., None, None].expand(*pick.shape, 1, self.event_shape[0])
        loc, scale = (
            p.expand(pick.shape + p.shape[-2:]).gather(-2, index).squeeze(-2)
            for p in (self.loc, self.scale)
        )
        return loc + scale * noise

    def _with_gradient(self, value: Tensor) -> Tensor:
        """The same numbers, with the derivative of the inverse distributional transform."""
        weight = self.logits.log_softmax(-1)
        pieces: list[Tensor] = []
        for j in range(self.event_shape[0]):
            z = value[..., j]
            loc, scale = self.loc[..., j], self.scale[..., j]
            share = weight.softmax(-1)
            standard = (z.unsqueeze(-1) - loc) / scale
            cdf = (share * torch.special.ndtr(standard)).sum(-1)
            with torch.no_grad():
                density = (share * torch.exp(-0.5 * standard.square()) / scale).sum(-1)
                density = (density / math.sqrt(2 * math.pi)).clamp_min(1e-12)
            z = z - (cdf - cdf.detach()) / density
            pieces.append(z)
            standard = (z.unsqueeze(-1) - loc) / scale
            weight = weight - 0.5 * standard.square() - scale.log()
        return torch.stack(pieces, -1)

    @property
    def num_uniforms(self) -> int:
        """Columns that :meth:`transport` needs."""
        return self.event_shape[0] + 1

    def transport(self, u: Tensor) -> Tensor:
        """Points of the unit cube ``u (..., 1 + d)`` carried to this law.

        The first coordinate picks the component.
        """
        cdf = self.logits.softmax(-1).cumsum(-1)
        pick = (cdf <= u[..., :1] * cdf[..., -1:]).sum(-1)
        return self._at(pick, torch.special.ndtri(u[..., 1:]).expand(*pick.shape, -1))

    def tempered(self, temperature: float) -> NormalMixture:
        """The same mixture with the scales of its components multiplied."""
        return NormalMixture(self.logits, self.loc, self.scale * temperature, validate_args=False)

    def tilted(self, slope: Tensor, curvature: Tensor) -> NormalMixture:
        r"""The law proportional to :math:`p(z) \exp(a^\top z - \frac12 \sum_j b_j z_j^2)`, a
        mixture again: each component times the factor, and weighted by how well they agree.

        Args:
            slope: ``a``, ``(..., d)``.
            curvature: ``b``, ``(..., d)``, not negative.
        """
        slope, curvature = slope.unsqueeze(-2), curvature.unsqueeze(-2)
        variance = self.scale.square()
        narrowing = 1 + variance * curvature
        pull = slope - curvature * self.loc
        agreement = self.loc * (slope - 0.5 * curvature * self.loc)
        agreement = agreement + 0.5 * (variance * pull.square() / narrowing - narrowing.log())
        return NormalMixture(
            self.logits + agreement.sum(-1),
            self.loc + variance * pull / narrowing,
            self.scale * narrowing.rsqrt(),
            validate_args=False,
        )
