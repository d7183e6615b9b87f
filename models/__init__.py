"""Step programs and priors, ready to use and short enough to copy."""

from vadd_pyro.models.priors import (
    Categorical,
    ConditionalNormal,
    MixtureOfNormals,
    StandardNormal,
)
from vadd_pyro.models.vadd import MDM, VADD

__all__ = [
    "MDM",
    "VADD",
    "Categorical",
    "ConditionalNormal",
    "MixtureOfNormals",
    "StandardNormal",
]
