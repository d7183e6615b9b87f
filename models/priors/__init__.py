"""Latent priors.

``prior(batch)`` gives a distribution for site ``"z"``, or samples sites of its own and gives
``z``. ``prior.latent_dim`` is the size of what the decoder sees.
"""

from vadd_pyro.models.priors.categorical import Categorical, ProductOfCategoricals
from vadd_pyro.models.priors.chain import Chain
from vadd_pyro.models.priors.flow import NormalizingFlow
from vadd_pyro.models.priors.heavy_tailed import Laplace, StudentT
from vadd_pyro.models.priors.hierarchical import Hierarchical
from vadd_pyro.models.priors.mixture import MixtureOfNormals
from vadd_pyro.models.priors.normal import ConditionalNormal, LearnedNormal, StandardNormal
from vadd_pyro.models.priors.spherical import Spherical
from vadd_pyro.models.priors.start import AtStart
from vadd_pyro.models.priors.vamp import VampPrior

__all__ = [
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
