"""Identities of the objective: two ways to compute the same number, or a known value."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from conftest import PRIORS, small_pair
from pyro.infer import SVI
from pyro.poutine.messenger import Messenger
from torch import nn

from vadd_pyro import (
    AtomTimes,
    BalancedTimes,
    GridTimes,
    LinearAnnealing,
    MaskedDiffusionELBO,
    MaskingProcess,
    TokenCategorical,
    UniformTimes,
    data,
    guides,
)
from vadd_pyro.recorder import Recorder, run


def tokens(logits, batch):
    return pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)


def one_batch(process, rows=6, objective="delbo", **kwargs):
    x_0 = torch.randint(process.vocab_size, (rows, process.length))
    return MaskedDiffusionELBO(process, objective, **kwargs).draw(x_0)


class Fixed(Messenger):
    """Sets latent sites to given values."""

    def __init__(self, program, values):
        super().__init__()
        self.program, self.values = program, values

    def _process_message(self, msg):
        if msg["type"] == "sample" and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]

    def __call__(self, *args, **kwargs):
        with self:
            return self.program(*args, **kwargs)


# ------------------------------------------------------------------ tied bits


class PerfectTiedBits:
    """The true reverse step: a fair code while nothing is visible, then the visible bit."""

    def __call__(self, batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Categorical(torch.full((2,), 0.5)))
            seen = ~batch.masked.all(-1)
            visible = torch.where(batch.masked, 0, batch.x_t).amax(-1)
            bit = (
                torch.where(seen, visible, z).unsqueeze(-1).expand(*z.shape[:-1], *batch.x_t.shape)
            )
            return tokens((nn.functional.one_hot(bit, 2) * 200.0) - 100.0, batch)


def tied_guide(batch):
    """The exact posterior that sees the targets:

    The row's bit where they decide it, the prior elsewhere.
    """
    with pyro.plate("data", len(batch), dim=-1):
        decides = (batch.masked.all(-1) & batch.target.any(-1)).unsqueeze(-1)
        known = nn.functional.one_hot(batch.x_0[:, 0], 2).float()
        pyro.sample("z", dist.Categorical(torch.where(decides, known, 0.5)))


@pytest.mark.parametrize("length", [2, 4, 8])
@pytest.mark.parametrize("guide", [guides.NoLatent(), tied_guide], ids=["summed", "guided"])
def test_tied_bits_the_delbo_is_no_bound_and_the_chain_is(length, guide):
    process = MaskingProcess(2, length)
    x_0 = data.tied_bits(length).sample(20_000)
    model = PerfectTiedBits()

    def value(elbo):
        batch = elbo.draw(x_0)
        rows = elbo.score(model, guide, batch).rows.double() * batch.weight
        return -rows.mean(), rows.std() / len(rows) ** 0.5

    delbo, error = value(MaskedDiffusionELBO(process))
    assert abs(delbo - math.log(2) / length) < 4.5 * error
    assert delbo + 4.5 * error < math.log(2)  # below the entropy: not a bound
    balanced, error = value(MaskedDiffusionELBO(process, times=BalancedTimes()))
    assert abs(balanced - math.log(2) / length) < 4.5 * error
    for num_steps in (1, 2, 4, 16):
        chain, error = value(MaskedDiffusionELBO(process, "chain", num_steps=num_steps))
        assert abs(chain - math.log(2)) < 4.5 * error + 1e-6


# ------------------------------------------------------- weights stand per row

OBJECTIVES = {
    "delbo": {},
    "delbo, half KL": dict(kl_weight=0.5),
    "delbo, densities": dict(closed_form_kl=False),
    "delbo, 3 particles": dict(num_particles=3),
    "delbo, importance": dict(num_particles=3, importance_weighted=True),
    "chain": dict(objective="chain", num_steps=3),
    "chain, importance": dict(
        objective="chain", num_steps=3, num_particles=3, importance_weighted=True, kl_weight=0.7
    ),
}


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_the_loss_is_the_sum_over_rows_scored_alone(prior, objective):
    process = MaskingProcess(4, 3)
    model, guide = small_pair(prior, process)
    elbo = MaskedDiffusionELBO(process, **OBJECTIVES[objective])
    batch = elbo.draw(torch.randint(4, (7, 3)))
    particles = elbo.num_particles
    inside = pyro.plate("vadd_particles", particles, dim=-2) if particles > 1 else None
    latents = run(guide, Recorder(), batch, inside=inside).sites
    values = {name: site.value.detach() for name, site in latents.items()}
    together = elbo(model, Fixed(guide, values))(batch)
    alone = []
    for b in range(7):
        row = {name: value[..., b : b + 1, :] for name, value in values.items()}
        alone.append(elbo(model, Fixed(guide, row))(batch[b : b + 1]))
    torch.testing.assert_close(together, torch.stack(alone).sum(), rtol=1e-5, atol=1e-5)
    # and the weights are those of the rows: doubling one row's weight adds its term once more
    b = int(batch.target.any(-1).nonzero()[0])
    weight = batch.weight.clone()
    weight[b] *= 2
    heavier = type(batch)(batch.x_t, batch.t, batch.masked, batch.target, batch.x_0, weight)
    more = elbo(model, Fixed(guide, values))(heavier)
    torch.testing.assert_close(more - together, alone[b], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prior", PRIORS)
def test_rows_without_a_target_count_nothing(prior):
    process = MaskingProcess(4, 3)
    model, guide = small_pair(prior, process)
    x_0 = torch.randint(4, (5, 3))
    batch = process.corrupt(x_0, torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]))
    rows = MaskedDiffusionELBO(process).score(model, guide, batch)
    assert (rows.rows[[0, 2]] == 0).all()
    assert (rows.kl[[0, 2]] == 0).all()
    assert (rows.rows[[1, 3, 4]] < 0).all()


# ---------------------------------------------------------------- closed forms


def hierarchy(batch):
    with pyro.plate("data", len(batch), dim=-1):
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.sample("z2", dist.Normal(z1, 1.0))
        tokens(torch.zeros(*batch.x_t.shape, 2), batch)


def bottom_up(batch):
    with pyro.plate("data", len(batch), dim=-1):
        z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
        pyro.sample("z1", dist.Normal(-z2, 0.1**0.5))


def top_down(batch):
    with pyro.plate("data", len(batch), dim=-1):
        z1 = pyro.sample("z1", dist.Normal(0.5, 1.0))
        pyro.sample("z2", dist.Normal(-z1, 0.1))


def exact_kl_bottom_up():
    """``E_q log q - E_q log p`` with ``z1 = -z2 + sqrt(.1) e``:

    2.75 nats, and 1.75 if taken site by site.
    """
    entropy = math.log(2 * math.pi) + 1 + 0.5 * math.log(0.1)
    cross = math.log(2 * math.pi) + 0.5 * 1.1 + 0.5 * (4 + 0.1)
    return cross - entropy


@pytest.mark.parametrize("closed_form", [True, False])
def test_a_bottom_up_guide_gets_the_right_kl(closed_form):
    process = MaskingProcess(2, 1)
    batch = process.corrupt(torch.zeros(60_000, 1, dtype=torch.long), 1.0)
    elbo = MaskedDiffusionELBO(process, closed_form_kl=closed_form)
    kl = elbo.score(hierarchy, bottom_up, batch).kl.double()
    error = kl.std() / len(kl) ** 0.5
    exact = exact_kl_bottom_up()
    assert exact == pytest.approx(2.751, abs=1e-3)
    assert abs(kl.mean() - exact) < 4.5 * error
    # site by site it would have been one nat less: the error that is guarded against
    assert abs(kl.mean() - (exact - 1)) > 50 * error


def test_a_top_down_guide_uses_closed_forms_that_agree_with_densities():
    process = MaskingProcess(2, 1)
    batch = process.corrupt(torch.zeros(60_000, 1, dtype=torch.long), 1.0)
    closed = MaskedDiffusionELBO(process).score(hierarchy, top_down, batch).kl.double()
    densities = MaskedDiffusionELBO(process, closed_form_kl=False)
    kl = densities.score(hierarchy, top_down, batch).kl.double()
    error = (kl.var() / len(kl) + closed.var() / len(kl)).sqrt()
    assert abs(kl.mean() - closed.mean()) < 4.5 * error
    assert closed.std() < kl.std()


# -------------------------------------------------------------- discrete sites


def mixture_pair(single_site):
    """One model twice: a mixture as two sites (component summed out) or as one."""
    logits, loc = torch.randn(3), torch.randn(3, 2)
    weight = torch.randn(2, 6)

    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            if single_site:
                components = dist.Normal(loc, 0.5).to_event(1)
                z = pyro.sample(
                    "z", dist.MixtureSameFamily(dist.Categorical(logits=logits), components)
                )
            else:
                c = pyro.sample("c", dist.Categorical(logits=logits))
                z = pyro.sample("z", dist.Normal(loc[c], 0.5).to_event(1))
            tokens((z @ weight).unflatten(-1, (2, 3)), batch)

    def guide(batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    return model, guide


@pytest.mark.parametrize(
    "options",
    [{}, dict(kl_weight=0.3), dict(num_particles=4, importance_weighted=True, kl_weight=0.3)],
    ids=str,
)
def test_a_summed_component_equals_the_mixture_density(options):
    process = MaskingProcess(3, 2)
    batch = process.corrupt(torch.randint(3, (9, 2)), 1.0)
    elbo = MaskedDiffusionELBO(process, closed_form_kl=False, **options)
    terms = []
    for single_site in (True, False):
        torch.manual_seed(3)
        model, guide = mixture_pair(single_site)
        torch.manual_seed(4)
        terms.append(elbo.score(model, guide, batch))
    torch.testing.assert_close(terms[0].rows, terms[1].rows)
    torch.testing.assert_close(terms[0].kl, terms[1].kl)


def coded_model(table, prior):
    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Categorical(logits=prior))
            logits = table[z]
            if logits.dim() == 2:
                logits = logits.expand(len(batch), *logits.shape)
            tokens(logits, batch)

    return model


def test_sums_match_brute_force_and_the_exact_posterior_as_guide():
    process = MaskingProcess(3, 2)
    table, prior = torch.randn(4, 2, 3), torch.randn(4)
    x_0 = torch.randint(3, (9, 2))
    batch = process.corrupt(x_0, torch.rand(9))
    log_mu = torch.log_softmax(table, -1)
    scores = torch.stack([log_mu[:, j, x_0[:, j]] * batch.target[:, j] for j in range(2)]).sum(0)
    joint = scores + torch.log_softmax(prior, -1)[:, None]
    exact = torch.where(batch.target.any(-1), joint.logsumexp(0), 0.0)
    model = coded_model(table, prior)
    elbo = MaskedDiffusionELBO(process)
    summed = elbo.score(model, guides.NoLatent(), batch)
    torch.testing.assert_close(summed.rows, exact)
    posterior = joint.softmax(0).T

    def enumerated(batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Categorical(posterior), infer={"enumerate": "parallel"})

    def drawn(batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Categorical(posterior))

    torch.testing.assert_close(elbo.score(model, enumerated, batch).rows, exact)
    # with the exact posterior every single draw gives the exact value
    densities = MaskedDiffusionELBO(process, closed_form_kl=False)
    torch.testing.assert_close(densities.score(model, drawn, batch).rows, exact)


def test_two_discrete_sites_are_summed_jointly():
    process = MaskingProcess(3, 2)
    table, first, second = torch.randn(2, 4, 2, 3), torch.randn(2), torch.randn(2, 4)

    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            a = pyro.sample("a", dist.Categorical(logits=first))
            b = pyro.sample("b", dist.Categorical(logits=second[a]))
            logits = table[a, b]
            tokens(logits, batch)

    x_0 = torch.randint(3, (9, 2))
    batch = process.corrupt(x_0, 1.0)
    log_mu = torch.log_softmax(table, -1)
    joint = log_mu[:, :, 0, x_0[:, 0]] + log_mu[:, :, 1, x_0[:, 1]]
    joint = joint + (first.log_softmax(-1)[:, None] + second.log_softmax(-1))[..., None]
    rows = MaskedDiffusionELBO(process).score(model, guides.NoLatent(), batch).rows
    torch.testing.assert_close(rows, joint.flatten(0, 1).logsumexp(0))


@pytest.mark.parametrize(
    "options",
    [{}, dict(num_particles=8), dict(num_particles=8, vectorize_particles=False)],
    ids=str,
)
def test_score_function_gradient_equals_the_enumerated_one(options):
    process = MaskingProcess(3, 2)
    table, prior = torch.randn(4, 2, 3), torch.randn(4)
    model = coded_model(table, prior)
    logits = torch.randn(4, requires_grad=True)

    def guide(batch, infer):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Categorical(logits=logits), infer=infer)

    x_0 = torch.randint(3, (5, 2))
    weight = torch.rand(5) + 0.5
    exact_batch = process.corrupt(x_0, 1.0, weight=weight)
    loss = MaskedDiffusionELBO(process)(model, lambda b: guide(b, {"enumerate": "parallel"}))(
        exact_batch
    )
    (exact,) = torch.autograd.grad(loss, logits)
    copies = 4000
    batch = process.corrupt(x_0.repeat(copies, 1), 1.0, weight=weight.repeat(copies))
    elbo = MaskedDiffusionELBO(process, closed_form_kl=False, **options)
    grads, values = [], []
    for piece in batch.split(500):
        value = elbo(model, lambda b: guide(b, {}))(piece)
        values.append(value.detach() / 100)
        grads.append(torch.autograd.grad(value, logits)[0] / 100)
    grads, values = torch.stack(grads), torch.stack(values)
    error = grads.std(0) / len(grads) ** 0.5
    assert ((grads.mean(0) - exact).abs() < 4.5 * error).all()
    # the surrogate leaves the value as it was
    assert abs(values.mean() - loss) < 4.5 * values.std() / len(values) ** 0.5


# --------------------------------------------------------- particles and bounds


@pytest.mark.parametrize("vectorize", [True, False])
def test_particles_leave_the_expectation_and_importance_weights_tighten_it(vectorize):
    process = MaskingProcess(3, 2)
    model, guide = small_pair("standard_normal", process)
    batch = process.corrupt(torch.randint(3, (4000, 2)), 1.0)

    def value(**options):
        with torch.no_grad():
            rows = MaskedDiffusionELBO(process, **options).score(model, guide, batch).rows
        return rows.mean(), rows.std() / 4000**0.5

    one, error = value()
    many, _ = value(num_particles=5, vectorize_particles=vectorize)
    assert abs(one - many) < 6 * error
    bounds = [value(num_particles=p, importance_weighted=True)[0] for p in (2, 8, 64)]
    assert one - 6 * error < bounds[0] < bounds[1] < bounds[2]


def test_importance_weights_need_vectorised_particles():
    process = MaskingProcess(3, 2)
    with pytest.raises(ValueError, match="vectorize_particles=True"):
        MaskedDiffusionELBO(
            process, num_particles=3, importance_weighted=True, vectorize_particles=False
        )


# ------------------------------------------------------------ Pyro's own tools


def test_scale_and_subsampling_stand_outside_the_logarithm():
    process = MaskingProcess(3, 2)
    batch = one_batch(process)
    for prior, options in [
        ("standard_normal", {}),
        ("categorical", {}),
        ("mixture_of_normals", dict(num_particles=3, importance_weighted=True)),
    ]:
        elbo = MaskedDiffusionELBO(process, **options)
        model, guide = small_pair(prior, process)
        values = {}
        if prior != "categorical":
            shape = (3, 6, 2) if options else (6, 2)
            values = {"z": torch.randn(shape)}
        fixed = Fixed(guide, values)
        plain = elbo(model, fixed)(batch)
        doubled = elbo(poutine.scale(model, 2.0), poutine.scale(fixed, 2.0))(batch)
        torch.testing.assert_close(doubled, 2 * plain)
    model = coded_model(torch.randn(4, 2, 3), torch.randn(4))

    def subsampled(batch):
        with pyro.plate("data", 60, subsample_size=len(batch), dim=-1):
            z = pyro.sample("z", dist.Categorical(torch.ones(4)))
            tokens(torch.arange(24.0).reshape(4, 2, 3)[z], batch)

    def whole(batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Categorical(torch.ones(4)))
            tokens(torch.arange(24.0).reshape(4, 2, 3)[z], batch)

    elbo = MaskedDiffusionELBO(process)
    none = guides.NoLatent()
    torch.testing.assert_close(elbo(subsampled, none)(batch), 10 * elbo(whole, none)(batch))


def test_unequal_scales_inside_a_logarithm_are_refused():
    process = MaskingProcess(3, 2)

    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            with poutine.scale(scale=0.5):
                z = pyro.sample("z", dist.Categorical(torch.ones(4)))
            tokens(torch.zeros(4, 1, 2, 3)[z.squeeze(-1)], batch)

    with pytest.raises(ValueError, match="same scale"):
        MaskedDiffusionELBO(process).loss(model, guides.NoLatent(), one_batch(process))


def test_mask_condition_and_block_do_what_they_say():
    process = MaskingProcess(3, 2)
    model, guide = small_pair("standard_normal", process)
    batch = process.corrupt(torch.randint(3, (6, 2)), 1.0)
    elbo = MaskedDiffusionELBO(process)
    z = torch.randn(6, 2)
    fixed = Fixed(guide, {"z": z})
    rows = elbo.score(model, fixed, batch).rows
    keep = torch.tensor([1, 0, 1, 0, 0, 1], dtype=torch.bool)
    half = elbo.score(poutine.mask(model, mask=keep), poutine.mask(fixed, mask=keep), batch)
    torch.testing.assert_close(half.rows, torch.where(keep, rows, 0.0))
    # conditioned on z, the model is log p(x, z) and leaves nothing to infer
    conditioned = poutine.condition(model, {"z": z})
    joint = elbo.score(conditioned, guides.NoLatent(), batch).rows
    trace = poutine.trace(conditioned).get_trace(batch)
    trace.compute_log_prob()
    expected = trace.nodes["z"]["log_prob"] + trace.nodes["x_0"]["log_prob"]
    torch.testing.assert_close(joint, expected)
    # blocked, a latent is drawn from the prior and not counted
    blocked = elbo.score(poutine.block(model, hide=["z"]), guides.NoLatent(), batch)
    assert (blocked.kl == 0).all()
    with pytest.raises(ValueError, match=r"observed in the model.*poutine.block"):
        elbo.score(conditioned, guide, batch)


def test_sites_outside_the_plate_count_once_and_unweighted():
    process = MaskingProcess(3, 2)
    w_value = torch.tensor(0.7)

    def model(batch):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(batch), dim=-1):
            logits = w.reshape(-1, 1, 1, 1) * torch.arange(3.0)
            logits = logits.expand(-1, len(batch), 2, 3)
            tokens(logits if w.dim() else logits[0], batch)

    def guide(batch):
        pyro.sample("w", dist.Normal(0.2, 0.5))

    batch = one_batch(process)
    fixed = Fixed(guide, {"w": w_value})
    elbo = MaskedDiffusionELBO(process, closed_form_kl=False)
    log_mu = torch.log_softmax(w_value * torch.arange(3.0), -1)[batch.x_0]
    data_part = (batch.weight * (log_mu * batch.target).sum(-1)).sum()
    shared = dist.Normal(0.0, 1.0).log_prob(w_value) - dist.Normal(0.2, 0.5).log_prob(w_value)
    torch.testing.assert_close(elbo(model, fixed)(batch), -(data_part + shared))
    closed = MaskedDiffusionELBO(process)
    kl = torch.distributions.kl_divergence(dist.Normal(0.2, 0.5), dist.Normal(0.0, 1.0))
    torch.testing.assert_close(closed(model, fixed)(batch), -(data_part - kl))
    many = MaskedDiffusionELBO(process, num_particles=3, closed_form_kl=False)
    torch.testing.assert_close(
        many(model, Fixed(guide, {"w": w_value.expand(3, 1)}))(batch), -(data_part + shared)
    )
    with pytest.raises(ValueError, match="importance weighting is per row"):
        MaskedDiffusionELBO(process, num_particles=3, importance_weighted=True).loss(
            model, guide, batch
        )

    def coupled(batch):
        c = pyro.sample("c", dist.Categorical(torch.ones(2)))
        with pyro.plate("data", len(batch), dim=-1):
            tokens((c.unsqueeze(-1).unsqueeze(-1) * torch.arange(3.0)).expand(2, 1, 2, 3), batch)

    with pytest.raises(ValueError, match=r"'c' stands outside the data plate"):
        elbo.loss(coupled, guides.NoLatent(), batch)


def test_programs_without_a_plate_work_too():
    process = MaskingProcess(3, 2)
    weight = torch.randn(2, 6)

    def model(batch):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(batch), 2), 1.0).to_event(1))
        tokens((z @ weight).unflatten(-1, (2, 3)), batch)

    def plated(batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            tokens((z @ weight).unflatten(-1, (2, 3)), batch)

    def guide(batch):
        pyro.sample("z", dist.Normal(torch.ones(len(batch), 2), 0.5).to_event(1))

    batch = one_batch(process)
    fixed = Fixed(guide, {"z": torch.randn(6, 2)})
    elbo = MaskedDiffusionELBO(process)
    torch.testing.assert_close(elbo(model, fixed)(batch), elbo(plated, fixed)(batch))


def test_a_plate_inside_the_data_plate_is_summed():
    process = MaskingProcess(3, 2)

    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            with pyro.plate("parts", 4, dim=-2):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            total = z.sum(-2, keepdim=z.dim() > 2)
            tokens((total[..., None, None] * torch.arange(6.0).reshape(2, 3)), batch)

    def guide(batch):
        with pyro.plate("data", len(batch), dim=-1), pyro.plate("parts", 4, dim=-2):
            pyro.sample("z", dist.Normal(0.1, 0.7))

    batch = process.corrupt(torch.randint(3, (6, 2)), 1.0)
    z = torch.randn(4, 6)
    elbo = MaskedDiffusionELBO(process, max_plate_nesting=2, closed_form_kl=False)
    terms = elbo.score(model, Fixed(guide, {"z": z}), batch)
    expected = (dist.Normal(0.1, 0.7).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)).sum(0)
    torch.testing.assert_close(terms.kl, expected)
    closed = MaskedDiffusionELBO(process, max_plate_nesting=2).score(model, guide, batch)
    kl = torch.distributions.kl_divergence(dist.Normal(0.1, 0.7), dist.Normal(0.0, 1.0))
    torch.testing.assert_close(closed.kl, 4 * kl.expand(6))
    particles = MaskedDiffusionELBO(process, max_plate_nesting=2, num_particles=3)
    assert math.isfinite(particles.loss(model, guide, batch))


# ------------------------------------------------------------------- bad input


def test_a_guide_that_does_not_fit_is_refused_by_name():
    process = MaskingProcess(3, 2)
    model, _ = small_pair("standard_normal", process)
    x_0 = torch.zeros(2, 2, dtype=torch.long)
    elbo = MaskedDiffusionELBO(process)
    with pytest.raises(ValueError, match=r"misses the latent site 'z'.*DiagonalNormal.*no sites"):
        elbo.loss(model, guides.NoLatent(), x_0)

    def other(batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("u", dist.Normal(0.0, 1.0))
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"guide samples 'u', which the model lacks.*'z', 'x_0'"):
        elbo.loss(model, other, x_0)

    def helped(batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    assert math.isfinite(elbo.loss(model, helped, x_0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(objective="elbo"), "objective must be 'delbo' or 'chain', got 'elbo'"),
        (dict(objective="chain"), "num_steps is missing"),
        (dict(objective="chain", num_steps=0), "num_steps must be at least 1"),
        (dict(num_steps=3), "belong to objective='chain'"),
        (dict(objective="chain", num_steps=3, times=GridTimes(3)), "twice"),
        (dict(num_particles=0), "num_particles must be at least 1"),
        (dict(kl_weight=-1.0), "kl_weight must be a number >= 0"),
        (dict(max_plate_nesting=0), "max_plate_nesting"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedDiffusionELBO(MaskingProcess(3, 2), **options)


def test_bad_data_are_named():
    process = MaskingProcess(3, 2)
    pair = small_pair("none", process)
    elbo = MaskedDiffusionELBO(process)
    with pytest.raises(ValueError, match=r"x_0\[0, 1\] is 3"):
        elbo.loss(*pair, torch.tensor([[0, 3]]))
    with pytest.raises(TypeError, match="integer tokens"):
        elbo.loss(*pair, torch.rand(2, 2))
    chain = MaskedDiffusionELBO(process, "chain", times=UniformTimes())
    with pytest.raises(ValueError, match="use GridTimes"):
        chain.loss(*pair, torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"batch.x_0 is None"):
        elbo.loss(*pair, one_batch(process).without_data())


def test_kl_annealing_counts_differentiated_losses():
    process = MaskingProcess(3, 2)
    model, guide = small_pair("standard_normal", process)
    elbo = MaskedDiffusionELBO(process, kl_weight=LinearAnnealing(4, 0.2, 1.0))
    x_0 = torch.randint(3, (8, 2))
    weights = []
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=elbo)
    for _ in range(6):
        weights.append(elbo.current_kl_weight())
        svi.step(x_0)
        svi.evaluate_loss(x_0)
    assert weights == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    terms = MaskedDiffusionELBO(process, kl_weight=0.3).terms(model, guide, x_0)
    torch.testing.assert_close(terms.loss.detach(), terms.reconstruction + 0.3 * terms.kl)


def test_atom_trains_the_state_that_samples_start_from():
    process = MaskingProcess(3, 6)
    batch = MaskedDiffusionELBO(process, times=AtomTimes(0.5)).draw(
        torch.zeros(400, 6, dtype=torch.long)
    )
    assert 0.4 < batch.masked.all(-1).double().mean() < 0.8


def test_equal_rows_share_the_work_of_a_summed_code():
    process = MaskingProcess(3, 2)
    model, _ = small_pair("categorical", process)
    batch = process.corrupt(torch.randint(3, (40, 2)), torch.rand(40))
    decoder, codes = model.decoder, model.prior.embedding.weight.unsqueeze(1)
    seen = []
    hook = decoder.head.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0]))
    shared = decoder(batch.x_t, codes, batch.t)
    alone = decoder(batch.x_t, codes.expand(-1, 40, -1), batch.t)
    hook.remove()
    torch.testing.assert_close(shared, alone)
    distinct = len(batch.x_t.unique(dim=0))
    assert [s.shape[1] for s in seen] == [distinct, 40]
    assert distinct < 17
