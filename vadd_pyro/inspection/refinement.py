r"""A guide refined for single rows: the best member of its family for each.

The whole network of a copy is trained on one row by its bound

.. math::
    \mathcal L_b(r) = E_r[\log p(x_S, z \mid x_t) - \log r(z)],

with many draws, the model fixed. A network that has one row to look at can give it any member of
its family, so that the copy is what a guide without amortisation would be, whatever the family: a
flow, several sites, codes by the score function.

References:
    Cremer et al. 2018 (arXiv 1801.03558); Polyak and Juditsky 1992 for the average of iterates.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from vadd_pyro.densities import score
from vadd_pyro.inspection.draws import posterior_draws
from vadd_pyro.inspection.scoring import check_data, particles
from vadd_pyro.process import MaskedBatch, check_size
from vadd_pyro.programs import evaluation, modules_of
from vadd_pyro.recorder import Recorder, run
from vadd_pyro.sampling import seeded

__all__ = ["refine_guide"]

_AVERAGED = 1 / 3  # last share of the iterates
_KEPT = (0.25, 0.5, 1.0)  # when iterates are looked at: codes may settle on one and never return
_LAST_STEP = 0.02  # of the first one
_CHECK_DRAWS = 2000
_SURE = 2.0  # standard errors
_LONGEST_GRADIENT = 10.0


def refine_guide(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: MaskedBatch,
    *,
    num_iterations: int = 250,
    num_particles: int = 32,
    learning_rate: float = 0.01,
    seed: int | None = None,
    max_plate_nesting: int = 1,
    args: tuple[Any, ...] = (),
) -> list[Callable[..., Any]]:
    """A guide for each row, trained on that row alone.

    Adam with a decaying step. Of three iterates on the way and the average of the last third, the
    one with the highest bound on the same 2,000 draws is taken, if that is above the start's by
    two standard errors. Else the guide is kept as it was: gains of some thousandths of a nat are
    not seen.

    Args:
        model, guide: a step program and its guide; both are left as they are. A guide that is a
            plain function, or has a ``PyroModule`` in it, must not share parameters with the
            model.
        batch: rows with data, each with a target.
        num_iterations: updates for each row.
        num_particles: draws of each update, at least 2.
        learning_rate: Adam's first step size.
        seed: seed of this call, which leaves torch's random state as it was; None draws on it.
        max_plate_nesting: depth of the plates of the programs.
        args: further arguments of the programs, the same for all rows.

    Returns:
        ``B`` guides, to be run on their rows (one of them at a time), in evaluation mode; those of
        a guide that has nothing to train are the guide itself.

    Raises:
        ValueError: for a batch without data or with rows without a target, a pair that does not
        fit, or shared parameters.
    """
    check_size("num_iterations", num_iterations)
    check_size("num_particles", num_particles, least=2)
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be positive and finite, got {learning_rate!r}")
    check_data(batch)
    options: dict[str, Any] = {"max_plate_nesting": max_plate_nesting, "args": args}
    with seeded(seed), evaluation(model, guide):
        return [
            _refined(model, guide, row, num_iterations, num_particles, learning_rate, options)
            for row in batch.split(1)
        ]


def _refined(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    row: MaskedBatch,
    num_iterations: int,
    num_particles: int,
    learning_rate: float,
    options: dict[str, Any],
) -> Callable[..., Any]:
    """The guide refined for one row."""
    # Refuses what cannot be scored, and lets programs make the parameters of their first run.
    posterior_draws(model, guide, row, 1, **options)
    own, parameters = _trainable(model, guide, row, options["args"])
    start = [parameter.detach().clone() for parameter in parameters]
    check_seed = int(torch.randint(2**31, ()))

    def log_weights(values: list[Tensor]) -> Tensor:
        _fill(parameters, values)
        draws = posterior_draws(model, own, row, _CHECK_DRAWS, seed=check_seed, **options)
        assert draws.log_weights is not None
        return draws.log_weights[:, 0].double()

    best, best_gain = start, 0.0
    with _holding(parameters, start):
        found = _trained(
            model, own, parameters, row, num_iterations, num_particles, learning_rate, options
        )
        if not found:
            return guide
        before = log_weights(start)
        for values in found:
            gain = log_weights(values) - before
            mean, error = float(gain.mean()), float(gain.std()) / math.sqrt(_CHECK_DRAWS)
            if mean > max(best_gain, _SURE * error):
                best, best_gain = values, mean
    if own is guide:
        return _Held(guide, parameters, best)
    _fill(parameters, best)
    return own


def _trained(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    parameters: list[Tensor],
    row: MaskedBatch,
    num_iterations: int,
    num_particles: int,
    learning_rate: float,
    options: dict[str, Any],
) -> list[list[Tensor]]:
    """Some iterates and the average of the last third; none if there is nothing to train."""
    if not parameters:
        return []
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    averaged = max(1, round(_AVERAGED * num_iterations))
    mean = [torch.zeros_like(parameter) for parameter in parameters]
    kept = {math.ceil(num_iterations * share) for share in _KEPT}
    found: list[list[Tensor]] = []
    for i in range(num_iterations):
        decay = 0.5 * (1 + math.cos(math.pi * i / num_iterations))
        optimizer.param_groups[0]["lr"] = learning_rate * (_LAST_STEP + (1 - _LAST_STEP) * decay)
        with torch.enable_grad():
            loss = -_bound(model, guide, row, num_particles, options)
        if not loss.requires_grad:
            return []
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        length = torch.nn.utils.clip_grad_norm_(parameters, _LONGEST_GRADIENT)
        if bool(length.isfinite()):
            optimizer.step()
        if i + 1 in kept:
            found.append([parameter.detach().clone() for parameter in parameters])
        if i >= num_iterations - averaged:
            for total, parameter in zip(mean, parameters, strict=True):
                total += parameter.detach() / averaged
    return [*found, mean]


def _bound(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    row: MaskedBatch,
    num_particles: int,
    options: dict[str, Any],
) -> Tensor:
    """The bound of a row, differentiable for the guide, draws by the score function too."""
    row_plates, args = options["max_plate_nesting"], options["args"]
    first_dim = -2 - row_plates

    def asks(msg: dict[str, Any]) -> bool:
        return bool(msg["infer"]) and msg["infer"].get("enumerate") is not None

    inside = particles(num_particles, row_plates)
    inferred = run(guide, Recorder(None, asks, first_dim), row, *args, inside=inside)
    replay = Recorder(inferred.latent_values(), lambda msg: True, inferred.next_dim)
    inside = particles(num_particles, row_plates)
    terms = score(
        inferred,
        run(model, replay, row, *args, inside=inside),
        active=row.target.any(-1),
        weight=None,
        row_plates=row_plates,
        num_particles=num_particles,
        vectorized=True,
    )
    total = terms.rows.sum()
    return total if terms.surrogate is None else total + terms.surrogate


# -------------------------------------------------------------------------- parameters


class _Detached(Messenger):
    """Gives every site a law of its own, which no later change of a parameter reaches."""

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample":
            msg["fn"] = copy.deepcopy(msg["fn"])


class _Held:
    """A guide run with values of its own in parameters that belong to the original.

    It cannot be trained: gradients would reach the original.
    """

    def __init__(
        self, guide: Callable[..., Any], parameters: list[Tensor], values: list[Tensor]
    ) -> None:
        self.__wrapped__ = guide
        self.parameters = parameters
        self.values = values

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), _holding(self.parameters, self.values), _Detached():
            return self.__wrapped__(*args, **kwargs)


@contextmanager
def _holding(parameters: list[Tensor], values: list[Tensor]) -> Iterator[None]:
    """Parameters with other values for a while, and then as they were, gradients too."""
    before = [parameter.detach().clone() for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters]
    _fill(parameters, values)
    try:
        yield
    finally:
        _fill(parameters, before)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def _fill(parameters: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _trainable(
    model: Callable[..., Any], guide: Callable[..., Any], row: MaskedBatch, args: tuple[Any, ...]
) -> tuple[Callable[..., Any], list[Tensor]]:
    """The guide to train and its parameters: a copy where that can be had, else the guide itself,
    whose values are to be put back.

    A PyroModule's copy would go on reading the original's entries in Pyro's parameter store, and
    the parameters of a plain function cannot be copied at all.
    """
    if isinstance(guide, nn.Module) and not any(
        isinstance(part, PyroModule) for part in guide.modules()
    ):
        twin = copy.deepcopy(guide)
        return twin, [p for p in twin.parameters() if p.requires_grad]
    parameters = _parameters(guide, row, args)
    shared = set(parameters) & set(_parameters(model, row, args))
    if shared:
        raise ValueError(
            f"guide shares {len(shared)} parameters with the model and cannot be copied, so that "
            "refining it would change the model: expected a guide that is a torch.nn.Module "
            "without PyroModule parts, or one with parameters of its own"
        )
    return guide, list(parameters.values())


def _parameters(
    program: Callable[..., Any], row: MaskedBatch, args: tuple[Any, ...]
) -> dict[int, Tensor]:
    """Parameters that a program holds or asks Pyro for, unconstrained, by identity."""
    found: list[Any] = [p for module in modules_of(program) for p in module.parameters()]
    store = pyro.get_param_store()
    with store.scope(store.get_state()):  # modules may announce themselves to a trace
        nodes = poutine.trace(program).get_trace(row, *args).nodes.values()
        values = [node["value"] for node in nodes if node["type"] == "param"]
        found += [v.unconstrained() if hasattr(v, "unconstrained") else v for v in values]
    return {id(p): p for p in found if p.requires_grad and p.is_leaf}
