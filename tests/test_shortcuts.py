"""Ways in which networks save work when tokens are drawn: results are those of the long way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import PRIORS, small_pair
from pyro.nn import PyroModule
from scipy.stats import chisquare
from torch import nn

from vadd_pyro import (
    MaskedBatch,
    MaskingProcess,
    TokenCategorical,
    exact_distribution,
    metrics,
    models,
    sample,
)
from vadd_pyro import nn as backbones
from vadd_pyro.distributions import DeferredLogits, position_logits
from vadd_pyro.nn import MLPDecoder, TransformerDecoder, chosen, lookup, sharing, shortcuts
from vadd_pyro.nn.conditioning import TokenCode
from vadd_pyro.nn.memory import Change, RowMemory, row_memory

SIZES: dict[str, dict[str, Any]] = {
    "MLP": dict(hidden_dim=16, num_layers=2, embedding_dim=4),
    "Residual": dict(hidden_dim=16, num_blocks=2, embedding_dim=4),
    "Late": dict(hidden_dim=16, num_blocks=2, latent_hidden_dim=8, embedding_dim=4),
    "UNet": dict(shape=(4, 4), hidden_dim=8, multipliers=(1, 2), num_blocks=1, num_heads=2),
    "Pixel": dict(shape=(4, 4), hidden_dim=16, num_blocks=1),
    "Transformer": dict(hidden_dim=16, num_layers=1, num_heads=2, condition_dim=8),
}
FAMILIES = pytest.mark.parametrize("family", SIZES)


@pytest.fixture
def _always(monkeypatch):
    """Shortcuts are taken however little there is to save."""
    monkeypatch.setattr(shortcuts, "_LEAST", 0)


def make(family: str, process: MaskingProcess, latent_dim: int = 2, **options: Any) -> Any:
    """A small decoder with weights that matter, in evaluation mode."""
    decoder = getattr(backbones, family + "Decoder")
    net = decoder(process, latent_dim, **SIZES[family] | options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net.eval()


def batch_of(number: int, process: MaskingProcess) -> MaskedBatch:
    x_0 = torch.randint(process.vocab_size, (number, process.length))
    return process.corrupt(x_0, torch.linspace(0.2, 0.9, number)).without_data()


def centred(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean(-1, keepdim=True)


# ------------------------------------------------------------------- logits that wait


@pytest.mark.usefixtures("_always")
@pytest.mark.parametrize("vocab_size", [2, 3, 20])
@FAMILIES
def test_deferred_logits_are_those_of_the_network(family, vocab_size):
    process = MaskingProcess(vocab_size, 16)
    net, batch, z = make(family, process), batch_of(12, process), torch.randn(12, 2)
    expected = net(batch.x_t, z, batch.t)
    assert expected.requires_grad  # the long way
    with torch.no_grad():
        deferred, row = net.deferred(batch.x_t, z, batch.t)
        assert row is None
        assert deferred.shape == expected.shape
        for share in (0.05, 0.5, 0.95):
            index = (torch.rand(12 * 16) < share).nonzero().squeeze(-1)
            torch.testing.assert_close(
                centred(deferred.at(index)),
                centred(expected.detach().flatten(0, 1)[index]),
                atol=1e-4,
                rtol=1e-4,
            )
        torch.testing.assert_close(
            centred(deferred.at(None)),
            centred(expected.detach().flatten(0, 1)),
            atol=1e-4,
            rtol=1e-4,
        )
        torch.testing.assert_close(deferred.whole(), expected.detach(), atol=1e-4, rtol=1e-4)
        assert net.deferred(batch.x_t, torch.randn(3, 1, 2), batch.t) is None
    assert net.deferred(batch.x_t, z, batch.t) is None  # with gradients


@pytest.mark.usefixtures("_always")
@pytest.mark.parametrize(("length", "vocab_size"), [(4, 20), (40, 2), (40, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_of_chosen_positions_are_those_of_the_layer(length, vocab_size, bias):
    layer = nn.Linear(8, length * vocab_size, bias=bias)
    if bias:  # weights need not lie in order
        layer.weight = nn.Parameter(torch.randn(8, length * vocab_size).t())
    h = torch.randn(30, 8)
    with torch.no_grad():
        every = layer(h).view(-1, vocab_size)
        for share in (0.0, 0.02, 0.1, 0.4, 1.0):
            index = (torch.rand(30 * length) < share).nonzero().squeeze(-1)
            found = chosen.chosen_logits(layer, h, index, length, vocab_size)
            torch.testing.assert_close(centred(found), centred(every[index]), atol=1e-5, rtol=1e-5)
            double = chosen.chosen_logits(layer.double(), h.double(), index, length, vocab_size)
            assert double.dtype == torch.double
            layer.float()


def test_a_layer_that_is_not_what_it_seems_is_called(monkeypatch):
    monkeypatch.setattr(shortcuts, "_LEAST", 0)
    layer, calls = nn.Linear(8, 6), []
    h, index = torch.randn(4, 8), torch.tensor([0, 5])
    with torch.no_grad():
        chosen.chosen_logits(layer, h, index, 3, 2)
        assert not calls
        handle = layer.register_forward_hook(lambda *_: calls.append(1))
        chosen.chosen_logits(layer, h, index, 3, 2)
        assert calls == [1]
        handle.remove()

        class Doubled(nn.Linear):
            def forward(self, h):
                return 2 * super().forward(h)

        doubled = Doubled(8, 6)
        found = chosen.chosen_logits(doubled, h, index, 3, 2)
        torch.testing.assert_close(found, doubled(h).view(-1, 2)[index])


def test_only_revealed_positions_reach_the_last_layer():
    process = MaskingProcess(5, 12)
    net = TransformerDecoder(process, 2, hidden_dim=16, num_layers=1, num_heads=2)
    model, seen = models.VADD(net, models.StandardNormal(2)), []
    net.head.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    sample(model, process, 50, 6, seed=0)
    assert sum(seen) == 50 * 12  # every token once
    assert len(seen) == 6


def test_a_program_of_ones_own_may_let_its_logits_wait():
    process = MaskingProcess(3, 4)
    weight, asked = torch.randn(2, 12), []

    def program(batch):
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

            def whole():
                return (z @ weight).unflatten(-1, (4, 3))

            def at(index):
                asked.append(len(batch) * 4 if index is None else len(index))
                flat = whole().flatten(0, 1)
                return flat if index is None else flat[index]

            logits = DeferredLogits((len(batch), 4, 3), whole, at)
            pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)

    x = sample(program, process, 20_000, 3, seed=0)
    assert sum(asked) == 20_000 * 4
    law = exact_distribution(program, process, 3)
    counts = metrics.histogram(x, 3).flatten() * len(x)
    assert chisquare(counts.numpy(), (law.flatten() * len(x)).numpy()).pvalue > 1e-3


def test_deferred_logits_score_and_validate_as_others():
    logits = torch.randn(6, 4, 3)
    deferred = DeferredLogits((6, 4, 3), lambda: logits)
    own, x = TokenCategorical(deferred), torch.randint(3, (6, 4))
    plain = TokenCategorical(logits)
    torch.testing.assert_close(own.log_prob(x), plain.log_prob(x))
    assert (own.batch_shape, own.event_shape) == (plain.batch_shape, plain.event_shape)
    assert own.expand([6]) is own
    assert own.expand([2, 6]).log_prob(x).shape == (2, 6)
    index = torch.tensor([1, 7, 23])
    for fn in (own, plain, own.mask(torch.ones(6, dtype=torch.bool)), own.to_event(0)):
        found = position_logits(fn, index, (6, 4))
        torch.testing.assert_close(found, logits.flatten(0, 1)[index])
    row = torch.tensor([2, 0, 2, 1])
    shared = TokenCategorical(DeferredLogits((6, 4, 3), lambda: logits), None, row)
    torch.testing.assert_close(shared.logits_at(None), logits[row].flatten(0, 1))
    index = torch.tensor([3, 9])
    torch.testing.assert_close(shared.logits_at(index), logits[row].flatten(0, 1)[index])
    broken = TokenCategorical(
        DeferredLogits((6, 4, 3), lambda: logits / 0 * 0), validate_args=True
    )
    for call in (lambda: broken.logits, lambda: broken.logits_at(index), broken.sample):
        with pytest.raises(ValueError, match="got NaN"):
            call()


def test_a_network_of_pyros_own_does_not_wait():
    process = MaskingProcess(3, 2)
    net = MLPDecoder(process, 2, hidden_dim=8, num_layers=1, embedding_dim=4)
    net.head = PyroModule[nn.Linear](8, 6)  # whose weights might be a sample site
    x_t, z, t = torch.full((5, 2), 3), torch.randn(5, 2), torch.ones(5)
    with torch.no_grad():
        assert net.deferred(x_t, z, t) is None
    assert sample(models.VADD(net, models.StandardNormal(2)), process, 5, 2).max() < 3


# ------------------------------------------------------------------- equal rows


def test_equal_rows_are_found_and_no_others(monkeypatch):
    kinds = torch.randint(4, (9, 6)), torch.randn(9, 3)
    which = torch.randint(9, (200,))
    x, z = kinds[0][which], kinds[1][which]
    first, row = sharing.equal_rows(x, z)
    assert len(first) == len(which.unique())
    assert (x[first][row] == x).all()
    assert (z[first][row] == z).all()
    # Rows that are equal in one tensor alone are different rows.
    assert sharing.equal_rows(x, torch.randn(200, 3)) is None
    assert sharing.equal_rows(torch.arange(200).unsqueeze(-1)) is None
    assert sharing.equal_rows(x[:1]) is None
    # More than half as many kinds as rows are not worth it.
    assert sharing.equal_rows(torch.arange(200).unsqueeze(-1) // 2) is not None
    assert sharing.equal_rows(torch.arange(201).unsqueeze(-1) * 2 // 3) is None
    monkeypatch.setattr(sharing, "_factors", lambda length, device: torch.zeros(length).long())
    assert sharing.equal_rows(x, z) is None  # all numbers agree, the rows do not


@FAMILIES
def test_equal_rows_run_once(family):
    process = MaskingProcess(2, 16)
    net = make(family, process, time_conditioning=False)
    batch = batch_of(4, process)
    some = torch.randint(4, (40,))
    x_t, t, z = batch.x_t[some], torch.rand(40), torch.randn(4, 2)[some]
    expected = net(x_t, z, t).detach()
    seen = []
    net.tokens.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    with torch.no_grad():
        torch.testing.assert_close(net(x_t, z, t), expected, atol=1e-5, rtol=1e-5)
        deferred, row = net.deferred(x_t, z, t)
        torch.testing.assert_close(deferred.whole()[row], expected, atol=1e-5, rtol=1e-5)
        assert set(seen) == {len(some.unique())}
        timed = make(family, process, time_conditioning=True)
        assert timed.deferred(x_t, z, t)[1] is None
        dropping = make(family, process, time_conditioning=False, **_dropout(family))
        assert dropping.deferred(x_t, z, t)[1] is not None
        assert family == "MLP" or dropping.train().deferred(x_t, z, t)[1] is None


def _dropout(family: str) -> dict[str, float]:
    return {} if family == "MLP" else {"dropout": 0.1}


def test_states_and_codes_bound_the_work():
    process = MaskingProcess(3, 2)
    for prior, kinds in ((None, 1), (models.Categorical(4, 2), 4)):
        net, seen = make("MLP", process, 2 if prior else 0), []
        model = models.VADD(net, prior) if prior else models.MDM(net)
        net.hidden.register_forward_hook(lambda _, args, __, seen=seen: seen.append(len(args[0])))
        sample(model, process, 2000, 50, seed=0)
        # All masked, then one visible token: at most 3 * 2 states.
        assert len(seen) == 2
        assert seen[0] == kinds
        assert seen[1] <= 6 * kinds


def test_the_wide_part_of_a_late_decoder_runs_once_a_state():
    process = MaskingProcess(3, 2)
    net, seen = make("Late", process), []
    net.trunk.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    sample(models.VADD(net, models.StandardNormal(2)), process, 2000, 50, seed=0)
    assert seen[0] == 1
    assert seen[1] <= 6


# ------------------------------------------------------------------- first layers


@pytest.mark.usefixtures("_always")
@pytest.mark.parametrize("learned", [True, False], ids=["embedding", "fixed code"])
def test_looked_up_sums_are_the_layer_through_any_changes(learned):
    vocab_size, length, rows = 4, 10, 40
    layer = nn.Linear(length * (6 if learned else vocab_size), 7)
    tokens: Any = (
        nn.Embedding(vocab_size + 1, 6) if learned else TokenCode(vocab_size, 8, with_mask=True)
    )
    x = torch.full((rows, length), vocab_size)

    def check(memory: RowMemory, which: torch.Tensor | None) -> None:
        memory.rows = which
        shown = x if which is None else x[which]
        with memory, torch.no_grad():
            found = lookup.token_layer(layer, tokens, shown)
        expected = layer(tokens(shown).flatten(-2))
        torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=1e-4)

    memory = RowMemory(rows)
    check(memory, None)
    for step in range(30):
        x = x.clone()
        change = torch.rand(x.shape) < (0.9 if step == 11 else 0.1)
        x[change] = torch.randint(vocab_size + 1, (int(change.sum()),))
        some = (torch.rand(rows) < 0.6).nonzero().squeeze(-1)
        check(memory, None if step % 3 == 0 else some)
        if step == 7:  # other rows than were promised
            x = x[torch.randperm(rows)]
            check(memory, None)
        if step == 15:
            with torch.no_grad():
                layer.weight.mul_(-1)
        if step == 20:
            layer.bias = nn.Parameter(torch.randn(7))
        if step == 25:
            layer = nn.Linear(length * (6 if learned else vocab_size), 7, bias=False)
    check(RowMemory(rows + 1), None)  # a memory for other rows is left alone
    assert row_memory() is None


@pytest.mark.usefixtures("_always")
@pytest.mark.parametrize("spoilt", ["nothing", "tokens", "tokens before", "sums"])
@pytest.mark.parametrize("inference", [False, True], ids=["", "inference mode"])
def test_sums_notice_what_is_written_to_what_they_share(spoilt, inference, monkeypatch):
    vocab_size, length, rows = 4, 10, 40
    layer, tokens = nn.Linear(length * 6, 7), nn.Embedding(vocab_size + 1, 6)
    told = []
    between = Change.between

    def noted(self, before, after):
        told.append(between(self, before, after))
        return told[-1]

    monkeypatch.setattr(Change, "between", noted)
    with torch.inference_mode(inference), torch.no_grad():
        x = torch.full((rows, length), vocab_size)
        memory = RowMemory(rows)
        for step in range(8):
            before, x = x, x.clone()
            masked = (x == vocab_size).view(-1).nonzero().squeeze(-1)
            positions = masked[torch.rand(len(masked)) < 0.1]
            x.view(-1)[positions] = torch.randint(vocab_size, positions.shape)
            if step and not inference:
                memory.change = Change(before, x, x._version, positions)
            memory.shown = x
            if spoilt.startswith("tokens"):
                (before if spoilt == "tokens before" else x)[3] = step % vocab_size
            with memory:
                found = lookup.token_layer(layer, tokens, x)
            expected = layer(tokens(x).flatten(-2))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            if spoilt == "sums":
                found[0] += 1
    taken = [positions is not None for positions in told]
    assert len(taken) == (0 if inference else 7)
    # The first call keeps what it was shown, the next ones what they were told differs from it.
    assert all(taken) if spoilt == "nothing" else not any(taken)


@pytest.mark.usefixtures("_always")
def test_sums_of_other_tokens_than_a_sampler_shows_are_kept_in_copies():
    process = MaskingProcess(2, 30)
    net, errors = make("MLP", process), []

    class Turned(nn.Module):
        """Writes to a buffer of its own, past torch's counts."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.length, self.vocab_size = net, 30, 2
            self.held = np.empty((50, 30), dtype=np.int64)

        def forward(self, x_t, z, t):
            held = self.held[: len(x_t)]
            np.copyto(held, x_t.numpy()[:, ::-1])
            x = torch.from_numpy(held)
            found = lookup.token_layer(net.tokens, net.embedding, x)
            with torch.enable_grad():
                expected = net.tokens(net.embedding(x).flatten(-2))
            errors.append(float((found - expected).abs().max()))
            return net(x, z, t).flip(-2)

    sample(models.VADD(Turned(), models.StandardNormal(2)), process, 50, 6, seed=0, batch_size=50)
    assert len(errors) >= 6
    assert max(errors) < 1e-4


@pytest.mark.usefixtures("_always")
def test_sums_that_inference_mode_has_copied_can_be_written_to_outside_of_it():
    layer, tokens = nn.Linear(10 * 6, 7), nn.Embedding(5, 6)
    memory = RowMemory(40)
    x = torch.full((40, 10), 4)
    for step in range(6):
        which = None if step == 0 else torch.arange(step, 40, 2)
        x = x.clone()
        x[:, step] = step % 4
        memory.rows, memory.shown = which, x if which is None else None
        shown = x if which is None else x[which]
        with memory, torch.inference_mode(step % 3 == 1), torch.no_grad():
            found = lookup.token_layer(layer, tokens, shown)
            expected = layer(tokens(shown).flatten(-2))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("_always")
def test_each_token_is_looked_up_once_in_all_steps_together(monkeypatch):
    process = MaskingProcess(2, 30)
    net, looked_up = make("MLP", process), []
    real = lookup.embedding_bag

    def count(entry, *args, **options):
        looked_up.append(len(entry))
        return real(entry, *args, **options)

    monkeypatch.setattr(lookup, "embedding_bag", count)
    sample(models.VADD(net, models.StandardNormal(2)), process, 200, 10, seed=0)
    # The tokens of a row's last step are never looked up.
    assert 0.7 * 200 * 30 < sum(looked_up) < 200 * 30


@pytest.mark.parametrize("short", [True, False], ids=["short", "long"])
@pytest.mark.parametrize("prior", PRIORS)
def test_the_law_is_the_exact_one_by_either_way(prior, short, monkeypatch):
    monkeypatch.setattr(shortcuts, "_LEAST", 0)
    process = MaskingProcess(3, 3)
    model, _ = small_pair(prior, process, spread=4.0)
    law = exact_distribution(model, process, 4).flatten()
    if not short:
        model.decoder = Long(model.decoder)
    x = sample(model, process, 30_000, 4, seed=1)
    counts = metrics.histogram(x, 3).flatten() * len(x)
    assert chisquare(counts.numpy(), (law / law.sum() * len(x)).numpy()).pvalue > 1e-3


class Long(nn.Module):
    """A decoder without shortcuts."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x_t, z, t):
        with torch.enable_grad():
            return self.net(x_t, z, t).detach()


@pytest.mark.usefixtures("_always")
def test_the_samples_are_those_of_the_long_way():
    process = MaskingProcess(2, 30)
    net = make("MLP", process)
    prior = models.StandardNormal(2)
    with torch.inference_mode():
        fast = sample(models.VADD(net, prior), process, 300, 7, seed=3)
    assert torch.equal(fast, sample(models.VADD(net, prior), process, 300, 7, seed=3))
    for options in (dict(), dict(latent="shared"), dict(remask=0.5), dict(order="entropy")):
        short = sample(models.VADD(net, prior), process, 300, 7, seed=3, **options)
        long = sample(models.VADD(Long(net), prior), process, 300, 7, seed=3, **options)
        # Rounding may tip a draw, one in ten thousands.
        assert (short != long).any(-1).double().mean() < 0.01


# ---------------------------------------------------------------------- training by indicators


def _networks_of_tokens(process):
    sizes = dict(hidden_dim=6, num_layers=2, embedding_dim=7)
    decoder = MLPDecoder(process, 2, **sizes)
    encoder = backbones.MLPEncoder(process, 2, **sizes)
    return decoder, encoder, backbones.StateFeatures(process, **sizes)


def _results(networks, batch, z):
    decoder, encoder, state = networks
    outputs = [decoder(batch.x_t, z, batch.t), *encoder(batch), state(batch)]
    parameters = [p for network in networks for p in network.parameters()]
    loss = sum((value.double() * value.double().cos()).sum() for value in outputs)
    return outputs, torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("vocab_size", [2, 4])
def test_indicators_give_the_layer_and_its_gradients(vocab_size, monkeypatch):
    torch.manual_seed(0)
    process = MaskingProcess(vocab_size, 5)
    networks = [network.double() for network in _networks_of_tokens(process)]
    torch.nn.init.normal_(networks[0].head.weight)
    x_0 = torch.randint(vocab_size, (400, 5))
    batch = process.corrupt(x_0, torch.rand(400, dtype=torch.float64))
    target = batch.masked & (torch.rand(400, 5) < 0.5)
    batch = replace(batch, t=batch.t.double(), target=target)
    z = torch.randn(400, 2, dtype=torch.float64)
    taken = []
    short = lookup._indicated
    monkeypatch.setattr(lookup, "_indicated", lambda *a: taken.append(len(a[1])) or short(*a))
    found = _results(networks, batch, z)
    assert taken == [1, 2, 1]  # the decoder's table, both of the encoder, the state's
    monkeypatch.setattr(lookup, "_by_indicators", lambda *a: False)
    expected = _results(networks, batch, z)
    assert len(taken) == 3
    for one, other in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_indicators_are_for_training_what_is_plain_and_many_rows():
    layer, table, ids = nn.Linear(5 * 7, 6), nn.Embedding(3, 7), torch.zeros(400, 5).long()

    def asked(*tables, rows=400):
        return lookup._by_indicators(layer, tables, ids[:rows])

    assert asked(table)
    assert asked(table, nn.Embedding(3, 7))
    assert not asked(table, rows=4)  # making the weights would cost more than a dense layer
    assert not asked(nn.Embedding(9, 7))  # more indicators than numbers of a vector
    assert not asked(nn.Embedding(3, 7, padding_idx=0))
    assert not asked(nn.Embedding(3, 7, max_norm=1.0))
    with torch.no_grad():
        assert not asked(table)
    with torch.autocast("cpu", torch.bfloat16):
        assert not asked(table)
    table.register_forward_hook(lambda *a: None)
    assert not asked(table)


def test_what_is_changed_in_features_is_not_passed_over():
    class Shifted(backbones.MLPFeatures):
        def _features(self, codes, batch):
            return super()._features(codes, batch) + 100

    process = MaskingProcess(2, 5)
    batch = process.corrupt(torch.randint(2, (400, 5)), torch.rand(400))
    shifted = Shifted(process, hidden_dim=6, num_layers=2, embedding_dim=7)
    assert shifted(batch).mean() > 90
    features = backbones.MLPFeatures(process, hidden_dim=6, num_layers=2, embedding_dim=7)
    seen = []
    features.tokens.register_full_backward_hook(lambda *a: seen.append(1))
    features(batch).sum().backward()
    assert seen == [1]


@pytest.mark.parametrize("token", [-1, 3])
def test_indicators_refuse_what_is_no_token(token):
    decoder = MLPDecoder(MaskingProcess(2, 5), hidden_dim=6, num_layers=2, embedding_dim=7)
    x_t = torch.zeros(400, 5).long()
    x_t[7, 2] = token
    with pytest.raises(IndexError):
        decoder(x_t, None, torch.rand(400))
