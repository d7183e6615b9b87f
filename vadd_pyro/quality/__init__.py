"""Quality of samples where the law of the data is not known: images and text.

Rows of tokens in, plain numbers out; no model or guide is asked. Every figure is biased or bounded
by how many rows there are: read it beside the same figure of real rows against real rows.
"""

from vadd_pyro.quality.features import ImageFeatures
from vadd_pyro.quality.frechet import FrechetDistance, frechet_distance
from vadd_pyro.quality.ngrams import BitsPerToken, NGramModel
from vadd_pyro.quality.text import (
    NGramDistance,
    TokenEntropy,
    ngram_floor,
    ngram_jensen_shannon,
    token_entropy,
)
from vadd_pyro.quality.two_sample import TwoSampleTest, two_sample_test

__all__ = [
    "BitsPerToken",
    "FrechetDistance",
    "ImageFeatures",
    "NGramDistance",
    "NGramModel",
    "TokenEntropy",
    "TwoSampleTest",
    "frechet_distance",
    "ngram_floor",
    "ngram_jensen_shannon",
    "token_entropy",
    "two_sample_test",
]
