r"""Few-step quality of text: n-gram frequencies and entropy, model-free.

Between the frequencies of n-grams in two sets of rows, with :math:`m = (p + q) / 2`,

.. math::
    \mathrm{JS}(p, q) = \tfrac12 \mathrm{KL}(p \,\|\, m) + \tfrac12 \mathrm{KL}(q \,\|\, m) \le
    \ln 2 .

Most long n-grams occur once, so that finite sets of *one* text are apart too, the more so the
longer the grams and the fewer the rows: a distance is read beside :func:`ngram_floor`, the
distance between as many real rows.

References:
    Lin 1991, "Divergence measures based on the Shannon entropy"; Grassberger 1988 for the bias of
    entropies from counts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vadd_pyro.process import check_size
from vadd_pyro.quality.ngrams import distinct, token_rows

__all__ = ["NGramDistance", "TokenEntropy", "ngram_floor", "ngram_jensen_shannon", "token_entropy"]


class NGramDistance(NamedTuple):
    """A distance between n-gram frequencies.

    Args:
        value: Jensen-Shannon divergence in nats, at most ``ln 2``.
        stderr: its standard error over the rows of both sets, to first order: without the bias
            upwards that few rows bring, see :func:`ngram_floor`.
    """

    value: float
    stderr: float


class TokenEntropy(NamedTuple):
    """How varied the tokens of rows are, in bits.

    Args:
        pooled: entropy of the frequencies of tokens in all rows together.
        pooled_stderr: its standard error over rows.
        within_rows: mean over rows of the entropy of a row's own frequencies, at most ``log2 D``.
        within_rows_stderr: its standard error over rows.
        distinct_rows: share of different rows among all; 1 if none repeats.
    """

    pooled: float
    pooled_stderr: float
    within_rows: float
    within_rows_stderr: float
    distinct_rows: float


def ngram_jensen_shannon(a: Tensor, b: Tensor, n: int) -> NGramDistance:
    """Distance between the frequencies of n-grams in two sets of rows.

    Args:
        a, b: rows of tokens, ``(N, D)`` and ``(M, E)``, at least 2 of each, independent; grams do
            not cross rows.
        n: tokens in a gram.

    Returns:
        :class:`NGramDistance`: zero for sets of equal frequencies, ``ln 2`` if no gram is in both.

    Raises:
        TypeError, ValueError: unless ``a`` and ``b`` hold tokens of rows of at least ``n``.
    """
    check_size("n", n)
    tokens = [_rows(x, name) for x, name in ((a, "a"), (b, "b"))]
    for name, rows in zip("ab", tokens, strict=True):
        if rows.shape[1] < n:
            raise ValueError(
                f"n must be at most {rows.shape[1]}, the length of the rows of {name}, got {n}"
            )
    grams, num_kinds = _grams(tokens, n)
    laws = [np.bincount(g.ravel(), minlength=num_kinds) / g.size for g in grams]
    middle = (laws[0] + laws[1]) / 2
    distance = variance = 0.0
    for gram, law in zip(grams, laws, strict=True):
        # A gram's contribution, which is also the derivative by its frequency (up to a constant).
        ratio = np.log(np.divide(law, middle, out=np.ones_like(law), where=law > 0)) / 2
        rows = ratio[gram].mean(1)
        distance += float(rows.mean())
        variance += float(rows.var(ddof=1)) / len(rows)
    return NGramDistance(min(max(distance, 0.0), math.log(2)), variance**0.5)


def ngram_floor(
    real: Tensor, n: int, num_rows: int, num_reference: int | None = None, *, seed: int = 0
) -> NGramDistance:
    """The distance that finite numbers of rows have between real text and real text.

    Two sets of rows without overlap are drawn and compared. Let them be as large as the sets whose
    distance is read beside it: ``num_rows`` samples held against ``num_reference`` real rows.

    Args:
        real: real rows of tokens, ``(N, D)``.
        n: tokens in a gram.
        num_rows: rows in the one set.
        num_reference: rows in the other; as many by default.
        seed: of the draw.

    Returns:
        :class:`NGramDistance`.

    Raises:
        TypeError, ValueError: as :func:`ngram_jensen_shannon`, and if there are too few rows.
    """
    check_size("num_rows", num_rows, least=2)
    num_reference = num_rows if num_reference is None else num_reference
    check_size("num_reference", num_reference, least=2)
    check_size("seed", seed, least=0)
    rows = _rows(real, "real")
    if num_rows + num_reference > len(rows):
        raise ValueError(
            f"real has {len(rows)} rows: expected at least {num_rows + num_reference}, for "
            f"num_rows={num_rows} beside num_reference={num_reference}"
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    one, other = order[:num_rows], order[num_rows : num_rows + num_reference]
    return ngram_jensen_shannon(torch.from_numpy(rows[one]), torch.from_numpy(rows[other]), n)


def token_entropy(x: Tensor) -> TokenEntropy:
    """Entropy of the tokens of rows, so that collapse does not look like quality.

    A sampler that always writes the same few words has a low pooled entropy; one whose rows each
    repeat one token, a low entropy per row; one that writes the same row again and again, few
    distinct rows. All of these depend on ``N`` and ``D``: hold them against as many real rows.

    Args:
        x: rows of tokens, ``(N, D)``, at least 2 rows.

    Returns:
        :class:`TokenEntropy`.

    Raises:
        TypeError, ValueError: unless ``x`` holds tokens of two rows or more.
    """
    tokens = _rows(x, "x")
    num_rows, length = tokens.shape
    _, counts, kinds = distinct(tokens, int(tokens.max()) + 1)
    surprise = -np.log2(counts / tokens.size)[kinds].mean(1)
    # Row and token as one code, so that rows are counted apart without a table of all tokens.
    owner = np.arange(num_rows)[:, None] * len(counts) + kinds
    _, own_counts, own_kinds = distinct(owner, num_rows * len(counts))
    own = -np.log2(own_counts / length)[own_kinds].mean(1)
    return TokenEntropy(
        pooled=float(surprise.mean()),
        pooled_stderr=float(surprise.std(ddof=1)) / num_rows**0.5,
        within_rows=float(own.mean()),
        within_rows_stderr=float(own.std(ddof=1)) / num_rows**0.5,
        distinct_rows=len(np.unique(tokens, axis=0)) / num_rows,
    )


def _rows(x: Tensor, name: str) -> np.ndarray:
    tokens = token_rows(x, name)
    if len(tokens) < 2:
        raise ValueError(f"{name} has 1 row: expected at least 2, for a standard error")
    return tokens


def _grams(sets: list[np.ndarray], n: int) -> tuple[list[np.ndarray], int]:
    """Number of the gram that begins at each position of the sets, and how many there can be."""
    size = vocab_size = max(int(x.max()) for x in sets) + 1
    grams = sets
    for place in range(1, n):
        codes = [g[:, :-1] * vocab_size + x[:, place:] for g, x in zip(grams, sets, strict=True)]
        seen, _, ranks = distinct(np.concatenate([c.ravel() for c in codes]), size * vocab_size)
        parts = np.split(ranks, [codes[0].size])
        grams = [part.reshape(c.shape) for part, c in zip(parts, codes, strict=True)]
        size = len(seen)
    return grams, size
