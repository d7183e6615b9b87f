"""What scores the steps of reveal paths, for bounds on likelihoods and for grids of few steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vadd_pyro.chains import check_chain
from vadd_pyro.checkpoints import random_state, restore_random_state
from vadd_pyro.densities import score
from vadd_pyro.elbo import MaskedDiffusionELBO
from vadd_pyro.process import MaskedBatch, MaskingProcess, check_size, check_time
from vadd_pyro.recorder import Recorder, Site, run
from vadd_pyro.sites import data_plate, is_row_site

__all__ = ["StepScores"]


class StepScores:
    """What scores the steps of a grid, after a look at the pair.

    Steps without latent are scored by the model alone, the guide has no say in them: all steps of
    a model that has none, and those from times before its ``least_time``
    (:class:`vadd_pyro.models.VADD`).

    Args:
        grid: ``(T + 1,)``.
        exponentiated: whether the exponentials of scores must be unbiased estimates of the
            probabilities, as they must to be averaged over paths. A bound that already is an
            average of logarithms, as a closed-form KL makes it, has larger or smaller ones.

    The others are those of :func:`vadd_pyro.log_likelihood_bound`.

    Attributes:
        has_latent: of the steps from each time of the grid, ``(T + 1,)`` bool.
        batch_size: most (row, step) pairs in a network call.

    Raises:
        ValueError: for models that have no T-step bound, or that use a latent before their
        ``least_time``; for a ``batch_size`` below 1.
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
        if batch_size is not None:
            check_size("batch_size", batch_size)
        probe = process.corrupt(x_0[:1], 1.0)
        inferred, generated = MaskedDiffusionELBO(process).record(model, guide, probe, args=args)
        _check_model(generated)
        _check_blind(model, guide, process, x_0, args)
        check_chain(model, inferred, generated, probe, args)
        self._model, self._guide, self._args = model, guide, args
        self._process, self._grid = process, grid
        self._exponentiated = exponentiated
        if all(site.observed for site in inferred.sites.values()):
            num_particles = 1  # every latent is summed out: particles would all be the same
        if all(site.observed for site in generated.sites.values()):
            self.has_latent = torch.zeros(len(grid), dtype=torch.bool)
        else:
            least_time = check_time("least_time", getattr(model, "least_time", 0.0))
            if least_time > 0:
                _check_least_time(model, process, x_0, least_time, args)
            # In the precision in which programs are told the time.
            self.has_latent = grid.to(torch.get_default_dtype()).cpu() >= least_time
        self._elbo = MaskedDiffusionELBO(
            process,
            objective="chain",
            time_grid=grid,
            num_particles=num_particles,
            importance_weighted=num_particles > 1,
            vectorize_particles=vectorize_particles,
        )
        cells = process.length * process.vocab_size
        self._batch_sizes = {
            has_latent: max(1, 2**21 // (particles * cells)) if batch_size is None else batch_size
            for has_latent, particles in ((True, num_particles), (False, 1))
        }
        self.batch_size = max(self._batch_sizes[bool(kind)] for kind in self.has_latent)

    def __call__(self, batch: MaskedBatch, has_latent: bool) -> Tensor:
        """Scores of the rows of a batch, ``(B,)`` in double precision, some of them at once.

        Args:
            batch: rows at the times of steps, and what these reveal.
            has_latent: whether all of these steps have a latent, or none.
        """
        parts = batch.split(self._batch_sizes[has_latent])
        return torch.cat([self._rows(part, has_latent) for part in parts])

    def _rows(self, batch: MaskedBatch, has_latent: bool) -> Tensor:
        elbo, model, args = self._elbo, self._model, self._args
        if has_latent and not self._exponentiated:
            return elbo.score(model, self._guide, batch, *args).rows.double()
        several = has_latent and elbo.num_particles > 1
        if has_latent:
            inferred, generated = elbo.record(model, self._guide, batch, several, args)
        else:
            inferred, generated = Recorder(), run(model, Recorder(), batch, *args)
            # Whatever was drawn here is not used.
            generated.sites = {"x_0": generated.sites["x_0"]}
        return score(
            inferred,
            generated,
            active=batch.target.any(-1),
            weight=None,
            num_particles=elbo.num_particles if has_latent else 1,
            vectorized=several,
            closed_form_kl=False,
            renyi_alpha=0.0,
        ).rows.double()

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
        latent = self.has_latent.to(step.device)[step]
        for has_latent in (True, False):
            pairs = (latent == has_latent).nonzero().squeeze(-1)
            for some in pairs.split(self._batch_sizes[has_latent]):
                if not len(some):
                    continue
                of = x_0[row[some]], steps[row[some]], step[some]
                batch = self._process.step_batch(*of, self._grid)
                share: Tensor | float = 1.0
                if over_targets and not has_latent:
                    share = 1 / batch.masked.sum(-1)
                    batch = replace(batch, target=batch.masked)
                total.index_add_(0, row[some], share * self._rows(batch, has_latent))
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
        replay = Recorder(
            inferred.latent_values(), lambda msg: True, inferred.next_dim, by_position=True
        )
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


def _check_least_time(
    model: Callable[..., Any],
    process: MaskingProcess,
    x_0: Tensor,
    least_time: float,
    args: tuple[Any, ...],
) -> None:
    """Refuse models that use a latent in steps from times in which they say that they do not.

    The law of the tokens is compared for two draws of the latent.
    """
    times = least_time * torch.tensor([0.05, 0.3, 0.6, 0.95], device=x_0.device)
    rows = x_0[:1].expand(len(times), -1)
    probe = process.corrupt(rows, times.to(torch.get_default_dtype()), at_least_one=True)

    def tokens() -> dict[str, Site]:
        return {"x_0": run(model, Recorder(), probe, *args).sites["x_0"]}

    random = random_state()
    first = tokens()
    restore_random_state(random)
    again = tokens()
    if not _differing(first, again) and _differing(first, tokens()):
        raise ValueError(
            f"{type(model).__name__} has least_time = {least_time}, but its law of the tokens "
            "depends on the latent in steps from earlier times, which would be scored as if there "
            "were none"
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
