"""What each way of revealing tokens does to the law: the table in ``vadd_pyro.orders``."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import all_rows, small_pair

from vadd_pyro import (
    CosineSchedule,
    MaskingProcess,
    TokenCategorical,
    exact_distribution,
    metrics,
    models,
    sample,
)
from vadd_pyro.orders import by_entropy, remasking_rates, reveal_counts
from vadd_pyro.tempering import Tempering, tempered

NUM = 40_000
PROCESS = MaskingProcess(2, 3)


def dependent_law(process=PROCESS, spread=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (process.vocab_size,) * process.length
    logits = spread * torch.randn(shape, generator=generator, dtype=torch.double)
    return logits.flatten().softmax(0).reshape(shape)


class Conditionals:
    """A decoder that knows the law of the data: ``q(x_j | x_t)`` at every position."""

    def __init__(self, law):
        self.vocab_size, self.length = law.shape[0], law.dim()
        self.outcomes = all_rows(self.vocab_size, self.length)
        self.law = law.flatten()
        self.times = []
        self.states = []

    def posterior(self, x_t):
        """Log-probabilities of all outcomes given the visible tokens, ``(B, K ** D)``."""
        hidden = (x_t == self.vocab_size).unsqueeze(1)
        agree = ((x_t.unsqueeze(1) == self.outcomes) | hidden).all(-1)
        return (agree * self.law).log().clamp_min(-1e4).log_softmax(-1)

    def __call__(self, x_t, z, t):
        self.times.append(t)
        self.states.append(x_t.clone())
        one_hot = torch.nn.functional.one_hot(self.outcomes, self.vocab_size).double()
        p = torch.einsum("bn,ndk->bdk", self.posterior(x_t).exp(), one_hot)
        return p.log().clamp_min(-1e4)


def exact_joint(law):
    """A step program whose latent is the whole row: ``E_z prod_j mu_j = q(x_M | x_t)``."""
    decoder = Conditionals(law)

    def program(batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Categorical(logits=decoder.posterior(batch.x_t)))
            clean = torch.nn.functional.one_hot(decoder.outcomes[z], decoder.vocab_size)
            pyro.sample("x_0", TokenCategorical(1e4 * clean, batch.target), obs=batch.x_0)

    return program


def worst(x, law):
    """Largest deviation of a histogram from a law, in standard errors."""
    error = (law * (1 - law) / len(x)).sqrt().clamp_min(1 / len(x))
    return float(((metrics.histogram(x, law.shape[0]) - law).abs() / error).max())


def left_to_right(logits, batch):
    return -torch.arange(logits.shape[1]).expand(batch.x_t.shape)


def random_scores(logits, batch):
    return torch.rand(batch.x_t.shape)


def by_second_logit(logits, batch):
    return logits[..., 1]


# ----------------------------------------------- exact conditionals, no latent


@pytest.mark.parametrize(
    "options",
    [
        dict(order="entropy", num_steps=3),
        dict(order=left_to_right, num_steps=3),
        dict(order=random_scores, num_steps=3),
        dict(order=by_second_logit, num_steps=3),
        dict(order="entropy_bounded", entropy_bound=0.0),
    ],
    ids=["entropy", "left_to_right", "random_scores", "by_second_logit", "entropy_bounded"],
)
def test_one_token_a_step_keeps_the_law_of_the_data(options):
    law = dependent_law()
    x = sample(models.MDM(Conditionals(law)), PROCESS, NUM, seed=1, **options)
    assert worst(x, law) < 4.5


@pytest.mark.parametrize("order", ["entropy", left_to_right])
def test_two_dependent_tokens_a_step_do_not(order):
    law = dependent_law()
    x = sample(models.MDM(Conditionals(law)), PROCESS, NUM, 2, order=order, seed=1)
    assert worst(x, law) > 10


def test_confidence_bends_the_law_even_of_independent_tokens():
    process = MaskingProcess(2, 2)
    p = torch.tensor([0.7, 0.3], dtype=torch.double)
    model = models.MDM(Conditionals(p[:, None] * p))
    x = sample(model, process, NUM, 2, order="confidence", seed=1)
    # Revealed first: a zero at the left; else a zero at the right; else the one at the left.
    # The other position is then drawn again.
    left_zero, right_zero, left_one = 0.7, 0.3 * 0.7, 0.3 * 0.3
    expected = torch.tensor(
        [
            [(left_zero + right_zero) * 0.7, left_zero * 0.3],
            [right_zero * 0.3 + left_one * 0.7, left_one * 0.3],
        ],
        dtype=torch.double,
    )
    assert worst(x, expected) < 4.5
    assert worst(x, p[:, None] * p) > 30


def test_all_orders_agree_when_everything_is_revealed_at_once():
    model, _ = small_pair("categorical", PROCESS, spread=6.0)
    law = exact_distribution(model, PROCESS, 1)
    for order in ("confidence", "entropy", left_to_right):
        assert worst(sample(model, PROCESS, NUM, 1, order=order, seed=1), law) < 4.5
    bounded = dict(order="entropy_bounded", entropy_bound=math.inf)
    assert worst(sample(model, PROCESS, NUM, seed=1, **bounded), law) < 4.5


def test_random_scores_one_token_a_step_are_the_limit_of_many_steps():
    model, _ = small_pair("categorical", PROCESS, spread=6.0)
    # The error of p_T falls as 1 / T, so that two of them give the limit.
    law = 2 * exact_distribution(model, PROCESS, 48) - exact_distribution(model, PROCESS, 24)
    assert worst(sample(model, PROCESS, NUM, 3, order=random_scores, seed=1), law) < 4.5
    assert worst(sample(model, PROCESS, NUM, 1, order=random_scores, seed=1), law) > 10


# ------------------------------------------------------------ exact joint laws


@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("order", ["random", left_to_right])
def test_an_exact_joint_keeps_its_law_in_orders_blind_to_the_latent(order, num_steps):
    law = dependent_law()
    x = sample(exact_joint(law), PROCESS, NUM, num_steps, order=order, seed=1)
    assert worst(x, law) < 4.5


def test_a_shared_latent_that_holds_everything_keeps_its_mixture():
    law = exact_distribution(coded, PROCESS, 1)
    for order in ("random", "entropy"):
        x = sample(coded, PROCESS, NUM, 3, order=order, latent="shared", seed=1)
        assert worst(x, law) < 4.5
    assert worst(sample(coded, PROCESS, NUM, 3, latent="fresh", seed=1), law) > 10


def test_an_order_that_sees_the_latent_prefers_what_it_makes_certain():
    process = MaskingProcess(2, 2)

    def program(batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
            first = torch.stack([1 - 0.5 * z, 0.5 * z], -1)
            second = torch.tensor([0.7, 0.3]).expand(len(batch), 2)
            logits = torch.stack([first, second], 1).log().clamp_min(-1e4)
            pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)

    # Averaged over z the tokens are independent, the first 0 with 3/4, whatever is visible.
    law = torch.tensor([[0.525, 0.225], [0.175, 0.075]], dtype=torch.double)
    assert worst(sample(program, process, NUM, 2, order=left_to_right, seed=1), law) < 4.5
    bent = torch.tensor([7 / 8, 1 / 8], dtype=torch.double)[:, None] * law.sum(0)
    for options in (
        dict(order="entropy", num_steps=2),
        dict(order="entropy_bounded", entropy_bound=0.0),
    ):
        assert worst(sample(program, process, NUM, seed=1, **options), bent) < 4.5


# ------------------------------------------------------------- entropy bounded


def test_the_entropy_bound_bounds_the_divergence_and_the_calls():
    process = MaskingProcess(2, 4)
    law = dependent_law(process, spread=1.0)
    calls = []
    for bound in (0.0, 0.4, 0.55, math.inf):
        decoder = Conditionals(law)
        model = models.MDM(decoder)
        options = dict(order="entropy_bounded", entropy_bound=bound, seed=1)
        x = sample(model, process, NUM, **options)
        calls.append(sum(len(t) for t in decoder.times) / NUM)
        noise = 2**4 / NUM
        assert metrics.kl_divergence(law, metrics.histogram(x, 2)) <= 4 * bound + noise
    assert calls[0] == 4
    assert calls[-1] == 1
    assert all(more > fewer for more, fewer in itertools.pairwise(calls))


def test_the_time_is_that_of_the_visible_share_and_the_limit_reveals_the_rest():
    process = MaskingProcess(2, 4, CosineSchedule())
    decoder = Conditionals(dependent_law(process))
    options = dict(order="entropy_bounded", entropy_bound=0.0)
    x = sample(models.MDM(decoder), process, 50, **options)
    assert (x < 2).all()
    share = torch.stack([(state != 2).double().mean(-1) for state in decoder.states])
    times = torch.stack(decoder.times).double()
    torch.testing.assert_close(process.schedule.alpha(times), share, atol=1e-6, rtol=0)
    assert (share[:, 0] == torch.tensor([0, 0.25, 0.5, 0.75])).all()
    decoder.states.clear()
    x = sample(models.MDM(decoder), process, 50, 2, **options)
    assert (x < 2).all()
    assert [int((state == 2).sum()) for state in decoder.states] == [200, 150]


# ------------------------------------------------------------------------ counts


def test_counts_sum_to_the_open_tokens_and_follow_the_schedule():
    process = MaskingProcess(2, 8)
    grid = torch.linspace(0, 1, 9, dtype=torch.double).unsqueeze(0)
    num_open = torch.tensor([8, 4, 0, 5])
    counts = reveal_counts(process, num_open, grid)
    assert (counts[0] == 1).all()
    assert (counts >= 0).all()
    assert (counts.sum(-1) == num_open).all()
    # 4 tokens in 8 steps: 4, 3.5, 3, ... are left, halves go up
    assert counts[1].tolist() == [1, 0] * 4
    late = torch.tensor([[0, 0.25, 0.5]], dtype=torch.double)
    assert reveal_counts(process, torch.tensor([4]), late).tolist() == [[2, 2]]
    # One and a half of three left is two, halves up: one token first, then two (T comes first).
    halves = reveal_counts(
        MaskingProcess(2, 3), torch.tensor([3]), torch.tensor([[0.0, 0.5, 1.0]])
    )
    assert halves.tolist() == [[2, 1]]
    sevenths = reveal_counts(
        MaskingProcess(2, 5), torch.tensor([5]), torch.tensor([[0.0, 0.25, 1.0]])
    )
    assert sevenths.tolist() == [[1, 4]]  # 1.25 left is one
    cosine = reveal_counts(MaskingProcess(2, 100, CosineSchedule()), torch.tensor([100]), grid)
    assert cosine[0, -1] < cosine[0, 0]


# --------------------------------------------------------------------- remasking


def remasked_law(decoder, process, grid, eta):
    """The law of the remasking sampler, carried from state to state one kernel at a time."""
    mask, length = process.mask_id, process.length
    states = all_rows(mask + 1, length)
    index = {tuple(state.tolist()): n for n, state in enumerate(states)}
    mu = decoder(states, None, None).exp()
    alpha = process.schedule.alpha(grid).tolist()
    p = torch.zeros(len(states), dtype=torch.double)
    p[index[(mask,) * length]] = 1.0
    for i in range(len(grid) - 1, 0, -1):
        before, after = alpha[i], alpha[i - 1]
        sigma = 0.0 if i == 1 else min(eta, (1 - after) / before) if before else eta
        reveal = 1.0 if i == 1 else (after - (1 - sigma) * before) / (1 - before)
        following = torch.zeros_like(p)
        for n in p.nonzero().flatten().tolist():
            moves = []
            for j, token in enumerate(states[n].tolist()):
                if token == mask:
                    shown = [(k, reveal * float(mu[n, j, k])) for k in range(mask)]
                    moves.append([(mask, 1 - reveal), *shown])
                else:
                    moves.append([(token, 1 - sigma), (mask, sigma)])
            for move in itertools.product(*moves):
                weight = math.prod(w for _, w in move)
                following[index[tuple(k for k, _ in move)]] += p[n] * weight
        p = following
    p = p.reshape((mask + 1,) * length)
    return p[(slice(mask),) * length]


def test_remasking_has_the_law_of_its_kernel_and_mends_a_coarse_first_step():
    process = MaskingProcess(2, 2)
    law = torch.tensor([[0.45, 0.05], [0.05, 0.45]], dtype=torch.double)
    decoder = Conditionals(law)
    grid = torch.cat([torch.zeros(1), torch.linspace(0.05, 0.2, 15), torch.ones(1)]).double()
    exact = {eta: remasked_law(decoder, process, grid, eta) for eta in (0.0, 0.1)}
    for eta, expected in exact.items():
        x = sample(models.MDM(decoder), process, NUM, time_grid=grid, remask=eta, seed=1)
        assert worst(x, expected) < 4.5
    plain, mended = (metrics.total_variation(law, p) for p in exact.values())
    assert plain > 0.2
    assert mended < plain / 3


def test_remasking_tends_to_the_law_of_the_data_slower_if_much_is_hidden():
    process = MaskingProcess(2, 2)
    law = torch.tensor([[0.45, 0.05], [0.05, 0.45]], dtype=torch.double)
    decoder = Conditionals(law)

    def off(num_steps, eta):
        grid = torch.linspace(0, 1, num_steps + 1, dtype=torch.double)
        return metrics.total_variation(law, remasked_law(decoder, process, grid, eta))

    for eta, least, most in ((lambda n: 2 / n, 3.5, 4.5), (lambda n: 0.5, 1.7, 2.3)):
        coarse, fine = (off(n, eta(n)) for n in (64, 256))
        assert least < coarse / fine < most  # four times the steps: as 1 / T and 1 / sqrt(T)
    assert off(64, 2 / 64) > off(64, 0.0)


@pytest.mark.parametrize("schedule", [None, CosineSchedule()])
def test_remasking_keeps_independent_tokens_and_exact_joints(schedule):
    process = MaskingProcess(3, 2, schedule)
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.double)
    decoder = Conditionals(p[:, None] * p.flip(0))
    x = sample(models.MDM(decoder), process, NUM, 6, remask=0.5, seed=1)
    assert worst(x, p[:, None] * p.flip(0)) < 4.5
    assert sum(len(state) for state in decoder.states) > 2.2 * NUM  # two calls without remasking
    law = dependent_law(process)
    assert worst(sample(exact_joint(law), process, NUM, 6, remask=0.5, seed=1), law) < 4.5


def test_remasking_never_acts_in_two_steps_and_spares_what_was_observed():
    model, _ = small_pair("categorical", PROCESS, spread=6.0)
    law = exact_distribution(model, PROCESS, 2)
    assert worst(sample(model, PROCESS, NUM, 2, remask=0.7, seed=1), law) < 4.5
    decoder = Conditionals(dependent_law())
    x_start = torch.tensor([[2, 1, 2], [0, 1, 1]])
    x = sample(models.MDM(decoder), PROCESS, 50, 20, remask=1.0, x_start=x_start, seed=1)
    assert (x[:50, 1] == 1).all()
    assert (x[50:] == x_start[1]).all()
    for state in decoder.states:
        assert (state[:, 1] == 1).all()
    # Most of the twenty steps find something to draw again.
    assert len(decoder.states) > 10


def test_remasking_rates_keep_the_share_of_visible_tokens():
    process = MaskingProcess(2, 4, CosineSchedule())
    grids = torch.tensor([[0, 0.2, 0.5, 0.7, 1.0], [0, 0.1, 0.2, 0.3, 0.4]]).double()
    sigma, reveal = remasking_rates(process, grids, 0.3)
    visible = torch.zeros(2, dtype=torch.double)
    for i in range(3, -1, -1):
        visible = visible * (1 - sigma[:, i]) + (1 - visible) * reveal[:, i]
        rho = process.schedule.rho(grids[:, i], grids[:, -1])
        torch.testing.assert_close(visible, rho)
    assert sigma.max() <= 0.3
    assert (sigma[:, 0] == 0).all()
    assert (sigma[:, 1] > 0).all()


# ----------------------------------------------------------- all of them together


def _told(options: dict[str, Any]) -> str:
    """A test's name, the same in every process."""
    return ", ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in options.items())


OPTIONS = [
    dict(order="confidence", num_steps=2),
    dict(order="entropy", num_steps=2),
    dict(order=by_entropy, num_steps=2),
    dict(order="entropy_bounded", entropy_bound=0.3),
    dict(remask=0.4, num_steps=5),
]


@pytest.mark.parametrize("latent", ["fresh", "shared", "partial"])
@pytest.mark.parametrize("options", OPTIONS, ids=_told)
def test_every_order_completes_rows_under_every_latent(options, latent):
    process = MaskingProcess(3, 5)
    model, _ = small_pair("conditional_normal", process)
    x_start = torch.tensor([[3, 1, 3, 3, 0], [0, 1, 2, 0, 1], [3, 3, 3, 3, 3]])
    draw = dict(x_start=x_start, latent=latent, batch_size=7, **options)
    x = sample(model, process, 4, seed=1, **draw)
    assert x.shape == (12, 5)
    assert (x < 3).all()
    kept = x_start.repeat_interleave(4, 0)
    assert (x == kept)[kept < 3].all()
    assert (x == sample(model, process, 4, seed=1, **draw)).all()
    assert (x != sample(model, process, 4, seed=2, **draw)).any()


def test_the_order_by_entropy_is_the_named_one():
    model, _ = small_pair("standard_normal", PROCESS)
    named = sample(model, PROCESS, 100, 2, order="entropy", seed=1)
    assert (named == sample(model, PROCESS, 100, 2, order=by_entropy, seed=1)).all()


def test_pieces_and_shared_latents_in_a_counted_order():
    process = MaskingProcess(3, 4)
    seen = []

    def prior(batch):
        law = dist.Normal(torch.zeros(len(batch), 2), 1.0).to_event(1)
        seen.append(pyro.sample("z", law))
        return seen[-1]

    def decoder(x_t, z, t):
        return z[:, :1, None] * torch.arange(12.0).reshape(4, 3)

    model = models.VADD(decoder, prior)
    for latent, drawn in (("fresh", 4), ("shared", 1)):
        seen.clear()
        sample(model, process, 6, 4, order="confidence", latent=latent)
        assert len(torch.cat(seen).unique(dim=0)) == 6 * drawn


# ------------------------------------------------------------------- temperature


def test_tempering_scales_the_spread_and_sharpens_the_discrete():
    loc, scale = torch.randn(4, 2), torch.rand(4, 2) + 0.5
    for law in (dist.Normal(loc, scale), dist.Laplace(loc, scale), dist.StudentT(5.0, loc, scale)):
        for inner in (law, law.expand((3, 4, 2)), law.mask(torch.tensor(True))):
            half = tempered(inner.to_event(1), 0.5)
            assert half.batch_shape == inner.to_event(1).batch_shape
            assert half.event_shape == (2,)
            torch.testing.assert_close(half.variance, inner.variance / 4)
            torch.testing.assert_close(half.mean, inner.mean)
    normals = models.StandardNormal(3)(None)
    torch.testing.assert_close(tempered(normals, 0.5).variance, torch.full((3,), 0.25))
    logits = torch.randn(4, 3)
    for law in (dist.Categorical(logits=logits), dist.OneHotCategorical(logits=logits)):
        torch.testing.assert_close(tempered(law, 0.5).probs, (2 * logits).softmax(-1))
    mixture = dist.MixtureSameFamily(
        dist.Categorical(logits=logits[:, :2]), dist.Normal(loc, scale)
    )
    narrow = tempered(mixture, 1e-6)
    weights = mixture.mixture_distribution.probs
    torch.testing.assert_close(narrow.mean, mixture.mean)
    between = (weights * (loc - mixture.mean.unsqueeze(-1)).square()).sum(-1)
    torch.testing.assert_close(narrow.variance, between)
    point = dist.Delta(loc)
    assert tempered(point, 0.3) is point


def test_classes_bring_or_register_their_own_rule():
    class Shy(dist.Uniform):
        pass

    class Own(dist.Uniform):
        def tempered(self, temperature):
            return Own(self.low * temperature, self.high * temperature)

    with pytest.raises(TypeError, match="no rule to temper Shy"):
        tempered(Shy(-1.0, 1.0), 0.5)
    assert tempered(Own(-1.0, 1.0), 0.5).high == 0.5
    tempered.register(Shy)(lambda fn, temperature: Shy(fn.low, fn.high * temperature))
    assert tempered(Shy(-1.0, 1.0).expand((3,)).to_event(1), 0.5).base_dist.high[0] == 0.5


def coded(batch):
    """Four codes of unequal probability, each with tokens of its own."""
    with pyro.plate("data", len(batch), dim=-1):
        code = pyro.sample("z", dist.Categorical(logits=torch.tensor([1.0, 0.0, -1.0, 0.5])))
        logits = torch.sin(torch.arange(24.0) ** 2).reshape(4, 3, 2)
        pyro.sample("x_0", TokenCategorical(3 * logits[code], batch.target), obs=batch.x_0)


@pytest.mark.parametrize("prior", ["standard_normal", "codes"])
def test_a_latent_temperature_gives_the_law_of_the_tempered_model(prior):
    model = coded if prior == "codes" else small_pair(prior, PROCESS, spread=6.0)[0]
    law = exact_distribution(Tempering(0.5)(model), PROCESS, 2)
    x = sample(model, PROCESS, NUM, 2, latent_temperature=0.5, seed=1)
    assert worst(x, law) < 4.5
    assert worst(x, exact_distribution(model, PROCESS, 2)) > 8
    plain = sample(model, PROCESS, 100, 2, seed=1)
    assert (plain == sample(model, PROCESS, 100, 2, latent_temperature=1.0, seed=1)).all()


def test_a_site_without_a_rule_is_named():
    def program(batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("angle", dist.VonMises(torch.zeros(()), 1.0))
            logits = torch.zeros(len(batch), 3, 2)
            pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)

    with pytest.raises(TypeError, match=r"latent_temperature: site 'angle'.*temper VonMises"):
        sample(program, PROCESS, 5, 2, latent_temperature=0.5)
    observed = pyro.condition(program, data={"angle": torch.tensor(0.3)})
    assert sample(observed, PROCESS, 5, 2, latent_temperature=0.5).shape == (5, 3)


# --------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(order="best"), "order must be one of 'random', .* or a function, got 'best'"),
        (dict(order=None), "order must be one of"),
        (dict(order="entropy_bounded"), "need each other, got entropy_bound=None"),
        (dict(entropy_bound=1.0), "need each other, got entropy_bound=1.0 and order='random'"),
        (
            dict(order="entropy_bounded", entropy_bound=-1.0),
            "entropy_bound must be a number of nats >= 0, got -1.0",
        ),
        (
            dict(order="entropy_bounded", entropy_bound=math.nan),
            "entropy_bound must be a number of nats >= 0, got nan",
        ),
        (
            dict(order="entropy_bounded", entropy_bound=1.0, time_grid=torch.tensor([0.0, 1.0])),
            "time_grid must be left out with order='entropy_bounded'",
        ),
        (
            dict(
                order="entropy_bounded",
                entropy_bound=1.0,
                x_start=torch.tensor([0, 1, 2]),
                t_start=0.5,
            ),
            "t_start must be left out with order='entropy_bounded'",
        ),
        (dict(remask=1.5), r"remask must be a probability in \[0, 1\], got 1.5"),
        (dict(remask=math.nan), r"remask must be a probability in \[0, 1\], got nan"),
        (dict(remask=0.5, order="entropy"), "remask=0.5 needs order='random', got 'entropy'"),
        (dict(latent_temperature=0.0), "latent_temperature must be a positive number, got 0.0"),
        (dict(latent_temperature=math.inf), "latent_temperature must be a positive number"),
        (dict(refresh=0.5), "refresh needs latent='partial', got latent='fresh'"),
        (dict(latent="partial", refresh=2.0), r"refresh must be a probability in \[0, 1\]"),
        (
            dict(order=lambda logits, batch: logits),
            r"order must give scores of shape \(B, D\) = \(5, 3\), got \(5, 3, 2\)",
        ),
        (
            dict(order=lambda logits, batch: logits[..., 0] / 0),
            r"order must give finite scores at masked positions, got \S+ at \[0, 0\]",
        ),
    ],
)
def test_bad_arguments_are_named(options, message):
    model, _ = small_pair("none", PROCESS)
    steps = {} if "time_grid" in options else {"num_steps": 2}
    with pytest.raises(ValueError, match=message):
        sample(model, PROCESS, 5, **steps, **options)


def test_scores_that_are_no_tensor_are_refused():
    model, _ = small_pair("none", PROCESS)
    with pytest.raises(TypeError, match=r"order must give a tensor of scores \(B, D\), got list"):
        sample(model, PROCESS, 5, 2, order=lambda logits, batch: [1.0])
