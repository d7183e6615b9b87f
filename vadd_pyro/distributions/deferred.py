"""Logits that are computed where they are asked for.

A sampler draws the tokens of a few positions only, and logits are often the largest tensor there
is. So a network may stop before its last layer, and that layer runs once it is known which
positions count.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["DeferredLogits"]


class DeferredLogits:
    """Logits ``(B, D, K)`` of which all, or those of chosen positions, can be had.

    Args:
        shape: ``(B, D, K)``.
        whole: computes all of them, ``(B, D, K)``.
        at: computes those of chosen positions, ``(n, K)``; may add a number to all logits of a
            position. It is given an index ``(n,)`` into the ``B D`` positions, rows one after
            another and increasing, or None for all of them. By default they are taken from the
            whole.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        whole: Callable[[], Tensor],
        at: Callable[[Tensor | None], Tensor] | None = None,
    ) -> None:
        self.shape = torch.Size(shape)
        self._compute = whole
        self._compute_at = at
        self._whole: Tensor | None = None

    def whole(self) -> Tensor:
        """All logits, ``(B, D, K)``, computed once."""
        if self._whole is None:
            self._whole = self._compute()
        return self._whole

    def at(self, index: Tensor | None) -> Tensor:
        """Logits of the chosen positions, up to a number for each; ``(n, K)``.

        Args:
            index: ``(n,)`` long into the ``B D`` positions, increasing; None for all.
        """
        if self._compute_at is not None and self._whole is None:
            return self._compute_at(index)
        flat = self.whole().reshape(-1, self.shape[-1])
        return flat if index is None else flat.index_select(0, index)
