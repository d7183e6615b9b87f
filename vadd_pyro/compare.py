"""The experiment: a grid of models trained on data with known laws, resumable and reported.

Every cell of the grid has a folder with a checkpoint while it is trained and a ``result.json``
once it is done. A run that was killed goes on where it stopped, finished cells are not run again,
failed ones are, and a grid may grow. All cells of a folder share their settings.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vadd_pyro import report
from vadd_pyro.cells import Cell, Settings, run_cell
from vadd_pyro.checkpoints import (
    check_writable,
    read_json,
    remove_checkpoint,
    remove_stale,
    write_json,
)
from vadd_pyro.locks import locked_folder
from vadd_pyro.names import check, list_names
from vadd_pyro.process import check_size

__all__ = ["Settings", "grid", "list_names", "report_folder", "run_grid"]

_CHECKPOINTS = ("checkpoint.pt", "guide.pt")


def grid(
    data: Sequence[str],
    priors: Sequence[str],
    guides: Sequence[str] = ("auto",),
    objectives: Sequence[str] = ("delbo",),
    times: Sequence[str] = ("balanced",),
    num_seeds: int = 3,
) -> list[Cell]:
    """All cells, one seed after another: a run cut short has compared everything once.

    Combinations that would be the same come once: ``"none"``, which has no latent, with the guide
    ``"auto"`` alone, and the objective ``"chain"`` with the first of the times.

    Args:
        data: names among :data:`vadd_pyro.data.NAMES`.
        priors, guides, objectives, times: names of :mod:`vadd_pyro.zoo`, import paths
            ``"package.module:Attribute"`` or names of entry points.
        num_seeds: seeds ``0 .. num_seeds - 1``.

    Raises:
        ValueError: for a name that is not known, listing those that are.
    """
    check_size("num_seeds", num_seeds)
    axes = {"priors": priors, "guides": guides, "objectives": objectives, "times": times}
    for kind, names in {"data": data, **axes}.items():
        if not names:
            raise ValueError(f"{kind} is empty: expected at least one name")
        for name in names:
            check(kind, name)
    cells = [
        # A model without latent has one guide, and the chain objective times of its own.
        Cell(
            name,
            prior,
            "auto" if prior == "none" else guide,
            objective,
            times[0] if objective == "chain" else when,
            seed,
        )
        for seed in range(num_seeds)
        for name in data
        for objective in objectives
        for when in times
        for guide in guides
        for prior in priors
    ]
    return list(dict.fromkeys(cells))


def report_folder(out: str | Path) -> str:
    """Write tables and figures of the results at hand, whatever grid they are of.

    Returns:
        The summary.

    Raises:
        ValueError: if the folder holds no results.
    """
    results = report.load_results(out)
    if not results:
        raise ValueError(f"{out} holds no results of the experiment")
    return report.write_report(out, results)


def _check_settings(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse results that were made in another way, by name."""
    differing = [
        f"{name} is {found.get(name)!r} there and {wanted.get(name)!r} here"
        for name in {**wanted, **found}
        if found.get(name) != wanted.get(name)
    ]
    if differing:
        raise ValueError(
            f"{path} is of another configuration: {'; '.join(differing)}. Choose another folder, "
            "or repeat those settings"
        )


def _open(folder: Path, settings: Settings) -> dict[str, dict[str, Any]]:
    """Results in the folder by the name of their cell's folder, all checked."""
    wanted = settings.describe()
    path = folder / "settings.json"
    if path.exists() and any(folder.glob("cells/*/*")):
        _check_settings(path, read_json(path), wanted)
    results = report.load_results(folder)
    for slug, result in results.items():
        place = folder / "cells" / slug / "result.json"
        _check_settings(place, result["settings"], wanted)
        if Cell(**result["cell"]).slug != slug:
            raise ValueError(
                f"{place} is of another configuration: it holds the cell {result['cell']}"
            )
        if "error" not in result:
            _remove_checkpoints(place.parent)  # left over by a run killed at just that moment
    write_json(path, wanted)
    return results


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _time_left(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> str:
    """Estimate from the same cells of other seeds, and for the rest from the mean of all."""
    known: dict[tuple[str, ...], list[float]] = {}
    everything = []
    for result in results.values():
        if "error" not in result:
            axes = {**result["cell"], "seed": ""}
            known.setdefault(tuple(axes.values()), []).append(result["seconds"])
            everything.append(result["seconds"])
    if not everything:
        return "time left unknown"
    total = 0.0
    for cell in cells:
        same = (cell.data, cell.prior, cell.guide, cell.objective, cell.times, "")
        times = known.get(same, everything)
        total += sum(times) / len(times)
    return f"about {_duration(total)} left"


def _outcome(result: Mapping[str, Any]) -> str:
    if "error" in result:
        error = result["error"]
        return f"FAILED ({error['stage']}): {error['type']}: {error['message']}"
    distance = next(
        row["value"]
        for row in result["measures"]
        if (row["metric"], row["latent"], row["num_steps"]) == ("jensen_shannon", "fresh", 1)
    )
    return f"JS {distance:.4f} at one step, {_duration(result['seconds'])}"


def run_grid(
    cells: Sequence[Cell],
    settings: Settings,
    out: str | Path,
    *,
    threads: int | None = None,
    checkpoint_every: int = 250,
    progress: bool = True,
) -> list[Cell]:
    """Run what is not done yet, and report everything in the folder.

    Args:
        cells: the grid.
        settings: what its cells have in common.
        out: folder of the results; made if need be.
        threads: threads of torch; None leaves its own choice.
        checkpoint_every: updates between two checkpoints.
        progress: whether to show a bar for each training run.

    Returns:
        The cells that failed.

    Raises:
        ValueError: if the folder is in use, cannot be written or holds results of another
            configuration, before anything is trained.
        KeyboardInterrupt: after the report of all that was finished.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    folder = Path(out)
    check_writable(folder / "results.csv")
    with locked_folder(folder):
        for inside in (folder, *folder.glob("cells/*")):
            remove_stale(inside)
        results = _open(folder, settings)
        todo = [c for c in cells if "error" in results.get(c.slug, {"error": None})]
        _say(
            f"{len(cells)} cells, {len(cells) - len(todo)} of them done before; results go to "
            f"{folder}"
        )
        try:
            for number, cell in enumerate(todo):
                _run(cell, settings, folder, results, checkpoint_every, progress)
                report.write_tables(folder, results)
                place = len(cells) - len(todo) + number + 1
                left = todo[number + 1 :]
                _say(
                    f"[{place}/{len(cells)}] {cell}: {_outcome(results[cell.slug])}"
                    + (f"; {_time_left(left, results)}" if left else "")
                )
        except KeyboardInterrupt:
            finished = sum(cell.slug in results for cell in cells)
            _say(
                f"\ninterrupted: {finished} of {len(cells)} cells are finished; the same command "
                "goes on where this one stopped"
            )
            print(report.write_report(folder, results))
            raise
        print(report.write_report(folder, results))
    return [cell for cell in cells if "error" in results[cell.slug]]


def _run(
    cell: Cell,
    settings: Settings,
    folder: Path,
    results: dict[str, dict[str, Any]],
    checkpoint_every: int,
    progress: bool,
) -> None:
    """Run one cell and keep its result; a failed one starts afresh the next time."""
    place = folder / "cells" / cell.slug
    result = run_cell(cell, settings, place, checkpoint_every=checkpoint_every, progress=progress)
    results[cell.slug] = write_json(place / "result.json", result)
    _remove_checkpoints(place)


def _remove_checkpoints(place: Path) -> None:
    for name in _CHECKPOINTS:
        remove_checkpoint(place / name)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
