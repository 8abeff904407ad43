"""Ways to forget: ours by prior and objective, and AdamW on other papers' losses; each is followed step by step."""

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...anchors import Anchored
from ...forgetting import forget
from ...language_objectives import NPO, SimNPO
from ...loop.tokens import Sequences, spread
from ...methods.ablations import constant_std
from ...objectives import BoundedCrossEntropy, uniform_others
from ...posterior import Posterior
from ...preparation import prepare
from . import texts
from .models import Batch, cross_entropy, extracted, extracted_and_nll


@dataclass(frozen=True)
class Arm:
    """One way to forget.

    Attributes:
        kind: ``ours``, or the loss that AdamW lowers.
        lr: step size: of the means in units of the posterior (1 is BGD's own), or AdamW's.
        steps: at most.
        prior: ``learned`` or ``constant``, of ours.
        objective: of ours, by name.
        threshold: probability that the bounded likelihood pushes each token under.
        level: mean probability of the tokens at which ours ends.
        tokens: weight of the objective against the posterior, in tokens, where lambda is given and not found.
        anchors: self-made ones that ours holds (`distruction.anchors`).
        retain: whether retained answers and general text are read, with a weight of 1.
        stopped: whether AdamW ends where extraction is low enough, or after all of ``steps``.
        nats: per token of the forgotten answers, at which AdamW ends in its place.
    """

    kind: str
    lr: float
    steps: int = 100
    prior: str = "learned"
    objective: str = "bounded-ce"
    threshold: float = 0.1
    level: float | None = None
    tokens: float | None = None
    anchors: int = 0
    retain: bool = False
    stopped: bool = True
    nats: float | None = None


@dataclass
class Followed:
    """What is seen on the way, every few steps.

    Args:
        gone, kept: batches that are looked at; without ``kept`` the forgotten ones alone.
        stop: given the last look, whether to end there.
        every: steps between two looks.
    """

    gone: list[Batch]
    kept: list[Batch]
    stop: Callable[[dict[str, float]], bool] = lambda look: False
    every: int = 1
    looks: list[dict[str, float]] = field(default_factory=list)

    def __call__(self, model: nn.Module, step: int) -> bool:
        """Look if it is time; whether to end."""
        if step % self.every:
            return False
        look = {"step": step, **extracted_and_nll(model, self.gone)}
        if self.kept:
            look["kept"] = extracted(model, self.kept)
        self.looks.append(look)
        return self.stop(look)


def prepared(model: nn.Module, rows: list[Batch], general: Tensor, seed: int, steps: int = 150) -> Posterior:
    """The posterior of all that the model was trained on: answers and general text in each batch."""
    g = torch.Generator().manual_seed(seed)
    pieces = general[torch.randperm(len(general), generator=g)].split(8)
    batches = [texts.mixed(b, p) for b, p in zip(itertools.cycle(rows), pieces, strict=False)]
    return prepare(model, batches[:steps], steps=steps, num_examples=len(general), seed=seed, progress=False)


def unlearned(
    arm: Arm,
    model: nn.Module,
    prior: Posterior,
    forgotten: list[Batch],
    retained: tuple[list[Batch], Tensor],
    follow: Followed,
    seed: int,
) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of ``model`` that forgot, and what it cost."""
    model = copy.deepcopy(model)
    start = time.perf_counter()
    if arm.kind == "ours":
        facts = _ours(arm, model, prior, forgotten, follow, seed)
    else:
        facts = _descended(arm, model, forgotten, retained, follow, seed)
    return model, {**facts, "seconds": time.perf_counter() - start}


def _ours(
    arm: Arm, model: nn.Module, prior: Posterior, forgotten: list[Batch], follow: Followed, seed: int
) -> dict[str, Any]:
    if arm.prior == "constant":
        prior = constant_std(prior)
    objective: Any = BoundedCrossEntropy(arm.threshold) if arm.objective == "bounded-ce" else arm.objective
    if arm.anchors:
        objective = Anchored(model, prior, forgotten, objective, anchors=arm.anchors, seed=seed)
    given: dict[str, Any] = {} if arm.tokens is None else {"kl_weight": 0.5, "data_per_step": arm.tokens}
    report = forget(
        model,
        prior,
        forgotten,
        objective=objective,
        level=arm.level,
        steps=arm.steps,
        lr=arm.lr,
        **given,
        seed=seed,
        callback=lambda step: follow(model, step.step),
        progress=False,
    )
    return {"steps": len(report.history), "kl": report.kl, "reached": report.reached}


def _descended(
    arm: Arm,
    model: nn.Module,
    forgotten: list[Batch],
    retained: tuple[list[Batch], Tensor],
    follow: Followed,
    seed: int,
) -> dict[str, Any]:
    """AdamW without weight decay, with a constant step size."""
    loss_of = _loss(arm, copy.deepcopy(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=arm.lr, weight_decay=0.0)
    others = _beside(*retained, seed)
    for step, batch in zip(range(1, arm.steps + 1), itertools.cycle(forgotten), strict=False):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        if arm.retain:
            loss = loss + cross_entropy(model, *next(others))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if follow(model, step):
            break
    return {"steps": step}


def _loss(arm: Arm, before: nn.Module) -> Callable[[nn.Module, Batch], Tensor]:
    if arm.kind == "ascent":
        return lambda model, batch: -cross_entropy(model, batch)
    makers: dict[str, Callable[[], Any]] = {
        "npo": lambda: NPO(_Reference(before)),  # type: ignore[arg-type]  # called as `AtMeans` is
        "simnpo": SimNPO,
        "bounded": lambda: BoundedCrossEntropy(arm.threshold),
        "uniform-others": lambda: uniform_others,
    }
    objective = makers[arm.kind]()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        inputs = {k: t for k, t in batch.items() if k != "labels"}
        here = spread(inputs, batch["labels"], None, "the forget set")
        logits = here.answers(model(**inputs, use_cache=False).logits)
        needed = (here,) if getattr(objective, "needs_inputs", False) else ()
        value: Tensor = objective(logits, here.tokens, *needed)
        return value

    return loss


class _Reference:
    """The model before, as a teacher."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @torch.no_grad()
    def __call__(self, inputs: Sequences) -> Tensor:
        return inputs.answers(self._model(**inputs, use_cache=False).logits)


def _beside(rows: Sequence[Batch], general: Tensor, seed: int) -> Iterator[tuple[Batch, Batch]]:
    """Answers and general text."""
    g = torch.Generator().manual_seed(seed)
    for batch in itertools.cycle(rows):
        yield batch, texts.general_batch(general[torch.randint(len(general), (8,), generator=g)])


def at_depth(looks: list[dict[str, float]], depth: float) -> float | None:
    """Kept answers where the forgotten ones first have ``depth`` nats per token, between two looks; ``None`` if never.

    The first look is taken for one after no step where it is deeper already, at which all answers are kept.
    """
    start = {"nll": 0.0, "kept": 100.0}
    for before, after in itertools.pairwise([start, *looks]):
        if before["nll"] < depth <= after["nll"]:
            share = (depth - before["nll"]) / (after["nll"] - before["nll"])
            return before["kept"] + share * (after["kept"] - before["kept"])
    return None
