r"""Draws in a plane or on a line: projection, and densities of draws on a grid.

More than two dimensions are shown in the first two principal components of one of the sets,

.. math::
    u = V^\top (z - \bar z), \qquad \mathrm{Cov}(z) V = V \Lambda ,

whose share of the variance is in the labels. Densities are sums of normal kernels,

.. math::
    \hat p(u) = \frac1N \sum_n \mathcal N(u; u_n, H), \qquad H = (c\, N^{-1/(p+4)})^2\,
    \mathrm{Cov}(u),

with Scott's rule for :math:`c = 1`; here :math:`c = 0.8`, because what is looked at often has
several modes. The region that holds most densely a share of the mass is bounded by the level
:math:`\ell` with :math:`\int_{\hat p \ge \ell} \hat p = \text{share}`.

References:
    Scott 1992, "Multivariate Density Estimation"; Hyndman 1996, "Computing and Graphing Highest
    Density Regions".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vadd_pyro.plotting.style import Values, check_names, matrix, share

__all__ = ["Grid", "Projection", "density", "draws", "grid_over", "kernel", "levels", "project"]

_MOST = 5_000  # draws that a density is made of
_NARROWER = 0.8


def draws(name: str, value: Values, dimensions: int | None = None) -> np.ndarray:
    """Draws as ``(N, d)`` floats; ``(N,)`` is one dimension.

    Raises:
        ValueError: for another shape, no dimension, or values that are not finite.
    """
    array = matrix(name, value, (None,) * np.ndim(value) if np.ndim(value) == 1 else (None, None))
    array = array.reshape(len(array), -1).astype(float)
    if dimensions is not None and array.shape[1] != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimensions, got {array.shape[1]}")
    return array


class Projection(NamedTuple):
    """Where to look at draws from.

    Args:
        mean: what is subtracted, ``(d,)``.
        directions: ``(d, p)`` with ``p`` at most 2.
        labels: of the ``p`` axes.
        note: what to say about it in a title; empty if nothing is left out.
    """

    mean: np.ndarray
    directions: np.ndarray
    labels: list[str]
    note: str

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """``(N, d)`` to ``(N, p)``."""
        return (z - self.mean) @ self.directions


def project(z: np.ndarray, names: Sequence[str] | None) -> Projection:
    """The plane or line in which draws ``(N, d)`` are shown.

    Args:
        z: the set whose principal components are taken where there are more than two dimensions.
        names: of the dimensions, ``z[0]``, ``z[1]``, ... if omitted.
    """
    size = z.shape[1]
    names = check_names(names, size, "z[{}]" if size > 1 else "z")
    if size <= 2:
        return Projection(np.zeros(size), np.eye(size), names, "")
    mean = z.mean(0)
    variance, vectors = np.linalg.eigh((z - mean).T @ (z - mean) / len(z))
    variance, vectors = variance[::-1][:2].clip(0), vectors[:, ::-1][:, :2]
    largest = np.abs(vectors).argmax(0)
    vectors = vectors * np.where(vectors[largest, [0, 1]] < 0, -1, 1)  # of two signs, one
    total = float(((z - mean) ** 2).mean(0).sum())
    parts = variance / total if total > 0 else variance
    labels = [f"PC {i + 1} ({share(float(p))} of variance)" for i, p in enumerate(parts)]
    return Projection(mean, vectors, labels, f"2 of {size} principal components")


class Grid(NamedTuple):
    """Midpoints of cells along each of ``p`` axes, and all of them, ``(cells, p)``."""

    axes: list[np.ndarray]
    points: np.ndarray

    @property
    def cell(self) -> float:
        """Length or area of a cell."""
        return float(np.prod([axis[1] - axis[0] for axis in self.axes]))


def grid_over(*sets: np.ndarray, size: int | None = None, tails: float = 0.002) -> Grid:
    """A grid that covers all but the tails of sets of draws ``(N, p)``, with a margin.

    Args:
        sets: the draws.
        size: midpoints along each axis; 400 on a line, 90 in a plane if omitted.
        tails: share of each set left out at each end; heavy tails would leave nothing to see.
    """
    dimensions = sets[0].shape[1]
    size = size or (400 if dimensions == 1 else 90)
    low = np.min([np.quantile(points, tails, axis=0) for points in sets], axis=0)
    high = np.max([np.quantile(points, 1 - tails, axis=0) for points in sets], axis=0)
    span = high - low
    margin = np.where(span > 0, 0.15 * span, 0.5)
    axes = [np.linspace(low[i] - margin[i], high[i] + margin[i], size) for i in range(dimensions)]
    return Grid(axes, np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, dimensions))


def kernel(points: np.ndarray, grid: Grid, count: int | None = None) -> np.ndarray:
    """Covariance of the kernels for a set of draws ``(N, p)``, never narrower than the cells.

    Args:
        points: the draws.
        grid: where the density is evaluated.
        count: number of draws to smooth for; theirs if omitted.
    """
    dimensions = points.shape[1]
    spread = np.cov(points.T).reshape(dimensions, dimensions) if len(points) > 1 else 0.0
    count = len(points) if count is None else count
    width = _NARROWER * min(count, _MOST) ** (-1 / (dimensions + 4))
    least = np.array([(axis[1] - axis[0]) * 0.7 for axis in grid.axes])
    return np.asarray(width**2 * spread + np.diag(least**2))


def density(points: np.ndarray, grid: Grid, covariance: np.ndarray | None = None) -> np.ndarray:
    """Density of draws ``(N, p)`` on a grid, as an array of its shape.

    Args:
        points: the draws; of many, evenly chosen ones.
        grid: where it is evaluated.
        covariance: of the kernels; from the draws if omitted.
    """
    from scipy.spatial.distance import cdist

    covariance = kernel(points, grid) if covariance is None else covariance
    points = points[:: -(-len(points) // _MOST)]
    root = np.linalg.cholesky(covariance)
    white = np.linalg.solve(root, points.T).T
    at = np.linalg.solve(root, grid.points.T).T
    pieces = np.array_split(at, -(-len(at) * len(white) // 4_000_000))
    total = [np.exp(-0.5 * cdist(part, white, "sqeuclidean")).mean(1) for part in pieces]
    height = np.prod(np.diag(root)) * (2 * np.pi) ** (len(root) / 2)
    return np.concatenate(total).reshape([len(axis) for axis in grid.axes]) / height


def levels(values: np.ndarray, shares: Sequence[float]) -> list[float]:
    """Levels of a density on a grid whose regions hold these shares of its mass, increasing."""
    ordered = np.sort(values, axis=None)[::-1]
    mass = ordered.cumsum() / ordered.sum()
    at = np.searchsorted(mass, shares).clip(max=len(mass) - 1)
    return [float(level) for level in np.unique(ordered[at])]
