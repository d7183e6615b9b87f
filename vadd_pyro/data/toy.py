r"""Densities in the plane on a grid of ``K`` by ``K`` bins, and the probability of every bin.

Most are a curve or a set of centres with isotropic normal noise, so the probability of a bin is a
one-dimensional integral of products of normal distribution functions, done here by quadrature;
the checkerboard is in closed form; the pinwheel from 16 million draws. The first and the last bin
of an axis reach to infinity.

The shapes are those of Grathwohl et al. 2019 (FFJORD, arXiv 1810.01367); ``eight_modes`` and
``swiss_roll_es`` follow the protocol of Ivanov et al. 2026 (App. B.1): 49 edges on ``[-3, 3]``.
Circles and moons have the law of scikit-learn's, which lay their points out evenly; here every
draw is independent.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vadd_pyro.data.base import TokenDistribution
from vadd_pyro.process import check_size

__all__ = [
    "TOYS",
    "ToyDensity",
    "checkerboard",
    "circles",
    "eight_modes",
    "moons",
    "pinwheel",
    "swiss_roll",
    "swiss_roll_es",
    "toy",
    "two_spirals",
]

Points = np.ndarray
_QUADRATURE = 20_000
_PINWHEEL_DRAWS = 16_000_000


class ToyDensity(TokenDistribution):
    """A density in the plane, binned.

    Args:
        name: what tables and figures call it.
        edges: inner bin edges, ``(K - 1,)`` increasing, the same on both axes.
        draw_points: ``draw_points(n, rng)`` gives ``n`` points ``(n, 2)``.
        law: ``law(edges)`` gives the probability of every bin, ``(K, K)``.
    """

    def __init__(
        self,
        name: str,
        edges: np.ndarray,
        draw_points: Callable[[int, np.random.Generator], Points],
        law: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        super().__init__(name, len(edges) + 1, 2)
        self.edges = edges
        self._draw_points = draw_points
        self._bins_law = law

    def _draw(self, num_samples: int, rng: np.random.Generator) -> np.ndarray:
        return self.tokenize(self._draw_points(num_samples, rng)).numpy()

    def _law(self) -> np.ndarray:
        return self._bins_law(self.edges)

    def tokenize(self, points: Points) -> Tensor:
        """Bins of points in the plane, ``(n, 2)`` long."""
        return torch.from_numpy(np.searchsorted(self.edges, points, side="right")).long()

    def centers(self) -> np.ndarray:
        """Coordinates of the bin centres, ``(K,)``.

        The outermost bins are given the width of their neighbours.
        """
        width = self.edges[1] - self.edges[0] if len(self.edges) > 1 else 1.0
        middle = (self.edges[1:] + self.edges[:-1]) / 2
        return np.concatenate([[self.edges[0] - width / 2], middle, [self.edges[-1] + width / 2]])


def _edges(vocab_size: int, low: float, high: float) -> np.ndarray:
    check_size("vocab_size", vocab_size, least=2)
    return np.linspace(low, high, vocab_size + 1)[1:-1]


def _protocol_edges(vocab_size: int) -> np.ndarray:
    check_size("vocab_size", vocab_size, least=3)
    return np.linspace(-3, 3, vocab_size - 1)


def _smoothed(points: Points, weights: np.ndarray, sd: float, edges: np.ndarray) -> np.ndarray:
    """Bin probabilities of centres ``(m, 2)`` with weights, each with normal noise ``sd``."""
    from scipy.special import ndtr

    factors = []
    for axis in range(2):
        cdf = ndtr((edges[None, :] - points[:, axis : axis + 1]) / sd)
        bounds = np.pad(cdf, ((0, 0), (1, 1)), constant_values=(0.0, 1.0))
        factors.append(np.diff(bounds, axis=1))
    return (factors[0] * weights[:, None]).T @ factors[1]


def _noisy_curve(
    name: str,
    edges: np.ndarray,
    curve: Callable[[np.ndarray], Points],
    sd: float,
    draw_points: Callable[[int, np.random.Generator], Points] | None = None,
) -> ToyDensity:
    """A curve ``[0, 1] -> plane`` run through uniformly, with normal noise."""

    def draw(n: int, rng: np.random.Generator) -> Points:
        return curve(rng.random(n)) + sd * rng.standard_normal((n, 2))

    def law(edges: np.ndarray) -> np.ndarray:
        middle = (np.arange(_QUADRATURE) + 0.5) / _QUADRATURE
        return _smoothed(curve(middle), np.full(_QUADRATURE, 1 / _QUADRATURE), sd, edges)

    return ToyDensity(name, edges, draw if draw_points is None else draw_points, law)


def checkerboard(vocab_size: int = 100) -> ToyDensity:
    """Eight squares of a 4 x 4 board on ``[-4, 4]``, each uniform."""

    def draw(n: int, rng: np.random.Generator) -> Points:
        column = rng.integers(4, size=n)
        row = 2 * rng.integers(2, size=n) + column % 2
        return 2 * (np.stack([column, row], -1) + rng.random((n, 2))) - 4

    def law(edges: np.ndarray) -> np.ndarray:
        bounds = np.concatenate([[-4.0], edges, [4.0]])
        corners = np.linspace(-4, 4, 5)
        low = np.maximum(bounds[:-1, None], corners[None, :-1])
        high = np.minimum(bounds[1:, None], corners[None, 1:])
        overlap = np.clip(high - low, 0, None) / 2  # share of each side that falls in each bin
        board = (np.add.outer(np.arange(4), np.arange(4)) % 2 == 0) / 8
        return overlap @ board @ overlap.T

    return ToyDensity("checkerboard", _edges(vocab_size, -4, 4), draw, law)


def _roll(sd: float, divisor: float, name: str, edges: np.ndarray) -> ToyDensity:
    def spiral(u: np.ndarray) -> Points:
        angle = 1.5 * np.pi * (1 + 2 * u)
        return np.stack([angle * np.cos(angle), angle * np.sin(angle)], -1)

    def draw(n: int, rng: np.random.Generator) -> Points:
        # Number for number what make_swiss_roll draws (place along the spiral, width of the roll,
        # noise of all three coordinates), without the second that importing scikit-learn takes.
        state = np.random.RandomState(int(rng.integers(2**31)))
        u, _ = state.uniform(size=(2, n))
        noise = state.standard_normal(size=(3, n))[[0, 2]]
        return (spiral(u) + sd * noise.T) / divisor

    return _noisy_curve(name, edges, lambda u: spiral(u) / divisor, sd / divisor, draw)


def swiss_roll(vocab_size: int = 100) -> ToyDensity:
    """scikit-learn's ``make_swiss_roll(noise=1)``, coordinates 0 and 2, divided by 5, on ``[-4,
    4]``.
    """
    return _roll(1.0, 5.0, "swiss roll", _edges(vocab_size, -4, 4))


def swiss_roll_es(vocab_size: int = 50) -> ToyDensity:
    """Protocol ES.

    ``make_swiss_roll(noise=0.45)`` divided by 7.5, ``vocab_size - 1`` edges on ``[-3, 3]``.
    """
    return _roll(0.45, 7.5, "swiss roll (ES)", _protocol_edges(vocab_size))


def circles(vocab_size: int = 100) -> ToyDensity:
    """The law of ``make_circles(factor=0.5, noise=0.08)`` times 3, on ``[-4, 4]``."""

    def curve(u: np.ndarray) -> Points:
        angle = 4 * np.pi * u
        radius = np.where(u < 0.5, 3.0, 1.5)
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)

    return _noisy_curve("circles", _edges(vocab_size, -4, 4), curve, 0.24)


def moons(vocab_size: int = 100) -> ToyDensity:
    """The law of ``make_moons(noise=0.1)`` times 2, shifted by ``(-1, -0.5)``, on ``[-4, 4]``."""
    shift = np.array([-1.0, -0.5])

    def curve(u: np.ndarray) -> Points:
        angle = np.pi * (2 * u % 1)
        upper = np.stack([np.cos(angle), np.sin(angle)], -1)
        lower = np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], -1)
        return 2 * np.where((u < 0.5)[:, None], upper, lower) + shift

    return _noisy_curve("moons", _edges(vocab_size, -4, 4), curve, 0.2)


def two_spirals(vocab_size: int = 100) -> ToyDensity:
    """Two interleaved spirals on ``[-4, 4]``.

    The radius is proportional to an angle up to 3 pi, denser outside, with noise 0.1.
    """

    def curve(u: np.ndarray) -> Points:
        angle = np.sqrt(2 * u % 1) * 3 * np.pi
        sign = np.where(u < 0.5, 1.0, -1.0)[:, None]
        return sign * np.stack([-np.cos(angle) * angle, np.sin(angle) * angle], -1) / 3

    return _noisy_curve("two spirals", _edges(vocab_size, -4, 4), curve, 0.1)


def pinwheel(vocab_size: int = 100) -> ToyDensity:
    """Five twisted normal blades on ``[-4, 4]``, after Johnson et al. 2016.

    The law of the bins is from 16 million draws.
    """

    def draw(n: int, rng: np.random.Generator) -> Points:
        blade = rng.integers(5, size=n)
        radial = 1 + 0.3 * rng.standard_normal(n)
        tangential = 0.1 * rng.standard_normal(n)
        angle = 2 * np.pi * blade / 5 + 0.25 * np.exp(radial)
        x = radial * np.cos(angle) - tangential * np.sin(angle)
        y = radial * np.sin(angle) + tangential * np.cos(angle)
        return 2 * np.stack([x, y], -1)

    def law(edges: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(0)
        vocab = len(edges) + 1
        counts = np.zeros(vocab * vocab)
        for _ in range(16):
            bins = np.searchsorted(edges, draw(_PINWHEEL_DRAWS // 16, rng), side="right")
            counts += np.bincount(bins[:, 0] * vocab + bins[:, 1], minlength=vocab * vocab)
        return counts.reshape(vocab, vocab)

    return ToyDensity("pinwheel", _edges(vocab_size, -4, 4), draw, law)


def eight_modes(vocab_size: int = 50, seed: int = 0) -> ToyDensity:
    """Protocol E8: eight centres uniform on ``[-2.5, 2.5]^2``, noise 0.09, ``vocab_size - 1``
    edges on ``[-3, 3]``.

    Args:
        vocab_size: ``K``.
        seed: draws the centres.
    """
    centers = np.random.default_rng(seed).uniform(-2.5, 2.5, (8, 2))

    def draw(n: int, rng: np.random.Generator) -> Points:
        return centers[rng.integers(8, size=n)] + 0.09 * rng.standard_normal((n, 2))

    def law(edges: np.ndarray) -> np.ndarray:
        return _smoothed(centers, np.full(8, 1 / 8), 0.09, edges)

    return ToyDensity("8-modes", _protocol_edges(vocab_size), draw, law)


TOYS: dict[str, Callable[..., ToyDensity]] = {
    "checkerboard": checkerboard,
    "circles": circles,
    "eight_modes": eight_modes,
    "moons": moons,
    "pinwheel": pinwheel,
    "swiss_roll": swiss_roll,
    "swiss_roll_es": swiss_roll_es,
    "two_spirals": two_spirals,
}


def toy(name: str, vocab_size: int | None = None) -> ToyDensity:
    """A toy density by name.

    Args:
        name: one of :data:`TOYS`.
        vocab_size: bins per axis; by default the density's own (100, or 50 for the E8/ES
            protocols).
    """
    if name not in TOYS:
        raise ValueError(f"name must be one of {', '.join(TOYS)}, got {name!r}")
    return TOYS[name]() if vocab_size is None else TOYS[name](vocab_size)
