r"""Another prior where all is masked, in the state from which every sample starts.

.. math::
    p(z \mid x_t, t) = \begin{cases} p_1(z) & \text{if all of } x_t \text{ is masked} \\
    p_2(z) & \text{else.} \end{cases}

What the first step has to coordinate is more than what any later one has, and its posteriors lie
elsewhere: a prior fitted to those of all-masked rows (:func:`vadd_pyro.fit_prior`) is one for that
state alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vadd_pyro.distributions import DiagonalNormal, NormalMixture
from vadd_pyro.process import MaskedBatch
from vadd_pyro.programs import check_callable

__all__ = ["AtStart"]

_NEVER = -1e6  # the log-weight of a component that is not drawn: its exponential is zero


class AtStart(nn.Module):
    """One prior where all is masked, another elsewhere, one site ``"z"``.

    Args:
        first, later: two priors that give a :class:`~vadd_pyro.distributions.DiagonalNormal` or a
            :class:`~vadd_pyro.distributions.NormalMixture` of one size, such as
            :class:`vadd_pyro.models.MixtureOfNormals` and
            :class:`vadd_pyro.models.StandardNormal`.

    Raises:
        TypeError: when it is used, for priors that give something else.
        ValueError: when it is used, for latents of two sizes.
    """

    def __init__(
        self, first: Callable[[MaskedBatch], Any], later: Callable[[MaskedBatch], Any]
    ) -> None:
        super().__init__()
        check_callable("first", first)
        check_callable("later", later)
        self.first = first
        self.later = later
        self.latent_dim = getattr(first, "latent_dim", None)

    def forward(self, batch: MaskedBatch) -> NormalMixture:
        start = batch.masked.all(-1, keepdim=True)
        laws = [self._mixture(name, batch) for name in ("first", "later")]
        if laws[0].event_shape != laws[1].event_shape:
            raise ValueError(
                "first and later must have latents of one size, got "
                f"{laws[0].event_shape[0]} and {laws[1].event_shape[0]}"
            )
        if not torch.is_grad_enabled():  # a sampler's rows start together
            for law, alike in zip(laws, (start, ~start), strict=True):
                if bool(alike.all()):
                    return law
        weights = [
            torch.where(here, law.logits.log_softmax(-1), _NEVER).unsqueeze(-1)
            for law, here in zip(laws, (start, ~start), strict=True)
        ]
        return NormalMixture(
            _beside(weights).squeeze(-1),
            _beside([law.loc for law in laws]),
            _beside([law.scale for law in laws]),
        )

    def _mixture(self, name: str, batch: MaskedBatch) -> NormalMixture:
        law = getattr(self, name)(batch)
        if isinstance(law, DiagonalNormal):
            loc, scale = law.loc.unsqueeze(-2), law.scale.unsqueeze(-2)
            return NormalMixture(loc.new_zeros(1), loc, scale, validate_args=False)
        if isinstance(law, NormalMixture):
            return law
        raise TypeError(
            f"AtStart needs priors that return a DiagonalNormal or a NormalMixture, got "
            f"{type(law).__name__} from {name}"
        )


def _beside(parts: list[Tensor]) -> Tensor:
    """Parameters of components, one after another, for as many rows as any of them is for."""
    rows = torch.broadcast_shapes(*(part.shape[:-2] for part in parts))
    return torch.cat([part.expand(*rows, *part.shape[-2:]) for part in parts], -2)
