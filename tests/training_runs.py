"""Training runs to which something happens, for the tests of what they survive."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from conftest import small_pair

from vadd_pyro import History, LinearAnnealing, MaskedDiffusionELBO, MaskingProcess, data, fit
from vadd_pyro.checkpoints import load_checkpoint

PROCESS = MaskingProcess(2, 3)
X = data.tied_bits(3).sample(200)


def pair() -> tuple[Any, Any]:
    """A pair of programs, always with the same weights."""
    pyro.set_rng_seed(11)
    return small_pair("standard_normal", PROCESS)


def state(*programs: Any) -> torch.Tensor:
    """All parameters in a row."""
    return torch.cat([p.detach().flatten() for program in programs for p in program.parameters()])


class Stream:
    """Rows by iteration, at one of which something happens."""

    fingerprint = "rows"

    def __init__(self, when: int | None = None, happen: Callable[[], None] = lambda: None) -> None:
        self.when, self.happen = when, happen
        self.calls = 0

    def at(self, iteration: int, batch_size: int) -> torch.Tensor:
        self.calls += 1
        # The pair is run on the rows of update 0 once before training.
        if iteration == self.when and self.calls > 1:
            self.happen()
        generator = torch.Generator().manual_seed(iteration)
        return X[torch.randint(len(X), (batch_size,), generator=generator)]

    def __call__(self, batch_size: int) -> torch.Tensor:
        raise AssertionError("rows are asked for by iteration")


def signalling(*signals: int) -> Callable[[], None]:
    """Something that happens: signals to this process."""

    def happen() -> None:
        for one in signals:
            os.kill(os.getpid(), one)

    return happen


def train(
    path: Path | None = None,
    stream: Stream | None = None,
    programs: tuple[Any, Any] | None = None,
    num_iterations: int = 30,
    **options: Any,
) -> tuple[tuple[Any, Any], History]:
    """A run that is resumed where its checkpoint stands; returns the pair and the history."""
    settings: dict[str, Any] = dict(batch_size=16, ema_decay=0.95, progress=False, log_every=7)
    settings |= dict(checkpoint_every=5, monitor_every=10, seed=3, resume=path is not None)
    elbo = MaskedDiffusionELBO(PROCESS, kl_weight=LinearAnnealing(20, 0.1))
    programs = pair() if programs is None else programs
    stream = Stream() if stream is None else stream
    settings |= options
    return programs, fit(*programs, elbo, stream, num_iterations, checkpoint=path, **settings)


def assert_ends_as(path: Path, programs: tuple[Any, Any], folder: Path) -> None:
    """Compare a finished run with one that nothing happens to, in a folder."""
    whole = folder / "uninterrupted.pt"
    again, _ = train(whole)
    assert torch.equal(state(*programs), state(*again))
    found, expected = load_checkpoint(path), load_checkpoint(whole)
    assert found["history"]["loss"] == expected["history"]["loss"]
    assert found["history"]["kl_per_dimension"] == expected["history"]["kl_per_dimension"]
    for part in ("model", "guide"):
        for name, value in expected["weights"][part].items():
            assert torch.equal(found["weights"][part][name], value)


class LimitedFile:
    """An open file in which there is room for so many bytes; then something happens.

    Args:
        file: the file.
        room: bytes left, a list of one number, so that several files may share them.
        full: what happens when they are used up; what fits is written before.
    """

    def __init__(self, file: Any, room: list[int], full: Callable[[], None]) -> None:
        self.file, self.room, self.full = file, room, full

    def __enter__(self) -> LimitedFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, content: Any) -> int:
        whole = memoryview(content).cast("B")
        if self.room[0] < len(whole):
            self.file.write(whole[: self.room[0]])
            self.file.flush()
            self.full()
        self.room[0] -= len(whole)
        return int(self.file.write(content))


def limit_files(room: int, full: Callable[[], None]) -> Callable[..., LimitedFile]:
    """An ``open`` whose files share the room of :class:`LimitedFile`."""
    left = [room]

    def limited(*arguments: Any) -> LimitedFile:
        return LimitedFile(open(*arguments), left, full)

    return limited


def damage(path: Path, kind: str) -> None:
    """What disks do to files: ``"cut"``, ``"empty"``, or a changed ``"bit"`` of a tensor."""
    content = bytearray(path.read_bytes())
    if kind == "cut":
        content = content[: len(content) // 2]
    elif kind == "empty":
        content = bytearray()
    else:
        with zipfile.ZipFile(path) as archive:
            largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        content[largest.header_offset + 200] ^= 0x40
    path.write_bytes(content)
