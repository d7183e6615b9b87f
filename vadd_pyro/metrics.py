r"""Distances between distributions over a finite set, and the validity of samples.

Distributions are tensors of probabilities of any shape; nats throughout. Report a distance between
distributions beside any share of valid samples: a collapsed sampler is perfectly valid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vadd_pyro.process import MaskingProcess

__all__ = [
    "entropy",
    "histogram",
    "jensen_shannon",
    "kl_divergence",
    "total_variation",
    "validity",
]


def _pair(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    if p.shape != q.shape:
        raise ValueError(f"p and q must have one shape, got {tuple(p.shape)} and {tuple(q.shape)}")
    p, q = p.double().flatten(), q.double().flatten()
    for name, value in (("p", p), ("q", q)):
        if not value.isfinite().all() or (value < 0).any():
            raise ValueError(f"{name} must be a distribution: some entries are negative or nan")
        if abs(value.sum().item() - 1) > 1e-3:
            raise ValueError(f"{name} must be a distribution: it sums to {value.sum().item():.6g}")
    return p, q


def _relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum()


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the sum of absolute differences, in ``[0, 1]``."""
    p, q = _pair(p, q)
    return float((p - q).abs().sum() / 2)


def jensen_shannon(p: Tensor, q: Tensor) -> float:
    """``KL(p | m) / 2 + KL(q | m) / 2`` with ``m`` the mean of the two: nats, at most ``ln 2``."""
    p, q = _pair(p, q)
    m = (p + q) / 2
    return float((_relative_entropy(p, m) + _relative_entropy(q, m)) / 2)


def kl_divergence(q: Tensor, p: Tensor) -> float:
    """``KL(q | p)``, data first: nats, infinite where ``p`` misses a value that ``q`` has."""
    q, p = _pair(q, p)
    return float(_relative_entropy(q, p))


def entropy(p: Tensor) -> float:
    """Entropy in nats."""
    p = p.double().flatten()
    return float(-torch.where(p > 0, p * p.log(), 0.0).sum())


def histogram(x: Tensor, vocab_size: int) -> Tensor:
    """Relative frequencies of rows of tokens ``(N, D)``, ``(K,) * D`` in double precision."""
    x = MaskingProcess(vocab_size, x.shape[-1]).check_tokens(x, "x")
    length = x.shape[1]
    powers = vocab_size ** torch.arange(length - 1, -1, -1, device=x.device)
    counts = torch.bincount((x * powers).sum(-1), minlength=vocab_size**length)
    return (counts.double() / len(x)).reshape((vocab_size,) * length)


def validity(samples: Tensor, reference: Tensor) -> float:
    """Share of samples near the data, the protocol of Ivanov et al. 2026 (App. B.1).

    A sample is valid if its Euclidean distance, in token indices, to the nearest of the reference
    points is at most ``r``, the 90th percentile of the reference points' own nearest-neighbour
    distances.

    Args:
        samples: ``(N, D)`` tokens.
        reference: ``(M, D)`` training points.
    """
    for name, value in (("samples", samples), ("reference", reference)):
        if value.dim() != 2 or len(value) < 2:
            raise ValueError(f"{name} must have shape (N, D) with N > 1, got {tuple(value.shape)}")
    points = reference.double()
    apart = torch.cdist(points, points)
    apart.fill_diagonal_(float("inf"))
    radius = apart.amin(-1).quantile(0.9)
    nearest = torch.cdist(samples.double(), points).amin(-1)
    return float((nearest <= radius + 1e-9).double().mean())
