"""The forget set as a salted Merkle tree: a commitment to each record that reveals none of them.

A record is the SHA-256 of its class and its content: the bytes of an image file, or the stored pixels where a data set
has no files. Its leaf is

    salt || record,   salt = HMAC-SHA-256(secret, record || number),

number being 0, or 1, 2, ... for further copies of the same record. The secret is 32 random bytes that stay with whoever
issued the receipt: without it nobody can try out which images fit a leaf, although those of a known collection are
easily guessed. The leaves are sorted by their hashes, so that a place in the tree tells nothing of one in the data.
"""

import hashlib
import hmac
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from . import canonical, merkle

if TYPE_CHECKING:
    from ..data.requests import Selection

SECRET_BYTES = 32


def record_digest(content: bytes, *, label: str, kind: str, shape: Sequence[int] = ()) -> bytes:
    """SHA-256 of what a record is.

    Args:
        content: the file's bytes; or the pixels', channel by channel, row by row.
        label: the name of its class.
        kind: ``file`` or ``pixels``.
        shape: (channels, height, width) of pixels.
    """
    head = canonical.encode({"class": label, "kind": kind, "shape": list(shape)})
    return hashlib.sha256(b"distruction-record-1\n" + head + b"\n" + content).digest()


def file_record(path: Path, label: str) -> bytes:
    """The digest of an image file."""
    return file_content(path.read_bytes(), label)


def file_content(content: bytes, label: str) -> bytes:
    """The digest of an image file's bytes, wherever they are kept."""
    return record_digest(content, label=label, kind="file")


def selected(selection: "Selection") -> list[bytes]:
    """The digests of a request's records, in their order."""
    names = [selection.classes[label] for label in selection.labels]
    if selection.encoded is not None:
        return [file_content(selection.encoded[i][1](), name) for i, name in enumerate(names)]
    assert selection.images is not None
    images = selection.images.images
    shape = tuple(images.shape[1:])
    return [
        record_digest(image.contiguous().numpy().tobytes(), label=name, kind="pixels", shape=shape)
        for image, name in zip(images, names, strict=True)
    ]


@dataclass(frozen=True)
class Proof:
    """What shows that one record was in the forget set, to somebody who has the receipt and the record.

    Attributes:
        index, size: its leaf's place, and the number of leaves.
        salt: of its leaf alone.
        path: hashes from the leaf to the root.
    """

    index: int
    size: int
    salt: bytes
    path: tuple[bytes, ...]

    def to_json(self) -> dict[str, Any]:
        """As it is written to a file."""
        return {
            "format": "distruction-proof-1",
            "index": self.index,
            "size": self.size,
            "salt": self.salt.hex(),
            "path": [h.hex() for h in self.path],
        }

    @classmethod
    def from_json(cls, value: Any) -> "Proof":
        """What `to_json` gave.

        Raises:
            UsageError: it is something else.
        """
        try:
            if value["format"] != "distruction-proof-1":
                raise UsageError(f"the proof has the format {value['format']!r}, not 'distruction-proof-1'")
            index, size = value["index"], value["size"]
            if type(index) is not int or type(size) is not int:
                raise TypeError("index and size must be integers")
            return cls(
                index, size, bytes.fromhex(value["salt"]), tuple(bytes.fromhex(h) for h in value["path"])
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            raise UsageError(f"this is no proof of a record: {error!r}") from error

    def shows(self, root: bytes, record: bytes) -> bool:
        """Whether the record is one of those under the root."""
        return merkle.leads_to(root, merkle.leaf_hash(self.salt + record), self.index, self.size, self.path)


class Tree:
    """The tree over a forget set's records.

    Args:
        records: digests of `record_digest`, in any order.
        secret: 32 bytes.

    >>> from distruction.receipts.records import record_digest
    >>> records = [record_digest(bytes([i]), label="cat", kind="file") for i in range(3)]
    >>> tree = Tree(records, secret=bytes(32))
    >>> tree.proof(records[1]).shows(tree.root, records[1])
    True
    """

    def __init__(self, records: Iterable[bytes], secret: bytes) -> None:
        if len(secret) != SECRET_BYTES:
            raise UsageError(f"the secret must have {SECRET_BYTES} bytes, not {len(secret)}")
        self._secret = secret
        seen: Counter[bytes] = Counter()
        leaves = []
        for record in records:
            leaves.append(merkle.leaf_hash(self._salt(record, seen[record]) + record))
            seen[record] += 1
        self._levels = merkle.levels(sorted(leaves))

    def _salt(self, record: bytes, number: int) -> bytes:
        return hmac.digest(self._secret, record + number.to_bytes(8, "big"), "sha256")

    def __len__(self) -> int:
        return len(self._levels[0])

    @property
    def root(self) -> bytes:
        """The root's hash."""
        return merkle.root(self._levels[0]) if len(self) == 0 else self._levels[-1][0]

    def proof(self, record: bytes) -> Proof:
        """The inclusion proof of a record.

        Raises:
            UsageError: the record is not in the tree.
        """
        salt = self._salt(record, 0)
        leaf = merkle.leaf_hash(salt + record)
        if leaf not in self._levels[0]:
            raise UsageError(f"the record {record.hex()[:12]}... is not in the forget set of the receipt")
        index = self._levels[0].index(leaf)
        return Proof(index, len(self), salt, tuple(merkle.proof(self._levels, index)))
