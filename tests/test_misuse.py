"""Arguments of the wrong kind: a clear error before anything has changed, and no evidence that is counted wrongly."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distruction import Posterior, UsageError, forget, prepare
from distruction.loop import examples_in
from distruction.objectives import BoundedCrossEntropy

X, Y = torch.randn(24, 4, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 3
DATA = TensorDataset(X, Y)
QUIET = {"progress": False}


def net():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def ready():
    model = net()
    return model, Posterior.around(model, 0.1)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([{"x": X, "labels": Y.tolist()}], "targets in a batch of the training set is a list"),
        (DATA, "is a TensorDataset, a data set and no loader of batches: pass DataLoader"),
        ({"a": (X, Y)}, "is a dict, which cannot be read as batches"),
        ("batches", "is a str, which cannot be read as batches"),
    ],
)
def test_loaders_that_are_none(loader, message):
    with pytest.raises(UsageError, match=message):
        prepare(net(), loader, num_examples=24, steps=1, **QUIET)


def test_batches_that_a_data_set_gives_are_counted_by_their_examples():
    assert examples_in(DataLoader([(X, Y), (X, Y)], batch_size=None)) == 48
    assert examples_in(DataLoader([(X, Y), (X, Y)], batch_size=None, shuffle=True)) == 48

    class Batched(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return X, Y

    assert examples_in(DataLoader(Batched(), batch_size=None)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2.5}, "steps must be an integer >= 1, not 2.5"),
        ({"steps": "3"}, "steps must be an integer >= 1, not '3'"),
        ({"num_examples": "many"}, "num_examples must be an integer >= 1, not 'many'"),
        ({"num_examples": math.nan}, "num_examples must be an integer >= 1, not nan"),
        ({"checkpoint_seconds": math.nan}, "checkpoint_seconds must be >= 0, not nan"),
        ({"checkpoint_seconds": -1.0}, "checkpoint_seconds must be >= 0, not -1.0"),
        ({"loss_fn": nn.CrossEntropyLoss}, r"loss_fn is the class CrossEntropyLoss: pass one made of it"),
        ({"loss_fn": lambda a, b: torch.ones(()), "method": "bgd"}, "loss_fn returns a loss without a gradient"),
    ],
)
def test_options_of_prepare(options, message):
    with pytest.raises(UsageError, match=message):
        prepare(net(), [(X, Y)], **{"steps": 1, **QUIET, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2.5}, "steps must be an integer >= 1, not 2.5"),
        ({"level": "low"}, "level must be a probability in"),
        ({"objective": BoundedCrossEntropy}, "the objective is the class BoundedCrossEntropy: pass one made of it"),
        ({"objective": lambda a, b: torch.ones(())}, "the objective returns a loss without a gradient"),
        ({"objective": lambda a, b: a.argmax(1).sum()}, "the objective returns a loss without a gradient"),
        ({"previous": {"a": 1}}, "previous must be a ForgetReport or a Posterior, not a dict"),
    ],
)
def test_options_of_forget(options, message):
    model, posterior = ready()
    before = model.weight.detach().clone()
    with pytest.raises(UsageError, match=message):
        forget(model, posterior, [(X, Y)], **{"steps": 2, "request": "class", **QUIET, **options})
    assert torch.equal(model.weight, before)


def test_posteriors_and_models_that_are_none():
    model, posterior = ready()
    report = forget(model, posterior, [(X[:2], Y[:2])], objective=F.cross_entropy, kl_weight=0.5, steps=1, **QUIET)
    for none in ("path", report):
        with pytest.raises(UsageError, match=f"posterior must be a Posterior, not a {type(none).__name__}"):
            forget(model, none, [(X, Y)], steps=1, **QUIET)
    for none, name in ((nn.Linear, "type"), (model.state_dict(), "OrderedDict"), (lambda x: x, "function")):
        with pytest.raises(UsageError, match=f"the model is a {name}, not a torch.nn.Module"):
            prepare(none, [(X, Y)], steps=1, **QUIET)
        with pytest.raises(UsageError, match=f"the model is a {name}, not a torch.nn.Module"):
            posterior.check(none)
