r"""How far a guide's bound is from the truth, and why: approximation gap and amortisation gap.

With :math:`\mathcal L_b(r) = E_r[\log p(x_S, z \mid x_t) - \log r(z)]` of row ``b`` and
:math:`r^*` the best member of the guide's family for that row alone,

.. math::
    \log p(x_S \mid x_t) - \mathcal L(r) =
    \underbrace{\log p(x_S \mid x_t) - \mathcal L(r^*)}_{\text{approximation}} +
    \underbrace{\mathcal L(r^*) - \mathcal L(r)}_{\text{amortisation}} .

The first asks for a richer family, the second for a larger or longer trained network.
:math:`r^*` is a copy of the guide whose whole network is trained on the one row. The evidence
comes from bridge sampling between ``N_r`` draws of :math:`r^*` and ``N_p`` of the reference
posterior,

.. math::
    \hat p = \frac{\frac1{N_r} \sum_{z \sim r^*} h(z)\, p(x_S, z)}
    {\frac1{N_p} \sum_{z \sim p} h(z)\, r^*(z)}, \qquad
    h(z) = \frac{1}{N_p\, p(x_S, z) / \hat p + N_r\, r^*(z)}

iterated, the optimal bridge, with correlated draws counted by their effective number.

References:
    Cremer et al. 2018, "Inference Suboptimality in Variational Autoencoders" (arXiv 1801.03558);
    Meng and Wong 1996, "Simulating Ratios of Normalizing Constants via a Simple Identity";
    Frühwirth-Schnatter 2004 for the standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vadd_pyro.inspection.draws import posterior_draws
from vadd_pyro.inspection.reference import (
    ReferencePosterior,
    effective_number,
    reference_posterior,
)
from vadd_pyro.inspection.refinement import refine_guide
from vadd_pyro.inspection.scoring import (
    check_data,
    guide_log_density,
    kept,
    model_log_density,
    particles,
)
from vadd_pyro.process import MaskedBatch, check_size
from vadd_pyro.programs import evaluation
from vadd_pyro.recorder import Recorder, run
from vadd_pyro.sampling import seeded

__all__ = ["InferenceGaps", "inference_gaps", "refine_guide"]

_BRIDGE_STEPS = 200


class InferenceGaps(NamedTuple):
    """What a guide loses on each row, in nats, with standard errors over draws; each ``(B,)``.

    Args:
        log_evidence: ``log p(x_S | x_t)``.
        log_evidence_stderr: its error; zero where latents were enumerated.
        elbo: the bound of the guide as it is.
        elbo_stderr: its error.
        refined_elbo: the bound of the guide refined for that row alone.
        refined_elbo_stderr: its error.
        amortisation_stderr: error of the difference of the two bounds, whose draws share their
            random numbers.
        trained: whether the guide had anything to train; if not, both bounds are of the guide as
            it is, and their gap cannot be split.
    """

    log_evidence: Tensor
    log_evidence_stderr: Tensor
    elbo: Tensor
    elbo_stderr: Tensor
    refined_elbo: Tensor
    refined_elbo_stderr: Tensor
    amortisation_stderr: Tensor
    trained: bool

    @property
    def approximation(self) -> Tensor:
        """What the best member of the family loses, ``(B,)`` nats."""
        return self.log_evidence - self.refined_elbo

    @property
    def approximation_stderr(self) -> Tensor:
        """Its standard error, ``(B,)``."""
        return (self.log_evidence_stderr.square() + self.refined_elbo_stderr.square()).sqrt()

    @property
    def amortisation(self) -> Tensor:
        """What the network loses against the best member for each row, ``(B,)`` nats."""
        return self.refined_elbo - self.elbo


def inference_gaps(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: MaskedBatch,
    *,
    reference: ReferencePosterior | None = None,
    num_draws: int = 2000,
    num_iterations: int = 250,
    learning_rate: float = 0.01,
    seed: int | None = None,
    max_plate_nesting: int = 1,
    args: tuple[Any, ...] = (),
) -> InferenceGaps:
    """Approximation and amortisation gap of a guide on chosen rows.

    A refined guide is the best of its family as far as training finds it: what it misses counts
    as approximation.

    Args:
        model, guide: a step program and its guide, run in evaluation mode and left as they are.
        batch: rows with data, each with a target; dozens rather than thousands.
        reference: draws from the posterior of these rows, from :func:`reference_posterior`; None
            draws them.
        num_draws: draws of the guide for each bound, at least 2.
        num_iterations, learning_rate: of the refinement, as in :func:`refine_guide`.
        seed: seed of this call, which leaves torch's random state as it was; None draws on it.
        max_plate_nesting: depth of the plates of the programs.
        args: further arguments of the programs, the same for all rows.

    Returns:
        :class:`InferenceGaps`. Where a guide's density cannot be had at a given value (one that
        uses auxiliary sites) the evidence is the refined guide's importance-weighted estimate, in
        expectation below the truth.

    Raises:
        ValueError: for a batch without data or with rows without a target, a pair that does not
        fit, and a reference for other rows.
    """
    check_size("num_draws", num_draws, least=2)
    check_data(batch)
    if reference is not None:
        _check_reference(reference, batch)
    options: dict[str, Any] = {"max_plate_nesting": max_plate_nesting, "args": args}
    with seeded(seed), evaluation(model, guide):
        seeds = torch.randint(2**31, (len(batch),)).tolist()
        has_density = _has_density(guide, batch, max_plate_nesting, args)
        if reference is None and has_density:
            reference = reference_posterior(model, batch, seed=seeds[0], **options)
        columns = []
        trained = False
        for b, own_seed in enumerate(seeds):
            row = batch[b : b + 1]
            (refined,) = refine_guide(
                model,
                guide,
                row,
                num_iterations=num_iterations,
                learning_rate=learning_rate,
                seed=own_seed,
                **options,
            )
            # Draws other than those by which the refined guide was chosen.
            before, after = (
                posterior_draws(model, r, row, num_draws, seed=own_seed + 1, **options).log_weights
                for r in (guide, refined)
            )
            assert before is not None
            assert after is not None
            before, after = before[:, 0].double(), after[:, 0].double()
            if reference is not None and reference.draws.exact:
                assert reference.draws.log_weights is not None
                value = reference.draws.log_weights[:, b].double().mean()
                log_p = value, torch.zeros_like(value)
            elif reference is None or not has_density:
                log_p = _importance(after)
            else:
                log_ratios = _log_ratios(
                    model, refined, row, reference, b, num_draws, own_seed + 2, options
                )
                effective = float(reference.effective_size[b])
                log_p = _bridge(*log_ratios, effective, reference.num_chains)
            trained = trained or refined is not guide
            columns.append(
                torch.stack([*log_p, *_mean(before), *_mean(after), _mean(after - before)[1]])
            )
    values = torch.stack(columns, 1).to(torch.get_default_dtype())
    evidence, evidence_error, elbo, elbo_error, refined_elbo, refined_error, error = values
    return InferenceGaps(
        evidence, evidence_error, elbo, elbo_error, refined_elbo, refined_error, error, trained
    )


def _check_reference(reference: ReferencePosterior, batch: MaskedBatch) -> None:
    rows = reference.draws.batch
    same = rows.x_0 is not None and batch.x_0 is not None and len(rows) == len(batch)
    for name in ("x_0", "x_t", "target"):
        same = same and torch.equal(getattr(rows, name), getattr(batch, name))
    if not same:
        raise ValueError(
            f"reference holds draws for other rows ({len(rows)} of them) than the batch "
            f"({len(batch)}): expected reference_posterior(model, batch)"
        )


def _has_density(
    guide: Callable[..., Any], batch: MaskedBatch, row_plates: int, args: tuple[Any, ...]
) -> bool:
    """Whether a guide's density can be had at any value."""
    sites = run(guide, Recorder(first_dim=-1 - row_plates), batch[:1], *args).sites.values()
    return not any(site.auxiliary or site.observed for site in sites)


def _mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of draws, and its standard error."""
    return values.mean(), values.std() / math.sqrt(len(values))


# ---------------------------------------------------------------------------- evidence


def _importance(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of the mean weight, and its standard error."""
    value = log_weights.logsumexp(0) - math.log(len(log_weights))
    return value, _mean((log_weights - value).exp())[1]


def _log_ratios(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    row: MaskedBatch,
    reference: ReferencePosterior,
    index: int,
    num_draws: int,
    seed: int,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """``log p(x_S, z) - log r(z)`` at draws of the guide and at those of the reference."""
    row_plates, args = options["max_plate_nesting"], options["args"]
    # A guide may draw on the way to its law: both passes get the same numbers, so the same law.
    with seeded(seed):
        inside = particles(num_draws, row_plates)
        sites = run(guide, Recorder(first_dim=-2 - row_plates), row, *args, inside=inside).sites
    values = {
        name: torch.cat([kept(site, num_draws, 1), reference.draws.sites[name][:, [index]]])
        for name, site in sites.items()
    }
    with seeded(seed):
        log_r = guide_log_density(guide, row, values, **options)
    ratio = (model_log_density(model, row, values, **options) - log_r)[:, 0].double()
    return ratio[:num_draws], ratio[num_draws:]


def _bridge(
    guided: Tensor, referred: Tensor, effective: float, num_chains: int
) -> tuple[Tensor, Tensor]:
    """Logarithm of the evidence by the optimal bridge, and its standard error.

    Args:
        guided: log-ratios at draws of the guide, ``(N_r,)``.
        referred: log-ratios at draws of the posterior, ``(N_p,)``, chain by chain.
        effective: effective number of the latter.
        num_chains: chains among them.
    """
    share = effective / (effective + len(guided))
    log_p, log_r = math.log(share), math.log1p(-share)

    def parts(value: Tensor) -> tuple[Tensor, Tensor]:
        """``p / (s_p p + s_r r)`` at draws of the guide, ``r / (s_p p + s_r r)`` at the others;
        logarithms.
        """
        at_guided, at_referred = guided - value, referred - value
        rest = torch.full_like(value, log_r)
        return (
            at_guided - torch.logaddexp(log_p + at_guided, rest),
            -torch.logaddexp(log_p + at_referred, rest),
        )

    value = guided.logsumexp(0) - math.log(len(guided))
    for _ in range(_BRIDGE_STEPS):
        upper, lower = parts(value)
        step = (upper.logsumexp(0) - math.log(len(upper))) - (
            lower.logsumexp(0) - math.log(len(lower))
        )
        value = value + step
        if abs(float(step)) < 1e-9:
            break
    upper, lower = (part.exp() for part in parts(value))
    size = effective_number(lower.reshape(num_chains, -1))
    variance = upper.var() / upper.mean().square() / len(upper)
    variance = variance + lower.var() / lower.mean().square() / size
    return value, variance.sqrt()
