r"""The zoo by name: priors, guides, objectives, distributions of times, and the user's own.

A prior or guide is named by the tables of :mod:`vadd_pyro.names`, or by an import path or entry
point. What such a path or entry point leads to is the thing itself, a function of ``batch``, or
makes it: a class or function that takes any of the arguments ``process``, ``latent_dim``,
``num_codes``, ``state`` (features of the state, for a conditional prior), ``features``
(recognition features, for a guide), ``prior`` and ``model``, by these names. Networks are those of
one backbone (:mod:`vadd_pyro.nn.networks`), perceptrons by default.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from vadd_pyro import guides, models
from vadd_pyro.annealing import CyclicalAnnealing, LinearAnnealing
from vadd_pyro.elbo import MaskedDiffusionELBO
from vadd_pyro.guides.matching import look_at
from vadd_pyro.names import GUIDES, OBJECTIVES, PRIORS, TIMES, check, resolve
from vadd_pyro.nn import MLPNetworks, Networks
from vadd_pyro.process import MaskingProcess, check_time
from vadd_pyro.times import (
    AtomTimes,
    BalancedTimes,
    FewStepTimes,
    GridTimes,
    PartTargets,
    TimeDistribution,
    UniformTimes,
)

__all__ = [
    "GUIDES",
    "OBJECTIVES",
    "PRIORS",
    "TIMES",
    "Pair",
    "build",
    "build_prior",
    "check",
    "objective",
    "times_named",
]

_STEPS = (1, 2, 4, 8)


class Pair(NamedTuple):
    """A model, its guide, and the number of updates that it wants."""

    model: Any
    guide: Any
    num_iterations: int


def _made(name: str, found: Any, offered: dict[str, Callable[[], Any]]) -> Any:
    """The thing itself, or what its maker makes of the arguments that it names."""
    if isinstance(found, torch.nn.Module):
        return copy.deepcopy(found)  # another model of the process may hold the original
    parameters = inspect.signature(found).parameters
    wanted = [
        p.name for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if not inspect.isclass(found) and wanted[:1] == ["batch"]:
        return found
    missing = [
        n for n in wanted if n not in offered and parameters[n].default is inspect.Parameter.empty
    ]
    if missing:
        raise ValueError(
            f"{name!r} asks for {', '.join(missing)}; what can be given is {', '.join(offered)}, "
            "or it may be a function of the batch, with that name"
        )
    return found(**{n: offered[n]() for n in wanted if n in offered})


def _networks(
    networks: Networks | None, process: MaskingProcess, hidden_dim: int | None
) -> Networks:
    """The networks to build of, checked."""
    if networks is None:
        return MLPNetworks(process, hidden_dim=128 if hidden_dim is None else hidden_dim)
    if not isinstance(networks, Networks):
        raise TypeError(f"networks must be vadd_pyro.nn.Networks, got {networks!r}")
    if hidden_dim is not None:
        raise ValueError(f"hidden_dim = {hidden_dim} was given beside networks of their own width")
    networks.check_process(process)
    return networks


def build_prior(
    name: str,
    process: MaskingProcess,
    *,
    latent_dim: int = 2,
    num_codes: int = 64,
    hidden_dim: int | None = None,
    networks: Networks | None = None,
) -> Any:
    """A prior by name, import path or entry point.

    Args:
        name: see the module's text.
        process: gives vocabulary size and length.
        latent_dim: size of a continuous latent.
        num_codes: number of codes of a categorical one.
        hidden_dim: width of the default networks, 128 if omitted.
        networks: those that a prior may need; :class:`~vadd_pyro.nn.MLPNetworks` by default.

    Raises:
        ValueError: for a name that leads nowhere, and for networks of another process.
    """
    networks = _networks(networks, process, hidden_dim)
    state = networks.state
    makers: dict[str, Callable[[], Any]] = {
        "standard_normal": lambda: models.StandardNormal(latent_dim),
        "learned_normal": lambda: models.LearnedNormal(latent_dim),
        "conditional_normal": lambda: models.ConditionalNormal(networks.state_encoder(latent_dim)),
        "mixture": lambda: models.MixtureOfNormals(latent_dim),
        "conditional_mixture": lambda: models.MixtureOfNormals(latent_dim, context=state()),
        "vamp": lambda: models.VampPrior(networks.encoder(latent_dim)),
        "flow": lambda: models.NormalizingFlow(latent_dim),
        "conditional_flow": lambda: models.NormalizingFlow(latent_dim, state()),
        "hierarchical": lambda: models.Hierarchical((latent_dim, latent_dim)),
        "student_t": lambda: models.StudentT(latent_dim),
        "laplace": lambda: models.Laplace(latent_dim),
        # One dimension more, so that the sphere has as many as the other latents.
        "spherical": lambda: models.Spherical(latent_dim + 1),
        "categorical": lambda: models.Categorical(num_codes, 8),
        "conditional_categorical": lambda: models.Categorical(num_codes, 8, state()),
        "product": lambda: models.ProductOfCategoricals(*_factors(num_codes), 8),
        "product_one_hot": lambda: models.ProductOfCategoricals(
            *_factors(num_codes), 8, one_hot=True
        ),
        "chain": lambda: models.Chain(num_codes, process.length, 16),
        "conditional_chain": lambda: models.Chain(
            num_codes, process.length, 16, networks.local_state()
        ),
    }
    if name in makers:
        return makers[name]()
    return _made(
        name,
        resolve("priors", name),
        {
            "process": lambda: process,
            "latent_dim": lambda: latent_dim,
            "num_codes": lambda: num_codes,
            "state": state,
        },
    )


def _factors(num_codes: int) -> tuple[int, int]:
    """Codes and factors of a product: a square of codes about as many as asked for."""
    return max(2, round(num_codes**0.5)), 2


def _latent_size(prior: Any, process: MaskingProcess) -> int:
    """Size of what the decoder sees of a prior."""
    size = getattr(prior, "latent_dim", None)
    if isinstance(size, int):
        return size
    _, z = look_at(prior, process.length, process.vocab_size)
    if z.dim() < 2:
        raise ValueError(
            f"the prior gives latents of shape {tuple(z.shape)} for two rows, expected (2, d): "
            "make them vectors, with .to_event(1)"
        )
    return int(z.shape[-1])


def build(
    prior: str,
    guide: str,
    process: MaskingProcess,
    *,
    latent_dim: int = 2,
    num_codes: int = 64,
    hidden_dim: int | None = None,
    networks: Networks | None = None,
    least_time: float = 0.0,
) -> Pair:
    """A model with a prior of the zoo and a guide that fits it.

    Args:
        prior, guide: see the module's text; the guide ``"auto"`` is
            ``guides.for_prior(prior, features)``.
        process: gives vocabulary size and length.
        latent_dim: size of a continuous latent.
        num_codes: number of codes of a categorical one.
        hidden_dim: width of the default networks, 128 if omitted.
        networks: all that model and guide are made of; :class:`~vadd_pyro.nn.MLPNetworks` by
            default.
        least_time: steps from earlier times have no latent, see :class:`vadd_pyro.models.VADD`.

    Raises:
        ValueError: for names that lead nowhere, for networks of another process, and for a pair
        that does not fit, naming the prior's sites.
    """
    check("priors", prior)
    check("guides", guide)
    least_time = check_time("least_time", least_time)
    networks = _networks(networks, process, hidden_dim)
    if prior == "none":
        if guide not in ("auto", "none"):
            raise ValueError(
                f"prior 'none' has no latent for guide {guide!r} to infer: use 'auto'"
            )
        return Pair(models.MDM(networks.decoder(0)), guides.NoLatent(), 2000)
    law = build_prior(
        prior, process, latent_dim=latent_dim, num_codes=num_codes, networks=networks
    )
    features = law.encoder if isinstance(law, models.VampPrior) else networks.features()
    summed = False
    if guide in GUIDES:
        family = None if guide == "auto" else guide
        fitting = guides.families_for(law, features)
        summed = fitting[:1] == ("none",) and family in (None, "none")
    if isinstance(law, models.Chain):
        decoder = networks.local_decoder(law.latent_dim)
    else:
        decoder = networks.decoder(_latent_size(law, process), summed=summed)
    model = models.VADD(decoder, law, least_time)
    if guide not in GUIDES:
        offered: dict[str, Callable[[], Any]] = {
            "process": lambda: process,
            "latent_dim": lambda: latent_dim,
            "num_codes": lambda: num_codes,
            "features": lambda: features,
            "prior": lambda: law,
            "model": lambda: model,
            "least_time": lambda: least_time,
        }
        fitted = _made(guide, resolve("guides", guide), offered)
    else:
        options = {}
        if family == "semi_amortized":
            options = {"model": model, "elbo": MaskedDiffusionELBO(process)}
        fitted = guides.for_prior(law, features, family, **options)
    if isinstance(fitted, guides.RelativeNormal):
        fitted.least_time = least_time
    elif least_time and not summed and getattr(fitted, "least_time", 0.0) != least_time:
        raise ValueError(
            f"least_time = {least_time} needs guide 'relative', which knows what the prior is "
            f"where there is no latent, or a latent that is summed out; got {guide!r}"
        )
    return Pair(model, fitted, 2000 if summed else 4000)


def times_named(name: str, steps: Sequence[int] | None = None) -> TimeDistribution:
    """A distribution of times by its name.

    Args:
        name: a key of :data:`TIMES`.
        steps: the numbers of steps whose states ``"part_targets"`` takes; its own by default.
    """
    check("times", name)
    makers: dict[str, Callable[[], TimeDistribution]] = {
        "uniform": UniformTimes,
        "balanced": BalancedTimes,
        "atom": lambda: AtomTimes(0.25, BalancedTimes()),
        "atom_uniform": lambda: AtomTimes(0.3),
        "grid": lambda: GridTimes(_STEPS),
        "few_step": FewStepTimes,
        "part_targets": lambda: PartTargets(None if steps is None else GridTimes(steps)),
    }
    return makers[name]()


def objective(
    name: str, times: str, process: MaskingProcess, num_iterations: int
) -> MaskedDiffusionELBO:
    """The loss of a name, with KL annealing over the first third of training.

    Args:
        name: a key of :data:`OBJECTIVES`.
        times: a key of :data:`TIMES`; ``"chain"`` takes the steps of its own grids whatever it is.
        process: the forward process.
        num_iterations: length of the training.
    """
    check("objectives", name)
    check("times", times)
    options: dict[str, Any] = {
        "kl_weight": LinearAnnealing(max(1, num_iterations // 3), start=0.001),
        "times": times_named(times),
    }
    several: dict[str, Any] = {"num_particles": 8, "importance_weighted": True}
    particular: dict[str, dict[str, Any]] = {
        "delbo": {},
        "chain": {"objective": "chain", "times": GridTimes(_STEPS)},
        "iwae": several,
        "dreg": {**several, "doubly_reparameterized": True},
        "renyi": {"num_particles": 8, "renyi_alpha": 0.5},
        "free_bits": {"free_bits": 0.1},
        "cyclical": {},
        "no_annealing": {"kl_weight": 1.0},
    }
    options |= particular[name]
    if name == "cyclical":
        cycles = min(4, num_iterations)
        options["kl_weight"] = CyclicalAnnealing(num_iterations, cycles, start=0.001)
    return MaskedDiffusionELBO(process, **options)
