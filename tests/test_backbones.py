"""Backbones: what every decoder and recognition network must do, and what each family claims."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from vadd_pyro import MaskedDiffusionELBO, MaskingProcess, guides, models
from vadd_pyro import nn as backbones
from vadd_pyro.nn import attention
from vadd_pyro.nn.attention import Rotary, SelfAttention
from vadd_pyro.nn.conditioning import TokenCode

PROCESS = MaskingProcess(vocab_size=3, length=16)
SIZES: dict[str, dict[str, Any]] = {
    "Residual": dict(hidden_dim=16, num_blocks=2),
    "Late": dict(hidden_dim=16, num_blocks=2, latent_hidden_dim=8),
    "Pixel": dict(
        shape=(4, 4), hidden_dim=16, num_blocks=1, sketch_dim=4, local_dim=6, condition_dim=8
    ),
    "UNet": dict(
        shape=(4, 4), hidden_dim=8, multipliers=(1, 2), num_blocks=1, num_heads=2, condition_dim=8
    ),
    "Transformer": dict(hidden_dim=16, num_layers=2, num_heads=2, condition_dim=8),
    "LateTransformer": dict(
        hidden_dim=16, num_layers=1, num_heads=2, condition_dim=8, latent_hidden_dim=8
    ),
}
FAMILIES = pytest.mark.parametrize("family", SIZES)
MLP: dict[str, Any] = dict(hidden_dim=16, num_layers=2, embedding_dim=4)
TIMES = pytest.mark.parametrize("timed", [False, True], ids=["no time", "time"])


def fresh(family: str, part: str, *args: Any, process: Any = PROCESS, **options: Any) -> Any:
    """A small network as training starts it."""
    if part != "Decoder":  # those of other families go with these decoders
        others = {"Late": "Residual", "Pixel": "Residual", "LateTransformer": "Transformer"}
        family = others.get(family, family)
    return getattr(backbones, family + part)(process, *args, **SIZES.get(family, MLP) | options)


def make(family: str, part: str, *args: Any, **options: Any) -> Any:
    """A small network; its zeros are moved away from where training starts them."""
    net = fresh(family, part, *args, **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * parameter.numel() ** -0.1 * torch.randn_like(parameter))
    return net.eval()


def rows(number: int = 5, process: MaskingProcess = PROCESS) -> Any:
    x_0 = torch.randint(process.vocab_size, (number, process.length))
    return process.corrupt(x_0, torch.linspace(0.3, 0.9, number), 0.2)


# --------------------------------------------------------------- what all decoders promise


@FAMILIES
def test_all_tokens_are_equally_likely_before_training(family):
    net = fresh(family, "Decoder", 0 if family.startswith("Late") else 2)
    batch, z = rows(), torch.randn(5, 2) if net.latent_dim else None
    assert (net(batch.x_t, z, batch.t) == 0).all()


@TIMES
@FAMILIES
def test_extra_left_dimensions_equal_a_loop(family, timed):
    net = make(family, "Decoder", 2, time_conditioning=timed)
    batch = rows()

    def one(z: Tensor) -> Tensor:
        return net(batch.x_t, z, batch.t)

    z = torch.randn(2, 3, 5, 2)
    together = one(z)
    assert together.shape == (2, 3, 5, 16, 3)
    alone = torch.stack([torch.stack([one(z[i, j]) for j in range(3)]) for i in range(2)])
    assert torch.allclose(together, alone, atol=1e-5)
    codes = torch.randn(4, 1, 2)
    alone = torch.stack([one(code.expand(5, 2)) for code in codes])
    assert torch.allclose(one(codes), alone, atol=1e-5)
    assert torch.allclose(one(codes[0, 0]), alone[0], atol=1e-5)
    many = net(batch.x_t[:1], codes[:, 0], batch.t[:1])  # one row, many latents
    assert torch.allclose(many, alone[:, 0], atol=1e-5)


@FAMILIES
def test_a_row_does_not_depend_on_the_others(family):
    decoder, encoder = make(family, "Decoder", 2), make(family, "Encoder", 2)
    batch, z = rows(), torch.randn(5, 2)
    order = torch.tensor([3, 0, 4])
    logits = decoder(batch.x_t, z, batch.t)
    picked = decoder(batch.x_t[order], z[order], batch.t[order])
    assert torch.allclose(logits[order], picked, atol=1e-5)
    for whole, part in zip(encoder(batch), encoder(batch[order]), strict=True):
        assert torch.allclose(whole[order], part, atol=1e-5)


@FAMILIES
def test_every_position_is_seen_from_every_other(family):
    net = make(family, "Decoder", 2)
    x_t, z = torch.randint(3, (16,)), torch.randn(2)
    hidden = x_t.masked_fill(torch.eye(16, dtype=torch.bool), PROCESS.mask_id)
    t = torch.full((16,), 0.5)
    change = (net(hidden, z, t) - net(x_t.expand(16, -1), z, t)).abs().amax(-1)
    assert (change > 1e-6).all()


@TIMES
@FAMILIES
def test_times_reach_the_decoder_on_request(family, timed):
    net = make(family, "Decoder", 2, time_conditioning=timed)
    batch, z = rows(), torch.randn(5, 2)
    logits, later = (net(batch.x_t, z, t) for t in (batch.t, 0.5 * batch.t))
    assert torch.equal(logits, later) is not timed


@FAMILIES
def test_the_latent_decides_what_the_all_masked_row_becomes(family):
    net = make(family, "Decoder", 2)
    x_t, t = torch.full((1, 16), PROCESS.mask_id), torch.ones(1)
    first, second = net(x_t, torch.randn(2, 2), t.expand(1)).log_softmax(-1)
    change = first - second  # differs between positions: they are told apart
    assert change.std(0).min() > 1e-3
    assert torch.pdist(first.flatten(1)).min() > 1e-5


def test_rotary_positions_alone_leave_the_all_masked_row_alike_everywhere():
    net = make("Transformer", "Decoder", 2, position_embedding=False)
    logits = net(torch.full((1, 16), PROCESS.mask_id), torch.randn(1, 2), torch.ones(1))
    assert torch.allclose(logits, logits[:, :1].expand_as(logits), atol=1e-5)


@FAMILIES
def test_equal_rows_share_their_work_under_codes(family):
    net = make(family, "Decoder", 2, time_conditioning=False)
    x_t = rows(3).x_t[[0, 1, 0, 2, 1, 0]]
    t, codes, seen = torch.full((6,), 0.5), torch.randn(4, 1, 2), []
    net.tokens.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    shared = net(x_t, codes, t)
    assert seen == [3]
    assert torch.allclose(shared, net(x_t, codes.expand(4, 6, 2), t), atol=1e-5)
    assert seen == [3, 6]
    states, row = net.shared_states(x_t, codes)
    assert (states[row] == x_t).all()
    timed = make(family, "Decoder", 2, time_conditioning=True)
    assert timed.shared_states(x_t, codes) is None
    dropping = make(family, "Decoder", 2, time_conditioning=False, dropout=0.1)
    assert dropping.shared_states(x_t, codes) is not None
    assert dropping.train().shared_states(x_t, codes) is None


def test_what_is_wide_runs_once_a_row_and_what_is_narrow_once_a_code():
    net = make("Late", "Decoder", 2)
    batch, codes, seen = rows(), torch.randn(7, 1, 2), {}
    for name in ("tokens", "trunk", "narrow", "head", "latent_trunk", "latent_head"):
        getattr(net, name).register_forward_hook(
            lambda _, args, __, name=name: seen.setdefault(name, []).append(args[0].shape)
        )
    net(batch.x_t, codes, batch.t)
    assert seen == {
        "tokens": [(5, 16)],
        "trunk": [(5, 16)],
        "narrow": [(5, 16)],
        "head": [(5, 16)],
        "latent_trunk": [(7, 5, 8)],
        "latent_head": [(7, 5, 8)],
    }


def test_codes_of_a_late_decoder_differ_a_little_from_the_start():
    net = fresh("Late", "Decoder", 2)
    batch, codes = rows(), torch.randn(7, 1, 2)
    logits = net(batch.x_t, codes, batch.t)
    apart = (logits[:, None] - logits[None]).abs().amax((-1, -2, -3))
    assert (apart + torch.eye(7) > 1e-3).all()
    assert logits.log_softmax(-1).exp().sub(1 / 3).abs().max() < 0.1
    # Each code has another gradient: the symmetry of the mixture breaks.
    codes.requires_grad_()
    net(batch.x_t, codes, batch.t).log_softmax(-1)[..., 0].sum().backward()
    assert torch.pdist(codes.grad.flatten(1)).min() > 1e-5


@pytest.mark.parametrize("vocab_size", [3, 40])
def test_the_logits_of_a_late_decoder_are_a_sum_and_the_latent_is_in_one_part(vocab_size):
    process = MaskingProcess(vocab_size, 16)
    net = make("Late", "Decoder", 2, process=process)
    batch, z = rows(5, process), torch.randn(2, 5, 2)
    parts = {}
    for silent in ("head", "latent_head"):
        other = copy.deepcopy(net)
        with torch.no_grad():
            for parameter in getattr(other, silent).parameters():
                parameter.zero_()
        parts[silent] = other(batch.x_t, z, batch.t)
    assert torch.allclose(sum(parts.values()), net(batch.x_t, z, batch.t), atol=1e-5)
    assert torch.equal(*parts["latent_head"])
    assert not torch.allclose(*parts["head"], atol=1e-3)


class _LargeTensors(TorchDispatchMode):
    """Collects the storages of results that hold at least so many float32 numbers."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.num_bytes, self.kept = 4 * numel, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().nbytes() >= self.num_bytes:
            storage = result.untyped_storage()
            self.kept[storage.data_ptr()] = storage  # kept, lest an address is used again
        return result


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Residual", dict(embedding_dim=4)),
        ("Residual", dict(embedding_dim=400)),
        ("Late", dict(embedding_dim=4)),
        ("Late", dict(embedding_dim=400)),
        ("UNet", dict(embedding_dim=4, shape=(8, 8))),
        ("UNet", dict(embedding_dim=4, shape=(4, 8), channels=2)),
        ("Transformer", {}),
    ],
)
def test_logits_are_the_one_large_tensor(family, options):
    process = MaskingProcess(vocab_size=300, length=64)
    net = make(family, "Decoder", 2, process=process, **options)
    batch, z = rows(5, process), torch.randn(12, 5, 2)
    for autocast in (False, True):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            _LargeTensors(12 * 5 * 64 * 150) as mode,
        ):
            logits = net(batch.x_t, z, batch.t)
        assert logits.is_contiguous()
        assert len(mode.kept) == 1


@pytest.mark.parametrize("embedding_dim", [4, 400])
def test_logits_of_all_codes_are_the_one_large_tensor_in_training_too(embedding_dim):
    process = MaskingProcess(vocab_size=300, length=64)
    net = fresh("Late", "Decoder", 2, process=process, embedding_dim=embedding_dim)
    batch, codes = rows(5, process), torch.randn(12, 1, 2, requires_grad=True)
    with _LargeTensors(12 * 5 * 64 * 150) as mode:
        logits = net(batch.x_t, codes, batch.t)
    assert len(mode.kept) == 1
    logits.backward(torch.randn_like(logits))
    assert (codes.grad != 0).any()


# --------------------------------------------------------------- recognition networks


@FAMILIES
@pytest.mark.parametrize("vocab_size", [2, 3, 40])
def test_recognition_sees_tokens_masks_and_targets(family, vocab_size):
    process = MaskingProcess(vocab_size, 16)
    net = make(family, "Features", process=process)
    visible, masked = torch.zeros(1, 16, dtype=torch.bool), torch.ones(1, 16, dtype=torch.bool)
    some = torch.arange(16).unsqueeze(0) < 5
    x_0 = torch.zeros(1, 16, dtype=torch.long)
    batch = process.corrupt(x_0, 1.0)
    features = net(batch)
    assert features.shape == (1, net.feature_dim)
    for other in (
        replace(batch, x_0=torch.ones_like(x_0)),
        replace(batch, x_0=x_0.masked_fill(some, 1)),
        replace(batch, masked=some, target=some),
        replace(batch, target=some),
        replace(batch, masked=visible, target=visible),
    ):
        assert (net(other) - features).abs().max() > 1e-4
    assert torch.equal(net(replace(batch, x_t=x_0, masked=masked)), features)  # x_t adds nothing


@FAMILIES
def test_times_reach_recognition_only_on_request(family):
    batch = rows()
    later = replace(batch, t=0.5 * batch.t)
    plain, timed = (make(family, "Features", time_conditioning=timed) for timed in (False, True))
    assert torch.equal(plain(batch), plain(later))
    assert not torch.allclose(timed(batch), timed(later))


@FAMILIES
@pytest.mark.parametrize("vocab_size", [3, 40])
def test_soft_rows_extend_hard_ones(family, vocab_size):
    process = MaskingProcess(vocab_size, 16)
    net = make(family, "Encoder", 2, process=process, time_conditioning=True)
    batch = rows(5, process)
    hard = nn.functional.one_hot(batch.x_0, vocab_size).float()
    for one, other in zip(net(batch), net.soft(hard, batch), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    soft = torch.rand(2, 3, 5, 16, vocab_size).softmax(-1)
    loc, scale = net.soft(soft, batch)
    assert loc.shape == scale.shape == (2, 3, 5, 2)
    assert (scale > 0).all()
    assert torch.allclose(loc[1, 2], net.soft(soft[1, 2], batch)[0], atol=1e-5)


def test_only_masked_positions_are_modulated():
    net = make("Transformer", "Features")
    batch = rows()
    for block in net.trunk.blocks:  # nothing travels between positions
        nn.init.zeros_(block.attention.output.weight)
    out = []
    net.trunk.register_forward_hook(lambda _, __, result: out.append(result))
    net(batch)
    with torch.no_grad():
        net.status[0] += 1
    net(batch)
    with torch.no_grad():
        net.status[1] += 1
    net(batch)
    before, other, both = out
    waiting = batch.masked & ~batch.target
    assert waiting.any()
    assert batch.target.any()
    moved = (other - before).abs().amax(-1) > 1e-6
    assert torch.equal(moved, waiting)
    moved = (both - other).abs().amax(-1) > 1e-6
    assert torch.equal(moved, batch.target)


def test_without_masks_the_mask_vectors_do_not_matter():
    net = make("Transformer", "Features")
    batch = PROCESS.corrupt(rows().x_0, 0.0)
    before = net(batch)
    with torch.no_grad():
        net.status.normal_()
        for modulation in (*net.trunk.modulations, net.trunk.last):
            modulation.weight.normal_()
            modulation.bias.normal_()
    assert torch.equal(net(batch), before)


# --------------------------------------------------------------- parts


def test_rotary_products_depend_on_distance_alone():
    rotary = Rotary(12, 8)
    query, key = torch.randn(2, 1, 8)
    turned_query, turned_key = rotary(query.expand(12, 8)), rotary(key.expand(12, 8))
    product = turned_query @ turned_key.T
    for distance in range(-11, 12):
        diagonal = product.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4)
    assert torch.allclose(turned_query.norm(dim=-1), query.norm().expand(12), atol=1e-5)
    assert product[0].std() > 0.1


def test_rotary_attention_is_equivariant_to_shifts_and_sees_order():
    attention = SelfAttention(8, 2, Rotary(12, 4))
    content = torch.randn(1, 5, 8)
    # The same content elsewhere in the row: the angles of positions 4 to 8 in place of 0 to 4.
    elsewhere = copy.deepcopy(attention)
    for name in ("cosine", "sine"):
        table = getattr(attention.rotary, name)
        setattr(attention.rotary, name, table[:5])
        setattr(elsewhere.rotary, name, table[4:9])
    assert torch.allclose(attention(content), elsewhere(content), atol=1e-5)
    swapped = attention(content.flip(1)).flip(1)
    assert not torch.allclose(attention(content), swapped, atol=1e-3)
    unordered = SelfAttention(8, 2)
    assert torch.allclose(unordered(content), unordered(content.flip(1)).flip(1), atol=1e-5)


@pytest.mark.parametrize("vocab_size", [2, 3, 17])
def test_small_vocabularies_are_coded_evenly(vocab_size):
    code = TokenCode(vocab_size, 32, with_mask=True)
    assert code.dim == vocab_size
    assert not list(code.parameters())
    clean = code(torch.arange(vocab_size))
    assert torch.allclose(clean.mean(0), torch.zeros(vocab_size), atol=1e-6)
    spread = torch.tensor([1.0] * (vocab_size - 1) + [0.0])
    assert torch.allclose(clean.square().mean(0), spread, atol=1e-5)
    assert code(torch.tensor(vocab_size)).tolist() == [0.0] * (vocab_size - 1) + [1.0]
    assert len(code(torch.arange(vocab_size + 1)).unique(dim=0)) == vocab_size + 1


def test_images_of_28_pixels_are_halved_twice():
    process = MaskingProcess(2, 28 * 28)
    sizes = dict(shape=(28, 28), hidden_dim=4, num_blocks=1, num_heads=2)
    net = backbones.UNetDecoder(process, 2, **sizes)
    assert net.down.coarsest == (8, 7, 7)
    assert net(torch.full((1, 784), 2), torch.randn(1, 2), torch.ones(1)).shape == (1, 784, 2)
    with pytest.raises(ValueError, match=r"shape \(28, 28\) cannot be halved 3 times.*8"):
        backbones.UNetDecoder(process, 2, multipliers=(1, 1, 1, 1), **sizes)


def test_channels_keep_the_order_of_the_rows():
    process = MaskingProcess(3, 2 * 4 * 4)
    net = make("UNet", "Decoder", 2, process=process, channels=2)
    batch, z = rows(2, process), torch.randn(2, 2)
    seen = []
    net.norm.register_forward_hook(lambda _, __, h: seen.append(nn.functional.silu(h)))
    logits = net(batch.x_t, z, batch.t)
    pixels = torch.einsum("nchw,kc->nkhw", seen[0], net.head.weight) + net.head.bias[:, None, None]
    expected = pixels.unflatten(1, (2, 3)).permute(0, 1, 3, 4, 2).flatten(1, 3)
    assert torch.allclose(logits, expected, atol=1e-4)


# --------------------------------------------------------------- precision, compilation, storage


@FAMILIES
def test_bfloat16_is_near_and_gives_float32(family):
    decoder, encoder = make(family, "Decoder", 2), make(family, "Encoder", 2)
    batch, z = rows(), torch.randn(3, 5, 2)
    logits, (loc, scale) = decoder(batch.x_t, z, batch.t), encoder(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = (decoder(batch.x_t, z, batch.t), *encoder(batch))
    for exact, near in zip((logits, loc, scale), low, strict=True):
        assert near.dtype == torch.float32
        error = (near - exact).square().mean() / exact.square().mean()
        assert 0 < error < 0.05**2
    # Not rounded to bfloat16 on the way out.
    assert not torch.equal(low[0], low[0].bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parameters_of_normals_are_never_in_half_precision(dtype):
    raw = torch.randn(7, 6).to(dtype)
    loc, scale = backbones.normal_parameters(raw)
    assert loc.dtype == scale.dtype == torch.float32
    for low, exact in zip((loc, scale), backbones.normal_parameters(raw.float()), strict=True):
        assert torch.equal(low, exact)
    zero = backbones.normal_parameters(torch.zeros(6, dtype=dtype))
    assert zero[0].tolist() == [0.0] * 3
    assert torch.allclose(zero[1], torch.ones(3), atol=2e-4)
    assert backbones.normal_parameters(raw.double())[1].dtype == torch.double


def test_perceptrons_give_float32_under_autocast():
    decoder, encoder = make("MLP", "Decoder", 2), make("MLP", "Encoder", 2)
    batch, z = rows(), torch.randn(5, 2)
    exact = decoder(batch.x_t, z, batch.t), *encoder(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = decoder(batch.x_t, z, batch.t), *encoder(batch)
    for one, other in zip(low, exact, strict=True):
        assert one.dtype == torch.float32
        assert 0 < (one - other).abs().max() < 0.1


def test_last_layers_may_have_weights_that_are_products():
    decoder = make("MLP", "Decoder", 2)
    torch.nn.utils.parametrizations.orthogonal(decoder.head)
    batch, z = rows(), torch.randn(5, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decoder(batch.x_t, z, batch.t).dtype == torch.float32


@FAMILIES
def test_double_precision_is_kept(family):
    net = make(family, "Decoder", 2)
    batch, z = rows(), torch.randn(5, 2)
    single = net(batch.x_t, z, batch.t)
    double = net.double()(batch.x_t, z.double(), batch.t)
    assert double.dtype == torch.double
    assert torch.allclose(double.float(), single, atol=1e-4)
    loc, _ = make(family, "Encoder", 2).double()(batch)
    assert loc.dtype == torch.double


@FAMILIES
def test_compiled_networks_equal_plain_ones(family):
    decoder, encoder = make(family, "Decoder", 2), make(family, "Encoder", 2)
    batch = rows()
    z = torch.randn(3, 5, 2)
    logits, parameters = decoder(batch.x_t, z, batch.t), encoder(batch)
    names = list(decoder.state_dict())
    torch._dynamo.reset()
    decoder.compile(backend="eager", fullgraph=True)
    encoder.compile(backend="eager", fullgraph=True)
    assert torch.allclose(decoder(batch.x_t, z, batch.t), logits, atol=1e-5)
    for one, other in zip(encoder(batch), parameters, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert list(decoder.state_dict()) == names


@FAMILIES
def test_state_is_parameters_and_round_trips(family):
    net, other = make(family, "Decoder", 2), make(family, "Decoder", 2)
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    batch, z = rows(), torch.randn(5, 2)
    assert torch.equal(net(batch.x_t, z, batch.t), other(batch.x_t, z, batch.t))


# --------------------------------------------------------------- in programs


@TIMES
@FAMILIES
@pytest.mark.parametrize("latent", [True, False], ids=["latent", "no latent"])
@pytest.mark.parametrize("vocab_size", [3, 40])
def test_every_parameter_learns_from_a_fresh_start(family, timed, latent, vocab_size):
    """Last layers start at zero and hold up the gradients of others for a few updates only."""
    process = MaskingProcess(vocab_size, 16)
    options = dict(process=process, time_conditioning=timed)
    decoder = fresh(family, "Decoder", 2 if latent else 0, **options)
    nets, x_0 = [decoder], rows(6, process).x_0
    model: Any = models.MDM(decoder)
    guide: Any = guides.NoLatent()
    if latent:
        nets.append(fresh(family, "Encoder", 2, **options))
        model, guide = (
            models.VADD(decoder, models.StandardNormal(2)),
            guides.AmortizedNormal(nets[1]),
        )
    loss = MaskedDiffusionELBO(process, "chain", num_steps=3, num_particles=2)(model, guide)
    parameters = [p for net in nets for p in net.parameters()]
    optim = torch.optim.Adam(parameters, 1e-2)
    for _ in range(6):
        optim.zero_grad()
        loss(x_0).backward()
        optim.step()
    for net in nets:
        for name, parameter in net.named_parameters():
            gradient = parameter.grad
            assert gradient is not None, name
            assert gradient.isfinite().all(), name
            assert (gradient != 0).any(), name


@FAMILIES
def test_the_model_reads_neither_clean_tokens_nor_targets(family):
    model = models.VADD(make(family, "Decoder", 2), models.StandardNormal(2))
    batch, z = rows(), torch.randn(5, 2)
    fixed = poutine.condition(model, {"z": z})
    laws = []
    for other in (batch, replace(batch, x_0=(batch.x_0 + 1) % 3, target=batch.masked)):
        with torch.no_grad():
            laws.append(poutine.trace(fixed).get_trace(other).nodes["x_0"]["fn"].logits)
    assert torch.equal(*laws)


@FAMILIES
def test_guides_for_priors_stand_on_the_features(family):
    elbo = MaskedDiffusionELBO(PROCESS)
    x_0 = rows(4).x_0
    encoder = make(family, "Encoder", 2)
    for prior, features in (
        (models.StandardNormal(2), make(family, "Features")),
        (models.StandardNormal(2), encoder),
        (models.ProductOfCategoricals(3, 2, 4), make(family, "Features")),
        (models.Categorical(4, 2), make(family, "Features")),
        (models.Hierarchical((2, 2)), make(family, "Features")),
        (models.VampPrior(make(family, "Encoder", 2), 3), None),
        (models.VampPrior(make(family, "Encoder", 2), 3, conditional=True), None),
    ):
        pyro.clear_param_store()
        guide = guides.for_prior(prior, features)
        model = models.VADD(make(family, "Decoder", prior.latent_dim), prior)
        loss = elbo(model, guide)(x_0)
        loss.backward()
        assert loss.isfinite()
    assert guides.for_prior(models.StandardNormal(2), encoder).encoder is encoder


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make("Residual", "Decoder", 2, hidden_dim=0), "hidden_dim .* got 0"),
        (lambda: make("Residual", "Decoder", -1), "latent_dim .* got -1"),
        (lambda: make("Residual", "Features", num_blocks=0), "num_blocks .* got 0"),
        (lambda: make("Residual", "Encoder", 0), "latent_dim .* got 0"),
        (lambda: make("Residual", "Encoder", 2, dropout=1.0), "dropout .* got 1.0"),
        (lambda: make("Residual", "Decoder", 2, embedding_dim=0), "embedding_dim .* got 0"),
        (lambda: make("Late", "Decoder", 2, hidden_dim=0), "hidden_dim .* got 0"),
        (lambda: make("Late", "Decoder", latent_hidden_dim=0), "latent_hidden_dim .* got 0"),
        (lambda: make("Late", "Decoder", num_latent_blocks=0), "num_latent_blocks .* got 0"),
        (lambda: make("Late", "Decoder", 2, dropout=-0.1), "dropout .* got -0.1"),
        (lambda: make("UNet", "Decoder", 2, condition_dim=-1), "condition_dim .* got -1"),
        (lambda: make("UNet", "Decoder", 2, shape=(4, 5)), r"\(4, 5\) .* 20 .* length 16"),
        (lambda: make("UNet", "Decoder", 2, shape=16), r"shape must be \(height, width\), got 16"),
        (lambda: make("UNet", "Features", channels=3), "channels = 3 makes 48 .* length 16"),
        (lambda: make("UNet", "Features", shape=(1, 16)), r"\(1, 16\) cannot be halved 1 times"),
        (lambda: make("UNet", "Decoder", 2, multipliers=()), "multipliers .* one level"),
        (lambda: make("UNet", "Decoder", 2, num_heads=3), "num_heads = 3 .* width 16"),
        (lambda: make("UNet", "Decoder", 2, num_heads=0), "num_heads .* got 0"),
        (lambda: make("Transformer", "Decoder", 2, num_heads=3), "num_heads = 3 .* width 16"),
        (lambda: make("Transformer", "Features", num_layers=0), "num_layers .* got 0"),
        (lambda: make("Transformer", "Features", condition_dim=0), "condition_dim .* got 0"),
        (lambda: backbones.MLPDecoder(PROCESS, -1), "latent_dim .* got -1"),
        (lambda: backbones.MLPDecoder(PROCESS, num_layers=0), "num_layers .* got 0"),
        (lambda: backbones.MLPFeatures(PROCESS, hidden_dim=0), "hidden_dim .* got 0"),
    ],
)
def test_wrong_sizes_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("family", [*SIZES, "MLP"])
def test_wrong_inputs_are_refused_by_name(family):
    decoder, plain, features = (
        make(family, "Decoder", 2),
        make(family, "Decoder"),
        make(family, "Features"),
    )
    batch = rows()
    with pytest.raises(ValueError, match=r"x_t must have shape \(batch, 16\), got \(5, 15\)"):
        decoder(batch.x_t[:, 1:], torch.randn(5, 2), batch.t)
    with pytest.raises(ValueError, match=r"z must have latent_dim = 2 .* got None"):
        decoder(batch.x_t, None, batch.t)
    with pytest.raises(ValueError, match=r"latent_dim = 2 as its last .* got \(5, 3\)"):
        decoder(batch.x_t, torch.randn(5, 3), batch.t)
    with pytest.raises(ValueError, match=r"one latent a row.*got \(4, 2\)"):
        decoder(batch.x_t, torch.randn(4, 2), batch.t)
    with pytest.raises(ValueError, match=r"latent_dim = 0 and would ignore z \(5, 2\)"):
        plain(batch.x_t, torch.randn(5, 2), batch.t)
    with pytest.raises(ValueError, match="x_0 is None"):
        features(batch.without_data())
    with pytest.raises(ValueError, match=r"x_0 must have shape \(batch, 16\), got \(5, 8\)"):
        features(PROCESS.corrupt(batch.x_0[:, :8], 0.5))
    with pytest.raises(ValueError, match=r"x_t must have shape \(batch, 16\), got \(5, 8\)"):
        features.state(PROCESS.corrupt(batch.x_0[:, :8], 0.5).without_data())
    with pytest.raises(ValueError, match=r"probabilities must have shape \(..., 16, 3\)"):
        features.soft(torch.rand(5, 16, 4), batch)


@FAMILIES
def test_dropout_acts_in_training_alone(family):
    net = make(family, "Decoder", 2, dropout=0.5)
    batch, z = rows(), torch.randn(5, 2)
    assert torch.equal(net(batch.x_t, z, batch.t), net(batch.x_t, z, batch.t))
    net.train()
    assert not torch.equal(net(batch.x_t, z, batch.t), net(batch.x_t, z, batch.t))


def test_blocks_of_a_transformer_take_part_from_the_first_update():
    """Gates that start from zero keep a model at the frequencies of its tokens for long."""
    for condition in ({}, {"time_conditioning": False}):
        decoder = fresh("Transformer", "Decoder", **condition)
        with torch.no_grad():
            decoder.head.weight.normal_()  # zero before training: nothing would reach the blocks
        x_t, t = torch.randint(3, (5, 16)), torch.rand(5)
        decoder(x_t, None, t).square().sum().backward()
        for name, weight in decoder.trunk.blocks.named_parameters():
            assert weight.grad.abs().max() > 0, name


class _OnGPU:
    """A tensor that says that it lies on a GPU."""

    is_cuda = True


def test_attention_on_gpus_leaves_cudnns_kernels_out(monkeypatch):
    def flags():
        cuda = torch.backends.cuda
        own = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()
        return *own, cuda.cudnn_sdp_enabled()

    monkeypatch.setattr(attention, "scaled_dot_product_attention", lambda *a: flags())
    before = flags()
    assert attention.attend(_OnGPU(), None, None) == (*before[:3], False)
    with sdpa_kernel(SDPBackend.MATH):  # somebody's choice stays
        assert attention.attend(_OnGPU(), None, None) == (False, False, True, False)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        assert attention.attend(_OnGPU(), None, None) == (False, False, False, True)
    assert flags() == before


def test_attention_without_cudnn_compiles_as_one_graph(monkeypatch):
    layer = SelfAttention(16, 2, Rotary(8, 8))
    x = torch.randn(3, 8, 16)
    expected = layer(x)

    def attend(query, key, value):
        with sdpa_kernel(attention._kinds_allowed()):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    monkeypatch.setattr(attention, "attend", attend)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), expected)
