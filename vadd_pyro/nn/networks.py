"""All networks that a model and its guide are made of, by backbone.

>>> from vadd_pyro import MaskingProcess
>>> networks = make_networks("residual", MaskingProcess(2, 16), hidden_dim=64, num_blocks=2)
>>> networks.decoder(latent_dim=8).latent_dim
8
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from vadd_pyro.nn.family import Networks, blocks_less
from vadd_pyro.nn.late import LateTransformerDecoder
from vadd_pyro.nn.local import LocalDecoder, LocalTransformerDecoder
from vadd_pyro.nn.mlp import MLPDecoder, MLPFeatures, StateFeatures
from vadd_pyro.nn.pixels import PixelDecoder
from vadd_pyro.nn.residual import LateDecoder, ResidualDecoder, ResidualFeatures
from vadd_pyro.nn.state import State
from vadd_pyro.nn.transformer import TransformerDecoder, TransformerFeatures, TransformerState
from vadd_pyro.nn.unet import UNetDecoder, UNetFeatures
from vadd_pyro.process import MaskingProcess

__all__ = [
    "NETWORKS",
    "MLPNetworks",
    "Networks",
    "PixelNetworks",
    "ResidualNetworks",
    "TransformerNetworks",
    "UNetNetworks",
    "make_networks",
]


@dataclass(frozen=True, kw_only=True)
class MLPNetworks(Networks):
    """Perceptrons, for toy densities.

    A latent that is summed out has a decoder of one layer fewer, and so has the state.

    Args:
        process: gives vocabulary size and length.
        hidden_dim, num_layers, embedding_dim: as in :class:`~vadd_pyro.nn.MLPDecoder`.
        time_conditioning: tell the decoder the time. The state knows it always.
    """

    hidden_dim: int = 256
    num_layers: int = 3
    embedding_dim: int = 32
    time_conditioning: bool = False

    def _shared(self, fewer: int) -> dict[str, Any]:
        return dict(
            hidden_dim=self.hidden_dim,
            num_layers=blocks_less(self.num_layers, fewer),
            embedding_dim=self.embedding_dim,
        )

    def decoder(self, latent_dim: int, *, summed: bool = False) -> MLPDecoder:
        return MLPDecoder(
            self.process,
            latent_dim,
            time_conditioning=self.time_conditioning,
            **self._shared(int(summed)),
        )

    def local_decoder(self, latent_dim: int) -> LocalDecoder:
        return LocalDecoder(
            self.process,
            latent_dim,
            hidden_dim=self.hidden_dim,
            num_blocks=blocks_less(self.num_layers, 1),
            embedding_dim=self.embedding_dim,
            time_conditioning=self.time_conditioning,
        )

    def _recognition(self, fewer: int) -> MLPFeatures:
        return MLPFeatures(self.process, **self._shared(fewer))

    def state(self) -> StateFeatures:
        return StateFeatures(self.process, **self._shared(1))


@dataclass(frozen=True, kw_only=True)
class ResidualNetworks(Networks):
    """Residual perceptrons, for tables and other short rows.

    A latent that is summed out enters late (:class:`~vadd_pyro.nn.LateDecoder`); the state has
    one block fewer.

    Args:
        process: gives vocabulary size and length.
        hidden_dim, num_blocks, embedding_dim, condition_dim, dropout: as in
            :class:`~vadd_pyro.nn.ResidualDecoder`.
        time_conditioning: tell the decoder the time.
        latent_hidden_dim, num_latent_blocks: as in :class:`~vadd_pyro.nn.LateDecoder`.
    """

    hidden_dim: int = 512
    num_blocks: int = 3
    embedding_dim: int = 32
    condition_dim: int = 128
    time_conditioning: bool = False
    dropout: float = 0.0
    latent_hidden_dim: int = 128
    num_latent_blocks: int = 1

    def _shared(self, fewer: int) -> dict[str, Any]:
        return dict(
            hidden_dim=self.hidden_dim,
            num_blocks=blocks_less(self.num_blocks, fewer),
            embedding_dim=self.embedding_dim,
            condition_dim=self.condition_dim,
            dropout=self.dropout,
        )

    def decoder(self, latent_dim: int, *, summed: bool = False) -> ResidualDecoder | LateDecoder:
        if summed:
            return LateDecoder(self.process, latent_dim, **self.sizes)
        return ResidualDecoder(
            self.process,
            latent_dim,
            time_conditioning=self.time_conditioning,
            **self._shared(0),
        )

    def local_decoder(self, latent_dim: int) -> LocalDecoder:
        return LocalDecoder(self.process, latent_dim, **self.sizes)

    def _recognition(self, fewer: int) -> ResidualFeatures:
        return ResidualFeatures(self.process, **self._shared(fewer))


@dataclass(frozen=True, kw_only=True)
class PixelNetworks(Networks):
    """Perceptrons with convolutions for what is near, for small pictures on a processor.

    All codes of a latent that is summed out run through the whole decoder. Recognition is that of
    residual perceptrons; the state has one block fewer.

    Args:
        process: gives number of grey levels and length.
        shape, channels, sketch_dim, local_dim, num_convolutions, hidden_dim, num_blocks,
            embedding_dim, condition_dim, dropout: as in :class:`~vadd_pyro.nn.PixelDecoder`.
        time_conditioning: tell the decoder the time.
    """

    shape: Sequence[int]
    channels: int = 1
    sketch_dim: int = 8
    local_dim: int = 24
    num_convolutions: int = 2
    hidden_dim: int = 512
    num_blocks: int = 3
    embedding_dim: int = 32
    condition_dim: int = 128
    time_conditioning: bool = False
    dropout: float = 0.0

    def decoder(self, latent_dim: int, *, summed: bool = False) -> PixelDecoder:
        return PixelDecoder(self.process, latent_dim, **self.sizes)

    def _recognition(self, fewer: int) -> ResidualFeatures:
        return ResidualFeatures(
            self.process,
            hidden_dim=self.hidden_dim,
            num_blocks=blocks_less(self.num_blocks, fewer),
            embedding_dim=self.embedding_dim,
            condition_dim=self.condition_dim,
            dropout=self.dropout,
        )


@dataclass(frozen=True, kw_only=True)
class UNetNetworks(Networks):
    """U-Nets, for images.

    All codes of a latent that is summed out run through the whole decoder; the state has one block
    a grid fewer.

    Args:
        process: gives number of grey levels and length.
        shape, channels, hidden_dim, multipliers, num_blocks, attention_levels, num_heads,
            condition_dim, embedding_dim, dropout: as in :class:`~vadd_pyro.nn.UNetDecoder`.
        feature_dim: number of features, recognition's and the state's.
        time_conditioning: tell the decoder the time.
    """

    shape: Sequence[int]
    channels: int = 1
    hidden_dim: int = 64
    multipliers: Sequence[int] = (1, 2, 2)
    num_blocks: int = 2
    attention_levels: int = 1
    num_heads: int = 4
    condition_dim: int = 256
    embedding_dim: int = 32
    feature_dim: int = 256
    time_conditioning: bool = True
    dropout: float = 0.0

    def _shared(self, fewer: int) -> dict[str, Any]:
        own = ("feature_dim", "time_conditioning")
        shared = {name: size for name, size in self.sizes.items() if name not in own}
        return shared | {"num_blocks": blocks_less(self.num_blocks, fewer)}

    def decoder(self, latent_dim: int, *, summed: bool = False) -> UNetDecoder:
        return UNetDecoder(
            self.process,
            latent_dim,
            time_conditioning=self.time_conditioning,
            **self._shared(0),
        )

    def _recognition(self, fewer: int) -> UNetFeatures:
        return UNetFeatures(self.process, feature_dim=self.feature_dim, **self._shared(fewer))


@dataclass(frozen=True, kw_only=True)
class TransformerNetworks(Networks):
    """Transformers, for text.

    A latent that is summed out enters late (:class:`~vadd_pyro.nn.LateTransformerDecoder`); the
    state has one block fewer.

    Args:
        process: gives vocabulary size and length.
        hidden_dim, num_layers, num_heads, expansion, condition_dim, position_embedding, dropout:
            as in :class:`~vadd_pyro.nn.TransformerDecoder`.
        time_conditioning: tell the decoder the time.
        latent_hidden_dim, num_latent_blocks: as in
            :class:`~vadd_pyro.nn.LateTransformerDecoder`.
    """

    hidden_dim: int = 256
    num_layers: int = 6
    num_heads: int = 8
    expansion: int = 4
    condition_dim: int = 128
    time_conditioning: bool = True
    position_embedding: bool = True
    dropout: float = 0.0
    latent_hidden_dim: int = 64
    num_latent_blocks: int = 1

    def _shared(self, fewer: int) -> dict[str, Any]:
        own = ("time_conditioning", "latent_hidden_dim", "num_latent_blocks")
        shared = {name: size for name, size in self.sizes.items() if name not in own}
        return shared | {"num_layers": blocks_less(self.num_layers, fewer)}

    def decoder(self, latent_dim: int, *, summed: bool = False) -> TransformerDecoder:
        if summed:
            return LateTransformerDecoder(self.process, latent_dim, **self.sizes)
        return TransformerDecoder(
            self.process,
            latent_dim,
            time_conditioning=self.time_conditioning,
            **self._shared(0),
        )

    def _recognition(self, fewer: int) -> TransformerFeatures:
        return TransformerFeatures(self.process, **self._shared(fewer))

    def local_decoder(self, latent_dim: int) -> LocalTransformerDecoder:
        return LocalTransformerDecoder(self.process, latent_dim, **self.sizes)

    def local_state(self) -> TransformerState:
        return TransformerState(
            self.process, time_conditioning=self.time_conditioning, **self._shared(1)
        )

    def state(self) -> State:
        # Unscaled, code probabilities of text settled on one code before codes differed
        # (docs/real_data.md).
        return State(self._recognition(1), self.hidden_dim**-0.5)


NETWORKS: dict[str, type[Networks]] = {
    "mlp": MLPNetworks,
    "residual": ResidualNetworks,
    "pixel": PixelNetworks,
    "unet": UNetNetworks,
    "transformer": TransformerNetworks,
}


def make_networks(name: str, process: MaskingProcess, **sizes: Any) -> Networks:
    """A family of networks by name.

    Args:
        name: a key of :data:`NETWORKS`.
        process: gives vocabulary size and length.
        sizes: of the family, such as ``hidden_dim``; those for pictures need ``shape``.

    Raises:
        ValueError: for a name or a size that is not known, or that no network can have, listing
            what is expected; for one that is missing.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown networks: {name!r}; expected one of {', '.join(NETWORKS)}")
    known = {field.name: field for field in fields(NETWORKS[name]) if field.name != "process"}
    if unknown := [size for size in sizes if size not in known]:
        raise ValueError(
            f"networks {name!r} have no {', '.join(unknown)}; expected some of {', '.join(known)}"
        )
    needed = [size for size in known if known[size].default is MISSING and size not in sizes]
    if needed:
        raise ValueError(f"networks {name!r} need {', '.join(needed)}, which was not given")
    return NETWORKS[name](process, **sizes)
