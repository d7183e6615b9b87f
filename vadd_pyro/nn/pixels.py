r"""A decoder for small pictures on a processor: a perceptron for the whole, convolutions for what
is near.

The row's vector of a residual perceptron (:mod:`vadd_pyro.nn.residual`) knows the picture as a
whole and the latent. From it every pixel gets a few numbers, its *sketch*; a few convolutions see
the sketch beside the tokens around a pixel and draw what is near,

.. math::
    h = \mathrm{blocks}(x_t, z, t) , \qquad m_{ij} = W_{ij}\, h + w_{ij} , \qquad
    \log \mu_{ij} = V\, \mathrm{conv}\big(m, c(x_t)\big)_{ij} + V' m_{ij} + b + \text{const} .

What neighbours tell about a pixel is then learned once for all places instead of once for each,
for twice the time of the perceptron alone; docs/real_data.md says what it is worth on MNIST.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from vadd_pyro.nn.paths import check_shape, chosen_pixel_logits, pixel_logits, zero_
from vadd_pyro.nn.residual import RowDecoder
from vadd_pyro.process import MaskingProcess, check_size

__all__ = ["PixelDecoder"]


class PixelDecoder(RowDecoder):
    r"""Decoder ``mu(x_t, z, t)`` over small pictures; see the module's text.

    All logits are equal before training, and they are float32 under autocast.

    Args:
        process: gives number of grey levels ``K`` and length ``D = channels * H * W``; rows are
            images ``(channels, H, W)``, flattened.
        latent_dim: size ``d`` of the latent; 0 for a model without one.
        shape: height ``H`` and width ``W``.
        channels: of the images.
        sketch_dim: numbers of a pixel's sketch.
        local_dim: width of the convolutions.
        num_convolutions: how many there are, of 3 x 3 pixels each.
        hidden_dim, num_blocks, embedding_dim, condition_dim, time_conditioning, dropout: of the
            perceptron, as in :class:`~vadd_pyro.nn.ResidualDecoder`.

    Shapes:
        ``x_t (B, D)``, ``z (..., B, d)`` or anything that broadcasts with it such as ``(C, 1,
        d)``, ``t (B,)``; returns ``(..., B, D, K)``.
    """

    def __init__(
        self,
        process: MaskingProcess,
        latent_dim: int = 0,
        *,
        shape: Sequence[int],
        channels: int = 1,
        sketch_dim: int = 8,
        local_dim: int = 24,
        num_convolutions: int = 2,
        hidden_dim: int = 512,
        num_blocks: int = 3,
        embedding_dim: int = 32,
        condition_dim: int = 128,
        time_conditioning: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            process,
            latent_dim,
            hidden_dim=hidden_dim,
            num_blocks=num_blocks,
            embedding_dim=embedding_dim,
            condition_dim=condition_dim,
            time_conditioning=time_conditioning,
            dropout=dropout,
        )
        for name, value in (
            ("sketch_dim", sketch_dim),
            ("local_dim", local_dim),
            ("num_convolutions", num_convolutions),
        ):
            check_size(name, value)
        height, width = check_shape(process, shape, channels)
        self.pixels = (channels, height, width)
        self.sketch = nn.Linear(hidden_dim, sketch_dim * height * width)
        inputs = sketch_dim + channels * self.tokens.dim
        self.convolutions = nn.ModuleList(
            nn.Conv2d(local_dim if i else inputs, local_dim, 3, padding=1)
            for i in range(num_convolutions)
        )
        self.head = nn.Linear(local_dim + sketch_dim, channels * process.vocab_size)
        zero_(self.head)

    def _body(self, x_t: Tensor, z: Tensor | None, t: Tensor) -> Tensor:
        """Vectors of all pixels, ``(..., B, H W, width)``."""
        codes = self.tokens(x_t)
        sketch = self.sketch(self._row_vectors(x_t, codes, z, t))
        rows = sketch.shape[:-1]
        _, height, width = self.pixels
        sketch = sketch.unflatten(-1, (-1, height, width)).flatten(0, -4)
        maps = codes.unflatten(-2, self.pixels).permute(0, 1, 4, 2, 3).flatten(1, 2)
        maps = maps.expand(*rows, *maps.shape[-3:]).flatten(0, -4)
        seen = torch.cat([sketch, maps.to(sketch.dtype)], 1)
        # The order of numbers in which processors are fastest at narrow convolutions.
        h = seen.contiguous(memory_format=torch.channels_last)
        for number, convolution in enumerate(self.convolutions):
            new = silu(convolution(h))
            h = h + new if number else new
        # Joined pixel by pixel: joined map by map they would be written number by number.
        both = [numbers.permute(0, 2, 3, 1) for numbers in (h, sketch)]
        return torch.cat(both, -1).flatten(1, 2).unflatten(0, rows)

    def _head(self, h: Tensor) -> Tensor:
        return pixel_logits(self.head, h.flatten(0, -3), self.pixels[0]).unflatten(0, h.shape[:-2])

    def _head_at(self, h: Tensor, index: Tensor | None) -> Tensor:
        return chosen_pixel_logits(self.head, h, index, self.pixels[0])
