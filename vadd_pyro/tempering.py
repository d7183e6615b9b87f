r"""Latents drawn more, or less, widely than their prior says.

A temperature ``tau`` multiplies the spread of a latent of real numbers and divides the logits of a
discrete one,

.. math::
    z = m + \tau s\, \epsilon, \qquad \pi_c \propto \pi_c^{1 / \tau},

so ``tau < 1`` draws nearer to the middle of the prior (for a normal, from its density to the power
:math:`1 / \tau^2`), as is done with flows (Kingma and Dhariwal 2018, arXiv 1807.03039) and
hierarchical autoencoders (Vahdat and Kautz 2020, arXiv 2007.03898) for samples that look better
and differ less. It is another law than the model's, and no likelihood speaks of it.

:func:`tempered` is a ``functools.singledispatch`` on the class of the distribution: register your
own with ``@tempered.register(MyDistribution)``, or give the class a method
``tempered(temperature)``.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pyro.distributions as dist
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample

__all__ = ["Tempering", "check_temperature", "tempered"]


def check_temperature(name: str, value: float) -> float:
    """Check that a temperature is a positive number, and return it as a float.

    Raises:
        ValueError: naming the argument and its value.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return float(value)


@functools.singledispatch
def tempered(fn: Any, temperature: float) -> Any:
    """The distribution ``fn`` at a temperature, of the same batch and event shape.

    Normal, Laplace and Student's t have their scale multiplied, categoricals their logits divided;
    a mixture keeps its weights and has its components tempered; a point mass stays. Looks through
    ``Independent``, masks and expansions.

    Args:
        fn: a distribution.
        temperature: a positive number; 1 changes nothing.

    Raises:
        TypeError: for a class without a rule, naming it.
    """
    if hasattr(fn, "tempered"):
        return fn.tempered(temperature)
    raise TypeError(
        f"no rule to temper {type(fn).__name__}: register one with "
        f"vadd_pyro.tempering.tempered.register({type(fn).__name__}), or give the class a method "
        "tempered(temperature)"
    )


@tempered.register(dist.Normal)
@tempered.register(dist.Laplace)
def _loc_scale(fn: Any, temperature: float) -> Any:
    law = dist.Normal if isinstance(fn, dist.Normal) else dist.Laplace
    return law(fn.loc, fn.scale * temperature, validate_args=False)


@tempered.register(dist.StudentT)
def _student(fn: Any, temperature: float) -> Any:
    return dist.StudentT(fn.df, fn.loc, fn.scale * temperature, validate_args=False)


@tempered.register(dist.Categorical)
@tempered.register(dist.OneHotCategorical)
def _categorical(fn: Any, temperature: float) -> Any:
    law = dist.OneHotCategorical if isinstance(fn, dist.OneHotCategorical) else dist.Categorical
    return law(logits=fn.logits / temperature, validate_args=False)


@tempered.register(dist.MixtureSameFamily)
def _mixture(fn: Any, temperature: float) -> Any:
    components = tempered(fn.component_distribution, temperature)
    return dist.MixtureSameFamily(fn.mixture_distribution, components, validate_args=False)


@tempered.register(dist.Delta)
def _point(fn: Any, temperature: float) -> Any:
    return fn


@tempered.register(dist.Independent)
def _independent(fn: Any, temperature: float) -> Any:
    base = tempered(fn.base_dist, temperature)
    return dist.Independent(base, fn.reinterpreted_batch_ndims, validate_args=False)


@tempered.register(dist.MaskedDistribution)
def _masked(fn: Any, temperature: float) -> Any:
    return dist.MaskedDistribution(tempered(fn.base_dist, temperature), fn._mask)


@tempered.register(ExpandedDistribution)
def _expanded(fn: Any, temperature: float) -> Any:
    return ExpandedDistribution(tempered(fn.base_dist, temperature), fn.batch_shape)


class Tempering(Messenger):
    """Handler that tempers the latent sites of the program run inside it.

    Sites that are observed, already have a value, or are called ``"x_0"`` stay as they are. What
    :func:`vadd_pyro.sample` uses for ``latent_temperature``; around a model, as in
    ``exact_distribution(Tempering(0.7)(model), ...)``, it gives the law of that sampler.

    Args:
        temperature: a positive number.

    Raises:
        TypeError: where the model is run, for a site whose distribution has no rule, naming both.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = check_temperature("temperature", temperature)

    def _pyro_sample(self, msg: Any) -> None:
        settled = msg["is_observed"] or msg["done"] or msg["value"] is not None
        if settled or msg["name"] == "x_0" or isinstance(msg["fn"], _Subsample):
            return
        try:
            msg["fn"] = tempered(msg["fn"], self.temperature)
        except TypeError as error:
            raise TypeError(f"latent_temperature: site {msg['name']!r}: {error}") from error
