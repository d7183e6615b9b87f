r"""Parameters of a prior, learned once or read off the state.

.. math::
    \theta(x_t, t) = \theta_0 + W h(x_t, t),

with learned :math:`\theta_0`, features ``h`` of the state, and ``W`` zero before training: a
conditional prior starts as its unconditional one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from vadd_pyro.process import MaskedBatch, check_size

__all__ = [
    "Conditioned",
    "Context",
    "LocationScale",
    "check_context",
    "features_of",
    "unit_scale",
]

Context = Callable[[MaskedBatch], Tensor]


def check_context(context: Context | None) -> None:
    """Check that a context is a network that says how many features it gives.

    Raises:
        TypeError: naming the argument.
    """
    if context is not None and not (callable(context) and hasattr(context, "feature_dim")):
        raise TypeError(
            "context must map a batch to features (B, F), or (B, D, F) for a chain, and have an "
            f"attribute feature_dim = F, such as vadd_pyro.nn.StateFeatures; got {context!r}"
        )


class Conditioned(nn.Module):
    """A learned tensor, shifted by a linear map of the state's features where there is a context.

    Args:
        initial: value before training, any shape ``S``.
        context: the network whose features are given to :meth:`forward`, or None. It is not kept
            here: priors with several such tensors compute its features once.
    """

    def __init__(self, initial: Tensor, context: Context | None = None) -> None:
        super().__init__()
        check_context(context)
        self.value = nn.Parameter(initial)
        self.shift: nn.Linear | None = None
        if context is not None:
            features: int = context.feature_dim  # type: ignore[attr-defined]
            self.shift = nn.Linear(features, initial.numel(), bias=False)
            nn.init.zeros_(self.shift.weight)

    def forward(self, features: Tensor | None) -> Tensor:
        """``S``, or ``(B,) + S`` for features ``(B, F)``."""
        if self.shift is None or features is None:
            return self.value
        return self.value + self.shift(features).reshape(*features.shape[:-1], *self.value.shape)


def features_of(context: Context | None, batch: MaskedBatch) -> Tensor | None:
    """Features of the state, ``(B, F)``, or of its positions, ``(B, D, F)``; None without a
    context.
    """
    return None if context is None else context(batch)


def unit_scale(*shape: int) -> Tensor:
    """Raw values whose softplus is one."""
    return torch.full(shape, 0.541324854612918)


class LocationScale(nn.Module):
    """Learned location and scale of every coordinate, standard before training.

    Args:
        latent_dim: size ``d`` of ``z``.
        context: features of the state that shift both; None for an unconditional prior.
    """

    def __init__(self, latent_dim: int, context: Context | None = None) -> None:
        super().__init__()
        check_size("latent_dim", latent_dim)
        self.latent_dim = latent_dim
        self.context = context
        self.z_loc = Conditioned(torch.zeros(latent_dim), context)
        self.z_raw = Conditioned(unit_scale(latent_dim), context)

    def parameters_at(self, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        """``(z_loc, z_scale)``, each ``(d,)`` or, with a context, ``(B, d)``."""
        h = features_of(self.context, batch)
        return self.z_loc(h), softplus(self.z_raw(h)) + 1e-4
