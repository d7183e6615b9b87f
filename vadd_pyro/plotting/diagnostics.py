"""Can the guide be trusted, row by row: Pareto k-hat, gaps of the bound, calibration ranks.

References:
    Vehtari et al. 2024, "Pareto Smoothed Importance Sampling", and Yao et al. 2018 (arXiv
    1802.02538) for k-hat and its thresholds; Cremer et al. 2018 (arXiv 1801.03558) for the gaps;
    Talts et al. 2018 (arXiv 1804.06788) and Säilynoja, Bürkner and Vehtari 2022 (arXiv
    2103.10522) for ranks and the simultaneous band of their distribution function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vadd_pyro.plotting.style import (
    COLORS,
    FAINT,
    INK,
    LINES,
    MARKERS,
    MINUS,
    Values,
    check_names,
    frame,
    index_ticks,
    legend_below,
    matrix,
    new_axis,
    share,
    vector,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["gap_bars", "pareto_k_plot", "rank_plot"]

_KINDS = (
    (-np.inf, 0.5, "good, up to 0.5", COLORS[0], "o"),
    (0.5, 0.7, "usable, 0.5 to 0.7", COLORS[4], "D"),
    (0.7, np.inf, "bad, above 0.7", COLORS[1], "X"),
)
_BAND_DRAWS = 2000
_POINTS = 80  # of a distribution function
_NAMED = 6  # curves with a name of their own


def pareto_k_plot(k: Values, ax: Axes | None = None) -> Axes:
    """Pareto k-hat of the importance weights of each row, sorted.

    Above 0.7 the guide misses mass of that row's posterior, and weights cannot mend it.

    Args:
        k: one value a row, ``(B,)``; infinite ones are drawn at the upper edge, missing ones
            (all weights equal, no tail to fit) are left out and counted.
        ax: axis to draw on; a new one if omitted.

    Returns:
        The axis.

    Raises:
        ValueError: for another shape.
    """
    k = vector("k", k, finite=False)
    missing = int(np.isnan(k).sum())
    k = np.sort(k[~np.isnan(k)])
    ax = new_axis(ax, height=3.1)
    finite = k[np.isfinite(k)]
    top = max(1.0, float(finite.max()) + 0.1 if len(finite) else 1.0)
    bottom = min(-0.1, float(finite.min()) - 0.1 if len(finite) else -0.1)
    at = 100 * (np.arange(len(k)) + 0.5) / max(1, len(k))
    size = float(np.clip(3000 / max(1, len(k)), 6, 22))
    for low, high, label, color, marker in _KINDS:
        chosen = (k > low) & (k <= high) if np.isfinite(low) else k <= high
        part = share(float(chosen.mean())) if len(k) else "none"
        ax.scatter(
            at[chosen],
            k[chosen].clip(bottom, top),
            s=size,
            color=color,
            marker=marker,
            linewidths=0,
            clip_on=False,
            zorder=3,
            label=f"{label}: {part}",
        )
    for height, dashes in ((0.5, ":"), (0.7, "--")):
        ax.axhline(height, color=INK, lw=0.9, ls=dashes, zorder=1)
    ax.set_xlim(0, 100)
    ax.set_ylim(bottom, top)
    bad = share(float((k > 0.7).mean())) if len(k) else "none"
    rows = f"{len(k)} row{'s' if len(k) != 1 else ''}"
    without = f"; {missing}\u00a0without\u00a0k̂" if missing else ""
    title = f"Pareto k̂ of importance weights: above\u00a00.7 on {bad} of {rows}{without}"
    frame(ax, title, "share of rows, sorted by k̂ (%)", "Pareto k̂")
    legend_below(ax)
    return ax


def gap_bars(
    approximation: Values,
    amortisation: Values,
    ax: Axes | None = None,
    *,
    stderr: Values | None = None,
) -> Axes:
    """What the bound of each row loses: to the guide's family, and to amortisation.

    Args:
        approximation: log-evidence less the bound of the best guide of the family, ``(B,)`` nats.
        amortisation: that bound less the amortised guide's, ``(B,)`` nats.
        ax: axis to draw on; a new one if omitted.
        stderr: standard errors of the sum of both, ``(B,)`` nats, drawn as two of them each way.

    Returns:
        The axis.

    Raises:
        ValueError: for shapes that do not fit or values that are not finite.
    """
    first = vector("approximation", approximation)
    second = vector("amortisation", amortisation, len(first))
    error = None if stderr is None else vector("stderr", stderr, len(first))
    order = np.argsort(-(first + second), kind="stable")
    first, second = first[order], second[order]
    ax = new_axis(ax, height=3.1)
    at = np.arange(1, len(first) + 1)
    many = len(first) > 40
    width = 1.0 if many else 0.75
    # Estimates of small gaps may be negative: those parts hang below zero.
    same = np.sign(first) == np.sign(second)
    parts: tuple[tuple[str, np.ndarray, np.ndarray, dict[str, Any]], ...] = (
        ("approximation", first, np.zeros_like(first), {"color": COLORS[0]}),
        (
            "amortisation",
            second,
            np.where(same, first, 0.0),
            {"color": COLORS[4], "hatch": "" if many else "////", "edgecolor": "white"},
        ),
    )
    for name, height, bottom, look in parts:
        label = f"{name}, mean {height.mean():.3g}"
        ax.bar(at, height, width, bottom=bottom, lw=0, label=label, **look)
    if error is not None:
        total, spread = first + second, 2 * error[order]
        label = "sum ± 2 s.e."
        if many:
            for edge in (total - spread, total + spread):
                ax.plot(at, edge, color=INK, lw=0.6, ls=":")
            ax.plot(at, total, color=INK, lw=1.1, label=label)
        else:
            ax.errorbar(at, total, spread, color=INK, fmt=".", ms=3, lw=0.9, label=label)
    ax.axhline(0, color="#888888", lw=0.7)
    ax.set_xlim(0.4, max(len(first), 4) + 0.6)
    if not many:
        index_ticks(ax, "x", [str(i) for i in at], at)
    title = f"Gap of the bound to the log-evidence, mean {(first + second).mean():.3g} nats"
    frame(ax, title, "row, the largest gap first", "gap (nats)", grid="y")
    legend_below(ax)
    return ax


# -------------------------------------------------------------------------------- ranks


def rank_plot(
    ranks: Values,
    num_draws: int,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""Ranks of the model's own latents among a guide's draws: how far from uniform.

    Drawn is the share of ranks up to ``r`` less ``(r + 1) / (L + 1)``, with a band in which the
    whole curve of uniform ranks stays with probability 95 %. Curves that leave it have a name
    (the six worst), all others are faint.

    Args:
        ranks: in ``0..num_draws``, ``(N, d)`` or ``(N,)`` for one latent.
        num_draws: draws of the guide that each was ranked among, ``L``.
        names: of the ``d`` latents.
        ax: axis to draw on; a new one if omitted.

    Returns:
        The axis.

    Raises:
        ValueError: for another shape or ranks out of range.
    """
    found = matrix("ranks", ranks, (None,) if np.ndim(ranks) == 1 else (None, None))
    found = found.reshape(len(found), -1)
    if (found < 0).any() or (found > num_draws).any():
        raise ValueError(
            f"ranks must lie in 0..num_draws = 0..{num_draws}, they lie in "
            f"{found.min()}..{found.max()}"
        )
    count, dimensions = found.shape
    names = check_names(names, dimensions, "z[{}]" if dimensions > 1 else "z")
    points = np.unique(np.linspace(0, num_draws - 1, min(num_draws, _POINTS)).round())
    uniform = (points + 1) / (num_draws + 1)
    low, high = _band(count, uniform)
    curves = (found[:, :, None] <= points).mean(0) - uniform
    beyond = np.maximum(low - uniform - curves, curves - (high - uniform)).max(1)
    # Bounds are counts: a curve on one of them is inside.
    outside = beyond > 1e-9
    ax = new_axis(ax, height=3.3)
    look: dict[str, Any] = {"color": FAINT, "alpha": 0.55, "lw": 0, "label": "95 % if uniform"}
    ax.fill_between(points, low - uniform, high - uniform, zorder=0, **look)
    ax.axhline(0, color="#888888", lw=0.7, zorder=1)
    named = [int(i) for i in np.argsort(-beyond) if outside[i]][:_NAMED]
    if dimensions <= _NAMED:
        named = list(range(dimensions))
    rest = [i for i in range(dimensions) if i not in named]
    for i in rest:
        label = f"{len(rest)} others" if i == rest[0] else "_"
        ax.plot(points, curves[i], color="#777777", lw=0.7, zorder=2, label=label)
    for place, i in enumerate(named):
        ax.plot(
            points,
            curves[i],
            color=COLORS[place % len(COLORS)],
            ls=LINES[place % len(LINES)],
            marker=MARKERS[place % len(MARKERS)],
            markevery=(place, max(1, len(points) // 8)),
            ms=3.5,
            lw=1.3,
            zorder=3,
            label=names[i],
        )
    ax.set_xlim(-0.5, num_draws + 0.5)
    much = 1.15 * max(np.abs(curves).max(), (high - uniform).max(), (uniform - low).max())
    ax.set_ylim(-much, much)
    verdict = f"{int(outside.sum())} of {dimensions} outside the band"
    frame(
        ax,
        f"Calibration of the guide: {verdict}",
        f"rank among {num_draws} draws\ntoo narrow: up, down; too wide: down, up",
        f"share up to rank {MINUS} uniform",
    )
    legend_below(ax)
    return ax


def _band(count: int, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Simultaneous 95 % bounds of an empirical distribution function, by simulation.

    Pointwise binomial bounds, of the coverage at which 95 % of simulated functions stay inside
    throughout (Säilynoja et al. 2022, algorithm 1).

    Args:
        count: number of ranks.
        uniform: probability of a rank up to each point, increasing.
    """
    from scipy.stats import binom

    rng = np.random.default_rng(0)
    bins = np.diff(np.concatenate([[0.0], uniform, [1.0]]))
    simulated = rng.multinomial(count, bins, size=_BAND_DRAWS)[:, :-1].cumsum(1)
    below = binom.cdf(simulated, count, uniform)
    above = binom.sf(simulated - 1, count, uniform)
    level = np.quantile(2 * np.minimum(below, above).min(1), 0.05)
    return (
        binom.ppf(level / 2, count, uniform) / count,
        binom.isf(level / 2, count, uniform) / count,
    )
