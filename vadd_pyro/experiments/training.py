"""From settings to a trained pair in a run folder, in stages that a killed run takes up again.

1. ``model.pt``: model and guide by the DELBO;
2. ``chain.pt``: both by T-step bounds, if asked for;
3. ``prior.pt``: a mixture of normals fitted to the posteriors, in the prior's place, if asked for;
4. ``guide.pt``: a copy of the guide by T-step bounds, the model held fixed.

Each is the checkpoint of its stage. ``run.pt`` holds the result.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vadd_pyro.annealing import LinearAnnealing
from vadd_pyro.checkpoints import (
    check_writable,
    load_checkpoint,
    remove_stale,
    save_checkpoint,
    write_json,
)
from vadd_pyro.data import DataSet
from vadd_pyro.distributed import Processes
from vadd_pyro.elbo import MaskedDiffusionELBO
from vadd_pyro.experiments.settings import Settings
from vadd_pyro.experiments.store import (
    Experiment,
    build,
    check_folder,
    load_data,
    mixture_of,
    replace_prior,
    save,
)
from vadd_pyro.locks import locked_folder
from vadd_pyro.refitting import fit_prior
from vadd_pyro.times import GridTimes
from vadd_pyro.training import History, fit, fit_guide
from vadd_pyro.zoo import Pair, times_named

__all__ = ["train"]


class _Stage(NamedTuple):
    name: str
    elbo: MaskedDiffusionELBO
    num_iterations: int
    learning_rate: float
    fit: Callable[..., History]


def _stages(settings: Settings, data: DataSet) -> list[_Stage]:
    process = data.process()
    least_time = settings.least_time if settings.model == "vadd" else 0.0
    annealed = settings.model == "vadd" and round(settings.annealing * settings.num_iterations)
    delbo = MaskedDiffusionELBO(
        process,
        times=times_named(settings.times, settings.steps),
        kl_weight=LinearAnnealing(annealed, start=0.001) if annealed else 1.0,
        free_bits=settings.free_bits if settings.model == "vadd" else 0.0,
        least_time=least_time,
    )
    chain = MaskedDiffusionELBO(
        process, "chain", times=GridTimes(settings.steps), least_time=least_time
    )
    rate = settings.learning_rate
    return [
        _Stage("model", delbo, settings.num_iterations, rate, fit),
        _Stage("chain", chain, settings.num_chain_iterations, rate / 2, fit),
        _Stage("guide", chain, settings.num_guide_iterations, rate / 2, fit_guide),
    ]


def train(
    settings: Settings,
    folder: str | Path,
    *,
    checkpoint_every: int = 250,
    accumulate: int = 1,
    device: str | None = None,
    progress: bool = True,
) -> Experiment:
    """Train a pair, or go on where its run folder stands. Other processes are kept out of it,
    unless they are of the same process group and train it together.

    Args:
        settings: what and how.
        folder: the run folder; made if need be.
        checkpoint_every: updates between two checkpoints.
        accumulate: into how many parts each process divides its rows of a batch.
        device: where to compute; the CPU by default.
        progress: whether to show bars.

    Returns:
        The trained pair with its data, as :func:`vadd_pyro.experiments.load` gives it.

    Raises:
        ValueError: for settings that do not fit together, before anything is trained; if the
        folder holds a run with other settings, naming them; if another process is at work there.
        Further, whatever :func:`vadd_pyro.fit` raises.
    """
    folder = Path(folder)
    processes = Processes.current()
    processes.by_first(lambda: check_folder(settings, folder))
    data = processes.in_turns(lambda: load_data(settings))
    with processes.together():
        pair = build(settings, data, device)
    with ExitStack() as stack:
        with processes.together():
            if processes.first:
                _take(folder, settings, stack)
        return _train(settings, data, pair, folder, checkpoint_every, accumulate, progress)


def _take(folder: Path, settings: Settings, stack: ExitStack) -> None:
    """Keep other processes out of the folder, and begin the run there if it is new."""
    check_writable(folder / "settings.json")
    stack.enter_context(locked_folder(folder))
    remove_stale(folder)
    if not check_folder(settings, folder):  # again: another process may just have been there
        write_json(folder / "settings.json", settings.to_dict())


def _train(
    settings: Settings,
    data: DataSet,
    pair: Pair,
    folder: Path,
    checkpoint_every: int,
    accumulate: int,
    progress: bool,
) -> Experiment:
    processes = Processes.current()
    model, guide = pair.model, pair.guide
    histories = {}
    found: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for number, stage in enumerate(_stages(settings, data)):
        of_guide = stage.fit is fit_guide
        if of_guide:
            if settings.refits_prior:
                found["prior"], seconds["prior"] = _refit(settings, data, pair, folder)
            guide = copy.deepcopy(guide)
            if settings.refits_prior:
                guide.prior.requires_grad_(False)  # it is what it was fitted to be
        if not stage.num_iterations or (of_guide and not _has_parameters(guide)):
            continue
        histories[stage.name] = stage.fit(
            model,
            guide,
            stage.elbo,
            data.batches(settings.seed * 10 + number),
            stage.num_iterations,
            batch_size=settings.batch_size,
            learning_rate=stage.learning_rate,
            # Adam forgets what it knew of the gradients: without warm-up its first steps would
            # undo what the stage before has learned.
            warmup=min(settings.warmup, stage.num_iterations // 4),
            ema_decay=settings.ema_decay,
            optimizer=_optimizer(settings, stage.learning_rate),
            precision=settings.precision,
            # Gradients of draws of a mixture of many dimensions can be so large that a graph,
            # which rounds otherwise, is not what the programs are.
            compile=settings.compile and not (of_guide and settings.refits_prior),
            accumulate=accumulate,
            seed=settings.seed,
            checkpoint=folder / f"{stage.name}.pt",
            checkpoint_every=checkpoint_every,
            resume=True,
            progress=progress,
            description=f"{data.name}, {settings.title}, {stage.name}",
        )
    seconds |= {name: history.seconds[-1] for name, history in histories.items()}
    with processes.together():
        if processes.first:
            found |= {name: history.to_dict() for name, history in histories.items()}
            write_json(folder / "history.json", found)
            save(folder, settings, data, model, guide, seconds)
    return Experiment(settings, data, model, guide, data.process(), seconds)


def _refit(
    settings: Settings, data: DataSet, pair: Pair, folder: Path
) -> tuple[dict[str, Any], float]:
    """Replace the prior by one that is fitted to the posteriors; by what was found when that was
    done before, if it was. Returns log-densities of held-out draws, and the seconds it took.
    """

    def fitted() -> dict[str, Any]:
        file = folder / "prior.pt"
        if file.exists():
            return load_checkpoint(file)
        begun = time.monotonic()
        rows, held_out = data.rows("train"), data.rows("valid")
        fit = fit_prior(pair.model, pair.guide, data.process(), rows, held_out, seed=settings.seed)
        content = {
            "weights": {name: value.cpu() for name, value in fit.prior.state_dict().items()},
            "before": fit.before,
            "held_out": {str(size): value for size, value in fit.held_out.items()},
            "seconds": time.monotonic() - begun,
        }
        save_checkpoint(file, content)
        return content

    content = Processes.current().by_first(fitted)
    weights = content["weights"]
    prior = mixture_of(*weights["z_loc"].shape)
    prior.load_state_dict(weights)
    replace_prior(pair, prior)
    return {name: content[name] for name in ("before", "held_out")}, content["seconds"]


def _has_parameters(guide: Any) -> bool:
    return any(p.requires_grad for p in guide.parameters())


def _optimizer(
    settings: Settings, learning_rate: float
) -> Callable[[list[Tensor]], torch.optim.Optimizer] | None:
    """AdamW where weights decay, but not those of normalisations and biases."""
    if not settings.weight_decay:
        return None

    def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    return make
