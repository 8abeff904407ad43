"""``distruction evaluate``: what a model knows of the classes."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor

from .. import report
from ..data.inputs import batches
from ..data.requests import Selection
from ..errors import UsageError
from ..metrics import accuracy, entropy_mia, predict
from ..posterior_file import metadata_of
from ..sources import SERVING, Model
from . import language
from .options import (
    ClassesFile,
    DataRoot,
    DatasetOfModel,
    Device,
    ForgetClasses,
    ModelName,
    SkipUnreadable,
    Weights,
    Workers,
    alone,
    find_examples,
    members,
    open_source,
)


def evaluate(
    model: ModelName,
    forget_class: ForgetClasses = [],  # noqa: B006
    posterior: Annotated[
        Path | None, typer.Option(help="Posterior file, which knows the classes where the model does not.")
    ] = None,
    weights: Weights = None,
    classes: ClassesFile = None,
    data: DataRoot = None,
    dataset: DatasetOfModel = None,
    skip_unreadable: SkipUnreadable = False,
    workers: Workers = 4,
    device: Device = "auto",
) -> None:
    """Accuracy on the retained and the forgotten classes, and membership inference where --data has train/ as well.

    Of a language model: perplexity and answers by greedy decoding of the texts in --data FILE.
    """
    from ..experiments.results import COLUMNS

    alone("evaluate")
    if language.is_language_model(model):
        images = {"class": forget_class, "posterior": posterior, "weights": weights, "classes": classes}
        language.evaluate(model, data=data, device=device, images={**images, "dataset": dataset})
        return
    if not forget_class:
        raise UsageError("no class is named: pass --class NAME")
    source = open_source(model, weights, classes, device)
    if posterior is not None:
        source.agree_with(metadata_of(posterior).get(SERVING), f"the posterior {posterior}")
    test = find_examples(source, dataset, data, part="test", skip_unreadable=skip_unreadable)
    train = find_examples(source, dataset, data, part="train", skip_unreadable=skip_unreadable)
    mask = members(test, forget_class)
    row, logits = {}, _logits(source, test, workers, skip_unreadable)
    for name, where in (("retain", ~mask), ("forget", mask)):
        row[name] = accuracy(logits[0][where], logits[1][where]) if where.any() else float("nan")
    if train.encoded is None or train.encoded != test.encoded:
        of_train = members(train, forget_class)
        trained = _logits(source, train, workers, skip_unreadable)
        if of_train.any():
            row["forget_train"] = accuracy(trained[0][of_train], trained[1][of_train])
            if not of_train.all():
                row["mia_entropy"] = entropy_mia(
                    trained[0][~of_train], torch.cat([logits[0][mask], logits[0][~mask]]), trained[0][of_train]
                )
    columns = {k: COLUMNS[k].heading for k in row}
    name = dataset or (source.origin if source.origin not in ("", ".") else str(data or "")) or "digits"
    Console().print(report.table(f"{name}, class {', '.join(forget_class)}", {model: row}, columns))


def _logits(source: Model, found: Selection, workers: int, skip_unreadable: bool) -> tuple[Tensor, Tensor]:
    data = found.read(source.inputs, skip_unreadable=skip_unreadable)
    return predict(source.network, batches(data, batch_size=512, workers=workers))
