"""The scripts in ``examples/``, run as their first lines say, with small models, and one process per file."""

import argparse
import ast
import os
import runpy
import shlex
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import timm.optim
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config
from torch import nn

import distruction
from distruction import Posterior, UsageError, cli, models
from distruction.data.inputs import Pixels
from distruction.sources import open_model

EXAMPLES = Path(__file__).parents[1] / "examples"
CLASSES = {"bird": (200, 40, 40), "cat": (40, 200, 40), "dog": (40, 40, 200)}
"""Noisy images of one colour each."""
SMALL = {
    "vit_base_patch16_224": "test_vit",
    "vit_large_patch16_224": "test_vit",
    "vit_huge_patch14_224": "test_vit",
    "data_per_step=50000": "data_per_step=24",
}


def commands(script):
    """The commands that a script's first lines name, in words, made small and quick."""
    doc = ast.get_docstring(ast.parse((EXAMPLES / script).read_text()), clean=False)
    found = [shlex.split(line) for line in doc.splitlines() if line.startswith(("    python ", "    torchrun "))]
    assert found
    return [[SMALL.get(w, w) for w in words] for words in found]


@pytest.fixture
def here(folder, monkeypatch):
    """In the folder of images and models."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return folder


@pytest.fixture
def run(here, monkeypatch, capsys):
    """Runs ``python examples/SCRIPT ...`` in this process, which has imported everything; gives its output."""

    def run(words):
        assert words[0] == "python"
        script = str(EXAMPLES.parent / words[1])
        monkeypatch.setattr(sys, "argv", [script, *words[2:]])
        monkeypatch.setattr(sys, "path", list(sys.path))
        capsys.readouterr()
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out

    return run


def launch(words, folder):
    """Run a command in processes of its own."""
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    torchrun = ["-m", "torch.distributed.run", "--master-port", port] if words[0] == "torchrun" else []
    command = [sys.executable, *torchrun, *words[1:script], str(EXAMPLES.parent / words[script]), *words[script + 1 :]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fit(model, transform, folder, steps, lr):
    """Train until every training image is known."""
    paths = sorted(folder.glob("photos/train/*/*.png"))
    x = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
    y = torch.tensor([list(CLASSES).index(path.parent.name) for path in paths])
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model.eval()(x)
        logits = getattr(output, "logits", output)
        nn.functional.cross_entropy(logits, y).backward()
        optimizer.step()
    assert (logits.argmax(dim=-1) == y).all()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``photos/{train,val}/CLASS/*.png``, ``to_forget/dog/*.png``, ``classes.txt``, a trained ``vit.safetensors``."""
    folder = tmp_path_factory.mktemp("examples")
    g = torch.Generator().manual_seed(0)
    for part, count in (("photos/train", 8), ("photos/val", 4)):
        for name, colour in CLASSES.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.tensor(colour) + torch.randint(-40, 41, (48, 64, 3), generator=g)
                Image.fromarray(pixels.byte().numpy()).save(folder / part / name / f"{i}.png")
    (folder / "to_forget").mkdir()
    (folder / "to_forget" / "dog").symlink_to(folder / "photos/train/dog")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=len(CLASSES))
    fit(model, create_transform(**resolve_data_config(model=model)), folder, steps=20, lr=1e-3)
    save_file(model.state_dict(), folder / "vit.safetensors")
    return folder


# --- in Python ------------------------------------------------------------------------------------------


def test_any_model_of_class_folders(run, here, monkeypatch):
    """Prepared with three classes, forgotten with the folder of one."""
    ours = {"name": "vit-micro", "num_classes": 3, "in_chans": 3, "img_size": 16}
    taken = Pixels(3, 16, (110.0,) * 3, (80.0,) * 3)
    torch.manual_seed(0)
    model = fit(models.create(**ours), taken, here, steps=25, lr=3e-3)
    models.save(model, here / "my-vit", {**ours, "data": ".", "classes": list(CLASSES), "images": taken.facts()})
    prepare, forget = commands("any_model.py")
    # From a narrow std a few steps are enough for a few images.
    monkeypatch.setattr(distruction, "prepare", partial(distruction.prepare, std_init=0.02))
    monkeypatch.setattr(distruction, "forget", partial(distruction.forget, kl_weight=0.1))
    assert "24 records of 3 classes: 8 bird, 8 cat, 8 dog" in run([*prepare, "--steps", "20"])
    assert "8 records of 1 class: 8 dog" in run([*forget, "--steps", "30"])
    source = open_model(here / "my-vit-forgotten")
    x, y = (data := source.select("photos/val").read(source.inputs))[list(range(len(data)))]
    predicted = source.network.eval()(x).argmax(dim=-1)
    assert (predicted == y)[y != 2].all()
    assert (predicted != 2).all()


@pytest.mark.parametrize("command", ["prepare", "forget"])
def test_shards_on_two_processes(run, here, command):
    """The whole set is one batch, whose order does not matter: one process without shards does the same."""
    sharded = next(words for words in commands("sharded_vit.py") if ("--out" in words) == (command == "forget"))
    sharded += ["--steps", "10" if command == "prepare" else "20"]  # BGD lets rounding grow with each step
    if command == "prepare":
        # Gauss-Newton's signs go by an example's place in the batch.
        sharded = [*sharded, "--method", "bgd", "--std-init", "0.02"]
    alone = ["python", *sharded[3:]]
    if command == "forget":
        model = timm.create_model("test_vit", num_classes=3, checkpoint_path=str(here / "vit.safetensors"))
        Posterior.around(model, 0.02).save(here / "posterior.safetensors")
    launch(sharded, here)
    if command == "prepare":
        found = Posterior.load(here / "posterior.safetensors")
        run(alone)
        expected = Posterior.load(here / "posterior.safetensors")
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)
    else:
        found = load_file(here / "forgotten.safetensors")
        run(alone)
        expected = load_file(here / "forgotten.safetensors")
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# --- timm's train.py ------------------------------------------------------------------------------------


def arguments_of_a_run(**options):
    """Of train.py's arguments those that a run's folder is read by, with its defaults."""
    names = (
        "num_classes",
        "in_chans",
        "gp",
        "data",
        "img_size",
        "input_size",
        "mean",
        "std",
        "interpolation",
        "crop_pct",
    )
    return argparse.Namespace(**{
        **dict.fromkeys(names), "model": "test_vit", "model_kwargs": {}, "dataset": "", "class_map": "",
        "data_dir": "photos", "train_split": "train", "val_split": "validation", "opt": "adamw", "opt_kwargs": {},
        "opt_eps": None, "opt_betas": None, "momentum": 0.9, "weight_decay": 2e-5, "lr": 0.1, **options,
    })  # fmt: skip


TRAIN_SCRIPT = """
import argparse, os, timm, torch, yaml
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ParseKwargs
from distruction.data.inputs import batches
from distruction.sources import open_model

parser = argparse.ArgumentParser()
for name in ("data-dir", "model", "output", "experiment", "opt"):
    parser.add_argument("--" + name)
for name in ("lr", "weight-decay"):
    parser.add_argument("--" + name, type=float)
for name in ("num-classes", "epochs"):
    parser.add_argument("--" + name, type=int)
parser.add_argument("--pretrained", action="store_true")
parser.add_argument("--opt-kwargs", nargs="*", default={}, action=ParseKwargs)
args = argparse.Namespace(**{**DEFAULTS, **vars(parser.parse_args())})
model = timm.create_model(args.model, num_classes=args.num_classes, checkpoint_path="vit.safetensors")
optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
saver = CheckpointSaver(model, optimizer, args, checkpoint_dir=os.path.join(args.output, args.experiment))
scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=args.epochs)
source = open_model(args.model, weights="vit.safetensors", classes=tuple(CLASSES))
data = source.select("photos/train").read(source.inputs)
with open(os.path.join(saver.checkpoint_dir, "args.yaml"), "w") as f:
    yaml.safe_dump(vars(args), f)
for epoch in range(epochs):
    model.train()
    optimizer.zero_grad()
    for x, y in batches(data, batch_size=8, shuffle=True):
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    scheduler.step(epoch + 1)
saver.save_checkpoint(epoch, metric=0.0)
"""


def test_timms_train_script_with_bgd(run, here, monkeypatch):
    """A script that does what train.py does with its optimizer; then the posterior from its checkpoint."""
    head = f"CLASSES, DEFAULTS = {list(CLASSES)}, {vars(arguments_of_a_run())}\n"
    (here / "train.py").write_text(head + TRAIN_SCRIPT)
    (train,) = commands("timm_train_bgd.py")
    folder = here / "output/train/my-bgd"
    folder.mkdir(parents=True)
    before = load_file(here / "vit.safetensors")
    run(train)

    (extract,) = commands("timm_extract.py")
    run(extract)
    means = load_file(here / "means.safetensors")
    model = timm.create_model("test_vit", num_classes=3, checkpoint_path=str(here / "means.safetensors"))
    posterior = Posterior.load(here / "posterior.safetensors", model=model)  # refuses other means
    assert posterior.metadata["serving"]["classes"] == list(CLASSES)
    held = torch.load(folder / "last.pth.tar", weights_only=False)
    order = [id(p) for g in timm.optim.param_groups_weight_decay(model, 0.0) for p in g["params"]]
    for name, p in model.named_parameters():
        state = held["optimizer"]["state"][order.index(id(p))]
        assert torch.equal(state["mean"], means[name])
        assert not torch.equal(means[name], before[name])
        assert not torch.equal(held["state_dict"][name], means[name])  # a sample
        torch.testing.assert_close(posterior.stds[name], state["std"], rtol=0.01, atol=0)
        assert (state["std"] < 0.02).any()

    common = ["--model", "output/train/my-bgd", "--weights", "means.safetensors", "--data", "photos"]
    more = ["--class", "dog", "--posterior", "posterior.safetensors", "--out", "dogless.safetensors", "--steps", "30"]
    monkeypatch.setattr(sys, "argv", ["distruction", "forget", *common, *more, "--kl-weight", "0.1", "--no-progress"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    source = open_model("output/train/my-bgd", weights="dogless.safetensors")
    x, y = (data := source.select("photos/val").read(source.inputs))[list(range(len(data)))]
    predicted = source.network.eval()(x).argmax(dim=-1)
    assert (predicted == y)[y != 2].all()
    assert (predicted != 2).all()


def test_bgd_in_timms_registry(here):
    register = runpy.run_path(str(EXAMPLES / "timm_train_bgd.py"))["register"]
    register()
    assert "Bayesian Gradient Descent" in dict(timm.optim.list_optimizers(with_description=True))["bgd"]
    model = timm.create_model("test_vit", num_classes=3)
    args = arguments_of_a_run(opt="bgd", lr=1.0, weight_decay=0.0, layer_decay=0.7, opt_eps=1e-8)
    opt = timm.optim.create_optimizer_v2(model, **timm.optim.optimizer_kwargs(args), data_per_step=24.0, std_init=0.02)
    assert {id(p) for g in opt.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert len({g["lr_scale"] for g in opt.param_groups}) > 2
    assert all(g["data_per_step"] == 24.0 for g in opt.param_groups)
    # DistributedDataParallel gives every rank the first one's weights after train.py has made the optimizer.
    with torch.no_grad():
        model.head.bias.fill_(7.0)
    opt.zero_grad()
    assert not torch.equal(model.head.bias, torch.full((3,), 7.0))
    opt.eval()
    assert torch.equal(model.head.bias, torch.full((3,), 7.0))
    with pytest.raises(UsageError, match="weight_decay"):
        timm.optim.create_optimizer_v2(model, **{**timm.optim.optimizer_kwargs(args), "weight_decay": 2e-5})


# --- other libraries ------------------------------------------------------------------------------------


def test_lightning_on_two_processes(tmp_path):
    pytest.importorskip("lightning", reason="lightning is optional and not installed")
    (words,) = commands("lightning_prepare.py")
    launch([*words, "--steps", "3", "--accelerator", "cpu"], tmp_path)
    posterior = Posterior.load(tmp_path / "posterior.safetensors")
    assert posterior.numel() == 202_186
    assert posterior.largest_std() == pytest.approx(0.1)
    assert any((std < 0.099).any() for std in posterior.stds.values())
