"""Predictions averaged over a posterior's samples: what they are, and a model that is as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from distruction import BGD, Posterior, UsageError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.fail_at = None

    def forward(self, x):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return self.head(self.dropout(self.norm(self.first(x))))


def make():
    torch.manual_seed(0)
    model = Net()
    model.norm.eval()  # a mode of its own
    model.head.requires_grad_(False)
    posterior = Posterior.around(copy.deepcopy(model).requires_grad_(True), 0.2)
    return model, posterior, torch.randn(7, 3)


def state_of(model):
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    return tensors, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


def assert_as_it_was(model, before):
    after = state_of(model)
    assert all(torch.equal(before[0][n], t) for n, t in after[0].items())
    assert after[1:] == before[1:]


def test_mean_of_softmaxes_against_samples_by_hand():
    model, posterior, x = make()
    before = state_of(model)
    found = posterior.predict(model, x, samples=5, seed=3)
    assert_as_it_was(model, before)
    assert found.logits.shape == (5, 7, 4)
    other = copy.deepcopy(model).eval()
    by_hand = []
    for draw in range(5):
        posterior.sample_(other, seed=3, draw=draw)
        with torch.no_grad():
            by_hand.append(other(x))
    assert torch.equal(found.logits, torch.stack(by_hand))
    expected = torch.stack([torch.exp(t.double() - t.double().logsumexp(-1, keepdim=True)) for t in by_hand]).mean(0)
    torch.testing.assert_close(found.probabilities.double(), expected, rtol=1e-6, atol=1e-7)
    assert not found.logits.requires_grad


def test_the_same_whatever_the_batches_and_the_global_generator():
    model, posterior, x = make()
    expected = posterior.predict(model, x, samples=3).logits
    state = torch.get_rng_state()
    labels = torch.zeros(7)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=2)
    for inputs, batch_size in ((x, 2), (loader, None), (iter(x.split(3)), None), ([(x, labels)], None)):
        torch.manual_seed(5)
        found = posterior.predict(model, inputs, samples=3, batch_size=batch_size).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.set_rng_state(state)
    assert torch.equal(posterior.predict(model, x, samples=3).logits, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(posterior.predict(model, x, samples=3, seed=1).logits, expected)
    assert not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize("fail_at", [1, 4])
def test_the_model_is_as_it_was_after_an_interrupt(fail_at):
    model, posterior, x = make()
    model.fail_at = fail_at
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        posterior.predict(model, x, samples=3, batch_size=3)
    assert_as_it_was(model, before)
    model.fail_at = None
    with pytest.raises(RuntimeError, match="shape"):
        posterior.predict(model, torch.zeros(2, 5))
    assert_as_it_was(model, before)


def test_channels_last_weights_and_named_inputs():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)

        def forward(self, pixels):
            return self.conv(pixels).mean((2, 3))

    model, x = Named(), torch.randn(2, 3, 5, 5)
    posterior = Posterior.around(model, 0.1)
    before = model.conv.weight.detach().clone()
    by_name = posterior.predict(model, {"pixels": x}, samples=2)
    assert torch.equal(by_name.logits, posterior.predict(model, x, samples=2).logits)
    assert torch.equal(by_name.logits, posterior.predict(model, [{"pixels": x}], samples=2).logits)
    assert torch.equal(model.conv.weight, before)


def test_autocast_keeps_no_sample():
    model, posterior, x = make()
    model.requires_grad_(True)  # autocast keeps copies of such weights alone
    with torch.autocast("cpu", torch.bfloat16):
        before = model.eval()(x)
        found = posterior.predict(model, x, samples=3).logits
        assert torch.equal(model(x), before)
    assert found.dtype == torch.float32
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], before.float())


def test_in_the_middle_of_training():
    runs = []
    for predicts in (False, True):
        model, posterior, x = make()
        model.eval().requires_grad_(True)
        opt = BGD(model.named_parameters(), std_init=posterior, data_per_step=7)
        opt.train()
        for _ in range(3):
            opt.zero_grad()
            model(x).square().mean().backward()
            if predicts:
                opt.posterior().predict(model, x, samples=2)
            opt.step()
        runs.append(opt.posterior().fingerprint())
    assert runs[0] == runs[1]


def test_refusals():
    model, posterior, x = make()
    for arguments, message in (
        ({"samples": 0}, "samples must be an integer >= 1, not 0"),
        ({"samples": 2.0}, "samples must be an integer >= 1, not 2.0"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, not 0"),
    ):
        with pytest.raises(UsageError, match=message):
            posterior.predict(model, x, **arguments)
    with pytest.raises(UsageError, match="no batch"):
        posterior.predict(model, [])
    with pytest.raises(UsageError, match="batch_size splits one tensor"):
        posterior.predict(model, [x], batch_size=2)
    with pytest.raises(UsageError, match="not str"):
        posterior.predict(model, ["a"])
    one = nn.Linear(3, 1)
    found = Posterior.around(one, 0.1).predict(one, x, samples=2)
    with pytest.raises(UsageError, match=r"shape \(7, 1\), and a softmax needs two classes"):
        _ = found.probabilities


def test_weights_cached_by_parametrize_are_told():
    """They would be those of the first sample, and the spread of the others' predictions half of what it is."""

    class Symmetric(nn.Module):
        def forward(self, weight):
            return (weight + weight.T) / 2

    class Same(nn.Module):
        def forward(self, weight):
            return weight

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    parametrize.register_parametrization(model[0], "weight", Same())
    parametrize.register_parametrization(model[1], "weight", Symmetric())
    posterior = Posterior.around(model, 0.3)
    x = torch.randn(4, 3)
    expected = posterior.predict(model, x, samples=3)
    with parametrize.cached(), pytest.raises(UsageError, match=r"cached\(\) is on, so that 1 keeps the weights"):
        posterior.predict(model, x, samples=3)
    assert torch.equal(posterior.predict(model, x, samples=3).logits, expected.logits)
