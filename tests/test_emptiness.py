"""Rows without targets, left out before the programs run."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import small_pair

from vadd_pyro import CompiledLoss, MaskedDiffusionELBO, MaskingProcess, fit
from vadd_pyro.checkpoints import restore_random_state
from vadd_pyro.compiled.traced import TracedLoss
from vadd_pyro.emptiness import DrawLaw, KeptRows
from vadd_pyro.times import AtomTimes, BalancedTimes, GridTimes, UniformTimes

PROCESS = MaskingProcess(3, 2)
X = torch.randint(3, (256, 2), generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, Any] = dict(
    batch_size=64, progress=False, log_every=1, monitor_every=None, learning_rate=0.01
)


def pair(prior: str = "standard_normal") -> tuple[Any, Any]:
    torch.manual_seed(1)
    return small_pair(prior, PROCESS)


def elbo(objective: str = "delbo", drop: bool = True, **options: Any) -> MaskedDiffusionELBO:
    return MaskedDiffusionELBO(PROCESS, objective, drop_empty_rows=drop, **options)


def differentiated(loss: Any, model: Any, seed: int = 3) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    value = loss(X)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("prior", ["none", "categorical"])
@pytest.mark.parametrize(("objective", "steps"), [("delbo", None), ("chain", 5)])
def test_loss_and_gradient_are_those_of_all_rows(prior, objective, steps):
    model, guide = pair(prior)  # nothing is drawn but times and masks, so they are equal
    found = [
        differentiated(elbo(objective, drop, num_steps=steps)(model, guide), model)
        for drop in (False, True)
    ]
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_with_a_drawn_latent_they_are_so_on_average():
    model, guide = pair()
    means = []
    for drop in (False, True):
        torch.manual_seed(5)
        loss = elbo(drop=drop)
        values = torch.tensor([loss.loss(model, guide, X) for _ in range(200)]) / len(X)
        means.append((values.mean(), values.std() / len(values) ** 0.5))
    (one, error), (other, own) = means
    assert (one - other).abs() < 4 * (error**2 + own**2).sqrt()


def test_programs_see_all_rows_with_targets_and_few_others():
    loss, seen = elbo(), []
    rows, room = loss.kept_rows, loss.kept_rows.number(loss.law, X)
    for seed in range(50):
        torch.manual_seed(seed)
        batch = elbo(drop=False).draw(X)
        kept = rows(batch, loss.law)
        assert len(kept) == room
        active = batch.target.any(-1)
        number = int(active.sum())
        seen.append(number)
        for name in ("x_0", "x_t", "t", "weight", "target", "masked"):
            assert getattr(kept, name)[:number].equal(getattr(batch, name)[active]), name
        assert not kept.target[number:].any()
    # A third of the rows has nothing masked, and times are spread evenly.
    assert max(seen) < room < 0.76 * len(X)
    assert rows.exceeded == 0


@pytest.mark.parametrize(
    ("process", "times"),
    [
        (MaskingProcess(3, 64), UniformTimes()),
        (PROCESS, UniformTimes(True)),
        (PROCESS, BalancedTimes()),
    ],
)
def test_where_few_rows_are_empty_all_are_taken(process, times):
    rows = torch.zeros(100, process.length, dtype=torch.long)
    assert KeptRows(True).number(DrawLaw(times, process), rows) == 100


def test_most_rows_of_a_long_chain_are_empty():
    law, rows = DrawLaw(GridTimes(20), PROCESS, steps=True), KeptRows(True)
    assert rows.number(law, torch.zeros(1000, 2, dtype=torch.long)) < 150
    assert rows.number(law, X[:2]) == 2
    assert KeptRows(False).number(law, X) == len(X)


def test_the_number_is_found_without_a_trace():
    class Counting(UniformTimes):
        calls = 0

        def draw(self, *args):
            self.calls += 1
            np.random.rand()
            return super().draw(*args)

    times = Counting()
    np.random.seed(0)
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    KeptRows(True).number(DrawLaw(times, PROCESS), X)
    assert torch.get_rng_state().equal(before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert times.calls == 0


def test_another_law_has_another_number():
    loss = elbo()
    first = loss.kept_rows.number(loss.law, X)
    loss.times = AtomTimes(0.5)
    assert first < loss.kept_rows.number(loss.law, X) < len(X)
    rows = weakref.ref(loss.kept_rows)
    del loss
    gc.collect()
    assert rows() is None


def test_a_batch_with_more_is_taken_whole(monkeypatch):
    monkeypatch.setattr(KeptRows, "number", lambda self, law, x_0: len(x_0) // 4)
    loss = elbo()
    batch = loss.draw(X)
    assert loss.kept_rows(batch, loss.law) is batch
    assert loss.kept_rows.exceeded == 1
    with loss.kept_rows.in_graph():
        kept = loss.kept_rows(batch, loss.law)
    assert len(kept) == len(X) // 4
    assert kept.weight.isnan().all()


def test_further_arguments_would_not_fit():
    model, guide = pair()
    with pytest.raises(ValueError, match="drop_empty_rows=True gives the programs fewer rows"):
        elbo()(model, guide)(X, torch.zeros(len(X)))


def test_plates_and_scales_would_not_fit():
    class Part(torch.nn.Module):
        def __init__(self, program):
            super().__init__()
            self.program = program

        def forward(self, batch):
            with pyro.plate("data", 1000, subsample_size=len(batch)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                logits = self.program.decoder(batch.x_t, z, batch.t)
                law = dist.Categorical(logits=logits).mask(batch.target).to_event(1)
                pyro.sample("x_0", law, obs=batch.x_0)

    class Guess(torch.nn.Module):
        def forward(self, batch):
            with pyro.plate("data", 1000, subsample_size=len(batch)):
                pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    model = Part(pair()[0])
    elbo(drop=False).loss(model, Guess(), X)
    with pytest.raises(ValueError, match=r"'z' stands in the plate 'data' of 1\d\d of 1000 rows"):
        elbo().loss(model, Guess(), X)


def test_a_graph_is_compared_on_a_batch_that_it_takes(monkeypatch):
    monkeypatch.setattr(KeptRows, "number", lambda self, law, x_0: min(len(x_0), 168))
    model, guide = pair()
    loss = elbo()
    traced = TracedLoss(loss, model, guide)
    for seed in range(10):
        torch.manual_seed(seed)
        random, found = traced.reference(X)
        before = loss.kept_rows.exceeded
        restore_random_state(random)
        assert traced.eager(X).loss == found.loss
        assert loss.kept_rows.exceeded == before
    assert loss.kept_rows.exceeded > 0


@pytest.mark.parametrize("number", [None, 44])
def test_a_compiled_run_drops_the_same_rows(number, monkeypatch):
    """Of 64 rows 43 +- 3 have something masked: with room for 44, the programs take over in many
    an update.
    """
    if number is not None:
        monkeypatch.setattr(KeptRows, "number", lambda self, law, x_0: min(len(x_0), number))
    runs = []
    for compiled in (False, True):
        model, guide = pair()
        loss = elbo()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            history = fit(model, guide, loss, X, 30, **OPTIONS, compile=compiled)
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        runs.append((history.loss, weights))
        assert (loss.kept_rows.exceeded > 0) == (number is not None)
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-4)
    assert (runs[0][1] - runs[1][1]).abs().max() < 1e-3


def test_the_module_form_takes_all_rows_where_there_are_more(monkeypatch):
    monkeypatch.setattr(KeptRows, "number", lambda self, law, x_0: min(len(x_0), 174))
    model, guide = pair()
    loss = elbo()(model, guide)
    compiled = CompiledLoss(loss)
    kept = loss.elbo.kept_rows
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        compiled(X)
        for seed in range(20):
            found = [differentiated(form, model, seed) for form in (loss, compiled)]
            for one, other in zip(*found, strict=True):
                assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)
    assert 0 < kept.exceeded < 40  # 171 +- 6 rows have targets


def test_a_run_does_not_go_on_with_another_number_of_rows(tmp_path):
    path = tmp_path / "run.pt"
    model, guide = pair()
    fit(model, guide, elbo(drop=False), X, 2, checkpoint=path, **OPTIONS)
    with pytest.raises(ValueError, match="belongs to another run"):
        fit(model, guide, elbo(), X, 2, checkpoint=path, resume=True, **OPTIONS)
