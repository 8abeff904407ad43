"""Texts of a causal language model from a file of JSON lines or of Parquet, and batches of their tokens."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import UsageError
from ..extras import needed
from ..loop.tokens import IGNORED

FORM = '{"prompt": "...", "answer": "..."} or {"text": "..."}'


@dataclass(frozen=True)
class Text:
    """A line of the file.

    Attributes:
        prompt: what comes before the answer; nothing of it is asked for.
        answer: what is; of a line with ``text`` all of it.
        line: its number, or the row's, from 1 on.
    """

    prompt: str
    answer: str
    line: int


def read_texts(path: Path) -> list[Text]:
    """The texts in a file of JSON lines, or of rows of Parquet with columns of the same names.

    A ``question`` with its ``answer``, as TOFU's files (arXiv 2401.06121) have them, becomes "Question: ...", a line
    break and "Answer: ...", which is the form that its authors give to models without a chat template.

    Raises:
        MissingPackage: it is of Parquet, and pyarrow is not installed.
        UsageError: it cannot be read, a line has another form, or there is none.
    """
    found = []
    for number, fields in _rows(path):
        known = fields if isinstance(fields, dict) else {}
        before = "question" if "question" in known and "prompt" not in known else "prompt"
        names = (before, "answer") if "answer" in known else ("text",)
        if not all(isinstance(known.get(n), str) for n in names):
            raise UsageError(f"{path}, line {number} must be {FORM}, not {json.dumps(fields, default=str)[:60]}")
        prompt, answer = known[names[0]] if len(names) == 2 else "", known[names[-1]]
        if not answer:
            raise UsageError(f"{path}, line {number} asks for nothing: its answer is empty")
        if names[0] == "question":
            prompt, answer = f"Question: {prompt}\nAnswer:", f" {answer}"
        found.append(Text(prompt, answer, number))
    if not found:
        raise UsageError(f"{path} holds no text: write a line {FORM} for each")
    return found


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Each line's number and what is in it."""
    if path.suffix == ".parquet":
        yield from enumerate(_parquet(path), start=1)
        return
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as JSON lines: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path}, line {number} is no JSON: {error}") from error


def _parquet(path: Path) -> list[Any]:
    with needed("parquet", path):
        import pyarrow
        import pyarrow.parquet
    try:
        wanted = {"prompt", "question", "answer", "text"} & set(pyarrow.parquet.read_schema(path).names)
        rows: list[Any] = pyarrow.parquet.read_table(path, columns=sorted(wanted)).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UsageError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    return rows


def tokens_of(texts: Sequence[Text], tokenizer: Any, longest: int | None, path: Path) -> list[tuple[Tensor, int]]:
    """Token numbers, (length,) of int64, and how many of them are the prompt's.

    Prompt and answer are tokenised one after the other and joined as they are: a space between them is the caller's.
    The tokenizer's special tokens, such as a beginning of the text, belong to the prompt. A ``text`` that is longer
    than the model can take comes in pieces.

    Args:
        tokenizer: of transformers.
        longest: tokens that the model can take at once; ``None`` where it does not say.

    Raises:
        UsageError: a prompt with its answer is longer, or one token alone, whose probability nobody asks for.
    """
    found = []
    for text in texts:
        before = tokenizer(text.prompt).input_ids
        after = tokenizer(text.answer, add_special_tokens=False).input_ids
        # What the tokenizer puts at the end of a prompt would stand within the text.
        if tokenizer.eos_token_id is not None and before[-1:] == [tokenizer.eos_token_id] != before:
            before = before[:-1]
        ids = torch.tensor([*before, *after], dtype=torch.int64)
        where = f"{path}, line {text.line}"
        if len(ids) < 2:
            raise UsageError(f"{where} is one token long, and a model is asked for tokens after the first")
        if longest is None or len(ids) <= longest:
            found.append((ids, len(before)))
        elif text.prompt:
            raise UsageError(f"{where} has {len(ids)} tokens and the model takes {longest}: shorten it")
        else:
            found += [
                (piece, len(before) if i == 0 else 0) for i, piece in enumerate(ids.split(longest)) if len(piece) > 1
            ]
    return found


def text_batches(rows: Sequence[tuple[Tensor, int]], *, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
    """Batches as `distruction.loop.tokens` describes them, padded on the right."""
    return DataLoader(rows, batch_size=batch_size, shuffle=shuffle, collate_fn=padded)  # type: ignore[arg-type]


def padded(rows: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """One batch of rows that `tokens_of` gives, padded on the right; nothing of prompts and padding is asked for."""
    width = max(len(ids) for ids, _ in rows)
    batch = {name: torch.zeros(len(rows), width, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    labels = torch.full((len(rows), width), IGNORED)
    for number, (ids, prompt) in enumerate(rows):
        batch["input_ids"][number, : len(ids)] = ids
        batch["attention_mask"][number, : len(ids)] = 1
        labels[number, prompt : len(ids)] = ids[prompt:]
    return {**batch, "labels": labels}


def longest_of(network: nn.Module) -> int | None:
    """Tokens that a model can take at once, by its configuration."""
    config: Any = getattr(network, "config", None)
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
