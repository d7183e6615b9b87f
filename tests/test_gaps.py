"""Approximation and amortisation gaps against closed forms, and what refinement leaves alone."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import small_pair
from pyro.nn import PyroModule
from torch import nn

from vadd_pyro import MaskingProcess, guides, zoo
from vadd_pyro.inspection.draws import LatentDraws, posterior_draws
from vadd_pyro.inspection.gaps import InferenceGaps, _bridge, inference_gaps, refine_guide
from vadd_pyro.inspection.reference import reference_posterior
from vadd_pyro.inspection.scoring import model_log_density
from vadd_pyro.process import MaskedBatch
from vadd_pyro.programs import Program

PROCESS = MaskingProcess(3, 2)
ROWS = PROCESS.corrupt(torch.tensor([[0, 1], [2, 2]]), 1.0)

W = torch.tensor([[1.0, 0.9], [0.4, 0.9], [0.9, 0.3]])
SHIFT = torch.tensor([0.2, -0.1, 0.4])
SIGMA = 0.6
X = torch.tensor([[0.3, -1.0, 1.2], [2.0, 0.5, -0.7]])
EVERYWHERE = torch.ones(X.shape, dtype=torch.bool)
BATCH = MaskedBatch(torch.full(X.shape, 3), torch.ones(2), EVERYWHERE, EVERYWHERE, X)
PRECISION = torch.eye(2) + W.T @ W / SIGMA**2
COVARIANCE = torch.linalg.inv(PRECISION)
GAIN = COVARIANCE @ W.T / SIGMA**2


def linear(batch):
    with pyro.plate("data", len(batch), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        law = dist.Normal(z @ W.T + SHIFT, SIGMA).to_event(1)
        pyro.sample("x_0", law, obs=batch.x_0)


def log_evidence() -> torch.Tensor:
    covariance = W @ W.T + SIGMA**2 * torch.eye(3)
    return dist.MultivariateNormal(SHIFT, covariance).log_prob(X)


class Gaussian(Program):
    """A normal whose mean is affine in the row, and whose factor is the same for all."""

    def __init__(self, scale_tril: torch.Tensor, shift: torch.Tensor, *, diagonal: bool = False):
        super().__init__()
        self.mean = nn.Linear(3, 2)
        with torch.no_grad():
            self.mean.weight.copy_(GAIN)
            self.mean.bias.copy_(shift - GAIN @ SHIFT)
        self.scale_tril = nn.Parameter(scale_tril.clone())
        self.diagonal = diagonal

    def forward(self, batch):
        factor = self.scale_tril
        factor = torch.diag(factor.diag()) if self.diagonal else factor.tril()
        with pyro.plate("data", len(batch), dim=-1):
            law = dist.MultivariateNormal(self.mean(batch.x_0), scale_tril=factor)
            pyro.sample("z", law)


@pytest.fixture(scope="module")
def reference():
    return reference_posterior(linear, BATCH, 16, num_chains=40, num_warmup=50, seed=0)


def assert_near(value: torch.Tensor, truth: object, stderr: torch.Tensor, slack: float) -> None:
    assert ((value - torch.as_tensor(truth)).abs() < 4 * stderr + slack).all()


TRIL = torch.linalg.cholesky(COVARIANCE)
MEAN_FIELD = torch.diag(PRECISION.diag().rsqrt())


def test_an_exact_guide_has_no_gaps(reference):
    gaps = inference_gaps(
        linear, Gaussian(TRIL, torch.zeros(2)), BATCH, reference=reference, seed=0
    )
    assert_near(gaps.log_evidence, log_evidence(), gaps.log_evidence_stderr, 1e-4)
    assert_near(gaps.elbo, log_evidence(), gaps.elbo_stderr, 1e-4)
    assert (gaps.approximation.abs() < 1e-3).all()
    assert (gaps.amortisation.abs() < 1e-3).all()


def test_a_mean_field_guide_at_its_optimum_has_the_approximation_gap_of_its_family(reference):
    guide = Gaussian(MEAN_FIELD, torch.zeros(2), diagonal=True)
    gaps = inference_gaps(linear, guide, BATCH, reference=reference, seed=0)
    gap = 0.5 * (PRECISION.diag().log().sum() - PRECISION.logdet())
    assert float(gap) > 0.1
    assert_near(gaps.log_evidence, log_evidence(), gaps.log_evidence_stderr, 0.0)
    assert_near(gaps.approximation, gap, gaps.approximation_stderr, 0.003)
    assert_near(gaps.amortisation, 0.0, gaps.amortisation_stderr, 0.003)
    assert (gaps.log_evidence_stderr < 0.05).all()
    assert (gaps.amortisation_stderr < gaps.elbo_stderr).all()


def test_a_shifted_guide_of_the_exact_family_has_an_amortisation_gap_alone(reference):
    shift = torch.tensor([0.3, -0.2])
    guide = Gaussian(TRIL, shift)
    before = [parameter.detach().clone() for parameter in guide.parameters()]
    random_state = torch.get_rng_state()
    gaps = inference_gaps(linear, guide, BATCH, reference=reference, seed=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    gap = 0.5 * shift @ PRECISION @ shift
    assert float(gap) > 0.1
    assert_near(gaps.amortisation, gap, gaps.amortisation_stderr, 0.003)
    assert_near(gaps.approximation, 0.0, gaps.approximation_stderr, 0.003)
    for parameter, value in zip(guide.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is None


def test_a_guide_that_draws_on_the_way_to_its_law_is_bridged_by_one_law(reference):
    class Restless(Gaussian):
        def forward(self, batch):
            with pyro.plate("data", len(batch), dim=-1):
                loc = self.mean(batch.x_0) + 0.3 * torch.randn(2)
                pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=self.scale_tril))

    guide = Restless(TRIL, torch.zeros(2)).requires_grad_(False)
    gaps = inference_gaps(linear, guide, BATCH, reference=reference, seed=3)
    assert_near(gaps.log_evidence, log_evidence(), gaps.log_evidence_stderr, 0.0)
    assert (gaps.log_evidence_stderr < 0.1).all()


def test_parts_add_up_to_the_whole_gap(reference):
    guide = Gaussian(0.5 * TRIL, torch.zeros(2))
    gaps = inference_gaps(linear, guide, BATCH, reference=reference, num_iterations=2, seed=0)
    whole = gaps.log_evidence - gaps.elbo
    torch.testing.assert_close(gaps.approximation + gaps.amortisation, whole)
    # Both covariances differ by a factor of 4 in every direction.
    truth = 0.5 * (2 * 0.25 - 2 + 2 * math.log(4))
    assert_near(whole, truth, (gaps.log_evidence_stderr**2 + gaps.elbo_stderr**2).sqrt(), 0.0)
    assert isinstance(gaps, InferenceGaps)


def test_the_bridge_estimates_the_evidence_within_its_error():
    """Draws of N(0, 1) with evidence e^2, and of a guide half as wide and to one side."""
    torch.manual_seed(0)
    target, guide = dist.Normal(0.0, 1.0), dist.Normal(0.7, 0.5)
    scores, importance = [], []
    for _ in range(100):
        at_guide, at_target = guide.sample((500,)).double(), target.sample((400,)).double()

        def ratio(z):
            return 2 + target.log_prob(z) - guide.log_prob(z)

        value, stderr = _bridge(ratio(at_guide), ratio(at_target), 400.0, 4)
        scores.append(float((value - 2) / stderr))
        importance.append(float(ratio(at_guide).exp().mean().log() - 2))
    scores = torch.tensor(scores)
    assert abs(float(scores.mean())) < 0.4
    assert 0.75 < float(scores.std()) < 1.3
    assert torch.tensor(importance).mean() < -0.05  # what the guide alone would say


def test_codes_have_their_evidence_by_enumeration_and_no_gap_without_a_guide():
    model, guide = small_pair("categorical", PROCESS)
    gaps = inference_gaps(model, guide, ROWS, num_draws=50, seed=0)
    torch.testing.assert_close(gaps.log_evidence, model_log_density(model, ROWS, {})[0])
    for value in (gaps.log_evidence_stderr, gaps.approximation, gaps.amortisation):
        torch.testing.assert_close(value, torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("estimator", ["enumerate", "score"])
def test_a_guide_over_codes_has_an_amortisation_gap_that_refinement_closes(estimator):
    model, guide, _ = zoo.build("categorical", estimator, PROCESS, hidden_dim=8, num_codes=5)
    with torch.no_grad():
        guide.head.linear.bias.copy_(torch.tensor([3.0, 0.0, 0.0, 0.0, -1.0]))
    codes = torch.arange(5).unsqueeze(-1).expand(5, 2)
    posterior = model_log_density(model, ROWS, {"z": codes}).log_softmax(0)

    with pyro.poutine.trace() as tracer, torch.no_grad():
        guide(ROWS)
    law = tracer.trace.nodes["z"]["fn"].probs.T
    truth = (law * (law.log() - posterior)).sum(0)
    gaps = inference_gaps(model, guide, ROWS, seed=1)
    assert (truth > 0.5).all()
    assert_near(gaps.amortisation, truth, gaps.amortisation_stderr, 0.003)
    assert_near(gaps.approximation, 0.0, gaps.approximation_stderr, 0.003)
    assert torch.equal(gaps.log_evidence_stderr, torch.zeros(2))


@pytest.mark.parametrize("prior", ["vamp", "hierarchical", "spherical"])
def test_refinement_raises_the_bound_and_leaves_the_pair_alone(prior):
    model, guide, _ = zoo.build(prior, "auto", PROCESS, hidden_dim=8)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(2.0)
    model.train()
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in (model, guide)]
    store = list(pyro.get_param_store())
    refined = refine_guide(model, guide, ROWS, num_iterations=60, num_particles=8, seed=0)
    assert len(refined) == 2
    for program, state in zip((model, guide), states, strict=True):
        assert all(torch.equal(state[k], v) for k, v in program.state_dict().items())
        assert all(parameter.grad is None for parameter in program.parameters())
    assert model.training
    assert list(pyro.get_param_store()) == store
    before = posterior_draws(model, guide, ROWS, 1000, seed=1).log_weights
    for b, own in enumerate(refined):
        after = posterior_draws(model, own, ROWS[b : b + 1], 1000, seed=1).log_weights
        gain = after[:, 0] - before[:, b]
        assert float(gain.mean()) > 2 * float(gain.std()) / math.sqrt(1000)


def parametric(batch):
    loc = pyro.param("loc", torch.tensor([1.0, -1.0]))
    scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
    with pyro.plate("data", len(batch), dim=-1):
        pyro.sample("z", dist.Normal(loc, scale).expand([len(batch), 2]).to_event(1))


def test_a_plain_function_is_refined_with_values_of_its_own(reference):
    options = dict(reference=reference, learning_rate=0.05, seed=0)
    gaps = inference_gaps(linear, parametric, BATCH, **options)
    store = pyro.get_param_store()
    assert torch.equal(store["loc"], torch.tensor([1.0, -1.0]))
    assert torch.equal(store["scale"], torch.ones(2))
    gap = 0.5 * (PRECISION.diag().log().sum() - PRECISION.logdet())
    assert_near(gaps.approximation, gap, gaps.approximation_stderr, 0.005)
    shift = torch.tensor([1.0, -1.0]) - (X - SHIFT) @ GAIN.T
    whole = 0.5 * (
        PRECISION.trace() - 2 - PRECISION.logdet() + ((shift @ PRECISION) * shift).sum(-1)
    )
    assert_near(gaps.amortisation, whole - gap, gaps.amortisation_stderr, 0.01)


def test_a_pyro_module_is_refined_in_place_and_put_back():
    class Own(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor([1.0, -1.0]))

        def forward(self, batch):
            with pyro.plate("data", len(batch), dim=-1):
                pyro.sample("z", dist.Normal(self.loc, 0.4).expand([len(batch), 2]).to_event(1))

    guide = Own()
    refined = refine_guide(linear, guide, BATCH, learning_rate=0.05, seed=0)
    assert torch.equal(guide.loc, torch.tensor([1.0, -1.0]))
    for row, own in zip(BATCH.split(1), refined, strict=True):
        draws = posterior_draws(linear, own, row, 2000, seed=0)
        mean = (row.x_0 - SHIFT)[0] @ GAIN.T
        assert ((draws.sites["z"].mean((0, 1)) - mean).abs() < 0.1).all()
        # Its density has its values too, after the original got its own back.
        joint = draws.log_likelihood + draws.log_prior
        law = dist.Normal(draws.sites["z"].mean(0), 0.4).to_event(1)
        log_r = law.log_prob(draws.sites["z"])
        torch.testing.assert_close(joint - draws.log_weights, log_r, atol=0.3, rtol=0.0)
    assert torch.equal(guide.loc, torch.tensor([1.0, -1.0]))


def test_a_guide_that_cannot_be_copied_must_not_share_parameters():
    model, guide = small_pair("standard_normal", PROCESS)

    def sharing(batch):
        pyro.module("decoder", model.decoder)
        guide(batch)

    with pytest.raises(ValueError, match=r"guide shares \d+ parameters with the model"):
        refine_guide(model, sharing, ROWS)


def test_a_guide_given_by_a_change_of_variables_gets_its_evidence_by_importance():
    class Changed(Program):
        def __init__(self):
            super().__init__()
            self.loc = nn.Linear(3, 2)
            with torch.no_grad():
                self.loc.weight.copy_(GAIN)
                self.loc.bias.copy_(-GAIN @ SHIFT)

        def forward(self, batch):
            with pyro.plate("data", len(batch), dim=-1):
                noise = dist.Normal(self.loc(batch.x_0), 0.5).to_event(1)
                u = pyro.sample("u", noise, infer={"is_auxiliary": True})
                pyro.sample("z", dist.Delta(u, event_dim=1))

    gaps = inference_gaps(linear, Changed(), BATCH, num_iterations=5, seed=0)
    assert_near(gaps.log_evidence, log_evidence(), gaps.log_evidence_stderr, 0.0)
    assert (gaps.log_evidence_stderr < 0.05).all()


def test_a_guide_without_a_latent_is_its_own_refinement():
    model, guide = small_pair("none", PROCESS)
    assert refine_guide(model, guide, ROWS) == [guide, guide]
    gaps = inference_gaps(model, guides.NoLatent(), ROWS, num_draws=10)
    assert torch.equal(gaps.amortisation, torch.zeros(2))


def test_contradictory_arguments_are_refused_before_any_work(reference):
    other = reference._replace(draws=LatentDraws(reference.draws.sites, ROWS))
    guide = Gaussian(TRIL, torch.zeros(2))
    with pytest.raises(ValueError, match="reference holds draws for other rows"):
        inference_gaps(linear, guide, BATCH, reference=other)
    with pytest.raises(ValueError, match="num_draws must be an integer of at least 2, got 1"):
        inference_gaps(linear, guide, BATCH, num_draws=1)
    with pytest.raises(ValueError, match=r"learning_rate must be positive and finite, got -1\.0"):
        refine_guide(linear, guide, BATCH, learning_rate=-1.0)
    with pytest.raises(ValueError, match="x_0 is None"):
        inference_gaps(linear, guide, BATCH.without_data())
