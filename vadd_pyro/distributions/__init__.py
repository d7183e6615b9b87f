"""Distributions of tokens and of latents, each as one object that Pyro takes as its own.

Beside what Pyro asks for, those of latents say how points of the unit cube are carried to them
(``transport(u)``, ``num_uniforms`` columns, the size of an event if it is not given), by which the
exact laws integrate over them.
"""

from vadd_pyro.distributions.chain import CodeChain
from vadd_pyro.distributions.codes import CodeCategorical, OneHotCodes, StraightThroughCodes
from vadd_pyro.distributions.deferred import DeferredLogits
from vadd_pyro.distributions.flow import FlowDistribution
from vadd_pyro.distributions.mixture import NormalMixture
from vadd_pyro.distributions.normal import DiagonalNormal
from vadd_pyro.distributions.sphere import ProjectedNormal
from vadd_pyro.distributions.tokens import (
    TokenCategorical,
    check_vocabulary,
    draw_categorical,
    position_log_prob,
    position_logits,
    token_logits,
)

__all__ = [
    "CodeCategorical",
    "CodeChain",
    "DeferredLogits",
    "DiagonalNormal",
    "FlowDistribution",
    "NormalMixture",
    "OneHotCodes",
    "ProjectedNormal",
    "StraightThroughCodes",
    "TokenCategorical",
    "check_vocabulary",
    "draw_categorical",
    "position_log_prob",
    "position_logits",
    "token_logits",
]
