"""Files that are there whole or not at all, and whose bytes depend on their contents alone."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_KEY = "distruction"


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, sync it, and rename it over ``path``."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        os.close(handle)
        write(name)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], *, format: str, facts: Mapping[str, Any]
) -> None:
    """Write a safetensors file atomically; ``format`` and the JSON-able ``facts`` go into its header.

    They share one header entry, because safetensors writes several in random order.
    """
    header = {_KEY: json.dumps({"format": format, **facts})}
    copies = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    write_atomically(path, lambda name: save_file(copies, name, header))


def load_tensors(
    path: str | os.PathLike[str], *, format: str, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts of a file written by `save_tensors`.

    Raises:
        ValueError: the file is damaged, or of another format; says which.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            facts = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            found = facts.pop("format", None)
            if found == format:
                return {n: file.get_tensor(n) for n in file.keys()}, facts  # noqa: SIM118 (not a dict)
    except (SafetensorError, TypeError, AttributeError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    raise ValueError(f"{path} has format {found!r}, expected {format!r}")
