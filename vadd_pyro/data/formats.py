"""The file formats of image collections: IDX, ``.amat`` and ``.mat`` matrices, CIFAR records.

What is read is data and nothing else: no format here can hold code. A file that is cut short or
something else is refused by name.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from vadd_pyro.data.files import read_bytes

__all__ = ["amat_text", "read_binary_rows", "read_cifar", "read_idx"]

_IDX_BYTES = 8  # the type code of unsigned bytes
_CIFAR_RECORD = 1 + 3 * 32 * 32


def read_idx(content: bytes, name: str | Path, ndim: int) -> np.ndarray:
    """An IDX array of unsigned bytes.

    Args:
        content: of the file: two zero bytes, the type, the number of dimensions, their sizes as
            big-endian integers of 32 bits, and the values.
        name: how messages call the file.
        ndim: how many dimensions are expected.

    Raises:
        ValueError: for another type or number of dimensions, or another number of bytes than the
            sizes say.
    """
    magic = bytes([0, 0, _IDX_BYTES, ndim])
    if content[:4] != magic:
        raise ValueError(
            f"{name} is no IDX file of {ndim} dimensions: it begins with {content[:4].hex()}, "
            f"expected {magic.hex()}"
        )
    start = 4 + 4 * ndim
    if len(content) < start:
        raise ValueError(f"{name} is cut short: {len(content)} bytes, the header has {start}")
    shape = struct.unpack(f">{ndim}I", content[4:start])
    expected = start + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise ValueError(
            f"{name} has {len(content):,} bytes: expected {expected:,} for the shape {shape} in "
            "its header"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _rows_of_text(content: bytes, path: Path) -> np.ndarray:
    lines = content.translate(None, b" \t\r").split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    width = len(lines[0]) if lines else 0
    if width == 0:
        raise ValueError(f"{path} is empty: expected lines of zeros and ones")
    for number, line in enumerate(lines, 1):
        if len(line) != width:
            raise ValueError(
                f"{path}, line {number}: {len(line)} values, the first line has {width}"
            )
    rows = np.frombuffer(b"".join(lines), np.uint8).reshape(-1, width)
    bad = (rows != ord("0")) & (rows != ord("1"))
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{path}, line {row + 1}, column {column + 1}: {chr(rows[row, column])!r} is neither "
            "0 nor 1"
        )
    return rows - ord("0")


def _rows_of_mat(content: bytes, path: Path) -> np.ndarray:
    import io

    from scipy.io import loadmat

    try:
        held = loadmat(io.BytesIO(content))
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise ValueError(f"{path} cannot be read as a MATLAB file: {error}") from error
    matrices = {k: v for k, v in held.items() if not k.startswith("__")}
    if len(matrices) != 1:
        raise ValueError(f"{path} holds {sorted(matrices)}: expected one matrix")
    ((name, rows),) = matrices.items()
    if rows.ndim != 2 or rows.dtype.kind not in "uifb":
        raise ValueError(
            f"{path}: {name} has shape {rows.shape} and type {rows.dtype}, expected a matrix of "
            "zeros and ones"
        )
    bad = (rows != 0) & (rows != 1)
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{path}: {name}[{row}, {column}] is {rows[row, column]}, neither 0 nor 1"
        )
    return rows.astype(np.uint8)


def read_binary_rows(path: Path) -> np.ndarray:
    """A matrix of zeros and ones, ``(N, D)`` uint8.

    Args:
        path: lines of zeros and ones with spaces between (``.amat``, packed or not), or a MATLAB
            file with one matrix (``.mat``).

    Raises:
        ValueError: naming the file and the place of what is wrong.
    """
    content = read_bytes(path)
    return (_rows_of_mat if path.suffix == ".mat" else _rows_of_text)(content, path)


def amat_text(rows: np.ndarray) -> bytes:
    """Zeros and ones as ``.amat`` text: the checksum of a ``.mat`` copy is that of the text."""
    text = np.full((len(rows), 2 * rows.shape[1]), ord(" "), np.uint8)
    text[:, ::2] = rows + ord("0")
    text[:, -1] = ord("\n")
    return text.tobytes()


def read_cifar(content: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Classes ``(N,)`` and images ``(N, 3072)`` of a binary CIFAR-10 file.

    Args:
        content: of the file: records of one byte of class, then 1,024 bytes each of red, green
            and blue.
        name: how messages call the file.

    Raises:
        ValueError: for a broken number of records, or a class above 9.
    """
    if not content or len(content) % _CIFAR_RECORD:
        raise ValueError(
            f"{name} has {len(content):,} bytes: expected a multiple of {_CIFAR_RECORD}, is it "
            "cut short?"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, _CIFAR_RECORD)
    if records[:, 0].max() > 9:
        row = int((records[:, 0] > 9).argmax())
        raise ValueError(f"{name}: record {row} has class {records[row, 0]}, expected 0..9")
    return records[:, 0], records[:, 1:]
