r"""How likely the data are under the sampler that is used: the T-step bound, and the exact law on
small spaces.

The bound (docs/likelihoods.md) averages, over random reveal paths and latent draws,

.. math::
    \log p_T(x_0) \ge \sum_{i=1}^T E_{x_{t_i}, S_i}\, E \log \frac1P \sum_{p=1}^P
    \frac{p(z_p \mid x_{t_i}) \prod_{j \in S_i} \mu_j(x_{0,j} \mid x_{t_i}, z_p)}{r(z_p)}, \qquad
    z_p \sim r .

It holds in expectation: single draws, and so single rows, may exceed ``log p_T``. As ``P`` grows
it tends to the path-wise value :math:`\sum_i E \log p(x_{S_i} \mid x_{t_i})`, which for ``T > 1``
stays below ``log p_T`` (Jensen over reveal paths; equal at ``T = 1``). All of it speaks of fresh
latents, random reveal order and the same time grid.

**Several paths.** What a step reveals does not depend on values, so ``p_T`` is a mean over paths,

.. math::
    p_T(x_0) = E_{S_1, \dots, S_T} \prod_{i : S_i \ne \emptyset} p(x_{S_i} \mid x_{t_i}) ,

and so is, with the average over particles of each step in place of ``p``, what is drawn: the
particles of different steps are independent, and the mean of a product is that of its factors'
means. An average over ``M`` such draws inside the logarithm is therefore a bound too, and tends
to ``log p_T`` itself as ``M`` grows, however few the particles,

.. math::
    \log p_T(x_0) \ge E \log \frac1M \sum_{m=1}^M \prod_i \hat p_{m, i} .

It lies below by some half of the relative variance of one path's product, over ``M``, where that
is small. With ``M`` fixed the variance grows with ``T`` and the number of tokens.

References:
    Burda et al. 2016 (arXiv 1509.00519) for the average inside the logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vadd_pyro.process import MaskingProcess, check_size, make_time_grid
from vadd_pyro.programs import evaluation
from vadd_pyro.sampling import device_of, seeded
from vadd_pyro.scoring import StepScores

__all__ = ["Bound", "average_paths", "log_likelihood_bound"]


class Bound(NamedTuple):
    """A lower bound on a log-likelihood for each row.

    Args:
        value: mean over draws, ``(B,)`` nats.
        stderr: standard error of that mean over draws, ``(B,)`` nats.
    """

    value: Tensor
    stderr: Tensor

    def mean(self) -> tuple[float, float]:
        """Mean over rows and its standard error, which covers both the draws and the choice of
        rows.
        """
        error = (
            self.value.std() / len(self.value) ** 0.5 if len(self.value) > 1 else self.stderr[0]
        )
        return float(self.value.mean()), float(error)


def log_likelihood_bound(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    process: MaskingProcess,
    x_0: Tensor,
    num_steps: int | None = None,
    *,
    num_particles: int = 64,
    num_draws: int = 8,
    num_paths: int = 1,
    time_grid: Tensor | None = None,
    vectorize_particles: bool = True,
    seed: int | None = None,
    batch_size: int | None = None,
    args: tuple[Any, ...] = (),
) -> Bound:
    """The T-step bound on ``log p_T(x_0)``, in nats per row.

    Each draw takes a whole random reveal path through the grid, or several, and scores every step
    that reveals something.

    Args:
        model, guide: a step program and its guide, which should have been trained with targets
            that the sampler meets (``objective="chain"``): one trained by the DELBO alone gives a
            valid but loose bound for ``T > 1``.
        process: their forward process.
        x_0: clean tokens, ``(B, D)``.
        num_steps: ``T``.
        num_particles: importance samples ``P`` per step; more is tighter. Not used where every
            latent is summed out, nor in steps without one (``least_time``).
        num_draws: independent draws of paths and latents, at least 2 for a standard error.
        num_paths: paths ``M`` of each draw, averaged inside the logarithm. With 1 the bound is the
            path-wise one; more are tighter, at so many times the work, and close the gap to
            ``log p_T``.
        time_grid: a grid of your own, ``(T + 1,)``.
        vectorize_particles: particles along a dimension of their own; False needs
            ``num_particles=1``.
        seed: seed of this call; None draws on torch's global state.
        batch_size: (row, step) pairs per network call; by default so that the logits take about 8
            MB.
        args: further arguments of the programs, the same for all rows.

    Returns:
        :class:`Bound`, a pair ``(value, stderr)`` of ``(B,)`` tensors.

    Raises:
        ValueError: for sizes below 1, bad tokens, or models that have no T-step bound.
    """
    x_0 = process.check_tokens(x_0).to(device_of(model, x_0.device))
    grid = make_time_grid(num_steps, time_grid)
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")
    check_size("num_paths", num_paths)
    with seeded(seed), evaluation(model, guide):
        scores = StepScores(
            model,
            guide,
            process,
            x_0,
            grid,
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            exponentiated=num_paths > 1,
            batch_size=batch_size,
            args=args,
        )

    def path(rows: Tensor) -> Tensor:
        steps = process.reveal_steps(tuple(rows.shape), grid, rows.device)
        revealing = torch.zeros(len(rows), len(grid), dtype=torch.bool, device=rows.device)
        revealing.scatter_(1, steps, True)
        row, step = revealing.nonzero(as_tuple=True)
        return scores.along(rows, steps, row, step)

    most = min(len(grid) - 1, process.length)
    with seeded(seed), evaluation(model, guide):
        return average_paths(
            path, x_0, num_draws, num_paths, together=scores.batch_size // (len(x_0) * most)
        )


def average_paths(
    path: Callable[[Tensor], Tensor],
    x_0: Tensor,
    num_draws: int,
    num_paths: int = 1,
    *,
    together: int = 1,
) -> Bound:
    """A bound from draws of paths, averaged inside the logarithm where a draw has several.

    Args:
        path: for rows ``(N, D)``, the logarithm of an estimate of each row's probability along a
            path drawn for it, ``(N,)`` in double precision.
        x_0: the rows, ``(B, D)``.
        num_draws: independent draws.
        num_paths: paths of each.
        together: how many paths of a draw to score at once.
    """
    draws = []
    for _ in range(num_draws):
        paths = []
        for start in range(0, num_paths, max(1, together)):
            copies = min(max(1, together), num_paths - start)
            paths.append(path(x_0.repeat(copies, 1)).unflatten(0, (copies, len(x_0))))
        draws.append(torch.cat(paths).logsumexp(0) - math.log(num_paths))
    values = torch.stack(draws)
    mean = values.mean(0)
    error = values.std(0) / num_draws**0.5 if num_draws > 1 else torch.full_like(mean, torch.nan)
    return Bound(mean, error)
