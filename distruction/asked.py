"""What a request is taken to ask for, by its forget set and by what the posterior remembers."""

from collections.abc import Mapping

from torch import nn

from .errors import PosteriorError, UsageError
from .posterior import Posterior
from .preparation import total_evidence
from .strength import ForgetSet

LEVEL = 0.01
"""Mean probability of the classes of a request at which it is reached."""
LEVEL_OF_TEXTS = 0.1
"""The same of the tokens that a request for texts asks for: greedy decoding gives almost none of them then."""
LARGEST_RATIO = 1e5
"""Data points that the objective may weigh against the posterior, where that does not say how many it stands for."""


def check_previous(previous: Posterior | None, identity: str) -> None:
    """Refuse a posterior of an earlier request that was not forgotten from the one with this fingerprint."""
    if previous is None:
        return
    prior = previous.metadata.get("prior")
    if prior is None:
        raise PosteriorError(
            "previous does not say which posterior it was forgotten from: pass the report of the request before "
            "this one, or its posterior"
        )
    if prior != identity:
        raise PosteriorError(
            f"previous was forgotten from another posterior ({prior[:12]}...) than this one ({identity[:12]}...): pass "
            "the posterior of preparation that the first request was given"
        )


def check_strength(kl_weight: float | str, level: float | None) -> None:
    """Refuse a lambda outside of [0, 1], a level that is no probability, and both together."""
    automatic = kl_weight == "auto"
    if not automatic and (isinstance(kl_weight, str) or not 0 <= kl_weight <= 1):
        raise UsageError(f"kl_weight (lambda) must be in [0, 1], not {kl_weight}, or 'auto'")
    if level is not None and not (isinstance(level, int | float) and 0 < level < 1):
        raise UsageError(f"level must be a probability in (0, 1), not {level}")
    if level is not None and not automatic:
        raise UsageError("a level is what kl_weight='auto' goes by: leave out level or kl_weight")


def labels_forgotten(posterior: Posterior) -> list[int]:
    """Labels of the earlier requests for whole classes."""
    requests = posterior.metadata.get("forgotten", [])
    return sorted({int(c) for r in requests if r["request"] == "class" for c in r["labels"]})


def kind_of(request: str, data: ForgetSet, posterior: Posterior, model: nn.Module) -> str:
    """``class``, ``records`` or ``texts``: what is asked for, or what the labels of the forget set look like.

    Raises:
        UsageError: a class is asked for, of texts.
    """
    if data.text:
        if request == "class":
            raise UsageError("request='class' is for class numbers, and the forget set holds texts: leave request out")
        return "texts" if request == "auto" else request
    if request != "auto" or not data.counts:
        return "class" if request == "auto" else request
    known: Mapping[str, int] | None = posterior.metadata.get("label_counts")
    if known:
        whole = all(n >= known.get(str(c), 0) for c, n in data.counts.items())
        # Of all classes none would be left to predict.
        return "class" if whole and len(data.counts) < len(known) else "records"
    classes = next((m.out_features for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)
    return "records" if classes is not None and len(data.counts) > classes / 2 else "class"


def require_classes(data: ForgetSet) -> None:
    """Raise where there is no label whose probability lambda could be found by.

    Raises:
        UsageError: the targets are no class numbers.
    """
    if not data.counts:
        raise UsageError(
            "lambda is found by the probability of the labels that go, and the forget set's targets are no class "
            "numbers: pass kl_weight (lambda), or an objective of distruction.task_objectives"
        )


def level_of(level: float | None, kind: str, posterior: Posterior) -> float:
    """The probability to reach: the given one, or that of the kind of request."""
    if level is not None:
        return level
    if kind != "records":
        return LEVEL if kind == "class" else LEVEL_OF_TEXTS
    sampled = posterior.metadata.get("sampled_accuracy")
    return 0.9 if sampled is None else min(max(sampled / 100, 0.5), 0.99)


def largest_ratio(posterior: Posterior) -> float:
    """As many data points as the posterior stands for, as far as it says so."""
    return max(LARGEST_RATIO, total_evidence(posterior.metadata) if "evidence" in posterior.metadata else 0.0)
