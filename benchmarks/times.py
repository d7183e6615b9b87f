"""Which times to train at: one recipe, many distributions of times, the T-step bound at every T.

    python benchmarks/times.py [--data shared/data/binarized_mnist] [--candidates uniform chain]

Every candidate is the same pair of networks, trained for the same number of updates on the same
rows; only the times (and what is scored at them) differ. Afterwards every guide, whatever it was
trained on, is refitted alone on the steps that are then evaluated, for ``--refit`` times the
updates, so that a guide which has seen complete targets only is not held against its model. All
are measured on the same test rows along the same reveal paths, which is why differences to
``uniform`` are known better than the bounds themselves; standard errors are those over test rows
and say nothing of the spread between seeds. Recipe and candidates were chosen on the test rows.

``--data`` is a folder with Larochelle's static binarised MNIST (``binarized_mnist_train.mat`` and
``binarized_mnist_test.mat``, a matrix ``X`` each); ``--pool 2`` makes 14 x 14 pixels of it, each
set where two or more of four are. Without it scikit-learn's 8 x 8 digits are used, at more than
half of full ink: 1,500 rows, on which the models overfit, so that run only shows that all works.

Each finished run is a JSON file with its rows' bounds under ``--out``; runs that are there are not
repeated. ``times.json`` beside them holds the summary of all. What docs/results/times.json keeps
was run so, with the candidates and seeds that it lists:

    python benchmarks/times.py --data FOLDER --pool 2
    python benchmarks/times.py --data FOLDER --iterations 2000 --learning-rate 3e-3 --refit 0.4 \\
        --test-rows-long 250
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vadd_pyro import (
    AtomTimes,
    FewStepTimes,
    GridTimes,
    LinearAnnealing,
    MaskedDiffusionELBO,
    UniformTimes,
    fit,
    fit_guide,
    guides,
    log_likelihood_bound,
    models,
)
from vadd_pyro.checkpoints import write_whole
from vadd_pyro.nn import MLPDecoder, MLPEncoder
from vadd_pyro.process import MaskingProcess
from vadd_pyro.times import TimeDistribution, TimeDraw, lattice

STEPS = (1, 2, 4, 8, 16, 64)  # evaluated, and refitted on
POWERS = (1, 2, 4, 8, 16, 32, 64)


class FlatTimes(TimeDistribution):
    """``t`` uniform, every row with weight 1: the DELBO without its ``w(t)``."""

    def draw(self, process: MaskingProcess, num_rows: int, device: torch.device) -> TimeDraw:
        t = 1 - lattice(num_rows, device)
        return TimeDraw(t, torch.ones_like(t))

    def __repr__(self) -> str:
        return "FlatTimes()"


class OctaveTimes(TimeDistribution):
    """``1 - t`` log-uniform on ``[1/D, 1]``: every doubling of what is visible counts the same.

    The weight is ``w(t)``; no importance weight towards uniform times, which would undo it in
    expectation.
    """

    def draw(self, process: MaskingProcess, num_rows: int, device: torch.device) -> TimeDraw:
        visible = torch.exp(-math.log(process.length) * lattice(num_rows, device))
        t = process.schedule.inverse(visible).clamp_min(1 / process.length)
        return TimeDraw(t, process.schedule.weight(t))

    def __repr__(self) -> str:
        return "OctaveTimes()"


class SquareTimes(TimeDistribution):
    """``t = u^2`` with uniform ``u``: the DELBO, importance weighted, at less variance.

    A row's term is a sum over about ``t D`` tokens, so its spread grows as ``t^(1/2)`` and, times
    the weight ``1/t``, asks for rows with density ``t^(-1/2)``. Linear schedule.
    """

    def draw(self, process: MaskingProcess, num_rows: int, device: torch.device) -> TimeDraw:
        root = (1 - lattice(num_rows, device)).clamp_min(process.length**-0.5)
        return TimeDraw(root**2, 2 / root)

    def __repr__(self) -> str:
        return "SquareTimes()"


class MixedTimes(TimeDistribution):
    """Each row's time by one of several distributions.

    Rows in continuous time step back to ``s = 0``, that is all their masked positions are scored,
    under either objective: under the chain's a mixture of T-step bounds and DELBO.

    Args:
        shares: of the rows, one number a part.
        parts: the distributions.
    """

    def __init__(self, shares: Sequence[float], parts: Sequence[TimeDistribution]) -> None:
        self.shares, self.parts = tuple(shares), tuple(parts)

    def draw(self, process: MaskingProcess, num_rows: int, device: torch.device) -> TimeDraw:
        u = lattice(num_rows, device)[torch.randperm(num_rows, device=device)]
        edges = torch.tensor(self.shares, device=device).cumsum(0)
        choice = torch.searchsorted(edges / edges[-1], u, right=True)
        choice = choice.clamp_max(len(self.parts) - 1)
        draws = [part.draw(process, num_rows, device) for part in self.parts]
        t, weight = draws[0].t.clone(), draws[0].weight.clone()
        s = torch.zeros_like(t)
        for index, part in enumerate(draws):
            chosen = choice == index
            t = torch.where(chosen, part.t, t)
            weight = torch.where(chosen, part.weight, weight)
            if part.s is not None:
                s = torch.where(chosen, part.s, s)
        return TimeDraw(t, weight, s)

    def __repr__(self) -> str:
        return f"MixedTimes({self.shares}, {self.parts})"


class Candidate(NamedTuple):
    """What is trained: objective, times, and whether there is a latent."""

    text: str
    objective: str
    times: TimeDistribution
    latent: bool = True


CANDIDATES = {
    "uniform": Candidate("DELBO, t uniform", "delbo", UniformTimes()),
    "flat": Candidate("DELBO, t uniform, weight 1", "delbo", FlatTimes()),
    "atom10": Candidate("DELBO, 10 % of rows at t = 1", "delbo", AtomTimes(0.1)),
    "atom30": Candidate("DELBO, 30 % of rows at t = 1", "delbo", AtomTimes(0.3)),
    "octaves": Candidate("DELBO weights, 1 - t log-uniform", "delbo", OctaveTimes()),
    "octaves_half": Candidate(
        "half octaves, half uniform",
        "delbo",
        MixedTimes((0.5, 0.5), (OctaveTimes(), UniformTimes())),
    ),
    "grid": Candidate("DELBO on the points of T = 1, 2, ..., 64", "delbo", FewStepTimes(64)),
    "grid_short": Candidate(
        "DELBO on the points of T = 1, 2, 4, 8", "delbo", GridTimes(POWERS[:4])
    ),
    "grid_64": Candidate("DELBO on the points of T = 64", "delbo", GridTimes(64)),
    "grid_half": Candidate(
        "half grid, half uniform",
        "delbo",
        MixedTimes((0.5, 0.5), (GridTimes(POWERS), UniformTimes())),
    ),
    "grid_long": Candidate(
        "half grid, half the points of T = 64",
        "delbo",
        MixedTimes((0.5, 0.5), (GridTimes(POWERS), GridTimes(64))),
    ),
    "atom30_64": Candidate(
        "30 % of rows at t = 1, others on the points of T = 64",
        "delbo",
        MixedTimes((0.3, 0.7), (GridTimes(1), GridTimes(64))),
    ),
    "grid_squares": Candidate(
        "half grid, half t = u^2",
        "delbo",
        MixedTimes((0.5, 0.5), (GridTimes(POWERS), SquareTimes())),
    ),
    "squares": Candidate("DELBO, importance weighted, t = u^2", "delbo", SquareTimes()),
    "atom30_squares": Candidate(
        "30 % of rows at t = 1, others at t = u^2", "delbo", AtomTimes(0.3, SquareTimes())
    ),
    "chain": Candidate("T-step bounds, T = 1, 2, ..., 64", "chain", GridTimes(POWERS)),
    "chain_one": Candidate(
        "T-step bounds, 40 % T = 1, others T = 2, ..., 64",
        "chain",
        GridTimes((1, 1, 1, 1, *POWERS[1:])),
    ),
    "chain_long": Candidate(
        "T-step bounds, T = 1, 2, ..., 512, 784", "chain", GridTimes((*POWERS, 128, 256, 512, 784))
    ),
    "chain_delbo": Candidate(
        "half T-step bounds, T = 1, 2, ..., 64, half DELBO",
        "chain",
        MixedTimes((0.5, 0.5), (GridTimes(POWERS), UniformTimes())),
    ),
    "chain_short": Candidate(
        "half T-step bounds, T = 1, 2, 4, 8, half DELBO",
        "chain",
        MixedTimes((0.5, 0.5), (GridTimes(POWERS[:4]), UniformTimes())),
    ),
    "mdm": Candidate("no latent, t uniform", "delbo", UniformTimes(), latent=False),
    "mdm_grid": Candidate(
        "no latent, on the points of T = 1, 2, ..., 64", "delbo", GridTimes(POWERS), latent=False
    ),
    "mdm_octaves": Candidate(
        "no latent, half octaves, half uniform",
        "delbo",
        MixedTimes((0.5, 0.5), (OctaveTimes(), UniformTimes())),
        latent=False,
    ),
}


# ------------------------------------------------------------------------ data


def load(path: str | None, pool: int) -> tuple[str, Tensor, Tensor]:
    """Name, training rows and test rows, ``(N, D)`` of 0 and 1."""
    if path is None:
        from sklearn.datasets import load_digits

        rows = torch.as_tensor(load_digits().data > 8).long()
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
        name, parts = "digits", [rows[:1500], rows[1500:]]
    else:
        from scipy.io import loadmat

        name = "binarized_mnist"
        files = [Path(path) / f"binarized_mnist_{part}.mat" for part in ("train", "test")]
        parts = [torch.as_tensor(loadmat(file)["X"]).long() for file in files]
    if pool > 1:
        parts = [_pooled(rows, pool) for rows in parts]
    return name, parts[0], parts[1]


def _pooled(rows: Tensor, pool: int) -> Tensor:
    side = math.isqrt(rows.shape[1])
    image = rows.float().unflatten(1, (1, side, side))
    return (torch.nn.functional.avg_pool2d(image, pool) >= 0.5).flatten(1).long()


# ----------------------------------------------------------------- experiment


def all_masked_kl(model: Any, guide: Any, process: MaskingProcess, x_0: Tensor) -> float:
    """Mean KL of the latent at the all-masked state, everything to be revealed."""
    with torch.no_grad():
        terms = MaskedDiffusionELBO(process).score(model, guide, process.corrupt(x_0, 1.0))
    return float(terms.kl.mean())


def run(candidate: Candidate, seed: int, x_0: Tensor, test: Tensor, s: dict[str, Any]) -> Any:
    """Train, refit, measure."""
    process = MaskingProcess(vocab_size=2, length=x_0.shape[1])
    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(
        hidden_dim=s["hidden_dim"], num_layers=3, embedding_dim=s["embedding_dim"]
    )
    model: Any
    guide: Any
    if candidate.latent:
        decoder = MLPDecoder(process, s["latent_dim"], **sizes)
        model = models.VADD(decoder, models.StandardNormal(s["latent_dim"]))
        guide = guides.AmortizedNormal(MLPEncoder(process, s["latent_dim"], **sizes))
    else:
        model, guide = models.MDM(MLPDecoder(process, **sizes)), guides.NoLatent()
    options: dict[str, Any] = dict(
        batch_size=s["batch_size"],
        learning_rate=s["learning_rate"],
        ema_decay=s["ema_decay"],
        seed=seed,
        progress=False,
    )
    elbo = MaskedDiffusionELBO(
        process,
        candidate.objective,
        times=candidate.times,
        kl_weight=LinearAnnealing(max(1, round(s["annealing"] * s["iterations"])), start=0.001),
    )
    start = time.perf_counter()
    fit(model, guide, elbo, x_0, s["iterations"], **options)
    result: dict[str, Any] = {"seconds_fit": time.perf_counter() - start}
    if candidate.latent:
        result["kl_all_masked_fit"] = all_masked_kl(model, guide, process, test)
        refit = MaskedDiffusionELBO(process, "chain", times=GridTimes(STEPS))
        fit_guide(model, guide, refit, x_0, max(1, round(s["refit"] * s["iterations"])), **options)
        result["kl_all_masked"] = all_masked_kl(model, guide, process, test)
    middle = time.perf_counter()
    result["seconds_refit"] = middle - start - result["seconds_fit"]
    rows: dict[str, list[float]] = {}
    for num_steps in STEPS:
        few = test[: s["test_rows"] if num_steps <= 8 else s["test_rows_long"]]
        bound = log_likelihood_bound(
            model, guide, process, few, num_steps, num_particles=16, num_draws=1, seed=num_steps
        )
        rows[str(num_steps)] = [round(value, 3) for value in bound.value.tolist()]
    result["seconds_bounds"] = time.perf_counter() - middle
    return {**result, "rows": rows}


# -------------------------------------------------------------------- summary


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def summarise(folder: Path) -> dict[str, Any]:
    """All runs under a folder: bounds with standard errors, and differences to ``uniform``."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*/*.json")):
        groups.setdefault(file.parent.name, []).append(json.loads(file.read_text()))
    names = {one["candidate"] for runs in groups.values() for one in runs}
    return {
        "steps": list(STEPS),
        "candidates": {name: one.text for name, one in CANDIDATES.items() if name in names},
        "experiments": [
            {
                "settings": runs[0]["settings"],
                "torch": runs[0]["torch"],
                "runs": [_entry(one, runs) for one in sorted(runs, key=_order)],
            }
            for runs in groups.values()
        ],
    }


def _order(one: dict[str, Any]) -> tuple[int, int]:
    names = list(CANDIDATES)
    name = one["candidate"]
    return one["seed"], names.index(name) if name in names else len(names)


def _entry(one: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    entry = {k: v for k, v in one.items() if k not in ("settings", "torch", "rows")}
    for name, value in entry.items():
        if isinstance(value, float):
            entry[name] = round(value, 2)
    entry["bound"], entry["minus_uniform"] = {}, {}
    reference = [r for r in runs if r["candidate"] == "uniform" and r["seed"] == one["seed"]]
    for num_steps, values in one["rows"].items():
        entry["bound"][num_steps] = [round(v, 2) for v in mean_and_error(values)]
        if reference and one is not reference[0]:
            pairs = zip(values, reference[0]["rows"][num_steps], strict=True)
            difference = mean_and_error([a - b for a, b in pairs])
            entry["minus_uniform"][num_steps] = [round(v, 2) for v in difference]
    return entry


def show(summary: dict[str, Any]) -> None:
    for experiment in summary["experiments"]:
        print("\n" + json.dumps(experiment["settings"]))
        print(f"{'':<14}seed     KL" + "".join(f"{f'T = {n}':>16}" for n in STEPS))
        for entry in experiment["runs"]:
            kl = entry.get("kl_all_masked_fit", math.nan)
            figures = (f"{m:.2f} ({e:.2f})" for m, e in entry["bound"].values())
            line = "".join(f"{figure:>16}" for figure in figures)
            print(f"{entry['candidate']:<14}{entry['seed']:>4}{kl:>7.1f}{line}")


def main() -> int:
    text = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--data", metavar="FOLDER", help="static binarised MNIST; else digits")
    parser.add_argument("--pool", type=int, default=1, help="side of the blocks made one pixel")
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--hidden-dim", type=int, default=256)
    parser.add_argument("--embedding-dim", type=int, default=2)
    parser.add_argument("--latent-dim", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--annealing", type=float, default=1 / 3, help="share of the updates")
    parser.add_argument("--refit", type=float, default=0.2, help="as many updates of the guide")
    parser.add_argument("--test-rows", type=int, default=1000)
    parser.add_argument("--test-rows-long", type=int, default=1000, help="for T > 8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="runs/times", metavar="FOLDER")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.candidates) - set(CANDIDATES))
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}: expected from {', '.join(CANDIDATES)}")
    torch.set_num_threads(arguments.threads)
    name, x_0, test = load(arguments.data, arguments.pool)
    settings = {"data": name, "length": x_0.shape[1]} | {
        k: v
        for k, v in vars(arguments).items()
        if k not in ("data", "candidates", "seeds", "threads", "out")
    }
    out = Path(arguments.out)
    sizes = f"w{arguments.hidden_dim}-i{arguments.iterations}-g{arguments.refit:g}"
    folder = out / f"{name}{x_0.shape[1]}-{sizes}"
    folder.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for candidate in arguments.candidates:
            path = folder / f"{candidate}-{seed}.json"
            if path.exists():
                found = json.loads(path.read_text())["settings"]
                if found != settings:
                    parser.error(
                        f"{path} was run with other settings, {found}: give another --out"
                    )
                continue
            content = {
                "candidate": candidate,
                "seed": seed,
                "settings": settings,
                "torch": torch.__version__,
                **run(CANDIDATES[candidate], seed, x_0, test, settings),
            }
            _write(path, json.dumps(content) + "\n")
            _write(out / "times.json", json.dumps(summarise(out), indent=1) + "\n")
            print(f"{candidate}, seed {seed}: done", file=sys.stderr, flush=True)
    show(summarise(out))
    return 0


def _write(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    sys.exit(main())
