"""Scenarios: who is forgotten, on what it is measured, and that nothing but the seed decides."""

import json

import pytest
import torch

from distruction import UsageError, scenarios
from distruction.data import grouped, load

GROUPS = {"06": ["0", "6"], "17": ["1", "7"], "23": ["2", "3"], "49": ["4", "9"], "58": ["5", "8"]}


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def test_full_class(digits):
    train, test = digits
    split = scenarios.full_class(train, test, "3")
    assert (split.forget.labels == 3).all()
    assert (split.retain.labels != 3).all()
    assert len(split.forget) + len(split.retain) == len(train)
    assert (split.measured_forget.labels == 3).all()
    assert (split.measured_retain.labels != 3).all()
    assert len(split.measured_forget) + len(split.measured_retain) == len(test)
    assert torch.equal(split.held_out, test.labels == 3)
    assert torch.equal(split.indices, (train.labels == 3).nonzero().squeeze(1))


def test_sub_class_has_the_super_class_as_label(digits):
    train, test = digits
    split = scenarios.sub_class(grouped(train, GROUPS), grouped(test, GROUPS), "3")
    assert split.test.classes == tuple(GROUPS)
    assert (split.forget.labels == 2).all()
    assert (split.measured_forget.labels == 2).all()
    assert torch.equal(train.labels[split.indices].unique(), torch.tensor([3]))
    # The sibling "2" shares the super class and is retained.
    assert (split.retain.labels == 2).sum() == (train.labels == 2).sum()
    assert torch.equal(split.measured_forget.images, test.images[test.labels == 3])


def test_random_is_measured_on_the_forgotten_training_images(digits):
    train, test = digits
    split = scenarios.random(train, test, 100, seed=4)
    assert len(split.forget) == 100
    assert torch.equal(split.measured_forget.images, split.forget.images)
    assert torch.equal(split.measured_retain.images, test.images)
    assert split.held_out.all()
    assert len(split.retain) == len(train) - 100


def test_random_depends_on_its_own_seed_only(digits):
    first = scenarios.random(*digits, 100, seed=4)
    torch.manual_seed(123)
    torch.rand(7)
    assert torch.equal(first.indices, scenarios.random(*digits, 100, seed=4).indices)
    assert not torch.equal(first.indices, scenarios.random(*digits, 100, seed=5).indices)


def test_random_draws_every_example_equally_often(digits):
    counts = torch.zeros(len(digits[0]))
    for seed in range(200):
        counts[scenarios.random(*digits, 100, seed=seed).indices] += 1
    # Binomial(200, 100 / 1437): its mean and variance, within five standard errors.
    p = 100 / len(counts)
    assert counts.mean().item() == pytest.approx(200 * p)
    assert counts.var().item() == pytest.approx(200 * p * (1 - p), rel=5 * (2 / len(counts)) ** 0.5)


def test_indices_are_written(digits, tmp_path):
    split = scenarios.random(*digits, 5, seed=0)
    scenarios.write_indices(tmp_path / "i.json", split, {"scenario": "random", "seed": 0})
    assert json.loads((tmp_path / "i.json").read_text()) == {
        "scenario": "random",
        "seed": 0,
        "indices": split.indices.tolist(),
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: scenarios.full_class(*d, "ten"), "'ten' is unknown; the classes are 0, 1"),
        (lambda d: scenarios.random(*d, 0, 0), r"count must be in \[1, 1436\]"),
        (lambda d: scenarios.random(*d, 1437, 0), r"count must be in \[1, 1436\]"),
        (lambda d: grouped(d[0], {"a": ["3"]}), r"missing: \['0', '1'"),
        (lambda d: grouped(d[0], {**GROUPS, "x": ["3"]}), r"unknown or repeated: \['3'\]"),
        (lambda d: scenarios.sub_class(*d, "3"), "no fine classes to forget; give groups"),
        (
            lambda d: scenarios.sub_class(*(grouped(p, GROUPS) for p in d), "23"),
            "fine class '23' is unknown; they are 0",
        ),
        (lambda d: scenarios.full_class(d[0].subset(d[0].labels == 3), d[1], "3"), "nothing to retain"),
        (lambda d: scenarios.full_class(d[0].subset(d[0].labels != 3), d[1], "3"), "nothing to forget"),
    ],
)
def test_errors(digits, make, message):
    with pytest.raises(UsageError, match=message):
        make(digits)
