"""Forgetting in depth: the term's gradient, the ascent's formula, resuming, ranks, and what is left in the features."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_strength import QUIET, Digits, Group, Told

from distruction import Posterior, UsageError, forget
from distruction.depth import DepthAscent, Dispersed
from distruction.features import Features, features_of, mean_cosine
from distruction.loop import Step


@pytest.fixture(scope="module")
def digits():
    return Digits()


class Class:
    """Examples of one class."""

    def __init__(self, digits, label):
        self.batch = digits.data[(digits.labels == label).nonzero().squeeze(1)]

    def __len__(self):
        return len(self.batch[1])

    def __getitem__(self, index):
        return tuple(t[index] for t in self.batch)


def cosine_of(model, digits, label):
    return mean_cosine(*features_of(model, Class(digits, label))).item()


def test_the_features_of_a_class_disperse(digits):
    plain, deep = copy.deepcopy(digits.model), copy.deepcopy(digits.model)
    forget(plain, digits.posterior, digits.of_class(3), **QUIET)
    options = {"depth": "features", "cosine_level": 0.6, **QUIET}
    report = forget(deep, digits.posterior, digits.of_class(3), **options)
    assert report.reached, report.advice
    # The whole class is looked at, at the means that the model ends with.
    assert report.cosine == pytest.approx(cosine_of(deep, digits, 3), abs=1e-4)
    assert report.cosine <= 0.6 < cosine_of(plain, digits, 3)
    assert report.probability <= 0.01
    assert digits.accuracy(deep, {3}) == 0
    # So small a network has few weights to spare; a weight of the cosine that runs away leaves half of it.
    others = set(range(10)) - {3}
    assert digits.accuracy(deep, others) >= digits.accuracy(digits.model, others) - 12
    assert report.posterior.metadata["cosine"] == report.cosine
    assert report.posterior.metadata["depth"] == "features"


def test_the_loss_is_the_objective_and_the_weighted_mean_cosine(digits):
    x, y = digits.data[:16]
    model = copy.deepcopy(digits.model)
    with Features(model) as tap:
        loss = Dispersed(lambda z, t, _: F.cross_entropy(z, t), tap)
        loss.weight = 0.7
        logits = model(x)
        tap.rows = tap.take()
        gradients = torch.autograd.grad(loss(logits, y, x), list(model.parameters()))
    hidden = model[:-1](x)
    units = hidden / hidden.norm(dim=1, keepdim=True)
    pairs = [(i, j) for i in range(16) for j in range(i) if y[i] == y[j]]
    cosine = sum((units[i] * units[j]).sum() for i, j in pairs) / len(pairs)
    expected = torch.autograd.grad(F.cross_entropy(model[-1](hidden), y) + 0.7 * cosine, list(model.parameters()))
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


class Looks(Told):
    """Stands for the model's probability and cosine."""

    def __call__(self):
        self.cosine = self.values.pop(0)
        return 0.5


def test_the_ascent_is_its_formula():
    # Looked at after steps 3, 6, ...: it stands still, falls by itself, stands still again, is under the aim.
    values = [0.9, 0.5, 0.49, 0.1, 0.15, 0.2]
    objective = type("Objective", (), {"weight": 0.0})()
    control = DepthAscent(objective, Looks(*values), level=0.3, strength=None, cycle=20)
    expected, optimizer, history = math.log(1000), Group(), []
    optimizer.param_groups[0].update(kl_weight=0.2, data_per_step=50.0)
    for step in range(1, 20):
        control.before_step(optimizer, history)
        assert objective.weight == pytest.approx(math.exp(expected) / (50 * 0.8 / 0.2))
        history.append(Step(step, 20, 0.0, 0.0, 1.0, 0.0))
        control.after_step(optimizer, history)
        c, before = 1.0, 1.0
        for look in range(step // 3):
            before, c = c, values[look]
        excess = max(-2.0, min(2.0, (c - 0.25) / 0.1))
        if excess < 0 or c > before - 0.02:
            expected += 0.03 * (1 + math.cos(math.pi * (step - 1) / 20)) / 2 * excess
    again = DepthAscent(objective, Looks(), level=0.3, strength=None, cycle=20)
    again.load_state_dict(control.state_dict())
    assert again.log_points == control.log_points == pytest.approx(expected)


@pytest.mark.parametrize("kl_weight", ["auto", 0.1])
def test_a_run_in_depth_resumes_with_the_same_bits(digits, tmp_path, kl_weight):
    options = {"checkpoint": tmp_path / "c", "checkpoint_steps": 1, "steps": 25, "depth": "features", **QUIET}

    def interrupt(step):
        if step.step == 13:
            raise KeyboardInterrupt

    results = []
    for interrupted in (False, True):
        model = copy.deepcopy(digits.model)
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                forget(model, digits.posterior, digits.of_class(3), callback=interrupt, kl_weight=kl_weight, **options)
        results.append(forget(model, digits.posterior, digits.of_class(3), kl_weight=kl_weight, **options))
    whole, resumed = results
    assert whole.history == resumed.history
    for name in whole.posterior:
        assert all(torch.equal(a, b) for a, b in zip(whole.posterior[name], resumed.posterior[name], strict=True))


def test_released_gradients_give_the_same_bits(digits):
    models = [copy.deepcopy(digits.model) for _ in range(2)]
    for model, release in zip(models, (False, True), strict=True):
        options = {"release_gradients": release, "depth": "features", "steps": 10, **QUIET}
        forget(model, digits.posterior, digits.of_class(3), **options)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("named", "used"), [(None, "plausible-others"), ("masked-teacher", "masked-teacher")])
def test_in_depth_any_plausible_class_may_come_unless_the_user_names_an_objective(digits, named, used):
    options = {"depth": "features", "objective": named, "steps": 2, **QUIET}
    report = forget(copy.deepcopy(digits.model), digits.posterior, digits.of_class(3), **options)
    assert report.posterior.metadata["objective"] == used


def test_a_cosine_that_is_not_reached_says_so(digits):
    options = {"depth": "features", "cosine_level": -0.5, "steps": 20, "level": 0.9, **QUIET}
    report = forget(copy.deepcopy(digits.model), digits.posterior, digits.of_class(3), **options)
    assert report.reached is False
    assert "mean cosine is" in report.advice
    assert "allow more steps" in report.advice


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": "weights"}, "depth must be 'features' or None, not 'weights'"),
        ({"depth": "features", "cosine_level": 1.0}, r"cosine_level must be a cosine in \(-1, 1\), not 1.0"),
        ({"cosine_level": 0.2}, "are for depth='features'"),
        ({"depth": "features", "request": "records"}, "this request is for records"),
        ({"depth": "features", "classifier": "head"}, "no layer 'head'"),
    ],
)
def test_bad_arguments(digits, change, message):
    model = copy.deepcopy(digits.model)
    with pytest.raises(UsageError, match=message):
        forget(model, digits.posterior, digits.of_class(3), **change, **QUIET)
    for a, b in zip(model.parameters(), digits.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_named_classifier_is_the_one_that_is_found(digits):
    models = [copy.deepcopy(digits.model) for _ in range(2)]
    for model, name in zip(models, (None, "5"), strict=True):
        options = {"depth": "features", "classifier": name, "steps": 5, **QUIET}
        forget(model, Posterior(digits.posterior.means, digits.posterior.stds), digits.of_class(3), **options)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)
