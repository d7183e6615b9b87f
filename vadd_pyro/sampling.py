r"""Ancestral sampling from a step program.

One reverse step draws ``x_0' ~ p(x_0 | x_t)`` from the program and keeps each masked token with
probability ``rho(s, t)``, since :math:`p(x_s \mid x_t) = \sum_{x_0'} p(x_0' \mid x_t)\, q(x_s \mid
x_t, x_0')`. Which tokens a step reveals does not depend on their values, so the reveal step of
every token is drawn beforehand, and each row is carried from one step that reveals something in it
to the next: a row takes at most ``min(T, D)`` network calls, and steps that reveal nothing cost
none. The law is the same.

With ``latent="fresh"`` every step draws its latent from the prior, as the model defines.
``latent="shared"`` draws it once, at the first step, and keeps it: another distribution, whose
single samples may look better while their distribution is worse. Judge it by a distance between
distributions, never by accuracy alone.

References:
    Xie et al. 2025 (arXiv 2505.17384), section 3.4; SPEC section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vadd_pyro.distributions import check_vocabulary, draw_categorical, token_logits
from vadd_pyro.process import MaskedBatch, MaskingProcess, check_size, make_time_grid
from vadd_pyro.programs import evaluation, modules_of
from vadd_pyro.recorder import Recorder, Site
from vadd_pyro.sites import data_plate, is_row_site

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


class _Generator(Recorder):
    """Runs a program forward and draws its tokens only where they are wanted."""

    def __init__(
        self, wanted: Tensor, vocab_size: int, replay: dict[str, Tensor] | None = None
    ) -> None:
        super().__init__(replay)
        self.wanted = wanted
        self.vocab_size = vocab_size
        self.tokens: Tensor | None = None

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and msg["name"] == "x_0":
            if msg["value"] is None and not msg["done"]:
                msg["value"] = self._draw(token_logits(msg["fn"]))
                msg["done"] = True
            self.tokens = msg["value"]
        else:
            super()._process_message(msg)

    def _draw(self, logits: Tensor) -> Tensor:
        """Tokens ``(B, D)``; where few are wanted, only those are drawn."""
        wanted = self.wanted
        check_vocabulary(logits, self.vocab_size)
        logits = logits.expand(wanted.shape + logits.shape[-1:])
        if 2 * int(wanted.sum()) > wanted.numel():
            return draw_categorical(logits)
        tokens = torch.zeros(wanted.shape, dtype=torch.long, device=wanted.device)
        tokens[wanted] = draw_categorical(logits[wanted])
        return tokens


def _generate(
    model: Callable[..., Any],
    batch: MaskedBatch,
    vocab_size: int,
    replay: dict[str, Tensor],
    args: tuple[Any, ...],
) -> tuple[Tensor, dict[str, Site], dict[str, Tensor]]:
    """Tokens at the batch's target positions, latent sites of the rows, and shared values."""
    with _Generator(batch.target, vocab_size, replay) as generator:
        model(batch, *args)
    if generator.tokens is None:
        raise ValueError(
            "the model has no site 'x_0' to generate tokens with; it has "
            f"{sorted(generator.sites)}"
        )
    plate = data_plate(generator.sites["x_0"])
    latents = {n: s for n, s in generator.sites.items() if n != "x_0" and not s.observed}
    per_row = {n: is_row_site(s, plate, len(batch)) for n, s in latents.items()}
    rows = {n: s for n, s in latents.items() if per_row[n]}
    shared = {n: s.value for n, s in latents.items() if not per_row[n]}
    return generator.tokens, rows, shared


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
    time_grid: Tensor | None = None,
    x_start: Tensor | None = None,
    t_start: Tensor | float | None = None,
    seed: int | None = None,
    batch_size: int = 16384,
    device: torch.device | str | None = None,
    args: tuple[Any, ...] = (),
) -> Tensor:
    """Draw rows of tokens with a T-step sampler.

    Args:
        model: a step program.
        process: its forward process.
        num_samples: how many rows; with ``x_start``, how many completions of each of its rows.
        num_steps: ``T``, steps of equal length.
        latent: ``"fresh"`` or ``"shared"``, see the module's text.
        time_grid: a grid of your own, ``(T + 1,)`` from 0 to 1.
        x_start: partly observed rows to complete, ``(N, D)`` or ``(D,)``, the mask id at open
            positions. The law of completions is the model's denoising conditional from
            ``t_start``; it is the conditional of the sampler's own joint law only if the learned
            conditionals agree with each other.
        t_start: time at which ``x_start`` enters the chain, a number or ``(N,)``; by default where
            ``alpha(t_start)`` is a row's observed share. The grid is shrunk to ``[0, t_start]``.
        seed: seed of this call; None draws on torch's global state.
        batch_size: rows per network call.
        device: where to compute; by default the model's.
        args: further arguments of the program, the same for all rows.

    Returns:
        ``(num_samples, D)`` long, or ``(N * num_samples, D)``, completions of a row one after
        another.

    Raises:
        ValueError: for ``num_steps < 1``, an unknown ``latent``, bad tokens in ``x_start``, or a
        model without site ``"x_0"``.
    """
    if latent not in ("fresh", "shared"):
        raise ValueError(f"latent must be 'fresh' or 'shared', got {latent!r}")
    check_size("num_samples", num_samples)
    check_size("batch_size", batch_size)
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
    pieces, shared_values = [], dict[str, Tensor]()
    with seeded(seed), evaluation(model):
        for start in range(0, len(x), batch_size):
            rows = slice(start, start + batch_size)
            piece_grid = grids if len(grids) == 1 else grids[rows]
            pieces.append(
                _sample_rows(model, process, x[rows], piece_grid, latent, shared_values, args)
            )
    return torch.cat(pieces)


def _sample_rows(
    model: Callable[..., Any],
    process: MaskingProcess,
    x: Tensor,
    grids: Tensor,
    latent: str,
    global_values: dict[str, Tensor],
    args: tuple[Any, ...],
) -> Tensor:
    """One chunk of rows.

    Latents outside the data plate are drawn once for all and kept in ``global_values``.
    """
    x = x.clone()
    masked = x == process.mask_id
    edges = grids if len(grids) > 1 else grids[0]
    step = process.reveal_steps(tuple(x.shape), edges, x.device).masked_fill(~masked, 0)
    times = grids.to(torch.get_default_dtype()).expand(len(x), -1)
    kept: dict[str, tuple[Tensor, int]] = {}  # shared latents, and the dimension of their rows

    def advance(rows: Tensor, now: Tensor) -> dict[str, Site]:
        """Take the rows through the step that each stands before."""
        target = step[rows] == now.unsqueeze(-1)
        replay = {name: value.index_select(dim, rows) for name, (value, dim) in kept.items()}
        batch = MaskedBatch(x[rows], times[rows, now], masked[rows], target)
        tokens, latents, shared = _generate(
            model, batch, process.vocab_size, {**global_values, **replay}, args
        )
        for name, value in shared.items():
            global_values.setdefault(name, value)
        x[rows] = torch.where(target, tokens, x[rows])
        masked[rows] &= ~target
        step[rows] = step[rows].masked_fill(target, 0)
        return latents

    if latent == "shared" and masked.any():
        # Drawn where the chain starts, even in rows in which the first step reveals nothing.
        everything = torch.arange(len(x), device=x.device)
        first = torch.full_like(everything, times.shape[1] - 1)
        latents = advance(everything, first)
        kept = {name: (s.value, -1 - s.fn.event_dim) for name, s in latents.items()}
    while True:
        current = step.amax(-1)
        rows = current.nonzero().squeeze(-1)
        if len(rows) == 0:
            return x
        advance(rows, current[rows])
