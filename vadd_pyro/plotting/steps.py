"""Curves over the number of network calls: what each model reaches in so many steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vadd_pyro.plotting.style import (
    COLORS,
    INK,
    LINES,
    MARKERS,
    SMALL,
    Values,
    frame,
    legend_below,
    new_axis,
    vector,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curve", "curves_by_steps"]


class Curve(NamedTuple):
    """One model's values at each number of steps.

    Args:
        steps: numbers of steps, ``(S,)``, increasing.
        values: what was measured, ``(S,)``.
        stderr: standard errors, ``(S,)``, nan where there are none.
    """

    steps: Sequence[int]
    values: Values
    stderr: Values


def curves_by_steps(
    curves: Mapping[str, Curve],
    ax: Axes | None = None,
    *,
    ylabel: str,
    title: str = "",
    levels: Mapping[str, float] | None = None,
    log: bool = False,
) -> Axes:
    """Curves with error bars over the number of steps, which is drawn on a scale of powers of two.

    Args:
        curves: by the name of the model, each a :class:`Curve`.
        ax: axis to draw on; a new one if omitted.
        ylabel: what is measured, with its unit.
        title: what the panel shows.
        levels: horizontal lines by name, such as what real data reach.
        log: whether the values are drawn on a logarithmic scale.

    Returns:
        The axis.

    Raises:
        ValueError: for lengths that differ or values that are not finite, naming the curve.
    """
    if not curves:
        raise ValueError("curves is empty: expected at least one model")
    drawn = {}
    for name, curve in curves.items():
        steps = vector(f"steps of {name!r}", curve.steps)
        values = vector(f"values of {name!r}", curve.values, len(steps))
        stderr = vector(f"stderr of {name!r}", curve.stderr, len(steps), finite=False)
        drawn[name] = (steps, values, np.nan_to_num(stderr))
    ax = new_axis(ax)
    for i, (name, (steps, values, stderr)) in enumerate(drawn.items()):
        ax.errorbar(
            steps,
            values,
            stderr,
            label=name,
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle=LINES[i % len(LINES)],
            markersize=4,
            linewidth=1.3,
            capsize=2,
        )
    handles: list[Any] = [h for h in ax.get_legend_handles_labels()[0]]
    for i, (name, level) in enumerate((levels or {}).items()):
        style = ("-", (0, (1, 1.5)), (0, (5, 2)))[i % 3]
        handles.append(ax.axhline(level, color=INK, lw=0.9, linestyle=style, label=name))
    ax.set_xscale("log", base=2)
    if log:
        ax.set_yscale("log")
    frame(ax, title, "network calls T", ylabel, grid="y")
    ticks = sorted({int(step) for steps, _, _ in drawn.values() for step in steps})
    ax.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=SMALL)
    ax.minorticks_off()
    if log:
        _label_log_axis(ax)
    legend_below(ax, handles)
    return ax


def _label_log_axis(ax: Axes) -> None:
    """Plain numbers on a logarithmic y-axis, at least two of them however short it is."""
    from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

    low, high = ax.get_ylim()
    for factors in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
        locator: Any = LogLocator(subs=factors, numticks=100)
        if sum(low <= tick <= high for tick in locator.tick_values(low, high)) > 2:
            break
    else:
        locator = MaxNLocator(4, steps=[1, 2, 5, 10])
    ax.yaxis.set_major_locator(locator)
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
