from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from vadd_pyro import DiagonalNormal, TokenCategorical
from vadd_pyro.distributions import draw_categorical, token_logits


def test_token_categorical_is_the_masked_categorical():
    logits = torch.randn(4, 1, 6, 3, 5, requires_grad=True)
    target = torch.rand(6, 3) < 0.5
    x = torch.randint(5, (6, 3))
    own = TokenCategorical(logits, target)
    usual = dist.Categorical(logits=logits).mask(target).to_event(1)
    assert own.batch_shape == usual.batch_shape
    assert own.event_shape == usual.event_shape
    torch.testing.assert_close(own.log_prob(x), usual.log_prob(x))
    (first,) = torch.autograd.grad(own.log_prob(x).sum(), logits)
    (second,) = torch.autograd.grad(usual.log_prob(x).sum(), logits)
    torch.testing.assert_close(first, second)
    wide = own.expand([2, 4, 1, 6])
    assert wide.log_prob(x).shape == (2, 4, 1, 6)
    assert wide.sample().shape == (2, 4, 1, 6, 3)
    assert own.sample((7,)).shape == (7, 4, 1, 6, 3)
    assert own.expand(own.batch_shape) is own


def test_token_categorical_validates():
    own = TokenCategorical(torch.zeros(2, 3, 5), validate_args=True)
    with pytest.raises(ValueError, match="support"):
        own.log_prob(torch.full((2, 3), 5))


def test_draws_follow_their_law_and_skip_impossible_categories():
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    n = 50_000
    x = draw_categorical(p.log().expand(n, 6))
    counts = torch.bincount(x, minlength=6)
    assert (counts[p == 0] == 0).all()
    error = (p * (1 - p) / n).sqrt()
    assert ((counts / n - p).abs() <= 4.5 * error).all()


def test_extreme_uniforms_stay_inside(monkeypatch):
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(3, 4)
    for u, expected in ((0.0, 1), (1.0 - 2**-53, 2), (1.0, 2)):
        monkeypatch.setattr(torch, "rand", lambda *a, u=u, **k: torch.full((3, 1), u).double())
        assert draw_categorical(logits).tolist() == [expected] * 3


def test_large_vocabulary_is_not_sharpened():
    # With single-precision Gumbel noise the smallest probabilities would be cut off.
    vocab, n = 4096, 60_000
    logits = torch.zeros(vocab)
    logits[:2048] = -3.0
    rare = torch.sigmoid(torch.tensor(-3.0))
    x = torch.cat([draw_categorical(logits.expand(4000, vocab)) for _ in range(n // 4000)])
    share = (x < 2048).double().mean()
    assert abs(share - rare) < 4.5 * float((rare * (1 - rare) / n).sqrt())


def test_diagonal_normal_is_the_usual_one():
    loc, scale = torch.randn(3, 4), torch.rand(3, 4) + 0.1
    own, usual = DiagonalNormal(loc, scale), dist.Normal(loc, scale).to_event(1)
    z = torch.randn(5, 3, 4)
    torch.testing.assert_close(own.log_prob(z), usual.log_prob(z))
    torch.testing.assert_close(own.entropy(), usual.entropy())
    assert own.expand([7, 3]).rsample().shape == (7, 3, 4)
    other_loc, other_scale = torch.randn(3, 4), torch.rand(3, 4) + 0.1
    own_q, usual_q = (
        DiagonalNormal(other_loc, other_scale),
        dist.Normal(other_loc, other_scale).to_event(1),
    )
    exact = kl_divergence(usual, usual_q)
    for p in (own, usual):
        for q in (own_q, usual_q):
            torch.testing.assert_close(kl_divergence(p, q), exact)
    with pytest.raises(NotImplementedError):
        kl_divergence(own, dist.Laplace(loc, scale).to_event(1))
    draws = DiagonalNormal(torch.ones(2), torch.tensor([1.0, 2.0])).rsample((20_000,))
    assert abs(draws.mean(0) - 1).max() < 0.06
    torch.testing.assert_close(draws.std(0), torch.tensor([1.0, 2.0]), rtol=0.03, atol=0)


def test_token_logits_unwraps_what_users_write():
    logits = torch.log_softmax(torch.randn(6, 3, 5), -1)
    target = torch.ones(6, 3, dtype=torch.bool)
    usual = dist.Categorical(logits=logits)
    for fn in (
        TokenCategorical(logits, target),
        usual.to_event(1),
        usual.mask(target).to_event(1),
        usual.to_event(1).mask(target[:, 0]),
    ):
        torch.testing.assert_close(token_logits(fn), logits)
    with pytest.raises(TypeError, match="one categorical per position"):
        token_logits(dist.Normal(torch.zeros(3), 1).to_event(1))
