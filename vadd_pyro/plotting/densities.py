"""Laws over pairs of tokens as pictures: one, or many held against the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vadd_pyro.plotting.style import DENSITY, new_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["compare_steps", "save_figure", "show_density"]


def _brightest(p: Tensor) -> float:
    """99.5th percentile of the probabilities, or the largest where that is zero."""
    return float(p.flatten().quantile(0.995)) or float(p.max())


def show_density(p: Tensor, ax: Axes | None = None, *, vmax: float | None = None) -> Axes:
    """A law over pairs of tokens as a picture, first token to the right and second upwards.

    Args:
        p: probabilities, ``(K, K)``.
        ax: axis to draw on; a new one if omitted.
        vmax: probability shown brightest, by default the 99.5th percentile of ``p``.
    """
    if p.dim() != 2:
        raise ValueError(f"p must be a law over pairs, shape (K, K), got {tuple(p.shape)}")
    ax = new_axis(ax)
    if vmax is None:
        vmax = _brightest(p)
    ax.imshow(
        p.cpu().T.numpy(), origin="lower", cmap=DENSITY, vmin=0, vmax=vmax, interpolation="nearest"
    )
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def compare_steps(
    truth: Tensor,
    laws: Mapping[str, Mapping[int, Tensor]],
    scores: Mapping[str, Mapping[int, float]],
    *,
    title: str,
    score_name: str = "JS",
) -> Figure:
    """The data beside what each model draws at each number of steps.

    Args:
        truth: law of the data, ``(K, K)``.
        laws: for each model, by label, its law at each number of steps.
        scores: a distance to the truth for each of them, printed over the panel.
        title: heading.
        score_name: what the distance is called.
    """
    from matplotlib.figure import Figure
    from matplotlib.gridspec import GridSpec

    if not laws or len({tuple(sorted(by_steps)) for by_steps in laws.values()}) != 1:
        raise ValueError(
            "laws must hold at least one model, and the same numbers of steps for each"
        )
    steps: Sequence[int] = sorted(next(iter(laws.values())))
    num_rows, num_columns = len(laws), len(steps)
    size = 1.85
    fig = Figure(figsize=(size * (num_columns + 1.75), size * num_rows * 1.1 + 0.8), dpi=150)
    grid = GridSpec(
        num_rows,
        num_columns + 1,
        figure=fig,
        width_ratios=[1.35] + [1.0] * num_columns,
        left=0.02,
        right=0.985,
        top=1 - 0.8 / fig.get_figheight(),
        bottom=0.12 if num_rows == 1 else 0.02,
        wspace=0.06,
        hspace=0.22,
    )
    vmax = 1.25 * _brightest(truth)
    middle = (num_rows - 1) // 2
    data = fig.add_subplot(grid[middle, 0])
    show_density(truth, data, vmax=vmax)
    data.set_title("data", fontsize=11)
    for row, (label, by_steps) in enumerate(laws.items()):
        for column, num_steps in enumerate(steps):
            ax = fig.add_subplot(grid[row, column + 1])
            show_density(by_steps[num_steps], ax, vmax=vmax)
            ax.set_title(f"{score_name} {scores[label][num_steps]:.4f}", fontsize=8, pad=3)
            if column == 0:
                ax.set_ylabel(label, fontsize=10)
            if row == 0:
                word = "step" if num_steps == 1 else "steps"
                ax.annotate(
                    f"{num_steps} {word}",
                    (0.5, 1.18),
                    xycoords="axes fraction",
                    ha="center",
                    fontsize=11,
                )
    key = ["bright: probable"]
    if score_name == "JS":
        key += ["JS: Jensen-Shannon distance", "to the data, in nats"]
    corner = grid[num_rows - 1, 0].get_position(fig)
    if num_rows == 1:  # no room below the data: one line under the panels
        fig.text(0.5, 0.03, ";  ".join([key[0], " ".join(key[1:])]), ha="center", fontsize=8.5)
    else:
        fig.text(corner.x0, corner.y0, "\n".join(key), va="bottom", fontsize=8.5, linespacing=1.4)
    fig.suptitle(title, fontsize=12, y=1 - 0.12 / fig.get_figheight(), va="top")
    return fig


def save_figure(fig: Any, path: Any) -> None:
    """Write a figure to a file, drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(fig)
    fig.savefig(path)
