"""The loss of a pair of programs as a function of their parameters, to be traced."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn

from vadd_pyro.checkpoints import random_state
from vadd_pyro.compiled.graphs import NotOneGraphError
from vadd_pyro.compiled.untouched import changes_nothing
from vadd_pyro.elbo import LossTerms, MaskedDiffusionELBO
from vadd_pyro.programs import modules_of

__all__ = ["Differentiated", "TracedLoss", "check_agreement"]

_BATCHES = 20  # tried, for one that has no more rows with targets than the graph is for
# Of losses and gradients of one batch and the same random numbers; sums in another order.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.05
# Of the gradient of one parameter, relative to its own norm: a unit of a row that lies on the kink
# of a rectifier counts for one side or the other, and a sum that cancels is left with what
# rounding leaves of its terms.
_OWN, _ROUNDING = 10.0, 0.01
_KNOWN = 3.0  # times what rounding is known to do,
_LOST = 0.9  # but no gradient may be lost


class Differentiated(NamedTuple):
    """A loss with its gradient.

    Args:
        loss: mean loss of a row, nats, a scalar.
        kl: mean KL of a row, nats, a scalar.
        gradients: of the mean loss, by name; a parameter that the loss does not depend on is not
            among them.
    """

    loss: Tensor
    kl: Tensor
    gradients: dict[str, Tensor]

    @property
    def finite(self) -> bool:
        """Whether loss and gradients are numbers."""
        values = (self.loss, *self.gradients.values())
        return all(bool(value.isfinite().all()) for value in values)


class _Programs(nn.Module):
    """The pair as one module, whose parameters can be replaced for a call."""

    def __init__(
        self, elbo: MaskedDiffusionELBO, model: Any, guide: Any, modules: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.modules_of_both = nn.ModuleList(modules)
        self._pair = (elbo, model, guide)

    def forward(self, x_0: Tensor, kl_weight: Tensor | float | None, half: bool) -> LossTerms:
        elbo, model, guide = self._pair
        own = elbo.kl_weight
        with torch.autocast(x_0.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            try:
                if kl_weight is not None:
                    elbo.kl_weight = kl_weight  # type: ignore[assignment]
                return elbo.terms(model, guide, x_0)
            finally:
                elbo.kl_weight = own


@contextmanager
def _replaced(
    programs: nn.Module, parameters: Mapping[str, Tensor], leaves: Mapping[str, Tensor]
) -> Iterator[None]:
    """Other tensors in the places of parameters.

    Place by place, each once: ``torch.func.functional_call`` goes by names, and leaves its tensors
    behind in a module that stands under two, such as one that a prior shares with the guide.
    """
    others = {id(parameters[name]): leaf for name, leaf in leaves.items()}
    places = [
        (module, key, parameter)
        for module in programs.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in others
    ]
    try:
        for module, key, parameter in places:
            module._parameters[key] = others[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for module, key, parameter in places:
            module._parameters[key] = parameter


class TracedLoss:
    """The mean loss of a row and its gradient, as a function of parameters, rows and ``lambda``.

    Args:
        elbo: the loss; with a ``kl_weight`` that is a function, ``lambda`` is an input.
        model, guide: modules, or handlers around modules.
        half: run the programs in bfloat16 under autocast.

    Raises:
        NotOneGraphError: for programs that are no modules, and for losses whose gradient cannot be
        traced.
    """

    def __init__(
        self, elbo: MaskedDiffusionELBO, model: Any, guide: Any, half: bool = False
    ) -> None:
        for name, program in (("model", model), ("guide", guide)):
            if not modules_of(program):
                raise NotOneGraphError(
                    f"the {name} is a plain function, whose parameters only Pyro's store knows"
                )
        if elbo.doubly_reparameterized:
            raise NotOneGraphError(
                "doubly reparameterised gradients run the guide twice on the same random numbers"
            )
        self.elbo = elbo
        self.pair = elbo, model, guide
        found = [module for program in (model, guide) for module in modules_of(program)]
        self.modules = list({id(module): module for module in found}.values())
        self.programs = _Programs(elbo, model, guide, self.modules)
        self.half = half
        self.told = callable(elbo.kl_weight)
        self.parameters = {
            name: p for name, p in self.programs.named_parameters() if p.requires_grad
        }

    def __call__(
        self, parameters: Mapping[str, Tensor], x_0: Tensor, kl_weight: Tensor
    ) -> Differentiated:
        """Loss and gradient at given parameters, which may be some of all.

        Args:
            parameters: by name, as in ``parameters``.
            x_0: clean tokens, ``(B, D)``.
            kl_weight: ``lambda``, a scalar.
        """
        with torch.enable_grad():
            leaves = {n: p.detach().requires_grad_() for n, p in parameters.items()}
            told = kl_weight if self.told else None
            places = _replaced(self.programs, self.parameters, leaves)
            with self.elbo.kept_rows.in_graph(), places:
                terms = self.programs(x_0, told, self.half)
            loss = terms.loss / len(x_0)
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return Differentiated(
            loss.detach(),
            terms.kl / len(x_0),
            {n: g for n, g in zip(leaves, gradients, strict=True) if g is not None},
        )

    @contextmanager
    def later(self, updates: int) -> Iterator[None]:
        """As it would be so many updates later."""
        before = self.elbo.iteration
        self.elbo.iteration = before + updates
        try:
            yield
        finally:
            self.elbo.iteration = before

    def check_hooks(self) -> None:
        """Refuse parameters whose gradients somebody wants to see.

        Raises:
            NotOneGraphError: naming one.
        """
        for name, parameter in self.parameters.items():
            if parameter._backward_hooks or getattr(
                parameter, "_post_accumulate_grad_hooks", None
            ):
                raise NotOneGraphError(f"{name} has a hook on its gradient")

    def eager(
        self,
        x_0: Tensor,
        kl_weight: Tensor | float | None = None,
        half: bool | None = None,
    ) -> Differentiated:
        """What the programs themselves say, the reference for a graph; no parameter is replaced.

        Args:
            x_0: clean tokens, ``(B, D)``.
            kl_weight: ``lambda``; None leaves it to the loss.
            half: run them in bfloat16; by default as the graph does.

        Raises:
            NotOneGraphError: if they change buffers or gradients, or would differentiate by a
            tensor that is none of their modules' parameters.
        """
        names, values = list(self.parameters), list(self.parameters.values())
        with changes_nothing(self.modules), pyro.validation_enabled(False):
            terms = self.programs(x_0, kl_weight, self.half if half is None else half)
            loss = terms.loss / len(x_0)
            self._check_leaves(loss)
            gradients = torch.autograd.grad(loss, values, allow_unused=True)
        found = {n: g for n, g in zip(names, gradients, strict=True) if g is not None}
        return Differentiated(loss.detach(), terms.kl / len(x_0), found)

    def reference(self, x_0: Tensor) -> tuple[dict[str, Any], Differentiated]:
        """What the programs say, and the random numbers under which they do: such that the graph
        would take the batch.
        """
        for _ in range(_BATCHES):
            random, exceeded = random_state(), self.elbo.kept_rows.exceeded
            found = self.eager(x_0)
            if self.elbo.kept_rows.exceeded == exceeded:
                break
        return random, found

    def gives_none_without_kl(self, x_0: Tensor) -> set[str]:
        """Names of the parameters that have no gradient where ``lambda`` is 0; then they are left
        out of an update, which is not the same as a gradient of zero.
        """
        if not self.told:
            return set()
        return set(self.parameters) - set(self.eager(x_0, 0.0).gradients)

    def _check_leaves(self, loss: Tensor) -> None:
        """Refuse a loss that leaves gradients in other tensors than the parameters."""
        known = {id(p) for p in self.parameters.values()}
        seen, waiting = set(), [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            # Functions of a user's own may have an attribute of that name.
            own = type(node).__name__ == "AccumulateGrad"
            leaf: Tensor | None = getattr(node, "variable", None) if own else None
            if leaf is not None and id(leaf) not in known:
                raise NotOneGraphError(
                    f"the loss has a gradient by a tensor of shape {tuple(leaf.shape)} that is no "
                    "parameter of the programs' modules"
                )
            waiting += [following for following, _ in node.next_functions]

    @property
    def tolerance(self) -> float:
        """How far a graph may be from the programs, relative to the largest number."""
        dtypes = {p.dtype for p in self.parameters.values()}
        worst = max(_TOLERANCE.get(dtype, _HALF_TOLERANCE) for dtype in dtypes)
        return _HALF_TOLERANCE if self.half else worst


def check_agreement(
    found: Differentiated,
    reference: Differentiated,
    tolerance: float,
    exact: Differentiated | None = None,
) -> bool:
    """Refuse a graph that does not say what the programs say.

    No number of a gradient may differ by more than ``tolerance`` times the largest number of all
    gradients, and none of a parameter's, in norm, by more than ten times that share of its own
    norm, up to what rounding makes of the terms that it is the sum of. In half precision rounding
    makes more of a sum that cancels than any share of it says, up to a third of a gradient's norm
    in a trained transformer of two layers. Where a graph differs there, it may do so by three
    times what the programs themselves differ from their like in full precision.

    Args:
        found: by the graph, on the reference's batch and random numbers.
        reference: by the programs themselves.
        tolerance: relative to the largest number.
        exact: by the programs in full precision, on the same rows and random numbers.

    Returns:
        Whether there were numbers to compare; False if neither gives any.

    Raises:
        NotOneGraphError: naming the loss or the parameter whose gradient differs.
    """
    if not (reference.finite or found.finite):
        return False
    loss, expected = float(found.loss), float(reference.loss)
    # Whatever is no number lies in no range, so the question is what does.
    known = 0.0 if exact is None else _KNOWN * abs(expected - float(exact.loss))
    if not abs(loss - expected) <= tolerance * max(1.0, abs(expected)) + known:
        raise NotOneGraphError(
            f"its loss is {loss:.6g} where the programs give {expected:.6g}: they do not do the "
            "same at every call"
        )
    gradients = {n: g for n, g in reference.gradients.items() if g.numel()}
    largest = max((float(g.abs().max()) for g in gradients.values()), default=0.0)
    for name in [*gradients, *(n for n in found.gradients if n not in reference.gradients)]:
        if name not in found.gradients:
            raise NotOneGraphError(f"it has no gradient of {name}")
        gradient = gradients.get(name, torch.zeros_like(found.gradients[name]))
        difference = found.gradients[name] - gradient
        error, norm = float(difference.abs().amax()), float(gradient.norm())
        most, spread = 0.0, 0.0
        if exact is not None:
            rounded = gradient - exact.gradients.get(name, torch.zeros_like(gradient))
            most, spread = _KNOWN * float(rounded.abs().amax()), _KNOWN * float(rounded.norm())
        # Half precision rounds the terms themselves in the second digit.
        share = _ROUNDING if tolerance < _HALF_TOLERANCE else 1.0
        rounding = share * tolerance * largest * math.sqrt(gradient.numel())
        least = _OWN * tolerance * norm + max(rounding, 1e-9)
        within = float(difference.norm()) <= max(least, min(least + spread, _LOST * norm))
        if not (within and error <= tolerance * max(largest, 1e-6) + most):
            raise NotOneGraphError(
                f"its gradient of {name} differs from that of the programs by {error:.3g}, where "
                f"its norm is {norm:.3g} and the largest number of all gradients {largest:.3g}"
            )
    return True
