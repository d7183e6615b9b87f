r"""A guide told relative to a prior of normals: what is inferred is what the targets add.

With the prior's :math:`p(z \mid x_t, t) = N(m, s^2)` in every coordinate, it is the prior times a
normal factor with as much power as there are targets among the masked positions,

.. math::
    r(z \mid x_0, x_t) \propto p(z \mid x_t, t)\; \exp\Big(\eta\, u - \frac{\tau}{2} u^2
    \Big)^{\omega}, \quad u = \frac{z - m}{s}, \quad \omega = \frac{|S|}{|M|} , \qquad
    r = N\Big(m + s\, \frac{\omega \eta}{1 + \omega \tau}, \frac{s^2}{1 + \omega \tau}\Big),

where a recognition network reads :math:`\tau \ge 0` and ``b``, and :math:`\eta = b (1 + \tau)`,
so that ``b`` is the shift of the mean in the prior's units where all that is masked is a target. A
likelihood of part of the positions has about that part of the evidence, so a step that reveals
little hardly moves the prior, whatever the network says. A guide that writes mean and scale by
itself must learn that for every state, and what it misses costs a KL at each of T steps.

A mixture of normals times such a factor is a mixture again, whose weights say which components
agree with it; ``m`` and ``s`` are then mean and standard deviation of the whole prior. So the
guide has as many modes as its prior where the targets do not decide between them, and is the prior
where there are none.

References:
    Sønderby et al. 2016, "Ladder Variational Autoencoders" (arXiv 1602.02282), for the product of
    prior and factor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.nn.functional import softplus

from vadd_pyro.distributions import DiagonalNormal, NormalMixture
from vadd_pyro.guides.features import Features, Head
from vadd_pyro.process import MaskedBatch, check_size, check_time
from vadd_pyro.programs import Program, check_callable

__all__ = ["RelativeNormal"]

_START = 2.0  # of tau before softplus: the decoder must find something in z from the start


class RelativeNormal(Program):
    """Samples ``"z"`` from a diagonal normal told relative to that of the prior, or from a mixture
    of them.

    Args:
        features: recognition features, such as :class:`vadd_pyro.nn.MLPFeatures`.
        latent_dim: size ``d`` of ``z``.
        prior: the model's prior, which gives a :class:`~vadd_pyro.distributions.DiagonalNormal`,
            such as :class:`vadd_pyro.models.StandardNormal` or
            :class:`vadd_pyro.models.ConditionalNormal`, or a
            :class:`~vadd_pyro.distributions.NormalMixture`, such as
            :class:`vadd_pyro.models.MixtureOfNormals`. Its parameters are shared with the model
            and trained by both; :func:`vadd_pyro.fit_guide` takes ``copy.deepcopy(guide)``, which
            has its own.
        least_time: the model's, if it does without the latent in steps from earlier times: there
            the guide is the prior.
    """

    def __init__(
        self,
        features: Features,
        latent_dim: int,
        prior: Callable[[MaskedBatch], Any],
        least_time: float = 0.0,
    ) -> None:
        super().__init__()
        check_size("latent_dim", latent_dim)
        check_callable("prior", prior)
        self.latent_dim = latent_dim
        self.prior = prior
        self.least_time = check_time("least_time", least_time)
        self.head = Head(features, 2 * latent_dim, gain=2.0)
        with torch.no_grad():
            self.head.linear.bias[latent_dim:] = _START

    def forward(self, batch: MaskedBatch) -> Tensor:
        shift, raw = self.head(batch).chunk(2, -1)
        tau = softplus(raw)
        masked = batch.masked.sum(-1, keepdim=True).clamp_min(1)
        share = batch.target.sum(-1, keepdim=True) / masked
        if self.least_time > 0:
            share = share * (batch.t >= self.least_time).unsqueeze(-1)
        with pyro.plate("data", len(batch), dim=-1):
            law = _times_factor(self.prior(batch), share * shift * (1 + tau), share * tau)
            return pyro.sample("z", law)


def _times_factor(law: Any, slope: Tensor, curvature: Tensor) -> DiagonalNormal | NormalMixture:
    r"""The prior times :math:`\exp(\text{slope}\, u - \frac12 \text{curvature}\, u^2)`, ``u``
    the latent in the prior's units.
    """
    if isinstance(law, DiagonalNormal):
        precision = 1 + curvature
        z_loc = law.loc + law.scale * (slope / precision)
        return DiagonalNormal(z_loc, law.scale * precision.rsqrt())
    if isinstance(law, NormalMixture):
        variance = law.variance
        curvature = curvature / variance
        return law.tilted(slope * variance.rsqrt() + curvature * law.mean, curvature)
    raise TypeError(
        "RelativeNormal needs a prior that returns a DiagonalNormal or a NormalMixture, got "
        f"{type(law).__name__}"
    )
