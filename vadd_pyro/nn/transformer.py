r"""Transformers over the positions of a row, for text.

Every block attends and then transforms, each behind a layer normalisation that the condition
modulates (Peebles and Xie 2023, arXiv 2212.09748),

.. math::
    h \leftarrow h + g_1 \odot \mathrm{attend}(\mathrm{norm}(h) \odot (1 + s_1) + b_1), \qquad
    h \leftarrow h + g_2 \odot \mathrm{mlp}(\mathrm{norm}(h) \odot (1 + s_2) + b_2) .

In the decoder ``(s, b, g)`` are functions of time and latent, the same at all positions, and ``(0,
0, 1)`` before training. (Gates that start from zero, as in that reference, kept models of text at
the frequencies of single characters for 500 to 1,000 updates, by the seed: docs/real_data.md.) In
the recognition network they are functions of a learned mask vector, at **masked positions only**,
with another vector added at those that the step reveals (Xie et al. 2025, arXiv 2505.17384);
visible positions have ``s = b = 0``, ``g = 1``.

Rotary positions (:mod:`vadd_pyro.nn.attention`) tell distances alone. In the all-masked row, from
which every sample starts, all positions are then alike, and no latent could make their tokens
differ; so learned vectors of the positions are added to those of the tokens, a fiftieth of their
size at first: what is learned of a token at one position should serve at the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vadd_pyro.nn.attention import AttentionPool, Rotary, SelfAttention, check_heads
from vadd_pyro.nn.base import Decoder, Features, NormalEncoder
from vadd_pyro.nn.chosen import taken
from vadd_pyro.nn.conditioning import (
    Condition,
    Modulation,
    TokenCode,
    check_dropout,
    full_precision,
)
from vadd_pyro.process import MaskedBatch, MaskingProcess, check_size

__all__ = ["TransformerDecoder", "TransformerEncoder", "TransformerFeatures", "TransformerState"]

_POSITION_STD = 0.02  # vectors of positions before training, those of tokens being 1


class _Block(nn.Module):
    """Attention and a perceptron behind normalisations that six vectors modulate.

    Args:
        width, num_heads: of the attention.
        rotary: turns its queries and keys.
        expansion: the perceptron is so many times as wide.
        dropout: probability of dropping a number that is added to the residual stream.
    """

    def __init__(
        self, width: int, num_heads: int, rotary: Rotary, expansion: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = SelfAttention(width, num_heads, rotary)
        self.mlp = nn.Sequential(
            nn.Linear(width, expansion * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(expansion * width, width),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, modulation: Tensor, open_gates: bool) -> Tensor:
        """One block.

        Args:
            h: ``(..., D, width)``.
            modulation: scale, shift and gate of either half, ``(..., 6 width)``, broadcast.
            open_gates: count gates from one, not from zero.
        """
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = modulation.chunk(6, -1)
        if open_gates:
            gate_1, gate_2 = 1 + gate_1, 1 + gate_2
        mixed = self.attention(self.norm(h) * (1 + scale_1) + shift_1)
        h = h + gate_1 * self.dropout(mixed)
        return h + gate_2 * self.dropout(self.mlp(self.norm(h) * (1 + scale_2) + shift_2))


class _Trunk(nn.Module):
    """Blocks, each with a modulation of its own, and a last normalisation with another."""

    def __init__(
        self,
        process: MaskingProcess,
        width: int,
        condition_dim: int,
        *,
        num_layers: int,
        num_heads: int,
        expansion: int,
        dropout: float,
        position_embedding: bool,
        open_gates: bool,
    ) -> None:
        super().__init__()
        for name, value in (
            ("hidden_dim", width),
            ("num_layers", num_layers),
            ("expansion", expansion),
        ):
            check_size(name, value)
        check_heads(num_heads, width, even=True)
        check_dropout(dropout)
        self.open_gates = open_gates
        self.positions: nn.Parameter | None = None
        if position_embedding:
            self.positions = nn.Parameter(_POSITION_STD * torch.randn(process.length, width))
        rotary = Rotary(process.length, width // num_heads)
        self.blocks = nn.ModuleList(
            _Block(width, num_heads, rotary, expansion, dropout) for _ in range(num_layers)
        )
        modulations = [Modulation(condition_dim, 6 * width) for _ in range(num_layers)]
        if not open_gates:
            for modulation in modulations:
                with torch.no_grad():
                    modulation.bias.view(6, width)[[2, 5]] = 1.0  # both gates
        self.modulations = nn.ModuleList(modulations)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.last = Modulation(condition_dim, 2 * width)

    def forward(self, h: Tensor, c: Tensor | None, where: Tensor | None = None) -> Tensor:
        """Vectors ``(..., D, width)`` of all positions.

        Args:
            h: vectors of the tokens, ``(..., D, width)``.
            c: conditions, ``(..., size)``, the same at all positions; with ``where``, one of each
                of two kinds, ``(..., 2, size)``.
            where: which kinds a position takes, ``(B, D, 2)`` of zeros and ones; a position that
                takes none is not modulated.
        """
        if self.positions is not None:
            h = h + self.positions
        for block, modulation in zip(self.blocks, self.modulations, strict=True):
            h = block(h, _spread(modulation(c), where), self.open_gates)
        scale, shift = _spread(self.last(c), where).chunk(2, -1)
        return self.norm(h) * (1 + scale) + shift


def _spread(modulation: Tensor, where: Tensor | None) -> Tensor:
    """A modulation laid out over positions."""
    if where is not None:
        return where @ modulation
    return modulation if modulation.dim() == 1 else modulation.unsqueeze(-2)


def _parts(
    process: MaskingProcess,
    latent_dim: int,
    *,
    hidden_dim: int,
    num_layers: int = 6,
    num_heads: int = 8,
    expansion: int = 4,
    condition_dim: int = 128,
    time_conditioning: bool = True,
    position_embedding: bool = True,
    dropout: float = 0.0,
) -> tuple[Condition, _Trunk, TokenCode]:
    """Condition, blocks and vectors of tokens of a network that reads a state ``(x_t, t)``."""
    condition = Condition(condition_dim, latent_dim, time_conditioning=time_conditioning)
    trunk = _Trunk(
        process,
        hidden_dim,
        condition.size,
        num_layers=num_layers,
        num_heads=num_heads,
        expansion=expansion,
        dropout=dropout,
        position_embedding=position_embedding,
        open_gates=condition.size == 0,
    )
    tokens = TokenCode(process.vocab_size, hidden_dim, with_mask=True, learned=True)
    return condition, trunk, tokens


class TransformerDecoder(Decoder):
    r"""Decoder ``mu(x_t, z, t)``: a bidirectional transformer; see the module's text.

    All logits are equal before training, and they are float32 under autocast.

    Args:
        process: gives vocabulary size ``K`` and length ``D``.
        latent_dim: size ``d`` of the latent; 0 for a model without one.
        hidden_dim: width, a multiple of twice ``num_heads``.
        num_layers: number of blocks.
        num_heads: attention heads.
        expansion: width of a block's perceptron, in widths.
        condition_dim: size of the embedding of time and latent.
        time_conditioning: feed ``t`` to the network. Without it, equal rows share their work
            under latents that are laid out for all rows.
        position_embedding: add learned vectors of the positions. Off, only distances are known,
            and positions of the all-masked row cannot differ.
        dropout: probability of dropping a number that a block adds.

    Shapes:
        ``x_t (B, D)``, ``z (..., B, d)`` or anything that broadcasts with it such as ``(C, 1,
        d)``, ``t (B,)``; returns ``(..., B, D, K)``.
    """

    def __init__(
        self,
        process: MaskingProcess,
        latent_dim: int = 0,
        *,
        hidden_dim: int = 256,
        num_layers: int = 6,
        num_heads: int = 8,
        expansion: int = 4,
        condition_dim: int = 128,
        time_conditioning: bool = True,
        position_embedding: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(process, latent_dim, time_conditioning=time_conditioning)
        self.condition, self.trunk, self.tokens = _parts(
            process,
            latent_dim,
            hidden_dim=hidden_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            expansion=expansion,
            condition_dim=condition_dim,
            time_conditioning=time_conditioning,
            position_embedding=position_embedding,
            dropout=dropout,
        )
        self.head = nn.Linear(hidden_dim, process.vocab_size)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def _body(self, x_t: Tensor, z: Tensor | None, t: Tensor) -> Tensor:
        return self.trunk(self.tokens(x_t), self.condition(z, t))

    def heavy_parts(self) -> list[nn.Module]:
        return [self.trunk]

    def _head(self, h: Tensor) -> Tensor:
        return full_precision(self.head, h)

    def _head_at(self, h: Tensor, index: Tensor | None) -> Tensor:
        return full_precision(self.head, taken(h.reshape(-1, h.shape[-1]), index))


class TransformerFeatures(Features):
    r"""Recognition features ``(B, F)`` of ``x_0`` and of which positions are visible, masked and
    targeted: a transformer over the clean tokens, modulated at masked positions, and what a
    learned query finds in it.

    Args:
        process: gives vocabulary size and length.
        hidden_dim: width, and the number ``F`` of features.
        num_layers, num_heads, expansion, condition_dim, position_embedding, dropout: as in
            :class:`TransformerDecoder`.
        time_conditioning: feed ``t`` too, to masked positions.

    Shapes:
        a :class:`MaskedBatch` of ``B`` rows gives ``(B, F)``.
    """

    def __init__(
        self,
        process: MaskingProcess,
        *,
        hidden_dim: int = 256,
        num_layers: int = 6,
        num_heads: int = 8,
        expansion: int = 4,
        condition_dim: int = 128,
        time_conditioning: bool = False,
        position_embedding: bool = True,
        dropout: float = 0.0,
    ) -> None:
        check_size("hidden_dim", hidden_dim)
        check_size("condition_dim", condition_dim)
        super().__init__(process, hidden_dim)
        self.tokens = TokenCode(process.vocab_size, hidden_dim, with_mask=False, learned=True)
        self.status = nn.Parameter(torch.randn(2, condition_dim))  # masked; masked and targeted
        self.condition = Condition(condition_dim, 0, time_conditioning=time_conditioning)
        self.trunk = _Trunk(
            process,
            hidden_dim,
            condition_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            expansion=expansion,
            dropout=dropout,
            position_embedding=position_embedding,
            open_gates=True,
        )
        # From the first update on the network must see the mask, or the latent is given up.
        for modulation in (*self.trunk.modulations, self.trunk.last):
            nn.init.normal_(modulation.weight, std=0.1 * condition_dim**-0.5)
        self.pool = AttentionPool(hidden_dim, num_heads)

    def _token_vectors(self) -> Tensor:
        return self.tokens.clean

    def _features(self, codes: Tensor, batch: MaskedBatch) -> Tensor:
        time = self.condition(None, batch.t)
        c = self.status if time is None else self.status + time.unsqueeze(-2)
        kinds = [batch.masked & ~batch.target, batch.masked & batch.target]
        where = torch.stack(kinds, -1).to(self.status.dtype)
        return self.pool(self.trunk(codes, c, where))


class TransformerState(nn.Module):
    r"""Features ``(B, D, F)`` of the state ``(x_t, t)`` at each position, for priors with a latent
    there (:class:`vadd_pyro.models.Chain`).

    Args:
        process: gives vocabulary size and length.
        scale: what they are multiplied by; see :class:`~vadd_pyro.nn.State`. By default
            ``hidden_dim ** -0.5``.
        hidden_dim: width, and the number ``F`` of features.
        sizes: ``num_layers`` and the others, as in :class:`TransformerDecoder`.

    Shapes:
        a :class:`MaskedBatch` of ``B`` rows gives ``(B, D, F)``; only ``x_t`` and ``t`` are read.
    """

    def __init__(
        self,
        process: MaskingProcess,
        scale: float | None = None,
        *,
        hidden_dim: int = 256,
        **sizes: Any,
    ) -> None:
        super().__init__()
        self.feature_dim = hidden_dim
        self.scale = hidden_dim**-0.5 if scale is None else scale
        self.condition, self.trunk, self.tokens = _parts(
            process, 0, hidden_dim=hidden_dim, **sizes
        )

    def forward(self, batch: MaskedBatch) -> Tensor:
        h = self.trunk(self.tokens(batch.x_t), self.condition(None, batch.t))
        return self.scale * h


class TransformerEncoder(NormalEncoder):
    r"""Recognition network: ``(z_loc, z_scale)`` from :class:`TransformerFeatures`.

    Args:
        process: gives vocabulary size and length.
        latent_dim: size ``d`` of the latent.
        sizes: further arguments of :class:`TransformerFeatures`.

    Shapes:
        a :class:`MaskedBatch` of ``B`` rows gives two tensors ``(B, d)``.
    """

    def __init__(self, process: MaskingProcess, latent_dim: int, **sizes: Any) -> None:
        super().__init__(TransformerFeatures(process, **sizes), latent_dim)
