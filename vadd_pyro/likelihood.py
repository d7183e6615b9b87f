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
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vadd_pyro.checkpoints import random_state, restore_random_state
from vadd_pyro.densities import score
from vadd_pyro.elbo import MaskedDiffusionELBO
from vadd_pyro.process import MaskedBatch, MaskingProcess, check_size, make_time_grid
from vadd_pyro.programs import evaluation
from vadd_pyro.recorder import Recorder, Site, run
from vadd_pyro.sampling import device_of, seeded
from vadd_pyro.sites import data_plate, is_row_site

__all__ = ["Bound", "StepScores", "average_paths", "log_likelihood_bound"]


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


class StepScores:
    """What scores the steps of a grid, after a look at the pair.

    Steps without latent need one particle: all of them, where the model has none or sums it out,
    and those from times before ``least_time``, where model and guide do without.

    Args:
        grid: ``(T + 1,)``.
        exponentiated: whether the exponentials of scores must be unbiased estimates of the
            probabilities, as they must to be averaged over paths. A bound that already is an
            average of logarithms, as a closed-form KL makes it, has larger or smaller ones.

    The others are those of :func:`log_likelihood_bound`.

    Attributes:
        least_time: steps from earlier times have no latent; infinite if none has.
        batch_size: (row, step) pairs per network call, where there is a latent.

    Raises:
        ValueError: for models that have no T-step bound.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        process: MaskingProcess,
        x_0: Tensor,
        grid: Tensor,
        *,
        num_particles: int,
        vectorize_particles: bool = True,
        exponentiated: bool = False,
        batch_size: int | None = None,
        args: tuple[Any, ...] = (),
    ) -> None:
        probe = process.corrupt(x_0[:1], 1.0)
        inferred, generated = MaskedDiffusionELBO(process).record(model, guide, probe, args=args)
        _check_model(generated)
        _check_blind(model, guide, process, x_0, args)
        self._model, self._guide, self._args = model, guide, args
        self._process, self._grid = process, grid
        self._exponentiated = exponentiated
        if all(site.observed for site in inferred.sites.values()):
            num_particles = 1  # every latent is summed out: particles would all be the same
        if all(site.observed for site in generated.sites.values()):
            self.least_time = math.inf
        else:
            self.least_time = min(getattr(part, "least_time", 0.0) for part in (model, guide))
        self._objectives = {
            has_latent: MaskedDiffusionELBO(
                process,
                objective="chain",
                time_grid=grid,
                num_particles=particles,
                importance_weighted=particles > 1,
                vectorize_particles=vectorize_particles,
            )
            for has_latent, particles in ((True, num_particles), (False, 1))
        }
        cells = process.length * process.vocab_size
        self._batch_sizes = {
            has_latent: max(1, 2**21 // (particles * cells)) if batch_size is None else batch_size
            for has_latent, particles in ((True, num_particles), (False, 1))
        }
        self.batch_size = self._batch_sizes[self.least_time < math.inf]

    def __call__(self, batch: MaskedBatch, has_latent: bool = True) -> Tensor:
        """Scores of the rows of a batch, ``(B,)`` in double precision, some of them at once.

        Args:
            batch: rows at the times of steps, and what these reveal.
            has_latent: whether all steps have a latent; False if none has.
        """
        score_some = self._unbiased if self._exponentiated else self._usual
        elbo = self._objectives[has_latent]
        parts = batch.split(self._batch_sizes[has_latent])
        return torch.cat([score_some(elbo, part) for part in parts]).double()

    def _usual(self, elbo: MaskedDiffusionELBO, batch: MaskedBatch) -> Tensor:
        return elbo.score(self._model, self._guide, batch, *self._args).rows

    def _unbiased(self, elbo: MaskedDiffusionELBO, batch: MaskedBatch) -> Tensor:
        several = elbo.num_particles > 1
        pair = elbo.record(self._model, self._guide, batch, several, self._args)
        return score(
            *pair,
            active=batch.target.any(-1),
            weight=None,
            num_particles=elbo.num_particles,
            vectorized=several,
            closed_form_kl=False,
            renyi_alpha=0.0,
        ).rows

    def along(
        self,
        x_0: Tensor,
        steps: Tensor,
        row: Tensor,
        step: Tensor,
        over_targets: bool = False,
    ) -> Tensor:
        """Scores of some steps of each row's path, summed over the row, ``(B,)`` in double
        precision.

        Args:
            x_0: rows, ``(B, D)``.
            steps: at which step each token is revealed, ``(B, D)`` long.
            row, step: which rows at which steps to score, ``(N,)`` long.
            over_targets: for steps without latent that reveal one token, the mean over which of
                the masked ones it is.
        """
        total = torch.zeros(len(x_0), dtype=torch.double, device=x_0.device)
        latent = self._grid.to(step.device)[step] >= self.least_time
        for has_latent in (True, False):
            pairs = (latent == has_latent).nonzero().squeeze(-1)
            for some in pairs.split(self._batch_sizes[has_latent]):
                if not len(some):
                    continue
                chosen = row[some]
                batch = self._process.step_batch(
                    x_0[chosen], steps[chosen], step[some], self._grid
                )
                whole = over_targets and not has_latent
                if whole:
                    batch = replace(batch, target=batch.masked)
                found = self(batch, has_latent)
                total.index_add_(0, chosen, found / batch.masked.sum(-1) if whole else found)
        return total


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


def _check_blind(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    process: MaskingProcess,
    x_0: Tensor,
    args: tuple[Any, ...],
) -> None:
    """Refuse models that look at clean tokens behind the mask: a sampler has none there.

    The laws of all sites are compared for rows that differ there alone, some of them all masked.
    Programs that draw random numbers which no seed repeats cannot be told so.
    """
    rows = x_0[:4].repeat(3, 1)
    times = torch.linspace(1 / 3, 1, len(rows), device=x_0.device)
    probe = process.corrupt(rows, times, at_least_one=True)
    other = torch.where(probe.masked, torch.randint_like(rows, process.vocab_size), rows)
    inferred, _ = MaskedDiffusionELBO(process).record(model, guide, probe, args=args)
    random = random_state()

    def sites(batch: MaskedBatch) -> dict[str, Site]:
        restore_random_state(random)
        replay = Recorder(inferred.latent_values(), lambda msg: True, inferred.next_dim)
        return run(model, replay, batch, *args).sites

    first, again = sites(probe), sites(probe)
    if _differing(first, again):
        return
    name = _differing(first, sites(replace(probe, x_0=other)))
    if name:
        raise ValueError(
            f"the law of the model's site {name!r} depends on batch.x_0 at masked positions, "
            "which a sampler does not know: what it scores is no bound on log p_T(x_0); read "
            "batch.x_t instead"
        )


def _differing(sites: dict[str, Site], others: dict[str, Site]) -> str | None:
    """A site whose law differs."""
    for name in [*sites, *others]:
        if name not in sites or name not in others:
            return name
        value = sites[name].value
        own, told = (s[name].fn.log_prob(value) for s in (sites, others))
        if not torch.allclose(own, told, 1e-4, 1e-4, equal_nan=True):
            return name
    return None
