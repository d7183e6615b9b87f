"""Verdicts: one line each, with the number behind it.

The thresholds are the ones that the field uses where it has some, and stated with every verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from vadd_pyro.monitor import LatentStatistics

__all__ = [
    "Verdict",
    "aggregate_verdict",
    "calibration_verdict",
    "coupling_verdict",
    "gap_verdict",
    "latent_verdict",
    "pareto_verdict",
    "reference_verdict",
]

_USED = 0.05  # nats; below, a latent carries nothing that matters


class Verdict(NamedTuple):
    """What a diagnostic says.

    Args:
        level: ``"good"``, ``"warning"``, ``"bad"``, or ``"note"`` where there is nothing to judge.
        text: one sentence with the number behind it.
        numbers: what it rests on.
    """

    level: str
    text: str
    numbers: Mapping[str, float | None]


def latent_verdict(statistics: LatentStatistics | None) -> Verdict:
    """Is the latent used where samples start, with everything masked?

    Collapsed below 0.05 nats of KL or of mutual information between row and latent.

    Args:
        statistics: at t = 1; None for a model without latent.
    """
    if statistics is None:
        return Verdict("note", "the model has no latent", {})
    kl, information = statistics.kl, statistics.mutual_information
    numbers = {
        "kl": kl,
        "mutual_information": information,
        "active_units": statistics.active_units,
        "num_units": statistics.num_units,
        "share_at_prior": statistics.share_at_prior,
    }
    said = f"KL {kl:.2f} nats"
    if information is not None:
        said += f", mutual information of row and latent {information:.2f} nats"
    units = f"{statistics.active_units} of {statistics.num_units} latent units active"
    if kl < _USED:
        text = f"collapsed: the posterior is the prior ({said}; below {_USED} nats)"
        return Verdict("bad", f"{text}; {units}", numbers)
    if information is not None and information < _USED:
        text = (
            f"collapsed: the guide differs from the prior but tells no rows apart ({said}; below "
            f"{_USED} nats)"
        )
        return Verdict("bad", f"{text}; {units}", numbers)
    return Verdict("good", f"healthy: {said}; {units}", numbers)


def coupling_verdict(
    value: float, stderr: float, truth: float | None, has_latent: bool
) -> Verdict:
    """How much of what positions share, when all are written at once, does the latent carry?

    Args:
        value, stderr: total correlation of the model's one-step law at t = 1, nats.
        truth: that of the data, nats; None if it is not known.
        has_latent: whether the model has one.
    """
    numbers = {"total_correlation": value, "stderr": stderr, "of_the_data": truth}
    said = f"{value:.3f} nats ± {stderr:.3f}"
    if not has_latent:
        wanted = "" if truth is None else f", where those of the data share {truth:.3f} nats"
        text = f"no latent: positions written together are independent{wanted}"
        return Verdict("note", text, numbers)
    if truth is None:
        level = "good" if value > _USED else "bad"
        return Verdict(
            level, f"positions written at once share {said} through the latent", numbers
        )
    if truth < _USED:
        text = f"the positions of the data share {truth:.3f} nats, the model's {said}"
        return Verdict("note", text, numbers)
    share = value / truth
    numbers["share"] = share
    level = "good" if 0.9 < share < 1.1 else "warning" if 0.5 < share < 1.5 else "bad"
    text = (
        f"written all at once, positions share {said} through the latent, {100 * share:.0f} % of "
        f"the {truth:.3f} nats that those of the data share"
    )
    return Verdict(level, text, numbers)


def pareto_verdict(k: Tensor, log_weights: Tensor, exact: bool) -> Verdict:
    """Can the guide stand for the posterior in importance sampling?

    Args:
        k: Pareto k-hat of each row, ``(B,)``; nan where weights take a few values only, whose
            tail cannot be fitted.
        log_weights: importance weights, ``(S, B)``.
        exact: whether the posterior is computed exactly.
    """
    if exact:
        return Verdict("good", "the posterior is summed exactly: no guide to be trusted", {})
    effective = 1 / (len(log_weights) * log_weights.double().softmax(0).square().sum(0))
    fitted = k[~k.isnan()]
    numbers: dict[str, float | None] = {
        "num_rows": len(k),
        "num_fitted": len(fitted),
        "median_effective_share": float(effective.median()),
    }
    said = f"the weights are worth {100 * float(effective.median()):.0f} % of the draws"
    if len(fitted) == 0:
        level = "good" if float(effective.quantile(0.05)) > 0.5 else "warning"
        text = f"weights of a few values only, whose tail has no k̂; at the median row {said}"
        return Verdict(level, text, numbers)
    share, median = float((fitted > 0.7).double().mean()), float(fitted.median())
    numbers |= {"share_above_0.7": share, "median": median}
    level = "good" if share <= 0.05 else "warning" if share <= 0.5 else "bad"
    text = (
        f"k̂ > 0.7 on {100 * share:.0f} % of {len(fitted)} rows (median {median:.2f}; above 0.7 "
        f"the guide misses mass of the posterior and weights cannot mend it); {said} at the "
        "median row"
    )
    return Verdict(level, text, numbers)


def gap_verdict(
    approximation: Tensor, amortisation: Tensor, elbo: Tensor, stderr: float
) -> Verdict:
    """What does the guide lose, and would a wider family or a longer training win it back?

    Args:
        approximation, amortisation: gaps of each row, ``(B,)`` nats.
        elbo: the bound of each row, ``(B,)`` nats.
        stderr: standard error of the mean of both together.
    """
    first, second = float(approximation.mean()), float(amortisation.mean())
    numbers = {
        "approximation": first,
        "amortisation": second,
        "stderr": stderr,
        "elbo": float(elbo.mean()),
        "num_rows": len(elbo),
    }
    total = first + second
    level = "good" if total < 0.1 else "warning" if total < 0.5 else "bad"
    what = "a wider family" if first > second else "longer training of the guide, or refinement,"
    advice = "" if total < 0.1 else f"; {what} would win most of it back"
    text = (
        f"the bound lies {total:.3f} nats (± {stderr:.3f}) below the evidence: {first:.3f} by the "
        f"family, {second:.3f} by amortisation, on {len(elbo)} rows{advice}"
    )
    return Verdict(level, text, numbers)


def calibration_verdict(p_value: float, worst: str, shape: str, num_rows: int) -> Verdict:
    """Are the guide's posteriors right on average over what the model itself writes?

    Args:
        p_value: of uniform ranks, over all quantities.
        worst: the quantity with the smallest.
        shape: how its ranks deviate, in words.
        num_rows: how many simulations.
    """
    numbers = {"p_value": p_value, "num_rows": num_rows}
    if p_value > 0.01:
        text = f"ranks are uniform as far as {num_rows} simulations can tell (p = {p_value:.2g})"
        return Verdict("good", text, numbers)
    text = (
        f"ranks are not uniform (p = {p_value:.2g}, {num_rows} simulations): the guide is {shape} "
        f"in {worst}"
    )
    return Verdict("warning", text, numbers)


def aggregate_verdict(
    accuracy: float, stderr: float, p_value: float, hole_share: float | None
) -> Verdict:
    """Does the aggregate posterior fill the prior?

    Args:
        accuracy, stderr: of a classifier that tells the two apart; one half if it cannot.
        p_value: of that.
        hole_share: share of prior mass where the aggregate posterior has less than a tenth of the
            prior's density.
    """
    numbers = {"accuracy": accuracy, "p_value": p_value, "hole_share": hole_share}
    said = f"a classifier tells them apart with accuracy {accuracy:.3f} ± {stderr:.3f}"
    holes = ""
    if hole_share is not None:
        holes = f"; {100 * hole_share:.1f} % of the prior's mass lies in holes"
    worst = max(accuracy - 0.5, hole_share or 0.0)
    level = "good" if worst < 0.05 else "warning" if worst < 0.2 else "bad"
    return Verdict(level, f"{said} (one half: the same){holes}", numbers)


def reference_verdict(distance: Tensor, r_hat: Tensor) -> Verdict:
    """Does the guide agree with the reference posterior on single rows?

    Args:
        distance: how far the guide's mean is from the reference's on each row, ``(B,)`` in
            standard deviations of the reference, the largest over coordinates.
        r_hat: of the reference's chains, ``(B,)``.
    """
    numbers = {
        "largest_distance": float(distance.max()),
        "median_distance": float(distance.median()),
        "largest_r_hat": float(r_hat.max()),
    }
    if bool((r_hat > 1.05).any()):
        text = (
            f"the reference itself has not mixed on {int((r_hat > 1.05).sum())} of {len(r_hat)} "
            f"rows (R-hat up to {float(r_hat.max()):.2f}): posteriors of several modes, perhaps"
        )
        return Verdict("note", text, numbers)
    worst = float(distance.max())
    level = "good" if worst < 0.5 else "warning" if worst < 1.5 else "bad"
    text = (
        f"means of guide and reference differ by {float(distance.median()):.2f} posterior "
        f"standard deviations at the median row, {worst:.2f} at the worst of {len(distance)}"
    )
    return Verdict(level, text, numbers)
