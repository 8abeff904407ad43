"""Ranks: who this process is among those of ``torchrun``, and the few collectives that the library needs."""

import atexit
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

BUCKET_BYTES = 32 * 2**20


def start() -> None:
    """Join the processes of ``torchrun`` or ``accelerate launch``, once, until exit; without them, nothing."""
    launched = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    if launched and dist.is_available() and not dist.is_initialized():
        dist.init_process_group()
        atexit.register(stop)


def stop() -> None:
    """Leave them, as `start` does at exit; whoever joined them otherwise calls it last.

    Gloo's threads end with the last reference to the process group, which a global model, wrapped or sharded, still
    holds. One that drops a collective's tensors after Python has ended aborts the process (PyTorch issue 190489).
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        # DTensor's caches keep the meshes, and these the group.
        gc.collect()
        for mesh in (o for o in gc.get_objects() if type(o) is DeviceMesh):
            getattr(mesh, "_pg_registry", {}).clear()


def rank() -> int:
    """This process's number; 0 when it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_lost(error: BaseException) -> bool:
    """Whether ``error`` is what a collective raises when another rank died, was too late or left it."""
    if not dist.is_available():
        return False
    # Gloo raises bare RuntimeErrors, told by the source file in their text.
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo/transport" in str(error))


def agree(value: int, device: torch.device) -> bool:
    """Whether ``value`` is the same on all ranks."""
    if size() == 1:
        return True
    both = torch.tensor([value, -value], device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return bool(both[0] == -both[1])


def on_any_rank(value: bool, device: torch.device) -> bool:
    """Whether ``value`` holds on one rank at least; all ranks call it."""
    if size() == 1:
        return value
    told = torch.tensor(int(value), device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return bool(told)


def of_first_rank(value: int, device: torch.device) -> int:
    """Rank 0's ``value`` on all ranks."""
    if size() == 1:
        return value
    told = torch.tensor(value, device=device)
    dist.broadcast(told, 0)
    return int(told)


def gather_rows(rows: Tensor, start: int, total: int) -> Tensor:
    """Rows ``start ..`` from this rank and the others from theirs; gradients flow to this rank's rows alone."""
    if size() == 1:
        return rows
    whole = rows.new_zeros(total, *rows.shape[1:])
    stop = start + len(rows)
    whole[start:stop] = rows.detach()
    dist.all_reduce(whole)
    return torch.cat([whole[:start], rows, whole[stop:]])


def by_rows(function: Callable[[Any], Tensor], whole: Any) -> Tensor:
    """``function`` of a batch that every rank has, each computing its share of the rows; without gradients.

    Args:
        function: gives a row for each row of its argument, which is as ``whole``.
        whole: a tensor, or a mapping of tensors with as many rows.
    """
    length = len(whole if isinstance(whole, Tensor) else next(iter(whole.values())))
    start, stop = (i * length // size() for i in (rank(), rank() + 1))
    # A sharded model needs every rank in its forward pass.
    own = slice(start, stop) if stop > start else slice(0, 1)
    rows = function(whole[own] if isinstance(whole, Tensor) else {name: t[own] for name, t in whole.items()})
    return gather_rows(rows[: stop - start], start, length)


def all_reduce_(tensors: Sequence[Tensor], group: Any = None) -> None:
    """Sum each tensor over the ranks of ``group`` (all by default), in place, in a few large messages."""
    for bucket in _buckets(tensors):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            dist.all_reduce(bucket[0], group=group)
            continue
        flat = torch.cat([t.reshape(-1) for t in bucket])
        dist.all_reduce(flat, group=group)
        parts = flat.split([t.numel() for t in bucket])
        torch._foreach_copy_(bucket, [part.view_as(t) for part, t in zip(parts, bucket, strict=True)])


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in lists of one dtype, each of at most `BUCKET_BYTES` or of one tensor."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for t in tensors:
        bucket = by_dtype.setdefault(t.dtype, [])
        if bucket and sum(b.nbytes for b in bucket) + t.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = by_dtype[t.dtype] = []
        bucket.append(t)
    yield from by_dtype.values()
