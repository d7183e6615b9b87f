"""From a checkpoint to the run that goes on: is it the same run, and with which random numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from vadd_pyro.checkpoints import restore_random_state
from vadd_pyro.distributed import Processes

__all__ = ["check_same_run", "estimated_size", "moments_of", "restore_own"]

_PARTS = (
    *("configuration", "iteration", "weights", "average", "parameter_names", "optimizer"),
    *("random", "history", "since", "smooth", "elapsed"),
)
# Bytes of a checkpoint: each tensor's header, an entry of the history, names and random states.
_HEADER, _ENTRY, _BESIDE = 300, 100, 50_000
_PROCESS = 15_000  # the random state of one more process


def check_same_run(
    path: Path, content: Mapping[str, Any], configuration: Mapping[str, Any]
) -> None:
    """Check that a checkpoint is of the run that is to go on from it.

    Args:
        path: where it is.
        content: what it holds.
        configuration: what the run must have been asked for.

    Raises:
        ValueError: naming what it lacks, or where the runs differ.
    """
    missing = [name for name in _PARTS if name not in content]
    if missing:
        raise ValueError(f"{path} is no checkpoint of fit: it lacks {', '.join(missing)}")
    # Said where in use alone, and not by older checkpoints.
    unnamed = {"precision": "float32", "compile": False}
    saved = {**unnamed, **content["configuration"]}
    for name, value in {**unnamed, **configuration}.items():
        if saved.get(name) != value:
            raise ValueError(
                f"{path} belongs to another run: its {name} is {saved.get(name)!r}, this "
                f"call's is {value!r}"
            )


def restore_own(
    path: Path, content: Mapping[str, Any], processes: Processes
) -> dict[str, bool] | None:
    """Go on with what each process of a checkpoint had of its own: its random numbers, and its
    decisions on products (:mod:`vadd_pyro.compiled.products`), which are returned.

    If it is of another number of processes, they start with new random numbers, and a warning says
    so.
    """
    others: list[Mapping[str, Any]] = content.get("other_processes", [])
    states = [content, *others]
    if len(states) == processes.size:
        own = states[processes.rank]
        restore_random_state(own["random"])
        return own.get("products") or None
    pyro.set_rng_seed(processes.seed(content["configuration"]["seed"], content["iteration"]))
    if processes.first:
        warnings.warn(
            f"{path} is of {len(states)} processes, and goes on in {processes.size} with other "
            "random numbers: the same optimisation, but not bit for bit the same run",
            RuntimeWarning,
            stacklevel=4,
        )
    return content.get("products") or None


def estimated_size(tensors: Iterable[Any], num_entries: int, num_processes: int = 1) -> int:
    """About how many bytes a checkpoint takes.

    Args:
        tensors: what it holds; other values are small.
        num_entries: entries of its history.
        num_processes: how many random states it holds.
    """
    sizes = [t.numel() * t.element_size() + _HEADER for t in tensors if isinstance(t, Tensor)]
    return sum(sizes) + _BESIDE + _ENTRY * num_entries + _PROCESS * (num_processes - 1)


def moments_of(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> list[Any]:
    """What an optimiser keeps. One that has made no step is taken for Adam, with two numbers for
    each weight.
    """
    kept = [value for state in optimizer.state.values() for value in state.values()]
    return kept if kept else [*parameters, *parameters]
