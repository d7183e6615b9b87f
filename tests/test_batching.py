"""How many rows run at once, and networks compiled for the time of a call."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from vadd_pyro import MaskingProcess, TokenCategorical, models, sample
from vadd_pyro.batching import LiveBytes, rows_at_once
from vadd_pyro.infilling import infill
from vadd_pyro.nn import (
    LateDecoder,
    LateTransformerDecoder,
    MLPDecoder,
    ResidualDecoder,
    TransformerDecoder,
    UNetDecoder,
)

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def wide_model(process: MaskingProcess) -> models.VADD:
    net = UNetDecoder(process, 2, shape=(8, 8), hidden_dim=32, multipliers=(1, 2), num_blocks=1)
    return models.VADD(net, models.StandardNormal(2))


def test_live_bytes_are_those_of_tensors_that_live():
    given = torch.zeros(1000)
    with LiveBytes() as live:
        a = given + 1
        b = a.view(10, 100).t()
        assert live.now == 4000  # a view holds nothing of its own
        c = b.double()
        assert live.now == 12_000
        del a, c
        assert live.now == 4000
        given.add_(1)
        given[:10].zero_()
        del b
        assert live.now == 0
    assert live.peak == 12_000


def test_calls_stay_within_the_memory_they_are_given():
    process = MaskingProcess(3, 64)
    model = wide_model(process)
    calls = []
    model.decoder.tokens.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    for max_bytes in (2**22, 2**24):
        with LiveBytes() as live:
            x = sample(model, process, 60, 3, max_bytes=max_bytes, seed=0)
        assert x.shape == (60, 64)
        # Rows and what the sampler keeps of them come on top.
        assert 0.3 * max_bytes < live.peak < 1.3 * max_bytes
        del calls[:]
    sample(model, process, 60, 3, max_bytes=1, seed=0)
    assert set(calls) - {2} == {1}  # two rows told what a row takes


def test_a_seed_decides_the_samples_whatever_ran_before():
    process = MaskingProcess(3, 64)
    model = wide_model(process)
    state = torch.get_rng_state()
    first = sample(model, process, 30, 2, max_bytes=2**22, seed=4)
    second = sample(model, process, 30, 2, max_bytes=2**22, seed=4)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_sizes_are_the_callers_or_those_that_fit():
    process = MaskingProcess(3, 64)
    model = wide_model(process)

    def size(num_rows, batch_size=None, max_bytes=None):
        with torch.no_grad():
            return rows_at_once(model, process, num_rows, batch_size, max_bytes, CPU)

    assert size(50) == 50
    assert size(10**6) < 10_000
    assert size(10**6, batch_size=123_456) == 123_456
    assert size(10**6, batch_size=7, max_bytes=2**40) == 7
    small, large = size(10**6, max_bytes=2**24), size(10**6, max_bytes=2**26)
    assert 3.9 < large / small < 4.2
    assert size(10**6, batch_size=10**6, max_bytes=2**24) == small


def test_functions_and_latents_of_all_rows_are_measured_too():
    process = MaskingProcess(3, 400)
    seen = []

    def program(batch):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        seen.append((len(batch), float(w)))
        with pyro.plate("data", len(batch), dim=-1):
            logits = (w * torch.arange(3.0)).expand(len(batch), 400, 3)
            pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)

    sample(program, process, 500, 1, max_bytes=2**22, seed=0)
    assert seen[0][0] == 2  # the probe; its latent is nobody's
    assert len({w for _, w in seen[1:]}) == 1
    assert sum(rows for rows, _ in seen[1:]) == 500
    assert len(seen) > 3


def test_infilling_splits_its_chains():
    process = MaskingProcess(3, 64)
    model = wide_model(process)
    row = torch.full((64,), process.mask_id)
    row[0] = 1
    calls = []
    model.decoder.tokens.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    found = infill(model, process, row, 2, num_particles=40, max_bytes=2**22, seed=0)
    assert (found.x[0, :, 0] == 1).all()
    assert 1 <= max(calls) < 40
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        infill(model, process, row, 2, batch_size=0)


# ------------------------------------------------------------------- compiled networks


def networks() -> dict[str, nn.Module]:
    process = MaskingProcess(3, 16)
    return {
        "mlp": MLPDecoder(process, 2, hidden_dim=8, num_layers=2),
        "residual": ResidualDecoder(process, 2, hidden_dim=8, num_blocks=1),
        "late": LateDecoder(process, 2, hidden_dim=8, num_blocks=1, latent_hidden_dim=4),
        "unet": UNetDecoder(process, 2, shape=(4, 4), hidden_dim=4, multipliers=(1,)),
        "transformer": TransformerDecoder(process, 2, hidden_dim=8, num_layers=1, num_heads=2),
        "late transformer": LateTransformerDecoder(
            process, 2, hidden_dim=8, num_layers=1, num_heads=2, latent_hidden_dim=4
        ),
    }


@pytest.mark.parametrize("name", list(networks()))
def test_compiled_networks_draw_the_same(name):
    process, net = MaskingProcess(3, 16), networks()[name]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model = models.VADD(net, models.StandardNormal(2))
    names = list(model.state_dict())
    torch._dynamo.reset()
    expected = sample(model, process, 40, 3, seed=2)
    calls = torch._dynamo.utils.counters["stats"]
    calls.clear()
    found = sample(model, process, 40, 3, seed=2, compile="eager")
    assert calls["unique_graphs"] >= len(net.heavy_parts())
    assert (found != expected).double().mean() < 0.01
    assert list(model.state_dict()) == names
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_a_compiler_that_fails_costs_a_line_and_nothing_else():
    process = MaskingProcess(3, 16)

    def broken(graph, inputs):
        raise OSError("no compiler here\nand a long story")

    torch._dynamo.register_backend(broken, name="broken_for_test")
    model = models.VADD(networks()["mlp"], models.StandardNormal(2))
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="compile has no effect.*no compiler here") as caught:
        found = sample(model, process, 20, 3, seed=0, compile="broken_for_test")
    assert len([w for w in caught if "no effect" in str(w.message)]) == 1
    assert "\n" not in str(caught[0].message)
    assert torch.equal(found, sample(model, process, 20, 3, seed=0))


def test_errors_of_the_network_are_its_own():
    class Failing(nn.Module):
        def forward(self, x_t, z, t):
            raise KeyError("mine")

    model = models.VADD(Failing(), models.StandardNormal(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError, match="mine"):
            sample(model, MaskingProcess(3, 4), 5, 1, compile="eager")
    assert model.decoder._compiled_call_impl is None


def test_what_cannot_be_compiled_is_said():
    process = MaskingProcess(3, 4)

    def program(batch):
        raise AssertionError

    with pytest.raises(
        ValueError, match=r"attribute 'decoder', got function.*network.compile\(\)"
    ):
        sample(program, process, 5, 1, compile=True)
    model = models.MDM(MLPDecoder(process, hidden_dim=8))
    with pytest.raises(TypeError, match="compile must be True, False or the name of a backend"):
        sample(model, process, 5, 1, compile=3)


def test_networks_that_are_compiled_already_stay_so():
    process = MaskingProcess(3, 4)
    model = models.MDM(MLPDecoder(process, hidden_dim=8))
    torch._dynamo.reset()
    model.decoder.hidden.compile(backend="eager")
    own = model.decoder.hidden._compiled_call_impl
    sample(model, process, 5, 2, compile="eager")
    assert model.decoder.hidden._compiled_call_impl is own


def test_the_benchmark_runs():
    script = ROOT / "benchmarks" / "sampling.py"
    result = subprocess.run(
        [sys.executable, str(script), "--sizes", "tiny", "--steps", "1,2", "--rounds", "1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("tiny") == 2
