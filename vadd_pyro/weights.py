"""The parameters of a pair of programs by name: those of its modules, and those that a function
keeps in Pyro's store.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from vadd_pyro.programs import modules_of

__all__ = ["NamedParameters", "Weights"]


class NamedParameters(Messenger):
    """Collects the parameters that programs name to Pyro.

    Unlike a trace, it does not move a :class:`~vadd_pyro.Program` to enter its own in the store.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, Tensor] = {}

    def _pyro_post_param(self, msg: Any) -> None:
        self.found[msg["name"]] = msg["value"]


class Weights:
    """All parameters of a pair of programs by name.

    Those of modules, and those a function keeps in Pyro's store.
    """

    def __init__(self, model: Any, guide: Any) -> None:
        self.modules = {
            name if number == 0 else f"{name}_{number}": module
            for name, program in (("model", model), ("guide", guide))
            for number, module in enumerate(modules_of(program))
        }
        self.named: dict[str, Tensor] = {}
        self.frozen: list[nn.Parameter] = []
        known: set[int] = set()
        for prefix, module in self.modules.items():
            for name, parameter in module.named_parameters():
                if id(parameter) in known:
                    continue
                known.add(id(parameter))
                if parameter.requires_grad:
                    self.named[f"{prefix}.{name}"] = parameter
                else:
                    self.frozen.append(parameter)

    def add_from_store(self, found: dict[str, Tensor]) -> None:
        """Take over parameters that the programs named to Pyro and that no module holds.

        Those that were frozen stay so: Pyro's store asks every parameter for its gradient.
        """
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        known = {id(parameter) for parameter in (*self.named.values(), *self.frozen)}
        for name, value in found.items():
            own: Tensor = value.unconstrained() if hasattr(value, "unconstrained") else value
            if own.is_leaf and own.requires_grad and id(own) not in known:
                known.add(id(own))
                self.named[f"store.{name}"] = own

    def values(self) -> list[Tensor]:
        return list(self.named.values())

    def tensors(self) -> dict[str, Tensor]:
        """All that the programs keep by name: parameters, trained or not, and buffers."""
        held = {
            f"{prefix}.{name}": value
            for prefix, module in self.modules.items()
            for name, value in module.state_dict(keep_vars=True).items()
            if isinstance(value, Tensor)
        }
        return {**held, **{n: p for n, p in self.named.items() if n.startswith("store.")}}

    def buffers(self) -> list[Tensor]:
        """What the modules keep besides parameters, such as batch statistics."""
        parameters = {id(p) for module in self.modules.values() for p in module.parameters()}
        stored = {id(p) for p in self.named.values()}
        return [v for v in self.tensors().values() if id(v) not in parameters | stored]

    def state(self) -> dict[str, Any]:
        buffers = {name: module.state_dict() for name, module in self.modules.items()}
        store = {n: p.detach() for n, p in self.named.items() if n.startswith("store.")}
        return {**buffers, "store": store}

    def load(self, state: dict[str, Any], path: Path) -> None:
        """Take over a saved state, all of it or, if anything does not fit, nothing."""
        stored = state["store"]
        held = {name: p for name, p in self.named.items() if name.startswith("store.")}
        pairs: list[tuple[str, dict[str, Tensor], dict[str, Tensor]]] = [
            (name, state.get(name, {}), module.state_dict())
            for name, module in self.modules.items()
        ]
        for name, saved, own in [*pairs, ("Pyro parameters", stored, held)]:
            differing = sorted(set(saved) ^ set(own)) or sorted(
                key for key in own if saved[key].shape != own[key].shape
            )
            if differing:
                raise ValueError(
                    f"{path} does not fit this {name}: they differ in {', '.join(differing[:5])}"
                )
        with torch.no_grad():
            for name, module in self.modules.items():
                module.load_state_dict(state[name])
            for name, value in stored.items():
                self.named[name].copy_(value)
