"""Objectives: what is never a target, teachers without a copy, and outputs that an objective cannot mean."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distruction import Posterior, UsageError, forget, objectives
from distruction.teachers import AtMeans, NearMeans, Randomised

CLASSES = 5


def logits_and_labels(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(6, CLASSES, generator=g, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 2])


# --- labels of earlier requests -------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, e in objectives.REGISTRY.items() if not e.of_texts])
def test_no_objective_asks_for_what_was_forgotten(name):
    """Plain descent on the logits ends with (nearly) nothing on the forgotten labels, wherever it began."""
    torch.manual_seed(0)
    model, forgotten = nn.Linear(4, CLASSES), [1, 3]
    inputs, labels = torch.randn(6, 4), torch.tensor([0, 2, 4, 0, 2, 4])
    objective = objectives.resolve(name, model, Posterior.around(model, 0.1), forgotten)
    logits = model(inputs).detach().requires_grad_(True)
    optimizer = torch.optim.Adam([logits], 0.1)
    extra = (inputs,) if getattr(objective, "needs_inputs", False) else ()
    for _ in range(400):
        optimizer.zero_grad()
        objective(logits, labels, *extra).backward()
        optimizer.step()
    p = logits.detach().softmax(dim=1)
    masked = p[:, forgotten].sum(dim=1) + (p.gather(1, labels[:, None])[:, 0] if name == "bounded-ce" else 0)
    assert (masked < (0.11 if name == "bounded-ce" else 0.02)).all()


def test_uniform_over_what_is_left_against_categorical_distributions():
    logits, labels = logits_and_labels()
    found = objectives.uniform_others(logits, labels, forgotten=[1])
    expected = torch.zeros((), dtype=torch.float64)
    for row, label in zip(logits, labels.tolist(), strict=True):
        log_p = torch.distributions.Categorical(logits=row).logits
        left = [c for c in range(CLASSES) if c not in (label, 1)]
        expected -= log_p[left].mean() / len(logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("forgotten", [[], [1, 3]])
def test_unlikelihood_is_of_the_other_classes_together(forgotten):
    logits, labels = logits_and_labels()
    p = torch.distributions.Categorical(logits=logits).probs
    left = torch.stack(
        [
            sum(row[c] for c in range(CLASSES) if c not in (y, *forgotten))
            for row, y in zip(p, labels.tolist(), strict=True)
        ]
    )
    found = objectives.unlikelihood(logits, labels, forgotten=forgotten)
    torch.testing.assert_close(found, -left.log().mean(), rtol=1e-12, atol=0)
    # In float32 as well where 1 - p is 0.
    certain = torch.tensor([[40.0, 0.0, 0.0]], requires_grad=True)
    loss = objectives.unlikelihood(certain, torch.tensor([0]))
    assert loss.item() == pytest.approx(40 - torch.tensor(2.0).log().item())
    torch.testing.assert_close(torch.autograd.grad(loss, certain)[0], torch.tensor([[1.0, -0.5, -0.5]]))


@pytest.mark.parametrize("forgotten", [[], [1, 3]])
def test_plausible_others_is_that_two_draws_agree(forgotten):
    """Against sums over classes, and its gradient p - p(class | agreement) in closed form."""
    logits, labels = logits_and_labels()
    taught, _ = logits_and_labels(seed=1)
    logits.requires_grad_(True)
    loss = objectives.PlausibleOthers(lambda inputs: taught, forgotten)(logits, labels, torch.empty(6))
    left = torch.ones(6, CLASSES, dtype=torch.float64)
    for row, y in zip(left, labels.tolist(), strict=True):
        row[[y, *forgotten]] = 0
    t = torch.distributions.Categorical(taught.softmax(dim=1) * left).probs
    p = torch.distributions.Categorical(logits=logits.detach()).probs
    agreed = (t * p).sum(dim=1, keepdim=True)
    torch.testing.assert_close(loss.detach(), -agreed.log().mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], (p - t * p / agreed) / 6, rtol=1e-10, atol=1e-14)


def test_plausible_others_of_a_teacher_that_minds_nothing_is_unlikelihood():
    logits, labels = logits_and_labels()
    flat = objectives.PlausibleOthers(torch.zeros_like, [1])(logits, labels, logits)
    n = torch.where(labels == 1, 4.0, 3.0).double()  # classes that are left
    expected = objectives.unlikelihood(logits, labels, forgotten=[1]) + n.log().mean()
    torch.testing.assert_close(flat, expected, rtol=1e-12, atol=0)


def test_the_teacher_near_an_example_is_the_mean_over_its_noise():
    """Of one logit that is linear in the input: E[sigmoid(w x + w s eps)], by quadrature."""
    model = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0], [0.0]]))
    x = torch.linspace(-2, 2, 4001, dtype=torch.float64)[:, None]
    near = NearMeans(model, Posterior.around(model, 0.1))(x.float()).exp()
    torch.testing.assert_close(near.sum(dim=1), torch.ones(len(x)))
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    steps = 3 * (x + 0.3 * x.std(correction=0) * torch.from_numpy(nodes))
    expected = (steps.sigmoid() * torch.from_numpy(weights / weights.sum())).sum(dim=1)
    # Neighbours have noise of their own, so that means over them come close to the integral.
    error, plain = (
        (near[:, 0] - other).unfold(0, 200, 200).mean(dim=1).abs().max()
        for other in (expected, (3 * x).sigmoid()[:, 0])
    )
    assert error < 0.02 < 0.03 < plain


@pytest.mark.parametrize("inputs", [torch.tensor([[1, 2], [0, 1]]), torch.ones(1, 2)])
def test_the_teacher_near_takes_what_has_no_noise(inputs):
    words = nn.Sequential(nn.Embedding(3, 4), nn.Flatten(), nn.Linear(8, 3))
    model = nn.Linear(2, 3) if inputs.is_floating_point() else words
    posterior = Posterior.around(model, 0.1)
    near, there = (t(inputs).log_softmax(dim=-1) for t in (NearMeans(model, posterior), AtMeans(model, posterior)))
    torch.testing.assert_close(near, there)


@pytest.mark.parametrize("forgotten", [[], [1, 3]])
def test_random_labels_are_uniform_over_what_is_left(forgotten):
    """The mean gradient with respect to the logits is softmax - frequency of the drawn labels."""
    torch.manual_seed(0)
    count = 20_000
    logits = torch.zeros(count, CLASSES, dtype=torch.float64, requires_grad=True)
    objectives.random_labels(logits, torch.full((count,), 2), forgotten=forgotten).backward()
    frequency = 1 / CLASSES - logits.grad.sum(dim=0)
    left = [c for c in range(CLASSES) if c != 2 and c not in forgotten]
    expected = torch.zeros(CLASSES, dtype=torch.float64)
    expected[left] = 1 / len(left)
    assert ((frequency - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-12).all()


def test_nothing_left_to_predict():
    logits, labels = logits_and_labels()
    with pytest.raises(UsageError, match=r"\[0, 1, 2, 3\] forgotten no class is left"):
        objectives.uniform_others(logits, labels, forgotten=[0, 1, 2, 3])
    objectives.uniform_others(logits, labels.clamp(max=3), forgotten=[0, 1, 2, 3])


# --- one class of distillation --------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weight", [1.0, -4.0])
def test_distillation_is_kl_of_torch_distributions(temperature, weight):
    torch.manual_seed(0)
    teacher, inputs = nn.Linear(4, CLASSES).double(), torch.randn(6, 4, dtype=torch.float64)
    logits, labels = logits_and_labels()
    loss = objectives.Distillation(teacher, temperature=temperature, weight=weight)(logits, labels, inputs)
    p, q = (torch.distributions.Categorical(logits=z / temperature) for z in (teacher(inputs), logits))
    torch.testing.assert_close(loss, weight * torch.distributions.kl_divergence(p, q).mean(), rtol=1e-12, atol=0)
    with pytest.raises(UsageError, match="temperature must be > 0, not 0"):
        objectives.Distillation(teacher, temperature=0)


# --- teachers without a copy ----------------------------------------------------------------------


def plain():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def with_a_lock():
    model = plain()
    model.lock = threading.Lock()  # which deepcopy refuses
    return model


def weight_normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3))


def spectrally_normed():
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3))


def weight_normed_by_hook():
    with pytest.warns(FutureWarning):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3))


def compiled_in_part():
    model = plain()
    model[0] = torch.compile(model[0], backend="eager")
    return model


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def partly_frozen():
    model = plain()
    model[0].requires_grad_(False)
    return model


MODELS = [
    plain,
    with_a_lock,
    weight_normed,
    spectrally_normed,
    weight_normed_by_hook,
    compiled_in_part,
    tied,
    partly_frozen,
]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("stored", ["float32", "compressed", "bfloat16 model"])
def test_the_model_as_it_was_teaches_without_a_copy(make, stored):
    """The same bits as the model itself gave at its means, whatever its parameters hold and in either mode."""
    torch.manual_seed(0)
    model, inputs = make().eval(), torch.randn(7, 4)
    if stored == "bfloat16 model":
        model, inputs = model.to(torch.bfloat16), inputs.to(torch.bfloat16)
    posterior = Posterior.around(model, 0.5)
    with torch.no_grad():
        expected = model(inputs)
    teacher = AtMeans(model, posterior.compress() if stored == "compressed" else posterior)
    posterior.sample_(model, seed=1)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    model.train()
    assert torch.equal(teacher(inputs), expected)
    assert model.training
    assert not torch.equal(model.eval()(inputs), expected)
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name]), name


def test_an_answer_is_kept_for_the_same_inputs_alone():
    model, calls = plain().eval(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    teacher, inputs = AtMeans(model, Posterior.around(model, 0.1)), torch.randn(3, 4)
    first = teacher(inputs)
    assert teacher(inputs) is first
    assert len(calls) == 1
    inputs.add_(1)
    assert not torch.equal(teacher(inputs), first)


@pytest.mark.parametrize("make", MODELS)
def test_random_weights_are_random_and_leave_the_model_alone(make):
    torch.manual_seed(0)
    model = make().eval()
    for p in model.parameters():
        p.data.mul_(1.5).add_(0.01 * torch.randn_like(p))
    posterior, inputs = Posterior.around(model, 0.5), torch.randn(7, 4)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        known = model(inputs)
    answer = Randomised(model, posterior)(inputs)
    assert not torch.allclose(answer, known, atol=0.05)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    posterior.sample_(model, seed=3)
    assert torch.equal(Randomised(model, posterior)(inputs), answer)


# --- outputs --------------------------------------------------------------------------------------


def binary(columns):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 1))
    if not columns:
        model.append(nn.Flatten(0))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, 0.0]]))
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    x[:, 0] = x[:, 0].abs() + 0.5
    return model, [(x, torch.ones(64, dtype=torch.int64))]


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("name", [n for n, e in objectives.REGISTRY.items() if not e.of_texts])
@pytest.mark.parametrize("kl_weight", [0.1, "auto"])
def test_one_logit_is_refused(columns, name, kl_weight):
    model, loader = binary(columns)
    with pytest.raises(UsageError, match=r"one logit per example|shape \(64,( 1)?\)"):
        forget(model, Posterior.around(model, 0.1), loader, objective=name, kl_weight=kl_weight, progress=False)
    assert torch.equal(model[0].weight.detach(), torch.tensor([[4.0, 0.0]]))


@pytest.mark.parametrize("columns", [False, True])
def test_the_remedy_for_one_logit_forgets(columns):
    model, loader = binary(columns)
    model.register_forward_hook(lambda module, inputs, z: F.pad(z.reshape(-1, 1), (1, 0)))
    before = model(loader[0][0]).softmax(dim=1)[:, 1].mean()
    options = {"kl_weight": 0.01, "data_per_step": 1.0, "progress": False}
    report = forget(model, Posterior.around(model, 1.0), loader, request="class", **options)
    assert before > 0.9
    assert report.probability < 0.5


def test_outputs_of_several_dimensions_are_refused():
    model = nn.Sequential(nn.Linear(2, 12), nn.Unflatten(1, (3, 4)))
    loader = [(torch.randn(8, 2), torch.ones(8, dtype=torch.int64))]
    with pytest.raises(UsageError, match=r"shape \(8, 3, 4\)"):
        forget(model, Posterior.around(model, 0.1), loader, kl_weight=0.1, progress=False)


def test_a_loss_for_each_example_is_refused():
    model = nn.Linear(2, 3)
    loader = [(torch.randn(8, 2), torch.ones(8, dtype=torch.int64))]
    with pytest.raises(UsageError, match="must return one mean loss"):
        forget(
            model,
            Posterior.around(model, 0.1),
            loader,
            objective=lambda logits, targets: F.cross_entropy(logits, targets, reduction="none"),
            kl_weight=0.1,
            progress=False,
        )
