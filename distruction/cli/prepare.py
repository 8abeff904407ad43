"""``distruction prepare``: learning the posterior."""

import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import distributed, preparation
from ..data.inputs import batches
from ..data.raw import named
from ..data.requests import Selection, label_counts
from ..errors import DataWarning, UsageError
from ..rehearsal import rehearse as rehearse_requests
from ..sources import SERVING, Model
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
    beside_means,
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
    held_out: Annotated[
        Path | None,
        typer.Option(
            help="Labelled images that the model was not trained on, a folder of class folders, or test: the test part "
            "of the data, which is the default where there is one. What requests for records and the forecast go by; "
            "numbers alone are kept of them."
        ),
    ] = None,
    rehearse: Annotated[
        int | None,
        typer.Option(
            min=0, max=MOST, help="Classes to forget on trial, twice each, for the forecast; default 4 with --held-out."
        ),
    ] = None,
    compress: Annotated[
        bool, typer.Option(help="Keep a byte per parameter: 8-bit codes of std; the means are the model file's.")
    ] = False,
    *,
    running: Running,
) -> None:
    """Learn the posterior, while the training data is there."""
    output(out, running.overwrite)
    if rehearse and held_out is None:
        raise UsageError("a rehearsal measures what images that the model was not trained on lose: pass --held-out")
    if held_out is not None and rehearse != 0 and distributed.size() > 1:
        raise UsageError("rehearsals run in one process: pass --rehearse 0, or prepare without torchrun")
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
    unseen = _unseen(source, found, held_out, dataset, data, running.skip_unreadable)
    held_out_batches = None
    if unseen is not None:
        unseen_data = unseen.read(source.inputs, skip_unreadable=running.skip_unreadable)
        held_out_batches = batches(unseen_data, batch_size=batch_size, shuffle=False, workers=running.workers)
    if distributed.rank() == 0:
        told = unseen or "none: what is as good as unseen must be guessed when records are forgotten (--held-out)"
        Console().print(f"unseen data: {told}", markup=False, highlight=False, soft_wrap=True)
    loader = batches(train_data, batch_size=batch_size, shuffle=True, workers=running.workers)
    with watch:
        posterior = preparation.prepare(
            source.network,
            loader,
            held_out=held_out_batches,
            **learning,
        )
    posterior.metadata |= {SERVING: source.facts(), "label_counts": label_counts(train_data.labels)}
    rehearsals = []
    started = time.perf_counter()
    if held_out is not None and held_out_batches is not None and rehearse != 0:
        most = 4 if rehearse is None else rehearse
        rehearsals = rehearse_requests(
            source.network,
            posterior,
            loader,
            held_out_batches,
            most=most,
            seed=running.seed,
            backend=running.backend,
            progress=running.progress,
        )
    if distributed.rank() > 0:
        return
    posterior.save(out, compress=compress)
    done(running.checkpoint)
    right = beside_means(posterior, "training images")
    Console().print(f"{out}: {posterior.numel():,} Gaussians; {right}", soft_wrap=True)
    if rehearsals:
        damages = [r.damage for r in rehearsals]
        seconds = time.perf_counter() - started
        Console().print(
            f"{len(rehearsals)} requests rehearsed in {seconds:.1f} s: the retained classes lost {min(damages):.1f} to "
            f"{max(damages):.1f} points",
            highlight=False,
        )


def _unseen(
    source: Model, train: Selection, held_out: Path | None, dataset: str | None, data: Path | None, skip: bool
) -> Selection | None:
    """What the model was not trained on: what --held-out names, or else the test part where the data has one."""
    if held_out is not None and (held_out.name != "test" or held_out.is_dir()):
        return source.select(held_out)
    try:
        found = find_examples(source, dataset, data, part="test", skip_unreadable=skip)
    except UsageError:
        if held_out is not None:
            raise
        return None
    # A folder without parts is its own test part.
    return None if found.encoded is not None and found.encoded == train.encoded else found
