r"""The exact law of a T-step sampler on small spaces, by dynamic programming over masked states.

Let :math:`P_i` be the law of the state before step ``i``. For every state with masked positions
``M`` the joint law of its tokens (:mod:`vadd_pyro.integration`) is marginalised to each subset
``S`` that the step may reveal, which it does with probability :math:`\rho^{|S|} (1 - \rho)^{|M
\setminus S|}`, and carried on. With a shared latent the same is done for each ``z``, with products
of single tokens' laws in place of joints, and averaged over ``z`` at the end.

The same joints give the path-wise value :math:`\sum_i E_{x_{t_i}, S_i} \log p(x_{S_i} \mid
x_{t_i})`, the limit of the T-step bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vadd_pyro.integration import Joints, KeptOverTime
from vadd_pyro.process import MaskingProcess, make_time_grid
from vadd_pyro.programs import evaluation
from vadd_pyro.sampling import device_of, seeded, start_state

__all__ = ["exact_bound", "exact_distribution", "exact_distributions"]

_PAIRS = 2**22  # pairs of state and latent that the law under a shared latent is worth
_LEAST_DRAWS = 1024  # with 256, integration alone put .01 on a Jensen-Shannon distance
_CHUNK = 2**22  # doubles of a law under a shared latent that are held at once


def _subsets(positions: list[int]) -> Iterator[list[int]]:
    for size in range(len(positions) + 1):
        for subset in itertools.combinations(positions, size):
            yield list(subset)


def _without(positions: list[int], removed: list[int]) -> list[int]:
    return [p for p in positions if p not in removed]


def _check_size(process: MaskingProcess, num_open: int, num_steps: int, max_states: int) -> None:
    outcomes = process.vocab_size**num_open
    states = (process.vocab_size + 1) ** num_open if num_steps > 1 else outcomes
    if states > max_states:
        raise ValueError(
            f"the space is too large for an exact computation: {num_open} open positions of "
            f"{process.vocab_size} tokens have {outcomes:,} outcomes and {states:,} states over "
            f"{num_steps} steps, more than max_states = {max_states:,}; use sample() with "
            "metrics.histogram, or log_likelihood_bound, instead"
        )


def _marginals(joint: Tensor, visible: list[int], masked: list[int], keep: list[int]) -> Tensor:
    """``joint (K,) * (visible + masked)`` summed over the masked positions not kept, axes in order
    of position.
    """
    drop = [len(visible) + masked.index(j) for j in masked if j not in keep]
    if drop:
        joint = joint.sum(drop)
    order = visible + keep
    return joint.permute([order.index(p) for p in sorted(order)])


def exact_distribution(
    model: Callable[..., Any],
    process: MaskingProcess,
    num_steps: int | None = None,
    *,
    latent: str = "fresh",
    time_grid: Tensor | None = None,
    x_start: Tensor | None = None,
    t_start: float | None = None,
    num_draws: int = 2**14,
    seed: int = 0,
    max_states: int = 2**20,
    args: tuple[Any, ...] = (),
) -> Tensor:
    """The law ``p_T`` of the T-step sampler over all outcomes.

    Args:
        model: a step program.
        process: its forward process.
        num_steps: ``T``, steps of equal length.
        latent: ``"fresh"``, as the model defines, or ``"shared"``, as in :func:`vadd_pyro.sample`:
            then no law that the bounds speak of.
        time_grid: a grid of your own, ``(T + 1,)``.
        x_start: one partly observed row ``(D,)`` to start from, as in :func:`vadd_pyro.sample`.
        t_start: time at which it enters; by default where ``alpha(t_start)`` is its observed
            share.
        num_draws: points per state over which continuous latents are integrated; divided by the
            root of the number of states that share a mask, and at least 256. Discrete latents are
            summed and need none. A shared latent takes as many as 2^22 pairs of state and point
            allow, at least 1,024 and at most ``num_draws``.
        seed: scrambling of the points.
        max_states: refuse larger spaces.
        args: further arguments of the program.

    Returns:
        ``(K,) * D`` in double precision, sums to one.

    Raises:
        ValueError: for a space too large, saying how large it is and what to use instead.
    """
    grid = make_time_grid(num_steps, time_grid)
    device = device_of(model)
    if x_start is None:
        start = torch.full((process.length,), process.mask_id, device=device)
        times = grid.to(device)
    else:
        rows, grids = start_state(process, x_start, t_start, grid, device)
        if len(rows) != 1:
            raise ValueError(f"x_start must be one row, got {len(rows)}")
        start, times = rows[0], grids[0]
    joints = Joints(model, process, start, num_draws, seed, args)
    return _laws(joints, [times], latent, max_states)[0]


def exact_distributions(
    model: Callable[..., Any],
    process: MaskingProcess,
    num_steps: Sequence[int] = (1, 2, 4, 8),
    *,
    latent: str = "fresh",
    num_draws: int = 2**14,
    seed: int = 0,
    max_states: int = 2**20,
    args: tuple[Any, ...] = (),
) -> dict[int, Tensor]:
    """:func:`exact_distribution` for several numbers of steps, which share their work.

    Args:
        num_steps: the numbers of steps; the other arguments are those of
            :func:`exact_distribution`.

    Returns:
        The law ``(K,) * D`` for each number of steps.
    """
    device = device_of(model)
    start = torch.full((process.length,), process.mask_id, device=device)
    joints = Joints(model, process, start, num_draws, seed, args)
    grids = [make_time_grid(steps).to(device) for steps in num_steps]
    return dict(zip(num_steps, _laws(joints, grids, latent, max_states), strict=True))


def _laws(joints: Joints, grids: list[Tensor], latent: str, max_states: int) -> list[Tensor]:
    """The law of every grid, from the row that the joints start with."""
    if latent not in ("fresh", "shared"):
        raise ValueError(f"latent must be 'fresh' or 'shared', got {latent!r}")
    process, start = joints.process, joints.base
    everything = (start == process.mask_id).nonzero().flatten().tolist()
    _check_size(process, len(everything), max(len(grid) for grid in grids) - 1, max_states)
    with seeded(joints.seed), evaluation(joints.model):
        if latent == "fresh":
            laws = [_Fresh(joints, everything).law(grid) for grid in grids]
        else:
            laws = _shared_laws(joints, grids, everything)
    results = []
    for law in laws:
        result = torch.zeros(
            (process.vocab_size,) * process.length, dtype=torch.double, device=start.device
        )
        whole = [slice(None) if j in everything else int(start[j]) for j in range(process.length)]
        result[tuple(whole)] = law.reshape((process.vocab_size,) * len(everything))
        results.append(result)
    return results


class _Fresh:
    """The dynamic programme with a latent drawn anew at every step.

    Args:
        joints: joint laws of masked tokens.
        everything: the open positions.
    """

    def __init__(self, joints: Joints, everything: list[int]) -> None:
        self.joints = joints
        self.everything = everything
        self.vocab = joints.process.vocab_size

    def law(self, times: Tensor) -> Tensor:
        """The law of the open positions after all steps of a grid ``(T + 1,)``."""
        schedule = self.joints.process.schedule
        laws = {tuple(self.everything): self.first()}
        for i in range(len(times) - 1, 0, -1):
            rho = float(schedule.rho(times[i - 1], times[i]))
            following: dict[tuple[int, ...], Tensor] = {}
            for key, law in laws.items():
                masked = list(key)
                revealing = self.revealing(masked, law, float(times[i]))
                for revealed in _subsets(masked):
                    kept = tuple(_without(masked, revealed))
                    probability = rho ** len(revealed) * (1 - rho) ** len(kept)
                    if probability > 0:
                        value = revealing(revealed) * probability
                        following[kept] = following[kept] + value if kept in following else value
            laws = following
        return laws[()]

    def first(self) -> Tensor:
        """The law of what is visible at the start: of nothing."""
        return torch.ones((), dtype=torch.double, device=self.joints.base.device)

    def revealing(self, masked: list[int], law: Tensor, t: float) -> Callable[[list[int]], Tensor]:
        """The law of what is visible once some of the masked positions are revealed."""
        if not masked:
            return lambda revealed: law
        visible = _without(self.everything, masked)
        joint = self.joints(visible, masked, t) * law.reshape(-1, 1)
        joint = joint.reshape((self.vocab,) * len(self.everything))
        return lambda revealed: _marginals(joint, visible, masked, revealed)


class _Shared(_Fresh):
    """The same for given latents ``(M, ...)``, kept through all steps: laws ``(M, K ** v)``."""

    def __init__(
        self, joints: Joints, everything: list[int], values: dict[str, Tensor], number: int
    ) -> None:
        super().__init__(joints, everything)
        self.values = values
        self.number = number
        self._kept = KeptOverTime()

    def first(self) -> Tensor:
        return super().first().expand(self.number, 1)

    def revealing(self, masked: list[int], law: Tensor, t: float) -> Callable[[list[int]], Tensor]:
        if not masked:
            return lambda revealed: law
        visible = _without(self.everything, masked)
        x = self.joints.states(visible, masked)
        nothing = x.new_zeros((1, 0), dtype=torch.double)
        mu = self._kept(
            tuple(masked),
            t,
            lambda at: self.joints.probe(x, nothing, at, self.values),
            lambda: self.joints.factors(x, masked, t, self.values),
        )
        return lambda revealed: self._joined(law, mu, visible, masked, revealed)

    def _joined(
        self, law: Tensor, mu: Tensor, visible: list[int], masked: list[int], revealed: list[int]
    ) -> Tensor:
        """``law (M, K ** v)`` times the laws of the revealed tokens, axes in order of position."""
        for j in revealed:
            extra = mu[:, :, masked.index(j)]  # (M, K ** v, K)
            shape = law.shape[:2] + (1,) * (law.dim() - 2) + extra.shape[-1:]
            law = law.unsqueeze(-1) * extra.reshape(shape)
        order = visible + revealed
        law = law.reshape(self.number, *(self.vocab,) * len(order))
        axes = [1 + order.index(p) for p in sorted(order)]
        return law.permute(0, *axes).reshape(self.number, -1)


def _shared_laws(joints: Joints, grids: list[Tensor], everything: list[int]) -> list[Tensor]:
    """Laws under a latent drawn once, at the state in which the chain starts."""
    vocab, size = joints.process.vocab_size, len(everything)
    several = max(len(grid) for grid in grids) > 2
    num_states = (vocab + 1) ** size - vocab**size if several else 1
    number = min(joints.num_draws, max(_LEAST_DRAWS, _PAIRS // num_states))
    # All grids end at the same time, where the latent is drawn.
    first = float(grids[0][-1])
    values, weights = joints.latents(joints.base.unsqueeze(0), first, number)
    results = [weights.new_zeros(vocab**size) for _ in grids]
    chunk = max(1, _CHUNK // vocab**size)
    for start in range(0, len(weights), chunk):
        piece = slice(start, start + chunk)
        held = {name: value[piece] for name, value in values.items()}
        programme = _Shared(joints, everything, held, len(weights[piece]))
        for index, grid in enumerate(grids):
            results[index] += weights[piece] @ programme.law(grid)
    return results


def exact_bound(
    model: Callable[..., Any],
    process: MaskingProcess,
    num_steps: int | None = None,
    *,
    time_grid: Tensor | None = None,
    num_draws: int = 2**14,
    seed: int = 0,
    max_states: int = 2**20,
    args: tuple[Any, ...] = (),
) -> Tensor:
    r"""The path-wise value of the T-step bound for every outcome, to which
    ``log_likelihood_bound`` tends as particles grow.

    .. math::
        b_T(x) = \sum_{i=1}^T E_{x_{t_i}, S_i} \log p(x_{S_i} \mid x_{t_i}) \le \log p_T(x), \qquad
        b_1 = \log p_1 .

    Arguments as in :func:`exact_distribution`.

    Returns:
        ``(K,) * D`` in double precision, nats.
    """
    grid = make_time_grid(num_steps, time_grid)
    _check_size(process, process.length, len(grid) - 1, max_states)
    device = device_of(model)
    start = torch.full((process.length,), process.mask_id, device=device)
    joints = Joints(model, process, start, num_draws, seed, args)
    vocab, everything = process.vocab_size, list(range(process.length))
    result = torch.zeros((vocab,) * process.length, dtype=torch.double, device=device)
    with seeded(seed), evaluation(model):
        for i in range(len(grid) - 1, 0, -1):
            t = float(grid[i])
            rho = float(process.schedule.rho(grid[i - 1], grid[i]))
            hidden = float(1 - process.schedule.alpha(grid[i]))
            for masked in _subsets(everything):
                state = hidden ** len(masked) * (1 - hidden) ** (process.length - len(masked))
                if not masked or state == 0:
                    continue
                visible = _without(everything, masked)
                joint = joints(visible, masked, t).reshape((vocab,) * process.length)
                for revealed in _subsets(masked):
                    kept = _without(masked, revealed)
                    probability = state * rho ** len(revealed) * (1 - rho) ** len(kept)
                    if revealed and probability > 0:
                        log_p = _marginals(joint, visible, masked, revealed).log()
                        known = sorted(visible + revealed)
                        shape = [vocab if j in known else 1 for j in everything]
                        result += probability * log_p.reshape(shape)
    return result
