"""The package's training steps, as benchmarks time them beside those by hand (``hand.py``)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from timeit import timeit
from typing import Any

import torch
from hand import optimiser, training_step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vadd_pyro import MaskedDiffusionELBO
from vadd_pyro.compiled import Update
from vadd_pyro.compiled.products import has_onednn
from vadd_pyro.compiled.traced import TracedLoss

__all__ = ["graph_step", "products_of", "program_step"]


def program_step(
    elbo: MaskedDiffusionELBO,
    model: nn.Module,
    guide: nn.Module,
    x_0: Tensor,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Callable[[], None]:
    """One update by the programs as they are.

    Args:
        elbo, model, guide: the loss.
        x_0: the rows, ``(B, D)``.
        autocast: makes the context in which the loss is computed.
    """
    loss = elbo(model, guide)
    return training_step(
        lambda rows: loss(rows) / len(rows), optimiser(loss), x_0, autocast=autocast
    )


def graph_step(
    elbo: MaskedDiffusionELBO,
    model: nn.Module,
    guide: nn.Module,
    x_0: Tensor,
    half: bool = False,
) -> Callable[[], Any]:
    """One update as one graph, as ``fit(compile=True)`` runs it.

    Args:
        elbo, model, guide, x_0: as above.
        half: run the programs in bfloat16 under autocast.

    Raises:
        NotOneGraphError: saying why there is none.
    """
    traced = TracedLoss(elbo, model, guide, half=half)
    update = Update(traced, optimiser(model, guide), None, None, x_0)
    return lambda: update(x_0, 1.0, 0.0)


class _Seen(TorchDispatchMode):
    """Notes the products of matrices that a step makes, attention among them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.__name__
        if name.startswith(("mm.", "addmm.", "bmm.")) or "dot_product_flash" in name:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def products_of(step: Callable[[], Any]) -> Callable[[], None]:
    """The products of matrices that a step makes, one after the other and nothing else, each by
    the library that is faster here: what no way of running the step gets around.
    """
    with _Seen() as seen:
        step()
    calls = [_faster(*call) for call in seen.calls]

    def run() -> None:
        with torch.no_grad():
            for call in calls:
                call()

    return run


@torch.no_grad()
def _faster(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any]:
    """A product by the library that torch uses, or by oneDNN."""

    def usual() -> Any:
        return func(*args, **kwargs)

    def other() -> Any:
        *bias, a, b = args
        return torch.ops.vadd_pyro.linear(a, b.t(), *(bias or [None]))

    plain = func.__name__.startswith(("mm.", "addmm.")) and not kwargs
    plain = plain and all(x.dtype == torch.float32 for x in args)
    if not plain or (len(args) == 3 and args[0].dim() != 1) or not has_onednn():
        return usual
    times = [(timeit(usual, number=1), timeit(other, number=1)) for _ in range(6)]
    by_torch, by_onednn = (min(each) for each in zip(*times[1:], strict=True))
    return other if by_onednn < by_torch else usual
