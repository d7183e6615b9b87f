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
from torch import Tensor

from vadd_pyro.distributions import TokenCategorical
from vadd_pyro.nn import MLPDecoder
from vadd_pyro.process import MaskedBatch
from vadd_pyro.programs import Program, check_callable

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

    Sites: ``"z"`` (or the prior's own) and ``"x_0"``, ``(B, D)``, scored at ``batch.target``,
    observed as ``batch.x_0``.

    Returns:
        The tokens at every position, ``(B, D)`` long: ``batch.x_0`` or a draw. A draw rewrites
        visible positions too; :func:`vadd_pyro.sample` keeps those.
    """

    def __init__(
        self, decoder: Callable[..., Tensor], prior: Callable[[MaskedBatch], Any]
    ) -> None:
        super().__init__()
        check_callable("decoder", decoder)
        check_callable("prior", prior)
        self.decoder = decoder
        self.prior = prior

    def forward(self, batch: MaskedBatch) -> Tensor:
        with pyro.plate("data", len(batch), dim=-1):
            z = self.prior(batch)
            if not isinstance(z, Tensor) and hasattr(z, "log_prob"):
                z = pyro.sample("z", z)
            law = self._tokens(batch, z)
            return pyro.sample("x_0", law, obs=batch.x_0)

    def _tokens(self, batch: MaskedBatch, z: Tensor) -> TokenCategorical:
        """The law of the tokens; where a support is laid out for all rows, equal rows share it."""
        # Only for decoders known to treat dimension -2 as that of rows, and to ignore the time.
        shares = isinstance(self.decoder, MLPDecoder) and not self.decoder.time_conditioning
        if shares and z.dim() > 2 and z.shape[-2] == 1 and len(batch) > 1:
            states, row = batch.x_t.unique(dim=0, return_inverse=True)
            logits = self.decoder(states, z, batch.t[: len(states)])
            if logits.dim() > 3:
                return TokenCategorical(logits, batch.target, row)
        logits = self.decoder(batch.x_t, z, batch.t)
        return TokenCategorical(logits, batch.target)


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
            logits = self.decoder(batch.x_t, None, batch.t)
            return pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)
