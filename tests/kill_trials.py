"""Trials for test_durability.py: a training run is killed with SIGKILL again and again.

    python tests/kill_trials.py FOLDER NUM_KILLS SEED

Prints what was found as JSON. Every run is a child that is forked from this process, where torch
is at hand but has not computed anything yet. A killed run is resumed by the next child, until it
ends; its last checkpoint is then compared with that of a run which nobody has killed. Children are
killed in three ways:

* ``outside``: by this process, at a random moment;
* ``byte``: by themselves, at a random byte of a checkpoint that is being written;
* ``call``: by themselves, just before one of the calls that put a checkpoint in its place.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
import torch._dynamo  # the first optimiser would import it, in every child anew
from conftest import small_pair
from training_runs import limit_files

from vadd_pyro import LinearAnnealing, MaskedDiffusionELBO, MaskingProcess, checkpoints, data, fit
from vadd_pyro.checkpoints import load_checkpoint, newest_checkpoint, previous_of

NUM_ITERATIONS = 32
EVERY = 4
WAYS = ("outside", "byte", "call")


def train(path: Path) -> None:
    """The run, or what is left of it."""
    process = MaskingProcess(2, 3)
    pyro.set_rng_seed(11)
    fit(
        *small_pair("standard_normal", process),
        MaskedDiffusionELBO(process, kl_weight=LinearAnnealing(40, 0.1)),
        data.tied_bits(3).sample(300),
        NUM_ITERATIONS,
        batch_size=16,
        ema_decay=0.95,
        log_every=7,
        monitor_every=10,
        checkpoint=path,
        checkpoint_every=EVERY,
        resume=True,
        progress=False,
        seed=3,
    )


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def nothing() -> None:
    """What is prepared for a run that is to come to its end, or to be killed from outside."""


def die_at_byte(offset: int) -> None:
    """Have this process killed at a byte, counted over all checkpoints that it writes."""
    checkpoints.open = limit_files(offset, die)  # type: ignore[attr-defined]


def die_before_call(number: int) -> None:
    """Have this process killed before one of the calls by which files become durable."""
    left = [number]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if left[0] == 0:
                die()
            left[0] -= 1
            return function(*arguments)

        return call

    os.fsync, os.link, os.replace = map(counted, (os.fsync, os.link, os.replace))


def fork(path: Path, prepare: Callable[[], None]) -> tuple[int, int]:
    """Start a child on the run; returns its number and a pipe, to which it writes an iteration
    once its checkpoint stands.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    status = 1
    try:
        save = checkpoints.save_checkpoint

        def reported(place: Path, content: dict[str, Any], **options: Any) -> None:
            save(place, content, **options)
            os.write(writing, b"%d " % content["iteration"])

        from vadd_pyro import trainer

        trainer.save_checkpoint = reported
        prepare()
        train(path)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(child: int, seconds: float | None) -> int:
    """Wait for a child, and kill it when its time is over; returns its exit status."""
    deadline = time.monotonic() + (120 if seconds is None else seconds)
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def drain(pipe: int) -> int:
    """The last iteration that a child has told of; 0 if none."""
    with open(pipe) as told:
        return max((int(word) for word in told.read().split()), default=0)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        left_out = ("seconds", "elapsed")  # clocks
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a if k not in left_out)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(*pair) for pair in zip(a, b, strict=True))
    return a == b


def main(folder: Path, num_kills: int, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    start = time.monotonic()
    child, pipe = fork(folder / "whole.pt", nothing)
    assert wait(child, None) == 0
    duration = time.monotonic() - start
    assert drain(pipe) == NUM_ITERATIONS
    whole = load_checkpoint(folder / "whole.pt")
    size = (folder / "whole.pt").stat().st_size
    kills = dict.fromkeys(WAYS, 0)
    found: dict[str, Any] = {"kills": kills, "runs": 0, "left_partial": 0, "left_twice": 0}
    while sum(kills.values()) < num_kills:
        path = folder / f"run{found['runs']}" / "model.pt"
        standing, code, attempts = 0, -1, 0
        while code:
            attempts += 1
            assert attempts < 100, f"{path} does not come to its end"
            way = WAYS[sum(kills.values()) % len(WAYS)]
            enough = sum(kills.values()) >= num_kills
            prepare, seconds = nothing, None
            if enough:
                pass
            elif way == "outside":
                seconds = draw.uniform(0.0, duration)
            elif way == "byte":
                prepare = partial(die_at_byte, draw.randrange(5 * size))
            else:
                prepare = partial(die_before_call, kills[way] % 20)
            child, pipe = fork(path, prepare)
            code = wait(child, seconds)
            told = drain(pipe)
            assert code in (0, -signal.SIGKILL), f"a resumed run failed with status {code}"
            kills[way] += code != 0
            newest = newest_checkpoint(path)
            iteration = 0 if newest is None else load_checkpoint(newest)["iteration"]
            # What a child has told of stands; nothing that stood before is lost.
            assert iteration >= max(told, standing), (way, iteration, told, standing)
            standing = iteration
            if code:
                found["left_partial"] += any(path.parent.glob("*.partial"))
                names = [file for file in (path, previous_of(path)) if file.exists()]
                found["left_twice"] += len(names) == 2 and os.path.samefile(*names)
        assert same(load_checkpoint(path), whole), f"{path} ended as another run"
        names = sorted(file.name for file in path.parent.iterdir())
        assert names == ["model.pt", "model.pt.previous"], names
        assert load_checkpoint(f"{path}.previous")["iteration"] == NUM_ITERATIONS - EVERY
        found["runs"] += 1
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # so that collections in the children do not copy this process's memory
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
