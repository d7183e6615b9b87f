"""Which of two libraries multiplies matrices, decided by measuring.

On some processors torch's default product of float32 matrices on the CPU runs at half of what
oneDNN, which torch has at hand too, reaches; on others they are alike, and it differs from shape
to shape. So each product of a graph is timed once, and a decision is kept by its shape: sums in
another order round differently, and a resumed run has to repeat them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

__all__ = ["choose_products", "has_onednn"]

_ROUNDS = 8  # alternated, of each
_LEAST_WORK = 2e6  # multiplications; a smaller product is a matter of the call
_MARGIN = 0.95  # oneDNN has to be so much faster

_LIBRARY = torch.library.Library("vadd_pyro", "DEF")
_LIBRARY.define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def has_onednn() -> bool:
    """Whether torch can multiply by oneDNN here."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # A private operation of torch, so checked for by name.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _shape_of_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_LIBRARY.impl("linear", _linear, "CPU")
_LIBRARY.impl("linear", _shape_of_linear, "Meta")


def _parts(node: Node) -> tuple[Node | None, Node, Node] | None:
    """Bias and factors of a product that could go either way."""
    aten = torch.ops.aten
    args: tuple[Any, ...] = node.args
    if node.target is aten.mm.default:
        parts = (None, *args)
    elif node.target is aten.addmm.default and len(args) == 3 and not node.kwargs:
        parts = args
    else:
        return None
    present = [part for part in parts if part is not None]
    if any("val" not in part.meta for part in present):  # a constant
        return None
    values = [part.meta["val"] for part in present]
    plain = all(v.dtype == torch.float32 and v.device.type == "cpu" for v in values)
    if not plain or (parts[0] is not None and values[0].dim() != 1):
        return None
    rows, inner = values[-2].shape
    return parts if rows * inner * values[-1].shape[1] >= _LEAST_WORK else None


def _key(parts: tuple[Node | None, Node, Node]) -> str:
    texts = []
    for part in parts:
        if part is not None:
            value = part.meta["val"]
            texts.append(f"{tuple(value.shape)}:{value.stride()}")
    return " ".join(texts)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _faster(parts: tuple[Node | None, Node, Node]) -> bool:
    """Whether oneDNN is faster here, by the least time of each over alternated calls."""

    def example(part: Node) -> Tensor:
        value = part.meta["val"]
        return torch.empty_strided(value.shape, value.stride()).fill_(0.5)

    bias = None if parts[0] is None else example(parts[0])
    a, b = example(parts[1]), example(parts[2])

    def usual() -> Tensor:
        return a @ b if bias is None else torch.addmm(bias, a, b)

    def other() -> Tensor:
        return torch.ops.vadd_pyro.linear(a, b.t(), bias)

    times = [(_seconds(usual), _seconds(other)) for _ in range(_ROUNDS)]
    return min(t for _, t in times[1:]) < _MARGIN * min(t for t, _ in times[1:])


def choose_products(
    graph: GraphModule, known: Mapping[str, bool] | None = None
) -> dict[str, bool]:
    """Give the products of a graph to the faster library, in place.

    Args:
        graph: as it was traced.
        known: decisions of an earlier run; what they do not name is measured.

    Returns:
        By the shapes of a product, whether oneDNN computes it.
    """
    decisions: dict[str, bool] = {}
    if not has_onednn():
        return decisions
    with torch.no_grad():
        for node in list(graph.graph.nodes):
            parts = _parts(node) if node.op == "call_function" else None
            if parts is None:
                continue
            key = _key(parts)
            if key not in decisions:
                told = None if known is None else known.get(key)
                decisions[key] = _faster(parts) if told is None else told
            if not decisions[key]:
                continue
            bias, a, b = parts
            with graph.graph.inserting_before(node):
                weight = graph.graph.call_function(torch.ops.aten.t.default, (b,))
                linear = torch.ops.vadd_pyro.linear.default
                product = graph.graph.call_function(linear, (a, weight, bias))
            product.meta = dict(node.meta)
            node.replace_all_uses_with(product)
            graph.graph.erase_node(node)
    graph.recompile()
    return decisions
