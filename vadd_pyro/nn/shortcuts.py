"""When a layer may be computed in another way than usual, and what such ways have in common.

Shortcuts are for drawing: without gradients, on a processor (other devices are fast at the whole
and slow at asking which parts count), outside of compiled graphs and autocast, for layers that are
what they seem, and where there is work enough to save.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["is_plain", "may_shorten", "row_starts"]

_LEAST = 2**22  # multiplications of a layer that are worth the trouble


def is_plain(*modules: nn.Module) -> bool:
    """Whether nothing is hung on modules, so that their parameters say what they do."""
    return not any(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or m._compiled_call_impl is not None
        or "forward" in m.__dict__
        for m in modules
    )


def may_shorten(layer: nn.Linear, num_rows: int) -> bool:
    """Whether another way may be taken than through a dense layer, for so many rows."""
    weight = layer.weight
    return (
        num_rows * weight.numel() >= _LEAST
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.float64)
        and not weight.is_inference()  # which does not say when it was changed
        and not torch.is_autocast_enabled("cpu")
        and type(layer) is nn.Linear
        and is_plain(layer)
    )


def row_starts(index: Tensor, num_rows: int, length: int) -> Tensor:
    """Where the entries of each row begin in an increasing index into ``B D``, ``(B + 1,)``."""
    return torch.searchsorted(index, length * torch.arange(num_rows + 1, device=index.device))
