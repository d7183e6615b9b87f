"""Throughput of sampling against a hand-written sampler, in the same run.

    python benchmarks/sampling.py [--sizes toy,text] [--steps 1,4,16,64] [--rounds 5] [--compile]
                                  [--json FILE]

``--compile`` adds both with their networks compiled.

The hand-written one is what a first draft looks like: at every step the network runs on all rows,
and Gumbel noise is added to the logits of all positions. NumPyro's, where that is installed, is
the same loop over a NumPyro program, jitted as one (perceptrons with a normal latent only). All
have the same networks in evaluation mode and the same law; variants take turns, one thread, and
times are those that the processor spent on the process, which other programs on the machine
disturb least. Printed are rows a second and the ratios of the medians to the hand-written one.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from common import SIZES, Size, medians, one_core
from hand import plain
from torch import Tensor, nn

from vadd_pyro import MaskingProcess, models, sample
from vadd_pyro.nn import MLPDecoder, TransformerDecoder

NUM_CODES = 64


class Case(NamedTuple):
    """One line of the table.

    Args:
        size: of rows and networks.
        prior: law of the latent: normal, codes or none.
    """

    size: Size
    prior: str = "normal"


CASES = {
    "tiny": Case(SIZES["tiny"]),
    "toy": Case(SIZES["toy256"]),
    "toy, codes": Case(SIZES["toy256"], "codes"),
    "toy, no latent": Case(SIZES["toy256"], "none"),
    "bin64": Case(SIZES["bin64"]),
    "bin784": Case(SIZES["bin784"]),
    "text": Case(SIZES["text"]),
}


def make(case: Case) -> tuple[nn.Module, Callable[[int], Tensor | None], MaskingProcess]:
    """A model, how a hand-written sampler draws its latents, and the process."""
    size = case.size
    process = MaskingProcess(size.vocab_size, size.length)
    latent_dim = 0 if case.prior == "none" else size.latent_dim
    decoder: nn.Module
    if size.network == "transformer":
        decoder = TransformerDecoder(
            process,
            latent_dim,
            hidden_dim=size.hidden_dim,
            num_layers=2,
            num_heads=4,
            time_conditioning=False,
        )
    else:
        decoder = MLPDecoder(process, latent_dim, **size.mlp)
    if case.prior == "none":
        return models.MDM(decoder), lambda rows: None, process
    if case.prior == "codes":
        prior = models.Categorical(NUM_CODES, latent_dim)
        weights = torch.ones(NUM_CODES)
        return (
            models.VADD(decoder, prior),
            lambda rows: prior.embedding(torch.multinomial(weights, rows, replacement=True)),
            process,
        )
    model = models.VADD(decoder, models.StandardNormal(latent_dim))
    return model, lambda rows: torch.randn(rows, latent_dim), process


def naive_sampler(
    decoder: nn.Module,
    latents: Callable[[int], Tensor | None],
    process: MaskingProcess,
    rows: int,
    num_steps: int,
) -> Tensor:
    """Gumbel noise over all positions of all rows, at every step."""
    x = torch.full((rows, process.length), process.mask_id)
    for i in range(num_steps, 0, -1):
        t, s = i / num_steps, (i - 1) / num_steps
        logits = decoder(x, latents(rows), torch.full((rows,), t))
        noise = -torch.log(-torch.log(torch.rand_like(logits).clamp_min(1e-20)))
        drawn = (logits + noise).argmax(-1)
        reveal = (x == process.mask_id) & (torch.rand(x.shape) < (t - s) / t)
        x = torch.where(reveal, drawn, x)
    return x


class Bare(nn.Module):
    """A decoder as a hand-written sampler has it, without the package's ways of saving work."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x_t: Tensor, z: Tensor | None, t: Tensor) -> Tensor:
        with torch.enable_grad():  # which those are not for; no parameter asks for one
            return self.decoder(x_t, z, t)


def numpyro_sampler(case: Case, decoder: nn.Module) -> Callable[[int], Any] | None:
    """The same in NumPyro, jitted; None where it is not installed, or not for such networks."""
    if case.prior != "normal" or case.size.network != "mlp":
        return None
    try:
        from numpyro_step import make_sampler
    except ImportError:
        return None
    return make_sampler(case.size, decoder)


def samplers(case: Case, compiled: bool) -> dict[str, Callable[[int], Any]]:
    """What draws the rows of a case in so many steps, by variant."""
    torch.manual_seed(0)
    model, latents, process = make(case)
    model.requires_grad_(False).eval()
    rows = case.size.sample_rows
    bare = Bare(plain(model.decoder))
    variants: dict[str, Callable[[int], Any]] = {
        "naive": lambda steps: naive_sampler(bare, latents, process, rows, steps),
        "package": lambda steps: sample(model, process, rows, steps),
    }
    if compiled:
        torch.compiler.reset()  # or the cases before count as recompilations of the same code
        # A copy, so that what the package compiles in place is not compiled twice.
        fast = torch.compile(Bare(plain(copy.deepcopy(model.decoder))), dynamic=False)
        variants["naive compiled"] = lambda steps: naive_sampler(
            fast, latents, process, rows, steps
        )
        variants["compiled"] = lambda steps: sample(model, process, rows, steps, compile=True)
    other = numpyro_sampler(case, model.decoder)
    if other is not None:
        variants["numpyro"] = other
    return variants


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--sizes", default=";".join(CASES), help="which sizes, by semicolon; by default all"
    )
    parser.add_argument("--steps", default="1,4,16,64", help="numbers of steps, by comma")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="with compiled networks too")
    parser.add_argument("--json", default=None, help="file for the figures")
    arguments = parser.parse_args()
    one_core()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rounds": arguments.rounds,
        "rows": {},
        "seconds": {},
    }
    columns = ["package"] + ["naive compiled", "compiled"] * arguments.compile + ["numpyro"]
    print(
        f"{'':<15} {'rows':>6} {'steps':>6} {'naive rows/s':>13} {'package rows/s':>15}"
        + "".join(f"{c:>15}" for c in columns)
    )
    with (
        torch.no_grad(),
        pyro.settings.context(module_local_params=True),
        pyro.validation_enabled(False),
    ):
        for name in arguments.sizes.split(";"):
            variants = samplers(CASES[name], arguments.compile)
            rows = results["rows"][name] = CASES[name].size.sample_rows
            for steps in map(int, arguments.steps.split(",")):
                calls = {key: partial(call, steps) for key, call in variants.items()}
                seconds = medians(calls, 1, arguments.rounds, clock=time.process_time, warm_up=1)
                results["seconds"][f"{name}/{steps}"] = seconds
                base = seconds["naive"]
                speeds = f"{rows / base:>13,.0f} {rows / seconds['package']:>15,.0f}"
                ratios = "".join(
                    f"{seconds[c] / base:>15.3f}" if c in seconds else f"{'-':>15}"
                    for c in columns
                )
                print(f"{name:<15} {rows:>6} {steps:>6} {speeds}{ratios}", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
