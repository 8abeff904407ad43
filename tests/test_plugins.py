"""Objectives, methods and metrics of other packages: by decorator, by entry point, and broken ones."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from distruction import metrics, objectives
from distruction.data import load
from distruction.errors import UsageError
from distruction.experiments.measure import References, measure
from distruction.registry import Registry
from distruction.scenarios import full_class

ROOT = Path(__file__).parents[1]

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "tiny-plugin"
version = "1"
[tool.setuptools]
py-modules = ["tiny_plugin", "tiny_broken"]
[project.entry-points."distruction.objectives"]
tiny-squares = "tiny_plugin"
tiny-teacher = "tiny_plugin"
tiny-broken = "tiny_broken"
tiny-absent = "tiny_plugin"
uniform = "tiny_plugin"
[project.entry-points."distruction.methods"]
tiny-shrink = "tiny_plugin:shrink"
[project.entry-points."distruction.metrics"]
tiny-norm = "tiny_plugin:norm"
"""

PLUGIN = """
import torch
from distruction import methods, metrics, objectives

@objectives.register("tiny-squares", "logits to zero")
def squares(logits, targets, forgotten=()):
    return logits.square().mean()

@objectives.register("tiny-teacher", "as many means as the model has", of_model=True, teaches=True)
def teacher(model, posterior, forgotten):
    return lambda logits, targets: logits.sum() * 0 + len(posterior.means)

@methods.register("tiny-shrink", "weights halved", paper="none", reads="none")
def shrink(task, *, factor=0.5):
    with torch.no_grad():
        for p in task.model.parameters():
            p.mul_(factor)

@metrics.register("tiny-norm", "norm", "of the weights", better="low", digits=3)
def norm(seen):
    return sum(p.square().sum() for p in seen.model.parameters()).item()
"""

USE = """
import warnings
import torch, distruction
from distruction import methods, metrics, objectives
from distruction.data import load
from distruction.experiments import results

torch.manual_seed(0)
model = torch.nn.Linear(4, 3)
data = torch.utils.data.TensorDataset(torch.randn(24, 4), torch.arange(24) % 3)
loader = torch.utils.data.DataLoader(data, 12)
posterior = distruction.prepare(model, loader, steps=3, progress=False)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    distruction.forget(model, posterior, loader, objective="tiny-squares", kl_weight=0.1, steps=2, progress=False)
print(sorted(str(w.message) for w in caught if "is left out" in str(w.message)))
print(objectives.resolve("tiny-teacher", model, posterior)(torch.ones(2, 3), None).item())
print(*(getattr(objectives.entry("tiny-teacher"), flag) for flag in ("teaches", "copies", "of_texts")))
try:
    objectives.entry("tiny-broken")
except distruction.UsageError as error:
    print(error)
before = model.weight.clone()
train, _ = load("digits")
part = methods.Counted(train.subset(torch.arange(10)))
methods.run("tiny-shrink", methods.Task(model, part, part, None, None), factor=0.25)
print(torch.equal(model.weight, before / 4), list(methods.REGISTRY)[-1])
print(results.COLUMNS["tiny-norm"])
"""


def test_a_package_that_is_installed_adds_an_objective_a_method_and_a_metric(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "tiny_plugin.py").write_text(PLUGIN)
    (source / "tiny_broken.py").write_text("import no_such_package_anywhere\n")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True, capture_output=True)

    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", USE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    left_out, teacher, flags, broken, method, column = done.stdout.splitlines()
    why = "ModuleNotFoundError: No module named 'no_such_package_anywhere'; repair or uninstall the package tiny-plugin"
    assert f"the objective 'tiny-broken' is left out: {why}" in left_out
    assert "tiny_plugin registers no objective 'tiny-absent'" in left_out
    assert "'uniform' is the name of one of the library's own" in left_out
    assert left_out.count("is left out") == 3
    assert teacher == "2.0"  # weight and bias
    assert flags == "True False False"
    assert broken == f"the objective 'tiny-broken' cannot be used: {why}"
    assert method == "True tiny-shrink"
    assert column == "Column(heading='norm', meaning='of the weights', better='low', group='accuracy', digits=3)"


def test_a_name_is_given_once():
    registry = Registry("objective", {"a": 1})
    registry.add("b", 2)
    assert dict(registry) == {"a": 1, "b": 2}
    for name in registry:
        with pytest.raises(UsageError, match=f"the objective '{name}' is registered already; choose another name"):
            registry.add(name, 3)
    with pytest.raises(UsageError, match="objective 'c' is unknown; choose a, b"):
        registry.known("c")
    with pytest.raises(UsageError, match="registered already"):
        objectives.register("uniform", "again")(objectives.uniform)


@pytest.fixture
def cell():
    """A model, what it is compared with, a split and facts for `measure`."""
    torch.manual_seed(0)
    train, test = load("digits")
    split = full_class(train.subset(torch.arange(300)), test.subset(torch.arange(200)), "3")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    facts = {
        "measure": {"batch_size": 512, "brief": False, "relearn_lr": 1e-3, "relearn_steps": 1},
        "split": {"scenario": "full-class"},
    }
    return model, References(model, copy.deepcopy(model), copy.deepcopy(model), ()), split, facts


def test_the_bench_measures_a_metric_of_another_package(cell, monkeypatch):
    model, references, split, facts = cell
    monkeypatch.setattr(metrics, "REGISTRY", Registry("metric", {}))
    metrics.register("forget-size", "n", "examples to forget", better="low")(lambda seen: len(seen.forget))
    found = measure(model, references, split, facts, None)["metrics"]
    assert found["forget-size"] == (load("digits")[0].labels[:300] == 3).sum()


def test_a_metric_must_not_replace_one_of_the_librarys_own(cell, monkeypatch):
    monkeypatch.setattr(metrics, "REGISTRY", Registry("metric", {}))
    metrics.register("retain", "n", "zero", better="low")(lambda seen: 0.0)
    with pytest.raises(UsageError, match="the metric 'retain' of another package has a name of the library's own"):
        measure(*cell, None)
