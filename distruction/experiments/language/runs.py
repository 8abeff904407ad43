"""Models and runs of the experiment on language models: what is missing is run, what is there is kept."""

import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...extras import needed
from ...posterior import Posterior
from ...report import write_json
from . import models, tables, texts
from .arms import Arm, Followed, at_depth, prepared, unlearned
from .models import Measures
from .settings import ARMS, DEPTH, DEPTHS, GRIDS, STRENGTHS

with needed("language"):
    from transformers import GPT2LMHeadModel

SCENARIOS = ("codes", "authors", "canaries")
SEEDS = (1, 2, 3)
"""Of the tables."""
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
        say(f"{len(self.general)} pieces of {texts.LENGTH} tokens of general text")

    def rows(self, seed: int) -> list[texts.Row]:
        """All that a model of this seed is to know by heart."""
        return texts.authors(self.size.authors, seed) + texts.canaries(self.size.vaults, seed)

    def base(self) -> nn.Module:
        """The pretrained model, the same for all seeds."""
        return self._kept("base", lambda: models.pretrain(self.size, self.general, 0, say))

    def memorised(self, seed: int, without: str = "") -> nn.Module:
        """The model that knows all rows by heart, or all but those of a scenario."""
        rows = [r for r in self.rows(seed) if not (without and self.is_gone(without, r))]
        batches = texts.batches(self.tokens, rows, end=True)
        name = f"seed-{seed}" + (f"-without-{without}" if without else "")
        return self._kept(name, lambda: models.memorise(self.size, self.base(), batches, self.general, seed, say))

    def prior(self, seed: int, model: nn.Module) -> Posterior:
        """The posterior of `memorised`."""
        file = self.folder / f"seed-{seed}.safetensors"
        if not file.exists():
            say("preparing")
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

    def _kept(self, name: str, make: Any) -> nn.Module:
        if not (self.folder / name / "config.json").exists():
            say(f"training {name}")
            make().save_pretrained(self.folder / name)
        model: nn.Module = GPT2LMHeadModel.from_pretrained(self.folder / name)
        return model.eval()


class Case:
    """One scenario of one seed."""

    def __init__(self, shop: Workshop, scenario: str, seed: int) -> None:
        rows = shop.rows(seed)
        self.seed = seed
        gone = [r for r in rows if shop.is_gone(scenario, r)]
        self.measures = Measures(shop.tokens, gone, [r for r in rows if shop.is_kept(scenario, r)], shop.held_out)
        self.model = shop.memorised(seed)
        self.prior = shop.prior(seed, self.model)
        self.forgotten = texts.batches(shop.tokens, gone)
        kept = [r for r in rows if not shop.is_gone(scenario, r)]
        self.retained: tuple[list[Any], Tensor] = texts.batches(shop.tokens, kept, end=True), shop.general

    def follow(self, stop: Any, every: int = 1) -> Followed:
        """What looks at a run on its way."""
        gone, kept = (texts.batches(self.measures.tokens, r, 100) for r in (self.measures.gone, self.measures.kept))
        return Followed(gone, kept, stop, every)

    def forgot(self, arm: Arm) -> dict[str, Any]:
        """An arm of the table, with all measures."""
        stopped = arm.kind != "ours" and arm.stopped

        def ends(look: dict[str, float]) -> bool:
            enough = look["extracted"] <= ENOUGH if arm.nats is None else look["nll"] >= arm.nats
            return stopped and enough

        follow = self.follow(ends, every=1 if stopped else arm.steps)
        model, facts = self._run(arm, follow)
        return {**facts, **self.measures.quickly(model), **self.measures.slowly(model)}

    def deep(self, arm: Arm) -> dict[str, Any]:
        """An arm on its way to the depth at which arms are compared, and a little further."""
        follow = self.follow(lambda look: look["nll"] >= max(DEPTHS), every=2)
        _, facts = self._run(arm, follow)
        return {**facts, "looks": follow.looks, "at": {str(d): at_depth(follow.looks, d) for d in DEPTHS}}

    def _run(self, arm: Arm, follow: Followed) -> tuple[nn.Module, dict[str, Any]]:
        return unlearned(arm, self.model, self.prior, self.forgotten, self.retained, follow, self.seed)


def named(scenario: str) -> list[str]:
    """What the table and the curves of a scenario are made of, in their order."""
    return ["before", *ARMS[scenario], *(DEPTH if scenario == "codes" else ()), "retraining"]


def missing(shop: Workshop, scenario: str, seed: int, done: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The table's rows and the curves that are not there yet."""
    names = named(scenario)
    if not set(names) - done:
        return
    case = Case(shop, scenario, seed)
    for name in (n for n in names if n not in done):
        start = time.perf_counter()
        if name in ("before", "retraining"):
            model = case.model if name == "before" else shop.memorised(seed, without=scenario)
            found = {**case.measures.quickly(model), **case.measures.slowly(model)}
        elif name in ARMS[scenario]:
            found = case.forgot(ARMS[scenario][name])
        else:
            found = case.deep(DEPTH[name])
        shown = found.get("at") or {k: round(v, 2) for k, v in found.items() if isinstance(v, float)}
        say(f"seed {seed}, {scenario}, {name}: {shown} ({time.perf_counter() - start:.0f} s)")
        yield name, found


def tune(shop: Workshop, out: Path) -> None:
    """Every strength and step size of the grids on seed 0."""
    case = Case(shop, "codes", 0)
    file = out / "tuning.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    trials = {f"{n}, {v:g} tokens": replace(arm, tokens=v) for n, (arm, tried) in STRENGTHS.items() for v in tried}
    trials |= {f"{n}, lr {v:g}": replace(arm, lr=v) for n, (arm, tried) in GRIDS.items() for v in tried}
    for name, arm in trials.items():
        if name in found:
            continue
        found[name] = (case.deep if name.startswith("depth") else case.forgot)(arm)
        found[name].pop("looks", None)
        write_json(file, found)
        say(f"{name}: {found[name]}")


def run(
    out: Path,
    folder: Path,
    *,
    seeds: Sequence[int] = SEEDS,
    scenarios: Sequence[str] = SCENARIOS,
    text: Path | None = None,
    size: str = "full",
    threads: int = 1,
    tuning: bool = False,
) -> list[dict[str, Any]]:
    """Run what is missing and write ``language.json``, ``language.md`` and ``language.png``; returns all runs.

    Args:
        out: folder of the results.
        folder: of trained models.
        seeds, scenarios: that are run.
        text: a file of general text in place of Python's own.
        size: a name in `models.SIZES`.
        threads: of the CPU.
        tuning: try the step sizes of the grids on seed 0 instead, and write ``tuning.json``.

    Raises:
        UsageError: a name is unknown.
    """
    for value, known in ((size, list(models.SIZES)), *((name, list(SCENARIOS)) for name in scenarios)):
        if value not in known:
            raise UsageError(f"{value!r} is unknown; choose {', '.join(known)}")
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    shop = Workshop(folder, text, models.SIZES[size])
    file = out / "language.json"
    runs: list[dict[str, Any]] = json.loads(file.read_text())["runs"] if file.exists() else []
    if tuning:
        tune(shop, out)
        return runs
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    facts = {"size": size, "text": "Python's own" if text is None else text.name, **versions, "threads": threads}
    for name, seed in ((c, s) for c in scenarios for s in seeds):
        done = {r["name"] for r in runs if (r["scenario"], r["seed"]) == (name, seed)}
        for arm, found in missing(shop, name, seed, done):
            runs.append({"scenario": name, "seed": seed, "name": arm, **found})
            _write(out, facts, runs)
    tables.figure(runs, out / "language.png")
    return runs


def _write(out: Path, facts: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    runs.sort(key=lambda r: (SCENARIOS.index(r["scenario"]), r["seed"], named(r["scenario"]).index(r["name"])))
    write_json(out / "language.json", facts | {"runs": runs})
    (out / "language.md").write_text(tables.table(runs))
