"""What TensorBoard and Weights & Biases are told of a run, by TensorBoard's own reader and a stand-in for wandb."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distruction import NonFiniteError, Posterior, cli, forget, models
from distruction.errors import MissingPackage
from distruction.loggers import TensorBoard, WandB

FIGURES = ("loss", "accuracy", "kl", "kl_weight", "probability")


@pytest.fixture
def task():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    return model, Posterior.around(model, 0.1), [(torch.randn(8, 4), torch.full((8,), 2))]


def written(folder):
    """{tag: [(step, value)]} as TensorBoard shows it."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def told(history, name):
    values = [(step.step, getattr(step, name)) for step in history]
    return [(n, v) for n, v in values if v is not None and math.isfinite(v)]


def test_tensorboard_reads_each_step(task, tmp_path):
    pytest.importorskip("tensorboard")
    with TensorBoard(tmp_path / "log") as logger:
        report = forget(*task, steps=4, callback=logger, progress=False)
    found = written(tmp_path / "log")
    assert set(found) == set(FIGURES)
    for name in FIGURES:
        assert [n for n, _ in found[name]] == [1, 2, 3, 4]
        assert [v for _, v in found[name]] == pytest.approx([v for _, v in told(report.history, name)], rel=1e-6)


def test_a_resumed_run_is_one_curve(task, tmp_path):
    """Step 3 was told and not kept by the checkpoint: it is there once."""
    pytest.importorskip("tensorboard")
    how = {"steps": 5, "progress": False, "checkpoint": tmp_path / "c", "checkpoint_steps": 2}

    def killed(step):
        first(step)
        if step.step == 3:
            raise KeyboardInterrupt

    first = TensorBoard(tmp_path / "log")
    with first, pytest.raises(KeyboardInterrupt):
        forget(*task, **how, callback=killed)
    task[1].mean_(task[0])
    with TensorBoard(tmp_path / "log") as second:
        forget(*task, **how, callback=second)
    assert [n for n, _ in written(tmp_path / "log")["loss"]] == [1, 2, 3, 4, 5]


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in with the public calls that are used; it keeps what it was told."""
    calls = []
    module = SimpleNamespace(
        init=lambda **o: calls.append(("init", o)),
        log=lambda data, step=None: calls.append(("log", step, data)),
        finish=lambda exit_code=None: calls.append(("finish", exit_code)),
        calls=calls,
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_is_told_each_step(task, wandb):
    with WandB("requests", mode="offline") as logger:
        report = forget(*task, steps=3, callback=logger, progress=False)
    first, *logged, last = wandb.calls
    assert first == ("init", {"project": "requests", "mode": "offline"})
    assert last == ("finish", 0)
    assert [step for _, step, _ in logged] == [1, 2, 3]
    for (_, _, data), step in zip(logged, report.history, strict=True):
        assert data == {name: getattr(step, name) for name in FIGURES}


def test_a_failed_run_ends_as_one(task, wandb):
    model, posterior, _ = task
    fine, bad = (torch.zeros(8, 4), torch.full((8, 4), torch.nan))
    loader = [(x, torch.full((8,), 2)) for x in (fine, bad)]
    with pytest.raises(NonFiniteError), WandB("requests") as logger:
        forget(model, posterior, loader, steps=4, kl_weight=0.1, callback=logger, progress=False)
    assert wandb.calls[-1] == ("finish", 1)


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_without_the_package_the_error_names_the_extra(tmp_path, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(MissingPackage, match=rf"needs {package}, .*pip install 'distruction\[{package}\]'"):
        {"tensorboard": TensorBoard, "wandb": WandB}[package]("x")
    words = ["distruction", "prepare", "--model", "none", "--out", str(tmp_path / "p"), f"--{package}", "x"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert (stop.value.code, f"distruction[{package}]" in capsys.readouterr().err) == (2, True)
    assert not list(tmp_path.iterdir())


def test_the_command_line_logs_to_both(tmp_path, monkeypatch, wandb):
    pytest.importorskip("tensorboard")
    config = {"name": "vit-micro", "num_classes": 10, "in_chans": 1, "img_size": 8, "data": "digits"}
    models.save(models.create(**{k: v for k, v in config.items() if k != "data"}), tmp_path / "m", config)
    words = ["prepare", "--model", tmp_path / "m", "--out", tmp_path / "p", "--steps", 2, "--no-progress"]
    words += ["--tensorboard", tmp_path / "log", "--wandb", "requests"]
    monkeypatch.setattr(sys, "argv", ["distruction", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert [n for n, _ in written(tmp_path / "log")["loss"]] == [1, 2]
    assert [c[0] for c in wandb.calls] == ["init", "log", "log", "finish"]
