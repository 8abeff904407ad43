"""``distruction attack`` on a few digits."""

import json

import pytest
import torch
from typer.testing import CliRunner

from distruction import UsageError, attacks, models
from distruction.attacks import usual
from distruction.cli import app
from distruction.data import load, sets

CONFIG = {"name": "vit-micro", "num_classes": 10, "in_chans": 1, "img_size": 8}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two models with random weights; the second stands for the original and for a retrained one."""
    folder = tmp_path_factory.mktemp("attack")
    for seed, name in enumerate(("model", "other")):
        torch.manual_seed(seed)
        model = models.create(**CONFIG)
        models.save(model, folder / name, {**CONFIG, "data": "digits"})
    return folder


def test_attack_prints_and_writes_every_number(files, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")
    # They take minutes of a busy core, and have tests of their own.
    monkeypatch.setattr(usual, "few_shot", lambda *args, steps, **kwargs: float(steps))
    some = [part.subset(torch.arange(80)) for part in load("digits")]
    monkeypatch.setattr(sets, "load", lambda *args, **kwargs: some)
    out = tmp_path / "attacks.json"
    model, other = str(files / "model"), str(files / "other")
    done = CliRunner().invoke(
        app,
        ["attack", "--model", model, "--class", "3", "--original", other, "--retrained", other, "--out", str(out)],
    )
    assert done.exception is None, done.output
    rows = json.loads(out.read_text())["attacks"]
    assert list(rows) == [model, other]
    assert set(rows[model]) == set(attacks.COLUMNS)
    assert "prototype, 50" in done.output
    assert "LiRA AUC" in done.output
    ours, theirs = models.load(model)[0], models.load(other)[0]
    squares = sum((a - b).double().square().sum() for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert rows[model]["distance"] == pytest.approx(squares.sqrt().item())


def test_a_model_of_other_classes_is_refused(files, tmp_path):
    models.save(models.create(**{**CONFIG, "num_classes": 9}), tmp_path / "m", {**CONFIG, "num_classes": 9})
    arguments = ["attack", "--model", str(files / "model"), "--class", "3", "--retrained", str(tmp_path / "m")]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, UsageError)
    assert "tells 9 classes apart, the model 10" in str(error)
