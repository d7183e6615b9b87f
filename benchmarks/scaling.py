"""Samples per second of one process and of several that train together.

The same training runs (``vadd_pyro.fit``) in one process and in several take turns on one machine;
what is printed is medians over the updates of all rounds. Usage:

    python benchmarks/scaling.py [--sizes bin784,text,mnist] [--processes 2] [--rounds 5]
        [--threads 1] [--accumulate 1] [--compile] [--json FILE]

``same batch`` divides the batch of one process among all, which changes nothing in the
optimisation; ``full batches`` gives each as many rows as one had. Beside them ``apart``: as many
processes that each train a pair of their own on full batches and tell each other nothing, which is
what this machine's cores and memory allow at most. All are told by the clock, and in brackets by
the time that the processor spent on the busiest process, which leaves out waiting: for others, and
for whatever else the machine does. Leave a core for each process, and trust the first on a machine
that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
import torch._dynamo  # the first optimiser would import it, in every process anew
import torch.distributed as dist
from speed import SIZES as SPEED_SIZES
from speed import networks

from vadd_pyro import MaskedDiffusionELBO, MaskingProcess, fit, guides, models, zoo
from vadd_pyro.data import DataSet
from vadd_pyro.distributed import Processes
from vadd_pyro.exchange import Exchange
from vadd_pyro.experiments import preset
from vadd_pyro.experiments.store import build

SIZES = ("bin784", "text", "mnist")
STEPS = {"bin784": 12, "text": 6, "mnist": 6}  # timed updates of a round
_FIRST = 2  # updates that are not timed


class Job(NamedTuple):
    """What to train on, and how."""

    model: Any
    guide: Any
    elbo: MaskedDiffusionELBO
    rows: torch.Tensor
    batch_size: int
    precision: str


def job(name: str) -> Job:
    """Networks and random rows of one size."""
    pyro.set_rng_seed(0)
    if name == "mnist":
        settings = preset("mnist")
        rows = torch.randint(2, (2000, 784), dtype=torch.uint8)
        data = DataSet("random", rows, rows[:100], rows[:100], 2, shape=(28, 28))
        pair = build(settings, data)
        times = zoo.times_named(settings.times, settings.steps)
        elbo = MaskedDiffusionELBO(data.process(), times=times, least_time=settings.least_time)
        return Job(*pair[:2], elbo, rows.long(), settings.batch_size, settings.precision)
    size = SPEED_SIZES[name]
    process = MaskingProcess(size.vocab_size, size.length)
    decoder, encoder = networks(size, process)
    model = models.VADD(decoder, models.StandardNormal(size.latent_dim))
    rows = torch.randint(size.vocab_size, (2000, size.length))
    guide = guides.AmortizedNormal(encoder)
    elbo = MaskedDiffusionELBO(process)
    return Job(model, guide, elbo, rows, size.batch_size, "float32")


class Rows:
    """Random rows, and when they were asked for."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.times: list[tuple[float, float]] = []

    def at(self, iteration: int, batch_size: int) -> torch.Tensor:
        self.times.append((time.perf_counter(), time.process_time()))
        return self.rows[torch.arange(batch_size) % len(self.rows)]

    def __call__(self, batch_size: int) -> torch.Tensor:
        raise TypeError("rows are asked for by iteration")


def updates(name: str, factor: int, options: dict[str, Any]) -> list[tuple[float, float]]:
    """Seconds of single updates by the clock and of the processor, in this process or in the group
    that it is in.
    """
    what = job(name)
    rows = Rows(what.rows)
    fit(
        what.model,
        what.guide,
        what.elbo,
        rows,
        _FIRST + STEPS[name] + 1,
        batch_size=what.batch_size * factor,
        precision=what.precision,
        ema_decay=0.999,
        monitor_every=None,
        progress=False,
        **options,
    )
    times = rows.times[-STEPS[name] - 1 :]
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(times)]


def exchange(length: int, through: bool) -> float:
    """Seconds of one sum of as many numbers, the median of some: through memory that all see, as
    between updates of one machine, or by all-reduce.
    """
    vector = torch.ones(length)
    told = Exchange(Processes.current(), length, vector)
    add = told.sum if through else dist.all_reduce
    seconds = []
    for _ in range(12):
        dist.barrier()
        start = time.perf_counter()
        add(vector)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def worker(rank: int, size: int, meeting: str | None, threads: int, line: Connection) -> None:
    """One process of the group: does what it is told until it is told nothing."""
    torch.set_num_threads(threads)
    if meeting is not None:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=size,
            timeout=timedelta(minutes=10),
        )
    known: dict[str, Callable[..., Any]] = {"updates": updates, "exchange": exchange}
    while (told := line.recv()) is not None:
        line.send(known[told[0]](*told[1:]))
    if meeting is not None:
        dist.destroy_process_group()


class Group:
    """Processes that wait until they are called together; without a place to meet at, each for
    itself.
    """

    def __init__(self, size: int, meeting: str | None, threads: int) -> None:
        context = multiprocessing.get_context("fork")
        self.apart = meeting is None
        self.lines = []
        self.workers = []
        for rank in range(size):
            own, other = context.Pipe()
            process = context.Process(target=worker, args=(rank, size, meeting, threads, other))
            process.start()
            self.lines.append(own)
            self.workers.append(process)

    def __call__(self, *what: Any) -> list[Any]:
        """Have all call a function: what each returns."""
        for line in self.lines:
            line.send(what)
        return [line.recv() for line in self.lines]

    def updates(self, name: str, factor: int, options: dict[str, Any]) -> list[Any]:
        """Seconds of single updates: of the slowest process, for which the others wait; or, where
        none waits for another, of all.
        """
        found = self("updates", name, factor, options)
        if self.apart:
            return [update for process in found for update in process]
        return [tuple(np.max(each, 0)) for each in zip(*found, strict=True)]

    def close(self) -> None:
        for line in self.lines:
            line.send(None)
        for process in self.workers:
            process.join()


def measure(
    name: str, group: Group, apart: Group, rounds: int, options: dict[str, Any]
) -> dict[str, float]:
    """What is known of one size in the end."""
    what = job(name)
    parameters = [*what.model.parameters(), *what.guide.parameters()]
    own = {id(p): p.numel() for p in parameters if p.requires_grad}
    size = len(group.lines)
    kinds = ("one", "same", "full", "apart")
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        seconds["one"] += updates(name, 1, options)
        seconds["same"] += group.updates(name, 1, options)
        seconds["full"] += group.updates(name, size, options)
        seconds["apart"] += apart.updates(name, 1, options)
    # Gradients, which of them there are, loss, KL, and two flags.
    length = sum(own.values()) + len(own) + 4
    found = {
        "batch_size": what.batch_size,
        "megabytes": 4e-6 * length,
        "sent_megabytes": 4e-6 * length * 2 * (size - 1) / size,
        "all_reduce_ms": 1e3 * max(group("exchange", length, False)),
        "exchange_ms": 1e3 * max(group("exchange", length, True)),
    }
    for kind, values in seconds.items():
        rows = what.batch_size * (size if kind in ("full", "apart") else 1)
        for clock, column in zip(("clock", "processor"), zip(*values, strict=True), strict=True):
            median = statistics.median(column)
            found |= {f"{kind}_{clock}_ms": 1e3 * median, f"{kind}_{clock}_rate": rows / median}
    return found


def gain(found: dict[str, float], kind: str) -> str:
    """Rows per second relative to one process."""
    ratios = [
        found[f"{kind}_{clock}_rate"] / found[f"one_{clock}_rate"]
        for clock in ("clock", "processor")
    ]
    return f"{ratios[0]:.2f} ({ratios[1]:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", default=",".join(SIZES), help="which sizes, by comma")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--accumulate", type=int, default=1, help="parts of each process's rows")
    parser.add_argument("--compile", action="store_true", help="updates as compiled graphs")
    parser.add_argument("--json", default=None, help="file for the figures")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.sizes.split(",") if name not in SIZES]
    if unknown:
        parser.error(f"there is no size {unknown[0]!r}: expected some of {', '.join(SIZES)}")
    torch.set_num_threads(arguments.threads)
    options = {"accumulate": arguments.accumulate, "compile": arguments.compile}
    size = arguments.processes
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processes": size,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        **options,
        "sizes": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        group = Group(size, f"{folder}/meeting", arguments.threads)
        apart = Group(size, None, arguments.threads)
        print(
            f"{'':<8} {'batch':>5} {'MB':>6} {'sent MB':>8} {'all-reduce ms':>14} {'sum ms':>7} "
            f"{'1 process, ms':>14} {'rows/s':>8} {f'{size}, same batch':>15} "
            f"{f'{size}, full batches':>16} {f'{size} apart':>13}"
        )
        for name in arguments.sizes.split(","):
            found = measure(name, group, apart, arguments.rounds, options)
            results["sizes"][name] = found
            print(
                f"{name:<8} {found['batch_size']:>5} {found['megabytes']:>6.1f} "
                f"{found['sent_megabytes']:>8.1f} {found['all_reduce_ms']:>14.1f} "
                f"{found['exchange_ms']:>7.1f} "
                f"{found['one_clock_ms']:>14.1f} {found['one_clock_rate']:>8.0f} "
                f"{gain(found, 'same'):>15} {gain(found, 'full'):>16} "
                f"{gain(found, 'apart'):>13}",
                flush=True,
            )
        group.close()
        apart.close()
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
