r"""Gradients of the bounds where the plain ones are noisy: doubly reparameterised ones, and score
functions with baselines.

**Doubly reparameterised gradients.** With importance weights ``w_p`` of ``P`` particles, the plain
gradient of :math:`\log \frac1P \sum_p w_p` for a guide's parameters has a signal-to-noise ratio
that *falls* with ``P``. Reparameterising its score-function part once more gives, with normalised
weights :math:`\tilde w_p` and the guide's parameters held fixed inside ``log w``,

.. math::
    \nabla_\phi = E \sum_p \tilde w_p^2 \, \frac{\partial \log w_p}{\partial z_p} \frac{d z_p}{d
    \phi}, \qquad \text{and with a KL weight } \lambda \quad \sum_p \big[(1 - \lambda) \tilde w_p
    + \lambda \tilde w_p^2\big] \frac{\partial \log w_p}{\partial z_p} \frac{d z_p}{d \phi},

unbiased and of lower variance; the model's gradient is the plain one. Here it is had by ordinary
backward. What the model sees is a copy ``y`` of each draw ``z``, whose gradient (which has one
:math:`\tilde w_p` from the logarithm) is multiplied by the other factor on its way back, and ``log
r`` is computed by running the guide again on ``y`` with its parameters detached.

**Score functions.** A draw that is not reparameterised contributes :math:`(S - b) \nabla_\phi \log
r(z)`, ``S`` being the objective of its row. Any baseline ``b`` that does not depend on the draw
leaves the expectation as it is: one that the site's ``infer={"baseline": ...}`` names, as in
``pyro.infer.TraceGraph_ELBO``, or the mean of the other particles.

References:
    Tucker et al. 2018, "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives"
    (arXiv 1810.04152); Rainforth et al. 2018 (arXiv 1802.04537); Mnih and Gregor 2014 (arXiv
    1402.0030) for learned baselines; Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline
    for Free!".
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from vadd_pyro.checkpoints import random_state, restore_random_state
from vadd_pyro.recorder import Recorder, Site, run
from vadd_pyro.sites import Layout

__all__ = ["DoublyReparameterized", "check_estimator", "score_function"]


def check_estimator(
    *,
    num_particles: int,
    vectorize_particles: bool,
    importance_weighted: bool,
    doubly_reparameterized: bool,
    renyi_alpha: float | None,
    free_bits: float,
) -> None:
    """Check that the options of a bound and of its gradient go together.

    Raises:
        ValueError: naming the option, its value and what was expected.
        TypeError: for values that are no numbers.
    """
    for name, value in (("renyi_alpha", renyi_alpha), ("free_bits", free_bits)):
        if value is None and name == "renyi_alpha":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value!r}")
    several = num_particles > 1 and vectorize_particles
    if importance_weighted and num_particles > 1 and not vectorize_particles:
        raise ValueError(
            "importance_weighted needs vectorize_particles=True: particles of a row meet "
            "inside a logarithm"
        )
    if renyi_alpha is not None:
        if abs(renyi_alpha - 1) < 5e-5:
            raise ValueError(
                f"renyi_alpha is {renyi_alpha!r}: at 1 the bound is the ELBO itself, and single "
                "precision does not suffice within 5e-5 of it; leave renyi_alpha out"
            )
        if importance_weighted or doubly_reparameterized:
            raise ValueError(
                "renyi_alpha and importance_weighted or doubly_reparameterized are different "
                "objectives: give one (renyi_alpha=0 is the importance-weighted bound)"
            )
        if not several:
            raise ValueError(
                f"renyi_alpha needs several particles of a row side by side, num_particles >= 2 "
                f"with vectorize_particles=True, got num_particles={num_particles} and "
                f"vectorize_particles={vectorize_particles}"
            )
    if doubly_reparameterized and not (importance_weighted and num_particles > 1):
        raise ValueError(
            "doubly_reparameterized is a gradient of the importance-weighted bound: expected "
            f"importance_weighted=True and num_particles >= 2, got {importance_weighted} and "
            f"{num_particles}"
        )
    if free_bits < 0:
        raise ValueError(f"free_bits must be a number of nats >= 0, got {free_bits!r}")
    if free_bits and (importance_weighted or renyi_alpha is not None):
        raise ValueError(
            f"free_bits = {free_bits:g} bounds a KL from below, but inside the logarithm of "
            "importance_weighted and renyi_alpha there is no KL: give one of them"
        )
    if free_bits and num_particles > 1 and not vectorize_particles:
        raise ValueError(
            "free_bits with several particles needs vectorize_particles=True: the threshold is "
            "compared with their mean"
        )


# ------------------------------------------------- doubly reparameterised draws


class _Constant(Messenger):
    """Detaches the parameters that a program gets from Pyro's store."""

    def _pyro_post_param(self, msg: Any) -> None:
        msg["value"] = msg["value"].detach()


class _Scored(Site):
    """A site whose log-density was computed where it was sampled: some laws, such as flows, look
    at their parameters only then.
    """

    __slots__ = ("_log_prob",)

    def __init__(self, msg: dict[str, Any]) -> None:
        super().__init__(msg, None)
        self._log_prob = super().log_prob()

    def log_prob(self) -> Tensor:
        return self._log_prob


class _Repeated(Recorder):
    """Replays values, yet draws as the first run did, so that dropout meets the same numbers."""

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            fn = msg["fn"]
            with torch.no_grad():
                (fn.rsample if getattr(fn, "has_rsample", False) else fn.sample)()
        super()._process_message(msg)

    def _postprocess_message(self, msg: Any) -> None:
        super()._postprocess_message(msg)
        if msg["type"] == "sample" and msg["name"] in self.sites:
            self.sites[msg["name"]] = _Scored(msg)


@contextmanager
def _again(state: dict[str, Any]) -> Iterator[None]:
    """Repeat the random numbers from ``state`` on, and return to where things stand now."""
    present = random_state()
    restore_random_state(state)
    try:
        yield
    finally:
        restore_random_state(present)


class DoublyReparameterized:
    """One use of the estimator: passes a guide's draws on, and multiplies their gradients.

    Make it before the guide runs, call :meth:`second_run` after, and :meth:`weigh` before
    backward.

    Args:
        guide: the guide, a module whose parameters are all its own.

    Raises:
        TypeError: for a guide that is no module.
    """

    def __init__(self, guide: Any) -> None:
        if not isinstance(guide, nn.Module):
            raise TypeError(
                "doubly_reparameterized runs the guide with its parameters held fixed and needs a "
                f"torch module, got {guide!r}: write the guide as a Program, or pass "
                "doubly_reparameterized=False"
            )
        self.guide = guide
        self._state = random_state()
        self._multiplier: Tensor | None = None

    def second_run(
        self, first: Recorder, particles: Callable[[], Any], row_plates: int, check: bool
    ) -> Callable[..., Recorder]:
        """A function ``(*args, **kwargs) -> Recorder`` that runs the guide again, its parameters
        fixed, on copies of the draws of its first run.

        Args:
            first: the guide's first run.
            particles: makes the plate of particles.
            row_plates: how many batch dimensions belong to the programs' plates.
            check: run it once more with the draws fixed as well, to see that nothing is left
                that would carry a gradient.
        """
        for site in first.sites.values():
            _check_site(site)
        fixed: dict[str, Tensor] = {n: p.detach() for n, p in self.guide.named_parameters()}
        fixed |= {n: b.detach().clone() for n, b in self.guide.named_buffers()}
        values = first.latent_values()
        copies = {**values}
        for name, site in first.sites.items():
            copies[name] = self._copy(values[name], site, row_plates)

        def repeat(replay: Mapping[str, Any], args: Any, kwargs: Any) -> Recorder:
            def program(*args: Any, **kwargs: Any) -> Any:
                with _Constant():
                    return torch.func.functional_call(self.guide, fixed, args, kwargs)

            recorder = _Repeated(replay, first_dim=first.next_dim)
            with _again(self._state), warnings.catch_warnings():
                # A PyroModule announces its parameters, and wonders why they are fixed.
                warnings.filterwarnings("ignore", message=".*not registered in the param store")
                return run(program, recorder, *args, inside=particles(), **kwargs)

        def second(*args: Any, **kwargs: Any) -> Recorder:
            if check:
                constant = {name: value.detach() for name, value in values.items()}
                for site in repeat(constant, args, kwargs).sites.values():
                    if site.log_prob().requires_grad:
                        raise ValueError(
                            f"the density of the guide's site {site.name!r} depends on "
                            "parameters that are not the guide's own, such as those of a network "
                            "in a list or in a closure: register it as a submodule, or pass "
                            "doubly_reparameterized=False"
                        )
            return repeat(copies, args, kwargs)

        return second

    def _copy(self, value: Tensor, site: Site, row_plates: int) -> Tensor:
        if not value.requires_grad:
            return value
        copy = value.view_as(value)
        inner = (1,) * (row_plates - 1)
        event = (1,) * len(site.fn.event_shape)

        def multiplied(gradient: Tensor) -> Tensor:
            if self._multiplier is None:
                raise RuntimeError("backward before the importance weights were known")
            num_particles, num_rows = self._multiplier.shape
            return gradient * self._multiplier.reshape(num_particles, *inner, num_rows, *event)

        copy.register_hook(multiplied)
        return copy

    def weigh(self, log_weights: Tensor, kl_weight: float) -> None:
        """Take the importance weights ``(P, B)`` and ``lambda``."""
        share = log_weights.softmax(0)
        self._multiplier = (
            share if kl_weight == 1 else torch.lerp(torch.ones_like(share), share, kl_weight)
        )


def _check_site(site: Site) -> None:
    """Refuse what has no density of its own that could be reparameterised twice."""
    reason = None
    bases = (site.fn, getattr(site.fn, "base_dist", None))
    if site.observed:
        reason = "is a factor or observed"
    elif site.enum_dim is not None:
        reason = "is enumerated"
    elif not getattr(site.fn, "has_rsample", False):
        reason = f"is drawn from {type(site.fn).__name__}, which is not reparameterised"
    elif getattr(site.fn.support, "is_discrete", False):
        reason = f"is discrete ({type(site.fn).__name__} has relaxed gradients only)"
    elif site.auxiliary or any(isinstance(base, Delta) for base in bases):
        reason = "is part of a change of variables (auxiliary, or a Delta)"
    elif site.mask is not None and site.mask is not True:
        reason = "is masked"
    if reason is not None:
        raise ValueError(
            f"doubly_reparameterized needs sites with reparameterised draws and a density of "
            f"their own, but the guide's site {site.name!r} {reason}: pass "
            "doubly_reparameterized=False"
        )


# ----------------------------------------------------------- score functions


def score_function(
    drawn: list[tuple[Site, Tensor]],
    drawn_shared: list[Tensor],
    signal: Tensor,
    row: Tensor,
    shared_total: Tensor | None,
    *,
    active: Tensor,
    weight: Tensor | None,
    layout: Layout,
    inside: bool,
    num_particles: int,
) -> Tensor | None:
    """Score-function part of the gradient: ``sum of (signal - baseline).detach() * log r``, made
    to have the value zero.

    Args:
        drawn: sites of rows whose draws are not reparameterised, with their log-densities.
        drawn_shared: log-densities of those outside the data plate.
        signal: the objective of each row, and of each particle where they are averaged outside
            the logarithm.
        row: the objective of each row, ``(B,)``.
        shared_total: what belongs to no row, a scalar or None.
        active: rows that count, ``(B,)`` bool.
        weight: row weights, ``(B,)`` or None.
        layout: dimensions of the log-densities.
        inside: whether particles meet inside a logarithm.
        num_particles: how many particles a row has.

    Returns:
        A scalar, or None if there is nothing to differentiate.
    """
    signal = signal.detach()
    weights = active.to(row.dtype) if weight is None else active * weight
    share = 1.0 if inside or layout.particle_dim is None else 1.0 / num_particles
    parts = []
    if drawn:
        plain = [log_r for site, log_r in drawn if not _baseline_options(site)]
        if plain:
            others = 0.0 if inside else _mean_of_others(signal, layout)
            parts.append(((signal - others) * layout.sum(plain) * share * weights).sum())
        for site, log_r in drawn:
            options = _baseline_options(site)
            if options:
                baseline = _baseline(site, options, signal)
                left = signal - baseline.detach()
                parts.append((left * log_r * share * weights).sum())
                parts.append(((signal - baseline).square() * active).sum() * -share)
        if shared_total is not None:
            # It depends on every row's draw, and is the mean over particles already.
            log_r = layout.sum([log_r for _, log_r in drawn])
            parts.append(shared_total.detach() * log_r.sum())
    if drawn_shared:
        total_signal = (row * weights).sum().detach()
        if shared_total is not None:
            total_signal = total_signal + shared_total.detach()
        parts.append(total_signal * torch.stack([v.sum() for v in drawn_shared]).sum())
    total = torch.stack(parts).sum()
    return total - total.detach() if total.requires_grad else None


def _mean_of_others(signal: Tensor, layout: Layout) -> Tensor | float:
    """For each particle the mean signal of the row's others; zero if it has none."""
    dim = layout.particle_dim
    if dim is None or signal.dim() < -dim or signal.shape[dim] < 2:
        return 0.0
    return (signal.sum(dim, keepdim=True) - signal) / (signal.shape[dim] - 1)


def _baseline_options(site: Site) -> dict[str, Any]:
    return (site.infer or {}).get("baseline") or {}


def _baseline(site: Site, options: Mapping[str, Any], signal: Tensor) -> Tensor:
    """The baseline that a site names, differentiable for its own parameters."""
    known = {"nn_baseline", "nn_baseline_input", "baseline_value"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f"site {site.name!r} has baseline options {unknown}: expected 'nn_baseline' with "
            "'nn_baseline_input', or 'baseline_value' (a decaying average belongs to rows that "
            "stay the same, and those of a batch do not)"
        )
    network, value = options.get("nn_baseline"), options.get("baseline_value")
    if (network is None) == (value is None):
        raise ValueError(
            f"site {site.name!r} must name one baseline, 'nn_baseline' or 'baseline_value', got "
            f"{sorted(options)}"
        )
    if network is not None:
        if not isinstance(options.get("nn_baseline_input"), Tensor):
            raise ValueError(f"site {site.name!r} has an nn_baseline without nn_baseline_input")
        value = network(options["nn_baseline_input"].detach())
    baseline = torch.as_tensor(value, dtype=signal.dtype, device=signal.device)
    # From the right, every dimension of the signal's size; the last one must not be spread out.
    fits = baseline.dim() <= signal.dim() and all(
        own == size or (own == 1 and position)
        for position, (own, size) in enumerate(
            zip(reversed(baseline.shape), reversed(signal.shape), strict=False)
        )
    )
    if not fits:
        raise ValueError(
            f"the baseline of site {site.name!r} must have one entry a row, shape "
            f"({signal.shape[-1]},), or broadcast to {tuple(signal.shape)}, got "
            f"{tuple(baseline.shape)}"
        )
    return baseline
