"""Bounds other than the ELBO and gradients other than the plain ones: the same expectation, less
noise, or a value known in closed form.
"""

from __future__ import annotations

import math
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from conftest import small_pair
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints, kl_divergence

from vadd_pyro import (
    DiagonalNormal,
    LinearAnnealing,
    MaskedDiffusionELBO,
    MaskingProcess,
    Program,
    TokenCategorical,
    fit,
)
from vadd_pyro.annealing import CyclicalAnnealing, StepAnnealing
from vadd_pyro.divergences import kl_by_dimension

PROCESS = MaskingProcess(3, 2)


def tokens(logits, batch):
    return pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)


def gradients(elbo, model, guide, batch, parameters, pieces, copies):
    """Independent estimates of the gradient of a batch's loss, ``(pieces, parameters)``."""
    rows = torch.arange(len(batch)).repeat(copies)
    result = []
    for _ in range(pieces):
        loss = elbo(model, guide)(batch[rows]) / copies
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        result.append(torch.cat([g.flatten() for g in grads if g is not None]))
    return torch.stack(result)


def assert_same_mean(first, second, errors=4.5):
    error = (first.var(0) / len(first) + second.var(0) / len(second)).sqrt()
    assert ((first.mean(0) - second.mean(0)).abs() < errors * error + 1e-7).all()


# ------------------------------------------------------- doubly reparameterised


class TwoLevels(Program):
    """A guide whose second site depends on its first draw, through a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.tensor([0.3, -0.5, 0.4]))
        self.raw = nn.Parameter(torch.tensor([-0.3, -0.8]))
        self.slope = nn.Parameter(torch.tensor([0.9, 0.4]))

    def forward(self, batch):
        with pyro.plate("data", len(batch), dim=-1):
            loc = self.first[batch.x_0[:, 0]]
            z1 = pyro.sample("z1", dist.Normal(loc, self.raw[0].exp()))
            loc = self.slope[0] * z1 + self.slope[1] * z1.square()
            pyro.sample("z2", dist.Normal(loc, self.raw[1].exp()))


class TwoLevelModel(Program):
    def __init__(self, summed=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2, 3))
        self.slope = nn.Parameter(torch.tensor(0.5))
        self.codes = nn.Parameter(torch.tensor([0.3, -0.2])) if summed else None

    def forward(self, batch):
        with pyro.plate("data", len(batch), dim=-1):
            shift = 0.0
            if self.codes is not None:
                c = pyro.sample("c", dist.Categorical(logits=self.codes))
                shift = c * 2.0 - 1.0
            z1 = pyro.sample("z1", dist.Normal(shift + torch.zeros(()), 1.0))
            z2 = pyro.sample("z2", dist.Normal(self.slope * z1, 1.0))
            logits = z1[..., None, None] * self.weight[0] + z2[..., None, None] * self.weight[1]
            tokens(logits, batch)


class Positive(PyroModule):
    """A guide whose scale Pyro keeps, constrained, in its store."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.scale = PyroParam(torch.tensor([0.5, 0.8]), constraint=constraints.positive)

    def forward(self, batch):
        loc = self.net(nn.functional.one_hot(batch.x_0[:, 0], 3).float())
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Normal(loc, self.scale).to_event(1))


class LateNormal(TorchDistribution):
    """Looks at its network only when a draw or a density is asked for, as flows do."""

    has_rsample = True
    support = constraints.real_vector
    arg_constraints: ClassVar = {}

    def __init__(self, net, features, shape):
        self.net, self.features = net, features
        super().__init__(shape, (2,), validate_args=False)

    def law(self):
        loc, raw = self.net(self.features).chunk(2, -1)
        return DiagonalNormal(loc, raw.exp()).expand(self.batch_shape)

    def expand(self, shape, _instance=None):
        return LateNormal(self.net, self.features, torch.Size(shape))

    def rsample(self, sample_shape=()):
        return self.law().rsample(sample_shape)

    def log_prob(self, value):
        return self.law().log_prob(value)


class Late(Program):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 4)

    def forward(self, batch):
        seen = nn.functional.one_hot(batch.x_0[:, 0], 3).float()
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", LateNormal(self.net, seen, (len(batch),)))


class SharedPrior(nn.Module):
    """A prior made of the guide's own encoder, as a VampPrior is."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, batch):
        # Looks at one row only: what a pseudo-input would give.
        loc, scale = self.encoder(batch[:1])
        return DiagonalNormal(loc[0] * 0.5, scale[0] + 0.3)


def twice_pair(case):
    if case in ("two levels", "summed"):
        return TwoLevelModel(case == "summed"), TwoLevels()
    model, guide = small_pair("conditional_normal", PROCESS, width=8)
    if case == "shared":
        model.prior = SharedPrior(guide.encoder)
    if case in ("pyro", "late"):
        guide = Positive() if case == "pyro" else Late()
    return model, guide


def three_rows():
    x_0 = torch.tensor([[0, 1], [2, 2], [1, 0]])
    return PROCESS.corrupt(x_0, 1.0, weight=torch.tensor([1.0, 3.0, 0.5]))


@pytest.mark.parametrize(
    ("case", "kl_weight"),
    [
        ("one level", 1.0),
        ("one level", 0.3),
        ("two levels", 1.0),
        ("two levels", 0.4),
        ("summed", 1.0),
        ("shared", 1.0),
        ("pyro", 1.0),
        ("late", 1.0),
    ],
)
def test_doubly_reparameterised_gradients_have_the_mean_of_the_plain_ones(case, kl_weight):
    model, guide = twice_pair(case)
    options = dict(num_particles=6, importance_weighted=True, kl_weight=kl_weight)
    plain = MaskedDiffusionELBO(PROCESS, **options)
    doubly = MaskedDiffusionELBO(PROCESS, doubly_reparameterized=True, **options)
    batch = three_rows()
    # the value and the model's own gradient are those of the plain estimator, draw by draw
    own = [p for p in model.parameters() if not any(p is q for q in guide.parameters())]
    results = []
    for elbo in (plain, doubly):
        torch.manual_seed(5)
        loss = elbo(model, guide)(batch)
        results.append((loss, *torch.autograd.grad(loss, own)))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    parameters = list(guide.parameters())
    first, second = (
        gradients(e, model, guide, batch, parameters, pieces=120, copies=80)
        for e in (plain, doubly)
    )
    assert_same_mean(first, second)


@pytest.mark.parametrize("case", ["one level", "two levels", "summed", "pyro", "late"])
def test_near_the_posterior_doubly_reparameterised_gradients_have_a_tenth_of_the_variance(case):
    model, guide = twice_pair(case)
    batch, parameters = three_rows(), list(guide.parameters())
    elbo = MaskedDiffusionELBO(PROCESS)(model, guide)
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        elbo(batch[torch.arange(3).repeat(30)]).backward()
        optimizer.step()
    options = dict(num_particles=6, importance_weighted=True)
    first, second = (
        gradients(
            MaskedDiffusionELBO(PROCESS, doubly_reparameterized=doubly, **options),
            *(model, guide, batch, parameters, 40, 20),
        )
        for doubly in (False, True)
    )
    assert second.var(0).sum() < 0.1 * first.var(0).sum()


@pytest.mark.parametrize("local", [False, True])
def test_both_ways_of_keeping_parameters_train_alike(local):
    """Pyro's store or the module: one step of SVI moves a guide by the same gradient."""
    moved = []
    for how in ("loss", "svi"):
        pyro.clear_param_store()
        torch.manual_seed(0)
        with pyro.settings.context(module_local_params=local):
            model, guide = twice_pair("pyro")
            elbo = MaskedDiffusionELBO(
                PROCESS, num_particles=4, importance_weighted=True, doubly_reparameterized=True
            )
            batch, before = three_rows(), guide.scale_unconstrained.detach().clone()
            torch.manual_seed(1)
            if how == "svi":
                SVI(model, guide, pyro.optim.SGD({"lr": 0.01}), loss=elbo).step(batch)
                moved.append((guide.scale_unconstrained - before) / -0.01)
            else:
                elbo(model, guide)(batch).backward()
                moved.append(guide.scale_unconstrained.grad)
    assert moved[0].abs().max() > 1e-3
    torch.testing.assert_close(moved[0], moved[1].detach(), rtol=1e-3, atol=1e-4)


class Dropped(Program):
    """A guide with dropout before and between its draws, and batch statistics."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Dropout(0.5))
        self.head = nn.Linear(16, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, batch):
        h = self.head(self.net(nn.functional.one_hot(batch.x_0[:, 0], 3).float()))
        with pyro.plate("data", len(batch), dim=-1):
            z1 = pyro.sample("z1", dist.Normal(h[:, 0], 0.5))
            pyro.sample("z2", dist.Normal(h[:, 1] + self.drop(z1), 0.5))


def test_the_second_run_of_a_guide_repeats_the_first_and_leaves_no_trace():
    model = TwoLevelModel()
    batch = three_rows()[torch.arange(3).repeat(20)]
    seen = []
    for doubly in (False, True):
        torch.manual_seed(3)
        guide = Dropped()
        elbo = MaskedDiffusionELBO(
            PROCESS, num_particles=4, importance_weighted=True, doubly_reparameterized=doubly
        )
        torch.manual_seed(4)
        loss = elbo(model, guide)(batch)
        seen.append((loss, guide.net[1].running_mean, torch.randn(3)))
    for first, second in zip(*seen, strict=True):
        torch.testing.assert_close(first, second)


def test_what_cannot_be_reparameterised_twice_is_refused_by_name():
    options = dict(num_particles=3, importance_weighted=True, doubly_reparameterized=True)
    elbo = MaskedDiffusionELBO(PROCESS, **options)
    model, guide = small_pair("standard_normal", PROCESS)
    batch = three_rows()
    with pytest.raises(TypeError, match="needs a torch module"):
        elbo(model, poutine.scale(guide, 2.0))(batch)

    class Hidden(Program):
        def __init__(self):
            super().__init__()
            self.parts = [nn.Linear(3, 2)]

        def forward(self, batch):
            loc = self.parts[0](nn.functional.one_hot(batch.x_0[:, 0], 3).float())
            with pyro.plate("data", len(batch), dim=-1):
                pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    with pytest.raises(ValueError, match=r"'z' depends on parameters that are not the guide's"):
        elbo(model, Hidden())(batch)

    class Sited(Program):
        def __init__(self, law, infer, mask):
            super().__init__()
            self.law, self.infer, self.mask = law, infer, mask

        def forward(self, batch):
            with pyro.plate("data", len(batch), dim=-1), poutine.mask(mask=self.mask):
                pyro.sample("z", self.law, infer=self.infer)

    codes = dist.Categorical(torch.ones(4))
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    rows = torch.tensor([True, False, True])
    for law, infer, mask, reason in [
        (codes, {}, True, "is drawn from Categorical, which is not reparameterised"),
        (codes, {"enumerate": "parallel"}, True, "is enumerated"),
        (dist.Delta(torch.zeros(2)).to_event(1), {}, True, "is part of a change of variables"),
        (normal, {}, rows, "is masked"),
        (normal, {"is_auxiliary": True}, True, "is part of a change of variables"),
    ]:
        with pytest.raises(ValueError, match=f"site 'z' {reason}"):
            elbo(model, Sited(law, infer, mask))(batch)
    # without gradients there is nothing to do twice
    assert math.isfinite(elbo.loss(model, poutine.scale(guide, 1.0), batch))


# ----------------------------------------------------------------------- Rényi


def discrete_toy():
    """A model of four codes and a guide's logits, with the log-weights of every code and row."""
    table, prior = torch.randn(4, 2, 3), torch.randn(4)
    logits = torch.randn(4, requires_grad=True)
    batch = PROCESS.corrupt(torch.randint(3, (3, 2)), 1.0, weight=torch.tensor([1.0, 2.0, 0.5]))

    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Categorical(logits=prior))
            tokens(table[z], batch)

    def guide(batch, infer=None):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Categorical(logits=logits), infer=infer or {})

    def log_weights():
        log_mu = torch.log_softmax(table, -1)
        log_x = sum(log_mu[:, j, batch.x_0[:, j]] for j in range(2))
        log_r = logits.log_softmax(-1)
        return log_x + (prior.log_softmax(-1) - log_r)[:, None], log_r

    return model, guide, logits, batch, log_weights


def test_the_renyi_bound_is_exact_over_codes_and_falls_with_alpha():
    model, guide, _, batch, log_weights = discrete_toy()
    log_w, log_r = log_weights()

    def enumerated(b):
        return guide(b, {"enumerate": "parallel"})

    values = []
    for alpha in (-1.0, 0.0, 0.5, 0.999, 1.001, 3.0):
        elbo = MaskedDiffusionELBO(PROCESS, num_particles=2, renyi_alpha=alpha)
        rows = elbo.score(model, enumerated, batch).rows
        exact = torch.logsumexp((1 - alpha) * log_w + log_r[:, None], 0) / (1 - alpha)
        torch.testing.assert_close(rows, exact, rtol=1e-3, atol=1e-3)
        values.append(rows)
        # many draws come near it
        many = MaskedDiffusionELBO(PROCESS, num_particles=40_000, renyi_alpha=alpha)
        torch.testing.assert_close(many.score(model, guide, batch).rows, exact, rtol=0, atol=0.2)
    assert (torch.stack(values).diff(dim=0) < 1e-4).all()
    torch.testing.assert_close(values[1], torch.logsumexp(log_w + log_r[:, None], 0))
    ordinary = MaskedDiffusionELBO(PROCESS).score(model, enumerated, batch).rows
    assert (values[4] - 1e-3 < ordinary).all()
    assert (ordinary < values[3] + 1e-3).all()


def test_renyi_of_zero_is_the_importance_weighted_bound_and_scales_stand_outside():
    model, guide = small_pair("standard_normal", PROCESS)
    batch = three_rows()
    losses = []
    for options in (dict(importance_weighted=True), dict(renyi_alpha=0)):
        torch.manual_seed(2)
        elbo = MaskedDiffusionELBO(PROCESS, num_particles=5, kl_weight=0.7, **options)
        loss = elbo(model, guide)(batch)
        losses.append((loss, *torch.autograd.grad(loss, list(guide.parameters()))))
    for first, second in zip(*losses, strict=True):
        torch.testing.assert_close(first, second)
    elbo = MaskedDiffusionELBO(PROCESS, num_particles=5, renyi_alpha=0.5)
    values = []
    for scale in (1.0, 2.0):
        torch.manual_seed(2)
        pair = poutine.scale(model, scale), poutine.scale(guide, scale)
        values.append(elbo.loss(*pair, batch))
    assert values[1] == pytest.approx(2 * values[0], rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_score_function_gradients_of_particles_inside_a_logarithm(alpha):
    """Against the exact expectation over all pairs of codes that two particles may draw."""
    model, guide, logits, batch, log_weights = discrete_toy()
    log_w, log_r = log_weights()
    pairs = torch.stack([log_w[:, None].expand(4, 4, 3), log_w[None].expand(4, 4, 3)])
    inner = (torch.logsumexp((1 - alpha) * pairs, 0) - math.log(2)) / (1 - alpha)
    chance = (log_r[:, None] + log_r).exp()
    (exact,) = torch.autograd.grad(-(chance[..., None] * inner * batch.weight).sum(), logits)
    elbo = MaskedDiffusionELBO(PROCESS, num_particles=2, renyi_alpha=alpha)
    grads = gradients(elbo, model, guide, batch, [logits], pieces=80, copies=500)
    assert_same_mean(grads, exact.expand(2, -1))


# ------------------------------------------------------------------- free bits


class Diagonal(Program):
    """A guide with one mean and scale for all rows."""

    def __init__(self, loc, scale):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(loc))
        self.raw = nn.Parameter(torch.tensor(scale).log())

    def forward(self, batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", DiagonalNormal(self.loc, self.raw.exp()))


DRAWS = {
    "closed": {},
    "draws": dict(closed_form_kl=False),
    "particles": dict(num_particles=3),
    "half": dict(kl_weight=0.5),
}


@pytest.mark.parametrize("options", list(DRAWS.values()), ids=list(DRAWS))
def test_free_bits_leave_a_large_kl_alone(options):
    model, _ = small_pair("standard_normal", PROCESS)
    guide = Diagonal([2.0, -1.5], [0.3, 0.2])
    batch = PROCESS.corrupt(torch.randint(3, (50, 2)), 1.0, weight=torch.rand(50))
    results = []
    for free in (0.0, 0.4):
        torch.manual_seed(1)
        loss = MaskedDiffusionELBO(PROCESS, free_bits=free, **options)(model, guide)(batch)
        parameters = [*model.parameters(), *guide.parameters()]
        results.append((loss, *torch.autograd.grad(loss, parameters)))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    if "num_particles" not in options and "closed_form_kl" not in options:
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_free_bits_compare_the_weighted_mean_over_rows():
    """Each row has a KL and a weight of its own; one dimension is below in the mean, one above."""
    shift = torch.linspace(-2.0, 2.0, 6).unsqueeze(-1) * torch.tensor([0.5, 1.5])

    def guide(batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", DiagonalNormal(shift, torch.ones(6, 2)))

    model, _ = small_pair("standard_normal", PROCESS)
    nn.init.zeros_(model.decoder.latent.weight)
    weight = torch.tensor([0.1, 2.0, 0.3, 4.0, 0.7, 1.0])
    batch = PROCESS.corrupt(torch.randint(3, (6, 2)), 1.0, weight=weight)
    kl = 0.5 * shift.square()  # of each row and dimension
    mean = (kl * weight.unsqueeze(-1)).sum(0) / weight.sum()
    free = 0.3
    assert mean[0] < free < mean[1]
    assert (kl[:, 0] > free).any()  # so that a threshold for each row would say something else
    assert (kl[:, 1] < free).any()
    losses = [
        float(MaskedDiffusionELBO(PROCESS, free_bits=f).loss(model, guide, batch))
        for f in (0.0, free)
    ]
    extra = float(weight.sum()) * (free - float(mean[0]))
    assert losses[1] - losses[0] == pytest.approx(extra, abs=1e-4)
    # Weights decide which dimensions are below: with equal ones the first threshold moves.
    heavy = PROCESS.corrupt(batch.x_0, 1.0, weight=torch.tensor([50.0, 0.1, 0.1, 0.1, 0.1, 50.0]))
    a, b = (
        float(MaskedDiffusionELBO(PROCESS, free_bits=f).loss(model, guide, heavy))
        for f in (0.0, 0.4)
    )
    assert kl[:, 0].mean() < 0.4 < kl[0, 0]
    assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("options", list(DRAWS.values()), ids=list(DRAWS))
def test_below_the_threshold_a_kl_costs_the_threshold_and_pulls_at_nothing(options):
    model, _ = small_pair("standard_normal", PROCESS)
    nn.init.zeros_(model.decoder.latent.weight)  # what is left of the gradient is the KL's
    guide = Diagonal([0.2, -0.1], [0.9, 1.1])
    batch = PROCESS.corrupt(torch.randint(3, (50, 2)), 1.0, weight=torch.rand(50))
    elbo = MaskedDiffusionELBO(PROCESS, free_bits=0.7, **options)
    torch.manual_seed(1)
    loss = elbo(model, guide)(batch)
    grads = torch.autograd.grad(loss, list(guide.parameters()))
    assert all(g.abs().max() < 1e-4 for g in grads)
    plain = MaskedDiffusionELBO(PROCESS, **options)
    torch.manual_seed(1)
    terms = plain.terms(model, guide, batch)
    charge = plain.current_kl_weight() * 1.4 * batch.weight.sum()
    torch.testing.assert_close(loss, terms.reconstruction + charge)
    torch.manual_seed(1)
    torch.testing.assert_close(elbo.terms(model, guide, batch).kl, terms.kl)


def test_free_bits_are_counted_for_each_dimension():
    model, _ = small_pair("standard_normal", PROCESS)
    nn.init.zeros_(model.decoder.latent.weight)
    guide = Diagonal([1.5, 0.1], [0.5, 0.9])
    batch = PROCESS.corrupt(torch.randint(3, (8, 2)), torch.tensor([1.0] * 6 + [0.0] * 2))
    gradient = {}
    for free in (0.0, 0.3):
        loss = MaskedDiffusionELBO(PROCESS, free_bits=free)(model, guide)(batch)
        gradient[free] = torch.stack(torch.autograd.grad(loss, [guide.loc, guide.raw]))
    assert torch.equal(gradient[0.0][:, 0], gradient[0.3][:, 0])
    assert (gradient[0.3][:, 1] == 0).all()
    assert (gradient[0.0][:, 1] != 0).all()


def test_a_latent_that_nothing_reads_keeps_its_free_bits():
    model, _ = small_pair("standard_normal", PROCESS)
    nn.init.zeros_(model.decoder.latent.weight)
    batch = PROCESS.corrupt(torch.randint(3, (8, 2)), 1.0)
    kept = []
    for free in (0.0, 0.5):
        guide = Diagonal([1.5, -1.2], [0.5, 0.6])
        elbo = MaskedDiffusionELBO(PROCESS, free_bits=free)
        optimizer = torch.optim.SGD(guide.parameters(), lr=0.005)  # no momentum past the edge
        for _ in range(300):
            optimizer.zero_grad()
            elbo(model, guide)(batch).backward()
            optimizer.step()
        kept.append(float(elbo.score(model, guide, batch).kl.mean()))
    assert kept[0] < 0.01
    assert kept[1] == pytest.approx(1.0, abs=0.1)


def test_free_bits_of_discrete_and_masked_sites():
    model, guide, logits, batch, _ = discrete_toy()
    for infer in ({"enumerate": "parallel"}, {}):
        elbo = MaskedDiffusionELBO(PROCESS, free_bits=50.0, kl_weight=1.0)
        none = MaskedDiffusionELBO(PROCESS, kl_weight=0.0)
        values = []
        for loss in (elbo, none):
            torch.manual_seed(6)
            values.append(loss(model, lambda b, i=infer: guide(b, i))(batch))
        torch.testing.assert_close(values[0], values[1] + 50.0 * batch.weight.sum())
        first, second = (torch.autograd.grad(v, logits)[0] for v in values)
        # the score function sees what is left, a constant more
        if infer:
            torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
    normal, diagonal = small_pair("standard_normal", PROCESS)[0], Diagonal([0.1, 0.1], [1.0, 1.0])
    keep = torch.tensor([True, False, True])
    pair = poutine.mask(normal, mask=keep), poutine.mask(diagonal, mask=keep)
    batch = PROCESS.corrupt(torch.randint(3, (3, 2)), 1.0)
    values = []
    for free in (0.0, 2.0):
        torch.manual_seed(6)
        values.append(MaskedDiffusionELBO(PROCESS, free_bits=free).terms(*pair, batch))
    torch.testing.assert_close(values[1].loss, values[0].reconstruction + 2 * 2 * 2.0)


@pytest.mark.parametrize(
    ("r", "p", "groups"),
    [
        (DiagonalNormal(torch.randn(5, 3), torch.rand(5, 3) + 0.1), "diagonal", 3),
        (dist.Normal(torch.randn(5, 3), torch.rand(5, 3) + 0.1).to_event(1), "diagonal", 3),
        (DiagonalNormal(torch.randn(5, 3), torch.rand(5, 3) + 0.1), "normal", 3),
        (dist.Laplace(torch.randn(5, 2, 3), 1.0).to_event(2), "laplace", 6),
        (dist.Categorical(logits=torch.randn(5, 4)), "categorical", 1),
        (dist.MultivariateNormal(torch.randn(5, 3), torch.eye(3)), "multivariate", 1),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_the_kl_by_dimension_sums_to_the_kl(r, p, groups):
    laws = {
        "diagonal": DiagonalNormal(torch.randn(3), torch.rand(3) + 0.5),
        "normal": dist.Normal(torch.randn(3), torch.rand(3) + 0.5).to_event(1),
        "laplace": dist.Laplace(torch.randn(2, 3), 2.0).to_event(2),
        "categorical": dist.Categorical(logits=torch.randn(4)),
        "multivariate": dist.MultivariateNormal(torch.randn(3), 2 * torch.eye(3)),
    }
    value = kl_by_dimension(r, laws[p])
    assert value.shape == (5, groups)
    torch.testing.assert_close(value.sum(-1), kl_divergence(r, laws[p]))
    assert (value > -1e-6).all()


# --------------------------------------------------------------- score functions


class Coded(Program):
    """A guide of drawn codes, with a baseline of its own if asked."""

    def __init__(self, baseline=None, **infer):
        super().__init__()
        self.logits = nn.Parameter(torch.linspace(-1.0, 1.0, 12).reshape(3, 4).sin())
        self.baseline = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1, bias=True))
        self.kind = baseline
        self.infer = infer

    def forward(self, batch):
        seen = nn.functional.one_hot(batch.x_0[:, 0], 3).float()
        options = dict(self.infer)
        if self.kind == "network":
            network = lambda h: self.baseline(h).squeeze(-1)  # noqa: E731
            options["baseline"] = {"nn_baseline": network, "nn_baseline_input": seen}
        elif self.kind == "value":
            options["baseline"] = {"baseline_value": self.baseline(seen).squeeze(-1)}
        elif self.kind is not None:
            options["baseline"] = self.kind
        with pyro.plate("data", len(batch), dim=-1):
            law = dist.Categorical(logits=self.logits[batch.x_0[:, 0]])
            pyro.sample("z", law, infer=options)


def coded_model():
    table, prior = 2 * torch.randn(4, 2, 3) + torch.tensor([0.0, 0.0, -3.0]), torch.randn(4)

    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Categorical(logits=prior))
            logits = table[z]
            tokens(logits if z.dim() else logits.expand(len(batch), 2, 3), batch)

    return model


@pytest.mark.parametrize("kind", ["network", "value"])
@pytest.mark.parametrize("closed", [True, False])
def test_a_trained_baseline_leaves_the_mean_and_takes_variance(kind, closed):
    model, batch = coded_model(), three_rows()
    enumerated = Coded(enumerate="parallel")
    loss = MaskedDiffusionELBO(PROCESS)(model, enumerated)(batch)
    (exact,) = torch.autograd.grad(loss, enumerated.logits)
    elbo = MaskedDiffusionELBO(PROCESS, closed_form_kl=closed)
    guide = Coded(kind)
    # it changes no value
    values = []
    for other in (guide, Coded()):
        torch.manual_seed(9)
        values.append(elbo(model, other)(batch))
    torch.testing.assert_close(*values)
    optimizer = torch.optim.Adam(guide.baseline.parameters(), lr=0.03)
    many = batch[torch.arange(3).repeat(20)]
    for _ in range(150):
        optimizer.zero_grad()
        elbo(model, guide)(many).backward()
        optimizer.step()
    without, with_baseline = (
        gradients(elbo, model, g, batch, [g.logits], pieces=60, copies=200)
        for g in (Coded(), guide)
    )
    assert_same_mean(without, exact.flatten().expand(2, -1))
    assert_same_mean(with_baseline, exact.flatten().expand(2, -1))
    assert with_baseline.var(0).sum() < 0.5 * without.var(0).sum()


@pytest.mark.parametrize("closed", [True, False])
def test_the_mean_of_the_other_particles_is_a_free_baseline(closed):
    model, batch = coded_model(), three_rows()
    enumerated, guide = Coded(enumerate="parallel"), Coded()
    loss = MaskedDiffusionELBO(PROCESS)(model, enumerated)(batch)
    (exact,) = torch.autograd.grad(loss, enumerated.logits)
    alone, together = (
        gradients(
            MaskedDiffusionELBO(
                PROCESS, num_particles=4, vectorize_particles=vectorize, closed_form_kl=closed
            ),
            *(model, guide, batch, [guide.logits], 60, 200),
        )
        for vectorize in (False, True)
    )
    assert_same_mean(alone, exact.flatten().expand(2, -1))
    assert_same_mean(together, exact.flatten().expand(2, -1))
    assert together.var(0).sum() < 0.5 * alone.var(0).sum()


def test_fit_trains_a_baseline_that_belongs_to_the_guide():
    pair = small_pair("none", PROCESS)[0]

    class Model(Program):
        def __init__(self):
            super().__init__()
            self.decoder, self.codes = pair.decoder, nn.Embedding(4, 6)

        def forward(self, batch):
            with pyro.plate("data", len(batch), dim=-1):
                z = pyro.sample("z", dist.Categorical(torch.ones(4)))
                shift = self.codes(z).unflatten(-1, (2, 3))
                tokens(self.decoder(batch.x_t, None, batch.t) + shift, batch)

    guide = Coded("network")
    before = guide.baseline[-1].bias.detach().clone()
    data = torch.randint(3, (60, 2))
    fit(Model(), guide, MaskedDiffusionELBO(PROCESS), data, 30, progress=False, batch_size=32)
    assert (guide.baseline[-1].bias - before).abs() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_decaying_avg_baseline": True}, "baseline options"),
        ({"nn_baseline_input": torch.zeros(3)}, "must name one baseline"),
        ({"nn_baseline": nn.Linear(3, 1)}, "without nn_baseline_input"),
        ({"baseline_value": torch.zeros(3, 1)}, r"one entry a row, shape \(3,\).*got \(3, 1\)"),
        ({"baseline_value": torch.zeros(2)}, r"got \(2,\)"),
    ],
)
def test_bad_baselines_are_named(options, message):
    with pytest.raises(ValueError, match=rf"site 'z'.*{message}|{message}"):
        MaskedDiffusionELBO(PROCESS)(coded_model(), Coded(options))(three_rows())


# ------------------------------------------------------------ options, annealing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(renyi_alpha=1), "renyi_alpha is 1: at 1 the bound is the ELBO"),
        (dict(renyi_alpha=0.5), "num_particles >= 2.*got num_particles=1"),
        (dict(renyi_alpha=math.inf, num_particles=2), "renyi_alpha must be finite"),
        (dict(renyi_alpha=0.5, num_particles=2, vectorize_particles=False), "vectorize_particles"),
        (dict(renyi_alpha=0.5, num_particles=2, importance_weighted=True), "give one"),
        (dict(doubly_reparameterized=True), "expected importance_weighted=True"),
        (
            dict(doubly_reparameterized=True, importance_weighted=True),
            "num_particles >= 2, got True and 1",
        ),
        (dict(free_bits=-0.1), "free_bits must be a number of nats >= 0, got -0.1"),
        (dict(free_bits=0.1, num_particles=2, importance_weighted=True), "free_bits = 0.1"),
        (dict(free_bits=0.1, num_particles=2, renyi_alpha=0.5), "free_bits = 0.1"),
        (dict(free_bits=0.1, num_particles=2, vectorize_particles=False), "their mean"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedDiffusionELBO(PROCESS, **options)


@pytest.mark.parametrize("options", [dict(free_bits="1"), dict(renyi_alpha=True)])
def test_options_that_are_no_numbers_are_refused(options):
    with pytest.raises(TypeError, match="must be a number"):
        MaskedDiffusionELBO(PROCESS, **options)


def test_cyclical_annealing_rises_in_every_cycle_and_stays_at_the_end():
    weight = CyclicalAnnealing(100, num_cycles=4, ramp=0.5, start=0.1, end=0.9)
    values = [weight(i) for i in range(130)]
    assert values[:25] == values[25:50] == values[75:100]
    assert values[0] == 0.1
    assert values[5] == pytest.approx(0.1 + 0.8 * 5 / 12.5)
    assert values[13:25] == [0.9] * 12
    assert values[100:] == [0.9] * 30
    assert [CyclicalAnnealing(10, 1, 1.0)(i) for i in range(11)] == pytest.approx(
        [LinearAnnealing(10)(i) for i in range(11)]
    )
    # cycles that do not divide the run: each still starts at the bottom
    starts = [
        i for i in range(1, 10) if CyclicalAnnealing(10, 3)(i) < CyclicalAnnealing(10, 3)(i - 1)
    ]
    assert starts == [4, 7]


def test_step_annealing_is_a_staircase():
    weight = StepAnnealing([3, 5], [0.0, 0.1, 1.0])
    assert [weight(i) for i in range(7)] == [0.0, 0.0, 0.0, 0.1, 0.1, 1.0, 1.0]
    elbo = MaskedDiffusionELBO(PROCESS, kl_weight=weight)
    elbo.iteration = 4
    assert elbo.current_kl_weight() == 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CyclicalAnnealing(0), "num_iterations must be an integer of at least 1, got 0"),
        (lambda: CyclicalAnnealing(3, 4), "num_cycles must be at most num_iterations = 3"),
        (lambda: CyclicalAnnealing(10, ramp=0.0), r"ramp .* \(0, 1\], got 0.0"),
        (lambda: CyclicalAnnealing(10, start=-1.0), "KL weights, finite numbers >= 0, got -1.0"),
        (lambda: StepAnnealing([3, 3], [0, 1, 1]), r"milestones must increase, got \[3, 3\]"),
        (lambda: StepAnnealing([3], [1.0]), "one entry more than milestones, 2, got 1"),
        (lambda: StepAnnealing([3], [1.0, math.nan]), "weights must be KL weights"),
    ],
)
def test_bad_annealing_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
