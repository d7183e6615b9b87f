"""Step sizes over a training run."""

from __future__ import annotations

import math

__all__ = ["scheduled_rate"]


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
