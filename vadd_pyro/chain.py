r"""The whole generative chain as one Pyro program.

``unroll`` turns a step program into the process that a T-step sampler runs,

.. math::
    p(\text{reveal}) \prod_{i=T}^{1} p(z_i \mid x_{t_i}) \prod_{j \in S_i} \mu_j(x_j \mid x_{t_i},
    z_i, t_i),

with sites ``"step_3/z"``, ``"step_3/x_0"`` and so on, and a site ``"reveal"`` that says at which
step each position is revealed. Unrolling a guide the same way gives its guide:
``pyro.infer.Trace_ELBO`` on the pair equals the chain objective of
:class:`~vadd_pyro.MaskedDiffusionELBO` in expectation, and
what else Pyro offers for a model works on it too, one draw at a time: a chain does not broadcast
over particles. Sites of rows in which a step reveals nothing are masked out, in both programs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from vadd_pyro.process import MaskedBatch, MaskingProcess, make_time_grid
from vadd_pyro.programs import Program
from vadd_pyro.sampling import device_of

__all__ = ["Chain", "unroll"]


class _Step(Messenger):
    """Puts a step's sites under a prefix, masks out rows that it does not touch, and keeps the
    tokens it writes.
    """

    def __init__(self, prefix: str, rows: Tensor) -> None:
        super().__init__()
        self.prefix = prefix
        self.rows = rows
        self.tokens: Tensor | None = None

    def _process_message(self, msg: Any) -> None:
        if msg["type"] != "sample":
            return
        name = msg["name"]
        msg["name"] = f"{self.prefix}/{name}"
        if isinstance(msg["fn"], _Subsample):
            return
        in_plate = any(frame.dim == -1 for frame in msg["cond_indep_stack"])
        if not in_plate and msg["fn"].batch_shape[-1:] != self.rows.shape:
            raise ValueError(
                f"site {name!r} stands outside the data plate: unrolled, every step would draw it "
                "anew, which is another model; condition it, or put it in the plate"
            )
        msg["mask"] = self.rows if msg["mask"] is None else msg["mask"] & self.rows

    def _postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and msg["name"] == f"{self.prefix}/x_0":
            self.tokens = msg["value"]


class Chain(Program):
    """An unrolled step program; see :func:`unroll`."""

    def __init__(self, step: Callable[..., Any], process: MaskingProcess, grid: Tensor) -> None:
        super().__init__()
        self.step = step
        self.process = process
        self.grid = grid

    def forward(self, x_0: Tensor | None = None, num_rows: int = 1) -> Tensor:
        """Run the chain.

        Args:
            x_0: clean tokens ``(B, D)`` to observe; None generates.
            num_rows: rows to generate where ``x_0`` is None.

        Returns:
            Tokens, ``(B, D)`` long.
        """
        process, grid = self.process, self.grid
        if x_0 is None:
            device = device_of(self.step)
            x = torch.full((num_rows, process.length), process.mask_id, device=device)
        else:
            x = process.check_tokens(x_0)
        num_steps = len(grid) - 1
        share = -process.schedule.alpha(grid).diff().to(x.device)
        shape = (len(x), process.length, num_steps)
        with pyro.plate("rows", len(x), dim=-1):
            law = dist.Categorical(probs=share.to(torch.get_default_dtype()).expand(shape))
            reveal = pyro.sample("reveal", law.to_event(1)) + 1
        for i in range(num_steps, 0, -1):
            if x_0 is not None:
                batch = process.step_batch(x, reveal, i, grid)
            else:
                t = grid[i].to(device=x.device, dtype=torch.get_default_dtype())
                batch = MaskedBatch(x, t.expand(len(x)), x == process.mask_id, reveal == i)
            with _Step(f"step_{i}", batch.target.any(-1)) as step:
                self.step(batch)
            if x_0 is None:
                if step.tokens is None:
                    raise ValueError("the step program has no site 'x_0' to generate tokens with")
                x = torch.where(batch.target, step.tokens, x)
        return x


def unroll(
    step: Callable[..., Any],
    process: MaskingProcess,
    num_steps: int | None = None,
    *,
    time_grid: Tensor | None = None,
) -> Chain:
    """The T-step chain of a step program, or of its guide, as one Pyro program ``chain(x_0)``.

    Args:
        step: a step program or a guide.
        process: its forward process.
        num_steps: ``T``.
        time_grid: a grid of your own, ``(T + 1,)``.

    Returns:
        A module; ``chain(x_0)`` scores rows, ``chain(num_rows=n)`` generates them.

    Example::

        pair = unroll(model, process, 3), unroll(guide, process, 3)
        pyro.infer.Trace_ELBO().loss(*pair, x_0)
    """
    return Chain(step, process, make_time_grid(num_steps, time_grid))
