"""What a pair of programs keeps between calls, which a graph neither reads anew nor writes.

Buffers, gradients, and numbers and containers in attributes: of the modules, the loss, its times,
and whatever these refer to, closures included. A call that changes buffers, gradients or the
lengths of containers is refused a graph. Numbers that a call changes, such as a count of calls,
may be of no consequence: they are moved to where so many calls would have brought them, and the
programs compared with the graph there. What is kept elsewhere, in globals or iterators, is not
seen.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vadd_pyro.checkpoints import random_state, restore_random_state
from vadd_pyro.compiled.graphs import NotOneGraphError
from vadd_pyro.programs import modules_of

__all__ = ["Memory", "changes_nothing", "left_alone"]

_CONTAINERS = (list, dict, set, deque)
_MOST_ITEMS, _MOST_OBJECTS = 100, 10_000  # data sets are not looked through
_OWN = ("_parameters", "_buffers", "_modules")


class _Place:
    """A number, which may be a tensor of one element, and where it is kept."""

    def __init__(self, holder: Any, key: Any, value: Any) -> None:
        self.holder, self.key, self.value = holder, key, value
        self.number = float(value)

    def _put(self, value: Any) -> None:
        if isinstance(self.holder, CellType):
            self.holder.cell_contents = value
        else:
            self.holder[self.key] = value

    def add(self, change: float) -> None:
        if isinstance(self.value, Tensor):
            self._put(torch.full_like(self.value, self.number + change))
        else:
            self._put(type(self.value)(self.value + change))

    def restore(self) -> None:
        self._put(self.value)
        if isinstance(self.value, Tensor) and float(self.value) != self.number:
            self.value.fill_(self.number)


def _parts(value: Any) -> tuple[Any, list[tuple[str, Any, Any]]]:
    """What an object consists of: the holder, and for each part its name, key and value."""
    if isinstance(value, dict):
        return value, [(f"[{key!r}]", key, part) for key, part in value.items()]
    if isinstance(value, list | tuple | deque):
        return value, [(f"[{index}]", index, part) for index, part in enumerate(value)]
    if isinstance(value, functools.partial):
        return None, [("", None, part) for part in (value.func, *value.args)]
    if isinstance(value, MethodType):
        return None, [("", None, value.__self__), ("", None, value.__func__)]
    held = getattr(value, "__dict__", {})
    parts = [(f".{key}", key, part) for key, part in held.items() if key not in _OWN]
    if isinstance(value, nn.Module):
        parts += [(f".{key}", key, part) for key, part in value._modules.items()]
    return held, parts


def _closed_over(function: FunctionType) -> Iterator[tuple[str, CellType, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f".{name}", cell, cell.cell_contents
        except ValueError:  # an empty cell
            continue


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        plain = not (value.requires_grad or value.is_complex() or value.dtype == torch.bool)
        return plain and value.numel() == 1
    # Larger integers are no counts, and not told apart as floats.
    return type(value) is float or (type(value) is int and abs(value) < 2**53)


def _look(roots: Sequence[tuple[str, Any]]) -> tuple[dict[str, _Place], dict[str, int]]:
    """Numbers and sizes of containers, by where they are."""
    numbers: dict[str, _Place] = {}
    sizes: dict[str, int] = {}
    known: set[int] = set()
    waiting = list(roots)
    while waiting and len(known) < _MOST_OBJECTS:
        path, value = waiting.pop()
        if id(value) in known or isinstance(value, Tensor | type | ModuleType | str | bytes):
            continue
        known.add(id(value))
        if isinstance(value, _CONTAINERS):
            sizes[path] = len(value)
        if isinstance(value, (*_CONTAINERS, tuple)) and len(value) > _MOST_ITEMS:
            continue
        holder, parts = _parts(value)
        found = [(name, holder, key, part) for name, key, part in parts]
        if isinstance(value, FunctionType):
            found += [(name, cell, None, part) for name, cell, part in _closed_over(value)]
        for name, where, key, part in found:
            if _is_number(part) and isinstance(where, dict | list | deque | CellType):
                numbers[path + name] = _Place(where, key, part)
            else:
                waiting.append((path + name, part))
    return numbers, sizes


class Memory:
    """Numbers and containers that programs keep.

    Args:
        elbo, model, guide: the loss.
    """

    def __init__(self, elbo: Any, model: Any, guide: Any) -> None:
        self._roots = (("guide", guide), ("model", model), ("elbo", elbo))
        self._changes: dict[str, float] = {}

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Learn from a call which numbers it changes, and by how much."""
        before, _ = _look(self._roots)
        yield
        after, _ = _look(self._roots)
        changes = {n: after[n].number - p.number for n, p in before.items() if n in after}
        self._changes = {n: change for n, change in changes.items() if 0 < abs(change) < math.inf}

    @contextmanager
    def of_one_size(self) -> Iterator[None]:
        """Refuse a call in which containers change their sizes.

        Raises:
            NotOneGraphError: naming them.
        """
        _, before = _look(self._roots)
        yield
        _, after = _look(self._roots)
        changed = [name for name, size in after.items() if before.get(name, size) != size]
        if changed:
            raise NotOneGraphError(
                f"the programs keep a memory of their calls, {', '.join(changed[:3])}"
            )

    def advance(self, calls: int) -> None:
        """Move the numbers that calls change to where so many more would bring them."""
        numbers, _ = _look(self._roots)
        for name, change in self._changes.items():
            if name in numbers:
                numbers[name].add(calls * change)


def _all_modules(modules: Sequence[nn.Module]) -> dict[int, tuple[str, nn.Module]]:
    return {id(part): (name, part) for m in modules for name, part in m.named_modules()}


@contextmanager
def left_alone(elbo: Any, model: Any, guide: Any) -> Iterator[None]:
    """Random numbers, buffers, gradients and numbers in attributes as they were."""
    roots = (("guide", guide), ("model", model), ("elbo", elbo))
    numbers, _ = _look(roots)
    modules = [part for program in (model, guide) for part in modules_of(program)]
    parts = [part for _, part in _all_modules(modules).values()]
    buffers = [(part._buffers, dict(part._buffers)) for part in parts]
    tensors = [b for _, kept in buffers for b in kept.values() if b is not None]
    gradients = [(p, p.grad) for part in parts for p in part._parameters.values() if p is not None]
    tensors += [gradient for _, gradient in gradients if gradient is not None]
    values = [(tensor, tensor._version, tensor.clone()) for tensor in tensors]
    random = random_state()
    try:
        yield
    finally:
        restore_random_state(random)
        for own, kept in buffers:
            own.clear()
            own.update(kept)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for tensor, version, value in values:
                if tensor._version != version:
                    tensor.copy_(value)
        for place in numbers.values():
            place.restore()


@contextmanager
def changes_nothing(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Refuse programs that change buffers, such as the averages of batch normalisation, or leave
    gradients.

    Raises:
        NotOneGraphError: naming them.
    """
    before = _tensors(modules)
    yield
    after = _tensors(modules)
    changed = [name for name, known in after.items() if before.get(name) != known]
    for kind in ("buffers", "gradients"):
        names = [name for what, name in changed if what == kind]
        if names:
            raise NotOneGraphError(f"the programs change the {kind} {', '.join(names[:3])}")


def _tensors(modules: Sequence[nn.Module]) -> dict[tuple[str, str], tuple[Any, int]]:
    """Which tensors there are, and how often each was written to."""
    found: dict[tuple[str, str], tuple[Any, int]] = {}
    for prefix, part in _all_modules(modules).values():
        held = [("buffers", name, b) for name, b in part._buffers.items()]
        held += [("gradients", n, p.grad) for n, p in part._parameters.items() if p is not None]
        for kind, name, tensor in held:
            version = -1 if tensor is None else tensor._version
            found[kind, f"{prefix}.{name}".lstrip(".")] = (_Same(tensor), version)
    return found


class _Same:
    """A tensor, equal to itself alone; held, so that its place is not taken by another."""

    def __init__(self, tensor: Tensor | None) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.tensor is self.tensor

    __hash__ = None  # type: ignore[assignment]
