"""Latents that are chains along the row, summed out by their own recursion.

A law that says ``sums_by_position``, such as :class:`~vadd_pyro.distributions.CodeChain`, has a
code at each position. Its combinations are far too many to be laid out. Each code at all positions
at once is not, and where a token depends on the code of its own position alone, that is all that
the law needs to sum them out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vadd_pyro.checkpoints import random_state, restore_random_state
from vadd_pyro.distributions import position_log_prob
from vadd_pyro.process import MaskedBatch
from vadd_pyro.programs import evaluation
from vadd_pyro.recorder import Recorder, Site, run

__all__ = ["along_row", "chain_factors", "chain_of", "check_alone", "check_chain"]


def chain_of(model: Recorder) -> Site | None:
    """The site that is laid out position by position; None without one."""
    return next((site for site in model.sites.values() if site.by_position), None)


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


def check_chain(
    model: Callable[..., Any],
    inferred: Recorder,
    generated: Recorder,
    batch: MaskedBatch,
    args: tuple[Any, ...],
) -> None:
    """Check that a chain, if there is one, is the only latent, and that tokens depend on the codes
    of their own positions alone.

    Codes are drawn, and each token's log-probability compared with that under its code at all
    positions. Takes no random numbers of the caller's.

    Args:
        model: the step program.
        inferred, generated: what guide and model did on a batch.
        batch: rows to draw codes for.
        args: further arguments of the program.

    Raises:
        ValueError: naming the site, for a model whose chain could not be summed out so.
    """
    chain = chain_of(generated)
    if chain is None:
        return
    check_alone(chain, inferred, generated)
    batch = batch[:4]
    random = random_state()
    try:
        with evaluation(model):
            laid_out = run(model, Recorder(None, lambda msg: True, by_position=True), batch, *args)
            restore_random_state(random)
            drawn = run(model, Recorder(), batch, *args)
    finally:
        restore_random_state(random)
    codes = drawn.sites[chain.name].value.unsqueeze(-1)
    chain = chain_of(laid_out)
    assert chain is not None
    factor = chain_factors(chain, laid_out.sites["x_0"])
    factor = factor.expand(*codes.shape[:-1], -1).gather(-1, codes).squeeze(-1)
    tokens = drawn.sites["x_0"]
    own = position_log_prob(tokens.fn, tokens.value).expand_as(factor)
    if not torch.allclose(factor, own, rtol=1e-2, atol=1e-2, equal_nan=True):
        raise ValueError(
            f"{chain.name!r} is a chain along the row, but the law of a token depends on codes of "
            "other positions: it cannot be summed out; use a decoder that looks at each code at "
            "its own position, such as vadd_pyro.nn.LocalTransformerDecoder"
        )
