"""Packages that only a part of the library needs: what says which extra installs them."""

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import MissingPackage


@contextmanager
def needed(extra: str, what: object = "this part of distruction") -> Iterator[None]:
    """Around imports of packages that ``distruction[extra]`` installs.

    Raises:
        MissingPackage: one of them is not installed; the message names it and the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if isinstance(error, MissingPackage) or error.name is None or error.name.startswith(__package__ or ""):
            raise
        package = error.name.partition(".")[0]
        raise MissingPackage(
            f"{what} needs {package}, which is not installed: pip install 'distruction[{extra}]'",
            name=error.name,
        ) from error
