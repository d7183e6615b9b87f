"""Grids of cells, one for each token of a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vadd_pyro.plotting.style import COLORS, DENSITY, SMALL, Values, colorbar, matrix, panel_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "CELL",
    "check_characters",
    "check_tokens",
    "draw_cells",
    "no_frame",
    "token_scale",
    "write",
]

CELL = (0.14, 0.15)  # inches that a cell needs for one character
_MANY = 2000  # cells, more than can be told apart


def check_tokens(
    name: str, value: Values, shape: Sequence[int | None], vocab_size: int, *, masks: bool = True
) -> np.ndarray:
    """Integer tokens of a shape, with or without the mask id.

    Raises:
        ValueError: naming the argument and what it holds.
    """
    x = matrix(name, value, shape)
    if x.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integer tokens, got {x.dtype}")
    most = vocab_size if masks else vocab_size - 1
    if (x < 0).any() or (x > most).any():
        allowed = f"0..{vocab_size - 1}" + (f" or the mask id {vocab_size}" if masks else "")
        raise ValueError(f"{name} must hold tokens in {allowed}, they lie in {x.min()}..{x.max()}")
    return x


def check_characters(characters: Sequence[str] | None, vocab_size: int) -> list[str]:
    """What each token is called, its number if nothing is said.

    Raises:
        ValueError: if there are more or fewer than tokens.
    """
    if characters is None:
        return [str(i) for i in range(vocab_size)]
    if len(characters) != vocab_size:
        raise ValueError(f"characters must be {vocab_size}, one a token, got {len(characters)}")
    return [str(character) for character in characters]


def draw_cells(
    ax: Axes,
    x: np.ndarray,
    vocab_size: int,
    highlight: np.ndarray | None,
    characters: Sequence[str],
    unit: float,
) -> tuple[list[Any], Any]:
    """Coloured cells ``unit`` inches wide, the first row on top; legend entries and the image."""
    from matplotlib.patches import Patch, Rectangle

    num_rows, length = x.shape
    masked = x == vocab_size
    shown = np.ma.masked_array(x.astype(float), masked)
    edges = np.arange(length + 1) - 0.5, np.arange(num_rows + 1) - 0.5
    apart: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.8} if x.size <= _MANY else {}
    image = ax.pcolormesh(*edges, shown, cmap=DENSITY, vmin=0, vmax=vocab_size - 1, **apart)
    ax.set_xlim(edges[0][0], edges[0][-1])
    ax.set_ylim(edges[1][-1], edges[1][0])
    handles: list[Any] = []
    if masked.any():
        look: dict[str, Any] = {"facecolor": "#F4F4F4", "edgecolor": "#A0A0A0", "lw": 0}
        if x.size <= _MANY:
            look["hatch"] = "////"
            for row, column in zip(*np.nonzero(masked), strict=True):
                cell = (column - 0.47, row - 0.45)
                ax.add_patch(Rectangle(cell, 0.94, 0.9, **look))
        else:
            ax.set_facecolor(look["facecolor"])
        handles.append(Patch(label="masked", **look))
    _text(ax, x, vocab_size, image, characters, unit)
    if highlight is not None and highlight.any():
        width = 1.5 if unit > 0.2 else 1.1
        outline: dict[str, Any] = {"fill": False, "edgecolor": COLORS[1], "lw": width}
        for row, column in zip(*np.nonzero(highlight), strict=True):
            cell = (column - 0.46, row - 0.44)
            ax.add_patch(Rectangle(cell, 0.92, 0.88, zorder=4, **outline))
    return handles, image


def _text(
    ax: Axes,
    x: np.ndarray,
    vocab_size: int,
    image: Any,
    characters: Sequence[str],
    unit: float,
) -> None:
    """Each cell's token, where there is room for it."""
    longest = max(len(name) for name in characters)
    needed = CELL[0] + 0.065 * (longest - 1)
    if unit < needed or panel_size(ax)[1] / len(x) < CELL[1]:
        return
    for (row, column), token in np.ndenumerate(x):
        if token == vocab_size:
            continue
        write(ax, column, row, characters[token], image.cmap(image.norm(token)))


def write(
    ax: Axes, x: float, y: float, text: str, background: Sequence[float] | np.ndarray
) -> None:
    """Text on a cell, black or white as can be read on its colour."""
    red, green, blue = background[:3]
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": SMALL, "zorder": 3}
    ax.text(x, y, text, color="white" if dark else "black", **style)


def no_frame(ax: Axes) -> None:
    """No frame around a grid of cells."""
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.tick_params(which="major", length=0)


def token_scale(ax: Axes, image: Any, vocab_size: int) -> None:
    """A colour scale, where the cells have no text."""
    if not ax.texts:
        bar = colorbar(ax, image, "token")
        if vocab_size <= 10:
            bar.set_ticks(list(range(vocab_size)))
