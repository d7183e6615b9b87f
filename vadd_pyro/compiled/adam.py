"""Which optimisers a compiled update carries out itself: Adam, and AdamW."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["decoupled", "is_plain_adam"]


def is_plain_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is Adam or AdamW without options that the graph does not know."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return False
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return False
    odd = ("amsgrad", "maximize", "differentiable", "capturable")
    return not any(group.get(name) for group in optimizer.param_groups for name in odd)


def decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether a group's weights decay by themselves, as in AdamW, and not by their gradients."""
    return group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
