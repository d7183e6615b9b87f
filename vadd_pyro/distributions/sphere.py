r"""Directions on a sphere of any dimension: Pyro's projected normal, with its density.

``z = x / |x|`` for ``x ~ N(c, I_d)`` has, with :math:`t = c^\top z` and respect to the area of the
sphere,

.. math::
    p(z) = (2 \pi)^{-d/2} e^{-|c|^2 / 2} \int_0^\infty r^{d-1} e^{r t - r^2 / 2}\, dr .

Pyro writes the integral in closed form for ``d = 2, 3, 4``, which loses all digits for ``t`` well
below zero. Here it is taken over :math:`s = \log r`, where the integrand is smooth, has one peak
at :math:`r_* = (t + \sqrt{t^2 + 4 d}) / 2`, of width :math:`(r_*^2 + d)^{-1/2}`, and falls off
at least exponentially, so that the trapezoidal rule converges faster than any power of its step.

References:
    Hernandez-Stumpfhauser et al. 2017, "The General Projected Normal Distribution of Arbitrary
    Dimension"; Trefethen and Weideman 2014 on the trapezoidal rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.ops.tensor_utils import safe_normalize
from torch import Tensor

__all__ = ["ProjectedNormal"]

_NODES = torch.linspace(-24.0, 9.0, 67)  # in units of the peak's width, a step of one half


class ProjectedNormal(dist.ProjectedNormal):
    """Projected normal with a density in every dimension ``d >= 2``.

    ``ProjectedNormalReparam`` applies to it as to Pyro's own, which it extends.

    Args:
        concentration: ``c``, ``(..., d)``; its direction is the mode, its length the
            concentration; zero is uniform.
    """

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> ProjectedNormal:
        """The same law over a larger batch shape."""
        shape = torch.Size(batch_shape)
        return ProjectedNormal(self.concentration.expand(shape + self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats with respect to the area of the sphere, the batch shape."""
        if self._validate_args:
            self._validate_sample(value)
        c, d = self.concentration, self.event_shape[0]
        t = (c * value).sum(-1)
        with torch.no_grad():
            peak = 0.5 * (t + (t.square() + 4 * d).sqrt())
            # For t far below zero the sum cancels: the other form of the same root does not.
            peak = torch.where(t < 0, 2 * d / ((t.square() + 4 * d).sqrt() - t), peak)
            width = (peak.square() + d).rsqrt()
            nodes = _NODES.to(t)
            s = peak.log().unsqueeze(-1) + width.unsqueeze(-1) * nodes
            r = s.exp()
            base = d * s - 0.5 * r.square()
        step = float(_NODES[1] - _NODES[0])
        integral = torch.logsumexp(base + r * t.unsqueeze(-1), -1) + (step * width).log()
        return integral - 0.5 * c.square().sum(-1) - 0.5 * d * math.log(2 * math.pi)

    def tempered(self, temperature: float) -> ProjectedNormal:
        """The same direction with its concentration divided."""
        return ProjectedNormal(self.concentration / temperature)

    def transport(self, u: Tensor) -> Tensor:
        """Points of the unit cube ``u (..., d)`` carried to this law."""
        return safe_normalize(self.concentration + torch.special.ndtri(u))
