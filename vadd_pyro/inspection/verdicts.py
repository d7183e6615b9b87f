"""Verdicts: one line each, with the number behind it.

The thresholds are the ones that the field uses where it has some, and stated with every verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from vadd_pyro.monitor import LatentStatistics

__all__ = [
    "USED",
    "Verdict",
    "aggregate_verdict",
    "calibration_verdict",
    "codes_verdict",
    "coupling_verdict",
    "effective_share",
    "gap_verdict",
    "latent_verdict",
    "pareto_verdict",
    "reference_verdict",
]

USED = 0.05  # nats; below, a latent carries nothing that matters


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
    most = math.log(max(1, statistics.num_rows))
    numbers = {
        "kl": kl,
        "mutual_information": information,
        "active_units": statistics.active_units,
        "num_units": statistics.num_units,
        "share_at_prior": statistics.share_at_prior,
        "num_rows": statistics.num_rows,
    }
    said = f"KL {kl:.2f} nats"
    if information is not None:
        least = information > most - 1  # rows that are told apart cannot be told more apart
        bound = f"at least {information:.2f} nats (of {most:.2f} that {statistics.num_rows} rows "
        bound += "can show)"
        value = bound if least else f"{information:.2f} nats"
        said += f", mutual information of row and latent {value}"
    units = f"{statistics.active_units} of {statistics.num_units} latent units active"
    if kl < USED:
        text = f"collapsed: the posterior is the prior ({said}; below {USED} nats); {units}"
        return Verdict("bad", text, numbers)
    if information is not None and information < USED:
        text = (
            "collapsed: the guide differs from the prior but tells no rows apart "
            f"({said}; below {USED} nats); {units}"
        )
        return Verdict("bad", text, numbers)
    return Verdict("good", f"healthy: {said}; {units}", numbers)


def coupling_verdict(
    value: float,
    stderr: float,
    bounds: tuple[float, float],
    truth: float | None,
    *,
    has_latent: bool,
    length: int,
) -> Verdict:
    """How much of what positions share, when all are written at once, does the latent carry?

    Args:
        value, stderr: total correlation of the model's one-step law at t = 1, nats.
        bounds: what the estimate's own error leaves of it.
        truth: that of the data, nats; None if it is not known.
        has_latent: whether the model has one.
        length: positions of a row.
    """
    lower, upper = bounds
    numbers = {
        "total_correlation": value,
        "stderr": stderr,
        "lower": lower,
        "upper": upper,
        "of_the_data": truth,
    }
    data = "" if truth is None else f"; those of the data share {truth:.3f} nats"
    if length < 2:
        return Verdict("note", "rows of one position have nothing to couple", numbers)
    if not has_latent:
        return Verdict(
            "note", f"no latent: positions written together are independent{data}", numbers
        )
    if upper - lower > max(0.1, 0.2 * abs(value)):
        text = (
            f"between {max(0.0, lower):.2f} and {upper:.2f} nats: not resolved with this guide, "
            f"whose draws miss the posterior{data}"
        )
        return Verdict("note", text, numbers)
    error = math.hypot(stderr, (upper - lower) / 2)
    said = f"{value:.3f} nats ± {error:.3f}"
    if truth is None:
        level = "good" if value - 2 * error > USED else "note"
        text = f"positions written at once share {said} through the latent"
        return Verdict(level, text, numbers)
    if truth < USED:
        text = f"the positions of the data share {truth:.3f} nats, the model's {said}"
        return Verdict("note", text, numbers)
    numbers["share"] = share = value / truth
    off = max(0.0, abs(value - truth) - 2 * error) / truth
    level = "good" if off < 0.1 else "warning" if off < 0.5 else "bad"
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
        text = "no guide is needed: the posterior is summed exactly"
        return Verdict("good", text, {})
    effective = effective_share(log_weights)
    low = float(effective.quantile(0.05))
    fitted = k[~k.isnan()]
    numbers: dict[str, float | None] = {
        "num_rows": len(k),
        "num_fitted": len(fitted),
        "median_effective_share": float(effective.median()),
        "low_effective_share": low,
    }
    said = (
        f"the weights are worth {100 * float(effective.median()):.0f} % of the draws at the "
        f"median row, {100 * low:.0f} % or less at one row in twenty"
    )
    if len(fitted) == 0:
        text = f"weights of a few values only, whose tail has no k̂; {said}"
        return Verdict("good" if low > 0.5 else "warning", text, numbers)
    share, median = float((fitted > 0.7).double().mean()), float(fitted.median())
    numbers |= {"share_above_0.7": share, "median": median}
    level = "good" if share <= 0.05 else "warning" if share <= 0.25 or low > 0.5 else "bad"
    use = ""
    if level == "warning" and low > 0.5:
        use = "; good enough for training and bounds, not for reweighting"
    text = (
        f"k̂ > 0.7 on {100 * share:.0f} % of {len(fitted)} rows (median {median:.2f}), where the "
        f"guide is too light in the tails; {said}{use}"
    )
    return Verdict(level, text, numbers)


def effective_share(log_weights: Tensor) -> Tensor:
    """What importance weights ``(S, B)`` are worth, as a share of as many equal ones, ``(B,)``
    (Kish 1965).
    """
    return 1 / (len(log_weights) * log_weights.double().softmax(0).square().sum(0))


def gap_verdict(
    approximation: Tensor, amortisation: Tensor, elbo: Tensor, stderr: float, *, trained: bool
) -> Verdict:
    """What does the guide lose, and would a wider family or a longer training win it back?

    Args:
        approximation, amortisation: gaps of each row, ``(B,)`` nats.
        elbo: the bound of each row, ``(B,)`` nats.
        stderr: standard error of the mean of both together.
        trained: whether the guide had anything that could be refined.
    """
    first, second = float(approximation.mean()), float(amortisation.mean())
    total = first + second
    numbers = {
        "approximation": first if trained else None,
        "amortisation": second if trained else None,
        "gap": total,
        "stderr": stderr,
        "elbo": float(elbo.mean()),
        "num_rows": len(elbo),
    }
    level = "good" if total < 0.1 + 2 * stderr else "warning" if total < 0.5 else "bad"
    text = (
        f"the bound lies {total:.3f} nats (± {stderr:.3f}) below the evidence on {len(elbo)} rows"
    )
    if total < 2 * stderr:
        text = (
            f"the bound is the evidence within its error of {stderr:.3f} nats on {len(elbo)} rows"
        )
    if not trained:
        text += "; the guide has nothing to train, so that the gap cannot be split"
        return Verdict(level, text, numbers)
    text += f": {first:.3f} by the family, {second:.3f} by amortisation"
    if level != "good" and abs(first - second) > 2 * stderr:
        better = "a wider family" if first > second else "longer training of the guide"
        text += f"; {better} would win most of it back"
    return Verdict(level, text, numbers)


def calibration_verdict(
    p_value: float, worst: str, shape: str, deviation: float, num_rows: int
) -> Verdict:
    """Are the guide's posteriors right on average over what the model itself writes?

    Args:
        p_value: of uniform ranks, over all quantities.
        worst: the quantity that is farthest from uniform.
        shape: how its ranks deviate, in words.
        deviation: largest difference of a share of ranks from uniform.
        num_rows: how many simulations.
    """
    numbers = {"p_value": p_value, "deviation": deviation, "num_rows": num_rows}
    if p_value > 0.01:
        text = f"ranks are uniform as far as {num_rows} simulations can tell (p = {p_value:.2g})"
        return Verdict("good", text, numbers)
    how = "" if shape in ("uniform", "uneven") else f": the guide is {shape} there"
    text = (
        f"ranks are not uniform in {worst} (p = {p_value:.2g} in {num_rows} simulations, shares "
        f"off by up to {deviation:.2f}){how}"
    )
    return Verdict("bad" if deviation > 0.1 else "warning", text, numbers)


def aggregate_verdict(
    accuracy: float,
    stderr: float,
    p_value: float,
    holes: tuple[float, float] | None,
    saturated: bool,
) -> Verdict:
    """Does the aggregate posterior fill the prior?

    Args:
        accuracy, stderr: of a classifier that tells the two apart; one half if it cannot.
        p_value: of that.
        holes: share of prior mass where the aggregate posterior has less than a tenth of the
            prior's density, and its standard error; None where it cannot be had.
        saturated: whether the rows are so far apart in the latent that their own posteriors
            leave gaps, whatever the aggregate of all data would be.
    """
    share, error = (None, None) if holes is None else holes
    numbers = {
        "accuracy": accuracy,
        "p_value": p_value,
        "hole_share": share,
        "hole_stderr": error,
    }
    apart = p_value < 0.01
    text = (
        f"a classifier tells them apart with accuracy {accuracy:.3f} ± {stderr:.3f}"
        if apart
        else f"a classifier cannot tell them apart (accuracy {accuracy:.3f} ± {stderr:.3f})"
    )
    text += ", where .5 is chance"
    worst = max(0.0, accuracy - 0.5 - 2 * stderr) if apart else 0.0
    if share is None or error is None:
        pass
    elif saturated:
        text += "; holes cannot be seen with this number of rows, each of which has its own place"
    elif share == 0:
        text += "; no holes found in the prior"
    else:
        text += f"; {100 * share:.1f} % (± {100 * error:.1f}) of the prior's mass lies in holes"
        worst = max(worst, share - 2 * error)
    level = "good" if worst < 0.05 else "warning" if worst < 0.2 else "bad"
    return Verdict(level, text, numbers)


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


def codes_verdict(distance: Tensor) -> Verdict:
    """Does a guide over codes agree with their exact posterior on single rows?

    Args:
        distance: total variation between the two on each row, ``(B,)``.
    """
    worst = float(distance.max())
    numbers = {"largest_distance": worst, "median_distance": float(distance.median())}
    level = "good" if worst < 0.1 else "warning" if worst < 0.3 else "bad"
    text = (
        f"total variation between the guide and the exact posterior of the codes is "
        f"{float(distance.median()):.2f} at the median row, {worst:.2f} at the worst of "
        f"{len(distance)}"
    )
    return Verdict(level, text, numbers)
