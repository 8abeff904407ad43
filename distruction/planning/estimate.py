"""The bytes of each phase of a run: what stays is counted, what comes and goes is traced."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import objectives
from ..compression import STORAGE
from ..errors import UsageError
from ..modules import learnable
from ..ops.reference.codes import BLOCK
from ..optim import STREAMED_ELEMENTS
from .free import free_memory
from .tracing import empty, peak_of_a_pass

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types of parameters by name."""


@dataclass(frozen=True)
class Options:
    """What decides how much memory a run takes.

    Attributes:
        batch_size: examples in a forward pass.
        mc_samples: Monte Carlo samples of an update. One, as of Gauss-Newton, or none, as of forgetting at the means,
            keeps no statistics; an antithetic pair m1, more of them m2 too.
        release_gradients: see `distruction.BGD`.
        prior_std, prior_mean: how the prior of `forget` is kept; see `distruction.Posterior.compress`.
        offload_prior: the prior stays in the CPU's memory.
        objective: of `forget`, a name in `distruction.objectives.REGISTRY`; some hold other weights for
            the whole model.
    """

    batch_size: int = 64
    mc_samples: int = 1
    release_gradients: bool = False
    prior_std: str = "float32"
    prior_mean: str = "float32"
    offload_prior: bool = False
    objective: str = objectives.DEFAULT


@dataclass(frozen=True)
class Phase:
    """Memory of one phase, in bytes, beyond what Python and its libraries take.

    Attributes:
        name: prepare or forget.
        resident: what stays through the phase, by name.
        gradients: of all parameters; 0 where the backward pass releases them.
        passing: most that activations and gradients hold at one time in a forward and backward pass.
        updating: most that gradients and temporary tensors hold in an update.
        host: what is kept in the CPU's memory beside, where the device is another.
    """

    name: str
    resident: dict[str, int]
    gradients: int
    passing: int
    updating: int
    host: int

    @property
    def peak(self) -> int:
        """The most that the phase holds at one time on the device."""
        return sum(self.resident.values()) + max(self.passing, self.updating)


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes:
        model: its name.
        parameters: number of parameter elements with a posterior.
        device: where the run will be.
        options: of the run.
        phases: of `prepare` and `forget`.
        available: free bytes there now; ``None`` where it cannot be known.
        advice: changes and the peak, in bytes, of the larger phase after each; empty where the run fits.
    """

    model: str
    parameters: int
    device: str
    options: Options
    phases: tuple[Phase, Phase]
    available: int | None
    advice: tuple[tuple[str, int], ...]

    @property
    def peak(self) -> int:
        """The most that either phase holds at one time."""
        return max(phase.peak for phase in self.phases)

    @property
    def fits(self) -> bool | None:
        """Whether it is free; ``None`` where that cannot be known."""
        return None if self.available is None else self.peak <= self.available


def plan(
    model: nn.Module | str,
    input_shape: Sequence[int],
    *,
    batch_size: int = 64,
    num_classes: int = 1000,
    length: int | None = None,
    dtype: str = "float32",
    mc_samples: int = 1,
    release_gradients: bool = False,
    prior_std: str = "float32",
    prior_mean: str = "float32",
    offload_prior: bool = False,
    objective: str = objectives.DEFAULT,
    device: str = "cpu",
    available: int | None = None,
) -> Plan:
    """What `prepare` and `forget` will need in memory for a model, without allocating it.

    Args:
        model: ``vit-micro`` or a timm model's name, or a module (on any device, ``meta`` included; not changed), whose
            parameters with ``requires_grad`` get a posterior.
        input_shape: of one example, channels first: (3, 224, 224).
        batch_size: examples in a forward pass.
        num_classes: of a model given by name.
        length: tokens of a text of a causal language model, in place of ``input_shape``. Its logits, (batch, length,
            vocabulary), are counted with the activations, of which they are often most.
        dtype: of the parameters: float32, bfloat16 or float16. The posterior is float32 in any case.
        mc_samples, release_gradients, prior_std, prior_mean, offload_prior, objective: see `Options`.
        device: where it will run; need not exist.
        available: free bytes there; ``None`` asks the device.

    Raises:
        UsageError: an option is out of range, or the model cannot take a batch of that shape.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown; choose {', '.join(DTYPES)}")
    options = Options(batch_size, mc_samples, release_gradients, prior_std, prior_mean, offload_prior, objective)
    _check(options)
    if length is not None and length < 2:
        raise UsageError(f"length must be >= 2 tokens, not {length}: a text's first token is asked for by nobody")
    if len(input_shape) != 3 and isinstance(model, str):
        raise UsageError(f"input_shape must be (channels, height, width), not {tuple(input_shape)}")
    name = model if isinstance(model, str) else type(model).__name__
    if isinstance(model, str):
        model = empty(model, num_classes=num_classes, in_chans=input_shape[0], img_size=input_shape[-1])
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    parameters = [p for p in learnable(model).values()]
    if not parameters:
        raise UsageError("the model has no parameter with requires_grad, so there is nothing to prepare")

    of_one = input_shape if length is None else (length,)

    @functools.cache
    def passing(batch: int, release: bool) -> int:
        shape = (batch, *of_one)
        return peak_of_a_pass(model, shape, dtype=DTYPES[dtype], release_gradients=release, tokens=length is not None)

    def phases(o: Options) -> tuple[Phase, Phase]:
        return _phases(model, parameters, DTYPES[dtype], where, o, passing(o.batch_size, o.release_gradients))

    found = phases(options)
    free = free_memory(where) if available is None else available
    result = Plan(name, sum(p.numel() for p in parameters), str(where), options, found, free, ())
    if result.fits is not False:
        return result
    return replace(result, advice=tuple(_advice(options, where, lambda o: max(p.peak for p in phases(o)), free)))


def _check(options: Options) -> None:
    if options.batch_size < 1:
        raise UsageError(f"batch_size must be >= 1, not {options.batch_size}")
    if options.mc_samples < 1:
        raise UsageError(f"mc_samples must be >= 1, not {options.mc_samples}")
    for what, storage, allowed in (("std", options.prior_std, STORAGE), ("mean", options.prior_mean, STORAGE[:2])):
        if storage not in allowed:
            raise UsageError(f"prior_{what}={storage!r} is unknown; choose {', '.join(allowed)}")
    objectives.entry(options.objective)


def _phases(
    model: nn.Module,
    parameters: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
    options: Options,
    passing: int,
) -> tuple[Phase, Phase]:
    elements = [p.numel() for p in parameters]
    n = sum(elements)
    resident = {
        "parameters": _nbytes(model.parameters(), dtype),
        "buffers": _nbytes(model.buffers(), dtype),
        "posterior mean": 4 * n,
        "posterior std": 4 * n,
    }
    if options.mc_samples > 1:
        resident["statistics m1"] = 4 * n
    if options.mc_samples > 2:
        resident["statistics m2"] = 4 * n
    # A released gradient is taken by itself, so that no more than one tensor is there.
    taken = max(elements) if options.release_gradients else n
    gradients = taken * dtype.itemsize
    prior = {
        "prior mean": sum(_kept(k, options.prior_mean) for k in elements),
        "prior std": sum(_kept(k, options.prior_std) for k in elements),
    }
    copied = resident["parameters"] + resident["buffers"]
    objective = objectives.entry(options.objective)
    teacher = {"teacher": copied} if objective.copies else {}
    streamed = options.offload_prior and device.type != "cpu"
    # Means that are there as the parameters are serve a teacher's pass as they are.
    as_they_are = options.prior_mean == "float32" and dtype == torch.float32 and not streamed
    taught = n * dtype.itemsize if objective.teaches and not (objective.copies or as_they_are) else 0
    restored = _restored(elements, options, streamed)
    host = 0 if device.type == "cpu" else 8 * n  # the posterior on its way from or to a file
    return (
        Phase("prepare", resident, 0 if options.release_gradients else gradients, passing, gradients, host),
        Phase(
            "forget",
            resident | ({} if streamed else prior) | teacher,
            0 if options.release_gradients else gradients,
            passing + taught + (restored if options.release_gradients else 0),
            gradients + restored,
            host + (sum(prior.values()) if streamed else 0),
        ),
    )


def _nbytes(tensors: Iterable[Tensor], dtype: torch.dtype) -> int:
    """Bytes of tensors once those of floating point have the dtype."""
    return sum(t.numel() * (dtype if t.is_floating_point() else t.dtype).itemsize for t in tensors)


def _kept(elements: int, storage: str) -> int:
    """Bytes that a tensor of a prior takes."""
    if storage == "log8":
        return elements + 8 * math.ceil(elements / BLOCK)
    return elements * DTYPES[storage].itemsize


def _restored(elements: Sequence[int], options: Options, streamed: bool) -> int:
    """Bytes of the piece of the prior that an update moves or restores to float32 at a time."""
    kept = (options.prior_mean, options.prior_std)
    largest = max(elements)
    piece = largest if options.release_gradients else min(sum(elements), max(STREAMED_ELEMENTS, largest))
    if options.prior_std == "log8":  # read as it is stored
        return sum(_kept(piece, storage) for storage in kept) if streamed else 0
    each = [4 if streamed or storage != "float32" else 0 for storage in kept]
    moved = sum(_kept(piece, storage) for storage in kept if storage != "float32") if streamed else 0
    return piece * sum(each) + moved


def _advice(
    options: Options, device: torch.device, peak: Callable[[Options], int], free: int | None
) -> list[tuple[str, int]]:
    """Changes, one after another, until it fits or nothing is left to change."""
    changes: list[tuple[str, dict[str, Any]]] = [
        ("release_gradients=True", {"release_gradients": True}),
        ("a compressed prior (Posterior.compress)", {"prior_std": "log8"}),
    ]
    if device.type != "cpu":
        changes.append(("offload_prior=True", {"offload_prior": True}))
    batch = options.batch_size
    while batch > 1:
        batch = max(1, batch // 4)
        changes.append((f"batch_size={batch}", {"batch_size": batch}))
    changes.append(("mc_samples=1 (noisier steps)", {"mc_samples": 1}))
    changes.append(("means of the prior in bfloat16", {"prior_mean": "bfloat16"}))
    found: list[tuple[str, int]] = []
    now = peak(options)
    for title, change in changes:
        changed = replace(options, **change)
        after = peak(changed)
        if after < 0.99 * now:
            options, now = changed, after
            found.append((title, now))
        if free is not None and now <= free:
            break
    return found
