r"""Masking schedules: how likely a token is still visible at time ``t``.

A schedule is the survival probability ``alpha(t)`` of one token, decreasing from ``alpha(0) = 1``
(clean) to ``alpha(1) = 0`` (all masked). Two quantities follow from it:

.. math::
    \rho(s, t) = \frac{\alpha(s) - \alpha(t)}{1 - \alpha(t)}, \qquad
    w(t) = \frac{-\alpha'(t)}{1 - \alpha(t)},

the probability that a token masked at ``t`` is revealed by ``s < t``, and the weight of time ``t``
in the continuous-time objective.

References:
    Shi et al. 2024, "Simplified and Generalized Masked Diffusion for Discrete Data" (arXiv
    2406.04329), section 2.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "CosineSchedule",
    "FunctionSchedule",
    "LinearSchedule",
    "PolynomialSchedule",
    "Schedule",
]


class Schedule(ABC):
    """Base class. A schedule of your own defines :meth:`alpha`; the rest has a default."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Probability that a token is visible at time ``t`` in ``[0, 1]``.

        Any shape, same shape out.
        """

    def alpha_prime(self, t: Tensor) -> Tensor:
        """Derivative of :meth:`alpha`, by automatic differentiation unless a subclass knows it."""
        with torch.enable_grad():
            t = t.detach().clone().requires_grad_(True)
            (derivative,) = torch.autograd.grad(self.alpha(t).sum(), t)
        return derivative

    def rho(self, s: Tensor, t: Tensor) -> Tensor:
        """Probability that a token masked at ``t`` is visible at ``s < t``.

        Broadcast shape of ``s`` and ``t``.
        """
        alpha_t = self.alpha(t)
        tiny = torch.finfo(alpha_t.dtype).tiny
        return ((self.alpha(s) - alpha_t) / (1 - alpha_t).clamp_min(tiny)).clamp(0, 1)

    def weight(self, t: Tensor) -> Tensor:
        """``-alpha'(t) / (1 - alpha(t))``:

        The weight of time ``t`` in the DELBO (``1 / t`` for the linear schedule).
        """
        precise = t.double()  # 1 - alpha(t) loses all its digits near t = 0 in single precision
        tiny = torch.finfo(torch.double).tiny
        weight = -self.alpha_prime(precise) / (1 - self.alpha(precise)).clamp_min(tiny)
        return weight.to(t.dtype)

    def inverse(self, alpha: Tensor) -> Tensor:
        """The time at which ``alpha(t)`` equals the given value in ``[0, 1]``, by bisection in
        double precision.
        """
        value = alpha.double()
        low, high = torch.zeros_like(value), torch.ones_like(value)
        for _ in range(60):
            middle = (low + high) / 2
            above = self.alpha(middle) > value
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return ((low + high) / 2).to(alpha.dtype)

    def check(self, num_points: int = 1025) -> None:
        """Check that ``alpha`` falls from 1 to 0 without ever rising.

        Raises:
            ValueError: naming the schedule, where it goes wrong and what was expected.
        """
        t = torch.linspace(0, 1, num_points, dtype=torch.double)
        alpha = self.alpha(t)
        name = repr(self)
        if not isinstance(alpha, Tensor) or alpha.shape != t.shape:
            got = tuple(alpha.shape) if isinstance(alpha, Tensor) else type(alpha).__name__
            raise ValueError(
                f"schedule {name}: alpha(t) must keep the shape {tuple(t.shape)} of t, got {got}"
            )
        if not alpha.isfinite().all():
            where = t[~alpha.isfinite()][0].item()
            raise ValueError(f"schedule {name}: alpha({where:.4g}) is not finite")
        for time, index, expected in ((0, 0, 1.0), (1, -1, 0.0)):
            if abs(alpha[index].item() - expected) > 1e-6:
                raise ValueError(
                    f"schedule {name}: alpha({time}) must be {expected:g}, got "
                    f"{alpha[index].item():.6g}"
                )
        rises = (alpha.diff() > 1e-9).nonzero().flatten()
        if len(rises):
            i = int(rises[0])
            raise ValueError(
                f"schedule {name}: alpha must decrease on [0, 1], but rises from "
                f"{alpha[i].item():.6g} at t = {t[i].item():.4g} to {alpha[i + 1].item():.6g} at "
                f"t = {t[i + 1].item():.4g}"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class LinearSchedule(Schedule):
    """``alpha(t) = 1 - t``; weight ``1 / t``. The default everywhere."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def alpha_prime(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def weight(self, t: Tensor) -> Tensor:
        return 1 / t.clamp_min(torch.finfo(t.dtype).tiny)

    def inverse(self, alpha: Tensor) -> Tensor:
        return 1 - alpha


class CosineSchedule(Schedule):
    """``alpha(t) = 1 - cos(pi (1 - t) / 2)``:

    Unmasks slowly at first (near ``t = 1``), fast at the end.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - torch.cos(math.pi / 2 * (1 - t))

    def alpha_prime(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))

    def weight(self, t: Tensor) -> Tensor:
        weight = math.pi / 2 / torch.tan(math.pi / 2 * t.clamp_min(torch.finfo(t.dtype).tiny))
        return weight.clamp_min(0)  # at t = 1, where rounding takes the tangent past its pole


class PolynomialSchedule(Schedule):
    """``alpha(t) = 1 - t ** power``; weight ``power / t``.

    Args:
        power: exponent, a positive number; 1 is the linear schedule.
    """

    def __init__(self, power: float) -> None:
        if not power > 0 or not math.isfinite(power):
            raise ValueError(f"power must be a positive number, got {power!r}")
        self.power = float(power)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t**self.power

    def alpha_prime(self, t: Tensor) -> Tensor:
        return -self.power * t ** (self.power - 1)

    def weight(self, t: Tensor) -> Tensor:
        return self.power / t.clamp_min(torch.finfo(t.dtype).tiny)

    def inverse(self, alpha: Tensor) -> Tensor:
        return (1 - alpha) ** (1 / self.power)

    def __repr__(self) -> str:
        return f"PolynomialSchedule(power={self.power:g})"


class FunctionSchedule(Schedule):
    """Any decreasing function of yours, checked when it is given.

    Args:
        alpha: differentiable function of a tensor of times in ``[0, 1]``, from ``alpha(0) = 1`` to
            ``alpha(1) = 0``.

    Example:
        >>> FunctionSchedule(lambda t: (1 - t) ** 2).weight(torch.tensor(0.5)).item()
        1.3333333730697632

    Raises:
        ValueError: if the function is not finite, misses an end point or rises anywhere.
    """

    def __init__(self, alpha: Callable[[Tensor], Tensor]) -> None:
        self._alpha = alpha
        self.check()

    def alpha(self, t: Tensor) -> Tensor:
        return self._alpha(t)

    def __repr__(self) -> str:
        return f"FunctionSchedule({getattr(self._alpha, '__name__', 'alpha')})"
