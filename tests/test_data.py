"""Readers return exactly what was written, and say what is wrong with what they cannot read."""

import builtins
import gzip
import os
import pickle
import resource
import shutil
import tarfile
from pathlib import Path
from typing import ClassVar

import dataset_files
import numpy as np
import pytest
import torch
from dataset_files import write_cifar, write_idx, write_parquet, write_tree
from PIL import Image
from torchvision import datasets as peers

from distruction import UsageError, scenarios
from distruction.data import detect, forget_split, load, names, sets
from distruction.data.images import Images
from distruction.errors import MissingPackage

SYSTEM = Path("/usr/share/datasets/fashion-mnist")


def assert_same(loaded, written):
    """Pixels and labels are those that were written, in this order."""
    for part, (images, labels) in zip(loaded, (written["train"], written["test"]), strict=True):
        assert part.images.dtype == torch.uint8
        assert part.labels.dtype == torch.int64
        np.testing.assert_array_equal(part.images.numpy(), images)
        np.testing.assert_array_equal(part.labels.numpy(), labels)


# --- IDX -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "fashion-mnist", "FashionMNIST/raw", "usr/share/datasets/fashion-mnist"])
@pytest.mark.parametrize("zipped", [True, False])
def test_idx_round_trip(tmp_path, place, zipped):
    written = write_idx(tmp_path / place, zipped=zipped)
    loaded = load("fashion-mnist", tmp_path)
    assert_same(loaded, written)
    assert loaded[0].classes == loaded[1].classes == names.FASHION_MNIST
    assert detect(tmp_path) == "fashion-mnist"


def test_idx_is_read_as_torchvision_does(tmp_path):
    write_idx(tmp_path / "FashionMNIST/raw", zipped=False)
    for part, train in zip(load("fashion-mnist", tmp_path), (True, False), strict=True):
        peer = peers.FashionMNIST(tmp_path, train=train)
        assert torch.equal(part.images[:, 0], peer.data)
        assert torch.equal(part.labels, peer.targets)
        # Its own names differ in nothing but "Dress".
        assert list(part.classes) == peer.classes


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
    write_idx(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(UsageError, match=message) as error:
        load("fashion-mnist", tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.skipif(not SYSTEM.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_debians_fashion_mnist():
    train, test = load("fashion-mnist")
    assert (train.labels.bincount() == 6000).all()
    assert (test.labels.bincount() == 1000).all()
    # The published first labels: ankle boot, T-shirt, T-shirt, dress.
    assert [train.classes[i] for i in train.labels[:4]] == ["Ankle boot", "T-shirt/top", "T-shirt/top", "Dress"]


# --- CIFAR ---------------------------------------------------------------------------------------


def test_official_numbers():
    # Protocol of Foster, Schoepf, Brintrup 2024: the forgotten classes and their numbers.
    numbers = {"rocket": 69, "mushroom": 51, "baby": 2, "lamp": 40, "sea": 71}
    assert {name: names.CIFAR100.index(name) for name in numbers} == numbers
    assert len(set(names.CIFAR100)) == 100
    groups = [sorted(names.CIFAR100.index(c) for c in fine) for fine in names.CIFAR20.values()]
    assert groups == dataset_files.COARSE


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_round_trip(tmp_path, name, archive):
    written = write_cifar(tmp_path, name, archive=archive)
    loaded = load(name, tmp_path)
    assert_same(loaded, written)
    assert loaded[0].classes == {"cifar10": names.CIFAR10, "cifar100": names.CIFAR100}[name]
    assert detect(tmp_path) == name
    (inside,) = tmp_path.iterdir()
    # The folder or the archive itself is as good as the folder that it is in.
    assert_same(load(name, inside), written)
    assert detect(inside) == name


@pytest.mark.parametrize(("name", "base"), [("cifar10", peers.CIFAR10), ("cifar100", peers.CIFAR100)])
def test_cifar_is_read_as_torchvision_does(tmp_path, name, base):
    write_cifar(tmp_path, name)

    class Peer(base):
        """Without the published files' checksums."""

        train_list: ClassVar = [(file, None) for file, _ in base.train_list]
        test_list: ClassVar = [(file, None) for file, _ in base.test_list]
        meta: ClassVar = {**base.meta, "md5": None}

    for part, train in zip(load(name, tmp_path), (True, False), strict=True):
        peer = Peer(tmp_path, train=train)
        np.testing.assert_array_equal(part.images.permute(0, 2, 3, 1).numpy(), peer.data)
        assert part.labels.tolist() == peer.targets
        assert list(part.classes) == peer.classes


def test_cifar20_has_coarse_labels_and_fine_ones(tmp_path):
    written = write_cifar(tmp_path, "cifar100", train=300, test=100)
    train, test = load("cifar20", tmp_path)
    coarse = {part: (images, dataset_files.coarse_of(labels)) for part, (images, labels) in written.items()}
    assert_same((train, test), coarse)
    assert train.classes == tuple(names.CIFAR20)
    assert train.fine_classes == names.CIFAR100
    np.testing.assert_array_equal(train.fine.numpy(), written["train"][1])
    split = scenarios.sub_class(train, test, "rocket")
    assert (train.fine[split.indices] == 69).all()
    assert len(split.indices) == 3
    assert split.forget.labels.unique().tolist() == [19]
    assert len(split.measured_forget) == 1
    assert len(split.measured_retain) == 99
    # A class of either level can be left out.
    forget, retain = forget_split(train, "rocket")
    assert torch.equal(forget.images, split.forget.images)
    assert torch.equal(retain.fine, split.retain.fine)
    assert len(forget_split(train, "vehicles_2")[0]) == 15
    with pytest.raises(UsageError, match="'rockets' is unknown"):
        forget_split(train, "rockets")


def python3_pickle(path):
    """The same content as today's Python and NumPy pickle it in protocol 2."""
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes(), encoding="bytes"), protocol=2))


def test_cifar_pickled_anew(tmp_path):
    written = write_cifar(tmp_path, "cifar100")
    for path in (tmp_path / "cifar-100-python").iterdir():
        python3_pickle(path)
    assert_same(load("cifar100", tmp_path), written)


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (lambda mark: Call(os.system, f"touch {mark}"), "posix.system"),
        (lambda mark: Call(builtins.eval, f"open({str(mark)!r}, 'w')"), "eval"),
        (lambda mark: Call(builtins.getattr, Path(mark), "touch"), "getattr"),
        (lambda mark: {"data": Call(np.fromfile, str(mark))}, "fromfile"),
        (
            lambda mark: {"data": np.array([Call(os.system, f"touch {mark}")], dtype=object)},
            "posix.system|instead of u1",
        ),
        (lambda mark: {"data": np.zeros((2, 3072), np.float32)}, "an array of type 'f4' instead of u1"),
        (lambda mark: {"data": Call(np.ndarray, (1 << 40,))}, "takes no arguments"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_run_nothing(tmp_path, make, refused, protocol):
    write_cifar(tmp_path, "cifar100")
    mark = tmp_path / "mark"
    (tmp_path / "cifar-100-python/train").write_bytes(pickle.dumps(make(mark), protocol))
    with pytest.raises(UsageError, match=refused):
        load("cifar100", tmp_path)
    assert not mark.exists()


def test_dotted_names_are_refused(tmp_path):
    write_cifar(tmp_path, "cifar100")
    content = b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93."
    (tmp_path / "cifar-100-python/train").write_bytes(content)
    with pytest.raises(UsageError, match=r"asks for numpy\.ndarray\.__class__"):
        load("cifar100", tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        # The memo's entry 2**31 - 1; a bytearray of 2**40 bytes; a list in itself; a string that never ends.
        b"\x80\x02Nr\xff\xff\xff\x7f.",
        b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00.",
        b"\x80\x02}U\x04data]q\x00h\x00as.",
        b"\x80\x02T\xff\xff\xff\x7fabc",
    ],
)
def test_hostile_pickles_cost_nothing(tmp_path, content):
    write_cifar(tmp_path, "cifar100")
    (tmp_path / "cifar-100-python/test").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match=r"damaged|not a dictionary|not a uint8 array"):
        load("cifar100", tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_mutated_pickles_are_read_or_refused(tmp_path):
    write_cifar(tmp_path, "cifar100", train=12, test=6)
    path = tmp_path / "cifar-100-python/train"
    whole = path.read_bytes()
    # What is not pixels: the opcodes before and behind them.
    pixels = whole.index(dataset_files.cifar_files("cifar100", train=12, test=6)[2]["train"][0].tobytes())
    places = [i for i in range(len(whole)) if not pixels <= i < pixels + 12 * 3072]
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        content = bytearray(whole)
        for place in rng.choice(places, rng.integers(1, 4)):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        try:
            train, _ = load("cifar100", tmp_path)
        except UsageError:
            refused += 1
        else:
            assert train.images.shape[1:] == (3, 32, 32)
            assert len(train.images) == len(train.labels)
            assert train.labels.max() < 100
    assert refused > 50


def edit(change):
    """Rewrite a batch after ``change``."""

    def rewrite(path):
        content = pickle.loads(path.read_bytes(), encoding="bytes")
        change(content)
        path.write_bytes(dataset_files.python2_pickle(content))

    return rewrite


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("test", lambda p: p.unlink(), "has no test; get cifar-100-python.tar.gz again"),
        ("test", lambda p: p.write_bytes(p.read_bytes()[:9000]), "test is damaged"),
        ("test", lambda p: p.write_bytes(b""), "test is damaged"),
        ("test", lambda p: p.write_bytes(b"<!DOCTYPE html>"), "test is damaged"),
        ("test", lambda p: p.write_bytes(pickle.dumps([1])), "holds a list, not a dictionary"),
        ("test", edit(lambda c: c.pop(b"data")), "data is not a uint8 array"),
        ("test", edit(lambda c: c.update({b"data": c[b"data"][:, :3000]})), "data is not a uint8 array"),
        ("test", edit(lambda c: c[b"fine_labels"].pop()), "fine_labels is not a list of 50 integers"),
        ("test", edit(lambda c: c.pop(b"fine_labels")), "fine_labels is not a list of 50 integers"),
        ("test", edit(lambda c: c[b"coarse_labels"].reverse()), "coarse_labels do not belong to fine_labels"),
        ("meta", edit(lambda c: c[b"fine_label_names"].reverse()), "meta has other fine_label_names"),
        ("meta", edit(lambda c: c.clear()), "meta has other fine_label_names"),
    ],
)
def test_damaged_cifar(tmp_path, file, damage, message):
    write_cifar(tmp_path, "cifar100")
    damage(tmp_path / "cifar-100-python" / file)
    with pytest.raises(UsageError, match=message) as error:
        load("cifar100", tmp_path)
    assert str(tmp_path / "cifar-100-python") in str(error.value)


def test_cifar_labels_out_of_range(tmp_path):
    write_cifar(tmp_path, "cifar10")
    edit(lambda c: c[b"labels"].__setitem__(0, 10))(tmp_path / "cifar-10-batches-py/data_batch_3")
    with pytest.raises(UsageError, match=r"labels in .* run from 0 to 10, but there are 10 classes"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_truncated_archive(tmp_path, keep):
    write_cifar(tmp_path, "cifar10", archive=True)
    path = tmp_path / "cifar-10-python.tar.gz"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(UsageError, match=r"cifar-10-python.tar.gz.* is damaged"):
        load("cifar10", tmp_path)


def test_flipped_bits_of_an_archive(tmp_path):
    """gzip's checksum finds what the pickles do not."""
    write_cifar(tmp_path, "cifar10", archive=True)
    path = tmp_path / "cifar-10-python.tar.gz"
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(content), 20):
        path.write_bytes(content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :])
        # A bit of gzip's header (time, name) changes nothing.
        if position >= 10:
            with pytest.raises(UsageError, match=r"damaged|has no"):
                load("cifar10", tmp_path)


def test_archive_members_outside_are_not_read(tmp_path):
    """A link in the archive to a file of the machine stays unread."""
    write_cifar(tmp_path, "cifar10")
    (tmp_path / "secret").write_bytes((tmp_path / "cifar-10-batches-py/test_batch").read_bytes())
    root = tmp_path / "archived"
    root.mkdir()
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
        for file in sorted((tmp_path / "cifar-10-batches-py").iterdir()):
            if file.name != "test_batch":
                archive.add(file, f"cifar-10-batches-py/{file.name}")
        link = tarfile.TarInfo("cifar-10-batches-py/test_batch")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
        archive.addfile(link)
    with pytest.raises(UsageError, match="has no test_batch"):
        load("cifar10", root)


# --- ImageFolder ---------------------------------------------------------------------------------


@pytest.mark.parametrize("test_name", ["test", "val"])
@pytest.mark.parametrize("shape", [(3, 9, 9), (1, 12, 12)])
def test_tree_round_trip(tmp_path, shape, test_name):
    written = write_tree(tmp_path / "flowers", ["aster", "daisy", "iris"], shape=shape, test_name=test_name)
    for name, root in ((".", tmp_path / "flowers"), ("flowers", tmp_path)):
        loaded = load(name, root)
        assert_same(loaded, written)
        assert loaded[0].classes == ("aster", "daisy", "iris")
    assert detect(tmp_path / "flowers") == "."


def test_tree_is_read_as_torchvision_does(tmp_path):
    write_tree(tmp_path, ["b", "A", "10", "9"])
    for part, name in zip(load(".", tmp_path), ("train", "test"), strict=True):
        peer = peers.ImageFolder(tmp_path / name)
        assert list(part.classes) == peer.classes
        assert part.labels.tolist() == peer.targets
        for image, (expected, _) in zip(part.images, peer, strict=True):
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize("folders", [names.CIFAR100, [str(i) for i in range(100)], [f"{i:03}" for i in range(100)]])
def test_published_sets_as_trees(tmp_path, folders):
    """Labels are the official numbers, whatever the order of the folders."""
    written = write_tree(tmp_path, list(folders), shape=(3, 8, 8), train=200, test=100)
    assert_same(load("cifar100", tmp_path), written)
    train, _ = load("cifar20", tmp_path)
    assert train.labels.tolist() == dataset_files.coarse_of(written["train"][1]).tolist()


def test_fashion_as_tree(tmp_path):
    folders = [n.replace("/", "_").replace(" ", "-").lower() for n in names.FASHION_MNIST]
    written = write_tree(tmp_path, folders, shape=(1, 28, 28))
    assert_same(load("fashion-mnist", tmp_path), written)


def test_images_of_several_sizes_are_cropped_and_resized(tmp_path):
    write_tree(tmp_path, ["a", "b"], shape=(3, 20, 20), train=4, test=2)
    path = min((tmp_path / "train/a").iterdir())
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))
    wide.save(path)
    with pytest.raises(UsageError, match=r"not of one square size but 20 x 20, 40 x 20; pass .*img_size"):
        load(".", tmp_path)
    train, test = load(".", tmp_path, side=10)
    assert train.images.shape == (4, 3, 10, 10)
    assert test.images.shape == (2, 3, 10, 10)
    expected = wide.resize((10, 10), Image.Resampling.BICUBIC, box=(10, 0, 30, 20))
    np.testing.assert_array_equal(train.images[0].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_one_size_is_kept_whatever_side(tmp_path):
    written = write_tree(tmp_path, ["a", "b"], shape=(3, 20, 20))
    assert_same(load(".", tmp_path, side=10), written)


def test_modes_of_images(tmp_path):
    write_tree(tmp_path, ["a", "b"], shape=(1, 6, 6), train=4, test=2)
    first, second = sorted((tmp_path / "train/a").iterdir())
    grey = np.asarray(Image.open(first))
    Image.open(second).convert("P").save(second)
    train, _ = load(".", tmp_path)
    # One image with colours makes all of them have three channels.
    assert train.images.shape == (4, 3, 6, 6)
    np.testing.assert_array_equal(train.images[0].numpy(), np.broadcast_to(grey, (3, 6, 6)))
    Image.fromarray(np.zeros((6, 6), np.uint16)).save(second)
    with pytest.raises(UsageError, match="has pixels of mode I;16; convert it to 8 bits"):
        load(".", tmp_path)


def test_memory_is_checked_before_it_is_taken(tmp_path, monkeypatch):
    write_tree(tmp_path, ["a", "b"], shape=(3, 20, 20), train=4, test=2)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 4096}.get)
    with pytest.raises(UsageError, match=r"the images need 0.0 GiB of memory"):
        load(".", tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: shutil.rmtree(r / "test"), "has train/, but none of test/, val/"),
        (lambda r: (r / "test/c").mkdir(), "has classes that .*train lacks: c"),
        (lambda r: (r / "train/c").mkdir(), "Found no valid file for the classes c"),
        (lambda r: next((r / "train/a").iterdir()).write_bytes(b"GIF"), "is no image, or is damaged"),
        (lambda r: cut(next((r / "train/a").iterdir()), 0.7), "is no image, or is damaged"),
        (lambda r: cut(next((r / "test/b").iterdir()), 0.05), "is no image, or is damaged"),
    ],
)
def test_damaged_tree(tmp_path, damage, message):
    write_tree(tmp_path, ["a", "b"])
    damage(tmp_path)
    with pytest.raises(UsageError, match=message) as error:
        load(".", tmp_path)
    assert str(tmp_path) in str(error.value)


def cut(path, share):
    """Keep the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


# --- Parquet -------------------------------------------------------------------------------------


@pytest.fixture
def pyarrow():
    return pytest.importorskip("pyarrow", reason="pyarrow (the extra 'parquet') is not installed")


@pytest.mark.usefixtures("pyarrow")
@pytest.mark.parametrize("place", ["data", "plain_text", "."])
def test_parquet_round_trip(tmp_path, place):
    written = write_parquet(tmp_path / place, ["img", "label"], names.CIFAR10, shards=3)
    for name in ("cifar10", "."):
        loaded = load(name, tmp_path)
        assert_same(loaded, written)
        assert loaded[0].classes == names.CIFAR10
    assert detect(tmp_path) == "."


@pytest.mark.usefixtures("pyarrow")
def test_parquet_of_cifar100_as_the_hub_has_it(tmp_path):
    hub = [{"crab": "cra"}.get(n, n) for n in names.CIFAR100]
    columns = ["img", "fine_label", "coarse_label"]
    written = write_parquet(tmp_path / "cifar100", columns, hub, train=200, test=100)
    train, test = load("cifar100", tmp_path)
    assert_same((train, test), written)
    assert train.classes == names.CIFAR100
    assert load("cifar20", tmp_path)[0].labels.tolist() == dataset_files.coarse_of(written["train"][1]).tolist()
    with pytest.raises(UsageError, match="is not cifar10: it has classes named apple, aquarium_fish"):
        load("cifar10", tmp_path / "cifar100")


@pytest.mark.usefixtures("pyarrow")
def test_parquet_without_names_has_numbers(tmp_path):
    written = write_parquet(tmp_path, ["image", "label"], names.FASHION_MNIST, shape=(1, 28, 28), metadata=False)
    assert_same(load("fashion-mnist", tmp_path), written)
    train, _ = load(".", tmp_path)
    assert train.classes == tuple("0123456789")


def rewritten(change):
    """Rewrite a Parquet file after ``change`` of its table."""

    def rewrite(path):
        import pyarrow.parquet as pq

        pq.write_table(change(pq.read_table(path)), path)

    return rewrite


def with_column(name, values):
    def change(table):
        import pyarrow as pa

        return table.set_column(table.column_names.index(name), name, pa.array(values(table[name].to_pylist())))

    return rewritten(change)


@pytest.mark.usefixtures("pyarrow")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-100]), "is damaged"),
        (lambda p: p.write_bytes(b""), "is damaged"),
        (lambda p: p.write_bytes(b"PAR1" + bytes(100) + b"PAR1"), "is damaged"),
        (rewritten(lambda t: t.drop_columns(["label"])), "has no column label or labels or fine_label; it has image"),
        (rewritten(lambda t: t.drop_columns(["image"])), "has no column img or image; it has label"),
        (with_column("label", lambda v: list(map(str, v))), "column label holds string, not integer"),
        (with_column("label", lambda v: [None, *v[1:]]), "row 0: no image bytes or no label"),
        (with_column("image", lambda v: [{"bytes": None, "path": "x.png"}] * len(v)), "row 0: no image bytes"),
        (with_column("image", lambda v: [{"bytes": b"no"}, *v[1:]]), "row 0 is no image, or is damaged"),
        (lambda p: p.unlink(), "none whose name or folder starts with test"),
    ],
)
def test_damaged_parquet(tmp_path, damage, message):
    write_parquet(tmp_path, ["image", "label"], ["a", "b"])
    damage(tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(UsageError, match=message) as error:
        load(".", tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.usefixtures("pyarrow")
def test_parquet_without_rows(tmp_path):
    write_parquet(tmp_path, ["image", "label"], ["a", "b"], train=0, test=0)
    with pytest.raises(UsageError, match=r"the Parquet files in .* have no rows"):
        load(".", tmp_path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(
        MissingPackage,
        match=r"train\.parquet needs pyarrow, which is not installed: pip install 'distruction\[parquet\]'",
    ):
        load(".", tmp_path)


# --- what is there, and what is not --------------------------------------------------------------


def test_missing_data_sets_name_the_paths_and_the_remedy(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match="Install Debian's package dataset-fashion-mnist") as error:
        load("fashion-mnist", tmp_path)
    for place in ("fashion-mnist", "FashionMNIST/raw", "usr/share/datasets/fashion-mnist"):
        assert str(tmp_path / place) in str(error.value)
    assert "holds notes.txt" in str(error.value)
    with pytest.raises(UsageError, match=r"none does not exist.* Get cifar-10-python.tar.gz") as error:
        load("cifar10", tmp_path / "none")
    assert str(tmp_path / "none/cifar10") in str(error.value)
    with pytest.raises(UsageError, match=r"no cifar100 found; tried no folder\. .*pass its folder by --data"):
        load("cifar20")
    with pytest.raises(UsageError, match=r"'mnist' is none of digits, fashion-mnist, .*mnist does not exist"):
        load("mnist", tmp_path)


def test_detect_needs_one_data_set(tmp_path):
    assert detect(None) == "digits"
    with pytest.raises(UsageError, match=r"no data set in .* holds nothing"):
        detect(tmp_path)
    write_cifar(tmp_path, "cifar10")
    write_cifar(tmp_path, "cifar100", archive=True)
    with pytest.raises(UsageError, match="several data sets; choose one of cifar10, cifar100 by --dataset"):
        detect(tmp_path)
    assert {len(load(n, tmp_path)[0].classes) for n in ("cifar10", "cifar20", "cifar100")} == {10, 20, 100}


def test_empty_part(tmp_path):
    write_idx(tmp_path, test=0)
    with pytest.raises(UsageError, match=r"the test part in .* has no images"):
        load("fashion-mnist", tmp_path)


# --- batches -------------------------------------------------------------------------------------


def test_batches_have_mean_zero_and_std_one(tmp_path):
    write_cifar(tmp_path, "cifar10")
    train, _ = load("cifar10", tmp_path)
    images, labels = train[list(range(len(train)))]
    assert torch.equal(labels, train.labels)
    values = images.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(values.mean(dim=1), torch.zeros(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(values.std(dim=1), torch.ones(3).double(), atol=1e-6, rtol=0)


def test_batches_are_made_on_the_device():
    train, _ = load("digits")
    images, labels = train.to("meta")[[0, 1]]
    assert images.device.type == labels.device.type == "meta"
    assert images.dtype == torch.float32
    assert train.images.device.type == "cpu"


def test_moments_are_those_of_float64():
    images = torch.randint(256, (5000, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = sets.moments(images)
    values = images.double().transpose(0, 1).flatten(1)
    assert mean == pytest.approx(values.mean(dim=1).tolist(), rel=1e-13)
    assert std == pytest.approx(values.std(dim=1).tolist(), rel=1e-13)


def test_a_constant_channel_becomes_zero_and_no_nan():
    images = torch.randint(256, (9, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 1] = 7
    for some in (images, images[:1, :, :1, :1]):
        mean, std = sets.moments(some)
        batch, _ = Images(some, torch.zeros(len(some), dtype=torch.int64), ("a",), mean, std)[[0]]
        assert (batch[:, 1] == 0).all()
        assert batch.isfinite().all()
