"""Retraining without the forget set: the gold standard that unlearning is compared with."""

import copy

from torch import nn

from ..errors import UsageError
from .base import Method, Task


def retrain(task: Task, *, ssd_compat: bool = False) -> None:
    """Train a fresh model on the retain set by the recipe that trained the model.

    Args:
        ssd_compat: as the public code of SSD has it for the ViT: only the head starts anew, on a backbone that has
            seen the forget set. For the reproduction of published tables; no gold standard.
    """
    model = _with_new_head(task.model, task.fresh()) if ssd_compat else task.fresh()
    task.train(model, task.retain)
    task.model.load_state_dict(model.state_dict())


def _with_new_head(trained: nn.Module, fresh: nn.Module) -> nn.Module:
    for model in (trained, fresh):
        if not callable(getattr(model, "get_classifier", None)):
            raise UsageError("ssd_compat needs a model with get_classifier(), as timm's have")
    model = copy.deepcopy(trained)
    model.get_classifier().load_state_dict(fresh.get_classifier().state_dict())  # type: ignore[operator]  # checked above
    return model


METHOD = Method("train anew on the retain set", "-", retrain, reads="all")
