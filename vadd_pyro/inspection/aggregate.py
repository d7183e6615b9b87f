r"""Does the aggregate posterior fill the prior, or does it leave holes?

Over ``N`` rows the guide's posteriors make up

.. math::
    q(z) = \frac1N \sum_{n=1}^N r(z \mid x_n), \qquad p(z) = \frac1N \sum_{n=1}^N p(z \mid
    x_{t,n}),

which are the same where the model fits the data and the guide is exact. Elsewhere the sampler
draws latents that the decoder never met in training. Two figures say how far apart they are: how
well a classifier tells their draws apart (.5 is not at all), and the share of the prior's mass in
holes,

.. math::
    P_{z \sim p}\big[ q(z) < 0.1\, p(z) \big] .

``q`` is that of the ``N`` rows at hand: where posteriors are so sharp that few overlap (a mutual
information near ``log N``) there are gaps between any ``N`` of them, and holes say little.

References:
    Lopez-Paz and Oquab 2017 (arXiv 1610.06545); Hoffman and Johnson 2016, "ELBO surgery"; Rezende
    and Viola 2018 (arXiv 1810.00597) for holes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.nn.functional import one_hot

from vadd_pyro.inspection import scoring
from vadd_pyro.inspection.draws import LatentDraws, posterior_draws, prior_draws
from vadd_pyro.inspection.scoring import check_data
from vadd_pyro.process import MaskedBatch, check_size
from vadd_pyro.programs import evaluation
from vadd_pyro.quality.two_sample import TwoSampleTest, averaged_classifier, held_out_test
from vadd_pyro.recorder import Recorder, run
from vadd_pyro.sampling import seeded

__all__ = [
    "AggregatePosterior",
    "TwoSampleTest",
    "aggregate_codes",
    "aggregate_log_density",
    "aggregate_posterior",
    "prior_log_density",
    "sites_with_density",
    "two_sample_test",
]

_HOLE = 0.1  # of the prior's density
_PAIRS = 2**18  # pairs of draw and row at which a guide is asked at once
_CHUNK = 2**22  # logits held at once
_LOGITS = 2**13  # those of rows for each of which all codes are laid out
_PROBES = 4  # draws at which a prior is asked whether it looks at the state
_LEAST_ROWS = 20


class AggregatePosterior(NamedTuple):
    """The aggregate posterior of some rows against the prior in their states.

    Args:
        posterior: one draw of the guide for each row, ``(N, d)``.
        prior: one draw of the prior in each row's state, ``(N, d)``.
        names: what the columns are, such as ``"z[3]"``.
        accuracy, stderr, p_value: of a :class:`TwoSampleTest` between them.
        holes: share of the prior's mass where the aggregate posterior has less than a tenth of its
            density; None where the guide's density cannot be had at given latents.
        holes_stderr: its standard error over draws of the prior, for these rows; zero for codes
            that are summed out, whose share is exact.
    """

    posterior: Tensor
    prior: Tensor
    names: list[str]
    accuracy: float
    stderr: float
    p_value: float
    holes: float | None
    holes_stderr: float | None


def aggregate_posterior(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: MaskedBatch,
    *,
    num_prior_draws: int = 200,
    seed: int | None = None,
    max_plate_nesting: int = 1,
    args: tuple[Any, ...] = (),
) -> AggregatePosterior:
    """Compare the aggregate posterior of rows with the prior in their states.

    Args:
        model, guide: a step program and its guide, run in evaluation mode without gradients.
        batch: rows with data and a target each, at least 20: of one state, ``process.corrupt(x_0,
            1.0)``, or of many.
        num_prior_draws: draws of the prior at which holes are looked for. A prior that depends on
            the state costs a run of the model for each pair of draw and state.
        seed: seed of this call; None draws on torch's global state.
        max_plate_nesting: depth of the plates of the programs.
        args: further arguments of the programs, the same for all rows.

    Returns:
        :class:`AggregatePosterior`; without latents, an accuracy of .5 and no holes.

    Raises:
        ValueError: for a batch without data, of too few rows or with rows without a target, or a
        pair that does not fit.
    """
    check_size("num_prior_draws", num_prior_draws)
    check_data(batch)
    _check_rows(len(batch))
    options: dict[str, Any] = {"max_plate_nesting": max_plate_nesting, "args": args}
    with seeded(seed), evaluation(model, guide):
        drawn = posterior_draws(model, guide, batch, 1, **options)
        forward = prior_draws(model, batch, 1, **options)
        posterior, names = drawn.columns()
        prior, _ = forward.columns()
        if not names:
            return AggregatePosterior(posterior[0], prior[0], names, 0.5, 0.0, 1.0, 0.0, 0.0)
        test = two_sample_test(*_features(drawn, forward))
        holes: float | None = None
        error: float | None = None
        if drawn.exact:
            used, law = aggregate_codes(model, batch, **options)
            holes, error = float(law[used < _HOLE * law].sum()), 0.0
        elif own := sites_with_density(guide, batch[:1], args):
            rows = torch.randint(len(batch), (num_prior_draws,), device=batch.x_t.device)
            sites = prior_draws(model, batch[rows], 1, **options).sites
            values = {name: sites[name][0] for name in own}
            ratio = aggregate_log_density(guide, batch, values, **options)
            ratio = ratio - prior_log_density(model, batch, values, **options)
            holes = float((ratio < math.log(_HOLE)).double().mean())
            error = (holes * (1 - holes) / num_prior_draws) ** 0.5
    return AggregatePosterior(posterior[0], prior[0], names, *test, holes, error)


def _check_rows(num_rows: int) -> None:
    if num_rows < _LEAST_ROWS:
        raise ValueError(f"there are {num_rows} rows: telling laws apart needs {_LEAST_ROWS}")


def sites_with_density(guide: Any, batch: MaskedBatch, args: tuple[Any, ...]) -> list[str]:
    """A guide's sites, none if its density cannot be had at latents that it did not draw."""
    sites = run(guide, Recorder(), batch, *args).sites
    for site in sites.values():
        laws = (site.fn, getattr(site.fn, "base_dist", None))
        if site.auxiliary or site.observed or any(isinstance(fn, Delta) for fn in laws):
            return []
    return list(sites)


def aggregate_log_density(
    guide: Callable[..., Any],
    batch: MaskedBatch,
    values: Mapping[str, Tensor],
    *,
    max_plate_nesting: int = 1,
    args: tuple[Any, ...] = (),
) -> Tensor:
    """``log q(z)``, the guide's density at given latents averaged over rows.

    Args:
        guide: a guide, run in evaluation mode without gradients.
        batch: rows with data.
        values: latents by site, ``(S,)`` before their event.
        max_plate_nesting: depth of the plates of the program.
        args: further arguments of the program.

    Returns:
        ``(S,)`` nats.

    Raises:
        ValueError: for a guide whose density is given through auxiliary sites.
    """
    check_data(batch)
    size = max(1, _PAIRS // len(batch))
    options: dict[str, Any] = {"max_plate_nesting": max_plate_nesting, "args": args}
    pieces = []
    with evaluation(guide):
        for start in range(0, _number_of(values), size):
            held = _for_rows(values, start, size, len(batch))
            log_r = scoring.guide_log_density(guide, batch, held, **options).double()
            pieces.append(log_r.logsumexp(1) - math.log(len(batch)))
    return torch.cat(pieces)


def prior_log_density(
    model: Callable[..., Any],
    batch: MaskedBatch,
    values: Mapping[str, Tensor],
    *,
    max_plate_nesting: int = 1,
    args: tuple[Any, ...] = (),
) -> Tensor:
    """``log p(z)``, the prior's density at given latents averaged over the states of rows.

    Discrete sites without a value are summed out. States are run once each, and only one of them
    if the prior gives the same at all, at a few of the latents.

    Args:
        model: a step program, run in evaluation mode without gradients.
        batch: rows with data; the rest as in :func:`aggregate_log_density`.

    Returns:
        ``(S,)`` nats.

    Raises:
        ValueError: if a latent that cannot be summed out has no value.
    """
    check_data(batch)
    number = _number_of(values)
    states, counts = _states(batch)

    def at(start: int, size: int) -> Tensor:
        held = _for_rows(values, start, size, len(states))
        some = min(size, number - start)
        return _given(model, states, held, some, max_plate_nesting, args)[1].logsumexp(0)

    with evaluation(model):
        probes = at(0, _PROBES)
        if torch.allclose(probes, probes[:, :1].expand_as(probes), rtol=1e-5, atol=1e-5):
            states, counts = states[:1], counts.sum().reshape(1)
        weight = (counts.double() / counts.sum()).log()
        per_draw = states.x_t.shape[1] * (int(batch.x_t.max()) + 1) * len(states)
        size = max(1, _CHUNK // per_draw)
        pieces = [(at(start, size) + weight).logsumexp(1) for start in range(0, number, size)]
    return torch.cat(pieces)


def _number_of(values: Mapping[str, Tensor]) -> int:
    """How many latents are given."""
    numbers = {len(value) for value in values.values()}
    if len(numbers) != 1:
        raise ValueError(f"values must give every site one number of latents, got {numbers}")
    return numbers.pop()


def _for_rows(values: Mapping[str, Tensor], start: int, size: int, rows: int) -> dict[str, Tensor]:
    """Some of the latents, each for every row: ``(S, B) + event``."""
    return {
        name: value[start : start + size, None].expand(-1, rows, *value.shape[1:])
        for name, value in values.items()
    }


def _states(batch: MaskedBatch) -> tuple[MaskedBatch, Tensor]:
    """One row of every state, and how many rows have it, ``(U,)``."""
    keys = torch.cat([batch.x_t.double(), batch.t.double().unsqueeze(-1)], -1)
    _, inverse, counts = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
    first = inverse.argsort(stable=True)[counts.cumsum(0) - counts]
    return batch[first], counts


def _given(
    model: Any,
    rows: MaskedBatch,
    values: Mapping[str, Tensor],
    number: int,
    row_plates: int,
    args: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """``log p(x_S | x_t, z)`` and ``log p(z | x_t)`` at latents ``(S, U) + event``, the rest laid
    out: ``(supports, S, U)`` in double precision.
    """
    recorder = scoring.Replay(values, lambda msg: True, -2 - row_plates)
    generated = run(model, recorder, rows, *args, inside=scoring.particles(number, row_plates))
    for name, site in generated.sites.items():
        if not site.observed and name not in values and site.enum_dim is None:
            raise ValueError(
                f"values give {sorted(values)}, not the model's latent {name!r}, which cannot be "
                "summed out"
            )
    result = scoring.scored(Recorder(), generated, rows, row_plates)
    shape = (len(result.log_prior), number, len(rows))
    return result.log_likelihood.double().expand(shape), result.log_prior.double().expand(shape)


def aggregate_codes(
    model: Callable[..., Any],
    batch: MaskedBatch,
    *,
    max_plate_nesting: int = 1,
    args: tuple[Any, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Exact aggregate posterior and prior of codes that are summed out.

    Args:
        model: a step program without other latents, run in evaluation mode without gradients.
        batch: rows with data; the rest as in :func:`aggregate_log_density`.

    Returns:
        Probabilities of all combinations of codes, ``(C,)`` each in double precision, those of
        the first site running fastest.

    Raises:
        ValueError: if the model has a latent that cannot be summed out.
    """
    check_data(batch)
    posterior = prior = torch.zeros((), dtype=torch.double, device=batch.x_t.device)
    size = max(1, _LOGITS // (batch.x_t.shape[1] * (int(batch.x_t.max()) + 1)))
    with evaluation(model):
        for rows in batch.split(size):
            log_x, log_z = _given(model, rows, {}, 1, max_plate_nesting, args)
            posterior = posterior + (log_x + log_z)[:, 0].softmax(0).sum(1)
            prior = prior + log_z[:, 0].exp().sum(1)
    return posterior / len(batch), prior / len(batch)


def _features(first: LatentDraws, second: LatentDraws) -> tuple[Tensor, Tensor]:
    """Columns that a classifier sees, ``(N, d)`` each: numbers as they are, codes as one-hot."""
    columns: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, value in first.sites.items():
        pair = [v[0].reshape(v.shape[1], -1) for v in (value, second.sites[name])]
        if not value.is_floating_point():
            most = max(int(v.max()) for v in pair)
            pair = [one_hot(v.long(), most + 1).flatten(1) for v in pair]
        for column, v in zip(columns, pair, strict=True):
            column.append(v.to(torch.get_default_dtype()))
    return torch.cat(columns[0], 1), torch.cat(columns[1], 1)


def two_sample_test(first: Tensor, second: Tensor, *, seed: int | None = None) -> TwoSampleTest:
    """Train a classifier on either half of two samples, and see how well it tells the other apart.

    The classifier averages boosted trees and a regularised logistic regression on the columns,
    their squares and products.

    Args:
        first, second: ``(N, d)`` each; rows of the same index are held out together.
        seed: seed of this call; None draws on torch's global state.

    Raises:
        ValueError: for samples of different shapes or too few rows.
    """
    shapes = tuple(first.shape), tuple(second.shape)
    if first.dim() != 2 or shapes[0] != shapes[1]:
        raise ValueError(f"first and second must have one shape (N, d), got {shapes}")
    _check_rows(len(first))
    x = torch.stack([first, second]).double().cpu().numpy()
    with seeded(seed):
        half = torch.randperm(len(first)).numpy() % 2
        state = int(torch.randint(2**31, ()))
    return held_out_test(x, half, averaged_classifier(x.shape[-1], state))
