"""The unrolled chain is a Pyro model like any other."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from conftest import small_pair
from pyro.infer import SVI, Predictive, Trace_ELBO

from vadd_pyro import (
    MaskedDiffusionELBO,
    MaskingProcess,
    Program,
    TokenCategorical,
    exact_distribution,
    metrics,
    sample,
    unroll,
)
from vadd_pyro.nn import MLPEncoder

PROCESS = MaskingProcess(3, 3)
BATCHES, COPIES = 200, 50


class DiscreteModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(4, 3, 3))
        self.prior = torch.nn.Parameter(torch.randn(4))

    def forward(self, batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Categorical(logits=self.prior))
            pyro.sample("x_0", TokenCategorical(self.table[z], batch.target), obs=batch.x_0)


class DiscreteGuide(Program):
    def __init__(self):
        super().__init__()
        self.encoder = MLPEncoder(PROCESS, 2, hidden_dim=8, num_layers=1, embedding_dim=4)

    def forward(self, batch):
        logits = torch.cat(self.encoder(batch), -1) * 3
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Categorical(logits=logits))


def mean_and_error(values):
    values = torch.tensor(values, dtype=torch.double)
    return values.mean(), values.std() / len(values) ** 0.5


@pytest.mark.parametrize("latent", ["continuous", "discrete"])
def test_trace_elbo_on_the_chain_equals_the_chain_objective(latent):
    if latent == "continuous":
        model, guide = small_pair("standard_normal", PROCESS)
    else:
        model, guide = DiscreteModel(), DiscreteGuide()
    x_0 = torch.randint(3, (20, 3)).repeat(COPIES, 1)
    chain, chain_guide = unroll(model, PROCESS, 3), unroll(guide, PROCESS, 3)
    objective = MaskedDiffusionELBO(PROCESS, "chain", num_steps=3)
    usual = Trace_ELBO()
    with torch.no_grad():
        ours = [objective.loss(model, guide, x_0) / COPIES for _ in range(BATCHES)]
        pyros = [usual.loss(chain, chain_guide, x_0) / COPIES for _ in range(BATCHES)]
    (first, first_error), (second, second_error) = mean_and_error(ours), mean_and_error(pyros)
    error = (first_error**2 + second_error**2).sqrt()
    assert abs(first - second) < 4 * error
    assert error < 0.01 * first  # a comparison that could fail


def test_the_chain_generates_what_the_sampler_does():
    model, _ = small_pair("conditional_normal", PROCESS)
    law = exact_distribution(model, PROCESS, 3)
    with torch.no_grad():
        x = unroll(model, PROCESS, 3)(num_rows=40_000)
    frequencies = metrics.histogram(x, 3)
    error = (law * (1 - law) / 40_000).sqrt()
    assert ((frequencies - law).abs() < 4.5 * error).all()


def test_sites_rows_and_masks():
    model, guide = small_pair("standard_normal", PROCESS)
    x_0 = torch.randint(3, (50, 3))
    trace = poutine.trace(unroll(guide, PROCESS, 2)).get_trace(x_0)
    replayed = poutine.trace(poutine.replay(unroll(model, PROCESS, 2), trace)).get_trace(x_0)
    latent = {n for n, s in replayed.nodes.items() if s["type"] == "sample" and "/" in n}
    assert {"step_1/z", "step_1/x_0", "step_2/z", "step_2/x_0"} <= latent
    replayed.compute_log_prob()
    trace.compute_log_prob()
    reveal = trace.nodes["reveal"]["value"] + 1
    for i in (1, 2):
        idle = ~(reveal == i).any(-1)
        assert idle.any()
        for site in (replayed.nodes[f"step_{i}/z"], trace.nodes[f"step_{i}/z"]):
            assert (site["log_prob"][idle] == 0).all()
            assert (site["log_prob"][~idle] != 0).all()
    assert trace.nodes["reveal"]["log_prob_sum"] == replayed.nodes["reveal"]["log_prob_sum"]


def test_the_chain_trains_under_stock_pyro_and_predictive_draws_from_it():
    model, guide = small_pair("standard_normal", PROCESS)
    before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
    svi = SVI(
        unroll(model, PROCESS, 2),
        unroll(guide, PROCESS, 2),
        pyro.optim.Adam({"lr": 1e-2}),
        loss=Trace_ELBO(),
    )
    x_0 = torch.zeros(64, 3, dtype=torch.long)
    losses = [svi.step(x_0) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    after = [*model.parameters(), *guide.parameters()]
    assert all((a != b).any() for a, b in zip(after, before, strict=True))
    draws = Predictive(unroll(model, PROCESS, 2), num_samples=30)(num_rows=5)
    assert draws["step_2/z"].shape == (30, 5, 2)


def test_the_exact_posterior_as_guide_makes_every_draw_exact():
    # At T = 1 with a summable latent, guided by its exact posterior, Trace_ELBO has no variance
    # but reveal's.
    model = DiscreteModel()
    x_0 = torch.randint(3, (10, 3))

    def posterior(batch):
        with pyro.plate("data", len(batch), dim=-1):
            log_mu = torch.log_softmax(model.table, -1)
            score = sum(log_mu[:, j, batch.x_0[:, j]] * batch.target[:, j] for j in range(3))
            pyro.sample("z", dist.Categorical(logits=(score + model.prior[:, None]).T))

    with torch.no_grad():
        loss = Trace_ELBO().loss(unroll(model, PROCESS, 1), unroll(posterior, PROCESS, 1), x_0)
    law = exact_distribution(model, PROCESS, 1)
    assert -loss == pytest.approx(float(law[tuple(x_0.T)].log().sum()), rel=1e-5)


def test_a_shared_latent_cannot_be_unrolled_and_says_so():
    def model(batch):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(batch), dim=-1):
            logits = (w * torch.ones(3)).expand(len(batch), 3, 3)
            pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)

    with pytest.raises(ValueError, match="'w' stands outside the data plate"):
        unroll(model, PROCESS, 2)(num_rows=4)
    assert sample(model, PROCESS, 10, 2).shape == (10, 3)  # the sampler draws it once
