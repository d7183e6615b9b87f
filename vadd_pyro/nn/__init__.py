"""Network backbones: plain ``torch.nn`` modules that serve as decoder or encoder.

============= ====================== ======================= ======================
what for      decoder                features                encoder
============= ====================== ======================= ======================
toy densities ``MLPDecoder``         ``MLPFeatures``         ``MLPEncoder``
tables        ``ResidualDecoder``    ``ResidualFeatures``    ``ResidualEncoder``
images        ``UNetDecoder``        ``UNetFeatures``        ``UNetEncoder``
text          ``TransformerDecoder`` ``TransformerFeatures`` ``TransformerEncoder``
============= ====================== ======================= ======================

A decoder maps ``(x_t, z, t)`` to logits, features map a :class:`~vadd_pyro.MaskedBatch` to ``(B,
F)``, an encoder to ``(z_loc, z_scale)``.
"""

from vadd_pyro.nn.mlp import (
    MLPDecoder,
    MLPEncoder,
    MLPFeatures,
    StateEncoder,
    StateFeatures,
    normal_parameters,
)
from vadd_pyro.nn.residual import ResidualDecoder, ResidualEncoder, ResidualFeatures
from vadd_pyro.nn.transformer import TransformerDecoder, TransformerEncoder, TransformerFeatures
from vadd_pyro.nn.unet import UNetDecoder, UNetEncoder, UNetFeatures

__all__ = [
    "MLPDecoder",
    "MLPEncoder",
    "MLPFeatures",
    "ResidualDecoder",
    "ResidualEncoder",
    "ResidualFeatures",
    "StateEncoder",
    "StateFeatures",
    "TransformerDecoder",
    "TransformerEncoder",
    "TransformerFeatures",
    "UNetDecoder",
    "UNetEncoder",
    "UNetFeatures",
    "normal_parameters",
]
