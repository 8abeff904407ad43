"""Rehearsals, held-out images and targets from the command line."""

import json

import pytest
import torch
from typer.testing import CliRunner

from distruction import Posterior, UsageError, forget, models
from distruction.cli import app
from distruction.damage import KEY
from distruction.data import load, loader, sets
from distruction.training import train

CONFIG = {"name": "vit-micro", "num_classes": 10, "in_chans": 1, "img_size": 8}
QUIET = ("--no-progress", "--workers", "0")


def distruction(*words):
    done = CliRunner().invoke(app, [str(w) for w in words])
    return done.exception if done.exit_code else None, done.output


@pytest.fixture(scope="module")
def few():
    """The first 240 digits to train on, and the first 120 of the test part."""
    parts = load("digits")
    return [part.subset(torch.arange(count)) for part, count in zip(parts, (240, 120), strict=True)]


@pytest.fixture(autouse=True)
def digits(few, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sets, "load", lambda *args, **kwargs: few)


@pytest.fixture(scope="module")
def made(few, tmp_path_factory):
    """A model of these, and its posterior from the command line, with two classes rehearsed."""
    folder = tmp_path_factory.mktemp("rehearsal")
    torch.manual_seed(0)
    model = models.create(**CONFIG)
    train(model, few[0], epochs=20, noise=0.0, seed=0, progress=False)
    models.save(model, folder / "m", {**CONFIG, "data": "digits"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "load", lambda *args, **kwargs: few)
        error, out = distruction(
            "prepare", "--model", folder / "m", "--out", folder / "p", "--steps", 20, "--held-out", "test",
            "--rehearse", 2, *QUIET,
        )  # fmt: skip
    assert error is None, out
    (folder / "said").write_text(out)
    return folder


def test_preparation_keeps_what_it_was_given_the_held_out_images_for(made, few):
    found = Posterior.load(made / "p").metadata
    assert found["held_out"]["examples"] == 120
    assert len(found[KEY]) == 4
    # The classes 0 and 9 with two objectives each, measured on the test images of the others.
    for rehearsal in found[KEY]:
        assert rehearsal["examples"] == int((few[1].labels != rehearsal["label"]).sum())
    assert "4 requests rehearsed in " in (made / "said").read_text()


def test_a_dry_run_forecasts_what_the_run_then_costs_and_writes_nothing(made, tmp_path):
    words = ("forget", "--model", made / "m", "--posterior", made / "p", "--class", 3, "--steps", 10, *QUIET)
    before = {p: p.read_bytes() for p in made.iterdir()}
    error, dry = distruction(*words, "--out", tmp_path / "u", "--log-json", tmp_path / "log", "--dry-run")
    assert error is None, dry
    assert list(tmp_path.iterdir()) == []
    assert {p: p.read_bytes() for p in made.iterdir()} == before
    error, out = distruction(*words, "--out", tmp_path / "u", "--report", tmp_path / "report")
    assert error is None, out
    (forecast,) = [line for line in dry.splitlines() if line.startswith("forecast: ")]
    assert forecast in out.splitlines()
    told = json.loads((tmp_path / "report/report.json").read_text())["forecast"]
    assert f"{told['damage']:.1f} ± {told['error']:.1f} points" in forecast


def test_a_target_is_forgets_and_is_replayed(made, few, tmp_path):
    """The records of rows 0 to 19 as unseen ones: the bits of `forget`, and the same again from the receipt."""
    (tmp_path / "rows").write_text("\n".join(map(str, range(20))) + "\n")
    words = ("--posterior", made / "p", "--records", tmp_path / "rows", *QUIET[1:])
    error, out = distruction(
        "forget", "--model", made / "m", "--target", "unseen", "--steps", 4, "--no-progress", "--out", tmp_path / "u",
        "--report", tmp_path / "report", "--receipt", tmp_path / "r.json", *words,
    )  # fmt: skip
    assert error is None, out
    model, _ = models.load(made / "m")
    posterior = Posterior.load(made / "p", model=model)
    batches = loader(few[0].subset(torch.arange(20)), batch_size=64, shuffle=True)
    report = forget(model, posterior, batches, target="unseen", steps=4, progress=False)
    assert report.history
    assert f"advantage of an attacker who sees their log-odds: {report.advantage:.2f}" in out
    assert json.loads((tmp_path / "report/report.json").read_text())["advantage"] == report.advantage
    assert "with an advantage of" in (tmp_path / "report/index.html").read_text()
    unlearned, _ = models.load(tmp_path / "u")
    for a, b in zip(model.parameters(), unlearned.parameters(), strict=True):
        assert torch.equal(a, b)
    error, out = distruction(
        "verify", tmp_path / "r.json", "--model", tmp_path / "u", "--original-model", made / "m", "--secret",
        tmp_path / "r.secret.json", "--replay", *words,
    )  # fmt: skip
    assert error is None, out
    assert "the same bits" in out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("prepare", "--rehearse", 2), "pass --held-out"),
        (("prepare", "--held-out", "nowhere"), "nowhere is no folder of images"),
        (("forget", "--posterior", "p", "--class", 3, "--target", "away"), "be gone, sub-class, unseen, corrected"),
        (("forget", "--posterior", "p", "--class", 3, "--target", "unseen", "--request", "class"), "not for class"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(made, tmp_path, command, message):
    words = [made / w if w == "p" else w for w in command]
    error, _ = distruction(*words, "--model", made / "m", "--out", tmp_path / "o", *QUIET)
    assert isinstance(error, UsageError)
    assert message in str(error)
    assert list(tmp_path.iterdir()) == []
