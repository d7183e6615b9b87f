from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import PRIORS, small_pair
from scipy.stats import chisquare

from vadd_pyro import (
    MaskedBatch,
    MaskingProcess,
    TokenCategorical,
    exact_distribution,
    metrics,
    models,
    sample,
)
from vadd_pyro.nn import MLPDecoder

PROCESS = MaskingProcess(3, 3)


class Counting(torch.nn.Module):
    """A decoder that keeps count of the rows it is shown, and checks what it is shown."""

    def __init__(self, process, latent_dim=0):
        super().__init__()
        self.net = MLPDecoder(process, latent_dim, hidden_dim=8, num_layers=1, embedding_dim=4)
        self.rows = 0
        self.calls = 0
        self.latents = []
        self.times = []

    def forward(self, x_t, z, t):
        self.rows += len(x_t)
        self.calls += 1
        self.latents.append(z)
        self.times.append(t)
        assert ((x_t == self.net.vocab_size).any(-1)).all()
        return self.net(x_t, z, t)


@pytest.mark.parametrize("latent", ["fresh", "shared"])
@pytest.mark.parametrize("prior", PRIORS)
def test_samples_are_tokens_and_seeds_decide_them(prior, latent):
    model, _ = small_pair(prior, PROCESS)
    state = torch.get_rng_state()
    x = sample(model, PROCESS, 500, 3, latent=latent, seed=1)
    assert x.shape == (500, 3)
    assert x.dtype == torch.long
    assert x.min() >= 0
    assert x.max() < 3
    assert (x == sample(model, PROCESS, 500, 3, latent=latent, seed=1)).all()
    assert (x != sample(model, PROCESS, 500, 3, latent=latent, seed=2)).any()
    assert (torch.get_rng_state() == state).all()


def test_steps_that_reveal_nothing_cost_no_network_call():
    process = MaskingProcess(3, 2)
    decoder = Counting(process)
    sample(models.MDM(decoder), process, 1000, 50)
    # two tokens: two calls for all rows but the 1 in 50 whose tokens fall in one step
    assert decoder.calls == 2
    assert 1900 < decoder.rows < 2000
    decoder = Counting(process)
    sample(models.MDM(decoder), process, 1000, 1)
    assert decoder.calls == 1
    assert decoder.rows == 1000


def test_fresh_latents_differ_between_steps_and_shared_ones_do_not():
    process = MaskingProcess(3, 2)
    for latent in ("fresh", "shared"):
        decoder = Counting(process, 2)
        model = models.VADD(decoder, models.StandardNormal(2))
        sample(model, process, 5, 1000, latent=latent)
        drawn = torch.cat(decoder.latents)
        assert len(drawn.unique(dim=0)) == (10 if latent == "fresh" else 5)
        if latent == "shared":
            # drawn at the first step, at t = 1, though it reveals nothing
            assert (decoder.times[0] == 1).all()
            assert len(decoder.latents[0]) == 5


def test_a_shared_conditional_latent_comes_from_the_first_state():
    process = MaskingProcess(3, 2)
    seen = []

    def prior(batch):
        seen.append(batch.x_t.clone())
        return dist.Normal(torch.zeros(len(batch), 2), 1.0).to_event(1)

    model = models.VADD(MLPDecoder(process, 2, hidden_dim=8), prior)
    sample(model, process, 7, 5, latent="shared")
    assert (seen[0] == process.mask_id).all()
    assert len(seen[0]) == 7


def test_sharing_a_latent_is_another_distribution():
    model, _ = small_pair("categorical", PROCESS, spread=6.0)
    fresh = metrics.histogram(sample(model, PROCESS, 50_000, 3, seed=1), 3)
    again = metrics.histogram(sample(model, PROCESS, 50_000, 3, seed=2), 3)
    shared = metrics.histogram(sample(model, PROCESS, 50_000, 3, seed=1, latent="shared"), 3)
    noise = metrics.total_variation(fresh, again)
    assert metrics.total_variation(fresh, shared) > 5 * noise


def test_a_partial_refresh_draws_some_rows_anew():
    process = MaskingProcess(3, 2)
    for refresh in (0.0, 0.3, 1.0):
        decoder = Counting(process, 2)
        model = models.VADD(decoder, models.StandardNormal(2))
        sample(model, process, 4000, 10_000, latent="partial", refresh=refresh, seed=1)
        # One where the chain starts, and by chance one at each of the two tokens.
        drawn = len(torch.cat(decoder.latents).unique(dim=0)) / 4000
        fresh = 2 if refresh == 1 else 1 + 2 * refresh
        assert abs(drawn - fresh) < 4 * (2 * refresh * (1 - refresh) / 4000) ** 0.5 + 0.002


def test_a_partial_refresh_mixes_the_laws_of_fresh_and_shared_latents():
    # With two tokens, the second has the first one's latent or another one.
    process = MaskingProcess(3, 2)
    model, _ = small_pair("categorical", process, spread=6.0)
    law = {
        latent: metrics.histogram(sample(model, process, 200_000, 4, latent=latent, seed=1), 3)
        for latent in ("fresh", "shared", "partial")
    }
    noise = 9**0.5 / 200_000**0.5
    between = (law["fresh"] + law["shared"]) / 2
    assert metrics.total_variation(law["fresh"], law["shared"]) > 10 * noise
    assert metrics.total_variation(law["partial"], between) < 2 * noise
    for refresh, latent in ((1.0, "fresh"), (0.0, "shared")):
        x = sample(model, process, 1000, 4, latent="partial", refresh=refresh, seed=1)
        assert (x == sample(model, process, 1000, 4, latent=latent, seed=1)).all()


def test_a_partial_refresh_draws_all_sites_of_a_row_together():
    seen = []

    def program(batch):
        with pyro.plate("data", len(batch), dim=-1):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("parts", 2, dim=-2):
                loc = a.unsqueeze(-1).expand(-1, 3)
                b = pyro.sample("b", dist.Normal(loc, 1e-3).to_event(1))
            seen.append((a, b))
            logits = torch.zeros(len(batch), 3, 3)
            pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)

    sample(program, PROCESS, 50, 1000, latent="partial", seed=1)
    assert len(torch.cat([a for a, _ in seen]).unique()) > 60
    for a, b in seen:
        assert b.shape == (2, len(a), 3)
        assert ((b - a.unsqueeze(-1)).abs() < 0.01).all()


def test_infilling_keeps_what_is_observed():
    model, _ = small_pair("standard_normal", PROCESS)
    x_start = torch.tensor([[3, 1, 3], [0, 1, 2], [3, 3, 3]])
    x = sample(model, PROCESS, 4, 2, x_start=x_start)
    assert x.shape == (12, 3)
    assert (x[:4, 1] == 1).all()
    assert (x[4:8] == torch.tensor([0, 1, 2])).all()
    assert (x < 3).all()
    one = sample(model, PROCESS, 4, 2, x_start=x_start[0], t_start=0.5, latent="shared")
    assert one.shape == (4, 3)
    assert (one[:, 1] == 1).all()
    complete = sample(model, PROCESS, 2, 2, x_start=x_start[1], latent="shared")
    assert (complete == x_start[1]).all()


def test_infilling_starts_at_the_observed_share():
    decoder = Counting(PROCESS)
    x_start = torch.tensor([[3, 1, 3], [3, 1, 2]])
    sample(models.MDM(decoder), PROCESS, 1, 1, x_start=x_start)
    torch.testing.assert_close(decoder.times[0], torch.tensor([2 / 3, 1 / 3]))


def test_user_programs_need_return_nothing_and_may_use_plain_categoricals():
    weight = torch.randn(2, 9)

    def program(batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = (z @ weight).unflatten(-1, (3, 3))
            law = dist.Categorical(logits=logits).mask(batch.target).to_event(1)
            pyro.sample("x_0", law, obs=batch.x_0)

    assert sample(program, PROCESS, 20, 2).shape == (20, 3)

    def nameless(batch):
        with pyro.plate("data", len(batch), dim=-1):
            pyro.sample("x", TokenCategorical(torch.zeros(len(batch), 3, 3), batch.target))

    with pytest.raises(ValueError, match=r"no site 'x_0'.*\['x'\]"):
        sample(nameless, PROCESS, 20, 2)


def test_a_latent_of_all_rows_is_drawn_once_for_the_whole_call():
    seen = []

    def program(batch):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        seen.append(float(w))
        with pyro.plate("data", len(batch), dim=-1):
            logits = (w * torch.arange(3.0)).expand(len(batch), 3, 3)
            pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)

    sample(program, PROCESS, 20, 3, batch_size=8)
    assert len(seen) > 3
    assert len(set(seen)) == 1


def test_pieces_do_not_change_the_law():
    model, _ = small_pair("standard_normal", PROCESS)
    whole = metrics.histogram(sample(model, PROCESS, 40_000, 2, seed=1), 3)
    pieces = metrics.histogram(sample(model, PROCESS, 40_000, 2, seed=1, batch_size=999), 3)
    assert metrics.total_variation(whole, pieces) < 0.02
    law = exact_distribution(model, PROCESS, 2)
    for rows in (whole, pieces):
        counts = (rows * 40_000).flatten().numpy()
        assert chisquare(counts, (law / law.sum() * 40_000).flatten().numpy()).pvalue > 1e-3


def test_what_a_program_is_shown_is_never_written_to():
    model, _ = small_pair("categorical", PROCESS)
    shown = []

    def watching(batch):
        for name in ("x_t", "t", "masked", "target"):
            value = getattr(batch, name)
            shown.append((value, value.clone()))
        drawn = model(batch)
        shown.append((drawn, drawn.clone()))

    x_start = torch.tensor([[3, 1, 3], [0, 3, 3]])
    before = x_start.clone()
    for options in (
        dict(),
        dict(latent="partial"),
        dict(remask=0.7),
        dict(order="confidence"),
        dict(x_start=x_start),
    ):
        for num_steps in (1, 3, 8):
            sample(watching, PROCESS, 20, num_steps, seed=0, **options)
    assert len(shown) > 100
    assert all(torch.equal(value, copy) for value, copy in shown)
    assert torch.equal(x_start, before)


def test_a_draw_has_tokens_where_they_are_revealed():
    # What comes after the tokens in a program of one's own sees tokens only.
    seen = []

    def program(batch):
        with pyro.plate("data", len(batch), dim=-1):
            law = TokenCategorical(torch.zeros(len(batch), 3, 3), batch.target)
            x = pyro.sample("x_0", law, obs=batch.x_0)
            seen.append((x, batch))
            return x

    x = sample(program, PROCESS, 50, 2, seed=0)
    assert ((x >= 0) & (x < 3)).all()
    for drawn, _ in seen:
        assert ((drawn >= 0) & (drawn < 3)).all()
    final = (
        torch.where(seen[0][1].target, seen[0][0], 0).sum()
        + torch.where(seen[1][1].target, seen[1][0], 0).sum()
    )
    assert final == x.sum()


def test_every_step_of_every_row_gives_the_same_law():
    # The long way: all rows through all steps, and all tokens drawn, as the formula reads.
    model, _ = small_pair("mixture_of_normals", PROCESS, spread=4.0)
    law = exact_distribution(model, PROCESS, 3).flatten()
    x = torch.full((30_000, 3), PROCESS.mask_id)
    with torch.no_grad():
        for i in (3, 2, 1):
            masked = x == PROCESS.mask_id
            t = torch.full((len(x),), i / 3)
            drawn = model(MaskedBatch(x, t, masked, masked))
            x = torch.where(masked & (torch.rand(x.shape) < 1 / i), drawn, x)
    for rows in (x, sample(model, PROCESS, 30_000, 3, seed=0)):
        counts = metrics.histogram(rows, 3).flatten() * len(rows)
        expected = (law / law.sum() * len(rows)).numpy()
        assert chisquare(counts.numpy(), expected).pvalue > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_steps=0), "num_steps must be at least 1, got 0"),
        (
            dict(num_steps=2, latent="same"),
            "latent must be 'fresh' or 'shared', or 'partial' between them, got 'same'",
        ),
        (dict(num_steps=2, num_samples=0), "num_samples must be an integer of at least 1"),
        (dict(num_steps=2, batch_size=0), "batch_size must be an integer of at least 1"),
        (dict(num_steps=2, max_bytes=0), "max_bytes must be an integer of at least 1, got 0"),
        (dict(num_steps=2, compile="fast"), "compile must be True or one of .*, got 'fast'"),
        (dict(num_steps=2, t_start=0.5), "x_start, which is missing"),
        (dict(num_steps=2, x_start=torch.tensor([0, 1, 4])), r"x_start\[0, 2\] is 4.*mask id 3"),
        (dict(num_steps=2, x_start=torch.tensor([0, 1])), r"x_start must have shape"),
        (dict(num_steps=2, x_start=torch.tensor([0, 1, 3]), t_start=0.0), r"t_start must lie in"),
    ],
)
def test_bad_arguments_are_named(options, message):
    model, _ = small_pair("none", PROCESS)
    with pytest.raises(ValueError, match=message):
        sample(model, PROCESS, **{"num_samples": 5, **options})
