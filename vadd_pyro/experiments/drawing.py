"""Samples and completions of a trained pair, as pictures, as text or as rows of numbers."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vadd_pyro import plotting
from vadd_pyro.checkpoints import write_whole
from vadd_pyro.data import DataSet
from vadd_pyro.data.text import TextData
from vadd_pyro.experiments.evaluation import time_grids_of
from vadd_pyro.experiments.store import Experiment
from vadd_pyro.infilling import infill
from vadd_pyro.sampling import sample

__all__ = [
    "AREAS",
    "complete",
    "draw",
    "parse_row",
    "partly_given",
    "sheet",
    "write_figure",
    "write_rows",
]

AREAS = ("lower", "upper", "left", "right", "middle")


def draw(
    run: Experiment,
    num_samples: int = 16,
    num_steps: Sequence[int] = (1, 2, 4, 8),
    *,
    latent: str = "fresh",
    order: str = "random",
    latent_temperature: float = 1.0,
    time_grids: str = "equal",
    seed: int = 0,
) -> dict[int, Tensor]:
    """Samples for each number of steps, ``(num_samples, D)`` long each.

    Args:
        run: the trained pair.
        num_samples: how many for each.
        num_steps: numbers of steps.
        latent, order, latent_temperature: as in :func:`vadd_pyro.sample`.
        time_grids: ``"equal"``, or ``"best"`` by fresh latents and the random order, see
            :func:`~vadd_pyro.experiments.evaluation.time_grids_of`.
        seed: the same for each.
    """
    if order == "entropy_bounded" and time_grids != "equal":
        raise ValueError(
            f"time_grids must be 'equal' with order='entropy_bounded', which takes the time from "
            f"the share of visible tokens, got {time_grids!r}"
        )
    grids = {} if time_grids == "equal" else time_grids_of(run, num_steps, time_grids)
    return {
        steps: sample(
            run.model,
            run.process,
            num_samples,
            steps,
            time_grid=grids.get(steps),
            latent=latent,
            order=order,
            latent_temperature=latent_temperature,
            seed=seed,
        ).cpu()
        for steps in num_steps
    }


def partly_given(data: DataSet, rows: Tensor, area: str) -> Tensor:
    """Rows of which an area is open.

    Args:
        data: says what the rows are.
        rows: tokens, ``(N, D)``.
        area: one of :data:`AREAS`; of rows that are no pictures ``"upper"`` and ``"left"`` are the
            first half, ``"lower"`` and ``"right"`` the second.

    Returns:
        ``(N, D)`` with the mask id in the area.
    """
    if area not in AREAS:
        raise ValueError(f"area must be one of {', '.join(AREAS)}, got {area!r}")
    colour = data.shape is not None and len(data.shape) == 3
    channels = data.shape[0] if colour and data.shape else 1
    height, width = data.shape[-2:] if data.shape is not None else (1, data.length)
    open_ = torch.zeros(height, width, dtype=torch.bool)
    if area == "middle":
        down = slice(height // 4, math.ceil(height * 3 / 4))
        open_[down, width // 4 : math.ceil(width * 3 / 4)] = True
    elif area in ("lower", "upper") and height > 1:
        open_[slice(height // 2, None) if area == "lower" else slice(height // 2)] = True
    else:
        second = area in ("lower", "right")
        open_[:, slice(width // 2, None) if second else slice(width // 2)] = True
    return rows.masked_fill(open_.expand(channels, -1, -1).flatten(), data.vocab_size)


def parse_row(data: DataSet, text: str) -> Tensor:
    """One partly given row, ``(1, D)``.

    Args:
        data: says what a row is.
        text: a text with ``_`` at open places, filled up with open places if it is shorter than a
            row; or values separated by commas, ``?`` for open ones.

    Raises:
        ValueError: for a row that is too long, or something else than a value, saying where.
    """
    mask = data.vocab_size
    if isinstance(data, TextData) and data.characters is not None:
        if len(text) > data.length:
            raise ValueError(f"row has {len(text)} characters: expected at most {data.length}")
        # Encoded whole, so that what is wrong is named by its place.
        filler = data.characters[0]
        row = torch.full((1, data.length), mask)
        row[0, : len(text)] = data.encode("".join(filler if c == "_" else c for c in text))
        gaps = torch.tensor(
            [i for i, letter in enumerate(text) if letter == "_"], dtype=torch.long
        )
        row[0, gaps] = mask
        return row
    cells = [cell.strip() for cell in text.split(",")]
    if len(cells) != data.length:
        raise ValueError(f"row has {len(cells)} values: expected {data.length}")
    for i, cell in enumerate(cells):
        if cell != "?" and not (cell.isdecimal() and int(cell) < mask):
            raise ValueError(f"value {i + 1} of row is {cell!r}: expected 0..{mask - 1} or '?'")
    return torch.tensor([[mask if cell == "?" else int(cell) for cell in cells]])


def complete(
    run: Experiment,
    given: Tensor,
    num_completions: int = 8,
    num_steps: int = 16,
    *,
    weighted: bool = False,
    num_particles: int = 1024,
    seed: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Completions of partly given rows.

    Args:
        run: the trained pair.
        given: ``(N, D)``, the mask id at open positions.
        num_completions: of each row.
        num_steps: ``T``.
        weighted: by the sampler's joint law (:func:`vadd_pyro.infill`); otherwise by the
            denoising conditional (:func:`vadd_pyro.sample` with ``x_start``).
        num_particles: of the weighted kind.
        seed: of the draws.

    Returns:
        ``(N, num_completions, D)``, and the effective sample sizes ``(N,)`` of the weighted kind.
    """
    if weighted:
        found = infill(
            run.model,
            run.process,
            given,
            num_steps,
            num_samples=num_completions,
            num_particles=num_particles,
            seed=seed,
        )
        return found.x.cpu(), found.effective_size.cpu()
    x = sample(
        run.model,
        run.process,
        num_completions,
        num_steps,
        x_start=given,
        seed=seed,
    )
    return x.cpu().reshape(len(given), num_completions, -1), None


def sheet(
    data: DataSet, groups: Sequence[tuple[str, Tensor]], path: str | Path, title: str
) -> None:
    """Write a sheet of pictures, one line for each group.

    Args:
        data: says what a row looks like.
        groups: name and rows ``(N, D)`` of each line; open pixels are blue.
        path: the picture's file.
        title: over the sheet.
    """
    from matplotlib.figure import Figure

    count = max(len(rows) for _, rows in groups)
    fig = Figure(
        figsize=(min(11.0, 1.4 + 0.62 * count), 0.45 + 0.66 * len(groups)),
        dpi=150,
        layout="constrained",
    )
    axes = fig.subplots(len(groups), 1, squeeze=False)[:, 0]
    for ax, (name, rows) in zip(axes, groups, strict=True):
        plotting.picture_row(data.pictures(rows).numpy(), ax, name)
    fig.suptitle(title, fontsize=10)
    write_figure(fig, path)


def write_figure(fig: Any, path: str | Path) -> None:
    """Write a figure whole or not at all."""
    content = io.BytesIO()
    plotting.save_figure(fig, content)
    write_whole(path, lambda file: file.write(content.getvalue()))


def write_rows(data: DataSet, rows: Tensor, path: str | Path) -> None:
    """Write rows as text, a line each, or as values separated by commas."""
    lines: list[Any] = (
        [line.replace("\n", "\\n") for line in data.decode(rows)]
        if isinstance(data, TextData)
        else [",".join(map(str, row)) for row in rows.tolist()]
    )
    content = ("\n".join(lines) + "\n").encode()
    write_whole(path, lambda file: file.write(content))
