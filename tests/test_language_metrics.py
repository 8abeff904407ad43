"""Metrics of language models against closed forms, Hugging Face's own loss and generation."""

import math

import pytest
import texts
import torch

from distruction import UsageError, language_metrics


@pytest.mark.parametrize("family", [texts.gpt2, texts.llama])
def test_perplexity_is_exp_of_hugging_faces_loss(family):
    model, rows = family(), texts.rows()
    found = language_metrics.token_log_likelihoods(model, [texts.padded(rows)])
    assert [len(t) for t in found] == [len(ids) - 2 for ids, _ in rows]
    loss = model(**texts.padded(rows)).loss.item()
    assert language_metrics.perplexity(found) == pytest.approx(math.exp(loss), rel=1e-5)
    for a, b in zip(found, language_metrics.token_log_likelihoods(model, [texts.packed(rows)]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert math.isnan(language_metrics.perplexity([]))


def test_extraction_is_hugging_faces_greedy_decoding():
    model = texts.llama()
    prompts = [ids[:3] for ids, _ in texts.rows()]
    answers = [model.generate(p[None], attention_mask=torch.ones(1, 3), min_new_tokens=4, max_new_tokens=4,
                              do_sample=False, pad_token_id=0, eos_token_id=None)[0, 3:] for p in prompts]  # fmt: skip
    assert language_metrics.extracted(model, prompts, answers) == 100.0
    answers[0] = torch.cat([answers[0][:-1], (answers[0][-1:] + 1) % texts.VOCABULARY])
    assert language_metrics.extracted(model, prompts, answers) == 75.0


def test_greedy_answers_of_batches_are_those_of_single_texts():
    model = texts.gpt2()
    rows = texts.rows()
    ids, labels = rows[2]
    prompt = ids[:2]
    ids = model.generate(prompt[None], attention_mask=torch.ones(1, 2), min_new_tokens=7, max_new_tokens=7,
                         do_sample=False, pad_token_id=0, eos_token_id=None)[0]  # fmt: skip
    rows[2] = ids, torch.cat([labels[:2], ids[2:]])
    expected = [language_metrics.extracted(model, [t[:2]], [t[2:]]) == 100 for t, _ in rows]
    assert expected[2]
    for form in (texts.padded(rows), texts.padded(rows, left=True), texts.packed(rows)):
        assert language_metrics.greedily_answered(model, [form]).tolist() == expected
        answered, likelihoods = language_metrics.read_answers(model, [form, form])
        assert answered.tolist() == expected * 2
        alone = language_metrics.token_log_likelihoods(model, [form]) * 2
        assert all(torch.equal(a, b) for a, b in zip(likelihoods, alone, strict=True))
    assert math.isnan(language_metrics.extracted(model, [], []))


def test_recovery_is_what_fine_tuning_on_others_brings_back():
    model = texts.gpt2()
    rows = [(torch.tensor([1, 2 + n, 11, 11 + n]), torch.tensor([-100, -100, -100, 11 + n])) for n in range(8)]
    shown, unshown = texts.padded(rows[:4]), texts.padded(rows[4:])
    before = {n: p.clone() for n, p in model.named_parameters()}
    # Answers that no text shows cannot come from the others'.
    assert language_metrics.recovered(model, [shown], [unshown], epochs=10, lr=3e-3) == 0.0
    # What is shown itself is learned, and the best epoch counts.
    assert language_metrics.recovered(model, [shown], [shown], epochs=300, lr=3e-3) == 100.0
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(UsageError, match="epochs must be"):
        language_metrics.recovered(model, [shown], [unshown], epochs=0)


def test_exposure_by_ranks():
    others = torch.linspace(-7, -1, 7)
    assert language_metrics.exposure(0.0, others) == 3.0
    assert language_metrics.exposure(-9.0, others) == 0.0
    assert language_metrics.exposure(-1.0, others) == 2.0  # a tie is lost
    # A canary like the others: E[log2 N - log2 rank] over uniform ranks, log2(N) - log2(N!) / N.
    n = 512
    found = [language_metrics.exposure(r + 0.5, torch.arange(1.0, n)) for r in range(n)]
    assert sum(found) / n == pytest.approx(math.log2(n) - math.lgamma(n + 1) / math.log(2) / n, rel=1e-9)
    with pytest.raises(UsageError, match="give some"):
        language_metrics.exposure(0.0, torch.empty(0))


def test_truth_ratio_in_closed_form():
    right = torch.tensor([0.5, 0.125]).log()  # geometric mean 1/4
    wrong = [torch.tensor([0.5]).log(), torch.tensor([0.25, 0.25, 0.25]).log()]
    assert language_metrics.truth_ratio(right, wrong) == pytest.approx((0.5 + 0.25) / 2 / 0.25)
    with pytest.raises(UsageError, match="at least one"):
        language_metrics.truth_ratio(right, [])


def test_forget_quality_is_exact_for_small_samples():
    """Fully separated samples of 4 and 4: the chance of D = 1 is 2 / C(8, 4)."""
    assert language_metrics.forget_quality([1, 2, 3, 4], [5, 6, 7, 8]) == pytest.approx(2 / 70)
    assert language_metrics.forget_quality([1, 2, 3], [1, 2, 3]) == 1.0


def test_min_k_and_its_attack():
    texts_ = [torch.tensor([-1.0, -5.0, -2.0, -4.0, -3.0]), torch.tensor([-0.5])]
    assert language_metrics.min_k(texts_, 40).tolist() == [-4.5, -0.5]
    assert language_metrics.min_k(texts_, 100).tolist() == [-3.0, -0.5]
    assert language_metrics.min_k(texts_, 1).tolist() == [-5.0, -0.5]
    # 3 of the 4 pairs are ordered right.
    assert language_metrics.mia_auc(torch.tensor([2.0, 0.0]), torch.tensor([1.0, -1.0])) == 75.0
    with pytest.raises(UsageError, match="percent"):
        language_metrics.min_k(texts_, 0)
