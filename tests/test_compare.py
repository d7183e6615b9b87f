"""The experiment: every cell once, whatever happens in between, and tables that say what is so."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vadd_pyro import cells, cli, compare, panels, report, zoo
from vadd_pyro.cells import Cell, Settings
from vadd_pyro.checkpoints import load_checkpoint, read_json, write_json
from vadd_pyro.data import named

SMALL = (
    *("--vocab-size", "8", "--num-held-out", "50"),
    *("--no-progress", "--threads", "1"),
)
QUICK = (*SMALL, "--num-iterations", "4")
OWN_PRIOR = '''
import torch
import pyro.distributions as dist


class Wide(torch.nn.Module):
    """A normal law with a width to learn."""

    latent_dim = 2

    def __init__(self):
        super().__init__()
        self.width = torch.nn.Parameter(torch.ones(2))

    def forward(self, batch):
        if BROKEN and len(batch) > 200:
            raise RuntimeError("the prior gave up")
        return dist.Normal(torch.zeros(2), self.width.exp()).to_event(1).expand([len(batch)])


BROKEN = True
'''


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "vadd_pyro", "compare", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def compare_here(*arguments: object) -> int:
    return cli.main(["compare", *map(str, arguments)])


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def measures(folder: Path) -> dict[str, list]:
    """What was measured in each cell, without the times it took."""
    return {
        slug: [m for m in result["measures"] if m["metric"] != "train_seconds"]
        for slug, result in report.load_results(folder).items()
    }


def test_a_grid_end_to_end_with_a_prior_of_ones_own_that_fails_at_first(tmp_path):
    """First with a prior that fails, then mended and with one more seed."""
    (tmp_path / "mine.py").write_text(OWN_PRIOR)
    grid = ("--data", "moons", "--priors", "none,mine:Wide", *QUICK, "--out", "zoo")
    options = dict(cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    first = subprocess.run(command(*grid, "--seeds", 1), **options)
    assert first.returncode == 1, first.stderr
    assert "1 of 2 cells failed" in first.stderr
    assert "[2/2] moons, mine:Wide, guide auto" in first.stderr
    assert "FAILED (train): RuntimeError: the prior gave up" in first.stderr
    out = tmp_path / "zoo"
    results = report.load_results(out)
    assert len(results) == 2
    (failed,) = [r for r in results.values() if "error" in r]
    assert failed["cell"]["prior"] == "mine:Wide"
    assert failed["error"]["message"] == "the prior gave up"
    assert 'raise RuntimeError("the prior gave up")' in failed["error"]["traceback"]
    summary = (out / "summary.md").read_text()
    assert summary in first.stdout
    assert "| MDM (no latent) |" in summary
    assert "prior mine:Wide" in summary.split("## Failed")[1]
    assert [r["metric"] for r in rows_of(out) if r["prior"] == "mine:Wide"] == ["failed"]

    (tmp_path / "mine.py").write_text(OWN_PRIOR.replace("BROKEN = True", "BROKEN = False"))
    before = {slug: json.dumps(r) for slug, r in results.items() if "error" not in r}
    second = subprocess.run(command(*grid, "--seeds", 2), **options)
    assert second.returncode == 0, second.stderr
    assert "4 cells, 1 of them done before" in second.stderr
    results = report.load_results(out)
    assert len(results) == 4
    assert "| Wide " in (out / "summary.md").read_text()
    assert before == {slug: json.dumps(results[slug]) for slug in before}  # not run again
    # Checkpoints are gone; the trained pairs stay, to be inspected.
    assert {path.name for path in out.glob("cells/*/*.pt")} == {"run.pt"}
    assert (out / "figures" / "moons.png").read_bytes().startswith(b"\x89PNG")
    check_tidy(out)


def check_tidy(out: Path) -> None:
    """One number per row, none of them twice, and the JSON says the same as the CSV."""
    rows = rows_of(out)
    columns = "data,prior,guide,objective,times,seed,num_steps,latent,metric,value"
    assert (out / "results.csv").read_text().splitlines()[0] == columns
    keys = [tuple(row[name] for name in columns.split(",")[:-1]) for row in rows]
    assert len(set(keys)) == len(keys) > 100
    values = {key: float(row["value"]) for key, row in zip(keys, rows, strict=True)}
    assert {key[5] for key in keys} == {"0", "1"}
    held = json.loads((out / "results.json").read_text())
    for result in held["cells"]:
        for m in result["measures"]:
            axes = [str(v) for v in result["cell"].values()]
            where = ["" if m[k] is None else str(m[k]) for k in ("num_steps", "latent", "metric")]
            assert values.pop((*axes, *where)) == pytest.approx(float(m["value"]))
    assert not values


def test_what_is_measured_agrees_with_itself(tmp_path):
    """Bounds below the exact value, distances in range, shared latents no matter at one step."""
    settings = Settings(num_iterations=30, vocab_size=8, num_held_out=300)
    for prior, data in (
        ("standard_normal", "circles"),
        ("categorical", "circles"),
        ("none", "d1"),
    ):
        cell = Cell(data, prior, "auto", "delbo", "balanced", 0)
        result = cells.run_cell(cell, settings, tmp_path / prior, progress=False)
        assert "error" not in result, result
        found = {
            (m["metric"], m["latent"], m["num_steps"]): m["value"] for m in result["measures"]
        }
        density = named(data, 8)
        held_out = density.sample(300, seed=10_000)
        log_truth = float(density.probabilities[tuple(held_out.T)].log().mean())
        for num_steps in cells.STEPS:
            bound, error, gap, truth = (
                found[name, "fresh", num_steps]
                for name in ("bound", "bound_stderr", "gap", "log_likelihood")
            )
            # The bound's rows are those of the exact value: only reveal paths are noise here.
            assert bound <= truth + 0.02
            assert gap == pytest.approx(log_truth - bound, abs=1e-5)
            assert error == pytest.approx(0.0, abs=0.2)
            for name, most in (("total_variation", 1), ("jensen_shannon", 0.6932)):
                assert 0 < found[name, "fresh", num_steps] < most
            assert ("accuracy", "fresh", num_steps) in found or data == "circles"
        shared = [key for key in found if key[1] == "shared"]
        assert bool(shared) == (prior != "none")
        if shared:
            apart = found["total_variation", "shared", 1] - found["total_variation", "fresh", 1]
            assert abs(apart) < 1e-9
            assert found["total_variation", "shared", 4] != found["total_variation", "fresh", 4]
        assert ("kl", None, None) in found or prior != "standard_normal"
        assert found["num_iterations", None, None] == 30
        assert (tmp_path / prior / "guide.pt").exists() == (prior == "standard_normal")


def test_a_run_killed_in_both_of_its_trainings_ends_as_one_that_was_not(tmp_path):
    grid = ("--data", "moons", "--priors", "standard_normal", "--seeds", 1, *SMALL)
    grid = (*grid, "--num-iterations", 600, "--checkpoint-every", 30)
    assert compare_here(*grid, "--out", tmp_path / "whole") == 0
    out = tmp_path / "killed"
    (slug,) = measures(tmp_path / "whole")
    for name, total in (("checkpoint.pt", 600), ("guide.pt", 120)):
        process = subprocess.Popen(
            command(*grid, "--out", out), env=environment(), stdout=subprocess.DEVNULL
        )
        place = out / "cells" / slug
        deadline = time.monotonic() + 120
        while not (place / name).exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (place / "result.json").exists()
        reached = load_checkpoint(place / name)["iteration"]
        assert 0 < reached < total
    assert compare_here(*grid, "--out", out) == 0
    assert measures(out) == measures(tmp_path / "whole")
    histories = [
        report.load_results(folder)[slug]["history"] for folder in (out, tmp_path / "whole")
    ]
    for history in histories:
        del history["seconds"]
    assert histories[0] == histories[1]


def test_results_of_another_configuration_are_refused_by_name(tmp_path, capsys):
    grid = ("--data", "moons", "--priors", "none", "--seeds", 1, *QUICK, "--out", tmp_path)
    assert compare_here(*grid) == 0
    before = (tmp_path / "results.csv").read_text()
    capsys.readouterr()
    assert compare_here(*grid, "--priors", "categorical", "--learning-rate", 0.5) == 1
    message = capsys.readouterr().err
    assert "learning_rate is 0.002 there and 0.5 here" in message
    assert "batch_size" not in message
    assert (tmp_path / "results.csv").read_text() == before
    # A cell brought in from elsewhere, of another run and of another name.
    (place,) = tmp_path.glob("cells/*/result.json")
    content = read_json(place)
    content["settings"]["torch"] = "0.1"
    write_json(place, content)
    assert compare_here(*grid) == 1
    assert "torch is '0.1' there" in capsys.readouterr().err
    content["settings"]["torch"] = torch.__version__
    write_json(place, content)
    place.parent.rename(place.parent.with_name("another"))
    assert compare_here(*grid) == 1
    assert "another/result.json is of another configuration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (("--data", "moons,board"), ("checkerboard", "tied_bits", "'board'")),
        (("--priors", "none,normale"), ("standard_normal", "'normale'")),
        (("--guides", "wrong"), ("mean_field", "'wrong'")),
        (("--objectives", "wrong"), ("delbo", "'wrong'")),
        (("--times", "wrong"), ("balanced", "'wrong'")),
        (("--priors", "no_such_package.mine:Prior"), ("no_such_package",)),
        (("--vocab-size", "2000"), ("3..1000", "2000")),
    ],
)
def test_bad_names_are_told_before_anything_is_done(arguments, messages, tmp_path, capsys):
    with pytest.raises(SystemExit) as status:
        compare_here(*arguments, "--out", tmp_path / "zoo")
    assert status.value.code == 2
    told = capsys.readouterr().err
    assert all(message in told for message in messages)
    assert not (tmp_path / "zoo").exists()


def test_one_process_to_a_folder_and_no_lock_outlives_its_own(tmp_path, capsys):
    grid = ("--data", "moons", "--priors", "none", "--seeds", 1, *QUICK, "--out", tmp_path)
    with open(tmp_path / ".lock", "w") as held:
        held.write("4711\n")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        assert compare_here(*grid) == 1
        assert f"process 4711 is at work in {tmp_path}" in capsys.readouterr().err
        assert not (tmp_path / "cells").exists()
    # Its process is gone, though its number still stands in the file.
    assert (tmp_path / ".lock").read_text() == "4711\n"
    assert compare_here(*grid) == 0


def test_an_interrupted_run_reports_what_it_has(tmp_path, capsys, monkeypatch):
    run_cell = compare.run_cell

    def interrupted(cell, *args, **options):
        if cell.prior == "categorical":
            raise KeyboardInterrupt
        return run_cell(cell, *args, **options)

    monkeypatch.setattr(compare, "run_cell", interrupted)
    grid = ("--data", "moons", "--priors", "none,categorical", "--seeds", 1, *QUICK)
    assert compare_here(*grid, "--out", tmp_path) == 130
    told = capsys.readouterr()
    assert "interrupted: 1 of 2 cells are finished" in told.err
    assert "MDM (no latent)" in told.out
    assert (tmp_path / "figures" / "moons.png").exists()
    os.remove(tmp_path / "figures" / "moons.png")
    assert compare_here("--report-only", "--out", tmp_path) == 0
    assert capsys.readouterr().out == told.out
    assert (tmp_path / "figures" / "moons.png").exists()
    assert compare_here("--report-only", "--out", tmp_path / "figures") == 1
    assert "holds no results" in capsys.readouterr().err


def made_up(cell: Cell, **values: float) -> dict:
    """A result as of a run."""
    rows = [
        {"num_steps": n, "latent": "fresh", "metric": name, "value": value / n}
        for name, value in values.items()
        for n in cells.STEPS
    ]
    return {"cell": cell.__dict__, "settings": Settings().describe(), "measures": rows}


def test_the_summary_has_means_with_their_standard_errors_the_best_first(tmp_path):
    base = Cell("moons", "none", "auto", "delbo", "balanced", 0)
    js = {"none": [0.30, 0.34, 0.38], "flow": [0.1, 0.2, 0.4], "vamp": [0.2]}
    results = {}
    for prior, values in js.items():
        for seed, value in enumerate(values):
            cell = replace(base, prior=prior, seed=seed)
            results[cell.slug] = made_up(cell, jensen_shannon=value, gap=2 * value)
    text = report.write_report(tmp_path, results)
    table = [line for line in text.splitlines() if line.startswith("|")]
    ranked = [line.split("|")[1].strip() for line in table[2:5]]
    assert ranked == [zoo.PRIORS[p] for p in ("vamp", "flow", "none")]
    error = statistics.stdev(js["flow"]) / 3**0.5
    assert f"{statistics.fmean(js['flow']):.4f} ± {error:.4f}" in table[3]
    assert "0.2000 " in table[2]
    assert "±" not in table[2]


def test_labels_name_what_varies():
    base = Cell("moons", "flow", "auto", "delbo", "balanced", 0)

    def labelled(*variants: Cell) -> list[str]:
        return list(report.labels({c.slug: made_up(c) for c in variants}).values())

    assert labelled(base, replace(base, seed=1)) == [zoo.PRIORS["flow"]]
    changed = replace(base, objective="chain")
    assert labelled(base, changed) == [zoo.OBJECTIVES["delbo"], zoo.OBJECTIVES["chain"]]
    both = replace(base, prior="a.b:Mine", times="uniform")
    assert labelled(base, both)[1] == f"Mine, {zoo.TIMES['uniform']}"
    same = [replace(base, prior=f"{package}:Mine") for package in "ab"]
    assert labelled(*same) == ["a:Mine", "b:Mine"]


def test_every_cell_has_a_folder_of_its_own():
    base = Cell("moons", "a.b:C", "auto", "delbo", "balanced", 0)
    others = [
        replace(base, prior="a.b-C"),
        replace(base, prior="a.b/C"),
        replace(base, prior="a.b", guide="C__auto"),
        replace(base, prior="a.b__C"),
        replace(base, seed=1),
        replace(base, prior="x" * 300),
        replace(base, prior="x" * 301),
    ]
    slugs = [cell.slug for cell in (base, *others)]
    assert len(set(slugs)) == len(slugs)
    assert all(len(slug) < 200 and "/" not in slug for slug in slugs)


@pytest.mark.parametrize("number", [1, 4, 15])
def test_figures_hold_any_number_of_models(number, tmp_path):
    generator = torch.Generator().manual_seed(number)
    series = []
    for i in range(number):
        level = float(torch.rand((), generator=generator)) * 10.0 ** -(i % 3)
        values = {
            (metric, latent, n): [level / n, level / n * 1.1, float("inf")]
            for metric, latent in (
                ("jensen_shannon", "fresh"),
                ("jensen_shannon", "shared"),
                ("gap", "fresh"),
            )
            for n in cells.STEPS
        }
        values["train_seconds", None, None] = [1.0]
        series.append(panels.Series(f"model {i}", i, i == 0, values))
    figure = panels.compare_series(series, title="anything")
    texts = {text.get_text() for ax in figure.axes for text in ax.texts}
    assert {f"model {i}" for i in range(number)} <= texts
    assert len(figure.axes) == 3 + 2
    looks = [
        (line.get_color(), line.get_marker(), line.get_markerfacecolor(), line.get_linestyle())
        for line in figure.axes[0].get_lines()
    ]
    assert len(set(looks)) == number
    figure.savefig(tmp_path / "figure.png")
    heights = panels._apart([0.3, 0.31, 0.9, 0.3], 0.05)
    assert sorted(heights) == [heights[i] for i in (0, 3, 1, 2)]
    assert min(b - a for a, b in zip(sorted(heights), sorted(heights)[1:], strict=False)) > 0.0499


def test_time_left_is_that_of_the_same_model_or_the_mean_of_all():
    base = Cell("moons", "none", "auto", "delbo", "balanced", 0)
    slow = replace(base, prior="flow")
    results = {
        cell.slug: {**made_up(cell), "seconds": seconds}
        for cell, seconds in ((base, 60.0), (slow, 3600.0))
    }
    left = [replace(slow, seed=1), replace(slow, seed=2), replace(base, seed=1)]
    assert compare._time_left(left, results) == "about 2 h 1 min left"
    assert compare._time_left([replace(base, prior="vamp")], results) == "about 30 min left"
    assert compare._time_left(left, {}) == "time left unknown"


def test_the_prior_of_the_docs_becomes_a_row_in_twenty_lines(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "zoo.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(code.strip().splitlines()) <= 20
    (tmp_path / "mine.py").write_text(code)
    own = page[page.index("## Your own") : page.index("## What was found")]
    lines = re.findall(r"^    vadd-pyro compare (.*)$", own, re.M)
    assert len(lines) == 2
    for line in lines:
        arguments = line.replace("standard_normal,flow,categorical", "standard_normal").split()
        result = subprocess.run(
            command(*arguments, *QUICK, "--seeds", 1),
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
    summary = (tmp_path / "runs/zoo/summary.md").read_text()
    for name in ("| N(0, I) ", "| skewed, Skewed "):
        assert any(line.startswith(name) for line in summary.splitlines())
