"""Images as they are stored, each read when it is asked for: files, or rows that were copied out of tables."""

import os
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..interrupts import held
from .raw import Source, file_source

IN_MEMORY = 2**28
"""Bytes of images up to which they are read once and kept; more are read again in each epoch."""


class Encoded(Protocol):
    """A sequence of encoded images."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int, /) -> Source:
        """The name of one and what reads it."""

    def take(self, positions: Sequence[int], /) -> "Encoded":
        """Those at these positions."""


@dataclass(frozen=True)
class Files:
    """Image files."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Source:
        return file_source(self.paths[index])

    def take(self, positions: Sequence[int]) -> "Files":
        """The files at these positions."""
        return Files(tuple(self.paths[i] for i in positions))


class Spool:
    """The bytes of many images one after another: in memory, or of more than ``IN_MEMORY`` bytes in a temporary file.

    The file is deleted when nothing refers to it any more. Worker processes read it at the same time.
    """

    def __init__(self, contents: Iterable[bytes]) -> None:
        self.ends = [0]
        kept = bytearray()
        self._memory: bytes | None = None
        self._path = ""
        descriptor = -1
        try:
            for content in contents:
                if descriptor < 0 and len(kept) + len(content) > IN_MEMORY:
                    with held():
                        descriptor, self._path = tempfile.mkstemp(prefix="distruction-")
                        weakref.finalize(self, Path(self._path).unlink, missing_ok=True)
                    _write(descriptor, kept)
                    kept = bytearray()
                if descriptor < 0:
                    kept += content
                else:
                    _write(descriptor, content)
                self.ends.append(self.ends[-1] + len(content))
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        if descriptor < 0:
            self._memory = bytes(kept)

    def read(self, index: int) -> bytes:
        """The bytes of one image."""
        start, end = self.ends[index], self.ends[index + 1]
        if self._memory is not None:
            return self._memory[start:end]
        with open(self._path, "rb") as file:
            file.seek(start)
            return file.read(end - start)


def _write(descriptor: int, content: bytes | bytearray) -> None:
    view = memoryview(content)
    while len(view):
        view = view[os.write(descriptor, view) :]


@dataclass(frozen=True)
class Spooled:
    """Images of a `Spool`, with a name for each, by which they are compared."""

    spool: Spool = field(compare=False)
    names: tuple[str, ...]
    positions: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Source:
        place = self.positions[index]
        return self.names[place], lambda: self.spool.read(place)

    def take(self, positions: Sequence[int]) -> "Spooled":
        """The images at these positions."""
        return Spooled(self.spool, self.names, tuple(self.positions[i] for i in positions))
