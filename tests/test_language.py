"""Causal language models: the same result however texts are batched; next-token targets; the strength of forgetting."""

import math

import pytest
import texts
import torch
import torch.nn.functional as F

from distruction import Posterior, UsageError, forget, prepare
from distruction.likelihood import Categorical, signed_tokens
from distruction.loop import TRAINING
from distruction.loop.batches import Batching, keywords

QUIET = {"progress": False}
MODELS = {"gpt2": texts.gpt2, "llama": texts.llama}


def sequences(batch):
    return Batching([batch], torch.device("cpu"), needs_inputs=False, role=TRAINING)(batch).sequences


@pytest.mark.parametrize("family", MODELS)
def test_the_loss_is_hugging_faces(family):
    model, batch = MODELS[family](), texts.padded(texts.rows())
    here = sequences(batch)
    logits = here.answers(model(**batch).logits)
    torch.testing.assert_close(F.cross_entropy(logits, here.tokens), model(**batch).loss)
    assert here.total == sum(n - 2 for n in (7, 4, 9, 5))
    assert here.whole_texts == 4


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("form", ["more padding", "left", "packed"])
def test_padded_left_padded_and_packed_batches_prepare_and_forget_the_same(family, form):
    rows = texts.rows()
    # The first token of a packed text is asked for by nobody.
    rows += [(ids, ids) for ids, _ in texts.rows((6, 3), 0)]
    plain = texts.padded(rows)
    other = {"more padding": texts.padded(rows, extra=3), "left": texts.padded(rows, left=True),
             "packed": texts.packed(rows)}[form]  # fmt: skip
    results = []
    for batch in (plain, other):
        model = MODELS[family]()
        prior = prepare(model, [batch], steps=5, std_init=0.1, num_examples=6, evidence=100.0, **QUIET)
        report = forget(model, prior, [batch], steps=6, objective="bounded-ce", level=0.01, **QUIET)
        results.append((prior, report))
    (prior, report), (prior_2, report_2) = results
    for name in prior:
        for p, q in ((prior, prior_2), (report.posterior, report_2.posterior)):
            for a, b in zip(p[name], q[name], strict=True):
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    assert report_2.probability == pytest.approx(report.probability, rel=1e-4)
    assert [s.accuracy for s in report.history] == pytest.approx([s.accuracy for s in report_2.history])
    assert [s.loss for s in report.history] == pytest.approx([s.loss for s in report_2.history], rel=1e-4)
    assert report.request == "texts"
    assert prior.metadata["loss_per"] == "tokens"
    logits, asked = MODELS[family]().eval()(**plain).logits[:, :-1], plain["labels"][:, 1:]
    right = (logits.argmax(dim=-1) == asked)[asked != -100].double().mean().item()
    assert prior.metadata["accuracy_at_means"] == prior_2.metadata["accuracy_at_means"] == pytest.approx(100 * right)


def test_strength_goes_by_the_mean_probability_of_the_tokens():
    rows = texts.rows()
    model = texts.gpt2()
    report = forget(model, Posterior.around(model, 0.1), [texts.padded(rows[:1]), texts.padded(rows[1:])], steps=3,
                    objective="uniform", **QUIET)  # fmt: skip
    expected = []
    for ids, labels in rows:
        p = model(ids[None]).logits[0].double().softmax(-1)
        expected += [p[t - 1, ids[t]].item() for t in range(1, len(ids)) if labels[t] >= 0]
    assert report.probability == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def prepared_and_forgotten(model, **options):
    prior = prepare(model, [texts.padded(texts.rows())], steps=4, std_init=0.1, evidence=100.0, **options, **QUIET)
    report = forget(model, prior, [texts.padded(texts.rows())], steps=4, objective="bounded-ce", **options, **QUIET)
    return [t for posterior in (prior, report.posterior) for pair in posterior.values() for t in pair]


@pytest.mark.parametrize("family", MODELS)  # GPT-2's embeddings are tied, and get their gradient from two places
def test_release_gradients_is_the_same_to_the_bit(family):
    kept, released = (prepared_and_forgotten(MODELS[family](), release_gradients=r) for r in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(kept, released, strict=True))


@pytest.mark.parametrize("family", MODELS)
def test_activations_are_made_again_where_the_model_says_so_with_the_same_bits(family):
    expected = prepared_and_forgotten(MODELS[family]())
    dropout = {"gpt2": "attn_pdrop", "llama": "attention_dropout"}[family]
    model = texts.recomputing(MODELS[family](**{dropout: 0.5}))
    layer = (model.transformer.h if family == "gpt2" else model.model.layers)[0]
    runs, hooked = [], []
    layer.mlp.register_forward_pre_hook(lambda *a: runs.append(torch.is_grad_enabled()))
    layer.register_forward_hook(lambda *a: hooked.append(torch.is_grad_enabled()))
    found = prepared_and_forgotten(model)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert sum(runs) == 2 * sum(hooked) > 0  # of passes with gradients
    assert runs.count(False) == hooked.count(False)
    assert "forward" not in vars(layer)


def test_squared_gradient_of_signed_tokens_is_the_fisher_diagonal():
    """Two tokens, logits as parameters: diag(p) - p p^T, and the targets' own frequencies."""
    torch.manual_seed(0)
    z = torch.randn(3, 4, dtype=torch.float64)
    p = z.softmax(-1)
    draws = 4000
    total = torch.zeros_like(z)
    g = torch.Generator().manual_seed(1)
    for _ in range(draws):
        leaf = z.clone().requires_grad_()
        loss = signed_tokens(Categorical(), leaf, torch.zeros(3, dtype=torch.int64), 0, 3, g)
        total += torch.autograd.grad(loss, leaf)[0].square()
    expected = p * (1 - p) / 3
    # Of a square of ((y == c) - p)^2 / 3: its standard error by its exact second and fourth moments.
    fourth = (p * (1 - p) ** 4 + (1 - p) * p**4) / 9
    error = ((fourth - expected**2) / draws).sqrt()
    assert ((total / draws - expected).abs() < 4.5 * error).all()


def test_ranks_draw_what_one_process_draws():
    torch.manual_seed(0)
    logits, tokens = torch.randn(10, 7), torch.randint(7, (10,))

    def loss(start, stop, share):
        return share * signed_tokens(Categorical(), logits[start:stop], tokens[start:stop], start, 10,
                                     torch.Generator().manual_seed(4))  # fmt: skip

    assert loss(0, 3, 0.3) + loss(3, 10, 0.7) == pytest.approx(loss(0, 10, 1.0).item(), abs=1e-6)


def test_no_cache_is_kept():
    model = texts.gpt2()
    batch = {"input_ids": torch.ones(1, 3, dtype=torch.int64)}
    assert keywords(model, batch)["use_cache"] is False
    assert keywords(torch.nn.Linear(1, 1), batch) == batch


def test_what_is_refused_before_anything_changed():
    from transformers import BertConfig, BertForTokenClassification

    batch = texts.padded(texts.rows())
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    shorter = {**batch, "labels": batch["labels"][:, 1:]}
    model = texts.gpt2()
    for bad, message in ((nothing, "asks for no token"), (shorter, "one label per token")):
        with pytest.raises(UsageError, match=message):
            prepare(model, [bad], steps=2, **QUIET)
    with pytest.raises(UsageError, match="request='class' is for class numbers"):
        forget(model, Posterior.around(model, 0.1), [batch], request="class", **QUIET)
    bert = BertForTokenClassification(
        BertConfig(vocab_size=23, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    with pytest.raises(UsageError, match="no causal language model"):
        prepare(bert, [batch], steps=2, **QUIET)


def test_a_label_out_of_the_vocabulary_is_refused():
    batch = texts.padded(texts.rows())
    batch["labels"][0, 4] = texts.VOCABULARY
    with pytest.raises(UsageError, match=f"{texts.VOCABULARY} classes"):
        prepare(texts.gpt2(), [batch], steps=2, **QUIET)


def test_every_texts_loss_counts_by_its_tokens():
    model, rows = texts.gpt2(), texts.rows()
    steps = []
    prepare(model, [texts.padded(rows)], steps=1, std_init=1e-6, evidence=1.0, callback=steps.append, **QUIET)
    losses = [model(ids[None], labels=labels[None]).loss.item() * (len(ids) - 2) for ids, labels in rows]
    assert steps[0].loss == pytest.approx(sum(losses) / sum(len(i) - 2 for i, _ in rows), rel=1e-3)
    assert not math.isnan(steps[0].accuracy)
