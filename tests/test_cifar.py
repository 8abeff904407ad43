"""The CIFAR preset from the published file formats to the report: a user with the real files changes a path."""

import json
import re
import sys
from importlib import resources

import pytest
import timm
import torch
from dataset_files import write_cifar
from safetensors.torch import save_file
from scipy.stats import binom

from distruction import cli

SHRINK = [
    (
        r"seeds = \[0, 1, 2\]",
        'seeds = [0]\nmethods = ["baseline", "retrain", "finetune", "ssd", "unsir", "distruction"]',
    ),
    ('name = "vit_base_patch16_224"\nimg_size = 224', 'name = "test_vit"\nimg_size = 48'),
    (r'targets = \["rocket", .*\]', 'targets = ["rocket"]'),
    (r"lr = 0.01\n", "lr = 0.03\n"),
    (r"epochs = \d+, milestones = \[\d+\]", "epochs = 8, milestones = [7]"),
    (r"steps = 2000", "steps = 10"),
    (r"shadow_models = 4", "shadow_models = 2\nrelearn_steps = 3"),
    (r"noise_steps = 250", "noise_steps = 5"),
    (r"(?s)\[sweep\].*", "[method.distruction]\nsteps = 10\n[method.unsir]\ncopies = 5\n"),
]
"""What a small machine changes in the preset; data sets, scenarios and the kind of training stay."""


@pytest.fixture(scope="module")
def grid():
    text = (resources.files("distruction.experiments") / "presets/cifar.toml").read_text()
    for pattern, replacement in SHRINK:
        text, count = re.subn(pattern, replacement, text)
        assert count > 0, pattern
    return text


@pytest.mark.slow
def test_bench_on_cifar_files(tmp_path, monkeypatch, capsys, grid):
    """All three scenarios from files and pretrained weights; the other form of the same files changes nothing."""
    first, second, weights = tmp_path / "first", tmp_path / "second", tmp_path / "vit.safetensors"
    for root, archived in ((first, "cifar100"), (second, "cifar10")):
        for name, train in (("cifar10", 300), ("cifar100", 500)):
            written = write_cifar(root, name, archive=name == archived, train=train, test=200)
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), weights)
    (tmp_path / "small.toml").write_text(grid)
    out = tmp_path / "out"

    def bench(root):
        command = ["distruction", "bench", "--grid", tmp_path / "small.toml", "--out", out, "--data", root]
        command += ["--pretrained", weights, "--device", "cpu", "--workers", 2, "--no-progress"]
        monkeypatch.setattr(sys, "argv", [*map(str, command)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 0
        return capsys.readouterr().out

    bench(first)
    rows = {(r["scenario"], r["method"]): r for r in json.loads((out / "report/results.json").read_text())}
    methods = {"baseline", "retrain", "finetune", "ssd", "unsir", "distruction"}
    expected = {(s, m) for s in ("full-class", "sub-class", "random") for m in methods} - {("random", "unsir")}
    assert set(rows) == expected
    for scenario, classes, tested in (("full-class", 100, 198), ("sub-class", 20, 198), ("random", 10, 200)):
        # Pixels and labels belong together: no guesser gets as many right.
        right = round(rows[scenario, "finetune"]["retain"] * tested / 100)
        assert binom.sf(right - 1, tested, 1 / classes) < 1e-6
        assert rows[scenario, "distruction"]["retain_reads"] == 0
        assert rows[scenario, "distruction"]["kl"] > 0
    # Rockets are class 69, and their positions those that the writer chose.
    rockets = (written["train"][1] == 69).nonzero()[0].tolist()
    for scenario in ("full-class", "sub-class"):
        forget_set = json.loads((out / f"forget-sets/{scenario}-rocket.json").read_text())
        assert forget_set["indices"] == rockets
    assert len(json.loads((out / "forget-sets/random-seed0.json").read_text())["indices"]) == 83

    assert "0 jobs done, 17 found finished" in bench(second)
