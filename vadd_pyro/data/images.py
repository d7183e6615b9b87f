r"""Images as rows of tokens: scikit-learn's digits, MNIST, CIFAR-10.

A pixel is a token, in rows from the top (colours: the red, the green, then the blue plane). Of
``h + 1`` grey values, ``K`` levels of equal width are made, the ends exact: :math:`\lfloor v K /
(h + 1) \rfloor`.

*Static* binarised MNIST is one draw of every pixel by its brightness, made by Larochelle and
Murray and used since; *dynamic* draws anew for every batch, which is another, easier problem: one
does not compare likelihoods of the two.

References:
    LeCun et al. 1998 (MNIST); Larochelle and Murray 2011 (static binarisation); Salakhutdinov and
    Murray 2008 (binarisation by brightness); Krizhevsky 2009 (CIFAR-10).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vadd_pyro.data.formats import read_cifar
from vadd_pyro.data.sources import cifar_files, mnist_array, static_mnist
from vadd_pyro.data.splits import (
    SPLITS,
    BatchStream,
    DataSet,
    compact,
    generator,
    split_indices,
)
from vadd_pyro.process import check_size

__all__ = ["DynamicImages", "cifar10", "digits", "mnist", "quantize"]


@dataclass(frozen=True, eq=False, repr=False)
class DynamicImages(DataSet):
    """Images whose training pixels are drawn anew in every batch, each by its brightness.

    ``train``, ``valid`` and ``test`` are one draw, the same for the same seed.

    Args:
        brightness: of the training pixels, ``(N, D)`` uint8.
    """

    brightness: Tensor | None = None

    def training_rows(self, stream: BatchStream, iteration: int, batch_size: int) -> Tensor:
        """One training batch, ``(batch_size, D)`` long."""
        assert self.brightness is not None
        chosen = stream.indices(len(self.brightness), iteration, batch_size)
        return _binarize(self.brightness[chosen], generator(stream.seed, iteration, 1)).long()


def quantize(values: np.ndarray, num_values: int, levels: int) -> np.ndarray:
    """Grey values in ``levels`` levels of equal width.

    Args:
        values: integers in ``0..num_values - 1``.
        num_values: how many there are.
        levels: ``K``, from 2 to ``num_values``.
    """
    check_size("levels", levels, least=2)
    if levels > num_values:
        raise ValueError(f"levels must be at most {num_values}, the grey values, got {levels}")
    return (values.astype(np.int64) * levels // num_values).astype(np.uint8)


def _levels(brightness: np.ndarray, levels: int) -> Tensor:
    return compact(quantize(brightness, 256, levels), levels)


def _binarize(brightness: Tensor, random: torch.Generator) -> Tensor:
    """One with probability ``brightness / 255``, exactly."""
    return (torch.randint(255, brightness.shape, generator=random) < brightness).to(torch.uint8)


def _pad(images: np.ndarray, padded: bool) -> np.ndarray:
    """Flat images, with two more empty pixels on each side if they are to be padded."""
    if padded:
        images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return images.reshape(len(images), -1)


def _check_choice(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def digits(levels: int = 17) -> DataSet:
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn.

    The split is fixed: of every class 70, 10 and 20 per cent.

    Args:
        levels: grey levels ``K``, from 2 to 17 (all there are).
    """
    check_size("levels", levels, least=2)
    from sklearn.datasets import load_digits

    bunch = load_digits()
    tokens = compact(quantize(bunch.data.astype(np.int64), 17, levels), levels)
    parts = split_indices(len(tokens), (0.7, 0.1, 0.2), seed=0, labels=bunch.target)
    train, valid, test = (tokens[torch.from_numpy(rows)] for rows in parts)
    classes = {
        split: torch.from_numpy(bunch.target[rows]).long()
        for split, rows in zip(SPLITS, parts, strict=True)
    }
    return DataSet(
        "digits" if levels == 17 else f"digits, {levels} levels",
        train,
        valid,
        test,
        levels,
        shape=(8, 8),
        labels=classes,
        source={"loader": "digits", "arguments": {"levels": levels}},
    )


def mnist(
    folder: str | Path | None = None,
    *,
    binarization: str | None = "static",
    levels: int = 2,
    padded: bool = False,
    num_valid: int = 10_000,
    seed: int = 0,
    check: bool = True,
) -> DataSet:
    """MNIST: 28 x 28 pixels; 50,000, 10,000 and 10,000 images.

    Args:
        folder: where the files are; downloaded into the cache by default. Static: Larochelle's
            ``binarized_mnist_train.amat`` and so on, as text, or as ``.mat`` with one matrix.
            Otherwise the four IDX files ``train-images-idx3-ubyte.gz`` and so on, packed or not.
        binarization: ``"static"``, ``"dynamic"`` (a new draw of the training pixels in every
            batch, and one draw of the others) or None, for grey ``levels``.
        levels: grey levels ``K``, from 2 to 256, where ``binarization`` is None.
        padded: whether to add two empty pixels on each side, 32 x 32, which suits networks that
            halve the resolution.
        num_valid: how many of the training images, the last ones, are for validation. The static
            files have a split of their own.
        seed: of the one draw of dynamic binarisation.
        check: whether to compare the files with their known checksums.

    Returns:
        The images, with classes; static ones have none, and another order.

    Raises:
        FileNotFoundError, OSError: if a file is not there or cannot be had.
        ValueError: naming a file that is damaged, or another than expected.
    """
    for what, value in (("padded", padded), ("check", check)):
        _check_choice(what, value)
    if binarization not in ("static", "dynamic", None):
        raise ValueError(f"binarization must be 'static', 'dynamic' or None, got {binarization!r}")
    check_size("levels", levels, least=2)
    if binarization is not None and levels != 2:
        raise ValueError(f"levels={levels} needs binarization=None, got {binarization!r}")
    if levels > 256:
        raise ValueError(f"levels must be at most 256, the grey values, got {levels}")
    check_size("num_valid", num_valid)
    check_size("seed", seed, least=0)
    arguments = {
        "folder": None if folder is None else str(Path(folder).expanduser().absolute()),
        "binarization": binarization,
        "levels": levels,
        "padded": padded,
        "num_valid": num_valid,
        "seed": seed,
        "check": check,
    }
    kind = f"{levels} levels" if binarization is None else binarization
    name = f"MNIST, {kind}{', padded' if padded else ''}"
    source: Mapping[str, Any] = {"loader": "mnist", "arguments": arguments}
    if binarization == "static":
        images = {split: static_mnist(folder, split, check) for split in SPLITS}
        _check_sizes(images, name)
        train, valid, test = (compact(_pad(images[split], padded), 2) for split in SPLITS)
        return DataSet(name, train, valid, test, 2, shape=_shape(images, padded), source=source)
    grey, classes = _grey_mnist(folder, num_valid, check)
    _check_sizes(grey, name)
    flat = {split: _pad(grey[split], padded) for split in SPLITS}
    shape = _shape(grey, padded)
    if binarization is None:
        train, valid, test = (_levels(flat[split], levels) for split in SPLITS)
        return DataSet(
            name, train, valid, test, levels, shape=shape, labels=classes, source=source
        )
    brightness = [compact(flat[split], 256) for split in SPLITS]
    train, valid, test = (
        _binarize(part, generator(seed, i, 2)) for i, part in enumerate(brightness)
    )
    return DynamicImages(
        name,
        train,
        valid,
        test,
        2,
        shape=shape,
        labels=classes,
        source=source,
        brightness=brightness[0],
    )


def _shape(images: Mapping[str, np.ndarray], padded: bool) -> tuple[int, int]:
    height, width = images["train"].shape[1:]
    return (height + 4, width + 4) if padded else (height, width)


def _check_sizes(images: Mapping[str, np.ndarray], name: str) -> None:
    sizes = {split: part.shape[1:] for split, part in images.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{name}: the parts have images of different sizes, {sizes}")


def _grey_mnist(
    folder: str | Path | None, num_valid: int, check: bool
) -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    """Grey images ``(N, H, W)`` and classes ``(N,)`` of the three parts."""
    images, labels = {}, {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images[part] = mnist_array(folder, f"{prefix}-images-idx3-ubyte", check, 3)
        labels[part] = mnist_array(folder, f"{prefix}-labels-idx1-ubyte", check, 1)
        if len(images[part]) != len(labels[part]):
            raise ValueError(
                f"{prefix}-images-idx3-ubyte has {len(images[part])} images, "
                f"{prefix}-labels-idx1-ubyte has {len(labels[part])} labels"
            )
    return _with_validation(images, labels, num_valid)


def _with_validation(
    images: dict[str, np.ndarray], labels: dict[str, np.ndarray], num_valid: int
) -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    """Set the last training images apart."""
    first = len(images["train"]) - num_valid
    if first < 1:
        raise ValueError(
            f"num_valid must be less than {len(images['train'])}, the training images, got "
            f"{num_valid}"
        )
    parts, classes = {}, {}
    for split, of, where in (
        ("train", "train", slice(0, first)),
        ("valid", "train", slice(first, None)),
        ("test", "test", slice(None)),
    ):
        parts[split] = images[of][where]
        classes[split] = torch.from_numpy(labels[of][where].astype(np.int64))
    return parts, classes


def cifar10(
    folder: str | Path | None = None,
    *,
    levels: int = 256,
    num_valid: int = 5_000,
    check: bool = True,
) -> DataSet:
    """CIFAR-10: 32 x 32 pixels in three colours; 45,000, 5,000 and 10,000 images.

    Args:
        folder: where ``cifar-10-binary.tar.gz`` is, or the folder it unpacks to; downloaded into
            the cache by default (162 MB). The Python version of the files is pickled, and reading
            pickles runs code: it is not read.
        levels: brightness levels ``K`` of a colour, from 2 to 256 (all there are).
        num_valid: how many of the training images, the last ones, are for validation.
        check: whether to compare the files with their known checksums.

    Raises:
        FileNotFoundError, OSError: if a file is not there or cannot be had.
        ValueError: naming a file that is damaged, or another than expected.
    """
    _check_choice("check", check)
    check_size("levels", levels, least=2)
    check_size("num_valid", num_valid)
    if levels > 256:
        raise ValueError(f"levels must be at most 256, the brightness values, got {levels}")
    path, files = cifar_files(folder, check)
    read = [read_cifar(files[name], f"{path}: {name}") for name in files]
    images = {"train": np.concatenate([x for _, x in read[:-1]]), "test": read[-1][1]}
    labels = {"train": np.concatenate([y for y, _ in read[:-1]]), "test": read[-1][0]}
    parts, classes = _with_validation(images, labels, num_valid)
    train, valid, test = (_levels(parts[split], levels) for split in SPLITS)
    arguments = {
        "folder": None if folder is None else str(Path(folder).expanduser().absolute()),
        "levels": levels,
        "num_valid": num_valid,
        "check": check,
    }
    return DataSet(
        "CIFAR-10" if levels == 256 else f"CIFAR-10, {levels} levels",
        train,
        valid,
        test,
        levels,
        shape=(3, 32, 32),
        labels=classes,
        source={"loader": "cifar10", "arguments": arguments},
    )
