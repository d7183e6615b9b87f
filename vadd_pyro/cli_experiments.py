"""The commands ``vadd-pyro train``, ``evaluate``, ``sample`` and ``infill``."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from functools import partial
from typing import Any

from vadd_pyro.names import (
    BACKBONES,
    DATA_SETS,
    MODELS,
    PRECISIONS,
    TIME_GRIDS,
    check,
    check_preset,
)

__all__ = ["add_commands", "known", "positive", "run", "seed", "separated"]


def positive(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """A seed."""
    if not text.isdecimal() or int(text) >= 2**32 - 10_000:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 on, got {text!r}")
    return int(text)


def separated(text: str) -> list[str]:
    """Names separated by commas."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"expected names separated by commas, got {text!r}")
    return list(dict.fromkeys(names))


def _known(kind: str, name: str) -> str:
    try:
        check(kind, name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def known(kind: str) -> Callable[[str], list[str]]:
    """Type of an argument: names separated by commas, see :func:`vadd_pyro.names.check`."""
    return lambda text: [_known(kind, name) for name in separated(text)]


def _one_or_both(pair: tuple[str, str], text: str) -> list[str]:
    names = separated(text)
    unknown = [name for name in names if name not in pair]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"expected {' or '.join(pair)}, or both, got {unknown[0]!r}"
        )
    return names


def _steps(text: str) -> list[int]:
    return [positive(part) for part in separated(text)]


def _steps_or_none(text: str) -> list[int]:
    return [] if text == "none" else _steps(text)


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip().isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name.strip(), ast.literal_eval(value)
    except (ValueError, SyntaxError):
        known = {"true": True, "false": False, "none": None}
        return name.strip(), known.get(value.lower(), value)


_NUMBER: dict[str, Any] = {"type": positive, "metavar": "N"}
_PAIR: dict[str, Any] = {"type": _pair, "metavar": "NAME=VALUE", "action": "append"}
_STEPS: dict[str, Any] = {"type": _steps, "metavar": "T[,T...]"}


_MEASURES = {
    "bound_steps": "--bound-steps",
    "sample_steps": "--sample-steps",
    "num_rows": "--num-rows",
    "num_particles": "--num-particles",
    "num_paths": "--num-paths",
    "num_samples": "--num-samples",
    "time_grids": "--time-grids",
    "one_token": "--no-one-token",
}
_OWN_OPTIONS = {"sizes": "--size", "data_options": "--data-option", "seed": "--seed"}


def _add_measures(add: Callable[..., Any]) -> None:
    add(
        "--no-one-token",
        dest="one_token",
        action="store_const",
        const=False,
        help="leave out the bound of one token a step",
    )
    add("--bound-steps", type=_steps_or_none, metavar="T[,T...]", help="steps of the bounds")
    add("--sample-steps", type=_steps_or_none, metavar="T[,T...]", help="steps of the samples")
    add("--num-rows", help="test rows on which bounds are taken", **_NUMBER)
    add("--num-particles", help="importance samples per step", **_NUMBER)
    add("--num-paths", help="reveal paths averaged inside the logarithm", **_NUMBER)
    add("--num-samples", help="samples for each number of steps", **_NUMBER)
    add(
        "--time-grids",
        type=partial(_one_or_both, TIME_GRIDS),
        metavar="equal[,best]",
        help="steps of equal length (default), those with the best bound on validation rows, or "
        "both, side by side",
    )


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train VADD or the masked diffusion model on tables, images or text",
        description="Train a model on real data. What is not named comes from the preset. The "
        "same command goes on where a killed run stopped. Under torchrun several "
        "processes train one model together.",
        epilog="Examples: vadd-pyro train digits; vadd-pyro train table debd/nltcs --model "
        "vadd,mdm --seeds 3 --evaluate; vadd-pyro train text book.txt --prior standard_normal; "
        "torchrun --nproc-per-node=2 -m vadd_pyro train digits. "
        "Names of priors, guides and times: vadd-pyro compare --list.",
    )
    add = train.add_argument
    add("data", choices=DATA_SETS, help="what to train on")
    add("path", nargs="?", help="file or folder of the data; by default the loader's own")
    add(
        "--model",
        type=partial(_one_or_both, MODELS),
        default=["vadd"],
        metavar="vadd|mdm",
        help="vadd, mdm or both",
    )
    add("--preset", default="laptop", metavar="NAME", help="sizes and schedule; default laptop")
    add("--prior", type=partial(_known, "priors"), metavar="NAME", help="law of the latent")
    add("--guide", type=partial(_known, "guides"), metavar="NAME", help="recognition network")
    add("--times", type=partial(_known, "times"), metavar="NAME", help="where training looks")
    add("--backbone", choices=BACKBONES, help="what the networks are made of")
    add("--num-iterations", help="updates by the DELBO", **_NUMBER)
    add("--batch-size", help="rows per update", **_NUMBER)
    add("--learning-rate", type=float, metavar="X", help="step size of Adam")
    add("--latent-dim", help="size of a continuous latent", **_NUMBER)
    add("--num-codes", help="codes of a categorical one", **_NUMBER)
    add("--precision", choices=PRECISIONS, help="of the networks")
    add("--size", help="argument of the networks, such as hidden_dim=512", **_PAIR)
    add("--data-option", help="argument of the loader, such as length=64", **_PAIR)
    add("--set", help="any other setting, such as num_chain_iterations=500", **_PAIR)
    add("--seed", type=seed, default=0, help="first seed")
    add("--seeds", default=1, help="number of seeds", **_NUMBER)
    add("--threads", help="threads of torch; by default its own choice", **_NUMBER)
    _add_device(add)
    add("--out", default="runs/train", metavar="RUN", help="run folder; default runs/train")
    add("--checkpoint-every", default=250, help="updates between checkpoints", **_NUMBER)
    add("--accumulate", default=1, help="parts of a batch, one in memory at a time", **_NUMBER)
    add("--evaluate", action="store_true", help="measure the result, as vadd-pyro evaluate does")
    _add_measures(add)
    add("--no-progress", action="store_true", help="no progress bars")


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="bounds on the likelihood and the quality of samples of trained models",
        description="Measure all runs in the folders named, and below them: T-step bounds on test "
        "rows with standard errors, and samples of few steps against real rows. Writes "
        "evaluation.json (of the best time grids evaluation_best.json) beside each run, and "
        "summary.md and quality.png of all together.",
    )
    add = evaluate.add_argument
    add("run", nargs="+", metavar="RUN", help="run folders, or folders of them; of one data set")
    add("--out", metavar="FOLDER", help="where the report goes; by default the first RUN")
    _add_places(add)
    _add_measures(add)
    add("--no-progress", action="store_true", help="no progress bars")


def _add_sample(commands: Any) -> None:
    sample = commands.add_parser(
        "sample",
        help="draw from a trained model: a sheet of pictures, or text",
        description="Draw rows with each number of steps. Pictures go to samples.png, text is "
        "shown, and all rows are written.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = sample.add_argument
    add("run", metavar="RUN", help="run folder")
    add("--num-steps", default=[1, 2, 4, 8], help="network calls", **_STEPS)
    add("--num-samples", default=16, help="rows for each", **_NUMBER)
    add("--latent", choices=("fresh", "shared"), default="fresh", help="one latent a step, or one")
    add("--order", default="random", help="random, confidence or entropy")
    add("--latent-temperature", type=float, default=1.0, metavar="X", help="spread of latents")
    add(
        "--time-grids",
        choices=TIME_GRIDS,
        default="equal",
        help="steps of equal length, or those with the best bound on validation rows, by fresh "
        "latents and the random order; default equal",
    )
    _add_common(add)


def _add_infill(commands: Any) -> None:
    infill = commands.add_parser(
        "infill",
        help="complete partly given rows: half an image, a gap in a sentence",
        description="Complete one row that is written out, or test rows of which an area is open.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = infill.add_argument
    add("run", metavar="RUN", help="run folder")
    add("--row", help="text with _ at open places, or values separated by commas, ? for open ones")
    add(
        "--area", default="lower", help="open area of test rows: lower, upper, left, right, middle"
    )
    add("--num-rows", default=4, help="how many test rows", **_NUMBER)
    add("--num-completions", default=8, help="of each row", **_NUMBER)
    add("--num-steps", default=16, help="network calls", **_NUMBER)
    add(
        "--weighted",
        action="store_true",
        help="by the sampler's joint law, with importance weights",
    )
    add("--num-particles", default=1024, help="of the weighted kind", **_NUMBER)
    _add_common(add)


def _add_common(add: Callable[..., Any]) -> None:
    add("--seed", type=seed, default=0, help="of the draws")
    add("--out", metavar="FOLDER", help="where files go; by default RUN")
    _add_places(add)


def _add_places(add: Callable[..., Any]) -> None:
    add("--path", help="where the data are now, if they have moved")
    _add_device(add)


def _add_device(add: Callable[..., Any]) -> None:
    add("--device", metavar="NAME", help="such as cpu or cuda; a GPU if there is one")


def add_commands(commands: Any) -> None:
    """Add the four to the subparsers of the command line."""
    _add_train(commands)
    _add_evaluate(commands)
    _add_sample(commands)
    _add_infill(commands)


def _measures(arguments: argparse.Namespace, data: str) -> dict[str, Any]:
    """Options of the evaluation: those named, and the data's own."""
    from vadd_pyro.experiments.presets import measures

    options = measures(data)
    given = {name: getattr(arguments, name) for name in _MEASURES}
    return options | {name: value for name, value in given.items() if value is not None}


def _train(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    given: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in (
            *("prior", "guide", "times", "backbone", "num_iterations", "batch_size"),
            *("learning_rate", "latent_dim", "num_codes", "precision"),
        )
        if getattr(arguments, name) is not None
    }
    for name, value in arguments.set or []:
        if name in ("data", "path", "model") or name in _OWN_OPTIONS:
            where = _OWN_OPTIONS.get(name, "an argument of its own")
            parser.error(f"--set {name} cannot be given: there is {where}")
        given[name] = value
    if not arguments.evaluate:
        for name, option in _MEASURES.items():
            if getattr(arguments, name) is not None:
                parser.error(f"{option} needs --evaluate")
    try:
        check_preset(arguments.data, arguments.preset)
    except ValueError as error:
        parser.error(str(error))

    import torch

    from vadd_pyro.allocation import keep_freed_memory
    from vadd_pyro.experiments.commands import run_train
    from vadd_pyro.experiments.presets import preset

    try:
        settings = [
            preset(
                arguments.data,
                arguments.path,
                arguments.preset,
                model,
                sizes=dict(arguments.size or []),
                data_options=dict(arguments.data_option or []),
                seed=arguments.seed,
                **given,
            )
            for model in arguments.model
        ]
        measure = _measures(arguments, arguments.data) if arguments.evaluate else None
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    run_train(
        settings,
        arguments.out,
        arguments.seeds,
        measure=measure,
        checkpoint_every=arguments.checkpoint_every,
        accumulate=arguments.accumulate,
        device=_device(arguments),
        progress=not arguments.no_progress,
    )
    return 0


def _device(arguments: argparse.Namespace) -> str:
    """The device that was named, or the GPU where there is one."""
    import torch

    if arguments.device is not None:
        return str(arguments.device)
    return "cuda" if torch.cuda.is_available() else "cpu"


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int | None:
    """Run the command if it is one of these, and return the exit status."""
    if arguments.command == "train":
        return _train(arguments, parser)
    if arguments.command not in ("evaluate", "sample", "infill"):
        return None
    from vadd_pyro.experiments import commands
    from vadd_pyro.experiments.store import data_of
    from vadd_pyro.runs import find_runs

    if arguments.command == "evaluate":
        text = commands.run_evaluate(
            arguments.run,
            arguments.out,
            _measures(arguments, data_of(find_runs(arguments.run[0])[0])["data"]),
            path=arguments.path,
            device=_device(arguments),
            progress=not arguments.no_progress,
        )
    elif arguments.command == "sample":
        text = commands.run_sample(
            arguments.run,
            arguments.out,
            arguments.num_samples,
            arguments.num_steps,
            path=arguments.path,
            device=_device(arguments),
            latent=arguments.latent,
            order=arguments.order,
            latent_temperature=arguments.latent_temperature,
            time_grids=arguments.time_grids,
            seed=arguments.seed,
        )
    else:
        text = commands.run_infill(
            arguments.run,
            arguments.out,
            row=arguments.row,
            area=arguments.area,
            num_rows=arguments.num_rows,
            num_completions=arguments.num_completions,
            num_steps=arguments.num_steps,
            weighted=arguments.weighted,
            num_particles=arguments.num_particles,
            seed=arguments.seed,
            path=arguments.path,
            device=_device(arguments),
        )
    print(text)
    return 0
