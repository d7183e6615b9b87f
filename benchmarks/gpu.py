r"""Training steps on a GPU, and the share of its peak that a transformer reaches.

    python benchmarks/gpu.py [--sizes toy,digits,text12] [--rounds 10] [--peak-tflops N]
        [--no-compile] [--json FILE]

As in ``speed.py``, equal networks take turns: the loop by hand (``hand.py``), the package, and the
package's update as one graph. The transformer runs in bfloat16 under autocast. Its utilisation is

.. math::
    \text{MFU} = \frac{\text{FLOPs of a step}}{\text{seconds of a step} \times \text{peak}} ,

the FLOPs being those of the matrix products of loss and gradient, attention's among them, nothing
computed twice, as ``torch.utils.flop_counter`` counts them in the loop by hand, and the peak that
of dense bfloat16 products. ``--device cpu --tiny`` runs the same code at small sizes, to test it.

References:
    Chowdhery et al. 2022, "PaLM" (arXiv 2204.02311), appendix B, for the utilisation; data sheets
    of the devices for their peaks.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from common import medians, processor
from hand import normal_loss, optimiser, plain, training_step
from package import graph_step, program_step
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vadd_pyro import MaskedDiffusionELBO, MaskingProcess, guides, models
from vadd_pyro.compiled.graphs import NotOneGraphError
from vadd_pyro.nn import MLPDecoder, MLPEncoder, TransformerDecoder, TransformerEncoder

# Dense bfloat16 products, TFLOP/s, by a part of the device's name; the first that fits counts.
PEAKS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
COUNTED = 2  # rows of the step whose FLOPs are counted; they are proportional to rows


class Size(NamedTuple):
    """One line of the table.

    Args:
        length, vocab_size, batch_size: of rows.
        sizes: of the networks, perceptrons or transformers.
        half: whether it runs in bfloat16.
        steps: of a round.
        tiny: what replaces these in a test.
    """

    length: int
    vocab_size: int
    batch_size: int
    sizes: dict[str, Any]
    half: bool
    steps: int
    tiny: dict[str, Any]

    @property
    def transformer(self) -> bool:
        return "num_heads" in self.sizes

    @property
    def what(self) -> str:
        """In words."""
        network = "transformer" if self.transformer else "MLP"
        kind = "bfloat16" if self.half else "float32"
        return (
            f"D {self.length}, K {self.vocab_size}, batch {self.batch_size}, {network} "
            f"{self.sizes['num_layers']} x {self.sizes['hidden_dim']}, {kind}"
        )


_SMALL = dict(batch_size=8, steps=1)
SIZES = {
    "toy": Size(
        *(2, 100, 1024),
        dict(hidden_dim=256, num_layers=3, embedding_dim=32),
        *(False, 50),
        _SMALL | dict(sizes=dict(hidden_dim=16, num_layers=3, embedding_dim=4)),
    ),
    "digits": Size(
        *(64, 17, 1024),
        dict(hidden_dim=512, num_layers=3, embedding_dim=8),
        *(False, 50),
        _SMALL | dict(sizes=dict(hidden_dim=16, num_layers=3, embedding_dim=4)),
    ),
    "text12": Size(
        *(256, 28, 64),
        dict(hidden_dim=768, num_layers=12, num_heads=12),
        *(True, 5),
        _SMALL | dict(length=16, sizes=dict(hidden_dim=32, num_layers=2, num_heads=4)),
    ),
}
LATENT_DIM = 16


def peak_of(name: str) -> float | None:
    """TFLOP/s of a device by its name; None if it is not known."""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def step_flops(size: Size, decoder: nn.Module, encoder: nn.Module, device: str) -> float:
    """FLOPs of the matrix products of one training step, counted on a few rows."""
    loss_of = normal_loss(plain(decoder), plain(encoder), size.vocab_size)
    x_0 = torch.randint(size.vocab_size, (COUNTED, size.length), device=device)
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
        torch.autocast(device, torch.bfloat16, size.half),
    ):
        loss_of(x_0).backward()
    return counter.get_total_flops() / COUNTED * size.batch_size


def make_variants(
    size: Size, pairs: list[tuple[nn.Module, nn.Module]], device: str, compiled: bool
) -> dict[str, Callable[[], Any]]:
    """Training steps on networks of the same weights, one pair each."""
    process = MaskingProcess(size.vocab_size, size.length)
    x_0 = torch.randint(size.vocab_size, (size.batch_size, size.length), device=device)
    autocast = partial(torch.autocast, device, torch.bfloat16, size.half)
    elbo = MaskedDiffusionELBO(process)

    def programs(pair: tuple[nn.Module, nn.Module]) -> tuple[nn.Module, nn.Module]:
        prior = models.StandardNormal(LATENT_DIM).to(device)
        return models.VADD(pair[0], prior), guides.AmortizedNormal(pair[1])

    variants: dict[str, Callable[[], Any]] = {
        "hand": training_step(
            normal_loss(*map(plain, pairs[0]), size.vocab_size),
            optimiser(*pairs[0]),
            x_0,
            autocast=autocast,
        ),
        "package": program_step(elbo, *programs(pairs[1]), x_0, autocast),
    }
    if compiled:
        try:
            variants["compiled"] = graph_step(elbo, *programs(pairs[2]), x_0, size.half)
        except NotOneGraphError as error:
            print(f"no graph: {error}", file=sys.stderr)
    return variants


def measure(
    size: Size, device: str, rounds: int, compiled: bool, peak: float | None
) -> dict[str, Any]:
    """One line of the table."""
    torch.manual_seed(0)
    process = MaskingProcess(size.vocab_size, size.length)
    kinds = (
        (TransformerDecoder, TransformerEncoder) if size.transformer else (MLPDecoder, MLPEncoder)
    )
    pair = tuple(kind(process, LATENT_DIM, **size.sizes).to(device) for kind in kinds)
    pairs = [copy.deepcopy(pair) for _ in range(3)]

    def clock() -> float:
        """Seconds, once the device has done what it was told."""
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    variants = make_variants(size, pairs, device, compiled)
    seconds = medians(variants, size.steps, rounds, clock)
    found: dict[str, Any] = {"what": size.what, "seconds": seconds, "utilisation": None}
    if size.transformer:
        flops = found["flops"] = step_flops(size, *pair, device)
        if peak is not None:
            best = min(value for name, value in seconds.items() if name != "hand")
            found["utilisation"] = {
                "hand": flops / seconds["hand"] / (1e12 * peak),
                "best": flops / best / (1e12 * peak),
            }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", default=",".join(SIZES), help="which sizes, by comma")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--no-compile", action="store_true", help="without compiled updates")
    parser.add_argument(
        "--peak-tflops", type=float, default=None, help="of dense bfloat16 products"
    )
    parser.add_argument("--json", default=None, help="file for the figures")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is there (--device cpu --tiny tries the code without one)")
    name = processor() if arguments.device == "cpu" else torch.cuda.get_device_name()
    peak = arguments.peak_tflops
    if peak is not None and not (math.isfinite(peak) and peak > 0):
        parser.error(f"--peak-tflops must be positive, got {peak}")
    peak = peak_of(name) if peak is None and arguments.device == "cuda" else peak
    told = (
        f"Utilisation is relative to {peak:g} TFLOP/s."
        if peak is not None
        else (
            f"The peak of {name} is not known here, so no utilisation is told (--peak-tflops "
            "gives it)."
        )
    )
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "device": name,
        "peak": told,
        "sizes": {},
    }
    print(f"{name}. {told}")
    with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False):
        for key in arguments.sizes.split(","):
            size = SIZES[key]
            if arguments.tiny:
                size = size._replace(**size.tiny)
            compiled = not arguments.no_compile
            found = measure(size, arguments.device, arguments.rounds, compiled, peak)
            results["sizes"][key] = found
            each = ", ".join(f"{k} {1e3 * s:.3f} ms" for k, s in found["seconds"].items())
            used = found["utilisation"]
            share = "" if used is None else f", MFU {used['hand']:.3f} and {used['best']:.3f}"
            print(f"{key}: {size.what}: {each}{share}", flush=True)
            if arguments.json:  # at once: the next may compile for longer than a machine is lent
                Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
