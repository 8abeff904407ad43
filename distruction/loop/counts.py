"""How many examples of each label a training set has, told without reading its inputs."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from ..errors import UsageError
from .batches import unpack
from .loaders import TRAINING

_IMAGES = "distruction.data.images.Images"
"""The library's own data set, by name, because importing it takes long."""


def label_counts(loader: Any) -> dict[str, int] | None:
    """Training examples of each label, on all ranks together; ``None`` where they cannot be told for sure.

    They can of lists of batches, and of a plain `DataLoader` whose samplers, collation and data set are PyTorch's,
    torchvision's or the library's own, so that nothing unknown changes a label between the data set and the model.
    """
    if type(loader) in (list, tuple):
        try:
            found = [unpack(batch, TRAINING)[1] for batch in loader]
        except UsageError:
            return None  # the run says it
        return None if any(t.ndim != 1 for t in found) else _counts(torch.cat(found))
    if type(loader) is not DataLoader:
        return None
    in_batches = loader.batch_size is None and type(loader.sampler) is BatchSampler
    sampler = loader.sampler.sampler if in_batches else loader.sampler  # type: ignore[attr-defined]  # a BatchSampler
    batches = loader.sampler if in_batches else loader.batch_sampler
    plain = _name(loader.dataset) == _IMAGES if in_batches else loader.collate_fn is default_collate
    if not plain or type(batches) is not BatchSampler or batches.drop_last:
        return None
    labels = _labels(loader.dataset)
    if labels is None:
        return None
    if type(sampler) is SubsetRandomSampler:
        return _counts(labels[torch.as_tensor(sampler.indices)])
    return _counts(labels) if type(sampler) in (SequentialSampler, RandomSampler, DistributedSampler) else None


def _labels(dataset: Any) -> Tensor | None:
    """(N,) labels of a data set that keeps them beside its inputs; ``None`` of others."""
    kind = type(dataset)
    if _name(dataset) == _IMAGES:
        labels: Tensor = dataset.labels
        return labels
    if kind is TensorDataset:
        return dataset.tensors[1] if len(dataset.tensors) == 2 else None
    if kind is Subset:
        whole = _labels(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(dataset.indices)]
    if kind is ConcatDataset:
        parts = [_labels(d) for d in dataset.datasets]
        return torch.cat([p for p in parts if p is not None]) if all(p is not None for p in parts) else None
    if kind in (list, tuple):
        ends = [e[1] if isinstance(e, tuple | list) and len(e) == 2 else None for e in dataset]
        return _vector(ends)
    if kind.__module__.startswith("torchvision.datasets.") and hasattr(dataset, "targets"):
        # A joint transform holds target_transform; one of another kind may change labels too.
        transforms = getattr(dataset, "transforms", None)
        plain = transforms is None or type(transforms).__name__ == "StandardTransform"
        return _vector(dataset.targets) if plain and dataset.target_transform is None else None
    return None


def _name(dataset: Any) -> str:
    return f"{type(dataset).__module__}.{type(dataset).__qualname__}"


def _vector(labels: Any) -> Tensor | None:
    """A list of class numbers as a tensor; ``None`` of anything else."""
    if isinstance(labels, Tensor):
        return labels
    ones = [y.item() if isinstance(y, Tensor) and y.ndim == 0 else y for y in labels]
    return torch.tensor(ones) if ones and all(type(y) is int for y in ones) else None


def _counts(labels: Tensor) -> dict[str, int] | None:
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        return None
    values, counts = labels.unique(return_counts=True)
    return {str(v): n for v, n in zip(values.tolist(), counts.tolist(), strict=True)}
