"""What the latent knows, and whether the guide can be trusted: draws, diagnostics, ArviZ data."""

from vadd_pyro.inspection.draws import (
    LatentDraws,
    posterior_draws,
    posterior_predictive,
    prior_draws,
)
from vadd_pyro.inspection.scoring import guide_log_density, model_log_density

__all__ = [
    "LatentDraws",
    "guide_log_density",
    "model_log_density",
    "posterior_draws",
    "posterior_predictive",
    "prior_draws",
]
