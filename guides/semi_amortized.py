r"""Semi-amortised guide: a few gradient steps from where the recognition network points.

.. math::
    \phi_0 = \mathrm{encoder}(x_0, x_t), \qquad \phi_{k+1} = \phi_k + \eta\,
    \frac{\nabla_\phi \mathcal{L}_b(\phi_k)}{\max(1, \|\nabla_\phi \mathcal{L}_b(\phi_k)\|)},

row by row, with :math:`\mathcal{L}_b` the objective of row ``b``. What amortisation loses on
single rows is won back at the price of ``num_steps`` passes of the model. Steps are constants to
the training of the encoder, whose gradient passes straight through them.

References:
    Kim et al. 2018 (arXiv 1802.02550); Marino et al. 2018 (arXiv 1807.09356).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor
from torch.nn.functional import softplus

from vadd_pyro.distributions import DiagonalNormal
from vadd_pyro.process import MaskedBatch, check_size
from vadd_pyro.programs import Program, check_callable

__all__ = ["SemiAmortizedNormal"]


class SemiAmortizedNormal(Program):
    """Samples ``"z"`` from a diagonal normal refined for each row.

    Args:
        encoder: ``encoder(batch) -> (z_loc, z_scale)``, the start, such as
            :class:`vadd_pyro.nn.MLPEncoder`.
        model: the model that the guide belongs to. It is called, not owned: its parameters are
            trained as the model's alone.
        elbo: the objective whose rows are climbed, a :class:`vadd_pyro.MaskedDiffusionELBO`.
        num_steps: gradient steps; 0 is :class:`AmortizedNormal`.
        step_size: longest step ``eta`` of a row.
    """

    def __init__(
        self,
        encoder: Callable[[MaskedBatch], tuple[Tensor, Tensor]],
        model: Callable[..., Any],
        elbo: Any,
        num_steps: int = 4,
        step_size: float = 0.2,
    ) -> None:
        super().__init__()
        check_callable("encoder", encoder)
        check_callable("model", model)
        check_size("num_steps", num_steps, least=0)
        if not hasattr(elbo, "score"):
            raise TypeError(f"elbo must be a MaskedDiffusionELBO, got {elbo!r}")
        if getattr(elbo, "num_particles", 1) > 1:
            raise ValueError(
                "elbo must have one particle, for the steps of the guide, got num_particles = "
                f"{elbo.num_particles}; the elbo that trains may have more"
            )
        if not step_size > 0:
            raise ValueError(f"step_size must be positive, got {step_size!r}")
        self.encoder = encoder
        self.num_steps = num_steps
        self.step_size = float(step_size)
        self.elbo = elbo
        # Kept from torch's eyes: the model's parameters are not the guide's.
        self.__dict__["model"] = model

    def __deepcopy__(self, memo: dict[int, Any]) -> SemiAmortizedNormal:
        """A guide of its own for the same model; copied together with it, for the copy."""
        model, elbo = self.__dict__["model"], self.elbo
        model, elbo = memo.get(id(model), model), memo.get(id(elbo), elbo)
        encoder = copy.deepcopy(self.encoder, memo)
        twin = SemiAmortizedNormal(encoder, model, elbo, self.num_steps, self.step_size)
        return twin.train(self.training)

    def refined(self, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        """``(z_loc, z_scale)`` after the steps, each ``(B, d)``."""
        z_loc, z_scale = self.encoder(batch)
        start = torch.cat([z_loc, torch.log(torch.expm1(z_scale))], -1)
        phi = start.detach()
        for _ in range(self.num_steps):
            phi = self._step(phi, batch)
        z_loc, z_raw = (start + (phi - start).detach()).chunk(2, -1)
        return z_loc, softplus(z_raw)

    def _step(self, phi: Tensor, batch: MaskedBatch) -> Tensor:
        phi = phi.detach().requires_grad_()

        def at_phi(batch: MaskedBatch) -> None:
            z_loc, z_raw = phi.chunk(2, -1)
            with pyro.plate("data", len(batch), dim=-1):
                pyro.sample("z", DiagonalNormal(z_loc, softplus(z_raw)))

        # What happens here is this guide's own affair: handlers outside must not see it.
        with torch.enable_grad(), poutine.block():
            rows = self.elbo.score(self.__dict__["model"], at_phi, batch).rows
            (gradient,) = torch.autograd.grad(rows.sum(), phi)
        length = gradient.norm(dim=-1, keepdim=True).clamp_min(1.0)
        return (phi + self.step_size * gradient / length).detach()

    def forward(self, batch: MaskedBatch) -> Tensor:
        z_loc, z_scale = self.refined(batch)
        with pyro.plate("data", len(batch), dim=-1):
            return pyro.sample("z", DiagonalNormal(z_loc, z_scale))
