r"""The recursions along a chain of codes, as two operations that a graph holds as one node each.

With :math:`w_i(b) = e^{u_{ib}}` and :math:`n_i(a) = \sum_b e^{A_{ab}} w_i(b)`, forward

.. math::
    \alpha_1 = \frac{w_1 f_1}{\sum_b w_1(b)}, \qquad \alpha_i(b) = w_i(b) f_i(b) \sum_a
    \frac{\alpha_{i-1}(a)}{n_i(a)} e^{A_{ab}}, \qquad \log \sum_b \alpha_D(b)

is what is left of the factors ``f`` when the codes are summed out. Its gradients are expectations
under the posterior, a chain with the same ``A`` and :math:`w'_i = w_i f_i \beta_i`,

.. math::
    \beta_D = 1, \qquad \beta_i(a) = \frac{1}{n_{i+1}(a)} \sum_b e^{A_{ab}} w_{i+1}(b) f_{i+1}(b)
    \beta_{i+1}(b) ,

less those under the prior chain at the posterior's codes before. All is done in double precision,
and every step is scaled by its largest number or its sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["chain_sum", "largest", "normalised", "run_backward", "run_forward"]

_TINY = 1e-300  # of double precision

_LIBRARY = torch.library.Library("vadd_pyro", "FRAGMENT")
_LIBRARY.define("chain_sum(Tensor transition, Tensor potential, Tensor log_factor) -> Tensor")
_LIBRARY.define(
    "chain_sum_backward(Tensor outer, Tensor transition, Tensor potential, Tensor log_factor) -> "
    "(Tensor, Tensor, Tensor)"
)


def normalised(transition: Tensor, potential: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the steps of a chain up to factors of their rows: of codes that follow each other
    ``(C, C)``, of codes at positions, and what these add up to over the codes that follow each,
    both as ``potential (..., C)``; in double precision.
    """
    pairs = transition.double()
    pairs = (pairs - pairs.amax(-1, keepdim=True)).exp()
    here = potential.double()
    here = (here - here.amax(-1, keepdim=True)).exp()
    return pairs, here, (here @ pairs.mT).clamp_min(_TINY)


def run_forward(pairs: Tensor, here: Tensor, total: Tensor) -> Tensor:
    """Probabilities of the codes of each position, ``(D, N, C)``.

    Args:
        pairs, here, total: of :func:`normalised`, positions first, ``(D, N, C)``.
    """
    state = here[0] / here[0].sum(-1, keepdim=True)
    states = [state]
    for i in range(1, len(here)):
        state = ((state / total[i]) @ pairs) * here[i]
        state = state / state.sum(-1, keepdim=True).clamp_min(_TINY)
        states.append(state)
    return torch.stack(states)


def run_backward(pairs: Tensor, weight: Tensor, total: Tensor) -> Tensor:
    """What comes after each position, ``log beta`` up to a number for each row and position, ``(D,
    N, C)``.

    Args:
        pairs, total: as in :func:`run_forward`.
        weight: weights of codes at positions times their factors, ``(D, N, C)``.
    """
    after = torch.ones_like(weight[0])
    found = [after]
    for i in range(len(weight) - 1, 0, -1):
        after = ((weight[i] * after) @ pairs.mT) / total[i]
        after = after / after.amax(-1, keepdim=True).clamp_min(_TINY)
        found.append(after)
    return torch.stack(found[::-1]).clamp_min(_TINY).log()


def _result(log_factor: Tensor) -> torch.dtype:
    """Of a sum over a whole row, for which half precision is too little."""
    return torch.promote_types(log_factor.dtype, torch.float32)


def largest(log_factor: Tensor) -> Tensor:
    """Of each position, where that is a number."""
    most = log_factor.amax(-1, keepdim=True)
    return most.where(most.isfinite(), most.new_zeros(()))


def _chain_sum(transition: Tensor, potential: Tensor, log_factor: Tensor) -> Tensor:
    pairs, here, total = normalised(transition, potential.movedim(-2, 0))
    factor = log_factor.double().movedim(-2, 0)
    most = largest(factor)
    weight = (factor - most).exp() * here
    state = weight[0] / here[0].sum(-1, keepdim=True)
    scales = []
    for i in range(len(weight)):
        if i:
            state = ((state / total[i]) @ pairs) * weight[i]
        scale = state.sum(-1, keepdim=True)
        scales.append(scale)
        state = state / scale.clamp_min(_TINY)
    found = (torch.stack(scales).log() + most).sum(0).squeeze(-1)
    return found.to(_result(log_factor))


def _chain_sum_backward(
    outer: Tensor, transition: Tensor, potential: Tensor, log_factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    pairs, here, total = normalised(transition, potential.movedim(-2, 0))
    factor = log_factor.double().movedim(-2, 0)
    weight = (factor - largest(factor)).exp() * here
    weight = weight * run_backward(pairs, weight, total).exp()
    weight = weight / weight.amax(-1, keepdim=True).clamp_min(_TINY)
    weight_total = (weight @ pairs.mT).clamp_min(_TINY)
    posterior = run_forward(pairs, weight, weight_total)
    outer = outer.double().unsqueeze(-1)
    before = outer * posterior[:-1]
    mine, usual = before / weight_total[1:], before / total[1:]
    own = outer * posterior
    expected = torch.cat(
        [outer * here[:1] / here[:1].sum(-1, keepdim=True), (usual @ pairs) * here[1:]]
    )
    codes = len(pairs)

    def met(first: Tensor, second: Tensor) -> Tensor:
        return first.reshape(-1, codes).mT @ second.reshape(-1, codes)

    of_pairs = pairs * (met(mine, weight[1:]) - met(usual, here[1:]))
    return (
        of_pairs.to(transition.dtype),
        (own - expected).movedim(0, -2).to(potential.dtype),
        own.movedim(0, -2).to(log_factor.dtype),
    )


def _like_forward(transition: Tensor, potential: Tensor, log_factor: Tensor) -> Tensor:
    return log_factor.new_empty(log_factor.shape[:-2], dtype=_result(log_factor))


def _like_backward(
    outer: Tensor, transition: Tensor, potential: Tensor, log_factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (transition, potential, log_factor))  # type: ignore[return-value]


def _in_order(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Laid out as an operation's shape says that they are."""
    return tuple(tensor.contiguous() for tensor in tensors)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("chain_sum", lambda *args: _chain_sum(*args).contiguous(), _key)
    _LIBRARY.impl("chain_sum_backward", lambda *args: _in_order(*_chain_sum_backward(*args)), _key)
_LIBRARY.impl("chain_sum", _like_forward, "Meta")
_LIBRARY.impl("chain_sum_backward", _like_backward, "Meta")


class _ChainSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, transition: Tensor, potential: Tensor, log_factor: Tensor) -> Tensor:
        ctx.save_for_backward(transition, potential, log_factor)
        return torch.ops.vadd_pyro.chain_sum(transition, potential, log_factor)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives
            return _chain_sum_backward(outer[0], *saved)
        return torch.ops.vadd_pyro.chain_sum_backward(outer[0], *saved)


def chain_sum(transition: Tensor, potential: Tensor, log_factor: Tensor) -> Tensor:
    """``log sum_c p(c) prod_i f_i(c_i)`` of a chain.

    Args:
        transition: ``A``, ``(C, C)``.
        potential: ``u``, ``(..., D, C)``.
        log_factor: ``log f``, ``(..., D, C)``, broadcast against it.

    Returns:
        ``(...)`` nats, of the type of ``log_factor``, at least single precision.
    """
    shape = torch.broadcast_shapes(potential.shape, log_factor.shape)
    return _ChainSum.apply(transition, potential.expand(shape), log_factor.expand(shape))
