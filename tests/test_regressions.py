"""Wrong numbers that a review found, each kept from coming back."""

from __future__ import annotations

import gc
import math
import pickle
import weakref

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from conftest import all_rows, small_pair
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from pyro.poutine.messenger import Messenger
from torch import nn

from vadd_pyro import (
    GridTimes,
    MaskedDiffusionELBO,
    MaskingProcess,
    TokenCategorical,
    exact_distribution,
    fit,
    fit_guide,
    guides,
    log_likelihood_bound,
    metrics,
    models,
    sample,
)
from vadd_pyro.nn import MLPDecoder

PROCESS = MaskingProcess(3, 2)
WEIGHT = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))


def tokens(logits, batch):
    return pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)


def from_z(z, batch):
    return tokens((z @ WEIGHT).unflatten(-1, (2, 3)), batch)


def normal_model(batch):
    with pyro.plate("data", len(batch), dim=-1):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        from_z(z, batch)


def normal_guide(batch):
    with pyro.plate("data", len(batch), dim=-1):
        pyro.sample("z", dist.Normal(torch.full((2,), 0.3), 0.7).to_event(1))


def weighted(rows=5):
    x_0 = torch.randint(3, (rows, 2))
    return PROCESS.corrupt(x_0, 1.0, weight=torch.arange(1.0, rows + 1))


@pytest.mark.parametrize("features", [1, 4, 5])
def test_a_plate_of_weights_is_not_the_data_plate(features):
    w = torch.randn(features)

    def model(batch):
        with pyro.plate("features", features, dim=-1):
            v = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(batch), dim=-1):
            tokens((v.sum() * torch.arange(3.0)).expand(len(batch), 2, 3), batch)

    def guide(batch):
        with pyro.plate("features", features, dim=-1):
            pyro.sample("w", dist.Normal(0.2, 0.5))

    batch = weighted()
    loss = MaskedDiffusionELBO(PROCESS, closed_form_kl=False)(model, Substituted(guide, w=w))(
        batch
    )
    log_mu = torch.log_softmax(w.sum() * torch.arange(3.0), -1)[batch.x_0].sum(-1)
    kl = (dist.Normal(0.2, 0.5).log_prob(w) - dist.Normal(0.0, 1.0).log_prob(w)).sum()
    torch.testing.assert_close(loss, kl - (batch.weight * log_mu).sum())
    seen = []

    def watched(batch):
        with pyro.plate("features", features, dim=-1):
            v = pyro.sample("w", dist.Normal(0.0, 1.0))
        seen.append(v)
        with pyro.plate("data", len(batch), dim=-1):
            tokens((v.sum() * torch.arange(3.0)).expand(len(batch), 2, 3), batch)

    for latent in ("fresh", "shared"):
        seen.clear()
        sample(watched, PROCESS, 5, 50, latent=latent)
        assert len(seen) > 1
        assert all((v == seen[0]).all() for v in seen)
    with pytest.raises(ValueError, match="'w' stands outside the data plate"):
        exact_distribution(watched, PROCESS, 2)
    with pytest.raises(ValueError, match="'w' stands outside the data plate"):
        log_likelihood_bound(model, guide, PROCESS, batch.x_0, 2)


class Substituted(Messenger):
    """A program whose latent sites take given values."""

    def __init__(self, program, **values):
        super().__init__()
        self.program, self.values = program, values

    def _process_message(self, msg):
        if msg["type"] == "sample" and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]

    def __call__(self, *args):
        with self:
            return self.program(*args)


def test_a_plate_in_one_program_only_does_not_move_the_weights():
    def bare_model(batch):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(batch), 2), 1.0).to_event(1))
        from_z(z, batch)

    def bare_guide(batch):
        loc = torch.full((len(batch), 2), 0.3)
        pyro.sample("z", dist.Normal(loc, 0.7).to_event(1))

    batch, z = weighted(), torch.randn(5, 2)
    for closed_form in (True, False):
        elbo = MaskedDiffusionELBO(PROCESS, closed_form_kl=closed_form)
        values = [
            elbo(model, Substituted(guide, z=z))(batch)
            for model in (normal_model, bare_model)
            for guide in (normal_guide, bare_guide)
        ]
        for value in values[1:]:
            torch.testing.assert_close(value, values[0])


def test_a_masked_row_with_a_discrete_latent_counts_nothing():
    table = torch.randn(4, 2, 3)
    keep = torch.tensor([True, False, True, False, True])

    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.1, 0.2, 0.3, 0.4])))
            tokens(table[z], batch)

    def enumerated(batch):
        with pyro.plate("data", len(batch), dim=-1):
            law = dist.Categorical(torch.tensor([0.4, 0.3, 0.2, 0.1]))
            pyro.sample("z", law, infer={"enumerate": "parallel"})

    batch = weighted()
    elbo = MaskedDiffusionELBO(PROCESS)
    for guide in (guides.NoLatent(), enumerated):
        whole = elbo.score(model, guide, batch).rows
        part = elbo.score(
            poutine.mask(model, mask=keep), poutine.mask(guide, mask=keep), batch
        ).rows
        torch.testing.assert_close(part, torch.where(keep, whole, 0.0))


def test_a_delta_guide_with_its_density_is_scored_by_that():
    def delta(batch):
        law = dist.Normal(torch.full((len(batch), 2), 0.3), 0.7).to_event(1)
        z = law.rsample()
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Delta(z, log_density=law.log_prob(z), event_dim=1))

    def factor(batch):
        law = dist.Normal(torch.full((len(batch), 2), 0.3), 0.7).to_event(1)
        z = law.rsample()
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Delta(z, event_dim=1))
            pyro.factor("density", law.log_prob(z), has_rsample=True)

    batch = PROCESS.corrupt(torch.randint(3, (20_000, 2)), 1.0)
    elbo = MaskedDiffusionELBO(PROCESS)
    usual = elbo.loss(normal_model, normal_guide, batch) / len(batch)
    for guide in (delta, factor):
        assert elbo.loss(normal_model, guide, batch) / len(batch) == pytest.approx(usual, abs=0.05)
    pyros = Trace_ELBO().loss(normal_model, delta, batch) / len(batch)
    assert pyros == pytest.approx(usual, abs=0.05)


def test_auxiliary_sites_that_would_inflate_the_bound_are_refused():
    def guide(batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("u", dist.Categorical(torch.ones(10)), infer={"is_auxiliary": True})
        normal_guide(batch)

    with pytest.raises(ValueError, match="auxiliary site 'u' is discrete"):
        log_likelihood_bound(normal_model, guide, PROCESS, torch.zeros(2, 2).long(), 1)


def test_factors_and_other_observations_are_refused_by_the_bound():
    def model(batch):
        normal_model(batch)
        with pyro.plate("data", len(batch), dim=-1):
            pyro.factor("bonus", torch.full((len(batch),), 5.0))

    with pytest.raises(ValueError, match="observes 'bonus' beside 'x_0'"):
        log_likelihood_bound(model, normal_guide, PROCESS, torch.zeros(2, 2).long(), 1)


def test_the_score_function_sees_what_all_rows_share():
    logits = torch.zeros(2, requires_grad=True)

    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            tokens(torch.zeros(*z.shape, 2, 3), batch)
        pyro.factor("penalty", 3.0 * z.sum())

    def guide(batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=logits[1] - logits[0]))

    batch = PROCESS.corrupt(torch.randint(3, (2, 2)), 1.0)
    for options in ({}, dict(num_particles=4)):
        elbo = MaskedDiffusionELBO(PROCESS, closed_form_kl=False, **options)
        grads = []
        for _ in range(1500):
            loss = elbo(model, guide)(batch)
            grads.append(torch.autograd.grad(loss, logits)[0])
        grads = torch.stack(grads)
        error = grads.std(0) / len(grads) ** 0.5
        # d/dl of -(2 sigmoid(l) 3) at l = 0, the KL being flat there
        exact = torch.tensor([1.5, -1.5])
        if not options:
            assert ((grads.mean(0) - exact).abs() < 4.5 * error).all()
        assert (grads.mean(0).sign() == exact.sign()).all()


def test_conditioned_and_replayed_sites_do_not_fall_apart():
    batch = weighted()
    z = torch.randn(5, 2)
    with pytest.raises(ValueError, match="'z' is observed in the guide and latent in the model"):
        MaskedDiffusionELBO(PROCESS).loss(
            normal_model, poutine.condition(normal_guide, {"z": z}), batch
        )
    trace = poutine.trace(normal_model).get_trace(batch)
    elbo = MaskedDiffusionELBO(PROCESS, closed_form_kl=False)
    guide = Substituted(normal_guide, z=z)
    torch.testing.assert_close(
        elbo(poutine.replay(normal_model, trace), guide)(batch), elbo(normal_model, guide)(batch)
    )


def test_plates_deeper_than_declared_are_refused():
    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            with pyro.plate("parts", 2, dim=-2):
                pyro.sample("y", dist.Normal(z.float(), 1.0), obs=torch.zeros(2, len(batch)))
            tokens(torch.zeros(*z.shape, 2, 3), batch)

    with pytest.raises(ValueError, match="pass max_plate_nesting=2"):
        MaskedDiffusionELBO(PROCESS).loss(model, guides.NoLatent(), weighted())
    elbo = MaskedDiffusionELBO(PROCESS, max_plate_nesting=2)
    assert math.isfinite(elbo.loss(model, guides.NoLatent(), weighted()))


def test_importance_weights_with_one_particle_keep_the_scale():
    def half(program):
        return poutine.scale(program, 0.5)

    batch, guide = weighted(), Substituted(normal_guide, z=torch.randn(5, 2))
    plain = MaskedDiffusionELBO(PROCESS)(half(normal_model), half(guide))(batch)
    same = MaskedDiffusionELBO(PROCESS, importance_weighted=True)(half(normal_model), half(guide))
    torch.testing.assert_close(same(batch), plain)


def test_no_weight_on_an_infinite_kl_is_no_nan():
    def uniform(batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Uniform(-torch.ones(2), torch.ones(2)).to_event(1))
            from_z(z, batch)

    with pyro.validation_enabled(False):
        loss = MaskedDiffusionELBO(PROCESS, kl_weight=0.0).loss(uniform, normal_guide, weighted())
    assert math.isfinite(loss)


# -------------------------------------------------------- programs and training


def test_swapped_programs_and_wrong_vocabularies_are_refused():
    model, guide = small_pair("standard_normal", PROCESS)
    x_0 = torch.zeros(2, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"lacks|swapped"):
        log_likelihood_bound(guide, model, PROCESS, x_0, 2)
    with pytest.raises(ValueError, match="no observed site 'x_0'"):
        MaskedDiffusionELBO(PROCESS).loss(guide, guide, x_0)
    wide = models.MDM(MLPDecoder(MaskingProcess(4, 2)))
    for call in (
        lambda: MaskedDiffusionELBO(PROCESS).loss(wide, guides.NoLatent(), x_0),
        lambda: sample(wide, PROCESS, 5, 1),
        lambda: log_likelihood_bound(wide, guides.NoLatent(), PROCESS, x_0, 1),
    ):
        with pytest.raises(ValueError, match="4 logits a position, expected vocab_size = 3"):
            call()
    careless = models.VADD(MLPDecoder(PROCESS), models.StandardNormal(2))
    with pytest.raises(ValueError, match="latent_dim = 0 and would ignore z"):
        sample(careless, PROCESS, 5, 1)


def test_replaced_and_transposed_layers_are_trained_under_svi():
    model, guide = small_pair("none", PROCESS)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=MaskedDiffusionELBO(PROCESS))
    x_0 = torch.randint(3, (16, 2))
    svi.step(x_0)
    model.decoder.head = nn.Linear(16, 6)
    model.decoder.hidden.layers[1].weight = nn.Parameter(torch.randn(16, 16).T)
    before = [p.detach().clone() for p in model.parameters()]
    svi.step(x_0)
    after = list(model.parameters())
    assert all((a != b).any() for a, b in zip(after, before, strict=True))


class ScaledPrior(PyroModule):
    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(1.0), dist.constraints.positive)

    def forward(self, batch):
        return dist.Normal(torch.zeros(2), self.scale).to_event(1)


def test_pyro_modules_inside_a_program_are_checked_in_every_form():
    _, guide = small_pair("standard_normal", PROCESS)
    x_0 = torch.randint(3, (8, 2))

    def model():
        return models.VADD(MLPDecoder(PROCESS, 2, hidden_dim=8), ScaledPrior())

    elbo = MaskedDiffusionELBO(PROCESS)
    elbo(model(), guide)(x_0)
    with pytest.raises(ValueError, match=r"parameter 'scale' of VADD"):
        elbo(model(), guide)(x_0)


@pytest.mark.parametrize("local", [False, True])
def test_a_param_statement_inside_a_program_trains_under_svi(local):
    class Guide(guides.AmortizedNormal):
        def forward(self, batch):
            pyro.param("shift", torch.zeros(2))
            z_loc, z_scale = self.encoder(batch)
            with pyro.plate("data", len(batch), dim=-1):
                law = dist.Normal(z_loc + pyro.param("shift"), z_scale).to_event(1)
                return pyro.sample("z", law)

    with pyro.settings.context(module_local_params=local):
        model, guide = small_pair("standard_normal", PROCESS)
        guide = Guide(guide.encoder)
        elbo = MaskedDiffusionELBO(PROCESS)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=elbo)
        for _ in range(3):
            svi.step(torch.randint(3, (16, 2)))
        assert (pyro.param("shift") != 0).all()


def test_fit_guide_holds_batch_statistics_and_plain_pyro_parameters_too():
    class Table(PyroModule):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(6))
            self.norm = nn.BatchNorm1d(2)

        def forward(self, batch):
            with pyro.plate("data", len(batch), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                logits = (self.norm(z) @ WEIGHT + self.table).unflatten(-1, (2, 3))
                tokens(logits, batch)

    model = Table()
    _, guide = small_pair("standard_normal", PROCESS)
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    chain = MaskedDiffusionELBO(PROCESS, "chain", times=GridTimes((1, 2)))
    fit_guide(model, guide, chain, torch.randint(3, (64, 2)), 5, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.table.requires_grad
    assert not model.training


def test_fit_leaves_modules_picklable_collectable_and_in_their_mode():
    model, guide = small_pair("standard_normal", PROCESS)
    model.eval()
    fit(model, guide, MaskedDiffusionELBO(PROCESS), torch.randint(3, (64, 2)), 3, progress=False)
    assert not model.training
    assert guide.training
    assert len(pickle.dumps(model)) > 1000
    assert len(pyro.get_param_store()) == 0
    watch = weakref.ref(model.decoder.head.weight)
    del model, guide
    gc.collect()
    assert watch() is None


def test_handlers_around_modules_are_seen_through():
    model, guide = small_pair("standard_normal", PROCESS)
    model.decoder.hidden = nn.Sequential(model.decoder.hidden, nn.Dropout(0.99))
    wrapped = poutine.scale(model, 2.0)
    before = [p.detach().clone() for p in model.parameters()]
    elbo = MaskedDiffusionELBO(PROCESS)
    x_0 = torch.randint(3, (64, 2))
    fit(wrapped, poutine.scale(guide, 2.0), elbo, x_0, 3, progress=False)
    assert all((a != b).any() for a, b in zip(model.parameters(), before, strict=True))
    model.train()
    law = exact_distribution(model, PROCESS, 1)
    x = sample(wrapped, PROCESS, 20_000, 1, seed=1)
    assert metrics.total_variation(metrics.histogram(x, 3), law) < 0.02
    assert model.training


def test_a_checkpoint_that_cannot_be_written_stops_before_training(tmp_path):
    pair = small_pair("none", PROCESS)
    elbo, x_0 = MaskedDiffusionELBO(PROCESS), torch.randint(3, (8, 2))
    before = pair[0].decoder.head.weight.detach().clone()
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "run.pt"):
        with pytest.raises(ValueError, match=r"folder of that name|cannot be written"):
            fit(*pair, elbo, x_0, 3, checkpoint=path, progress=False)
    assert torch.equal(pair[0].decoder.head.weight, before)
    with pytest.raises(TypeError, match="data must be a tensor of tokens or a function"):
        fit(*pair, elbo, [[0, 1]], 3, progress=False)


def test_a_resume_with_other_data_loss_or_optimiser_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    x_0 = torch.randint(3, (64, 2))

    def run(data=x_0, optimizer=None, **options):
        pair = small_pair("standard_normal", PROCESS)
        elbo = MaskedDiffusionELBO(PROCESS, **options)
        settings = dict(checkpoint=path, resume=True, progress=False, optimizer=optimizer)
        return fit(*pair, elbo, data, 4, **settings)

    run(kl_weight=lambda i: 0.5)
    run(kl_weight=lambda i: 0.5)  # a function is known by its name, not by its address
    for change in (
        dict(data=2 - x_0),
        dict(kl_weight=1.0),
        dict(kl_weight=lambda i: 0.5, importance_weighted=True, num_particles=2),
        dict(kl_weight=lambda i: 0.5, optimizer=lambda p: torch.optim.SGD(p, lr=0.1)),
    ):
        with pytest.raises(ValueError, match="belongs to another run: its"):
            run(**change)


def test_one_call_is_enough_for_one_step_with_a_shared_latent():
    model, _ = small_pair("standard_normal", PROCESS)
    calls = []
    model.decoder.register_forward_hook(lambda *a: calls.append(None))
    sample(model, PROCESS, 50, 1, latent="shared")
    assert len(calls) == 1
    law = metrics.histogram(sample(model, PROCESS, 40_000, 1, latent="shared", seed=1), 3)
    assert metrics.total_variation(law, exact_distribution(model, PROCESS, 1)) < 0.02


def test_metrics_and_histograms_refuse_what_is_no_distribution():
    with pytest.raises(ValueError, match="negative or nan"):
        metrics.total_variation(torch.tensor([1.5, -0.5]), torch.ones(2) / 2)
    with pytest.raises(ValueError, match="negative or nan"):
        metrics.jensen_shannon(torch.tensor([math.nan, 1.0]), torch.ones(2) / 2)
    with pytest.raises(ValueError, match=r"x\[0, 1\] is 2"):
        metrics.histogram(torch.tensor([[0, 2]]), 2)
    with pytest.raises(ValueError, match="samples must have shape"):
        metrics.validity(torch.zeros(0, 2), torch.zeros(5, 2))
    assert metrics.histogram(all_rows(2, 2), 2).unique().tolist() == [0.25]
