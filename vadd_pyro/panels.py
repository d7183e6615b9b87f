"""One page that holds many models against each other, on one data set.

Lines over the number of steps above, one row of dots per model below; the rows' names are the
key to the lines. Colours are safe for colour-blind readers, and markers tell apart what colours
cannot.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Series", "compare_series"]

Key = tuple[str, str | None, int | None]
# Paul Tol's muted scheme, its sand darkened.
_COLORS = (
    *("#332288", "#CC6677", "#117733", "#C9A227", "#5BB4E5", "#882255", "#44AA99", "#999933"),
    "#AA4499",
)
_MARKERS = "osD^vPX*<>p"
_REFERENCE = "#333333"
_GRID = "#DDDDDD"
_COLUMNS: tuple[tuple[str, Key], ...] = (
    ("JS, one step", ("jensen_shannon", "fresh", 1)),
    ("TV, one step", ("total_variation", "fresh", 1)),
    ("on support", ("accuracy", "fresh", 1)),
    ("KL at start (nats)", ("kl_at_start", None, None)),
    ("active units", ("active_units", None, None)),
    ("training (s)", ("train_seconds", None, None)),
)


class Series(NamedTuple):
    """What one model measured, for :func:`compare_series`.

    Args:
        label: its name.
        style: which colour and marker it gets, counted from 0.
        reference: whether it is what the others are held against; drawn dark and dashed.
        values: the values of each measure, one a seed, by (metric, kind of latent, number of
            steps); the last two None where they mean nothing.
    """

    label: str
    style: int
    reference: bool
    values: Mapping[Key, Sequence[float]]

    def seeds(self, metric: str, latent: str | None, num_steps: int | None) -> list[float]:
        """The finite values of a measure."""
        found = self.values.get((metric, latent, num_steps), ())
        return [value for value in found if math.isfinite(value)]


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, zero for one value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def _look(series: Series) -> dict[str, Any]:
    color = _REFERENCE if series.reference else _COLORS[series.style % len(_COLORS)]
    second_round = series.style >= len(_COLORS)
    return {
        "color": color,
        "marker": _MARKERS[series.style % len(_MARKERS)],
        "markerfacecolor": "white" if second_round or series.reference else color,
        "linestyle": (0, (4, 2)) if series.reference else "-",
    }


def _frame(ax: Axes, title: str) -> None:
    ax.set_title(title, fontsize=9, loc="left", pad=6)
    ax.tick_params(labelsize=8, length=2.5, color="#888888")
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#888888")


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """Heights moved as little as a few passes can, until neighbours are ``least`` apart."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = [heights[i] for i in order]
    for _ in range(200):
        for i in range(len(moved) - 1):
            lack = least - (moved[i + 1] - moved[i])
            if lack > 0:
                moved[i] -= lack / 2
                moved[i + 1] += lack / 2
    result = [0.0] * len(heights)
    for place, i in enumerate(order):
        result[i] = moved[place]
    return result


def _scale(ax: Axes, axis: str, values: Sequence[float]) -> None:
    """Logarithmic with plain numbers where values span much, else linear from zero."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if not values or min(values) < 0:
        return
    least, most = min(values), max(values)
    which = getattr(ax, f"{axis}axis")
    if 0 < 5 * least < most:
        getattr(ax, f"set_{axis}scale")("log")
        # As many labels as fit: for decades only if there are several, or an axis is narrow.
        close = most < (60 if axis == "y" else 12) * least
        subs = (1.0, 2.0, 5.0) if close else (1.0,)
        which.set_major_locator(LogLocator(subs=subs))
        which.set_minor_formatter(NullFormatter())
    else:
        which.set_major_locator(MaxNLocator(5 if axis == "y" else 3, steps=[1, 2, 5, 10]))
        getattr(ax, f"set_{axis}lim")(-0.03 * most, 1.1 * most or 1.0)
    which.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _against_steps(
    ax: Axes, series: Sequence[Series], steps: Sequence[int], metric: str, latent: str
) -> None:
    """One line per model over the number of steps, its rank written at the end."""
    from matplotlib.ticker import NullLocator

    ends: list[tuple[int, float, str]] = []
    drawn: list[float] = []
    for rank, one in enumerate(series, 1):
        points = [(n, one.seeds(metric, latent, n)) for n in steps]
        points = [(n, values) for n, values in points if values]
        if not points:
            continue
        look = _look(one)
        x = [n for n, _ in points]
        y, error = zip(*(_spread(values) for _, values in points), strict=True)
        style = {**look, "markersize": 4, "linewidth": 1.4, "elinewidth": 0.9, "capsize": 0}
        ax.errorbar(x, y, yerr=error, zorder=2.5 if one.reference else 3, **style)
        ends.append((rank, y[-1], look["color"]))
        drawn += y
    ax.set_xscale("log", base=2)
    ax.set_xticks(steps, [str(n) for n in steps])
    ax.set_xlabel("steps", fontsize=8.5)
    _scale(ax, "y", drawn)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(axis="y", color=_GRID, linewidth=0.6)
    if not ends:
        return
    # Ranks at the ends of the lines, in axis coordinates.
    to_axis = (ax.transData + ax.transAxes.inverted()).transform
    at = [float(to_axis((steps[-1], y))[1]) for _, y, _ in ends]
    height = ax.get_position().height * ax.get_figure().get_figheight()  # type: ignore[union-attr]
    for (rank, _, color), where in zip(ends, _apart(at, 0.115 / height), strict=True):
        ax.annotate(
            str(rank),
            (1.015, where),
            xycoords="axes fraction",
            fontsize=7,
            color=color,
            va="center",
            annotation_clip=False,
        )


def _dots(ax: Axes, series: Sequence[Series], key: Key) -> None:
    """One row per model: its seeds small, their mean large with the standard error."""
    shown: list[float] = []
    for row, one in enumerate(series):
        values = one.seeds(*key)
        if not values:
            ax.text(
                0.02,
                row,
                "none",
                transform=ax.get_yaxis_transform(),
                fontsize=7.5,
                color="#999999",
                va="center",
            )
            continue
        look = {**_look(one), "linestyle": "none"}
        mean, error = _spread(values)
        if len(values) > 1:
            ax.plot(
                values,
                [row] * len(values),
                "o",
                color=look["color"],
                alpha=0.35,
                markersize=3,
                markeredgewidth=0,
            )
        ax.errorbar([mean], [row], xerr=[error], markersize=5, elinewidth=1.1, zorder=3, **look)
        shown += values
    _scale(ax, "x", shown)
    ax.set_ylim(len(series) - 0.4, -0.6)
    ax.set_yticks(range(len(series)), [""] * len(series))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="both", color=_GRID, linewidth=0.6)
    ax.spines["left"].set_visible(False)


def _caption(series: Sequence[Series]) -> str:
    numbers = {len(found) for one in series for found in one.values.values()}
    if numbers <= {1}:
        return "one seed"
    least, most = min(numbers), max(numbers)
    seeds = f"{most}" if least == most else f"{least} to {most}"
    return f"mean ± standard error of {seeds} seeds; small dots: single seeds"


def compare_series(series: Sequence[Series], *, title: str) -> Figure:
    """Models held against each other on one data set, the best at one step first.

    Above, distance to the data and gap of the bound over the number of steps; below, one row for
    each model, whose name and rank are the key to the lines above.

    Args:
        series: the models, in the order of their rank.
        title: heading.
    """
    from matplotlib.figure import Figure

    if not series:
        raise ValueError("series is empty: expected at least one model")
    steps = sorted({n for one in series for _, _, n in one.values if n is not None})
    columns = [(name, key) for name, key in _COLUMNS if any(one.seeds(*key) for one in series)]
    width, top, upper, row, right = 10.5, 0.75, 2.6, 0.21, 0.975
    lower = row * len(series) + 0.1
    height = top + upper + 0.95 + lower + 0.45
    fig = Figure(figsize=(width, height), dpi=200)
    fig.text(0.012, 1 - 0.3 / height, title, fontsize=12, va="center", weight="bold")
    fig.text(right, 1 - 0.3 / height, _caption(series), fontsize=8, ha="right", va="center")

    lines = [
        ("JS to the data, fresh latents (nats)", "jensen_shannon", "fresh"),
        ("JS to the data, one latent for all steps (nats)", "jensen_shannon", "shared"),
        ("bound: nats lost against the entropy", "gap", "fresh"),
    ]
    lines = [
        line for line in lines if any(o.seeds(line[1], line[2], n) for o in series for n in steps)
    ]
    left, space = 0.055, 0.068
    wide = (right - left - space * (len(lines) - 1)) / max(1, len(lines))
    for i, (name, metric, latent) in enumerate(lines):
        box = (left + i * (wide + space), 1 - (top + upper) / height, wide, upper / height)
        ax = fig.add_axes(box)
        _frame(ax, name)
        _against_steps(ax, series, steps, metric, latent)
    names = 0.24
    wide = (right - names - 0.022 * (len(columns) - 1)) / max(1, len(columns))
    for i, (name, key) in enumerate(columns):
        box = (names + i * (wide + 0.022), 0.42 / height, wide, lower / height)
        ax = fig.add_axes(box)
        _frame(ax, name)
        _dots(ax, series, key)
        if i == 0:
            _names(ax, series, -(names - 0.012) / wide)
    return fig


def _names(ax: Axes, series: Sequence[Series], left: float) -> None:
    """Rank, line and name of every model, left of the rows."""
    across = ax.get_yaxis_transform()
    width = -left
    for row, one in enumerate(series):
        look = _look(one)
        style: dict[str, Any] = {"fontsize": 8.5, "va": "center", "transform": across}
        ax.text(left + 0.07 * width, row, str(row + 1), ha="right", color=look["color"], **style)
        ax.plot(
            [left + 0.1 * width, left + 0.16 * width, left + 0.22 * width],
            [row] * 3,
            transform=across,
            clip_on=False,
            markersize=4,
            markevery=[1],
            linewidth=1.4,
            **look,
        )
        ax.text(left + 0.26 * width, row, one.label, ha="left", **style)
