r"""Where training looks: distributions of the time ``t`` at which rows are masked.

A draw gives each row a time, the time stepped back to (on a grid) and the weight with which the
row counts. Under the first three classes the expected weighted term is the same, the DELBO
:math:`\int_0^1 w(t) f(t) dt`; they differ in variance and in work. The others are stated as what
they are, other objectives: at high dimension uniform times almost never show the all-masked state,
from which every sample starts.

====================== =============================================== ==========================
class                  time ``t`` of a row                             weight of a row
====================== =============================================== ==========================
``UniformTimes()``     uniform                                         ``w(t)``
``UniformTimes(True)`` uniform, masks given at least one masked        ``w(t) (1 - alpha(t)^D)``
``BalancedTimes()``    density proportional to the weight above        ``1 + 1/2 + ... + 1/D``
``AtomTimes(share)``   1 for a share of rows, else as told             1 for those, else as told
``GridTimes(T)``       points of one or several T-step grids           ``T``; DELBO: ``T rho``
``FewStepTimes(T)``    points of the grids 1, 2, 4, ..., T             as ``GridTimes``
``PartTargets(grid)``  those of a grid, part of the rows with the      as ``GridTimes``
                       targets of their step
====================== =============================================== ==========================

Times are laid out on a randomly shifted lattice over the batch, so that each is exactly
distributed as stated and together they cover the range evenly (low-variance sampling, Kingma et
al. 2021, arXiv 2107.00630).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vadd_pyro.process import (
    MaskedBatch,
    MaskingProcess,
    check_size,
    check_time,
    make_time_grid,
)

__all__ = [
    "AtomTimes",
    "BalancedTimes",
    "FewStepTimes",
    "GridTimes",
    "PartTargets",
    "TimeDistribution",
    "TimeDraw",
    "UniformTimes",
]


class TimeDraw(NamedTuple):
    """Times of a batch.

    Args:
        t: times, ``(B,)``.
        weight: weight of each row's term, ``(B,)``.
        s: the time each row's reverse step leads to, ``(B,)``; None in continuous time.
        at_least_one: whether masks are to be drawn given that one position at least is masked.
        parts: rows whose targets under the DELBO are not all that is masked but what the step to
            ``s`` reveals, ``(B,)`` bool, with weight ``T``; None for none of them.
    """

    t: Tensor
    weight: Tensor
    s: Tensor | None = None
    at_least_one: bool = False
    parts: Tensor | None = None


def draw_batch(
    times: TimeDistribution,
    process: MaskingProcess,
    x_0: Tensor,
    steps: bool = False,
    least_time: float = 0.0,
) -> MaskedBatch:
    """Draw times for clean rows and mask them, with the weights and targets of an objective.

    Args:
        times: where to look.
        process: the forward process.
        x_0: clean tokens, ``(B, D)``.
        steps: score what steps reveal, for the T-step bound, not all that is masked.
        least_time: steps from earlier times have no latent. What such a step reveals is
            independent given the state, so that all that is masked is scored, times ``rho``: the
            same in expectation, of less variance.

    Raises:
        ValueError: for steps without a grid.
    """
    t, weight, s, at_least_one, parts = times.draw(process, len(x_0), x_0.device)
    if s is None:
        if steps:
            raise ValueError(
                f"objective='chain' scores the steps of a grid, but times is {times}: use "
                "GridTimes"
            )
        return process.corrupt(x_0, t, weight=weight, at_least_one=at_least_one)
    if steps and least_time == 0:
        return process.corrupt(x_0, t, s, weight=weight)
    if steps:
        parts = t >= least_time
    elif parts is not None and least_time > 0:
        parts = parts & (t >= least_time)
    weight_of_all = weight * process.schedule.rho(s, t)
    if parts is not None:
        s, weight = s.masked_fill(~parts, 0.0), weight.where(parts, weight_of_all)
    else:
        s, weight = None, weight_of_all
    given = at_least_one and not steps
    return process.corrupt(x_0, t, s, weight=weight, at_least_one=given)


def check_least_time(least_time: float, times: TimeDistribution, free_bits: float) -> float:
    """Check that a latent of steps from late times alone is one that a loss can train.

    Raises:
        ValueError: for no time, for times that never are so late, and with free bits, which would
            count rows that have no latent.
    """
    least_time = check_time("least_time", least_time)
    if least_time == 1 and isinstance(times, UniformTimes | BalancedTimes):
        raise ValueError(
            f"least_time = 1 leaves the latent to t = 1, which times = {times} never draws: use "
            "GridTimes, FewStepTimes, PartTargets or AtomTimes"
        )
    if least_time > 0 and free_bits > 0:
        raise ValueError(
            f"free_bits = {free_bits} are shares of a mean over rows, and with least_time = "
            f"{least_time} some rows have no latent: use one of the two"
        )
    return least_time


def lattice(num_rows: int, device: torch.device) -> Tensor:
    """``num_rows`` evenly spread numbers, each uniform on ``[0, 1)``, with one random shift."""
    shift = torch.rand((), device=device)
    return (shift + torch.arange(num_rows, device=device) / num_rows) % 1


def _shuffled(values: Tensor) -> Tensor:
    """Numbers in random order.

    Gathered, for torch 2.13 cannot compile an indexing by ``randperm``.
    """
    return values.gather(0, torch.randperm(len(values), device=values.device))


class TimeDistribution(ABC):
    """Base class: one method, :meth:`draw`."""

    @abstractmethod
    def draw(self, process: MaskingProcess, num_rows: int, device: torch.device) -> TimeDraw:
        """Times and weights for ``num_rows`` rows."""


class UniformTimes(TimeDistribution):
    """``t`` uniform on ``(0, 1]``, weight ``w(t)``: the DELBO as it is written. The default.

    Args:
        at_least_one: draw masks given that some position is masked, with the weight times its
            probability. The expectation is the same; no row is spent on nothing (at ``D = 2`` a
            third of them is).
    """

    def __init__(self, at_least_one: bool = False) -> None:
        self.at_least_one = at_least_one

    def draw(self, process: MaskingProcess, num_rows: int, device: torch.device) -> TimeDraw:
        t = 1 - lattice(num_rows, device)
        weight = process.schedule.weight(t)
        if self.at_least_one:
            p = 1 - process.schedule.alpha(t)
            weight = weight * -torch.expm1(process.length * torch.log1p(-p))
        return TimeDraw(t, weight, at_least_one=self.at_least_one)

    def __repr__(self) -> str:
        return f"UniformTimes(at_least_one={self.at_least_one})"


class BalancedTimes(TimeDistribution):
    """Times at which every row counts the same: density ``w(t) (1 - alpha(t)^D)``, weight ``H_D =
    1 + 1/2 + ... + 1/D``.

    The number ``m`` of masked positions then has probability ``1 / (m H_D)``. Same expectation as
    :class:`UniformTimes`, a quarter of its gradient variance at ``D = 2``, more at ``D = 64``:
    choose by dimension.
    """

    def draw(self, process: MaskingProcess, num_rows: int, device: torch.device) -> TimeDraw:
        sizes = torch.arange(1, process.length + 1, device=device, dtype=torch.get_default_dtype())
        cumulative = (1 / sizes).cumsum(0)
        total = cumulative[-1]
        count = torch.searchsorted(cumulative, lattice(num_rows, device) * total, right=True)
        count = count.clamp_max(process.length - 1).to(sizes.dtype) + 1
        # Given m masked of D, 1 - alpha(t) is Beta(m, D - m + 1); it is drawn as a ratio of gamma
        # variables.
        hit = torch._standard_gamma(count)
        miss = torch._standard_gamma(process.length - count + 1)
        share = hit / (hit + miss)
        t = process.schedule.inverse(1 - share)
        return TimeDraw(t, total.expand(num_rows), at_least_one=True)

    def __repr__(self) -> str:
        return "BalancedTimes()"


class AtomTimes(TimeDistribution):
    """A share of rows at ``t = 1``, all masked, with weight 1; the others as ``rest`` says, with
    its weights.

    Another objective than the DELBO: ``share * (one-step bound) + (1 - share) * DELBO``.

    Args:
        share: probability of the all-masked state, in ``[0, 1]``.
        rest: distribution of the other rows' times; uniform if omitted.
    """

    def __init__(self, share: float = 0.3, rest: TimeDistribution | None = None) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share must be a probability in [0, 1], got {share!r}")
        self.share = float(share)
        self.rest = UniformTimes() if rest is None else rest

    def draw(self, process: MaskingProcess, num_rows: int, device: torch.device) -> TimeDraw:
        rest = self.rest.draw(process, num_rows, device)
        if rest.s is not None:
            raise ValueError(f"rest must be a distribution in continuous time, got {self.rest}")
        # The lattice of the rest is in row order: a shuffled one for the atom keeps the two
        # independent.
        atom = _shuffled(lattice(num_rows, device)) < self.share
        return TimeDraw(
            rest.t.masked_fill(atom, 1.0),
            rest.weight.masked_fill(atom, 1.0),
            at_least_one=rest.at_least_one,
        )

    def __repr__(self) -> str:
        return f"AtomTimes(share={self.share:g}, rest={self.rest})"


class GridTimes(TimeDistribution):
    """A uniformly drawn step of a T-step sampler, as the T-step bound needs it; weight ``T``.

    With the DELBO objective a row's target is all that is masked, and its weight is ``T rho(s,
    t)``: the Riemann sum of the DELBO over the grid's states.

    Args:
        num_steps: ``T``, or several of them, between which each row chooses with equal
            probability.
        time_grid: a grid of your own instead, ``(T + 1,)`` increasing from 0 to 1.
    """

    def __init__(
        self, num_steps: int | Sequence[int] | None = None, time_grid: Tensor | None = None
    ) -> None:
        several = (
            [num_steps] if num_steps is None or isinstance(num_steps, int) else list(num_steps)
        )
        if not several:
            raise ValueError("num_steps is an empty list: expected at least one number of steps")
        self.grids = [make_time_grid(steps, time_grid) for steps in several]

    def draw(self, process: MaskingProcess, num_rows: int, device: torch.device) -> TimeDraw:
        dtype = torch.get_default_dtype()
        uniform = lattice(num_rows, device)
        choice = torch.randint(len(self.grids), (num_rows,), device=device)
        t = torch.empty(num_rows, device=device, dtype=dtype)
        s, weight = torch.empty_like(t), torch.empty_like(t)
        for index, grid in enumerate(self.grids):
            edges = grid.to(device=device, dtype=dtype)
            num_steps = len(grid) - 1
            step = (uniform * num_steps).long().clamp_max(num_steps - 1) + 1
            chosen = choice == index
            t = torch.where(chosen, edges[step], t)
            s = torch.where(chosen, edges[step - 1], s)
            weight = weight.masked_fill(chosen, float(num_steps))
        return TimeDraw(t, weight, s)

    def __repr__(self) -> str:
        return f"GridTimes({[[round(t, 9) for t in grid.tolist()] for grid in self.grids]})"


class FewStepTimes(GridTimes):
    """The states that samplers of 1, 2, 4, ..., ``max_steps`` steps pass through: for high
    dimension and few steps.

    Each row draws one of these numbers of steps and one of its steps, and under the DELBO (what
    this is for) scores all that is masked with weight ``T rho(s, t)``, which is ``1 / t`` for the
    linear schedule. With ``max_steps=64``, 28 % of the rows are all masked, 14 % at ``t = 1/2``.

    Of nine distributions of times tried on binarised MNIST this was the best compromise: 23,
    13, 6 and 2 nats above uniform times at T = 1, 2, 4, 8 (784 pixels), above ``AtomTimes(0.3)``
    from T = 2 on, and 1 and 3 nats below uniform times at T = 16 and 64 (docs/zoo.md). None was
    best at every T: for many steps, and for a model without latent, keep to uniform times.

    Args:
        max_steps: largest number of steps, a power of two; a smaller one spends more rows on the
            all-masked state, and gains at one step what it loses at many.
    """

    def __init__(self, max_steps: int = 64) -> None:
        check_size("max_steps", max_steps)
        if max_steps & (max_steps - 1):
            raise ValueError(f"max_steps must be a power of two, got {max_steps}")
        self.max_steps = max_steps
        super().__init__([2**k for k in range(max_steps.bit_length())])

    def __repr__(self) -> str:
        return f"FewStepTimes({self.max_steps})"


class PartTargets(TimeDistribution):
    """The states of a grid, and for a share of the rows the targets of their step alone.

    Under the DELBO all that is masked is a target, and a guide has never seen others. Samplers of
    many steps reveal little at a time, and what such a guide makes of that costs hundreds of nats
    in their bounds until it is refitted. Here it learns both:

    ``(1 - share) * DELBO on the grid's states + share * mean T-step bound``.

    Args:
        grid: the states.
        share: probability of a row's being scored on the targets of its step.
    """

    def __init__(self, grid: GridTimes | None = None, share: float = 0.3) -> None:
        self.grid = FewStepTimes() if grid is None else grid
        if not isinstance(self.grid, GridTimes):
            raise TypeError(f"grid must be GridTimes or FewStepTimes, got {grid!r}")
        if not 0 <= share <= 1:
            raise ValueError(f"share must be a probability in [0, 1], got {share!r}")
        self.share = float(share)

    def draw(self, process: MaskingProcess, num_rows: int, device: torch.device) -> TimeDraw:
        found = self.grid.draw(process, num_rows, device)
        # The lattice of times is in row order: a shuffled one here keeps the two independent.
        parts = _shuffled(lattice(num_rows, device)) < self.share
        return found._replace(parts=parts)

    def __repr__(self) -> str:
        return f"PartTargets({self.grid}, share={self.share:g})"
