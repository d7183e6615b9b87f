"""The command line under torchrun: stopped, killed, and in the end the same run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vadd_pyro import Interrupted, cli
from vadd_pyro.checkpoints import load_checkpoint
from vadd_pyro.distributed import OtherProcessError, answering

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
NUM_ITERATIONS, EVERY = 400, 20
PATIENCE = 300  # seconds, on a machine that has much else to do


class Launch:
    """``vadd-pyro train`` in two processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rows = folder.parent / "bits.csv"
        rows.write_text("0,0,0\n1,1,1\n0,0,1\n" * 40)
        sizes = ("hidden_dim=16", "num_blocks=1", "latent_hidden_dim=8")
        command = [
            *("-m", "vadd_pyro", "train", "table", str(rows), "--out", str(folder)),
            *("--num-iterations", str(NUM_ITERATIONS), "--batch-size", "16", "--num-codes", "4"),
            *("--set", "num_guide_iterations=0", "--no-progress", "--device", "cpu"),
            *("--checkpoint-every", str(EVERY)),
            *(part for size in sizes for part in ("--size", size)),
        ]
        self.log = folder.parent / f"{folder.name}.log"
        with self.log.open("w") as log:
            self.launcher = subprocess.Popen(
                [*LAUNCH, *command],
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    @property
    def iteration(self) -> int:
        """Of the newest checkpoint."""
        path = self.folder / "model.pt"
        return load_checkpoint(path)["iteration"] if path.exists() else 0

    def wait_for(self, iteration: int) -> None:
        """Until there is a checkpoint of this iteration or a later one."""
        deadline = time.monotonic() + PATIENCE
        while self.iteration < iteration:
            assert self.launcher.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def signal_first(self, one: signal.Signals) -> None:
        """Signal the process that writes the checkpoints: it holds the lock of the folder."""
        os.kill(int((self.folder / ".lock").read_text()), one)

    def told(self) -> list[str]:
        """What the command has said besides torchrun, when it has ended."""
        self.launcher.wait(timeout=PATIENCE)
        lines = self.log.read_text().splitlines()
        assert not any("forcefully" in line for line in lines)  # torchrun had to kill nobody
        return [line for line in lines if line.startswith("vadd-pyro: ")]


def test_a_run_that_is_stopped_and_killed_is_the_same_run(tmp_path):
    whole = Launch(tmp_path / "whole")
    assert whole.told() == []
    assert whole.launcher.returncode == 0
    assert whole.iteration == NUM_ITERATIONS

    folder = tmp_path / "run"
    checkpoint = re.escape(str(folder / "model.pt"))
    done = 0
    for one in (signal.SIGTERM, signal.SIGINT):
        run = Launch(folder)
        run.wait_for(done + EVERY)
        if one == signal.SIGTERM:
            run.launcher.send_signal(one)  # which hands it on
        else:
            run.signal_first(one)  # which tells the other
        (line,) = run.told()
        found = re.fullmatch(
            rf"vadd-pyro: stopped by {one.name} after iteration (\d+), kept in {checkpoint}; the "
            "same command goes on from there",
            line,
        )
        assert found, line
        assert run.launcher.returncode != 0
        assert run.iteration == int(found[1]) > done
        assert not (folder / ".lock").exists()
        done = run.iteration

    run = Launch(folder)
    run.wait_for(done + EVERY)
    run.signal_first(signal.SIGKILL)
    killed = time.monotonic()
    (line,) = run.told()
    assert time.monotonic() - killed < 60
    found = re.fullmatch(
        rf"vadd-pyro: another process has ended, or has not answered in time: .*; {checkpoint} "
        r"was kept at iteration (\d+)",
        line,
    )
    assert found, line
    # Another checkpoint may have been written whose end the other one was not told.
    assert 0 <= run.iteration - int(found[1]) <= EVERY
    assert run.iteration >= done + EVERY

    run = Launch(folder)
    assert run.told() == []
    for name in ("weights", "average", "smooth"):
        one, other = (
            load_checkpoint(place / "model.pt")[name] for place in (whole.folder, folder)
        )
        assert _equal(one, other), name


def _equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


# ------------------------------------------------------------ what one process does in the end


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (OtherProcessError("another process has ended"), 1, "another process has ended"),
        (
            Interrupted(signal.SIGINT, 4, Path("run.pt")),
            130,
            "stopped by SIGINT after iteration 4, kept in run.pt; the same command goes on from "
            "there",
        ),
    ],
)
def test_torchruns_signal_does_not_hide_what_came_before_it(
    error, status, line, monkeypatch, capsys
):
    def ends_late(*arguments):
        try:
            raise error
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    def told_late(*arguments):
        told.append(tell(*arguments))
        if len(told) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        return told[-1]

    monkeypatch.setattr(cli, "_run", ends_late)
    assert cli.main(["train", "digits"]) == status
    assert capsys.readouterr().err == f"vadd-pyro: {line}\n"

    def ends(*arguments):
        raise error

    told, tell = [], cli._tell
    monkeypatch.setattr(cli, "_run", ends)
    monkeypatch.setattr(cli, "_tell", told_late)
    assert cli.main(["train", "digits"]) == status
    assert capsys.readouterr().err == f"vadd-pyro: {line}\n" * 2
    assert told == [status, status]


def test_of_what_a_backend_says_the_first_sentence_is_told():
    said = "[/src/gloo/pair.cc:537] Read error [127.0.0.1]:80: Connection reset. See logs.\nMore"
    expected = r"in time: Read error \[127\.0\.0\.1\]:80: Connection reset$"
    with pytest.raises(OtherProcessError, match=expected), answering():
        raise RuntimeError(said)


def test_commands_of_one_process_are_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    commands = {
        "demo": ["--out", str(tmp_path / "out")],
        "compare": ["--out", str(tmp_path / "out")],
        "inspect": [str(tmp_path)],
        "evaluate": [str(tmp_path)],
        "sample": [str(tmp_path)],
        "infill": [str(tmp_path)],
    }
    for name, rest in commands.items():
        assert cli.main([name, *rest]) == 1
        assert capsys.readouterr().err == (
            f"vadd-pyro: {name} is the work of one process, and torchrun has started 2: expected "
            f"vadd-pyro {name} without torchrun\n"
        )
    assert list(tmp_path.iterdir()) == []
    # One process of torchrun's, or a scheduler's variable alone, is in nobody's way.
    for variable, value in (("WORLD_SIZE", "1"), ("RANK", None)):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with monkeypatch.context() as changed:
            if value is None:
                changed.delenv(variable)
            else:
                changed.setenv(variable, value)
            assert cli.main(["sample", str(tmp_path)]) == 1
            assert "no run" in capsys.readouterr().err
