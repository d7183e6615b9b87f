"""What every toy offers: draws, and the law that they are drawn from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vadd_pyro.metrics import entropy
from vadd_pyro.process import MaskingProcess, check_size
from vadd_pyro.schedules import Schedule

__all__ = ["TokenDistribution"]


class TokenDistribution(ABC):
    """A known law over rows of ``length`` tokens from ``vocab_size`` values.

    Args:
        name: how tables and figures call it.
        vocab_size: number of token values ``K``.
        length: number of positions ``D``.
    """

    def __init__(self, name: str, vocab_size: int, length: int) -> None:
        check_size("vocab_size", vocab_size, least=2)
        check_size("length", length)
        self.name = name
        self.vocab_size = vocab_size
        self.length = length

    @abstractmethod
    def _draw(self, num_samples: int, rng: np.random.Generator) -> np.ndarray:
        """Tokens ``(num_samples, length)``."""

    @abstractmethod
    def _law(self) -> np.ndarray:
        """Probabilities of all outcomes, ``(vocab_size,) * length``."""

    def sample(self, num_samples: int, seed: int = 0) -> Tensor:
        """Independent draws, ``(num_samples, length)`` long, the same for the same seed."""
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        return torch.from_numpy(self._draw(num_samples, np.random.default_rng(seed))).long()

    @cached_property
    def probabilities(self) -> Tensor:
        """The true law over all outcomes, ``(vocab_size,) * length`` in double precision."""
        law = torch.from_numpy(np.ascontiguousarray(self._law())).double()
        return law / law.sum()

    @property
    def entropy(self) -> float:
        """Entropy of the law in nats."""
        return entropy(self.probabilities)

    def process(self, schedule: Schedule | None = None) -> MaskingProcess:
        """A masking process over such rows."""
        return MaskingProcess(self.vocab_size, self.length, schedule)

    def __repr__(self) -> str:
        return f"<{self.name}: vocab_size={self.vocab_size}, length={self.length}>"
