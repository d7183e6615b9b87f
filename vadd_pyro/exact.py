r"""The exact law of a T-step sampler on small spaces, by dynamic programming over masked states.

Let :math:`P_i` be the law of the state before step ``i``. For every state with masked positions
``M`` the joint law of its tokens,

.. math::
    J(x_M \mid x_t) = \int p(z \mid x_t, t) \prod_{j \in M} \mu_j(x_j \mid x_t, z, t)\, dz ,

is marginalised to each subset ``S`` that the step may reveal, which it does with probability
:math:`\rho^{|S|} (1 - \rho)^{|M \setminus S|}`, and carried on. Discrete latents are summed;
continuous ones are integrated over scrambled Sobol points pushed through the inverse distribution
function of their prior (Owen 1998), others over random draws.

The same joints give the path-wise value :math:`\sum_i E_{x_{t_i}, S_i} \log p(x_{S_i} \mid
x_{t_i})`, the limit of the T-step bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from pyro.distributions import Gamma, Independent, MixtureSameFamily, StudentT
from scipy.special import gammaincinv, stdtrit
from torch import Tensor
from torch.quasirandom import SobolEngine

from vadd_pyro.distributions import token_logits
from vadd_pyro.process import MaskedBatch, MaskingProcess, make_time_grid
from vadd_pyro.programs import evaluation
from vadd_pyro.recorder import Recorder, Site
from vadd_pyro.sampling import device_of, seeded, start_state
from vadd_pyro.sites import PARTICLES, data_plate, is_row_site

__all__ = ["exact_bound", "exact_distribution"]

_SOBOL_COLUMNS = 64
_LEAST_DRAWS = 256
_CHUNK = 2**21  # elements of the widest tensor: small enough to stay near the processor


class _Integrator(Recorder):
    """Runs a program over many latents at once.

    Supports of discrete sites, given points for continuous ones.
    """

    def __init__(self, points: Tensor) -> None:
        super().__init__(enumerate_sites=lambda msg: True, first_dim=-3)
        self.points = points
        self.column = 0
        self.logits: Tensor | None = None

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and msg["name"] == "x_0" and msg["value"] is None:
            self.logits = token_logits(msg["fn"])
            msg["value"] = self.logits[..., 0].long()
            msg["done"] = True
            return
        super()._process_message(msg)
        latent = msg["type"] == "sample" and hasattr(msg["fn"], "event_shape")
        if latent and msg["value"] is None and not msg["done"]:
            value = self._place(msg["fn"])
            if value is not None:
                msg["value"] = value
                msg["done"] = True

    def _place(self, fn: Any) -> Tensor | None:
        """Points of the unit cube pushed through the inverse distribution function of ``fn``.

        None if it has none.
        """
        needed = getattr(fn, "num_uniforms", None)
        if needed is None:
            needed = fn.event_shape.numel() + isinstance(fn, MixtureSameFamily)
        if self.column + needed > self.points.shape[-1]:
            return None
        u = self.points[:, None, self.column : self.column + needed]
        u = u.clamp(1e-7, 1 - 1e-7).to(torch.get_default_dtype())
        try:
            value = _inverse_cdf(fn, u)
        except NotImplementedError:
            return None
        self.column += needed
        return value.expand(fn.batch_shape + fn.event_shape)


def _inverse_cdf(fn: Any, u: Tensor) -> Tensor:
    """Quantiles of ``fn`` at ``u (Z, 1, coordinates)``, ``(..., Z, B) + event_shape``."""
    if hasattr(fn, "transport"):
        return fn.transport(u)
    if isinstance(fn, MixtureSameFamily):
        components = fn.component_distribution
        cdf = fn.mixture_distribution.probs.cumsum(-1)
        pick = (cdf <= u[..., :1] * cdf[..., -1:]).sum(-1, keepdim=True)
        quantiles = _inverse_cdf(components, u[..., 1:].unsqueeze(-2))
        event = len(fn.event_shape)
        index = pick.reshape(pick.shape + (1,) * event)
        index = index.expand(pick.shape + tuple(fn.event_shape))
        quantiles = quantiles.expand(pick.shape[:-1] + quantiles.shape[-1 - event :])
        return quantiles.gather(-1 - event, index).squeeze(-1 - event)
    if isinstance(fn, Independent):
        return _icdf(fn.base_dist, u.reshape(u.shape[:-1] + tuple(fn.event_shape)))
    if len(fn.event_shape) == 0:
        return _icdf(fn, u.squeeze(-1))
    raise NotImplementedError


def _icdf(fn: Any, u: Tensor) -> Tensor:
    """Quantiles of a law of numbers; torch lacks some, which scipy has."""
    if isinstance(fn, StudentT):
        return fn.loc + fn.scale * _special(stdtrit, fn.df, u)
    if isinstance(fn, Gamma):
        return _special(gammaincinv, fn.concentration, u) / fn.rate
    return fn.icdf(u)


def _special(function: Callable[..., Any], parameter: Tensor, u: Tensor) -> Tensor:
    """A function of scipy at a parameter and points, broadcast."""
    values = function(parameter.detach().cpu().numpy(), u.cpu().numpy())
    return torch.as_tensor(values).to(u)


class _Joints:
    """Joint laws of masked tokens, for all states with the same open positions at once.

    Args:
        model: a step program.
        process: its forward process.
        base: a row ``(D,)`` that holds the tokens which never change.
        num_draws: points over which a continuous latent is integrated at a state; fewer where
            there are many states.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        process: MaskingProcess,
        base: Tensor,
        num_draws: int,
        seed: int,
        args: tuple[Any, ...],
    ) -> None:
        self.model = model
        self.process = process
        self.base = base
        self.args = args
        self.num_draws = num_draws
        self.seed = seed
        self.continuous: bool | None = None  # whether there is a latent to integrate

    def _points(self, num_states: int) -> Tensor:
        if not self.continuous:
            return self.base.new_zeros((1, 0), dtype=torch.double)
        number = max(_LEAST_DRAWS, int(self.num_draws / num_states**0.5))
        number = 2 ** max(0, (number - 1).bit_length())
        engine = SobolEngine(_SOBOL_COLUMNS, scramble=True, seed=self.seed)
        return engine.draw(number, dtype=torch.double).to(self.base.device)

    def __call__(self, visible: list[int], masked: list[int], t: float) -> Tensor:
        """The joint of every state, rows in lexicographic order.

        ``(K ** len(visible), K ** len(masked))`` in double precision.
        """
        vocab, device = self.process.vocab_size, self.base.device
        num_states = vocab ** len(visible)
        x = self.base.repeat(num_states, 1)
        x[:, masked] = self.process.mask_id
        if visible:
            grids = [torch.arange(vocab, device=device)] * len(visible)
            x[:, visible] = torch.cartesian_prod(*grids).reshape(num_states, len(visible))
        if self.continuous is None:
            _, latents = self._run(x[:1], self.base.new_zeros((1, 0), dtype=torch.double), t)
            self.continuous = any(site.enum_dim is None for site in latents)
        points = self._points(num_states)
        width = self.process.length * vocab + 256
        z_chunk = max(1, min(len(points), _CHUNK // width))
        x_chunk = max(1, _CHUNK // (width * z_chunk))
        pieces: list[Tensor] = []
        for rows in x.split(x_chunk):
            total = torch.zeros((), dtype=torch.double, device=device)
            for piece in points.split(z_chunk):
                total = total + self._partial(rows, piece, masked, t)
            pieces.append(total / len(points))
        joint = torch.cat(pieces)
        return joint / joint.sum(-1, keepdim=True)

    def _run(self, x: Tensor, points: Tensor, t: float) -> tuple[Tensor, list[Site]]:
        """Logits ``(..., D, K)`` of the states ``x (n, D)`` at latents placed at the points, and
        the latent sites.
        """
        is_masked = x == self.process.mask_id
        times = torch.full((len(x),), t, device=x.device)
        batch = MaskedBatch(x, times, is_masked, is_masked)
        with _Integrator(points) as run, pyro.plate(PARTICLES, len(points), dim=-2):
            self.model(batch, *self.args)
        if run.logits is None:
            raise ValueError(f"the model has no site 'x_0'; it has {sorted(run.sites)}")
        latents = [s for name, s in run.sites.items() if name != "x_0" and not s.observed]
        plate = data_plate(run.sites["x_0"])
        for site in latents:
            if not is_row_site(site, plate, len(x)):
                raise ValueError(
                    f"the latent {site.name!r} stands outside the data plate: the sampler draws "
                    "it once for all rows and steps, so that p_T is no law of one row; condition "
                    "it"
                )
        return run.logits, latents

    def _partial(self, x: Tensor, points: Tensor, masked: list[int], t: float) -> Tensor:
        """Sum over the given points of the weighted products, ``(n, K ** m)``."""
        logits, latents = self._run(x, points, t)
        mu = torch.softmax(logits[..., masked, :].double(), -1)
        log_weight = mu.new_zeros((1, 1))
        for site in latents:
            if site.enum_dim is not None:
                log_weight = log_weight + site.log_prob()
        shape = torch.broadcast_shapes(mu.shape[:-2], log_weight.shape, (len(points), len(x)))
        mu = mu.expand(shape + mu.shape[-2:]).reshape(-1, *mu.shape[-3:])
        weight = log_weight.exp().expand(shape).reshape(-1, len(x), 1)
        mu = mu.transpose(0, 1)  # (n, Z, m, K)
        half = (len(masked) + 1) // 2
        left, right = weight.transpose(0, 1), mu.new_ones((*mu.shape[:2], 1))
        for j in range(len(masked)):
            side = left if j < half else right
            side = (side.unsqueeze(-1) * mu[:, :, j].unsqueeze(-2)).flatten(-2)
            left, right = (side, right) if j < half else (left, side)
        return (left.transpose(1, 2) @ right).flatten(1)


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
    time_grid: Tensor | None = None,
    x_start: Tensor | None = None,
    t_start: float | None = None,
    num_draws: int = 2**14,
    seed: int = 0,
    max_states: int = 2**20,
    args: tuple[Any, ...] = (),
) -> Tensor:
    """The law ``p_T`` of the T-step sampler over all outcomes, with fresh latents.

    Args:
        model: a step program.
        process: its forward process.
        num_steps: ``T``, steps of equal length.
        time_grid: a grid of your own, ``(T + 1,)``.
        x_start: one partly observed row ``(D,)`` to start from, as in :func:`vadd_pyro.sample`.
        t_start: time at which it enters; by default where ``alpha(t_start)`` is its observed
            share.
        num_draws: points per state over which continuous latents are integrated; divided by the
            root of the number of states that share a mask, and at least 256. Discrete latents are
            summed and need none.
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
    everything = (start == process.mask_id).nonzero().flatten().tolist()
    _check_size(process, len(everything), len(grid) - 1, max_states)
    joints = _Joints(model, process, start, num_draws, seed, args)
    vocab = process.vocab_size
    laws: dict[tuple[int, ...], Tensor] = {
        tuple(everything): torch.ones((), dtype=torch.double, device=device)
    }
    with seeded(seed), evaluation(model):
        for i in range(len(grid) - 1, 0, -1):
            rho = float(process.schedule.rho(times[i - 1], times[i]))
            following: dict[tuple[int, ...], Tensor] = {}

            def add(
                key: tuple[int, ...], value: Tensor, into: dict[tuple[int, ...], Tensor]
            ) -> None:
                into[key] = into[key] + value if key in into else value

            for key, law in laws.items():
                masked = list(key)
                if not masked:
                    add((), law, following)
                    continue
                visible = _without(everything, masked)
                joint = joints(visible, masked, float(times[i])) * law.reshape(-1, 1)
                joint = joint.reshape((vocab,) * len(everything))
                for revealed in _subsets(masked):
                    kept = _without(masked, revealed)
                    probability = rho ** len(revealed) * (1 - rho) ** len(kept)
                    if probability > 0:
                        marginal = _marginals(joint, visible, masked, revealed)
                        add(tuple(kept), marginal * probability, following)
            laws = following
    result = torch.zeros((vocab,) * process.length, dtype=torch.double, device=device)
    result[
        tuple(slice(None) if j in everything else int(start[j]) for j in range(process.length))
    ] = laws[()]
    return result


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
    joints = _Joints(model, process, start, num_draws, seed, args)
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
