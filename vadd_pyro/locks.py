"""One process at a time for a run folder or a checkpoint.

A lock is a file that its process holds by ``flock``: the system drops it when the process ends,
however it ends. The file says whose it is, and is removed at the end; one that a killed process
has left is taken over.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["InUseError", "locked", "locked_folder"]

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


class InUseError(ValueError):
    """Another process is at work there."""


@contextmanager
def locked_folder(folder: str | Path) -> Iterator[None]:
    """Keep other processes out of a folder, by the file ``.lock`` in it; made if need be.

    Raises:
        InUseError: naming the process that is at work there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", f"in {folder}", "choose another folder"):
        yield


@contextmanager
def locked(path: str | Path, where: str, otherwise: str) -> Iterator[None]:
    """Hold a lock.

    Args:
        path: the file; its folder must be there.
        where: what the error says the other process is at work in.
        otherwise: what the error says can be done but wait.

    Raises:
        InUseError: naming the process that holds it.
    """
    path = Path(path)
    file = _acquire(path)
    if file is None:
        raise InUseError(f"process {_owner(path)} is at work {where}: wait for it, or {otherwise}")
    with file:
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _acquire(path: Path) -> IO[str] | None:
    while True:
        file = open(path, "a+")  # noqa: SIM115 (it stays open as long as the lock is held)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            # Some network file systems have no locks: a run there is as good as it was without.
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
        try:
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        file.close()  # its holder has removed it just now: a lock on it would keep nobody out


def _owner(path: Path) -> str:
    try:
        return path.read_text().strip() or "unknown"
    except FileNotFoundError:
        return "unknown"
