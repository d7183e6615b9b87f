r"""Tied tokens: short sequences whose positions determine each other.

*Tied bits* of length D: all zeros or all ones, each with probability one half; entropy ``log 2``
for every D. *D1* is ``{(k, k+1, k+2, k+3)}`` and *D2* ``{(k, k+1, l, l+1)}``, uniform, additions
modulo 10 (Zhang et al. 2025, Variational Masked Diffusion, arXiv 2510.23606): 10 and 100 outcomes
among 10,000.
"""

from __future__ import annotations

import numpy as np

from vadd_pyro.data.base import TokenDistribution

__all__ = ["UniformOver", "tied_bits", "tied_tokens"]


class UniformOver(TokenDistribution):
    """The uniform law over a list of outcomes.

    Args:
        name: what tables call it.
        outcomes: distinct rows of tokens, ``(n, length)``.
        vocab_size: number of token values.
    """

    def __init__(self, name: str, outcomes: np.ndarray, vocab_size: int) -> None:
        super().__init__(name, vocab_size, outcomes.shape[1])
        self.outcomes = outcomes

    def _draw(self, num_samples: int, rng: np.random.Generator) -> np.ndarray:
        return self.outcomes[rng.integers(len(self.outcomes), size=num_samples)]

    def _law(self) -> np.ndarray:
        if self.vocab_size**self.length > 2**24:
            raise ValueError(
                f"{self.name} has {self.vocab_size}^{self.length} outcomes: too many for a table "
                "of probabilities"
            )
        law = np.zeros((self.vocab_size,) * self.length)
        law[tuple(self.outcomes.T)] = 1 / len(self.outcomes)
        return law

    @property
    def entropy(self) -> float:
        """``log n`` nats."""
        return float(np.log(len(self.outcomes)))


def tied_bits(length: int) -> UniformOver:
    """All zeros or all ones.

    Args:
        length: number of bits, any.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    return UniformOver(f"tied bits ({length})", np.array([[0] * length, [1] * length]), 2)


def tied_tokens(which: str) -> UniformOver:
    """``"D1"`` or ``"D2"``, four tokens of ten values.

    Args:
        which: name of the set.
    """
    k = np.arange(10)
    if which == "D1":
        outcomes = (k[:, None] + np.arange(4)) % 10
    elif which == "D2":
        first, second = (a.ravel() for a in np.meshgrid(k, k, indexing="ij"))
        outcomes = np.stack([first, first + 1, second, second + 1], -1) % 10
    else:
        raise ValueError(f"which must be 'D1' or 'D2', got {which!r}")
    return UniformOver(f"tied tokens {which}", outcomes, 10)
