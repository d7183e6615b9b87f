"""Compiled training: the same numbers as the programs give, or a line that says why not."""

from __future__ import annotations

import gc
import math
import re
import warnings
import weakref
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import small_pair
from torch import nn

from vadd_pyro import (
    AtomTimes,
    CompiledLoss,
    LinearAnnealing,
    MaskedDiffusionELBO,
    MaskingProcess,
    NonFiniteLossError,
    Program,
    StepAnnealing,
    fit,
    guides,
    models,
)
from vadd_pyro.compiled import NotOneGraphError, Update, products
from vadd_pyro.compiled import graphs as graphs_module
from vadd_pyro.compiled.adam import shares_of
from vadd_pyro.compiled.layout import Layout
from vadd_pyro.compiled.networks import compiled_networks, silent_networks
from vadd_pyro.compiled.traced import Differentiated, TracedLoss, check_agreement
from vadd_pyro.compiled.update import UpdateResult
from vadd_pyro.nn import (
    MLPDecoder,
    MLPEncoder,
    TransformerDecoder,
    TransformerEncoder,
    UNetDecoder,
)
from vadd_pyro.times import BalancedTimes, PartTargets

PROCESS = MaskingProcess(3, 4)
X = torch.randint(3, (200, 4), generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, Any] = dict(
    batch_size=32, warmup=3, progress=False, log_every=1, monitor_every=None, learning_rate=0.01
)


def pair(prior: str = "standard_normal") -> tuple[Any, Any]:
    torch.manual_seed(1)
    return small_pair(prior, PROCESS)


def annealed(**options: Any) -> MaskedDiffusionELBO:
    return MaskedDiffusionELBO(PROCESS, kl_weight=LinearAnnealing(8, 0.1), **options)


def state(*programs: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for program in programs for p in program.parameters()])


def both(elbo: Any, prior: str = "standard_normal", rows: Any = X, **options: Any) -> Any:
    """History and weights of a run as it is and of the same run compiled."""
    runs = []
    for compiled in (False, True):
        model, guide = pair(prior)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            history = fit(model, guide, elbo(), rows, 12, **OPTIONS | options, compile=compiled)
        runs.append((history, state(model, guide)))
    return runs


def assert_equal(runs: Any, tolerance: float = 1e-5) -> None:
    (eager, weights), (compiled, own) = runs
    assert compiled.loss == pytest.approx(eager.loss, rel=tolerance)
    assert compiled.kl == pytest.approx(eager.kl, rel=1e-3, abs=1e-6)
    assert compiled.kl_weight == eager.kl_weight
    assert compiled.learning_rate == eager.learning_rate
    assert (weights - own).abs().max() < 10 * tolerance


COMPILE = nn.Module.compile


@pytest.fixture
def interpreted(monkeypatch):
    """Graphs are run as they were traced, and networks as they are: to save the compiler's time
    where nothing is asked of it.
    """

    def as_traced(graph, inputs):
        def run(*values):
            with torch.no_grad():
                return graph(*values)

        return run

    monkeypatch.setattr("vadd_pyro.compiled.update.compile_graph", as_traced)
    monkeypatch.setattr(nn.Module, "compile", lambda self, options: None)


# ------------------------------------------------------------------------- the same numbers


def test_a_compiled_run_is_the_same_run():
    assert_equal(both(annealed, ema_decay=0.9, clip_norm=0.5))


@pytest.mark.parametrize(
    ("prior", "elbo"),
    [
        ("mixture_of_normals", annealed),
        ("none", lambda: MaskedDiffusionELBO(PROCESS, times=BalancedTimes())),
        (
            "conditional_normal",
            lambda: annealed(times=PartTargets(), num_particles=3, importance_weighted=True),
        ),
    ],
)
def test_so_it_is_for_other_latents_times_and_bounds(prior, elbo):
    assert_equal(both(elbo, prior, clip_norm=None))


def test_a_transformer_in_half_precision_is_one_graph():
    """Sums over the same bfloat16 gradient are more than torch 2.13's code generator can take."""

    def run(compiled):
        torch.manual_seed(1)
        sizes = dict(hidden_dim=32, num_layers=1, num_heads=2)
        decoder = TransformerDecoder(PROCESS, 2, **sizes)
        guide = guides.AmortizedNormal(TransformerEncoder(PROCESS, 2, **sizes))
        model = models.VADD(decoder, models.StandardNormal(2))
        options = OPTIONS | dict(compile=compiled, precision="bfloat16")
        return fit(model, guide, annealed(), X, 4, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = run(True)
    assert found.loss == pytest.approx(run(False).loss, rel=0.01)


def test_a_unet_drops_the_same_values_as_one_graph():
    """Around convolutions the compiler lays grids out otherwise in memory."""
    process = MaskingProcess(3, 64)
    rows = torch.randint(3, (32, 64), generator=torch.Generator().manual_seed(0))

    def run(compiled):
        torch.manual_seed(1)
        sizes = dict(hidden_dim=8, multipliers=(1,), num_blocks=1, attention_levels=0)
        model = models.MDM(UNetDecoder(process, shape=(8, 8), dropout=0.5, **sizes))
        options = OPTIONS | dict(batch_size=16, compile=compiled)
        return fit(model, guides.NoLatent(), MaskedDiffusionELBO(process), rows, 12, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        one, other = run(False), run(True)
    assert other.loss == pytest.approx(one.loss, rel=1e-4)


def test_equal_sums_are_copies_and_what_is_written_in_between_is_not_forgotten():
    def sums(x):
        first, second = x.sum(0), x.sum(0)
        x.add_(1)
        return first, second, x.sum(0)

    x = torch.arange(6.0).view(3, 2)
    graph = graphs_module.capture(sums, [x])
    graphs_module.sum_once(graph)
    first, second, third = graph(x.clone())
    assert first.equal(x.sum(0))
    assert second.equal(first)
    assert third.equal(x.sum(0) + 3)
    assert first.data_ptr() != second.data_ptr()
    assert [str(node.target) for node in graph.graph.nodes].count("aten.sum.dim_IntList") == 2


def test_half_precision_sums_laid_side_by_side_are_rounded_there():
    def sums(x, w):
        both = torch.cat([x.sum(0), (2 * x).sum(0)])
        return both @ w, x.sum(1)

    x, w = torch.randn(300, 4).bfloat16(), torch.randn(8, 3).bfloat16()
    graph = graphs_module.capture(sums, [x, w])
    before = graph(x, w)
    graphs_module.sum_in_full(graph)
    (beside,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    for rounded in beside.args[0]:
        (full,) = rounded.args
        assert (full.meta["val"].dtype, rounded.meta["val"].dtype) == (torch.float32, x.dtype)
    after = graph(x, w)
    assert after[0].dtype == x.dtype
    assert all(one.equal(other) for one, other in zip(before, after, strict=True))


def test_weight_decay_by_groups():
    def optimizer(parameters):
        wide = [p for p in parameters if p.dim() > 1]
        flat = [p for p in parameters if p.dim() <= 1]
        return torch.optim.AdamW(
            [{"params": flat, "weight_decay": 0.0, "lr": 0.003}, {"params": wide}],
            lr=0.01,
            weight_decay=0.3,
            betas=(0.8, 0.99),
        )

    assert_equal(both(annealed, optimizer=optimizer))
    assert_equal(
        both(annealed, optimizer=lambda ps: torch.optim.Adam(ps, 0.01, weight_decay=0.3)), 1e-4
    )


def test_other_optimisers_step_on_the_gradient_of_the_graph():
    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)

    assert_equal(both(annealed, optimizer=optimizer, ema_decay=0.9))


def test_batches_of_another_size_run_uncompiled_in_between():
    class Uneven:
        """Every third batch is smaller."""

        fingerprint = "uneven"

        def __call__(self, batch_size):
            return X[:batch_size]

        def at(self, iteration, batch_size):
            size = batch_size - 5 * (iteration % 3 == 2)
            return X[(7 * iteration) % 100 :][:size]

    assert_equal(both(annealed, rows=Uneven(), ema_decay=0.9))


def test_frozen_parameters_and_those_without_gradient_stay():
    def programs():
        model, guide = pair()
        model.decoder.head.weight.requires_grad_(False)
        model.unused = nn.Linear(2, 2)
        return model, guide

    found = []
    for compiled in (False, True):
        model, guide = programs()
        before = model.unused.weight.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            fit(model, guide, annealed(), X, 6, **OPTIONS, compile=compiled)
        assert torch.equal(model.unused.weight, before)
        found.append(state(model, guide))
    assert (found[0] - found[1]).abs().max() < 1e-4


def test_a_module_that_prior_and_guide_share_is_trained_in_both():
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        decoder = MLPDecoder(PROCESS, 2, hidden_dim=16, num_layers=2, embedding_dim=4)
        encoder = MLPEncoder(PROCESS, 2, hidden_dim=16, num_layers=2, embedding_dim=4)
        prior = models.VampPrior(encoder, 5)
        model, guide = models.VADD(decoder, prior), guides.for_prior(prior, encoder)
        before = encoder.head.weight.detach().clone()
        fit(model, guide, annealed(), X, 6, **OPTIONS, compile=compiled)
        assert isinstance(encoder.head.weight, nn.Parameter)
        assert (encoder.head.weight - before).abs().max() > 1e-3
        found.append(state(model, guide))
    assert (found[0] - found[1]).abs().max() < 1e-4


def test_rows_that_lie_otherwise_in_memory_are_the_same_rows():
    columns = X.t().contiguous().t()

    class Columns:
        fingerprint = "columns"

        def __call__(self, batch_size):
            return columns[:batch_size]

        def at(self, iteration, batch_size):
            return columns[5 * iteration :][:batch_size] if iteration % 2 else X[:batch_size]

    assert_equal(both(annealed, rows=Columns()))


def test_drawn_rows_are_those_of_the_uncompiled_run():
    def drawn(batch_size):
        return X[torch.randint(200, (batch_size,))]

    assert_equal(both(lambda: annealed(num_particles=2), rows=drawn))


def test_an_optimiser_with_a_hook_steps_by_itself():
    def optimizer(parameters):
        adam = torch.optim.Adam(parameters, lr=0.1)

        def clamp(*args: Any) -> None:
            with torch.no_grad():
                for p in parameters:
                    p.clamp_(-0.2, 0.2)

        adam.register_step_post_hook(clamp)
        return adam

    runs = both(annealed, optimizer=optimizer)
    assert_equal(runs, 1e-4)
    assert float(runs[1][1].abs().max()) <= 0.2 + 1e-6


class Killed(BaseException):
    """Stands for whatever ends a process between two updates."""


class DiesAt:
    """Rows that end the run at an update."""

    fingerprint = "rows"

    def __init__(self, last: int) -> None:
        self.last = last

    def __call__(self, batch_size):
        return X[:batch_size]

    def at(self, iteration, batch_size):
        if iteration == self.last:
            raise Killed
        return X[(11 * iteration) % 100 :][:batch_size]


def test_a_compiled_run_resumes_bit_for_bit(tmp_path):
    options = dict(OPTIONS, ema_decay=0.9, compile=True)
    model, guide = pair()
    whole = fit(model, guide, annealed(), DiesAt(99), 12, **options)
    expected = state(model, guide)
    model, guide = pair()
    file = dict(checkpoint=tmp_path / "run.pt", checkpoint_every=5)
    with pytest.raises(Killed):
        fit(model, guide, annealed(), DiesAt(7), 12, **options, **file)
    model, guide = pair()
    history = fit(model, guide, annealed(), DiesAt(99), 12, **options, **file, resume=True)
    assert history.loss == whole.loss
    assert torch.equal(state(model, guide), expected)
    with pytest.raises(ValueError, match="its compile is True, this call's is False"):
        fit(
            model,
            guide,
            annealed(),
            DiesAt(99),
            12,
            **options | file | dict(compile=False, resume=True),
        )


def test_programs_have_their_own_parameters_afterwards():
    model, guide = pair()
    parameters = list(model.parameters())
    fit(model, guide, annealed(), X, 3, **OPTIONS, compile=True)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for p in [*model.parameters(), *guide.parameters()]:
        assert p.untyped_storage().size() == 4 * p.numel()
    assert model.decoder._compiled_call_impl is None


# -------------------------------------------------------------------------- numbers that end


class Explodes(Program):
    """A prior whose scale is no number for rows of twos alone."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.tensor(0.0))

    def forward(self, batch: Any) -> Any:
        return dist.Normal(torch.zeros(2), (1 + 0 * self.raw) * self.limit(batch)).to_event(1)

    def limit(self, batch: Any) -> Any:
        return torch.where((batch.x_0 == 2).all(), torch.nan, 1.0)


def test_a_loss_that_is_no_number_leaves_the_weights_as_they_were(tmp_path):
    class Poisoned(DiesAt):
        def at(self, iteration, batch_size):
            rows = super().at(iteration, batch_size)
            return torch.full_like(rows, 2) if iteration == 4 else rows

    torch.manual_seed(0)
    decoder = MLPDecoder(PROCESS, 2, hidden_dim=16, num_layers=2, embedding_dim=4)
    encoder = MLPEncoder(PROCESS, 2, hidden_dim=16, num_layers=2, embedding_dim=4)
    model, guide = models.VADD(decoder, Explodes()), guides.AmortizedNormal(encoder)
    options = dict(OPTIONS, checkpoint=tmp_path / "run.pt", checkpoint_every=2, compile=True)
    with pytest.raises(NonFiniteLossError, match=r"nan at iteration 4: its KL term"):
        fit(
            model,
            guide,
            MaskedDiffusionELBO(PROCESS),
            Poisoned(99),
            9,
            **options,
        )
    assert state(model, guide).isfinite().all()
    kept = torch.load(tmp_path / "run.pt", weights_only=True)
    assert torch.equal(kept["weights"]["model"]["decoder.head.weight"], model.decoder.head.weight)


# ------------------------------------------------------------------- programs that change


class ChangesAt(DiesAt):
    """Rows with which something changes at an update."""

    def __init__(self, iteration: int, change: Any) -> None:
        super().__init__(99)
        self.iteration, self.change = iteration, change

    def at(self, iteration, batch_size):
        if iteration == self.iteration:
            self.change()
        return super().at(iteration, batch_size)


class Moved(Program):
    """A prior with a shift, and one that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))
        self.shift = 0.0
        self.window = range(0)
        self.calls = 0

    def forward(self, batch: Any) -> Any:
        self.calls += 1
        shift = self.shift + 0.5 * (self.calls in self.window)
        return dist.Normal(self.loc + shift, torch.ones(2)).to_event(1)


def moved() -> tuple[Any, Any]:
    torch.manual_seed(0)
    decoder = MLPDecoder(PROCESS, 2, hidden_dim=16, num_layers=2, embedding_dim=4)
    encoder = MLPEncoder(PROCESS, 2, hidden_dim=16, num_layers=2, embedding_dim=4)
    return models.VADD(decoder, Moved()), guides.AmortizedNormal(encoder)


@pytest.mark.parametrize("what", ["attribute", "kl_weight", "times"])
def test_programs_that_change_are_found_out_and_go_on_by_themselves(what, interpreted):
    def run(compiled: bool, iteration: int) -> Any:
        model, guide = moved()
        elbo = MaskedDiffusionELBO(PROCESS, kl_weight=0.5, times=AtomTimes(0.1))

        def change() -> None:
            if what == "attribute":
                model.prior.shift = 0.5
            elif what == "kl_weight":
                elbo.kl_weight = 2.0
            else:
                elbo.times.share = 0.9

        rows = ChangesAt(iteration, change)
        fit(model, guide, elbo, rows, 14, **OPTIONS | dict(ema_decay=0.9), compile=compiled)
        return state(model, guide)

    with pytest.warns(RuntimeWarning) as caught:
        found = run(True, 7)
    (line,) = [str(w.message) for w in caught if w.category is RuntimeWarning]
    pattern = "end at iteration 10, after 10 of them, .*: its .*Training goes on from the weights "
    assert re.search(pattern + "before this iteration, 2 networks alone are compiled", line)
    # The graph has kept what it was traced with until it was found out, and changed nothing then.
    assert (found - run(False, 10)).abs().max() < 1e-4
    assert (found - run(False, 7)).abs().max() > 1e-3


def test_a_count_of_calls_is_where_it_would_be_without_a_graph(interpreted):
    counts = []
    for compiled in (False, True):
        model, guide = moved()
        model.prior.window = range(9, 5000)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(model, guide, annealed(), X, 14, **OPTIONS, compile=compiled)
        counts.append(model.prior.calls)
        lines = [str(w.message) for w in caught if w.category is RuntimeWarning]
        assert len(lines) == compiled
    assert counts == [15, 15]
    assert "end at iteration 10, after 10 of them" in lines[0]


def test_comparing_again_leaves_no_trace_in_a_run(interpreted, monkeypatch):
    def drawn(batch_size):
        return X[torch.randint(200, (batch_size,))]

    calls = []
    eager = TracedLoss.eager
    monkeypatch.setattr(TracedLoss, "eager", lambda *args: calls.append(args) or eager(*args))
    found = []
    for rechecks in ((), (1, 2, 5, 9)):
        monkeypatch.setattr("vadd_pyro.compiled.update.RECHECKS", rechecks)
        calls.clear()
        model, guide = moved()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            history = fit(model, guide, annealed(), drawn, 12, **OPTIONS, compile=True)
        found.append((len(calls), history.loss, model.prior.calls, state(model, guide)))
    (few, *one, weights), (many, *two, others) = found
    assert many == few + 4
    assert one == two
    assert torch.equal(weights, others)


def test_a_graph_that_gives_no_numbers_where_the_programs_do_is_given_up(interpreted, monkeypatch):
    original = Update.__call__

    def broken(self, x_0, kl_weight, average):
        if self.calls < 5:
            return original(self, x_0, kl_weight, average)
        before = [vector.clone() for vector in self.vectors]
        original(self, x_0, kl_weight, average)
        for vector, value in zip(self.vectors, before, strict=True):
            vector.copy_(value)
        self._adam.shares[0].steps -= 1
        return UpdateResult(math.nan, 0.0, math.nan)

    monkeypatch.setattr(Update, "__call__", broken)
    found = []
    for compiled in (False, True):
        model, guide = moved()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(model, guide, MaskedDiffusionELBO(PROCESS), X, 8, **OPTIONS, compile=compiled)
        found.append(state(model, guide))
    assert any("its loss is nan" in str(w.message) for w in caught)
    assert (found[0] - found[1]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_without_the_kl_its_parameters_are_passed_over(kind, interpreted):
    options: dict[str, Any] = dict(lr=0.01, weight_decay=0.3)
    made = []

    def optimizer(parameters):
        made.append(kind(parameters, **options))
        return made[-1]

    def elbo():
        return MaskedDiffusionELBO(PROCESS, kl_weight=StepAnnealing([3, 9], [0.0, 0.5, 0.0]))

    assert_equal(both(elbo, "mixture_of_normals", optimizer=optimizer))
    if kind is torch.optim.AdamW:
        steps = [[int(s["step"]) for s in one.state.values()] for one in made]
        assert sorted(steps[0]) == sorted(steps[1])
        assert set(steps[1]) == {6, 12}


def test_parameters_of_other_steps_are_shares_of_their_own():
    parameters = {name: torch.ones(2, requires_grad=True) for name in "abcd"}
    adam = torch.optim.Adam([{"params": [parameters["a"], parameters["b"]]}])
    parameters["b"].grad = torch.ones(2)
    adam.step()
    adam.add_param_group({"params": [parameters["c"], parameters["d"]]})
    found = shares_of(adam, {id(p): n for n, p in parameters.items()}, {"d"})
    told = [(share.group, share.names, share.of_kl, share.steps) for share in found]
    assert told == [
        (0, ["a"], False, 0),
        (0, ["b"], False, 1),
        (1, ["c"], False, 0),
        (1, ["d"], True, 0),
    ]


def test_a_run_holds_neither_its_first_rows_nor_the_gradient_of_the_graph(interpreted):
    class Watched(DiesAt):
        seen: ClassVar[list[Any]] = []

        def at(self, iteration, batch_size):
            gc.collect()
            assert sum(ref() is not None for ref in self.seen) <= 1 + (iteration == 0)
            rows = super().at(iteration, batch_size).clone()
            self.seen.append(weakref.ref(rows))
            return rows

    model, guide = moved()
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.01)  # noqa: E731
    fit(model, guide, annealed(), Watched(99), 4, **OPTIONS, optimizer=optimizer, compile=True)
    assert len(Watched.seen) == 5
    assert all(p.grad is None for p in [*model.parameters(), *guide.parameters()])


def test_half_precision_may_differ_by_what_rounding_does_to_the_programs():
    def found(gradient, loss=1.0):
        numbers = {"w": torch.tensor([gradient, 0.0, 0.0, 0.0]), "v": torch.tensor([1.0])}
        return Differentiated(torch.tensor(loss), torch.tensor(0.0), numbers)

    half, exact = found(0.4), found(0.45)
    with pytest.raises(NotOneGraphError, match="gradient of w differs"):
        check_agreement(found(0.5), half, 0.05)
    assert check_agreement(found(0.5), half, 0.05, exact)
    for wrong in (0.7, 0.1, 0.0):
        with pytest.raises(NotOneGraphError, match="gradient of w differs"):
            check_agreement(found(wrong), half, 0.05, exact)
    with pytest.raises(NotOneGraphError, match="its loss is"):
        check_agreement(found(0.5, 1.2), half, 0.05, exact)
    # Where rounding makes a third of a gradient, one that is lost is still found.
    assert check_agreement(found(0.6), half, 0.05, found(0.533))
    with pytest.raises(NotOneGraphError, match="gradient of w differs"):
        check_agreement(found(0.0), half, 0.05, found(0.533))


def test_a_small_gradient_that_is_wrong_does_not_hide_behind_a_large_one():
    torch.manual_seed(0)
    gradients = {"weight": 100 * torch.randn(50, 50), "bias": 0.05 * torch.randn(3)}
    right = Differentiated(torch.tensor(2.0), torch.tensor(1.0), gradients)

    def times(name, factor):
        return right._replace(gradients={**gradients, name: factor * gradients[name]})

    assert check_agreement(right, right, 1e-3)
    assert check_agreement(times("bias", 1 + 1e-4), right, 1e-3)
    for factor in (1.2, 0.0, -1.0, math.nan):
        with pytest.raises(NotOneGraphError, match="its gradient of bias differs"):
            check_agreement(times("bias", factor), right, 1e-3)
    with pytest.raises(NotOneGraphError, match="its gradient of other differs"):
        check_agreement(
            right._replace(gradients={**gradients, "other": torch.ones(2)}), right, 1e-3
        )
    nan = right._replace(loss=torch.tensor(math.nan))
    for found, reference in ((nan, right), (right, nan)):
        with pytest.raises(NotOneGraphError, match="its loss is"):
            check_agreement(found, reference, 1e-3)
    assert not check_agreement(nan, nan, 1e-3)


# ------------------------------------------------------------------------------ why it cannot


ELSEWHERE = torch.ones(2, requires_grad=True)


class Odd(Program):
    """A prior that does what a graph cannot hold."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.loc = nn.Parameter(torch.zeros(2))
        self.register_buffer("count", torch.zeros(()))
        self.calls = 0
        self.memory: list[Any] = []

    def forward(self, batch: Any) -> Any:
        shift = 0.0
        if self.what == "values" and float(batch.t.mean()) > 0.5:
            shift = 0.1
        if self.what == "numpy":
            shift = 0.1 * np.random.rand()
        if self.what == "buffers":
            self.count += 1
        if self.what == "tokens by way of numpy" and batch.x_0 is not None:
            shift = 0.1 * torch.from_numpy(batch.x_0.numpy()[0, :2].astype(np.float32))
        if self.what == "new buffers":
            self.count = self.count + 1
        if self.what == "item" and batch.t.mean().item() > 0.5:
            shift = 0.1
        if self.what == "gradients" and torch.is_grad_enabled():
            (0 * self.loc.sum()).backward()
        if self.what == "others' gradients":
            shift = 0 * ELSEWHERE
        if self.what == "calls":
            shift = 0.1 * (self.calls > 20)
            self.calls += 1
        if self.what == "a memory":
            self.memory.append(batch.t)
        if self.what == "iterations":
            shift = 0.01 * self.elbo.iteration
        if self.what == "store":
            shift = pyro.param("shift", torch.zeros(2))
        return dist.Normal(self.loc + shift, torch.ones(2)).to_event(1)


REASONS = {
    "values": r"look at the values of tensors by float\(\) \(.*test_compiled\.py, line \d+\)$",
    "item": r"look at the values of tensors by \.item\(\) \(.*test_compiled\.py, line \d+\)$",
    "numpy": "random numbers from Python or NumPy",
    "buffers": "change the buffers .*count",
    "new buffers": "change the buffers .*count",
    "gradients": "change the gradients .*loc",
    "others' gradients": r"a gradient by a tensor of shape \(2,\) that is no parameter",
    "calls": "differs from that of the programs|where the programs give",
    "a memory": r"keep a memory of their calls, model\.prior\.memory$",
    "tokens by way of numpy": r"into a NumPy array \(.*test_compiled\.py, line \d+\)$",
    "iterations": "where the programs give",
    "store": "held by Pyro's store alone",
}


def odd(what: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    decoder = MLPDecoder(PROCESS, 2, hidden_dim=16, num_layers=2, embedding_dim=4)
    encoder = MLPEncoder(PROCESS, 2, hidden_dim=16, num_layers=2, embedding_dim=4)
    return models.VADD(decoder, Odd(what)), guides.AmortizedNormal(encoder)


@pytest.mark.parametrize("what", REASONS)
def test_what_is_no_graph_has_its_networks_compiled_and_a_line_says_why(
    what, interpreted, monkeypatch
):
    # By the compiler of torch that compiles nothing, to save time.
    original = COMPILE
    compiled = []

    def compile_(self, options):
        compiled.append(type(self).__name__)
        original(self, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile_)
    found = []
    for use in (False, True):
        pyro.clear_param_store()
        np.random.seed(0)
        model, guide = odd(what)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            elbo = annealed()
            model.prior.elbo = elbo
            fit(model, guide, elbo, X, 5, **OPTIONS, compile=use)
        found.append(state(model, guide))
        lines = [str(w.message) for w in caught if w.category is RuntimeWarning]
        assert len(lines) == use
    assert compiled == ["MLPDecoder", "MLPEncoder"]
    assert re.search(f"2 networks alone are compiled: .*{REASONS[what]}", lines[0])
    assert (found[0] - found[1]).abs().max() < 1e-4
    assert model.decoder._compiled_call_impl is None
    # Looking at the programs leaves no trace in them; training counts its updates, and a first
    # look that fit takes in any case.
    assert model.prior.count == (6 if "buffers" in what else 0)
    assert model.prior.calls == (6 if what == "calls" else 0)


def test_rows_that_share_work_are_counted_at_run_time(monkeypatch):
    # Codes are summed out once for all rows that look alike, which saves more than a graph would.
    original = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, options: original(self, backend="eager")
    )
    model, guide = pair("categorical")
    with pytest.warns(RuntimeWarning, match=r"alone are compiled: the shape .*unique"):
        fit(model, guide, annealed(), X, 3, **OPTIONS, compile=True)


def test_without_a_compiler_nothing_is_compiled_and_a_line_says_so(monkeypatch):
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no C++ compiler\nwas found")

    monkeypatch.setattr(torch._inductor, "compile", fails)
    monkeypatch.setattr(nn.Module, "compile", fails)
    model, guide = pair()
    with pytest.warns(RuntimeWarning, match="nor are networks compiled .*no C.. compiler"):
        fit(model, guide, annealed(), X, 3, **OPTIONS, compile=True)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda: TracedLoss(annealed(), lambda batch: None, pair()[1]),
            "model is a plain function",
        ),
        (
            lambda: TracedLoss(
                annealed(num_particles=2, importance_weighted=True, doubly_reparameterized=True),
                *pair(),
            ),
            "run the guide twice",
        ),
    ],
)
def test_losses_that_are_refused_by_name(loss, message):
    with pytest.raises(NotOneGraphError, match=message):
        loss()


def test_a_graph_that_says_something_else_is_refused(monkeypatch):
    # As if the compiler had made a mistake in the seventh digit, and in the second one.
    compile_graph = graphs_module.compile_graph
    for factor, wrong in ((1 + 1e-6, False), (1.02, True)):

        def faulty(graph, inputs, factor=factor):
            run = compile_graph(graph, inputs)

            def call(*values):
                result, *others = run(*values)
                return (result * torch.tensor([factor, 1.0, 1.0]), *others)

            return call

        monkeypatch.setattr("vadd_pyro.compiled.update.compile_graph", faulty)
        model, guide = pair()
        loss = TracedLoss(annealed(), model, guide)
        adam = torch.optim.Adam([*model.parameters(), *guide.parameters()])
        if wrong:
            before = state(model, guide)
            with pytest.raises(NotOneGraphError, match=r"its loss is .* where the programs give"):
                Update(loss, adam, None, 1.0, X[:32])
            assert torch.equal(state(model, guide), before)
            assert not adam.state
        else:
            Update(loss, adam, None, 1.0, X[:32])


# ---------------------------------------------------------------------------------- its parts


def test_the_layout_is_a_round_trip():
    values = {
        "a": torch.randn(3, 5),
        "b": torch.randn(()),
        "c": torch.randn(16),
        "d": torch.randn(2),
    }
    layout = Layout(values)
    vector = layout.joined(list(values.values()))
    assert vector.shape == (layout.size,)
    views = layout.views(vector)
    assert all(torch.equal(views[name], value) for name, value in values.items())
    assert all(start % 16 == 0 for start in layout.starts.values())
    assert vector.count_nonzero() == sum(v.numel() for v in values.values())
    with pytest.raises(NotOneGraphError, match="one precision"):
        Layout({"a": torch.zeros(1), "b": torch.zeros(1, dtype=torch.double)})


def test_silent_networks_are_the_largest_without_statements():
    class Guide(Program):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
            self.other = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])

        def forward(self, batch):
            x = batch.x_0.float()
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(self.first(x) + self.other[0](x), 1.0).to_event(1))

    guide = Guide()
    batch = PROCESS.corrupt(X[:5], 0.5)
    found = silent_networks([guide], lambda: guide(batch))
    assert found == [guide.first, guide.other[0]]


def test_dropout_in_compiled_networks_draws_the_numbers_that_it_draws_uncompiled():
    network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    x, found = torch.randn(16, 4), []
    for networks in ([], [network]):
        network.zero_grad()
        torch.manual_seed(5)
        with compiled_networks(networks):
            network(x).square().sum().backward()
        found.append([torch.rand(3), *(p.grad.clone() for p in network.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not products.has_onednn(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("faster", [False, True])
def test_products_go_where_they_are_faster_and_stay_the_same(faster, monkeypatch):
    def function(x, w, b):
        h = torch.addmm(b, x, w.t())
        small = h[:4, :4] @ h[:4, :4]
        return h @ w, h.t() @ x, small

    inputs = torch.randn(200, 130), torch.randn(150, 130), torch.randn(150)
    seconds = []

    def measured(call):
        call()
        # Calls take turns, the usual one first.
        seconds.append(1.0 if len(seconds) % 2 == 0 else 1.0 - 0.1 * faster)
        return seconds[-1]

    monkeypatch.setattr(products, "_seconds", measured)
    graph = graphs_module.capture(function, inputs)
    decisions = products.choose_products(graph)
    assert list(decisions.values()) == [faster] * 3  # the small one is not asked about
    assert len(seconds) == 3 * 2 * products._ROUNDS
    used = graph.graph.find_nodes(op="call_function", target=torch.ops.vadd_pyro.linear.default)
    assert len(used) == 3 * faster
    for found, expected in zip(graph(*inputs), function(*inputs), strict=True):
        assert torch.allclose(found, expected, atol=1e-3)
    # A resumed run does as it did, whatever would be measured now.
    again = graphs_module.capture(function, inputs)
    first = next(iter(decisions))
    told = {**decisions, first: not faster}
    assert products.choose_products(again, told) == told
    assert len(seconds) == 3 * 2 * products._ROUNDS


def test_without_onednn_products_stay(monkeypatch):
    monkeypatch.setattr(products, "has_onednn", lambda: False)
    graph = graphs_module.capture(lambda x: (x @ x,), [torch.randn(200, 200)])
    assert products.choose_products(graph) == {}


# ------------------------------------------------------------------------------ the module form


def test_the_module_form_has_the_same_loss_and_gradient():
    model, guide = pair()
    elbo = annealed()
    loss_of = elbo(model, guide)
    compiled = CompiledLoss(loss_of)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for iteration in range(3):
            elbo.iteration = iteration
            results = []
            for call in (loss_of, compiled):
                torch.manual_seed(iteration)
                elbo.iteration = iteration
                loss = 3 * call(X[:16])
                compiled.zero_grad()
                loss.backward()
                assert elbo.iteration == iteration + 1
                gradient = torch.cat([p.grad.flatten() for p in compiled.parameters()])
                results.append((loss.item(), gradient))
            assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
            assert torch.allclose(results[0][1], results[1][1], atol=1e-4)
    with torch.no_grad():
        torch.manual_seed(5)
        alone = loss_of(X[:16])
        torch.manual_seed(5)
        assert torch.equal(compiled(X[:16]), alone)


@pytest.mark.parametrize("token", [2, -1])
def test_the_module_form_refuses_what_is_no_token(token):
    pyro.set_rng_seed(0)
    process = MaskingProcess(2, 8)
    decoder = MLPDecoder(process, 0, hidden_dim=16, num_layers=1, embedding_dim=4)
    compiled = CompiledLoss(MaskedDiffusionELBO(process)(models.MDM(decoder), guides.NoLatent()))
    x = torch.randint(2, (300, 8))
    with pyro.validation_enabled(False):
        assert compiled(x).isfinite()
        x[1] = token
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            compiled(x)


def test_the_module_form_says_why_it_runs_uncompiled_and_takes_no_other_loss():
    model, guide = odd("values")
    compiled = CompiledLoss(annealed()(model, guide))
    with pytest.warns(RuntimeWarning, match="the loss runs uncompiled: "):
        compiled(X[:8]).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled(X[:8]).isfinite()
    with pytest.raises(TypeError, match="loss must be elbo"):
        CompiledLoss(model)


def test_options_of_the_compiler_are_known_to_it():
    import torch._inductor.config

    from vadd_pyro.compiled.graphs import own_draws

    assert own_draws(torch.device("cpu")) == {"fallback_random": True}
    options = own_draws(torch.device("cuda"))
    assert not options.pop("reorder_for_locality")
    assert not options.pop("reorder_for_peak_memory")
    with torch._inductor.config.patch(own_draws(torch.device("cuda"))):  # or an unknown name
        assert torch._inductor.config.fallback_random
