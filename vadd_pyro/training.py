r"""Training a step program and its guide: one torch optimiser over the differentiable loss.

The loop does what a toy run needs and a long one relies on: warm-up and decay of the learning
rate, clipping, an exponential average of the weights :math:`\bar\theta \leftarrow \beta \bar\theta
+ (1 - \beta) \theta`, a progress bar, checkpoints, and a resume that continues bit for bit on the
CPU. ``pyro.infer.SVI`` trains the same pair; :func:`fit` is faster and keeps more.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from inspect import isfunction
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from vadd_pyro.batches import Batches, DrawnBatches, share_of
from vadd_pyro.checkpoints import (
    CheckpointWriteError,
    check_space,
    check_writable,
    newest_checkpoint,
    random_state,
    remove_stale,
    restore_random_state,
)
from vadd_pyro.distributed import OtherProcessError, Processes
from vadd_pyro.elbo import MaskedDiffusionELBO
from vadd_pyro.finite import NonFiniteLossError
from vadd_pyro.history import History
from vadd_pyro.interruption import Interrupted, StopRequest
from vadd_pyro.locks import locked
from vadd_pyro.monitor import Monitor
from vadd_pyro.process import check_size
from vadd_pyro.programs import check_store, kept_modes
from vadd_pyro.trainer import Run
from vadd_pyro.weights import Weights

__all__ = ["History", "NonFiniteLossError", "fit", "fit_guide"]


def _check_arguments(**arguments: Any) -> None:
    for name in ("num_iterations", "batch_size", "log_every", "checkpoint_every", "accumulate"):
        check_size(name, arguments[name])
    check_size("monitor_rows", arguments["monitor_rows"], least=2)
    if arguments["monitor_every"] is not None:
        check_size("monitor_every", arguments["monitor_every"])
    for name in ("learning_rate", "final_learning_rate", "clip_norm", "ema_decay"):
        value = arguments[name]
        if value is not None and not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {value!r}")
    seed = arguments["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer in 0..2**32 - 1, got {seed!r}")
    if not arguments["learning_rate"] > 0:
        raise ValueError(f"learning_rate must be positive, got {arguments['learning_rate']!r}")
    if not 0 <= arguments["final_learning_rate"] <= 1:
        raise ValueError(
            "final_learning_rate is a share of learning_rate and must lie in [0, 1], got "
            f"{arguments['final_learning_rate']!r}"
        )
    if not 0 <= arguments["warmup"] <= arguments["num_iterations"]:
        raise ValueError(
            f"warmup must lie between 0 and num_iterations = {arguments['num_iterations']}, got "
            f"{arguments['warmup']!r}"
        )
    if arguments["decay"] not in ("constant", "cosine", "linear"):
        raise ValueError(
            f"decay must be 'constant', 'cosine' or 'linear', got {arguments['decay']!r}"
        )
    if arguments["precision"] not in ("float32", "bfloat16"):
        raise ValueError(
            f"precision must be 'float32' or 'bfloat16', got {arguments['precision']!r}"
        )
    clip, ema = arguments["clip_norm"], arguments["ema_decay"]
    if clip is not None and not clip > 0:
        raise ValueError(f"clip_norm must be positive or None, got {clip!r}")
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"ema_decay must lie in (0, 1) or be None, got {ema!r}")
    if not isinstance(arguments["compile"], bool):
        raise ValueError(f"compile must be True or False, got {arguments['compile']!r}")
    if arguments["resume"] and arguments["checkpoint"] is None:
        raise ValueError("resume=True needs the checkpoint to resume from")


def _fingerprint(elbo: MaskedDiffusionELBO) -> str:
    """What a loss is made of, as a text that a resumed run must repeat."""
    schedule = elbo.process.schedule
    alpha = schedule.alpha(torch.linspace(0, 1, 17, dtype=torch.double))
    weight: Any = elbo.kl_weight
    if isfunction(weight) or (callable(weight) and type(weight).__repr__ is object.__repr__):
        weight = getattr(weight, "__qualname__", type(weight).__qualname__)
    parts = [
        elbo.process,
        [round(a, 9) for a in alpha.tolist()],
        elbo.objective,
        elbo.times,
        weight,
        elbo.num_particles,
        elbo.importance_weighted,
    ]
    # Named where they are in use, so that checkpoints from before there were such options fit.
    if elbo.doubly_reparameterized:
        parts.append("doubly reparameterized")
    if elbo.renyi_alpha is not None:
        parts.append(f"renyi_alpha={float(elbo.renyi_alpha)!r}")
    if elbo.free_bits:
        parts.append(f"free_bits={float(elbo.free_bits)!r}")
    if elbo.least_time:
        parts.append(f"least_time={elbo.least_time!r}")
    if elbo.kept_rows.drop:
        parts.append("drop_empty_rows")
    return repr(tuple(parts))


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    elbo: MaskedDiffusionELBO,
    data: Tensor | Callable[[int], Tensor],
    num_iterations: int = 5000,
    *,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    warmup: int = 0,
    decay: str = "cosine",
    final_learning_rate: float = 0.0,
    clip_norm: float | None = 1.0,
    ema_decay: float | None = None,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    precision: str = "float32",
    compile: bool = False,
    accumulate: int = 1,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1000,
    resume: bool = False,
    log_every: int = 50,
    monitor_every: int | None = 500,
    monitor_rows: int = 256,
    progress: bool = True,
    description: str = "fit",
) -> History:
    """Train a step program and its guide.

    The pair is run once before the first update, which finds bad programs and all parameters:
    those that a program names to Pyro only later are not trained, and a ``data`` function is
    called once more than there are updates.

    In a process group of torch (as ``torchrun`` makes for ``vadd-pyro train``) all processes call
    this alike and train one pair together: each takes its share of every batch, gradients are
    averaged, and the first writes the checkpoints and shows the bar. See docs/scaling.md.

    Args:
        model, guide: the pair; modules, or functions whose parameters live in Pyro's store.
        elbo: the loss.
        data: clean tokens ``(N, D)``, or a function ``data(batch_size) -> (batch_size, D)`` that
            draws fresh rows. One with a method ``at(iteration, batch_size)``, such as those of
            ``DataSet.batches``, is resumed exactly.
        num_iterations: number of updates in all, those before a resume included.
        batch_size: rows per update, of all processes together.
        learning_rate: step size of Adam after the warm-up.
        warmup: updates of linear warm-up.
        decay: ``"cosine"``, ``"linear"`` or ``"constant"``, to ``final_learning_rate`` times the
            step size.
        final_learning_rate: share of the step size left at the end.
        clip_norm: largest norm of the gradient of the mean loss per row; None does not clip.
        ema_decay: decay of the exponential average of weights, such as 0.999. The programs are
            left with the averaged weights at the end; the raw ones stay in the checkpoint.
        optimizer: makes another torch optimiser of the list of parameters; its step size is then
            scheduled relative to its own.
        precision: ``"bfloat16"`` runs the programs under autocast, with weights, averages and
            optimiser as they are; about 1.5 times as fast on processors that have such products.
        compile: run each update as one compiled graph (:mod:`vadd_pyro.compiled`), on the same
            random numbers. It takes some seconds to half a minute to start. Where the programs do
            not allow it, or are found to have changed since, their networks alone are compiled,
            and a warning says why; batches of another size run uncompiled.
        accumulate: into how many parts a process divides its rows, to hold one of them in memory
            at a time; the mean of their gradients makes the update. ``batch_size`` must be a
            multiple of processes times parts.
        seed: seed of all random draws in training and of the order of the data; with the number of
            the process, of each process's own draws.
        checkpoint: file that holds the newest state, written every ``checkpoint_every`` updates
            and at the end; the one before stays beside it, as ``checkpoint`` with ``.previous``
            behind its name. Other processes are kept out of it meanwhile.
        checkpoint_every: updates between two of them.
        resume: continue from ``checkpoint`` if it exists, in as many processes as wrote it bit for
            bit on the CPU; in another number of them with other random numbers, and a warning.
        log_every: updates between entries of the history.
        monitor_every: updates between two looks at the latents (and one at the end), which enter
            the history: see :func:`vadd_pyro.latent_statistics`. None takes none. They leave the
            training as it is (except batch statistics of modules that a plain function uses by
            name), and see the weights of the moment, not their average.
        monitor_rows: how many rows of the data they are taken on, the same in the whole run, all
            masked; a ``data`` function gives those of its first batch at most.
        progress: whether to show a progress bar.
        description: what the bar calls the run.

    Returns:
        :class:`History` of the whole run.

    Raises:
        ValueError: for bad arguments or data, before anything is trained; for a checkpoint of
        another run, or a damaged one (DamagedCheckpointError, which says how to go on from the
        one before); if another process trains into it (InUseError).
        CheckpointWriteError: if the disk has no room for the checkpoints, or no more; the last one
        is intact, and the programs are left as at the end.
        NonFiniteLossError: naming the iteration and the term or parameter; the programs hold the
        weights before that update, and the checkpoint on disk is the last good one.
        Interrupted: a KeyboardInterrupt, after SIGINT or SIGTERM; the update was finished, a
        checkpoint written, and the programs are left as at the end. A second Ctrl-C stops at once.
        OtherProcessError: if another process has failed, or ended, otherwise than by one of these.
        ProcessesDifferError: if processes have not called this alike, or their weights differ.
    """
    arguments = {k: v for k, v in locals().items() if k not in ("model", "guide", "elbo", "data")}
    processes = Processes.current()
    with processes.together():
        _check_arguments(**arguments)
        weights = Weights(model, guide)
        check_store(model, guide)
        device = next((p.device for p in weights.values()), torch.empty(0).device)
        processes.check_device(device)
        batches, fingerprint = _batches(
            elbo, data, batch_size, seed, device, accumulate, processes
        )
    configuration = {
        "num_iterations": num_iterations,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "warmup": warmup,
        "decay": decay,
        "final_learning_rate": final_learning_rate,
        "clip_norm": clip_norm,
        "ema_decay": ema_decay,
        "seed": seed,
        "data": fingerprint,
        "objective": _fingerprint(elbo),
    }
    if precision != "float32":  # named where in use, so that older checkpoints fit
        configuration["precision"] = precision
    if compile:
        configuration["compile"] = True
    path = None if checkpoint is None else Path(checkpoint)
    processes.check_alike(
        {
            **configuration,
            "compile": compile,
            "precision": precision,
            "accumulate": accumulate,
            "checkpoint": path is not None,
            "checkpoint_every": checkpoint_every,
            "resume": resume,
        }
    )
    num_entries = num_iterations // log_every + num_iterations // (monitor_every or num_iterations)
    outside = random_state()
    with ExitStack() as stack:
        with processes.together():
            if path is not None and processes.first:
                check_writable(path)
                lock = path.with_name(f"{path.name}.lock")
                stack.enter_context(locked(lock, f"on {path}", "name another file"))
                remove_stale(path.parent, path.name)
        stack.callback(restore_random_state, outside)
        stack.enter_context(kept_modes(model, guide))
        stop = stack.enter_context(StopRequest())
        processes.asked = lambda: stop.by is not None
        pyro.set_rng_seed(processes.seed(seed))
        looks = monitor_every is not None and processes.first
        monitor = Monitor(elbo, monitor_rows, seed) if looks else None
        run = Run(
            model, guide, elbo, weights, batches, configuration, monitor, processes, accumulate
        )
        run.prepare(optimizer)
        if path is not None:
            newest = processes.by_first(partial(newest_checkpoint, path)) if resume else None
            if newest is not None:
                run.load(newest, device)
            num_saves = -(-(num_iterations - run.iteration) // checkpoint_every)
            with processes.together():
                if processes.first:
                    check_space(path, run.checkpoint_size(num_entries), num_saves)
        if compile and run.iteration < num_iterations:
            run.compile(stack)
        bar = tqdm(
            total=num_iterations,
            initial=run.iteration,
            desc=description,
            disable=not (progress and processes.first),
            mininterval=0.5,
            dynamic_ncols=True,
        )
        try:
            while run.iteration < num_iterations and not processes.stopping:
                run.step()
                bar.update(1)
                if run.iteration % log_every == 0 or run.iteration == num_iterations:
                    run.log()
                    bar.set_postfix(loss=f"{run.smooth_loss:.3f}", kl=f"{run.smooth_kl:.3f}")
                if monitor_every is not None and (
                    run.iteration % monitor_every == 0 or run.iteration == num_iterations
                ):
                    run.observe()
                if path is not None and run.iteration % checkpoint_every == 0:
                    run.save(path)
            if path is not None and run.iteration:
                run.save(path)
        except CheckpointWriteError:
            run.finish()
            raise
        except OtherProcessError as error:
            if run.saved is None:
                raise
            kept = f"{run.saved[0]} was kept at iteration {run.saved[1]}"
            raise OtherProcessError(f"{error}; {kept}") from error
        finally:
            bar.close()
        run.finish()
        history = processes.broadcast(run.history)
        # A signal to one of them, even after the last update, is one to all.
        by = next(filter(None, processes.gather(stop.by)), None)
    if by is not None:
        raise Interrupted(by, run.iteration, None if run.saved is None else run.saved[0])
    return history


def _batches(
    elbo: MaskedDiffusionELBO,
    data: Tensor | Callable[[int], Tensor],
    batch_size: int,
    seed: int,
    device: torch.device,
    accumulate: int,
    processes: Processes,
) -> tuple[Batches | DrawnBatches, str]:
    """This process's rows of the batches, and what a resumed run must find again."""
    check = elbo.process.check_tokens
    rank, size = processes.rank, processes.size
    share = share_of(batch_size, rank, size, accumulate)
    if isinstance(data, Tensor):
        fingerprint = f"{len(data)} rows, crc32 {zlib.crc32(data.cpu().numpy().tobytes()):08x}"
        return Batches(check(data, "data"), batch_size, seed, device, share), fingerprint
    if not callable(data):
        raise TypeError(
            f"data must be a tensor of tokens or a function of the batch size, got "
            f"{type(data).__name__}"
        )
    exact = size * accumulate > 1
    check_rows = partial(check, name="data")
    batches = DrawnBatches(data, batch_size, check_rows, device, rank, size, exact)
    return batches, getattr(data, "fingerprint", "drawn by a function")


def fit_guide(
    model: Callable[..., Any],
    guide: nn.Module,
    elbo: MaskedDiffusionELBO,
    data: Tensor | Callable[[int], Tensor],
    num_iterations: int = 1000,
    **options: Any,
) -> History:
    """Train the guide alone, the model held fixed.

    A guide trained by the DELBO has seen targets that are all of what is masked, and no others.
    Refitting it with ``MaskedDiffusionELBO(process, "chain", times=GridTimes(...))`` before
    :func:`vadd_pyro.log_likelihood_bound` tightens the bound; the model, and so the sampler, stays
    as it is.

    Args:
        model: the model; a module whose parameters are frozen meanwhile.
        guide: the guide, a module with parameters.
        elbo, data, num_iterations, options: as in :func:`fit`.
    """
    if not isinstance(model, nn.Module) or not isinstance(guide, nn.Module):
        raise TypeError("fit_guide needs torch modules, whose parameters it can tell apart")
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if {id(p) for p in frozen} & {id(p) for p in guide.parameters()}:
        raise ValueError(
            "model and guide share parameters, so that the guide cannot be trained with the model "
            "held fixed: refit copy.deepcopy(guide) instead"
        )
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        return fit(model, guide, elbo, data, num_iterations, **options)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
