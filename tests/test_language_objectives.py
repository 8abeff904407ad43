"""Objectives of language models against their papers' formulas, text by text in float64."""

import math

import pytest
import texts
import torch

from distruction import Posterior, UsageError, forget
from distruction.language_objectives import NPO, SimNPO, Steering
from distruction.loop import FORGET_SET
from distruction.loop.batches import Batching, call
from distruction.objectives import BoundedCrossEntropy, MaskedTeacher, uniform
from distruction.teachers import AtMeans


def prepared(form="padded"):
    model, rows = texts.gpt2(), texts.rows()
    batch = {"padded": texts.padded, "packed": texts.packed}[form](rows)
    here = Batching([batch], torch.device("cpu"), needs_inputs=True, role=FORGET_SET)(batch).sequences
    before = Posterior.around(model, 0.1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model, rows, here, before


def per_token(model, rows):
    """log p of each token that is asked for, text by text, float64."""
    with torch.no_grad():
        found = []
        for ids, labels in rows:
            log_p = model(ids[None]).logits[0].double().log_softmax(-1)
            found.append([log_p[t - 1, ids[t]].item() for t in range(1, len(ids)) if labels[t] >= 0])
        return found


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_npo_is_the_papers_equation_3(form):
    model, rows, here, before = prepared(form)
    reference = [sum(t) for t in per_token(texts.gpt2(), rows)]
    now = [sum(t) for t in per_token(model, rows)]
    for beta in (0.1, 0.7):
        objective = NPO(AtMeans(model, before), beta=beta)
        expected = [-2 / beta * log_sigmoid(-beta * (a - b)) for a, b in zip(now, reference, strict=True)]
        loss = objective(here.answers(call(model, here).logits), here.tokens, here)
        assert loss.item() == pytest.approx(sum(expected) / 4, rel=1e-5)


def test_npos_reference_is_asked_once_for_each_text_however_it_is_batched():
    model, _, here, before = prepared()
    calls = []

    class Counted(AtMeans):
        def __call__(self, inputs):
            calls.append(len(inputs["input_ids"]))
            return super().__call__(inputs)

    objective = NPO(Counted(model, before))
    for batch in (here, here, prepared("packed")[2]):
        objective.before_passes(batch)
    assert calls == [4]


def test_simnpo_is_the_papers_equation_4():
    model, rows, here, _ = prepared()
    for beta, gamma in ((2.5, 0.0), (0.5, 0.3)):
        expected = [-2 / beta * log_sigmoid(-beta / len(t) * sum(t) - gamma) for t in per_token(model, rows)]
        loss = SimNPO(beta, gamma)(here.answers(call(model, here).logits), here.tokens, here)
        assert loss.item() == pytest.approx(sum(expected) / 4, rel=1e-5)


def test_steering_is_rmus_forget_loss():
    model, rows, here, _ = prepared()
    objective = Steering(model, coefficient=3.0, seed=2)
    assert objective.layer == "transformer.h.1"
    objective.before_passes(here)
    loss = objective(here.answers(call(model, here).logits), here.tokens, here)
    u = torch.rand(16, generator=torch.Generator().manual_seed(2)).double()
    u /= u.square().sum().sqrt()
    caught = []
    handle = model.transformer.h[1].register_forward_hook(
        lambda m, i, out: caught.append(out[0] if isinstance(out, tuple) else out)
    )
    expected = []
    with torch.no_grad():
        for ids, labels in rows:
            model(ids[None])
            hidden = caught.pop().reshape(len(ids), 16).double()
            asked = [t - 1 for t in range(1, len(ids)) if labels[t] >= 0]
            expected += [(hidden[t] - 3.0 * u).square().sum().item() for t in asked]
    handle.remove()
    assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    objective.remove()
    call(model, here)
    assert not objective._hidden


def test_classes_objectives_speak_of_next_tokens():
    model, rows, here, before = prepared()
    logits = here.answers(call(model, here).logits)
    log_p = [t for text in per_token(model, rows) for t in text]
    bounded = BoundedCrossEntropy(0.1)(logits, here.tokens)
    assert bounded.item() == pytest.approx(sum(max(0, t - math.log(0.1)) for t in log_p) / len(log_p), rel=1e-5)
    z = logits.detach().double()
    torch.testing.assert_close(uniform(logits, here.tokens).double(), -z.log_softmax(-1).mean(), rtol=1e-5, atol=0)
    taught = here.answers(call(texts.gpt2(), here).logits).detach().double()
    taught = taught.scatter(-1, here.tokens[:, None], -math.inf).softmax(-1)
    teacher = torch.distributions.Categorical(probs=taught)
    expected = torch.distributions.kl_divergence(teacher, torch.distributions.Categorical(logits=z)).mean()
    loss = MaskedTeacher(AtMeans(model, before))(logits, here.tokens, here)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("objective", ["npo", "simnpo", "rmu", "masked-teacher", "uniform", "bounded-ce"])
def test_each_lowers_the_loss_and_leaves_no_hook(objective):
    model, batch = texts.gpt2(), texts.padded(texts.rows())
    report = forget(model, Posterior.around(model, 0.05), [batch], objective=objective, kl_weight=0.01, steps=8,
                    progress=False)  # fmt: skip
    assert report.history[-1].loss < report.history[0].loss
    assert not any(m._forward_hooks for m in model.modules())


def test_classifiers_are_told_that_these_are_for_texts():
    model = torch.nn.Linear(3, 2)
    data = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))]
    for objective in ("npo", "simnpo"):
        with pytest.raises(UsageError, match="for causal language models"):
            forget(model, Posterior.around(model, 0.1), data, objective=objective, request="class", kl_weight=0.1,
                   steps=2, progress=False)  # fmt: skip
    with pytest.raises(UsageError, match="no list of layers"):
        forget(model, Posterior.around(model, 0.1), data, objective="rmu", request="class", progress=False)
