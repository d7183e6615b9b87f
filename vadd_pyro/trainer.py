r"""What a training run consists of: its data in order, its parameters, its state between updates.

:class:`Run` holds everything that a checkpoint must restore, so that a resumed run continues bit
for bit on the CPU. :func:`vadd_pyro.fit` drives it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from vadd_pyro.batches import Batches, DrawnBatches, check_divisible
from vadd_pyro.checkpoints import (
    CheckpointWriteError,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from vadd_pyro.compiled import Update, compile_updates, give_up
from vadd_pyro.distributed import Processes
from vadd_pyro.elbo import MaskedDiffusionELBO
from vadd_pyro.exchange import GradientSum
from vadd_pyro.finite import NonFiniteLossError, blame_loss, clip_gradient, not_finite
from vadd_pyro.history import History
from vadd_pyro.monitor import Monitor
from vadd_pyro.rates import average_weight, scheduled_rate
from vadd_pyro.resuming import check_same_run, estimated_size, moments_of, restore_own
from vadd_pyro.weights import NamedParameters, Weights

__all__ = ["Run"]

_SMOOTHING = 0.98
_LATENT_COLUMNS = ("kl_per_dimension", "active_units", "mutual_information", "share_at_prior")


class Run:
    """State of one training run."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        elbo: MaskedDiffusionELBO,
        weights: Weights,
        batches: Batches | DrawnBatches,
        configuration: dict[str, Any],
        monitor: Monitor | None = None,
        processes: Processes | None = None,
        accumulate: int = 1,
    ) -> None:
        self.model, self.guide, self.elbo = model, guide, elbo
        self.weights = weights
        self.batches = batches
        self.configuration = configuration
        self.monitor = monitor
        self.processes = Processes() if processes is None else processes
        self.accumulate = accumulate
        self.iteration = 0
        self.history = History()
        self.smooth_loss = math.nan
        self.smooth_kl = math.nan
        self.elapsed = 0.0
        self.average: list[Tensor] | None = None
        self.update: Update | None = None
        self._products: dict[str, bool] | None = None
        self._compiling: dict[str, Any] = {}
        self.saved: tuple[Path, int] | None = None  # the newest checkpoint and its iteration
        self._since: list[tuple[float, float]] = []
        self._mark = time.perf_counter()

    def prepare(self, optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None) -> None:
        """Run the pair once, fully validated, to find bad programs and all parameters.

        Then make the optimiser.
        """
        state = random_state()
        self.elbo.iteration = 0
        processes, weights = self.processes, self.weights
        processes.replicate(weights.tensors())
        with processes.together(), pyro.validation_enabled(True), NamedParameters() as seen:
            first = self.batches(0)
            with self.autocast(first.device):
                self.elbo.loss(self.model, self.guide, first)
                if self.accumulate * processes.size > 1:
                    check_divisible(self.elbo, self.model, self.guide, weights.modules, first)
            self._first = first if self.configuration.get("compile") else None
            if self.monitor is not None:
                self.monitor.choose(self.batches.to_monitor())
        processes.check_same(weights.tensors(), "after a first look at the loss")
        weights.add_from_store(seen.found)
        processes.replicate(weights.tensors())
        restore_random_state(state)
        with processes.together():
            self._make_optimizer(optimizer)

    def _make_optimizer(
        self, optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None
    ) -> None:
        parameters = self.weights.values()
        if not parameters:
            raise ValueError(
                "model and guide have no parameters to train: expected torch modules, or "
                "functions that use pyro.param or pyro.module"
            )
        self.parameters = parameters
        self.total = GradientSum(self.processes, self.weights.named)
        if optimizer is None:
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
                parameters, lr=self.configuration["learning_rate"], fused=True
            )
        else:
            self.optimizer = optimizer(parameters)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        if self.configuration["ema_decay"] is not None:
            self.average = [parameter.detach().clone() for parameter in parameters]
        self.configuration["optimizer"] = type(self.optimizer).__name__
        self._buffers = self._moving = self.weights.buffers()
        self._moving_known = False
        for module in self.weights.modules.values():
            # A module that is held fixed is not trained in its batch statistics either.
            module.train(any(p.requires_grad for p in module.parameters()))

    def autocast(self, device: torch.device) -> torch.autocast:
        """The precision that programs run in."""
        half = self.configuration.get("precision") == "bfloat16"
        return torch.autocast(device.type, torch.bfloat16, enabled=half)

    def rate(self, base: float) -> float:
        """Scheduled step size."""
        c = self.configuration
        names = "warmup", "num_iterations", "decay", "final_learning_rate"
        return scheduled_rate(self.iteration, base, *(c[name] for name in names))

    def step(self) -> None:
        """One update."""
        with (self.total if self.update is None else self.update.exchange).watching():
            x_0 = self.batches(self.iteration)
        self.elbo.iteration = self.iteration
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = self.rate(base)
        if self.update is not None and self.update.fits(x_0):
            value, kl = self._compiled_step(x_0, self.update)
        else:
            value, kl = self._eager_step(x_0)
        self.iteration += 1
        self._since.append((value, kl))
        first = math.isnan(self.smooth_loss)
        keep = 0.0 if first else _SMOOTHING
        self.smooth_loss = (0.0 if first else keep * self.smooth_loss) + (1 - keep) * value
        self.smooth_kl = (0.0 if first else keep * self.smooth_kl) + (1 - keep) * kl

    def _average_weight(self) -> float:
        decay = self.configuration["ema_decay"]
        return 0.0 if self.average is None else average_weight(self.iteration, decay)

    def _compiled_step(self, x_0: Tensor, update: Update) -> tuple[float, float]:
        """One update by the graph, or by the programs if these have changed: loss and KL of a
        row.
        """
        reason = update.differs(x_0)
        if not reason:
            found = update(x_0, self.elbo.current_kl_weight(), self._average_weight())
            if found.finite:
                return found.loss, found.kl
            # The weights are as they were. The programs say what is to blame: they themselves, or
            # that more rows have targets than the graph is for.
            update.rewind()
            self._check_weights()
            before = self.elbo.kept_rows.exceeded
            self._differentiate(x_0)
            update.rewind()
            if any(self.processes.gather(self.elbo.kept_rows.exceeded > before)):
                return self._eager_step(x_0)
            reason = (
                f"its loss is {found.loss:.6g} and the norm of its gradient {found.norm:.6g}, "
                "where the programs give numbers"
            )
        self.update = None
        give_up(update, reason, self.elbo, self.model, self.guide, x_0, **self._compiling)
        return self._eager_step(x_0)

    def _eager_step(self, x_0: Tensor) -> tuple[float, float]:
        """One update by the programs as they are: loss and KL of a row."""
        before = [buffer.clone() for buffer in self._moving]
        try:
            value, kl = self._differentiate(x_0)
        except NonFiniteLossError:
            for buffer, kept in zip(self._moving, before, strict=True):
                buffer.copy_(kept)
            self._check_weights()  # theirs is the blame if they are no numbers
            raise
        if not self._moving_known:  # most buffers are constants, which need no copy
            both = zip(self._moving, before, strict=True)
            self._moving = [buffer for buffer, kept in both if not torch.equal(buffer, kept)]
            self._moving_known = True
        if self.update is not None:
            self.update.flush()
        self.optimizer.step()
        if self.update is not None:
            self.update.refresh()
        if self.average is not None:
            with torch.no_grad():
                torch._foreach_lerp_(
                    self.average, [p.detach() for p in self.parameters], self._average_weight()
                )
        return value, kl

    def compile(self, stack: ExitStack) -> None:
        """Compile the updates, as far as the programs allow it, until ``stack`` is closed."""
        self.elbo.iteration = self.iteration
        first, self._first = self._first, None
        assert first is not None
        half = self.configuration.get("precision") == "bfloat16"
        self._compiling = dict(optimizer=self.optimizer, average=self.average, stack=stack)
        self._compiling |= dict(half=half, accumulate=self.accumulate, processes=self.processes)
        self.update = compile_updates(
            *(self.elbo, self.model, self.guide, first),
            parameters=self.parameters,
            clip_norm=self.configuration["clip_norm"],
            products=self._products,
            **self._compiling,
        )

    def _differentiate(self, x_0: Tensor) -> tuple[float, float]:
        """Clipped gradient of the mean loss over the rows of all processes; that loss and the KL
        of a row. All are finite.
        """
        with self.total.watching():
            value, kl = self._backward(x_0)
        value, kl = self.total(value, kl)
        culprit = clip_gradient(self.weights.named, self.configuration["clip_norm"])
        if culprit:
            raise NonFiniteLossError(
                f"{culprit} at iteration {self.iteration}, though the loss is {value:.6g}. "
                f"Training stopped before the update, {self._last_good()}"
            )
        return value, kl

    def _backward(self, x_0: Tensor) -> tuple[float, float]:
        """What the rows of this process add to the mean loss over those of all, part by part:
        gradient, value and KL.
        """
        value = kl = 0.0
        num_rows = len(x_0) * self.processes.size
        self.optimizer.zero_grad(set_to_none=True)
        with ExitStack() as stack:
            if self.iteration:
                stack.enter_context(pyro.validation_enabled(False))
            for rows in x_0.chunk(self.accumulate):
                with self.autocast(x_0.device):
                    terms = self.elbo.terms(self.model, self.guide, rows)
                loss = terms.loss / num_rows
                value += loss.item()
                kl += terms.kl.item() / num_rows
                if not math.isfinite(value):
                    culprit = blame_loss(
                        float(terms.reconstruction),
                        float(terms.kl),
                        self.elbo.current_kl_weight(),
                    )
                    raise NonFiniteLossError(
                        f"the loss is {value} at iteration {self.iteration}: {culprit}. Training "
                        f"stopped before the update, {self._last_good()}. A smaller "
                        "learning_rate, a warmup or a smaller clip_norm may help"
                    )
                loss.backward()
        return value, kl

    def _last_good(self) -> str:
        kept = "" if self.saved is None else f"; {self.saved[0]} holds iteration {self.saved[1]}"
        return f"and the programs hold the weights before it{kept}"

    def _check_weights(self) -> None:
        """Refuse weights that the last update has spoilt, though its gradient was finite; the
        programs go back to the last checkpoint.
        """
        names = not_finite(self.weights.named)
        if not names:
            return
        what = "and the programs hold them: there is no checkpoint to go back to"
        if self.saved is not None:
            path, iteration = self.saved
            self.weights.load(self._read(path)["weights"], path)
            what = f"and the programs are back at iteration {iteration}, from {path}"
        raise NonFiniteLossError(
            f"the weights of {names} are not finite after iteration {self.iteration}. Training "
            f"stopped, {what}"
        )

    def log(self) -> None:
        """One entry of the history: means since the last one."""
        self._tick()
        losses, kls = zip(*self._since, strict=True)
        self._since = []
        history = self.history
        history.iteration.append(self.iteration)
        history.loss.append(sum(losses) / len(losses))
        history.kl.append(sum(kls) / len(kls))
        history.kl_weight.append(self.elbo.current_kl_weight())
        history.learning_rate.append(self.optimizer.param_groups[0]["lr"])
        history.seconds.append(self.elapsed)

    def observe(self) -> None:
        """One look at the latents for the history; no random number of the training is used."""
        found = None if self.monitor is None else self.monitor(self.model, self.guide)
        if found is not None:
            self.history.monitor_iteration.append(self.iteration)
            for name in _LATENT_COLUMNS:
                getattr(self.history, name).append(getattr(found, name))

    def _tick(self) -> None:
        now = time.perf_counter()
        self.elapsed += now - self._mark
        self._mark = now

    def checkpoint_size(self, num_entries: int) -> int:
        """About how many bytes a checkpoint takes, with so many entries of the history."""
        tensors = [*self.parameters, *self._buffers, *(self.average or [])]
        tensors += moments_of(self.optimizer, self.parameters)
        return estimated_size(tensors, num_entries, self.processes.size)

    def save(self, path: Path) -> None:
        """Write everything that a resume needs, and keep what stood there as the one before."""
        if self.saved is not None and self.saved[1] == self.iteration:
            return
        self._check_weights()
        self._tick()
        if self.update is not None:
            self.update.flush()
        self.processes.check_same(self.weights.tensors(), f"after iteration {self.iteration}")
        products = {} if self.update is None else self.update.products
        told = self.processes.gather({"random": random_state(), "products": products})
        content = {
            "configuration": self.configuration,
            "iteration": self.iteration,
            "weights": self.weights.state(),
            "average": self.average,
            "parameter_names": list(self.weights.named),
            "optimizer": self.optimizer.state_dict(),
            **told[0],
            "other_processes": told[1:],
            "history": self.history.to_dict(),
            "since": [list(pair) for pair in self._since],
            "smooth": [self.smooth_loss, self.smooth_kl],
            "elapsed": self.elapsed,
        }
        try:
            with self.processes.together():
                if self.processes.first:
                    save_checkpoint(path, content, keep_previous=True)
        except CheckpointWriteError as error:
            last = "" if self.saved is None else f": iteration {self.saved[1]}"
            raise CheckpointWriteError(
                f"training stopped at iteration {self.iteration}: {error}{last}"
            ) from error
        self.saved = path, self.iteration

    def load(self, path: Path, device: torch.device) -> None:
        """Continue where a checkpoint ends."""
        content = self._read(path)
        check_same_run(path, content, self.configuration)
        self.weights.load(content["weights"], path)
        self.optimizer.load_state_dict(content["optimizer"])
        average = content["average"]
        self.average = None if average is None else [value.to(device) for value in average]
        self.iteration = content["iteration"]
        self.history = History(**content["history"])
        self._since = [(float(loss), float(kl)) for loss, kl in content["since"]]
        self.smooth_loss, self.smooth_kl = content["smooth"]
        self.elapsed = content["elapsed"]
        self.saved = path, self.iteration
        self._products = restore_own(path, content, self.processes)

    def _read(self, path: Path) -> dict[str, Any]:
        """A checkpoint, which the first process reads for all."""
        content: dict[str, Any] = self.processes.by_first(lambda: load_checkpoint(path))
        return content

    def finish(self) -> None:
        """Leave the averaged weights in the programs."""
        self.elbo.iteration = self.iteration
        if not self.processes.alone:  # theirs are views of the vector that was exchanged
            self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            with torch.no_grad():
                for parameter, average in zip(self.parameters, self.average, strict=True):
                    parameter.copy_(average)
