r"""A row of tokens as one distribution with one kernel, and how categorical tokens are drawn.

``TokenCategorical`` scores a whole row of tokens at once and keeps nothing of the size of the
logits but the logits (:mod:`vadd_pyro.distributions.scores`), where ``Categorical(logits=...)``
normalises a copy. It behaves as the ordinary one does, which may be used in its place.

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
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Distribution as TorchBase
from torch.distributions import constraints

from vadd_pyro.distributions.deferred import DeferredLogits
from vadd_pyro.distributions.scores import row_scores, shared_row_scores

__all__ = [
    "TokenCategorical",
    "check_vocabulary",
    "draw_categorical",
    "position_log_prob",
    "position_logits",
    "token_logits",
]

_PIECE = 2**18  # logits whose cumulative sums are held at once


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
    pieces = [_invert(piece) for piece in flat.split(max(1, _PIECE // vocab_size))]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).reshape(shape)


def _invert(flat: Tensor) -> Tensor:
    """One draw per row of ``flat (n, K)`` by its cumulative distribution."""
    cdf = torch.softmax(flat, -1).cumsum(-1, dtype=torch.double)
    total = cdf[:, -1:]
    u = torch.rand(total.shape, dtype=torch.double, device=cdf.device) * total
    u = torch.minimum(u, torch.nextafter(total, torch.zeros_like(total)))
    if flat.shape[-1] <= 64:
        return (cdf <= u).sum(-1)
    return torch.searchsorted(cdf, u, right=True).squeeze(-1)


class TokenCategorical(TorchDistribution):
    """A row of tokens, independent categoricals, of which only the target positions count.

    Same law as ``Categorical(logits=logits).mask(target).to_event(1)``.

    Args:
        logits: unnormalised log-probabilities, ``(..., D, K)``, or :class:`DeferredLogits` that
            give them when they are asked for.
        target: positions that are scored, ``(..., D)`` bool, broadcast against ``logits``; None
            scores all.
        row: where rows share their logits, the entry of dimension -3 that each of ``B`` rows has,
            ``(B,)`` long; ``logits (..., U, D, K)`` then stand for ``(..., B, D, K)`` and the work
            is done once for each of the ``U``.
    """

    arg_constraints: ClassVar = {"_logits": constraints.independent(constraints.real, 2)}
    has_enumerate_support = False

    def __init__(
        self,
        logits: Tensor | DeferredLogits,
        target: Tensor | None = None,
        row: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self._given = logits
        self.row = row
        self.target = target
        shape = logits.shape[:-2] if row is None else logits.shape[:-3] + row.shape
        if not isinstance(logits, DeferredLogits):
            super().__init__(shape, logits.shape[-2:-1], validate_args=validate_args)
            return
        # Checked here they would be computed here.
        super().__init__(shape, logits.shape[-2:-1], validate_args=False)
        if validate_args is None:
            self.__dict__.pop("_validate_args")
        else:
            self._validate_args = validate_args

    @property
    def _logits(self) -> Tensor:
        given = self._given
        return self._checked(given.whole()) if isinstance(given, DeferredLogits) else given

    def _checked(self, logits: Tensor) -> Tensor:
        """Deferred logits, refused as others are when the law is made."""
        if self._validate_args and bool(logits.isnan().any()):
            raise ValueError("Expected logits that are numbers at every position, got NaN")
        return logits

    @property
    def logits(self) -> Tensor:
        """Unnormalised log-probabilities of every row, ``(..., D, K)``."""
        return self._logits if self.row is None else self._logits.index_select(-3, self.row)

    def logits_at(self, index: Tensor | None) -> Tensor:
        """Logits of chosen positions of ``B`` rows, up to a number for each, ``(n, K)``.

        Args:
            index: ``(n,)`` long into the ``B D`` positions, rows one after another and
                increasing; None for all.
        """
        length, vocab_size = self._given.shape[-2:]
        if self.row is None:
            if isinstance(self._given, DeferredLogits):
                return self._checked(self._given.at(index))
            flat = self._given.reshape(-1, vocab_size)
            return flat if index is None else flat.index_select(0, index)
        if index is None:
            index = torch.arange(len(self.row) * length, device=self.row.device)
        row = self.row.index_select(0, index.div(length, rounding_mode="floor"))
        flat = self._logits.reshape(-1, vocab_size)
        return flat.index_select(0, row * length + index % length)

    @property
    def support(self) -> constraints.Constraint:
        """Integers ``0..K-1`` at every position."""
        return constraints.independent(
            constraints.integer_interval(0, self._given.shape[-1] - 1), 1
        )

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> TokenCategorical:
        """The same law over a larger batch shape."""
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self
        if self.row is not None and shape[-1:] == self.row.shape:
            logits = self._logits.expand(shape[:-1] + self._logits.shape[-3:])
            return TokenCategorical(logits, self.target, self.row, validate_args=False)
        logits = self.logits
        return TokenCategorical(
            logits.expand(shape + logits.shape[-2:]), self.target, validate_args=False
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Sum over target positions of the log-probability of ``value (..., D)``.

        The batch shape, nats.
        """
        if self._validate_args:
            self._validate_sample(value)
        if self.row is not None and value.shape == self.row.shape + self.event_shape:
            return shared_row_scores(self._logits, self.row, value, self.target)
        return row_scores(self.logits, value, self.target)

    def position_log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of each token of ``value (..., D)``, zero where it is no target.

        ``(..., D)`` nats.
        """
        # A position for a row, so that nothing is added up.
        target = None if self.target is None else self.target.unsqueeze(-1)
        return row_scores(self.logits.unsqueeze(-2), value.unsqueeze(-1), target)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Tokens at every position, ``sample_shape + batch_shape + (D,)``."""
        logits = self.logits
        with torch.no_grad():
            return draw_categorical(logits.expand(torch.Size(sample_shape) + logits.shape))


def token_logits(distribution: TorchBase) -> Tensor:
    """Logits ``(..., D, K)`` behind the distribution at a model's ``"x_0"`` site.

    Accepts :class:`TokenCategorical` and ``Categorical`` under ``.mask(...)``, ``.to_event(1)``
    and ``.expand(...)`` in any order.

    Raises:
        TypeError: for any other distribution, naming it.
    """
    inner = _unwrapped(distribution)
    if isinstance(inner, TokenCategorical):
        return inner.logits
    if isinstance(inner, Categorical) and len(distribution.event_shape) == 1:
        return inner.logits
    raise TypeError(
        "site 'x_0' must be one categorical per position, a TokenCategorical(logits, target) or "
        f"Categorical(logits=...).mask(target).to_event(1); got {distribution}"
    )


def position_log_prob(distribution: TorchBase, value: Tensor) -> Tensor:
    """Log-probability of each token of rows under the distribution at a model's ``"x_0"`` site.

    Args:
        distribution: as in :func:`token_logits`.
        value: tokens, ``(..., D)``.

    Returns:
        ``(..., D)`` nats, zero at positions that the distribution masks.

    Raises:
        TypeError: for a distribution that scores rows as a whole.
    """
    if isinstance(distribution, TokenCategorical):
        return distribution.position_log_prob(value)
    if isinstance(distribution, MaskedDistribution) and distribution.event_shape:
        whole = position_log_prob(distribution.base_dist, value)
        return scale_and_mask(whole, mask=_by_position(distribution._mask))
    if isinstance(distribution, Independent) and distribution.reinterpreted_batch_ndims == 1:
        return distribution.base_dist.log_prob(value)
    raise TypeError(
        "to sum out a latent along a row, site 'x_0' must be a TokenCategorical(logits, target) "
        f"or Categorical(logits=...).mask(target).to_event(1); got {distribution}"
    )


def _by_position(mask: Tensor | bool) -> Tensor | bool:
    return mask.unsqueeze(-1) if isinstance(mask, Tensor) else mask


def position_logits(
    distribution: TorchBase, index: Tensor | None, shape: tuple[int, int]
) -> Tensor:
    """Logits of chosen positions behind the distribution at a model's ``"x_0"`` site.

    Args:
        distribution: as in :func:`token_logits`.
        index: ``(n,)`` long into the ``B D`` positions, rows one after another and increasing;
            None for all.
        shape: ``(B, D)``.

    Returns:
        ``(n, K)``, up to a number for each position.

    Raises:
        TypeError: as :func:`token_logits`.
    """
    inner = _unwrapped(distribution)
    if isinstance(inner, TokenCategorical) and inner.batch_shape + inner.event_shape == shape:
        return inner.logits_at(index)
    logits = token_logits(distribution)
    flat = logits.expand(*shape, logits.shape[-1]).reshape(-1, logits.shape[-1])
    return flat if index is None else flat.index_select(0, index)


def _unwrapped(distribution: TorchBase) -> TorchBase:
    while isinstance(distribution, (Independent, MaskedDistribution)):
        distribution = distribution.base_dist
    return distribution


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
