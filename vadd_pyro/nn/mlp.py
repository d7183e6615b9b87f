r"""Multilayer perceptrons over a row of embedded tokens: decoder, recognition network and prior
network.

The first layer is affine in (tokens, latent, time), so each input has a matrix of its own and
their results are added. A latent laid out along dimensions of its own, say the ``(C, 1, d)``
embeddings of all codes, then meets rows ``(B, D)`` by broadcasting, and what depends on the rows
alone is computed once.
"""

from __future__ import annotations

from torch import Tensor, nn

from vadd_pyro.nn.base import Decoder, Features, NormalEncoder, normal_parameters
from vadd_pyro.nn.chosen import chosen_logits
from vadd_pyro.nn.conditioning import full_precision
from vadd_pyro.nn.lookup import indicated_layer, token_layer
from vadd_pyro.nn.state import StateNormal
from vadd_pyro.process import MaskedBatch, MaskingProcess, check_size

__all__ = [
    "MLPDecoder",
    "MLPEncoder",
    "MLPFeatures",
    "StateEncoder",
    "StateFeatures",
    "normal_parameters",
]


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        check_size(name, value)


class _Hidden(nn.Module):
    """Hidden layers after the first affine map.

    ``num_layers - 1`` times (activation, linear), and a last activation.
    """

    def __init__(self, hidden_dim: int, num_layers: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(num_layers - 1):
            layers += [nn.SiLU(), nn.Linear(hidden_dim, hidden_dim)]
        self.layers = nn.Sequential(*layers, nn.SiLU())

    def forward(self, h: Tensor) -> Tensor:
        return self.layers(h)


class MLPDecoder(Decoder):
    r"""Decoder ``mu(x_t, z, t)``: logits of the clean token at every position.

    Args:
        process: gives vocabulary size ``K`` and length ``D``.
        latent_dim: size ``d`` of the latent; 0 for a model without one.
        hidden_dim: width.
        num_layers: number of hidden layers.
        embedding_dim: size of a token's embedding.
        time_conditioning: feed ``t`` to the network. Off by default: given ``x_t``, the clean
            tokens do not depend on ``t`` (Sahoo et al. 2024, section 3.5), and the number of masks
            tells the rest.

    Shapes:
        ``x_t (B, D)``, ``z (..., B, d)`` or anything that broadcasts with it such as ``(C, 1,
        d)``, ``t (B,)``; returns ``(..., B, D, K)``.
    """

    def __init__(
        self,
        process: MaskingProcess,
        latent_dim: int = 0,
        *,
        hidden_dim: int = 256,
        num_layers: int = 3,
        embedding_dim: int = 32,
        time_conditioning: bool = False,
    ) -> None:
        super().__init__(process, latent_dim, time_conditioning=time_conditioning)
        _check_sizes(hidden_dim=hidden_dim, num_layers=num_layers, embedding_dim=embedding_dim)
        self.embedding = nn.Embedding(process.vocab_size + 1, embedding_dim)
        self.tokens = nn.Linear(process.length * embedding_dim, hidden_dim)
        self.latent = nn.Linear(latent_dim, hidden_dim, bias=False) if latent_dim else None
        self.time = nn.Linear(1, hidden_dim, bias=False) if time_conditioning else None
        self.hidden = _Hidden(hidden_dim, num_layers)
        self.head = nn.Linear(hidden_dim, process.length * process.vocab_size)

    def _body(self, x_t: Tensor, z: Tensor | None, t: Tensor) -> Tensor:
        h = token_layer(self.tokens, self.embedding, x_t)
        if self.time is not None:
            h = h + self.time(t.unsqueeze(-1))
        if self.latent is not None:
            h = h + self.latent(z)
        return self.hidden(h)

    def heavy_parts(self) -> list[nn.Module]:
        return [self.hidden]

    def _head(self, h: Tensor) -> Tensor:
        logits = full_precision(self.head, h)
        return logits.unflatten(-1, (self.length, self.vocab_size))

    def _head_at(self, h: Tensor, index: Tensor | None) -> Tensor:
        return chosen_logits(self.head, h, index, self.length, self.vocab_size)


class MLPFeatures(Features):
    r"""Recognition features ``(B, F)`` of ``x_0`` and of which positions are visible, masked and
    targeted.

    Args:
        process: gives vocabulary size and length.
        hidden_dim: width, and the number ``F`` of features.
        num_layers, embedding_dim: as in :class:`MLPDecoder`.
        time_conditioning: feed ``t`` too.

    Shapes:
        a :class:`MaskedBatch` of ``B`` rows gives ``(B, F)``.
    """

    def __init__(
        self,
        process: MaskingProcess,
        *,
        hidden_dim: int = 256,
        num_layers: int = 3,
        embedding_dim: int = 32,
        time_conditioning: bool = False,
    ) -> None:
        _check_sizes(hidden_dim=hidden_dim, num_layers=num_layers, embedding_dim=embedding_dim)
        super().__init__(process, hidden_dim)
        self.embedding = nn.Embedding(process.vocab_size, embedding_dim)
        self.status = nn.Embedding(3, embedding_dim)  # visible, masked, masked and targeted
        self.tokens = nn.Linear(process.length * embedding_dim, hidden_dim)
        self.time = nn.Linear(1, hidden_dim, bias=False) if time_conditioning else None
        self.hidden = _Hidden(hidden_dim, num_layers)

    def _token_vectors(self) -> Tensor:
        return self.embedding.weight

    def _of_tokens(self, x_0: Tensor, batch: MaskedBatch) -> Tensor:
        kind = type(self)
        if kind._features is MLPFeatures._features and (
            kind._token_vectors is MLPFeatures._token_vectors
        ):
            tables = [self.embedding, self.status]
            h = indicated_layer(self.tokens, tables, [x_0, _kinds(batch)])
            if h is not None:
                return self._above(h, batch)
        return super()._of_tokens(x_0, batch)

    def _features(self, codes: Tensor, batch: MaskedBatch) -> Tensor:
        return self._above(self.tokens((codes + self.status(_kinds(batch))).flatten(-2)), batch)

    def _above(self, h: Tensor, batch: MaskedBatch) -> Tensor:
        """What follows the layer of tokens."""
        if self.time is not None:
            h = h + self.time(batch.t.unsqueeze(-1))
        return self.hidden(h)


def _kinds(batch: MaskedBatch) -> Tensor:
    """0 at visible positions, 1 at masked ones and 2 at those that are targeted, ``(B, D)``."""
    return batch.masked.long() + batch.target.long()


class MLPEncoder(NormalEncoder):
    r"""Recognition network: ``(z_loc, z_scale)`` from :class:`MLPFeatures`.

    Args:
        process: gives vocabulary size and length.
        latent_dim: size ``d`` of the latent.
        hidden_dim, num_layers, embedding_dim, time_conditioning: as in :class:`MLPFeatures`.

    Shapes:
        a :class:`MaskedBatch` of ``B`` rows gives two tensors ``(B, d)``.
    """

    def __init__(
        self,
        process: MaskingProcess,
        latent_dim: int,
        *,
        hidden_dim: int = 256,
        num_layers: int = 3,
        embedding_dim: int = 32,
        time_conditioning: bool = False,
    ) -> None:
        features = MLPFeatures(
            process,
            hidden_dim=hidden_dim,
            num_layers=num_layers,
            embedding_dim=embedding_dim,
            time_conditioning=time_conditioning,
        )
        super().__init__(features, latent_dim)


class StateFeatures(nn.Module):
    r"""Features ``(B, F)`` of the state ``(x_t, t)``: what a prior or a model may look at.

    Args:
        process: gives vocabulary size and length.
        hidden_dim: width, and the number ``F`` of features.
        num_layers, embedding_dim: as in :class:`MLPDecoder`.

    Shapes:
        a :class:`MaskedBatch` of ``B`` rows gives ``(B, F)``; only ``x_t`` and ``t`` are read.
    """

    def __init__(
        self,
        process: MaskingProcess,
        *,
        hidden_dim: int = 256,
        num_layers: int = 2,
        embedding_dim: int = 32,
    ) -> None:
        super().__init__()
        _check_sizes(hidden_dim=hidden_dim, num_layers=num_layers, embedding_dim=embedding_dim)
        self.feature_dim = hidden_dim
        self.embedding = nn.Embedding(process.vocab_size + 1, embedding_dim)
        self.tokens = nn.Linear(process.length * embedding_dim, hidden_dim)
        self.time = nn.Linear(1, hidden_dim, bias=False)
        self.hidden = _Hidden(hidden_dim, num_layers)

    def forward(self, batch: MaskedBatch) -> Tensor:
        h = indicated_layer(self.tokens, [self.embedding], [batch.x_t])
        if h is None:
            h = self.tokens(self.embedding(batch.x_t).flatten(-2))
        return self.hidden(h + self.time(batch.t.unsqueeze(-1)))


class StateEncoder(StateNormal):
    r"""Prior network: ``(z_loc, z_scale)`` of ``p(z | x_t, t)``, standard normal before training.

    Args:
        process: gives vocabulary size and length.
        latent_dim: size ``d`` of the latent.
        hidden_dim, num_layers, embedding_dim: as in :class:`StateFeatures`.

    Shapes:
        a :class:`MaskedBatch` of ``B`` rows gives two tensors ``(B, d)``; only ``x_t`` and ``t``
        are read.
    """

    def __init__(
        self,
        process: MaskingProcess,
        latent_dim: int,
        *,
        hidden_dim: int = 256,
        num_layers: int = 2,
        embedding_dim: int = 32,
    ) -> None:
        features = StateFeatures(
            process, hidden_dim=hidden_dim, num_layers=num_layers, embedding_dim=embedding_dim
        )
        super().__init__(features, latent_dim)
