"""Data by name, as on the command line."""

from __future__ import annotations

from functools import cache

from vadd_pyro.data.base import TokenDistribution
from vadd_pyro.data.tokens import tied_bits, tied_tokens
from vadd_pyro.data.toy import TOYS, toy

__all__ = ["NAMES", "named"]

NAMES = (*TOYS, "d1", "d2", "tied_bits")
_TIED_BITS = 6


@cache
def named(name: str, vocab_size: int = 100) -> TokenDistribution:
    """A data set by its name.

    Args:
        name: one of :data:`NAMES`.
        vocab_size: bins per axis of a toy density; tied tokens have their own.

    Raises:
        ValueError: listing the names.
    """
    if name in TOYS:
        return toy(name, vocab_size)
    if name in ("d1", "d2"):
        return tied_tokens(name.upper())
    if name == "tied_bits":
        return tied_bits(_TIED_BITS)
    raise ValueError(f"data must be among {', '.join(NAMES)}, got {name!r}")
