"""The aggregate posterior against the prior: filled, or with holes."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import codes_of, small_pair
from scipy.stats import norm

from vadd_pyro import MaskingProcess, zoo
from vadd_pyro.inspection.aggregate import (
    aggregate_codes,
    aggregate_log_density,
    aggregate_posterior,
    prior_log_density,
    two_sample_test,
)
from vadd_pyro.inspection.scoring import guide_log_density

PROCESS = MaskingProcess(2, 3)


class HalfNormal(dist.Normal):
    """A standard normal cut to the side of its sign."""

    def __init__(self, sign):
        self.sign = sign
        super().__init__(torch.zeros_like(sign), 1.0, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return HalfNormal(self.sign.expand(batch_shape))

    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).abs() * self.sign

    def log_prob(self, value):
        inside = value * self.sign > 0
        return torch.where(inside, super().log_prob(value) + math.log(2), -math.inf)


def tied(batch):
    """Tied fair bits: all zeros where z < 0, all ones where z > 0."""
    with pyro.plate("data", len(batch), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        logits = (z.sign() * 20).unsqueeze(-1).expand(*z.shape, 3)
        law = dist.Categorical(logits=torch.stack([-logits, logits], -1))
        pyro.sample("x_0", law.mask(batch.target).to_event(1), obs=batch.x_0)


def half_normal_guide(batch):
    with pyro.plate("data", len(batch), dim=-1):
        pyro.sample("z", HalfNormal(2.0 * batch.x_0[:, 0] - 1))


def narrow_guide(batch):
    with pyro.plate("data", len(batch), dim=-1):
        pyro.sample("z", dist.Normal(4.0 * batch.x_0[:, 0] - 2, 0.1))


def prior_guide(batch):
    with pyro.plate("data", len(batch), dim=-1):
        pyro.sample("z", dist.Normal(torch.zeros(len(batch)), 1.0))


def tied_rows(num_rows, t=1.0):
    x_0 = torch.arange(num_rows).remainder(2).unsqueeze(-1).expand(-1, 3).contiguous()
    batch = PROCESS.corrupt(x_0, t)
    return batch[batch.target.any(-1)]


@pytest.mark.parametrize("guide", [prior_guide, half_normal_guide])
def test_an_aggregate_equal_to_the_prior_is_not_told_from_it_and_has_no_holes(guide):
    results = [
        aggregate_posterior(tied, guide, tied_rows(600), num_prior_draws=200, seed=seed)
        for seed in range(6)
    ]
    for result in results:
        assert result.posterior.shape == result.prior.shape == (600, 1)
        assert result.names == ["z"]
        assert result.holes == 0.0
        assert result.holes_stderr == 0.0
        assert result.accuracy == pytest.approx(0.5, abs=4 * result.stderr)
        assert result.p_value > 1e-3
    # 1,200 draws are told, half of them by each of two classifiers that may err alike.
    assert results[0].stderr == pytest.approx((0.25 / 600) ** 0.5, rel=0.1)


def test_a_guide_that_leaves_most_of_the_prior_empty_has_holes():
    result = aggregate_posterior(tied, narrow_guide, tied_rows(600), num_prior_draws=500, seed=0)
    z = torch.linspace(-6, 6, 200001, dtype=torch.double)
    p = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    q = sum(torch.exp(-(((z - m) / 0.1) ** 2) / 2) for m in (-2, 2))
    q = q / (2 * 0.1 * math.sqrt(2 * math.pi))
    share = float(p[q < 0.1 * p].sum() * (z[1] - z[0]))
    best = 0.5 + float((p - q).abs().sum() * (z[1] - z[0])) / 4
    assert share > 0.9
    assert result.holes == pytest.approx(share, abs=4 * result.holes_stderr)
    assert result.holes_stderr == pytest.approx((share * (1 - share) / 500) ** 0.5, rel=0.3)
    assert result.accuracy == pytest.approx(best, abs=0.02 + 4 * result.stderr)
    assert result.p_value < 1e-20


def test_rows_of_many_states_are_held_against_the_prior_in_those_states():
    result = aggregate_posterior(tied, prior_guide, tied_rows(600, 0.5), seed=0)
    assert result.holes == 0.0
    assert result.p_value > 1e-3
    known = aggregate_posterior(tied, narrow_guide, tied_rows(600, 0.5), seed=0)
    assert known.holes > 0.9
    assert known.p_value < 1e-20


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dims", [1, 4])
def test_accuracy_nears_that_of_the_best_rule_and_stays_below(shift, dims):
    generator = torch.Generator().manual_seed(dims)
    first, second = torch.randn(2, 1500, dims, generator=generator)
    second[:, 0] += shift
    best = norm.cdf(shift / 2)
    results = [two_sample_test(first, second, seed=seed) for seed in range(2)]
    for result in results:
        assert result.accuracy <= best + 3 * result.stderr
        assert result.accuracy >= best - 0.03 - 3 * result.stderr
        assert (result.p_value < 1e-6) == (shift > 0)
    assert results[0].accuracy != results[1].accuracy
    assert two_sample_test(first, second, seed=0) == results[0]


def test_p_values_of_equal_laws_are_valid():
    generator = torch.Generator().manual_seed(0)
    p_values = []
    for seed in range(60):
        first, second = torch.randn(2, 60, 2, generator=generator)
        p_values.append(two_sample_test(first, second, seed=seed).p_value)
    small = sum(p <= 0.2 for p in p_values)
    # At most 12 expected; four standard errors above that.
    assert small <= 12 + 4 * (60 * 0.2 * 0.8) ** 0.5
    assert min(p_values) < 0.9


def test_correlation_alone_is_seen():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 1000, 2, generator=generator)
    second = second @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])
    assert two_sample_test(first, second, seed=0).p_value < 1e-6


def test_densities_are_averages_over_rows_and_states():
    model, guide = small_pair("conditional_normal", PROCESS)
    batch = PROCESS.corrupt(torch.randint(2, (30, 3)), 0.6)
    batch = batch[batch.target.any(-1)]
    values = {"z": torch.randn(7, 2)}
    log_q = aggregate_log_density(guide, batch, values)
    with torch.no_grad():
        each = [
            guide_log_density(guide, batch[i : i + 1], {"z": values["z"].unsqueeze(1)})
            for i in range(len(batch))
        ]
    expected = torch.cat(each, 1).double().exp().mean(1).log()
    assert torch.allclose(log_q, expected, atol=1e-5)
    log_p = prior_log_density(model, batch, values)
    with torch.no_grad():
        each = [
            model.prior(batch[i : i + 1]).log_prob(values["z"].unsqueeze(1))
            for i in range(len(batch))
        ]
    expected = torch.cat(each, 1).double().exp().mean(1).log()
    assert torch.cat(each, 1).std(1).min() > 0.01  # the prior does depend on the state
    assert torch.allclose(log_p, expected, atol=1e-5)


def test_a_prior_that_ignores_the_state_is_asked_in_one_state():
    model, _ = small_pair("mixture_of_normals", PROCESS)
    batch = PROCESS.corrupt(torch.randint(2, (30, 3)), 0.6)
    values = {"z": torch.randn(50, 2)}
    rows = []
    model.decoder.register_forward_hook(lambda *inputs: rows.append(inputs[2].shape))
    log_p = prior_log_density(model, batch, values)
    assert torch.allclose(log_p, model.prior(batch[:1]).log_prob(values["z"]).double(), atol=1e-5)
    assert [shape[:2] for shape in rows[1:]] == [(50, 1)]


def codes(batch):
    """Two codes of three for the two tokens seen, a third for a token that no row has."""
    with pyro.plate("data", len(batch), dim=-1):
        code = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.2, 0.3])))
        logits = 20 * torch.eye(3)[code].unsqueeze(-2).expand(*code.shape, 2, 3)
        law = dist.Categorical(logits=logits).mask(batch.target).to_event(1)
        pyro.sample("x_0", law, obs=batch.x_0)


def no_guide(batch):
    pass


def code_guide(batch):
    with pyro.plate("data", len(batch), dim=-1):
        pyro.sample("z", dist.Categorical(logits=20 * torch.eye(3)[batch.x_0[:, 0]]))


def test_holes_of_codes_are_exact():
    process = MaskingProcess(3, 2)
    x_0 = torch.tensor([[0, 0]] * 150 + [[1, 1]] * 50)
    batch = process.corrupt(x_0, 1.0)
    posterior, prior = aggregate_codes(codes, batch)
    assert torch.allclose(prior, torch.tensor([0.5, 0.2, 0.3]).double(), atol=1e-6)
    assert torch.allclose(posterior, torch.tensor([0.75, 0.25, 0.0]).double(), atol=1e-6)
    result = aggregate_posterior(codes, no_guide, batch, seed=0)
    assert result.holes == pytest.approx(0.3, abs=1e-6)
    assert result.holes_stderr == 0.0
    assert result.p_value < 1e-4
    assert result.accuracy > 0.6
    drawn = aggregate_posterior(codes, code_guide, batch, num_prior_draws=500, seed=0)
    assert drawn.holes == pytest.approx(0.3, abs=4 * drawn.holes_stderr)
    assert 0 < drawn.holes_stderr < 0.03


def test_codes_beside_a_continuous_latent_are_summed_out_of_the_prior():
    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            code = pyro.sample("c", dist.Categorical(torch.tensor([0.7, 0.3])))
            z = pyro.sample("z", dist.Normal(3.0 * code - 1, 1.0))
            logits = torch.stack([z, -z], -1).unsqueeze(-2)
            law = dist.Categorical(logits=logits.expand(*logits.shape[:-2], 3, 2))
            pyro.sample("x_0", law.mask(batch.target).to_event(1), obs=batch.x_0)

    z = torch.linspace(-3, 4, 5)
    weights = torch.tensor([0.7, 0.3]).log().unsqueeze(-1)
    each = dist.Normal(torch.tensor([[-1.0], [2.0]]), 1.0).log_prob(z)
    log_p = prior_log_density(model, tied_rows(30), {"z": z})
    assert torch.allclose(log_p, (weights + each).logsumexp(0).double(), atol=1e-5)


def test_many_codes_are_laid_out_for_some_rows_at_a_time(monkeypatch):
    process = MaskingProcess(3, 4)
    model, _, _ = zoo.build("conditional_categorical", "auto", process, hidden_dim=16, num_codes=9)
    batch = process.corrupt(torch.randint(3, (40, 4)), 0.7)
    whole = aggregate_codes(model, batch)
    monkeypatch.setattr("vadd_pyro.inspection.aggregate._LOGITS", 112)
    parts = aggregate_codes(model, batch)
    for one, other in zip(whole, parts, strict=True):
        assert one.sum().item() == pytest.approx(1, abs=1e-6)
        assert torch.allclose(one, other, atol=1e-6)


def test_a_density_through_auxiliary_sites_leaves_holes_unknown():
    def guide(batch):
        with pyro.plate("data", len(batch), dim=-1):
            raw = pyro.sample(
                "raw", dist.Normal(torch.zeros(len(batch)), 1.0), infer={"is_auxiliary": True}
            )
            pyro.sample("z", dist.Delta(2 * raw, log_density=-math.log(2.0)))

    result = aggregate_posterior(tied, guide, tied_rows(100), seed=0)
    assert result.holes is None
    assert result.holes_stderr is None
    assert 0.4 < result.accuracy < 0.9


PAIRS = [(prior, "auto") for prior in zoo.PRIORS]
PAIRS += [("standard_normal", g) for g in ("low_rank", "full", "flow", "semi_amortized")]
PAIRS += [("mixture", "mixture"), ("hierarchical", "bottom_up")]


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_every_pair_of_the_zoo_is_compared(prior, guide):
    process = MaskingProcess(3, 4)
    model, guide, _ = zoo.build(prior, guide, process, hidden_dim=16, num_codes=codes_of(prior))
    batch = process.corrupt(torch.randint(3, (60, 4)), 0.9)
    batch = batch[batch.target.any(-1)]
    before = torch.random.get_rng_state()
    result = aggregate_posterior(model, guide, batch, num_prior_draws=20, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert result.posterior.shape == result.prior.shape == (len(batch), len(result.names))
    assert 0 <= result.holes <= 1
    assert 0 <= result.accuracy <= 1
    assert 0 < result.p_value <= 1
    if prior == "none":
        assert result.names == []
        assert result.accuracy == 0.5
        assert result.p_value == 1


@pytest.mark.parametrize("guide", ["score", "straight_through"])
def test_codes_with_a_guide_are_compared(guide):
    process = MaskingProcess(3, 4)
    prior = "product_one_hot" if guide == "straight_through" else "product"
    model, guide, _ = zoo.build(prior, guide, process, hidden_dim=16, num_codes=codes_of(prior))
    batch = process.corrupt(torch.randint(3, (60, 4)), 1.0)
    result = aggregate_posterior(model, guide, batch, seed=3)
    assert 0 <= result.holes <= 1
    assert result.names == ["z[0]", "z[1]"]


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="there are 19 rows"):
        aggregate_posterior(tied, prior_guide, tied_rows(19))
    with pytest.raises(ValueError, match="num_prior_draws must be"):
        aggregate_posterior(tied, prior_guide, tied_rows(20), num_prior_draws=0)
    with pytest.raises(ValueError, match=r"x_0 is None"):
        aggregate_posterior(tied, prior_guide, tied_rows(20).without_data())
    with pytest.raises(ValueError, match="one number of latents"):
        aggregate_log_density(prior_guide, tied_rows(20), {})
    with pytest.raises(ValueError, match="latent 'z'"):
        prior_log_density(tied, tied_rows(20), {"other": torch.zeros(3)})
    with pytest.raises(ValueError, match="latent 'z'"):
        aggregate_codes(tied, tied_rows(20))
    with pytest.raises(ValueError, match="one shape"):
        two_sample_test(torch.zeros(30, 2), torch.zeros(30, 3))
