"""Training examples of each label: what `prepare` writes of them, and what `forget` takes to be asked."""

import collections

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchvision.datasets import FakeData, ImageFolder

from distruction import Posterior, forget, prepare
from distruction.data import load, loader
from distruction.likelihood import Gaussian
from distruction.loop.counts import label_counts

QUIET = {"progress": False}
LABELS = torch.tensor([0, 2, 2, 1, 2, 0, 5, 2, 2, 1])
X = torch.randn(len(LABELS), 4, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(X, LABELS)


class Shifted(TensorDataset):
    """Gives other labels than those that it keeps."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x, (y + 1) % 6


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(DATA)


class Plain(Dataset):
    """Says nothing of its labels."""

    def __len__(self):
        return len(DATA)

    def __getitem__(self, index):
        return DATA[index]


def counted(loader):
    """By reading an epoch of it."""
    found = collections.Counter(int(y) for _, labels in loader for y in labels)
    return {str(c): n for c, n in sorted(found.items())}


def distributed(rank):
    return DistributedSampler(DATA, num_replicas=2, rank=rank)


@pytest.mark.parametrize(
    "made",
    [
        DataLoader(DATA, batch_size=3),
        DataLoader(DATA, batch_size=3, shuffle=True, num_workers=1),
        DataLoader(Subset(DATA, [1, 3, 6]), batch_size=2),
        DataLoader(Subset(Subset(DATA, torch.tensor([1, 3, 6])), [0, 2]), batch_size=2),
        DataLoader(ConcatDataset([DATA, Subset(DATA, range(3))]), batch_size=4),
        DataLoader(DATA, batch_size=3, sampler=SubsetRandomSampler([0, 1, 2])),
        DataLoader(list(zip(X, LABELS.tolist(), strict=True)), batch_size=3),
        DataLoader(list(DATA), batch_size=3),
        DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 3, drop_last=False)),
        list(DataLoader(DATA, batch_size=3)),
        tuple(DataLoader(TensorDataset(X, LABELS.to(torch.uint8)), batch_size=3)),
        loader(load("digits")[1], batch_size=64, shuffle=True),
    ],
)
def test_what_is_told_is_what_an_epoch_holds(made):
    assert label_counts(made) == counted(made)


def test_each_rank_tells_of_the_whole_set():
    assert [label_counts(DataLoader(DATA, batch_size=3, sampler=distributed(r))) for r in (0, 1)] == [
        {"0": 2, "1": 2, "2": 5, "5": 1}
    ] * 2


def test_image_folders_are_told_unless_something_changes_their_labels(tmp_path):
    for name, count in (("a", 3), ("b", 1)):
        (tmp_path / name).mkdir()
        for i in range(count):
            FakeData(1, (3, 4, 4))[0][0].save(tmp_path / name / f"{i}.png")
    assert label_counts(DataLoader(ImageFolder(tmp_path))) == {"0": 3, "1": 1}
    assert label_counts(DataLoader(ImageFolder(tmp_path, target_transform=lambda y: 1 - y))) is None


@pytest.mark.parametrize(
    "made",
    [
        DataLoader(Plain(), batch_size=3),
        DataLoader(Shifted(X, LABELS), batch_size=3),
        DataLoader(Stream(), batch_size=3),
        DataLoader(DATA, batch_size=3, collate_fn=lambda rows: torch.utils.data.default_collate(rows)),
        DataLoader(DATA, batch_size=3, drop_last=True),
        DataLoader(DATA, batch_size=3, sampler=WeightedRandomSampler([1.0] * 9 + [0.0], 10)),
        DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 3, drop_last=True)),
        DataLoader(TensorDataset(X, X[:, 0]), batch_size=3),
        DataLoader(TensorDataset(X, X[:, :2].long()), batch_size=3),
        DataLoader(TensorDataset(X, X, LABELS), batch_size=3),
        [(X, X[:, 0])],
        [(X, LABELS, LABELS)],
        type("Loader", (), {"__iter__": lambda self: iter([(X, LABELS)])})(),
    ],
)
def test_nothing_is_told_where_it_might_be_wrong(made):
    assert label_counts(made) is None


def test_prepare_writes_them_unless_the_set_is_larger_or_has_no_labels():
    def made(targets=LABELS, **options):
        model = nn.Linear(4, 6) if targets is LABELS else nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
        batches = [(X, targets)]
        return prepare(model, batches, steps=1, **QUIET, **options).metadata.get("label_counts")

    assert made() == made(num_examples=10) == {"0": 2, "1": 2, "2": 5, "5": 1}
    assert made(num_examples=1000) is None
    assert made(LABELS.float(), likelihood=Gaussian(1.0)) is None


def test_forget_is_told_what_is_asked(tmp_path):
    """Of digits: records of many classes, all of a class, and a part of one; after a kill, a resume and a file."""
    data, _ = load("digits")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def stop(step):
        raise KeyboardInterrupt

    def of(rows):
        return loader(data.subset(rows), batch_size=64)

    whole, options = loader(data, batch_size=64, shuffle=True), {"steps": 2, "checkpoint": tmp_path / "c"}
    with pytest.raises(KeyboardInterrupt):
        prepare(model, whole, checkpoint_seconds=0.0, callback=stop, **options, **QUIET)
    prepare(model, whole, **options, **QUIET).save(tmp_path / "p")
    posterior = Posterior.load(tmp_path / "p", model=model)
    assert posterior.metadata["label_counts"] == counted(of(range(len(data))))
    threes = (data.labels == 3).nonzero().squeeze(1)
    some = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:30]
    everything = torch.arange(len(data))
    cases = ((some, "records"), (threes, "class"), (threes[:-1], "records"), (everything, "records"))
    for rows, request in cases:
        before = {n: t.clone() for n, t in model.state_dict().items()}
        report = forget(model, posterior, of(rows), steps=3 if len(rows) < len(data) else 23, **QUIET)
        assert report.request == request
        model.load_state_dict(before)
    # A later request goes by them too.
    first = forget(model, posterior, of(threes), steps=3, **QUIET)
    second = forget(model, posterior, of(some), previous=first, steps=2, **QUIET)
    assert (second.request, second.posterior.metadata["label_counts"]) == (
        "records",
        posterior.metadata["label_counts"],
    )
