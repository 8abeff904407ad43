"""A factorised Gaussian over a model's parameters: the thing that is kept when the data goes."""

import copy
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed, ops, posterior_file
from .compression import STORAGE, LogCodes, Restored, Stored, restore, store, stored
from .errors import UsageError
from .modules import check_same, covered, fingerprint, learnable, require_suitable
from .predictive import Inputs, Prediction, predict
from .sharding import (
    Pieces,
    contiguous,
    gather,
    gather_on_first_rank,
    groups_of,
    is_sharded,
    largest,
    layout,
    local,
    raise_together,
    reshard,
    shard_like,
    sum_over_shards,
    writable,
)


class Posterior(Mapping[str, tuple[Tensor, Tensor]]):
    """Independent Gaussians N(mean, std**2), one per parameter element, by parameter name.

    A mapping from parameter name to ``(mean, std)``, both float32 in the parameter's shape. They may be sharded over
    ranks (DTensor), as the parameters of a sharded model are; all ranks then call its methods together. What `compress`
    made is restored at each access.

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
        raise_together(posterior_file.fault_of(means, stds), means.values())
        # The ops take contiguous tensors; those of a channels_last model are not.
        self._means, self._stds = (
            {n: contiguous(t) if isinstance(t, Tensor) else t for n, t in stored(tensors).items()}
            for tensors in (means, stds)
        )
        self.metadata: dict[str, Any] = dict(metadata or {})

    @classmethod
    def around(cls, model: nn.Module, std: float | Mapping[str, Tensor]) -> "Posterior":
        """A posterior whose means are copies of the model's parameters, with a given or constant std."""
        params = learnable(model)
        require_suitable(params)
        means = {n: p.detach().to(torch.float32, copy=True).contiguous() for n, p in params.items()}
        stds = {n: torch.full_like(m, std) if isinstance(std, float) else std[n] for n, m in means.items()}
        return cls(means, stds)

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        return restore(self._means[name]), restore(self._stds[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._means)

    def __len__(self) -> int:
        return len(self._means)

    def __repr__(self) -> str:
        return f"Posterior({len(self)} parameters, {self.numel():,} elements, metadata={self.metadata})"

    @property
    def means(self) -> Mapping[str, Tensor]:
        """Means by parameter name."""
        return Restored(self._means)

    @property
    def stds(self) -> Mapping[str, Tensor]:
        """Standard deviations by parameter name."""
        return Restored(self._stds)

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Shapes by parameter name."""
        return {n: m.shape for n, m in self._means.items()}

    @property
    def nbytes(self) -> int:
        """Bytes that its tensors hold."""
        return sum(t.nbytes for t in self._tensors())

    def fingerprint(self) -> str:
        """SHA-256 of names, shapes and values; of a sharded one all ranks call it together."""
        return hashlib.sha256((fingerprint(self.means) + fingerprint(self.stds)).encode()).hexdigest()

    def is_sharded(self) -> bool:
        """Whether the tensors are spread over ranks."""
        return any(is_sharded(t) for t in self._means.values() if isinstance(t, Tensor))

    def largest_std(self) -> float:
        """The largest standard deviation of any element, on any rank."""
        here = [part.max() for part in map(local, self.stds.values()) if part.numel()]
        value = torch.stack(here).max() if here else torch.zeros((), device=next(iter(self._stds.values())).device)
        return largest(value, groups_of(self.means.values())).item()

    def numel(self) -> int:
        """Number of Gaussians."""
        return sum(m.numel() for m in self._means.values())

    def to(self, device: str | torch.device) -> "Posterior":
        """This posterior on ``device``: tensors already there are shared, compressed ones stay so."""
        return self._map(lambda t: t.to(device))

    def pin_memory(self) -> "Posterior":
        """This posterior in page-locked memory of the CPU, from which a GPU fetches faster."""
        return self._map(lambda t: t.pin_memory())

    def compress(self, *, std: str = "log8", mean: str = "float32") -> "Posterior":
        """This posterior in fewer bytes, restored to float32 wherever it is read.

        As the prior of `BGD` or `distruction.forget` it stays compressed, 5 bytes per parameter instead of 8, or 3 with
        ``mean="bfloat16"``; codes are read by the update itself, with the bits of what they would be restored to.

        Args:
            std: ``log8``, 8-bit codes (`distruction.compression`); ``bfloat16`` (error up to 0.4 %); or ``float32``.
            mean: ``float32``, or ``bfloat16``: an error of up to 0.4 % of the mean, which may be many std.

        Raises:
            UsageError: an unknown way to store, or the posterior is sharded.
        """
        if self.is_sharded():
            raise UsageError("a sharded posterior cannot be compressed; compress posterior.gathered()")
        for what, storage, allowed in (("std", std, STORAGE), ("mean", mean, STORAGE[:2])):
            if storage not in allowed:
                raise UsageError(f"{what}={storage!r} is unknown; choose {', '.join(allowed)}")
        compressed = copy.copy(self)
        compressed._means = {n: store(t, mean) for n, t in self._means.items()}
        compressed._stds = {n: store(t, std) for n, t in self._stds.items()}
        return compressed

    def fetch(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """The ``(mean, std)`` of a parameter on ``device``: moved as they are stored, then restored there."""
        mean, std = self.fetch_stored(name, device)
        return restore(mean), restore(std)

    def fetch_stored(self, name: str, device: torch.device) -> tuple[Stored, Stored]:
        """The ``(mean, std)`` of a parameter on ``device``, as they are stored."""
        return self._means[name].to(device, non_blocking=True), self._stds[name].to(device, non_blocking=True)

    def is_in_codes(self) -> bool:
        """Whether a step reads it as it is stored: all stds in `LogCodes`, all means in one type."""
        types = {getattr(t, "dtype", None) for t in self._means.values()}
        return len(types) == 1 and all(isinstance(t, LogCodes) for t in self._stds.values())

    def at_hand(self, device: torch.device) -> bool:
        """Whether a step takes no memory for it: all is on ``device``, in float32 or in codes."""
        floats = all(isinstance(t, Tensor) and t.dtype == torch.float32 for t in self._tensors())
        return (floats or self.is_in_codes()) and all(t.device == device for t in self._tensors())

    def _tensors(self) -> list[Stored]:
        return [*self._means.values(), *self._stds.values()]

    def _map(self, function: Callable[[Stored], Stored]) -> "Posterior":
        mapped = copy.copy(self)
        mapped._means = {n: function(t) for n, t in self._means.items()}
        mapped._stds = {n: function(t) for n, t in self._stds.items()}
        return mapped

    def restricted(self, names: Iterable[str]) -> "Posterior":
        """This posterior over some of its parameters; tensors are shared."""
        kept = set(names)
        part = copy.copy(self)
        part._means = {n: t for n, t in self._means.items() if n in kept}
        part._stds = {n: t for n, t in self._stds.items() if n in kept}
        return part

    def like(self, model: nn.Module) -> "Posterior":
        """This posterior over what ``model`` learns: without its frozen parameters, where it has the others.

        They are on their devices and, if they are sharded, as they are: each rank takes its part of a whole posterior
        without communication. A compressed one stays so.

        Raises:
            PosteriorError: as `check` does.
            UsageError: all parameters are frozen.
        """
        params = {n: p for n, p in covered(model, self.shapes).items() if p.requires_grad}
        if not params:
            raise UsageError("every parameter of the model is frozen: call requires_grad_(True) on what is to learn")
        return self.restricted(params)._beside(params)

    def _beside(self, params: Mapping[str, Tensor]) -> "Posterior":
        """This posterior where the parameters are, which are its own."""

        def beside(t: Stored, param: Tensor) -> Stored:
            return t.beside(param) if isinstance(t, LogCodes) else shard_like(t, param)

        placed = copy.copy(self)
        placed._means = {n: beside(t, params[n]) for n, t in self._means.items()}
        placed._stds = {n: beside(t, params[n]) for n, t in self._stds.items()}
        return placed

    def gathered(self) -> "Posterior":
        """This posterior with whole tensors on every rank, on the CPU if it was sharded."""
        whole = copy.copy(self)
        whole._means, whole._stds = (
            {n: t.gathered() if isinstance(t, LogCodes) else gather(t).cpu() if is_sharded(t) else t for n, t in ts}
            for ts in (self._means.items(), self._stds.items())
        )
        return whole

    def kl(self, prior: "Posterior", *, backend: str = "auto") -> Tensor:
        """KL(self || prior) in nats, a float64 scalar (paper, section 3.2).

        The prior may cover more: parameters that were frozen since are where it has them and add nothing.

        Raises:
            PosteriorError: the prior lacks a parameter, or has it in another shape.
        """
        check_same(self.shapes, prior.shapes, "the prior")
        layouts: dict[Any, list[str]] = {}
        for name, mean in self.means.items():
            layouts.setdefault(layout(mean), []).append(name)
        parts = []
        for names in layouts.values():
            means = [self.means[n] for n in names]
            pieces = Pieces(means, [0] * len(names))
            here = [means, *([t[n] for n in names] for t in (self.stds, prior.means, prior.stds))]
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
            model: it must have a parameter of each of this posterior's names and shapes, of which some may be frozen,
                and learn no other.
            same_weights: require also that the model's weights, frozen ones too, are the means (to the lower of both
                precisions).

        Raises:
            UsageError: a parameter is of a kind that no posterior can cover, such as float64.
            PosteriorError: with the first few names, shapes or the parameter that differ.
        """
        params = covered(model, self.shapes)
        if same_weights:
            fault = None
            for name, p in params.items():
                mean = self._means[name]
                assert isinstance(mean, Tensor)
                kept = shard_like(mean, p)
                coarser = kept.dtype if p.dtype == torch.float32 else p.dtype
                if not torch.equal(local(p.detach()).to(coarser), local(kept).to(coarser)):
                    fault = (
                        f"the posterior was prepared for other weights: {name} differs from its mean; load its "
                        "model, or call posterior.mean_(model); after an earlier request pass previous= (--previous)"
                    )
                    break
            raise_together(fault, params.values())

    @torch.no_grad()
    def mean_(self, model: nn.Module) -> None:
        """Write the means into the model's parameters, frozen ones too."""
        for name, p in covered(model, self.shapes).items():
            local(p).copy_(local(shard_like(self.means[name], p)))

    @torch.no_grad()
    def sample_(self, model: nn.Module, *, seed: int, draw: int = 0, backend: str = "auto") -> None:
        """Write a sample mean + std * eps into the model's parameters, frozen ones too.

        The same (seed, draw) gives the same sample, whatever is frozen.

        Args:
            model: the model that this posterior belongs to.
            seed: 64-bit key of the generator.
            draw: number of the sample, in [0, 2**32).
            backend: see `distruction.ops`.
        """
        params = covered(model, self.shapes)
        here = self._beside(params)
        pieces = Pieces(list(params.values()), list(range(len(params))))
        held, outs = zip(*(writable(p) for p in params.values()), strict=True)
        state = ops.State(pieces.of([here.means[n] for n in params]), pieces.of([here.stds[n] for n in params]))
        counters = torch.tensor([draw, 0, 0], device=next(iter(params.values())).device)
        draws = ops.Draws(pieces.offsets, pieces.streams, seed, counters)
        ops.sample(pieces.of(outs), state, draws, backend=backend)
        for out, t in zip(outs, held, strict=True):
            if out is not t:
                t.copy_(out)

    def predict(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        samples: int = 10,
        seed: int = 0,
        batch_size: int | None = None,
        backend: str = "auto",
    ) -> Prediction:
        """What ``model`` predicts on average over samples of its weights: p(y | x) = mean_k softmax(f(x; theta_k)).

        It runs in eval mode without gradients. Its weights, buffers and modes are then what they were, whatever
        happens. Sample k is that of ``sample_(model, seed=seed, draw=k)``, for every batch.

        Args:
            model: the model that this posterior belongs to.
            inputs: a tensor (inputs, ...); a dictionary of tensors, for models that take named ones; or an iterable of
                batches, each one of these or a tuple that begins with one.
            samples: how many, >= 1.
            seed: 64-bit key of the generator.
            batch_size: rows of a tensor to compute at a time; ``None``: all.
            backend: see `distruction.ops`.

        Raises:
            UsageError: an argument is out of range, or there are no inputs.
            PosteriorError: this posterior belongs to another model.
        """
        reshard(model)
        params = covered(model, self.shapes).values()
        return predict(
            model,
            params,
            lambda number: self.sample_(model, seed=seed, draw=number, backend=backend),
            inputs,
            samples=samples,
            seed=seed,
            batch_size=batch_size,
        )

    def save(self, path: str | os.PathLike[str], *, compress: bool = False) -> None:
        """Write a safetensors file atomically; its header has the metadata and a checksum of everything.

        Args:
            path: the file.
            compress: keep the stds alone, as 8-bit codes: about one byte per parameter. The means are then those of
                the model's checkpoint, which `load` needs and checks by their SHA-256.

        A sharded posterior is gathered one tensor at a time, by all ranks together, and rank 0 alone writes it.

        Raises:
            UsageError: ``compress`` and the means are in bfloat16, so that they are no checkpoint's.
            OSError: the disk is full, the folder is read-only, ...; the file is as it was before.
        """
        if self.is_sharded():
            means, stds = gather_on_first_rank(self.means), gather_on_first_rank(self.stds)
            if distributed.rank() == 0:
                Posterior(means, stds, self.metadata).save(path, compress=compress)
            return
        posterior_file.write(path, self._means, self._stds, self.metadata, compress=compress)

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
            path: the file. The stds of a compressed one stay compressed in memory; see `compress`.
            map_location: device of the tensors.
            model: when given, the posterior must belong to it (see `check`); of a sharded model each rank keeps its
                part. A compressed file needs it, with the weights that it was prepared for: copies of them are the
                means.

        Raises:
            FileNotFoundError: there is no such file.
            PosteriorError: damaged, of another format, inconsistent, or of another model or (compressed) other weights.
        """
        posterior = cls(*posterior_file.read(path, map_location=map_location, model=model))
        return posterior if model is None else posterior._of(model)

    def _of(self, model: nn.Module) -> "Posterior":
        """This posterior, checked to belong to the model; of a sharded one this rank's part."""
        params = covered(model, self.shapes)
        return self._beside(params) if any(map(is_sharded, params.values())) else self
