"""Laws of latents against mathematics: densities, gradients, transports, priors, guides."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import all_rows
from pyro.infer import MCMC, NUTS
from pyro.infer.reparam import ProjectedNormalReparam
from pyro.poutine import condition, reparam, trace
from torch.autograd import grad
from torch.distributions import kl_divergence

from vadd_pyro import (
    LinearAnnealing,
    MaskedDiffusionELBO,
    MaskingProcess,
    exact_bound,
    exact_distribution,
    exact_distributions,
    fit,
    fit_guide,
    guides,
    log_likelihood_bound,
    metrics,
    models,
    sample,
)
from vadd_pyro.distributions import (
    CodeCategorical,
    DiagonalNormal,
    NormalMixture,
    OneHotCodes,
    ProjectedNormal,
    StraightThroughCodes,
)
from vadd_pyro.grids import step_terms
from vadd_pyro.nn import MLPDecoder, MLPEncoder, MLPFeatures, StateEncoder, StateFeatures
from vadd_pyro.one_token import one_token_bound, one_token_grid
from vadd_pyro.sampling import seeded
from vadd_pyro.times import GridTimes

PROCESS = MaskingProcess(3, 2)
SIZES = dict(hidden_dim=16, num_layers=2, embedding_dim=4)
with seeded(0):  # whichever test modules were imported before
    BATCH = PROCESS.corrupt(all_rows(3, 2), 0.8)
DOUBLE = replace(BATCH, t=BATCH.t.double())


def grid(limit: float, number: int) -> tuple[torch.Tensor, float]:
    """Points of the plane, ``(number ** 2, 2)``, and the area that each stands for."""
    line = torch.linspace(-limit, limit, number, dtype=torch.double)
    return torch.cartesian_prod(line, line), float(line[1] - line[0]) ** 2


def state() -> StateFeatures:
    return StateFeatures(PROCESS, **SIZES)


PLANE = {
    "standard": lambda: models.StandardNormal(2),
    "learned given state": lambda: models.LearnedNormal(2, state()),
    "mixture": lambda: models.MixtureOfNormals(2, 5),
    "mixture given state": lambda: models.MixtureOfNormals(2, 5, context=state()),
    "vamp": lambda: models.VampPrior(MLPEncoder(PROCESS, 2, **SIZES), 4),
    "vamp given state": lambda: models.VampPrior(
        MLPEncoder(PROCESS, 2, **SIZES), 4, conditional=True
    ),
    "flow": lambda: models.NormalizingFlow(2, hidden_dims=(16,)),
    "flow given state": lambda: models.NormalizingFlow(2, state(), hidden_dims=(16,)),
    "laplace": lambda: models.Laplace(2),
    "student": lambda: models.StudentT(2, df=6.0),
}


def perturbed(prior: torch.nn.Module) -> torch.nn.Module:
    """The prior in double precision, away from where it starts."""
    prior = prior.double()
    with torch.no_grad():
        for p in prior.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return prior


@pytest.mark.parametrize("name", PLANE)
def test_densities_of_the_plane_integrate_to_one_and_are_those_of_the_draws(name):
    torch.set_default_dtype(torch.double)
    try:
        prior = perturbed(PLANE[name]())
        points, area = grid(14.0, 601 if name.startswith("flow") else 301)
        with torch.no_grad():
            law = prior(DOUBLE[-2:]).expand((2,))
            density = law.log_prob(points.unsqueeze(1)).exp()  # (points, rows)
            assert (density.sum(0) * area - 1).abs().max() < (2e-2 if name == "student" else 3e-3)
            draws = law.sample((4000,))
        for test in (torch.cos, torch.tanh):
            expected = (test(points).unsqueeze(1) * density.unsqueeze(-1)).sum(0) * area
            values = test(draws)
            error = values.std(0) / 4000**0.5
            assert ((values.mean(0) - expected).abs() < 5 * error + 0.01).all()
    finally:
        torch.set_default_dtype(torch.float)


@pytest.mark.parametrize("name", ["flow", "flow given state"])
def test_flows_invert(name):
    law = perturbed(PLANE[name]())(DOUBLE).expand((9,))
    z = law.sample((50,)).double()
    noise = law.flow.transform(z)
    assert (law.flow.transform.inv(noise) - z).abs().max() < 1e-4
    drawn = law.rsample((3,))
    assert torch.allclose(law.log_prob(drawn), law.log_prob(drawn.clone()), atol=1e-4)


@pytest.mark.parametrize("dim", [2, 3, 4, 5, 8])
def test_directions_have_a_density_in_every_dimension(dim):
    torch.manual_seed(dim)
    c = torch.randn(6, dim, dtype=torch.double)
    law = ProjectedNormal(c)
    uniform = ProjectedNormal(torch.zeros(dim, dtype=torch.double))
    area = 2 * math.pi ** (dim / 2) / math.gamma(dim / 2)
    z = uniform.sample((40_000,))
    assert uniform.log_prob(z[:5]) == pytest.approx(-math.log(area))
    ratio = (law.log_prob(z.unsqueeze(1)) + math.log(area)).exp()  # its mean is one
    assert ((ratio.mean(0) - 1).abs() < 5 * ratio.std(0) / 200).all()
    if dim < 5:
        assert torch.allclose(law.log_prob(z[:6]), dist.ProjectedNormal(c).log_prob(z[:6]))
    # Far from the mode, where closed forms cancel, the density falls as it must.
    far = ProjectedNormal(torch.tensor([40.0] + [0.0] * (dim - 1), dtype=torch.double))
    away = -torch.eye(dim, dtype=torch.double)[0]
    # Around r = 0 the integral is (d - 1)! / |t|^d up to (d + 1) d / (2 t^2).
    near = math.lgamma(dim) - dim * math.log(40) - 800 - dim / 2 * math.log(2 * math.pi)
    assert float(far.log_prob(away)) == pytest.approx(near, abs=dim * (dim + 1) / 1600)


def test_gradients_of_mixture_draws_are_those_of_expectations():
    torch.manual_seed(0)
    logits = torch.tensor([0.3, -0.4, 0.1], dtype=torch.double, requires_grad=True)
    loc = torch.randn(3, 2, dtype=torch.double, requires_grad=True)
    scale = (0.5 + torch.rand(3, 2, dtype=torch.double)).requires_grad_()
    parameters = (logits, loc, scale)

    def test(z):
        return torch.sin(z[..., 0] + 0.5 * z[..., 1]) + z[..., 0] * z[..., 1]

    points, area = grid(9.0, 481)
    density = NormalMixture(logits, loc, scale).log_prob(points).exp()
    exact = grad((test(points) * density).sum() * area, parameters)
    runs = []
    for _ in range(60):
        z = NormalMixture(logits, loc, scale).rsample((2000,))
        runs.append(torch.cat([g.flatten() for g in grad(test(z).mean(), parameters)]))
    runs = torch.stack(runs)
    expected = torch.cat([g.flatten() for g in exact])
    assert ((runs.mean(0) - expected).abs() < 4.5 * runs.std(0) / 60**0.5 + 1e-6).all()


def test_mixtures_of_one_component_are_normals():
    loc, scale = torch.randn(4, 3), torch.rand(4, 3) + 0.1
    mixture = NormalMixture(torch.zeros(4, 1), loc.unsqueeze(-2), scale.unsqueeze(-2))
    normal = DiagonalNormal(loc, scale)
    z = normal.sample((7,))
    assert torch.allclose(mixture.log_prob(z), normal.log_prob(z), atol=1e-5)
    assert torch.allclose(mixture.mean, loc)
    assert torch.allclose(mixture.variance, scale.square(), atol=1e-5)


@pytest.mark.parametrize(
    "law",
    [
        DiagonalNormal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])),
        NormalMixture(torch.tensor([0.0, 1.0]), torch.randn(2, 2), torch.rand(2, 2) + 0.2),
        ProjectedNormal(torch.tensor([1.0, -0.5, 0.3])),
        models.NormalizingFlow(2, hidden_dims=(16,))(BATCH),
        CodeCategorical(torch.randn(2, 5)),
        OneHotCodes(torch.randn(2, 5)),
    ],
    ids=lambda law: type(law).__name__,
)
def test_points_of_the_unit_cube_are_carried_to_the_law(law):
    columns = getattr(law, "num_uniforms", law.event_shape.numel())
    with torch.no_grad():
        carried = law.transport(torch.rand(20_000, 1, columns)).squeeze(1).float()
        drawn = law.sample((20_000,)).float()
    for test in (lambda z: z, torch.square):
        a, b = test(carried), test(drawn)
        error = ((a.var(0) + b.var(0)) / 20_000).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 5 * error + 1e-6).all()


def test_codes_are_products_of_categoricals():
    logits = torch.randn(4, 2, 3)
    law, hot = CodeCategorical(logits), OneHotCodes(logits)
    support = law.enumerate_support()
    assert support.shape == (9, 4, 2)
    log_p = law.log_prob(support)
    assert torch.allclose(log_p.exp().sum(0), torch.ones(4))
    assert torch.allclose(log_p, hot.log_prob(hot.enumerate_support()), atol=1e-5)
    assert torch.allclose(
        log_p, dist.Categorical(logits=logits).log_prob(support).sum(-1), atol=1e-5
    )
    other = CodeCategorical(torch.randn(4, 2, 3))
    by_sum = (log_p.exp() * (log_p - other.log_prob(support))).sum(0)
    assert torch.allclose(kl_divergence(law, other), by_sum, atol=1e-5)
    assert torch.allclose(law.entropy(), -(log_p.exp() * log_p).sum(0), atol=1e-5)
    assert not CodeCategorical(torch.zeros(7, 4)).has_enumerate_support  # 4^7 > 4096
    with pytest.raises(NotImplementedError, match="16,384 combinations"):
        CodeCategorical(torch.zeros(7, 4)).enumerate_support()


def test_straight_through_draws_are_one_hot_with_the_right_law_and_a_gradient():
    logits = torch.tensor([[0.2, -1.0, 0.7], [0.0, 0.0, 2.0]], requires_grad=True)
    law = StraightThroughCodes(logits, temperature=0.7)
    z = law.rsample((20_000,))
    assert ((z == 0) | (z == 1)).all()
    assert (z.sum(-1) == 1).all()
    p = logits.softmax(-1)
    assert ((z.mean(0) - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt()).all()
    (g,) = grad((z[..., 0] * torch.tensor([1.0, -1.0])).sum(-1).mean(), logits)
    (g_exact,) = grad((p[:, 0] * torch.tensor([1.0, -1.0])).sum(), logits)
    # Biased, but of the right sign and size.
    assert torch.nn.functional.cosine_similarity(g.flatten(), g_exact.flatten(), 0) > 0.9


# ------------------------------------------------------------------------------------ priors


@pytest.mark.parametrize("conditional", [False, True])
def test_the_vamp_prior_is_the_mixture_of_its_guide(conditional):
    """With tokens as pseudo-inputs, it is the mean of the guide's densities at those rows."""
    encoder = MLPEncoder(PROCESS, 2, **SIZES)
    rows = torch.tensor([[0, 1], [2, 2], [1, 0]])
    prior = models.VampPrior(encoder, pseudo_inputs=rows, conditional=conditional)
    with torch.no_grad():
        prior.logits.mul_(20.0)  # one-hot up to rounding
    batch = BATCH if conditional else PROCESS.corrupt(all_rows(3, 2), 1.0)
    z = torch.randn(9, 2)
    terms = []
    for row in rows:
        x_0 = torch.where(batch.masked, row, batch.x_t)
        loc, scale = encoder(type(batch)(batch.x_t, batch.t, batch.masked, batch.masked, x_0))
        terms.append(DiagonalNormal(loc, scale).log_prob(z))
    expected = torch.logsumexp(torch.stack(terms), 0) - math.log(3)
    assert torch.allclose(prior(batch).log_prob(z), expected, atol=1e-4)


def test_a_conditional_prior_starts_as_its_unconditional_one_and_reads_the_state_alone():
    for make in (
        lambda context: models.LearnedNormal(2, context),
        lambda context: models.Laplace(2, context),
        lambda context: models.StudentT(2, context=context),
    ):
        z = torch.randn(9, 2)
        torch.manual_seed(1)
        conditional = make(state())
        assert torch.allclose(
            conditional(BATCH).log_prob(z), make(None)(BATCH).log_prob(z), atol=1e-5
        )
        law = perturbed(copy.deepcopy(conditional)).float()(BATCH.without_data())
        states = {tuple(row): i for i, row in enumerate(BATCH.x_t.tolist())}
        value = law.log_prob(z[:1].expand(9, 2)).detach()
        for row, i in zip(BATCH.x_t.tolist(), range(9), strict=True):
            assert float(value[i]) == pytest.approx(float(value[states[tuple(row)]]))


def test_a_wrong_context_or_feature_network_is_named():
    with pytest.raises(TypeError, match="context must map a batch to features"):
        models.LearnedNormal(2, context=lambda batch: batch.t)
    with pytest.raises(TypeError, match="features must map a batch"):
        guides.AmortizedFlow(lambda batch: batch.t, 2)
    with pytest.raises(TypeError, match="encoder must have latent_dim, features and soft"):
        models.VampPrior(MLPFeatures(PROCESS, **SIZES))
    with pytest.raises(ValueError, match="at least two levels"):
        models.Hierarchical((2,))
    with pytest.raises(ValueError, match="df must be a number above 2"):
        models.StudentT(2, df=1.0)


def test_the_sphere_under_nuts_by_reparameterisation():
    """The posterior of a direction seen through normal noise, against quadrature on the circle."""
    data = torch.tensor([[0.9, 0.5], [0.4, 1.0]])

    def model():
        z = pyro.sample("z", ProjectedNormal(torch.zeros(2)))
        pyro.sample("x", dist.Normal(z, 0.5).expand([2, 2]).to_event(2), obs=data)

    program = reparam(model, config={"z": ProjectedNormalReparam()})
    mcmc = MCMC(NUTS(program), num_samples=400, warmup_steps=100, disable_progbar=True)
    mcmc.run()
    x = mcmc.get_samples()["z_normal"]
    angles = torch.atan2(x[:, 1], x[:, 0])
    theta = torch.linspace(-math.pi, math.pi, 2001)[:-1]
    z = torch.stack([theta.cos(), theta.sin()], -1)
    log_p = dist.Normal(z.unsqueeze(1), 0.5).log_prob(data).sum((1, 2))
    weight = log_p.softmax(0)
    assert float(angles.mean()) == pytest.approx(float((weight * theta).sum()), abs=0.1)
    spread = ((weight * theta.square()).sum() - (weight * theta).sum().square()).sqrt()
    assert float(angles.std()) == pytest.approx(float(spread), rel=0.2)


# ------------------------------------------------------------------------------------ guides


def test_full_rank_guides_have_the_covariance_that_they_say():
    features = MLPFeatures(PROCESS, **SIZES)
    for guide in (
        guides.AmortizedMultivariateNormal(features, 3),
        guides.AmortizedLowRankNormal(features, 3, rank=2),
    ):
        with torch.no_grad():
            guide.head.linear.weight.mul_(3.0)
            site = trace(guide).get_trace(BATCH).nodes["z"]
            z = site["fn"].sample((4000,))[:, 0].double()
        law = site["fn"].covariance_matrix[0].double()
        centred = z - z.mean(0)
        products = centred.unsqueeze(-1) * centred.unsqueeze(-2)
        assert ((products.mean(0) - law).abs() < 5 * products.std(0) / 4000**0.5).all()
        off = law / law.diagonal().sqrt().unsqueeze(0) / law.diagonal().sqrt().unsqueeze(1)
        assert (off - torch.eye(3)).abs().max() > 0.05  # correlated, unlike mean-field
        if isinstance(guide, guides.AmortizedMultivariateNormal):
            assert guide.rows.tolist() == [1, 2, 2]


def test_semi_amortised_refinement_climbs_each_row_and_leaves_no_trace():
    model = models.VADD(MLPDecoder(PROCESS, 2, **SIZES), models.StandardNormal(2))
    with torch.no_grad():
        model.decoder.latent.weight.mul_(4)
        model.decoder.head.weight.mul_(4)
    encoder = MLPEncoder(PROCESS, 2, **SIZES)
    elbo = MaskedDiffusionELBO(PROCESS)
    batch = PROCESS.corrupt(all_rows(3, 2), 1.0)
    many = batch[torch.arange(9).repeat(200)]
    values = []
    for steps in (0, 3, 12):
        guide = guides.SemiAmortizedNormal(encoder, model, elbo, num_steps=steps)
        values.append(float(elbo.score(model, guide, many).rows.mean().detach()))
    assert values[0] < values[1] < values[2]
    refined = guides.SemiAmortizedNormal(encoder, model, elbo)
    names = {name for name, _ in refined.named_parameters()}
    assert names == {f"encoder.{name}" for name, _ in encoder.named_parameters()}
    assert all(p.grad is None for p in model.parameters())


def test_score_and_enumerated_gradients_agree_in_expectation():
    prior = models.ProductOfCategoricals(3, 2, 2)
    model = models.VADD(MLPDecoder(PROCESS, 2, **SIZES), prior)
    features = MLPFeatures(PROCESS, **SIZES)
    exact = guides.AmortizedCodes(features, 3, 2, "enumerate")
    drawn = guides.AmortizedCodes(features, 3, 2, "score")
    drawn.head = exact.head
    batch = PROCESS.corrupt(all_rows(3, 2), 1.0)
    parameters = list(exact.head.linear.parameters()) + list(model.parameters())

    def gradient(guide):
        loss = MaskedDiffusionELBO(PROCESS).differentiable_loss(model, guide, batch)
        return torch.cat([g.flatten() for g in grad(loss, parameters)])

    expected = gradient(exact)
    runs = torch.stack([gradient(drawn) for _ in range(1500)])
    deviation = (runs.mean(0) - expected) / (runs.std(0) / 1500**0.5 + 1e-7)
    assert deviation.abs().max() < 5
    assert deviation.square().mean() < 1.5


def test_the_guide_of_a_vamp_prior_is_refitted_as_a_copy():
    prior = models.VampPrior(MLPEncoder(PROCESS, 2, **SIZES), 3)
    model = models.VADD(MLPDecoder(PROCESS, 2, **SIZES), prior)
    guide = guides.for_prior(prior)
    elbo = MaskedDiffusionELBO(PROCESS, "chain", num_steps=2)
    rows = all_rows(3, 2)
    with pytest.raises(ValueError, match=r"copy\.deepcopy"):
        fit_guide(model, guide, elbo, rows, 2, batch_size=4, progress=False)
    before = [p.detach().clone() for p in model.parameters()]
    own = copy.deepcopy(guide)
    fit_guide(model, own, elbo, rows, 2, batch_size=4, progress=False)
    assert all((a == b).all() for a, b in zip(model.parameters(), before, strict=True))
    assert any((a != b).any() for a, b in zip(own.parameters(), guide.parameters(), strict=True))


# -------------------------------------------------------------------- the law of a shared latent


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.StandardNormal(2),
        lambda: models.NormalizingFlow(2, state(), hidden_dims=(16,)),
        lambda: models.Categorical(4, 2),
        lambda: models.ProductOfCategoricals(3, 2, 2, state()),
        lambda: models.Hierarchical((2, 2), state()),
    ],
    ids=["normal", "flow", "categorical", "product", "hierarchy"],
)
def test_the_exact_law_of_a_shared_latent_is_that_of_its_samples(make):
    torch.manual_seed(3)
    process = MaskingProcess(3, 3)
    context = StateFeatures(process, **SIZES)
    prior = make()
    if getattr(prior, "context", None) is not None:
        prior.context = context
    prior = perturbed(prior).float()
    model = models.VADD(MLPDecoder(process, prior.latent_dim, **SIZES), prior)
    with torch.no_grad():
        for p in model.decoder.parameters():
            p.mul_(1.8)
    laws = exact_distributions(model, process, (1, 3), latent="shared", num_draws=2**12)
    fresh = exact_distributions(model, process, (1, 3), num_draws=2**12)
    for num_steps, law in laws.items():
        assert float(law.sum()) == pytest.approx(1)
        drawn = metrics.histogram(
            sample(model, process, 30_000, num_steps, latent="shared", seed=1), 3
        )
        assert ((drawn - law).abs() < 5 * (law / 30_000).sqrt() + 1e-3).all()
        single = exact_distribution(model, process, num_steps, num_draws=2**12)
        assert torch.allclose(single, fresh[num_steps])
    assert torch.allclose(laws[1], fresh[1], atol=1e-3)
    assert metrics.total_variation(laws[3], fresh[3]) > 1e-3


def test_joints_are_kept_only_where_the_model_ignores_time():
    process = MaskingProcess(3, 2)
    torch.manual_seed(0)
    decoder = MLPDecoder(process, 2, time_conditioning=True, **SIZES)
    with torch.no_grad():
        decoder.time.weight.mul_(8)
    model = models.VADD(decoder, models.StandardNormal(2))
    law = exact_distribution(model, process, 3, num_draws=2**12)
    drawn = metrics.histogram(sample(model, process, 30_000, 3, seed=0), 3)
    assert ((drawn - law).abs() < 5 * (law / 30_000).sqrt() + 1e-3).all()


def test_conditioned_latents_of_a_trained_pair():
    """Conditioning a latent leaves the tokens' law at that value."""
    model = models.VADD(MLPDecoder(PROCESS, 2, **SIZES), models.MixtureOfNormals(2, 3))
    guide = guides.for_prior(model.prior, MLPFeatures(PROCESS, **SIZES), "mixture")
    fit(model, guide, MaskedDiffusionELBO(PROCESS), all_rows(3, 2), 5, progress=False)
    z = torch.tensor([0.3, -1.0])
    law = exact_distribution(condition(model, {"z": z}), PROCESS, 1)
    x_t = torch.full((1, 2), 3)
    mu = model.decoder(x_t, z.unsqueeze(0), torch.ones(1)).softmax(-1)[0].double()
    assert torch.allclose(law, mu[0].unsqueeze(1) * mu[1], atol=1e-6)


# ---------------------------------------------------------------------- found by reviewers


def test_densities_of_flow_draws_are_functions_of_the_draw():
    law = models.NormalizingFlow(2, hidden_dims=(16,))(BATCH)
    z = law.rsample((4,))
    (direct,) = grad(law.log_prob(z).sum(), z, retain_graph=True)
    (copied,) = grad(law.log_prob(z.clone()).sum(), z)
    assert torch.allclose(direct, copied)
    assert law.log_prob(law.sample()).requires_grad


def test_a_prior_with_a_network_called_encoder_keeps_it_to_itself():
    class Own(torch.nn.Module):
        latent_dim = 2

        def __init__(self):
            super().__init__()
            self.encoder = StateEncoder(PROCESS, 2, **SIZES)

        def forward(self, batch):
            return dist.Normal(*self.encoder(batch)).to_event(1)

    prior = Own()
    guide = guides.for_prior(prior, MLPFeatures(PROCESS, **SIZES))
    assert not {id(p) for p in guide.parameters()} & {id(p) for p in prior.parameters()}


def test_a_guide_without_the_plates_of_the_model_is_refused():
    def prior(batch):
        with pyro.plate("inner", 3, dim=-2):
            w = pyro.sample("w", dist.Normal(0.0, 0.01))
        return w.movedim(-2, -1)

    model = models.VADD(MLPDecoder(PROCESS, 3, **SIZES), prior)
    assert guides.families_for(prior, MLPFeatures(PROCESS, **SIZES)) == ()

    def guide(batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("w", dist.Normal(torch.zeros(len(batch)), 1.0))

    elbo = MaskedDiffusionELBO(PROCESS, max_plate_nesting=2)
    with pytest.raises(ValueError, match=r"'w' stands in plates .* \{\}.*\{-2: 3\}"):
        elbo.loss(model, guide, all_rows(3, 2))


def test_exact_laws_see_a_time_that_matters_in_one_state_only():
    process = MaskingProcess(8, 2)
    base = MLPDecoder(process, **SIZES)

    def decoder(x_t, z, t):
        logits = base(x_t, z, t)
        special = (x_t == 3).any(-1).to(t) * 8 * (t - 0.5)
        return logits + special[:, None, None] * torch.linspace(-1, 1, 8)

    model = models.MDM(decoder)
    law = exact_distribution(model, process, 4)
    drawn = metrics.histogram(sample(model, process, 100_000, 4, seed=0), 8)
    assert ((drawn - law).abs() < 5 * (law / 100_000).sqrt() + 1e-5).all()


def test_an_exact_law_of_a_latent_that_comes_and_goes_is_refused():
    def prior(batch):
        if float(batch.t[0]) < 0.6:
            return pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        return torch.zeros(len(batch), 2)

    model = models.VADD(MLPDecoder(PROCESS, 2, **SIZES), prior)
    with pytest.raises(ValueError, match="'z' is drawn at t ="):
        exact_distribution(model, PROCESS, 3)


def test_latents_with_a_dimension_of_size_one_are_no_supports():
    """Rows keep their own latent, whatever decoder of the user's reads it."""

    class Squeezing(torch.nn.Module):
        time_conditioning = False

        def __init__(self):
            super().__init__()
            self.inner = MLPDecoder(PROCESS, 2, **SIZES)

        def forward(self, x_t, z, t):
            return self.inner(x_t, z.squeeze(-2), t)

    prior = lambda batch: dist.Normal(torch.zeros(1, 2), 1.0).to_event(2)  # noqa: E731
    model = models.VADD(Squeezing(), prior)
    batch = PROCESS.corrupt(torch.tensor([[2, 1], [0, 0], [1, 2]] * 4), 0.5)
    z = torch.randn(12, 1, 2)
    law = trace(condition(model, {"z": z})).get_trace(batch).nodes["x_0"]["fn"]
    plain = model.decoder(batch.x_t, z, batch.t)
    assert torch.equal(law.logits.expand(12, 2, 3), plain)


def test_codes_too_many_to_enumerate_are_refused_and_copies_of_refined_guides_keep_the_model():
    features = MLPFeatures(PROCESS, **SIZES)
    with pytest.raises(ValueError, match=r"9\^4 = 6,561"):
        guides.AmortizedCodes(features, 9, 4, "enumerate")
    model = models.VADD(MLPDecoder(PROCESS, 2, **SIZES), models.StandardNormal(2))
    elbo = MaskedDiffusionELBO(PROCESS)
    encoder = MLPEncoder(PROCESS, 2, **SIZES)
    guide = guides.SemiAmortizedNormal(encoder, model, elbo)
    assert copy.deepcopy(guide).__dict__["model"] is model
    twin, own = copy.deepcopy((model, guide))
    assert own.__dict__["model"] is twin
    with pytest.raises(ValueError, match="num_particles = 3"):
        guides.SemiAmortizedNormal(encoder, model, MaskedDiffusionELBO(PROCESS, num_particles=3))


def relative_pair(prior):
    torch.manual_seed(3)
    model = models.VADD(MLPDecoder(PROCESS, 2, **SIZES), prior)
    return model, guides.RelativeNormal(MLPFeatures(PROCESS, **SIZES), 2, prior)


def chain_batch(share: float):
    """Rows all masked, of which a share of the positions are targets."""
    batch = PROCESS.corrupt(all_rows(3, 2), 1.0)
    target = batch.masked.clone()
    target[:, round(2 * share) :] = False
    return replace(batch, target=target)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_relative_normal_is_the_prior_times_a_power_of_one_factor(share):
    prior = models.ConditionalNormal(StateEncoder(PROCESS, 2, **SIZES))
    torch.nn.init.normal_(prior.network.head.weight)
    _, guide = relative_pair(prior)
    batch = chain_batch(share)
    r = trace(guide).get_trace(batch).nodes["z"]["fn"]
    p = prior(batch)
    shift, raw = guide.head(batch).chunk(2, -1)
    tau = torch.nn.functional.softplus(raw)
    z = torch.randn(50, 1, 2)
    u = (z - p.loc) / p.scale
    factor = share * (shift * (1 + tau) * u - tau * u.square() / 2).sum(-1)
    rest = r.log_prob(z) - p.log_prob(z) - factor
    torch.testing.assert_close(rest, rest[:1].expand_as(rest), rtol=1e-4, atol=1e-4)
    if share == 1:
        torch.testing.assert_close((r.loc - p.loc) / p.scale, shift)


def mixture_prior(context=None) -> models.MixtureOfNormals:
    torch.manual_seed(5)
    prior = models.MixtureOfNormals(2, 4, context=context)
    torch.nn.init.normal_(prior.logits.value)
    torch.nn.init.uniform_(prior.z_raw, -2, 1)
    if context is not None:
        torch.nn.init.normal_(prior.logits.shift.weight)
    return prior


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("conditional", [False, True])
def test_relative_to_a_mixture_is_the_mixture_times_a_power_of_one_factor(conditional, share):
    context = StateFeatures(PROCESS, **SIZES) if conditional else None
    prior = mixture_prior(context)
    _, guide = relative_pair(prior)
    batch = chain_batch(share)
    r = trace(guide).get_trace(batch).nodes["z"]["fn"]
    assert isinstance(r, NormalMixture)
    p = prior(batch)
    shift, raw = guide.head(batch).chunk(2, -1)
    tau = torch.nn.functional.softplus(raw)
    z = 3 * torch.randn(50, 1, 2)
    u = (z - p.mean) / p.variance.sqrt()
    factor = share * (shift * (1 + tau) * u - tau * u.square() / 2).sum(-1)
    rest = r.log_prob(z) - p.log_prob(z) - factor
    torch.testing.assert_close(rest, rest[:1].expand_as(rest), rtol=1e-3, atol=1e-3)


def test_relative_to_a_mixture_of_one_normal_is_relative_to_the_normal():
    mixture, prior = models.MixtureOfNormals(2, 1), models.LearnedNormal(2)
    with torch.no_grad():
        prior.z_loc.value.copy_(torch.tensor([0.5, -1.0]))
        prior.z_raw.value.copy_(torch.tensor([0.1, 2.0]))
        mixture.z_loc.copy_(prior.z_loc.value)
        mixture.z_raw.copy_(prior.z_raw.value)
    (_, one), (_, other) = relative_pair(mixture), relative_pair(prior)
    other.head.load_state_dict(one.head.state_dict())
    first, second = (
        trace(guide).get_trace(chain_batch(0.5)).nodes["z"]["fn"] for guide in (one, other)
    )
    torch.testing.assert_close(first.loc[:, 0], second.loc)
    torch.testing.assert_close(first.scale[:, 0], second.scale)


def test_relative_normal_is_the_prior_where_nothing_is_a_target():
    _, guide = relative_pair(models.StandardNormal(2))
    r = trace(guide).get_trace(chain_batch(0.0)).nodes["z"]["fn"]
    assert (r.loc == 0).all()
    assert (r.scale == 1).all()
    prior = mixture_prior()
    _, guide = relative_pair(prior)
    batch = chain_batch(0.0)
    z = torch.randn(len(batch), 2)
    r = trace(guide).get_trace(batch).nodes["z"]["fn"]
    torch.testing.assert_close(r.log_prob(z), prior(batch).log_prob(z))


def test_another_prior_where_all_is_masked():
    prior = models.AtStart(mixture_prior(), models.StandardNormal(2))
    batch = PROCESS.corrupt(all_rows(3, 2), 0.6)
    start = batch.masked.all(-1)
    assert 0 < int(start.sum()) < len(start)
    z = torch.randn(len(batch), 2)
    law = prior(batch)
    expected = torch.where(start, prior.first(batch).log_prob(z), prior.later(batch).log_prob(z))
    torch.testing.assert_close(law.log_prob(z), expected)
    law.log_prob(z).sum().backward()
    found = [p.grad for p in prior.parameters()]
    assert all(bool(g.isfinite().all()) and bool((g != 0).any()) for g in found)
    draws = law.rsample((4000,))
    torch.testing.assert_close(draws[:, ~start].mean((0, 1)), torch.zeros(2), atol=0.05, rtol=0)
    torch.testing.assert_close(
        draws[:, start].mean((0, 1)), prior.first(batch).mean, atol=0.15, rtol=0
    )
    with torch.no_grad():  # rows that are all in one state share one law
        assert prior(batch[start]).batch_shape == prior(batch[~start]).batch_shape == ()
    # The other way round, and told relative to it.
    swapped = models.AtStart(models.StandardNormal(2), mixture_prior())
    _, guide = relative_pair(swapped)
    r = trace(guide).get_trace(replace(batch, target=torch.zeros_like(batch.target)))
    expected = torch.where(
        start, swapped.first(batch).log_prob(z), swapped.later(batch).log_prob(z)
    )
    torch.testing.assert_close(r.nodes["z"]["fn"].log_prob(z), expected)
    with pytest.raises(TypeError, match=r"a NormalMixture, got .* from later"):
        models.AtStart(models.StandardNormal(2), models.StudentT(2))(batch)
    with pytest.raises(ValueError, match="latents of one size, got 2 and 3"):
        models.AtStart(models.StandardNormal(2), models.StandardNormal(3))(batch)


def test_bounds_and_exact_laws_of_another_prior_where_all_is_masked():
    torch.manual_seed(2)
    decoder = MLPDecoder(PROCESS, 2, **SIZES)
    torch.nn.init.normal_(decoder.head.weight)
    first, later = mixture_prior(), models.StandardNormal(2)
    model = models.VADD(decoder, models.AtStart(first, later))
    law = exact_distribution(model, PROCESS, num_steps=2, num_draws=2**12)
    assert float(law.sum()) == pytest.approx(1, abs=1e-5)
    # One step is that of the first prior alone.
    one = exact_distribution(model, PROCESS, num_steps=1, num_draws=2**12)
    alone = exact_distribution(models.VADD(decoder, first), PROCESS, 1, num_draws=2**12)
    torch.testing.assert_close(one, alone, atol=1e-5, rtol=0)
    guide = guides.RelativeNormal(MLPFeatures(PROCESS, **SIZES), 2, model.prior)
    bound = log_likelihood_bound(
        model, guide, PROCESS, all_rows(3, 2), 2, num_particles=500, num_paths=20, seed=0
    )
    gap = law.log().flatten() - bound.value
    assert -0.1 < float(gap.mean()) < 0.2
    x = sample(model, PROCESS, 20_000, 2, seed=0)
    share = torch.bincount(3 * x[:, 0] + x[:, 1], minlength=9) / len(x)
    torch.testing.assert_close(share, law.flatten().float(), atol=0.015, rtol=0)


def test_the_variance_of_a_narrow_mixture_far_from_zero():
    law = NormalMixture(torch.zeros(1), torch.full((1, 2), 100.0), torch.full((1, 2), 1e-3))
    torch.testing.assert_close(law.variance, torch.full((2,), 1e-6))


def test_a_tilted_mixture_is_normalised_and_carries_gradients():
    torch.manual_seed(0)
    parameters = torch.randn(3), torch.randn(3, 1), torch.rand(3, 1) + 0.1
    slope, curvature = torch.randn(5, 1), torch.rand(5, 1) * 4
    every = [p.double().requires_grad_() for p in (*parameters, slope, curvature)]
    law = NormalMixture(*every[:3])
    tilted = law.tilted(*every[3:])
    z = torch.linspace(-12, 12, 20_001, dtype=torch.double).unsqueeze(-1).unsqueeze(-1)
    with torch.no_grad():
        density = law.log_prob(z) + (every[3] * z - 0.5 * every[4] * z.square()).sum(-1)
        mass = torch.trapezoid(density.exp(), z[:, 0].expand(-1, 5), dim=0)
        found = tilted.log_prob(z)
    torch.testing.assert_close(found, density - mass.log(), rtol=1e-6, atol=1e-6)

    def log_density(*tensors):
        return NormalMixture(*tensors[:3]).tilted(*tensors[3:]).log_prob(z[:3].detach() + 0.3)

    assert torch.autograd.gradcheck(log_density, every)


def test_relative_normal_trains_with_its_model_and_its_copy_alone():
    prior = models.ConditionalNormal(StateEncoder(PROCESS, 2, **SIZES))
    model, guide = relative_pair(prior)
    elbo = MaskedDiffusionELBO(PROCESS, kl_weight=LinearAnnealing(300))
    rows = torch.randint(3, (64, 1)).expand(64, 2).contiguous()
    fit(model, guide, elbo, rows, 600, batch_size=64, learning_rate=1e-2, progress=False)
    with pytest.raises(ValueError, match="share parameters"):
        fit_guide(model, guide, elbo, rows, 1, progress=False)
    chain = MaskedDiffusionELBO(PROCESS, "chain", num_steps=2)
    own = copy.deepcopy(guide)
    before = [p.clone() for p in model.parameters()]
    fit_guide(model, own, chain, rows, 20, batch_size=64, progress=False)
    assert all((a == b).all() for a, b in zip(before, model.parameters(), strict=True))
    law = exact_distribution(model, PROCESS, num_steps=1, num_draws=2**12)
    assert float(law.diagonal().sum()) > 0.7  # 1/3 without; the latent ties the two positions
    bound = log_likelihood_bound(model, guide, PROCESS, rows[:20], 1, num_particles=64, seed=0)
    gap = law[tuple(rows[:20].T)].log().mean() - bound.value.mean()
    assert -0.05 < float(gap) < 0.2


def test_a_latent_of_the_first_step_alone():
    prior = models.StandardNormal(2)
    torch.manual_seed(3)
    decoder = MLPDecoder(PROCESS, 2, **SIZES)
    torch.nn.init.normal_(decoder.head.weight)
    model = models.VADD(decoder, prior, least_time=1.0)
    guide = guides.RelativeNormal(MLPFeatures(PROCESS, **SIZES), 2, prior, least_time=1.0)

    # Where something may be visible the guide is the prior, and the decoder is given zeros.
    tokens = trace(model).get_trace(BATCH).nodes["x_0"]["fn"]
    torch.testing.assert_close(tokens.logits, decoder(BATCH.x_t, torch.zeros(9, 2), BATCH.t))
    r = trace(guide).get_trace(BATCH).nodes["z"]["fn"]
    assert (r.loc == 0).all()
    assert (r.scale == 1).all()
    first = trace(guide).get_trace(chain_batch(1.0)).nodes["z"]["fn"]
    assert (first.loc != 0).all()

    # The law of two steps is that of a first step with the latent and a second one without.
    law = exact_distribution(model, PROCESS, num_steps=2, num_draws=2**12)
    joint = exact_distribution(model, PROCESS, num_steps=1, num_draws=2**12)
    zero = torch.zeros(1, 2)

    def second(given, position):
        x = torch.tensor([given])
        logits = decoder(x, zero, torch.tensor([0.5]))[0, position]
        return logits.double().softmax(-1)

    expected = joint / 4 + torch.outer(second([3, 3], 0), second([3, 3], 1)) / 4
    for j in (0, 1):
        one = joint.sum(1 - j)
        for k in range(3):
            other = second([k, 3] if j == 0 else [3, k], 1 - j)
            row = one[k] * other / 4
            if j == 0:
                expected[k] += row
            else:
                expected[:, k] += row
    torch.testing.assert_close(law, expected, rtol=1e-4, atol=1e-6)

    # The bound says the same as the integral.
    rows = all_rows(3, 2)
    found = log_likelihood_bound(
        model, guide, PROCESS, rows, 2, num_particles=256, num_draws=400, seed=0
    )
    wanted = exact_bound(model, PROCESS, 2, num_draws=2**12).flatten()
    assert ((found.value - wanted) < 4.5 * found.stderr).all()
    assert float((found.value - wanted).abs().max()) < 0.06  # by a guide that is not trained


def test_steps_without_latent_take_one_particle():
    torch.manual_seed(3)
    prior = models.StandardNormal(2)
    decoder = MLPDecoder(PROCESS, 2, **SIZES)
    torch.nn.init.normal_(decoder.head.weight)
    model = models.VADD(decoder, prior, least_time=0.6)
    guide = guides.RelativeNormal(MLPFeatures(PROCESS, **SIZES), 2, prior, least_time=0.6)
    rows = all_rows(3, 2)
    calls = []
    decoder.register_forward_hook(lambda _, args, __: calls.append((args[1].shape, args[2])))

    def bounds(model, **options):
        common = dict(num_particles=16, num_draws=300, seed=0)
        return [
            log_likelihood_bound(model, guide, PROCESS, rows, 4, **common, **options),
            log_likelihood_bound(model, guide, PROCESS, rows, 4, **common, num_paths=4, **options),
            one_token_bound(model, guide, PROCESS, rows, **common, **options),
        ]

    thrifty = bounds(model)
    bound_calls = calls[1:]  # the first looks at the pair
    counts = {1: 0, 16: 0}
    for shape, t in bound_calls:
        if len(shape) > 2 and shape[0] == 16:
            assert (t >= 0.6).all()
            counts[16] += 1
        elif len(t) > 12 and (t < 0.6).all():
            counts[1] += 1
    assert min(counts.values()) > 0
    calls.clear()
    spendthrift = bounds(lambda batch: model(batch))  # a function says nothing of its times
    assert any(len(shape) > 2 and (t < 0.6).any() for shape, t in calls)
    for found, wanted in zip(thrifty, spendthrift, strict=True):
        error = (found.stderr**2 + wanted.stderr**2).sqrt()
        assert ((found.value - wanted.value).abs() < 4.5 * error).all()

    candidates = torch.tensor([0, 0.3, 0.5, 0.8, 1.0], dtype=torch.double)
    terms = [
        torch.stack(
            [
                step_terms(program, guide, PROCESS, rows, candidates, num_draws=20, seed=seed)
                for seed in range(12)
            ]
        )
        for program in (model, lambda batch: model(batch))
    ]
    (found, wanted), above = [t.mean(0) for t in terms], torch.ones(5, 5).triu(1).bool()
    error = sum(t.var(0) / 12 for t in terms).sqrt()
    assert ((found - wanted).abs() < 5 * error)[above].all()


def tied_by_sign(x_t, z, t):
    """All tokens are said by the sign of the latent."""
    sign = 30 * z[..., :1].sign().unsqueeze(-2).expand(*z.shape[:-1], x_t.shape[-1], 1)
    return torch.cat([-sign, sign], -1)


def test_least_time_is_compared_in_the_precision_of_the_programs():
    # A time of the grid one unit of double precision below least_time has a latent in the
    # programs, which are told single precision: the bound has to see it as they do.
    process, prior = MaskingProcess(2, 20), models.StandardNormal(1)
    grid = one_token_grid(process)
    assert float(grid[9]) < 0.45
    assert float(grid.float()[9]) >= torch.tensor(0.45)
    model = models.VADD(tied_by_sign, prior, least_time=0.45)

    def guide(batch):
        side = 4.0 * (2 * batch.x_0[:, :1] - 1)
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Normal(side, 1.0).to_event(1))

    rows = torch.zeros(4, 20, dtype=torch.long)
    common = dict(num_particles=64, num_draws=40, seed=0)
    found = one_token_bound(model, guide, process, rows, **common)
    # Without latent the logits are zero: each of 8 tokens is a fair coin, as are the 12 before.
    assert float(found.value.mean()) < -20 * math.log(2) + 3 * float(found.stderr.mean())
    terms = step_terms(model, guide, process, rows, torch.tensor([0, 0.25, 0.45, 1.0]), seed=0)
    assert float(terms[0, 1]) == pytest.approx(-5 * math.log(2), rel=0.4)


def test_a_model_that_uses_its_latent_where_it_says_it_does_not_is_refused():
    class Careless(models.VADD):
        def _in_use(self, z, batch):
            return z

    process, prior = MaskingProcess(2, 6), models.StandardNormal(1)
    model = Careless(tied_by_sign, prior, least_time=1.0)
    guide = guides.RelativeNormal(MLPFeatures(process, **SIZES), 1, prior, least_time=1.0)
    rows = torch.zeros(4, 6, dtype=torch.long)
    for bound in (one_token_bound, partial(log_likelihood_bound, num_steps=2)):
        with pytest.raises(ValueError, match=r"Careless has least_time = 1.0, but its law of the"):
            bound(model, guide, process, rows, seed=0)
    model.least_time = None
    with pytest.raises(ValueError, match=r"least_time must be a time in \[0, 1\], got None"):
        one_token_bound(model, guide, process, rows, seed=0)
    model.least_time = 0.0
    assert bound(model, guide, process, rows, seed=0).value.isfinite().all()
    with pytest.raises(ValueError, match="batch_size must be"):
        bound(model, guide, process, rows, batch_size=0)


def test_the_guide_has_no_say_where_there_is_no_latent():
    prior, other = models.LearnedNormal(2), models.LearnedNormal(2)
    torch.nn.init.constant_(next(iter(other.parameters())), 0.5)
    torch.manual_seed(3)
    decoder = MLPDecoder(PROCESS, 2, **SIZES)
    torch.nn.init.normal_(decoder.head.weight)
    model = models.VADD(decoder, prior, least_time=1.0)
    features = MLPFeatures(PROCESS, **SIZES)
    rows = all_rows(3, 2)
    values = []
    for law in (prior, other):  # a guide that was fitted with a copy of the prior
        guide = guides.RelativeNormal(features, 2, law, least_time=1.0)
        found = log_likelihood_bound(
            *(model, guide, PROCESS, rows, 64), num_particles=64, num_draws=400, seed=0
        )
        values.append(found)
    error = (values[0].stderr ** 2 + values[1].stderr ** 2).sqrt()
    assert ((values[0].value - values[1].value).abs() < 4.5 * error + 0.01).all()


def test_a_latent_of_late_steps_is_one_that_can_be_trained():
    times = GridTimes([1, 2])
    with pytest.raises(ValueError, match=r"t = 1, which times = UniformTimes.* never draws"):
        MaskedDiffusionELBO(PROCESS, least_time=1.0)
    with pytest.raises(ValueError, match=r"free_bits = 0.1 are shares"):
        MaskedDiffusionELBO(PROCESS, times=times, free_bits=0.1, least_time=1.0)
    elbo = MaskedDiffusionELBO(PROCESS, times=times, least_time=1.0)
    with pytest.raises(ValueError, match=r"has least_time = 1.0, and VADD least_time = 0.0"):
        elbo(*relative_pair(models.StandardNormal(2)))(all_rows(3, 2))

    def scalar(batch):
        return pyro.sample("z", dist.Normal(torch.zeros(len(batch)), 1.0))

    model = models.VADD(MLPDecoder(PROCESS, 2, **SIZES), scalar, least_time=1.0)
    with pytest.raises(
        ValueError, match=r"a vector for each row, \(..., 9, d\), got shape \(9,\)"
    ):
        model(BATCH)


def test_codes_of_the_first_step_alone_are_shared_by_its_rows():
    torch.manual_seed(0)
    decoder = MLPDecoder(PROCESS, 2, **SIZES)
    torch.nn.init.normal_(decoder.head.weight)
    model = models.VADD(decoder, models.Categorical(5, 2), least_time=1.0)
    seen = []
    decoder.register_forward_hook(lambda _, args, __: seen.append(args[1].shape))
    rows = all_rows(3, 2)
    found = log_likelihood_bound(model, guides.NoLatent(), PROCESS, rows, 1, num_draws=2, seed=0)
    law = exact_distribution(model, PROCESS, num_steps=1)
    torch.testing.assert_close(found.value, law.flatten().log(), rtol=1e-4, atol=1e-4)
    assert seen[-1][:2] == (5, 1)


def test_least_time_is_a_time_and_a_time_alone():
    decoder = MLPDecoder(PROCESS, 2, **SIZES)
    for wrong in (1.5, -0.1, True, None):
        with pytest.raises(ValueError, match=r"least_time must be a time in \[0, 1\], got"):
            models.VADD(decoder, models.StandardNormal(2), least_time=wrong)
        with pytest.raises(ValueError, match=r"least_time must be a time in \[0, 1\], got"):
            MaskedDiffusionELBO(PROCESS, least_time=wrong)


def test_relative_normal_is_offered_where_it_fits_and_refused_where_it_does_not():
    features = MLPFeatures(PROCESS, **SIZES)
    assert "relative" in guides.families_for(models.StandardNormal(2), features)
    assert "relative" in guides.families_for(mixture_prior(), features)
    assert "relative" not in guides.families_for(models.StudentT(2), features)
    found = guides.for_prior(models.StandardNormal(2), features, "relative")
    assert isinstance(found, guides.RelativeNormal)
    wrong = guides.RelativeNormal(features, 2, models.StudentT(2))
    with pytest.raises(TypeError, match="needs a prior that returns a DiagonalNormal"):
        wrong(BATCH)
