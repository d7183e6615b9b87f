r"""In which order a sampler reveals tokens, and what each way does to the law of its samples.

The sampler that the model defines reveals each masked token with probability ``rho(s, t)``,
whatever the values are (``order="random"``); its law is ``p_T``, which
:func:`vadd_pyro.exact_distribution` computes and the bounds speak of. The others look at what the
network says first:

``"confidence"``
    draws a token at every masked position and keeps those that had the highest probability (Chang
    et al. 2022, MaskGIT, without its noise).
``"entropy"``
    picks the positions whose logits, given ``x_t`` and ``z``, have the lowest entropy ``H_j``,
    then draws their tokens.
``"entropy_bounded"``
    takes positions by increasing entropy while :math:`\sum_{j \in S} H_j - \max_{j \in S} H_j \le
    \gamma`, at least one (Ben-Hamu et al. 2025). The left side bounds the mutual information that
    drawing the tokens of ``S`` independently loses.
a function ``order(logits, batch) -> scores``
    picks the positions of highest score. It may look at the logits ``(B, D, K)`` and the
    :class:`~vadd_pyro.MaskedBatch`, and gives ``(B, D)``.

Except with ``"entropy_bounded"`` the number of tokens left masked in a row is then no random
number but, of its ``n`` open ones, ``n (1 - alpha(s)) / (1 - alpha(t_start))`` rounded to the
nearest integer, halves up (:func:`reveal_counts`); at ``s = 0`` that is none. A step that reveals
nothing costs no network call. Ties go to the position on the left.

**What is kept.** Two laws may be: ``p_T``, and the law ``q`` of the data if the model is perfect,
which means one of two things. *Exact joint*: the step's own law :math:`\int p(z \mid x_t) \prod_j
\mu_j\, dz` is :math:`q(x_M \mid x_t)`; that takes a latent. *Exact conditionals*: each position's
is :math:`q(x_j \mid x_t)`, the best that a model without latent can do. In the table "entropy"
stands for any function of the logits, and what it does not list keeps neither law.

============================= ====== =============================================================
options                       p_T    law of the data, with a perfect model
============================= ====== =============================================================
random, fresh                 yes    exact joint: yes, for every T; exact conditionals: as T
                                     grows and no step reveals two tokens
random, shared or partial     no (1) no; shared gives :math:`\int p(z) \prod_j \mu_j(x_j \mid z)\,
                                     dz` where ``mu`` depends on ``z`` alone
function of ``x_t``, fresh    no (2) exact joint: yes, any number of tokens a step; exact
                                     conditionals: yes, with one token a step
entropy, no latent            no (2) exact conditionals: yes, with one token a step
entropy, fresh latent         no (2) no: the choice says something about ``z``, so that the token
                                     has not the law :math:`E_z \mu_j` (3)
entropy_bounded, no latent    no (2) exact conditionals: yes with ``gamma = 0``, else
                                     :math:`KL(q | p) \le \gamma` times the number of calls (4)
entropy_bounded, fresh latent no (2) no, for the same reason (3)
confidence                    no (2) no: likely tokens come first, and what is left is drawn again;
                                     even where positions are independent
random with remask, fresh     no (5) exact joint: yes, for every T and eta; exact conditionals:
                                     where positions are independent, else as T grows (6)
latent_temperature not 1      no     no
============================= ====== =============================================================

(1) Yes with ``T = 1``, or without latent. (2) If all is revealed at once, no order is left and the
law is ``p_1``. A function that gives random scores, one token a step, has the law to which ``p_T``
tends as T grows, if the model does not look at ``t``. (3) Harmless where the choice comes out the
same for all ``z``. A latent which decides whether a position is certain makes ``"entropy"`` reveal
it just when it is. (4) If ``num_steps`` does not cut it short: the last call allowed reveals all
that is left, whatever the bound. (5) Yes with ``T <= 2``, where nothing is ever hidden. (6) The
error falls as ``1 / T`` while ``eta T`` is bounded, as does that without remasking. With ``eta``
fixed, when a share of the tokens is drawn anew at once in every step, it is the cap, which falls
to zero with ``t``, that lets it fall at all, as ``1 / sqrt(T)``.

**What remasking is for.** Without it a token stays once it is revealed. Two tokens drawn
independently in one step may contradict each other, or a token drawn where little was visible may
fit badly to what comes after, and nothing can mend it; nor can a row use more than ``D`` network
calls. With it a visible token may be drawn again given the others (:func:`remasking_rates`; Wang
et al. 2025, ReMDM-cap), so that later steps mend what coarse early ones have spoiled. Where none
are coarse it mends nothing: with exact conditionals and equal steps it is no better than the plain
order. Nor does it mend wrong conditionals: where those of a learned model do not fit each other,
it tends to the law of drawing from them over and over.

References:
    Chang et al. 2022, "MaskGIT" (arXiv 2202.04200); Ben-Hamu et al. 2025, "Accelerated Sampling
    from Masked Diffusion Models via Entropy Bounded Unmasking" (arXiv 2505.24857); Wang et al.
    2025, "Remasking Discrete Diffusion Models with Inference-Time Scaling" (arXiv 2503.00307);
    Zheng et al. 2024 (arXiv 2409.02908) on one token at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vadd_pyro.distributions import draw_categorical
from vadd_pyro.process import MaskedBatch, MaskingProcess

__all__ = [
    "ORDERS",
    "Order",
    "Pick",
    "Plan",
    "Step",
    "by_entropy",
    "check_order",
    "make_plan",
    "remasking_rates",
    "reveal_counts",
]

ORDERS = ("random", "confidence", "entropy", "entropy_bounded")

Order = Callable[[Tensor, MaskedBatch], Tensor]
"""Logits ``(B, D, K)`` and the batch to scores ``(B, D)``: the highest are revealed first."""

Pick = Callable[[Tensor, MaskedBatch], tuple[Tensor | None, Tensor]]
"""Logits and the batch to tokens ``(B, D)``, None to draw them, and which positions to reveal."""


def check_order(order: str | Order, entropy_bound: float | None, remask: float) -> None:
    """Check what a sampler was told about its order.

    Raises:
        ValueError: naming the argument and its value, also for arguments that contradict each
        other.
    """
    if not callable(order) and order not in ORDERS:
        names = ", ".join(repr(name) for name in ORDERS)
        raise ValueError(f"order must be one of {names} or a function, got {order!r}")
    if (entropy_bound is not None) != (order == "entropy_bounded"):
        raise ValueError(
            "entropy_bound and order='entropy_bounded' need each other, got "
            f"entropy_bound={entropy_bound!r} and order={order!r}"
        )
    if entropy_bound is not None and not (_is_number(entropy_bound) and entropy_bound >= 0):
        raise ValueError(f"entropy_bound must be a number of nats >= 0, got {entropy_bound!r}")
    if not (_is_number(remask) and 0 <= remask <= 1):
        raise ValueError(f"remask must be a probability in [0, 1], got {remask!r}")
    if remask > 0 and order != "random":
        raise ValueError(
            f"remask={remask} needs order='random', got {order!r}: its rates are those of tokens "
            "revealed at random"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def reveal_counts(process: MaskingProcess, num_open: Tensor, grids: Tensor) -> Tensor:
    """How many tokens of a row each step reveals, where that is no random number.

    Args:
        process: gives the schedule.
        num_open: masked tokens of each row where the chain starts, ``(B,)`` long.
        grids: ``(1, T + 1)`` or ``(B, T + 1)``, double precision; the last column is where the
            chain starts.

    Returns:
        ``(B, T)`` long; column ``i`` is step ``i + 1``, from ``t_{i+1}`` to ``t_i``, and a row
        sums to ``num_open``.
    """
    hidden = 1 - process.schedule.alpha(grids)
    share = hidden / hidden[:, -1:].clamp_min(torch.finfo(hidden.dtype).tiny)
    share = torch.cat([torch.zeros_like(share[:, :1]), share[:, 1:]], -1)
    left = (num_open.unsqueeze(-1) * share + 0.5).floor().long()
    return left.diff(dim=-1)


def by_entropy(logits: Tensor, batch: MaskedBatch) -> Tensor:
    """Minus the entropy of each position in nats: the order ``"entropy"``, as a function."""
    return -_entropies(logits)


def _entropies(logits: Tensor) -> Tensor:
    log_p = logits.double().log_softmax(-1)
    return -torch.where(log_p.isfinite(), log_p.exp() * log_p, 0.0).sum(-1)


def _highest(scores: Tensor, masked: Tensor, counts: Tensor) -> Tensor:
    """The ``counts (B,)`` masked positions of highest score of each row, ``(B, D)`` bool."""
    scores = scores.double().masked_fill(~masked, -torch.inf)
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return masked & (rank < counts.unsqueeze(-1))


def _pick_scored(order: Order, counts: Tensor) -> Pick:
    """Reveal the positions to which ``order`` gives the highest scores.

    Args:
        order: scores finite at every masked position.
        counts: how many to reveal in each row, ``(B,)`` long.

    Raises:
        TypeError, ValueError: when used, if ``order`` gives no tensor, another shape, or a score
        that is not finite.
    """

    def pick(logits: Tensor, batch: MaskedBatch) -> tuple[Tensor | None, Tensor]:
        scores = order(logits, batch)
        if not isinstance(scores, Tensor):
            raise TypeError(
                f"order must give a tensor of scores (B, D), got {type(scores).__name__}"
            )
        if scores.shape != batch.masked.shape:
            raise ValueError(
                f"order must give scores of shape (B, D) = {tuple(batch.masked.shape)}, got "
                f"{tuple(scores.shape)}"
            )
        bad = batch.masked & ~scores.isfinite()
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            raise ValueError(
                "order must give finite scores at masked positions, got "
                f"{float(scores[row, column])} at [{row}, {column}]"
            )
        return None, _highest(scores, batch.masked, counts)

    return pick


def _pick_confident(counts: Tensor) -> Pick:
    """Draw tokens everywhere and reveal those whose own probability is highest.

    Args:
        counts: how many to reveal in each row, ``(B,)`` long.
    """

    def pick(logits: Tensor, batch: MaskedBatch) -> tuple[Tensor | None, Tensor]:
        tokens = draw_categorical(logits)
        log_p = logits.double().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return tokens, _highest(log_p, batch.masked, counts)

    return pick


def _pick_bounded(bound: float) -> Pick:
    """Reveal positions by increasing entropy, as long as the sum of entropies without the largest
    stays within ``bound`` nats; at least one.
    """

    def pick(logits: Tensor, batch: MaskedBatch) -> tuple[Tensor | None, Tensor]:
        entropies = _entropies(logits)
        ordered, index = entropies.masked_fill(~batch.masked, torch.inf).sort(dim=-1, stable=True)
        before = torch.cat([torch.zeros_like(ordered[:, :1]), ordered[:, :-1].cumsum(-1)], -1)
        return None, batch.masked & torch.zeros_like(batch.masked).scatter(
            -1, index, before <= bound
        )

    return pick


def remasking_rates(process: MaskingProcess, grids: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    r"""Probabilities of ReMDM-cap that a step hides a visible token and reveals a masked one.

    .. math::
        \sigma = \min\Big(\eta, \frac{1 - b(s)}{b(t)}\Big), \qquad
        \frac{b(s) - (1 - \sigma)\, b(t)}{1 - b(t)}, \qquad
        b(t) = \frac{\alpha(t) - \alpha(t_\text{start})}{1 - \alpha(t_\text{start})},

    so that an open token is visible with probability ``b(t)`` at every time; ``b = alpha`` for a
    chain that starts all masked. The last step hides nothing and reveals everything.

    Args:
        process: gives the schedule.
        grids: ``(1, T + 1)`` or ``(B, T + 1)``, double precision.
        eta: cap of ``sigma``, in ``[0, 1]``.

    Returns:
        ``(sigma, reveal)``, each of the shape of ``grids`` with one column less; column ``i`` is
        the step from ``t_{i+1}`` to ``t_i``.
    """
    alpha = process.schedule.alpha(grids)
    tiny = torch.finfo(alpha.dtype).tiny
    start = alpha[:, -1:]
    visible = ((alpha - start) / (1 - start).clamp_min(tiny)).clamp(0, 1)
    earlier, now = visible[:, :-1], visible[:, 1:]
    sigma = ((1 - earlier) / now.clamp_min(tiny)).clamp(0, eta)
    reveal = ((earlier - (1 - sigma) * now) / (1 - now).clamp_min(tiny)).clamp(0, 1)
    sigma[:, 0], reveal[:, 0] = 0.0, 1.0
    return sigma, reveal


class Step(NamedTuple):
    """What one step does to a chunk of rows.

    Args:
        visited: rows that need the network, ``(B,)`` bool.
        t: their times, ``(B,)``.
        target: positions to reveal, or to choose from, ``(B, D)`` bool.
        pick: for an index tensor of rows, how to choose; None reveals ``target``.
        hidden: positions to mask again, ``(B, D)`` bool.
    """

    visited: Tensor
    t: Tensor
    target: Tensor
    pick: Callable[[Tensor], Pick] | None = None
    hidden: Tensor | None = None


class Plan(NamedTuple):
    """Steps ``num_steps, ..., 1`` of a sampler; ``step(i, masked)`` says what to do next."""

    num_steps: int
    step: Callable[[int, Tensor], Step]


def make_plan(
    process: MaskingProcess,
    order: str | Order,
    entropy_bound: float | None,
    remask: float,
    masked: Tensor,
    grids: Tensor,
) -> Plan | None:
    """How to go through a chunk of rows; None for the random order without remasking.

    Args:
        process: gives the schedule.
        order, entropy_bound, remask: as :func:`vadd_pyro.sample` takes them, checked.
        masked: open positions where the chain starts, ``(B, D)`` bool.
        grids: ``(1, T + 1)`` or ``(B, T + 1)``, double precision.
    """
    num_steps = grids.shape[-1] - 1
    times = grids.to(torch.get_default_dtype()).expand(len(masked), -1)
    if entropy_bound is not None:
        return Plan(num_steps, _bounded_steps(process, entropy_bound))
    if order != "random":
        return Plan(num_steps, _counted_steps(process, order, masked, grids, times))
    if remask > 0:
        return Plan(num_steps, _remasking_steps(process, remask, masked, grids, times))
    return None


def _counted_steps(
    process: MaskingProcess, order: str | Order, start: Tensor, grids: Tensor, times: Tensor
) -> Callable[[int, Tensor], Step]:
    """A fixed number of tokens a step, the best first."""
    counts = reveal_counts(process, start.sum(-1), grids)

    def step(i: int, masked: Tensor) -> Step:
        number = counts[:, i - 1]

        def pick(rows: Tensor) -> Pick:
            if callable(order):
                return _pick_scored(order, number[rows])
            if order == "entropy":
                return _pick_scored(by_entropy, number[rows])
            return _pick_confident(number[rows])

        return Step(number > 0, times[:, i], masked, pick)

    return step


def _bounded_steps(process: MaskingProcess, bound: float) -> Callable[[int, Tensor], Step]:
    """As many of the most certain tokens as a bound on lost information allows."""

    def step(i: int, masked: Tensor) -> Step:
        share = (~masked).double().mean(-1)
        t = process.schedule.inverse(share).to(torch.get_default_dtype())
        pick = _pick_bounded(bound)
        return Step(masked.any(-1), t, masked, (lambda rows: pick) if i > 1 else None)

    return step


def _remasking_steps(
    process: MaskingProcess, eta: float, start: Tensor, grids: Tensor, times: Tensor
) -> Callable[[int, Tensor], Step]:
    """The random order with generated tokens masked again on the way."""
    start = start.clone()
    sigma, reveal = remasking_rates(process, grids, eta)

    def step(i: int, masked: Tensor) -> Step:
        u = torch.rand(masked.shape, dtype=torch.double, device=masked.device)
        target = masked & (u < reveal[:, i - 1 : i])
        hidden = start & ~masked & (u < sigma[:, i - 1 : i])
        return Step(target.any(-1), times[:, i], target, None, hidden)

    return step
