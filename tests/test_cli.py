"""The command line: the commands together, and what a user sees after a mistake."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
from dataset_files import write_cifar
from safetensors.torch import save_file

from distruction import Posterior, cli, models
from distruction.files import load_tensors, save_tensors
from distruction.posterior_file import FORMAT


def run(capsys, monkeypatch, *arguments):
    """Exit status, standard output and standard error of ``distruction arguments``."""
    monkeypatch.setattr(sys, "argv", ["distruction", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture
def distruction(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: run(capsys, monkeypatch, *arguments)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of the digits with random weights, and a posterior around it."""
    folder = tmp_path_factory.mktemp("cli")
    config = {"name": "vit-micro", "num_classes": 10, "in_chans": 1, "img_size": 8}
    torch.manual_seed(0)
    model = models.create(**config)
    models.save(model, folder / "model", {**config, "data": "digits"})
    Posterior.around(model, 0.05).save(folder / "posterior")
    return folder


def test_train_prepare_forget_evaluate(distruction, tmp_path):
    model, posterior, unlearned = tmp_path / "m", tmp_path / "p", tmp_path / "u"
    for command in (
        ("train", "--out", model, "--epochs", 1),
        ("prepare", "--model", model, "--out", posterior, "--steps", 3),
        (
            "forget",
            "--model",
            model,
            "--posterior",
            posterior,
            "--out",
            unlearned,
            "--class",
            3,
            "--steps",
            3,
            "--kl-weight",
            0.1,
        ),
    ):
        status, out, err = distruction(*command, "--no-progress")
        # Three steps are too few, and it may say so.
        assert (status, [line for line in err.splitlines() if not line.startswith("note: ")]) == (0, [])
        assert str(command[command.index("--out") + 1]) in out
    status, out, _ = distruction("evaluate", "--model", unlearned, "--class", 3)
    assert status == 0
    assert "D_r %" in out
    trained, forgotten = models.load(model)[0], models.load(unlearned)[0]
    prior = Posterior.load(posterior, model=trained)
    prior.check(trained, same_weights=True)
    assert not torch.equal(trained.head.weight, forgotten.head.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "p", "u"]


def test_one_request_after_another(distruction, files, tmp_path):
    common = ("--posterior", files / "posterior", "--steps", 3, "--no-progress")
    first, second = tmp_path / "q1", tmp_path / "q2"
    for command in (
        ("--model", files / "model", "--class", 3, "--out", tmp_path / "u1", "--posterior-out", first),
        ("--model", tmp_path / "u1", "--class", 8, "--out", tmp_path / "u2", "--previous", first,
         "--posterior-out", second),
    ):  # fmt: skip
        status, out, _ = distruction("forget", *command, *common)
        assert status == 0
        assert "is not reached: the 3 steps ended" in " ".join(out.split())
    requests = Posterior.load(second).metadata["forgotten"]
    assert [list(r["labels"]) for r in requests] == [["3"], ["8"]]
    status, _, err = distruction(
        "forget", "--model", files / "model", "--class", 0, "--out", tmp_path / "u", "--kl-weight", "much", *common
    )
    assert status != 0
    assert "not much, or 'auto'" in " ".join(err.split())


def test_a_compressed_posterior_takes_a_byte_per_parameter(distruction, files, tmp_path):
    arguments = ("--model", files / "model", "--steps", 2, "--checkpoint", tmp_path / "c", "--checkpoint-steps", 1)
    posterior, unlearned = tmp_path / "p", tmp_path / "u"
    status, out, _ = distruction(
        "prepare", *arguments, "--out", posterior, "--compress", "--release-gradients", "--no-progress"
    )
    assert status == 0
    assert "202,186 Gaussians" in out
    assert posterior.stat().st_size < 1.15 * 202_186
    status, _, _ = distruction(
        *("forget", *arguments, "--posterior", posterior, "--out", unlearned, "--class", 3, "--offload-prior"),
        *("--release-gradients", "--no-progress"),
    )
    assert status == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p", "u"]
    status, _, err = distruction(
        *("forget", "--model", unlearned, "--posterior", posterior, "--out", tmp_path / "v", "--class", 3)
    )
    assert status == 2
    assert "was prepared for other weights" in err


def test_a_compressed_posterior_serves_a_later_request(distruction, files, tmp_path):
    """With the model's file of preparation, which it needs for its means, or with the whole posterior's: the same."""
    whole, small = tmp_path / "p", tmp_path / "s"
    common = ("--model", files / "model", "--steps", 2, "--no-progress")
    for path, more in ((small, ["--compress"]), (whole, [])):
        assert distruction("prepare", *common, "--out", path, *more)[0] == 0

    def forget(*words):
        return distruction("forget", *words, "--steps", 3, "--no-progress")

    asked = ("--class", 8, "--previous", tmp_path / "q")
    first = ("--model", files / "model", "--class", 3, "--out", tmp_path / "u", "--posterior-out", tmp_path / "q")
    for posterior in (small, whole):
        status, _, err = forget("--posterior", posterior, *first, "--overwrite")
        assert status == 0, err
        again = ("--posterior", posterior, "--out", tmp_path / "a", "--overwrite", *asked)
        status, _, err = forget("--model", files / "model", *again)
        assert status == 0, err
        weights = models.load(tmp_path / "a")[0].state_dict()
        status, _, err = forget("--model", tmp_path / "u", *again)
        if posterior is small:
            assert (status, "load the model's checkpoint that preparation was given" in err) == (2, True)
    assert all(torch.equal(t, weights[n]) for n, t in models.load(tmp_path / "a")[0].state_dict().items())
    # A model of neither weights.
    other, config = models.load(files / "model")
    torch.nn.init.normal_(other.head.weight)
    models.save(other, tmp_path / "m", config)
    status, _, err = forget("--model", tmp_path / "m", "--posterior", whole, "--out", tmp_path / "d", *asked)
    assert status == 2
    assert "was prepared for other weights" in " ".join(err.split())


def test_plan(distruction, files):
    status, out, _ = distruction("plan", "--model", "vit_huge_patch14_224", "--batch-size", 1, "--device", "cpu")
    assert "632.0 M parameters" in out
    assert "prior std" in out
    assert ("Fits: " in out) == (status == 0)
    status, out, _ = distruction("plan", "--model", files / "model", "--device", "cuda", "--free", 0.001)
    assert status == 1
    assert "vit-micro, 0.2 M parameters" in out
    assert "Does not fit: " in out
    assert "a compressed prior (Posterior.compress): " in out
    status, out, _ = distruction("plan", "--model", "vit-micro", "--img-size", 8, "--free", 1)
    assert (status, "Fits: " in out) == (0, True)
    status, _, err = distruction("plan", "--model", files / "posterior")
    assert (status, "expected 'distruction-model-1'" in err) == (2, True)


def test_without_class_leaves_it_out(distruction, tmp_path):
    distruction("train", "--out", tmp_path / "m", "--epochs", 8, "--without-class", 3, "--no-progress")
    _, out, _ = distruction("evaluate", "--model", tmp_path / "m", "--class", 3)
    cells = next(line for line in out.splitlines() if line.startswith("│")).split("│")
    assert float(cells[2]) > 50
    assert float(cells[3]) == float(cells[4]) == 0


def test_the_data_set_is_found_and_remembered(distruction, tmp_path):
    """A fine class is forgotten by a model of CIFAR-20's coarse ones, made from pretrained weights of another size."""
    root, weights = tmp_path / "root", tmp_path / "w.safetensors"
    write_cifar(root, "cifar100", train=100, test=100)
    save_file(timm.create_model("test_vit").state_dict(), weights)
    model, posterior, unlearned = tmp_path / "m", tmp_path / "p", tmp_path / "u"
    vit = ("--model", "test_vit", "--pretrained", weights, "--img-size", 48)
    for command in (
        ("train", "--out", model, "--dataset", "cifar20", *vit, "--epochs", 1, "--crop", 4, "--flip"),
        ("prepare", "--model", model, "--out", posterior, "--steps", 2),
        (
            "forget",
            "--model",
            model,
            "--posterior",
            posterior,
            "--out",
            unlearned,
            "--class",
            "rocket",
            "--steps",
            2,
            "--kl-weight",
            0.1,
        ),
    ):
        status, _, err = distruction(*command, "--data", root, "--no-progress")
        assert (status, err) == (0, "")
    status, out, _ = distruction("evaluate", "--model", unlearned, "--class", "rocket", "--data", root)
    assert status == 0
    assert "cifar20, class rocket" in out
    network, config = models.load(unlearned)
    assert config["data"] == "cifar20"
    assert network.pos_embed.shape == (1, 10, 64)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 20)
    status, _, err = distruction("evaluate", "--model", unlearned, "--class", "rocket")
    assert status == 2
    assert "no cifar100 found" in err
    assert "cifar-100-python.tar.gz" in err
    # Without --dataset it is what the folder holds.
    status, _, err = distruction("train", "--out", tmp_path / "n", "--data", root, "--epochs", 1, "--no-progress")
    assert (status, err) == (0, "")
    assert models.load(tmp_path / "n")[1]["data"] == "cifar100"


def truncated(files, name):
    path = files / f"truncated-{name}"
    path.write_bytes((files / name).read_bytes()[:5000])
    return path


def of_another_model(files):
    path = files / "other-posterior"
    Posterior.around(torch.nn.Linear(2, 2), 0.1).save(path)
    return path


def of_other_weights(files):
    path = files / "other-weights"
    config = {"name": "vit-micro", "num_classes": 10, "in_chans": 1, "img_size": 8}
    Posterior.around(models.create(**config), 0.1).save(path)
    return path


def of_another_format(files):
    path = files / "foreign"
    save_file({"x": torch.zeros(1)}, path)
    return path


def with_bad_std(files):
    path = files / "bad-std"
    tensors, facts = load_tensors(files / "posterior", format=FORMAT)
    tensors["std.head.bias"][0] = 0.0
    save_tensors(path, tensors, format=FORMAT, facts=facts)
    return path


def with_a_flipped_bit(files):
    path = files / "flipped-bit"
    content = bytearray((files / "posterior").read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    return path


FORGET = {"--model": "model", "--posterior": "posterior", "--class": "3", "--steps": "2"}
PREPARE = {"--model": "model", "--steps": "2"}


@pytest.mark.parametrize(
    ("command", "change", "message"),
    [
        ("forget", {"--class": "11"}, "class '11' is unknown; the classes are 0, 1, 2"),
        ("forget", {"--dataset": "imagenet"}, "data set 'imagenet' is none of digits, "),
        ("forget", {"--model": "none"}, "no model file at"),
        ("forget", {"--model": lambda f: truncated(f, "model")}, "cannot be read as a model"),
        ("forget", {"--model": lambda f: f / "posterior"}, "has format 'distruction-posterior-1'"),
        ("forget", {"--posterior": "none"}, "no posterior file at"),
        ("forget", {"--posterior": lambda f: truncated(f, "posterior")}, "cannot be read as a posterior"),
        ("forget", {"--posterior": of_another_format}, "has format None, expected"),
        ("forget", {"--posterior": of_another_model}, "belongs to another model"),
        ("forget", {"--posterior": of_other_weights}, "prepared for other weights"),
        ("forget", {"--posterior": with_a_flipped_bit}, "flipped-bit is damaged: its checksum is wrong"),
        ("forget", {"--posterior": with_bad_std}, "head.bias: std must be > 0"),
        ("forget", {"--kl-weight": "1.5"}, "kl_weight (lambda) must be in [0, 1], not 1.5"),
        ("forget", {"--kl-weight": "-0.5"}, "kl_weight (lambda) must be in [0, 1], not -0.5"),
        ("forget", {"--steps": "0"}, "steps must be an integer >= 1, not 0"),
        ("forget", {"--objective": "hope"}, "objective 'hope' is unknown"),
        ("forget", {"--data-per-step": "0"}, "data_per_step must be > 0"),
        ("forget", {"--backend": "fortran"}, "fortran"),
        ("forget", {"--device": "warp:9"}, "device 'warp:9' cannot be used"),
        ("forget", {"--batch-size": "0"}, "--batch-size"),
        ("forget", {"--out": "model"}, "exists; choose another file or pass --overwrite"),
        ("forget", {"--out": "posterior"}, "--posterior and --out are one file"),
        ("forget", {"--out": "no/such/folder/file"}, "create it first"),
        ("prepare", {"--std-init": "0"}, "std_init must be > 0 and finite, not 0.0"),
        ("prepare", {"--std-init": "-0.1"}, "std_init must be > 0 and finite, not -0.1"),
        ("prepare", {"--evidence": "0"}, "evidence must be > 0 data points"),
        ("prepare", {"--mc-samples": "0"}, "--mc-samples"),
        ("prepare", {"--checkpoint-steps": "0"}, "--checkpoint-steps"),
        ("plan", {"--model": "vit-gigantic-typo"}, "model 'vit-gigantic-typo' is unknown"),
        ("plan", {"--model": "vit-micro", "--dtype": "int8"}, "dtype 'int8' is unknown; choose float32"),
        ("plan", {"--model": "vit-micro", "--prior-std": "int8"}, "prior_std='int8' is unknown"),
        ("plan", {"--model": "vit-micro", "--device": "warp"}, "device 'warp' cannot be used"),
        ("train", {"--model": "vit-gigantic-typo"}, "model 'vit-gigantic-typo' is unknown"),
        ("train", {"--without-class": "x"}, "class 'x' is unknown"),
        ("train", {"--lr": "1e30"}, "the loss is nan in epoch 1; lower lr"),
        ("demo", {"--class": "eleven"}, "class 'eleven' is unknown"),
        ("demo", {"--out": "model"}, "exists; choose another folder or pass --overwrite"),
        ("evaluate", {"--class": "x"}, "class 'x' is unknown"),
    ],
)
def test_bad_input(distruction, files, tmp_path, command, change, message):
    defaults = {"forget": FORGET, "prepare": PREPARE, "evaluate": {"--model": "model"}}.get(command, {})
    options = {**defaults, **change}
    if command not in ("evaluate", "plan"):
        options.setdefault("--out", tmp_path / "out")
    arguments = []
    for option, value in options.items():
        if callable(value):
            value = value(files)
        elif option in ("--posterior", "--out") or (option == "--model" and command not in ("train", "plan")):
            value = files / value
        arguments += [option, value]
    if command not in ("evaluate", "plan"):
        arguments.append("--no-progress")
    before = {p.name: p.read_bytes() for p in files.iterdir()}
    status, _, err = distruction(command, *arguments)
    assert status == 2
    assert message in err.replace("\n", " ")
    assert "Traceback" not in err
    assert {p.name: p.read_bytes() for p in files.iterdir()} == before
    assert list(tmp_path.iterdir()) == []


def test_overwrite_is_all_or_nothing(distruction, files, tmp_path):
    out = tmp_path / "out"
    out.write_text("precious")
    arguments = ("prepare", "--model", files / "model", "--out", out, "--steps", 1, "--no-progress", "--overwrite")
    status, _, _ = distruction(*arguments, "--std-init", 0)
    assert status == 2
    assert out.read_text() == "precious"
    status, _, _ = distruction(*arguments)
    assert status == 0
    assert len(Posterior.load(out))


def test_full_disk(distruction, files, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "out"
    out.write_text("precious")
    status, _, err = distruction(
        "prepare", "--model", files / "model", "--out", out, "--steps", 1, "--no-progress", "--overwrite"
    )
    assert status == 2
    assert "No space left on device" in err
    assert out.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [out]


def interrupt(arguments, when):
    """Send SIGINT to the command once ``when()`` holds; its exit status and standard error."""
    process = subprocess.Popen(
        [sys.executable, "-m", "distruction", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A background job of a shell is started with SIGINT ignored, and would pass that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not when():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, err


def test_ctrl_c_keeps_the_checkpoint(files, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    arguments = ["prepare", "--model", files / "model", "--out", tmp_path / "out", "--steps", 100_000]
    arguments += ["--checkpoint", checkpoint, "--checkpoint-seconds", 0]
    status, err = interrupt(arguments, checkpoint.exists)
    assert status == 130
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_ctrl_c_leaves_no_half_report(tmp_path):
    # The draft of the report folder tells that the demo is at work.
    status, err = interrupt(("demo", "--out", tmp_path / "out"), lambda: any(tmp_path.iterdir()))
    assert status == 130
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_help_teaches(distruction):
    status, out, _ = distruction("--help")
    assert status == 0
    for command in ("train", "plan", "prepare", "forget", "evaluate", "demo"):
        assert command in out
        status, text, _ = distruction(command, "--help")
        assert status == 0
        assert "--" in text


def test_report_folder_is_replaced_whole(tmp_path):
    from distruction import report

    out = tmp_path / "out"
    with report.folder(out, overwrite=False) as draft:
        report.write_json(draft / "metrics.json", {"a": 1})
    with pytest.raises(ZeroDivisionError), report.folder(out, overwrite=True) as draft:
        report.write_json(draft / "metrics.json", {"a": 1 / 0})
    assert json.loads((out / "metrics.json").read_text()) == {"a": 1}
    with report.folder(out, overwrite=True) as draft:
        report.write_json(draft / "metrics.json", {"a": 2})
    assert json.loads((out / "metrics.json").read_text()) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
