"""What is kept of a training run to look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["History"]


@dataclass
class History:
    """What happened during a run, one entry per logged iteration, and what became of the latents,
    one entry per look at them (:func:`vadd_pyro.latent_statistics`).

    Args:
        iteration: number of updates done.
        loss: mean loss per row since the entry before, nats.
        kl: the KL part of it before ``lambda``, nats per row.
        kl_weight: ``lambda``.
        learning_rate: step size.
        seconds: training time so far, over all resumed parts.
        monitor_iteration: number of updates done at each look at the latents.
        kl_per_dimension, active_units, mutual_information, share_at_prior: what was seen, as in
            :class:`vadd_pyro.LatentStatistics`; of the weights then, not of their average.
    """

    iteration: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    kl_weight: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    monitor_iteration: list[int] = field(default_factory=list)
    kl_per_dimension: list[list[float]] = field(default_factory=list)
    active_units: list[int] = field(default_factory=list)
    mutual_information: list[float | None] = field(default_factory=list)
    share_at_prior: list[float | None] = field(default_factory=list)

    def to_dict(self) -> dict[str, list[Any]]:
        """Columns by name."""
        return {name: list(getattr(self, name)) for name in self.__dataclass_fields__}
