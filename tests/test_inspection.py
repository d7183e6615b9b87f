"""Draws of latents, walks through a model, and the report: on models whose answers are known."""

from __future__ import annotations

import html
import json
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import all_rows, small_pair

from vadd_pyro import (
    BalancedTimes,
    LinearAnnealing,
    MaskedDiffusionELBO,
    MaskingProcess,
    TokenCategorical,
    data,
    exact_distribution,
    fit,
    guides,
    metrics,
    models,
    zoo,
)
from vadd_pyro.inspection import (
    follow_sample,
    guide_log_density,
    inspect_pair,
    latent_path,
    load_netcdf,
    model_log_density,
    pareto_k,
    posterior_draws,
    posterior_predictive,
    prior_draws,
    reference_posterior,
    token_probabilities,
)
from vadd_pyro.nn import MLPDecoder, MLPEncoder

PROCESS = MaskingProcess(3, 2)
X = torch.randint(3, (12, 2), generator=torch.Generator().manual_seed(1))


def built(prior, process=PROCESS, guide="auto"):
    torch.manual_seed(0)
    pair = zoo.build(prior, guide, process, hidden_dim=16, num_codes=9)
    with torch.no_grad():
        for parameter in pair.model.decoder.parameters():
            parameter.mul_(2.0)
    return pair.model, pair.guide


# --------------------------------------------------------------------------- draws


@pytest.mark.parametrize("prior", sorted(zoo.PRIORS))
def test_weights_average_to_the_evidence_for_every_prior(prior):
    model, guide = built(prior)
    batch = PROCESS.corrupt(X, 1.0)
    draws = posterior_draws(model, guide, batch, 4000, seed=0)
    log_p = exact_distribution(model, PROCESS, 1)[tuple(X.T)].log()
    weights = (draws.log_weights.double() - log_p).exp()
    error = weights.std(0) / len(weights) ** 0.5
    assert ((weights.mean(0) - 1).abs() < 5 * error + 2e-3).all()
    columns, names = draws.columns()
    assert columns.shape == (4000, 12, len(names))
    if draws.exact:
        assert float(weights.std(0).max()) < 1e-5
    elif draws.sites:
        joint = model_log_density(model, batch, draws.sites)
        assert torch.allclose(joint, draws.log_likelihood + draws.log_prior, atol=1e-4)
        log_r = guide_log_density(guide, batch, draws.sites)
        assert torch.allclose(joint - log_r, draws.log_weights, atol=1e-4)


def test_summed_out_codes_are_drawn_from_their_exact_posterior():
    model, guide = built("categorical")
    batch = PROCESS.corrupt(X[:3], 1.0)
    draws = posterior_draws(model, guide, batch, 20_000, seed=0)
    joint = torch.stack(
        [model_log_density(model, batch, {"z": torch.full((1, 3), c)})[0] for c in range(9)]
    )
    posterior = joint.softmax(0)
    shares = torch.stack([(draws.sites["z"] == c).float().mean(0) for c in range(9)])
    assert (shares - posterior).abs().max() < 5 * 0.5 / 20_000**0.5
    assert torch.allclose(model_log_density(model, batch, {})[0], joint.logsumexp(0), atol=1e-5)


def mixed(batch):
    """A code that is summed out and a normal that the guide draws, both needed."""
    with pyro.plate("data", len(batch), dim=-1):
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        logits = torch.stack([u * (c + 1), -u + c, 0.5 * u * c], -1)
        logits = logits.unsqueeze(-2).expand(*logits.shape[:-1], 2, 3)
        pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)


def mixed_guide(batch):
    with pyro.plate("data", len(batch), dim=-1):
        pyro.sample("u", dist.Normal(0.3, 1.1))


def test_codes_beside_a_drawn_latent_come_from_their_conditional():
    batch = PROCESS.corrupt(X[:2], 1.0)
    draws = posterior_draws(mixed, mixed_guide, batch, 6000, seed=0)
    assert list(draws.sites) == ["c", "u"]
    u = draws.sites["u"]
    joint = torch.stack(
        [
            model_log_density(mixed, batch, {"u": u, "c": torch.full_like(u, c).long()})
            for c in range(3)
        ]
    )
    log_r = dist.Normal(0.3, 1.1).log_prob(u)
    assert torch.allclose(draws.log_weights, joint.logsumexp(0) - log_r, atol=1e-4)
    expected = joint.softmax(0)[2]
    drawn = (draws.sites["c"] == 2).float()
    error = (expected * (1 - expected)).mean(0).sqrt() / 6000**0.5
    assert ((drawn - expected).mean(0).abs() < 5 * error).all()
    picked = joint.gather(0, draws.sites["c"].unsqueeze(0))[0]
    assert torch.allclose(picked, draws.log_likelihood + draws.log_prior, atol=1e-4)


def test_two_summed_codes_keep_their_names_and_values():
    def pair_of_codes(batch):
        with pyro.plate("data", len(batch), dim=-1):
            a = pyro.sample("a", dist.Categorical(torch.tensor([0.9, 0.1])))
            b = pyro.sample("b", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
            sure = 30.0 * torch.nn.functional.one_hot((a + b) % 3, 3).float()
            logits = sure.unsqueeze(-2).expand(*sure.shape[:-1], 2, 3)
            pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)

    rows = torch.tensor([[0, 0], [1, 1], [2, 2]])
    draws = posterior_draws(
        pair_of_codes, guides.NoLatent(), PROCESS.corrupt(rows, 1.0), 5000, seed=0
    )
    a, b = draws.sites["a"], draws.sites["b"]
    assert ((a + b) % 3 == rows[:, 0]).all()
    # Row 0: (0, 0) with .9 * .2, (1, 2) with .1 * .5.
    share = float((a[:, 0] == 1).float().mean())
    assert abs(share - 0.05 / 0.23) < 5 * 0.5 / 5000**0.5


def test_completions_follow_the_model_and_reconstructions_the_guide():
    model, guide = built("standard_normal")
    x_t = torch.tensor([[1, 3], [3, 3]])
    hidden = x_t == 3
    batch = replace(
        PROCESS.corrupt(torch.tensor([[1, 2], [0, 2]]), 1.0), x_t=x_t, masked=hidden, target=hidden
    )
    written = posterior_predictive(model, batch, 20_000, seed=0)
    assert written.shape == (20_000, 2, 2)
    assert (written[:, 0, 0] == 1).all()
    law = metrics.histogram(written[:, 1], 3)
    assert metrics.total_variation(law, exact_distribution(model, PROCESS, 1)) < 0.02
    several = posterior_predictive(model, batch, 20_000, process=PROCESS, num_steps=3, seed=0)
    start = batch[torch.tensor([1])]
    law = metrics.histogram(several[:, 1], 3)
    assert float(start.t) == 1.0
    assert metrics.total_variation(law, exact_distribution(model, PROCESS, 3)) < 0.02
    rebuilt = posterior_predictive(model, batch, 20_000, guide=guide, seed=0)
    draws = posterior_draws(model, guide, batch, 20_000, seed=1)
    expected = token_probabilities(model, batch, draws.sites).mean(0)[1, 0]
    found = torch.bincount(rebuilt[:, 1, 0], minlength=3) / 20_000
    assert (found - expected).abs().max() < 0.02


def test_bad_batches_and_programs_are_refused_by_name():
    model, guide = built("standard_normal")
    batch = PROCESS.corrupt(X, 1.0)
    with pytest.raises(ValueError, match="x_0 is None"):
        posterior_draws(model, guide, batch.without_data(), 5)
    nothing = replace(batch, target=batch.target & (torch.arange(12) != 4).unsqueeze(-1))
    with pytest.raises(ValueError, match="row 4 of the batch has no target"):
        posterior_draws(model, guide, nothing, 5)
    with pytest.raises(ValueError, match="num_draws must be an integer of at least 1, got 0"):
        prior_draws(model, batch, 0)
    with pytest.raises(ValueError, match="expected the process"):
        posterior_predictive(model, batch, 5, num_steps=2)

    def shared(batch):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(batch), dim=-1):
            logits = (w[..., None, None] * torch.ones(len(batch), 2, 3)).cumsum(-1)
            pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)

    def shared_guide(batch):
        pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'w' stands outside the data plate"):
        posterior_draws(shared, shared_guide, batch, 5)


# --------------------------------------------------------------------------- walks


@pytest.mark.parametrize("prior", ["none", "standard_normal", "hierarchical", "product"])
def test_followed_samples_have_the_law_of_the_sampler(prior):
    model, _ = built(prior)
    path = follow_sample(model, PROCESS, 3, num_samples=20_000, seed=0)
    assert path.states.shape == (4, 20_000, 2)
    assert path.times.tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert (path.states[0] == 3).all()
    assert (path.states[-1] < 3).all()
    written = path.states[:-1] < 3
    assert (path.states[1:][written] == path.states[:-1][written]).all()
    law = metrics.histogram(path.states[-1], 3)
    assert metrics.total_variation(law, exact_distribution(model, PROCESS, 3)) < 0.02
    assert all(value.shape[:2] == (3, 20_000) for value in path.latents.values())


def test_paths_move_one_coordinate_through_every_kind_of_latent():
    batch = PROCESS.corrupt(X[:1], 1.0)
    for prior in zoo.PRIORS:
        if prior == "none":
            continue
        model, _ = built(prior)
        draws = prior_draws(model, batch, 500, seed=0)
        path = latent_path(draws)
        assert (path.coordinate.diff() > 0).all()
        p = token_probabilities(model, batch, path.values)
        assert p.shape == (len(path.coordinate), 1, 2, 3)
        assert torch.allclose(p.sum(-1), torch.ones(p.shape[:-1]))
        if prior == "spherical":
            assert torch.allclose(path.values["z"].norm(dim=-1), torch.ones(()), atol=1e-5)
        if prior == "product_one_hot":
            assert ((path.values["z"] == 1).sum(-1) == 1).all()
            assert path.coordinate.tolist() == [0, 1, 2]
        if prior == "standard_normal":
            assert abs(float(path.coordinate[0]) + 2.33) < 0.5
            assert len(path.values["z"][:, 0, 1].unique()) == 1
    with pytest.raises(ValueError, match="site must be among z"):
        latent_path(draws, "u")
    with pytest.raises(ValueError, match="lack the latents z"):
        token_probabilities(model, batch, {})


# -------------------------------------------------------------------------- report


class Blind(torch.nn.Module):
    """An encoder that does not see which positions are masked."""

    def __init__(self, encoder, mask_id):
        super().__init__()
        self.encoder = encoder
        self.mask_id = mask_id

    def forward(self, batch):
        everything = torch.ones_like(batch.masked)
        x_t = torch.full_like(batch.x_t, self.mask_id)
        t = torch.ones_like(batch.t)
        return self.encoder(replace(batch, x_t=x_t, masked=everything, target=everything, t=t))


def trained_on_circles(collapsed):
    """A pair trained as it should be, or with a recognition network blind to the mask and no
    annealing, which collapses.
    """
    circles = data.circles(vocab_size=16)
    process = circles.process()
    torch.manual_seed(0)
    model = models.VADD(MLPDecoder(process, 2, hidden_dim=64), models.StandardNormal(2))
    encoder = MLPEncoder(process, 2, hidden_dim=64)
    guide = guides.AmortizedNormal(Blind(encoder, process.mask_id) if collapsed else encoder)
    elbo = MaskedDiffusionELBO(process)
    if not collapsed:
        annealing = LinearAnnealing(300, start=0.001)
        elbo = MaskedDiffusionELBO(process, times=BalancedTimes(), kl_weight=annealing)
    options = {"learning_rate": 3e-3, "ema_decay": 0.99, "batch_size": 128, "progress": False}
    fit(model, guide, elbo, circles.sample(20_000), 900, monitor_every=None, **options)
    return circles, process, model, guide


@pytest.mark.parametrize("collapsed", [True, False])
def test_the_report_calls_a_collapsed_model_collapsed_and_a_healthy_one_healthy(
    collapsed, tmp_path
):
    circles, process, model, guide = trained_on_circles(collapsed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    verdicts = inspect_pair(
        *(model, guide, process, circles.sample(300, seed=9), tmp_path / "report"),
        truth=circles.probabilities,
        num_draws=100,
        num_reference_rows=3,
        progress=False,
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    used = verdicts["Is the latent used?"]
    couples = verdicts["What does it couple?"]
    if collapsed:
        assert used.level == "bad"
        assert used.text.startswith("collapsed")
        assert couples.level == "bad"
    else:
        assert used.level == "good"
        assert used.text.startswith("healthy: KL")
        assert couples.numbers["share"] > 0.2  # of a short training; none when collapsed
    page = (tmp_path / "report" / "report.html").read_text()
    assert "could not be answered" not in page
    for verdict in verdicts.values():
        assert html.escape(verdict.text) in page
    figures = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert figures == {name for name in figures if f'src="{name}"' in page}
    assert page.count("<figure>") == len(figures) >= 9
    numbers = json.loads((tmp_path / "report" / "inspection.json").read_text())
    assert numbers["verdicts"]["Is the latent used?"]["level"] == used.level
    idata = load_netcdf(tmp_path / "report" / "posterior.nc")
    assert idata["posterior"]["z"].shape == (1, 100, 64, 2)


@pytest.mark.parametrize(
    "prior", ["none", "categorical", "hierarchical", "spherical", "product_one_hot"]
)
def test_every_kind_of_pair_is_inspected(prior, tmp_path):
    process = MaskingProcess(3, 4)
    model, guide = built(prior, process)
    x_0 = torch.randint(3, (120, 4), generator=torch.Generator().manual_seed(0))
    verdicts = inspect_pair(
        model, guide, process, x_0, tmp_path, num_draws=40, num_reference_rows=3, progress=False
    )
    expected = {"none": 2, "categorical": 4}.get(prior, 7)
    assert len(verdicts) == expected
    page = (tmp_path / "report.html").read_text()
    assert "nan" not in page
    assert "could not be answered" not in page


def test_what_cannot_be_inspected_is_refused_before_any_work(tmp_path):
    model, guide = small_pair("standard_normal", PROCESS)
    rows = all_rows(3, 2)
    with pytest.raises(ValueError, match="x_0 has 9 rows: expected at least 100"):
        inspect_pair(model, guide, PROCESS, rows, tmp_path)
    many = rows.repeat(12, 1)
    with pytest.raises(ValueError, match="num_draws must be an integer of at least 30, got 5"):
        inspect_pair(model, guide, PROCESS, many, tmp_path, num_draws=5)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        inspect_pair(model, guide, PROCESS, many, tmp_path / "file")


def test_latents_in_plates_inside_the_data_plate_keep_their_place():
    """One size of the plate is one, which must not be mistaken for no plate."""
    process = MaskingProcess(3, 2)

    def program(size, loc=None):
        def inner(batch):
            with pyro.plate("data", len(batch), dim=-1):
                w = pyro.sample("w", dist.Normal(0.0 if loc is None else loc, 1.0))
                with pyro.plate("inner", size, dim=-2):
                    u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                if loc is None:
                    total = w + u.sum(-1).sum(-2)[..., None, :]
                    logits = total[..., None, None] * torch.arange(3.0).expand(2, 3)
                    law = TokenCategorical(logits, batch.target)
                    pyro.sample("x_0", law, obs=batch.x_0)

        return inner

    for size in (1, 3):
        model, guide = program(size), program(size, 0.2)
        batch = process.corrupt(X[:4], 1.0)
        draws = posterior_draws(model, guide, batch, 50, seed=0, max_plate_nesting=2)
        assert draws.sites["w"].shape == (50, 4)
        assert draws.sites["u"].shape == (50, 4, size, 2)
        total = draws.sites["w"] + draws.sites["u"].sum((-1, -2))
        law = (total[..., None] * torch.arange(3.0)).log_softmax(-1)
        expected = sum(
            law.gather(-1, batch.x_0[:, j].expand(50, 4).unsqueeze(-1))[..., 0] for j in (0, 1)
        )
        assert torch.allclose(draws.log_likelihood, expected, atol=1e-5)
        joint = model_log_density(model, batch, draws.sites, max_plate_nesting=2)
        log_r = guide_log_density(guide, batch, draws.sites, max_plate_nesting=2)
        assert torch.allclose(draws.log_weights, joint - log_r, atol=1e-4)
        assert prior_draws(model, batch, 7, max_plate_nesting=2).tokens.shape == (7, 4, 2)


def test_a_latent_whose_law_depends_on_a_summed_code_is_weighed_against_the_mixture():
    means = torch.tensor([-2.0, 0.0, 1.0])
    shares = torch.tensor([0.2, 0.3, 0.5])

    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            c = pyro.sample("c", dist.Categorical(shares))
            z = pyro.sample("z", dist.Normal(means[c], 0.5))
            logits = z[..., None, None] * torch.arange(3.0).expand(2, 3)
            pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)

    def guide(batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.5))

    batch = PROCESS.corrupt(X[:3], 1.0)
    for number in (3, 50):  # three draws are as many as codes
        draws = posterior_draws(model, guide, batch, number, seed=0)
        z = draws.sites["z"]
        assert z.shape == draws.sites["c"].shape == (number, 3)
        prior = (dist.Normal(means, 0.5).log_prob(z[..., None]) + shares.log()).logsumexp(-1)
        law = (z[..., None] * torch.arange(3.0)).log_softmax(-1)
        picked = [law.gather(-1, batch.x_0[:, j].expand(number, 3)[..., None]) for j in (0, 1)]
        expected = prior + sum(p[..., 0] for p in picked)
        assert torch.allclose(model_log_density(model, batch, {"z": z}), expected, atol=1e-4)
        log_r = dist.Normal(0.0, 1.5).log_prob(z)
        assert torch.allclose(draws.log_weights, expected - log_r, atol=1e-4)


def test_nuts_and_the_guide_agree_on_a_row_left_alone_and_differ_on_one_broken_on_purpose():
    noise = 0.7

    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x_0", dist.Normal(z, noise).to_event(1), obs=batch.x_0)

    def guide(batch):
        """The posterior, N(x / (1 + s^2), s^2 / (1 + s^2)); row 1 shifted and narrowed."""
        wrong = (batch.x_0[:, :1] == 0.8).float()
        scale = (noise**2 / (1 + noise**2)) ** 0.5
        loc = batch.x_0 / (1 + noise**2) + 1.5 * scale * wrong
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Normal(loc, scale / (1 + wrong)).to_event(1))

    batch = replace(PROCESS.corrupt(X[:2], 1.0), x_0=torch.tensor([[0.3, -1.0], [0.8, 0.1]]))
    reference = reference_posterior(model, batch, 250, guide=guide, num_warmup=200, seed=0)
    own = posterior_draws(model, guide, batch, 1000, seed=0)
    true = reference.draws.sites["z"]
    apart = ((own.sites["z"].mean(0) - true.mean(0)).abs() / true.std(0)).amax(-1)
    k = pareto_k(own.log_weights)
    assert float(reference.r_hat.max()) < 1.02
    assert float(apart[0]) < 0.2
    assert float(apart[1]) > 1.2
    assert float(k[0]) < 0.1  # all weights are equal
    assert float(k[1]) > 0.7
