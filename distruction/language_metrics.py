"""What is measured of a causal language model: definitions and traps in docs/metrics.md.

Likelihoods come from batches as `distruction.loop.tokens` describes them; they are summed in float64.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UsageError
from .extras import needed
from .loop.batches import call
from .loop.tokens import IGNORED, Sequences, spread
from .modules import deterministic, logits_of

with needed("language"):
    from scipy.stats import ks_2samp
    from sklearn.metrics import roc_auc_score


@torch.no_grad()
def token_log_likelihoods(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[Tensor]:
    """log p of each token that is asked for, given the true ones before it: a float64 tensor for each text, on the CPU.

    Args:
        batches: mappings with ``input_ids`` and ``labels`` (rows, length), -100 where nothing is asked for.
    """
    return [t for here, logits in _answers(model, batches) for t in _log_likelihoods(here, logits)]


def _answers(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[tuple[Sequences, Tensor]]:
    """Each batch and the logits that answer for its tokens."""
    device = next(model.parameters()).device
    with deterministic(model):
        for batch in batches:
            inputs = {k: t.to(device) for k, t in batch.items() if k != "labels"}
            here: Sequences = spread(inputs, batch["labels"].to(device), slice(0, len(batch["labels"])), "the texts")
            yield here, here.answers(logits_of(call(model, here)))


def perplexity(log_likelihoods: list[Tensor]) -> float:
    """exp of the mean negative log-likelihood over all tokens; NaN for none."""
    return math.exp(-torch.cat(log_likelihoods).mean().item()) if log_likelihoods else math.nan


@torch.no_grad()
def greedily_answered(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Whether greedy decoding gives all tokens that a text asks for, bool, (texts,), on the CPU.

    One forward pass for each batch: decoding gives an answer if and only if every token of it is the likeliest after
    the true tokens before it, as long as the asked-for tokens of a text are its last.

    Args:
        batches: see `token_log_likelihoods`.
    """
    found = [_answered(here, logits) for here, logits in _answers(model, batches)]
    return torch.cat([torch.empty(0, dtype=torch.bool), *found])


@torch.no_grad()
def read_answers(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """`greedily_answered` and `token_log_likelihoods` of the same batches, from one forward pass of each."""
    answered = [torch.empty(0, dtype=torch.bool)]
    likelihoods: list[Tensor] = []
    for here, logits in _answers(model, batches):
        answered.append(_answered(here, logits))
        likelihoods += _log_likelihoods(here, logits)
    return torch.cat(answered), likelihoods


def _answered(here: Sequences, logits: Tensor) -> Tensor:
    misses = here.per_text((logits.argmax(dim=-1) != here.tokens).long())
    return (misses == 0).cpu()


def _log_likelihoods(here: Sequences, logits: Tensor) -> list[Tensor]:
    log_p = -F.cross_entropy(logits.double(), here.tokens, reduction="none").cpu()
    return list(torch.split(log_p, torch.bincount(here.texts.cpu()).tolist()))


@torch.no_grad()
def extracted(model: nn.Module, prompts: Iterable[Tensor], answers: Iterable[Tensor]) -> float:
    """Share of answers that greedy decoding of their prompts gives token by token, in percent; NaN for none.

    Args:
        prompts, answers: int64 token numbers, (length,) each.
    """
    texts = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.cat([prompt.cpu(), answer.cpu()])[None]
        labels = ids.clone()
        labels[:, : len(prompt)] = IGNORED
        texts.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return 100.0 * greedily_answered(model, texts).double().mean().item()


def recovered(
    model: nn.Module,
    shown: Sequence[Mapping[str, Tensor]],
    unshown: Sequence[Mapping[str, Tensor]],
    *,
    epochs: int = 20,
    lr: float = 1e-3,
) -> float:
    """Share of unshown answers that a copy of the model gives after fine-tuning on shown ones, in percent.

    What a model has only hidden comes back with a little of its like (Hu et al., "Unlearning or Obfuscating?", 2025,
    arXiv 2406.13356); a model that never knew it gives next to nothing. The highest share after any epoch, for an
    attacker may stop where it is best.

    Args:
        shown, unshown: batches of two parts of the forget set, see `greedily_answered`.
        epochs: over the shown ones, with AdamW.
        lr: its step size.

    Raises:
        UsageError: an argument is out of range.
    """
    if epochs < 1 or not 0 < lr < math.inf:
        raise UsageError(f"epochs must be >= 1 and lr > 0 and finite, not {epochs} and {lr}")
    attacked = copy.deepcopy(model)
    optimizer = torch.optim.AdamW([p for p in attacked.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    best = greedily_answered(attacked, unshown).double().mean().item()
    for _ in range(epochs):
        with torch.enable_grad():
            for here, logits in _answers(attacked, shown):
                optimizer.zero_grad()
                F.cross_entropy(logits.float(), here.tokens).backward()
                optimizer.step()
        best = max(best, greedily_answered(attacked, unshown).double().mean().item())
    return 100.0 * best


def exposure(canary: float, others: Tensor) -> float:
    """log2 |R| - log2 rank of a canary among candidates that the model was not trained on, in bits.

    Carlini, Liu, Erlingsson, Kos, Song, "The Secret Sharer", 2019, definition 4; by sampling (their section 4.3), R
    being the canary and ``others``. At most log2 |R|; 1.44 bits in the mean for a canary that the model has not seen
    (ties count against the canary).

    Args:
        canary: its log-likelihood.
        others: of other fillings of the same format, drawn at random, (N,).

    Raises:
        UsageError: there are no others.
    """
    if len(others) == 0:
        raise UsageError("exposure ranks a canary among other fillings of its format: give some")
    rank = 1 + int((others >= canary).sum())
    return math.log2(len(others) + 1) - math.log2(rank)


def truth_ratio(paraphrased: Tensor, perturbed: list[Tensor]) -> float:
    """Mean over wrong answers of p(wrong | q)**(1/|wrong|), over p(paraphrase | q)**(1/|paraphrase|).

    Maini, Feng, Schwarzschild, Lipton, Kolter, "TOFU", 2024, arXiv 2401.06121, equation 1. Large where the model finds
    wrong answers likelier than a paraphrase of the right one.

    Args:
        paraphrased: log p of the tokens of the paraphrased right answer, (tokens,).
        perturbed: the same of each wrong answer.

    Raises:
        UsageError: there is no wrong answer.
    """
    if not perturbed:
        raise UsageError("the truth ratio compares a right answer with wrong ones: give at least one")
    wrong = np.mean([math.exp(t.double().mean().item()) for t in perturbed])
    return float(wrong) / math.exp(paraphrased.double().mean().item())


def forget_quality(unlearned: Any, retrained: Any) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test between truth ratios on the forget set.

    TOFU, section 2.2.2. Large: the test cannot tell the unlearned model from one that was trained without the forget
    set; with few texts it never can.

    Args:
        unlearned, retrained: truth ratios of both models, one for each question.
    """
    return float(ks_2samp(np.asarray(unlearned), np.asarray(retrained)).pvalue)


def min_k(log_likelihoods: list[Tensor], percent: float = 20.0) -> Tensor:
    """Mean log p of the ``percent`` least likely tokens of each text (at least one), float64, (texts,).

    Min-K% Prob (Shi et al., "Detecting Pretraining Data from Large Language Models", 2023, arXiv 2310.16789); 100 is
    the negative loss. Higher for members.

    Raises:
        UsageError: percent is not in (0, 100].
    """
    if not 0 < percent <= 100:
        raise UsageError(f"percent must be in (0, 100], not {percent}")
    kept = [t.sort().values[: max(1, int(len(t) * percent / 100))].double().mean() for t in log_likelihoods]
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.float64)


def mia_auc(scores: Tensor, unseen: Tensor) -> float:
    """Area under the ROC of an attack that calls texts with high scores members, in percent; 50 is chance.

    Args:
        scores: of the forget set, (N,), such as `min_k` gives.
        unseen: of texts of the same kind that the model was not trained on, (M,).
    """
    labels = np.r_[np.ones(len(scores)), np.zeros(len(unseen))]
    return 100.0 * float(roc_auc_score(labels, torch.cat([scores, unseen]).numpy()))
