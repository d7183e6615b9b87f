r"""Can a classifier tell samples from data?

A classifier is trained on half of the rows of two samples and asked about the other half, and the
other way round. The share that it tells right is, for the best of all rules,

.. math::
    \tfrac12 + \tfrac12\, \mathrm{TV}(p, q) ,

one half for equal laws, and for any other rule less: accuracy is a bound of a distance from below.
A classifier that fails to tell two samples apart may be too weak, or have seen too few rows.

References:
    Lopez-Paz and Oquab 2017, "Revisiting classifier two-sample tests" (arXiv 1610.06545).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from vadd_pyro.process import check_size

__all__ = ["TwoSampleTest", "averaged_classifier", "held_out_test", "two_sample_test"]

_LEAST_ROWS = 20
_MOST_PRODUCTS = 64  # columns whose products the classifier sees too
_MOST_CODES = 255  # that scikit-learn's trees take


class TwoSampleTest(NamedTuple):
    """How well a classifier tells two samples apart.

    Args:
        accuracy: share of held-out draws told right; .5 if both have one law.
        stderr: its standard error over rows, as if both halves erred alike: each classifier was
            trained on the other half, so that they do not err independently.
        p_value: of the hypothesis of one law: the smaller binomial tail of the two halves, times
            two (Bonferroni). Valid, and cautious.
    """

    accuracy: float
    stderr: float
    p_value: float


def two_sample_test(
    real: Tensor, fake: Tensor, *, seed: int = 0, classifier: Any = None
) -> TwoSampleTest:
    """Train a classifier on either half of real and generated rows, and test it on the other.

    Args:
        real, fake: ``(N, d)`` and ``(M, d)`` of independent rows. Floating-point columns are
            numbers, integer ones codes without order (zeros and ones are either): pass the tokens
            of a text as they are, grey pixels as brightness. Of the larger sample, as many rows
            are drawn as the other has.
        seed: of that draw, the halves and the default classifier.
        classifier: one of scikit-learn's, cloned for each half. By default boosted trees; up to 64
            columns of numbers, averaged with a logistic regression on their squares and products.

    Returns:
        :class:`TwoSampleTest`.

    Raises:
        TypeError: if one sample holds numbers and the other codes.
        ValueError: for samples of other shapes, too few rows, values that are not finite, or more
        than 255 codes.

    References:
        Lopez-Paz and Oquab 2017 (arXiv 1610.06545).
    """
    check_size("seed", seed, least=0)
    for name, value in (("real", real), ("fake", fake)):
        _check(name, value)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            "real and fake must have the same columns, got shapes "
            f"{tuple(real.shape)} and {tuple(fake.shape)}"
        )
    if real.is_floating_point() != fake.is_floating_point():
        raise TypeError(
            f"real and fake must both be numbers or both codes, got {real.dtype} and {fake.dtype}"
        )
    highest = max(int(real.max()), int(fake.max()))
    codes = not real.is_floating_point() and highest > 1
    if codes and classifier is None and highest >= _MOST_CODES:
        raise ValueError(
            f"real and fake must hold codes below {_MOST_CODES}: pass numbers as floating point, "
            "or a classifier"
        )
    rng = np.random.default_rng(seed)
    size = min(len(real), len(fake))
    chosen = [x.double().cpu().numpy()[rng.permutation(len(x))[:size]] for x in (real, fake)]
    state = int(rng.integers(2**31))
    if classifier is None and not codes and real.shape[1] <= _MOST_PRODUCTS:
        classifier = averaged_classifier(real.shape[1], state)
    elif classifier is None:
        classifier = _boosted_trees(100, state, list(range(real.shape[1])) if codes else None)
    return held_out_test(np.stack(chosen), np.arange(size) % 2, classifier)


def _check(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dim() != 2 or value.shape[1] < 1:
        raise ValueError(f"{name} must have shape (N, d), got {tuple(value.shape)}")
    if len(value) < _LEAST_ROWS:
        raise ValueError(f"{name} has {len(value)} rows: telling laws apart needs {_LEAST_ROWS}")
    if not value.isfinite().all():
        raise ValueError(f"{name} must be finite: some values are infinite or nan")
    if not value.is_floating_point() and (value < 0).any():
        raise ValueError(f"{name} must hold codes of at least 0, got {int(value.min())}")


def held_out_test(x: np.ndarray, half: np.ndarray, classifier: Any) -> TwoSampleTest:
    """Train a classifier on either half of two samples, and see how well it tells the other apart.

    Args:
        x: both samples, ``(2, N, d)``; rows of the same index are held out together.
        half: which half a pair of rows belongs to, 0 or 1, ``(N,)``.
        classifier: one of scikit-learn's, cloned for each half.

    Returns:
        :class:`TwoSampleTest`, its standard error over pairs.
    """
    from scipy.stats import binom
    from sklearn.base import clone

    right, errors, p_values = 0, [], []
    for held_out in (0, 1):
        train, test = x[:, half != held_out], x[:, half == held_out]
        fitted = clone(classifier)
        fitted.fit(train.reshape(-1, x.shape[-1]), np.repeat([0, 1], train.shape[1]))
        guess = fitted.predict(test.reshape(-1, x.shape[-1])).reshape(2, -1)
        correct = guess == np.array([[0], [1]])
        right += int(correct.sum())
        errors.append(correct.mean(0).std(ddof=1) / correct.shape[1] ** 0.5)
        p_values.append(binom.sf(correct.sum() - 1, correct.size, 0.5))
    accuracy = right / (2 * x.shape[1])
    return TwoSampleTest(accuracy, float(np.mean(errors)), min(1.0, 2 * float(min(p_values))))


def averaged_classifier(num_columns: int, seed: int) -> Any:
    """Boosted trees averaged with a regularised logistic regression.

    Args:
        num_columns: how many columns it will see; up to 64, the regression sees their squares and
            products too.
        seed: of the trees.

    Returns:
        A classifier of scikit-learn, not yet fitted.
    """
    from sklearn.ensemble import VotingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    degree = 2 if num_columns <= _MOST_PRODUCTS else 1
    smooth = make_pipeline(
        StandardScaler(),
        PolynomialFeatures(degree, include_bias=False),
        StandardScaler(),
        LogisticRegression(C=0.01, max_iter=300),
    )
    trees = _boosted_trees(50, seed)
    return VotingClassifier([("trees", trees), ("smooth", smooth)], voting="soft")


def _boosted_trees(num_trees: int, seed: int, codes: list[int] | None = None) -> Any:
    """Boosted trees of scikit-learn; ``codes`` are the columns that are no numbers."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(
        max_iter=num_trees,
        max_leaf_nodes=15,
        early_stopping=False,
        categorical_features=codes,
        random_state=seed,
    )
