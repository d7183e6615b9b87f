r"""A prior that is fitted to the posteriors of a trained pair.

Of all priors the aggregate posterior, in the all-masked state

.. math::
    q(z) = \frac1N \sum_{n=1}^N r(z \mid x_n) ,

has the best bound at one step, :math:`\mathrm{E}_{q} \log p(z)` being all that it owes the prior.
Training never quite gets there: a normal prior keeps mass where no row's posterior is, and from
there the decoder draws what it has not learned. So when model and guide are trained, a mixture of
normals is fitted to draws of the posteriors by expectation maximisation, and takes the prior's
place. The sampler it makes has a likelihood of its own, with the same bounds; a guide told
relative to its prior (:class:`vadd_pyro.guides.RelativeNormal`) need not be changed for it, though
some updates of it alone (:func:`vadd_pyro.fit_guide`) tighten them.

The number of components is chosen by draws of rows that were held out.

References:
    Hoffman and Johnson 2016, "ELBO surgery", and Tomczak and Welling 2018 (arXiv 1705.07120) for
    the best prior; Dai and Wipf 2019 (arXiv 1903.05789) and Ghosh et al. 2020 (arXiv 1903.12436)
    for learning it after the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vadd_pyro.guides.matching import describe, is_real, look_at
from vadd_pyro.models import MixtureOfNormals
from vadd_pyro.process import MaskingProcess, check_size
from vadd_pyro.programs import evaluation
from vadd_pyro.recorder import Recorder, run
from vadd_pyro.sampling import device_of, seeded

__all__ = ["PriorFit", "check_fit", "fit_prior"]

_SIZES = (8, 16, 32, 64, 128, 256)
_DRAWS = 20_000  # of the posteriors together, about
_MOST_ROWS = 60_000
_ROWS = 1000  # at once
_LEAST_ROWS = 20
_FLOOR = 1e-4  # least variance of a component


class PriorFit(NamedTuple):
    """A prior fitted to the posteriors of a pair.

    Args:
        prior: the mixture.
        before: mean log-density of held-out draws under the prior that the model had, nats.
        held_out: the same under a mixture of each number of components that was tried. What the
            best gains on ``before`` is gained by the bound at one step with the guide as it is, on
            rows like these.
    """

    prior: MixtureOfNormals
    before: float
    held_out: dict[int, float]


def fit_prior(
    model: Any,
    guide: Callable[..., Any],
    process: MaskingProcess,
    data: Tensor,
    held_out: Tensor | None = None,
    *,
    num_components: int | Sequence[int] = _SIZES,
    num_draws: int | None = None,
    seed: int = 0,
) -> PriorFit:
    """Fit a mixture of normals to the posteriors of a trained pair where all is masked.

    Model and guide are left as they are; to use it, ``model.prior = found.prior``, and for a
    :class:`~vadd_pyro.guides.RelativeNormal` ``guide.prior = copy.deepcopy(found.prior)`` too. A
    model that uses its latent in later steps as well (``least_time`` below 1) takes
    ``models.AtStart(found.prior, model.prior)``: their posteriors have another aggregate, which is
    not looked at.

    Args:
        model: has a ``prior`` that samples ``"z"``, a vector of real numbers, such as
            :class:`vadd_pyro.models.VADD`.
        guide: its guide, trained; run in evaluation mode without gradients.
        process: their forward process.
        data: rows to draw posteriors of, ``(N, D)``.
        held_out: rows that choose the number of components, such as a validation split; by
            default a tenth of ``data``, which is then not fitted to.
        num_components: the numbers to try, rising; they are tried while held-out draws become more
            likely.
        num_draws: of each row; by default as many as make 20,000 in all, of at most 60,000 rows.
        seed: of draws, of the choice of rows, and of where expectation maximisation starts.

    Returns:
        :class:`PriorFit`.

    Raises:
        TypeError: for a model without a prior.
        ValueError: for a prior whose latent is none such, naming its sites; for fewer than 20 rows
            of either kind.
    """
    single = not isinstance(num_components, Sequence)
    sizes: list[Any] = [num_components] if single else list(num_components)  # type: ignore[arg-type]
    for size in sizes:
        check_size("num_components", size)
    if not sizes or sizes != sorted(set(sizes)):
        raise ValueError(f"num_components must rise, at least one of them, got {num_components!r}")
    if num_draws is not None:
        check_size("num_draws", num_draws)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), got {seed!r}")
    data = process.check_tokens(data, "data")
    if held_out is not None:
        held_out = process.check_tokens(held_out, "held_out")
    data, held_out = _divided(data, held_out, seed)
    with seeded(seed), evaluation(model, guide):
        law = check_fit(model, process)
        fitted = _draws(guide, process, data, num_draws)
        judged = _draws(guide, process, held_out, num_draws)
        before = float(law.log_prob(judged.unsqueeze(1).expand(-1, 2, -1)).mean())
        z, new = (draws.double().cpu().numpy() for draws in (fitted, judged))
        found: dict[int, float] = {}
        for size in sizes:
            if found and size > len(z) // 2:
                break
            mixture = _maximised(z, size, seed)
            found[size] = float(mixture.score(new))
            if found[size] < max(found.values()):
                break
            best = mixture
        return PriorFit(_as_prior(best).to(fitted), before, found)


def check_fit(model: Any, process: MaskingProcess, num_rows: Sequence[int] = ()) -> Any:
    """Check before a training that a prior can be fitted in the end.

    Args:
        model, process: as in :func:`fit_prior`.
        num_rows: how many rows there will be to fit to and to choose by.

    Returns:
        The law of the model's prior on two rows in which all is masked.

    Raises:
        TypeError, ValueError: as :func:`fit_prior` does.
    """
    for name, count in zip(("data", "held_out"), num_rows, strict=False):
        _check_rows(name, count)
    prior = getattr(model, "prior", None)
    if not callable(prior):
        raise TypeError(
            f"model must have a prior, as vadd_pyro.models.VADD does; got {type(model).__name__}"
        )
    sites, _ = look_at(prior, process.length, process.vocab_size)
    if [site.name for site in sites] != ["z"] or not is_real(sites[0].fn):
        raise ValueError(
            "the prior must sample one site 'z', a vector of any real numbers, for a mixture of "
            f"normals to take its place; it samples {describe(sites) or 'nothing'}"
        )
    return sites[0].fn


def _divided(data: Tensor, held_out: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit to, and rows to choose by."""
    _check_rows("data", len(data))
    if held_out is None:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        held_out, data = data[order].tensor_split([len(data) // 10])
    _check_rows("held_out", len(held_out))
    return data, held_out


def _check_rows(name: str, count: int) -> None:
    if count < _LEAST_ROWS:
        raise ValueError(
            f"{name} must have at least {_LEAST_ROWS} rows to fit a prior to, got {count}"
        )


def _draws(guide: Any, process: MaskingProcess, rows: Tensor, num_draws: int | None) -> Tensor:
    """Latents of rows where all is masked, ``(N, d)``."""
    if num_draws is None and len(rows) > _MOST_ROWS:
        rows = rows[torch.randperm(len(rows))[:_MOST_ROWS]]
    number = -(-_DRAWS // len(rows)) if num_draws is None else num_draws
    drawn, device = [], device_of(guide, rows.device)
    for piece in rows.split(_ROWS):
        batch = process.corrupt(piece.to(device), 1.0)
        site = run(guide, Recorder(), batch).sites.get("z")
        if site is None:
            raise ValueError(
                "the guide must sample the site 'z' of the model's prior; it does not"
            )
        if not bool(site.value.isfinite().all()):
            raise ValueError(
                "the guide's draws of 'z' must be finite to fit a prior to, got others"
            )
        drawn += [site.value if not i else site.fn.sample() for i in range(number)]
    return torch.cat(drawn)


def _maximised(z: np.ndarray, size: int, seed: int) -> Any:
    """A mixture of diagonal normals by expectation maximisation."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(
        size, covariance_type="diag", reg_covar=_FLOOR, random_state=seed, max_iter=100
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # enough is enough
        return mixture.fit(z)


def _as_prior(mixture: Any) -> MixtureOfNormals:
    """scikit-learn's mixture as a prior."""
    size, latent_dim = mixture.means_.shape
    prior = MixtureOfNormals(latent_dim, size)
    scale = torch.from_numpy(mixture.covariances_).sqrt()
    with torch.no_grad():
        prior.logits.value.copy_(torch.from_numpy(mixture.weights_).clamp_min(1e-12).log())
        prior.z_loc.copy_(torch.from_numpy(mixture.means_))
        prior.z_raw.copy_((scale - 1e-4).clamp_min(1e-4).expm1().log())
    return prior
