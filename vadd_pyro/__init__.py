"""Latent-variable discrete diffusion as probabilistic programs in Pyro.

A *step program* is an ordinary Pyro model over a :class:`MaskedBatch`; training, likelihoods,
sampling, infilling and exact laws all run the same pair of model and guide. See the README for a
start, and :mod:`vadd_pyro.elbo` for the mathematics.
"""

from vadd_pyro._version import __version__
from vadd_pyro.annealing import CyclicalAnnealing, LinearAnnealing, StepAnnealing
from vadd_pyro.chain import Chain, unroll
from vadd_pyro.checkpoints import CheckpointWriteError, DamagedCheckpointError
from vadd_pyro.compiled import CompiledLoss
from vadd_pyro.distributions import DiagonalNormal, TokenCategorical
from vadd_pyro.elbo import MaskedDiffusionELBO
from vadd_pyro.exact import exact_bound, exact_distribution, exact_distributions
from vadd_pyro.grids import optimize_time_grid
from vadd_pyro.infilling import Infilling, infill
from vadd_pyro.interruption import Interrupted
from vadd_pyro.likelihood import Bound, log_likelihood_bound
from vadd_pyro.locks import InUseError
from vadd_pyro.monitor import LatentStatistics, latent_statistics
from vadd_pyro.one_token import one_token_bound
from vadd_pyro.process import MaskedBatch, MaskingProcess
from vadd_pyro.programs import Program
from vadd_pyro.sampling import sample
from vadd_pyro.schedules import (
    CosineSchedule,
    FunctionSchedule,
    LinearSchedule,
    PolynomialSchedule,
    Schedule,
)
from vadd_pyro.tempering import Tempering, tempered
from vadd_pyro.times import (
    AtomTimes,
    BalancedTimes,
    FewStepTimes,
    GridTimes,
    PartTargets,
    TimeDistribution,
    UniformTimes,
)
from vadd_pyro.training import History, NonFiniteLossError, fit, fit_guide

from vadd_pyro import data, guides, inspection, metrics, models, nn, plotting  # isort: skip
from vadd_pyro.inspection import to_arviz  # isort: skip


__all__ = [
    "AtomTimes",
    "BalancedTimes",
    "Bound",
    "Chain",
    "CheckpointWriteError",
    "CompiledLoss",
    "CosineSchedule",
    "CyclicalAnnealing",
    "DamagedCheckpointError",
    "DiagonalNormal",
    "FewStepTimes",
    "FunctionSchedule",
    "GridTimes",
    "History",
    "InUseError",
    "Infilling",
    "Interrupted",
    "LatentStatistics",
    "LinearAnnealing",
    "LinearSchedule",
    "MaskedBatch",
    "MaskedDiffusionELBO",
    "MaskingProcess",
    "NonFiniteLossError",
    "PartTargets",
    "PolynomialSchedule",
    "Program",
    "Schedule",
    "StepAnnealing",
    "Tempering",
    "TimeDistribution",
    "TokenCategorical",
    "UniformTimes",
    "__version__",
    "data",
    "exact_bound",
    "exact_distribution",
    "exact_distributions",
    "fit",
    "fit_guide",
    "guides",
    "infill",
    "inspection",
    "latent_statistics",
    "log_likelihood_bound",
    "metrics",
    "models",
    "nn",
    "one_token_bound",
    "optimize_time_grid",
    "plotting",
    "sample",
    "tempered",
    "to_arviz",
    "unroll",
]
