"""What the monitor says of latents whose use is known."""

from __future__ import annotations

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import PRIORS, all_rows, small_pair
from torch import nn

from vadd_pyro import (
    DiagonalNormal,
    MaskedDiffusionELBO,
    MaskingProcess,
    Program,
    TokenCategorical,
    fit,
    guides,
    latent_statistics,
)
from vadd_pyro.checkpoints import load_checkpoint
from vadd_pyro.distributions import CodeCategorical, ProjectedNormal
from vadd_pyro.information import _pairs, _pairs_by_runs
from vadd_pyro.monitor import Monitor
from vadd_pyro.recorder import Recorder, run
from vadd_pyro.sites import Layout

PROCESS = MaskingProcess(3, 2)
ELBO = MaskedDiffusionELBO(PROCESS)
X = torch.randint(3, (240, 2), generator=torch.Generator().manual_seed(1))


def tokens(logits, batch):
    return pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)


def masked(x_0=X):
    return PROCESS.corrupt(x_0, 1.0)


def blind(prior):
    """A model that draws its latents from ``prior`` and ignores them."""

    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            prior()
            tokens(torch.zeros(len(batch), 2, 3), batch)

    return model


def normal_guide(loc_of, scale):
    """``z ~ N(loc_of(x), scale)``."""

    def guide(batch):
        with pyro.plate("data", len(batch), dim=-1):
            loc = loc_of(batch.x_0.float())
            pyro.sample("z", DiagonalNormal(loc, torch.as_tensor(scale).expand(loc.shape)))

    return guide


def standard(size):
    return lambda: pyro.sample("z", DiagonalNormal(torch.zeros(size), torch.ones(size)))


def entropy_of(shares):
    return -sum(p * math.log(p) for p in shares if p)


def shares_of_first_token(x_0=X):
    return (torch.bincount(x_0[:, 0], minlength=3) / len(x_0)).tolist()


# --------------------------------------------------------------------------- KL


@pytest.mark.parametrize("prior", PRIORS)
def test_the_kl_is_that_of_the_objective_and_its_parts_sum_to_it(prior):
    model, guide = small_pair(prior, PROCESS)
    batch = masked()
    found = latent_statistics(model, guide, batch, ELBO, num_draws=40)
    assert sum(found.kl_per_dimension) == pytest.approx(found.kl, abs=1e-5)
    assert len(found.dimension_names) == len(found.kl_per_dimension)
    if prior == "none":
        assert found == (0.0, [], [], 0, 0, 0.0, None, 240)
        return
    if prior == "categorical":
        return
    draws = torch.stack([ELBO.score(model, guide, batch).kl.detach() for _ in range(40)])
    error = draws.mean(1).std() * (2 / 40) ** 0.5
    assert abs(found.kl - draws.mean()) < 4.5 * error + 1e-5
    whole = prior == "mixture_of_normals"
    assert found.dimension_names == (["z"] if whole else ["z[0]", "z[1]"])
    assert found.num_units == 2


def test_an_idle_dimension_shows_in_kl_units_and_rows():
    def loc_of(x):
        return torch.stack([3.0 * (x[:, 0] - 1), 0.0 * x[:, 0]], -1)

    guide = normal_guide(loc_of, [0.5, 1.0])
    found = latent_statistics(blind(standard(2)), guide, masked(), ELBO)
    assert found.kl_per_dimension[1] == pytest.approx(0.0, abs=1e-6)
    assert found.kl_per_dimension[0] > 1.0
    assert (found.active_units, found.num_units) == (1, 2)
    assert found.share_at_prior == 0.0


@pytest.mark.parametrize("closed", [True, False])
def test_the_share_of_rows_at_the_prior(closed):
    guide = normal_guide(lambda x: 2.0 * (x[:, :1] == 1), [1.0])

    def mixture():
        component = dist.Normal(torch.zeros(1, 1), 1.0).to_event(1)
        return pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(torch.ones(1)), component))

    model = blind(standard(1) if closed else mixture)
    found = latent_statistics(model, guide, masked(), ELBO, num_draws=8)
    assert found.share_at_prior == pytest.approx(1 - shares_of_first_token()[1])
    expected = 2.0 * shares_of_first_token()[1]
    assert found.kl == pytest.approx(expected, abs=1e-5 if closed else 0.2)


def test_rows_are_at_the_prior_by_dimension():
    """0.015 nats are little for two dimensions, though not for one."""
    shift = math.sqrt(2 * 0.015)
    for size, share in ((1, 0.0), (2, 1.0)):
        guide = normal_guide(
            lambda x, n=size: shift * torch.eye(n)[0].expand(len(x), n), [1.0] * size
        )
        found = latent_statistics(blind(standard(size)), guide, masked(), ELBO)
        assert found.kl == pytest.approx(0.015, abs=1e-5)
        assert found.share_at_prior == share


def test_directions_that_say_nothing_are_not_active():
    def prior():
        return pyro.sample("z", ProjectedNormal(torch.zeros(2)))

    for concentration, active in ((1e-4, 0), (20.0, 2)):

        def guide(batch, c=concentration):
            angle = 2.0 * batch.x_0[:, 0]
            with pyro.plate("data", len(batch), dim=-1):
                law = ProjectedNormal(c * torch.stack([angle.cos(), angle.sin()], -1))
                pyro.sample("z", law)

        found = latent_statistics(blind(prior), guide, masked(), ELBO)
        assert (found.active_units, found.num_units) == (active, 2)


def test_codes_hardly_used_are_not_active():
    def guide(batch):
        with pyro.plate("data", len(batch), dim=-1):
            law = dist.Categorical(torch.tensor([0.5, 0.49, 0.01]).expand(len(batch), 3))
            pyro.sample("z", law, infer={"enumerate": "parallel"})

    model = blind(lambda: pyro.sample("z", dist.Categorical(torch.ones(3))))
    found = latent_statistics(model, guide, masked(), ELBO)
    assert (found.active_units, found.num_units) == (2, 3)  # 0.01 < 1 / 30


# ------------------------------------------------------------ mutual information


def test_mutual_information_between_its_extremes():
    model, batch = blind(standard(1)), masked()
    none = latent_statistics(model, normal_guide(lambda x: 0 * x[:, :1] + 0.7, [0.5]), batch, ELBO)
    assert none.mutual_information == pytest.approx(0.0, abs=1e-5)
    assert none.active_units == 0
    assert none.kl > 0.3  # the guide misses the prior, yet nothing is told
    # tokens told apart for sure: the entropy of what is told
    sharp = normal_guide(lambda x: 10.0 * x[:, :1], [0.1])
    found = latent_statistics(model, sharp, batch, ELBO)
    assert found.mutual_information == pytest.approx(entropy_of(shares_of_first_token()), abs=1e-4)
    # and never more than log N
    rows = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    each = normal_guide(lambda x: 10.0 * (3 * x[:, :1] + x[:, 1:]), [0.01])
    found = latent_statistics(model, each, masked(rows), ELBO)
    assert found.mutual_information == pytest.approx(math.log(9), abs=1e-4)


def mutual_information_of(locs, shares, scale):
    """By quadrature, of ``z ~ N(loc, scale)`` for locations with given probabilities."""
    z = torch.linspace(-10, 10, 20_001, dtype=torch.double)
    density = dist.Normal(torch.tensor(locs).double()[:, None], scale).log_prob(z).exp()
    shares = torch.tensor(shares).double()
    total = (shares[:, None] * density).sum(0)
    terms = torch.xlogy(density, density) - density * total.log()
    return float((shares[:, None] * terms).sum() * (z[1] - z[0]))


def two_sites():
    def prior():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0))

    return prior


def chained(second):
    """``a ~ N(x - 1, .6)`` and ``b`` as told by ``second(a, x)``."""

    def guide(batch):
        with pyro.plate("data", len(batch), dim=-1):
            x = batch.x_0[:, 0].float()
            a = pyro.sample("a", dist.Normal(x - 1, 0.6))
            pyro.sample("b", second(a, x))

    return guide


def test_mutual_information_agrees_with_quadrature_also_for_dependent_sites():
    batch, draws = masked(), 60
    exact = mutual_information_of([-1.0, 0.0, 1.0], shares_of_first_token(), 0.6)
    guide = normal_guide(lambda x: x[:, :1] - 1, [0.6])
    one = latent_statistics(blind(standard(1)), guide, batch, ELBO, num_draws=draws)
    # standard deviation of one row's term is below one: 60 draws of 240 rows
    tolerance = 4.5 / (draws * 240) ** 0.5
    assert abs(one.mutual_information - exact) < tolerance
    # a second site that only repeats the first adds nothing
    guide = chained(lambda a, x: dist.Normal(a, 0.3))
    two = latent_statistics(blind(two_sites()), guide, batch, ELBO, num_draws=20)
    exact = mutual_information_of([-1.0, 0.0, 1.0], shares_of_first_token(X[:64]), 0.6)
    assert two.num_rows == 64
    assert abs(two.mutual_information - exact) < 4.5 / (20 * 64) ** 0.5
    # alone it is seen on all rows, and adds to the first
    guide = chained(lambda a, x: dist.Normal(x - 1, 0.6))
    both = latent_statistics(blind(two_sites()), guide, batch, ELBO, num_draws=draws)
    exact = mutual_information_of([-1.0, 0.0, 1.0], shares_of_first_token(), 0.6 / 2**0.5)
    assert both.num_rows == 240
    assert abs(both.mutual_information - exact) < tolerance


def test_pairs_by_running_the_guide_are_those_read_off_its_laws():
    guide = chained(lambda a, x: dist.Normal(0.5 * x, 0.3))
    model, batch = blind(two_sites()), masked()[:9]

    def again(rows, replay=None):
        return run(guide, Recorder(replay), rows)

    torch.manual_seed(0)
    record = again(batch)
    generated = run(model, Recorder(record.latent_values()), batch)
    layout = Layout(record, generated, batch.target.any(-1), row_plates=1, vectorized=False)
    torch.manual_seed(0)
    slow = _pairs_by_runs(["a", "b"], batch, layout, again)
    torch.testing.assert_close(_pairs(list(record.sites.values())), slow)


def test_noise_of_a_level_above_is_no_activity():
    """``b`` follows ``a``, which knows the row or does not."""
    batch = masked()
    for knows in (True, False):

        def guide(batch, knows=knows):
            with pyro.plate("data", len(batch), dim=-1):
                x = batch.x_0[:, 0].float() - 1
                a = pyro.sample("a", dist.Normal(x * knows, 0.5))
                pyro.sample("b", dist.Normal(a, 0.5))

        found = latent_statistics(blind(two_sites()), guide, batch, ELBO)
        assert (found.active_units, found.num_units) == (2 * knows, 2)


def test_a_law_without_a_mean_is_averaged_over_draws():
    def guide(batch):
        with pyro.plate("data", len(batch), dim=-1):
            base = dist.Normal(batch.x_0.float() * torch.tensor([1.0, 0.0]), 0.5).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [dist.transforms.TanhTransform()]))

    found = latent_statistics(blind(standard(2)), guide, masked(), ELBO)
    assert (found.active_units, found.num_units) == (1, 2)


def test_a_change_of_variables_has_no_mutual_information_to_tell():
    def guide(batch):
        with pyro.plate("data", len(batch), dim=-1):
            u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            density = torch.full((len(batch),), -math.log(2.0))
            pyro.sample("z", dist.Delta(2 * u + batch.x_0[:, 0], log_density=density))

    model = blind(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
    found = latent_statistics(model, guide, masked(), ELBO)
    assert found.mutual_information is None
    assert (found.active_units, found.num_units) == (1, 1)


# ---------------------------------------------------------------- discrete sites


def coded(table, logits):
    def model(batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Categorical(logits=logits))
            values = table[z]
            tokens(values if z.dim() > 1 else values.expand(len(batch), 2, 3), batch)

    return model


def test_codes_that_are_summed_out_are_seen_exactly():
    # three codes that say the first token, a fourth that is never used
    table = torch.zeros(4, 2, 3)
    table[:3, 0] = 50 * torch.eye(3)
    logits = torch.tensor([0.0, 0.0, 0.0, -30.0])
    found = latent_statistics(coded(table, logits), guides.NoLatent(), masked(), ELBO)
    assert found.kl == pytest.approx(math.log(3), abs=1e-5)
    assert found.mutual_information == pytest.approx(entropy_of(shares_of_first_token()), abs=1e-5)
    assert (found.active_units, found.num_units) == (3, 4)
    assert (found.share_at_prior, found.dimension_names) == (0.0, ["z"])
    # codes that say nothing
    idle = latent_statistics(coded(table * 0, logits), guides.NoLatent(), masked(), ELBO)
    assert idle.kl == pytest.approx(0.0, abs=1e-6)
    assert idle.mutual_information == pytest.approx(0.0, abs=1e-6)
    assert idle.share_at_prior == 1.0


@pytest.mark.parametrize("infer", [{}, {"enumerate": "parallel"}], ids=["drawn", "enumerated"])
def test_a_guide_of_the_exact_posterior_says_what_summing_out_says(infer):
    table, logits = 2 * torch.randn(4, 2, 3), torch.randn(4)
    model, batch = coded(table, logits), masked()
    log_mu = table.log_softmax(-1)
    joint = log_mu[:, 0, X[:, 0]] + log_mu[:, 1, X[:, 1]] + logits.log_softmax(-1)[:, None]

    def guide(batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("z", dist.Categorical(logits=joint.T), infer=infer)

    summed = latent_statistics(model, guides.NoLatent(), batch, ELBO)
    guided = latent_statistics(model, guide, batch, ELBO, num_draws=40)
    assert guided.kl == pytest.approx(summed.kl, abs=1e-5)
    assert guided.active_units == summed.active_units
    assert guided.share_at_prior == summed.share_at_prior
    error = 4.5 * 1.5 / (40 * 240) ** 0.5
    assert abs(guided.mutual_information - summed.mutual_information) < error


def test_two_summed_sites_and_products_of_codes_are_counted_code_by_code():
    def two(batch):
        with pyro.plate("data", len(batch), dim=-1):
            a = pyro.sample("a", dist.Categorical(torch.ones(3)))
            b = pyro.sample("b", dist.Categorical(torch.tensor([1.0, 1e-9])))
            first = 50 * nn.functional.one_hot(a, 3).float() + 0 * b[..., None]
            tokens(torch.stack([first, torch.zeros_like(first)], -2), batch)

    def product(batch):
        with pyro.plate("data", len(batch), dim=-1):
            logits = torch.zeros(2, 3)
            logits[1, 1:] = -30.0
            c = pyro.sample("c", CodeCategorical(logits))
            first = 50 * nn.functional.one_hot(c[..., 0], 3).float()
            tokens(torch.stack([first, torch.zeros_like(first)], -2), batch)

    for model, names, units in ((two, ["a, b"], 5), (product, ["c"], 6)):
        found = latent_statistics(model, guides.NoLatent(), masked(), ELBO)
        assert found.kl == pytest.approx(math.log(3), abs=1e-4)
        assert (found.dimension_names, found.active_units, found.num_units) == (names, 4, units)


# ------------------------------------------------------------------------- house


def test_it_leaves_random_state_modes_and_gradients_alone():
    model, guide = small_pair("standard_normal", PROCESS)
    guide.encoder.add_module("dropout", nn.Dropout(0.5))
    guide.eval()
    guide.encoder.dropout.train()
    batch = masked(X[:30])
    before = torch.get_rng_state()
    first = latent_statistics(model, guide, batch, ELBO, num_draws=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(5)
    assert latent_statistics(model, guide, batch, ELBO, num_draws=2) == first
    assert latent_statistics(model, guide, batch, ELBO, num_draws=2, seed=1) != first
    assert guide.encoder.dropout.training
    assert not guide.training
    assert all(p.grad is None for p in model.parameters())


def test_rows_without_a_target_are_left_out_and_bad_batches_named():
    pair = small_pair("standard_normal", PROCESS)
    both = PROCESS.corrupt(X[:8], torch.tensor([1.0, 0.0] * 4))
    found = latent_statistics(*pair, both, ELBO)
    assert found.num_rows == 4
    assert found.kl == latent_statistics(*pair, masked(X[:8:2]), ELBO).kl
    with pytest.raises(ValueError, match="no row with a target"):
        latent_statistics(*pair, PROCESS.corrupt(X[:3], 0.0), ELBO)
    with pytest.raises(ValueError, match=r"batch.x_0 is None"):
        latent_statistics(*pair, both.without_data(), ELBO)
    with pytest.raises(ValueError, match="num_draws"):
        latent_statistics(*pair, both, ELBO, num_draws=0)
    with pytest.raises(ValueError, match="misses the latent site 'z'"):
        latent_statistics(pair[0], guides.NoLatent(), both, ELBO)


# ---------------------------------------------------------------------- training

OPTIONS = dict(batch_size=32, progress=False, log_every=10, seed=3, learning_rate=0.01)


def weights(*programs):
    return torch.cat([p.detach().flatten() for program in programs for p in program.parameters()])


class Killed(BaseException):
    """Ends a process between two updates."""


class DiesAt(MaskedDiffusionELBO):
    """Ends the run at the given update."""

    at = 0

    def terms(self, *args, **kwargs):
        if self.iteration == self.at:
            raise Killed
        return super().terms(*args, **kwargs)


@pytest.mark.parametrize("prior", ["none", "standard_normal", "mixture_of_normals", "categorical"])
def test_the_history_tells_of_the_latents_and_resumes_bit_for_bit(prior, tmp_path):
    def pair():
        pyro.set_rng_seed(5)
        return small_pair(prior, PROCESS)

    results = []
    for every, die in ((None, 0), (7, 0), (7, 20)):
        model, guide = pair()
        options = dict(**OPTIONS, monitor_every=every, checkpoint_every=10)
        path = tmp_path / f"{every}-{die}.pt"
        if die:
            elbo = DiesAt(PROCESS)
            elbo.at = die + 3
            with pytest.raises(Killed):
                fit(model, guide, elbo, X, 40, checkpoint=path, **options)
            model, guide = pair()
            torch.randn(3)
        elbo = MaskedDiffusionELBO(PROCESS)
        history = fit(model, guide, elbo, X, 40, checkpoint=path, resume=True, **options)
        results.append((weights(model, guide), history.to_dict()))
        kept = load_checkpoint(path)["history"]
        assert kept["kl_per_dimension"] == history.kl_per_dimension
    (plain, empty), (seen, whole), (again, resumed) = results
    assert torch.equal(plain, seen)  # the monitor changes nothing
    assert torch.equal(seen, again)
    assert empty["monitor_iteration"] == []
    assert whole["monitor_iteration"] == [7, 14, 21, 28, 35, 40]
    for name in ("kl_per_dimension", "active_units", "mutual_information", "share_at_prior"):
        assert whole[name] == resumed[name]
        assert len(whole[name]) == 6
    json.dumps(whole)
    # the last entry is what the programs say when asked
    if prior == "standard_normal":
        assert len(whole["kl_per_dimension"][-1]) == 2
        assert whole["active_units"][-1] <= 2


def test_a_collapse_is_seen():
    """A decoder that reads no latent loses it, and the history says so."""
    model, guide = small_pair("standard_normal", PROCESS)
    nn.init.zeros_(model.decoder.latent.weight)
    model.decoder.latent.weight.requires_grad_(False)
    options = dict(OPTIONS, learning_rate=0.02, monitor_every=150)
    history = fit(model, guide, MaskedDiffusionELBO(PROCESS), X, 300, **options)
    assert sum(history.kl_per_dimension[-1]) < 0.02
    assert history.mutual_information[-1] < 0.02
    assert history.active_units[-1] == 0
    assert history.share_at_prior[-1] > 0.5


def test_programs_bound_to_one_batch_size_train_unmonitored_with_a_warning():
    class Bound(Program):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.randn(32, 2))

        def forward(self, batch):
            with pyro.plate("data", 32, dim=-1):
                pyro.sample("z", DiagonalNormal(self.loc, torch.ones(32, 2)))

    model, _ = small_pair("standard_normal", PROCESS)
    with pytest.warns(RuntimeWarning, match="latents are not monitored"):
        history = fit(
            model, Bound(), MaskedDiffusionELBO(PROCESS), X, 6, monitor_every=2, **OPTIONS
        )
    assert history.monitor_iteration == []
    assert history.iteration == [6]


def test_the_rows_are_all_masked_and_those_of_a_chain_have_its_targets():
    monitor = Monitor(MaskedDiffusionELBO(PROCESS), 50, seed=1)
    monitor.choose(X)
    assert len(monitor.batch) == 50
    assert monitor.batch.target.all()
    rows = all_rows(3, 2)
    chain = Monitor(MaskedDiffusionELBO(PROCESS, "chain", num_steps=4), 50, seed=1)
    chain.choose(rows.repeat(30, 1))
    assert chain.batch.masked.all()
    assert 0.1 < chain.batch.target.double().mean() < 0.4
    short = Monitor(MaskedDiffusionELBO(PROCESS), 50, seed=1)
    short.choose(rows)
    assert len(short.batch) == 9


def test_data_from_a_function_are_monitored_on_its_first_batch():
    calls = []

    def fresh(n):
        calls.append(n)
        return torch.randint(3, (n, 2))

    pair = small_pair("standard_normal", PROCESS)
    history = fit(*pair, ELBO, fresh, 6, monitor_every=3, **OPTIONS)
    assert history.monitor_iteration == [3, 6]
    assert len(calls) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(monitor_every=0), "monitor_every must be an integer of at least 1, got 0"),
        (dict(monitor_rows=1), "monitor_rows must be an integer of at least 2, got 1"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        fit(*small_pair("none", PROCESS), ELBO, X, 4, **OPTIONS, **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(num_particles=3, importance_weighted=True, doubly_reparameterized=True),
        dict(num_particles=3, renyi_alpha=0.5),
        dict(free_bits=0.2),
    ],
    ids=["doubly", "renyi", "free bits"],
)
def test_every_objective_trains_resumes_and_is_told_from_others(options, tmp_path):
    path = tmp_path / "run.pt"
    elbo = MaskedDiffusionELBO(PROCESS, **options)
    pair = small_pair("standard_normal", PROCESS)
    tied = X[:, :1].expand(-1, 2).contiguous()
    history = fit(*pair, elbo, tied, 150, checkpoint=path, **OPTIONS)
    assert history.loss[-1] < 0.8 * history.loss[0]
    again = fit(*pair, elbo, tied, 150, checkpoint=path, resume=True, **OPTIONS)
    assert again.loss == history.loss
    plain = dict(options, doubly_reparameterized=False, free_bits=0.0)
    plain["renyi_alpha"] = 0.7 if "renyi_alpha" in options else None
    other = MaskedDiffusionELBO(PROCESS, **plain)
    with pytest.raises(ValueError, match="its objective is"):
        fit(*pair, other, tied, 150, checkpoint=path, resume=True, **OPTIONS)
