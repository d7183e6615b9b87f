"""Rows in the order in which training sees them, and this process's share of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Batches", "DrawnBatches", "check_divisible", "share_of"]


def share_of(batch_size: int, rank: int, size: int, accumulate: int = 1) -> slice:
    """The rows of a batch that one of several processes takes.

    Args:
        batch_size: rows of the batch, of all processes together.
        rank, size: number of the process, and how many there are.
        accumulate: into how many parts it divides its share in turn.

    Raises:
        ValueError: if there are no equal shares.
    """
    parts = size * accumulate
    if batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of processes x accumulate = {size} x {accumulate} = "
            f"{parts}, got {batch_size}"
        )
    share = batch_size // size
    return slice(rank * share, (rank + 1) * share)


class Batches:
    """Rows in a new random order every epoch, a function of the seed and the iteration alone.

    Args:
        data: all rows, ``(N, D)``.
        batch_size: rows of a batch.
        seed: of the order.
        device: where the rows are to be.
        share: which of a batch's rows are given; all by default.
    """

    def __init__(
        self,
        data: Tensor,
        batch_size: int,
        seed: int,
        device: torch.device,
        share: slice = slice(None),
    ) -> None:
        self.data = data.to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.share = share
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)

    def _rows(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(len(self.data), generator=generator).to(self.data.device)
            self._epoch = epoch
        return self._order

    def __call__(self, iteration: int) -> Tensor:
        epoch, start = divmod(iteration * self.batch_size, len(self.data))
        pieces, missing = [], self.batch_size
        while missing:
            piece = self._rows(epoch)[start : start + missing]
            pieces.append(piece)
            missing -= len(piece)
            epoch, start = epoch + 1, 0
        rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return self.data[rows[self.share]]

    def to_monitor(self) -> Tensor:
        """Rows of which the monitor may choose."""
        return self.data


class DrawnBatches:
    """Rows that a function gives.

    Args:
        draw: ``draw(batch_size)`` gives fresh rows, of which each process draws its own; one with
            a method ``at(iteration, batch_size)`` gives the same batch to all processes, and each
            takes its share.
        batch_size: rows of a batch.
        check: checks the rows.
        device: where they are to be.
        rank, size: number of this process, and how many there are.
        exact: whether rows of another number than asked for are refused.
    """

    def __init__(
        self,
        draw: Callable[[int], Tensor],
        batch_size: int,
        check: Callable[[Tensor], Tensor],
        device: torch.device,
        rank: int = 0,
        size: int = 1,
        exact: bool = False,
    ) -> None:
        self._draw, self._at = draw, getattr(draw, "at", None)
        self.batch_size = batch_size
        self._check = check
        self._device = device
        self._size = size
        self._share = share_of(batch_size, rank, size)
        self._exact = exact
        self._latest = torch.empty(0)

    def __call__(self, iteration: int) -> Tensor:
        whole = self._at is not None
        asked = self.batch_size if whole else self.batch_size // self._size
        rows = self._draw(asked) if self._at is None else self._at(iteration, asked)
        rows = self._check(rows)
        if self._exact and len(rows) != asked:
            raise ValueError(
                f"data gave {len(rows)} rows where {asked} were asked for: expected as many, to "
                "divide them into equal parts"
            )
        self._latest = rows
        own = rows[self._share] if whole and self._size > 1 else rows
        return own.to(self._device)

    def to_monitor(self) -> Tensor:
        """Rows of which the monitor may choose: those given last, of all processes if known."""
        return self._latest.to(self._device)


def check_divisible(
    elbo: Any, model: Any, guide: Any, modules: Mapping[str, nn.Module], x_0: Tensor
) -> None:
    """Check that the loss of a batch is the sum of those of its parts.

    Args:
        elbo, model, guide: the loss.
        modules: those of the programs, by name.
        x_0: a part of a batch.

    Raises:
        ValueError: naming what joins the rows of a batch.
    """
    wanted = "expected one process and accumulate=1, or"
    if elbo.free_bits:
        raise ValueError(
            f"free_bits = {elbo.free_bits:g} is compared with the mean KL of a batch, which its "
            f"parts do not know: {wanted} free_bits=0"
        )
    for prefix, module in modules.items():
        if not any(p.requires_grad for p in module.parameters()):
            continue  # one that is held fixed uses the means that it has
        for name, part in module.named_modules():
            if isinstance(part, _BatchNorm):
                raise ValueError(
                    f"{prefix}.{name} is {type(part).__name__}, which takes means over the rows "
                    f"of a batch, which its parts do not know: {wanted} a normalisation of each "
                    "row, such as torch.nn.LayerNorm or GroupNorm"
                )
    with torch.no_grad():
        shared = elbo.score(model, guide, elbo.draw(x_0)).shared
    if shared is not None:
        raise ValueError(
            "the programs have sites outside the data plate, which count once for a batch and "
            f"would count once for each of its parts: {wanted} sites of rows alone"
        )
