"""The benchmarks: the harness's arithmetic, and that the peers do the work that they are compared by."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from benchmarks import contestants, harness, memory
from distruction.ops import backends

ROOT = Path(__file__).parents[1]
SHAPES = [torch.Size(s) for s in ((7, 5), (64,), (1, 3, 3))]


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
    times = {"distruction (cpp)": 0.1, "eager": 1.5, harness.LIMIT: 0.08}
    timings = {name: harness.Timing(t, t, t, 3) for name, t in times.items()}
    rows = harness.rows_of(timings, baseline="eager", model="m", parameters=10, threads=1, op="sample")
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


@pytest.mark.parametrize("op", contestants.OPS)
def test_every_contestant_runs(op, workload):
    backend = backends.resolve("auto", "cpu").__name__.rsplit(".", 1)[1]
    made = contestants.OPS[op].make(workload, [backend])
    with torch.no_grad():
        for name, run in made.items():
            if not name.startswith("torch.compile"):  # minutes
                run()
    assert all(t.isfinite().all() for t in workload.mean + workload.std + workload.param)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda p: p.stem)
def test_the_readme_shows_the_stored_results(path):
    stored, readme = json.loads(path.read_text()), (ROOT / "README.md").read_text()
    tables = re.findall(r"(?:^\|.*\n)+", readme, flags=re.MULTILINE)
    assert harness.markdown([harness.Row(**r) for r in stored["rows"]]) in tables
    assert stored["command"] in readme


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
        whole.append(f"{exact['retain_test']:.1f}")
        for row in compressed:
            assert all(row[k] == exact[k] for k in ("retain_test", "forget_test", "forget_train"))
            assert row["kl"] == pytest.approx(exact["kl"], rel=0.002)
    assert "D_r {}, {} and {} %, D_f 0 %".format(*whole) in page
