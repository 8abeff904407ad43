"""What the user of the command line sees of a mistake: one line, whoever raised it; and no option that is lost."""

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from .errors import DistructionError, DistructionWarning
from .extras import needed
from .loop.step import Terminated

with needed("cli"):
    from rich.console import Console
    from typer.core import TyperCommand

TRACEBACK = "DISTRUCTION_TRACEBACK"
"""The environment variable that lets the traceback of an error through."""


WRITTEN = ("out", "posterior_out", "report", "receipt", "log_json", "checkpoint")
"""Options, by parameter, that name a file to write."""

READ = (
    *("model", "posterior", "previous", "weights", "pretrained", "classes", "records", "key", "grid"),
    *("original", "retrained"),
)
"""Options that name a file to read."""

REPLACED = (("out", "model"), ("posterior_out", "previous"))
"""What `forget` writes in the place of what it was given, if it may overwrite it: the next state of the same thing."""


class Command(TyperCommand):
    """A command that refuses what would lose something in silence.

    That is an option given twice where only the last value would count, and one file for two purposes.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of the command line."""
        given = list(self.make_parser(ctx).parse_args(args=list(args))[2])
        for option in {id(p): p for p in given}.values():
            names = {*option.opts, *option.secondary_opts}
            # The same flag twice is one wish.
            harmless = getattr(option, "is_flag", False) and len(names.intersection(args)) == 1
            if given.count(option) > 1 and not option.multiple and not harmless:
                ctx.fail(f"{' / '.join(sorted(names))} is given {given.count(option)} times, but takes one value")
        rest = super().parse_args(ctx, args)
        self._check_files(ctx)
        return rest

    def _check_files(self, ctx: Any) -> None:
        seen: dict[str, str] = {}
        names = {param.name: param.opts[0] for param in self.params}
        for name in (*READ, *WRITTEN):
            value = ctx.params.get(name)
            if not isinstance(value, str | os.PathLike) or "\0" in str(value):
                continue
            place = os.path.realpath(value)
            other = seen.setdefault(place, name)
            in_place = self.name == "forget" and (name, other) in REPLACED
            if name in WRITTEN and other != name and not in_place:
                ctx.fail(f"{names[other]} and {names[name]} are one file, {value}: give each its own")


def run(app: Callable[[], object]) -> None:
    """Run a command line: an error ends with one line and a status other than 0.

    Ctrl-C ends with status 130, SIGTERM inside of a run with 143. The status is 2 where the library or the operating
    system refused something, 1 for an error that neither foresaw.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", DistructionWarning)
            _show_as_lines()
            app()
            return
    except KeyboardInterrupt:
        status = 130
    except Terminated:
        status = 143
    except (DistructionError, OSError) as error:
        _fail(f"error: {error}", 2, error)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        _fail(f"error: {type(error).__name__}: {reason} ({TRACEBACK}=1 shows where)", 1, error)
    # Here, because the interrupted frames are gone by now, and what they had to clean up with them.
    sys.exit(status)


def _fail(text: str, status: int, error: Exception) -> NoReturn:
    if os.environ.get(TRACEBACK):
        raise error
    _print(text, "red")
    sys.exit(status)


def _show_as_lines() -> None:
    """The library's own warnings as one line each, once, from one process of several; others as Python shows them."""
    show = warnings.showwarning
    told: set[str] = set()

    def line(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, DistructionWarning):
            show(message, category, *where, **more)
        elif os.environ.get("RANK", "0") == "0" and str(message) not in told:
            told.add(str(message))
            _print(f"note: {message}", "yellow")

    warnings.showwarning = line


def _print(text: str, style: str) -> None:
    Console(stderr=True).print(text, style=style, markup=False, highlight=False, soft_wrap=True)
