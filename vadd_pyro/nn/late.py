r"""A transformer whose latent enters late, for latents that are summed out.

Every code of such a latent runs through the decoder. What is wide sees ``x_t`` and ``t`` alone and
runs once a row; what is narrow sees the latent and runs once a code, position by position,

.. math::
    h = \mathrm{transformer}(x_t, t) , \qquad g_j = \mathrm{narrow}(W h_j + A z, z) , \qquad \log
    \mu_j = V h_j + V' g_j + b + \text{const} ,

as :class:`~vadd_pyro.nn.LateDecoder` does for tables. A code says which of the ways to go on that
the wide part has in view at each position are to go together.
"""

from __future__ import annotations

from torch import Tensor, nn

from vadd_pyro.nn.chosen import taken
from vadd_pyro.nn.conditioning import Condition, full_precision
from vadd_pyro.nn.residual import LATE_STD, Trunk
from vadd_pyro.nn.transformer import TransformerDecoder
from vadd_pyro.process import MaskingProcess, check_size

__all__ = ["LateTransformerDecoder"]


class LateTransformerDecoder(TransformerDecoder):
    r"""Decoder ``mu(x_t, z, t)`` of a transformer whose latent enters late; see the module's text.

    The codes' share of the logits is small before training, but not zero: codes that start alike
    would stay alike. Logits are float32 under autocast.

    Args:
        process: gives vocabulary size ``K`` and length ``D``.
        latent_dim: size ``d`` of the latent; 0 for a model without one.
        latent_hidden_dim: width of the blocks that see the latent.
        num_latent_blocks: number of them, of two layers each.
        hidden_dim, num_layers, num_heads, expansion, condition_dim, time_conditioning,
            position_embedding, dropout: as in :class:`~vadd_pyro.nn.TransformerDecoder`.

    Shapes:
        ``x_t (B, D)``, ``z (..., B, d)`` or anything that broadcasts with it such as ``(C, 1,
        d)``, ``t (B,)``; returns ``(..., B, D, K)``.
    """

    def __init__(
        self,
        process: MaskingProcess,
        latent_dim: int = 0,
        *,
        latent_hidden_dim: int = 64,
        num_latent_blocks: int = 1,
        hidden_dim: int = 256,
        num_layers: int = 6,
        num_heads: int = 8,
        expansion: int = 4,
        condition_dim: int = 128,
        time_conditioning: bool = True,
        position_embedding: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            process,
            hidden_dim=hidden_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            expansion=expansion,
            condition_dim=condition_dim,
            time_conditioning=time_conditioning,
            position_embedding=position_embedding,
            dropout=dropout,
        )
        check_size("latent_dim", latent_dim, least=0)
        check_size("latent_hidden_dim", latent_hidden_dim)
        check_size("num_latent_blocks", num_latent_blocks)
        self.latent_dim = latent_dim
        self.latent: nn.Linear | None = None
        if latent_dim:
            self.latent = nn.Linear(latent_dim, latent_hidden_dim, bias=False)
            self.narrow = nn.Linear(hidden_dim, latent_hidden_dim)
            self.latent_condition = Condition(condition_dim, latent_dim, time_conditioning=False)
            self.latent_trunk = Trunk(
                latent_hidden_dim, num_latent_blocks, self.latent_condition.size, dropout
            )
            self.latent_head = nn.Linear(latent_hidden_dim, process.vocab_size, bias=False)
            nn.init.normal_(self.latent_head.weight, std=LATE_STD)

    def _body(  # type: ignore[override]
        self, x_t: Tensor, z: Tensor | None, t: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Wide vectors of all positions, and narrow ones of positions and latents."""
        wide = super()._body
        h = self._once_a_state(lambda x_t, t: wide(x_t, None, t), x_t, t)
        if self.latent is None:
            return h, None
        g = self.narrow(h) + self._at_positions(self.latent(z))
        c = self.latent_condition(z, t)
        assert c is not None
        return h, self.latent_trunk(g, self._at_positions(c))

    def _at_positions(self, v: Tensor) -> Tensor:
        """What comes of a latent, laid out over positions."""
        return v.unsqueeze(-2)

    def heavy_parts(self) -> list[nn.Module]:
        return [self.trunk] if self.latent is None else [self.trunk, self.latent_trunk]

    def _head(self, h: tuple[Tensor, Tensor | None]) -> Tensor:  # type: ignore[override]
        wide, narrow = h
        logits = super()._head(wide)
        # In place, for those of all codes are the largest tensor there is.
        return logits if narrow is None else full_precision(self.latent_head, narrow).add_(logits)

    def _head_at(  # type: ignore[override]
        self, h: tuple[Tensor, Tensor | None], index: Tensor | None
    ) -> Tensor:
        wide, narrow = h
        logits = super()._head_at(wide, index)
        if narrow is None:
            return logits
        chosen = taken(narrow.reshape(-1, narrow.shape[-1]), index)
        return full_precision(self.latent_head, chosen).add_(logits)
