"""Infilling by the joint law of the sampler, against that law itself."""

from __future__ import annotations

import pytest
import torch
from conftest import PRIORS, small_pair

from vadd_pyro import MaskingProcess, exact_distribution, metrics, sample
from vadd_pyro.infilling import infill

PROCESS = MaskingProcess(3, 3)
OPEN = PROCESS.mask_id
ROW = torch.tensor([OPEN, 2, OPEN])


def model_of(prior):
    torch.manual_seed(1)
    return small_pair(prior, PROCESS, spread=4.0)[0]


def conditional(model, num_steps):
    """``p_T(x_0, x_2 | x_1 = 2)`` and ``p_T(x_1 = 2)`` of the exact law."""
    law = exact_distribution(model, PROCESS, num_steps)[:, 2, :]
    return law / law.sum(), law.sum()


def chi_square(x, law):
    """p-value of rows ``(n, 3)`` against a law of the first and last token."""
    from scipy.stats import chisquare

    counts = torch.bincount(x[:, 0] * 3 + x[:, 2], minlength=9).numpy()
    return float(chisquare(counts, law.flatten().numpy() * len(x)).pvalue)


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("prior", PRIORS)
def test_completions_and_evidence_are_those_of_the_joint_law(prior, num_steps):
    model = model_of(prior)
    law, evidence = conditional(model, num_steps)
    rows = ROW.repeat(400, 1)  # independent runs, ten completions of each
    found = infill(model, PROCESS, rows, num_steps, num_samples=10, num_particles=128, seed=0)
    assert (found.x[:, :, 1] == 2).all()
    estimates = found.log_evidence.exp()
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(float(estimates.mean() - evidence)) < 4 * float(error) + 1e-6
    # One completion a run: those of one run share particles and are no independent draws.
    assert chi_square(found.x[:, 0], law) > 1e-3
    assert (found.effective_size > 1).all()
    assert (found.effective_size <= 128).all()


def test_it_differs_from_the_denoising_conditional_where_the_model_is_inconsistent():
    torch.manual_seed(1)
    model = small_pair("standard_normal", PROCESS, spread=30.0)[0]
    law, _ = conditional(model, 3)
    exact = exact_distribution(model, PROCESS, 3, x_start=ROW)[:, 2, :]
    apart = metrics.total_variation(law, exact)
    assert apart > 0.05
    own = infill(model, PROCESS, ROW.repeat(3000, 1), 3, num_particles=64, seed=0).x[:, 0]
    plain = sample(model, PROCESS, 3000, 3, x_start=ROW, seed=0)
    assert chi_square(own, law) > 1e-3
    assert chi_square(own, exact) < 1e-6
    assert chi_square(plain, exact) > 1e-3


def test_resampling_leaves_the_evidence_unbiased_and_keeps_particles_alive():
    process = MaskingProcess(3, 6)
    torch.manual_seed(0)
    model, _ = small_pair("standard_normal", process, spread=4.0)
    row = torch.tensor([0, 1, 2, 0, 1, process.mask_id])
    kept = infill(model, process, row.repeat(200, 1), 6, num_particles=64, seed=1)
    never = infill(
        model, process, row.repeat(200, 1), 6, num_particles=64, resample_below=0.0, seed=2
    )
    first, second = kept.log_evidence.exp(), never.log_evidence.exp()
    error = (first.var() / 200 + second.var() / 200) ** 0.5
    assert abs(float(first.mean() - second.mean())) < 4 * float(error)
    assert float(kept.effective_size.mean()) > float(never.effective_size.mean())


def test_everything_open_is_plain_sampling_and_nothing_open_is_the_row_itself():
    model = model_of("categorical")
    free = infill(
        model, PROCESS, torch.full((3,), OPEN), 2, num_samples=20_000, seed=0, num_particles=20_000
    )
    assert free.log_evidence.abs().max() < 1e-12
    assert float(free.effective_size) == 20_000
    law = metrics.histogram(free.x[0], 3)
    assert metrics.total_variation(law, exact_distribution(model, PROCESS, 2)) < 0.03
    whole = torch.tensor([0, 2, 1])
    found = infill(model, PROCESS, whole.repeat(300, 1), 2, num_particles=256, seed=0)
    assert (found.x == whole).all()
    p = float(exact_distribution(model, PROCESS, 2)[0, 2, 1])
    estimates = found.log_evidence.exp()
    assert abs(float(estimates.mean()) - p) < 4 * float(estimates.std()) / 300**0.5


def test_bad_arguments_are_refused_by_name():
    model = model_of("none")
    with pytest.raises(ValueError, match=r"x_start\[0, 1\] is 7"):
        infill(model, PROCESS, torch.tensor([0, 7, OPEN]), 2)
    with pytest.raises(ValueError, match="num_particles must be an integer of at least 2, got 1"):
        infill(model, PROCESS, ROW, 2, num_particles=1)
    with pytest.raises(ValueError, match=r"resample_below must be a share in \[0, 1\], got 3"):
        infill(model, PROCESS, ROW, 2, resample_below=3)
