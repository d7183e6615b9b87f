"""Several processes and parts of batches: the same optimisation, and one end for all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from distributed_trials import (
    PROCESS,
    Killed,
    X,
    annealed,
    dies_at,
    from_store,
    pair,
    same_rows,
    state,
)
from torch import nn

from vadd_pyro import MaskedDiffusionELBO, TokenCategorical, experiments, fit
from vadd_pyro.batches import Batches, DrawnBatches, share_of
from vadd_pyro.checkpoints import load_checkpoint
from vadd_pyro.cli import main
from vadd_pyro.distributed import Processes, joined
from vadd_pyro.locks import locked
from vadd_pyro.shared_sums import SharedSums

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What two processes have made together: see distributed_trials.py."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.raises(Killed):
        same_rows(folder / "one.pt", optimizer=dies_at(10), checkpoint_every=5)
    (folder / "damaged.pt").write_bytes(b"no checkpoint")
    with locked(folder / "locked.pt.lock", "there", "wait"):
        found = subprocess.run(
            [sys.executable, str(TESTS / "distributed_trials.py"), str(folder)],
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert found.returncode == 0, found.stderr
    return folder


@pytest.fixture(scope="module")
def found(place):
    """What each of them tells."""
    return [torch.load(place / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def reference():
    """The run without random numbers, in one process."""
    return same_rows()


def close(first, second):
    return torch.allclose(first, second, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------- one optimisation


def test_two_processes_make_the_updates_of_one(found, reference):
    weights, history = reference
    one, two = (told["exact"] for told in found)
    assert torch.equal(one["weights"], two["weights"])  # though they began with others
    assert close(one["weights"], weights)
    untrained = state(*pair("categorical"))
    assert (weights - untrained).abs().max() > 0.05  # far more than they may differ by
    assert one["history"] == two["history"]
    for name in ("loss", "kl", "kl_weight", "learning_rate", "iteration", "monitor_iteration"):
        assert one["history"][name] == pytest.approx(getattr(history, name), abs=1e-5)
    assert one["history"]["active_units"] == history.active_units


def test_parts_of_a_batch_make_the_updates_of_the_whole(found, reference):
    weights, history = reference
    in_parts, told = same_rows(accumulate=2)
    assert close(in_parts, weights)
    assert not torch.equal(in_parts, weights)  # for sums are taken in another order
    assert told.loss == pytest.approx(history.loss, abs=1e-5)
    one, two = (told["exact"]["in_parts"] for told in found)
    assert torch.equal(one, two)
    assert close(one, weights)


def test_parameters_in_pyros_store_and_those_that_get_no_gradient(found):
    pyro.set_rng_seed(5)
    expected = from_store()
    one, two = (told["exact"]["store"] for told in found)
    assert torch.equal(one, two)
    assert close(one, expected)
    for told in found:  # gradients that are large enough to be sent by themselves
        both = torch.cat([told["exact"]["store"], told["exact"]["weights"]])
        assert torch.equal(told["exact"]["alone"], both)
    pyro.set_rng_seed(5)
    assert torch.equal(one[-2:], from_store(1)[-2:])  # no decay without a gradient
    assert (one[-4:-2] - from_store(1)[-4:-2]).abs().max() > 0.01


def test_a_run_goes_on_in_another_number_of_processes(found, place, reference):
    weights, history = reference
    one, two = (told["other_numbers"] for told in found)
    assert torch.equal(one["weights"], two["weights"])
    assert close(one["weights"], weights)
    assert one["loss"] == pytest.approx(history.loss, abs=1e-5)
    assert len(one["warnings"]) == 1
    assert "of 1 processes, and goes on in 2" in one["warnings"][0]
    assert two["warnings"] == []
    stopped = load_checkpoint(place / "two.pt")
    assert stopped["iteration"] == 10
    assert len(stopped["other_processes"]) == 1
    with pytest.warns(RuntimeWarning, match="of 2 processes, and goes on in 1 with other random"):
        back, _ = same_rows(place / "two.pt")
    assert close(back, weights)


# --------------------------------------------------------------------------- their random numbers


def test_as_many_processes_go_on_bit_for_bit(found, place):
    one, two = (told["resumed"] for told in found)
    for told in (one, two):
        for name in ("weights", "history"):
            whole, again = (told[run][name] for run in ("whole", "killed"))
            if name == "weights":
                assert torch.equal(whole, again)
            else:
                times = {"seconds": None}
                assert {**whole, **times} == {**again, **times}
        assert told["whole"]["iteration"] == 20
    assert torch.equal(one["whole"]["weights"], two["whole"]["weights"])
    assert one["whole"]["history"]["monitor_iteration"] == [7, 14, 20]
    first, second = (load_checkpoint(place / f"{name}.pt") for name in ("whole", "killed"))
    states = [[s["random"]["torch"] for s in (c, *c["other_processes"])] for c in (first, second)]
    for whole, again in zip(*states, strict=True):
        assert torch.equal(whole, again)
    assert not torch.equal(*states[0])


def test_seeds_of_processes_and_iterations_differ_and_one_alone_keeps_its_own():
    seeds = {
        Processes(rank, 3).seed(7, iteration) for rank in range(3) for iteration in range(0, 50, 5)
    }
    assert len(seeds) == 30
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert Processes().seed(7) == 7
    assert Processes().seed(7, 5) != 7


def test_shares_make_up_the_batch():
    whole = Batches(X, 24, 3, torch.device("cpu"))
    for size in (2, 3, 4):
        parts = [
            Batches(X, 24, 3, torch.device("cpu"), share_of(24, rank, size))
            for rank in range(size)
        ]
        for iteration in (0, 12, 13):  # over the end of an epoch too
            assert torch.equal(torch.cat([part(iteration) for part in parts]), whole(iteration))

    class Rows:
        def at(self, iteration, batch_size):
            return X[iteration : iteration + batch_size]

    parts = [
        DrawnBatches(Rows(), 8, PROCESS.check_tokens, torch.device("cpu"), rank, 2, exact=True)
        for rank in range(2)
    ]
    assert torch.equal(torch.cat([part(5) for part in parts]), X[5:13])
    assert all(torch.equal(part.to_monitor(), X[5:13]) for part in parts)
    asked = []
    draw = lambda n: asked.append(n) or X[:n]  # noqa: E731
    drawn = DrawnBatches(draw, 8, PROCESS.check_tokens, torch.device("cpu"), 1, 2)
    assert len(drawn(0)) == 4
    assert asked == [4]


def test_graphs_of_two_processes_do_what_the_programs_do(found):
    one, two = (told["compiled"] for told in found)
    assert torch.equal(one["graph"]["weights"], two["graph"]["weights"])
    assert close(one["graph"]["weights"], one["eager"]["weights"])
    assert one["graph"]["loss"] == pytest.approx(one["eager"]["loss"], abs=1e-4)


def test_processes_give_up_their_graphs_together(found):
    one, two = (told["given_up"] for told in found)
    assert torch.equal(one["weights"], two["weights"])
    (line,) = one["lines"]
    assert "end at iteration 10, after 10 of them" in line
    assert not two["lines"]


def test_an_error_before_a_comparison_of_graphs_is_told_to_all(found):
    for iteration in (9, 10):
        one, two = (told["no_rows"][iteration] for told in found)
        assert two["kind"] == one["kind"] == "ValueError"
        assert "no such rows (process 1 of 2)" in one["text"]


# ------------------------------------------------------------------------------------ one end


FAILURES = [
    (
        "nan",
        "NonFiniteLossError",
        "NonFiniteLossError",
        r"loss is nan at iteration 3.*nan\.pt hol",
    ),
    ("value", "ValueError", "ValueError", "no such rows"),
    ("program", "OtherProcessError", "KeyError", "of a program"),
    ("signal", "Interrupted", "Interrupted", r"SIGTERM after iteration 4, kept in .*signal\.pt"),
    (
        "uneven",
        "ValueError",
        "ValueError",
        "multiple of processes x accumulate = 2 x 1 = 2, got 9",
    ),
    ("uneven_parts", "ValueError", "ValueError", "accumulate = 2 x 2 = 4, got 18"),
    (
        "unlike",
        "ProcessesDifferError",
        "ProcessesDifferError",
        "learning_rate is 0.1 in process 0",
    ),
    ("other_rows", "ProcessesDifferError", "ProcessesDifferError", "data is '300 rows, crc32"),
    ("few_rows", "ValueError", "ValueError", "gave 3 rows where 4 were asked for"),
    ("bad_rows", "ValueError", "ValueError", r"data.* 0\.\.1"),
    (
        "drift",
        "ProcessesDifferError",
        "ProcessesDifferError",
        r"model\..* after iteration 2: each",
    ),
    ("in_use", "InUseError", "InUseError", r"process \d+ is at work on .*locked\.pt"),
    ("damaged", "DamagedCheckpointError", "DamagedCheckpointError", r"damaged\.pt cannot be read"),
]


@pytest.mark.parametrize(
    ("name", "kind_0", "kind_1", "text"), FAILURES, ids=[case[0] for case in FAILURES]
)
def test_what_happens_to_one_is_known_to_all(name, kind_0, kind_1, text, found):
    told = [one["failures"][name] for one in found]
    assert [one["kind"] for one in told] == [kind_0, kind_1]
    for one in told:
        assert re.search(text, one["text"]), one["text"]
    if name in ("nan", "value", "program", "signal"):
        assert torch.equal(told[0]["weights"], told[1]["weights"])
    if name in ("nan", "value", "program"):
        assert "(process 1 of 2)" in told[0]["text"]


def test_failures_leave_checkpoints_and_the_group_whole(found, place, reference):
    assert load_checkpoint(place / "nan.pt")["iteration"] == 2
    assert load_checkpoint(place / "signal.pt")["iteration"] == 4
    assert not (place / "drift.pt").exists()
    for told in found:
        assert close(told["failures"]["after_all"]["weights"], reference[0])
    assert not list(place.glob("*.lock"))


# ------------------------------------------------------------------- batches that have no parts


def test_what_joins_the_rows_of_a_batch_is_refused():
    with pytest.raises(ValueError, match="multiple of processes x accumulate = 1 x 5 = 5, got 24"):
        same_rows(accumulate=5)
    with pytest.raises(ValueError, match="accumulate must be an integer of at least 1, got 0"):
        same_rows(accumulate=0)
    model, guide = pair()
    options = dict(batch_size=8, accumulate=2, progress=False)
    with pytest.raises(ValueError, match=r"free_bits = 0\.1 is compared with the mean KL"):
        fit(model, guide, MaskedDiffusionELBO(PROCESS, free_bits=0.1), X, 2, **options)
    model.decoder.norm = nn.BatchNorm1d(4)
    with pytest.raises(
        ValueError, match=r"model\.decoder\.norm is BatchNorm1d, which takes means"
    ):
        fit(model, guide, annealed(), X, 2, **options)
    fit(model, guide, annealed(), X, 2, batch_size=8, progress=False)
    with pytest.raises(ValueError, match="gave 7 rows where 8 were asked for"):
        fit(*pair(), annealed(), lambda n: X[: n - 1], 2, **options)

    def shared(batch):
        scale = pyro.param("scale", torch.ones(2))
        pyro.sample("shared", dist.Normal(0.0, 1.0), obs=scale.sum())
        with pyro.plate("data", len(batch), dim=-1):
            logits = scale.expand(len(batch), 3, 2)
            pyro.sample("x_0", TokenCategorical(logits, batch.target), obs=batch.x_0)

    def nothing(batch):
        pass

    with pytest.raises(ValueError, match="sites outside the data plate, which count once"):
        fit(shared, nothing, annealed(), X, 2, **options)
    fit(shared, nothing, annealed(), X, 2, batch_size=8, progress=False)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no files in memory here")
def test_sums_through_memory_are_those_of_all_reduce(found, reference):
    one, two = (told["through_memory"] for told in found)
    for told in (one, two):
        for name in ("whole", "in_pieces"):
            for value, expected in zip(told[name], told["expected"], strict=True):
                assert torch.equal(value, expected)
        for name in ("hidden", "elsewhere", "tight", "nowhere", "full"):
            assert told[name] is None, name
        assert close(told["weights"], reference[0])
        assert len(told["asked"]) > 1
        assert told["asked"] == sorted(told["asked"])
        assert not told["left"]
    assert torch.equal(one["weights"], two["weights"])


@pytest.mark.parametrize(("size", "room"), [(2, 128), (3, 1024), (3, 192), (4, 64)])
def test_any_number_of_processes_adds_up_through_memory(size, room, monkeypatch):
    draw = torch.Generator().manual_seed(size)
    shapes = [(31, 5), (1,), (70,)]
    kinds = [torch.float32, torch.bfloat16, torch.float32, torch.float64]
    given = [
        [torch.randn(shape, generator=draw).to(kind) for kind in kinds for shape in shapes]
        for _ in range(size)
    ]
    expected = [sum(each[1:], each[0]) for each in zip(*given, strict=True)]
    memory = torch.full((size, room), 255, dtype=torch.uint8)
    barrier = threading.Barrier(size)
    monkeypatch.setattr(SharedSums, "_meet", lambda _: barrier.wait(timeout=60))

    def process(rank):
        add = SharedSums(rank, size, memory)
        for _ in range(20):  # one that runs ahead would spoil what another still reads
            found = [value.clone() for value in given[rank]]
            add(found)
        return found

    with ThreadPoolExecutor(size) as pool:
        for found in pool.map(process, range(size)):
            for value, total in zip(found, expected, strict=True):
                assert torch.equal(value, total)


def test_processes_that_cannot_meet_are_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")

    def join(device):
        with joined(device) as own:
            return own

    with pytest.raises(ValueError, match="environment lacks RANK, MASTER_ADDR, MASTER_PORT"):
        join("cpu")
    for name, value in (("RANK", "0"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="device is 'cuda:0' for several processes"):
        join("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="process 1 of this machine has no GPU, there are 1"):
        join("cuda")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join("cuda") == "cuda"  # one process takes what it is given
    assert Processes.current().alone


def test_nothing_of_a_group_is_left_to_abort_the_interpreter():
    script = """
import os, weakref
import torch.distributed as dist
from vadd_pyro.distributed import joined

os.environ |= {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
meet = dist.init_process_group
dist.init_process_group = lambda backend, timeout: meet(
    backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1
)
with joined("cpu"):
    import torch._dynamo  # as the first optimiser does
    group = weakref.ref(dist.group.WORLD)
    assert group() is not None
assert group() is None, "the group outlives its end, with its threads"
"""
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr


# ------------------------------------------------------------------------------ the command line


def test_torchrun_trains_one_run(tmp_path):
    draw = np.random.default_rng(0)
    rows = draw.integers(2, size=(200, 1)) ^ (draw.random((200, 3)) < 0.05)
    (tmp_path / "bits.csv").write_text("\n".join(",".join(map(str, r)) for r in rows.astype(int)))
    sizes = ("hidden_dim=16", "num_blocks=1", "latent_hidden_dim=8")
    command = [
        *("train", "table", str(tmp_path / "bits.csv"), "--out", str(tmp_path / "run")),
        *("--num-iterations", "12", "--batch-size", "16", "--num-codes", "4", "--accumulate", "2"),
        *("--set", "num_guide_iterations=4", "--no-progress", "--device", "cpu"),
        *(part for size in sizes for part in ("--size", size)),
    ]
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    found = subprocess.run(
        [sys.executable, *launch, "-m", "vadd_pyro", *command],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("trained for") == 1  # the first alone says so
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.suffix != ".previous") == [
        *("history.json", "model.pt", "run.pt", "settings.json")
    ]
    run = experiments.load(tmp_path / "run")
    few = dict(bound_steps=[1], sample_steps=[], num_rows=10, num_particles=4, one_token=False)
    (bound,) = experiments.evaluate(run, progress=False, **few)["bounds"]
    assert len(bound["values"]) == 10
    assert all(-20 < value < 0 for value in bound["values"])
    checkpoint = load_checkpoint(tmp_path / "run" / "model.pt")
    assert checkpoint["iteration"] == 12
    assert len(checkpoint["other_processes"]) == 1
    # The same command goes on alone: nothing is left to do but the last stage's file.
    (tmp_path / "run" / "run.pt").unlink()
    with pytest.warns(RuntimeWarning, match="of 2 processes, and goes on in 1"):
        assert main(command) == 0
    assert torch.equal(state(experiments.load(tmp_path / "run").model), state(run.model))
