"""How much of a training run is compiled: whole updates, networks alone, or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor

from vadd_pyro.checkpoints import random_state, restore_random_state
from vadd_pyro.compiled.graphs import NotOneGraphError, first_line
from vadd_pyro.compiled.networks import compiled_networks, silent_networks
from vadd_pyro.compiled.traced import TracedLoss
from vadd_pyro.compiled.update import Update
from vadd_pyro.distributed import Processes
from vadd_pyro.elbo import MaskedDiffusionELBO
from vadd_pyro.programs import modules_of

__all__ = ["compile_updates"]


def compile_updates(
    elbo: MaskedDiffusionELBO,
    model: Any,
    guide: Any,
    x_0: Tensor,
    *,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    average: list[Tensor] | None,
    clip_norm: float | None,
    half: bool,
    products: Mapping[str, bool] | None,
    accumulate: int = 1,
    processes: Processes | None = None,
    stack: ExitStack,
) -> Update | None:
    """Compile updates as far as the programs allow it.

    Anything less than whole updates is said in a warning. Random numbers, buffers and gradients
    are left as they were.

    Args:
        elbo, model, guide: the loss.
        x_0: rows as every update will be given, ``(B, D)``.
        optimizer: of the parameters.
        parameters: all of them.
        average: their averages, in the same order; those that the updates keep take their places.
        clip_norm: largest norm of the gradient.
        half: run the programs in bfloat16 under autocast.
        products: decisions of an earlier run of it, as in :class:`Update`.
        accumulate: into how many parts the rows are divided.
        processes: whose gradients are averaged; all of them compile whole updates, or none does.
        stack: undoes all of it when it is closed.

    Returns:
        The updates, or None where they are no graph.
    """
    processes = Processes() if processes is None else processes
    update, reason = None, ""
    with _left_alone(model, guide):
        try:
            loss = TracedLoss(elbo, model, guide, half)
            shares = products, accumulate, processes
            update = _whole(loss, x_0, optimizer, parameters, average, clip_norm, *shares)
        except NotOneGraphError as error:
            reason = str(error)
        except Exception as error:  # whatever it is, the programs themselves do without a graph
            reason = first_line(error)
    found = processes.gather((reason, [] if update is None else list(update.parameters)))
    if update is not None:
        if all(other == found[0] for other in found):
            stack.callback(update.release)
            return update
        update.release()
        reason = next(filter(None, (r for r, _ in found)), "it is another one in each process")
    inner = stack.enter_context(ExitStack())
    with _left_alone(model, guide):
        try:
            part = x_0.chunk(accumulate)[0]
            number = _networks(elbo, model, guide, part, half, inner)
            kind = f"{number} networks alone are compiled"
        except Exception as error:  # of many kinds: the compiler fails, or there is none
            inner.close()
            kind = f"nor are networks compiled ({first_line(error)})"
        optimizer.zero_grad(set_to_none=True)
    if processes.first:
        warnings.warn(
            f"an update cannot be one compiled graph, {kind}: {reason}",
            RuntimeWarning,
            stacklevel=4,
        )
    return None


@contextmanager
def _left_alone(*programs: Any) -> Iterator[None]:
    """Random numbers and buffers as they were."""
    modules = [module for program in programs for module in modules_of(program)]
    buffers = [(b, b.clone()) for module in modules for b in module.buffers()]
    random = random_state()
    try:
        yield
    finally:
        restore_random_state(random)
        for buffer, value in buffers:
            buffer.copy_(value)


def _whole(
    loss: TracedLoss,
    x_0: Tensor,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    average: list[Tensor] | None,
    clip_norm: float | None,
    products: Mapping[str, bool] | None,
    accumulate: int,
    processes: Processes,
) -> Update:
    if {id(p) for p in parameters} != {id(p) for p in loss.parameters.values()}:
        raise NotOneGraphError("some parameters are held by Pyro's store alone")
    averages = None
    if average is not None:
        own = {id(p): a for p, a in zip(parameters, average, strict=True)}
        averages = {name: own[id(p)] for name, p in loss.parameters.items()}
    weight = loss.elbo.current_kl_weight()
    shares = products, accumulate, processes
    update = Update(loss, optimizer, averages, clip_norm, x_0, weight, *shares)
    if average is not None:
        kept = {id(update.parameters[name]): a for name, a in update.average.items()}
        average[:] = [kept.get(id(p), a) for p, a in zip(parameters, average, strict=True)]
    return update


def _networks(
    elbo: MaskedDiffusionELBO, model: Any, guide: Any, x_0: Tensor, half: bool, stack: ExitStack
) -> int:
    """Compile the networks, and try them; how many there are."""

    def call() -> None:
        device = x_0.device.type
        with pyro.validation_enabled(False), torch.autocast(device, torch.bfloat16, half):
            elbo.terms(model, guide, x_0).loss.backward()

    programs = [module for program in (model, guide) for module in modules_of(program)]
    networks = silent_networks(programs, call)
    stack.enter_context(compiled_networks(networks))
    call()
    return len(networks)
