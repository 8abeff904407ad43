"""The plan of a run's memory: against the tensors that live, against a run's resident memory, and in words."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from distruction import BGD, Posterior, UsageError, models, objectives, planning
from distruction.compression import BLOCK
from distruction.optim import STREAMED_ELEMENTS
from distruction.planning import free as free_

SMALL = {"num_classes": 10, "in_chans": 3, "img_size": 64}
MIB = 2**20


def convolutional():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))


def held(opt):
    """Bytes of the optimizer's state, by name."""
    sums = {}
    for state in opt.state.values():
        for name, t in state.items():
            sums[name] = sums.get(name, 0) + t.nbytes
    return sums


@pytest.mark.parametrize("mc_samples", [1, 2, 4])
@pytest.mark.parametrize("dtype", planning.DTYPES)
def test_what_stays_is_what_the_optimizer_and_the_posterior_hold(mc_samples, dtype):
    model = convolutional().to(planning.DTYPES[dtype])
    prior = Posterior.around(model, 0.05).compress(mean="bfloat16")
    opt = BGD(model.named_parameters(), mc_samples=mc_samples, prior=prior, kl_weight=0.1)
    opt.train()
    for _ in range(mc_samples):
        model(torch.randn(4, 3, 8, 8, dtype=planning.DTYPES[dtype])).float().square().mean().backward()
        opt.step()
    prepared, forgotten = planning.plan(
        model, (3, 8, 8), batch_size=4, dtype=dtype, mc_samples=mc_samples, prior_std="log8", prior_mean="bfloat16"
    ).phases
    state = held(opt)
    expected = {
        "parameters": sum(p.nbytes for p in model.parameters()),
        "buffers": sum(b.nbytes for b in model.buffers()),
        "posterior mean": state["mean"],
        "posterior std": state["std"],
    }
    expected |= {f"statistics {name}": state[name] for name in ("m1", "m2") if name in state}
    assert prepared.resident == expected
    assert sum(forgotten.resident.values()) == sum(expected.values()) + prior.nbytes
    assert prepared.gradients == sum(p.grad.nbytes for p in model.parameters())


@pytest.mark.parametrize("name", [n for n, e in objectives.REGISTRY.items() if not e.of_texts])
def test_what_an_objective_holds(name):
    """Storages that can be reached from it, beyond those of the model and of the posterior."""
    model = convolutional()
    posterior = Posterior.around(model, 0.05)
    known = [*model.parameters(), *model.buffers(), *posterior.means.values(), *posterior.stds.values()]
    made = objectives.resolve(name, model, posterior)
    found, pending = {}, [made]
    while pending:
        held = pending.pop()
        if isinstance(held, torch.Tensor):
            found[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
        elif isinstance(held, dict):
            pending += held.values()
        elif hasattr(held, "__dict__") and not isinstance(held, torch.nn.Module | Posterior | type):
            pending += vars(held).values()
    held = sum(size for at, size in found.items() if at not in {t.untyped_storage().data_ptr() for t in known})
    prepared, forgotten = planning.plan(model, (3, 8, 8), objective=name).phases
    before, after = planning.plan(model, (3, 8, 8), objective="uniform-others").phases
    assert prepared == before
    assert forgotten.peak - after.peak == held
    assert (held > 0) == (name == "bad-teacher")


def test_a_teacher_at_means_that_must_be_restored():
    """Needs them for a pass, in the parameters' type, and nothing where they are there as the parameters are."""
    model = convolutional()
    n = sum(p.numel() for p in model.parameters())
    for options, expected in (({}, 0), ({"prior_mean": "bfloat16"}, 4 * n), ({"dtype": "bfloat16"}, 2 * n)):
        taught, plain = (
            planning.plan(model, (3, 8, 8), objective=name, **options).phases[1]
            for name in ("masked-teacher", "uniform-others")
        )
        assert taught.passing - plain.passing == expected


def test_activations_of_a_closed_form():
    # A chain of width w without biases: forward keeps the input and each product, tanh keeps its result; backward has,
    # at its end, all gradients, and the last gradient of an activation.
    width, batch = 300, 7
    model = nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh(), nn.Linear(width, width, bias=False))
    peak = planning.peak_of_a_pass(model, (batch, width), dtype=torch.float32)
    weights, activation = 4 * width * width, 4 * width * batch
    assert 2 * weights <= peak <= 2 * weights + 8 * activation
    released = planning.peak_of_a_pass(model, (batch, width), dtype=torch.float32, release_gradients=True)
    assert weights <= released <= weights + 8 * activation


@pytest.mark.parametrize("name", ["vit-micro", "resnet18", "vit_tiny_patch16_224"])
def test_a_model_by_name_takes_no_memory_and_plans_like_a_real_one(name):
    empty = planning.empty(name, **SMALL)
    assert all(t.device.type == "meta" for t in [*empty.parameters(), *empty.buffers()])
    real = models.create(name, **SMALL).train()
    modes = [m.training for m in real.modules()]
    ours = planning.plan(name, (3, 64, 64), num_classes=10, batch_size=3)
    theirs = planning.plan(real, (3, 64, 64), batch_size=3)
    assert ours.phases == theirs.phases
    assert [m.training for m in real.modules()] == modes
    assert all(p.grad is None and type(p) is nn.Parameter for p in real.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in real.parameters())


def test_activations_grow_with_the_batch_and_gradients_do_not():
    one, two, four = (
        planning.plan("vit_tiny_patch16_224", (3, 224, 224), batch_size=b, release_gradients=True).phases[0].passing
        for b in (8, 16, 32)
    )
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)


def test_a_restored_prior_takes_a_piece_at_a_time_and_codes_none():
    shape = {"batch_size": 1, "num_classes": 10}
    whole = planning.plan("vit_base_patch16_224", (3, 224, 224), **shape).phases[1]
    coded = planning.plan("vit_base_patch16_224", (3, 224, 224), prior_std="log8", **shape).phases[1]
    small = planning.plan("vit_base_patch16_224", (3, 224, 224), prior_std="bfloat16", **shape).phases[1]
    n = whole.resident["prior std"] // 4
    assert n + 8 * n // BLOCK <= coded.resident["prior std"] <= 1.01 * n
    assert coded.updating == whole.updating
    assert 4 * STREAMED_ELEMENTS <= small.updating - whole.updating < 6 * STREAMED_ELEMENTS
    offloaded = planning.plan("vit_base_patch16_224", (3, 224, 224), offload_prior=True, device="cuda", **shape)
    assert "prior std" not in offloaded.phases[1].resident
    assert offloaded.phases[1].host == offloaded.phases[0].host + 8 * n
    assert offloaded.available is None or torch.cuda.is_available()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the high-water mark is Linux's")
@pytest.mark.parametrize("release", ["--release-gradients", "--no-release-gradients"])
def test_planned_against_measured(release):
    # Each allocation is a mapping of its own, so that resident memory is what lives and not what malloc keeps.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.peak", "--model", "vit_small_patch16_224", "--img-size", "64"]
    command += ["--batch-size", "4", release]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    for phase, mib in json.loads(done.stdout).items():
        assert mib["measured_mib"] == pytest.approx(mib["planned_mib"], rel=0.1), phase


def test_advice_until_it_fits():
    full = planning.plan("vit_tiny_patch16_224", (3, 224, 224), batch_size=64, available=2**40)
    assert full.fits
    assert full.advice == ()
    tight = planning.plan("vit_tiny_patch16_224", (3, 224, 224), batch_size=64, available=full.peak // 2)
    peaks = [full.peak, *(peak for _, peak in tight.advice)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] <= full.peak // 2 < peaks[-2]
    # What the advice says holds: the same plan with its changes.
    last = tight.advice[-1][0]
    assert last.startswith("batch_size=")
    again = planning.plan(
        "vit_tiny_patch16_224",
        (3, 224, 224),
        batch_size=int(last.removeprefix("batch_size=")),
        prior_std="log8" if any("compressed" in title for title, _ in tight.advice) else "float32",
        release_gradients=any("release" in title for title, _ in tight.advice),
        available=2**40,
    )
    assert again.peak == peaks[-1]
    impossible = planning.plan("vit_tiny_patch16_224", (3, 224, 224), available=1)
    assert "It does not fit even so" in planning.verdict(impossible)[-1]


def test_free_memory(tmp_path, monkeypatch):
    free = planning.free_memory(torch.device("cpu"))
    if sys.platform.startswith("linux"):
        assert 64 * MIB < free < 2**50
    limit, usage = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(free_, "_GROUPS", ((limit, usage),))
    limit.write_text(f"{100 * MIB}\n")
    usage.write_text(f"{30 * MIB}\n")
    assert planning.free_memory(torch.device("cpu")) == 70 * MIB
    limit.write_text("max\n")
    assert planning.free_memory(torch.device("cpu")) in (None, pytest.approx(free, rel=0.9))
    assert planning.free_memory(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, not 0"),
        ({"mc_samples": 0}, "mc_samples must be >= 1, not 0"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown; choose float32, bfloat16, float16"),
        ({"prior_std": "int4"}, "prior_std='int4' is unknown; choose float32, bfloat16, log8"),
        ({"prior_mean": "log8"}, "prior_mean='log8' is unknown; choose float32, bfloat16"),
        ({"device": "warp"}, "device 'warp' cannot be used"),
        ({"objective": "hope"}, "objective 'hope' is unknown; choose masked-teacher"),
        ({"model": "nonesuch"}, "model 'nonesuch' is unknown"),
        ({"model": nn.Linear(2, 2).requires_grad_(False)}, "no parameter with requires_grad"),
        ({"model": nn.Linear(2, 2)}, r"cannot take a batch of shape \(64, 3, 8, 8\)"),
        ({"input_shape": (8, 8)}, r"input_shape must be \(channels, height, width\), not \(8, 8\)"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"model": "vit-micro", "input_shape": (3, 8, 8), **change}
    with pytest.raises(UsageError, match=message):
        planning.plan(arguments.pop("model"), arguments.pop("input_shape"), **arguments)


def test_the_plan_of_vit_h():
    found = planning.plan("vit_huge_patch14_224", (3, 224, 224), batch_size=1)
    # The published count of ViT-H/14 is 632 M (Dosovitskiy et al. 2020, table 1).
    assert found.parameters == pytest.approx(632e6, rel=0.001)
    assert found.phases[0].peak > 16 * found.parameters
    assert found.phases[1].peak > 24 * found.parameters
