"""The two paths of a U-Net: from fine to coarse grids of pixels, and back.

See :mod:`vadd_pyro.nn.unet` for the mathematics and its sources.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

from vadd_pyro.nn.attention import SelfAttention, check_heads
from vadd_pyro.nn.chosen import taken
from vadd_pyro.nn.conditioning import Modulation, check_dropout, full_precision
from vadd_pyro.process import MaskingProcess, check_size

__all__ = [
    "DownPath",
    "UpPath",
    "check_shape",
    "chosen_pixel_logits",
    "group_norm",
    "pixel_logits",
    "zero_",
]


def check_shape(
    process: MaskingProcess, shape: Sequence[int], channels: int, halvings: int = 0
) -> tuple[int, int]:
    """Height and width, checked against the rows and the number of halvings."""
    if not isinstance(shape, Sequence) or len(shape) != 2:
        raise ValueError(f"shape must be (height, width), got {shape!r}")
    height, width = shape
    for name, value in (("channels", channels), ("shape", height), ("shape", width)):
        check_size(name, value)
    if channels * height * width != process.length:
        raise ValueError(
            f"shape {(height, width)} with channels = {channels} makes "
            f"{channels * height * width} tokens a row, expected the process's length "
            f"{process.length}"
        )
    factor = 2**halvings
    if height % factor or width % factor:
        raise ValueError(
            f"shape {(height, width)} cannot be halved {halvings} times: for {halvings + 1} "
            f"multipliers expected multiples of {factor}; use fewer, or pad the images"
        )
    return height, width


def group_norm(width: int, *, affine: bool = True) -> nn.GroupNorm:
    """Up to 8 groups of at least two channels; one group if the channels do not pair."""
    return nn.GroupNorm(1 if width % 2 else math.gcd(8, width // 2), width, affine=affine)


def zero_(layer: nn.Module) -> None:
    """Set all parameters of a layer to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def pixel_logits(head: nn.Linear, h: Tensor, channels: int) -> Tensor:
    """Logits ``(N, D, K)`` in full precision, from vectors ``(N, H W, width)`` of pixels.

    Args:
        head: gives ``channels * K`` numbers a pixel.
        h: the vectors.
        channels: of the images.
    """
    h = h.contiguous()  # or a linear layer adds its bias out of place
    if channels == 1:
        return full_precision(head, h)
    # Channel by channel, so that logits, the largest tensor there is, are written in order.
    with torch.autocast(h.device.type, enabled=False):
        weight = head.weight.unflatten(0, (channels, -1))
        bias = head.bias.unflatten(0, (channels, 1, -1))
        logits = h.to(weight.dtype).unsqueeze(1) @ weight.transpose(-1, -2)
        return logits.add_(bias).flatten(1, 2)


def chosen_pixel_logits(head: nn.Linear, h: Tensor, index: Tensor | None, channels: int) -> Tensor:
    """The same at chosen positions, ``(n, K)``.

    Args:
        head, h, channels: as in :func:`pixel_logits`.
        index: into the ``N D`` positions, ``(n,)`` long; None for all.
    """
    if index is None or channels > 1:
        every = pixel_logits(head, h, channels)
        return taken(every.reshape(-1, every.shape[-1]), index)
    row = index.div(h.shape[-2], rounding_mode="floor")
    return full_precision(head, h[row, index - row * h.shape[-2]])


class _Dropout(nn.Dropout):
    """Dropout of grids, the same values however they lie in memory.

    torch's own fills its mask in the order of the memory, which a compiler changes around
    convolutions: a graph would then drop other values than the programs it is compared with.
    """

    def forward(self, h: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return h
        kept = torch.rand(h.shape, device=h.device, dtype=torch.float32) >= self.p
        return torch.where(kept, h / (1 - self.p), 0.0)


class _Block(nn.Module):
    """Two convolutions, the second behind the adaptive normalisation, and a residual.

    Then attention over all pixels, if wanted. What is added is zero before training.
    """

    def __init__(
        self, inputs: int, outputs: int, condition_dim: int, dropout: float, num_heads: int
    ) -> None:
        super().__init__()
        self.first_norm = group_norm(inputs)
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = group_norm(outputs, affine=False)
        self.modulation = Modulation(condition_dim, 2 * outputs)
        self.dropout = _Dropout(dropout)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        zero_(self.second)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention: SelfAttention | None = None
        if num_heads:
            self.attention_norm = group_norm(outputs)
            self.attention = SelfAttention(outputs, num_heads)
            zero_(self.attention.output)

    def forward(self, h: Tensor, c: Tensor | None) -> Tensor:
        scale, shift = self.modulation(c).unsqueeze(-1).unsqueeze(-1).chunk(2, -3)
        y = self.norm(self.first(silu(self.first_norm(h)))) * (1 + scale) + shift
        h = self.skip(h) + self.second(self.dropout(silu(y)))
        if self.attention is None:
            return h
        pixels = self.attention_norm(h).flatten(-2).transpose(-1, -2)
        return h + self.attention(pixels).transpose(-1, -2).unflatten(-1, h.shape[-2:])


class DownPath(nn.Module):
    """From token vectors to the coarsest grid, attention there included.

    Args:
        process: gives the length.
        code_dim: size of a token's vector.
        condition_dim, latent_dim: sizes of what blocks and coarsest grid are told; 0 for nothing.
        others: as in :class:`~vadd_pyro.nn.UNetDecoder`.
    """

    def __init__(
        self,
        process: MaskingProcess,
        code_dim: int,
        condition_dim: int,
        latent_dim: int,
        *,
        shape: Sequence[int],
        channels: int,
        hidden_dim: int,
        multipliers: Sequence[int],
        num_blocks: int,
        attention_levels: int,
        num_heads: int,
        dropout: float,
    ) -> None:
        super().__init__()
        if not multipliers:
            raise ValueError(f"multipliers must name at least one level, got {multipliers!r}")
        for name, value in (
            ("hidden_dim", hidden_dim),
            ("num_blocks", num_blocks),
            *(("multipliers", value) for value in multipliers),
        ):
            check_size(name, value)
        check_size("attention_levels", attention_levels, least=0)
        check_dropout(dropout)
        last = len(multipliers) - 1
        height, width = check_shape(process, shape, channels, last)
        self.pixels = (channels, height, width)
        self.widths = [hidden_dim * multiplier for multiplier in multipliers]
        self.heads = [num_heads if last - i < attention_levels else 0 for i in range(last + 1)]
        for level_width in self.widths[len(self.widths) - attention_levels :]:
            check_heads(num_heads, level_width)
        self.num_blocks = num_blocks
        self.coarsest = (self.widths[-1], height // 2**last, width // 2**last)

        self.inputs = nn.Conv2d(channels * code_dim, self.widths[0], 3, padding=1)
        self.positions = nn.Parameter(0.1 * torch.randn(self.widths[0], height, width))
        self.blocks = nn.ModuleList()
        self.halvings = nn.ModuleList()
        now = self.widths[0]
        for level, level_width in enumerate(self.widths):
            if level:
                self.halvings.append(nn.Conv2d(now, now, 3, stride=2, padding=1))
            for _ in range(num_blocks):
                self.blocks.append(
                    _Block(now, level_width, condition_dim, dropout, self.heads[level])
                )
                now = level_width
        self.latent = nn.Linear(latent_dim, math.prod(self.coarsest)) if latent_dim else None
        self.coarse_positions = nn.Parameter(0.1 * torch.randn(self.coarsest))
        self.middle = nn.ModuleList(
            _Block(now, now, condition_dim, dropout, heads) for heads in (self.heads[-1], 0)
        )

    def pixel_vectors(self, codes: Tensor) -> Tensor:
        """Token vectors ``(..., D, e)`` as maps ``(..., width, H, W)``."""
        maps = codes.reshape(-1, *self.pixels, codes.shape[-1])
        maps = maps.permute(0, 1, 4, 2, 3).flatten(1, 2)
        return (self.inputs(maps) + self.positions).unflatten(0, codes.shape[:-2])

    def forward(
        self, h: Tensor, c: Tensor | None, z: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The coarsest map of ``N`` rows, and what every block on the way returned.

        Args:
            h: pixel vectors, ``(N, width, H, W)``.
            c: condition, ``(N, size)``.
            z: latent, ``(N, d)``.
        """
        seen = []
        for index, block in enumerate(self.blocks):
            level, place = divmod(index, self.num_blocks)
            if level and not place:
                h = self.halvings[level - 1](h)
            h = block(h, c)
            seen.append(h)
        h = h + self.coarse_positions
        if self.latent is not None:
            h = h + self.latent(z).unflatten(-1, self.coarsest)
        for block in self.middle:
            h = block(h, c)
        return h, seen


class UpPath(nn.Module):
    """Back to the finest grid, with what the way down returned."""

    def __init__(self, down: DownPath, condition_dim: int, dropout: float) -> None:
        super().__init__()
        self.num_blocks = down.num_blocks
        self.blocks = nn.ModuleList()
        self.doublings = nn.ModuleList()
        now = down.widths[-1]
        for level, width in reversed(list(enumerate(down.widths))):
            for _ in range(self.num_blocks):
                self.blocks.append(
                    _Block(now + width, width, condition_dim, dropout, down.heads[level])
                )
                now = width
            if level:
                self.doublings.append(nn.Conv2d(now, now, 3, padding=1))

    def forward(self, h: Tensor, seen: list[Tensor], c: Tensor | None) -> Tensor:
        """Vectors ``(N, width, H, W)`` of all pixels."""
        seen = list(seen)
        for index, block in enumerate(self.blocks):
            step, place = divmod(index, self.num_blocks)
            if step and not place:
                h = self.doublings[step - 1](interpolate(h, scale_factor=2.0))
            h = block(torch.cat([h, seen.pop()], 1), c)
        return h
