"""T-step bounds of two runs on the same rows, and their difference row by row.

    python benchmarks/paired.py runs/mnist/vadd runs/mnist/mdm --num-rows 500

Both are scored along paths drawn by the same seed. Rows differ from each other far more than two
models do on a row, so the difference is known better than either bound: a standard error of .1
nats where those of the bounds are 1.
"""

from __future__ import annotations

import argparse

from torch import Tensor

from vadd_pyro import experiments, log_likelihood_bound
from vadd_pyro.checkpoints import write_json


def _mean(values: Tensor) -> list[float]:
    """Mean and its standard error over rows."""
    return [float(values.mean()), float(values.std() / len(values) ** 0.5)]


def main(arguments: list[str] | None = None) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs=2, metavar="RUN", help="run folders of one data set")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--num-rows", type=int, help="test rows; all by default")
    parser.add_argument("--num-particles", type=int, default=64)
    parser.add_argument(
        "--many",
        type=int,
        default=16,
        help="particles where there are more than eight steps",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    options = parser.parse_args(arguments)
    first, second = (experiments.load(run) for run in options.runs)
    second.data.check_same(first.data.describe())
    rows = first.data.rows("test", options.num_rows, options.seed)
    found: list[dict[str, object]] = []
    print("| T | " + " | ".join(options.runs) + " | difference |\n| --- | --- | --- | --- |")
    for num_steps in options.steps:
        values = [
            log_likelihood_bound(
                run.model,
                run.guide,
                run.process,
                rows,
                num_steps,
                num_particles=options.num_particles if num_steps <= 8 else options.many,
                num_draws=1,
                seed=options.seed,
            ).value
            for run in (first, second)
        ]
        line = [_mean(value) for value in (*values, values[0] - values[1])]
        cells = " | ".join(f"{mean:.2f} ± {error:.2f}" for mean, error in line)
        print(f"| {num_steps} | {cells} |", flush=True)
        names = ("first", "second", "difference")
        found.append({"num_steps": num_steps, **dict(zip(names, line, strict=True))})
    if options.json:
        write_json(options.json, {"runs": options.runs, "rows": len(rows), "bounds": found})
    return found


if __name__ == "__main__":
    main()
