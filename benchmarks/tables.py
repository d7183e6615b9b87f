"""Tables: what a latent buys at few steps, beside a Chow-Liu tree and a published circuit.

    vadd-pyro train table debd/nltcs --model vadd,mdm --seeds 3 --evaluate --out runs/nltcs
    python benchmarks/tables.py runs/nltcs [runs/plants ...] [--out tables.png]

Reads what ``vadd-pyro train --evaluate`` wrote (``results.json``) and draws one panel for each
table: T-step bounds of both models over T, with the standard error of the mean over test rows, and
as lines the bound of one token a step, a Chow-Liu tree (fitted here, on the training rows, with
pseudo-counts of one) and the probabilistic circuit HCLT. Prints the same as tables in Markdown.

References:
    Chow and Liu 1968, "Approximating discrete probability distributions with dependence trees";
    Liu and Van den Broeck 2021, "Tractable regularization of probabilistic circuits", whose
    published logs give the circuit's values.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.sparse.csgraph import minimum_spanning_tree
from torch import Tensor

from vadd_pyro import data, plotting
from vadd_pyro.checkpoints import read_json

# Test log-likelihood of the circuit, nats per row: mean of five published runs.
CIRCUITS = {
    "nltcs": -6.00,
    "msnbc": -6.06,
    "plants": -14.26,
    "baudio": -39.77,
    "bnetflix": -56.28,
}


def chow_liu(train: Tensor, test: Tensor, vocab_size: int) -> float:
    """Mean log-likelihood of ``test`` under the Chow-Liu tree of ``train``, nats per row."""
    x, y = train.numpy(), test.numpy()
    length = x.shape[1]
    one_hot = (x[:, :, None] == np.arange(vocab_size)).reshape(len(x), -1).astype(np.float64)
    counts = (one_hot.T @ one_hot).reshape(length, vocab_size, length, vocab_size) + 1.0
    joint = counts / counts.sum((1, 3), keepdims=True)
    marginal = np.einsum("iajb->iaj", joint)  # of the first, as the pair's table has it
    outer = np.einsum("iaj,jbi->iajb", marginal, marginal)
    information = (joint * (np.log(joint) - np.log(outer))).sum((1, 3))
    np.fill_diagonal(information, 0)
    tree = minimum_spanning_tree(-information).toarray()
    neighbours = (tree != 0) | (tree.T != 0)
    single = np.stack([(x == a).sum(0) + 1.0 for a in range(vocab_size)], 1)
    single /= single.sum(1, keepdims=True)
    total = np.log(single[0, y[:, 0]])
    seen, todo = {0}, [0]
    while todo:
        parent = todo.pop()
        for child in np.flatnonzero(neighbours[parent]):
            if child not in seen:
                seen.add(int(child))
                todo.append(int(child))
                given = joint[parent, :, child] / joint[parent, :, child].sum(1, keepdims=True)
                total = total + np.log(given[y[:, parent], y[:, child]])
    return float(total.mean())


def _values(results: list[dict[str, Any]], steps: Any) -> tuple[float, float, float]:
    """Mean over seeds, its standard error over seeds, and the standard error over rows."""
    rows = [row for r in results for row in r["bounds"] if row["num_steps"] == steps]
    values = np.array([row["value"] for row in rows])
    seeds = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return float(values.mean()), float(seeds), float(np.mean([row["stderr"] for row in rows]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders with a results.json each")
    parser.add_argument("--out", type=Path, default=Path("tables.png"))
    arguments = parser.parse_args()
    columns = min(3, len(arguments.runs))
    lines = -(-len(arguments.runs) // columns)
    fig = Figure(figsize=(3.7 * columns, 3.4 * lines), dpi=150, layout="constrained")
    axes = list(fig.subplots(lines, columns, squeeze=False).flat)
    for ax in axes[len(arguments.runs) :]:
        ax.set_visible(False)
    for folder, ax in zip(arguments.runs, axes, strict=False):
        results = read_json(folder / "results.json")["results"]
        settings = results[0]["settings"]
        rows = data.table(settings["path"], **settings["data_options"])
        tree = chow_liu(rows.rows("train"), rows.rows("test"), rows.vocab_size)
        models = {
            "MDM": [r for r in results if r["settings"]["model"] == "mdm"],
            "VADD": [r for r in results if r["settings"]["model"] == "vadd"],
        }
        steps = [row["num_steps"] for row in results[0]["bounds"]]
        few = [s for s in steps if not isinstance(s, str)]
        curves, levels = {}, {}
        print(f"\n{rows.name}: Chow-Liu {tree:.3f}, circuit {CIRCUITS.get(rows.name, '')}\n")
        print("| | " + " | ".join(f"T = {s}" if s in few else s for s in steps) + " |")
        print("| --- |" + " --- |" * len(steps))
        for name, group in models.items():
            found = {s: _values(group, s) for s in steps}
            curves[name] = plotting.Curve(
                few, [found[s][0] for s in few], [found[s][2] for s in few]
            )
            levels[f"{name}, one token a step"] = found["one token"][0]
            cells = [f"{found[s][0]:.3f} ± {found[s][1]:.3f} ({found[s][2]:.3f})" for s in steps]
            print(f"| {name}, {len(group)} seeds | " + " | ".join(cells) + " |")
            own = found["one token"][0]
            loss = [f"{own - found[s][0]:.3f}" for s in few]
            print(f"| {name}, loss against one token a step | " + " | ".join(loss) + " | |")
        levels = {"VADD, one token a step": levels["VADD, one token a step"], "Chow-Liu": tree}
        if rows.name in CIRCUITS:
            levels["circuit (HCLT)"] = CIRCUITS[rows.name]
        plotting.curves_by_steps(
            curves, ax, title=rows.name, ylabel="test bound, nats per row", levels=levels
        )
    plotting.save_figure(fig, arguments.out)


if __name__ == "__main__":
    main()
