"""Last layers of perceptrons at chosen positions.

Such a layer has a row of weights for each position and token. Where few positions of a row are to
be drawn, only the products of its vector with their weights are taken; and of two tokens only the
difference of their logits counts.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from vadd_pyro.nn.conditioning import full_precision
from vadd_pyro.nn.shortcuts import may_shorten, row_starts

__all__ = ["chosen_logits", "taken"]

_PRODUCT = 6.0  # what one of a few products costs, in multiplications of a dense layer
_GROUPED = 0.7  # share of the positions below which they are gone through one by one,
_FEW, _SEVERAL = 8, 16  # if there are few of them, and several tokens


def taken(flat: Tensor, index: Tensor | None) -> Tensor:
    """The chosen rows of ``flat (B D, K)``, or all."""
    return flat if index is None else flat.index_select(0, index)


def chosen_logits(
    layer: nn.Linear, h: Tensor, index: Tensor | None, length: int, vocab_size: int
) -> Tensor:
    """Logits of chosen positions from rows' vectors, up to a number for each position.

    Args:
        layer: gives all logits of a row, ``D K`` numbers, position after position.
        h: vectors, ``(B, width)``.
        index: into the ``B D`` positions, ``(n,)`` long and increasing; None for all.
        length, vocab_size: ``D`` and ``K``.

    Returns:
        ``(n, K)``.
    """
    if not may_shorten(layer, len(h)) or layer.weight.dtype != h.dtype:
        return taken(full_precision(layer, h).view(-1, vocab_size), index)
    weight = layer.weight.unflatten(0, (length, vocab_size))
    bias = None if layer.bias is None else layer.bias.unflatten(0, (length, vocab_size))
    if vocab_size > 2:
        return _logits(weight, bias, h, index)
    weight = weight[:, 1:] - weight[:, :1]
    return pad(_logits(weight, None if bias is None else bias.diff(dim=-1), h, index), (1, 0))


def _logits(weight: Tensor, bias: Tensor | None, h: Tensor, index: Tensor | None) -> Tensor:
    """The same for weights ``(D, columns, width)`` and biases ``(D, columns)``."""
    length, columns, _ = weight.shape
    if index is not None:
        share = len(index) / (len(h) * length)
        chosen: Tensor | None = None
        if share * _PRODUCT < 1:
            chosen = _products(weight, h, index)
        elif share < _GROUPED and length <= _FEW and columns >= _SEVERAL:
            chosen = _grouped(weight, h, index)
        if chosen is not None:
            return chosen if bias is None else chosen.add_(bias.index_select(0, index % length))
    every = linear(h, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return taken(every.view(-1, columns), index)


def _grouped(weight: Tensor, h: Tensor, index: Tensor) -> Tensor:
    """Products of rows' vectors with the weights of chosen positions, position by position."""
    length, columns, _ = weight.shape
    row = index.div(length, rounding_mode="floor")
    position = index - row * length
    found = h.new_empty(len(index), columns)
    for j in range(length):
        which = (position == j).nonzero().squeeze(-1)
        vectors = h.index_select(0, row.index_select(0, which))
        found.index_copy_(0, which, vectors @ weight[j].t())
    return found


def _products(weight: Tensor, h: Tensor, index: Tensor) -> Tensor:
    """The same, product by product."""
    _allow_sparse()
    length, columns, width = weight.shape
    column = index % length
    if columns > 1:
        several = torch.arange(columns, device=index.device)
        column = (column.unsqueeze(-1) * columns + several).view(-1)
    starts = row_starts(index, len(h), length) * columns
    every = weight.reshape(length * columns, width)
    shape = (len(h), len(every))
    zeros = h.new_zeros(len(column))
    pattern = torch.sparse_csr_tensor(starts, column, zeros, shape, check_invariants=False)
    found = torch.sparse.sampled_addmm(pattern, h, every.t(), beta=0.0)
    return found.values().view(-1, columns)


@functools.cache
def _allow_sparse() -> None:
    """Torch says once a process that its sparse tensors may still change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1), device="cpu")
