r"""Sums over the processes of one machine, through memory that all of them see.

Between processes of one machine ``all_reduce`` of gloo sends every byte through the machine's own
network, twice. Here each process adds up one ``P``-th of the numbers of all: the others lay theirs
out in their parts of a shared file, and read what it has laid out in its own then; only that all
have done so is told through the process group, which also says when another process is gone.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from vadd_pyro.distributed import Processes, answering

__all__ = ["SharedSums"]

_FOLDER = Path("/dev/shm")  # files in memory; where there is none, nothing is shared
_ROOM = 2**28  # bytes of the file at most; what needs more is added up in pieces
_LEAST = 2**20  # bytes of a part: smaller pieces take longer to meet for than to send
_UNIT = 64  # bytes; parts begin at a multiple of it
_SHARE = 0.5  # of the memory that is free for such files, which others want, too


class SharedSums:
    """Adds up tensors of all processes of one machine; :meth:`between` makes it.

    Args:
        rank, size: which process this is, of how many.
        memory: ``(size, room)`` bytes that all of them see, a row for each process; ``room`` is a
            multiple of 64.
    """

    def __init__(self, rank: int, size: int, memory: Tensor) -> None:
        self.rank, self.size = rank, size
        self._memory = memory
        self._done = torch.zeros(1)

    @classmethod
    def between(cls, processes: Processes, num_bytes: int, here: bool = True) -> SharedSums | None:
        """For sums of tensors of so many bytes; ``None`` on all processes if they do not see the
        same memory (those of several machines, or of containers), or if there is not enough.

        Args:
            processes: all of them.
            num_bytes: the same for all.
            here: whether the tensors of this process are on the CPU.
        """
        if processes.alone or not all(processes.gather(here)):
            return None  # having met, they open the file as soon as it is there
        path, memory = None, None
        if processes.first:
            with suppress(OSError, AttributeError):  # not every system has posix_fallocate
                path = _reserve(num_bytes, processes.size)
        try:
            told = processes.broadcast(None if path is None else str(path))
            if told is not None:
                with suppress(OSError, ValueError):
                    memory = _opened(told)
            seen = all(processes.gather(memory is not None))
        finally:
            if path is not None:
                path.unlink(missing_ok=True)  # it is there for as long as it is mapped
        if not seen or memory is None:
            return None
        return cls(processes.rank, processes.size, memory.view(processes.size, -1))

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """Make contiguous tensors on the CPU the sums of those of all processes, which are bit for
        bit the same in all: they are added up in the order of the processes.

        Raises:
            OtherProcessError: if another process has ended or does not answer.
        """
        for kind in dict.fromkeys(tensor.dtype for tensor in tensors):
            rows = self._memory.view(kind)
            for piece in _pieces([t for t in tensors if t.dtype == kind], rows.shape[1]):
                self._add(piece, rows)

    def _add(self, piece: list[Tensor], rows: Tensor) -> None:
        """Sums of so many numbers as a row of the memory has, or fewer."""
        # The same places for every piece and precision, or one that runs ahead would write to what
        # another still reads.
        unit = _UNIT // rows.element_size()
        units, length = rows.shape[1] // unit, sum(map(len, piece))
        ends = [min(unit * (units * rank // self.size), length) for rank in range(self.size)]
        edges = [*ends, length]
        shares = [_between(piece, start, end) for start, end in pairwise(edges)]

        def room(whose: int, share: int) -> Sequence[Tensor]:
            """What a process's row has for the share of another, cut as that is here."""
            start, end = edges[share : share + 2]
            return rows[whose, start:end].split([len(part) for part in shares[share]])

        others = [rank for rank in range(self.size) if rank != self.rank]
        for rank in others:
            _copy(shares[rank], room(self.rank, rank))
        self._meet()
        own, total = shares[self.rank], room(self.rank, self.rank)
        terms = [own if r == self.rank else room(r, self.rank) for r in range(self.size)]
        for result, first, second, *more in zip(total, *terms, strict=True):
            torch.add(first, second, out=result)
            for term in more:
                result += term
        self._meet()
        # Nobody writes to the sums before all have met again, having read them.
        _copy(total, own)
        for rank in others:
            _copy(room(rank, rank), shares[rank])

    def _meet(self) -> None:
        """Go on when all processes are here."""
        with answering():
            dist.all_reduce(self._done)


def _reserve(num_bytes: int, parts: int) -> Path:
    """A file of as many equal parts, each of so many bytes or of as many as there is room for."""
    free = os.statvfs(_FOLDER)
    most = min(_ROOM, int(_SHARE * free.f_bavail * free.f_frsize)) // parts
    if most < min(num_bytes, _LEAST):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(_FOLDER))
    room = min(num_bytes + _UNIT - 1, most) // _UNIT * _UNIT
    path = _FOLDER / f"vadd_pyro-{secrets.token_hex(8)}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, parts * room)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return path


def _opened(path: str) -> Tensor:
    """The bytes of a file that is there, shared with whoever else opens it."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        return torch.frombuffer(mmap.mmap(descriptor, 0), dtype=torch.uint8)
    finally:
        os.close(descriptor)


def _copy(numbers: Sequence[Tensor], places: Sequence[Tensor]) -> None:
    for of, to in zip(numbers, places, strict=True):
        to.copy_(of)


def _between(piece: Sequence[Tensor], start: int, end: int) -> list[Tensor]:
    """The numbers of vectors in a row from one to before another."""
    found = []
    for part in piece:
        if start < len(part) and end > 0:
            found.append(part[max(start, 0) : end])
        start, end = start - len(part), end - len(part)
    return found


def _pieces(tensors: Sequence[Tensor], length: int) -> Iterator[list[Tensor]]:
    """The numbers of tensors in a row, so many at a time."""
    piece: list[Tensor] = []
    left = length
    for tensor in tensors:
        rest = tensor.view(-1)
        while len(rest):
            piece.append(rest[:left])
            rest = rest[left:]
            left -= len(piece[-1])
            if not left:
                yield piece
                piece, left = [], length
    if piece:
        yield piece
