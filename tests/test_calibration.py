"""Ranks of the model's own latents among a guide's: uniform exactly where the guide is right."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import codes_of

from vadd_pyro import MaskedBatch, MaskingProcess, zoo
from vadd_pyro.inspection.calibration import Calibration, calibrate_guide

WEIGHTS = torch.tensor([[1.0, 0.8], [0.8, 1.2], [0.0, 0.5]])
SIGMA = 0.5


def linear(batch):
    """z ~ N(0, I), x = W z + noise: the posterior is a known normal."""
    with pyro.plate("data", len(batch), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = z @ WEIGHTS.T
        pyro.sample("x_0", dist.Normal(mean, SIGMA).to_event(1), obs=batch.x_0)


def linear_guide(width=1.0, shift=0.0, diagonal=False):
    precision = torch.eye(2) + WEIGHTS.T @ WEIGHTS / SIGMA**2
    covariance = precision.inverse()
    root = torch.linalg.cholesky(covariance)
    if diagonal:  # the right marginals, without the correlation
        root = covariance.diagonal().sqrt().diag()

    def guide(batch):
        loc = batch.x_0 @ WEIGHTS / SIGMA**2 @ covariance
        with pyro.plate("data", len(batch), dim=-1):
            off = shift * covariance.diagonal().sqrt()
            law = dist.MultivariateNormal(loc + off, scale_tril=root * width)
            pyro.sample("z", law)

    return guide


def blank(num_rows, length=3):
    everything = torch.ones(num_rows, length, dtype=torch.bool)
    empty = torch.zeros(num_rows, length)
    return MaskedBatch(empty, torch.ones(num_rows), everything, everything, empty)


def test_ranks_of_the_exact_posterior_are_uniform():
    p_values = []
    for seed in range(20):
        result = calibrate_guide(linear, linear_guide(), blank(400), seed=seed)
        assert result.names == ["z[0]", "z[1]", "log_likelihood"]
        assert result.ranks.shape == (400, 3)
        assert result.num_bins == 20
        assert result.ranks.min() >= 0
        assert result.ranks.max() <= 99
        assert result.counts().sum(0).tolist() == [400] * 3
        p_values.append(result.p_values)
        assert result.p_value > 1e-3
        assert result.shape() == "uniform"
    # The p-values are uniform themselves: mean 1/2 with standard error sqrt(1 / 12 / 60).
    assert torch.stack(p_values).mean().item() == pytest.approx(0.5, abs=4 * (1 / 720) ** 0.5)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"width": 0.5}, "too narrow"),
        ({"width": 2.0}, "too wide"),
        ({"shift": 0.7}, "shifted"),
        ({"shift": 3.0}, "shifted"),
        ({"shift": -0.7}, "shifted"),
    ],
)
def test_a_wrong_guide_is_seen_and_its_fault_named(options, word):
    result = calibrate_guide(linear, linear_guide(**options), blank(400), seed=1)
    assert (result.p_values[:2] < 1e-6).all()
    assert result.p_value < 1e-6
    assert result.shape() == word
    shapes = result.shapes()
    assert shapes["z[0]"] == shapes["z[1]"] == word


def prior_guide(batch):
    with pyro.plate("data", len(batch), dim=-1):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


@pytest.mark.parametrize("guide", [prior_guide, linear_guide(diagonal=True)])
def test_the_likelihood_sees_what_single_coordinates_cannot(guide):
    """The prior as a guide is right on average, and right marginals lack the correlation."""
    result = calibrate_guide(linear, guide, blank(2000), seed=1)
    assert (result.p_values[:2] > 1e-3).all()
    assert result.p_values[2] < 1e-4
    assert result.p_value < 1e-3
    assert result.shape() == "uneven"


def test_contrasts_are_in_standard_errors():
    """All ranks at the lowest place: a fifth expected there, and the mean at 0 instead of 4.5."""
    result = Calibration(torch.zeros(50, 1).long(), ["z"], 9, 5, torch.tensor([0.0]))
    low, high, mean = result.contrasts()["z"]
    assert low == pytest.approx(0.8 / (0.2 * 0.8 / 50) ** 0.5)
    assert high == pytest.approx(-0.2 / (0.2 * 0.8 / 50) ** 0.5)
    assert mean == pytest.approx(-4.5 / (8.25 / 50) ** 0.5)
    assert result.shape() == "shifted"


def test_uneven_ranks_without_a_trend_are_called_uneven():
    half = torch.tensor([40, 40, 80, 0, 40])
    counts = torch.cat([half, half.flip(0)])
    ranks = torch.repeat_interleave(5 + 10 * torch.arange(10), counts)
    ranks = torch.cat([ranks, 99 - ranks]).unsqueeze(-1)  # the mean is right
    result = Calibration(ranks, ["z"], 99, 10, torch.tensor([1e-12]))
    assert torch.equal(result.counts()[:, 0], 2 * counts)
    assert result.shape() == "uneven"


def codes(batch):
    with pyro.plate("data", len(batch), dim=-1):
        code = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
        logits = torch.tensor([[[2.0, 0, 0], [2, 0, 0]], [[0, 2, 0], [0, 0, 0]], [[0, 0, 1]] * 2])
        law = dist.Categorical(logits=logits[code]).mask(batch.target).to_event(1)
        pyro.sample("x_0", law, obs=batch.x_0)


def no_guide(batch):
    pass


def code_guide(power):
    """The exact posterior of the code, sharpened by a power."""

    def guide(batch):
        prior = torch.tensor([0.5, 0.3, 0.2]).log()
        logits = torch.tensor(
            [[[2.0, 0, 0], [2, 0, 0]], [[0, 2, 0], [0, 0, 0]], [[0, 0, 1]] * 2]
        ).log_softmax(-1)
        picked = logits[:, torch.arange(2), batch.x_0]  # (codes, B, D)
        posterior = prior + torch.where(batch.target, picked, 0.0).sum(-1).T
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Categorical(logits=posterior * power))

    return guide


@pytest.mark.parametrize("t", [0.5, 1.0])
@pytest.mark.parametrize("guide", [no_guide, code_guide(1.0)])
def test_codes_are_uniform_with_ties_broken_at_random(guide, t):
    process = MaskingProcess(3, 2)
    batch = process.corrupt(torch.randint(3, (2000, 2)), t)
    batch = batch[batch.target.any(-1)]
    p_values = torch.cat(
        [calibrate_guide(codes, guide, batch, seed=seed).p_values for seed in range(4)]
    )
    assert len(p_values) == 8
    assert p_values.min() > 1e-3


def test_a_likelihood_that_is_always_the_same_has_uniform_ranks():
    """All values are ties up to rounding, which is not the same on both sides."""

    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            law = dist.Categorical(logits=torch.tensor([0.3, 1.0, 0.1]).expand(len(batch), 2, 3))
            pyro.sample("x_0", law.mask(batch.target).to_event(1), obs=batch.x_0)

    batch = MaskingProcess(3, 2).corrupt(torch.zeros(2000, 2).long(), 1.0)
    result = calibrate_guide(model, prior_guide, batch, seed=0)
    assert result.p_values.min() > 1e-3


@pytest.mark.parametrize("power", [0.0, 3.0])
def test_codes_of_a_wrong_guide_are_seen(power):
    batch = MaskingProcess(3, 2).corrupt(torch.randint(3, (2000, 2)), 1.0)
    assert calibrate_guide(codes, code_guide(power), batch, seed=0).p_value < 1e-6


PAIRS = [(prior, "auto") for prior in zoo.PRIORS]
PAIRS += [("standard_normal", g) for g in ("low_rank", "full", "flow", "semi_amortized")]
PAIRS += [("mixture", "mixture"), ("hierarchical", "bottom_up")]


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_every_pair_of_the_zoo_is_calibrated(prior, guide):
    process = MaskingProcess(3, 4)
    model, guide, _ = zoo.build(prior, guide, process, hidden_dim=16, num_codes=codes_of(prior))
    x_0 = torch.randint(3, (60, 4))
    batch = process.corrupt(x_0, 0.9)
    batch = batch[batch.target.any(-1)]
    before = torch.random.get_rng_state()
    result = calibrate_guide(model, guide, batch, 19, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    again = calibrate_guide(model, guide, batch, 19, seed=3)
    assert torch.equal(result.ranks, again.ranks)
    assert result.ranks.shape == (len(batch), len(result.names))
    assert result.p_values.shape == (len(result.names),)
    if prior == "none":
        assert result.names == []
        assert result.p_value == 1.0
        assert result.shape() == "uniform"
    else:
        assert result.names[-1] == "log_likelihood"
        assert result.num_bins == 10
        assert result.ranks.min() >= 0
        assert result.ranks.max() <= 19
        assert 0 < result.p_value <= 1
        assert math.isfinite(result.p_value)


@pytest.mark.parametrize("guide", ["score", "straight_through"])
def test_codes_with_a_guide_are_calibrated(guide):
    process = MaskingProcess(3, 4)
    prior = "product_one_hot" if guide == "straight_through" else "product"
    model, guide, _ = zoo.build(prior, guide, process, hidden_dim=16, num_codes=codes_of(prior))
    result = calibrate_guide(model, guide, process.corrupt(torch.zeros(40, 4).long(), 1.0), 19)
    assert result.names == ["z[0]", "z[1]", "log_likelihood"]


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="batch has 9 rows"):
        calibrate_guide(linear, linear_guide(), blank(9))
    with pytest.raises(ValueError, match="num_draws is 100"):
        calibrate_guide(linear, linear_guide(), blank(400), 100)
    with pytest.raises(ValueError, match="num_draws must be"):
        calibrate_guide(linear, linear_guide(), blank(400), 0)
    everything = blank(20)
    none = torch.zeros(20, 3, dtype=torch.bool)
    empty = MaskedBatch(everything.x_t, everything.t, everything.masked, none, everything.x_0)
    with pytest.raises(ValueError, match="row 0 of the batch has no target"):
        calibrate_guide(linear, linear_guide(), empty)
