"""What training runs survive: signals, and other processes at work."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from training_runs import Stream, assert_ends_as, pair, signalling, state, train

from vadd_pyro import Interrupted, InUseError, cli, experiments, interruption, trainer
from vadd_pyro.checkpoints import load_checkpoint, previous_of
from vadd_pyro.experiments.settings import Settings
from vadd_pyro.locks import locked, locked_folder

# ----------------------------------------------------------------------------------------- signals


@pytest.fixture(autouse=True)
def _usual_handlers():
    """Those of a program in the foreground; one in the background may ignore SIGINT."""
    former = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for one, handler in former.items():
        signal.signal(one, handler)


@pytest.mark.parametrize("one", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_update_writes_and_says_so(one, tmp_path):
    path = tmp_path / "run.pt"
    former = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    programs = pair()
    with pytest.raises(Interrupted) as stopped:
        train(path, Stream(17, signalling(one)), programs)
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert (stopped.value.by, stopped.value.iteration) == (one, 18)
    assert stopped.value.checkpoint == path
    assert stopped.value.exit_status == {signal.SIGINT: 130, signal.SIGTERM: 143}[one]
    assert str(stopped.value) == f"stopped by {one.name} after iteration 18, kept in {path}"
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == former
    content = load_checkpoint(path)
    assert content["iteration"] == 18
    assert load_checkpoint(previous_of(path))["iteration"] == 15
    # The programs are left as at the end of a run.
    assert torch.equal(torch.cat([a.flatten() for a in content["average"]]), state(*programs))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.pt", "run.pt.previous"]
    programs, _ = train(path)
    assert_ends_as(path, programs, tmp_path)


def test_a_run_that_is_stopped_after_every_update_is_the_same_run(tmp_path):
    path = tmp_path / "run.pt"
    for iteration in range(30):
        with pytest.raises(Interrupted) as stopped:
            train(path, Stream(iteration, signalling(signal.SIGTERM)))
        assert stopped.value.iteration == iteration + 1
    programs, _ = train(path)  # the last signal came in the last update
    assert_ends_as(path, programs, tmp_path)


def test_another_ctrl_c_stops_at_once_and_another_sigterm_does_not(tmp_path):
    path = tmp_path / "run.pt"
    for signals in ((signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT)):
        with pytest.raises(Interrupted, match="stopped at once by SIGINT") as stopped:
            train(path, Stream(17, signalling(*signals)))
        assert stopped.value.iteration is None
        assert load_checkpoint(path)["iteration"] == 15
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for signals in ((signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)):
        path.unlink()
        previous_of(path).unlink()
        with pytest.raises(Interrupted) as stopped:
            train(path, Stream(17, signalling(*signals)))
        assert (stopped.value.by, stopped.value.iteration) == (signals[0], 18)


def test_a_signal_without_a_checkpoint_or_before_the_first_update(tmp_path):
    programs = pair()
    with pytest.raises(Interrupted, match="after iteration 9, without a checkpoint"):
        train(None, Stream(8, signalling(signal.SIGINT)), programs)
    assert state(*programs).isfinite().all()

    class Early(Stream):
        def at(self, iteration, batch_size):
            signalling(signal.SIGINT)()
            return super().at(iteration, batch_size)

    path = tmp_path / "run.pt"
    with pytest.raises(Interrupted, match="after iteration 0, without a checkpoint"):
        train(path, Early())
    assert not list(tmp_path.iterdir())
    train(path, num_iterations=5)
    written = path.read_bytes()
    with pytest.raises(Interrupted, match="after iteration 5, kept in"):
        train(path, Early(), num_iterations=5)
    assert path.read_bytes() == written


def test_handlers_of_the_users_own_stay_in_charge(tmp_path):
    seen = []

    def own(number, frame):
        seen.append(number)

    former = signal.signal(signal.SIGTERM, own)
    try:
        with pytest.raises(Interrupted):
            train(
                tmp_path / "a.pt",
                Stream(3, signalling(signal.SIGTERM, signal.SIGINT)),
                num_iterations=9,
            )
        assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is own
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as nohup does with another
        train(None, Stream(3, signalling(signal.SIGTERM)), num_iterations=9)
    finally:
        signal.signal(signal.SIGTERM, former)


def test_training_in_another_thread_leaves_signals_alone():
    found = []

    def work():
        found.append(train(None, num_iterations=5)[1].iteration[-1])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [5]


@pytest.fixture
def bits(tmp_path):
    """A table of tied bits, and the command that trains on it."""
    for split, count in (("train", 120), ("valid", 20), ("test", 20)):
        rows = "\n".join(["0,0,0", "1,1,1"] * (count // 2))
        (tmp_path / f"bits.{split}.csv").write_text(rows + "\n")
    command = ["train", "table", str(tmp_path / "bits"), "--out", str(tmp_path / "run")]
    command += [
        "--num-iterations",
        "40",
        "--batch-size",
        "16",
        "--no-progress",
        "--num-codes",
        "3",
    ]
    command += ["--set", "num_guide_iterations=0", "--checkpoint-every", "10"]
    for size in ("hidden_dim=16", "num_blocks=1", "latent_hidden_dim=8"):
        command += ["--size", size]
    return tmp_path / "run", command


@pytest.mark.parametrize(("one", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_line_says_where_it_stopped_and_goes_on(
    one, status, bits, monkeypatch, capsys
):
    folder, command = bits
    step = trainer.Run.step

    def signalled(self):
        step(self)
        if self.iteration == 23:
            os.kill(os.getpid(), one)

    monkeypatch.setattr(trainer.Run, "step", signalled)
    former = signal.getsignal(signal.SIGTERM)
    assert cli.main(command) == status
    (line,) = [t for t in capsys.readouterr().err.splitlines() if t.startswith("vadd-pyro:")]
    assert line == (
        f"vadd-pyro: stopped by {one.name} after iteration 23, kept in {folder / 'model.pt'}; the "
        "same command goes on from there"
    )
    assert signal.getsignal(signal.SIGTERM) is former
    assert load_checkpoint(folder / "model.pt")["iteration"] == 23
    monkeypatch.undo()
    assert cli.main(command) == 0
    assert load_checkpoint(folder / "model.pt")["iteration"] == 40
    assert not (folder / ".lock").exists()


def test_a_terminated_command_exits_with_one_line(bits):
    folder, command = bits
    command = [sys.executable, "-m", "vadd_pyro", *command, "--num-iterations", "100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (folder / "model.pt.previous").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.terminate()
        told = process.communicate(timeout=120)[1]
    assert process.returncode == 143, told
    assert "Traceback" not in told
    last = told.splitlines()[-1]
    found = re.fullmatch(r"vadd-pyro: stopped by SIGTERM after iteration (\d+), kept in .*", last)
    assert found, told
    assert load_checkpoint(folder / "model.pt")["iteration"] == int(found.group(1))


def test_commands_that_do_not_train_are_terminated_too(monkeypatch, capsys):
    def terminated(*arguments):
        signalling(signal.SIGTERM)()
        time.sleep(10)

    monkeypatch.setattr(cli, "_run", terminated)
    assert cli.main(["sample", "nothing"]) == 143
    assert capsys.readouterr().err == "vadd-pyro: stopped at once by SIGTERM\n"


# ------------------------------------------------------------------------------------------- locks

HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(f"{os.getpid()}\\n")
file.flush()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder():
    """Starts processes that hold a lock."""
    started = []

    def hold(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_checkpoint_in_use_is_refused_by_the_process_until_that_is_gone(tmp_path, holder):
    path = tmp_path / "run.pt"
    process = holder(tmp_path / "run.pt.lock")
    programs = pair()
    before = state(*programs)
    with pytest.raises(
        InUseError, match=rf"process {process.pid} is at work on {path}: wait for it, or name an"
    ):
        train(path, programs=programs)
    assert torch.equal(state(*programs), before)
    train(tmp_path / "other.pt", num_iterations=3)
    process.kill()
    process.wait()
    train(path, num_iterations=3)
    assert not list(tmp_path.glob("*.lock"))


def test_a_run_folder_in_use_is_refused(bits, holder, capsys):
    folder, command = bits
    process = holder(folder / ".lock")
    assert cli.main(command) == 1
    assert f"process {process.pid} is at work in {folder}: wait" in capsys.readouterr().err
    assert not (folder / "settings.json").exists()
    process.kill()
    process.wait()
    assert cli.main([*command, "--evaluate", "--bound-steps", "1", "--sample-steps", "none"]) == 0
    assert (folder / "evaluation.json").exists()
    process = holder(folder / ".lock")
    assert cli.main(["evaluate", str(folder), "--sample-steps", "none"]) == 1
    assert f"process {process.pid} is at work in {folder}" in capsys.readouterr().err


def test_a_lock_keeps_others_out_until_it_is_dropped(tmp_path):
    counts, inside, most, refused = [0], [0], [0], [0]

    def work():
        for _ in range(60):
            try:
                with locked_folder(tmp_path):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    time.sleep(0.0005)
                    counts[0] += 1
                    inside[0] -= 1
            except InUseError as error:
                # Whose it is may not be written yet.
                refused[0] += bool(re.search(rf"process ({os.getpid()}|unknown) is", str(error)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
    assert counts[0] + refused[0] == 240
    assert min(counts[0], refused[0]) > 0
    assert not list(tmp_path.iterdir())


def test_a_lock_on_a_file_that_was_removed_is_none(tmp_path, monkeypatch):
    """The holder removes its file between our opening it and our lock on it."""
    path = tmp_path / ".lock"
    flock, calls = fcntl.flock, []

    def late(file, operation):
        if not calls:
            path.unlink()
        calls.append(operation)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(path, "here", "wait"):
        assert len(calls) == 2
        assert path.read_text() == f"{os.getpid()}\n"
        message = f"process {os.getpid()} is at work here"
        with pytest.raises(InUseError, match=message), locked(path, "here", "wait"):
            pass
    assert not path.exists()


def test_where_there_are_no_locks_training_goes_on_without(tmp_path, monkeypatch):
    def none(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    train(tmp_path / "run.pt", num_iterations=2)
    assert load_checkpoint(tmp_path / "run.pt")["iteration"] == 2


# ------------------------------------------------------------------------------------- run folders


def test_settings_are_compared_again_once_the_folder_is_ours(tmp_path, monkeypatch):
    """Another run enters and leaves the folder between our look at it and our lock on it."""
    (tmp_path / "bits.csv").write_text("0,0,0\n1,1,1\n" * 40)
    settings = Settings("table", str(tmp_path / "bits.csv"), num_iterations=2)
    build = experiments.training.build

    def late(*arguments):
        other = {**settings.to_dict(), "batch_size": 7}
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "settings.json").write_text(json.dumps(other))
        return build(*arguments)

    monkeypatch.setattr(experiments.training, "build", late)
    with pytest.raises(ValueError, match="holds a run with other settings: batch_size"):
        experiments.train(settings, tmp_path / "run", progress=False)
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["batch_size"] == 7


def test_signals_are_told_apart():
    assert str(Interrupted(signal.SIGINT)) == "stopped at once by SIGINT"
    with interruption.StopRequest() as outer, interruption.StopRequest() as inner:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (outer.by, inner.by) == (signal.SIGTERM, None)  # the first to listen has it
