"""prepare and forget: what they leave behind, resume after a kill, and their errors."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distruction import (
    NonFiniteError,
    Posterior,
    PosteriorError,
    UsageError,
    forget,
    metrics,
    models,
    objectives,
    prepare,
)
from distruction.errors import DistructionError
from distruction.initial import initial_std
from distruction.planning import plan

QUIET = {"progress": False}


class WithEverything(nn.Module):
    """BatchNorm, dropout and a frozen layer in one small classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 8).requires_grad_(False)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.drop(torch.relu(self.norm(self.stem(x)))))


def make(seed=0, kind=WithEverything):
    torch.manual_seed(seed)
    model = kind()
    x, y = torch.randn(60, 4), torch.arange(60) % 3
    return model, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16, shuffle=True)


def snapshot(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def assert_equal_state(a, b):
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_prepare_leaves_the_model_as_it_was():
    model, loader = make()
    model.train()
    model.norm.eval()
    before, generator = snapshot(model), torch.get_rng_state()
    posterior = prepare(model, loader, steps=5, **QUIET)
    assert_equal_state(before, snapshot(model))
    assert torch.equal(generator, torch.get_rng_state())
    assert model.training
    assert not model.norm.training
    assert model.drop.training
    assert sorted(posterior) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert all(p.grad is None for p in model.parameters())
    widest = initial_std(model)
    assert all((std <= widest[n]).all() for n, std in posterior.stds.items())
    assert any((std < widest[n]).any() for n, std in posterior.stds.items())


def test_the_posterior_stands_for_its_evidence():
    """Of a quadratic loss: 1/std**2 = 1/std_init**2 + evidence * curvature, however the steps share it."""
    curvature, evidence = 2.0, 25.0
    model = nn.Linear(1, 20_000, bias=False)
    nn.init.zeros_(model.weight)
    batches = [(torch.ones(2, 1), torch.zeros(2, dtype=torch.int64))]
    posterior = prepare(
        *(model, batches),
        method="bgd",
        steps=200,
        evidence=evidence / 2,  # of the two examples
        loss_fn=lambda logits, targets: curvature / 2 * logits.square().sum(dim=1).mean(),
        **QUIET,
    )
    # The noise of each weight's curvature, eps**2, is independent of the others'.
    assert (posterior.stds["weight"] ** -2).mean().item() == pytest.approx(100 + curvature * evidence, rel=0.01)


@pytest.mark.slow
def test_prepare_hardly_amplifies_rounding():
    """Of the demo's model, one weight's last bit. With equal shares it changes stds by 4.6 % (median)."""
    from distruction.data import load, loader
    from distruction.training import train

    data, _ = load("digits")
    torch.manual_seed(0)
    model = models.create("vit-micro", num_classes=10, in_chans=1, img_size=8)
    train(model, data, seed=0, **QUIET)
    stds = []
    for last_bit in (0, 1):
        next(model.parameters()).data.view(torch.int32).flatten()[0] += last_bit
        posterior = prepare(model, loader(data, batch_size=64, shuffle=True), steps=1500, **QUIET)
        stds.append(torch.cat([s.flatten() for s in posterior.stds.values()]))
    error = (stds[0] - stds[1]).abs() / stds[0]
    assert 0 < error.median() < 1e-4
    assert error.max() < 1e-2
    assert stds[0].min() < 0.01


def test_forget_ends_with_the_means_of_q():
    model, loader = make()
    posterior = prepare(model, loader, steps=20, **QUIET)
    before = snapshot(model)
    seen = []
    result = forget(model, posterior, loader, steps=10, kl_weight=0.1, callback=seen.append, **QUIET)
    assert seen == result.history
    assert [s.step for s in seen] == list(range(1, 11))
    result.posterior.check(model, same_weights=True)
    assert seen[-1].kl == pytest.approx(result.posterior.kl(posterior).item(), rel=1e-6)
    after = snapshot(model)
    assert torch.equal(before["stem.weight"], after["stem.weight"])
    assert torch.equal(before["norm.running_mean"], after["norm.running_mean"])
    assert not torch.equal(before["head.weight"], after["head.weight"])


class WithOutput(WithEverything):
    """Gives its logits inside of an output, as Hugging Face's classifiers do."""

    def forward(self, x):
        return SimpleNamespace(loss=None, logits=super().forward(x))


def test_logits_inside_of_an_output():
    """The same as a model that gives them bare, wherever a user's model is called."""
    stds, means, logits, peaks = [], [], [], []
    for kind in (WithEverything, WithOutput):
        model, loader = make(kind=kind)
        peaks.append(plan(model, (4,), batch_size=16).peak)
        posterior = prepare(model, loader, steps=4, **QUIET)
        stds.append(posterior.stds["head.weight"])
        result = forget(model, posterior, loader, objective="bad-teacher", steps=4, **QUIET)
        means.append(result.posterior.means["head.weight"])
        logits.append(metrics.predict(model, [(torch.ones(2, 4), torch.zeros(2, dtype=torch.int64))])[0])
    for found in (stds, means, logits):
        assert torch.equal(*found)
    assert peaks[0] == peaks[1]


def test_inside_of_autocast():
    """The same bits as without autocast's copies of the weights, which would stay those of the first sample."""
    found = []
    for copies in (True, False):
        model, loader = make()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=copies):
            posterior = prepare(model, loader, steps=4, **QUIET)
            forget(model, posterior, loader, steps=4, **QUIET)
            logits, _ = metrics.predict(model, [(torch.ones(2, 4), torch.zeros(2, dtype=torch.int64))])
        found.append((posterior.stds["head.weight"], model.head.weight.detach(), logits))
        assert model.head.weight.dtype == torch.float32
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_model_that_gives_no_logits():
    model, loader = make()
    model.register_forward_hook(lambda module, inputs, output: {"scores": output})
    with pytest.raises(UsageError, match=r"the model gives a dict, neither logits nor an output with \.logits"):
        prepare(model, loader, steps=1, **QUIET)


def test_the_same_seed_gives_the_same_bits():
    results = []
    for _ in range(2):
        model, loader = make()
        torch.manual_seed(int(time.time()))
        results.append(prepare(model, loader, steps=6, **QUIET))
    for name in results[0]:
        assert torch.equal(results[0][name][1], results[1][name][1])


@pytest.mark.parametrize("name", [n for n, e in objectives.REGISTRY.items() if not e.of_texts])
def test_every_objective_runs_and_lowers_its_loss(name):
    model, loader = make()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(20):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    posterior = Posterior.around(model.eval(), 0.2)
    result = forget(model, posterior, loader, objective=name, kl_weight=0.01, data_per_step=100, steps=40, **QUIET)
    assert sum(s.loss for s in result.history[-5:]) < sum(s.loss for s in result.history[:5])


def test_masked_teacher_against_categorical_distributions():
    """Over the other classes alone the teacher's distribution is its own, renormalised."""
    torch.manual_seed(0)
    teacher, inputs = nn.Linear(4, 5).double(), torch.randn(6, 4, dtype=torch.float64)
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 3, 4, 2])
    found = objectives.MaskedTeacher(teacher)(logits, targets, inputs)
    expected = torch.zeros((), dtype=torch.float64)
    for row, target, own in zip(logits, targets, teacher(inputs).detach(), strict=True):
        others = torch.arange(5) != target
        p = torch.distributions.Categorical(logits=own[others])
        log_q = torch.distributions.Categorical(logits=row).logits[others]
        expected = expected + (p.probs * (p.logits - log_q)).sum() / 6
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
    assert (objectives.MaskedTeacher(teacher)(teacher(inputs), targets, inputs) > 0).all()


@pytest.mark.parametrize("objective", ["bad-teacher", "masked-teacher", objectives.BoundedCrossEntropy])
def test_a_run_resumed_in_process(tmp_path, objective):
    """A teacher is the model from before, not the interrupted one; another object may be the same objective."""
    options = {"steps": 8, "kl_weight": 0.1, "checkpoint": tmp_path / "c", "checkpoint_seconds": 0.0, **QUIET}

    def run(**more):
        made = objective if isinstance(objective, str) else objective()
        return forget(model, posterior, loader, objective=made, **options, **more).posterior

    model, loader = make()
    posterior = Posterior.around(model, 0.05)
    whole = run()

    def interrupt(step):
        if step.step == 4:
            raise KeyboardInterrupt

    model, loader = make()
    with pytest.raises(KeyboardInterrupt):
        run(callback=interrupt)
    resumed = run()
    for key in whole:
        assert torch.equal(whole.means[key], resumed.means[key])


RUN = """
import sys, torch, distruction, time
sys.path.insert(0, {tests!r})
from test_forget import make
what, out, delay = sys.argv[1:4]
model, loader = make()
slow = lambda step: time.sleep(float(delay))
options = dict(steps=25, checkpoint=out + ".ckpt", checkpoint_seconds=0.0, progress=False, callback=slow)
if what == "prepare":
    posterior = distruction.prepare(model, loader, **options)
else:
    posterior = distruction.forget(
        model, distruction.Posterior.around(model, 0.05), loader, objective="random-labels", **options
    ).posterior
posterior.save(out)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["prepare", "forget"])
def test_ten_kills_and_the_same_bits(tmp_path, what):
    script = RUN.format(tests=str(Path(__file__).parent))

    def start(name, delay):
        return subprocess.Popen([sys.executable, "-c", script, what, str(tmp_path / name), str(delay)])

    assert start("whole", 0).wait() == 0
    checkpoint = tmp_path / "killed.ckpt"
    for _ in range(10):
        process = start("killed", 0.2)
        stamp = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        # Wait for progress beyond the last kill, then let it die at whatever point it is.
        while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == stamp):
            time.sleep(0.01)
        time.sleep(0.001 * (os.getpid() * 7919 + time.time_ns()) % 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start("killed", 0).wait() == 0
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "killed").read_bytes()
    assert not checkpoint.exists()


def test_interrupted_and_resumed_in_process(tmp_path):
    whole_model, loader = make()
    whole = prepare(whole_model, loader, steps=8, **QUIET)
    options = {"checkpoint": tmp_path / "c", "checkpoint_seconds": 0.0, **QUIET}
    model, loader = make()
    before = snapshot(model)

    def interrupt(step):
        if step.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(model, loader, steps=8, callback=interrupt, **options)
    assert_equal_state(before, snapshot(model))
    resumed = prepare(model, loader, steps=8, **options)
    for name in whole:
        assert torch.equal(whole[name][1], resumed[name][1])
    assert whole.metadata == resumed.metadata
    with pytest.raises(KeyboardInterrupt):
        prepare(model, loader, steps=8, callback=interrupt, **options)
    with pytest.raises(UsageError, match="seed: 0 there, 1 here"):
        prepare(model, loader, steps=8, seed=1, **options)


def test_nan_loss_says_the_step_and_restores_the_means():
    model, loader = make()
    before = snapshot(model)
    calls = []

    def poisoned(logits, targets):
        calls.append(1)
        loss = nn.functional.cross_entropy(logits, targets)
        return loss * math.nan if len(calls) == 6 else loss

    with pytest.raises(NonFiniteError, match="the loss is nan at step 3"):
        prepare(model, loader, method="bgd", steps=5, loss_fn=poisoned, **QUIET)
    assert_equal_state(before, snapshot(model))


def empty_loader():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.empty(0, 4), torch.empty(0).long()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kl_weight": -0.1}, UsageError, r"kl_weight \(lambda\) must be in \[0, 1\], not -0.1"),
        ({"kl_weight": 1.1}, UsageError, r"must be in \[0, 1\], not 1.1"),
        ({"steps": 0}, UsageError, "steps must be an integer >= 1, not 0"),
        ({"objective": "hope"}, UsageError, "objective 'hope' is unknown; choose masked-teacher"),
        ({"loader": empty_loader()}, UsageError, "the forget set is empty"),
        ({"loader": [(torch.zeros(2, 4), torch.tensor([0, 3]))]}, UsageError, "labels run from 0 to 3, .* 3 classes"),
        ({"loader": [(torch.zeros(2, 4), torch.tensor([0.0, 1]))]}, UsageError, "vector of int64 class numbers"),
        ({"loader": [torch.zeros(2, 4)]}, UsageError, r"\(inputs, targets\) pairs"),
        ({"posterior": Posterior.around(nn.Linear(2, 2), 0.1)}, PosteriorError, "belongs to another model"),
        ({"posterior": Posterior.around(make(1)[0], 0.1)}, PosteriorError, "prepared for other weights"),
    ],
)
def test_bad_arguments_of_forget(change, error, message):
    model, loader = make()
    before = snapshot(model)
    arguments = {"posterior": Posterior.around(model, 0.1), "loader": loader, "steps": 2, **change}
    with pytest.raises(error, match=message) as caught:
        forget(model, arguments.pop("posterior"), arguments.pop("loader"), **arguments, **QUIET)
    assert isinstance(caught.value, DistructionError)
    assert_equal_state(before, snapshot(model))


class Unsized:
    """Batches of a number that nobody knows."""

    def __iter__(self):
        yield torch.zeros(2, 4), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"std_init": 0.0}, "std_init must be > 0 and finite, not 0.0"),
        ({"std_init": -1.0}, "std_init must be > 0"),
        ({"evidence": 0.0}, "evidence must be > 0 data points, not 0.0"),
        ({"loader": Unsized()}, "pass num_examples="),
        ({"loader": empty_loader()}, "the training set is empty"),
    ],
)
def test_bad_arguments_of_prepare(change, message):
    model, loader = make()
    arguments = {"loader": loader, "steps": 2, **change}
    with pytest.raises(UsageError, match=message):
        prepare(model, arguments.pop("loader"), **arguments, **QUIET)
    with pytest.raises(UsageError, match="no parameter with requires_grad"):
        prepare(model.requires_grad_(False), loader, **QUIET)


def test_model_files(tmp_path):
    config = {"name": "vit-micro", "num_classes": 3, "in_chans": 1, "img_size": 8}
    model = models.create(**config)
    path = tmp_path / "m.safetensors"
    models.save(model, path, config)
    again, found = models.load(path)
    assert found == config
    assert_equal_state(model.state_dict(), again.state_dict())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UsageError, match="cannot be read as a model"):
        models.load(path)
    with pytest.raises(UsageError, match="write one with `distruction train`"):
        models.load(tmp_path / "none")
