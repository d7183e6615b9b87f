"""Quality of samples: known answers, limits, standard errors, and what they can see."""

from __future__ import annotations

import dataclasses
import doctest
import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from vadd_pyro import data, metrics
from vadd_pyro.experiments import Judge
from vadd_pyro.quality import (
    ImageFeatures,
    NGramModel,
    features,
    frechet_distance,
    ngram_floor,
    ngram_jensen_shannon,
    ngrams,
    token_entropy,
    two_sample_test,
)


def rows_of(num_rows, length, law, seed=0):
    """Independent tokens."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.choice(len(law), size=(num_rows, length), p=law))


def markov_rows(num_rows, length, transition, seed=0):
    """Rows of a Markov chain that starts in its stationary law."""
    values, vectors = np.linalg.eig(transition.T)
    start = np.abs(vectors[:, np.argmax(values.real)].real)
    rng = np.random.default_rng(seed)
    state = rng.choice(len(start), size=num_rows, p=start / start.sum())
    states = [state]
    for _ in range(length - 1):
        u = rng.random((num_rows, 1))
        state = (transition.cumsum(1)[state] < u).sum(1)
        states.append(state)
    return torch.from_numpy(np.stack(states, 1)), start / start.sum()


def bits(law):
    law = np.asarray(law)
    return float(-(law[law > 0] * np.log2(law[law > 0])).sum())


# ---------------------------------------------------------------- images


@pytest.fixture(scope="module")
def digits():
    return data.digits()


@pytest.fixture(scope="module")
def network(digits):
    return ImageFeatures(digits)


def independent_pixels(digits, num_rows, seed=0):
    """What one step of a model without a latent draws at best."""
    rng = np.random.default_rng(seed)
    train = digits.train.numpy()
    chosen = rng.integers(len(train), size=(num_rows, train.shape[1]))
    return torch.from_numpy(train[chosen, np.arange(train.shape[1])])


def test_features_tell_digits_apart_and_come_again_by_their_seed(digits, network):
    assert network.accuracy > 0.9
    assert not network.clustered
    x = digits.rows("test")
    h = network.features(x)
    assert h.shape == (len(x), network.num_features) == (len(x), 64)
    assert h.dtype == np.float32
    assert h.min() == 0
    assert np.array_equal(h, network(x.to(torch.uint8)))
    small = {"hidden_dims": (16, 8), "num_rows": 300, "num_updates": 30}
    one, same, other = (ImageFeatures(digits, **small, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.features(x), same.features(x))
    assert not np.array_equal(one.features(x), other.features(x))
    assert one.features(x).shape == (len(x), 8)


def test_features_are_the_last_hidden_layer_of_the_network(digits, monkeypatch):
    kept = []
    train = features._trained
    monkeypatch.setattr(features, "_trained", lambda *a: kept.append(train(*a)) or kept[0])
    network = ImageFeatures(digits, hidden_dims=(32, 16), num_updates=100)
    (fitted,) = kept
    x = digits.rows("test")
    logits = network.features(x) @ fitted.coefs_[-1] + fitted.intercepts_[-1]
    expected = fitted.predict_log_proba(digits.pictures(x).flatten(1).numpy())
    logits = torch.from_numpy(logits).log_softmax(-1).numpy()
    assert np.allclose(logits, expected, atol=1e-4)


def test_images_without_classes_are_told_by_cluster(digits, network):
    bare = dataclasses.replace(digits, labels=None)
    clustered = ImageFeatures(bare, num_updates=300)
    assert clustered.clustered
    assert clustered.accuracy > 0.8
    real, fake = digits.rows("test"), independent_pixels(digits, 358)
    far = frechet_distance(clustered(real), clustered(fake)).value
    near = frechet_distance(clustered(real[:179]), clustered(real[179:])).value
    assert far > 5 * near


def test_frechet_and_two_samples_see_independent_pixels_not_held_out_digits(digits, network):
    held_out = torch.cat([digits.rows("test"), digits.rows("valid")]).float()
    held_out = held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))]
    real, other = held_out[:268].long(), held_out[268:536].long()
    fake = independent_pixels(digits, 268)
    floor = frechet_distance(network(real), network(other))
    far = frechet_distance(network(real), network(fake))
    assert far.value > 10 * floor.value
    assert far.value - far.bias > 5 * far.stderr
    assert floor.value - floor.bias < 4 * floor.stderr
    told = two_sample_test(real / 16, fake / 16)
    assert told.accuracy > 0.85
    assert told.p_value < 1e-20
    assert two_sample_test(real / 16, other / 16).p_value > 1e-3


def test_errors_of_features_name_the_argument(digits, network):
    with pytest.raises(TypeError, match=r"data must be a vadd_pyro\.data\.DataSet, got list"):
        ImageFeatures([1])
    with pytest.raises(ValueError, match="rows of digits have no shape"):
        ImageFeatures(dataclasses.replace(digits, shape=None))
    for name, value in (("hidden_dims", (0,)), ("num_updates", 0), ("num_rows", 1), ("seed", -1)):
        with pytest.raises(ValueError, match=f"{name} must be an integer"):
            ImageFeatures(digits, **{name: value})
    with pytest.raises(ValueError, match="hidden_dims must name at least one"):
        ImageFeatures(digits, hidden_dims=())
    few = dataclasses.replace(digits, labels=None, train=digits.train[:9])
    with pytest.raises(ValueError, match="num_clusters must be at most 9, the training images"):
        ImageFeatures(few)
    masked = digits.rows("test", 1)
    masked[0, 3] = 17
    with pytest.raises(ValueError, match=r"x\[0, 3\] is 17"):
        network.features(masked)
    with pytest.raises(TypeError, match="integer tokens"):
        network.features(digits.rows("test").float())


# ---------------------------------------------------------------- Fréchet


def normals(num_rows, mean, covariance, seed):
    rng = np.random.default_rng(seed)
    return rng.multivariate_normal(mean, covariance, size=num_rows)


def gaussian_distance(mean_a, cov_a, mean_b, cov_b):
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)


@pytest.mark.parametrize("dims", [1, 5])
def test_frechet_of_normals_nears_the_closed_form(dims):
    rng = np.random.default_rng(dims)
    factors = rng.normal(size=(2, dims, dims)) + np.eye(dims)
    cov_a, cov_b = (f @ f.T for f in factors)
    mean_a, mean_b = rng.normal(size=(2, dims))
    true = gaussian_distance(mean_a, cov_a, mean_b, cov_b)
    a, b = normals(4000, mean_a, cov_a, 0), normals(2000, mean_b, cov_b, 1)
    estimate = frechet_distance(a, b)
    assert estimate.value - estimate.bias == pytest.approx(true, abs=4 * estimate.stderr)
    assert estimate.stderr < 0.1 * true
    assert estimate.value == pytest.approx(
        gaussian_distance(
            a.mean(0), np.cov(a.T).reshape(dims, -1), b.mean(0), np.cov(b.T).reshape(dims, -1)
        )
    )


def test_frechet_is_symmetric_zero_on_itself_and_squared_in_a_translation():
    a, b = normals(300, np.zeros(4), np.eye(4), 0), normals(200, np.ones(4), 2 * np.eye(4), 1)
    assert frechet_distance(a, a).value == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    shift = np.array([1.0, -2.0, 0.0, 0.5])
    assert frechet_distance(a, a + shift).value == pytest.approx((shift**2).sum())
    assert frechet_distance(a, b, seed=0).value == frechet_distance(a, b, seed=1).value
    assert frechet_distance(a, b, seed=0) == frechet_distance(a, b, seed=0)
    assert frechet_distance(a, b, seed=0).stderr != frechet_distance(a, b, seed=1).stderr
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == frechet_distance(a, b)


def test_frechet_of_singular_covariances_is_finite():
    a = normals(60, np.zeros(3), np.eye(3), 0)
    wide = np.concatenate([a, a, np.zeros((60, 2))], 1)  # rank 3 of 8
    assert np.isfinite(frechet_distance(wide, 2 * wide)).all()
    assert frechet_distance(wide, 2 * wide).value == pytest.approx(
        2 * np.trace(np.cov(a.T)) + 2 * (a.mean(0) ** 2).sum()
    )
    constant = np.ones((60, 8))
    assert frechet_distance(constant, constant) == (0, 0, 0)
    assert np.isfinite(frechet_distance(wide, constant)).all()
    many = np.random.default_rng(0).normal(size=(2, 60, 100))  # more features than rows
    assert np.isfinite(frechet_distance(*many)).all()


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_bias_and_standard_error_of_frechet_are_those_of_repeated_draws(shift):
    dims, size, draws = 6, 200, 60
    true = dims * shift**2
    estimates = []
    for seed in range(draws):
        a = normals(size, np.zeros(dims), np.eye(dims), (seed, 0))
        b = normals(size, np.full(dims, shift), np.eye(dims), (seed, 1))
        estimates.append(frechet_distance(a, b, num_groups=25))
    values, errors, biases = np.array(estimates).T
    spread = values.std(ddof=1)
    assert values.mean() - true > 4 * spread / draws**0.5  # too large from few rows,
    corrected = values - biases  # and the jackknife knows by how much
    assert corrected.mean() == pytest.approx(true, abs=4 * corrected.std() / draws**0.5)
    ratio = errors.mean() / spread  # a spread of 60 draws is known to 9 per cent
    low, high = (0.65, 1.4) if shift else (0.9, 2.0)
    assert low < ratio < high


def test_errors_of_frechet_name_the_argument():
    x = np.zeros((60, 3))
    with pytest.raises(ValueError, match=r"b must have shape \(N, F\), got \(60,\)"):
        frechet_distance(x, x[:, 0])
    with pytest.raises(ValueError, match="same number of features, got 3 and 2"):
        frechet_distance(x, x[:, :2])
    with pytest.raises(ValueError, match="a has 49 rows: expected at least 50"):
        frechet_distance(x[:49], x)
    with pytest.raises(ValueError, match="b must be finite"):
        frechet_distance(x, np.full_like(x, np.nan))
    with pytest.raises(ValueError, match="num_groups must be an integer of at least 2"):
        frechet_distance(x, x, num_groups=1)


# ---------------------------------------------------------------- two samples


@pytest.mark.parametrize("columns", ["numbers", "many numbers", "codes"])
def test_two_samples_of_one_law_are_not_told_apart_and_of_two_laws_are(columns):
    generator = torch.Generator().manual_seed(0)
    if columns == "many numbers":
        base = torch.randn(600, 70, generator=generator)
        other = base + 0.5
    else:  # the same law in every column
        base = torch.randn(600, 3, generator=generator)
        base = base if columns == "numbers" else torch.randint(5, (600, 3), generator=generator)
        other = base.clone()
        other[:, 1] = other[:, 0] if columns == "numbers" else 4 - other[:, 0]
    p_values = []
    for seed in range(3):
        test = two_sample_test(base[:300], base[300:], seed=seed)
        assert test.accuracy == pytest.approx(0.5, abs=4 * test.stderr)
        p_values.append(test.p_value)
    assert min(p_values) > 1e-3
    test = two_sample_test(base[:300], other[300:], seed=0)
    assert test.accuracy > 0.5 + 6 * test.stderr
    assert test.p_value < 1e-6
    assert two_sample_test(base[:300], other[300:], seed=0) == test
    assert two_sample_test(base[:300], other[300:], seed=1) != test


def test_two_samples_of_other_sizes_are_cut_to_one():
    real = torch.randn(500, 2)
    test = two_sample_test(real, real[:100] + 3)
    assert test.accuracy > 0.9
    assert test.stderr > 0.4 * (test.accuracy * (1 - test.accuracy) / 200) ** 0.5
    # If the larger sample were used whole, the share of its rows would give half of 5 to 1 away.
    assert two_sample_test(real[:400], real[400:]).accuracy < 0.65


def test_two_samples_by_a_classifier_of_ones_own():
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    real = torch.randn(400, 2, generator=generator)
    fake = torch.randn(400, 2, generator=generator) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])
    assert two_sample_test(real, fake, classifier=LogisticRegression()).p_value > 1e-3
    assert two_sample_test(real, fake).p_value < 1e-6


def test_errors_of_two_samples_name_the_argument():
    x = torch.zeros(30, 2)
    with pytest.raises(TypeError, match="real must be a tensor, got list"):
        two_sample_test([0], x)
    with pytest.raises(ValueError, match=r"fake must have shape \(N, d\), got \(30,\)"):
        two_sample_test(x, x[:, 0])
    with pytest.raises(ValueError, match=r"same columns, got shapes \(30, 2\) and \(30, 1\)"):
        two_sample_test(x, x[:, :1])
    with pytest.raises(ValueError, match="fake has 19 rows"):
        two_sample_test(x, x[:19])
    with pytest.raises(ValueError, match="real must be finite"):
        two_sample_test(x / 0, x)
    with pytest.raises(TypeError, match="both be numbers or both codes"):
        two_sample_test(x, x.long())
    with pytest.raises(ValueError, match="codes below 255"):
        two_sample_test(x.long(), x.long() + 255)
    with pytest.raises(ValueError, match="codes of at least 0, got -1"):
        two_sample_test(x.long(), x.long() - 1)


# ---------------------------------------------------------------- n-gram models


@pytest.mark.parametrize("order", [0, 1, 3])
def test_an_ngram_model_sums_to_one_in_every_context(order):
    x = rows_of(40, 9, [0.6, 0.3, 0.1, 0.0])
    model = NGramModel(x, order, vocab_size=4)
    contexts = torch.cartesian_prod(*[torch.arange(4)] * 4)  # longer, and many never seen
    rows = torch.cat([contexts.repeat_interleave(4, 0), torch.arange(4).repeat(256)[:, None]], 1)
    log_prob = model.log_prob(rows)
    total = log_prob[:, -1].exp().reshape(256, 4).sum(1)
    assert torch.allclose(total, torch.ones_like(total), atol=1e-12)
    assert log_prob.exp().min() > 0
    assert torch.allclose(model.log_prob(rows[:, :2]), log_prob[:, :2])


def test_an_ngram_model_agrees_with_counting_by_hand():
    x = torch.tensor([[0, 1, 1, 0, 2], [1, 1, 0, 1, 2]])
    model = NGramModel(x, 2, vocab_size=3)
    unigram = {w: (n + 3 / 3) / (10 + 3) for w, n in ((0, 3), (1, 5), (2, 2))}
    # After 1 come 1, 0, 1, 0, 2; after (0, 1) comes 1, then 2.
    after_one = {w: (n + 3 * unigram[w]) / (5 + 3) for w, n in ((0, 2), (1, 2), (2, 1))}
    after_both = {w: (n + 2 * after_one[w]) / (2 + 2) for w, n in ((0, 0), (1, 1), (2, 1))}
    for token in range(3):
        log_prob = model.log_prob(torch.tensor([[0, 1, token]]))[0]
        assert log_prob[2].exp().item() == pytest.approx(after_both[token])
        assert model.log_prob(torch.tensor([[1, token]]))[0, 1].exp().item() == pytest.approx(
            after_one[token]
        )
    # (2, 1) was never seen, so that the context is 1 alone; 2 was followed by nothing.
    log_prob = model.log_prob(torch.tensor([[2, 1, 0]]))[0].exp()
    expected = [unigram[2], unigram[1], after_one[0]]
    assert log_prob.tolist() == pytest.approx(expected)


def test_sorting_and_tables_count_alike(monkeypatch):
    x = rows_of(30, 20, np.full(50, 0.02))
    tables = ngrams.distinct(x.numpy(), 50)
    assert 4 * x.numel() < 10**6
    sorted_ = ngrams.distinct(x.numpy(), 10**6)
    for one, other in zip(tables, sorted_, strict=True):
        assert np.array_equal(one, other)
    seen, counts, ranks = tables
    assert np.array_equal(seen[ranks], x.numpy())
    assert np.array_equal(np.bincount(ranks.ravel()), counts)


def test_an_independent_source_costs_its_entropy_at_any_order():
    law = [0.5, 0.25, 0.15, 0.1]
    train, test = rows_of(1, 200_000, law), rows_of(200, 100, law, seed=1)
    for order in (0, 1, 3):
        result = NGramModel(train, order, 4).bits_per_token(test)
        assert result.bits == pytest.approx(bits(law), abs=4 * result.stderr + 0.002)
        per_token = -np.log2(law) @ (np.array(law) * -np.log2(law)) - bits(law) ** 2
        assert result.stderr == pytest.approx((per_token / test.numel()) ** 0.5, rel=0.25)
    wrong = NGramModel(train, 1, 4).bits_per_token(rows_of(200, 100, law[::-1], seed=1))
    cross = float(-(np.array(law[::-1]) * np.log2(law)).sum())
    assert wrong.bits == pytest.approx(cross, abs=4 * wrong.stderr + 0.01)


def test_a_chain_costs_its_entropy_rate_from_the_right_order_on():
    transition = np.array([[0.9, 0.1, 0.0], [0.0, 0.8, 0.2], [0.5, 0.0, 0.5]])
    train, start = markov_rows(200, 500, transition)
    test, _ = markov_rows(400, 50, transition, seed=1)
    rate = float(start @ [bits(row) for row in transition])
    expected = (bits(start) + 49 * rate) / 50  # the first token of a row has no context
    costs = [NGramModel(train, order, 3).bits_per_token(test) for order in range(4)]
    assert costs[0].bits == pytest.approx(bits(start), abs=4 * costs[0].stderr + 0.001)
    assert costs[1].bits == pytest.approx(expected, abs=4 * costs[1].stderr + 0.001)
    assert costs[3].bits == pytest.approx(costs[1].bits, abs=0.01)
    assert costs[0].bits > costs[1].bits + 0.3


def test_a_cycle_costs_nearly_nothing_and_another_cycle_much():
    cycle = torch.arange(4000).remainder(5).reshape(1, -1)
    model = NGramModel(cycle, 2, vocab_size=5)
    again = torch.arange(400).remainder(5).reshape(2, -1)
    first = (math.log2(5)) / 200
    assert model.bits_per_token(again).bits == pytest.approx(first, abs=0.01)
    assert model.bits_per_token(again.flip(1)).bits > 5


def test_contexts_do_not_cross_rows():
    x = torch.tensor([[0, 1]] * 50 + [[2, 0]] * 50)
    model = NGramModel(x, 1, vocab_size=3)
    joined = NGramModel(x.reshape(1, -1), 1, vocab_size=3)
    row = torch.tensor([[1, 2]])
    assert model.log_prob(row)[0, 1].exp() == pytest.approx((50 + 1) / (200 + 3))
    assert joined.log_prob(row)[0, 1] < model.log_prob(row)[0, 1]


def test_errors_of_ngram_models_name_the_argument():
    x = torch.zeros(4, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="order must be less than 3"):
        NGramModel(x, 3, 2)
    with pytest.raises(ValueError, match="order must be an integer of at least 0"):
        NGramModel(x, -1, 2)
    with pytest.raises(ValueError, match="vocab_size must be an integer of at least 2"):
        NGramModel(x, 1, 1)
    with pytest.raises(ValueError, match=r"x\[0, 0\] is 2: expected tokens in 0..1"):
        NGramModel(x + 2, 1, 2)
    with pytest.raises(TypeError, match="x must be a tensor of tokens, got list"):
        NGramModel([[0, 1]], 1, 2)
    model = NGramModel(x, 1, 2)
    with pytest.raises(ValueError, match="x has 1 row"):
        model.bits_per_token(x[:1])
    with pytest.raises(TypeError, match="integer tokens"):
        model.log_prob(x.float())
    with pytest.raises(ValueError, match=r"x must have shape \(N, D\), not empty, got \(0, 3\)"):
        model.log_prob(x[:0])


# ---------------------------------------------------------------- distances and entropies of text


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ngram_distance_agrees_with_that_of_histograms(n):
    a, b = rows_of(50, 8, [0.5, 0.3, 0.2]), rows_of(80, 6, [0.2, 0.2, 0.6], seed=1)
    laws = [metrics.histogram(x.unfold(1, n, 1).reshape(-1, n), 3) for x in (a, b)]
    result = ngram_jensen_shannon(a, b, n)
    assert result.value == pytest.approx(metrics.jensen_shannon(*laws), abs=1e-12)
    assert ngram_jensen_shannon(b, a, n) == pytest.approx(result)


def test_ngram_distance_is_zero_for_one_set_and_ln_2_for_two_alphabets():
    x = rows_of(30, 12, np.full(27, 1 / 27))
    for n in (1, 4, 12):
        assert ngram_jensen_shannon(x, x, n) == (0, 0)
        assert ngram_jensen_shannon(x, x.flip(0), n).value == 0
        far = ngram_jensen_shannon(x, x + 27, n)
        assert far.value == pytest.approx(math.log(2), abs=1e-12)
        assert far.value <= math.log(2)
    big = x * 10**9  # codes of two tokens pass 2 ** 63 unless they are numbered again
    assert ngram_jensen_shannon(big, big.flip(1), 2).value == pytest.approx(
        ngram_jensen_shannon(x, x.flip(1), 2).value
    )


def test_standard_errors_of_text_are_those_of_repeated_draws():
    draws = 60
    chains = [
        np.array([[0.8, 0.2], [0.3, 0.7]]),
        np.array([[0.6, 0.4], [0.4, 0.6]]),
    ]
    distances, entropies = [], []
    for seed in range(draws):
        a, b = (markov_rows(100, 30, c, seed=(seed, i))[0] for i, c in enumerate(chains))
        distances.append(ngram_jensen_shannon(a, b, 2))
        entropies.append(token_entropy(a))
    pairs = [tuple(zip(*distances, strict=True))]
    values = list(zip(*entropies, strict=True))
    pairs += [(values[0], values[1]), (values[2], values[3])]
    for value, error in pairs:
        assert 0.7 < np.mean(error) / np.std(value, ddof=1) < 1.4  # four errors of 60 draws


def test_real_text_is_apart_from_itself_by_the_floor():
    train = data.text.characters(length=64)
    real = train.rows("train", 1200)
    floors = [ngram_floor(real, n, 400).value for n in (1, 2, 3, 4)]
    assert floors == sorted(floors)
    assert floors[0] > 0
    assert ngram_floor(real, 3, 100).value > ngram_floor(real, 3, 600).value
    assert ngram_floor(real, 3, 400, 800).value < floors[2]
    assert ngram_floor(real, 2, 400, seed=1) == ngram_floor(real, 2, 400, seed=1)
    assert ngram_floor(real, 2, 400, seed=1) != ngram_floor(real, 2, 400, seed=2)
    # Tokens of real text in random order: right in single tokens, wrong in pairs.
    order = torch.randperm(400 * 64, generator=torch.Generator().manual_seed(0))
    mixed = real[:400].reshape(-1)[order].reshape(400, 64)
    assert ngram_jensen_shannon(mixed, real[400:800], 1).value < 3 * floors[0]
    assert ngram_jensen_shannon(mixed, real[400:800], 2).value > 3 * floors[1]
    model = NGramModel(train.rows("train"), 3, train.vocab_size)
    held_out = model.bits_per_token(train.rows("test"))
    assert model.bits_per_token(mixed).bits > held_out.bits + 1


def test_entropy_shows_every_kind_of_collapse():
    length, law = 256, np.full(8, 1 / 8)
    x = rows_of(500, length, law)
    even = token_entropy(x)
    assert even.pooled == pytest.approx(3, abs=1e-3)
    assert even.within_rows == pytest.approx(3 - 7 / (2 * length * math.log(2)), abs=0.005)
    assert even.distinct_rows == 1
    assert even.pooled <= 3
    few_words = token_entropy(x % 2)
    assert few_words.pooled == pytest.approx(1, abs=1e-3)
    one_token_each = token_entropy(x[:, :1].expand(-1, length))
    assert one_token_each.pooled > 2.9
    assert one_token_each.within_rows == one_token_each.within_rows_stderr == 0
    one_row = token_entropy(x[:1].expand(500, -1))
    assert one_row.within_rows > 2.9
    assert one_row.pooled == pytest.approx(one_row.within_rows)
    assert one_row.distinct_rows == 1 / 500


def test_errors_of_text_name_the_argument():
    x = torch.zeros(4, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="n must be at most 3, the length of the rows of b"):
        ngram_jensen_shannon(torch.zeros(4, 5, dtype=torch.long), x, 4)
    with pytest.raises(ValueError, match="n must be an integer of at least 1"):
        ngram_jensen_shannon(x, x, 0)
    with pytest.raises(ValueError, match="a has 1 row"):
        ngram_jensen_shannon(x[:1], x, 1)
    with pytest.raises(ValueError, match=r"b\[0, 0\] is -1"):
        ngram_jensen_shannon(x, x - 1, 1)
    with pytest.raises(ValueError, match="real has 4 rows: expected at least 5"):
        ngram_floor(x, 1, 2, 3)
    with pytest.raises(ValueError, match="num_reference must be an integer of at least 2"):
        ngram_floor(x, 1, 2, 1)
    with pytest.raises(TypeError, match="integer tokens"):
        token_entropy(x.float())


@pytest.mark.parametrize("module", [features, ngrams])
def test_docstring_examples(module):
    found = doctest.testmod(module, extraglobs={"torch": torch})
    assert found.attempted > 0
    assert found.failed == 0


def test_frechet_distance_of_real_rows_less_its_bias_is_about_zero(digits):
    judge = Judge(digits, num_samples=359)
    floor = {row["metric"]: row for row in judge.floor}
    raw, unbiased = floor["frechet"], floor["frechet_unbiased"]
    assert unbiased["stderr"] == raw["stderr"]
    assert unbiased["value"] < raw["value"]
    assert abs(unbiased["value"]) < 4 * raw["stderr"]
    noise = torch.randint(2, (359, digits.length), generator=torch.Generator().manual_seed(0))
    far = {row["metric"]: row["value"] for row in judge(noise)}
    assert far["frechet_unbiased"] > 10 * raw["value"]
