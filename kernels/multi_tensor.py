"""All tensors of a model in one launch: tables of addresses on the device, and a program's way into them.

A launch has one program per chunk of a tensor, and one launch serves all tensors of the same types. The tables
depend on nothing but sizes and addresses: they are built once and serve every call as long as those hold.

Chunks begin where the element index in the whole parameter is a multiple of the block, so that a group of four
elements that share a call of the generator never spans two programs, whatever a shard's offset.
"""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements of one iteration of a program: four for each of its threads, the width of a 128-bit access."""

MOST_ITERATIONS = 16
FEWEST_PROGRAMS = 4096
"""A program takes up to 16 blocks, which amortises its look-ups, as long as enough programs remain to fill a GPU."""

ARRAYS = ("param", "mean", "std", "m1", "m2", "prior_mean", "prior_std")
"""The arrays whose addresses are in a tensor's record; those that are new at every step have a table of their own."""

# The cells of a record: int64 each.
NUMEL = tl.constexpr(0)
SHIFT = tl.constexpr(1)  # elements between the first chunk's start and the tensor's
GROUP = tl.constexpr(2)  # group of four that the first chunk starts with
STREAM = tl.constexpr(3)
FIRST_CHUNK = tl.constexpr(4)
PARAM = tl.constexpr(5)
MEAN = tl.constexpr(6)
STD = tl.constexpr(7)
M1 = tl.constexpr(8)
M2 = tl.constexpr(9)
PRIOR_MEAN = tl.constexpr(10)
PRIOR_STD = tl.constexpr(11)
WIDTH = tl.constexpr(12)


# --- in the kernels ------------------------------------------------------------------------------


@triton.jit
def locate(records, tensor_of_chunk, chunk, ALIGNED: tl.constexpr):
    """This program's place: its tensor, the tensor's record, the chunk's start in it, and the groups' two words.

    Elements ``begin <= i < end`` of the chunk lie inside the tensor, at ``start + i``.

    Returns:
        (tensor, record, start, begin, end, group, group_high)
    """
    program = tl.program_id(0)
    tensor = tl.load(tensor_of_chunk + program).to(tl.int64)
    record = records + tensor * WIDTH
    start = (program - tl.load(record + FIRST_CHUNK)) * chunk
    group = tl.load(record + GROUP) + start // 4
    if ALIGNED:
        begin = 0
        start = tl.multiple_of(start, 4)
        end = tl.multiple_of(tl.minimum(tl.load(record + NUMEL) - start, chunk).to(tl.int32), 4)
    else:
        start -= tl.load(record + SHIFT)
        begin = tl.maximum(-start, 0).to(tl.int32)
        end = tl.minimum(tl.load(record + NUMEL) - start, chunk).to(tl.int32)
    return tensor, record, start, begin, end, group.to(tl.uint32), (group >> 32).to(tl.uint32)


@triton.jit
def pointer(cell, start, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in a cell of a table, moved to the chunk's start."""
    p = tl.load(cell).to(tl.pointer_type(TYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p + start


@triton.jit
def block_of(first, begin, end, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """The block that starts at ``first``: indices that may be accessed, and which of them are the tensor's.

    Aligned tensors are read without a mask, since a mask costs the initialisation of the registers: the last four
    elements stand in for those beyond the end.
    """
    i = first + tl.arange(0, BLOCK)
    if ALIGNED:
        within = tl.minimum(i & -4, end - 4) + (i & 3)
        return tl.max_contiguous(tl.multiple_of(within, 4), 4), i < end
    else:
        return i, (i >= begin) & (i < end)


@triton.jit
def load(p, inside, ALIGNED: tl.constexpr):
    """Elements as float32; those that are not inside the tensor are arbitrary."""
    if ALIGNED:
        return tl.load(p).to(tl.float32)
    else:
        return tl.load(p, inside).to(tl.float32)


@triton.jit
def sum_of_groups(x, first, inside, end, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Sums over groups of four, which one thread holds, in float64; elements outside the tensor do not count."""
    if ALIGNED:
        of_group = tl.sum(tl.reshape(x, [BLOCK // 4, 4]), 1)
        of_group = tl.where(first + 4 * tl.arange(0, BLOCK // 4) < end, of_group, 0.0)
    else:
        of_group = tl.sum(tl.reshape(tl.where(inside, x, 0.0), [BLOCK // 4, 4]), 1)
    return of_group.to(tl.float64)


@triton.jit(do_not_specialize=["counters", "found_inf", "partial", "total", "partials"])
def finish_kernel(
    counters, found_inf, partial, total, partials, ADVANCE: tl.constexpr, UPDATED: tl.constexpr, BLOCK: tl.constexpr
):
    """One program, after the others: the sum of the partial sums in a fixed order, and the counters."""
    if total is not None:
        sums = tl.zeros([BLOCK], tl.float64)
        for first in range(0, partials, BLOCK):
            i = first + tl.arange(0, BLOCK)
            sums += tl.load(partial + i, i < partials, 0.0)
        tl.store(total, tl.sum(sums, 0))
    if ADVANCE:
        step = 1
        accumulated = tl.load(counters + 1) + 1
        if UPDATED:
            accumulated = accumulated * 0
        if found_inf is not None:
            if tl.load(found_inf) != 0.0:
                step = 0
                accumulated = tl.load(counters + 1)
        tl.store(counters, tl.load(counters) + step)
        tl.store(counters + 1, accumulated)


# --- on the host ---------------------------------------------------------------------------------

INTERPRETED = not isinstance(finish_kernel, triton.JITFunction)
"""Whether Triton interprets the kernels, on the CPU: TRITON_INTERPRET=1 was set when they were defined."""

TARGET = "interpreter" if INTERPRETED else "hip" if torch.version.hip else "cuda"

# Contraction of a * b + c may differ from one variant of a kernel to another; the kernels say where they want it.
LAUNCH: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}

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
    groups: dict[tuple[Any, bool], list[int]] = {}
    for i, numel in enumerate(layout.numels):
        if numel:
            aligned = i not in layout.unaligned and _is_aligned(layout, i, block)
            groups.setdefault((layout.types[i], aligned), []).append(i)
    return [_launch(layout, block, types, aligned, tensors) for (types, aligned), tensors in groups.items()]


def _is_aligned(layout: _Layout, i: int, block: int) -> bool:
    first, numel = layout.offsets[i], layout.numels[i]
    return (
        first % 4 == numel % 4 == 0
        and all(not a or a[i] % 16 == 0 for a in layout.addresses)
        # Within a chunk, the groups' high word must not change.
        and (first % block == 0 or first // 2**34 == (first + numel) // 2**34)
    )


def _launch(layout: _Layout, block: int, types: Any, aligned: bool, tensors: list[int]) -> Launch:
    blocks = sum(triton.cdiv(layout.numels[i], block) for i in tensors)
    chunk = block * max(1, min(MOST_ITERATIONS, blocks // FEWEST_PROGRAMS))
    records, chunks = [], []
    for i in tensors:
        shift = 0 if aligned else layout.offsets[i] % block
        addresses = [a[i] if a else 0 for a in layout.addresses]
        group = (layout.offsets[i] - shift) // 4
        records.append([layout.numels[i], shift, group, layout.streams[i], sum(chunks), *addresses])
        chunks.append(triton.cdiv(layout.numels[i] + shift, chunk))
    tensor_of_chunk = torch.repeat_interleave(
        torch.arange(len(tensors), dtype=torch.int32), torch.tensor(chunks, dtype=torch.int64)
    )
    return Launch(
        tuple(tensors),
        (_TYPES[types[0]], _TYPES[types[1]]),
        aligned,
        chunk,
        len(tensor_of_chunk),
        _OnDevice(torch.tensor(records, dtype=torch.int64), layout.device),
        _OnDevice(tensor_of_chunk, layout.device),
    )


def launches(
    arrays: dict[str, Sequence[Tensor]],
    fresh: Sequence[Sequence[Tensor]],
    offsets: Sequence[int] = (),
    streams: Sequence[int] = (),
    block: int = BLOCK,
) -> list[tuple[Launch, dict[str, Any]]]:
    """The launches that serve a model, with the arguments that all kernels have in common.

    Args:
        arrays: lists of tensors by their name in `ARRAYS`; "mean" is required.
        fresh: lists of tensors whose addresses may change from call to call, such as gradients.

    Raises:
        ValueError: a tensor is of another type or device, or not contiguous.
    """
    mean = arrays["mean"]
    device = mean[0].device
    for name, tensors in arrays.items():
        _check(name, tensors, device, tuple(_TYPES) if name == "param" else (torch.float32,))
    for tensors in fresh:
        _check("grad", tensors, device, tuple(_TYPES))
    fresh_addresses = [[t.data_ptr() for t in tensors] for tensors in fresh]
    n = len(mean)
    layout = _Layout(
        device,
        tuple(m.numel() for m in mean),
        tuple(offsets) or (0,) * n,
        tuple(streams) or (0,) * n,
        tuple(tuple(t.data_ptr() for t in arrays.get(name, ())) for name in ARRAYS),
        tuple((p.dtype, g.dtype) for p, g in zip(arrays.get("param", mean), fresh[0] if fresh else mean, strict=True)),
        frozenset(i for row in fresh_addresses for i, address in enumerate(row) if address % 16),
    )
    found = []
    for launch in _launches(layout, block):
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
                    "BLOCK": block,
                    "TARGET": TARGET,
                    **LAUNCH,
                },
            )
        )
    return found


def _check(name: str, tensors: Sequence[Tensor], device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    for i, t in enumerate(tensors):
        if not t.is_contiguous():
            raise ValueError(
                f"backend 'triton': {name}[{i}] of shape {tuple(t.shape)} and strides {t.stride()} is not contiguous; "
                "pass it .contiguous(), or choose backend='reference'"
            )
        if t.dtype not in dtypes:
            raise ValueError(
                f"backend 'triton': {name}[{i}] is {t.dtype}, not {' or '.join(map(str, dtypes))}; "
                "backend='reference' takes other types"
            )
        if t.device != device:
            raise ValueError(f"backend 'triton': {name}[{i}] is on {t.device}, the first tensor on {device}")


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
        num_warps=8,
        enable_fp_fusion=False,
    )


@functools.lru_cache(maxsize=64)
def key_schedule(seed: int) -> tuple[int, ...]:
    """The generator's round keys as int32: arguments of a kernel cost it nothing, unlike sums."""
    keys = []
    for r in range(10):
        for shift, weyl in ((0, 0x9E3779B9), (32, 0xBB67AE85)):
            key = ((seed >> shift) + r * weyl) & 0xFFFFFFFF
            keys.append(key - (key >> 31 << 32))
    return tuple(keys)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """The device as the current one, where launches go."""
    return torch.cuda.device(device) if device.type != "cpu" else nullcontext()


def mutated(*lists: Sequence[Tensor]) -> None:
    """Tell autograd of writes that it cannot see, as an in-place operator does."""
    for tensors in lists:
        torch.autograd.graph.increment_version(tensors)
