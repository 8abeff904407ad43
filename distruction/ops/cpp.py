"""The ``cpp`` backend: vectorised C++ kernels for CPU tensors (``csrc/cpu``).

The best instruction set of the CPU serves, or the one that the environment variable
``DISTRUCTION_INSTRUCTION_SET`` names: ``avx512``, ``avx2``, ``baseline`` (128-bit vectors) or ``scalar``
(one element at a time, the arithmetic of the CUDA kernels). Results do not depend on the number of threads
(`torch.set_num_threads`); between instruction sets they differ by rounding.
"""

import ctypes
import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from . import native

ENVIRONMENT = "DISTRUCTION_INSTRUCTION_SET"
"""The environment variable that forces an instruction set."""

_library = native.load("cpu", "install a C++ compiler (g++ or clang++) and reinstall the package")
_library.distruction_cpu_set.restype = ctypes.c_char_p
_library.distruction_cpu_step.restype = ctypes.c_double
_library.distruction_cpu_gaussian_kl.restype = ctypes.c_double


@functools.cache
def instruction_sets() -> dict[str, tuple[int, bool]]:
    """Each instruction set of the build, best first: its number, and whether this CPU has it."""
    sets: dict[str, tuple[int, bool]] = {}
    usable = ctypes.c_int32()
    while (name := _library.distruction_cpu_set(len(sets), ctypes.byref(usable))) is not None:
        sets[name.decode()] = (len(sets), bool(usable.value))
    return sets


@functools.cache
def _set_number(name: str | None) -> int:
    usable = {n: number for n, (number, ok) in instruction_sets().items() if ok}
    if name is None:
        return next(iter(usable.values()))
    if name not in usable:
        raise ValueError(f"{ENVIRONMENT}={name!r}: this CPU and build have {', '.join(usable)}")
    return usable[name]


@functools.cache
def _parallel_for() -> int | None:
    """PyTorch's thread pool in its stable C interface, which appeared in PyTorch 2.10."""
    try:
        function = ctypes.CDLL(torch._C.__file__).torch_parallel_for
    except (AttributeError, OSError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def _launch(name: str, *arguments: object) -> float:
    kernel = getattr(_library, f"distruction_cpu_{name}")
    return kernel(
        ctypes.c_int32(_set_number(os.environ.get(ENVIRONMENT))),
        ctypes.c_void_p(_parallel_for()),
        ctypes.c_int64(torch.get_num_threads()),
        *arguments,
    )


def unavailable(device_type: str) -> str | None:
    """Why the C++ kernels cannot serve ``device_type``, or ``None`` where they can."""
    return None if device_type == "cpu" else "the C++ kernels take CPU tensors"


def words(block: int, blocks: int, *, draw: int, stream: int, seed: int) -> Tensor:
    """The generator's words (int64, shape (blocks, 4)) of consecutive blocks; the normals are made from these."""
    out = torch.empty(blocks, 4, dtype=torch.int32)
    _library.distruction_cpu_words(
        ctypes.c_int32(_set_number(os.environ.get(ENVIRONMENT))),
        *(ctypes.c_int64(value) for value in (block, blocks, draw, stream, seed)),
        ctypes.c_void_p(out.data_ptr()),
    )
    return out.long() & 0xFFFFFFFF


def sample(
    out: Sequence[Tensor],
    mean: Sequence[Tensor],
    std: Sequence[Tensor],
    offsets: Sequence[int],
    streams: Sequence[int],
    seed: int,
    counters: Tensor,
    antithetic: bool,
    stochastic_rounding: bool,
) -> None:
    """See `distruction.ops.sample`."""
    model, _keep = native.model(
        "cpp",
        {"mean": mean, "std": std},
        param=out,
        offsets=offsets,
        streams=streams,
        seed=seed,
        counters=counters,
        antithetic=antithetic,
        stochastic_rounding=stochastic_rounding,
    )
    _launch("sample", ctypes.byref(model))
    native.mutated(out)


def accumulate(
    param: Sequence[Tensor],
    m1: Sequence[Tensor],
    m2: Sequence[Tensor],
    grad: Sequence[Tensor],
    mean: Sequence[Tensor],
    std: Sequence[Tensor],
    offsets: Sequence[int],
    streams: Sequence[int],
    seed: int,
    counters: Tensor,
    antithetic: bool,
    stochastic_rounding: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """See `distruction.ops.accumulate`."""
    model, _keep = native.model(
        "cpp",
        {"mean": mean, "std": std, "m1": m1, "m2": m2},
        param=param,
        grad=grad,
        offsets=offsets,
        streams=streams,
        seed=seed,
        counters=counters,
        antithetic=antithetic,
        stochastic_rounding=stochastic_rounding,
    )
    if found_inf is not None and found_inf.item() != 0:
        return
    _launch("accumulate", ctypes.byref(model), ctypes.c_float(1.0 if grad_scale is None else grad_scale.item()))
    native.mutated(param, m1, m2, [counters])


def step(
    param: Sequence[Tensor],
    mean: Sequence[Tensor],
    std: Sequence[Tensor],
    grad: Sequence[Tensor],
    m1: Sequence[Tensor],
    m2: Sequence[Tensor],
    prior_mean: Sequence[Tensor],
    prior_std: Sequence[Tensor],
    lr: Tensor,
    kl_weight: Tensor,
    loss_scale: float,
    offsets: Sequence[int],
    streams: Sequence[int],
    seed: int,
    counters: Tensor,
    antithetic: bool,
    stochastic_rounding: bool,
    max_mean_step: float,
    max_log_std_step: float,
    max_std: float,
    learn_mean: bool,
    learn_std: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> Tensor:
    """See `distruction.ops.step`."""
    model, _keep = native.model(
        "cpp",
        {"mean": mean, "std": std, "m1": m1, "m2": m2, "prior_mean": prior_mean, "prior_std": prior_std},
        param=param,
        grad=grad,
        offsets=offsets,
        streams=streams,
        seed=seed,
        counters=counters,
        antithetic=antithetic,
        stochastic_rounding=stochastic_rounding,
    )
    if found_inf is not None and found_inf.item() != 0:
        kl = _launch("gaussian_kl", ctypes.byref(model)) if prior_mean else 0.0
        return torch.tensor(kl, dtype=torch.float64)
    options = native.Options(
        lr=lr.item(),
        kl_weight=kl_weight.item(),
        loss_scale=loss_scale,
        grad_scale=1.0 if grad_scale is None else grad_scale.item(),
        max_mean_step=max_mean_step,
        max_a=native.max_a(max_log_std_step),
        max_std=max_std,
        learn_mean=learn_mean,
        learn_std=learn_std,
    )
    kl = _launch("step", ctypes.byref(model), ctypes.byref(options))
    native.mutated(param, m1, m2, [counters])
    if learn_mean:
        native.mutated(mean)
    if learn_std:
        native.mutated(std)
    return torch.tensor(kl, dtype=torch.float64)


def gaussian_kl(
    mean: Sequence[Tensor], std: Sequence[Tensor], prior_mean: Sequence[Tensor], prior_std: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """See `distruction.ops.gaussian_kl`."""
    grad_mean, grad_std = [torch.empty_like(m) for m in mean], [torch.empty_like(s) for s in std]
    model, _keep = native.model(
        "cpp",
        {
            "mean": mean,
            "std": std,
            "prior_mean": prior_mean,
            "prior_std": prior_std,
            "grad_mean": grad_mean,
            "grad_std": grad_std,
        },
    )
    return torch.tensor(_launch("gaussian_kl", ctypes.byref(model)), dtype=torch.float64), grad_mean, grad_std
