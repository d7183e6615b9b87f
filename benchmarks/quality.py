"""The table of results: every figure of the README, with its seeds and standard errors.

    python benchmarks/quality.py checkerboard swiss_roll circles e8 es d1 d2 [--seeds 3]

Each experiment trains its models once per seed and writes a JSON file to ``--out``; an experiment
whose file is complete is not run again (the figures of the README are kept in docs/results).
Distances are between exact laws; validity follows the protocol of Ivanov et al. 2026 (App. B.1),
with the 20,000 training points of the protocol.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vadd_pyro import (
    AtomTimes,
    BalancedTimes,
    data,
    exact_distribution,
    fit_prior,
    guides,
    metrics,
    models,
    sample,
)
from vadd_pyro.checkpoints import write_whole
from vadd_pyro.data import TokenDistribution
from vadd_pyro.demo import train
from vadd_pyro.nn import MLPDecoder
from vadd_pyro.process import MaskingProcess
from vadd_pyro.zoo import Pair, build

STEPS = (1, 2, 4, 8)
NORMAL = "VADD, N(0, I)"


def normal(process: MaskingProcess) -> Pair:
    """The paper's prior."""
    pair = build("standard_normal", "auto", process, latent_dim=2, hidden_dim=256)
    return pair._replace(num_iterations=6000)


def longer_normal(process: MaskingProcess) -> Pair:
    """The paper's prior, trained on a quarter of the rows that the published runs saw."""
    return normal(process)._replace(num_iterations=12_000)


def codes(num_codes: int, width: int, num_iterations: int, latent_dim: int = 8) -> Any:
    """A categorical prior, summed out."""

    def make(process: MaskingProcess) -> Pair:
        decoder = MLPDecoder(process, latent_dim, hidden_dim=width, num_layers=2)
        model = models.VADD(decoder, models.Categorical(num_codes, latent_dim))
        return Pair(model, guides.NoLatent(), num_iterations)

    return make


def mdm(process: MaskingProcess) -> Pair:
    """No latent."""
    return build("none", "auto", process)


def distances(model: Any, process: MaskingProcess, density: TokenDistribution) -> dict[str, Any]:
    """Exact distance of the sampler's law to the data's."""
    row: dict[str, Any] = {}
    for num_steps in STEPS:
        law = exact_distribution(model, process, num_steps, num_draws=2**13)
        row[f"js_{num_steps}"] = metrics.jensen_shannon(law, density.probabilities)
        row[f"tv_{num_steps}"] = metrics.total_variation(law, density.probabilities)
    return row


def validities(
    model: Any, process: MaskingProcess, density: TokenDistribution, train_set: Tensor, seed: int
) -> dict[str, Any]:
    """Share of 3,000 samples near 3,000 training points, and what fresh data scores."""
    reference = train_set[:3000]
    row = {
        f"validity_{n}": 100
        * metrics.validity(sample(model, process, 3000, n, seed=1000 + seed), reference)
        for n in STEPS
    }
    fresh = density.sample(3000, seed=2000 + seed)
    return {**row, "validity_fresh_data": 100 * metrics.validity(fresh, reference)}


def tied(model: Any, process: MaskingProcess, density: TokenDistribution) -> dict[str, Any]:
    """Exact accuracy and KL(data | sampler)."""
    row = {}
    for num_steps in (1, 4):
        law = exact_distribution(model, process, num_steps)
        row[f"accuracy_{num_steps}"] = 100 * float(law[density.probabilities > 0].sum())
        row[f"kl_{num_steps}"] = metrics.kl_divergence(density.probabilities, law)
    return row


Scores = Callable[[Any, MaskingProcess], dict[str, Any]]


def measured(
    density: TokenDistribution,
    x_0: Tensor,
    recipes: dict[str, Any],
    seed: int,
    scores: Scores,
    **options: Any,
) -> list[dict[str, Any]]:
    """Train each recipe on the same rows and measure it; N(0, I) also with the prior of the first
    step refitted to its posteriors, of which the seconds are those of refitting.
    """
    process = density.process()
    rows = []
    for label, make in recipes.items():
        torch.manual_seed(seed)
        pair = make(process)
        seconds = train(pair, process, x_0, seed=seed, progress=False, **options)
        rows.append({"model": label, "seconds": seconds, **scores(pair.model, process)})
        if label == NORMAL:
            start = time.perf_counter()
            found = fit_prior(pair.model, pair.guide, process, x_0, seed=seed)
            seconds = time.perf_counter() - start
            pair.model.prior = models.AtStart(found.prior, pair.model.prior)
            label = f"{NORMAL} refitted"
            rows.append({"model": label, "seconds": seconds, **scores(pair.model, process)})
    return rows


def toy_experiment(name: str, recipes: dict[str, Any]) -> Callable[[int], list[dict[str, Any]]]:
    """Distances on a toy density of K = 100."""

    def run(seed: int) -> list[dict[str, Any]]:
        density = data.toy(name)
        x_0 = density.sample(100_000, seed=seed)
        return measured(
            density, x_0, recipes, seed, lambda model, process: distances(model, process, density)
        )

    return run


def protocol_experiment(
    name: str, recipes: dict[str, Any]
) -> Callable[[int], list[dict[str, Any]]]:
    """Validity by the published protocol, K = 50."""

    def run(seed: int) -> list[dict[str, Any]]:
        density = data.eight_modes(seed=seed) if name == "e8" else data.swiss_roll_es()
        x_0 = density.sample(20_000, seed=seed)

        def scores(model: Any, process: MaskingProcess) -> dict[str, Any]:
            valid = validities(model, process, density, x_0, seed)
            return valid | distances(model, process, density)

        return measured(density, x_0, recipes, seed, scores)

    return run


def tied_experiment(which: str, recipes: dict[str, Any]) -> Callable[[int], list[dict[str, Any]]]:
    """Tied tokens, four at once and one a step."""

    def run(seed: int) -> list[dict[str, Any]]:
        density = data.tied_tokens(which)
        return measured(
            density,
            density.sample(20_000, seed=seed),
            recipes,
            seed,
            lambda model, process: tied(model, process, density),
            # A quarter of the rows start where samples start, the others as in the other tables.
            times=AtomTimes(0.25, BalancedTimes()),
            learning_rate=3e-3,
            batch_size=128,
        )

    return run


EXPERIMENTS: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "checkerboard": toy_experiment(
        "checkerboard", {"MDM": mdm, NORMAL: normal, "VADD, codes": codes(64, 128, 1500)}
    ),
    "swiss_roll": toy_experiment("swiss_roll", {"VADD, codes": codes(64, 128, 2000)}),
    "circles": toy_experiment("circles", {"VADD, codes": codes(64, 128, 2000)}),
    "e8": protocol_experiment("e8", {NORMAL: longer_normal, "VADD, codes": codes(64, 128, 3000)}),
    "es": protocol_experiment("es", {NORMAL: longer_normal, "VADD, codes": codes(64, 128, 3000)}),
    "d1": tied_experiment("D1", {"VADD, codes": codes(64, 64, 1500, 16)}),
    "d2": tied_experiment("D2", {"VADD, codes": codes(256, 64, 1500, 16)}),
}


def summarise(rows: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean and standard error over seeds of every figure of every model."""
    summary = []
    for same in zip(*rows, strict=True):
        entry: dict[str, Any] = {"model": same[0]["model"]}
        for name in same[0]:
            if name != "model":
                values = [row[name] for row in same]
                error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
                entry[name] = [statistics.fmean(values), error]
        summary.append(entry)
    return summary


def show(name: str, content: dict[str, Any]) -> None:
    print(f"\n{name}, {content['seeds']} seeds: mean (standard error)")
    for entry in content["summary"]:
        print(f"  {entry['model']}")
        for figure, (mean, error) in ((k, v) for k, v in entry.items() if k != "model"):
            spread = "" if error is None else f" ({error:.4f})"
            print(f"    {figure:<20} {mean:.4f}{spread}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("experiments", nargs="*", default=list(EXPERIMENTS), metavar="EXPERIMENT")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="runs/quality", metavar="FOLDER")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.experiments if name not in EXPERIMENTS]
    if unknown or arguments.seeds < 1:
        parser.error(f"expected experiments from {', '.join(EXPERIMENTS)} and at least one seed")
    torch.set_num_threads(arguments.threads)
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.experiments:
        path = folder / f"{name}.json"
        content = json.loads(path.read_text()) if path.exists() else {"rows": []}
        start = time.perf_counter()
        for seed in range(len(content["rows"]), arguments.seeds):
            content["rows"].append(EXPERIMENTS[name](seed))
            content["seeds"] = len(content["rows"])
            content["torch"] = torch.__version__
            content["summary"] = summarise(content["rows"])
            text = json.dumps(content, indent=1) + "\n"
            write_whole(path, lambda file, text=text: file.write(text.encode()))
            elapsed = time.perf_counter() - start
            print(f"{name}: seed {seed} done after {elapsed:.0f} s", file=sys.stderr, flush=True)
        show(name, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
