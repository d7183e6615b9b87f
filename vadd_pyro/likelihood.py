r"""How likely the data are under the sampler that is used: the T-step bound, and the exact law on
small spaces.

The bound (SPEC section 3b) averages, over random reveal paths and latent draws,

.. math::
    \log p_T(x_0) \ge \sum_{i=1}^T E_{x_{t_i}, S_i}\, E \log \frac1P \sum_{p=1}^P
    \frac{p(z_p \mid x_{t_i}) \prod_{j \in S_i} \mu_j(x_{0,j} \mid x_{t_i}, z_p)}{r(z_p)}, \qquad
    z_p \sim r .

It holds in expectation: single draws, and so single rows, may exceed ``log p_T``. As ``P`` grows
it tends to the path-wise value :math:`\sum_i E \log p(x_{S_i} \mid x_{t_i})`, which for ``T > 1``
stays below ``log p_T`` (Jensen over reveal paths; equal at ``T = 1``). All of it speaks of fresh
latents, random reveal order and the same time grid.

References:
    Burda et al. 2016 (arXiv 1509.00519) for the average inside the logarithm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vadd_pyro.elbo import MaskedDiffusionELBO
from vadd_pyro.process import MaskedBatch, MaskingProcess, make_time_grid
from vadd_pyro.programs import evaluation
from vadd_pyro.recorder import Recorder
from vadd_pyro.sampling import device_of, seeded
from vadd_pyro.sites import data_plate, is_row_site

__all__ = ["Bound", "chain_objective", "log_likelihood_bound"]


class Bound(NamedTuple):
    """A lower bound on ``log p_T`` for each row.

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
    time_grid: Tensor | None = None,
    vectorize_particles: bool = True,
    seed: int | None = None,
    batch_size: int | None = None,
    args: tuple[Any, ...] = (),
) -> Bound:
    """The T-step bound on ``log p_T(x_0)``, in nats per row.

    Each draw takes a whole random reveal path through the grid and scores every step of it that
    reveals something.

    Args:
        model, guide: a step program and its guide, which should have been trained with targets
            that the sampler meets (``objective="chain"``): one trained by the DELBO alone gives a
            valid but loose bound for ``T > 1``.
        process: their forward process.
        x_0: clean tokens, ``(B, D)``.
        num_steps: ``T``.
        num_particles: importance samples ``P`` per step; more is tighter. Not used where every
            latent is summed out.
        num_draws: independent draws of path and latents, at least 2 for a standard error.
        time_grid: a grid of your own, ``(T + 1,)``.
        vectorize_particles: particles along a dimension of their own; False needs
            ``num_particles=1``.
        seed: seed of this call; None draws on torch's global state.
        batch_size: (row, step) pairs per network call; by default so that the logits take about 8
            MB.
        args: further arguments of the programs, the same for all rows.

    Returns:
        :class:`Bound`, a pair ``(value, stderr)`` of ``(B,)`` tensors.
    """
    x_0 = process.check_tokens(x_0).to(device_of(model, x_0.device))
    grid = make_time_grid(num_steps, time_grid)
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")
    with seeded(seed), evaluation(model, guide):
        elbo, batch_size, _ = chain_objective(
            model,
            guide,
            process,
            x_0,
            grid,
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            batch_size=batch_size,
            args=args,
        )
    draws = []
    with seeded(seed), evaluation(model, guide):
        for _ in range(num_draws):
            steps = process.reveal_steps(tuple(x_0.shape), grid, x_0.device)
            total = torch.zeros(len(x_0), dtype=torch.double, device=x_0.device)
            for rows, batch in _steps_of(process, x_0, steps, grid, batch_size):
                terms = elbo.score(model, guide, batch, *args)
                total.index_add_(0, rows, terms.rows.double())
            draws.append(total)
    values = torch.stack(draws)
    error = values.std(0) / num_draws**0.5 if num_draws > 1 else torch.full_like(total, torch.nan)
    return Bound(values.mean(0), error)


def chain_objective(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    process: MaskingProcess,
    x_0: Tensor,
    grid: Tensor,
    *,
    num_particles: int,
    vectorize_particles: bool = True,
    batch_size: int | None = None,
    args: tuple[Any, ...] = (),
) -> tuple[MaskedDiffusionELBO, int, bool]:
    """What scores the steps of a grid, after a look at the pair.

    Args:
        as in :func:`log_likelihood_bound`; ``grid`` is ``(T + 1,)``.

    Returns:
        The objective, with one particle where every latent is summed out; rows per network call;
        whether the model has a latent.

    Raises:
        ValueError: for models that have no T-step bound.
    """
    probe = process.corrupt(x_0[:1], 1.0)
    inferred, generated = MaskedDiffusionELBO(process).record(model, guide, probe, args=args)
    _check_model(generated)
    if all(site.observed for site in inferred.sites.values()):
        num_particles = 1  # every latent is summed out: particles would all be the same
    elbo = MaskedDiffusionELBO(
        process,
        objective="chain",
        time_grid=grid,
        num_particles=num_particles,
        importance_weighted=num_particles > 1,
        vectorize_particles=vectorize_particles,
    )
    if batch_size is None:
        batch_size = max(1, 2**21 // (num_particles * process.length * process.vocab_size))
    has_latent = any(not site.observed for site in generated.sites.values())
    return elbo, batch_size, has_latent


def _check_model(model: Recorder) -> None:
    """Refuse models whose density is not that of the rows' tokens alone."""
    plate = data_plate(model.sites["x_0"])
    for name, site in model.sites.items():
        if site.observed and name != "x_0":
            raise ValueError(
                f"the model observes {name!r} beside 'x_0': its value would count at every step, "
                "and the bound would not be one on log p_T(x_0)"
            )
        if not is_row_site(site, plate, 1):
            raise ValueError(
                f"the latent {name!r} stands outside the data plate: log p_T does not split into "
                "rows"
            )


def _steps_of(
    process: MaskingProcess, x_0: Tensor, steps: Tensor, grid: Tensor, batch_size: int
) -> Any:
    """All (row, step) pairs in which something is revealed, ``batch_size`` at a time."""
    present = torch.zeros(len(x_0), len(grid), dtype=torch.bool, device=x_0.device)
    present.scatter_(1, steps, True)
    rows, step = present.nonzero(as_tuple=True)
    for start in range(0, len(rows), batch_size):
        piece = slice(start, start + batch_size)
        chosen = rows[piece]
        batch: MaskedBatch = process.step_batch(x_0[chosen], steps[chosen], step[piece], grid)
        yield chosen, batch
