r"""Log-densities of a pair of programs at given latents, row by row and draw by draw.

Latents are kept as ``(S, B) + event``: ``S`` draws of each of ``B`` rows, with the sizes of plates
inside the data plate before the event. Inside a program the draws stand in a plate of particles,
left of the plates of the program itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from vadd_pyro.process import MaskedBatch
from vadd_pyro.recorder import Recorder, Site, run
from vadd_pyro.sites import PARTICLES, Layout, check_between, check_summed

__all__ = [
    "Replay",
    "Scored",
    "check_data",
    "guide_log_density",
    "kept",
    "model_log_density",
    "particles",
    "scored",
]


class Replay(Recorder):
    """Replays values kept as ``(S, B) + inner + event`` at sites ``(S, inner ..., B) + event``.

    Args:
        replay, enumerate_sites, first_dim: as for :class:`~vadd_pyro.recorder.Recorder`; supports
            stand left of the draws, whose dimension is the one right of ``first_dim``.
    """

    def __init__(
        self,
        replay: Mapping[str, Tensor] | None,
        enumerate_sites: Callable[[dict[str, Any]], bool] | None,
        first_dim: int,
    ) -> None:
        super().__init__(replay, enumerate_sites, first_dim)
        self.num_dims = -1 - first_dim  # draws, inner plates, rows

    def _process_message(self, msg: Any) -> None:
        if self.replay is None or msg["type"] != "sample" or msg["name"] not in self.replay:
            super()._process_message(msg)
            return
        if msg["is_observed"]:
            return
        value = self.replay[msg["name"]]
        event = msg["fn"].event_dim
        value = value.movedim(1, value.dim() - 1 - event)
        missing = self.num_dims - (value.dim() - event)  # plates that the site does not stand in
        msg["value"] = value.reshape(len(value), *(1,) * missing, *value.shape[1:])
        msg["done"] = True


def kept(site: Site, num_draws: int, num_rows: int) -> Tensor:
    """The value of a site of a run with draws as ``(S, B) + inner + event``."""
    sizes = {f.dim: f.size for f in site.frames if f.dim is not None}
    num_dims = -min(sizes)  # the plate of draws is the leftmost
    event = site.value.shape[site.value.dim() - site.fn.event_dim :]
    inner = [sizes.get(dim, 1) for dim in range(1 - num_dims, -1)]
    value = site.value.expand(num_draws, *inner, num_rows, *event)
    value = value.movedim(num_dims - 1, 1)
    for dim in range(-2, -num_dims, -1):
        if dim not in sizes:
            value = value.squeeze(dim + num_dims + 1)
    return value


class Scored(NamedTuple):
    """A model's log-densities at given latents, ``(supports, S or 1, B)`` each, the supports of
    summed-out sites laid flat.
    """

    log_likelihood: Tensor
    log_prior: Tensor
    summed: list[Site]
    layout: Layout


def particles(num_draws: int, row_plates: int) -> Any:
    """The plate of draws, left of the ``row_plates`` plates of the programs."""
    return pyro.plate(PARTICLES, num_draws, dim=-1 - row_plates)


def scored(guide: Recorder, model: Recorder, batch: MaskedBatch, row_plates: int) -> Scored:
    """The log-densities of a recorded run."""
    layout = Layout(guide, model, batch.target.any(-1), row_plates, True)
    for name, site in model.sites.items():
        if not layout.rows[name]:
            if site.observed and name != "x_0":
                continue  # the same factor for all latents of a row
            raise ValueError(
                f"site {name!r} stands outside the data plate: draws and diagnostics are per row; "
                "condition it, or move it into the plate"
            )
        if site.observed and name != "x_0":
            raise ValueError(
                f"the model observes {name!r} beside 'x_0': a posterior per row needs the tokens "
                "to be all the data"
            )
    summed = [site for site in model.sites.values() if site.enum_dim is not None]
    check_summed(summed, layout)
    log_x = layout.reduce(model.sites["x_0"].log_prob())
    log_z = layout.sum(
        [
            layout.reduce(site.log_weight() if site.enum_dim is not None else site.log_prob())
            for site in model.sites.values()
            if not site.observed
        ]
    )
    log_x, log_z = torch.broadcast_tensors(log_x, log_z)
    shape = (*log_x.shape[:-1], len(batch))
    lead = max(0, len(shape) - 1 - row_plates)
    flat = (math.prod(shape[:lead]), shape[lead] if len(shape) > row_plates else 1, len(batch))
    return Scored(
        log_x.expand(shape).reshape(flat), log_z.expand(shape).reshape(flat), summed, layout
    )


def model_log_density(
    model: Callable[..., Any],
    batch: MaskedBatch,
    values: Mapping[str, Tensor],
    *,
    max_plate_nesting: int = 1,
    args: tuple[Any, ...] = (),
) -> Tensor:
    """``log p(x_S, z | x_t)`` at given latents, discrete sites without a value summed out.

    Gradients flow to the values if they ask for them.

    Args:
        model: a step program.
        batch: rows with data.
        values: latents by site, ``(S, B) + event``, as :class:`LatentDraws` holds them.
        max_plate_nesting: depth of the plates of the program.
        args: further arguments of the program.

    Returns:
        ``(S, B)`` nats.
    """
    check_data(batch)
    number = next((len(value) for value in values.values()), 1)
    recorder = Replay(values, lambda msg: True, -2 - max_plate_nesting)
    generated = run(model, recorder, batch, *args, inside=particles(number, max_plate_nesting))
    result = scored(Recorder(), generated, batch, max_plate_nesting)
    return (result.log_likelihood + result.log_prior).logsumexp(0).expand(number, -1)


def guide_log_density(
    guide: Callable[..., Any],
    batch: MaskedBatch,
    values: Mapping[str, Tensor],
    *,
    max_plate_nesting: int = 1,
    args: tuple[Any, ...] = (),
) -> Tensor:
    """``log r(z | x_0, x_t)`` at given latents, as :func:`model_log_density`; ``(S, B)`` nats.

    Raises:
        ValueError: for a guide whose density is given through auxiliary sites, which cannot be
        had at a value.
    """
    number = next((len(value) for value in values.values()), 1)
    recorder = Replay(values, None, -2 - max_plate_nesting)
    inferred = run(guide, recorder, batch, *args, inside=particles(number, max_plate_nesting))
    for name, site in inferred.sites.items():
        if site.auxiliary or site.observed or name not in values:
            raise ValueError(
                f"the guide's site {name!r} has no value: its density is given through a change "
                "of variables, or it is not among the latents"
            )
    total = torch.zeros(number, len(batch), device=batch.x_t.device)
    for site in inferred.sites.values():
        check_between(site, max_plate_nesting)
        log_r = site.log_prob()
        total = total + log_r.reshape(number, -1, len(batch)).sum(1)
    return total


def check_data(batch: MaskedBatch) -> None:
    """Check that a batch has data.

    Raises:
        ValueError: naming the argument.
    """
    if batch.x_0 is None:
        raise ValueError("batch.x_0 is None: expected a batch with data, from process.corrupt")
