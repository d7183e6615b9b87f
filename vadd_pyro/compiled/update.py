r"""One update of a training run as one compiled graph.

Masks, guide, model, loss, gradient, clipping :math:`g \leftarrow g \min(1, c / \lVert g \rVert)`,
Adam (:mod:`vadd_pyro.compiled.adam`) and the average of weights, over vectors that hold all
parameters (:mod:`vadd_pyro.compiled.layout`). What changes from update to update (``lambda``, step
sizes) is a tensor that the graph is given. If loss or gradient are not finite, nothing is written.
Another optimiser than Adam and AdamW steps by itself, on the graph's gradient.

Where several processes or parts of a batch share an update, it is two graphs: one up to the
gradient of a part, and one from the mean of all gradients on.

The graph is what the programs were when it was traced. It is compared with them, loss and every
gradient on the same random numbers, before it is used, and again after 10, 100 and 1000 updates,
for what of theirs has changed meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from vadd_pyro.checkpoints import random_state, restore_random_state
from vadd_pyro.compiled.adam import MOMENTS, VectorAdam, is_plain_adam, shares_of
from vadd_pyro.compiled.comparison import RECHECKS, Comparison
from vadd_pyro.compiled.graphs import (
    NotOneGraphError,
    capture,
    compile_graph,
    rewind,
    torch_generators,
)
from vadd_pyro.compiled.layout import Layout
from vadd_pyro.compiled.products import choose_products
from vadd_pyro.compiled.traced import Differentiated, TracedLoss
from vadd_pyro.compiled.untouched import Memory
from vadd_pyro.distributed import Processes
from vadd_pyro.exchange import Exchange

__all__ = ["Update", "UpdateResult"]


class UpdateResult(NamedTuple):
    """What an update found.

    Args:
        loss, kl: means per row, nats.
        norm: of the gradient before clipping.
    """

    loss: float
    kl: float
    norm: float

    @property
    def finite(self) -> bool:
        """Whether it was carried out."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class Update:
    """One update as a graph.

    While it is in use, the parameters, the optimiser's moments and the averages are views of
    vectors; :meth:`release` gives the parameters storage of their own again.

    Args:
        loss: the loss.
        optimizer: made of its parameters.
        average: averages of the weights by name of the parameter; None for none.
        clip_norm: largest norm of the gradient; None does not clip.
        x_0: rows as every update will be given, ``(B, D)``.
        products: which library computes which product, as an earlier run of it has decided
            (:mod:`vadd_pyro.compiled.products`); None measures. The decisions are in ``products``.
        accumulate: into how many parts the rows are divided.
        processes: whose gradients are averaged.

    Raises:
        NotOneGraphError: saying why there is no such graph; nothing has been changed then.
    """

    def __init__(
        self,
        loss: TracedLoss,
        optimizer: torch.optim.Optimizer,
        average: Mapping[str, Tensor] | None,
        clip_norm: float | None,
        x_0: Tensor,
        products: Mapping[str, bool] | None = None,
        accumulate: int = 1,
        processes: Processes | None = None,
    ) -> None:
        processes = Processes() if processes is None else processes
        self.optimizer = optimizer
        self.fused = is_plain_adam(optimizer)
        self.clip_norm = clip_norm
        self.shape = x_0.shape
        self.accumulate = accumulate
        self._processes = processes
        self._num_parts = processes.size * accumulate
        self._loss = loss
        memory = Memory(*loss.pair)
        self._comparison = Comparison(loss, self._tried, memory)
        self.calls = 0  # updates made
        self.alike = 0  # of them, before the last comparison
        self._alike = True
        self._released = False
        loss.check_hooks()
        x_0 = x_0.chunk(accumulate)[0].contiguous()
        random = random_state()
        told = torch.ones((), device=x_0.device) if loss.told else None
        with memory.learning():
            gradients = loss.eager(x_0, told).gradients
        names = {id(loss.parameters[name]): name for name in gradients}
        shares = shares_of(optimizer, names, loss.gives_none_without_kl(x_0) & set(gradients))
        self.parameters = {n: loss.parameters[n] for share in shares for n in share.names}
        if set(self.parameters) != set(gradients):
            raise NotOneGraphError("the optimiser does not hold all parameters of the loss")
        self.layout = Layout(self.parameters)
        self._adam = VectorAdam(optimizer, shares, self.layout, self.parameters)
        like = next(iter(self.parameters.values())).detach()
        self.exchange = Exchange(processes, self.layout.size, like)
        zero = torch.zeros_like
        kept: list[Sequence[Tensor]] = [list(self.parameters.values())]
        if self.fused:
            kept += [
                [optimizer.state.get(p, {}).get(m, zero(p)) for p in self.parameters.values()]
                for m in MOMENTS
            ]
        if average is not None:
            kept.append([average[name] for name in self.parameters])
        self._averaged = average is not None
        with torch.no_grad():
            self.vectors = [self.layout.joined([v.detach() for v in values]) for values in kept]
        inputs = [*self.vectors, self._numbers(loss.elbo.current_kl_weight(), 1.0), x_0]
        with pyro.validation_enabled(False):
            if self._num_parts == 1:
                graph = capture(self._traced, inputs)
                self.products = choose_products(graph, products)
                self._graph = compile_graph(graph, inputs)
            else:
                self.products = self._make_two(inputs, products)
        restore_random_state(random)
        self._comparison.before_use(x_0)
        restore_random_state(random)
        self._attach()

    # ------------------------------------------------------------------ the graph

    def _traced(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        *vectors, numbers, x_0 = inputs
        loss, kl, gradient = self._differentiated(vectors[0], numbers, x_0)
        with torch.no_grad():
            return self._updated(vectors, numbers, loss, kl, gradient)

    def _make_two(
        self, inputs: Sequence[Tensor], products: Mapping[str, bool] | None
    ) -> dict[str, bool]:
        """The graph up to the gradient, and that from the gradient on; decisions on products."""
        *vectors, numbers, x_0 = inputs

        def of_part(values: Tensor, numbers: Tensor, x_0: Tensor) -> tuple[Tensor]:
            loss, kl, gradient = self._differentiated(values, numbers, x_0)
            told = torch.cat([gradient, torch.stack([loss, kl]), gradient.new_zeros(2)])
            return (told / self._num_parts,)

        def of_all(*inputs: Tensor) -> tuple[Tensor, ...]:
            *vectors, numbers, told = inputs
            loss, kl = told[self.layout.size : self.layout.size + 2].unbind()
            return self._updated(vectors, numbers, loss, kl, told[: self.layout.size])

        first, second = [vectors[0], numbers, x_0], [*vectors, numbers, self.exchange.empty()]
        of_gradient = capture(of_part, first)
        chosen = choose_products(of_gradient, products)
        self._gradient = compile_graph(of_gradient, first)
        with torch.no_grad():
            self._rest = compile_graph(capture(of_all, second), second)

        def graph(*inputs: Tensor) -> Any:
            *vectors, numbers, x_0 = inputs
            (told,) = self._gradient(vectors[0], numbers, x_0)
            return self._rest(*vectors, numbers, told * self._num_parts)

        self._graph = graph
        return chosen

    def _differentiated(
        self, values: Tensor, numbers: Tensor, x_0: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and KL of a row, and the gradient."""
        found = self._loss(self.layout.views(values), x_0, numbers[0])
        with torch.no_grad():
            if set(found.gradients) != set(self.layout.shapes):
                missing = sorted(set(self.layout.shapes) - set(found.gradients))
                raise NotOneGraphError(
                    f"{', '.join(missing[:3])} would get no gradient: the programs read it from "
                    "somewhere else than their modules, such as Pyro's store"
                )
            gradient = self.layout.joined([found.gradients[name] for name in self.layout.shapes])
            return found.loss, found.kl, gradient

    def _updated(
        self,
        vectors: Sequence[Tensor],
        numbers: Tensor,
        loss: Tensor,
        kl: Tensor,
        gradient: Tensor,
    ) -> tuple[Tensor, ...]:
        """Write new values, if all is finite: what was found, and the gradient for an optimiser
        that steps by itself.
        """
        norm = gradient.norm()
        if self.clip_norm is not None:
            gradient = gradient * (self.clip_norm / (norm + 1e-6)).clamp_max(1.0)
        result = torch.stack([loss, kl, norm])
        if not self.fused:
            return result, gradient
        finite = loss.isfinite() & norm.isfinite()
        new = self._adam.step(vectors[0], vectors[1], vectors[2], gradient, numbers[2:])
        if self._averaged:
            new.append(vectors[3].lerp(new[0], numbers[1]))
        for old, value in zip(vectors, new, strict=True):
            old.copy_(torch.where(finite, value, old))
        return (result,)

    def _numbers(self, kl_weight: float, average: float) -> Tensor:
        """``lambda``, the weight of new values in their average, and the numbers of Adam."""
        numbers = [kl_weight, average, *self._adam.numbers(kl_weight)]
        like = next(iter(self.parameters.values()))
        return torch.tensor(numbers, dtype=like.dtype, device=like.device)

    def _tried(self, x_0: Tensor) -> Differentiated:
        """Loss and gradient by the graph, on copies."""
        kl_weight = self._loss.elbo.current_kl_weight()
        copies = [vector.clone() for vector in self.vectors]
        if self.fused:
            copies[1].zero_()  # so that it holds the gradient and no more afterwards
        result, *others = self._graph(*copies, self._numbers(kl_weight, 1.0), x_0)
        if self.fused:
            gradient = self._adam.undone(self.vectors[0], copies[1], kl_weight)
        else:
            (gradient,) = others
        if not result.isfinite().all():  # and nothing was written
            gradient = torch.full_like(gradient, math.nan)
        elif self.clip_norm is not None:
            gradient = gradient * ((result[2] + 1e-6) / self.clip_norm).clamp_min(1.0)
        return Differentiated(result[0], result[1], self.layout.views(gradient))

    def differs(self, x_0: Tensor) -> str:
        """Why the next update cannot be made by the graph, or nothing; after 10, 100 and 1000
        updates it is compared with the programs for that.

        Args:
            x_0: rows of that update.
        """
        if not self._alike:
            return "the optimiser has passed over some parameters in an update without the graph"
        if self.calls not in RECHECKS:
            return ""
        self.exchange.meet()  # or one that has no rows now would be waited for
        part = x_0.chunk(self.accumulate)[0].contiguous()
        reason = self._comparison.after(self.calls * self.accumulate, part, self._processes)
        if not reason:
            self.alike = self.calls
        return reason

    # ------------------------------------------------------------------ its state

    @torch.no_grad()
    def _attach(self) -> None:
        views = [self.layout.views(vector) for vector in self.vectors]
        for name, parameter in self.parameters.items():
            parameter.data = views[0][name]
            if self.fused:
                state = self.optimizer.state[parameter]
                state.setdefault("step", torch.tensor(0.0))
                for moment, own in zip(MOMENTS, views[1:], strict=False):
                    state[moment] = own[name]

    @property
    def average(self) -> dict[str, Tensor]:
        """Averages of the weights by name, as views; none without averages."""
        return self.layout.views(self.vectors[-1]) if self._averaged else {}

    def flush(self) -> None:
        """Tell the optimiser how many steps were made, before it is saved or steps by itself."""
        self._adam.tell()

    def refresh(self) -> None:
        """Take note of a step that the optimiser made by itself."""
        self._alike = self._adam.ask()

    def release(self) -> None:
        """Give the parameters storage of their own, and drop their gradients."""
        if self._released:
            return
        self._released = True
        self.flush()
        for parameter in self.parameters.values():
            parameter.data = parameter.data.clone()
            parameter.grad = None

    # --------------------------------------------------------------------- steps

    def fits(self, x_0: Tensor) -> bool:
        """Whether rows are as the graph expects them."""
        return x_0.shape == self.shape

    def __call__(self, x_0: Tensor, kl_weight: float, average: float) -> UpdateResult:
        """One update.

        Args:
            x_0: clean tokens of the shape that the graph is for.
            kl_weight: ``lambda``.
            average: weight of the new values in their average.
        """
        self._random = torch_generators(x_0.device)
        x_0 = x_0.contiguous()
        numbers = self._numbers(kl_weight, average)
        if self._num_parts == 1:
            found = self._graph(*self.vectors, numbers, x_0)
        else:
            found = self._rest(*self.vectors, numbers, self._mean(x_0, numbers))
        result = UpdateResult(*found[0].tolist())
        self.calls += 1
        if not result.finite:
            return result
        self._adam.made(kl_weight)
        if not self.fused:
            self._step(found[1], kl_weight, average)
        return result

    def _step(self, gradient: Tensor, kl_weight: float, average: float) -> None:
        """Have an optimiser step by itself."""
        self.optimizer.zero_grad(set_to_none=True)
        views = self.layout.views(gradient)
        for share in self._adam.shares:
            if share.moves(kl_weight):
                for name in share.names:
                    self.parameters[name].grad = views[name]
        self.optimizer.step()
        if self._averaged:
            with torch.no_grad():
                self.vectors[-1].lerp_(self.vectors[0], average)

    def rewind(self) -> None:
        """Put torch's random numbers back to before the last update, which found no numbers."""
        rewind(self._random)

    def _mean(self, x_0: Tensor, numbers: Tensor) -> Tensor:
        """Gradient, loss and KL, means over the parts of all processes."""
        with self.exchange.watching():
            parts = x_0.chunk(self.accumulate)
            (told,) = self._gradient(self.vectors[0], numbers, parts[0])
            for part in parts[1:]:
                told += self._gradient(self.vectors[0], numbers, part)[0]
        if not self._processes.alone:
            loss, kl = told[self.layout.size : self.layout.size + 2].tolist()
            self.exchange(told, loss, kl)
        return told
