"""Rows of tokens in three parts: to train on, to choose by, and to report.

Rows are stored in the smallest integer type that holds the tokens (50,000 images of 784 pixels:
39 MB as bytes, 314 MB as long integers) and become long integers a batch at a time.
:func:`vadd_pyro.fit` takes :meth:`DataSet.batches`, or ``rows("train")`` where memory is no
matter; what takes rows to score takes :meth:`DataSet.rows`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vadd_pyro.process import MaskingProcess, check_size
from vadd_pyro.schedules import Schedule

__all__ = [
    "SPLITS",
    "BatchStream",
    "DataSet",
    "compact",
    "generator",
    "split_indices",
    "split_sizes",
]

SPLITS = ("train", "valid", "test")


def generator(*numbers: int) -> torch.Generator:
    """A random generator on the CPU that is a function of some integers of at least 0."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def compact(tokens: np.ndarray, vocab_size: int) -> Tensor:
    """Tokens in the smallest integer type of torch that holds ``vocab_size`` values."""
    for limit, kind in ((2**8, np.uint8), (2**15, np.int16), (2**31, np.int32)):
        if vocab_size <= limit:
            return torch.from_numpy(np.array(tokens, dtype=kind, order="C"))
    return torch.from_numpy(np.array(tokens, dtype=np.int64, order="C"))


def split_sizes(num_rows: int, split: Sequence[float]) -> tuple[int, int, int]:
    """How many rows the three parts have.

    Args:
        num_rows: how many there are.
        split: three shares that sum to one (the training part takes what rounding leaves), or
            three whole numbers of rows that sum to at most ``num_rows``.

    Raises:
        ValueError: if a part would be empty, or for other numbers.
    """
    split = tuple(split)
    wanted = f"split must be three shares that sum to one, or three numbers of rows, got {split}"
    if len(split) != 3 or any(isinstance(s, bool) or not s > 0 for s in split):
        raise ValueError(wanted)
    if all(isinstance(s, int) for s in split):
        sizes = (int(split[0]), int(split[1]), int(split[2]))
        if sum(sizes) > num_rows:
            raise ValueError(f"split takes {sum(sizes):,} rows, there are {num_rows:,}")
        return sizes
    if not math.isclose(sum(split), 1, abs_tol=1e-6):
        raise ValueError(wanted)
    valid, test = (round(num_rows * share) for share in split[1:])
    sizes = (num_rows - valid - test, valid, test)
    if min(sizes) < 1:
        raise ValueError(
            f"split {split} leaves a part of {num_rows:,} rows empty: {sizes}; give more rows or "
            "other shares"
        )
    return sizes


def split_indices(
    num_rows: int, split: Sequence[float], seed: int = 0, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the three parts in random order, without overlap.

    The same on every machine and with every version of numpy (its frozen generator draws).

    Args:
        num_rows: how many there are.
        split: as in :func:`split_sizes`; of every class where there are labels.
        seed: of the draw.
        labels: classes, ``(num_rows,)``; each is split by itself, so that the parts are alike.
    """
    draw = np.random.RandomState(seed)
    if labels is None:
        groups = [np.arange(num_rows)]
    else:
        groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    parts: list[list[np.ndarray]] = [[], [], []]
    for group in groups:
        order = group[draw.permutation(len(group))]
        sizes = split_sizes(len(group), split)
        for part, rows in zip(parts, np.split(order, np.cumsum(sizes))[:3], strict=True):
            part.append(rows)
    first, second, third = (
        np.concatenate(part) if labels is None else draw.permutation(np.concatenate(part))
        for part in parts
    )
    return first, second, third


@dataclass(frozen=True, eq=False, repr=False)
class DataSet:
    """Rows of ``length`` tokens from ``vocab_size`` values in three parts.

    Args:
        name: how tables and figures call it.
        train, valid, test: tokens, ``(N, D)`` each, in any integer type; see :meth:`rows`.
        vocab_size: number of token values ``K``.
        shape: of a row as a picture, ``(H, W)`` or ``(C, H, W)``, if it is one.
        characters: what the tokens stand for, if they are characters.
        labels: classes of the rows by the name of the part, ``(N,)`` each, where they are known.
        source: name of the loader and its arguments, plain values.
    """

    name: str
    train: Tensor
    valid: Tensor
    test: Tensor
    vocab_size: int
    shape: tuple[int, ...] | None = None
    characters: tuple[str, ...] | None = None
    labels: Mapping[str, Tensor] | None = None
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for split in SPLITS:
            if not len(getattr(self, split)):
                raise ValueError(f"{self.name}: the {split} part has no rows")
            self.process().check_tokens(getattr(self, split)[:1], split, values=False)

    @property
    def length(self) -> int:
        """Number of positions ``D``."""
        return self.train.shape[1]

    def process(self, schedule: Schedule | None = None) -> MaskingProcess:
        """A masking process over such rows."""
        return MaskingProcess(self.vocab_size, self.length, schedule)

    def rows(self, split: str, num: int | None = None, seed: int = 0) -> Tensor:
        """Rows of one part.

        Args:
            split: ``"train"``, ``"valid"`` or ``"test"``.
            num: how many, drawn without replacement; all, in their order, by default.
            seed: of the draw.

        Returns:
            Tokens ``(num, D)`` long.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        stored: Tensor = getattr(self, split)
        if num is None:
            return stored.long()
        check_size("num", num)
        if num > len(stored):
            raise ValueError(f"num must be at most {len(stored)}, the rows of {split}, got {num}")
        return stored[torch.randperm(len(stored), generator=generator(seed))[:num]].long()

    def batches(self, seed: int = 0) -> BatchStream:
        """Training rows for :func:`vadd_pyro.fit`.

        Args:
            seed: of their order, and of whatever else about them is random.
        """
        return BatchStream(self, seed)

    def training_rows(self, stream: BatchStream, iteration: int, batch_size: int) -> Tensor:
        """One training batch, ``(batch_size, D)`` long: a new random order in every epoch."""
        return self.train[stream.indices(len(self.train), iteration, batch_size)].long()

    def pictures(self, x: Tensor) -> Tensor:
        """Rows as pictures.

        Args:
            x: tokens, ``(B, D)``; the mask id comes out as -1.

        Returns:
            Brightness in [0, 1], ``(B, H, W)``, or ``(B, H, W, C)`` in colour.

        Raises:
            ValueError: if the rows are no pictures.
        """
        if self.shape is None:
            raise ValueError(f"{self.name} has no pictures: its rows have no shape")
        grey = x.float() / (self.vocab_size - 1)
        grey = grey.masked_fill(x == self.vocab_size, -1.0).reshape(-1, *self.shape)
        return grey if len(self.shape) == 2 else grey.movedim(1, -1)

    @cached_property
    def fingerprint(self) -> str:
        """Checksum of all rows."""
        value = 0
        for split in SPLITS:
            value = zlib.crc32(getattr(self, split).contiguous().numpy(), value)
        return f"crc32 {value:08x}"

    def describe(self) -> dict[str, Any]:
        """What a checkpoint keeps, plain values.

        ``loader`` and ``arguments`` make the set again, as
        ``getattr(vadd_pyro.data, loader)(**arguments)``; :meth:`check_same` tells whether it is
        the same.
        """
        return {
            "name": self.name,
            "vocab_size": self.vocab_size,
            "length": self.length,
            "shape": None if self.shape is None else list(self.shape),
            "characters": None if self.characters is None else list(self.characters),
            "num_rows": {split: len(getattr(self, split)) for split in SPLITS},
            "fingerprint": self.fingerprint,
            **self.source,
        }

    def check_same(self, description: Mapping[str, Any]) -> None:
        """Check that :meth:`describe` said the same when a checkpoint was written.

        Raises:
            ValueError: naming what differs, and both values.
        """
        own = self.describe()
        for name in ("vocab_size", "length", "shape", "characters", "num_rows", "fingerprint"):
            if own[name] != description.get(name):
                raise ValueError(
                    f"{self.name} is not the data of the checkpoint: {name} is {own[name]!r}, "
                    f"was {description.get(name)!r}"
                )

    def __repr__(self) -> str:
        sizes = " / ".join(f"{len(getattr(self, split)):,}" for split in SPLITS)
        return f"<{self.name}: vocab_size={self.vocab_size}, length={self.length}, {sizes} rows>"


class BatchStream:
    """Training batches, a function of the seed and of their number alone.

    Called as a function it gives one batch after the other; :meth:`at` gives any of them.

    Args:
        data: the rows.
        seed: of their order.
    """

    def __init__(self, data: DataSet, seed: int = 0) -> None:
        check_size("seed", seed, least=0)
        self.data = data
        self.seed = seed
        self.iteration = 0
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)

    @property
    def fingerprint(self) -> str:
        """What a resumed run must find again."""
        return f"{self.data.fingerprint}, seed {self.seed}"

    def at(self, iteration: int, batch_size: int) -> Tensor:
        """Batch number ``iteration``, ``(batch_size, D)`` long."""
        return self.data.training_rows(self, iteration, batch_size)

    def __call__(self, batch_size: int) -> Tensor:
        """The next batch, ``(batch_size, D)`` long."""
        rows = self.at(self.iteration, batch_size)
        self.iteration += 1
        return rows

    def indices(self, num_rows: int, iteration: int, batch_size: int) -> Tensor:
        """Which rows batch ``iteration`` has: every row once an epoch, in a new order each."""
        epoch, start = divmod(iteration * batch_size, num_rows)
        pieces, missing = [], batch_size
        while missing:
            if epoch != self._epoch:
                self._order = torch.randperm(num_rows, generator=generator(self.seed, epoch))
                self._epoch = epoch
            pieces.append(self._order[start : start + missing])
            missing -= len(pieces[-1])
            epoch, start = epoch + 1, 0
        return torch.cat(pieces)
