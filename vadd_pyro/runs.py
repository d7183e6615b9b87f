"""Run folders: a trained pair with all that is needed to build it again.

``run.pt`` in a folder holds the weights and the names of the parts (data, prior, guide, sizes) as
plain values; it is read without running code, and the pair is built by :mod:`vadd_pyro.zoo`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vadd_pyro import data, zoo
from vadd_pyro.checkpoints import load_checkpoint, save_checkpoint
from vadd_pyro.data import TokenDistribution
from vadd_pyro.inspection import inspect_pair
from vadd_pyro.inspection.verdicts import Verdict
from vadd_pyro.process import MaskingProcess
from vadd_pyro.programs import modules_of

__all__ = [
    "FILE",
    "Run",
    "find_runs",
    "inspect_run",
    "load_run",
    "restore",
    "save_run",
    "state_of",
    "told",
]

FILE = "run.pt"
_PARTS = ("data", "vocab_size", "prior", "guide", "latent_dim", "num_codes", "hidden_dim")


@dataclass(frozen=True)
class Run:
    """A trained pair.

    Args:
        configuration: the names and sizes that it was built from.
        model, guide: the pair.
        process: its forward process.
        density: the data.
    """

    configuration: dict[str, Any]
    model: Any
    guide: Any
    process: MaskingProcess
    density: TokenDistribution

    @property
    def title(self) -> str:
        """What reports call it."""
        prior = self.configuration["prior"]
        name = zoo.PRIORS.get(prior, prior)
        return f"{self.density.name}, {name if prior == 'none' else f'VADD with prior {name}'}"


def save_run(folder: str | Path, model: Any, guide: Any, configuration: dict[str, Any]) -> Path:
    """Write a trained pair to a folder, whole or not at all.

    Args:
        folder: where to; made if need be.
        model, guide: a pair that :func:`vadd_pyro.zoo.build` built.
        configuration: ``data``, ``vocab_size``, and the arguments of :func:`vadd_pyro.zoo.build`;
            further plain values are kept with them.

    Returns:
        The file.

    Raises:
        ValueError: for a configuration that lacks one of these.
    """
    missing = [name for name in _PARTS if name not in configuration]
    if missing:
        raise ValueError(f"configuration lacks {', '.join(missing)}: got {sorted(configuration)}")
    path = Path(folder) / FILE
    content = {
        "configuration": configuration,
        "model": state_of(model),
        "guide": state_of(guide),
    }
    save_checkpoint(path, content)
    return path


def state_of(program: Any) -> dict[str, Any]:
    """Weights of all modules of a program by name."""
    return {
        f"{i}.{name}": value
        for i, module in enumerate(modules_of(program))
        for name, value in module.state_dict().items()
    }


def restore(program: Any, state: dict[str, Any], path: Path, what: str) -> None:
    """Give a program the weights that :func:`state_of` gave.

    Raises:
        ValueError: naming the file they are from, if they do not fit.
    """
    for i, module in enumerate(modules_of(program)):
        prefix = f"{i}."
        own = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            raise ValueError(f"{path}: the weights do not fit the {what}: {error}") from error


def find_runs(folder: str | Path) -> list[Path]:
    """The run folders at or below a folder, in order.

    Raises:
        FileNotFoundError: if there is none.
    """
    folder = Path(folder)
    if folder.is_file():
        folder = folder.parent
    found = sorted(path.parent for path in folder.rglob(FILE)) if folder.is_dir() else []
    if not found:
        raise FileNotFoundError(
            f"no {FILE} in {folder} or below: expected a folder that vadd-pyro demo, compare or "
            "train wrote"
        )
    return found


def load_run(folder: str | Path) -> Run:
    """Build the pair of a run folder and give it its weights.

    Raises:
        FileNotFoundError: if there is no run in the folder.
        ValueError: naming the file, if it is damaged or of another kind.
    """
    path = Path(folder) / FILE
    content = load_checkpoint(path)
    parts = [content.get(name) for name in ("configuration", "model", "guide")]
    whole = all(isinstance(part, dict) for part in parts)
    configuration = content["configuration"] if whole else {}
    if any(name not in configuration for name in _PARTS):
        raise ValueError(f"{path} is a checkpoint, but no run: expected one written by save_run")
    sizes = {name: configuration[name] for name in ("latent_dim", "num_codes", "hidden_dim")}
    try:
        density = data.named(configuration["data"], configuration["vocab_size"])
        process = density.process()
        with torch.random.fork_rng():
            pair = zoo.build(configuration["prior"], configuration["guide"], process, **sizes)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: its pair cannot be built: {error}") from error
    restore(pair.model, content["model"], path, "model")
    restore(pair.guide, content["guide"], path, "guide")
    return Run(configuration, pair.model, pair.guide, process, density)


def inspect_run(
    folder: str | Path, out: str | Path | None = None, *, num_rows: int = 1000, **options: Any
) -> str:
    """Inspect the pair of a run folder on fresh rows of its data.

    Args:
        folder: the run.
        out: where the report goes; by default the folder ``inspection`` in the run.
        num_rows: rows of data.
        options: of :func:`vadd_pyro.inspection.inspect_pair`.

    Returns:
        The verdicts as text, and where the report is.
    """
    run = load_run(folder)
    out = Path(folder) / "inspection" if out is None else Path(out)
    seed = options.get("seed", 0)
    x_0 = run.density.sample(num_rows, seed=20_000 + seed)
    verdicts = inspect_pair(
        run.model,
        run.guide,
        run.process,
        x_0,
        out,
        title=run.title,
        truth=run.density.probabilities,
        **options,
    )
    return told(run.title, verdicts, out)


def told(title: str, verdicts: Mapping[str, Verdict], out: Path) -> str:
    """What an inspection prints: the verdicts, and where the report is."""
    lines = [f"  {question} {verdict.text}" for question, verdict in verdicts.items()]
    return "\n".join([f"{title}:", *lines, f"wrote {out / 'report.html'}"])
