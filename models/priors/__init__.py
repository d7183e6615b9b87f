"""Latent priors.

``prior(batch)`` gives a distribution for site ``"z"``, or samples sites of its own and gives
``z``.
"""

from vadd_pyro.models.priors.categorical import Categorical
from vadd_pyro.models.priors.normal import ConditionalNormal, MixtureOfNormals, StandardNormal

__all__ = ["Categorical", "ConditionalNormal", "MixtureOfNormals", "StandardNormal"]
