"""Step programs and priors, ready to use and short enough to copy."""

from vadd_pyro.models.priors import (
    AtStart,
    Categorical,
    Chain,
    ConditionalNormal,
    Hierarchical,
    Laplace,
    LearnedNormal,
    MixtureOfNormals,
    NormalizingFlow,
    ProductOfCategoricals,
    Spherical,
    StandardNormal,
    StudentT,
    VampPrior,
)
from vadd_pyro.models.vadd import MDM, VADD

__all__ = [
    "MDM",
    "VADD",
    "AtStart",
    "Categorical",
    "Chain",
    "ConditionalNormal",
    "Hierarchical",
    "Laplace",
    "LearnedNormal",
    "MixtureOfNormals",
    "NormalizingFlow",
    "ProductOfCategoricals",
    "Spherical",
    "StandardNormal",
    "StudentT",
    "VampPrior",
]
