"""The ops of the library, registered with PyTorch as ``torch.ops.distruction.*``.

Each op takes lists of tensors, a whole model per call, mutates what its schema marks, and is served by the
backend that `distruction.ops.backends` names for the device, or by the one passed as ``backend``.

The functions here take the types of `distruction.ops.calls`, as the backends do. The registered ops take the same
arguments one by one, in the order of their schemas, since `torch.library` knows no structures.

``param``, ``out`` and ``grad`` are the parameters and gradients, float32, bfloat16 or float16, shaped as the state.
"""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import BackendUnavailable
from .backends import AUTO, ENVIRONMENT, MODULES, resolve, unavailable
from .calls import Amp, Draws, Rule, State
from .checks import check_codes, check_draws, check_evidence, check_lists, check_state, check_statistics, served

__all__ = [
    "AUTO",
    "ENVIRONMENT",
    "MODULES",
    "Amp",
    "BackendUnavailable",
    "Draws",
    "Rule",
    "State",
    "accumulate",
    "gauss_newton",
    "gaussian_kl",
    "resolve",
    "sample",
    "step",
    "unavailable",
]


def _draws(counters: str = "Tensor") -> tuple[str, ...]:
    flags = ("bool antithetic", "bool stochastic_rounding")
    return "int[] offsets", "int[] streams", "int seed", f"{counters} counters", *flags


_PRIOR = ("Tensor[] prior_mean", "Tensor[] prior_std")
_BACKEND = 'str backend="auto"'
_AMP = ("Tensor? grad_scale=None", "Tensor? found_inf=None", _BACKEND)
_SCHEMAS = {
    "sample": (("Tensor(a!)[] out", "Tensor[] mean", "Tensor[] std", *_draws(), _BACKEND), "()"),
    "accumulate": (
        (
            *("Tensor(a!)[] param", "Tensor(b!)[] m1", "Tensor(c!)[] m2", "Tensor[] grad"),
            *("Tensor[] mean", "Tensor[] std", *_draws("Tensor(d!)"), *_AMP),
        ),
        "()",
    ),
    "step": (
        (
            *("Tensor(a!)[] param", "Tensor(b!)[] mean", "Tensor(c!)[] std", "Tensor[] grad"),
            *("Tensor[] m1", "Tensor[] m2", *_PRIOR),
            *("Tensor[] prior_codes", "Tensor[] prior_low", "Tensor[] prior_step"),
            *("Tensor lr", "Tensor kl_weight", "float loss_scale", *_draws("Tensor(d!)")),
            *("float max_mean_step", "float max_log_std_step", "float max_std", "bool learn_mean", "bool learn_std"),
            *_AMP,
        ),
        "Tensor",
    ),
    "gauss_newton": (
        (
            *("Tensor(a!)[] param", "Tensor(b!)[] std", "Tensor[] grad", "Tensor[] mean", "float evidence"),
            *(*_draws("Tensor(c!)"), *_AMP),
        ),
        "()",
    ),
    # Keyword-only: torch 2.8's autograd loses count of positional arguments left at their default.
    "gaussian_kl": (("Tensor[] mean", "Tensor[] std", *_PRIOR, "*", _BACKEND), "(Tensor, Tensor[], Tensor[])"),
}
"""By op: its arguments in order, and what it returns."""

_library = torch.library.Library("distruction", "DEF")
for _name, (_arguments, _returns) in _SCHEMAS.items():
    _library.define(f"{_name}({', '.join(_arguments)}) -> {_returns}", tags=(torch.Tag.pt2_compliant_tag,))

_NAMES = {
    op: tuple(argument.split("=")[0].split()[-1] for argument in arguments) for op, (arguments, _) in _SCHEMAS.items()
}
_Part = TypeVar("_Part", State, Draws, Rule, Amp)
_FIELDS: dict[type, tuple[str, ...]] = {part: tuple(f.name for f in fields(part)) for part in (State, Draws, Rule, Amp)}


class _Given(dict[str, Any]):
    """The flat arguments of a call by name; PyTorch leaves out those at the end that are the schema's defaults."""

    def __init__(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(zip(_NAMES[op], args), **kwargs)  # noqa: B905

    def part(self, kind: type[_Part]) -> _Part:
        return kind(**{name: self[name] for name in _FIELDS[kind] if name in self})

    @property
    def backend(self) -> str:
        name: str = self.get("backend", "auto")
        return name


def _flat(op: str, *parts: State | Draws | Rule | Amp, **others: Any) -> Any:
    """Call a registered op with the arguments that its schema names."""
    given = others
    for part in parts:
        # One by one: torch.compile of PyTorch 2.8 traces no vars() of a frozen dataclass.
        for name in _FIELDS[type(part)]:
            given[name] = getattr(part, name)
    return getattr(torch.ops.distruction, op)(*[given[name] for name in _NAMES[op]])


# --- the registered ops: unpacked, checked and handed to a backend ------------------------------------


def _sample(*args: Any, **kwargs: Any) -> None:
    given = _Given("sample", args, kwargs)
    state, draws = given.part(State), given.part(Draws)
    check_state(state)
    check_lists(state.mean, out=given["out"])
    check_draws(state, draws)
    if state.mean:
        served(given.backend, draws.counters.device, state, out=given["out"]).sample(given["out"], state, draws)


def _accumulate(*args: Any, **kwargs: Any) -> None:
    given = _Given("accumulate", args, kwargs)
    state, draws, param, grad = given.part(State), given.part(Draws), given["param"], given["grad"]
    check_statistics(state, draws)
    check_lists(state.mean, param=param, grad=grad)
    check_draws(state, draws)
    if state.mean:
        backend = served(given.backend, draws.counters.device, state, param=param, grad=grad)
        backend.accumulate(param, grad, state, draws, given.part(Amp))


def _step(*args: Any, **kwargs: Any) -> Tensor:
    given = _Given("step", args, kwargs)
    state, draws, param, grad = given.part(State), given.part(Draws), given["param"], given["grad"]
    if state.prior_codes:
        check_state(state)
        check_codes(state, draws)
    else:
        check_state(state, *(["prior_mean", "prior_std"] if state.prior_mean or state.prior_std else []))
    check_lists(state.mean, param=param, grad=grad)
    if state.m1 or state.m2:
        check_statistics(state, draws)
    check_draws(state, draws)
    if not state.mean:
        return torch.zeros((), dtype=torch.float64, device=draws.counters.device)
    backend = served(given.backend, draws.counters.device, state, param=param, grad=grad)
    return backend.step(param, grad, state, draws, given.part(Rule), given.part(Amp))


def _gauss_newton(*args: Any, **kwargs: Any) -> None:
    given = _Given("gauss_newton", args, kwargs)
    state, draws, param, grad = given.part(State), given.part(Draws), given["param"], given["grad"]
    check_evidence(given["evidence"])
    check_state(state)
    check_lists(state.mean, param=param, grad=grad)
    check_draws(state, draws)
    if state.mean:
        backend = served(given.backend, draws.counters.device, state, param=param, grad=grad)
        backend.gauss_newton(param, grad, state, draws, math.sqrt(given["evidence"]), given.part(Amp))


def _gaussian_kl(*args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    given = _Given("gaussian_kl", args, kwargs)
    state = given.part(State)
    if not state.mean:
        raise ValueError("gaussian_kl needs at least one tensor")
    check_state(state, "prior_mean", "prior_std")
    return served(given.backend, state.mean[0].device, state).gaussian_kl(state)


for _name, _impl in {
    "sample": _sample,
    "accumulate": _accumulate,
    "step": _step,
    "gauss_newton": _gauss_newton,
    "gaussian_kl": _gaussian_kl,
}.items():
    _library.impl(_name, _impl, "CompositeExplicitAutograd")


# --- what a compiler is told of them --------------------------------------------------------------------


def _checked(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> State:
    given = _Given(op, args, kwargs)
    state = given.part(State)
    others = {name: given[name] for name in ("out", "param", "grad") if name in given}
    others_shaped = ("mean", "prior_low", "prior_step")
    given_lists = {name: tensors for name, tensors in vars(state).items() if tensors and name not in others_shaped}
    check_lists(state.mean, **others, **given_lists)
    return state


def _fake_kl(state: State) -> Tensor:
    return torch.empty((), dtype=torch.float64, device=state.mean[0].device if state.mean else "cpu")


def _sample_fake(*args: Any, **kwargs: Any) -> None:
    _checked("sample", args, kwargs)


def _accumulate_fake(*args: Any, **kwargs: Any) -> None:
    _checked("accumulate", args, kwargs)


def _step_fake(*args: Any, **kwargs: Any) -> Tensor:
    return _fake_kl(_checked("step", args, kwargs))


def _gauss_newton_fake(*args: Any, **kwargs: Any) -> None:
    _checked("gauss_newton", args, kwargs)


def _gaussian_kl_fake(*args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    state = _checked("gaussian_kl", args, kwargs)
    return _fake_kl(state), [torch.empty_like(m) for m in state.mean], [torch.empty_like(s) for s in state.std]


for _name, _fake in {
    "sample": _sample_fake,
    "accumulate": _accumulate_fake,
    "step": _step_fake,
    "gauss_newton": _gauss_newton_fake,
    "gaussian_kl": _gaussian_kl_fake,
}.items():
    torch.library.register_fake(f"distruction::{_name}", _fake, lib=_library)


def _kl_setup_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*output[1], *output[2])
    ctx.set_materialize_grads(False)


def _kl_backward(ctx: Any, grad_total: Tensor | None, grad_of_grad_mean: Any, grad_of_grad_std: Any) -> Any:
    saved = ctx.saved_tensors
    half = len(saved) // 2
    if grad_total is None:
        return [None] * half, [None] * half, [None] * half, [None] * half
    # The scale stays on its device: no host sync when this loss is not the last op.
    grads = [g * grad_total.to(g.dtype) for g in saved]
    return grads[:half], grads[half:], [None] * half, [None] * half


torch.library.register_autograd("distruction::gaussian_kl", _kl_backward, setup_context=_kl_setup_context, lib=_library)


# --- the ops over the types of a call -------------------------------------------------------------------


def sample(out: Sequence[Tensor], state: State, draws: Draws, *, backend: str = "auto") -> None:
    """``out <- mean + std * eps`` for the draw ``counters[0]``."""
    _flat("sample", state, draws, out=out, backend=backend)


def accumulate(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    state: State,
    draws: Draws,
    amp: Amp = Amp(),  # noqa: B008
    *,
    backend: str = "auto",
) -> None:
    """Add ``grad`` and ``grad * eps`` to ``m1`` and ``m2``, advance the draw, and write the next sample into ``param``.

    The first sample of an update (``counters[1]`` is 0) overwrites ``m1`` and ``m2`` instead, whatever they hold. With
    an empty list ``m2`` the update is of one antithetic pair, and ``m1`` takes its first gradient, which is all that
    `step` needs. ``param`` must then hold the sample of this draw, as the ops have written it: its mirror image
    ``2 * mean - param`` may serve as the next one, ``mean - std * eps``.
    """
    _flat("accumulate", state, draws, amp, param=param, grad=grad, backend=backend)


def step(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    state: State,
    draws: Draws,
    rule: Rule,
    amp: Amp = Amp(),  # noqa: B008
    *,
    backend: str = "auto",
) -> Tensor:
    """The fused BGD step: update ``mean`` and ``std``, write the next sample into ``param``; returns KL(q || prior).

    The gradient of the last sample is in ``grad``; ``m1`` and ``m2`` are of the samples before it (``counters[1]`` of
    them). An element whose statistics or update are not finite keeps its mean and std, and ``counters[2]`` becomes 1.
    The KL, of the updated posterior, is a float64 scalar tensor (zero without a prior). The formulas are in
    `distruction.ops.reference.step`.
    """
    kl: Tensor = _flat("step", state, draws, rule, amp, param=param, grad=grad, backend=backend)
    return kl


def gauss_newton(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    state: State,
    draws: Draws,
    evidence: float,
    amp: Amp = Amp(),  # noqa: B008
    *,
    backend: str = "auto",
) -> None:
    """Add ``evidence * g**2`` to ``1 / std**2``, g the unscaled gradient, and write the next sample into ``param``.

    That is ``std <- std / sqrt(1 + evidence * g**2 * std**2)``: std never grows, and does not fall below float32's
    smallest normal number. ``evidence``, at least 0, is the number of data points that g**2 stands for. An element
    where ``|g * std * sqrt(evidence)|`` is more than 2**126 or not a number keeps its std, and ``counters[2]`` becomes
    1. ``counters[1]`` becomes 0, as after every update. The source is in `distruction.ops.reference.gauss_newton`.
    """
    _flat("gauss_newton", state, draws, amp, param=param, grad=grad, evidence=evidence, backend=backend)


gaussian_kl = torch.ops.distruction.gaussian_kl
"""KL(N(mean, std**2) || N(prior_mean, prior_std**2)) summed over all elements, with both gradients.

Takes the lists ``mean``, ``std``, ``prior_mean``, ``prior_std``, and ``backend`` by keyword; returns the float64 sum
and the lists of dKL/dmean and dKL/dstd. Differentiable through the sum with respect to ``mean`` and ``std`` (the prior
is a constant).
"""
