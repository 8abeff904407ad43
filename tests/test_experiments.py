"""The harness: what is stored is whole, what is finished stays, what failed is said; and the report's arithmetic."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy import stats
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import accuracy_score
from torch import nn

from distruction import UsageError, experiments, methods, scenarios
from distruction.data import load
from distruction.experiments import grid, jobs, materials, measure, results, runner, tables, workers
from distruction.experiments.materials import Context
from distruction.experiments.results import Summary, summarise
from distruction.experiments.store import Store

TINY = """
title = "tiny"
seeds = [0, 1]
methods = ["baseline", "retrain", "finetune", "ssd", "distruction"]
[network]
name = "vit-micro"
[train]
epochs = 1
[prepare]
steps = 3
[measure]
shadow_models = 2
relearn_steps = 3
[scenario.full-class]
data = "digits"
targets = ["3"]
[scenario.random]
data = "digits"
count = 20
[method.finetune]
epochs = 1
[method.distruction]
steps = 3
random = { steps = 2 }
[sweep]
scenario = "full-class"
values = { distruction = [0.1, 0.5] }
"""


# --- store ---------------------------------------------------------------------------------------


def test_store_returns_what_was_saved(tmp_path):
    store = Store(tmp_path)
    facts, value = {"a": 1, "b": [1.5, None]}, {"x": 0.1, "y": "ü"}
    assert store.load("cell", facts) is None
    store.save("cell", facts, value, {"f.bin": lambda p: p.write_bytes(b"12345")})
    assert store.load("cell", {"b": [1.5, None], "a": 1}) == value
    assert (store.folder("cell", facts) / "f.bin").read_bytes() == b"12345"
    assert store.load("cell", {**facts, "a": 2}) is None
    assert store.load("model", facts) is None
    store.save("cell", facts, {"x": 0.2})
    assert store.load("cell", facts) == {"x": 0.2}


def test_any_changed_byte_is_detected(tmp_path):
    store = Store(tmp_path)
    store.save("cell", {"a": 1}, {"x": 0.125}, {"f.bin": lambda p: p.write_bytes(b"12345")})
    folder = store.folder("cell", {"a": 1})
    for name in ("entry.json", "f.bin"):
        whole = (folder / name).read_bytes()
        for i in range(len(whole)):
            (folder / name).write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
            # A changed blank between JSON tokens changes nothing.
            assert store.load("cell", {"a": 1}) in ((None, {"x": 0.125}) if name == "entry.json" else (None,))
            (folder / name).write_bytes(whole[:i])
            found = store.load("cell", {"a": 1})
            assert found is None or whole[i:].isspace()
        (folder / name).write_bytes(whole)
    (folder / "f.bin").unlink()
    assert store.load("cell", {"a": 1}) is None


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    store = Store(tmp_path)
    with pytest.raises(OSError, match="disk full"):
        store.save("cell", {"a": 1}, {}, {"f": fail})
    assert list((tmp_path / "cell").iterdir()) == []
    (tmp_path / "cell" / ".draft-x").mkdir()
    store.sweep_drafts()
    assert list((tmp_path / "cell").iterdir()) == []


# --- grid ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", experiments.PRESETS)
def test_presets_are_grids(name):
    found = experiments.preset(name)
    if name == "demo":
        assert [s.name for s in found.scenarios] == ["full-class"]
        return
    assert {s.name for s in found.scenarios} == {"full-class", "sub-class", "random"}
    assert len(found.seeds) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = [", "is not TOML"),
        ("seed = [0]", "'seed' is unknown"),
        ("seeds = [0]", "has no network"),
        (TINY.replace("[0, 1]", "[0, -1]"), "seeds must be integers >= 0"),
        (re.sub("methods = .*", "methods = []", TINY), "methods is empty"),
        (TINY.replace('"ssd"', '"sdd"'), "method 'sdd' is unknown; choose baseline"),
        (TINY.replace("count = 20", ""), "has no count"),
        (TINY.replace('targets = ["3"]', ""), "has no targets"),
        (TINY.replace("scenario.random", "scenario.rand"), "unknown scenario"),
        (TINY + "teacher = [1]", "'teacher' is unknown"),
        (TINY.replace("[method.finetune]\nepochs", "[method.finetune]\nsteps"), "no setting 'steps'"),
        (TINY.replace("epochs = 1\n[prepare]", 'recipe = "magic"\n[prepare]'), "recipe 'magic' is unknown"),
        (TINY.replace("shadow_models = 2", "shadow_models = 3"), "shadow_models must be even"),
        (TINY.replace("{ distruction =", "{ baseline ="), "no main hyper-parameter"),
    ],
)
def test_grid_errors_name_the_place(text, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        grid.parse(text, "my.toml")


def test_missing_files_and_names():
    with pytest.raises(UsageError, match="no grid file"):
        experiments.read("nowhere.toml")
    with pytest.raises(UsageError, match="choose digits"):
        experiments.preset("digit")


def test_cells_and_their_keys(tmp_path):
    context = Context(tmp_path)
    cells = jobs.cells(grid.parse(TINY, "t"), context)
    # 5 methods x 2 scenarios x 2 seeds, and two brief cells of the sweep.
    assert len({c.id for c in cells}) == len(cells) == 22
    assert sum(c.facts["measure"]["brief"] for c in cells) == 2
    steps = {c.facts["split"]["scenario"]: c.facts["settings"] for c in cells if c.facts["method"] == "distruction"}
    assert steps["random"] == {"steps": 2}
    todo, needs, reused = runner.missing(cells, Store(tmp_path))
    kinds = [name.split("/")[0] for name in todo]
    # One model and posterior per seed serve both scenarios, and the shadow models all seeds.
    assert {k: kinds.count(k) for k in kinds} == {"cell": 22, "model": 2, "posterior": 2, "retrained": 4, "shadow": 2}
    assert reused == 0
    assert all(n in todo for need in needs.values() for n in need)
    changed = jobs.cells(grid.parse(TINY.replace("epochs = 1\n[method.dist", "epochs = 2\n[method.dist"), "t"), context)
    fresh = [c for c in changed if c.id not in {c.id for c in cells}]
    assert {c.facts["method"] for c in fresh} == {"finetune"}
    attacked = jobs.cells(grid.parse(TINY.replace("[measure]\n", "[measure]\nattacks = true\n"), "t"), context)
    fresh = [c for c in attacked if c.id not in {c.id for c in cells}]
    assert len(fresh) == 10
    assert all(c.facts["split"]["scenario"] == "full-class" and not c.facts["measure"]["brief"] for c in fresh)
    retrained = jobs.cells(grid.parse(TINY.replace("[train]\nepochs = 1", "[train]\nepochs = 2"), "t"), context)
    assert not {c.id for c in retrained} & {c.id for c in cells}


def test_settings_are_chosen_without_the_test_set(tmp_path, monkeypatch):
    """A poisoned test set changes neither the data of a validation run nor what is measured."""
    train, test = load("digits")
    poisoned = replace(test, images=255 - test.images, labels=9 - test.labels)
    monkeypatch.setattr(materials, "load", lambda *_, **__: (train, poisoned))
    tiny = replace(grid.parse(TINY, "tiny"), validation=0.25)
    found = []
    for cache in (materials._data, materials.data_hash):
        cache.cache_clear()
    context = Context(tmp_path)
    for cell in jobs.cells(tiny, context):
        split = materials.make_split(cell.facts["model"], cell.facts["split"], context)
        images = torch.cat([split.forget.images, split.retain.images, split.test.images])
        labels = torch.cat([split.forget.labels, split.retain.labels, split.test.labels])
        rows = [torch.cat([i.flatten(1), n[:, None].to(torch.uint8)], dim=1) for i, n in
                ((images, labels), (train.images, train.labels))]  # fmt: skip
        assert sorted(rows[0].tolist()) == sorted(rows[1].tolist())
        found.append(split.test.labels.bincount())
    for cache in (materials._data, materials.data_hash):
        cache.cache_clear()
    expected = (0.25 * train.labels.bincount().double()).round().long()
    assert all(torch.equal(count, expected) for count in found)
    # Without it the facts, and so the entries of older stores, are what they were.
    plain = jobs.cells(grid.parse(TINY, "tiny"), context)[0].facts["model"]["data"]
    assert set(plain) == {"name", "sha256"}


def test_nothing_stored_is_taken_for_a_method_of_another_revision(tmp_path, monkeypatch):
    cells = jobs.cells(grid.parse(TINY, "t"), Context(tmp_path))
    known = methods.get
    monkeypatch.setattr(methods, "get", lambda n: replace(known(n), revision=7) if n == "finetune" else known(n))
    fresh = [c for c in jobs.cells(grid.parse(TINY, "t"), Context(tmp_path)) if c.id not in {c.id for c in cells}]
    assert len(fresh) == 4
    assert {(c.facts["method"], c.facts["revision"]) for c in fresh} == {("finetune", 7)}


def test_unsir_has_no_random_cells(tmp_path):
    cells = jobs.cells(experiments.preset("digits"), Context(tmp_path))
    scenarios = {c.facts["split"]["scenario"] for c in cells if c.facts["method"].startswith("unsir")}
    assert scenarios == {"full-class", "sub-class"}


# --- a run ---------------------------------------------------------------------------------------


def run(out, text=TINY):
    return experiments.run(
        grid.parse(text, "tiny"), out, Context(out / "store"), devices=["cpu", "cpu"], command="c", progress=False
    )


def numbers(cells):
    """What must not depend on the run: everything but times and memory."""
    return {
        jobs.Job("cell", c.facts).id: {k: v for k, v in c.numbers.items() if k not in ("seconds", "peak_memory_mib")}
        for c in cells
    }


def entries(out):
    return {p.parent.relative_to(out): p.stat().st_mtime_ns for p in out.glob("store/*/*/entry.json")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    cells, outcome = run(out)
    return out, cells, outcome


def test_a_run_fills_the_grid(finished):
    out, cells, outcome = finished
    assert outcome.failures == {}
    assert outcome.done == 32
    assert len(cells) == 22
    for c in cells:
        declared = {"finetune": 100, "ssd": 100, "retrain": 100, "baseline": 0, "distruction": 0}[c.method]
        assert c.numbers["retain_read_percent"] == declared
        assert 0 <= c.numbers["retain"] <= 100
        assert c.numbers["seconds"] > 0 or c.method == "baseline"
    written = json.loads((out / "report" / "results.json").read_text())
    assert len(written) == 22
    indices = {p.name: json.loads(p.read_text())["indices"] for p in (out / "forget-sets").iterdir()}
    assert {len(v) for k, v in indices.items() if k.startswith("random")} == {20}


def test_every_metric_is_measured(finished):
    _, cells, _ = finished
    every = {name for name, column in results.COLUMNS.items() if column.group != "attacks"} - {"kl"}
    for c in cells:
        if c.brief:
            assert {"retain", "forget", "kl"} <= set(c.numbers)
            assert "zrf" not in c.numbers
        else:
            assert every <= set(c.numbers)
            assert all(math.isfinite(v) for v in c.numbers.values())
            assert ("kl" in c.numbers) == (c.method == "distruction")
    for c in cells:
        if c.method == "retrain":
            zeros = [c.numbers[m] for m in ("js_forget", "js_retain", "logits_forget", "logits_retain")]
            assert zeros == pytest.approx([0] * 4, abs=1e-12)
        if c.method == "baseline":
            assert c.numbers["relearn_steps"] == 0


def test_shadow_models_are_trained_on_two_halves(finished):
    files = list((finished[0] / "store/shadow").glob("*/logits.safetensors"))
    one, other = (load_file(file)["member"] for file in files)
    assert torch.equal(one, ~other)
    assert abs(int(one.sum()) - int(other.sum())) <= 1


def test_finished_cells_are_not_run_again(finished):
    out, cells, _ = finished
    before = entries(out)
    again, outcome = run(out)
    assert (outcome.done, outcome.reused) == (0, 22)
    assert entries(out) == before
    assert numbers(again) == numbers(cells)


def test_corrupted_entries_are_redone_with_the_same_result(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    cell = next(p for p in (out / "store/cell").glob("*/entry.json") if '"method": "ssd"' in p.read_text())
    cell.write_text(cell.read_text().replace("0", "1", 1))
    for file in (out / "store/model").glob("*/model.safetensors"):
        content = bytearray(file.read_bytes())
        content[-100] ^= 1
        file.write_bytes(content)
    again, outcome = run(out)
    # The cell, and the one model that it needs; the other model has no cell left to run.
    assert outcome.done == 2
    assert numbers(again) == numbers(finished[1])


def test_a_folder_has_one_bench_at_a_time(finished):
    with runner.alone(finished[0] / "store"), pytest.raises(UsageError, match="another bench"):
        run(finished[0])


def test_failures_are_recorded_and_listed(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    text = TINY.replace("[method.finetune]\nepochs = 1", "[method.finetune]\nepochs = 1\nlr = 1e30")
    cells, outcome = run(out, text)
    assert len(outcome.failures) == 4
    assert all("NonFiniteError" in message for _, message in outcome.failures.values())
    assert "finetune" not in {c.method for c in cells}
    assert len(cells) == 18
    page = (out / "report" / "index.html").read_text()
    assert "4 jobs failed" in page
    assert "cell digits full-class 3 finetune seed 0" in json.loads((out / "report" / "failures.json").read_text())
    assert "NonFiniteError" in page


class Workers:
    """Processes that all die when a job of ``killers`` runs, as those of a pool do, and are replaced."""

    def __init__(self, devices, threads):
        self.size = len(devices)
        self.running = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, job, context):
        assert len(self.running) < self.size
        self.running.append((job, Future()))
        self.starts[job.facts["method"]] += 1
        return self.running[-1][1]

    def wait(self, running, return_when):
        """As `concurrent.futures.wait`, once the workers have gone on."""
        future = self.running[0][1]
        if any(job.facts["method"] in self.killers for job, _ in self.running):
            for _, broken in self.running:
                broken.set_exception(BrokenProcessPool())
            self.running.clear()
        else:
            self.running.pop(0)
            future.set_result(0.1)
        return SimpleNamespace(done=[f for f in running if f.done()])


@pytest.mark.parametrize("size", [1, 4])
def test_a_death_is_charged_to_the_job_that_runs_alone(tmp_path, monkeypatch, size):
    """A job that kills its worker takes its neighbours with it, over and over; none of them fails for that."""
    made = []
    monkeypatch.setattr(Workers, "starts", Counter(), raising=False)
    monkeypatch.setattr(Workers, "killers", {"3", "6"}, raising=False)
    monkeypatch.setattr(runner, "Pool", lambda *given: made.append(Workers(*given)) or made[-1])
    monkeypatch.setattr(workers, "wait", lambda *given, **more: made[-1].wait(*given, **more))
    model = {"seed": 0, "data": {"name": "digits"}}
    cells = [Cell("cell", {"method": str(i), "model": model}) for i in range(9)]
    outcome = runner.run(cells, Context(tmp_path), devices=["cpu"] * size, threads=1, progress=False)
    assert sorted(title for title, _ in outcome.failures.values()) == ["cell digits 3 seed 0", "cell digits 6 seed 0"]
    assert outcome.done == 7
    assert max(Workers.starts.values()) <= workers.ATTEMPTS + 1


class Cell(jobs.Job):
    """A job that needs no other."""

    def needs(self):
        return iter(())


def test_jobs_behind_a_failure_are_listed_too(tmp_path):
    text = TINY.replace("[train]\nepochs = 1", "[train]\nepochs = 1\nlr = 1e30").replace("[0, 1]", "[0]")
    cells, outcome = run(tmp_path, text)
    assert cells == []
    own = [t for t, m in outcome.failures.values() if "NonFiniteError" in m]
    assert sorted(own) == ["model digits seed 0", "shadow digits seed 10000", "shadow digits seed 10001"]
    behind = [m for _, m in outcome.failures.values() if "not run" in m]
    assert len(behind) == len(outcome.failures) - len(own) == 15


def test_the_page_is_self_contained(finished):
    page = (finished[0] / "report" / "index.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:|#)', page) == []
    assert page.count("<img") == 5
    assert "published (CIFAR-100)" in page


@pytest.mark.slow
def test_killed_at_random_moments(finished, tmp_path):
    """Kill the bench, or one of its workers, again and again: nothing finished is lost, redone or counted twice."""
    (tmp_path / "tiny.toml").write_text(TINY)
    command = [sys.executable, "-m", "distruction", "bench", "--grid", str(tmp_path / "tiny.toml")]
    command += ["--out", str(tmp_path / "out"), "--workers", "2", "--no-progress"]
    rng = random.Random(0)
    out, seen = tmp_path / "out", {}
    for attempt in range(6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(entries(out)) <= len(seen):
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1))
        if process.poll() is not None:
            # All done, on a machine that is quick; the kills before it count.
            assert process.returncode == 0
            assert attempt > 2
            break
        if attempt % 3 == 2:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(rng.choice(children)), signal.SIGKILL)
            time.sleep(rng.uniform(0, 5))
        process.kill()
        process.wait()
        # Workers follow their parent.
        time.sleep(1)
        now = entries(out)
        assert all(now.get(name) == when for name, when in seen.items())
        assert len(now) > len(seen)
        seen = now
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = entries(out)
    assert len(after) == 32
    assert all(after[name] == when for name, when in seen.items())
    written = json.loads((tmp_path / "out/report/results.json").read_text())
    assert len(written) == 22
    cells = results.collect(jobs.cells(grid.parse(TINY, "t"), Context(tmp_path)), Store(out / "store"))
    assert numbers(cells) == numbers(finished[1])


# --- measurements --------------------------------------------------------------------------------


def split_of(scenario):
    train, test = load("digits")
    return scenarios.full_class(train, test, "3") if scenario == "full-class" else scenarios.random(train, test, 90, 0)


class Untrained(nn.Sequential):
    def __init__(self, seed):
        torch.manual_seed(seed)
        super().__init__(nn.Flatten(), nn.Linear(64, 10))


def shadows_of(split, pairs, unknown_only):
    """Random logits of shadow models; those of a model's own training examples are NaN if ``unknown_only``."""
    generator = torch.Generator().manual_seed(1)
    count = len(split.forget) + len(split.retain)
    made = []
    for i in range(2 * pairs):
        member = ~made[-1]["member"] if i % 2 else torch.rand(count, generator=generator) < 0.5
        train = 2 * torch.randn(count, 10, generator=generator)
        if unknown_only:
            train[member] = math.nan
        made.append({"member": member, "train": train, "test": 2 * torch.randn(360, 10, generator=generator)})
    return made


@pytest.mark.parametrize("scenario", ["full-class", "random"])
def test_measurements_are_those_of_the_scenarios_sets(scenario):
    split = split_of(scenario)
    model, retrained = Untrained(0), Untrained(1)
    references = measure.References(Untrained(2), retrained, Untrained(3), shadows_of(split, 2, unknown_only=True))
    options = {"batch_size": 100, "relearn_lr": 1e-3, "relearn_steps": 2, "brief": False}
    if scenario == "full-class":
        options["attacks"] = True
    value = measure.measure(model, references, split, {"measure": options, "split": {"scenario": scenario}}, None)
    found = value["metrics"]

    def logits(network, data):
        return network(data[range(len(data))][0]).detach()

    forget, retain = split.measured_forget, split.measured_retain
    for name, data in (("forget", forget), ("retain", retain), ("forget_train", split.forget)):
        assert found[name] == pytest.approx(100 * accuracy_score(data.labels, logits(model, data).argmax(1)))
        assert value["counts"][name] == len(data)
    size = 64 if scenario == "full-class" else 128
    right = (logits(model, retain).argmax(1) == retain.labels).double()
    assert found["retain_batch_mean"] == pytest.approx(100 * np.mean([b.mean().item() for b in right.split(size)]))
    for name, data in (("js_forget", split.forget), ("js_retain", retain)):
        p, q = (torch.softmax(logits(m, data).double(), 1).numpy() for m in (model, retrained))
        assert found[name] == pytest.approx((jensenshannon(p, q, axis=1, base=2) ** 2).mean(), rel=1e-5)
    held_out = split.test.subset(split.held_out)
    losses = [F.cross_entropy(logits(model, d), d.labels, reduction="none") for d in (split.forget, held_out)]
    u = stats.mannwhitneyu(-losses[0], -losses[1]).statistic
    assert found["auc_loss"] == pytest.approx(100 * u / len(losses[0]) / len(losses[1]), abs=0.01)
    # No shadow model is asked about what it was trained on: those answers would be NaN.
    assert 30 < found["auc_lira"] < 70
    if scenario == "full-class":
        assert {n for n, c in results.COLUMNS.items() if c.group == "attacks"} <= set(found)
        moved = [a - b for a, b in zip(model.parameters(), Untrained(2).parameters(), strict=True)]
        assert found["distance"] == pytest.approx(torch.cat([m.flatten() for m in moved]).norm().item())
        rounded = Untrained(0).bfloat16().float()
        assert found["bf16"] == pytest.approx(100 * accuracy_score(forget.labels, logits(rounded, forget).argmax(1)))
    # And the model is as it was.
    assert torch.equal(model[1].weight, Untrained(0)[1].weight)


def test_the_likelihood_ratio_attack_is_fair_and_finds_members():
    """Random shadows tell nothing, though held-out examples are unknown to twice as many; a model that is more
    confident of the forget set than all of them is found out."""
    split = split_of("random")
    forget = torch.randn(90, 10)
    test = torch.randn(360, 10)
    retain_train = torch.randn(len(split.retain), 10)
    aucs = []
    for added in (0.0, 20.0):
        forget[torch.arange(90), split.forget.labels] += added
        found = measure._attacks(retain_train, test, forget, shadows_of(split, 4, unknown_only=True), split)
        aucs.append(found["auc_lira"])
        assert found["auc_lira"] >= found["tpr_lira"] - 1
    # The standard deviation of the area under the null hypothesis is 3.4 points (Mann, Whitney 1947).
    assert abs(aucs[0] - 50) < 4 * 100 * math.sqrt((90 + 360 + 1) / (12 * 90 * 360))
    assert aucs[1] == 100
    assert found["tpr_lira"] == 100


# --- report --------------------------------------------------------------------------------------


def test_summary_is_scipys():
    values, references = [97.0, 98.5, 96.2], [95.0, 99.0, 96.0]
    found = summarise(values, [0, 1, 2], references, count=36)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.std == pytest.approx(stats.tstd(values))
    assert found.gap == pytest.approx((2 + 0.5 + 0.2) / 3)
    alone = summarise([1.0], [0])
    assert all(math.isnan(v) for v in (alone.std, alone.low, alone.high, alone.gap))


def test_targets_of_one_seed_are_not_independent():
    """Five targets on three seeds are three values: the mean's error is that of the seeds' means."""
    rng = np.random.default_rng(0)
    values = rng.normal([[90], [95], [92]], 0.1, (3, 5))
    seeds = np.repeat([[7], [1], [4]], 5, axis=1)
    found = summarise(values.ravel().tolist(), seeds.ravel().tolist(), values.ravel() - 1.0)
    means = values.mean(axis=1)
    low, high = stats.t.interval(0.95, 2, loc=means.mean(), scale=stats.sem(means))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert (found.n, found.std, found.gap) == (3, pytest.approx(stats.tstd(means)), pytest.approx(1.0))
    assert found.values == pytest.approx(means[[1, 2, 0]])
    # The interval of fifteen independent values would be far too narrow.
    naive = stats.t.interval(0.95, 14, loc=values.mean(), scale=stats.sem(values.ravel()))
    assert naive[1] - naive[0] < 0.5 * (high - low)
    one_seed = summarise([90.0, 95.0], [0, 0], count=36)
    assert (one_seed.n, one_seed.values) == (1, (92.5,))
    assert tables.entry(one_seed, 1) == "92.5"


def test_three_seeds_are_shown_and_four_have_an_interval():
    assert tables.entry(summarise([97.0, 98.5, 96.2], [0, 1, 2]), 1) == "97.2 (97.0, 98.5, 96.2)"
    assert tables.entry(summarise([97.0, 98.5], [0, 1]), 1) == "97.8 (97.0, 98.5)"
    values = [97.0, 98.5, 96.2, 97.9]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert tables.entry(summarise(values, range(4)), 1) == f"97.4 ± {(high - low) / 2:.1f}"
    assert tables.entry(Summary(97.2, 1.17, 94.3, 100.1, 3), 1) == "97.2 (s 1.2)"
    assert tables.entry(summarise([256.0] * 3, range(3)), 0) == "256"


def test_summaries_are_read_as_written():
    cells = [cell(m, 90 + s / 7, 3.0, s) for m in ("retrain", "ssd") for s in range(3)]
    found = results.tables(cells)
    assert tables.read(tables.comma_separated(found)) == found
    # A file without the values of the seeds, as older versions wrote it.
    old = "\n".join(line.rpartition(",")[0] for line in tables.comma_separated(found).splitlines())
    (table,) = tables.read(old).values()
    assert table["ssd"]["retain"] == replace(found["full-class"]["ssd"]["retain"], values=())


@pytest.mark.parametrize("folder", ["digits", "fashion"])
def test_committed_tables_are_made_from_the_committed_numbers(folder):
    place = Path(__file__).parents[1] / "benchmarks/results" / folder
    for scenario, table in tables.read((place / "summary.csv").read_text()).items():
        for name, (_, rows) in tables.forms(scenario, table).items():
            assert len(rows[0]) > 1
            assert (place / f"{scenario}-{name}.md").read_text() == tables.markdown(rows)


def test_one_accuracy_has_wilsons_interval():
    found = summarise([100 * 35 / 36], [0], count=36)
    expected = stats.binomtest(35, 36).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((100 * expected.low, 100 * expected.high))
    assert tables.entry(found, 1) == "97.2 [85.8, 99.5]"
    assert tables.entry(summarise([12.0], [0]), 0) == "12"


def test_numbers_are_written_as_a_reader_expects():
    assert tables.number(-0.04, 1) == "0.0"
    assert tables.number(-1234.56, 1) == "−1,234.6"
    assert tables.number(math.nan, 1) == "–"
    assert tables.entry(summary(2.0), 1) == "2.0 ± 0.2"
    assert [tables.title(m) for m in ("ssd", "unsir+kl", "finetune")] == ["SSD", "UNSIR + KL", "finetune"]


def summary(mean, gap=math.nan):
    return Summary(mean, 0.1, mean - 0.2, mean + 0.2, 4, gap)


def test_bold_is_the_best_entry_other_than_baseline_and_retrain():
    table = {
        "baseline": {"retain": summary(99.0), "forget": summary(99.0, 78.0)},
        "retrain": {"retain": summary(98.9), "forget": summary(21.0, 0.0)},
        "ssd": {"retain": summary(97.02), "forget": summary(0.0, 21.0)},
        "scrub": {"retain": summary(98.0), "forget": summary(40.0, 19.0)},
        "distruction": {"retain": summary(97.04), "forget": summary(17.0, 4.0)},
    }
    assert results.best(table, "retain") == {"scrub"}
    assert results.best(table, "forget") == {"distruction"}
    # The paper's table has the paper's methods only; two that print alike are both the best.
    rows = tables.paper_shape("sub-class", table, tables.bold_markdown)
    assert rows[0] == ["", "baseline", "retrain", "SSD", "DiStruction"]
    assert rows[1] == ["D_r %", "99.0 ± 0.2", "98.9 ± 0.2", "**97.0 ± 0.2**", "**97.0 ± 0.2**"]
    assert rows[3] == ["published (CIFAR-20)", "95.73 ± 0.00", "94.61 ± 0.13", "95.13 ± 0.00", "95.16"]
    assert tables.latex(rows, "50 % & a_b").splitlines()[2:8] == [
        r"\caption{50 \% \& a\_b}",
        r"\begin{tabular}{lrrrr}",
        r"\toprule",
        r" & baseline & retrain & SSD & DiStruction \\",
        r"\midrule",
        r"$\mathcal{D}_r$ \% & 99.0 $\pm$ 0.2 & 98.9 $\pm$ 0.2 & \textbf{97.0 $\pm$ 0.2} & \textbf{97.0 $\pm$ 0.2} \\",
    ]
    assert tables.markdown(rows).splitlines()[1] == "|---|---:|---:|---:|---:|"
    gaps = tables.gaps(table, tables.bold_markdown)
    assert gaps == [
        ["method", "D_f %"],
        ["baseline", "78.0"],
        ["SSD", "21.0"],
        ["SCRUB", "19.0"],
        ["DiStruction", "**4.0**"],
    ]


def cell(method, retain, forget, seed):
    value = {"counts": {"retain": 100, "forget": 50}}
    numbers = {"retain": retain, "forget": forget}
    return results.Cell("full-class", "3", method, seed, {}, False, numbers, value, {})


def test_the_contest_is_paired_and_among_those_that_forget():
    d_r = {"retrain": (99, 99, 99), "finetune": (98, 98, 98), "ssd": (90, 95, 91), "distruction": (91, 97, 90)}
    d_f = {"retrain": 0, "finetune": 60, "ssd": 2, "distruction": 4}
    cells = [cell(m, v, d_f[m], seed) for m, values in d_r.items() for seed, v in enumerate(values)]
    table = results.tables(cells)["full-class"]
    found = results.contest(cells, table)
    assert (found.rival, found.forgets) == ("ssd", True)
    test = stats.ttest_rel(d_r["distruction"], d_r["ssd"])
    assert found.difference.mean == pytest.approx(2 / 3)
    assert (found.difference.low, found.difference.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    strict = results.contest(cells, table, limit=1.0)
    assert strict == results.Contest(None, False, None)
    assert results.contest(cells, {"ssd": table["ssd"]}) is None
    # D_f of every cell is 0 to 60 % of 50 images.
    assert cells[0].intervals["forget"] == pytest.approx(
        (0, 100 * stats.binomtest(0, 50).proportion_ci(method="wilson").high)
    )


def test_gaps_are_to_retraining_proper():
    """`ssd_compat` only resets the head: no reference."""
    cells = [cell("baseline", 99.0, 98.0, 0), replace(cell("retrain", 97.0, 50.0, 0), settings={"ssd_compat": True})]
    assert math.isnan(results.tables(cells)["full-class"]["baseline"]["forget"].gap)
    cells[1] = replace(cells[1], settings={})
    assert results.tables(cells)["full-class"]["baseline"]["forget"].gap == 48.0
