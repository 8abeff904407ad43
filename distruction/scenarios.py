"""What is to be forgotten, and what forgetting is measured on: a full class, a sub-class, random examples.

| scenario   | forget set                    | D_f is measured on        | D_r is measured on   |
|------------|-------------------------------|---------------------------|----------------------|
| full-class | a class's training examples   | that class's test images  | the other test images|
| sub-class  | one fine class; the head has  | that fine class's test    | the other test images|
|            | the super classes             | images                    |                      |
| random     | random training examples      | these training examples   | the whole test set   |

This is the protocol of Foster, Schoepf, Brintrup 2024 (arXiv 2308.07707) that the paper's tables follow.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .data import Images
from .errors import UsageError
from .files import write_text
from .seeds import seed_of

NAMES = ("full-class", "sub-class", "random")


@dataclass(frozen=True)
class Split:
    """One scenario on one data set; labels are those of the model's head.

    Attributes:
        indices: positions of the forget set in the training set, ascending.
        forget, retain: the two parts of the training set.
        measured_forget, measured_retain: what D_f and D_r are measured on.
        test: the whole test set.
        held_out: bool, (size of the test set,): the test examples that are distributed like the forget set, for
            attacks that tell what was trained on from what was not.
    """

    indices: Tensor
    forget: Images
    retain: Images
    measured_forget: Images
    measured_retain: Images
    test: Images
    held_out: Tensor


def full_class(train: Images, test: Images, target: str) -> Split:
    """Forget one class of the head.

    Raises:
        UsageError: the class is unknown, has no training or test example, or is the only one.
    """
    if target not in train.classes:
        raise UsageError(f"class {target!r} is unknown; the classes are {', '.join(train.classes)}")
    return _split(train, test, train.members(target), test.members(target))


def sub_class(train: Images, test: Images, target: str) -> Split:
    """Forget one fine class of a model that tells super classes apart.

    Args:
        train, test: with fine classes: CIFAR-20, or made so by `data.grouped`.
        target: fine class to forget.

    Raises:
        UsageError: the data has no fine classes, or the class is none of them or without examples.
    """
    if not train.fine_classes:
        raise UsageError("the data has no fine classes to forget; give groups (super class to classes)")
    if target not in train.fine_classes:
        raise UsageError(f"fine class {target!r} is unknown; they are {', '.join(train.fine_classes)}")
    return _split(train, test, train.members(target), test.members(target))


def random(train: Images, test: Images, count: int, seed: int) -> Split:
    """Forget ``count`` training examples drawn without replacement from a generator of their own.

    Raises:
        UsageError: ``count`` is not in [1, size of the training set).
    """
    if not 1 <= count < len(train):
        raise UsageError(f"count must be in [1, {len(train) - 1}], not {count}")
    generator = torch.Generator().manual_seed(seed_of(seed, 2))
    mask = torch.zeros(len(train), dtype=torch.bool)
    mask[torch.randperm(len(train), generator=generator)[:count]] = True
    split = _split(train, test, mask, torch.ones(len(test), dtype=torch.bool))
    return replace(split, measured_forget=split.forget, measured_retain=test)


def write_indices(path: str | os.PathLike[str], split: Split, facts: Mapping[str, str | int]) -> None:
    """Write the forget set's positions in the training set, and ``facts`` about them, as JSON, atomically."""
    write_text(path, json.dumps({**facts, "indices": split.indices.tolist()}) + "\n")


def _split(train: Images, test: Images, forget: Tensor, held_out: Tensor) -> Split:
    if not forget.any():
        raise UsageError("no training example is in the forget set, so there is nothing to forget")
    if forget.all():
        raise UsageError("every training example is in the forget set, so there is nothing to retain")
    return Split(
        indices=forget.nonzero().squeeze(-1),
        forget=train.subset(forget),
        retain=train.subset(~forget),
        measured_forget=test.subset(held_out),
        measured_retain=test.subset(~held_out),
        test=test,
        held_out=held_out,
    )
