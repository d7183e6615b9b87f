from __future__ import annotations

import pytest
import torch

from vadd_pyro import CosineSchedule, MaskedBatch, MaskingProcess, PolynomialSchedule
from vadd_pyro.process import make_time_grid

N = 40_000


def within(value: float, expected: float, error: float) -> bool:
    return abs(value - expected) < 4.5 * error + 1e-9


@pytest.mark.parametrize("schedule", [None, CosineSchedule(), PolynomialSchedule(2.0)], ids=repr)
@pytest.mark.parametrize(("s", "t"), [(0.0, 1.0), (0.2, 0.5), (0.6, 0.9)])
def test_corrupt_follows_alpha_and_rho(schedule, s, t):
    process = MaskingProcess(5, 3, schedule)
    x_0 = torch.randint(5, (N, 3))
    batch = process.corrupt(x_0, t, s)
    alpha = float(process.schedule.alpha(torch.tensor(t)))
    share = batch.masked.double().mean()
    assert within(share, 1 - alpha, ((1 - alpha) * alpha / (3 * N)) ** 0.5)
    rho = float(process.schedule.rho(torch.tensor(s), torch.tensor(t)))
    among = batch.target[batch.masked].double()
    assert within(among.mean(), rho, (rho * (1 - rho) / len(among)) ** 0.5)
    assert not (batch.target & ~batch.masked).any()
    assert ((batch.x_t == process.mask_id) == batch.masked).all()
    assert (batch.x_t[~batch.masked] == x_0[~batch.masked]).all()


def test_at_least_one_is_the_conditional_law():
    process = MaskingProcess(2, 3)
    t = torch.full((N,), 0.3)
    x_0 = torch.zeros((N, 3), dtype=torch.long)
    code = torch.tensor([4, 2, 1])

    def frequencies(batch):
        return torch.bincount((batch.masked * code).sum(-1), minlength=8).double() / N

    conditional = frequencies(process.corrupt(x_0, t, at_least_one=True))
    p = torch.tensor([0.7**3, *[0.3**k * 0.7 ** (3 - k) for k in (1, 1, 2, 1, 2, 2, 3)]])
    expected = p.double() / p[1:].sum()
    assert conditional[0] == 0
    error = (expected * (1 - expected) / N).sqrt()
    assert ((conditional - expected).abs()[1:] < 4.5 * error[1:]).all()
    # at the ends of time it stays well defined
    for time in (1e-7, 1.0):
        assert process.corrupt(x_0[:99], time, at_least_one=True).masked.any(-1).all()


def test_reveal_steps_agree_with_corrupt():
    process = MaskingProcess(4, 6, CosineSchedule())
    grid = make_time_grid(4)
    steps = process.reveal_steps((N, 6), grid, torch.device("cpu"))
    share = -process.schedule.alpha(grid).diff()
    frequencies = torch.bincount(steps.flatten(), minlength=5)[1:].double() / steps.numel()
    error = (share * (1 - share) / steps.numel()).sqrt()
    assert ((frequencies - share).abs() < 4.5 * error).all()
    x_0 = torch.randint(4, (N, 6))
    batch = process.step_batch(x_0, steps, 2, grid)
    assert (batch.masked == (steps <= 2)).all()
    assert (batch.target == (steps == 2)).all()
    assert (batch.t == 0.5).all()


@pytest.mark.parametrize(
    ("x_0", "error", "message"),
    [
        (torch.tensor([[0, 5]]), ValueError, r"x_0\[0, 1\] is 5: expected tokens in 0..4"),
        (torch.tensor([[0, 1], [-1, 1]]), ValueError, r"x_0\[1, 0\] is -1"),
        (torch.rand(2, 2), TypeError, "integer tokens.*got torch.float32"),
        (torch.ones(2, 2, dtype=torch.bool), TypeError, "got torch.bool"),
        (torch.zeros(2, 3, dtype=torch.long), ValueError, r"shape \(batch, 2\), got \(2, 3\)"),
        (torch.zeros(2, dtype=torch.long), ValueError, r"got \(2,\)"),
        (torch.zeros(0, 2, dtype=torch.long), ValueError, "empty batch"),
        ([[0, 1]], TypeError, "got list"),
    ],
)
def test_bad_tokens_are_named(x_0, error, message):
    with pytest.raises(error, match=message):
        MaskingProcess(5, 2).check_tokens(x_0)


def test_tokens_of_any_integer_type_become_long():
    process = MaskingProcess(5, 2)
    assert process.check_tokens(torch.ones(3, 2, dtype=torch.uint8)).dtype == torch.long
    assert process.check_tokens(torch.full((1, 2), 5), masks=True).dtype == torch.long


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "num_steps must be at least 1, got 0"),
        ((-3,), ValueError, "got -3"),
        ((2.0,), TypeError, "num_steps must be an integer"),
        ((None, None), ValueError, "num_steps is missing"),
        ((None, torch.tensor([0.0, 0.5])), ValueError, "from 0 to 1"),
        ((None, torch.tensor([0.0, 0.7, 0.5, 1.0])), ValueError, "increase"),
        ((3, torch.tensor([0.0, 0.5, 1.0])), ValueError, "2 steps"),
    ],
)
def test_bad_time_grids_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        make_time_grid(*arguments)


def test_process_checks_its_sizes():
    with pytest.raises(ValueError, match="vocab_size must be at least 2, got 1"):
        MaskingProcess(1, 2)
    with pytest.raises(TypeError, match=r"length must be an integer, got 2\.5"):
        MaskingProcess(3, 2.5)  # type: ignore[arg-type]


def test_batch_rows_and_shapes():
    process = MaskingProcess(5, 2)
    x_0 = torch.randint(5, (6, 2))
    batch = process.corrupt(x_0, torch.rand(6), weight=torch.arange(6.0))
    part = batch[torch.tensor([4, 1])]
    assert len(part) == 2
    assert (part.x_0 == x_0[[4, 1]]).all()
    assert part.weight.tolist() == [4, 1]
    assert [len(piece) for piece in batch.split(4)] == [4, 2]
    assert batch.without_data().x_0 is None
    with pytest.raises(TypeError, match="slice"):
        batch[0]
    with pytest.raises(ValueError, match=r"t must have one entry a row, shape \(6,\), got \(5,\)"):
        MaskedBatch(batch.x_t, torch.rand(5), batch.masked, batch.target)
    with pytest.raises(ValueError, match=r"target must have the shape \(6, 2\)"):
        MaskedBatch(batch.x_t, batch.t, batch.masked, batch.target[:, :1])
