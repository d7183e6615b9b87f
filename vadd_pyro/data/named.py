"""Data by name, as on the command line."""

from __future__ import annotations

from functools import cache

from vadd_pyro.data.base import TokenDistribution
from vadd_pyro.data.tokens import tied_bits, tied_tokens
from vadd_pyro.data.toy import TOYS, toy
from vadd_pyro.names import KNOWN_LAWS as NAMES
from vadd_pyro.names import check

__all__ = ["NAMES", "named"]

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
    check("data", name)
    if name in TOYS:
        return toy(name, vocab_size)
    if name == "tied_bits":
        return tied_bits(_TIED_BITS)
    return tied_tokens(name.upper())
