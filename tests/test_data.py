"""Readers return exactly what was written, and say what is wrong with what they cannot read."""

import gzip
from pathlib import Path

import dataset_files
import numpy as np
import pytest
import torch

from distruction import UsageError
from distruction.data import load, sets

SYSTEM = Path("/usr/share/datasets/fashion-mnist")


def assert_same(part, images, labels):
    """``images`` (N, channels, height, width) and ``labels`` are those of ``part``, in this order."""
    assert part.images.dtype == torch.uint8
    assert part.labels.dtype == torch.int64
    np.testing.assert_array_equal(part.images.numpy(), images)
    np.testing.assert_array_equal(part.labels.numpy(), labels)


# --- IDX -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "fashion-mnist", "FashionMNIST/raw", "usr/share/datasets/fashion-mnist"])
@pytest.mark.parametrize("zipped", [True, False])
def test_idx_round_trip(tmp_path, place, zipped):
    written = dataset_files.write_idx(tmp_path / place, zipped=zipped)
    for part, name in zip(load("fashion-mnist", tmp_path), ("train", "test"), strict=True):
        assert_same(part, written[name][0][:, None], written[name][1])
        assert part.classes[5] == "Sandal"
        assert len(part.classes) == 10


def test_batches_have_mean_zero_and_std_one(tmp_path):
    dataset_files.write_idx(tmp_path)
    train, _ = load("fashion-mnist", tmp_path)
    values = train[list(range(len(train)))][0].double()
    assert values.mean().item() == pytest.approx(0, abs=1e-6)
    assert values.std().item() == pytest.approx(1, abs=1e-6)


def test_moments_are_those_of_float64():
    images = torch.from_numpy(dataset_files.pixels(5000, (3, 4, 4), 0))
    mean, std = sets.moments(images)
    values = images.double().transpose(0, 1).flatten(1)
    assert mean == pytest.approx(values.mean(dim=1).tolist(), rel=1e-13)
    assert std == pytest.approx(values.std(dim=1).tolist(), rel=1e-13)


def truncate_zip(file):
    file.write_bytes(file.read_bytes()[:-40])


def flip_bit_of_zip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 8
    file.write_bytes(content)


def rezip(change):
    return lambda file: file.write_bytes(gzip.compress(change(gzip.decompress(file.read_bytes()))))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train-images-idx3-ubyte.gz", lambda f: f.unlink(), "has no train-images-idx3-ubyte"),
        ("train-images-idx3-ubyte.gz", truncate_zip, "is damaged"),
        ("train-images-idx3-ubyte.gz", flip_bit_of_zip, "is damaged"),
        ("train-images-idx3-ubyte.gz", lambda f: f.write_bytes(b"<html>"), "is damaged: Not a gzipped file"),
        ("t10k-labels-idx1-ubyte.gz", rezip(lambda c: c[:-1]), "promises 20 bytes, but 19 follow"),
        ("t10k-labels-idx1-ubyte.gz", rezip(lambda c: c + b"\0"), "promises 20 bytes, but 21 follow"),
        ("t10k-labels-idx1-ubyte.gz", rezip(lambda c: c[:6]), "is truncated: its header ends after 6 bytes"),
        ("t10k-labels-idx1-ubyte.gz", rezip(lambda c: b""), "starts with nothing"),
        ("t10k-labels-idx1-ubyte.gz", rezip(lambda c: b"\0\0\x0d\x01" + c[4:]), "starts with 00 00 0d 01"),
        ("t10k-labels-idx1-ubyte.gz", rezip(lambda c: c[:7] + b"\x13" + c[8:-1]), "do not belong together"),
        ("t10k-labels-idx1-ubyte.gz", rezip(lambda c: c[:-1] + b"\x0a"), "labels in .* run from 0 to 10"),
    ],
)
def test_damaged_idx(tmp_path, name, damage, message):
    dataset_files.write_idx(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(UsageError, match=message) as error:
        load("fashion-mnist", tmp_path)
    assert str(tmp_path) in str(error.value)


def test_missing_data_set_names_the_paths_and_the_package(tmp_path):
    with pytest.raises(UsageError, match="dataset-fashion-mnist") as error:
        load("fashion-mnist", tmp_path / "none")
    assert str(tmp_path / "none" / "FashionMNIST/raw") in str(error.value)
    with pytest.raises(UsageError, match="'mnist' is unknown; choose digits, fashion-mnist"):
        load("mnist", tmp_path)


@pytest.mark.skipif(not SYSTEM.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_debians_fashion_mnist():
    train, test = load("fashion-mnist")
    assert (train.labels.bincount() == 6000).all()
    assert (test.labels.bincount() == 1000).all()
    # The published first labels: ankle boot, T-shirt, T-shirt, dress.
    assert [train.classes[i] for i in train.labels[:4]] == ["Ankle boot", "T-shirt/top", "T-shirt/top", "Dress"]
