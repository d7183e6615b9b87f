"""Recognition features and the linear heads that turn them into a guide's parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vadd_pyro.nn.conditioning import full_precision
from vadd_pyro.process import MaskedBatch

__all__ = ["Features", "Head", "check_features"]

Features = Callable[[MaskedBatch], Tensor]


def check_features(features: Features) -> None:
    """Check that features say how many they are.

    Raises:
        TypeError: naming the argument.
    """
    if not callable(features) or not hasattr(features, "feature_dim"):
        raise TypeError(
            "features must map a batch to (B, F) and have an attribute feature_dim = F, such as "
            f"vadd_pyro.nn.MLPFeatures; got {features!r}"
        )


class Head(nn.Module):
    """Features and a linear map of them: ``batch -> (B, n)``, in full precision under autocast.

    Args:
        features: recognition features, ``batch -> (B, F)`` with an attribute ``feature_dim``.
        size: number ``n`` of outputs.
        gain: factor of the initial weights; small ones start the guide near the prior.
    """

    def __init__(self, features: Features, size: int, gain: float = 1.0) -> None:
        super().__init__()
        check_features(features)
        self.features = features
        self.linear = nn.Linear(features.feature_dim, size)  # type: ignore[attr-defined]
        with torch.no_grad():
            self.linear.weight.mul_(gain)
            self.linear.bias.zero_()

    def forward(self, batch: MaskedBatch) -> Tensor:
        return full_precision(self.linear, self.features(batch))
