"""What latents carry and couple over time, against exact laws and known answers."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import all_rows, codes_of, small_pair
from pyro.distributions.torch_distribution import TorchDistribution

from vadd_pyro import CosineSchedule, MaskedDiffusionELBO, MaskingProcess, zoo
from vadd_pyro.exact import exact_distribution
from vadd_pyro.inspection import coupling
from vadd_pyro.inspection.over_time import (
    statistics_over_time,
    total_correlation,
    true_total_correlation,
)
from vadd_pyro.monitor import latent_statistics

LENGTH = 3
TIED = MaskingProcess(2, LENGTH)
TERNARY = MaskingProcess(3, 3)
ROWS = torch.tensor([[0, 1, 2], [1, 1, 0]])


def tied_rows(num_rows):
    return torch.arange(num_rows).remainder(2).unsqueeze(-1).repeat(1, LENGTH)


def tied(batch):
    """Tied fair bits, perfectly: the sign of z says which where no token is visible."""
    with pyro.plate("data", len(batch), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        seen = torch.where(batch.masked, 0, 2 * batch.x_t - 1).sum(-1)
        sign = torch.where(seen == 0, z.sign(), seen.sign())
        logits = 20 * sign.unsqueeze(-1).expand(*sign.shape, LENGTH)
        law = dist.Categorical(logits=torch.stack([-logits, logits], -1))
        pyro.sample("x_0", law.mask(batch.target).to_event(1), obs=batch.x_0)


class HalfNormal(TorchDistribution):
    """The side of a standard normal that a row's sign says, the whole where it is zero."""

    arg_constraints: ClassVar = {}
    support = dist.constraints.real
    has_rsample = True

    def __init__(self, sign):
        self.sign = sign
        super().__init__(sign.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return HalfNormal(self.sign.expand(batch_shape))

    def rsample(self, sample_shape=()):
        z = torch.randn(sample_shape + self.sign.shape)
        return torch.where(self.sign == 0, z, z.abs() * self.sign)

    def log_prob(self, value):
        whole = dist.Normal(0.0, 1.0).log_prob(value)
        half = torch.where(value * self.sign > 0, whole + math.log(2), -math.inf)
        return torch.where(self.sign == 0, whole, half)


def tied_guide(batch):
    with pyro.plate("data", len(batch), dim=-1):
        sign = torch.where(batch.masked.all(-1), 2.0 * batch.x_0[:, 0] - 1, 0.0)
        pyro.sample("z", HalfNormal(sign))


# ------------------------------------------------------------------- known laws


def log_ratio(law):
    """Log of a joint over the product of its marginals."""
    result = law.log()
    for axis in range(law.dim()):
        others = [other for other in range(law.dim()) if other != axis]
        shape = [-1 if other == axis else 1 for other in range(law.dim())]
        result = result - law.sum(others).log().reshape(shape)
    return result


def states_of(process, t):
    """Every set of masked positions with at least two, and its probability."""
    alpha = float(process.schedule.alpha(torch.tensor(t)))
    for masked in itertools.product([False, True], repeat=process.length):
        number = sum(masked)
        probability = (1 - alpha) ** number * alpha ** (process.length - number)
        if number > 1 and probability > 0:
            yield [j for j in range(process.length) if masked[j]], probability


def exact_coupling(model, process, x_0, t):
    """Total correlation and gain by exact laws of single steps, over all states of some rows."""
    value = gain = 0.0
    for row in x_0:
        for masked, probability in states_of(process, t):
            x_t = row.clone()
            x_t[masked] = process.mask_id
            start = {} if len(masked) == process.length else {"x_start": x_t, "t_start": t}
            law = exact_distribution(model, process, 1, **start)
            index = [slice(None) if j in masked else int(row[j]) for j in range(process.length)]
            ratio = log_ratio(law[tuple(index)])
            value += probability * float((law[tuple(index)] * ratio).sum())
            gain += probability * float(ratio[tuple(row[masked])])
    return value / len(x_0), gain / len(x_0)


def test_total_correlation_of_tied_bits_in_closed_form():
    law = torch.zeros(2, 2, 2)
    law[0, 0, 0] = law[1, 1, 1] = 0.5
    times = (0.2, 0.5, 1.0)
    result = true_total_correlation(law, TIED, times)
    assert result.tolist() == pytest.approx([2 * math.log(2) * t**3 for t in times], rel=1e-6)


def test_total_correlation_of_a_known_law_is_the_average_over_its_states():
    process = MaskingProcess(3, 3, CosineSchedule())
    law = torch.rand(3, 3, 3, dtype=torch.double) ** 3
    law = law / law.sum()
    expected = []
    for t in (0.3, 0.8, 1.0):
        total = 0.0
        for masked, probability in states_of(process, t):
            visible = [j for j in range(3) if j not in masked]
            for seen in itertools.product(range(3), repeat=len(visible)):
                index = [slice(None)] * 3
                for j, token in zip(visible, seen, strict=True):
                    index[j] = token
                part = law[tuple(index)]
                conditional = part / part.sum()
                total += probability * float((part * log_ratio(conditional)).sum())
        expected.append(total)
    result = true_total_correlation(law, process, (0.3, 0.8, 1.0))
    assert result.tolist() == pytest.approx(expected, rel=1e-6)


def test_independent_tokens_have_none():
    law = torch.einsum("i,j,k->ijk", *torch.rand(3, 3).softmax(-1))
    assert true_total_correlation(law, TERNARY).abs().max() < 1e-6


def test_many_binary_positions_are_possible():
    law = torch.zeros((2,) * 12)
    law[(0,) * 12] = law[(1,) * 12] = 0.5
    result = true_total_correlation(law, MaskingProcess(2, 12), (1.0, 0.5))
    assert result.tolist() == pytest.approx([11 * math.log(2), 11 * math.log(2) / 4096])


# ------------------------------------------------------------------- estimates


def test_a_perfect_model_of_tied_bits_couples_what_the_law_does():
    times = (0.3, 0.7, 1.0)
    law = torch.zeros(2, 2, 2)
    law[0, 0, 0] = law[1, 1, 1] = 0.5
    truth = true_total_correlation(law, TIED, times)
    result = total_correlation(tied, tied_guide, TIED, tied_rows(1000), times, seed=0)
    for i in range(3):
        assert abs(result.value[i] - truth[i]) < 4 * result.stderr[i] + 1e-3
        assert abs(result.gain[i] - truth[i]) < 4 * result.gain_stderr[i] + 0.01
        assert result.lower[i] < result.value[i] < result.upper[i]
    assert 0 < result.stderr[2] < 0.01  # at t = 1 nothing but the estimate varies
    assert result.upper[2] - result.lower[2] < 0.1


@pytest.mark.parametrize("t", [0.6, 1.0])
@pytest.mark.parametrize(
    "prior", ["standard_normal", "conditional_normal", "mixture_of_normals", "categorical"]
)
def test_estimates_agree_with_exact_laws(prior, t):
    model, guide = small_pair(prior, TERNARY, spread=6.0)
    value, gain = exact_coupling(model, TERNARY, ROWS, t)
    result = total_correlation(model, guide, TERNARY, ROWS.repeat(1000, 1), (t,), seed=1)
    assert value > 0.1
    assert result.stderr < 0.2 * value
    assert float(result.value) == pytest.approx(value, abs=4 * float(result.stderr))
    assert result.lower - 4 * result.stderr < value < result.upper + 4 * result.stderr
    assert result.upper - result.lower < 0.25 * value + 0.01
    if prior == "categorical":
        assert torch.equal(result.lower, result.upper)
        assert float(result.gain) == pytest.approx(gain, abs=4 * float(result.gain_stderr) + 1e-6)
    else:  # the joint is from below, for a guide that was never trained
        assert result.gain < gain + 4 * result.gain_stderr
        assert result.gain > gain - 4 * result.gain_stderr - 0.1


def test_few_draws_widen_the_bounds_around_the_value(monkeypatch):
    """With 24 draws the ends are off by many errors, to either side; the middle is not."""
    monkeypatch.setattr(coupling, "_SHARED", 0)  # each state takes no more than its own draws
    model, guide = small_pair("standard_normal", TERNARY, spread=6.0)
    value, gain = exact_coupling(model, TERNARY, ROWS, 1.0)
    results = [
        total_correlation(
            model,
            guide,
            TERNARY,
            ROWS.repeat(100, 1),
            (1.0,),
            num_draws=24,
            num_particles=24,
            seed=seed,
        )
        for seed in range(40)
    ]

    def over_seeds(name):
        values = torch.stack([getattr(result, name) for result in results])
        return float(values.mean()), float(values.std() / 40**0.5)

    low, middle, high = (over_seeds(name) for name in ("lower", "value", "upper"))
    assert low[0] < value - 6 * low[1]
    assert high[0] > value + 6 * high[1]
    half = (high[0] - low[0]) / 2
    assert middle[0] == pytest.approx(value, abs=4 * middle[1] + 0.2 * half)
    # The marginals at the data's tokens are corrected, the joint is from below.
    assert gain - 0.2 < over_seeds("gain")[0] < gain + 4 * over_seeds("gain")[1]
    # What is said to be the error is the spread over seeds; for the gain, a little more.
    for name, error in (("value", "stderr"), ("gain", "gain_stderr")):
        said, spread = over_seeds(error)[0], over_seeds(name)[1] * 40**0.5
        assert spread == pytest.approx(said, rel=0.35)


@pytest.mark.parametrize("width", [0.05, 5.0, None])
def test_no_guide_spoils_the_value(width):
    """A guide that is far too narrow or too wide, or that has no density at given latents."""
    model, _ = small_pair("standard_normal", TERNARY, spread=6.0)

    def guide(batch):
        with pyro.plate("data", len(batch), dim=-1):
            loc = torch.zeros(len(batch), 2)
            if width is not None:
                pyro.sample("z", dist.Normal(loc, width).to_event(1))
                return
            law = dist.Normal(loc, 1.0).to_event(1)
            raw = pyro.sample("raw", law, infer={"is_auxiliary": True})
            log_density = -2 * torch.full(raw.shape[:-1], math.log(0.5))
            pyro.sample("z", dist.Delta(raw / 2, log_density=log_density, event_dim=1))

    value, _ = exact_coupling(model, TERNARY, ROWS, 1.0)
    result = total_correlation(model, guide, TERNARY, ROWS.repeat(1000, 1), (1.0,), seed=2)
    assert float(result.value) == pytest.approx(value, abs=4 * float(result.stderr))
    assert result.lower - 4 * result.stderr < value < result.upper + 4 * result.stderr


def test_a_good_guide_narrows_the_bounds():
    """Eight tied bits and a latent of which one in fifty values tells the rows apart."""
    process = MaskingProcess(2, 8)
    law = torch.distributions.Normal(0.0, 1.0)

    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            bit = (law.cdf(z) * 256).floor().clamp(0, 255).long()
            bits = bit.unsqueeze(-1) // 2 ** torch.arange(8) % 2
            logits = torch.stack([4.0 - 8.0 * bits, 8.0 * bits - 4.0], -1)
            law_x = dist.Categorical(logits=logits).mask(batch.target)
            pyro.sample("x_0", law_x.to_event(1), obs=batch.x_0)

    def guide(batch):
        number = (batch.x_0 * 2 ** torch.arange(8)).sum(-1)
        with pyro.plate("data", len(batch), dim=-1):
            low, high = (law.icdf(((number + i) / 256).clamp(1e-6, 1 - 1e-6)) for i in (0, 1))
            pyro.sample("z", dist.Normal((low + high) / 2, (high - low).clamp_min(0.01)))

    def prior_guide(batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(len(batch)), 1.0))

    x_0 = all_rows(2, 8)
    results = [
        total_correlation(model, program, process, x_0, (1.0,), seed=0)
        for program in (guide, prior_guide)
    ]
    good, poor = (float(result.upper - result.lower) for result in results)
    noise = torch.distributions.Bernoulli(logits=torch.tensor(8.0)).entropy()
    truth = 8 * (math.log(2) - float(noise)) - 8 * (math.log(2) - float(noise))
    assert truth == 0.0  # every row is as likely as any other: nothing is coupled
    assert float(results[0].value) == pytest.approx(0, abs=4 * float(results[0].stderr))
    assert good < 1.0 < 2.0 < poor


def test_without_a_latent_it_is_exactly_zero():
    model, guide = small_pair("none", TERNARY)
    result = total_correlation(model, guide, TERNARY, ROWS, (0.5, 1.0), seed=0)
    for field in result[1:]:
        assert torch.equal(field, torch.zeros(2, dtype=torch.double))


def test_a_latent_that_the_decoder_ignores_couples_nothing():
    model, guide = small_pair("standard_normal", TERNARY)
    torch.nn.init.zeros_(model.decoder.latent.weight)
    result = total_correlation(model, guide, TERNARY, ROWS.repeat(50, 1), (0.5, 1.0), seed=0)
    # The guide is not the prior, so that even a constant is not averaged without error.
    assert (result.value.abs() < 4 * result.stderr + 1e-3).all()
    assert (result.value.abs() < 0.05).all()


@pytest.mark.parametrize("guide", ["enumerate", "score"])
def test_codes_are_summed_though_the_guide_draws_them(guide):
    model, guide, _ = zoo.build("product", guide, TERNARY, hidden_dim=16, num_codes=9)
    torch.nn.init.normal_(model.decoder.latent.weight, std=3.0)
    result = total_correlation(model, guide, TERNARY, ROWS.repeat(300, 1), (1.0,), seed=0)
    value, _ = exact_coupling(model, TERNARY, ROWS, 1.0)
    assert torch.equal(result.lower, result.upper)
    assert float(result.value) == pytest.approx(value, abs=4 * float(result.stderr))


@pytest.mark.parametrize("has_code", [False, True])
def test_codes_beside_a_continuous_latent_are_summed_unless_the_guide_draws_them(has_code):
    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            code = pyro.sample("c", dist.Categorical(torch.tensor([0.7, 0.3])))
            z = pyro.sample("z", dist.Normal(3.0 * code - 1, 1.0))
            scores = torch.broadcast_tensors(z + 2 * code, -z, 0 * z)
            logits = torch.stack(scores, -1).unsqueeze(-2)
            law = dist.Categorical(logits=logits.expand(*logits.shape[:-2], 3, 3))
            pyro.sample("x_0", law.mask(batch.target).to_event(1), obs=batch.x_0)

    def guide(batch):
        with pyro.plate("data", len(batch), dim=-1):
            if has_code:
                pyro.sample("c", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("z", dist.Normal(1.0 - batch.x_0.float().mean(-1), 1.5))

    points, weights = torch.tensor([-1.0, 2.0]), torch.tensor([0.7, 0.3])
    grid = torch.linspace(-8, 10, 4001, dtype=torch.double)
    law = torch.zeros(3, 3, 3, dtype=torch.double)
    for code in (0, 1):
        density = torch.exp(-((grid - points[code]) ** 2) / 2)
        mu = torch.stack([grid + 2 * code, -grid, 0 * grid], -1).softmax(-1)
        law += weights[code] * torch.einsum("z,zi,zj,zk->ijk", density / density.sum(), mu, mu, mu)
    truth = float((law * log_ratio(law)).sum())
    result = total_correlation(model, guide, TERNARY, ROWS.repeat(1000, 1), (1.0,), seed=0)
    assert truth > 0.2
    assert float(result.value) == pytest.approx(truth, abs=4 * float(result.stderr))
    assert result.lower < truth + 4 * result.stderr
    assert result.upper > truth - 4 * result.stderr


def test_plates_inside_the_rows_are_the_same_as_vectors():
    weight = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)) * 2

    def tokens(z, batch):
        logits = (z @ weight).reshape(*z.shape[:-1], 3, 3)
        law = dist.Categorical(logits=logits).mask(batch.target).to_event(1)
        pyro.sample("x_0", law, obs=batch.x_0)

    def inner(batch):
        with pyro.plate("data", len(batch), dim=-1):
            with pyro.plate("inner", 2, dim=-2):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            # The plates' dimension goes to the event, and a dimension of size one stays.
            tokens(z.movedim(-2, -1).unsqueeze(-3), batch)

    def inner_guide(batch):
        with pyro.plate("data", len(batch), dim=-1), pyro.plate("inner", 2, dim=-2):
            pyro.sample("z", dist.Normal(0.0, 0.8))

    def vector(batch):
        with pyro.plate("data", len(batch), dim=-1):
            tokens(pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1)), batch)

    truth, _ = exact_coupling(vector, TERNARY, ROWS, 1.0)
    result = total_correlation(
        inner, inner_guide, TERNARY, ROWS.repeat(500, 1), (1.0,), max_plate_nesting=2, seed=0
    )
    assert float(result.value) == pytest.approx(truth, abs=4 * float(result.stderr))


def test_pieces_of_states_and_rows_give_the_same(monkeypatch):
    model, guide = small_pair("categorical", TERNARY, spread=6.0)
    x_0 = torch.randint(3, (60, 3))
    whole = total_correlation(model, guide, TERNARY, x_0, (0.5, 1.0), seed=0)
    monkeypatch.setattr(coupling, "_CHUNK", 4 * 12 * 7)
    parts = total_correlation(model, guide, TERNARY, x_0, (0.5, 1.0), seed=0)
    assert torch.allclose(whole.gain, parts.gain, atol=1e-6)
    assert (whole.value - parts.value).abs().max() < 4 * (whole.stderr + parts.stderr).max()
    model, guide = small_pair("standard_normal", TERNARY, spread=6.0)
    monkeypatch.setattr(coupling, "_CHUNK", 12 * 192 * 60)
    value, _ = exact_coupling(model, TERNARY, ROWS, 0.6)
    result = total_correlation(model, guide, TERNARY, ROWS.repeat(500, 1), (0.6,), seed=0)
    assert float(result.value) == pytest.approx(value, abs=4 * float(result.stderr))


PAIRS = [(prior, "auto") for prior in zoo.PRIORS]
PAIRS += [("standard_normal", g) for g in ("low_rank", "full", "flow", "semi_amortized")]
PAIRS += [("mixture", "mixture"), ("hierarchical", "bottom_up")]


@pytest.mark.parametrize(("prior", "guide"), PAIRS)
def test_every_pair_of_the_zoo_is_followed_over_time(prior, guide):
    process = MaskingProcess(3, 4)
    model, guide, _ = zoo.build(prior, guide, process, hidden_dim=16, num_codes=codes_of(prior))
    x_0 = torch.randint(3, (30, 4))
    before = torch.random.get_rng_state()
    options = {"num_draws": 16, "num_particles": 8, "seed": 3}
    result = total_correlation(model, guide, process, x_0, (0.5, 1.0), **options)
    assert torch.equal(before, torch.random.get_rng_state())
    again = total_correlation(model, guide, process, x_0, (0.5, 1.0), **options)
    for one, other in zip(result, again, strict=True):
        assert torch.equal(one, other)
        assert one.shape == (2,)
        assert one.isfinite().all()
    statistics = statistics_over_time(model, guide, process, x_0, (0.5, 1.0))
    assert statistics.kl.isfinite().all()
    assert statistics.mutual_information.isfinite().all()
    assert statistics.kl_per_dimension.shape == (2, len(statistics.dimension_names))
    assert torch.allclose(statistics.kl_per_dimension.sum(-1), statistics.kl, atol=1e-4)


# ------------------------------------------------------------------- statistics


def test_statistics_of_tied_bits_are_one_bit_at_the_start():
    result = statistics_over_time(tied, tied_guide, TIED, tied_rows(400), (0.2, 1.0), num_draws=8)
    assert result.kl[1].item() == pytest.approx(math.log(2), rel=1e-5)
    assert result.mutual_information[1].item() == pytest.approx(math.log(2), rel=1e-5)
    assert result.active_units.tolist()[1] == 1
    assert result.num_units == 1
    # Rows with nothing visible, among those with something masked.
    share = 0.2**3 / (1 - 0.8**3)
    error = (share * (1 - share) / 400) ** 0.5
    assert result.kl[0].item() == pytest.approx(share * math.log(2), abs=4 * error * math.log(2))
    assert result.dimension_names == ["z"]
    assert result.num_rows == 400
    assert result.times.tolist() == pytest.approx([0.2, 1.0])


def test_statistics_at_a_time_are_those_of_the_monitor():
    model, guide = small_pair("standard_normal", TERNARY)
    result = statistics_over_time(model, guide, TERNARY, ROWS.repeat(20, 1), (1.0,), seed=5)
    batch = TERNARY.corrupt(ROWS.repeat(20, 1), 1.0)
    single = latent_statistics(model, guide, batch, MaskedDiffusionELBO(TERNARY))
    assert result.kl.item() == pytest.approx(single.kl, rel=1e-5)
    assert result.kl_per_dimension[0].tolist() == pytest.approx(single.kl_per_dimension, rel=1e-5)


def test_errors_name_the_argument():
    model, guide = small_pair("standard_normal", TERNARY)
    law = torch.full((3, 3, 3), 1 / 27)
    for times in ((), (0.0, 1.0), (1.5,)):
        with pytest.raises(ValueError, match="times must lie"):
            total_correlation(model, guide, TERNARY, ROWS, times)
        with pytest.raises(ValueError, match="times must lie"):
            statistics_over_time(model, guide, TERNARY, ROWS, times)
        with pytest.raises(ValueError, match="times must lie"):
            true_total_correlation(law, TERNARY, times)
    with pytest.raises(ValueError, match="num_particles is 20"):
        total_correlation(model, guide, TERNARY, ROWS, num_draws=10, num_particles=20)
    with pytest.raises(ValueError, match="must have shape"):
        true_total_correlation(law, TIED)
    with pytest.raises(ValueError, match="must be a law"):
        true_total_correlation(2 * law, TERNARY)
    with pytest.raises(ValueError, match="misses the latent site 'z'"):
        total_correlation(model, lambda batch: None, TERNARY, ROWS)
