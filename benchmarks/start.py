"""How long a program waits before its first line: imports and the command's help.

    python benchmarks/start.py [--rounds 10] [--json FILE]

Every line is a fresh interpreter. Variants take turns; printed are medians over the rounds, of
wall time and of processor time, and of their ratios in a round to ``import torch, pyro``, which no
program that uses the package can do without. A bare ``import vadd_pyro`` says little, as names are
imported when they are first used: the figures to look at are those of the names that a usual
program touches, and of all names. Bytecode of all packages is kept in a folder of the run's own,
written in a round that is not counted, so that it makes no difference whose was there before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
BASE = "import torch, pyro"
USUAL = (
    "import vadd_pyro; vadd_pyro.fit, vadd_pyro.sample, vadd_pyro.log_likelihood_bound, "
    "vadd_pyro.MaskedDiffusionELBO, vadd_pyro.models.VADD, vadd_pyro.guides.AmortizedNormal, "
    "vadd_pyro.nn.MLPDecoder; vadd_pyro.data.swiss_roll().sample(1)"
)
VARIANTS: dict[str, Sequence[str]] = {
    "python": ("-c", "pass"),
    BASE: ("-c", BASE),
    "import vadd_pyro": ("-c", "import vadd_pyro"),
    "usual names": ("-c", USUAL),
    "from vadd_pyro import *": ("-c", "from vadd_pyro import *"),
    "vadd-pyro --help": ("-m", "vadd_pyro", "--help"),
    "vadd-pyro train --help": ("-m", "vadd_pyro", "train", "--help"),
    "vadd-pyro train digitz": ("-m", "vadd_pyro", "train", "digitz"),
}
TARGETS = {  # ratio of wall times to BASE, or seconds
    "import vadd_pyro": "1.3",
    "usual names": "1.3",
    "from vadd_pyro import *": "1.3",
    "vadd-pyro --help": "1 s",
}


class Cost(NamedTuple):
    """What an interpreter took, in seconds."""

    wall: float
    processor: float


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> Cost:
    """Run a fresh interpreter to its end.

    Raises:
        RuntimeError: if it ends otherwise than with status 0, or 2 for a wrong argument.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 2):
        raise RuntimeError(f"python {' '.join(arguments)} ended with {process.returncode}")
    return Cost(wall, usage.ru_utime + usage.ru_stime)


def measure(variants: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[Cost]]:
    """Costs in each of the rounds, in which all variants take turns; one before is not counted."""
    costs: dict[str, list[Cost]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder, "PYTHONPATH": path}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for number in range(rounds + 1):
            names = list(variants)
            for name in names if number % 2 else reversed(names):
                cost = run(variants[name], environment)
                if number:
                    costs[name].append(cost)
    return costs


def medians(costs: Sequence[Cost], base: Sequence[Cost] | None = None) -> Cost:
    """Medians over rounds, of costs or of their ratios to a base."""
    if base is not None:
        pairs = zip(costs, base, strict=True)
        costs = [Cost(a.wall / b.wall, a.processor / b.processor) for a, b in pairs]
    return Cost(*(statistics.median(values) for values in zip(*costs, strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", default=None, help="file for the figures")
    arguments = parser.parse_args()
    costs = measure(VARIANTS, arguments.rounds)
    found = {name: (medians(cost), medians(cost, costs[BASE])) for name, cost in costs.items()}
    print(f"{'':<24} {'wall ms':>8} {'ratio':>7} {'target':>7} {'processor ms':>13} {'ratio':>7}")
    for name, (seconds, ratio) in found.items():
        print(
            f"{name:<24} {1e3 * seconds.wall:>8.0f} {ratio.wall:>7.3f} "
            f"{TARGETS.get(name, '-'):>7} {1e3 * seconds.processor:>13.0f} "
            f"{ratio.processor:>7.3f}"
        )
    if arguments.json:
        results: dict[str, Any] = {
            "python": platform.python_version(),
            "rounds": arguments.rounds,
            "seconds": {name: seconds._asdict() for name, (seconds, _) in found.items()},
            "ratios": {name: ratio._asdict() for name, (_, ratio) in found.items()},
        }
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
