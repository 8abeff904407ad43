"""Arguments of the wrong kind: a clear error before anything has changed, and no evidence that is counted wrongly."""

import math

import numpy as np
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


# --- outputs and models ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gauss-newton", "bgd"])
@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda z: z[:, :1], r"shape \(24, 1\), and cross entropy wants.*likelihood=Bernoulli\(\)"),
        (lambda z: z[:, 0], r"shape \(24,\), and cross entropy wants"),
        (lambda z: z[:, :, None], r"shape \(24, 3, 1\), and cross entropy wants"),
        (lambda z: z[:, :, None, None].expand(-1, -1, 2, 2), r"shape \(24, 3, 2, 2\), and cross entropy wants"),
        (lambda z: z.mean(0, keepdim=True), r"shape \(1, 3\) for a batch of 24: their first dimension"),
        (lambda z: z.mean(), r"shape \(\) for a batch of 24"),
        (lambda z: z.argmax(-1), "a tensor of torch.int64.*floating point"),
        (lambda z: z.to(torch.complex64), "a tensor of torch.complex64"),
        (lambda z: z.to_sparse(), "torch.sparse_coo; logits are dense"),
    ],
)
def test_outputs_that_are_no_classes(method, output, message):
    model = nn.Sequential(net())
    model.register_forward_hook(lambda module, inputs, z: output(z))
    with pytest.raises(UsageError, match=message):
        prepare(model, [(X, Y)], steps=1, method=method, **QUIET)


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_weights_that_a_forward_pass_overwrites_are_refused(layer):
    """The sample, cut to the largest norm, would have become the mean."""
    torch.manual_seed(0)
    flatten = nn.Flatten() if layer is nn.Embedding else nn.Identity()
    model = nn.Sequential(layer(9, 4, max_norm=0.5), flatten, nn.Linear(8 if layer is nn.Embedding else 4, 3))
    tokens = torch.randint(9, (24, 2))
    with torch.no_grad():
        model(torch.arange(18).reshape(9, 2) % 9)
    before = model[0].weight.detach().clone()
    posterior = Posterior.around(model, 0.5)
    for run in (
        lambda: prepare(model, [(tokens, Y)], steps=2, **QUIET),
        lambda: forget(model, posterior, [(tokens, Y)], steps=2, mc_samples=1, **QUIET),
    ):
        with pytest.raises(UsageError, match=r"embedding 0 has max_norm=0\.5.*set its max_norm to None, or freeze it"):
            run()
        assert torch.equal(model[0].weight, before)
    model[0].requires_grad_(False)
    prepare(model, [(tokens, Y)], steps=2, **QUIET)
    assert torch.equal(model[0].weight, before)


def test_an_exported_model_has_no_modes():
    model = torch.export.export(net(), (X,)).module()
    with pytest.raises(UsageError, match=r"no eval mode .*pass the module that it was made from"):
        prepare(model, [(X, Y)], steps=1, **QUIET)


def test_inference_mode_is_told():
    model, posterior = ready()
    for run in (
        lambda: prepare(model, [(X, Y)], steps=1, **QUIET),
        lambda: forget(model, posterior, [(X, Y)], steps=1, **QUIET),
    ):
        with torch.inference_mode(), pytest.raises(UsageError, match=r"inference_mode\(\) is on"):
            run()


def test_features_made_in_inference_mode_are_inputs():
    with torch.inference_mode():
        features = X.clone()
    made = [prepare(net(), [(x, Y)], steps=2, **QUIET) for x in (X, features)]
    assert all(torch.equal(a, made[1].stds[n]) for n, a in made[0].stds.items())
    model, posterior = ready()
    forget(model, posterior, [(features, Y)], steps=2, request="records", **QUIET)


# --- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.bool])
def test_labels_of_any_integers(dtype):
    labels = Y.clamp(max=1) if dtype == torch.bool else Y
    results = []
    for y in (labels, labels.to(dtype)):
        model = net()
        posterior = prepare(model, [(X, y)], steps=2, **QUIET)
        report = forget(model, posterior, [(X[:3], y[:3])], steps=4, **QUIET)
        results.append((posterior, report))
    for kind in range(2):
        a, b = (getattr(r[kind], "posterior", r[kind]) for r in results)
        assert all(torch.equal(a.means[n], b.means[n]) and torch.equal(a.stds[n], b.stds[n]) for n in a)
    assert results[0][1].posterior.metadata["forgotten"] == results[1][1].posterior.metadata["forgotten"]


def test_numpys_numbers_are_numbers(tmp_path):
    plain = {"steps": 3, "seed": 4, "num_examples": 24, "evidence": 2.0, "std_init": 0.5}
    kinds = {
        "steps": np.int64,
        "seed": np.uint8,
        "num_examples": np.int32,
        "evidence": np.int64,
        "std_init": np.float32,
    }
    made = [prepare(net(), [(X, Y)], **given, **QUIET) for given in (plain, {k: kinds[k](v) for k, v in plain.items()})]
    assert made[0].metadata == made[1].metadata
    made[1].save(tmp_path / "p")
    assert Posterior.load(tmp_path / "p").metadata == made[0].metadata
    for name, value in (("seed", None), ("seed", 1.5), ("seed", True), ("seed", 2**63), ("steps", True)):
        with pytest.raises(UsageError, match=f"{name} must be an integer"):
            prepare(net(), [(X, Y)], **{"steps": 1, name: value}, **QUIET)
        model, posterior = ready()
        with pytest.raises(UsageError, match=f"{name} must be an integer"):
            forget(model, posterior, [(X, Y)], **{"steps": 1, name: value}, **QUIET)


@pytest.mark.parametrize("truth", [bool, np.bool_, torch.tensor])
def test_a_callbacks_comparison_stops_the_run(truth):
    assert prepare(net(), [(X, Y)], steps=4, callback=lambda s: truth(s.step >= 2), **QUIET).metadata["steps_done"] == 2


@pytest.mark.parametrize("answer", [None, 1, "stop", [True], torch.ones(2, dtype=torch.bool)])
def test_other_answers_of_a_callback_do_not(answer):
    assert prepare(net(), [(X, Y)], steps=2, callback=lambda s: answer, **QUIET).metadata["steps_done"] == 2
