r"""The Fréchet distance between two sets of features.

With means and covariances of the two sets,

.. math::
    d^2 = \| \mu_a - \mu_b \|^2 + \mathrm{tr}\, S_a + \mathrm{tr}\, S_b - 2\, \mathrm{tr}\,
    (S_a S_b)^{1/2} ,

the squared Wasserstein distance of two normals. The last trace is the sum of the singular values
of :math:`S_a^{1/2} S_b^{1/2}`: real, the same for both orders, and defined for singular
covariances.

From ``N`` rows the figure is too large, by about a constant over ``N`` that differs between laws:
two sets of *one* law are apart too. So a distance is read beside a *floor*, the same call on two
sets of real rows, as large as the two compared; distances from different numbers of rows, or in
the features of different networks, do not compare.

References:
    Dowson and Landau 1982, "The Fréchet distance between multivariate normal distributions";
    Heusel et al. 2017 (arXiv 1706.08500); Chong and Forsyth 2020 (arXiv 1911.07023) for the bias;
    Efron and Stein 1981 for the jackknife.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from vadd_pyro.process import check_size

__all__ = ["FrechetDistance", "frechet_distance"]


class FrechetDistance(NamedTuple):
    """A Fréchet distance from samples, in squared units of the features.

    Args:
        value: as above, of the sample means and covariances.
        stderr: its standard error over the rows of both sets. For two sets of one law it is about
            1.4 times too large, the distance being quadratic there.
        bias: by how much the jackknife finds ``value`` too large for so few rows; ``value - bias``
            is nearly unbiased where there are many more rows than features.
    """

    value: float
    stderr: float
    bias: float


class _Moments(NamedTuple):
    """Mean ``(F,)``, symmetric root of the covariance ``(F, F)``, and its trace."""

    mean: np.ndarray
    root: np.ndarray
    trace: float


def frechet_distance(
    a: np.ndarray | Tensor, b: np.ndarray | Tensor, *, num_groups: int = 50, seed: int = 0
) -> FrechetDistance:
    """Compare the means and covariances of two sets of features.

    The standard error is a jackknife's: the rows of either set fall into groups at random, each
    group is left out in turn, and the variances of the two sets add. (A bootstrap would do worse:
    rows that repeat lower the rank of a covariance and raise the distance itself.)

    Args:
        a, b: features, ``(N, F)`` and ``(M, F)``, of independent rows.
        num_groups: in how many groups the rows of each set fall.
        seed: of the groups.

    Returns:
        :class:`FrechetDistance`, the same for ``b, a`` up to rounding.

    Raises:
        ValueError: for sets of other shapes or with fewer rows than groups, and for features that
        are not finite.

    References:
        Heusel et al. 2017 (arXiv 1706.08500), section 2.
    """
    check_size("num_groups", num_groups, least=2)
    check_size("seed", seed, least=0)
    sets = [_checked(name, value, num_groups) for name, value in (("a", a), ("b", b))]
    if sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(
            "a and b must have the same number of features, got "
            f"{sets[0].shape[1]} and {sets[1].shape[1]}"
        )
    moments = [_moments(x) for x in sets]
    distance = _distance(*moments)
    variance = bias = 0.0
    for x, other in zip(sets, reversed(moments), strict=True):
        groups = np.random.default_rng(seed).permutation(len(x)) % num_groups
        left_out = np.array(
            [_distance(_moments(x[groups != group]), other) for group in range(num_groups)]
        )
        variance += (num_groups - 1) * float(left_out.var())
        bias += (num_groups - 1) * float(left_out.mean() - distance)
    return FrechetDistance(distance, variance**0.5, bias)


def _checked(name: str, value: np.ndarray | Tensor, num_groups: int) -> np.ndarray:
    value = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    x = np.asarray(value, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] < 1:
        raise ValueError(f"{name} must have shape (N, F), got {x.shape}")
    least = max(num_groups, 4)  # two rows and more are left where a group is out
    if len(x) < least:
        raise ValueError(
            f"{name} has {len(x)} rows: expected at least {least} for num_groups={num_groups}"
        )
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must be finite: some features are infinite or nan")
    return x


def _moments(x: np.ndarray) -> _Moments:
    mean = x.mean(0)
    centred = x - mean
    covariance = centred.T @ centred / (len(x) - 1)
    values, vectors = np.linalg.eigh(covariance)
    # Rounding leaves a singular covariance with tiny values of either sign.
    floor = len(values) * np.finfo(np.float64).eps * values[-1]
    values = np.where(values > floor, values, 0.0)
    return _Moments(mean, (vectors * np.sqrt(values)) @ vectors.T, float(values.sum()))


def _distance(a: _Moments, b: _Moments) -> float:
    overlap = np.linalg.svd(a.root @ b.root, compute_uv=False).sum()
    apart = float(((a.mean - b.mean) ** 2).sum())
    return max(0.0, apart + a.trace + b.trace - 2 * float(overlap))
