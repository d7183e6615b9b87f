r"""KL annealing: the weight ``lambda`` of the latent part as a function of the training iteration.

A latent that costs its full KL from the first update on is often given up before the decoder has
learnt to read it (posterior collapse). Three remedies by schedule,

.. math::
    \lambda_{\text{linear}}(i) = \min(1, i / n), \qquad
    \lambda_{\text{cyclical}}(i) = \min\Big(1, \frac{(i \bmod c) / c}{R}\Big), \qquad
    \lambda_{\text{step}}(i) = \lambda_k \ \text{for}\ i_k \le i < i_{k+1},

the first two scaled to go from ``start`` to ``end``. Any function of the iteration does as well.

References:
    Bowman et al. 2016 (arXiv 1511.06349) for the ramp; Fu et al. 2019, "Cyclical Annealing
    Schedule" (arXiv 1903.10145), equations 6 and 7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from vadd_pyro.process import check_size

__all__ = ["CyclicalAnnealing", "LinearAnnealing", "StepAnnealing"]


class LinearAnnealing:
    """KL weight that rises linearly from ``start`` to ``end`` over ``num_iterations``, then stays.

    Args:
        num_iterations: length of the ramp, in training iterations.
        start, end: weight at the beginning and from the end of the ramp on.
    """

    def __init__(self, num_iterations: int, start: float = 0.0, end: float = 1.0) -> None:
        check_size("num_iterations", num_iterations)
        for name, value in (("start", start), ("end", end)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite KL weight >= 0, got {value!r}")
        self.num_iterations = num_iterations
        self.start = start
        self.end = end

    def __call__(self, iteration: int) -> float:
        return self.start + (self.end - self.start) * min(1.0, iteration / self.num_iterations)

    def __repr__(self) -> str:
        return f"LinearAnnealing({self.num_iterations}, start={self.start:g}, end={self.end:g})"


class CyclicalAnnealing:
    """KL weight that starts anew several times, and stays at ``end`` after the last cycle.

    Each cycle lasts ``c = num_iterations / num_cycles`` iterations: a linear ramp over its first
    part, ``end`` over the rest. Every restart lets the decoder use latents that the last cycle
    already made informative.

    Args:
        num_iterations: length of all cycles together, in training iterations.
        num_cycles: how many there are.
        ramp: share ``R`` of a cycle in which the weight rises, in ``(0, 1]``.
        start, end: weight at the beginning of a cycle and from the end of its ramp on.
    """

    def __init__(
        self,
        num_iterations: int,
        num_cycles: int = 4,
        ramp: float = 0.5,
        start: float = 0.0,
        end: float = 1.0,
    ) -> None:
        check_size("num_iterations", num_iterations)
        check_size("num_cycles", num_cycles)
        if num_cycles > num_iterations:
            raise ValueError(
                f"num_cycles must be at most num_iterations = {num_iterations}, got {num_cycles}"
            )
        if not 0 < ramp <= 1:
            raise ValueError(f"ramp is a share of a cycle and must lie in (0, 1], got {ramp!r}")
        _check_weights("start and end", (start, end))
        self.num_iterations = num_iterations
        self.num_cycles = num_cycles
        self.ramp = ramp
        self.start = start
        self.end = end

    def __call__(self, iteration: int) -> float:
        if iteration >= self.num_iterations:
            return self.end
        position = (iteration * self.num_cycles % self.num_iterations) / self.num_iterations
        return self.start + (self.end - self.start) * min(1.0, position / self.ramp)

    def __repr__(self) -> str:
        return (
            f"CyclicalAnnealing({self.num_iterations}, num_cycles={self.num_cycles}, "
            f"ramp={self.ramp:g}, start={self.start:g}, end={self.end:g})"
        )


class StepAnnealing:
    """KL weight that is constant between given iterations: a staircase.

    ``StepAnnealing([1000, 3000], [0.0, 0.1, 1.0])`` is 0 before iteration 1000, 0.1 up to 2999
    and 1 from 3000 on.

    Args:
        milestones: iterations at which the weight changes, increasing.
        weights: the weights, one more than there are milestones.
    """

    def __init__(self, milestones: Sequence[int], weights: Sequence[float]) -> None:
        milestones, weights = list(milestones), list(weights)
        for milestone in milestones:
            check_size("each of milestones", milestone)
        if any(b <= a for a, b in pairwise(milestones)):
            raise ValueError(f"milestones must increase, got {milestones}")
        if len(weights) != len(milestones) + 1:
            raise ValueError(
                f"weights must have one entry more than milestones, {len(milestones) + 1}, got "
                f"{len(weights)}"
            )
        _check_weights("weights", weights)
        self.milestones = milestones
        self.weights = weights

    def __call__(self, iteration: int) -> float:
        return self.weights[sum(iteration >= milestone for milestone in self.milestones)]

    def __repr__(self) -> str:
        return f"StepAnnealing({self.milestones}, {self.weights})"


def _check_weights(name: str, weights: Sequence[float]) -> None:
    for weight in weights:
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise ValueError(f"{name} must be KL weights, finite numbers >= 0, got {weight!r}")
