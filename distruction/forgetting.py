"""Forgetting with the forget set alone (paper, section 3.2)."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

from torch import nn

from . import damage, distributed, objectives
from .adapters import Adapter, adapted
from .asked import check_previous, check_strength, kind_of, labels_forgotten, largest_ratio, level_of, require_classes
from .depth import OBJECTIVE as DEEP_OBJECTIVE
from .depth import PACE as DEEP_PACE
from .depth import SPEED, DepthAscent, Dispersed, cosine_asked
from .describe import described
from .errors import UsageError
from .features import Features
from .forget_report import ForgetReport
from .loop import FORGET_SET, Batches, Callback, Checkpoint, Step, check_loader, cosine, run
from .loop.step import require_count, require_seed
from .loop.tokens import require_causal
from .modules import deterministic, learnable, require_trainable
from .optim import BGD
from .posterior import Posterior
from .strength import CYCLE, LONG_CYCLE, MARGIN, DualAscent, Known, Probability, examined
from .targets import (
    ADVANTAGE,
    CORRECTING,
    SETTLING,
    SHIFT,
    SUB_CLASS_MARGIN,
    Advantage,
    by_unseen,
    doubted,
    held_out_of,
    odds_of,
    of_target,
)
from .task_objectives import for_targets
from .teachers import AtMeans, SameModel

STEPS, MOST_STEPS = 150, 400
"""Updates with a given lambda, and at most where lambda is found."""


def forget(
    model: nn.Module,
    posterior: Posterior,
    loader: Batches,
    *,
    previous: "Posterior | ForgetReport | None" = None,
    request: Literal["auto", "class", "records"] = "auto",
    target: Literal["gone", "sub-class", "unseen", "corrected"] | None = None,
    objective: str | objectives.Objective | None = None,
    adapter: Adapter | None = None,
    steps: int | None = None,
    kl_weight: float | Literal["auto"] = "auto",
    level: float | None = None,
    depth: Literal["features"] | None = None,
    cosine_level: float | None = None,
    classifier: str | None = None,
    data_per_step: float = 100.0,
    lr: float = 1.0,
    mc_samples: int = 0,
    seed: int = 0,
    backend: str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 60.0,
    checkpoint_steps: int | None = None,
    keep_checkpoint: bool = False,
    release_gradients: bool = False,
    offload_prior: bool = False,
    callback: Callback | None = None,
    progress: bool = True,
) -> ForgetReport:
    """Make the model forget: from q = p minimise (1 - lambda) E_q[U] + lambda KL(q || p) by BGD.

    lambda is found during the run (`distruction.strength`), or given. A second request goes on from what the first
    left: ``forget(model, p, loader, previous=first)``. Its teacher is the model that p was prepared for, no
    earlier label is ever a target, and the KL that holds the model is the one to the posterior of the earlier request,
    which stands for what was forgotten by then; the report's ``kl`` is measured from p.

    Args:
        model: the model that ``posterior`` was prepared for, holding its means (or those of ``previous``). It runs in
            eval mode and ends holding the means of q.
        posterior: p, from `prepare`.
        loader: (inputs, targets) batches of the forget set, repeated as often as needed. No other data is read.
        previous: the report of the request before this one, or its posterior.
        request: ``class``: the labels of the forget set go, and no image is to be taken for one of them. ``records``:
            these records alone go and their labels live on; the model is changed as little as possible, not at all
            where it knows them no better than it should: than unseen data, as far as p knows of any (of
            ``prepare(..., held_out=)``), else than ``level``. ``auto``: ``class`` where the forget set holds as many
            records of each of its labels as p says that there were, and not those of all labels, or, where p does not
            say, where it has at most half of the labels that the model knows. A language model's are ``texts``: their
            tokens are to be at most as likely as ``level``, in up to 400 steps; as ``records`` the model is changed as
            little as possible.
        target: what is to be reached, in place of ``request``: ``gone``, these classes; ``sub-class``, what these
            records show, whose labels live on for others; ``unseen``, these records, as if the model had not been
            trained on them (for a posterior of ``prepare(..., held_out=)``); ``corrected``, the labels of these
            records, which are wrong (`distruction.targets`).
        objective: U, a name in `distruction.objectives.REGISTRY` or a callable (logits, targets) -> mean loss, which
            must itself leave out what was forgotten earlier; ``None`` is ``masked-teacher``, with ``depth``
            ``plausible-others``, for ``target="corrected"`` ``plausible-near``. The named ones are for classes, of
            examples or of pixels (logits (batch, classes, ...), labels (batch, ...), -100 where nothing is to go); for
            several labels and values there is `distruction.task_objectives`. With a callable and a given ``kl_weight``
            targets may be anything; ``auto`` goes by its ``known(outputs, targets)``, in [0, 1], where it has one.
        adapter: says what a batch is (`distruction.adapters`).
        steps: updates; with ``kl_weight="auto"`` the most of them. ``None``: 150, or at most 400.
        kl_weight: lambda in [0, 1]: larger keeps more of the model and forgets less. ``auto`` finds it.
        level: mean probability in (0, 1) at the means that the forgotten classes (of records: their own labels) should
            end at, for ``kl_weight="auto"``. ``None``: 0.01; for texts 0.1, of the tokens that their labels ask for,
            in the mean over the tokens; for records what the model's accuracy on data that it has
            not seen is likely to be: that of samples of p, from its metadata, or 0.9.
        depth: ``features``: a class is also dispersed in front of the classifier, where a few examples would find it
            again although no logit shows it (`distruction.depth`).
        cosine_level: mean cosine similarity in (-1, 1) of the forget set's penultimate features to end at with
            ``depth``; ``None`` is 0.25.
        classifier: name of the layer that gives the logits, for ``depth``; ``None`` looks for it.
        data_per_step: weight of the mean of U, in data points (see `BGD`); with ``auto`` to start from.
        lr: step size of the mean at the start; it decays to 0 along a cosine, with ``auto`` in each cycle of 50 steps
            (of 100 with ``depth``, where it starts at half of it, and for a sub-class or wrong labels).
        mc_samples: 0: U is taken at the means and the stds, which scale the steps, are kept. From 1 on as in the paper:
            E_q[U] by so many samples, each with a forward and a backward pass (even numbers use antithetic pairs), and
            the stds learned with the means.
        seed: of the draws and of the batches' order.
        backend: see `distruction.ops`.
        checkpoint, checkpoint_seconds, checkpoint_steps, keep_checkpoint, release_gradients, progress: see
            `distruction.prepare`.
        offload_prior: leave p where it is, such as in the CPU's memory (`Posterior.pin_memory` makes it faster), and
            fetch it piece by piece in each step, instead of moving it to the model's device.
        callback: called with a `distruction.Step` after each step; where it returns ``True`` the run ends there and the
            report has what was reached.

    Raises:
        UsageError: an argument is out of range, the forget set is empty or outside the model's labels.
        PosteriorError: the posterior belongs to another model or other weights, or ``previous`` to another posterior.
        NonFiniteError: the loss became NaN or infinite; the model holds the last good means.
    """
    distributed.start()
    automatic = kl_weight == "auto"
    given = 0.5 if isinstance(kl_weight, str) else kl_weight
    check_strength(kl_weight, level)
    if not 0 < data_per_step < math.inf:
        raise UsageError(f"data_per_step must be > 0 and finite, not {data_per_step}")
    if target is not None:
        request, level = of_target(target, request, level)
    cosine_level = cosine_asked(depth, cosine_level, classifier)
    if objective is None:
        usual = CORRECTING if target == "corrected" else objectives.DEFAULT
        objective = usual if depth is None else DEEP_OBJECTIVE
    if request not in ("auto", "class", "records"):
        raise UsageError(f"request must be 'auto', 'class' or 'records', not {request!r}")
    if not 0 < lr < math.inf:
        raise UsageError(f"lr must be > 0 and finite, not {lr}")
    if steps is not None:
        steps = require_count("steps", steps)
    if isinstance(objective, type):
        raise UsageError(f"the objective is the class {(name := objective.__name__)}: pass one made of it, {name}(...)")
    mc_samples, seed = require_count("mc_samples", mc_samples, 0), require_seed(seed)
    if isinstance(previous, ForgetReport):
        previous = previous.posterior
    if not isinstance(posterior, Posterior):
        raise UsageError(f"posterior must be a Posterior, not a {type(posterior).__name__}: that of preparation")
    if previous is not None and not isinstance(previous, Posterior):
        raise UsageError(f"previous must be a ForgetReport or a Posterior, not a {type(previous).__name__}")
    identity = posterior.fingerprint()
    check_previous(previous, identity)
    origin = posterior if previous is None else previous
    if isinstance(objective, str):
        objectives.entry(objective)
    loader = adapted(loader, adapter)
    known = getattr(objective, "known", None)
    check_loader(loader, FORGET_SET, STEPS if steps is None else steps)
    posterior.check(model)
    require_trainable(model)
    data = examined(loader, next(model.parameters()).device, seed=seed)
    if data.text:
        require_causal(model)
    elif automatic and known is None and not isinstance(objective, str):
        require_classes(data)
    kind = kind_of(request, data, posterior, model)
    if depth is not None and kind != "class":
        raise UsageError(
            f"depth='features' disperses whole classes, and this request is for {kind}: leave it out, or say "
            "request='class' if classes are to go"
        )
    if steps is None:
        steps = MOST_STEPS if automatic else STEPS
    settling = target in SETTLING
    cycle = min(LONG_CYCLE if settling or depth is not None else CYCLE, steps) if automatic else steps
    speed = lr * (1.0 if depth is None else SPEED)
    settings = {
        "objective": objectives.name_of(objective),
        "steps": steps,
        "kl_weight": kl_weight,
        "level": level,
        "data_per_step": data_per_step,
        "lr": lr,
        "mc_samples": mc_samples,
        "seed": seed,
    }
    if target is not None:
        settings["target"] = target
    if depth is not None:
        settings |= {"depth": depth, "cosine_level": cosine_level, "classifier": classifier}
    run_of = {**settings, "request": request, "objective": described(objective), "prior": identity}
    if previous is not None:
        run_of["previous"] = previous.fingerprint()
    point = Checkpoint(checkpoint, run_of, checkpoint_seconds, checkpoint_steps, keep_checkpoint)
    origin.check(model, same_weights=point.load(model) is None)
    earlier = labels_forgotten(origin)
    removed = sorted(data.counts) if kind == "class" else []
    prior = origin if offload_prior else origin.like(model)
    before = posterior if previous is None else posterior if offload_prior else posterior.like(model)
    first = prior if previous is None else before
    advantage_of = None
    if target == "unseen" or by_unseen(kind, data, posterior.metadata, target, level if automatic else 0.0):
        unseen = held_out_of(posterior.metadata, data.counts, next(model.parameters()).device)
        advantage_of = Advantage(model, data, unseen, odds_of(AtMeans(model, first), data))
        level = ADVANTAGE
    unlearn = objectives.resolve(objective, model, first, sorted({*earlier, *removed}))
    teacher = getattr(unlearn, "teacher", None)
    prepared = teacher if isinstance(teacher, SameModel) else getattr(unlearn, "before_passes", None)
    if isinstance(objective, str):
        unlearn = for_targets(unlearn, data.targets, data.text)
    features = None if depth is None else Features(model, classifier)
    probability = Probability(model, data, removed or None, features) if known is None else Known(model, data, known)
    looked_at = advantage_of or probability
    level = level_of(level, kind, posterior) if automatic else None

    def make_optimizer(resumed: Posterior | None) -> BGD:
        return BGD(
            learnable(model).items(),
            lr=lr,
            std_init=prior if resumed is None else resumed,
            data_per_step=data_per_step,
            mc_samples=max(1, mc_samples),
            at_means=mc_samples == 0,
            learn_std=mc_samples > 0,
            prior=prior,
            kl_weight=given,
            max_std=prior.largest_std(),
            seed=seed,
            backend=backend,
            release_gradients=release_gradients,
        )

    def schedule(optimizer: BGD, history: list[Step]) -> None:
        for group in optimizer.param_groups:
            group["lr"] = speed * cosine(len(history) % cycle, cycle)

    needs_inputs = getattr(unlearn, "needs_inputs", False)

    def loss_fn(logits: Any, targets: Any, inputs: Any) -> Any:
        return unlearn(logits, targets, inputs) if needs_inputs else unlearn(logits, targets)

    loss_fn.per_text = getattr(unlearn, "per_text", False)  # type: ignore[attr-defined]  # a function may have attributes
    dispersed = None if features is None else Dispersed(loss_fn, features)

    start = time.perf_counter()
    control = None
    if level is not None:
        control = DualAscent(
            looked_at,
            level=level if advantage_of is None else level + SHIFT,
            data_per_step=data_per_step,
            most=largest_ratio(posterior),
            cycle=cycle,
            gently=kind == "records" and not settling,
            margin=SUB_CLASS_MARGIN if target == "sub-class" else MARGIN,
            least_pace=1.0 if depth is None else DEEP_PACE,
        )
        if point.load(model) is None:
            with deterministic(model):
                control.value = looked_at()
    deepening = None
    if dispersed is not None:
        deepening = DepthAscent(dispersed, probability, level=cosine_level, strength=control, cycle=cycle)
    if control is not None and advantage_of is not None and control.value - SHIFT <= advantage_of.chance:
        # What chance alone explains is no reason to change the model.
        level = advantage_of.chance
        control.level = level + SHIFT
    idle = control is not None and kind == "records" and control.value <= control.level
    history: list[Step] = []
    if idle:
        optimizer = make_optimizer(None)
    else:
        with features or nullcontext(), _removed(unlearn):
            optimizer, history = run(
                model,
                loader,
                dispersed or loss_fn,
                make_optimizer,
                steps=steps,
                seed=seed,
                checkpoint=point,
                schedule=schedule,
                callback=callback,
                progress=progress,
                role=FORGET_SET,
                needs_inputs=needs_inputs,
                labels=True if isinstance(objective, str) else None,
                accuracy=getattr(adapter, "accuracy", None),
                controller=deepening or control,
                before_passes=prepared,
                after_forward=None if features is None else features.gather,
            )
    seconds = time.perf_counter() - start
    result = origin.like(model) if idle else optimizer.posterior(copy=False)
    kl = history[-1].kl if history and previous is None else result.kl(posterior.like(model)).item()
    value = advantage = None
    if data.counts or data.text or known is not None:
        with deterministic(model), features or nullcontext():
            value = probability()
            if advantage_of is not None:
                advantage_of()
                advantage = advantage_of.signed
    expected = None
    if kind == "class" and damage.KEY in posterior.metadata:
        labels = sorted({*earlier, *removed})
        expected = damage.forecast(
            posterior.metadata, damage.disturbance(model, posterior, data, labels, kl, seed=seed)
        )
    found = {"labels": {str(c): n for c, n in data.counts.items()}, "records": data.records, "request": kind}
    result.metadata = {
        "method": "distruction",
        **settings,
        "steps_done": len(history),
        "kl": kl,
        "probability": value,
        "prior": identity,
        **{k: v for k, v in posterior.metadata.items() if k == "label_counts"},
        "forgotten": [*origin.metadata.get("forgotten", []), {**found, "objective": settings["objective"], "kl": kl}],
    }
    point.remove()
    told = value if advantage is None else advantage
    reached = None if level is None or told is None else told <= level
    advice = control.advice(len(history), steps) if control is not None and not reached else ""
    if (
        idle
        and control is not None
        and target is None
        and doubted(control.value, control.level, data.records, advantage_of)
    ):
        advice = (
            "it doubts their labels more than it doubts those of unseen records, so that these labels may be wrong: "
            "target='corrected' (--target corrected) takes them away"
        )
    features_cosine = None
    if deepening is not None and value is not None:
        features_cosine = result.metadata["cosine"] = probability.cosine
        if features_cosine > deepening.level:
            advice = advice or deepening.advice(len(history), steps)
            reached = False
    return ForgetReport(
        result,
        history,
        seconds,
        kl,
        kind,
        level,
        value,
        reached,
        advice,
        forecast=expected,
        cosine=features_cosine,
        advantage=advantage,
    )


@contextmanager
def _removed(objective: Any) -> Iterator[None]:
    """An objective's hook on the model is gone at the end, whatever happens inside."""
    try:
        yield
    finally:
        if hasattr(objective, "remove"):
            objective.remove()
