r"""Does a long run keep its memory? Training, stopped and resumed over and over in one process.

    python benchmarks/soak.py [--minutes 30] [--tolerance 0.2] [--json FILE]

Every few seconds the training run, which has checkpoints and a watch on its latents, stops itself
by SIGTERM, as a scheduler would. Then rows are sampled and scored, a new pair is built, and the
run resumes in it where it stood. The memory that the system holds for the process (resident set)
is noted once in every such round, after a collection of garbage.

A straight line through these values, without the first fifth, in which caches fill, gives the
growth per minute. Neighbouring values are not independent: the standard error is that of a
jackknife which leaves out one of ten consecutive blocks at a time,

.. math::
    \mathrm{se}^2 = \tfrac{9}{10} \sum_{i=1}^{10} (b_{(i)} - \bar b)^2 .

Exit status: 1 if memory grows by more than the tolerance, beyond two standard errors; 2 if two
standard errors are more than the tolerance, so that a longer run is needed to tell; else 0.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vadd_pyro import (
    Interrupted,
    LinearAnnealing,
    MaskedDiffusionELBO,
    data,
    fit,
    guides,
    log_likelihood_bound,
    models,
    sample,
)
from vadd_pyro.nn import MLPDecoder, MLPEncoder

NUM_BLOCKS = 10
NUM_ITERATIONS = 10**9  # more than there is time for
BOARD = data.checkerboard(16)


def resident() -> float:
    """Megabytes that the system holds for this process now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    except FileNotFoundError:  # macOS
        told = subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())])
        return int(told) * 1024 / 1e6


class Stream:
    """Fresh rows; stops the process after some seconds."""

    fingerprint = "checkerboard"

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.stopped = False

    def at(self, iteration: int, batch_size: int) -> Tensor:
        if time.monotonic() > self.end and not self.stopped:
            self.stopped = True
            os.kill(os.getpid(), signal.SIGTERM)
        return BOARD.sample(batch_size, seed=iteration)

    def __call__(self, batch_size: int) -> Tensor:
        return self.at(0, batch_size)


def work(checkpoint: Path, seconds: float) -> int:
    """One round; returns how many updates the run has made since its beginning."""
    process = BOARD.process()
    sizes: dict[str, Any] = dict(hidden_dim=64, num_layers=2)
    model = models.VADD(MLPDecoder(process, 2, **sizes), models.StandardNormal(2))
    guide = guides.AmortizedNormal(MLPEncoder(process, 2, **sizes))
    try:
        fit(
            model,
            guide,
            MaskedDiffusionELBO(process, kl_weight=LinearAnnealing(2000)),
            Stream(seconds),
            NUM_ITERATIONS,
            batch_size=64,
            ema_decay=0.99,
            checkpoint=checkpoint,
            checkpoint_every=200,
            resume=True,
            # The history is part of the run, and grows with it: few entries, to see all else.
            log_every=1000,
            monitor_every=1000,
            progress=False,
        )
    except Interrupted as stop:
        iteration = stop.iteration
    x = sample(model, process, 256, 4, seed=0)
    log_likelihood_bound(model, guide, process, x[:32], 4, num_particles=8, seed=0)
    return 0 if iteration is None else iteration


class Growth(NamedTuple):
    """Growth in MB per minute, its standard error, and how many values it is from."""

    slope: float
    stderr: float
    number: int


def growth(minutes: list[float], megabytes: list[float]) -> Growth:
    """Slope of the line through values after the first fifth of the time; of too few, an infinite
    error.
    """
    t, y = np.array(minutes), np.array(megabytes)
    late = t >= t[0] + (t[-1] - t[0]) / 5
    t, y = t[late], y[late]
    slope = float(np.polyfit(t, y, 1)[0]) if len(t) > 2 else math.nan
    if len(t) < 2 * NUM_BLOCKS:
        return Growth(slope, math.inf, len(t))
    blocks = np.array_split(np.arange(len(t)), NUM_BLOCKS)
    without = [np.polyfit(np.delete(t, block), np.delete(y, block), 1)[0] for block in blocks]
    spread = np.square(np.array(without) - np.mean(without)).sum()
    return Growth(slope, float(((NUM_BLOCKS - 1) / NUM_BLOCKS * spread) ** 0.5), len(t))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long; default 30")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each round; default 3")
    parser.add_argument(
        "--tolerance", type=float, default=0.2, help="MB per minute that pass; default 0.2"
    )
    parser.add_argument("--json", type=Path, help="where the values go")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    minutes: list[float] = []
    megabytes: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        shown = 0.0
        while not minutes or minutes[-1] < arguments.minutes:
            iteration = work(Path(folder) / "run.pt", arguments.seconds)
            gc.collect()
            minutes.append((time.monotonic() - start) / 60)
            megabytes.append(resident())
            if minutes[-1] >= shown:
                print(
                    f"{minutes[-1]:7.2f} min  {megabytes[-1]:8.1f} MB  {iteration} updates",
                    flush=True,
                )
                shown += arguments.minutes / 20
    found = growth(minutes, megabytes)
    if arguments.json is not None:
        values = {"minutes": minutes, "megabytes": megabytes, **found._asdict()}
        arguments.json.write_text(json.dumps(values) + "\n")
    print(
        f"\ngrowth {found.slope:+.3f} MB/min (s.e. {found.stderr:.3f}, {found.number} rounds), "
        f"tolerance {arguments.tolerance:g} MB/min: ",
        end="",
    )
    if found.slope - 2 * found.stderr > arguments.tolerance:
        print("memory grows")
        return 1
    if 2 * found.stderr > arguments.tolerance:
        print("this run is too short to tell")
        return 2
    print("no growth beyond it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
