"""Unlearning objectives U: what a model should do on the forget set, as callables ``(logits, targets) -> loss``.

Each returns the mean over the batch of a per-example loss to be minimised. An objective that needs more than the
logits is an object with ``needs_inputs = True`` and is called ``(logits, targets, inputs)``.

``forgotten`` are labels of earlier requests: no objective moves the model towards them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UsageError
from .language_objectives import SimNPO, Steering, npo
from .modules import logits_of
from .posterior import Posterior
from .registry import Registry
from .teachers import AtMeans, NearMeans, Randomised

Objective = Callable[..., Tensor]
Labels = Sequence[int]


def others(logits: Tensor, targets: Tensor, forgotten: Labels = ()) -> Tensor:
    """Where a class is neither the true one nor forgotten, (batch, classes) of bool.

    Raises:
        UsageError: the model's output is no (batch, classes) of two classes or more, or no class is left.
    """
    if logits.ndim == 1 or (logits.ndim == 2 and logits.shape[-1] == 1):
        raise UsageError(
            f"the model gives one logit per example, {tuple(logits.shape)}, and the objective speaks of classes: let "
            "it give two (model.register_forward_hook(lambda module, inputs, z: torch.nn.functional.pad(z.reshape(-1, "
            "1), (1, 0))), with labels 0 and 1), or pass an objective of your own, (logits, targets) -> mean loss"
        )
    if logits.ndim != 2:
        raise UsageError(
            f"the model's output has the shape {tuple(logits.shape)}, and the objective is for (batch, classes): pass "
            "an objective of your own, (logits, targets) -> mean loss"
        )
    left = torch.ones_like(logits, dtype=torch.bool).scatter_(-1, targets[:, None], False)
    if forgotten:
        left[:, list(forgotten)] = False
        # Otherwise a class is left for every label, and nothing waits for the device.
        if len(set(forgotten)) >= logits.shape[-1] - 1 and not left.any(dim=-1).all():
            raise UsageError(
                f"with the labels {sorted(set(forgotten))} forgotten no class is left that the model could predict"
            )
    return left


def uniform_others(logits: Tensor, targets: Tensor, forgotten: Labels = ()) -> Tensor:
    """Cross entropy to the uniform distribution over the classes other than the true one.

    Args:
        logits: (batch, classes), at least two classes.
        targets: (batch,) int64, the labels to forget.
        forgotten: labels that are not among the others either.
    """
    left = others(logits, targets, forgotten)
    log_p = F.log_softmax(logits, dim=-1)
    return -((log_p * left).sum(dim=-1) / left.sum(dim=-1)).mean()


def uniform(logits: Tensor, targets: Tensor, forgotten: Labels = ()) -> Tensor:
    """Cross entropy to the uniform distribution over all classes (the paper's entropy objective)."""
    others(logits, targets, forgotten)
    kept = [c for c in range(logits.shape[-1]) if c not in set(forgotten)]
    return -F.log_softmax(logits, dim=-1)[:, kept].mean()


class BoundedCrossEntropy:
    """Mean of max(0, log p(true) - log threshold): pushes the true class's probability under a bound, no further.

    Negated cross entropy has no minimum and destroys the model; this is the same gradient until p(true) is
    ``threshold``. Where labels are forgotten, p is the probability of any of them or the true one.

    Args:
        threshold: probability in (0, 1).
        forgotten: labels of earlier requests.
    """

    def __init__(self, threshold: float = 0.1, forgotten: Labels = ()) -> None:
        if not 0 < threshold < 1:
            raise UsageError(f"threshold must be in (0, 1), not {threshold}")
        self.threshold = threshold
        self.forgotten = tuple(forgotten)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch."""
        left = others(logits, targets, self.forgotten)
        log_p = F.log_softmax(logits, dim=-1).masked_fill(left, -torch.inf).logsumexp(dim=-1)
        return (log_p - torch.tensor(self.threshold, device=logits.device).log()).clamp(min=0).mean()


def unlikelihood(logits: Tensor, targets: Tensor, forgotten: Labels = ()) -> Tensor:
    """-log(1 - p), p being the probability of the true class or of a forgotten one: which other comes is not asked.

    Welleck et al., "Neural Text Generation with Unlikelihood Training", 2020, arXiv 1908.04319, of classes.
    """
    left = others(logits, targets, forgotten)
    return -F.log_softmax(logits, dim=-1).masked_fill(~left, -torch.inf).logsumexp(dim=-1).mean()


def random_labels(logits: Tensor, targets: Tensor, forgotten: Labels = ()) -> Tensor:
    """Cross entropy to labels drawn anew, uniformly from the classes other than the true one.

    Amnesiac unlearning (Graves, Nagisetty, Ganesh 2020) draws them once; drawn anew at each call the expected loss is
    that of `uniform_others`.
    """
    left = others(logits, targets, forgotten)
    return F.cross_entropy(logits, torch.rand(left.shape, device=logits.device).masked_fill(~left, -1).argmax(dim=-1))


def divergence(logits: Tensor, taught: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || model) in nats, the mean over the batch: sum_c t_c log(t_c / s_c), s = softmax(logits / T).

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, without their factor T**2.

    Args:
        logits: the model's, (batch, classes).
        taught: log t, the teacher's log-probabilities at the same temperature T; -inf is a class that it leaves out.
        temperature: T > 0.
    """
    return F.kl_div(F.log_softmax(logits / temperature, dim=-1), taught.exp(), reduction="batchmean")


class Distillation:
    """KL divergence from a teacher's prediction to the model's, times ``weight``: see `divergence`.

    Args:
        teacher: inputs -> logits, of the same classes; a module is put into eval mode and not trained.
        mask_true: leave the true class out of the teacher's prediction.
        forgotten: labels that are left out of it as well.
        temperature: of both softmaxes, > 0.
        weight: negative moves the model away from the teacher.

    Raises:
        UsageError: an argument is out of range.
    """

    needs_inputs = True

    def __init__(
        self,
        teacher: Callable[[Tensor], Any],
        *,
        mask_true: bool = False,
        forgotten: Labels = (),
        temperature: float = 1.0,
        weight: float = 1.0,
    ) -> None:
        if not temperature > 0:
            raise UsageError(f"temperature must be > 0, not {temperature}")
        self.teacher = teacher.eval().requires_grad_(False) if isinstance(teacher, nn.Module) else teacher
        self.mask_true = mask_true
        self.forgotten = tuple(forgotten)
        self.temperature = temperature
        self.weight = weight

    def __call__(self, logits: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
        """The loss of a batch."""
        return self.weight * divergence(logits, self.taught(logits, targets, inputs), self.temperature)

    def taught(self, logits: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
        """The teacher's log-probabilities, (batch, classes); -inf is a class that it leaves out."""
        left = others(logits, targets, self.forgotten)
        with torch.no_grad():
            taught = logits_of(self.teacher(inputs))
            if self.mask_true:
                taught = taught.masked_fill(~left, -torch.inf)
            elif self.forgotten:
                taught = taught.index_fill(-1, torch.tensor(self.forgotten, device=taught.device), -torch.inf)
            return F.log_softmax(taught / self.temperature, dim=-1)


class MaskedTeacher(Distillation):
    """KL divergence from what a teacher predicts with the true class masked out to the model's prediction.

    With the model before forgetting as the teacher the forget set goes to the classes that the model found next
    likely, which changes it least (mask distillation; Zhou et al., "Decoupled Distillation to Erase", 2025).

    Args:
        teacher: inputs -> logits, of the same classes, at least two.
        forgotten: labels that are masked out as well.
    """

    def __init__(self, teacher: Callable[[Tensor], Any], forgotten: Labels = ()) -> None:
        super().__init__(teacher, mask_true=True, forgotten=forgotten)


class PlausibleOthers(MaskedTeacher):
    """-log sum_c t_c p_c: the model and the masked teacher t of `MaskedTeacher`, each drawing a class, agree.

    It is least where all of p is on one class: each example is to be taken for *one* of those that the teacher finds
    plausible, rather than for their mixture, by which a few examples would find the forgotten class again; and which
    one is left open the more, the less the teacher minds. With a teacher that minds nothing it is `unlikelihood`. This
    is the likelihood of labels of which a prior is known (Jin, Ghahramani, "Learning with Multiple Labels", 2002).

    Args:
        teacher, forgotten: as of `MaskedTeacher`.
    """

    def __call__(self, logits: Tensor, targets: Tensor, inputs: Tensor) -> Tensor:
        """The loss of a batch."""
        taught = self.taught(logits, targets, inputs)
        return -(F.log_softmax(logits, dim=-1) + taught).logsumexp(dim=-1).mean()


@dataclass(frozen=True)
class Entry:
    """A named objective.

    Attributes:
        summary: one line about it.
        make: of the model, the posterior that holds it as it was before, and the labels of earlier requests.
        copies: whether it holds other weights for the whole model.
        of_texts: whether it is for causal language models alone.
        teaches: whether each update needs one more forward pass, of a teacher.
    """

    summary: str
    make: Callable[[nn.Module, Posterior, Labels], Objective]
    copies: bool = False
    of_texts: bool = False
    teaches: bool = False


def _plain(function: Callable[..., Tensor]) -> Callable[[nn.Module, Posterior, Labels], Objective]:
    return lambda model, posterior, forgotten: partial(function, forgotten=tuple(forgotten))


_OWN = {
    "masked-teacher": Entry(
        "the model from before teaches, with the true class masked out: keeps most (default)",
        lambda model, posterior, forgotten: MaskedTeacher(AtMeans(model, posterior), forgotten),
        teaches=True,
    ),
    "plausible-others": Entry(
        "any one class that the model from before finds plausible, the true one left out (default in depth)",
        lambda model, posterior, forgotten: PlausibleOthers(AtMeans(model, posterior), forgotten),
        teaches=True,
    ),
    "plausible-near": Entry(
        "the same of noisy copies of the example (default for wrong labels)",
        lambda model, posterior, forgotten: PlausibleOthers(NearMeans(model, posterior), forgotten),
        teaches=True,
    ),
    "uniform-others": Entry("uniform over the other classes", _plain(uniform_others)),
    "uniform": Entry("uniform over all classes: highest entropy", _plain(uniform)),
    "bounded-ce": Entry(
        "negated cross entropy until p(true) <= 0.1",
        lambda model, posterior, forgotten: BoundedCrossEntropy(forgotten=forgotten),
    ),
    "unlikelihood": Entry("-log(1 - p(true)): any other class may come", _plain(unlikelihood)),
    "random-labels": Entry("cross entropy to random other labels", _plain(random_labels)),
    "bad-teacher": Entry(
        "the model with random weights teaches",
        lambda model, posterior, forgotten: Distillation(Randomised(model, posterior), forgotten=forgotten),
        copies=True,
        teaches=True,
    ),
    "npo": Entry("of texts: negative preference against the model from before", npo, of_texts=True),
    "simnpo": Entry("of texts: the same by mean token likelihood alone", lambda *_: SimNPO(), of_texts=True),
    "rmu": Entry("of texts: hidden states go to a random direction", lambda model, *_: Steering(model), of_texts=True),
}
REGISTRY = Registry[Entry]("objective", _OWN)
"""Objectives by name."""


def register(
    name: str, summary: str, *, of_model: bool = False, copies: bool = False, teaches: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that adds an objective under ``name``: see `Entry` and `distruction.registry`.

    It decorates ``(logits, targets, forgotten=()) -> mean loss``.

    Args:
        of_model: it decorates ``(model, posterior, forgotten) -> objective`` instead.

    Raises:
        UsageError: the name is taken.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        make = function if of_model else _plain(function)
        REGISTRY.add(name, Entry(summary, make, copies=copies, teaches=teaches))
        return function

    return add


DEFAULT = "masked-teacher"
"""The objective of `distruction.forget` where none is named."""


def resolve(objective: str | Objective, model: nn.Module, posterior: Posterior, forgotten: Labels = ()) -> Objective:
    """The objective of that name for ``model``, which ``posterior`` was prepared for; a callable as it is.

    Raises:
        UsageError: the name is not in the registry, or the objective needs other weights and the model is sharded.
        PosteriorError: it needs the posterior's means, and that belongs to another model.
    """
    return objective if callable(objective) else entry(objective).make(model, posterior, forgotten)


def name_of(objective: str | Objective) -> str:
    """Its name, which is the same in the process that resumes a run."""
    return objective if isinstance(objective, str) else getattr(objective, "__name__", type(objective).__name__)


def entry(name: str) -> Entry:
    """The registry's entry.

    Raises:
        UsageError: there is none of that name.
    """
    return REGISTRY.known(name, " or pass a callable")
