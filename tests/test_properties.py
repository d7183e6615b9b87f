"""Properties of the whole: whatever the shapes, schedules, masks and target sets, what is computed
is finite and its identities hold.

Examples are found by hypothesis, the same in every run.
"""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import PRIORS, all_rows, small_pair
from hypothesis import assume, example, given, settings

from vadd_pyro import (
    AtomTimes,
    BalancedTimes,
    CosineSchedule,
    FewStepTimes,
    FunctionSchedule,
    GridTimes,
    LinearSchedule,
    MaskedBatch,
    MaskedDiffusionELBO,
    MaskingProcess,
    PartTargets,
    PolynomialSchedule,
    UniformTimes,
    exact_bound,
    exact_distribution,
    infill,
    log_likelihood_bound,
    one_token_bound,
    sample,
)
from vadd_pyro.checkpoints import (
    load_checkpoint,
    random_state,
    read_json,
    restore_random_state,
    save_checkpoint,
    write_json,
)
from vadd_pyro.process import make_time_grid
from vadd_pyro.trainer import Batches, scheduled_rate


def examples(number):
    """How many examples of a test are tried, always the same ones, however long they take."""
    return settings(max_examples=number, derandomize=True, deadline=None, database=None)


# ------------------------------------------------------------------------------------ strategies

SEEDS = st.integers(0, 2**31)
SCHEDULES = st.one_of(
    st.just(LinearSchedule()),
    st.just(CosineSchedule()),
    st.floats(0.3, 5.0).map(PolynomialSchedule),
    st.floats(1.0, 4.0).map(lambda p: FunctionSchedule(lambda t: (1 - t) ** p)),
)


def processes(most_tokens=6, most_positions=6):
    return st.builds(
        MaskingProcess, st.integers(2, most_tokens), st.integers(1, most_positions), SCHEDULES
    )


@st.composite
def grids(draw, most_steps=6):
    """A time grid, equal steps or any."""
    num_steps = draw(st.integers(1, most_steps))
    if draw(st.booleans()):
        return make_time_grid(num_steps)
    lengths = draw(st.lists(st.floats(0.01, 1.0), min_size=num_steps, max_size=num_steps))
    edges = torch.tensor([0.0, *lengths], dtype=torch.double).cumsum(0) / math.fsum(lengths)
    edges[-1] = 1.0
    return edges


TIMES = st.one_of(
    st.builds(UniformTimes, st.booleans()),
    st.just(BalancedTimes()),
    st.builds(AtomTimes, st.floats(0, 1), st.sampled_from([UniformTimes(), BalancedTimes()])),
    grids().map(lambda grid: GridTimes(time_grid=grid)),
    st.lists(st.integers(1, 9), min_size=1, max_size=3).map(GridTimes),
    st.sampled_from([1, 4, 64]).map(FewStepTimes),
    st.builds(PartTargets, st.just(FewStepTimes(8)), st.floats(0, 1)),
)


def rows_of(process, num_rows, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, process.length)
    return torch.randint(process.vocab_size, shape, generator=generator)


@st.composite
def batches(draw, process):
    """Rows with any masks, any part of them targets, at any times."""
    num_rows = draw(st.integers(1, 5))
    x_0 = rows_of(process, num_rows, draw(SEEDS))
    cells = num_rows * process.length
    states = draw(st.lists(st.integers(0, 2), min_size=cells, max_size=cells))
    state = torch.tensor(states).reshape(x_0.shape)  # visible, masked, masked and a target
    sizes = {"min_size": num_rows, "max_size": num_rows}
    times = draw(st.lists(st.sampled_from([0.0, 1e-6, 0.3, 1.0]), **sizes))
    weights = draw(st.lists(st.floats(0, 50, width=32), **sizes))
    return MaskedBatch(
        x_0.masked_fill(state > 0, process.mask_id),
        torch.tensor(times),
        state > 0,
        state == 2,
        x_0,
        torch.tensor(weights) if draw(st.booleans()) else None,
    )


def a_pair(prior, process, seed, spread=2.0):
    torch.manual_seed(seed)
    return small_pair(prior, process, width=8, spread=spread)


def parameters(*programs):
    return {
        f"{i}.{name}": parameter
        for i, program in enumerate(programs)
        for name, parameter in program.named_parameters()
    }


# ------------------------------------------------------------------------------ schedules, masks


@examples(60)
@given(SCHEDULES, st.floats(0, 1), st.floats(0, 1))
@example(CosineSchedule(), 1.0, 1.0)
def test_survival_and_reveal_probabilities_agree(schedule, a, b):
    s, t = torch.tensor([min(a, b), max(a, b)], dtype=torch.double)
    alpha_s, alpha_t, rho = schedule.alpha(s), schedule.alpha(t), schedule.rho(s, t)
    assert 0 <= rho <= 1
    # Hidden at t and still hidden at s: 1 - alpha(s) = (1 - alpha(t)) (1 - rho).
    assert float((1 - alpha_t) * (1 - rho) - (1 - alpha_s)) == pytest.approx(0, abs=1e-12)
    for time in (s.clamp_min(1e-9), t.clamp_min(1e-9)):
        weight = schedule.weight(time.float())
        assert weight.isfinite()
        assert weight >= 0
        again = schedule.alpha(schedule.inverse(schedule.alpha(time)))
        assert float(again) == pytest.approx(float(schedule.alpha(time)), abs=1e-9)


@examples(60)
@given(processes(), st.integers(1, 5), SEEDS, st.floats(0, 1), st.floats(0, 1), st.booleans())
@example(MaskingProcess(3, 4), 2, 0, 0.0, 0.0, False)
@example(MaskingProcess(3, 4), 2, 0, 1.0, 0.0, True)
def test_a_corrupted_row_shows_what_was_there_and_hides_the_rest(
    process, num_rows, seed, a, b, at_least_one
):
    s, t = min(a, b), max(a, b)
    assume(t > 1e-3 or not at_least_one)
    torch.manual_seed(seed)
    x_0 = rows_of(process, num_rows, seed)
    for earlier in (None, s):
        batch = process.corrupt(x_0, t, earlier, at_least_one=at_least_one)
        assert torch.equal(batch.x_t == process.mask_id, batch.masked)
        assert torch.equal(batch.x_t[~batch.masked], x_0[~batch.masked])
        assert torch.equal(batch.x_0, x_0)
        assert not (batch.target & ~batch.masked).any()
        assert batch.masked.any(-1).all() or not at_least_one
        if earlier is None or earlier == 0:
            assert torch.equal(batch.target, batch.masked)
        if earlier == t:
            assert not batch.target.any() or at_least_one
        if t == 1:
            assert batch.masked.all()
        if t == 0:
            assert not batch.masked.any()


@examples(60)
@given(processes(), grids(), st.integers(1, 5), SEEDS)
def test_a_reveal_path_shows_every_token_once(process, grid, num_rows, seed):
    torch.manual_seed(seed)
    x_0 = rows_of(process, num_rows, seed)
    steps = process.reveal_steps(tuple(x_0.shape), grid, x_0.device)
    num_steps = len(grid) - 1
    assert steps.min() >= 1
    assert steps.max() <= num_steps
    x = torch.full_like(x_0, process.mask_id)
    for step in range(num_steps, 0, -1):
        batch = process.step_batch(x_0, steps, step, grid)
        assert torch.equal(batch.x_t, x)
        assert torch.equal(batch.masked, x == process.mask_id)
        assert (batch.t == float(grid[step])).all() or step < num_steps
        x = torch.where(batch.target, x_0, x)
    assert torch.equal(x, x_0)


@examples(60)
@given(processes(), TIMES, st.integers(1, 40), SEEDS)
def test_times_lie_where_they_may_and_weights_are_finite(process, times, num_rows, seed):
    torch.manual_seed(seed)
    found = times.draw(process, num_rows, torch.device("cpu"))
    assert found.t.shape == found.weight.shape == (num_rows,)
    assert (found.t >= 0).all()
    assert (found.t <= 1).all()
    assert found.weight.isfinite().all()
    assert (found.weight >= 0).all()
    if found.s is not None:
        assert (found.s < found.t).all()
        assert (found.s >= 0).all()


# ---------------------------------------------------------------------------------------- losses

OPTIONS = st.one_of(
    st.just({}),
    st.builds(dict, num_particles=st.integers(1, 3), importance_weighted=st.booleans()),
    st.builds(dict, num_particles=st.integers(2, 3), renyi_alpha=st.sampled_from([0.0, 0.5, 2.0])),
    st.builds(dict, num_particles=st.integers(1, 2), free_bits=st.floats(0, 2)),
    st.builds(dict, num_particles=st.just(3), vectorize_particles=st.just(False)),
    st.builds(dict, kl_weight=st.sampled_from([0.0, 1e-3, 0.7]), closed_form_kl=st.booleans()),
)


@examples(80)
@given(
    processes(),
    st.sampled_from(PRIORS),
    TIMES,
    OPTIONS,
    st.booleans(),
    st.integers(1, 6),
    st.sampled_from([0.1, 2.0, 20.0]),
    SEEDS,
)
def test_losses_and_gradients_are_finite(
    process, prior, times, options, chain, num_rows, spread, seed
):
    model, guide = a_pair(prior, process, seed, spread)
    chain = chain and isinstance(times, GridTimes)
    objective = "chain" if chain else "delbo"
    elbo = MaskedDiffusionELBO(process, objective, times=times, **options)
    terms = elbo.terms(model, guide, rows_of(process, num_rows, seed))
    assert all(term.isfinite() for term in terms)
    parts = terms.reconstruction + elbo.current_kl_weight() * terms.kl
    assert float(parts) == pytest.approx(terms.loss.item(), rel=1e-4, abs=1e-3)
    terms.loss.backward()
    for name, parameter in parameters(model, guide).items():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@examples(80)
@given(st.data(), processes(), st.sampled_from(PRIORS), OPTIONS, SEEDS)
def test_any_masks_and_targets_are_scored_and_rows_without_target_count_nothing(
    data, process, prior, options, seed
):
    batch = data.draw(batches(process))
    model, guide = a_pair(prior, process, seed)
    elbo = MaskedDiffusionELBO(process, **options)
    rows = elbo.score(model, guide, batch)
    idle = ~batch.target.any(-1)
    assert rows.rows.shape == rows.kl.shape == (len(batch),)
    assert rows.rows.isfinite().all()
    assert rows.kl.isfinite().all()
    assert (rows.rows[idle] == 0).all()
    assert (rows.kl[idle] == 0).all()
    loss = elbo.terms(model, guide, batch).loss
    loss.backward()
    found = parameters(model, guide)
    for name, parameter in found.items():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
        # A batch without any target teaches nothing.
        assert batch.target.any() or parameter.grad is None or (parameter.grad == 0).all(), name


@examples(40)
@given(st.data(), processes(), st.sampled_from(["none", "categorical"]), SEEDS)
def test_a_loss_without_draws_is_a_sum_over_rows_and_tells_no_data_by_the_mask(
    data, process, prior, seed
):
    batch = data.draw(batches(process))
    model, guide = a_pair(prior, process, seed)
    elbo = MaskedDiffusionELBO(process)
    rows = elbo.score(model, guide, batch).rows
    alone = torch.cat([elbo.score(model, guide, piece).rows for piece in batch.split(1)])
    assert torch.allclose(rows, alone, atol=1e-4)
    assert (rows <= 1e-5).all()  # tokens have probabilities
    # What is masked and no target is not looked at.
    hidden = batch.masked & ~batch.target
    other = (batch.x_0 + 1) % process.vocab_size
    changed = MaskedBatch(
        *(batch.x_t, batch.t, batch.masked, batch.target),
        torch.where(hidden, other, batch.x_0),
        batch.weight,
    )
    assert torch.allclose(elbo.score(model, guide, changed).rows, rows, atol=1e-6)


# ----------------------------------------------------------------------------- laws and bounds


@examples(30)
@given(
    processes(3, 3),
    st.sampled_from(PRIORS),
    grids(4),
    st.sampled_from(["fresh", "shared"]),
    SEEDS,
)
def test_exact_laws_sum_to_one(process, prior, grid, latent, seed):
    model, _ = a_pair(prior, process, seed)
    law = exact_distribution(model, process, latent=latent, time_grid=grid, num_draws=256)
    assert law.shape == (process.vocab_size,) * process.length
    assert (law >= 0).all()
    assert float(law.sum()) == pytest.approx(1, abs=1e-9)


@examples(30)
@given(processes(3, 3), st.sampled_from(PRIORS), st.integers(1, 4), SEEDS, st.data())
def test_an_exact_law_from_a_partly_given_row_stays_with_what_is_given(
    process, prior, num_steps, seed, data
):
    model, _ = a_pair(prior, process, seed)
    start = torch.tensor(
        [data.draw(st.integers(0, process.mask_id)) for _ in range(process.length)]
    )
    law = exact_distribution(model, process, num_steps, x_start=start, num_draws=256)
    assert float(law.sum()) == pytest.approx(1, abs=1e-9)
    rows = all_rows(process.vocab_size, process.length)
    agrees = ((rows == start) | (start == process.mask_id)).all(-1)
    assert (law.flatten()[~agrees] == 0).all()
    assert (law.flatten()[agrees] > 0).all()


@examples(20)
@given(processes(3, 3), st.sampled_from(["none", "categorical"]), grids(4), SEEDS)
def test_bounds_lie_below_the_exact_law(process, prior, grid, seed):
    model, guide = a_pair(prior, process, seed)
    truth = exact_distribution(model, process, time_grid=grid).log()
    tightest = exact_bound(model, process, time_grid=grid)
    assert (tightest <= truth + 1e-6).all()
    rows = all_rows(process.vocab_size, process.length)
    found = log_likelihood_bound(
        model, guide, process, rows, time_grid=grid, num_draws=24, seed=seed
    )
    assert found.value.isfinite().all()
    assert found.stderr.isfinite().all()
    # Nothing but the reveal paths is random here, so that the mean of the bound is known.
    error = float(found.stderr.square().sum().sqrt()) / len(rows)
    apart = float(found.value.mean() - tightest.mean())
    assert abs(apart) < 5 * error + 1e-4
    if len(grid) == 2:  # one step: no path, no gap
        assert torch.allclose(found.value, truth.flatten().to(found.value), atol=1e-4)


@examples(12)
@given(
    processes(3, 2),
    st.sampled_from(["standard_normal", "conditional_normal", "mixture_of_normals"]),
    st.integers(1, 3),
    st.integers(1, 3),
    SEEDS,
)
def test_bounds_of_continuous_latents_lie_below_the_exact_law(
    process, prior, num_steps, num_paths, seed
):
    model, guide = a_pair(prior, process, seed)
    truth = exact_distribution(model, process, num_steps, num_draws=2**11).log().flatten()
    rows = all_rows(process.vocab_size, process.length)
    found = log_likelihood_bound(
        *(model, guide, process, rows, num_steps),
        num_particles=8,
        num_draws=24,
        num_paths=num_paths,
        seed=seed,
    )
    assert found.value.isfinite().all()
    error = float(found.stderr.square().sum().sqrt()) / len(rows)
    assert float(found.value.mean()) < float(truth.mean()) + 5 * error + 0.01


@examples(20)
@given(processes(4, 4), st.sampled_from(PRIORS), SEEDS)
def test_the_bound_of_one_token_a_step_is_finite_and_no_log_probability_above_zero(
    process, prior, seed
):
    model, guide = a_pair(prior, process, seed)
    rows = rows_of(process, 3, seed)
    found = one_token_bound(model, guide, process, rows, num_particles=2, num_draws=3, seed=seed)
    assert found.value.isfinite().all()
    assert found.stderr.isfinite().all()
    if prior in ("none", "categorical"):
        assert (found.value <= 1e-5).all()


# -------------------------------------------------------------------------------------- samples

WAYS = st.one_of(
    st.builds(dict, latent=st.sampled_from(["fresh", "shared", "partial"])),
    st.builds(dict, order=st.sampled_from(["confidence", "entropy"])),
    st.builds(dict, order=st.just("entropy_bounded"), entropy_bound=st.floats(0, 3)),
    st.builds(dict, remask=st.floats(0, 1)),
    st.builds(dict, latent_temperature=st.floats(0.1, 2)),
)


@examples(80)
@given(
    st.data(),
    processes(),
    st.sampled_from(PRIORS),
    st.integers(1, 7),
    WAYS,
    st.integers(1, 3),
    st.booleans(),
    SEEDS,
)
def test_samples_are_tokens_and_what_was_visible_stays(
    data, process, prior, num_steps, options, num_samples, started, seed
):
    model, _ = a_pair(prior, process, seed)
    if prior == "none":
        options = {k: v for k, v in options.items() if k != "latent_temperature"}
    start = None
    if started:
        start = torch.tensor(
            [
                [data.draw(st.integers(0, process.mask_id)) for _ in range(process.length)]
                for _ in range(2)
            ]
        )
        options = {**options, "x_start": start}
    found = sample(model, process, num_samples, num_steps, seed=seed, **options)
    assert found.shape == (num_samples * (2 if started else 1), process.length)
    assert found.min() >= 0
    assert found.max() < process.vocab_size  # no mask is left
    if start is not None:
        rows = start.repeat_interleave(num_samples, 0)
        visible = rows != process.mask_id
        assert torch.equal(found[visible], rows[visible])
    again = sample(model, process, num_samples, num_steps, seed=seed, **options)
    assert torch.equal(found, again)


@examples(20)
@given(st.data(), processes(4, 4), st.sampled_from(PRIORS), st.integers(1, 4), SEEDS)
def test_infilled_rows_keep_what_is_given(data, process, prior, num_steps, seed):
    model, _ = a_pair(prior, process, seed)
    start = torch.tensor(
        [data.draw(st.integers(0, process.mask_id)) for _ in range(process.length)]
    )
    found = infill(model, process, start, num_steps, num_samples=3, num_particles=8, seed=seed)
    x = found[0].reshape(-1, process.length)
    assert x.min() >= 0
    assert x.max() < process.vocab_size
    visible = start != process.mask_id
    assert (x[:, visible] == start[visible]).all()


# ----------------------------------------------------------------------------------------- files

NUMBERS = st.one_of(
    st.integers(-(2**62), 2**62), st.floats(allow_nan=False), st.booleans(), st.none(), st.text()
)
PLAIN = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    return (torch.randn(shape, generator=generator) * 100).to(draw(st.sampled_from(DTYPES)))


@examples(60)
@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "vadd_pyro"), PLAIN, max_size=4
    ),
    st.lists(tensors(), max_size=3),
)
def test_a_checkpoint_is_read_as_it_was_written(content, held):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "deeper" / "a.pt"
        save_checkpoint(path, {**content, "tensors": held})
        found = load_checkpoint(path)
        assert [p.name for p in path.parent.iterdir()] == ["a.pt"]
    assert {k: v for k, v in found.items() if k not in ("vadd_pyro", "tensors")} == {
        k: v for k, v in content.items() if k != "tensors"
    }
    for mine, theirs in zip(held, found["tensors"], strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@examples(60)
@given(st.dictionaries(st.text(max_size=8), PLAIN, max_size=4))
def test_plain_values_are_read_as_they_were_written(content):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        written = write_json(path, content)
        assert read_json(path) == written

    def same(mine, theirs):
        if isinstance(mine, dict):
            return set(mine) == set(theirs) and all(same(v, theirs[k]) for k, v in mine.items())
        if isinstance(mine, list):
            both = zip(mine, theirs, strict=True)
            return all(same(*pair) for pair in both)
        if isinstance(mine, float):
            return mine == float(theirs)  # inf by name
        return mine == theirs

    assert same(content, written)


@examples(10)
@given(SEEDS)
def test_random_states_come_back(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)

    def draw():
        return torch.randn(3).tolist(), np.random.randn(3).tolist(), random.random()

    draw()
    kept = random_state()
    first = draw()
    with TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "a.pt", {"random": kept})
        kept = load_checkpoint(Path(folder) / "a.pt")["random"]
    restore_random_state(kept)
    assert draw() == first


# -------------------------------------------------------------------------------------- training


@examples(60)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_every_epoch_has_every_row_once(num_rows, batch_size, seed):
    found = Batches(torch.arange(num_rows).unsqueeze(-1), batch_size, seed, torch.device("cpu"))
    count = -(-3 * num_rows // batch_size)
    rows = torch.cat([found(i).flatten() for i in range(count)])
    for epoch in range(3):
        piece = rows[epoch * num_rows : (epoch + 1) * num_rows]
        assert sorted(piece.tolist()) == list(range(num_rows))


@examples(60)
@given(
    st.integers(1, 50),
    st.floats(1e-6, 1),
    st.floats(0, 1),
    st.sampled_from(["constant", "cosine", "linear"]),
    st.floats(0, 1),
)
def test_step_sizes_rise_then_fall_between_their_ends(num, base, share, decay, final):
    warmup = round(share * num)
    rates = [scheduled_rate(i, base, warmup, num, decay, final) for i in range(num)]
    assert all(0 <= rate <= base * (1 + 1e-12) for rate in rates)
    rising, falling = rates[: warmup + 1], rates[warmup:]
    assert all(a <= b + 1e-12 for a, b in pairwise(rising))
    assert all(a >= b - 1e-12 for a, b in pairwise(falling))
    assert all(rate >= base * final * (1 - 1e-9) for rate in falling)
