"""One spelling for each JSON value, so that hashes and signatures are over bytes that anybody can make again.

The rule is that of RFC 8785 (JSON Canonicalization Scheme) without its one difficult part, the numbers: UTF-8; no white
space; the names of an object in the order of their UTF-16 code units; strings with the shortest escapes. A number is an
integer of at most 2**53 - 1 in magnitude. A real number is a *string*, the shortest decimal that reads back as the same
float64 (Python's ``repr``); no float is written as a JSON number.
"""

import json
from collections.abc import Mapping
from typing import Any

from ..errors import UsageError

LARGEST = 2**53 - 1
"""The largest integer that every reader of JSON holds exactly."""


def plain(value: Any) -> Any:
    """The value with each float as a string, tuples as lists and names as strings: what `encode` takes."""
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def encode(value: Any) -> bytes:
    """The value's one spelling.

    Raises:
        UsageError: it holds a float, an integer beyond 2**53 - 1, a name that is no string, text that is no Unicode, or
            something that is no JSON.
    """
    try:
        return _text(value).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"text with half a surrogate pair has no UTF-8: {error.object!r}") from error


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int):
        if abs(value) > LARGEST:
            raise UsageError(f"{value} is beyond 2**53 - 1, where readers of JSON round: give it as a string")
        return str(value)
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise UsageError(f"the names of an object must be strings, not {[n for n in value if type(n) is not str]}")
        names = sorted(value, key=lambda name: name.encode("utf-16-be", "surrogatepass"))
        return f"{{{','.join(f'{_text(name)}:{_text(value[name])}' for name in names)}}}"
    raise UsageError(f"{value!r} has no one spelling in JSON: `plain` makes a string of a float")
