"""Questions about the guide and the samples: can the guide be trusted, is it right for single
rows, what does the model write?
"""

from __future__ import annotations

from typing import Any

import torch

from vadd_pyro import plotting
from vadd_pyro.inspection import verdicts
from vadd_pyro.inspection.calibration import calibrate_guide
from vadd_pyro.inspection.draws import posterior_draws, posterior_predictive
from vadd_pyro.inspection.gaps import inference_gaps
from vadd_pyro.inspection.page import Section
from vadd_pyro.inspection.reference import reference_posterior
from vadd_pyro.inspection.survey import Survey
from vadd_pyro.inspection.to_arviz import pareto_k
from vadd_pyro.inspection.verdicts import Verdict
from vadd_pyro.inspection.walks import follow_sample
from vadd_pyro.process import MaskedBatch

__all__ = ["single_rows", "trust", "writing"]

_MOST_POSITIONS = 16  # of a row that is drawn token by token
_NUM_STEPS = 4  # of the sample that is followed


def trust(s: Survey) -> Section:
    """Can the guide be trusted?"""
    found = calibrate_guide(s.model, s.guide, s.batch, seed=s.seed, **s.options)
    weights = s.draws.log_weights
    assert weights is not None
    k = torch.zeros(weights.shape[1]) if s.draws.exact else pareto_k(weights)
    with s.figure("guide.png", 1 if s.draws.exact else 2, 3.6) as axes:
        if not s.draws.exact:
            plotting.pareto_k_plot(k.cpu(), axes[0])
        plotting.rank_plot(found.ranks.cpu(), found.num_draws, found.names, axes[-1])
    caption = (
        "Simulation-based calibration. Rows are written by the model from latents that are known; "
        "each latent is ranked among the guide's draws for its row. Curves within the band are "
        "what an exact posterior gives; a wave that first rises and then falls is a guide too "
        "narrow, the reverse one too wide, a bow to one side a shifted one."
    )
    if not s.draws.exact:
        caption = (
            "Left: Pareto k-hat of each row's importance weights, sorted. Below 0.5 the guide "
            "covers the posterior well, above 0.7 it misses mass that weights cannot mend. Right: "
            + caption[0].lower()
            + caption[1:]
        )
    said = [
        verdicts.pareto_verdict(k, weights, s.draws.exact),
        _calibration(found, len(s.batch)),
    ]
    return Section("Can the guide be trusted?", said, [("guide.png", caption)])


def _calibration(found: Any, num_rows: int) -> Verdict:
    worst = found.names[int(found.p_values.argmin())] if found.names else ""
    return verdicts.calibration_verdict(found.p_value, worst, found.shape(), num_rows)


def single_rows(s: Survey) -> Section:
    """Is the guide right for this row?"""
    assert s.draws.log_weights is not None
    order = pareto_k(s.draws.log_weights).nan_to_num(0.0).argsort()
    place = torch.linspace(0, len(order) - 1, s.num_reference_rows).round().long()
    chosen = order[place.to(order.device)]
    rows = s.draws.batch[chosen]
    reference = reference_posterior(
        s.model, rows, 250, guide=s.guide, num_warmup=200, seed=s.seed, **s.options
    )
    own = posterior_draws(s.model, s.guide, rows, 2000, seed=s.seed, **s.options)
    gaps = inference_gaps(s.model, s.guide, rows, reference=reference, seed=s.seed, **s.options)
    mine, names = own.columns()
    true, _ = reference.draws.columns()
    spread = true.std(0).clamp_min(1e-6)
    distance = ((mine.mean(0) - true.mean(0)).abs() / spread).amax(-1)
    three = [0, len(chosen) // 2, len(chosen) - 1]
    with s.figure("guide_and_reference.png", 3, 3.2, width=8.4) as axes:
        for ax, i, word in zip(axes, three, ("best", "median", "worst"), strict=True):
            plotting.compare_posteriors(
                mine[:, i].cpu(), true[:, i].cpu(), ax, names=names, codes=s.discrete
            )
            assert rows.x_0 is not None
            row = ", ".join(str(v) for v in rows.x_0[i, :6].tolist())
            dots = ", ..." if s.process.length > 6 else ""
            ax.set_title(f"{word} row by k-hat:\n({row}{dots})", fontsize=9)
    error = (gaps.approximation_stderr**2 + gaps.amortisation_stderr**2).sum().sqrt() / len(rows)
    with s.figure("gaps.png", height=3.4) as (ax,):
        total_error = (gaps.approximation_stderr**2 + gaps.amortisation_stderr**2).sqrt()
        plotting.gap_bars(
            gaps.approximation.cpu(), gaps.amortisation.cpu(), ax, stderr=total_error.cpu()
        )
    said = [
        verdicts.reference_verdict(distance, reference.r_hat),
        verdicts.gap_verdict(gaps.approximation, gaps.amortisation, gaps.elbo, float(error)),
    ]
    figures = [
        (
            "guide_and_reference.png",
            "The guide (filled) against draws of the posterior itself (the No-U-Turn sampler; "
            "dots and lines), for three rows. They should lie on each other.",
        ),
        (
            "gaps.png",
            "What the bound of each row loses. Approximation gap: the best member of the guide's "
            "family for that row alone is still not the posterior. Amortisation gap: the network "
            "does not find that best member. Bars of zero height are what one wants.",
        ),
    ]
    return Section("Is it right for single rows?", said, figures)


def writing(s: Survey) -> Section:
    """What does the model write?"""
    figures = []
    path = follow_sample(s.model, s.process, _NUM_STEPS, num_samples=16, seed=s.seed, **s.options)
    changes = (path.states[1:] != path.states[:-1]).any(-1).sum(0)
    chosen = int(changes.argmax())  # one in which most steps write something
    length = min(s.process.length, _MOST_POSITIONS)
    latents = None
    if s.has_latent:
        latents = torch.cat(
            [v[:, chosen].reshape(len(v), -1).double() for v in path.latents.values()], 1
        )[:, :8]
        latents = latents.long() if s.discrete else latents
    with s.figure("denoising_path.png", 1, 1.2 + 0.45 * _NUM_STEPS, width=7.2) as (ax,):
        plotting.denoising_path(
            path.states[:, chosen, :length].cpu(),
            None if latents is None else latents.cpu(),
            ax,
            vocab_size=s.process.vocab_size,
            times=path.times,
        )
    caption = (
        f"One sample in {_NUM_STEPS} steps, from all masked on top to clean at the bottom, with "
        "the latent that each step drew from the prior. Cells just written are outlined; a step "
        "may write none."
    )
    figures.append(("denoising_path.png", caption))
    half = torch.arange(s.process.length, device=s.x_0.device) >= s.process.length // 2
    row = s.batch[:1].x_0
    assert row is not None
    hidden = half.expand_as(row)
    t = s.process.schedule.inverse((~hidden).double().mean(-1)).to(s.batch.t)
    x_t = row.masked_fill(hidden, s.process.mask_id)
    given = MaskedBatch(x_t, t, hidden, hidden, row)
    written = posterior_predictive(s.model, given, 2000, seed=s.seed, **s.options)[:, 0]
    if length > 1:
        shown = torch.arange(max(0, s.process.length // 2 - length // 2), s.process.length)[
            :length
        ]
        with s.figure("infilling.png", height=3.4) as (ax,):
            plotting.completions_plot(
                x_t[0, shown].cpu(),
                written[:, shown].cpu(),
                ax,
                vocab_size=s.process.vocab_size,
                truth=row[0, shown].cpu(),
            )
        caption = (
            "A row of the data with its second half hidden: what the model writes there in one "
            "step, as shares of 2,000 completions. The circle is what stood in the data."
        )
        figures.append(("infilling.png", caption))
    return Section("What does the model write?", [], figures)
