"""Network backbones: plain ``torch.nn`` modules that serve as decoder or encoder.

============= =========================== ======================= ======================
what for      decoder                     features                encoder
============= =========================== ======================= ======================
toy densities ``MLPDecoder``              ``MLPFeatures``         ``MLPEncoder``
tables        ``ResidualDecoder``         ``ResidualFeatures``    ``ResidualEncoder``
tables, codes ``LateDecoder``             the same                the same
tables, chain ``LocalDecoder``            the same                the same
images        ``UNetDecoder``             ``UNetFeatures``        ``UNetEncoder``
small images  ``PixelDecoder``            ``ResidualFeatures``    ``ResidualEncoder``
text          ``TransformerDecoder``      ``TransformerFeatures`` ``TransformerEncoder``
text, codes   ``LateTransformerDecoder``  the same                the same
text, chain   ``LocalTransformerDecoder`` the same                the same
============= =========================== ======================= ======================

A decoder maps ``(x_t, z, t)`` to logits, features map a :class:`~vadd_pyro.MaskedBatch` to ``(B,
F)``, an encoder to ``(z_loc, z_scale)``. ``State(features)`` are features of the state alone, for
priors, and ``StateNormal(State(features), latent_dim)`` is a prior network. ``Networks`` make all
that a model and its guide need of one backbone.
"""

from vadd_pyro.nn.base import normal_parameters
from vadd_pyro.nn.family import Networks
from vadd_pyro.nn.late import LateTransformerDecoder
from vadd_pyro.nn.local import LocalDecoder, LocalTransformerDecoder
from vadd_pyro.nn.mlp import (
    MLPDecoder,
    MLPEncoder,
    MLPFeatures,
    StateEncoder,
    StateFeatures,
)
from vadd_pyro.nn.networks import (
    NETWORKS,
    MLPNetworks,
    PixelNetworks,
    ResidualNetworks,
    TransformerNetworks,
    UNetNetworks,
    make_networks,
)
from vadd_pyro.nn.pixels import PixelDecoder
from vadd_pyro.nn.residual import LateDecoder, ResidualDecoder, ResidualEncoder, ResidualFeatures
from vadd_pyro.nn.state import PositionState, State, StateNormal
from vadd_pyro.nn.transformer import (
    TransformerDecoder,
    TransformerEncoder,
    TransformerFeatures,
    TransformerState,
)
from vadd_pyro.nn.unet import UNetDecoder, UNetEncoder, UNetFeatures

__all__ = [
    "NETWORKS",
    "LateDecoder",
    "LateTransformerDecoder",
    "LocalDecoder",
    "LocalTransformerDecoder",
    "MLPDecoder",
    "MLPEncoder",
    "MLPFeatures",
    "MLPNetworks",
    "Networks",
    "PixelDecoder",
    "PixelNetworks",
    "PositionState",
    "ResidualDecoder",
    "ResidualEncoder",
    "ResidualFeatures",
    "ResidualNetworks",
    "State",
    "StateEncoder",
    "StateFeatures",
    "StateNormal",
    "TransformerDecoder",
    "TransformerEncoder",
    "TransformerFeatures",
    "TransformerNetworks",
    "TransformerState",
    "UNetDecoder",
    "UNetEncoder",
    "UNetFeatures",
    "UNetNetworks",
    "make_networks",
    "normal_parameters",
]
