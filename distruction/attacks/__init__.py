"""Attacks on an unlearned model: what of the forgotten a person with the model and some data can bring back.

Definitions and traps are in docs/metrics.md; shares and accuracies are in percent. Every attack is determined by its
seed and leaves the model as it was. Compare its number with the one of a retrained model, never with 0.
"""

from .attacker import DRAWS
from .hidden import linear_probe, nearest_prototype, prototype
from .membership import class_membership, lira, loss_membership
from .tuning import few_shot, relearn
from .usual import COLUMNS, battery
from .weights import ROUNDINGS, barrier, distance, rounded, rounding

__all__ = [
    "COLUMNS",
    "DRAWS",
    "ROUNDINGS",
    "barrier",
    "battery",
    "class_membership",
    "distance",
    "few_shot",
    "linear_probe",
    "lira",
    "loss_membership",
    "nearest_prototype",
    "prototype",
    "relearn",
    "rounded",
    "rounding",
]
