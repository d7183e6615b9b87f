"""Where MNIST and CIFAR-10 are to be had, and what their files must be.

The checksums are of the archives and, where these are repacked or unpacked, of what is in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vadd_pyro.data.files import check_content, download, find, read_bytes, read_tar
from vadd_pyro.data.formats import amat_text, read_binary_rows, read_idx

__all__ = ["cifar_files", "mnist_array", "static_mnist"]

_MNIST_URLS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
# Of the archive, and of what is in it: repacked and unpacked files are as good.
_MNIST = {
    "train-images-idx3-ubyte": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "train-labels-idx1-ubyte": (
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "t10k-images-idx3-ubyte": (
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "t10k-labels-idx1-ubyte": (
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}
_STATIC_URL = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
_STATIC = {
    "train": "cf70514ec5f481e54ad3eb0e6c03c83326ff96f8",
    "valid": "13418487742e6ea6d48db7b5187353a20b1b1f8c",
    "test": "ca70bd7775e182596dec148d4dc1bc6bd6c4c5f4",
}
_CIFAR = "cifar-10-binary.tar.gz"
_CIFAR_URL = f"https://www.cs.toronto.edu/~kriz/{_CIFAR}"
_CIFAR_CHECKSUM = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
_CIFAR_FILES = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
_SKIP = "pass check=False for your own file of this format"


def mnist_array(folder: str | Path | None, name: str, check: bool, ndim: int) -> np.ndarray:
    """One of the four IDX files of MNIST, ``(N, 28, 28)`` or ``(N,)`` uint8.

    Args:
        folder: where it is, packed or not; None downloads it.
        name: without ``.gz``.
        check: whether to compare it with its checksum.
        ndim: how many dimensions it has.
    """
    packed, unpacked = _MNIST[name]
    if folder is None:
        urls = [f"{url}{name}.gz" for url in _MNIST_URLS]
        path = download(urls, packed, name=f"mnist-{name}.gz")
    else:
        path = find(folder, [f"{name}.gz", name])
    content = read_bytes(path)
    if check:
        check_content(content, unpacked, path, _SKIP)
    return read_idx(content, path, ndim)


def static_mnist(folder: str | Path | None, split: str, check: bool) -> np.ndarray:
    """One part of static binarised MNIST, ``(N, 28, 28)`` of zeros and ones.

    Args:
        folder: where the ``.amat`` or ``.mat`` file is; None downloads the text.
        split: which part.
        check: whether to compare the text, or the text that the matrix would be, with its
            checksum.
    """
    name = f"binarized_mnist_{split}"
    if folder is None:
        path = download(f"{_STATIC_URL}{name}.amat", _STATIC[split])
    else:
        path = find(folder, [f"{name}.amat", f"{name}.amat.gz", f"{name}.mat"])
    rows = read_binary_rows(path)
    if check:
        check_content(amat_text(rows), _STATIC[split], path, _SKIP)
    side = round(rows.shape[1] ** 0.5)
    if side * side != rows.shape[1]:
        raise ValueError(f"{path} has rows of {rows.shape[1]} values: expected square images")
    return rows.reshape(-1, side, side)


def cifar_files(folder: str | Path | None, check: bool) -> tuple[Path, dict[str, bytes]]:
    """The six binary files of CIFAR-10, the test images last, and where they are from.

    Args:
        folder: where the archive is, or what it unpacks to; None downloads it.
        check: whether to compare the archive, or the files, with their checksums.
    """
    names: Sequence[str] = list(_CIFAR_FILES)
    if folder is None:
        path = download(_CIFAR_URL, _CIFAR_CHECKSUM)
        return path, read_tar(path, path.read_bytes(), names)
    folder = Path(folder).expanduser()
    if (folder / _CIFAR).is_file():
        path = folder / _CIFAR
        content = path.read_bytes()
        if check:
            check_content(content, _CIFAR_CHECKSUM, path, _SKIP)
        return path, read_tar(path, content, names)
    inner = folder / "cifar-10-batches-bin"
    if inner.is_dir():
        folder = inner
    elif not (folder / names[0]).is_file():
        raise FileNotFoundError(f"{folder} holds neither {_CIFAR} nor {names[0]} and the others")
    files = {name: read_bytes(find(folder, [name])) for name in names}
    if check:
        for name, content in files.items():
            check_content(content, _CIFAR_FILES[name], folder / name, _SKIP)
    return folder, files
