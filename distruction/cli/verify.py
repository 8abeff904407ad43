"""``distruction verify``: whether what is here is what a receipt speaks of."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import ops, receipts
from ..data.inputs import batches
from ..errors import UsageError
from ..files import write_atomically
from ..posterior import Posterior
from ..receipts import checks, signing
from ..receipts import receipt as receipt_file
from ..sources import SERVING
from .options import (
    Backend,
    ClassesFile,
    DataRoot,
    DatasetOfModel,
    Device,
    Progress,
    Records,
    Weights,
    Workers,
    alone,
    find_examples,
    open_source,
)

REJECTED = 3
"""The status of the command where a check failed."""


def verify(
    receipt: Annotated[Path, typer.Argument(help="Receipt that `forget --receipt` wrote.")],
    model: Annotated[str | None, typer.Option(help="The unlearned model.")] = None,
    posterior: Annotated[Path | None, typer.Option(help="The posterior of preparation.")] = None,
    posterior_after: Annotated[Path | None, typer.Option(help="The posterior that was left (--posterior-out).")] = None,
    previous: Annotated[Path | None, typer.Option(help="The posterior of the request before this one.")] = None,
    original_model: Annotated[str | None, typer.Option(help="The model from before, spelled as for `forget`.")] = None,
    weights: Weights = None,
    classes: ClassesFile = None,
    public_key: Annotated[Path | None, typer.Option(help="Ed25519 public key (PEM) of the one who is trusted.")] = None,
    secret: Annotated[Path | None, typer.Option(help="Secret of the receipt's tree (NAME.secret.json).")] = None,
    data: DataRoot = None,
    dataset: DatasetOfModel = None,
    forget_class: Annotated[list[str], typer.Option("--class", help="Class that was forgotten; repeat it.")] = [],  # noqa: B006
    records: Records = None,
    prove: Annotated[
        Path | None, typer.Option(help="With --secret: write a proof for the one image of --record to this file.")
    ] = None,
    record: Annotated[Path | None, typer.Option(help="An image file, with its --class and a --proof.")] = None,
    proof: Annotated[Path | None, typer.Option(help="Proof that --prove wrote.")] = None,
    replay: Annotated[bool, typer.Option("--replay", help="Run the request again and compare the bits.")] = False,
    workers: Workers = 4,
    device: Device = "auto",
    backend: Backend = "auto",
    progress: Progress = True,
) -> None:
    """Check a receipt, and whatever of the files, keys and records is passed.

    The status is 0 where nothing that was looked at differs, 3 where something does.
    """
    alone("verify")
    stated = receipts.read(receipt)
    public = None if public_key is None else signing.read_public(public_key)
    found = [
        checks.Check("receipt", True, "its bytes are those that were issued, as far as its SHA-256 tells"),
        checks.signature(stated, public),
        checks.file(stated, "model_after", None if model is None else Path(model), "--model"),
        checks.file(stated, "posterior_before", posterior, "--posterior"),
        checks.file(stated, "model_before", _file_of(original_model, weights), "--original-model"),
    ]
    for role, path, option in (
        ("previous", previous, "--previous"),
        ("posterior_after", posterior_after, "--posterior-after"),
    ):
        if path is not None or stated["files"][role] is not None:
            found.append(checks.file(stated, role, path, option))
    wanted = _wanted(stated, forget_class, records, data)
    if record is not None:
        found.append(_record(stated, record, forget_class, secret, prove, proof, data, dataset, model, classes, device))
    elif prove is not None or proof is not None:
        raise UsageError("--prove and --proof are about one image: name it by --record")
    elif secret is None:
        found.append(checks.Check("forget set", None, "pass --secret and --data"))
    else:
        source = open_source(_named(model or original_model), weights if model is None else None, classes, device)
        if posterior is not None:
            source.agree_with(_serving(posterior), str(posterior))
        selection = find_examples(source, dataset, data, wanted=wanted, records=records)
        key = receipt_file.read_secret(secret, stated)
        found.append(checks.forget_set(stated, receipts.selected(selection), key))
    if replay and all(check.holds is not False for check in found):
        found.append(
            _replay(
                stated,
                _named(original_model),
                weights,
                classes,
                posterior,
                previous,
                model,
                data,
                dataset,
                wanted,
                records,
                workers,
                device,
                backend,
                progress,
            )  # fmt: skip
        )
    _tell(found)
    if any(check.holds is False for check in found):
        raise typer.Exit(REJECTED)


def _tell(found: list[checks.Check]) -> None:
    console = Console()
    for check in found:
        sign, style = {True: ("ok", "green"), False: ("DIFFERS", "red"), None: ("not checked", "dim")}[check.holds]
        console.print(f"{check.what}: {sign}", style=style, end="", highlight=False)
        console.print(f" ({check.detail})" if check.detail else "", markup=False, highlight=False, soft_wrap=True)


def _named(model: str | None) -> str:
    if model is None:
        raise UsageError("pass the model that the data belongs to: --model, or for --replay --original-model")
    return model


def _file_of(model: str | None, weights: Path | None) -> Path | None:
    """The file that the hash of a model is over: its own, or that of its weights."""
    return weights or (None if model is None else Path(model))


def _wanted(stated: dict[str, Any], given: list[str], records: Path | None, data: Path | None) -> list[str]:
    """The classes of the request, unless they or a list of records are given."""
    return given or ([] if records is not None else list(stated["request"]["classes"]))


def _serving(posterior: Path) -> Any:
    from ..posterior_file import metadata_of

    return metadata_of(posterior).get(SERVING)


def _record(
    stated: dict[str, Any],
    record: Path,
    forget_class: list[str],
    secret: Path | None,
    prove: Path | None,
    proof: Path | None,
    data: Path | None,
    dataset: str | None,
    model: str | None,
    classes: Path | None,
    device: str,
) -> checks.Check:
    """Check one image by its proof, or write that proof."""
    names = forget_class or list(stated["request"]["classes"])
    if len(names) != 1:
        raise UsageError(f"a record is an image and its class: name one of {', '.join(names)} by --class")
    digest = receipts.file_record(record, names[0])
    if proof is not None:
        return checks.record(stated, digest, checks.read_proof(proof))
    if prove is None or secret is None:
        raise UsageError(
            "--record is checked by --proof FILE; with --secret, --data and --prove FILE a proof is written"
        )
    source = open_source(_named(model), None, classes, device)
    selection = find_examples(source, dataset, data, wanted=list(stated["request"]["classes"]))
    digests = receipts.selected(selection)
    key = receipt_file.read_secret(secret, stated)
    whole = checks.forget_set(stated, digests, key)
    if whole.holds:
        made = receipts.Tree(digests, key).proof(digest)
        text = json.dumps(made.to_json(), indent=2) + "\n"
        write_atomically(prove, lambda name: _fill(name, text))
        return checks.record(stated, digest, made)
    return whole


def _fill(name: str, text: str) -> None:
    Path(name).write_text(text)


def _replay(
    stated: dict[str, Any],
    original: str,
    weights: Path | None,
    classes: Path | None,
    posterior: Path | None,
    previous: Path | None,
    model: str | None,
    data: Path | None,
    dataset: str | None,
    wanted: list[str],
    records: Path | None,
    workers: int,
    device: str,
    backend: str,
    progress: bool,
) -> checks.Check:
    if posterior is None:
        raise UsageError("--replay starts from the posterior of preparation: pass --posterior")
    source = open_source(original, weights, classes, device)
    prior = Posterior.load(posterior, model=source.network)
    source.agree_with(prior.metadata.get(SERVING), f"the posterior {posterior}")
    selection = find_examples(source, dataset, data, wanted=wanted, records=records)
    where = next(source.network.parameters()).device
    served = ops.resolve(backend, where.type).__name__.rpartition(".")[2]
    return checks.replay(
        stated,
        source.network,
        prior,
        batches(
            selection.read(source.inputs), batch_size=stated["method"]["batch_size"], shuffle=True, workers=workers
        ),
        machine=receipts.machine(where, served),
        unlearned=None if model is None else open_source(model, None, classes, device).network,
        previous=None if previous is None else Posterior.load(previous, model=source.network),
        backend=backend,
        progress=progress,
    )
