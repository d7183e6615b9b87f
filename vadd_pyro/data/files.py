"""Files of data sets: a cache, downloads with a checksum, and reading without surprises.

A file whose bytes are known is compared with their checksum before anything is made of it; a
damaged one is refused by name. Nothing here runs code that a file brings along.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from tqdm.auto import tqdm

from vadd_pyro.checkpoints import write_whole

__all__ = [
    "cache_folder",
    "check_content",
    "download",
    "find",
    "read_bytes",
    "read_tar",
]

_ALGORITHMS = {32: "md5", 40: "sha1", 64: "sha256"}
_PIECE = 1 << 20


def cache_folder() -> Path:
    """Where downloads are kept: ``$VADD_PYRO_CACHE``, else ``~/.cache/vadd_pyro``."""
    return Path(os.environ.get("VADD_PYRO_CACHE") or "~/.cache/vadd_pyro").expanduser()


def _algorithm(expected: str) -> str:
    if len(expected) not in _ALGORITHMS or set(expected) - set("0123456789abcdef"):
        raise ValueError(
            "checksum must be a lower-case hexadecimal md5, sha1 or sha256 (32, 40 or 64 digits), "
            f"got {expected!r}"
        )
    return _ALGORITHMS[len(expected)]


def check_content(content: bytes, expected: str, name: str | Path, hint: str = "") -> None:
    """Compare bytes with their checksum.

    Args:
        content: the bytes.
        expected: md5, sha1 or sha256, hexadecimal; the length tells which.
        name: how the message calls them.
        hint: what the message adds.

    Raises:
        ValueError: with what was found and what was expected.
    """
    algorithm = _algorithm(expected)
    found = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise ValueError(
            f"{name} is damaged or another file: {algorithm} {found} of {len(content):,} bytes, "
            f"expected {expected}{hint and '; '}{hint}"
        )


def download(
    url: str | Sequence[str],
    checksum: str,
    folder: str | Path | None = None,
    *,
    name: str | None = None,
    timeout: float = 60.0,
    progress: bool = True,
) -> Path:
    """A file from the cache, or else from the network into it.

    The bytes go to a temporary file beside their place, which is renamed only once the checksum
    is right, so that what is in the cache is whole.

    Args:
        url: where it is; several are tried in turn.
        checksum: md5, sha1 or sha256, hexadecimal.
        folder: where to keep it; :func:`cache_folder` by default.
        name: its name there; by default the last part of the url.
        timeout: seconds without an answer after which an address is given up.
        progress: whether to show a progress bar, on a terminal.

    Returns:
        The file.

    Raises:
        OSError: naming each url and what went wrong.
        ValueError: if the file in the cache is not the one expected.
    """
    urls = [url] if isinstance(url, str) else list(url)
    if not urls:
        raise ValueError("url must name at least one address, got none")
    algorithm = _algorithm(checksum)
    folder = cache_folder() if folder is None else Path(folder)
    path = folder / (name or urls[0].rstrip("/").rpartition("/")[2])
    if path.exists():
        hint = "delete it to have it downloaded again"
        check_content(path.read_bytes(), checksum, path, hint)
        return path
    failures = []
    for address in urls:

        def fetch(file: BinaryIO, address: str = address) -> None:
            digest = hashlib.new(algorithm, usedforsecurity=False)
            size = 0
            with urllib.request.urlopen(address, timeout=timeout) as answer:
                total = answer.headers.get("Content-Length")
                bar = tqdm(
                    total=int(total) if total else None,
                    desc=path.name,
                    unit="B",
                    unit_scale=True,
                    disable=None if progress else True,
                )
                with bar:
                    while piece := answer.read(_PIECE):
                        file.write(piece)
                        digest.update(piece)
                        size += len(piece)
                        bar.update(len(piece))
            if digest.hexdigest() != checksum:
                raise OSError(
                    f"what came is cut short or another file: {algorithm} {digest.hexdigest()} of "
                    f"{size:,} bytes, expected {checksum}"
                )

        try:
            write_whole(path, fetch)
        except (OSError, HTTPException, ValueError) as error:
            failures.append(f"{address}: {error}")
        else:
            return path
    raise OSError(f"{path} could not be downloaded: {'; '.join(failures)}")


def find(folder: str | Path, names: Sequence[str]) -> Path:
    """The first of some file names that is in a folder.

    Args:
        folder: where to look.
        names: names for the same file, such as with and without ``.gz``.

    Raises:
        FileNotFoundError: naming the folder and the names.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: expected one that holds {names[0]}")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} holds no {' or '.join(names)}")


def read_bytes(path: str | Path) -> bytes:
    """The content of a file, unpacked if its name ends in ``.gz`` or ``.zip``.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming the file, if it is damaged, or if a zip archive has not exactly one
            file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if not name.endswith("/")]
                if len(names) != 1:
                    raise ValueError(f"{path} holds {len(names)} files, expected one")
                return archive.read(names[0])
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged and cannot be unpacked: {error}") from error
    return path.read_bytes()


def read_tar(path: str | Path, content: bytes, names: Sequence[str]) -> dict[str, bytes]:
    """Files of a ``.tar.gz`` archive, read in memory; no other is touched, none is written.

    Args:
        path: what messages call the archive.
        content: its bytes.
        names: the last part of the paths that are wanted.

    Returns:
        Content by name, in the order of ``names``.

    Raises:
        ValueError: naming the archive, if it is damaged or lacks one.
    """
    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                file = archive.extractfile(member) if member.isreg() and name in names else None
                if file is not None:
                    found[name] = file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged and cannot be unpacked: {error}") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: is it cut short?")
    return {name: found[name] for name in names}
