"""Bounds for real data: several paths inside the logarithm, and one token at a time."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import all_rows, small_pair
from scipy.stats import chisquare

from vadd_pyro import (
    CosineSchedule,
    DiagonalNormal,
    FunctionSchedule,
    MaskedDiffusionELBO,
    MaskingProcess,
    TokenCategorical,
    exact_bound,
    exact_distribution,
    guides,
    log_likelihood_bound,
    metrics,
    models,
    sample,
)
from vadd_pyro.integration import Joints
from vadd_pyro.nn import MLPDecoder, MLPEncoder, MLPFeatures
from vadd_pyro.one_token import one_token_bound, one_token_grid, random_scores
from vadd_pyro.programs import evaluation

PROCESS = MaskingProcess(3, 3)
ROWS = all_rows(3, 3)


def mean_gap(log_p, bound):
    """Mean over rows of ``log p - bound``, and its error from the draws alone."""
    error = bound.stderr.square().sum().sqrt() / len(log_p)
    return float((log_p - bound.value).mean()), float(error)


# -------------------------------------------------------------- several paths


@pytest.mark.parametrize("prior", ["none", "categorical", "standard_normal"])
def test_paths_inside_the_logarithm_close_the_gap(prior):
    model, guide = small_pair(prior, PROCESS, spread=4.0)
    if prior == "none":
        torch.nn.init.normal_(model.decoder.head.weight, std=2.0)
    log_p = exact_distribution(model, PROCESS, 3).log().flatten()
    limit = exact_bound(model, PROCESS, 3).flatten()
    gaps = []
    for paths, draws in ((1, 150), (4, 150), (128, 16)):
        bound = log_likelihood_bound(
            model,
            guide,
            PROCESS,
            ROWS,
            3,
            num_particles=8,
            num_paths=paths,
            num_draws=draws,
            seed=1,
        )
        assert (bound.value - log_p < 5 * bound.stderr + 1e-5).all()
        gaps.append(mean_gap(log_p, bound))
    (one, one_error), (several, several_error), (many, many_error) = gaps
    assert one > several + 4 * (one_error + several_error)
    assert several > many + 2 * (several_error + many_error)
    assert many < 4 * many_error + 0.02 * one  # falls as one over the number of paths
    # the path-wise bound could not have come so near
    assert float((log_p - limit).mean()) > many + 4 * many_error


def test_one_path_is_the_path_wise_bound_and_draws_as_it_did():
    model, guide = small_pair("none", PROCESS)
    grid = torch.arange(4, dtype=torch.double) / 3
    elbo = MaskedDiffusionELBO(PROCESS, "chain", time_grid=grid)
    torch.manual_seed(7)
    draws = []
    with evaluation(model, guide):
        for _ in range(3):
            steps = PROCESS.reveal_steps((27, 3), grid, ROWS.device)
            batches = [PROCESS.step_batch(ROWS, steps, i, grid) for i in (1, 2, 3)]
            draws.append(sum(elbo.score(model, guide, b).rows.double() for b in batches))
    expected = torch.stack(draws)
    bound = log_likelihood_bound(model, guide, PROCESS, ROWS, 3, num_draws=3, seed=7)
    torch.testing.assert_close(bound.value, expected.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bound.stderr, expected.std(0) / 3**0.5, rtol=1e-5, atol=1e-6)


def tied_pair():
    """Two tokens that a normal latent ties, and nearly its posterior as a guide."""
    process = MaskingProcess(2, 2)
    slope = torch.tensor([0.0, 6.0])

    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", DiagonalNormal(torch.zeros(1), torch.ones(1)))
            logits = (z * slope).unsqueeze(-2).expand(*z.shape[:-1], 2, 2)
            pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)

    # Mean and scale of the posterior given each kind of row: 0, 1 or no target, at two positions.
    z = torch.linspace(-6, 6, 2001)
    log_mu = torch.cat([(z[:, None] * slope).log_softmax(-1), torch.zeros(2001, 1)], -1)
    score = log_mu[:, :, None] + log_mu[:, None, :] - z[:, None, None] ** 2 / 2
    weight = score.flatten(1).softmax(0)
    loc = (weight * z[:, None]).sum(0)
    scale = (weight * (z[:, None] - loc) ** 2).sum(0).sqrt()

    def guide(batch):
        first, second = batch.x_0.masked_fill(~batch.target, 2).unbind(-1)
        kind = (3 * first + second).unsqueeze(-1)
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", DiagonalNormal(loc[kind], scale[kind]))

    return process, model, guide


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_closed_form_kl_has_no_place_among_paths(num_steps):
    # Its exponential, averaged, would exceed the probability where the guide is good.
    process, model, guide = tied_pair()
    x = all_rows(2, 2)
    log_p = exact_distribution(model, process, num_steps).log().flatten()
    bound = log_likelihood_bound(
        model, guide, process, x, num_steps, num_particles=1, num_paths=100, num_draws=40, seed=1
    )
    # A bias of half the relative variance of one path over their number stays on one side.
    assert (bound.value - log_p < 4 * bound.stderr).all()
    assert (bound.value - log_p > -4 * bound.stderr - 0.01).all()
    assert (bound.stderr < 0.02).all()
    closed = MaskedDiffusionELBO(process, "chain", num_steps=1)
    batch = process.corrupt(x.repeat(4000, 1), 1.0)
    rows = closed.score(model, guide, batch).rows.double().reshape(4000, 4)
    too_much = rows.exp().mean(0).log()
    exact = exact_distribution(model, process, 1).log().flatten()
    assert (too_much - exact > 0.05).any()  # the trap is there


@pytest.mark.parametrize("estimator", ["enumerate", "score"])
def test_paths_under_a_guide_of_codes(estimator):
    decoder = MLPDecoder(PROCESS, 2, hidden_dim=16, num_layers=2, embedding_dim=4)
    with torch.no_grad():
        decoder.head.weight.mul_(4)
        decoder.latent.weight.mul_(4)
    model = models.VADD(decoder, models.Categorical(4, 2))
    guide = guides.AmortizedCategorical(
        MLPFeatures(PROCESS, hidden_dim=16, num_layers=1, embedding_dim=4), 4, estimator
    )
    torch.nn.init.normal_(guide.head.linear.weight, std=0.5)  # far from the posterior
    log_p = exact_distribution(model, PROCESS, 2).log().flatten()
    bound = log_likelihood_bound(
        model, guide, PROCESS, ROWS, 2, num_particles=1, num_paths=200, num_draws=16, seed=2
    )
    assert (bound.value - log_p < 5 * bound.stderr).all()
    gap, error = mean_gap(log_p, bound)
    assert gap < 5 * error + 0.01


def test_sizes_of_work_are_checked_and_seeds_hold():
    pair = small_pair("standard_normal", PROCESS)
    options = dict(num_paths=5, num_draws=2, num_particles=2, seed=1)
    first = log_likelihood_bound(*pair, PROCESS, ROWS, 2, **options)
    second = log_likelihood_bound(*pair, PROCESS, ROWS, 2, **options)
    assert (first.value == second.value).all()
    with pytest.raises(ValueError, match="num_paths must be an integer of at least 1, got 0"):
        log_likelihood_bound(*pair, PROCESS, ROWS, 2, num_paths=0)
    # Paths together or one by one: the same bound, for a model that draws nothing but paths.
    pair = small_pair("none", PROCESS)
    together = log_likelihood_bound(*pair, PROCESS, ROWS, 2, **options)
    alone = log_likelihood_bound(*pair, PROCESS, ROWS, 2, **options, batch_size=50)
    torch.testing.assert_close(together.value, alone.value)


# ------------------------------------------------------ one token at a time


def timed_pair(prior, process):
    """A pair whose decoder looks at the time."""
    model, guide = small_pair(prior, process, spread=3.0)
    latent_dim = 0 if prior == "none" else 2
    sizes = dict(hidden_dim=16, num_layers=2, embedding_dim=4)
    decoder = MLPDecoder(process, latent_dim, time_conditioning=True, **sizes)
    with torch.no_grad():
        decoder.time.weight.mul_(4)
        decoder.head.weight.mul_(4)
        if latent_dim:
            decoder.latent.weight.mul_(3)
    model.decoder = decoder
    return model, guide


def exact_one_token(model, process):
    """The law of one token at a time, and its path-wise bound, for every row, by dynamic
    programming over the visible sets.
    """
    vocab, length = process.vocab_size, process.length
    everything = list(range(length))
    grid = one_token_grid(process)
    start = torch.full((length,), process.mask_id)
    joints = Joints(model, process, start, 2**14, 0, ())
    rows = all_rows(vocab, length)
    law = {(): torch.ones(len(rows), dtype=torch.double)}
    path_wise = torch.zeros(len(rows), dtype=torch.double)
    states = {(): 1.0}
    with evaluation(model):
        for size in range(length):
            masked_number = length - size
            for visible in itertools.combinations(everything, size):
                masked = [j for j in everything if j not in visible]
                joint = joints(list(visible), masked, float(grid[masked_number]))
                place = torch.zeros(len(rows), dtype=torch.long)
                for j in visible:
                    place = place * vocab + rows[:, j]
                joint = joint[place].reshape(len(rows), *(vocab,) * masked_number)
                for index, j in enumerate(masked):
                    others = [1 + i for i in range(masked_number) if i != index]
                    p_j = joint.sum(others) if others else joint
                    p = p_j.gather(1, rows[:, j : j + 1]).squeeze(1)
                    following = tuple(sorted((*visible, j)))
                    share = 1 / masked_number
                    law[following] = law.get(following, 0.0) + law[visible] * p * share
                    path_wise += states[visible] * share * p.log()
                    states[following] = states.get(following, 0.0) + states[visible] * share
    return law[tuple(everything)], path_wise


@pytest.mark.parametrize("schedule", [None, CosineSchedule()], ids=["linear", "cosine"])
@pytest.mark.parametrize("prior", ["none", "categorical", "standard_normal"])
def test_the_bound_is_one_on_the_law_of_one_token_at_a_time(prior, schedule):
    process = MaskingProcess(3, 3, schedule)
    model, guide = timed_pair(prior, process)
    law, path_wise = exact_one_token(model, process)
    assert float(law.sum()) == pytest.approx(1, abs=1e-6)
    log_p = law.log()
    assert (path_wise < log_p + 1e-9).all()
    one = one_token_bound(model, guide, process, ROWS, num_particles=256, num_draws=40, seed=1)
    assert ((one.value - path_wise).abs() < 5 * one.stderr + 0.01).all()
    many = one_token_bound(
        model, guide, process, ROWS, num_particles=8, num_draws=16, num_paths=64, seed=1
    )
    assert (many.value - log_p < 5 * many.stderr + 1e-5).all()
    gap, error = mean_gap(log_p, many)
    loose, _ = mean_gap(log_p, one)
    assert gap < 5 * error + 0.05 * loose
    assert loose > gap + 5 * error


@pytest.mark.parametrize("schedule", [None, CosineSchedule()], ids=["linear", "cosine"])
def test_that_law_is_a_samplers(schedule):
    process = MaskingProcess(3, 3, schedule)
    model, _ = timed_pair("standard_normal", process)
    law, _ = exact_one_token(model, process)
    x = sample(
        model, process, 60_000, order=random_scores, time_grid=one_token_grid(process), seed=1
    )
    counts = metrics.histogram(x, 3).flatten() * len(x)
    assert chisquare(counts, law / law.sum() * counts.sum()).pvalue > 1e-4
    # A sampler that is told other times has another law.
    late = one_token_grid(process).sqrt()
    other = sample(model, process, 60_000, order=random_scores, time_grid=late, seed=1)
    counts = metrics.histogram(other, 3).flatten() * len(x)
    if schedule is None:  # in the order of the grid nothing changes but the time
        assert chisquare(counts, law / law.sum() * counts.sum()).pvalue < 1e-6


def test_it_is_the_limit_of_many_steps_where_the_time_does_not_count():
    model, _ = small_pair("categorical", PROCESS, spread=6.0)
    law, _ = exact_one_token(model, PROCESS)
    # The error of p_T falls as 1 / T, so that two of them give the limit.
    limit = 2 * exact_distribution(model, PROCESS, 48) - exact_distribution(model, PROCESS, 24)
    near = (limit.flatten() - law).abs().sum()
    assert near < 1e-3
    assert (exact_distribution(model, PROCESS, 1).flatten() - law).abs().sum() > 20 * near


@pytest.mark.parametrize("prior", ["none", "standard_normal"])
def test_some_of_the_steps_estimate_all(prior):
    process = MaskingProcess(2, 5)
    model, guide = small_pair(prior, process, spread=3.0)
    if prior == "none":
        torch.nn.init.normal_(model.decoder.head.weight, std=1.0)
    x = all_rows(2, 5)
    options = dict(num_particles=4, seed=1)
    whole = one_token_bound(model, guide, process, x, num_draws=100, **options)
    for num_terms in (1, 3, 5):
        part = one_token_bound(
            model, guide, process, x, num_terms=num_terms, num_draws=200, **options
        )
        difference = float((part.value - whole.value).mean())
        error = float((part.stderr.square() + whole.stderr.square()).sum().sqrt()) / len(x)
        assert abs(difference) < 4 * error
        assert error < 0.03 * float(-whole.value.mean())  # a comparison that could fail


def test_steps_are_drawn_with_equal_chances_and_no_more_than_asked_for():
    process = MaskingProcess(2, 5)
    masked = []

    def decoder(x_t, z, t):
        masked.append((x_t == 2).sum(-1))
        return torch.zeros(*x_t.shape, 2)

    model = models.MDM(decoder)
    x = all_rows(2, 5)
    one_token_bound(model, guides.NoLatent(), process, x, num_terms=3, num_draws=400, seed=1)
    counts = torch.cat(masked[5:]).bincount()  # the first calls are looks at the pair
    assert counts[0] == 0
    assert counts.sum() == 3 * 32 * 400
    expected = 3 * 32 * 400 / 5
    # Strata make them more even than independent draws are.
    assert (counts[1:] - expected).abs().max() < 4 * expected**0.5


def test_without_latent_all_masked_positions_of_a_state_count():
    # Where tokens are independent of what is visible, no path matters, and nothing is left to
    # chance: the bound is the sum of the positions' log-probabilities.
    logits = torch.randn(4, 3)
    process = MaskingProcess(3, 4)
    model = models.MDM(lambda x_t, z, t: logits.expand(*x_t.shape, 3))
    x = torch.randint(3, (6, 4))
    exact = logits.log_softmax(-1).gather(-1, x.T).sum(0).double()
    bound = one_token_bound(model, guides.NoLatent(), process, x, num_paths=3, seed=1)
    torch.testing.assert_close(bound.value, exact, rtol=1e-5, atol=1e-5)
    # With one path, positions of the same law make even a single step enough.
    model = models.MDM(lambda x_t, z, t: logits[0].expand(*x_t.shape, 3))
    exact = logits[0].log_softmax(-1)[x].sum(-1).double()
    first = x[:, :1].expand(-1, 4)
    bound = one_token_bound(model, guides.NoLatent(), process, first, num_terms=1, seed=1)
    torch.testing.assert_close(
        bound.value, 4 * logits[0].log_softmax(-1)[x[:, 0]].double(), rtol=1e-5, atol=1e-5
    )
    assert (bound.stderr < 1e-6).all()


def test_the_guide_is_asked_for_one_position_and_told_the_time():
    process = MaskingProcess(3, 4, CosineSchedule())
    model, _ = small_pair("standard_normal", process)
    encoder = MLPEncoder(process, 2, hidden_dim=8, num_layers=1, embedding_dim=4)
    seen = []

    def guide(batch):
        seen.append(batch)
        z_loc, z_scale = encoder(batch)
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Normal(z_loc, z_scale).to_event(1))

    one_token_bound(model, guide, process, torch.randint(3, (5, 4)), num_draws=2, seed=1)
    for batch in seen[2:]:  # the first are looks at the pair
        assert (batch.target.sum(-1) == 1).all()
        assert (batch.target <= batch.masked).all()
        left = batch.masked.sum(-1) / 4
        torch.testing.assert_close(process.schedule.alpha(batch.t), 1 - left)


def test_the_grid_of_one_token_a_step():
    torch.testing.assert_close(
        one_token_grid(MaskingProcess(2, 784)), torch.arange(785, dtype=torch.double) / 784
    )
    process = MaskingProcess(2, 10, CosineSchedule())
    grid = one_token_grid(process)
    assert grid[0] == 0
    assert grid[-1] == 1
    visible = process.schedule.alpha(grid)
    torch.testing.assert_close(visible, 1 - torch.arange(11, dtype=torch.double) / 10)
    steep = FunctionSchedule(lambda t: (t < 0.5).to(t.dtype) * (1 - t / 10) * (t < 1))
    with pytest.raises(ValueError, match=r"no two times at which .* of 10 tokens are masked"):
        one_token_grid(MaskingProcess(2, 10, steep))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_terms=2, num_paths=4), "num_terms=2 and num_paths=4: inside a logarithm"),
        (dict(num_terms=4), "num_terms is 4, but a row of 3 tokens has 3 steps"),
        (dict(num_terms=0), "num_terms must be an integer of at least 1, got 0"),
        (dict(num_paths=0), "num_paths must be an integer of at least 1, got 0"),
        (dict(num_draws=0), "num_draws must be an integer of at least 1, got 0"),
        (dict(num_particles=0), "num_particles must be an integer of at least 1, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    pair = small_pair("none", PROCESS)
    with pytest.raises(ValueError, match=message):
        one_token_bound(*pair, PROCESS, ROWS, **options)


@pytest.mark.parametrize("cheat", ["prior", "decoder", "noisy input", "once visible", "none"])
def test_a_model_that_looks_behind_the_mask_has_no_bound(cheat):
    model, guide = small_pair("standard_normal", PROCESS)

    def program(batch):
        clean = batch.x_0.float() / 3 if batch.x_0 is not None else torch.zeros(len(batch), 3)
        visible = batch.x_t.float().masked_fill(batch.masked, 0.0) / 3
        with pyro.plate("data", len(batch), dim=-1):
            told = clean if cheat == "prior" else visible
            loc = torch.stack([told.sum(-1), torch.zeros(len(batch))], -1)
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            logits = model.decoder(batch.x_t, z, batch.t)
            if cheat == "decoder":
                logits = logits + 1e-2 * clean.unsqueeze(-1) * torch.arange(3.0)
            if cheat == "noisy input":
                less = (1 - batch.t).reshape(-1, 1, 1)
                logits = logits + less * clean.unsqueeze(-1) * torch.arange(3.0)
            if cheat == "once visible":
                seen = ~batch.masked.all(-1).reshape(-1, 1, 1)
                logits = logits + seen * clean.roll(1, -1).unsqueeze(-1) * torch.arange(3.0)
            law = dist.Categorical(logits=logits).mask(batch.target).to_event(1)
            pyro.sample("x_0", law, obs=batch.x_0)

    for bound in (
        lambda: log_likelihood_bound(program, guide, PROCESS, ROWS, 2, num_draws=2, seed=0),
        lambda: one_token_bound(program, guide, PROCESS, ROWS, num_draws=2, seed=0),
    ):
        if cheat == "none":
            assert bound().value.isfinite().all()
            continue
        site = "'z'" if cheat == "prior" else "'x_0'"
        with pytest.raises(ValueError, match=f"site {site} depends on batch.x_0 at masked"):
            bound()
