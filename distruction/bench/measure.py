"""What is measured of one cell."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Images, loader
from ..forget import ForgetReport
from ..metrics import accuracy, entropy_mia, predict
from ..scenarios import Split

EXAMPLES = 8
"""Images of each kind whose predictions are kept for the report."""


def measure(
    model: nn.Module,
    before: nn.Module,
    retrained: nn.Module,
    split: Split,
    facts: Mapping[str, Any],
    report: ForgetReport | None,
) -> dict[str, Any]:
    """Metrics, and what the report's pictures need.

    Args:
        model: after unlearning.
        before: as it was trained.
        retrained: the gold standard.
        facts: of the cell; ``facts["measure"]`` has the options.
        report: of methods that keep one.

    Returns:
        ``metrics`` (name to number); ``confusion`` (how often each class is predicted on the measured forget set);
        ``examples`` (positions in the measured sets with predictions before and after); ``history`` (KL by step).
    """
    options = facts["measure"]

    def logits_of(network: nn.Module, data: Images) -> Tensor:
        return predict(network, loader(data, batch_size=options["batch_size"]))[0]

    forget, retain = logits_of(model, split.measured_forget), logits_of(model, split.measured_retain)
    metrics = {
        "retain": accuracy(retain, split.measured_retain.labels),
        "forget": accuracy(forget, split.measured_forget.labels),
    }
    value: dict[str, Any] = {"metrics": metrics}
    if report is not None:
        metrics["kl"] = report.history[-1].kl
        value["history"] = {
            "kl": [s.kl for s in report.history],
            "accuracy": [s.accuracy for s in report.history],
        }
    if options["brief"]:
        return value
    forget_train = logits_of(model, split.forget)
    retain_train, test = logits_of(model, split.retain), logits_of(model, split.test)
    metrics["forget_train"] = accuracy(forget_train, split.forget.labels)
    metrics["mia_entropy"] = entropy_mia(retain_train, test, forget_train)
    classes = len(split.test.classes)
    value["confusion"] = torch.bincount(forget.argmax(dim=-1), minlength=classes).tolist()
    value["examples"] = {
        name: {
            "before": logits_of(before, data.subset(torch.arange(min(EXAMPLES, len(data))))).argmax(dim=-1).tolist(),
            "after": after[:EXAMPLES].argmax(dim=-1).tolist(),
        }
        for name, data, after in (
            ("forget", split.measured_forget, forget),
            ("retain", split.measured_retain, retain),
        )
    }
    return value
