r"""Base class of ready models and guides, and how their parameters meet Pyro's global store.

Pyro keeps parameters in one process-wide store under names. Names come from attributes, so a
second model in the process, or a guide with an attribute of the same name as the model's, would
find the first one's entry there and be trained in its place or not at all. Modules are therefore
entered under a name that belongs to one instance alone, and parameters which Pyro itself manages
(those of a ``PyroModule``) are refused where they would collide.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.settings
import torch
from pyro.nn import PyroModule
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import nn

__all__ = ["Program", "check_store", "evaluation", "register_parameters"]

_NUMBERS = itertools.count(1)


class Program(nn.Module):
    """A step program with parameters: a plain ``torch.nn.Module`` that also trains under
    ``pyro.infer.SVI``.

    Subclasses define ``forward(batch)``, in which they may use any Pyro statement. Parameters are
    announced to Pyro when a trace listens for them, with ``module_local_params`` on or off.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(handler, TraceMessenger) for handler in _PYRO_STACK):
            register_parameters(self)
        return super().__call__(*args, **kwargs)


def _pyro_managed(module: nn.Module) -> set[int]:
    """Identities of the parameters that PyroModule attributes hand to the store themselves."""
    return {
        id(parameter)
        for part in module.modules()
        if isinstance(part, PyroModule)
        for parameter in part._parameters.values()
        if parameter is not None
    }


def register_parameters(module: nn.Module) -> None:
    """Announce a module's parameters to Pyro, under names that no other instance uses.

    Args:
        module: any module. Parameters held directly by a ``PyroModule`` are left to Pyro, unless
            ``module_local_params`` keeps it from entering them in the store.
    """
    store = pyro.get_param_store()
    local = pyro.settings.get("module_local_params")
    managed = set() if local else _pyro_managed(module)
    parameters = [
        (name, parameter)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and id(parameter) not in managed
    ]
    if not parameters:
        return
    prefix = module.__dict__.get("_pyro_prefix")
    first = parameters[0]
    held = store._params.get(f"{prefix}.{first[0]}") if prefix else first[1]
    if prefix is None or (held is not None and held is not first[1]):
        # A fresh instance, or a deep copy that still carries the original's name.
        prefix = f"{type(module).__name__}#{next(_NUMBERS)}"
        module.__dict__["_pyro_prefix"] = prefix
    for name, parameter in parameters:
        pyro.param(f"{prefix}.{name}", parameter)


def check_store(*programs: Any) -> None:
    """Refuse a pair of programs whose parameters would share an entry of the global store.

    Raises:
        ValueError: naming the attribute and the ways out.
    """
    if pyro.settings.get("module_local_params"):
        return
    store = pyro.get_param_store()
    seen: dict[str, nn.Parameter] = {}
    for program in programs:
        if not isinstance(program, PyroModule):
            continue
        managed = _pyro_managed(program)
        for name, parameter in program.named_parameters():
            if id(parameter) not in managed:
                continue
            name = name.removesuffix("_unconstrained")
            for known in (seen.get(name), store._params.get(name)):
                if known is not None and known is not parameter:
                    raise ValueError(
                        f"parameter {name!r} of {type(program).__name__} would share an entry of "
                        "Pyro's global parameter store with another module of this process, and "
                        "one of the two would not be trained: rename the attribute, call "
                        "pyro.settings.set(module_local_params=True) before building the modules, "
                        "or pyro.clear_param_store() if the other one is no longer needed"
                    )
            seen[name] = parameter


@contextmanager
def evaluation(*programs: Callable[..., Any]) -> Iterator[None]:
    """Run programs in evaluation mode without gradients, and put each module back as it was."""
    modules = [part for p in programs if isinstance(p, nn.Module) for part in p.modules()]
    modes = [part.training for part in modules]
    for part in modules:
        part.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in zip(modules, modes, strict=True):
            part.training = mode
