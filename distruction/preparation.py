"""Preparation: learn, while the data is there, how precisely each weight must be known (paper, section 3.1)."""

import math
import numbers
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import distributed
from .adapters import Adapter, adapted
from .describe import described
from .errors import PosteriorWarning, UsageError
from .initial import initial_std
from .likelihood import Categorical, Given, Likelihood, check_classes, signed, signed_tokens
from .loop import (
    TRAINING,
    Batches,
    Callback,
    Checkpoint,
    Step,
    check_loader,
    cosine,
    examples_in,
    rising,
    run,
)
from .loop.batches import unpack
from .loop.counts import label_counts
from .loop.labels import as_rows, is_map
from .loop.step import require_count, require_seed
from .loop.tokens import Sequences
from .modules import fingerprint, learnable, require_suitable, require_trainable
from .optim import BGD
from .posterior import Posterior
from .seeds import seed_of
from .targets import held_out_quantiles

METHODS = {"gauss-newton": 150, "bgd": 1500}
"""Ways to learn the std, and the steps that each takes by default."""
STD_INIT = 0.1
"""What BGD starts from by default: its cap is one number, so that the initial std is."""
FAR_BELOW = 10.0
"""Points of accuracy by which samples may stay behind the means without a warning."""
TOLERANCE = 0.05
"""Nats per example that samples of a posterior with the default evidence may lose against the means."""


def prepare(
    model: nn.Module,
    loader: Batches,
    *,
    method: str = "gauss-newton",
    steps: int | None = None,
    std_init: float | Literal["auto"] = "auto",
    evidence: float | Literal["auto"] = "auto",
    num_examples: int | None = None,
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    likelihood: Likelihood | None = None,
    adapter: Adapter | None = None,
    held_out: Batches | None = None,
    mc_samples: int | None = None,
    learn_mean: bool = False,
    lr: float = 1.0,
    seed: int = 0,
    backend: str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 60.0,
    checkpoint_steps: int | None = None,
    keep_checkpoint: bool = False,
    release_gradients: bool = False,
    callback: Callback | None = None,
    progress: bool = True,
) -> Posterior:
    """Learn the posterior of a trained model: mean = the weights, std learned.

    1/std**2 = 1/std_init**2 + evidence * num_examples * curvature, where the curvature is that of the mean loss,
    averaged over the posterior. So ``evidence`` says how many data points each training example stands for, and
    ``steps`` how well the curvature is known.

    ``method="gauss-newton"`` measures it by squared gradients of a signed loss at samples (`distruction.likelihood`),
    as variational online Gauss-Newton does (Khan et al., arXiv 1806.04854), in equal shares of the evidence.
    ``method="bgd"`` is the paper's, Bayesian Gradient Descent, whose statistic is noisier the wider the model is: it
    wants more steps and two samples each; the shares of its evidence rise (`distruction.loop.rising`).

    Args:
        model: any model that gives logits or, as Hugging Face's do, an output with ``logits``. Only its parameters
            with ``requires_grad`` get a posterior. It runs in eval mode (no dropout, BatchNorm statistics untouched)
            and ends as it was.
        loader: batches of the whole training set, repeated as often as needed: pairs (inputs, targets), or mappings
            with the targets under ``labels`` (`distruction.loop.batches`); what ``adapter`` understands. Targets are a
            label per example, or one per pixel (logits (batch, classes, ...), labels (batch, ...), -100 for none).
        method: how the std is learned.
        steps: updates; ``None`` is 150 for Gauss-Newton and 1500 for BGD. A Gauss-Newton std comes out with a relative
            noise of about 2.2 / sqrt(steps) at 0.2 M weights and less at 2.7 M (benchmarks/priors.py): for a
            tolerance t take (2.2 / t)**2 steps, 121 for 0.2.
        std_init: std to start from, > 0; it is also BGD's cap. ``auto``: each tensor's own scale for Gauss-Newton
            (`distruction.initial`), 0.1 for BGD.
        evidence: data points that each training example counts for, over the whole run, > 0 (the effective sample
            size, over the number of examples). ``auto``: n / (2 * 0.05 * num_examples) for n weights, so that samples
            of the posterior lose about 0.05 nats per example against the means at most: a weight with curvature F gets
            std**2 <= 1 / (evidence * num_examples * F), which costs 1 / (2 * evidence * num_examples).
        num_examples: training examples (of a language model texts, or tokens: what ``evidence`` is to count per; the
            product is in tokens); ``None`` is what the loader says that an epoch of it draws.
        loss_fn: (logits, targets) -> mean loss, a negative log-likelihood in nats; ``None`` is cross entropy.
            Gauss-Newton needs one loss per example: a loss that takes ``reduction="none"``, or gives (batch,) losses.
            It then uses the given targets, whose gradients vanish where the model fits its data, so that the stds come
            out too wide.
        likelihood: in place of ``loss_fn``, also draws targets: `Categorical` (the default), `Bernoulli`, `Gaussian`
            (`distruction.likelihood`) or one of your own.
        adapter: in place of both, also says what a batch is (`distruction.adapters`).
        held_out: batches that the model was not trained on, of which a few quantiles of the log-odds by class are kept
            in the metadata: what ``forget(..., target="unseen")`` goes by.
        mc_samples: forward and backward passes per update of BGD, 2 by default; even numbers use antithetic pairs.
            Gauss-Newton takes one.
        learn_mean: let BGD move the means too, with step size ``lr``; the paper keeps them.
        lr: see ``learn_mean``.
        seed: of the draws and of the batches' order.
        backend: see `distruction.ops`.
        checkpoint: file to resume from and to write every ``checkpoint_seconds`` and, where given, every
            ``checkpoint_steps``. A run that was killed at any point and started again ends with the same bits.
        keep_checkpoint: leave the file at the end, for a caller that deletes it once the result is on the disk.
        release_gradients: see `BGD`: the same bits with less memory, on one rank.
        callback: called with a `distruction.Step` after each step; where it returns ``True`` the run ends there, and
            the posterior has the evidence of the steps so far.
        progress: show a progress bar.

    Returns:
        The posterior, on the model's device. Its metadata has the settings, ``examples``, ``steps_done``,
        ``sampled_accuracy`` beside ``accuracy_at_means`` (percent, of the same batches: those of the last tenth of the
        steps) and, where `distruction.loop.counts` can tell them, ``label_counts``: the training examples of each
        label. Samples that get far less right than the means are a warning.

    Raises:
        UsageError: an argument is out of range, the loader cannot be repeated, is empty or not labelled.
        NonFiniteError: the loss became NaN or infinite; says at which step.
        PosteriorError: the checkpoint is damaged or of another model; it stays as it is.
        OSError: the checkpoint cannot be written; an earlier one stays as it is.
    """
    distributed.start()
    if method not in METHODS:
        raise UsageError(f"method {method!r} is unknown; choose {' or '.join(METHODS)}")
    gauss_newton = method == "gauss-newton"
    if steps is None:
        steps = METHODS[method]
    steps, seed = require_count("steps", steps), require_seed(seed)
    if isinstance(loss_fn, type):
        raise UsageError(f"loss_fn is the class {loss_fn.__name__}: pass one made of it, {loss_fn.__name__}(...)")
    if loss_fn is not None and likelihood is not None:
        raise UsageError("loss_fn and likelihood both say what the loss is; pass one of them")
    if adapter is not None and not (loss_fn is None and likelihood is None):
        raise UsageError("the adapter says what the loss is: leave out loss_fn and likelihood")
    loader = adapted(loader, adapter)
    held_out = None if held_out is None else adapted(held_out, adapter)
    losses = adapter or likelihood
    if mc_samples is None:
        mc_samples = 1 if gauss_newton else 2
    mc_samples = require_count("mc_samples", mc_samples)
    if gauss_newton and (learn_mean or mc_samples != 1):
        raise UsageError(
            f"learn_mean={learn_mean} and mc_samples={mc_samples} are for method='bgd': Gauss-Newton keeps the means "
            "and takes one sample per update"
        )
    if not learnable(model):
        raise UsageError("the model has no parameter with requires_grad, so there is nothing to prepare")
    require_suitable(learnable(model))
    require_trainable(model)
    if not _is_auto_or_positive(std_init):
        raise UsageError(f"std_init must be > 0 and finite, not {std_init!r}; 'auto' goes by each tensor's own scale")
    if not _is_auto_or_positive(evidence):
        raise UsageError(
            f"evidence must be > 0 data points, not {evidence!r}; they count per training example, and 'auto' goes by "
            "the number of weights"
        )
    check_loader(loader, TRAINING, steps)
    unseen = None if held_out is None else held_out_quantiles(model, held_out)
    examples = examples_in(loader) if num_examples is None else num_examples
    if examples is None:
        for batch in loader if isinstance(loader, list | tuple) else ():
            unpack(batch, TRAINING)
        raise UsageError(
            "the loader does not say how many examples it draws: pass num_examples= (training examples, e.g. 50_000)"
        )
    examples = require_count("num_examples", examples)
    if evidence == "auto":
        evidence = sum(p.numel() for p in learnable(model).values()) / (2 * TOLERANCE * examples)
    if std_init == "auto" and not gauss_newton:
        std_init = STD_INIT
    evidence = float(evidence)
    if std_init != "auto":
        std_init = float(std_init)
    total = evidence * examples
    weights = fingerprint(learnable(model))
    shares = [1.0 / steps] * steps if gauss_newton else rising(steps)
    settings: dict[str, Any] = {
        "method": method,
        "steps": steps,
        "std_init": std_init,
        "evidence": evidence,
        "examples": examples,
        "shares": "equal" if gauss_newton else "rising",
        "mc_samples": mc_samples,
        "learn_mean": learn_mean,
        "lr": lr,
        "loss": described(loss_fn if losses is None else losses),
        "seed": seed,
        "weights": weights,
    }

    def make_optimizer(resumed: Posterior | None) -> BGD:
        return BGD(
            learnable(model).items(),
            lr=lr,
            std_init=resumed or (initial_std(model) if std_init == "auto" else std_init),
            data_per_step=total,
            mc_samples=mc_samples,
            max_std=None if std_init == "auto" else std_init,
            learn_mean=learn_mean,
            seed=seed,
            backend=backend,
            release_gradients=release_gradients,
            statistic=method,
        )

    loss: Loss = SignedLoss(losses, loss_fn, seed) if gauss_newton else Loss(losses, loss_fn)

    def schedule(optimizer: BGD, history: list[Step]) -> None:
        loss.step = len(history)
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine(len(history), steps)
            group["data_per_step"] = total * shares[len(history)]

    labelled = losses is None or isinstance(losses, Categorical)
    counts = label_counts(loader) if labelled else None
    point = Checkpoint(checkpoint, settings, checkpoint_seconds, checkpoint_steps, keep_checkpoint)
    looks = max(1, steps // 10)
    optimizer, history = run(
        model,
        loader,
        loss,
        make_optimizer,
        steps=steps,
        seed=seed,
        checkpoint=point,
        schedule=schedule,
        callback=callback,
        progress=progress,
        role=TRAINING,
        labels=None if loss_fn is not None else labelled,
        shown=loss.shown if gauss_newton else None,
        accuracy=getattr(losses, "accuracy", None),
        looks=looks,
    )
    posterior = optimizer.posterior(copy=False)
    tail = history[-looks:]
    accuracy = sum(s.accuracy for s in tail) / len(tail)
    # A run that its callback ended early may have looked at the means in none of these.
    found = [s.accuracy_at_means for s in tail if s.accuracy_at_means is not None]
    at_means = sum(found) / len(tail) if len(found) == len(tail) else None
    if at_means is not None and accuracy < at_means - FAR_BELOW:
        warnings.warn(
            f"samples of the posterior get {accuracy:.1f} % of the training {loss.unit} right, and its means "
            f"{at_means:.1f} %: it is too wide to hold them fast. Give more steps or evidence, or a smaller std_init",
            PosteriorWarning,
            stacklevel=2,
        )
    posterior.metadata = {
        **settings,
        "steps_done": len(history),
        "loss_per": loss.unit,
        "torch": torch.__version__.split("+")[0],
        "sampled_loss": sum(s.loss for s in tail) / len(tail),
        "sampled_accuracy": None if math.isnan(accuracy) else accuracy,
        "accuracy_at_means": at_means,
    }
    # A caller who gives another number has more data than the loader shows.
    if counts is not None and num_examples in (None, sum(counts.values())):
        posterior.metadata["label_counts"] = counts
    if unseen is not None:
        posterior.metadata["held_out"] = unseen
    point.remove()
    return posterior


def _is_auto_or_positive(value: object) -> bool:
    return value == "auto" or (isinstance(value, numbers.Real) and 0 < float(value) < math.inf)


def total_evidence(metadata: Mapping[str, Any]) -> float:
    """The data points that a posterior stands for, by the metadata that `prepare` gave it.

    Before metadata had ``examples``, ``evidence`` was this total.
    """
    return float(metadata["evidence"]) * int(metadata.get("examples", 1))


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    check_classes(logits)
    return F.cross_entropy(logits, targets)


class Loss:
    """The mean loss of a batch, as `distruction.loop.run` wants it.

    Attributes:
        step: steps done before this one.
        unit: what the loss is a mean over.
    """

    def __init__(
        self, likelihood: Likelihood | Adapter | None, loss_fn: Callable[[Tensor, Tensor], Tensor] | None
    ) -> None:
        self.likelihood = likelihood
        self.of_pixels = loss_fn is None and (likelihood is None or isinstance(likelihood, Categorical))
        self.loss_fn = loss_fn or _cross_entropy
        self.step = 0
        self.unit = "examples"

    def __call__(self, logits: Tensor, targets: Tensor, inputs: Any) -> Tensor:
        """The loss to minimise."""
        self.unit = "tokens" if isinstance(inputs, Sequences) else self.unit
        logits, targets = self._examples(logits, targets)
        if self.likelihood is not None:
            return self.likelihood.losses(logits, targets).mean()
        return self.loss_fn(logits, targets)

    def shown(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss to report."""
        return self(logits, targets, None)

    def _examples(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What the loss is a mean over: of maps, their pixels."""
        if self.of_pixels and is_map(targets):
            self.unit = "pixels"
            return as_rows(logits, targets)
        return logits, targets


class SignedLoss(Loss):
    """The signed loss of the Gauss-Newton statistic, with signs and targets of the step's own seed."""

    def __init__(
        self,
        likelihood: Likelihood | Adapter | None,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None,
        seed: int,
    ) -> None:
        super().__init__(likelihood, loss_fn)
        self.seed = seed
        if likelihood is not None:
            self.per_example: Likelihood | Given = (
                likelihood if isinstance(likelihood, Likelihood) else Given(likelihood.losses)
            )
        else:
            self.per_example = Categorical() if loss_fn is None else Given(loss_fn)

    def __call__(self, logits: Tensor, targets: Tensor, inputs: Any) -> Tensor:
        """The loss whose squared gradient is the statistic."""
        generator = torch.Generator(logits.device).manual_seed(seed_of(self.seed, 3, self.step))
        if isinstance(inputs, Sequences):
            self.unit = "tokens"
            return signed_tokens(self.per_example, logits, targets, inputs.start, inputs.total, generator)
        logits, targets = self._examples(logits, targets)
        return signed(self.per_example, logits, targets, generator)

    def shown(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean loss on the given targets."""
        return self.per_example.losses(*self._examples(logits, targets)).mean()
