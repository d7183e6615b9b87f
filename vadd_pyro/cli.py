"""The command ``vadd-pyro``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

__all__ = ["main"]

_PRIORS = ("none", "standard_normal", "conditional_normal", "mixture_of_normals", "categorical")
_TOYS = (
    "checkerboard",
    "circles",
    "eight_modes",
    "moons",
    "pinwheel",
    "swiss_roll",
    "swiss_roll_es",
    "two_spirals",
)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32 - 10_000:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 on, got {text!r}")
    return int(text)


def _priors(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in _PRIORS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"expected names from {', '.join(_PRIORS)}, separated by commas, got {text!r}"
        )
    return list(dict.fromkeys(names))


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
    demo.add_argument("--data", choices=_TOYS, default="checkerboard", help="toy density")
    demo.add_argument(
        "--priors",
        type=_priors,
        default="none,standard_normal,categorical",
        metavar="NAME[,NAME...]",
        help=f"latent priors to compare, from {', '.join(_PRIORS)}",
    )
    demo.add_argument(
        "--num-iterations",
        type=_positive,
        default=None,
        metavar="N",
        help="updates per model; by default each prior's own",
    )
    demo.add_argument("--seed", type=_seed, default=0, help="seed of data, weights and training")
    demo.add_argument("--out", default="demo", metavar="FOLDER", help="where the results go")
    demo.add_argument("--no-progress", action="store_true", help="no progress bars")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    from vadd_pyro.demo import run_demo

    try:
        run_demo(
            arguments.data,
            arguments.priors,
            arguments.num_iterations,
            arguments.seed,
            arguments.out,
            progress=not arguments.no_progress,
        )
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"vadd-pyro: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vadd-pyro: interrupted", file=sys.stderr)
        return 130
    return 0
