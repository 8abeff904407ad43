"""Every option of every command: what it refuses, and what happens to one that is given twice."""

import shutil
import sys

import pytest
import torch
import typer
from dataset_files import write_tree

from distruction import Posterior, UsageError, cli, forgetting, models, terminal

APP = typer.main.get_command(cli.app)
"""Made once: Typer would make all commands anew at each start, which takes longer than most of these tests' rest."""

COMMANDS = {
    name: [p for p in command.params if p.param_type_name == "option"]
    for name, command in APP.commands.items()
    if name != "verify"
}
"""Of each command, its options as they are declared. What `verify` is given is for tests/test_receipts.py."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of the digits with random weights, a posterior around it, and what is none of these."""
    folder = tmp_path_factory.mktemp("options")
    config = {"name": "vit-micro", "num_classes": 10, "in_chans": 1, "img_size": 8}
    torch.manual_seed(0)
    model = models.create(**config)
    models.save(model, folder / "model", {**config, "data": "digits"})
    Posterior.around(model, 0.05).save(folder / "posterior")
    (folder / "text").write_text("no = [model")
    (folder / "bytes").write_bytes(b"\x80\x04\xff\x00" * 9)
    (folder / "folder").mkdir()
    (folder / "empty.toml").write_text("")
    return folder


@pytest.fixture
def distruction(capsys, monkeypatch):
    """Runs the command line; gives its status, output and errors."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(cli, "app", APP)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["distruction", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return (stop.value.code, *capsys.readouterr())

    return run


NEEDED = {
    "train": ["--epochs", "1"],
    "plan": ["--model", "vit-micro", "--img-size", "8", "--device", "cpu"],
    "prepare": ["--model", "{files}/model", "--steps", "1"],
    "forget": ["--model", "{files}/model", "--posterior", "{files}/posterior", "--class", "3", "--steps", "1"],
    "evaluate": ["--model", "{files}/model", "--class", "3"],
    "attack": ["--model", "{files}/model", "--class", "3"],
    "demo": [],
    "bench": ["--preset", "digits"],
}
"""What a command needs beside the option that is tried."""

NOT_A_NUMBER = ["x", "1.5", "9" * 30]
NOT_A_COUNT = [*NOT_A_NUMBER, "-1", "0"]
NOT_POSITIVE = ["x", "nan", "inf", "-1", "0"]
NO_FILE = ["", "{files}/none", "{files}/folder", "{files}/bytes", "{files}/model/below", "\0"]
NO_PLACE = ["", "{files}/folder", "{files}/none/below", "{files}/model/below", "\0"]
NO_FOLDER = ["{files}/text", "{files}/model/below", "/proc/none", "\0"]
NO_NAME = ["", "nothing", "\u2003"]
NO_DEVICE = ["", "warp", "cpu:x", "cpu,"]

BAD = {
    "--data": ["{files}/none", "{files}/folder", "{files}/bytes", "\0"],
    "--dataset": ["nothing", "../..", "{files}/none", "\0"],
    "--model": NO_FILE,
    "--pretrained": ["{files}/none", "{files}/text", "{files}/folder", "\0"],
    "--posterior": NO_FILE,
    "--previous": NO_FILE,
    "--original": NO_FILE,
    "--retrained": NO_FILE,
    "--key": NO_FILE,
    "--weights": NO_FILE,
    "--classes": NO_FILE,
    "--records": NO_FILE,
    "--request": NO_NAME,
    "--target": NO_NAME,
    "--held-out": ["{files}/none", "{files}/folder", "{files}/bytes", "\0"],
    "--rehearse": [*NOT_A_NUMBER, "-1"],
    "--log-json": NO_PLACE,
    "--tensorboard": NO_FOLDER,
    "--wandb": ["", "\u2003"],
    "--method": NO_NAME,
    "--level": ["", "x", "nan", "inf", "-1", "0", "1"],
    "--grid": [*NO_FILE, "{files}/empty.toml"],
    "--out": NO_PLACE,
    "--posterior-out": NO_PLACE,
    "--receipt": NO_PLACE,
    "--report": ["{files}/none/below", "{files}/model/below", "\0"],
    "--classifier": NO_NAME,
    "--depth": NO_NAME,
    "--cosine-level": ["", "x", "nan", "inf", "-1", "1"],
    "--store": NO_FOLDER,
    "--checkpoint": NO_PLACE,
    "--checkpoint-seconds": ["", "x", "nan", "-1", "-inf"],
    "--checkpoint-steps": NOT_A_COUNT,
    "--class": NO_NAME,
    "--without-class": NO_NAME,
    "--objective": NO_NAME,
    "--backend": [*NO_NAME, "cuda"],
    "--device": NO_DEVICE,
    "--preset": NO_NAME,
    "--dtype": NO_NAME,
    "--prior-std": NO_NAME,
    "--prior-mean": [*NO_NAME, "log8"],
    "--img-size": NOT_A_COUNT,
    "--length": [*NOT_A_COUNT, "1"],
    "--in-chans": NOT_A_COUNT,
    "--num-classes": NOT_A_COUNT,
    "--batch-size": NOT_A_COUNT,
    "--steps": NOT_A_COUNT,
    "--epochs": NOT_A_COUNT,
    "--mc-samples": [*NOT_A_NUMBER, "-1"],
    "--crop": [*NOT_A_NUMBER, "-1"],
    "--workers": [*NOT_A_NUMBER, "-1"],
    "--threads": NOT_A_COUNT,
    "--seed": [*NOT_A_NUMBER, "-1"],
    "--lr": NOT_POSITIVE,
    "--std-init": NOT_POSITIVE,
    "--evidence": NOT_POSITIVE,
    "--kl-weight": ["", "x", "nan", "inf", "-1", "1.5"],
    "--data-per-step": NOT_POSITIVE,
    "--free": ["", "x", "nan", "inf", "-1"],
}
"""Values that no command can use."""


def cases(option):
    """Of each command that has the option, the option as declared there and the values to try."""
    for command, params in COMMANDS.items():
        for param in params:
            if param.opts[0] == option:
                yield command, param, NO_FOLDER if option == "--out" and command in ("demo", "bench") else BAD[option]


def test_every_option_is_tried():
    names = {p.opts[0] for params in COMMANDS.values() for p in params if not p.is_flag} - {"--help"}
    assert names == set(BAD)


@pytest.mark.parametrize("option", BAD)
def test_a_bad_value_is_refused_in_one_line(distruction, files, tmp_path, option):
    """In each command, but for what the parser refused of the same declaration (of one text) in another one."""
    parsed = set()
    for command, param, bad in cases(option):
        for value in bad:
            declared = (param.help, value)
            if declared not in parsed and refused(distruction, files, tmp_path, command, option, value):
                parsed.add(declared)


def refused(distruction, files, tmp_path, command, option, value):
    """Check one value; returns whether the parser has refused it."""

    def filled(text):
        return text.replace("{files}", str(files))

    given = dict(zip(NEEDED[command][::2], NEEDED[command][1::2], strict=True)) | {option: value}
    if any(p.opts[0] == "--out" for p in COMMANDS[command]):
        given.setdefault("--out", str(tmp_path / "out"))
    if command == "bench" and option == "--grid":
        del given["--preset"]
    words = [command, *(filled(word) for pair in given.items() for word in pair)]
    if any(p.opts[0] == "--progress" for p in COMMANDS[command]):
        words.append("--no-progress")
    before = sorted(files.rglob("*"))
    status, out, err = distruction(*words)
    assert status == 2, (words, out)
    assert "Traceback" not in err + out, words
    lines = [line for line in err.splitlines() if line and not line.startswith("note: ")]
    usage = lines[0].startswith("Usage: ")
    assert len(lines) == 1 or usage, (words, err)
    assert terminal.TRACEBACK not in err, words  # it was foreseen
    assert sorted(files.rglob("*")) == before, words
    return usage


def values():
    for command, params in COMMANDS.items():
        for param in params:
            if param.opts[0] != "--help" and not param.multiple:
                yield command, param


def test_an_option_of_one_value_is_given_once(distruction):
    """The last of several would silently count alone."""
    for command, param in values():
        twice = [param.opts[0], param.secondary_opts[0]] if param.is_flag and param.secondary_opts else None
        if param.is_flag and twice is None:
            continue  # the same wish twice
        words = [command, *(twice or [param.opts[0], "1", param.opts[0], "2"])]
        status, _, err = distruction(*words)
        assert status == 2, words
        assert "is given 2 times, but takes one value" in err, words


@pytest.mark.parametrize(
    ("command", "first", "second"),
    [
        ("forget", "--posterior", "--out"),
        ("forget", "--posterior", "--posterior-out"),
        ("forget", "--model", "--posterior-out"),
        ("forget", "--model", "--log-json"),
        ("forget", "--posterior", "--checkpoint"),
        ("forget", "--out", "--posterior-out"),
        ("forget", "--out", "--log-json"),
        ("forget", "--out", "--checkpoint"),
        ("forget", "--out", "--report"),
        ("forget", "--records", "--report"),
        ("prepare", "--model", "--out"),
        ("prepare", "--out", "--checkpoint"),
        ("prepare", "--weights", "--out"),
        ("attack", "--model", "--out"),
    ],
)
@pytest.mark.parametrize("spelling", ["same", "link"])
def test_a_file_has_one_purpose(distruction, files, tmp_path, command, first, second, spelling):
    """The one would be written over the other, and with --log-json appended to a model."""
    shared = tmp_path / "shared"
    kind = {"--model": "model", "--posterior": "posterior"}.get(first)
    if kind:
        shared.write_bytes((files / kind).read_bytes())
    again = shared
    if spelling == "link":
        again = tmp_path / "link"
        again.symlink_to(shared)
    given = {"--model": files / "model", "--out": tmp_path / "out", "--class": "3"}
    given |= {"--posterior": files / "posterior"} if command == "forget" else {}
    if command == "prepare":
        del given["--class"]
    given |= {first: shared, second: again}
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.exists()}
    words = [command, *(word for pair in given.items() for word in pair), "--overwrite"]
    status, _, err = distruction(*words, *(["--steps", "1"] if command != "attack" else []))
    assert status == 2
    assert f"{first} and {second} are one file, {again}: give each its own" in err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.exists()} == before


def test_a_model_may_be_replaced_by_what_is_left_of_it(distruction, files, tmp_path):
    model = tmp_path / "model"
    model.write_bytes((files / "model").read_bytes())
    words = ["forget", "--model", model, "--posterior", files / "posterior", "--class", "3", "--out", model]
    words += ["--posterior-out", tmp_path / "q", "--steps", "3", "--no-progress"]
    assert distruction(*words)[0] == 2
    assert distruction(*words, "--overwrite")[0] == 0
    assert model.read_bytes() != (files / "model").read_bytes()
    words[words.index("3")] = "8"
    assert distruction(*words, "--previous", tmp_path / "q", "--overwrite")[0] == 0
    assert [list(f["labels"]) for f in Posterior.load(tmp_path / "q").metadata["forgotten"]] == [["3"], ["8"]]


def test_several_classes_are_forgotten_together(distruction, files, tmp_path, monkeypatch):
    seen = {}

    def forget(model, prior, loader, **options):
        seen["labels"] = sorted({int(y) for _, labels in loader for y in labels})
        raise UsageError("stop")

    monkeypatch.setattr(forgetting, "forget", forget)
    words = ["forget", "--model", files / "model", "--posterior", files / "posterior", "--out", tmp_path / "o"]
    _, _, err = distruction(*words, "--class", "3", "--class", "8")
    assert (seen["labels"], err) == ([3, 8], "error: stop\n")
    _, _, err = distruction(*words, "--class", "3", "--class", "3")
    assert err == "error: name each class to forget once, not 3, 3\n"
    status, out, _ = distruction("evaluate", "--model", files / "model", "--class", "3", "--class", "8")
    assert (status, "class 3, 8" in out) == (0, True)


def test_an_error_that_nobody_foresaw_is_one_line(distruction, files, monkeypatch):
    def load(*_, **__):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(models, "load", load)
    words = ("evaluate", "--model", files / "model", "--class", "3")
    status, _, err = distruction(*words)
    assert (status, err) == (1, "error: RuntimeError: first (DISTRUCTION_TRACEBACK=1 shows where)\n")
    monkeypatch.setenv("DISTRUCTION_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["distruction", *map(str, words)])
    with pytest.raises(RuntimeError, match="second"):
        cli.main()


def test_commands_go_on_without_a_test_part(distruction, tmp_path):
    """What has no labelled test images can be trained on, prepared and forgotten, but not evaluated."""
    root = tmp_path / "data"
    write_tree(root, ["a", "b"], shape=(1, 8, 8), train=16, test=4)
    shutil.rmtree(root / "test")
    model, posterior = tmp_path / "m", tmp_path / "p"
    for command in (
        ("train", "--out", model, "--epochs", 1, "--no-progress"),
        ("prepare", "--model", model, "--out", posterior, "--steps", 1, "--no-progress"),
        ("forget", "--model", model, "--posterior", posterior, "--out", tmp_path / "u", "--class", "a", "--steps", 1,
         "--no-progress"),
    ):  # fmt: skip
        status, _, err = distruction(*command, "--data", root)
        assert status == 0, err
        assert all(line.startswith("note: ") for line in err.splitlines())
        assert ("no test images" in err) == (command[0] == "train")
    status, _, err = distruction("evaluate", "--model", model, "--class", "a", "--data", root)
    assert status == 2
    assert "labelled test images are needed here" in err
    # The labels of other classes would mean something else.
    (root / "train/b").rename(root / "train/c")
    status, _, err = distruction("forget", *("--model", model, "--posterior", posterior, "--out", tmp_path / "v"),
                                 *("--class", "a", "--data", root))  # fmt: skip
    assert status == 2
    assert "has folders that are no classes of the model: c; its classes are a, b" in err


def test_files_are_left_out_by_choice(distruction, tmp_path):
    write_tree(tmp_path, ["a", "b"], shape=(1, 8, 8), train=16, test=4)
    min((tmp_path / "train/a").iterdir()).write_bytes(b"x")
    words = ("train", "--out", tmp_path / "m", "--epochs", 1, "--no-progress", "--data", tmp_path)
    status, _, err = distruction(*words)
    assert (status, "--skip-unreadable" in err) == (2, True)
    status, _, err = distruction(*words, "--skip-unreadable")
    assert (status, "note: left out as unreadable: " in err) == (0, True)
