"""Network backbones: plain ``torch.nn`` modules that serve as decoder or encoder."""

from vadd_pyro.nn.mlp import (
    MLPDecoder,
    MLPEncoder,
    MLPFeatures,
    StateEncoder,
    StateFeatures,
    normal_parameters,
)

__all__ = [
    "MLPDecoder",
    "MLPEncoder",
    "MLPFeatures",
    "StateEncoder",
    "StateFeatures",
    "normal_parameters",
]
