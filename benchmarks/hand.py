"""The yardsticks: training steps as one writes them by hand in PyTorch, without Pyro.

Corrupt, encode, draw a latent, decode, cross-entropy at masked positions, closed-form KL (or the
sum over all codes), backward, Adam. The networks are given and know nothing of it; perceptrons are
run here layer by layer (:func:`plain`), since those of the package save work in their first one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vadd_pyro.nn import MLPDecoder, MLPEncoder
from vadd_pyro.nn.base import normal_parameters

__all__ = [
    "PlainDecoder",
    "PlainEncoder",
    "code_loss",
    "normal_loss",
    "optimiser",
    "plain",
    "training_step",
]

Loss = Callable[[Tensor], Tensor]


class PlainDecoder(nn.Module):
    """The layers of an :class:`~vadd_pyro.nn.MLPDecoder`, one after the other as one writes them,
    without its ways of saving work.

    Args:
        decoder: which is not told the time.
    """

    def __init__(self, decoder: MLPDecoder) -> None:
        super().__init__()
        self.layers = decoder

    def forward(self, x_t: Tensor, z: Tensor | None, t: Tensor) -> Tensor:
        of = self.layers
        h = of.tokens(of.embedding(x_t).flatten(-2))
        if of.latent is not None:
            h = h + of.latent(z)
        return of.head(of.hidden(h)).unflatten(-1, (of.length, of.vocab_size))


class PlainEncoder(nn.Module):
    """The same of an :class:`~vadd_pyro.nn.MLPEncoder`."""

    def __init__(self, encoder: MLPEncoder) -> None:
        super().__init__()
        self.layers = encoder

    def forward(self, batch: Fields) -> tuple[Tensor, Tensor]:
        of = self.layers.features
        kinds = batch.masked.long() + batch.target.long()
        h = of.tokens((of.embedding(batch.x_0) + of.status(kinds)).flatten(-2))
        return normal_parameters(self.layers.head(of.hidden(h)))


def plain(network: nn.Module) -> nn.Module:
    """A network as one writes it by hand."""
    if type(network) is MLPDecoder:
        return PlainDecoder(network)
    return PlainEncoder(network) if type(network) is MLPEncoder else network


class Fields:
    """The least a hand-written loop would pass on."""

    def __init__(self, x_0: Tensor, t: Tensor, masked: Tensor) -> None:
        self.x_0, self.t, self.masked, self.target = x_0, t, masked, masked


def optimiser(*modules: nn.Module) -> torch.optim.Optimizer:
    """Fused Adam, as on all sides."""
    return torch.optim.Adam([p for m in modules for p in m.parameters()], lr=1e-3, fused=True)


def corrupted(x_0: Tensor, mask_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Times spread evenly, masks and what they leave."""
    rows, device = len(x_0), x_0.device
    t = 1 - (torch.rand((), device=device) + torch.arange(rows, device=device) / rows) % 1
    masked = torch.rand(x_0.shape, device=device) < t.unsqueeze(-1)
    return t, masked, x_0.masked_fill(masked, mask_id)


def masked_nll(logits: Tensor, x_0: Tensor, masked: Tensor) -> Tensor:
    """Cross-entropy at masked positions, summed over a row, ``(..., B)``."""
    target = x_0.masked_fill(~masked, -100).expand(logits.shape[:-1])
    loss = cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        target.reshape(-1),
        ignore_index=-100,
        reduction="none",
    )
    return loss.reshape(target.shape).sum(-1)


def normal_loss(
    decoder: nn.Module, encoder: nn.Module, vocab_size: int, num_particles: int = 1
) -> Loss:
    """Loss of a row with a normal latent, mean over rows and over draws of the latent."""

    def loss(x_0: Tensor) -> Tensor:
        t, masked, x_t = corrupted(x_0, vocab_size)
        z_loc, z_scale = encoder(Fields(x_0, t, masked))
        if num_particles == 1:
            z = z_loc + z_scale * torch.randn_like(z_loc)
        else:
            z = z_loc + z_scale * z_loc.new_empty(num_particles, *z_loc.shape).normal_()
        nll = masked_nll(decoder(x_t, z, t), x_0, masked)
        if num_particles > 1:
            nll = nll.mean(0)
        kl = (0.5 * (z_loc.square() + z_scale.square() - 1) - z_scale.log()).sum(-1)
        return torch.where(masked.any(-1), (nll + kl) / t, 0.0).sum() / len(x_0)

    return loss


def code_loss(decoder: nn.Module, logits: Tensor, codes: nn.Embedding, vocab_size: int) -> Loss:
    """Loss of a row with a code that is summed out: all codes of all rows go through the decoder.

    Args:
        decoder: takes latents ``(C, 1, d)``.
        logits: of the codes, ``(C,)``.
        codes: their vectors, ``(C, d)``.
        vocab_size: ``K``.
    """

    def loss(x_0: Tensor) -> Tensor:
        t, masked, x_t = corrupted(x_0, vocab_size)
        nll = masked_nll(decoder(x_t, codes.weight.unsqueeze(1), t), x_0, masked)
        log_prob = torch.logsumexp(logits.log_softmax(-1).unsqueeze(-1) - nll, 0)
        return torch.where(masked.any(-1), -log_prob / t, 0.0).sum() / len(x_0)

    return loss


def training_step(
    loss_of: Loss,
    adam: torch.optim.Optimizer,
    x_0: Tensor,
    *,
    compiled: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Callable[[], None]:
    """One update.

    Args:
        loss_of: mean loss of rows.
        adam: the optimiser.
        x_0: the rows, ``(B, D)``.
        compiled: the loss and its gradient under ``torch.compile``, as one graph each; the
            optimiser stays what it is, one kernel.
        autocast: makes the context in which the loss is computed.
    """
    if compiled:
        loss_of = torch.compile(loss_of, fullgraph=True, dynamic=False)

    def step() -> None:
        with autocast():
            loss = loss_of(x_0)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()

    return step
