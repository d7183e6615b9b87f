"""The reference posterior against closed forms, enumeration and quadrature."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import all_rows, small_pair

from vadd_pyro import MaskingProcess, zoo
from vadd_pyro.distributions import ProjectedNormal, TokenCategorical
from vadd_pyro.inspection.draws import posterior_draws
from vadd_pyro.inspection.reference import ReferencePosterior, reference_posterior
from vadd_pyro.inspection.scoring import model_log_density
from vadd_pyro.process import MaskedBatch

PROCESS = MaskingProcess(3, 2)
ROWS = PROCESS.corrupt(torch.tensor([[0, 1], [2, 2]]), 1.0)
SHORT = dict(num_draws=16, num_chains=40, num_warmup=50)  # a draw of many chains costs one of one

W = torch.tensor([[1.0, 0.5], [-0.4, 1.2], [0.8, 0.3]])
SHIFT = torch.tensor([0.2, -0.1, 0.4])
SIGMA = 0.6


def linear(batch):
    with pyro.plate("data", len(batch), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        law = dist.Normal(z @ W.T + SHIFT, SIGMA).to_event(1)
        pyro.sample("x_0", law, obs=batch.x_0)


def observed(x: torch.Tensor) -> MaskedBatch:
    """Rows of numbers in the place of tokens, all masked."""
    everywhere = torch.ones(x.shape, dtype=torch.bool)
    return MaskedBatch(torch.full(x.shape, 3), torch.ones(len(x)), everywhere, everywhere, x)


def assert_mean(values: torch.Tensor, truth: torch.Tensor, size: torch.Tensor) -> None:
    """Means over draws ``(S, B, ...)`` within 4.5 standard errors, by effective sizes ``(B,)``."""
    size = size.reshape(-1, *(1,) * (values.dim() - 2))
    error = values.std(0) / size.sqrt()
    assert ((values.mean(0) - truth).abs() < 4.5 * error + 1e-6).all()


def grid_moments(model, batch, points, free_to_value):
    """Normalised weights ``(S, B)`` of a grid of points, by which expectations are sums."""
    values = {"z": free_to_value(points).unsqueeze(1).expand(-1, len(batch), -1)}
    return model_log_density(model, batch, values).double().softmax(0)


def test_draws_of_a_linear_gaussian_model_have_its_posterior_mean_and_covariance():
    x = torch.tensor([[0.3, -1.0, 1.2], [2.0, 0.5, -0.7], [-1.5, 0.1, 0.0]])
    random_state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reference = reference_posterior(linear, observed(x), seed=0, **SHORT)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not list(pyro.get_param_store())
    covariance = torch.linalg.inv(torch.eye(2) + W.T @ W / SIGMA**2)
    mean = (x - SHIFT) @ W @ covariance / SIGMA**2
    z = reference.draws.sites["z"]
    assert z.shape == (640, 3, 2)
    assert (reference.r_hat < 1.05).all()
    assert (reference.effective_size > 200).all()
    assert reference.num_divergences == 0
    assert_mean(z, mean, reference.effective_size)
    # Squares mix more slowly than the coordinates do.
    products = (z - mean).unsqueeze(-1) * (z - mean).unsqueeze(-2)
    assert_mean(products, covariance.expand(3, 2, 2), reference.effective_size / 2)
    length = torch.einsum("sbi,ij,sbj->sb", z - mean, torch.linalg.inv(covariance), z - mean)
    half = reference.effective_size.sum().reshape(1) / 2
    assert_mean(length.reshape(-1, 1), torch.tensor(2.0), half)
    joint = reference.draws.log_likelihood + reference.draws.log_prior
    values = model_log_density(linear, observed(x), {"z": z})
    torch.testing.assert_close(joint, values)
    assert reference.draws.log_weights is None
    assert not reference.draws.exact


def test_codes_come_from_enumeration_with_exact_frequencies():
    model, _ = small_pair("categorical", PROCESS)
    reference = reference_posterior(model, ROWS, 1000, seed=0)
    assert reference.draws.exact
    assert reference.draws.num_draws == 4000
    assert torch.equal(reference.r_hat, torch.ones(2))
    assert torch.equal(reference.effective_size, torch.full((2,), 4000.0))
    codes = torch.arange(4).unsqueeze(-1).expand(4, 2)
    truth = model_log_density(model, ROWS, {"z": codes}).softmax(0).T
    share = torch.nn.functional.one_hot(reference.draws.sites["z"], 4).float().mean(0)
    assert ((share - truth).abs() < 4.5 * (truth * (1 - truth) / 4000).sqrt()).all()
    assert float(truth.detach().std(-1).min()) > 0.02  # else any draws would do


def directions(batch):
    where = torch.tensor([[2.0, 0.0], [0.0, -1.0], [-1.0, 1.0]])
    with pyro.plate("data", len(batch), dim=-1):
        z = pyro.sample("z", ProjectedNormal(torch.tensor([0.7, 0.4])))
        logits = torch.stack([z @ where.T, -z @ where.T], -2)
        pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)


def test_directions_on_a_circle_follow_their_posterior():
    reference = reference_posterior(directions, ROWS, seed=1, **SHORT)
    z = reference.draws.sites["z"]
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(640, 2))
    assert (reference.r_hat < 1.2).all()  # of chains of 16 draws
    angles = torch.linspace(0, 2 * math.pi, 721)[:-1]
    points = torch.stack([angles.cos(), angles.sin()], -1)
    weights = grid_moments(directions, ROWS, points, lambda p: p)
    assert_mean(z, (weights.T @ points.double()).float(), reference.effective_size)


def test_chains_that_start_at_the_guide_reach_the_same_posterior_of_directions():
    def guide(batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", ProjectedNormal(torch.tensor([-8.0, 0.0])))

    reference = reference_posterior(directions, ROWS, guide=guide, seed=2, **SHORT)
    angles = torch.linspace(0, 2 * math.pi, 721)[:-1]
    points = torch.stack([angles.cos(), angles.sin()], -1)
    weights = grid_moments(directions, ROWS, points, lambda p: p)
    truth = (weights.T @ points.double()).float()
    assert_mean(reference.draws.sites["z"], truth, reference.effective_size)


@pytest.mark.parametrize("prior", ["mixture_of_normals", "conditional_normal"])
def test_draws_under_other_priors_agree_with_quadrature(prior):
    model, _ = small_pair(prior, PROCESS)
    reference = reference_posterior(model, ROWS, seed=1, **SHORT)
    assert (reference.r_hat < 1.2).all()
    line = torch.linspace(-7, 7, 141)
    points = torch.cartesian_prod(line, line)
    weights = grid_moments(model, ROWS, points, lambda p: p)
    truth = (weights.T @ points.double()).float()
    assert_mean(reference.draws.sites["z"], truth, reference.effective_size)


def test_every_site_of_a_hierarchy_is_drawn():
    model, guide, _ = zoo.build("hierarchical", "auto", PROCESS, hidden_dim=8, latent_dim=1)
    with torch.no_grad():
        model.decoder.latent.weight.mul_(2.0)
        model.decoder.head.weight.mul_(3.0)
    reference = reference_posterior(model, ROWS, guide=guide, seed=0, **SHORT)
    assert {name: v.shape for name, v in reference.draws.sites.items()} == {
        "z_2": (640, 2, 1),
        "z_1": (640, 2, 1),
    }
    line = torch.linspace(-7, 7, 141)
    upper, lower = torch.cartesian_prod(line, line).unsqueeze(1).expand(-1, 2, -1).split(1, -1)
    joint = model_log_density(model, ROWS, {"z_2": upper, "z_1": lower})
    weights = joint.double().softmax(0)
    for name, value in (("z_2", upper), ("z_1", lower)):
        truth = (weights.unsqueeze(-1) * value).sum(0).float()
        assert_mean(reference.draws.sites[name], truth, reference.effective_size)


def mixed(batch):
    """A code, a rate above zero whose law depends on it, and a coin."""
    rates = torch.tensor([0.5, 3.0])
    with pyro.plate("data", len(batch), dim=-1):
        code = pyro.sample("code", dist.Categorical(torch.tensor([0.3, 0.7])))
        rate = pyro.sample("rate", dist.Gamma(3.0, rates[code]))
        coin = pyro.sample("coin", dist.Bernoulli(0.4))
        sign = code - 0.5 - coin
        parts = torch.broadcast_tensors(rate - 1, 0 * rate, sign)
        logits = torch.stack(parts, -1).unsqueeze(-2)
        logits = logits.expand(*logits.shape[:-2], 2, 3)
        pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)


def test_codes_and_a_positive_rate_agree_with_brute_force():
    reference = reference_posterior(mixed, ROWS, seed=0, **SHORT)
    draws = reference.draws
    assert list(draws.sites) == ["code", "rate", "coin"]
    assert all(value.shape == (640, 2) for value in draws.sites.values())
    points = torch.linspace(0.01, 60, 6000)
    pairs = [(code, coin) for code in (0, 1) for coin in (0, 1)]
    joint = []
    for code, coin in pairs:
        values = {
            "rate": points.unsqueeze(-1).expand(-1, 2),
            "code": torch.full((6000, 2), code),
            "coin": torch.full((6000, 2), float(coin)),
        }
        joint.append(model_log_density(mixed, ROWS, values))
    weights = torch.stack(joint).double().flatten(0, 1).softmax(0).reshape(4, -1, 2)
    mean = (weights.sum(0) * points.unsqueeze(-1)).sum(0).float()
    assert_mean(draws.sites["rate"], mean, reference.effective_size)
    # The codes are drawn given the rate: no more correlated than that.
    for k, (code, coin) in enumerate(pairs):
        both = (draws.sites["code"] == code) & (draws.sites["coin"] == coin)
        # A rare pair may never be drawn, so its error is that of its probability.
        share = weights[k].sum(0)
        error = (share * (1 - share) / reference.effective_size).sqrt()
        assert ((both.double().mean(0) - share).abs() < 4.5 * error + 1e-6).all()
    log_joint = model_log_density(mixed, ROWS, draws.sites)
    torch.testing.assert_close(draws.log_likelihood + draws.log_prior, log_joint)


def plates(batch):
    with pyro.plate("data", len(batch), dim=-1):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        with pyro.plate("parts", 2, dim=-2):
            # Its support ends where another site says.
            part = pyro.sample("part", dist.Uniform(0.0 * scale, scale))
        law = dist.Normal(part.movedim(-2, -1), 0.5).to_event(1)
        pyro.sample("x_0", law, obs=batch.x_0)


def test_sites_in_inner_plates_keep_their_supports():
    batch = observed(torch.tensor([[0.5, 1.5]]))
    reference = reference_posterior(
        plates, batch, 16, num_chains=20, num_warmup=40, seed=0, max_plate_nesting=2
    )
    scale, part = reference.draws.sites["scale"], reference.draws.sites["part"]
    assert part.shape == (320, 1, 2)
    assert ((part > 0) & (part < scale.unsqueeze(-1))).all()
    points = torch.linspace(0.02, 8, 400).double()
    inside = torch.distributions.Normal(batch.x_0.double().unsqueeze(-1), 0.5)
    share = (inside.cdf(points) - inside.cdf(torch.zeros(1).double())).log() - points.log()
    weights = (share.sum(1) + dist.LogNormal(0.0, 0.5).log_prob(points)).softmax(-1)
    assert_mean(scale, (weights @ points).float(), reference.effective_size)


def test_rows_are_the_same_rows_in_groups(monkeypatch):
    monkeypatch.setattr("vadd_pyro.inspection.reference._ROWS", 2)
    x = torch.tensor([[3.0, 0.0, 3.0], [0.0, 3.0, 0.0], [-3.0, 0.0, -3.0]])
    reference = reference_posterior(linear, observed(x), seed=0, **SHORT)
    covariance = torch.linalg.inv(torch.eye(2) + W.T @ W / SIGMA**2)
    mean = (x - SHIFT) @ W @ covariance / SIGMA**2
    assert_mean(reference.draws.sites["z"], mean, reference.effective_size)
    assert reference.draws[torch.tensor([2])].sites["z"].shape == (640, 1, 2)


def test_parameters_get_no_gradients_and_seeds_repeat():
    model, _ = small_pair("standard_normal", PROCESS)
    model.train()
    options = dict(num_draws=5, num_warmup=5, seed=3)
    first = reference_posterior(model, ROWS, **options)
    again = reference_posterior(model, ROWS, **options)
    assert torch.equal(first.draws.sites["z"], again.draws.sites["z"])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not first.draws.sites["z"].requires_grad
    assert model.training


def test_stuck_chains_have_a_large_r_hat():
    def far(batch):
        with pyro.plate("data", len(batch), dim=-1):
            peaks = dist.Categorical(torch.ones(2))
            law = dist.MixtureSameFamily(peaks, dist.Normal(torch.tensor([-9.0, 9.0]), 0.1))
            z = pyro.sample("z", law)
            logits = torch.zeros(2, 3) * z[..., None, None]
            pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)

    reference = reference_posterior(far, ROWS, seed=0, **SHORT)
    assert (reference.r_hat > 2).all()
    assert (reference.effective_size < 50).all()


def unbounded(batch):
    with pyro.plate("data", len(batch), dim=-1):
        number = pyro.sample("number", dist.Poisson(2.0))
        logits = torch.zeros(2, 3) * number[..., None, None]
        pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)


def test_what_cannot_be_drawn_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'number' has the law Poisson.* expected latents that"):
        reference_posterior(unbounded, ROWS)
    with pytest.raises(ValueError, match="x_0 is None"):
        reference_posterior(linear, ROWS.without_data())
    rows = PROCESS.corrupt(all_rows(3, 2), 0.0)
    with pytest.raises(ValueError, match="without a target"):
        reference_posterior(linear, rows)
    with pytest.raises(ValueError, match="num_draws must be an integer of at least 4, got 3"):
        reference_posterior(linear, ROWS, 3)
    assert issubclass(ReferencePosterior, tuple)


def test_a_model_without_a_latent_has_nothing_to_draw():
    model, guide = small_pair("none", PROCESS)
    reference = reference_posterior(model, ROWS, 5, seed=0)
    assert reference.draws.exact
    assert not reference.draws.sites
    draws = posterior_draws(model, guide, ROWS, 1)
    torch.testing.assert_close(reference.draws.log_weights[0], draws.log_weights[0])
