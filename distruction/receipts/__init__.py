"""Receipts of requests: what was forgotten, from which files, with what result; and how to check one.

See the guide to receipts for what they prove and what they do not.
"""

from .checks import Check, replay
from .receipt import FORMAT, LIMITS, Parties, Rejected, machine, make, new_secret, read, weights_sha256, write
from .records import Proof, Tree, file_record, record_digest, selected

__all__ = [
    "FORMAT",
    "LIMITS",
    "Check",
    "Parties",
    "Proof",
    "Rejected",
    "Tree",
    "file_record",
    "machine",
    "make",
    "new_secret",
    "read",
    "record_digest",
    "replay",
    "selected",
    "weights_sha256",
    "write",
]
