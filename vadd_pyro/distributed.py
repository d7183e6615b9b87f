r"""Several processes train one pair: each takes its rows of the batch, and gradients are averaged.

Of a batch of ``B`` rows, process ``p`` of ``P`` takes the rows :math:`S_p`, ``B / P`` of them, and

.. math::
    \nabla \frac1B \sum_b \ell_b = \frac1P \sum_p \nabla \frac PB \sum_{b \in S_p} \ell_b ,

so that the whole batch fixes the optimisation, however many processes share it. They start from
the parameters of the first, and make the same updates (:mod:`vadd_pyro.exchange`). Here is what
they say besides: who they are, that they agree, and whose error it was. For a process that trains
alone all of it does nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vadd_pyro.checkpoints import CheckpointWriteError, DamagedCheckpointError
from vadd_pyro.finite import NonFiniteLossError
from vadd_pyro.locks import InUseError

if dist.is_available():
    # Default arguments in there are the group at the time of import. Imported later (by the first
    # optimiser, through torch._dynamo) they would keep the group, whose threads then live until
    # the interpreter ends and may abort it.
    import torch.distributed.nn.functional

__all__ = [
    "OtherProcessError",
    "Processes",
    "ProcessesDifferError",
    "answering",
    "joined",
]

TIMEOUT = timedelta(minutes=10)
# Errors that are of the same kind on all processes; others are told as OtherProcessError.
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        *(ValueError, TypeError, OSError, FileNotFoundError, ImportError),
        *(CheckpointWriteError, DamagedCheckpointError, InUseError, NonFiniteLossError),
    )
}


class OtherProcessError(RuntimeError):
    """Another process of the group has failed, has ended or does not answer."""


class ProcessesDifferError(ValueError):
    """What must be the same in all processes is not."""


class Processes:
    """The processes that train together, or the one that trains alone.

    Args:
        rank: number of this one, from 0.
        size: how many there are.
        device: where what they tell each other is kept.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, device: torch.device | str | None = None
    ) -> None:
        self.rank, self.size = rank, size
        self.device = torch.device("cpu" if device is None else device)
        self.asked: Callable[[], bool] = lambda: False
        self.agreed = False

    @classmethod
    def current(cls) -> Processes:
        """Those of torch's default process group, if there is one."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        device = torch.cuda.current_device() if dist.get_backend() == "nccl" else None
        where = None if device is None else f"cuda:{device}"
        return cls(dist.get_rank(), dist.get_world_size(), where)

    @property
    def first(self) -> bool:
        """Whether this one writes files and prints."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def stopping(self) -> bool:
        """Whether to stop between updates: if this process was asked to (``asked``), or if any was
        when the last update was agreed on.
        """
        return self.asked() if self.alone else self.agreed

    def seed(self, seed: int, iteration: int = 0) -> int:
        """Seed of this process's own random draws from an update on; of the first at the start,
        ``seed`` itself, so that all begin with the parameters that it draws when alone.
        """
        if self.first and not iteration:
            return seed
        return int(np.random.SeedSequence([seed, iteration, self.rank]).generate_state(1)[0])

    def check_device(self, device: torch.device) -> None:
        """Check that parameters are where the backend can exchange their gradients.

        Raises:
            ValueError: naming both.
        """
        if self.device.type == "cuda" and device.type != "cuda":
            raise ValueError(
                f"the parameters are on {device}, but the processes exchange tensors on "
                f"{self.device}: expected programs on a GPU, or the backend 'gloo'"
            )

    # ------------------------------------------------------------ plain values

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        with answering():
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """The value of the first process."""
        if self.alone:
            return value
        values = [value]
        with answering():
            dist.broadcast_object_list(values, src=0, device=self.device)
        return value if self.first else values[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error in here on one process is raised on all of them; nothing may be exchanged
        inside.

        Raises:
            Exception: this process's own; another's, of the same kind where that is one of the
            package's errors or a plain one, else :class:`OtherProcessError`.
        """
        error = None
        try:
            yield
        except Exception as found:
            error = found
        self.agree_on(error)

    def agree_on(self, error: Exception | None) -> None:
        """Raise this process's error, or that of another."""
        told = None if error is None else (_kind(error), str(error))
        try:
            found = self.gather(told)
        except OtherProcessError:
            if error is None:
                raise
        if error is not None:
            raise error
        for rank, other in enumerate(found):
            if other is not None:
                kind, text = other
                message = f"{text} (process {rank} of {self.size})"
                if kind in _KINDS:
                    raise _KINDS[kind](message)
                raise OtherProcessError(f"{kind}: {message}")

    def by_first(self, function: Callable[[], Any]) -> Any:
        """What a function returns on the first process, or its error, on all of them."""
        value = None
        with self.together():
            if self.first:
                value = function()
        return self.broadcast(value)

    def in_turns(self, function: Callable[[], Any]) -> Any:
        """Call a function on one process of each machine, then on the others, which find there
        what it has downloaded.
        """
        leads = self.alone or int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        value = None
        with self.together():
            if leads:
                value = function()
        with self.together():
            if not leads:
                value = function()
        return value

    # ---------------------------------------------------- what must be the same

    def check_alike(self, values: Mapping[str, Any]) -> None:
        """Compare plain values by name.

        Raises:
            ProcessesDifferError: on all processes, naming the first that differs.
        """
        of_all = self.gather(dict(values))
        first = of_all[0]
        for rank, other in enumerate(of_all):
            for name in [*first, *(name for name in other if name not in first)]:
                if first.get(name) != other.get(name):
                    raise ProcessesDifferError(
                        f"{name} is {first.get(name)!r} in process 0, and {other.get(name)!r} in "
                        f"process {rank}: expected the same call in all processes"
                    )

    def replicate(self, tensors: Mapping[str, Tensor]) -> None:
        """Give tensors the values that they have in the first process.

        Raises:
            ProcessesDifferError: if names, shapes or precisions differ.
        """
        if self.alone:
            return
        kinds = {name: f"{value.dtype} {tuple(value.shape)}" for name, value in tensors.items()}
        self.check_alike(kinds)
        with torch.no_grad():
            pieces = [_bytes(value).to(self.device) for value in tensors.values()]
            if not pieces:
                return
            together = torch.cat(pieces)
            with answering():
                dist.broadcast(together, src=0)
            if self.first:
                return
            sizes = [len(piece) for piece in pieces]
            for value, piece in zip(tensors.values(), together.split(sizes), strict=True):
                # A copy, for the numbers must begin at a multiple of their size.
                value.copy_(piece.clone().view(value.dtype).view(value.shape))

    def check_same(self, tensors: Mapping[str, Tensor], when: str) -> None:
        """Compare checksums of tensors.

        Raises:
            ProcessesDifferError: on all processes, naming those that differ.
        """
        if self.alone or not tensors:
            return
        with torch.no_grad():
            sums = torch.stack([_checksum(value).to(self.device) for value in tensors.values()])
        # The largest of a checksum is the smallest where all are the same.
        both = torch.cat([sums, -sums])
        with answering():
            dist.all_reduce(both, dist.ReduceOp.MAX)
        largest, smallest = both[: len(sums)], -both[len(sums) :]
        same = (largest == smallest).tolist()
        differing = [name for name, equal in zip(tensors, same, strict=True) if not equal]
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise ProcessesDifferError(
                f"{', '.join(differing[:3])}{more} differ between processes {when}: each has "
                "changed them by its own rows or random numbers. Expected programs that change "
                "weights by their gradients alone and keep no averages of what they see, and an "
                "optimiser that draws no random numbers"
            )


def _kind(error: Exception) -> str:
    """The nearest kind that is known to all processes."""
    known = [kind.__name__ for kind in type(error).__mro__ if kind in _KINDS.values()]
    return known[0] if known else type(error).__name__


def _bytes(value: Tensor) -> Tensor:
    return value.detach().reshape(-1).contiguous().view(torch.uint8)


def _checksum(value: Tensor) -> Tensor:
    """Sum of the bit patterns, modulo ``2 ** 64``."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    flat = value.detach().reshape(-1).contiguous()
    return flat.view(kinds.get(flat.element_size(), torch.int64)).sum(dtype=torch.int64)


@contextmanager
def answering() -> Iterator[None]:
    """Say what it means if a call to the other processes fails."""
    try:
        yield
    except RuntimeError as error:
        # Of what the backend says, the first sentence, without the place in its source.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        what = re.sub(r"^\[\S*\] ", "", lines[0]).split(". ")[0]
        raise OtherProcessError(
            f"another process has ended, or has not answered in time: {what}"
        ) from error


# ------------------------------------------------------------------ the group


@contextmanager
def joined(device: str, timeout: timedelta = TIMEOUT) -> Iterator[str]:
    """Join the processes that torchrun has started, if it has: gloo on the CPU, nccl on GPUs.

    Args:
        device: where to compute; ``"cuda"`` is the GPU of this process's number on its machine.
        timeout: how long the others may take to answer.

    Yields:
        The device of this process.

    Raises:
        ValueError: for a device that processes of one machine would share, or more of them than
        there are GPUs. OtherProcessError: if the others cannot be met.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1" or dist.is_initialized():
        yield device
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {size}, but the environment lacks {', '.join(missing)}: expected "
            "processes that torchrun has started"
        )
    backend = "gloo"
    if torch.device(device).type == "cuda":
        device = _own_gpu(device)
        if dist.is_nccl_available():
            backend = "nccl"
    with answering():
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _own_gpu(device: str) -> str:
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.device(device).index is not None:
        raise ValueError(
            f"device is {device!r} for several processes: expected 'cuda', by which each takes a "
            "GPU of its own, or 'cpu'"
        )
    found = torch.cuda.device_count()
    if number >= found:
        raise ValueError(
            f"process {number} of this machine has no GPU, there are {found}: start at most that "
            "many (--nproc-per-node), or name the device 'cpu'"
        )
    torch.cuda.set_device(number)
    return f"cuda:{number}"
