r"""Ancestral sampling from a step program.

One reverse step draws ``x_0' ~ p(x_0 | x_t)`` from the program and keeps each masked token with
probability ``rho(s, t)``, since :math:`p(x_s \mid x_t) = \sum_{x_0'} p(x_0' \mid x_t)\, q(x_s \mid
x_t, x_0')`. Which tokens a step reveals does not depend on their values, so the reveal step of
every token is drawn beforehand, and each row is carried from one step that reveals something in it
to the next: a row takes at most ``min(T, D)`` network calls, and steps that reveal nothing cost
none. The law is the same.

With ``latent="fresh"`` every step draws its latent from the prior, as the model defines.
``latent="shared"`` draws it once, at the first step, and keeps it; ``latent="partial"`` lies
between, each row drawing anew with probability ``refresh`` at each step that reveals something in
it. Both are other distributions, whose single samples may look better while their distribution is
worse. So are other orders than the random one, remasking and a latent temperature:
:mod:`vadd_pyro.orders` says what each of them keeps. Judge them by a distance between
distributions, never by accuracy alone.

References:
    Xie et al. 2025 (arXiv 2505.17384), section 3.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vadd_pyro.batching import check_batches, rows_at_once
from vadd_pyro.compiling import compiled
from vadd_pyro.orders import Order, Plan, check_order, make_plan
from vadd_pyro.process import MaskingProcess, check_size, make_time_grid
from vadd_pyro.programs import evaluation, modules_of
from vadd_pyro.stepping import Latents, Rows
from vadd_pyro.tempering import check_temperature

__all__ = ["sample", "seeded"]


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run with a seed of one's own and leave torch's random state as it was.

    None changes nothing.
    """
    if seed is None:
        yield
        return
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def device_of(program: Any, default: torch.device | None = None) -> torch.device:
    """The device of a program's first parameter or buffer, else the default device of torch."""
    for module in modules_of(program):
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    return torch.empty(0).device if default is None else default


def start_state(
    process: MaskingProcess,
    x_start: Tensor,
    t_start: Tensor | float | None,
    grid: Tensor,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Where infilling begins.

    The rows, and each row's grid ``(B, T + 1)`` in double precision, the unit grid times its
    ``t_start``.
    """
    x_start = torch.as_tensor(x_start)
    if x_start.dim() == 1:
        x_start = x_start.unsqueeze(0)
    x = process.check_tokens(x_start, "x_start", masks=True).to(device)
    if t_start is None:
        observed = (x != process.mask_id).double().mean(-1)
        times = process.schedule.inverse(observed)
    else:
        times = process.check_times(t_start, len(x), "t_start", device).double()
        if not ((times > 0) & (times <= 1)).all():
            raise ValueError(f"t_start must lie in (0, 1], got {t_start}")
    return x, grid.to(device) * times.unsqueeze(-1)


def sample(
    model: Callable[..., Any],
    process: MaskingProcess,
    num_samples: int = 1,
    num_steps: int | None = None,
    *,
    latent: str = "fresh",
    refresh: float | None = None,
    order: str | Order = "random",
    entropy_bound: float | None = None,
    remask: float = 0.0,
    latent_temperature: float = 1.0,
    time_grid: Tensor | None = None,
    x_start: Tensor | None = None,
    t_start: Tensor | float | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    compile: bool | str = False,
    device: torch.device | str | None = None,
    args: tuple[Any, ...] = (),
) -> Tensor:
    """Draw rows of tokens with a T-step sampler.

    Args:
        model: a step program.
        process: its forward process.
        num_samples: how many rows; with ``x_start``, how many completions of each of its rows.
        num_steps: ``T``, steps of equal length. With ``order="entropy_bounded"`` it is the largest
            number of network calls, the last of which reveals all that is left, and may be left
            out.
        latent: ``"fresh"``, ``"shared"`` or ``"partial"``, see the module's text.
        refresh: probability that a row's latents are drawn anew at a step that reveals something
            in it; with ``latent="partial"`` only, by default 0.5. 1 is ``"fresh"``, 0 is
            ``"shared"``.
        order: ``"random"``, ``"confidence"``, ``"entropy"``, ``"entropy_bounded"``, or a function
            of your own, ``order(logits (B, D, K), batch) -> scores (B, D)``, highest first; see
            :mod:`vadd_pyro.orders`. Only ``"random"`` has the law that likelihoods speak of.
        entropy_bound: nats; with ``order="entropy_bounded"`` only, and needed there.
        remask: largest probability ``eta`` that a step masks a generated token again; needs the
            random order. Observed tokens of ``x_start`` stay.
        latent_temperature: factor on the spread of the latents, see :mod:`vadd_pyro.tempering`.
        time_grid: a grid of your own, ``(T + 1,)`` from 0 to 1.
        x_start: partly observed rows to complete, ``(N, D)`` or ``(D,)``, the mask id at open
            positions. The law of completions is the model's denoising conditional from
            ``t_start``; it is the conditional of the sampler's own joint law only if the learned
            conditionals agree with each other.
        t_start: time at which ``x_start`` enters the chain, a number or ``(N,)``; by default where
            ``alpha(t_start)`` is a row's observed share. The grid is shrunk to ``[0, t_start]``.
        seed: seed of this call; None draws on torch's global state.
        batch_size: rows per network call, at most; by default as many as are fast and fit in
            ``max_bytes``. The law does not depend on it, but the samples of a seed do.
        max_bytes: memory that a network call may take, about; by default 2 GiB, or no limit if
            ``batch_size`` is given.
        compile: compile the model's decoder (``torch.compile``, or the backend of that name)
            while it is sampled from. Takes up to minutes the first time.
        device: where to compute; by default the model's.
        args: further arguments of the program, the same for all rows.

    Returns:
        ``(num_samples, D)`` long, or ``(N * num_samples, D)``, completions of a row one after
        another.

    Raises:
        ValueError: for ``num_steps < 1``, an unknown ``latent`` or ``order``, arguments that
        contradict each other, bad tokens in ``x_start``, or a model without site ``"x_0"``.
    """
    share = _check_latent(latent, refresh)
    check_order(order, entropy_bound, remask)
    latents = Latents(share, check_temperature("latent_temperature", latent_temperature), {})
    check_size("num_samples", num_samples)
    check_batches(batch_size, max_bytes)
    bounded = isinstance(order, str) and order == "entropy_bounded"
    if bounded and (time_grid is not None or t_start is not None):
        name = "time_grid" if time_grid is not None else "t_start"
        raise ValueError(
            f"{name} must be left out with order='entropy_bounded', which takes the time from the "
            "share of visible tokens"
        )
    if bounded and num_steps is None:
        num_steps = process.length
    grid = make_time_grid(num_steps, time_grid)
    where = device_of(model) if device is None else torch.device(device)
    if x_start is None:
        if t_start is not None:
            raise ValueError("t_start is the time of x_start, which is missing")
        x = torch.full((num_samples, process.length), process.mask_id, device=where)
        grids = grid.to(where).unsqueeze(0)
    else:
        x, grids = start_state(process, x_start, t_start, grid, where)
        x = x.repeat_interleave(num_samples, 0)
        grids = grids.repeat_interleave(num_samples, 0)
    pieces = []
    with evaluation(model):
        size = rows_at_once(model, process, len(x), batch_size, max_bytes, where, args)
    with compiled(model, compile), seeded(seed), evaluation(model):
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            edges = grids if len(grids) == 1 else grids[part]
            rows = Rows(model, process, x[part], latents, args)
            plan = make_plan(process, order, entropy_bound, remask, rows.masked, edges)
            if plan is None:
                _reveal_random(rows, edges)
            else:
                _reveal_planned(rows, plan)
            pieces.append(rows.x)
    return torch.cat(pieces)


def _check_latent(latent: str, refresh: float | None) -> float:
    """The probability of a redraw that ``latent`` and ``refresh`` stand for."""
    if latent not in ("fresh", "shared", "partial"):
        raise ValueError(
            f"latent must be 'fresh' or 'shared', or 'partial' between them, got {latent!r}"
        )
    if latent != "partial":
        if refresh is not None:
            raise ValueError(f"refresh needs latent='partial', got latent={latent!r}")
        return 1.0 if latent == "fresh" else 0.0
    refresh = 0.5 if refresh is None else refresh
    if isinstance(refresh, bool) or not isinstance(refresh, int | float) or not 0 <= refresh <= 1:
        raise ValueError(f"refresh must be a probability in [0, 1], got {refresh!r}")
    return float(refresh)


def _reveal_random(rows: Rows, grids: Tensor) -> None:
    """The model's own sampler, each row at its own pace."""
    shape, device = tuple(rows.x.shape), rows.x.device
    times = grids.to(torch.get_default_dtype()).expand(len(rows.x), -1)
    if grids.shape[1] == 2:
        chosen = rows.masked.any(-1).nonzero().squeeze(-1)
        if len(chosen):
            rows.advance(chosen, times[chosen, 1], rows.masked.index_select(0, chosen))
        return
    # Short integers are faster to go through, step by step.
    kinds = {2**8: torch.uint8, 2**15: torch.int16}
    short = next((kind for most, kind in kinds.items() if grids.shape[1] <= most), torch.int32)
    grid = grids if len(grids) > 1 else grids[0]
    step = rows.process.reveal_steps(shape, grid, device, short)
    step *= rows.masked

    def take(chosen: Tensor, now: Tensor) -> None:
        """Take the rows through the step that each stands before."""
        if len(chosen) == len(step):
            target = step == now.unsqueeze(-1)
            step.mul_(~target)
        else:
            left = step.index_select(0, chosen)
            target = left == now.unsqueeze(-1)
            step.index_copy_(0, chosen, left.mul_(~target))
        rows.advance(chosen, times[chosen, now.long()], target)

    if rows.starting:
        everything = torch.arange(len(step), device=device)
        take(everything, torch.full((len(step),), times.shape[1] - 1, device=device))
    while True:
        current = step.amax(-1)
        chosen = current.nonzero().squeeze(-1)
        if len(chosen) == 0:
            return
        take(chosen, current.index_select(0, chosen))


def _reveal_planned(rows: Rows, plan: Plan) -> None:
    """Any other sampler: all rows step by step, those left out in which nothing happens."""
    for i in range(plan.num_steps, 0, -1):
        step = plan.step(i, rows.masked)
        visited = torch.ones_like(step.visited) if rows.starting else step.visited
        chosen = visited.nonzero().squeeze(-1)
        if len(chosen):
            pick = None if step.pick is None else step.pick(chosen)
            rows.advance(chosen, step.t[chosen], step.target[chosen], pick)
        if step.hidden is not None:
            rows.x = rows.x.masked_fill(step.hidden, rows.process.mask_id)
            rows.masked = rows.masked | step.hidden
