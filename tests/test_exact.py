"""The exact law against the sampler, and the bound against the exact law."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import PRIORS, all_rows, small_pair
from scipy.stats import chi2

from vadd_pyro import (
    CosineSchedule,
    MaskingProcess,
    TokenCategorical,
    exact_bound,
    exact_distribution,
    guides,
    log_likelihood_bound,
    metrics,
    sample,
)


def chi_square_p_value(counts: torch.Tensor, law: torch.Tensor) -> float:
    """Pearson's test; cells that expect fewer than 5 draws are pooled."""
    counts, expected = counts.double().flatten(), law.flatten() * counts.sum()
    small = expected < 5
    observed, expected = (
        torch.cat([v[~small], v[small].sum().reshape(1)]) if small.any() else v
        for v in (counts, expected)
    )
    keep = expected > 0
    assert (observed[~keep] == 0).all()
    statistic = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    return float(chi2.sf(float(statistic), int(keep.sum()) - 1))


def agrees(model, process, num_steps, **start) -> None:
    law = exact_distribution(model, process, num_steps, **start)
    assert law.shape == (process.vocab_size,) * process.length
    assert abs(law.sum() - 1) < 1e-5
    assert (law >= 0).all()
    x = sample(model, process, 200_000, num_steps, seed=1, **start)
    counts = metrics.histogram(x, process.vocab_size) * len(x)
    assert chi_square_p_value(counts, law) > 1e-4


@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("prior", PRIORS)
def test_the_exact_law_is_the_samplers(prior, num_steps):
    process = MaskingProcess(3, 3, CosineSchedule() if num_steps == 2 else None)
    model, _ = small_pair(prior, process)
    agrees(model, process, num_steps)


@pytest.mark.parametrize("prior", ["standard_normal", "conditional_normal", "categorical"])
@pytest.mark.parametrize("t_start", [None, 0.4, 1.0])
def test_the_exact_law_from_a_partly_observed_row(prior, t_start):
    process = MaskingProcess(3, 3)
    model, _ = small_pair(prior, process)
    x_start = torch.tensor([3, 1, 3])
    agrees(model, process, 2, x_start=x_start, t_start=t_start)
    law = exact_distribution(model, process, 2, x_start=x_start, t_start=t_start)
    assert law[:, [0, 2]].sum() == 0


def test_a_uniform_time_grid_is_the_default_one():
    process = MaskingProcess(3, 2)
    model, _ = small_pair("categorical", process)
    grid = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    same = exact_distribution(model, process, time_grid=grid)
    torch.testing.assert_close(exact_distribution(model, process, 4), same)
    uneven = torch.tensor([0.0, 0.7, 1.0])
    x = sample(model, process, 100_000, time_grid=uneven, seed=2)
    law = exact_distribution(model, process, time_grid=uneven)
    assert chi_square_p_value(metrics.histogram(x, 3) * len(x), law) > 1e-4


def test_time_conditioned_decoders_see_the_grid():
    process = MaskingProcess(3, 2)
    table = torch.randn(3)

    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            logits = (batch.t[:, None, None] * table * 5).expand(-1, 2, -1)
            pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)

    agrees(model, process, 2)
    late = exact_distribution(model, process, 1)[0].sum()
    assert abs(late - torch.softmax(5 * table, -1)[0]) < 1e-6


@pytest.mark.parametrize(
    "fn",
    [
        lambda: dist.Normal(0.3, 0.7),
        lambda: dist.Laplace(torch.zeros(2), 1.0).to_event(1),
        lambda: dist.StudentT(3.0),
        lambda: dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 0.5),
    ],
    ids=["normal", "laplace", "student", "full covariance"],
)
def test_latents_of_any_law_are_integrated(fn):
    process = MaskingProcess(3, 2)
    weight = torch.randn(2, 6)

    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", fn())
            z = z if z.shape[-1:] == (2,) and len(fn().event_shape) else z.unsqueeze(-1)
            logits = (z @ weight[: z.shape[-1]]).unflatten(-1, (2, 3))
            pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)

    law = exact_distribution(model, process, 1, num_draws=2**17)
    x = sample(model, process, 20_000, 1, seed=1)
    assert chi_square_p_value(metrics.histogram(x, 3) * len(x), law) > 1e-4


def test_discrete_and_continuous_latents_together():
    process = MaskingProcess(3, 2)
    loc, weight = torch.randn(3, 2), torch.randn(2, 6)

    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            z = pyro.sample("z", dist.Normal(loc[c], 0.5).to_event(1))
            logits = (3 * z @ weight).unflatten(-1, (2, 3))
            pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)

    agrees(model, process, 2)


def test_a_large_space_is_refused_with_its_size_and_what_to_use():
    process = MaskingProcess(100, 4)
    model, _ = small_pair("none", process)
    with pytest.raises(ValueError, match=r"100,000,000 outcomes.*log_likelihood_bound"):
        exact_distribution(model, process, 1)
    with pytest.raises(ValueError, match=r"104,060,401 states over 2 steps"):
        exact_bound(model, process, 2)


def test_a_longer_row_is_exact_in_one_step():
    process = MaskingProcess(2, 12)
    model, _ = small_pair("categorical", process)
    law = exact_distribution(model, process, 1)
    assert abs(law.sum() - 1) < 1e-9
    x = all_rows(2, 12)[::97]
    value, _ = log_likelihood_bound(model, guides.NoLatent(), process, x, 1, num_draws=2)
    torch.testing.assert_close(law[tuple(x.T)].log(), value, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------- the bound


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_the_bound_lies_below_the_exact_value_and_reaches_its_path_wise_limit(prior, num_steps):
    process = MaskingProcess(3, 3)
    model, guide = small_pair(prior, process, spread=1.0)
    x = all_rows(3, 3)
    log_p = exact_distribution(model, process, num_steps).log().flatten()
    limit = exact_bound(model, process, num_steps).flatten()
    assert (limit <= log_p + 1e-6).all()
    if num_steps == 1:
        torch.testing.assert_close(limit, log_p, rtol=1e-6, atol=1e-6)
    else:
        assert (limit < log_p).any()
    gaps = []
    for particles in (1, 8, 512):
        value, error = log_likelihood_bound(
            model, guide, process, x, num_steps, num_particles=particles, num_draws=40, seed=5
        )
        assert value.shape == error.shape == (27,)
        assert (value - log_p < 5 * error + 1e-5).all()
        assert (value - limit < 5 * error + 1e-5).all()
        gaps.append((limit - value).mean())
    # many particles: nothing is left but Monte Carlo error, and a bias of order 1 / particles
    assert ((value - limit).abs() < 5 * error + 0.02).all()
    if prior not in ("none", "categorical"):
        assert gaps[0] > gaps[2]
        assert gaps[1] > gaps[2]


def test_the_bound_is_reproducible_and_leaves_the_random_state_alone():
    process = MaskingProcess(3, 2)
    pair = small_pair("standard_normal", process)
    x = all_rows(3, 2)
    state = torch.get_rng_state()
    first = log_likelihood_bound(*pair, process, x, 2, seed=3)
    assert (torch.get_rng_state() == state).all()
    second = log_likelihood_bound(*pair, process, x, 2, seed=3, batch_size=10_000)
    torch.testing.assert_close(first.value, second.value)
    mean, error = first.mean()
    assert mean == pytest.approx(float(first.value.mean()))
    assert error > 0
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        log_likelihood_bound(*pair, process, x, 0)
    with pytest.raises(ValueError, match="num_draws must be at least 1"):
        log_likelihood_bound(*pair, process, x, 1, num_draws=0)
    with pytest.raises(ValueError, match="expected tokens in"):
        log_likelihood_bound(*pair, process, x + 1, 1)


def test_modules_are_scored_in_evaluation_mode():
    process = MaskingProcess(3, 2)
    model, guide = small_pair("none", process)
    model.decoder.hidden = torch.nn.Sequential(model.decoder.hidden, torch.nn.Dropout(0.9))
    model.train()
    x = all_rows(3, 2)
    value, _ = log_likelihood_bound(model, guide, process, x, 1)
    law = exact_distribution(model, process, 1)
    torch.testing.assert_close(value, law.log().flatten(), rtol=1e-5, atol=1e-5)
    assert model.decoder.hidden.training
    assert model.training
