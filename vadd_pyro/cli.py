"""The command ``vadd-pyro``.

Arguments are parsed without torch, which takes seconds to load: each command imports what it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from vadd_pyro import cli_experiments
from vadd_pyro.cli_experiments import known, positive, seed
from vadd_pyro.interruption import Interrupted, terminable
from vadd_pyro.names import TOYS, list_names

__all__ = ["main"]


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def _add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="train a grid of models on data with known laws; write tables and figures",
        description="Train every combination of data, priors, guides, objectives, times and "
        "seeds; measure each against the known law of its data at 1, 2, 4, 8 steps; write "
        "results.csv, results.json, summary.md and figures. The same command goes on where a "
        "killed run stopped, and a larger grid adds to a smaller one. Exit status: 0 if all cells "
        "are finished, 1 if some failed (the others are finished all the same) or the folder "
        "cannot be used, 2 for bad arguments, 130 if interrupted, 143 if terminated.",
        epilog="Names of priors, guides, objectives and times are listed by --list; an import "
        "path such as mypkg.mine:MyPrior stands for something of your own.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = compare.add_argument
    for kind, default, text in (
        ("data", "checkerboard,swiss_roll,d2", "toys, d1, d2, tied_bits"),
        ("priors", "none,standard_normal,categorical", "laws of the latent"),
        ("guides", "auto", "recognition networks"),
        ("objectives", "delbo", "what is optimised"),
        ("times", "balanced", "where training looks"),
    ):
        add(f"--{kind}", type=known(kind), default=default, metavar="NAME[,NAME...]", help=text)
    number: dict[str, Any] = {"type": positive, "metavar": "N"}
    add("--seeds", default=3, help="number of seeds, counted from 0", **number)
    add("--num-iterations", help="updates per model; by default each prior's own", **number)
    add("--learning-rate", type=_rate, default=2e-3, metavar="X", help="step size of Adam")
    add("--batch-size", default=256, help="rows per update", **number)
    add("--latent-dim", default=2, help="size of continuous latents", **number)
    add("--num-codes", default=64, help="codes of categorical latents", **number)
    add("--vocab-size", default=100, help="bins per axis of the toys", **number)
    add("--num-held-out", default=1000, help="rows on which bounds are taken", **number)
    add("--checkpoint-every", default=250, help="updates between checkpoints", **number)
    add("--threads", help="threads of torch; by default its own choice", **number)
    add("--out", default="runs/compare", metavar="FOLDER", help="where the results go")
    add("--no-progress", action="store_true", help="no progress bars")
    add("--report-only", action="store_true", help="tables and figures of the results at hand")
    add("--list", action="store_true", help="list the names and end")


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="what the latent of a trained model knows, and whether its guide can be trusted",
        description="From a run folder of demo, compare or train to a page: is the latent "
        "used, what does it couple and encode, does the aggregate posterior fill the prior, can "
        "the guide be trusted, what does the model write. Writes report.html with its figures, "
        "posterior.nc for ArviZ and inspection.json. A folder that holds several runs has all of "
        "them inspected.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    inspect.add_argument("run", metavar="RUN", help="folder with run.pt in it or below")
    inspect.add_argument(
        "--out", metavar="FOLDER", help="where the report goes; by default RUN/inspection"
    )
    inspect.add_argument("--path", help="where the data are now, if they have moved")
    number: dict[str, Any] = {"type": positive, "metavar": "N"}
    inspect.add_argument("--num-rows", default=1000, help="rows of fresh data", **number)
    inspect.add_argument("--num-draws", default=500, help="draws of each posterior", **number)
    inspect.add_argument(
        "--num-reference-rows", default=6, help="rows whose posterior NUTS samples", **number
    )
    inspect.add_argument("--seed", type=seed, default=0, help="seed of data and draws")
    inspect.add_argument("--no-progress", action="store_true", help="no progress bars")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vadd-pyro",
        description="Latent-variable discrete diffusion as probabilistic programs.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="train on a toy density and show what a latent does for few-step samples",
        description="Train the masked diffusion model and VADD under several priors on a toy "
        "density; print exact "
        "distances to the data at 1, 2, 4, 8 steps, write results.json and a figure.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--data", choices=TOYS, default="checkerboard", help="toy density")
    demo.add_argument(
        "--priors",
        type=known("priors"),
        default="none,standard_normal,categorical",
        metavar="NAME[,NAME...]",
        help="latent priors to compare; 'vadd-pyro compare --list' lists them",
    )
    demo.add_argument(
        "--num-iterations",
        type=positive,
        default=None,
        metavar="N",
        help="updates per model; by default each prior's own",
    )
    demo.add_argument("--seed", type=seed, default=0, help="seed of data, weights and training")
    demo.add_argument("--out", default="demo", metavar="FOLDER", help="where the results go")
    demo.add_argument("--no-progress", action="store_true", help="no progress bars")
    _add_compare(commands)
    _add_inspect(commands)
    cli_experiments.add_commands(commands)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from vadd_pyro.demo import run_demo

    run_demo(
        arguments.data,
        arguments.priors,
        arguments.num_iterations,
        arguments.seed,
        arguments.out,
        progress=not arguments.no_progress,
    )
    return 0


def _compare(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if arguments.list:
        print(list_names())
        return 0
    from vadd_pyro import compare

    if arguments.report_only:
        print(compare.report_folder(arguments.out))
        return 0
    try:
        cells = compare.grid(
            arguments.data,
            arguments.priors,
            arguments.guides,
            arguments.objectives,
            arguments.times,
            arguments.seeds,
        )
        settings = compare.Settings(
            num_iterations=arguments.num_iterations,
            learning_rate=arguments.learning_rate,
            batch_size=arguments.batch_size,
            latent_dim=arguments.latent_dim,
            num_codes=arguments.num_codes,
            vocab_size=arguments.vocab_size,
            num_held_out=arguments.num_held_out,
        )
    except ValueError as error:
        parser.error(str(error))
    failed = compare.run_grid(
        cells,
        settings,
        arguments.out,
        threads=arguments.threads,
        checkpoint_every=arguments.checkpoint_every,
        progress=not arguments.no_progress,
    )
    if failed:
        print(f"vadd-pyro: {len(failed)} of {len(cells)} cells failed", file=sys.stderr)
    return 1 if failed else 0


def _inspect(arguments: argparse.Namespace) -> int:
    from vadd_pyro.experiments.commands import run_inspect
    from vadd_pyro.experiments.store import is_experiment
    from vadd_pyro.runs import find_runs, inspect_run

    runs = find_runs(arguments.run)
    if len(runs) > 1 and arguments.out is not None:
        raise ValueError(
            f"--out is one folder, but {arguments.run} holds {len(runs)} runs: name one of "
            + ", ".join(str(run) for run in runs)
        )
    failed = 0
    for folder in runs:
        try:
            inspect: Any = inspect_run
            if is_experiment(folder):
                inspect = partial(run_inspect, path=arguments.path)
            print(
                inspect(
                    folder,
                    arguments.out,
                    num_rows=arguments.num_rows,
                    num_draws=arguments.num_draws,
                    num_reference_rows=arguments.num_reference_rows,
                    seed=arguments.seed,
                    progress=not arguments.no_progress,
                )
            )
        except (ValueError, OSError, ArithmeticError) as error:  # the other runs go on
            print(f"vadd-pyro: {folder}: {error}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


def _run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if arguments.command != "train" and _num_processes() > 1:
        raise ValueError(
            f"{arguments.command} is the work of one process, and torchrun has started "
            f"{_num_processes()}: expected vadd-pyro {arguments.command} without torchrun"
        )
    if arguments.command == "compare":
        return _compare(arguments, parser)
    if arguments.command == "inspect":
        return _inspect(arguments)
    status = cli_experiments.run(arguments, parser)
    return _demo(arguments) if status is None else status


def _num_processes() -> int:
    """How many torchrun has started, this one among them."""
    number = os.environ.get("WORLD_SIZE", "1")
    return int(number) if "RANK" in os.environ and number.isdecimal() else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = _parser()
    try:
        with terminable():
            try:
                return _run(parser.parse_args(argv), parser)
            except (Exception, KeyboardInterrupt) as error:
                if (status := _tell(error)) is None:
                    raise
                return status
    except Interrupted as stop:  # while something else was told
        return _tell(stop) or stop.exit_status


def _tell(error: BaseException) -> int | None:
    """Say in a line what has ended a command; the exit status, or None if it needs a traceback."""
    if isinstance(error, Interrupted):
        error = _before(error)
    if isinstance(error, Interrupted):
        more = "" if error.checkpoint is None else "; the same command goes on from there"
        if os.environ.get("RANK", "0") == "0":  # of processes that torchrun has started
            print(f"vadd-pyro: {error}{more}", file=sys.stderr)
        return error.exit_status
    if isinstance(error, KeyboardInterrupt):
        print("vadd-pyro: interrupted", file=sys.stderr)
        return 130
    known = (ValueError, OSError, ArithmeticError, ImportError)
    if isinstance(error, known) or _of_another_process(error):
        print(f"vadd-pyro: {error}", file=sys.stderr)
        return 1
    return None


def _before(stop: Interrupted) -> BaseException:
    """What was ending the command when a signal came: where one of its processes fails or stops,
    torchrun sends the others SIGTERM.
    """
    found: BaseException | None = stop
    while found is not None:
        kept = isinstance(found, Interrupted) and found.iteration is not None
        if kept or _of_another_process(found):
            return found
        found = found.__context__
    return stop


def _of_another_process(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    from vadd_pyro.distributed import OtherProcessError  # takes torch, which this error has

    return isinstance(error, OtherProcessError)
