"""Draws follow the law that is stated beside them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import make_swiss_roll

from vadd_pyro import data, metrics


@pytest.mark.parametrize("name", list(data.TOYS))
def test_draws_follow_the_stated_law(name):
    density = data.toy(name, 20)
    law = density.probabilities
    n = 100_000
    assert law.shape == (20, 20)
    assert abs(law.sum() - 1) < 1e-9
    x = density.sample(n, seed=1)
    counts = metrics.histogram(x, 20) * n
    cells = law * n >= 5
    chi = ((counts - law * n) ** 2 / (law * n))[cells].sum()
    freedom = int(cells.sum()) - 1
    assert abs(chi - freedom) < 5 * (2 * freedom) ** 0.5
    assert counts[~cells].sum() < 5 * (~cells).sum()
    assert (x == density.sample(n, seed=1)).all()
    assert (x != density.sample(n, seed=2)).any()
    assert density.process().vocab_size == 20


def test_checkerboard_is_known_in_closed_form():
    density = data.checkerboard(100)
    assert density.entropy == pytest.approx(math.log(5000))
    assert set(np.round(density.probabilities.unique().numpy() * 5000, 9)) == {0.0, 1.0}
    assert data.checkerboard(10).probabilities.sum() == pytest.approx(1)
    # independent tokens, the best that one step without a latent can do
    p = density.probabilities
    independent = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
    assert metrics.jensen_shannon(independent, p) == pytest.approx(0.2158, abs=1e-3)


@pytest.mark.parametrize(
    ("density", "noise", "divisor"),
    [(data.swiss_roll(2000), 1.0, 5.0), (data.swiss_roll_es(2000), 0.45, 7.5)],
    ids=["swiss_roll", "swiss_roll_es"],
)
def test_the_swiss_rolls_are_those_of_scikit_learn(density, noise, divisor):
    seed = int(np.random.default_rng(3).integers(2**31))
    points, _ = make_swiss_roll(20_000, noise=noise, random_state=seed)
    expected = density.tokenize(points[:, [0, 2]] / divisor)
    assert (density.sample(20_000, seed=3) == expected).all()


def test_protocol_es_and_e8_have_49_edges_on_their_range():
    for density in (data.swiss_roll_es(), data.eight_modes(seed=3)):
        assert density.vocab_size == 50
        assert len(density.edges) == 49
        assert density.edges[0] == -3
        assert density.edges[-1] == 3
        assert density.tokenize(np.array([[-9.0, 9.0]])).tolist() == [[0, 49]]
        assert len(density.centers()) == 50
    assert (data.eight_modes(seed=1).probabilities != data.eight_modes(seed=2).probabilities).any()


def test_tied_tokens():
    first, second = data.tied_tokens("D1"), data.tied_tokens("D2")
    assert (first.probabilities > 0).sum() == 10
    assert (second.probabilities > 0).sum() == 100
    assert first.entropy == pytest.approx(math.log(10))
    assert second.entropy == pytest.approx(math.log(100))
    x = second.sample(1000)
    assert ((x[:, 1] - x[:, 0]) % 10 == 1).all()
    assert ((x[:, 3] - x[:, 2]) % 10 == 1).all()
    assert ((first.sample(50).diff(dim=-1)) % 10 == 1).all()
    bits = data.tied_bits(784)
    assert bits.sample(9).shape == (9, 784)
    assert bits.entropy == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="too many"):
        _ = bits.probabilities
    with pytest.raises(ValueError, match="'D1' or 'D2', got 'D3'"):
        data.tied_tokens("D3")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.toy("board"), "name must be one of checkerboard, circles"),
        (lambda: data.checkerboard(1), "vocab_size must be an integer of at least 2, got 1"),
        (lambda: data.moons(2.5), "vocab_size"),
        (lambda: data.moons().sample(0), "num_samples must be at least 1"),
        (lambda: data.tied_bits(0), "length must be at least 1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_metrics():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.5, 0.5])
    assert metrics.total_variation(p, q) == pytest.approx(0.5)
    assert metrics.jensen_shannon(p, q) == pytest.approx(0.5 * math.log(2))
    assert metrics.jensen_shannon(p, p) == 0
    assert metrics.kl_divergence(p, q) == math.inf
    assert metrics.kl_divergence(p, torch.tensor([0.25, 0.25, 0.5])) == pytest.approx(math.log(2))
    assert metrics.entropy(p) == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="sums to 2"):
        metrics.total_variation(2 * p, p)
    with pytest.raises(ValueError, match="one shape"):
        metrics.total_variation(p, p[:2])
    x = torch.tensor([[0, 1], [0, 1], [2, 2], [1, 0]])
    assert metrics.histogram(x, 3)[0, 1] == 0.5


def test_validity():
    density = data.eight_modes(seed=0)
    train = density.sample(3000, seed=1)
    fresh = metrics.validity(density.sample(3000, seed=2), train)
    noise = metrics.validity(torch.randint(50, (3000, 2)), train)
    assert fresh > 0.97
    assert noise < 0.5
    line = torch.arange(10).unsqueeze(-1) * torch.tensor([3, 0])
    assert metrics.validity(line[:4] + torch.tensor([0, 2]), line) == 1.0
    assert metrics.validity(line[:4] + torch.tensor([0, 4]), line) == 0.0
