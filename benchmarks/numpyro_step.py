"""The benchmarks' training step and sampler in NumPyro: the same networks, weights and arithmetic,
jitted.

Needs the packages ``numpyro`` and ``jax`` (the extra ``bench``). One call of the step is one whole
update: masks, guide, model, loss, gradient and Adam, as in the hand-written loop of ``hand.py``.
One call of the sampler is the whole chain, as in the hand-written one of ``sampling.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Before jax starts: one thread, as for torch. It has no other switch on the CPU, and takes more
# all the same where it is not kept on one core.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import random
from numpyro.infer import SVI, TraceMeanField_ELBO
from torch import nn

__all__ = ["make_sampler", "make_step"]

Weights = dict[str, Any]


def weights_of(prefix: str, module: nn.Module) -> Weights:
    """Weights of a torch module by name."""
    return {f"{prefix}.{n}": jnp.asarray(p.detach().numpy()) for n, p in module.named_parameters()}


def linear(w: Weights, name: str, x: Any) -> Any:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def hidden(w: Weights, name: str, h: Any, num_layers: int) -> Any:
    for layer in range(num_layers - 1):
        h = linear(w, f"{name}.layers.{2 * layer + 1}", jax.nn.silu(h))
    return jax.nn.silu(h)


def mlp_decoder(w: Weights, size: Any, x_t: Any, z: Any) -> Any:
    codes = w["decoder.embedding.weight"][x_t].reshape(len(x_t), -1)
    h = linear(w, "decoder.tokens", codes) + linear(w, "decoder.latent", z)
    logits = linear(w, "decoder.head", hidden(w, "decoder.hidden", h, 3))
    return logits.reshape(len(x_t), size.length, size.vocab_size)


def mlp_encoder(w: Weights, size: Any, x_0: Any, masked: Any) -> Any:
    status = w["encoder.features.status.weight"][2 * masked.astype(jnp.int32)]
    codes = w["encoder.features.embedding.weight"][x_0] + status
    h = linear(w, "encoder.features.tokens", codes.reshape(len(x_0), -1))
    return linear(w, "encoder.head", hidden(w, "encoder.features.hidden", h, 3))


def layer_norm(w: Weights, name: str, h: Any) -> Any:
    centred = h - h.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    return centred * scale * w[f"{name}.weight"] + w[f"{name}.bias"]


def trunk(w: Weights, name: str, x: Any, extra: Any) -> Any:
    """``speed.Trunk``: two layers of four heads, normalisation first."""
    h = w[f"{name}.embedding.weight"][x] + w[f"{name}.position"] + extra
    rows, length, width = h.shape
    for layer in range(2):
        at = f"{name}.layers.layers.{layer}"
        y = layer_norm(w, f"{at}.norm1", h)
        qkv = y @ w[f"{at}.self_attn.in_proj_weight"].T + w[f"{at}.self_attn.in_proj_bias"]
        q, k, v = (
            part.reshape(rows, length, 4, width // 4).transpose(0, 2, 1, 3)
            for part in jnp.split(qkv, 3, -1)
        )
        share = jax.nn.softmax(q @ k.transpose(0, 1, 3, 2) / (width // 4) ** 0.5, -1)
        mixed = (share @ v).transpose(0, 2, 1, 3).reshape(rows, length, width)
        h = h + linear(w, f"{at}.self_attn.out_proj", mixed)
        y = jax.nn.relu(linear(w, f"{at}.linear1", layer_norm(w, f"{at}.norm2", h)))
        h = h + linear(w, f"{at}.linear2", y)
    return h


def text_decoder(w: Weights, size: Any, x_t: Any, z: Any) -> Any:
    extra = linear(w, "decoder.latent", z)[:, None]
    return linear(w, "decoder.head", trunk(w, "decoder.trunk", x_t, extra))


def text_encoder(w: Weights, size: Any, x_0: Any, masked: Any) -> Any:
    status = w["encoder.status.weight"][2 * masked.astype(jnp.int32)]
    return linear(w, "encoder.head", trunk(w, "encoder.trunk", x_0, status).mean(-2))


def make_step(
    size: Any, decoder: nn.Module, encoder: nn.Module, x_0: Any
) -> Callable[[], Callable[[], float]]:
    """A training step that starts at the weights of torch modules.

    Args:
        size: a line of the table of ``speed.py``.
        decoder, encoder: the networks.
        x_0: clean tokens, a NumPy array ``(B, D)``.

    Returns:
        The step, which waits until it is done and returns the loss.
    """
    text = size.network == "transformer"
    decode, encode = (text_decoder, text_encoder) if text else (mlp_decoder, mlp_encoder)
    start = {"model": weights_of("decoder", decoder), "guide": weights_of("encoder", encoder)}
    rows = len(x_0)
    clean = jnp.asarray(x_0)

    def parameters(which: str) -> Weights:
        return {name: numpyro.param(name, value) for name, value in start[which].items()}

    @contextmanager
    def weighted(t: Any, masked: Any) -> Iterator[None]:
        handlers = numpyro.handlers
        with handlers.scale(scale=1 / (t * rows)), handlers.mask(mask=masked.any(-1)):
            yield

    def model(x_t: Any, t: Any, masked: Any) -> None:
        w = parameters("model")
        with numpyro.plate("data", rows), weighted(t, masked):
            prior = dist.Normal(jnp.zeros((rows, size.latent_dim)), 1.0)
            z = numpyro.sample("z", prior.to_event(1))
            law = dist.Categorical(logits=decode(w, size, x_t, z)).mask(masked).to_event(1)
            numpyro.sample("x_0", law, obs=clean)

    def guide(x_t: Any, t: Any, masked: Any) -> None:
        w = parameters("guide")
        loc, raw = jnp.split(encode(w, size, clean, masked), 2, -1)
        scale = jax.nn.softplus(raw + (0.0 if text else 0.5413)) + 1e-4
        with numpyro.plate("data", rows), weighted(t, masked):
            numpyro.sample("z", dist.Normal(loc, scale).to_event(1))

    def draw(key: Any) -> tuple[Any, Any, Any]:
        first, second = random.split(key)
        t = 1 - (random.uniform(first) + jnp.arange(rows) / rows) % 1
        masked = random.uniform(second, clean.shape) < t[:, None]
        return jnp.where(masked, size.vocab_size, clean), t, masked

    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), TraceMeanField_ELBO())
    state = svi.init(random.PRNGKey(0), *draw(random.PRNGKey(1)))

    @jax.jit
    def update(state: Any, key: Any) -> Any:
        key, own = random.split(key)
        state, loss = svi.update(state, *draw(own))
        return state, key, loss

    now = [state, random.PRNGKey(2)]

    def step() -> float:
        now[0], now[1], loss = update(*now)
        return float(loss)

    return step


def make_sampler(size: Any, decoder: nn.Module) -> Callable[[int], Any]:
    """A sampler of ``size.sample_rows`` rows in so many steps, all rows through all of them.

    Args:
        size: a line of the table of ``common.py``; its network must be a perceptron.
        decoder: the network.

    Returns:
        The sampler, which waits until it is done and returns the rows ``(B, D)``.
    """
    w = weights_of("decoder", decoder)
    rows, shape = size.sample_rows, (size.sample_rows, size.length)

    def model(w: Weights, x_t: Any) -> Any:
        with numpyro.plate("data", rows):
            prior = dist.Normal(jnp.zeros((rows, size.latent_dim)), 1.0)
            z = numpyro.sample("z", prior.to_event(1))
            law = dist.Categorical(logits=mlp_decoder(w, size, x_t, z))
            return numpyro.sample("x_0", law.to_event(1))

    @jax.jit
    def chain(w: Weights, key: Any, num_steps: int) -> Any:
        def step(i: Any, state: Any) -> Any:
            x, key = state
            key, own, coin = random.split(key, 3)
            drawn = numpyro.handlers.seed(model, own)(w, x)
            # From t = (T - i) / T to one step less: (t - s) / t.
            reveal = random.uniform(coin, shape) < 1 / (num_steps - i)
            return jnp.where((x == size.vocab_size) & reveal, drawn, x), key

        start = jnp.full(shape, size.vocab_size)
        return jax.lax.fori_loop(0, num_steps, step, (start, key))[0]

    now = [random.PRNGKey(0)]

    def sampler(num_steps: int) -> Any:
        now[0], own = random.split(now[0])
        return chain(w, own, num_steps).block_until_ready()

    return sampler
