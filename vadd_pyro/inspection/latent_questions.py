"""Questions about the latent: is it used, what does it couple and encode, is the prior filled?"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from vadd_pyro import plotting
from vadd_pyro.elbo import MaskedDiffusionELBO
from vadd_pyro.inspection import verdicts
from vadd_pyro.inspection.aggregate import aggregate_codes, aggregate_posterior
from vadd_pyro.inspection.draws import codes
from vadd_pyro.inspection.over_time import (
    statistics_over_time,
    total_correlation,
    true_total_correlation,
)
from vadd_pyro.inspection.page import Section
from vadd_pyro.inspection.survey import Survey
from vadd_pyro.inspection.walks import latent_path, token_probabilities
from vadd_pyro.monitor import LatentStatistics, latent_statistics

__all__ = ["aggregate", "coupling", "meaning", "usage"]

_TIMES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
_MOST_CODES = 256
_MOST_POSITIONS = 16  # of a row that is drawn token by token
_PANELS = 6
_PAIR_TOKENS = 400  # largest vocabulary whose laws over pairs are drawn


def usage(s: Survey) -> Section:
    """Is the latent used?"""
    title = "Is the latent used?"
    if not s.has_latent:
        return Section(title, [verdicts.latent_verdict(None)], [])
    over_time = statistics_over_time(
        s.model, s.guide, s.process, s.x_0, _TIMES, seed=s.seed, **s.options
    )
    with s.figure("latent_over_time.png", 2) as axes:
        plotting.kl_over_time(
            over_time.times, over_time.kl_per_dimension, over_time.dimension_names, axes[0]
        )
        plotting.units_over_time(
            over_time.times, over_time.active_units, over_time.num_units, axes[1]
        )
    start = _at_start(s)
    caption = (
        "Left: KL of the posterior from the prior, by latent dimension, against time (0: rows are "
        "clean, 1: everything is masked, where every sample starts). It should be largest on the "
        "right, where most tokens are written at once; zero throughout is a collapsed latent. "
        "Right: dimensions whose posterior mean varies between rows, or codes that rows use."
    )
    return Section(title, [verdicts.latent_verdict(start)], [("latent_over_time.png", caption)])


def _at_start(s: Survey) -> LatentStatistics:
    nesting = s.options["max_plate_nesting"]
    elbo = MaskedDiffusionELBO(s.process, max_plate_nesting=nesting)
    rows = s.batch[:500]
    return latent_statistics(
        s.model, s.guide, rows, elbo, num_draws=4, seed=s.seed, args=s.options["args"]
    )


def coupling(s: Survey) -> Section:
    """What does it couple?"""
    found = total_correlation(s.model, s.guide, s.process, s.x_0, _TIMES, seed=s.seed, **s.options)
    truth = None
    if s.truth is not None:
        truth = true_total_correlation(s.truth, s.process, _TIMES)
    error = torch.hypot(found.stderr, (found.upper - found.lower) / 2)
    with s.figure("total_correlation.png", height=3.6) as (ax,):
        plotting.total_correlation_plot(
            found.times, found.value, error, ax, truth=truth, gain=found.gain
        )
    verdict = verdicts.coupling_verdict(
        float(found.value[-1]),
        float(found.stderr[-1]),
        (float(found.lower[-1]), float(found.upper[-1])),
        None if truth is None else float(truth[-1]),
        has_latent=s.has_latent,
        length=s.process.length,
    )
    caption = (
        "Total correlation: how much the masked positions share when all are written in one step "
        "from a state at time t. A model without latent has zero, which is why its few-step "
        "samples fall apart. The curve of the model should lie on that of the data, where the "
        "law of the data is known. Gain: what the coupling is worth on rows of the data, nats per "
        "row over writing the same tokens independently; it too reaches the curve of the data "
        "when the model's law is theirs."
    )
    return Section("What does it couple?", [verdict], [("total_correlation.png", caption)])


def meaning(s: Survey) -> Section:
    """What does it encode?"""
    figures = []
    z, names = s.draws.columns()
    rows = s.draws.batch.x_0
    assert rows is not None
    if not s.discrete:
        prior, _ = s.prior.columns()
        with s.figure("latent_space.png", 2, 3.7) as axes:
            for ax, position in zip(axes, (0, s.process.length - 1), strict=True):
                plotting.latent_scatter(
                    z[0].cpu(),
                    rows[:, position].cpu(),
                    ax,
                    label=f"token at position {position}",
                    prior=prior[:, 0].cpu(),
                    names=names,
                )
        caption = (
            "One draw of the posterior for each row, everything masked, coloured by a token of "
            "the row; lines: density of the prior. Colours in patches: the latent says what the "
            "token will be. Colours mixed everywhere: it does not."
        )
        figures.append(("latent_space.png", caption))
    figures.append(_traversal(s))
    if s.process.length == 2 and s.process.vocab_size <= _PAIR_TOKENS:
        figures.append(_laws(s))
    return Section("What does it encode?", [], figures)


def _telling(s: Survey) -> list[tuple[str, int]]:
    """Coordinates of the latent by how much of their variance lies between rows."""
    shares = []
    for name, value in s.draws.sites.items():
        numbers = codes(value)
        if numbers is None:
            columns = value.double().reshape(*value.shape[:2], -1)
            share = columns.mean(0).var(0) / columns.flatten(0, 1).var(0).clamp_min(1e-12)
        else:  # of the indicators of all codes together
            p = one_hot(numbers).double().mean(0)
            spread = (p.mean(0) * (1 - p.mean(0))).sum(-1)
            share = p.var(0).sum(-1) / spread.clamp_min(1e-12)
        shares += [(float(share[i]), name, i) for i in range(len(share))]
    shares.sort(key=lambda entry: -entry[0])
    return [(name, column) for _, name, column in shares]


def _traversal(s: Survey) -> tuple[str, str]:
    """The decoder along the two most telling coordinates."""
    chosen = _telling(s)[:2]
    shown = list(range(min(s.process.length, _MOST_POSITIONS)))
    height = min(7.0, max(3.0, 0.9 + 0.3 * len(shown)))
    with s.figure("traversal.png", len(chosen), height) as axes:
        for ax, (site, column) in zip(axes, chosen, strict=True):
            path = latent_path(s.prior, site, column)
            p = token_probabilities(s.model, s.batch[:1], path.values, **s.options)[:, 0]
            plotting.latent_traversal(
                p[:, shown].cpu(),
                ax,
                path=path.coordinate.cpu(),
                name=path.name,
                positions=[f"x[{i}]" for i in shown],
            )
    if s.discrete:
        caption = (
            "What the decoder would write at each position for each code; codes have no order. "
            "Positions whose bands change together are tied by the code."
        )
    else:
        caption = (
            "What the decoder would write at each position as the latent moves along one "
            "coordinate, the others in the middle of the prior. Bands that move together are "
            "positions that this coordinate ties."
        )
    if len(chosen) > 1:
        caption += " Left: the coordinate that tells rows apart best; right: the next one."
    return "traversal.png", caption


def _laws(s: Survey) -> tuple[str, str]:
    """One-step laws given parts of the latent, for rows of two tokens."""
    site, column = _telling(s)[0]
    value = s.prior.sites[site]
    numbers = codes(value)
    name = latent_path(s.prior, site, column).name if numbers is not None else f"{site}[{column}]"
    p = token_probabilities(s.model, s.batch[:1], s.prior.sites, **s.options)[:, 0].double()
    if numbers is not None:
        moved = numbers[:, 0, column]
        values, counts = moved.unique(return_counts=True)
        ordered = values[counts.argsort(descending=True)].tolist()
        laws, labels = _far_apart([(str(v), _pairs(p[moved == v])) for v in ordered])
        of = "codes that differ most, from the most frequent on"
    else:
        moved = value[:, 0].reshape(len(value), -1)[:, column]
        edges = moved.quantile(torch.linspace(0, 1, _PANELS + 1).to(moved))
        place = torch.searchsorted(edges[1:-1].contiguous(), moved.contiguous())
        laws = [_pairs(p[place == i]) for i in range(_PANELS)]
        ends = edges.tolist()
        labels = [f"{a:.1f} to {b:.1f}" for a, b in pairwise(ends)]
        of = f"equal shares of the prior along {name}"
    with s.figure("laws_by_latent.png", len(laws), 2.1, width=7.2) as axes:
        plotting.laws_by_latent(torch.stack(laws).cpu(), labels, axes)
        axes[0].figure.suptitle(f"What one step writes, by {name}", fontsize=9)
    caption = (
        f"What one step writes given part of the latent: {of}. Each panel is a law over pairs of "
        "tokens, made of products of independent tokens; their mixture is what the sampler "
        "draws. Panels that differ are what the latent decides."
    )
    return "laws_by_latent.png", caption


def _pairs(p: Tensor) -> Tensor:
    """The law over pairs of tokens that are independent given each latent, ``(n, 2, K)``."""
    return torch.einsum("sk,sl->kl", p[:, 0], p[:, 1]) / len(p)


def _far_apart(laws: list[tuple[str, Tensor]]) -> tuple[list[Tensor], list[str]]:
    """Some laws, each as far as can be from those before it, in total variation."""
    chosen = [0]
    while len(chosen) < min(_PANELS, len(laws)):
        nearest = [min(float((law - laws[i][1]).abs().sum()) for i in chosen) for _, law in laws]
        chosen.append(max(range(len(laws)), key=lambda i: nearest[i]))
    return [laws[i][1] for i in chosen], [laws[i][0] for i in chosen]


def aggregate(s: Survey) -> Section:
    """Does the aggregate posterior fill the prior?"""
    found = aggregate_posterior(
        s.model, s.guide, s.batch, num_prior_draws=500, seed=s.seed + 2, **s.options
    )
    start = _at_start(s)
    information = start.mutual_information
    verdict = verdicts.aggregate_verdict(
        found.accuracy,
        found.stderr,
        found.p_value,
        None if found.holes is None else (found.holes, found.holes_stderr or 0.0),
        # Where rows are nearly told apart, what lies between their posteriors is no hole.
        not s.discrete and (information is None or information > math.log(start.num_rows) - 2),
    )
    if s.discrete:
        used, law = _code_laws(s)
        with s.figure("aggregate_posterior.png", width=7.2) as (ax,):
            plotting.code_usage(law, used, ax)
        caption = (
            "How often rows use each code (bars) against the prior (marks). Bars below their "
            "marks are codes that samples visit and the data do not: holes."
        )
    else:
        prior, _ = s.prior.columns()
        with s.figure("aggregate_posterior.png", height=3.6) as (ax,):
            plotting.density_holes(found.posterior.cpu(), prior[:, 0].cpu(), ax, names=found.names)
        caption = (
            "Density of the posteriors of all rows together against that of the prior, from which "
            "samples draw. They should be the same. Where the prior has mass and no row has its "
            "latent (hatched) is a hole: samples from there were never trained."
        )
    title = "Does the aggregate posterior fill the prior?"
    return Section(title, [verdict], [("aggregate_posterior.png", caption)])


def _code_laws(s: Survey) -> tuple[Tensor, Tensor]:
    """Aggregate posterior and prior of codes: all combinations, or the first code's where they
    are too many or drawn by a guide.
    """
    if s.draws.exact:
        used, law = aggregate_codes(s.model, s.batch, **s.options)
        if len(used) <= _MOST_CODES:
            return used.cpu(), law.cpu()
    drawn, prior = (d.columns()[0][..., 0].long().flatten() for d in (s.draws, s.prior))
    size = int(max(drawn.max(), prior.max())) + 1
    used, law = (torch.bincount(v, minlength=size).double() for v in (drawn, prior))
    return (used / used.sum()).cpu(), (law / law.sum()).cpu()
