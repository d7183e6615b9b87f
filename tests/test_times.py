from __future__ import annotations

import pytest
import torch

from vadd_pyro import (
    AtomTimes,
    BalancedTimes,
    CosineSchedule,
    FewStepTimes,
    GridTimes,
    MaskedDiffusionELBO,
    MaskingProcess,
    PartTargets,
    UniformTimes,
)

CPU = torch.device("cpu")
N = 20_000


def expected_delbo(process, score, times, repeats=20):
    """Mean and error of the weighted score of the number of masked positions, over batches."""
    x_0 = torch.zeros((N, process.length), dtype=torch.long)
    elbo = MaskedDiffusionELBO(process, times=times)
    means = []
    for _ in range(repeats):
        batch = elbo.draw(x_0)
        means.append((batch.weight.double() * score(batch.masked.sum(-1))).mean())
    values = torch.stack(means)
    return values.mean(), values.std() / repeats**0.5


@pytest.mark.parametrize("schedule", [None, CosineSchedule()], ids=repr)
@pytest.mark.parametrize("length", [2, 5])
@pytest.mark.parametrize("times", [UniformTimes(), UniformTimes(True), BalancedTimes()], ids=repr)
def test_three_distributions_of_times_have_the_same_expectation(times, length, schedule):
    # Integrated over t, m masked positions of D count with total weight 1 / m.
    process = MaskingProcess(2, length, schedule)

    def score(m):
        return torch.where(m > 0, m.double() ** 2 + 1, 0.0)

    exact = sum((m**2 + 1) / m for m in range(1, length + 1))
    value, error = expected_delbo(process, score, times)
    assert abs(value - exact) < 4.5 * error
    assert error < 0.02 * exact


def test_balanced_times_count_every_row_the_same():
    process = MaskingProcess(2, 4)
    batch = MaskedDiffusionELBO(process, times=BalancedTimes()).draw(
        torch.zeros((N, 4), dtype=torch.long)
    )
    torch.testing.assert_close(batch.weight, torch.full((N,), 1 + 1 / 2 + 1 / 3 + 1 / 4))
    assert batch.masked.any(-1).all()
    sizes = torch.bincount(batch.masked.sum(-1), minlength=5)[1:] / N
    expected = 1 / torch.arange(1, 5) / batch.weight[0]
    assert ((sizes - expected).abs() < 0.015).all()


def test_uniform_times_are_stratified_and_never_zero():
    t = UniformTimes().draw(MaskingProcess(2, 2), 100, CPU).t
    assert (t > 0).all()
    assert (t <= 1).all()
    assert torch.bincount((t * 9.9999).long(), minlength=10).tolist() == pytest.approx(
        [10] * 10, abs=1
    )


def test_every_row_of_the_lattice_is_uniform():
    process = MaskingProcess(2, 2)
    first = torch.stack([UniformTimes().draw(process, 7, CPU).t[0] for _ in range(2000)])
    assert abs(first.mean() - 0.5) < 4.5 * (1 / 12 / 2000) ** 0.5


def test_atom():
    process = MaskingProcess(2, 3)
    draw = AtomTimes(0.3).draw(process, N, CPU)
    atom = draw.t == 1
    assert abs(atom.double().mean() - 0.3) < 0.01
    assert (draw.weight[atom] == 1).all()
    torch.testing.assert_close(draw.weight[~atom], 1 / draw.t[~atom])
    # the atom falls on all times alike
    assert abs(draw.t[~atom].mean() - 0.5) < 0.02
    assert (AtomTimes(1.0).draw(process, 9, CPU).t == 1).all()
    with pytest.raises(ValueError, match=r"share must be a probability in \[0, 1\], got 1.5"):
        AtomTimes(1.5)
    with pytest.raises(ValueError, match="continuous time"):
        AtomTimes(0.3, GridTimes(2)).draw(process, 9, CPU)


def test_grid_times():
    process = MaskingProcess(2, 3)
    draw = GridTimes([1, 4]).draw(process, N, CPU)
    one = draw.weight == 1
    assert abs(one.double().mean() - 0.5) < 0.02
    assert (draw.t[one] == 1).all()
    assert (draw.s[one] == 0).all()
    assert (draw.weight[~one] == 4).all()
    torch.testing.assert_close(draw.t[~one] - draw.s[~one], torch.full(((~one).sum(),), 0.25))
    # on a grid, the DELBO is the Riemann sum of rho over the sampler's states
    elbo = MaskedDiffusionELBO(process, times=GridTimes(4))
    batch = elbo.draw(torch.zeros((N, 3), dtype=torch.long))
    torch.testing.assert_close(batch.weight, 4 * 0.25 / batch.t)
    assert (batch.target == batch.masked).all()
    with pytest.raises(ValueError, match="empty list"):
        GridTimes([])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        GridTimes([2, 0])


def test_few_step_times_are_the_states_of_samplers_of_powers_of_two():
    process = MaskingProcess(2, 5)
    t, weight, s = FewStepTimes(64).draw(process, 70_000, CPU)[:3]
    assert float((t == 1).double().mean()) == pytest.approx(
        sum(2.0**-k for k in range(7)) / 7, abs=0.01
    )
    # The DELBO counts a row T rho(s, t) = 1 / t, as at uniform times, with linear masking.
    assert torch.allclose(weight * process.schedule.rho(s, t), 1 / t)
    elbo = MaskedDiffusionELBO(process, times=FewStepTimes(8))
    batch = elbo.draw(torch.zeros((64, 5), dtype=torch.long))
    assert (batch.target == batch.masked).all()
    with pytest.raises(ValueError, match="power of two, got 6"):
        FewStepTimes(6)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_part_targets_mixes_the_delbo_with_the_bounds_of_its_grid(share):
    process = MaskingProcess(2, 6)
    elbo = MaskedDiffusionELBO(process, times=PartTargets(GridTimes(4), share))
    batch = elbo.draw(torch.zeros((N, 6), dtype=torch.long))
    # A row of the bound weighs T, and one of the DELBO T rho = T / i at step i of 4.
    step = (4 * batch.t).round()
    parts = torch.isclose(batch.weight, torch.tensor(4.0)) & (step > 1)
    assert torch.allclose(batch.weight[~parts], (4 / step)[~parts])
    assert float(parts.double().mean()) == pytest.approx(0.75 * share, abs=0.015)
    assert (batch.target == batch.masked)[~parts].all()
    revealed = batch.target.sum(-1).double() / batch.masked.sum(-1).clamp_min(1)
    for i in (2, 3, 4):
        chosen = parts & (step == i) & batch.masked.any(-1)
        if share:
            assert float(revealed[chosen].mean()) == pytest.approx(1 / i, abs=0.02)
    # Both estimate the same sum over positions.
    weighted = batch.weight.double() * batch.target.sum(-1)
    assert float(weighted.mean()) == pytest.approx(6, abs=4 * float(weighted.std()) / N**0.5)
    bound = MaskedDiffusionELBO(process, "chain", times=PartTargets(GridTimes(4), 0.0))
    assert (bound.draw(torch.zeros((8, 6), dtype=torch.long)).weight == 4).all()


@pytest.mark.parametrize("objective", ["delbo", "chain"])
def test_steps_without_a_latent_score_all_that_is_masked_the_same_in_expectation(objective):
    """For a model whose logits depend on what is visible, as one without latent has."""
    process = MaskingProcess(2, 4)
    grid = GridTimes(4)
    options = dict(times=PartTargets(grid) if objective == "delbo" else grid)
    value = torch.tensor([0.3, 1.0, 2.0, 5.0])  # of each position, times what is visible
    x = torch.zeros((N, 4), dtype=torch.long)

    def terms(least_time):
        torch.manual_seed(0)
        elbo = MaskedDiffusionELBO(process, objective, least_time=least_time, **options)
        batch = elbo.draw(x)
        seen = 1 + (~batch.masked).sum(-1, keepdim=True)
        return batch, batch.weight * (batch.target * value * seen).sum(-1)

    (batch, whole), (_, parts) = terms(1.0), terms(0.0)
    later = batch.t < 1
    assert (batch.target == batch.masked)[later].all()
    assert not (batch.target == batch.masked)[~later].all()
    error = (whole.var() / N + parts.var() / N).sqrt()
    assert float(whole.mean()) == pytest.approx(float(parts.mean()), abs=4 * float(error))
    assert float(whole[later].var()) < 0.95 * float(parts[later].var())


def test_part_targets_need_a_grid_and_a_probability():
    with pytest.raises(TypeError, match="grid must be GridTimes or FewStepTimes, got Uniform"):
        PartTargets(UniformTimes())
    with pytest.raises(ValueError, match=r"share must be a probability in \[0, 1\], got 1.5"):
        PartTargets(share=1.5)
    assert repr(PartTargets(FewStepTimes(8))) == "PartTargets(FewStepTimes(8), share=0.3)"
