r"""One cell of the experiment: a model trained from one seed and measured against the known law.

A cell is a data set, a prior, a guide, an objective, a distribution of times and a seed. It is
built by :mod:`vadd_pyro.zoo` and measured at 1, 2, 4 and 8 steps:

* the exact law of the sampler with fresh latents, held against the law of the data by total
  variation, Jensen-Shannon, :math:`KL(\text{data} | \text{sampler})` and, for tied tokens, the
  mass on the support;
* the same distances for the exact law of the sampler that shares its latent over all steps;
* the T-step bound on held-out rows, after a copy of the guide was refitted on
  the targets that this sampler meets, and the exact mean of :math:`\log p_T` on the same rows. The
  gap is the mean of :math:`\log q(x) - \mathrm{bound}(x)` over them, ``q`` the law of the data: in
  expectation minus the bound less the entropy, without the noise of which rows were held out;
* what the latent holds, from the history of training.
"""

from __future__ import annotations

import copy
import math
import platform
import re
import time
import traceback
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

import vadd_pyro
from vadd_pyro import data, metrics, zoo
from vadd_pyro.checkpoints import CheckpointWriteError, DamagedCheckpointError
from vadd_pyro.data import TokenDistribution
from vadd_pyro.data.tokens import UniformOver
from vadd_pyro.elbo import MaskedDiffusionELBO
from vadd_pyro.exact import exact_distributions
from vadd_pyro.likelihood import log_likelihood_bound
from vadd_pyro.locks import InUseError
from vadd_pyro.process import MaskingProcess, check_size
from vadd_pyro.programs import evaluation
from vadd_pyro.recorder import Recorder
from vadd_pyro.runs import save_run
from vadd_pyro.sampling import seeded
from vadd_pyro.times import GridTimes
from vadd_pyro.training import History, fit, fit_guide

__all__ = ["STEPS", "Cell", "Settings", "run_cell"]

STEPS = (1, 2, 4, 8)
_EMA_DECAY = 0.999
_HIDDEN_DIM = 128
_NUM_DRAWS = 2**12  # points over which a continuous latent is integrated


@dataclass(frozen=True)
class Cell:
    """One training run of the grid, by the names of its parts."""

    data: str
    prior: str
    guide: str
    objective: str
    times: str
    seed: int

    @property
    def slug(self) -> str:
        """A name for its folder, another one for every cell."""
        parts = [self.data, self.prior, self.guide, self.objective, self.times]
        name = "__".join(re.sub(r"[^\w.]+", "-", part) for part in parts)
        plain = all(re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", part) for part in parts)
        if not plain or len(name) > 150:
            # Import paths lose characters above; two of them must not share a folder.
            name = f"{name[:150]}__{zlib.crc32(repr(parts).encode()):08x}"
        return f"{name}__seed{self.seed}"

    def __str__(self) -> str:
        return (
            f"{self.data}, {self.prior}, guide {self.guide}, {self.objective}, {self.times}, "
            f"seed {self.seed}"
        )


@dataclass(frozen=True)
class Settings:
    """What all cells of a folder have in common.

    Args:
        num_iterations: updates per model; None for each prior's own number.
        learning_rate: step size of Adam, decayed to zero by a cosine.
        batch_size: rows per update.
        latent_dim: size of continuous latents.
        num_codes: number of codes of categorical ones.
        vocab_size: bins per axis of the toy densities; tied tokens have their own.
        num_held_out: rows on which bounds are taken.

    Raises:
        ValueError: for a size out of range, naming it.
    """

    num_iterations: int | None = None
    learning_rate: float = 2e-3
    batch_size: int = 256
    latent_dim: int = 2
    num_codes: int = 64
    vocab_size: int = 100
    num_held_out: int = 1000

    def __post_init__(self) -> None:
        for name in ("batch_size", "latent_dim", "num_codes"):
            check_size(name, getattr(self, name))
        check_size("num_held_out", self.num_held_out, least=2)
        if self.num_iterations is not None:
            check_size("num_iterations", self.num_iterations)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate!r}")
        if not 3 <= self.vocab_size <= 1000:
            raise ValueError(
                f"vocab_size must lie in 3..1000, so that laws can be exact, got {self.vocab_size}"
            )

    def describe(self) -> dict[str, Any]:
        """All that a result depends on beside its cell, as plain values."""
        return {
            **asdict(self),
            "ema_decay": _EMA_DECAY,
            "num_draws": _NUM_DRAWS,
            "steps": list(STEPS),
            "vadd_pyro": vadd_pyro.__version__,
            "torch": str(torch.__version__),
            "pyro": pyro.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        }


def _distances(law: Tensor, density: TokenDistribution) -> dict[str, float]:
    truth = density.probabilities
    values = {
        "total_variation": metrics.total_variation(law, truth),
        "jensen_shannon": metrics.jensen_shannon(law, truth),
        "kl_divergence": metrics.kl_divergence(truth, law),
    }
    if isinstance(density, UniformOver):
        values["accuracy"] = float(law[truth > 0].sum())
    return values


def _has_latent(model: Any, process: MaskingProcess) -> bool:
    nothing = process.corrupt(torch.zeros(1, process.length, dtype=torch.long), 1.0)
    with seeded(0), evaluation(model), Recorder() as seen:
        model(nothing)
    return any(name != "x_0" and not site.observed for name, site in seen.sites.items())


class _Measures:
    """Rows of a tidy table: number of steps, kind of latent, metric, value."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(
        self, values: Mapping[str, Any], num_steps: int | None = None, latent: str | None = None
    ) -> None:
        for metric, value in values.items():
            row = {"num_steps": num_steps, "latent": latent, "metric": metric, "value": value}
            self.rows.append(row)


def _measure(
    model: Any,
    guide: Any,
    density: TokenDistribution,
    process: MaskingProcess,
    settings: Settings,
    seed: int,
) -> list[dict[str, Any]]:
    """Everything that is measured per number of steps."""
    measures = _Measures()
    held_out = density.sample(settings.num_held_out, seed=seed + 10_000)
    rows = tuple(held_out.T)
    log_truth = density.probabilities[rows].log()
    fresh = exact_distributions(model, process, STEPS, num_draws=_NUM_DRAWS)
    for num_steps, law in fresh.items():
        bound = log_likelihood_bound(
            model,
            guide,
            process,
            held_out,
            num_steps,
            num_particles=16,
            num_draws=2,
            seed=seed,
        )
        value, error = bound.mean()
        gap = log_truth - bound.value
        measures.add(
            {
                **_distances(law, density),
                "bound": value,
                "bound_stderr": error,
                "log_likelihood": float(law[rows].log().mean()),
                "gap": float(gap.mean()),
                "gap_stderr": float(gap.std() / len(gap) ** 0.5),
            },
            num_steps,
            "fresh",
        )
    if _has_latent(model, process):
        shared = exact_distributions(model, process, STEPS, latent="shared", num_draws=_NUM_DRAWS)
        for num_steps, law in shared.items():
            measures.add(_distances(law, density), num_steps, "shared")
    return measures.rows


def _latent_statistics(history: History) -> dict[str, Any]:
    """The KL of the objective, and what training last saw of the latents where samples start."""
    # Without a latent, or with one that is summed out, there is no KL, which is not one of zero.
    values: dict[str, Any] = {"kl": history.kl[-1]} if any(history.kl) else {}
    if history.kl_per_dimension and history.kl_per_dimension[-1]:
        values["kl_at_start"] = math.fsum(history.kl_per_dimension[-1])
        for name in ("active_units", "mutual_information", "share_at_prior"):
            last = getattr(history, name)[-1]
            if last is not None:
                values[name] = last
    return values


def _num_parameters(program: Any) -> int:
    return sum(p.numel() for p in program.parameters()) if hasattr(program, "parameters") else 0


def _train_and_measure(
    cell: Cell,
    settings: Settings,
    folder: Path,
    checkpoint_every: int,
    progress: bool,
    result: dict[str, Any],
) -> None:
    """Fill ``result``; its ``"stage"`` says what was being done if this raises."""
    result["stage"] = "build"
    pyro.clear_param_store()
    density = data.named(cell.data, settings.vocab_size)
    process = density.process()
    num_rows = 20_000 if isinstance(density, UniformOver) else 1_000_000
    x_0 = density.sample(num_rows, seed=cell.seed)
    torch.manual_seed(cell.seed)
    model, guide, own_iterations = zoo.build(
        cell.prior,
        cell.guide,
        process,
        latent_dim=settings.latent_dim,
        num_codes=settings.num_codes,
        hidden_dim=_HIDDEN_DIM,
    )
    num_iterations = settings.num_iterations or own_iterations
    elbo = zoo.objective(cell.objective, cell.times, process, num_iterations)
    options: dict[str, Any] = {
        "learning_rate": settings.learning_rate,
        "batch_size": settings.batch_size,
        "ema_decay": _EMA_DECAY,
        "seed": cell.seed,
        "resume": True,
        "checkpoint_every": checkpoint_every,
        "progress": progress,
    }
    result["stage"] = "train"
    history = fit(
        model,
        guide,
        elbo,
        x_0,
        num_iterations,
        checkpoint=folder / "checkpoint.pt",
        description=str(cell),
        **options,
    )
    configuration = {
        **asdict(cell),
        "vocab_size": settings.vocab_size,
        "latent_dim": settings.latent_dim,
        "num_codes": settings.num_codes,
        "hidden_dim": _HIDDEN_DIM,
        "num_iterations": num_iterations,
    }
    save_run(folder, model, guide, configuration)
    result["stage"] = "refit the guide"
    if elbo.objective != "chain" and _num_parameters(guide):
        guide = copy.deepcopy(guide)
        fit_guide(
            model,
            guide,
            MaskedDiffusionELBO(process, "chain", times=GridTimes(STEPS)),
            x_0,
            max(1, num_iterations // 5),
            checkpoint=folder / "guide.pt",
            description=f"{cell}, guide",
            **options,
        )
    result["stage"] = "measure"
    start = time.perf_counter()
    measures = _Measures()
    measures.rows = _measure(model, guide, density, process, settings, cell.seed)
    measures.add(
        {
            **_latent_statistics(history),
            "entropy": density.entropy,
            "num_iterations": num_iterations,
            "num_parameters": _num_parameters(model),
            "num_guide_parameters": _num_parameters(guide),
            "train_seconds": history.seconds[-1],
        }
    )
    result["measure_seconds"] = time.perf_counter() - start
    result["measures"] = measures.rows
    result["history"] = history.to_dict()


def run_cell(
    cell: Cell,
    settings: Settings,
    folder: str | Path,
    *,
    checkpoint_every: int = 250,
    progress: bool = True,
) -> dict[str, Any]:
    """Train and measure one cell, or go on with it where its checkpoint stands.

    Args:
        cell: what to run.
        settings: how.
        folder: where checkpoints go.
        checkpoint_every: updates between two of them.
        progress: whether to show bars.

    Returns:
        The cell, the settings and what was measured; if anything failed, ``"error"`` in place of
        the measures, with the stage, the type, the message and the traceback.

    Raises:
        CheckpointWriteError, DamagedCheckpointError, InUseError: about the files, not the cell,
        whose checkpoints are worth keeping.
    """
    result: dict[str, Any] = {
        "cell": asdict(cell),
        "settings": settings.describe(),
        "environment": {"threads": torch.get_num_threads(), "platform": platform.platform()},
    }
    start = time.perf_counter()
    try:
        _train_and_measure(cell, settings, Path(folder), checkpoint_every, progress, result)
    except (CheckpointWriteError, DamagedCheckpointError, InUseError):
        raise
    except Exception as error:
        result["error"] = {
            "stage": result["stage"],
            "type": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
        }
    del result["stage"]
    result["seconds"] = time.perf_counter() - start
    return result
