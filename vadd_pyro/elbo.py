r"""The masked-diffusion ELBO: two objectives over one pair of step programs.

**(a) ``objective="delbo"``**, with every masked position a target, is the training objective of
VADD,

.. math::
    \mathrm{DELBO}(x_0) = E_{t, x_t}\; w(t)\; E_{r(z)} \Big[ \sum_{i\ \text{masked}} \log
    \mu_i(x_{0,i} \mid x_t, z, t)
    - \lambda \log \frac{r(z \mid x_0, x_t)}{p(z \mid x_t, t)} \Big].

It trains well, but **it is no lower bound on** ``log p(x_0)`` when ``z`` couples positions: for D
tied fair bits and a perfect model it gives ``-log 2 / D``, above the truth. Never report it as a
likelihood.

**(b) ``objective="chain"``**, with the positions ``S_i`` that step ``i`` of a T-step sampler
reveals as targets, is a bound on the law of that sampler (with ``lambda = 1``),

.. math::
    \log p_T(x_0) \ge \sum_{i=1}^T E_{x_{t_i}, S_i} E_{r(z)} \Big[ \sum_{j \in S_i} \log \mu_j -
    \log \frac{r(z)}{p(z)} \Big],

estimated by one uniformly drawn step per row, times ``T``. A guide trained by (a) alone has never
seen a target that is not all that is masked: train on (b) or refit the guide before reporting it.

In either, the inner term of a row may be replaced by a bound on its logarithm over several
particles, importance-weighted or Rényi's (:mod:`vadd_pyro.densities`), with doubly
reparameterised gradients (:mod:`vadd_pyro.estimators`), and its KL be given free bits
(:mod:`vadd_pyro.divergences`). What is reported comes from :func:`vadd_pyro.log_likelihood_bound`,
which knows none of these but the importance weights.

References:
    Xie et al. 2025, "Variational Autoencoding Discrete Diffusion" (arXiv 2505.17384), for (a);
    Chao et al. 2026 on why (a) is no bound; docs/likelihoods.md on (b).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.infer.util import is_validation_enabled
from torch import Tensor

from vadd_pyro.annealing import LinearAnnealing
from vadd_pyro.chains import check_chain
from vadd_pyro.densities import RowTerms, mean_terms, score
from vadd_pyro.emptiness import DrawLaw, KeptRows
from vadd_pyro.estimators import DoublyReparameterized, check_estimator
from vadd_pyro.process import MaskedBatch, MaskingProcess
from vadd_pyro.programs import (
    Program,
    check_least_times,
    check_store,
    is_local_parameter,
    modules_of,
    register_parameters,
)
from vadd_pyro.recorder import Recorder, asks_for_enumeration, run
from vadd_pyro.sites import PARTICLES, check_fit, check_pair, check_tokens_site, check_whole
from vadd_pyro.times import GridTimes, TimeDistribution, UniformTimes, check_least_time

__all__ = ["LinearAnnealing", "LossTerms", "MaskedDiffusionELBO"]

StepProgram = Callable[..., Any]


class LossTerms(NamedTuple):
    """Loss of one batch and its parts.

    Args:
        loss: differentiable scalar, summed over rows and row weights, nats.
        reconstruction: the part without latents, detached; ``loss = reconstruction + lambda *
            kl``, so what free bits add to the KL is in it.
        kl: the weighted KL, detached, before ``lambda`` and without free bits.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor


class MaskedDiffusionELBO(ELBO):
    """Negative ELBO of a step program and its guide, summed over rows, in nats.

    Use it under ``pyro.infer.SVI`` or, as a differentiable loss, ``elbo(model, guide)(x_0)``. Both
    take clean tokens ``(B, D)`` and draw the masks; given a :class:`MaskedBatch` instead they
    score it as it is. Further arguments go to the programs.

    Args:
        process: the forward process.
        objective: ``"delbo"`` (a) or ``"chain"`` (b), see the module's text.
        num_steps: ``T`` of the chain objective.
        time_grid: a grid of your own for it, ``(T + 1,)`` from 0 to 1.
        times: distribution of the times; by default uniform for (a), the steps of the grid for
            (b).
        kl_weight: ``lambda``, a number, or a function of the training iteration such as
            :class:`LinearAnnealing` and the others of :mod:`vadd_pyro.annealing`. The iteration is
            counted in ``iteration``: one more for each differentiated loss.
        num_particles: latent draws per row.
        importance_weighted: average particles inside the logarithm, per row (Burda et al. 2016).
        doubly_reparameterized: gradients of lower variance for the guide of that bound (Tucker et
            al. 2018), at the cost of a second run of the guide; it must be a module with
            reparameterised sites.
        renyi_alpha: average the powers ``w ** (1 - alpha)`` of the importance weights instead (Li
            and Turner 2016): 0 is the importance-weighted bound, towards 1 the ELBO; above 1 or
            below 0 it need not be a lower bound.
        free_bits: nats of each latent dimension that cost nothing (Kingma et al. 2016), a
            dimension being given up to that much before its KL counts; whole sites, or all that
            is estimated by draws, are compared with as much for each of their dimensions.
        drop_empty_rows: give the programs rows that have targets and few others, as many in all
            batches of a size: a third less work at ``D = 2``. For programs whose rows know neither
            of each other nor of their number (:mod:`vadd_pyro.emptiness`).
        least_time: the model's, if it does without its latent in steps from earlier times, and the
            guide is the prior there: all that is masked is scored, the same in expectation as what
            the step reveals.
        vectorize_particles: lay particles out along a plate of their own; False loops, for
            programs that do not broadcast.
        closed_form_kl: use closed-form KL divergences where that is exact: one particle, and a
            guide that draws its sites in the model's order.
        max_plate_nesting: how many batch dimensions the programs' plates use; 1 is the data plate
            alone.

    Raises:
        ValueError: for contradictory arguments, naming them.
    """

    def __init__(
        self,
        process: MaskingProcess,
        objective: str = "delbo",
        *,
        num_steps: int | None = None,
        time_grid: Tensor | None = None,
        times: TimeDistribution | None = None,
        kl_weight: float | Callable[[int], float] = 1.0,
        num_particles: int = 1,
        importance_weighted: bool = False,
        doubly_reparameterized: bool = False,
        renyi_alpha: float | None = None,
        free_bits: float = 0.0,
        drop_empty_rows: bool = False,
        least_time: float = 0.0,
        vectorize_particles: bool = True,
        closed_form_kl: bool = True,
        max_plate_nesting: int = 1,
    ) -> None:
        super().__init__(num_particles=num_particles, max_plate_nesting=max_plate_nesting)
        if objective not in ("delbo", "chain"):
            raise ValueError(f"objective must be 'delbo' or 'chain', got {objective!r}")
        for name, value in (
            ("num_particles", num_particles),
            ("max_plate_nesting", max_plate_nesting),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_estimator(
            num_particles=num_particles,
            vectorize_particles=vectorize_particles,
            importance_weighted=importance_weighted,
            doubly_reparameterized=doubly_reparameterized,
            renyi_alpha=renyi_alpha,
            free_bits=free_bits,
        )
        gridded = num_steps is not None or time_grid is not None
        if times is not None and gridded:
            raise ValueError("times and num_steps or time_grid say the same thing twice: give one")
        if objective == "delbo" and gridded:
            raise ValueError(
                "num_steps and time_grid belong to objective='chain'; for a DELBO on a grid pass "
                "times=GridTimes(...)"
            )
        if times is None:
            times = UniformTimes() if objective == "delbo" else GridTimes(num_steps, time_grid)
        if not isinstance(times, TimeDistribution):
            raise TypeError(f"times must be a TimeDistribution, got {times!r}")
        number = isinstance(kl_weight, int | float) and kl_weight >= 0
        if not number and not callable(kl_weight):
            raise ValueError(f"kl_weight must be a number >= 0 or a function, got {kl_weight!r}")
        self.process = process
        self.objective = objective
        self.times = times
        self.kl_weight = kl_weight
        self.importance_weighted = importance_weighted
        self.doubly_reparameterized = doubly_reparameterized
        self.renyi_alpha = renyi_alpha
        self.free_bits = free_bits
        self.least_time = check_least_time(least_time, times, free_bits)
        self.kept_rows = KeptRows(drop_empty_rows)
        self.vectorize_particles = vectorize_particles
        self.closed_form_kl = closed_form_kl
        self.row_plates = max_plate_nesting
        self.iteration = 0
        self._checked: tuple[Any, Any] | None = None
        self._known_guide: Any = None
        self._known_model: Any = None

    # ------------------------------------------------------------------ pieces

    def current_kl_weight(self) -> float:
        """``lambda`` at the present iteration."""
        return float(
            self.kl_weight(self.iteration) if callable(self.kl_weight) else self.kl_weight
        )

    def _kl_weight(self) -> Any:
        # As a tensor it is an input of a graph that is being traced, and has no value yet.
        return self.kl_weight if isinstance(self.kl_weight, Tensor) else self.current_kl_weight()

    def draw(self, x_0: Tensor, *, check: bool | None = None) -> MaskedBatch:
        """Draw times and masks for clean rows, with the row weights of the objective.

        Args:
            x_0: clean tokens, ``(B, D)``.
            check: look at the token values too; by default as Pyro's validation is set.
        """
        x_0 = self.process.check_tokens(
            x_0, values=is_validation_enabled() if check is None else check
        )
        return self.law.draw(x_0)

    @property
    def law(self) -> DrawLaw:
        """How it masks clean rows."""
        return DrawLaw(self.times, self.process, self.objective == "chain", self.least_time)

    def _masked(self, x_0: Tensor | MaskedBatch, further: Any) -> MaskedBatch:
        if isinstance(x_0, MaskedBatch):
            return x_0
        return self.kept_rows(self.draw(x_0), self.law, further)

    def score(
        self, model: StepProgram, guide: StepProgram, batch: MaskedBatch, *args: Any, **kwargs: Any
    ) -> RowTerms:
        """Per-row terms of a batch as it is, before row weights.

        See :class:`~vadd_pyro.densities.RowTerms`.
        """
        if batch.x_0 is None:
            raise ValueError(
                "batch.x_0 is None: a batch without data can be generated, not scored"
            )
        vectorized = self.num_particles > 1 and self.vectorize_particles
        num_runs = 1 if vectorized else self.num_particles
        twice = None
        if self.doubly_reparameterized and torch.is_grad_enabled():
            twice = DoublyReparameterized(guide)
        runs = [
            self.record(model, guide, batch, vectorized, args, kwargs, twice)
            for _ in range(num_runs)
        ]
        unknown = is_validation_enabled() and self._known_model is not model
        if unknown and check_chain(model, *runs[0], batch, args, kwargs):
            self._known_model = model
        active = batch.target.any(-1)
        options: dict[str, Any] = dict(
            active=active,
            weight=batch.weight,
            row_plates=self.row_plates,
            num_particles=self.num_particles,
            kl_weight=self._kl_weight(),
            closed_form_kl=self.closed_form_kl,
        )
        if len(runs) == 1:
            result = score(
                *runs[0],
                vectorized=vectorized,
                importance_weighted=self.importance_weighted,
                renyi_alpha=self.renyi_alpha,
                free_bits=self.free_bits,
                **options,
            )
            if twice is not None and result.log_weights is not None:
                twice.weigh(result.log_weights, options["kl_weight"])
            return result
        return mean_terms([score(*pair, **options) for pair in runs])

    def record(
        self,
        model: StepProgram,
        guide: StepProgram,
        batch: MaskedBatch,
        vectorized: bool = False,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        twice: DoublyReparameterized | None = None,
    ) -> tuple[Recorder, Recorder]:
        """Run the pair once on a batch, the model with the guide's values: what each did.

        For a doubly reparameterised gradient the guide runs twice; the second run is returned.
        """
        kwargs = {} if kwargs is None else kwargs
        first_dim = -1 - self.row_plates - int(vectorized)

        def particles() -> Any:
            if not vectorized:
                return None
            return pyro.plate(PARTICLES, self.num_particles, dim=-1 - self.row_plates)

        inferred = run(
            guide,
            Recorder(enumerate_sites=asks_for_enumeration, first_dim=first_dim),
            batch,
            *args,
            inside=particles(),
            **kwargs,
        )
        if twice is not None:
            unknown = self._known_guide is not guide
            second = twice.second_run(inferred, particles, self.row_plates, check=unknown)
            inferred = second(batch, *args, **kwargs)
            self._known_guide = guide
        replay = inferred.latent_values()
        fits = partial(check_fit, inferred) if is_validation_enabled() else None
        generated = run(
            model,
            Recorder(replay, lambda msg: True, inferred.next_dim, fits, by_position=True),
            batch,
            *args,
            inside=particles(),
            **kwargs,
        )
        check_pair(inferred, generated)
        check_tokens_site(generated, self.process.vocab_size)
        if self.kept_rows.drop:
            check_whole(inferred, generated)
        return inferred, generated

    def terms(
        self,
        model: StepProgram,
        guide: StepProgram,
        x_0: Tensor | MaskedBatch,
        *args: Any,
        **kwargs: Any,
    ) -> LossTerms:
        """Loss of a batch with its parts, all summed over rows: see :class:`LossTerms`."""
        batch = self._masked(x_0, args or kwargs)
        row = self.score(model, guide, batch, *args, **kwargs)
        loss = row.loss(batch.weight)
        total_kl = (row.kl if batch.weight is None else row.kl * batch.weight).sum()
        reconstruction = loss.detach() - self._kl_weight() * total_kl
        return LossTerms(loss, reconstruction, total_kl)

    # ------------------------------------------------------------ Pyro's names

    def loss(self, model: StepProgram, guide: StepProgram, *args: Any, **kwargs: Any) -> float:
        """The loss as a number, without gradients; what ``SVI.evaluate_loss`` calls."""
        with torch.no_grad():
            return float(self.terms(model, guide, *args, **kwargs).loss)

    def differentiable_loss(
        self,
        model: StepProgram,
        guide: StepProgram,
        x_0: Tensor | MaskedBatch,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The loss as a differentiable scalar, summed over rows.

        What ``elbo(model, guide)(x_0)`` returns.
        """
        if self._checked is None or self._checked[0] is not model or self._checked[1] is not guide:
            check_store(model, guide)
            check_least_times(self.least_time, model, guide)
            self._checked = (model, guide)
        batch = self._masked(x_0, args or kwargs)
        loss = self.score(model, guide, batch, *args, **kwargs).loss(batch.weight)
        if loss.requires_grad:
            self.iteration += 1
        return loss

    def loss_and_grads(
        self, model: StepProgram, guide: StepProgram, *args: Any, **kwargs: Any
    ) -> float:
        """The loss as a number, its gradient left in the parameters; what ``SVI.step`` calls."""
        with poutine.block(hide_fn=is_local_parameter):
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
        for module in (m for program in (model, guide) for m in modules_of(program)):
            if not isinstance(module, Program):  # which announces itself
                register_parameters(module)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return float(loss.detach())

    def _get_trace(self, model: StepProgram, guide: StepProgram, args: Any, kwargs: Any) -> Any:
        """A pair of ordinary Pyro traces, as ``pyro.infer.ELBO`` asks of its subclasses."""
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs)
