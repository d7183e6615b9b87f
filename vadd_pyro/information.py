r"""How much a guide's draws say about their row: active units and mutual information.

.. math::
    \mathrm{AU} = \#\{j : \mathrm{Var}_x\, E_{r(z \mid x)}[z_j] > 0.01\}, \qquad
    I_r(x; z) \approx \frac1N \sum_n \Big[\log r(z_n \mid x_n) - \log \frac1N \sum_{m} r(z_n
    \mid x_m)\Big] .

Both need a guide's laws at other rows' draws. Where its sites stand alone those laws are at hand;
where one site's law depends on another's draw, the guide is run again for pairs of rows.

References:
    Burda et al. 2016 (arXiv 1509.00519), section 5.1; Hoffman and Johnson 2016, "ELBO surgery".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import (
    Categorical,
    Delta,
    Independent,
    MaskedDistribution,
    OneHotCategorical,
    ProjectedNormal,
    VonMises,
    VonMises3D,
)
from torch import Tensor
from torch.distributions import Distribution

from vadd_pyro.distributions import CodeCategorical, OneHotCodes
from vadd_pyro.process import MaskedBatch
from vadd_pyro.recorder import Recorder, Site
from vadd_pyro.sites import Layout

__all__ = [
    "MEAN_RUNS",
    "active_units",
    "all_pairs",
    "mutual_information",
    "of_pairs",
    "stand_alone",
]

MEAN_RUNS = 32  # of a guide whose sites depend on each other, for its posterior means
_MEAN_DRAWS = 128  # for posterior means without closed form
_ACTIVE_VARIANCE = 0.01
_PAIR_ROWS = 64  # rows compared pair by pair where that takes runs of the guide
_CHUNK = 2**22


def _probabilities(fn: Distribution) -> Tensor | None:
    """Probabilities ``(..., C)`` of the codes of a discrete law, factor by factor; or None."""
    if isinstance(fn, CodeCategorical | OneHotCodes):
        return fn.logits.exp()
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn.probs if isinstance(fn, Categorical | OneHotCategorical) else None


def active_units(records: list[Recorder], own: list[str]) -> tuple[int, int]:
    """Active and all units of the guide's sites, from independent runs of it."""
    active = units = 0
    for name in own:
        sites = [record.sites[name] for record in records]
        codes = [_probabilities(site.fn) for site in sites]
        if codes[0] is not None:
            axis = len(sites[0].fn.batch_shape) - 1
            used = torch.stack([p.mean(axis) for p in codes if p is not None]).mean(0)
            active += int((used > 1 / (10 * used.shape[-1])).sum())
            units += used.numel()
            continue
        variance = _variance_of_means(sites)
        active += int((variance > _ACTIVE_VARIANCE).sum())
        units += variance.numel()
    return active, units


def _mean(fn: Any) -> Tensor | None:
    """The mean of a law, None if it does not tell: on spheres and circles ``fn.mean`` is a
    direction, whatever the spread.
    """
    inner = fn
    while isinstance(inner, Independent | MaskedDistribution):
        inner = inner.base_dist
    if isinstance(inner, ProjectedNormal | VonMises | VonMises3D):
        return None
    try:
        mean = fn.mean
    except NotImplementedError:
        return None
    return mean if mean.isfinite().all() else None


def _variance_of_means(sites: list[Site]) -> Tensor:
    """Variance over rows of the posterior mean, without what estimating the mean adds to it."""
    means = []
    for site in sites:
        shape = site.fn.batch_shape + site.fn.event_shape
        mean = _mean(site.fn)
        if mean is not None:
            means.append(mean.expand(shape))
        else:
            draws = 1 if len(sites) > 1 else _MEAN_DRAWS
            means += list(site.fn.sample((draws,)).expand(draws, *shape))
    stacked = torch.stack(means).double()
    axis = -1 - len(sites[0].fn.event_shape)
    if stacked.shape[axis] < 2:
        return stacked.new_zeros(stacked[0].movedim(axis, 0)[0].shape)
    variance = stacked.mean(0).var(axis)
    if len(means) > 1:
        variance = variance - stacked.var(0).mean(axis) / len(means)
    return variance


def stand_alone(latents: list[Site], other: Recorder) -> bool:
    """Whether sites have the same law in two runs with different draws."""
    return all(
        torch.equal(site.fn.log_prob(site.value), other.sites[site.name].fn.log_prob(site.value))
        for site in latents
    )


def mutual_information(
    inferred: Sequence[Recorder],
    latents: list[Site],
    batch: MaskedBatch,
    layout: Layout,
    again: Callable[..., Recorder],
    alone: bool,
) -> tuple[float | None, int]:
    """Mutual information of rows and latents, and of how many rows.

    Args:
        inferred: runs of the guide, over which it is averaged.
        latents: its latent sites, in one of them.
        batch: what it was run on.
        layout: dimensions of the log-densities.
        again: runs it on other rows, with given values: ``again(batch, replay)``.
        alone: whether its sites stand alone.

    Returns:
        Nats, None for a density that is given through a change of variables; the number of rows.
    """
    changed = any(site.observed for site in inferred[0].sites.values()) or any(
        site.auxiliary
        or any(isinstance(d, Delta) for d in (site.fn, getattr(site.fn, "base_dist", None)))
        for site in latents
    )
    num_rows = len(batch) if alone else min(len(batch), _PAIR_ROWS)
    if changed:
        return None, num_rows
    names = [site.name for site in latents]
    values = []
    for record in inferred:
        if alone:
            pairs = _pairs([record.sites[name] for name in names])
        else:
            pairs = _pairs_by_runs(names, batch[:num_rows], layout, again)
        values.append(of_pairs(pairs))
    return float(torch.stack(values).mean()), num_rows


def _rows_first(site: Site) -> Tensor:
    """The values of a site, ``(B, inner plates ..., event)``."""
    value = site.value.expand(site.fn.batch_shape + site.fn.event_shape)
    return value.movedim(-1 - len(site.fn.event_shape), 0)


def all_pairs(
    fn: Distribution, values: Tensor, masked: Callable[[Tensor], Tensor] = lambda log_r: log_r
) -> Tensor:
    """Log-densities of ``n`` draws under the laws of all ``m`` rows, ``(n, m)``, double precision.

    Args:
        fn: the laws, rows along the last of their batch dimensions.
        values: draws, ``(n, inner plates ..., event)``.
        masked: applied to log-densities.
    """
    num_rows = fn.batch_shape[-1]
    pieces = []
    for piece in values.split(max(1, _CHUNK // max(1, values.numel()))):
        log_r = masked(fn.log_prob(piece.unsqueeze(-1 - len(fn.event_shape))))
        pieces.append(log_r.reshape(len(piece), -1, num_rows).sum(1))
    return torch.cat(pieces).double()


def of_pairs(pairs: Tensor) -> Tensor:
    """Mutual information by the log-densities of all pairs of rows, ``(n, n)``; nats."""
    return (pairs.diagonal() - pairs.logsumexp(1)).mean() + math.log(len(pairs))


def _pairs(sites: list[Site]) -> Tensor:
    """``log r(z_n | x_m)`` for all pairs of rows, ``(n, m)``, of sites that stand alone."""
    total = torch.zeros((), dtype=torch.double)
    for site in sites:
        found = all_pairs(site.fn, _rows_first(site), site.masked)
        total = total.to(found.device) + found
    return total


def _pairs_by_runs(
    names: list[str], batch: MaskedBatch, layout: Layout, again: Callable[..., Recorder]
) -> Tensor:
    """The same by running the guide at every row's values for every row."""
    own = again(batch).sites
    values = {name: _rows_first(own[name]) for name in names}
    num_rows, pieces = len(batch), []
    size = max(1, 4096 // num_rows)
    for start in range(0, num_rows, size):
        count = min(size, num_rows - start)
        rows = torch.arange(num_rows, device=batch.x_t.device).repeat(count)
        replay = {}
        for name, value in values.items():
            spread = value[start : start + count].repeat_interleave(num_rows, 0)
            replay[name] = spread.movedim(0, -1 - len(own[name].fn.event_shape))
        sites = again(batch[rows], replay).sites
        log_r = layout.sum([layout.reduce(sites[name].log_prob()) for name in names])
        pieces.append(log_r.reshape(count, num_rows).double())
    return torch.cat(pieces)
