"""A factorised Gaussian over a model's parameters: the thing that is kept when the data goes."""

import copy
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from . import distributed, ops
from .errors import PosteriorError
from .files import load_tensors, save_tensors
from .sharding import Pieces, gather, groups_of, is_sharded, largest, layout, local, shard_like, sum_over_shards

FORMAT = "distruction-posterior-1"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel`` and ``torch.compile``, whose parameters have their own names."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, OptimizedModule):
            model = model._orig_mod
        else:
            return model


def learnable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that a posterior covers, by name: each with ``requires_grad``, tied ones once."""
    return {name: p for name, p in unwrapped(model).named_parameters() if p.requires_grad}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values in the order of the mapping."""
    digest = hashlib.sha256()
    for name, t in tensors.items():
        digest.update(f"{name}:{tuple(t.shape)};".encode())
        digest.update(gather(t.detach()).float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


class Posterior(Mapping[str, tuple[Tensor, Tensor]]):
    """Independent Gaussians N(mean, std**2), one per parameter element, by parameter name.

    A mapping from parameter name to ``(mean, std)``, both float32 in the parameter's shape. They may be sharded over
    ranks (DTensor), as the parameters of a sharded model are; all ranks then call its methods together.

    Args:
        means: parameter name to mean.
        stds: parameter name to standard deviation, finite and > 0; same names and shapes.
        metadata: JSON-able facts about how it was made; kept in the file.

    Raises:
        PosteriorError: names or shapes differ, a value is not finite, or a std is not positive.

    >>> p = Posterior({"w": torch.zeros(3)}, {"w": torch.full((3,), 0.5)})
    >>> q = Posterior({"w": torch.ones(3)}, {"w": torch.full((3,), 0.5)})
    >>> float(q.kl(p))
    6.0
    """

    def __init__(
        self, means: Mapping[str, Tensor], stds: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
    ) -> None:
        if not means:
            raise PosteriorError(
                "a posterior needs at least one parameter; does the model have any that requires_grad?"
            )
        if list(means) != list(stds):
            raise PosteriorError(
                f"means and stds name different parameters: {_difference(means, stds)}; give both for each name"
            )
        _raise_together(_fault(means, stds), [*means.values(), *stds.values()])
        self._means, self._stds = dict(means), dict(stds)
        self.metadata: dict[str, Any] = dict(metadata or {})

    @classmethod
    def around(cls, model: nn.Module, std: float | Mapping[str, Tensor]) -> "Posterior":
        """A posterior whose means are copies of the model's parameters, with a given or constant std."""
        means = {n: p.detach().to(torch.float32, copy=True).contiguous() for n, p in learnable(model).items()}
        stds = {n: torch.full_like(m, std) if isinstance(std, float) else std[n] for n, m in means.items()}
        return cls(means, stds)

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        return self._means[name], self._stds[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._means)

    def __len__(self) -> int:
        return len(self._means)

    def __repr__(self) -> str:
        return f"Posterior({len(self)} parameters, {self.numel():,} elements, metadata={self.metadata})"

    @property
    def means(self) -> Mapping[str, Tensor]:
        """Means by parameter name."""
        return self._means

    @property
    def stds(self) -> Mapping[str, Tensor]:
        """Standard deviations by parameter name."""
        return self._stds

    def is_sharded(self) -> bool:
        """Whether the tensors are spread over ranks."""
        return any(is_sharded(t) for t in self._means.values())

    def largest_std(self) -> float:
        """The largest standard deviation of any element, on any rank."""
        here = [local(s).max() for s in self._stds.values() if local(s).numel()]
        value = torch.stack(here).max() if here else torch.zeros((), device=next(iter(self._stds.values())).device)
        return largest(value, groups_of(self._stds.values())).item()

    def numel(self) -> int:
        """Number of Gaussians."""
        return sum(m.numel() for m in self._means.values())

    def to(self, device: str | torch.device) -> "Posterior":
        """This posterior with its tensors on ``device``; tensors already there are shared."""
        moved = copy.copy(self)
        moved._means = {n: t.to(device) for n, t in self._means.items()}
        moved._stds = {n: t.to(device) for n, t in self._stds.items()}
        return moved

    def like(self, model: nn.Module) -> "Posterior":
        """This posterior where ``model`` has its parameters: on their devices and, if they are sharded, as they are.

        Each rank takes its part of a whole posterior without communication.
        """
        self.check(model)
        params = learnable(model)
        placed = copy.copy(self)
        placed._means = {n: shard_like(t, params[n]) for n, t in self._means.items()}
        placed._stds = {n: shard_like(t, params[n]) for n, t in self._stds.items()}
        return placed

    def gathered(self) -> "Posterior":
        """This posterior with whole tensors on every rank, on the CPU if it was sharded."""
        whole = copy.copy(self)
        whole._means, whole._stds = (
            {n: gather(t).cpu() if is_sharded(t) else t for n, t in tensors.items()}
            for tensors in (self._means, self._stds)
        )
        return whole

    def kl(self, prior: "Posterior", *, backend: str = "auto") -> Tensor:
        """KL(self || prior) in nats, a float64 scalar (paper, section 3.2).

        Raises:
            PosteriorError: the two are over different parameters.
        """
        _check_same(self._means, prior._means, "the prior")
        layouts: dict[Any, list[str]] = {}
        for name, mean in self._means.items():
            layouts.setdefault(layout(mean), []).append(name)
        parts = []
        for names in layouts.values():
            means = [self._means[n] for n in names]
            pieces = Pieces(means, [0] * len(names))
            here = [means, *([t[n] for n in names] for t in (self._stds, prior._means, prior._stds))]
            lists = [pieces.of(tensors) for tensors in here]
            if lists[0]:
                part = ops.gaussian_kl(*lists, backend=backend)[0]
            else:
                part = torch.zeros((), dtype=torch.float64, device=means[0].device)
            parts.append(sum_over_shards(part, means[0]))
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0]

    def check(self, model: nn.Module, *, same_weights: bool = False) -> None:
        """Raise unless this posterior belongs to ``model``.

        Args:
            model: its learnable parameters must have this posterior's names and shapes.
            same_weights: require also that the model's weights are the means (to the parameter's precision).

        Raises:
            PosteriorError: with the first few names, shapes or the parameter that differ.
        """
        params = learnable(model)
        _check_same(params, self._means, "the posterior")
        if same_weights:
            fault = None
            for name, p in params.items():
                if not torch.equal(local(p.detach()), local(shard_like(self._means[name], p)).to(p.dtype)):
                    fault = (
                        f"the posterior was prepared for other weights: {name} differs from its mean; load the "
                        "model that it was prepared for, or call posterior.mean_(model) to put its means in"
                    )
                    break
            _raise_together(fault, params.values())

    @torch.no_grad()
    def mean_(self, model: nn.Module) -> None:
        """Write the means into the model's parameters."""
        self.check(model)
        for name, p in learnable(model).items():
            local(p).copy_(local(shard_like(self._means[name], p)))

    @torch.no_grad()
    def sample_(self, model: nn.Module, *, seed: int, draw: int = 0, backend: str = "auto") -> None:
        """Write a sample mean + std * eps into the model's parameters; the same (seed, draw) gives the same sample.

        Args:
            model: the model that this posterior belongs to.
            seed: 64-bit key of the generator.
            draw: number of the sample, in [0, 2**32).
            backend: see `distruction.ops`.
        """
        params = learnable(model)
        here = self.like(model)
        pieces = Pieces(list(params.values()), list(range(len(params))))
        outs = pieces.of([local(p) for p in params.values()])
        ops.sample(
            outs,
            pieces.of([here._means[n] for n in params]),
            pieces.of([here._stds[n] for n in params]),
            pieces.offsets,
            pieces.streams,
            seed,
            torch.tensor([draw, 0, 0], device=next(iter(params.values())).device),
            False,
            False,
            backend,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file atomically: ``mean.NAME`` and ``std.NAME`` in float32, metadata as JSON.

        A sharded posterior is gathered one tensor at a time, by all ranks together, and rank 0 alone writes it.
        """
        tensors = {f"mean.{n}": t for n, t in self._means.items()} | {f"std.{n}": t for n, t in self._stds.items()}
        if self.is_sharded():
            for name, t in tensors.items():
                whole = gather(t)
                if distributed.rank() == 0:
                    tensors[name] = whole.cpu()
            if distributed.rank() != 0:
                return
        save_tensors(path, tensors, format=FORMAT, facts={"names": list(self), "metadata": self.metadata})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        map_location: str | torch.device = "cpu",
        model: nn.Module | None = None,
    ) -> "Posterior":
        """Read a file written by `save`, checked wholly before anything is returned.

        Args:
            path: the file.
            map_location: device of the tensors.
            model: when given, the posterior must belong to it (see `check`); of a sharded model each rank keeps its
                part.

        Raises:
            FileNotFoundError: there is no such file.
            PosteriorError: truncated, of another format, inconsistent, or of another model.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no posterior file at {path}; write one with `distruction prepare` or Posterior.save"
            )
        try:
            tensors, facts = load_tensors(path, format=FORMAT, device=str(map_location))
            names, metadata = facts["names"], facts["metadata"]
            means, stds = ({n: tensors.pop(f"{kind}.{n}") for n in names} for kind in ("mean", "std"))
        except (ValueError, KeyError, TypeError) as error:
            raise PosteriorError(f"{path} cannot be read as a posterior: {error}; prepare it again") from error
        if tensors:
            raise PosteriorError(f"{path} holds tensors that its header does not name: {sorted(tensors)[:3]}")
        posterior = cls(means, stds, metadata)
        if model is not None:
            posterior.check(model)
            if any(is_sharded(p) for p in model.parameters()):
                return posterior.like(model)
        return posterior


def _difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    only_a, only_b = sorted(set(a) - set(b)), sorted(set(b) - set(a))
    return f"only in the first {only_a[:3]}, only in the second {only_b[:3]}"


def _fault(means: Mapping[str, Tensor], stds: Mapping[str, Tensor]) -> str | None:
    """What is wrong with these tensors or, of sharded ones, with the parts on this rank."""
    for name, mean in means.items():
        std = stds[name]
        if mean.shape != std.shape:
            return f"{name}: mean is {tuple(mean.shape)} but std is {tuple(std.shape)}"
        for what, t in (("mean", mean), ("std", std)):
            if t.dtype != torch.float32:
                return f"{name}: {what} is {t.dtype}; convert it to torch.float32"
            if not local(t).isfinite().all():
                return f"{name}: {what} holds NaN or infinity; prepare the posterior again"
        if not (local(std) > 0).all():
            return f"{name}: std must be > 0, its smallest value is {local(std).min().item():g}"
    return None


def _raise_together(fault: str | None, tensors: Iterable[Tensor]) -> None:
    """Raise the fault; if ``tensors`` are sharded, on all ranks as soon as one has a fault."""
    tensors = list(tensors)
    flag = torch.tensor(fault is not None, dtype=torch.int32, device=tensors[0].device)
    if largest(flag, groups_of(tensors)).item():
        raise PosteriorError(fault or "the posterior's part on another rank is at fault; that rank's message says how")


def _check_same(params: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str) -> None:
    if set(params) != set(other):
        raise PosteriorError(f"{what} belongs to another model: {_difference(params, other)}")
    for name, p in params.items():
        if p.shape != other[name].shape:
            raise PosteriorError(
                f"{what} belongs to another model: {name} is {tuple(p.shape)} here, {tuple(other[name].shape)} there"
            )
