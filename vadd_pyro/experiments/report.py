"""Tables and one figure of what was measured: models side by side, seeds put together.

A value is the mean over seeds; behind it stands the standard error of that mean over seeds where
there are several, and in the table of bounds also the standard error over rows, which all seeds
share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vadd_pyro import plotting
from vadd_pyro.checkpoints import read_json, write_json, write_whole
from vadd_pyro.experiments.drawing import write_figure
from vadd_pyro.experiments.evaluation import QUALITY
from vadd_pyro.inspection.verdicts import USED

__all__ = [
    "FILES",
    "check_same_data",
    "check_together",
    "collect",
    "latents",
    "summary",
    "write_report",
]

FILES = {"equal": "evaluation.json", "best": "evaluation_best.json"}  # by time grids
_ONE_TOKEN = "one token"
_BITS = 1 / math.log(2)


class _Value(NamedTuple):
    """Mean over seeds, its standard error over them (nan for one), and that over rows."""

    mean: float
    seeds: float
    rows: float
    number: int

    def scaled(self, factor: float) -> _Value:
        size = abs(factor)
        return _Value(factor * self.mean, size * self.seeds, size * self.rows, self.number)

    @property
    def stderr(self) -> float:
        return self.rows if math.isnan(self.seeds) else self.seeds


def latents(folder: str | Path) -> str | None:
    """What the latents of a run carried when they were last looked at, in a line, and in another
    what a prior that was fitted to them is; None for a run without latents, or if nobody looked.

    Args:
        folder: of the run; its ``history.json`` is read.
    """
    stages = read_json(Path(folder) / "history.json")
    seen = [stages[name] for name in ("model", "chain") if name in stages]
    seen = [history for history in seen if history["monitor_iteration"]]
    if not seen or not seen[-1]["kl_per_dimension"][-1]:
        return None
    history = seen[-1]
    carried = history["mutual_information"][-1]
    kl = sum(history["kl_per_dimension"][-1])
    if carried is None:
        carried = kl
    units = history["active_units"][-1]
    told = f"{carried:.2f} nats of a row where all is masked, {units} in use"
    if carried >= USED:
        # Estimated from few rows, it is at most the logarithm of their number.
        line = f"its latents tell at least {told} (their KL is {kl:.2f} nats)"
        return line + _refitted(stages["prior"]) if "prior" in stages else line
    return (
        f"its latents have collapsed: they tell {told}, and a model without them would do as "
        "well. Try codes (--prior conditional_categorical, for text conditional_chain), "
        "--set free_bits=0.1, or a longer --set annealing"
    )


def _refitted(found: dict[str, Any]) -> str:
    size, density = max(found["held_out"].items(), key=lambda item: item[1])
    return (
        f"\nits prior is a mixture of {size} normals fitted to them: latents of validation rows "
        f"have a log-density of {density:.2f} nats ({found['before']:.2f} before)"
    )


def collect(folders: Sequence[str | Path]) -> list[dict[str, Any]]:
    """What was measured in folders, and below them, every run once.

    Raises:
        FileNotFoundError: if nothing was.
        ValueError: if the data are not the same everywhere; for a file that is none of ours.
    """
    paths = {
        path.resolve()
        for folder in folders
        for name in FILES.values()
        for path in Path(folder).rglob(name)
    }
    if not paths:
        where = ", ".join(map(str, folders))
        raise FileNotFoundError(f"no {' or '.join(FILES.values())} in {where} or below")
    found = []
    for path in sorted(paths):
        result = read_json(path)
        if not {"title", "settings", "fingerprint", "bounds", "quality"} <= set(result):
            raise ValueError(f"{path} was not written by vadd-pyro evaluate")
        found.append(result)
    return check_together(found)


def check_together(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results that may stand in one table: of the same data, each run once.

    Raises:
        ValueError: if the data are not the same everywhere.
    """
    check_same_data((r["data"], r["length"], r["fingerprint"]) for r in results)
    once = {json.dumps([r.get("time_grids"), r["settings"]], sort_keys=True): r for r in results}
    return list(once.values())


def check_same_data(kinds: Iterable[tuple[str, int, str]]) -> None:
    """Check that runs are of the same data, told by name, length of a row and checksum.

    Raises:
        ValueError: naming the data, if they are not.
    """
    found = sorted(set(kinds))
    if len(found) > 1:
        named = ", ".join(f"{name} ({length} positions, {sum_})" for name, length, sum_ in found)
        raise ValueError(f"the runs are of different data, {named}: report one data set at a time")


def _models(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Results by model, MDM first; models of one title but other settings are told apart."""
    groups: dict[str, list[dict[str, Any]]] = {}
    kinds: dict[str, list[Any]] = {}
    for result in sorted(results, key=lambda r: r["title"] != "MDM"):
        kind = {k: v for k, v in result["settings"].items() if k != "seed"}
        known = kinds.setdefault(result["title"], [])
        if kind not in known:
            known.append(kind)
        number = known.index(kind)
        name = result["title"] + (f" ({number + 1})" if number else "")
        name += ", best time grids" if result.get("time_grids") == "best" else ""
        groups.setdefault(name, []).append(result)
    return groups


def _mean(results: Sequence[dict[str, Any]], kind: str, steps: Any, metric: str | None) -> _Value:
    rows = [
        row
        for result in results
        for row in result[kind]
        if row.get("num_steps") == steps and row.get("metric") == metric
    ]
    values = np.array([float(row["value"]) for row in rows])
    errors = np.array([float(row["stderr"]) for row in rows])
    count = len(values)
    if not count:
        return _Value(math.nan, math.nan, math.nan, 0)
    seeds = values.std(ddof=1) / count**0.5 if count > 1 else math.nan
    return _Value(float(values.mean()), float(seeds), float(errors.mean()), count)


def _steps(results: Sequence[dict[str, Any]], kind: str) -> list[Any]:
    """Numbers of steps, one token a step last."""
    found = {row["num_steps"] for result in results for row in result[kind]}
    return sorted(found, key=lambda s: (s == _ONE_TOKEN, 0 if s == _ONE_TOKEN else s))


def _number(value: _Value, digits: int) -> str:
    if not value.number:
        return ""
    text = f"{value.mean:.{digits}f}"
    return text if math.isnan(value.stderr) else f"{text} ± {value.stderr:.{digits}f}"


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _is_text(results: Sequence[dict[str, Any]]) -> bool:
    return results[0]["settings"]["data"] in ("text", "text8", "hub")


def _scale(results: Sequence[dict[str, Any]]) -> float:
    """Nats of a row to what is reported: these, or of text bits per token, which count down."""
    return -_BITS / results[0]["length"] if _is_text(results) else 1.0


def summary(results: Sequence[dict[str, Any]]) -> str:
    """Tables in Markdown."""
    models = _models(results)
    named = [f"{n} ({len(g)} seeds)" if len(g) > 1 else n for n, g in models.items()]
    lines = [f"# {results[0]['data']}", "", f"Models: {', '.join(named)}."]
    if _steps(results, "bounds"):
        lines += _bound_tables(results, models)
    sample_steps = _steps(results, "quality")
    for metric in _metrics(results):
        floor = _mean(results[:1], "floor", None, metric)
        table = [
            [name, *(_number(_mean(group, "quality", s, metric), 4) for s in sample_steps)]
            for name, group in models.items()
        ]
        real = "test rows" if metric == "ngram_bits" else "training rows"
        lines += ["", f"{_name(metric)} ({real}: {_number(floor, 4)}):", ""]
        lines.append(_table(["model", *(_head(s) for s in sample_steps)], table))
    minutes = [
        f"{name} {np.mean([r['train_seconds'] for r in group]) / 60:.1f}"
        for name, group in models.items()
    ]
    lines += ["", f"Minutes of training: {', '.join(minutes)}."]
    return "\n".join(lines) + "\n"


def _bound_tables(
    results: Sequence[dict[str, Any]], models: dict[str, list[dict[str, Any]]]
) -> list[str]:
    """Bounds at every number of steps, and what few of them cost."""
    steps, scale = _steps(results, "bounds"), _scale(results)
    unit = "bits per token, at most" if _is_text(results) else "nats per row, at least"
    several = any(len(group) > 1 for group in models.values())
    errors = "± over seeds, in brackets over rows" if several else "± over rows"
    lines = ["", f"Bound on log p_T, {unit} ({_taken(results)}; {errors}):", ""]
    table, costs = [], []
    few = [s for s in steps if s != _ONE_TOKEN]
    for name, group in models.items():
        values = [_mean(group, "bounds", s, None).scaled(scale) for s in steps]
        cells = [_number(value, 3) for value in values]
        if len(group) > 1:
            both = zip(cells, values, strict=True)
            cells = [f"{cell} ({v.rows:.3f})" if v.number else cell for cell, v in both]
        table.append([name, *cells])
        if _ONE_TOKEN in steps:
            costs.append([name, *(_cost(group, s, abs(scale)) for s in few)])
    lines.append(_table(["model", *(_head(s) for s in steps)], table))
    if costs:
        cost = unit.split(",")[0]
        lines += ["", f"What few steps cost against one token a step, {cost} (± over rows):", ""]
        lines.append(_table(["model", *(_head(s) for s in few)], costs))
    return lines


def _taken(results: Sequence[dict[str, Any]]) -> str:
    """How bounds were taken."""
    rows = [row for result in results for row in result["bounds"]]
    parts = []
    for name, what in (
        ("split", "{} rows"),
        ("rows", "{} of them"),
        ("num_particles", "{} particles"),
        ("num_paths", "{} paths"),
    ):
        found = sorted({row[name] for row in rows})
        value = str(found[0]) if len(found) == 1 else " or ".join(map(str, found))
        parts.append(what.format(value) if value != "1" else what.format(1).removesuffix("s"))
    return ", ".join(parts)


def _cost(group: Sequence[dict[str, Any]], steps: Any, scale: float) -> str:
    """Mean over rows of what these steps lose, on the rows that both bounds share."""
    pairs = []
    for result in group:
        by_steps = {row["num_steps"]: row["values"] for row in result["bounds"]}
        if steps in by_steps and _ONE_TOKEN in by_steps:
            both = min(len(by_steps[steps]), len(by_steps[_ONE_TOKEN]))
            last, own = by_steps[_ONE_TOKEN][:both], by_steps[steps][:both]
            pairs.append(np.array(last, dtype=float) - np.array(own, dtype=float))
    if not pairs or len({len(pair) for pair in pairs}) > 1:
        return ""
    loss = scale * np.mean(pairs, 0)
    error = loss.std(ddof=1) / len(loss) ** 0.5 if len(loss) > 1 else math.nan
    return f"{loss.mean():.3f} ± {error:.3f}"


def _head(steps: Any) -> str:
    return f"{steps} a step" if steps == _ONE_TOKEN else f"T = {steps}"


def _metrics(results: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["metric"] for r in results for row in r["quality"]))


def _name(metric: str) -> str:
    if metric.startswith("ngram_js_"):
        return f"{metric.removeprefix('ngram_js_')}-gram JS distance, nats"
    return QUALITY[metric]


def _figure(results: Sequence[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    models = _models(results)
    hidden = ("ngram_js_1", "row_entropy", "frechet_unbiased")
    metrics = [m for m in _metrics(results) if m not in hidden]
    steps = [s for s in _steps(results, "bounds") if s != _ONE_TOKEN]
    panels = max(1, bool(steps) + len(metrics))
    columns = min(3, panels)
    rows = -(-panels // columns)
    fig = Figure(figsize=(3.6 * columns, 3.0 * rows + 0.4), dpi=150, layout="constrained")
    axes = list(fig.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[panels:]:
        ax.set_visible(False)
    if steps:
        scale = _scale(results)
        curves = {
            name: _curve([_mean(group, "bounds", s, None) for s in steps], steps, scale)
            for name, group in models.items()
        }
        levels = {}
        best = [_mean(group, "bounds", _ONE_TOKEN, None) for group in models.values()]
        for name, value in zip(models, best, strict=True):
            if value.number:
                levels[f"{name}, one token a step"] = scale * value.mean
        plotting.curves_by_steps(
            curves,
            axes.pop(0),
            title="T-step bound on the likelihood",
            ylabel="at least, nats per row" if scale > 0 else "at most, bits per token",
            levels=levels,
        )
    for metric in metrics:
        sample_steps = _steps(results, "quality")
        curves = {
            name: _curve(
                [_mean(group, "quality", s, metric) for s in sample_steps], sample_steps, 1.0
            )
            for name, group in models.items()
        }
        floor = _mean(results[:1], "floor", None, metric)
        plotting.curves_by_steps(
            curves,
            axes.pop(0),
            title=_name(metric).split(",")[0],
            ylabel=_unit(metric),
            levels={"real rows": floor.mean} if floor.number else None,
            log=metric == "frechet" or metric.startswith("ngram_js"),
        )
    fig.suptitle(results[0]["data"], fontsize=11)
    return fig


def _unit(metric: str) -> str:
    if metric.startswith("ngram_js"):
        return "nats"
    return {
        "frechet": "Fréchet distance",
        "two_sample": "held-out accuracy (1/2: alike)",
        "ngram_bits": "bits per token",
        "entropy": "bits",
    }[metric]


def _curve(values: Sequence[_Value], steps: Sequence[int], scale: float) -> plotting.Curve:
    present = [(s, v) for s, v in zip(steps, values, strict=True) if v.number]
    return plotting.Curve(
        [s for s, _ in present],
        [scale * v.mean for _, v in present],
        [abs(scale) * v.stderr for _, v in present],
    )


def write_report(folder: str | Path, results: Sequence[dict[str, Any]]) -> str:
    """Write ``summary.md``, ``results.json`` and ``quality.png``; returns the summary."""
    folder = Path(folder)
    text = summary(results)
    write_whole(folder / "summary.md", lambda file: file.write(text.encode()))
    short = [
        {**r, "bounds": [{k: v for k, v in b.items() if k != "values"} for b in r["bounds"]]}
        for r in results
    ]
    write_json(folder / "results.json", {"results": short})
    if any(result["bounds"] or result["quality"] for result in results):
        write_figure(_figure(results), folder / "quality.png")
    return text
