"""Attacks against closed forms, scikit-learn and PyTorch's own optimizer; and a model that ends as it was."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import nn

from distruction import PosteriorError, UsageError, attacks
from distruction.features import Features, classifier_of, features_of, mean_cosine


class Pairs:
    """Examples from two tensors."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


def gaussians(per_class, *, seed=0, spread=0.1, classes=3):
    """Points around the axes of three dimensions, at various distances from the origin."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(classes).repeat_interleave(per_class)
    x = torch.eye(3)[y] + spread * torch.randn(len(y), 3, generator=g)
    return x * (0.5 + torch.rand(len(y), 1, generator=g)), y


class Network(nn.Module):
    """Hidden layers, BatchNorm with its buffers, dropout, and a classifier that is not the last module."""

    def __init__(self, dims=3, classes=3):
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(8, classes)
        self.body = nn.Sequential(nn.Linear(dims, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5))

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.head(self.body(x))


class Plain(nn.Module):
    """A linear model: its features are its inputs."""

    def __init__(self, weight):
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(weight)

    def forward(self, x):
        return self.layer(x)


def parts(x, y, gone):
    return Pairs(x[y == gone], y[y == gone]), Pairs(x[y != gone], y[y != gone])


# --- features -------------------------------------------------------------------------------------


def test_features_are_what_the_classifier_is_given():
    x, y = gaussians(7)
    model = Network()
    found, labels = features_of(model, Pairs(x, y))
    with torch.no_grad():
        expected = model.eval().body(x)
    assert torch.equal(found, expected)
    assert torch.equal(labels, y)
    assert not model.head._forward_hooks


def test_the_classifier_is_found_or_named():
    model = Network()
    assert classifier_of(model) is model.head
    assert classifier_of(model, "body.0") is model.body[0]
    with pytest.raises(UsageError, match="no layer 'fc' that could be its classifier; its last linear layers are head"):
        classifier_of(model, "fc")
    with pytest.raises(UsageError, match=r"no nn\.Linear"):
        classifier_of(nn.Sequential(nn.Conv2d(1, 2, 3)))


def test_a_layer_that_is_not_the_classifier_is_refused():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    x, y = gaussians(2)
    with pytest.raises(UsageError, match="did not reach the classifier"):
        features_of(Unused(), Pairs(x, y))
    with pytest.raises(UsageError, match=r"gives \(6, 1, 3\), not \(batch, classes\)"):
        features_of(nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Linear(3, 3)), Pairs(x, y))


def test_mean_cosine_is_that_of_the_pairs_of_each_label():
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3
    pairs = [(i, j) for i in range(12) for j in range(i) if y[i] == y[j]]
    expected = np.mean([F.cosine_similarity(x[i], x[j], dim=0).item() for i, j in pairs])
    assert mean_cosine(x, y).item() == pytest.approx(expected, abs=1e-12)
    assert mean_cosine(x[:3], y[:3]).item() == 0
    assert torch.autograd.gradcheck(lambda t: mean_cosine(t, y), x.requires_grad_())


def test_the_features_are_of_this_pass_alone():
    model = Network().eval()
    with Features(model) as tap:
        model(torch.randn(2, 3))
        tap.take()
        with pytest.raises(UsageError, match="did not reach"):
            tap.take()


# --- prototypes and probes ------------------------------------------------------------------------


def test_prototypes_are_the_nearest_class_means_of_unit_features():
    """Against scikit-learn's nearest centroid: on the sphere the nearest mean of unit length has the best cosine."""
    from sklearn.neighbors import NearestCentroid

    x, y = gaussians(40, spread=0.6)
    probe_x, probe_y = gaussians(50, seed=5, spread=0.6)
    forget, retain = parts(x, y, 2)
    probe, _ = parts(probe_x, probe_y, 2)
    found = attacks.prototype(Plain(torch.eye(3)), forget, retain, probe, shots=40, draws=1)
    centroids = torch.stack([F.normalize(F.normalize(x[y == c], dim=1).mean(0), dim=0) for c in range(3)])
    expected = NearestCentroid().fit(centroids.numpy(), [0, 1, 2]).predict(F.normalize(probe.x, dim=1).numpy())
    assert found == pytest.approx(100 * (expected == 2).mean())
    assert 0 < found < 100


def test_prototypes_find_what_the_logits_hide_and_miss_what_is_not_there():
    """The last class has no logit at all; it is where its features are. With its features gone there is chance."""
    hidden = torch.eye(3)
    hidden[2] = 0
    forget, retain = parts(*gaussians(20), 2)
    probe, _ = parts(*gaussians(30, seed=1), 2)
    assert attacks.prototype(Plain(hidden), forget, retain, probe, shots=5) == 100
    x, y = gaussians(200, spread=0.3)
    x[y == 2] = x[:200][torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    forget, retain = parts(x, y, 2)
    halves = Pairs(forget.x[:100], forget.y[:100]), Pairs(forget.x[100:], forget.y[100:])
    # A copy of the first class: which of two prototypes of one distribution is nearer, is a coin.
    assert 20 < attacks.prototype(Plain(hidden), halves[0], retain, halves[1], shots=100) < 80


def test_the_linear_probe_is_the_minimum_of_its_formula():
    x, y = gaussians(30, spread=0.7)
    probe_x, probe_y = gaussians(60, seed=2, spread=0.7)
    probe, _ = parts(probe_x, probe_y, 2)
    found = attacks.linear_probe(Plain(torch.eye(3)), *parts(x, y, 2), probe, regularisation=0.01)
    inputs = x.double()
    mean, std = inputs.mean(0), inputs.std(0)
    z = (inputs - mean) / std

    def objective(flat):
        w = torch.tensor(flat, requires_grad=True)
        weight, bias = w[:9].view(3, 3), w[9:]
        value = F.cross_entropy(z @ weight.T + bias, y) + 0.005 * weight.square().sum()
        (g,) = torch.autograd.grad(value, w)
        return value.item(), g.numpy()

    best = torch.tensor(minimize(objective, np.zeros(12), jac=True, tol=1e-10).x)
    logits = ((probe.x.double() - mean) / std) @ best[:9].view(3, 3).T + best[9:]
    assert found == pytest.approx(100 * (logits.argmax(1) == 2).double().mean().item())
    assert 0 < found < 100


# --- training again -------------------------------------------------------------------------------


def test_few_shots_are_adam_on_the_same_few_examples():
    x, y = gaussians(20, spread=0.4)
    forget, _ = parts(x, y, 2)
    probe, _ = parts(*gaussians(200, seed=3, spread=0.4), 2)
    model = Network()
    found = attacks.few_shot(model, forget, probe, shots=20, steps=7, lr=0.02, draws=1)
    other = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(other.parameters(), 0.02)
    for _ in range(7):
        optimizer.zero_grad()
        F.cross_entropy(other(forget.x), forget.y).backward()
        optimizer.step()
    expected = 100 * (other(probe.x).argmax(1) == 2).double().mean().item()
    assert found == pytest.approx(expected)
    assert found > 0


def test_relearning_reads_retained_data_alone():
    class Watched(Pairs):
        read = 0

        def __getitem__(self, index):
            self.read += len(index)
            return super().__getitem__(index)

    x, y = gaussians(20)
    forget, retain = parts(x, y, 2)
    retain = Watched(retain.x, retain.y)
    attacks.relearn(Network(), retain, forget, steps=11, batch_size=16)
    assert retain.read == 11 * 16


# --- membership -----------------------------------------------------------------------------------


def test_membership_is_the_area_under_the_curve_by_counting_pairs():
    model, out = Network().eval(), Network().eval()
    with torch.no_grad():
        out.head.weight.mul_(-0.5)
    members, others = Pairs(*gaussians(9, seed=1, spread=1.0)), Pairs(*gaussians(11, seed=2, spread=1.0))

    def odds(network, data):
        p = network(data.x).detach().double().softmax(1)[torch.arange(len(data)), data.y]
        return (p / (1 - p)).log()

    def area(a, b):
        return 100 * np.mean([(1.0 if i > j else 0.5 if i == j else 0.0) for i in a for j in b])

    by_loss = area(odds(model, members).tolist(), odds(model, others).tolist())
    assert attacks.loss_membership(model, members, others) == pytest.approx(by_loss)
    ours, theirs = (odds(model, d) - odds(out, d) for d in (members, others))
    assert attacks.lira(model, members, others, [out]) == pytest.approx(area(ours.tolist(), theirs.tolist()))
    with pytest.raises(UsageError, match="retrain one"):
        attacks.lira(model, members, others, [])


def noisy(row, label, count, seed):
    g = torch.Generator().manual_seed(seed)
    return Pairs(torch.tensor(row) + torch.randn(count, len(row), generator=g), torch.full((count,), label))


def joined(*sets):
    return Pairs(torch.cat([s.x for s in sets]), torch.cat([s.y for s in sets]))


def test_class_membership_is_a_logistic_regression_on_what_is_said_of_the_neighbours():
    """By scipy's minimiser and by counting pairs; class 3 is forgotten, 0 and 1 are called most often, 2 never."""
    model = Plain(torch.eye(4))
    forget, probe = (noisy([2.0, 1.0, -3.0, 0.0], 3, n, seed) for n, seed in ((30, 1), (20, 2)))
    retain, others = (
        joined(
            noisy([3.0, 0.0, -3.0, 0.0], 0, n, seed),
            noisy([0.0, 3.0, -3.0, 0.0], 1, n, seed + 1),
            noisy([0.0, 0.0, 9.0, 0.0], 2, n, seed + 2),
        )
        for n, seed in ((25, 3), (15, 6))
    )

    def told(data, labels):
        z = data.x[torch.isin(data.y, torch.tensor(labels)), :3].double().numpy()
        return z - np.log(np.exp(z).sum(axis=1, keepdims=True))

    ours, theirs = told(forget, [3]), told(retain, [0, 1])
    x, y = np.concatenate([ours, theirs]), np.repeat([1.0, -1.0], [len(ours), len(theirs)])
    mean, std = x.mean(axis=0), x.std(axis=0, ddof=1)
    weight = np.where(y > 0, 0.5 / len(ours), 0.5 / len(theirs))

    def cost(v):
        return (weight * np.logaddexp(0, -y * ((x - mean) / std @ v[:3] + v[3]))).sum() + 0.5e-3 * (v[:3] ** 2).sum()

    v = minimize(cost, np.zeros(4), tol=1e-12).x
    a, b = ((told(d, labels) - mean) / std @ v[:3] for d, labels in ((probe, [3]), (others, [0, 1])))
    expected = 100 * np.mean([(i > j) + 0.5 * (i == j) for i in a for j in b])
    assert 60 < expected < 95
    found = attacks.class_membership(model, forget, retain, probe, others, neighbours=2)
    assert found == pytest.approx(expected, abs=0.5)  # a pair or two may change places


def test_class_membership_is_blind_where_the_forgotten_look_like_a_neighbour():
    model = Plain(torch.eye(3))
    alike = [noisy([3.0, 0.0, 0.0], label, 400, seed) for seed, label in enumerate((2, 0, 2, 0))]
    forget, retain, probe, others = alike
    other = noisy([0.0, 3.0, 0.0], 1, 400, 9)
    sets = (forget, joined(retain, other), probe, joined(others, other))
    assert attacks.class_membership(model, *sets, neighbours=1) == pytest.approx(50, abs=6)
    # Nobody is called 1 with much confidence but what is forgotten.
    flat = Pairs(torch.zeros(40, 3), torch.full((40,), 2))
    assert attacks.class_membership(model, flat, sets[1], flat, sets[3], neighbours=1) > 95


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neighbours": 0}, "neighbours must be an integer >= 1, not 0"),
        ({"regularisation": 0}, "regularisation must be > 0, not 0"),
        ({"forget": Pairs(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))}, "forget holds no examples"),
        ({"retain": noisy([0.0, 0.0, 0.0], 0, 4, 0)}, "of 1 classes"),
        ({"others": noisy([0.0, 0.0, 0.0], 2, 4, 0)}, "no example of the nearest classes"),
    ],
)
def test_class_membership_refuses(change, message):
    some = joined(noisy([1.0, 0.0, 0.0], 0, 4, 0), noisy([0.0, 1.0, 0.0], 1, 4, 0))
    gone = noisy([0.0, 0.0, 0.0], 2, 4, 0)
    given = {"forget": gone, "retain": some, "probe": gone, "others": some} | change
    with pytest.raises(UsageError, match=message):
        attacks.class_membership(Plain(torch.eye(3)), **given)


# --- weights --------------------------------------------------------------------------------------


def test_rounding_is_to_the_nearest_step_of_each_row():
    weight = torch.tensor([[7.0, 3.4, -3.6, 0.49], [0.0, 0.0, 0.0, 0.0], [-14.0, 6.9, 1.1, 0.9]])
    expected = torch.tensor([[7.0, 3.0, -4.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-14.0, 6.0, 2.0, 0.0]])
    assert torch.equal(attacks.rounded(weight, "int4"), expected)
    w = torch.randn(6, 5, 3, 3)
    step = w.abs().flatten(1).max(1).values[:, None, None, None] / 127
    assert ((attacks.rounded(w, "int8") - w).abs() <= step / 2 * (1 + 1e-5)).all()
    assert torch.equal(attacks.rounded(torch.tensor([1.0009765625]), "bf16"), torch.tensor([1.0]))
    assert torch.equal(attacks.rounded(w[0, 0, 0], "int4"), w[0, 0, 0])
    with pytest.raises(UsageError, match="rounding 'int2' is unknown; choose bf16, int8, int4"):
        attacks.rounded(w, "int2")


def test_distance_and_barrier_have_closed_forms():
    a, b = Plain(torch.tensor([[1.0, 0.0], [0.0, 0.0]])), Plain(torch.tensor([[-1.0, 0.0], [0.0, 2.0]]))
    assert attacks.distance(a, b) == pytest.approx(math.sqrt(8))
    # One example (1, 0) of the label 0 has the logits (w, 0), w from 3 to -3: cross entropy is convex in it.
    up, down = Plain(torch.tensor([[3.0, 0.0], [0.0, 0.0]])), Plain(torch.tensor([[-3.0, 0.0], [0.0, 0.0]]))
    one = Pairs(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert attacks.barrier(up, down, one) == pytest.approx(0, abs=1e-9)

    class Square(nn.Module):
        def __init__(self, w):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([w]))

        def forward(self, x):
            return torch.cat([self.w**2, torch.zeros(1)])[None]

    # Logits (w**2, 0) from w = 2 to w = -2, over 0 halfway: log 2 there, log(1 + exp(-4)) at both ends.
    found = attacks.barrier(Square(2.0), Square(-2.0), one, points=5)
    assert found == pytest.approx(math.log(2) - math.log1p(math.exp(-4)), abs=1e-6)
    with pytest.raises(PosteriorError, match="original model belongs to another model"):
        attacks.distance(a, up.layer)


# --- what holds for all ---------------------------------------------------------------------------

X, Y = gaussians(20, spread=0.5)
FORGET, RETAIN = parts(X, Y, 2)
PROBE = parts(*gaussians(20, seed=9, spread=0.5), 2)[0]
OTHER = Network()
ATTACKS = {
    "prototype": lambda m, s: attacks.prototype(m, FORGET, RETAIN, PROBE, shots=2, seed=s),
    "linear probe": lambda m, s: attacks.linear_probe(m, FORGET, RETAIN, PROBE),
    "few shots": lambda m, s: attacks.few_shot(m, FORGET, PROBE, shots=2, steps=3, lr=0.05, seed=s),
    "relearning": lambda m, s: attacks.relearn(m, RETAIN, PROBE, steps=3, lr=0.05, seed=s),
    "loss membership": lambda m, s: attacks.loss_membership(m, FORGET, PROBE),
    "lira": lambda m, s: attacks.lira(m, FORGET, PROBE, [OTHER]),
    "class membership": lambda m, s: attacks.class_membership(m, FORGET, RETAIN, PROBE, RETAIN),
    "bf16": lambda m, s: attacks.rounding(m, PROBE, "bf16"),
    "int4": lambda m, s: attacks.rounding(m, PROBE, "int4"),
    "distance": lambda m, s: attacks.distance(m, OTHER),
    "barrier": lambda m, s: attacks.barrier(m, OTHER, RETAIN, points=3),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_determined_by_its_seed_and_leaves_the_model_as_it_was(name):
    model = Network()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    F.cross_entropy(model(X), Y).backward()
    before = copy.deepcopy(model.state_dict())
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    generator = torch.get_rng_state()
    first = ATTACKS[name](model, 3)
    torch.rand(5)
    torch.set_rng_state(generator)
    assert ATTACKS[name](model, 3) == first
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters())
    assert model.training
    assert all(m.training for m in model.modules())


def test_a_failing_attack_leaves_the_model_as_it_was():
    class Broken(Pairs):
        def __getitem__(self, index):
            raise OSError

    model = Network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OSError):  # noqa: PT011
        attacks.few_shot(model, Pairs(X, Y), Broken(X, Y), steps=2, lr=0.1)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (lambda m: attacks.prototype(m, FORGET, RETAIN, PROBE, shots=0), "shots must be an integer >= 1, not 0"),
        (lambda m: attacks.few_shot(m, FORGET, PROBE, steps=-1), "steps must be an integer >= 1, not -1"),
        (lambda m: attacks.relearn(m, Pairs(X[:0], Y[:0]), PROBE), "must hold examples"),
        (lambda m: attacks.prototype(m, Pairs(X[:0], Y[:0]), RETAIN, PROBE, shots=1), "no examples"),
        (
            lambda m: attacks.linear_probe(m, FORGET, RETAIN, PROBE, regularisation=0),
            "regularisation must be > 0, not 0",
        ),
        (lambda m: attacks.barrier(m, m, RETAIN, points=2), "points must be >= 3, not 2"),
    ],
)
def test_bad_arguments(attack, message):
    with pytest.raises(UsageError, match=message):
        attack(Network())
