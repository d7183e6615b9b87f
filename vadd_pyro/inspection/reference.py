r"""A reference to hold a guide against: draws from the posterior itself.

.. math::
    p(z \mid x_S, x_t) \propto p(x_S \mid x_t, z)\, p(z \mid x_t)

for chosen rows. Discrete sites are summed out exactly and then drawn exactly, so that a model with
none but those has an exact reference. Continuous ones come from the No-U-Turn sampler, in
unconstrained coordinates :math:`u = T^{-1}(z)` with the potential

.. math::
    U(u) = -\sum_{b, c} \Big[ \log p(x_S, T(u_{bc}) \mid x_t)_b + \log \Big| \frac{d T}{d u}
    \Big|_{bc} \Big],

over rows ``b`` and chains ``c`` at once: they are independent under it, so all of them move in one
trajectory, at the price of one network call. Sixteen rows of four chains mixed as well as one row
alone and took two to three times as long as that one; sixty-four mixed worse, since one step size
and one length of trajectory must do for all. So sixteen move together.

Directions on a sphere, which no smooth bijection reaches, move as :math:`u = \rho z` in space,
with an independent radius :math:`\rho \sim \chi_{d + k}` that is forgotten. With ``k = 0`` that
is the normal behind a projected normal (Pyro's ``ProjectedNormalReparam``), which comes near the
origin, where directions turn on the spot: on a circle it took four times the steps.

References:
    Hoffman and Gelman 2014, "The No-U-Turn Sampler" (arXiv 1111.4246); Vehtari et al. 2021 (arXiv
    1903.08008) on split R-hat and effective sample sizes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions import constraints
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size, split_gelman_rubin
from torch import Tensor
from torch.distributions import biject_to

from vadd_pyro.distributions import draw_categorical
from vadd_pyro.inspection.draws import LatentDraws, posterior_draws
from vadd_pyro.inspection.scoring import check_data, scored
from vadd_pyro.process import MaskedBatch, check_size
from vadd_pyro.programs import evaluation
from vadd_pyro.recorder import Recorder, Site, run
from vadd_pyro.sampling import seeded

__all__ = ["ReferencePosterior", "effective_number", "reference_posterior"]

_ROWS = 16  # moved together
_CANDIDATES = 64  # for the starts of a row
_RADIUS = 4.0  # extra degrees of freedom of the radius of a direction
_MAX_TREE_DEPTH = 8  # 255 steps: longer trajectories help no posterior that this sampler can do


class ReferencePosterior(NamedTuple):
    """Draws from the posterior of some rows, and how far they can be trusted.

    Args:
        draws: ``S = num_chains * num_draws`` draws of each row, those of a chain one after the
            other, so that ``(S, B)`` reshapes to ``(num_chains, num_draws, B)``. ``log_weights``
            is None for draws of the sampler, which know no evidence.
        r_hat: largest split R-hat of a row's continuous coordinates, ``(B,)``; near 1 where the
            chains agree, above 1.05 do not trust that row. Ones if ``draws.exact``.
        effective_size: smallest effective number of draws of a row's continuous coordinates, at
            most ``S``, ``(B,)``; ``S`` if ``draws.exact``.
        num_divergences: draws whose trajectory went astray; those of rows moved together are
            counted for all of them.
        num_chains: how many chains each row has.
    """

    draws: LatentDraws
    r_hat: Tensor
    effective_size: Tensor
    num_divergences: int
    num_chains: int


def reference_posterior(
    model: Callable[..., Any],
    batch: MaskedBatch,
    num_draws: int = 500,
    *,
    guide: Callable[..., Any] | None = None,
    num_warmup: int = 300,
    num_chains: int = 4,
    seed: int | None = None,
    max_plate_nesting: int = 1,
    args: tuple[Any, ...] = (),
) -> ReferencePosterior:
    """Draws from the exact posterior of rows: enumeration, or Pyro's NUTS.

    Chains start at draws of the prior, or of a guide, chosen among many in proportion to their
    importance weights.

    Args:
        model: a step program, run in evaluation mode; no gradient reaches its parameters.
        batch: rows with data, each with a target; dozens rather than thousands.
        num_draws: draws of each chain, at least 4.
        guide: where chains start; without one the reference knows nothing of the guide.
        num_warmup: steps before, in which step size and scales are adapted.
        num_chains: chains of each row.
        seed: seed of this call, which leaves torch's random state as it was; None draws on it.
        max_plate_nesting: depth of the plates of the program.
        args: further arguments of the program, the same for all rows.

    Returns:
        :class:`ReferencePosterior`.

    Raises:
        ValueError: for a batch without data or with rows without a target, and for latents whose
        support can neither be enumerated nor be reached from unconstrained coordinates.
    """
    check_size("num_draws", num_draws, least=4)
    check_size("num_warmup", num_warmup)
    check_size("num_chains", num_chains)
    check_data(batch)
    if not bool(batch.target.any(-1).all()):
        raise ValueError("batch has rows without a target: expected batch[batch.target.any(-1)]")
    with seeded(seed), evaluation(model, guide):
        program = _Program(model, max_plate_nesting, args, {})
        for site in program.run(Recorder(), batch[:1]).sites.values():
            if not site.observed and not _is_discrete(site):
                program.inner[site.name] = len(site.fn.batch_shape) - 1
        if not program.inner:
            draws = posterior_draws(
                model,
                lambda batch, *args: None,
                batch,
                num_draws * num_chains,
                max_plate_nesting=max_plate_nesting,
                args=args,
            )
            ones = torch.ones(len(batch), device=batch.x_t.device)
            return ReferencePosterior(draws, ones, ones * draws.num_draws, 0, num_chains)
        start = _start(program, guide, batch, num_chains)
        pieces, r_hat, size, divergences = [], [], [], 0
        for first_row in range(0, len(batch), _ROWS):
            rows = slice(first_row, first_row + _ROWS)
            values = {name: value[:, rows].flatten(0, 1) for name, value in start.items()}
            free, astray = _moved(program, batch[rows], values, num_draws, num_warmup, num_chains)
            divergences += astray
            for row in range(first_row, min(first_row + _ROWS, len(batch))):
                own = {name: value[:, row - first_row] for name, value in free.items()}
                piece = _finished(program, batch[row : row + 1], own)
                pieces.append(piece)
                x = torch.cat(
                    [piece[0][name].reshape(len(piece[1]), -1) for name in program.inner], -1
                )
                x = x.double().unflatten(0, (num_chains, num_draws))
                r_hat.append(split_gelman_rubin(x).max())
                size.append(effective_number(x).min())
    sites = {name: torch.stack([p[0][name] for p in pieces], 1) for name in pieces[0][0]}
    draws = LatentDraws(
        sites,
        batch,
        log_likelihood=torch.stack([p[1] for p in pieces], 1),
        log_prior=torch.stack([p[2] for p in pieces], 1),
    )
    checks = [torch.stack(v).to(torch.get_default_dtype()) for v in (r_hat, size)]
    return ReferencePosterior(draws, checks[0], checks[1], divergences, num_chains)


def effective_number(values: Tensor) -> Tensor:
    """Effective number of draws ``(chains, draws, ...)``, at most their number.

    Draws that alternate tell more of a mean than independent ones, so much so in short chains that
    the estimate turns negative.
    """
    number = float(values.shape[0] * values.shape[1])
    size = effective_sample_size(values)
    return torch.where(size > 0, size, number).clamp(max=number)


class _Program(NamedTuple):
    """A model with what it is always called with, and its continuous sites with the number of
    plates that each stands in beside the data plate.
    """

    model: Callable[..., Any]
    row_plates: int
    args: tuple[Any, ...]
    inner: dict[str, int]

    def run(self, recorder: Any, batch: MaskedBatch) -> Any:
        return run(self.model, recorder, batch, *self.args)

    @property
    def first_dim(self) -> int:
        return -2 - self.row_plates


class _Free(Recorder):
    """Carries unconstrained values to the supports of their sites as the program meets them, and
    sums out what is discrete.

    Supports may so depend on the state and on sites before.

    Args:
        free: unconstrained values by site, in the shape of the run.
        replay: values of other sites, as they are.
        first_dim: the first batch dimension free for supports.
    """

    def __init__(
        self, free: Mapping[str, Tensor], replay: Mapping[str, Tensor], first_dim: int
    ) -> None:
        super().__init__(replay, lambda msg: True, first_dim)
        self.free = free
        self.log_jacobian: Tensor | float = 0.0

    def _process_message(self, msg: Any) -> None:
        if msg["type"] != "sample" or msg["is_observed"] or msg["name"] not in self.free:
            super()._process_message(msg)
            return
        free = self.free[msg["name"]]
        transform = _bijection(msg["fn"])
        if transform is None:
            square = free.square().sum(-1, keepdim=True)
            msg["value"] = free * square.rsqrt()
            log_jacobian = 0.5 * (_RADIUS * square.log() - square)
        else:
            msg["value"] = transform(free)
            log_jacobian = transform.log_abs_det_jacobian(free, msg["value"])
        msg["done"] = True
        self.log_jacobian = self.log_jacobian + log_jacobian.sum()


def _bijection(fn: Any) -> Any:
    """The map from unconstrained values to a law's support; None for directions on a sphere."""
    support = fn.support
    if type(support).__name__ == "MixtureSameFamilyConstraint":  # which torch has no map to
        support = support.base_constraint
    return None if support is constraints.sphere else biject_to(support)


def _is_discrete(site: Site) -> bool:
    """Whether a latent is to be summed out.

    Raises:
        ValueError: where it can be neither that nor moved.
    """
    if getattr(site.fn, "has_enumerate_support", False):
        return True
    try:
        _bijection(site.fn)
        movable = not site.fn.support.is_discrete
    except NotImplementedError:
        movable = False
    if not movable:
        raise ValueError(
            f"site {site.name!r} has the law {site.fn} with support {site.fn.support}: expected "
            "latents that can be enumerated, or continuous ones with a bijection from "
            "unconstrained coordinates (torch.distributions.biject_to)"
        )
    return False


def _repeated(batch: MaskedBatch, times: int) -> MaskedBatch:
    return batch[torch.arange(len(batch), device=batch.x_t.device).repeat(times)]


# ------------------------------------------------------------------------------ starts


def _start(
    program: _Program,
    guide: Callable[..., Any] | None,
    batch: MaskedBatch,
    num_chains: int,
) -> dict[str, Tensor]:
    """Values of the continuous sites, ``(chains, B) + inner + event``."""
    number = max(_CANDIDATES, 4 * num_chains)
    if guide is not None:
        options: dict[str, Any] = {"max_plate_nesting": program.row_plates, "args": program.args}
        drawn = posterior_draws(program.model, guide, batch, number, **options)
        log_weights, values = drawn.log_weights, drawn.sites
    else:
        rows = _repeated(batch, number)
        recorder = program.run(Recorder(), rows)
        result = scored(Recorder(), recorder, rows, program.row_plates)
        log_weights = result.log_likelihood.reshape(number, len(batch))
        values = {}
        for name, dim in program.inner.items():
            value = recorder.sites[name].value.movedim(dim, 0)
            values[name] = value.unflatten(0, (number, len(batch)))
    assert log_weights is not None
    # Without replacement (Gumbel's top k), so that no two chains start at the same point.
    noise = -torch.empty_like(log_weights).exponential_().log()
    best = (log_weights.nan_to_num(-math.inf) + noise).topk(num_chains, 0).indices
    row = torch.arange(len(batch), device=best.device)
    return {name: values[name][best, row] for name in program.inner}


# ------------------------------------------------------------------------------ moving


def _moved(
    program: _Program,
    batch: MaskedBatch,
    start: Mapping[str, Tensor],
    num_draws: int,
    num_warmup: int,
    num_chains: int,
) -> tuple[dict[str, Tensor], int]:
    """Unconstrained draws ``(chains, B, draws) + inner + event`` by site, and divergences.

    Args:
        start: values ``(chains * B,) + inner + event``.
    """
    rows = _repeated(batch, num_chains)
    inner = program.inner
    placed = {name: value.movedim(0, inner[name]) for name, value in start.items()}
    sites = program.run(_Free({}, placed, program.first_dim), rows).sites
    initial = {}
    for name, value in placed.items():
        transform = _bijection(sites[name].fn)
        if transform is None:
            initial[name] = value * math.sqrt(value.shape[-1] + _RADIUS)
        else:
            initial[name] = transform.inv(value)

    def potential(free: dict[str, Tensor]) -> Tensor:
        with torch.enable_grad():
            recorder = program.run(_Free(free, {}, program.first_dim), rows)
            result = scored(Recorder(), recorder, rows, program.row_plates)
            log_joint = (result.log_likelihood + result.log_prior).logsumexp(0)
            return -log_joint.sum() - recorder.log_jacobian

    astray = 0

    def count(kernel: Any, params: Any, stage: str, i: int) -> None:
        nonlocal astray
        if stage.startswith("Sample"):
            astray = len(kernel.diagnostics()["divergences"])

    sampler = MCMC(
        NUTS(potential_fn=potential, max_tree_depth=_MAX_TREE_DEPTH),
        num_samples=num_draws,
        warmup_steps=num_warmup,
        initial_params={name: value.contiguous() for name, value in initial.items()},
        hook_fn=count,
        disable_progbar=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler.run()
    free = {}
    for name, value in sampler.get_samples().items():
        by_row = value.movedim(1 + inner[name], 0)
        free[name] = by_row.unflatten(0, (num_chains, len(batch)))
    return free, astray


def _finished(
    program: _Program, row: MaskedBatch, free: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """All sites of the draws of one row, ``(S,) + inner + event``, discrete ones drawn given the
    others, with ``log p(x_S | x_t, z)`` and ``log p(z | x_t)``, each ``(S,)``.

    Args:
        free: ``(chains, draws) + inner + event``.
    """
    flat = {name: value.flatten(0, 1) for name, value in free.items()}
    number = len(next(iter(flat.values())))
    rows = _repeated(row, number)
    inner = program.inner
    placed = {name: value.movedim(0, inner[name]) for name, value in flat.items()}
    with pyro.validation_enabled(False):  # rounding may put a value on the edge of its support
        recorder = program.run(_Free(placed, {}, program.first_dim), rows)
        result = scored(Recorder(), recorder, rows, program.row_plates)
    log_likelihood, log_prior = result.log_likelihood[:, 0], result.log_prior[:, 0]
    logits = (log_likelihood + log_prior).T.double()
    pick = draw_categorical(logits) if logits.shape[1] > 1 else logits[:, 0].long() * 0
    index = pick.unsqueeze(0)
    sites = {name: recorder.sites[name].value.movedim(inner[name], 0) for name in flat}
    for site in result.summed:  # supports of later sites stand further left: the first is fastest
        support = site.value.reshape(len(site.value), *site.fn.event_shape)
        sites[site.name] = support[pick % len(support)]
        pick = pick // len(support)
    order = [name for name, site in recorder.sites.items() if not site.observed]
    return (
        {name: sites[name] for name in order},
        log_likelihood.gather(0, index)[0],
        log_prior.gather(0, index)[0],
    )
