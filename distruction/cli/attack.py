"""``distruction attack``: what of a forgotten class can be brought back."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from torch import nn

from .. import attacks, models, report
from ..data import forget_split
from ..errors import UsageError
from .options import (
    DataRoot,
    DatasetOfModel,
    Device,
    ForgetClasses,
    ModelFile,
    Overwrite,
    Seed,
    SkipUnreadable,
    alone,
    data_of,
    device_of,
    output,
)


def attack(
    model: ModelFile,
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
    network, config = models.load(model, device=device_of(device))
    parts = data_of(config, dataset, data, need_test=True, skip_unreadable=skip_unreadable)
    train_data, test_data = (part.to(device_of(device)) for part in parts)
    train, test = forget_split(train_data, forget_class), forget_split(test_data, forget_class)
    before = None if original is None else _of_the_same_classes(original, config, device)
    gold = {path: _of_the_same_classes(path, config, device) for path in retrained or []}
    attacked = {str(model): network}
    attacked |= {} if before is None else {str(original): before}
    attacked |= {str(path): other for path, other in gold.items()}
    rows = {
        name: attacks.battery(
            other,
            train,
            test,
            train_data,
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


def _of_the_same_classes(path: Path, config: dict[str, object], device: str) -> nn.Module:
    other, facts = models.load(path, device=device_of(device))
    if facts["num_classes"] != config["num_classes"]:
        raise UsageError(f"{path} tells {facts['num_classes']} classes apart, the model {config['num_classes']}")
    return other
