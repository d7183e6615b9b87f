r"""Guides over codes: enumerated, by the score function with a learned baseline, and
straight-through.

.. math::
    r(c \mid x_0, x_t) = \prod_l r_l(c_l \mid h), \qquad h = h(x_0, x_t)

``"enumerate"`` averages the objective over all codes exactly; ``"score"`` draws them and uses
:math:`(f - b) \nabla \log r` with a baseline ``b`` learned from the features (Mnih and Gregor
2014, arXiv 1402.0030): unbiased, of higher variance, for any number of codes.
``"straight_through"`` passes gradients through one-hot draws (Jang et al. 2017, arXiv
1611.01144): biased, of low variance; the prior's site must be one-hot.

A small categorical latent needs none of them: left without a guide, it is summed out exactly,
which is tighter than any of these.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from vadd_pyro.distributions import CodeCategorical, StraightThroughCodes
from vadd_pyro.distributions.codes import MAX_SUPPORT
from vadd_pyro.guides.features import Features, Head
from vadd_pyro.process import MaskedBatch, check_size
from vadd_pyro.programs import Program

__all__ = ["AmortizedCategorical", "AmortizedCodes"]


def _check_estimator(estimator: str, known: tuple[str, ...]) -> None:
    if estimator not in known:
        raise ValueError(f"estimator must be one of {', '.join(known)}, got {estimator!r}")


class _CodeGuide(Program):
    """Features, logits, and a baseline where draws are scored."""

    def __init__(self, features: Features, size: int, estimator: str) -> None:
        super().__init__()
        self.head = Head(features, size, gain=0.1)
        self.estimator = estimator
        self.baseline: nn.Module | None = None
        if estimator == "score":
            width = min(64, self.head.linear.in_features)
            self.baseline = nn.Sequential(
                nn.Linear(self.head.linear.in_features, width),
                nn.SiLU(),
                nn.Linear(width, 1),
                nn.Flatten(0),
            )

    def _logits_and_hints(self, batch: MaskedBatch) -> tuple[Tensor, dict[str, Any]]:
        h = self.head.features(batch)
        hints: dict[str, Any] = {}
        if self.estimator == "enumerate":
            hints = {"enumerate": "parallel"}
        elif self.baseline is not None:
            hints = {"baseline": {"nn_baseline": self.baseline, "nn_baseline_input": h.detach()}}
        return self.head.linear(h), hints


class AmortizedCategorical(_CodeGuide):
    """Samples ``"z"``, one code a row, for :class:`vadd_pyro.models.Categorical`.

    Args:
        features: recognition features, such as :class:`vadd_pyro.nn.MLPFeatures`.
        num_codes: ``C``.
        estimator: ``"enumerate"`` or ``"score"``.
    """

    def __init__(self, features: Features, num_codes: int, estimator: str = "enumerate") -> None:
        check_size("num_codes", num_codes)
        _check_estimator(estimator, ("enumerate", "score"))
        super().__init__(features, num_codes, estimator)

    def forward(self, batch: MaskedBatch) -> Tensor:
        logits, hints = self._logits_and_hints(batch)
        with pyro.plate("data", len(batch), dim=-1):
            return pyro.sample("z", dist.Categorical(logits=logits), infer=hints)


class AmortizedCodes(_CodeGuide):
    """Samples ``"z"``, ``L`` codes a row, for :class:`vadd_pyro.models.ProductOfCategoricals`.

    Args:
        features: recognition features, such as :class:`vadd_pyro.nn.MLPFeatures`.
        num_codes: ``C``.
        num_factors: ``L``.
        estimator: ``"score"``; ``"enumerate"``, up to 4,096 combinations; or
            ``"straight_through"``, for a prior with ``one_hot=True``.
        temperature: of the relaxation, for ``"straight_through"``.
    """

    def __init__(
        self,
        features: Features,
        num_codes: int,
        num_factors: int,
        estimator: str = "score",
        *,
        temperature: float = 1.0,
    ) -> None:
        check_size("num_codes", num_codes)
        check_size("num_factors", num_factors)
        _check_estimator(estimator, ("enumerate", "score", "straight_through"))
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature!r}")
        if estimator == "enumerate" and num_codes**num_factors > MAX_SUPPORT:
            raise ValueError(
                f"estimator 'enumerate' takes up to {MAX_SUPPORT:,} combinations, got "
                f"{num_codes}^{num_factors} = {num_codes**num_factors:,}: use 'score'"
            )
        super().__init__(features, num_factors * num_codes, estimator)
        self.shape = (num_factors, num_codes)
        self.temperature = float(temperature)

    def forward(self, batch: MaskedBatch) -> Tensor:
        logits, hints = self._logits_and_hints(batch)
        logits = logits.unflatten(-1, self.shape)
        law: dist.TorchDistribution = CodeCategorical(logits)
        if self.estimator == "straight_through":
            law = StraightThroughCodes(logits, self.temperature)
        with pyro.plate("data", len(batch), dim=-1):
            return pyro.sample("z", law, infer=hints)
