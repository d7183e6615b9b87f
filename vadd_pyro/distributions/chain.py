r"""A Markov chain of codes along a row, and what is left of a row's law when it is summed out.

.. math::
    p(c_1, \dots, c_D) = \prod_{i} p(c_i \mid c_{i-1}), \qquad p(c_1) \propto e^{u_{1, c_1}},
    \qquad p(c_i = b \mid c_{i-1} = a) = \frac{e^{A_{ab} + u_{ib}}}{\sum_{b'} e^{A_{ab'} +
    u_{ib'}}} .

The row has :math:`C^D` combinations of codes. If each token depends on the code of its own
position alone, the law of the tokens is that of a hidden Markov model, and the forward recursion
(Rabiner 1989) sums all of them out in ``D`` products of ``(B, C)`` by ``(C, C)`` matrices,

.. math::
    \log \sum_c p(c) \prod_i f_i(c_i) , \qquad \alpha_i(b) = f_i(b) \sum_a \alpha_{i-1}(a)\, p(c_i
    = b \mid c_{i-1} = a) .

References:
    Rabiner 1989, "A Tutorial on Hidden Markov Models".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from vadd_pyro.distributions.codes import MAX_SUPPORT, combinations, placed
from vadd_pyro.distributions.recursion import (
    chain_sum,
    largest,
    normalised,
    run_backward,
    run_forward,
)
from vadd_pyro.distributions.tokens import draw_categorical

__all__ = ["CodeChain"]


class CodeChain(TorchDistribution):
    """A Markov chain of ``D`` codes, integers ``(D,)`` in ``0..C-1``.

    Args:
        transition: ``A``, how well one code goes with the next, ``(C, C)``. Logits of a step that
            are 700 nats apart count as impossible.
        potential: ``u``, what a position wants, ``(..., D, C)``.

    Raises:
        ValueError: for shapes that do not fit.
    """

    arg_constraints: ClassVar = {
        "transition": constraints.independent(constraints.real, 2),
        "potential": constraints.independent(constraints.real, 2),
    }
    # Codes of single positions can be laid out to be summed over, all positions at once.
    sums_by_position = True

    def __init__(
        self, transition: Tensor, potential: Tensor, validate_args: bool | None = None
    ) -> None:
        if potential.dim() < 2 or transition.shape != 2 * potential.shape[-1:]:
            raise ValueError(
                "potential must have shape (..., D, C) and transition (C, C), got "
                f"{tuple(potential.shape)} and {tuple(transition.shape)}"
            )
        self.transition = transition
        self.potential = potential
        self.length, self.num_codes = potential.shape[-2:]
        super().__init__(potential.shape[:-2], potential.shape[-2:-1], validate_args=False)
        if validate_args is None:
            self.__dict__.pop("_validate_args")
        else:
            self._validate_args = validate_args

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> CodeChain:
        """The same law over a larger batch shape."""
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self
        return CodeChain(
            self.transition,
            self.potential.expand(shape + self.potential.shape[-2:]),
            validate_args=False,
        )

    def tempered(self, temperature: float) -> CodeChain:
        """The same chain with the logits of each step divided."""
        return CodeChain(
            self.transition / temperature, self.potential / temperature, validate_args=False
        )

    @property
    def support(self) -> constraints.Constraint:
        """Integers ``0..C-1``."""
        return constraints.independent(constraints.integer_interval(0, self.num_codes - 1), 1)

    @property
    def has_enumerate_support(self) -> bool:
        """Whether all combinations are few enough to be laid out."""
        return bool(self.num_codes**self.length <= MAX_SUPPORT)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All ``C ** D`` combinations, ``(C ** D, ..., D)``.

        Raises:
            NotImplementedError: for more than 4,096.
        """
        values = combinations(self.num_codes, self.length, self.potential.device)
        values = values.reshape(len(values), *(1,) * len(self.batch_shape), self.length)
        return values.expand(len(values), *self.batch_shape, -1) if expand else values

    def position_support(self) -> Tensor:
        """Each code at all positions, ``(C, 1, ..., D)``, for :meth:`summed_out`."""
        codes = torch.arange(self.num_codes, device=self.potential.device)
        shape = (self.num_codes,) + (1,) * len(self.batch_shape)
        return codes.reshape(*shape, 1).expand(*shape, self.length)

    def summed_out(self, log_factor: Tensor) -> Tensor:
        """``log sum_c p(c) prod_i f_i(c_i)``, the batch shape, in nats.

        Args:
            log_factor: ``log f``, ``(..., D, C)``; the codes of a position along the last
                dimension.
        """
        return chain_sum(self.transition, self.potential, log_factor)

    def given(self, log_factor: Tensor) -> CodeChain:
        r"""The posterior ``p(c) prod_i f_i(c_i)``, normalised: it is a chain with the same ``A``,

        .. math::
            u'_{ib} = u_{ib} + \log f_i(b) + \log \sum_{c} p(c_{i+1} = c \mid c_i = b)\, f_{i+1}(c)
            \cdots .

        Args:
            log_factor: as in :meth:`summed_out`.
        """
        shape = torch.broadcast_shapes(self.potential.shape, log_factor.shape)
        factor = log_factor.double().expand(shape)
        factor = factor - largest(factor)
        pairs, here, total = normalised(self.transition, self.potential.expand(shape))
        weight = (factor.exp() * here).movedim(-2, 0)
        after = run_backward(pairs, weight, total.movedim(-2, 0)).movedim(0, -2)
        potential = (self.potential + factor + after).to(self.potential.dtype)
        return CodeChain(self.transition, potential, validate_args=False)

    def marginals(self) -> Tensor:
        """Probabilities of the codes of each position, ``(..., D, C)``."""
        found = run_forward(*normalised(self.transition, self.potential.movedim(-2, 0)))
        return found.movedim(0, -2).to(self.potential.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of codes ``(..., D)`` in nats, the batch shape."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, self.potential.shape[:-1])
        value = value.long().expand(shape)
        before = torch.cat([value[..., :1], value[..., :-1]], -1)  # the first has none: any
        _, here, total = normalised(self.transition, self.potential)
        chosen = self.potential.expand(*shape, -1).gather(-1, value.unsqueeze(-1)).squeeze(-1)
        step = self.transition[before, value]
        step = torch.cat([torch.zeros_like(step[..., :1]), step[..., 1:]], -1)
        first = here[..., :1, :].sum(-1, keepdim=True).log().squeeze(-1)
        after = total.log().expand(*shape, -1).gather(-1, before.unsqueeze(-1)).squeeze(-1)
        most = self.transition.double().amax(-1)[before]
        after = torch.cat([first.expand_as(after[..., :1]), (after + most)[..., 1:]], -1)
        after = after + self.potential.double().amax(-1)
        return (chosen + step - after).sum(-1).to(self.potential.dtype)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Codes, ``sample_shape + batch_shape + (D,)`` long."""
        shape = torch.Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            potential = self.potential.expand(*shape, -1, -1)
            return self._walk(lambda i, logits: draw_categorical(logits), potential)

    @property
    def num_uniforms(self) -> int:
        """Columns that :meth:`transport` needs."""
        return self.length

    def transport(self, u: Tensor) -> Tensor:
        """Points of the unit cube ``u (..., D)`` carried to codes."""
        shape = torch.broadcast_shapes(u.shape, self.potential.shape[:-1])
        u = u.expand(shape)

        def pick(i: int, logits: Tensor) -> Tensor:
            return placed(logits.softmax(-1), u[..., i])

        return self._walk(pick, self.potential.expand(*shape, -1))

    def _walk(self, pick: Callable[[int, Tensor], Tensor], potential: Tensor) -> Tensor:
        """Codes one after another, each by ``pick(position, logits)``."""
        codes: list[Tensor] = []
        logits = potential[..., 0, :]
        for i in range(self.length):
            if i:
                logits = self.transition[codes[-1]] + potential[..., i, :]
            codes.append(pick(i, logits))
        return torch.stack(codes, -1)
