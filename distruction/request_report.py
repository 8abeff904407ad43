"""The report of one request, for whoever asked for it: one HTML page that needs no other file, and the same as JSON."""

import base64
import io
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import report
from .doctor import versions
from .errors import UsageError
from .extras import needed
from .files import write_text
from .forget_report import ForgetReport
from .loop import FORGET_SET, Batches
from .loop.batches import Batching, call
from .metrics import wilson_interval
from .modules import deterministic, logits_of
from .posterior import Posterior
from .predictive import restored

with needed("vision", "a report"):
    from PIL import Image

    from .data.raw import upright

if TYPE_CHECKING:
    from .data.requests import Selection

RECORDS = 12
"""Forgotten records on the page, at most."""
THUMBNAIL = 96
"""Pixels of their pictures' longer side, at most."""


@dataclass(frozen=True)
class Seen:
    """What a model makes of each record, in the loader's order: vectors of one length.

    Attributes:
        targets: the labels.
        predicted, confidence: the likeliest class and its probability.
        own: probability of the record's own label.
        forgotten: summed probability of the labels that are forgotten; of a request for records that of the own label.
    """

    targets: Tensor
    predicted: Tensor
    confidence: Tensor
    own: Tensor
    forgotten: Tensor

    def numbers(self) -> dict[str, Any]:
        """Accuracy in percent with Wilson's 95 % interval, and the mean probability of what is forgotten."""
        accuracy = 100 * (self.predicted == self.targets).double().mean().item()
        return {
            "accuracy": accuracy,
            "accuracy_95": list(wilson_interval(accuracy, len(self.targets))),
            "probability": self.forgotten.mean().item(),
            "taken_for": dict(Counter(self.predicted.tolist()).most_common()),
        }


@torch.no_grad()
def seen(model: nn.Module, loader: Batches, removed: Sequence[int] = ()) -> Seen:
    """What ``model`` makes of the records.

    Raises:
        UsageError: its outputs or the targets are not those of a classifier with one label per record.
    """
    device = next(model.parameters()).device
    batching = Batching(loader, device, needs_inputs=True, role=FORGET_SET)
    found: list[tuple[Tensor, ...]] = []
    with deterministic(model):
        for loaded in loader:
            batch = batching(loaded)
            logits, targets = logits_of(call(model, batch.whole_inputs)), batch.targets
            if logits.ndim != 2 or targets.ndim != 1 or targets.is_floating_point():
                raise UsageError(
                    f"a report shows what a classifier makes of each record: (batch, classes) logits and (batch,) "
                    f"labels, not {tuple(logits.shape)} and {targets.dtype} {tuple(targets.shape)}"
                )
            p = logits.double().softmax(dim=-1)
            own = p.gather(-1, targets[:, None])[:, 0]
            confidence, predicted = p.max(dim=-1)
            gone = p[:, list(removed)].sum(dim=-1) if removed else own
            found.append(tuple(t.cpu() for t in (targets, predicted, confidence, own, gone)))
    if not found:
        raise UsageError("the forget set is empty, so there is nothing to report")
    return Seen(*(torch.cat(column) for column in zip(*found, strict=True)))


def kl_by_parameter(q: Posterior, p: Posterior) -> dict[str, float]:
    """KL(q || p) in nats of each parameter: they add up to the whole, since the Gaussians are independent."""
    return {name: q.restricted([name]).kl(p.restricted([name])).item() for name in q}


def layer_of(name: str) -> str:
    """The part of the model that a parameter belongs to: its name up to the first number, or without the last word."""
    numbered = re.match(r"(.*?\.\d+)\.", name)
    return numbered[1] if numbered else name.rpartition(".")[0] or name


def by_layer(parameters: Mapping[str, float]) -> dict[str, float]:
    """The sums over `layer_of`, in the order of the parameters."""
    found: dict[str, float] = {}
    for name, value in parameters.items():
        found[layer_of(name)] = found.get(layer_of(name), 0.0) + value
    return found


def collect(
    result: ForgetReport,
    model: nn.Module,
    posterior: Posterior,
    loader: Batches,
    *,
    previous: Posterior | None = None,
    classes: Sequence[str] | None = None,
    asked: Mapping[str, str] | None = None,
    read: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    records: int = RECORDS,
    names: Sequence[str] | None = None,
    pictures: Mapping[int, bytes] | None = None,
) -> dict[str, Any]:
    """The report of a request as JSON values.

    Args:
        result: of `distruction.forget`.
        model: the unlearned one; it is as it was afterwards.
        posterior: p, whose means are the model from before; or those of ``previous``, where there is one.
        loader: batches of the forget set in a fixed order: it is read twice.
        previous: the posterior of the request before this one.
        classes: names in the order of the head.
        asked, read: what to say of the request and of what was read, by heading.
        settings: what else than the arguments of `distruction.forget` was set.
        records: how many forgotten records to show, evenly spread over the set; 0: none.
        names: of the records, in the loader's order.
        pictures: PNGs of those that are shown, by position (see `positions`).

    Raises:
        UsageError: the loader gives other records at the second reading, or these have no labels.
    """
    request = result.posterior.metadata["forgotten"][-1]
    removed = sorted(int(c) for c in request["labels"]) if result.request == "class" else []
    after = seen(model, loader, removed)
    origin = posterior if previous is None else previous
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad(), restored(model, parameters):
        origin.mean_(model)
        before = seen(model, loader, removed)
    if not torch.equal(before.targets, after.targets):
        raise UsageError("the loader gave other records at its second reading: pass one that does not shuffle")

    def named(label: int) -> str:
        return str(label) if classes is None else classes[label]

    def side(found: Seen) -> dict[str, Any]:
        numbers = found.numbers()
        return {**numbers, "taken_for": {named(c): n for c, n in numbers["taken_for"].items()}}

    shown = [
        {
            "name": "" if names is None else names[i],
            "label": named(int(after.targets[i])),
            "before": {"predicted": named(int(before.predicted[i])), "probability": before.confidence[i].item()},
            "after": {"predicted": named(int(after.predicted[i])), "probability": after.confidence[i].item()},
            "own_label": [before.own[i].item(), after.own[i].item()],
            "picture": base64.b64encode((pictures or {})[i]).decode() if i in (pictures or {}) else None,
        }
        for i in positions(len(after.targets), records)
    ]
    nats = kl_by_parameter(result.posterior, posterior)
    facts = {k: v for k, v in result.posterior.metadata.items() if k not in ("forgotten", "label_counts", "serving")}
    return {
        "format": "distruction-report-1",
        "asked": {
            "request": result.request,
            "labels": {named(int(c)): n for c, n in request["labels"].items()},
            **(asked or {}),
        },
        "read": {"records": len(after.targets), "retained records": 0, **(read or {})},
        "level": result.level,
        "advantage": result.advantage,
        "cosine": result.cosine,
        "reached": result.reached,
        "advice": result.advice,
        "outcome": result.outcome,
        "before": side(before),
        "after": side(after),
        "steps": [{k: _finite(v) for k, v in asdict(step).items()} for step in result.history],
        "kl": {"total": result.kl, "layers": by_layer(nats), "parameters": nats},
        "forecast": None if result.forecast is None else asdict(result.forecast),
        "records": shown,
        "settings": {**facts, **(settings or {})},
        "versions": versions(),
        "seconds": result.seconds,
    }


def positions(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of ``count`` places, evenly spread."""
    return [i * count // min(count, wanted) for i in range(min(count, wanted))] if wanted else []


def thumbnails(selection: "Selection", places: Sequence[int]) -> dict[int, bytes]:
    """Small PNGs of some of a request's images."""
    found = {}
    top = 1 if selection.images is None else int(selection.images.images.max())
    for i in places:
        if selection.encoded is not None:
            picture = upright(selection.encoded[i], "RGB")
        else:
            assert selection.images is not None
            # Data sets whose bytes do not go up to 255 would be all but black.
            pixels = (selection.images.images[i].double() * (255 / max(top, 1))).round().to(torch.uint8)
            array = pixels.permute(1, 2, 0).numpy()
            picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        file = io.BytesIO()
        picture.save(file, "PNG")
        found[i] = file.getvalue()
    return found


def files_of(path: Path) -> tuple[Path, Path]:
    """The page and the JSON that `save` writes: beside each other, or in the folder that ``path`` is."""
    if path.suffix in (".html", ".htm"):
        return path, path.with_suffix(".json")
    return path / "index.html", path / "report.json"


def save(
    path: str | os.PathLike[str], collected: Mapping[str, Any], *, receipt: Mapping[str, Any] | None = None
) -> None:
    """Write what `collect` gave as a page and as JSON, each whole or not at all.

    Args:
        path: ``NAME.html``, with ``NAME.json`` beside it; or a folder, for ``index.html`` and ``report.json``.
        collected: of `collect`.
        receipt: to be shown on the page too.
    """
    page, numbers = files_of(Path(path))
    page.parent.mkdir(parents=True, exist_ok=True)
    report.write_json(numbers, collected)
    write_page(page, collected, receipt)


def write_page(path: Path, collected: Mapping[str, Any] | None, receipt: Mapping[str, Any] | None) -> None:
    """Write a page of a report, of a receipt, or of both."""
    from . import pages
    from .request_figures import curves

    drawn = [] if collected is None else [pages.svg(figure, title) for title, figure in curves(collected)]
    text = pages.render("request.html", report=collected, receipt=receipt, curves=drawn)
    write_text(path, text)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
