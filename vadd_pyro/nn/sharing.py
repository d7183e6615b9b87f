"""Rows that are equal, so that what is computed from them need be computed once.

A sampler starts with all rows masked, and on small spaces, or with a latent of few values, most of
its rows stand in states in which others stand too. Rows are compared by a number each, a sum of
their bits times fixed random factors; what agrees in that is compared in full, so that the answer
is exact.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["equal_rows"]

_LOOK = 64  # rows that tell whether there are equal ones at all
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@functools.lru_cache(maxsize=64)
def _factors(length: int, device: torch.device) -> Tensor:
    """Fixed random numbers of 63 bits."""
    generator = torch.Generator("cpu").manual_seed(length)
    return torch.randint(2**63 - 1, (length,), generator=generator, device="cpu").to(device)


def _keys(values: tuple[Tensor, ...]) -> Tensor:
    """A number for each row, the same for equal rows; ``(B,)``."""
    total: Tensor | None = None
    for number, value in enumerate(values):
        flat = value.reshape(len(value), -1)
        if flat.is_floating_point():
            flat = flat.contiguous().view(_BITS[flat.element_size()])
        key = (flat.long() * _factors(flat.shape[1], flat.device)).sum(-1)
        total = key if total is None else total * (2 * number + 1) + key
    assert total is not None
    return total


def equal_rows(*values: Tensor) -> tuple[Tensor, Tensor] | None:
    """The distinct rows of tensors taken together, if at most half as many as there are rows.

    Whether there are equal ones is first guessed from the first few, so that it costs little where
    all differ.

    Args:
        values: tensors with ``B`` rows each, ``(B, ...)``, of integers or real numbers.

    Returns:
        An index ``(U,)`` of one row of each kind, and which of the ``U`` each row is, ``(B,)``; or
        None.
    """
    number = len(values[0])
    if number < 2:
        return None
    few = _keys(tuple(value[:_LOOK] for value in values)).tolist()
    if len(few) - len(set(few)) < min(2, number // 2):
        return None
    _, row = torch.unique(_keys(values), return_inverse=True)
    place = torch.arange(number, device=row.device)
    first = torch.zeros(int(row.max()) + 1, dtype=torch.long, device=row.device)
    first.scatter_(0, row, place)
    if 2 * len(first) > number:
        return None
    source = first.index_select(0, row)
    # Different rows with the same number: next to impossible, and nothing is shared then.
    if any(not torch.equal(value, value.index_select(0, source)) for value in values):
        return None
    return first, row
