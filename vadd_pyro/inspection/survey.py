"""What the questions of an inspection share: the pair, its rows, draws that several need, and the
folder of the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from vadd_pyro import plotting
from vadd_pyro.inspection.draws import codes, posterior_draws, prior_draws
from vadd_pyro.process import MaskingProcess

__all__ = ["Survey"]

_WIDTH = 3.6  # inches of one panel


class Survey:
    """What the sections share: the pair, the rows, the folder, and draws that several need."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        process: MaskingProcess,
        x_0: Tensor,
        out: Path,
        truth: Tensor | None,
        num_draws: int,
        num_reference_rows: int,
        seed: int,
        options: dict[str, Any],
    ) -> None:
        self.model, self.guide, self.process = model, guide, process
        self.x_0, self.out, self.truth = x_0, out, truth
        self.num_draws, self.num_reference_rows = num_draws, num_reference_rows
        self.seed, self.options = seed, options
        self.batch = process.corrupt(x_0, 1.0)
        self.prior = prior_draws(model, self.batch[:1], 5000, seed=seed, **options)
        # A seed of its own: draws from equal noise would be alike.
        self.draws = posterior_draws(
            model, guide, self.batch[:300], num_draws, seed=seed + 1, **options
        )
        self.has_latent = bool(self.prior.sites)
        self.discrete = self.has_latent and all(
            codes(value) is not None for value in self.prior.sites.values()
        )

    @contextmanager
    def figure(
        self, name: str, columns: int = 1, height: float = 3.4, width: float | None = None
    ) -> Iterator[list[Any]]:
        """Axes of a new figure, side by side, written to a file at the end."""
        from matplotlib.figure import Figure

        width = _WIDTH * columns if width is None else width
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
        yield axes
        plotting.save_figure(figure, self.out / name)
