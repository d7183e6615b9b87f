"""Two completions of a partly given row, and how far apart they are in a trained model.

    python benchmarks/infilling.py [--table debd/nltcs] [--columns 8] [--iterations 1500]

``sample(x_start=...)`` starts the chain in the given row: its law is the model's denoising
conditional. ``infill`` weighs chains from the all-masked row by what they give the observed
tokens: its law is ``p_T(x_rest | x_obs)``. They agree only if the learned conditionals do. On rows
of few tokens both laws are computed exactly; the table says how far they are apart, in total
variation over the completions of test rows of which half is observed, and whether draws of either
have the law that they should (chi-square, share of rows with p below .01 beside the .01 that is
expected).

Without ``--table`` the rows are the fourth lines of scikit-learn's digits, black or white.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import chisquare
from torch import Tensor

from vadd_pyro import data, exact_distribution, experiments, infill, sample
from vadd_pyro.checkpoints import write_json
from vadd_pyro.metrics import total_variation


def _rows(table: str | None, columns: int) -> dict[str, Tensor]:
    if table is None:
        digits = data.digits(levels=2)
        return {s: digits.rows(s)[:, 24:32][:, :columns] for s in data.SPLITS}
    found = data.table(table)
    return {s: found.rows(s)[:, :columns] for s in data.SPLITS}


def _p_value(draws: Tensor, law: Tensor) -> float:
    """Chi-square test of outcomes against a law; cells of less than five are put together."""
    size = len(draws)
    counts = torch.bincount(draws, minlength=len(law)).double().numpy()
    expected = (law * size).numpy()
    large = expected >= 5
    counts = np.append(counts[large], counts[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    if expected[-1] < 5:  # too few even together: with the largest
        most = expected[:-1].argmax()
        counts[most] += counts[-1]
        expected[most] += expected[-1]
        counts, expected = counts[:-1], expected[:-1]
    if len(counts) < 2:
        return 1.0
    return float(chisquare(counts, expected * counts.sum() / expected.sum()).pvalue)


def _index(x: Tensor, places: Sequence[int], vocab_size: int) -> Tensor:
    index = torch.zeros(len(x), dtype=torch.long)
    for place in places:
        index = index * vocab_size + x[:, place]
    return index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", help="a table as vadd_pyro.data.table reads it")
    parser.add_argument("--columns", type=int, default=8, help="columns that are kept")
    parser.add_argument("--iterations", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=100, help="test rows")
    parser.add_argument("--draws", type=int, default=2000, help="completions of each")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the numbers, such as infilling.json")
    arguments = parser.parse_args()
    parts = _rows(arguments.table, arguments.columns)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for split, rows in parts.items():
            text = "\n".join(",".join(map(str, row)) for row in rows.tolist())
            (Path(folder) / f"rows.{split}.csv").write_text(text + "\n")
        for model in ("mdm", "vadd"):
            settings = experiments.preset(
                "table",
                f"{folder}/rows",
                model=model,
                num_iterations=arguments.iterations,
                sizes={"hidden_dim": 128},
                seed=arguments.seed,
            )
            run = experiments.train(settings, Path(folder) / model)
            results += _compare(run, arguments)
    print("| model | T | total variation | sample: p < .01 | infill: p < .01 | effective size |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in results:
        print(
            f"| {row['model']} | {row['num_steps']} | {row['distance']:.4f} ± "
            f"{row['distance_stderr']:.4f} | {row['sample_rejected']:.2f} | "
            f"{row['infill_rejected']:.2f} | {row['effective_size']:.0f} |"
        )
    if arguments.out is not None:
        write_json(arguments.out, {"arguments": vars(arguments) | {"out": None}, "rows": results})


def _compare(run: experiments.Experiment, arguments: argparse.Namespace) -> list[dict[str, float]]:
    process = run.process
    rows = run.data.rows("test", min(arguments.rows, len(run.data.test)), arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    found = []
    for num_steps in arguments.steps:
        joint = exact_distribution(run.model, process, num_steps)
        distances, ours, theirs, sizes = [], [], [], []
        for i, row in enumerate(rows):
            order = torch.randperm(process.length, generator=generator)
            hidden = sorted(order[: process.length // 2].tolist())
            given = row.clone()
            given[hidden] = process.mask_id
            where = tuple(
                slice(None) if j in hidden else int(row[j]) for j in range(process.length)
            )
            started = exact_distribution(run.model, process, num_steps, x_start=given)[where]
            conditional = joint[where] / joint[where].sum()
            distances.append(total_variation(started, conditional))
            seed = arguments.seed * 1000 + i
            x = sample(run.model, process, arguments.draws, num_steps, x_start=given, seed=seed)
            ours.append(_p_value(_index(x, hidden, process.vocab_size), started.flatten()))
            # Completions drawn from the same particles are alike: one of each of many chains.
            weighted = infill(
                run.model,
                process,
                given.expand(arguments.draws, -1),
                num_steps,
                num_particles=64,
                seed=seed,
            )
            theirs.append(
                _p_value(
                    _index(weighted.x[:, 0], hidden, process.vocab_size), conditional.flatten()
                )
            )
            sizes.append(float(weighted.effective_size.mean()))
        values = np.array(distances)
        found.append(
            {
                "model": run.settings.title,
                "num_steps": num_steps,
                "distance": float(values.mean()),
                "distance_stderr": float(values.std(ddof=1) / math.sqrt(len(values))),
                "sample_rejected": float((np.array(ours) < 0.01).mean()),
                "infill_rejected": float((np.array(theirs) < 0.01).mean()),
                "effective_size": float(np.mean(sizes)),
            }
        )
    return found


if __name__ == "__main__":
    main()
