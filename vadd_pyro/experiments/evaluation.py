r"""What is measured of a trained pair: bounds on its likelihood, and the quality of its samples.

* For each number of steps ``T`` the T-step bound (SPEC section 3b) on test rows, in nats per row,
  with its standard error; and the bound of one token a step.
* For each ``T`` rows drawn with ``T`` steps, held against test rows: pictures by the Fréchet
  distance in the features of a small classifier and a classifier two-sample test; text by n-gram
  Jensen-Shannon distance, bits per token under an n-gram model of the training text, and
  entropy; tables by the two-sample test. As many training rows are measured the same way: what a
  model would reach that had learned their law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vadd_pyro.data import DataSet
from vadd_pyro.data.text import TextData
from vadd_pyro.experiments.store import Experiment
from vadd_pyro.likelihood import Bound, log_likelihood_bound
from vadd_pyro.one_token import one_token_bound
from vadd_pyro.process import check_size
from vadd_pyro.quality import (
    ImageFeatures,
    NGramModel,
    frechet_distance,
    ngram_jensen_shannon,
    token_entropy,
    two_sample_test,
)
from vadd_pyro.sampling import sample

__all__ = ["QUALITY", "Judge", "evaluate"]

Row = dict[str, Any]
QUALITY = {
    "frechet": "Fréchet distance",
    "two_sample": "two-sample accuracy",
    "ngram_js": "n-gram JS, nats",
    "ngram_bits": "bits per token under an n-gram model",
    "entropy": "entropy, bits",
    "row_entropy": "entropy within a row, bits",
}
_ORDERS = (1, 2, 3, 4)
_MODEL_ORDER = 5


class Judge:
    """Quality of samples against the test part of a data set.

    What is trained for it (a classifier of pictures, an n-gram model) is trained once, on the
    training part.

    Args:
        data: the rows.
        num_samples: how many samples there will be; as many test rows are held against them, or
            all there are.
        seed: of classifiers and of the choice of rows.
    """

    def __init__(self, data: DataSet, num_samples: int, seed: int = 0) -> None:
        check_size("num_samples", num_samples, least=2)
        self.data = data
        self.num_samples = num_samples
        self.seed = seed
        self.real = data.rows("test", min(num_samples, len(data.test)), seed)
        self.features = self.ngrams = None
        if isinstance(data, TextData):
            # Windows overlap in training only; here the text is read once.
            self.ngrams = NGramModel(data.rows("train"), _MODEL_ORDER, data.vocab_size)
        elif data.shape is not None:
            self.features = ImageFeatures(data, seed=seed)
            self.real_features = self.features.features(self.real)

    def __call__(self, x: Tensor) -> list[Row]:
        """Measures of rows ``(N, D)``: metric, value, standard error (nan where there is none)."""
        rows: list[Row] = []

        def add(metric: str, value: float, stderr: float = math.nan) -> None:
            rows.append({"metric": metric, "value": float(value), "stderr": float(stderr)})

        if self.ngrams is not None:
            for order in _ORDERS:
                add(f"ngram_js_{order}", *ngram_jensen_shannon(self.real, x, order))
            add("ngram_bits", *self.ngrams.bits_per_token(x))
            entropy = token_entropy(x)
            add("entropy", entropy.pooled, entropy.pooled_stderr)
            add("row_entropy", entropy.within_rows, entropy.within_rows_stderr)
            return rows
        if self.features is not None:
            distance = frechet_distance(self.real_features, self.features.features(x))
            add("frechet", distance.value, distance.stderr)
        test = two_sample_test(self._values(self.real), self._values(x), seed=self.seed)
        add("two_sample", test.accuracy, test.stderr)
        return rows

    def _values(self, x: Tensor) -> Tensor:
        """Pixels as brightness, of which more is more; other tokens have no order."""
        return x if self.data.shape is None else x / (self.data.vocab_size - 1)

    def floor(self) -> list[Row]:
        """The measures of training rows."""
        return self(
            self.data.rows("train", min(self.num_samples, len(self.data.train)), self.seed + 1)
        )


def _in_pieces(bound: Callable[[Tensor], Bound], x: Tensor, bar: tqdm) -> tuple[float, float]:
    """Mean of a bound and its standard error over rows, with a bar that moves."""
    values = []
    for piece in x.split(max(1, math.ceil(len(x) / 20))):
        values.append(bound(piece).value)
        bar.update(len(piece))
    value = torch.cat(values)
    error = value.std() / len(value) ** 0.5 if len(value) > 1 else torch.tensor(math.nan)
    return float(value.mean()), float(error)


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
    seed: int = 0,
    judge: Judge | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a trained pair.

    Args:
        run: what to measure.
        split: rows on which bounds are taken; quality always compares with test rows.
        bound_steps: numbers of steps ``T`` of the bounds; none leaves them out.
        sample_steps: those of the samples; none leaves them out.
        num_rows: rows of the bounds, drawn at random; None takes all.
        num_particles: importance samples per step.
        num_draws: independent draws of path and latents per row.
        num_paths: reveal paths averaged inside the logarithm.
        one_token: whether to take the bound of one token a step, which has ``D`` steps.
        one_token_rows: rows of it, if others.
        one_token_terms: steps of each path that are scored, drawn at random; all by default.
        num_samples: samples for each number of steps.
        seed: of all of it.
        judge: what judges the samples; a new one by default.
        progress: whether to show bars.

    Returns:
        Plain values: what was measured (``"bounds"``, ``"quality"``, ``"floor"``) and how.
    """
    x = run.data.rows(split, None if num_rows is None else _at_most(num_rows, run, split), seed)
    common: dict[str, Any] = {"num_particles": num_particles, "num_draws": num_draws, "seed": seed}
    pair = (run.model, run.guide, run.process)
    bounds: list[Row] = []
    for num_steps in bound_steps:
        with _bar(f"bound, {num_steps} steps", len(x), progress) as bar:
            bound = partial(
                log_likelihood_bound, num_steps=num_steps, num_paths=num_paths, **common
            )
            value, error = _in_pieces(partial(bound, *pair), x, bar)
        bounds.append({"num_steps": num_steps, "value": value, "stderr": error, "rows": len(x)})
    if one_token:
        some = x if one_token_rows is None else x[:one_token_rows]
        paths = 1 if one_token_terms is not None else num_paths
        with _bar("bound, one token a step", len(some), progress) as bar:
            bound = partial(one_token_bound, num_paths=paths, num_terms=one_token_terms, **common)
            value, error = _in_pieces(partial(bound, *pair), some, bar)
        row = {"num_steps": "one token", "value": value, "stderr": error, "rows": len(some)}
        bounds.append(row)
    quality: list[Row] = []
    floor: list[Row] = []
    if sample_steps:
        judge = Judge(run.data, num_samples, seed) if judge is None else judge
        floor = judge.floor()
        with _bar("samples", len(sample_steps), progress) as bar:
            for num_steps in sample_steps:
                drawn = sample(run.model, run.process, num_samples, num_steps, seed=seed)
                quality += [{"num_steps": num_steps, **row} for row in judge(drawn)]
                bar.update(1)
    return {
        "title": run.settings.title,
        "data": run.data.name,
        "length": run.data.length,
        "settings": run.settings.to_dict(),
        "train_seconds": sum(run.seconds.values()),
        "split": split,
        "num_paths": num_paths,
        **common,
        "num_samples": num_samples,
        "bounds": bounds,
        "quality": quality,
        "floor": floor,
    }


def _at_most(num_rows: int, run: Experiment, split: str) -> int:
    return min(num_rows, len(getattr(run.data, split)))


def _bar(what: str, total: int, progress: bool) -> tqdm:
    return tqdm(total=total, desc=what, disable=not progress, leave=False, dynamic_ncols=True)
