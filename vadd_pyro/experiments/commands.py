"""What ``vadd-pyro train``, ``evaluate``, ``sample`` and ``infill`` do."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vadd_pyro.checkpoints import check_writable, read_json, write_json
from vadd_pyro.data import DataSet
from vadd_pyro.data.text import TextData
from vadd_pyro.distributed import Processes, joined
from vadd_pyro.experiments import drawing, report
from vadd_pyro.experiments.evaluation import Judge, evaluate, searched
from vadd_pyro.experiments.settings import Settings
from vadd_pyro.experiments.store import (
    Experiment,
    check_folder,
    data_of,
    load,
    load_data,
)
from vadd_pyro.experiments.training import train
from vadd_pyro.inspection import inspect_pair
from vadd_pyro.locks import locked_folder
from vadd_pyro.names import TIME_GRIDS
from vadd_pyro.runs import FILE, find_runs, told

__all__ = ["run_evaluate", "run_infill", "run_inspect", "run_sample", "run_train"]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run_train(
    settings: Sequence[Settings],
    out: str | Path,
    num_seeds: int = 1,
    *,
    measure: dict[str, Any] | None = None,
    checkpoint_every: int = 250,
    accumulate: int = 1,
    device: str | None = None,
    progress: bool = True,
) -> list[Path]:
    """Train each of some settings from several seeds, and measure them if asked to.

    Processes that ``torchrun`` has started train together; the first of them measures, when all is
    trained.

    Args:
        settings: one for each model, all of the same data.
        out: the run folder; where there are several runs, ``out/<model>/seed<n>``.
        num_seeds: seeds, counted from that of the settings.
        measure: as ``options`` of :func:`run_evaluate`, None not to measure.
        checkpoint_every: updates between two checkpoints.
        accumulate: into how many parts each process divides its rows of a batch.
        device: where to compute.
        progress: whether to show bars.

    Returns:
        The run folders.
    """
    out = Path(out)
    plan = [
        replace(one, seed=one.seed + number) for number in range(num_seeds) for one in settings
    ]
    alone = len(plan) == 1
    folders = [out if alone else out / one.model / f"seed{one.seed}" for one in plan]
    judge = None
    if measure is not None:
        _kinds(measure)
    results: list[dict[str, Any]] = []
    waiting: list[tuple[Experiment, Path]] = []
    with joined(device or "cpu") as device:
        processes = Processes.current()
        with processes.together():
            if processes.first:
                check_writable(out / report.FILES["equal"])
                for one, folder in zip(plan, folders, strict=True):
                    check_folder(one, folder)  # before the first of them is trained
        if measure is not None and processes.alone:
            judge = _judge(plan[0], measure)
        for one, folder in zip(plan, folders, strict=True):
            if processes.first:
                _say(f"{one.data}, {one.title}, seed {one.seed}: {folder}")
            run = train(
                one,
                folder,
                checkpoint_every=checkpoint_every,
                accumulate=accumulate,
                device=device,
                progress=progress,
            )
            if processes.first:
                minutes = sum(run.seconds.values()) / 60
                _say(f"trained for {minutes:.1f} minutes; wrote {folder / 'run.pt'}")
                if line := report.latents(folder):
                    _say(line)
            if measure is not None and processes.alone:
                results += _measure(run, folder, measure, judge, progress)
            elif measure is not None and processes.first:
                waiting.append((run, folder))  # the others are not to wait for it
    if measure is not None and processes.first:
        if waiting:
            judge = _judge(plan[0], measure)
        for run, folder in waiting:
            results += _measure(run, folder, measure, judge, progress)
        print(report.write_report(out, report.check_together(results)))
        _say(f"wrote {out / 'summary.md'} and {out / 'quality.png'}")
    return folders


def _judge(settings: Settings, options: dict[str, Any]) -> Judge | None:
    """Who measures samples, if any are."""
    return _judge_of(load_data(settings), options) if options["sample_steps"] else None


def _judge_of(data: DataSet, options: dict[str, Any]) -> Judge:
    judge = Judge(data, options["num_samples"], options["seed"])
    for metric, why in judge.left_out.items():
        _say(f"{metric} is not measured: {why}")
    return judge


def _kinds(options: dict[str, Any]) -> list[str]:
    """Kinds of time grids that are asked for.

    Raises:
        ValueError: for others than those known.
    """
    asked = options.get("time_grids", "equal")
    asked = [asked] if isinstance(asked, str) else list(asked)
    if not asked or not set(asked) <= set(TIME_GRIDS):
        raise ValueError(f"time_grids must be some of {', '.join(TIME_GRIDS)}, got {asked}")
    return [kind for kind in TIME_GRIDS if kind in asked]


def _measure(
    run: Experiment,
    folder: Path,
    options: dict[str, Any],
    judge: Judge | None,
    progress: bool,
) -> list[dict[str, Any]]:
    """Measure a run on each kind of time grids, keeping each result; what is known of these very
    weights is not repeated.
    """
    with locked_folder(folder):
        weights = f"crc32 {zlib.crc32((folder / 'run.pt').read_bytes()):08x}"
        same = {"fingerprint": run.data.fingerprint, "weights": weights}
        return [
            _measure_alone(run, folder, same, {**options, "time_grids": kind}, judge, progress)
            for kind in _kinds(options)
        ]


def _measure_alone(
    run: Experiment,
    folder: Path,
    same: dict[str, str],
    options: dict[str, Any],
    judge: Judge | None,
    progress: bool,
) -> dict[str, Any]:
    """The same on one kind; results belong to the data and weights that ``same`` tells."""

    def read(kind: str) -> dict[str, Any]:
        path = folder / report.FILES[kind]
        known = read_json(path) if path.exists() else {}
        return known if all(known.get(name) == value for name, value in same.items()) else {}

    kind = options["time_grids"]
    path, stored = folder / report.FILES[kind], read(kind)
    known = stored
    if kind == "best":  # where there is but one grid, what is known of equal steps serves
        other = read("equal")
        for name in ("bounds", "quality"):
            own = {row["num_steps"] for row in known.get(name, [])}
            new = (row for row in other.get(name, []) if row["num_steps"] not in own)
            more = [row for row in new if not searched(row["num_steps"])]
            if more:
                known = {**known, name: [*known.get(name, []), *more]}
    measured: list[dict[str, Any]] = []

    def keep(found: dict[str, Any]) -> None:
        measured.append(write_json(path, {**found, **same}))

    result = evaluate(run, judge=judge, known=known, keep=keep, progress=progress, **options)
    return {**result, **same} if stored and not measured else write_json(path, {**result, **same})


def run_evaluate(
    folders: Sequence[str | Path],
    out: str | Path | None,
    options: dict[str, Any],
    *,
    path: str | None = None,
    device: str | None = None,
    progress: bool = True,
) -> str:
    """Measure all runs in folders and below them; write one report for all.

    Args:
        folders: run folders, or folders of them.
        out: where the report goes; by default the first folder.
        options: of :func:`~vadd_pyro.experiments.evaluation.evaluate`, but ``time_grids`` may
            be several kinds.
        path: where the data are now, if they have moved.
        device: where to compute.
        progress: whether to show bars.

    Returns:
        The tables.

    Raises:
        ValueError: if the runs are of different data, before anything is measured.
    """
    places = dict.fromkeys(run.resolve() for folder in folders for run in find_runs(folder))
    out = Path(folders[0]) if out is None else Path(out)
    _kinds(options)
    check_writable(out / "summary.md")
    report.check_same_data(
        (found["name"], found["length"], found["fingerprint"]) for found in map(data_of, places)
    )
    judge: Judge | None = None
    results = []
    for place in places:
        check_writable(place / report.FILES["equal"])
        run = load(place, path, device=device)
        _say(f"{run.title}: {place}")
        if options["sample_steps"] and judge is None:
            judge = _judge_of(run.data, options)
        results += _measure(run, place, options, judge, progress)
    text = report.write_report(out, report.check_together(results))
    _say(f"wrote {out / 'summary.md'} and {out / 'quality.png'}")
    return text


def run_sample(
    folder: str | Path,
    out: str | Path | None,
    num_samples: int,
    num_steps: Sequence[int],
    *,
    path: str | None = None,
    device: str | None = None,
    **options: Any,
) -> str:
    """Draw samples: a sheet of pictures, or text or rows that are printed and written.

    Returns:
        What to print.
    """
    folder = _only_run(folder)
    run = load(folder, path, device=device)
    out = folder if out is None else Path(out)
    check_writable(out / "samples.png")
    drawn = drawing.draw(run, num_samples, num_steps, **options)
    lines = []
    if run.data.shape is not None:
        groups = [(_steps(steps), rows) for steps, rows in drawn.items()]
        drawing.sheet(run.data, groups, out / "samples.png", run.title)
        lines.append(f"wrote {out / 'samples.png'}")
    for steps, rows in drawn.items():
        name = out / f"samples_{steps}.{_suffix(run)}"
        drawing.write_rows(run.data, rows, name)
        if isinstance(run.data, TextData):
            lines += [f"{_steps(steps)}:", *(f"  {line!r}" for line in run.data.decode(rows[:4]))]
        lines.append(f"wrote {name}")
    return "\n".join(lines)


def _only_run(folder: str | Path) -> Path:
    """The run folder at or below a folder, where there is but one."""
    if (Path(folder) / FILE).is_file():
        return Path(folder)
    runs = find_runs(folder)
    if len(runs) > 1:
        raise ValueError(
            f"{folder} holds {len(runs)} runs: name one of {', '.join(map(str, runs))}"
        )
    return runs[0]


def _suffix(run: Experiment) -> str:
    return "txt" if isinstance(run.data, TextData) else "csv"


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def run_infill(
    folder: str | Path,
    out: str | Path | None,
    *,
    row: str | None = None,
    area: str = "lower",
    num_rows: int = 4,
    num_completions: int = 8,
    num_steps: int = 16,
    weighted: bool = False,
    num_particles: int = 1024,
    seed: int = 0,
    path: str | None = None,
    device: str | None = None,
) -> str:
    """Complete partly given rows: one that is written out, or test rows with an open area.

    Returns:
        What to print.
    """
    folder = _only_run(folder)
    run = load(folder, path, device=device)
    out = folder if out is None else Path(out)
    check_writable(out / "infill.png")
    data = run.data
    truth: Tensor | None = None
    if row is not None:
        given = drawing.parse_row(data, row)
    else:
        truth = data.rows("test", min(num_rows, len(data.test)), seed)
        given = drawing.partly_given(data, truth, area)
    x, effective = drawing.complete(
        run,
        given,
        num_completions,
        num_steps,
        weighted=weighted,
        num_particles=num_particles,
        seed=seed,
    )
    lines = []
    if data.shape is not None:
        groups = []
        for i, completions in enumerate(x):
            shown = [given[i : i + 1], *([] if truth is None else [truth[i : i + 1]])]
            label = _label(i, effective, truth is not None)
            groups.append((label, torch.cat([*shown, completions])))
        drawing.sheet(data, groups, out / "infill.png", f"{run.title}: {_steps(num_steps)}")
        lines.append(f"wrote {out / 'infill.png'}")
    elif isinstance(data, TextData):
        for i, completions in enumerate(x):
            lines.append(f"given {data.decode(given[i : i + 1])[0]!r}" + _size(i, effective))
            lines += [f"   to {line!r}" for line in data.decode(completions)]
    elif effective is not None:
        lines += [f"row {i + 1}{_size(i, effective)}" for i in range(len(x))]
    name = out / f"infill.{_suffix(run)}"
    drawing.write_rows(data, x.flatten(0, 1), name)
    return "\n".join([*lines, f"wrote {name}"])


def _size(i: int, effective: Tensor | None) -> str:
    return "" if effective is None else f" (effective sample size {float(effective[i]):.0f})"


def _label(i: int, effective: Tensor | None, truth: bool) -> str:
    what = "given, real, drawn" if truth else "given, drawn"
    return what if effective is None else f"{what}\nESS {float(effective[i]):.0f}"


def run_inspect(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    num_rows: int = 1000,
    path: str | None = None,
    **options: Any,
) -> str:
    """Inspect the pair of a run folder on test rows, as :func:`vadd_pyro.runs.inspect_run` does
    for the toys, whose law is known.

    Args:
        folder: the run folder.
        out: where the report goes; by default the folder ``inspection`` in the run.
        num_rows: test rows, all if there are fewer.
        path: where the data are now, if they have moved.
        options: of :func:`vadd_pyro.inspection.inspect_pair`.

    Returns:
        The verdicts as text, and where the report is.
    """
    run = load(folder, path)
    out = Path(folder) / "inspection" if out is None else Path(out)
    x_0 = run.data.rows("test", min(num_rows, len(run.data.test)), options.get("seed", 0))
    verdicts = inspect_pair(
        run.model, run.guide, run.process, x_0, out, title=run.title, **options
    )
    return told(run.title, verdicts, out)
