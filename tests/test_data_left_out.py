"""What a data set holds and a reader does not use is said; what it cannot use stops it, or is left out by choice."""

import io
import os
import shutil
import threading
import warnings

import numpy as np
import pytest
import torch
from dataset_files import write_cifar, write_idx, write_parquet, write_tree
from PIL import Image, ImageOps

from distruction import UsageError, data
from distruction.data import load
from distruction.data.raw import extensions
from distruction.errors import DataWarning


def notes(found):
    return "\n".join(str(w.message) for w in found)


def picture(path, format=None, size=(12, 12), **options):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format, **options)


# --- folders -------------------------------------------------------------------------------------


def test_what_pillow_writes_and_reads_is_read(tmp_path):
    """Every ending under which Pillow itself opens what it saved as a picture."""
    write_tree(tmp_path, ["a", "b"], shape=(3, 12, 12), train=4, test=2)
    readable = set()
    for number, (ending, format) in enumerate(sorted(Image.registered_extensions().items())):
        path = tmp_path / "train/a" / f"x{number:03}{ending.upper() if number % 2 else ending}"
        try:
            picture(path, format)
            with Image.open(path) as image:
                assert image.size == (12, 12)
                image.convert("RGB")
            readable.add(ending)
        except Exception:
            path.unlink(missing_ok=True)
    assert {".jfif", ".jpe", ".jpg", ".png", ".bmp", ".webp", ".tif", ".ppm", ".gif"} <= readable
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        train, _ = load(".", tmp_path)
    assert len(train) == 4 + len(readable)


def test_endings_of_films_and_containers_are_not_images():
    assert not {".mpg", ".h5", ".hdf", ".grib", ".pdf"} & extensions()


def test_what_is_ignored_is_counted_and_named(tmp_path):
    written = write_tree(tmp_path, ["a", "b"], train=6, test=4)
    for name in ("notes.txt", "more.txt", "THUMBS.DB", "README", ".DS_Store", "._00000.png"):
        (tmp_path / "train/a" / name).write_text("x")
    (tmp_path / "train/loose.png").write_bytes((tmp_path / "train/a").joinpath("._00000.png").read_bytes())
    hidden = tmp_path / "train/.ipynb_checkpoints"
    shutil.copytree(tmp_path / "train/b", hidden)
    shutil.copytree(tmp_path / "train/b", tmp_path / "test/.ipynb_checkpoints")
    shutil.copytree(tmp_path / "train/b", tmp_path / "train/b/.cache")
    with pytest.warns(DataWarning) as found:
        train, test = load(".", tmp_path)
    assert train.classes == ("a", "b")
    np.testing.assert_array_equal(train.images.numpy(), written["train"][0])
    np.testing.assert_array_equal(test.labels.numpy(), written["test"][1])
    text = notes(found)
    for part in ("2 .txt", "1 .db", "1 without extension", "train: not read", "test: not read"):
        assert part in text
    assert ".ipynb_checkpoints (hidden)" in text
    first = next(line for line in text.splitlines() if "train: not read" in line)
    # Four plain files and two hidden ones in a, a loose image, a hidden folder here and one in b.
    kinds = first.split("not read: ")[1].rsplit(" (", 1)[0]
    assert sum(int(kind.split()[0]) for kind in kinds.split(", ")) == 9


def test_hidden_folders_alone_are_no_classes(tmp_path):
    (tmp_path / "train/.git").mkdir(parents=True)
    with pytest.raises(UsageError):
        load(".", tmp_path)


def test_a_class_of_unknown_files_says_what_it_holds(tmp_path):
    write_tree(tmp_path, ["a", "b"])
    for path in (tmp_path / "train/a").iterdir():
        path.rename(path.with_suffix(".heicx"))
    with pytest.raises(UsageError, match=r"no valid file for the classes a.*\d+ \.heicx"):
        load(".", tmp_path)


@pytest.mark.parametrize("form", ["tree", "parquet"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"<html>"])
def test_unreadable_images_stop_or_are_left_out(tmp_path, form, damage):
    if form == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        written = write_parquet(tmp_path, ("image", "label"), ["a", "b"], shards=1)
        path = next(tmp_path.glob("train*"))
        table = pq.read_table(path)
        rows = table["image"].to_pylist()
        rows[3]["bytes"] = damage(rows[3]["bytes"])
        name = f"{path}, row 3"
        pq.write_table(table.set_column(0, "image", pa.array(rows, table.schema.field("image").type)), path)
    else:
        written = write_tree(tmp_path, ["a", "b"])
        path = [p for c in "ab" for p in sorted((tmp_path / "train" / c).iterdir())][3]
        path.write_bytes(damage(path.read_bytes()))
        name = str(path)
    with pytest.raises(UsageError, match="--skip-unreadable") as error:
        load(".", tmp_path)
    assert name in str(error.value)
    with pytest.warns(DataWarning, match="left out as unreadable") as found:
        train, test = load(".", tmp_path, skip_unreadable=True)
    assert name in notes(found)
    images, labels = written["train"]
    np.testing.assert_array_equal(train.images.numpy(), np.delete(images, 3, axis=0))
    np.testing.assert_array_equal(train.labels.numpy(), np.delete(labels, 3))
    np.testing.assert_array_equal(test.images.numpy(), written["test"][0])


def test_a_class_of_unreadable_images_is_refused(tmp_path):
    write_tree(tmp_path, ["a", "b"])
    for path in (tmp_path / "train/b").iterdir():
        path.write_bytes(b"x")
    with pytest.raises(UsageError, match="No readable image is left of b"):
        load(".", tmp_path, skip_unreadable=True)


def test_a_link_to_a_folder_above_is_not_read_again(tmp_path):
    """torchvision reads it until the path is too long: 41 times the class."""
    write_tree(tmp_path, ["a", "b"], train=6, test=4)
    (tmp_path / "train/a/loop").symlink_to(tmp_path / "train/a")
    (tmp_path / "train/b/all").symlink_to(tmp_path)
    elsewhere = tmp_path / "more"
    elsewhere.mkdir()
    picture(elsewhere / "x.png", size=(32, 32))
    (tmp_path / "train/a/linked").symlink_to(elsewhere)
    with pytest.warns(DataWarning, match=r"2 without extension \(a/loop, b/all\)"):
        train, _ = load(".", tmp_path)
    assert len(train) == 7


def test_a_pipe_is_no_image(tmp_path):
    """It would be waited for without end."""
    write_tree(tmp_path, ["a", "b"], train=6, test=4)
    path = tmp_path / "train/a/x.png"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.open("wb").close())  # whoever reads it need not wait here
    writer.start()
    try:
        with pytest.raises(UsageError, match=r"x\.png is no regular file.*--skip-unreadable"):
            load(".", tmp_path)
    finally:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        writer.join()


@pytest.mark.parametrize("target", ["none", "train/a/x.png"])
def test_links_to_nothing_are_named(tmp_path, target):
    write_tree(tmp_path, ["a", "b"], train=6, test=4)
    (tmp_path / "train/a/x.png").symlink_to(tmp_path / target)
    with pytest.raises(UsageError, match=r"x\.png.*--skip-unreadable"):
        load(".", tmp_path)
    with pytest.warns(DataWarning, match=r"left out as unreadable: .*x\.png"):
        assert len(load(".", tmp_path, skip_unreadable=True)[0]) == 6


def test_names_that_are_no_text(tmp_path):
    write_tree(tmp_path, ["a", "b"], train=6, test=4)
    os.rename(tmp_path / "train/a", os.fsencode(tmp_path / "train") + b"/\xff\xfe")
    with pytest.raises(UsageError, match=r"class folder '.udcff.udcfe' .*rename it"):
        load(".", tmp_path)


def test_a_message_is_the_same_each_time(tmp_path):
    write_tree(tmp_path, ["a", "b"], train=6, test=4)
    (tmp_path / "train/a/x.png").write_bytes(b"no image")
    with pytest.raises(UsageError) as error:
        load(".", tmp_path)
    assert " at 0x" not in str(error.value)


# --- orientation ---------------------------------------------------------------------------------


def oriented(orientation, size=(20, 12), format="PNG"):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    picture(file, format, size, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["tree", "parquet"])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_images_are_turned_upright(tmp_path, orientation, form, format):
    """As Pillow's own ``exif_transpose`` does, in every form of the same file."""
    content = oriented(orientation, (12, 12), format)
    if form == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        for part in ("train", "test"):
            pq.write_table(pa.table({"image": pa.array([content]), "label": [0]}), tmp_path / f"{part}.parquet")
    else:
        for part in ("train", "test"):
            (tmp_path / part / "a").mkdir(parents=True)
            (tmp_path / part / f"a/x.{format.lower()}").write_bytes(content)
    train, _ = load(".", tmp_path)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(train.images[0].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_a_turned_image_is_cropped_as_it_is_seen(tmp_path):
    """Lying files of one upright size are of one size; damaged EXIF data turns nothing."""
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "a/x.png").write_bytes(oriented(6))
        picture(tmp_path / part / "a/y.png", size=(12, 20))
        (tmp_path / part / "a/z.jpg").write_bytes(oriented(1, format="JPEG").replace(b"MM\x00*", b"XX\x00*"))
    with pytest.raises(UsageError, match="not of one square size but 12 x 20, 20 x 12;"):
        load(".", tmp_path)
    train, _ = load(".", tmp_path, side=6)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "train/a/x.png")).convert("RGB")
    expected = ImageOps.fit(upright, (6, 6), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(train.images[0].permute(1, 2, 0).numpy(), np.asarray(expected))


# --- test parts ----------------------------------------------------------------------------------


def unlabelled_parquet(root, value):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    write_parquet(root, ("image", "label"), ["a", "b"])
    path = next(root.glob("test*"))
    table = pq.read_table(path)
    kind = pa.null() if value == "null" else pa.int64()
    labels = pa.array([None if value in ("null", None) else value] * len(table), kind)
    pq.write_table(table.set_column(1, "label", labels), path)


def loose_test_images(root):
    write_tree(root, ["a", "b"])
    for path in list((root / "test").glob("*/*")):
        path.rename(root / "test" / path.name)
    for name in "ab":
        (root / "test" / name).rmdir()


def without_idx_test(root):
    write_idx(root)
    for path in root.glob("t10k*"):
        path.unlink()


def without_cifar_test(root):
    write_cifar(root, "cifar10")
    (root / "cifar-10-batches-py/test_batch").unlink()


def without_parquet_test(root):
    pytest.importorskip("pyarrow")
    write_parquet(root, ("image", "label"), ["a", "b"])
    next(root.glob("test*")).unlink()


def without_test_folder(root):
    write_tree(root, ["a", "b"])
    shutil.rmtree(root / "test")


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (lambda r: unlabelled_parquet(r, -1), ".", "all missing or -1"),
        (lambda r: unlabelled_parquet(r, None), ".", "all missing or -1"),
        (lambda r: unlabelled_parquet(r, "null"), ".", "all missing or -1"),
        (without_parquet_test, ".", "none whose name or folder starts with test"),
        (loose_test_images, ".", "none of test/, val/"),
        (without_test_folder, ".", "none of test/, val/"),
        (without_idx_test, "fashion-mnist", "no t10k-images-idx3-ubyte"),
        (lambda r: write_idx(r, test=0), "fashion-mnist", "has no images"),
        (without_cifar_test, "cifar10", "has no test_batch"),
    ],
)
def test_a_test_part_without_labels_is_needed_or_not(tmp_path, make, name, reason):
    make(tmp_path)
    with pytest.raises(UsageError, match="labelled test images are needed here") as error:
        load(name, tmp_path)
    assert reason in str(error.value)
    with pytest.warns(DataWarning, match="no test images") as found:
        train, test = load(name, tmp_path, need_test=False)
    assert reason in notes(found)
    assert len(train) == (100 if name == "cifar10" else 40)
    assert len(test) == 0
    assert len(train.labels.unique()) > 1
    assert test.to("cpu")[[]][0].shape == (0, *train.images.shape[1:])


def test_labelled_validation_serves_for_an_unlabelled_test_part(tmp_path):
    """As the hub has many data sets: the test part's labels are kept secret."""
    unlabelled_parquet(tmp_path, -1)
    write_parquet(tmp_path / "made", ("image", "label"), ["a", "b"], test=12)
    shutil.move(next((tmp_path / "made").glob("test*")), tmp_path / "validation-00000-of-00001.parquet")
    shutil.rmtree(tmp_path / "made")
    assert [len(part) for part in load(".", tmp_path)] == [40, 12]


def test_a_training_part_without_labels_is_refused(tmp_path):
    unlabelled_parquet(tmp_path, -1)
    for path in tmp_path.glob("train*"):
        path.unlink()
    next(tmp_path.glob("test*")).rename(tmp_path / "train.parquet")
    with pytest.raises(UsageError, match="have no labels in the training part"):
        load(".", tmp_path, need_test=False)


def test_parquet_files_of_no_part_are_named(tmp_path):
    pytest.importorskip("pyarrow")
    write_parquet(tmp_path, ("image", "label"), ["a", "b"])
    shutil.copy(next(tmp_path.glob("train*")), tmp_path / "extra-00000.parquet")
    with pytest.warns(DataWarning, match=r"not read: 1 .parquet \(extra-00000.parquet\)"):
        load(".", tmp_path)


def test_partly_labelled_parts_are_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    write_parquet(tmp_path, ("image", "label"), ["a", "b"])
    first = min(tmp_path.glob("train*"))
    table = pq.read_table(first)
    pq.write_table(table.set_column(1, "label", pa.array([-1] * len(table))), first)
    with pytest.raises(UsageError, match="has no labels, unlike other files of its part"):
        load(".", tmp_path)


# --- classes -------------------------------------------------------------------------------------


def test_several_classes_are_forgotten_together():
    train, _ = load("digits")
    forget, retain = data.forget_split(train, ["3", "8"])
    assert set(forget.labels.tolist()) == {3, 8}
    assert set(retain.labels.tolist()) == set(range(10)) - {3, 8}
    assert len(forget) + len(retain) == len(train)
    assert torch.equal(data.forget_split(train, "3")[0].labels, train.labels[train.labels == 3])
    for wrong in (["3", "3"], []):
        with pytest.raises(UsageError, match="name each class to forget once"):
            data.forget_split(train, wrong)
