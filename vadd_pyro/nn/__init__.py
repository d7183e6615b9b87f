"""Network backbones: plain ``torch.nn`` modules that serve as decoder or encoder."""

from vadd_pyro.nn.mlp import MLPDecoder, MLPEncoder, StateEncoder

__all__ = ["MLPDecoder", "MLPEncoder", "StateEncoder"]
