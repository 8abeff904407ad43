"""What is measured of one cell."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import attacks, metrics
from ..data import Images, loader
from ..errors import UsageError
from ..forget_report import ForgetReport
from ..scenarios import Split
from ..seeds import seed_of
from . import published

EXAMPLES = 8
"""Images of each kind whose predictions are kept for the report."""

PROBE = 256
"""Most forget examples whose accuracy decides whether they are relearnt."""


@dataclass(frozen=True)
class References:
    """What an unlearned model is compared with.

    Attributes:
        before: the model as it was trained.
        retrained: the gold standard.
        incompetent: a model as it is before training, which no method has seen.
        shadows: of each shadow model its logits on ``train`` and ``test``, and the ``member`` mask of its training
            examples; in pairs whose masks are complementary.
    """

    before: nn.Module
    retrained: nn.Module
    incompetent: nn.Module
    shadows: Sequence[Mapping[str, Tensor]]


def measure(
    model: nn.Module, references: References, split: Split, facts: Mapping[str, Any], report: ForgetReport | None
) -> dict[str, Any]:
    """Metrics, and what the report's pictures need.

    Args:
        model: after unlearning.
        facts: of the cell; ``facts["measure"]`` has the options.
        report: of methods that keep one.

    Returns:
        ``metrics`` (name to number); ``counts`` (examples behind each accuracy); ``confusion`` (how often each class
        is predicted on the measured forget set); ``examples`` (positions in the measured sets with predictions before
        and after); ``history`` (KL by step).
    """
    options = facts["measure"]
    random = facts["split"]["scenario"] == "random"

    def logits_of(network: nn.Module, data: Images) -> Tensor:
        return metrics.predict(network, loader(data, batch_size=options["batch_size"]))[0]

    test = logits_of(model, split.test)
    forget_train = logits_of(model, split.forget) if random or not options["brief"] else None
    # The measured sets are parts of these two: see `scenarios`.
    forget = forget_train if random else test[split.held_out]
    retain = test if random else test[~split.held_out]
    assert forget is not None
    forget_labels, retain_labels = split.measured_forget.labels, split.measured_retain.labels
    found = {"retain": metrics.accuracy(retain, retain_labels), "forget": metrics.accuracy(forget, forget_labels)}
    value: dict[str, Any] = {"metrics": found, "counts": {"retain": len(retain), "forget": len(forget)}}
    if report is not None:
        found["kl"] = report.kl
        value["history"] = {
            "kl": [s.kl for s in report.history],
            "accuracy": [s.accuracy for s in report.history],
        }
    if options["brief"]:
        return value
    assert forget_train is not None
    batch = published.BATCH_SIZE[facts["split"]["scenario"]]
    found["retain_batch_mean"] = metrics.batch_mean_accuracy(retain, retain_labels, batch)
    found["forget_batch_mean"] = metrics.batch_mean_accuracy(forget, forget_labels, batch)
    found["forget_train"] = metrics.accuracy(forget_train, split.forget.labels)
    value["counts"]["forget_train"] = len(forget_train)
    retain_train = logits_of(model, split.retain)
    found |= _attacks(retain_train, test, forget_train, references.shadows, split)

    expected_forget = logits_of(references.retrained, split.forget)
    expected_retain = logits_of(references.retrained, split.measured_retain)
    found["js_forget"] = metrics.jensen_shannon(forget_train, expected_forget).mean().item()
    found["js_retain"] = metrics.jensen_shannon(retain, expected_retain).mean().item()
    found["logits_forget"] = metrics.logit_distance(forget_train, expected_forget).mean().item()
    found["logits_retain"] = metrics.logit_distance(retain, expected_retain).mean().item()
    found["zrf"] = metrics.zero_retrain_forgetting(forget_train, logits_of(references.incompetent, split.forget))
    probe = split.forget.subset(torch.arange(min(PROBE, len(split.forget))))
    found["relearn_steps"] = metrics.relearn_steps(
        copy.deepcopy(model),
        split.forget,
        metrics.accuracy(logits_of(references.before, probe), probe.labels),
        lr=options["relearn_lr"],
        max_steps=options["relearn_steps"],
        probe=probe,
    )
    if options.get("attacks"):
        attacked = attacks.battery(
            model,
            (split.forget, split.retain),
            (split.measured_forget, split.measured_retain),
            original=references.before,
        )
        found |= {name: value for name, value in attacked.items() if name not in found}
    seen = metrics.Measured(model, references.before, references.retrained, split.forget, split.retain, split.test)
    for name, entry in metrics.REGISTRY.items():
        if name in found:
            raise UsageError(f"the metric {name!r} of another package has a name of the library's own: rename it there")
        found[name] = float(entry.function(seen))

    classes = len(split.test.classes)
    value["confusion"] = torch.bincount(forget.argmax(dim=-1), minlength=classes).tolist()
    value["examples"] = {
        name: {
            "before": logits_of(references.before, data.subset(torch.arange(min(EXAMPLES, len(data)))))
            .argmax(dim=-1)
            .tolist(),
            "after": after[:EXAMPLES].argmax(dim=-1).tolist(),
        }
        for name, data, after in (
            ("forget", split.measured_forget, forget),
            ("retain", split.measured_retain, retain),
        )
    }
    return value


def _attacks(
    retain_train: Tensor, test: Tensor, forget_train: Tensor, shadows: Sequence[Mapping[str, Tensor]], split: Split
) -> dict[str, float]:
    """Membership inference from the model's logits."""
    members = metrics.loss(retain_train, split.retain.labels)
    non_members = metrics.loss(test, split.test.labels)
    forgotten = metrics.loss(forget_train, split.forget.labels)
    held_out = non_members[split.held_out]
    found = {
        "mia_entropy": metrics.entropy_mia(retain_train, test, forget_train),
        "mia_loss": metrics.loss_mia(members, non_members, forgotten),
        "auc_loss": metrics.attack_auc(-forgotten, -held_out),
    }
    if shadows:
        where = split.held_out.nonzero().squeeze(-1)
        # Each training example is unknown to one model of every pair. A held-out one is unknown to both, but must be
        # compared with as many; which, is drawn.
        known = torch.stack([s["member"][split.indices] for s in shadows])
        generator = torch.Generator().manual_seed(seed_of(0, 7))
        first = torch.randint(2, (len(shadows) // 2, len(where)), generator=generator).bool()
        drawn = torch.stack([first, ~first], dim=1).flatten(0, 1)
        ours = _lira(forget_train, split.forget.labels, [s["train"][split.indices] for s in shadows], known)
        others = _lira(test[where], split.test.labels[where], [s["test"][where] for s in shadows], drawn)
        found["auc_lira"] = metrics.attack_auc(ours, others)
        found["tpr_lira"] = metrics.attack_tpr(ours, others)
    return found


def _lira(logits: Tensor, labels: Tensor, shadows: Sequence[Tensor], known: Tensor) -> Tensor:
    """Scores against the shadow models to which an example is not ``known``, (models, N): equally many for each."""
    odds = torch.stack([metrics.log_odds(s, labels) for s in shadows])
    return metrics.lira(metrics.log_odds(logits, labels), odds.T[~known.T].view(len(labels), -1).T)
