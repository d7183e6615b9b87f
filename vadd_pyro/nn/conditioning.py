r"""How networks are told the time and the latent, and how tokens enter them.

Adaptive normalisation (Perez et al. 2018, arXiv 1709.07871; Peebles and Xie 2023, arXiv
2212.09748): a condition ``c`` sets scale and shift of what a normalisation returns,

.. math::
    h \mapsto \mathrm{norm}(h) \odot (1 + \mathrm{scale}(c)) + \mathrm{shift}(c) , \qquad c =
    \mathrm{mlp}(\mathrm{sinusoids}(t)) + A z .
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, silu

from vadd_pyro.process import check_size

__all__ = ["Condition", "Modulation", "TokenCode", "check_dropout", "full_precision"]

_NUM_SINUSOIDS = 64


def check_dropout(dropout: float) -> None:
    """Check that an argument is the probability of dropping a unit.

    Raises:
        ValueError: naming its value.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout!r}")


def full_precision(layer: nn.Linear, h: Tensor) -> Tensor:
    """``layer(h)`` in the precision of the layer's weights, whatever autocast says.

    For last layers. A bfloat16 number has 8 significant bits, so that a logit of 10 would be off
    by up to 0.03 nats, and casting the result afterwards would hold it twice.
    """
    if not torch.is_autocast_enabled(h.device.type):  # nothing to leave, which takes time
        return layer(h.to(layer.weight.dtype))
    with torch.autocast(h.device.type, enabled=False):
        return layer(h.to(layer.weight.dtype))


class TokenCode(nn.Module):
    """Vectors of tokens: fixed ones for a small vocabulary, learned ones for a large one.

    A token of at most ``embedding_dim`` clean ones is told by ``K - 1`` numbers, one-hot without
    the first, of mean zero and variance one over the vocabulary; two tokens are -1 and 1. The
    affine layer that follows then holds an embedding of every token, and nothing is learned twice.

    Args:
        vocab_size: number of clean tokens ``K``.
        embedding_dim: largest vocabulary that is coded so, and size of the vectors of others.
        with_mask: give the mask token, of id ``K``, a vector of its own too.
        learned: learn the vectors of a small vocabulary too, where no affine layer follows.

    Shapes:
        tokens ``(...)`` give ``(..., dim)``.
    """

    fixed: Tensor

    def __init__(
        self, vocab_size: int, embedding_dim: int, *, with_mask: bool, learned: bool = False
    ) -> None:
        super().__init__()
        check_size("embedding_dim", embedding_dim)
        self.vocab_size = vocab_size
        self.learned: nn.Embedding | None = None
        if learned or vocab_size > embedding_dim:
            self.dim = embedding_dim
            self.learned = nn.Embedding(vocab_size + with_mask, embedding_dim)
            return
        centred = (torch.eye(vocab_size) - 1 / vocab_size)[:, 1:]
        code = torch.zeros(vocab_size + with_mask, vocab_size - 1 + with_mask)
        code[:vocab_size, : vocab_size - 1] = centred * (vocab_size / (vocab_size - 1) ** 0.5)
        if with_mask:
            code[-1, -1] = 1.0
        self.dim = code.shape[1]
        self.register_buffer("fixed", code, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, self.table)

    @property
    def table(self) -> Tensor:
        """Vectors of all tokens, the mask's last if it has one."""
        return self.fixed if self.learned is None else self.learned.weight

    @property
    def clean(self) -> Tensor:
        """Vectors of the clean tokens, ``(K, dim)``."""
        return self.table[: self.vocab_size]


class _TimeEmbedding(nn.Module):
    """Two layers over sinusoids of periods from 0.06 to 60, ``(B,)`` to ``(B, size)``."""

    frequencies: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        half = _NUM_SINUSOIDS // 2
        frequencies = 100 * torch.exp(-math.log(1000) * torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.layers = nn.Sequential(
            nn.Linear(_NUM_SINUSOIDS, size), nn.SiLU(), nn.Linear(size, size)
        )

    def forward(self, t: Tensor) -> Tensor:
        angle = t.unsqueeze(-1) * self.frequencies
        waves = torch.cat([angle.sin(), angle.cos()], -1)
        return self.layers(waves.to(self.frequencies.dtype))


class Condition(nn.Module):
    """The condition ``c``, ``(..., B, size)`` or, of a latent laid out for all rows and no time,
    ``(C, 1, size)``; None without latent and time.

    Args:
        size: size of ``c``, the ``condition_dim`` of decoders and features.
        latent_dim: size of the latent; 0 for none.
        time_conditioning: whether the time is told.
    """

    def __init__(self, size: int, latent_dim: int, *, time_conditioning: bool) -> None:
        super().__init__()
        check_size("condition_dim", size)
        self.latent = nn.Linear(latent_dim, size) if latent_dim else None
        self.time = _TimeEmbedding(size) if time_conditioning else None
        self.size = size if latent_dim or time_conditioning else 0

    def forward(self, z: Tensor | None, t: Tensor) -> Tensor | None:
        c = None if self.latent is None else self.latent(z)
        if self.time is not None:
            c = self.time(t) if c is None else c + self.time(t)
        return c


class Modulation(nn.Module):
    """Parameters of adaptive normalisations, an affine map of ``silu(c)``, zero before training.

    Without a condition they are learned numbers, as an ordinary normalisation has.

    Args:
        condition_dim: size of ``c``; 0 without one.
        size: how many numbers to return.
    """

    def __init__(self, condition_dim: int, size: int) -> None:
        super().__init__()
        check_size("size", size)
        self.weight = nn.Parameter(torch.zeros(size, condition_dim)) if condition_dim else None
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, c: Tensor | None) -> Tensor:
        if self.weight is None or c is None:
            return self.bias
        return nn.functional.linear(silu(c), self.weight, self.bias)
