r"""Draws of the latents of given rows: from the guide with importance weights, from the prior, and
what the model writes in the masked places.

For row ``b`` in its state :math:`x_t`, with :math:`x_S` the tokens at its targets,

.. math::
    z_{sb} \sim r(z \mid x_0, x_t), \qquad
    \log w_{sb} = \log p(x_S \mid x_t, z_{sb}) + \log p(z_{sb} \mid x_t) - \log r(z_{sb} \mid x_0,
    x_t) .

Discrete latents that the model sums out need no guide: theirs are drawn from the exact posterior
:math:`p(c \mid x_0, x_t, z)`, so that a model with nothing else has the weights :math:`\log p(x_S
\mid x_t)`, all equal in a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vadd_pyro.distributions import draw_categorical
from vadd_pyro.inspection.scoring import (
    Replay,
    check_data,
    kept,
    particles,
    scored,
)
from vadd_pyro.process import MaskedBatch, MaskingProcess, check_size
from vadd_pyro.programs import evaluation
from vadd_pyro.recorder import Recorder, run
from vadd_pyro.sampling import sample, seeded
from vadd_pyro.sites import check_pair, data_plate, is_row_site

__all__ = [
    "LatentDraws",
    "codes",
    "posterior_draws",
    "posterior_predictive",
    "prior_draws",
]

_CHUNK = 2**23  # logits held at once


def codes(value: Tensor) -> Tensor | None:
    """Discrete latents ``(S, B) + event``, integers or one-hot vectors, as the numbers of their
    codes, ``(S, B, L)`` long; None for real numbers.
    """
    if not value.is_floating_point():
        return value.reshape(*value.shape[:2], -1).long()
    if value.dim() < 3 or value.shape[-1] < 2:
        return None
    if not bool(((value == 0) | (value == 1)).all() and (value.sum(-1) == 1).all()):
        return None
    return value.argmax(-1).reshape(*value.shape[:2], -1)


@dataclass(frozen=True)
class LatentDraws:
    """Draws of the latents of some rows, ``S`` of each of ``B``.

    Args:
        sites: values by site, ``(S, B) + event`` (with the sizes of plates inside the data plate
            before the event).
        batch: the rows.
        log_weights: :math:`\\log w`, ``(S, B)``; None for draws from a prior.
        log_likelihood: ``log p(x_S | x_t, z)``, ``(S, B)`` nats; None without data.
        log_prior: ``log p(z | x_t)``, ``(S, B)`` nats.
        tokens: rows completed by the model given each draw, ``(S, B, D)`` long; None if not drawn.
        exact: whether the draws are from the exact posterior, as those of summed-out codes are.
    """

    sites: dict[str, Tensor]
    batch: MaskedBatch
    log_weights: Tensor | None = None
    log_likelihood: Tensor | None = None
    log_prior: Tensor | None = None
    tokens: Tensor | None = None
    exact: bool = False

    @property
    def num_draws(self) -> int:
        """How many draws each row has, ``S``."""
        for value in (*self.sites.values(), self.tokens, self.log_weights):
            if value is not None:
                return len(value)
        return 0

    def columns(self) -> tuple[Tensor, list[str]]:
        """All latents side by side as numbers, ``(S, B, d)``, and their names, such as ``"z[3]"``.

        Codes, one-hot ones too, are their numbers.
        """
        values, names = [], []
        for name, value in self.sites.items():
            numbers = codes(value)
            flat = value.reshape(*value.shape[:2], -1) if numbers is None else numbers
            values.append(flat.to(torch.get_default_dtype()))
            width = flat.shape[-1]
            single = value.dim() == 2 or (numbers is not None and width == 1)
            names += [name] if single else [f"{name}[{i}]" for i in range(width)]
        if not values:
            return torch.zeros(self.num_draws, len(self.batch), 0), []
        return torch.cat(values, -1), names

    def __getitem__(self, rows: Tensor | slice) -> LatentDraws:
        """The draws of the chosen rows."""

        def pick(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[:, rows]

        return LatentDraws(
            {name: value[:, rows] for name, value in self.sites.items()},
            self.batch[rows],
            pick(self.log_weights),
            pick(self.log_likelihood),
            pick(self.log_prior),
            pick(self.tokens),
            self.exact,
        )


# ------------------------------------------------------------------------------- posterior


def posterior_draws(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: MaskedBatch,
    num_draws: int = 500,
    *,
    seed: int | None = None,
    max_plate_nesting: int = 1,
    args: tuple[Any, ...] = (),
) -> LatentDraws:
    """Latents of rows from the guide, with importance weights.

    Args:
        model, guide: a step program and its guide, run in evaluation mode without gradients.
        batch: rows with data, from ``process.corrupt(x_0, t)``; every row needs a target.
        num_draws: draws of each row, ``S``.
        seed: seed of this call; None draws on torch's global state.
        max_plate_nesting: depth of the plates of the programs.
        args: further arguments of the programs, the same for all rows.

    Returns:
        :class:`LatentDraws` with sites, weights and likelihoods.

    Raises:
        ValueError: for a batch without data or with rows without a target, or a pair that does
        not fit.
    """
    check_size("num_draws", num_draws)
    check_data(batch)
    if not bool(batch.target.any(-1).all()):
        row = int((~batch.target.any(-1)).nonzero()[0])
        raise ValueError(
            f"row {row} of the batch has no target, so that its latent has no posterior but its "
            "prior: leave such rows out, batch[batch.target.any(-1)]"
        )
    pieces = []
    with seeded(seed), evaluation(model, guide):
        supports = _num_supports(model, guide, batch[:1], max_plate_nesting, args)
        per_row = batch.x_t.shape[1] * (int(batch.x_t.max()) + 1) * supports * num_draws
        for rows in batch.split(max(1, _CHUNK // per_row)):
            pieces.append(_drawn(model, guide, rows, num_draws, max_plate_nesting, args))
    return _joined(pieces, batch)


def _num_supports(
    model: Any, guide: Any, batch: MaskedBatch, row_plates: int, args: tuple[Any, ...]
) -> int:
    """How many combinations of summed-out values the model lays out."""
    inferred = run(guide, Recorder(first_dim=-1 - row_plates), batch, *args)
    everything = Recorder(inferred.latent_values(), lambda msg: True, inferred.next_dim)
    sites = run(model, everything, batch, *args).sites.values()
    return math.prod(len(site.value) for site in sites if site.enum_dim is not None)


def _drawn(
    model: Any,
    guide: Any,
    batch: MaskedBatch,
    num_draws: int,
    row_plates: int,
    args: tuple[Any, ...],
) -> LatentDraws:
    first_dim = -2 - row_plates
    inside = particles(num_draws, row_plates)
    inferred = run(guide, Recorder(first_dim=first_dim), batch, *args, inside=inside)
    has_sites = any(not site.observed for site in inferred.sites.values())
    # Where all latents are summed out, draws would only repeat each other.
    inside = particles(num_draws if has_sites else 1, row_plates)
    replay = inferred.latent_values()
    recorder = Recorder(replay, lambda msg: True, first_dim)
    generated = run(model, recorder, batch, *args, inside=inside)
    check_pair(inferred, generated)
    result = scored(inferred, generated, batch, row_plates)
    shape = (num_draws, len(batch))
    joint = result.log_likelihood + result.log_prior
    log_r = result.layout.sum(
        [result.layout.reduce(site.log_prob()) for site in inferred.sites.values()]
    )
    log_w = joint.logsumexp(0) - log_r.reshape(-1, len(batch))
    sites = {
        name: kept(site, *shape)
        for name, site in generated.sites.items()
        if not site.observed and site.enum_dim is None
    }
    logits = joint.expand(len(joint), *shape).movedim(0, -1)
    pick = draw_categorical(logits.double()) if len(joint) > 1 else logits[..., 0].long() * 0
    index = pick.unsqueeze(0)
    for site in result.summed:  # supports of later sites stand further left: the first is fastest
        support = site.value.reshape(len(site.value), *site.fn.event_shape)
        sites[site.name] = support[pick % len(support)]
        pick = pick // len(support)
    order = [name for name, site in generated.sites.items() if not site.observed]
    return LatentDraws(
        {name: sites[name] for name in order},
        batch,
        log_w.expand(shape),
        result.log_likelihood.expand(-1, *shape).gather(0, index)[0],
        result.log_prior.expand(-1, *shape).gather(0, index)[0],
        exact=not has_sites,
    )


def _joined(pieces: list[LatentDraws], batch: MaskedBatch) -> LatentDraws:
    """The draws of consecutive rows as one."""
    if len(pieces) == 1:
        return pieces[0]

    def together(values: list[Tensor | None]) -> Tensor | None:
        present = [value for value in values if value is not None]
        return torch.cat(present, 1) if present else None

    return LatentDraws(
        {name: torch.cat([p.sites[name] for p in pieces], 1) for name in pieces[0].sites},
        batch,
        together([p.log_weights for p in pieces]),
        together([p.log_likelihood for p in pieces]),
        together([p.log_prior for p in pieces]),
        together([p.tokens for p in pieces]),
        pieces[0].exact,
    )


# ----------------------------------------------------------------------- prior, predictive


def prior_draws(
    model: Callable[..., Any],
    batch: MaskedBatch,
    num_draws: int = 500,
    *,
    seed: int | None = None,
    max_plate_nesting: int = 1,
    args: tuple[Any, ...] = (),
) -> LatentDraws:
    """Latents of rows from the prior in their states, and what the model writes with each.

    Args as in :func:`posterior_draws`; ``batch`` needs no data.

    Returns:
        :class:`LatentDraws` with sites and ``tokens``: the rows with all masked positions written
        in one step.
    """
    check_size("num_draws", num_draws)
    with seeded(seed), evaluation(model):
        return _generated(model, batch, None, num_draws, max_plate_nesting, args)


def _generated(
    model: Any,
    batch: MaskedBatch,
    values: Mapping[str, Tensor] | None,
    num_draws: int,
    row_plates: int,
    args: tuple[Any, ...],
) -> LatentDraws:
    """Run the model forward on every row, with latents given or drawn."""
    pieces = []
    per_row = batch.x_t.shape[1] * (int(batch.x_t.max()) + 1) * num_draws
    size = max(1, _CHUNK // per_row)
    for start in range(0, len(batch), size):
        rows = batch[start : start + size]
        empty = rows.without_data()
        held = None
        if values is not None:
            held = {name: value[:, start : start + size] for name, value in values.items()}
        recorder = Replay(held, None, -2 - row_plates)
        sites = run(model, recorder, empty, *args, inside=particles(num_draws, row_plates)).sites
        if "x_0" not in sites:
            raise ValueError(f"the model has no site 'x_0'; it has {sorted(sites)}")
        shape = (num_draws, len(rows))
        plate = data_plate(sites["x_0"])
        latents = {}
        log_prior = torch.zeros(shape, device=rows.x_t.device)
        for name, site in sites.items():
            if name == "x_0" or site.observed:
                continue
            if not is_row_site(site, plate, len(rows)):
                raise ValueError(
                    f"site {name!r} stands outside the data plate: draws are per row; condition it"
                )
            latents[name] = kept(site, *shape)
            log_prior = log_prior + site.log_prob().reshape(num_draws, -1, len(rows)).sum(1)
        tokens = kept(sites["x_0"], *shape)
        tokens = torch.where(rows.masked, tokens, rows.x_t)
        pieces.append(LatentDraws(latents, rows, None, None, log_prior, tokens))
    return _joined(pieces, batch)


def posterior_predictive(
    model: Callable[..., Any],
    batch: MaskedBatch,
    num_draws: int = 500,
    *,
    guide: Callable[..., Any] | None = None,
    process: MaskingProcess | None = None,
    num_steps: int = 1,
    seed: int | None = None,
    max_plate_nesting: int = 1,
    args: tuple[Any, ...] = (),
) -> Tensor:
    """What the model writes in the masked positions of rows.

    Without a guide these are completions: nothing but the visible tokens is known, and latents
    come from the prior in that state. With a guide they are reconstructions: latents come from the
    guide, which has seen the data.

    Args:
        model: a step program.
        batch: partly masked rows; with a guide, with data.
        num_draws: completions of each row, ``S``.
        guide: for reconstructions.
        process: the forward process, needed for more than one step.
        num_steps: network calls of a completion; the sampler enters at the time of each row.
        seed: seed of this call; None draws on torch's global state.
        max_plate_nesting: depth of the plates of the programs.
        args: further arguments of the programs.

    Returns:
        ``(S, B, D)`` long, visible tokens as they are.
    """
    check_size("num_draws", num_draws)
    check_size("num_steps", num_steps)
    if num_steps > 1:
        if guide is not None:
            raise ValueError(
                f"num_steps is {num_steps} and a guide is given: reconstructions take one step"
            )
        if process is None:
            raise ValueError(
                f"num_steps is {num_steps}: expected the process, whose steps they are"
            )
        x = sample(
            model,
            process,
            num_draws,
            num_steps,
            x_start=batch.x_t,
            t_start=batch.t,
            seed=seed,
            args=args,
        )
        return x.reshape(len(batch), num_draws, -1).transpose(0, 1)
    with seeded(seed), evaluation(model):
        values = None
        if guide is not None:
            options: dict[str, Any] = {"max_plate_nesting": max_plate_nesting, "args": args}
            values = posterior_draws(model, guide, batch, num_draws, **options).sites
        generated = _generated(model, batch, values, num_draws, max_plate_nesting, args)
    assert generated.tokens is not None
    return generated.tokens
