"""What a family of networks is: all that a model and its guide are made of, of one backbone.

A family knows how large its networks are, and makes those that are asked for, each with parameters
of its own:

=================== ======================================= =======================
method              what for                                reads
=================== ======================================= =======================
``decoder``         ``p(x_0 | x_t, z, t)``                  ``x_t``, ``z``, ``t``
``features``        a guide's recognition features          ``x_0``, masks, targets
``encoder``         a normal guide, and a VampPrior's       ``x_0``, masks, targets
``state``           a prior that depends on the state       ``x_t``, ``t``
``state_encoder``   a normal prior that does                ``x_t``, ``t``
``local_decoder``   the same, a latent at each position     ``x_t``, ``z``, ``t``
``local_state``     a prior with a latent at each position  ``x_t``, ``t``
=================== ======================================= =======================
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from vadd_pyro.nn.base import Decoder, Features, NormalEncoder
from vadd_pyro.nn.state import PositionState, State, StateNormal
from vadd_pyro.process import MaskingProcess

__all__ = ["Networks", "blocks_less"]


@dataclass(frozen=True)
class Networks:
    """A family of networks; a subclass adds sizes, ``decoder`` and ``_recognition``.

    What is to be summed out runs through the decoder once a code, and a prior looks at less than a
    guide: networks for those are smaller, as a family says.

    Args:
        process: gives vocabulary size and length.

    Raises:
        ValueError: for a size that no network can have, naming it, as the backbones do.
    """

    process: MaskingProcess

    def __post_init__(self) -> None:
        if not isinstance(self.process, MaskingProcess):
            raise TypeError(f"process must be a MaskingProcess, got {self.process!r}")
        with torch.device("meta"):  # which takes neither memory nor random numbers
            self.decoder(1)
            self.decoder(1, summed=True)
            self.features()
            self.state()

    @property
    def sizes(self) -> dict[str, Any]:
        """All sizes by name, as :func:`make_networks` takes them."""
        names = (field.name for field in fields(self) if field.name != "process")
        return {name: getattr(self, name) for name in names}

    def check_process(self, process: MaskingProcess) -> None:
        """Check that the networks are for rows of a process.

        Raises:
            ValueError: naming both processes.
        """
        own = self.process
        if (own.vocab_size, own.length) != (process.vocab_size, process.length):
            raise ValueError(f"networks were made for {own}, and process is {process}")

    def decoder(self, latent_dim: int, *, summed: bool = False) -> Decoder:
        """A decoder.

        Args:
            latent_dim: size of the latent; 0 for a model without one.
            summed: whether the latent is summed out, so that all codes run through the decoder.
        """
        raise NotImplementedError

    def _recognition(self, fewer: int) -> Features:
        """Recognition features by a network of so many blocks fewer, and at least one."""
        raise NotImplementedError

    def features(self) -> Features:
        """Recognition features ``(B, F)``."""
        return self._recognition(0)

    def encoder(self, latent_dim: int) -> NormalEncoder:
        """A recognition network, ``(z_loc, z_scale)``, of ``latent_dim`` numbers each."""
        return NormalEncoder(self.features(), latent_dim)

    def state(self) -> nn.Module:
        """Features ``(B, F)`` of the state ``(x_t, t)``."""
        return State(self._recognition(1))

    def local_decoder(self, latent_dim: int) -> Decoder:
        """A decoder with a latent at each position, that counts there alone.

        Raises:
            ValueError: if the family has none.
        """
        raise ValueError(
            f"{type(self).__name__} have no latents at single positions, as a chain of codes "
            "needs: use the networks 'mlp', 'residual' or 'transformer'"
        )

    def local_state(self) -> nn.Module:
        """Features ``(B, D, F)`` of the state at each position."""
        return PositionState(self.state(), self.process.length)

    def state_encoder(self, latent_dim: int) -> StateNormal:
        """A prior network, ``(z_loc, z_scale)``, standard normal before training."""
        return StateNormal(self.state(), latent_dim)


def blocks_less(number: int, by: int) -> int:
    """So many fewer, but at least one. None fewer, it is handed on for the backbone to check."""
    return max(1, number - by) if by else number
