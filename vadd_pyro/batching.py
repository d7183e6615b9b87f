"""How many rows to run at once: as many as fit, and on a processor no more than stay near it.

What a network call takes is known once it has been made: a program is run on two rows, and every
tensor that comes and goes is counted. Kernels' own workspaces are not seen, so this is an
estimate. Small calls are not worth one, and what was found for a program is remembered.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vadd_pyro.process import MaskedBatch, MaskingProcess, check_size

__all__ = ["LiveBytes", "check_batches", "rows_at_once"]

DEFAULT_BYTES = 2**31
_NEAR = 2**20  # numbers of the tensors that a processor's caches hold
_LEAST, _MOST = 1024, 4096  # rows, on a processor
_MOST_ELSEWHERE = 16384
_WIDEST = 4096  # numbers that a network may keep at a position and need not be asked
_PROBE = 2  # rows

_known: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], int]] = weakref.WeakKeyDictionary()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations inside it make: ``now`` alive, and their
    ``peak``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {_storage(value)._cdata for value in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        for value in _tensors(result):
            storage = _storage(value)
            key = storage._cdata
            if key not in given and key not in self._seen:
                size = storage.nbytes()
                self._seen.add(key)
                weakref.finalize(storage, self._free, key, size).atexit = False
                self.now += size
                self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _tensors(tree: Any) -> list[Tensor]:
    leaves = tree_leaves(tree)
    return [x for x in leaves if isinstance(x, Tensor) and x.layout == torch.strided]


def _storage(value: Tensor) -> Any:
    return value.untyped_storage()


def check_batches(batch_size: int | None, max_bytes: int | None) -> None:
    """Check what a caller says about the size of batches.

    Raises:
        ValueError: naming the argument and its value.
    """
    if batch_size is not None:
        check_size("batch_size", batch_size)
    if max_bytes is not None:
        check_size("max_bytes", max_bytes)


def rows_at_once(
    model: Callable[..., Any],
    process: MaskingProcess,
    num_rows: int,
    batch_size: int | None,
    max_bytes: int | None,
    device: torch.device,
    args: tuple[Any, ...] = (),
) -> int:
    """How many rows a network call should have.

    Args:
        model: a step program, in the state in which it will be run.
        process: its forward process.
        num_rows: how many there are.
        batch_size: no more than this; None leaves it to the size of the rows.
        max_bytes: what a call may take, about; None is 2 GiB, or no limit if ``batch_size`` says
            how many.
        device: where it will run.
        args: further arguments of the program.
    """
    most = batch_size
    if most is None:
        most = _MOST_ELSEWHERE
        if device.type == "cpu":
            row = max(process.length * process.vocab_size, 256)
            most = min(_MOST, max(_LEAST, _NEAR // row))
    most = min(most, num_rows)
    if max_bytes is None:
        if batch_size is not None:
            return most
        max_bytes = DEFAULT_BYTES
    if most * 4 * process.length * (process.vocab_size + _WIDEST) <= max_bytes:
        return most
    return max(1, min(most, max_bytes // _bytes_of_row(model, process, device, args)))


def _bytes_of_row(
    model: Callable[..., Any],
    process: MaskingProcess,
    device: torch.device,
    args: tuple[Any, ...],
) -> int:
    """What a call takes for each row, found once for a program."""
    try:
        known = _known.setdefault(model, {})
    except TypeError:  # not everything that can be called can be referred to weakly
        known = {}
    key = (process.length, process.vocab_size, str(device))
    if key not in known:
        known[key] = max(1, _probe(model, process, device, args) // _PROBE)
    return known[key]


def _probe(
    model: Callable[..., Any],
    process: MaskingProcess,
    device: torch.device,
    args: tuple[Any, ...],
) -> int:
    """Bytes alive at the peak of a call with a few rows that differ, half of them visible."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), pyro.poutine.block(), LiveBytes() as live:
        x = torch.randint(process.vocab_size, (_PROBE, process.length), device=device)
        masked = torch.rand(x.shape, device=device) < 0.5
        x = x.masked_fill(masked, process.mask_id)
        t = torch.full((_PROBE,), 0.5, device=device)
        model(MaskedBatch(x, t, masked, masked), *args)
    return live.peak
