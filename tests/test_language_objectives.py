"""Objectives of language models against their papers' formulas, text by text in float64."""

import math

import pytest
import texts
import torch

from distruction import Posterior, UsageError, forget
from distruction.anchors import Anchored, dealt
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


def test_anchors_are_the_prompts_with_rare_tokens_dealt_out_anew():
    questions = [(torch.tensor([1, 10 + n, 2]), 3) for n in range(12)]
    made = dealt(questions, 50, torch.Generator().manual_seed(0))
    assert {(p[0].item(), p[2].item(), n) for p, n in made} == {(1, 2, 3)}
    names = [p[1].item() for p, _ in made]
    assert set(names) <= set(range(10, 22))
    assert len(set(names)) > 6


def test_anchored_is_the_objective_and_the_divergence_from_the_model_before():
    model, rows, here, before = prepared()
    objective = Anchored(model, before, [texts.padded(rows)], "bounded-ce", anchors=5, weight=3.0)
    made = objective.anchors
    old, new, losses = texts.gpt2(), model, []
    for row in range(5):
        length = int(made["attention_mask"][row].sum())
        ids, asked = made["input_ids"][row, :length], made.labels[row, :length] >= 0
        first = int(asked.nonzero()[0])
        with torch.no_grad():
            # The model before answers by itself.
            told = old.generate(ids[None, :first], attention_mask=torch.ones(1, first), max_new_tokens=length - first,
                                min_new_tokens=length - first, do_sample=False, pad_token_id=0,
                                eos_token_id=None)[0]  # fmt: skip
            assert told.tolist() == ids.tolist()
            p, q = (torch.distributions.Categorical(logits=m(ids[None]).logits[0, first - 1 : length - 1].double())
                    for m in (old, new))  # fmt: skip
            losses += torch.distributions.kl_divergence(p, q).tolist()
    logits = here.answers(call(model, here).logits)
    own = BoundedCrossEntropy(0.1)(logits, here.tokens).item()
    expected = own + 3.0 * sum(losses) / len(losses)
    assert objective(logits, here.tokens, here).item() == pytest.approx(expected, rel=1e-4)


def test_anchors_hold_answers_while_others_are_forgotten():
    model, batch = texts.gpt2(), texts.padded(texts.rows())
    prior = Posterior.around(model, 0.05)
    objective = Anchored(model, prior, [batch], "npo")
    quiet = {"kl_weight": 0.01, "steps": 8, "progress": False}
    forget(model, prior, [batch], objective=objective, **quiet)

    def divergence(changed):
        with torch.no_grad():
            z = [objective.anchors.answers(m(**objective.anchors).logits).double().log_softmax(-1)
                 for m in (texts.gpt2(), changed)]  # fmt: skip
        return (z[0].exp() * (z[0] - z[1])).sum(-1).mean().item()

    alone = texts.gpt2()
    forget(alone, prior, [batch], objective="npo", **quiet)
    assert divergence(model) < divergence(alone)


@pytest.mark.parametrize(("options", "message"), [({"anchors": 0}, "anchors must be"), ({"weight": 0.0}, "weight > 0")])
def test_anchors_out_of_range(options, message):
    model, rows, _, before = prepared()
    with pytest.raises(UsageError, match=message):
        Anchored(model, before, [texts.padded(rows)], "uniform", **options)


def test_texts_without_a_prompt_give_no_anchors():
    model, _, _, before = prepared()
    ids = torch.randint(1, texts.VOCABULARY, (2, 5))
    with pytest.raises(UsageError, match="no text of the forget set has one"):
        Anchored(model, before, [{"input_ids": ids, "labels": ids}], "uniform")


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
