"""A list of records: a CSV file, JSON lines, or text with a record a line."""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError

PLACES = ("path", "file", "file_name", "filename", "image")
ROWS = ("row", "index")
LABELS = ("label", "class")


@dataclass(frozen=True)
class Record:
    """A record that is asked for.

    Attributes:
        place: a path, or the number of a row from 0.
        label: the class that it was given as, or ``None``.
    """

    place: str | int
    label: str | None = None


def read_records(path: Path) -> list[Record]:
    """The records that a file names.

    ``.csv`` and ``.tsv`` have a header with ``path`` or ``row`` and, where wanted, ``label``; ``.jsonl`` has an object
    of the same names, a path or a number in each line; any other file has a path or a number in each line.

    Raises:
        UsageError: the file is missing, empty, of another form, or names a record twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a list of records: {error}") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if path.suffix in (".csv", ".tsv"):
        rows = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
        found = [_record(row, f"row {n} of {path}") for n, row in enumerate(rows, 1)]
    elif path.suffix in (".jsonl", ".ndjson", ".json"):
        found = [_record(_parsed(line, n, path), f"line {n} of {path}") for n, line in enumerate(lines, 1)]
    else:
        found = [_record(line.strip(), f"line {n} of {path}") for n, line in enumerate(lines, 1)]
    if not found:
        raise UsageError(f"{path} names no record")
    seen: set[str | int] = set()
    for record in found:
        if record.place in seen:
            raise UsageError(f"{path} names {record.place} twice")
        seen.add(record.place)
    return found


def _parsed(line: str, number: int, path: Path) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"line {number} of {path} is no JSON: {error}; give an object or a path in each line"
        ) from error


def _record(value: Any, where: str) -> Record:
    label = None
    place = value
    if isinstance(value, Mapping):
        named = {str(k).strip().lower(): v for k, v in value.items() if k is not None}
        places = [n for n in (*PLACES, *ROWS) if named.get(n) not in (None, "")]
        if len(places) != 1:
            raise UsageError(
                f"{where} has {', '.join(named) or 'nothing'}; one of {', '.join((*PLACES, *ROWS))} must say which "
                f"record it is, and one of {', '.join(LABELS)} may say its class"
            )
        place = named[places[0]]
        given = [str(named[n]).strip() for n in LABELS if named.get(n) not in (None, "")]
        label = given[0] if given else None
        if places[0] in ROWS:
            place = _row(place, where)
    if isinstance(place, bool) or not isinstance(place, str | int):
        raise UsageError(f"{where} is {value!r}, neither a path nor the number of a row")
    if isinstance(place, str) and place.isdecimal():
        place = int(place)
    return Record(place, label)


def _row(value: Any, where: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where} has the row {value!r}, which is no number") from error
