r"""KL divergences of a guide's sites from the model's in closed form, dimension by dimension, and
free bits.

Where a site's two laws factorise over the dimensions of its event, so does its KL,

.. math::
    \mathrm{KL}\Big[\prod_j r_j(z_j) \,\Big\|\, \prod_j p_j(z_j)\Big] = \sum_j
    \mathrm{KL}[r_j \| p_j],

and each term says whether that dimension carries anything. *Free bits* charge a dimension, or a
group ``G`` of ``|G|`` dimensions whose KL is only known together, at least ``f`` nats for each,

.. math::
    \sum_G \max\Big(f |G|,\; \frac{\sum_b w_b \mathrm{KL}_{G, b}}{\sum_b w_b}\Big) ,

the mean taken over the rows of a batch with their weights: below the threshold there is nothing to
gain from a smaller KL, above it nothing changes.

References:
    Kingma et al. 2016, "Improved Variational Inference with Inverse Autoregressive Flow" (arXiv
    1606.04934), equation 15.
"""

from __future__ import annotations

import math

import torch
from pyro.distributions import Categorical, Delta, Independent, Normal, OneHotCategorical
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from vadd_pyro.distributions import CodeCategorical, DiagonalNormal, OneHotCodes
from vadd_pyro.recorder import Recorder, Site

__all__ = ["closed_form", "kl_by_dimension", "latent_dimensions", "spare_nats"]


def closed_form(guide: Recorder, model: Recorder, by_dimension: bool = False) -> dict[str, Tensor]:
    """KL per latent site, if the guide draws its sites in the model's order; empty if it does not.

    Where the orders differ, a site's two distributions are given different variables and the sum
    of their KLs is no KL. A Delta stands for a density given elsewhere, and so does a factor.

    Args:
        guide, model: the two runs, the model's with the guide's values.
        by_dimension: keep the dimensions apart, as :func:`kl_by_dimension` does.

    Returns:
        Nats by name of the site, its batch shape, by dimension with one more dimension at the
        end; zero where the site is masked.
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
            if by_dimension:
                result[name] = _masked(p, kl_by_dimension(r.fn, p.fn))
            else:
                result[name] = p.masked(kl_divergence(r.fn, p.fn))
        except NotImplementedError:
            continue
    return result


def kl_by_dimension(r: Distribution, p: Distribution) -> Tensor:
    """``KL[r || p]`` of each group of dimensions of an event, as small as the closed form allows.

    Args:
        r, p: two distributions over the same event.

    Returns:
        Nats, the batch shape and one dimension of ``g`` groups: every dimension of normals, of
        products of codes and of independent laws; one group for what does not factorise. The sum
        over groups is ``kl_divergence(r, p)``.

    Raises:
        NotImplementedError: where no closed form is known.
    """
    if isinstance(r, DiagonalNormal) or isinstance(p, DiagonalNormal):
        first, second = _normal(r), _normal(p)
        if first is not None and second is not None:
            ratio = first.scale / second.scale
            shift = (first.loc - second.loc) / second.scale
            return 0.5 * (ratio.square() + shift.square() - 1) - ratio.log()
    for kind in (CodeCategorical, OneHotCodes):
        if isinstance(r, kind) and isinstance(p, kind):
            return (r.logits.exp() * (r.logits - p.logits)).sum(-1)
    if isinstance(r, Independent) and isinstance(p, Independent):
        dims = r.reinterpreted_batch_ndims
        if dims and dims == p.reinterpreted_batch_ndims and not r.base_dist.event_shape:
            return kl_divergence(r.base_dist, p.base_dist).flatten(-dims)
    return kl_divergence(r, p).unsqueeze(-1)


def _normal(distribution: Distribution) -> DiagonalNormal | Normal | None:
    """A vector of independent normals, whose ``loc`` and ``scale`` end with the event."""
    if isinstance(distribution, DiagonalNormal):
        return distribution
    base = getattr(distribution, "base_dist", None)
    vector = isinstance(base, Normal) and len(distribution.event_shape) == 1
    return base if vector else None


def _masked(site: Site, value: Tensor) -> Tensor:
    mask = site.mask.unsqueeze(-1) if isinstance(site.mask, Tensor) else site.mask
    return value if mask is None else scale_and_mask(value, 1.0, mask)


def latent_dimensions(fn: Distribution) -> int:
    """How many latent dimensions an event has: a categorical counts as one, however written."""
    if isinstance(fn, CodeCategorical | OneHotCodes):
        return int(fn.num_factors)
    inner, size = fn, 1
    while isinstance(inner, Independent):
        size *= math.prod(inner.event_shape[: inner.reinterpreted_batch_ndims])
        inner = inner.base_dist
    if isinstance(inner, Categorical | OneHotCategorical):
        return size
    return math.prod(fn.event_shape)


def spare_nats(kl: Tensor, free: float, counts: Tensor, site: Site | None = None) -> Tensor:
    """What free bits give back of a KL: added to the objective, it leaves nothing to gain from a
    smaller one.

    Args:
        kl: nats, ``(..., B, g)`` for groups along the last dimension.
        free: threshold of each group, nats.
        counts: what each row counts, ``(B,)``, zero for rows that do not.
        site: the site the groups belong to, one more for each entry of plates inside the data
            plate, and whose mask also takes rows out; without it, dimensions on the left are
            particles of one group.

    Returns:
        ``kl - free`` in groups whose weighted mean is below ``free``, exactly zero in the others,
        summed over groups, ``(..., B)``; with the gradient that cancels that of ``kl``.
    """
    with torch.no_grad():
        share = counts.to(kl.dtype).unsqueeze(-1).expand(kl.shape)
        if site is not None:
            share = _masked(site, share)
        dims = [-2] if site is not None else list(range(kl.dim() - 1))
        total = share.sum(dims, keepdim=True)
        tiny = torch.finfo(kl.dtype).tiny
        below = (kl * share).sum(dims, keepdim=True) / total.clamp_min(tiny) < free
    spare = torch.where(below, kl - free, kl.new_zeros(()))
    return (spare if site is None else _masked(site, spare)).sum(-1)
