"""Checkpoints, and files of plain values.

A checkpoint is one file of tensors and plain values. All are written whole or not at all, and read
without running any code. That of a training run has the one before it beside it: it gets that name
just before the new one takes its own, so that at every moment the name is that of a whole
checkpoint. Where a file cannot have two names it is renamed, and at every moment one of the two
names is that of a whole checkpoint.
"""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "CheckpointWriteError",
    "DamagedCheckpointError",
    "check_space",
    "check_writable",
    "load_checkpoint",
    "newest_checkpoint",
    "previous_of",
    "random_state",
    "read_json",
    "remove_checkpoint",
    "remove_stale",
    "restore_random_state",
    "save_checkpoint",
    "write_json",
    "write_whole",
]

FORMAT = 1
_UNFINISHED = re.compile(r"\.(\d+)\.(partial|probe|spare)$")


class DamagedCheckpointError(ValueError):
    """A checkpoint is not what was written: cut short, or bits of it have changed."""


class CheckpointWriteError(OSError):
    """A checkpoint could not be written, or would find no space on the disk."""


def previous_of(path: str | Path) -> Path:
    """Where the checkpoint before the newest is kept."""
    path = Path(path)
    return path.with_name(f"{path.name}.previous")


def newest_checkpoint(path: str | Path) -> Path | None:
    """The file to resume from: the newest, or the one before if the newest was removed, or a
    process was killed between two renames; None if there is neither.
    """
    return next((file for file in (Path(path), previous_of(path)) if file.exists()), None)


def remove_checkpoint(path: str | Path) -> None:
    """Remove a checkpoint and the one before it, the older first."""
    for file in (previous_of(path), Path(path)):
        file.unlink(missing_ok=True)


def write_whole(
    path: str | Path, write: Callable[[BinaryIO], Any], *, keep_previous: bool = False
) -> None:
    """Write a file beside its place and rename it: a half-written one never replaces a good one.

    Args:
        path: file to write; its folder is made if need be.
        write: writes the content to an open binary file.
        keep_previous: whether to keep what stood there, as :func:`previous_of` names it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            _name_previous(path)
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _name_previous(path: Path) -> None:
    """Give a file the name of the one before, beside its own where the file system can do that: a
    reader then finds it under its own name until the new one has it.
    """
    spare = path.with_name(f"{path.name}.{os.getpid()}.spare")
    spare.unlink(missing_ok=True)
    try:
        os.link(path, spare)
    except OSError:
        os.replace(path, previous_of(path))
        return
    try:
        os.replace(spare, previous_of(path))
    finally:  # replacing one name of a file by another of the same does nothing
        spare.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Have the new names on the disk too, where the file system can do it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):
            raise


def remove_stale(folder: str | Path, name: str | None = None) -> None:
    """Remove what processes that are no more have left half-written in a folder.

    Args:
        folder: where to look; folders in it are left alone.
        name: of which file; None for all.
    """
    for file in Path(folder).glob("*"):
        found = _UNFINISHED.search(file.name)
        if found is None or (name is not None and file.name[: found.start()] != name):
            continue
        if not _alive(int(found.group(1))):
            file.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it is another user's
    return True


def _plain(value: Any) -> Any:
    """What JSON has: tensors as lists, ``inf`` and ``nan`` by name, so that ``float`` reads
    them.
    """
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write plain values whole; returns them as they will be read."""
    text = json.dumps(_plain(content), indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))
    return json.loads(text)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read what :func:`write_json` wrote.

    Raises:
        ValueError: naming the file, if it is no such thing.
    """
    try:
        content = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no result: expected an object")
    return content


def save_checkpoint(
    path: str | Path, content: dict[str, Any], *, keep_previous: bool = False
) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: file to write; its folder is made if need be.
        content: tensors, numbers, strings, lists and dictionaries of them.
        keep_previous: whether to keep the one that stood there, as :func:`previous_of` names it.

    Raises:
        CheckpointWriteError: naming the file, if the disk is full or the like.
    """
    try:
        write_whole(
            path,
            lambda file: _save({"vadd_pyro": FORMAT, **content}, file),
            keep_previous=keep_previous,
        )
    except (OSError, RuntimeError) as error:  # the latter from torch's zip writer
        raise CheckpointWriteError(
            f"{path} could not be written ({error}); is the disk full? What stood there before is "
            "intact"
        ) from error


def _save(content: dict[str, Any], file: BinaryIO) -> None:
    """``torch.save`` with checksums, which reading relies on and a setting can leave out."""
    get = getattr(torch.serialization, "get_crc32_options", None)
    if get is None or get():
        torch.save(content, file)
        return
    torch.serialization.set_crc32_options(True)
    try:
        torch.save(content, file)
    finally:
        torch.serialization.set_crc32_options(False)


def check_writable(path: str | Path) -> None:
    """Check that a checkpoint can be written, before any work goes into it.

    Raises:
        ValueError: naming the path and what stands in the way.
    """
    path = Path(path)
    probe = path.with_name(f"{path.name}.{os.getpid()}.probe")
    if path.is_dir():
        raise ValueError(f"{path} is to be a file, but a folder of that name is there")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error


def check_space(path: str | Path, size: int, num_saves: int) -> None:
    """Check that the disk has room for the checkpoints of a run, as far as that can be known.

    Args:
        path: the newest one. It, the one before and the one being written stand on the disk at
            once.
        size: bytes of one.
        num_saves: how many times one will be written.

    Raises:
        CheckpointWriteError: with the bytes needed and those that are free.
    """
    if num_saves < 1:
        return
    path = Path(path)
    disk = shutil.disk_usage(path.parent)
    held = [file.stat().st_size for file in (path, previous_of(path)) if file.exists()]
    copies = 1 + min(len(held) + num_saves - 1, 2)
    needed = copies * size - sum(held)
    if disk.total and disk.free < needed:  # some file systems tell no numbers
        raise CheckpointWriteError(
            f"{path} would find no space: a checkpoint takes about {_told(size)}, up to {copies} "
            f"stand on the disk at once, and {_told(needed)} more are needed, but "
            f"{_told(disk.free)} are free there"
        )


def _told(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint, its checksums first, with ``weights_only=True``.

    Raises:
        FileNotFoundError: if there is none.
        DamagedCheckpointError: a ValueError that names the file, and how to go on from the one
            before it, if that is whole.
        ValueError: naming the file, if it is no checkpoint of this package.
    """
    path = Path(path)
    if not path.exists():
        previous = previous_of(path)
        there = f"; the one before it is at {previous}" if previous.exists() else ""
        raise FileNotFoundError(f"no checkpoint at {path}{there}")
    try:
        return _read(path, map_location)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{error}{_way_out(path)}") from error


def _way_out(path: Path) -> str:
    previous = previous_of(path)
    if not previous.exists():
        return ""
    try:
        iteration = _read(previous, "cpu").get("iteration")
    except (ValueError, OSError) as error:
        return f". Nor can the one before it: {error}"
    return (
        f". The one before it, {previous}, of iteration {iteration}, is whole: remove {path} and "
        "resume, and training goes on from there"
    )


def _read(path: Path, map_location: Any) -> dict[str, Any]:
    # One handle for both, so that what was checked is what is read.
    with open(path, "rb") as file:
        try:  # torch itself compares no checksums
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
        except Exception as error:  # of many kinds; all mean the same to the caller
            raise DamagedCheckpointError(
                f"{path} cannot be read as a checkpoint, it is damaged: {error}"
            ) from error
        if damaged is not None:
            raise DamagedCheckpointError(
                f"{path} cannot be read as a checkpoint, it is damaged: the checksum of {damaged} "
                "in it is not that of its content"
            )
        file.seek(0)
        try:
            content = torch.load(file, map_location=map_location, weights_only=True)
        except Exception as error:  # as above
            raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(content, dict) or "vadd_pyro" not in content:
        raise ValueError(f"{path} is no checkpoint of vadd_pyro")
    if content["vadd_pyro"] != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {content['vadd_pyro']}, this version reads {FORMAT}"
        )
    return content


def random_state() -> dict[str, Any]:
    """State of all random number generators that a program may draw on, as tensors and plain
    values.
    """
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [
            kind,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            position,
            has_gauss,
            cached,
        ],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the generators back to a state from :func:`random_state`."""
    torch.set_rng_state(state["torch"].cpu())
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
