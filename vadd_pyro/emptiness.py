"""Rows in which an objective has nothing to score, left out before the programs run.

Their terms are zero whatever the programs say. Under uniform times a row of ``D`` tokens is one of
them with probability ``1 / (D + 1)``, a third of all rows of the plane; under the steps of a long
chain most rows of few tokens are. What is left is a fixed number of rows, so that a compiled graph
can do the same: rarely exceeded, and if it is, all rows are taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from vadd_pyro.process import MaskedBatch, MaskingProcess
from vadd_pyro.times import TimeDistribution, draw_batch

__all__ = ["KeptRows"]

_FIRST, _DRAWS = 8, 64  # batches from which the number of rows is found
_DEVIATIONS = 3.0  # above their mean
_WORTH = 0.9  # of the rows; above that all of them are taken


class KeptRows:
    """Takes as many rows of a batch as nearly always are enough for all that have a target.

    Args:
        process: the forward process.
        times: where the objective looks.
        steps: whether it scores what steps reveal.
        least_time: steps from earlier times have no latent.
        drop: whether any are left out.
    """

    def __init__(
        self,
        process: MaskingProcess,
        times: TimeDistribution,
        steps: bool = False,
        least_time: float = 0.0,
        drop: bool = True,
    ) -> None:
        self.law = process, times, steps, least_time
        self.drop = drop
        self.exceeded = 0  # batches that had more
        self._in_graph = False

    def number(self, num_rows: int) -> int:
        """Of so many rows, how many are taken."""
        return _number(self, num_rows) if self.drop else num_rows

    @contextmanager
    def in_graph(self) -> Iterator[None]:
        """Look at no values meanwhile: of a batch that has more, all weights are no numbers."""
        self._in_graph = True
        try:
            yield
        finally:
            self._in_graph = False

    def __call__(self, batch: MaskedBatch, further: Any = ()) -> MaskedBatch:
        """The rows with a target, in their order, and of the others as many as there is room for;
        all rows if there is not.

        Args:
            batch: the rows.
            further: what the programs are given beside them.

        Raises:
            ValueError: if that is anything.
        """
        if further and self.drop:
            raise ValueError(
                "drop_empty_rows=True gives the programs fewer rows than x_0 has, which further "
                f"arguments would not fit: got {further!r}; leave it False"
            )
        number = self.number(len(batch))
        if number == len(batch):
            return batch
        empty = ~batch.target.any(-1)
        exceeded = len(batch) - empty.sum() > number
        if not self._in_graph and exceeded:
            self.exceeded += 1
            return batch
        kept = batch[empty.to(torch.uint8).argsort(stable=True)[:number]]
        if not self._in_graph:
            return kept
        weight = torch.ones_like(kept.t) if kept.weight is None else kept.weight
        return replace(kept, weight=weight.masked_fill(exceeded, math.nan))


@lru_cache(maxsize=64)
def _number(rows: KeptRows, num_rows: int) -> int:
    process, times, steps, least_time = rows.law
    x_0 = torch.zeros(num_rows, process.length, dtype=torch.long)
    found: list[int] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(_DRAWS):
            batch = draw_batch(times, process, x_0, steps, least_time)
            found.append(int(batch.target.any(-1).sum()))
            if len(found) == _FIRST and sum(found) > _WORTH * num_rows * _FIRST:
                return num_rows
    std, mean = torch.std_mean(torch.tensor(found, dtype=torch.double))
    number = math.ceil(float(mean + _DEVIATIONS * std)) + 1
    return number if number <= _WORTH * num_rows else num_rows
