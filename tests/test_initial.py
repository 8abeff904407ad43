"""The std that a preparation starts from, against the scales that PyTorch's own initialisation has."""

import math

import pytest
import torch
from torch import nn

from distruction import Posterior, prepare
from distruction.initial import SMALLEST, initial_std


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
