r"""One update of a training run as one compiled graph.

Masks, guide, model, loss, gradient, clipping, Adam and the average of weights,

.. math::
    g \leftarrow g \min(1, c / \lVert g \rVert) , \quad m \leftarrow \beta_1 m + (1 - \beta_1) g ,
    \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 , \quad \theta \leftarrow \theta - \frac{\eta
    m / (1 - \beta_1^n)}{\sqrt{v / (1 - \beta_2^n)} + \epsilon} ,

over vectors that hold all parameters (:mod:`vadd_pyro.compiled.layout`). What changes from update
to update (``lambda``, step sizes) is a tensor that the graph is given. If loss or gradient are not
finite, nothing is written. Another optimiser than Adam and AdamW steps by itself, on the graph's
gradient.

Where several processes or parts of a batch share an update, it is two graphs: one up to the
gradient of a part, and one from the mean of all gradients on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from vadd_pyro.checkpoints import random_state, restore_random_state
from vadd_pyro.compiled.adam import decoupled, is_plain_adam
from vadd_pyro.compiled.graphs import NotOneGraphError, capture, compile_graph
from vadd_pyro.compiled.layout import Layout
from vadd_pyro.compiled.products import choose_products
from vadd_pyro.compiled.traced import Differentiated, TracedLoss, check_agreement
from vadd_pyro.distributed import Processes
from vadd_pyro.exchange import Exchange

__all__ = ["Update", "UpdateResult"]

_MOMENTS = ("exp_avg", "exp_avg_sq")


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
        kl_weight: ``lambda`` at which the graph is compared with the programs.
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
        kl_weight: float,
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
        self._alone = processes.alone
        self._num_parts = processes.size * accumulate
        self._loss = loss
        loss.check_hooks()
        x_0 = x_0.chunk(accumulate)[0].contiguous()
        random = random_state()
        reference = loss.eager(x_0, kl_weight)
        names = {id(p): name for name, p in loss.parameters.items()}
        self._groups: list[list[str]] = [
            [names[id(p)] for p in group["params"] if names.get(id(p)) in reference.gradients]
            for group in optimizer.param_groups
        ]
        self.parameters = {n: loss.parameters[n] for group in self._groups for n in group}
        if set(self.parameters) != set(reference.gradients):
            raise NotOneGraphError("the optimiser does not hold all parameters of the loss")
        self.steps = self._read_steps()
        self.layout = Layout(self.parameters)
        like = next(iter(self.parameters.values())).detach()
        self.exchange = Exchange(processes, self.layout.size, like)
        zero = torch.zeros_like
        kept: list[Sequence[Tensor]] = [list(self.parameters.values())]
        if self.fused:
            kept += [
                [optimizer.state.get(p, {}).get(m, zero(p)) for p in self.parameters.values()]
                for m in _MOMENTS
            ]
        if average is not None:
            kept.append([average[name] for name in self.parameters])
        self._averaged = average is not None
        with torch.no_grad():
            self.vectors = [self.layout.joined([v.detach() for v in values]) for values in kept]
        inputs = [*self.vectors, self._numbers(kl_weight, [0.0] * len(self._groups), 1.0), x_0]
        with pyro.validation_enabled(False):
            if self._num_parts == 1:
                graph = capture(self._traced, inputs)
                self.products = choose_products(graph, products)
                self._graph = compile_graph(graph, inputs)
            else:
                self.products = self._make_two(inputs, products)
        restore_random_state(random)
        check_agreement(lambda: self._tried(inputs), reference, loss.tolerance)
        # Again on other rows and random numbers and much later, for what the trace has frozen.
        rows = (x_0.flip(0) + 1) % loss.elbo.process.vocab_size
        with loss.later():
            random_then = random_state()
            reference = loss.eager(rows, kl_weight)
            restore_random_state(random_then)
            inputs[-1] = rows
            check_agreement(lambda: self._tried(inputs), reference, loss.tolerance)
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
        new = self._adam(vectors[0], vectors[1], vectors[2], gradient, numbers)
        if self._averaged:
            new.append(vectors[3].lerp(new[0], numbers[1]))
        for old, value in zip(vectors, new, strict=True):
            old.copy_(torch.where(finite, value, old))
        return (result,)

    def _adam(
        self, values: Tensor, first: Tensor, second: Tensor, gradient: Tensor, numbers: Tensor
    ) -> list[Tensor]:
        """New values and moments, group by group."""
        new: list[list[Tensor]] = [[], [], []]
        start = 0
        for number, (group, names) in enumerate(
            zip(self.optimizer.param_groups, self._groups, strict=True)
        ):
            if not names:
                continue
            stop = self._end(names[-1])
            rate, step_size, correction = numbers[2 + 3 * number : 5 + 3 * number].unbind()
            p, m, v, g = (x[start:stop] for x in (values, first, second, gradient))
            start = stop
            beta_1, beta_2 = group["betas"]
            if decay := group["weight_decay"]:
                if decoupled(self.optimizer, group):
                    p = p * (1 - rate * decay)
                else:
                    g = g + decay * p
            m = m.lerp(g, 1 - beta_1)
            v = v * beta_2 + g * g * (1 - beta_2)
            p = p - step_size * m / (v.sqrt() * correction + group["eps"])
            for pieces, piece in zip(new, (p, m, v), strict=True):
                pieces.append(piece)
        return [pieces[0] if len(pieces) == 1 else torch.cat(pieces) for pieces in new]

    def _end(self, name: str) -> int:
        later = [
            start for start in self.layout.starts.values() if start > self.layout.starts[name]
        ]
        return min(later, default=self.layout.size)

    def _numbers(self, kl_weight: float, rates: Sequence[float], average: float) -> Tensor:
        """``lambda``, the weight of new values in their average, and for each group step size,
        that over its first correction, and the second one.
        """
        numbers = [kl_weight, average]
        for rate, group in zip(rates, self.optimizer.param_groups, strict=True):
            beta_1, beta_2 = group["betas"] if self.fused else (0.0, 0.0)
            steps = self.steps + 1
            numbers += [rate, rate / (1 - beta_1**steps), (1 - beta_2**steps) ** -0.5]
        like = next(iter(self.parameters.values()))
        return torch.tensor(numbers, dtype=like.dtype, device=like.device)

    def _tried(self, inputs: Sequence[Tensor]) -> Differentiated:
        """Loss and gradient by the graph, on copies."""
        copies = [value.clone() for value in inputs]
        if not self.fused:
            result, gradient = self._graph(*copies)
        else:
            (result,) = self._graph(*copies)
            # Both moments of all groups have the same beta in practice; each is undone by its own.
            gradient = self.layout.joined(self._undone(inputs[1], copies[1]))
        if self.clip_norm is not None:
            gradient = gradient * ((result[2] + 1e-6) / self.clip_norm).clamp_min(1.0)
        return Differentiated(result[0], result[1], self.layout.views(gradient))

    def _undone(self, before: Tensor, after: Tensor) -> list[Tensor]:
        """Gradients from the change of the first moment."""
        old, new = self.layout.views(before), self.layout.views(after)
        values = self.layout.views(self.vectors[0])
        undone = []
        for group, names in zip(self.optimizer.param_groups, self._groups, strict=True):
            beta, decay = group["betas"][0], group["weight_decay"]
            for name in names:
                gradient = (new[name] - beta * old[name]) / (1 - beta)
                if decay and not decoupled(self.optimizer, group):
                    gradient = gradient - decay * values[name]
                undone.append(gradient)
        return undone

    # ------------------------------------------------------------------ its state

    def _read_steps(self) -> int:
        """How many steps the optimiser has made.

        Raises:
            NotOneGraphError: if it has made more for some parameters than for others.
        """
        if not self.fused:
            return 0
        steps = {
            int(self.optimizer.state[p]["step"]) if p in self.optimizer.state else 0
            for p in self.parameters.values()
        }
        if len(steps) != 1:
            raise NotOneGraphError("the optimiser has made more steps for some parameters")
        return steps.pop()

    @torch.no_grad()
    def _attach(self) -> None:
        views = [self.layout.views(vector) for vector in self.vectors]
        for name, parameter in self.parameters.items():
            parameter.data = views[0][name]
            if self.fused:
                state = self.optimizer.state[parameter]
                state.setdefault("step", torch.tensor(0.0))
                for moment, own in zip(_MOMENTS, views[1:], strict=False):
                    state[moment] = own[name]

    @property
    def average(self) -> dict[str, Tensor]:
        """Averages of the weights by name, as views; none without averages."""
        return self.layout.views(self.vectors[-1]) if self._averaged else {}

    def flush(self) -> None:
        """Tell the optimiser how many steps were made, before it is saved or steps by itself."""
        if self.fused:
            for parameter in self.parameters.values():
                self.optimizer.state[parameter]["step"].fill_(self.steps)

    def refresh(self) -> None:
        """Take note of a step that the optimiser made by itself."""
        self.steps += 1

    def release(self) -> None:
        """Give the parameters storage of their own."""
        self.flush()
        for parameter in self.parameters.values():
            parameter.data = parameter.data.clone()

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
        x_0 = x_0.contiguous()
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        numbers = self._numbers(kl_weight, rates, average)
        if self._num_parts == 1:
            found = self._graph(*self.vectors, numbers, x_0)
        else:
            found = self._rest(*self.vectors, numbers, self._mean(x_0, numbers))
        result = UpdateResult(*found[0].tolist())
        if self.fused:
            self.steps += result.finite
        elif result.finite:
            self.optimizer.zero_grad(set_to_none=True)
            for name, own in self.layout.views(found[1]).items():
                self.parameters[name].grad = own
            self.optimizer.step()
            if self._averaged:
                with torch.no_grad():
                    self.vectors[-1].lerp_(self.vectors[0], average)
        return result

    def _mean(self, x_0: Tensor, numbers: Tensor) -> Tensor:
        """Gradient, loss and KL, means over the parts of all processes."""
        with self.exchange.watching():
            parts = x_0.chunk(self.accumulate)
            (told,) = self._gradient(self.vectors[0], numbers, parts[0])
            for part in parts[1:]:
                told += self._gradient(self.vectors[0], numbers, part)[0]
        if not self._alone:
            loss, kl = told[self.layout.size : self.layout.size + 2].tolist()
            self.exchange(told, loss, kl)
        return told
