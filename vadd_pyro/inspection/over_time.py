r"""What the latent carries over time, and what it couples: the total correlation of a step.

In a state :math:`x_t` with masked positions ``M`` the model writes all of them at once, with the
law :math:`p(x_M \mid x_t) = \int p(z \mid x_t) \prod_{j \in M} \mu_j(x_j \mid x_t, z)\, dz`. What
this differs by from independent tokens is its total correlation,

.. math::
    \mathrm{TC}(x_t) = \sum_{j \in M} H(x_j \mid x_t) - H(x_M \mid x_t)
    = E_{x_M \sim p} \Big[ \log p(x_M \mid x_t) - \sum_{j \in M} \log p(x_j \mid x_t) \Big],

zero without a latent. The same log-ratio at the data's own :math:`x_M` is what the coupling is
worth on real rows: the **gain**, in nats, over writing the same marginals independently.

How both are estimated, and how far the estimate may be off, is said in
:mod:`vadd_pyro.inspection.coupling`.

References:
    Watanabe 1960, "Information theoretical analysis of multivariate correlation".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vadd_pyro.elbo import MaskedDiffusionELBO
from vadd_pyro.inspection.coupling import Coupling
from vadd_pyro.monitor import latent_statistics
from vadd_pyro.process import MaskingProcess, check_size
from vadd_pyro.programs import evaluation
from vadd_pyro.sampling import device_of, seeded

__all__ = [
    "StatisticsOverTime",
    "TotalCorrelation",
    "statistics_over_time",
    "total_correlation",
    "true_total_correlation",
]

_TIMES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_MOST_MARGINALS = 2**24  # numbers in all marginals of a known law


class StatisticsOverTime(NamedTuple):
    """What the latents carry at each time, in nats per row (see
    :class:`~vadd_pyro.monitor.LatentStatistics`).

    Args:
        times: ``(T,)``.
        kl: mean KL of a row, ``(T,)``.
        kl_per_dimension: its parts, ``(T, d)``.
        dimension_names: what the parts belong to.
        active_units: ``(T,)`` long.
        num_units: how many units there are.
        mutual_information: ``(T,)``; nan where it cannot be had.
        num_rows: rows it was estimated from, whose logarithm it cannot exceed.
    """

    times: Tensor
    kl: Tensor
    kl_per_dimension: Tensor
    dimension_names: list[str]
    active_units: Tensor
    num_units: int
    mutual_information: Tensor
    num_rows: int


class TotalCorrelation(NamedTuple):
    """What the latent couples at each time, averaged over rows, ``(T,)`` nats each in double
    precision.

    Args:
        times: the times.
        value: total correlation of the masked positions under the model.
        stderr: its standard error over rows.
        lower, upper: bounds on what the value is in expectation; equal for codes summed out.
        gain: mean log-ratio of the joint to the product of its marginals at the data's tokens. The
            joint is from below, the marginals are corrected to first order.
        gain_stderr: its standard error over rows, with that of draws which equal states share.
    """

    times: Tensor
    value: Tensor
    stderr: Tensor
    lower: Tensor
    upper: Tensor
    gain: Tensor
    gain_stderr: Tensor


def _check_times(times: Sequence[float]) -> list[float]:
    values = [float(t) for t in times]
    if not values or not all(0 < t <= 1 for t in values):
        raise ValueError(f"times must lie in (0, 1], at least one, got {list(times)}")
    return values


def statistics_over_time(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    process: MaskingProcess,
    x_0: Tensor,
    times: Sequence[float] = _TIMES,
    *,
    num_draws: int = 1,
    seed: int | None = 0,
    max_plate_nesting: int = 1,
    args: tuple[Any, ...] = (),
) -> StatisticsOverTime:
    """KL, active units and mutual information of the latents of the same rows at several times.

    Args:
        model, guide: a step program and its guide.
        process: their forward process.
        x_0: clean tokens, ``(N, D)``; rows are masked given that at least one position is. The
            mutual information takes the guide's density for all pairs of rows: for a flow, which
            is slow at that, a few hundred rows are enough.
        times: in ``(0, 1]``.
        num_draws: latent draws per row, for what has no closed form.
        seed: seed of this call; None draws on torch's global state. The random numbers are the
            same at all times, so that masks grow with the time.
        max_plate_nesting: depth of the plates of the programs.
        args: further arguments of the programs, the same for all rows.

    Raises:
        ValueError: for times outside ``(0, 1]``, bad tokens, or a pair that does not fit.
    """
    values = _check_times(times)
    x_0 = process.check_tokens(x_0).to(device_of(model, x_0.device))
    elbo = MaskedDiffusionELBO(process, max_plate_nesting=max_plate_nesting)
    found = []
    with seeded(seed):
        base = int(torch.randint(2**31, ()))
        for t in values:
            with seeded(base):
                batch = process.corrupt(x_0, t, at_least_one=True)
            options: dict[str, Any] = {"num_draws": num_draws, "seed": base, "args": args}
            found.append(latent_statistics(model, guide, batch, elbo, **options))
    information = [s.mutual_information for s in found]
    return StatisticsOverTime(
        torch.tensor(values),
        torch.tensor([s.kl for s in found]),
        torch.tensor([s.kl_per_dimension for s in found]),
        found[0].dimension_names,
        torch.tensor([s.active_units for s in found]),
        found[0].num_units,
        torch.tensor([math.nan if value is None else value for value in information]),
        found[0].num_rows,
    )


def total_correlation(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    process: MaskingProcess,
    x_0: Tensor,
    times: Sequence[float] = _TIMES,
    *,
    num_draws: int = 128,
    num_particles: int = 64,
    seed: int | None = None,
    max_plate_nesting: int = 1,
    args: tuple[Any, ...] = (),
) -> TotalCorrelation:
    """What the latent couples, over time: see the module's text.

    Args:
        model, guide: a step program and its guide, run in evaluation mode without gradients. A
            guide whose density cannot be had at given latents is not asked: the bounds widen.
        process: their forward process.
        x_0: clean tokens ``(N, D)``, whose states are averaged over.
        times: in ``(0, 1]``.
        num_draws: draws of the prior for each row, ``P``; equal states share theirs. Where all
            latents are codes, few enough to be summed, none are drawn.
        num_particles: draws of the guide for each row, ``G``, at most ``num_draws``.
        seed: seed of this call; None draws on torch's global state. The random numbers are the
            same at all times, so that masks grow with the time.
        max_plate_nesting: depth of the plates of the programs.
        args: further arguments of the programs, the same for all rows.

    Returns:
        :class:`TotalCorrelation`; zero for a model without latents.

    Raises:
        ValueError: for times outside ``(0, 1]``, bad tokens, or a pair that does not fit.
    """
    values = _check_times(times)
    check_size("num_draws", num_draws, 2)
    check_size("num_particles", num_particles)
    if num_particles > num_draws:
        raise ValueError(f"num_particles is {num_particles}, above num_draws, {num_draws}")
    x_0 = process.check_tokens(x_0).to(device_of(model, x_0.device))
    rows = torch.zeros(4, len(values), len(x_0), dtype=torch.double, device=x_0.device)
    shared = rows.new_zeros(len(values))
    with seeded(seed), evaluation(model, guide):
        probe = process.corrupt(x_0[:1], 1.0)
        coupling = Coupling(model, guide, probe, max_plate_nesting, args)
        base = int(torch.randint(2**31, ()))
        for i, t in enumerate(values):
            with seeded(base):
                batch = process.corrupt(x_0, t)
                several = (batch.masked.sum(-1) > 1).nonzero().flatten()
                if len(several) > 0 and coupling.has_latents:
                    ratios = coupling.ratios(batch[several], num_draws, num_particles)
                    rows[:, i, several] = torch.stack(ratios[:4])
                    shared[i] = ratios.shared
    mean = rows.mean(-1).cpu()
    variance = rows.var(-1).cpu() / len(x_0)
    variance[3] += shared.cpu() / len(x_0) ** 2
    value, lower, upper, gain = mean
    error = variance.sqrt()
    return TotalCorrelation(torch.tensor(values), value, error[0], lower, upper, gain, error[3])


def true_total_correlation(
    probabilities: Tensor, process: MaskingProcess, times: Sequence[float] = _TIMES
) -> Tensor:
    r"""The total correlation of the masked positions under a known law, which a perfect model has.

    .. math::
        \sum_M P(M \mid t) \Big[ \sum_{j \in M} H(x_j \mid x_V) - H(x_M \mid x_V) \Big],
        \qquad P(M \mid t) = (1 - \alpha(t))^{|M|} \alpha(t)^{|V|} .

    Args:
        probabilities: the law of a row, ``(K,) * D``, for ``(K + 1) ** D`` up to about 16 million.
        process: its forward process.
        times: in ``(0, 1]``.

    Returns:
        ``(T,)`` nats in double precision.

    Raises:
        ValueError: for a tensor that is no law of the process's rows, or too large.
    """
    values = _check_times(times)
    length, shape = process.length, (process.vocab_size,) * process.length
    if tuple(probabilities.shape) != shape:
        raise ValueError(
            f"probabilities must have shape {shape}, got {tuple(probabilities.shape)}"
        )
    law = probabilities.double()
    total = float(law.sum())
    if not bool((law >= 0).all()) or abs(total - 1) > 1e-6:
        raise ValueError(f"probabilities must be a law; they sum to {total:.6g}")
    if (process.vocab_size + 1) ** length > _MOST_MARGINALS:
        raise ValueError(
            f"probabilities have {(process.vocab_size + 1) ** length:,} marginals, more than "
            f"{_MOST_MARGINALS:,}"
        )
    marginals = {tuple(range(length)): law}
    by_size = torch.zeros(length + 1, dtype=torch.double)
    entropies = {}
    for size in range(length, -1, -1):
        for kept in itertools.combinations(range(length), size):
            if size < length:  # summed from the marginal with the first missing position
                missing = next(j for j in range(length) if j not in kept)
                larger = tuple(sorted((*kept, missing)))
                marginals[kept] = marginals[larger].sum(larger.index(missing))
            entropies[kept] = -float(torch.xlogy(marginals[kept], marginals[kept]).sum())
    everything = entropies[tuple(range(length))]
    for visible, known in entropies.items():
        masked = [j for j in range(length) if j not in visible]
        single = sum(entropies[tuple(sorted((*visible, j)))] - known for j in masked)
        by_size[len(masked)] += single - (everything - known)
    alpha = process.schedule.alpha(torch.tensor(values, dtype=torch.double)).unsqueeze(-1)
    number = torch.arange(length + 1)
    return ((1 - alpha) ** number * alpha ** (length - number)) @ by_size
