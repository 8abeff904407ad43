"""What a request is to reach, in a user's words: ``gone``, ``unseen``, ``corrected``.

``gone``: whole classes go; no image is taken for one of them. ``corrected``: records with wrong labels; the given label
goes, and the model's next guess may come. ``unseen``: records whose classes live on are to look as if the model had
never seen them. With the log-odds o = log p / (1 - p) of an example's own label,

    t(o) = Q(F(o)),    F: distribution of o over the class's records before forgetting, Q: quantiles of unseen examples

moves the distribution of the records onto that of unseen examples, rank by rank, with the least change of any record
(the optimal transport of one dimension; Villani, "Topics in Optimal Transportation", 2003, section 2.2). Each record is
taught its label with log-odds min(o, t(o)) and the other classes in the proportions that the model had; the run ends
where an attacker who sees the log-odds could not tell the records from unseen ones.
"""

import math
from collections.abc import Callable, Mapping
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


def quantiles_of(metadata: Mapping[str, Any], labels: Mapping[int, int], device: torch.device) -> dict[int, Tensor]:
    """The quantiles for each of these labels.

    Raises:
        UsageError: the posterior was prepared without held-out examples.
    """
    if "held_out" not in metadata:
        raise UsageError(
            "target='unseen' goes by examples that the model was not trained on, and the posterior was prepared "
            "without: prepare(..., held_out=loader) keeps a few numbers of theirs"
        )
    kept = metadata["held_out"]["log_odds"]
    return {
        c: torch.tensor(kept.get(str(c), kept["all"]), dtype=torch.float64, device=device).sort().values for c in labels
    }


def by_unseen(kind: str, data: ForgetSet, metadata: Mapping[str, Any], target: str | None, level: float | None) -> bool:
    """Whether a request without a target ends where the records look unseen: where p knows how unseen ones look."""
    of_labels = data.targets.ndim == 1 and bool(data.counts)
    return kind == "records" and of_labels and target is None and level is None and "held_out" in metadata


class Unseen:
    """KL from the model's own prediction, with each record's log-odds moved to those of an unseen example of its rank.

    Args:
        teacher: inputs -> logits of the model before.
        data: of the forget set.
        quantiles: of unseen examples' log-odds by label, ascending.
        forgotten: labels of earlier requests, which are left out of what is taught.
    """

    needs_inputs = True

    def __init__(
        self,
        teacher: Callable[[Inputs], Tensor],
        data: ForgetSet,
        quantiles: Mapping[int, Tensor],
        forgotten: "list[int] | tuple[int, ...]" = (),
    ) -> None:
        self.teacher, self._quantiles, self._forgotten = teacher, quantiles, tuple(forgotten)
        with torch.no_grad():
            odds = torch.cat([log_odds(teacher(x), y) for x, y in batches_of(data)])
        self._known = {c: odds[data.targets == c].sort().values for c in quantiles}

    def taught(self, odds: Tensor, targets: Tensor) -> Tensor:
        """min(o, t(o)) of each record's log-odds before, float64."""
        moved = odds.clone()
        for c, known in self._known.items():
            rows = targets == c
            if not rows.any() or not len(known):
                continue
            own = odds[rows]
            moved[rows] = torch.minimum(own, _interpolated(self._quantiles[c], _ranks(known, own)))
        return moved

    def __call__(self, logits: Tensor, targets: Tensor, inputs: Inputs) -> Tensor:
        """The loss of a batch."""
        left = others(logits, targets, self._forgotten)
        with torch.no_grad():
            before = self.teacher(inputs).double()
            odds = self.taught(log_odds(before, targets), targets)
            # log p of the label, and of the others in their old proportions.
            rest = F.log_softmax(before.masked_fill(~left, -torch.inf), dim=-1) + F.logsigmoid(-odds)[:, None]
            taught = rest.scatter(-1, targets[:, None], F.logsigmoid(odds)[:, None]).to(logits.dtype)
        return divergence(logits, taught)


class Advantage(Probability):
    """How much better than chance an attacker tells records from unseen examples of their class by the log-odds.

    2 AUC - 1, AUC being the share of pairs in which the record has the larger log-odds, ties half; the mean over the
    records. It is the largest advantage of a threshold where the two curves differ by a shift.
    """

    def __init__(self, model: nn.Module, data: ForgetSet, quantiles: Mapping[int, Tensor]) -> None:
        super().__init__(model, data, None)
        self._quantiles = quantiles

    def _value(self, logits: Tensor) -> float:
        odds = log_odds(logits, self._data.targets)
        shares = torch.zeros_like(odds)
        for c, known in self._quantiles.items():
            rows = self._data.targets == c
            below = torch.searchsorted(known, odds[rows]), torch.searchsorted(known, odds[rows], right=True)
            shares[rows] = (below[0] + below[1]).to(odds) / (2 * len(known))
        return max(2 * shares.mean().item() - 1, 1e-6)


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
