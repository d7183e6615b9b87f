r"""Per-row log-densities of a recorded pair of programs.

Given what guide and model did on one masked batch, this gives for each row ``b``

.. math::
    \text{term}_b = \log p(x_0 \mid z) - \lambda \left[ \log r(z) - \log p(z) \right],

with the KL in closed form where that is known and allowed, small discrete sites of the model
summed out exactly,

.. math::
    \text{term}_b = \log \sum_c p(x_0, z, c) - \log \sum_c p(z, c) + \lambda \Big[ \log \sum_c p(z,
    c) - \log r(z) \Big],

enumerated sites of the guide averaged exactly, and particles averaged inside the logarithm
(importance-weighted, Burda et al. 2016) or outside. Factors from ``poutine.scale`` and subsampled
plates stand outside any logarithm. Sites outside the data plate belong to no row and come back as
one number.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from vadd_pyro.recorder import Recorder, Site
from vadd_pyro.sites import Layout, check_summed

__all__ = ["RowTerms", "score"]


class RowTerms(NamedTuple):
    """What a pair of programs scores on a batch, in nats.

    Args:
        rows: the objective of each row, ``(B,)``, zero for rows without a target; no row weight
            applied.
        kl: its latent part ``log r(z) - log p(z)`` (or the closed form), ``(B,)``, unweighted by
            ``lambda``; detached.
        shared: contribution of sites outside the data plate, a scalar, counted once; None without
            such sites.
        surrogate: a scalar equal to zero whose gradient completes that of the rows where draws are
            not reparameterised; None where all are. Row weights are already in it.
    """

    rows: Tensor
    kl: Tensor
    shared: Tensor | None
    surrogate: Tensor | None = None


def score(
    guide: Recorder,
    model: Recorder,
    *,
    active: Tensor,
    weight: Tensor | None,
    row_plates: int = 1,
    num_particles: int = 1,
    vectorized: bool = False,
    importance_weighted: bool = False,
    kl_weight: float = 1.0,
    closed_form_kl: bool = True,
) -> RowTerms:
    """Per-row objective of one recorded run.

    Args:
        guide, model: the two runs, the model's with the guide's values.
        active: rows that have a target, ``(B,)`` bool; the others contribute nothing.
        weight: row weights, ``(B,)``, used for the score-function surrogate only.
        row_plates: how many batch dimensions belong to plates of the programs (1: the data plate
            alone).
        num_particles: how many particles the run holds.
        vectorized: whether they stand in one run along a dimension of their own.
        importance_weighted: average them inside the logarithm.
        kl_weight: factor of the latent part.
        closed_form_kl: use registered KL divergences where that is exact.
    """
    importance_weighted = importance_weighted and num_particles > 1
    layout = Layout(guide, model, active, row_plates, vectorized)
    summed = [site for site in model.sites.values() if site.enum_dim is not None]
    averaged = [site for site in guide.sites.values() if site.enum_dim is not None]
    inside_log = bool(summed) or bool(averaged) or importance_weighted
    check_summed(summed + averaged, layout)

    def scaled(site: Site, value: Tensor) -> Tensor:
        inside = inside_log and layout.rows[site.name]
        return value if inside else scale_and_mask(value, site.scale)

    closed = {}
    if closed_form_kl and num_particles == 1 and not summed and not averaged:
        closed = _closed_form(guide, model)

    data: list[Tensor] = []
    prior: list[Tensor] = []
    posterior: list[Tensor] = []
    shared: list[Tensor] = []
    closed_rows: list[Tensor] = []
    undifferentiated: list[Tensor] = []
    undifferentiated_shared: list[Tensor] = []
    row_sites: list[Site] = []

    for name, site in model.sites.items():
        is_row = layout.rows[name]
        if name in closed:
            value = scaled(site, closed[name])
            if is_row:
                closed_rows.append(layout.reduce(value))
            else:
                shared.append(value.sum() * -kl_weight)
            continue
        value = scaled(site, site.log_weight() if site.enum_dim is not None else site.log_prob())
        if is_row:
            row_sites.append(site)
            (data if site.observed else prior).append(layout.reduce(value))
        else:
            shared.append(layout.total(value) * (1.0 if site.observed else kl_weight))
    averaged_log_prob: list[Tensor] = []
    for name, site in guide.sites.items():
        drawn = (
            not site.observed
            and site.enum_dim is None
            and not getattr(site.fn, "has_rsample", False)
        )
        if name in closed and not drawn:
            continue
        log_prob = site.log_prob()
        value = scaled(site, log_prob)
        if layout.rows[name]:
            row_sites.append(site)
            value = layout.reduce(value)
            if name not in closed:
                posterior.append(value)
            if site.enum_dim is not None:
                averaged_log_prob.append(layout.reduce(site.log_weight()))
            elif drawn:
                undifferentiated.append(layout.reduce(log_prob))
        else:
            if name not in closed:
                shared.append(layout.total(value) * -kl_weight)
            if drawn:
                undifferentiated_shared.append(log_prob)
    if shared and importance_weighted:
        raise ValueError(
            "importance weighting is per row, but a latent or factor outside the data plate is "
            "shared by all rows: use importance_weighted=False"
        )

    dims = [site.enum_dim for site in summed if site.enum_dim is not None]
    log_x = layout.sum(data)
    if dims:
        log_z = layout.sum(prior)
        joint = _logsumexp(log_x + log_z, dims)
        drawn_sites = len(prior) > len(summed)  # else the codes' own probabilities sum to one
        prior = [_logsumexp(log_z, dims)] if drawn_sites else []
        log_x = joint - prior[0] if drawn_sites else joint
    kl = layout.sum([*closed_rows, *posterior, *(-value for value in prior)])
    if kl_weight == 0:
        total = log_x.expand(torch.broadcast_shapes(log_x.shape, kl.shape))
    else:
        total = log_x - kl_weight * kl if kl_weight != 1 else log_x - kl

    if averaged_log_prob:
        average_dims = [site.enum_dim for site in averaged if site.enum_dim is not None]
        log_q = layout.sum(averaged_log_prob)
        total, kl, log_q = torch.broadcast_tensors(total, kl, log_q)
        probability = log_q.exp()
        possible = probability > 0
        kl = (probability * kl.where(possible, kl.new_zeros(()))).sum(average_dims, keepdim=True)
        if importance_weighted:
            total = _logsumexp(
                total.where(possible, total.new_full((), -math.inf)) + log_q, average_dims
            )
        else:
            total = (probability * total.where(possible, total.new_zeros(()))).sum(
                average_dims, keepdim=True
            )

    learning_signal = total
    if layout.particle_dim is not None:
        dim = layout.particle_dim
        if importance_weighted:
            total = learning_signal = _logsumexp(total, [dim]) - math.log(num_particles)
        elif total.dim() >= -dim:
            total = total.mean(dim, keepdim=True)
        kl = kl.mean(dim, keepdim=True) if kl.dim() >= -dim else kl

    factor = _common_scale(row_sites) if inside_log else None
    row = total.expand(*total.shape[:-1], layout.num_rows).reshape(layout.num_rows)
    kl_row = kl.detach().reshape(-1)
    if factor is not None:
        row, kl_row, learning_signal = row * factor, kl_row * factor, learning_signal * factor
    zero = row.new_zeros(())
    row = torch.where(active, row, zero)
    shared_total = torch.stack([s.sum() for s in shared]).sum() if shared else None

    surrogate = None
    if undifferentiated or undifferentiated_shared:
        if undifferentiated and averaged:
            raise ValueError(
                "the guide mixes enumerated sites with draws that are not reparameterised: "
                "enumerate all of them or none"
            )
        inside = importance_weighted or layout.particle_dim is None
        surrogate = _surrogate(
            undifferentiated,
            undifferentiated_shared,
            learning_signal,
            row,
            shared_total,
            weights=active.to(row.dtype) if weight is None else active * weight,
            layout=layout,
            share=1.0 if inside else 1.0 / num_particles,
        )
    return RowTerms(row, torch.where(active, kl_row, zero), shared_total, surrogate)


def _common_scale(sites: list[Site]) -> float | Tensor | None:
    """The one factor that stands outside the logarithm; None where it is 1."""
    scales = [site.scale for site in sites]
    first = scales[0] if scales else 1.0
    for site, scale in zip(sites, scales, strict=True):
        same = scale is first or (
            bool((torch.as_tensor(scale) == torch.as_tensor(first)).all())
            if isinstance(scale, Tensor) or isinstance(first, Tensor)
            else scale == first
        )
        if not same:
            raise ValueError(
                f"site {site.name!r} has scale {scale}, another one {first}: with summed-out "
                "sites or importance weights all sites of a row need the same scale, because it "
                "stands outside the logarithm"
            )
    if not isinstance(first, Tensor) and first == 1.0:
        return None
    return first


def _closed_form(guide: Recorder, model: Recorder) -> dict[str, Tensor]:
    """KL per latent site, if the guide draws its sites in the model's order; empty if it does not.

    Where the orders differ, a site's two distributions are given different variables and the sum
    of their KLs is no KL. A Delta stands for a density given elsewhere, and so does a factor.
    """
    order = [name for name, site in guide.sites.items() if not site.observed]
    if order != [name for name, site in model.sites.items() if not site.observed]:
        return {}
    if len(order) < len(guide.sites):
        return {}
    result = {}
    for name in order:
        r, p = guide.sites[name], model.sites[name]
        same_scale = r.scale is p.scale or (
            not isinstance(r.scale, Tensor)
            and not isinstance(p.scale, Tensor)
            and r.scale == p.scale
        )
        is_delta = any(isinstance(d, Delta) for d in (r.fn, getattr(r.fn, "base_dist", None)))
        if is_delta or r.mask is not p.mask or not same_scale:
            continue
        try:
            divergence = kl_divergence(r.fn, p.fn)
        except NotImplementedError:
            continue
        result[name] = p.masked(divergence)
    return result


def _logsumexp(value: Tensor, dims: list[int]) -> Tensor:
    present = [dim for dim in dims if value.dim() >= -dim]
    return torch.logsumexp(value, present, keepdim=True) if present else value


def _surrogate(
    undifferentiated: list[Tensor],
    undifferentiated_shared: list[Tensor],
    learning_signal: Tensor,
    row: Tensor,
    shared_total: Tensor | None,
    *,
    weights: Tensor,
    layout: Layout,
    share: float,
) -> Tensor | None:
    """Score-function part of the gradient.

    ``sum of signal.detach() * log r``, made to have the value zero.
    """
    parts = []
    if undifferentiated:
        log_r = layout.sum(undifferentiated)
        parts.append((learning_signal.detach() * log_r * share * weights).sum())
        if shared_total is not None:
            # It depends on every row's draw, and is the mean over particles already.
            parts.append(shared_total.detach() * log_r.sum())
    if undifferentiated_shared:
        signal = (row * weights).sum().detach()
        if shared_total is not None:
            signal = signal + shared_total.detach()
        parts.append(signal * torch.stack([v.sum() for v in undifferentiated_shared]).sum())
    total = torch.stack(parts).sum()
    return total - total.detach() if total.requires_grad else None
