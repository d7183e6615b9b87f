from __future__ import annotations

import pytest
import torch

from vadd_pyro import (
    CosineSchedule,
    FunctionSchedule,
    LinearSchedule,
    MaskingProcess,
    PolynomialSchedule,
)

SCHEDULES = [
    LinearSchedule(),
    CosineSchedule(),
    PolynomialSchedule(2.0),
    PolynomialSchedule(0.5),
    FunctionSchedule(lambda t: (1 - t) ** 2),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_weight_and_rho_follow_from_alpha(schedule):
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.double)
    h = 1e-6
    slope = (schedule.alpha(t + h) - schedule.alpha(t - h)) / (2 * h)
    torch.testing.assert_close(schedule.alpha_prime(t), slope, rtol=1e-5, atol=1e-6)
    weight = -slope / (1 - schedule.alpha(t))
    torch.testing.assert_close(schedule.weight(t), weight, rtol=1e-5, atol=1e-6)
    s = t * 0.7
    rho = (schedule.alpha(s) - schedule.alpha(t)) / (1 - schedule.alpha(t))
    torch.testing.assert_close(schedule.rho(s, t), rho)
    # rho over a short step is the weight times its length
    short = schedule.rho(t - h, t) / h
    torch.testing.assert_close(short, schedule.weight(t), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_inverse_and_ends(schedule):
    schedule.check()
    alpha = torch.linspace(0, 1, 21)
    torch.testing.assert_close(schedule.alpha(schedule.inverse(alpha)), alpha, rtol=0, atol=2e-6)
    ends = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(schedule.rho(torch.zeros(2), ends)[1], torch.tensor(1.0))
    assert schedule.weight(torch.tensor([1e-7, 1e-3, 1.0])).isfinite().all()


def test_weight_keeps_its_digits_near_zero():
    t = torch.tensor([1e-6])
    torch.testing.assert_close(CosineSchedule().weight(t), 1 / t, rtol=1e-4, atol=0)
    own = FunctionSchedule(lambda t: 1 - torch.cos(torch.pi / 2 * (1 - t)))
    torch.testing.assert_close(own.weight(t), 1 / t, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (lambda t: t, r"alpha\(0\) must be 1"),
        (lambda t: torch.ones_like(t), r"alpha\(1\) must be 0, got 1"),
        (lambda t: 1 - t + 0.3 * torch.sin(2 * torch.pi * t), "rises from"),
        (lambda t: (1 - t) / t, "not finite"),
        (lambda t: (1 - t).sum(), "keep the shape"),
    ],
)
def test_schedule_that_does_not_decrease_is_refused(alpha, message):
    with pytest.raises(ValueError, match=message):
        FunctionSchedule(alpha)


def test_a_subclass_is_checked_by_the_process():
    class Rising(LinearSchedule):
        def alpha(self, t):
            return t

    with pytest.raises(ValueError, match="Rising"):
        MaskingProcess(3, 2, Rising())
    with pytest.raises(TypeError, match="FunctionSchedule"):
        MaskingProcess(3, 2, lambda t: 1 - t)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="power must be a positive number, got -1"):
        PolynomialSchedule(-1)
