"""Gradients of the whole batch on every rank."""

import math

import torch
from torch import Tensor, nn

from .. import distributed
from ..errors import UsageError
from ..modules import learnable
from ..sharding import average_by_dividing, groups_of, is_sharded, largest, layout, local


class Gradients:
    """Makes each rank's gradients those of the whole batch: by the model's wrapper, or by an all-reduce.

    Attributes:
        sharded: whether parameters are sharded over the ranks.
        norms: of earlier samples of the current update, whose gradients are gone: the largest magnitude in each
            parameter's gradient, by name.

    Raises:
        UsageError: the model is sharded otherwise than by ``fully_shard`` over all ranks.
    """

    def __init__(self, model: nn.Module) -> None:
        self._params = learnable(model)
        params = list(self._params.values())
        sharded = [p for p in params if is_sharded(p)]
        wrapped = any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules())
        for p in sharded:
            mesh, placements = layout(p)
            if mesh.size() != distributed.size() or sum(not place.is_replicate() for place in placements) != 1:
                raise UsageError(
                    f"a parameter is placed as {tuple(placements)} on {mesh.size()} of {distributed.size()} ranks; "
                    "prepare and forget know data parallel models alone (DistributedDataParallel, fully_shard over "
                    "all ranks); for others use BGD in a loop of your own"
                )
        self.sharded = bool(sharded)
        if sharded and sharded[0].device.type == "cpu":
            average_by_dividing(model)
        self.norms: list[dict[str, Tensor]] = []
        # Both wrappers average over the ranks where a sum is due.
        self._scale = distributed.size() if sharded or wrapped else 1
        self._ours = [] if wrapped or distributed.size() == 1 else [p for p in params if not is_sharded(p)]

    def backward(self, loss: Tensor) -> None:
        """Backward from the loss of the whole batch."""
        (loss * self._scale if self._scale > 1 else loss).backward()
        grads = [p.grad for p in self._ours if p.grad is not None]
        distributed.all_reduce_(grads)
        if self._scale > 1 and grads:
            torch._foreach_div_(grads, self._scale)

    def remember(self) -> None:
        """Keep what `nonfinite` needs of gradients that are about to go; waits for nothing."""
        self.norms.append(self._norms())

    @torch.no_grad()
    def nonfinite(self) -> list[str]:
        """Names of the parameters whose gradient is NaN or infinite in a sample of this update, on any rank."""
        names = list(self._params)
        flags = torch.zeros(len(names), dtype=torch.int32, device=next(iter(self._params.values())).device)
        for norms in [*self.norms, self._norms()]:
            for name, norm in norms.items():
                flags[names.index(name)] |= (~norm.isfinite()).int().to(flags.device)
        largest(flags, groups_of(self._params.values()))
        return [name for name, flag in zip(names, flags.tolist(), strict=True) if flag]

    @torch.no_grad()
    def _norms(self) -> dict[str, Tensor]:
        grads = {n: local(p.grad) for n, p in self._params.items() if p.grad is not None}
        filled = {n: g for n, g in grads.items() if g.numel()}
        return dict(zip(filled, torch._foreach_norm(list(filled.values()), math.inf), strict=True)) if filled else {}
