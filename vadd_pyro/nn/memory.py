"""What layers keep of rows from one step of a sampler to the next.

A step changes a few tokens of a row, and what was summed over the others need not be summed again.
A sampler that shows a network the same rows again and again says so,

    with RowMemory(len(x)) as memory:
        memory.rows = which       # before each call: an index into the rows, None for all
        memory.shown = batch.x_t  # where these are all of them, and stay as they are
        model(batch)

and a layer may look for :func:`row_memory` and keep there what it likes. It must keep what it
computed from beside what it computed, and compare: nobody promises that it is shown those rows.
The tokens in ``shown`` it need not copy. A program that writes to them is noticed by torch's
count of what is written to a tensor, which goes by everything but ``.data`` and NumPy.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Change", "RowMemory", "row_memory"]

_CURRENT: ContextVar[RowMemory | None] = ContextVar("row_memory", default=None)


class Change(NamedTuple):
    """Where a call shows other tokens than one before it, if nobody writes to them meanwhile.

    Args:
        before, after: tokens of both calls, ``(B, D)``, the very tensors.
        version: of ``after``, as torch counts what is written to it.
        positions: which differ, ``(n,)`` long into the ``B D``, increasing.
    """

    before: Tensor
    after: Tensor
    version: int
    positions: Tensor

    def between(self, before: Tensor | None, after: Tensor) -> Tensor | None:
        """The positions, if these are those tokens; ``before`` has not been written to."""
        same = before is self.before and after is self.after and after._version == self.version
        return self.positions if same else None


class RowMemory:
    """A place for what layers keep of rows.

    Args:
        num_rows: how many rows there are.

    Attributes:
        rows: which of them the next call shows, ``(n,)`` long; None for all.
        shown: their tokens, ``(B, D)``, if it shows all of them; else None.
        change: where it shows all of them and they differ from a call before, if that is known.
        held: what a layer keeps, by a key of its own.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.rows: Tensor | None = None
        self.shown: Tensor | None = None
        self.change: Change | None = None
        self.held: dict[Any, Any] = {}
        self._token: Token[RowMemory | None] | None = None

    def __len__(self) -> int:
        """How many rows the next call shows."""
        return self.num_rows if self.rows is None else len(self.rows)

    def __enter__(self) -> RowMemory:
        self._token = _CURRENT.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._token is not None
        _CURRENT.reset(self._token)


def row_memory() -> RowMemory | None:
    """The memory of the sampler that runs, if there is one."""
    return _CURRENT.get()
