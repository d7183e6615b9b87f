"""All benchmarks of speed, one after another, and their tables in ``docs/performance.md``.

    make bench
    python benchmarks/suite.py [--only speed,sampling] [--rounds N] [--quick] [--render]
                               [--results docs/results] [--page docs/performance.md]
                               [--figure docs/figures/performance.png]

Each part is a program of its own, which can be run by hand. What it found is written to a file of
the results' folder as soon as it is done, and the page's table with it, so that an interrupted
suite keeps the parts that were finished. ``--only`` runs some, ``--quick`` runs all at small sizes
to see that they run (give it another page and folder), ``--render`` runs nothing and writes the
tables anew. Prose outside of the markers stays.

Parts that lack something keep their figures: NumPyro's columns without NumPyro (the extra
``bench``), several processes on one core, the GPU's table without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from common import conditions
from pages import check_markers, replaced
from rendering import RENDER, keep_numpyro

ROOT = Path(__file__).parents[1]


class Part(NamedTuple):
    """One benchmark.

    Args:
        script: its file.
        arguments: by default.
        quick: further ones for a trial.
        rounds: by default; 0 where there are none.
        minutes: on one quiet core, about, until it is known of an earlier run.
        numpyro: where its seconds are, and of which variant ratios are told, if NumPyro takes
            part.
    """

    script: str
    arguments: tuple[str, ...]
    quick: tuple[str, ...]
    rounds: int
    minutes: float
    numpyro: tuple[str, str] | None = None


PARTS = {
    "start": Part("start.py", (), (), 10, 2),
    "memory": Part("memory.py", (), ("--decoders", "residual"), 0, 2),
    "sampling": Part(
        "sampling.py",
        ("--steps", "1,4,10,16,64", "--compile"),
        ("--sizes", "tiny", "--steps", "1,10"),
        5,
        9,
        ("seconds", "naive"),
    ),
    "speed": Part("speed.py", (), ("--sizes", "tiny"), 30, 10, ("training", "yardstick")),
    "growth": Part("growth.py", (), ("--points", "2", "--no-compile"), 7, 7),
    "processes": Part("scaling.py", (), ("--sizes", "text"), 5, 5),
    "gpu": Part("gpu.py", (), ("--tiny",), 10, 10),
}


def lacking(name: str) -> str:
    """Why a part cannot be run here; empty if it can."""
    if name == "processes" and (os.cpu_count() or 1) < 2:
        return "there is one core only"
    if name == "gpu":
        import torch

        if not torch.cuda.is_available():
            return "there is no CUDA device"
    return ""


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """What a part found before; None if nothing, or not by the suite."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return found if "conditions" in found else None


def command(part: Part, rounds: int | None, quick: bool, result: Path) -> list[str]:
    """How a part is run."""
    words = [sys.executable, str(ROOT / "benchmarks" / part.script), *part.arguments]
    words += part.quick if quick else ()
    if part.rounds:
        words += ["--rounds", str(rounds or (1 if quick else part.rounds))]
    return [*words, "--json", str(result)]


def run(name: str, rounds: int | None, quick: bool) -> dict[str, Any]:
    """Run a part to its end: what it found, with the conditions and the minutes it took.

    Raises:
        RuntimeError: if it fails.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Libraries that read it at start; the parts set torch's threads themselves.
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    known = conditions()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        words = command(PARTS[name], rounds, quick, result)
        ended = subprocess.run(words, env=environment, check=False).returncode
        if ended != 0:
            raise RuntimeError(f"{name} ended with {ended}")
        found = json.loads(result.read_text())
    return {
        "conditions": known,
        "minutes": round((time.monotonic() - began) / 60, 2),
        "quick": quick,
        **found,
    }


def write_text(path: Path, text: str) -> None:
    """Write a file whole, or leave it as it was."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def show(name: str, record: dict[str, Any] | None, page: Path, figure: Path | None) -> None:
    """Write a part's table to the page, and draw its figure; without figures of the suite's own
    what stands there is kept.
    """
    if record is None and name != "gpu":
        return
    write_text(page, replaced(page.read_text(), name, RENDER[name](record), page))
    if name == "growth" and figure is not None and record is not None:
        from growth import draw

        draw(record["factors"], figure)


def expected(name: str, folder: Path, rounds: int | None) -> float:
    """Minutes that a part will take, as it took before if that is known."""
    part, before = PARTS[name], read(folder, name)
    share = rounds / part.rounds if rounds and part.rounds else 1.0
    known = before is not None and not before["quick"]
    if known and before.get("rounds") == (rounds or part.rounds or None):
        return before["minutes"]
    return part.minutes * share


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default=",".join(PARTS), help="which parts, by comma")
    parser.add_argument("--rounds", type=int, default=None, help="of each part")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all runs")
    parser.add_argument("--render", action="store_true", help="tables of what was found before")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument(
        "--figure", type=Path, default=ROOT / "docs" / "figures" / "performance.png"
    )
    told = parser.parse_args(arguments)
    chosen = told.only.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}: expected some of {', '.join(PARTS)}")
    if told.rounds is not None and told.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {told.rounds}")
    places = ("results", "page", "figure")
    if told.quick and any(getattr(told, p) == parser.get_default(p) for p in places):
        parser.error("--quick measures nothing worth keeping: give --results, --page and --figure")
    try:
        check_markers(told.page.read_text(), list(PARTS), told.page)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if told.render:
        for name in chosen:
            show(name, read(told.results, name), told.page, told.figure)
        return 0
    missing = {name: reason for name in chosen if (reason := lacking(name))}
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}")
        show(name, read(told.results, name), told.page, told.figure)
    chosen = [name for name in chosen if name not in missing]
    if find_spec("numpyro") is None and any(PARTS[name].numpyro for name in chosen):
        print("NumPyro is not installed (pip install '.[bench]'): its columns stay as they are")
    if not told.quick:
        minutes = {name: expected(name, told.results, told.rounds) for name in chosen}
        each = ", ".join(f"{name} {value:.0f}" for name, value in minutes.items())
        print(f"about {sum(minutes.values()):.0f} minutes on a quiet machine: {each}")
    return measure(chosen, told)


def measure(chosen: Sequence[str], told: argparse.Namespace) -> int:
    """Run parts, and write each down as soon as it is done; the exit status."""
    failed, done = [], []
    for name in chosen:
        print(f"\n--- {name}, load average {os.getloadavg()[0]:.2f}", flush=True)
        before = read(told.results, name)
        try:
            record = run(name, told.rounds, told.quick)
        except RuntimeError as error:
            print(f"{error}: its table stays as it is", file=sys.stderr)
            failed.append(name)
            continue
        except KeyboardInterrupt:
            print(f"interrupted in {name}; finished: {', '.join(done) or 'nothing'}")
            return 130
        if PARTS[name].numpyro is not None:
            keep_numpyro(record, before, *PARTS[name].numpyro)
        told.results.mkdir(parents=True, exist_ok=True)
        write_text(told.results / f"{name}.json", json.dumps(record, indent=1) + "\n")
        show(name, record, told.page, told.figure)
        done.append(name)
        print(f"{name} took {record['minutes']:.1f} minutes", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
