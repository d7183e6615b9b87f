"""Checkpoints, and files of plain values.

A checkpoint is one file of tensors and plain values. All are written whole or not at all, and read
without running any code.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "check_writable",
    "load_checkpoint",
    "random_state",
    "read_json",
    "restore_random_state",
    "save_checkpoint",
    "write_json",
    "write_whole",
]

FORMAT = 1


def write_whole(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file beside its place and rename it: a half-written one never replaces a good one.

    Args:
        path: file to write; its folder is made if need be.
        write: writes the content to an open binary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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


def save_checkpoint(path: str | Path, content: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: file to write; its folder is made if need be.
        content: tensors, numbers, strings, lists and dictionaries of them.

    Raises:
        OSError: naming the file, if the disk is full or the like.
    """
    try:
        write_whole(path, lambda file: torch.save({"vadd_pyro": FORMAT, **content}, file))
    except RuntimeError as error:  # torch's zip writer, for a full disk among others
        raise OSError(
            f"{path} could not be written ({error}); is the disk full? What stood there before is "
            "intact"
        ) from error


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


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint, with ``weights_only=True``.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming the file, if it is damaged or no checkpoint of this package.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except (
        Exception
    ) as error:  # torch raises many kinds for a damaged file; all mean the same to the caller
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
