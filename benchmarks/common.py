"""What the benchmarks of speed share: sizes, how variants are timed, and under what conditions."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple


class Size(NamedTuple):
    """One line of a table.

    Args:
        length, vocab_size: of rows.
        batch_size: rows of a training step.
        hidden_dim, embedding_dim, latent_dim: of the networks.
        steps: training steps per timed round.
        network: perceptrons of three layers, or a transformer of two.
        sample_rows: rows of a sampling pass.
    """

    length: int
    vocab_size: int
    batch_size: int
    hidden_dim: int
    embedding_dim: int
    latent_dim: int
    steps: int
    network: str = "mlp"
    sample_rows: int = 1000

    @property
    def mlp(self) -> dict[str, Any]:
        """Sizes of the perceptrons."""
        return dict(hidden_dim=self.hidden_dim, num_layers=3, embedding_dim=self.embedding_dim)


SIZES = {
    "tiny": Size(2, 8, 32, 16, 4, 2, 60),
    "toy256": Size(2, 100, 256, 256, 32, 2, 12, sample_rows=10_000),
    "toy1024": Size(2, 100, 1024, 256, 32, 2, 4),
    "bin64": Size(64, 2, 256, 256, 4, 16, 10),
    "bin784": Size(784, 2, 256, 256, 4, 16, 4),
    "text": Size(64, 64, 64, 128, 128, 16, 1, "transformer", 64),
}

# Ratios of training steps to reach: an ordinary user's program; the package's distributions; the
# update as one graph, on a processor where oneDNN is faster than torch's default products.
TARGETS: dict[str, tuple[float | None, float | None, float | None]] = {
    "tiny": (1.7, None, 0.25),
    "toy256": (1.12, 1.07, 0.55),
    "toy1024": (1.06, 1.03, 0.55),
    "bin64": (None, None, 0.50),
    "bin784": (1.04, 1.03, 0.50),
    "text": (1.04, None, 0.68),
}


def medians(
    variants: dict[str, Callable[[], Any]],
    repeats: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: int = 2,
) -> dict[str, float]:
    """Median seconds per call of each variant, over rounds in which they take turns.

    Args:
        variants: what to time, by name.
        repeats: calls of each in a round.
        rounds: how many.
        clock: gives seconds.
        warm_up: untimed calls of each before, at least.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        for _ in range(max(warm_up, repeats // 4)):
            call()
    for _ in range(rounds):
        for name, call in variants.items():
            start = clock()
            for _ in range(repeats):
                call()
            times[name].append((clock() - start) / repeats)
    return {name: statistics.median(values) for name, values in times.items()}


def one_core() -> None:
    """Keep this process, and what it starts, on one of its cores, where the system can: NumPyro's
    libraries take as many as they are given, whatever they are told.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def conditions() -> dict[str, Any]:
    """What a table must say of how it was measured; call it before anything is timed."""
    return {
        "date": date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch": version("torch"),
        "pyro": version("pyro-ppl"),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def processor() -> str:
    """The processor's name as the system tells it, else its kind."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    try:  # macOS
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        return found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return platform.machine()
