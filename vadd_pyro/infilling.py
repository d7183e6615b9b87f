r"""Infilling by the sampler's own joint law: sequential importance sampling over the whole chain.

Started from a partly visible row, a sampler completes it by the model's denoising conditional
(:func:`vadd_pyro.sample` with ``x_start``). That is the conditional :math:`p_T(x_{rest} \mid
x_{obs})` of the law which the sampler draws from all-masked rows only if the learned conditionals
agree with each other. Here the chain starts all masked; where it reveals an observed position it
writes what was observed, and pays for it,

.. math::
    w = \prod_{i=1}^T \prod_{j \in S_i \cap obs} \mu_j(x_{obs, j} \mid x_{t_i}, z_i, t_i), \qquad
    E[w] = p_T(x_{obs}),

over reveal paths :math:`S_1, \ldots, S_T`, fresh latents :math:`z_i` of the prior and tokens at
the open positions. Weighted by ``w`` they have the law :math:`p_T(x_{rest} \mid x_{obs})`. Rows
whose weights have become too uneven are drawn anew among their particles between steps (Del Moral
et al. 2006), which leaves the estimate of :math:`p_T(x_{obs})` unbiased.

References:
    Del Moral et al. 2006, "Sequential Monte Carlo samplers".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vadd_pyro.batching import check_batches, rows_at_once
from vadd_pyro.distributions import draw_categorical
from vadd_pyro.process import MaskedBatch, MaskingProcess, check_size, make_time_grid
from vadd_pyro.programs import evaluation
from vadd_pyro.recorder import Site, run
from vadd_pyro.sampling import device_of, seeded
from vadd_pyro.sites import data_plate, is_row_site
from vadd_pyro.stepping import Generator

__all__ = ["Infilling", "infill"]


class Infilling(NamedTuple):
    """Completions of rows by the sampler's joint law.

    Args:
        x: completed rows, ``(N, num_samples, D)`` long, drawn from the weighted particles.
        log_evidence: estimate of ``log p_T(x_obs)``, ``(N,)`` nats in double precision; the
            estimate of ``p_T(x_obs)`` is unbiased.
        effective_size: smallest effective number of particles met on the way, ``(N,)``; with few
            of them completions are alike, and more particles are needed.
    """

    x: Tensor
    log_evidence: Tensor
    effective_size: Tensor


def infill(
    model: Callable[..., Any],
    process: MaskingProcess,
    x_start: Tensor,
    num_steps: int | None = None,
    *,
    num_samples: int = 1,
    num_particles: int = 1024,
    resample_below: float = 0.5,
    time_grid: Tensor | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    max_bytes: int | None = None,
    args: tuple[Any, ...] = (),
) -> Infilling:
    """Complete partly observed rows by the conditional of the T-step sampler's joint law.

    Args:
        model: a step program without latents outside the data plate.
        process: its forward process.
        x_start: partly observed rows, ``(N, D)`` or ``(D,)``, the mask id at open positions.
        num_steps: ``T``, steps of equal length.
        num_samples: completions of each row.
        num_particles: weighted chains of each row, ``P``. The effort grows with the surprise of
            what was observed.
        resample_below: share of the particles; a row whose effective number falls below it is
            drawn anew. 0 never does.
        time_grid: a grid of your own, ``(T + 1,)``.
        seed: seed of this call; None draws on torch's global state.
        batch_size, max_bytes: chains per network call and memory that it may take, as in
            :func:`vadd_pyro.sample`.
        args: further arguments of the program, the same for all rows.

    Returns:
        :class:`Infilling`.

    Raises:
        ValueError: for bad tokens, sizes or a model without site ``"x_0"``.
    """
    check_size("num_samples", num_samples)
    check_size("num_particles", num_particles, least=2)
    check_batches(batch_size, max_bytes)
    if not 0 <= resample_below <= 1:
        raise ValueError(f"resample_below must be a share in [0, 1], got {resample_below!r}")
    grid = make_time_grid(num_steps, time_grid)
    x_start = torch.as_tensor(x_start)
    rows = x_start.unsqueeze(0) if x_start.dim() == 1 else x_start
    given = process.check_tokens(rows, "x_start", masks=True).to(device_of(model))
    number = len(given) * num_particles
    with evaluation(model):
        size = rows_at_once(model, process, number, batch_size, max_bytes, given.device, args)
    with seeded(seed), evaluation(model):
        chains = _Chains(model, process, given, num_particles, size, args)
        for step in range(len(grid) - 1, 0, -1):
            chains.advance(grid, step)
            chains.resample(resample_below)
        return chains.completions(num_samples)


class _Filler(Generator):
    """Draws tokens at open positions, and writes and pays for those that were observed.

    Args:
        batch, vocab_size: as for any generator.
        given: the rows with what was observed, ``(B, D)``.
    """

    def __init__(self, batch: MaskedBatch, vocab_size: int, given: Tensor) -> None:
        super().__init__(batch, vocab_size)
        self.given = given
        self.paid = torch.zeros(len(batch), dtype=torch.double, device=given.device)

    def tokens_from(self, logits: Tensor, index: Tensor | None) -> Tensor:
        """Tokens ``(n,)`` of chosen positions."""
        tokens = self.given.reshape(-1)
        row = torch.arange(len(tokens), device=tokens.device) if index is None else index
        row = row.div(self.given.shape[1], rounding_mode="floor")
        tokens = tokens.clone() if index is None else tokens.index_select(0, index)
        is_open = tokens == self.vocab_size
        seen = tokens[~is_open]
        log_mu = logits[~is_open].double().log_softmax(-1)
        self.paid.index_add_(0, row[~is_open], log_mu.gather(-1, seen.unsqueeze(-1)).squeeze(-1))
        tokens[is_open] = draw_categorical(logits[is_open])
        return tokens


class _Chains:
    """``P`` weighted chains of each of ``N`` rows, side by side."""

    def __init__(
        self,
        model: Callable[..., Any],
        process: MaskingProcess,
        given: Tensor,
        num_particles: int,
        batch_size: int,
        args: tuple[Any, ...],
    ) -> None:
        self.model, self.process, self.args = model, process, args
        self.num_rows, self.num_particles, self.batch_size = len(given), num_particles, batch_size
        self.given = given.repeat_interleave(num_particles, 0)
        self.x = torch.full_like(self.given, process.mask_id)
        shape = (self.num_rows, num_particles)
        self.log_weight = torch.zeros(shape, dtype=torch.double, device=given.device)
        self.log_evidence = torch.zeros(len(given), dtype=torch.double, device=given.device)
        self.least = torch.full_like(self.log_evidence, float(num_particles))

    def advance(self, grid: Tensor, step: int) -> None:
        """Take all chains from ``t_step`` to ``t_{step-1}``."""
        schedule = self.process.schedule
        masked = self.x == self.process.mask_id
        rho = float(schedule.rho(grid[step - 1], grid[step]))
        target = masked & (torch.rand(self.x.shape, device=self.x.device) < rho)
        if step == 1:
            target = masked
        moving = target.any(-1).nonzero().squeeze(-1)
        if len(moving) == 0:  # nothing is revealed in any chain
            return
        log_weight = self.log_weight.view(-1)
        for rows in moving.split(self.batch_size):
            t = torch.full((len(rows),), float(grid[step]), device=self.x.device)
            batch = MaskedBatch(self.x[rows], t, masked[rows], target[rows])
            filler = _Filler(batch, self.process.vocab_size, self.given[rows])
            self._check(run(self.model, filler, batch, *self.args).sites, batch)
            log_weight[rows] += filler.paid
            self.x[rows] = filler.x

    def _check(self, sites: dict[str, Site], batch: MaskedBatch) -> None:
        """Check that a program's latents belong to rows."""
        if "x_0" not in sites:
            raise ValueError(f"the model has no site 'x_0'; it has {sorted(sites)}")
        plate = data_plate(sites["x_0"])
        for name, site in sites.items():
            if not site.observed and not is_row_site(site, plate, len(batch)):
                raise ValueError(
                    f"the latent {name!r} stands outside the data plate: the chains of a row "
                    "would share it; condition it"
                )

    def _effective(self) -> Tensor:
        """Effective number of each row's particles, ``(N,)``."""
        weight = self.log_weight - self.log_weight.amax(1, keepdim=True).clamp_min(-1e300)
        weight = weight.exp()
        return weight.sum(1).square() / weight.square().sum(1).clamp_min(1e-300)

    def resample(self, below: float) -> None:
        """Draw rows with uneven weights anew among their particles (systematic resampling)."""
        effective = self._effective()
        self.least = torch.minimum(self.least, effective)
        rows = (effective < below * self.num_particles).nonzero().squeeze(-1)
        if len(rows) == 0:
            return
        log_weight = self.log_weight[rows]
        total = log_weight.logsumexp(1)
        alive = total > -math.inf
        rows, log_weight, total = rows[alive], log_weight[alive], total[alive]
        self.log_evidence[rows] += total - math.log(self.num_particles)
        share = (log_weight - total.unsqueeze(1)).exp().cumsum(1)
        number = torch.arange(self.num_particles, device=rows.device)
        u = torch.rand(len(rows), 1, dtype=torch.double, device=rows.device)
        points = (number + u) / self.num_particles * share[:, -1:]
        chosen = torch.searchsorted(share, points).clamp_max(self.num_particles - 1)
        source = (rows.unsqueeze(1) * self.num_particles + chosen).flatten()
        place = (rows.unsqueeze(1) * self.num_particles + number).flatten()
        self.x[place] = self.x[source]
        self.log_weight[rows] = 0.0

    def completions(self, num_samples: int) -> Infilling:
        """Rows drawn from the weighted particles."""
        total = self.log_weight.logsumexp(1)
        if bool((total == -math.inf).any()):
            row = int((total == -math.inf).nonzero()[0])
            raise ValueError(
                f"row {row} of x_start got no weight from any of {self.num_particles} particles: "
                "the model gives its tokens no probability, or num_particles is too small"
            )
        evidence = self.log_evidence + total - math.log(self.num_particles)
        share = (self.log_weight - total.unsqueeze(1)).exp().cumsum(1)
        u = torch.rand(self.num_rows, num_samples, dtype=torch.double, device=share.device)
        chosen = torch.searchsorted(share, u * share[:, -1:], right=True)
        chosen = chosen.clamp_max(self.num_particles - 1)
        x = self.x.view(self.num_rows, self.num_particles, -1)
        index = chosen.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return Infilling(x.gather(1, index), evidence, self.least)
