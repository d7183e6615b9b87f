"""Trials for test_distributed.py: what two processes do together.

    python tests/distributed_trials.py FOLDER [NAME ...]

Both are forked from this process, where torch is at hand but has not computed anything yet. Each
makes all trials (or those named) in turn and writes what it found to ``FOLDER/<rank>.pt``.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyro
import torch
import torch._dynamo  # the first optimiser would import it, in both children anew
import torch.distributed
from conftest import small_pair
from torch import Tensor
from training_runs import signalling

from vadd_pyro import (
    History,
    Interrupted,
    LinearAnnealing,
    MaskedBatch,
    MaskedDiffusionELBO,
    MaskingProcess,
    TokenCategorical,
    data,
    fit,
)
from vadd_pyro.checkpoints import load_checkpoint
from vadd_pyro.distributed import Processes
from vadd_pyro.shared_sums import SharedSums

PROCESS = MaskingProcess(2, 3)
X = data.tied_bits(3).sample(300)


class RowELBO(MaskedDiffusionELBO):
    """Times and masks are functions of the rows, so that a loss is one of its rows alone."""

    def draw(self, x_0: Tensor, *, check: bool | None = None) -> MaskedBatch:
        code = (x_0 * torch.tensor([1, 2, 4])).sum(-1)
        t = (code + 1) / 8.0
        masked = torch.stack([code % 3 == 0, code % 2 == 0, code >= 0], -1)
        x_t = x_0.masked_fill(masked, 2)
        return MaskedBatch(x_t, t, masked, masked, x_0, 1 / t)


class Killed(BaseException):
    """Stands for whatever ends a process between two updates."""


def annealed(kind: type[MaskedDiffusionELBO] = MaskedDiffusionELBO) -> MaskedDiffusionELBO:
    return kind(PROCESS, kl_weight=LinearAnnealing(20, 0.1))


def pair(prior: str = "standard_normal", seed: int = 11) -> tuple[Any, Any]:
    pyro.set_rng_seed(seed)
    return small_pair(prior, PROCESS)


def state(*programs: Any) -> Tensor:
    """All parameters in a row."""
    return torch.cat([p.detach().flatten() for program in programs for p in program.parameters()])


def same_rows(path: Path | None = None, seed: int = 11, **options: Any) -> tuple[Tensor, History]:
    """A run without random numbers: the pair's weights at the end, and the history."""
    programs = pair("categorical", seed)
    settings: dict[str, Any] = dict(batch_size=24, ema_decay=0.9, clip_norm=0.3, progress=False)
    settings |= dict(learning_rate=0.02, warmup=3, log_every=4, monitor_every=10)
    settings |= dict(checkpoint=path, resume=path is not None, **options)
    num_iterations = settings.pop("num_iterations", 20)
    history = fit(*programs, annealed(RowELBO), X, num_iterations, **settings)
    return state(*programs), history


def from_store(num_iterations: int = 12) -> Tensor:
    """Functions with parameters in Pyro's store: one for all rows, one that few rows use, and one
    that none does, which an optimiser with weight decay must leave as it is.
    """
    pyro.clear_param_store()

    def model(batch: MaskedBatch) -> None:
        table = pyro.param("table", lambda: torch.randn(3, 2))
        rare = pyro.param("rare", lambda: torch.randn(2))
        pyro.param("unused", lambda: torch.randn(2))
        logits = table.expand(len(batch), 3, 2)
        assert batch.x_0 is not None
        some = (batch.x_0.sum(-1) == 3) & (batch.t > 0.9)
        if some.any():
            logits = logits + some[:, None, None] * rare
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)

    def guide(batch: MaskedBatch) -> None:
        pass

    def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.5)

    def rows(iteration: int, batch_size: int) -> Tensor:
        # Rows of ones in every third batch alone, and there in its second half.
        x_0 = torch.zeros(batch_size, 3, dtype=torch.long)
        x_0[: batch_size // 2, 0] = 1
        if iteration % 3 == 1:
            x_0[-2:] = 1
        return x_0

    class Rows:
        at = staticmethod(rows)

        def __call__(self, batch_size: int) -> Tensor:
            raise AssertionError("rows are asked for by iteration")

    options: dict[str, Any] = dict(batch_size=8, optimizer=adam, monitor_every=None)
    fit(model, guide, annealed(RowELBO), Rows(), num_iterations, progress=False, **options)
    return torch.cat([pyro.param(name).detach().flatten() for name in ("table", "rare", "unused")])


# ---------------------------------------------------------------------------- trials of two


def exact(rank: int, folder: Path) -> dict[str, Any]:
    """Weights that differ at first, as the first has them in the end; parts; Pyro's store."""
    weights, history = same_rows(seed=11 + rank)
    in_parts, _ = same_rows(seed=11 + rank, accumulate=2)
    pyro.set_rng_seed(5 + rank)
    store = from_store()
    with patch("vadd_pyro.exchange._LARGE", 2):  # nearly all gradients are sent by themselves
        pyro.set_rng_seed(5 + rank)
        alone = torch.cat([from_store(), same_rows(seed=11 + rank)[0]])
    return {
        "weights": weights,
        "in_parts": in_parts,
        "history": history.to_dict(),
        "store": store,
        "alone": alone,
    }


def through_memory(rank: int, folder: Path) -> dict[str, Any]:
    """Sums through memory that both see, those of all_reduce, and what is not shared."""
    if not Path("/dev/shm").is_dir():
        return {}
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as place,
        patch("vadd_pyro.shared_sums._FOLDER", Path(place)),
    ):
        found = _through_memory(rank, folder)
        torch.distributed.barrier()
        found["left"] = os.listdir(place)
    return found


def _through_memory(rank: int, folder: Path) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(rank)
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float32]
    shapes = [(300, 7), (1001,), (33,), (5, 5, 41)]
    given = [
        torch.randn(shape, generator=draw, dtype=torch.float64).to(kind)
        for shape, kind in zip(shapes, kinds, strict=True)
    ]
    expected = [tensor.clone() for tensor in given]
    for tensor in expected:
        torch.distributed.all_reduce(tensor)
    processes = Processes.current()
    found: dict[str, Any] = {"expected": expected}
    num_bytes = sum(t.numel() * t.element_size() for t in given)
    for name, room in (("whole", 2**20), ("in_pieces", 3 * 1024)):
        least = patch("vadd_pyro.shared_sums._LEAST", 2**9)
        with patch("vadd_pyro.shared_sums._ROOM", room), least:
            shared = SharedSums.between(processes, num_bytes)
        assert shared is not None
        found[name] = [tensor.clone() for tensor in given]
        for _ in range(20):  # one that runs ahead would spoil what the other still reads
            shared(found[name])
            for value, tensor in zip(found[name], given, strict=True):
                value.copy_(tensor)
        shared(found[name])
    # One of two does not see the file or is elsewhere, or there is no place or room for it.
    gone = patch("vadd_pyro.shared_sums._opened", side_effect=FileNotFoundError)
    with gone if rank else nullcontext():
        found["hidden"] = SharedSums.between(processes, num_bytes)
    found["elsewhere"] = SharedSums.between(processes, num_bytes, here=not rank)
    with patch("vadd_pyro.shared_sums._SHARE", 1e-9):
        found["tight"] = SharedSums.between(processes, num_bytes)
    with patch("vadd_pyro.shared_sums._FOLDER", folder / "none"):
        found["nowhere"] = SharedSums.between(processes, num_bytes)
    with patch("os.posix_fallocate", side_effect=OSError(errno.ENOSPC, "full")):
        found["full"] = SharedSums.between(processes, num_bytes)
    # A run, its memory made anew where more is asked for.
    pieces: list[int] = []
    between = SharedSums.between

    def told(processes: Processes, num_bytes: int, here: bool) -> SharedSums | None:
        pieces.append(num_bytes)
        return between(processes, num_bytes, here)

    with (
        patch("vadd_pyro.exchange._LARGE", 10),
        patch("vadd_pyro.shared_sums.SharedSums.between", told),
    ):
        found["weights"], _ = same_rows(seed=11 + rank)
    found["asked"] = pieces
    return found


def other_numbers(rank: int, folder: Path) -> dict[str, Any]:
    """Goes on where one process has stopped, and stops where one process goes on."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        weights, history = same_rows(folder / "one.pt")
    with suppress(Killed):
        same_rows(folder / "two.pt", optimizer=dies_at(10), checkpoint_every=5)
    texts = [str(warning.message) for warning in told if "processes" in str(warning.message)]
    return {"weights": weights, "loss": history.loss, "warnings": texts}


def dies_at(number: int) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
        adam = torch.optim.Adam(parameters, lr=0.02, fused=True)
        step, left = adam.step, [number]

        def dying(*arguments: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return step(*arguments)

        adam.step = dying  # type: ignore[method-assign]
        return adam

    return make


def resumed(rank: int, folder: Path) -> dict[str, Any]:
    """A random run, whole and killed and resumed, from rows of its own."""

    def fresh(batch_size: int) -> Tensor:
        return torch.randint(2, (batch_size, 1)).expand(batch_size, 3)

    found: dict[str, Any] = {}
    for name, dies in (("whole", None), ("killed", 13), ("killed", None)):
        programs = pair(seed=11 + rank)
        options: dict[str, Any] = dict(batch_size=16, progress=False, ema_decay=0.9, log_every=3)
        options |= dict(checkpoint=folder / f"{name}.pt", checkpoint_every=5, resume=True, seed=3)
        make = None if dies is None else dies_at(dies)
        options |= dict(learning_rate=0.02, monitor_every=7, optimizer=make)
        try:
            history = fit(*programs, annealed(), fresh, 20, **options)
        except Killed:
            continue
        found[name] = {"weights": state(*programs), "history": history.to_dict()}
        found[name]["iteration"] = load_checkpoint(folder / f"{name}.pt")["iteration"]
    found["next"] = torch.rand(3)  # drawn on this process's generator, which fit has left alone
    return found


def _error(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        call()
    except (Exception, Interrupted) as error:
        return {"kind": type(error).__name__, "text": str(error)}
    return {"kind": "none", "text": ""}


class Following:
    """Rows of each update, and what happens to the second process before."""

    def __init__(self, rank: int, happen: dict[int, Callable[[], Any]]) -> None:
        self.happen = happen if rank == 1 else {}

    def at(self, iteration: int, batch_size: int) -> Tensor:
        self.happen.get(iteration, lambda: None)()
        return X[8 * iteration : 8 * iteration + batch_size]

    def __call__(self, batch_size: int) -> Tensor:
        raise AssertionError("rows are asked for by iteration")


def raising(error: Exception) -> Callable[[], None]:
    def happen() -> None:
        raise error

    return happen


def failures(rank: int, folder: Path) -> dict[str, Any]:
    """What happens to one of them alone, at update 3."""

    class Poisoned(MaskedDiffusionELBO):
        def terms(self, *arguments: Any, **named: Any) -> Any:
            terms = super().terms(*arguments, **named)
            bad = rank == 1 and self.iteration == 3
            return terms._replace(loss=terms.loss * float("nan")) if bad else terms

    def run(name: str, rows: Any = X, elbo: Any = None, **options: Any) -> dict[str, Any]:
        programs = pair()
        settings: dict[str, Any] = dict(batch_size=8, progress=False, monitor_every=None)
        settings |= dict(checkpoint=folder / f"{name}.pt", checkpoint_every=2)
        settings |= options
        elbo = annealed() if elbo is None else elbo
        error = _error(lambda: fit(*programs, elbo, rows, 8, **settings))
        return {**error, "weights": state(*programs)}

    def drifting(parameters: list[Tensor]) -> torch.optim.Optimizer:
        adam = torch.optim.Adam(parameters)
        step = adam.step

        def noisy(*arguments: Any) -> None:
            step(*arguments)
            with torch.no_grad():
                parameters[0].add_(1e-7 * rank)

        adam.step = noisy  # type: ignore[assignment, method-assign]
        return adam

    class Wrong(MaskedDiffusionELBO):
        def terms(self, *arguments: Any, **named: Any) -> Any:
            if rank == 1 and self.iteration == 3:
                raise KeyError("of a program")
            return super().terms(*arguments, **named)

    return {
        "nan": run("nan", elbo=Poisoned(PROCESS)),
        "value": run("value", Following(rank, {3: raising(ValueError("no such rows"))})),
        "program": run("program", elbo=Wrong(PROCESS)),
        "signal": run("signal", Following(rank, {3: signalling(signal.SIGTERM)})),
        "uneven": run("uneven", batch_size=9),
        "uneven_parts": run("uneven_parts", batch_size=18, accumulate=2),
        "unlike": run("unlike", learning_rate=0.1 * (1 + rank)),
        "other_rows": run("other_rows", X[rank:]),
        "few_rows": run("few_rows", lambda n: X[: n - rank]),
        "bad_rows": run("bad_rows", X + 5 * rank),
        "drift": run("drift", optimizer=drifting),
        "in_use": run("in_use", checkpoint=folder / "locked.pt"),
        "damaged": run("damaged", checkpoint=folder / "damaged.pt", resume=True),
        "after_all": {"weights": same_rows()[0]},
    }


def compiled(rank: int, folder: Path) -> dict[str, Any]:
    """Updates as graphs, on the random numbers of the others."""
    found: dict[str, Any] = {}
    warnings.simplefilter("error", RuntimeWarning)  # such as that there is no graph
    for name, graph in (("eager", False), ("graph", True)):
        programs = pair()
        options: dict[str, Any] = dict(batch_size=16, progress=False, ema_decay=0.9, seed=3)
        options |= dict(accumulate=2, monitor_every=None, learning_rate=0.02, compile=graph)
        history = fit(*programs, annealed(), X, 12, **options)
        found[name] = {"weights": state(*programs), "loss": history.loss}
    return found


@contextmanager
def as_traced() -> Iterator[list[warnings.WarningMessage]]:
    """Runs graphs as they were traced, to save the compiler's time; yields what is warned of."""

    def run_as_traced(graph: Any, inputs: Any) -> Any:
        def run(*values: Tensor) -> Any:
            with torch.no_grad():
                return graph(*values)

        return run

    with (
        patch("vadd_pyro.compiled.update.compile_graph", run_as_traced),
        patch.object(torch.nn.Module, "compile", lambda self, options: None),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always", RuntimeWarning)
        yield caught


def given_up(rank: int, folder: Path) -> dict[str, Any]:
    """The loss of the second process changes, and the graphs of both are given up."""
    programs, elbo = pair(), MaskedDiffusionELBO(PROCESS, kl_weight=0.5)
    rows = Following(rank, {4: lambda: setattr(elbo, "kl_weight", 3.0)})
    options: dict[str, Any] = dict(batch_size=16, progress=False, monitor_every=None, seed=3)
    with as_traced() as caught:
        fit(*programs, elbo, rows, 13, **options, compile=True)
    lines = [str(w.message) for w in caught if w.category is RuntimeWarning]
    return {"weights": state(*programs), "lines": lines}


def no_rows(rank: int, folder: Path) -> dict[str, Any]:
    """The second process has no rows for an update before which graphs and programs are compared,
    and in another run for one before which they are not.
    """

    options: dict[str, Any] = dict(batch_size=16, progress=False, monitor_every=None, compile=True)
    found = {}
    for iteration in (9, 10):
        rows = Following(rank, {iteration: raising(ValueError("no such rows"))})
        with as_traced():
            found[iteration] = _error(
                lambda rows=rows: fit(*pair(), annealed(), rows, 13, **options)  # type: ignore[misc]
            )
    return found


TRIALS = (exact, through_memory, other_numbers, resumed, failures, compiled, given_up, no_rows)


def child(rank: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    pyro.settings.set(module_local_params=False)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    found = {}
    for trial in TRIALS:
        if not names or trial.__name__ in names:
            pyro.clear_param_store()
            found[trial.__name__] = trial(rank, folder)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def main() -> int:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    children = []
    for rank in range(2):
        number = os.fork()
        if not number:
            status = 1
            try:
                child(rank, folder, names)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(number)
    ended = [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in children]
    print(json.dumps(ended))
    return max(abs(status) for status in ended)


if __name__ == "__main__":
    sys.exit(main())
