r"""The forward process: mask tokens independently, and say which of them a reverse step has to
score.

Every token carries one uniform number ``u``: it is masked at time ``t`` exactly when ``u < 1 -
alpha(t)``. So one draw of ``u`` fixes a whole path, and a reverse step from ``t`` to ``s`` reveals
the tokens with ``1 - alpha(s) <= u < 1 - alpha(t)``, each masked one with probability ``rho(s,
t)``, whatever the values are:

.. math::
    q(x_t \mid x_0) = \prod_j \alpha(t)^{[x_{t,j} = x_{0,j}]} (1 - \alpha(t))^{[x_{t,j} =
    \text{mask}]} .

References:
    Austin et al. 2021 (arXiv 2107.03006); Sahoo et al. 2024 (arXiv 2406.07524).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from pyro.distributions.util import is_validation_enabled
from torch import Tensor

from vadd_pyro.schedules import LinearSchedule, Schedule

__all__ = ["MaskedBatch", "MaskingProcess", "make_time_grid"]

_FEW_EDGES = 16  # are passed over one by one, which is faster than to search them


@dataclass(frozen=True)
class MaskedBatch:
    """What a step program sees: partly masked rows, and which positions are to be written.

    Args:
        x_t: partly masked tokens, ``(B, D)`` long; the mask token has the id ``K``.
        t: times, ``(B,)`` float in ``[0, 1]``.
        masked: ``x_t == K``, ``(B, D)`` bool.
        target: the masked positions that this step writes and scores, a subset of ``masked``,
            ``(B, D)`` bool. A model reads it only to score (as the mask of its ``"x_0"`` site); a
            guide may look at it.
        x_0: clean tokens, ``(B, D)`` long, or None to generate. A model reads it only as ``obs``;
            a guide may look at it.
        weight: what each row's term counts in the objective, ``(B,)`` float; None counts every row
            once.
    """

    x_t: Tensor
    t: Tensor
    masked: Tensor
    target: Tensor
    x_0: Tensor | None = None
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.x_t.shape
        if len(shape) != 2:
            raise ValueError(f"x_t must have shape (B, D), got {tuple(shape)}")
        for name in ("masked", "target", "x_0"):
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(
                    f"{name} must have the shape {tuple(shape)} of x_t, got {tuple(value.shape)}"
                )
        for name in ("t", "weight"):
            value = getattr(self, name)
            if value is not None and value.shape != shape[:1]:
                raise ValueError(
                    f"{name} must have one entry a row, shape ({shape[0]},), got "
                    f"{tuple(value.shape)}"
                )

    def __len__(self) -> int:
        return self.x_t.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> MaskedBatch:
        """The chosen rows.

        A slice, an index tensor or a ``(B,)`` bool mask. An integer would lose the row dimension.
        """
        if isinstance(rows, int):
            raise TypeError(
                f"index a MaskedBatch with a slice, an index tensor or a bool mask, got {rows}"
            )

        def pick(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[rows]

        return MaskedBatch(
            self.x_t[rows],
            self.t[rows],
            self.masked[rows],
            self.target[rows],
            pick(self.x_0),
            pick(self.weight),
        )

    def split(self, size: int) -> Iterator[MaskedBatch]:
        """Consecutive pieces of at most ``size`` rows."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def without_data(self) -> MaskedBatch:
        """The same batch with ``x_0 = None``: a program run on it generates."""
        return replace(self, x_0=None, weight=None)


class MaskingProcess:
    """Masked (absorbing) diffusion over rows of ``length`` tokens from ``vocab_size`` values.

    Args:
        vocab_size: number of clean tokens ``K``; their ids are ``0..K-1`` and the mask token has
            the id ``K``.
        length: number of positions ``D`` of a row.
        schedule: survival probability of a token; linear if omitted.

    Example:
        >>> process = MaskingProcess(vocab_size=100, length=2)
        >>> process.corrupt(torch.tensor([[3, 7]]), torch.tensor([1.0])).x_t
        tensor([[100, 100]])
    """

    def __init__(self, vocab_size: int, length: int, schedule: Schedule | None = None) -> None:
        for name, value, least in (("vocab_size", vocab_size, 2), ("length", length, 1)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        schedule = LinearSchedule() if schedule is None else schedule
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"schedule must be a vadd_pyro.Schedule, got {type(schedule).__name__}; "
                "wrap a function of t in FunctionSchedule"
            )
        schedule.check()
        self.vocab_size = vocab_size
        self.length = length
        self.schedule = schedule

    @property
    def mask_id(self) -> int:
        """Id of the mask token, ``K``."""
        return self.vocab_size

    def __repr__(self) -> str:
        return (
            f"MaskingProcess(vocab_size={self.vocab_size}, length={self.length}, "
            f"schedule={self.schedule})"
        )

    # ------------------------------------------------------------------ checks

    def check_tokens(
        self, x: Tensor, name: str = "x_0", *, masks: bool = False, values: bool = True
    ) -> Tensor:
        """Check that ``x`` holds rows of tokens, and return it as ``(B, D)`` long.

        Args:
            x: tokens, ``(B, D)``, any integer type.
            name: how messages call the argument.
            masks: whether the mask id may occur.
            values: whether to look at the values too (which waits for the device).

        Raises:
            TypeError: if ``x`` is no integer tensor.
            ValueError: for a wrong shape, an empty batch or a token out of range, naming the first
            one.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor of tokens, got {type(x).__name__}")
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(
                f"{name} must hold integer tokens (torch.long), got {x.dtype}; bin or convert it "
                "first"
            )
        if x.dim() != 2 or x.shape[1] != self.length:
            raise ValueError(
                f"{name} must have shape (batch, {self.length}), got {tuple(x.shape)}"
            )
        if len(x) == 0:
            raise ValueError(f"{name} is an empty batch: expected at least one row")
        if values:
            highest = self.vocab_size if masks else self.vocab_size - 1
            low, high = (int(v) for v in torch.aminmax(x))
            if low < 0 or high > highest:
                row, column = ((x < 0) | (x > highest)).nonzero()[0].tolist()
                expected = f"tokens in 0..{self.vocab_size - 1}" + (
                    f" or the mask id {self.mask_id}" if masks else ""
                )
                raise ValueError(
                    f"{name}[{row}, {column}] is {int(x[row, column])}: expected {expected}"
                )
        return x.long()

    def check_times(
        self, t: Tensor | float, num_rows: int, name: str, device: torch.device
    ) -> Tensor:
        """Times as a ``(B,)`` float tensor in ``[0, 1]``; a number stands for every row."""
        times = torch.as_tensor(t, dtype=torch.get_default_dtype(), device=device)
        if times.dim() == 0:
            times = times.expand(num_rows)
        if is_validation_enabled() and not ((times >= 0) & (times <= 1)).all():
            raise ValueError(f"{name} must lie in [0, 1], got {t}")
        if times.shape != (num_rows,):
            raise ValueError(
                f"{name} must be a number or have shape ({num_rows},), got {tuple(times.shape)}"
            )
        return times

    # -------------------------------------------------------------- corruption

    def corrupt(
        self,
        x_0: Tensor,
        t: Tensor | float,
        s: Tensor | float | None = None,
        *,
        weight: Tensor | None = None,
        at_least_one: bool = False,
    ) -> MaskedBatch:
        """Mask clean rows at time ``t`` and mark what a step back to ``s`` would reveal.

        Args:
            x_0: clean tokens, ``(B, D)`` long (see :meth:`check_tokens`; values are not looked at
                here).
            t: times, ``(B,)`` or a number.
            s: the time stepped back to; None targets every masked position (``s = 0``).
            weight: row weights to carry along, ``(B,)``.
            at_least_one: draw the masks given that at least one position is masked.

        Returns:
            A :class:`MaskedBatch` of ``B`` rows.
        """
        times = self.check_times(t, len(x_0), "t", x_0.device)
        p = 1 - self.schedule.alpha(times)
        u = torch.rand(x_0.shape, device=x_0.device, dtype=times.dtype)
        if at_least_one:
            u = _given_one_below(u, p)
        masked = u < p.unsqueeze(-1)
        target = masked
        if s is not None:
            earlier = 1 - self.schedule.alpha(self.check_times(s, len(x_0), "s", x_0.device))
            target = masked & (u >= earlier.unsqueeze(-1))
        x_t = x_0.masked_fill(masked, self.mask_id)
        return MaskedBatch(x_t, times, masked, target, x_0, weight)

    def reveal_steps(
        self,
        shape: tuple[int, ...],
        grid: Tensor,
        device: torch.device,
        dtype: torch.dtype = torch.long,
    ) -> Tensor:
        """At which step of a grid each token is revealed, ``shape`` integers in ``1..T``.

        Step ``i`` leads from ``t_i`` to ``t_{i-1}``, so a sampler visits ``T`` first. A token
        falls in step ``i`` with probability ``alpha(t_{i-1}) - alpha(t_i)``, over ``1 -
        alpha(t_T)`` if the grid ends before 1.

        Args:
            shape: ``(B, D)``.
            grid: ``(T + 1,)`` shared by all rows, or ``(B, T + 1)``.
            device: where.
            dtype: of the integers.
        """
        if grid.shape[-1] == 2:
            return torch.ones(shape, dtype=dtype, device=device)
        edges = 1 - self.schedule.alpha(grid.to(device))
        last = edges[..., -1:]
        u = torch.rand(shape, device=device, dtype=edges.dtype)
        if last.dim() > 1 or float(last) != 1:
            u *= last
        inner = edges[..., 1:-1].contiguous()
        if inner.dim() > 1 or len(inner) > _FEW_EDGES:
            return (torch.searchsorted(inner, u, right=True) + 1).to(dtype)
        steps = torch.ones(shape, dtype=torch.uint8, device=device)
        for edge in inner.tolist():
            steps += u >= edge
        return steps.to(dtype)

    def step_batch(
        self, x_0: Tensor, steps: Tensor, step: Tensor | int, grid: Tensor
    ) -> MaskedBatch:
        """The state in which a sampler with reveal steps ``steps`` stands before step ``step``.

        Args:
            x_0: clean tokens, ``(B, D)``.
            steps: the step at which each token is revealed, ``(B, D)``, from :meth:`reveal_steps`.
            step: which step is taken, in ``1..T``: ``(B,)`` or one for all rows.
            grid: ``(T + 1,)``.
        """
        step = torch.as_tensor(step, device=x_0.device).expand(len(x_0))
        masked = steps <= step.unsqueeze(-1)
        target = steps == step.unsqueeze(-1)
        t = grid.to(device=x_0.device, dtype=torch.get_default_dtype())[step]
        return MaskedBatch(x_0.masked_fill(masked, self.mask_id), t, masked, target, x_0)


def check_size(name: str, value: int, least: int = 1) -> None:
    """Check that an argument is an integer of at least ``least``.

    Raises:
        ValueError: naming the argument and its value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_time(name: str, value: float) -> float:
    """Check that an argument is a time in ``[0, 1]``, and return it as a float.

    Raises:
        ValueError: naming the argument and its value.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a time in [0, 1], got {value!r}")
    return float(value)


def make_time_grid(num_steps: int | None = None, time_grid: Tensor | None = None) -> Tensor:
    """The grid ``0 = t_0 < ... < t_T = 1`` of a T-step sampler, ``(T + 1,)`` in double precision.

    Args:
        num_steps: ``T``; equal steps.
        time_grid: a grid of your own, increasing from 0 to 1; ``num_steps`` may then be left out.

    Raises:
        ValueError: if neither or a contradictory pair is given, or a grid does not increase from 0
        to 1.
    """
    if time_grid is None:
        if num_steps is None:
            raise ValueError("num_steps is missing: expected the number of steps, or a time_grid")
        if isinstance(num_steps, bool) or not isinstance(num_steps, int):
            raise TypeError(f"num_steps must be an integer, got {num_steps!r}")
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        return torch.arange(num_steps + 1, dtype=torch.double) / num_steps
    grid = torch.as_tensor(time_grid, dtype=torch.double).cpu()
    if grid.dim() != 1 or len(grid) < 2:
        raise ValueError(f"time_grid must have shape (T + 1,), got {tuple(grid.shape)}")
    if not (grid.diff() > 0).all() or grid[0] != 0 or grid[-1] != 1:
        raise ValueError(f"time_grid must increase from 0 to 1, got {grid.tolist()}")
    if num_steps is not None and num_steps != len(grid) - 1:
        raise ValueError(
            f"num_steps is {num_steps}, but time_grid has {len(grid) - 1} steps: give one of them"
        )
    return grid


def _given_one_below(u: Tensor, p: Tensor) -> Tensor:
    """Rows of uniforms ``u`` (B, D), made to follow their law given that at least one lies below
    ``p`` (B,).

    The first such position has a truncated geometric law, drawn by inversion; those before it are
    uniform above ``p``, that one below ``p``, those after it are free.
    """
    length = u.shape[-1]
    p = p.clamp_min(torch.finfo(p.dtype).tiny)
    log_above = torch.log1p(-p)
    at_least_one = -torch.expm1(length * log_above)
    v = torch.rand(p.shape, device=p.device, dtype=p.dtype)
    first = (torch.log1p(-v * at_least_one) / log_above).floor().clamp(0, length - 1).unsqueeze(-1)
    position = torch.arange(length, device=u.device)
    p = p.unsqueeze(-1)
    before = (p + u * (1 - p)).clamp_min(p)
    return torch.where(position < first, before, torch.where(position == first, u * p, u))
