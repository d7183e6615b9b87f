"""Latent space: what it encodes, where the aggregate posterior leaves the prior empty, and the
guide's draws against reference draws.

Draws are plain numbers, ``(N, d)`` or ``(N,)``; of more than two dimensions the first two
principal components are shown, whose share of the variance is in the labels. Contours bound the
regions that hold stated shares of the mass most densely (see :mod:`vadd_pyro.plotting.planes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vadd_pyro.plotting.codes import compare_codes
from vadd_pyro.plotting.planes import (
    Grid,
    density,
    draws,
    grid_over,
    kernel,
    levels,
    project,
)
from vadd_pyro.plotting.style import (
    COLORS,
    FEATURE,
    INK,
    MARKERS,
    Values,
    colorbar,
    frame,
    legend_below,
    new_axis,
    share,
    vector,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["compare_posteriors", "density_holes", "latent_scatter"]

_FEW = len(COLORS)
_SHARES = (0.5, 0.8, 0.95)
_HOLE = 0.1


# --------------------------------------------------------------------------------- scatter


def latent_scatter(
    z: Values,
    color: Values,
    ax: Axes | None = None,
    *,
    label: str,
    prior: Values | None = None,
    names: Sequence[str] | None = None,
) -> Axes:
    """Latents of rows, coloured by what the rows are, over the density of the prior.

    One dimension is drawn against the feature itself.

    Args:
        z: one latent of each row, ``(N, d)`` or ``(N,)``.
        color: a feature of each row, ``(N,)``: numbers, shown on a scale; or at most seven
            different integers, truth values or words, shown as categories.
        ax: axis to draw on; a new one if omitted.
        label: name of the feature, with its unit.
        prior: draws of the prior, ``(S, d)`` or ``(S,)``.
        names: of the dimensions.

    Returns:
        The axis.

    Raises:
        ValueError: for shapes that do not fit or values that are not finite.
    """
    z = draws("z", z)
    values, categories = _feature(color, len(z))
    base = None if prior is None else draws("prior", prior, z.shape[1])
    view = project(z, names)
    ax = new_axis(ax, height=3.3)
    if z.shape[1] == 1:
        return _strip(ax, z[:, 0], values, categories, label, base, view.labels[0])
    points = view(z)
    handles: list[Any] = []
    seen = points
    style: dict[str, Any] = {"s": _dot(len(z)), "linewidths": 0, "rasterized": True, "zorder": 2}
    if categories:
        looks: list[dict[str, Any]] = [
            {"color": COLORS[i], "marker": MARKERS[i]} for i in range(len(categories))
        ]
        for i in np.argsort(-np.bincount(values)):  # the rarest on top
            x, y = points[values == i].T
            ax.scatter(x, y, alpha=0.75, **looks[i], **style)
        for look, name in zip(looks, categories, strict=True):
            handles.append(ax.scatter([], [], s=16, label=name, **look))
    else:
        image = ax.scatter(points[:, 0], points[:, 1], c=values, cmap=FEATURE, **style)
        colorbar(ax, image, label)
    if base is not None:
        line, inside = _prior_contours(ax, view(base))
        handles.append(line)
        seen = np.concatenate([points, inside])
    _limits(ax, seen)
    what = f"Latents by {label}" + (f" ({view.note})" if view.note else "")
    frame(ax, what, *view.labels)
    legend_below(ax, handles)
    return ax


def _feature(color: Values, count: int) -> tuple[np.ndarray, list[str]]:
    """Values of a feature, or numbers of its categories and their names."""
    array = np.asarray(color.detach().cpu() if hasattr(color, "detach") else color)
    if array.shape != (count,):
        raise ValueError(
            f"color must have one value a row, shape ({count},), got {tuple(array.shape)}"
        )
    if array.dtype.kind == "f":
        return vector("color", array), []
    names, numbers = np.unique(array, return_inverse=True)
    if len(names) <= _FEW:
        return numbers, [str(name) for name in names]
    if array.dtype.kind not in "iu":
        raise ValueError(
            f"color has {len(names)} different words: expected at most {_FEW}, or numbers"
        )
    return array.astype(float), []


def _dot(count: int) -> float:
    return float(np.clip(6000 / count, 2.5, 14))


def _prior_contours(ax: Axes, prior: np.ndarray) -> tuple[Any, np.ndarray]:
    """An entry of the legend, and points of the outermost region."""
    from matplotlib.lines import Line2D

    grid = grid_over(prior)
    height = density(prior, grid)
    regions = levels(height, _SHARES)
    look: dict[str, Any] = {"linewidths": 0.9, "colors": INK, "linestyles": "dashed"}
    ax.contour(*grid.axes, height.T, levels=regions, zorder=3, **look)
    named = ", ".join(f"{100 * s:.0f}" for s in _SHARES)
    line = Line2D([], [], color=INK, linewidth=0.9, linestyle="--")
    line.set_label(f"prior ({named} % of mass)")
    return line, grid.points[(height >= regions[0]).ravel()]


def _limits(ax: Axes, points: np.ndarray) -> None:
    """All points in view; on one scale, unless one axis would be squeezed to a line."""
    low, high = points.min(0), points.max(0)
    span = np.where(high > low, high - low, 1.0)
    if span.max() < 3 * span.min():
        ax.set_aspect("equal", adjustable="datalim")
    middle = (low + high) / 2
    # Left open to be widened, for equal scales.
    ax.set_xlim(middle[0] - 0.55 * span[0], middle[0] + 0.55 * span[0], auto=True)
    ax.set_ylim(middle[1] - 0.55 * span[1], middle[1] + 0.55 * span[1], auto=True)


def _strip(
    ax: Axes,
    z: np.ndarray,
    values: np.ndarray,
    categories: list[str],
    label: str,
    prior: np.ndarray | None,
    name: str,
) -> Axes:
    """One dimension: the latent to the right, the feature upwards, the prior along the bottom."""
    handles = []
    if prior is not None:
        grid = grid_over(prior, z[:, None])
        height = density(prior, grid)
        look: dict[str, Any] = {"color": "#DDDDDD", "zorder": 0, "label": "density of the prior"}
        across = ax.get_xaxis_transform()
        tall = 0.9 * height / height.max()
        handles.append(ax.fill_between(grid.axes[0], 0, tall, transform=across, lw=0, **look))
    height_of = values.astype(float)
    if categories:
        height_of = height_of + np.random.default_rng(0).uniform(-0.3, 0.3, len(z))
    kinds = values if categories else np.zeros(len(z), dtype=int)
    for i in np.unique(kinds):
        chosen = kinds == i
        ax.scatter(
            z[chosen],
            height_of[chosen],
            s=_dot(len(z)),
            color=COLORS[int(i) % _FEW],
            marker=MARKERS[int(i) % _FEW],
            alpha=0.6,
            linewidths=0,
            rasterized=True,
        )
    if categories:
        ax.set_yticks(range(len(categories)), categories)
    frame(ax, f"Latent by {label}", name, label)
    legend_below(ax, handles)
    return ax


# ----------------------------------------------------------------------------------- holes


def density_holes(
    posterior: Values,
    prior: Values,
    ax: Axes | None = None,
    *,
    names: Sequence[str] | None = None,
) -> Axes:
    """Where the aggregate posterior has more or less mass than the prior, and where it has holes.

    A hole is where the aggregate posterior has less than a tenth of the prior's density, inside
    the region that holds 95 % of the prior's mass. Both densities are made with the same kernels,
    so that they blur alike; holes narrower than these do not show, nor do those that other
    dimensions fill in a projection. Drawn is where either has 95 % of its mass.

    Args:
        posterior: draws of the aggregate posterior, one of each of many rows, ``(N, d)`` or
            ``(N,)``.
        prior: draws of the prior, ``(S, d)`` or ``(S,)``; as many are best.
        ax: axis to draw on; a new one if omitted.
        names: of the dimensions.

    Returns:
        The axis.

    Raises:
        ValueError: for shapes that do not fit or values that are not finite.
    """
    posterior = draws("posterior", posterior)
    prior = draws("prior", prior, posterior.shape[1])
    view = project(posterior, names)
    q, p = view(posterior), view(prior)
    grid = grid_over(q, p, size=120 if q.shape[1] == 2 else None)
    widths = kernel(p, grid, min(len(q), len(p)))
    of_q, of_p = density(q, grid, widths), density(p, grid, widths)
    inside = of_p >= levels(of_p, [0.95])[0]
    hole = inside & (of_q < _HOLE * of_p)
    lost = share(float((of_p * hole).sum() / of_p.sum()))
    ax = new_axis(ax, height=3.4)
    title = "Aggregate posterior against prior" + (f" ({view.note})" if view.note else "")
    if len(grid.axes) == 1:
        return _holes_on_line(ax, grid, of_q, of_p, hole, lost, title, view.labels[0])

    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    # Beyond, few draws of either are left to compare.
    seen = (of_p >= levels(of_p, [0.95])[0]) | (of_q >= levels(of_q, [0.95])[0])
    tiny = 1e-12 * of_p.max()
    ratio = np.where(seen, np.log10((of_q + tiny) / (of_p + tiny)), np.nan)
    image = ax.pcolormesh(
        *grid.axes, ratio.T, cmap="PuOr", vmin=-2, vmax=2, shading="nearest", rasterized=True
    )
    bar = colorbar(ax, image, "aggregate posterior / prior", extend="both")
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/100", "1/10", "1", "10", "100"])
    ax.contour(*grid.axes, inside.T, levels=[0.5], colors=INK, linewidths=0.9, linestyles="dashed")
    handles: list[Any] = [Line2D([], [], color=INK, lw=0.9, ls="--", label="95 % of the prior")]
    if hole.any():
        ax.contourf(*grid.axes, hole.T, levels=[0.5, 1.5], colors="none", hatches=["////"])
    handles.append(
        Patch(facecolor="#E08214", edgecolor="black", hatch="////", lw=0, label=_hole(lost))
    )
    _limits(ax, grid.points[seen.ravel()])
    frame(ax, title, *view.labels)
    legend_below(ax, handles)
    return ax


def _hole(lost: str) -> str:
    return f"holes, below 1/10: {lost} of the prior"


def _holes_on_line(
    ax: Axes,
    grid: Grid,
    of_q: np.ndarray,
    of_p: np.ndarray,
    hole: np.ndarray,
    lost: str,
    title: str,
    name: str,
) -> Axes:
    x = grid.axes[0]
    ax.fill_between(x, of_q, color=COLORS[0], alpha=0.35, lw=0)
    ax.plot(x, of_q, color=COLORS[0], lw=1.3, label="aggregate posterior")
    ax.plot(x, of_p, color=INK, lw=1.3, ls="--", label="prior")
    ax.fill_between(
        *(x, 0, of_p),
        where=hole,
        facecolor="none",
        edgecolor=COLORS[1],
        hatch="////",
        lw=0,
        label=_hole(lost),
    )
    ax.set_ylim(bottom=0)
    frame(ax, title, name, "density")
    legend_below(ax)
    return ax


# --------------------------------------------------------------- guide against reference


def compare_posteriors(
    guide: Values,
    reference: Values,
    ax: Axes | None = None,
    *,
    names: Sequence[str] | None = None,
    true: Values | None = None,
    codes: bool | None = None,
) -> Axes:
    """Draws of one row's latents from the guide, against draws of the exact posterior.

    Two dimensions as contours, one as densities, codes as bars.

    Args:
        guide: draws of the guide, ``(S, d)`` or ``(S,)``.
        reference: draws of a reference posterior, ``(R, d)`` or ``(R,)``.
        ax: axis to draw on; a new one if omitted.
        names: of the dimensions.
        true: the latent that the row was made with, ``(d,)``, where that is known.
        codes: whether draws are numbers of codes; if omitted, integers are.

    Returns:
        The axis.

    Raises:
        ValueError: for shapes that do not fit or values that are not finite.
    """
    if codes is None:
        codes = all(np.asarray(value).dtype.kind in "iu" for value in (guide, reference))
    q = draws("guide", guide)
    p = draws("reference", reference, q.shape[1])
    mark = (
        None if true is None else draws("true", np.reshape(np.asarray(true), (1, -1)), q.shape[1])
    )
    if codes:
        return compare_codes(q, p, mark, ax)
    view = project(p, names)
    ax = new_axis(ax, height=3.2)
    title = "Guide against reference posterior" + (f" ({view.note})" if view.note else "")
    at = None if mark is None else view(mark)[0]
    if q.shape[1] == 1:
        grid = grid_over(q, p)
        of_q, of_p = density(q, grid), density(p, grid)
        ax.fill_between(grid.axes[0], of_q, color=COLORS[0], alpha=0.3, lw=0)
        ax.plot(grid.axes[0], of_q, color=COLORS[0], lw=1.4, label="guide")
        ax.plot(grid.axes[0], of_p, color=COLORS[1], lw=1.4, ls="--", label="reference")
        if at is not None:
            ax.axvline(at[0], color="black", lw=1.1, ls=":", label="true latent")
        ax.set_ylim(bottom=0)
        frame(ax, title, view.labels[0], "density")
        legend_below(ax)
        return ax
    handles = _contours(ax, view(q), view(p))
    if at is not None:
        look: dict[str, Any] = {"marker": "*", "s": 70, "color": "black", "edgecolors": "white"}
        handles.append(ax.scatter(*at, zorder=5, linewidths=0.6, label="true latent", **look))
    frame(ax, title, *view.labels)
    legend_below(ax, handles)
    return ax


def _contours(ax: Axes, q: np.ndarray, p: np.ndarray) -> list[Any]:
    """The guide as filled regions, the reference as points and lines around them."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    grid = grid_over(q, p, size=130)
    of_q, of_p = density(q, grid), density(p, grid)
    regions = (0.5, 0.95)
    fill: dict[str, Any] = {"colors": [COLORS[5], COLORS[0]], "alpha": 0.45}
    ax.contourf(*grid.axes, of_q.T, levels=[*levels(of_q, regions), np.inf], **fill)
    chosen = p[:: -(-len(p) // 400)]
    dots: dict[str, Any] = {"s": 5, "color": COLORS[1], "alpha": 0.55, "linewidths": 0}
    ax.scatter(*chosen.T, rasterized=True, zorder=2, **dots)
    line: dict[str, Any] = {"colors": "#8A3B00", "linewidths": [0.9, 1.3]}
    ax.contour(*grid.axes, of_p.T, levels=levels(of_p, regions), linestyles=["--", "-"], **line)
    seen = (of_q >= levels(of_q, [0.98])[0]) | (of_p >= levels(of_p, [0.98])[0])
    _limits(ax, grid.points[seen.ravel()])
    return [
        Patch(facecolor=COLORS[0], alpha=0.55, label="guide (50, 95 %)"),
        Line2D([], [], color="#8A3B00", marker=".", ms=4, lw=1.1, label="reference (50, 95 %)"),
    ]
