r"""The demo: what a latent does for few-step samples of a toy density, with every number exact.

Trains the masked diffusion model and VADD under several priors, computes the law of each sampler
at 1, 2, 4, 8 steps exactly, and holds it against the true law of the data.
"""

from __future__ import annotations

import copy
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vadd_pyro
from vadd_pyro import data, metrics, plotting, zoo
from vadd_pyro.checkpoints import check_writable, write_json
from vadd_pyro.data import ToyDensity
from vadd_pyro.elbo import LinearAnnealing, MaskedDiffusionELBO
from vadd_pyro.exact import exact_distribution
from vadd_pyro.likelihood import log_likelihood_bound
from vadd_pyro.process import MaskingProcess
from vadd_pyro.runs import save_run
from vadd_pyro.times import BalancedTimes, GridTimes, TimeDistribution
from vadd_pyro.training import fit, fit_guide

__all__ = ["label", "run_demo", "train"]

STEPS = (1, 2, 4, 8)
_WIDTH = {"categorical": 128}  # every code runs through the decoder
_WIDEST = 256
_LATENT_DIM = 2
_NUM_CODES = 64


def label(prior: str) -> str:
    """How tables call a model with that prior."""
    name = zoo.PRIORS.get(prior, prior)
    return name if prior == "none" else f"VADD, {name}"


def _folder_name(prior: str) -> str:
    """A folder's name for a prior, which may be an import path."""
    return re.sub(r"[^\w.]+", "-", prior)


def train(
    pair: zoo.Pair,
    process: MaskingProcess,
    x_0: Tensor,
    num_iterations: int | None = None,
    *,
    seed: int = 0,
    times: TimeDistribution | None = None,
    progress: bool = True,
    description: str = "fit",
    **options: Any,
) -> float:
    """Train a pair by the DELBO with annealed KL.

    Seconds taken. Options go to :func:`vadd_pyro.fit`.
    """
    num_iterations = pair.num_iterations if num_iterations is None else num_iterations
    elbo = MaskedDiffusionELBO(
        process,
        times=BalancedTimes() if times is None else times,
        kl_weight=LinearAnnealing(max(1, num_iterations // 3), start=0.001),
    )
    options = {"learning_rate": 2e-3, "ema_decay": 0.999, **options}
    start = time.perf_counter()
    fit(
        pair.model,
        pair.guide,
        elbo,
        x_0,
        num_iterations,
        seed=seed,
        progress=progress,
        description=description,
        **options,
    )
    return time.perf_counter() - start


def run_demo(
    name: str = "checkerboard",
    priors: Sequence[str] = ("none", "standard_normal", "categorical"),
    num_iterations: int | None = None,
    seed: int = 0,
    out: str | Path = "demo",
    progress: bool = True,
) -> dict[str, Any]:
    """Train, measure, print, draw.

    Arguments as on the command line; returns what ``results.json`` holds.
    """
    if not priors:
        raise ValueError("priors is empty: expected at least one of " + ", ".join(zoo.PRIORS))
    for prior in priors:
        zoo.check("priors", prior)
    if num_iterations is not None and num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations}")
    folder = Path(out)
    runs = {prior: folder / name / _folder_name(prior) for prior in priors}
    for target in (folder / "results.json", folder / f"{name}.png", folder / name / "run.pt"):
        check_writable(target)
    density = data.toy(name)
    process = density.process()
    x_0, held_out = density.sample(100_000, seed=seed), density.sample(1000, seed=seed + 10_000)
    truth = density.probabilities
    laws: dict[str, dict[int, Tensor]] = {}
    rows: list[dict[str, Any]] = []
    pairs = []
    for prior in priors:
        torch.manual_seed(seed)
        pairs.append(
            zoo.build(
                prior,
                "auto",
                process,
                latent_dim=_LATENT_DIM,
                num_codes=_NUM_CODES,
                hidden_dim=_WIDTH.get(prior, _WIDEST),
            )
        )
    for prior, pair in zip(priors, pairs, strict=True):
        called = label(prior)
        seconds = train(
            pair,
            process,
            x_0,
            num_iterations,
            seed=seed,
            progress=progress,
            description=called,
        )
        save_run(
            runs[prior],
            pair.model,
            pair.guide,
            {
                **{"data": name, "vocab_size": density.vocab_size, "prior": prior},
                **{"guide": "auto", "latent_dim": _LATENT_DIM, "num_codes": _NUM_CODES},
                **{"hidden_dim": _WIDTH.get(prior, _WIDEST), "seed": seed},
                "num_iterations": num_iterations or pair.num_iterations,
            },
        )
        if any(True for _ in pair.guide.parameters()):
            # The DELBO has shown the guide nothing but complete targets; the bound needs the
            # sampler's.
            pair = pair._replace(guide=copy.deepcopy(pair.guide))  # it may be part of the prior
            fit_guide(
                pair.model,
                pair.guide,
                MaskedDiffusionELBO(process, "chain", times=GridTimes(STEPS)),
                x_0,
                num_iterations=max(1, (num_iterations or pair.num_iterations) // 5),
                seed=seed,
                progress=progress,
                description=f"{called}, guide",
            )
        laws[called] = {}
        for num_steps in STEPS:
            law = exact_distribution(pair.model, process, num_steps, num_draws=2**12)
            bound = log_likelihood_bound(
                pair.model, pair.guide, process, held_out, num_steps, num_draws=2, seed=seed
            )
            value, stderr = bound.mean()
            laws[called][num_steps] = law
            rows.append(
                {
                    "prior": prior,
                    "model": called,
                    "num_steps": num_steps,
                    "total_variation": metrics.total_variation(law, truth),
                    "jensen_shannon": metrics.jensen_shannon(law, truth),
                    "bound": value,
                    "bound_stderr": stderr,
                    "train_seconds": seconds,
                }
            )
    results = {
        "data": name,
        "seed": seed,
        "num_iterations": num_iterations,
        "entropy": density.entropy,
        "num_parameters": {
            label(prior): sum(p.numel() for p in pair.model.parameters())
            for prior, pair in zip(priors, pairs, strict=True)
        },
        "versions": {
            "vadd_pyro": vadd_pyro.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "rows": rows,
    }
    write_json(folder / "results.json", results)
    scores = {
        model: {row["num_steps"]: row["jensen_shannon"] for row in rows if row["model"] == model}
        for model in laws
    }
    figure = plotting.compare_steps(
        truth,
        laws,
        scores,
        title=f"{density.name}: exact law of the samples, by number of network calls",
    )
    plotting.save_figure(figure, folder / f"{name}.png")
    print(table(density, rows))
    print(f"\nwrote {folder / 'results.json'} and {folder / (name + '.png')}")
    for prior, place in runs.items():
        if prior != "none":
            print(f"what its latent knows: vadd-pyro inspect {place}")
    return results


def table(density: ToyDensity, rows: Sequence[dict[str, Any]]) -> str:
    """The results as text."""
    lines = [
        "",
        f"{density.name}, K = {density.vocab_size}: distance of the sampler's exact law to the "
        "data's, and the T-step bound",
        f"on held-out rows (nats; the entropy of the data, {density.entropy:.3f}, is the least "
        "that -bound can be on average)",
        "",
        f"{'model':<18} {'steps':>5} {'total variation':>16} {'Jensen-Shannon':>15} {'-bound':>8} "
        f"{'s.e.':>6}",
    ]
    for row in rows:
        lines.append(
            f"{row['model']:<18} {row['num_steps']:>5} {row['total_variation']:>16.4f} "
            f"{row['jensen_shannon']:>15.4f} {-row['bound']:>8.3f} {row['bound_stderr']:>6.3f}"
        )
    return "\n".join(lines)
