"""What checkpoints survive: kills, damage, malice, full disks."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import small_pair
from training_runs import (
    PROCESS,
    Stream,
    assert_ends_as,
    damage,
    limit_files,
    pair,
    signalling,
    state,
    train,
)

from vadd_pyro import (
    CheckpointWriteError,
    DamagedCheckpointError,
    Interrupted,
    checkpoints,
    cli,
    experiments,
    trainer,
)
from vadd_pyro.checkpoints import (
    check_space,
    load_checkpoint,
    newest_checkpoint,
    previous_of,
    remove_stale,
    save_checkpoint,
    write_whole,
)
from vadd_pyro.runs import load_run

TESTS = Path(__file__).parent


# --------------------------------------------------------------------------------- two checkpoints


def test_fifty_kills_lose_nothing_and_change_nothing(tmp_path):
    """See kill_trials.py, which asserts what must hold after every single one."""
    found = subprocess.run(
        [sys.executable, str(TESTS / "kill_trials.py"), str(tmp_path), "50", "0"],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    assert sum(told["kills"].values()) == 50
    assert min(told["kills"].values()) >= 10
    assert told["runs"] >= 1  # each has ended as the one that was not killed
    assert told["left_partial"] >= 10  # that many were hit while a checkpoint was written
    assert told["left_twice"] >= 1  # and some when the old one had both names


def test_the_checkpoint_before_is_kept(tmp_path):
    path = tmp_path / "run.pt"
    train(path)
    assert load_checkpoint(path)["iteration"] == 30
    assert load_checkpoint(previous_of(path))["iteration"] == 25
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.pt", "run.pt.previous"]


def no_second_names(*arguments):
    raise OSError(1, "Operation not permitted")  # as on FAT, and some network file systems


@pytest.mark.parametrize("two_names", [True, False])
def test_a_checkpoint_is_whole_before_and_after_every_call(two_names, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    found = []
    calls = {name: getattr(os, name) for name in ("fsync", "link", "replace", "unlink")}
    if not two_names:
        calls["link"] = no_second_names
    for name in calls:

        def watched(*arguments, call=calls[name]):
            call(*arguments)
            newest = newest_checkpoint(path)
            if two_names and newest is not None:
                assert newest == path
            found.append(None if newest is None else load_checkpoint(newest)["a"])

        monkeypatch.setattr(os, name, watched)
    for number in range(3):
        save_checkpoint(path, {"a": number}, keep_previous=True)
    # Written; the old one's other name, asked for and given; the new one renamed; the folder.
    if two_names:
        assert found == [None, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2]
    else:
        assert found == [None, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert load_checkpoint(previous_of(path))["a"] == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_two_names_of_one_checkpoint_become_two_checkpoints(tmp_path):
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"a": 0})
    os.link(path, previous_of(path))  # as a process leaves them that is killed just then
    save_checkpoint(path, {"a": 1}, keep_previous=True)
    found = [load_checkpoint(file)["a"] for file in (path, previous_of(path))]
    assert found == [1, 0]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("two_names", [True, False])
def test_a_write_that_fails_at_any_call_leaves_a_checkpoint_to_resume(
    number, two_names, tmp_path, monkeypatch
):
    path = tmp_path / "run.pt"
    # Calls of a write: the file, its other name (asked for, given), its name, the folder. The
    # first checkpoint has no other.
    left = [3 + 3 * 5 + 1 + number]

    def failing(call):
        def counted(*arguments):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(5, "Input/output error")
            return call(*arguments)

        return counted

    if not two_names:
        monkeypatch.setattr(os, "link", no_second_names)
    for name in ("fsync", "link", "replace"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    refused = pytest.raises(CheckpointWriteError, match=r"iteration 25: .*run\.pt could not be wr")
    if number == 1:  # a second name is not needed
        train(path)
    else:
        with refused:
            train(path)
    monkeypatch.undo()
    newest = newest_checkpoint(path)
    assert load_checkpoint(newest)["iteration"] == {1: 30, 4: 25}.get(number, 20)
    assert (newest == path) == (two_names or number != 3)
    assert sorted(p.name for p in tmp_path.iterdir() if p != path) == ["run.pt.previous"]
    programs, _ = train(path)
    assert_ends_as(path, programs, tmp_path)


def test_what_dead_processes_left_half_written_goes_and_what_others_write_stays(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = ("run.pt.{}.partial", "run.pt.{}.probe", "run.pt.{}.spare", "other.pt.{}.partial")
    dead = [tmp_path / name.format(gone.pid) for name in names]
    alive = [tmp_path / name.format(os.getpid()) for name in names]
    plain = [tmp_path / name for name in ("run.pt.x.partial", "run.pt.partial", "3.partial.txt")]
    for file in (*dead, *alive, *plain):
        file.write_text("half")
    remove_stale(tmp_path, "run.pt")
    assert [file.exists() for file in dead] == [False, False, False, True]
    remove_stale(tmp_path)
    assert not any(file.exists() for file in dead)
    assert all(file.exists() for file in (*alive, *plain))
    dead[0].write_text("half")
    train(tmp_path / "run.pt", num_iterations=1)
    assert not dead[0].exists()


# ------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("kind", ["cut", "empty", "bit"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(kind, tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(Interrupted):
        train(path, Stream(27, signalling(signal.SIGTERM)))
    damage(path, kind)
    programs = pair()
    before = state(*programs)
    with pytest.raises(DamagedCheckpointError) as refused:
        train(path, programs=programs)
    told = str(refused.value)
    assert f"{path} cannot be read as a checkpoint, it is damaged" in told
    assert f"{path}.previous, of iteration 25, is whole: remove {path} and resume" in told
    assert torch.equal(state(*programs), before)
    path.unlink()  # as it says
    programs, _ = train(path)
    assert_ends_as(path, programs, tmp_path)
    damage(path, kind)
    damage(previous_of(path), "cut")
    with pytest.raises(DamagedCheckpointError, match=r"Nor can the one before it: .*previous can"):
        train(path)
    previous_of(path).unlink()
    with pytest.raises(DamagedCheckpointError) as refused:
        train(path)
    assert "before" not in str(refused.value)


def test_no_bit_of_a_checkpoint_changes_unnoticed(tmp_path):
    path = tmp_path / "a.pt"
    content = {"a": torch.arange(40.0), "b": [1.5, "text"], "iteration": 3}
    save_checkpoint(path, content)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = unnoticed = 0
    for offset in torch.randperm(len(whole), generator=generator)[:400].tolist():
        changed = bytearray(whole)
        changed[offset] ^= 1 << (offset % 8)
        path.write_bytes(changed)
        try:
            found = load_checkpoint(path)
        except ValueError as error:
            refused += str(path) in str(error)
        else:  # it was a bit between the parts, which nobody reads
            unnoticed += 1
            assert torch.equal(found["a"], content["a"])
            assert (found["b"], found["iteration"]) == (content["b"], 3)
    assert refused + unnoticed == 400
    assert refused > 50


def test_checksums_are_written_though_a_setting_leaves_them_out(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        save_checkpoint(tmp_path / "a.pt", {"a": torch.ones(3)})
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_checkpoint(tmp_path / "a.pt")["a"].sum() == 3


class Malicious:
    """What a pickle may hold: a call that reading it makes."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("form", ["pickle", "archive", "inside", "old"])
@pytest.mark.parametrize("setting", [False, True])
def test_what_a_malicious_file_holds_is_not_run(form, setting, tmp_path, monkeypatch, capsys):
    mark, folder = tmp_path / "mark", tmp_path / "run"
    path = folder / "run.pt"
    folder.mkdir()
    if setting:  # which makes torch.load run code where it is not told otherwise
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    if form == "pickle":
        path.write_bytes(pickle.dumps(Malicious(mark)))
    elif form == "inside":
        save_checkpoint(path, {"iteration": 3, "weights": [torch.ones(2), Malicious(mark)]})
    else:
        torch.save(Malicious(mark), path, _use_new_zipfile_serialization=form == "archive")
    readers = [
        lambda: load_checkpoint(path),
        lambda: train(path),
        lambda: load_run(folder),
        lambda: experiments.load(folder),
    ]
    for read in readers:
        with pytest.raises(ValueError, match=r"run\.pt cannot be read as a checkpoint"):
            read()
    for command in ("inspect", "evaluate", "sample"):
        assert cli.main([command, str(folder)]) == 1
        assert "run.pt cannot be read as a checkpoint" in capsys.readouterr().err
    assert not mark.exists()
    # The file was one indeed.
    with open(path, "rb") as file:
        pickle.load(file) if form == "pickle" else torch.load(file, weights_only=False)
    assert mark.exists()


def test_a_checkpoint_of_another_kind_is_no_run(tmp_path):
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"model": {}})
    with pytest.raises(ValueError, match=r"run\.pt is no checkpoint of fit: it lacks configur"):
        train(path)


# ------------------------------------------------------------------------------------------- disks


@pytest.mark.parametrize("optimizer", [None, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_the_estimated_size_is_about_that_of_the_file(optimizer, ema_decay, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "vadd_pyro.training.check_space", lambda path, size, saves: asked.append((size, saves))
    )
    path = tmp_path / "run.pt"
    options = dict(optimizer=optimizer, ema_decay=ema_decay, num_iterations=12)
    programs = small_pair("standard_normal", PROCESS, width=200)
    train(path, programs=programs, **options)
    train(path, programs=programs, **options)
    (first, saves), (again, none) = asked
    actual = path.stat().st_size
    assert (saves, none) == (3, 0)
    assert actual <= again < 1.2 * actual  # what the optimiser keeps is known by then
    assert actual <= first < 2 * actual


def test_a_disk_without_space_is_told_before_training_with_both_numbers(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    train(path, num_iterations=30)
    size = path.stat().st_size
    usage = shutil.disk_usage(tmp_path)

    def with_free(free, total=usage.total):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda place: usage._replace(free=free, total=total)
        )

    programs = pair()
    before = state(*programs)
    with_free(1000)
    with pytest.raises(CheckpointWriteError) as refused:
        train(tmp_path / "other.pt", programs=programs)
    told = str(refused.value)
    assert told.startswith(
        f"{tmp_path / 'other.pt'} would find no space: a checkpoint takes about"
    )
    assert "up to 3 stand on the disk at once" in told
    assert re.search(r"takes about \d+(\.\d)? kB.*and \d+ kB more are needed, but 1 kB are", told)
    assert torch.equal(state(*programs), before)
    train(path, num_iterations=30)  # which has nothing left to write
    # What stands there already is counted: only the third, which is being written, is new.
    for saves in (1, 2, 10):
        with_free(size + 5000)
        check_space(path, size, saves)
        with_free(size - 5000)
        with pytest.raises(CheckpointWriteError):
            check_space(path, size, saves)
    for saves, copies in ((1, 1), (2, 2), (3, 3), (10, 3)):
        with_free(copies * size)
        check_space(tmp_path / "other.pt", size, saves)
        with_free(copies * size - 1)
        with pytest.raises(CheckpointWriteError, match=f"up to {copies} stand"):
            check_space(tmp_path / "other.pt", size, saves)
    with_free(0, total=0)  # file systems that tell nothing
    check_space(tmp_path / "other.pt", size, 10)


def test_a_disk_that_is_full_later_stops_training_and_keeps_the_last_checkpoint(tmp_path):
    """A limit on the size of files stands for the full disk: the system refuses the write."""
    path = tmp_path / "run.pt"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, limits[1]))

    programs = pair()
    try:
        with pytest.raises(CheckpointWriteError) as refused:
            train(path, Stream(12, limit), programs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = str(refused.value)
    assert told.startswith(f"training stopped at iteration 15: {path} could not be written")
    assert told.endswith("is the disk full? What stood there before is intact: iteration 10")
    assert load_checkpoint(path)["iteration"] == 10
    assert load_checkpoint(previous_of(path))["iteration"] == 5
    assert not list(tmp_path.glob("*.partial"))
    assert state(*programs).isfinite().all()
    programs, _ = train(path)
    assert_ends_as(path, programs, tmp_path)


def full():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_no_half_written_file_takes_the_place_of_a_whole_one(share, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"a": torch.zeros(1000)})
    room = int(share * path.stat().st_size)
    monkeypatch.setattr(
        checkpoints, "open", lambda *found: limit_files(room, full)(*found), raising=False
    )
    with pytest.raises(CheckpointWriteError, match=r"run\.pt could not be written"):
        save_checkpoint(path, {"a": torch.ones(1000)}, keep_previous=True)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "text", lambda file: file.write(bytes(room + 1)))
    monkeypatch.undo()
    assert load_checkpoint(path)["a"].sum() == 0
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_a_full_disk_or_a_damaged_checkpoint_stops_a_comparison_and_costs_no_cell(
    tmp_path, monkeypatch, capsys
):
    command = ["compare", "--data", "moons", "--priors", "none", "--seeds", "1"]
    command += ["--vocab-size", "8"]
    command += ["--batch-size", "16", "--num-held-out", "50", "--num-iterations", "30"]
    command += ["--checkpoint-every", "5", "--no-progress", "--out", str(tmp_path)]
    save = trainer.save_checkpoint

    def full(path, content, **options):
        if content["iteration"] == 20:
            raise CheckpointWriteError(f"{path} could not be written")
        save(path, content, **options)

    monkeypatch.setattr(trainer, "save_checkpoint", full)
    assert cli.main(command) == 1
    assert "training stopped at iteration 20" in capsys.readouterr().err
    monkeypatch.undo()
    (place,) = tmp_path.glob("cells/*")
    assert sorted(p.name for p in place.iterdir()) == ["checkpoint.pt", "checkpoint.pt.previous"]
    damage(place / "checkpoint.pt", "bit")
    assert cli.main(command) == 1
    assert "of iteration 10, is whole: remove" in capsys.readouterr().err
    (place / "checkpoint.pt").unlink()
    assert cli.main(command) == 0
    assert sorted(p.name for p in place.iterdir()) == ["result.json", "run.pt"]


def test_the_soak_tells_growth_from_noise():
    spec = importlib.util.spec_from_file_location("soak", TESTS.parent / "benchmarks" / "soak.py")
    soak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    assert soak.resident() > 50
    minutes = [i / 20 for i in range(200)]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, generator=generator).tolist()
    for slope in (0.0, 0.3):
        warming = [
            400 + slope * t + e + 50 * math.exp(-5 * t)
            for t, e in zip(minutes, noise, strict=True)
        ]
        found = soak.growth(minutes, warming)
        assert abs(found.slope - slope) < 4 * found.stderr
        assert 0 < found.stderr < 0.1
    # Values that hang together say less than as many that do not.
    drift = torch.tensor(noise).cumsum(0).tolist()
    assert soak.growth(minutes, drift).stderr > 3 * found.stderr
    assert math.isinf(soak.growth(minutes[:10], noise[:10]).stderr)
