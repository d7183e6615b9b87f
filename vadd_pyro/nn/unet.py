r"""U-Nets over pixels.

Residual blocks of convolutions on ever coarser grids, and back again with what was seen on the way
down laid beside; attention on the coarsest. Time and latent set scale and shift of a group
normalisation in every block (:mod:`vadd_pyro.nn.conditioning`).

Convolutions are blind to where they are. In the all-masked row, from which every sample starts,
there is nothing else to see: so every pixel has a learned vector, and the latent also enters as a
map on the coarsest grid, as in the decoder of an autoencoder.

References:
    Ronneberger et al. 2015 (arXiv 1505.04597); Ho et al. 2020 (arXiv 2006.11239); Dhariwal and
    Nichol 2021 (arXiv 2105.05233) for adaptive group normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from vadd_pyro.nn.base import Decoder, Features, NormalEncoder, status_of
from vadd_pyro.nn.conditioning import Condition, TokenCode
from vadd_pyro.nn.paths import (
    DownPath,
    UpPath,
    chosen_pixel_logits,
    group_norm,
    pixel_logits,
    zero_,
)
from vadd_pyro.process import MaskedBatch, MaskingProcess

__all__ = ["UNetDecoder", "UNetEncoder", "UNetFeatures"]


class UNetDecoder(Decoder):
    r"""Decoder ``mu(x_t, z, t)`` over images; see the module's text.

    All logits are equal before training, and they are float32 under autocast.

    Args:
        process: gives number of grey levels ``K`` and length ``D = channels * H * W``; rows are
            images ``(channels, H, W)``, flattened.
        latent_dim: size ``d`` of the latent; 0 for a model without one.
        shape: height ``H`` and width ``W``, multiples of two to the number of halvings.
        channels: of the images.
        hidden_dim: width on the finest grid.
        multipliers: widths of all grids, from the finest to the coarsest, in ``hidden_dim``; each
            grid is half as fine as the one before.
        num_blocks: residual blocks on each grid, down and up.
        attention_levels: on how many of the coarsest grids pixels attend to each other.
        num_heads: attention heads.
        condition_dim: size of the embedding of time and latent.
        embedding_dim: grey levels of more than so many have learned vectors of this size; others
            are told one-hot, and the first convolution embeds them.
        time_conditioning: feed ``t`` to the network. Without it, equal rows share their work
            under latents that are laid out for all rows.
        dropout: probability of dropping a channel's value in a block.

    Shapes:
        ``x_t (B, D)``, ``z (..., B, d)`` or anything that broadcasts with it such as ``(C, 1,
        d)``, ``t (B,)``; returns ``(..., B, D, K)``.
    """

    def __init__(
        self,
        process: MaskingProcess,
        latent_dim: int = 0,
        *,
        shape: Sequence[int],
        channels: int = 1,
        hidden_dim: int = 64,
        multipliers: Sequence[int] = (1, 2, 2),
        num_blocks: int = 2,
        attention_levels: int = 1,
        num_heads: int = 4,
        condition_dim: int = 256,
        embedding_dim: int = 32,
        time_conditioning: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(process, latent_dim, time_conditioning=time_conditioning)
        self.tokens = TokenCode(process.vocab_size, embedding_dim, with_mask=True)
        self.condition = Condition(condition_dim, latent_dim, time_conditioning=time_conditioning)
        self.down = DownPath(
            process,
            self.tokens.dim,
            self.condition.size,
            latent_dim,
            shape=shape,
            channels=channels,
            hidden_dim=hidden_dim,
            multipliers=multipliers,
            num_blocks=num_blocks,
            attention_levels=attention_levels,
            num_heads=num_heads,
            dropout=dropout,
        )
        self.up = UpPath(self.down, self.condition.size, dropout)
        self.channels = channels
        self.norm = group_norm(self.down.widths[0])
        self.head = nn.Linear(self.down.widths[0], channels * process.vocab_size)
        zero_(self.head)

    def _body(self, x_t: Tensor, z: Tensor | None, t: Tensor) -> Tensor:
        """Vectors of all pixels, ``(..., B, H W, width)``."""
        h = self.down.pixel_vectors(self.tokens(x_t))
        c = self.condition(z, t)
        rows = h.shape[:1]
        if z is not None:
            rows = torch.broadcast_shapes(rows, z.shape[:-1])
            z = z.expand(*rows, -1).flatten(0, -2)
            h = h.expand(*rows, *h.shape[-3:]).flatten(0, -4)
        if c is not None:
            c = c.expand(*rows, -1).flatten(0, -2)
        coarse, seen = self.down(h, c, z)
        h = silu(self.norm(self.up(coarse, seen, c)))
        return h.flatten(-2).transpose(-1, -2).unflatten(0, rows)

    def heavy_parts(self) -> list[nn.Module]:
        return [self.down, self.up]

    def _head(self, h: Tensor) -> Tensor:
        return pixel_logits(self.head, h.flatten(0, -3), self.channels).unflatten(0, h.shape[:-2])

    def _head_at(self, h: Tensor, index: Tensor | None) -> Tensor:
        return chosen_pixel_logits(self.head, h, index, self.channels)


class UNetFeatures(Features):
    r"""Recognition features ``(B, F)`` of ``x_0`` and of which positions are visible, masked and
    targeted: the way down of a U-Net, and a linear map of its coarsest grid, since a mean over it
    would lose where things are.

    Args:
        process, shape, channels, hidden_dim, multipliers, num_blocks, attention_levels, num_heads,
            condition_dim, embedding_dim, dropout: as in :class:`UNetDecoder`.
        feature_dim: number ``F`` of features.
        time_conditioning: feed ``t`` too.

    Shapes:
        a :class:`MaskedBatch` of ``B`` rows gives ``(B, F)``.
    """

    def __init__(
        self,
        process: MaskingProcess,
        *,
        shape: Sequence[int],
        channels: int = 1,
        hidden_dim: int = 64,
        multipliers: Sequence[int] = (1, 2, 2),
        num_blocks: int = 2,
        attention_levels: int = 1,
        num_heads: int = 4,
        condition_dim: int = 256,
        embedding_dim: int = 32,
        feature_dim: int = 256,
        time_conditioning: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(process, feature_dim)
        self.tokens = TokenCode(process.vocab_size, embedding_dim, with_mask=False)
        self.condition = Condition(condition_dim, 0, time_conditioning=time_conditioning)
        self.down = DownPath(
            process,
            self.tokens.dim + 2,
            self.condition.size,
            0,
            shape=shape,
            channels=channels,
            hidden_dim=hidden_dim,
            multipliers=multipliers,
            num_blocks=num_blocks,
            attention_levels=attention_levels,
            num_heads=num_heads,
            dropout=dropout,
        )
        self.norm = group_norm(self.down.coarsest[0])
        self.output = nn.Linear(math.prod(self.down.coarsest), feature_dim)

    def _token_vectors(self) -> Tensor:
        return self.tokens.clean

    def _features(self, codes: Tensor, batch: MaskedBatch) -> Tensor:
        status = status_of(batch, codes).expand(*codes.shape[:-1], 2)
        h = self.down.pixel_vectors(torch.cat([codes, status], -1))
        rows = h.shape[:-3]
        c = self.condition(None, batch.t)
        if c is not None:
            c = c.expand(*rows, -1).flatten(0, -2)
        coarse, _ = self.down(h.flatten(0, -4), c)
        return silu(self.output(silu(self.norm(coarse)).flatten(1))).unflatten(0, rows)


class UNetEncoder(NormalEncoder):
    r"""Recognition network: ``(z_loc, z_scale)`` from :class:`UNetFeatures`.

    Args:
        process: gives number of grey levels and length.
        latent_dim: size ``d`` of the latent.
        sizes: further arguments of :class:`UNetFeatures`, ``shape`` among them.

    Shapes:
        a :class:`MaskedBatch` of ``B`` rows gives two tensors ``(B, d)``.
    """

    def __init__(self, process: MaskingProcess, latent_dim: int, **sizes: Any) -> None:
        super().__init__(UNetFeatures(process, **sizes), latent_dim)
