"""What became no number in training: which term of the loss, or whose gradient or weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["NonFiniteLossError", "blame_loss", "clip_gradient", "not_finite"]

_NAMED = 3


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient is no number any more; training stopped before the update."""


def _together(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def not_finite(named: Mapping[str, Tensor]) -> str:
    """Names of the tensors that hold anything but numbers, as text; empty if none does."""
    return _together([name for name, value in named.items() if not value.isfinite().all()])


def blame_loss(reconstruction: float, kl: float, kl_weight: float) -> str:
    """Which term of a loss that is not finite is the culprit.

    Args:
        reconstruction, kl: the terms, nats. The former is what the latter leaves of the loss, and
            so says nothing of its own where that is not finite.
        kl_weight: ``lambda``.
    """
    if not math.isfinite(kl_weight):
        return f"kl_weight is {kl_weight}"
    if not math.isfinite(kl):
        return f"its KL term is not finite ({kl})"
    return f"its reconstruction term is not finite ({reconstruction})"


def clip_gradient(named: Mapping[str, Tensor], clip_norm: float | None) -> str:
    """Clip the norm of the gradient of all parameters, if it is finite.

    The numbers are those of ``torch.nn.utils.clip_grad_norm_``, which scales first and, where the
    norm is not finite, spoils the gradients of all.

    Args:
        named: the parameters by name.
        clip_norm: the largest norm; None does not clip.

    Returns:
        Empty, or if it is not finite whose gradient is the culprit; the gradients are then as they
        were.
    """
    for parameter in named.values():
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()  # entries of one place are one number
    gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
    if not gradients:
        return ""
    values = [_values(gradient) for gradient in gradients.values()]
    norms = torch._foreach_norm(values)
    norm = torch.stack([one.to(norms[0].device) for one in norms]).norm()
    size = float(norm)
    if not math.isfinite(size):
        return _blame_gradient(dict(zip(gradients, values, strict=True)), size)
    if clip_norm is not None and size + 1e-6 > clip_norm:
        factor = clip_norm / (norm + 1e-6)
        for device in {value.device for value in values}:
            there = [value for value in values if value.device == device]
            torch._foreach_mul_(there, factor.to(device))
    return ""


def _values(gradient: Tensor) -> Tensor:
    """The numbers of a gradient, which may be sparse, in its own memory."""
    return gradient._values() if gradient.is_sparse else gradient


def _blame_gradient(gradients: Mapping[str, Tensor], norm: float) -> str:
    names = not_finite(gradients)
    if names:
        return f"the gradient of {names} is not finite"
    sizes = {name: float(gradient.abs().max()) for name, gradient in gradients.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    return f"the gradient's norm is {norm}: that of {largest} is up to {sizes[largest]:.3g}"
