"""Parameters sharded over ranks (DTensor, as ``fully_shard`` makes them): what this rank holds, and reductions.

Draws go by an element's flat index in the whole parameter, so a shard is handed to the ops as its contiguous
ranges of that index, each with its offset. A shard along the first dimension (FSDP's) is one range; along a later
dimension it is one range per leading index.
"""

import functools
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import distributed
from .errors import PosteriorError, UsageError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Run = tuple[int, int, int]
_ORDINARY = {Tensor, nn.Parameter}


@functools.cache
def _dtensor() -> type:
    """DTensor's class, imported when a tensor may be one: it takes as long as a third of PyTorch."""
    if not dist.is_available():
        return type(None)
    from torch.distributed.tensor import DTensor

    return DTensor


def _is_dtensor(t: Any) -> "TypeGuard[DTensor]":
    # Not by the set, which torch 2.8 cannot trace.
    return type(t) is not Tensor and type(t) is not nn.Parameter and isinstance(t, _dtensor())


def is_sharded(t: Tensor) -> bool:
    """Whether ``t`` is a DTensor (replicated ones included)."""
    return _is_dtensor(t)


def are_ordinary(tensors: Iterable[Tensor]) -> bool:
    """Whether all are plain tensors or parameters: a quick question for a step, which asks it of thousands."""
    if torch.compiler.is_compiling():  # torch 2.8 traces neither sets of types nor generators
        return not [t for t in tensors if is_sharded(t)]
    return set(map(type, tensors)) <= _ORDINARY


def local(t: Tensor) -> Tensor:
    """What this rank holds of ``t``, sharing its memory; an ordinary tensor itself. Call it under ``no_grad``."""
    return t.to_local() if _is_dtensor(t) else t


def layout(t: Tensor) -> Any:
    """Equal for tensors that are spread in the same way; ``None`` for an ordinary one."""
    return (t.device_mesh, t.placements) if _is_dtensor(t) else None


@functools.lru_cache(maxsize=4096)
def _runs(shape: torch.Size, mesh: Any, placements: Any) -> tuple[Run, ...]:
    if any(p.is_partial() for p in placements):
        raise UsageError(f"a parameter is placed as {placements}; redistribute it to Shard or Replicate")
    last = max((p.dim for p in placements if not p.is_replicate()), default=-1)
    # An index over the dimensions up to the last sharded one, spread as the parameter is, tells where its parts are.
    index = torch.arange(math.prod(shape[: last + 1])).view(shape[: last + 1])
    from torch.distributed.tensor import distribute_tensor

    rows = distribute_tensor(index, mesh, placements, src_data_rank=None).to_local().flatten().cpu()
    length = math.prod(shape[last + 1 :])
    if rows.numel() * length == 0:
        return ()
    breaks = ((rows.diff() != 1).nonzero().flatten() + 1).tolist()
    return tuple(
        (a * length, int(rows[a]) * length, (b - a) * length) for a, b in itertools.pairwise([0, *breaks, rows.numel()])
    )


def runs(t: "DTensor") -> tuple[Run, ...]:
    """The contiguous ranges of ``t`` on this rank: (start in the flat shard, start in the flat whole, length).

    Raises:
        UsageError: ``t`` holds partial sums.
    """
    return _runs(t.shape, t.device_mesh, tuple(t.placements))


class Pieces:
    """How some parameters fall into the contiguous pieces that the ops take; whole ones stay as they are.

    Args:
        params: parameters, any of which may be a DTensor.
        streams: generator stream of each.

    Attributes:
        offsets, streams: of each piece, as the ops take them.
    """

    def __init__(self, params: Sequence[Tensor], streams: Sequence[int]) -> None:
        self._runs = [runs(p) if _is_dtensor(p) else None for p in params]
        self.offsets: list[int] = []
        self.streams: list[int] = []
        for stream, cuts in zip(streams, self._runs, strict=True):
            starts = [0] if cuts is None else [start for _, start, _ in cuts]
            self.offsets += starts
            self.streams += [stream] * len(starts)

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The pieces of ``tensors``, one tensor per parameter, as views.

        A tensor is spread as its parameter is, or is that shard itself, contiguous; an ordinary tensor of the
        parameter's whole shape is cut as well.
        """
        pieces: list[Tensor] = []
        for t, cuts in zip(tensors, self._runs, strict=True):
            if cuts is None:
                pieces.append(t)
            elif _is_dtensor(t):
                flat = t.to_local().view(-1)
                pieces += [flat[here : here + length] for here, _, length in cuts]
            else:
                flat = t.view(-1)
                whole = flat.numel() != sum(length for _, _, length in cuts)
                pieces += [flat[i : i + length] for here, start, length in cuts for i in [start if whole else here]]
        return pieces

    def repeated(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """One tensor per piece: what belongs to a whole parameter, for each of its pieces."""
        return [t for t, cuts in zip(tensors, self._runs, strict=True) for _ in ([None] if cuts is None else cuts)]


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """``whole`` as ``like`` is spread, on its device: this rank's part, taken without communication.

    A sharded tensor stays as it is, or is gathered by all ranks together for an ordinary ``like``.
    """
    if not _is_dtensor(like):
        return gather(whole).to(like.device)
    if _is_dtensor(whole):
        return whole.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    part = distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return part.clone()


def spread_as(like: "DTensor", here: Tensor) -> Tensor:
    """The tensor of which this rank has ``here``, in any shape: spread as ``like`` is."""
    part = here.view(like.to_local().shape)
    return type(like).from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def reshard(model: nn.Module) -> None:
    """Drop the whole parameters that a forward pass without a backward left in a ``fully_shard``-ed model.

    The next forward pass would use them in place of what an optimizer wrote into the shards since.
    """
    for module in _sharded_modules(model):
        module.reshard()


def average_by_dividing(model: nn.Module) -> None:
    """Let ``fully_shard`` sum the gradients and divide them by the number of ranks.

    torch 2.8 asks the backend for the average, and Gloo, which has none, gives the sum without a word.
    """
    for module in _sharded_modules(model):
        module.set_force_sum_reduction_for_comms(True)


def _sharded_modules(model: nn.Module) -> Iterator[Any]:
    """The modules that ``fully_shard`` was applied to."""
    # A model can be sharded only where somebody has imported this.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and dist.is_available():
        yield from (m for m in model.modules() if isinstance(m, fsdp.FSDPModule))


def gather(t: Tensor) -> Tensor:
    """The whole tensor on each rank; every rank that holds a part has to call it."""
    return t.full_tensor() if _is_dtensor(t) else t


def gather_on_first_rank(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors in the CPU's memory of rank 0, one gathered after another; nothing on the other ranks."""
    whole = {}
    for name, t in tensors.items():
        gathered = gather(t)
        if distributed.rank() == 0:
            whole[name] = gathered.cpu()
    return whole


def sum_over_shards(value: Tensor, of: Tensor) -> Tensor:
    """``value`` summed over the ranks that hold different parts of ``of``; replicas count once."""
    if _is_dtensor(of):
        value = value.clone()
        for dim, placement in enumerate(of.placements):
            if not placement.is_replicate():
                dist.all_reduce(value, group=of.device_mesh.get_group(dim))
    return value


def groups_of(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """The process groups over which ``tensors`` are spread, in the same order on each rank."""
    seen = []
    for t in tensors:
        if _is_dtensor(t) and t.device_mesh not in seen:
            seen.append(t.device_mesh)
            yield from t.device_mesh.get_all_groups()


def largest(value: Tensor, groups: Iterable[Any]) -> Tensor:
    """The elementwise maximum of ``value`` over the ranks of all ``groups``, in place."""
    for group in groups:
        dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
    return value


def writable(p: Tensor) -> tuple[Tensor, Tensor]:
    """What this rank holds of ``p``, and where an op may write it: the same, or a contiguous buffer to copy back."""
    held = local(p)
    if held.is_contiguous():
        return held, held
    return held, torch.empty_like(held, memory_format=torch.contiguous_format)


def contiguous(t: Tensor) -> Tensor:
    """``t`` with the elements that this rank holds in row-major order, as the ops take them; shared where it is so."""
    return t if local(t).is_contiguous() else t.contiguous()


def raise_together(fault: str | None, tensors: Iterable[Tensor]) -> None:
    """Raise the fault; if ``tensors`` are sharded, on all ranks as soon as one has a fault."""
    tensors = list(tensors)
    device = tensors[0].device if tensors else None
    flag = torch.tensor(fault is not None, dtype=torch.int32, device=device)
    if largest(flag, groups_of(tensors)).item():
        raise PosteriorError(fault or "the posterior's part on another rank is at fault; that rank's message says how")
