"""The main job on real data: one class goes, the others stay."""

import json

import pytest
import torch

from distruction import Posterior, UsageError, data, metrics, models
from distruction.experiments import Context, jobs, preset
from distruction.experiments import demo as demos
from distruction.experiments.materials import fresh
from distruction.experiments.results import Cell
from distruction.experiments.store import Store
from distruction.methods.ablations import constant_std, fisher_std


def test_a_digit_is_forgotten_and_the_others_stay(tmp_path):
    found = demos.run(
        tmp_path / "out", classes=["8"], seeds=[0], overwrite=False, ablations=True, backend="auto", progress=False
    )
    numbers = {c.method: c.numbers for c in found.cells}
    baseline, ours, retrain = (numbers[name] for name in ("baseline", "distruction-auto", "retrain"))
    assert baseline["retain"] >= 95
    assert found.loss_of_retained() == (baseline["retain"] - ours["retain"], "8", 0)
    assert found.loss_of_retained()[0] <= 6
    assert ours["forget"] <= 5
    assert ours["forget_train"] <= 2
    assert ours["retain_reads"] == 0
    assert retrain["forget"] == 0
    for ablation in ("distruction-constant", "distruction-fisher"):
        assert numbers[ablation]["retain"] < ours["retain"]

    assert {p.name for p in (tmp_path / "out").iterdir()} == {"metrics.json", "class-8-seed-0"}
    folder = tmp_path / "out" / "class-8-seed-0"
    for picture in ("curves.png", "examples.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())["cells"]
    assert [{k: c[k] for k in numbers[c["method"]]} for c in written] == [dict(c.numbers) for c in found.cells]

    model, _ = models.load(folder / "model.safetensors")
    _, retain = data.forget_split(data.load("digits")[1], "8")
    assert metrics.accuracy(*metrics.predict(model, data.loader(retain, batch_size=512))) == ours["retain"]
    posterior = Posterior.load(folder / "posterior.safetensors", model=model)
    precision = torch.cat([s.flatten() for s in posterior.stds.values()]).double() ** -2
    (std,) = {s.unique().item() for s in constant_std(posterior).stds.values()}
    assert abs(std**-2 / precision.mean().item() - 1) < 1e-6


def test_fisher_std_is_the_squared_gradient_of_each_example():
    torch.manual_seed(0)
    images = data.load("digits")[0].subset(torch.arange(5))
    model = models.create(**demos.MODEL)
    posterior = Posterior.around(model, 0.1)
    posterior.metadata.update(evidence=20.0)
    found = fisher_std(model, images, posterior)
    fisher = torch.zeros_like(model.head.weight)
    for x, y in data.loader(images, batch_size=1):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        fisher += torch.autograd.grad(loss, model.head.weight)[0] ** 2
    # 1/std**2 = fan_in (64) + 20 data points times the mean over five examples
    torch.testing.assert_close(found.stds["head.weight"], (64 + 20 / 5 * fisher).rsqrt())


def test_the_untrained_model_is_that_of_the_train_command(tmp_path):
    """`distruction train --seed 3` seeds PyTorch's generator and makes the model."""
    context = Context(tmp_path)
    torch.manual_seed(3)
    expected = models.create(**demos.MODEL)
    facts = {**jobs.cells(preset("demo"), context)[0].facts["model"], "seed": 3}
    found = fresh(facts, context)
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), expected.parameters(), strict=True))


def test_a_phase_is_counted_once_for_each_time_that_it_ran(tmp_path):
    """Two classes share a seed's model, its posterior and, of the ablation, the posterior made of that one."""
    store = Store(tmp_path)
    seconds = {"baseline": 0.0, "retrain": 30.0, "distruction-auto": 1.0, "distruction-fisher": 2.0}
    cells = []
    for seed in (0, 1):
        for target in ("3", "8") if seed == 0 else ("3",):
            for method in seconds:
                model, split = {"seed": seed}, {"target": target}
                facts = {"model": model, "retrained": {"model": model, "split": split}}
                learnt = {"model": model, "prepare": {}}
                if method == "distruction-auto":
                    facts["posterior"] = learnt
                if method == "distruction-fisher":
                    facts["posterior"] = {"model": model, "std": "fisher", "posterior": learnt}
                cells.append(
                    Cell("full-class", target, method, seed, {}, False, {"seconds": seconds[method]}, {}, facts)
                )
        store.save("model", {"seed": seed}, {"seconds": 40.0})
        store.save("posterior", {"model": {"seed": seed}, "prepare": {}}, {"seconds": 10.0})
        store.save(
            "posterior",
            {"model": {"seed": seed}, "std": "fisher", "posterior": {"model": {"seed": seed}, "prepare": {}}},
            {"seconds": 0.5},
        )
    assert list(demos.phases(cells, store).values()) == [80.0, 20.0, 3.0, 90.0, 7.0]


def test_a_class_and_a_seed_are_given_once(tmp_path):
    for classes, seeds in ((["3", "3"], [0]), (["3"], [1, 1])):
        with pytest.raises(UsageError, match="name each class and each seed once"):
            demos.run(
                tmp_path / "o", classes=classes, seeds=seeds, overwrite=False, ablations=False, backend="auto",
                progress=False,
            )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_the_presets_of_the_paper_run_no_ablation():
    for name in ("digits", "fashion", "cifar"):
        assert {"distruction-constant", "distruction-fisher"}.isdisjoint(preset(name).methods)
