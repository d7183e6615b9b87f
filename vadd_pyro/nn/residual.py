r"""Residual perceptrons with learned position embeddings, for tables and other short rows.

One hidden vector stands for the whole row. Every position has an embedding of its tokens going in
and one coming out,

.. math::
    h = \sum_j E_j\, c(x_j) + A z , \qquad h \leftarrow h + f(h, z, t) , \qquad \log \mu_j(k) =
    F_{jk} \cdot \mathrm{norm}(h, z, t) + b_{jk} + \text{const},

with ``c`` the vector of a token. For a large vocabulary :math:`F_{jk} = G_j^\top v_k`, with one
vector ``v_k`` a token for all positions, so that the parameters grow as ``D + K`` and not as
their product.

``LateDecoder`` is for latents that are summed out, for then every code runs through the decoder.
Blocks of full width see ``x_t`` alone and run once a row, narrow ones see the latent and run once
a code,

.. math::
    h = \mathrm{blocks}(x_t, t) , \qquad g = \mathrm{narrow}(W h + A z, z) , \qquad \log \mu_j(k)
    = F_{jk} \cdot h + F'_{jk} \cdot g + b_{jk} + \text{const} .

References:
    He et al. 2016 (arXiv 1603.05027) for the residual blocks; see also
    :mod:`vadd_pyro.nn.conditioning`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from vadd_pyro.nn.base import Decoder, Features, NormalEncoder, status_of
from vadd_pyro.nn.chosen import chosen_logits
from vadd_pyro.nn.conditioning import (
    Condition,
    Modulation,
    TokenCode,
    check_dropout,
    full_precision,
)
from vadd_pyro.nn.lookup import token_layer
from vadd_pyro.process import MaskedBatch, MaskingProcess, check_size

__all__ = ["LateDecoder", "ResidualDecoder", "ResidualEncoder", "ResidualFeatures", "RowDecoder"]

LATE_STD = 0.02  # of the weights by which codes differ before training


class _Norm(nn.Module):
    """Layer normalisation with scale and shift from the condition."""

    def __init__(self, width: int, condition_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = Modulation(condition_dim, 2 * width)

    def forward(self, h: Tensor, c: Tensor | None) -> Tensor:
        scale, shift = self.modulation(c).chunk(2, -1)
        return self.norm(h) * (1 + scale) + shift


class _Block(nn.Module):
    """Normalisation, two layers and a residual, which is zero before training."""

    def __init__(self, width: int, condition_dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = _Norm(width, condition_dim)
        self.first = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(width, width)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, h: Tensor, c: Tensor | None) -> Tensor:
        return h + self.second(self.dropout(silu(self.first(self.norm(h, c)))))


class Trunk(nn.Module):
    """Residual blocks and a last normalisation."""

    def __init__(self, width: int, num_blocks: int, condition_dim: int, dropout: float) -> None:
        super().__init__()
        check_size("num_blocks", num_blocks)
        check_dropout(dropout)
        self.blocks = nn.ModuleList(
            _Block(width, condition_dim, dropout) for _ in range(num_blocks)
        )
        self.norm = _Norm(width, condition_dim)

    def forward(self, h: Tensor, c: Tensor | None) -> Tensor:
        for block in self.blocks:
            h = block(h, c)
        return self.norm(h, c)


class _PositionHead(nn.Module):
    """Logits ``(..., D, K)`` from a row's vector, all equal before training.

    ``bias`` adds learned numbers to them.
    """

    def __init__(
        self, width: int, length: int, vocab_size: int, embedding_dim: int, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.shape = (length, vocab_size)
        self.positions: nn.Linear | None = None
        self.bias: nn.Parameter | None = None
        if vocab_size > embedding_dim:
            self.positions = nn.Linear(width, length * embedding_dim)
            self.tokens = nn.Linear(embedding_dim, vocab_size, bias=False)
            if bias:
                self.bias = nn.Parameter(torch.zeros(length, vocab_size))
        else:
            self.tokens = nn.Linear(width, length * vocab_size, bias=bias)
            if bias:
                nn.init.zeros_(self.tokens.bias)
        nn.init.zeros_(self.tokens.weight)

    def forward(self, h: Tensor) -> Tensor:
        if self.positions is None:
            return full_precision(self.tokens, h).unflatten(-1, self.shape)
        vectors = self.positions(h).unflatten(-1, (self.shape[0], -1))
        logits = full_precision(self.tokens, vectors)
        # In place, for logits are the largest tensor there is.
        return logits if self.bias is None else logits.add_(self.bias)

    def at(self, h: Tensor, index: Tensor | None) -> Tensor:
        """Logits ``(n, K)`` of chosen positions of rows ``h (B, width)``, or of all, up to a
        number for each.
        """
        length, vocab_size = self.shape
        if self.positions is None:
            return chosen_logits(self.tokens, h, index, length, vocab_size)
        if index is None:
            return self(h).view(-1, vocab_size)
        vectors = self.positions(h).view(len(h) * length, -1).index_select(0, index)
        logits = full_precision(self.tokens, vectors)
        return logits if self.bias is None else logits.add_(self.bias[index % length])


class RowDecoder(Decoder):
    """What decoders share whose residual blocks make one vector of a row."""

    def __init__(
        self,
        process: MaskingProcess,
        latent_dim: int,
        *,
        hidden_dim: int,
        num_blocks: int,
        embedding_dim: int,
        condition_dim: int,
        time_conditioning: bool,
        dropout: float,
    ) -> None:
        super().__init__(process, latent_dim, time_conditioning=time_conditioning)
        check_size("hidden_dim", hidden_dim)
        self.tokens = TokenCode(process.vocab_size, embedding_dim, with_mask=True)
        self.inputs = nn.Linear(process.length * self.tokens.dim, hidden_dim)
        self.latent = nn.Linear(latent_dim, hidden_dim, bias=False) if latent_dim else None
        self.condition = Condition(condition_dim, latent_dim, time_conditioning=time_conditioning)
        self.trunk = Trunk(hidden_dim, num_blocks, self.condition.size, dropout)

    def _row_vectors(
        self, x_t: Tensor, codes: Tensor | None, z: Tensor | None, t: Tensor
    ) -> Tensor:
        """``(..., B, hidden_dim)``; ``codes (B, D, e)`` are the tokens' vectors if they are known
        already.
        """
        h = token_layer(self.inputs, self.tokens, x_t, codes)
        if self.latent is not None:
            h = h + self.latent(z)
        return self.trunk(h, self.condition(z, t))


class ResidualDecoder(RowDecoder):
    r"""Decoder ``mu(x_t, z, t)`` of residual blocks; see the module's text.

    The latent is added to the row's vector and sets scale and shift of every normalisation. All
    logits are equal before training, and they are float32 under autocast.

    Args:
        process: gives vocabulary size ``K`` and length ``D``.
        latent_dim: size ``d`` of the latent; 0 for a model without one.
        hidden_dim: width.
        num_blocks: number of residual blocks, of two layers each.
        embedding_dim: tokens of a larger vocabulary have learned vectors of this size, going in
            and coming out; those of others are told one-hot, and every position has a vector for
            each.
        condition_dim: size of the embedding of latent and time that the normalisations see.
        time_conditioning: feed ``t`` to the network. Off by default, as in
            :class:`~vadd_pyro.nn.MLPDecoder`.
        dropout: probability of dropping a hidden unit.

    Shapes:
        ``x_t (B, D)``, ``z (..., B, d)`` or anything that broadcasts with it such as ``(C, 1,
        d)``, ``t (B,)``; returns ``(..., B, D, K)``.
    """

    def __init__(
        self,
        process: MaskingProcess,
        latent_dim: int = 0,
        *,
        hidden_dim: int = 512,
        num_blocks: int = 3,
        embedding_dim: int = 32,
        condition_dim: int = 128,
        time_conditioning: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            process,
            latent_dim,
            hidden_dim=hidden_dim,
            num_blocks=num_blocks,
            embedding_dim=embedding_dim,
            condition_dim=condition_dim,
            time_conditioning=time_conditioning,
            dropout=dropout,
        )
        self.head = _PositionHead(hidden_dim, process.length, process.vocab_size, embedding_dim)

    def _body(self, x_t: Tensor, z: Tensor | None, t: Tensor) -> Tensor:
        return self._row_vectors(x_t, None, z, t)

    def heavy_parts(self) -> list[nn.Module]:
        return [self.trunk]

    def _head(self, h: Tensor) -> Tensor:
        return self.head(h)

    def _head_at(self, h: Tensor, index: Tensor | None) -> Tensor:
        return self.head.at(h, index)


class LateDecoder(Decoder):
    r"""Decoder ``mu(x_t, z, t)`` whose latent enters late; see the module's text.

    Under the codes ``(C, 1, d)`` of a latent that is summed out, what is wide is computed once a
    row and what is narrow ``C`` times. The codes' share of the logits is small before training,
    but not zero: codes that start alike would stay alike. Logits are float32 under autocast.

    Args:
        process: gives vocabulary size ``K`` and length ``D``.
        latent_dim: size ``d`` of the latent; 0 for a model without one.
        hidden_dim: width of the blocks that see ``x_t``.
        num_blocks: number of them, of two layers each.
        latent_hidden_dim: width of the blocks that see the latent too.
        num_latent_blocks: number of them.
        embedding_dim, condition_dim, time_conditioning: as in :class:`ResidualDecoder`.
        dropout: probability of dropping a hidden unit. In the wide blocks one drawing serves all
            latents of a row.

    Shapes:
        ``x_t (B, D)``, ``z (..., B, d)`` or anything that broadcasts with it such as ``(C, 1,
        d)``, ``t (B,)``; returns ``(..., B, D, K)``.
    """

    def __init__(
        self,
        process: MaskingProcess,
        latent_dim: int = 0,
        *,
        hidden_dim: int = 512,
        num_blocks: int = 3,
        latent_hidden_dim: int = 128,
        num_latent_blocks: int = 1,
        embedding_dim: int = 32,
        condition_dim: int = 128,
        time_conditioning: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(process, latent_dim, time_conditioning=time_conditioning)
        check_size("hidden_dim", hidden_dim)
        check_size("latent_hidden_dim", latent_hidden_dim)
        check_size("num_latent_blocks", num_latent_blocks)
        sizes = process.length, process.vocab_size, embedding_dim
        self.tokens = TokenCode(process.vocab_size, embedding_dim, with_mask=True)
        self.inputs = nn.Linear(process.length * self.tokens.dim, hidden_dim)
        self.time = Condition(condition_dim, 0, time_conditioning=time_conditioning)
        self.trunk = Trunk(hidden_dim, num_blocks, self.time.size, dropout)
        self.head = _PositionHead(hidden_dim, *sizes)
        self.latent: nn.Linear | None = None
        if latent_dim:
            self.latent = nn.Linear(latent_dim, latent_hidden_dim, bias=False)
            self.narrow = nn.Linear(hidden_dim, latent_hidden_dim)
            self.condition = Condition(condition_dim, latent_dim, time_conditioning=False)
            self.latent_trunk = Trunk(
                latent_hidden_dim, num_latent_blocks, self.condition.size, dropout
            )
            self.latent_head = _PositionHead(latent_hidden_dim, *sizes, bias=False)
            nn.init.normal_(self.latent_head.tokens.weight, std=LATE_STD)

    def _body(self, x_t: Tensor, z: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The wide vector of a row, and the narrow one of a row and a latent."""
        h = self._once_a_state(self._wide, x_t, t)
        if self.latent is None:
            return h, None
        return h, self.latent_trunk(self.narrow(h) + self.latent(z), self.condition(z, t))

    def _wide(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.trunk(token_layer(self.inputs, self.tokens, x_t), self.time(None, t))

    def heavy_parts(self) -> list[nn.Module]:
        return [self.trunk] if self.latent is None else [self.trunk, self.latent_trunk]

    def _head(self, h: tuple[Tensor, Tensor | None]) -> Tensor:
        wide, narrow = h
        logits = self.head(wide)
        # In place, for those of all codes are the largest tensor there is.
        return logits if narrow is None else self.latent_head(narrow).add_(logits)

    def _head_at(self, h: tuple[Tensor, Tensor | None], index: Tensor | None) -> Tensor:
        wide, narrow = h
        logits = self.head.at(wide, index)
        return logits if narrow is None else logits + self.latent_head.at(narrow, index)


class ResidualFeatures(Features):
    r"""Recognition features ``(B, F)`` of ``x_0`` and of which positions are visible, masked and
    targeted, by residual blocks.

    Args:
        process: gives vocabulary size and length.
        hidden_dim: width, and the number ``F`` of features.
        num_blocks, embedding_dim, condition_dim, time_conditioning, dropout: as in
            :class:`ResidualDecoder`.

    Shapes:
        a :class:`MaskedBatch` of ``B`` rows gives ``(B, F)``.
    """

    def __init__(
        self,
        process: MaskingProcess,
        *,
        hidden_dim: int = 512,
        num_blocks: int = 3,
        embedding_dim: int = 32,
        condition_dim: int = 128,
        time_conditioning: bool = False,
        dropout: float = 0.0,
    ) -> None:
        check_size("hidden_dim", hidden_dim)
        super().__init__(process, hidden_dim)
        self.tokens = TokenCode(process.vocab_size, embedding_dim, with_mask=False)
        self.inputs = nn.Linear(process.length * (self.tokens.dim + 2), hidden_dim)
        self.condition = Condition(condition_dim, 0, time_conditioning=time_conditioning)
        self.trunk = Trunk(hidden_dim, num_blocks, self.condition.size, dropout)

    def _token_vectors(self) -> Tensor:
        return self.tokens.clean

    def _features(self, codes: Tensor, batch: MaskedBatch) -> Tensor:
        status = status_of(batch, codes).expand(*codes.shape[:-1], 2)
        h = self.inputs(torch.cat([codes, status], -1).flatten(-2))
        return self.trunk(h, self.condition(None, batch.t))


class ResidualEncoder(NormalEncoder):
    r"""Recognition network: ``(z_loc, z_scale)`` from :class:`ResidualFeatures`.

    Args:
        process: gives vocabulary size and length.
        latent_dim: size ``d`` of the latent.
        sizes: further arguments of :class:`ResidualFeatures`.

    Shapes:
        a :class:`MaskedBatch` of ``B`` rows gives two tensors ``(B, d)``.
    """

    def __init__(self, process: MaskingProcess, latent_dim: int, **sizes: Any) -> None:
        super().__init__(ResidualFeatures(process, **sizes), latent_dim)
