"""Latent-variable discrete diffusion as probabilistic programs in Pyro.

A *step program* is an ordinary Pyro model over a :class:`MaskedBatch`; training, likelihoods,
sampling, infilling and exact laws all run the same pair of model and guide. See the README for a
start, and :mod:`vadd_pyro.elbo` for the mathematics.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vadd_pyro._version import __version__

if TYPE_CHECKING:
    from vadd_pyro import data, guides, inspection, metrics, models, nn, plotting
    from vadd_pyro.annealing import CyclicalAnnealing, LinearAnnealing, StepAnnealing
    from vadd_pyro.chain import Chain, unroll
    from vadd_pyro.checkpoints import CheckpointWriteError, DamagedCheckpointError
    from vadd_pyro.compiled import CompiledLoss
    from vadd_pyro.distributions import DiagonalNormal, TokenCategorical
    from vadd_pyro.elbo import MaskedDiffusionELBO
    from vadd_pyro.exact import exact_bound, exact_distribution, exact_distributions
    from vadd_pyro.grids import optimize_time_grid
    from vadd_pyro.infilling import Infilling, infill
    from vadd_pyro.inspection import to_arviz
    from vadd_pyro.interruption import Interrupted
    from vadd_pyro.likelihood import Bound, log_likelihood_bound
    from vadd_pyro.locks import InUseError
    from vadd_pyro.monitor import LatentStatistics, latent_statistics
    from vadd_pyro.one_token import one_token_bound
    from vadd_pyro.process import MaskedBatch, MaskingProcess
    from vadd_pyro.programs import Program
    from vadd_pyro.refitting import PriorFit, fit_prior
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
    "PriorFit",
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
    "fit_prior",
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

# The modules from which names are imported when they are first used (PEP 562): the imports above,
# as a test holds, in a form that costs nothing.
_NAMES = {
    "annealing": ("CyclicalAnnealing", "LinearAnnealing", "StepAnnealing"),
    "chain": ("Chain", "unroll"),
    "checkpoints": ("CheckpointWriteError", "DamagedCheckpointError"),
    "compiled": ("CompiledLoss",),
    "distributions": ("DiagonalNormal", "TokenCategorical"),
    "elbo": ("MaskedDiffusionELBO",),
    "exact": ("exact_bound", "exact_distribution", "exact_distributions"),
    "grids": ("optimize_time_grid",),
    "infilling": ("Infilling", "infill"),
    "inspection": ("to_arviz",),
    "interruption": ("Interrupted",),
    "likelihood": ("Bound", "log_likelihood_bound"),
    "locks": ("InUseError",),
    "monitor": ("LatentStatistics", "latent_statistics"),
    "one_token": ("one_token_bound",),
    "process": ("MaskedBatch", "MaskingProcess"),
    "programs": ("Program",),
    "refitting": ("PriorFit", "fit_prior"),
    "sampling": ("sample",),
    "schedules": (
        "CosineSchedule",
        "FunctionSchedule",
        "LinearSchedule",
        "PolynomialSchedule",
        "Schedule",
    ),
    "tempering": ("Tempering", "tempered"),
    "times": (
        "AtomTimes",
        "BalancedTimes",
        "FewStepTimes",
        "GridTimes",
        "PartTargets",
        "TimeDistribution",
        "UniformTimes",
    ),
    "training": ("History", "NonFiniteLossError", "fit", "fit_guide"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


if not TYPE_CHECKING:  # or type checkers would believe in any name

    def __getattr__(name: str) -> Any:
        """Import a name, or a module of the package, when it is first asked for."""
        if name in _MODULES:
            value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
            globals()[name] = value
            return value
        full_name = f"{__name__}.{name}"
        if not name.startswith("_"):
            try:
                return import_module(full_name)
            except ModuleNotFoundError as error:
                if error.name != full_name:
                    raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from pkgutil import iter_modules

    modules = (module.name for module in iter_modules(__path__))
    return sorted({*globals(), *__all__, *(name for name in modules if name[0] != "_")})
