"""Grids of few steps: the terms they add up, and the path that is best."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import small_pair

from vadd_pyro import CosineSchedule, MaskingProcess, guides, log_likelihood_bound, models
from vadd_pyro.grids import best_path, optimize_time_grid, step_terms

NUM_TIED, NUM_FREE = 6, 2
PROCESS = MaskingProcess(2, NUM_TIED + NUM_FREE)


def tied_decoder(x_t, z, t):
    """Exact conditionals of six equal fair bits and two free ones."""
    tied = x_t[:, :NUM_TIED]
    sign = ((tied == 1).any(-1).float() - (tied == 0).any(-1).float()).unsqueeze(-1)
    sign = torch.cat([sign.expand(-1, NUM_TIED), torch.zeros(len(x_t), NUM_FREE)], -1)
    return torch.stack([-30 * sign, 30 * sign], -1)


def tied_rows(num_rows):
    bits = torch.randint(2, (num_rows, 1 + NUM_FREE))
    return torch.cat([bits[:, :1].expand(-1, NUM_TIED), bits[:, 1:]], -1)


def exact_term(s, t):
    """Only where no tied bit is visible do those revealed cost anything."""
    return -math.log(2) * (t - s) * (NUM_TIED * t ** (NUM_TIED - 1) + NUM_FREE)


def test_terms_of_tied_bits_are_the_exact_ones():
    candidates = torch.linspace(0, 1, 9, dtype=torch.double)
    model, guide = models.MDM(tied_decoder), guides.NoLatent()
    x_0 = tied_rows(500)
    runs = torch.stack(
        [step_terms(model, guide, PROCESS, x_0, candidates, seed=seed) for seed in range(20)]
    )
    terms, error = runs.mean(0), runs.std(0) / 20**0.5
    for i, j in itertools.combinations(range(9), 2):
        expected = exact_term(float(candidates[i]), float(candidates[j]))
        assert abs(float(terms[i, j]) - expected) < 5 * float(error[i, j]) + 1e-6
    assert (terms[torch.ones(9, 9).tril().bool()] == -torch.inf).all()


def test_the_best_grid_of_tied_bits_starts_with_a_short_step_and_pays():
    model, guide = models.MDM(tied_decoder), guides.NoLatent()
    grid = optimize_time_grid(model, guide, PROCESS, tied_rows(1000), 2, num_draws=5, seed=1)
    assert grid.dtype == torch.double
    middle = torch.linspace(0.05, 0.95, 181).tolist()
    best = max(middle, key=lambda s: exact_term(0.0, s) + exact_term(s, 1.0))
    assert best > 0.6
    assert abs(float(grid[1]) - best) <= 1.5 / 32
    x_0 = tied_rows(1000)
    bound = [
        log_likelihood_bound(model, guide, PROCESS, x_0, time_grid=g, seed=2).mean()
        for g in (torch.tensor([0, 0.5, 1]), grid)
    ]
    (equal, equal_error), (chosen, chosen_error) = bound
    assert chosen > equal + 4 * math.hypot(equal_error, chosen_error)


@pytest.mark.parametrize("prior", ["none", "categorical", "standard_normal"])
@pytest.mark.parametrize("schedule", [None, CosineSchedule()])
def test_terms_along_a_grid_sum_to_the_bound(prior, schedule):
    process = MaskingProcess(3, 4, schedule)
    model, guide = small_pair(prior, process, spread=4.0)
    x_0 = torch.randint(3, (100, 4))
    candidates = torch.tensor([0, 0.1, 0.35, 0.5, 0.8, 1.0], dtype=torch.double)
    options = dict(num_particles=4, seed=1)
    runs = torch.stack(
        [
            step_terms(
                model, guide, process, x_0, candidates, num_particles=4, num_draws=4, seed=seed
            )
            for seed in range(8)
        ]
    )
    for path in ([0, 5], [0, 2, 5], [0, 1, 3, 4, 5]):
        sums = sum(runs[:, i, j] for i, j in itertools.pairwise(path))
        bound = log_likelihood_bound(
            model, guide, process, x_0, time_grid=candidates[path], num_draws=20, **options
        )
        draws = float(bound.stderr.square().mean() / 100) ** 0.5
        error = math.hypot(draws, float(sums.std()) / 8**0.5)
        assert abs(float(sums.mean() - bound.value.mean())) < 5 * error + 1e-5


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 6])
def test_the_path_is_that_of_brute_force(num_steps):
    terms = torch.randn(7, 7, dtype=torch.double)
    terms = terms.masked_fill(~torch.ones(7, 7, dtype=torch.bool).triu(1), -torch.inf)
    paths = [[0, *inner, 6] for inner in itertools.combinations(range(1, 6), num_steps - 1)]
    best = max(paths, key=lambda p: sum(float(terms[i, j]) for i, j in itertools.pairwise(p)))
    assert best_path(terms, num_steps).tolist() == best


@pytest.mark.parametrize("num_steps", [1, 3, 7])
def test_grids_are_valid_and_no_worse_than_equal_steps_on_their_own_terms(num_steps):
    process = MaskingProcess(3, 3)
    model, guide = small_pair("standard_normal", process, spread=4.0)
    x_0 = torch.randint(3, (20, 3))
    options = dict(num_particles=2, seed=3)
    grid = optimize_time_grid(model, guide, process, x_0, num_steps, num_candidates=5, **options)
    assert grid.shape == (num_steps + 1,)
    assert grid[0] == 0
    assert grid[-1] == 1
    assert (grid.diff() > 0).all()
    again = optimize_time_grid(model, guide, process, x_0, num_steps, num_candidates=5, **options)
    assert (grid == again).all()
    if num_steps == 7:  # 5 intervals allow no 7 steps: the equal ones are candidates too
        assert set((torch.arange(8) / 7).tolist()) & set(grid.float().tolist()) > {0.0, 1.0}


def test_pieces_give_the_same_terms():
    process = MaskingProcess(3, 4)
    model, guide = small_pair("categorical", process)
    x_0 = torch.randint(3, (30, 4))
    candidates = torch.linspace(0, 1, 5)
    whole = step_terms(model, guide, process, x_0, candidates, seed=1)
    pieces = step_terms(model, guide, process, x_0, candidates, seed=1, batch_size=7)
    torch.testing.assert_close(whole, pieces)


def test_bad_arguments_are_named():
    model, guide = small_pair("standard_normal", PROCESS)
    x_0 = tied_rows(3)
    for options, message in (
        (dict(num_steps=0), "num_steps must be at least 1, got 0"),
        (
            dict(num_steps=2, num_candidates=0),
            "num_candidates must be an integer of at least 1, got 0",
        ),
        (dict(num_steps=2, num_draws=0), "num_draws must be an integer of at least 1"),
        (dict(num_steps=2, num_particles=0), "num_particles must be an integer of at least 1"),
        (dict(num_steps=2, batch_size=0), "batch_size must be an integer of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            optimize_time_grid(model, guide, PROCESS, x_0, **options)
    with pytest.raises(ValueError, match=r"x_0\[0, 0\] is 5"):
        optimize_time_grid(model, guide, PROCESS, torch.full((2, 8), 5), 2)
    with pytest.raises(ValueError, match="candidates allow 2 steps"):
        best_path(torch.zeros(3, 3), 3)
    with pytest.raises(ValueError, match=r"terms must have shape \(N \+ 1, N \+ 1\)"):
        best_path(torch.zeros(3, 4), 2)
