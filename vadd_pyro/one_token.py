r"""How likely the data are under the sampler that reveals one token at a time.

With ``D`` network calls a row, in an order drawn at random, a sampler writes

.. math::
    p_\infty(x) = E_o \prod_{i=1}^D p(x_{o_i} \mid x_{o_1}, \dots, x_{o_{i-1}}) , \qquad p(x_j \mid
    x_t) = \int p(z \mid x_t) \mu_j(x_j \mid x_t, z)\, dz ,

which is the law that ``p_T`` tends to as ``T`` grows, when no step reveals two tokens, if the
model does not look at the time. One that does is told, with ``m`` of ``D`` tokens masked, the time
at which so many are to be expected,

.. math::
    \alpha(t_m) = 1 - m / D ,

as in every sampler that counts (:mod:`vadd_pyro.orders`). So :math:`p_\infty` is exactly the law
of ::

    sample(model, process, n, order=random_scores, time_grid=one_token_grid(process))

Since each step reveals one token, no latent couples what is revealed together; it still couples
through what is visible. A mean of logarithms over orders is again the path-wise bound,

.. math::
    \log p_\infty(x) \ge \sum_{m=1}^D E_{x_t : m\ \text{masked}}\; \frac1m \sum_{j\ \text{masked}}
    \log p(x_j \mid x_t) ,

and several orders inside the logarithm close the gap, as in :mod:`vadd_pyro.likelihood`. A model
without latent in that step says all terms of the inner mean in one network call, and they are all
taken; with a latent one position is drawn, and the guide is asked for that target.

References:
    Uria et al. 2014 (arXiv 1310.1757) and Hoogeboom et al. 2022 (arXiv 2110.02037) for the bound
    over random orders and its estimate by some of the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vadd_pyro.likelihood import Bound, average_paths
from vadd_pyro.process import MaskedBatch, MaskingProcess, check_size
from vadd_pyro.programs import evaluation
from vadd_pyro.sampling import device_of, seeded
from vadd_pyro.scoring import StepScores

__all__ = ["one_token_bound", "one_token_grid", "random_scores"]


def random_scores(logits: Tensor, batch: MaskedBatch) -> Tensor:
    """Scores that put positions into a random order: an ``order`` for :func:`vadd_pyro.sample`."""
    return torch.rand(batch.masked.shape, dtype=torch.double, device=logits.device)


def one_token_grid(process: MaskingProcess) -> Tensor:
    """The times ``t_0 = 0, ..., t_D = 1`` at which ``0, ..., D`` tokens are masked on average.

    A sampler that reveals a fixed number of tokens a step reveals one at each step of this grid.

    Args:
        process: gives the schedule and the length ``D``.

    Returns:
        ``(D + 1,)`` in double precision, a ``time_grid``; ``m / D`` for the linear schedule.

    Raises:
        ValueError: for a schedule that gives two of them the same time.
    """
    masked = torch.arange(process.length + 1, dtype=torch.double) / process.length
    grid = process.schedule.inverse(1 - masked)
    grid[0], grid[-1] = 0.0, 1.0
    if not (grid.diff() > 0).all():
        m = int((grid.diff() <= 0).nonzero()[0])
        raise ValueError(
            f"schedule {process.schedule} has no two times at which {m} and {m + 1} of "
            f"{process.length} tokens are masked on average: it falls too fast at t = "
            f"{float(grid[m]):.4g}"
        )
    return grid


def one_token_bound(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    process: MaskingProcess,
    x_0: Tensor,
    *,
    num_particles: int = 64,
    num_draws: int = 8,
    num_paths: int = 1,
    num_terms: int | None = None,
    vectorize_particles: bool = True,
    seed: int | None = None,
    batch_size: int | None = None,
    args: tuple[Any, ...] = (),
) -> Bound:
    """A bound on the log-likelihood of the sampler that reveals one token at a time in a random
    order, in nats per row.

    The sampler is ``sample(model, process, n, order=random_scores,
    time_grid=one_token_grid(process))``; see the module's text.

    Args:
        model, guide: a step program and its guide, which is asked for one target at a time. Guides
            should have been trained with such (``objective="chain"`` with many steps).
        process: their forward process.
        x_0: clean tokens, ``(B, D)``.
        num_particles: importance samples per step; not used where every latent is summed out, nor
            in steps without one.
        num_draws: independent draws of orders and latents, at least 2 for a standard error.
        num_paths: orders of each draw, averaged inside the logarithm. With 1 the bound is the
            path-wise one.
        num_terms: score so many of the ``D`` steps of each order, one drawn in each of as many
            equal stretches, and multiply by ``D / num_terms``: an unbiased estimate of the
            path-wise bound, at so much less work. None scores all.
        vectorize_particles: particles along a dimension of their own; False needs
            ``num_particles=1``.
        seed: seed of this call; None draws on torch's global state.
        batch_size: (row, step) pairs per network call; by default so that the logits take about 8
            MB.
        args: further arguments of the programs, the same for all rows.

    Returns:
        :class:`~vadd_pyro.likelihood.Bound`, a pair ``(value, stderr)`` of ``(B,)`` tensors.

    Raises:
        ValueError: for sizes out of range, ``num_terms`` together with several paths, bad tokens,
        or models that have no such bound.
    """
    for name, size in (
        ("num_particles", num_particles),
        ("num_draws", num_draws),
        ("num_paths", num_paths),
    ):
        check_size(name, size)
    length = process.length
    if num_terms is not None:
        check_size("num_terms", num_terms)
        if num_terms > length:
            raise ValueError(
                f"num_terms is {num_terms}, but a row of {length} tokens has {length} steps"
            )
        if num_paths > 1:
            raise ValueError(
                f"num_terms needs num_paths=1, got num_terms={num_terms} and "
                f"num_paths={num_paths}: inside a logarithm a path counts by the product of all "
                "its steps"
            )
    x_0 = process.check_tokens(x_0).to(device_of(model, x_0.device))
    grid = one_token_grid(process)
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
    scale = 1.0 if num_terms is None else length / num_terms

    def path(rows: Tensor) -> Tensor:
        steps = torch.rand(rows.shape, dtype=torch.double, device=rows.device).argsort(-1) + 1
        step = _chosen_steps(len(rows), length, num_terms, rows.device)
        row = torch.arange(len(rows), device=rows.device).unsqueeze(-1).expand(step.shape)
        pairs = row.flatten(), step.flatten()
        return scale * scores.along(rows, steps, *pairs, over_targets=num_paths == 1)

    together = scores.batch_size // (len(x_0) * length)
    with seeded(seed), evaluation(model, guide):
        return average_paths(path, x_0, num_draws, num_paths, together=together)


def _chosen_steps(
    num_rows: int, length: int, num_terms: int | None, device: torch.device
) -> Tensor:
    """Steps ``1..D`` to score, ``(B, D)``, or ``(B, num_terms)`` drawn with equal chances.

    Stretches of ``D / num_terms`` steps may share one, which may then be drawn twice and counts
    twice.
    """
    if num_terms is None:
        return torch.arange(1, length + 1, device=device).expand(num_rows, length)
    u = torch.rand(num_rows, num_terms, dtype=torch.double, device=device)
    position = (torch.arange(num_terms, device=device) + u) * (length / num_terms)
    return position.long().clamp_max(length - 1) + 1
