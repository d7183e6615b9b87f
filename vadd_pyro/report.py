"""What the experiment found: one tidy table, a summary to read, and a figure for each data set.

Everything is made of the ``result.json`` files alone, so a report can be made again at any time.
Means are over seeds, with the standard error of that mean.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vadd_pyro import panels, plotting, zoo
from vadd_pyro.checkpoints import read_json, write_json, write_whole

__all__ = [
    "load_results",
    "write_report",
    "write_tables",
]

AXES = ("data", "prior", "guide", "objective", "times")
COLUMNS = (*AXES, "seed", "num_steps", "latent", "metric", "value")
Results = Mapping[str, Mapping[str, Any]]
Key = tuple[str, str | None, int | None]
_FIRST: Key = ("jensen_shannon", "fresh", 1)


def load_results(folder: str | Path) -> dict[str, dict[str, Any]]:
    """All results in a folder of the experiment, by the name of their cell's folder.

    Raises:
        ValueError: naming a file that is no result.
    """
    results = {}
    for path in sorted(Path(folder).glob("cells/*/result.json")):
        result = read_json(path)
        if not {"cell", "settings"} <= set(result) or not {"measures", "error"} & set(result):
            raise ValueError(f"{path} holds no result of this experiment")
        results[path.parent.name] = result
    return results


def tidy(results: Results) -> list[dict[str, Any]]:
    """One row for every measured number, with the columns :data:`COLUMNS`.

    What does not depend on the number of steps or the kind of latent has None there; a failed
    cell has the one row ``failed``.
    """
    failed = [{"num_steps": None, "latent": None, "metric": "failed", "value": 1}]
    return [
        {**result["cell"], **row}
        for result in results.values()
        for row in result.get("measures", failed)
    ]


def write_tables(folder: str | Path, results: Results) -> None:
    """Write ``results.csv`` and ``results.json``."""
    folder = Path(folder)
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(tidy(results))
    write_whole(folder / "results.csv", lambda file: file.write(text.getvalue().encode()))
    write_json(
        folder / "results.json",
        {
            "settings": next((result["settings"] for result in results.values()), None),
            "cells": [
                {name: value for name, value in result.items() if name not in drop}
                for result in results.values()
                for drop in [("settings", "history")]
            ],
        },
    )


class Variant(NamedTuple):
    """One configuration on one data set, over all its seeds.

    Args:
        names: prior, guide, objective, times.
        values: the values of each measure, one a seed.
    """

    names: tuple[str, ...]
    values: dict[Key, list[float]]

    def mean(self, key: Key) -> float:
        """Mean over seeds; nan where the measure is missing."""
        return statistics.fmean(self.values[key]) if self.values.get(key) else math.nan

    def rank(self) -> float:
        """What variants are ordered by: the distance at one step."""
        mean = self.mean(_FIRST)
        return mean if math.isfinite(mean) else math.inf


def gather(results: Results) -> dict[str, list[Variant]]:
    """Variants by data set, the best at one step first."""
    found: dict[str, dict[tuple[str, ...], Variant]] = {}
    for row in tidy(results):
        if row["metric"] != "failed":
            names = tuple(row[axis] for axis in AXES[1:])
            variants = found.setdefault(row["data"], {})
            values = variants.setdefault(names, Variant(names, {})).values
            key = (row["metric"], row["latent"], row["num_steps"])
            values.setdefault(key, []).append(float(row["value"]))
    return {name: sorted(v.values(), key=Variant.rank) for name, v in found.items()}


def labels(results: Results) -> dict[tuple[str, ...], str]:
    """A name to read for each configuration: what varies between them, in words."""
    configurations = list(
        dict.fromkeys(tuple(r["cell"][axis] for axis in AXES[1:]) for r in results.values())
    )
    words = (zoo.PRIORS, zoo.GUIDES, zoo.OBJECTIVES, zoo.TIMES)
    varying = [i for i in range(4) if len({names[i] for names in configurations}) > 1] or [0]

    def word(i: int, name: str) -> str:
        short = name.rpartition(":")[2]
        if name in words[i]:
            return words[i][name]
        others = {n[i] for n in configurations} - {name}
        taken = {c.rpartition(":")[2] for c in others} | {words[i].get(c) for c in others}
        return name if short in taken else short

    return {
        # "auto" says nothing: the guide that goes with the prior.
        names: ", ".join(word(i, names[i]) for i in varying if names[i] != "auto" or i == 0)
        or zoo.GUIDES["auto"]
        for names in configurations
    }


def _number(values: Sequence[float] | None, digits: int) -> str:
    """Mean and standard error; what is the same for all seeds has none."""
    if not values:
        return ""
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(set(values)) > 1 and all(math.isfinite(v) for v in values):
        text += f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"
    return text


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose columns line up, without the columns that are empty."""
    used = [i for i in range(len(header)) if i == 0 or any(row[i] for row in rows)]
    width = {i: max(len(line[i]) for line in [header, *rows]) for i in used}
    lines = [" | ".join(line[i].ljust(width[i]) for i in used) for line in [header, *rows]]
    lines.insert(1, " | ".join("-" * width[i] for i in used))
    return [f"| {line} |" for line in lines]


def _steps(variants: Sequence[Variant]) -> list[int]:
    return sorted({n for v in variants for _, _, n in v.values if n is not None})


_KEY = """\
Mean ± standard error over seeds, the best at one step first. JS and TV: Jensen-Shannon (nats)
and total variation distance of the sampler's exact law to the data's; KL: of the data from the
sampler. Fresh: a latent at every step, as the model defines; shared: one for all steps. Gap:
minus the T-step bound less the entropy of the data (nats), on held-out rows. KL to the prior: of
the guide, nats per row at the end of training, weighted as in the objective; none where the
latent is summed out. KL at start, active units and mutual information between row and latent
(nats): with everything masked, where every sample starts.""".splitlines()


def summary(results: Results) -> str:
    """The results as text to read, in Markdown."""
    names = labels(results)
    lines = ["# Comparison", ""]
    if not results:
        return "\n".join([*lines, "No cell is finished yet.", ""])
    lines += _KEY
    for name, variants in gather(results).items():
        steps = _steps(variants)
        seeds = sorted({r["cell"]["seed"] for r in results.values() if r["cell"]["data"] == name})
        lines += ["", f"## {name}", ""]
        notes = [
            f"entropy {variants[0].mean(('entropy', None, None)):.4f} nats",
            f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}",
        ]
        lines += [f"{'; '.join(notes)}.", ""]

        def rows(
            columns: Sequence[tuple[str, Key, int]], variants: list[Variant] = variants
        ) -> list[str]:
            header = ["model", *[title for title, _, _ in columns], "seeds"]
            body = [
                [
                    names[v.names],
                    *[_number(v.values.get(key), digits) for _, key, digits in columns],
                    str(len(v.values[_FIRST])),
                ]
                for v in variants
            ]
            return _markdown(header, body)

        distances: list[tuple[str, Key, int]] = [
            *[(f"JS, {_of(n)}", ("jensen_shannon", "fresh", n), 4) for n in steps],
            *[(f"TV, {_of(n)}", ("total_variation", "fresh", n), 3) for n in steps[:1]],
            *[(f"on support, {_of(n)}", ("accuracy", "fresh", n), 3) for n in steps[:1]],
        ]
        shared: list[tuple[str, Key, int]] = [
            (f"{title} {latent}, {_of(n)}", (metric, latent, n), 4)
            for metric, title in (("jensen_shannon", "JS"), ("kl_divergence", "KL"))
            for n in steps[1:]
            for latent in ("fresh", "shared")
        ]
        bounds: list[tuple[str, Key, int]] = [
            *[(f"gap, {_of(n)}", ("gap", "fresh", n), 3) for n in steps],
            ("KL to the prior", ("kl", None, None), 2),
            ("KL at start", ("kl_at_start", None, None), 2),
            ("active units", ("active_units", None, None), 1),
            ("information", ("mutual_information", None, None), 2),
            ("parameters", ("num_parameters", None, None), 0),
            ("updates", ("num_iterations", None, None), 0),
            ("training, s", ("train_seconds", None, None), 0),
        ]
        lines += [*rows(distances), "", *rows(bounds)]
        latent = [v for v in variants if ("jensen_shannon", "shared", steps[-1]) in v.values]
        if latent and len(steps) > 1:
            lines += ["", *rows(shared, latent)]
    failed = [result for result in results.values() if "error" in result]
    if failed:
        lines += ["", "## Failed", ""]
        for result in failed:
            error = result["error"]
            what = ", ".join(f"{axis} {value}" for axis, value in result["cell"].items())
            message = " ".join(error["message"].split())
            lines.append(f"- {what}: {error['type']} ({error['stage']}): {message}")
    return "\n".join([*lines, ""])


def _of(num_steps: int) -> str:
    return "1 step" if num_steps == 1 else f"{num_steps} steps"


def write_report(folder: str | Path, results: Results) -> str:
    """Write the tables, ``summary.md`` and ``figures/<data>.png``.

    Args:
        folder: where to.
        results: from :func:`load_results`.

    Returns:
        The summary.
    """
    folder = Path(folder)
    write_tables(folder, results)
    text = summary(results)
    write_whole(folder / "summary.md", lambda file: file.write(text.encode()))
    names = labels(results)
    # A configuration looks the same in all figures; those without a latent are a kind apart.
    order = {prior: place for place, prior in enumerate(zoo.PRIORS)}
    ordered = sorted(names, key=lambda c: order.get(c[0], len(order)))
    styles: dict[tuple[str, ...], int] = {}
    for reference in (True, False):
        same = [c for c in ordered if (c[0] == "none") == reference]
        styles |= {c: place for place, c in enumerate(same)}
    for name, variants in gather(results).items():
        drawn = [
            panels.Series(names[v.names], styles[v.names], v.names[0] == "none", v.values)
            for v in variants
        ]
        figure = panels.compare_series(drawn, title=name)
        path = folder / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        plotting.save_figure(figure, path)
    return text
