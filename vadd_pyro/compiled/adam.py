r"""Adam and AdamW on vectors of all parameters.

.. math::
    m \leftarrow \beta_1 m + (1 - \beta_1) g , \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 ,
    \quad \theta \leftarrow \theta - \frac{\eta m / (1 - \beta_1^n)}{\sqrt{v / (1 - \beta_2^n)} +
    \epsilon} .

torch's optimisers count the steps ``n`` of each parameter, and pass over those that have no
gradient: weights, moments and count stay. So it is with parameters of the KL alone while
``lambda`` is 0, such as those of a prior.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vadd_pyro.compiled.layout import Layout

__all__ = ["MOMENTS", "Share", "VectorAdam", "is_plain_adam", "shares_of"]

MOMENTS = ("exp_avg", "exp_avg_sq")


def is_plain_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is Adam or AdamW without options that the graph does not know."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return False
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return False
    odd = ("amsgrad", "maximize", "differentiable", "capturable")
    return not any(group.get(name) for group in optimizer.param_groups for name in odd)


@dataclass
class Share:
    """Parameters whose steps are alike.

    Args:
        group: their group of the optimiser, by its place.
        names: theirs.
        of_kl: whether they have no gradient where ``lambda`` is 0.
        steps: how many they have made.
    """

    group: int
    names: list[str]
    of_kl: bool
    steps: int

    def moves(self, kl_weight: float) -> bool:
        """Whether they take part in an update."""
        return kl_weight != 0 or not self.of_kl


def shares_of(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], of_kl: set[str]
) -> list[Share]:
    """All parameters that an optimiser holds and that have names.

    Args:
        optimizer: of any kind.
        names: of parameters by their ``id``.
        of_kl: names of those that have no gradient where ``lambda`` is 0.
    """
    found: dict[tuple[int, bool, int], Share] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is not None:
                key = number, name in of_kl, _steps_of(optimizer, parameter)
                found.setdefault(key, Share(key[0], [], key[1], key[2])).names.append(name)
    return list(found.values())


def _steps_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> int:
    kept = optimizer.state.get(parameter, {})
    return int(kept.get("step", 0)) if is_plain_adam(optimizer) else 0


class VectorAdam:
    """The arithmetic of an optimiser's next step.

    Args:
        optimizer: Adam, AdamW, or another, of which nothing but the step sizes is asked.
        shares: its parameters, in the order of ``layout``.
        layout: where they stand in the vectors.
        parameters: by name.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        shares: Sequence[Share],
        layout: Layout,
        parameters: Mapping[str, Tensor],
    ) -> None:
        self.optimizer = optimizer
        self.shares = shares
        self.layout = layout
        self.parameters = parameters
        self.plain = is_plain_adam(optimizer)

    def _groups(self) -> list[tuple[Share, dict[str, Any]]]:
        return [(share, self.optimizer.param_groups[share.group]) for share in self.shares]

    def _decoupled(self, group: dict[str, Any]) -> bool:
        """Whether weights decay by themselves, as in AdamW, and not by their gradients."""
        adamw = isinstance(self.optimizer, torch.optim.AdamW)
        return group.get("decoupled_weight_decay", adamw)

    def numbers(self, kl_weight: float) -> list[float]:
        """For each share step size, that over its first correction, the second one, and whether it
        takes part.
        """
        numbers = []
        for share, group in self._groups():
            beta_1, beta_2 = group["betas"] if self.plain else (0.0, 0.0)
            rate, steps = float(group["lr"]), share.steps + 1
            numbers += [rate, rate / (1 - beta_1**steps), (1 - beta_2**steps) ** -0.5]
            numbers.append(float(share.moves(kl_weight)))
        return numbers

    def step(
        self, values: Tensor, first: Tensor, second: Tensor, gradient: Tensor, numbers: Tensor
    ) -> list[Tensor]:
        """New values and moments, share by share.

        Args:
            values, first, second, gradient: vectors.
            numbers: :meth:`numbers` as a tensor.
        """
        new: list[list[Tensor]] = [[], [], []]
        start = 0
        for index, (share, group) in enumerate(self._groups()):
            stop = self.layout.end(share.names[-1])
            rate, step_size, correction, moves = numbers[4 * index : 4 * index + 4].unbind()
            old = p, m, v = tuple(x[start:stop] for x in (values, first, second))
            g = gradient[start:stop]
            start = stop
            beta_1, beta_2 = group["betas"]
            if decay := group["weight_decay"]:
                if self._decoupled(group):
                    p = p * (1 - rate * decay)
                else:
                    g = g + decay * p
            m = m.lerp(g, 1 - beta_1)
            v = v * beta_2 + g * g * (1 - beta_2)
            p = p - step_size * m / (v.sqrt() * correction + group["eps"])
            for pieces, piece, before in zip(new, (p, m, v), old, strict=True):
                pieces.append(torch.where(moves > 0, piece, before) if share.of_kl else piece)
        return [pieces[0] if len(pieces) == 1 else torch.cat(pieces) for pieces in new]

    def undone(self, values: Tensor, first: Tensor, kl_weight: float) -> Tensor:
        """The gradient that a step found, from the first moment that it has left, which was zero.

        Args:
            values: before the step.
            first: after it.
            kl_weight: ``lambda`` of that step.
        """
        before, moments = self.layout.views(values), self.layout.views(first)
        undone = []
        for share, group in self._groups():
            decay = 0.0 if self._decoupled(group) else group["weight_decay"]
            for name in share.names:
                gradient = moments[name] / (1 - group["betas"][0])
                if decay and share.moves(kl_weight):
                    gradient = gradient - decay * before[name]
                undone.append(gradient)
        return self.layout.joined(undone)

    def made(self, kl_weight: float) -> None:
        """Count a step."""
        for share in self.shares:
            share.steps += share.moves(kl_weight)

    def tell(self) -> None:
        """Tell the optimiser how many steps were made."""
        for share in self.shares if self.plain else ():
            for name in share.names:
                self.optimizer.state[self.parameters[name]]["step"].fill_(share.steps)

    def ask(self) -> bool:
        """Ask the optimiser how many steps were made; whether those of a share are still alike."""
        for share in self.shares if self.plain else ():
            steps = {_steps_of(self.optimizer, self.parameters[name]) for name in share.names}
            share.steps = min(steps)
            if len(steps) > 1:
                return False
        return True
