"""The benchmarks: the harness's arithmetic, and that the peers do the work that they are compared by."""

import csv
import dataclasses
import json
import math
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from benchmarks import contestants, gpu, harness, memory, models, our_ops, priors, profile, tables, tune
from distruction import Posterior, experiments, methods, scenarios
from distruction.experiments import runner
from distruction.experiments.grid import tomllib
from distruction.ops import backends

ROOT = Path(__file__).parents[1]
SHAPES = [torch.Size(s) for s in ((7, 5), (64,), (1, 3, 3))]


def commands():
    """What the README, the pages and the benchmarks themselves call benchmarks by."""
    files = [
        ROOT / "README.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("benchmarks/tuning/*"),
    ]
    return {c for file in files for c in re.findall(r"python (?:-m )?benchmarks[./]\w+(?:\.py)?", file.read_text())}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("command", sorted(commands()))
def test_a_command_that_is_written_somewhere_starts(command, monkeypatch, capsys):
    # Only as modules: as scripts, their folder's profile.py hides the standard library's.
    module = re.fullmatch(r"python -m (benchmarks\.\w+)", command)[1]
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 0
    assert "--help" in capsys.readouterr().out


@pytest.mark.parametrize("plan", sorted(ROOT.glob("benchmarks/tuning/*.toml")), ids=lambda p: p.stem)
def test_tuning_gives_every_method_eight_trials_of_settings_that_it_has(plan):
    plan = tomllib.loads(plan.read_text())
    for name in ("trials", *scenarios.NAMES):
        for method, options in plan.get(name, {}).items():
            methods.check(method, options)
            assert math.prod(map(len, options.values())) == 8


def test_trials_are_of_the_plans_classes_on_held_out_data_and_written_best_first(tmp_path, monkeypatch):
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'preset = "digits"\ntarget = { full-class = "8", sub-class = "3" }\nseed = 3\n'
        "[trials]\nssd = { alpha = [1.0, 2.0, 3.0] }\n[random]\nssd = { alpha = [0.5, 1.0, 2.0] }\n"
    )
    numbers = {  # retraining first
        "full-class": [(99, 0), (99.5, 6), (80, 4.9), (85, 0)],
        "sub-class": [(99, 50), (90, 30), (70, 5.1), (60, 6)],
        "random": [(98, 90, 50), (98, 90, 80), (90, 82, 50), (98, 95, 50)],
    }

    def collected(cells, store):
        found = []
        for job in cells:
            scenario = job.facts["split"]["scenario"]
            own = numbers[scenario][sum(c.scenario == scenario for c in found)]
            measured = dict(zip(tune.GAPS, own, strict=False))
            found.append(
                SimpleNamespace(
                    scenario=scenario, method=job.facts["method"], settings=job.facts["settings"], numbers=measured
                )
            )
        return found

    asked = []
    monkeypatch.setattr(runner, "run", lambda cells, *given, **more: asked.extend(cells) or runner.Outcome())
    monkeypatch.setattr(tune, "collect", collected)
    tune.main(plan, tmp_path / "out")
    assert {(j.facts["split"]["scenario"], j.facts["split"]["target"]) for j in asked} == {
        ("full-class", "8"),
        ("sub-class", "3"),
        ("random", ""),
    }
    assert {j.facts["model"]["data"]["validation"] for j in asked} == {0.2}
    assert {j.facts["model"]["seed"] for j in asked} == {3}
    assert all(j.facts["measure"]["brief"] == (j.facts["split"]["scenario"] != "random") for j in asked)
    found = json.loads((tmp_path / "out/trials.json").read_text())
    order = {s: [t["settings"]["alpha"] for t in found if (t["scenario"], t["method"]) == (s, "ssd")] for s in numbers}
    # D_r among those of D_f <= 5; else the lowest D_f; nearest to retraining.
    assert order == {"full-class": [3.0, 2.0, 1.0], "sub-class": [2.0, 3.0, 1.0], "random": [2.0, 1.0, 0.5]}


def test_the_settings_of_fashion_are_those_of_its_best_trials():
    trials = json.loads((ROOT / "benchmarks/results/tuning/fashion.json").read_text())
    grid = experiments.preset("fashion")
    tuned = set(grid.methods) - {"baseline", "retrain", "distruction-auto"}
    for scenario in ("full-class", "sub-class"):
        for name in tuned:
            own = [t for t in trials if (t["scenario"], t["method"]) == (scenario, name)]
            assert len(own) == 8
            if forgot := [t for t in own if t["forget"] <= 5.0]:
                best = max(forgot, key=lambda t: t["retain"])
            else:
                best = min(own, key=lambda t: t["forget"])
            assert grid.settings_of(name, scenario) == best["settings"]


def test_what_the_page_says_of_fashions_methods_is_in_the_files():
    page = " ".join((ROOT / "docs/results.md").read_text().split())
    with open(ROOT / "benchmarks/results/fashion/summary.csv", newline="") as file:
        mean = {(r["scenario"], r["method"], r["metric"]): float(r["mean"]) for r in csv.DictReader(file)}
    trials = json.loads((ROOT / "benchmarks/results/tuning/fashion.json").read_text())
    best = {
        name: next(t for t in trials if (t["scenario"], t["method"]) == ("full-class", name))
        for name in ("teacher", "scrub", "ssd")
    }

    def behind(scenario, name, other):
        return mean[scenario, other, "retain"] - mean[scenario, name, "retain"]

    ours = "distruction-auto"
    less, published, delete, amnesiac = (
        abs(behind("full-class", ours, name)) for name in ("retrain", "distruction", "delete", "amnesiac")
    )
    assert (
        f"keeps {less:.1f} points less D_r than retraining, {published:.1f} more than DiStruction as published" in page
    )
    assert (
        f"tuned and {delete:.1f} more than DELETE. Amnesiac, which reads all retain data, keeps {amnesiac:.1f} more"
        in page
    )
    bags = [best[name]["forget"] for name in ("teacher", "scrub")]
    sandals = [mean["full-class", name, "forget"] for name in ("teacher", "scrub")]
    assert "leave {:.1f} and {:.1f} % of bags leave {:.0f} and {:.0f} % of sandals".format(*bags, *sandals) in page
    kept = mean["full-class", "ssd", "retain"]
    assert f"D_r is {best['ssd']['retain']:.1f} without bags, keep {kept:.1f} without sandals" in page
    lost = [behind("sub-class", name, "baseline") for name in (ours, "distruction", "delete")]
    assert "pays: {:.0f} points of D_r, DiStruction as published {:.0f} and DELETE {:.0f}".format(*lost) in page
    assert f"reaches it, for {behind('sub-class', 'amnesiac', 'baseline'):.1f} points" in page
    assert mean["sub-class", "amnesiac", "forget"] <= 5.0
    destroyed = [t for t in trials if (t["scenario"], t["method"]) == ("sub-class", "ssd") and t["forget"] < 90.0]
    assert max(t["retain"] for t in destroyed) < 20.0


@pytest.fixture
def workload():
    return contestants.Workload(SHAPES, torch.device("cpu"))


def test_shapes_are_the_published_models():
    # Dosovitskiy et al. 2021, table 1: ViT-Base has 86 M parameters, ViT-Large 307 M, ViT-Huge 632 M.
    totals = {m: sum(map(math.prod, contestants.parameter_shapes(m))) / 1e6 for m in contestants.MODELS}
    assert totals["ViT-B/16"] == pytest.approx(86, abs=1)
    assert totals["ViT-L/16"] == pytest.approx(307, rel=0.015)
    assert totals["ViT-H/14"] == pytest.approx(632, rel=0.01)


def test_contestants_take_turns_and_the_slow_one_sits_out():
    calls, clock = [], {"a": 1.0, "b": 2.0}

    def timer(run):
        return clock[run()]

    def contestant(name):
        return lambda: calls.append(name) or name

    timings = harness.measure({n: contestant(n) for n in clock}, timer, rounds=9, warmup=1, budget=8.0)
    assert calls[:2] == ["a", "b"]
    assert all(set(calls[i : i + 2]) == {"a", "b"} for i in range(2, 10, 2))
    assert timings["a"] == harness.Timing(1.0, 1.0, 1.0, 8)
    assert timings["b"].rounds == 4


def test_a_repeated_contestant_counts_once():
    turns = iter(range(100))
    times = [1.0, 3.0]
    clock = [0.0]

    def run():
        clock[0] += times[next(turns) % 2]

    def timer(contestant):
        before = clock[0]
        contestant()
        return clock[0] - before

    assert harness.measure({"pair": harness.Repeated(run, 2)}, timer, rounds=3)["pair"].median == 2.0


def test_quantiles_are_numpys():
    seconds = np.random.default_rng(0).gamma(2.0, size=24)
    timing = harness.Timing.of(seconds.tolist())
    expected = np.quantile(seconds, [0.5, 0.2, 0.8])
    assert (timing.median, timing.low, timing.high) == pytest.approx(tuple(expected))


def test_ratios_and_files(tmp_path):
    times = {"distruction (cpp)": 0.1, "eager": 1.5, harness.TRIAD: 0.08}
    timings = {name: harness.Timing(t, t, t, 3) for name, t in times.items()}
    rows = harness.rows_of(
        timings, baseline="eager", limit=harness.TRIAD, model="m", parameters=10, threads=1, op="sample"
    )
    assert (rows[0].median, rows[0].speedup, rows[0].of_limit) == (100.0, 15.0, 0.8)
    harness.write(tmp_path / "x", rows, {"command": "c", **harness.environment(torch.device("cpu"))})
    assert json.loads((tmp_path / "x.json").read_text())["rows"][0]["speedup"] == 15.0
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 4
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_the_triad_moves_the_bytes_that_it_is_asked_for():
    out = harness.triad(1200, torch.device("cpu"))()
    assert out.numel() == 100
    assert out.eq(1.5).all()


def test_eager_kl_is_the_divergence_and_its_gradients(workload):
    mean, std = torch.tensor([0.3, -2.0]).requires_grad_(), torch.tensor([0.5, 0.1]).requires_grad_()
    prior = torch.tensor([0.2, 1.0]), torch.tensor([0.4, 0.2])
    expected = kl_divergence(Normal(mean, std), Normal(*prior)).sum()
    expected.backward()
    kl, grad_mean, grad_std = contestants.eager_kl(mean.detach(), std.detach(), *prior)
    torch.testing.assert_close((kl.float(), grad_mean, grad_std), (expected.detach(), mean.grad, std.grad))


@pytest.mark.parametrize("with_prior", [False, True])
def test_foreach_updates_as_eager(with_prior, monkeypatch):
    eager, foreach = (contestants.Workload(SHAPES, torch.device("cpu")) for _ in range(2))
    for m in eager.mean + foreach.mean:
        m.add_(0.01)
    before = [t.clone() for t in eager.mean + eager.std]
    # The same normals for both, and steps large enough to see.
    eps = {s: torch.randn(s) for s in SHAPES}
    monkeypatch.setattr(torch, "randn_like", lambda t: eps[t.shape].clone())
    monkeypatch.setattr(torch.Tensor, "normal_", lambda t: t.copy_(torch.cat([e.flatten() for e in eps.values()])))
    monkeypatch.setattr(contestants, "SCALE", 300.0)
    monkeypatch.setattr(contestants, "LR", 1.0)
    if with_prior:
        kl = contestants.foreach_step(foreach)().double()
        torch.testing.assert_close(kl, contestants.eager_steps(eager)(), rtol=1e-4, atol=0)
    else:
        contestants.foreach_step_without_prior(foreach)()
        contestants.eager_step_without_prior(eager)()
    assert not any(torch.equal(a, b) for a, b in zip(before, eager.mean + eager.std, strict=True))
    for name in ("mean", "std", "param"):
        torch.testing.assert_close(getattr(foreach, name), getattr(eager, name))


@pytest.mark.parametrize("make", [contestants.eager_gauss_newton, contestants.foreach_gauss_newton])
def test_gauss_newton_adds_precisions_as_the_op(make, monkeypatch):
    for module in (contestants, our_ops):
        monkeypatch.setattr(module, "EVIDENCE", 1e10)
    ours, peer = (contestants.Workload(SHAPES, torch.device("cpu")) for _ in range(2))
    before = [s.clone() for s in ours.std]
    make(peer)()
    contestants.our_gauss_newton(ours, "reference")[""]()
    for old, expected, found in zip(before, ours.std, peer.std, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert (found < 0.9 * old).float().mean() > 0.5
    # Samples of the new posterior, by other normals.
    eps = torch.cat([((p - m) / s).flatten() for p, m, s in zip(peer.param, peer.mean, peer.std, strict=True)])
    assert abs(eps.std() - 1) < 4.5 / (2 * len(eps)) ** 0.5


@pytest.mark.parametrize("op", contestants.OPS)
def test_every_contestant_runs(op, workload):
    backend = backends.resolve("auto", "cpu").__name__.rsplit(".", 1)[1]
    made = contestants.OPS[op].make(workload, [backend])
    with torch.no_grad():
        for name, run in made.items():
            if not name.startswith("torch.compile"):  # minutes
                run()
    assert all(t.isfinite().all() for t in workload.mean + workload.std + workload.param)


# --- the GPU's, as far as a CPU goes ------------------------------------------------------------------


def test_no_optimizer_takes_anothers_sample_for_weights_that_somebody_wrote(monkeypatch):
    # Else it would make them its means, in a pass of its own, at each of its steps.
    w = our_ops.Workload(SHAPES, torch.device("cpu"))
    named = contestants.OPS["optimizer step"].makers(["cpp"])
    runs = [run for name in ("distruction (cpp)", "eager", contestants.ADAMW) for run in named[name](w).values()]
    for run in runs:
        run()
    taken = []
    monkeypatch.setattr("distruction.optim.groups.take_over", lambda *args, **kwargs: taken.append(args))
    for run in runs:
        run()
    assert not taken


def test_a_queued_call_is_waited_for_longer_until_the_host_is_ahead(monkeypatch):
    waits, enough = [], 8 * harness.QueuedTime.SHORTEST

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            pass

        synchronize = record

        def query(self):
            # The wait is over, and the start has passed, while the host is still launching.
            return waits[-1] < enough

        def elapsed_time(self, end):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", waits.append, raising=False)
    timer, calls = harness.QueuedTime(), []

    def run():
        calls.append(None)

    assert timer(run) == 2e-3
    assert waits == [harness.QueuedTime.SHORTEST * 4**k for k in range(3)]
    assert timer(run) == 2e-3
    assert waits[3:] == [waits[2]]
    enough = math.inf  # a call that cannot be queued
    timer(run)
    assert max(waits) < 4 * harness.QueuedTime.LONGEST


def test_launches_are_kernels_alone(monkeypatch):
    class Profiler:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def events(self):
            on_gpu = ("step_kernel", "Memcpy HtoD (Pinned -> Device)", "finish_kernel", "Memset (Device)")
            events = [SimpleNamespace(name=n, device_type=torch.autograd.DeviceType.CUDA) for n in on_gpu]
            return [*events, SimpleNamespace(name="cuLaunchKernel", device_type=torch.autograd.DeviceType.CPU)]

    monkeypatch.setattr(harness, "profile", Profiler)
    assert harness.launches(lambda: None) == 2


def test_the_copy_reads_and_writes_the_bytes_that_it_is_asked_for():
    assert harness.copy(1200, torch.device("cpu"))().numel() == 1200 / 2 / 4


def test_the_gpus_command_goes_through_on_a_cpu(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(out=tmp_path, minutes=5, rounds=2, tests=False, dry_run=True)
    text = (tmp_path / "README.md").read_text()
    assert stopped.value.code == 0, text
    assert {p.name for p in tmp_path.iterdir()} == {"README.md"} | {
        f"{stem}.{suffix}" for stem in ("ops", "training") for suffix in ("json", "csv", "png")
    }
    rows = json.loads((tmp_path / "ops.json").read_text())["rows"]
    assert {r["op"] for r in rows} == set(contestants.OPS)
    assert {"eager", "foreach", "AdamW fused", "copy"} <= {r["contestant"] for r in rows}
    training = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert {r["contestant"].split(", ", 1)[-1] for r in training} > {"AdamW fused"}
    for stored in (rows, training):
        for model in dict.fromkeys(r["model"] for r in stored):
            assert harness.markdown([harness.Row(**r) for r in stored if r["model"] == model]).rstrip() in text
    assert text.count("not measured") == len(gpu.targets_of("ours"))


def test_a_contestant_that_fails_loses_its_row_and_what_takes_too_long_is_left_out(tmp_path, monkeypatch):
    def fails(w):
        raise RuntimeError("out of memory\nand more")

    op = dataclasses.replace(contestants.OPS["sample"], peers={"eager": contestants.eager_sample, "foreach": fails})
    monkeypatch.setitem(contestants.OPS, "sample", op)
    session = gpu.Session(torch.device("cpu"), tmp_path, time.monotonic() + 600, rounds=2)
    rows = gpu.run_ops(session, [(gpu.DRY, ("sample",))])
    assert session.failed == {f"{gpu.DRY}: sample: foreach": "RuntimeError: out of memory"}
    assert "eager" in {r.contestant for r in rows}
    session.deadline = time.monotonic()
    assert gpu.run_ops(session, [(gpu.DRY, ("sample",))]) == []
    assert session.left_out == [f"{gpu.DRY}: sample: no time was left"]


def test_targets_are_read_off_the_rows():
    def row(model, op, contestant, median, **fields):
        values = {"threads": 1, "parameters": 1, "low": median, "high": median, "rounds": 3, "speedup": 1.0}
        return harness.Row(
            model=model, op=op, contestant=contestant, median=median, **{**values, "of_limit": None, **fields}
        )

    ours = "ours"
    rows = [
        row("ViT-L/16", "step with prior", ours, 1.0, of_limit=0.91),
        row("ViT-B/16", "step with prior", ours, 1.0, speedup=7.0, launches=2),
        row("ViT-B/16", "optimizer step", ours, 1.6),
        row("ViT-B/16", "optimizer step", "AdamW fused", 1.0),
        row("ViT-B/16, batch 64", "training step", "ours, preparation, K = 1", 110.0),
        row("ViT-B/16, batch 64", "training step", "AdamW fused", 100.0),
    ]
    lines = [t.line({(r.model, r.op, r.contestant): r for r in rows})[2:] for t in gpu.targets_of(ours)]
    measured = [["0.91", "yes"], ["-", "not measured"], ["2", "yes"], ["7", "no"], ["1.6", "yes"], ["1.1", "no"]]
    assert lines == measured


def test_the_tests_outcome_is_counted(tmp_path, monkeypatch):
    def pytest_runs(command, **_):
        (report,) = [a.split("=")[1] for a in command if a.startswith("--junitxml")]
        Path(report).write_text('<testsuites><testsuite errors="1" failures="2" skipped="3" tests="10"/></testsuites>')
        raise subprocess.CalledProcessError(1, "pytest")

    monkeypatch.setattr(subprocess, "run", pytest_runs)
    session = gpu.Session(torch.device("cpu"), tmp_path, time.monotonic() + 600, rounds=2)
    counts = gpu.run_tests(session)
    assert counts == {"passed": 4, "failures": 2, "errors": 1, "skipped": 3}
    assert "the tests" in session.failed


# --- the profile -------------------------------------------------------------------------------------

needs_cpp = pytest.mark.skipif(
    backends.unavailable("cpp", "cpu") is not None, reason=str(backends.unavailable("cpp", "cpu"))
)


@needs_cpp
def test_the_profile_names_the_larger_of_arithmetic_and_memory():
    times = profile.limits("step with prior", 2 * profile.IN_CACHE, 2, rounds=3)
    assert set(times) == {profile.MEMORY, profile.CACHE, harness.TRIAD}
    assert all(t > 0 for t in times.values())
    known = {profile.MEMORY: 10.0, profile.CACHE: 8.0, harness.TRIAD: 5.0}
    text = profile.lines_of("an op", known, [(60.0, "update_piece")])
    assert "arithmetic is the limit, 80% of the time" in text
    assert "  60.0 %  update_piece" in text


def test_what_is_worked_off_in_the_cache_is_as_much_but_the_same():
    workload = profile.in_cache(8 * profile.IN_CACHE, 2)
    assert workload.numel == 8 * profile.IN_CACHE
    assert [t.data_ptr() for t in workload.std] == [workload.std[i].data_ptr() for i in (0, 0, 0, 0, 4, 4, 4, 4)]


@needs_cpp
@pytest.mark.skipif(shutil.which("perf") is None, reason="perf is not installed")
def test_perf_finds_the_kernels_functions():
    run = contestants.our_step(profile.in_cache(64 * profile.IN_CACHE, 1), "cpp", True)[""]
    try:
        shares = profile.functions(run, 1.0)
    except RuntimeError as refused:
        pytest.skip(str(refused))
    assert any("update_piece" in name for _, name in shares)
    assert 0 < sum(share for share, _ in shares) <= 101


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda p: p.stem)
def test_the_page_of_performance_shows_the_stored_results(path):
    stored, page = json.loads(path.read_text()), (ROOT / "docs/performance.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE)
    assert harness.markdown([harness.Row(**r) for r in stored["rows"]]) in tables
    assert stored["command"] in page


@pytest.mark.parametrize("name", ["digits", "fashion"])
def test_the_page_of_results_holds_the_tables_of_the_committed_runs(name):
    assert tables.overview(ROOT / "benchmarks/results" / name) in (ROOT / "docs/results.md").read_text()


def test_the_page_of_memory_holds_the_table_of_the_plan():
    page = memory.PAGE.read_text()
    assert page.split(memory.BEGIN)[1].split(memory.END)[0] == memory.table()


def test_the_page_of_memory_says_what_was_measured():
    page = " ".join(memory.PAGE.read_text().split())
    peaks = json.loads((memory.RESULTS / "peak.json").read_text())
    for kind, verb in (
        ("planned_mib", "the plan says {} GiB for `prepare` and {} GiB"),
        ("measured_mib", "by {} and {}"),
    ):
        assert verb.format(*(f"{peaks[phase][kind] / 1024:.2f}" for phase in ("prepare", "forget"))) in page
    rows = json.loads((memory.RESULTS / "compression.json").read_text())["rows"]
    kept = {}
    for row in rows:
        kept.setdefault(row["class"], []).append(row)
    assert "forgetting 0, 3 and 8 with" in page
    assert sorted(kept) == ["0", "3", "8"]
    whole = []
    for _, exact, *compressed in kept.values():
        whole.append(f"{exact['retain']:.1f}")
        for row in compressed:
            assert all(row[k] == exact[k] for k in ("retain", "forget", "forget_train"))
            assert row["kl"] == pytest.approx(exact["kl"], rel=0.002)
    assert "D_r {}, {} and {} %, D_f 0 %".format(*whole) in page


def test_the_table_of_priors_takes_seeds_that_lack_some(tmp_path):
    """A run that was stopped: the second seed was prepared in one way, the first in two."""

    def row(prior, objective, retained):
        facts = {"class": 3, "baseline": 98.0, "forgotten": 0.0, "reached": True, "preparation_read": 9600}
        return {"prior": prior, "objective": objective, "retained": retained, **facts}

    rows = [row(p, o, r) for p, r in (("learned", 97.0), ("constant", 90.0)) for o in priors.OBJECTIVES]
    common = {"size": "0.2 M", "parameters": 7, "training_read": 8, "means": 99.0}
    runs = [
        {**common, "seed": 0, "sampled": {"learned": 98.0, "constant": 96.0}, "rows": rows},
        {**common, "seed": 1, "sampled": {"learned": 97.0}, "rows": rows[:2]},
    ]
    lines = priors.table(runs).splitlines()
    assert "| 97.5 | -1.00 (-1.00, -1.00) | -1.0 | 0.0 | -1.00 (-1.00, -1.00) |" in lines[2]
    assert "| 96.0 | -8.00 (-8.00) | -8.0 | 0.0 | -8.00 (-8.00) |" in lines[3]
    priors.figure(runs, tmp_path / "figure.png", against="parameters")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_of_results_holds_the_overview_of_the_priors():
    folder = ROOT / "benchmarks/results/priors"
    runs = priors.results_in(folder)
    assert (folder / "priors.md").read_text() == priors.table(runs)
    assert priors.overview(runs) in (ROOT / "docs/results.md").read_text()
    readme = (ROOT / "README.md").read_text()
    means = {
        prior: [
            f"{statistics.fmean(priors.Change.of(some, name, 'uniform-others').seeds):.2f}".replace("-0.00", "0.00")
            for size, name, some in priors.by_prior(runs)
            if name == prior and size in priors.WIDTHS
        ]
        for prior in ("gauss-newton", "bgd", "constant, mean precision")
    }
    for prior, said in {
        "gauss-newton": "{}, {} and {} at 0.2, 2.7 and\n10.7 M parameters with the default prior",
        "bgd": "{}, {} and {} with BGD's",
        "constant, mean precision": "{}, {} and {} with one std for all",
    }.items():
        assert said.format(*means[prior]).replace("-", "−") in readme
    (widest,) = (r for r in runs if r["size"] == "10.7 M")
    assert f"right on {widest['sampled']['bgd']:.1f} % only" in (ROOT / "docs/results.md").read_text()


def test_pooled_stds_are_of_the_mean_precision():
    stds = {"weight": torch.tensor([[1.0, 0.5], [0.25, 0.5]]), "bias": torch.tensor([1.0, 0.5])}
    posterior = Posterior({n: torch.zeros_like(s) for n, s in stds.items()}, stds)
    # Precisions 1, 4, 16, 4.
    per_row, per_tensor = priors.pooled(posterior, from_dim=1).stds, priors.pooled(posterior).stds
    torch.testing.assert_close(per_row["weight"], torch.tensor([[2.5] * 2, [10.0] * 2]).rsqrt())
    assert torch.equal(per_row["bias"], stds["bias"])
    torch.testing.assert_close(per_tensor["weight"], torch.full((2, 2), 6.25).rsqrt())
    torch.testing.assert_close(per_tensor["bias"], torch.full((2,), 2.5).rsqrt())


def test_the_page_of_choices_holds_the_table_of_the_models():
    folder = ROOT / "benchmarks/results/models"
    runs = {name: json.loads((folder / f"{name}.json").read_text()) for name in models.CASES}
    shown = (folder / "models.md").read_text()
    assert shown == models.table(runs)
    page = (ROOT / "docs/choosing.md").read_text()
    assert shown in page
    assert "`python -m benchmarks.models OUT`" in page
    assert "(../benchmarks/results/models/models.md)" in page
