r"""First layers of perceptrons, by looking up what each token adds.

The layer is affine in the vectors :math:`c(x_j)` of the tokens, so it is a sum of rows of a table,

.. math::
    b + \sum_j W_j c(x_j) = b + \sum_j W_j c(\text{mask}) + \sum_{j\ \text{visible}} T_{j, x_j},
    \qquad T_{jk} = W_j \big( c(k) - c(\text{mask}) \big),

and rows of masks cost nothing. In a sampler only what a step has changed is added to what the sum
was before (:mod:`vadd_pyro.nn.memory`), so that all steps together look up each token once.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from vadd_pyro.nn.conditioning import TokenCode
from vadd_pyro.nn.memory import row_memory
from vadd_pyro.nn.shortcuts import is_plain, may_shorten, row_starts

__all__ = ["token_layer"]

_TABLE = 2**22  # numbers of the largest table
_LOOKUP = 4.0  # what adding a number from a table costs, in multiplications of a dense layer


def token_layer(
    layer: nn.Linear, tokens: nn.Embedding | TokenCode, x_t: Tensor, codes: Tensor | None = None
) -> Tensor:
    """``layer(tokens(x_t).flatten(-2))``.

    Args:
        layer: from ``D e`` numbers.
        tokens: gives vectors ``(..., e)`` of tokens, the mask's id the last.
        x_t: tokens, ``(B, D)``.
        codes: ``tokens(x_t)``, if it is known already.
    """
    if may_shorten(layer, len(x_t)) and is_plain(tokens):
        found = _looked_up(layer, tokens, x_t)
        if found is not None:
            return found
    return layer((tokens(x_t) if codes is None else codes).flatten(-2))


def _looked_up(layer: nn.Linear, tokens: nn.Module, x_t: Tensor) -> Tensor | None:
    """The same from a table; None where that takes longer or is not known to be the same."""
    if type(tokens) is TokenCode:
        codes = tokens.table
    elif type(tokens) is nn.Embedding and tokens.max_norm is None:
        codes = tokens.weight
    else:
        return None
    num_rows, length = x_t.shape
    vocab_size = len(codes) - 1
    large = length * vocab_size * layer.out_features > _TABLE or 2 * vocab_size > num_rows
    if large or codes.dtype != layer.weight.dtype:
        return None
    memory = row_memory()
    if memory is None or len(memory) != num_rows:
        return _Sums(layer, codes, num_rows).of(x_t, None, keep=False)
    sums = memory.held.get(id(layer))
    if sums is None or not sums.holds(layer, codes):
        sums = memory.held[id(layer)] = _Sums(layer, codes, memory.num_rows)
    return sums.of(x_t, memory.rows)


class _Sums:
    """Sums over the tokens of rows, each brought up to date from the last one.

    Args:
        layer: the first layer.
        codes: vectors of the tokens, ``(K + 1, e)``.
        num_rows: how many rows there are; they begin as masks.
    """

    def __init__(self, layer: nn.Linear, codes: Tensor, num_rows: int) -> None:
        self.num_rows = num_rows
        self.parameters = (layer.weight, layer.bias, codes)
        self.versions = [p._version for p in self.parameters if p is not None]
        self.vocab_size, self.size = len(codes) - 1, codes.shape[1]
        self.weight = layer.weight.unflatten(1, (-1, self.size))
        base = self.weight.sum(1) @ codes[-1]
        self.base = base if layer.bias is None else base + layer.bias
        self.table: Tensor | None = None
        self.x: Tensor | None = None  # tokens, None for masks
        self.h = self.base.expand(num_rows, -1)

    def holds(self, layer: nn.Linear, codes: Tensor) -> bool:
        """Whether this was computed with the parameters as they are."""
        known = zip(self.parameters, (layer.weight, layer.bias, codes), strict=True)
        if any(one is not other for one, other in known):
            return False
        return self.versions == [p._version for p in self.parameters if p is not None]

    def of(self, x_t: Tensor, rows: Tensor | None, keep: bool = True) -> Tensor | None:
        """The sums of some rows, ``(n, width)``; None where a dense layer is faster.

        Args:
            x_t: their tokens, ``(n, D)``.
            rows: which they are, ``(n,)``; None for all.
            keep: whether there will be a next time.
        """
        x, h = self.x, self.h
        if rows is not None:
            x = None if x is None else x.index_select(0, rows)
            h = h.index_select(0, rows)
        length = x_t.shape[1]
        differ = x_t != (self.vocab_size if x is None else x)
        changed = differ.reshape(-1).nonzero().squeeze(-1)
        new = length * self.vocab_size * self.size if self.table is None else 0
        if len(changed) * _LOOKUP + new > x_t.numel() * self.size:
            return None
        if len(changed):
            h = h + self._change(x_t, changed)
            if x is not None:
                before = x.reshape(-1).index_select(0, changed)
                if bool((before != self.vocab_size).any()):
                    h -= self._change(x, changed)
        if keep:
            self._keep(x_t, h, rows)
        return h

    def _change(self, x_t: Tensor, index: Tensor) -> Tensor:
        """What tokens at chosen positions add to rows of masks, ``(n, width)``."""
        if self.table is None:
            codes = self.parameters[2]
            table = (codes - codes[-1]) @ self.weight.permute(1, 2, 0)
            self.table = table.reshape(-1, table.shape[-1])
        rows, length = x_t.shape
        entry = x_t.reshape(-1).index_select(0, index)
        entry += index % length * (self.vocab_size + 1)
        ends = row_starts(index, rows, length)
        return embedding_bag(entry, self.table, ends, mode="sum", include_last_offset=True)

    def _keep(self, x_t: Tensor, h: Tensor, rows: Tensor | None) -> None:
        """Copies, for a caller may write to what it gave or got."""
        if self.x is None:
            self.x = x_t.new_full((self.num_rows, x_t.shape[1]), self.vocab_size)
            self.h = self.h.clone()
        if rows is None:
            self.x.copy_(x_t)
            self.h.copy_(h)
        else:
            self.x.index_copy_(0, rows, x_t)
            self.h.index_copy_(0, rows, h)
