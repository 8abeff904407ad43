"""Anchors of a language model: answers that it is to keep, made without any data to retain.

Forgetting some of many similar texts takes the others along: all of them ask alike, and a diagonal posterior does not
see the direction in the weights that they share. Anchors stand for the others.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import objectives
from .errors import UsageError
from .loop.batches import call
from .loop.tokens import IGNORED, Sequences, spread
from .modules import logits_of, unwrapped
from .posterior import Posterior
from .teachers import AtMeans

RARE = 0.1
"""Share of the prompts that a token is at most in, to be one of those that say who or what is meant."""


class Anchored:
    """An objective, and answers that the model before gave: U + weight * mean over tokens of KL(before || now).

    The answers are to prompts of the forget set whose rare tokens were dealt out anew among all of them: to questions
    of the same form about nobody in particular. The model answers them itself, greedily, at the posterior's means.
    Each step costs one more forward and backward pass, of the anchors, and a forward pass of the model before.

    >>> objective = Anchored(model, posterior, [batch], "bounded-ce")  # doctest: +SKIP
    >>> forget(model, posterior, [batch], objective=objective)  # doctest: +SKIP

    Args:
        model, posterior: as `distruction.forget` is given them.
        batches: of the forget set, with a text in each row.
        objective: U, a name in `distruction.objectives.REGISTRY` or a callable.
        anchors: how many there are, >= 1.
        weight: > 0.
        seed: of what is dealt.

    Raises:
        UsageError: an argument is out of range, or no text has a prompt.
    """

    needs_inputs = True

    def __init__(
        self,
        model: nn.Module,
        posterior: Posterior,
        batches: Iterable[Mapping[str, Tensor]],
        objective: str | objectives.Objective,
        *,
        anchors: int = 32,
        weight: float = 1.0,
        seed: int = 0,
    ) -> None:
        if anchors < 1 or not weight > 0:
            raise UsageError(f"anchors must be >= 1 and weight > 0, not {anchors} and {weight}")
        self._model = unwrapped(model)
        self._teacher = AtMeans(model, posterior)
        self._objective: Any = objectives.resolve(objective, model, posterior)
        self.per_text = getattr(self._objective, "per_text", False)
        self.weight = weight
        questions = _questions(batches)
        if not questions:
            raise UsageError("anchors are made of prompts, and no text of the forget set has one before its labels")
        self.anchors = self._answered(dealt(questions, anchors, torch.Generator().manual_seed(seed)))

    def _answered(self, questions: list[tuple[Tensor, int]]) -> Sequences:
        """Prompts with the answers, each of a given length, that the model before gives."""
        device = next(self._model.parameters()).device
        width = max(len(prompt) + length for prompt, length in questions)
        ids = torch.zeros(len(questions), width, dtype=torch.int64, device=device)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for row, (prompt, length) in enumerate(questions):
            text = prompt.to(device)[None]
            for _ in range(length):
                logits = self._teacher({"input_ids": text, "attention_mask": torch.ones_like(text)})
                text = torch.cat([text, logits[:, -1:].argmax(dim=-1)], dim=1)
            ids[row, : text.shape[1]], mask[row, : text.shape[1]] = text[0], 1
            labels[row, len(prompt) : text.shape[1]] = text[0, len(prompt) :]
        # All of them on every rank: what the ranks' losses weigh adds up to 1.
        here = spread({"input_ids": ids, "attention_mask": mask}, labels, slice(0, len(ids)), "the anchors")
        return here

    def before_passes(self, inputs: Any) -> None:
        """What the objective itself wants before a pass."""
        if hasattr(self._objective, "before_passes"):
            self._objective.before_passes(inputs)

    def remove(self) -> None:
        """What the objective itself wants at the end."""
        if hasattr(self._objective, "remove"):
            self._objective.remove()

    def __call__(self, logits: Tensor, targets: Tensor, inputs: Any) -> Tensor:
        """The loss of a batch."""
        needs_inputs = getattr(self._objective, "needs_inputs", False)
        own = self._objective(logits, targets, inputs) if needs_inputs else self._objective(logits, targets)
        now = self.anchors.answers(logits_of(call(self._model, self.anchors)))
        before = F.log_softmax(self._teacher(self.anchors).float(), dim=-1)
        kept = F.kl_div(F.log_softmax(now.float(), dim=-1), before, log_target=True, reduction="batchmean")
        loss: Tensor = own + self.weight * kept
        return loss


def _questions(batches: Iterable[Mapping[str, Tensor]]) -> list[tuple[Tensor, int]]:
    """The tokens before the first that each row asks for, and how many it asks for."""
    found = []
    for batch in batches:
        mask = batch.get("attention_mask")
        for row, labels in enumerate(batch["labels"]):
            asked = (labels != IGNORED).nonzero().flatten()
            if len(asked) == 0:
                continue
            prompt = batch["input_ids"][row, : int(asked[0])]
            if mask is not None:
                prompt = prompt[mask[row, : int(asked[0])] != 0]
            if len(prompt):
                found.append((prompt.cpu(), len(asked)))
    return found


def dealt(questions: list[tuple[Tensor, int]], count: int, generator: torch.Generator) -> list[tuple[Tensor, int]]:
    """Questions, drawn at random, with their rare tokens in the place of each other's.

    Args:
        questions: prompts and the lengths of their answers.
        count: how many are made.
    """
    within = Counter(token for prompt, _ in questions for token in set(prompt.tolist()))
    most = max(1.0, RARE * len(questions))
    rare = torch.tensor([t for prompt, _ in questions for t in prompt.tolist() if within[t] <= most], dtype=torch.int64)
    made = []
    for number in torch.randint(len(questions), (count,), generator=generator).tolist():
        prompt, length = questions[number]
        prompt = prompt.clone()
        places = torch.tensor([within[t] <= most for t in prompt.tolist()])
        if places.any():
            prompt[places] = rare[torch.randint(len(rare), (int(places.sum()),), generator=generator)]
        made.append((prompt, length))
    return made
