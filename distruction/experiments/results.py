"""Finished cells, and their summaries over seeds, each the mean over its forgotten classes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import attacks, metrics
from ..extras import needed
from ..methods import REGISTRY
from . import published
from .jobs import Job
from .store import Store

with needed("experiments"):
    from scipy.stats import t as student_t


@dataclass(frozen=True)
class Column:
    """A metric of the tables.

    Attributes:
        heading: short, for table heads.
        meaning: one line.
        better: ``high``, ``low``, or ``retrain`` where the value of retraining is the ideal.
        group: the table that it stands in.
        digits: after the decimal point.
    """

    heading: str
    meaning: str
    better: str
    group: str
    digits: int = 1


_OWN = {
    "retain": Column("D_r %", "accuracy on the retained test set", "high", "accuracy"),
    "forget": Column("D_f %", "accuracy on the forgotten set that the scenario measures", "retrain", "accuracy"),
    "forget_train": Column("D_f train %", "accuracy on the forgotten training examples", "retrain", "accuracy"),
    "retain_batch_mean": Column("D_r % by batch", "D_r as published: mean of batch accuracies", "high", "published"),
    "forget_batch_mean": Column("D_f % by batch", "D_f as published: mean of batch accuracies", "retrain", "published"),
    "mia_entropy": Column("MIA %", "entropy attack: forgotten examples called members", "retrain", "accuracy"),
    "mia_loss": Column("loss MIA %", "loss attack: forgotten examples called members", "retrain", "accuracy"),
    "auc_loss": Column("loss AUC %", "loss attack: forgotten against held-out; 50 is blind", "retrain", "accuracy"),
    "auc_lira": Column("LiRA AUC %", "the same of the likelihood-ratio attack", "retrain", "accuracy"),
    "tpr_lira": Column("LiRA TPR %", "forgotten examples found at 1 % false positives", "retrain", "accuracy"),
    "js_forget": Column("JS on D_f", "Jensen-Shannon divergence to retraining, forget set, bits", "low", "distance", 3),
    "js_retain": Column("JS on D_r", "the same on the measured retain set", "low", "distance", 3),
    "logits_forget": Column("logits on D_f", "distance of centred logits to retraining's", "low", "distance", 2),
    "logits_retain": Column("logits on D_r", "the same on the measured retain set", "low", "distance", 2),
    "zrf": Column("ZRF", "1 − JS to an untrained model on the forget set", "retrain", "distance", 3),
    "relearn_steps": Column("relearn steps", "of training on the forget set until it is back", "retrain", "distance"),
    "kl": Column("KL", "KL(q ‖ p) in nats", "low", "distance"),
    "seconds": Column("seconds", "wall time of the unlearning alone", "low", "cost"),
    "peak_memory_mib": Column("MiB", "most memory held beyond what was held before", "low", "cost", 0),
    "retain_reads": Column("retain reads", "retain examples read, repetitions included", "low", "cost", 0),
    "retain_read_percent": Column("retain %", "share of the retain set read at least once", "low", "cost", 0),
}

_ATTACKS = {
    "prototype_5": "share of the class's test images nearest to the mean of 5 examples",
    "prototype_50": "the same of 50",
    "few_shot_20": "accuracy after 20 steps on 5 examples",
    "few_shot_100": "the same after 100",
    "relearn_100": "accuracy after 100 steps on retained examples",
    "linear_probe": "accuracy of a new classifier on the features, by all examples",
    "auc_class": "the class told from its neighbours by what is said of others",
    "bf16": "accuracy with the weights rounded so",
    "int8": "the same",
    "int4": "the same",
    "distance": "of the weights to the original's",
    "barrier": "rise of the retained loss on the line to the original",
}

COLUMNS = (
    _OWN
    | {name: Column(attacks.COLUMNS[name], text, "retrain", "attacks") for name, text in _ATTACKS.items()}
    | {name: Column(e.heading, e.meaning, e.better, e.group, e.digits) for name, e in metrics.REGISTRY.items()}
)
"""The library's own metrics, then those of other packages."""

GROUPS = {
    "accuracy": "Accuracy and membership inference",
    "distance": "Distance to retraining, and what is left to relearn",
    "attacks": "What attacks bring back",
    "cost": "Cost",
}
"""Tables of metrics by name, with their titles."""


@dataclass(frozen=True)
class Cell:
    """One finished cell.

    Attributes:
        scenario, target, method, seed: its place in the grid.
        settings: of the method.
        brief: whether it belongs to the trade-off curves only.
        numbers: metrics and costs by name.
        value: everything that was stored.
        facts: everything that determines it.
    """

    scenario: str
    target: str
    method: str
    seed: int
    settings: Mapping[str, Any]
    brief: bool
    numbers: Mapping[str, float]
    value: Mapping[str, Any]
    facts: Mapping[str, Any]

    @property
    def place(self) -> tuple[str, str, int]:
        """Scenario, target and seed: what cells of different methods must share to be compared."""
        return self.scenario, self.target, self.seed

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Wilson's 95 % intervals of the accuracies, in percent."""
        counts = self.value["counts"]
        return {metric: metrics.wilson_interval(self.numbers[metric], n) for metric, n in counts.items() if n}


def collect(jobs: Sequence[Job], store: Store) -> list[Cell]:
    """The cells among ``jobs`` that are finished."""
    found = []
    for job in jobs:
        value = store.load("cell", job.facts)
        if value is None:
            continue
        numbers = {k: v for k, v in {**value["metrics"], **value["cost"]}.items() if v is not None}
        facts = job.facts
        found.append(
            Cell(
                facts["split"]["scenario"],
                facts["split"]["target"],
                facts["method"],
                facts["model"]["seed"],
                facts["settings"],
                facts["measure"]["brief"],
                numbers,
                value,
                facts,
            )
        )
    return found


def described(found: Sequence[Cell]) -> list[dict[str, Any]]:
    """The cells' places and numbers, as they are written to a report's JSON."""
    return [
        {
            "scenario": c.scenario,
            "target": c.target,
            "method": c.method,
            "seed": c.seed,
            "settings": dict(c.settings),
            "brief": c.brief,
            **c.numbers,
            "wilson_95": c.intervals,
        }
        for c in found
    ]


SHOWN = 3
"""Up to so many seeds their values are shown: an interval of Student's t on two degrees of freedom says little."""


@dataclass(frozen=True)
class Summary:
    """Over ``n`` seeds; the cells of one seed share a trained model, so that they count as their mean.

    Attributes:
        mean: over the seeds.
        std: standard deviation over the seeds (n - 1); NaN for one.
        low, high: 95 % interval: Student's of the mean; of a single accuracy Wilson's; else NaN.
        n: seeds.
        gap: mean absolute difference to the retrained model of the same seed and forget set; NaN where it does not
            apply.
        values: the seeds' means, in the order of the seeds; empty where only their summary is known.
    """

    mean: float
    std: float
    low: float
    high: float
    n: int
    gap: float = math.nan
    values: tuple[float, ...] = ()


def summarise(
    values: Sequence[float], seeds: Sequence[int], references: Sequence[float] = (), count: int = 0
) -> Summary:
    """The summary of cells' values.

    Args:
        seeds: of the cells.
        references: the retrained models' values, or none.
        count: examples behind each value, where it is an accuracy in percent.
    """
    by_seed: dict[int, list[float]] = {}
    for value, seed in sorted(zip(values, seeds, strict=True), key=lambda pair: pair[1]):
        by_seed.setdefault(seed, []).append(value)
    means = [float(np.mean(mine)) for mine in by_seed.values()]
    n, mean = len(means), float(np.mean(means))
    std = low = high = math.nan
    if n > 1:
        std = float(np.std(means, ddof=1))
        half = float(student_t.ppf(0.975, n - 1)) * std / math.sqrt(n)
        low, high = mean - half, mean + half
    elif count and len(values) == 1:
        low, high = metrics.wilson_interval(mean, count)
    gap = float(np.mean(np.abs(np.subtract(values, references)))) if len(references) == len(values) else math.nan
    return Summary(mean, std, low, high, n, gap, tuple(means))


Table = dict[str, dict[str, Summary]]
"""Method to metric to summary."""


def tables(cells: Sequence[Cell]) -> dict[str, Table]:
    """Scenario to its table, in the order of the registry."""
    full = [c for c in cells if not c.brief]
    retrained = {c.place: c.numbers for c in full if c.method == "retrain" and not c.settings.get("ssd_compat")}
    out: dict[str, Table] = {}
    for scenario in dict.fromkeys(c.scenario for c in full):
        out[scenario] = {}
        for method in REGISTRY:
            mine = [c for c in full if c.scenario == scenario and c.method == method]
            if not mine:
                continue
            row = {}
            for metric, column in COLUMNS.items():
                having = [c for c in mine if metric in c.numbers]
                # Random examples are measured on themselves: D_f is D_f train.
                if not having or (scenario == "random" and metric == "forget_train"):
                    continue
                gaps = column.better in ("high", "retrain") and all(c.place in retrained for c in having)
                references = [retrained[c.place][metric] for c in having] if gaps else []
                count = having[0].value["counts"].get(metric, 0)
                row[metric] = summarise(
                    [c.numbers[metric] for c in having], [c.seed for c in having], references, count
                )
            out[scenario][method] = row
    return out


def best(table: Table, metric: str, *, by_gap: bool = False) -> set[str]:
    """The methods with the best mean of a metric, as the tables print it: baseline and retrain do not compete.

    Args:
        by_gap: the nearest to retraining are the best, whatever the metric.
    """
    column = COLUMNS[metric]
    scores = {}
    for method, row in table.items():
        if method in ("baseline", "retrain") or metric not in row:
            continue
        summary = row[metric]
        direction = "retrain" if by_gap else column.better
        score = {"high": -summary.mean, "low": summary.mean, "retrain": summary.gap}[direction]
        if not math.isnan(score):
            scores[method] = round(score, column.digits)
    return {m for m, s in scores.items() if s == min(scores.values())}


@dataclass(frozen=True)
class Contest:
    """DiStruction against the best method that reads retain data, among those that forget.

    Attributes:
        rival: that method; ``None`` where none forgets.
        forgets: whether DiStruction itself does.
        difference: D_r of DiStruction less the rival's, paired by seed and forget set; ``None`` without a rival.
    """

    rival: str | None
    forgets: bool
    difference: Summary | None


def contest(cells: Sequence[Cell], table: Table, limit: float = 5.0) -> Contest | None:
    """The contest of a scenario; a method forgets if its mean D_f is at most ``limit`` %.

    ``None`` where DiStruction was not run.
    """
    if "distruction" not in table:
        return None
    forgets = {m for m, row in table.items() if row["forget"].mean <= limit}
    rivals = [m for m in forgets if REGISTRY[m].reads != "none" and m != "retrain"]
    if not rivals:
        return Contest(None, "distruction" in forgets, None)
    rival = max(rivals, key=lambda m: (table[m]["retain"].mean, m))
    ours, theirs = (
        {c.place: c.numbers["retain"] for c in cells if c.method == m and not c.brief} for m in ("distruction", rival)
    )
    pairs = [(ours[place] - theirs[place], place[-1]) for place in ours if place in theirs]
    difference = summarise([d for d, _ in pairs], [seed for _, seed in pairs]) if pairs else None
    return Contest(rival, "distruction" in forgets, difference)


def published_value(scenario: str, metric: str, method: str) -> published.Value | None:
    """The paper's number, or ``None``."""
    return published.TABLES.get(scenario, {}).get(metric, {}).get(method)
