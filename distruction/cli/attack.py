"""``distruction attack``: what of a forgotten class can be brought back."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from torch import nn

from .. import attacks, report
from ..data.inputs import ImageFiles
from ..data.raw import named
from ..errors import UsageError
from ..methods.base import Selected
from ..sources import Model
from .options import (
    ClassesFile,
    DataRoot,
    DatasetOfModel,
    Device,
    ForgetClasses,
    ModelName,
    Overwrite,
    Seed,
    SkipUnreadable,
    Weights,
    alone,
    find_examples,
    members,
    open_source,
    output,
)


def attack(
    model: ModelName,
    forget_class: ForgetClasses,
    original: Annotated[
        Path | None, typer.Option(help="The model before it forgot: for the distance and the barrier between the two.")
    ] = None,
    retrained: Annotated[
        list[Path] | None,
        typer.Option(help="A model trained without the class: the reference line, and LiRA's out-model; repeatable."),
    ] = None,
    classifier: Annotated[
        str | None, typer.Option(help="Name of the layer that gives the logits; default: it is looked for.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the numbers to this JSON file.")] = None,
    weights: Weights = None,
    classes: ClassesFile = None,
    data: DataRoot = None,
    dataset: DatasetOfModel = None,
    skip_unreadable: SkipUnreadable = False,
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Attack a model that forgot a class: prototypes, few-shot tuning, relearning, probes, membership, rounding.

    Each number is worth what the same attack finds in a model retrained without the class: give one by --retrained.
    """
    alone("attack")
    if out is not None:
        output(out, overwrite)
    source = open_source(model, weights, classes, device)
    train = _parts(source, forget_class, dataset, data, "train", skip_unreadable)
    test = _parts(source, forget_class, dataset, data, "test", skip_unreadable)
    network = source.network
    before = None if original is None else _of_the_same_classes(original, source, device)
    gold = {path: _of_the_same_classes(path, source, device) for path in retrained or []}
    attacked = {str(model): network}
    attacked |= {} if before is None else {str(original): before}
    attacked |= {str(path): other for path, other in gold.items()}
    rows = {
        name: attacks.battery(
            other,
            train,
            test,
            original=before if other is network else None,
            out_models=[m for m in gold.values() if m is not other],
            seed=seed,
            classifier=classifier,
        )
        for name, other in attacked.items()
    }
    if out is not None:
        report.write_json(out, {"classes": forget_class, "seed": seed, "attacks": rows})
    console = Console()
    for names in (list(attacks.COLUMNS)[:8], list(attacks.COLUMNS)[8:]):
        shown = {k: v for k, v in attacks.COLUMNS.items() if k in names and any(k in row for row in rows.values())}
        console.print(report.table(f"class {', '.join(forget_class)}", rows, shown))


def _parts(
    source: Model, names: list[str], dataset: str | None, root: Path | None, part: str, skip_unreadable: bool
) -> tuple[Selected, Selected]:
    """The forgotten and the retained examples of a part."""
    found = find_examples(source, dataset, root, part=part, skip_unreadable=skip_unreadable)
    data = found.read(source.inputs, skip_unreadable=skip_unreadable)
    if isinstance(data, ImageFiles):
        raise UsageError(f"the {len(data):,} images of {part} do not fit into memory, and the attacks need them there")
    mask = members(found, names)
    forgotten, retained = ((mask if gone else ~mask).nonzero().squeeze(-1) for gone in (True, False))
    if len(forgotten) == 0:
        raise UsageError(f"{part} has no example of class {', '.join(names)}")
    return Selected(data, forgotten), Selected(data, retained)


def _of_the_same_classes(path: Path, source: Model, device: str) -> nn.Module:
    other = open_source(str(path), None, None, device)
    sizes = [m.config.get("num_classes", len(m.classes or ())) for m in (other, source)]
    if 0 not in sizes and sizes[0] != sizes[1]:
        raise UsageError(f"{path} tells {sizes[0]} classes apart, the model {sizes[1]}")
    if None not in (other.classes, source.classes) and other.classes != source.classes:
        raise UsageError(
            f"{path} tells {named(other.known_classes(), 20)} apart, the model {named(source.known_classes(), 20)}"
        )
    return other.network
