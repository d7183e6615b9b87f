"""Ways through a model: the decoder along a path of latents, and samples on their way from masks
to tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vadd_pyro.distributions import token_logits
from vadd_pyro.inspection.draws import LatentDraws, codes, prior_draws
from vadd_pyro.inspection.scoring import Replay, particles
from vadd_pyro.process import MaskedBatch, MaskingProcess, check_size, make_time_grid
from vadd_pyro.programs import evaluation
from vadd_pyro.recorder import run
from vadd_pyro.sampling import device_of, seeded

__all__ = [
    "DenoisingPath",
    "LatentPath",
    "follow_sample",
    "latent_path",
    "token_probabilities",
]

_ROUND = 1e-3  # how far from one the norms of directions may be


class LatentPath(NamedTuple):
    """A path through latent space.

    Args:
        values: latents by site, ``(S, 1) + event``, for one row.
        coordinate: where on the path each of them is, ``(S,)``, increasing.
        name: what the coordinate is.
    """

    values: dict[str, Tensor]
    coordinate: Tensor
    name: str


class DenoisingPath(NamedTuple):
    """Samples on their way.

    Args:
        states: ``(T + 1, N, D)`` long, all masked first.
        times: of the states, ``(T + 1,)``, from 1 to 0.
        latents: of each step by site, ``(T, N) + event``, also of steps that reveal nothing.
    """

    states: Tensor
    times: Tensor
    latents: dict[str, Tensor]


def token_probabilities(
    model: Callable[..., Any],
    batch: MaskedBatch,
    values: Mapping[str, Tensor],
    *,
    max_plate_nesting: int = 1,
    args: tuple[Any, ...] = (),
) -> Tensor:
    """The decoder's output at given latents.

    Args:
        model: a step program, run in evaluation mode without gradients.
        batch: ``B`` rows; needs no data.
        values: latents by site, ``(S, B) + event``; empty for a model without.
        max_plate_nesting: depth of the plates of the program.
        args: further arguments of the program.

    Returns:
        ``(S, B, D, K)``; laws at visible positions mean nothing.

    Raises:
        ValueError: for a latent without a value.
    """
    number = next((len(value) for value in values.values()), 1)
    with evaluation(model):
        recorder = Replay(values, None, -2 - max_plate_nesting)
        inside = particles(number, max_plate_nesting)
        sites = run(model, recorder, batch.without_data(), *args, inside=inside).sites
    missing = [n for n, s in sites.items() if n != "x_0" and not s.observed and n not in values]
    if missing:
        raise ValueError(f"values lack the latents {', '.join(missing)}: got {sorted(values)}")
    logits = token_logits(sites["x_0"].fn)
    shape = (number, len(batch), *logits.shape[-2:])
    return (
        logits.expand(*logits.shape[:-3], *shape[1:])
        .reshape(-1, *shape[1:])
        .expand(shape)
        .softmax(-1)
    )


def latent_path(
    draws: LatentDraws, site: str | None = None, column: int = 0, num_points: int = 33
) -> LatentPath:
    """A straight path through draws of a prior: one coordinate from its first percentile to its
    last, all others at their medians.

    Directions go along a great circle through the first two axes; codes are taken one by one.

    Args:
        draws: from :func:`vadd_pyro.inspection.prior_draws`, of one row or of several, which count
            alike.
        site: which site moves; the first one if omitted.
        column: which of its coordinates.
        num_points: points of a path of real numbers.

    Raises:
        ValueError: for draws without latents, or a site or column that they lack.
    """
    if not draws.sites:
        raise ValueError("the model has no latent to move")
    site = next(iter(draws.sites)) if site is None else site
    if site not in draws.sites:
        raise ValueError(f"site must be among {', '.join(draws.sites)}, got {site!r}")
    check_size("num_points", num_points, least=2)
    flat = {name: value.flatten(0, 1) for name, value in draws.sites.items()}
    moved = flat[site]
    numbers = codes(draws.sites[site])
    width = moved[0].numel() if numbers is None else numbers.shape[-1]
    if not 0 <= column < width:
        raise ValueError(f"column must lie in 0..{width - 1} for site {site!r}, got {column}")
    name = (
        site if moved.dim() == 1 or (numbers is not None and width == 1) else f"{site}[{column}]"
    )
    others = {n: _middle(value) for n, value in flat.items()}
    if numbers is not None:
        one_hot = moved.is_floating_point()
        number = moved.shape[-1] if one_hot else int(moved.max()) + 1
        coordinate = torch.arange(number, device=moved.device)
        path = numbers.flatten(0, 1).mode(0).values.repeat(number, 1)
        path[:, column] = coordinate
        if one_hot:
            path = torch.nn.functional.one_hot(path, number).to(moved.dtype)
    elif _on_sphere(moved):
        coordinate = torch.linspace(-180.0, 180.0, num_points, device=moved.device)
        angle = torch.deg2rad(coordinate)
        path = moved.new_zeros(num_points, width)
        path[:, column] = angle.cos()
        path[:, (column + 1) % width] = angle.sin()
        name = f"angle from {name}, degrees"
    else:
        ends = moved.reshape(len(moved), -1)[:, column].quantile(moved.new_tensor([0.01, 0.99]))
        steps = torch.linspace(0, 1, num_points, device=moved.device)
        coordinate = torch.lerp(ends[0], ends[1], steps)
        path = others[site].reshape(1, -1).repeat(num_points, 1)
        path[:, column] = coordinate
    shape = (len(coordinate), 1)
    values = {n: value.expand(*shape, *value.shape) for n, value in others.items()}
    values[site] = path.reshape(*shape, *moved.shape[1:])
    return LatentPath(values, coordinate, name)


def _middle(value: Tensor) -> Tensor:
    """A latent in the middle of its draws ``(N,) + event``; of codes, the most frequent."""
    numbers = codes(value.unsqueeze(1))
    if numbers is not None:
        mode = numbers.flatten(0, 1).mode(0).values
        if value.is_floating_point():
            mode = torch.nn.functional.one_hot(mode, value.shape[-1]).to(value.dtype)
        return mode.reshape(value.shape[1:])
    if _on_sphere(value):
        mean = value.mean(0)
        return mean / mean.norm().clamp_min(torch.finfo(mean.dtype).tiny)
    return value.median(0).values


def _on_sphere(value: Tensor) -> bool:
    if value.dim() != 2 or value.shape[1] < 2:
        return False
    return bool(((value.norm(dim=-1) - 1).abs() < _ROUND).all())


def follow_sample(
    model: Callable[..., Any],
    process: MaskingProcess,
    num_steps: int | None = None,
    *,
    num_samples: int = 1,
    time_grid: Tensor | None = None,
    seed: int | None = None,
    max_plate_nesting: int = 1,
    args: tuple[Any, ...] = (),
) -> DenoisingPath:
    """Draw samples with fresh latents, as :func:`vadd_pyro.sample` does, and keep every state.

    Args:
        model: a step program.
        process: its forward process.
        num_steps: ``T``, steps of equal length.
        num_samples: how many, ``N``.
        time_grid: a grid of your own, ``(T + 1,)``.
        seed: seed of this call; None draws on torch's global state.
        max_plate_nesting: depth of the plates of the program.
        args: further arguments of the program.
    """
    check_size("num_samples", num_samples)
    grid = make_time_grid(num_steps, time_grid)
    device = device_of(model)
    x = torch.full((num_samples, process.length), process.mask_id, device=device)
    states, latents = [x], []
    with seeded(seed):
        step = process.reveal_steps(tuple(x.shape), grid, device)
        for i in range(len(grid) - 1, 0, -1):
            masked = x == process.mask_id
            t = torch.full((num_samples,), float(grid[i]), device=device)
            batch = MaskedBatch(x, t, masked, step == i)
            drawn = prior_draws(model, batch, 1, max_plate_nesting=max_plate_nesting, args=args)
            assert drawn.tokens is not None
            x = torch.where(step == i, drawn.tokens[0], x)
            states.append(x)
            latents.append({name: value[0] for name, value in drawn.sites.items()})
    return DenoisingPath(
        torch.stack(states),
        grid.flip(0),
        {name: torch.stack([held[name] for held in latents]) for name in latents[0]},
    )
