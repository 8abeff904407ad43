"""What a model's output says of its targets: negative log-likelihoods per example, and targets drawn from it.

The Gauss-Newton statistic squares the gradient of a signed sum of per-example losses,

    L = 1 / sqrt(B) * sum_n s_n * loss_n(theta, y_n),   s_n = +-1 with equal chance, y_n ~ p(y | x_n, theta),

because the signs make the cross terms of the square vanish in the mean and, of a target drawn from the model's own
prediction, the square has the Fisher information as its mean:

    E[(dL/dtheta)**2] = 1 / B * sum_n E[(d loss_n / dtheta)**2],

the diagonal of the Fisher, which for these likelihoods is the generalized Gauss-Newton matrix, averaged over the batch
(Martens, "New Insights and Perspectives on the Natural Gradient Method", arXiv 1412.1193, sections 8 and 9). Where a
batch is spread over ranks, B is the whole batch: the ranks' gradients are added first and squared then, so that the
mean above is that of one process with the same batch. Squares of the ranks' own sums, averaged, have the same mean.

**Next tokens.** A text's tokens are examples of their own (`signed_tokens`): y_t ~ p(y | x_1 .. x_t, theta) is drawn at
each position with the given text as the inputs, not the tokens drawn before. Given the inputs, the gradients x_t of
-log p(y_t) are then independent and each has the mean zero, so that E[(sum_t x_t)**2] = sum_t E[x_t**2]: a sign per
text and a sign for each token are both unbiased for the Fisher of the given texts. They have the same variance too,

    Var[(sum_t s_t x_t)**2] = 2 (sum_t E[x_t**2])**2 + sum_t (E[x_t**4] - 3 E[x_t**2]**2),

as even moments do not see a sign. The choice matters where the targets are given (`Given`): their gradients have a
mean other than zero, and one sign per text would square the text's sum, with cross terms between its tokens. So the
sign is the token's.
"""

import copy
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UsageError


@runtime_checkable
class Likelihood(Protocol):
    """p(target | output) of a batch; outputs have the batch as their first dimension."""

    def sample_targets(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """One target per example, drawn from the model's own prediction."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(batch,) negative log-likelihoods, in nats."""


def check_classes(outputs: Tensor) -> None:
    """Refuse outputs that class numbers have no meaning for.

    Raises:
        UsageError: they are not (batch, classes) with two classes or more.
    """
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise UsageError(
            f"the model gives logits of shape {tuple(outputs.shape)}, and cross entropy wants (batch, classes) with at "
            "least two classes; of one logit per example pass likelihood=Bernoulli(), of others a loss_fn of their own"
        )


class Categorical:
    """Classification: one of C classes, from logits (batch, C) and labels (batch,) of int64.

    Of maps, logits (batch, C, ...) and labels (batch, ...), preparation takes each pixel for an example, as it does
    with a text's tokens; those labelled -100 are left out.
    """

    def sample_targets(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Labels (batch,), by the Gumbel-max trick, which waits for nothing."""
        uniform = torch.rand(outputs.shape, generator=generator, device=outputs.device)
        # -log(-log u), with u of (0, 1): a zero would win or lose for sure.
        gumbel = -(-uniform.clamp(min=torch.finfo(uniform.dtype).tiny).log()).log()
        return (outputs.float() + gumbel).argmax(dim=-1)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """-log softmax(outputs)[target]."""
        check_classes(outputs)
        return F.cross_entropy(outputs, targets, reduction="none")


class Bernoulli:
    """Several labels, each there or not: logits (batch, labels) and targets of the same shape with 0 and 1.

    One logit per example, (batch,), is binary classification.
    """

    def sample_targets(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Zeros and ones of the outputs' shape."""
        uniform = torch.rand(outputs.shape, generator=generator, device=outputs.device)
        return (uniform < outputs.sigmoid()).to(outputs.dtype)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The sum over the labels of their binary cross entropies."""
        _check_shapes(outputs, targets, "Bernoulli")
        return _sum(F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none"))

    def accuracy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The share of an example's labels that are more likely right than not, (batch,)."""
        right = ((outputs > 0) == (targets > 0.5)).float()
        return right.flatten(1).mean(dim=1) if right.ndim > 1 else right


class Gaussian:
    """Regression: target = output + noise * N(0, 1), outputs and targets of one shape, (batch,) or (batch, ...).

    Args:
        noise: standard deviation of the targets around the output, in their unit, > 0. It decides how much the data
            says about the weights.
    """

    def __init__(self, noise: float) -> None:
        if not 0 < noise < math.inf:
            raise UsageError(f"noise must be > 0 and finite, not {noise}; give the targets' standard deviation")
        self.noise = noise

    def sample_targets(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Targets of the outputs' shape."""
        normal = torch.randn(outputs.shape, generator=generator, device=outputs.device, dtype=outputs.dtype)
        return outputs + self.noise * normal

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """((target - output) / noise)**2 / 2 + log(noise * sqrt(2 pi)), summed over all but the batch."""
        _check_shapes(outputs, targets, "Gaussian")
        return _sum(((targets - outputs) / self.noise).square() / 2 + math.log(self.noise * math.sqrt(2 * math.pi)))


class Given:
    """A bare loss function as a likelihood that is asked about the given targets alone: the empirical Fisher.

    It draws no targets. Where the model fits its data, the given targets' gradients are small however precisely the
    weights must be known, so the std comes out too wide; at samples of the weights less so than at the means.

    Args:
        loss_fn: ``(outputs, targets) -> losses``, one per example; or one that knows ``reduction="none"``.
    """

    def __init__(self, loss_fn: Callable[..., Any]) -> None:
        self._loss_fn = _unreduced(loss_fn)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each example; the mean of a loss with further dimensions.

        Raises:
            UsageError: the function gives a mean alone.
        """
        losses = self._loss_fn(outputs, targets)
        if not isinstance(losses, Tensor) or losses.ndim == 0 or len(losses) != len(targets):
            found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise UsageError(
                f"the Gauss-Newton statistic needs one loss per example, ({len(targets)},), and loss_fn gives {found}: "
                'let it return its losses without the mean or take reduction="none", or pass likelihood=, or use '
                'method="bgd"'
            )
        return losses.flatten(1).mean(dim=1) if losses.ndim > 1 else losses


def signed(likelihood: Likelihood | Given, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """The loss whose squared gradient is the Gauss-Newton statistic: see the module's head.

    Args:
        outputs: of the whole batch, also where it is spread over ranks.
        targets: the given ones, for a likelihood that draws none.
        generator: on the outputs' device, in the same state on every rank.
    """
    if isinstance(likelihood, Likelihood):
        with torch.no_grad():
            targets = likelihood.sample_targets(outputs.detach(), generator)
    losses = likelihood.losses(outputs, targets)
    if losses.shape != (len(outputs),):
        raise UsageError(
            f"{type(likelihood).__name__}.losses must return one loss per example, ({len(outputs)},), not "
            f"{tuple(losses.shape)}"
        )
    signs = torch.randint(0, 2, losses.shape, generator=generator, device=losses.device)
    return (losses * (2 * signs - 1)).sum() / math.sqrt(len(losses))


def signed_tokens(
    likelihood: Likelihood | Given, logits: Tensor, tokens: Tensor, start: int, total: int, generator: torch.Generator
) -> Tensor:
    """The same of a language model: this rank's tokens, each with a sign, as the mean that its share is taken of.

    Each token takes one uniform number and one sign of the whole batch's, in the batch's order: neither padding nor the
    ranks change what is drawn.

    Args:
        logits: (tokens, vocabulary) of this rank.
        tokens: the given ones, (tokens,).
        start, total: where they stand among the whole batch's tokens, and how many these are.
    """
    numbers = torch.rand(2, total, generator=generator, device=logits.device, dtype=torch.float64)
    uniform, sign = numbers[:, start : start + len(tokens)]
    if isinstance(likelihood, Categorical):
        tokens = _drawn(logits.detach(), uniform)
    elif isinstance(likelihood, Likelihood):
        raise UsageError(
            f"{type(likelihood).__name__} is no likelihood of next tokens: leave likelihood out, or pass Categorical()"
        )
    losses = likelihood.losses(logits, tokens)
    signed: Tensor = losses * (2 * (sign < 0.5) - 1).to(losses.dtype)
    return signed.mean() * math.sqrt(total)


TOKENS_AT_ONCE = 256
"""Tokens whose distributions are summed up in float64 at a time."""


@torch.no_grad()
def _drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    """Classes by the inverse of the cumulative distribution at ``uniform``, (tokens,)."""
    drawn = []
    for part, u in zip(logits.split(TOKENS_AT_ONCE), uniform.split(TOKENS_AT_ONCE), strict=True):
        cumulative = part.double().softmax(dim=-1).cumsum(dim=-1)
        # Of the last value, which rounding leaves near 1.
        drawn.append(torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None], right=True).squeeze(-1))
    return torch.cat(drawn).clamp(max=logits.shape[-1] - 1)


def _unreduced(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """``loss_fn`` without its mean, where it has a way to say so."""
    if isinstance(loss_fn, nn.Module) and hasattr(loss_fn, "reduction"):
        loss_fn = copy.copy(loss_fn)
        loss_fn.reduction = "none"  # type: ignore[assignment]  # a module may have attributes
        return loss_fn
    try:
        known = "reduction" in inspect.signature(loss_fn).parameters
    except ValueError:  # of a function in C
        known = False
    return functools.partial(loss_fn, reduction="none") if known else loss_fn


def _check_shapes(outputs: Tensor, targets: Tensor, name: str) -> None:
    if outputs.shape != targets.shape:
        raise UsageError(
            f"{name} takes targets of the output's shape {tuple(outputs.shape)}, not {tuple(targets.shape)}; reshape "
            "the targets in the data set or squeeze the model's output"
        )


def _sum(losses: Tensor) -> Tensor:
    return losses.flatten(1).sum(dim=1) if losses.ndim > 1 else losses
