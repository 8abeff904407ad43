"""The ``cuda`` backend: CUDA kernels for NVIDIA GPUs without Triton (``csrc/cuda``).

A whole model takes one launch (one per 320 tensors), and no call waits for the device: the scalars that live
there are read there.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from . import native

_library = native.load("cuda", "install the CUDA toolkit and reinstall the package with DISTRUCTION_BUILD_CUDA=1")
_library.distruction_cuda_error.restype = ctypes.c_char_p
_library.distruction_cuda_chunks.restype = ctypes.c_int64


def unavailable(device_type: str) -> str | None:
    """Why the CUDA kernels cannot serve ``device_type``, or ``None`` where they can."""
    if device_type != "cuda" or torch.version.hip is not None:
        return "the CUDA kernels take tensors on NVIDIA GPUs"
    return None if torch.cuda.is_available() else "PyTorch finds no CUDA device"


def _launch(name: str, device: torch.device, *arguments: object) -> None:
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        launcher = getattr(_library, f"distruction_cuda_{name}")
        error = launcher(ctypes.c_int32(torch.cuda.current_device()), ctypes.c_void_p(stream), *arguments)
    if error != 0:
        raise RuntimeError(f"CUDA kernel {name!r}: {_library.distruction_cuda_error(error).decode()}")


class _Scalars:
    """Scalars as values if they live on the host, else as pointers to float32 tensors that are kept alive."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.fields: dict[str, float | int] = {}
        self.kept: list[Tensor] = []

    def add(self, name: str, value: Tensor | None) -> None:
        if value is None:
            return
        if value.device.type == "cpu" and name != "found_inf":
            self.fields[name] = value.item()
            return
        self.kept.append(value.to(self.device, torch.float32))
        self.fields[f"{name}_pointer"] = self.kept[-1].data_ptr()


def _options(scalars: _Scalars, **fields: float | bool) -> native.Options:
    return native.Options(**{"grad_scale": 1.0, **scalars.fields, **fields})


def _kl_buffers(model: native.Model, device: torch.device) -> tuple[Tensor, Tensor]:
    chunks = _library.distruction_cuda_chunks(ctypes.byref(model))
    return (
        torch.empty(chunks, dtype=torch.float64, device=device),
        torch.empty((), dtype=torch.float64, device=device),
    )


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
        "cuda",
        {"mean": mean, "std": std},
        param=out,
        offsets=offsets,
        streams=streams,
        seed=seed,
        counters=counters,
        antithetic=antithetic,
        stochastic_rounding=stochastic_rounding,
    )
    _launch("sample", counters.device, ctypes.byref(model))
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
        "cuda",
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
    scalars = _Scalars(counters.device)
    scalars.add("grad_scale", grad_scale)
    scalars.add("found_inf", found_inf)
    _launch("accumulate", counters.device, ctypes.byref(model), ctypes.byref(_options(scalars)))
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
        "cuda",
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
    scalars = _Scalars(counters.device)
    scalars.add("lr", lr)
    scalars.add("kl_weight", kl_weight)
    scalars.add("grad_scale", grad_scale)
    scalars.add("found_inf", found_inf)
    options = _options(
        scalars,
        loss_scale=loss_scale,
        max_mean_step=max_mean_step,
        max_a=native.max_a(max_log_std_step),
        max_std=max_std,
        learn_mean=learn_mean,
        learn_std=learn_std,
    )
    partial, kl = _kl_buffers(model, counters.device)
    _launch(
        "step",
        counters.device,
        ctypes.byref(model),
        ctypes.byref(options),
        ctypes.c_void_p(partial.data_ptr()),
        ctypes.c_void_p(kl.data_ptr()),
    )
    native.mutated(param, mean, std, m1, m2, [counters])
    return kl


def gaussian_kl(
    mean: Sequence[Tensor], std: Sequence[Tensor], prior_mean: Sequence[Tensor], prior_std: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """See `distruction.ops.gaussian_kl`."""
    grad_mean, grad_std = [torch.empty_like(m) for m in mean], [torch.empty_like(s) for s in std]
    model, _keep = native.model(
        "cuda",
        {
            "mean": mean,
            "std": std,
            "prior_mean": prior_mean,
            "prior_std": prior_std,
            "grad_mean": grad_mean,
            "grad_std": grad_std,
        },
    )
    device = mean[0].device
    partial, kl = _kl_buffers(model, device)
    _launch(
        "gaussian_kl",
        device,
        ctypes.byref(model),
        ctypes.c_void_p(partial.data_ptr()),
        ctypes.c_void_p(kl.data_ptr()),
    )
    return kl, grad_mean, grad_std
