r"""Tables of integers: one row a line, one column a position, values ``0..K-1``.

Separated by commas, semicolons, tabs or spaces, packed with gzip or not: ``.csv``, ``.data`` and
their like, among them the twenty binary data sets of the density-estimation literature.

References:
    Lowd and Davis 2010; Van Haaren and Davis 2012; Larochelle and Murray 2011 (the twenty sets).
"""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vadd_pyro.data.files import read_bytes
from vadd_pyro.data.splits import SPLITS, DataSet, compact, split_indices
from vadd_pyro.process import check_size

__all__ = ["read_table", "table"]

_WORDS = {"train": ("train", "ts"), "valid": ("valid", "validation", "val"), "test": ("test",)}
_NAME = re.compile(
    r"^(?:(?P<stem>.+)[._-])?(?P<word>"
    + "|".join(word for words in _WORDS.values() for word in words)
    + r")\.(?:csv|data|tsv|txt)(?:\.gz)?$"
)
_INTEGER = re.compile(r"[+-]?[0-9]+")
_MOST_VALUES = 2**16


def _number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _cells(line: str, delimiter: str | None) -> list[str]:
    if delimiter is None:
        return line.split()
    return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter))]


def _has_header(cells: list[str], header: bool | None, where: str) -> bool:
    if header is not None:
        return header
    words = [cell for cell in cells if cell and not _number(cell)]
    if not words:
        return False
    if len(words) < len(cells):
        column = cells.index(words[0]) + 1
        raise ValueError(
            f"{where}, column {column}: {words[0]!r} is no integer, while others in that line "
            "are numbers; pass header=True if it is a header"
        )
    return True


def _blame(lines: list[tuple[int, str]], delimiter: str | None, width: int, path: Path) -> str:
    """Where a table that numpy could not read is wrong, and how."""
    for number, line in lines:
        cells = _cells(line, delimiter)
        for column, cell in enumerate(cells[:width], 1):
            if not cell:
                return f"{path}, line {number}, column {column}: no value, expected an integer"
            if not _INTEGER.fullmatch(cell):
                return f"{path}, line {number}, column {column}: {cell!r} is no integer"
            if len(cell) > 18:
                return f"{path}, line {number}, column {column}: {cell} is too large"
        if len(cells) != width:
            column = min(len(cells), width) + 1
            return (
                f"{path}, line {number}, column {column}: the line has {len(cells)} columns, "
                f"those before it have {width}"
            )
    return f"{path} cannot be read as a table of integers"


def read_table(
    path: str | Path, vocab_size: int | None = None, header: bool | None = None
) -> np.ndarray:
    """The integers of one file.

    Args:
        path: the file; unpacked if its name ends in ``.gz``.
        vocab_size: values from here on are refused; None refuses none.
        header: whether the first line names the columns; by default it does if none of its cells
            is a number.

    Returns:
        Values of at least 0, ``(N, D)``.

    Raises:
        ValueError: naming file, line and column, for lines of different length and for cells that
            are empty, no integers, negative or too large.
    """
    path = Path(path)
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: byte {error.start} is not UTF-8") from error
    lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty: expected one row a line")
    delimiter = next((d for d in ",;\t" if d in lines[0][1]), None)
    first = _cells(lines[0][1], delimiter)
    if _has_header(first, header, f"{path}, line {lines[0][0]}"):
        lines = lines[1:]
        if not lines:
            raise ValueError(f"{path} has a header and no rows")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy reads 1.0 as an integer, with a warning
            values = np.loadtxt(
                io.StringIO("\n".join(line for _, line in lines)),
                dtype=np.int64,
                delimiter=delimiter,
                comments=None,
                quotechar='"',
                ndmin=2,
            )
    except (ValueError, OverflowError, DeprecationWarning) as error:
        raise ValueError(_blame(lines, delimiter, len(first), path)) from error
    if values.shape[1] != len(first):
        raise ValueError(_blame(lines, delimiter, len(first), path))
    bad = values < 0
    if vocab_size is not None:
        bad |= values >= vocab_size
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        value = int(values[row, column])
        raise ValueError(
            f"{path}, line {lines[row][0]}, column {column + 1}: {value} is "
            + ("negative" if value < 0 else f"too large for vocab_size={vocab_size}")
            + f", expected 0..{'K-1' if vocab_size is None else vocab_size - 1}"
        )
    return values


def _three_files(path: Path) -> tuple[str, dict[str, Path]]:
    """Name and files of a table that comes in three: of a folder, or of a folder and a name."""
    folder, wanted = (path, None) if path.is_dir() else (path.parent, path.name)
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _NAME.match(file.name)
        if match:
            split = next(s for s, words in _WORDS.items() if match["word"] in words)
            group = found.setdefault(match["stem"] or "", {})
            if split in group:
                raise ValueError(
                    f"{folder} has two {split} files: {group[split].name}, {file.name}"
                )
            group[split] = file
    if wanted is not None:
        found = {stem: group for stem, group in found.items() if stem == wanted}
    if not found:
        raise FileNotFoundError(
            f"no table {path}: expected a file, a folder with train, valid and test files such as "
            "name.train.csv, or that folder and name"
        )
    if len(found) > 1:
        names = ", ".join(str(folder / stem) for stem in found)
        raise ValueError(f"{path} holds {len(found)} tables: pass one of {names}")
    ((stem, group),) = found.items()
    missing = [split for split in SPLITS if split not in group]
    if missing:
        raise FileNotFoundError(
            f"{folder} has {', '.join(file.name for file in group.values())}, and no "
            f"{' and no '.join(missing)} file beside"
        )
    return stem or folder.name, group


def _meant(path: Path) -> Path:
    """The folder and name of a table in three files, where the training file itself is named:
    splitting it would leave the other two out without a word.
    """
    match = _NAME.match(path.name)
    if not path.is_file() or match is None or match["word"] not in _WORDS["train"]:
        return path
    stem = match["stem"] or ""
    others = [_NAME.match(file.name) for file in path.parent.iterdir()]
    beside = {m["word"] for m in others if m is not None and (m["stem"] or "") == stem}
    three = all(beside & set(_WORDS[split]) for split in SPLITS)
    if not three:
        return path
    return path.parent / stem if stem else path.parent


def table(
    path: str | Path,
    vocab_size: int | None = None,
    *,
    split: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    header: bool | None = None,
    name: str | None = None,
) -> DataSet:
    """A table of integers: one file, which is split, or three.

    Args:
        path: a file; a folder that holds a training, a validation and a test file, such as
            ``nltcs.train.data``, ``nltcs.valid.data`` and ``nltcs.test.data`` (or ``.csv``,
            ``.tsv``, ``.txt``, each with ``.gz`` or not); or, where a folder holds several such
            tables, the folder and the name, ``folder/nltcs``, or its training file.
        vocab_size: number of values ``K``; by default one more than the largest, at least 2.
        split: shares or numbers of rows for training, validation and test; of a single file only.
        seed: of that split.
        header: as in :func:`read_table`.
        name: how tables and figures call it; by default after the file.

    Raises:
        FileNotFoundError: saying what was looked for.
        ValueError: naming file, line and column of what is wrong.
    """
    if vocab_size is not None:
        check_size("vocab_size", vocab_size, least=2)
    path = _meant(Path(path).expanduser())
    if path.is_file():
        values = read_table(path, vocab_size, header)
        parts = [values[rows] for rows in split_indices(len(values), split, seed)]
        stem = path.name.split(".")[0]
    else:
        stem, group = _three_files(path)
        parts = [read_table(group[s], vocab_size, header) for s in SPLITS]
        for part, s in zip(parts, SPLITS, strict=True):
            if part.shape[1] != parts[0].shape[1]:
                raise ValueError(
                    f"{group[s]} has {part.shape[1]} columns, {group['train']} has "
                    f"{parts[0].shape[1]}"
                )
    if vocab_size is None:
        vocab_size = max(2, 1 + max(int(part.max()) for part in parts))
        if vocab_size > _MOST_VALUES:
            raise ValueError(
                f"{path} holds the value {vocab_size - 1}: such large values are rarely tokens; "
                "pass vocab_size if these are"
            )
    train, valid, test = (compact(part, vocab_size) for part in parts)
    arguments = {
        "path": str(path.absolute()),
        "vocab_size": vocab_size,
        "split": list(split),
        "seed": seed,
        "header": header,
        "name": name,
    }
    return DataSet(
        stem if name is None else name,
        train,
        valid,
        test,
        vocab_size,
        source={"loader": "table", "arguments": arguments},
    )
