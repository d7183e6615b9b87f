"""Discrete latents: how often each code is used, and two laws over codes side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vadd_pyro.plotting.style import (
    COLORS,
    INK,
    Values,
    frame,
    index_ticks,
    legend_below,
    new_axis,
    share,
    vector,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["code_usage", "compare_codes"]

_MOST = 10  # codes shown side by side


def _law(name: str, value: Values, length: int | None = None) -> np.ndarray:
    law = vector(name, value, length)
    if (law < 0).any() or abs(law.sum() - 1) > 1e-3:
        raise ValueError(
            f"{name} must be probabilities: it sums to {law.sum():.4g}, its least entry is "
            f"{law.min():.4g}"
        )
    return law


def code_usage(prior: Values, posterior: Values, ax: Axes | None = None) -> Axes:
    """How often each code is used by the data, against the prior.

    A code counts as used if it has more than a tenth of an equal share, ``1 / (10 C)``, of the
    aggregate posterior.

    Args:
        prior: probabilities of the codes, ``(C,)``; averaged over rows if the prior sees them.
        posterior: the aggregate posterior: posterior probabilities averaged over rows, ``(C,)``.
        ax: axis to draw on; a new one if omitted.

    Returns:
        The axis.

    Raises:
        ValueError: for shapes that do not fit or entries that are no probabilities.
    """
    p = _law("prior", prior)
    q = _law("posterior", posterior, len(p))
    ax = new_axis(ax, height=3.0)
    least = 1 / (10 * len(p))
    order = np.argsort(-q, kind="stable")
    at = np.arange(len(p))
    width = 0.8 if len(p) <= 40 else 1.0
    ax.bar(at, q[order], width, color=COLORS[5], lw=0, label="aggregate posterior")
    marker: dict[str, Any] = {"marker": "D", "ms": 3.2 if len(p) <= 40 else 1.8, "ls": "none"}
    ax.plot(at, p[order], color=COLORS[1], label="prior", **marker)
    ax.axhline(least, color=INK, lw=0.9, ls=":", label="used above 1/(10 C)")
    ax.set_xlim(-0.8, len(p) - 0.2)
    ax.set_ylim(0, 1.08 * max(q.max(), p.max()))
    used = int((q > least).sum())
    label = "code, the most used first"
    if len(p) <= 20:
        label = "code number, the most used first"
        index_ticks(ax, "x", [str(i) for i in order], at)
    frame(ax, f"Codes: {used} of {len(p)} used", label, "probability", grid="y")
    legend_below(ax)
    return ax


def compare_codes(
    guide: np.ndarray, reference: np.ndarray, true: np.ndarray | None, ax: Axes | None
) -> Axes:
    """Two sets of draws of codes, ``(S, L)`` and ``(R, L)``, as bars, the most probable first.

    Args:
        guide, reference: the draws.
        true: the codes that the row was made with, ``(1, L)``.
        ax: axis to draw on; a new one if omitted.
    """
    ax = new_axis(ax, height=3.1)
    both = np.concatenate([guide, reference]).round().astype(int)
    kinds, numbers = np.unique(both, axis=0, return_inverse=True)
    numbers = numbers.reshape(-1)
    laws = [
        np.bincount(part, minlength=len(kinds)) / len(part)
        for part in (numbers[: len(guide)], numbers[len(guide) :])
    ]
    shown = np.argsort(-(laws[0] + laws[1]), kind="stable")[:_MOST]
    own = np.array([], dtype=int)
    if true is not None:
        own = np.flatnonzero((kinds == true.round().astype(int)).all(1))
        shown = np.concatenate([shown, own[~np.isin(own, shown)]])
    at = np.arange(len(shown))
    style: dict[str, Any] = {"height": 0.4, "lw": 0}
    ax.barh(at - 0.2, laws[0][shown], color=COLORS[0], label="guide", **style)
    hatched: dict[str, Any] = {"color": COLORS[4], "hatch": "////", "edgecolor": "white"}
    ax.barh(at + 0.2, laws[1][shown], label="reference", **hatched, **style)
    for row in np.flatnonzero(np.isin(shown, own)):
        right = max(law[shown[row]] for law in laws)
        ax.plot([right], [row], "k*", ms=7, ls="none", label="true code")
    labels = [", ".join(str(code) for code in kind) for kind in kinds[shown].tolist()]
    ax.set_yticks(at, labels)
    ax.set_ylim(max(len(shown), 3) - 0.4, -0.6)
    rest = len(kinds) - len(shown)
    left_out = share(1 - sum(float(law[shown].sum()) for law in laws) / 2)
    note = f"; {rest} more codes: {left_out}" if rest else ""
    name = "code" if kinds.shape[1] == 1 else "codes"
    frame(ax, "Guide against reference posterior", f"share of draws{note}", name, grid="x")
    legend_below(ax)
    return ax
