r"""Mean-field normal guide: :math:`r(z \mid x_0, x_t) = N(m, s^2)` with mean and scale from a
recognition network.

References:
    Kingma and Welling 2014 (arXiv 1312.6114); Xie et al. 2025 (arXiv 2505.17384), section 3.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
from torch import Tensor

from vadd_pyro.distributions import DiagonalNormal
from vadd_pyro.process import MaskedBatch
from vadd_pyro.programs import Program, check_callable

__all__ = ["AmortizedNormal"]


class AmortizedNormal(Program):
    """Samples ``"z"`` from a diagonal normal.

    Args:
        encoder: ``encoder(batch) -> (z_loc, z_scale)``, each ``(B, d)``, such as
            :class:`vadd_pyro.nn.MLPEncoder`. It may look at everything in the batch, and should
            see ``masked`` and ``target``.
    """

    def __init__(self, encoder: Callable[[MaskedBatch], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        check_callable("encoder", encoder)
        self.encoder = encoder

    def forward(self, batch: MaskedBatch) -> Tensor:
        z_loc, z_scale = self.encoder(batch)
        with pyro.plate("data", len(batch), dim=-1):
            return pyro.sample("z", DiagonalNormal(z_loc, z_scale))
