"""The posterior: checks, file, and what it does to a model."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributions import Normal, kl_divergence

from distruction import Posterior, PosteriorError
from distruction.files import save_tensors
from distruction.posterior_file import FORMAT


def make(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    posterior = Posterior.around(model, {n: torch.rand_like(p) * 0.1 + 0.01 for n, p in model.named_parameters()})
    posterior.metadata["note"] = "λ"
    return model, posterior


def test_round_trip(tmp_path):
    model, posterior = make()
    path = tmp_path / "p.safetensors"
    posterior.save(path)
    again = Posterior.load(path, model=model)
    assert list(again) == list(posterior)
    assert again.metadata == {"note": "λ"}
    for name in posterior:
        for a, b in zip(posterior[name], again[name], strict=True):
            assert torch.equal(a, b)
    assert os.listdir(tmp_path) == ["p.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_kl_against_torch_distributions():
    _, p = make()
    _, q = make(seed=1)
    expected = sum(
        kl_divergence(Normal(*(t.double() for t in q[n])), Normal(*(t.double() for t in p[n]))).sum() for n in p
    )
    assert q.kl(p).item() == pytest.approx(expected.item(), rel=1e-5)


def test_samples_have_the_posterior_moments():
    model = nn.Linear(1000, 100, bias=False)
    posterior = Posterior.around(model, 0.05)
    posterior.sample_(model, seed=3)
    eps = (model.weight - posterior.means["weight"]).detach() / 0.05
    assert abs(eps.mean().item()) < 4.5 / 1e5**0.5
    assert abs(eps.var().item() - 1) < 4.5 * (2 / 1e5) ** 0.5
    first = model.weight.detach().clone()
    posterior.sample_(model, seed=3, draw=1)
    assert not torch.equal(first, model.weight)
    posterior.sample_(model, seed=3, draw=0)
    assert torch.equal(first, model.weight)
    posterior.mean_(model)
    assert torch.equal(model.weight, posterior.means["weight"])


@pytest.mark.parametrize(
    ("std", "message"),
    [
        (0.0, "std must be > 0, its smallest value is 0"),
        (-1.0, "std must be > 0"),
        (float("nan"), "std holds NaN or infinity"),
        (float("inf"), "std holds NaN or infinity"),
    ],
)
def test_bad_std(std, message):
    with pytest.raises(PosteriorError, match=message):
        Posterior({"w": torch.zeros(3)}, {"w": torch.tensor([1.0, std, 1.0])})


def test_bad_dictionaries():
    one = {"w": torch.ones(2)}
    with pytest.raises(PosteriorError, match="at least one parameter"):
        Posterior({}, {})
    with pytest.raises(PosteriorError, match=r"only in the first \['w'\], only in the second \['v'\]"):
        Posterior(one, {"v": torch.ones(2)})
    with pytest.raises(PosteriorError, match=r"w: mean is \(2,\) but std is \(3,\)"):
        Posterior(one, {"w": torch.ones(3)})
    with pytest.raises(PosteriorError, match=r"std is torch.float64; convert it"):
        Posterior(one, {"w": torch.ones(2, dtype=torch.float64)})


def test_another_model_is_refused():
    model, posterior = make()
    with pytest.raises(PosteriorError, match="belongs to another model: only in the first"):
        posterior.check(nn.Linear(3, 4))
    other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with pytest.raises(PosteriorError, match=r"0.weight is \(5, 3\) here, \(4, 3\) there"):
        posterior.check(other)
    posterior.check(model, same_weights=True)
    nn.init.zeros_(model[0].weight)
    posterior.check(model)
    with pytest.raises(PosteriorError, match=r"prepared for other weights: 0\.weight differs.*previous"):
        posterior.check(model, same_weights=True)


def test_the_same_posterior_gives_the_same_bytes(tmp_path):
    _, posterior = make()
    paths = [tmp_path / str(i) for i in range(8)]
    for path in paths:
        posterior.save(path)
    assert len({path.read_bytes() for path in paths}) == 1


def test_damaged_files(tmp_path):
    _, posterior = make()
    path = tmp_path / "p.safetensors"
    with pytest.raises(FileNotFoundError, match="distruction prepare"):
        Posterior.load(path)
    posterior.save(path)
    whole = path.read_bytes()
    for cut in (0, 4, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(PosteriorError, match=r"cannot be read as a posterior: .* is damaged"):
            Posterior.load(path)
    save_file({"mean.w": torch.zeros(2)}, path)
    with pytest.raises(PosteriorError, match="has format None, expected 'distruction-posterior-1'"):
        Posterior.load(path)
    for tensors, message in (
        ({"mean.w": torch.zeros(2)}, r"cannot be read as a posterior: 'std\.w'"),
        ({n: torch.ones(2) for n in ("mean.w", "std.w", "std.x")}, r"does not name: \['std\.x'\]"),
        ({"mean.w": torch.zeros(2), "std.w": torch.zeros(2)}, "std must be > 0"),
    ):
        save_tensors(path, tensors, format=FORMAT, facts={"names": ["w"], "metadata": {}})
        with pytest.raises(PosteriorError, match=message):
            Posterior.load(path)
    save_tensors(path, {"mean.w": torch.zeros(2), "std.w": torch.ones(2)}, format=FORMAT, facts={"names": "w"})
    with pytest.raises(PosteriorError, match="cannot be read as a posterior: 'metadata'"):
        Posterior.load(path)


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("distruction-posterior-0", "of an older version of distruction"),
        ("distruction-posterior-99", "newer than 'distruction-posterior-1'; upgrade distruction"),
        ("distruction-model-1", "has format 'distruction-model-1', expected 'distruction-posterior-1'"),
    ],
)
def test_version_skew(tmp_path, format, message):
    path = tmp_path / "p.safetensors"
    save_tensors(path, {"mean.w": torch.zeros(2)}, format=format, facts={"names": ["w"]})
    with pytest.raises(PosteriorError, match=message):
        Posterior.load(path)


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    _, posterior = make()
    path = tmp_path / "p.safetensors"
    posterior.save(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distruction.files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        posterior.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["p.safetensors"]
