"""``distruction verify``: whether what is here is what a receipt speaks of."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import ops, receipts
from ..data.inputs import batches
from ..data.requests import Selection
from ..errors import UsageError
from ..posterior import Posterior
from ..receipts import checks, signing
from ..receipts import receipt as receipt_file
from ..report import write_json
from ..sources import SERVING, Model
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
    given = _Given(stated, model, original_model, weights, classes, data, dataset, forget_class, records, device)
    if record is not None:
        found.append(given.one_record(record, secret, prove, proof))
    elif prove is not None or proof is not None:
        raise UsageError("--prove and --proof are about one image: name it by --record")
    elif secret is None:
        found.append(checks.Check("forget set", None, "pass --secret and --data"))
    else:
        found.append(given.forget_set(secret))
    if replay and all(check.holds is not False for check in found):
        found.append(given.replay(posterior, previous, workers, backend, progress))
    _tell(found)
    if any(check.holds is False for check in found):
        raise typer.Exit(REJECTED)


def _tell(found: list[checks.Check]) -> None:
    console = Console()
    for check in found:
        sign, style = {True: ("ok", "green"), False: ("DIFFERS", "red"), None: ("not checked", "dim")}[check.holds]
        console.print(f"{check.what}: {sign}", style=style, end="", highlight=False)
        console.print(f" ({check.detail})" if check.detail else "", markup=False, highlight=False, soft_wrap=True)


def _file_of(model: str | None, weights: Path | None) -> Path | None:
    """The file that the hash of a model is over: its own, or that of its weights."""
    return weights or (None if model is None else Path(model))


@dataclass(frozen=True)
class _Given:
    """A receipt, and what the options name."""

    receipt: dict[str, Any]
    model: str | None
    original_model: str | None
    weights: Path | None
    classes: Path | None
    data: Path | None
    dataset: str | None
    forget_class: list[str]
    records: Path | None
    device: str

    def source(self, original: bool) -> Model:
        """The model from before or the unlearned one.

        Raises:
            UsageError: it is not named.
        """
        model = self.original_model if original else self.model
        if model is None:
            raise UsageError(
                "--replay starts from the model from before: pass --original-model"
                if original
                else "the model says how the data's classes are numbered: pass --model"
            )
        return open_source(model, self.weights if original else None, self.classes, self.device)

    def selection(self, source: Model) -> Selection:
        """The records of the request: of its classes, unless others or a list are named."""
        wanted = self.forget_class or ([] if self.records is not None else list(self.receipt["request"]["classes"]))
        return find_examples(source, self.dataset, self.data, wanted=wanted, records=self.records)

    def forget_set(self, secret: Path) -> checks.Check:
        """Check all records."""
        digests = receipts.selected(self.selection(self.source(self.model is None)))
        return checks.forget_set(self.receipt, digests, receipt_file.read_secret(secret, self.receipt))

    def one_record(self, record: Path, secret: Path | None, prove: Path | None, proof: Path | None) -> checks.Check:
        """Check one image by its proof, or write that proof."""
        request = list(self.receipt["request"]["classes"])
        names = self.forget_class or request
        if len(names) != 1:
            raise UsageError(f"a record is an image and its class: name one of {', '.join(names)} by --class")
        digest = receipts.file_record(record, names[0])
        if proof is not None:
            return checks.record(self.receipt, digest, checks.read_proof(proof))
        if prove is None or secret is None:
            raise UsageError(
                "--record is checked by --proof FILE; with --secret, --data and --prove FILE a proof is written"
            )
        whole = replace(self, forget_class=[])
        digests = receipts.selected(whole.selection(self.source(self.model is None)))
        key = receipt_file.read_secret(secret, self.receipt)
        check = checks.forget_set(self.receipt, digests, key)
        if not check.holds:
            return check
        made = receipts.Tree(digests, key).proof(digest)
        write_json(prove, made.to_json())
        return checks.record(self.receipt, digest, made)

    def replay(
        self, posterior: Path | None, previous: Path | None, workers: int, backend: str, progress: bool
    ) -> checks.Check:
        """Run the request again."""
        source = self.source(original=True)
        if posterior is None:
            raise UsageError("--replay starts from the posterior of preparation: pass --posterior")
        prior = Posterior.load(posterior, model=source.network)
        source.agree_with(prior.metadata.get(SERVING), f"the posterior {posterior}")
        data = self.selection(source).read(source.inputs)
        where = next(source.network.parameters()).device
        served = ops.resolve(backend, where.type).__name__.rpartition(".")[2]
        batch_size = self.receipt["method"]["batch_size"]
        return checks.replay(
            self.receipt,
            source.network,
            prior,
            batches(data, batch_size=batch_size, shuffle=True, workers=workers),
            machine=receipts.machine(where, served),
            unlearned=None if self.model is None else self.source(original=False).network,
            previous=None if previous is None else Posterior.load(previous, model=source.network),
            backend=backend,
            progress=progress,
        )
