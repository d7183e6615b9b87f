r"""What a prior may look at: features of the state ``(x_t, t)``, and a normal that is read off
them,

.. math::
    p(z \mid x_t, t) = N\big(m(x_t, t), \mathrm{diag}(s(x_t, t)^2)\big) .

Any recognition network becomes one of the state by :meth:`~vadd_pyro.nn.base.Features.state`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vadd_pyro.nn.base import Features, normal_parameters
from vadd_pyro.nn.conditioning import full_precision
from vadd_pyro.process import MaskedBatch, check_size

__all__ = ["PositionState", "State", "StateNormal"]


class State(nn.Module):
    """Features ``(B, F)`` of the state ``(x_t, t)``, by a network of any backbone.

    Give it features of its own: those of a guide see ``x_0``, and what they share with a prior is
    trained by both.

    Args:
        features: such as :class:`~vadd_pyro.nn.ResidualFeatures`. The time is told if they were
            made with ``time_conditioning``.
        scale: what they are multiplied by. Adam moves all weights of a linear map of ``F``
            features at once, so that what a prior reads off features of about one moves up to
            ``F`` times as fast as a number of its own; ``F ** -0.5`` takes the root of that away.

    Shapes:
        a :class:`MaskedBatch` of ``B`` rows, whose ``x_0`` may be None, gives ``(B, F)``; only
        ``x_t`` and ``t`` are read.

    Raises:
        TypeError: for features that do not tell a state.
    """

    def __init__(self, features: Features, scale: float = 1.0) -> None:
        super().__init__()
        if not (hasattr(features, "state") and hasattr(features, "feature_dim")):
            raise TypeError(
                "features must have feature_dim and state(batch), such as "
                f"vadd_pyro.nn.ResidualFeatures; got {features!r}"
            )
        self.features = features
        self.feature_dim = features.feature_dim
        self.scale = scale

    def forward(self, batch: MaskedBatch) -> Tensor:
        h = self.features.state(batch)
        return h if self.scale == 1.0 else self.scale * h


class PositionState(nn.Module):
    """Features ``(B, D, F)`` of the state at each position, a linear map of those of the row, for
    priors with a latent there (:class:`vadd_pyro.models.Chain`).

    Args:
        features: of the state, such as :class:`State` or :class:`~vadd_pyro.nn.StateFeatures`.
        length: ``D``.
        feature_dim: ``F``.
    """

    def __init__(self, features: Any, length: int, feature_dim: int = 16) -> None:
        super().__init__()
        check_size("length", length)
        check_size("feature_dim", feature_dim)
        self.features = features
        self.length = length
        self.feature_dim = feature_dim
        self.positions = nn.Linear(features.feature_dim, length * feature_dim)

    def forward(self, batch: MaskedBatch) -> Tensor:
        h = full_precision(self.positions, self.features(batch))
        return h.unflatten(-1, (self.length, self.feature_dim))


class StateNormal(nn.Module):
    """Prior network: ``(z_loc, z_scale)`` of ``p(z | x_t, t)``, standard normal before training.

    Args:
        features: of the state, such as :class:`State` or :class:`~vadd_pyro.nn.StateFeatures`.
        latent_dim: size ``d`` of the latent.

    Shapes:
        a :class:`MaskedBatch` of ``B`` rows gives two tensors ``(B, d)``; only ``x_t`` and ``t``
        are read.
    """

    def __init__(self, features: Any, latent_dim: int) -> None:
        super().__init__()
        check_size("latent_dim", latent_dim)
        self.latent_dim = latent_dim
        self.features = features
        self.head = nn.Linear(features.feature_dim, 2 * latent_dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        return normal_parameters(full_precision(self.head, self.features(batch)))
