"""Runs on real data: settings and presets, training, evaluation, samples and completions.

What ``vadd-pyro train``, ``evaluate``, ``sample`` and ``infill`` do, as functions:
:func:`train` takes :class:`Settings` (or a :func:`preset`) to a run folder, :func:`load` reads it,
:func:`evaluate` measures it.
"""

from vadd_pyro.experiments.evaluation import Judge, evaluate
from vadd_pyro.experiments.presets import PRESETS, measures, preset
from vadd_pyro.experiments.report import collect, summary, write_report
from vadd_pyro.experiments.settings import Settings
from vadd_pyro.experiments.store import Experiment, load
from vadd_pyro.experiments.training import train

__all__ = [
    "PRESETS",
    "Experiment",
    "Judge",
    "Settings",
    "collect",
    "evaluate",
    "load",
    "measures",
    "preset",
    "summary",
    "train",
    "write_report",
]
