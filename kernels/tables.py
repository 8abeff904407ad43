"""The host's side of a launch: tables of addresses on the device, and how each tensor is divided into chunks.

The tables depend on nothing but sizes and addresses: they are built once and serve every call as long as those hold.
"""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from distruction.ops.calls import Amp, Draws

from .multi_tensor import finish_kernel
from .philox import KEYS

WARPS = 4


BLOCKS = {"cuda": 4 * 32 * WARPS, "hip": 4 * 64 * WARPS, "interpreter": 4096}
"""Elements of one iteration of a program by target: on GPUs four for each thread, the width of a 128-bit access."""


MOST_ITERATIONS = 32
FEWEST_PROGRAMS = 8192
"""A program takes up to 32 blocks, which amortises its look-ups, as long as enough programs remain to fill a GPU."""

ARRAYS = ("param", "mean", "std", "m1", "m2", "prior_mean", "prior_std")
"""The arrays whose addresses are in a tensor's record; those that are new at every step have a table of their own."""

INTERPRETED = not isinstance(finish_kernel, triton.JITFunction)
"""Whether Triton interprets the kernels, on the CPU: TRITON_INTERPRET=1 was set when they were defined."""


@triton.jit
def _count(end, out):
    for i in range(tl.load(end)):
        tl.store(out, i + 1)


@functools.cache
def interpreter_fails() -> str | None:
    """Why Triton's interpreter cannot run the kernels' loops, or ``None`` where it can."""
    out = torch.zeros((), dtype=torch.int32)
    try:
        _count[(1,)](torch.tensor(2, dtype=torch.int32), out)
    except Exception as error:
        return (
            f"the interpreter of Triton {triton.__version__} fails with NumPy {np.__version__} ({error}); "
            "older versions of Triton want numpy<2.4"
        )
    return None if out.item() == 2 else f"the interpreter of Triton {triton.__version__} miscounts a loop"


TARGET = "interpreter" if INTERPRETED else "hip" if torch.version.hip else "cuda"

BLOCK = BLOCKS[TARGET]

LAUNCH: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": False}
"""The compiler's options. It would contract a * b + c differently in different variants of a kernel, hence results
would differ in their last bit; the kernels name each `tl.fma` themselves."""

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_kept_for_graphs: set["_OnDevice"] = set()


class _OnDevice:
    """A constant table on a device, usable from any stream and by CUDA graphs for the rest of the process."""

    def __init__(self, values: Tensor, device: torch.device) -> None:
        self._stream = None
        self._tensor = values
        if device.type != "cpu":
            # From pinned memory the copy is asynchronous.
            self._stream = torch.cuda.current_stream(device)
            self._tensor = values.pin_memory().to(device, non_blocking=True)

    def get(self) -> Tensor:
        if self._stream is None:
            return self._tensor
        if torch.cuda.is_current_stream_capturing():
            _kept_for_graphs.add(self)
        elif (current := torch.cuda.current_stream(self._tensor.device)) != self._stream:
            current.wait_stream(self._stream)
            self._tensor.record_stream(current)
        return self._tensor


@dataclass(frozen=True)
class Launch:
    """One launch: the tensors of one type, aligned or not, and their tables."""

    tensors: tuple[int, ...]
    types: tuple[tl.dtype, tl.dtype]
    aligned: bool
    chunk: int
    chunks: int
    records: _OnDevice
    tensor_of_chunk: _OnDevice


@dataclass(frozen=True)
class _Layout:
    """What the tables depend on: a hashable description of a model."""

    device: torch.device
    numels: tuple[int, ...]
    offsets: tuple[int, ...]
    streams: tuple[int, ...]
    addresses: tuple[tuple[int, ...], ...]
    types: tuple[tuple[torch.dtype, torch.dtype], ...]
    unaligned: frozenset[int]


@functools.lru_cache(maxsize=64)
def _launches(layout: _Layout, block: int) -> list[Launch]:
    if _capturing(layout.device):
        raise RuntimeError(
            "these tensors are new to the Triton kernels, whose tables cannot be built while a CUDA graph is captured; "
            "run the same step once before the capture"
        )
    blocks = sum(layout.numels) // block
    # A power of two, so that a chunk never spans a carry between the two words of the groups' number.
    iterations = 2 ** min(MOST_ITERATIONS, max(1, blocks // FEWEST_PROGRAMS)).bit_length() // 2
    groups: dict[tuple[Any, bool], list[int]] = {}
    for i, numel in enumerate(layout.numels):
        if numel:
            aligned = i not in layout.unaligned and _is_aligned(layout, i, block * iterations)
            groups.setdefault((layout.types[i], aligned), []).append(i)
    return [_launch(layout, block * iterations, *group, tensors) for group, tensors in groups.items()]


def _is_aligned(layout: _Layout, i: int, chunk: int) -> bool:
    first, numel = layout.offsets[i], layout.numels[i]
    return (
        first % 4 == numel % 4 == 0
        and all(not a or a[i] % 16 == 0 for a in layout.addresses)
        # Its chunks begin at its first element, and must not span a carry either.
        and (first % chunk == 0 or first >> 34 == first + numel >> 34)
    )


def _launch(layout: _Layout, chunk: int, types: Any, aligned: bool, tensors: list[int]) -> Launch:
    records, chunks = [], []
    first_chunk = 0
    for i in tensors:
        shift = 0 if aligned else layout.offsets[i] % chunk
        addresses = [a[i] if a else 0 for a in layout.addresses]
        group = (layout.offsets[i] - shift) // 4
        records.append([layout.numels[i], shift, group, layout.streams[i], first_chunk, *addresses])
        chunks.append(triton.cdiv(layout.numels[i] + shift, chunk))
        first_chunk += chunks[-1]
    tensor_of_chunk = torch.arange(len(tensors), dtype=torch.int32).repeat_interleave(torch.tensor(chunks))
    return Launch(
        tuple(tensors),
        (_TYPES[types[0]], _TYPES[types[1]]),
        aligned,
        chunk,
        first_chunk,
        _OnDevice(torch.tensor(records, dtype=torch.int64), layout.device),
        _OnDevice(tensor_of_chunk, layout.device),
    )


def launches(
    arrays: dict[str, Sequence[Tensor]],
    fresh: Sequence[Sequence[Tensor]],
    draws: Draws | None = None,
) -> list[tuple[Launch, dict[str, Any]]]:
    """The launches that serve a model, with the arguments that all kernels have in common.

    Args:
        arrays: lists of tensors by their name in `ARRAYS`; "mean" is required.
        fresh: lists of tensors whose addresses may change from call to call, such as gradients.
        draws: where the generator stands, for kernels that draw.
    """
    mean = arrays["mean"]
    device = mean[0].device
    fresh_addresses = [_addresses(tensors) for tensors in fresh]
    n = len(mean)
    layout = _Layout(
        device,
        tuple(map(Tensor.numel, mean)),
        tuple(draws.offsets) if draws else (0,) * n,
        tuple(draws.streams) if draws else (0,) * n,
        tuple(_addresses(arrays.get(name, ())) for name in ARRAYS),
        tuple((p.dtype, g.dtype) for p, g in zip(arrays.get("param", mean), fresh[0] if fresh else mean, strict=True)),
        frozenset(i for row in fresh_addresses for i, address in enumerate(row) if address % 16),
    )
    found = []
    for launch in _launches(layout, BLOCK):
        addresses = tuple(row[i] for row in fresh_addresses for i in launch.tensors)
        found.append(
            (
                launch,
                {
                    "records": launch.records.get(),
                    "tensor_of_chunk": launch.tensor_of_chunk.get(),
                    "fresh": _fresh_table(addresses, device),
                    "chunk": launch.chunk,
                    "ALIGNED": launch.aligned,
                    "BLOCK": BLOCK,
                    "TARGET": TARGET,
                    **LAUNCH,
                },
            )
        )
    return found


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    # By map, since this is most of what a step costs the host.
    return tuple(map(Tensor.data_ptr, tensors))


def _capturing(device: torch.device) -> bool:
    return device.type != "cpu" and torch.cuda.is_current_stream_capturing()


@functools.lru_cache(maxsize=64)
def _uploaded(addresses: tuple[int, ...], device: torch.device) -> _OnDevice:
    return _OnDevice(torch.tensor(addresses, dtype=torch.int64), device)


def _fresh_table(addresses: tuple[int, ...], device: torch.device) -> Tensor | None:
    if not addresses:
        return None
    return _by_value(addresses, device) if _capturing(device) else _uploaded(addresses, device).get()


def _by_value(addresses: Sequence[int], device: torch.device) -> Tensor:
    """A table whose contents are kernel arguments, so that a CUDA graph holds them and its memory pool the table."""
    table = torch.zeros(len(addresses), dtype=torch.int64, device=device)
    torch._foreach_add_(list(table.unbind()), list(addresses))
    return table


def scalar(value: Tensor, device: torch.device) -> Tensor:
    """A scalar as float32 on the device, without waiting for it."""
    if value.device != device and value.device.type == "cpu":
        return torch.full((), value.item(), dtype=torch.float32, device=device)
    return value.to(device, torch.float32)


def amp_scalars(amp: Amp, device: torch.device) -> dict[str, Tensor | None]:
    """The kernels' arguments of mixed precision."""
    return {name: None if value is None else scalar(value, device) for name, value in vars(amp).items()}


def sums_of_kl(
    planned: list[tuple[Launch, dict[str, Any]]], device: torch.device, with_prior: bool = True
) -> tuple[Tensor | None, Tensor]:
    """Memory for the KL: its partial sums, one for each chunk, ``None`` without a prior; and the whole."""
    chunks = sum(launch.chunks for launch, _ in planned)
    partial = torch.empty(chunks, dtype=torch.float64, device=device) if with_prior else None
    return partial, torch.empty((), dtype=torch.float64, device=device)


def finish(
    counters: Tensor | None,
    found_inf: Tensor | None,
    partial: Tensor | None,
    total: Tensor | None,
    *,
    advance: bool = False,
    updated: bool = False,
) -> None:
    """Advance the counters, and add up the KL."""
    finish_kernel[(1,)](
        counters,
        found_inf,
        partial,
        total,
        0 if partial is None else partial.numel(),
        ADVANCE=advance,
        UPDATED=updated,
        BLOCK=BLOCK,
        **LAUNCH,
    )


@functools.lru_cache(maxsize=64)
def key_schedule(seed: int) -> dict[str, int]:
    """The generator's round keys as int32, by the names of the kernels' arguments `KEYS`.

    Arguments of a kernel cost it nothing, unlike sums or loads.
    """
    keys = []
    for r in range(10):
        for shift, weyl in ((0, 0x9E3779B9), (32, 0xBB67AE85)):
            key = ((seed >> shift) + r * weyl) & 0xFFFFFFFF
            keys.append(key - (key >> 31 << 32))
    return dict(zip(KEYS, keys, strict=True))


def drawing(draws: Draws) -> dict[str, Any]:
    """The arguments of the kernels that draw."""
    return {
        "counters": draws.counters,
        "ANTITHETIC": draws.antithetic,
        "STOCHASTIC": draws.stochastic_rounding,
        **key_schedule(draws.seed),
    }


def on(device: torch.device) -> AbstractContextManager[Any]:
    """The device as the current one, where launches go."""
    return torch.cuda.device(device) if device.type != "cpu" else nullcontext()


def mutated(*lists: Sequence[Tensor]) -> None:
    """Tell autograd of writes that it cannot see, as an in-place operator does."""
    for tensors in lists:
        torch.autograd.graph.increment_version(tensors)
