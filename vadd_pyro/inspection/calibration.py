r"""Simulation-based calibration of a guide: is it right on average, and if not, how is it wrong?

For rows in states :math:`x_t`, latents and tokens are drawn from the model, and the guide is asked
for the latents of those tokens,

.. math::
    z^* \sim p(z \mid x_t), \qquad x_M \sim p(x_M \mid x_t, z^*), \qquad
    z_1, \dots, z_L \sim r(z \mid x_M, x_t) .

If the guide is the model's posterior, the rank of :math:`z^*_j` among the :math:`z_{l,j}` is
uniform on ``0..L`` for every coordinate ``j``. A guide that is too narrow puts it at both ends,
one that is too wide in the middle, one that is shifted at one end. Coordinates alone do not see a
guide that ignores its row and is right on average, as the prior is: the log-likelihood
:math:`\log p(x_S \mid x_t, z)` of the tokens at the targets, a quantity of latent and data, does,
and stands beside them.

A uniform histogram says that the guide is right on average over rows that the *model* makes, not
that it is right for every row, nor on data that the model does not fit.

References:
    Talts et al. 2018 (arXiv 1804.06788); Modrak et al. 2023 (arXiv 2211.02383) for quantities that
    depend on the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vadd_pyro.inspection.draws import LatentDraws, posterior_draws, prior_draws
from vadd_pyro.inspection.scoring import model_log_density
from vadd_pyro.process import MaskedBatch, check_size
from vadd_pyro.programs import evaluation
from vadd_pyro.sampling import seeded

__all__ = ["Calibration", "calibrate_guide"]

_MOST_BINS = 20
_LEAST_IN_BIN = 5  # expected ranks of a bin, for the chi-square law to hold
_LIKELIHOOD = "log_likelihood"
_NOISE = 1e-4  # share of the log-likelihood's size: more than rounding, less than any meaning


class Calibration(NamedTuple):
    """Ranks of the model's own latents among a guide's draws.

    Args:
        ranks: ``(B, d + 1)`` long in ``0..num_draws``: coordinates of the latents, and last the
            log-likelihood; ``(B, 0)`` for a model without latents.
        names: what the columns are, such as ``"z[3]"``, and ``"log_likelihood"``.
        num_draws: draws of the guide for each row, ``L``.
        num_bins: bins of equal numbers of ranks, in which uniformity is tested.
        p_values: of the chi-square test of every column, ``(d + 1,)`` in double precision.
    """

    ranks: Tensor
    names: list[str]
    num_draws: int
    num_bins: int
    p_values: Tensor

    @property
    def p_value(self) -> float:
        """The smallest of the columns' p-values, times their number (Bonferroni), at most 1."""
        if not self.names:
            return 1.0
        return min(1.0, len(self.names) * float(self.p_values.min()))

    def counts(self) -> Tensor:
        """How many rows' ranks fall in each bin, ``(num_bins, d + 1)`` long."""
        return _counts(self.ranks, self.num_draws, self.num_bins)

    def contrasts(self) -> dict[str, tuple[float, float, float]]:
        """What tells the ways apart in which ranks can fail to be uniform.

        Returns:
            For each column the share of ranks in the lowest fifth, their share in the highest, and
            their mean as a share of ``num_draws``: each less what uniform ranks have, divided by
            its standard error under uniform ranks.
        """
        number, length = len(self.ranks), self.num_draws + 1
        in_end = -(-length // 5)
        end = in_end / length
        end_error = (end * (1 - end) / number) ** 0.5
        # Variance of a uniform law on 0..L.
        mean_error = ((length**2 - 1) / 12 / number) ** 0.5
        low = ((self.ranks < in_end).double().mean(0) - end) / end_error
        high = ((self.ranks >= length - in_end).double().mean(0) - end) / end_error
        mean = (self.ranks.double().mean(0) - self.num_draws / 2) / mean_error
        return {
            name: (float(low[i]), float(high[i]), float(mean[i]))
            for i, name in enumerate(self.names)
        }

    def shapes(self, level: float = 0.01) -> dict[str, str]:
        """How each column's ranks are distributed, in a word.

        Args:
            level: probability of any word but ``"uniform"`` anywhere if all columns are uniform:
                the contrasts (:meth:`contrasts`) and p-values are held against it divided by how
                many there are.

        Returns:
            ``"too narrow"`` (both ends are too full), ``"too wide"`` (both too empty),
            ``"shifted"`` (the mean is off), ``"uneven"`` (none of these, but a small p-value) or
            ``"uniform"``. Codes have no order: of theirs only uniform or not has a meaning. For
            the log-likelihood ``"shifted"`` is what a guide of wrong width gives.
        """
        from scipy.stats import norm

        share = level / max(1, 4 * len(self.names))
        limit = float(norm.isf(share / 2))
        words = {}
        columns = zip(self.contrasts().items(), self.p_values.tolist(), strict=True)
        for (name, (low, high, mean)), p_value in columns:
            if min(low, high) > limit:
                words[name] = "too narrow"
            elif max(low, high) < -limit:
                words[name] = "too wide"
            elif abs(mean) > limit:
                words[name] = "shifted"
            else:
                words[name] = "uneven" if p_value < share else "uniform"
        return words

    def shape(self, level: float = 0.01) -> str:
        """How the guide is wrong, in a word: that of the latent with the smallest p-value among
        those that are not uniform.

        Returns:
            A word of :meth:`shapes`; ``"uneven"`` if only the log-likelihood shows that the guide
            is wrong.
        """
        words = self.shapes(level)
        p_values = dict(zip(self.names, self.p_values.tolist(), strict=True))
        wrong = [name for name, word in words.items() if word != "uniform"]
        latents = [name for name in wrong if name != _LIKELIHOOD]
        if latents:
            return words[min(latents, key=lambda name: p_values[name])]
        return "uneven" if wrong else "uniform"


def calibrate_guide(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: MaskedBatch,
    num_draws: int = 99,
    *,
    seed: int | None = None,
    max_plate_nesting: int = 1,
    args: tuple[Any, ...] = (),
) -> Calibration:
    """Rank latents of the model's own rows among a guide's draws for those rows.

    Args:
        model, guide: a step program and its guide, run in evaluation mode without gradients.
        batch: rows whose states are taken, at least 10, each with a target; their data are not
            looked at.
        num_draws: the guide's draws of each row, ``L``; ``L + 1`` needs a divisor in 2..20 that
            leaves five rows a bin: ranks are tested in as many bins of equal size.
        seed: seed of this call; None draws on torch's global state.
        max_plate_nesting: depth of the plates of the programs.
        args: further arguments of the programs, the same for all rows.

    Returns:
        :class:`Calibration`. Latents that are summed out are drawn from the exact posterior:
        theirs are uniform by construction.

    Raises:
        ValueError: for too few rows, rows without a target, a number of draws that leaves no
        bins, or a pair that does not fit.
    """
    check_size("num_draws", num_draws)
    if not bool(batch.target.any(-1).all()):
        raise ValueError(
            f"row {int((~batch.target.any(-1)).nonzero()[0])} of the batch has no target, so that "
            "the guide has nothing to infer from: leave such rows out, batch[batch.target.any(-1)]"
        )
    num_bins = _num_bins(num_draws, len(batch))
    options: dict[str, Any] = {"max_plate_nesting": max_plate_nesting, "args": args}
    with seeded(seed), evaluation(model, guide):
        truth = prior_draws(model, batch, 1, **options)
        assert truth.tokens is not None
        rows = replace(batch, x_0=truth.tokens[0], weight=None)
        draws = posterior_draws(model, guide, rows, num_draws, **options)
        own, names = truth.columns()
        others, _ = draws.columns()
        if names:
            names = [*names, _LIKELIHOOD]
            own_likelihood, other_likelihood = _log_likelihood(model, rows, truth, draws, options)
            own = torch.cat([own[0].double(), own_likelihood], -1)
            others = torch.cat([others.double(), other_likelihood], -1)
        ties = (others == own).sum(0)
        broken = (torch.rand(ties.shape, device=ties.device) * (ties + 1)).long()
        ranks = (others < own).sum(0) + torch.minimum(broken, ties)
    return Calibration(ranks, names, num_draws, num_bins, _p_values(ranks, num_draws, num_bins))


def _num_bins(num_draws: int, num_rows: int) -> int:
    """The largest number of bins of equal size that leaves enough rows in each."""
    most = min(_MOST_BINS, num_rows // _LEAST_IN_BIN)
    if most < 2:
        raise ValueError(
            f"batch has {num_rows} rows: ranks in at least two bins need {2 * _LEAST_IN_BIN}"
        )
    bins = [number for number in range(2, most + 1) if (num_draws + 1) % number == 0]
    if not bins:
        raise ValueError(
            f"num_draws is {num_draws}: expected one more than it to have a divisor in 2..{most}, "
            "as 99 has, so that bins hold equal numbers of ranks"
        )
    return bins[-1]


def _log_likelihood(
    model: Any, rows: MaskedBatch, truth: LatentDraws, draws: LatentDraws, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """``log p(x_S | x_t, z)`` of the model's latents ``(B, 1)`` and the guide's ``(L, B, 1)``.

    A little noise breaks ties at random: equal codes differ by rounding, and a quantity with noise
    is as exchangeable as the one without.
    """
    assert truth.log_prior is not None
    assert draws.log_likelihood is not None
    own = model_log_density(model, rows, truth.sites, **options) - truth.log_prior
    value = torch.cat([own, draws.log_likelihood]).double()
    value = value + torch.rand_like(value) * _NOISE * (1 + value.abs().amax())
    return value[0].unsqueeze(-1), value[1:].unsqueeze(-1)


def _counts(ranks: Tensor, num_draws: int, num_bins: int) -> Tensor:
    """Ranks of each column by bin, ``(num_bins, columns)``."""
    bins = ranks * num_bins // (num_draws + 1)
    return torch.stack([(bins == number).sum(0) for number in range(num_bins)])


def _p_values(ranks: Tensor, num_draws: int, num_bins: int) -> Tensor:
    """Chi-square test that each column's ranks are uniform."""
    from scipy.stats import chi2

    expected = len(ranks) / num_bins
    statistic = ((_counts(ranks, num_draws, num_bins) - expected) ** 2 / expected).sum(0)
    return torch.as_tensor(chi2.sf(statistic.cpu().numpy(), num_bins - 1), dtype=torch.double)
