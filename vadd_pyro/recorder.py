r"""One light handler that runs a step program and keeps what happened at its sample sites.

It takes the place of ``poutine.trace`` with ``replay`` and ``enum``: a site is recorded with its
distribution, value, scale and mask, and nothing is computed until somebody asks for a log-density.
In the model's pass it replays the guide's values and lays out the support of small discrete sites
along a dimension of their own, to be summed over exactly.

Handlers that a user puts around a program (``mask``, ``scale``, ``condition``, ``block``) act
inside it and are honoured; those around the whole computation too. The guide's values win over a
``replay`` inside the model, as they do in Pyro.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

__all__ = ["Recorder", "Site", "asks_for_enumeration", "run"]


class Site:
    """What a program did at one sample site.

    Args:
        name: the site's name.
        fn: its distribution, expanded by the plates around it.
        value: its value; for an enumerated site the support, along ``enum_dim``.
        scale: factor of the log-density, a number or tensor, from ``poutine.scale`` and subsampled
            plates.
        mask: bool, bool tensor or None, from ``poutine.mask``.
        observed: whether the value is data.
        frames: the plates around the site, innermost first.
        infer: Pyro's inference hints at the site.
        enum_dim: the (negative) batch dimension that holds the support, or None.
        by_position: whether it is the support of each position alone, that of a law which sums
            itself out along the row (:class:`~vadd_pyro.distributions.CodeChain`).
    """

    __slots__ = (
        *("by_position", "enum_dim", "fn", "frames", "infer"),
        *("mask", "name", "observed", "scale", "value"),
    )

    def __init__(
        self, msg: dict[str, Any], enum_dim: int | None, by_position: bool = False
    ) -> None:
        self.name = msg["name"]
        self.fn = msg["fn"]
        self.value = msg["value"]
        self.scale = msg["scale"]
        self.mask = msg["mask"]
        self.observed = msg["is_observed"]
        self.frames = msg["cond_indep_stack"]
        self.infer = msg["infer"]
        self.enum_dim = enum_dim
        self.by_position = by_position

    @property
    def auxiliary(self) -> bool:
        """Whether the guide declared the site as a helper that the model does not have."""
        return bool(self.infer and self.infer.get("is_auxiliary"))

    def masked(self, value: Tensor) -> Tensor:
        """``value`` where the site counts, zero where it is masked out."""
        if self.mask is None:
            return value
        return scale_and_mask(value, 1.0, self.mask)

    def log_weight(self) -> Tensor:
        """Log-probability of each element of an enumerated support, mask or no mask: what is
        summed or averaged over has to stay a distribution.
        """
        return self.fn.log_prob(self.value)

    def log_prob(self) -> Tensor:
        """Unscaled log-density, zero where masked.

        Nothing is computed where the whole site is masked.
        """
        if self.mask is False:
            return torch.zeros(self.fn.batch_shape, device=getattr(self.value, "device", None))
        return self.masked(self.fn.log_prob(self.value))


class Recorder(Messenger):
    """Records the sample sites of the program run inside it, in order.

    Args:
        replay: values to use at latent sites, by name (the guide's).
        enumerate_sites: called with a message at each site that would be drawn; True lays out its
            support instead.
        first_dim: the first batch dimension free for supports, a negative number.
        check: called with a message before a value is replayed at its site.
        by_position: whether whoever asks can sum out laws along the row.
    """

    def __init__(
        self,
        replay: Mapping[str, Tensor] | None = None,
        enumerate_sites: Callable[[dict[str, Any]], bool] | None = None,
        first_dim: int = -2,
        check: Callable[[dict[str, Any]], None] | None = None,
        by_position: bool = False,
    ) -> None:
        super().__init__()
        self.by_position = by_position
        self.replay = replay
        self.check = check
        self.enumerate_sites = enumerate_sites
        self.next_dim = first_dim
        self.sites: dict[str, Site] = {}
        self.plates: dict[str, Tensor] = {}
        self._enumerated: dict[str, int] = {}

    # Both hooks are overridden whole: the dispatch by message type in the base class costs as much
    # as the rest.
    def _process_message(self, msg: Any) -> None:
        if msg["type"] != "sample" or msg["is_observed"]:
            return
        name = msg["name"]
        if self.replay is not None and name in self.replay:
            # As in poutine.replay, what comes from outside wins over a value set inside.
            if self.check is not None:
                self.check(msg)
            msg["value"] = self.replay[name]
            msg["done"] = True
        elif msg["value"] is not None or msg["done"]:
            return
        elif (
            self.enumerate_sites is not None
            and (self._along(msg["fn"]) or getattr(msg["fn"], "has_enumerate_support", False))
            and self.enumerate_sites(msg)
        ):
            msg["value"] = self._lay_out(msg)
            msg["done"] = True

    def _along(self, fn: Any) -> bool:
        return self.by_position and getattr(fn, "sums_by_position", False)

    def _lay_out(self, msg: Any) -> Tensor:
        fn = msg["fn"]
        along = self._along(fn)
        try:
            support = fn.position_support() if along else fn.enumerate_support(expand=False)
        except NotImplementedError as error:
            raise ValueError(
                f"site {msg['name']!r}: the support of {fn} cannot be enumerated ({error}); "
                "give the guide a site of that name"
            ) from error
        dim = self.next_dim
        self.next_dim -= 1
        self._enumerated[msg["name"]] = dim
        return support.reshape((len(support),) + (1,) * (-dim - 1) + tuple(fn.event_shape))

    def _postprocess_message(self, msg: Any) -> None:
        if msg["type"] != "sample":
            return
        name = msg["name"]
        if isinstance(msg["fn"], _Subsample):
            self.plates[name] = msg["value"]
        elif not msg["infer"] or not msg["infer"].get("_deterministic"):
            if name in self.sites:
                raise ValueError(f"the program has two sample sites named {name!r}")
            dim = self._enumerated.get(name)
            self.sites[name] = Site(msg, dim, dim is not None and self._along(msg["fn"]))

    def latent_values(self) -> dict[str, Any]:
        """Values of the latent sites and subsamples, to be replayed in another program."""
        values: dict[str, Any] = {
            name: site.value for name, site in self.sites.items() if not site.observed
        }
        values.update(self.plates)
        return values


def asks_for_enumeration(msg: dict[str, Any]) -> bool:
    """Whether a sample statement wants its support laid out."""
    return bool(msg["infer"]) and msg["infer"].get("enumerate") is not None


def run(
    program: Callable[..., Any],
    recorder: Recorder,
    *args: Any,
    inside: AbstractContextManager[Any] | None = None,
    **kwargs: Any,
) -> Recorder:
    """Run a program under a recorder, optionally inside one more handler (a plate of particles),
    and return the recorder.
    """
    with ExitStack() as stack:
        stack.enter_context(recorder)
        if inside is not None:
            stack.enter_context(inside)
        program(*args, **kwargs)
    return recorder
