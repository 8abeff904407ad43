"""All attacks with their usual settings."""

from collections.abc import Sequence

from torch import nn

from .. import metrics
from ..data import Examples, loader
from .attacker import DRAWS
from .hidden import linear_probe, prototype
from .membership import class_membership, lira, loss_membership
from .tuning import few_shot, relearn
from .weights import ROUNDINGS, barrier, distance, rounding

COLUMNS = {
    "retain": "D_r",
    "forget": "D_f",
    "prototype_5": "prototype, 5",
    "prototype_50": "prototype, 50",
    "few_shot_20": "few shots, 20 steps",
    "few_shot_100": "few shots, 100 steps",
    "relearn_100": "relearning, 100 steps",
    "linear_probe": "linear probe",
    "auc_loss": "loss AUC",
    "auc_lira": "LiRA AUC",
    "auc_class": "class AUC",
    "bf16": "bf16",
    "int8": "int8",
    "int4": "int4",
    "distance": "L2 distance",
    "barrier": "barrier, nats",
}
"""What `battery` finds, and what it is called in tables."""


def battery(
    model: nn.Module,
    train: tuple[Examples, Examples],
    test: tuple[Examples, Examples],
    *,
    original: nn.Module | None = None,
    out_models: Sequence[nn.Module] = (),
    draws: int = DRAWS,
    seed: int = 0,
    classifier: str | None = None,
) -> dict[str, float]:
    """All attacks with their usual settings, by the names of `COLUMNS`.

    Args:
        train, test: the forgotten and the retained part of each.
        original: the model before it forgot, for the distance and the barrier on the retained training examples.
        out_models: models that never saw the forget set, for LiRA.
        draws: of the few examples.
    """
    (forget, retain), (probe, others) = train, test
    found = {
        "retain": metrics.accuracy(*metrics.predict(model, loader(others, batch_size=512))),
        "forget": metrics.accuracy(*metrics.predict(model, loader(probe, batch_size=512))),
    }
    for shots in (5, 50):
        found[f"prototype_{shots}"] = prototype(
            model, forget, retain, probe, shots=shots, draws=draws, seed=seed, classifier=classifier
        )
    for steps in (20, 100):
        found[f"few_shot_{steps}"] = few_shot(model, forget, probe, steps=steps, draws=draws, seed=seed)
    found["relearn_100"] = relearn(model, retain, probe, seed=seed)
    found["linear_probe"] = linear_probe(model, forget, retain, probe, classifier=classifier)
    found["auc_loss"] = loss_membership(model, forget, probe)
    if out_models:
        found["auc_lira"] = lira(model, forget, probe, out_models)
    found["auc_class"] = class_membership(model, forget, retain, probe, others)
    for how in ROUNDINGS:
        found[how] = rounding(model, probe, how)
    if original is not None:
        found["distance"] = distance(model, original)
        found["barrier"] = barrier(model, original, retain)
    return found
