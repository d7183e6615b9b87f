r"""Attention over the positions of a row, and rotary positions.

A query at position ``m`` and a key at ``n`` are turned, two coordinates at a time, by angles
proportional to their positions, so that their product depends on ``m - n`` alone:

.. math::
    \langle R_m q, R_n k \rangle = \langle q, R_{n - m} k \rangle .

References:
    Vaswani et al. 2017 (arXiv 1706.03762); Su et al. 2021 (arXiv 2104.09864).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from vadd_pyro.process import check_size

__all__ = ["AttentionPool", "Rotary", "SelfAttention", "attend", "check_heads"]


def check_heads(num_heads: int, width: int, *, even: bool = False) -> None:
    """Check that a width can be shared out among attention heads.

    Args:
        num_heads, width: both at least one.
        even: whether the size of a head must be even, as rotary positions need.

    Raises:
        ValueError: naming the number of heads and the width.
    """
    check_size("num_heads", num_heads)
    step = num_heads * (2 if even else 1)
    if width % step:
        raise ValueError(
            f"num_heads = {num_heads} must share out the width {width} evenly: expected a "
            f"multiple of {step} as width"
        )


class Rotary(nn.Module):
    """Turns queries and keys by their positions.

    Args:
        length: number of positions ``D``.
        head_dim: size of a head, even.
        base: the slowest pair of coordinates turns ``base`` times as slowly as the first.

    Shapes:
        ``(..., D, head_dim)`` to the same.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, length: int, head_dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        half = head_dim // 2
        frequency = torch.exp(-math.log(base) * torch.arange(half) / half)
        angle = torch.arange(length).unsqueeze(-1) * frequency
        self.register_buffer("cosine", angle.cos(), persistent=False)
        self.register_buffer("sine", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        turned = torch.cat(
            [
                first * self.cosine - second * self.sine,
                first * self.sine + second * self.cosine,
            ],
            -1,
        )
        return turned.to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(query key^T / sqrt(size)) value`` by torch's kernels, but for cuDNN's on GPUs.

    Its backward pass is reported to give gradients that are no numbers on H100 in half precision,
    where logits are far below zero (pytorch issue 196678, with a mask and 64, 192, 320, ...
    positions). Such gradients were met here at 64 positions, without a mask; that this kernel made
    them is likely and was not shown.

    Args:
        query, key, value: ``(rows, heads, positions, size)``.
    """
    kinds = _kinds_allowed() if query.is_cuda else []
    if not kinds:
        return scaled_dot_product_attention(query, key, value)
    with sdpa_kernel(kinds):
        return scaled_dot_product_attention(query, key, value)


def _kinds_allowed() -> list[SDPBackend]:
    """Kernels other than cuDNN's, of those that are allowed now; dynamo cannot ask, so all."""
    if torch.compiler.is_compiling():
        return [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    allowed = {
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
    }
    return [kind for kind, allowed_now in allowed.items() if allowed_now]


class SelfAttention(nn.Module):
    """Every position attends to all positions of its row.

    Args:
        width: size of a position's vector.
        num_heads: number of heads, a divisor of ``width``.
        rotary: turns queries and keys; none by default.

    Shapes:
        ``(..., D, width)`` to the same.
    """

    def __init__(self, width: int, num_heads: int, rotary: Rotary | None = None) -> None:
        super().__init__()
        check_heads(num_heads, width, even=rotary is not None)
        self.num_heads = num_heads
        self.rotary = rotary
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        # Fused kernels take rows, heads, positions and coordinates, and no further dimensions.
        qkv = self.inputs(h).reshape(-1, h.shape[-2], 3, self.num_heads, _head_dim(h, self))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.rotary is not None:
            query, key = self.rotary(query), self.rotary(key)
        mixed = attend(query, key, value)
        return self.output(mixed.transpose(1, 2).reshape(h.shape))


class AttentionPool(nn.Module):
    """One vector of a row: what a learned query finds among its positions.

    Args:
        width: size of a position's vector, and of the result.
        num_heads: number of heads, a divisor of ``width``.

    Shapes:
        ``(..., D, width)`` to ``(..., width)``.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        check_heads(num_heads, width)
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.randn(num_heads, 1, width // num_heads))
        self.inputs = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        pairs = self.inputs(h).reshape(-1, h.shape[-2], 2, self.num_heads, _head_dim(h, self))
        key, value = pairs.permute(2, 0, 3, 1, 4).unbind(0)
        query = self.query.to(key.dtype).expand(len(key), -1, -1, -1)
        mixed = attend(query, key, value)
        return self.output(mixed.reshape(h.shape[:-2] + h.shape[-1:]))


def _head_dim(h: Tensor, module: SelfAttention | AttentionPool) -> int:
    return h.shape[-1] // module.num_heads
