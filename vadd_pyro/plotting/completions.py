"""Posterior predictive of one row: what a model writes in its missing positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vadd_pyro.plotting.cells import check_characters, check_tokens
from vadd_pyro.plotting.style import (
    COLORS,
    DENSITY,
    INK,
    Values,
    colorbar,
    frame,
    index_ticks,
    legend_below,
    new_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["completions_plot"]


def completions_plot(
    x_t: Values,
    completions: Values,
    ax: Axes | None = None,
    *,
    vocab_size: int,
    truth: Values | None = None,
    characters: Sequence[str] | None = None,
) -> Axes:
    """What a model writes in the missing positions of one row.

    Each missing position is a column with the shares of its tokens; observed tokens are marked.
    Of two positions with one missing, the other's distribution is drawn as bars.

    Args:
        x_t: the row, ``(D,)`` long; missing positions hold the mask id ``vocab_size``.
        completions: draws of the whole row, ``(S, D)`` long.
        ax: axis to draw on; a new one if omitted.
        vocab_size: number of clean tokens ``K``.
        truth: the row that it was made from, ``(D,)`` long, marked by circles.
        characters: what each token is called, ``K`` of them; their numbers if omitted.

    Returns:
        The axis.

    Raises:
        ValueError: for shapes that do not fit, tokens out of range, or a row with nothing missing.
    """
    row = check_tokens("x_t", x_t, (None,), vocab_size)
    drawn = check_tokens("completions", completions, (None, len(row)), vocab_size, masks=False)
    true = (
        None
        if truth is None
        else check_tokens("truth", truth, (len(row),), vocab_size, masks=False)
    )
    missing = np.flatnonzero(row == vocab_size)
    if len(missing) == 0:
        raise ValueError(f"x_t has no masked position (token {vocab_size}): nothing to complete")
    names = check_characters(characters, vocab_size)
    counts = np.stack([np.bincount(column, minlength=vocab_size) for column in drawn.T])
    parts = counts / len(drawn)
    ax = new_axis(ax, height=3.3)
    if len(row) == 2 and len(missing) == 1:
        return _one_missing(ax, row, int(missing[0]), parts[missing[0]], true, names)
    heat = np.ma.masked_array(parts.T, np.broadcast_to(row != vocab_size, parts.T.shape))
    most = 1.0 if vocab_size == 2 else float(heat.max())
    image = ax.imshow(
        heat,
        origin="lower",
        cmap=DENSITY,
        vmin=0,
        vmax=most,
        aspect="auto",
        interpolation="nearest",
    )
    if len(row) <= 100:
        ax.vlines(np.arange(1, len(row)) - 0.5, -0.5, vocab_size - 0.5, colors="white", lw=0.8)
    seen = np.flatnonzero(row != vocab_size)
    size = float(np.clip(300 / len(row), 6, 26))
    style: dict[str, Any] = {"s": size, "zorder": 3, "clip_on": False}
    handles = []
    if len(seen):
        look: dict[str, Any] = {"marker": "s", "color": INK, "linewidths": 0}
        handles.append(ax.scatter(seen, row[seen], label="observed", **look, **style))
    if true is not None:
        ring: dict[str, Any] = {"marker": "o", "facecolors": "none", "edgecolors": "#FF6A00"}
        ring |= {"linewidths": 1.4, "label": "true token"}
        handles.append(ax.scatter(missing, true[missing], **ring, **style))
    ax.set_xlim(-0.5, len(row) - 0.5)
    ax.set_ylim(-0.5, vocab_size - 0.5)
    colorbar(ax, image, "share of completions")
    count = f"{len(missing)} of {len(row)} positions missing, {len(drawn)} completions"
    frame(ax, f"Completions of a row: {count}", "position", "token")
    index_ticks(ax, "x", [str(i) for i in range(len(row))], range(len(row)))
    index_ticks(ax, "y", names, range(vocab_size))
    legend_below(ax, handles)
    return ax


def _one_missing(
    ax: Axes,
    row: np.ndarray,
    missing: int,
    law: np.ndarray,
    true: np.ndarray | None,
    names: Sequence[str],
) -> Axes:
    """The distribution of one missing position of two."""
    at = np.arange(len(law))
    width = 0.8 if len(law) <= 40 else 1.0
    ax.bar(at, law, width, color=COLORS[0], lw=0, label="completions")
    if true is not None:
        ax.axvline(true[missing], color=COLORS[1], lw=1.3, ls="--", label="true token")
    ax.set_xlim(-0.7, len(law) - 0.3)
    given = f"x[{1 - missing}] = {names[row[1 - missing]]}"
    frame(ax, f"Completions: x[{missing}] given {given}", f"token x[{missing}]", "share", grid="y")
    index_ticks(ax, "x", names, at)
    legend_below(ax)
    return ax
