r"""VampPrior: the guide at learned pseudo-inputs, so that prior and aggregate posterior meet.

.. math::
    p(z) = \frac1M \sum_{m=1}^{M} r(z \mid u_m), \qquad
    p(z \mid x_t) = \frac1M \sum_{m=1}^{M} r(z \mid u_m \text{ with what is visible in } x_t, x_t)

A pseudo-input ``u_m`` is a row of distributions over tokens, fed to the recognition network by its
expected embedding; it stands in the all-masked state (first form), or takes over what is visible
in a state (second form, ``conditional=True``), at the cost of ``M`` recognition passes per state.

References:
    Tomczak and Welling 2018 (arXiv 1705.07120).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from vadd_pyro.distributions import NormalMixture
from vadd_pyro.process import MaskedBatch, check_size

__all__ = ["VampPrior"]


class VampPrior(nn.Module):
    """A mixture of the guide's posteriors at pseudo-inputs, one site ``"z"``.

    Better than ``N(0, I)`` on the checkerboard and on 8-modes; on data along curves it needs more
    updates: worse after 4,000, about level after 12,000 (docs/zoo.md). Early on prior and guide
    may agree on saying little: watch the mutual information in the history.

    The encoder belongs to prior and guide: build the guide as ``AmortizedNormal(prior.encoder)``,
    or by ``guides.for_prior(prior)``. To refit a guide alone, refit a ``copy.deepcopy`` of it.

    Args:
        encoder: the guide's, with ``latent_dim`` and ``soft(probabilities, batch) -> (z_loc,
            z_scale)``, such as :class:`vadd_pyro.nn.MLPEncoder`.
        num_pseudo_inputs: ``M``, learned, starting from random ones.
        pseudo_inputs: rows of tokens ``(M, D)`` to start from instead, for example of the
            training data.
        conditional: let pseudo-inputs take over the visible tokens of the state.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_pseudo_inputs: int = 32,
        *,
        pseudo_inputs: Tensor | None = None,
        conditional: bool = False,
    ) -> None:
        super().__init__()
        check_size("num_pseudo_inputs", num_pseudo_inputs)
        if not all(hasattr(encoder, name) for name in ("soft", "latent_dim", "features")):
            raise TypeError(
                "encoder must have latent_dim, features and soft(probabilities, batch), as "
                f"vadd_pyro.nn.MLPEncoder does; got {encoder!r}"
            )
        self.encoder = encoder
        self.latent_dim = encoder.latent_dim
        self.conditional = conditional
        features: Any = encoder.features
        self.length, self.vocab_size = features.length, features.vocab_size
        shape = (num_pseudo_inputs, self.length, self.vocab_size)
        if pseudo_inputs is None:
            start = 3.0 * torch.randn(shape)
        else:
            if pseudo_inputs.dim() != 2 or pseudo_inputs.shape[1] != self.length:
                raise ValueError(
                    f"pseudo_inputs must have shape (M, {self.length}), got "
                    f"{tuple(pseudo_inputs.shape)}"
                )
            if int(pseudo_inputs.min()) < 0 or int(pseudo_inputs.max()) >= self.vocab_size:
                raise ValueError(
                    f"pseudo_inputs must be clean tokens in 0..{self.vocab_size - 1}, got values "
                    f"from {int(pseudo_inputs.min())} to {int(pseudo_inputs.max())}"
                )
            start = 5.0 * one_hot(pseudo_inputs, self.vocab_size).float()
        self.logits = nn.Parameter(start)

    def components(self, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        """Means and scales of the mixture: ``(M, d)``, or ``(B, M, d)`` if it is conditional."""
        pseudo = self.logits.softmax(-1)
        if not self.conditional:
            masks = torch.full_like(batch.x_t[:1], self.vocab_size).expand(len(pseudo), -1)
            hidden = masks == self.vocab_size
            ones = batch.t.new_ones(len(pseudo))
            return self.encoder.soft(pseudo, MaskedBatch(masks, ones, hidden, hidden))  # type: ignore[operator]
        states, row = batch.x_t.unique(dim=0, return_inverse=True)
        hidden = states == self.vocab_size
        t = 1 - (~hidden).to(batch.t).mean(-1)
        visible = one_hot(states.clamp_max(self.vocab_size - 1), self.vocab_size).to(pseudo)
        rows = torch.where(hidden.unsqueeze(-1), pseudo.unsqueeze(1), visible)  # (M, U, D, K)
        loc, scale = self.encoder.soft(rows, MaskedBatch(states, t, hidden, hidden))  # type: ignore[operator]
        return loc.transpose(0, 1)[row], scale.transpose(0, 1)[row]

    def forward(self, batch: MaskedBatch) -> NormalMixture:
        loc, scale = self.components(batch)
        return NormalMixture(self.logits.new_zeros(self.logits.shape[0]), loc, scale)
