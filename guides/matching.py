"""A guide for a prior: which family fits the sites that a prior samples.

The prior is run once on a batch of its own making, and its latent sites looked at: their supports
say which families fit.

======================== ==============================================================
prior's site             families, the default first
======================== ==============================================================
``"z"``, real vectors    ``mean_field``, ``low_rank``, ``full``, ``mixture``, ``flow``,
                         ``semi_amortized``; ``relative`` to a diagonal normal
                         or a mixture of them
``"z"``, unit vectors    ``spherical``
``"z"``, one code        ``none`` (summed out exactly), ``enumerate``, ``score``
``"z"``, several codes   ``none`` up to 4,096 combinations, ``score``, ``enumerate``
``"z"``, one-hot codes   ``straight_through``
``"z"``, a chain         ``none`` (summed out by recursion)
several real sites       ``hierarchical``, ``bottom_up``
other supports           ``hierarchical``: normals carried to the support
VampPrior                ``mean_field`` on the encoder that the prior holds
======================== ==============================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.distributions import constraints
from torch import nn
from torch.distributions import biject_to

from vadd_pyro.distributions import (
    CodeCategorical,
    CodeChain,
    DiagonalNormal,
    NormalMixture,
    OneHotCodes,
)
from vadd_pyro.guides.categorical import AmortizedCategorical, AmortizedCodes
from vadd_pyro.guides.flow import AmortizedFlow
from vadd_pyro.guides.hierarchical import AmortizedHierarchical
from vadd_pyro.guides.mixture import AmortizedMixture
from vadd_pyro.guides.none import NoLatent
from vadd_pyro.guides.normal import (
    AmortizedLowRankNormal,
    AmortizedMultivariateNormal,
    AmortizedNormal,
    NormalEncoder,
)
from vadd_pyro.guides.relative import RelativeNormal
from vadd_pyro.guides.semi_amortized import SemiAmortizedNormal
from vadd_pyro.guides.spherical import AmortizedSpherical
from vadd_pyro.process import MaskedBatch
from vadd_pyro.programs import draw_latent
from vadd_pyro.recorder import Recorder, Site

__all__ = ["describe", "families_for", "for_prior", "is_real", "look_at"]

_REAL = ("mean_field", "low_rank", "full", "mixture", "flow", "semi_amortized")


def look_at(
    prior: Callable[[MaskedBatch], Any], length: int, vocab_size: int
) -> tuple[list[Site], Any]:
    """The latent sites of a prior and what it gives the decoder, on an all-masked batch of two
    rows.
    """
    x_t = torch.full((2, length), vocab_size)
    parameter = next(prior.parameters(), None) if isinstance(prior, nn.Module) else None
    x_t = x_t if parameter is None else x_t.to(parameter.device)
    hidden = torch.ones_like(x_t, dtype=torch.bool)
    batch = MaskedBatch(x_t, torch.ones(2, device=x_t.device), hidden, hidden)
    with (
        torch.random.fork_rng(),
        torch.no_grad(),
        Recorder() as recorder,
        pyro.plate("data", 2, dim=-1),
    ):
        z = draw_latent(prior, batch)
    return [site for site in recorder.sites.values() if not site.observed], z


def _own_encoder(prior: Any) -> Any:
    """The recognition network that a VampPrior shares with its guide; None for other priors."""
    encoder = getattr(prior, "encoder", None)
    return encoder if hasattr(encoder, "soft") else None


def _families(sites: list[Site], prior: Any) -> tuple[str, ...]:
    if not sites:
        return ("none",)
    if _own_encoder(prior) is not None:
        return ("mean_field",)
    if any(frame.name != "data" for site in sites for frame in site.frames):
        return ()  # a plate of the prior's own: its guide needs the same
    if len(sites) == 1:
        (site,) = sites
        law = site.fn
        if isinstance(law, CodeChain):
            return ("none",)
        if isinstance(law, OneHotCodes):
            return ("straight_through",)
        if isinstance(law, CodeCategorical):
            few = law.has_enumerate_support
            return ("none", "score", "enumerate") if few else ("score",)
        if getattr(law, "has_enumerate_support", False):
            one_code = hasattr(law, "logits") and law.event_shape == () and site.name == "z"
            return ("none", "enumerate", "score") if one_code else ("none",)
        try:
            support = law.support
        except NotImplementedError:  # the law does not tell
            return ()
        if support is constraints.sphere:
            return ("spherical",) if site.name == "z" else ()
        if is_real(law) and site.name == "z":
            normals = isinstance(law, DiagonalNormal | NormalMixture)
            return (*_REAL, "relative") if normals else _REAL
    discrete = [bool(getattr(site.fn, "has_enumerate_support", False)) for site in sites]
    if all(discrete):
        return ("none",)
    if any(discrete):
        return ()
    try:
        for site in sites:
            biject_to(site.fn.support)
    except NotImplementedError:  # nothing is known to carry normals there
        return ()
    return ("hierarchical", "bottom_up")


def is_real(law: Any) -> bool:
    """Whether a law is one of vectors of any real numbers."""
    support = law.support
    return len(law.event_shape) == 1 and (
        support is constraints.real_vector
        or (
            isinstance(support, constraints.independent)
            and support.base_constraint is constraints.real
        )
    )


def describe(sites: list[Site]) -> str:
    """Latent sites for a message: names, laws and shapes."""
    return ", ".join(
        f"{site.name!r} ~ {type(getattr(site.fn, 'base_dist', site.fn)).__name__} with events of "
        f"shape {tuple(site.fn.event_shape)}"
        for site in sites
    )


def _features(encoder: Any) -> Any:
    """The features network: an encoder's own, or what was given if it is one."""
    return getattr(encoder, "features", encoder)


def families_for(prior: Callable[[MaskedBatch], Any], encoder: Any) -> tuple[str, ...]:
    """Names of the guide families that fit a prior, the default first.

    Args:
        prior: ``prior(batch)``, as :class:`vadd_pyro.models.VADD` takes it.
        encoder: says ``length`` and ``vocab_size``, such as :class:`vadd_pyro.nn.MLPFeatures`.
    """
    features = _features(encoder)
    sites, _ = look_at(prior, features.length, features.vocab_size)
    return _families(sites, prior)


def for_prior(
    prior: Callable[[MaskedBatch], Any],
    encoder: Any = None,
    family: str | None = None,
    **options: Any,
) -> Any:
    """A guide whose sites are those of a prior.

    Args:
        prior: ``prior(batch)``, as :class:`vadd_pyro.models.VADD` takes it.
        encoder: recognition features, such as :class:`vadd_pyro.nn.MLPFeatures`, or an encoder
            that has them, such as :class:`vadd_pyro.nn.MLPEncoder`; may be left out for a
            VampPrior, which holds its own.
        family: a name of the table above; by default the first that fits.
        options: further arguments of the family, such as ``rank``, ``num_components``, or
            ``model`` and ``elbo`` for ``semi_amortized``.

    Raises:
        ValueError: for a family that does not fit, naming the prior's sites and the families that
            do.
    """
    own = _own_encoder(prior)
    if own is not None:
        if encoder not in (None, own, _features(own)) or options:
            raise ValueError(
                "a VampPrior goes with the encoder that it holds and no further options; got "
                f"encoder={encoder!r} and {options or 'no options'}"
            )
        encoder = own
    features = _features(encoder)
    if not (hasattr(features, "length") and hasattr(features, "vocab_size")):
        raise TypeError(
            "encoder must give features (B, F) and say feature_dim, length and vocab_size, such "
            f"as vadd_pyro.nn.MLPFeatures; got {encoder!r}"
        )
    sites, _ = look_at(prior, features.length, features.vocab_size)
    fitting = _families(sites, prior)
    if family is None and fitting:
        family = fitting[0]
    if family not in fitting:
        raise ValueError(
            f"no guide of family {family!r} fits the prior's sites {describe(sites) or '(none)'}:"
            f" expected one of {', '.join(fitting) or 'none that is ready: write one'}"
        )
    if own is not None:
        return AmortizedNormal(own)
    return _build(family, prior, sites, encoder, features, options)


def _build(
    family: str, prior: Any, sites: list[Site], encoder: Any, features: Any, options: Any
) -> Any:
    law: Any = sites[0].fn if sites else None
    size = law.event_shape[-1] if law is not None and law.event_shape else 1
    fits = getattr(encoder, "latent_dim", None) == size
    if family == "none":
        return NoLatent(**options)
    if family in ("mean_field", "semi_amortized"):
        normal = encoder if fits else NormalEncoder(features, size)
        if family == "mean_field":
            return AmortizedNormal(normal, **options)
        return SemiAmortizedNormal(normal, **options)
    if family == "relative":
        return RelativeNormal(features, size, prior, **options)
    if family in ("enumerate", "score") and not isinstance(law, CodeCategorical):
        return AmortizedCategorical(features, law.logits.shape[-1], family, **options)
    if family in ("enumerate", "score", "straight_through"):
        return AmortizedCodes(features, law.num_codes, law.num_factors, family, **options)
    if family in ("hierarchical", "bottom_up"):
        sizes, supports = {}, {}
        for site in sites:
            shape, support = site.fn.event_shape, site.fn.support
            if is_real(site.fn):
                sizes[site.name] = shape[0]
            else:
                sizes[site.name] = biject_to(support).inverse_shape(shape).numel()
                supports[site.name] = (shape, support)
        top_down = family == "hierarchical"
        return AmortizedHierarchical(
            features, sizes, top_down=top_down, supports=supports, **options
        )
    families: dict[str, Any] = {
        "low_rank": AmortizedLowRankNormal,
        "full": AmortizedMultivariateNormal,
        "mixture": AmortizedMixture,
        "flow": AmortizedFlow,
        "spherical": AmortizedSpherical,
    }
    return families[family](features, size, **options)
