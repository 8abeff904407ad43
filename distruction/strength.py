"""How strongly to forget, found during the run: dual ascent on the weight of the objective against the KL.

Forgetting minimises U + KL / R, where R = (1 - lambda) * data_per_step / lambda is what the forget set weighs against
the posterior, in data points. R is raised while the model still knows what it should forget and lowered where it has
forgotten more than was asked for:

    log R += rate * clip(log(v / aim), -2, 2)    after each step,

v being the mean probability of what is to be forgotten *at the means*, which are what will be used: at samples it says
little about them. This is gradient ascent on the multiplier of the constraint v <= aim (Boyd, Vandenberghe, "Convex
Optimization", 2004, section 5.4), in logarithms. The trust region limits how fast the means can follow, so that R would
run away meanwhile and come back too late; therefore it is not raised while v is falling by itself (the conditional
integration of controllers that saturate: Åström, Hägglund, "PID Controllers", 1995, section 3.5), and is lowered twice
as fast as it is raised. The steps come in cycles, in each of which the step size decays to zero, and the run ends with
the first cycle that ends at or below the level. Another cycle starts from the R at which the step size of the one
before had halved: with what short steps could not follow, its first long steps would be a leap.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .errors import UsageError
from .features import Features, mean_cosine
from .loop import FORGET_SET, Batches, Step, cosine
from .loop.batches import Batching, Inputs, apply, call
from .loop.labels import IGNORED as NO_LABEL
from .loop.labels import as_rows, is_map
from .loop.loaders import generators, restarted
from .loop.tokens import IGNORED, asked, joined
from .modules import logits_of, unwrapped
from .optim import BGD
from .seeds import private_generators, seed_all, seed_of
from .sharding import reshard

EXAMPLES = 256
"""Of the forget set, at most, at which v is looked at."""
STEPS_BETWEEN_LOOKS = 3
CYCLE, LONG_CYCLE = 50, 100
"""Steps in which the step size decays to zero; the longer ones are for what pulls in two directions at once."""
MARGIN = 0.7
"""What the ascent aims at, as a share of the odds of the level: v ends within about a third of it."""
FALLING, FALLING_GENTLY = 0.8, 0.98
"""v falls by itself where it is below this share of what it was at the look before; gently, any visible fall will do:
a larger R would carry the means far past the level between two looks."""
HALF = 0.5
"""Levels above it, of records whose labels live on, are approached by the log-odds."""
RATE_UP, RATE_DOWN, CLIP = 0.2, 0.4, 2.0
FOLLOWED = 0.5
"""Share of the largest step size down to which the means follow R."""
OWN = "tokens of the labels"
"""Among a model's inputs a name that none of them has."""
LARGEST_WEIGHT = 0.99
SMALLEST_WEIGHT = 0.01
"""Bounds of lambda: under the smaller one means would take hundreds of steps to settle, so that from there on a larger
R is a larger ``data_per_step``."""


@dataclass(frozen=True)
class ForgetSet:
    """What one reading of the forget set tells.

    Attributes:
        records: how many there are.
        counts: records by label, of maps pixels, in the order of the labels; empty where targets are no class numbers.
        inputs, targets: `EXAMPLES` of them, drawn at random, or all.
        batch_size: of the largest batch.
        text: targets are the labels of a causal language model's texts, (rows, length).
    """

    records: int
    counts: dict[int, int]
    inputs: Inputs
    targets: Tensor
    batch_size: int
    text: bool = False


@torch.no_grad()
def examined(loader: Batches, device: torch.device, *, seed: int) -> ForgetSet:
    """Read the forget set once; the same on all ranks and in a resumed run."""
    batching = Batching(loader, device, needs_inputs=True, role=FORGET_SET)
    text = False
    chooser = torch.Generator().manual_seed(seed_of(seed, 4))
    counts: dict[int, int] = {}
    records = batch_size = 0
    kept: tuple[Tensor, Inputs, Tensor] | None = None
    loader = restarted(loader)
    own = generators(loader)
    with private_generators(own):
        seed_all(seed_of(seed, 3), own)
        for loaded in loader:
            batch = batching(loaded)
            inputs, targets = batch.whole_inputs, batch.targets
            if batch.sequences is not None:
                # What each rank reads of its own rows is not enough: all look at the same texts.
                inputs, targets = batching.texts(loaded)
                text = True
            records += len(targets)
            batch_size = max(batch_size, len(targets))
            if not text and not (targets.is_floating_point() or targets.is_complex()):
                targets = targets.long()  # of any integers, as `distruction.loop.labels` takes them
                labels, times = targets.unique(return_counts=True)
                for label, count in zip(labels.tolist(), times.tolist(), strict=True):
                    if targets.ndim == 1 or label != NO_LABEL:
                        counts[label] = counts.get(label, 0) + count
            # The records with the largest of random keys are a uniform draw without replacement.
            keys = torch.rand(len(targets), generator=chooser)
            if kept is not None:
                keys = torch.cat([kept[0], keys])
                targets = joined(kept[2], targets, IGNORED) if text else torch.cat([kept[2], targets])
                inputs = _joined(kept[1], inputs, text)
            best = keys.topk(min(EXAMPLES, len(keys))).indices.sort().values
            kept = keys[best], _rows(inputs, best), targets[best.to(targets.device)]
    if kept is None:
        raise UsageError("the forget set is empty, so there is nothing to forget")
    return ForgetSet(records, dict(sorted(counts.items())), kept[1], kept[2], batch_size, text)


def _rows(inputs: Inputs, rows: Tensor | slice) -> Inputs:
    return apply(lambda t: t[rows if isinstance(rows, slice) else rows.to(t.device)], inputs)


def _joined(a: Inputs, b: Inputs, text: bool = False) -> Inputs:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.cat([a, b])
    assert not isinstance(a, Tensor)
    assert not isinstance(b, Tensor)
    return {name: joined(t, b[name], 0) if text and t.ndim == 2 else torch.cat([t, b[name]]) for name, t in a.items()}


def batches_of(data: ForgetSet) -> Iterator[tuple[Inputs, Tensor]]:
    """The examples that were kept, in batches of the loader's size."""
    for start in range(0, len(data.targets), data.batch_size):
        rows = slice(start, start + data.batch_size)
        yield _rows(data.inputs, rows), data.targets[rows]


class Probability:
    """Mean over the forget set's examples of the probability that the model gives to what is to be forgotten.

    Of a language model's texts: the mean over the tokens that the labels ask for, given the true tokens before them.
    Of maps: the mean over the pixels that have a label.

    Args:
        model: in eval mode when it is called.
        data: of the forget set.
        labels: the classes to be forgotten; ``None``: each example's own label.
        features: where given, and active, each call also finds ``cosine``.

    Attributes:
        cosine: mean cosine similarity of the features of pairs with one label (`distruction.features.mean_cosine`).
    """

    cosine = 1.0

    def __init__(
        self,
        model: nn.Module,
        data: ForgetSet,
        labels: Sequence[int] | None,
        features: Features | None = None,
    ) -> None:
        self._model, self._data, self._labels, self._features = unwrapped(model), data, labels, features
        self._maps = is_map(data.targets) and not data.text

    @torch.no_grad()
    def __call__(self) -> float:
        """Its value now.

        Raises:
            UsageError: the model's output is no (batch, classes), or a label is none of these classes.
        """
        torch.clear_autocast_cache()
        reshard(self._model)
        values, seen = [], []
        features = self._features if self._features is not None and self._features.active else None
        classes = 0

        def answer(part: Inputs) -> Tensor:
            nonlocal classes
            logits = logits_of(call(self._model, part))
            classes = logits.shape[-1]
            return logits if features is None else torch.cat([logits, features.take()], dim=-1)

        for inputs, targets in batches_of(self._data):
            if self._data.text:
                values.append(self._of_tokens(inputs, targets))
                continue
            logits = distributed.by_rows(answer, inputs)
            if features is not None:
                logits, rows_of_features = logits[:, :classes], logits[:, classes:]
                seen.append(rows_of_features.float())
            if self._maps:
                pixels = self._known(*as_rows(self._checked(logits), targets))
                values.append(torch.stack([pixels.sum(), pixels.new_tensor(len(pixels))]))
                continue
            values.append(self._checked(logits))
        torch.clear_autocast_cache()
        reshard(self._model)
        if self._data.text:
            return torch.cat(values).mean().item()
        if self._maps:
            total, count = torch.stack(values).sum(dim=0).tolist()
            return float(total / max(count, 1.0))
        if seen:
            self.cosine = mean_cosine(torch.cat(seen), self._data.targets).item()
        return self._value(torch.cat(values))

    def _value(self, logits: Tensor) -> float:
        return self._known(logits, self._data.targets).mean().item()

    def _known(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The probability of what is to be forgotten, of each row."""
        p = logits.double().softmax(dim=-1)
        return (p.gather(-1, targets[:, None]) if self._labels is None else p[:, list(self._labels)]).sum(dim=-1)

    def _of_tokens(self, inputs: Inputs, labels: Tensor) -> Tensor:
        """The probability of each token that the texts ask for, on every rank."""
        assert not isinstance(inputs, Tensor)
        where = asked(labels, inputs.get("position_ids"), inputs.get("attention_mask"))
        own = labels[:, 1:].where(where, 0)

        def answered(part: Mapping[str, Tensor]) -> Tensor:
            tokens = part[OWN]
            logits = logits_of(call(self._model, {k: t for k, t in part.items() if k != OWN}))[:, :-1]
            return logits.double().log_softmax(dim=-1).gather(-1, tokens[..., None]).squeeze(-1)

        return distributed.by_rows(answered, {**inputs, OWN: own})[where].exp()

    def _checked(self, logits: Tensor) -> Tensor:
        if logits.ndim != (self._data.targets.ndim + 1 if self._maps else 2) or logits.shape[1] < 2:
            raise UsageError(
                f"the model's output has the shape {tuple(logits.shape)}, so that the probability of the labels, by "
                "which kl_weight='auto' goes, is not known: pass a number as kl_weight, or give (batch, classes) "
                "logits, of maps (batch, classes, ...)"
            )
        targets = self._data.targets
        if not self._data.counts:
            raise UsageError(
                f"targets must be a vector of int64 class numbers where kl_weight='auto' goes by them, not "
                f"{targets.dtype} {tuple(targets.shape)}: pass a number as kl_weight"
            )
        low, high = min(self._data.counts), max(self._data.counts)
        if low < 0 or high >= logits.shape[1]:
            raise UsageError(
                f"the labels run from {low} to {high}, but the model has {logits.shape[1]} classes "
                f"(0 to {logits.shape[1] - 1}); the forget set is not part of its label space"
            )
        return logits


class Known(Probability):
    """What an objective itself says of how much is known: its ``known(outputs, targets)``, in [0, 1], in the mean."""

    def __init__(self, model: nn.Module, data: ForgetSet, known: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(model, data, None)
        self._maps = False
        self._of = known

    def _checked(self, logits: Tensor) -> Tensor:
        return logits

    def _value(self, logits: Tensor) -> float:
        return self._of(logits, self._data.targets).double().mean().item()


class DualAscent:
    """Steers a run so that ``probability`` ends at ``level`` (a `distruction.loop.Controller`).

    Args:
        probability: v, looked at every `STEPS_BETWEEN_LOOKS` steps and at the end of each cycle, at the means.
        level: in (0, 1), what v should be at most.
        data_per_step: weight of the objective in data points to start from, with lambda = 1/2.
        most: upper bound of R, in data points.
        cycle: steps in which the step size decays to zero.
        margin: what the ascent aims at, as a share of the odds of the level.
        gently: start from the smallest R, aim at the level itself and end as soon as it holds: what is not asked for is
            left undone.
        least_pace: below 1 the rates follow the step size down in each cycle, to this factor: what the steps cannot
            follow does not wind R up. (Of several requests the earlier ones then come back a little, which is why it
            is 1.)

    Attributes:
        value: v at the last look.
        settled: whether the run ended because the level held.
        at_bound: whether R is at its upper bound.
    """

    def __init__(
        self,
        probability: Probability,
        *,
        level: float,
        data_per_step: float,
        most: float,
        cycle: int = CYCLE,
        margin: float = MARGIN,
        gently: bool = False,
        least_pace: float = 1.0,
    ) -> None:
        self._least_pace = least_pace
        self._probability, self.level, self._cycle, self._gently = probability, level, cycle, gently
        odds = (1.0 if gently else margin) * level / (1 - level)
        self._aim = odds / (1 + odds)
        self._falling = FALLING_GENTLY if gently else FALLING
        self._data_per_step = data_per_step
        self._least = math.log(data_per_step * (1 - LARGEST_WEIGHT) / LARGEST_WEIGHT)
        self._most = math.log(most)
        self.log_ratio = self._least if gently else math.log(data_per_step)
        self._followed = self.log_ratio
        self.value = self._before = 1.0
        self.settled = False

    @property
    def at_bound(self) -> bool:
        """Whether R is at its upper bound."""
        return self.log_ratio >= self._most

    def advice(self, done: int, steps: int) -> str:
        """What to do where the level is not reached."""
        if self.at_bound:
            return (
                "the objective weighs as much against the posterior as it may and the level is not reached: the "
                "posterior may be too narrow (prepare it with less evidence), or choose another objective or a higher "
                "level"
            )
        if done < steps:
            return "the callback ended the run before the level was reached: let it go on"
        return f"the {steps} steps ended before the level was reached: allow more steps, or choose a higher level"

    def weights(self) -> tuple[float, float]:
        """lambda and the data points of the objective that make R."""
        ratio = math.exp(self.log_ratio)
        weight = self._data_per_step / (ratio + self._data_per_step)
        if weight >= SMALLEST_WEIGHT:
            return weight, self._data_per_step
        return SMALLEST_WEIGHT, ratio * SMALLEST_WEIGHT / (1 - SMALLEST_WEIGHT)

    def before_step(self, optimizer: BGD, history: list[Step]) -> None:
        """Set lambda and the data points of the objective."""
        weight, data = self.weights()
        for group in optimizer.param_groups:
            group["kl_weight"], group["data_per_step"] = weight, data

    def after_step(self, optimizer: BGD, history: list[Step]) -> bool:
        """One step of the ascent; whether the level holds, at the end of a cycle or, gently, at any look."""
        ends = len(history) % self._cycle == 0
        looks = ends or len(history) % STEPS_BETWEEN_LOOKS == 0
        if looks:
            self._before, self.value = self.value, self._probability()
        excess = min(max(self._size(self.value) - self._size(self._aim), -CLIP), CLIP)
        step_size = cosine((len(history) - 1) % self._cycle, self._cycle)
        pace = max(self._least_pace, step_size)
        if excess < 0:
            self.log_ratio += pace * RATE_DOWN * excess
        elif self._size(self.value) >= self._size(self._before) + math.log(self._falling):
            self.log_ratio += pace * RATE_UP * excess
        self.log_ratio = min(max(self.log_ratio, self._least), self._most)
        self.settled = (looks if self._gently else ends) and self.value <= self.level
        if step_size >= FOLLOWED:
            self._followed = self.log_ratio
        elif ends and not self.settled:
            self.log_ratio = min(self.log_ratio, self._followed)
        return self.settled

    def _size(self, value: float) -> float:
        """log v; near 1, where all that changes is 1 - v, the log-odds, which for small v are the same."""
        value = min(max(value, 1e-30), 1 - 1e-12)
        return math.log(value / (1 - value)) if self.level > HALF else math.log(value)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "log_ratio": self.log_ratio,
            "value": self.value,
            "value_before": self._before,
            "followed": self._followed,
            "settled": self.settled,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.log_ratio, self.value, self.settled = state["log_ratio"], state["value"], state["settled"]
        self._before, self._followed = state["value_before"], state.get("followed", state["log_ratio"])
