"""What the decoder makes of a latent: its output along a path of latents, and the laws of the
tokens from different regions or codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vadd_pyro.plotting.densities import show_density
from vadd_pyro.plotting.style import (
    DENSITY,
    SMALL,
    Values,
    check_names,
    colorbar,
    frame,
    index_ticks,
    matrix,
    new_axis,
    vector,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["latent_traversal", "laws_by_latent"]


def latent_traversal(
    probabilities: Values,
    ax: Axes | None = None,
    *,
    path: Values | None = None,
    name: str = "step along the path",
    positions: Sequence[str] | None = None,
) -> Axes:
    """The decoder's output along a path of latents, one band of tokens for each position.

    Two tokens need no band: the probability of token 1 is drawn, one line for each position.

    Args:
        probabilities: of the tokens at each point of the path, ``(steps, D, K)``.
        ax: axis to draw on; a new one if omitted.
        path: coordinate of the points, ``(steps,)``, increasing; their numbers if omitted.
        name: what the coordinate is, such as ``"z[0], with z[1] = 0"``.
        positions: names of the positions, ``x[0]``, ``x[1]``, ... if omitted.

    Returns:
        The axis.

    Raises:
        ValueError: for shapes that do not fit, no probabilities, or a path that does not increase.
    """
    p = matrix("probabilities", probabilities, (None, None, None)).astype(float)
    num_steps, length, num_tokens = p.shape
    if (p < 0).any() or np.abs(p.sum(-1) - 1).max() > 1e-3:
        raise ValueError(
            "probabilities must sum to one over the last dimension, they sum to "
            f"{p.sum(-1).min():.4g} to {p.sum(-1).max():.4g}"
        )
    x = np.arange(num_steps) if path is None else vector("path", path, num_steps)
    if (np.diff(x) <= 0).any():
        raise ValueError(f"path must increase from step to step, got {x.tolist()}")
    positions = check_names(positions, length, "x[{}]")
    ax = new_axis(ax, height=min(7.0, max(2.9, 0.9 + 0.22 * length)))
    style: dict[str, Any] = {"cmap": DENSITY, "vmin": 0.0, "rasterized": True}
    edges_y: np.ndarray
    if num_tokens == 2:
        edges_y = np.arange(length + 1) - 0.5
        image = ax.pcolormesh(_edges(x), edges_y, p[..., 1].T, vmax=1.0, **style)
        centres, label = list(range(length)), "probability of token 1"
    else:
        gap = max(1, round(0.06 * num_tokens)) if length > 1 else 0
        band = num_tokens + gap
        rows = np.full((length * band - gap, num_steps), np.nan)
        for i in range(length):
            # The first band stands highest, and in each the tokens go upwards.
            start = i * band
            rows[start : start + num_tokens] = p[:, i, ::-1].T
        edges_y = np.arange(len(rows) + 1) - 0.5
        brightest = float(np.nanquantile(rows, 0.995)) or float(np.nanmax(rows))
        image = ax.pcolormesh(_edges(x), edges_y, rows, vmax=brightest, **style)
        centres = [i * band + (num_tokens - 1) / 2 for i in range(length)]
        label = "probability"
    ax.set_ylim(edges_y[-1], edges_y[0])
    above = float(p.max()) > image.get_clim()[1]
    colorbar(ax, image, label, extend="max" if above else "neither")
    upwards = f", tokens 0 to {num_tokens - 1} upwards" if num_tokens > 2 else ""
    frame(ax, "Decoder along a path of latents", name, f"position{upwards}")
    index_ticks(ax, "y", positions, centres)
    if path is None:
        index_ticks(ax, "x", [str(i) for i in range(num_steps)], x)
    return ax


def _edges(x: np.ndarray) -> np.ndarray:
    """Boundaries of cells around increasing points."""
    if len(x) == 1:
        return np.array([x[0] - 0.5, x[0] + 0.5])
    middle = (x[1:] + x[:-1]) / 2
    return np.concatenate([[2 * x[0] - middle[0]], middle, [2 * x[-1] - middle[-1]]])


def laws_by_latent(
    laws: Values,
    labels: Sequence[str],
    axes: Sequence[Axes] | None = None,
) -> list[Axes]:
    """Laws over pairs of tokens, one panel for each latent, region or code, on one colour scale.

    Args:
        laws: ``(n, K, K)``, first token to the right and second upwards: the model's law given
            each latent, or frequencies of its one-step samples.
        labels: what stands over each panel.
        axes: ``n`` axes to draw on; those of a new figure if omitted.

    Returns:
        The axes.

    Raises:
        ValueError: for shapes that do not fit, or more or fewer labels or axes than laws.
    """
    p = matrix("laws", laws, (None, None, None)).astype(float)
    for name, value in (("labels", labels), ("axes", axes)):
        if value is not None and len(value) != len(p):
            raise ValueError(f"{name} must be {len(p)}, one for each law, got {len(value)}")
    if axes is None:
        axes = _panels(len(p))
    brightest = float(np.quantile(p, 0.995)) or float(p.max())
    for one, label, ax in zip(p, labels, axes, strict=True):
        show_density(torch.from_numpy(one), ax, vmax=brightest)
        ax.set_title(label, fontsize=SMALL, pad=3)
    last = axes[-1]
    image = last.images[-1]
    bar = colorbar(last, image, "probability", extend="max" if p.max() > brightest else "neither")
    bar.locator = _few_ticks()
    bar.update_ticks()
    axes[0].set_xlabel("first token →", fontsize=SMALL, labelpad=2)
    axes[0].set_ylabel("second token →", fontsize=SMALL, labelpad=2)
    return list(axes)


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(3)


def _panels(count: int) -> list[Axes]:
    import matplotlib.pyplot as plt

    columns = min(count, 4 if count > 6 else 3)
    rows = -(-count // columns)
    size = (1.75 * columns + 0.8, 1.8 * rows + 0.35)
    fig, grid = plt.subplots(rows, columns, figsize=size, dpi=150)
    # The layout is found in two passes, which squares with a scale beside them need room for.
    fig.set_layout_engine("constrained", w_pad=0.09, h_pad=0.07)
    axes = list(np.atleast_1d(grid).ravel())
    for ax in axes[count:]:
        ax.remove()
    return axes[:count]
