r"""Time grids that make the most of few steps.

The T-step bound is a sum over the steps of a grid of terms that depend on the two ends of the step
alone,

.. math::
    c(s, t) = E_{x_t, S}\, E \log \frac1P \sum_{p=1}^P \frac{p(z_p \mid x_t) \prod_{j \in S}
    \mu_j(x_{0,j} \mid x_t, z_p)}{r(z_p)}, \qquad \text{bound} = \sum_{i=1}^T c(t_{i-1}, t_i),

with ``S`` the positions that a step from ``t`` to ``s`` reveals. So, among all grids whose points
lie on a finer one, the best is a path of ``T`` edges from 1 to 0 and dynamic programming finds it
(Watson et al. 2021).

The terms of all pairs are estimated from the same random reveal paths: each token is given the
step of the fine grid in which it is revealed, which says for every pair what is masked at ``t``
and revealed by ``s``. Pairs with the same ``t`` and, in a row, the same ``S`` share one network
call, and those that reveal nothing need none, so that ``N`` candidates and ``D`` positions cost at
most ``N min(N, D)`` rows of network input for each row of data, times the particles; from times
without latent, where ``c(s, t)`` is ``rho(s, t)`` times the score of all that is masked, one row
each.

References:
    Watson et al. 2021, "Learning to Efficiently Sample from Diffusion Probabilistic Models" (arXiv
    2106.03802).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vadd_pyro.process import MaskedBatch, MaskingProcess, check_size, make_time_grid
from vadd_pyro.programs import evaluation
from vadd_pyro.sampling import device_of, seeded
from vadd_pyro.scoring import StepScores

__all__ = ["best_path", "candidate_times", "optimize_time_grid", "step_terms"]


def optimize_time_grid(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    process: MaskingProcess,
    x_0: Tensor,
    num_steps: int,
    *,
    num_candidates: int = 32,
    num_particles: int = 16,
    num_draws: int = 1,
    seed: int | None = None,
    batch_size: int | None = None,
    args: tuple[Any, ...] = (),
) -> Tensor:
    """The grid of ``T`` steps with the highest T-step bound on some data.

    Its points are chosen among ``num_candidates`` equal intervals and the points of the equal grid
    of ``T`` steps, so that on the draws used here it is never worse than that one. The maximum of
    noisy sums flatters itself: report the bound on other rows, by
    :func:`~vadd_pyro.log_likelihood_bound` with ``time_grid``.

    Args:
        model, guide: a step program and its guide. A guide that has seen the targets of the DELBO
            alone gives loose terms wherever a step reveals but a part, and so a grid that suits
            the guide rather than the sampler: train on, or refit it to, ``objective="chain"`` at
            several ``num_steps`` first.
        process: their forward process.
        x_0: clean tokens, ``(B, D)``; some hundred rows.
        num_steps: ``T``.
        num_candidates: intervals of the fine grid, on which the cost depends as said above.
        num_particles: importance samples per term; not used where nothing is inferred.
        num_draws: random reveal paths of each row.
        seed: seed of this call; None draws on torch's global state.
        batch_size: rows per network call; by default so that the logits take about 8 MB.
        args: further arguments of the programs, the same for all rows.

    Returns:
        ``(T + 1,)`` in double precision, increasing from 0 to 1: a ``time_grid``.

    Raises:
        ValueError: for sizes below 1, bad tokens, or models that have no T-step bound.
    """
    candidates = candidate_times(num_steps, num_candidates)
    terms = step_terms(
        model,
        guide,
        process,
        x_0,
        candidates,
        num_particles=num_particles,
        num_draws=num_draws,
        seed=seed,
        batch_size=batch_size,
        args=args,
    )
    return candidates[best_path(terms, num_steps)]


def candidate_times(num_steps: int, num_candidates: int) -> Tensor:
    """The points of an equal grid of ``num_candidates`` steps and of one of ``num_steps``, each
    once, increasing, in double precision.

    Raises:
        ValueError: for sizes below 1.
    """
    check_size("num_candidates", num_candidates)
    equal = make_time_grid(num_steps)
    fine = make_time_grid(num_candidates)
    apart = (equal.unsqueeze(-1) - fine).abs().amin(-1) > 1e-9
    return torch.cat([fine, equal[apart]]).sort().values


def step_terms(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    process: MaskingProcess,
    x_0: Tensor,
    candidates: Tensor,
    *,
    num_particles: int = 16,
    num_draws: int = 1,
    seed: int | None = None,
    batch_size: int | None = None,
    args: tuple[Any, ...] = (),
) -> Tensor:
    """What every step between two of the candidate times adds to the bound.

    Args:
        candidates: times from 0 to 1, increasing, ``(N + 1,)``.

    The others are those of :func:`optimize_time_grid`.

    Returns:
        ``(N + 1, N + 1)`` in double precision, nats per row: entry ``[i, j]`` is ``c(t_i, t_j)``
        for ``i < j``, minus infinity elsewhere.
    """
    candidates = make_time_grid(None, candidates)
    check_size("num_draws", num_draws)
    check_size("num_particles", num_particles)
    x_0 = process.check_tokens(x_0).to(device_of(model, x_0.device))
    with seeded(seed), evaluation(model, guide):
        scores = StepScores(
            model,
            guide,
            process,
            x_0,
            candidates,
            num_particles=num_particles,
            batch_size=batch_size,
            args=args,
        )
        total = torch.zeros(len(candidates), len(candidates), dtype=torch.double)
        for _ in range(num_draws):
            paths = process.reveal_steps(tuple(x_0.shape), candidates, x_0.device)
            for j in range(1, len(candidates)):
                terms = _terms_from if scores.has_latent[j] else _factorised
                total[:j, j] += terms(process, x_0, paths, candidates, j, scores)
    above = torch.ones_like(total, dtype=torch.bool).triu(1)
    return (total / num_draws).masked_fill(~above, -torch.inf)


def _terms_from(
    process: MaskingProcess,
    x_0: Tensor,
    paths: Tensor,
    grid: Tensor,
    j: int,
    scores: StepScores,
) -> Tensor:
    """Terms of the steps from ``t_j`` to each earlier time, ``(j,)``.

    In a row the targets of a step to ``t_i`` change only where a token is revealed, so each row is
    scored once for every step in which that happens.
    """
    present = torch.zeros(len(x_0), len(grid), dtype=torch.bool, device=x_0.device)
    present.scatter_(1, paths, True)
    rows, last = present[:, : j + 1].nonzero(as_tuple=True)
    values = torch.zeros(present.shape, dtype=torch.double, device=x_0.device)
    if len(rows):
        batch = process.step_batch(x_0[rows], paths[rows], j, grid)
        target = batch.masked & (paths[rows] >= last.unsqueeze(-1))
        part = MaskedBatch(batch.x_t, batch.t, batch.masked, target, batch.x_0)
        values[rows, last] = scores(part, has_latent=True)
    terms = []
    current = torch.zeros_like(values[:, 0])
    for i in range(j - 1, -1, -1):
        current = torch.where(present[:, i + 1], values[:, i + 1], current)
        terms.append(current.mean())
    return torch.stack(terms[::-1]).cpu()


def _factorised(
    process: MaskingProcess,
    x_0: Tensor,
    paths: Tensor,
    grid: Tensor,
    j: int,
    scores: StepScores,
) -> Tensor:
    """The same without latent, averaged over what is revealed of all that is masked."""
    batch = process.step_batch(x_0, paths, j, grid)
    whole = MaskedBatch(batch.x_t, batch.t, batch.masked, batch.masked, batch.x_0)
    return process.schedule.rho(grid[:j], grid[j]) * scores(whole, has_latent=False).mean().cpu()


def best_path(terms: Tensor, num_steps: int) -> Tensor:
    """The ``T`` steps from the last candidate to the first whose terms have the highest sum.

    Args:
        terms: ``(N + 1, N + 1)``, from :func:`step_terms`.
        num_steps: ``T``, at most ``N``.

    Returns:
        Indices of the points, ``(T + 1,)`` long, increasing from 0 to ``N``.
    """
    check_size("num_steps", num_steps)
    if terms.dim() != 2 or terms.shape[0] != terms.shape[1]:
        raise ValueError(f"terms must have shape (N + 1, N + 1), got {tuple(terms.shape)}")
    if num_steps > len(terms) - 1:
        raise ValueError(
            f"num_steps is {num_steps}, but {len(terms)} candidates allow {len(terms) - 1} steps"
        )
    value = torch.full_like(terms[0], -torch.inf)
    value[0] = 0.0
    came_from = []
    for _ in range(num_steps):
        value, choice = (value.unsqueeze(-1) + terms).max(0)
        came_from.append(choice)
    path = [len(terms) - 1]
    for choice in reversed(came_from):
        path.append(int(choice[path[-1]]))
    return torch.tensor(path[::-1])
