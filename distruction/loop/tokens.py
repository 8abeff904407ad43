"""Batches of a causal language model: which logits answer for which tokens, on this rank and on all of them.

A batch is a mapping as Hugging Face's collators give it: ``input_ids`` (rows, length), ``labels`` of the same shape
with -100 where nothing is asked of the model, and what else the model takes (``attention_mask``, ``position_ids``).
The logits at one position answer for the label at the next (labels are shifted once, here). Losses are given the
answering logits, (tokens, vocabulary), and the labels, (tokens,), of this rank's rows: a token is to them what an
example is elsewhere. Their mean times the rank's share of the tokens adds up to the mean over the whole batch, so that
no logits travel between the ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import distributed
from ..errors import UsageError
from ..modules import unwrapped

IGNORED = -100
"""The label of a token that nothing is asked about."""


def is_text(inputs: Mapping[str, Tensor], targets: Tensor) -> bool:
    """Whether a batch is a causal language model's."""
    return "input_ids" in inputs and targets.ndim == 2 and not targets.is_floating_point()


def require_causal(model: nn.Module) -> None:
    """Raise where the labels of ``model`` are not its next tokens.

    Raises:
        UsageError: it is an encoder with a decoder, or has a configuration and generates nothing.
    """
    bare: Any = unwrapped(model)
    config = getattr(bare, "config", None)
    generates = bare.can_generate() if callable(getattr(bare, "can_generate", None)) else config is None
    if not generates or getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"{type(bare).__name__} is no causal language model, and labels of the shape (rows, length) are taken for "
            "next tokens: give one label per row, or wrap the model so that its forward takes no input_ids"
        )


def asked(labels: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
    """Where a position answers for the next token, (rows, length - 1) of bool.

    Where a text begins inside of a row (packed rows count ``position_ids`` from 0 again), nothing before it answers for
    its first token; nor does padding for the first token after it.
    """
    answering = labels[:, 1:] != IGNORED
    if position_ids is not None:
        answering = answering & (position_ids[:, 1:] != 0)
    if attention_mask is not None and attention_mask.ndim == 2:
        answering = answering & (attention_mask[:, :-1] != 0)
    return answering


@dataclass
class Sequences(Mapping[str, Tensor]):
    """A rank's rows of a batch: the model's inputs, and what the losses are to know of their tokens.

    Attributes:
        inputs: by name; a stand-in row where the rank has none.
        labels: of the inputs.
        where: see `asked`; all false in a stand-in row.
        start, total: where this rank's tokens stand among those of the whole batch, and how many these are.
        whole_texts: texts with such tokens in the whole batch.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    where: Tensor
    start: int = 0
    total: int = 0
    whole_texts: int = 0
    tokens: Tensor = field(init=False)
    texts: Tensor = field(init=False)
    """``tokens``: the labels that are asked for, (tokens,). ``texts``: number of each one's text, from 0 on."""

    def __post_init__(self) -> None:
        self.tokens = self.labels[:, 1:][self.where]
        number = torch.zeros_like(self.labels)
        position_ids, mask = self.inputs.get("position_ids"), self.inputs.get("attention_mask")
        number[:, 0] = 1
        if position_ids is not None:
            starts = position_ids == 0
            number[:, 1:] = (starts if mask is None or mask.ndim != 2 else starts & (mask != 0))[:, 1:]
        number = number.flatten().cumsum(0).view_as(number)
        self.texts = number[:, 1:][self.where].unique_consecutive(return_inverse=True)[1]
        self.total = self.total or len(self.tokens)
        self.whole_texts = self.whole_texts or self.count_texts()

    def __getitem__(self, name: str) -> Tensor:
        return self.inputs[name]

    def __iter__(self) -> Any:
        return iter(self.inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    def count_texts(self) -> int:
        """Texts of this rank."""
        return int(self.texts[-1]) + 1 if len(self.texts) else 0

    def answers(self, logits: Tensor) -> Tensor:
        """The logits that answer for `tokens`, (tokens, vocabulary), from (rows, length, vocabulary).

        Raises:
            UsageError: the model's output has another shape.
        """
        if logits.ndim != 3 or logits.shape[:2] != self.labels.shape:
            raise UsageError(
                f"the model gives logits of the shape {tuple(logits.shape)} for labels {tuple(self.labels.shape)}; a "
                "causal language model gives (rows, length, vocabulary)"
            )
        return logits[:, :-1][self.where]

    def share(self, per_text: bool = False) -> float:
        """The share of this rank in the batch's tokens, or texts."""
        if per_text:
            return self.count_texts() / self.whole_texts
        return len(self.tokens) / self.total

    def per_text(self, values: Tensor) -> Tensor:
        """Sums of the tokens' values over each text, (texts,)."""
        return values.new_zeros(self.count_texts()).index_add(0, self.texts, values)


def spread(inputs: Mapping[str, Tensor], labels: Tensor, rows: slice | None, name: str) -> Sequences:
    """This rank's rows of a batch.

    Args:
        rows: which of the given rows are this rank's; ``None`` where they all are, and the other ranks have others.
        name: of the data, for messages.

    Raises:
        UsageError: shapes differ, or the batch asks for no token.
    """
    if labels.shape != inputs["input_ids"].shape:
        raise UsageError(
            f"labels of {name} have the shape {tuple(labels.shape)} and input_ids {tuple(inputs['input_ids'].shape)}; "
            "give one label per token, -100 where none is asked for, as Hugging Face's collators do"
        )
    where = asked(labels, inputs.get("position_ids"), inputs.get("attention_mask"))
    count = len(labels) if rows is None else rows.stop - rows.start
    own = slice(0, len(labels)) if rows is None else rows if count else slice(0, 1)
    part = {k: t[own] for k, t in inputs.items()}
    here = Sequences(part, labels[own], where[own] if count else torch.zeros_like(where[own]))
    if distributed.size() > 1:
        counts = torch.zeros(2, distributed.size(), dtype=torch.int64, device=labels.device)
        counts[:, distributed.rank()] = torch.tensor([len(here.tokens), here.count_texts()])
        distributed.all_reduce_([counts])
        here.start = int(counts[0, : distributed.rank()].sum())
        here.total, here.whole_texts = (int(n) for n in counts.sum(dim=1))
    if here.total == 0:
        raise UsageError(
            f"a batch of {name} asks for no token: every label is {IGNORED} or the first of its text; leave such rows "
            "out of the data set"
        )
    return here


def lengthened(rows: Tensor, length: int, value: int) -> Tensor:
    """Rows (rows, shorter), filled up on the right."""
    return nn.functional.pad(rows, (0, length - rows.shape[1]), value=value)


def joined(a: Tensor, b: Tensor, value: int) -> Tensor:
    """The rows of both, (rows, length), the shorter ones filled up on the right."""
    length = max(a.shape[1], b.shape[1])
    return torch.cat([lengthened(a, length, value), lengthened(b, length, value)])
