"""Rows of tokens: as they are, on the way from all masked to clean, and as images.

The mask token has the id ``K``, ``vocab_size``; masked cells are hatched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vadd_pyro.plotting.cells import (
    CELL,
    check_characters,
    check_tokens,
    draw_cells,
    no_frame,
    token_scale,
    write,
)
from vadd_pyro.plotting.style import (
    COLORS,
    MINUS,
    SMALL,
    Values,
    check_names,
    frame,
    index_ticks,
    legend_below,
    matrix,
    new_axis,
    panel_size,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["denoising_path", "picture_row", "show_images", "show_tokens"]

_GAP = 0.6  # columns between states and latents


def show_tokens(
    x: Values,
    ax: Axes | None = None,
    *,
    vocab_size: int,
    highlight: Values | None = None,
    highlight_label: str = "highlighted",
    characters: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    title: str = "Rows of tokens",
) -> Axes:
    """Rows of tokens as a coloured grid, with the tokens written in where there is room.

    Args:
        x: tokens, ``(N, D)`` long; the mask id ``vocab_size`` is hatched.
        ax: axis to draw on; a new one if omitted.
        vocab_size: number of clean tokens ``K``.
        highlight: cells to outline, ``(N, D)`` bool.
        highlight_label: what outlined cells are.
        characters: what each token is called, ``K`` of them; their numbers if omitted.
        labels: names of the rows, their numbers if omitted.
        title: what is shown.

    Returns:
        The axis.

    Raises:
        ValueError: for shapes that do not fit or tokens out of range.
    """
    tokens = check_tokens("x", x, (None, None), vocab_size)
    num_rows, length = tokens.shape
    marked = None if highlight is None else matrix("highlight", highlight, tokens.shape) != 0
    characters = check_characters(characters, vocab_size)
    rows = check_names(labels, num_rows, "{}")
    ax = new_axis(ax, height=min(7.0, max(2.2, 1.0 + 0.21 * num_rows)))
    unit = panel_size(ax)[0] / length
    handles, image = draw_cells(ax, tokens, vocab_size, marked, characters, unit)
    if marked is not None:
        handles.append(_outline(highlight_label))
    frame(ax, title, "position", "row")
    no_frame(ax)
    index_ticks(ax, "x", [str(i) for i in range(length)], range(length))
    index_ticks(ax, "y", rows, range(num_rows))
    token_scale(ax, image, vocab_size)
    legend_below(ax, handles)
    return ax


def _outline(label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor="white", edgecolor=COLORS[1], lw=1.5, label=label)


# ------------------------------------------------------------------------- denoising path


def denoising_path(
    states: Values,
    latents: Values | None = None,
    ax: Axes | None = None,
    *,
    vocab_size: int,
    times: Values | None = None,
    names: Sequence[str] | None = None,
    characters: Sequence[str] | None = None,
) -> Axes:
    """One sample step by step, from all masked on top to clean at the bottom.

    Cells are outlined where they were just written. The latent of each step stands to the right,
    between the state that it was drawn in and the one that it led to.

    Args:
        states: ``(T + 1, D)`` long, in the order in which the sampler visits them.
        latents: of each step, ``(T, d)`` or ``(T,)``; integers are codes.
        ax: axis to draw on; a new one if omitted.
        vocab_size: number of clean tokens ``K``, the mask id.
        times: of the states, ``(T + 1,)``, decreasing; steps are counted if omitted.
        names: of the ``d`` latents.
        characters: what each token is called, ``K`` of them; their numbers if omitted.

    Returns:
        The axis of the states.

    Raises:
        ValueError: for shapes that do not fit or tokens out of range.
    """
    x = check_tokens("states", states, (None, None), vocab_size)
    num_steps, length = len(x) - 1, x.shape[1]
    if num_steps < 1:
        raise ValueError("states has one state: expected at least two, before and after a step")
    characters = check_characters(characters, vocab_size)
    z = None
    if latents is not None:
        flat = (num_steps,) if np.ndim(latents) == 1 else (num_steps, None)
        z = matrix("latents", latents, flat).reshape(num_steps, -1)
        names = check_names(names, z.shape[1], "z[{}]" if z.shape[1] > 1 else "z")
    if times is None:
        labels = ["start", *(f"step {i + 1}" for i in range(num_steps))]
    else:
        labels = [f"{t:.3g}" for t in matrix("times", times, (len(x),))]
    ax = new_axis(ax, height=min(7.0, max(2.4, 1.2 + 0.27 * len(x))))
    written = np.zeros(x.shape, dtype=bool)
    written[1:] = (x[:-1] == vocab_size) & (x[1:] != vocab_size)
    many = x.size > 400  # too many outlines to see
    panel = panel_size(ax)[0]
    part = 0.0 if z is None else min(0.45, max(0.2, 0.5 * z.shape[1] / panel))
    unit = panel * (1 - part) / (length + _GAP)
    handles, image = draw_cells(ax, x, vocab_size, None if many else written, characters, unit)
    if not many:
        handles.append(_outline("just written"))
    title = f"One sample in {num_steps} step{'s' if num_steps > 1 else ''}"
    frame(ax, title, "position", "t (1 all masked, 0 clean)" if times is not None else "")
    no_frame(ax)
    index_ticks(ax, "x", [str(i) for i in range(length)], range(length), room=1 - part)
    index_ticks(ax, "y", labels, range(len(x)))
    token_scale(ax, image, vocab_size)
    if z is not None and names is not None:
        start = length - 0.5 + _GAP
        wide = part / (1 - part) * (length + _GAP) / z.shape[1]
        handles += _beside(ax, z, names, start, wide, panel * part / z.shape[1])
    legend_below(ax, handles)
    return ax


def _beside(
    ax: Axes, z: np.ndarray, names: Sequence[str], start: float, wide: float, unit: float
) -> list[Any]:
    """Latents right of the states: columns ``wide`` from ``start``, ``unit`` inches each."""
    from matplotlib.patches import Patch, Rectangle

    num_steps, count = z.shape
    codes = z.dtype.kind in "iu"
    most = float(np.abs(z).max()) or 1.0
    written = [str(v) if codes else f"{v:.2f}" for v in z.ravel().tolist()]
    longest = max(len(text) for text in [*written, *names])
    fits = unit > 0.065 * longest + 0.04 and panel_size(ax)[1] / (num_steps + 1) > CELL[1]
    colors = _diverging()(0.5 + 0.5 * z / most) if not codes else np.full((*z.shape, 4), 0.92)
    for row, column in np.ndindex(z.shape):
        left = start + column * wide
        look: dict[str, Any] = {"facecolor": colors[row, column], "edgecolor": "white", "lw": 0.8}
        ax.add_patch(Rectangle((left, row + 0.05), wide, 0.9, **look))
        if fits:
            text = written[row * count + column].replace("-", MINUS)
            write(ax, left + wide / 2, row + 0.5, text, colors[row, column])
    ax.set_xlim(-0.5, start + count * wide)
    centres = [start + (i + 0.5) * wide for i in range(count)]
    named = list(names) if fits else [f"{count} latents"]
    at = centres if fits else [float(np.mean(centres))]
    labels = [tick.get_text() for tick in ax.get_xticklabels()]
    ax.set_xticks([*ax.get_xticks(), *at], [*labels, *named])
    ax.set_xlabel("position | latent of the step")
    if fits or codes:
        return []
    ends = ((0.0, -most), (1.0, most))
    return [
        Patch(color=_diverging()(end), label=f"z = {value:.2g}".replace("-", MINUS))
        for end, value in ends
    ]


def _diverging() -> Any:
    from matplotlib import colormaps

    return colormaps["PuOr"]


# ----------------------------------------------------------------------------------- images


def show_images(
    rows: Values,
    shape: tuple[int, int],
    ax: Axes | None = None,
    *,
    vocab_size: int | None = None,
    num_columns: int | None = None,
    title: str = "Images",
) -> Axes:
    """Rows of pixels as images, side by side, dark for small values.

    Args:
        rows: tokens ``(N, D)`` long, or probabilities of pixels in ``[0, 1]``.
        shape: height and width of an image, with product ``D``.
        ax: axis to draw on; a new one if omitted.
        vocab_size: number of values of a pixel; pixels with the mask id ``vocab_size`` are blue.
            If omitted, values are shown from their smallest to their largest.
        num_columns: images side by side; about as many as below each other if omitted.
        title: what is shown.

    Returns:
        The axis.

    Raises:
        ValueError: for shapes that do not fit or pixels out of range.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch, Rectangle

    high, wide = shape
    pixels = matrix("rows", rows, (None, high * wide))
    if vocab_size is not None:
        pixels = check_tokens("rows", rows, (None, high * wide), vocab_size)
    count = len(pixels)
    columns = min(count, num_columns or int(np.ceil(np.sqrt(count))))
    lines = -(-count // columns)
    gap = max(1, round(0.05 * wide))
    sheet = np.full((lines * (high + gap) - gap, columns * (wide + gap) - gap), np.nan)
    hidden = np.zeros(sheet.shape, dtype=bool)
    borders = []
    for i, image in enumerate(pixels.reshape(count, high, wide)):
        top, left = (i // columns) * (high + gap), (i % columns) * (wide + gap)
        place = (slice(top, top + high), slice(left, left + wide))
        sheet[place] = image
        corner = (left - 0.5, top - 0.5)
        borders.append(Rectangle(corner, wide, high, fill=False, edgecolor="#888888", lw=0.6))
        hidden[place] = False if vocab_size is None else image == vocab_size
    ax = new_axis(ax, height=min(7.0, 2.9 * sheet.shape[0] / sheet.shape[1] + 0.5))
    low, top_value = (0, vocab_size - 1) if vocab_size else (pixels.min(), pixels.max())
    style: dict[str, Any] = {"interpolation": "nearest"}
    ax.imshow(np.ma.masked_array(sheet, hidden), cmap="gray", vmin=low, vmax=top_value, **style)
    for border in borders:
        ax.add_patch(border)
    frame(ax, title, "", "")
    ax.set_xticks([])
    ax.set_yticks([])
    no_frame(ax)
    if hidden.any():
        blue = ListedColormap([COLORS[5]])
        ax.imshow(np.ma.masked_array(np.ones(sheet.shape), ~hidden), cmap=blue, **style)
        legend_below(ax, [Patch(color=COLORS[5], label="masked")], ticks=False)
    return ax


def picture_row(pictures: Values, ax: Axes | None = None, label: str = "") -> Axes:
    """Pictures side by side, with a name to their left.

    Args:
        pictures: brightness in ``[0, 1]``, ``(N, H, W)`` or ``(N, H, W, 3)``; pixels of -1 are
            masked, and blue.
        ax: axis to draw on; a new one if omitted.
        label: the name.

    Returns:
        The axis.

    Raises:
        ValueError: for another shape, or brightness out of range.
    """
    array = np.asarray(pictures, dtype=float)
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[-1] != 3):
        raise ValueError(f"pictures must have shape (N, H, W) or (N, H, W, 3), got {array.shape}")
    hidden = (array == -1).reshape(*array.shape[:3], -1).all(-1)
    inside = (array >= 0) & (array <= 1) | (array == -1)
    if not inside.all():
        raise ValueError(
            f"pictures must have brightness in [0, 1], got {array.min():g} to {array.max():g}"
        )
    colour = array if array.ndim == 4 else array[..., None].repeat(3, -1)
    colour = np.where(hidden[..., None], _rgb(COLORS[5]), colour)
    count, high, wide = colour.shape[:3]
    gap = max(1, round(0.08 * wide))
    line = np.ones((high, count * (wide + gap) - gap, 3))
    for i, picture in enumerate(colour):
        line[:, i * (wide + gap) : i * (wide + gap) + wide] = picture
    ax = new_axis(ax, height=0.8, width=6.0)
    ax.imshow(line, interpolation="nearest", vmin=0, vmax=1)
    frame(ax, "", "", "")
    ax.set_xticks([])
    ax.set_yticks([])
    no_frame(ax)
    ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=SMALL, labelpad=6)
    return ax


def _rgb(colour: str) -> Any:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)
