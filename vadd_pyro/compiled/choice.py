"""How much of a training run is compiled: whole updates, networks alone, or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from torch import Tensor

from vadd_pyro.compiled.graphs import NotOneGraphError, first_line
from vadd_pyro.compiled.networks import compiled_networks, silent_networks
from vadd_pyro.compiled.traced import TracedLoss
from vadd_pyro.compiled.untouched import left_alone
from vadd_pyro.compiled.update import Update
from vadd_pyro.distributed import Processes
from vadd_pyro.elbo import MaskedDiffusionELBO
from vadd_pyro.programs import modules_of

__all__ = ["compile_updates", "give_up"]


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

    Anything less than whole updates is said in a warning. Random numbers, buffers, gradients and
    numbers in attributes of the programs are left as they were.

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
    with left_alone(elbo, model, guide):
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
    kind = _try_networks(elbo, model, guide, x_0, optimizer, half, accumulate, stack)
    if processes.first:
        warnings.warn(
            f"an update cannot be one compiled graph, {kind}: {reason}",
            RuntimeWarning,
            stacklevel=4,
        )
    return None


def give_up(
    update: Update,
    reason: str,
    elbo: MaskedDiffusionELBO,
    model: Any,
    guide: Any,
    x_0: Tensor,
    *,
    optimizer: torch.optim.Optimizer,
    average: list[Tensor] | None,
    half: bool,
    accumulate: int,
    processes: Processes,
    stack: ExitStack,
) -> None:
    """Go on without the graph of the updates, which is not what the programs are any more.

    The networks are compiled instead, if that is possible, and a warning says what has happened.

    Args:
        update: the graph.
        reason: in what they differ.
        elbo, model, guide, optimizer, average, half, accumulate, processes, stack: as for
            :func:`compile_updates`; ``elbo.iteration`` is that of the next update.
        x_0: rows of the next update.
    """
    update.release()
    if average is not None:
        average[:] = [value.clone() for value in average]
    kind = _try_networks(elbo, model, guide, x_0, optimizer, half, accumulate, stack)
    if processes.first:
        warnings.warn(
            f"compiled updates end at iteration {elbo.iteration}, after {update.calls} of them, "
            f"for the graph is not what the programs are now: {reason}. Training goes on from the "
            f"weights before this iteration, {kind}. The updates since the last comparison "
            f"({update.alike} had been made then) may not be what the programs would have made",
            RuntimeWarning,
            stacklevel=5,
        )


def _try_networks(
    elbo: MaskedDiffusionELBO,
    model: Any,
    guide: Any,
    x_0: Tensor,
    optimizer: torch.optim.Optimizer,
    half: bool,
    accumulate: int,
    stack: ExitStack,
) -> str:
    """Compile the networks alone, if that is possible; what came of it, in words."""
    inner = stack.enter_context(ExitStack())
    with left_alone(elbo, model, guide):
        try:
            part = x_0.chunk(accumulate)[0]
            number = _networks(elbo, model, guide, part, half, inner)
            kind = f"{number} networks alone are compiled"
        except Exception as error:  # of many kinds: the compiler fails, or there is none
            inner.close()
            kind = f"nor are networks compiled ({first_line(error)})"
    optimizer.zero_grad(set_to_none=True)
    return kind


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
    shares = products, accumulate, processes
    update = Update(loss, optimizer, averages, clip_norm, x_0, *shares)
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
