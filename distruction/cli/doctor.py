"""``distruction doctor``: versions and backends."""

import typer

from .. import doctor as versions


def doctor() -> None:
    """Print versions, and which backend serves which device, to paste into a bug report."""
    typer.echo(versions.report())
