"""Networks compiled while a program is sampled from, and left as they were.

A step program as a whole cannot be compiled, for the handlers around its statements are Python.
Its decoder can, in place and with the names of its parameters kept: as a whole, or in those parts
of it that it names itself (``heavy_parts()``), so that what saves work around them goes on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vadd_pyro.programs import modules_of

__all__ = ["compiled"]


class _Compiled:
    """A module's call, compiled; the plain one if that fails."""

    def __init__(self, module: nn.Module, backend: str) -> None:
        self.plain = module._call_impl
        self.fast: Callable[..., Any] | None = torch.compile(
            self.plain, backend=backend, dynamic=True
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.fast is None:
            return self.plain(*args, **kwargs)
        try:
            return self.fast(*args, **kwargs)
        except Exception as error:
            result = self.plain(*args, **kwargs)  # where an error of the network's own comes out
            self.fast = None
            error = getattr(error, "inner_exception", error)  # what the compiler met
            reason = next(iter(str(error).strip().splitlines()), "")
            warnings.warn(f"compile has no effect: {type(error).__name__}: {reason}", stacklevel=2)
            return result


@contextmanager
def compiled(model: Callable[..., Any], how: bool | str) -> Iterator[None]:
    """Run a program with its decoder compiled.

    Args:
        model: a step program that holds its network as ``decoder``, such as
            :class:`vadd_pyro.models.VADD`.
        how: False for not at all; True, or the name of a backend of ``torch.compile``.

    Raises:
        TypeError: if ``how`` is neither.
        ValueError: for an unknown backend, or a program without such an attribute.
    """
    if not isinstance(how, bool | str):
        raise TypeError(f"compile must be True, False or the name of a backend, got {how!r}")
    if how is False:
        yield
        return
    if isinstance(how, str) and how not in (known := torch.compiler.list_backends(())):
        raise ValueError(f"compile must be True or one of {', '.join(known)}, got {how!r}")
    parts = [part for part in _parts(model) if part._compiled_call_impl is None]
    for part in parts:
        part._compiled_call_impl = _Compiled(part, "inductor" if how is True else how)
    try:
        yield
    finally:
        for part in parts:
            part._compiled_call_impl = None


def _parts(model: Callable[..., Any]) -> list[nn.Module]:
    decoders = [getattr(module, "decoder", None) for module in modules_of(model)]
    found = [decoder for decoder in decoders if isinstance(decoder, nn.Module)]
    if not found:
        raise ValueError(
            "compile needs a program with a torch.nn.Module as attribute 'decoder', got "
            f"{type(model).__name__}: compile your own networks in place, network.compile()"
        )
    parts: list[nn.Module] = []
    for decoder in found:
        heavy_parts = getattr(decoder, "heavy_parts", None)
        parts += [decoder] if heavy_parts is None else heavy_parts()
    return parts
