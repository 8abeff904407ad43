"""What a request is to reach, in a user's words: ``gone``, ``sub-class``, ``unseen``, ``corrected``.

``gone``: whole classes go; no image is taken for one of them. ``sub-class``: a kind of records that has no label of its
own goes; the label lives on for the others. ``corrected``: records with wrong labels; the given label goes, and the
model's next guess may come: by default that for noisy copies of the record, which it did not learn by heart.
``unseen``: records whose classes live on are to look as if the model had
never seen them. The objective is that of any request; the run ends as soon as an attacker who sees the log-odds
o = log p / (1 - p) of each record's own label could not tell the records from examples that the model has not seen, and
does not begin where that is within chance. What is kept of those are quantiles of their log-odds before. The model will
be a little less sure of them as well once it is less sure of the records, by a share that a rehearsal finds
(`distruction.rehearse`).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import distributed
from .errors import UsageError
from .loop import Role
from .loop.batches import Batches, Batching, Inputs, call
from .modules import deterministic, logits_of, unwrapped
from .sharding import reshard
from .strength import ForgetSet, Probability, batches_of

TARGETS = ("gone", "sub-class", "unseen", "corrected")
QUANTILES = 33
"""Numbers kept of each class's unseen examples."""
FEWEST = 10
"""Examples that a class needs for quantiles of its own; the others go by all classes together."""
CORRECTED = 0.05
"""Mean probability of the given labels at which records count as corrected."""
CORRECTING = "plausible-near"
"""The objective for ``corrected`` where none is named."""
SUB_CLASS = 0.05
"""Mean probability of their labels at which the records of a sub-class count as gone."""
SUB_CLASS_MARGIN = 0.85
"""What a sub-class's ascent aims at, as a share of the odds of the level: in long cycles it ends within an eighth of
its aim, and what goes further takes siblings along."""
SETTLING = ("sub-class", "corrected")
"""Targets at which a run ends with a cycle of steps that decay to zero, and not wherever the level first holds: what
their records say goes although their labels live on, and the means that longer steps leave keep less of the others."""
ADVANTAGE, SHIFT = -0.05, 0.1
"""Twice the area under the attacker's curve, less 1, at which records count as unseen: a little past 0, since what the
attacker is told of unseen examples is an estimate, and since one who knows each record's own odds sees more. What is
added to it for the ascent, which goes by logarithms."""
HELD_OUT = Role("prepare", "the held-out set", "loss_fn", whole=True)


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """log p / (1 - p) of each label's probability p, float64, (N,): finite and close to normal where p itself is 1.

    The confidence that LiRA models (Carlini et al. 2022, arXiv 2112.03570, section V).
    """
    logits = logits.double()
    own = F.one_hot(labels, logits.shape[-1]).bool()
    return logits[own] - logits.masked_fill(own, -math.inf).logsumexp(dim=-1)


def of_target(target: str, request: str, level: float | None) -> tuple[Literal["class", "records"], float | None]:
    """The request and the level that a target stands for.

    Raises:
        UsageError: there is no such target, or another argument says otherwise.
    """
    if target not in TARGETS:
        raise UsageError(f"target must be {', '.join(TARGETS)} or None, not {target!r}")
    kind: Literal["class", "records"] = "class" if target == "gone" else "records"
    if request not in ("auto", kind):
        raise UsageError(f"target={target!r} is a request for {kind}, not for {request}: leave out request")
    if target == "unseen" and level is not None:
        raise UsageError("target='unseen' has a level of its own, an attacker's advantage: leave out level")
    if level is None:
        level = {"unseen": ADVANTAGE, "corrected": CORRECTED, "sub-class": SUB_CLASS}.get(target)
    return kind, level


@torch.no_grad()
def held_out_quantiles(model: nn.Module, loader: Batches) -> dict[str, Any]:
    """Quantiles of the log-odds that the model gives to unseen examples' labels, as JSON-able numbers.

    Returns:
        ``examples``; ``log_odds``: at the shares (i + 1/2) / 33 by label, and for all labels under ``all``.

    Raises:
        UsageError: there are no examples, or targets are no class numbers.
    """
    batching = Batching(loader, next(model.parameters()).device, needs_inputs=True, role=HELD_OUT)
    found: list[tuple[Tensor, Tensor]] = []
    with deterministic(model):
        for loaded in loader:
            batch = batching(loaded)
            if batch.targets.ndim != 1 or batch.targets.is_floating_point():
                raise UsageError("held_out is for classifiers: its targets must be a vector of int64 class numbers")
            logits = distributed.by_rows(lambda part: logits_of(call(model, part)), batch.whole_inputs)
            found.append((log_odds(logits, batch.targets).cpu(), batch.targets.cpu()))
    reshard(unwrapped(model))
    if not found:
        raise UsageError("the held-out set is empty: pass examples that the model was not trained on, or leave it out")
    odds, labels = (torch.cat(t) for t in zip(*found, strict=True))
    shares = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    kept = {"all": odds.quantile(shares).tolist()}
    for c, count in zip(*(t.tolist() for t in labels.unique(return_counts=True)), strict=True):
        if count >= FEWEST:
            kept[str(c)] = odds[labels == c].quantile(shares).tolist()
    return {"examples": len(odds), "log_odds": kept}


@dataclass(frozen=True)
class HeldOut:
    """What a posterior keeps of examples that the model was not trained on.

    Attributes:
        by_label: quantiles of their log-odds, ascending, for each label of a request.
        everyone: those of all labels together.
        examples: how many they were.
        drift: how far their log-odds fall where those of a request's records fall by 1: a model that is made less sure
            of some records is a little less sure of all that it has not seen. 0 where it was not rehearsed.
    """

    by_label: dict[int, Tensor]
    everyone: Tensor
    examples: int
    drift: float = 0.0


def held_out_of(metadata: Mapping[str, Any], labels: Iterable[int], device: torch.device) -> HeldOut:
    """What the posterior with this metadata keeps, for these labels.

    Raises:
        UsageError: the posterior was prepared without held-out examples.
    """
    if "held_out" not in metadata:
        raise UsageError(
            "target='unseen' goes by examples that the model was not trained on, and the posterior was prepared "
            "without: prepare(..., held_out=loader) keeps a few numbers of theirs"
        )
    kept = metadata["held_out"]["log_odds"]

    def ascending(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device).sort().values

    return HeldOut(
        {c: ascending(kept.get(str(c), kept["all"])) for c in labels},
        ascending(kept["all"]),
        metadata["held_out"]["examples"],
        metadata["held_out"].get("drift", 0.0),
    )


def by_unseen(kind: str, data: ForgetSet, metadata: Mapping[str, Any], target: str | None, level: float | None) -> bool:
    """Whether a request without a target ends where the records look unseen: where p knows how unseen ones look."""
    of_labels = data.targets.ndim == 1 and bool(data.counts)
    return kind == "records" and of_labels and target is None and level is None and "held_out" in metadata


@torch.no_grad()
def odds_of(teacher: Callable[[Inputs], Tensor], data: ForgetSet) -> Tensor:
    """The log-odds that a teacher gives to the labels of the forget set's examples, float64."""
    return torch.cat([log_odds(teacher(x), y) for x, y in batches_of(data)])


class Advantage(Probability):
    """How much better than chance an attacker tells records from unseen examples by the log-odds.

    2 AUC - 1, AUC being the share of pairs in which the record has the larger log-odds, ties half: among examples of
    its class, the mean over the records, or among all, whichever is larger. It is the largest advantage of a threshold
    where the two curves differ by a shift. The unseen examples' log-odds are the kept ones, moved by their drift. A
    call gives it with `SHIFT` added, above 0.

    Args:
        model, data: see `Probability`.
        held_out: what is known of unseen examples.
        before: log-odds of the examples of ``data``, before: see `odds_of`.

    Attributes:
        signed: 2 AUC - 1 at the last call, below 0 where the records' labels are less likely than unseen examples'.
    """

    def __init__(self, model: nn.Module, data: ForgetSet, held_out: HeldOut, before: Tensor) -> None:
        super().__init__(model, data, None)
        self._held_out, self._before = held_out, before
        self.signed = 1.0

    @property
    def chance(self) -> float:
        """The standard error of the advantage where records are no other than unseen examples.

        2 sqrt((n + m + 1) / (12 n m)) for n records and m examples, as of the statistic of Mann and Whitney (1947).
        """
        n, m = len(self._data.targets), self._held_out.examples
        return float(2 * math.sqrt((n + m + 1) / (12 * n * m)))

    def _value(self, logits: Tensor) -> float:
        odds = log_odds(logits, self._data.targets)
        # As if the others had drifted back.
        odds = odds - self._held_out.drift * (odds - self._before).quantile(0.5).clamp(max=0)
        shares = torch.zeros_like(odds)
        for c, known in self._held_out.by_label.items():
            rows = self._data.targets == c
            shares[rows] = _share_below(known, odds[rows])
        auc = max(shares.mean().item(), _share_below(self._held_out.everyone, odds).mean().item())
        self.signed = 2 * auc - 1
        return max(self.signed + SHIFT, 1e-6)


def doubted(value: float, level: float, records: int, advantage: Advantage | None) -> bool:
    """Whether records that need nothing have labels less likely than unseen ones', by three standard errors.

    Of the advantage, or of a share of ``level`` among the records.
    """
    if advantage is not None:
        return advantage.signed < -3 * advantage.chance
    return value < level - 3 * math.sqrt(level * (1 - level) / records)


def _share_below(known: Tensor, odds: Tensor) -> Tensor:
    """Of the known values, ties half."""
    below = torch.searchsorted(known, odds) + torch.searchsorted(known, odds, right=True)
    return below.to(odds) / (2 * len(known))
