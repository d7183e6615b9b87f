r"""A row of tokens as one distribution with one kernel, and how categorical tokens are drawn.

``TokenCategorical`` scores a whole row of tokens by one fused cross-entropy, where
``Categorical(logits=...)`` normalises and keeps a copy of the logits. It behaves as the ordinary
one does, which may be used in its place.

Tokens are drawn by inverting the cumulative distribution, summed in double precision:
single-precision Gumbel noise sharpens large vocabularies (Zheng et al. 2024, arXiv 2409.02908),
and a single-precision cumulative sum may end below one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import Categorical, Independent, MaskedDistribution
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution as TorchBase
from torch.distributions import constraints
from torch.nn.functional import cross_entropy

__all__ = [
    "TokenCategorical",
    "check_vocabulary",
    "draw_categorical",
    "token_logits",
]

_IGNORED = -100


def draw_categorical(logits: Tensor) -> Tensor:
    """One draw per row of ``logits (..., K)``, normalised or not: ``(...,)`` long in ``0..K-1``.

    Inverse CDF: the first category whose cumulative probability exceeds ``u * total``, so a
    category of probability zero is never drawn and neither is one past the last. Two categories
    need one comparison, up to 64 a count of those passed, more a bisection.
    """
    shape, vocab_size = logits.shape[:-1], logits.shape[-1]
    flat = logits.detach().reshape(-1, vocab_size)
    if vocab_size == 2:
        odds = flat[:, 1] - flat[:, 0]
        u = torch.rand(odds.shape, dtype=torch.double, device=odds.device)
        return (u < torch.sigmoid(odds)).long().reshape(shape)
    cdf = torch.softmax(flat, -1).cumsum(-1, dtype=torch.double)
    total = cdf[:, -1:]
    u = torch.rand(total.shape, dtype=torch.double, device=cdf.device) * total
    u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))
    if vocab_size <= 64:
        return (cdf <= u).sum(-1).reshape(shape)
    return torch.searchsorted(cdf, u, right=True).reshape(shape)


class TokenCategorical(TorchDistribution):
    """A row of tokens, independent categoricals, of which only the target positions count.

    Same law as ``Categorical(logits=logits).mask(target).to_event(1)``; the log-density is one
    fused cross-entropy.

    Args:
        logits: unnormalised log-probabilities, ``(..., D, K)``.
        target: positions that are scored, ``(..., D)`` bool, broadcast against ``logits``; None
            scores all.
    """

    arg_constraints: ClassVar = {"logits": constraints.independent(constraints.real, 2)}
    has_enumerate_support = False

    def __init__(
        self, logits: Tensor, target: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        self.logits = logits
        self.target = target
        super().__init__(logits.shape[:-2], logits.shape[-2:-1], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Integers ``0..K-1`` at every position."""
        return constraints.independent(
            constraints.integer_interval(0, self.logits.shape[-1] - 1), 1
        )

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> TokenCategorical:
        """The same law over a larger batch shape."""
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self
        return TokenCategorical(
            self.logits.expand(shape + self.logits.shape[-2:]), self.target, validate_args=False
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Sum over target positions of the log-probability of ``value (..., D)``.

        The batch shape, nats.
        """
        if self._validate_args:
            self._validate_sample(value)
        if self.target is not None:
            value = value.masked_fill(~self.target, _IGNORED)
        logits = self.logits
        shape = logits.shape[:-1]
        if value.shape != shape:
            shape = torch.broadcast_shapes(value.shape, shape)
            logits = logits.expand(shape + logits.shape[-1:])
            value = value.expand(shape)
        loss = cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            value.reshape(-1),
            ignore_index=_IGNORED,
            reduction="none",
        )
        return -loss.reshape(shape).sum(-1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Tokens at every position, ``sample_shape + batch_shape + (D,)``."""
        shape = torch.Size(sample_shape) + self.logits.shape
        with torch.no_grad():
            return draw_categorical(self.logits.expand(shape))


def token_logits(distribution: TorchBase) -> Tensor:
    """Logits ``(..., D, K)`` behind the distribution at a model's ``"x_0"`` site.

    Accepts :class:`TokenCategorical` and ``Categorical`` under ``.mask(...)``, ``.to_event(1)``
    and ``.expand(...)`` in any order.

    Raises:
        TypeError: for any other distribution, naming it.
    """
    inner = distribution
    while isinstance(inner, (Independent, MaskedDistribution)):
        inner = inner.base_dist
    if isinstance(inner, TokenCategorical):
        return inner.logits
    if isinstance(inner, Categorical) and len(distribution.event_shape) == 1:
        return inner.logits
    raise TypeError(
        "site 'x_0' must be one categorical per position, a TokenCategorical(logits, target) or "
        f"Categorical(logits=...).mask(target).to_event(1); got {distribution}"
    )


def check_vocabulary(logits: Tensor, vocab_size: int) -> None:
    """Check that logits ``(..., K)`` speak of the clean tokens and no others.

    Raises:
        ValueError: naming both sizes.
    """
    if logits.shape[-1] != vocab_size:
        raise ValueError(
            f"site 'x_0' has {logits.shape[-1]} logits a position, expected vocab_size = "
            f"{vocab_size}: the decoder is normalised over the clean tokens, without the mask"
        )
