"""Unlearning objectives U: what a model should do on the forget set, as callables ``(logits, targets) -> loss``.

Each returns the mean over the batch of a per-example loss to be minimised. An objective that needs more than the
logits is an object with ``needs_inputs = True`` and is called ``(logits, targets, inputs)``.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UsageError
from .modules import logits_of
from .posterior import Posterior, unwrapped
from .sharding import is_sharded

Objective = Callable[..., Tensor]


def uniform_others(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy to the uniform distribution over the classes other than the true one.

    Args:
        logits: (batch, classes), at least two classes.
        targets: (batch,) int64, the labels to forget.
    """
    log_p = F.log_softmax(logits, dim=-1)
    others = log_p.sum(dim=-1) - log_p.gather(-1, targets[:, None]).squeeze(-1)
    return -(others / (logits.shape[-1] - 1)).mean()


def uniform(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy to the uniform distribution over all classes (the paper's entropy objective)."""
    return -F.log_softmax(logits, dim=-1).mean()


class BoundedCrossEntropy:
    """Mean of max(0, log p(true) - log threshold): pushes the true class's probability under a bound, no further.

    Negated cross entropy has no minimum and destroys the model; this is the same gradient until p(true) is
    ``threshold``.

    Args:
        threshold: probability in (0, 1).
    """

    def __init__(self, threshold: float = 0.1) -> None:
        if not 0 < threshold < 1:
            raise UsageError(f"threshold must be in (0, 1), not {threshold}")
        self.threshold = threshold

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch."""
        log_p = F.log_softmax(logits, dim=-1).gather(-1, targets[:, None]).squeeze(-1)
        return (log_p - torch.tensor(self.threshold, device=logits.device).log()).clamp(min=0).mean()


def random_labels(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy to labels drawn anew, uniformly from the classes other than the true one.

    Amnesiac unlearning (Graves, Nagisetty, Ganesh 2020) draws them once; drawn anew at each call the expected loss is
    that of `uniform_others`.
    """
    classes = logits.shape[-1]
    shift = torch.randint(1, classes, targets.shape, device=targets.device)
    return F.cross_entropy(logits, (targets + shift) % classes)


class BadTeacher:
    """KL divergence from an incompetent teacher's prediction (Chundawat et al. 2023) to the model's.

    Args:
        teacher: a model with the same classes and random weights; it is put into eval mode and not trained.
        temperature: T >= of both softmaxes.
    """

    needs_inputs = True

    def __init__(self, teacher: nn.Module, temperature: float = 1.0) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature = temperature

    def __call__(self, logits: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
        """The loss of a batch."""
        with torch.no_grad():
            target = F.log_softmax(logits_of(self.teacher(inputs)) / self.temperature, dim=-1)
        return F.kl_div(
            F.log_softmax(logits / self.temperature, dim=-1), target, log_target=True, reduction="batchmean"
        )


class MaskedTeacher:
    """KL divergence from what a teacher predicts with the true class masked out to the model's prediction.

    With the model before forgetting as the teacher the forget set goes to the classes that the model found next
    likely, which changes it least (mask distillation; Zhou et al., "Decoupled Distillation to Erase", 2025).

    Args:
        teacher: a model with the same classes, at least two; it is put into eval mode and not trained.
    """

    needs_inputs = True

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher.eval().requires_grad_(False)

    def __call__(self, logits: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
        """The loss of a batch, in nats."""
        with torch.no_grad():
            others = logits_of(self.teacher(inputs)).scatter(-1, targets[:, None], -torch.inf)
        return F.kl_div(F.log_softmax(logits, dim=-1), F.softmax(others, dim=-1), reduction="batchmean")


@dataclass(frozen=True)
class Entry:
    """A named objective.

    Attributes:
        summary: one line about it.
        make: of the model and its posterior.
        copies: whether it holds a copy of the model.
    """

    summary: str
    make: Callable[[nn.Module, Posterior], Objective]
    copies: bool = False


def _before(model: nn.Module, posterior: Posterior) -> nn.Module:
    """A copy of ``model`` with the means of ``posterior``: a resumed run's model no longer holds them."""
    if any(is_sharded(p) for p in model.parameters()):
        raise UsageError(
            "bad-teacher and masked-teacher copy the model, which is sharded: pass objective=BadTeacher(teacher) or "
            "MaskedTeacher(teacher), with the teacher sharded as well"
        )
    teacher = copy.deepcopy(unwrapped(model))
    posterior.mean_(teacher)
    return teacher


def _randomised(teacher: nn.Module) -> nn.Module:
    """``teacher`` with every module's parameters drawn anew from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in teacher.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return teacher


REGISTRY: dict[str, Entry] = {
    "uniform-others": Entry("uniform over the other classes (default)", lambda model, posterior: uniform_others),
    "uniform": Entry("uniform over all classes: highest entropy", lambda model, posterior: uniform),
    "bounded-ce": Entry("negated cross entropy until p(true) <= 0.1", lambda model, posterior: BoundedCrossEntropy()),
    "random-labels": Entry("cross entropy to random other labels", lambda model, posterior: random_labels),
    "bad-teacher": Entry(
        "a randomly initialised copy teaches",
        lambda model, posterior: BadTeacher(_randomised(_before(model, posterior))),
        copies=True,
    ),
    "masked-teacher": Entry(
        "a copy from before teaches, with the true class masked out: keeps more, costs a forward pass and a copy",
        lambda model, posterior: MaskedTeacher(_before(model, posterior)),
        copies=True,
    ),
}
"""Objectives by name."""


def resolve(objective: str | Objective, model: nn.Module, posterior: Posterior) -> Objective:
    """The objective of that name for ``model``, which ``posterior`` was prepared for; a callable as it is.

    Raises:
        UsageError: the name is not in the registry, or the objective copies the model and that is sharded.
        PosteriorError: it copies the model, and the posterior belongs to another one.
    """
    return objective if callable(objective) else entry(objective).make(model, posterior)


def name_of(objective: str | Objective) -> str:
    """Its name, which is the same in the process that resumes a run."""
    return objective if isinstance(objective, str) else getattr(objective, "__name__", type(objective).__name__)


def entry(name: str) -> Entry:
    """The registry's entry.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in REGISTRY:
        raise UsageError(f"objective {name!r} is unknown; choose {', '.join(REGISTRY)} or pass a callable")
    return REGISTRY[name]
