"""The forecast of a request's damage: its line and bar against numpy, its measures against torch.distributions."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical, kl_divergence

from distruction import Posterior, UsageError, damage, forget, prepare, rehearse
from distruction import rehearsal as rehearsal_module
from distruction.strength import ForgetSet


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


def blobs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    centres = 3 * torch.eye(4, 6)
    return centres[labels] + torch.randn(count, 6, generator=generator), labels


@pytest.fixture(scope="module")
def trained():
    model = network()
    x, y = blobs(256, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.requires_grad_(True)
    return model.eval(), [(x[i : i + 64], y[i : i + 64]) for i in range(0, 256, 64)], [blobs(200, 2)]


def rehearsal(x, lost, *, changed=0.0, **more):
    return {
        "label": 0,
        "objective": "masked-teacher",
        "retained_before": 95.0,
        "retained": 95.0 - lost,
        "forgotten": 0.0,
        "reached": True,
        "changed": changed,
        "examples": 100,
        "disturbance": {"kl": x, **more},
    }


def test_the_line_goes_through_rehearsals_that_lie_on_one():
    metadata = {damage.KEY: [rehearsal(x, 2 * x) for x in (0.5, 1.0, 2.0, 3.0)]}
    found = damage.forecast(metadata, {"kl": 1.5})
    assert found.damage == pytest.approx(3.0)
    assert found.error == pytest.approx(0.0, abs=1e-12)
    assert (found.by, found.rehearsals) == ("kl", 4)


def test_line_and_bar_are_numpys():
    generator = np.random.default_rng(0)
    xs = generator.uniform(1, 5, size=9)
    ys = 0.7 * xs + generator.normal(0, 0.3, size=9)
    metadata = {damage.KEY: [rehearsal(x, y) for x, y in zip(xs, ys, strict=True)]}
    found = damage.forecast(metadata, {"kl": 2.0})
    slope = np.linalg.lstsq(xs[:, None], ys, rcond=None)[0][0]
    assert found.damage == pytest.approx(2.0 * slope)
    errors = []
    for i in range(9):
        rest = np.arange(9) != i
        errors.append(abs(np.linalg.lstsq(xs[rest, None], ys[rest], rcond=None)[0][0] * xs[i] - ys[i]))
    # the 8th of 9 is the smallest that 80 % of ten values can be told to lie within
    assert found.error == pytest.approx(np.sort(errors)[7])


def test_the_bar_has_the_error_of_counting():
    metadata = {damage.KEY: [rehearsal(x, 0.0, changed=0.02 * x) for x in (1.0, 2.0, 3.0)]}
    found = damage.forecast(metadata, {"kl": 2.0})
    assert found.damage == 0.0
    # 4 of 100 examples change sides: a sum of that many signs has the standard deviation 2
    assert found.error == pytest.approx(1.2815515655446004 * 2.0)


def test_the_measure_that_does_best_on_the_rehearsals_is_taken():
    rows = [rehearsal(float(i), 0.5 * i, noise=float((7 * i) % 5)) for i in range(1, 6)]
    assert damage.forecast({damage.KEY: rows}, {"noise": 1.0, "kl": 4.0}).by == "kl"
    assert damage.forecast({damage.KEY: rows}, {"noise": 1.0}).by == "noise"
    assert damage.forecast({damage.KEY: rows[:2]}, {"kl": 1.0}) is None
    assert damage.forecast({}, {"kl": 1.0}) is None


def test_a_model_that_has_not_moved_is_not_disturbed(trained):
    model, _, held = trained
    posterior = Posterior.around(model, 0.1)
    data = ForgetSet(8, {0: 8}, held[0][0][:8], held[0][1][:8], 8)
    moved = damage.disturbance(model, posterior, data, [0], 0.0, seed=3)
    assert set(moved.values()) == {0.0}
    assert set(moved) == {"kl", "noise: changed", "noise: divergence", "mixtures: changed", "mixtures: divergence"}


def test_disturbance_is_that_of_the_distributions_over_what_stays(trained, monkeypatch):
    model, _, held = trained
    posterior = Posterior.around(model, 0.1)
    other = network(5)
    data = ForgetSet(200, {1: 200}, *held[0], 200)
    probes = {}
    draw = damage._probes
    monkeypatch.setattr(damage, "_probes", lambda *args: probes.setdefault("drawn", draw(*args)))
    moved = damage.disturbance(other, posterior, data, [1], 7.0, seed=0)
    kept = [0, 2, 3]
    with torch.no_grad():
        for name, x in probes["drawn"].items():
            p, q = (Categorical(logits=m(x).double()[:, kept]) for m in (model, other))
            assert moved[f"{name}: divergence"] == pytest.approx(kl_divergence(p, q).mean().item(), rel=1e-5)
            assert moved[f"{name}: changed"] == (p.mode != q.mode).double().mean().item()
    noise, mixtures = probes["drawn"].values()
    torch.testing.assert_close(noise.mean(0), held[0][0].mean(0), atol=5 * 3 / math.sqrt(len(noise)), rtol=0)
    pairs = (held[0][0][:, None] + held[0][0]) / 2
    assert all((pairs == m).all(-1).any() for m in mixtures[:20])


def test_a_rehearsed_posterior_has_a_forecast(trained, tmp_path):
    model, batches, held = trained
    weights = [p.clone() for p in model.parameters()]
    posterior = prepare(model, batches, steps=20, progress=False)
    found = rehearse(model, posterior, batches, held, classes=[0, 2], progress=False)
    assert [(r.label, r.objective) for r in found] == [
        (c, o) for c in (0, 2) for o in ("masked-teacher", "uniform-others")
    ]
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    x, y = held[0]
    with torch.no_grad():
        right = model(x).argmax(-1) == y
    assert found[0].retained_before == pytest.approx(100 * right[y != 0].double().mean().item())
    posterior.save(tmp_path / "p")
    again = Posterior.load(tmp_path / "p", model=model)
    gone = [(x[y == 3], y[y == 3]) for x, y in batches]
    report = forget(model, again, gone, request="class", progress=False)
    assert report.forecast == damage.forecast(
        posterior.metadata,
        damage.disturbance(model, again, ForgetSet(64, {3: 64}, *_joined(gone), 16), [3], report.kl, seed=0),
    )
    assert report.forecast.rehearsals == 4
    again.mean_(model)
    del again.metadata[damage.KEY]
    assert forget(model, again, gone, request="class", progress=False).forecast is None
    again.mean_(model)


def _joined(batches):
    return tuple(torch.cat(t) for t in zip(*batches, strict=True))


@pytest.mark.parametrize("told", [True, False])
def test_classes_are_chosen_before_anything_is_kept(trained, monkeypatch, told):
    """Of a thousand classes a few are rehearsed, and the examples of the others are not gathered."""
    model, batches, held = trained
    posterior = prepare(model, batches, steps=2, progress=False)
    if not told:
        del posterior.metadata["label_counts"]
    kept = []
    batched = rehearsal_module._batched
    monkeypatch.setattr(rehearsal_module, "_batched", lambda parts: kept.append(parts) or batched(parts))
    found = rehearse(model, posterior, batches, held, most=2, records=10, objectives=["masked-teacher"], progress=False)
    assert [r.label for r in found] == [0, 3]
    assert [[y.unique().tolist() for _, y in parts] for parts in kept] == [[[0]], [[3]]]
    assert [sum(len(y) for _, y in parts) for parts in kept] == [10, 10]


def test_bad_rehearsals_are_refused(trained):
    model, batches, held = trained
    posterior = prepare(model, batches, steps=2, progress=False)
    with pytest.raises(UsageError, match="no examples of class 7 to rehearse"):
        rehearse(model, posterior, batches, held, classes=[0, 7], progress=False)
    with pytest.raises(UsageError, match=r"one class number for each example, not targets of shape \(200, 2\)"):
        rehearse(model, posterior, batches, [(held[0][0], torch.zeros(200, 2))], progress=False)
    assert damage.KEY not in posterior.metadata
