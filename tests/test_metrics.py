"""Metrics against SciPy, scikit-learn, closed forms and cases computed by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import accuracy_score
from torch import nn

from distruction import UsageError, fisher, metrics
from distruction.data import Images, loader


def logits_of(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log().float()


def random_logits(seed, count=50, classes=7, spread=3.0):
    return spread * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


# --- accuracy ------------------------------------------------------------------------------------


def test_accuracy_is_scikit_learns():
    logits, labels = random_logits(0), torch.arange(50) % 7
    assert metrics.accuracy(logits, labels) == pytest.approx(100 * accuracy_score(labels, logits.argmax(1)))
    assert math.isnan(metrics.accuracy(torch.empty(0, 7), torch.empty(0, dtype=torch.int64)))


def test_batch_mean_weighs_batches_equally():
    """64 right of 64 and 27 of 36: 91 % of the images, (100 + 75) / 2 as the published tables count."""
    labels = torch.zeros(100, dtype=torch.int64)
    logits = torch.zeros(100, 2)
    logits[:91, 0] = 1
    logits[91:, 1] = 1
    assert metrics.accuracy(logits, labels) == pytest.approx(91.0)
    assert metrics.batch_mean_accuracy(logits, labels, 64) == pytest.approx(87.5)
    assert metrics.batch_mean_accuracy(logits, labels, 50) == pytest.approx(91.0)


@pytest.mark.parametrize(("right", "count"), [(0, 36), (36, 36), (35, 36), (313, 324)])
def test_wilson_interval_solves_its_equation(right, count):
    """The limits are the p with |p - share| = z sqrt(p (1 - p) / n), beside the share itself at 0 and 1."""
    share, z = right / count, stats.norm.ppf(0.975)
    for limit in metrics.wilson_interval(100 * share, count):
        p = limit / 100
        assert abs(p - share) == pytest.approx(z * math.sqrt(p * (1 - p) / count), abs=1e-12)
    low, high = metrics.wilson_interval(100 * share, count)
    assert 0 <= low <= 100 * share <= high <= 100
    assert high - low > 1


# --- membership inference ------------------------------------------------------------------------


def test_entropy_and_loss_are_scipys():
    logits, labels = random_logits(1), torch.arange(50) % 7
    p = torch.softmax(logits.double(), 1).numpy()
    np.testing.assert_allclose(metrics.entropy(logits), stats.entropy(p, axis=1), rtol=1e-12)
    np.testing.assert_allclose(metrics.loss(logits, labels), -np.log(p[np.arange(50), labels]), rtol=1e-9)
    np.testing.assert_allclose(metrics.log_odds(logits, labels), np.log(p / (1 - p))[np.arange(50), labels], rtol=1e-9)


def test_confident_examples_are_told_apart():
    """In float32 both losses are 0; in float64 they are 2e-13 and 4e-18 (which log odds still hold)."""
    logits, labels = torch.tensor([[30.0, 0.7, 0.0], [40.0, 0.0, -50.0]]), torch.tensor([0, 0])
    assert metrics.loss(logits, labels)[0] == pytest.approx(math.exp(-29.3) + math.exp(-30), rel=1e-2)
    expected = torch.tensor([-math.log(math.exp(-29.3) + math.exp(-30)), 40.0], dtype=torch.float64)
    torch.testing.assert_close(metrics.log_odds(logits, labels), expected, rtol=1e-7, atol=0)


def confident(probabilities):
    """Two-class logits with these probabilities of class 0."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([p, 1 - p], dim=1).log()


def test_entropy_mia_of_separable_sets():
    members, others = confident([0.999, 0.99, 0.995, 0.99] * 25), confident([0.5, 0.6, 0.55, 0.45] * 5)
    assert metrics.entropy_mia(members, others, confident([0.999, 0.5, 0.99, 0.992])) == 75.0
    # Balanced: five times as many members do not move the threshold to their side.
    assert metrics.entropy_mia(members, others, others) == 0.0


def test_loss_mia_by_hand():
    members, others = torch.tensor([0.1, 0.2, 0.3, 0.9]), torch.tensor([0.25, 0.8, 1.0, 2.0])
    # TPR - FPR at tau = 0.1, 0.2, 0.25, 0.3, 0.8, 0.9: 1/4, 1/2, 1/4, 1/2, 1/4, 1/2. The smallest of the best is 0.2.
    assert metrics.loss_mia(members, others, torch.tensor([0.05, 0.2, 0.21, 0.5])) == 50.0
    assert metrics.loss_mia(members[:3], others[1:], torch.tensor([0.3, 0.31])) == 50.0
    # Nothing tells them apart: nobody is called a member.
    assert metrics.loss_mia(members, members, members) == 0.0


def test_auc_is_mann_whitneys():
    generator = torch.Generator().manual_seed(2)
    members = torch.randn(60, generator=generator).round(decimals=1) + 0.5
    others = torch.randn(41, generator=generator).round(decimals=1)
    u = stats.mannwhitneyu(members.numpy(), others.numpy()).statistic
    assert metrics.attack_auc(members, others) == pytest.approx(100 * u / (60 * 41))
    assert metrics.attack_auc(torch.ones(5), torch.ones(3)) == 50.0


def test_tpr_at_a_low_fpr_by_hand():
    others = torch.arange(100.0)
    # One of 100 may be called a member, so the threshold is above the second largest: 98.
    members = torch.tensor([98.0, 98.5, 99.0, 99.5, 3.0])
    assert metrics.attack_tpr(members, others) == 60.0
    # Of 36 none may be.
    assert metrics.attack_tpr(torch.tensor([34.9, 35.0, 35.1, 50.0]), torch.arange(36.0)) == 50.0
    assert metrics.attack_tpr(torch.zeros(4), torch.zeros(9)) == 0.0


def test_lira_orders_as_its_normal_tail_does():
    generator = torch.Generator().manual_seed(3)
    confidences, out = torch.randn(20, generator=generator), torch.randn(4, 20, generator=generator)
    tail = stats.norm.cdf(confidences.numpy(), loc=out.numpy().mean(0), scale=1.7)
    assert stats.spearmanr(metrics.lira(confidences, out).numpy(), tail).statistic == 1.0


# --- distance to another model -------------------------------------------------------------------


def test_jensen_shannon_is_scipys():
    a, b = random_logits(4), random_logits(5)
    p, q = (torch.softmax(t.double(), 1).numpy() for t in (a, b))
    found = metrics.jensen_shannon(a, b)
    np.testing.assert_allclose(found, jensenshannon(p, q, axis=1, base=2) ** 2, rtol=1e-9)
    torch.testing.assert_close(found, metrics.jensen_shannon(b, a))
    # To the rounding of a + 5 in float32.
    assert (metrics.jensen_shannon(a, a + 5) < 1e-12).all()


def test_jensen_shannon_has_no_log_of_zero():
    """Disjoint predictions are one bit apart, also where probabilities underflow to 0 in any float type."""
    a, b = torch.tensor([[2000.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 2000.0]])
    assert metrics.jensen_shannon(a, b).item() == pytest.approx(1.0)
    assert metrics.zero_retrain_forgetting(a, b) == pytest.approx(0.0)


def test_zrf_by_hand():
    """(1, 0) against (1/2, 1/2): m = (3/4, 1/4), JS = (log2(4/3) + (log2(2/3) + log2 2) / 2) / 2 = 0.3113 bits."""
    sure, torn = torch.tensor([[900.0, 0.0]] * 2), torch.zeros(2, 2)
    js = 0.5 * (math.log2(4 / 3) + 0.5 * math.log2(2 / 3) + 0.5 * math.log2(2))
    assert js == pytest.approx(0.3113, abs=1e-4)
    assert metrics.zero_retrain_forgetting(sure, torn) == pytest.approx(1 - js)
    # The published code's reduction, which divides by the classes as well, would give another number here.
    assert metrics.zero_retrain_forgetting(torn, torn) == 1.0


def test_logit_distance_ignores_what_softmax_ignores():
    a, b = random_logits(6), random_logits(7)
    torch.testing.assert_close(
        metrics.logit_distance(a, a + torch.randn(50, 1)), torch.zeros(50).double(), atol=1e-5, rtol=0
    )
    centred = [t.double().numpy() - t.double().numpy().mean(1, keepdims=True) for t in (a, b)]
    np.testing.assert_allclose(
        metrics.logit_distance(a, b), np.linalg.norm(centred[0] - centred[1], axis=1), rtol=1e-12
    )


# --- relearning ----------------------------------------------------------------------------------


def one_pixel(values):
    pixels = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1)
    return Images(pixels, torch.ones(len(values), dtype=torch.int64), ("a", "b"), (0.0,), (1.0,))


class Offset(nn.Module):
    """Logits (0, b): the accuracy on class 1 is 100 % as soon as b > 0."""

    def __init__(self, start):
        super().__init__()
        self.b = nn.Parameter(torch.tensor(start))

    def forward(self, x):
        return torch.stack([torch.zeros(len(x)), self.b.expand(len(x))], dim=1)


@pytest.mark.parametrize(("start", "steps"), [(0.5, 0), (-0.05, 1), (-0.15, 2), (-0.45, 5)])
def test_relearn_steps_of_an_offset(start, steps):
    """While the gradient keeps its sign and nearly its size, each step of Adam moves b by lr."""
    data = one_pixel([1, 2, 3])
    assert metrics.relearn_steps(Offset(start), data, 100.0, lr=0.1, batch_size=2) == steps
    assert metrics.relearn_steps(Offset(start), data, 0.0, lr=0.1) == 0


def test_relearning_ends_at_its_cap_and_draws_nothing():
    data = one_pixel([1, 2, 3])
    assert metrics.relearn_steps(Offset(-9.0), data, 100.0, lr=0.1, max_steps=7) == 7
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    counts, states = set(), []
    for seed in range(3):
        torch.manual_seed(seed)
        twin = copy.deepcopy(model)
        twin[3].bias.data[0] += 2.0
        before = torch.get_rng_state()
        counts.add(metrics.relearn_steps(twin, data, 100.0, lr=0.01, probe=one_pixel([2])))
        assert torch.equal(before, torch.get_rng_state())
        states.append(torch.cat([p.detach().flatten() for p in twin.parameters()]))
    assert len(counts) == 1
    assert 0 < counts.pop() < 100
    assert torch.equal(states[0], states[1])
    with pytest.raises(UsageError, match="nothing to relearn"):
        metrics.relearn_steps(model, data.subset(torch.tensor([], dtype=torch.int64)), 100.0)


def test_predict_restores_the_mode():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(1, 2)).train()
    data = one_pixel([1, 2, 3])
    first, labels = metrics.predict(model, loader(data, batch_size=2))
    assert model.training
    assert torch.equal(first, metrics.predict(model, loader(data, batch_size=3))[0])
    assert torch.equal(labels, data.labels)


def partly_frozen():
    """A model in training mode whose BatchNorm is frozen in evaluation mode, as fine-tuning often has it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    model[2].eval()
    return model


@pytest.mark.parametrize(
    "measure",
    [metrics.predict, fisher.per_sample, fisher.batch_mean],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("fails", [False, True])
def test_every_modules_mode_is_restored(measure, fails):
    """A mode that is each module's own is not the model's; also after an error."""
    model = partly_frozen()
    modes = [module.training for module in model.modules()]
    state = {n: t.clone() for n, t in model.state_dict().items()}
    batches = list(loader(one_pixel([1, 0, 1]), batch_size=2))
    before = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError):
            measure(model, [*batches, (torch.zeros(1, 9), torch.zeros(1, dtype=torch.int64))])
    else:
        measure(model, batches)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before)
