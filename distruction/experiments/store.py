"""Results on disk by content: an entry exists whole and checked, or not at all.

An entry is the folder ``KIND/KEY`` with the files of one job and ``entry.json``, which holds the job's facts, its value
and a checksum of everything. KEY is a hash of the facts, so that other settings are another entry.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..interrupts import held

Facts = Mapping[str, Any]


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def key_of(facts: Facts) -> str:
    """A hash of what determines a result."""
    return hashlib.sha256(canonical(facts).encode()).hexdigest()[:32]


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
        return digest.hexdigest()


class Store:
    """Entries under a folder."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def folder(self, kind: str, facts: Facts) -> Path:
        """Where the entry of these facts is, or would be."""
        return self.root / kind / key_of(facts)

    def save(
        self, kind: str, facts: Facts, value: Any, files: Mapping[str, Callable[[Path], None]] | None = None
    ) -> None:
        """Write an entry atomically; one that is there already is replaced.

        Args:
            value: JSON-able.
            files: file name to a function that writes it.
        """
        target = self.folder(kind, facts)
        target.parent.mkdir(parents=True, exist_ok=True)
        with held() as interrupts:
            draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=".draft-"))
            try:
                with interrupts.let_through():
                    for name, write in (files or {}).items():
                        write(draft / name)
                    content = {"facts": facts, "value": value, "files": {n: file_hash(draft / n) for n in files or {}}}
                    entry = {"sha256": hashlib.sha256(canonical(content).encode()).hexdigest(), **content}
                    (draft / "entry.json").write_text(json.dumps(entry, indent=1) + "\n")
                draft.chmod(0o755)
                shutil.rmtree(target, ignore_errors=True)
                draft.replace(target)
            finally:
                shutil.rmtree(draft, ignore_errors=True)

    def load(self, kind: str, facts: Facts) -> Any | None:
        """The value of an entry, or ``None`` where it is missing or any byte of it is not what was written."""
        folder = self.folder(kind, facts)
        try:
            entry = json.loads((folder / "entry.json").read_text())
            content = {k: entry[k] for k in ("facts", "value", "files")}
            whole = entry["sha256"] == hashlib.sha256(canonical(content).encode()).hexdigest()
            if whole and all(file_hash(folder / n) == h for n, h in entry["files"].items()):
                return entry["value"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def sweep_drafts(self) -> None:
        """Delete what killed processes left unfinished; nobody else may be writing."""
        for draft in self.root.glob("*/.draft-*"):
            shutil.rmtree(draft, ignore_errors=True)
