"""Compiled networks: what is left to compile where a whole update is no graph.

``torch.compile`` breaks at every Pyro statement. Networks have none, so those modules of a program
are compiled, each as large as possible, in whose call no statement was met and which return
tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from vadd_pyro.compiled.graphs import own_draws

__all__ = ["compiled_networks", "silent_networks"]


class _Speakers(Messenger):
    """Notes the modules in whose call Pyro got a message."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[nn.Module] = []
        self.called: dict[int, nn.Module] = {}
        self.speaking: set[int] = set()

    def _process_message(self, msg: Any) -> None:
        self.speaking.update(id(module) for module in self.running)

    def enter(self, module: nn.Module, args: Any) -> None:
        self.called[id(module)] = module
        self.running.append(module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running.pop()
        parts = output if isinstance(output, tuple | list) else (output,)
        if not all(isinstance(part, Tensor) for part in parts):
            self.speaking.add(id(module))


def silent_networks(programs: Sequence[nn.Module], call: Callable[[], Any]) -> list[nn.Module]:
    """The largest modules in whose call no Pyro statement is met and which return tensors.

    Args:
        programs: the modules of model and guide.
        call: runs both.
    """
    speakers = _Speakers()
    with ExitStack() as stack:
        stack.enter_context(speakers)
        parts = {id(part): part for program in programs for part in program.modules()}
        for part in parts.values():
            for handle in (
                part.register_forward_pre_hook(speakers.enter),
                part.register_forward_hook(speakers.leave, always_call=True),
            ):
                stack.callback(handle.remove)
        call()
    found: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> None:
        if id(module) in speakers.called and id(module) not in speakers.speaking:
            found[id(module)] = module
            return
        for child in module.children():
            visit(child)

    for program in programs:
        visit(program)
    return list(found.values())


@contextmanager
def compiled_networks(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Compile networks in place, and leave them as they were.

    Dropout in them draws torch's own random numbers, those that it draws uncompiled.
    """
    before = [network._compiled_call_impl for network in networks]
    for network in networks:
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        network.compile(options=own_draws(device))
    try:
        yield
    finally:
        for network, call in zip(networks, before, strict=True):
            network._compiled_call_impl = call
