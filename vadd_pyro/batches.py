"""Rows in the order in which training sees them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Batches"]


class Batches:
    """Rows in a new random order every epoch, a function of the seed and the iteration alone."""

    def __init__(self, data: Tensor, batch_size: int, seed: int, device: torch.device) -> None:
        self.data = data.to(device)
        self.batch_size = batch_size
        self.seed = seed
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
        return self.data[rows]
