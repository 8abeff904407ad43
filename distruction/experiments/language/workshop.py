"""Trained models of the experiment on language models, kept in a folder, and what is measured of them."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...extras import needed
from ...posterior import Posterior
from ...report import folder
from . import models, texts
from .arms import Arm, Followed, at_depth, prepared, unlearned
from .models import Measures
from .settings import DEPTHS, is_curve

with needed("language"):
    from transformers import GPT2LMHeadModel

BEFORE, RETRAINING = "before", "retraining"
"""Rows of the tables that are no arm."""
ENOUGH = 5.0
"""Extracted answers, in percent, at which AdamW's losses, which say nothing of an end, are stopped."""


def say(text: str) -> None:
    """A line of progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


class Workshop:
    """Texts and trained models of the seeds, kept in a folder.

    Args:
        folder: of the models.
        text: a file of general text in place of Python's own.
        size: of everything.
    """

    def __init__(self, folder: Path, text: Path | None, size: models.Size) -> None:
        self.folder, self.size = folder, size
        folder.mkdir(parents=True, exist_ok=True)
        general = texts.general_text(text, docstrings=size.docstrings)
        shapes = [f"{r.question}{r.answer}" for r in texts.authors(100, 10**6)]
        self.tokens = texts.tokenizer(general + shapes)
        pieces = texts.pieces(self.tokens, general)
        self.held_out, self.general = pieces[: models.HELD_OUT], pieces[models.HELD_OUT :]

    def rows(self, seed: int) -> list[texts.Row]:
        """All that a model of this seed is to know by heart."""
        return texts.authors(self.size.authors, seed) + texts.canaries(self.size.vaults, seed)

    def base(self) -> nn.Module:
        """The pretrained model, the same for all seeds."""
        return self._kept("base", lambda said: models.pretrain(self.size, self.general, 0, said))

    def memorised(self, seed: int, without: str = "") -> nn.Module:
        """The model that knows all rows by heart, or all but those of a scenario."""
        rows = [r for r in self.rows(seed) if not (without and self.is_gone(without, r))]
        batches = texts.batches(self.tokens, rows, end=True)
        name = f"seed-{seed}" + (f"-without-{without}" if without else "")
        return self._kept(name, lambda said: models.memorise(self.size, self.base(), batches, self.general, seed, said))

    def prior(self, seed: int, model: nn.Module) -> Posterior:
        """The posterior of `memorised`."""
        file = self.folder / f"seed-{seed}.safetensors"
        if not file.exists():
            say(f"seed-{seed}: preparing")
            batches = texts.batches(self.tokens, self.rows(seed), end=True)
            prepared(model, batches, self.general, seed).save(file)
        return Posterior.load(file, model=model)

    def is_gone(self, scenario: str, row: texts.Row) -> bool:
        """Whether a scenario's request is for this row."""
        if scenario == "authors":
            return row.kind != "canary" and row.owner < self.size.gone
        return row.kind == {"codes": "code", "canaries": "canary"}[scenario]

    def is_kept(self, scenario: str, row: texts.Row) -> bool:
        """Whether it is among the answers that should stay: the authors' others, where codes go."""
        return not self.is_gone(scenario, row) and not (scenario == "codes" and row.kind == "canary")

    def _kept(self, name: str, make: Callable[[Callable[[str], None]], Any]) -> nn.Module:
        if not (self.folder / name / "model.safetensors").exists():
            say(f"{name}: training")
            made = make(lambda text: say(f"{name}: {text}"))
            with folder(self.folder / name, overwrite=True) as draft:
                made.save_pretrained(draft)
        model: nn.Module = GPT2LMHeadModel.from_pretrained(self.folder / name)
        return model.eval()


class Case:
    """One scenario of one seed."""

    def __init__(self, shop: Workshop, scenario: str, seed: int) -> None:
        rows = shop.rows(seed)
        self.shop, self.scenario, self.seed = shop, scenario, seed
        gone = [r for r in rows if shop.is_gone(scenario, r)]
        self.measures = Measures(shop.tokens, gone, [r for r in rows if shop.is_kept(scenario, r)], shop.held_out)
        self.model = shop.memorised(seed)
        self.prior = shop.prior(seed, self.model)
        self.forgotten = texts.batches(shop.tokens, gone)
        kept = [r for r in rows if not shop.is_gone(scenario, r)]
        self.retained: tuple[list[Any], Tensor] = texts.batches(shop.tokens, kept, end=True), shop.general

    def measured(self, name: str, arm: Arm | None) -> dict[str, Any]:
        """A row of the table or, of an arm of that name, a curve; without an arm the model before or the retrained."""
        if arm is not None:
            return self.deep(arm) if is_curve(name) else self.forgot(arm)
        model = self.model if name == BEFORE else self.shop.memorised(self.seed, without=self.scenario)
        return {**self.measures.quickly(model), **self.measures.slowly(model)}

    def forgot(self, arm: Arm) -> dict[str, Any]:
        """An arm of the table, with all measures."""
        stopped = arm.kind != "ours" and arm.stopped

        def ends(look: dict[str, float]) -> bool:
            enough = look["extracted"] <= ENOUGH if arm.nats is None else look["nll"] >= arm.nats
            return stopped and enough

        gone = texts.batches(self.measures.tokens, self.measures.gone, 100)
        model, facts = self._run(arm, Followed(gone, [], ends, every=1 if stopped else arm.steps))
        return {**facts, **self.measures.quickly(model), **self.measures.slowly(model)}

    def deep(self, arm: Arm) -> dict[str, Any]:
        """An arm on its way to the depth at which arms are compared, and a little further."""
        # Texts of like length share a batch: fewer tokens are read.
        kept = sorted(self.measures.kept, key=lambda row: len(texts.encoded(self.measures.tokens, row)[0]))
        batches = [texts.batches(self.measures.tokens, rows, 100) for rows in (self.measures.gone, kept)]
        follow = Followed(batches[0], batches[1], lambda look: look["nll"] >= max(DEPTHS), every=2)
        _, facts = self._run(arm, follow)
        return {**facts, "looks": follow.looks, "at": {str(d): at_depth(follow.looks, d) for d in DEPTHS}}

    def _run(self, arm: Arm, follow: Followed) -> tuple[nn.Module, dict[str, Any]]:
        return unlearned(arm, self.model, self.prior, self.forgotten, self.retained, follow, self.seed)
