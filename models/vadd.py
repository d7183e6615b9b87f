r"""VADD and the masked diffusion model: step programs with and without a latent.

.. math::
    p(x_s \mid x_t) = \int p(z \mid x_t, t) \prod_{i\ \text{masked}} \big[ \rho\, \mu_i(x_t, z, t)
    + (1 - \rho)\, \text{mask} \big] dz .

References:
    Xie et al. 2025 (arXiv 2505.17384); Sahoo et al. 2024 (arXiv 2406.07524) for the model without
    latent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from vadd_pyro.distributions import TokenCategorical
from vadd_pyro.process import MaskedBatch, check_time
from vadd_pyro.programs import Program, check_callable, draw_latent

__all__ = ["MDM", "VADD"]


class VADD(Program):
    """One reverse step with a latent, as a Pyro program over a :class:`~vadd_pyro.MaskedBatch`.

    Args:
        decoder: ``decoder(x_t, z, t) -> logits (..., B, D, K)``, of the clean tokens only; see
            :class:`vadd_pyro.nn.MLPDecoder`.
        prior: ``prior(batch)``, run inside the data plate. It returns a distribution, from which
            ``"z"`` is drawn, or it is a Pyro program of its own, with sites of its own, that
            returns the decoder's ``z``. It may read ``batch.x_t`` and ``batch.t``, never ``x_0``
            or ``target``.
        least_time: steps from earlier times, in which something is visible already, do without
            the latent: there the decoder is given zeros in its place, whatever was drawn. A prior
            that does not see ``x_t`` is of little use but at ``t = 1``, and a nuisance where a
            step reveals little; with ``least_time=1`` a latent coordinates what the first step
            writes, and all further steps are those of a masked diffusion model; a chain that
            starts from a partly given row has no latent then. It must be a vector for each row,
            ``(..., B, d)``. Guides (:class:`vadd_pyro.guides.RelativeNormal`) and the loss should
            be told the same.

    Sites: ``"z"`` (or the prior's own) and ``"x_0"``, ``(B, D)``, scored at ``batch.target``,
    observed as ``batch.x_0``.

    Returns:
        The tokens at every position, ``(B, D)`` long: ``batch.x_0`` or a draw. A draw rewrites
        visible positions too; :func:`vadd_pyro.sample` keeps those.
    """

    def __init__(
        self,
        decoder: Callable[..., Tensor],
        prior: Callable[[MaskedBatch], Any],
        least_time: float = 0.0,
    ) -> None:
        super().__init__()
        check_callable("decoder", decoder)
        check_callable("prior", prior)
        self.decoder = decoder
        self.prior = prior
        self.least_time = check_time("least_time", least_time)

    def forward(self, batch: MaskedBatch) -> Tensor:
        with pyro.plate("data", len(batch), dim=-1):
            law = self._tokens(batch, self._in_use(draw_latent(self.prior, batch), batch))
            return pyro.sample("x_0", law, obs=batch.x_0)

    def _in_use(self, z: Tensor, batch: MaskedBatch) -> Tensor:
        """The latent, and zeros in its place in steps that do without."""
        if self.least_time == 0:
            return z
        vectors = isinstance(z, Tensor) and z.is_floating_point() and z.dim() > 1
        if not vectors or z.shape[-2] not in (1, len(batch)):
            what = f"shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(
                f"least_time = {self.least_time} needs a latent that is a vector for each row, "
                f"(..., {len(batch)}, d), got {what}"
            )
        late = batch.t >= self.least_time
        # Latents laid out for all rows stay so, for a decoder may share work over equal rows.
        if not torch.is_grad_enabled() and bool(late.all()):
            return z
        return z * late.unsqueeze(-1)

    def _tokens(self, batch: MaskedBatch, z: Tensor) -> TokenCategorical:
        """The law of the tokens; where a support is laid out for all rows, equal rows share it."""
        law = _law_to_draw(self.decoder, batch, z)
        if law is not None:
            return law
        # Only decoders that say so are known to treat dimension -2 as that of rows.
        shared_states = getattr(self.decoder, "shared_states", None)
        shared = None if shared_states is None else shared_states(batch.x_t, z)
        if shared is None:
            return TokenCategorical(self.decoder(batch.x_t, z, batch.t), batch.target)
        states, row = shared
        logits = self.decoder(states, z, batch.t[: len(states)])
        return TokenCategorical(logits, batch.target, row)


class MDM(Program):
    """The masked diffusion model: no latent, so tokens revealed together are independent. The
    baseline everywhere.

    Args:
        decoder: ``decoder(x_t, None, t) -> logits (B, D, K)``.

    Site: ``"x_0"``, as in :class:`VADD`.
    """

    def __init__(self, decoder: Callable[..., Tensor]) -> None:
        super().__init__()
        check_callable("decoder", decoder)
        self.decoder = decoder

    def forward(self, batch: MaskedBatch) -> Tensor:
        with pyro.plate("data", len(batch), dim=-1):
            law = _law_to_draw(self.decoder, batch, None)
            if law is None:
                law = TokenCategorical(self.decoder(batch.x_t, None, batch.t), batch.target)
            return pyro.sample("x_0", law, obs=batch.x_0)


def _law_to_draw(
    decoder: Callable[..., Tensor], batch: MaskedBatch, z: Tensor | None
) -> TokenCategorical | None:
    """The law of tokens to be drawn, by a decoder that can wait to be told their positions."""
    deferred = getattr(decoder, "deferred", None)
    found = None if deferred is None or batch.x_0 is not None else deferred(batch.x_t, z, batch.t)
    return None if found is None else TokenCategorical(found[0], batch.target, found[1])
