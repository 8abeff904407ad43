"""Strength found by dual ascent, requests one after another, and requests for records; on real digits."""

import copy
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from distruction import Posterior, PosteriorError, UsageError, forget, prepare
from distruction.data import load
from distruction.loop import Step
from distruction.modules import deterministic
from distruction.strength import DualAscent, Probability, examined

QUIET = {"progress": False}


class Digits:
    """A small network trained on digits, its posterior, and what the test images say.

    Args:
        labels: from digits to what the network tells apart.
    """

    def __init__(self, labels=lambda digit: digit):
        train, test = load("digits")
        (x, self.digits), (self.x_test, self.test_digits) = train[range(len(train))], test[range(len(test))]
        self.labels, self.test_labels = labels(self.digits), labels(self.test_digits)
        self.data = TensorDataset(x, self.labels)
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        )
        optimizer = torch.optim.Adam(self.model.parameters(), 3e-3, weight_decay=1e-4)
        for _ in range(15):
            for batch, y in DataLoader(self.data, batch_size=64, shuffle=True):
                optimizer.zero_grad()
                F.cross_entropy(self.model(batch), y).backward()
                optimizer.step()
        everything = self.of(torch.ones_like(self.labels, dtype=torch.bool))
        # Ten data points for each parameter.
        evidence = 10 * sum(p.numel() for p in self.model.parameters()) / len(self.labels)
        self.posterior = prepare(self.model.eval(), everything, evidence=evidence, steps=100, **QUIET)

    def of(self, mask):
        rows = mask.nonzero().squeeze(1)
        return DataLoader(TensorDataset(*self.data[rows]), batch_size=64, shuffle=True)

    def of_class(self, label):
        return self.of(self.labels == label)

    def accuracy(self, model, labels):
        """Test accuracy in percent on these classes."""
        rows = torch.isin(self.test_labels, torch.tensor(sorted(labels)))
        with torch.no_grad():
            found = model(self.x_test[rows]).argmax(dim=1)
        return 100 * (found == self.test_labels[rows]).double().mean().item()


@pytest.fixture(scope="module")
def digits():
    return Digits()


@pytest.mark.parametrize("objective", ["masked-teacher", "uniform-others"])
def test_a_class_goes_and_the_rest_stays(digits, objective):
    """Nothing is tuned: lambda and the number of steps are found. This network cannot spread a class evenly."""
    model = copy.deepcopy(digits.model)
    others = set(range(10)) - {3}
    before = digits.accuracy(model, others)
    report = forget(model, digits.posterior, digits.of_class(3), objective=objective, **QUIET)
    assert report.reached
    assert report.probability <= report.level == 0.01
    assert report.request == "class"
    assert digits.accuracy(model, {3}) <= 2
    if objective == "masked-teacher":
        assert digits.accuracy(model, others) >= before - 2
    assert len(report.history) < 400
    x, _ = digits.data[(digits.labels == 3).nonzero().squeeze(1)]
    with torch.no_grad():
        p = model(x).softmax(dim=1)[:, 3].mean().item()
    assert report.probability == pytest.approx(p, rel=1e-4)


@pytest.mark.parametrize("order", list(itertools.permutations([3, 8, 0])), ids=str)
def test_three_requests_in_a_row(digits, order):
    """What was forgotten first does not come back with a later request."""
    model = copy.deepcopy(digits.model)
    report = None
    for i, label in enumerate(order):
        report = forget(model, digits.posterior, digits.of_class(label), previous=report, **QUIET)
        assert digits.accuracy(model, order[: i + 1]) <= 5
        assert [list(r["labels"]) for r in report.posterior.metadata["forgotten"]] == [[str(c)] for c in order[: i + 1]]
    others = set(range(10)) - set(order)
    assert digits.accuracy(model, others) >= digits.accuracy(digits.model, others) - 3
    assert report.kl == pytest.approx(report.posterior.kl(digits.posterior).item())


def test_a_request_after_another_from_files(digits, tmp_path):
    reports = []
    for through_file in (False, True):
        model = copy.deepcopy(digits.model)
        first = forget(model, digits.posterior, digits.of_class(3), steps=10, **QUIET).posterior
        if through_file:
            first.save(tmp_path / "q")
            first = Posterior.load(tmp_path / "q")
        reports.append(forget(model, digits.posterior, digits.of_class(8), previous=first, steps=10, **QUIET))
    for a, b in zip(*(r.posterior.means.values() for r in reports), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(PosteriorError, match="forgotten from another posterior"):
        forget(model, Posterior.around(digits.model, 0.1), digits.of_class(0), previous=first, **QUIET)
    with pytest.raises(PosteriorError, match="does not say which posterior it was forgotten from"):
        forget(model, digits.posterior, digits.of_class(0), previous=digits.posterior, **QUIET)
    with pytest.raises(PosteriorError, match="prepared for other weights"):
        forget(copy.deepcopy(digits.model), digits.posterior, digits.of_class(0), previous=first, **QUIET)


def test_records_that_were_not_memorised_do_no_harm(digits):
    """30 random records; their labels are seen to live on, without being told."""
    model = copy.deepcopy(digits.model)
    chosen = torch.zeros(len(digits.labels), dtype=torch.bool)
    chosen[torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(1))[:30]] = True
    report = forget(model, digits.posterior, digits.of(chosen), **QUIET)
    assert report.request == "records"
    everything = set(range(10))
    assert digits.accuracy(model, everything) >= digits.accuracy(digits.model, everything) - 1
    assert not any(r["request"] == "class" for r in report.posterior.metadata["forgotten"])


def test_what_is_asked_is_told_by_the_training_sets_labels_or_by_the_caller(digits):
    some = digits.labels == 3
    some[: len(some) // 2] = False
    known = Posterior(digits.posterior.means, digits.posterior.stds, {"label_counts": {str(c): 130 for c in range(10)}})
    silent = Posterior(digits.posterior.means, digits.posterior.stds)
    found = [
        forget(copy.deepcopy(digits.model), p, digits.of(some), steps=1, request=request, **QUIET).request
        for p, request in ((known, "auto"), (silent, "auto"), (digits.posterior, "records"))
    ]
    assert found == ["records", "class", "records"]


def test_records_that_are_known_no_better_than_they_should_be_are_left_alone(digits):
    model = copy.deepcopy(digits.model)
    report = forget(model, digits.posterior, digits.of_class(3), request="records", level=0.9999, **QUIET)
    assert report.history == []
    assert report.kl == 0
    assert report.reached
    for a, b in zip(model.parameters(), digits.model.parameters(), strict=True):
        assert torch.equal(a, b)


# --- the ascent -----------------------------------------------------------------------------------


class Told:
    """Stands for the model's probability."""

    def __init__(self, *values):
        self.values = list(values)

    def __call__(self):
        return self.values.pop(0)


class Group:
    def __init__(self):
        self.param_groups = [{}]


@pytest.mark.parametrize("margin", [0.7, 0.85])
@pytest.mark.parametrize("least_pace", [1.0, 0.3, 0.0])
def test_the_ascent_is_its_formula(least_pace, margin):
    # Looked at after steps 3, 6, ...: it stands still, falls by itself, stands still again, is under the aim.
    values = [1.0, 0.5, 0.45, 0.02, 0.001, 1e-9]
    aim = margin * 0.01 / 0.99 / (1 + margin * 0.01 / 0.99)
    settings = {"least_pace": least_pace, "margin": margin}
    control = DualAscent(Told(*values), level=0.01, data_per_step=100.0, most=1e12, **settings)
    expected, optimizer, history = math.log(100), Group(), []
    for step in range(1, 21):
        control.before_step(optimizer, history)
        group = optimizer.param_groups[0]
        ratio = (1 - group["kl_weight"]) * group["data_per_step"] / group["kl_weight"]
        assert math.log(ratio) == pytest.approx(expected, abs=1e-9)
        assert 0.01 - 1e-12 <= group["kl_weight"] <= 0.99
        history.append(Step(step, 20, 0.0, 0.0, 1.0, 0.0))
        control.after_step(optimizer, history)
        v, before = 1.0, 1.0
        for look in range(1, step // 3 + 1):
            before, v = v, values[look - 1]
        excess = max(-2.0, min(2.0, math.log(v / aim)))
        share = max(least_pace, (1 + math.cos(math.pi * (step - 1) / 50)) / 2)
        if excess < 0:
            expected += 0.4 * share * excess
        elif v >= 0.8 * before:
            expected += 0.2 * share * excess
    again = DualAscent(Told(), level=0.01, data_per_step=100.0, most=1e12)
    again.load_state_dict(control.state_dict())
    assert again.weights() == control.weights()


@pytest.mark.parametrize("value", [1.0, 1e-9])
def test_the_ascent_stands_still_where_the_step_size_has_decayed(value):
    """v cannot answer there, so that R would run away and the next cycle would start with a leap."""
    control = DualAscent(lambda: value, level=0.01, data_per_step=100.0, most=1e40, least_pace=0.0)
    # Far from both bounds.
    control.log_ratio = 60.0
    history, path = [], []
    for step in range(1, 101):
        history.append(Step(step, 400, 0.0, 0.0, 1.0, 0.0))
        control.after_step(Group(), history)
        path.append(control.log_ratio)
    assert abs(path[48] - path[39]) < 0.4
    # The next cycle starts at full speed.
    assert abs(path[52] - path[49]) > 1.0


@pytest.mark.parametrize("reached", [False, True])
def test_another_cycle_starts_with_the_ratio_that_the_long_steps_followed(reached):
    control = DualAscent(lambda: value, level=0.01, data_per_step=100.0, most=1e40)
    history, path, value = [], [], 0.5
    for step in range(1, 51):
        history.append(Step(step, 400, 0.0, 0.0, 1.0, 0.0))
        value = 0.5 if step < 50 or not reached else 0.0069
        control.after_step(Group(), history)
        path.append(control.log_ratio)
    # (1 + cos(pi * 25 / 50)) / 2 = 1/2: the 26th step is the last that is at least half as long as the first.
    assert path[48] == pytest.approx(path[25] + 23 * 0.4)
    assert control.settled is reached
    assert path[49] == pytest.approx(path[48], abs=0.01) if reached else path[49] == path[25]
    again = DualAscent(lambda: 0.5, level=0.01, data_per_step=100.0, most=1e40)
    value = 0.5
    again.load_state_dict(json.loads(json.dumps(control.state_dict())))
    for step in range(51, 101):
        history.append(Step(step, 400, 0.0, 0.0, 1.0, 0.0))
        for one in (control, again):
            one.after_step(Group(), history)
    assert control.state_dict() == again.state_dict()


def test_a_run_with_the_ascent_resumes_with_the_same_bits(digits, tmp_path):
    options = {"checkpoint": tmp_path / "c", "checkpoint_steps": 1, "steps": 30, **QUIET}

    def interrupt(step):
        if step.step == 13:
            raise KeyboardInterrupt

    results = []
    for interrupted in (False, True):
        model = copy.deepcopy(digits.model)
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                forget(model, digits.posterior, digits.of_class(3), callback=interrupt, **options)
        results.append(forget(model, digits.posterior, digits.of_class(3), **options))
    whole, resumed = results
    assert whole.history == resumed.history
    for name in whole.posterior:
        assert all(torch.equal(a, b) for a, b in zip(whole.posterior[name], resumed.posterior[name], strict=True))


def test_a_level_that_is_not_reached_says_so(digits):
    report = forget(copy.deepcopy(digits.model), digits.posterior, digits.of_class(3), steps=5, **QUIET)
    assert report.reached is False
    assert report.probability > 0.01
    assert "allow more steps" in report.advice


def test_a_callback_ends_the_run_and_keeps_what_was_reached(digits):
    model = copy.deepcopy(digits.model)
    report = forget(model, digits.posterior, digits.of_class(3), callback=lambda step: step.step == 7, **QUIET)
    assert len(report.history) == 7
    report.posterior.check(model, same_weights=True)
    assert report.posterior.metadata["steps_done"] == 7
    assert not report.reached
    assert "callback" in report.advice


def test_looking_disturbs_nothing(digits):
    """Neither the generators nor BatchNorm's statistics nor the weights; and the value is that of all examples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 10))
    with deterministic(model):
        model(digits.x_test)
    data = examined(digits.of_class(8), torch.device("cpu"), seed=0)
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with deterministic(model):
        value = Probability(model, data, [8])()
        x, _ = digits.data[(digits.labels == 8).nonzero().squeeze(1)]
        with torch.no_grad():
            expected = model(x).double().softmax(dim=1)[:, 8].mean().item()
    assert value == pytest.approx(expected, rel=1e-6)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_more_records_than_are_looked_at_are_drawn_evenly():
    """Of 4000 records in the order of their labels, in batches of 50: 256 of all of them."""
    labels = torch.arange(4000) // 400
    data = examined(DataLoader(TensorDataset(labels[:, None].float(), labels), 50), torch.device("cpu"), seed=0)
    assert data.records == 4000
    assert data.counts == dict.fromkeys(range(10), 400)
    assert torch.equal(data.inputs[:, 0].long(), data.targets)
    counts = data.targets.bincount(minlength=10)
    assert counts.sum() == 256
    # A hypergeometric count: mean 25.6, standard deviation 4.6.
    assert ((counts - 25.6).abs() < 5 * 4.6).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl_weight": "strong"}, r"kl_weight \(lambda\) must be in \[0, 1\], not strong, or 'auto'"),
        ({"level": 1.0}, r"level must be a probability in \(0, 1\), not 1.0"),
        ({"level": 0.1, "kl_weight": 0.1}, "leave out level or kl_weight"),
        ({"request": "group"}, "request must be 'auto', 'class' or 'records', not 'group'"),
        ({"request": "class", "loader": None}, "no class is left"),
    ],
)
def test_bad_arguments(digits, change, message):
    model = copy.deepcopy(digits.model)
    loader = digits.of(torch.ones_like(digits.labels, dtype=torch.bool)) if "loader" in change else digits.of_class(3)
    change.pop("loader", None)
    with pytest.raises(UsageError, match=message):
        forget(model, digits.posterior, loader, **change, **QUIET)
    for a, b in zip(model.parameters(), digits.model.parameters(), strict=True):
        assert torch.equal(a, b)


# --- records --------------------------------------------------------------------------------------------


def ascent(values, level=0.99):
    """log R after each step at which v is looked at, of records."""
    seen = iter(values)
    control = DualAscent(lambda: next(seen), level=level, data_per_step=100.0, most=1e9, gently=True)
    control.value = values[0]
    history, found = [], []
    for _ in values:
        for _ in range(3):
            history.append(None)
            control.after_step(None, history)
        found.append(control.log_ratio)
    return found


def test_a_probability_near_one_is_told_from_the_level_by_its_odds():
    """0.9999 and 0.99 differ by 1 % and by a factor of a hundred in the odds: R rises as fast as it may."""
    first, *_, last = ascent([0.9999] * 5)
    assert last - first == pytest.approx(4 * 3 * 0.2 * 2, rel=1e-6)


def test_of_records_r_rests_while_they_are_forgotten_at_all():
    """5 % fewer odds at each look are a fall; for a class, whose level is far away, they are none."""
    odds = [9999 * 0.95**i for i in range(6)]
    _, second, *_, last = ascent([o / (1 + o) for o in odds])
    assert last == pytest.approx(second)
