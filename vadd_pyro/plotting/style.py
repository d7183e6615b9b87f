"""What all figures share: colours, sizes, checks of what is drawn, titles and legends that fit.

Sizes are made for print: a panel is 3.5 inches wide, no text is smaller than 8 points. Categories
have the colours of Okabe and Ito and differ in markers or lines too; what is ordered is drawn in
cividis or viridis. No setting of matplotlib is changed; pyplot only makes a new axis where none is
given.

References:
    Okabe and Ito 2008, "Color Universal Design"; Nuñez, Anderton and Renslow 2018, "Optimizing
    colormaps with consideration for color vision deficiency" (cividis).
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar

__all__ = [
    "COLORS",
    "DENSITY",
    "FAINT",
    "FEATURE",
    "INK",
    "LINES",
    "MARKERS",
    "MINUS",
    "SMALL",
    "Values",
    "check_names",
    "colorbar",
    "frame",
    "index_ticks",
    "legend_below",
    "matrix",
    "new_axis",
    "panel_size",
    "share",
    "vector",
]

Values: TypeAlias = Tensor | np.ndarray | Sequence[Any]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
MARKERS = "osD^vPX"
LINES: tuple[Any, ...] = (
    *("-", "--", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (8, 2)), (0, (3, 1.5))),
)
DENSITY, FEATURE = "cividis", "viridis"
MINUS = "\N{MINUS SIGN}"
INK, FAINT = "#333333", "#C8C8C8"
SMALL = 8.0  # points: ticks, legends, notes
_LABEL, _TITLE = 8.5, 9.0
_CHARACTER = 0.0077  # inches, mean width of one at one point


def matrix(
    name: str, value: Values, shape: Sequence[int | None], *, finite: bool = True
) -> np.ndarray:
    """What is to be drawn, as a numpy array.

    Args:
        name: how messages call the argument.
        value: numbers.
        shape: expected sizes; None stands for any of at least one.
        finite: whether infinite and missing values are refused.

    Raises:
        ValueError: for another shape, or values that are not finite.
    """
    array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    fits = array.ndim == len(shape) and all(
        size >= 1 if wanted is None else size == wanted
        for size, wanted in zip(array.shape, shape, strict=True)
    )
    if not fits:
        expected = ", ".join("any" if wanted is None else str(wanted) for wanted in shape)
        raise ValueError(f"{name} must have shape ({expected}), got {array.shape}")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold numbers, got {array.dtype}")
    if finite and array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(f"{name} has {bad} entries that are not finite: expected none")
    return array


def vector(
    name: str, value: Values, length: int | None = None, *, finite: bool = True
) -> np.ndarray:
    """As :func:`matrix`, for one dimension, as floats."""
    return matrix(name, value, (length,), finite=finite).astype(float)


def check_names(names: Sequence[str] | None, count: int, default: str) -> list[str]:
    """Names of ``count`` things; ``default`` has a place for the number.

    Raises:
        ValueError: if there are more or fewer.
    """
    if names is None:
        return [default.format(i) for i in range(count)]
    if len(names) != count:
        raise ValueError(f"names must be {count}, one of each, got {len(names)}: {list(names)}")
    return [str(name) for name in names]


def new_axis(ax: Axes | None, height: float = 2.9, width: float = 3.5) -> Axes:
    """The axis given, or a new one in a figure of this size in inches."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), dpi=150, layout="constrained")[1]


def panel_size(ax: Axes) -> tuple[float, float]:
    """Width and height of an axis in inches, before any layout."""
    box, figure = ax.get_position(original=True), ax.figure
    return (
        box.width * figure.bbox.width / figure.dpi,
        box.height * figure.bbox.height / figure.dpi,
    )


def frame(ax: Axes, title: str, xlabel: str, ylabel: str, *, grid: str | None = None) -> None:
    """Title, labels with units, ticks; text broken into lines that fit the panel."""
    from matplotlib.ticker import AutoLocator, MaxNLocator

    across, up = panel_size(ax)
    for axis, room in ((ax.xaxis, across / 0.45), (ax.yaxis, up / 0.3)):
        # Ticks that depend on the final size would keep a layout from settling.
        if isinstance(axis.get_major_locator(), AutoLocator):
            axis.set_major_locator(MaxNLocator(max(2, int(room)), steps=[1, 2, 2.5, 5, 10]))
    width = max(16, int(across / (_CHARACTER * _TITLE)))
    ax.set_title("\n".join(textwrap.wrap(title, width)), fontsize=_TITLE, color="black", pad=5)
    lines = [part for line in xlabel.split("\n") for part in textwrap.wrap(line, width + 2)]
    ax.set_xlabel("\n".join(lines), fontsize=_LABEL, labelpad=3)
    ax.set_ylabel(ylabel, fontsize=_LABEL, labelpad=3)
    ax.tick_params(labelsize=SMALL, length=2.5, width=0.7, color="#888888", pad=2.5)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#888888")
        spine.set_linewidth(0.7)
    if grid is not None:
        ax.grid(axis=grid, color="#E4E4E4", linewidth=0.6)  # type: ignore[arg-type]
        ax.set_axisbelow(True)


def legend_below(ax: Axes, handles: Sequence[Any] | None = None, *, ticks: bool = True) -> None:
    """A legend under the label of the horizontal axis, in as many columns as fit.

    Args:
        ax: the axis.
        handles: what it explains, each with its label; all labelled artists if omitted.
        ticks: whether the axis has ticks and a label there.
    """
    if handles is None:
        handles = ax.get_legend_handles_labels()[0]
    if not handles:
        return
    handles = list(handles)
    wide = [len(str(handle.get_label())) * _CHARACTER * SMALL + 0.42 for handle in handles]
    columns = len(handles)
    while columns > 1:
        parts = np.array_split(wide, columns)  # as the legend fills its columns
        if sum(max(part) for part in parts) < panel_size(ax)[0] + 0.6:
            break
        columns -= 1
    lines = ax.get_xlabel().count("\n") + 1
    below = 1.9 + 1.5 * lines if ticks else 0.8  # in units of the font size
    ax.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        borderaxespad=below,
        ncols=columns,
        fontsize=SMALL,
        frameon=False,
        handlelength=1.7,
        handletextpad=0.5,
        columnspacing=1.2,
        labelspacing=0.3,
        borderpad=0.0,
    )


def colorbar(
    ax: Axes,
    image: Any,
    label: str,
    *,
    box: tuple[float, float, float, float] = (1.03, 0.0, 0.045, 1.0),
    **options: Any,
) -> Colorbar:
    """A colour scale to the right of an axis, which stays with it under any layout.

    Args:
        ax: the axis.
        image: what is coloured.
        label: of the scale, with its unit.
        box: left, bottom, width and height, in those of the axis.
        options: of ``Figure.colorbar``.
    """
    bar = ax.figure.colorbar(image, cax=ax.inset_axes(box), **options)
    bar.set_label(label, fontsize=_LABEL)
    bar.ax.tick_params(labelsize=SMALL, length=2.5, width=0.7, color="#888888", pad=2)
    bar.outline.set_visible(False)
    return bar


def index_ticks(
    ax: Axes,
    axis: str,
    labels: Sequence[str],
    at: Sequence[float] | np.ndarray,
    *,
    room: float = 1.0,
) -> None:
    """Tick labels at given places, as many as can be read: every second, fifth, tenth, ... .

    The first is always among them.

    Args:
        ax: the axis.
        axis: ``"x"`` or ``"y"``.
        labels: all of them.
        at: their places.
        room: share of the axis that they stand on.
    """
    width, height = panel_size(ax)
    width, height = room * width, room * height
    if axis == "x":
        longest = (max(len(label) for label in labels) + 1.0) * _CHARACTER * SMALL
        most = max(1, int(width * 0.9 / longest))
    else:
        most = max(1, int(height * 0.8 / (1.35 * SMALL / 72)))
    every = 1
    for every in (1, 2, 5, 10, 20, 25, 50, 100, 200, 500, 1000, 10_000):
        if len(labels) <= most * every:
            break
    ticks = getattr(ax, f"set_{axis}ticks")
    ticks(list(at)[::every], list(labels)[::every])


def share(part: float) -> str:
    """A share between 0 and 1 in per cent, never rounded to nothing or all."""
    percent = 100 * part
    if 0 < percent < 0.1:
        return "< 0.1 %"
    if 99.9 < percent < 100:
        return "> 99.9 %"
    digits = 1 if 0 < percent < 10 or 99 < percent < 100 else 0
    return f"{percent:.{digits}f} %"
