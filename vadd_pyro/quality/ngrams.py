r"""Models of text that only count: n-grams with interpolated Witten-Bell smoothing.

A token ``w`` has, after the ``k`` tokens ``c`` before it, the probability

.. math::
    p_k(w \mid c) = \frac{n(c, w) + T(c)\, p_{k-1}(w \mid c')}{n(c) + T(c)}, \qquad p_{-1}(w) =
    \frac1K ,

where ``n`` counts, :math:`T(c)` is the number of different tokens seen after ``c``, and ``c'`` is
``c`` without its first token. A context that was never seen leaves :math:`p_k = p_{k-1}`. Contexts
do not cross rows: the token at position ``j`` of a row has the ``min(j, order)`` before it.

Such a model, fitted to real text, tells how likely samples are, not whether they vary: text that
repeats itself costs few bits. Read it beside :func:`vadd_pyro.quality.token_entropy` and a
distance.

References:
    Witten and Bell 1991, "The zero-frequency problem", method C; Chen and Goodman 1999, "An
    empirical study of smoothing techniques for language modeling".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vadd_pyro.process import MaskingProcess, check_size

__all__ = ["BitsPerToken", "NGramModel", "distinct", "token_rows"]

_UNSEEN = -1


class BitsPerToken(NamedTuple):
    """What a token costs under a model.

    Args:
        bits: mean over the tokens of all rows.
        stderr: its standard error over rows.
    """

    bits: float
    stderr: float


class _Level(NamedTuple):
    """Counts of the grams of one length that were seen.

    Args:
        codes: ``context * K + token`` of each gram, increasing, ``(U,)``; contexts are numbered as
            the grams of the level before.
        counts: how often each was seen, ``(U,)``.
        totals: how often each context was followed by a token, ``(contexts,)``.
        kinds: by how many different ones, ``(contexts,)``.
    """

    codes: np.ndarray
    counts: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray


class NGramModel:
    """An n-gram model with Witten-Bell smoothing, fitted when it is made.

    Six million characters at order 5 take a few seconds. Only grams that occur are stored.

    Args:
        x: rows of tokens to count, ``(N, D)``; one long row will do.
        order: how many tokens of context are used at most; grams are one longer.
        vocab_size: number of token values ``K``.

    Raises:
        TypeError, ValueError: unless ``x`` holds tokens, of rows longer than ``order``.

    Example:
        >>> model = NGramModel(torch.tensor([[0, 1] * 50]), order=1, vocab_size=2)
        >>> model.bits_per_token(torch.tensor([[0, 1] * 10, [1, 0] * 10])).bits < 0.1
        True
    """

    def __init__(self, x: Tensor, order: int, vocab_size: int) -> None:
        check_size("vocab_size", vocab_size, least=2)
        check_size("order", order, least=0)
        tokens = token_rows(x, "x", vocab_size)
        if tokens.shape[1] <= order:
            raise ValueError(
                f"order must be less than {tokens.shape[1]}, the length of the rows, got {order}"
            )
        self.vocab_size = vocab_size
        self.order = order
        self._levels = []
        contexts, size = np.zeros_like(tokens), 1
        for length in range(order + 1):
            codes = contexts * vocab_size + tokens[:, length:]
            seen, counts, ranks = distinct(codes, size * vocab_size)
            owner = seen // vocab_size
            totals = np.bincount(owner, counts, size)
            self._levels.append(_Level(seen, counts, totals, np.bincount(owner, minlength=size)))
            contexts, size = ranks[:, :-1], len(seen)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability of each token after those before it in its row.

        Args:
            x: rows of tokens, ``(N, D)``, of any length.

        Returns:
            Nats, ``(N, D)`` in double precision, which sum to the log-probability of a row.

        Raises:
            TypeError, ValueError: unless ``x`` holds tokens.
        """
        tokens = token_rows(x, "x", self.vocab_size)
        probability = np.full(tokens.shape, 1 / self.vocab_size)
        contexts = np.zeros_like(tokens)
        for length, level in enumerate(self._levels[: tokens.shape[1]]):
            codes = contexts * self.vocab_size + tokens[:, length:]
            place = np.searchsorted(level.codes, codes).clip(max=len(level.codes) - 1)
            known = contexts != _UNSEEN
            found = known & (level.codes[place] == codes)
            count = np.where(found, level.counts[place], 0)
            total = np.where(known, level.totals[contexts], 0)
            kinds = np.where(known, level.kinds[contexts], 0)
            shorter = probability[:, length:]
            longer = (count + kinds * shorter) / np.maximum(total + kinds, 1)
            probability[:, length:] = np.where(total > 0, longer, shorter)
            contexts = np.where(found, place, _UNSEEN)[:, :-1]
        return torch.from_numpy(np.log(probability))

    def bits_per_token(self, x: Tensor) -> BitsPerToken:
        """Cost of rows in bits per token, their first tokens, with short contexts, included.

        Args:
            x: independent rows of tokens, ``(N, D)`` with ``N`` at least 2.

        Returns:
            :class:`BitsPerToken`.

        Raises:
            TypeError, ValueError: unless ``x`` holds tokens of two rows or more.
        """
        rows = -self.log_prob(x).mean(1) / math.log(2)
        if len(rows) < 2:
            raise ValueError("x has 1 row: expected at least 2, for a standard error")
        return BitsPerToken(float(rows.mean()), float(rows.std()) / len(rows) ** 0.5)

    def __repr__(self) -> str:
        return (
            f"NGramModel(order={self.order}, vocab_size={self.vocab_size}): "
            f"{len(self._levels[-1].codes):,} different grams of {self.order + 1} tokens"
        )


def token_rows(x: Tensor, name: str, vocab_size: int | None = None) -> np.ndarray:
    """Check rows of tokens.

    Args:
        x: tokens, ``(N, D)``, any integer type.
        name: how messages call the argument.
        vocab_size: number of token values; by default as many as occur.

    Returns:
        ``(N, D)`` int64.

    Raises:
        TypeError, ValueError: naming the argument and what is wrong with it.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of tokens, got {type(x).__name__}")
    if x.dim() != 2 or 0 in x.shape:
        raise ValueError(f"{name} must have shape (N, D), not empty, got {tuple(x.shape)}")
    if vocab_size is None:
        vocab_size = max(2, int(x.max()) + 1)
    return MaskingProcess(vocab_size, x.shape[1]).check_tokens(x, name).cpu().numpy()


def distinct(codes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Different values among codes.

    Args:
        codes: integers in ``0..size - 1``, any shape.
        size: how many there could be.

    Returns:
        Those that occur, increasing, ``(U,)``; how often each does, ``(U,)``; and which of them
        each of ``codes`` is, in its shape.
    """
    if size > 4 * codes.size:  # a table would be longer than the data
        seen, ranks, counts = np.unique(codes, return_inverse=True, return_counts=True)
        return seen, counts, ranks.reshape(codes.shape)
    table = np.bincount(codes.ravel(), minlength=size)
    seen = np.flatnonzero(table)
    ranks = np.cumsum(table > 0) - 1
    return seen, table[seen], ranks[codes]
