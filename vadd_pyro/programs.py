r"""Base class of ready models and guides, and how their parameters meet Pyro's global store.

Pyro keeps parameters in one process-wide store under names. Names come from attributes, so a
second model in the process, or a guide with an attribute of the same name as the model's, would
find the first one's entry there and be trained in its place or not at all. Modules are therefore
entered under a name that belongs to one instance alone, and parameters which Pyro itself manages
(those of a ``PyroModule``) are refused where they would collide.
"""

from __future__ import annotations

import functools
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
from torch import Tensor, nn
from torch.distributions import constraints

__all__ = [
    "Program",
    "check_callable",
    "check_least_times",
    "check_store",
    "draw_latent",
    "evaluation",
    "is_local_parameter",
    "kept_modes",
    "modules_of",
    "register_parameters",
]

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


def is_local_parameter(msg: dict[str, Any]) -> bool:
    """A PyroModule's message about a parameter of its own, which SVI could not make use of."""
    return msg["type"] == "param" and msg["fn"] != pyro.get_param_store().get_param


def check_least_times(least_time: float, *programs: Any) -> None:
    """Check that programs do without a latent wherever a loss takes it that they do.

    Args:
        least_time: the loss's.
        programs: those without an attribute of that name are the user's to vouch for.

    Raises:
        ValueError: naming the program and both times.
    """
    for program in programs:
        own = getattr(program, "least_time", least_time)
        if own < least_time:
            raise ValueError(
                f"the loss has least_time = {least_time}, and {type(program).__name__} least_time "
                f"= {own}: it has a latent in steps that the loss scores as if there were none"
            )


def draw_latent(prior: Callable[[Any], Any], batch: Any) -> Any:
    """Run a prior: what it returns, or a draw of ``"z"`` if it returns a distribution."""
    z = prior(batch)
    if not isinstance(z, Tensor) and hasattr(z, "log_prob"):
        z = pyro.sample("z", z)
    return z


def check_callable(name: str, value: Any) -> None:
    """Check that a part of a program can be called.

    Raises:
        TypeError: naming the argument.
    """
    if not callable(value):
        raise TypeError(f"{name} must be a module or a function, got {value!r}")


def modules_of(program: Any) -> list[nn.Module]:
    """The modules that make up a program: itself, or what a handler around it wraps.

    Handlers such as ``poutine.scale(model, 2.0)`` return a function around the module. Modules
    that a plain function refers to by name cannot be seen; they speak through ``pyro.module``.
    """
    if isinstance(program, nn.Module):
        return [program]
    if isinstance(program, functools.partial):
        parts = (program.func, *program.args)
        return [module for part in parts for module in modules_of(part)]
    for attribute in ("__wrapped__", "__self__"):
        if hasattr(program, attribute):
            return modules_of(getattr(program, attribute))
    return []


def _pyro_managed(module: nn.Module) -> dict[int, str]:
    """Parameters that PyroModule attributes enter in the store themselves, with their names."""
    return {
        id(parameter): f"{part._pyro_name}.{name}".lstrip(".").removesuffix("_unconstrained")
        for part in module.modules()
        if isinstance(part, PyroModule)
        for name, parameter in part._parameters.items()
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
    managed = {} if local else _pyro_managed(module)
    parameters = [
        (name, parameter)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and id(parameter) not in managed
    ]
    if not parameters:
        return
    prefix = module.__dict__.get("_pyro_prefix")
    if prefix is None or any(
        store._params.get(f"{prefix}.{name}", parameter) is not parameter
        for name, parameter in parameters
    ):
        # A fresh instance, a deep copy that carries the original's name, or a replaced layer.
        prefix = f"{type(module).__name__}#{next(_NUMBERS)}"
        module.__dict__["_pyro_prefix"] = prefix
    for name, parameter in parameters:
        key = f"{prefix}.{name}"
        if key not in store:
            # As PyroModule does: the parameter itself, where assignment might store a copy.
            store._constraints[key] = constraints.real
            store._params[key] = parameter
            store._param_to_name[parameter] = key
        pyro.param(key)


def check_store(*programs: Any) -> None:
    """Refuse a pair of programs whose parameters would share an entry of the global store.

    Raises:
        ValueError: naming the attribute and the ways out.
    """
    if pyro.settings.get("module_local_params"):
        return
    store = pyro.get_param_store()
    seen: dict[str, nn.Parameter] = {}
    for module in (m for program in programs for m in modules_of(program)):
        managed = _pyro_managed(module)
        for parameter in module.parameters():
            name = managed.get(id(parameter))
            if name is None:
                continue
            for known in (seen.get(name), store._params.get(name)):
                if known is not None and known is not parameter:
                    raise ValueError(
                        f"parameter {name!r} of {type(module).__name__} would share an entry of "
                        "Pyro's global parameter store with another module of this process, and "
                        "one of the two would not be trained: rename the attribute, call "
                        "pyro.settings.set(module_local_params=True) before building the modules, "
                        "or pyro.clear_param_store() if the other one is no longer needed"
                    )
            seen[name] = parameter


@contextmanager
def kept_modes(*programs: Any) -> Iterator[None]:
    """Put every module back into training or evaluation mode as it was."""
    modules = [part for p in programs for module in modules_of(p) for part in module.modules()]
    modes = [part.training for part in modules]
    try:
        yield
    finally:
        for part, mode in zip(modules, modes, strict=True):
            part.training = mode


@contextmanager
def evaluation(*programs: Any) -> Iterator[None]:
    """Run programs in evaluation mode without gradients, and put each module back as it was.

    Modules that a plain function uses by name are not seen (:func:`modules_of`): put those with
    dropout or batch statistics into evaluation mode yourself.
    """
    with kept_modes(*programs), torch.no_grad():
        for program in programs:
            for module in modules_of(program):
                module.eval()
        yield
