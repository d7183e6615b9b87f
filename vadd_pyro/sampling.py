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
    Xie et al. 2025 (arXiv 2505.17384), section 3.4; SPEC section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vadd_pyro.distributions import check_vocabulary, draw_categorical, token_logits
from vadd_pyro.orders import Order, Pick, Plan, check_order, make_plan
from vadd_pyro.process import MaskedBatch, MaskingProcess, check_size, make_time_grid
from vadd_pyro.programs import evaluation, modules_of
from vadd_pyro.recorder import Recorder, Site
from vadd_pyro.sites import data_plate, is_row_site
from vadd_pyro.tempering import Tempering, check_temperature

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
    """Runs a program forward and draws its tokens only where they are wanted.

    Args:
        batch: what the program is run on; its targets are wanted, unless ``pick`` says otherwise.
        vocab_size: ``K``.
        replay: values of latents drawn before.
        redraw: rows that draw their latents anew, ``(B,)`` bool, and the names of those; None
            keeps what ``replay`` has.
        pick: chooses the positions to reveal once the logits are known.
    """

    def __init__(
        self,
        batch: MaskedBatch,
        vocab_size: int,
        replay: dict[str, Tensor],
        redraw: tuple[Tensor, set[str]] | None,
        pick: Pick | None,
    ) -> None:
        super().__init__(replay)
        self.batch = batch
        self.wanted = batch.target
        self.vocab_size = vocab_size
        self.redraw = redraw
        self.pick = pick
        self.tokens: Tensor | None = None

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and msg["name"] == "x_0":
            if msg["value"] is None and not msg["done"]:
                msg["value"] = self._draw(token_logits(msg["fn"]))
                msg["done"] = True
            self.tokens = msg["value"]
            return
        super()._process_message(msg)
        if self.redraw is not None and msg["type"] == "sample" and not msg["is_observed"]:
            rows, names = self.redraw
            if msg["name"] in names:
                where = rows.reshape((-1,) + (1,) * len(msg["fn"].event_shape))
                msg["value"] = torch.where(where, msg["fn"](), msg["value"])

    def _draw(self, logits: Tensor) -> Tensor:
        """Tokens ``(B, D)``; where few are wanted, only those are drawn."""
        check_vocabulary(logits, self.vocab_size)
        logits = logits.expand(self.wanted.shape + logits.shape[-1:])
        if self.pick is not None:
            drawn, self.wanted = self.pick(logits, self.batch)
            if drawn is not None:
                return drawn
        wanted = self.wanted
        if 2 * int(wanted.sum()) > wanted.numel():
            return draw_categorical(logits)
        tokens = torch.zeros(wanted.shape, dtype=torch.long, device=wanted.device)
        tokens[wanted] = draw_categorical(logits[wanted])
        return tokens


class _Latents(NamedTuple):
    """What becomes of latents from step to step.

    Args:
        refresh: probability that a row draws its latents anew; 1 is fresh, 0 shared.
        temperature: of the latents' distributions.
        common: values of latents outside the data plate, drawn once for all.
    """

    refresh: float
    temperature: float
    common: dict[str, Tensor]


class _Rows:
    """A chunk of rows on its way from masks to tokens, with the latents that it keeps.

    Args:
        model: a step program.
        process: its forward process.
        x: rows, ``(B, D)``, as they start.
        latents: see :class:`_Latents`.
        args: further arguments of the program.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        process: MaskingProcess,
        x: Tensor,
        latents: _Latents,
        args: tuple[Any, ...],
    ) -> None:
        self.model = model
        self.process = process
        self.x = x.clone()
        self.masked = x == process.mask_id
        self.latents = latents
        self.args = args
        self.kept: dict[str, tuple[Tensor, int]] = {}  # values, and the dimension of their rows
        # Drawn where the chain starts, even in rows in which the first step reveals nothing.
        self.starting = latents.refresh < 1 and bool(self.masked.any())

    def advance(self, rows: Tensor, t: Tensor, target: Tensor, pick: Pick | None = None) -> None:
        """Take some rows through one step.

        Args:
            rows: which, an index tensor ``(n,)``.
            t: their times, ``(n,)``.
            target: positions to reveal, ``(n, D)`` bool; with ``pick``, those it may choose from.
            pick: chooses positions once the logits are known.
        """
        replay = {name: value.index_select(dim, rows) for name, (value, dim) in self.kept.items()}
        redraw = None
        if replay and self.latents.refresh > 0:
            chosen = torch.rand(len(rows), device=rows.device) < self.latents.refresh
            redraw = (chosen, set(replay))
        batch = MaskedBatch(self.x[rows], t, self.masked[rows], target)
        temperature = self.latents.temperature
        generator = _Generator(
            batch, self.process.vocab_size, {**self.latents.common, **replay}, redraw, pick
        )
        with generator, nullcontext() if temperature == 1 else Tempering(temperature):
            self.model(batch, *self.args)
        if generator.tokens is None:
            raise ValueError(
                "the model has no site 'x_0' to generate tokens with; it has "
                f"{sorted(generator.sites)}"
            )
        self._keep(generator.sites, rows, redraw is not None)
        self.x[rows] = torch.where(generator.wanted, generator.tokens, batch.x_t)
        self.masked[rows] = batch.masked & ~generator.wanted

    def _keep(self, sites: dict[str, Site], rows: Tensor, redrawn: bool) -> None:
        """Hold on to the values of latents that later steps use again."""
        plate = data_plate(sites["x_0"])
        for name, site in sites.items():
            if name == "x_0" or site.observed:
                continue
            if not is_row_site(site, plate, len(rows)):
                self.latents.common.setdefault(name, site.value)
            elif redrawn and name in self.kept:
                value, dim = self.kept[name]
                value.index_copy_(dim, rows, site.value)
            elif self.starting:
                self.kept[name] = (site.value.clone(), -1 - site.fn.event_dim)
        self.starting = False


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
    batch_size: int = 16384,
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
        batch_size: rows per network call.
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
    latents = _Latents(share, check_temperature("latent_temperature", latent_temperature), {})
    check_size("num_samples", num_samples)
    check_size("batch_size", batch_size)
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
    with seeded(seed), evaluation(model):
        for start in range(0, len(x), batch_size):
            part = slice(start, start + batch_size)
            edges = grids if len(grids) == 1 else grids[part]
            rows = _Rows(model, process, x[part], latents, args)
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


def _reveal_random(rows: _Rows, grids: Tensor) -> None:
    """The model's own sampler, each row at its own pace."""
    x = rows.x
    edges = grids if len(grids) > 1 else grids[0]
    step = rows.process.reveal_steps(tuple(x.shape), edges, x.device)
    step = step.masked_fill(~rows.masked, 0)
    times = grids.to(torch.get_default_dtype()).expand(len(x), -1)

    def take(chosen: Tensor, now: Tensor) -> None:
        """Take the rows through the step that each stands before."""
        target = step[chosen] == now.unsqueeze(-1)
        rows.advance(chosen, times[chosen, now], target)
        step[chosen] = step[chosen].masked_fill(target, 0)

    if rows.starting:
        everything = torch.arange(len(x), device=x.device)
        take(everything, torch.full_like(everything, times.shape[1] - 1))
    while True:
        current = step.amax(-1)
        chosen = current.nonzero().squeeze(-1)
        if len(chosen) == 0:
            return
        take(chosen, current[chosen])


def _reveal_planned(rows: _Rows, plan: Plan) -> None:
    """Any other sampler: all rows step by step, those left out in which nothing happens."""
    for i in range(plan.num_steps, 0, -1):
        step = plan.step(i, rows.masked)
        visited = torch.ones_like(step.visited) if rows.starting else step.visited
        chosen = visited.nonzero().squeeze(-1)
        if len(chosen):
            pick = None if step.pick is None else step.pick(chosen)
            rows.advance(chosen, step.t[chosen], step.target[chosen], pick)
        if step.hidden is not None:
            rows.x.masked_fill_(step.hidden, rows.process.mask_id)
            rows.masked |= step.hidden
