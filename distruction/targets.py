"""What a request is to reach, in a user's words: ``gone``, ``unseen``, ``corrected``.

``gone``: whole classes go; no image is taken for one of them. ``corrected``: records with wrong labels; the given label
goes, and the model's next guess may come. ``unseen``: records whose classes live on are to look as if the model had
never seen them. With the log-odds o = log p / (1 - p) of an example's own label,

    t(o) = Q(F(o)),    F: distribution of o over the class's records before forgetting, Q: quantiles of unseen examples

moves the distribution of the records onto that of unseen examples, rank by rank, with the least change of any record
(the optimal transport of one dimension; Villani, "Topics in Optimal Transportation", 2003, section 2.2). Each record is
taught its label with log-odds min(o, t(o)) and the other classes in the proportions that the model had; the run ends
where an attacker who sees the log-odds could not tell the records from unseen ones, and does not begin where that is
within chance. Unseen ones the model will be a little less sure of as well, by a share that a rehearsal finds
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
from .objectives import DEFAULT, divergence, others
from .sharding import reshard
from .strength import ForgetSet, Probability, batches_of

TARGETS = ("gone", "unseen", "corrected")
QUANTILES = 33
"""Numbers kept of each class's unseen examples."""
FEWEST = 10
"""Examples that a class needs for quantiles of its own; the others go by all classes together."""
CORRECTED = 0.05
"""Mean probability of the given labels at which records count as corrected."""
ADVANTAGE = 0.06
"""Twice the area under the attacker's curve, less 1, at which records count as unseen."""
BEND = 0.5
"""Log-odds up to which a difference counts by its square."""
HELD_OUT = Role("prepare", "the held-out set", "loss_fn", whole=True)


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """log p / (1 - p) of each label's probability p, float64, (N,): finite and close to normal where p itself is 1.

    The confidence that LiRA models (Carlini et al. 2022, arXiv 2112.03570, section V).
    """
    logits = logits.double()
    own = F.one_hot(labels, logits.shape[-1]).bool()
    return logits[own] - logits.masked_fill(own, -math.inf).logsumexp(dim=-1)


def of_target(
    target: str, request: str, level: float | None, objective: object
) -> tuple[Literal["class", "records"], float | None]:
    """The request and the level that a target stands for.

    Raises:
        UsageError: there is no such target, or another argument says otherwise.
    """
    if target not in TARGETS:
        raise UsageError(f"target must be {', '.join(TARGETS)} or None, not {target!r}")
    kind: Literal["class", "records"] = "class" if target == "gone" else "records"
    if request not in ("auto", kind):
        raise UsageError(f"target={target!r} is a request for {kind}, not for {request}: leave out request")
    if target == "unseen" and not (level is None and objective == DEFAULT):
        raise UsageError("target='unseen' has an objective and a level of its own: leave out objective and level")
    return kind, {"gone": level, "unseen": ADVANTAGE, "corrected": CORRECTED if level is None else level}[target]


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


class Unseen:
    """What each record's log-odds lack to those of an unseen example of its rank; the other classes' proportions stay.

    The mean over the batch of

        h(o - s) + KL(others before || others),   s = min(o before, t(o before) + d r / (1 - d))

    h being Huber's function, divided by its bend: |o - s| beyond `BEND`. An attacker looks at log-odds, of which the KL
    between predictions sees nothing where both are sure. d is the drift of unseen examples and r the median of
    s - (o before) without it: where they fall by d per unit, records that fall by r / (1 - d) end where these do.

    Args:
        teacher: inputs -> logits of the model before.
        data: of the forget set.
        held_out: what is known of unseen examples.
        odds: of the examples of ``data``, before: see `odds_of`.
        forgotten: labels of earlier requests, which are left out of what is taught.
    """

    needs_inputs = True

    def __init__(
        self,
        teacher: Callable[[Inputs], Tensor],
        data: ForgetSet,
        held_out: HeldOut,
        odds: Tensor,
        forgotten: "list[int] | tuple[int, ...]" = (),
    ) -> None:
        self.teacher, self._held_out, self._forgotten = teacher, held_out, tuple(forgotten)
        self._known = {c: odds[data.targets == c].sort().values for c in held_out.by_label}
        self._further = 0.0
        moved = (self.taught(odds, data.targets) - odds).quantile(0.5).item()
        self._further = held_out.drift / (1 - held_out.drift) * moved

    def taught(self, odds: Tensor, targets: Tensor) -> Tensor:
        """s of each record's log-odds before, float64."""
        moved = odds.clone()
        for c, known in self._known.items():
            rows = targets == c
            if not rows.any() or not len(known):
                continue
            own = odds[rows]
            unseen = _interpolated(self._held_out.by_label[c], _ranks(known, own))
            moved[rows] = torch.minimum(own, unseen + self._further)
        return moved

    def __call__(self, logits: Tensor, targets: Tensor, inputs: Inputs) -> Tensor:
        """The loss of a batch."""
        left = others(logits, targets, self._forgotten)
        with torch.no_grad():
            before = self.teacher(inputs).double()
            wanted = self.taught(log_odds(before, targets), targets)
            rest = F.log_softmax(before.masked_fill(~left, -torch.inf), dim=-1).to(logits.dtype)
        own = F.one_hot(targets, logits.shape[-1]).bool()
        missing = F.smooth_l1_loss(log_odds(logits, targets), wanted, beta=BEND).to(logits.dtype)
        return missing + divergence(logits.masked_fill(own, torch.finfo(logits.dtype).min / 2), rest)


class Advantage(Probability):
    """How much better than chance an attacker tells records from unseen examples by the log-odds.

    2 AUC - 1, AUC being the share of pairs in which the record has the larger log-odds, ties half: among examples of
    its class, the mean over the records, or among all, whichever is larger. It is the largest advantage of a threshold
    where the two curves differ by a shift. The unseen examples' log-odds are the kept ones, moved by their drift.

    Args:
        model, data: see `Probability`.
        held_out: what is known of unseen examples.
        before: log-odds of the examples of ``data``, before: see `odds_of`.
    """

    def __init__(self, model: nn.Module, data: ForgetSet, held_out: HeldOut, before: Tensor) -> None:
        super().__init__(model, data, None)
        self._held_out, self._before = held_out, before

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
        return max(2 * auc - 1, 1e-6)


def _share_below(known: Tensor, odds: Tensor) -> Tensor:
    """Of the known values, ties half."""
    below = torch.searchsorted(known, odds) + torch.searchsorted(known, odds, right=True)
    return below.to(odds) / (2 * len(known))


def _ranks(known: Tensor, values: Tensor) -> Tensor:
    """Shares (i + 1/2) / n of the known values, linear between them: what rounding moves a little keeps its rank."""
    n = len(known)
    high = torch.searchsorted(known, values).clamp(1, max(n - 1, 1))
    low, high_value = known[high - 1], known[high.clamp(max=n - 1)]
    part = ((values - low) / (high_value - low).clamp(min=1e-12)).clamp(0, 1)
    return (high - 1 + part + 0.5) / n


def _interpolated(quantiles: Tensor, shares: Tensor) -> Tensor:
    """Values at these shares, linear between the quantiles' own shares (i + 1/2) / n and constant outside."""
    n = len(quantiles)
    at = (shares * n - 0.5).clamp(0, n - 1)
    low = at.floor().long()
    high = (low + 1).clamp(max=n - 1)
    return quantiles[low].lerp(quantiles[high], at - low)
