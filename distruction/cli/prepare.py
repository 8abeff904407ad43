"""``distruction prepare``: learning the posterior."""

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import distributed, preparation
from ..data.inputs import batches
from ..data.raw import named
from ..data.requests import label_counts
from ..errors import DataWarning
from ..sources import SERVING
from . import language
from .options import (
    MOST,
    BatchSize,
    ClassesFile,
    DataRoot,
    DatasetOfModel,
    ModelName,
    Weights,
    auto_or_number,
    done,
    find_examples,
    open_source,
    output,
)
from .running import Running, with_running


@with_running
def prepare(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Posterior file to write.")],
    weights: Weights = None,
    classes: ClassesFile = None,
    data: DataRoot = None,
    dataset: DatasetOfModel = None,
    method: Annotated[str, typer.Option(help="gauss-newton, or the paper's bgd.")] = "gauss-newton",
    steps: Annotated[int | None, typer.Option(max=MOST, help="Updates; default 150, of bgd 1500.")] = None,
    std_init: Annotated[
        Any, typer.Option(parser=auto_or_number, metavar="NUMBER|auto", help="Std to start from; auto: by tensor.")
    ] = "auto",
    evidence: Annotated[
        Any,
        typer.Option(
            parser=auto_or_number, metavar="NUMBER|auto", help="Data points that each training example counts for."
        ),
    ] = "auto",
    mc_samples: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Forward passes per update of bgd, default 2; even is better.")
    ] = None,
    batch_size: BatchSize = 64,
    compress: Annotated[
        bool, typer.Option(help="Keep a byte per parameter: 8-bit codes of std; the means are the model file's.")
    ] = False,
    *,
    running: Running,
) -> None:
    """Learn the posterior, while the training data is there."""
    output(out, running.overwrite)
    watch = running.watch()
    learning: dict[str, Any] = {
        "method": method,
        "steps": steps,
        "std_init": std_init,
        "evidence": evidence,
        "mc_samples": mc_samples,
        "callback": watch,
        **running.arguments(),
    }
    if language.is_language_model(model):
        images = {"weights": weights, "classes": classes, "dataset": dataset}
        with watch:
            language.prepare(model, out, data, batch_size, images, running, compress=compress, **learning)
        return
    source = open_source(model, weights, classes, running.device)
    found = find_examples(source, dataset, data, skip_unreadable=running.skip_unreadable)
    if distributed.rank() == 0:
        Console().print(f"training data: {found}", markup=False, highlight=False, soft_wrap=True)
    if absent := [name for name in found.classes if name not in found.counts]:
        warnings.warn(
            f"the data holds nothing of the model's classes {named(absent)}: the posterior will not hold them fast",
            DataWarning,
            stacklevel=2,
        )
    train_data = found.read(source.inputs, skip_unreadable=running.skip_unreadable)
    with watch:
        posterior = preparation.prepare(
            source.network,
            batches(train_data, batch_size=batch_size, shuffle=True, workers=running.workers),
            **learning,
        )
    posterior.metadata |= {SERVING: source.facts(), "label_counts": label_counts(train_data.labels)}
    if distributed.rank() > 0:
        return
    posterior.save(out, compress=compress)
    done(running.checkpoint)
    facts = posterior.metadata
    Console().print(f"{out}: {posterior.numel():,} Gaussians, sampled accuracy {facts['sampled_accuracy']:.1f} %")
