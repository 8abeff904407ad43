"""The model of 0.7 M weights, its training, and what is measured of it."""

import copy
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...extras import needed
from ...language_metrics import exposure, greedily_answered, read_answers, recovered, token_log_likelihoods
from . import texts
from .texts import Row

with needed("language"):
    from tokenizers import Tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """How much there is of everything.

    Attributes:
        width, blocks: of the model.
        authors, vaults: that it learns by heart.
        gone: authors of the scenario that forgets some.
        pretraining: steps of 32 pieces.
        epochs: of memorising, at most.
        docstrings: whether general text has the standard library's docstrings beside the language reference's topics.
    """

    width: int
    blocks: int
    authors: int
    vaults: int
    gone: int
    pretraining: int
    epochs: int
    docstrings: bool


SIZES = {"full": Size(128, 3, 100, 20, 10, 300, 60, True), "quick": Size(64, 2, 24, 6, 4, 40, 120, False)}
"""The benchmark's, and one that shows in a minute whether everything runs."""
MEMORISING = 3e-3
"""Largest step size of memorising."""
CODES = 30
"""Whose exposure is measured."""
HELD_OUT = 160
"""Pieces of general text that no model is trained on."""


def network(size: Size) -> nn.Module:
    """GPT-2 with tied embeddings."""
    model: nn.Module = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=texts.VOCABULARY,
            n_positions=96,
            n_embd=size.width,
            n_layer=size.blocks,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    return model


def cross_entropy(model: nn.Module, *batches: Batch) -> Tensor:
    """Mean over the tokens that are asked for in all batches; logits are made for these alone, which saves the half."""
    network: Any = model
    total, count = torch.zeros(()), 0
    for batch in batches:
        tokens = batch["labels"][:, 1:]
        asked = tokens != -100
        inputs = {name: t for name, t in batch.items() if name != "labels"}
        hidden = network.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1][asked]
        total = total + F.cross_entropy(network.get_output_embeddings()(hidden), tokens[asked], reduction="sum")
        count += len(hidden)
    return total / count


def pretrain(size: Size, general: Tensor, seed: int, say: Callable[[str], None]) -> nn.Module:
    """A model of the general text."""
    torch.manual_seed(seed)
    model = network(size)
    steps = size.pretraining
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    start = time.perf_counter()
    for step, rows in zip(range(steps), _epochs(len(general), 32, seed), strict=False):
        loss = cross_entropy(model, texts.general_batch(general[rows]))
        _update(model, optimizer, loss)
        schedule.step()
        if step % 25 == 24:
            say(f"pretraining {step + 1}/{steps}: loss {loss.item():.2f}, {time.perf_counter() - start:.0f} s")
    return model.eval()


def memorise(
    size: Size, base: nn.Module, batches: Sequence[Batch], general: Tensor, seed: int, say: Callable[[str], None]
) -> nn.Module:
    """A copy of ``base`` that knows the rows by heart: until greedy decoding gives all answers, general text beside."""
    model = copy.deepcopy(base)
    rows = whole(batches)
    each = len(rows["labels"]) // 50 + 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=MEMORISING, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MEMORISING, total_steps=each * size.epochs)
    pieces, own = _epochs(len(general), 4, seed), _epochs(len(rows["labels"]), 50, seed)
    start = time.perf_counter()
    for step in range(each * size.epochs):
        here = next(own)
        parts = {k: t[here] for k, t in rows.items()}, texts.general_batch(general[next(pieces)])
        _update(model, optimizer, cross_entropy(model, *parts))
        schedule.step()
        if step % (5 * each) == 5 * each - 1:
            known = extracted(model, batches)
            say(f"epoch {(step + 1) // each}: {known:.0f} % known, {time.perf_counter() - start:.0f} s")
            if known == 100.0:
                break
    return model.eval()


def whole(batches: Sequence[Batch]) -> Batch:
    """All rows in one batch."""
    width = max(b["labels"].shape[1] for b in batches)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.cat([F.pad(b[name], (0, width - b[name].shape[1]), value=v) for b in batches])
        for name, v in fill.items()
    }


def _epochs(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Numbers of the rows of batches, shuffled anew in each epoch, without end."""
    g = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=g).split(size)


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def extracted(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Share of the answers that greedy decoding gives, in percent."""
    return 100.0 * greedily_answered(model, batches).double().mean().item()


def extracted_and_nll(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """`extracted` and `nll` of the same answers, by these names."""
    answered, likelihoods = read_answers(model, batches)
    return {"extracted": 100.0 * answered.double().mean().item(), "nll": -torch.cat(likelihoods).mean().item()}


def nll(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Nats per token of the answers."""
    return -torch.cat(token_log_likelihoods(model, batches)).mean().item()


@dataclass(frozen=True)
class Measures:
    """What is asked of every model of a scenario.

    Args:
        tokens: the tokenizer.
        gone, kept: rows to forget, and all others that were memorised.
        held_out: general text that no model was trained on.
        draws: other fillings that exposure ranks a code among.
    """

    tokens: Tokenizer
    gone: list[Row]
    kept: list[Row]
    held_out: Tensor
    draws: int = 63

    def quickly(self, model: nn.Module) -> dict[str, float]:
        """Extraction and likelihood."""
        gone, kept = (texts.batches(self.tokens, rows, 100) for rows in (self.gone, self.kept))
        return {
            **extracted_and_nll(model, gone),
            "kept": extracted(model, kept),
            "perplexity": math.exp(nll(model, [texts.general_batch(p) for p in self.held_out.split(40)])),
        }

    def slowly(self, model: nn.Module) -> dict[str, float]:
        """What is left under the surface: the exposure of codes, and what half of the forgotten answers brings back."""
        halves = [texts.batches(self.tokens, [r for r in self.gone if r.owner % 2 == odd], 25) for odd in (0, 1)]
        found = {"recovered": recovered(model, *halves)}
        codes = [row for row in self.gone if row.kind in ("code", "canary")][:CODES]
        if codes:
            found["exposure"] = statistics.fmean(self._exposure(model, row) for row in codes)
        return found

    def _exposure(self, model: nn.Module, row: Row) -> float:
        draw = random.Random(f"exposure {row.question}")
        fillings = [row.answer, *(texts.code(draw) for _ in range(self.draws))]
        rows = texts.batch([texts.encoded(self.tokens, row, filling) for filling in fillings])
        own, *others = (t.sum() for t in token_log_likelihoods(model, [rows]))
        return exposure(own.item(), torch.stack(others))
