"""From a function of tensors to a compiled graph: what was traced, and why it could not be.

A graph holds tensor operations alone. Values of Python are frozen in as they were in the traced
run, and tensors that are no inputs are held as constants, so whatever else a program reads must
not change from run to run. A graph is compared with the programs on two batches before it is
used, and on another after 10, 100 and 1000 updates (:mod:`vadd_pyro.compiled.comparison`).
"""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn, no_grad
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode

__all__ = [
    "NotOneGraphError",
    "capture",
    "compile_graph",
    "first_line",
    "own_draws",
    "rewind",
    "sum_in_full",
    "sum_once",
    "torch_generators",
]

_LOOKS = {
    "__bool__": "bool() or a condition (if, while, assert, and, or)",
    "is_nonzero": "is_nonzero()",
    "__int__": "int()",
    "__float__": "float()",
    "__index__": "their use as an index of Python",
    "item": ".item()",
    "tolist": ".tolist()",
}
_NUMPY = ("numpy", "__array__")
_HERE = f"{Path(__file__).parent}{os.sep}"
_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"
_LIBRARIES = tuple(f"{Path(path).parent}{os.sep}" for path in (torch.__file__, pyro.__file__))


class NotOneGraphError(RuntimeError):
    """A program cannot be traced or compiled as one graph; the text says why."""


def first_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class _Looks(TorchFunctionMode):
    """Notes the last statement that looked at the values of a tensor, for the tracer fails at it
    deep inside torch, and refuses NumPy, which no tracer sees.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last = ""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _LOOKS:
            self.last = f"by {_LOOKS[name]}{_place()}"
        elif name in _NUMPY:
            raise NotOneGraphError(f"the programs turn a tensor into a NumPy array{_place()}")
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost line of a user's program, or else of the package, that runs."""
    frame = sys._getframe(2)
    own = ""
    while frame is not None and not frame.f_code.co_filename.startswith(_HERE):
        file = frame.f_code.co_filename
        line = f" ({file}, line {frame.f_lineno})"
        if not file.startswith((*_LIBRARIES, _PACKAGE)) and file.endswith(".py"):
            return line
        if file.startswith(_PACKAGE):
            own = own or line
        frame = frame.f_back  # type: ignore[assignment]
    return own


def _other_draws() -> tuple[Any, ...]:
    keys: Any = np.random.get_state(legacy=True)
    return random.getstate(), keys[1].tobytes(), keys[2]


@contextmanager
def _torch_draws_alone() -> Iterator[None]:
    """Refuse draws from other generators than torch's: a graph would repeat the traced ones."""
    before = _other_draws()
    yield
    if _other_draws() != before:
        raise NotOneGraphError("the programs draw random numbers from Python or NumPy")


def capture(function: Callable[..., Any], inputs: Sequence[Tensor]) -> GraphModule:
    """The tensor operations that a function runs through.

    Args:
        function: of tensors, which returns a tuple of tensors.
        inputs: examples, of the shapes that it is for. What the function writes to them is undone.

    Raises:
        NotOneGraphError: if what it does depends on values of tensors, or it draws on other random
        numbers than torch's.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # takes a while

    examples = [value.clone() for value in inputs]
    looks = _Looks()
    try:
        with _torch_draws_alone(), warnings.catch_warnings(), looks:
            warnings.simplefilter("ignore")
            graph: GraphModule = make_fx(function, tracing_mode="real")(*examples)
    except NotOneGraphError:
        raise
    except Exception as error:
        raise NotOneGraphError(_reason(error, looks.last)) from error
    for node in graph.graph.find_nodes(op="get_attr"):
        constant = getattr(graph, str(node.target), None)
        if isinstance(constant, nn.Parameter) and constant.requires_grad:
            raise NotOneGraphError("the programs hold a parameter outside their modules' places")
    for node, value in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True):
        node.meta.setdefault("val", value)
    return graph


def _reason(error: Exception, look: str = "") -> str:
    from torch._subclasses.fake_tensor import DataDependentOutputException as OfValue
    from torch._subclasses.fake_tensor import DynamicOutputShapeException as OfShape

    if isinstance(error, OfShape):
        return f"the shape of what {error.func} returns depends on the values of tensors"
    if isinstance(error, OfValue) or "value out of a tracing tensor" in str(error):
        return f"the programs look at the values of tensors {look}".strip()
    return first_line(error)


def sum_once(graph: GraphModule) -> None:
    """Have equal sums of a graph computed once, and copied.

    Inductor (torch 2.13) makes one loop of sums over the same half-precision tensor, such as the
    gradients of two biases that are added, and declares a variable twice in it.
    """
    aten = torch.ops.aten
    seen: dict[str, Node] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        if node.target._schema.is_mutable:
            seen = {}  # what was summed may have changed
        elif node.target is aten.sum.dim_IntList:
            first = seen.setdefault(f"{node.args} {node.kwargs}", node)
            if first is not node:
                node.target, node.args, node.kwargs = aten.clone.default, (first,), {}
    graph.recompile()


def sum_in_full(graph: GraphModule) -> None:
    """Have half-precision sums that are laid side by side made in full precision and rounded.

    They are made so in any case, but inductor (torch 2.13) leaves them at that, and a product of
    what lies side by side meets a factor of another type (gradients of scale and shift in a
    U-Net's normalisation).
    """
    aten = torch.ops.aten
    for node in graph.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        dtype = node.meta["val"].dtype
        beside = any(user.target is aten.cat.default for user in node.users)
        if dtype not in (torch.bfloat16, torch.float16) or not beside:
            continue
        with graph.graph.inserting_after(node):
            rounded = graph.graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
        rounded.meta["val"] = node.meta["val"]
        for user in set(node.users) - {rounded}:
            user.replace_input_with(node, rounded)
        node.kwargs = {**node.kwargs, "dtype": torch.float32}
        node.meta["val"] = node.meta["val"].float()
    graph.recompile()


Generators = tuple[Tensor, Tensor | None, torch.device]


def torch_generators(device: torch.device) -> Generators:
    """State of the generators that a graph draws on: that of the CPU, and the device's own."""
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), own, device


def rewind(generators: Generators) -> None:
    """Put them back to a state from :func:`torch_generators`."""
    on_cpu, on_device, device = generators
    torch.set_rng_state(on_cpu)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device, device)


def own_draws(device: torch.device) -> dict[str, bool]:
    """Options of inductor under which a graph draws torch's own random numbers, one after the
    other as the programs do.

    On GPUs its passes for locality and memory move draws past each other, for nothing says that
    one depends on the one before (seen with torch 2.11).
    """
    import torch._inductor.config

    options = {"fallback_random": True}
    if device.type != "cpu":
        passes = "reorder_for_locality", "reorder_for_peak_memory"
        options |= {name: False for name in passes if hasattr(torch._inductor.config, name)}
    return options


def compile_graph(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Machine code for a graph, of the same random numbers as torch's own operations.

    Args:
        graph: from :func:`capture`.
        inputs: examples; the first call is for these shapes and for no others.

    Returns:
        A function of the same inputs that returns what the graph does. It writes to those inputs
        that the graph writes to.

    Raises:
        NotOneGraphError: without a compiler at hand, or if it fails.
    """
    import torch._inductor
    import torch._inductor.config

    examples: list[Any] = [value.clone() for value in inputs]
    sum_once(graph)
    sum_in_full(graph)
    try:
        with (
            torch._inductor.config.patch(own_draws(inputs[0].device)),
            no_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            call: Any = torch._inductor.compile(graph, examples)
    except Exception as error:  # of many kinds: no compiler, one that fails, an operation unknown
        raise NotOneGraphError(_reason(error)) from error

    def run(*values: Tensor) -> Any:
        with no_grad():
            return call(*values)

    return run
