r"""Log-probabilities of whole rows of tokens, with no copy of their logits kept.

.. math::
    s = \sum_{j\ \text{target}} \Big( \ell_{j, x_j} - \log \sum_k e^{\ell_{jk}} \Big), \qquad
    \frac{\partial s}{\partial \ell_{jk}} = [k = x_j] - \frac{e^{\ell_{jk}}}{\sum_l e^{\ell_{jl}}}
    \quad \text{at targets}.

Logits ``(B, D, K)`` are often the largest tensor of a training step. A cross-entropy keeps their
normalised copy for the way back, and there has two gradients of that size, before and behind the
normalisation: three such tensors at once. Here the logits alone are kept; on the way back their
probabilities are computed again and become the gradient where they stand. So there are never more
than two. Second derivatives go through ordinary operations, which take more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, logsigmoid

__all__ = ["row_scores", "shared_row_scores"]

# Torch's kernels on the CPU are slow on fewer tokens, which tells where there are many of them.
_FEW = 16
_MANY = 2**13
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def row_scores(logits: Tensor, value: Tensor, target: Tensor | None = None) -> Tensor:
    """Log-probabilities of rows, summed over their target positions.

    Args:
        logits: unnormalised log-probabilities, ``(..., D, K)``.
        value: tokens, ``(..., D)`` long, broadcast against ``logits``; anything at positions that
            are no targets.
        target: positions that are scored, ``(..., D)`` bool, broadcast too; None scores all.

    Returns:
        ``(...)`` nats.

    Raises:
        IndexError: for values outside ``0..K-1`` at positions that are scored.
    """
    hidden = None if target is None else ~target
    if hidden is not None:
        value = value * ~hidden
    shape = logits.shape[:-1]
    if value.shape != shape:
        shape = torch.broadcast_shapes(value.shape, shape)
        logits, value = logits.expand(shape + logits.shape[-1:]), value.expand(shape)
    if logits.shape[-1] == 2:
        scores = _BinaryRowScores.apply(logits, value, hidden)
        if not value.numel():
            return scores
        # Refuses what is no token; added, so that compilers do not pass it over.
        extremes = torch.stack(value.aminmax())
        return scores + embedding(extremes, scores.new_zeros(2, 1)).sum()
    return _RowScores.apply(logits, value.unsqueeze(-1), hidden)


def shared_row_scores(
    logits: Tensor, row: Tensor, value: Tensor, target: Tensor | None = None
) -> Tensor:
    """The same for rows of which several have the same logits.

    Args:
        logits: ``(..., U, D, K)``.
        row: which of the ``U`` each of ``B`` rows has, ``(B,)`` long.
        value: tokens, ``(B, D)`` long.
        target: ``(B, D)`` bool or None.

    Returns:
        ``(..., B)`` nats.
    """
    length, vocab_size = logits.shape[-2:]
    hidden = None if target is None else ~target
    if hidden is not None:
        value = value * ~hidden
    position = torch.arange(length, device=value.device)
    entry = (row.unsqueeze(-1) * length + position) * vocab_size + value
    return _SharedRowScores.apply(logits, row, entry, hidden)


def _is_short(logits: Tensor) -> bool:
    """Whether vocabularies are so small that a softmax over them is best written out."""
    few = logits.shape[-1] < _FEW and logits.numel() >= _MANY
    return few and logits.device.type == "cpu" and logits.element_size() >= 4


def _log_probabilities(
    logits: Tensor, pick: Callable[[Tensor], Tensor], spread: Callable[[Tensor], Tensor]
) -> Tensor:
    """The chosen log-probabilities.

    Args:
        logits: ``(..., K)``.
        pick: takes what is wanted from a tensor of the shape of ``logits``.
        spread: lays numbers of shape ``(..., 1)`` out over what is wanted.
    """
    if not _is_short(logits):
        return pick(torch.log_softmax(logits, -1))
    shifted = logits - logits.amax(-1, keepdim=True)
    picked = pick(shifted)
    return picked - spread(shifted.exp_().sum(-1, keepdim=True).log_())


def _probabilities(logits: Tensor) -> Tensor:
    """A softmax over the last dimension, in a tensor of its own that may be written to."""
    if torch.is_grad_enabled() or not _is_short(logits):
        return torch.softmax(logits, -1)
    p = (logits - logits.amax(-1, keepdim=True)).exp_()
    return p.div_(p.sum(-1, keepdim=True))


def _shown(value: Tensor, hidden: Tensor | None) -> Tensor:
    """Zero where it is hidden, whatever stands there, by its bits: ``masked_fill`` takes
    processors one position at a time.
    """
    if hidden is None:
        return value
    bits = _BITS[value.element_size()]
    return (value.view(bits) & (hidden.to(bits) - 1)).view(value.dtype)


def _per_position(outer: Tensor, hidden: Tensor | None, length: int) -> Tensor:
    """Gradients of rows ``(...)`` at each position, ``(..., D)``, zero where it is hidden."""
    outer = outer.unsqueeze(-1)
    if hidden is None:
        return outer.expand(*outer.shape[:-1], length)
    if torch.is_grad_enabled():
        return outer.masked_fill(hidden, 0.0)
    return _shown(outer, hidden)


class _RowScores(torch.autograd.Function):
    # What autograd needs is kept in ``forward`` and not in ``setup_context``, which would cost
    # each call some 40 us to look at signatures.
    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, hidden: Tensor | None) -> Tensor:
        ctx.save_for_backward(logits, index, hidden)
        picked = _log_probabilities(logits, lambda t: t.gather(-1, index), lambda t: t)
        return _shown(picked.squeeze(-1), hidden).sum(-1)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        logits, index, hidden = ctx.saved_tensors
        p = _probabilities(logits)
        factor = _per_position(outer[0].to(p.dtype), hidden, index.shape[-2]).unsqueeze(-1)
        if torch.is_grad_enabled():
            return (p * -factor).scatter_add(-1, index, factor), None, None
        return p.mul_(-factor).scatter_add_(-1, index, factor), None, None


class _BinaryRowScores(torch.autograd.Function):
    """Of two tokens the log-odds say all: nothing is looked up, so that processors go through many
    positions at a time.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, value: Tensor, hidden: Tensor | None) -> Tensor:
        ctx.save_for_backward(logits, value, hidden)
        odds = logits[..., 1] - logits[..., 0]
        return _shown(logsigmoid(odds * (2 * value - 1)), hidden).sum(-1)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        logits, value, hidden = ctx.saved_tensors
        p = torch.sigmoid(logits[..., 1] - logits[..., 0])
        factor = _per_position(outer[0].to(p.dtype), hidden, value.shape[-1])
        of_one = ((value - p) * factor).unsqueeze(-1)
        signs = torch.arange(-1, 2, 2, dtype=of_one.dtype, device=of_one.device)
        return of_one * signs, None, None


class _SharedRowScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, row: Tensor, entry: Tensor, hidden: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(logits, row, entry, hidden)

        def pick(values: Tensor) -> Tensor:
            picked = values.flatten(-3).index_select(-1, entry.flatten())
            return picked.unflatten(-1, entry.shape)

        picked = _log_probabilities(
            logits, pick, lambda norm: norm.squeeze(-1).index_select(-2, row)
        )
        return _shown(picked, hidden).sum(-1)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None, None]:
        logits, row, entry, hidden = ctx.saved_tensors
        p = _probabilities(logits)
        factor = _per_position(outer[0].to(p.dtype), hidden, entry.shape[-1])
        total = factor.new_zeros(logits.shape[:-1]).index_add(-2, row, factor).unsqueeze(-1)
        where, what = entry.flatten(), factor.flatten(-2)
        if torch.is_grad_enabled():
            grad = (p * -total).flatten(-3).index_add(-1, where, what)
        else:
            grad = p.mul_(-total).flatten(-3).index_add_(-1, where, what)
        return grad.unflatten(-1, logits.shape[-3:]), None, None, None
