"""The scripts in ``examples/``, run as their first lines say, with small models, and one process per file."""

import argparse
import ast
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import timm.optim
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

from distruction import Posterior, UsageError
from distruction.planning import plan

EXAMPLES = Path(__file__).parents[1] / "examples"
CLASSES = {"bird": (200, 40, 40), "cat": (40, 200, 40), "dog": (40, 40, 200)}
"""Noisy images of one colour each."""
SMALL = {
    "vit_base_patch16_224": "test_vit",
    "vit_large_patch16_224": "test_vit",
    "vit_huge_patch14_224": "test_vit",
    "data_per_step=50000": "data_per_step=24",
}
# From a narrow std a few steps are enough for a few images.
QUICK = {"prepare": ["--steps", "20", "--std-init", "0.02", "--workers", "0"],
         "forget": ["--steps", "30", "--kl-weight", "0.1", "--workers", "0"],
         "evaluate": ["--workers", "0"]}  # fmt: skip


def commands(script):
    """The commands that a script's first lines name, in words, made small and quick."""
    doc = ast.get_docstring(ast.parse((EXAMPLES / script).read_text()), clean=False)
    found = [shlex.split(line) for line in doc.splitlines() if line.startswith(("    python ", "    torchrun "))]
    assert found
    return [[SMALL.get(w, w) for w in words] + [o for w in words for o in QUICK.get(w, [])] for words in found]


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


def accuracies(output):
    """D_r and D_f."""
    return tuple(float(a) for a in re.search(r"D_r (.*) %, D_f (.*) %", output).groups())


def fit(model, transform, folder, steps, lr):
    """Train until every training image is known."""
    paths = sorted(folder.glob("photos/train/*/*.png"))
    x = torch.stack([transform(Image.open(path)) for path in paths])
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


# --- class folders --------------------------------------------------------------------------------------


def test_vit_of_class_folders(run):
    prepare, forget, evaluate, *_ = commands("vit_folder.py")
    before = [w.replace("forgotten.safetensors", "vit.safetensors") for w in evaluate]
    assert accuracies(run(before)) == (100, 100)
    assert "samples of the posterior: " in run(prepare)
    run(forget)
    assert accuracies(run(evaluate)) == (100, 0)


def test_classes_that_the_model_lacks(run, here):
    prepare, _, evaluate, *_ = commands("vit_folder.py")
    with pytest.raises(UsageError, match="class 'dgo' is unknown; the classes are bird, cat, dog"):
        run(["vit.safetensors" if w == "forgotten.safetensors" else w.replace("dog", "dgo") for w in evaluate])
    (here / "other" / "dgo").mkdir(parents=True, exist_ok=True)
    with pytest.raises(UsageError, match="other has folders that are no classes of the model: dgo"):
        run([w.replace("photos/train", "other") for w in prepare])


@pytest.mark.parametrize("command", ["prepare", "forget"])
def test_shards_on_two_processes(run, here, command):
    """The whole set is one batch, whose order does not matter: one process without shards does the same."""
    sharded = next(words for words in commands("vit_folder.py") if words[0] == "torchrun" and command in words)
    if command == "prepare":
        # Gauss-Newton's signs go by an example's place in the batch.
        sharded = [*sharded, "--method", "bgd"]
    alone = ["python", *(w for w in sharded[3:] if w != "--shard")]
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


def test_checkpoint_of_timms_train_script(run, here):
    """Its best checkpoint holds useless weights and an EMA that classifies, which is what train.py validated."""
    folder = here / "output/train/my-vit-large"
    folder.mkdir(parents=True)
    args = arguments_of_a_run(num_classes=3)
    (folder / "args.yaml").write_text(yaml.safe_dump(vars(args)))
    model = timm.create_model("test_vit", num_classes=3)
    ema = ModelEmaV3(timm.create_model("test_vit", num_classes=3, checkpoint_path=str(here / "vit.safetensors")))
    optimizer = timm.optim.create_optimizer_v2(model, **timm.optim.optimizer_kwargs(args))
    saver = CheckpointSaver(model, optimizer, args, ema, checkpoint_dir=str(folder))
    saver.save_checkpoint(0, metric=100.0)

    ask, prepare, forget, evaluate, _ = commands("timm_checkpoint.py")
    assert "Fits: " in run(ask)
    run(prepare)
    elements = sum(p.numel() for p in model.parameters())
    assert (here / "posterior.safetensors").stat().st_size < 1.3 * elements
    run(forget)
    assert accuracies(run(evaluate)) == (100, 0)


TRAIN_SCRIPT = """
import argparse, os, timm, torch, yaml
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ParseKwargs
from class_folders import images
from timm.data import create_transform, resolve_data_config

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
labels = {name: i for i, name in enumerate(CLASSES)}
data = images("photos/train", labels, create_transform(**resolve_data_config(model=model)))
with open(os.path.join(saver.checkpoint_dir, "args.yaml"), "w") as f:
    yaml.safe_dump(vars(args), f)
for epoch in range(epochs):
    model.train()
    optimizer.zero_grad()
    for x, y in torch.utils.data.DataLoader(data, 8, shuffle=True):
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    scheduler.step(epoch + 1)
saver.save_checkpoint(epoch, metric=0.0)
"""


def test_timms_train_script_with_bgd(run, here):
    """A script that does what train.py does with its optimizer; then the posterior from its checkpoint."""
    head = f"CLASSES, DEFAULTS = {list(CLASSES)}, {vars(arguments_of_a_run())}\n"
    (here / "train.py").write_text(head + TRAIN_SCRIPT)
    (train,) = commands("timm_train_bgd.py")
    folder = here / "output/train/my-bgd"
    folder.mkdir(parents=True)
    before = load_file(here / "vit.safetensors")
    run(train)

    extract = commands("timm_checkpoint.py")[-1]
    run(extract)
    means = load_file(here / "means.safetensors")
    model = timm.create_model("test_vit", num_classes=3, checkpoint_path=str(here / "means.safetensors"))
    posterior = Posterior.load(here / "posterior.safetensors", model=model)  # refuses other means
    assert posterior.metadata["labels"] == {name: i for i, name in enumerate(CLASSES)}
    held = torch.load(folder / "last.pth.tar", weights_only=False)
    order = [id(p) for g in timm.optim.param_groups_weight_decay(model, 0.0) for p in g["params"]]
    for name, p in model.named_parameters():
        state = held["optimizer"]["state"][order.index(id(p))]
        assert torch.equal(state["mean"], means[name])
        assert not torch.equal(means[name], before[name])
        assert not torch.equal(held["state_dict"][name], means[name])  # a sample
        torch.testing.assert_close(posterior.stds[name], state["std"], rtol=0.01, atol=0)
        assert (state["std"] < 0.02).any()

    forget = next(words for words in commands("timm_checkpoint.py") if "forget" in words)
    run([*forget, "--weights", "means.safetensors"])
    evaluate = next(words for words in commands("vit_folder.py") if "evaluate" in words)
    assert accuracies(run(evaluate)) == (100, 0)


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


def test_hugging_face_vit(run, here):
    transformers = pytest.importorskip("transformers", reason="transformers is optional and not installed")
    torch.manual_seed(0)
    labels = {name: i for i, name in enumerate(CLASSES)}
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        id2label={i: name for name, i in labels.items()}, label2id=labels,
    )  # fmt: skip
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    model = transformers.ViTForImageClassification(config)

    def transform(image):
        return processor(image, return_tensors="pt")["pixel_values"][0]

    fit(model, transform, here, steps=60, lr=2e-3).save_pretrained(here / "my-vit")
    processor.save_pretrained(here / "my-vit")
    prepare, forget, evaluate = commands("huggingface_vit.py")
    assert plan(model, (3, 32, 32)).parameters == model.num_parameters()
    assert accuracies(run([w.replace("my-vit-forgotten", "my-vit") for w in evaluate])) == (100, 100)
    run(prepare)
    assert list(Posterior.load(here / "posterior.safetensors")) == [n for n, _ in model.named_parameters()]
    run(forget)
    assert accuracies(run(evaluate)) == (100, 0)


def test_lightning_on_two_processes(tmp_path):
    pytest.importorskip("lightning", reason="lightning is optional and not installed")
    (words,) = commands("lightning_prepare.py")
    launch([*words, "--steps", "3", "--accelerator", "cpu"], tmp_path)
    posterior = Posterior.load(tmp_path / "posterior.safetensors")
    assert posterior.numel() == 202_186
    assert posterior.largest_std() == pytest.approx(0.1)
    assert any((std < 0.099).any() for std in posterior.stds.values())
