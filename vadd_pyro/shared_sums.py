r"""Sums over the processes of one machine, through memory that all of them see.

Between processes of one machine ``all_reduce`` of gloo sends every byte through the machine's own
network, twice. Here each process lays its numbers out in a part of a shared file, adds up one
``P``-th of the numbers of all, and reads what the others have added up; only that it has done so
is told through the process group, which also says when another process is gone.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
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
        memory: ``(size + 1, room)`` bytes that all of them see: a row for each process, and one
            for the sums.
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
        parts = processes.size + 1
        if processes.alone or not all(processes.gather(here)):
            return None  # having met, they open the file as soon as it is there
        path, memory = None, None
        if processes.first:
            with suppress(OSError, AttributeError):  # not every system has posix_fallocate
                path = _reserve(num_bytes, parts)
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
        return cls(processes.rank, processes.size, memory.view(parts, -1))

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
        sizes = [len(part) for part in piece]
        length = sum(sizes)
        torch._foreach_copy_(list(rows[self.rank, :length].split(sizes)), piece)
        self._meet()
        start, end = (length * rank // self.size for rank in (self.rank, self.rank + 1))
        total = rows[-1, start:end]
        torch.add(rows[0, start:end], rows[1, start:end], out=total)
        for other in rows[2:-1, start:end]:
            total += other
        self._meet()
        # Nobody writes to the sums before all have met again, having read them.
        torch._foreach_copy_(piece, list(rows[-1, :length].split(sizes)))

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
