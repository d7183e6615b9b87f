"""Questions about the guide and the samples: can the guide be trusted, is it right for single
rows, what does the model write?
"""

from __future__ import annotations

import torch

from vadd_pyro import plotting
from vadd_pyro.inspection import verdicts
from vadd_pyro.inspection.calibration import Calibration, calibrate_guide
from vadd_pyro.inspection.draws import LatentDraws, posterior_draws, posterior_predictive
from vadd_pyro.inspection.gaps import inference_gaps
from vadd_pyro.inspection.page import Section
from vadd_pyro.inspection.reference import ReferencePosterior, reference_posterior
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
    title = "Can the guide be trusted?"
    weights = s.draws.log_weights
    assert weights is not None
    if s.draws.exact:
        return Section(title, [verdicts.pareto_verdict(torch.zeros(0), weights, True)], [])
    found = calibrate_guide(s.model, s.guide, s.batch, seed=s.seed + 3, **s.options)
    k = pareto_k(weights)
    has_tails = not bool(k.isnan().all())
    with s.figure("guide.png", 2 if has_tails else 1, 3.6) as axes:
        if has_tails:
            plotting.pareto_k_plot(k.cpu(), axes[0])
        plotting.rank_plot(found.ranks.cpu(), found.num_draws, found.names, axes[-1])
    caption = (
        "Simulation-based calibration. Rows are written by the model from latents that are known; "
        "each latent is ranked among the guide's draws for its row. Curves within the band are "
        "what an exact posterior gives; a wave that first rises and then falls is a guide too "
        "narrow, the reverse one too wide, a bow to one side a shifted one."
    )
    if has_tails:
        caption = (
            "Left: Pareto k-hat of each row's importance weights, sorted. Below 0.5 the guide "
            "covers the posterior well; above 0.7 it is too light in the tails, and single draws "
            "carry the weights. Right: " + caption[0].lower() + caption[1:]
        )
    said = [verdicts.pareto_verdict(k, weights, False), _calibration(found, s)]
    return Section(title, said, [("guide.png", caption)])


def _calibration(found: Calibration, s: Survey) -> Verdict:
    """The verdict, on the latent that is farthest off where one is, else on the likelihood."""
    words = found.shapes()
    wrong = [name for name in found.names[:-1] if words[name] != "uniform"] or found.names
    worst = min(wrong, key=lambda name: float(found.p_values[found.names.index(name)]))
    shape = "uneven" if s.discrete else words[worst]  # codes have no order to be wide in
    num_rows = len(found.ranks)
    shares = found.counts().double().cumsum(0) / num_rows
    uniform = torch.linspace(0, 1, found.num_bins + 1, dtype=torch.double)[1:].unsqueeze(-1)
    deviation = float((shares.cpu() - uniform).abs().max())
    return verdicts.calibration_verdict(found.p_value, worst, shape, deviation, num_rows)


def single_rows(s: Survey) -> Section:
    """Is it right for single rows?"""
    weights = s.draws.log_weights
    assert weights is not None
    k = pareto_k(weights)
    by_tails = not bool(k.isnan().any())
    order = k.argsort() if by_tails else (-verdicts.effective_share(weights)).argsort()
    number = min(s.num_reference_rows, len(order))
    chosen = order[torch.linspace(0, len(order) - 1, number).round().long().to(order.device)]
    rows = s.draws.batch[chosen]
    reference = reference_posterior(
        s.model, rows, 250, guide=s.guide, num_warmup=200, seed=s.seed + 4, **s.options
    )
    own = posterior_draws(s.model, s.guide, rows, 2000, seed=s.seed + 5, **s.options)
    gaps = inference_gaps(
        s.model, s.guide, rows, reference=reference, seed=s.seed + 6, **s.options
    )
    mine, names = own.columns()
    true, _ = reference.draws.columns()
    with s.figure("guide_and_reference.png", 3, 3.2, width=8.4) as axes:
        places = ((0, "best"), (number // 2, "median"), (number - 1, "worst"))
        for ax, (i, word) in zip(axes, places, strict=True):
            plotting.compare_posteriors(
                mine[:, i].cpu(), true[:, i].cpu(), ax, names=names, codes=s.discrete
            )
            assert rows.x_0 is not None
            row = ", ".join(str(v) for v in rows.x_0[i, :6].tolist())
            dots = ", ..." if s.process.length > 6 else ""
            measure = "k-hat" if by_tails else "its weights"
            ax.set_title(f"{word} row by {measure}:\n({row}{dots})", fontsize=9)
    error = (gaps.approximation_stderr**2 + gaps.amortisation_stderr**2).sqrt()
    with s.figure("gaps.png", height=3.4) as (ax,):
        plotting.gap_bars(
            gaps.approximation.cpu(), gaps.amortisation.cpu(), ax, stderr=error.cpu()
        )
    said = [
        _agreement(s, own, reference),
        verdicts.gap_verdict(
            gaps.approximation,
            gaps.amortisation,
            gaps.elbo,
            float(error.square().sum().sqrt()) / number,
            trained=gaps.trained,
        ),
    ]
    means = (
        "the exact posterior of the codes (enumeration)"
        if s.discrete
        else "draws of the posterior itself (the No-U-Turn sampler; dots and lines)"
    )
    figures = [
        (
            "guide_and_reference.png",
            f"The guide against {means}, for three rows. They should agree.",
        ),
        (
            "gaps.png",
            "What the bound of each row loses. Approximation gap: the best member of the guide's "
            "family for that row alone, as far as training finds it, is still not the posterior. "
            "Amortisation gap: the network does not find that best member. Bars of zero height "
            "are what one wants.",
        ),
    ]
    return Section("Is it right for single rows?", said, figures)


def _agreement(s: Survey, own: LatentDraws, reference: ReferencePosterior) -> Verdict:
    """How far the guide is from the reference on each row."""
    mine, true = own.columns()[0], reference.draws.columns()[0]
    if s.discrete:
        distances = []
        for i in range(mine.shape[1]):
            _, place = torch.cat([mine[:, i], true[:, i]]).unique(dim=0, return_inverse=True)
            count = int(place.max()) + 1
            q, p = (
                torch.bincount(part, minlength=count).double() / len(part)
                for part in (place[: len(mine)], place[len(mine) :])
            )
            distances.append((q - p).abs().sum() / 2)
        return verdicts.codes_verdict(torch.stack(distances))
    # A posterior far narrower than the prior is a point, wherever in it the guide is.
    least = 0.01 * s.prior.columns()[0].flatten(0, 1).std(0)
    spread = torch.maximum(true.std(0), least).clamp_min(torch.finfo(true.dtype).tiny)
    distance = ((mine.mean(0) - true.mean(0)).abs() / spread).amax(-1)
    return verdicts.reference_verdict(distance, reference.r_hat)


def writing(s: Survey) -> Section:
    """What does the model write?"""
    figures = []
    path = follow_sample(
        s.model, s.process, _NUM_STEPS, num_samples=16, seed=s.seed + 7, **s.options
    )
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
    written = posterior_predictive(s.model, given, 2000, seed=s.seed + 8, **s.options)[:, 0]
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
