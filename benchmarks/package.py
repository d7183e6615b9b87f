"""The package's training steps, as benchmarks time them beside those by hand (``hand.py``)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from hand import optimiser, training_step
from torch import Tensor, nn

from vadd_pyro import MaskedDiffusionELBO
from vadd_pyro.compiled import Update
from vadd_pyro.compiled.traced import TracedLoss

__all__ = ["graph_step", "program_step"]


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
