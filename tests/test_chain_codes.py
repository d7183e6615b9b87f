"""Chains of codes along the row: their law, what sums them out, and what needs them local."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from vadd_pyro import (
    MaskedDiffusionELBO,
    MaskingProcess,
    exact_bound,
    exact_distribution,
    fit,
    guides,
    infill,
    log_likelihood_bound,
    metrics,
    models,
    sample,
    zoo,
)
from vadd_pyro.distributions import CodeChain, TokenCategorical, position_log_prob
from vadd_pyro.monitor import latent_statistics
from vadd_pyro.nn import (
    LateTransformerDecoder,
    LocalTransformerDecoder,
    TransformerState,
    make_networks,
)

SIZES = dict(hidden_dim=16, num_layers=2, num_heads=2, condition_dim=16)
LATE = dict(latent_hidden_dim=8)


def chain(batch=3, length=4, codes=3, scale=2.0, dtype=torch.double):
    torch.manual_seed(5)
    transition = scale * torch.randn(codes, codes, dtype=dtype)
    return CodeChain(transition, scale * torch.randn(batch, length, codes, dtype=dtype))


def factors_of(law, scale=3.0):
    torch.manual_seed(6)
    return scale * torch.randn(*law.potential.shape, dtype=law.potential.dtype)


def joint(law, factor):
    """Log-weights of all combinations, and these."""
    codes = law.enumerate_support()
    picked = factor.expand(*codes.shape, -1).gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    return law.log_prob(codes) + picked.sum(-1), codes


def pair(process, codes=3, spread=0.3, prior="conditional_chain", seed=0):
    """A model with a chain as it may be after training."""
    torch.manual_seed(seed)
    networks = make_networks("transformer", process, **SIZES, **LATE)
    made = zoo.build(prior, "auto", process, num_codes=codes, networks=networks)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return made.model, made.guide


@pytest.fixture
def by_combination(monkeypatch):
    """Chains are laid out in all their combinations, as other discrete latents are."""
    return lambda: monkeypatch.setattr(CodeChain, "sums_by_position", False)


# --------------------------------------------------------------------------------------------- law


def test_probabilities_are_those_of_the_steps():
    law = chain()
    codes = law.enumerate_support()
    assert torch.allclose(law.log_prob(codes).exp().sum(0), torch.ones(3).double())
    expected = law.potential[..., 0, :].log_softmax(-1).expand(len(codes), -1, -1)
    total = expected.gather(-1, codes[..., :1].expand(-1, 3, 1)).squeeze(-1)
    for i in range(1, law.length):
        step = (law.transition[codes[..., i - 1]] + law.potential[:, i]).log_softmax(-1)
        total = total + step.gather(-1, codes[..., i, None].expand(-1, 3, 1)).squeeze(-1)
    assert torch.allclose(law.log_prob(codes), total, atol=1e-12)


@pytest.mark.parametrize("how", ["sample", "transport"])
def test_draws_have_the_law(how):
    law = chain(batch=1)
    torch.manual_seed(0)
    u = torch.rand(20_000, 1, law.length, dtype=torch.double)
    codes = law.sample((20_000,)) if how == "sample" else law.transport(u)
    assert codes.shape == (20_000, 1, 4)
    place = (codes[:, 0] * 3 ** torch.arange(3, -1, -1)).sum(-1)
    found = place.bincount(minlength=81).double()
    expected = 20_000 * law.log_prob(law.enumerate_support())[:, 0].exp()
    many = expected > 5
    found = torch.cat([found[many], found[~many].sum().reshape(1)])
    expected = torch.cat([expected[many], expected[~many].sum().reshape(1)])
    assert chisquare(found.numpy(), expected.numpy()).pvalue > 1e-3


def test_the_recursion_is_the_sum_over_all_combinations():
    law = chain()
    factor = factors_of(law).requires_grad_()
    law.transition.requires_grad_()
    law.potential.requires_grad_()
    wanted = [factor, law.transition, law.potential]
    by_sum = joint(law, factor)[0].logsumexp(0)
    by_steps = law.summed_out(factor)
    assert torch.allclose(by_steps, by_sum, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(by_steps.sum(), wanted),
        torch.autograd.grad(by_sum.sum(), wanted),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-12)


def test_nothing_is_left_of_a_chain_that_no_token_looks_at():
    law = chain()
    assert torch.allclose(law.summed_out(torch.zeros_like(law.potential)), torch.zeros(3).double())
    same = torch.randn(3, 4, 1).double()
    found = law.summed_out(same.expand_as(law.potential))
    assert torch.allclose(found, same.sum((-2, -1)))


def test_the_posterior_is_a_chain():
    law = chain()
    factor = factors_of(law)
    weights, codes = joint(law, factor)
    posterior = weights - weights.logsumexp(0)
    given = law.given(factor)
    assert torch.allclose(given.log_prob(codes), posterior, atol=1e-10)
    expected = [(posterior.exp().unsqueeze(-1) * (codes == c)).sum(0) for c in range(3)]
    assert torch.allclose(given.marginals(), torch.stack(expected, -1), atol=1e-10)


def test_long_rows_and_large_numbers_do_not_run_out_of_range():
    torch.manual_seed(0)
    law = CodeChain(60 * torch.randn(5, 5), 60 * torch.randn(2, 600, 5))
    factor = (80 * torch.randn(2, 600, 5)).requires_grad_()
    found = law.summed_out(factor)
    state = law.potential[:, 0].double().log_softmax(-1) + factor[:, 0].double()
    for i in range(1, 600):
        step = (law.transition.double() + law.potential[:, i, None].double()).log_softmax(-1)
        state = (state.unsqueeze(-1) + step).logsumexp(-2) + factor[:, i].double()
    assert torch.allclose(found.double(), state.logsumexp(-1), rtol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), factor)
    assert gradient.isfinite().all()
    assert torch.allclose(gradient.sum(-1), torch.ones(2, 600), atol=1e-4)


def test_a_token_that_no_code_allows_has_probability_zero():
    law = chain()
    factor = factors_of(law)
    factor[0, 2] = -math.inf
    factor[1, 2, 0] = -math.inf
    found = law.summed_out(factor)
    assert torch.allclose(found, joint(law, factor)[0].logsumexp(0))
    assert found[0] == -math.inf
    assert found[1].isfinite()


def test_a_tempered_chain_is_that_of_the_divided_logits():
    law = chain()
    codes = law.enumerate_support()
    cold = CodeChain(law.transition / 0.5, law.potential / 0.5)
    assert torch.allclose(law.tempered(0.5).log_prob(codes), cold.log_prob(codes))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(5, 3, 4\) and \(3, 3\)"):
        CodeChain(torch.zeros(3, 3), torch.zeros(5, 3, 4))
    long = chain(length=20)
    assert not long.has_enumerate_support
    with pytest.raises(NotImplementedError, match="3,486,784,401 combinations"):
        long.enumerate_support()
    with pytest.raises(ValueError, match="support"):
        CodeChain(torch.zeros(3, 3), torch.zeros(4, 3), validate_args=True).log_prob(
            torch.tensor([0, 1, 2, 3])
        )


def test_tokens_are_scored_position_by_position():
    torch.manual_seed(0)
    logits, x = torch.randn(2, 5, 3, 4), torch.randint(4, (5, 3))
    target = torch.rand(5, 3) < 0.5
    rows = TokenCategorical(logits, target)
    usual = dist.Categorical(logits=logits).mask(target).to_event(1)
    for law in (rows, usual):
        found = position_log_prob(law, x)
        assert found.shape == (2, 5, 3)
        assert torch.allclose(found.sum(-1), rows.log_prob(x), atol=1e-6)
        assert (found[:, ~target] == 0).all()
    with pytest.raises(TypeError, match="to sum out a latent along a row"):
        position_log_prob(dist.Normal(0.0, 1.0), x)


# ----------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("prior", ["chain", "conditional_chain"])
@pytest.mark.parametrize("options", [{}, {"num_particles": 3, "importance_weighted": True}])
def test_scores_and_gradients_are_those_of_all_combinations(prior, options, by_combination):
    process = MaskingProcess(5, 4)
    model, guide = pair(process, prior=prior)
    torch.manual_seed(1)
    batch = process.corrupt(torch.randint(5, (7, 4)), torch.linspace(0.2, 1, 7))
    elbo = MaskedDiffusionELBO(process, **options)

    def found():
        rows = elbo.score(model, guide, batch).rows
        return rows, torch.autograd.grad(rows.sum(), list(model.parameters()), allow_unused=True)

    rows, gradients = found()
    by_combination()
    other_rows, other_gradients = found()
    assert torch.allclose(rows, other_rows, rtol=1e-4, atol=1e-4)
    assert rows.std() > 0.1
    for one, other in zip(gradients, other_gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.allclose(one, other, rtol=2e-3, atol=2e-3)


def test_handlers_of_the_tokens_count(by_combination):
    process = MaskingProcess(5, 4)
    model, guide = pair(process)
    batch = process.corrupt(torch.randint(5, (6, 4)), 1.0)
    elbo = MaskedDiffusionELBO(process)
    keep = torch.tensor([True, False, True, True, False, True])

    def kept(batch):
        with pyro.plate("data", len(batch), dim=-1):
            pass
        with poutine.mask(mask=keep):
            return model(batch)

    masked = elbo.score(kept, guide, batch).rows
    plain = elbo.score(model, guide, batch).rows
    assert torch.allclose(masked, plain * keep)
    scaled = elbo.score(poutine.scale(model, 2.5), guide, batch).rows
    assert torch.allclose(scaled, 2.5 * plain, rtol=1e-5)


def test_a_program_of_the_users_own_with_ordinary_laws():
    process = MaskingProcess(3, 4)
    torch.manual_seed(0)
    transition, potential = torch.randn(2, 2), torch.randn(4, 2)
    emission = torch.randn(2, 3)

    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", CodeChain(transition, potential))
            law = dist.Categorical(logits=emission[z]).mask(batch.target).to_event(1)
            return pyro.sample("x_0", law, obs=batch.x_0)

    x = torch.randint(3, (5, 4))
    batch = process.corrupt(x, 1.0)
    rows = MaskedDiffusionELBO(process).score(model, guides.NoLatent(), batch).rows
    law = CodeChain(transition, potential)
    factor = emission.log_softmax(-1)[:, x].movedim(0, -1)
    codes = law.enumerate_support()
    picked = factor.expand(len(codes), -1, -1, -1).gather(
        -1, codes.unsqueeze(1).expand(-1, 5, -1).unsqueeze(-1)
    )
    expected = (law.log_prob(codes).unsqueeze(-1) + picked.squeeze(-1).sum(-1)).logsumexp(0)
    assert torch.allclose(rows, expected, atol=1e-5)


def test_what_cannot_be_summed_out_is_refused():
    process = MaskingProcess(5, 4)
    batch = process.corrupt(torch.randint(5, (6, 4)), 1.0)
    elbo = MaskedDiffusionELBO(process)
    own, guide = pair(process)

    class Wide(nn.Module):
        def forward(self, x_t, z, t):  # every token looks at all codes
            return own.decoder(x_t, z.mean(-2, keepdim=True).expand_as(z), t)

    wide = models.VADD(Wide(), own.prior)
    with pytest.raises(ValueError, match="'z' is a chain along the row, but the law of a token"):
        elbo.score(wide, guide, batch)
    with pytest.raises(ValueError, match="'z' is a chain along the row, but the law of a token"):
        log_likelihood_bound(wide, guide, process, batch.x_0, 2)

    def two(batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("w", dist.Categorical(torch.ones(2)))
        return own(batch)

    with pytest.raises(ValueError, match=r"summed out beside 'x_0' alone; there is also 'w'"):
        elbo.score(two, guide, batch)


def test_the_check_takes_no_random_numbers():
    process = MaskingProcess(5, 4)
    model, guide = pair(process)
    batch = process.corrupt(torch.randint(5, (6, 4)), 1.0)
    model.train()
    torch.manual_seed(3)
    MaskedDiffusionELBO(process).score(model, guide, batch)
    after = torch.rand(())
    torch.manual_seed(3)
    assert torch.rand(()) == after
    assert model.training


# ------------------------------------------------------------------------- all a pair is there for


def test_bounds_are_exact_and_samples_have_the_law():
    process = MaskingProcess(3, 4)
    model, guide = pair(process, codes=2, spread=0.2)
    exact = exact_distribution(model, process, 2)
    space = torch.cartesian_prod(*[torch.arange(3)] * 4)
    bound = exact_bound(model, process, 2).flatten()
    assert (bound <= exact.flatten().log() + 1e-5).all()
    found = log_likelihood_bound(model, guide, process, space, 2, num_paths=1, seed=0)
    mean, error = found.mean()
    assert abs(mean - float(bound.mean())) < 5 * error + 1e-3
    draws = sample(model, process, 20_000, 2, seed=0)
    place = (draws * 3 ** torch.arange(3, -1, -1)).sum(-1)
    counts = place.bincount(minlength=81).double()
    assert chisquare(counts.numpy(), 20_000 * exact.flatten().numpy()).pvalue > 1e-3


def test_a_chain_learns_what_neighbours_owe_each_other():
    """Rows of pairs that are equal or not: one call writes them as they are."""
    torch.manual_seed(0)
    rows = torch.randint(3, (4000, 2)).repeat_interleave(2, 1)
    process = MaskingProcess(3, 4)
    torch.manual_seed(0)
    networks = make_networks("transformer", process, **SIZES, **LATE)
    made = zoo.build("conditional_chain", "auto", process, num_codes=6, networks=networks)
    elbo = MaskedDiffusionELBO(process)
    fit(
        made.model, made.guide, elbo, rows, 600, batch_size=128, learning_rate=1e-2, progress=False
    )
    found = exact_distribution(made.model, process, 1)
    truth = torch.zeros(3, 3, 3, 3).double()
    for a in range(3):
        for b in range(3):
            truth[a, a, b, b] = 1 / 9
    without = torch.full((3, 3, 3, 3), 1 / 81).double()
    distance = metrics.jensen_shannon(found, truth)
    assert distance < 0.05 * metrics.jensen_shannon(without, truth)
    statistics = latent_statistics(made.model, made.guide, process.corrupt(rows[:256], 1.0), elbo)
    assert statistics.kl > 2 * math.log(3) * 0.8
    assert statistics.mutual_information > 0.7 * math.log(9)
    assert statistics.share_at_prior == 0
    start = torch.tensor([3, 1, 2, 3])
    found = infill(made.model, process, start, 1, num_samples=200, num_particles=1024, seed=0)
    rows = found.x.reshape(-1, 4)
    assert (rows == torch.tensor([1, 1, 2, 2])).all(-1).double().mean() > 0.9


def test_what_a_chain_carries_is_known_by_its_posterior(by_combination):
    process = MaskingProcess(5, 4)
    model, guide = pair(process)
    torch.manual_seed(0)
    batch = process.corrupt(torch.randint(5, (200, 4)), 1.0)
    elbo = MaskedDiffusionELBO(process)
    found = latent_statistics(model, guide, batch, elbo, num_draws=8)
    assert found.num_units == 3
    by_combination()
    exact = latent_statistics(model, guide, batch, elbo)
    assert found.kl == pytest.approx(exact.kl, rel=1e-4)
    assert found.share_at_prior == exact.share_at_prior
    assert found.mutual_information == pytest.approx(exact.mutual_information, rel=0.1)


def train_long(compiled):
    """A chain of 40 codes after a few updates, and what these reported."""
    process = MaskingProcess(4, 40)
    torch.manual_seed(0)
    networks = make_networks("mlp", process, hidden_dim=16, num_layers=2)
    made = zoo.build("conditional_chain", "auto", process, num_codes=5, networks=networks)
    elbo = MaskedDiffusionELBO(process)
    rows = torch.randint(4, (256, 40))
    options = dict(batch_size=32, progress=False, seed=0, log_every=1, compile=compiled)
    history = fit(made.model, made.guide, elbo, rows, 6, **options)
    return process, made.model, history.loss


def test_updates_as_one_graph_are_those_of_the_programs(recwarn):
    *_, losses = train_long(True)
    assert not [w for w in recwarn if "graph" in str(w.message)]
    *_, expected = train_long(False)
    assert losses == pytest.approx(expected, rel=1e-5)


def test_long_chains_sample():
    process, model, losses = train_long(False)
    assert all(math.isfinite(loss) for loss in losses)
    for how in ("fresh", "shared", "partial"):
        draws = sample(model, process, 8, 4, latent=how, seed=0, latent_temperature=0.7)
        assert draws.shape == (8, 40)
        assert (draws < 4).all()


# ---------------------------------------------------------------------------------------- networks


def test_a_local_decoder_looks_at_each_code_at_its_position():
    process = MaskingProcess(5, 6)
    decoder = LocalTransformerDecoder(process, 3, **SIZES, **LATE).eval()
    x_t = torch.full((4, 6), process.mask_id)
    t = torch.ones(4)
    torch.manual_seed(0)
    z = torch.randn(4, 6, 3)
    other = z.clone()
    other[:, 2] += 1
    changed = (decoder(x_t, z, t) != decoder(x_t, other, t)).any(-1).any(0)
    assert changed.tolist() == [False, False, True, False, False, False]
    wide = decoder(x_t, z[:2, None], t)
    assert wide.shape == (2, 4, 6, 5)
    assert torch.allclose(wide[1, 2], decoder(x_t[:1], z[1:2], t[:1])[0], atol=1e-6)
    same = LateTransformerDecoder(process, 3, **SIZES, **LATE)
    same.load_state_dict(decoder.state_dict())
    assert torch.allclose(same(x_t, z[:, 0], t), decoder(x_t, z[:, :1].expand_as(z), t), atol=1e-6)
    for shape in ((4, 3), (4, 5, 3), (4, 6, 2), (3, 6, 3)):
        with pytest.raises(ValueError, match=r"z must have a latent at each position"):
            decoder(x_t, torch.zeros(shape), t)


def test_the_state_at_each_position():
    process = MaskingProcess(5, 6)
    state = TransformerState(process, **SIZES)
    x = torch.randint(5, (3, 6))
    batch = process.corrupt(x, 0.5)
    found = state(batch)
    assert found.shape == (3, 6, 16)
    assert state.feature_dim == 16
    assert found.std() < 0.5  # divided by the root of their number


def test_networks_without_local_latents_say_so():
    process = MaskingProcess(2, 16)
    pixels = make_networks("pixel", process, shape=(4, 4), hidden_dim=8)
    with pytest.raises(ValueError, match="PixelNetworks have no latents at single positions"):
        zoo.build("chain", "auto", process, num_codes=3, networks=pixels)


@pytest.mark.parametrize("backbone", ["mlp", "residual", "transformer"])
def test_chains_of_all_networks_are_local(backbone):
    process = MaskingProcess(3, 5)
    networks = make_networks(backbone, process, hidden_dim=16)
    made = zoo.build("conditional_chain", "auto", process, num_codes=3, networks=networks)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    rows = torch.randint(3, (6, 5))
    with pyro.validation_enabled(True):  # which compares codes at one position and at all
        found = log_likelihood_bound(made.model, made.guide, process, rows, 3, seed=0)
    assert found.value.isfinite().all()


# --------------------------------------------------------------------- what a review has broken


def wide_decoder(process, codes=3):
    """A model whose tokens see the mean code of the row, through a last layer that starts at 0."""
    model, guide = pair(process, codes)
    width = model.prior.latent_dim

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(width, process.length * process.vocab_size)
            nn.init.zeros_(self.head.weight)

        def forward(self, x_t, z, t):
            logits = self.head(z.mean(-2)).unflatten(-1, (process.length, process.vocab_size))
            return logits + torch.zeros(len(x_t), 1, 1)

    return models.VADD(Wide(), model.prior), guide


def test_a_coupling_that_training_makes_is_found_when_latents_are_looked_at():
    process = MaskingProcess(3, 4)
    model, guide = wide_decoder(process)
    rows = torch.randint(3, (64, 1)).expand(-1, 4).contiguous()
    elbo = MaskedDiffusionELBO(process)
    with pytest.raises(ValueError, match="the law of a token depends on codes of other positions"):
        fit(model, guide, elbo, rows, 60, batch_size=32, monitor_every=20, progress=False)


def test_rows_without_a_mask_tell_nothing():
    process = MaskingProcess(3, 4)
    model, guide = wide_decoder(process)
    nn.init.normal_(model.decoder.head.weight, std=3.0)
    elbo = MaskedDiffusionELBO(process)
    rows = torch.randint(3, (6, 4))
    elbo.score(model, guide, process.corrupt(rows, 1e-9))
    with pytest.raises(ValueError, match="the law of a token depends on codes of other positions"):
        elbo.score(model, guide, process.corrupt(rows, 1.0))


def test_arguments_of_the_program_reach_the_check():
    process = MaskingProcess(3, 4)
    own, guide = pair(process)
    seen = []

    def model(batch, weight, *, power):
        assert weight.shape == (len(batch),)
        seen.append(power)
        return own(batch)

    batch = process.corrupt(torch.randint(3, (7, 4)), 1.0)
    elbo = MaskedDiffusionELBO(process)
    given = elbo.score(model, lambda *a, **k: None, batch, torch.ones(7), power=2).rows
    assert torch.allclose(given, elbo.score(own, guide, batch).rows)
    assert set(seen) == {2}
    assert len(seen) == 4


def test_dropout_in_a_function_is_no_coupling():
    process = MaskingProcess(3, 4)
    networks = make_networks("transformer", process, **SIZES, **LATE, dropout=0.3)
    made = zoo.build("chain", "auto", process, num_codes=3, networks=networks)
    made.model.train()
    batch = process.corrupt(torch.randint(3, (7, 4)), 1.0)
    rows = MaskedDiffusionELBO(process).score(lambda b: made.model(b), made.guide, batch).rows
    assert rows.isfinite().all()


def test_a_chain_needs_its_latent_at_every_time_and_features_at_every_position():
    process = MaskingProcess(3, 4)
    own, guide = pair(process)
    batch = process.corrupt(torch.randint(3, (4, 4)), 0.9, at_least_one=True)
    late = models.VADD(own.decoder, own.prior, least_time=0.95)
    with pytest.raises(ValueError, match=r"least_time = 0\.95 needs one latent for the row"):
        MaskedDiffusionELBO(process).score(late, guide, batch)
    networks = make_networks("mlp", process, hidden_dim=16)
    prior = models.Chain(3, 4, context=networks.state())
    with pytest.raises(ValueError, match=r"context must give features of each .*\(4, 4, 'F'\)"):
        prior(batch)


def test_the_posterior_takes_what_the_sum_takes():
    law = CodeChain(torch.randn(3, 3).double(), torch.randn(4, 3).double())
    factor = torch.randn(5, 4, 3).double()
    for one, other in ((law, factor), (chain(), factor[0])):
        given = one.given(other)
        weights, codes = joint(one.expand(given.batch_shape), other.expand(given.potential.shape))
        expected = weights - weights.logsumexp(0)
        assert torch.allclose(given.log_prob(codes), expected, atol=1e-10)
    factor[0, 2] = -math.inf
    assert law.given(factor).batch_shape == (5,)
    assert law.summed_out(factor)[0] == -math.inf


def test_a_scale_of_the_codes_alone_is_refused():
    process = MaskingProcess(3, 4)
    own, guide = pair(process)

    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            with poutine.scale(scale=3.0):
                z = own.prior(batch)
            law = TokenCategorical(own.decoder(batch.x_t, z, batch.t), batch.target)
            return pyro.sample("x_0", law, obs=batch.x_0)

    batch = process.corrupt(torch.randint(3, (6, 4)), 1.0)
    with pytest.raises(ValueError, match="has scale"):
        MaskedDiffusionELBO(process).score(model, guide, batch)


def test_exact_laws_of_many_combinations_are_exact(by_combination):
    process = MaskingProcess(2, 6)
    model, _ = pair(process, codes=4)  # 4,096 combinations, the most that are laid out
    by_steps = exact_distribution(model, process, 3)
    other, _ = pair(process, codes=9)
    found = exact_distribution(other, process, 2)
    assert float(found.sum()) == pytest.approx(1)
    with pytest.raises(ValueError, match="with too many combinations to be laid out"):
        exact_distribution(other, process, 2, latent="shared")
    by_combination()
    assert torch.allclose(by_steps, exact_distribution(model, process, 3), atol=1e-8)


def test_sums_are_single_precision_under_autocast():
    process = MaskingProcess(5, 4)
    model, guide = pair(process)
    batch = process.corrupt(torch.randint(5, (6, 4)), 1.0)
    elbo = MaskedDiffusionELBO(process)
    with torch.autocast("cpu", torch.bfloat16):
        rows = elbo.score(model, guide, batch).rows
    assert rows.dtype == torch.float32
    assert torch.allclose(rows, elbo.score(model, guide, batch).rows, rtol=0.05, atol=0.3)
    law = chain(dtype=torch.float32)
    assert law.summed_out(torch.zeros(3, 4, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_gradients_are_those_of_differences():
    law = chain(batch=2, length=3)
    factor = factors_of(law)

    def of(transition, potential, factor):
        return CodeChain(transition, potential).summed_out(factor)

    inputs = [t.clone().requires_grad_() for t in (law.transition, law.potential, factor)]
    assert torch.autograd.gradcheck(of, inputs)
    assert torch.autograd.gradgradcheck(of, inputs)


def test_exact_laws_of_a_chain_beside_a_vector():
    process = MaskingProcess(2, 5)
    torch.manual_seed(0)
    law = CodeChain(torch.randn(6, 6), torch.randn(5, 6))  # 7,776 combinations
    emission, tilt = torch.randn(6, 2), torch.tensor([0.0, 1.0])

    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            w = pyro.sample("w", dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1))
            z = pyro.sample("z", law)
            logits = emission[z] + w.unsqueeze(-1) * tilt
            return pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)

    exact = exact_distribution(model, process, 1).flatten()
    draws = sample(model, process, 20_000, 1, seed=0)
    counts = (draws * 2 ** torch.arange(4, -1, -1)).sum(-1).bincount(minlength=32)
    assert chisquare(counts.double().numpy(), 20_000 * exact.numpy()).pvalue > 1e-3
