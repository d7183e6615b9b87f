r"""Per-row log-densities of a recorded pair of programs.

Given what guide and model did on one masked batch, this gives for each row ``b``

.. math::
    \text{term}_b = \log p(x_0 \mid z) - \lambda \left[ \log r(z) - \log p(z) \right],

with the KL in closed form where that is known and allowed, small discrete sites of the model
summed out exactly,

.. math::
    \text{term}_b = \log \sum_c p(x_0, z, c) - \log \sum_c p(z, c) + \lambda \Big[ \log \sum_c p(z,
    c) - \log r(z) \Big],

a chain of codes along the row summed out by its own recursion
(:class:`~vadd_pyro.distributions.CodeChain`), enumerated sites of the guide averaged exactly, and
particles averaged inside the logarithm (importance-weighted, Burda et al. 2016) or outside, or by
the Rényi bound that holds both (Li and Turner 2016),

.. math::
    \mathcal L_\alpha = \frac{1}{1 - \alpha} \log \frac1P \sum_{p=1}^{P} w_p^{1 - \alpha},
    \qquad \log w = \log p(x_0 \mid z) - \lambda [\log r(z) - \log p(z)] .

Factors from ``poutine.scale`` and subsampled plates stand outside any logarithm. Sites outside the
data plate belong to no row and come back as one number.

References:
    Burda et al. 2016 (arXiv 1509.00519); Li and Turner 2016, "Rényi Divergence Variational
    Inference" (arXiv 1602.02311), equation 14.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from vadd_pyro.chains import along_row, chain_of, check_alone
from vadd_pyro.divergences import closed_form, latent_dimensions, spare_nats
from vadd_pyro.estimators import score_function
from vadd_pyro.recorder import Recorder, Site
from vadd_pyro.sites import Layout, check_summed

__all__ = ["RowTerms", "mean_terms", "score"]


class RowTerms(NamedTuple):
    """What a pair of programs scores on a batch, in nats.

    Args:
        rows: the objective of each row, ``(B,)``, zero for rows without a target; no row weight
            applied.
        kl: its latent part ``log r(z) - log p(z)`` (or the closed form), ``(B,)``, unweighted by
            ``lambda`` and without free bits; detached.
        shared: contribution of sites outside the data plate, a scalar, counted once; None without
            such sites.
        surrogate: a scalar equal to zero whose gradient completes that of the rows where draws are
            not reparameterised; None where all are. Row weights are already in it.
        log_weights: log importance weights, ``(P, B)``, detached; None where particles do not
            meet inside a logarithm.
    """

    rows: Tensor
    kl: Tensor
    shared: Tensor | None
    surrogate: Tensor | None = None
    log_weights: Tensor | None = None

    def loss(self, weight: Tensor | None) -> Tensor:
        """The loss, a scalar: rows with their weights ``(B,)``, what they share, and the
        score-function part.
        """
        loss = -(self.rows if weight is None else self.rows * weight).sum()
        if self.shared is not None:
            loss = loss - self.shared
        return loss if self.surrogate is None else loss - self.surrogate


def mean_terms(terms: list[RowTerms]) -> RowTerms:
    """The mean over several runs of one batch."""

    def mean(values: list[Tensor | None]) -> Tensor | None:
        present = [value for value in values if value is not None]
        return torch.stack(present).sum() / len(values) if present else None

    return RowTerms(
        torch.stack([term.rows for term in terms]).mean(0),
        torch.stack([term.kl for term in terms]).mean(0),
        mean([term.shared for term in terms]),
        mean([term.surrogate for term in terms]),
    )


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
    kl_weight: float | Tensor = 1.0,
    closed_form_kl: bool = True,
    renyi_alpha: float | None = None,
    free_bits: float = 0.0,
) -> RowTerms:
    """Per-row objective of one recorded run.

    Args:
        guide, model: the two runs, the model's with the guide's values.
        active: rows that have a target, ``(B,)`` bool; the others contribute nothing.
        weight: row weights, ``(B,)``, used for the score-function surrogate and for the mean KL
            that free bits compare only.
        row_plates: how many batch dimensions belong to plates of the programs (1: the data plate
            alone).
        num_particles: how many particles the run holds.
        vectorized: whether they stand in one run along a dimension of their own.
        importance_weighted: average them inside the logarithm.
        kl_weight: factor of the latent part, a number or a scalar.
        closed_form_kl: use registered KL divergences where that is exact.
        renyi_alpha: ``alpha`` of the Rényi bound; None for the others.
        free_bits: nats of each latent dimension that cost nothing.
    """
    if importance_weighted and num_particles > 1:
        renyi_alpha = 0.0
    several_inside = renyi_alpha is not None
    power = 1.0 if renyi_alpha is None else 1.0 - renyi_alpha
    layout = Layout(guide, model, active, row_plates, vectorized)
    summed = [site for site in model.sites.values() if site.enum_dim is not None]
    averaged = [site for site in guide.sites.values() if site.enum_dim is not None]
    one_scale = bool(summed) or bool(averaged) or several_inside or free_bits > 0
    check_summed(summed + averaged, layout)
    chain = chain_of(summed)
    if chain is not None:
        check_alone(chain, guide, model)
        summed = []

    def scaled(site: Site, value: Tensor) -> Tensor:
        inside = one_scale and layout.rows[site.name]
        return value if inside else scale_and_mask(value, site.scale)

    closed = {}
    if closed_form_kl and num_particles == 1 and not summed and not averaged:
        closed = closed_form(guide, model, by_dimension=free_bits > 0)

    data: list[Tensor] = []
    prior: list[Tensor] = []
    posterior: list[Tensor] = []
    shared: list[Tensor] = []
    closed_rows: list[Tensor] = []
    undifferentiated: list[tuple[Site, Tensor]] = []
    undifferentiated_shared: list[Tensor] = []
    row_sites: list[Site] = []
    spare: list[Tensor] = []
    drawn_dimensions = 0
    counts = active if weight is None or not free_bits else active * weight

    for name, site in model.sites.items():
        is_row = layout.rows[name]
        if chain is not None:
            row_sites.append(site)
            if site is not chain:  # the tokens
                data.append(layout.reduce(scaled(site, along_row(chain, site))))
            continue
        if name in closed:
            value = closed[name]
            if free_bits:
                if is_row:
                    row_sites.append(site)
                    free = free_bits * latent_dimensions(site.fn) / value.shape[-1]
                    spare.append(layout.reduce(spare_nats(value, free, counts, site)))
                value = value.sum(-1)
            value = scaled(site, value)
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
                # Its own gradient has mean zero where it stands outside a logarithm.
                posterior.append(value.detach() if drawn and not several_inside else value)
                if free_bits and not (site.observed or site.auxiliary):
                    if site.mask is not None:
                        raise ValueError(
                            f"site {name!r} is masked and its KL is estimated by draws: "
                            "free_bits cannot tell there which rows count; mask the target "
                            "instead, or use a pair with a closed-form KL"
                        )
                    inner = math.prod(site.fn.batch_shape[-row_plates:-1])
                    drawn_dimensions += inner * latent_dimensions(site.fn)
            if site.enum_dim is not None:
                averaged_log_prob.append(layout.reduce(site.log_weight()))
            elif drawn:
                undifferentiated.append((site, layout.reduce(log_prob)))
        else:
            if name not in closed:
                shared.append(layout.total(value) * -kl_weight)
            if drawn:
                undifferentiated_shared.append(log_prob)
    if shared and several_inside:
        raise ValueError(
            "importance weighting is per row, but a latent or factor outside the data plate is "
            "shared by all rows: use importance_weighted=False and renyi_alpha=None"
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
    # A tensor's value is not looked at: it may be one of a graph that is being traced.
    known = None if isinstance(kl_weight, Tensor) else kl_weight
    if known == 0:
        total = log_x.expand(torch.broadcast_shapes(log_x.shape, kl.shape))
    else:
        total = log_x - kl_weight * kl if known != 1 else log_x - kl

    if averaged_log_prob:
        average_dims = [site.enum_dim for site in averaged if site.enum_dim is not None]
        log_q = layout.sum(averaged_log_prob)
        total, kl, log_q = torch.broadcast_tensors(total, kl, log_q)
        probability = log_q.exp()
        possible = probability > 0
        kl = (probability * kl.where(possible, kl.new_zeros(()))).sum(average_dims, keepdim=True)
        if several_inside:
            powered = (total * power).where(possible, total.new_full((), -math.inf))
            total = _logsumexp(powered + log_q, average_dims) / power
        else:
            total = (probability * total.where(possible, total.new_zeros(()))).sum(
                average_dims, keepdim=True
            )

    if free_bits and known != 0:
        if drawn_dimensions:
            group = layout.sum([*posterior, *(-value for value in prior)]) if closed else kl
            free = free_bits * drawn_dimensions
            spare.append(spare_nats(group.unsqueeze(-1), free, counts))
        if spare:
            total = total + kl_weight * layout.sum(spare)

    learning_signal = total
    log_weights = None
    if layout.particle_dim is not None:
        dim = layout.particle_dim
        if several_inside:
            rows = total.detach().expand(*total.shape[:-1], layout.num_rows)
            log_weights = rows.reshape(num_particles, layout.num_rows)
            powered = total if power == 1 else total * power
            total = _logsumexp(powered, [dim]) - math.log(num_particles)
            total = learning_signal = total if power == 1 else total / power
        elif total.dim() >= -dim:
            total = total.mean(dim, keepdim=True)
        kl = kl.mean(dim, keepdim=True) if kl.dim() >= -dim else kl

    factor = _common_scale(row_sites) if one_scale else None
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
        surrogate = score_function(
            undifferentiated,
            undifferentiated_shared,
            learning_signal,
            row,
            shared_total,
            active=active,
            weight=weight,
            layout=layout,
            inside=several_inside,
            num_particles=num_particles,
        )
    kl_row = torch.where(active, kl_row, zero)
    return RowTerms(row, kl_row, shared_total, surrogate, log_weights)


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
                "sites, importance weights or free bits all sites of a row need the same scale, "
                "because it stands outside the logarithm"
            )
    if not isinstance(first, Tensor) and first == 1.0:
        return None
    return first


def _logsumexp(value: Tensor, dims: list[int]) -> Tensor:
    present = [dim for dim in dims if value.dim() >= -dim]
    return torch.logsumexp(value, present, keepdim=True) if present else value
