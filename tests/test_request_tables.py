"""Requests in tables: Parquet files and folders of save_to_disk, written by the datasets library itself."""

import io
import shutil
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from distruction import cli
from distruction.data import encoded, inputs, tables
from distruction.data.inputs import Pixels
from distruction.data.requests import in_folder, in_table
from distruction.errors import MissingPackage, UsageError
from distruction.receipts import selected

datasets = pytest.importorskip("datasets", reason="datasets (the extra 'datasets') is not installed")
pq = pytest.importorskip("pyarrow.parquet")

CLASSES = ("ant", "bee", "cat")
NAMES = ["cat", "ant", "bee"]
"""The same in the tables' own order."""
PIXELS = Pixels(1, 8, (70.0,), (80.0,))


def png(image):
    file = io.BytesIO()
    Image.fromarray((image * 15).astype("uint8")).save(file, "PNG")
    return file.getvalue()


def rows(count=6, start=0):
    """Encoded digits 0, 1, 2, their classes' names and what they are called, class by class."""
    bunch = load_digits()
    chosen = [(png(bunch.images[bunch.target == c][start + i]), n, f"{n}-{i}.png")
              for c, n in enumerate(CLASSES) for i in range(count)]  # fmt: skip
    return tuple(zip(*chosen, strict=True))


def table(count=6, start=0, label="names", image="image"):
    """A data set of the datasets library."""
    contents, names, files = rows(count, start)
    kinds = {
        "names": (datasets.ClassLabel(names=NAMES), [NAMES.index(n) for n in names]),
        "numbers": (datasets.Value("int64"), [CLASSES.index(n) for n in names]),
        "strings": (datasets.Value("string"), list(names)),
    }
    features = {image: datasets.Image()}
    columns = {image: [{"bytes": c, "path": f} for c, f in zip(contents, files, strict=True)]}
    if label is not None:
        features["label"], columns["label"] = kinds[label]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def to_parquet(folder, name="train-00000-of-00001.parquet", **how):
    folder.mkdir(parents=True, exist_ok=True)
    table(**how).to_parquet(folder / name, batch_size=4)
    return folder


def to_folders(root, count=6):
    for content, name, file in zip(*rows(count), strict=True):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / file).write_bytes(content)
    return root


def saved(place, found):
    found.save_to_disk(place)
    return place


FORMS = {
    "parquet": lambda h: to_parquet(h / "t"),
    "a parquet file of no part": lambda h: to_parquet(h / "t", "wanted.parquet") / "wanted.parquet",
    "parquet in parts": lambda h: (to_parquet(h / "t/data", "test-0.parquet", start=20), to_parquet(h / "t/data"))[0],
    "another column": lambda h: to_parquet(h / "t", image="picture"),
    "numbers": lambda h: to_parquet(h / "t", label="numbers"),
    "strings": lambda h: to_parquet(h / "t", label="strings"),
    "save_to_disk": lambda h: saved(h / "t", table()),
    "save_to_disk in parts": lambda h: saved(
        h / "t", datasets.DatasetDict({"train": table(), "test": table(start=20)})
    ),
    "save_to_disk of a choice": lambda h: saved(h / "t", table(8).filter(lambda row: row["image"] is not None).select(
        [i for i in range(24) if i % 8 < 6])),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    datasets.disable_progress_bars()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("streamed", [False, True])
def test_a_table_is_the_folder_of_its_images(tmp_path, monkeypatch, form, streamed):
    """Labels by name whatever their numbers there, and the same batches whether kept or read by workers."""
    place = FORMS[form](tmp_path)
    if streamed:
        monkeypatch.setattr(encoded, "IN_MEMORY", 100)
        monkeypatch.setattr(inputs, "IN_MEMORY", 100)
    found = in_table(tables.open_table(place, "train"), CLASSES)
    contents, names, _ = rows()
    assert [CLASSES[label] for label in found.labels] == list(names)
    assert [found.encoded[i][1]() for i in range(len(found.labels))] == list(contents)
    data = found.read(PIXELS)
    assert isinstance(data, inputs.ImageFiles) == streamed
    (x, y), *others = inputs.batches(data, batch_size=18, workers=2 if streamed else 0)
    assert others == []
    expected = torch.stack([PIXELS(Image.open(io.BytesIO(c))) for c in contents])
    assert torch.equal(x, expected)
    assert y.tolist() == [CLASSES.index(n) for n in names]


def test_what_was_copied_out_of_a_table_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded, "IN_MEMORY", 100)
    monkeypatch.setattr(encoded.tempfile, "tempdir", str(tmp_path))
    found = in_table(tables.open_table(to_parquet(tmp_path / "t"), "train"), CLASSES)
    assert len(list(tmp_path.glob("distruction-*"))) == 1
    del found
    assert list(tmp_path.glob("distruction-*")) == []


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model that knows the classes, and its posterior."""
    folder = tmp_path_factory.mktemp("tables")
    to_folders(folder / "photos/train")
    patch = pytest.MonkeyPatch()
    for words in (
        ["train", "--data", folder / "photos", "--out", folder / "model", "--epochs", 1],
        ["prepare", "--model", folder / "model", "--data", folder / "photos", "--out", folder / "posterior",
         "--steps", 2],
    ):  # fmt: skip
        patch.setattr(sys, "argv", ["distruction", *map(str, words), "--no-progress"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
    patch.undo()
    return folder


@pytest.fixture
def distruction(made, capsys, monkeypatch):
    """Runs ``forget`` or another command on the model; gives its status, output and errors."""
    monkeypatch.setenv("COLUMNS", "300")
    common = ("--model", made / "model")

    def run(command, *arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["distruction", command, *map(str, (*common, *arguments))])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return (stop.value.code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("form", ["parquet", "save_to_disk"])
def test_a_request_in_a_table_ends_with_the_bits_of_one_in_folders(distruction, made, tmp_path, form):
    """Preparation too; and records by their rows, by what the table calls them, and several classes."""
    place = FORMS[form](tmp_path)
    quick = ("--no-progress", "--workers", 0)
    assert distruction("prepare", "--data", place, "--out", tmp_path / "p", "--steps", 2, *quick)[0] == 0
    first, second = load_file(made / "posterior"), load_file(tmp_path / "p")
    assert all(torch.equal(first[n], second[n]) for n in first)
    (tmp_path / "rows.csv").write_text("row,label\n0,ant\n7,bee\n13,cat\n")
    (tmp_path / "names.txt").write_text("ant-0.png\nbee-1.png\ncat-1.png\n")
    (tmp_path / "paths.txt").write_text("train/ant/ant-0.png\ntrain/bee/bee-1.png\ntrain/cat/cat-1.png\n")
    words = ("--posterior", tmp_path / "p", "--steps", 2, "--kl-weight", 0.1, *quick)
    classes = ("--class", "ant", "--class", "cat")
    paths = ("--records", tmp_path / "paths.txt")
    cases = (
        (classes, classes, "12 records of 2 classes: 6 ant, 6 cat"),
        (("--records", tmp_path / "rows.csv"), paths, "3 records of 3 classes: 1 ant, "),
        (("--records", tmp_path / "names.txt"), paths, "3 records of 3 classes: 1 ant, "),
    )
    for number, (here, there, told) in enumerate(cases):
        outs = [tmp_path / f"{number}-{side}" for side in ("table", "folder")]
        for out, data, which in zip(outs, (place, made / "photos"), (here, there), strict=True):
            status, said, err = distruction("forget", "--data", data, "--out", out, *which, *words)
            assert (status, err) == (0, "")
            assert told in said
        first, second = map(load_file, outs)
        assert all(torch.equal(first[n], second[n]) for n in first)


def test_a_receipt_of_a_table_is_that_of_the_files(tmp_path):
    """A record is its bytes and its class, wherever it lies."""
    in_files = selected(in_folder(to_folders(tmp_path / "photos"), CLASSES))
    for form in ("parquet", "save_to_disk"):
        shutil.rmtree(tmp_path / "t", ignore_errors=True)
        assert selected(in_table(tables.open_table(FORMS[form](tmp_path), "train"), CLASSES)) == in_files


def test_parts_are_read_as_their_names_say(tmp_path):
    for form in ("parquet in parts", "save_to_disk in parts"):
        place = FORMS[form](tmp_path / form)
        train, test = (in_table(tables.open_table(place, part), CLASSES) for part in ("train", "test"))
        assert [test.encoded[i][1]() for i in range(18)] == list(rows(start=20)[0])
        assert train.encoded != test.encoded
    for form in ("a parquet file of no part", "save_to_disk"):
        place = FORMS[form](tmp_path / form)
        train, test = (in_table(tables.open_table(place, part), CLASSES) for part in ("train", "test"))
        assert train.encoded == test.encoded
    alone = saved(tmp_path / "alone", datasets.DatasetDict({"train": table()}))
    for place in (alone, to_parquet(tmp_path / "one")):
        with pytest.raises(UsageError, match=r"has .*train.*, but no labelled part whose name starts with test"):
            tables.open_table(place, "test")


def test_evaluate_reads_both_parts(distruction, tmp_path):
    place = FORMS["save_to_disk in parts"](tmp_path)
    status, out, _ = distruction("evaluate", "--data", place, "--class", "ant", "--workers", 0)
    assert (status, "MIA %" in out) == (0, True)
    place = FORMS["a parquet file of no part"](tmp_path / "one")
    status, out, _ = distruction("evaluate", "--data", place, "--class", "ant", "--workers", 0)
    assert (status, "MIA %" in out) == (0, False)


def _csv(folder, text):
    (folder / "list.csv").write_text(text)
    return folder / "list.csv"


WRONG = {
    "a class that the model lacks": (
        lambda h: (FORMS["parquet"](h), ("ant", "bee"), {}),
        r"t, part train, has labels that are no classes of the model: cat; its classes are ant, bee",
    ),
    "a number that the model lacks": (
        lambda h: (FORMS["numbers"](h), ("ant", "bee"), {}),
        r"has labels that are no classes of the model: 2; its classes are ant, bee",
    ),
    "an unknown class": (
        lambda h: (FORMS["parquet"](h), CLASSES, {"wanted": ["eel"]}),
        r"class 'eel' is unknown; the model's classes are ant, bee, cat",
    ),
    "a class without rows": (
        lambda h: (FORMS["parquet"](h), (*CLASSES, "owl"), {"wanted": ["owl"]}),
        r"has no rows of owl; it has ant, bee, cat",
    ),
    "no labels": (
        lambda h: (to_parquet(h / "t", label=None), CLASSES, {}),
        r"has no labels: name the one class of its images by --class \(classes=\); the model's classes are ant, bee",
    ),
    "a row too many": (
        lambda h: (FORMS["save_to_disk"](h), CLASSES, {"records": _csv(h, "row\n18\n")}),
        r"list.csv names row 18, but .*t has the rows 0 to 17",
    ),
    "a name that is not there": (
        lambda h: (FORMS["save_to_disk"](h), CLASSES, {"records": _csv(h, "path\nx.png\n")}),
        r"list.csv names x.png, but .*t calls no image so: give the numbers of rows",
    ),
    "two labels": (
        lambda h: (FORMS["parquet"](h), CLASSES, {"records": _csv(h, "row,label\n0,bee\n")}),
        r"list.csv calls 0 bee, but .*t, part train, calls it ant",
    ),
    "one row in two ways": (
        lambda h: (FORMS["parquet"](h), CLASSES, {"records": _csv(h, "path\n0\nant-0.png\n")}),
        r"list.csv names row 0 of .* twice",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_names_both_sides(tmp_path, case):
    make, message = WRONG[case]
    place, classes, more = make(tmp_path)
    with pytest.raises(UsageError, match=message):
        in_table(tables.open_table(place, "train"), classes, **more)


def test_images_of_one_class_without_labels(tmp_path):
    place = to_parquet(tmp_path, label=None, count=1)
    found = in_table(tables.open_table(place, "train"), CLASSES, wanted=["cat"])
    assert found.labels == (2, 2, 2)


def test_damaged_tables(tmp_path):
    path = to_parquet(tmp_path / "t") / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UsageError, match=r"train-00000-of-00001.parquet is damaged"):
        tables.open_table(tmp_path / "t", "train")
    place = FORMS["save_to_disk"](tmp_path / "s")
    next(place.glob("*.arrow")).unlink()
    with pytest.raises(UsageError, match=r"cannot be read as a folder of save_to_disk"):
        tables.open_table(place, "train")


@pytest.mark.parametrize(("form", "package", "extra"), [
    ("parquet", "pyarrow", "parquet"),
    ("save_to_disk", "datasets", "datasets"),
])  # fmt: skip
def test_without_its_package_the_error_names_the_extra(tmp_path, monkeypatch, form, package, extra):
    place = FORMS[form](tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackage, match=rf"needs {package}, .*pip install 'distruction\[{extra}\]'"):
        tables.open_table(place, "train")
