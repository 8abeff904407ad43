"""Files that are there whole or not at all, whose bytes depend on their contents alone, and which a checksum guards."""

import errno
import glob
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .interrupts import held

_KEY = "distruction"


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], object], *, mode: int = 0o666) -> None:
    """Let ``write`` fill a file in a temporary folder beside ``path``, sync it, and rename it to ``path``.

    A process that is killed at any moment leaves the old file or the new one, and at worst the folder, which
    `remove_leftovers` deletes. Ctrl-C waits until the file is there, a second one until the folder is deleted.
    (A folder, because writers such as safetensors have temporary files of their own.)

    Args:
        mode: of the file, less what the umask takes, before it has its name.
    """
    path = Path(path)
    with held(), draft_folder(path) as folder:
        name = str(folder / path.name)
        write(name)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(name, mode & ~_umask())
        os.replace(name, path)
    _sync_folder(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`write_atomically` of ``text``, in UTF-8."""
    write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


@contextmanager
def draft_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``, for what is to be renamed to it; deleted at the end, where it is still there.

    Enter it inside of `held`, so that no Ctrl-C comes between making or deleting it and knowing so.
    """
    draft = Path(tempfile.mkdtemp(dir=path.parent, prefix=_prefix(path), suffix=_SUFFIX))
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_writable(path: str | os.PathLike[str], nbytes: int = 0) -> None:
    """Raise, before any work is done, unless a file of ``nbytes`` can be written at ``path`` now.

    Raises:
        OSError: the folder is missing or read-only, or the disk is too full.
    """
    folder = Path(path).parent
    with tempfile.TemporaryFile(dir=folder):
        free = shutil.disk_usage(folder).free
    if free < nbytes:
        what = f"{os.strerror(errno.ENOSPC)}: {nbytes / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free"
        raise OSError(errno.ENOSPC, what, str(path))


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Delete what writers of the file or folder ``path`` that were killed left beside it; nobody may write it now."""
    path = Path(path)
    for folder in path.parent.glob(f"{glob.escape(_prefix(path))}*{_SUFFIX}"):
        shutil.rmtree(folder, ignore_errors=True)


_SUFFIX = ".tmp"


def _prefix(path: Path) -> str:
    return f".{path.name}."


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power failure, where folders can be synced."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], *, format: str, facts: Mapping[str, Any]
) -> None:
    """Write a safetensors file atomically; ``format``, the JSON-able ``facts`` and a checksum go into its header.

    They share one header entry, because safetensors writes several in random order.

    Raises:
        OSError: the disk is full, the folder is missing or read-only, ...; the file is as it was before.
    """
    path = Path(path)
    copies, seen = {}, set()
    for name, t in tensors.items():
        here = t.detach().cpu().contiguous()
        # safetensors refuses names that share memory.
        copies[name] = here.clone() if (where := here.untyped_storage().data_ptr()) in seen else here
        seen.add(where)
    facts = json.loads(json.dumps(facts))  # as they will be read: tuples are lists, keys are strings
    header = {_KEY: json.dumps({"format": format, "crc32": _checksum(format, facts, copies), **facts})}

    def write(name: str) -> None:
        try:
            save_file(copies, name, header)
        except SafetensorError as error:
            # It wraps the operating system's errors, whose number is in the text.
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else None, str(error), str(path)) from error

    write_atomically(path, write)


def load_tensors(
    path: str | os.PathLike[str], *, format: str, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts of a file written by `save_tensors`.

    Raises:
        ValueError: the file is damaged, or of another format; says which.
    """
    with _reading(path) as file:
        facts, checksum = _header(file, path, format)
        # Copies, because safetensors maps the file, which somebody may overwrite or cut.
        tensors = {n: file.get_tensor(n).clone() for n in file.keys()}  # noqa: SIM118 (not a dict)
    if checksum != _checksum(format, facts, tensors):
        raise ValueError(f"{path} is damaged: its checksum is wrong")
    return {n: t.to(device) for n, t in tensors.items()}, facts


def load_facts(path: str | os.PathLike[str], *, format: str) -> dict[str, Any]:
    """The facts of such a file, without its tensors and hence not checked against its checksum.

    Raises:
        ValueError: the file is damaged, or of another format; says which.
    """
    with _reading(path) as file:
        return _header(file, path, format)[0]


class _AnotherFormat(Exception):
    """Of a file that is whole and not what was asked for."""


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except _AnotherFormat as error:
        raise ValueError(str(error)) from error
    except (SafetensorError, TypeError, AttributeError, ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _header(file: Any, path: str | os.PathLike[str], format: str) -> tuple[dict[str, Any], Any]:
    """The facts and the checksum."""
    facts = json.loads((file.metadata() or {}).get(_KEY, "{}"))
    found, checksum = facts.pop("format", None), facts.pop("crc32", None)
    if found != format:
        raise _AnotherFormat(_another_format(path, found, format))
    return facts, checksum


def _another_format(path: str | os.PathLike[str], found: Any, expected: str) -> str:
    kind, _, version = expected.rpartition("-")
    theirs = found.rpartition("-") if isinstance(found, str) else ("", "", "")
    if theirs[0] == kind and theirs[2].isdecimal():
        if int(theirs[2]) > int(version):
            return f"{path} has format {found!r}, newer than {expected!r}; upgrade distruction"
        return f"{path} has format {found!r}, of an older version of distruction that wrote no {expected!r}"
    return f"{path} has format {found!r}, expected {expected!r}"


def _checksum(format: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of the format, the facts, and names, types, shapes and bytes of the tensors.

    A damaged bit in the data would otherwise load as a weight that is wrong by a little or a lot.
    """
    crc = zlib.crc32(json.dumps([format, facts], sort_keys=True).encode())
    for name, t in sorted(tensors.items()):
        crc = zlib.crc32(f"{name}:{t.dtype}:{tuple(t.shape)};".encode(), crc)
        crc = zlib.crc32(t.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc
