r"""What a pair of programs says about some rows, as ArviZ data.

Of each row come draws from the guide with importance weights :math:`\log w_s = \log p(x_S, z_s
\mid x_t) - \log r(z_s \mid x_0, x_t)`, draws from the prior, completions, and per row

.. math::
    \mathrm{KL}[r \| p] \approx \frac1S \sum_s \log \frac{r(z_s \mid x_0, x_t)}{p(z_s \mid x_t)}
    = \frac1S \sum_s \big[ \log p(x_S \mid x_t, z_s) - \log w_s \big]

and Pareto k of the weights, which is to be trusted where the guide is: below .5 the weights have a
variance, and importance sampling corrects what the guide lacks at its usual rate; between .5 and
.7 it still does, with more draws; above .7 no practical number of draws does, and the guide misses
a part of the posterior.

References:
    Yao, Vehtari, Simpson, Gelman 2018, "Yes, but Did It Work?: Evaluating Variational Inference"
    (arXiv 1802.02538); Vehtari et al. 2024 (arXiv 1507.02646) for Pareto k; Kumar et al. 2019 for
    ArviZ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vadd_pyro._version import __version__
from vadd_pyro.inspection.conversion import MIN_DRAWS, build, psis_k
from vadd_pyro.inspection.draws import codes, posterior_draws, posterior_predictive, prior_draws
from vadd_pyro.process import MaskedBatch, MaskingProcess, check_size
from vadd_pyro.sampling import seeded

__all__ = ["pareto_k", "to_arviz"]


def pareto_k(log_weights: Tensor) -> Tensor:
    """Pareto k of the importance weights of rows: can the guide be trusted there?

    Below .5: yes, and weighted draws are as good as draws from the posterior. Between .5 and .7:
    nearly; use the weights, and more draws. Above .7: no, the guide misses a part of the posterior
    that its own draws cannot make up for. It speaks for the region that the draws have reached: a
    mode that the guide never visits is not seen.

    Args:
        log_weights: ``(S, B)``, as :class:`LatentDraws` holds them, with ``S`` at least 30.

    Returns:
        ``(B,)``; 0 for exact draws, and not a number for the tied weights of a discrete latent
        that have no tail (see :func:`vadd_pyro.inspection.conversion.psis_k`).

    Raises:
        ValueError: for too few draws or rows with weights that are no numbers.

    References:
        Yao et al. 2018 (arXiv 1802.02538); Vehtari et al. 2024 (arXiv 1507.02646).
    """
    k = psis_k(log_weights.detach().double().cpu().numpy())
    return torch.as_tensor(k, dtype=log_weights.dtype, device=log_weights.device)


def to_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: MaskedBatch,
    num_draws: int = 500,
    *,
    process: MaskingProcess | None = None,
    num_steps: int = 1,
    log_likelihood: bool = False,
    prior: bool = True,
    predictive: bool = True,
    seed: int | None = None,
    max_plate_nesting: int = 1,
    args: tuple[Any, ...] = (),
) -> Any:
    """What a pair says about rows, as ArviZ data.

    ``B`` rows of ``D`` positions, ``S`` draws in one chain. Dimensions besides chain and draw are
    row, position and latent, the entries of a latent vector; with several vector-valued sites it
    is ``latent_<site>``; one-hot codes have ``latent_factor`` and ``latent_code`` (or
    ``latent_<site>_factor`` and so on), other arrays ``latent_0``, ``latent_1`` and so on.
    Coordinates count from 0. Groups, with dimensions after chain and draw:

    - ``posterior``: the latents under the guide, by site (row, ...); a site whose name is that of
      a dimension gets a ``_`` behind it, and ``/`` in names becomes ``.``;
    - ``prior``: the same under the prior in each row's state;
    - ``posterior_predictive``: completions ``x_0`` (row, position), for which the guide is not
      used and which therefore belong to no draw of ``posterior``;
    - ``log_likelihood``: ``x_0`` (row), ``log p(x_S | x_t, z)``. With it ``az.loo`` runs; as each
      row has a latent of its own, its ``elpd`` of a row is the harmonic-mean estimate of
      ``log p(x_S | x_t)``, much noisier than the mean of the importance weights;
    - ``sample_stats``: ``log_weight`` (row); ``kl`` (row), ``log r - log p`` in nats, whose mean
      over draws is the KL of a row, with the error that ``az.summary`` gives; and ``pareto_k``
      (row), the same at every draw, as ArviZ wants all statistics to have draws, and not a number
      with fewer than 30;
    - ``observed_data``: ``x_0`` (row, position), without chain and draw;
    - ``constant_data``: ``x_t``, ``mask``, ``target`` (row, position) and ``t`` (row), without
      chain and draw.

    A model without latents has neither ``posterior`` nor ``prior``.

    Args:
        model, guide: a step program and its guide, run in evaluation mode without gradients.
        batch: rows with data, from ``process.corrupt(x_0, t)``; every row needs a target.
        num_draws: draws of each row, ``S``.
        process: the forward process, needed for completions of more than one step.
        num_steps: network calls of a completion.
        log_likelihood, prior, predictive: whether to include these groups.
        seed: seed of this call; None draws on torch's global state.
        max_plate_nesting: depth of the plates of the programs.
        args: further arguments of the programs, the same for all rows.

    Returns:
        An ``arviz.InferenceData``, or with ArviZ 1.x an ``xarray.DataTree``.

    Raises:
        ValueError: for a batch without data or with rows without a target, several steps without a
        process, or a pair that does not fit.
    """
    check_size("num_steps", num_steps)
    if predictive and num_steps > 1 and process is None:
        raise ValueError(f"num_steps is {num_steps}: expected the process, whose steps they are")
    options: dict[str, Any] = {"max_plate_nesting": max_plate_nesting, "args": args}
    groups: dict[str, dict[str, np.ndarray]] = {}
    with seeded(seed):  # one stream for all, or prior and guide would be drawn from equal noise
        draws = posterior_draws(model, guide, batch, num_draws, **options)
        variables, dims = _latents(draws.sites)
        groups["posterior"] = {variables[n]: _chain(v) for n, v in draws.sites.items()}
        if prior:
            sites = prior_draws(model, batch, num_draws, **options).sites
            groups["prior"] = {variables[n]: _chain(v) for n, v in sites.items()}
        if predictive:
            completed = posterior_predictive(
                model, batch, num_draws, process=process, num_steps=num_steps, **options
            )
            groups["posterior_predictive"] = {"x_0": _chain(completed)}
    assert draws.log_weights is not None
    assert draws.log_likelihood is not None
    assert batch.x_0 is not None
    if log_likelihood:
        groups["log_likelihood"] = {"x_0": _chain(draws.log_likelihood)}
    k = torch.full_like(draws.log_weights[0], torch.nan)
    if num_draws >= MIN_DRAWS:
        k = pareto_k(draws.log_weights)
    groups["sample_stats"] = {
        "log_weight": _chain(draws.log_weights),
        "kl": _chain(draws.log_likelihood - draws.log_weights),
        "pareto_k": _chain(k.expand_as(draws.log_weights)),
    }
    groups["observed_data"] = {"x_0": _array(batch.x_0)}
    groups["constant_data"] = {
        "x_t": _array(batch.x_t),
        "mask": _array(batch.masked),
        "target": _array(batch.target),
        "t": _array(batch.t),
    }
    rows, tokens = ["row"], ["row", "position"]
    named = {
        "posterior": dims,
        "prior": dims,
        "posterior_predictive": {"x_0": tokens},
        "log_likelihood": {"x_0": rows},
        "sample_stats": {"log_weight": rows, "kl": rows, "pareto_k": rows},
        "observed_data": {"x_0": tokens},
        "constant_data": {"x_t": tokens, "mask": tokens, "target": tokens, "t": rows},
    }
    attrs = {
        "package": "vadd_pyro",
        "version": __version__,
        "num_draws": num_draws,
        "num_steps": num_steps if predictive else None,
        "seed": seed,
    }
    return build(groups, named, attrs=attrs)


def _latents(sites: dict[str, Tensor]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The variable of each site, and its dimensions after chain and draw by variable."""
    wide = [name for name, value in sites.items() if value.dim() > 2]
    by_site = {}
    for name, value in sites.items():
        own = "latent" if len(wide) == 1 else f"latent_{name.replace('/', '.')}"
        rank = value.dim() - 2
        if rank < 2:
            names = [own] * rank
        elif rank == 2 and value.is_floating_point() and codes(value) is not None:
            names = [f"{own}_factor", f"{own}_code"]
        else:
            names = [f"{own}_{i}" for i in range(rank)]
        by_site[name] = ["row", *names]
    taken = {"chain", "draw", "position", *(dim for dims in by_site.values() for dim in dims)}
    variables = {}
    for name in sites:
        variable = name.replace("/", ".")
        while variable in taken:
            variable += "_"
        taken.add(variable)
        variables[name] = variable
    return variables, {variables[name]: dims for name, dims in by_site.items()}


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()


def _chain(value: Tensor) -> np.ndarray:
    """Draws ``(S, ...)`` as one chain of them."""
    return _array(value)[None]
