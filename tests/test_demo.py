"""The main job on real data: one class goes, the others stay."""

import json

import numpy as np
import pytest
import torch

from distruction import Posterior, UsageError, data, demo, metrics, models, report


def test_a_digit_is_forgotten_and_the_others_stay(tmp_path):
    (run,) = demo.run_demo(
        tmp_path / "out", classes=["8"], seeds=[0], overwrite=False, ablations=True, backend="auto", progress=False
    )
    baseline, ours, retrain = (run.rows[name] for name in ("baseline", "DiStruction", "retrain"))
    assert baseline["retain_test"] >= 95
    assert run.loss_of_retained <= 6
    assert ours["forget_test"] <= 5
    assert ours["forget_train"] <= 2
    assert ours["retain_read"] == 0
    assert retrain["forget_test"] == 0
    for ablation in ("constant std", "Fisher std"):
        assert run.rows[ablation]["retain_test"] < ours["retain_test"]

    folder = tmp_path / "out" / "class-8-seed-0"
    for picture in ("curves.png", "examples.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())["runs"]
    assert written == [{"class": "8", "seed": 0, "metrics": run.rows}]

    model, _ = models.load(folder / "model.safetensors")
    _, retain = data.forget_split(data.load("digits")[1], "8")
    assert metrics.accuracy(*metrics.predict(model, data.loader(retain, batch_size=512))) == ours["retain_test"]
    posterior = Posterior.load(folder / "posterior.safetensors", model=model)
    precision = torch.cat([s.flatten() for s in posterior.stds.values()]).double() ** -2
    (std,) = {s.unique().item() for s in demo.constant_std(posterior).stds.values()}
    assert abs(std**-2 / precision.mean().item() - 1) < 1e-6


def test_fisher_std_is_the_squared_gradient_of_each_example():
    torch.manual_seed(0)
    images = data.load("digits")[0].subset(torch.arange(5))
    model = models.create(**demo.MODEL)
    posterior = Posterior.around(model, 0.1)
    posterior.metadata.update(evidence=20.0)
    found = demo.fisher_std(model, images, posterior)
    fisher = torch.zeros_like(model.head.weight)
    for x, y in data.loader(images, batch_size=1):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        fisher += torch.autograd.grad(loss, model.head.weight)[0] ** 2
    # 1/std**2 = fan_in (64) + 20 data points times the mean over five examples
    torch.testing.assert_close(found.stds["head.weight"], (64 + 20 / 5 * fisher).rsqrt())


def test_a_phase_is_counted_once_for_each_time_that_it_ran():
    def run(name, seed, forget):
        rows = {"baseline": 40, "(preparation)": 10, "DiStruction": forget, "retrain": 30, "Fisher std": 2}
        return demo.Run(name, seed, {method: {"seconds": float(s)} for method, s in rows.items()})

    seconds = demo.phases([run("3", 0, 1), run("8", 0, 5), run("3", 1, 7)])
    assert list(seconds.values()) == [80.0, 20.0, 13.0, 90.0, 6.0]


def test_the_spread_of_runs_is_of_a_sample():
    """Divided by n - 1, as everywhere."""
    values = [97.0, 98.5, 96.2, 97.9]
    runs = [demo.Run("3", seed, {"ssd": {"retain_test": value}}) for seed, value in enumerate(values)]
    mean, std = demo.summary(runs)["ssd"]["retain_test"]
    assert (mean, std) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))
    assert report._number((mean, std)) == "97.4 (s 1.0)"


def test_a_class_and_a_seed_are_given_once(tmp_path):
    for classes, seeds in ((["3", "3"], [0]), (["3"], [1, 1])):
        with pytest.raises(UsageError, match="name each class and each seed once"):
            demo.run_demo(
                tmp_path / "o", classes=classes, seeds=seeds, overwrite=False, ablations=False, backend="auto",
                progress=False,
            )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
