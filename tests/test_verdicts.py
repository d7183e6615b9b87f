"""Verdicts: what they call good and bad, and that they claim no more than was measured."""

from __future__ import annotations

import math

import pytest
import torch

from vadd_pyro import LatentStatistics
from vadd_pyro.inspection import verdicts


def statistics(kl, information, *, num_rows=500):
    return LatentStatistics(kl, [kl], ["z[0]"], 3, 4, information, 0.0, num_rows)


@pytest.mark.parametrize(
    ("kl", "information", "level", "said"),
    [
        (1.2, 1.1, "good", "healthy: KL 1.20 nats, mutual information of row and latent 1.10"),
        (0.01, 0.0, "bad", "collapsed: the posterior is the prior"),
        (0.9, 0.01, "bad", "collapsed: the guide differs from the prior but tells no rows apart"),
        (9.0, None, "good", "healthy: KL 9.00 nats; 3 of 4 latent units active"),
        (20.0, math.log(500), "good", "at least 6.21 nats (of 6.21 that 500 rows can show)"),
    ],
)
def test_a_latent_is_healthy_or_collapsed_and_a_ceiling_is_called_one(
    kl, information, level, said
):
    verdict = verdicts.latent_verdict(statistics(kl, information))
    assert verdict.level == level
    assert said in verdict.text


def coupling(value, stderr=0.01, bounds=None, truth=None, has_latent=True, length=4):
    bounds = (value, value) if bounds is None else bounds
    return verdicts.coupling_verdict(
        value, stderr, bounds, truth, has_latent=has_latent, length=length
    )


def test_coupling_is_judged_against_the_data_within_its_error():
    assert coupling(0.69, truth=0.693).level == "good"
    assert coupling(0.54, 0.02, truth=0.693).level == "warning"
    assert coupling(0.54, 0.09, truth=0.693).level == "good"  # as far as can be told
    assert coupling(0.1, truth=0.693).level == "bad"
    assert "14 % of the 0.693 nats" in coupling(0.1, truth=0.693).text
    assert coupling(0.5).level == "good"
    assert coupling(0.01).level == "note"  # perhaps there is nothing to couple
    assert coupling(0.0, length=1).level == "note"
    assert coupling(0.0, has_latent=False, truth=0.7).level == "note"
    assert coupling(0.0, truth=0.001).level == "note"


def test_a_coupling_that_was_not_resolved_is_not_reported_as_a_number():
    verdict = coupling(-17.5, 0.3, bounds=(-81.0, 46.5), truth=16.3)
    assert verdict.level == "note"
    assert verdict.text.startswith("between 0.00 and 46.50 nats: not resolved")


def test_k_hat_and_effective_shares_are_weighed_together():
    generator = torch.Generator().manual_seed(0)
    even = 0.1 * torch.randn(400, 50, generator=generator)
    uneven = 6.0 * torch.randn(400, 50, generator=generator)
    k = torch.full((50,), 0.2)
    assert verdicts.pareto_verdict(k, even, False).level == "good"
    k[:20] = 0.9
    good_enough = verdicts.pareto_verdict(k, even, False)
    assert good_enough.level == "warning"
    assert "above" not in good_enough.text
    assert "k̂ > 0.7 on 40 % of 50 rows" in good_enough.text
    assert "good enough for training and bounds" in good_enough.text
    assert verdicts.pareto_verdict(k, uneven, False).level == "bad"
    none = verdicts.pareto_verdict(torch.full((50,), torch.nan), even, False)
    assert none.level == "good"
    assert "no k̂" in none.text
    assert verdicts.pareto_verdict(torch.zeros(0), even, True).level == "good"


def test_effective_shares_are_those_of_equal_weights():
    log_weights = torch.tensor([[0.0, 0.0], [0.0, -200.0], [0.0, -200.0], [0.0, 0.0]])
    assert verdicts.effective_share(log_weights).tolist() == pytest.approx([1.0, 0.5])


def test_gaps_are_blamed_only_where_they_could_be_split():
    first, second = torch.tensor([0.5, 0.7]), torch.tensor([0.01, 0.03])
    elbo = torch.tensor([-3.0, -4.0])
    wide = verdicts.gap_verdict(first, second, elbo, 0.01, trained=True)
    assert wide.level == "bad"
    assert "a wider family would win most of it back" in wide.text
    longer = verdicts.gap_verdict(second, first, elbo, 0.01, trained=True)
    assert "longer training of the guide would win most of it back" in longer.text
    held = verdicts.gap_verdict(first, 0 * second, elbo, 0.01, trained=False)
    assert "cannot be split" in held.text
    assert "family" not in held.text
    assert held.numbers["approximation"] is None
    none = verdicts.gap_verdict(-0.001 * first, 0 * second, elbo, 0.01, trained=True)
    assert none.level == "good"
    assert none.text.startswith("the bound is the evidence within its error")


def test_calibration_names_a_shape_only_where_there_is_one():
    assert verdicts.calibration_verdict(0.3, "z", "uniform", 0.02, 900).level == "good"
    plain = verdicts.calibration_verdict(0.006, "z[1]", "uniform", 0.05, 900)
    assert plain.level == "warning"
    assert "the guide is" not in plain.text
    narrow = verdicts.calibration_verdict(1e-12, "z[1]", "too narrow", 0.2, 900)
    assert narrow.level == "bad"
    assert "not uniform in z[1]" in narrow.text
    assert "the guide is too narrow there" in narrow.text


def test_holes_count_only_where_rows_could_show_them():
    good = verdicts.aggregate_verdict(0.55, 0.02, 0.2, (0.0, 0.0), False)
    assert good.level == "good"
    assert "no holes found" in good.text
    assert verdicts.aggregate_verdict(0.8, 0.02, 1e-9, None, False).level == "bad"
    holes = verdicts.aggregate_verdict(0.5, 0.02, 1.0, (0.3, 0.02), False)
    assert holes.level == "bad"
    assert "30.0 % (± 2.0)" in holes.text
    saturated = verdicts.aggregate_verdict(0.5, 0.02, 1.0, (1.0, 0.0), True)
    assert saturated.level == "good"
    assert "cannot be seen" in saturated.text


def test_a_reference_that_has_not_mixed_judges_nobody():
    far = torch.tensor([0.1, 3.0])
    assert verdicts.reference_verdict(far, torch.ones(2)).level == "bad"
    assert verdicts.reference_verdict(far, torch.tensor([1.0, 1.3])).level == "note"
    assert verdicts.codes_verdict(torch.tensor([0.0, 0.02])).level == "good"
    assert verdicts.codes_verdict(torch.tensor([0.0, 0.9])).level == "bad"
