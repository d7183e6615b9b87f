"""Latents that are chains along the row, summed out by their own recursion.

A law that says ``sums_by_position``, such as :class:`~vadd_pyro.distributions.CodeChain`, has a
code at each position. Its combinations are far too many to be laid out. Each code at all positions
at once is not, and where a token depends on the code of its own position alone, that is all that
the law needs to sum them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vadd_pyro.checkpoints import random_state, restore_random_state
from vadd_pyro.distributions import position_log_prob
from vadd_pyro.distributions.recursion import normalised
from vadd_pyro.process import MaskedBatch
from vadd_pyro.programs import evaluation
from vadd_pyro.recorder import Recorder, Site, run
from vadd_pyro.sites import plate_dims

__all__ = [
    "NotLocalError",
    "along_row",
    "chain_factors",
    "chain_of",
    "check_alone",
    "check_chain",
    "joint_along_row",
]

_ELEMENTS = 2**21  # of the widest tensor


class NotLocalError(ValueError):
    """A chain along the row that could not be summed out as such."""


def chain_of(sites: Iterable[Site]) -> Site | None:
    """The site that is laid out position by position; None without one."""
    return next((site for site in sites if site.by_position), None)


def check_alone(chain: Site, guide: Recorder, model: Recorder) -> None:
    """Check that a chain is the only latent.

    Raises:
        ValueError: naming it and what stands beside it.
    """
    others = [repr(name) for name in model.sites if name not in (chain.name, "x_0")]
    others += [f"the guide's {name!r}" for name, s in guide.sites.items() if not s.observed]
    if others:
        raise ValueError(
            f"{chain.name!r} is a chain along the row, which is summed out beside 'x_0' alone; "
            f"there is also {', '.join(others)}"
        )


def chain_factors(chain: Site, tokens: Site) -> Tensor:
    """Log-probabilities of each token under each code of its position, ``(..., D, C)``, zero where
    it is no target.
    """
    factor = position_log_prob(tokens.fn, tokens.value)
    dim = (chain.enum_dim or 0) - 1  # behind the positions
    size = len(chain.value)
    if factor.dim() < -dim:  # the tokens do not look at it
        factor = factor.expand(size, *(1,) * (-dim - 1 - factor.dim()), *factor.shape)
    return factor.expand(size, *factor.shape[1:]).movedim(0, -1)


def along_row(chain: Site, tokens: Site) -> Tensor:
    """Log-probability of the tokens, the chain summed out; unscaled, zero where masked."""
    if tokens.mask is False:
        return tokens.log_prob()
    return tokens.masked(chain.fn.summed_out(chain_factors(chain, tokens)))


def joint_along_row(chain: Site, logits: Tensor, masked: list[int]) -> Tensor:
    """The joint law of masked tokens in each of ``n`` states, the chain summed out.

    Args:
        chain: its site, laid out position by position.
        logits: ``(C, 1, n, D, K)``, or anything that broadcasts with it.
        masked: positions of the joint, increasing.

    Returns:
        ``(n, K ** m)`` in double precision, outcomes in lexicographic order.
    """
    size = len(chain.value)
    mu = torch.softmax(logits[..., masked, :].double(), -1)
    mu = mu.expand(size, *mu.shape[-4:]).reshape(size, *mu.shape[-3:]).permute(1, 2, 3, 0)
    potential = chain.fn.potential
    potential = potential.expand(*potential.shape[:-3], len(mu), *potential.shape[-2:])
    pairs, here, total = normalised(
        chain.fn.transition, potential.reshape(-1, *potential.shape[-2:])
    )
    at_once = max(1, _ELEMENTS // (size * mu.shape[2] ** len(masked)))
    pieces = []
    for rows in torch.arange(len(mu), device=mu.device).split(at_once):
        now, before = here[rows].unsqueeze(2), total[rows].unsqueeze(2)  # (n, D, 1, C)
        state = now[:, 0] / now[:, 0].sum(-1, keepdim=True)
        for i in range(now.shape[1]):
            if i:
                state = ((state / before[:, i]) @ pairs) * now[:, i]
            if i in masked:
                token = mu[rows, masked.index(i)].unsqueeze(1)  # (n, 1, K, C)
                state = (state.unsqueeze(2) * token).flatten(1, 2)
        pieces.append(state.sum(-1))
    return torch.cat(pieces)


def check_chain(
    model: Callable[..., Any],
    inferred: Recorder,
    generated: Recorder,
    batch: MaskedBatch,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> bool:
    """Check that a chain, if there is one, is the only latent, and that tokens depend on the codes
    of their own positions alone.

    Codes are drawn, all alike, and each token's log-probability is compared with that under its
    code at all positions. Takes no random numbers of the caller's. A network whose last layers
    start from zero has nothing to compare before training: check again later.

    Args:
        model: the step program.
        inferred, generated: what guide and model did on a batch.
        batch: rows to draw codes for.
        args, kwargs: further arguments of the program.

    Returns:
        Whether anything was compared: not without a chain or a masked position, nor where the same
        codes do not give the same law twice.

    Raises:
        NotLocalError: naming the site, for a model whose chain could not be summed out so.
        ValueError: for other latents.
    """
    chain = chain_of(generated.sites.values())
    if chain is None:
        return False
    check_alone(chain, inferred, generated)
    if getattr(model, "least_time", 0.0) > 0:
        raise NotLocalError(
            f"least_time = {model.least_time} needs one latent for the row, and "  # type: ignore[attr-defined]
            f"{chain.name!r} is a chain along the row: leave least_time at 0"
        )
    if any(dim != -1 for dim in plate_dims(chain)) or not bool(batch.masked.any()):
        return False
    batch = replace(batch, target=batch.masked)
    kwargs = {} if kwargs is None else kwargs
    random = random_state()
    try:
        with evaluation(model):
            everything = Recorder(None, lambda msg: True, by_position=True)
            laid_out = run(model, everything, batch, *args, **kwargs)
            chain = chain_of(laid_out.sites.values())
            assert chain is not None
            law = chain.fn
            shape = (*torch.broadcast_shapes(law.batch_shape, (len(batch),)), *law.event_shape)
            codes = torch.randint(law.num_codes, shape, device=chain.value.device)

            def of_codes() -> Tensor:
                again = run(model, Recorder({chain.name: codes}), batch, *args, **kwargs)
                tokens = again.sites["x_0"]
                return position_log_prob(tokens.fn, tokens.value)

            own, twice = of_codes(), of_codes()
    finally:
        restore_random_state(random)
    if not torch.allclose(own, twice, equal_nan=True):
        return False
    factor = chain_factors(chain, laid_out.sites["x_0"])
    factor = factor.expand(*shape, -1).gather(-1, codes.unsqueeze(-1)).squeeze(-1)
    if not torch.allclose(factor, own.expand_as(factor), rtol=1e-2, atol=1e-2, equal_nan=True):
        raise NotLocalError(
            f"{chain.name!r} is a chain along the row, but the law of a token depends on codes of "
            "other positions: it cannot be summed out; use a decoder that looks at each code at "
            "its own position, such as vadd_pyro.nn.LocalTransformerDecoder"
        )
    return True
