r"""Is the latent used? What tells a collapsed latent from a live one, on rows of one state.

With :math:`r(z \mid x)` the guide's posterior of a row and ``N`` rows,

.. math::
    \mathrm{KL} &= E_x \mathrm{KL}[r(z \mid x) \| p(z)], \qquad
    \mathrm{AU} = \#\{j : \mathrm{Var}_x\, E_{r(z \mid x)}[z_j] > 0.01\}, \\
    I_r(x; z) &\approx \frac1N \sum_n \Big[\log r(z_n \mid x_n) - \log \frac1N \sum_{m} r(z_n \mid
    x_m)\Big], \qquad z_n \sim r(z \mid x_n) .

The last is at most ``log N`` and in expectation at most the mutual information (Poole et al.
2019), so it saturates where rows are told apart by their latents: read it against ``log N``. KL
without mutual information is a guide that misses the prior, not a latent that carries something.

Discrete latents that the model sums out need no guide; their posterior :math:`p(c \mid x) \propto
p(c)\, p(x \mid c)` and all of these are exact; so is the posterior of a chain of codes along the
row, whose mutual information alone is estimated as above.

References:
    Burda et al. 2016 (arXiv 1509.00519), section 5.1, for active units; Hoffman and Johnson 2016,
    "ELBO surgery", for the mutual information; Poole et al. 2019 (arXiv 1905.06922) for its bound;
    Schulman 2020, "Approximating KL Divergence", for the non-negative estimate of a row's KL.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vadd_pyro.chains import NotLocalError, chain_factors, chain_of, check_chain
from vadd_pyro.checkpoints import random_state, restore_random_state
from vadd_pyro.distributions import CodeCategorical, OneHotCodes
from vadd_pyro.divergences import closed_form, latent_dimensions
from vadd_pyro.elbo import MaskedDiffusionELBO
from vadd_pyro.information import (
    MEAN_RUNS,
    active_units,
    all_pairs,
    mutual_information,
    of_pairs,
    stand_alone,
)
from vadd_pyro.process import MaskedBatch, check_size
from vadd_pyro.programs import evaluation
from vadd_pyro.recorder import Recorder, Site, run
from vadd_pyro.sampling import seeded
from vadd_pyro.sites import Layout, check_pair, check_summed, check_tokens_site
from vadd_pyro.times import GridTimes

__all__ = ["LatentStatistics", "Monitor", "latent_statistics"]

_AT_PRIOR = 0.01  # nats of each dimension


class LatentStatistics(NamedTuple):
    """What the latents of a batch carry, in nats per row.

    Args:
        kl: mean KL of a row.
        kl_per_dimension: its parts as far as they are known apart: each dimension where the closed
            form factorises, a site as a whole where it does not, one entry for all that is
            estimated by draws.
        dimension_names: what the entries belong to, such as ``"z[3]"``.
        active_units: dimensions of continuous sites whose posterior mean has a variance over rows
            above 0.01, and codes of discrete sites (of ``C`` values) that have more than ``1 / (10
            C)`` of the posterior probability of all rows. A discrete latent that ignores the rows
            may use all its codes: its mutual information is what shows that.
        num_units: how many there are.
        mutual_information: between row and latents, at most ``log(num_rows)``; of at most 64 rows
            where a guide's sites depend on each other; None where the guide's density is given
            through a change of variables.
        share_at_prior: share of rows whose KL is below 0.01 nats for each dimension; None without
            latents.
        num_rows: how many rows the mutual information was estimated from.
    """

    kl: float
    kl_per_dimension: list[float]
    dimension_names: list[str]
    active_units: int
    num_units: int
    mutual_information: float | None
    share_at_prior: float | None
    num_rows: int


def latent_statistics(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: MaskedBatch,
    elbo: MaskedDiffusionELBO,
    *,
    num_draws: int = 1,
    seed: int | None = 0,
    args: tuple[Any, ...] = (),
) -> LatentStatistics:
    """What the latents of a batch carry.

    A guide's sites are looked at as that guide infers them, discrete ones by draws even if it
    enumerates them; sites that the model sums out beside them are not counted. Where the guide
    has no sites, those summed out are looked at by their exact posterior.

    Args:
        model, guide: the pair, run in evaluation mode without gradients.
        batch: rows with data; the latents of ``process.corrupt(x_0, 1.0)`` are those of the state
            from which every sample starts. Rows without a target are left out.
        elbo: any loss of the pair, for the process and the depth of plates.
        num_draws: latent draws per row, for KLs without closed form and mutual information.
        seed: seed of these draws, which leave torch's random state as it was; None draws on it.
        args: further arguments of the programs, the same for all rows.

    Raises:
        ValueError: for a batch without data or without a target, or a pair that does not fit.
    """
    check_size("num_draws", num_draws)
    if batch.x_0 is None:
        raise ValueError("batch.x_0 is None: expected a batch with data, from process.corrupt")
    batch = batch[batch.target.any(-1)]
    if len(batch) == 0:
        raise ValueError("batch has no row with a target: expected masked rows, such as at t = 1")
    with seeded(seed), evaluation(model, guide):
        runs = [_record(model, guide, batch, elbo, args) for _ in range(num_draws)]
        inferred, generated = runs[0]
        layout = Layout(inferred, generated, batch.target.any(-1), elbo.row_plates, False)
        latents = [
            site
            for name, site in inferred.sites.items()
            if not site.observed and layout.rows[name]
        ]
        if not latents:
            summed = [site for site in generated.sites.values() if site.enum_dim is not None]
            check_summed(summed, layout)
            chain = chain_of(summed)
            if chain is None:
                return _of_codes(generated, summed, layout)
            check_chain(model, inferred, generated, batch, args)
            return _of_chain(chain, generated.sites["x_0"], num_draws)
        own = [site.name for site in latents if not site.auxiliary]

        def again(rows: MaskedBatch, replay: dict[str, Tensor] | None = None) -> Recorder:
            return run(guide, Recorder(replay), rows, *args)

        alone = len(latents) == 1 or stand_alone(latents, again(batch))
        names, parts, kl, near = _divergences(runs, own, layout)
        dimensions = sum(
            latent_dimensions(site.fn) * math.prod(site.fn.batch_shape[:-1])
            for site in latents
            if not site.auxiliary
        )
        several = [] if alone else [again(batch) for _ in range(MEAN_RUNS)]
        active, units = active_units(several or [inferred], own)
        information, num_rows = mutual_information(
            [record for record, _ in runs], latents, batch, layout, again, alone
        )
    return LatentStatistics(
        kl=float(kl.mean()),
        kl_per_dimension=parts,
        dimension_names=names,
        active_units=active,
        num_units=units,
        mutual_information=information,
        share_at_prior=float((near < _AT_PRIOR * dimensions).double().mean()),
        num_rows=num_rows,
    )


def _record(
    model: Any, guide: Any, batch: MaskedBatch, elbo: MaskedDiffusionELBO, args: tuple[Any, ...]
) -> tuple[Recorder, Recorder]:
    """Run the pair, every site of the guide drawn, what the model has besides laid out."""
    first_dim = -1 - elbo.row_plates
    inferred = run(guide, Recorder(first_dim=first_dim), batch, *args)
    everything = Recorder(
        inferred.latent_values(), lambda msg: True, first_dim=first_dim, by_position=True
    )
    generated = run(model, everything, batch, *args)
    check_pair(inferred, generated)
    check_tokens_site(generated, elbo.process.vocab_size)
    return inferred, generated


# ----------------------------------------------------------------------- KL


def _divergences(
    runs: list[tuple[Recorder, Recorder]], own: list[str], layout: Layout
) -> tuple[list[str], list[float], Tensor, Tensor]:
    """Names and means of the KL's parts, each row's KL, and a non-negative estimate of that."""
    columns: list[Tensor] = []
    rows, near = [], []
    names: list[str] = []
    for inferred, generated in runs:
        summed = [site.enum_dim for site in generated.sites.values() if site.enum_dim is not None]
        closed = {} if summed else closed_form(inferred, generated, by_dimension=True)
        closed = {name: value for name, value in closed.items() if layout.rows[name]}
        parts: list[Tensor] = []
        names = []
        row = torch.zeros(layout.num_rows, device=layout.device)
        for name, value in closed.items():
            row = row + layout.reduce(value.sum(-1)).reshape(-1)
            part = value.mean(-2).flatten()
            parts.append(part)
            several = part.numel() > 1
            names += [f"{name}[{i}]" for i in range(len(part))] if several else [name]
        floor = row
        drawn = [name for name in own if name not in closed]
        if drawn:
            log_r = [s for s in inferred.sites.values() if s.name not in closed]
            log_p = [
                s for s in generated.sites.values() if not s.observed and s.name not in closed
            ]
            prior = _log_joint(log_p, layout)
            if summed:
                prior = torch.logsumexp(prior.reshape(-1, layout.num_rows), 0)
            ratio = _log_joint(log_r, layout).reshape(-1) - prior.reshape(-1)
            row, floor = row + ratio, floor + torch.exp(-ratio) - 1 + ratio
            parts.append(ratio.mean().reshape(1))
            names.append(", ".join(drawn))
        rows.append(row)
        near.append(floor)
        columns.append(torch.cat(parts))
    return (
        names,
        torch.stack(columns).mean(0).tolist(),
        torch.stack(rows).mean(0),
        torch.stack(near).mean(0),
    )


def _log_joint(sites: list[Site], layout: Layout) -> Tensor:
    """Joint log-density of the sites of rows, ``(supports ..., B)``."""
    values = [
        layout.reduce(site.log_weight() if site.enum_dim is not None else site.log_prob())
        for site in sites
        if layout.rows[site.name]
    ]
    total = layout.sum(values)
    return total.expand(*total.shape[:-1], layout.num_rows)


# --------------------------------------------------- codes that are summed out


def _of_codes(model: Recorder, summed: list[Site], layout: Layout) -> LatentStatistics:
    """The same of discrete latents without a guide, from their exact posterior."""
    if not summed:
        return LatentStatistics(0.0, [], [], 0, 0, 0.0, None, layout.num_rows)
    joint = _log_joint(list(model.sites.values()), layout).double()
    prior = _log_joint(summed, layout).double().expand_as(joint)
    posterior = joint.reshape(-1, layout.num_rows).log_softmax(0)
    prior = prior.reshape(-1, layout.num_rows)
    probability = posterior.exp()
    possible = probability > 0
    zero = posterior.new_zeros(())
    kl = (probability * (posterior - prior).where(possible, zero)).sum(0)
    aggregate = probability.mean(1)
    entropy = -torch.xlogy(aggregate, aggregate).sum()
    information = entropy + torch.xlogy(probability, probability).sum(0).mean()
    active = units = dimensions = 0
    table = aggregate.reshape(joint.shape[:-1])
    for site in summed:
        dim = (site.enum_dim or 0) + 1  # the rows' dimension is gone
        others = [d for d in range(-table.dim(), 0) if d != dim]
        used = _factors(site, table.sum(others) if others else table)
        active += int((used > 1 / (10 * used.shape[-1])).sum())
        units += used.numel()
        dimensions += latent_dimensions(site.fn)
    return LatentStatistics(
        kl=float(kl.mean()),
        kl_per_dimension=[float(kl.mean())],
        dimension_names=[", ".join(site.name for site in summed)],
        active_units=active,
        num_units=units,
        mutual_information=float(information.clamp_min(0.0)),
        share_at_prior=float((kl < _AT_PRIOR * dimensions).double().mean()),
        num_rows=layout.num_rows,
    )


def _of_chain(chain: Site, tokens: Site, num_draws: int) -> LatentStatistics:
    """The same of a chain of codes, whose posterior is a chain; its mutual information is
    estimated from draws of it, as that of a guide is.
    """
    prior, factor = chain.fn, chain_factors(chain, tokens)
    posterior = prior.given(factor)
    probability = posterior.marginals().double()
    expected = (probability * factor.where(probability > 0, factor.new_zeros(()))).sum((-2, -1))
    kl = expected - prior.summed_out(factor.double())
    draws = posterior.sample((num_draws,))
    information = torch.stack([of_pairs(all_pairs(posterior, codes)) for codes in draws]).mean()
    used = probability.mean((0, 1))
    return LatentStatistics(
        kl=float(kl.mean()),
        kl_per_dimension=[float(kl.mean())],
        dimension_names=[chain.name],
        active_units=int((used > 1 / (10 * len(used))).sum()),
        num_units=len(used),
        mutual_information=float(information.clamp_min(0.0)),
        share_at_prior=float((kl < _AT_PRIOR * latent_dimensions(prior)).double().mean()),
        num_rows=len(kl),
    )


def _factors(site: Site, used: Tensor) -> Tensor:
    """Probabilities of a support ``(S,)`` as those of its codes, ``(..., C)``."""
    values = site.value.reshape(len(used), *site.fn.event_shape)
    if isinstance(site.fn, CodeCategorical):
        values = one_hot(values, site.fn.num_codes)
    elif not isinstance(site.fn, OneHotCodes):
        return used
    return torch.einsum("s,slc->lc", used, values.to(used.dtype))


# ---------------------------------------------------------- during a training


class Monitor:
    """Looks at the same rows of the data again and again during a training.

    The rows are all masked; for an objective on the steps of a grid, the targets are those of the
    first step from there.

    Args:
        elbo: the loss of the training.
        num_rows: how many rows are looked at.
        seed: seed of the choice of rows, of targets and of latent draws.
    """

    def __init__(self, elbo: MaskedDiffusionELBO, num_rows: int, seed: int) -> None:
        self.elbo = elbo
        self.num_rows = num_rows
        self.seed = seed
        self.batch: MaskedBatch | None = None

    def choose(self, x_0: Tensor) -> None:
        """Take rows of the data ``(N, D)``."""
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randperm(len(x_0), generator=generator)[: self.num_rows]
        x_0 = x_0[rows.to(x_0.device)]
        s = None
        if self.elbo.objective == "chain" and isinstance(self.elbo.times, GridTimes):
            s = float(self.elbo.times.grids[0][-2])
        with seeded(self.seed):
            batch = self.elbo.process.corrupt(x_0, 1.0, s)
        self.batch = batch if bool(batch.target.any()) else None

    def __call__(
        self, model: Callable[..., Any], guide: Callable[..., Any]
    ) -> LatentStatistics | None:
        """What the latents carry now; None, with a warning, where the programs cannot tell.

        They may be bound to batches of one size, and a training must not end for that.
        """
        if self.batch is None:
            return None
        state = random_state()
        try:
            return latent_statistics(model, guide, self.batch, self.elbo, seed=self.seed)
        except NotLocalError:  # not told: what was trained on is wrong
            raise
        except Exception as error:
            warnings.warn(
                f"latents are not monitored (monitor_every=None says so without a warning): "
                f"{error}",
                RuntimeWarning,
                stacklevel=2,
            )
            self.batch = None
            return None
        finally:
            restore_random_state(state)
