"""Small files of every format go in and come out exactly; damaged ones are refused by name."""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib
import io
import struct
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from vadd_pyro import MaskedDiffusionELBO, data, fit, guides, models
from vadd_pyro.data import files, sources, splits, text
from vadd_pyro.data.formats import amat_text
from vadd_pyro.data.images import quantize
from vadd_pyro.data.tables import read_table
from vadd_pyro.nn import MLPDecoder

RNG = np.random.default_rng(0)


def write_csv(path, rows, delimiter=","):
    content = "".join(delimiter.join(map(str, row)) + "\n" for row in rows.tolist()).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def idx(array):
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write_mnist(folder, num_train=40, num_test=12, packed=True):
    arrays = {}
    for prefix, num in (("train", num_train), ("t10k", num_test)):
        arrays[f"{prefix}-images-idx3-ubyte"] = RNG.integers(256, size=(num, 28, 28))
        arrays[f"{prefix}-labels-idx1-ubyte"] = RNG.integers(10, size=num)
    for name, array in arrays.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return arrays


def sha256(content):
    return hashlib.sha256(content).hexdigest()


# Tables


@pytest.mark.parametrize("delimiter", [",", ";", "\t", " "])
@pytest.mark.parametrize("ending", ["csv", "csv.gz", "data"])
def test_one_table_is_split_without_loss_or_overlap_by_its_seed(tmp_path, delimiter, ending):
    rows = np.stack([np.arange(50), RNG.integers(7, size=50), np.zeros(50, int)], 1)
    path = write_csv(tmp_path / f"t.{ending}", rows, delimiter)
    found = data.table(path, split=(0.6, 0.2, 0.2), seed=3)
    assert [len(found.rows(s)) for s in data.SPLITS] == [30, 10, 10]
    assert (found.vocab_size, found.length, found.name) == (50, 3, "t")
    together = torch.cat([found.rows(s) for s in data.SPLITS])
    assert together.dtype == torch.long
    assert (together[together[:, 0].argsort()] == torch.from_numpy(rows)).all()
    assert (together[:, 0] != torch.arange(50)).any()
    again = data.table(path, split=(30, 10, 10), seed=3)
    other = data.table(path, split=(0.6, 0.2, 0.2), seed=4)
    assert again.fingerprint == found.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    "names",
    [
        ("a.train.data", "a.valid.data", "a.test.data"),
        ("a.ts.data.gz", "a.valid.data.gz", "a.test.data.gz"),
        ("a_train.csv", "a_val.csv", "a_test.csv"),
        ("train.csv", "validation.csv", "test.csv"),
    ],
)
def test_three_files_are_the_three_parts(tmp_path, names):
    parts = [RNG.integers(2, size=(n, 5)) for n in (9, 4, 6)]
    for name, part in zip(names, parts, strict=True):
        write_csv(tmp_path / name, part)
    (tmp_path / "contest.csv").write_text("not a part\n")
    found = data.table(tmp_path, 3)
    for split, part in zip(data.SPLITS, parts, strict=True):
        assert (found.rows(split) == torch.from_numpy(part)).all()
    assert found.vocab_size == 3
    assert found.process().vocab_size == 3
    if names[0].startswith("a"):
        assert data.table(tmp_path / "a", 3).fingerprint == found.fingerprint
        assert found.name == "a"
        write_csv(tmp_path / "b.train.csv", parts[0])
        with pytest.raises(ValueError, match=r"holds 2 tables: pass one of .*/a, .*/b"):
            data.table(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"no valid and no test file"):
            data.table(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match=r"no table .*nothing"):
        data.table(tmp_path / "nothing")


def test_the_training_file_of_three_stands_for_the_three(tmp_path):
    parts = [RNG.integers(3, size=(n, 4)) for n in (12, 5, 6)]
    write_csv(tmp_path / "a.train.csv", parts[0])
    alone = data.table(tmp_path / "a.train.csv", split=(6, 3, 3))
    assert len(alone.rows("train")) == 6
    for word, part in zip(("valid", "test"), parts[1:], strict=True):
        write_csv(tmp_path / f"a.{word}.csv", part)
    found = data.table(tmp_path / "a.train.csv")
    for split, part in zip(("train", "valid", "test"), parts, strict=True):
        assert (found.rows(split).numpy() == part).all()
    assert found.name == "a"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0,1\n0,1,1\n", r"line 2, column 3: the line has 3 columns, those before it have 2"),
        ("0,1\n\n0\n", r"line 3, column 2: the line has 1 columns"),
        ("0,1\n1,x\n", r"line 2, column 2: 'x' is no integer"),
        ("0,1\n1,1.5\n", r"line 2, column 2: '1.5' is no integer"),
        ("0,1\n1,1.0\n", r"line 2, column 2: '1.0' is no integer"),
        ("0,1\n,1\n", r"line 2, column 1: no value"),
        ("0,1\n\n0,-2\n", r"line 3, column 2: -2 is negative, expected 0..K-1"),
        ("0,99999999999999999999\n", r"line 1, column 2: 9+ is too large"),
        ("0,a\n0,1\n", r"line 1, column 2: 'a' is no integer, while others"),
        ("", r"is empty"),
        ("a,b\n", r"a header and no rows"),
    ],
)
def test_a_bad_table_is_refused_with_its_place(tmp_path, content, message):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"bad\.csv.*{message}"):
        data.table(path)


def test_a_value_beyond_the_vocabulary_is_refused_with_its_place(tmp_path):
    rows = np.array([[0, 1], [2, 0], [0, 3]])
    path = write_csv(tmp_path / "t.csv", rows)
    with pytest.raises(ValueError, match=r"t\.csv, line 3, column 2: 3 is too large for vocab_s"):
        data.table(path, 3)
    assert (read_table(path, 4) == rows).all()
    write_csv(path, np.array([[10**6, 0]] * 3))
    with pytest.raises(ValueError, match=r"the value 1000000: .* pass vocab_size"):
        data.table(path, split=(1, 1, 1))
    assert data.table(path, 10**6 + 1, split=(1, 1, 1)).rows("train").max() <= 10**6


def test_a_header_is_found_or_stated(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('\ufeff"x","y"\n1,0\n"0",1\n')
    assert read_table(path).tolist() == [[1, 0], [0, 1]]
    path.write_text("\ufeff5,6\n1,0\n0,1\n")
    assert read_table(path).tolist() == [[5, 6], [1, 0], [0, 1]]
    assert read_table(path, header=True).tolist() == [[1, 0], [0, 1]]


def test_a_cut_archive_is_refused_by_name(tmp_path):
    path = write_csv(tmp_path / "t.csv.gz", RNG.integers(2, size=(99, 9)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"t\.csv\.gz is damaged"):
        data.table(path)


# What all sets share


def small_set(num=20, **further):
    rows = torch.arange(2 * num, dtype=torch.uint8).view(num, 2)
    return data.DataSet("small", rows, rows[:3], rows[:4], 2 * num, **further)


def test_an_epoch_has_every_row_once_and_batches_depend_on_their_number_alone():
    stream = small_set().batches(seed=5)
    drawn = [stream(8) for _ in range(5)]  # two epochs of 20 rows
    for epoch in torch.cat(drawn).split(20):
        assert sorted(epoch[:, 0].tolist()) == list(range(0, 40, 2))
    assert drawn[0].dtype == torch.long
    assert (torch.cat(drawn)[:20] != torch.cat(drawn)[20:]).any()
    other = small_set().batches(seed=5)
    for i in (3, 0, 4, 2):
        assert (other.at(i, 8) == drawn[i]).all()
    assert (small_set().batches(seed=6)(8) != drawn[0]).any()
    assert stream.at(0, 50).shape == (50, 2)  # larger than an epoch


def test_rows_are_drawn_without_replacement():
    some = small_set().rows("train", 20, seed=1)
    assert sorted(some[:, 0].tolist()) == list(range(0, 40, 2))
    assert (some != small_set().rows("train", 20, seed=2)).any()
    with pytest.raises(ValueError, match="num must be at most 3"):
        small_set().rows("valid", 4)
    with pytest.raises(ValueError, match="split must be one of train, valid, test"):
        small_set().rows("dev")


def test_a_description_is_plain_and_tells_other_data():
    first, second = small_set(), small_set(21)
    description = first.describe()
    assert description["num_rows"] == {"train": 20, "valid": 3, "test": 4}
    first.check_same(description)
    with pytest.raises(ValueError, match=r"vocab_size is 42, was 40"):
        second.check_same(description)
    rows = first.train.flip(0)
    with pytest.raises(ValueError, match="fingerprint is"):
        data.DataSet("other", rows, rows[:3], rows[:4], 40).check_same(description)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ((0.5, 0.5), "three shares"),
        ((0.5, 0.2, 0.2), "sum to one"),
        ((5, 5, 1), "takes 11 rows, there are 10"),
        ((0.98, 0.01, 0.01), "leaves a part of 10 rows empty"),
        ((1.0, 0.0, 0.0), "three shares"),
    ],
)
def test_bad_splits_are_refused(split, message):
    with pytest.raises(ValueError, match=message):
        splits.split_sizes(10, split)


# Images


def test_quantisation_is_exact_at_the_ends_and_even_between():
    for num_values, levels in ((17, 2), (17, 16), (17, 17), (256, 2), (256, 16), (256, 256)):
        tokens = quantize(np.arange(num_values), num_values, levels)
        assert tokens[0] == 0
        assert tokens[-1] == levels - 1
        sizes = np.bincount(tokens, minlength=levels)
        assert sizes.max() - sizes.min() <= 1
        assert (np.diff(tokens.astype(int)) >= 0).all()
    with pytest.raises(ValueError, match="levels must be at most 17"):
        data.digits(18)
    with pytest.raises(ValueError, match="levels must be an integer of at least 2, got 1"):
        data.digits(1)


def test_digits_are_those_of_scikit_learn_in_like_parts():
    from sklearn.datasets import load_digits

    found, bunch = data.digits(), load_digits()
    together = torch.cat([found.rows(s) for s in data.SPLITS]).numpy()
    labels = torch.cat([found.labels[s] for s in data.SPLITS]).numpy()
    expected = sorted(map(tuple, np.c_[bunch.data, bunch.target].astype(int).tolist()))
    assert sorted(map(tuple, np.c_[together, labels].tolist())) == expected
    for split, share in zip(data.SPLITS, (0.7, 0.1, 0.2), strict=True):
        counts = found.labels[split].bincount(minlength=10)
        assert ((counts - share * np.bincount(bunch.target)).abs() < 1).all()
    # the same everywhere: from a frozen generator
    assert found.fingerprint == "crc32 26eeca1c"
    assert data.digits(2).rows("test").unique().tolist() == [0, 1]
    pictures = found.pictures(torch.tensor([[16, 17] + [0] * 62]))
    assert pictures.shape == (1, 8, 8)
    assert pictures[0, 0, :3].tolist() == [1, -1, 0]


@pytest.mark.parametrize("packed", [True, False])
def test_grey_mnist_comes_back_exactly(tmp_path, packed):
    arrays = write_mnist(tmp_path, packed=packed)
    options = dict(binarization=None, num_valid=10, check=False)
    found = data.mnist(tmp_path, levels=256, **options)
    images = arrays["train-images-idx3-ubyte"].reshape(40, -1)
    assert found.shape == (28, 28)
    assert (found.rows("train").numpy() == images[:30]).all()
    assert (found.rows("valid").numpy() == images[30:]).all()
    assert (found.rows("test").numpy() == arrays["t10k-images-idx3-ubyte"].reshape(12, -1)).all()
    assert (found.labels["valid"].numpy() == arrays["train-labels-idx1-ubyte"][30:]).all()
    two = data.mnist(tmp_path, levels=2, **options)
    assert (two.rows("train").numpy() == (images[:30] >= 128)).all()
    padded = data.mnist(tmp_path, levels=256, padded=True, **options)
    assert padded.shape == (32, 32)
    square = padded.rows("train").view(30, 32, 32)
    assert (square[:, 2:-2, 2:-2].reshape(30, -1) == found.rows("train")).all()
    assert square.sum() == found.rows("train").sum()


def test_dynamic_binarisation_draws_by_brightness_anew_in_every_batch(tmp_path):
    arrays = write_mnist(tmp_path, num_train=12)
    brightness = np.zeros((12, 28, 28), int)
    brightness[:, :, 0], brightness[:, :, 1] = 255, 51
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(brightness)))
    options = dict(binarization="dynamic", num_valid=2, check=False)
    found = data.mnist(tmp_path, **options)
    stream = found.batches(seed=1)
    drawn = torch.stack([stream(10) for _ in range(100)]).view(-1, 28, 28).double()
    assert drawn[:, :, 0].min() == 1
    assert drawn[:, :, 2:].max() == 0
    mean, num = drawn[:, :, 1].mean().item(), 28_000
    assert abs(mean - 0.2) < 4 * (0.16 / num) ** 0.5
    assert (stream.at(0, 10) != stream.at(1, 10)).any()
    assert (stream.at(0, 10) == found.batches(seed=1)(10)).all()
    test = arrays["t10k-images-idx3-ubyte"]
    once = found.rows("test").view(12, 28, 28).numpy()
    deviation = (once - test / 255).sum() / ((test / 255) * (1 - test / 255)).sum() ** 0.5
    assert abs(deviation) < 4
    assert data.mnist(tmp_path, **options).fingerprint == found.fingerprint
    assert data.mnist(tmp_path, seed=1, **options).fingerprint != found.fingerprint


@pytest.mark.parametrize("ending", ["amat", "amat.gz", "mat"])
def test_static_mnist_has_its_checksum_in_every_format(tmp_path, monkeypatch, ending):
    rows = {
        s: RNG.integers(2, size=(n, 784)) for s, n in (("train", 7), ("valid", 3), ("test", 4))
    }
    for split, part in rows.items():
        path = tmp_path / f"binarized_mnist_{split}.{ending}"
        lines = "".join(" ".join(map(str, row)) + "\n" for row in part.tolist()).encode()
        assert amat_text(part) == lines
        if ending == "mat":
            savemat(path, {"X": part.astype(np.uint8)}, do_compression=True)
        else:
            path.write_bytes(gzip.compress(lines) if ending.endswith("gz") else lines)
        monkeypatch.setitem(sources._STATIC, split, hashlib.sha1(lines).hexdigest())
    found = data.mnist(tmp_path)
    for split, part in rows.items():
        assert (found.rows(split).numpy() == part).all()
    assert data.mnist(tmp_path, padded=True).length == 1024
    monkeypatch.setitem(sources._STATIC, "valid", "0" * 40)
    with pytest.raises(ValueError, match=r"mnist_valid\S+ is damaged .* pass check=False"):
        data.mnist(tmp_path)
    assert data.mnist(tmp_path, check=False).fingerprint == found.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"0 1 0 1\n0 1 0\n", "line 2: 3 values, the first line has 4"),
        (b"0 1 0 1\n0 1 2 0\n", "line 2, column 3: '2' is neither"),
        (b"", "is empty"),
        (b"0 1 0\n", "rows of 3 values: expected square"),
    ],
)
def test_bad_amat_text_is_refused_with_its_place(tmp_path, content, message):
    (tmp_path / "binarized_mnist_train.amat").write_bytes(content)
    with pytest.raises(ValueError, match=rf"mnist_train\.amat.*{message}"):
        data.mnist(tmp_path, check=False)


def test_a_bad_mat_file_is_refused_by_name(tmp_path):
    path = tmp_path / "binarized_mnist_train.mat"
    savemat(path, {"X": np.eye(4), "Y": np.eye(4)})
    with pytest.raises(ValueError, match=r"train\.mat holds \['X', 'Y'\]: expected one matrix"):
        data.mnist(tmp_path, check=False)
    savemat(path, {"X": np.eye(4) * 2})
    with pytest.raises(ValueError, match=r"X\[0, 0\] is 2\.0, neither 0 nor 1"):
        data.mnist(tmp_path, check=False)
    savemat(path, {"X": RNG.integers(2, size=(50, 784))}, do_compression=True)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train\.mat cannot be read as a MATLAB file"):
        data.mnist(tmp_path, check=False)


def test_damaged_mnist_files_are_refused_by_name(tmp_path):
    write_mnist(tmp_path)
    name = "train-images-idx3-ubyte"
    options = dict(binarization=None, num_valid=10)
    with pytest.raises(ValueError, match=rf"{name}\.gz is damaged or another file.*ba891046e6505"):
        data.mnist(tmp_path, **options)
    packed = (tmp_path / f"{name}.gz").read_bytes()
    whole = gzip.decompress(packed)
    for content, message in (
        (b"\0\0\x08\x01" + whole[4:], "begins with 00000801, expected 00000803"),
        (whole[:-1], "expected 31,376 for the shape"),
        (whole + b"\0", "has 31,377 bytes"),
    ):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        with pytest.raises(ValueError, match=rf"{name}\.gz .*{message}"):
            data.mnist(tmp_path, check=False, **options)
    (tmp_path / f"{name}.gz").write_bytes(packed[:-9])
    with pytest.raises(ValueError, match=rf"{name}\.gz is damaged and cannot be unpacked"):
        data.mnist(tmp_path, check=False, **options)
    (tmp_path / f"{name}.gz").unlink()
    with pytest.raises(FileNotFoundError, match=rf"holds no {name}\.gz or {name}"):
        data.mnist(tmp_path, **options)


def test_one_flipped_byte_is_seen_by_the_checksum(tmp_path, monkeypatch):
    arrays = write_mnist(tmp_path)
    for name, array in arrays.items():
        monkeypatch.setitem(sources._MNIST, name, ("0" * 64, sha256(idx(array))))
    options = dict(binarization=None, num_valid=10)
    assert len(data.mnist(tmp_path, **options).rows("train")) == 30
    content = bytearray(idx(arrays["t10k-labels-idx1-ubyte"]))
    content[-1] ^= 1
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz is damaged"):
        data.mnist(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(binarization="both"), "binarization must be 'static'"),
        (dict(levels=4), "levels=4 needs binarization=None"),
        (dict(binarization=None, levels=300), "levels must be at most 256"),
        (dict(binarization=None, num_valid=40, check=False), "num_valid must be less than 40"),
    ],
)
def test_bad_arguments_of_mnist_are_refused(tmp_path, options, message):
    write_mnist(tmp_path)
    with pytest.raises(ValueError, match=message):
        data.mnist(tmp_path, **options)


def cifar_archive(order):
    """A small archive with its files in some order."""
    records = {
        name: np.c_[RNG.integers(10, size=4), RNG.integers(256, size=(4, 3072))].astype(np.uint8)
        for name in sources._CIFAR_FILES
    }
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name in order(list(records)):
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = records[name].nbytes
            archive.addfile(entry, io.BytesIO(records[name].tobytes()))
    return records, packed.getvalue()


def test_cifar10_comes_back_exactly_from_archive_and_folder(tmp_path, monkeypatch):
    records, packed = cifar_archive(reversed)
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(packed)
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz is damaged or another file"):
        data.cifar10(tmp_path)
    monkeypatch.setattr(sources, "_CIFAR_CHECKSUM", sha256(packed))
    found = data.cifar10(tmp_path, num_valid=5)
    together = np.concatenate(list(records.values()))
    assert (torch.cat([found.rows(s) for s in data.SPLITS]).numpy() == together[:, 1:]).all()
    assert torch.cat([found.labels[s] for s in data.SPLITS]).tolist() == together[:, 0].tolist()
    assert [len(found.rows(s)) for s in data.SPLITS] == [15, 5, 4]
    assert (found.vocab_size, found.length) == (256, 3072)
    picture = found.pictures(found.rows("test"))
    assert picture.shape == (4, 32, 32, 3)
    assert picture[1, 2, 3, 2] == pytest.approx(together[21, 1 + 2048 + 2 * 32 + 3] / 255)
    assert data.cifar10(tmp_path, levels=4, num_valid=5).rows("train").max() == 3
    path.write_bytes(packed[:-200])
    with pytest.raises(ValueError, match=r"tar\.gz is damaged and cannot be unpacked"):
        data.cifar10(tmp_path, check=False)
    path.unlink()
    inner = tmp_path / "cifar-10-batches-bin"
    inner.mkdir()
    for name, content in records.items():
        (inner / name).write_bytes(content.tobytes())
    assert data.cifar10(tmp_path, num_valid=5, check=False).fingerprint == found.fingerprint
    with pytest.raises(ValueError, match=r"data_batch_1\.bin is damaged or another"):
        data.cifar10(tmp_path, num_valid=5)
    (inner / "test_batch.bin").write_bytes(records["test_batch.bin"].tobytes()[:-1])
    with pytest.raises(ValueError, match=r"test_batch\.bin has 12,291 bytes"):
        data.cifar10(tmp_path, check=False)
    with pytest.raises(FileNotFoundError, match="holds neither"):
        data.cifar10(tmp_path / "nothing")


# Text


def test_windows_of_the_parts_never_cross_a_border(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("a" * 905 + "b" * 51 + "c" * 44)
    found = data.characters(path, 10, split=(905, 51, 44))
    assert found.decode(found.rows("train")) == ["a" * 10] * 90
    assert found.decode(found.rows("valid")) == ["b" * 10] * 5
    assert found.decode(found.rows("test")) == ["c" * 10] * 4
    assert found.batches()(5000).max() == 0
    assert data.characters(path, 10, split=(0.9, 0.05, 0.05)).stream.shape == (900,)
    with pytest.raises(ValueError, match=r"test part has 44 tokens, fewer than length=50"):
        data.characters(path, 50, split=(905, 51, 44))


def test_training_windows_begin_anywhere_and_follow_seed_and_number(tmp_path):
    path = tmp_path / "t.txt"
    letters = "".join(chr(0x100 + i) for i in range(40))
    path.write_text(letters, encoding="utf-8")
    found = data.characters(path, 4, split=(20, 10, 10))
    assert "".join(found.characters) == letters
    stream = found.batches(seed=2)
    drawn = stream(20_000)
    assert (drawn.diff(dim=1) == 1).all()
    counts = drawn[:, 0].bincount()
    assert len(counts) == 17  # windows of 4 in 20 characters
    assert ((counts - 20_000 / 17).abs() < 4.5 * (20_000 / 17) ** 0.5).all()
    assert (found.batches(seed=2)(20_000) == drawn).all()
    assert (stream(20_000) != drawn).any()
    assert (found.batches(seed=3)(20_000) != drawn).any()


def test_decode_undoes_encode_and_shows_masks(tmp_path):
    found = data.characters(length=32)
    line = "The try statement - with 2 lines"
    tokens = found.encode(line)
    assert found.decode(tokens[None]) == [line]
    masked = tokens.clone()
    masked[4:7] = found.vocab_size
    assert found.decode(masked[None]) == ["The ___ statement - with 2 lines"]
    text_of_rows = "".join(found.decode(found.rows("test")))
    assert (found.encode(text_of_rows).view(-1, 32) == found.rows("test")).all()
    with pytest.raises(ValueError, match=r"text, line 2, column 3: '\u00fe' is not"):
        found.encode("ab\nab\u00fe")
    with pytest.raises(ValueError, match=r"rows\[0, 0\] is 999"):
        found.decode(torch.full((1, 32), 999))


def test_characters_outside_the_alphabet_are_refused_or_mapped(tmp_path):
    path = tmp_path / "t.txt.gz"
    path.write_bytes(gzip.compress(b"ab\r\nba!ab\n" * 20))
    with pytest.raises(ValueError, match=r"t\.txt\.gz, line 2, column 3: '!' is not in"):
        data.characters(path, 4, alphabet="ab\n")
    found = data.characters(path, 9, alphabet="ab\n?", unknown="?")
    assert found.decode(found.rows("train"))[0] == "ab\nba?ab\n"
    with pytest.raises(ValueError, match="unknown must be one character of alphabet"):
        data.characters(path, 4, alphabet="ab\n!", unknown="?")
    with pytest.raises(ValueError, match="each once"):
        data.characters(path, 4, alphabet="aab\n!")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 100)
    with pytest.raises(ValueError, match=r"latin\.txt is no text in utf-8: byte 3"):
        data.characters(tmp_path / "latin.txt")
    assert data.characters(tmp_path / "latin.txt", 4, encoding="latin-1").vocab_size == 4
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing"):
        data.characters(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["text8", "text8.gz", "text8.zip"])
def test_text8_is_read_in_every_packing_and_checked(tmp_path, monkeypatch, name):
    content = text._TEXT8_START + b"zebras and others " * 60
    path = tmp_path / name
    if name.endswith("zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("text8", content)
    else:
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(ValueError, match=rf"{name} has .*expected 100,000,000.*prefix=True"):
        data.text8(path, 16)
    found = data.text8(tmp_path, 16, prefix=True)
    assert found.name == f"text8 (first {len(content):,} characters)"
    assert found.decode(found.rows("train"))[0] == " anarchism origi"
    assert found.rows("train")[0, :4].tolist() == [0, 1, 14, 1]
    assert (found.vocab_size, found.characters[26]) == (27, "z")
    monkeypatch.setattr(text, "_TEXT8_SIZE", len(content))
    monkeypatch.setattr(text, "_TEXT8", hashlib.sha1(content).hexdigest())
    assert data.text8(path, 16).name == "text8"
    monkeypatch.setattr(text, "_TEXT8", "0" * 40)
    with pytest.raises(ValueError, match=rf"{name} is damaged or another file"):
        data.text8(path, 16)
    packed = path.read_bytes()
    if name != "text8":
        path.write_bytes(packed[:-30])
        with pytest.raises(ValueError, match=rf"{name} is damaged and cannot be unpacked"):
            data.text8(path, 16, prefix=True)


def test_other_text_is_no_beginning_of_text8(tmp_path):
    path = tmp_path / "text8"
    path.write_bytes(b"another text " * 100)
    with pytest.raises(ValueError, match="is no beginning of text8"):
        data.text8(path, 16, prefix=True)
    path.write_bytes(b"another Text " * 100)
    with pytest.raises(ValueError, match="line 1, column 9: 'T' is not in the alphabet"):
        data.text8(path, 16, prefix=True, check=False)


class WordTokenizer:
    """A tokenizer of words, with the interface of the real ones."""

    words = ("<end>", "a", "b", "c", "d")
    eos_token_id = 0
    sep_token_id = None

    def __len__(self):
        return len(self.words)

    def __call__(self, line, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [self.words.index(word) for word in line.split()]}

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)


def fake_hub(monkeypatch, parts):
    datasets, transformers = types.ModuleType("datasets"), types.ModuleType("transformers")
    datasets.load_dataset = lambda name, config: parts
    transformers.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda _: WordTokenizer())
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.setitem(sys.modules, "transformers", transformers)


def test_a_set_of_the_hub_is_tokenised_and_cut(monkeypatch):
    lines = [{"text": "a b c"}, {"text": ""}, {"text": "d d d"}]
    parts = {"train": lines * 10, "validation": lines, "test": lines}
    fake_hub(monkeypatch, parts)
    found = data.hub("some/set", "words", 4)
    assert found.decode(found.rows("test")) == ["a b c <end>", "d d d <end>"]
    assert found.decode(torch.tensor([[1, 5, 2, 3]])) == ["a_b c"]
    assert found.vocab_size == 5
    assert found.batches()(3).shape == (3, 4)
    with pytest.raises(TypeError, match="tokens of a tokenizer"):
        found.encode("a")
    with pytest.raises(ValueError, match=r"has the columns \['text'\]: expected 'body'"):
        data.hub("some/set", "words", 4, column="body")
    del parts["validation"]
    assert [len(data.hub("x", "y", 4).rows(s)) for s in data.SPLITS] == [18, 1, 1]
    del parts["train"]
    with pytest.raises(ValueError, match=r"has the parts \['test'\]: expected train"):
        data.hub("some/set", "words", 4)


def test_without_the_extra_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "vadd-pyro\[hub\]"'):
        data.hub("some/set", "words")


# Files


def test_a_download_is_kept_once_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("VADD_PYRO_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source.bin"
    source.write_bytes(b"content")
    url, checksum = source.as_uri(), sha256(b"content")
    missing = (tmp_path / "gone.bin").as_uri()
    path = data.download([missing, url], checksum, name="kept.bin", progress=False)
    assert path == data.cache_folder() / "kept.bin" == tmp_path / "cache" / "kept.bin"
    assert path.read_bytes() == b"content"
    source.unlink()
    assert data.download(url, checksum, name="kept.bin") == path  # from the cache
    for algorithm in ("md5", "sha1"):
        other = hashlib.new(algorithm, b"content").hexdigest()
        assert data.download(url, other, name="kept.bin") == path
    path.write_bytes(b"c0ntent")
    with pytest.raises(ValueError, match=r"kept\.bin is damaged .*expected .*delete it"):
        data.download(url, checksum, name="kept.bin")
    with pytest.raises(ValueError, match="checksum must be a lower-case hexadecimal"):
        data.download(url, "abc")


def test_a_failed_download_names_its_addresses_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("VADD_PYRO_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source.bin"
    source.write_bytes(b"conten")
    checksum = sha256(b"content")
    for url, message in (
        (source.as_uri(), "cut short or another file: sha256 .* of 6 bytes"),
        ((tmp_path / "gone").as_uri(), "gone"),
        ("no-scheme", "unknown url type"),
    ):
        with pytest.raises(OSError, match=rf"could not be downloaded: {url}: .*{message}"):
            data.download(url, checksum, name="x", progress=False)
    assert list((tmp_path / "cache").iterdir()) == []

    def slow(address, timeout):
        raise TimeoutError(f"no answer in {timeout} seconds")

    monkeypatch.setattr(files.urllib.request, "urlopen", slow)
    with pytest.raises(OSError, match=r"https://a/x: no answer in 3 seconds; https://b/x: no"):
        data.download(["https://a/x", "https://b/x"], checksum, timeout=3)


def test_loaders_without_a_folder_fill_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VADD_PYRO_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "mirror"
    folder.mkdir()
    for name, array in write_mnist(folder).items():
        packed = (folder / f"{name}.gz").read_bytes()
        monkeypatch.setitem(sources._MNIST, name, (sha256(packed), sha256(idx(array))))
    monkeypatch.setattr(sources, "_MNIST_URLS", (f"{folder.as_uri()}/",))
    options = dict(binarization=None, num_valid=10)
    found = data.mnist(**options)
    assert found.fingerprint == data.mnist(folder, **options).fingerprint
    assert len(list((tmp_path / "cache").iterdir())) == 4
    again = getattr(data, found.describe()["loader"])(**found.describe()["arguments"])
    again.check_same(found.describe())


@pytest.mark.parametrize("loader", ["table", "characters", "text8", "digits"])
def test_a_description_makes_the_set_again(tmp_path, loader):
    (tmp_path / "text8").write_bytes(text._TEXT8_START * 20)
    write_csv(tmp_path / "t.csv", RNG.integers(4, size=(30, 3)))
    made = {
        "table": lambda: data.table(tmp_path / "t.csv", seed=2, split=(20, 5, 5)),
        "characters": lambda: data.characters(tmp_path / "text8", 8, alphabet=None, name="n"),
        "text8": lambda: data.text8(tmp_path, 8, prefix=True),
        "digits": lambda: data.digits(5),
    }[loader]()
    description = made.describe()
    assert description["loader"] == loader
    again = getattr(data, loader)(**description["arguments"])
    assert again.describe() == description


@pytest.mark.parametrize("module", ["files", "formats", "images", "sources", "tables", "text"])
def test_loaders_import_what_is_heavy_only_when_it_is_used(module):
    tree = ast.parse(
        Path(importlib.import_module(f"vadd_pyro.data.{module}").__file__).read_text()
    )
    heavy = {"scipy", "sklearn", "pandas", "datasets", "transformers"}
    for node in tree.body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not heavy & {name.split(".")[0] for name in names}


class Cut:
    """A stream that ends in the middle of a training."""

    def __init__(self, stream):
        self.stream, self.fingerprint = stream, stream.fingerprint

    def __call__(self, batch_size):
        return self.stream(batch_size)

    def at(self, iteration, batch_size):
        if iteration == 4:
            raise KeyboardInterrupt
        return self.stream.at(iteration, batch_size)


def test_a_training_on_batches_that_was_interrupted_goes_on_with_the_rows_that_were_next(tmp_path):
    digit_set = data.digits(levels=2)
    process = digit_set.process()

    def trained(checkpoint, stream):
        torch.manual_seed(0)
        model = models.MDM(MLPDecoder(process, hidden_dim=8, num_layers=1))
        options = {"checkpoint": tmp_path / checkpoint, "checkpoint_every": 2, "resume": True}
        elbo = MaskedDiffusionELBO(process)
        fit(model, guides.NoLatent(), elbo, stream, 6, batch_size=8, progress=False, **options)
        return list(model.parameters())

    whole = trained("a.pt", digit_set.batches(seed=3))
    with pytest.raises(KeyboardInterrupt):
        trained("b.pt", Cut(digit_set.batches(seed=3)))
    resumed = trained("b.pt", digit_set.batches(seed=3))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    with pytest.raises(ValueError, match="belongs to another run"):
        trained("b.pt", digit_set.batches(seed=4))
