"""What can be told of a loader without reading it: whether it can serve a run, and how much it draws."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from ..errors import DistructionWarning, UsageError


@dataclass(frozen=True)
class Role:
    """What a run does with its data, for messages and checks.

    Attributes:
        title: of the run.
        name: of the data.
        loss: of the loss function.
        whole: each record has to be read.
    """

    title: str
    name: str
    loss: str
    whole: bool


TRAINING = Role("prepare", "the training set", "loss_fn", whole=False)
FORGET_SET = Role("forget", "the forget set", "the objective", whole=True)


def check_loader(loader: Any, role: Role, steps: int) -> None:
    """Refuse at once what cannot be repeated, gives nothing or leaves records of a forget set unread.

    Raises:
        UsageError: says why and what to do.
    """
    # One with a reset starts again when it is iterated over, as NVIDIA DALI's do.
    if isinstance(loader, Iterator) and not hasattr(loader, "reset"):
        raise UsageError(
            f"the loader of {role.name} is a {type(loader).__name__}, which can be read once, and a run repeats its "
            "data: pass a DataLoader, or list(...) of the batches"
        )
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise UsageError(
            f"the loader of {role.name} is a {type(loader).__name__}, which cannot be iterated over: pass a DataLoader "
            "or a list of batches"
        )
    if isinstance(loader, Dataset):
        raise UsageError(
            f"the loader of {role.name} is a {type(loader).__name__}, a data set and no loader of batches: pass "
            "DataLoader(it, batch_size=64, shuffle=True)"
        )
    if isinstance(loader, str | bytes | Mapping | Tensor):
        raise UsageError(
            f"the loader of {role.name} is a {type(loader).__name__}, which cannot be read as batches: pass a "
            "DataLoader or a list of batches"
        )
    length, examples = _size(loader), examples_in(loader)
    if length == 0 or examples == 0:
        raise UsageError(why_empty(loader, role, 0))
    if not role.whole or length is None:
        return
    if (dropping := _dropping(loader)) is not None:
        count, size = dropping
        if unread := count % size:
            raise UsageError(
                f"the loader of {role.name} has drop_last=True, which leaves {unread} of the {count} records unread; "
                "use drop_last=False, or a batch_size that divides their number"
            )
    if (part := _part_drawn(loader)) is not None:
        raise UsageError(
            f"the loader of {role.name} draws {part}, so that some are not read: use shuffle=True, and for a part of "
            "the records a torch.utils.data.Subset"
        )
    if steps < length:
        warnings.warn(
            f"{steps} steps read {steps} of the {length} batches of {role.name}: the others' records are not "
            f"forgotten by being read. Use steps >= {length} or larger batches",
            DistructionWarning,
            stacklevel=4,
        )


def examples_in(loader: Any) -> int | None:
    """How many examples an epoch of the loader draws, on all ranks together; ``None`` where that cannot be told."""
    if isinstance(loader, list | tuple):
        return _in_batches(loader)
    dataset = getattr(loader, "dataset", None)
    sampler = _index_sampler(loader)
    if isinstance(sampler, list | tuple):  # of batches of indices
        return sum(map(len, sampler))
    if type(sampler) in (SequentialSampler, RandomSampler) and sampler is loader.sampler and loader.batch_size is None:
        # The data set gives batches.
        every_batch = isinstance(dataset, list | tuple) and _size(sampler) == len(dataset)
        return _in_batches(dataset) if every_batch else None
    drawn = _size(sampler) if sampler is not None else None
    if drawn is not None and hasattr(dataset, "__getitem__"):
        if sampler is getattr(loader, "batch_sampler", None):  # of one's own
            size = getattr(sampler, "batch_size", None)
            return None if size is None else drawn * size
        ranks = max(getattr(sampler, name, 1) for name in ("num_replicas", "num_processes"))
        # The last indices of a distributed sampler are repetitions that fill up the ranks' parts.
        whole = _size(dataset)
        return drawn if ranks == 1 or whole is None else min(drawn * ranks, whole)
    return None if dataset is None else _size(dataset)


def why_empty(loader: Any, role: Role, steps: int) -> str:
    """Why an epoch after ``steps`` batches gave none."""
    if steps:
        return (
            f"the loader of {role.name} gave {steps} batches and none when it was iterated over a second time: a run "
            "repeats its data, so pass a DataLoader, or list(...) of the batches"
        )
    if (dropping := _dropping(loader)) is not None and 0 < dropping[0] < dropping[1]:
        return (
            f"the loader of {role.name} gives no batch: its {dropping[0]} records are fewer than a batch of "
            f"{dropping[1]}, and drop_last=True drops them; use drop_last=False or a smaller batch_size"
        )
    return f"{role.name} is empty: its loader gives no batch; give the records to {role.title}"


def restarted(loader: Any) -> Any:
    """The loader with workers of its own: persistent ones go on drawing from where an earlier reader left them."""
    if getattr(loader, "persistent_workers", False) and hasattr(loader, "_iterator"):
        loader = copy.copy(loader)
        loader._iterator = None
    return loader


def epoch_length(loader: Any) -> int | None:
    """Batches of an epoch, where it is known that one epoch leaves nothing behind for the next; else ``None``."""
    if type(loader) in (list, tuple):
        return len(loader)
    known = (
        type(loader) is DataLoader
        and not loader.persistent_workers
        and loader.collate_fn is default_collate
        and type(loader.batch_sampler) is BatchSampler
        and type(loader.sampler) in (SequentialSampler, RandomSampler, DistributedSampler)
        and _keeps_nothing(loader.dataset)
    )
    return len(loader) if known else None


def samplers(loader: Any) -> Iterator[Any]:
    """The loader's samplers and those inside of them."""
    for name in ("sampler", "batch_sampler"):
        if (inner := getattr(loader, name, None)) is not None:
            yield inner
            yield from samplers(inner)


def generators(loader: Any) -> list[torch.Generator]:
    """The generators that the loader and its samplers draw from, besides the global ones."""
    found = [getattr(owner, "generator", None) for owner in (loader, *samplers(loader))]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _keeps_nothing(dataset: Any) -> bool:
    if type(dataset) is Subset:
        return _keeps_nothing(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(map(_keeps_nothing, dataset.datasets))
    return type(dataset) is TensorDataset


def _size(sized: Any) -> int | None:
    """Its length, where it has one."""
    try:
        return len(sized)
    except (TypeError, NotImplementedError):  # a DataLoader of a stream has the method, not the length
        return None


def _index_sampler(loader: Any) -> Any:
    """What gives the single indices that the loader reads, or ``None``; a custom batch sampler gives lists of them."""
    sampler = getattr(loader, "sampler", None)
    batches = getattr(loader, "batch_sampler", None)
    if batches is not None and getattr(loader, "batch_size", None) is None:
        sampler = batches
    while (inner := getattr(sampler, "sampler", getattr(sampler, "batch_sampler", None))) is not None:
        sampler = inner
    return sampler


def _in_batches(batches: Any) -> int | None:
    """Examples in a list of batches."""
    count = 0
    for batch in batches:
        entries = list(batch.values()) if isinstance(batch, Mapping) else batch
        last = entries[-1] if isinstance(entries, list | tuple) and entries else None
        size = _size(last) if last is not None else None
        if size is None:
            return None
        count += size
    return count


def _part_drawn(loader: Any) -> str | None:
    """What an epoch draws of the records, in words, where it leaves some of them to chance."""
    sampler = _index_sampler(loader)
    if isinstance(sampler, RandomSampler | WeightedRandomSampler):
        count = len(sampler.weights if isinstance(sampler, WeightedRandomSampler) else sampler.data_source)
        if sampler.replacement:
            return f"{sampler.num_samples} times from its {count} records, with replacement"
        return f"{sampler.num_samples} of its {count} records" if sampler.num_samples < count else None
    if isinstance(sampler, DistributedSampler):
        count = len(sampler.dataset)  # type: ignore[arg-type]
        return f"{sampler.total_size} of its {count} records (drop_last=True)" if sampler.total_size < count else None
    return None


def _dropping(loader: Any) -> tuple[int, int] | None:
    """Records and batch size of a loader with ``drop_last``."""
    for owner in (loader, *samplers(loader)):
        size = getattr(owner, "batch_size", None)
        if getattr(owner, "drop_last", False) is True and isinstance(size, int):
            records = _size(_index_sampler(loader))
            if records is None:
                records = _size(getattr(loader, "dataset", None))
            return None if records is None else (records, size)
    return None
