"""What `forget` writes for whoever asked: a report and a receipt."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import ops, receipts, request_report
from ..data.inputs import Data, batches
from ..data.requests import Selection
from ..errors import UsageError
from ..forget_report import ForgetReport
from ..posterior import Posterior
from ..receipts import receipt as receipt_file
from ..receipts import signing
from ..sources import Model
from .options import output

Report = Annotated[
    Path | None,
    typer.Option(help="Also write a report of the request: a folder (index.html, report.json), or NAME.html."),
]
NoRecords = Annotated[bool, typer.Option("--no-records", help="Show no forgotten record in the report.")]
Receipt = Annotated[
    Path | None,
    typer.Option(help="Also write a receipt (NAME.json, NAME.html) and the secret of its tree (NAME.secret.json)."),
]
Key = Annotated[Path | None, typer.Option(help="Ed25519 private key (PEM) that signs the receipt.")]


@dataclass(frozen=True)
class Papers:
    """A report and a receipt that are wanted of a request.

    Attributes:
        report, receipt, key: files, as the options name them.
        records: whether the report shows some.
    """

    report: Path | None
    receipt: Path | None
    key: Path | None
    records: bool

    def __bool__(self) -> bool:
        return self.report is not None or self.receipt is not None

    def check(self, overwrite: bool) -> None:
        """Refuse what could not be written in the end.

        Raises:
            UsageError: a file is there, no place is, or the key cannot be used.
        """
        if self.key is not None and self.receipt is None:
            raise UsageError("--key signs a receipt: name its file by --receipt")
        if self.key is not None:
            signing.read_private(self.key)
        if self.report is not None:
            for path in request_report.files_of(self.report):
                if path.parent == self.report and not path.parent.exists():
                    output(path.parent, overwrite, folder=True)
                else:
                    output(path, overwrite)
        if self.receipt is not None:
            if self.receipt.suffix != ".json":
                raise UsageError(f"{self.receipt} is the JSON file of a receipt: call it {self.receipt.stem}.json")
            for path in (self.receipt, *_beside(self.receipt)):
                output(path, overwrite)

    def before(self, source: Model, found: Selection, data: Data) -> tuple[str, list[bytes]]:
        """What can be told before the run alone: the weights' SHA-256, and the records' digests as they are now.

        Raises:
            UsageError: unreadable files were left out, so that the records are not those that were selected.
        """
        if self.receipt is None:
            return "", []
        if len(data) != len(found.labels):
            raise UsageError("a receipt is for every record: remove the unreadable files instead of skipping them")
        return receipts.weights_sha256(source.network), receipts.selected(found)

    def write(
        self,
        result: ForgetReport,
        source: Model,
        prior: Posterior,
        found: Selection,
        data: Data,
        begun: tuple[str, list[bytes]],
        *,
        previous: Path | None,
        parties: Mapping[str, Path | None],
        settings: Mapping[str, Any],
    ) -> None:
        """Write what is wanted.

        Args:
            begun: of `before`.
            previous: the posterior of the request before this one.
            parties: the other files: model, posterior, unlearned, posterior_after.
            settings: how the data was read, and the backend.
        """
        if not self:
            return
        network = source.network
        device = next(network.parameters()).device
        backend = ops.resolve(settings["backend"], device.type).__name__.rpartition(".")[2]
        classes = dict(enumerate(source.known_classes()))
        receipt = None
        if self.receipt is not None:
            assert parties["posterior"] is not None
            assert parties["unlearned"] is not None
            weights, digests = begun
            facts = result.posterior.metadata
            asked = ("objective", "steps", "kl_weight", "level", "data_per_step", "lr", "mc_samples", "seed",
                     "target", "depth", "cosine_level", "classifier")  # fmt: skip
            secret = receipts.new_secret()
            receipt = receipts.make(
                result,
                network,
                receipts.Parties(
                    parties["posterior"], parties["unlearned"], weights, parties["model"], previous,
                    parties["posterior_after"],
                ),
                digests,
                secret,
                classes=classes,
                settings={**{k: facts[k] for k in asked if k in facts}, **settings},
                machine=receipts.machine(device, backend),
                kl=request_report.kl_by_parameter(result.posterior, prior),
                key=None if self.key is None else signing.read_private(self.key),
            )  # fmt: skip
            page, secret_file = _beside(self.receipt)
            receipt_file.write_secret(secret_file, secret, receipt["forget_set"]["root"])
            receipts.write(self.receipt, receipt)
            request_report.write_page(page, None, receipt)
        if self.report is not None:
            count = request_report.RECORDS if self.records else 0
            shown = request_report.positions(len(data), count)
            files = found.encoded
            whole = len(data) == len(found.labels)
            collected = request_report.collect(
                result,
                network,
                prior,
                batches(data, batch_size=settings["batch_size"]),
                previous=None if previous is None else Posterior.load(previous, model=network),
                classes=source.known_classes(),
                asked={"model": source.name},
                read={"forget set": str(found), "posterior": str(parties["posterior"])},
                settings={**settings, "backend": backend},
                records=count,
                names=None if files is None or not whole else [Path(files[i][0]).name for i in range(len(files))],
                pictures=request_report.thumbnails(found, shown) if whole else None,
            )
            request_report.save(self.report, collected, receipt=receipt)


def _beside(receipt: Path) -> tuple[Path, Path]:
    """The page and the secret of a receipt."""
    return receipt.with_suffix(".html"), receipt.with_suffix(".secret.json")
