"""Both parameter regimes of Pyro, several models in one process, and Pyro's own tools around a
program.
"""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import PRIORS, small_pair
from pyro.infer import SVI, Predictive
from pyro.nn import PyroModule, PyroParam
from torch import nn

from vadd_pyro import MaskedDiffusionELBO, MaskingProcess, TokenCategorical, data, fit
from vadd_pyro.nn import MLPDecoder, MLPEncoder
from vadd_pyro.programs import evaluation

PROCESS = MaskingProcess(2, 3)
X = data.tied_bits(3).sample(256)


def parameters(*programs):
    return [p for program in programs for p in program.parameters()]


def trains(step, *programs):
    """Every parameter moves and the loss falls."""
    before = [p.detach().clone() for p in parameters(*programs)]
    losses = [step() for _ in range(40)]
    after = parameters(*programs)
    assert all((a != b).any() for a, b in zip(after, before, strict=True))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def svi_step(model, guide, elbo):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), loss=elbo)
    return lambda: svi.step(X)


def module_step(model, guide, elbo):
    loss = elbo(model, guide)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.03)

    def step():
        optimizer.zero_grad()
        value = loss(X)
        value.backward()
        optimizer.step()
        return float(value.detach())

    return step


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("form", [svi_step, module_step])
@pytest.mark.parametrize("prior", PRIORS)
def test_pairs_train_in_both_forms_and_both_regimes(prior, form, local):
    with pyro.settings.context(module_local_params=local):
        model, guide = small_pair(prior, PROCESS)
        trains(
            form(model, guide, MaskedDiffusionELBO(PROCESS, "chain", num_steps=2)), model, guide
        )


def test_both_forms_take_the_same_path():
    results = []
    for form in (svi_step, module_step):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        model, guide = small_pair("standard_normal", PROCESS)
        step = form(model, guide, MaskedDiffusionELBO(PROCESS))
        pyro.set_rng_seed(2)
        results.append([step() for _ in range(5)])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_two_models_in_one_process_both_train():
    first, second = (small_pair("standard_normal", PROCESS) for _ in range(2))
    elbo = MaskedDiffusionELBO(PROCESS)
    trains(svi_step(*first, elbo), *first)
    kept = [p.detach().clone() for p in parameters(*first)]
    trains(svi_step(*second, elbo), *second)
    assert all((a == b).all() for a, b in zip(parameters(*first), kept, strict=True))
    duplicate = copy.deepcopy(second)
    trains(svi_step(*duplicate, elbo), *duplicate)


class NetModel(PyroModule):
    """A PyroModule of plain layers."""

    def __init__(self):
        super().__init__()
        self.net = MLPDecoder(PROCESS, 2, hidden_dim=16, num_layers=1, embedding_dim=4)

    def forward(self, batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = self.net(batch.x_t, z, batch.t)
            pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)


class NetGuide(PyroModule):
    """Its guide, with an attribute of the same name."""

    def __init__(self):
        super().__init__()
        self.net = MLPEncoder(PROCESS, 2, hidden_dim=16, num_layers=1, embedding_dim=4)

    def forward(self, batch):
        z_loc, z_scale = self.net(batch)
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Normal(z_loc, z_scale).to_event(1))


@pytest.mark.parametrize("local", [False, True])
def test_model_and_guide_with_the_same_attribute_both_train(local):
    with pyro.settings.context(module_local_params=local):
        for _ in range(2):  # the second pair meets the first one's entries in the store
            model, guide = NetModel(), NetGuide()
            trains(svi_step(model, guide, MaskedDiffusionELBO(PROCESS)), model, guide)


class ScaleModel(PyroModule):
    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(1.0), dist.constraints.positive)
        self.table = nn.Parameter(torch.zeros(3, 2))

    def forward(self, batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, self.scale))
            logits = self.table + z[..., None, None] * torch.tensor([0.0, 1.0])
            pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)


class ScaleGuide(PyroModule):
    def __init__(self, name="scale"):
        super().__init__()
        self.name = name
        setattr(self, name, PyroParam(torch.tensor(1.0), dist.constraints.positive))

    def forward(self, batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Normal(0.0, getattr(self, self.name)))


def test_parameters_of_pyro_modules_that_would_be_shared_are_refused_by_name():
    elbo = MaskedDiffusionELBO(PROCESS)
    optim = pyro.optim.Adam({"lr": 0.01})
    with pytest.raises(ValueError, match=r"parameter 'scale' of ScaleGuide.*module_local_params"):
        SVI(ScaleModel(), ScaleGuide(), optim, loss=elbo).step(X)
    pyro.clear_param_store()
    model, guide = ScaleModel(), ScaleGuide("width")
    svi = SVI(model, guide, optim, loss=elbo)
    before = [model.scale_unconstrained.item(), guide.width_unconstrained.item()]
    for _ in range(3):
        svi.step(X)
    assert model.scale_unconstrained.item() != before[0]
    assert guide.width_unconstrained.item() != before[1]
    with pytest.raises(ValueError, match="of ScaleModel would share"):
        SVI(ScaleModel(), ScaleGuide("other"), optim, loss=elbo).step(X)
    with pytest.raises(ValueError, match="of ScaleModel would share"):
        fit(ScaleModel(), ScaleGuide("other"), elbo, X, 2, progress=False)
    with pyro.settings.context(module_local_params=True):
        model, guide = ScaleModel(), ScaleGuide()
        fit(model, guide, elbo, X, 3, progress=False)
        assert model.scale_unconstrained.item() != 0
        before = [p.detach().clone() for p in parameters(model, guide)]
        SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=elbo).step(X)
        after = parameters(model, guide)
        assert all((a != b).any() for a, b in zip(after, before, strict=True))


# -------------------------------------------------- a pair with no class of ours


def own_model(batch):
    """Two latents in a hierarchy, plain functions, parameters in Pyro's store."""
    net = pyro.module("own_decoder", OWN["decoder"])
    spread = pyro.param("spread", torch.tensor(0.5), constraint=dist.constraints.positive)
    with pyro.plate("data", len(batch), dim=-1):
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        low = pyro.sample("low", dist.Normal(top, spread))
        logits = net(torch.stack([top.expand_as(low), low], -1)).unflatten(-1, (3, 2))
        law = dist.Categorical(logits=logits).mask(batch.target).to_event(1)
        pyro.sample("x_0", law, obs=batch.x_0)


def own_guide(batch):
    net = pyro.module("own_encoder", OWN["encoder"])
    seen = torch.cat([batch.x_0 * batch.masked, batch.target], -1).float()
    with pyro.plate("data", len(batch), dim=-1):
        loc_low, loc_top, raw = net(seen).unbind(-1)
        scale = nn.functional.softplus(raw) + 0.01
        low = pyro.sample("low", dist.Normal(loc_low, scale))
        pyro.sample("top", dist.Normal(loc_top + 0.1 * low, scale))


OWN: dict[str, nn.Module] = {}


@pytest.fixture
def own_pair():
    OWN["decoder"] = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 6))
    OWN["encoder"] = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    return own_model, own_guide


@pytest.mark.parametrize("form", ["svi", "fit"])
def test_a_hand_written_pair_trains_samples_and_gets_a_bound(own_pair, form, tmp_path):
    from vadd_pyro import exact_bound, exact_distribution, log_likelihood_bound, metrics, sample

    model, guide = own_pair
    elbo = MaskedDiffusionELBO(PROCESS, "chain", num_steps=1)
    if form == "svi":
        step = svi_step(model, guide, elbo)
        losses = [step() / len(X) for _ in range(400)]
    else:
        path = tmp_path / "own.pt"
        losses = fit(
            model, guide, elbo, X, 400, learning_rate=0.03, progress=False, checkpoint=path
        ).loss
        saved = torch.load(path, weights_only=True)
        assert "store.spread" in saved["weights"]["store"]
    assert losses[-1] < 1.2  # independent bits would cost 3 log 2 = 2.08, tied ones log 2
    assert pyro.param("spread").item() != 0.5
    law = exact_distribution(model, PROCESS, 1)
    assert law[0, 0, 0] + law[1, 1, 1] > 0.8  # three tied bits drawn at once
    x = sample(model, PROCESS, 2000, 1, seed=0)
    assert metrics.total_variation(metrics.histogram(x, 2), law) < 0.06
    rows = X[:50]
    value, error = log_likelihood_bound(model, guide, PROCESS, rows, 1, num_particles=256)
    exact = law[tuple(rows.T)].log()
    assert (value < exact + 5 * error + 1e-4).all()
    assert (value > exact - 0.2).all()
    assert (
        exact_bound(model, PROCESS, 2) <= exact_distribution(model, PROCESS, 2).log() + 1e-9
    ).all()


def test_predictive_and_particles_broadcast():
    for prior in PRIORS:
        model, _ = small_pair(prior, PROCESS)
        batch = PROCESS.corrupt(X[:5], 1.0).without_data()
        for parallel in (False, True):
            draws = Predictive(model, num_samples=6, parallel=parallel)(batch)
            assert draws["x_0"].shape == (6, 5, 3)


def test_evaluation_puts_every_module_back():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    with evaluation(model, lambda batch: None):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
    assert model.training
    assert not model[1].training
    assert torch.is_grad_enabled()
