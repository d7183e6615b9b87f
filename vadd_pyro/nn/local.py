r"""Decoders with a latent at each position that counts there alone, ``mu_j(x_t, z_j, t)``.

A chain of codes (:class:`vadd_pyro.models.Chain`) is summed out along the row, which needs that
the law of a token depends on the code of its own position and on no other. Both decoders here are
those whose latent enters late, with ``z_j`` in place of one ``z`` for the row: what is wide sees
``x_t`` and ``t`` alone and runs once a row, what is narrow sees a code and runs once a code. Codes
differ more before training than there: started nearly alike, most had died out on text after 200
updates (docs/real_data.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vadd_pyro.nn.base import Decoder
from vadd_pyro.nn.late import LateTransformerDecoder
from vadd_pyro.nn.residual import LateDecoder
from vadd_pyro.process import MaskingProcess, check_size

__all__ = ["LocalDecoder", "LocalTransformerDecoder"]

_STD = 0.3  # of the weights by which codes differ before training


class _LocalLatents(Decoder):
    """A decoder with a latent at each position, ``z (..., B, D, d)``, that it looks at there
    alone; to be named before the decoder that it changes.
    """

    def _check_latent(self, z: Tensor, num_rows: int) -> None:
        shape = (self.length, self.latent_dim)
        rows = z.shape[-3] if z.dim() > 2 else 1
        if z.shape[-2:] != shape or (rows != num_rows and 1 not in (rows, num_rows)):
            raise ValueError(
                f"z must have a latent at each position, shape (..., {num_rows}, {shape[0]}, "
                f"{shape[1]}), or one for all rows, got {tuple(z.shape)}"
            )

    def shared_states(self, x_t: Tensor, z: Tensor | None) -> None:
        """None: what is wide shares its work on equal rows by itself."""
        return None


class LocalDecoder(_LocalLatents, LateDecoder):
    r"""Decoder ``mu_j(x_t, z_j, t)`` with a latent at each position, for chains of codes
    (:class:`vadd_pyro.models.Chain`).

    Args:
        process, latent_dim, and sizes: as in :class:`LateDecoder`.

    Shapes:
        ``x_t (B, D)``, ``z (..., B, D, d)`` or anything that broadcasts with it such as ``(C, 1,
        D, d)``, ``t (B,)``; returns ``(..., B, D, K)``.
    """

    def __init__(
        self,
        process: MaskingProcess,
        latent_dim: int,
        *,
        hidden_dim: int = 512,
        latent_hidden_dim: int = 32,
        **sizes: Any,
    ) -> None:
        check_size("latent_dim", latent_dim)
        super().__init__(
            process,
            latent_dim,
            hidden_dim=hidden_dim,
            latent_hidden_dim=latent_hidden_dim,
            **sizes,
        )
        self.narrow = nn.Linear(hidden_dim, process.length * latent_hidden_dim)
        del self.latent_head  # which would look at all positions
        shape = (process.length, latent_hidden_dim, process.vocab_size)
        self.local_head = nn.Parameter(_STD * torch.randn(shape))

    def _body(self, x_t: Tensor, z: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor | None]:
        h = self._once_a_state(self._wide, x_t, t)
        assert self.latent is not None
        g = self.narrow(h).unflatten(-1, (self.length, -1)) + self.latent(z)
        return h, self.latent_trunk(g, self.condition(z, t))

    def _head(self, h: tuple[Tensor, Tensor | None]) -> Tensor:
        wide, narrow = h
        assert narrow is not None
        with torch.autocast(wide.device.type, enabled=False):
            own = torch.einsum(
                "...jn,jnk->...jk", narrow.to(self.local_head.dtype), self.local_head
            )
        return own.add_(self.head(wide))


class LocalTransformerDecoder(_LocalLatents, LateTransformerDecoder):
    r"""Decoder ``mu_j(x_t, z_j, t)`` with a latent at each position, for chains of codes
    (:class:`vadd_pyro.models.Chain`).

    Args:
        process, latent_dim, and sizes: as in :class:`LateTransformerDecoder`.

    Shapes:
        ``x_t (B, D)``, ``z (..., B, D, d)`` or anything that broadcasts with it such as ``(C, 1,
        D, d)``, ``t (B,)``; returns ``(..., B, D, K)``.
    """

    def __init__(self, process: MaskingProcess, latent_dim: int, **sizes: Any) -> None:
        check_size("latent_dim", latent_dim)
        super().__init__(process, latent_dim, **sizes)
        nn.init.normal_(self.latent_head.weight, std=_STD)

    def _at_positions(self, v: Tensor) -> Tensor:
        return v
