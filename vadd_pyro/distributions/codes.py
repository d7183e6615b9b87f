r"""Products of categoricals: ``L`` codes of ``C`` values, ``C^L`` combinations at cost ``L C``.

.. math::
    p(c_1, \dots, c_L) = \prod_{l=1}^{L} \pi_l(c_l)

``CodeCategorical`` has integer values ``(L,)``; ``OneHotCodes`` writes the same codes as rows of
zeros with a one, ``(L, C)``, so that a guide may hand gradients through them;
``StraightThroughCodes`` is a guide that does: its draws are one-hot, their derivative is that of
the relaxed draw :math:`\mathrm{softmax}((\log \pi + g) / \tau)` with Gumbel noise ``g`` (biased,
of low variance).

References:
    Jang et al. 2017 (arXiv 1611.01144) and Maddison et al. 2017 (arXiv 1611.00712).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, register_kl
from torch.nn.functional import one_hot

from vadd_pyro.distributions.tokens import draw_categorical

__all__ = [
    "MAX_SUPPORT",
    "CodeCategorical",
    "OneHotCodes",
    "StraightThroughCodes",
    "combinations",
    "placed",
]

MAX_SUPPORT = 4096  # combinations that are laid out to be summed over


def combinations(num_codes: int, length: int, device: torch.device) -> Tensor:
    """All combinations of ``length`` codes, ``(num_codes ** length, length)`` long.

    Raises:
        NotImplementedError: for more than 4,096.
    """
    size = num_codes**length
    if size > MAX_SUPPORT:
        raise NotImplementedError(
            f"{length} codes of {num_codes} have {size:,} combinations, more than {MAX_SUPPORT:,}"
        )
    values = itertools.product(range(num_codes), repeat=length)
    return torch.tensor(list(values), device=device)


def placed(probabilities: Tensor, u: Tensor) -> Tensor:
    """Points ``u (...)`` of the unit interval carried to codes of probabilities ``(..., C)``."""
    cdf = probabilities.cumsum(-1)
    passed = cdf <= u.unsqueeze(-1) * cdf[..., -1:]
    return passed.sum(-1).clamp_max(probabilities.shape[-1] - 1)


class _Codes(TorchDistribution):
    """What the laws of codes share.

    Args:
        logits: unnormalised log-probabilities, ``(..., L, C)``.
    """

    arg_constraints: ClassVar = {"logits": constraints.independent(constraints.real, 2)}

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        if logits.dim() < 2:
            raise ValueError(f"logits must have shape (..., L, C), got {tuple(logits.shape)}")
        self.logits = logits.log_softmax(-1)
        self.num_factors, self.num_codes = logits.shape[-2:]
        super().__init__(logits.shape[:-2], self._event(), validate_args=validate_args)

    def _event(self) -> torch.Size:
        raise NotImplementedError

    def _like(self, logits: Tensor) -> _Codes:
        return type(self)(logits, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> _Codes:
        """The same law over a larger batch shape."""
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self
        return self._like(self.logits.expand(shape + self.logits.shape[-2:]))

    def tempered(self, temperature: float) -> _Codes:
        """The same codes with their logits divided."""
        return self._like(self.logits / temperature)

    def entropy(self) -> Tensor:
        """Entropy in nats, the batch shape."""
        return -(self.logits.exp() * self.logits).sum((-2, -1))

    @property
    def has_enumerate_support(self) -> bool:
        """Whether all combinations are few enough to be summed over."""
        return bool(self.num_codes**self.num_factors <= MAX_SUPPORT)

    def _combinations(self, expand: bool) -> Tensor:
        values = combinations(self.num_codes, self.num_factors, self.logits.device)
        values = values.reshape(len(values), *(1,) * len(self.batch_shape), self.num_factors)
        return values.expand(len(values), *self.batch_shape, -1) if expand else values

    def _draw(self, sample_shape: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return draw_categorical(
                self.logits.expand(torch.Size(sample_shape) + self.logits.shape)
            )

    @property
    def num_uniforms(self) -> int:
        """Columns that :meth:`transport` needs."""
        return self.num_factors

    def _pick(self, u: Tensor) -> Tensor:
        return placed(self.logits.exp(), u)


class CodeCategorical(_Codes):
    """``L`` independent codes as integers ``(L,)`` in ``0..C-1``.

    Args:
        logits: unnormalised log-probabilities, ``(..., L, C)``.
    """

    def _event(self) -> torch.Size:
        return torch.Size((self.num_factors,))

    @property
    def support(self) -> constraints.Constraint:
        """Integers ``0..C-1``."""
        return constraints.independent(constraints.integer_interval(0, self.num_codes - 1), 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of codes ``(..., L)`` in nats, the batch shape."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape, self.logits.shape[:-1])
        index = value.long().expand(shape).unsqueeze(-1)
        return self.logits.expand(shape + self.logits.shape[-1:]).gather(-1, index).sum((-2, -1))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Codes, ``sample_shape + batch_shape + (L,)`` long."""
        return self._draw(sample_shape)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All ``C ** L`` combinations, ``(C ** L, ..., L)``."""
        return self._combinations(expand)

    def transport(self, u: Tensor) -> Tensor:
        """Points of the unit cube ``u (..., L)`` carried to codes."""
        return self._pick(u)


class OneHotCodes(_Codes):
    """The same law over one-hot rows ``(L, C)``.

    Args:
        logits: unnormalised log-probabilities, ``(..., L, C)``.
    """

    def _event(self) -> torch.Size:
        return torch.Size((self.num_factors, self.num_codes))

    @property
    def support(self) -> constraints.Constraint:
        """One-hot rows."""
        return constraints.independent(constraints.one_hot, 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of one-hot rows ``(..., L, C)``, linear in them."""
        if self._validate_args:
            self._validate_sample(value)
        return (value * self.logits).sum((-2, -1))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """One-hot rows, ``sample_shape + batch_shape + (L, C)``."""
        return one_hot(self._draw(sample_shape), self.num_codes).to(self.logits.dtype)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All ``C ** L`` combinations, ``(C ** L, ..., L, C)``."""
        return one_hot(self._combinations(expand), self.num_codes).to(self.logits.dtype)

    def transport(self, u: Tensor) -> Tensor:
        """Points of the unit cube ``u (..., L)`` carried to one-hot rows."""
        return one_hot(self._pick(u), self.num_codes).to(self.logits.dtype)


class StraightThroughCodes(OneHotCodes):
    """One-hot draws with the gradient of their relaxation, for guides.

    Args:
        logits: unnormalised log-probabilities, ``(..., L, C)``.
        temperature: ``tau`` of the relaxation.
    """

    has_rsample = True

    def __init__(
        self, logits: Tensor, temperature: float = 1.0, validate_args: bool | None = None
    ) -> None:
        self.temperature = temperature
        super().__init__(logits, validate_args=validate_args)

    def _like(self, logits: Tensor) -> StraightThroughCodes:
        return StraightThroughCodes(logits, self.temperature, validate_args=False)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """One-hot rows whose derivative is that of the relaxed draw."""
        logits = self.logits.expand(torch.Size(sample_shape) + self.logits.shape)
        uniform = torch.rand(logits.shape, dtype=torch.double, device=logits.device)
        gumbel = -(-uniform.clamp(1e-300, 1 - 1e-16).log()).log()
        perturbed = logits + gumbel.to(logits.dtype)
        hard = one_hot(perturbed.argmax(-1), self.num_codes).to(logits.dtype)
        soft = (perturbed / self.temperature).softmax(-1)
        return hard + (soft - soft.detach())

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """One-hot rows without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape)


@register_kl(CodeCategorical, CodeCategorical)
@register_kl(OneHotCodes, OneHotCodes)
def _kl_codes(p: _Codes, q: _Codes) -> Tensor:
    return (p.logits.exp() * (p.logits - q.logits)).sum((-2, -1))
