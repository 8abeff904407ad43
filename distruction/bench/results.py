"""Finished cells, and their summaries over seeds and forgotten classes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from ..methods import REGISTRY
from . import published
from .jobs import Job
from .store import Store


@dataclass(frozen=True)
class Column:
    """A metric of the tables.

    Attributes:
        heading: short, for table heads.
        meaning: one line.
        better: ``high``, ``low``, or ``retrain`` where the value of retraining is the ideal.
        digits: after the decimal point.
    """

    heading: str
    meaning: str
    better: str
    digits: int = 1


COLUMNS: dict[str, Column] = {
    "retain": Column("D_r %", "accuracy on the retained test set", "high"),
    "retain_batch_mean": Column("D_r batch %", "the same as published: unweighted mean over batches", "high"),
    "forget": Column("D_f %", "accuracy on the forgotten set that the scenario measures", "retrain"),
    "forget_batch_mean": Column("D_f batch %", "the same as published: unweighted mean over batches", "retrain"),
    "forget_train": Column("D_f train %", "accuracy on the forgotten training examples", "retrain"),
    "mia_entropy": Column("MIA %", "entropy attack as published: forgotten examples called members", "retrain"),
    "mia_loss": Column("loss MIA %", "loss-threshold attack: forgotten examples called members", "retrain"),
    "auc_loss": Column("loss AUC %", "loss attack: forgotten against held-out examples; 50 is blind", "retrain"),
    "auc_lira": Column("LiRA AUC %", "the same of the likelihood-ratio attack", "retrain"),
    "tpr_lira": Column("LiRA TPR %", "forgotten examples that this attack finds at 1 % false positives", "retrain"),
    "js_forget": Column("JS D_f", "Jensen-Shannon divergence to retraining on the forget set, bits", "low", 3),
    "js_retain": Column("JS D_r", "the same on the measured retain set", "low", 3),
    "logits_forget": Column("logits D_f", "distance of the centred logits to retraining's on the forget set", "low", 2),
    "logits_retain": Column("logits D_r", "the same on the measured retain set", "low", 2),
    "zrf": Column("ZRF", "1 - JS to an untrained model on the forget set", "retrain", 3),
    "relearn_steps": Column("relearn", "steps of training on the forget set until its accuracy is back", "retrain"),
    "kl": Column("KL", "KL(q || p) in nats", "low"),
    "seconds": Column("s", "wall seconds of the unlearning alone", "low"),
    "peak_memory_mib": Column("MiB", "most memory held beyond what was held before", "low", 0),
    "retain_reads": Column("retain reads", "retain examples read, repetitions included", "low", 0),
    "retain_read_percent": Column("retain %", "share of the retain set that was read at least once", "low", 0),
}


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


@dataclass(frozen=True)
class Summary:
    """Mean, standard deviation (n - 1) and Student's 95 % interval of the mean over ``n`` cells.

    ``gap`` is the mean absolute difference to the retrained model of the same seed and forget set; NaN where it does
    not apply.
    """

    mean: float
    std: float
    half_width: float
    n: int
    gap: float


def summarise(values: Sequence[float], references: Sequence[float]) -> Summary:
    """The summary of cells' values; ``references`` are the retrained models' values, or empty."""
    n = len(values)
    std = float(np.std(values, ddof=1)) if n > 1 else math.nan
    half = float(student_t.ppf(0.975, n - 1)) * std / math.sqrt(n) if n > 1 else math.nan
    gap = float(np.mean(np.abs(np.subtract(values, references)))) if len(references) == n else math.nan
    return Summary(float(np.mean(values)), std, half, n, gap)


Table = dict[str, dict[str, Summary]]
"""Method to metric to summary."""


def tables(cells: Sequence[Cell]) -> dict[str, Table]:
    """Scenario to its table, in the order of the registry."""
    full = [c for c in cells if not c.brief]
    retrained = {(c.scenario, c.target, c.seed): c.numbers for c in full if c.method == "retrain"}
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
                if not having:
                    continue
                keys = [(c.scenario, c.target, c.seed) for c in having]
                gaps = column.better in ("high", "retrain") and all(k in retrained for k in keys)
                references = [retrained[k][metric] for k in keys] if gaps else []
                row[metric] = summarise([c.numbers[metric] for c in having], references)
            out[scenario][method] = row
    return out


def best(table: Table, metric: str) -> set[str]:
    """The methods with the best mean of a metric, as the tables print it: baseline and retrain do not compete."""
    column = COLUMNS[metric]
    scores = {}
    for method, row in table.items():
        if method in ("baseline", "retrain") or metric not in row:
            continue
        summary = row[metric]
        score = {"high": -summary.mean, "low": summary.mean, "retrain": summary.gap}[column.better]
        if not math.isnan(score):
            scores[method] = round(score, column.digits)
    return {m for m, s in scores.items() if s == min(scores.values())}


def published_value(scenario: str, metric: str, method: str) -> published.Value | None:
    """The paper's number, or ``None``."""
    return published.TABLES.get(scenario, {}).get(metric, {}).get(method)
