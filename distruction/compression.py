"""Tensors in fewer bytes: standard deviations as 8-bit codes on a log scale, anything in bfloat16.

A block of a positive tensor, consecutive elements of it, is kept as its smallest value, a step and a code per element:

    x'   = low * exp(code * step),   code in 0..255
    low  = min x,                    step = log(max x / min x) / 255

The code is the nearest, so that |log(x' / x)| <= step / 2: the relative error is at most exp(step / 2) - 1 (and some
1e-6 of float32's rounding). Where the values of a block span a factor of 30 that is 0.7 %; a constant block is exact.
Values below float32's smallest normal number count as that. The kernels read a prior's codes as they are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .ops.reference.codes import BLOCK, decode
from .sharding import gather, is_sharded, local, runs, shard_like, spread_as


@dataclass(frozen=True)
class LogCodes:
    """A positive float32 tensor as 8-bit codes (see the module's docstring).

    Attributes:
        codes: uint8, in the tensor's shape; sharded (DTensor) where the tensor is.
        low, step: float32, one for each block of `BLOCK` elements, the last of which may be shorter; of all blocks on
            every rank.
    """

    codes: Tensor
    low: Tensor
    step: Tensor

    @classmethod
    def encode(cls, values: Tensor) -> "LogCodes":
        """The codes of a float32 tensor of finite values > 0."""
        codes = torch.empty(values.numel(), dtype=torch.uint8, device=values.device)
        lows, steps = [values.new_empty(0)], [values.new_empty(0)]
        for out, block in zip(_blocks(codes), _blocks(values.reshape(-1)), strict=True):
            low = block.amin(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
            # As a difference of logs, because the quotient of extreme values overflows.
            step = ((block.amax(dim=1).log() - low.log()) / 255).clamp(min=0)
            relative = block.log().sub_(low.log()[:, None]).div_(step.clamp(min=torch.finfo(step.dtype).tiny)[:, None])
            out.copy_(relative.round_().clamp_(0, 255))
            lows.append(low)
            steps.append(step)
        return cls(codes.view(values.shape), torch.cat(lows), torch.cat(steps))

    def decode(self) -> Tensor:
        """The float32 tensor, in new memory."""
        codes: Any = self.codes
        if not is_sharded(codes):
            return decode(codes, self.low, self.step)
        flat = local(codes).view(-1)
        parts = [decode(flat[i : i + n], self.low, self.step, start) for i, start, n in runs(codes)]
        return spread_as(codes, torch.cat(parts) if parts else flat.float())

    @property
    def shape(self) -> torch.Size:
        """The tensor's shape."""
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(getattr(self, f.name).nbytes for f in fields(self))

    def numel(self) -> int:
        """Number of elements."""
        return self.codes.numel()

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> "LogCodes":
        """The codes on ``device``."""
        return LogCodes(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))

    def pin_memory(self) -> "LogCodes":
        """The codes in page-locked memory."""
        return LogCodes(*(getattr(self, f.name).pin_memory() for f in fields(self)))

    def gathered(self) -> "LogCodes":
        """The codes whole on every rank, on the CPU if they were sharded."""
        return self if not is_sharded(self.codes) else LogCodes(gather(self.codes), self.low, self.step).to("cpu")

    def beside(self, like: Tensor) -> "LogCodes":
        """The codes as ``like`` is spread, on its device."""
        return LogCodes(shard_like(self.codes, like), self.low.to(like.device), self.step.to(like.device))

    def error_bound(self) -> float:
        """Largest relative error of any element, apart from float32 rounding: exp(step / 2) - 1."""
        return torch.expm1(self.step.double() / 2).max().item() if len(self.step) else 0.0


Stored = Tensor | LogCodes
"""How a posterior keeps a tensor: as it is in float32, in bfloat16, or as codes."""

STORAGE = ("float32", "bfloat16", "log8")
"""Names of the ways to keep a tensor; ``log8`` (`LogCodes`) is for positive ones."""


def store(values: Stored, storage: str) -> Stored:
    """Keep a tensor as one of `STORAGE`; shared where it is kept so already."""
    if storage == "log8":
        return values if isinstance(values, LogCodes) else LogCodes.encode(values.float())
    return restore(values).to(getattr(torch, storage))


def restore(values: Stored) -> Tensor:
    """The float32 tensor; shared where it is kept as one."""
    return values.decode() if isinstance(values, LogCodes) else values.float()


class Restored(Mapping[str, Tensor]):
    """Stored tensors by name, each restored to float32 when it is read."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return restore(self._stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def stored(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """How the tensors are kept: what `Restored` reads, or themselves."""
    return dict(tensors._stored if isinstance(tensors, Restored) else tensors)


def _blocks(flat: Tensor) -> list[Tensor]:
    """Views of a flat tensor: its whole blocks as rows, and the rest as one row; those that have elements."""
    whole = flat.numel() // BLOCK * BLOCK
    return [t for t in (flat[:whole].view(-1, BLOCK), flat[whole:].view(1, -1)) if t.numel()]
