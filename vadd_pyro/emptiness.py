"""Rows in which an objective has nothing to score, left out before the programs run.

Their terms are zero whatever the programs say. Under uniform times a row of ``D`` tokens is one of
them with probability ``1 / (D + 1)``, a third of all rows of the plane; under the steps of a long
chain most rows of few tokens are. What is left is a fixed number of rows, so that a compiled graph
can do the same: rarely exceeded, and if it is, all rows are taken.

Programs must treat each row by itself: values of their own for every row would not fit, a scale
that is a multiple of ``len(batch)`` would count what is left, and statistics over the rows of a
batch (normalisation) would be those of other rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from vadd_pyro.checkpoints import random_state, restore_random_state
from vadd_pyro.process import MaskedBatch, MaskingProcess
from vadd_pyro.times import TimeDistribution, draw_batch

__all__ = ["DrawLaw", "KeptRows"]

_FIRST, _DRAWS = 8, 64  # batches from which the number of rows is found
_DEVIATIONS = 3.0  # above their mean
_WORTH = 0.9  # of the rows; above that all of them are taken


class DrawLaw(NamedTuple):
    """How an objective masks clean rows.

    Args:
        times: where it looks.
        process: the forward process.
        steps: whether it scores what steps reveal.
        least_time: steps from earlier times have no latent.
    """

    times: TimeDistribution
    process: MaskingProcess
    steps: bool = False
    least_time: float = 0.0

    def draw(self, x_0: Tensor) -> MaskedBatch:
        """Times, masks, weights and targets for clean rows ``(B, D)``."""
        return draw_batch(self.times, self.process, x_0, self.steps, self.least_time)


class KeptRows:
    """Takes as many rows of a batch as nearly always are enough for all that have a target.

    Args:
        drop: whether any are left out.
    """

    def __init__(self, drop: bool) -> None:
        self.drop = drop
        self.exceeded = 0  # how often a batch had more
        self._in_graph = False

    def number(self, law: DrawLaw, x_0: Tensor) -> int:
        """How many rows are taken of ``x_0``, by draws that leave no trace."""
        if not self.drop:
            return len(x_0)
        known = _KNOWN.setdefault(self, {})
        key = (len(x_0), x_0.device, *map(id, law[:2]), *law[2:])
        if key not in known:
            known[key] = law, _number(law, x_0)  # an object that is kept keeps its id
        return known[key][1]

    @contextmanager
    def in_graph(self) -> Iterator[None]:
        """Look at no values meanwhile: of a batch that has more, all weights are no numbers."""
        self._in_graph = True
        try:
            yield
        finally:
            self._in_graph = False

    def __call__(self, batch: MaskedBatch, law: DrawLaw, further: Any = ()) -> MaskedBatch:
        """The rows with a target, in their order, and of the others as many as there is room for;
        all rows if there is not.

        Args:
            batch: the rows, with data.
            law: by which they were masked.
            further: what the programs are given beside them.

        Raises:
            ValueError: if that is anything.
        """
        if further and self.drop:
            raise ValueError(
                "drop_empty_rows=True gives the programs fewer rows than x_0 has, which further "
                f"arguments would not fit: got {further!r}; leave it False"
            )
        assert batch.x_0 is not None
        number = self.number(law, batch.x_0)
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


# By loss, since a container of its own that a call makes longer would keep it from being a graph.
_KNOWN: WeakKeyDictionary[KeptRows, dict[Any, tuple[DrawLaw, int]]] = WeakKeyDictionary()


def _number(law: DrawLaw, x_0: Tensor) -> int:
    num_rows = len(x_0)
    law = law._replace(times=copy.deepcopy(law.times))  # one of a user's own may count its draws
    random = random_state()
    found: list[int] = []
    try:
        on_cpu = x_0.device.type != "cuda"
        # Not torch.manual_seed, which reaches devices whose state nobody has kept.
        (torch.default_generator if on_cpu else torch.cuda).manual_seed(0)
        for _ in range(_DRAWS):
            found.append(int(law.draw(torch.zeros_like(x_0)).target.any(-1).sum()))
            if len(found) == _FIRST and sum(found) > _WORTH * num_rows * _FIRST:
                return num_rows
    finally:
        restore_random_state(random)
    std, mean = torch.std_mean(torch.tensor(found, dtype=torch.double))
    number = math.ceil(float(mean + _DEVIATIONS * std)) + 1
    return number if number <= _WORTH * num_rows else num_rows
