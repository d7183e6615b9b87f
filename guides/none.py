"""The guide of a model that has nothing to infer.

No latent, or only discrete ones that are summed out.
"""

from __future__ import annotations

from typing import Any

from vadd_pyro.process import MaskedBatch
from vadd_pyro.programs import Program

__all__ = ["NoLatent"]


class NoLatent(Program):
    """No sites and no parameters.

    For :class:`vadd_pyro.models.MDM` and :class:`vadd_pyro.models.Categorical`.
    """

    def forward(self, batch: MaskedBatch, *args: Any, **kwargs: Any) -> None:
        return None
