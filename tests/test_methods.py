"""Each method does what its paper says, and reads what it declares."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.utils.data import TensorDataset

from distruction import Posterior, UsageError, experiments, fisher, methods, prepare
from distruction.data import Images, loader
from distruction.experiments import grid
from distruction.methods import REGISTRY, Counted, Task, amnesiac, scrub, ssd, teacher, unsir
from distruction.methods.base import Mixed
from distruction.objectives import Distillation

CLASSES = 4


def images(count=120, seed=0):
    """Four classes of 2x2 images, one bright pixel each, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    pixels = torch.randint(0, 120, (count, 1, 2, 2), generator=generator)
    pixels.flatten(1)[torch.arange(count), labels] += 100
    return Images(pixels.to(torch.uint8), labels, tuple("abcd"), (100.0,), (60.0,))


class Classifier(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, CLASSES))

    def get_classifier(self):
        return self[-1]


def fresh():
    torch.manual_seed(5)
    return Classifier()


def fit(model, data, epochs=60):
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(epochs):
        for x, y in loader(data, batch_size=16, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    model.eval()


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = fresh()
    fit(model, images())
    return model


def task(trained, forget=None, posterior=True):
    data = images()
    mask = data.labels == 1 if forget is None else forget
    model = copy.deepcopy(trained)
    return Task(
        model,
        Counted(data.subset(mask)),
        Counted(data.subset(~mask)),
        fresh,
        fit,
        Posterior.around(model, 0.1) if posterior else None,
    )


def accuracy(model, data):
    x, y = data[range(len(data))]
    return (model(x).argmax(dim=1) == y).double().mean().item()


# Fewer epochs and images than on real data; only what a method reads is asked for here.
SMALL = {
    "unsir": {"retain_per_class": 10, "copies": 2},
    "unsir+kl": {"copies": 2, "steps": 5},
    "scrub": {"epochs": 2},
    # The forget set is a quarter of the data, so that I_f <= 4 I_D.
    "ssd": {"alpha": 2.0},
    "ssd-per-sample": {"alpha": 2.0},
    "distruction-auto": {},
    "distruction-depth": {},
    "distruction-constant": {},
    "distruction-fisher": {},
}


@pytest.mark.parametrize("name", REGISTRY)
def test_a_method_reads_what_it_declares(name, trained):
    method = REGISTRY[name]
    problem = task(trained, posterior=method.needs_posterior)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    methods.run(name, problem, **SMALL.get(name, {"steps": 5} if method.needs_posterior else {}))
    assert torch.equal(before, torch.get_rng_state())
    share = problem.retain.seen.double().mean().item()
    assert {"all": share == 1, "part": 0 < share < 1, "none": problem.retain.reads == 0}[method.reads]
    assert problem.retain.reads >= problem.retain.seen.sum()
    assert not problem.model.training
    changed = any(not torch.equal(a, b) for a, b in zip(problem.model.parameters(), trained.parameters(), strict=True))
    assert changed == (name != "baseline")


@pytest.mark.parametrize("name", REGISTRY)
def test_a_method_is_reproducible_from_its_seed(name, trained):
    settings = SMALL.get(name, {"steps": 5} if REGISTRY[name].needs_posterior else {})
    weights = []
    for noise in (1, 2):
        problem = task(trained)
        torch.manual_seed(noise)
        methods.run(name, problem, **settings)
        weights.append(nn.utils.parameters_to_vector(problem.model.parameters()))
    assert torch.equal(*weights)


def test_reads_are_counted_through_views():
    data = Counted(images())
    ones = torch.ones(3, 1, 2, 2)
    mixed = Mixed((data, torch.zeros(120, dtype=torch.int64)), (TensorDataset(ones), torch.ones(3, dtype=torch.int64)))
    inputs, labels = mixed[[119, 122, 0, 0]]
    assert data.reads == 3
    assert data.seen.nonzero().squeeze(1).tolist() == [0, 119]
    assert torch.equal(inputs, torch.cat([images()[[119]][0], ones[:1], images()[[0, 0]][0]]))
    assert labels.tolist() == [0, 1, 0, 0]


def test_errors_name_the_remedy(trained):
    with pytest.raises(UsageError, match="choose baseline, retrain"):
        methods.run("erase", task(trained))
    with pytest.raises(UsageError, match="no setting 'alpha'; it has epochs"):
        methods.run("finetune", task(trained), alpha=1)
    with pytest.raises(UsageError, match="prepare"):
        methods.run("distruction", task(trained, posterior=False))
    with pytest.raises(UsageError, match="forget set is empty"):
        methods.run("finetune", task(trained, forget=torch.zeros(120, dtype=torch.bool)))
    with pytest.raises(UsageError, match="alpha"):
        methods.run("ssd", task(trained), alpha=0)
    with pytest.raises(UsageError, match="one class"):
        methods.run("unsir", task(trained, forget=images().labels < 2))


def test_retrain_is_training_without_the_forget_set(trained):
    problem = task(trained)
    methods.run("retrain", problem)
    torch.manual_seed(0)
    expected = fresh()
    fit(expected, images().subset(images().labels != 1))
    # `fresh` seeds the generator, so both trainings draw the same batches.
    for a, b in zip(problem.model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    assert accuracy(problem.model, problem.forget) == 0


def test_retrain_ssd_compat_keeps_the_old_backbone(trained):
    problem = task(trained)
    problem.train = lambda model, data: None
    methods.run("retrain", problem, ssd_compat=True)
    assert torch.equal(problem.model[1].weight, trained[1].weight)
    assert torch.equal(problem.model[3].weight, fresh()[3].weight)


def test_finetune_forgets_less_than_retrain(trained):
    tuned, again = task(trained), task(trained)
    methods.run("finetune", tuned, epochs=2, lr=0.01)
    methods.run("retrain", again)
    assert accuracy(tuned.model, tuned.forget) > accuracy(again.model, again.forget)
    assert accuracy(tuned.model, tuned.retain) > 0.9


def test_finetune_is_sgd_on_the_retain_set(trained):
    problem = task(trained)
    methods.run("finetune", problem, epochs=2, lr=0.03, momentum=0.8, weight_decay=1e-3, batch_size=32)
    expected = copy.deepcopy(trained)
    velocity = [torch.zeros_like(p) for p in expected.parameters()]
    retain = images().subset(images().labels != 1)
    torch.manual_seed(problem.seed)
    for _ in range(2):
        for x, y in loader(retain, batch_size=32, shuffle=True):
            gradients = torch.autograd.grad(F.cross_entropy(expected(x), y), list(expected.parameters()))
            with torch.no_grad():
                for p, v, g in zip(expected.parameters(), velocity, gradients, strict=True):
                    v.mul_(0.8).add_(g + 1e-3 * p)
                    p.sub_(0.03 * v)
    for a, b in zip(problem.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert problem.forget.reads == 0


# --- teacher -------------------------------------------------------------------------------------


def test_the_two_teachers_targets(trained):
    bad, good = fresh(), copy.deepcopy(trained)
    x = torch.randn(6, 1, 2, 2)
    flags = torch.tensor([1, 0, 1, 0, 0, 1])
    targets = teacher.TwoTeachers(bad, good, temperature=2.0).targets(flags, x).exp()
    expected = torch.stack([((bad if f else good)(x[i : i + 1])[0] / 2).softmax(0) for i, f in enumerate(flags)])
    torch.testing.assert_close(targets, expected)


def test_the_two_teachers_loss_is_kl_in_nats(trained):
    bad, student = fresh(), trained
    x = torch.randn(5, 1, 2, 2)
    loss = teacher.TwoTeachers(bad, copy.deepcopy(trained))(student(x), torch.ones(5), x)
    categorical = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(categorical(logits=bad(x)), categorical(logits=student(x))).mean()
    torch.testing.assert_close(loss, expected)


def test_the_teacher_moves_the_forget_set_to_the_bad_teacher(trained):
    problem = task(trained)
    x, y = problem.forget[range(len(problem.forget))]
    loss = teacher.TwoTeachers(fresh(), copy.deepcopy(trained))
    before = loss(trained(x), torch.ones(len(y)), x)
    methods.run("teacher", problem, epochs=40, lr=1e-2)
    assert loss(problem.model(x), torch.ones(len(y)), x) < 0.5 * before
    assert accuracy(problem.model, problem.retain) > 0.9


def test_the_teachers_see_the_forget_set_and_a_share_of_the_retain_set(trained, monkeypatch):
    seen = []

    def record(model, loader, loss_fn, optimizer):
        seen.append((loader.dataset.labels.bincount().tolist(), loss_fn))

    monkeypatch.setattr(teacher, "fit", record)
    problem = task(trained)
    methods.run("teacher", problem, epochs=2, retain_share=0.3)
    # Flag 0 for 30 % of 90 retain examples, 1 for the 30 to forget; the student's teachers are not the student.
    assert [labels for labels, _ in seen] == [[27, 30]] * 2
    loss = seen[0][1]
    assert torch.equal(loss.incompetent[1].weight, fresh()[1].weight)
    assert torch.equal(loss.competent[1].weight, trained[1].weight)
    assert loss.competent is not problem.model


# --- amnesiac ------------------------------------------------------------------------------------


def test_amnesiac_labels_are_uniform_over_the_other_classes():
    labels = torch.arange(5).repeat_interleave(4000)
    drawn = amnesiac.other_labels(labels, 5)
    counts = torch.bincount(labels * 5 + drawn, minlength=25).view(5, 5)
    assert (counts.diagonal() == 0).all()
    others = counts[~torch.eye(5, dtype=torch.bool)].double()
    assert ((others - 1000).abs() < 5 * np.sqrt(4000 * 0.25 * 0.75)).all()


def test_amnesiac_labels_are_drawn_once_and_the_retain_set_keeps_its_own(trained, monkeypatch):
    draws, seen = [], []
    original, fit_once = amnesiac.other_labels, amnesiac.fit
    monkeypatch.setattr(amnesiac, "other_labels", lambda *args: draws.append(original(*args)) or draws[-1])

    def record(model, loader, loss_fn, optimizer):
        seen.append(loader.dataset.labels)
        fit_once(model, loader, loss_fn, optimizer)

    monkeypatch.setattr(amnesiac, "fit", record)
    problem = task(trained)
    methods.run("amnesiac", problem, epochs=3)
    assert len(draws) == 1
    assert (draws[0] != 1).all()
    assert len(seen) == 3
    for labels in seen:
        assert torch.equal(labels, torch.cat([draws[0], problem.retain.labels]))


def test_amnesiac_with_kl_sees_the_relabelled_forget_set_only(trained, monkeypatch):
    seen = []
    monkeypatch.setattr(amnesiac, "forget_with", lambda task, objective, data, **settings: seen.append(data))
    methods.run("amnesiac+kl", task(trained))
    (data,) = seen
    assert len(data) == 30
    assert (data.labels != 1).all()
    assert len(data.labels.unique()) == 3


# --- UNSIR ---------------------------------------------------------------------------------------


def test_the_noise_maximises_the_loss_of_a_linear_model():
    """For linear logits of two classes with a strong penalty the optimum is known: a stationary point of the loss."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    torch.manual_seed(0)
    noise = unsir.learn_noise(model, 1, (3, 1, 2, 2), steps=3000, lr=0.01)
    x = noise.double().flatten(1)
    weight, bias = (p.detach().double() for p in model[1].parameters())
    p_one = (x @ weight.T + bias).softmax(dim=1)[:, 1:]
    # d/dx of penalty * |x|^2 + log p_one is zero: 2 * 0.1 * x = -(1 - p_one) (w1 - w0).
    torch.testing.assert_close(0.2 * x, -(1 - p_one) * (weight[1] - weight[0]), atol=2e-3, rtol=0)


def test_the_noise_has_a_higher_loss_than_random_noise(trained):
    torch.manual_seed(0)
    start = torch.randn(32, 1, 2, 2)
    labels = torch.full((32,), 1)
    torch.manual_seed(0)
    noise = unsir.learn_noise(trained, 1, (32, 1, 2, 2), steps=25)
    assert F.cross_entropy(trained(noise), labels) > 2 * F.cross_entropy(trained(start), labels)


def test_unsir_repairs_with_so_many_retain_examples_per_class(trained):
    problem = task(trained)
    methods.run("unsir", problem, retain_per_class=7, copies=2)
    labels = problem.retain.labels[problem.retain.seen]
    assert torch.bincount(labels, minlength=CLASSES).tolist() == [7, 0, 7, 7]


def test_unsir_impairs_with_noise_and_repairs_without(trained, monkeypatch):
    passes = []
    original = unsir.fit

    def record(model, loader, loss_fn, optimizer):
        passes.append((loader.dataset.labels.bincount().tolist(), loader.sampler.batch_size, optimizer))
        original(model, loader, loss_fn, optimizer)

    monkeypatch.setattr(unsir, "fit", record)
    methods.run("unsir", task(trained), noise_batch=6, copies=5, retain_per_class=7, lr=3e-4)
    (impair, impair_batch, first), (repair, repair_batch, second) = passes
    # 6 x 5 noise images under the forgotten label 1, and 7 retain examples of each other class; then these alone.
    assert (impair, impair_batch) == ([7, 30, 7, 7], 32)
    assert (repair, repair_batch) == ([7, 0, 7, 7], 128)
    assert first is not second
    assert all(isinstance(o, torch.optim.Adam) and o.param_groups[0]["lr"] == 3e-4 for o in (first, second))


# --- SSD -----------------------------------------------------------------------------------------


def test_dampening_by_hand():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.0, -2.0, 3.0]]))
    whole = {"weight": torch.tensor([[1.0, 1.0, 1.0, 0.0]])}
    forget = {"weight": torch.tensor([[2.0, 8.0, 100.0, 0.0]])}
    ssd.dampen_(model, whole, forget, alpha=5.0, strength=2.0)
    # 2 <= 5: kept; 8 > 5: times 2/8; 100 > 5: times 2/100; 0 <= 0: kept.
    torch.testing.assert_close(model.weight.data, torch.tensor([[1.0, 0.25, -0.04, 3.0]]))
    with torch.no_grad():
        model.weight.fill_(1.0)
    ssd.dampen_(model, whole, forget, alpha=1.0, strength=50.0)
    # A factor never exceeds 1: 50/2, 50/8 -> 1, 50/100.
    torch.testing.assert_close(model.weight.data, torch.tensor([[1.0, 1.0, 0.5, 1.0]]))


def test_per_sample_fisher_of_logistic_regression():
    """d/dW of -log p(y|x) is (p - onehot) x^T: the Fisher diagonal in closed form, from scikit-learn's own model."""
    data = images(40)
    x, y = data[range(40)]
    flat = x.flatten(1).double()
    reference = LogisticRegression(max_iter=1000).fit(flat.numpy(), y.numpy())
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES))
    with torch.no_grad():
        model[1].weight.copy_(torch.from_numpy(reference.coef_))
        model[1].bias.copy_(torch.from_numpy(reference.intercept_))
    residual = torch.from_numpy(reference.predict_proba(flat.numpy())) - F.one_hot(y, CLASSES)
    per_example = residual[:, :, None] * flat[:, None, :]
    found = fisher.per_sample(model, loader(data, batch_size=16))
    torch.testing.assert_close(found["1.weight"].double(), per_example.square().mean(0), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(found["1.bias"].double(), residual.square().mean(0), rtol=1e-4, atol=1e-8)
    found = fisher.batch_mean(model, loader(data, batch_size=16))
    of_batches = torch.stack([part.mean(0).square() for part in per_example.split(16)]).mean(0)
    torch.testing.assert_close(found["1.weight"].double(), of_batches, rtol=1e-4, atol=1e-8)


def test_ssd_of_a_linear_model_in_closed_form():
    """Importances of everything and of the forget set from (p - onehot) x^T, then equations 5 and 6."""
    data = images(40)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES))
    mask = data.labels == 1
    problem = Task(model, Counted(data.subset(mask)), Counted(data.subset(~mask)), fresh, fit)
    weight = model[1].weight.detach().double().clone()

    def importance(part):
        x, y = part[range(len(part))]
        x = x.flatten(1).double()
        residual = (x @ weight.T + model[1].bias.detach().double()).softmax(dim=1) - F.one_hot(y, CLASSES)
        return (residual[:, :, None] * x[:, None, :]).square().mean(0)

    whole, forget = importance(data), importance(data.subset(mask))
    selected = forget > 1.5 * whole
    assert 0 < selected.sum() < selected.numel()
    expected = torch.where(selected, (0.9 * whole / forget).clamp(max=1) * weight, weight)
    methods.run("ssd-per-sample", problem, alpha=1.5, strength=0.9, batch_size=7)
    torch.testing.assert_close(model[1].weight.detach().double(), expected, rtol=1e-4, atol=1e-6)


def test_ssd_reads_batches_sorted_by_class(trained, monkeypatch):
    seen = []

    def record(model, loader):
        seen.append(torch.cat([y for _, y in loader]))
        return {n: torch.ones_like(p) for n, p in model.named_parameters()}

    monkeypatch.setattr(fisher, "batch_mean", record)
    methods.run("ssd", task(trained))
    whole, forget = seen
    assert torch.equal(whole, images().labels.sort().values)
    assert (forget == 1).all()


# --- SCRUB ---------------------------------------------------------------------------------------


def test_scrub_alternates_as_its_schedule_says(trained, monkeypatch):
    log, min_losses = [], []
    original = scrub.fit

    def record(model, loader, loss_fn, optimizer):
        if not isinstance(loss_fn, Distillation):
            min_losses.append(loss_fn)
        kind = "max" if isinstance(loss_fn, Distillation) else "min"
        log.append((kind, len(loader.dataset), round(optimizer.param_groups[0]["lr"], 10)))
        original(model, loader, loss_fn, optimizer)

    monkeypatch.setattr(scrub, "fit", record)
    settings = {"epochs": 6, "max_epochs": 2, "lr": 0.01, "decay_epochs": (3, 5), "gamma": 0.7, "alpha": 0.2}
    methods.run("scrub", task(trained), **settings)
    steps = [("max", 30, 0.01), ("min", 90, 0.01)] * 2
    assert log == [*steps, ("min", 90, 0.01), ("min", 90, 0.001), ("min", 90, 0.001), ("min", 90, 0.0001)]
    student, x, y = fresh(), torch.randn(5, 1, 2, 2), torch.arange(5) % CLASSES
    categorical = torch.distributions.Categorical
    old, new = categorical(logits=trained(x) / 2), categorical(logits=student(x) / 2)
    close = 4 * torch.distributions.kl_divergence(old, new).mean()
    cross_entropy = -categorical(logits=student(x)).log_prob(y).mean()
    torch.testing.assert_close(min_losses[0](student(x), y, x), 0.7 * cross_entropy + 0.2 * close)


def test_scrub_distance_is_the_tempered_kl_to_the_old_model(trained):
    student, x = fresh(), torch.randn(5, 1, 2, 2)
    categorical = torch.distributions.Categorical
    old, new = categorical(logits=trained(x) / 2), categorical(logits=student(x) / 2)
    kl = 4 * torch.distributions.kl_divergence(old, new).mean()
    labels = torch.zeros(5, dtype=torch.int64)
    torch.testing.assert_close(scrub.distance(copy.deepcopy(trained), 2.0)(student(x), labels, x), kl)
    torch.testing.assert_close(scrub.distance(copy.deepcopy(trained), 2.0, -1.0)(student(x), labels, x), -kl)


# --- with the KL penalty -------------------------------------------------------------------------


# --- DELETE --------------------------------------------------------------------------------------


def test_delete_is_sgd_on_the_old_prediction_without_the_true_class():
    """One step of a linear model in closed form: the gradient of its logits is p - p_target."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, CLASSES))
    mask = images().labels == 1
    problem = Task(model, Counted(images().subset(mask)), Counted(images().subset(~mask)), fresh, fit)
    x = images().subset(mask)[range(30)][0].double().flatten(1)
    weight, bias = (p.detach().double() for p in model[1].parameters())
    p = (x @ weight.T + bias).softmax(dim=1)
    target = p.clone()
    target[:, 1] = 0
    slope = (p - target / target.sum(dim=1, keepdim=True)) / 30
    methods.run("delete", problem, epochs=1, lr=0.5, batch_size=30)
    torch.testing.assert_close(model[1].weight.double(), weight - 0.5 * slope.T @ x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].bias.double(), bias - 0.5 * slope.sum(dim=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", [n for n in REGISTRY if REGISTRY[n].needs_posterior and REGISTRY[n].preparation == "bgd"]
)
def test_a_larger_penalty_stays_closer_to_the_posterior(name, trained):
    spent = []
    for weight in (0.01, 0.1, 0.6):
        report = methods.run(name, task(trained), kl_weight=weight, steps=60)
        spent.append(report.history[-1].kl)
    assert spent[0] > spent[1] > spent[2] > 0


@pytest.mark.parametrize("name", ["distruction", "teacher+kl", "amnesiac+kl"])
def test_a_learned_posterior_keeps_what_a_free_run_loses(name, trained):
    held, free = task(trained), task(trained)
    for problem, weight in ((held, 0.05), (free, 0.0)):
        problem.posterior = prepare(
            problem.model,
            loader(images(), batch_size=16, shuffle=True),
            method="bgd",
            steps=300,
            std_init=0.3,
            evidence=25,
            progress=False,
        )
        options = {"objective": "uniform-others"} if name == "distruction" else {}
        methods.run(name, problem, kl_weight=weight, steps=100, **options)
    assert accuracy(held.model, held.forget) < accuracy(trained, held.forget)
    assert accuracy(held.model, held.retain) > accuracy(free.model, free.retain)


# --- on real data --------------------------------------------------------------------------------


DIGITS = """
seeds = [0]
[network]
name = "vit-micro"
[train]
epochs = 15
[prepare]
steps = 1000
std_init = 0.1
[scenario.full-class]
data = "digits"
targets = ["3"]
[method]
finetune = { epochs = 1, lr = 0.02 }
teacher = { epochs = 3, lr = 3e-3 }
unsir = { retain_per_class = 100, lr = 1e-3 }
amnesiac = { lr = 3e-4 }
ssd = { alpha = 6.0 }
ssd-per-sample = { alpha = 3.0 }
scrub = { epochs = 3 }
"teacher+kl" = { steps = 40, kl_weight = 0.01 }
"unsir+kl" = { steps = 20 }
"amnesiac+kl" = { steps = 40 }
"scrub+kl" = { steps = 10, kl_weight = 0.5 }
distruction = { steps = 40 }
"""


@pytest.mark.slow
def test_the_numbers_on_digits_are_plausible(tmp_path):
    """Every method on real images: not just finite, but in the order that is known of the methods."""
    context = experiments.Context(tmp_path / "store")
    found, outcome = experiments.run(grid.parse(DIGITS, "digits"), tmp_path, context, devices=["cpu"], progress=False)
    assert outcome.failures == {}
    numbers = {c.method: c.numbers for c in found}
    compared = {n for n, m in REGISTRY.items() if not m.ablation}
    assert set(numbers) == compared
    baseline, retrain = numbers["baseline"], numbers["retrain"]
    assert min(baseline["retain"], baseline["forget"], retrain["retain"]) > 90
    # The old model recalls at once; one that never knew the class does not know it, and takes a while.
    assert baseline["relearn_steps"] == 0 < retrain["relearn_steps"]
    assert retrain["forget"] == retrain["mia_loss"] == 0 < baseline["mia_loss"]
    # A few gentle steps on other data forget less than retraining.
    assert numbers["finetune"]["forget"] > 50
    # Less is left than chance explains. UNSIR's noise alone forgets nothing: see `unsir_kl`.
    low, _ = next(c for c in found if c.method == "baseline").intervals["forget_train"]
    for name in compared - {"baseline", "retrain", "finetune", "unsir+kl"}:
        assert numbers[name]["forget_train"] < low, name
        assert numbers[name]["js_forget"] < baseline["js_forget"], name
        assert numbers[name]["retain"] > 50, name
    for name in ("amnesiac", "scrub", "unsir", "distruction", "distruction-auto"):
        assert numbers[name]["forget"] <= 5, name
        assert numbers[name]["retain"] > 85, name
