r"""What the processes of a training run tell each other in an update.

Gradients, loss, KL, which parameters have a gradient, and whether a process was asked to stop or
has failed are summed once an update by ``torch.distributed.all_reduce``, which needs no more than
``2 (P - 1) / P`` times the bytes that are summed to and from each of ``P`` processes. What is one
number for all of them then (a loss that is not finite, a signal to one) is known to all at the
same update. Small gradients go together in one vector, with all that is told; large ones follow
as they are, for to copy them takes time, too. Between processes of one machine what is large is
summed through memory instead (:mod:`vadd_pyro.shared_sums`).

``DistributedDataParallel`` sums the same in pieces, while backward still runs. It wants one
module whose forward is the loss; here the loss is that of two programs, which may be functions
with parameters in Pyro's store or run twice, and of graphs that have their gradient as a vector
already. docs/scaling.md says what it would gain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress

import torch
import torch.distributed as dist
from torch import Tensor

from vadd_pyro.distributed import OtherProcessError, Processes, answering
from vadd_pyro.shared_sums import SharedSums

__all__ = ["Exchange", "GradientSum"]

_LARGE = 2**16  # numbers from which on a gradient is sent by itself
_TAIL = 4  # loss, KL, whether to stop, whether a process has failed


class Exchange:
    """The one vector that processes tell each other in an update; its sum takes its place.

    Args:
        processes: who takes part.
        length: how many numbers are told besides loss and KL.
        like: a tensor of their precision, where they are.
    """

    def __init__(self, processes: Processes, length: int, like: Tensor) -> None:
        self.processes = processes
        self.length = length
        self._like = like
        self._shared: SharedSums | None = None
        self._room = 0  # bytes that memory to share was asked for

    def empty(self) -> Tensor:
        """A vector of zeros, with room for what :meth:`__call__` adds."""
        return self._like.new_zeros(self.length + _TAIL)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """An error in here is raised on all processes, where the others call the exchange.

        Raises:
            Exception: as :meth:`Processes.together` does.
        """
        try:
            yield
        except Exception as error:
            if not self.processes.alone:
                failed = self.empty()
                failed[-1] = 1.0
                with suppress(OtherProcessError):  # this process's own error is what matters here
                    self.sum(failed)
                    self.processes.agree_on(error)
            raise

    def meet(self) -> None:
        """Go on when all are here; an error of one of them in :meth:`watching` is raised here too.

        Raises:
            Exception: as :meth:`Processes.together` does.
        """
        if not self.processes.alone:
            self(self.empty(), 0.0, 0.0)

    def __call__(self, vector: Tensor, loss: float, kl: float) -> tuple[float, float]:
        """Make a vector the sum of those of all processes; also loss and KL, which are returned.

        Args:
            vector: ``(length + 4,)``, as from :meth:`empty`; the last four numbers are its own.
            loss, kl: what this process's rows add to those of a row of the batch, nats.
        """
        asked = float(self.processes.asked())
        vector[-_TAIL:] = vector.new_tensor([loss, kl, asked, 0.0])
        self.sum(vector)
        loss, kl, stop, failed = vector[-_TAIL:].tolist()
        if failed:
            self.processes.agree_on(None)
        self.processes.agreed = stop > 0
        return loss, kl

    def sum(self, *tensors: Tensor) -> None:
        """Make tensors, with nothing added, the sums of those of all processes."""
        large = [tensor for tensor in tensors if tensor.numel() >= _LARGE]
        num_bytes = sum(t.numel() * t.element_size() for t in large)
        if num_bytes > self._room:
            here = all(tensor.device.type == "cpu" for tensor in large)
            self._shared = SharedSums.between(self.processes, num_bytes, here)
            self._room = num_bytes
        others = [t for t in tensors if self._shared is None or t.numel() < _LARGE]
        with answering():
            for sent in [dist.all_reduce(tensor, async_op=True) for tensor in others]:
                sent.wait()
        if self._shared is not None:
            self._shared(large)


class GradientSum:
    """The sum over processes of the gradients of parameters, with loss and KL.

    A parameter that has a gradient in some processes counts as zero in the others; one that has
    none in any has none in the end, as it would have in one process.

    Args:
        processes: who takes part.
        named: all parameters by name.
    """

    def __init__(self, processes: Processes, named: Mapping[str, Tensor]) -> None:
        self.processes = processes
        self.named = dict(named)
        self._small = {n: p for n, p in self.named.items() if p.numel() < _LARGE}
        kinds = {p.dtype for p in self.named.values()}
        # Loss and KL go with numbers that are exact enough for them.
        self._main = next((k for k in (torch.float32, torch.float64) if k in kinds), torch.float32)
        like = next(iter(self.named.values())).detach().new_empty(0, dtype=self._main)
        self._exchange = Exchange(processes, self._size(self._main) + len(self.named), like)
        self._vectors: dict[torch.dtype, Tensor] = {}  # the gradients of each precision
        self._views: dict[str, Tensor] = {}

    def _size(self, kind: torch.dtype) -> int:
        """How many numbers of a precision go in its vector."""
        return sum(p.numel() for p in self._small.values() if p.dtype == kind)

    def watching(self) -> AbstractContextManager[None]:
        """As :meth:`Exchange.watching`."""
        return self._exchange.watching()

    def __call__(self, loss: float, kl: float) -> tuple[float, float]:
        """Make the gradients the sums over processes; also loss and KL, which are returned."""
        if self.processes.alone:
            return loss, kl
        with self.watching():
            self._fill()
        main = self._vectors[self._main]
        loss, kl = self._exchange(main, loss, kl)
        told = main[-_TAIL - len(self.named) : -_TAIL].tolist()
        present = {name: held > 0 for name, held in zip(self.named, told, strict=True)}
        others = [vector for kind, vector in self._vectors.items() if kind != self._main]
        large = {n: self._gradient(n) for n in self.named if n not in self._small and present[n]}
        self._exchange.sum(*others, *large.values())
        for name, parameter in self.named.items():
            if not present[name]:
                parameter.grad = None
                continue
            total = large[name] if name in large else self._views[name]
            if parameter.is_contiguous():
                parameter.grad = total
            else:
                parameter.grad = torch.empty_like(parameter).copy_(total)
        return loss, kl

    def _gradient(self, name: str) -> Tensor:
        """A gradient of this process as it is sent by itself."""
        parameter = self.named[name]
        if parameter.grad is None:
            return parameter.detach().new_zeros(parameter.shape)
        return parameter.grad.contiguous()

    def _fill(self) -> None:
        """Lay the gradients of this process out in the vectors."""
        if not self._vectors:
            self._allocate()
        held = {name: p.grad for name, p in self.named.items()}
        for name, gradient in held.items():
            if gradient is None:
                if name in self._small:
                    self._views[name].zero_()
            elif gradient.is_sparse:
                raise TypeError(
                    f"the gradient of {name} is sparse: expected dense gradients with several "
                    "processes, such as those of torch.nn.Embedding(sparse=False)"
                )
        present = {n: g for n, g in held.items() if g is not None and n in self._small}
        if present:
            torch._foreach_copy_([self._views[n] for n in present], list(present.values()))
        main = self._vectors[self._main]
        main[-_TAIL - len(held) : -_TAIL] = main.new_tensor([g is not None for g in held.values()])

    def _allocate(self) -> None:
        like = next(iter(self.named.values())).detach()
        kinds = {p.dtype for p in self._small.values()} - {self._main}
        self._vectors = {self._main: self._exchange.empty()}
        self._vectors |= {kind: like.new_zeros(self._size(kind), dtype=kind) for kind in kinds}
        starts = dict.fromkeys(self._vectors, 0)
        for name, p in self._small.items():
            start = starts[p.dtype]
            self._views[name] = self._vectors[p.dtype][start : start + p.numel()].view(p.shape)
            starts[p.dtype] += p.numel()
