"""``distruction evaluate``: what a model knows of the classes."""

from rich.console import Console

from .. import demo as demos
from .. import models, report
from .options import (
    DataRoot,
    DatasetOfModel,
    Device,
    ForgetClasses,
    ModelFile,
    SkipUnreadable,
    alone,
    data_of,
    device_of,
)


def evaluate(
    model: ModelFile,
    forget_class: ForgetClasses,
    data: DataRoot = None,
    dataset: DatasetOfModel = None,
    skip_unreadable: SkipUnreadable = False,
    device: Device = "auto",
) -> None:
    """Accuracy on the retained and the forgotten classes, and membership inference."""
    alone("evaluate")
    network, config = models.load(model, device=device_of(device))
    parts = data_of(config, dataset, data, need_test=True, skip_unreadable=skip_unreadable)
    train_data, test_data = (part.to(device_of(device)) for part in parts)
    row = demos.measure(network, train_data, test_data, forget_class)
    columns = {k: v for k, v in demos.COLUMNS.items() if k in row}
    name = dataset or config.get("data", "digits")
    Console().print(report.table(f"{name}, class {', '.join(forget_class)}", {str(model): row}, columns))
