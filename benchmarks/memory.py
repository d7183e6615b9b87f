r"""Peak memory of a training step, and what it is made of.

    python benchmarks/memory.py [--decoders residual,unet,transformer] [--json FILE]

One step is forward and backward of ``MaskedDiffusionELBO`` on ``VADD`` with a normal guide, on the
CPU. Every block that torch's allocator hands out or takes back is recorded, kernels' workspaces
among them; the peak is the largest number of bytes alive at once, without what lived before the
step: parameters, their gradients and the data. Nothing is sampled, and the size of the process
plays no part. The steps of a grid are then fitted by

.. math::
    \text{peak} = a + b B + c B D + d B D K \quad \text{bytes},

all coefficients at least zero: ``d / 4`` is how many tensors of the size of the logits live at the
peak, ``c`` is what the networks keep of a position, whatever the vocabulary. Printed besides: how
many blocks at least as large as the logits were alive at once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyro
import pyro.distributions as dist
import torch
from scipy.optimize import nnls
from torch.profiler import ProfilerActivity, profile

from vadd_pyro import MaskedBatch, MaskedDiffusionELBO, MaskingProcess, guides, models
from vadd_pyro.nn import (
    PixelDecoder,
    ResidualDecoder,
    ResidualEncoder,
    TransformerDecoder,
    TransformerEncoder,
    UNetDecoder,
    UNetEncoder,
)

DECODERS = ("residual", "pixel", "unet", "transformer")
BATCHES = (16, 32, 64)
LENGTHS = (64, 144, 256)  # squares, for images
VOCABULARIES = (24, 72, 216)
LATENT_DIM = 8


class Memory(NamedTuple):
    """What a call took.

    Args:
        peak: most bytes alive at once.
        large: the operations that asked for the large blocks among which, at one moment, most
            were alive.
    """

    peak: int
    large: list[str]


def measure(call: Callable[[], Any], least: int) -> Memory:
    """Memory that a call takes on the CPU.

    Args:
        call: what to run; run it once before, so that what lasts is there.
        least: bytes of a large block.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())["traceEvents"]
    events = [e for e in trace if e.get("name") == "[memory]"]
    ops = [e for e in trace if e.get("cat") == "cpu_op"]
    alive: dict[int, int] = {}
    large: dict[int, str] = {}
    peak = 0
    most: list[str] = []
    for event in sorted(events, key=lambda event: event["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size < 0:  # of an address that is not known it is older than the call
            alive.pop(address, None)
            large.pop(address, None)
            continue
        alive[address] = size
        peak = max(peak, sum(alive.values()))
        if size >= least:
            large[address] = _maker(ops, event["ts"])
            if len(large) > len(most):
                most = list(large.values())
    return Memory(peak, most)


def _maker(ops: list[dict[str, Any]], moment: float) -> str:
    """The innermost operation at a moment."""
    around = [op for op in ops if op["ts"] <= moment <= op["ts"] + op["dur"]]
    return min(around, key=lambda op: op["dur"])["name"] if around else "?"


class UsualModel(torch.nn.Module):
    """The same model with the distribution that a Pyro user would take."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, batch: MaskedBatch) -> None:
        with pyro.plate("data", len(batch), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1))
            law = dist.Categorical(logits=self.decoder(batch.x_t, z, batch.t))
            pyro.sample("x_0", law.mask(batch.target).to_event(1), obs=batch.x_0)


def networks(name: str, process: MaskingProcess) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A decoder of the package and its recognition network."""
    if name == "residual":
        sizes: dict[str, Any] = dict(
            hidden_dim=32, num_blocks=2, embedding_dim=8, condition_dim=16
        )
        return (
            ResidualDecoder(process, LATENT_DIM, **sizes),
            ResidualEncoder(process, LATENT_DIM, **sizes),
        )
    if name in ("pixel", "unet"):
        side = math.isqrt(process.length)
        if side**2 != process.length:
            raise ValueError(f"{name} needs square images, got length = {process.length}")
    if name == "pixel":
        sizes = dict(hidden_dim=32, num_blocks=1, embedding_dim=8, condition_dim=16)
        local: dict[str, Any] = dict(shape=(side, side), sketch_dim=4, local_dim=8)
        return (
            PixelDecoder(process, LATENT_DIM, **local, **sizes),
            ResidualEncoder(process, LATENT_DIM, **sizes),
        )
    if name == "unet":
        sizes = dict(
            shape=(side, side),
            hidden_dim=8,
            multipliers=(1, 2),
            num_blocks=1,
            condition_dim=16,
            embedding_dim=8,
        )
        encoder = UNetEncoder(process, LATENT_DIM, feature_dim=16, **sizes)
        return UNetDecoder(process, LATENT_DIM, **sizes), encoder
    if name == "transformer":
        sizes = dict(hidden_dim=16, num_layers=1, num_heads=2, expansion=2, condition_dim=16)
        return (
            TransformerDecoder(process, LATENT_DIM, **sizes),
            TransformerEncoder(process, LATENT_DIM, **sizes),
        )
    raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {name!r}")


def training_step(
    name: str, batch_size: int, length: int, vocab_size: int, *, usual: bool = False
) -> Callable[[], None]:
    """Forward and backward on a batch.

    The step has run once: its gradients are there, and the next one adds to them.
    """
    torch.manual_seed(0)
    process = MaskingProcess(vocab_size, length)
    decoder, encoder = networks(name, process)
    model = (
        UsualModel(decoder) if usual else models.VADD(decoder, models.StandardNormal(LATENT_DIM))
    )
    with pyro.settings.context(module_local_params=True):
        loss_of = MaskedDiffusionELBO(process)(model, guides.AmortizedNormal(encoder))
    x_0 = torch.randint(vocab_size, (batch_size, length))

    def step() -> None:
        with pyro.settings.context(module_local_params=True):
            loss_of(x_0).backward()

    step()
    return step


class Row(NamedTuple):
    """One line of the table.

    Args:
        decoder, batch_size, length, vocab_size: what was run.
        peak: bytes.
        large: who made the blocks as large as the logits, or larger, that were alive at once.
    """

    decoder: str
    batch_size: int
    length: int
    vocab_size: int
    peak: int
    large: list[str]

    @property
    def logits(self) -> int:
        """Bytes of one tensor of logits."""
        return 4 * self.batch_size * self.length * self.vocab_size


def measured(
    name: str, batch_size: int, length: int, vocab_size: int, *, usual: bool = False
) -> Row:
    """One step."""
    step = training_step(name, batch_size, length, vocab_size, usual=usual)
    memory = measure(step, 4 * batch_size * length * vocab_size)
    return Row(name, batch_size, length, vocab_size, *memory)


def fit(rows: list[Row]) -> dict[str, float]:
    """Coefficients of the module's formula, by least squares of relative errors."""
    design = torch.tensor(
        [[1, r.batch_size, r.batch_size * r.length, r.logits / 4] for r in rows],
        dtype=torch.double,
    )
    peak = torch.tensor([r.peak for r in rows], dtype=torch.double)
    scale = design.amax(0)
    relative = (design / scale / peak.unsqueeze(-1)).numpy()
    solution = torch.as_tensor(nnls(relative, numpy.ones(len(rows)))[0]) / scale
    worst = float(((design @ solution - peak) / peak).abs().max())
    names = ("constant", "per_row", "per_position", "per_logit")
    return {**dict(zip(names, solution.tolist(), strict=True)), "worst_relative_error": worst}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--decoders", default=",".join(DECODERS), help="which, by comma")
    parser.add_argument("--json", default=None, help="file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "steps": [],
        "usual": [],
        "fits": {},
    }
    for name in arguments.decoders.split(","):
        print(
            f"{name:<12} {'B':>4} {'D':>5} {'K':>4} {'peak MB':>9} {'in logits':>9} "
            f"{'as large':>9}"
        )
        rows = []
        for length, vocab_size, batch_size in itertools.product(LENGTHS, VOCABULARIES, BATCHES):
            row = measured(name, batch_size, length, vocab_size)
            rows.append(row)
            _show(row)
        print(f"the last made by {', '.join(rows[-1].large)}; with Categorical(logits=...):")
        usual = measured(name, BATCHES[-1], LENGTHS[-1], VOCABULARIES[-1], usual=True)
        _show(usual)
        fitted = fit(rows)
        print(
            f"{name}: {fitted['per_logit']:.2f} bytes a row, position and token, which is "
            f"{fitted['per_logit'] / 4:.2f} tensors of the size of the logits; "
            f"{fitted['per_position']:.0f} a row and position, {fitted['per_row']:.0f} a row, "
            f"{fitted['constant']:.0f} in all; the worst of {len(rows)} steps is off by "
            f"{100 * fitted['worst_relative_error']:.1f} %\n",
            flush=True,
        )
        results["usual"].append(usual._asdict())
        results["steps"] += [row._asdict() for row in rows]
        results["fits"][name] = fitted
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _show(row: Row) -> None:
    print(
        f"{'':<12} {row.batch_size:>4} {row.length:>5} {row.vocab_size:>4} "
        f"{row.peak / 1e6:>9.2f} {row.peak / row.logits:>9.2f} {len(row.large):>9}"
    )


if __name__ == "__main__":
    sys.exit(main())
