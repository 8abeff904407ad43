"""The std that a preparation starts from, against the scales that PyTorch's own initialisation has."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from distruction import Posterior, prepare
from distruction.errors import PosteriorWarning
from distruction.initial import SMALLEST, initial_std
from distruction.likelihood import Bernoulli, Gaussian


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(48, 300),
        nn.Conv2d(8, 300, 3, groups=2),
        nn.ConvTranspose2d(300, 16, 3),
        nn.Conv1d(12, 200, 5),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_the_scale_of_a_weight_is_that_of_lecuns_initialisation(layer):
    # kaiming_normal_ with a linear gain draws with std 1 / sqrt(fan_in); PyTorch counts a transposed layer's
    # outputs as its inputs.
    mode = "fan_out" if isinstance(layer, nn.ConvTranspose2d) else "fan_in"
    torch.manual_seed(0)
    drawn = nn.init.kaiming_normal_(torch.empty_like(layer.weight), mode=mode, nonlinearity="linear").std().item()
    stds = initial_std(layer)
    assert stds["weight"] == pytest.approx(drawn, rel=0.03)
    assert stds["bias"] == stds["weight"]


def test_every_kind_of_tensor_has_a_scale():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.full((1, 1, 8), 0.02))
            self.zeros = nn.Parameter(torch.zeros(3))
            self.embedding = nn.Embedding(50, 8)
            self.norm = nn.BatchNorm1d(8)
            self.attention = nn.MultiheadAttention(8, 2)
            self.rnn = nn.GRU(8, 5)
            self.frozen = nn.Linear(2, 2).requires_grad_(False)

    model = Model()
    stds = initial_std(model)
    assert list(stds) == [n for n, p in model.named_parameters() if p.requires_grad]
    assert stds["token"] == pytest.approx(0.02)
    assert stds["zeros"] == SMALLEST
    assert stds["embedding.weight"] == pytest.approx(model.embedding.weight.square().mean().sqrt().item())
    assert stds["norm.weight"] == stds["norm.bias"] == 1.0
    assert stds["attention.in_proj_weight"] == stds["attention.in_proj_bias"] == pytest.approx(8**-0.5)
    assert all(0 < s < math.inf for s in stds.values())


def test_a_preparation_starts_there_by_default():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    data = [(torch.randn(8, 6), torch.randint(3, (8,)))]
    # With next to no evidence the stds stay where they start.
    posterior = prepare(model, data, num_examples=8, steps=1, evidence=1e-12, progress=False)
    expected = Posterior.around(
        model,
        {
            n: torch.full_like(p, s)
            for (n, p), s in zip(model.named_parameters(), initial_std(model).values(), strict=True)
        },
    )
    for name, std in expected.stds.items():
        torch.testing.assert_close(posterior.stds[name], std)


# --- the samples beside the means ------------------------------------------------------------------------


def trained():
    """A classifier that gets nearly all of its examples right, and them."""
    torch.manual_seed(0)
    x = torch.randn(96, 6)
    y = (x @ torch.randn(6, 3)).argmax(dim=-1)
    model = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    model.eval()
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y


def test_the_accuracy_of_the_means_is_found_on_the_samples_own_batches():
    """Unequal batches, of which the last three of 30 steps are looked at; NumPy does the sum."""
    model, x, y = trained()
    model.train()  # without its dropout all the same
    y = y.clone()
    y[8:60] = (y[8:60] + 1) % 3
    data = [(x[:8], y[:8]), (x[8:60], y[8:60]), (x[60:], y[60:])]
    told = []
    posterior = prepare(model, data, steps=30, progress=False, callback=told.append)
    model.eval()
    with torch.no_grad():
        right = {len(b): np.mean((model(a).argmax(dim=-1) == b).numpy()) for a, b in data}
    assert posterior.metadata["accuracy_at_means"] == pytest.approx(100 * np.mean(list(right.values())))
    assert all(step.accuracy_at_means is None for step in told[:27])
    assert [s.accuracy_at_means for s in told[27:]] == pytest.approx([100 * right[n] for n in (8, 52, 36)])
    early = prepare(model, data, steps=30, progress=False, callback=lambda s: s.step == 10)
    assert early.metadata["accuracy_at_means"] is None


def test_a_posterior_whose_samples_know_far_less_than_its_means_is_a_warning():
    model, x, y = trained()
    data = [(x, y)]
    with pytest.warns(PosteriorWarning, match=r"get \d+\.\d % of the training examples right, and its means 100\.0 %"):
        posterior = prepare(model, data, steps=5, std_init=3.0, evidence=1e-3, progress=False)
    assert posterior.metadata["sampled_accuracy"] < posterior.metadata["accuracy_at_means"] - 10
    with warnings.catch_warnings():
        warnings.simplefilter("error", PosteriorWarning)
        prepare(model, data, progress=False)


def test_of_several_labels_it_is_what_the_likelihood_calls_right():
    model, x, _ = trained()
    y = (x[:, :3] > 0).float()
    posterior = prepare(model, [(x, y)], steps=5, likelihood=Bernoulli(), evidence=1e6, progress=False)
    with torch.no_grad():
        right = ((model(x) > 0) == (y > 0)).numpy()
    assert posterior.metadata["accuracy_at_means"] == pytest.approx(100 * right.mean())
    values = prepare(model, [(x, x[:, :3])], steps=5, likelihood=Gaussian(1.0), progress=False)
    assert values.metadata["accuracy_at_means"] is None
