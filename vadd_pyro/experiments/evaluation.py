r"""What is measured of a trained pair: bounds on its likelihood, and the quality of its samples.

* For each number of steps ``T`` the T-step bound on test rows, in nats per row,
  with its standard error; and the bound of one token a step.
* For each ``T`` rows drawn with ``T`` steps, held against test rows: pictures by the Fréchet
  distance in the features of a small classifier (as it is, and less the bias of so few rows, as
  the jackknife finds it) and a classifier two-sample test; text by n-gram
  Jensen-Shannon distance, bits per token under an n-gram model of the training text, and
  entropy; tables by the two-sample test. The same figures of real rows stand beside: of training
  rows against test rows, and for bits under an n-gram model, which knows the training text by
  heart, of test rows.

Steps are of equal length, or those of the grid with the best bound on validation rows
(:mod:`vadd_pyro.grids`): a latent that couples what the first step reveals lets that step be a
long one, a model without wants it short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vadd_pyro.data import DataSet
from vadd_pyro.data.text import TextData
from vadd_pyro.experiments.store import Experiment
from vadd_pyro.grids import best_path, candidate_times, step_terms
from vadd_pyro.likelihood import Bound, log_likelihood_bound
from vadd_pyro.names import TIME_GRIDS
from vadd_pyro.one_token import one_token_bound
from vadd_pyro.process import check_size, make_time_grid
from vadd_pyro.quality import (
    ImageFeatures,
    NGramModel,
    frechet_distance,
    ngram_jensen_shannon,
    token_entropy,
    two_sample_test,
)
from vadd_pyro.sampling import sample

__all__ = ["QUALITY", "Judge", "evaluate", "searched", "time_grids_of"]

Row = dict[str, Any]
QUALITY = {
    "frechet": "Fréchet distance",
    "frechet_unbiased": "Fréchet distance less its bias",
    "two_sample": "two-sample accuracy",
    "ngram_js": "n-gram JS, nats",
    "ngram_bits": "bits per token under an n-gram model",
    "entropy": "entropy, bits",
    "row_entropy": "entropy within a row, bits",
}
_CANDIDATES = 16
_ORDERS = (1, 2, 3, 4)
_MODEL_ORDER = 5


class Judge:
    """Quality of samples against the test part of a data set.

    What is trained for it (a classifier of pictures, an n-gram model) is trained once, on the
    training part. What cannot be measured, of rows too few or too short, is left out.

    Args:
        data: the rows.
        num_samples: how many samples there will be; as many test rows are held against them, or
            all there are.
        seed: of classifiers and of the choice of rows.

    Attributes:
        floor: the measures of real rows.
        left_out: why a metric is not measured, by its name.

    Raises:
        ValueError: if nothing can be measured, saying why.
    """

    def __init__(self, data: DataSet, num_samples: int, seed: int = 0) -> None:
        check_size("num_samples", num_samples, least=2)
        self.data = data
        self.num_samples = num_samples
        self.seed = seed
        self.real = data.rows("test", min(num_samples, len(data.test)), seed)
        self.left_out: dict[str, str] = {}
        self._metrics = self._choose()
        train = data.rows("train", min(num_samples, len(data.train)), seed + 1)
        self.floor: list[Row] = []
        for metric, measure in list(self._metrics.items()):
            try:
                found = measure(self.real if metric == "ngram_bits" else train)
            except ValueError as error:
                self.left_out[metric] = str(error)
                del self._metrics[metric]
                continue
            self.floor += _rows(metric, found)
        if not self._metrics:
            raise ValueError(
                f"nothing can be measured of {num_samples} samples of {data.name}: "
                + "; ".join(f"{name}: {why}" for name, why in self.left_out.items())
            )

    def _choose(self) -> dict[str, Callable[[Tensor], Sequence[float]]]:
        """The metrics that suit the data, each as a function of rows."""
        data, real = self.data, self.real
        if isinstance(data, TextData):
            order = min(_MODEL_ORDER, data.length - 1)
            ngrams = NGramModel(data.rows("train"), order, data.vocab_size)
            metrics: dict[str, Callable[[Tensor], Sequence[float]]] = {
                f"ngram_js_{n}": partial(ngram_jensen_shannon, real, n=n) for n in _ORDERS
            }
            metrics["ngram_bits"] = ngrams.bits_per_token
            metrics["entropy"] = lambda x: token_entropy(x)[:2]
            metrics["row_entropy"] = lambda x: token_entropy(x)[2:4]
            return metrics
        test: dict[str, Callable[[Tensor], Sequence[float]]] = {"two_sample": self._two_sample}
        if data.shape is None:
            return test
        network = ImageFeatures(data, seed=self.seed)
        features = network.features(real)
        return {
            "frechet": lambda x: frechet_distance(features, network.features(x)),
            **test,
        }

    def _two_sample(self, x: Tensor) -> Sequence[float]:
        """Pixels are brightness, of which more is more; other tokens have no order."""
        scale = 1 if self.data.shape is None else self.data.vocab_size - 1
        pair = (self.real, x) if scale == 1 else (self.real / scale, x / scale)
        return two_sample_test(*pair, seed=self.seed)[:2]

    def __call__(self, x: Tensor) -> list[Row]:
        """Measures of rows ``(N, D)``: metric, value, standard error."""
        return [row for metric, f in self._metrics.items() for row in _rows(metric, f(x))]


def _rows(metric: str, found: Sequence[float]) -> list[Row]:
    """A measure, and of the Fréchet distance also what is left without its bias."""
    rows = [{"metric": metric, "value": float(found[0]), "stderr": float(found[1])}]
    if metric == "frechet":
        value = float(found[0]) - float(found[2])
        rows.append({**rows[0], "metric": "frechet_unbiased", "value": value})
    return rows


def searched(steps: int | str) -> bool:
    """Whether the best grid of so many steps is searched for.

    One step has but one, and beyond eight there is little to choose between.
    """
    return isinstance(steps, int) and 1 < steps <= _CANDIDATES // 2


def time_grids_of(
    run: Experiment,
    steps: Iterable[int],
    kind: str = "best",
    *,
    num_rows: int = 100,
    num_particles: int = 16,
    seed: int = 0,
) -> dict[int, Tensor]:
    """A time grid for each number of steps, which does not depend on the others.

    Args:
        run: a trained pair.
        steps: the numbers of steps.
        kind: ``"equal"``, or ``"best"``: up to eight steps the grid with the best T-step bound on
            validation rows, among those whose points are sixteenths or points of the equal one.
        num_rows: validation rows.
        num_particles: importance samples per step.
        seed: of the choice.

    Returns:
        Grids ``(T + 1,)`` in double precision, by ``T``.

    Raises:
        ValueError: for another kind.
    """
    if kind not in TIME_GRIDS:
        raise ValueError(f"time_grids must be one of {', '.join(TIME_GRIDS)}, got {kind!r}")
    grids = {count: make_time_grid(count) for count in steps}
    if kind == "equal":
        return grids
    together: dict[tuple[float, ...], list[int]] = {}  # numbers of steps by their candidates
    for count in filter(searched, grids):
        points = candidate_times(count, _CANDIDATES)
        together.setdefault(tuple(points.tolist()), []).append(count)
    for own, counts in together.items():
        candidates = torch.tensor(own, dtype=torch.double)
        terms = step_terms(
            run.model,
            run.guide,
            run.process,
            run.data.rows("valid", min(num_rows, len(run.data.valid)), seed),
            candidates,
            num_particles=num_particles,
            seed=seed,
        )
        grids |= {count: candidates[best_path(terms, count)] for count in counts}
    return grids


def _in_pieces(
    bound: Callable[..., Bound], x: Tensor, seed: int, what: str, progress: bool
) -> list[float]:
    """A bound on every row, with a bar that moves. Each piece has random numbers of its own."""
    values: list[float] = []
    with tqdm(total=len(x), desc=what, disable=not progress, leave=False) as bar:
        for i, piece in enumerate(x.split(max(1, math.ceil(len(x) / 20)))):
            values += bound(piece, seed=seed * 1000 + i).value.tolist()
            bar.update(len(piece))
    return values


def evaluate(
    run: Experiment,
    *,
    split: str = "test",
    bound_steps: Sequence[int] = (1, 2, 4, 8, 16, 64),
    sample_steps: Sequence[int] = (1, 2, 4, 8, 16),
    num_rows: int | None = 1000,
    num_particles: int = 64,
    num_draws: int = 1,
    num_paths: int = 1,
    one_token: bool = True,
    one_token_rows: int | None = None,
    one_token_terms: int | None = None,
    num_samples: int = 2000,
    time_grids: str = "equal",
    seed: int = 0,
    judge: Judge | None = None,
    known: Mapping[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a trained pair.

    Args:
        run: what to measure.
        split: rows on which bounds are taken; quality always compares with test rows.
        bound_steps: numbers of steps ``T`` of the bounds; none leaves them out.
        sample_steps: those of the samples; none leaves them out.
        num_rows: rows of the bounds, drawn at random; None takes all, and so do more than there
            are.
        num_particles: importance samples per step.
        num_draws: independent draws of path and latents per row.
        num_paths: reveal paths averaged inside the logarithm.
        one_token: whether to take the bound of one token a step, which has ``D`` steps.
        one_token_rows: so many of the rows for it; all by default.
        one_token_terms: steps of each path that are scored, drawn at random, of one path then; all
            by default.
        num_samples: samples for each number of steps.
        time_grids: whose steps are taken, see :func:`time_grids_of`; the choice among grids does
            not depend on ``seed``.
        seed: of all of it.
        judge: what judges the samples; a new one by default.
        known: an earlier result for the same pair and data: what was measured the same way is
            taken from it, and measures of other numbers of steps are kept.
        keep: called with the result so far after each measure.
        progress: whether to show bars.

    Returns:
        Plain values: ``"bounds"`` (each with its values by row, and how it was taken),
        ``"quality"``, ``"floor"``, and what run it was; of the best time grids ``"grids"``, too.

    Raises:
        ValueError: for the best time grids on the validation rows by which they are chosen.
    """
    if time_grids == "best" and split == "valid":
        raise ValueError(
            "time_grids = 'best' are chosen on validation rows: take split = 'test', got 'valid'"
        )
    if sample_steps and judge is None:
        judge = Judge(run.data, num_samples, seed)
    stored = getattr(run.data, split) if split in ("train", "valid", "test") else ()
    x = run.data.rows(
        split, None if num_rows is None or num_rows >= len(stored) else num_rows, seed
    )
    how = {"split": split, "num_particles": num_particles, "num_draws": num_draws, "seed": seed}
    known = {} if known is None else known
    asked = [*bound_steps, *sample_steps]
    grids = {int(count): torch.tensor(g).double() for count, g in known.get("grids", {}).items()}
    grids |= time_grids_of(run, [count for count in asked if count not in grids], time_grids)
    unequal: dict[int | str, list[float]] = {
        count: grid.tolist()
        for count, grid in grids.items()
        if not torch.equal(grid, make_time_grid(count))
    }
    result: dict[str, Any] = {
        "title": run.settings.title,
        "data": run.data.name,
        "length": run.data.length,
        "fingerprint": run.data.fingerprint,
        "settings": run.settings.to_dict(),
        "train_seconds": sum(run.seconds.values()),
        "bounds": list(known.get("bounds", [])),
        "quality": list(known.get("quality", [])),
        "floor": list(known.get("floor", [])) if judge is None else judge.floor,
    }
    if time_grids == "best":
        told = {str(count): grid.tolist() for count, grid in grids.items()}
        result |= {"time_grids": time_grids, "grids": told}

    def bounded(steps: int | str, bound: Any, rows: Tensor, paths: int, terms: int | None) -> None:
        taken = {**how, "rows": len(rows), "num_paths": paths, "num_terms": terms}
        taken["time_grid"] = unequal.get(steps)
        _drop_unless(result["bounds"], steps, taken)
        if any(row["num_steps"] == steps for row in result["bounds"]):
            return
        what = f"bound, {steps} steps" if isinstance(steps, int) else "bound, one token a step"
        score = partial(bound, run.model, run.guide, run.process)
        score = partial(score, num_particles=num_particles, num_draws=num_draws, num_paths=paths)
        values = torch.tensor(_in_pieces(score, rows, seed, what, progress), dtype=torch.double)
        row = {"num_steps": steps, "value": float(values.mean()), "stderr": _error(values)}
        result["bounds"].append({**row, **taken, "values": [round(v, 5) for v in values.tolist()]})
        if keep is not None:
            keep(result)

    for num_steps in bound_steps:
        bound = partial(log_likelihood_bound, time_grid=grids[num_steps])
        bounded(num_steps, bound, x, num_paths, None)
    if one_token:
        bound = partial(one_token_bound, num_terms=one_token_terms)
        paths = 1 if one_token_terms is not None else num_paths
        bounded("one token", bound, x[:one_token_rows], paths, one_token_terms)
    for num_steps in sample_steps:
        taken = {"num_samples": num_samples, "seed": seed, "time_grid": unequal.get(num_steps)}
        _drop_unless(result["quality"], num_steps, taken)
        if judge is None or any(row["num_steps"] == num_steps for row in result["quality"]):
            continue
        drawn = sample(
            run.model,
            run.process,
            num_samples,
            time_grid=grids[num_steps],
            seed=seed,
        )
        rows = judge(drawn.cpu())
        result["quality"] += [{"num_steps": num_steps, **taken, **row} for row in rows]
        if keep is not None:
            keep(result)
    return result


def _drop_unless(rows: list[Row], steps: int | str, taken: Mapping[str, Any]) -> None:
    """Forget what was measured for these steps in another way."""
    rows[:] = [
        row
        for row in rows
        if row["num_steps"] != steps or all(row.get(k) == v for k, v in taken.items())
    ]


def _error(values: Tensor) -> float:
    return float(values.std()) / len(values) ** 0.5 if len(values) > 1 else math.nan
