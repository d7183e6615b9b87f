"""How time grows with rows, positions, tokens, steps, codes and particles.

    python benchmarks/growth.py [--factors rows,steps] [--points 5] [--rounds 7] [--no-compile]
                                [--json FILE] [--figure FILE]

One base (``BASE``, perceptrons), and one factor at a time. Timed are training steps by hand, with
the package and with the package's whole update as one graph; for the number of steps ``T`` a
sampling pass, beside the naive sampler of ``sampling.py``, and the T-step bound. Variants take
turns, one thread; figures are medians over the rounds, in seconds that the processor spent on the
process. Codes are summed out, which is no graph. With several particles the package estimates the
KL by draws, where the step by hand keeps its closed form.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from common import medians
from hand import code_loss, normal_loss, optimiser, plain, training_step
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator
from package import graph_step, program_step
from sampling import Bare, naive_sampler
from torch import Tensor, nn

from vadd_pyro import (
    MaskedDiffusionELBO,
    MaskingProcess,
    guides,
    log_likelihood_bound,
    models,
    sample,
)
from vadd_pyro.nn import MLPDecoder, MLPEncoder
from vadd_pyro.plotting import save_figure
from vadd_pyro.plotting.style import COLORS, INK, LINES, MARKERS, SMALL, frame

ROUND = 0.1  # seconds that a variant takes in a round, at least
DRAWN, SCORED = 1000, 64  # rows of a sampling pass, and of a bound


class Point(NamedTuple):
    """What is trained on, sampled or scored; ``codes`` 0 for a normal latent."""

    rows: int = 256
    positions: int = 16
    tokens: int = 32
    particles: int = 1
    codes: int = 0
    steps: int = 8


BASE = Point()
WIDTHS: dict[str, Any] = dict(hidden_dim=128, num_layers=3, embedding_dim=8)
LATENT_DIM = 8
FACTORS = {
    "rows": (16, 64, 256, 1024, 4096),
    "positions": (4, 16, 64, 256, 1024),
    "tokens": (8, 32, 128, 512, 2048),
    "steps": (1, 4, 16, 64, 256),
    "codes": (2, 8, 32, 128),
    "particles": (1, 4, 16, 64, 256),
}
LETTERS = dict(rows="B", positions="D", tokens="K", steps="T", codes="C", particles="P")
LABELS = {
    "hand": "hand-written step",
    "package": "package",
    "compiled": "package, one graph",
    "naive": "naive sampler",
    "sample": "sampling",
    "bound": "T-step bound",
}


def training(point: Point, compiled: bool) -> dict[str, Callable[[], Any]]:
    """Training steps on equal networks and rows."""
    process = MaskingProcess(point.tokens, point.positions)
    decoder = MLPDecoder(process, LATENT_DIM, **WIDTHS)
    x_0 = torch.randint(point.tokens, (point.rows, point.positions))
    elbo = MaskedDiffusionELBO(process, num_particles=point.particles)
    encoder = MLPEncoder(process, LATENT_DIM, **WIDTHS)
    prior = models.StandardNormal(LATENT_DIM)

    def pair() -> tuple[nn.Module, nn.Module]:
        """Networks of the same weights."""
        return copy.deepcopy((decoder, encoder))

    if point.codes:
        codes = models.Categorical(point.codes, LATENT_DIM)
        own, own_codes = copy.deepcopy((decoder, codes))
        logits = nn.Parameter(torch.zeros(point.codes))
        loss_of = code_loss(plain(own), logits, own_codes.embedding, point.tokens)
        adam = optimiser(own, own_codes.embedding)
        adam.add_param_group({"params": [logits]})
        model, guide = models.VADD(decoder, codes), guides.NoLatent()
    else:
        own, own_encoder = pair()
        loss_of = normal_loss(plain(own), plain(own_encoder), point.tokens, point.particles)
        adam = optimiser(own, own_encoder)
        model, guide = models.VADD(decoder, prior), guides.AmortizedNormal(encoder)
    variants: dict[str, Callable[[], Any]] = {
        "hand": training_step(loss_of, adam, x_0),
        "package": program_step(elbo, model, guide, x_0),
    }
    if compiled and not point.codes:
        other, other_encoder = pair()
        program = models.VADD(other, prior), guides.AmortizedNormal(other_encoder)
        variants["compiled"] = graph_step(elbo, *program, x_0)
    return variants


def chains(point: Point) -> dict[str, Callable[[], Any]]:
    """Sampling and scoring in so many steps."""
    process = MaskingProcess(point.tokens, point.positions)
    decoder = MLPDecoder(process, LATENT_DIM, **WIDTHS)
    model = models.VADD(decoder, models.StandardNormal(LATENT_DIM)).requires_grad_(False).eval()
    guide = guides.AmortizedNormal(MLPEncoder(process, LATENT_DIM, **WIDTHS))
    guide.requires_grad_(False).eval()
    x_0 = torch.randint(point.tokens, (SCORED, point.positions))

    def latents(rows: int) -> Tensor:
        return torch.randn(rows, LATENT_DIM)

    return {
        "naive": lambda: naive_sampler(Bare(decoder), latents, process, DRAWN, point.steps),
        "sample": lambda: sample(model, process, DRAWN, point.steps),
        "bound": lambda: log_likelihood_bound(
            model, guide, process, x_0, point.steps, num_particles=4, num_draws=2
        ),
    }


def timed(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each, the slowest being called often enough to fill a round."""
    slowest = 0.0
    for call in variants.values():
        call()  # the first does more than others
        start = time.process_time()
        call()
        slowest = max(slowest, time.process_time() - start)
    repeats = max(1, math.ceil(ROUND / slowest))
    return medians(variants, repeats, rounds, clock=time.process_time, warm_up=1)


def measure(factor: str, values: Sequence[int], rounds: int, compiled: bool) -> dict[str, Any]:
    """Seconds of each variant at each value of a factor."""
    found: dict[str, list[float]] = {}
    for value in values:
        torch.manual_seed(0)
        point = BASE._replace(**{factor: value})
        if factor == "steps":
            with torch.no_grad():
                seconds = timed(chains(point), rounds)
        else:
            seconds = timed(training(point, compiled), rounds)
        for name, value_of in seconds.items():
            found.setdefault(name, []).append(value_of)
        row = "".join(f"  {name} {1e3 * s:.2f} ms" for name, s in seconds.items())
        print(f"{LETTERS[factor]} = {value:<5}{row}", flush=True)
    return {"values": list(values), "seconds": found}


def slope(values: Sequence[float], seconds: Sequence[float]) -> float:
    """Exponent with which time grows between the two largest values; 1 is linear."""
    if len(values) < 2:
        return math.nan
    return math.log(seconds[-1] / seconds[-2]) / math.log(values[-1] / values[-2])


def draw(factors: dict[str, dict[str, Any]], path: str | Path) -> None:
    """Small multiples: time over each factor, both logarithmic, with the slope at the end."""
    columns = min(3, len(factors))
    lines = -(-len(factors) // columns)
    fig = Figure(figsize=(3.1 * columns, 2.75 * lines + 0.35), dpi=150, layout="constrained")
    axes = list(fig.subplots(lines, columns, squeeze=False).flat)
    for ax in axes[len(factors) :]:
        ax.set_visible(False)
    styles = {name: i for i, name in enumerate(LABELS)}
    handles: dict[str, Any] = {}
    for ax, (factor, found) in zip(axes, factors.items(), strict=False):
        values = found["values"]
        ends = []
        for name, seconds in found["seconds"].items():
            i = styles[name]
            (line,) = ax.plot(
                values,
                [1e3 * s for s in seconds],
                color=COLORS[i],
                marker=MARKERS[i],
                linestyle=LINES[i % 3],
                markersize=4,
                linewidth=1.3,
                label=LABELS[name],
            )
            handles[name] = line
            ends.append((1e3 * seconds[-1], slope(values, seconds), COLORS[i]))
        ax.set_xscale("log")
        ax.set_yscale("log")
        low = min(1e3 * min(s) for s in found["seconds"].values())
        high = max(end for end, _, _ in ends)
        ax.set_ylim(low / 1.8, high * 2.4)
        ax.set_xlim(values[0] / 1.3, values[-1] * (values[-1] / values[0]) ** 0.22)
        reference = [high * 1.35 * v / values[-1] for v in values]
        ax.plot(values, reference, color="#999999", linewidth=0.9, linestyle=":", zorder=0)
        _beside(ax, values[-1], ends)
        what = "ms a pass" if factor == "steps" else "ms a training step"
        frame(ax, f"{factor}, {LETTERS[factor]}", LETTERS[factor], what, grid="both")
        ax.set_xticks(values, [str(v) for v in values], fontsize=SMALL)
        if high / low < 60:
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.minorticks_off()
    _explain(fig, handles)
    save_figure(fig, path)


def _explain(fig: Figure, handles: dict[str, Any]) -> None:
    """One legend for all panels."""
    drawn = [handles[name] for name in LABELS if name in handles]
    drawn.append(Line2D([], [], color="#999999", linestyle=":", label="slope 1"))
    fig.legend(
        handles=drawn,
        loc="outside lower center",
        title="Numbers: slope between the two largest values",
        title_fontsize=SMALL,
        ncols=len(drawn),
        fontsize=SMALL,
        frameon=False,
    )


def _beside(ax: Any, x: float, ends: list[tuple[float, float, str]]) -> None:
    """Slopes to the right of the last points, moved apart where they would overlap."""
    low, high = map(math.log, ax.get_ylim())
    apart = 0.075 * (high - low)
    at = -math.inf
    for y, exponent, color in sorted(ends):
        at = max(math.log(y), at + apart)
        ax.annotate(
            f"{exponent:.2f}",
            (x, math.exp(at)),
            (6, 0),
            textcoords="offset points",
            fontsize=SMALL,
            color=color if color != COLORS[4] else INK,
            va="center",
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--factors", default=",".join(FACTORS), help="which, by comma")
    parser.add_argument("--points", type=int, default=5, help="how many values of each, at most")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true", help="without compiled updates")
    parser.add_argument("--json", default=None, help="file for the figures")
    parser.add_argument("--figure", default=None, help="file for a figure")
    arguments = parser.parse_args()
    chosen = arguments.factors.split(",")
    if unknown := [name for name in chosen if name not in FACTORS]:
        parser.error(f"there is no factor {unknown[0]!r}: expected some of {', '.join(FACTORS)}")
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "base": BASE._asdict() | WIDTHS,
        "factors": {},
    }
    with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False):
        for name in chosen:
            values = FACTORS[name][: arguments.points]
            results["factors"][name] = measure(
                name, values, arguments.rounds, not arguments.no_compile
            )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    if arguments.figure:
        draw(results["factors"], arguments.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
