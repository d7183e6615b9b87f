"""The command, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vadd_pyro import cli
from vadd_pyro.runs import load_run

ROOT = Path(__file__).parents[1]


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, **options
    )


def test_the_demo_prints_a_table_and_writes_results_and_a_figure(tmp_path):
    out = tmp_path / "a" / "demo"
    result = run(
        *("-m", "vadd_pyro", "demo", "--data", "eight_modes", "--num-iterations", "20"),
        *("--priors", "none,standard_normal,categorical", "--seed", "3", "--out", str(out)),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "MDM (no latent)" in result.stdout
    assert "VADD, codes" in result.stdout
    assert "20/20" in result.stderr  # progress
    results = json.loads((out / "results.json").read_text())
    assert results["seed"] == 3
    assert len(results["rows"]) == 3 * 4
    for row in results["rows"]:
        assert 0 <= row["total_variation"] <= 1
        assert 0 <= row["jensen_shannon"] <= 0.6932
        assert -row["bound"] > results["entropy"] - 5 * row["bound_stderr"]
    assert (out / "eight_modes.png").read_bytes().startswith(b"\x89PNG")
    held = sorted(p.name for p in out.iterdir())
    assert held == ["eight_modes", "eight_modes.png", "results.json"]
    for prior in ("none", "standard_normal", "categorical"):
        run_of = load_run(out / "eight_modes" / prior)
        assert (run_of.configuration["prior"], run_of.process.vocab_size) == (prior, 50)
    assert "vadd-pyro inspect" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--priors", "none,normal"], "unknown priors: 'normal'"),
        (["demo", "--data", "board"], "invalid choice: 'board'"),
        (["demo", "--num-iterations", "0"], "positive integer, got '0'"),
        (["compare", "--seeds", "0"], "positive integer, got '0'"),
        (["compare", "--learning-rate", "fast"], "positive number, got 'fast'"),
        (["compare", "--priors", ","], "names separated by commas, got ','"),
        (["compare", "--data", "board"], "data must be among checkerboard"),
        ([], "required: command"),
    ],
)
def test_bad_arguments_exit_with_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_status:
        cli.main(arguments)
    assert exit_status.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unwritable_folder_is_reported_before_training(tmp_path, capsys):
    taken = tmp_path / "file"
    taken.write_text("")
    assert cli.main(["demo", "--out", str(taken), "--no-progress"]) == 1
    assert "file" in capsys.readouterr().err


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_examples_run(script, tmp_path):
    result = run(str(ROOT / "examples" / script), "--num-iterations", "3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_the_speed_benchmark_runs():
    script = ROOT / "benchmarks" / "speed.py"
    result = run(str(script), "--sizes", "tiny", "--rounds", "1")
    assert result.returncode == 0, result.stderr
    assert "tiny" in result.stdout
