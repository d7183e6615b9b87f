"""A loss with its gradient as one compiled graph, for training loops of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vadd_pyro.checkpoints import random_state, restore_random_state
from vadd_pyro.compiled.graphs import (
    NotOneGraphError,
    capture,
    compile_graph,
    rewind,
    torch_generators,
)
from vadd_pyro.compiled.products import choose_products
from vadd_pyro.compiled.traced import Differentiated, TracedLoss, check_agreement
from vadd_pyro.elbo import MaskedDiffusionELBO

__all__ = ["CompiledLoss"]


class _Known(torch.autograd.Function):
    """A number whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Any) -> Any:
        return (None, None, *(outer[0] * gradient for gradient in ctx.gradients))


class CompiledLoss(nn.Module):
    """The loss of ``elbo(model, guide)`` with its gradient as one compiled graph.

    >>> loss_of = CompiledLoss(elbo(model, guide))  # doctest: +SKIP
    >>> loss_of(x_0).backward()  # doctest: +SKIP

    Sites, handlers and random numbers are those of the loss itself. It is compiled at the first
    call for each shape of rows, and again after a change of modes or parameters, which takes some
    seconds, and is compared with the loss; where that is not possible a warning says why, and the
    loss itself is used. Without gradients it always is.

    Args:
        loss: ``elbo(model, guide)``, of a :class:`~vadd_pyro.MaskedDiffusionELBO`.

    Raises:
        TypeError: for another loss.
    """

    def __init__(self, loss: Any) -> None:
        super().__init__()
        elbo = getattr(loss, "elbo", None)
        if not isinstance(loss, nn.Module) or not isinstance(elbo, MaskedDiffusionELBO):
            raise TypeError(
                f"loss must be elbo(model, guide) of a MaskedDiffusionELBO, got {loss!r}"
            )
        self.loss: Any = loss
        self._calls: dict[Any, Callable[[Tensor], Tensor] | None] = {}

    def forward(self, x_0: Tensor) -> Tensor:
        """The loss summed over rows, a differentiable scalar.

        Args:
            x_0: clean tokens, ``(B, D)``.
        """
        if not torch.is_grad_enabled() or not isinstance(x_0, Tensor):
            return self.loss(x_0)
        x_0 = self.loss.elbo.process.check_tokens(x_0, "x_0", values=False).contiguous()
        if self.loss.elbo.current_kl_weight() == 0:  # the KL has no gradient: not one of zero
            return self.loss(x_0)
        key = self._key(x_0)
        if key not in self._calls:
            self._calls[key] = self._compiled(x_0)
        call = self._calls[key]
        if call is None:
            return self.loss(x_0)
        random = torch_generators(x_0.device) if self.loss.elbo.kept_rows.drop else None
        result = call(x_0)
        if random is not None and not result.isfinite():  # more rows, maybe, than the graph is for
            rewind(random)
            return self.loss(x_0)
        self.loss.elbo.iteration += 1
        return result

    def _key(self, x_0: Tensor) -> Any:
        """What a graph is for: shapes, parameters, modes, and the options of the loss."""
        options = {k: v for k, v in vars(self.loss.elbo).items() if not k.startswith("_")}
        del options["iteration"]
        return (
            x_0.shape,
            tuple((id(p), p.requires_grad) for p in self.loss.parameters()),
            tuple(module.training for module in self.loss.modules()),
            tuple(
                v if isinstance(v, int | float | str | None) else id(v) for v in options.values()
            ),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_calls": {}}

    def _compiled(self, x_0: Tensor) -> Callable[[Tensor], Tensor] | None:
        elbo = self.loss.elbo
        elbo.process.check_tokens(x_0, "x_0")
        random = random_state()
        try:
            loss = TracedLoss(elbo, self.loss.model, self.loss.guide)
            used, reference = loss.reference(x_0)
            restore_random_state(used)
            call = _Call(loss, reference, x_0)
        except NotOneGraphError as error:
            warnings.warn(f"the loss runs uncompiled: {error}", RuntimeWarning, stacklevel=3)
            return None
        finally:
            restore_random_state(random)
        return call


class _Call:
    """The graph for one shape of rows."""

    def __init__(self, loss: TracedLoss, reference: Differentiated, x_0: Tensor) -> None:
        self.elbo = loss.elbo
        self.parameters = {n: loss.parameters[n] for n in reference.gradients}
        names = list(self.parameters)

        def traced(*inputs: Tensor) -> tuple[Tensor, ...]:
            *values, kl_weight, rows = inputs
            found = loss(dict(zip(names, values, strict=True)), rows, kl_weight)
            if set(found.gradients) != set(names):
                raise NotOneGraphError("some parameters would get no gradient")
            return found.loss, found.kl, *(found.gradients[name] for name in names)

        inputs, random = self._inputs(x_0), random_state()
        with pyro.validation_enabled(False):
            graph = capture(traced, inputs)
        choose_products(graph)
        self.graph = compile_graph(graph, inputs)
        restore_random_state(random)
        if not check_agreement(self._differentiated(x_0), reference, loss.tolerance):
            raise NotOneGraphError("it or its gradient is no number, to be compared with a graph")

    def _inputs(self, x_0: Tensor) -> list[Tensor]:
        values = [p.detach() for p in self.parameters.values()]
        weight = torch.tensor(self.elbo.current_kl_weight(), dtype=values[0].dtype)
        return [*values, weight.to(x_0.device), x_0]

    def _differentiated(self, x_0: Tensor) -> Differentiated:
        loss, kl, *gradients = self.graph(*self._inputs(x_0))
        return Differentiated(loss, kl, dict(zip(self.parameters, gradients, strict=True)))

    def __call__(self, x_0: Tensor) -> Tensor:
        found = self._differentiated(x_0)
        gradients = list(found.gradients.values())
        mean = _Known.apply(found.loss, gradients, *self.parameters.values())
        return mean * len(x_0)
