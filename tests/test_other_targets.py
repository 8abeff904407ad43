"""Models that are no classifiers: several labels, maps, values; prepared, and forgotten by one's own objective."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distruction import UsageError, forget, prepare
from distruction.likelihood import Bernoulli

QUIET = {"progress": False}


def batches(x, y):
    return list(zip(x.split(20), y.split(20), strict=True))


def trained(model, x, y, loss_fn):
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    return model


@pytest.fixture
def several():
    """120 examples of 6 inputs, each with three labels of its own sign."""
    torch.manual_seed(0)
    x = torch.randn(120, 6)
    y = (x[:, :3] > 0).float()
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3))
    return trained(model, x, y, F.binary_cross_entropy_with_logits), x, y


def test_a_loss_of_several_labels_is_a_likelihood(several):
    """The paper's rule sees the loss alone: the same numbers as with the likelihood of the same losses."""
    model, x, y = several

    def loss(logits, targets):
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1).mean()

    given, known = (
        prepare(model, batches(x, y), method="bgd", steps=10, std_init=0.05, **how, **QUIET)
        for how in ({"loss_fn": loss}, {"likelihood": Bernoulli()})
    )
    for name in known:
        torch.testing.assert_close(given.stds[name], known.stds[name], rtol=1e-6, atol=0)
        assert (given.stds[name] < 0.05).any()


def test_one_of_several_labels_is_forgotten(several):
    """On the examples that have it the first label goes; the others stay, also where nothing was read."""
    model, x, y = several
    posterior = prepare(model, batches(x, y), likelihood=Bernoulli(), steps=60, **QUIET)
    where = y[:, 0] == 1

    def without_the_first(logits, targets):
        return F.softplus(logits[:, 0]).mean()

    loader = batches(x[where], y[where])
    with pytest.raises(UsageError, match=r"targets are no class numbers: pass kl_weight"):
        forget(model, posterior, loader, objective=without_the_first, **QUIET)
    forget(model, posterior, loader, objective=without_the_first, kl_weight=0.02, steps=80, **QUIET)
    with torch.no_grad():
        found = (model(x) > 0).float()
    assert found[where, 0].mean() < 0.1
    assert (found[:, 1:] == y[:, 1:]).float().mean() > 0.9


def test_maps_of_labels():
    """Pixels above zero are of class 1; after forgetting none is."""
    torch.manual_seed(0)
    x = torch.randn(40, 1, 6, 6)
    y = (x[:, 0] > 0).long()
    model = trained(nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)), x, y, F.cross_entropy)
    posterior = prepare(model, batches(x, y), loss_fn=nn.CrossEntropyLoss(), steps=20, **QUIET)

    def all_of_class_0(logits, targets):
        return F.cross_entropy(logits, torch.zeros_like(targets))

    forget(model, posterior, batches(x, y), objective=all_of_class_0, kl_weight=0.02, steps=60, **QUIET)
    assert model(x).argmax(dim=1).float().mean() < 0.05


def test_values():
    """What was learnt on half of the line is drawn to zero, and the other half keeps more of it than it loses."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 80)[:, None]
    y = torch.sin(3 * x)
    model = trained(nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)), x, y, F.mse_loss)
    posterior = prepare(model, batches(x, y), loss_fn=nn.MSELoss(), steps=60, std_init=0.1, **QUIET)
    right = x[:, 0] > 0
    forget(
        model, posterior, batches(x[right], y[right]), objective=lambda z, t: z.square().mean(), kl_weight=0.05,
        steps=80, **QUIET
    )  # fmt: skip
    with torch.no_grad():
        size = model(x).abs()
    assert size[right].mean() < 0.3 * y[right].abs().mean()
    assert (model(x)[~right] - y[~right]).abs().mean() < 0.5 * y[~right].abs().mean()
