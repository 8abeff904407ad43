"""A request from the command line: whatever model, whatever records, the rest of the data gone."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

from distruction import Posterior, cli, models
from distruction.data import inputs
from distruction.data.encoded import Files
from distruction.data.inputs import Pixels
from distruction.sources import open_model

CLASSES = ["ant", "bee", "cat", "dog", "owl"]
QUICK = ("--no-progress", "--workers", "0")
STRONG = ("--steps", "40", "--kl-weight", "0.1")
"""A given lambda, and few steps."""


@pytest.fixture
def distruction(capsys, monkeypatch):
    """Runs the command line; gives its status, output and errors."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["distruction", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return (stop.value.code, *capsys.readouterr())

    return run


def export(root, *, train=32, test=16):
    """Digits 0 to 4 as PNG files in folders of ``CLASSES``."""
    bunch = load_digits()
    for label, name in enumerate(CLASSES):
        images = bunch.images[bunch.target == label]
        for part, chosen in (("train", images[:train]), ("test", images[train : train + test])):
            (root / part / name).mkdir(parents=True)
            for i, image in enumerate(chosen):
                Image.fromarray((image * 15).astype("uint8")).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Photos, a model that ``train`` wrote, and its posterior."""
    folder = tmp_path_factory.mktemp("requests")
    export(folder / "photos")
    patch = pytest.MonkeyPatch()
    for words in (
        ["train", "--data", folder / "photos", "--out", folder / "model", "--epochs", 40, "--batch-size", 40],
        ["prepare", "--model", folder / "model", "--data", folder / "photos", "--out", folder / "posterior",
         "--workers", 0, "--steps", 15],
    ):  # fmt: skip
        patch.setattr(sys, "argv", ["distruction", *map(str, words), "--no-progress"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
    patch.undo()
    return folder


@pytest.fixture
def here(made, tmp_path):
    """A copy of the photos that a test may delete from."""
    shutil.copytree(made / "photos", tmp_path / "photos")
    return tmp_path


def forgets(made, out, *more):
    """The words of a request, to a model of ours."""
    return ("forget", "--model", made / "model", "--posterior", made / "posterior", "--out", out, *QUICK, *more)


def accuracies(made, model, classes, weights=None):
    """D_r and D_f on the test images."""
    source = open_model(model, weights=weights)
    data = open_model(made / "model").select(made / "photos", part="test").read(source.inputs)
    x, y = data[list(range(len(data)))]
    with torch.no_grad():
        output = source.network.eval()(x)
    right = getattr(output, "logits", output).argmax(dim=-1) == y
    forgotten = torch.isin(y, torch.tensor([CLASSES.index(c) for c in classes]))
    return right[~forgotten].float().mean().item() * 100, right[forgotten].float().mean().item() * 100


# --- what serves alone ----------------------------------------------------------------------------------


def test_the_other_folders_and_the_test_part_may_go(distruction, made, here):
    """The class in the middle keeps its number and the moments of all: bit for bit."""
    common = ("--class", "cat", "--data", here / "photos", "--steps", 3)
    assert distruction(*forgets(made, here / "whole", *common))[0] == 0
    for name in CLASSES:
        if name != "cat":
            shutil.rmtree(here / "photos/train" / name)
    shutil.rmtree(here / "photos/test")
    status, out, err = distruction(*forgets(made, here / "alone", *common))
    assert (status, err) == (0, "")
    assert "to forget: 32 records of 1 class: 32 cat\n" in out
    # The same images in a flat folder, and in a folder of classes without train/.
    (here / "photos/train/cat").rename(here / "flat")
    assert distruction(*forgets(made, here / "third", "--class", "cat", "--data", here / "flat", "--steps", 3))[0] == 0
    first = load_file(here / "whole")
    for other in ("alone", "third"):
        found = load_file(here / other)
        assert all(torch.equal(first[n], found[n]) for n in first)
    assert not torch.equal(first["head.weight"], load_file(made / "model")["head.weight"])


def test_a_class_is_forgotten_with_everything_else_deleted(distruction, made, here):
    for name in CLASSES[1:]:
        shutil.rmtree(here / "photos/train" / name)
    before = accuracies(made, made / "model", ["ant"])
    status, _, err = distruction(
        *forgets(made, here / "out", "--class", "ant", "--data", here / "photos/train", *STRONG)
    )
    assert (status, err) == (0, "")
    after = accuracies(made, here / "out", ["ant"])
    assert min(before) >= 80
    assert after[0] >= before[0] - 10
    assert after[1] == 0
    status, out, _ = distruction("evaluate", "--model", here / "out", "--data", made / "photos", "--class", "ant")
    assert (status, "D_r %" in out, "MIA %" in out) == (0, True, True)


def test_what_the_model_takes_is_kept(made):
    source = open_model(made / "model")
    train = sorted((made / "photos/train").rglob("*.png"))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(p))) for p in train]).double()
    assert source.classes == tuple(CLASSES)
    assert source.inputs.mean == pytest.approx((pixels.mean().item(),))
    assert source.inputs.std == pytest.approx((pixels.std().item(),))
    assert Posterior.load(made / "posterior").metadata["serving"] == source.facts()
    assert Posterior.load(made / "posterior").metadata["label_counts"] == {str(i): 32 for i in range(5)}


@pytest.mark.parametrize("size", [(8, 8), (16, 12), (30, 40)])
def test_a_streamed_image_is_the_one_in_memory(tmp_path, monkeypatch, size):
    generator = torch.Generator().manual_seed(0)
    paths = []
    for i in range(3):
        pixels = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels.numpy()).save(paths[-1])
    for channels in (1, 3):
        taken = Pixels(channels, 8, (7.0,) * channels, (3.0,) * channels)
        kept, _ = inputs.read_images(Files(tuple(paths)), [0, 1, 0], ["a", "b"], taken, skip_unreadable=False)
        monkeypatch.setattr(inputs, "IN_MEMORY", 0)
        streamed, _ = inputs.read_images(Files(tuple(paths)), [0, 1, 0], ["a", "b"], taken, skip_unreadable=False)
        monkeypatch.undo()
        assert type(streamed) is inputs.ImageFiles
        (x, y), (z, w) = (next(iter(inputs.batches(d, batch_size=3))) for d in (kept, streamed))
        assert torch.equal(x, z)
        assert torch.equal(y, w)


def test_what_the_library_warns_of_is_a_line(distruction, made, here):
    words = ("--data", here / "photos", "--class", "cat", "--batch-size", 8, "--steps", 1)
    status, _, err = distruction(*forgets(made, here / "out", *words))
    assert status == 0
    assert re.fullmatch(r"note: 1 steps read 1 of the 4 batches of the forget set: .*\n", err)


# --- requests -------------------------------------------------------------------------------------------


def test_records_by_csv(distruction, made, here):
    """Files by their paths; what they are called decides nothing, and a dry run writes nothing."""
    rows = [f"photos/train/{c}/{i}.png,{c}" for c, n in (("owl", 13), ("cat", 7)) for i in range(n)]
    (here / "list.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    words = forgets(made, here / "out", "--records", here / "list.csv", "--data", here / "photos")
    before = sorted(here.rglob("*"))
    status, out, _ = distruction(*words, "--dry-run")
    assert (status, out) == (0, "to forget: 20 records of 2 classes: 13 owl, 7 cat\n")
    assert sorted(here.rglob("*")) == before
    for path in here.glob("photos/train/*/*.png"):
        if f"{path.relative_to(here)},{path.parent.name}" not in rows:
            path.unlink()
    status, out_of_it, err = distruction(*words, "--posterior-out", here / "q", "--report", here / "report")
    assert (status, err) == (0, "")
    assert "is reached." in out_of_it or "Nothing had to be done" in out_of_it
    told = json.loads((here / "report/report.json").read_text())
    assert told["reached"] is True
    before, after = (accuracies(made, m, ["owl"]) for m in (made / "model", here / "out"))
    assert min(a - b for a, b in zip(after, before, strict=True)) >= -100 / 16
    (request,) = Posterior.load(here / "q").metadata["forgotten"]
    assert (request["request"], request["records"]) == ("records", 20)
    assert request["labels"] == {"2": 7, "4": 13}
    for suffix, content in (
        (".jsonl", "\n".join(json.dumps({"file": r.split(",")[0], "class": r.split(",")[1]}) for r in rows)),
        (".txt", "\n".join(r.split(",")[0] for r in rows)),
    ):
        listed = here / f"list{suffix}"
        listed.write_text(content)
        more = ("--records", listed, "--data", here / "photos", "--dry-run")
        assert distruction(*forgets(made, here / "p", *more))[1] == out


def test_records_that_the_model_has_not_seen_leave_it_as_it_is(distruction, made, here):
    """The held-out images themselves: no attacker could tell them from unseen ones, and nothing is done."""
    assert Posterior.load(made / "posterior").metadata["held_out"]["examples"] == 80
    names = [f"test/{c}/{i}.png" for c in CLASSES for i in range(32, 48)]
    for name in names:
        (here / "photos" / name).with_name(f"{int(name[-6:-4]) - 32}.png").rename(here / "photos" / name)
    (here / "list.txt").write_text("\n".join(names))
    words = ("--records", here / "list.txt", "--data", here / "photos", "--report", here / "r.html")
    status, out, err = distruction(*forgets(made, here / "out", *words))
    assert (status, err) == (0, "")
    assert "Nothing had to be done: the model knows these records no better than ones that it has not seen" in out
    first, second = load_file(made / "model"), load_file(here / "out")
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert "Nothing had to be done" in (here / "r.html").read_text()


def test_prepare_says_whether_it_knows_unseen_data(distruction, made, here):
    """By default the test part; without one, and without parts, none."""
    words = ("prepare", "--model", made / "model", "--steps", 1, *QUICK)
    status, out, _ = distruction(*words, "--data", here / "photos", "--out", here / "p")
    assert (status, "unseen data: 80 records of 5 classes" in out) == (0, True)
    assert re.search(r"; its samples get [\d.]+ % of the training images right, the model itself [\d.]+ %\n", out)
    for number, data in enumerate((here / "photos/train", here / "photos")):
        if number:
            shutil.rmtree(here / "photos/test")
        status, out, _ = distruction(*words, "--data", data, "--out", here / f"p{number}")
        assert (status, "unseen data: none: " in out) == (0, True)
        assert "held_out" not in Posterior.load(here / f"p{number}").metadata


def test_rows_of_a_published_data_set(distruction, tmp_path):
    config = {"name": "vit-micro", "num_classes": 10, "in_chans": 1, "img_size": 8}
    model = models.create(**config)
    models.save(model, tmp_path / "m", {**config, "data": "digits"})
    Posterior.around(model, 0.05).save(tmp_path / "p")
    (tmp_path / "rows").write_text("3\n5\n1436\n")
    words = ("forget", "--model", tmp_path / "m", "--posterior", tmp_path / "p", "--out", tmp_path / "o", "--dry-run")
    status, out, _ = distruction(*words, "--records", tmp_path / "rows")
    assert (status, out.startswith("to forget: 3 records of ")) == (0, True)
    (tmp_path / "rows").write_text("1437\n")
    status, _, err = distruction(*words, "--records", tmp_path / "rows")
    assert (status, "names row 1437, but the data set 'digits' has the rows 0 to 1436" in err) == (2, True)


def test_two_classes_at_once(distruction, made, here):
    for name in ("bee", "cat", "dog"):
        shutil.rmtree(here / "photos/train" / name)
    (here / "photos/train/ant/notes.txt").write_text("x")
    words = ("--class", "ant", "--class", "owl", "--data", here / "photos", *STRONG)
    status, out, err = distruction(*forgets(made, here / "out", *words))
    assert (status, err) == (0, "")
    assert "to forget: 64 records of 2 classes: 32 ant, 32 owl; 1 file ignored: " in out
    before, after = (accuracies(made, m, ["ant", "owl"]) for m in (made / "model", here / "out"))
    assert after[0] >= before[0] - 10
    assert after[1] == 0


def test_without_a_name_the_folder_is_the_request(distruction, made, here):
    shutil.copytree(here / "photos/train/dog", here / "to_forget/dog")
    status, out, _ = distruction(*forgets(made, here / "out", "--data", here / "to_forget", "--dry-run"))
    assert (status, out) == (0, "to forget: 32 records of 1 class: 32 dog\n")
    status, _, err = distruction(*forgets(made, here / "out", "--data", here / "photos"))
    assert (status, "the data holds every class of the model (160 records of 5 classes" in err) == (2, True)


def _csv(here, text):
    (here / "list.csv").write_text(text)
    return ("--records", here / "list.csv", "--data", here / "photos")


WRONG = {
    "a folder that is no class": (
        lambda h: ((h / "photos/train/eel").mkdir(), ("--data", h / "photos", "--class", "cat"))[1],
        "has folders that are no classes of the model: eel; its classes are ant, bee, cat, dog, owl",
    ),
    "a class that the model lacks": (
        lambda h: ("--data", h / "photos", "--class", "eel"),
        "class 'eel' is unknown; the model's classes are ant, bee, cat, dog, owl",
    ),
    "a class without its folder": (
        lambda h: (shutil.rmtree(h / "photos/train/cat"), ("--data", h / "photos", "--class", "cat"))[1],
        "photos/train has no folder cat; it has ant, bee, dog, owl",
    ),
    "a class twice": (
        lambda h: ("--data", h / "photos", "--class", "cat", "--class", "cat"),
        "name each class to forget once, not cat, cat",
    ),
    "a flat folder without a class": (
        lambda h: ("--data", h / "photos/train/cat"),
        "holds no class folders: name the one class of its images by --class",
    ),
    "no folder": (lambda h: ("--data", h / "none", "--class", "cat"), "does not exist"),
    "an empty folder": (
        lambda h: ((h / "empty").mkdir(), ("--data", h / "empty", "--class", "cat"))[1],
        "empty holds no images",
    ),
    "a missing record": (
        lambda h: _csv(h, "path\nphotos/train/cat/999.png\n"),
        "names photos/train/cat/999.png, and there is no file",
    ),
    "a record of two labels": (
        lambda h: _csv(h, "path,label\nphotos/train/cat/1.png,owl\n"),
        "calls photos/train/cat/1.png owl, but it lies in the folder of cat",
    ),
    "a record twice": (
        lambda h: _csv(h, "path\nphotos/train/cat/1.png\nphotos/train/cat/1.png\n"),
        "names photos/train/cat/1.png twice",
    ),
    "a record without a label": (
        lambda h: (shutil.move(h / "photos/train/cat/1.png", h / "1.png"), _csv(h, "path\n1.png\n"))[1],
        "gives no label for 1.png, which lies in no class folder",
    ),
    "a row of a folder": (lambda h: _csv(h, "row\n3\n"), "names row 3, but rows of a folder of images change"),
    "a column of no name": (lambda h: _csv(h, "name,label\nx,cat\n"), "row 1 of"),
    "an empty list": (lambda h: _csv(h, "path\n"), "names no record"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_names_both_sides(distruction, made, here, case):
    make, message = WRONG[case]
    more = make(here)
    before = sorted(here.rglob("*"))
    status, _, err = distruction(*forgets(made, here / "out", *more))
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("classes", ["x", "y"], "has the classes ant, bee, cat, dog, owl, and the posterior"),
        ("images", {"mean": [1.0]}, "takes its images in another way than the posterior"),
    ],
)
def test_a_posterior_of_other_images_is_refused(distruction, made, here, key, value, message):
    posterior = Posterior.load(made / "posterior")
    facts = posterior.metadata["serving"]
    facts[key] = value if isinstance(value, list) else {**facts[key], **value}
    posterior.save(here / "other")
    words = ("--posterior", here / "other", "--class", "cat", "--data", here / "photos")
    status, _, err = distruction("forget", "--model", made / "model", "--out", here / "out", *words)
    assert (status, message in err) == (2, True)
    if key == "images":
        assert f"mean: {open_model(made / 'model').facts()['images']['mean']} here, [1.0] there" in err
    assert not (here / "out").exists()


# --- models of others -----------------------------------------------------------------------------------


def fit(network, inputs, made, lr=2e-3):
    """Train until the training images are known."""
    data = open_model(made / "model").select(made / "photos").read(inputs)
    x, y = data[list(range(len(data)))]
    optimizer = torch.optim.AdamW(network.parameters(), lr)
    network.eval()
    for _ in range(400):
        optimizer.zero_grad()
        output = network(x)
        logits = getattr(output, "logits", output)
        loss = nn.functional.cross_entropy(logits, y)
        if loss < 0.03:
            return network
        loss.backward()
        optimizer.step()
    pytest.fail(f"the loss is still {loss.item()}")


def prepare_and_forget(distruction, model, made, here, out, *more):
    """The two commands with the photos gone in between, all but those of the class bee."""
    words = ("--model", model, *more, *QUICK)
    posterior = here / "prior"
    status, _, err = distruction("prepare", *words, "--data", here / "photos", "--out", posterior, "--steps", 30)
    assert (status, err) == (0, "")
    for name in CLASSES:
        if name != "bee":
            shutil.rmtree(here / "photos/train" / name)
    shutil.rmtree(here / "photos/test")
    more_of_forget = ("--posterior", posterior, "--data", here / "photos", "--class", "bee", "--out", out, *STRONG)
    status, text, err = distruction("forget", *words, *more_of_forget)
    assert (status, err) == (0, "")
    return text


def test_a_hugging_face_folder(distruction, made, here):
    transformers = pytest.importorskip("transformers", reason="transformers is optional and not installed")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
        id2label=dict(enumerate(CLASSES)), label2id={n: i for i, n in enumerate(CLASSES)},
    )  # fmt: skip
    network = transformers.ViTForImageClassification(config)
    network.save_pretrained(here / "vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(here / "vit")
    fit(network, open_model(here / "vit").inputs, made).save_pretrained(here / "vit")
    before = accuracies(made, here / "vit", ["bee"])
    prepare_and_forget(distruction, here / "vit", made, here, here / "forgotten")
    peer = transformers.AutoModelForImageClassification.from_pretrained(here / "forgotten", local_files_only=True)
    assert peer.config.id2label == dict(enumerate(CLASSES))
    after = accuracies(made, here / "forgotten", ["bee"])
    assert after[0] >= before[0] - 10
    assert after[1] <= 10
    status, out, _ = distruction("evaluate", "--model", here / "forgotten", "--data", made / "photos", "--class", "bee")
    assert (status, "D_f %" in out) == (0, True)
    assert distruction("plan", "--model", here / "vit", "--free", 8, "--device", "cpu")[0] == 0


ARGS = {
    **dict.fromkeys(("in_chans", "gp", "data", "img_size", "input_size", "mean", "std", "interpolation", "crop_pct")),
    "model": "test_vit", "model_kwargs": {"img_size": 32}, "dataset": "", "class_map": "", "train_split": "train",
    "num_classes": 5, "opt": "adamw",
}  # fmt: skip


def test_a_run_of_timms_train_script(distruction, made, here):
    """Its checkpoint holds useless weights and an EMA that classifies, which is what train.py validated."""
    run = here / "output"
    run.mkdir()
    args = {**ARGS, "data_dir": str(here / "photos"), "input_size": [3, 32, 32]}
    (run / "args.yaml").write_text(yaml.safe_dump(args))
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=5, img_size=32)
    saver = CheckpointSaver(network, torch.optim.SGD(network.parameters()), argparse.Namespace(**args),
                            ModelEmaV3(network), checkpoint_dir=str(run))  # fmt: skip
    saver.save_checkpoint(0, metric=0.0)
    good = timm.create_model("test_vit", num_classes=5, img_size=32)
    fit(good, open_model(run).inputs, made, lr=1e-3)
    saver = CheckpointSaver(network, torch.optim.SGD(network.parameters()), argparse.Namespace(**args),
                            ModelEmaV3(good), checkpoint_dir=str(run))  # fmt: skip
    saver.save_checkpoint(1, metric=100.0)
    before = accuracies(made, run, ["bee"])
    prepare_and_forget(distruction, run, made, here, here / "forgotten.safetensors")
    peer = timm.create_model(
        "test_vit", num_classes=5, img_size=32, checkpoint_path=str(here / "forgotten.safetensors")
    )
    assert torch.equal(peer.head.weight, load_file(here / "forgotten.safetensors")["head.weight"])
    after = accuracies(made, run, ["bee"], weights=here / "forgotten.safetensors")
    assert min(before) >= 60  # a chance level is 20: the EMA was read
    assert after[0] >= before[0] - 10
    assert after[1] <= 10
    # The classes' names are in the file: the folders that gave them are gone.
    words = ("--model", run, "--weights", here / "forgotten.safetensors", "--data", made / "photos", "--class", "bee")
    status, out, _ = distruction("evaluate", *words)
    assert (status, "D_f %" in out) == (0, True)


def test_a_timm_name_with_its_weights(distruction, made, here):
    """The file says how large the head is, the posterior later which classes there are."""
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=5)
    save_file(network.state_dict(), here / "w.safetensors")
    (here / "names").write_text("\n".join(CLASSES))
    source = open_model("test_vit", weights=here / "w.safetensors")
    assert (source.classes, source.network.num_classes) == (None, 5)
    words = ("--model", "test_vit", "--weights", here / "w.safetensors", "--data", here / "photos", *QUICK)
    status, _, err = distruction("prepare", *words, "--out", here / "p", "--steps", 1)
    assert (status, "nothing says which classes test_vit tells apart: pass --classes FILE" in err) == (2, True)
    assert distruction("prepare", *words, "--out", here / "p", "--steps", 1, "--classes", here / "names")[0] == 0
    more = ("--posterior", here / "p", "--class", "owl", "--steps", 2, "--out", here / "o.pth")
    assert distruction("forget", *words, *more)[0] == 0
    timm.create_model("test_vit", num_classes=5, checkpoint_path=str(here / "o.pth"))
    (here / "names").write_text("\n".join(CLASSES[:4]))
    status, _, err = distruction("prepare", *words, "--out", here / "q", "--classes", here / "names")
    assert (status, "has 5 outputs, but 4 classes are named" in err) == (2, True)


def test_weights_of_another_model_are_told_by_a_few_names(distruction, here):
    """A large model's line would fill the screen many times."""
    network = timm.create_model("test_vit", num_classes=5)
    state = {n: t for n, t in network.state_dict().items() if not n.startswith("blocks.")}
    state |= {"pos_embed": torch.zeros(1, 4, 64), "head.weight": state["head.weight"], "neck": torch.zeros(1)}
    save_file(state, here / "w.safetensors")
    lacking = [n for n in network.state_dict() if n not in state]
    words = ("--model", "test_vit", "--weights", here / "w.safetensors", "--data", here / "photos", "--out", here / "p")
    status, _, err = distruction("prepare", *words)
    assert status == 2
    assert f"it lacks {', '.join(lacking[:5])} and {len(lacking) - 5} more; it also has neck; pos_embed is " in err
    assert f"pos_embed is [1, 4, 64] there and {list(network.pos_embed.shape)} here" in err


FACTORY = """
import numpy, torch
CLASSES = ["ant", "bee", "cat", "dog", "owl"]
def pixels(image):
    return torch.from_numpy(numpy.array(image.resize((8, 8)))).float()[None] / 255
pixels.channels = 1
def make():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5))
    net.classes = CLASSES
    return net, pixels
"""


def test_a_function_of_ones_own(distruction, made, here, monkeypatch):
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(str(here))
    (here / "my_nets.py").write_text(FACTORY)
    source = open_model("my_nets:make")
    fit(source.network, source.inputs, made, lr=1e-2)
    torch.save(source.network.state_dict(), here / "w.pt")
    before = accuracies(made, "my_nets:make", ["bee"], weights=here / "w.pt")
    prepare_and_forget(distruction, "my_nets:make", made, here, here / "o.safetensors", "--weights", here / "w.pt")
    source.network.load_state_dict(load_file(here / "o.safetensors"))
    after = accuracies(made, "my_nets:make", ["bee"], weights=here / "o.safetensors")
    assert min(before) >= 80
    assert after[0] >= before[0] - 10
    assert after[1] <= 10
    for spec, message in (("my_nets:none", "cannot be had"), ("my_nets:pixels", "missing 1 required")):
        status, _, err = distruction("prepare", "--model", spec, "--data", here / "photos", "--out", here / "x")
        assert (status, message in err) == (2, True), err


# --- long work ------------------------------------------------------------------------------------------


def test_a_json_line_for_each_step(distruction, made, here):
    words = ("--class", "cat", "--data", here / "photos", "--steps", 3, "--log-json", here / "log")
    assert distruction(*forgets(made, here / "out", *words))[0] == 0
    lines = [json.loads(line) for line in (here / "log").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    names = {"step", "steps", "loss", "accuracy", "accuracy_at_means", "kl", "kl_weight", "probability", "seconds_left"}
    assert set(lines[0]) == names
    assert lines[-1]["seconds_left"] == 0
    assert all(0 < line["kl_weight"] < 1 and 0 <= line["probability"] <= 1 for line in lines)


def test_sigterm_ends_with_a_checkpoint(distruction, made, here):
    """Killed in the middle of a run whose checkpoints are an hour apart, and resumed to the same bits."""
    words = ["prepare", "--model", made / "model", "--data", made / "photos", "--steps", 300, *QUICK]
    start = [sys.executable, "-m", "distruction", *map(str, words)]
    killed = [*start, "--out", here / "p", "--checkpoint", here / "c", "--checkpoint-seconds", "3600"]
    killed += ["--log-json", here / "log"]
    process = subprocess.Popen([str(w) for w in killed], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while not (here / "log").exists() or (here / "log").read_text().count("\n") < 3:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143
    finally:
        process.kill()
    done = len(Posterior.load(here / "c").metadata["checkpoint"]["history"])
    assert 3 <= done < 300
    assert distruction(*words, "--out", here / "p", "--checkpoint", here / "c")[0] == 0
    assert distruction(*words, "--out", here / "whole")[0] == 0
    resumed, whole = Posterior.load(here / "p"), Posterior.load(here / "whole")
    assert resumed.fingerprint() == whole.fingerprint()
