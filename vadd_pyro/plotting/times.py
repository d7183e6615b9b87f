"""What the latent does as tokens are revealed, against the time ``t``: the KL of its dimensions,
active units, and the total correlation of the masked positions that it accounts for.
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
    Values,
    check_names,
    frame,
    legend_below,
    matrix,
    new_axis,
    vector,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["kl_over_time", "total_correlation_plot", "units_over_time"]

_TIME = "t (0 clean, 1 all masked)"
_NAMED = len(COLORS)
_GAIN, _DATA = "gain on data", "in the data"
_GROUP = "total correlation"  # marks the curves of a model


def _times(times: Values) -> np.ndarray:
    t = vector("times", times)
    if (t < 0).any() or (t > 1).any() or (np.diff(t) <= 0).any():
        raise ValueError(f"times must increase and lie in [0, 1], got {t.tolist()}")
    return t


def kl_over_time(
    times: Values,
    kl_per_dimension: Values,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """KL of each latent dimension against time, stacked; the largest ones by name.

    Lines instead of areas where an estimate is negative.

    Args:
        times: ``(T,)`` in ``[0, 1]``, increasing.
        kl_per_dimension: mean KL of a row, ``(T, d)`` nats.
        names: of the ``d`` dimensions.
        ax: axis to draw on; a new one if omitted.

    Returns:
        The axis.

    Raises:
        ValueError: for shapes that do not fit or times that do not increase.
    """
    t = _times(times)
    kl = matrix("kl_per_dimension", kl_per_dimension, (len(t), None)).astype(float)
    names = check_names(names, kl.shape[1], "z[{}]" if kl.shape[1] > 1 else "z")
    order = np.argsort(-kl.mean(0), kind="stable")
    ax = new_axis(ax, height=3.3)
    most = _NAMED if len(order) <= _NAMED else _NAMED - 1
    curves = [(names[i], kl[:, i]) for i in order[:most]]
    if len(order) > most:
        curves.append((f"{len(order) - most} others", kl[:, order[most:]].sum(1)))
    stacked = len(t) > 1 and bool((kl >= 0).all())
    base = np.zeros(len(t))
    for place, (name, value) in enumerate(curves):
        color = COLORS[place] if place < most else FAINT
        if stacked:
            look: dict[str, Any] = {"facecolor": color, "edgecolor": "white", "lw": 0.8}
            ax.fill_between(t, base, base + value, label=name, **look)
            base = base + value
        else:
            color = color if place < most else "#777777"
            look = {"ls": LINES[place % len(LINES)], "marker": MARKERS[place % len(MARKERS)]}
            ax.plot(t, value, color=color, lw=1.3, ms=3.5, label=name, **look)
    if stacked:
        ax.set_ylim(0, 1.05 * float(base.max()) or 1.0)
    else:
        ax.axhline(0, color="#888888", lw=0.7)
    ax.set_xlim(*((t[0], t[-1]) if len(t) > 1 else (-0.02, 1.02)))
    at = int(kl.sum(1).argmax())
    title = (
        f"KL of the latents: at most {kl[at].sum():.3g}\u00a0nats, at t\u00a0=\u00a0{t[at]:.2g}"
    )
    what = "KL per row, stacked (nats)" if stacked else "KL per row (nats)"
    frame(ax, title, _TIME, what)
    legend_below(ax)
    return ax


def units_over_time(times: Values, active: Values, num_units: int, ax: Axes | None = None) -> Axes:
    """How many latent units are active against time.

    Args:
        times: ``(T,)`` in ``[0, 1]``, increasing.
        active: number of active units, ``(T,)``.
        num_units: how many there are.
        ax: axis to draw on; a new one if omitted.

    Returns:
        The axis.

    Raises:
        ValueError: for shapes that do not fit, or numbers out of ``0..num_units``.
    """
    t = _times(times)
    count = vector("active", active, len(t))
    if (count < 0).any() or (count > num_units).any():
        raise ValueError(f"active must lie in 0..num_units = 0..{num_units}, got {count.tolist()}")
    from matplotlib.ticker import MaxNLocator

    ax = new_axis(ax)
    ax.plot(t, count, "-o", color=COLORS[0], lw=1.4, ms=4, label="active", clip_on=False, zorder=3)
    ax.axhline(num_units, color=INK, lw=0.9, ls="--", label=f"all {num_units}")
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(0, 1.12 * max(1, num_units))
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    last = f"{count[-1]:.0f} of {num_units} at t = {t[-1]:.2g}"
    frame(ax, f"Active latent units: {last}", _TIME, "active units", grid="y")
    legend_below(ax)
    return ax


def total_correlation_plot(
    times: Values,
    value: Values,
    stderr: Values | None = None,
    ax: Axes | None = None,
    *,
    truth: Values | None = None,
    gain: Values | None = None,
    label: str = "model",
) -> Axes:
    """How much the positions written in one step share through the latent, against time.

    Zero is what a model without latent has. Call it again on the same axis for further models.

    Args:
        times: ``(T,)`` in ``[0, 1]``, increasing.
        value: total correlation of the masked positions under the model, ``(T,)`` nats.
        stderr: its standard errors, ``(T,)`` nats, drawn as a band of two each way.
        ax: axis to draw on; a new one if omitted.
        truth: total correlation of the masked positions under the law of the data, ``(T,)`` nats.
        gain: nats that the model wins on data over the same model with independent positions,
            ``(T,)``; what it gets right of its total correlation.
        label: name of the model.

    Returns:
        The axis.

    Raises:
        ValueError: for shapes that do not fit or times that do not increase.
    """
    t = _times(times)
    y = vector("value", value, len(t))
    error = None if stderr is None else 2 * vector("stderr", stderr, len(t))
    of_data = None if truth is None else vector("truth", truth, len(t))
    won = None if gain is None else vector("gain", gain, len(t))
    ax = new_axis(ax, height=3.2)
    before = [line for line in ax.lines if line.get_gid() == _GROUP]
    place = len(before)
    look: dict[str, Any] = {"color": COLORS[place % len(COLORS)], "zorder": 3}
    marker: dict[str, Any] = {"marker": MARKERS[place % len(MARKERS)], "ms": 4, "lw": 1.4}
    dashes = LINES[place % len(LINES)]
    if error is not None:
        ax.fill_between(t, y - error, y + error, color=look["color"], alpha=0.2, lw=0)
    ax.plot(t, y, ls=dashes, label=label, gid=_GROUP, **look, **marker)
    if won is not None:
        hollow = {"markerfacecolor": "white", **marker}
        ax.plot(t, won, ls=":", **look, **hollow)
    known = {line.get_label() for line in ax.lines}
    if won is not None and _GAIN not in known:
        ax.plot([], [], ":o", color=INK, markerfacecolor="white", ms=4, lw=1.4, label=_GAIN)
    if of_data is not None and _DATA not in known:
        ax.plot(t, of_data, color="black", lw=1.4, ls=(0, (5, 2)), label=_DATA, zorder=2)
    if not before:
        ax.axhline(0, color="#888888", lw=0.7, zorder=1)
    ax.set_xlim(-0.02, 1.02)
    ax.margins(y=0.06)
    ax.autoscale(axis="y")
    title = "What positions written in one step share through the latent"
    frame(ax, title, _TIME, "total correlation (nats)", grid="y")
    legend_below(ax)
    return ax
