"""Teachers that are the model with other weights, called without a copy of the model.

A teacher is called ``(inputs) -> logits``, without a gradient and in eval mode. Under several ranks each is given the
whole batch, computes its own rows and gathers the others', as the loop does for the loss. An answer is kept for the
next call with the same inputs, so that an update's Monte Carlo samples share one pass.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from . import distributed
from .errors import UsageError
from .loop.batches import Inputs, call, keywords
from .loop.tokens import Sequences
from .modules import deterministic, learnable, logits_of, unwrapped
from .posterior import Posterior
from .sharding import is_sharded, local, reshard

COPIES, NOISE = 8, 0.3
"""Noisy copies of each input for `NearMeans`, and their noise."""


class SameModel(ABC):
    """The model with weights that a subclass gives, which its parameters may not hold."""

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrapped(model)
        self._kept: tuple[Inputs, list[int], Tensor] | None = None

    @torch.no_grad()
    def __call__(self, inputs: Inputs) -> Tensor:
        """Logits of the batch."""
        versions = [t._version for t in ([inputs] if isinstance(inputs, Tensor) else inputs.values())]
        if self._kept is None or self._kept[0] is not inputs or self._kept[1] != versions:
            with ExitStack() as stack:
                if any(module.training for module in self._model.modules()):
                    stack.enter_context(deterministic(self._model))
                # A language model's batch is this rank's own, and only tokens that are asked for are answered for.
                answer = (
                    inputs.answers(self._answer(inputs))
                    if isinstance(inputs, Sequences)
                    else distributed.by_rows(self._answer, inputs)
                )
                self._kept = inputs, versions, answer
        return self._kept[2]

    def _with(self, weights: dict[str, Tensor], inputs: Inputs) -> Tensor:
        positional, named = ((inputs,), {}) if isinstance(inputs, Tensor) else ((), keywords(self._model, inputs))
        return logits_of(torch.func.functional_call(self._model, weights, positional, named))

    @abstractmethod
    def _answer(self, inputs: Inputs) -> Tensor:
        """Logits of these rows."""


class AtMeans(SameModel):
    """What the model predicts at the means of a posterior, such as before it forgot, whatever its parameters hold now.

    An ordinary model is called with the means in the place of its parameters (``torch.func.functional_call``): no
    memory where they are in the parameters' type on their device, else that of the restored means during the pass. In
    a model sharded by ``fully_shard`` the means stand in the shards during the pass, and the shards' values beside.

    Args:
        model: the model; wrappers are taken off.
        posterior: over its learnable parameters; everything else is as the model has it.

    Raises:
        PosteriorError: the posterior belongs to another model.
    """

    def __init__(self, model: nn.Module, posterior: Posterior) -> None:
        posterior.check(model)
        super().__init__(model)
        self._posterior = posterior

    def _answer(self, inputs: Inputs) -> Tensor:
        reshard(self._model)
        params = learnable(self._model)
        if any(is_sharded(p) for p in params.values()):
            with holding_means(self._model, self._posterior):
                return logits_of(call(self._model, inputs))
        # By the names within the module, which a wrapper around a part of it makes others than the posterior's.
        names = {id(p): name for name, p in params.items()}
        weights = {
            within: self._posterior.fetch(names[id(p)], p.device)[0].to(p.dtype)
            for within, p in self._model.named_parameters()
            if id(p) in names
        }
        return self._with(weights, inputs)


class NearMeans(AtMeans):
    """The mean prediction of `AtMeans` over noisy copies of the inputs.

    What a model learnt by heart holds at the record itself; close by it answers as it does to other examples. The noise
    is Gaussian, `NOISE` of each channel's standard deviation over the batch, the same at each call. Inputs that are no
    tensor of real numbers are answered to as they are.
    """

    _answered: tuple[Tensor, int, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, inputs: Inputs) -> Tensor:
        """Logarithms of the mean probabilities."""
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.ndim < 2:
            return super().__call__(inputs)
        if self._answered is None or self._answered[0] is not inputs or self._answered[1] != inputs._version:
            generator = torch.Generator().manual_seed(0)
            others = [d for d in range(inputs.ndim) if d != 1]
            std = NOISE * inputs.std(dim=others, correction=0, keepdim=True)
            answers = []
            for _ in range(COPIES):
                copy = inputs + std * torch.randn(inputs.shape, generator=generator).to(inputs)
                answers.append(super().__call__(copy).float().log_softmax(dim=-1))
            self._answered = inputs, inputs._version, torch.stack(answers).logsumexp(dim=0) - math.log(COPIES)
        return self._answered[2]


class Randomised(SameModel):
    """What the model predicts with random weights, drawn from a fixed seed: an incompetent teacher.

    They take as much memory as the model's. Modules draw theirs by ``reset_parameters``; a parameter that this leaves
    as it was, such as a class token or one behind a parametrization, is drawn from a normal distribution with the
    mean and the standard deviation of its values.

    Args:
        model: the model; it ends as it was.
        posterior: of the model, so that a resumed run, whose parameters have moved, draws the same.

    Raises:
        PosteriorError: the posterior belongs to another model.
        UsageError: the model is sharded.
    """

    def __init__(self, model: nn.Module, posterior: Posterior) -> None:
        posterior.check(model)
        super().__init__(model)
        if any(is_sharded(p) for p in self._model.parameters()):
            raise UsageError(
                "bad-teacher draws new weights for the whole model, which is sharded: pass "
                "objective=Distillation(teacher) with a randomly initialised teacher, sharded as well"
            )
        self._weights = _drawn_anew(self._model, posterior)

    def _answer(self, inputs: Inputs) -> Tensor:
        return self._with(self._weights, inputs)


@contextmanager
def holding_means(model: nn.Module, posterior: Posterior) -> Iterator[None]:
    """The parameters hold the posterior's means inside, and what they held before outside, whatever happens inside."""
    reshard(model)
    held = {name: local(p.detach()).clone() for name, p in learnable(model).items()}
    try:
        posterior.mean_(model)
        yield
    finally:
        reshard(model)  # its parameters are the shards again
        with torch.no_grad():
            for name, p in learnable(model).items():
                local(p).copy_(held[name])


@torch.no_grad()
def _drawn_anew(model: nn.Module, posterior: Posterior) -> dict[str, Tensor]:
    """Parameters and buffers of the model at the posterior's means, with each parameter drawn anew, of the seed 0."""
    names = {id(p): name for name, p in learnable(model).items()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    held = {name: t.data for name, t in tensors.items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            for t in tensors.values():
                known = id(t) in names
                t.data = posterior.fetch(names[id(t)], t.device)[0].to(t.dtype, copy=True) if known else t.data.clone()
            base = {name: t.data.clone() for name, t in model.named_parameters()}
            for module in model.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
            drawn = {name: t.data for name, t in tensors.items()}
        finally:
            for name, t in tensors.items():
                t.data = held[name]
        for name, values in base.items():
            if torch.equal(drawn[name], values) and not (values == values.flatten()[:1]).all():
                drawn[name].normal_(values.float().mean().item(), values.float().std().item())
    return drawn
