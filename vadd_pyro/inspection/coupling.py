r"""What a latent couples in single rows: the log-ratio of a joint law to the product of its
marginals, estimated.

In a state :math:`x_t` with masked positions ``M``,

.. math::
    \log p(x_M \mid x_t) - \sum_{j \in M} \log p(x_j \mid x_t), \qquad
    p(x_M \mid x_t) = \int p(z \mid x_t) \prod_{j \in M} \mu_j(x_j \mid x_t, z)\, dz .

Laws of single tokens are averages of the decoder over ``P`` draws of the prior. The joint takes
``G`` of these and ``G`` draws of the guide, and weighs all by the balance heuristic of multiple
importance sampling (Veach and Guibas 1995), which no guide, however narrow, can spoil,

.. math::
    \hat p(x_M \mid x_t) = \frac1G \sum_z \frac{p(x_M \mid z)\, p(z)}{p(z) + r(z \mid x_M)} .

The logarithm of an average is too low in expectation. For tokens that the model itself made, the
latent :math:`z^*` that made them is a draw of their posterior, and an average that takes it in has
a logarithm that is too high (Grosse et al. 2015; Wu et al. 2017). So every logarithm lies between
two; the value is the middle, where the errors of plain averages cancel to first order. For the
data's tokens there is no such latent: the joint is left too low, and the marginals are corrected
by their estimated error, :math:`\mathrm{Var}[\mu_j] / (2 P p_j^2)`. Codes that are summed out
leave no error at all.

References:
    Veach and Guibas 1995, "Optimally combining sampling techniques"; Grosse et al. 2015 (arXiv
    1511.02543); Wu et al. 2017 (arXiv 1611.04273).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vadd_pyro.distributions import draw_categorical, token_logits
from vadd_pyro.inspection.aggregate import sites_with_density
from vadd_pyro.inspection.scoring import Replay, guide_log_density, kept, particles
from vadd_pyro.process import MaskedBatch
from vadd_pyro.recorder import Recorder, Site, run
from vadd_pyro.sites import check_pair, data_plate, is_row_site

__all__ = ["Coupling", "Ratios"]

_MOST_SUPPORTS = 4096  # combinations of codes that are summed out though the guide draws them
_CHUNK = 2**22  # logits held at once
_SHARED = 2**20  # those of a state that many rows share


class Ratios(NamedTuple):
    """Log-ratios of joint and marginals in rows, ``(B,)`` nats each in double precision.

    Args:
        value: at tokens that the model made, one draw a row.
        lower, upper: the same, too low and too high in expectation.
        data: at the data's tokens.
        shared: a scalar: variance that the sum of ``data`` has beyond that of its rows, from draws
            of the prior that rows of one state have in common.
    """

    value: Tensor
    lower: Tensor
    upper: Tensor
    data: Tensor
    shared: Tensor


class _Written(NamedTuple):
    """What a model says in ``U`` states at ``S`` latents each, ``C`` combinations of codes laid
    out.

    Args:
        values: latents that are not summed out, ``(S, U) + event``.
        log_prior: their log-density, ``(S, U)``.
        log_code: log-probabilities of the codes given them, ``(C, S, U)``.
        log_mu: log-probabilities of tokens, ``(C, S, U, D, K)``.
    """

    values: dict[str, Tensor]
    log_prior: Tensor
    log_code: Tensor
    log_mu: Tensor

    def marginals(self) -> Tensor:
        """Laws of single tokens given the latents, ``(S, U, D, K)``."""
        if len(self.log_mu) == 1:
            return self.log_mu[0].exp()
        return torch.einsum("csu,csudk->sudk", self.log_code.exp(), self.log_mu.exp())

    def joint(self, x: Tensor, masked: Tensor, state: Tensor, point: Tensor) -> Tensor:
        """``log p(x_M | z)`` of rows ``(R, D)`` in states ``(R,)`` at latents of the numbers
        ``point (n, R)``, ``(n, R)`` in double precision.
        """
        position = torch.arange(x.shape[1], device=x.device)
        log_mu = self.log_mu[:, point.unsqueeze(-1), state.unsqueeze(-1), position, x]
        log_mu = torch.where(masked, log_mu, 0.0).sum(-1)
        return (log_mu + self.log_code[:, point, state]).double().logsumexp(0)


class _Writer(Replay):
    """Runs a model forward and keeps the logits of its tokens."""

    logits: Tensor | None = None

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and msg["name"] == "x_0" and msg["value"] is None:
            self.logits = token_logits(msg["fn"])
            msg["value"] = self.logits[..., 0].long()
            msg["done"] = True
            return
        super()._process_message(msg)


class Coupling:
    """A pair of programs, asked what its latents couple.

    Args:
        model, guide: a step program and its guide.
        probe: a row with data, at which they are looked at.
        row_plates: depth of the plates of the programs.
        args: further arguments of the programs.

    Raises:
        ValueError: for a pair that does not fit.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        probe: MaskedBatch,
        row_plates: int,
        args: tuple[Any, ...],
    ) -> None:
        self.model = model
        self.guide = guide
        self.row_plates = row_plates
        self.args = args
        inferred = run(guide, Recorder(first_dim=-1 - row_plates), probe, *args)
        own = inferred.latent_values()
        rest = Recorder(own, lambda msg: True, -1 - row_plates)
        check_pair(inferred, run(model, rest, probe, *args))
        sites = run(model, Recorder(None, lambda msg: True, -1 - row_plates), probe, *args).sites
        latents = {name: site for name, site in sites.items() if not site.observed}
        plate = data_plate(sites["x_0"])
        for name, site in latents.items():
            if not is_row_site(site, plate, len(probe)):
                raise ValueError(
                    f"site {name!r} stands outside the data plate: what a latent couples is a "
                    "matter of single rows; condition it"
                )
        supports = math.prod(len(s.value) for s in latents.values() if s.enum_dim is not None)
        codes = {name for name, site in latents.items() if site.enum_dim is not None}
        if codes != latents.keys() or supports > _MOST_SUPPORTS:
            codes -= own.keys()
        self.has_latents = bool(latents)
        self.summed = [name for name in latents if name in codes]
        self.drawn = [name for name in latents if name not in codes]
        self.supports = math.prod(len(latents[name].value) for name in codes)
        self.asked = bool(self.drawn) and bool(sites_with_density(guide, probe, args))

    # ------------------------------------------------------------------ the model

    def _write(
        self, states: MaskedBatch, number: int, values: dict[str, Tensor] | None = None
    ) -> _Written:
        """Run the model in every state at latents given or drawn from the prior."""
        first_dim = -2 - self.row_plates
        shape = (number, len(states))
        inside = particles(number, self.row_plates)
        if values is None and self.drawn and self.summed:
            # Drawn together with the codes, which are then summed out at what was drawn.
            writer = _Writer(None, None, first_dim)
            sites = run(self.model, writer, states, *self.args, inside=inside).sites
            values = {name: kept(sites[name], *shape) for name in self.drawn}
            inside = particles(number, self.row_plates)
        writer = _Writer(values, lambda msg: msg["name"] in self.summed, first_dim)
        sites = run(self.model, writer, states, *self.args, inside=inside).sites
        if writer.logits is None:
            raise ValueError(f"the model has no site 'x_0' to write; it has {sorted(sites)}")
        log_joint = torch.zeros(
            (number,) + (1,) * (self.row_plates - 1) + (len(states),), device=states.x_t.device
        )
        for name in self.drawn + self.summed:
            log_joint = log_joint + self._by_row(sites[name])
        lead = torch.broadcast_shapes(writer.logits.shape[:-2], log_joint.shape)
        size = writer.logits.shape[-2:]
        log_joint = log_joint.expand(lead).reshape(-1, *shape)
        log_prior = log_joint.logsumexp(0)
        return _Written(
            values or {name: kept(sites[name], *shape) for name in self.drawn},
            log_prior,
            log_joint - log_prior,
            writer.logits.log_softmax(-1).expand(*lead, *size).reshape(-1, *shape, *size),
        )

    def _by_row(self, site: Site) -> Tensor:
        """A site's log-density, summed over plates inside that of the rows."""
        value = site.log_prob() if site.enum_dim is None else site.log_weight()
        for dim in range(-self.row_plates, -1):
            if value.dim() >= -dim:
                value = value.sum(dim, keepdim=True)
        return value

    # ------------------------------------------------------------------ ratios

    def ratios(self, batch: MaskedBatch, num_draws: int, num_particles: int) -> Ratios:
        """What is coupled in the states of rows.

        Args:
            batch: rows with data, each with masked positions.
            num_draws: draws of the prior for each row, ``P``; equal states share theirs.
            num_particles: draws of the guide for each row, ``G``, and of those of the prior that
                are weighed against them: each costs a density of the guide.
        """
        keys = torch.cat([batch.x_t.double(), batch.t.double().unsqueeze(-1)], -1)
        _, state, counts = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
        order = state.argsort(stable=True)
        ends = counts.cumsum(0)
        first = order[ends - counts]
        result = torch.zeros(len(batch), 4, dtype=torch.double, device=batch.x_t.device)
        shared = result.new_zeros(())
        width = self.supports * batch.x_t.shape[1] * (int(batch.x_t.max()) + 1)
        points = 1
        if self.drawn:
            share = num_draws * len(batch) // len(counts)
            points = max(num_draws, min(share, _SHARED // width))
        size = max(1, _CHUNK // (width * points))
        row_size = max(1, _CHUNK // (width * (num_draws + num_particles if self.drawn else 1)))
        for start in range(0, len(counts), size):
            chosen = first[start : start + size]
            written = self._write(batch[chosen].without_data(), points)
            law = written.marginals()
            spread, mean = torch.var_mean(law, 0, correction=min(1, points - 1))
            low = int(ends[start] - counts[start])
            high = int(ends[min(start + size, len(counts)) - 1])
            among = counts[start : start + size]
            shared = shared + _shared_variance(batch[order[low:high]], law, mean, among)
            for rows in order[low:high].split(row_size):
                some = _Some(batch[rows], state[rows] - start, written, mean, spread, points)
                result[rows] = self._of_rows(some, num_draws, num_particles)
        value, lower, upper, data = result.unbind(-1)
        return Ratios(value, lower, upper, data, shared)

    def _of_rows(self, some: _Some, num_draws: int, num_particles: int) -> Tensor:
        """Value, lower, upper and data's ratio of some rows, ``(R, 4)``."""
        batch, masked = some.batch, some.batch.masked
        own = self._write(batch.without_data(), 1)
        x = torch.where(masked, _tokens(own), batch.x_t)
        made = replace(batch, x_0=x, weight=None)
        low, high = self._log_joint(made, some, own, num_draws, num_particles)
        law = _picked(some.mean[some.state], x)
        below = torch.where(masked, law.log(), 0.0).sum(-1)
        above = below
        if self.drawn:
            included = (some.points * law + _picked(own.marginals()[0], x)) / (some.points + 1)
            above = torch.where(masked, included.log(), 0.0).sum(-1)
        data, _ = self._log_joint(batch, some, None, num_draws, num_particles)
        assert batch.x_0 is not None
        law, spread = (_picked(t[some.state], batch.x_0) for t in (some.mean, some.spread))
        single = law.log() + spread / (2 * some.points * law**2)
        single = torch.where(masked, single, 0.0).sum(-1)
        value = (low + high - below - above) / 2
        return torch.stack([value, low - above, high - below, data - single], -1)

    def _log_joint(
        self,
        batch: MaskedBatch,
        some: _Some,
        own: _Written | None,
        num_draws: int,
        num_particles: int,
    ) -> tuple[Tensor, Tensor]:
        """``log p(x_M | x_t)`` of rows from below and, with the latents that made them, from
        above, ``(R,)`` each.
        """
        x, masked, state = batch.x_0, batch.masked, some.state
        assert x is not None
        number = min(num_particles if self.asked else num_draws, some.points)
        same = torch.arange(len(batch), device=x.device)
        each = torch.arange(max(number, num_particles), device=x.device).unsqueeze(-1)
        # Rows of one state take different draws, so that they do not err alike.
        point = (each[:number] + number * same) % some.points
        log_f = some.written.joint(x, masked, state, point)
        if not self.drawn:
            return log_f[0], log_f[0]
        points = {name: v[point, state] for name, v in some.written.values.items()}
        log_prior = some.written.log_prior[point, state]
        if own is not None:
            log_f = torch.cat([log_f, own.joint(x, masked, same, each[:1])])
            points = {name: torch.cat([v, own.values[name]]) for name, v in points.items()}
            log_prior = torch.cat([log_prior, own.log_prior])
        if self.asked:
            options: dict[str, Any] = {"max_plate_nesting": self.row_plates, "args": self.args}
            log_r = guide_log_density(self.guide, batch, points, **options)
            recorder = Recorder(first_dim=-2 - self.row_plates)
            inside = particles(num_particles, self.row_plates)
            sites = run(self.guide, recorder, batch, *self.args, inside=inside).sites
            shape = (num_particles, len(batch))
            values = {name: kept(sites[name], *shape) for name in self.drawn}
            guided = self._write(batch.without_data(), num_particles, values)
            log_g = torch.zeros(shape, device=x.device)
            for name in self.drawn:
                log_g = log_g + self._by_row(sites[name]).reshape(shape)
            log_f = torch.cat([guided.joint(x, masked, same, each[:num_particles]), log_f])
            ratio = torch.cat([log_g - guided.log_prior, log_r - log_prior]).double()
            log_f = log_f + math.log(2) - torch.logaddexp(torch.zeros_like(ratio), ratio)
        used = log_f if own is None else log_f[:-1]
        low = used.logsumexp(0) - math.log(len(used))
        return low, log_f.logsumexp(0) - math.log(len(log_f))


class _Some(NamedTuple):
    """Rows whose states were written together: which state each is in, the laws of single tokens
    there ``(U, D, K)``, their variance over latents, and how many latents these are from.
    """

    batch: MaskedBatch
    state: Tensor
    written: _Written
    mean: Tensor
    spread: Tensor
    points: int


def _shared_variance(batch: MaskedBatch, law: Tensor, mean: Tensor, counts: Tensor) -> Tensor:
    """Variance of the sum over rows of their marginals' logarithms, without that of single rows.

    To first order a row's error is the average over draws of ``sum_j mu_j / p_j``.

    Args:
        batch: rows with data, those of a state one after another.
        law: ``(P, U, D, K)``.
        mean: ``(U, D, K)``.
        counts: rows of each state, ``(U,)``.
    """
    if len(law) == 1 or int(counts.max()) == 1:
        return mean.new_zeros((), dtype=torch.double)
    assert batch.x_0 is not None
    state = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    each = torch.where(batch.masked, 1 / _picked(mean[state], batch.x_0), 0.0).to(mean)
    position = torch.arange(mean.shape[1], device=counts.device)
    weight = torch.zeros_like(mean)
    weight.index_put_((state.unsqueeze(-1), position, batch.x_0), each, accumulate=True)
    error = torch.einsum("sudk,udk->su", law, weight).double().var(0) / len(law)
    return (error * (1 - 1 / counts)).sum()


def _picked(law: Tensor, x: Tensor) -> Tensor:
    """The entries of ``law (R, D, K)`` at tokens ``(R, D)``, in double precision; visible tokens
    are looked up too, and left out later.
    """
    return law.double().gather(-1, x.unsqueeze(-1)).squeeze(-1)


def _tokens(own: _Written) -> Tensor:
    """Tokens drawn with each row's own latent, ``(R, D)``."""
    code = draw_categorical(own.log_code[:, 0].T.double())
    return draw_categorical(own.log_mu[code, 0, torch.arange(len(code), device=code.device)])
