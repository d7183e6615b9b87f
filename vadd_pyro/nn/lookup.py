r"""First layers of perceptrons, by looking up what each token adds.

The layer is affine in the vectors :math:`c(x_j)` of the tokens, so it is a sum of rows of a table,

.. math::
    b + \sum_j W_j c(x_j) = b + \sum_j W_j c(\text{mask}) + \sum_{j\ \text{visible}} T_{j, x_j},
    \qquad T_{jk} = W_j \big( c(k) - c(\text{mask}) \big),

and rows of masks cost nothing. In a sampler only what a step has changed is added to what the sum
was before (:mod:`vadd_pyro.nn.memory`), so that all steps together look up each token once.

In training the layer stays a product, but of fewer numbers. A position that takes one of ``V``
vectors is told by ``V - 1`` indicators, of which the layer is an affine function too,

.. math::
    b + \sum_j W_j c_0 + \sum_j \sum_{k > 0} [x_j = k] \, W_j (c_k - c_0) .

Its weights are computed once a batch, not once a row, and no gradient by its input is needed. For
binary rows and embeddings of four that is a third of the multiplications.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, embedding_bag, linear

from vadd_pyro.nn.conditioning import TokenCode
from vadd_pyro.nn.memory import RowMemory, row_memory
from vadd_pyro.nn.shortcuts import is_plain, may_shorten, row_starts

__all__ = ["indicated_layer", "token_layer"]

_TABLE = 2**22  # numbers of the largest table
_LOOKUP = 4.0  # what adding a number from a table costs, in multiplications of a dense layer
_MARGIN = 0.8  # of a dense layer's multiplications, for what indicators cost besides
_MAKING = 16.0  # what a multiplication costs where a weight is made, which reads more than it does


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
    if codes is None and type(tokens) is nn.Embedding:
        found = indicated_layer(layer, [tokens], [x_t])
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
        return _Sums(layer, codes, num_rows).of(x_t, None)
    sums = memory.held.get(id(layer))
    if sums is None or not sums.holds(layer, codes):
        sums = memory.held[id(layer)] = _Sums(layer, codes, memory.num_rows)
    return sums.of(x_t, memory)


def indicated_layer(
    layer: nn.Linear, tables: Sequence[nn.Embedding], ids: Sequence[Tensor]
) -> Tensor | None:
    """``layer(sum(table(id)).flatten(-2))``, with gradients, as a function of indicators; None
    where that takes more multiplications or is not known to be the same.

    Args:
        layer: from ``D e`` numbers.
        tables: vectors ``(V, e)`` each.
        ids: which of them a position takes, ``(..., D)`` for each table.

    Raises:
        IndexError: for those that a table does not have.
    """
    if not _by_indicators(layer, tables, ids[0]):
        return None
    for table, index in zip(tables, ids, strict=True):
        extremes = torch.stack(index.aminmax())
        embedding(extremes, table.weight.detach()[:, :1])  # refuses what is no token
    return _indicated(layer, [table.weight for table in tables], ids)


def _by_indicators(layer: nn.Linear, tables: Sequence[nn.Embedding], ids: Tensor) -> bool:
    """Whether indicators take fewer multiplications, and give the same."""
    if not all(type(table) is nn.Embedding for table in tables):
        return False
    rows = ids.numel() // ids.shape[-1]
    size = tables[0].embedding_dim
    number = sum(table.num_embeddings - 1 for table in tables)
    # Forward, gradients by weights and, of vectors, by what is put in; weights are made once.
    cost = 2 * number * rows + 3 * _MAKING * number * size
    if number > size or cost > _MARGIN * 3 * size * rows:
        return False
    return (
        torch.is_grad_enabled()
        and type(layer) is nn.Linear
        and is_plain(layer, *tables)
        and not torch.is_autocast_enabled(layer.weight.device.type)
        and all(table.max_norm is None and table.padding_idx is None for table in tables)
        and not any(table.scale_grad_by_freq or table.sparse for table in tables)
        and all(table.weight.dtype == layer.weight.dtype for table in tables)
    )


def _indicated(layer: nn.Linear, tables: Sequence[Tensor], ids: Sequence[Tensor]) -> Tensor:
    """The layer as a function of indicators."""
    first = torch.stack([table[0] for table in tables]).sum(0)
    vectors = torch.cat([first.unsqueeze(0), *(table[1:] - table[0] for table in tables)])
    # In this order the long matrix is read, and its gradient written, once.
    made = vectors @ layer.weight.reshape(-1, vectors.shape[1]).t()
    base, *changes = made.unflatten(1, (len(layer.weight), -1)).split(
        [1, *(len(table) - 1 for table in tables)]
    )
    h = base[0].sum(-1)
    if layer.bias is not None:
        h = h + layer.bias
    for table, index, change in zip(tables, ids, changes, strict=True):
        # Indicators of one token lie side by side, which processors compare many at a time.
        token = torch.arange(1, len(table), device=index.device).unsqueeze(-1)
        indicators = (index.unsqueeze(-2) == token).to(h.dtype).flatten(-2)
        h = h + linear(indicators, change.transpose(0, 1).flatten(1))
    return h


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
        self._start()

    def _start(self) -> None:
        """All rows are masks."""
        self.x: Tensor | None = None  # tokens, None for masks
        self.h = self.base.expand(self.num_rows, -1)
        self.shared: tuple[int, int] | None = None  # versions of both, if others have them too

    def holds(self, layer: nn.Linear, codes: Tensor) -> bool:
        """Whether this was computed with the parameters as they are."""
        known = zip(self.parameters, (layer.weight, layer.bias, codes), strict=True)
        if any(one is not other for one, other in known):
            return False
        return self.versions == [p._version for p in self.parameters if p is not None]

    def _spoilt(self) -> bool:
        """Whether somebody has written to what was shown or given."""
        if self.x is None or self.shared is None:
            return False
        return self.shared != (self.x._version, self.h._version)

    def of(self, x_t: Tensor, memory: RowMemory | None) -> Tensor | None:
        """The sums of some rows, ``(n, width)``; None where a dense layer is faster.

        Args:
            x_t: their tokens, ``(n, D)``.
            memory: says which they are; None if they are all, and there will be no next time.
        """
        if self._spoilt():
            self._start()
        x, h = self.x, self.h
        rows = None if memory is None else memory.rows
        if rows is not None:
            x = None if x is None else x.index_select(0, rows)
            h = h.index_select(0, rows)
        length = x_t.shape[1]
        changed = None
        if rows is None and memory is not None and memory.change is not None:
            changed = memory.change.between(x, x_t)
        if changed is None:
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
        elif x is None:
            h = h.clone()  # or a caller could write to the base
        if memory is not None:
            self._keep(x_t, h, rows, x_t is memory.shown)
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

    def _keep(self, x_t: Tensor, h: Tensor, rows: Tensor | None, shown: bool) -> None:
        """Remember rows: those that a sampler shows, and the sums given for them, as they are; any
        others in copies, for a caller may write to what it gave or got.
        """
        if shown and not (x_t.is_inference() or h.is_inference()):
            self.x, self.h = x_t, h
            self.shared = x_t._version, h._version
            return
        if self.x is None:
            self.x = x_t.new_full((self.num_rows, x_t.shape[1]), self.vocab_size)
            self.h = self.h.clone()
        elif self.shared is not None or not self._writable():
            self.x, self.h = self.x.clone(), self.h.clone()
        self.shared = None
        if rows is None:
            self.x.copy_(x_t)
            self.h.copy_(h)
        else:
            self.x.index_copy_(0, rows, x_t)
            self.h.index_copy_(0, rows, h)

    def _writable(self) -> bool:
        """Whether what is kept can be written to: what was made in inference mode only there."""
        return torch.is_inference_mode_enabled() or not self.h.is_inference()
