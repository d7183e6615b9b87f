"""Features of the state, and families of networks: every prior and guide on any backbone."""

from __future__ import annotations

import doctest
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from vadd_pyro import MaskedBatch, MaskedDiffusionELBO, MaskingProcess, guides, models, sample, zoo
from vadd_pyro import nn as backbones
from vadd_pyro.nn import (
    NETWORKS,
    LateDecoder,
    LateTransformerDecoder,
    Networks,
    make_networks,
)
from vadd_pyro.nn import networks as module

PROCESS = MaskingProcess(3, 16)
SIZES: dict[str, dict[str, Any]] = {
    "mlp": dict(hidden_dim=16, num_layers=2, embedding_dim=4),
    "residual": dict(hidden_dim=16, num_blocks=2, latent_hidden_dim=8, condition_dim=8),
    "pixel": dict(
        shape=(4, 4), hidden_dim=16, num_blocks=2, sketch_dim=4, local_dim=6, condition_dim=8
    ),
    "unet": dict(
        shape=(4, 4),
        hidden_dim=8,
        multipliers=(1, 2),
        num_blocks=1,
        num_heads=2,
        condition_dim=8,
        feature_dim=8,
    ),
    "transformer": dict(hidden_dim=16, num_layers=2, num_heads=2, condition_dim=8),
}
FAMILIES = pytest.mark.parametrize("family", SIZES)
CODES = pytest.mark.parametrize("vocab_size", [2, 3, 40])


def make(family: str, process: MaskingProcess = PROCESS, **sizes: Any) -> Any:
    return make_networks(family, process, **SIZES[family] | sizes)


def moved(net: nn.Module) -> Any:
    """The same network with its zeros moved away from where training starts them."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * parameter.numel() ** -0.1 * torch.randn_like(parameter))
    return net.eval()


def rows(number: int = 5, process: MaskingProcess = PROCESS) -> Any:
    x_0 = torch.randint(process.vocab_size, (number, process.length))
    return process.corrupt(x_0, torch.linspace(0.3, 0.9, number), 0.2)


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


# --------------------------------------------------------------- features of the state


@FAMILIES
@CODES
def test_the_state_is_all_that_a_prior_sees(family, vocab_size):
    process = MaskingProcess(vocab_size, 16)
    net = moved(make(family, process).state())
    batch = rows(5, process)
    features = net(batch)
    assert features.shape == (5, net.feature_dim)
    for same in (
        batch.without_data(),
        replace(batch, x_0=(batch.x_0 + 1) % vocab_size),
        replace(batch, target=batch.masked),
        replace(batch, target=torch.zeros_like(batch.masked)),
    ):
        assert torch.equal(net(same), features)
    # Every position counts: what its token is, and whether it is masked.
    x_t = batch.x_0[:1]
    t = torch.full((16,), 0.5)
    diagonal = torch.eye(16, dtype=torch.bool)
    seen = []
    for state in (
        x_t.expand(16, -1),
        torch.where(diagonal, (x_t + 1) % vocab_size, x_t),
        x_t.masked_fill(diagonal, vocab_size),
    ):
        masked = state == vocab_size
        seen.append(net(MaskedBatch(state, t, masked, masked)))
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert ((seen[one] - seen[two]).abs().amax(-1) > 1e-5).all()


@FAMILIES
@CODES
def test_masked_positions_have_no_token(family, vocab_size):
    """The same features as of rows whose expected vectors are zero where they are masked."""
    process = MaskingProcess(vocab_size, 16)
    net = moved(make(family, process).features())
    batch = rows(5, process)
    hard = nn.functional.one_hot(batch.x_0, vocab_size).float()
    soft = hard.masked_fill(batch.masked.unsqueeze(-1), 0.0)
    expected = net.soft(soft, replace(batch, target=batch.masked))
    assert torch.allclose(backbones.State(net)(batch), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["residual", "unet"])
def test_of_a_fixed_code_no_token_is_an_even_mixture_of_all(family):
    net = moved(make(family).features())
    batch = rows()
    hard = nn.functional.one_hot(batch.x_0, 3).float()
    even = torch.where(batch.masked.unsqueeze(-1), torch.tensor(1 / 3), hard)
    assert torch.allclose(net.state(batch), net.soft(even, replace(batch, target=batch.masked)))


@FAMILIES
def test_a_state_does_not_depend_on_the_other_rows(family):
    net = moved(make(family).state())
    batch = rows()
    order = torch.tensor([3, 0, 4])
    assert torch.allclose(net(batch)[order], net(batch[order]), atol=1e-5)


@pytest.mark.parametrize("family", [f for f in SIZES if f != "pixel"])  # residual features
def test_the_time_is_told_on_request(family):
    kind = type(make(family).features())
    sizes = {n: s for n, s in SIZES[family].items() if n != "latent_hidden_dim"}
    batch = rows()
    later = replace(batch, t=0.5 * batch.t)
    for timed in (False, True):
        net = backbones.State(moved(kind(PROCESS, time_conditioning=timed, **sizes)))
        assert torch.equal(net(batch), net(later)) is not timed


def test_a_row_of_masks_without_positions_has_finite_gradients():
    net = make("transformer", position_embedding=False).state()
    batch = PROCESS.corrupt(rows().x_0, 1.0)
    net(batch).square().sum().backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 0


@FAMILIES
def test_normals_read_off_the_state_are_standard_before_training(family):
    net = make(family).state_encoder(3)
    batch = rows().without_data()
    loc, scale = net(batch)
    assert loc.shape == scale.shape == (5, 3)
    assert (loc == 0).all()
    assert torch.allclose(scale, torch.ones(5, 3), atol=2e-4)
    nn.init.normal_(net.head.weight)
    loc, scale = net(batch)
    assert (loc.std(0) > 0).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(batch)
    for near, exact in zip(low, (loc, scale), strict=True):
        assert near.dtype == torch.float32
        assert 0 < (near - exact).abs().max() < 0.3


@FAMILIES
def test_states_compile(family):
    net = moved(make(family).state_encoder(2))
    batch = rows()
    expected = net(batch)
    torch._dynamo.reset()
    net.compile(backend="eager", fullgraph=True)
    for one, other in zip(net(batch), expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_features_that_tell_no_state_are_refused():
    with pytest.raises(TypeError, match=r"features must have feature_dim and state\(batch\)"):
        backbones.State(backbones.StateFeatures(PROCESS))


# --------------------------------------------------------------- families


@FAMILIES
def test_a_family_makes_all_that_a_pair_needs(family):
    networks = make(family)
    batch, z = rows(), torch.randn(4, 1, 2)
    for summed in (False, True):
        decoder = networks.decoder(2, summed=summed)
        assert decoder(batch.x_t, z, batch.t).shape == (4, 5, 16, 3)
        assert networks.decoder(0, summed=summed)(batch.x_t, None, batch.t).shape == (5, 16, 3)
    features, encoder = networks.features(), networks.encoder(2)
    assert (features.length, features.vocab_size) == (16, 3)
    assert features(batch).shape == (5, features.feature_dim)
    assert [part.shape for part in encoder(batch)] == [(5, 2)] * 2
    assert count(encoder.features) == count(features)
    # A prior's networks are the smaller ones.
    depth = "num_layers" if "num_layers" in networks.sizes else "num_blocks"
    deeper = make(family, **{depth: 3})
    assert count(deeper.state()) < count(deeper.features())
    # No two share a parameter.
    nets = [networks.features(), networks.features(), networks.state(), networks.decoder(2)]
    parameters = [id(p) for net in nets for p in net.parameters()]
    assert len(set(parameters)) == len(parameters)


def test_summed_codes_have_decoders_that_cost_less():
    residual = make("residual")
    assert isinstance(residual.decoder(2, summed=True), LateDecoder)
    assert not isinstance(residual.decoder(2), LateDecoder)
    transformer = make("transformer")
    assert isinstance(transformer.decoder(2, summed=True), LateTransformerDecoder)
    assert not isinstance(transformer.decoder(2), LateTransformerDecoder)
    mlp = make("mlp")
    assert count(mlp.decoder(2, summed=True)) == count(mlp.decoder(2)) - 16 * 17


@FAMILIES
def test_sizes_reach_the_networks_and_come_back(family):
    """A family is its name and its sizes, all of them plain values."""
    networks = make(family)
    again = make_networks(family, PROCESS, **networks.sizes)
    assert again == networks
    assert set(SIZES[family]) <= set(networks.sizes)
    torch.manual_seed(0)
    decoder = networks.decoder(2)
    torch.manual_seed(0)
    other = again.decoder(2)
    assert all(torch.equal(*pair) for pair in zip(*map(values, (decoder, other)), strict=True))
    wider = make(family, hidden_dim=32)
    for part in ("features", "state"):
        assert count(getattr(wider, part)()) > count(getattr(networks, part)())
    for summed in (False, True):
        assert count(wider.decoder(2, summed=summed)) > count(networks.decoder(2, summed=summed))
    timed, untimed = (make(family, time_conditioning=on).decoder(2) for on in (True, False))
    assert timed.time_conditioning
    assert not untimed.time_conditioning


def values(net: nn.Module) -> list[torch.Tensor]:
    return list(net.state_dict().values())


@pytest.mark.parametrize("family", ["residual", "unet", "transformer"])
def test_dropout_reaches_all_networks(family):
    networks = make(family, dropout=0.25)
    decoders = [networks.decoder(2, summed=summed) for summed in (False, True)]
    for net in (*decoders, networks.features(), networks.encoder(2), networks.state()):
        drops = [m.p for m in net.modules() if isinstance(m, nn.Dropout)]
        assert drops
        assert set(drops) == {0.25}


def test_checking_sizes_draws_no_random_number():
    before = torch.random.get_rng_state()
    for family in SIZES:
        make(family)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_docstring_example():
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: make_networks("cnn", PROCESS),
            "unknown networks: 'cnn'; .* residual, pixel, unet",
        ),
        (lambda: make("mlp", num_blocks=2), "'mlp' have no num_blocks; .* hidden_dim, num_layers"),
        (lambda: make("residual", heads=2, depth=1), "'residual' have no heads, depth"),
        (lambda: make_networks("unet", PROCESS), "'unet' need shape"),
        (lambda: make("mlp", hidden_dim=0), "hidden_dim .* got 0"),
        (lambda: make("mlp", num_layers=0), "num_layers .* got 0"),
        (lambda: make("residual", num_blocks=0), "num_blocks .* got 0"),
        (lambda: make("residual", latent_hidden_dim=0), "latent_hidden_dim .* got 0"),
        (lambda: make("residual", num_latent_blocks=-1), "num_latent_blocks .* got -1"),
        (lambda: make("residual", dropout=1.0), "dropout .* got 1.0"),
        (lambda: make("unet", feature_dim=0), "feature_dim .* got 0"),
        (lambda: make("unet", shape=(4, 5)), r"\(4, 5\) .* 20 .* length 16"),
        (lambda: make("transformer", num_heads=3), "num_heads = 3 .* width 16"),
        (lambda: make("transformer", num_layers=0), "num_layers .* got 0"),
    ],
)
def test_wrong_families_and_sizes_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_types_are_refused_by_name():
    with pytest.raises(ValueError, match=r"hidden_dim must be an integer .* got '8'"):
        make("residual", hidden_dim="8")
    with pytest.raises(ValueError, match=r"num_layers must be an integer .* got 2\.0"):
        make("transformer", num_layers=2.0)
    with pytest.raises(TypeError, match="process must be a MaskingProcess, got 16"):
        make_networks("mlp", 16)


# --------------------------------------------------------------- the zoo on them

SHORT = MaskingProcess(3, 4)


def build(prior: str, guide: str, networks: Networks) -> zoo.Pair:
    return zoo.build(prior, guide, networks.process, latent_dim=2, num_codes=9, networks=networks)


def serves(pair: zoo.Pair, process: MaskingProcess) -> None:
    """Two steps of training reach every parameter, and tokens are drawn."""
    loss = MaskedDiffusionELBO(process)(pair.model, pair.guide)
    programs = nn.ModuleList([pair.model, pair.guide])
    optim = torch.optim.Adam(programs.parameters(), 1e-2)
    x_0 = torch.randint(process.vocab_size, (6, process.length))
    for _ in range(2):
        optim.zero_grad()
        value = loss(x_0)
        assert value.isfinite()
        value.backward()
        optim.step()
    for name, parameter in programs.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    x = sample(pair.model, process, 6, 2, seed=0)
    assert x.shape == (6, process.length)
    assert int(x.min()) >= 0
    assert int(x.max()) < process.vocab_size


@pytest.mark.parametrize("prior", zoo.PRIORS)
def test_every_prior_stands_on_residual_networks(prior):
    pair = build(prior, "auto", make("residual", SHORT))
    serves(pair, SHORT)
    nets = [type(net).__name__ for net in (*pair.model.modules(), *pair.guide.modules())]
    assert not [name for name in nets if name.startswith(("MLP", "StateFeatures"))]
    assert ("LateDecoder" in nets) == (
        prior in ("categorical", "conditional_categorical", "product")
    )
    assert ("LocalDecoder" in nets) == (prior in ("chain", "conditional_chain"))
    if prior.startswith("conditional"):
        assert "State" in nets


@pytest.mark.parametrize(
    ("prior", "guide"),
    [
        *(("standard_normal", family) for family in ("low_rank", "full", "mixture", "flow")),
        ("conditional_normal", "semi_amortized"),
        ("conditional_normal", "relative"),
        ("hierarchical", "bottom_up"),
        ("categorical", "enumerate"),
        ("conditional_categorical", "score"),
        ("product", "score"),
    ],
)
def test_other_guides_stand_on_residual_networks(prior, guide):
    pair = build(prior, guide, make("residual", SHORT))
    assert isinstance(pair.model.decoder, backbones.ResidualDecoder)  # one code a row
    serves(pair, SHORT)


@pytest.mark.parametrize("family", ["unet", "transformer"])
@pytest.mark.parametrize(
    "prior", ["none", "conditional_normal", "vamp", "conditional_flow", "conditional_categorical"]
)
def test_priors_stand_on_unets_and_transformers(family, prior):
    serves(build(prior, "auto", make(family)), PROCESS)


def test_a_conditional_vamp_prior_stands_on_any_backbone():
    for family in SIZES:
        networks = make(family)
        prior = models.VampPrior(networks.encoder(2), 3, conditional=True)
        model = models.VADD(networks.decoder(2), prior)
        serves(zoo.Pair(model, guides.for_prior(prior), 1), PROCESS)


class GivenState(nn.Module):
    """A user's prior: a normal around a linear map of the state."""

    def __init__(self, state: Any, latent_dim: int) -> None:
        super().__init__()
        self.state, self.latent_dim = state, latent_dim
        self.map = nn.Linear(state.feature_dim, latent_dim)

    def forward(self, batch: Any) -> Any:
        return torch.distributions.Normal(self.map(self.state(batch)), 1.0)


def test_a_users_prior_is_offered_the_state_of_the_backbone():
    prior = zoo.build_prior(f"{__name__}:GivenState", SHORT, networks=make("residual", SHORT))
    assert isinstance(prior.state.features, backbones.ResidualFeatures)
    assert prior(SHORT.corrupt(torch.zeros(3, 4, dtype=torch.long), 0.5)).mean.shape == (3, 2)


@pytest.mark.parametrize(
    "prior", ["none", "vamp", "conditional_normal", "conditional_categorical"]
)
def test_perceptrons_are_the_default(prior):
    pairs = []
    for networks in (None, make_networks("mlp", SHORT, hidden_dim=8)):
        torch.manual_seed(0)
        options = {"hidden_dim": 8} if networks is None else {"networks": networks}
        pairs.append(zoo.build(prior, "auto", SHORT, num_codes=5, **options))
    for one, other in zip(*pairs, strict=True):
        if isinstance(one, nn.Module):
            states = one.state_dict(), other.state_dict()
            assert list(states[0]) == list(states[1])
            assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert pairs[0].num_iterations == pairs[1].num_iterations
    summed = prior == "conditional_categorical"
    assert len(pairs[0].model.decoder.hidden.layers) == (3 if summed else 5)


def test_networks_that_do_not_fit_are_refused_by_name():
    networks = make("residual", SHORT)
    for call in (zoo.build_prior, lambda name, *a, **k: zoo.build(name, "auto", *a, **k)):
        with pytest.raises(ValueError, match=r"length=4.* and process is .*length=16"):
            call("flow", PROCESS, networks=networks)
        with pytest.raises(ValueError, match="hidden_dim = 8 was given beside networks"):
            call("flow", SHORT, networks=networks, hidden_dim=8)
        with pytest.raises(TypeError, match=r"networks must be vadd_pyro.nn.Networks, got 'unet'"):
            call("flow", SHORT, networks="unet")
    assert set(NETWORKS) == set(SIZES)
