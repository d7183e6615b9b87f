"""Priors fitted to the posteriors of a trained pair."""

from __future__ import annotations

import copy

import pyro
import pytest
import torch
from pyro.distributions import Gamma
from torch import nn

from vadd_pyro import (
    DiagonalNormal,
    MaskedDiffusionELBO,
    MaskingProcess,
    Program,
    fit,
    fit_prior,
    guides,
    log_likelihood_bound,
    models,
    refitting,
    sample,
)
from vadd_pyro.distributions import NormalMixture
from vadd_pyro.nn import MLPDecoder, MLPFeatures

PROCESS = MaskingProcess(3, 4)
SIZES = {"hidden_dim": 32, "num_layers": 2, "embedding_dim": 4}
CENTRES = torch.tensor([[-2.0, 0.0], [0.0, 3.0], [2.0, 0.0]])
SPREAD = 0.3


class Known(Program):
    """Posteriors around one of three points, as a row's first token says."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2))
        self.dropout = nn.Dropout(0.5)  # which is to be off while posteriors are drawn

    def forward(self, batch):
        with pyro.plate("data", len(batch), dim=-1):
            loc = CENTRES[batch.x_0[:, 0]] + self.shift
            if batch.masked.all():
                loc = self.dropout(loc)
            pyro.sample("z", DiagonalNormal(loc, torch.full_like(loc, SPREAD)))


def rows(count: int, seed: int = 0) -> torch.Tensor:
    """Rows of four equal tokens, of which half are twos."""
    draw = torch.randint(4, (count, 1), generator=torch.Generator().manual_seed(seed))
    return draw.clamp_max(2).expand(count, 4).contiguous()


def known_pair():
    torch.manual_seed(0)
    decoder = MLPDecoder(PROCESS, 2, **SIZES)
    return models.VADD(decoder, models.StandardNormal(2), least_time=1.0), Known()


def test_the_mixture_is_the_aggregate_posterior_and_its_size_is_chosen_on_held_out_rows():
    model, guide = known_pair()
    found = fit_prior(model, guide, PROCESS, rows(400), rows(200, 1), num_components=(1, 3, 6))
    z = CENTRES[rows(4000, 2)[:, 0]] + SPREAD * torch.randn(4000, 2)
    weights = torch.tensor([0.25, 0.25, 0.5]).log()
    aggregate = NormalMixture(weights, CENTRES, torch.full((3, 2), SPREAD))
    with torch.no_grad():
        law = found.prior(PROCESS.corrupt(rows(1), 1.0))
        fitted = law.log_prob(z)
    error = fitted - aggregate.log_prob(z)
    assert float(error.abs().mean()) < 0.1
    # What is reported is what these densities are on rows that were not fitted to.
    assert max(found.held_out.values()) == pytest.approx(float(fitted.mean()), abs=0.1)
    standard = DiagonalNormal(torch.zeros(2), torch.ones(2))
    assert found.before == pytest.approx(float(standard.log_prob(z).mean()), abs=0.2)
    assert found.held_out[3] > found.held_out[1] + 0.5
    assert guide.training  # put back as it was


def test_the_bound_at_one_step_gains_what_held_out_draws_gain():
    model, guide = known_pair()
    data, judged = rows(400), rows(200, 1)
    elbo = MaskedDiffusionELBO(PROCESS, "chain", num_steps=1, num_particles=200)
    found = fit_prior(model, guide, PROCESS, data, judged, num_components=(3,))
    guide.eval()
    before = log_likelihood_bound(model, guide, PROCESS, judged, 1, num_particles=1, seed=0)
    loss = elbo.loss(model, guide, judged)
    model.prior = found.prior
    after = log_likelihood_bound(model, guide, PROCESS, judged, 1, num_particles=1, seed=0)
    gain = float(after.value.mean() - before.value.mean())
    assert gain == pytest.approx(found.held_out[3] - found.before, abs=0.15)
    assert gain > 1
    with torch.no_grad():
        gain = (loss - elbo.loss(model, guide, judged)) / len(judged)
    assert gain == pytest.approx(found.held_out[3] - found.before, abs=0.15)


def test_the_same_seed_gives_the_same_prior_and_leaves_torchs_state_alone():
    model, guide = known_pair()
    state = torch.random.get_rng_state()
    first, second, third = (
        fit_prior(model, guide, PROCESS, rows(300), num_components=4, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.held_out == second.held_out
    assert first.held_out != third.held_out
    for name, value in first.prior.state_dict().items():
        assert torch.equal(value, second.prior.state_dict()[name])
    assert isinstance(model.prior, models.StandardNormal)  # nothing is changed in place


def test_sizes_are_tried_until_held_out_draws_are_less_likely(monkeypatch):
    tried = []
    right = refitting._maximised

    def watched(z, size, seed):
        tried.append(size)
        return right(z, size, seed)

    monkeypatch.setattr(refitting, "_maximised", watched)
    model, guide = known_pair()
    sizes = (1, 2, 3, 8, 16, 32, 64, 128)
    found = fit_prior(model, guide, PROCESS, rows(40), rows(40, 1), num_components=sizes)
    assert tried == list(found.held_out) == list(sizes[: len(tried)])
    best = max(found.held_out, key=found.held_out.__getitem__)
    assert len(found.prior.z_loc) == best
    assert len(tried) in (len(sizes), sizes.index(best) + 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_components": ()}, r"num_components must rise, at least one of them, got \(\)"),
        ({"num_components": (4, 2)}, r"num_components must rise.*got \(4, 2\)"),
        ({"num_components": 0}, "num_components must be"),
        ({"num_draws": 0}, "num_draws must be"),
        ({"seed": -1}, r"seed must lie in \[0, 2\*\*32\), got -1"),
        ({"data": rows(10)}, "data must have at least 20 rows to fit a prior to, got 10"),
        ({"held_out": rows(3)}, "held_out must have at least 20 rows to fit a prior to, got 3"),
        ({"data": rows(100)}, "held_out must have at least 20 rows to fit a prior to, got 10"),
        ({"data": rows(30) + 2}, r"data\[1, 0\] is 4: expected tokens"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    model, guide = known_pair()
    options = {"data": rows(300), **arguments}
    with pytest.raises(ValueError, match=message):
        fit_prior(model, guide, PROCESS, **options)


def test_rows_that_are_held_out_are_not_fitted_to():
    model, guide = known_pair()
    twos = torch.full((300, 4), 2)
    found = fit_prior(model, guide, PROCESS, rows(300).clamp_max(0), twos, num_components=1)
    assert found.prior.z_loc[0, 0].item() == pytest.approx(-2, abs=0.1)  # of zeros alone
    # By default a tenth of the rows is held out, here one that is easily told from the others.
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    mixed = torch.zeros(300, 4, dtype=torch.long)
    mixed[order[:30]] = 2
    found = fit_prior(model, guide, PROCESS, mixed, num_components=1)
    assert found.prior.z_loc[0, 0].item() == pytest.approx(-2, abs=0.1)
    assert found.held_out[1] < -20


def test_the_prior_has_the_precision_of_the_posteriors_and_dropout_is_off():
    model, guide = known_pair()
    found = fit_prior(model.double(), guide.double(), PROCESS, rows(300), num_components=2)
    assert found.prior.z_loc.dtype == torch.float64

    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, batch):
            return DiagonalNormal(self.dropout(torch.full((2,), 3.0)), torch.ones(2))

    decoder = MLPDecoder(PROCESS, 2, **SIZES)
    befores = {
        fit_prior(
            models.VADD(decoder, prior), Known(), PROCESS, rows(300), num_components=1
        ).before
        for prior in (Dropped(), Dropped().eval())
    }
    assert len(befores) == 1


def test_many_rows_are_a_random_choice_of_them(monkeypatch):
    monkeypatch.setattr(refitting, "_MOST_ROWS", 1000)
    model, guide = known_pair()
    data = rows(4000).sort(0).values  # by value, so that the first thousand are alike
    found = fit_prior(model, guide, PROCESS, data, rows(200, 1), num_components=(3,))
    assert sorted(found.prior.logits.value.softmax(0).tolist()) == pytest.approx(
        [0.25, 0.25, 0.5], abs=0.06
    )


def test_guides_whose_draws_cannot_be_fitted_are_refused():
    model, _ = known_pair()
    with pytest.raises(ValueError, match="the guide must sample the site 'z'"):
        fit_prior(model, guides.NoLatent(), PROCESS, rows(300))
    broken = Known()
    torch.nn.init.constant_(broken.shift, float("nan"))
    refused = pytest.raises(ValueError, match=r"draws of 'z' must be finite")
    with refused, pyro.validation_enabled(False):
        fit_prior(model, broken, PROCESS, rows(300))


def test_priors_whose_place_a_mixture_cannot_take_are_refused():
    decoder = MLPDecoder(PROCESS, 2, **SIZES)
    with pytest.raises(TypeError, match=r"model must have a prior.*got MDM"):
        fit_prior(models.MDM(decoder), guides.NoLatent(), PROCESS, rows(300))
    codes = models.VADD(decoder, models.Categorical(5, 2))
    with pytest.raises(ValueError, match="one site 'z', a vector of any real numbers"):
        fit_prior(codes, guides.NoLatent(), PROCESS, rows(300))
    features = MLPFeatures(PROCESS, **SIZES)
    sphere = models.VADD(decoder, models.Spherical(2))
    with pytest.raises(ValueError, match=r"a vector of any real numbers.*it samples 'z' ~ "):
        fit_prior(sphere, guides.AmortizedSpherical(features, 2), PROCESS, rows(300))
    positive = models.VADD(decoder, lambda batch: Gamma(torch.ones(2), torch.ones(2)).to_event(1))
    with pytest.raises(ValueError, match=r"a vector of any real numbers.*it samples 'z' ~ Gamma"):
        fit_prior(positive, guides.for_prior(positive.prior, features), PROCESS, rows(300))
    several = models.VADD(decoder, models.Hierarchical((2, 2)))
    with pytest.raises(ValueError, match="it samples 'z_"):
        fit_prior(several, guides.NoLatent(), PROCESS, rows(300))


def test_samples_of_one_step_are_those_of_rows_once_the_holes_are_gone():
    """Rows are four equal tokens. Between the posteriors of a normal prior tokens differ."""
    torch.manual_seed(1)
    prior = models.StandardNormal(2)
    decoder = MLPDecoder(PROCESS, 2, **SIZES)
    model = models.VADD(decoder, prior, least_time=1.0)
    guide = guides.RelativeNormal(MLPFeatures(PROCESS, **SIZES), 2, prior, least_time=1.0)
    data = rows(600)
    elbo = MaskedDiffusionELBO(PROCESS, "chain", num_steps=1, least_time=1.0)
    fit(model, guide, elbo, data, 500, batch_size=64, learning_rate=1e-2, progress=False, seed=0)

    def equal() -> float:
        x = sample(model, PROCESS, 4000, 1, seed=0)
        return float((x == x[:, :1]).all(-1).float().mean())

    before = equal()
    found = fit_prior(model, guide, PROCESS, data, rows(200, 1))
    model.prior, guide.prior = found.prior, copy.deepcopy(found.prior)
    assert equal() > before + (1 - before) / 2
    bound = log_likelihood_bound(model, guide, PROCESS, rows(200, 1), 1, seed=0).value.mean()
    entropy = torch.tensor([0.25, 0.25, 0.5])
    assert float(bound) < float((entropy * entropy.log()).sum()) + 0.1
