"""A training step against hand-written PyTorch, in the same run.

Networks and arithmetic are equal on both sides; variants take turns, and what is printed is the
ratio of medians over the rounds to the hand-written loop (``hand.py``) as it stands. That loop
under ``torch.compile``, the whole update as one graph (in bfloat16, too), the same without rows in
which nothing is masked (``drop_empty_rows``), the products of matrices of its step and nothing
else, and NumPyro where that is installed, take part.
Usage:

    python benchmarks/speed.py [--sizes tiny,toy256] [--rounds 30] [--threads 1] [--json FILE]

Sampling has a benchmark of its own, ``sampling.py``.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from common import SIZES, TARGETS, Size, medians, one_core
from hand import normal_loss, optimiser, plain, training_step
from package import graph_step, products_of, program_step
from torch import Tensor, nn

from vadd_pyro import MaskedDiffusionELBO, MaskingProcess, guides, models
from vadd_pyro.nn import MLPDecoder, MLPEncoder

_PROGRAMS = ("user", "package", "compiled", "products", "compiled bfloat16")


class Trunk(nn.Module):
    """Two transformer layers over embedded tokens plus a vector per row."""

    def __init__(self, vocab_size: int, length: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        return self.layers(self.embedding(x) + self.position + extra)


class TextDecoder(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.trunk = Trunk(size.vocab_size + 1, size.length, size.hidden_dim)
        self.latent = nn.Linear(size.latent_dim, size.hidden_dim)
        self.head = nn.Linear(size.hidden_dim, size.vocab_size)

    def forward(self, x_t: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return self.head(self.trunk(x_t, self.latent(z).unsqueeze(-2)))


class TextEncoder(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.trunk = Trunk(size.vocab_size, size.length, size.hidden_dim)
        self.status = nn.Embedding(3, size.hidden_dim)
        self.head = nn.Linear(size.hidden_dim, 2 * size.latent_dim)

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        status = self.status(batch.masked.long() + batch.target.long())
        z_loc, raw = self.head(self.trunk(batch.x_0, status).mean(-2)).chunk(2, -1)
        return z_loc, nn.functional.softplus(raw) + 1e-4


def networks(size: Size, process: MaskingProcess) -> tuple[nn.Module, nn.Module]:
    if size.network == "transformer":
        return TextDecoder(size), TextEncoder(size)
    return (
        MLPDecoder(process, size.latent_dim, **size.mlp),
        MLPEncoder(process, size.latent_dim, **size.mlp),
    )


class UserModel(nn.Module):
    """What a user writes who has read a Pyro tutorial."""

    def __init__(self, decoder: nn.Module, latent_dim: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.latent_dim = latent_dim

    def forward(self, batch: Any) -> None:
        with pyro.plate("data", len(batch.x_t), dim=-1):
            prior = dist.Normal(torch.zeros(self.latent_dim), torch.ones(self.latent_dim))
            z = pyro.sample("z", prior.to_event(1))
            logits = self.decoder(batch.x_t, z, batch.t)
            law = dist.Categorical(logits=logits).mask(batch.target).to_event(1)
            pyro.sample("x_0", law, obs=batch.x_0)


class UserGuide(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, batch: Any) -> None:
        with pyro.plate("data", len(batch.x_t), dim=-1):
            z_loc, z_scale = self.encoder(batch)
            pyro.sample("z", dist.Normal(z_loc, z_scale).to_event(1))


def by_hand(
    size: Size, pair: tuple[nn.Module, nn.Module], x_0: Tensor, compiled: bool = False
) -> Callable[[], None]:
    """The yardstick, as it stands or under ``torch.compile``."""
    loss_of = normal_loss(*map(plain, pair), size.vocab_size)
    return training_step(loss_of, optimiser(*pair), x_0, compiled=compiled)


def numpyro_step(size: Size, networks: Any, x_0: Tensor) -> Callable[[], Any] | None:
    """The same step in NumPyro, jitted; None where it is not installed."""
    try:
        from numpyro_step import make_step
    except ImportError:
        return None
    return make_step(size, *networks, x_0.numpy())


def time_training(name: str, rounds: int) -> dict[str, float]:
    torch.compiler.reset()  # or the sizes before count as recompilations of the same code
    size = SIZES[name]
    process = MaskingProcess(size.vocab_size, size.length)
    torch.manual_seed(0)
    x_0 = torch.randint(size.vocab_size, (size.batch_size, size.length))
    decoder, encoder = networks(size, process)
    prior = models.StandardNormal(size.latent_dim)

    def pair() -> tuple[nn.Module, nn.Module]:
        return copy.deepcopy((decoder, encoder))

    def user() -> tuple[nn.Module, nn.Module]:
        own = pair()
        return UserModel(own[0], size.latent_dim), UserGuide(own[1])

    def programs() -> tuple[nn.Module, nn.Module]:
        own = pair()
        return models.VADD(own[0], prior), guides.AmortizedNormal(own[1])

    variants: dict[str, Callable[[], Any]] = {
        "yardstick": by_hand(size, pair(), x_0),
        "yardstick compiled": by_hand(size, pair(), x_0, compiled=True),
    }
    for suffix in ("", " dropping"):
        elbo = MaskedDiffusionELBO(process, drop_empty_rows=bool(suffix))
        if suffix and elbo.kept_rows.number(elbo.law, x_0) == len(x_0):
            break  # few are empty
        variants |= {
            f"products{suffix}": products_of(program_step(elbo, *programs(), x_0)),
            f"user{suffix}": program_step(elbo, *user(), x_0),
            f"package{suffix}": program_step(elbo, *programs(), x_0),
            f"compiled{suffix}": graph_step(elbo, *programs(), x_0),
            f"compiled bfloat16{suffix}": graph_step(elbo, *programs(), x_0, half=True),
        }
    other = numpyro_step(size, pair(), x_0)
    if other is not None:
        variants["numpyro"] = other
    return medians(variants, size.steps, rounds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", default=",".join(SIZES), help="which sizes, by comma")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default=None, help="file for the figures")
    arguments = parser.parse_args()
    if arguments.threads == 1:
        one_core()
    torch.set_num_threads(arguments.threads)
    names = arguments.sizes.split(",")
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "training": {},
    }
    print(
        f"{'training step':<18} {'hand, ms':>9} {'compiled':>9} {'user model':>11} "
        f"{'target':>7} {'package':>8} {'target':>7} {'compiled':>9} {'target':>7} "
        f"{'products':>9} {'bfloat16':>9} {'numpyro':>8}"
    )
    with pyro.settings.context(module_local_params=True), pyro.validation_enabled(False):
        for name in names:
            seconds = time_training(name, arguments.rounds)
            base = seconds["yardstick"]
            results["training"][name] = seconds
            targets = ["-" if t is None else f"{t:.2f}" for t in TARGETS[name]]
            other = f"{seconds['numpyro'] / base:>8.3f}" if "numpyro" in seconds else "       -"
            for suffix in ("", " dropping"):
                if f"user{suffix}" not in seconds:
                    continue
                user, package, graph, products, half = (
                    seconds[k + suffix] / base for k in _PROGRAMS
                )
                print(
                    f"{name + suffix:<18} {1e3 * base:>9.3f} "
                    f"{seconds['yardstick compiled'] / base:>9.3f} "
                    f"{user:>11.3f} {targets[0]:>7} {package:>8.3f} {targets[1]:>7} "
                    f"{graph:>9.3f} {targets[2]:>7} {products:>9.3f} {half:>9.3f} {other}",
                    flush=True,
                )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
