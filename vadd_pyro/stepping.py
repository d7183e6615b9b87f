"""One step of a sampler: a step program run forward on some of the rows.

A program is run as it stands, under one handler that decides what happens at its sites: latents
are drawn, replayed or drawn anew, and tokens are drawn at the positions that the step reveals and
nowhere else. Their logits are asked for at those positions alone, which a decoder may use
(:class:`~vadd_pyro.distributions.DeferredLogits`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vadd_pyro.distributions import (
    check_vocabulary,
    draw_categorical,
    position_logits,
    token_logits,
)
from vadd_pyro.nn.memory import Change, RowMemory
from vadd_pyro.orders import Pick
from vadd_pyro.process import MaskedBatch, MaskingProcess
from vadd_pyro.recorder import Recorder, Site
from vadd_pyro.sites import data_plate, is_row_site
from vadd_pyro.tempering import Tempering

__all__ = ["Generator", "Latents", "Rows"]


class Generator(Recorder):
    """Runs a program forward and draws its tokens only where they are wanted; then holds the rows
    ``x``, which of their positions are ``masked``, and, if it has drawn some of them only, the
    ``index`` of those.

    Args:
        batch: what the program is run on; tokens are drawn at its targets, unless ``pick`` says
            otherwise.
        vocab_size: ``K``.
        replay: values of latents drawn before.
        redraw: rows that draw their latents anew, ``(B,)`` bool, and the names of those; None
            keeps what ``replay`` has.
        pick: chooses the positions to reveal once the logits are known.
    """

    def __init__(
        self,
        batch: MaskedBatch,
        vocab_size: int,
        replay: dict[str, Tensor] | None = None,
        redraw: tuple[Tensor, set[str]] | None = None,
        pick: Pick | None = None,
    ) -> None:
        super().__init__(replay)
        self.batch = batch
        self.vocab_size = vocab_size
        self.redraw = redraw
        self.pick = pick
        self.found = False
        self.x = batch.x_t
        self.masked = batch.masked
        self.index: Tensor | None = None

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and msg["name"] == "x_0":
            if msg["value"] is None and not msg["done"]:
                msg["value"] = self._draw(msg["fn"])
                msg["done"] = True
            else:
                self._write(self.batch.target, msg["value"])
            self.found = True
            return
        super()._process_message(msg)
        if self.redraw is not None and msg["type"] == "sample" and not msg["is_observed"]:
            rows, names = self.redraw
            if msg["name"] in names:
                where = rows.reshape((-1,) + (1,) * len(msg["fn"].event_shape))
                msg["value"] = torch.where(where, msg["fn"](), msg["value"])

    def _draw(self, fn: Any) -> Tensor:
        """Tokens ``(B, D)``, drawn where they are wanted and zero elsewhere."""
        batch, wanted = self.batch, self.batch.target
        length = wanted.shape[1]
        if self.pick is not None:
            logits = token_logits(fn)
            check_vocabulary(logits, self.vocab_size)
            logits = logits.expand(*wanted.shape, self.vocab_size)
            drawn, wanted = self.pick(logits, batch)
            if drawn is not None:
                self._write(wanted, drawn)
                return drawn
        index = None
        if int(wanted.count_nonzero()) < wanted.numel():
            index = wanted.reshape(-1).nonzero().squeeze(-1)
        logits = position_logits(fn, index, (len(batch), length))
        check_vocabulary(logits, self.vocab_size)
        drawn = self.tokens_from(logits, index)
        if index is None:
            tokens = drawn.view(-1, length)
            self.x, self.masked = tokens, torch.zeros_like(wanted)
            return tokens
        self.x = batch.x_t.clone()
        self.x.view(-1).index_copy_(0, index, drawn)
        self.index = index
        self.masked = batch.masked & ~wanted
        tokens = torch.zeros_like(self.x)
        tokens.view(-1).index_copy_(0, index, drawn)
        return tokens

    def tokens_from(self, logits: Tensor, index: Tensor | None) -> Tensor:
        """Tokens ``(n,)`` of chosen positions, of all if ``index`` is None; here they are drawn.

        Args:
            logits: ``(n, K)``, up to a number for each position.
            index: into the ``B D`` positions, ``(n,)``.
        """
        return draw_categorical(logits)

    def _write(self, wanted: Tensor, tokens: Tensor) -> None:
        self.x = torch.where(wanted, tokens, self.batch.x_t)
        self.masked = self.batch.masked & ~wanted


class Latents(NamedTuple):
    """What becomes of latents from step to step.

    Args:
        refresh: probability that a row draws its latents anew; 1 is fresh, 0 shared.
        temperature: of the latents' distributions.
        common: values of latents outside the data plate, drawn once for all.
    """

    refresh: float
    temperature: float
    common: dict[str, Tensor]


class Rows:
    """A chunk of rows on its way from masks to tokens, with the latents that it keeps.

    Args:
        model: a step program.
        process: its forward process.
        x: rows, ``(B, D)``, as they start; they may be written to.
        latents: see :class:`Latents`.
        args: further arguments of the program.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        process: MaskingProcess,
        x: Tensor,
        latents: Latents,
        args: tuple[Any, ...],
    ) -> None:
        self.model = model
        self.process = process
        self.x = x
        self.masked = x == process.mask_id
        self.latents = latents
        self.args = args
        self.memory = RowMemory(len(x))
        self.kept: dict[str, tuple[Tensor, int]] = {}  # values, and the dimension of their rows
        # Drawn where the chain starts, even in rows in which the first step reveals nothing.
        self.starting = latents.refresh < 1 and bool(self.masked.any())

    def advance(self, rows: Tensor, t: Tensor, target: Tensor, pick: Pick | None = None) -> None:
        """Take some rows through one step.

        Args:
            rows: which, an increasing index tensor ``(n,)``.
            t: their times, ``(n,)``.
            target: positions to reveal, ``(n, D)`` bool; with ``pick``, those it may choose from.
            pick: chooses positions once the logits are known.
        """
        replay = {name: value.index_select(dim, rows) for name, (value, dim) in self.kept.items()}
        redraw = None
        if replay and self.latents.refresh > 0:
            chosen = torch.rand(len(rows), device=rows.device) < self.latents.refresh
            redraw = (chosen, set(replay))
        all_rows = len(rows) == len(self.x)
        x_t, masked = self.x, self.masked
        if not all_rows:
            x_t, masked = x_t.index_select(0, rows), masked.index_select(0, rows)
        batch = MaskedBatch(x_t, t, masked, target)
        temperature = self.latents.temperature
        generator = Generator(
            batch, self.process.vocab_size, {**self.latents.common, **replay}, redraw, pick
        )
        self.memory.rows, self.memory.shown = (None, x_t) if all_rows else (rows, None)
        tempering = nullcontext() if temperature == 1 else Tempering(temperature)
        with self.memory, generator, tempering:
            self.model(batch, *self.args)
        if not generator.found:
            raise ValueError(
                "the model has no site 'x_0' to generate tokens with; it has "
                f"{sorted(generator.sites)}"
            )
        self._keep(generator.sites, rows, redraw is not None)
        self.memory.change = None
        if all_rows:  # a program may hold on to what it was shown, so that is never written to
            self.x, self.masked = generator.x, generator.masked
            if generator.index is not None and not self.x.is_inference():
                self.memory.change = Change(x_t, self.x, self.x._version, generator.index)
        else:
            self.x.index_copy_(0, rows, generator.x)
            self.masked.index_copy_(0, rows, generator.masked)

    def _keep(self, sites: dict[str, Site], rows: Tensor, redrawn: bool) -> None:
        """Hold on to the values of latents that later steps use again."""
        plate = data_plate(sites["x_0"])
        for name, site in sites.items():
            if name == "x_0" or site.observed:
                continue
            if not is_row_site(site, plate, len(rows)):
                self.latents.common.setdefault(name, site.value)
            elif redrawn and name in self.kept:
                value, dim = self.kept[name]
                value.index_copy_(dim, rows, site.value)
            elif self.starting:
                self.kept[name] = (site.value.clone(), -1 - site.fn.event_dim)
        self.starting = False
