"""What all decoders and recognition networks of this package promise, and check."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import embedding, softplus

from vadd_pyro.distributions import DeferredLogits
from vadd_pyro.nn.conditioning import full_precision
from vadd_pyro.nn.sharing import equal_rows
from vadd_pyro.nn.shortcuts import is_plain
from vadd_pyro.process import MaskedBatch, MaskingProcess, check_size

__all__ = ["Decoder", "Features", "NormalEncoder", "normal_parameters", "status_of"]

_UNIT_SCALE = math.log(math.e - 1)  # softplus of this is one
_LEAST_SCALE = 1e-4


def normal_parameters(raw: Tensor) -> tuple[Tensor, Tensor]:
    """``(z_loc, z_scale)`` from ``(..., 2 d)``; a zero gives mean zero and scale one.

    Half-precision numbers are made float32 first: a density divides by the scale, and half
    precision would round that.
    """
    if raw.dtype in (torch.float16, torch.bfloat16):
        raw = raw.float()
    z_loc, z_raw = raw.chunk(2, -1)
    return z_loc, softplus(z_raw + _UNIT_SCALE) + _LEAST_SCALE


class Decoder(nn.Module):
    r"""A decoder ``mu(x_t, z, t)``; a subclass writes ``_body``, ``_head`` and ``_head_at``, or
    ``_logits`` alone.

    Without gradients and dropout, rows that are equal in ``x_t``, ``z`` and, if the network is
    told it, time run through it once.

    Args:
        process: gives vocabulary size ``K`` and length ``D``.
        latent_dim: size ``d`` of the latent; 0 for a model without one.
        time_conditioning: whether the time is fed to the network.

    Shapes:
        ``x_t (B, D)``, ``z (..., B, d)`` or anything that broadcasts with it such as ``(C, 1,
        d)``, ``t (B,)``; returns ``(..., B, D, K)``.
    """

    def __init__(
        self, process: MaskingProcess, latent_dim: int, *, time_conditioning: bool
    ) -> None:
        super().__init__()
        check_size("latent_dim", latent_dim, least=0)
        self.latent_dim = latent_dim
        self.length = process.length
        self.vocab_size = process.vocab_size
        self.time_conditioning = time_conditioning

    def _body(self, x_t: Tensor, z: Tensor | None, t: Tensor) -> Any:
        """What the last layer reads."""
        raise NotImplementedError

    def _head(self, h: Any) -> Tensor:
        """Logits ``(..., B, D, K)`` from it."""
        raise NotImplementedError

    def _head_at(self, h: Any, index: Tensor | None) -> Tensor:
        """Logits ``(n, K)`` of chosen ones of ``B D`` positions, or of all, up to a number for
        each.
        """
        raise NotImplementedError

    def _logits(self, x_t: Tensor, z: Tensor | None, t: Tensor) -> Tensor:
        return self._head(self._body(x_t, z, t))

    def forward(self, x_t: Tensor, z: Tensor | None, t: Tensor) -> Tensor:
        self._check_inputs(x_t, z)
        shared = self.shared_states(x_t, z)
        if shared is not None and len(shared[0]) < len(x_t):
            return self._logits(shared[0], z, t).index_select(-3, shared[1])
        alike = self._equal_rows(x_t, z, t)
        if alike is not None:
            return self._logits(*_rows(alike[0], x_t, z, t)).index_select(-3, alike[1])
        return self._logits(x_t, z, t)

    def deferred(
        self, x_t: Tensor, z: Tensor | None, t: Tensor
    ) -> tuple[DeferredLogits, Tensor | None] | None:
        """Logits for drawing: the network up to its last layer, which waits to be told positions.

        Args:
            x_t, z, t: as in :meth:`forward`, with a latent a row, ``(B, d)``, or None.

        Returns:
            The logits of ``U`` rows, and which of those each row is, ``(B,)``, None if ``U = B``;
            what :class:`~vadd_pyro.TokenCategorical` takes as ``logits`` and ``row``. None where
            ``forward`` has to be called: with gradients, other latents, hooks on the decoder or
            parts that are Pyro's own, or if it is compiled.
        """
        split = type(self)._logits is Decoder._logits and type(self).forward is Decoder.forward
        laid_out = z is not None and z.shape[:-1] != x_t.shape[:1]
        if not split or laid_out or torch.is_grad_enabled() or not is_plain(self):
            return None
        if any(isinstance(module, PyroModule) for module in self.modules()):
            return None  # whose parameters may be sample sites, which must not come late
        self._check_inputs(x_t, z)
        row = None
        alike = self._equal_rows(x_t, z, t)
        if alike is not None:
            first, row = alike
            x_t, z, t = _rows(first, x_t, z, t)
        h = self._body(x_t, z, t)
        shape = (len(x_t), self.length, self.vocab_size)
        logits = DeferredLogits(shape, lambda: self._head(h), lambda i: self._head_at(h, i))
        return logits, row

    def heavy_parts(self) -> list[nn.Module]:
        """The modules that do nearly all the work, to be compiled in place; by default the whole
        network.
        """
        return [self]

    def _equal_rows(
        self, x_t: Tensor, z: Tensor | None, t: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Rows of which several are equal; see :func:`~vadd_pyro.nn.sharing.equal_rows`."""
        laid_out = z is not None and z.shape[:-1] != x_t.shape[:1]
        tracing = torch.compiler.is_compiling()
        if laid_out or tracing or torch.is_grad_enabled() or self._drops():
            return None
        values = [x_t] if z is None else [x_t, z]
        if self.time_conditioning:
            values.append(t)
        return equal_rows(*values)

    def _once_a_state(
        self, network: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, t: Tensor
    ) -> Tensor:
        """What a network of the state gives, ``(B, ...)``: rows in one state share it, whatever
        their latents are.
        """
        alike = self._equal_rows(x_t, None, t)
        if alike is None:
            return network(x_t, t)
        return network(x_t[alike[0]], t[alike[0]]).index_select(0, alike[1])

    def _check_inputs(self, x_t: Tensor, z: Tensor | None) -> None:
        if x_t.dim() != 2 or x_t.shape[1] != self.length:
            raise ValueError(f"x_t must have shape (batch, {self.length}), got {tuple(x_t.shape)}")
        if z is None and self.latent_dim:
            raise ValueError(f"z must have latent_dim = {self.latent_dim} numbers, got None")
        if z is not None:
            self._check_latent(z, len(x_t))

    def _check_latent(self, z: Tensor, num_rows: int) -> None:
        if not self.latent_dim:
            raise ValueError(
                f"the decoder has latent_dim = 0 and would ignore z {tuple(z.shape)}: give it the "
                "size of the latent"
            )
        if z.shape[-1:] != (self.latent_dim,):
            raise ValueError(
                f"z must have latent_dim = {self.latent_dim} as its last dimension, got "
                f"{tuple(z.shape)}"
            )
        # One row may meet many latents, too.
        if z.dim() > 1 and z.shape[-2] != num_rows and 1 not in (z.shape[-2], num_rows):
            raise ValueError(
                f"z must have one latent a row, shape (..., {num_rows}, {self.latent_dim}), or "
                f"one for all rows, got {tuple(z.shape)}"
            )

    def shared_states(self, x_t: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The distinct rows ``(U, D)``, and which of them each row is, ``(B,)``, where equal rows
        have equal logits: if the latents of a support are laid out for all rows, and the time does
        not count. None elsewhere.
        """
        same_for_all_rows = z is not None and z.dim() > 2 and z.shape[-2] == 1
        # Dropout would make equal rows differ.
        if not same_for_all_rows or self.time_conditioning or len(x_t) < 2 or self._drops():
            return None
        return x_t.unique(dim=0, return_inverse=True)

    def _drops(self) -> bool:
        dropouts = (m for m in self.modules() if isinstance(m, nn.Dropout))
        return any(m.training and m.p > 0 for m in dropouts)


def _rows(
    index: Tensor, x_t: Tensor, z: Tensor | None, t: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Some rows of what a decoder is given."""
    return x_t[index], None if z is None else z[index], t[index]


class Features(nn.Module):
    """Recognition features ``(B, F)`` of ``x_0`` and of which positions are visible, masked and
    targeted; a subclass writes ``_token_vectors`` and ``_features``.

    They must tell the mask, or what is built on them cannot know what the latent is needed for,
    and collapses; and the targets, for the bound of a T-step sampler scores those alone.

    Args:
        process: gives vocabulary size and length.
        feature_dim: ``F``.

    Shapes:
        a :class:`MaskedBatch` of ``B`` rows gives ``(B, F)``.
    """

    def __init__(self, process: MaskingProcess, feature_dim: int) -> None:
        super().__init__()
        check_size("feature_dim", feature_dim)
        self.length = process.length
        self.vocab_size = process.vocab_size
        self.feature_dim = feature_dim

    def _token_vectors(self) -> Tensor:
        """Vectors of the clean tokens, ``(K, e)``."""
        raise NotImplementedError

    def _features(self, codes: Tensor, batch: MaskedBatch) -> Tensor:
        """``(..., B, F)`` from vectors of tokens, ``(..., B, D, e)``, and the batch's ``masked``,
        ``target`` and ``t``.
        """
        raise NotImplementedError

    def forward(self, batch: MaskedBatch) -> Tensor:
        if batch.x_0 is None:
            raise ValueError("batch.x_0 is None: a recognition network needs the clean tokens")
        self._check_rows("x_0", batch.x_0)
        return self._of_tokens(batch.x_0, batch)

    def _of_tokens(self, x_0: Tensor, batch: MaskedBatch) -> Tensor:
        """``(B, F)`` from clean tokens ``(B, D)``."""
        return self._features(embedding(x_0, self._token_vectors()), batch)

    def state(self, batch: MaskedBatch) -> Tensor:
        """Features ``(B, F)`` of the state ``(x_t, t)``: what a prior or a model may look at.

        A masked position, targeted as far as the network knows, has zeros for the vector of its
        token. Neither ``x_0`` nor ``target`` is read.
        """
        self._check_rows("x_t", batch.x_t)
        masked = batch.x_t == self.vocab_size
        codes = embedding(batch.x_t.masked_fill(masked, 0), self._token_vectors())
        codes = codes.masked_fill(masked.unsqueeze(-1), 0.0)
        return self._features(codes, MaskedBatch(batch.x_t, batch.t, masked, masked))

    def soft(self, probabilities: Tensor, batch: MaskedBatch) -> Tensor:
        """Features of rows that are not tokens but distributions over them.

        Args:
            probabilities: ``(..., B, D, K)``, in place of ``x_0``.
            batch: says what is visible and targeted, ``B`` rows; its ``x_0`` is not read.

        Returns:
            ``(..., B, F)``.
        """
        if probabilities.shape[-2:] != (self.length, self.vocab_size):
            raise ValueError(
                f"probabilities must have shape (..., {self.length}, {self.vocab_size}), got "
                f"{tuple(probabilities.shape)}"
            )
        return self._features(probabilities @ self._token_vectors(), batch)

    def _check_rows(self, name: str, tokens: Tensor) -> None:
        if tokens.shape[1] != self.length:
            raise ValueError(
                f"batch.{name} must have shape (batch, {self.length}), got {tuple(tokens.shape)}"
            )


def status_of(batch: MaskedBatch, like: Tensor) -> Tensor:
    """Two numbers a position, ``(B, D, 2)``: whether it is masked, and whether it is a target."""
    return torch.stack([batch.masked, batch.target], -1).to(like.dtype)


class NormalEncoder(nn.Module):
    """Recognition network: ``(z_loc, z_scale)``, each ``(B, d)``, from features.

    Args:
        features: :class:`Features`.
        latent_dim: size ``d`` of the latent.
    """

    def __init__(self, features: Any, latent_dim: int) -> None:
        super().__init__()
        check_size("latent_dim", latent_dim)
        self.latent_dim = latent_dim
        self.features = features
        self.head = nn.Linear(features.feature_dim, 2 * latent_dim)

    def forward(self, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        return normal_parameters(full_precision(self.head, self.features(batch)))

    def soft(self, probabilities: Tensor, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        """``(z_loc, z_scale)`` of soft rows, as :meth:`Features.soft`."""
        return normal_parameters(
            full_precision(self.head, self.features.soft(probabilities, batch))
        )
