"""``distruction forget``: a request."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from .. import damage, distributed, forgetting
from ..data.inputs import batches
from ..errors import UsageError
from ..forget_report import ForgetReport
from ..posterior import Posterior
from ..sources import SERVING
from . import language
from .options import (
    MOST,
    BatchSize,
    ClassesFile,
    DataRoot,
    DatasetOfModel,
    ForgetClasses,
    ModelName,
    ObjectiveOrDefault,
    Records,
    Weights,
    auto_or_number,
    done,
    find_examples,
    holds,
    open_source,
    output,
)
from .papers import Key, NoRecords, Papers, Receipt, Report
from .running import Running, with_running


@with_running
def forget(
    model: ModelName,
    posterior: Annotated[Path, typer.Option(help="Posterior file written by `prepare`.")],
    out: Annotated[Path, typer.Option(help="Unlearned model to write, in the form of --model.")],
    forget_class: ForgetClasses = [],  # noqa: B006
    records: Records = None,
    request: Annotated[
        str | None,
        typer.Option(
            help="class: what it shows is to be known no more; records: these alone, their classes live on; auto. "
            "Default: class with --class, records with --records, else auto."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="In place of --request: gone, these classes; sub-class, what these records show, whose labels live "
            "on for others; unseen, these records, as if the model had not been trained on them; corrected, the labels "
            "of these records, which are wrong."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say what would be forgotten and, of a posterior with rehearsals, what it would cost; write nothing.",
        ),
    ] = False,
    weights: Weights = None,
    classes: ClassesFile = None,
    data: DataRoot = None,
    dataset: DatasetOfModel = None,
    previous: Annotated[
        Path | None,
        typer.Option(
            help="Posterior that the request before this one left (--posterior-out); --model may then also be the "
            "file that preparation was given, which a compressed --posterior needs."
        ),
    ] = None,
    posterior_out: Annotated[
        Path | None, typer.Option(help="Also write what is left of the posterior, for a later request.")
    ] = None,
    report: Report = None,
    no_records: NoRecords = False,
    receipt: Receipt = None,
    key: Key = None,
    objective: ObjectiveOrDefault = None,
    steps: Annotated[
        int | None, typer.Option(max=MOST, help="Updates; default 150, or 400 at most where lambda is found.")
    ] = None,
    kl_weight: Annotated[
        Any,
        typer.Option(
            parser=auto_or_number, metavar="NUMBER|auto", help="lambda in [0, 1], larger keeps more; auto finds it."
        ),
    ] = "auto",
    level: Annotated[
        float | None, typer.Option(help="Probability of what is forgotten to end at; default 0.01 of a class.")
    ] = None,
    depth: Annotated[
        str | None,
        typer.Option(help="features: also disperse the class in front of the classifier, where few examples find it."),
    ] = None,
    cosine_level: Annotated[
        float | None, typer.Option(help="Mean cosine of the class's features to end at with --depth; default 0.25.")
    ] = None,
    classifier: Annotated[
        str | None, typer.Option(help="Name of the layer that gives the logits, for --depth; default: looked for.")
    ] = None,
    mc_samples: Annotated[
        int, typer.Option(min=0, max=MOST, help="0: forget at the means; K: at K samples per update, as the paper.")
    ] = 0,
    data_per_step: Annotated[float, typer.Option(help="Weight of the objective, in data points.")] = 100.0,
    batch_size: BatchSize = 64,
    offload_prior: Annotated[
        bool, typer.Option(help="Keep the posterior in the CPU's memory; each step fetches it piece by piece.")
    ] = False,
    *,
    running: Running,
) -> None:
    """Forget classes or records, reading the forget set and nothing else.

    The forget set is what --data holds: a folder of class folders (of which --class chooses), a folder of images of one
    --class, or the files that --records names.
    """
    if request not in (None, "auto", "class", "records"):
        raise UsageError(f"--request must be class, records or auto, not {request!r}")
    if dry_run:
        running = replace(running, checkpoint=None, log_json=None, tensorboard=None, wandb=None)
    watch = running.watch()
    forgotten_by: dict[str, Any] = {
        "objective": objective,
        "steps": steps,
        "kl_weight": kl_weight,
        "level": level,
        "mc_samples": mc_samples,
        "data_per_step": data_per_step,
        "offload_prior": offload_prior,
        "callback": watch,
        **running.arguments(),
    }
    if language.is_language_model(model):
        images = {
            "class": forget_class,
            "records": records,
            "weights": weights,
            "classes": classes,
            "dataset": dataset,
            "report": report,
            "receipt": receipt,
            "key": key,
            "no_records": no_records,
            "request": request,
            "depth": depth,
            "cosine_level": cosine_level,
            "classifier": classifier,
        }
        files = language.Files(model, data, posterior, previous, out, posterior_out)
        with watch:
            language.forget(files, batch_size, images, running, dry_run=dry_run, **forgotten_by)
        return
    source = open_source(model, weights, classes, running.device)
    output(out, running.overwrite, folder=source.folder)
    if posterior_out is not None:
        output(posterior_out, running.overwrite)
    papers = Papers(report, receipt, key, not no_records)
    papers.check(running.overwrite)
    network = source.network
    prior = Posterior.load(posterior, model=network)
    earlier = None if previous is None else Posterior.load(previous, model=network)
    if earlier is not None and holds(network, prior):
        earlier.mean_(network)  # what the earlier request made of it; the file of preparation serves as well
    source.agree_with(prior.metadata.get(SERVING), f"the posterior {posterior}")
    found = find_examples(
        source, dataset, data, wanted=forget_class, records=records, skip_unreadable=running.skip_unreadable
    )
    if records is None and not forget_class and len(found.counts) == len(found.classes):
        raise UsageError(
            f"the data holds every class of the model ({found}): name the ones to forget by --class, or records by "
            "--records"
        )
    console = Console()
    if distributed.rank() == 0:
        console.print(f"to forget: {found}", markup=False, highlight=False, soft_wrap=True)
    if dry_run and damage.KEY not in prior.metadata:
        return
    forget_data = found.read(source.inputs, skip_unreadable=running.skip_unreadable)
    begun = papers.before(source, found, forget_data)
    with watch:
        result = forgetting.forget(
            network,
            prior.pin_memory() if offload_prior and torch.cuda.is_available() else prior,
            batches(forget_data, batch_size=batch_size, shuffle=True, workers=running.workers),
            previous=earlier,
            # The options know their words; older versions of typer know no Literal.
            request=request or _kind(target, records, forget_class),  # type: ignore[arg-type]
            target=target,  # type: ignore[arg-type]
            depth=depth,  # type: ignore[arg-type]
            cosine_level=cosine_level,
            classifier=classifier,
            **forgotten_by,
        )
    if distributed.rank() > 0:
        return
    if dry_run:
        _tell(console, "nothing was written", result)
        return
    if posterior_out is not None:
        result.posterior.metadata[SERVING] = source.facts()
        result.posterior.save(posterior_out)
    source.write(network, out, source.facts())
    papers.write(
        result,
        source,
        prior,
        found,
        forget_data,
        begun,
        previous=previous,
        parties={
            "model": weights or (Path(model) if Path(model).exists() else None),
            "posterior": posterior,
            "unlearned": out,
            "posterior_after": posterior_out,
        },
        settings={"batch_size": batch_size, "backend": running.backend, "offload_prior": offload_prior},
    )
    done(running.checkpoint)
    _tell(console, str(out), result)


def _kind(target: str | None, records: Path | None, classes: list[str]) -> str:
    """What is asked for where --request does not say it."""
    if target is not None:
        return "auto"
    return "records" if records else "class" if classes else "auto"


def _tell(console: Console, what: str, result: ForgetReport) -> None:
    """Print what the run reached."""
    steps_done = len(result.history)
    console.print(f"{what}: KL(q || p) {result.kl:.1f} nats after {steps_done} steps in {result.seconds:.1f} s")
    if result.probability is not None:
        console.print(f"mean probability of the forgotten labels: {result.probability:.2g}")
    if result.advantage is not None:
        console.print(f"advantage of an attacker who sees their log-odds: {result.advantage:.2f}", highlight=False)
    if result.cosine is not None:
        console.print(f"mean cosine of their features: {result.cosine:.2f}")
    if result.forecast is not None:
        console.print(f"forecast: the retained classes lose {result.forecast} of accuracy", highlight=False)
    if result.reached is not None:
        console.print(f"{result.outcome[0].upper()}{result.outcome[1:]}.", soft_wrap=True)
