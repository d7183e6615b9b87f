"""Small pairs of programs that tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro
import pytest
import torch

from vadd_pyro import MaskingProcess, guides, models
from vadd_pyro.nn import MLPDecoder, MLPEncoder, StateEncoder

torch.set_num_threads(1)  # the tests' networks are too small to share out

PRIORS = ("none", "standard_normal", "conditional_normal", "mixture_of_normals", "categorical")


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Every test starts from one seed, an empty parameter store and Pyro's default settings."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.settings.context(module_local_params=False):
        yield


def small_pair(
    prior: str,
    process: MaskingProcess,
    *,
    latent_dim: int = 2,
    width: int = 16,
    spread: float = 2.0,
) -> tuple[Any, Any]:
    """Model and guide with random weights, made large enough for the latent to matter."""
    sizes: dict[str, Any] = dict(hidden_dim=width, num_layers=2, embedding_dim=4)
    if prior == "none":
        return models.MDM(MLPDecoder(process, **sizes)), guides.NoLatent()
    decoder = MLPDecoder(process, latent_dim, **sizes)
    with torch.no_grad():
        decoder.head.weight.mul_(spread)
        decoder.latent.weight.mul_(spread)
    if prior == "categorical":
        return models.VADD(decoder, models.Categorical(4, latent_dim)), guides.NoLatent()
    law: Any
    if prior == "standard_normal":
        law = models.StandardNormal(latent_dim)
    elif prior == "mixture_of_normals":
        law = models.MixtureOfNormals(latent_dim, 3, spread=1.5)
    else:
        law = models.ConditionalNormal(StateEncoder(process, latent_dim, hidden_dim=width))
        torch.nn.init.normal_(law.network.head.weight, std=0.3)
    encoder = MLPEncoder(process, latent_dim, **sizes)
    return models.VADD(decoder, law), guides.AmortizedNormal(encoder)


def all_rows(vocab_size: int, length: int) -> torch.Tensor:
    """Every row of tokens, ``(K ** D, D)``."""
    return torch.cartesian_prod(*[torch.arange(vocab_size)] * length).reshape(-1, length)


def codes_of(prior: str) -> int:
    """How many codes a prior of the zoo has in tests of inspection, which lays out all
    combinations of a chain.
    """
    return 4 if "chain" in prior else 9
