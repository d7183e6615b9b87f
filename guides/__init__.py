"""Amortised guides: what infers the latents of a step program."""

from vadd_pyro.guides.categorical import AmortizedCategorical, AmortizedCodes
from vadd_pyro.guides.flow import AmortizedFlow
from vadd_pyro.guides.hierarchical import AmortizedHierarchical
from vadd_pyro.guides.matching import families_for, for_prior
from vadd_pyro.guides.mixture import AmortizedMixture
from vadd_pyro.guides.none import NoLatent
from vadd_pyro.guides.normal import (
    AmortizedLowRankNormal,
    AmortizedMultivariateNormal,
    AmortizedNormal,
)
from vadd_pyro.guides.relative import RelativeNormal
from vadd_pyro.guides.semi_amortized import SemiAmortizedNormal
from vadd_pyro.guides.spherical import AmortizedSpherical

__all__ = [
    "AmortizedCategorical",
    "AmortizedCodes",
    "AmortizedFlow",
    "AmortizedHierarchical",
    "AmortizedLowRankNormal",
    "AmortizedMixture",
    "AmortizedMultivariateNormal",
    "AmortizedNormal",
    "AmortizedSpherical",
    "NoLatent",
    "RelativeNormal",
    "SemiAmortizedNormal",
    "families_for",
    "for_prior",
]
