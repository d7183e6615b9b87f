"""The whole table: every prior with every guide that fits it, through all a pair is for."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.poutine as poutine
import pytest
import torch
from conftest import all_rows
from pyro.infer import SVI, Predictive

from vadd_pyro import (
    MaskedDiffusionELBO,
    MaskingProcess,
    exact_bound,
    exact_distribution,
    fit,
    guides,
    log_likelihood_bound,
    metrics,
    models,
    sample,
)
from vadd_pyro.nn import (
    LocalDecoder,
    MLPDecoder,
    MLPEncoder,
    MLPFeatures,
    PositionState,
    StateEncoder,
    StateFeatures,
)

PROCESS = MaskingProcess(3, 2)
SIZES: dict[str, Any] = dict(hidden_dim=16, num_layers=2, embedding_dim=4)
X = torch.tensor([[0, 0], [1, 1], [2, 2], [0, 1]]).repeat(16, 1)


def state() -> StateFeatures:
    return StateFeatures(PROCESS, **SIZES)


def features() -> MLPFeatures:
    return MLPFeatures(PROCESS, **SIZES)


def encoder() -> MLPEncoder:
    return MLPEncoder(PROCESS, 2, **SIZES)


def heavy_tail_given_scale(batch):
    """A Pyro program of a user's: a positive scale, and a vector of that scale."""
    scale = pyro.sample("scale", pyro.distributions.Gamma(2.0, 2.0))
    loc = torch.zeros(2)
    law = pyro.distributions.Normal(loc, scale.unsqueeze(-1).expand(*scale.shape, 2))
    return pyro.sample("z", law.to_event(1))


heavy_tail_given_scale.latent_dim = 2

PRIORS = {
    "standard_normal": lambda: models.StandardNormal(2),
    "learned_normal": lambda: models.LearnedNormal(2),
    "learned_normal_given_state": lambda: models.LearnedNormal(2, state()),
    "conditional_normal": lambda: models.ConditionalNormal(StateEncoder(PROCESS, 2, **SIZES)),
    "mixture": lambda: models.MixtureOfNormals(2, 3),
    "mixture_given_state": lambda: models.MixtureOfNormals(2, 3, context=state()),
    "one_dimension": lambda: models.MixtureOfNormals(1, 3),
    "vamp": lambda: models.VampPrior(encoder(), 3),
    "vamp_given_state": lambda: models.VampPrior(encoder(), 3, conditional=True),
    "flow": lambda: models.NormalizingFlow(2, num_transforms=2, hidden_dims=(16,)),
    "flow_given_state": lambda: models.NormalizingFlow(
        3, state(), num_transforms=2, hidden_dims=(16,)
    ),
    "hierarchy": lambda: models.Hierarchical((2, 2)),
    "hierarchy_given_state": lambda: models.Hierarchical((1, 2, 2), state(), all_levels=True),
    "student_t": lambda: models.StudentT(2),
    "student_t_given_state": lambda: models.StudentT(2, context=state()),
    "laplace": lambda: models.Laplace(2),
    "laplace_given_state": lambda: models.Laplace(2, state()),
    "sphere": lambda: models.Spherical(3),
    "sphere_given_state": lambda: models.Spherical(2, state()),
    "categorical": lambda: models.Categorical(4, 3),
    "categorical_given_state": lambda: models.Categorical(4, 3, state()),
    "product": lambda: models.ProductOfCategoricals(3, 2, 3),
    "product_given_state": lambda: models.ProductOfCategoricals(3, 2, 3, state()),
    "product_too_large_to_sum": lambda: models.ProductOfCategoricals(9, 4, 3),
    "one_hot": lambda: models.ProductOfCategoricals(3, 2, 3, one_hot=True),
    "one_hot_given_state": lambda: models.ProductOfCategoricals(3, 2, 3, state(), one_hot=True),
    "chain": lambda: models.Chain(3, 2, 3),
    "chain_given_state": lambda: models.Chain(3, 2, 3, PositionState(state(), 2)),
    "user_program": lambda: heavy_tail_given_scale,
}
FAMILIES = {name: guides.families_for(make(), features()) for name, make in PRIORS.items()}
TABLE = [(prior, family) for prior, families in FAMILIES.items() for family in families]


def pair(prior: str, family: str) -> tuple[Any, Any]:
    law = PRIORS[prior]()
    decoder: Any
    if isinstance(law, models.Chain):
        decoder = LocalDecoder(PROCESS, 3, hidden_dim=16, num_blocks=1, latent_hidden_dim=8)
    else:
        decoder = MLPDecoder(PROCESS, law.latent_dim, **SIZES)
        with torch.no_grad():
            decoder.latent.weight.mul_(2.0)
            decoder.head.weight.mul_(2.0)
    model = models.VADD(decoder, law)
    options = {}
    if family == "semi_amortized":
        options = {"model": model, "elbo": MaskedDiffusionELBO(PROCESS), "num_steps": 2}
    own = None if isinstance(law, models.VampPrior) else features()  # which holds its encoder
    return model, guides.for_prior(law, own, family, **options)


def parameters(*programs: Any) -> dict[str, torch.nn.Parameter]:
    return {
        f"{i}.{name}": p
        for i, program in enumerate(programs)
        for name, p in program.named_parameters()
    }


@pytest.mark.parametrize(("prior", "family"), TABLE, ids=[f"{p}-{f}" for p, f in TABLE])
def test_every_prior_with_every_guide_that_fits_it(prior, family, tmp_path):
    model, guide = pair(prior, family)
    elbo = MaskedDiffusionELBO(PROCESS)
    before = {name: p.detach().clone() for name, p in parameters(model, guide).items()}

    # Trains 20 steps, with finite gradients on every parameter.
    checkpoint = tmp_path / "run.pt"
    history = fit(
        *(model, guide, elbo, X, 20),
        batch_size=32,
        learning_rate=1e-2,
        checkpoint=checkpoint,
        progress=False,
    )
    assert all(math.isfinite(loss) for loss in history.loss)
    for name, p in parameters(model, guide).items():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert (p != before[name]).any(), name

    # Samples from the law that the exact computation gives; the bound is below it.
    law = exact_distribution(model, PROCESS, 2, num_draws=2048)
    assert float(law.sum()) == pytest.approx(1)
    drawn = metrics.histogram(sample(model, PROCESS, 20_000, 2, seed=1), 3)
    error = (law * (1 - law) / 20_000).sqrt()
    assert ((drawn - law).abs() < 5 * error + 3e-3).all()
    rows = all_rows(3, 2)
    bound = log_likelihood_bound(
        model, guide, PROCESS, rows.repeat(8, 1), 2, num_particles=8, num_draws=2, seed=0
    )
    limit = exact_bound(model, PROCESS, 2, num_draws=2048).flatten()
    gap = bound.value.reshape(8, 9).mean(-1) - float(limit.mean())
    assert float(gap.mean()) < 5 * float(gap.std()) / 8**0.5 + 5e-3
    assert (limit <= law.flatten().log() + 1e-6).all()

    # Vectorised particles, plain and importance-weighted, agree with a loop over them.
    batch = PROCESS.corrupt(X[:8], 0.9, at_least_one=True)
    many = batch[torch.arange(8).repeat(60)]
    values = {}
    for name, options in {
        "one": {},
        "vectorised": {"num_particles": 3},
        "loop": {"num_particles": 3, "vectorize_particles": False},
        "weighted": {"num_particles": 3, "importance_weighted": True},
    }.items():
        several = MaskedDiffusionELBO(PROCESS, **options)
        draws = several.score(model, guide, many).rows.detach().reshape(60, 8)
        assert draws.isfinite().all()
        values[name] = draws.mean(-1)
    for name in ("vectorised", "loop"):
        spread = (values["one"].var() + values[name].var()).div(60).sqrt()
        assert (values["one"].mean() - values[name].mean()).abs() < 5 * spread + 1e-5
    assert (
        values["weighted"].mean() > values["one"].mean() - 5 * values["one"].std() / 60**0.5 - 1e-5
    )

    # Predictive, condition, and a trace of the pair.
    generated = Predictive(model, num_samples=4, parallel=True)(batch.without_data())
    assert generated["x_0"].reshape(4, 8, 2).shape == (4, 8, 2)
    trace = poutine.trace(model).get_trace(batch.without_data())
    latents = {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and name not in ("data", "x_0")
    }
    known = poutine.condition(model, latents)
    fixed = elbo.score(known, guides.NoLatent(), batch).rows
    assert (fixed - elbo.score(known, guides.NoLatent(), batch).rows).abs().max() == 0

    # Saves and loads.
    again = pair(prior, family)
    fit(
        *(*again, elbo, X, 20),
        batch_size=32,
        learning_rate=1e-2,
        checkpoint=checkpoint,
        resume=True,
        progress=False,
    )
    for name, p in parameters(*again).items():
        assert (p == parameters(model, guide)[name]).all(), name


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("prior", PRIORS)
def test_every_prior_trains_under_svi_in_both_regimes(prior, local):
    with pyro.settings.context(module_local_params=local):
        model, guide = pair(prior, FAMILIES[prior][-1])
        before = {name: p.detach().clone() for name, p in parameters(model, guide).items()}
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=MaskedDiffusionELBO(PROCESS))
        for _ in range(3):
            assert math.isfinite(svi.step(X))
        for name, p in parameters(model, guide).items():
            assert (p != before[name]).any(), name


def site_of(prior: str) -> str:
    (name, *_) = (
        pyro.poutine.trace(pair(prior, FAMILIES[prior][0])[0])
        .get_trace(PROCESS.corrupt(X, 1.0))
        .stochastic_nodes
    )
    return name


@pytest.mark.parametrize(
    ("prior", "other"),
    [
        ("sphere", "standard_normal"),
        ("standard_normal", "sphere"),
        ("standard_normal", "categorical"),
        ("standard_normal", "flow_given_state"),
        ("categorical", "standard_normal"),
        ("product", "one_hot"),
        ("one_hot", "product"),
        ("hierarchy", "standard_normal"),
        ("standard_normal", "hierarchy"),
    ],
)
def test_a_pair_that_does_not_fit_names_both_sites(prior, other):
    model, _ = pair(prior, FAMILIES[prior][0])
    _, guide = pair(other, FAMILIES[other][-1])
    with pytest.raises(
        ValueError, match=r"guide.*'z(_\d)?'.*model.*'z(_\d)?'|model.*'z(_\d)?'.*guide.*'z(_\d)?'"
    ):
        MaskedDiffusionELBO(PROCESS).loss(model, guide, X)


def test_for_prior_names_the_sites_and_the_families_that_fit():
    with pytest.raises(ValueError, match=r"'spherical'.*'z' ~ DiagonalNormal.*mean_field"):
        guides.for_prior(models.StandardNormal(2), features(), "spherical")
    with pytest.raises(TypeError, match="feature_dim"):
        guides.for_prior(models.StandardNormal(2), lambda batch: None)


def test_the_guide_of_a_vamp_prior_shares_its_encoder():
    prior = models.VampPrior(encoder(), 3)
    assert guides.for_prior(prior).encoder is prior.encoder
    with pytest.raises(ValueError, match="goes with the encoder that it holds"):
        guides.for_prior(prior, features())
