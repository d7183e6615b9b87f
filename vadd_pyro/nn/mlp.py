r"""Multilayer perceptrons over a row of embedded tokens: decoder, recognition network and prior
network.

The first layer is affine in (tokens, latent, time), so each input has a matrix of its own and
their results are added. A latent laid out along dimensions of its own, say the ``(C, 1, d)``
embeddings of all codes, then meets rows ``(B, D)`` by broadcasting, and what depends on the rows
alone is computed once.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.functional import softplus

from vadd_pyro.process import MaskedBatch, MaskingProcess, check_size

__all__ = [
    "MLPDecoder",
    "MLPEncoder",
    "MLPFeatures",
    "StateEncoder",
    "StateFeatures",
    "normal_parameters",
]

_UNIT_SCALE = math.log(math.e - 1)  # softplus of this is one
_LEAST_SCALE = 1e-4


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        check_size(name, value, least=0 if name == "latent_dim" else 1)


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


def normal_parameters(raw: Tensor) -> tuple[Tensor, Tensor]:
    """``(z_loc, z_scale)`` from ``(..., 2 d)``; a zero gives mean zero and scale one."""
    z_loc, z_raw = raw.chunk(2, -1)
    return z_loc, softplus(z_raw + _UNIT_SCALE) + _LEAST_SCALE


class MLPDecoder(nn.Module):
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
        super().__init__()
        _check_sizes(
            latent_dim=latent_dim,
            hidden_dim=hidden_dim,
            num_layers=num_layers,
            embedding_dim=embedding_dim,
        )
        self.latent_dim = latent_dim
        self.length = process.length
        self.vocab_size = process.vocab_size
        self.embedding = nn.Embedding(process.vocab_size + 1, embedding_dim)
        self.tokens = nn.Linear(process.length * embedding_dim, hidden_dim)
        self.latent = nn.Linear(latent_dim, hidden_dim, bias=False) if latent_dim else None
        self.time = nn.Linear(1, hidden_dim, bias=False) if time_conditioning else None
        self.hidden = _Hidden(hidden_dim, num_layers)
        self.head = nn.Linear(hidden_dim, process.length * process.vocab_size)

    def forward(self, x_t: Tensor, z: Tensor | None, t: Tensor) -> Tensor:
        if self.latent is not None and (z is None or z.shape[-1] != self.latent_dim):
            raise ValueError(
                f"z must have latent_dim = {self.latent_dim} as its last dimension, got "
                f"{None if z is None else tuple(z.shape)}"
            )
        if self.latent is None and z is not None:
            raise ValueError(
                f"the decoder has latent_dim = 0 and would ignore z {tuple(z.shape)}: give it the "
                "size of the latent"
            )
        shared = self.shared_states(x_t, z)
        if shared is not None and len(shared[0]) < len(x_t):
            return self._logits(shared[0], z, t).index_select(-3, shared[1])
        return self._logits(x_t, z, t)

    def shared_states(self, x_t: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The distinct rows ``(U, D)``, and which of them each row is, ``(B,)``, where equal rows
        have equal logits: if the latents of a support are laid out for all rows, and the time does
        not count. None elsewhere.
        """
        same_for_all_rows = z is not None and z.dim() > 2 and z.shape[-2] == 1
        if not same_for_all_rows or self.time is not None or len(x_t) < 2:
            return None
        return x_t.unique(dim=0, return_inverse=True)

    def _logits(self, x_t: Tensor, z: Tensor | None, t: Tensor) -> Tensor:
        h = self.tokens(self.embedding(x_t).flatten(-2))
        if self.time is not None:
            h = h + self.time(t.unsqueeze(-1))
        if self.latent is not None:
            h = h + self.latent(z)
        return self.head(self.hidden(h)).unflatten(-1, (self.length, self.vocab_size))


class MLPFeatures(nn.Module):
    r"""Recognition features ``(B, F)`` of ``x_0`` and of which positions are visible, masked and
    targeted.

    They must tell the mask, or what is built on them cannot know what the latent is needed for,
    and collapses.

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
        super().__init__()
        _check_sizes(hidden_dim=hidden_dim, num_layers=num_layers, embedding_dim=embedding_dim)
        self.length = process.length
        self.vocab_size = process.vocab_size
        self.feature_dim = hidden_dim
        self.embedding = nn.Embedding(process.vocab_size, embedding_dim)
        self.status = nn.Embedding(3, embedding_dim)  # visible, masked, masked and targeted
        self.tokens = nn.Linear(process.length * embedding_dim, hidden_dim)
        self.time = nn.Linear(1, hidden_dim, bias=False) if time_conditioning else None
        self.hidden = _Hidden(hidden_dim, num_layers)

    def forward(self, batch: MaskedBatch) -> Tensor:
        if batch.x_0 is None:
            raise ValueError("batch.x_0 is None: a recognition network needs the clean tokens")
        return self._features(self.embedding(batch.x_0), batch)

    def soft(self, probabilities: Tensor, batch: MaskedBatch) -> Tensor:
        """Features of rows that are not tokens but distributions over them.

        Args:
            probabilities: ``(..., B, D, K)``, in place of ``x_0``.
            batch: says what is visible and targeted, ``B`` rows; its ``x_0`` is not read.

        Returns:
            ``(..., B, F)``.
        """
        return self._features(probabilities @ self.embedding.weight, batch)

    def _features(self, embedded: Tensor, batch: MaskedBatch) -> Tensor:
        status = batch.masked.long() + batch.target.long()
        h = self.tokens((embedded + self.status(status)).flatten(-2))
        if self.time is not None:
            h = h + self.time(batch.t.unsqueeze(-1))
        return self.hidden(h)


class MLPEncoder(nn.Module):
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
        super().__init__()
        check_size("latent_dim", latent_dim)
        self.latent_dim = latent_dim
        self.features = MLPFeatures(
            process,
            hidden_dim=hidden_dim,
            num_layers=num_layers,
            embedding_dim=embedding_dim,
            time_conditioning=time_conditioning,
        )
        self.head = nn.Linear(hidden_dim, 2 * latent_dim)

    def forward(self, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        return normal_parameters(self.head(self.features(batch)))

    def soft(self, probabilities: Tensor, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        """``(z_loc, z_scale)`` of soft rows, as :meth:`MLPFeatures.soft`."""
        return normal_parameters(self.head(self.features.soft(probabilities, batch)))


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
        h = self.tokens(self.embedding(batch.x_t).flatten(-2)) + self.time(batch.t.unsqueeze(-1))
        return self.hidden(h)


class StateEncoder(nn.Module):
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
        super().__init__()
        check_size("latent_dim", latent_dim)
        self.latent_dim = latent_dim
        self.features = StateFeatures(
            process, hidden_dim=hidden_dim, num_layers=num_layers, embedding_dim=embedding_dim
        )
        self.head = nn.Linear(hidden_dim, 2 * latent_dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        return normal_parameters(self.head(self.features(batch)))
