"""What a receipt says, how it is written, and how its own bytes are checked."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..doctor import versions
from ..errors import DistructionError, UsageError
from ..files import write_atomically
from ..forget_report import ForgetReport
from ..sharding import gather
from . import canonical, signing
from .records import SECRET_BYTES, Tree

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

FORMAT = "distruction-receipt-1"
SECRET_FORMAT = "distruction-receipt-secret-1"
TOLERANCE = 0.01
"""Of a replay with another backend, number of threads or device: KL between its result and the one of the receipt, as a
share of KL(q || p)."""

LIMITS = (
    "The receipt shows which files and records this was done with and what the run reached on the forget set. It is no "
    "proof that nothing of the records is left in the model.",
    "The level is about the probability of the forgotten labels. An attack on the features inside the model, or "
    "training it further, may bring back what the outputs no longer show.",
    "Copies of the model from before, the posterior of preparation and the records themselves are not deleted by this "
    "run; the posterior's means are the weights from before.",
    "That the posterior was prepared on the data that it names, and that the records are all there are of the request, "
    "is what its issuer says.",
    "A signature shows who issued the receipt, not when: the time is the issuer's clock.",
)


class Rejected(DistructionError):
    """A receipt, or something that it speaks of, is not what it was when the receipt was issued."""


def file_facts(path: Path) -> dict[str, Any]:
    """SHA-256 and size of a file; of a folder those of each file in it, and the SHA-256 of that list.

    Raises:
        UsageError: there is nothing.
    """
    if path.is_dir():
        names = sorted(p for p in path.rglob("*") if p.is_file())
        files = {p.relative_to(path).as_posix(): file_facts(p) for p in names}
        return {
            "bytes": sum(f["bytes"] for f in files.values()),
            "files": files,
            "sha256": hashlib.sha256(canonical.encode(files)).hexdigest(),
        }
    if not path.is_file():
        raise UsageError(f"there is no file {path} to take the hash of")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the model's state_dict, in the order of the names."""
    digest = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        digest.update(f"{name}:{t.dtype}:{tuple(t.shape)};".encode())
        digest.update(gather(t.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def machine(device: torch.device, backend: str) -> dict[str, Any]:
    """What the bits of a run depend on beside its inputs: versions, backend, device, threads."""
    return {
        "backend": backend,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


@dataclass(frozen=True)
class Parties:
    """The files of a request.

    Attributes:
        model, posterior: from before: the model that was given, and the posterior of preparation.
        unlearned: the model that was written.
        previous, posterior_after: the posterior of the request before this one, and the one that is left.
        weights_before: `weights_sha256` of the model from before.
    """

    posterior: Path
    unlearned: Path
    weights_before: str
    model: Path | None = None
    previous: Path | None = None
    posterior_after: Path | None = None


def make(
    result: ForgetReport,
    model: nn.Module,
    parties: Parties,
    records: Sequence[bytes],
    secret: bytes,
    *,
    classes: Mapping[int, str],
    settings: Mapping[str, Any],
    machine: Mapping[str, Any],
    kl: Mapping[str, float],
    key: "Ed25519PrivateKey | None" = None,
) -> dict[str, Any]:
    """The receipt of a request, as JSON values; `write` writes it.

    Args:
        result: of `distruction.forget`.
        model: the unlearned one.
        parties: the files, which must be written by now.
        records: digests of the forget set (`distruction.receipts.records`).
        secret: 32 random bytes; keep them, to prove later that a record was in the set.
        classes: label to name.
        settings: with which a replay calls `distruction.forget`, and how the data was read.
        machine: see `machine`.
        kl: nats by parameter.
        key: signs the receipt.

    Raises:
        UsageError: a file is missing; ``cryptography`` is, with a key.
    """
    tree = Tree(records, secret)
    asked = result.posterior.metadata["forgotten"][-1]
    optional = {"previous": parties.previous, "posterior_after": parties.posterior_after, "model_before": parties.model}
    body: dict[str, Any] = canonical.plain(
        {
            "format": FORMAT,
            "issued": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "request": {
                "kind": result.request,
                "records": len(records),
                "classes": {classes.get(int(c), str(c)): n for c, n in asked["labels"].items()},
            },
            "forget_set": {
                "root": tree.root.hex(),
                "size": len(tree),
                "tree": "RFC 6962, SHA-256, salted leaves, sorted by hash",
            },
            "files": {
                "model_after": file_facts(parties.unlearned),
                "posterior_before": file_facts(parties.posterior),
                **{name: None if path is None else file_facts(path) for name, path in optional.items()},
            },
            "weights": {"before": parties.weights_before, "after": weights_sha256(model)},
            "method": {"name": "DiStruction", **settings},
            "machine": machine,
            "result": {
                "level": result.level,
                "probability": result.probability,
                "advantage": result.advantage,
                "cosine": result.cosine,
                "forecast": None if result.forecast is None else asdict(result.forecast),
                "reached": result.reached,
                "advice": result.advice,
                "steps": len(result.history),
                "seconds": round(result.seconds, 3),
                "kl": result.kl,
                "kl_by_parameter": dict(kl),
            },
            "replay": {
                "same_machine": "the same bits",
                "other_machine": f"KL between the two results at most {TOLERANCE} of result.kl",
            },
            "limits": list(LIMITS),
            "signer": None
            if key is None
            else {"algorithm": signing.ALGORITHM, "public_key": signing.public_of(key).hex()},
        }
    )
    message = canonical.encode(body)
    body["sha256"] = hashlib.sha256(message).hexdigest()
    body["signature"] = None if key is None else signing.sign(key, message).hex()
    return body


def new_secret() -> bytes:
    """32 random bytes of the operating system."""
    return os.urandom(SECRET_BYTES)


def write(path: Path, receipt: Mapping[str, Any]) -> None:
    """Write the receipt in its canonical spelling and a line feed, atomically."""
    text = canonical.encode(dict(receipt)) + b"\n"
    _write(path, text)


def write_secret(path: Path, secret: bytes, root: str) -> None:
    """Write the secret of a receipt's tree, for its owner's eyes alone."""
    text = canonical.encode({"format": SECRET_FORMAT, "root": root, "secret": secret.hex()}) + b"\n"
    _write(path, text, mode=0o600)


def _write(path: Path, content: bytes, mode: int = 0o666) -> None:
    write_atomically(path, lambda name: Path(name).write_bytes(content), mode=mode)


def read_secret(path: Path, receipt: Mapping[str, Any]) -> bytes:
    """The secret of a receipt's tree.

    Raises:
        UsageError: the file is no secret, or that of another receipt.
    """
    try:
        found = json.loads(path.read_bytes())
        if found["format"] != SECRET_FORMAT:
            raise UsageError(f"{path} has the format {found['format']!r}, not {SECRET_FORMAT!r}")
        secret = bytes.fromhex(found["secret"])
        if found["root"] != receipt["forget_set"]["root"]:
            raise UsageError(f"{path} is the secret of another receipt")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} cannot be read as the secret of a receipt: {error!r}") from error
    return secret


def read(path: Path) -> dict[str, Any]:
    """The receipt in a file, whose bytes are those that were issued as far as its own hash and signature tell.

    Raises:
        UsageError: there is no such file.
        Rejected: it is no receipt, another byte than the issued ones is in it, or its signature is not that of the key
            that it names.
    """
    try:
        return parse(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def parse(text: bytes, path: str = "the receipt") -> dict[str, Any]:
    """The receipt in these bytes: see `read`.

    Args:
        path: what to call it in messages.
    """
    try:
        receipt = json.loads(text)
        if not isinstance(receipt, dict) or receipt.get("format") != FORMAT:
            raise Rejected(f"{path} is no receipt of the format {FORMAT!r}")
        if canonical.encode(receipt) + b"\n" != text:
            raise Rejected(f"{path} is damaged: it is not in the canonical spelling")
        message = canonical.encode({k: v for k, v in receipt.items() if k not in ("sha256", "signature")})
        if receipt["sha256"] != hashlib.sha256(message).hexdigest():
            raise Rejected(f"{path} is damaged: its SHA-256 is not that of its content")
        signer, signature = receipt["signer"], receipt["signature"]
        if (signer is None) != (signature is None):
            raise Rejected(f"{path} is damaged: it names a signer without a signature, or the reverse")
        if signer is None:
            return receipt
        raw = bytes.fromhex(signature)
        if raw.hex() != signature or signer["algorithm"] != signing.ALGORITHM:
            raise Rejected(f"{path} is damaged: its signature is not written as {signing.ALGORITHM}'s are")
        if not signing.is_signed(bytes.fromhex(signer["public_key"]), message, raw):
            raise Rejected(f"the signature of {path} is not that of its content by the key that it names")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, DistructionError):
            raise
        raise Rejected(f"{path} is damaged: {error!r}") from error
    return receipt
