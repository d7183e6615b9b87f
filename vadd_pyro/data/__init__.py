"""Data with a known law.

Toy densities on a grid of bins, and tied tokens. Nothing is downloaded.
"""

from vadd_pyro.data.base import TokenDistribution
from vadd_pyro.data.named import NAMES, named
from vadd_pyro.data.tokens import tied_bits, tied_tokens
from vadd_pyro.data.toy import (
    TOYS,
    ToyDensity,
    checkerboard,
    circles,
    eight_modes,
    moons,
    pinwheel,
    swiss_roll,
    swiss_roll_es,
    toy,
    two_spirals,
)

__all__ = [
    "NAMES",
    "TOYS",
    "TokenDistribution",
    "ToyDensity",
    "checkerboard",
    "circles",
    "eight_modes",
    "moons",
    "named",
    "pinwheel",
    "swiss_roll",
    "swiss_roll_es",
    "tied_bits",
    "tied_tokens",
    "toy",
    "two_spirals",
]
