r"""Joint laws of masked tokens given a state, the latent integrated out.

.. math::
    J(x_M \mid x_t) = \int p(z \mid x_t, t) \prod_{j \in M} \mu_j(x_j \mid x_t, z, t)\, dz

Discrete latents are summed, a chain of codes along the row by its recursion; continuous ones are
integrated over scrambled Sobol points carried to their prior by its quantiles or its own
``transport`` (Owen 1998), others over random draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions import Gamma, Independent, MixtureSameFamily, StudentT
from torch import Tensor
from torch.quasirandom import SobolEngine

from vadd_pyro.chains import chain_of, joint_along_row
from vadd_pyro.distributions import token_logits
from vadd_pyro.process import MaskedBatch, MaskingProcess
from vadd_pyro.recorder import Recorder, Site
from vadd_pyro.sampling import seeded
from vadd_pyro.sites import PARTICLES, data_plate, is_row_site

__all__ = ["Integrator", "Joints", "KeptOverTime", "Latents"]

_SOBOL_COLUMNS = 64
_LEAST_DRAWS = 256
_PROBES = 8  # points at which a model is asked whether it looks at the time
_CHUNK = 2**21  # elements of the widest tensor: small enough to stay near the processor


class Integrator(Recorder):
    """Runs a program over many latents at once: supports of discrete sites, points for others.

    Args:
        points: points of the unit cube, ``(Z, columns)``.
        values: latents to use instead, by name.
        by_position: lay out the codes of a chain along the row position by position.
    """

    def __init__(
        self,
        points: Tensor,
        values: Mapping[str, Tensor] | None = None,
        by_position: bool = False,
    ) -> None:
        super().__init__(
            values, enumerate_sites=lambda msg: True, first_dim=-3, by_position=by_position
        )
        self.points = points
        self.column = 0
        self.logits: Tensor | None = None

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and msg["name"] == "x_0" and msg["value"] is None:
            self.logits = token_logits(msg["fn"])
            msg["value"] = self.logits[..., 0].long()
            msg["done"] = True
            return
        super()._process_message(msg)
        latent = msg["type"] == "sample" and hasattr(msg["fn"], "event_shape")
        if latent and msg["value"] is None and not msg["done"]:
            value = self._place(msg["fn"])
            if value is not None:
                msg["value"] = value
                msg["done"] = True

    def _place(self, fn: Any) -> Tensor | None:
        """Points of the unit cube pushed through the inverse distribution function of ``fn``.

        None if it has none.
        """
        needed = getattr(fn, "num_uniforms", None)
        if needed is None:
            needed = fn.event_shape.numel() + isinstance(fn, MixtureSameFamily)
        if self.column + needed > self.points.shape[-1]:
            return None
        u = self.points[:, None, self.column : self.column + needed]
        u = u.clamp(1e-7, 1 - 1e-7).to(torch.get_default_dtype())
        try:
            value = _inverse_cdf(fn, u)
        except NotImplementedError:
            return None
        self.column += needed
        return value.expand(fn.batch_shape + fn.event_shape)


def _inverse_cdf(fn: Any, u: Tensor) -> Tensor:
    """Quantiles of ``fn`` at ``u (Z, 1, coordinates)``, ``(..., Z, B) + event_shape``."""
    if hasattr(fn, "transport"):
        return fn.transport(u)
    if isinstance(fn, MixtureSameFamily):
        components = fn.component_distribution
        cdf = fn.mixture_distribution.probs.cumsum(-1)
        pick = (cdf <= u[..., :1] * cdf[..., -1:]).sum(-1, keepdim=True)
        quantiles = _inverse_cdf(components, u[..., 1:].unsqueeze(-2))
        event = len(fn.event_shape)
        index = pick.reshape(pick.shape + (1,) * event)
        index = index.expand(pick.shape + tuple(fn.event_shape))
        quantiles = quantiles.expand(pick.shape[:-1] + quantiles.shape[-1 - event :])
        return quantiles.gather(-1 - event, index).squeeze(-1 - event)
    if isinstance(fn, Independent):
        return _icdf(fn.base_dist, u.reshape(u.shape[:-1] + tuple(fn.event_shape)))
    if len(fn.event_shape) == 0:
        return _icdf(fn, u.squeeze(-1))
    raise NotImplementedError


def _icdf(fn: Any, u: Tensor) -> Tensor:
    """Quantiles of a law of numbers; torch lacks some, which scipy has."""
    if isinstance(fn, StudentT):
        from scipy.special import stdtrit

        return fn.loc + fn.scale * _special(stdtrit, fn.df, u)
    if isinstance(fn, Gamma):
        from scipy.special import gammaincinv

        return _special(gammaincinv, fn.concentration, u) / fn.rate
    return fn.icdf(u)


def _special(function: Callable[..., Any], parameter: Tensor, u: Tensor) -> Tensor:
    """A function of scipy at a parameter and points, broadcast."""
    values = function(parameter.detach().cpu().numpy(), u.cpu().numpy())
    return torch.as_tensor(values).to(u)


class Latents(NamedTuple):
    """A finite law that stands for a prior's: points with weights.

    Args:
        values: latents by site, ``(M, 1)`` before their event.
        weights: probabilities, ``(M,)`` in double precision.
    """

    values: dict[str, Tensor]
    weights: Tensor


class KeptOverTime:
    """Values computed at one time and used at others where the model says the same."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, ...], tuple[float, list[Tensor] | None, Tensor]] = {}

    def __call__(
        self,
        key: tuple[int, ...],
        t: float,
        probe: Callable[[float], list[Tensor]],
        compute: Callable[[], Tensor],
    ) -> Tensor:
        """The value of ``key`` at ``t``.

        Args:
            key: what it belongs to.
            t: the time.
            probe: some of what the model says at a time, by which two times are told apart.
            compute: makes the value at ``t``.
        """
        if key in self._held:
            at, said, value = self._held[key]
            if at == t:
                return value
            if said is None:
                said = probe(at)
                self._held[key] = (at, said, value)
            if _agree(said, probe(t)):
                return value
        value = compute()
        self._held[key] = (t, None, value)
        return value


def _agree(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether two probes say the same."""
    return len(first) == len(second) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=1e-7)
        for a, b in zip(first, second, strict=True)
    )


class Joints:
    """Joint laws of masked tokens, for all states with the same open positions at once.

    A joint is kept, and computed again at another time only if the model says something else
    there at any of its states, at a few points.

    Args:
        model: a step program.
        process: its forward process.
        base: a row ``(D,)`` that holds the tokens which never change.
        num_draws: points over which a continuous latent is integrated at a state; fewer where
            there are many states.
        seed: scrambling of the points.
        args: further arguments of the program.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        process: MaskingProcess,
        base: Tensor,
        num_draws: int,
        seed: int,
        args: tuple[Any, ...],
    ) -> None:
        self.model = model
        self.process = process
        self.base = base
        self.args = args
        self.num_draws = num_draws
        self.seed = seed
        self.continuous: bool | None = None  # whether there is a latent to integrate
        self._kept = KeptOverTime()

    def _points(self, num_states: int) -> Tensor:
        return self._sobol(max(_LEAST_DRAWS, int(self.num_draws / num_states**0.5)))

    def _sobol(self, number: int) -> Tensor:
        """Points of the unit cube, a power of two; one without coordinates if none is used."""
        if self.continuous is None:
            nothing = self.base.new_zeros((1, 0), dtype=torch.double)
            everything = self.states([], list(range(self.process.length)))
            _, latents = self._run(everything, nothing, 1.0, by_position=True)
            self.continuous = any(site.enum_dim is None for site in latents)
        if not self.continuous:
            return self.base.new_zeros((1, 0), dtype=torch.double)
        number = 2 ** max(0, (number - 1).bit_length())
        engine = SobolEngine(_SOBOL_COLUMNS, scramble=True, seed=self.seed)
        return engine.draw(number, dtype=torch.double).to(self.base.device)

    def states(self, visible: list[int], masked: list[int]) -> Tensor:
        """All states with these masked positions, ``(K ** len(visible), D)`` in lexicographic
        order.
        """
        vocab, device = self.process.vocab_size, self.base.device
        num_states = vocab ** len(visible)
        x = self.base.repeat(num_states, 1)
        x[:, masked] = self.process.mask_id
        if visible:
            grids = [torch.arange(vocab, device=device)] * len(visible)
            x[:, visible] = torch.cartesian_prod(*grids).reshape(num_states, len(visible))
        return x

    def __call__(self, visible: list[int], masked: list[int], t: float) -> Tensor:
        """The joint of every state, rows in lexicographic order.

        ``(K ** len(visible), K ** len(masked))`` in double precision.
        """
        x = self.states(visible, masked)
        return self._kept(
            tuple(masked),
            t,
            lambda at: self.probe(x, self._points(len(x)), at),
            lambda: self._joint(x, masked, t),
        )

    def _joint(self, x: Tensor, masked: list[int], t: float) -> Tensor:
        """The joint of the states ``x (n, D)``, ``(n, K ** len(masked))``."""
        points = self._points(len(x))
        z_chunk, x_chunk = self._chunks(len(points))
        pieces: list[Tensor] = []
        for rows in x.split(x_chunk):
            total = torch.zeros((), dtype=torch.double, device=x.device)
            for piece in points.split(z_chunk):
                total = total + self._partial(rows, piece, masked, t)
            pieces.append(total / len(points))
        joint = torch.cat(pieces)
        return joint / joint.sum(-1, keepdim=True)

    def _chunks(self, num_points: int) -> tuple[int, int]:
        """How many points and states to run at once."""
        width = self.process.length * self.process.vocab_size + 256
        z_chunk = max(1, min(num_points, _CHUNK // width))
        return z_chunk, max(1, _CHUNK // (width * z_chunk))

    def probe(
        self, x: Tensor, points: Tensor, t: float, values: Mapping[str, Tensor] | None = None
    ) -> list[Tensor]:
        """What the model says at a time: at all states, at a few points or values."""
        said: list[Tensor] = []
        few = points[:_PROBES]
        some = None if values is None else {n: value[:_PROBES] for n, value in values.items()}
        for rows in x.split(self._chunks(_PROBES)[1]):
            with seeded(self.seed):
                logits, latents = self._run(rows, few, t, some, by_position=some is None)
            said += [logits, *(site.log_prob() for site in latents)]
        return said

    def _run(
        self,
        x: Tensor,
        points: Tensor,
        t: float,
        values: Mapping[str, Tensor] | None = None,
        by_position: bool = False,
    ) -> tuple[Tensor, list[Site]]:
        """Logits ``(..., D, K)`` of the states ``x (n, D)`` at latents placed at the points, or at
        the values given, and the latent sites.
        """
        is_masked = x == self.process.mask_id
        times = torch.full((len(x),), t, device=x.device)
        batch = MaskedBatch(x, times, is_masked, is_masked)
        number = len(points)
        if values is not None:
            number = next((len(value) for value in values.values()), 1)
        with Integrator(points, values, by_position) as run, pyro.plate(PARTICLES, number, dim=-2):
            self.model(batch, *self.args)
        if run.logits is None:
            raise ValueError(f"the model has no site 'x_0'; it has {sorted(run.sites)}")
        latents = [s for name, s in run.sites.items() if name != "x_0" and not s.observed]
        drawn = [site.name for site in latents if site.enum_dim is None]
        if values is None and self.continuous is False and drawn:
            if getattr(run.sites[drawn[0]].fn, "sums_by_position", False):
                raise ValueError(
                    f"{drawn[0]!r} is a chain along the row with too many combinations to be laid "
                    "out, as one draw for all steps needs: take latent='fresh'"
                )
            raise ValueError(
                f"the latent {drawn[0]!r} is drawn at t = {t:g} in states with visible tokens, "
                "but not where everything is masked: an exact law needs a program with the same "
                "sites everywhere"
            )
        plate = data_plate(run.sites["x_0"])
        for site in latents:
            if not is_row_site(site, plate, len(x)):
                raise ValueError(
                    f"the latent {site.name!r} stands outside the data plate: the sampler draws "
                    "it once for all rows and steps, so that p_T is no law of one row; condition "
                    "it"
                )
        return run.logits, latents

    def _partial(self, x: Tensor, points: Tensor, masked: list[int], t: float) -> Tensor:
        """Sum over the given points of the weighted products, ``(n, K ** m)``."""
        logits, latents = self._run(x, points, t, by_position=True)
        chain = chain_of(latents)
        if chain is not None and len(latents) == 1:
            return joint_along_row(chain, logits, masked)
        if chain is not None:
            logits, latents = self._run(x, points, t)
        mu = torch.softmax(logits[..., masked, :].double(), -1)
        log_weight = mu.new_zeros((1, 1))
        for site in latents:
            if site.enum_dim is not None:
                log_weight = log_weight + site.log_prob()
        shape = torch.broadcast_shapes(mu.shape[:-2], log_weight.shape, (len(points), len(x)))
        mu = mu.expand(shape + mu.shape[-2:]).reshape(-1, *mu.shape[-3:])
        weight = log_weight.exp().expand(shape).reshape(-1, len(x), 1)
        mu = mu.transpose(0, 1)  # (n, Z, m, K)
        half = (len(masked) + 1) // 2
        left, right = weight.transpose(0, 1), mu.new_ones((*mu.shape[:2], 1))
        for j in range(len(masked)):
            side = left if j < half else right
            side = (side.unsqueeze(-1) * mu[:, :, j].unsqueeze(-2)).flatten(-2)
            left, right = (side, right) if j < half else (left, side)
        return (left.transpose(1, 2) @ right).flatten(1)

    # ------------------------------------------------------------- one latent for a whole chain

    def latents(self, x: Tensor, t: float, num_points: int) -> Latents:
        """The prior at one state ``x (1, D)`` as points with weights."""
        points = self._sobol(num_points)
        _, sites = self._run(x, points, t)
        number = (max(len(points), 1), 1)
        shape = torch.broadcast_shapes(number, *(site.fn.batch_shape for site in sites))
        shape = torch.broadcast_shapes(
            shape, *(s.value.shape[: s.value.dim() - s.fn.event_dim] for s in sites)
        )
        log_weight = torch.zeros(shape, dtype=torch.double, device=x.device)
        values = {}
        for site in sites:
            event = tuple(site.fn.event_shape)
            values[site.name] = site.value.expand(shape + event).reshape(-1, 1, *event)
            if site.enum_dim is not None:
                log_weight = log_weight + site.log_prob()
        return Latents(values, log_weight.flatten().softmax(0))

    def factors(
        self, x: Tensor, masked: list[int], t: float, values: Mapping[str, Tensor]
    ) -> Tensor:
        """Laws of single tokens at given latents, ``(M, n, m, K)`` in double precision."""
        number = next((len(value) for value in values.values()), 1)
        nothing = self.base.new_zeros((1, 0), dtype=torch.double)
        _, x_chunk = self._chunks(number)
        pieces = []
        for rows in x.split(x_chunk):
            logits, _ = self._run(rows, nothing, t, values)
            logits = logits[..., masked, :].expand(number, len(rows), len(masked), -1)
            pieces.append(torch.softmax(logits.double(), -1))
        return torch.cat(pieces, 1)
