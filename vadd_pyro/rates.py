"""Step sizes over a training run, and how much its average of weights takes of the newest."""

from __future__ import annotations

import math

__all__ = ["average_weight", "scheduled_rate"]


def scheduled_rate(
    iteration: int, base: float, warmup: int, num_iterations: int, decay: str, final: float
) -> float:
    """Step size before update ``iteration`` (from 0).

    Linear warm-up, then constant, cosine or linear to ``final * base``.
    """
    if iteration < warmup:
        return base * (iteration + 1) / warmup
    if decay == "constant":
        return base
    progress = (iteration - warmup) / max(1, num_iterations - warmup)
    share = 0.5 * (1 + math.cos(math.pi * progress)) if decay == "cosine" else 1 - progress
    return base * (final + (1 - final) * share)


def average_weight(iteration: int, decay: float) -> float:
    """Weight of the weights after update ``iteration`` (from 0) in their average.

    Starts with a short memory, so that the first weights are soon forgotten.
    """
    done = iteration + 1
    return 1 - min(decay, (1 + done) / (10 + done))
