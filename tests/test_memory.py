"""What a training step holds at once, and that what saves memory changes no number."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import cross_entropy

from vadd_pyro import TokenCategorical
from vadd_pyro.distributions.scores import row_scores, shared_row_scores

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "memory.py"
SPEC = importlib.util.spec_from_file_location("memory_benchmark", SCRIPT)
memory = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(memory)


# --------------------------------------------------------------- the measure


def test_the_measure_knows_what_is_alive():
    before = torch.ones(5000)

    def call():
        first = before + 1
        second = first.exp()
        del first
        third = second * 2
        return third.sum()

    peak, large = memory.measure(call, 20_000)
    assert 40_000 <= peak <= 40_100  # two of three at a time, and a number
    assert large in (["aten::add", "aten::exp"], ["aten::exp", "aten::mul"])


# ------------------------------------------------------------- training steps


@pytest.mark.parametrize("name", memory.DECODERS)
def test_the_peak_is_linear_in_rows_and_positions_and_holds_the_logits_twice(name):
    rows, length, vocab_size = 16, 64, 192
    base = memory.measured(name, rows, length, vocab_size)
    twice_the_rows = memory.measured(name, 2 * rows, length, vocab_size)
    assert twice_the_rows.peak == pytest.approx(2 * base.peak, rel=0.01)
    # Squares of images: four times as long.
    longer = memory.measured(name, rows, 4 * length, vocab_size)
    assert longer.peak == pytest.approx(4 * base.peak, rel=0.05)
    more_tokens = memory.measured(name, rows, length, 2 * vocab_size)
    for row in (base, twice_the_rows, longer, more_tokens):
        assert len(row.large) == 2
    # Two tensors of logits, four bytes a number, and no more than that.
    extra = 4 * rows * length * vocab_size
    assert more_tokens.peak - base.peak == pytest.approx(2 * extra, rel=0.01)


def test_the_usual_distribution_holds_more():
    # What the measure would say if the package did as others do.
    usual = memory.measured("residual", 16, 64, 192, usual=True)
    assert len(usual.large) > 3
    assert usual.peak > 1.5 * memory.measured("residual", 16, 64, 192).peak


def test_rows_that_share_logits_add_nothing_of_their_size():
    logits = torch.randn(8, 20, 4, 50, requires_grad=True)
    row, x = torch.randint(20, (64,)), torch.randint(50, (64, 4))

    def step():
        TokenCategorical(logits, row=row, validate_args=False).log_prob(x).sum().backward()

    step()
    _, large = memory.measure(step, 4 * logits.numel())
    assert len(large) == 1  # the gradient; the logits are older


# -------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("vocab_size", [2, 5, 40])
@pytest.mark.parametrize("rows", [7, 4000])  # few and many: another way to the same
def test_scores_and_gradients_are_those_of_a_cross_entropy(vocab_size, rows):
    logits = 3 * torch.randn(rows, 3, vocab_size)
    logits[0, 0] = torch.tensor([-torch.inf, *[1e4] * (vocab_size - 1)])
    logits.requires_grad_()
    x = torch.randint(1, vocab_size, (rows, 3))
    target = torch.rand(rows, 3) < 0.5
    target[0] = torch.tensor([True, False, True])
    anything = x.masked_fill(~target, -7)
    weight = torch.rand(rows)
    score = row_scores(logits, anything, target)
    usual = -cross_entropy(
        logits.transpose(1, 2), x.masked_fill(~target, -100), ignore_index=-100, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(score, usual)
    (grad,) = torch.autograd.grad((score * weight).sum(), logits)
    (usual_grad,) = torch.autograd.grad((usual * weight).sum(), logits)
    torch.testing.assert_close(grad, usual_grad)
    assert (grad[~target] == 0).all()


@pytest.mark.parametrize("vocab_size", [2, 5, 40])
@pytest.mark.parametrize("token", [-1, None])
def test_other_values_than_tokens_are_refused(vocab_size, token):
    logits, x = torch.randn(4, 3, vocab_size), torch.zeros(4, 3, dtype=torch.long)
    x[1, 2] = vocab_size if token is None else token
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        row_scores(logits, x)
    assert torch.isfinite(row_scores(logits, x, x == 0)).all()
    assert row_scores(logits[:0], x[:0]).shape == (0,)


@pytest.mark.parametrize("vocab_size", [3, 20])
def test_logits_may_lie_in_any_order(vocab_size):
    row, x = torch.randint(40, (60,)), torch.randint(vocab_size, (60, 4))
    target = torch.rand(60, 4) < 0.5
    weight = torch.rand(60)
    straight = torch.randn(30, 40, 4, vocab_size, requires_grad=True)
    usual = (dist.Categorical(logits=straight[:, row]).log_prob(x) * target).sum(-1)
    (expected,) = torch.autograd.grad((usual * weight).sum(), straight)
    turned = straight.detach().permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    turned.requires_grad_()
    for score in (
        shared_row_scores(turned, row, x, target),
        row_scores(turned[:, row], x, target),
    ):
        torch.testing.assert_close(score, usual)
        (grad,) = torch.autograd.grad((score * weight).sum(), turned)
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("vocab_size", [2, 20])
@pytest.mark.parametrize("scored", [True, False], ids=["targets", "all"])
def test_first_and_second_derivatives(vocab_size, scored):
    logits = torch.randn(2, 3, 2, vocab_size, dtype=torch.double, requires_grad=True)
    row, x = torch.tensor([0, 2, 2, 1]), torch.randint(vocab_size, (4, 2))
    target = torch.tensor([[True, False], [True, True], [False, False], [False, True]])
    target = target if scored else None

    def shared(logits):
        return shared_row_scores(logits, row, x, target)

    def own(logits):
        return row_scores(logits.index_select(-3, row), x, target)

    torch.testing.assert_close(shared(logits), own(logits))
    for function in (shared, own):
        assert gradcheck(function, (logits,))
        assert gradgradcheck(function, (logits,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_its_type(dtype):
    logits = torch.randn(3000, 2, 3).to(dtype).requires_grad_()
    x = torch.randint(3, (3000, 2))
    score = row_scores(logits, x)
    score.float().sum().backward()
    exact = dist.Categorical(logits=logits.detach().double()).log_prob(x).sum(-1)
    assert score.dtype == logits.grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(score.double(), exact, atol=4 * eps, rtol=2 * eps)


def test_target_may_have_more_rows_than_the_logits():
    logits, x = torch.randn(3, 4), torch.randint(4, (5, 3))
    target = torch.rand(6, 5, 3) < 0.5
    usual = dist.Categorical(logits=logits.expand(6, 5, 3, 4)).log_prob(x) * target
    torch.testing.assert_close(row_scores(logits, x, target), usual.sum(-1))


def test_a_whole_step_can_be_traced():
    row = torch.tensor([0, 2, 2, 1])

    def step(logits, x, target):
        logits = logits.detach().requires_grad_()
        score = row_scores(logits[row], x, target) + shared_row_scores(logits, row, x, target)
        return torch.autograd.grad(score.sum(), logits)[0]

    def inputs():
        return torch.randn(3, 2, 20), torch.randint(20, (4, 2)), torch.rand(4, 2) < 0.5

    traced = make_fx(step)(*inputs())
    other = inputs()
    torch.testing.assert_close(traced(*other), step(*other))
