"""Text as rows of tokens: windows of characters, or of what a tokenizer makes.

A text is cut into three consecutive parts, and each part into windows that do not overlap: no
window crosses a border, and scores of the test windows add up to that of the test part (less an
incomplete window at its end). Training batches are windows that begin anywhere in the training
part, a function of the seed and of the number of the batch.

The default text is what every Python brings: the topics of its own documentation, 0.46 million
characters (it differs a little between versions of Python).

References:
    Mahoney 2006 (text8); Austin et al. 2021 (arXiv 2107.03006), windows of 256 characters.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vadd_pyro.data.files import check_content, download, find, read_bytes
from vadd_pyro.data.splits import BatchStream, DataSet, compact, generator, split_sizes
from vadd_pyro.process import check_size

__all__ = ["TextData", "characters", "hub", "text8"]

_TEXT8_URLS = ("https://mattmahoney.net/dc/text8.zip", "http://mattmahoney.net/dc/text8.zip")
_TEXT8_ZIP = "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232"
_TEXT8 = "0dc3edebc970dcc96137e7deda4d9995af9d93de"
_TEXT8_SIZE = 100_000_000
_TEXT8_START = b" anarchism originated as a term of abuse first used against "
_SHARES = (0.9, 0.05, 0.05)


@dataclass(frozen=True, eq=False, repr=False)
class TextData(DataSet):
    """Windows of a text.

    Args:
        stream: the training part, ``(M,)``; ``train`` has its windows that do not overlap.
        decoder: text of a list of token ids, if the tokens are not characters.
    """

    stream: Tensor | None = None
    decoder: Callable[[list[int]], str] | None = None

    def training_rows(self, stream: BatchStream, iteration: int, batch_size: int) -> Tensor:
        """One training batch, ``(batch_size, D)`` long: windows that begin anywhere."""
        assert self.stream is not None
        starts = torch.randint(
            len(self.stream) - self.length + 1,
            (batch_size, 1),
            generator=generator(stream.seed, iteration),
        )
        return self.stream[starts + torch.arange(self.length)].long()

    def encode(self, text: str) -> Tensor:
        """Tokens of a text, ``(len(text),)`` long.

        Raises:
            ValueError: for a character that is not among ``characters``, naming its place.
            TypeError: if the tokens are not characters.
        """
        if self.characters is None:
            raise TypeError(f"{self.name} has tokens of a tokenizer: encode with that one")
        return torch.from_numpy(_ids(text, self.characters, None, "text")).long()

    def decode(self, rows: Tensor, mask: str = "_") -> list[str]:
        """Text of rows of tokens.

        Args:
            rows: tokens, ``(B, D)``.
            mask: what stands for the mask id, character by character.

        Raises:
            ValueError: for a token out of range.
        """
        ids = self.process().check_tokens(rows, "rows", masks=True)
        if self.characters is not None:
            symbols = (*self.characters, mask)
            return ["".join(symbols[i] for i in row) for row in ids.tolist()]
        return [self._decode_pieces(row, mask) for row in ids.tolist()]

    def _decode_pieces(self, row: list[int], mask: str) -> str:
        """Text of one row; what stands between masks is decoded as a piece."""
        assert self.decoder is not None
        text, piece = "", []
        for token in row:
            if token != self.vocab_size:
                piece.append(token)
                continue
            text += (self.decoder(piece) if piece else "") + mask
            piece = []
        return text + (self.decoder(piece) if piece else "")


def _ids(text: str, alphabet: Sequence[str], unknown: str | None, where: str) -> np.ndarray:
    """Token ids of the characters, through a table over code points."""
    if text.isascii():  # a byte a character: text8 has a hundred million
        points: np.ndarray = np.frombuffer(text.encode(), np.uint8)
    else:
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    known = np.array([ord(character) for character in alphabet])
    table = np.full(int(max(points.max(initial=0), known.max())) + 1, -1, np.int32)
    table[known] = np.arange(len(known))
    ids = table[points]
    missing = ids < 0
    if missing.any():
        if unknown is None:
            place = int(missing.argmax())
            line = text.count("\n", 0, place) + 1
            column = place - (text.rfind("\n", 0, place) + 1) + 1
            raise ValueError(
                f"{where}, line {line}, column {column}: {text[place]!r} is not in the alphabet "
                f"of {len(alphabet)} characters; pass unknown to put another in its place"
            )
        ids[missing] = list(alphabet).index(unknown)
    return ids


def _windows(tokens: Tensor, length: int, name: str, part: str) -> Tensor:
    """Consecutive windows, ``(M // length, length)``."""
    if len(tokens) < length:
        raise ValueError(
            f"{name}: the {part} part has {len(tokens)} tokens, fewer than length={length}; give "
            "more text, a smaller length or another split"
        )
    return tokens[: len(tokens) // length * length].view(-1, length)


def _text_data(
    name: str, streams: Sequence[Tensor], length: int, vocab_size: int, **further: Any
) -> TextData:
    train, valid, test = (
        _windows(stream, length, name, part)
        for stream, part in zip(streams, ("training", "validation", "test"), strict=True)
    )
    return TextData(name, train, valid, test, vocab_size, stream=streams[0], **further)


def _cut(tokens: Tensor, split: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = split_sizes(len(tokens), split)
    return (
        tokens[:first],
        tokens[first : first + second],
        tokens[first + second : first + second + third],
    )


def characters(
    path: str | Path | None = None,
    length: int = 64,
    *,
    alphabet: str | None = None,
    unknown: str | None = None,
    split: Sequence[float] = _SHARES,
    encoding: str = "utf-8",
    name: str | None = None,
) -> TextData:
    """Characters of any text file.

    Args:
        path: the file, unpacked if its name ends in ``.gz`` or ``.zip``; by default the topics of
            Python's own documentation, ``pydoc_data.topics``.
        length: characters in a row, ``D``.
        alphabet: the characters; by default those of the whole text, in order of their code
            points.
        unknown: character of the alphabet that stands for all that are not in it; by default
            these are refused.
        split: shares of the training, the validation and the test part, in that order in the
            text, or their numbers of characters.
        encoding: of the file.
        name: how tables and figures call it; by default after the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, in another encoding or too short, and for a character that is
            not in the alphabet, naming its line and column.
    """
    check_size("length", length)
    if unknown is not None and (alphabet is None or unknown not in alphabet or len(unknown) != 1):
        raise ValueError(f"unknown must be one character of alphabet, got {unknown!r}")
    if alphabet is not None and (len(alphabet) < 2 or len(set(alphabet)) < len(alphabet)):
        raise ValueError(f"alphabet must hold at least 2 characters, each once, got {alphabet!r}")
    if path is None:
        text, where = _documentation(), "Python's documentation"
        own_name = "Python documentation"
    else:
        path = Path(path).expanduser()
        where, own_name = str(path), path.name.split(".")[0]
        try:
            text = read_bytes(path).decode(encoding)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is no text in {encoding}: byte {error.start} ({error.reason})"
            ) from error
        text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    letters = tuple(sorted(set(text)) if alphabet is None else alphabet)
    if len(letters) < 2:
        raise ValueError(f"{where} has {len(letters)} different characters: expected at least 2")
    tokens = compact(_ids(text, letters, unknown, where), len(letters))
    arguments = {
        "path": None if path is None else str(path.absolute()),
        "length": length,
        "alphabet": alphabet,
        "unknown": unknown,
        "split": list(split),
        "encoding": encoding,
        "name": name,
    }
    return _text_data(
        own_name if name is None else name,
        _cut(tokens, split),
        length,
        len(letters),
        characters=letters,
        source={"loader": "characters", "arguments": arguments},
    )


def _documentation() -> str:
    topics = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def text8(
    path: str | Path | None = None,
    length: int = 256,
    *,
    split: Sequence[float] = _SHARES,
    prefix: bool = False,
    check: bool = True,
) -> TextData:
    """text8: the first 100 million characters of a Wikipedia of 2006, ``a`` to ``z`` and space.

    Args:
        path: the file ``text8``, ``text8.gz`` or ``text8.zip``, or a folder that holds one;
            downloaded into the cache by default (31 MB).
        length: characters in a row, ``D``.
        split: shares of the training, the validation and the test part, or their numbers of
            characters; by default 90, 5 and 5 million, as usual.
        prefix: whether a file that holds only the beginning of text8 will do. What is reached on
            it does not compare with what is published.
        check: whether to compare the file with its known checksum (of a prefix, its first words).

    Returns:
        Windows of the tokens: space 0, ``a`` 1, to ``z`` 26.

    Raises:
        FileNotFoundError, OSError: if the file is not there or cannot be had.
        ValueError: if it is damaged, another or cut short, naming it.
    """
    check_size("length", length)
    if path is None:
        file = download(_TEXT8_URLS, _TEXT8_ZIP)
    else:
        file = Path(path).expanduser()
        if file.is_dir():
            file = find(file, ["text8", "text8.gz", "text8.zip", "text8.txt"])
    content = read_bytes(file)
    skip = "pass check=False for your own text of these characters"
    if prefix and len(content) < _TEXT8_SIZE:
        if check and not content.startswith(_TEXT8_START):
            raise ValueError(
                f"{file} is no beginning of text8: it starts with {content[:40]!r}, expected "
                f"{_TEXT8_START[:40]!r}; {skip}"
            )
    elif check:
        if len(content) < _TEXT8_SIZE:
            raise ValueError(
                f"{file} has {len(content):,} characters: expected {_TEXT8_SIZE:,}; is it cut "
                f"short? Pass prefix=True for the beginning of text8; {skip}"
            )
        check_content(content, _TEXT8, file, skip)
    letters = " abcdefghijklmnopqrstuvwxyz"
    tokens = compact(_ids(content.decode("latin-1"), letters, None, str(file)), len(letters))
    arguments = {
        "path": None if path is None else str(file.absolute()),
        "length": length,
        "split": list(split),
        "prefix": prefix,
        "check": check,
    }
    whole = len(content) == _TEXT8_SIZE
    return _text_data(
        "text8" if whole else f"text8 (first {len(content):,} characters)",
        _cut(tokens, split),
        length,
        len(letters),
        characters=tuple(letters),
        source={"loader": "text8", "arguments": arguments},
    )


def _import_extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'data from the Hugging Face hub needs {module}: pip install "vadd-pyro[hub]"'
        ) from error


def hub(
    dataset: str,
    tokenizer: str,
    length: int = 128,
    *,
    config: str | None = None,
    column: str = "text",
    split: Sequence[float] = _SHARES,
    name: str | None = None,
) -> TextData:
    """A data set of the Hugging Face hub, cut by a tokenizer.

    The texts follow each other, with the tokenizer's end token after each, and are cut into
    windows. Where the set has ``train``, ``validation`` and ``test``, these are the parts;
    otherwise its ``train`` is cut. Needs ``pip install "vadd-pyro[hub]"``.

    Args:
        dataset: its name on the hub, such as ``"wikitext"``.
        tokenizer: name of the tokenizer, such as ``"gpt2"`` or ``"bert-base-uncased"``.
        length: tokens in a row, ``D``.
        config: which configuration of the data set.
        column: the one that holds the text.
        split: shares of the parts, or their numbers of tokens, where ``train`` is cut.
        name: how tables and figures call it; by default after the data set.

    Raises:
        ImportError: if the extra is not installed.
        ValueError: if there is no such column, or not enough text.
    """
    check_size("length", length)
    datasets, transformers = _import_extra("datasets"), _import_extra("transformers")
    tokens_of = transformers.AutoTokenizer.from_pretrained(tokenizer)
    parts = datasets.load_dataset(dataset, config)
    if "train" not in parts:
        raise ValueError(f"{dataset} has the parts {sorted(parts)}: expected train among them")
    end = next(
        (i for i in (tokens_of.eos_token_id, tokens_of.sep_token_id) if i is not None), None
    )
    vocab_size = len(tokens_of)
    names = ("train", "validation", "test")
    own = all(part in parts for part in names)
    streams = [
        compact(
            _token_stream(parts[part], f"{dataset}, {part}", column, tokens_of, end), vocab_size
        )
        for part in (names if own else names[:1])
    ]
    arguments = {
        "dataset": dataset,
        "tokenizer": tokenizer,
        "length": length,
        "config": config,
        "column": column,
        "split": list(split),
        "name": name,
    }
    return _text_data(
        dataset if name is None else name,
        streams if own else _cut(streams[0], split),
        length,
        vocab_size,
        decoder=tokens_of.decode,
        source={"loader": "hub", "arguments": arguments},
    )


def _token_stream(
    rows: Iterable[Any], where: str, column: str, tokenizer: Any, end: int | None
) -> np.ndarray:
    """All tokens of a part, one text after the other."""
    pieces = []
    for row in rows:
        if column not in row:
            raise ValueError(f"{where} has the columns {sorted(row)}: expected {column!r}")
        ids = tokenizer(row[column], add_special_tokens=False)["input_ids"]
        if ids:
            pieces.append(np.array(ids if end is None else [*ids, end], np.int32))
    if not pieces:
        raise ValueError(f"{where} has no text in its column {column!r}")
    return np.concatenate(pieces)
