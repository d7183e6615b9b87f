"""Many parameters as one vector.

One vector for all parameters, and one for each of the optimiser's moments, make an update a few
operations instead of a few for each parameter; to the programs they are views of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vadd_pyro.compiled.graphs import NotOneGraphError

__all__ = ["Layout"]

_ALIGNMENT = 16  # numbers; a cache line of float32


class Layout:
    """Where each parameter stands in the vector.

    Args:
        parameters: by name, in order; of one precision and on one device.

    Raises:
        NotOneGraphError: for parameters that differ in these.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        kinds = {(p.dtype, p.device) for p in parameters.values()}
        if len(kinds) != 1:
            raise NotOneGraphError("the parameters are not of one precision and on one device")
        self.shapes = {name: p.shape for name, p in parameters.items()}
        self.starts: dict[str, int] = {}
        self.size = 0
        for name, shape in self.shapes.items():
            self.starts[name] = self.size
            self.size += -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """The parameters as views of a vector ``(size,)``."""
        return {
            name: vector[self.starts[name] : self.starts[name] + math.prod(shape)].view(shape)
            for name, shape in self.shapes.items()
        }

    def end(self, name: str) -> int:
        """Where the next parameter begins."""
        later = [start for start in self.starts.values() if start > self.starts[name]]
        return min(later, default=self.size)

    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """A vector ``(size,)`` of tensors in the order of the names, with zeros between them."""
        pieces = []
        for value in values:
            pieces.append(value.reshape(-1))
            if gap := -value.numel() % _ALIGNMENT:
                pieces.append(value.new_zeros(gap))
        return torch.cat(pieces)
