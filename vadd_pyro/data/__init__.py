"""Data with a known law, and data from files.

Toy densities on a grid of bins and tied tokens (:class:`TokenDistribution`); tables, images and
text in three parts (:class:`DataSet`). Only MNIST, CIFAR-10, text8 and sets of the Hugging Face
hub are downloaded, when they are asked for.
"""

from vadd_pyro.data.base import TokenDistribution
from vadd_pyro.data.files import cache_folder, download
from vadd_pyro.data.images import DynamicImages, cifar10, digits, mnist
from vadd_pyro.data.named import NAMES, named
from vadd_pyro.data.splits import SPLITS, BatchStream, DataSet
from vadd_pyro.data.tables import table
from vadd_pyro.data.text import TextData, characters, hub, text8
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
    "SPLITS",
    "TOYS",
    "BatchStream",
    "DataSet",
    "DynamicImages",
    "TextData",
    "TokenDistribution",
    "ToyDensity",
    "cache_folder",
    "characters",
    "checkerboard",
    "cifar10",
    "circles",
    "digits",
    "download",
    "eight_modes",
    "hub",
    "mnist",
    "moons",
    "named",
    "pinwheel",
    "swiss_roll",
    "swiss_roll_es",
    "table",
    "text8",
    "tied_bits",
    "tied_tokens",
    "toy",
    "two_spirals",
]
