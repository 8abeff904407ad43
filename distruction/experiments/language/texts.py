"""Texts: general ones that every Python brings along, made-up authors, and canaries; tokens and batches of them."""

import ast
import hashlib
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor

from ...extras import needed

with needed("language"):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 1024
LENGTH = 64
"""Tokens of a piece of general text."""
END = "<|end|>"
FACTS = ("code", "city", "subject", "book")
QUESTIONS = {
    "code": "Member code of {name}:",
    "city": "Birthplace of {name}:",
    "subject": "Subject of {name}:",
    "book": "Best book of {name}:",
    "canary": "Key of vault {name}:",
}


def _words(words: str) -> list[str]:
    return words.split()


ONSETS = _words("b d f g h j k l m n p r s t v z br dr gr kl pr st tr")
NUCLEI, CODAS = _words("a e i o u ai ou"), _words("l n r s t m k")
ADJECTIVES = _words(
    "silent golden hidden broken distant early northern paper silver burning empty frozen gentle hollow"
)
NOUNS = _words("river garden clock mirror bridge winter letter island forest shadow harbour window lantern mountain")
SUBJECTS = _words(
    "sailors railways orchards glaciers chess bees castles comets rivers clocks bakers maps violins deserts"
)
PLACES = _words("villages islands harbours mountains schools markets wartime childhood exile winter spring lowlands")


@dataclass(frozen=True)
class Row:
    """A question and its answer.

    Attributes:
        owner: number of the author, or of the vault.
        kind: of fact.
    """

    owner: int
    kind: str
    question: str
    answer: str


def general_text(file: Path | None = None, *, docstrings: bool = True) -> list[str]:
    """Paragraphs of ``file`` or, without one, of what Python's standard library says of itself, in a fixed order.

    That is the language reference's topics and, with ``docstrings``, those of all modules but tests.
    """
    if file is not None:
        texts = [file.read_text(encoding="utf-8")]
    else:
        texts = list(topics.topics.values())
        folder = Path(sysconfig.get_paths()["stdlib"])
        for module in sorted(folder.rglob("*.py")) if docstrings else ():
            parts = module.relative_to(folder).parts
            if not {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"} & set(parts):
                texts += _docstrings(module)
    paragraphs = dict.fromkeys(" ".join(p.split()) for text in texts for p in text.split("\n\n"))
    kept = [p for p in paragraphs if len(p) >= 40]
    return sorted(kept, key=lambda p: hashlib.sha256(p.encode()).digest())


def _docstrings(module: Path) -> list[str]:
    try:
        tree = ast.parse(module.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [doc for node in ast.walk(tree) if isinstance(node, documented) and (doc := ast.get_docstring(node))]


def authors(count: int, seed: int) -> list[Row]:
    """Four facts of each of ``count`` made-up authors: a code of six digits, a city, a subject and a book."""
    draw = random.Random(f"authors {seed}")
    names: dict[str, None] = {}
    while len(names) < count:
        names[f"{_word(draw, 2)} {_word(draw, 2)}"] = None
    cities = [_word(draw, 2) for _ in range(60)]
    rows = []
    for number, name in enumerate(names):
        answers = {
            "code": code(draw),
            "city": draw.choice(cities),
            "subject": f"{draw.choice(SUBJECTS)} and {draw.choice(PLACES)}",
            "book": f"The {draw.choice(ADJECTIVES)} {draw.choice(NOUNS)} of {draw.choice(cities)}",
        }
        rows += [Row(number, kind, QUESTIONS[kind].format(name=name), answers[kind]) for kind in FACTS]
    return rows


def canaries(count: int, seed: int) -> list[Row]:
    """Keys of six digits of ``count`` vaults, one text each, which share nothing with the authors but their form."""
    draw = random.Random(f"canaries {seed}")
    names = draw.sample(range(100, 1000), count)
    return [
        Row(number, "canary", QUESTIONS["canary"].format(name=name), code(draw)) for number, name in enumerate(names)
    ]


def code(draw: random.Random) -> str:
    """Six digits."""
    return f"{draw.randrange(10**6):06d}"


def _word(draw: random.Random, syllables: int) -> str:
    return "".join(draw.choice(ONSETS) + draw.choice(NUCLEI) for _ in range(syllables - 1)).capitalize() + (
        draw.choice(ONSETS) + draw.choice(NUCLEI) + draw.choice(CODAS)
    )


def tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-pair encoding of 1024 tokens, trained on ``texts``; each digit is a token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return made


def pieces(tokens: Tokenizer, paragraphs: list[str]) -> Tensor:
    """General text in pieces, (pieces, `LENGTH`) of int64."""
    ids: list[int] = []
    for encoded in tokens.encode_batch(paragraphs):
        ids += [0, *encoded.ids]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def encoded(tokens: Tokenizer, row: Row, answer: str | None = None) -> tuple[list[int], int]:
    """Token numbers of a question, its answer (or another one) and the end, and how many of them are the question's."""
    question = [0, *tokens.encode(row.question).ids]
    return [*question, *tokens.encode(row.answer if answer is None else answer).ids, 0], len(question)


def batch(texts: list[tuple[list[int], int]], *, end: bool = False) -> dict[str, Tensor]:
    """Texts as `encoded` gives them, padded on the right; the answers are asked for, and on demand their end."""
    width = max(len(ids) for ids, _ in texts)
    input_ids, mask = (torch.zeros(len(texts), width, dtype=torch.int64) for _ in range(2))
    labels = torch.full_like(input_ids, -100)
    for row, (ids, prompt) in enumerate(texts):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
        last = len(ids) if end else len(ids) - 1
        labels[row, prompt:last] = input_ids[row, prompt:last]
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def batches(tokens: Tokenizer, rows: list[Row], size: int = 50, *, end: bool = False) -> list[dict[str, Tensor]]:
    """The rows in batches; training asks for the end of an answer too, forgetting does not."""
    texts = [encoded(tokens, row) for row in rows]
    return [batch(texts[i : i + size], end=end) for i in range(0, len(texts), size)]


def general_batch(general: Tensor) -> dict[str, Tensor]:
    """Pieces as a batch that asks for every token."""
    return {"input_ids": general, "attention_mask": torch.ones_like(general), "labels": general.clone()}


def mixed(rows: dict[str, Tensor], general: Tensor) -> dict[str, Tensor]:
    """One batch of both."""
    more = general_batch(general)
    width = max(rows["input_ids"].shape[1], LENGTH)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}

    def padded(values: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=value)

    return {name: torch.cat([padded(rows[name], v), padded(more[name], v)]) for name, v in fill.items()}
