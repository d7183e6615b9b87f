"""What the latent knows, and whether the guide can be trusted.

Draws, diagnostics, ArviZ data, and :func:`inspect_pair`, which asks everything at once.
"""

from vadd_pyro.inspection.aggregate import (
    AggregatePosterior,
    aggregate_codes,
    aggregate_log_density,
    aggregate_posterior,
)
from vadd_pyro.inspection.calibration import Calibration, calibrate_guide
from vadd_pyro.inspection.conversion import load_netcdf, save_netcdf
from vadd_pyro.inspection.draws import (
    LatentDraws,
    posterior_draws,
    posterior_predictive,
    prior_draws,
)
from vadd_pyro.inspection.gaps import InferenceGaps, inference_gaps
from vadd_pyro.inspection.inspector import inspect_pair
from vadd_pyro.inspection.over_time import (
    StatisticsOverTime,
    TotalCorrelation,
    statistics_over_time,
    total_correlation,
    true_total_correlation,
)
from vadd_pyro.inspection.reference import ReferencePosterior, reference_posterior
from vadd_pyro.inspection.scoring import guide_log_density, model_log_density
from vadd_pyro.inspection.to_arviz import pareto_k, to_arviz
from vadd_pyro.inspection.verdicts import Verdict
from vadd_pyro.inspection.walks import (
    DenoisingPath,
    LatentPath,
    follow_sample,
    latent_path,
    token_probabilities,
)

__all__ = [
    "AggregatePosterior",
    "Calibration",
    "DenoisingPath",
    "InferenceGaps",
    "LatentDraws",
    "LatentPath",
    "ReferencePosterior",
    "StatisticsOverTime",
    "TotalCorrelation",
    "Verdict",
    "aggregate_codes",
    "aggregate_log_density",
    "aggregate_posterior",
    "calibrate_guide",
    "follow_sample",
    "guide_log_density",
    "inference_gaps",
    "inspect_pair",
    "latent_path",
    "load_netcdf",
    "model_log_density",
    "pareto_k",
    "posterior_draws",
    "posterior_predictive",
    "prior_draws",
    "reference_posterior",
    "save_netcdf",
    "statistics_over_time",
    "to_arviz",
    "token_probabilities",
    "total_correlation",
    "true_total_correlation",
]
