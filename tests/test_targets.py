"""Targets in a user's words: quantiles of unseen examples, and records that end where these are."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import mannwhitneyu
from test_strength import QUIET, Digits

from distruction import Posterior, UsageError, forget, prepare
from distruction.asked import labels_forgotten
from distruction.metrics import attack_auc, log_odds
from distruction.rehearsal import rehearse
from distruction.request_figures import curves
from distruction.strength import CYCLE, LONG_CYCLE, examined
from distruction.targets import Advantage, HeldOut, held_out_quantiles


@pytest.fixture(scope="module")
def digits():
    return Digits()


@pytest.fixture(scope="module")
def held_out(digits):
    return [(digits.x_test[i : i + 64], digits.test_labels[i : i + 64]) for i in range(0, len(digits.x_test), 64)]


def odds_of(model, x, y):
    with torch.no_grad():
        p = model(x).double().softmax(1)[torch.arange(len(y)), y]
    return (p / (1 - p)).log()


def test_preparation_keeps_quantiles_and_no_example(digits, held_out):
    found = prepare(copy.deepcopy(digits.model), digits.of_class(3), held_out=held_out, steps=2, **QUIET).metadata
    assert found["held_out"]["examples"] == len(digits.x_test)
    odds = odds_of(digits.model, digits.x_test, digits.test_labels)
    shares = (np.arange(33) + 0.5) / 33
    own = odds[digits.test_labels == 4].numpy()
    np.testing.assert_allclose(found["held_out"]["log_odds"]["4"], np.quantile(own, shares), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(found["held_out"]["log_odds"]["all"], np.quantile(odds, shares), rtol=1e-6, atol=1e-5)
    few = held_out_quantiles(digits.model, [(digits.x_test[:9], torch.zeros(9, dtype=torch.int64))])
    assert list(few["log_odds"]) == ["all"]


@pytest.mark.parametrize("drift", [0.0, 0.4])
def test_the_advantage_is_the_area_under_the_curve(digits, drift):
    """Against examples of the class, and against all: the larger one. What has drifted is moved first."""
    data = examined(digits.of_class(8), torch.device("cpu"), seed=0)
    odds = log_odds(digits.model(digits.x_test).detach(), digits.test_labels)
    x, y = digits.data[(digits.labels == 8).nonzero().squeeze(1)]
    ours = odds_of(digits.model, x, y)
    for everyone in (odds, odds - 20):
        held_out = HeldOut({8: odds[digits.test_labels == 8].sort().values}, everyone.sort().values, len(odds), drift)
        # As if each record had been surer by 2.
        before = log_odds(digits.model(data.inputs).detach(), data.targets) + 2
        advantage = Advantage(digits.model, data, held_out, before)
        value, found = advantage(), advantage.signed
        areas = [
            mannwhitneyu(ours, known - 2 * drift).statistic / len(ours) / len(known)
            for known in (held_out.by_label[8], everyone)
        ]
        assert found == pytest.approx(2 * max(areas) - 1, abs=2e-4)
        assert value == found + 0.1
    assert areas[0] < areas[1] == 1


@pytest.fixture(scope="module")
def memorising(digits):
    torch.manual_seed(3)
    rows = torch.randperm(len(digits.labels))[:150]
    x, y = digits.data[rows]
    y = y.clone()
    wrong = torch.arange(150) < 30
    y[wrong] = (y[wrong] + 1) % 10
    model = copy.deepcopy(digits.model)
    for layer in model:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    half = len(digits.x_test) // 2
    held_out = [(digits.x_test[:half], digits.test_labels[:half])]
    posterior = prepare(model, [(x[i : i + 50], y[i : i + 50]) for i in (0, 50, 100)], held_out=held_out, steps=60,
                        num_examples=150, **QUIET)  # fmt: skip
    return model, posterior, (x, y), (digits.x_test[half:], digits.test_labels[half:])


def test_memorised_records_end_where_unseen_ones_are(memorising):
    model, posterior, (x, y), (other_x, other_y) = memorising
    model = copy.deepcopy(model)
    records = x[30:70], y[30:70]

    def auc():
        return attack_auc(odds_of(model, *records), odds_of(model, other_x, other_y))

    before = auc()
    report = forget(model, posterior, [records], target="unseen", **QUIET)
    assert report.reached, report.advice
    assert report.request == "records"
    assert report.advantage <= report.level == -0.05 < 2 * before / 100 - 1
    assert abs(auc() - 50) < abs(before - 50)
    assert report.posterior.metadata["target"] == "unseen"


@pytest.mark.parametrize(("level", "advantage", "lines"), [(0.01, None, 1), (-0.05, -0.06, 0)])
def test_an_attackers_level_is_not_drawn_among_probabilities(level, advantage, lines):
    steps = [
        {"step": i, "loss": None, "probability": p, "kl": None, "kl_weight": None} for i, p in ((1, 0.9), (2, 0.5))
    ]
    ((_, figure),) = curves({"steps": steps, "level": level, "advantage": advantage})
    (axes,) = figure.axes
    assert len(axes.lines) == 1 + lines
    assert [t.get_text() for t in axes.texts] == ["level 0.01"] * lines


def test_a_rehearsal_finds_how_far_unseen_examples_follow(memorising):
    """The same mock request by hand: its records' and the held-out examples' medians."""
    model, posterior, (x, y), (other_x, other_y) = memorising
    posterior = Posterior(posterior.means, posterior.stds, copy.deepcopy(posterior.metadata))
    training = [(x[i : i + 50], y[i : i + 50]) for i in (50, 100, 0)]
    mine = x[50:65], y[50:65]
    rehearse(model, posterior, training, [(other_x, other_y)], classes=[4], objectives=["masked-teacher"], **QUIET)
    drift = posterior.metadata["held_out"]["drift"]
    del posterior.metadata["held_out"]["drift"]
    mock = copy.deepcopy(model)
    report = forget(mock, posterior, [mine], target="unseen", **QUIET)
    fell = [np.median(odds_of(model, *data) - odds_of(mock, *data)) for data in (mine, (other_x, other_y))]
    assert report.history
    assert drift == pytest.approx(fell[1] / fell[0], rel=1e-3)
    assert 0 < drift < 0.5


def test_records_that_look_unseen_are_left_alone(memorising):
    model, posterior, _, others = memorising
    forgotten = copy.deepcopy(model)
    report = forget(forgotten, posterior, [others], target="unseen", **QUIET)
    assert report.history == []
    assert report.reached
    n, m = len(others[1]), posterior.metadata["held_out"]["examples"]
    # The variance of the Mann-Whitney statistic U, of which the area is U / (n m).
    assert report.advantage <= report.level == pytest.approx(2 * (n * m * (n + m + 1) / 12) ** 0.5 / (n * m))
    for a, b in zip(model.parameters(), forgotten.parameters(), strict=True):
        assert torch.equal(a, b)


def test_wrong_labels_go(memorising):
    model, posterior, (x, y), _ = memorising
    model = copy.deepcopy(model)
    report = forget(model, posterior, [(x[:30], y[:30])], target="corrected", **QUIET)
    assert report.reached, report.advice
    assert report.probability <= 0.05
    assert (model(x[:30]).argmax(1) == y[:30]).double().mean() <= 0.05
    # It ends with steps that have decayed, and is not left where a long one first reaches the level.
    assert len(report.history) % LONG_CYCLE == 0


@pytest.mark.parametrize("knows_unseen", [False, True])
def test_records_whose_labels_are_doubted_are_told_of_corrected(digits, held_out, knows_unseen):
    """Less likely than unseen examples' labels by more than chance: they may be wrong."""
    posterior = Posterior(digits.posterior.means, digits.posterior.stds, copy.deepcopy(digits.posterior.metadata))
    if knows_unseen:
        posterior.metadata["held_out"] = held_out_quantiles(digits.model, held_out)
    model = copy.deepcopy(digits.model)
    x, y = digits.x_test, digits.test_labels
    right = torch.arange(len(y)) % 3 > 0
    for labels, told in ((y, False), (torch.where(right, y, (y + 1) % 10), True)):
        report = forget(model, posterior, [(x, labels)], request="records", **QUIET)
        assert report.history == []
        assert report.reached
        assert ("--target corrected" in report.outcome) == told


def test_gone_is_a_request_for_classes(digits):
    reports = [
        forget(copy.deepcopy(digits.model), digits.posterior, digits.of_class(3), steps=3, **options, **QUIET)
        for options in ({"target": "gone"}, {"request": "class"})
    ]
    assert reports[0].history == reports[1].history
    assert reports[0].request == "class"


def test_a_sub_class_goes_and_more_of_its_siblings_keep_the_label():
    """Fours of digits that are told apart by twos: 0 or 1, 2 or 3, 4 or 5, ..."""
    pairs = Digits(labels=lambda digit: digit // 2)
    fours, fives = (pairs.digits == 4).nonzero().squeeze(1), (pairs.test_digits == 5)
    known = {}
    for target in ("sub-class", "gone"):
        model = copy.deepcopy(pairs.model)
        report = forget(model, pairs.posterior, pairs.of(pairs.digits == 4), target=target, **QUIET)
        assert report.reached, report.advice
        assert len(report.history) % (LONG_CYCLE if target == "sub-class" else CYCLE) == 0
        with torch.no_grad():
            x, y = pairs.data[fours]
            assert model(x).softmax(1)[torch.arange(len(y)), y].mean() <= 0.05
            assert (model(pairs.x_test[pairs.test_digits == 4]).argmax(1) == 2).double().mean() <= 0.1
            known[target] = (model(pairs.x_test[fives]).argmax(1) == 2).double().mean()
        assert labels_forgotten(report.posterior) == ([2] if target == "gone" else [])
    assert known["sub-class"] > known["gone"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "hidden"}, "target must be gone, sub-class, unseen, corrected or None, not 'hidden'"),
        ({"target": "gone", "request": "records"}, "is a request for class, not for records"),
        ({"target": "unseen", "level": 0.5}, "has a level of its own, an attacker's advantage: leave out level"),
        ({"target": "unseen"}, r"prepare\(..., held_out=loader\)"),
    ],
)
def test_bad_arguments(digits, change, message):
    model = copy.deepcopy(digits.model)
    bare = Posterior(digits.posterior.means, digits.posterior.stds)
    with pytest.raises(UsageError, match=message):
        forget(model, bare, digits.of_class(3), **change, **QUIET)
    for a, b in zip(model.parameters(), digits.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_held_out_data_must_be_there_and_labelled(digits):
    with pytest.raises(UsageError, match="held-out set is empty"):
        held_out_quantiles(digits.model, [])
    with pytest.raises(UsageError, match="int64 class numbers"):
        held_out_quantiles(digits.model, [(digits.x_test[:2], torch.rand(2))])
