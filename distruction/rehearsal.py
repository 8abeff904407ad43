"""Mock requests while the data is there, so that the damage of a later one can be forecast (`distruction.damage`)."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from .damage import KEY, Rehearsal, disturbance
from .errors import UsageError
from .forgetting import forget
from .loop import TRAINING, Batches
from .loop.batches import Batching, call
from .loop.loaders import restarted
from .modules import deterministic, logits_of
from .posterior import Posterior
from .progress import bar
from .seeds import private_generators, seed_all, seed_of
from .strength import examined
from .targets import log_odds

OBJECTIVES = ("masked-teacher", "uniform-others")
"""What is rehearsed: of the two, the second disturbs more, so that the line has a slope."""
RECORDS, SHARE = 64, 0.1
"""Records that are forgotten as unseen ones, and of which part of the training set at most."""
LARGEST_DRIFT = 0.5
"""Where others follow by more, going further would move these more than the records."""


def rehearse(
    model: nn.Module,
    posterior: Posterior,
    loader: Batches,
    held_out: Batches,
    *,
    classes: Sequence[int] | None = None,
    most: int = 4,
    objectives: Sequence[str] = OBJECTIVES,
    records: int = 1024,
    seed: int = 0,
    backend: str = "auto",
    progress: bool = True,
) -> list[Rehearsal]:
    """Forget some classes from a fresh posterior, one at a time, and keep what it cost in the posterior's metadata.

    `distruction.forget` then has a `Forecast` in its report. The model ends as it was. It costs one request for each
    class and objective, and a reading of the held-out data after each. Of a posterior of
    ``prepare(..., held_out=)`` some records are forgotten as ``target="unseen"`` too: how much less sure the model then
    is of what it has not seen is what a later such request goes by (``drift`` in the metadata's ``held_out``).

    Args:
        model: the model that the posterior was prepared for, holding its means.
        posterior: fresh from `distruction.prepare`; its metadata gets the rehearsals. Save it afterwards.
        loader: labelled batches of the training set, of which the mock requests are taken.
        held_out: labelled batches that the model was not trained on.
        classes: labels to forget; ``None`` takes ``most`` of them, spread evenly over the sorted labels.
        most: how many classes, where they are not named.
        objectives: each class is forgotten with each of these.
        records: of a class, at most, in a mock request.
        seed: of the requests and of the probes.
        backend: see `distruction.ops`.
        progress: show a progress bar.

    Raises:
        UsageError: a class is not in the training set, or nothing is held out.
    """
    posterior.check(model, same_weights=True)
    before, labels = _classes(model, held_out)
    if before.shape != labels.shape or labels.is_floating_point():
        raise UsageError(
            f"a rehearsal measures accuracy, so held_out must give one class number for each example, not targets of "
            f"shape {tuple(labels.shape)} and type {labels.dtype} for answers of shape {tuple(before.shape)}"
        )
    if classes is None:
        told = posterior.metadata.get("label_counts")
        known = told or {label for _, labels_read in _read(model, loader, seed) for label in labels_read.tolist()}
        classes = _spread(sorted(map(int, known)), most)
    requests = _requests(model, loader, classes, records, seed)
    found = []
    try:
        with bar("rehearse", len(requests), hidden=not progress) as show:
            for done, (label, batches) in enumerate(requests.items(), 1):
                for objective in objectives:
                    posterior.mean_(model)
                    report = forget(
                        model,
                        posterior,
                        batches,
                        request="class",
                        objective=objective,
                        seed=seed,
                        backend=backend,
                        progress=False,
                    )
                    after, _ = _classes(model, held_out)
                    others = labels != label
                    data = examined(batches, next(model.parameters()).device, seed=seed)
                    moved = disturbance(model, posterior, data, [label], report.kl, seed=seed)
                    found.append(
                        Rehearsal(
                            label,
                            objective,
                            _percent((before == labels)[others]),
                            _percent((after == labels)[others]),
                            None if others.all() else _percent((after == labels)[~others]),
                            bool(report.reached),
                            (before != after)[others].double().mean().item(),
                            int(others.sum()),
                            moved,
                        )
                    )
                show(done, "rehearse")
        if "held_out" in posterior.metadata:
            posterior.mean_(model)
            drift = _drift(
                model, posterior, loader, held_out, records=min(records, RECORDS), seed=seed, backend=backend
            )
            posterior.metadata["held_out"]["drift"] = drift
    finally:
        posterior.mean_(model)
    posterior.metadata[KEY] = [asdict(r) for r in found]
    return found


def _drift(
    model: nn.Module, posterior: Posterior, loader: Batches, held_out: Batches, *, records: int, seed: int, backend: str
) -> float:
    """Median fall of the held-out examples' log-odds over that of records which were forgotten as unseen ones."""
    total = int(posterior.metadata.get("examples", records / SHARE))
    wanted = max(1, min(records, int(SHARE * total)))
    parts: list[tuple[Tensor, Tensor]] = []
    for inputs, targets in _read(model, loader, seed):
        missing = wanted - sum(len(y) for _, y in parts)
        parts.append((inputs[:missing].cpu(), targets[:missing].cpu()))
        if missing <= len(targets):
            break
    batches = _batched(parts)
    before = _log_odds(model, batches), _log_odds(model, held_out)
    forget(model, posterior, batches, target="unseen", seed=seed, backend=backend, progress=False)
    records_fell, others_fell = (
        (old - _log_odds(model, data)).quantile(0.5).item()
        for old, data in zip(before, (batches, held_out), strict=True)
    )
    # A model that knows its records no better than others has nothing to forget.
    return 0.0 if records_fell <= 0 else min(max(others_fell / records_fell, 0.0), LARGEST_DRIFT)


@torch.no_grad()
def _log_odds(model: nn.Module, loader: Batches) -> Tensor:
    """Of each example's own label."""
    batching = Batching(loader, next(model.parameters()).device, needs_inputs=True, role=TRAINING)
    found = []
    with deterministic(model), private_generators():
        seed_all(0)
        for loaded in restarted(loader):
            batch = batching(loaded)
            found.append(log_odds(logits_of(call(model, batch.whole_inputs)), batch.targets).cpu())
    return torch.cat(found)


def _spread(labels: list[int], most: int) -> list[int]:
    """At most so many of the labels, evenly spread over them."""
    if len(labels) <= most:
        return labels
    return [labels[round(i * (len(labels) - 1) / max(1, most - 1))] for i in range(most)]


def _read(model: nn.Module, loader: Batches, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and labels of one epoch, the same at each reading."""
    batching = Batching(loader, next(model.parameters()).device, needs_inputs=True, role=TRAINING)
    with private_generators():
        seed_all(seed_of(seed, 9))
        for loaded in restarted(loader):
            batch = batching(loaded)
            inputs, targets = batch.whole_inputs, batch.targets
            if not isinstance(inputs, Tensor) or targets.ndim != 1 or targets.is_floating_point():
                raise UsageError("rehearsals are of whole classes: the training set must give (tensor, class numbers)")
            yield inputs, targets


def _requests(
    model: nn.Module, loader: Batches, classes: Sequence[int], records: int, seed: int
) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """Batches of each of the classes, and of no other: they stay in the CPU's memory."""
    kept: dict[int, list[tuple[Tensor, Tensor]]] = {label: [] for label in classes}
    for inputs, targets in _read(model, loader, seed):
        for label, mine in kept.items():
            rows = (targets == label).nonzero().squeeze(-1)[: records - sum(len(y) for _, y in mine)]
            if len(rows):
                mine.append((inputs[rows].cpu(), targets[rows].cpu()))
    if missing := [label for label, mine in kept.items() if not mine]:
        raise UsageError(f"the training set has no examples of class {', '.join(map(str, missing))} to rehearse")
    return {label: _batched(mine) for label, mine in kept.items()}


def _batched(parts: list[tuple[Tensor, Tensor]], size: int = 64) -> list[tuple[Tensor, Tensor]]:
    inputs, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return list(zip(inputs.split(size), targets.split(size), strict=True))


@torch.no_grad()
def _classes(model: nn.Module, loader: Batches) -> tuple[Tensor, Tensor]:
    """The class that the model calls each example, and its label."""
    batching = Batching(loader, next(model.parameters()).device, needs_inputs=True, role=TRAINING)
    found, labels = [], []
    with deterministic(model), private_generators():
        seed_all(0)
        for loaded in restarted(loader):
            batch = batching(loaded)
            found.append(logits_of(call(model, batch.whole_inputs)).argmax(dim=-1).cpu())
            labels.append(batch.targets.cpu())
    return torch.cat(found), torch.cat(labels)


def _percent(hits: Tensor) -> float:
    return 100.0 * hits.double().mean().item()
