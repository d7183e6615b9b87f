"""Questions about the latent: is it used, what does it couple and encode, is the prior filled?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vadd_pyro import plotting
from vadd_pyro.elbo import MaskedDiffusionELBO
from vadd_pyro.inspection import verdicts
from vadd_pyro.inspection.aggregate import aggregate_codes, aggregate_posterior
from vadd_pyro.inspection.over_time import (
    statistics_over_time,
    total_correlation,
    true_total_correlation,
)
from vadd_pyro.inspection.page import Section
from vadd_pyro.inspection.survey import Survey
from vadd_pyro.inspection.walks import latent_path, token_probabilities
from vadd_pyro.monitor import latent_statistics

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


def _at_start(s: Survey) -> Any:
    nesting = s.options["max_plate_nesting"]
    elbo = MaskedDiffusionELBO(s.process, max_plate_nesting=nesting)
    rows = s.batch[:500]
    return latent_statistics(
        s.model, s.guide, rows, elbo, num_draws=4, seed=s.seed, args=s.options["args"]
    )


def coupling(s: Survey) -> Section:
    """What is VADD for?"""
    found = total_correlation(s.model, s.guide, s.process, s.x_0, _TIMES, seed=s.seed, **s.options)
    truth = None
    if s.truth is not None:
        truth = true_total_correlation(s.truth, s.process, _TIMES)
    with s.figure("total_correlation.png", height=3.6) as (ax,):
        plotting.total_correlation_plot(
            found.times, found.value, found.stderr, ax, truth=truth, gain=found.gain
        )
    verdict = verdicts.coupling_verdict(
        float(found.value[-1]),
        float(found.stderr[-1]),
        None if truth is None else float(truth[-1]),
        s.has_latent,
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
    """What does the latent encode?"""
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
    sites, column = _most_telling(s)
    path = latent_path(s.prior, sites, column)
    shown = list(range(min(s.process.length, _MOST_POSITIONS)))
    probabilities = token_probabilities(s.model, s.batch[:1], path.values, **s.options)[:, 0]
    height = min(7.0, max(3.0, 0.9 + 0.3 * len(shown)))
    with s.figure("traversal.png", 2, height) as axes:
        plotting.latent_traversal(
            probabilities[:, shown].cpu(),
            axes[0],
            path=path.coordinate.cpu(),
            name=path.name,
            positions=[f"x[{i}]" for i in shown],
        )
        _second_path(s, axes[1], sites, column, shown)
    caption = (
        "What the decoder would write at each position as the latent moves along one coordinate, "
        "the others at the median of the prior. Left: the coordinate that varies most between "
        "rows; right: the next one. Bands that move together are positions that this coordinate "
        "ties."
    )
    figures.append(("traversal.png", caption))
    if s.process.length == 2 and s.process.vocab_size <= _PAIR_TOKENS:
        figures.append(_laws(s))
    return Section("What does it encode?", [], figures)


def _most_telling(s: Survey, place: int = 0) -> tuple[str, int]:
    """The coordinate whose posterior mean varies most between rows, or a later one in order."""
    variances = []
    for name, value in s.draws.sites.items():
        columns = value.double().reshape(*value.shape[:2], -1)
        mean = columns.mean(0)
        spread = columns.flatten(0, 1).var(0).clamp_min(1e-12)
        share = mean.var(0) / spread
        variances += [(float(share[i]), name, i) for i in range(len(share))]
    variances.sort(reverse=True)
    _, name, column = variances[min(place, len(variances) - 1)]
    return name, column


def _second_path(s: Survey, ax: Any, site: str, column: int, shown: list[int]) -> None:
    """The path along the second coordinate, or an empty panel where there is none."""
    other = _most_telling(s, 1)
    if other == (site, column):
        ax.set_axis_off()
        return
    path = latent_path(s.prior, *other)
    probabilities = token_probabilities(s.model, s.batch[:1], path.values, **s.options)[:, 0]
    plotting.latent_traversal(
        probabilities[:, shown].cpu(),
        ax,
        path=path.coordinate.cpu(),
        name=path.name,
        positions=[f"x[{i}]" for i in shown],
    )


def _laws(s: Survey) -> tuple[str, str]:
    """One-step laws given parts of the latent, for rows of two tokens."""
    z, names = s.prior.columns()
    z = z[:, 0]
    site, column = _most_telling(s)
    own = list(s.prior.sites).index(site)
    before = sum(v[0, 0].numel() for v in list(s.prior.sites.values())[:own])
    moved = z[:, before + column]
    p = token_probabilities(s.model, s.batch[:1], s.prior.sites, **s.options)[:, 0].double()
    if s.discrete:
        values, counts = moved.unique(return_counts=True)
        kept = values[counts.argsort(descending=True)][:_PANELS]
        groups = [(moved == v, str(int(v))) for v in kept]
        of = f"the most frequent values of {names[before + column]}"
    else:
        edges = moved.quantile(torch.linspace(0, 1, _PANELS + 1, dtype=moved.dtype))
        groups = []
        for i in range(_PANELS):
            inside = (moved >= edges[i]) & (moved <= edges[i + 1])
            label = f"{float(edges[i]):.1f} to {float(edges[i + 1]):.1f}"
            groups.append((inside, label))
        of = f"equal shares of the prior along {names[before + column]}"
    laws = torch.stack(
        [
            torch.einsum("sk,sl->kl", p[inside, 0], p[inside, 1]) / inside.sum()
            for inside, _ in groups
        ]
    )
    with s.figure("laws_by_latent.png", len(groups), 2.1, width=7.2) as axes:
        plotting.laws_by_latent(laws.cpu(), [label for _, label in groups], axes)
        heading = f"What one step writes, by {names[before + column]}"
        axes[0].figure.suptitle(heading, fontsize=9)
    caption = (
        f"What one step writes given part of the latent: {of}. Each panel is a law over pairs of "
        "tokens, made of products of independent tokens; their mixture is what the sampler "
        "draws. Panels that differ are what the latent decides."
    )
    return "laws_by_latent.png", caption


def aggregate(s: Survey) -> Section:
    """Does the aggregate posterior fill the prior?"""
    found = aggregate_posterior(s.model, s.guide, s.batch, seed=s.seed, **s.options)
    verdict = verdicts.aggregate_verdict(found.accuracy, found.stderr, found.p_value, found.holes)
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
