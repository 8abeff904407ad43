"""Objectives, methods and metrics by name: the library's own, and those that other packages add."""

import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import TypeVar

from .errors import DistructionWarning, UsageError

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Entries by name, the library's own first.

    A package adds one by a decorator (`add` is what it calls), and says so by an entry point of the group
    ``distruction.KINDs`` with the entry's name, whose value is the module or object whose import registers it. Entry
    points are looked for once, when the registry is first read. One that cannot be loaded is left out with a warning,
    so that it breaks no run that does without it.

    Args:
        kind: "objective", "method" or "metric".
        entries: the library's own.
    """

    def __init__(self, kind: str, entries: Mapping[str, T]) -> None:
        self.kind = kind
        self._own = frozenset(entries)
        self._entries = dict(entries)
        self._broken: dict[str, str] = {}
        self._looked = False

    def add(self, name: str, entry: T) -> None:
        """Register an entry.

        Raises:
            UsageError: the name is taken.
        """
        if name in self._entries:
            raise UsageError(f"the {self.kind} {name!r} is registered already; choose another name")
        self._entries[name] = entry

    def __getitem__(self, name: str) -> T:
        return self._found()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())

    def known(self, name: str, otherwise: str = "") -> T:
        """The entry of that name.

        Raises:
            UsageError: there is none, or the package that brings it cannot be loaded.
        """
        if name in self:
            return self[name]
        if name in self._broken:
            raise UsageError(f"the {self.kind} {name!r} cannot be used: {self._broken[name]}")
        raise UsageError(f"{self.kind} {name!r} is unknown; choose {', '.join(self)}{otherwise}")

    def _found(self) -> dict[str, T]:
        if not self._looked:
            # First, as a package that is loaded may read the registry.
            self._looked = True
            for point in entry_points(group=f"distruction.{self.kind}s"):
                try:
                    if point.name in self._own:
                        raise UsageError(f"{point.name!r} is the name of one of the library's own")
                    point.load()
                    if point.name not in self._entries:
                        raise UsageError(f"{point.value} registers no {self.kind} {point.name!r}")
                except Exception as error:
                    package = point.dist.name if point.dist else point.value
                    why = f"{type(error).__name__}: {error}; repair or uninstall the package {package}"
                    self._broken[point.name] = why
                    warnings.warn(
                        f"the {self.kind} {point.name!r} is left out: {why}", DistructionWarning, stacklevel=3
                    )
        return self._entries
