"""What the command line prints: results to standard output, everything else to standard error."""

from __future__ import annotations

import sys
import unicodedata
from typing import IO, Any, NoReturn

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from imagefarm.client import Farm
from shared.errors import FarmError

#: columns where the output is no terminal, so that ids are not folded
_PIPE_WIDTH = 200
#: characters that turn the direction of a line
_TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
#: columns whose text stays whole: what people copy into the next command, and single words
_NAMING = frozenset({"batch", "job", "key", "state", "done"})

# what others wrote is shown as it is: "[/red]" or ":heart:" in a prompt, a name or an error is no markup
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}

err = Console(stderr=True, **_PLAIN)


def say(text: str, style: str = "") -> None:
    """Tell a person something."""
    err.print(Text(printable(text), style=style), soft_wrap=True)


def printable(text: str) -> str:
    """A text without what a terminal would obey, such as escape sequences in somebody's prompt."""
    return "".join(sign if sign == "\n" or not _is_obeyed(sign) else "�" for sign in text)


def _is_obeyed(sign: str) -> bool:
    return unicodedata.category(sign) in {"Cc", "Cs"} or sign in _TURNS


def show(table: Table) -> None:
    """Print a table to standard output."""
    console = Console(**_PLAIN)
    if not console.is_terminal:
        console = Console(width=_PIPE_WIDTH, **_PLAIN)
    console.print(table)


class _PlainTable(Table):
    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(printable(cell) if isinstance(cell, str) else cell for cell in cells), **options)


def plain_table(*headings: str) -> Table:
    """A table without frames, whose text cells are shown as they are."""
    table = _PlainTable(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        # an id that is folded cannot be copied
        table.add_column(heading, overflow="fold", no_wrap=heading in _NAMING)
    return table


class Refusal(click.ClickException):
    """An error as one readable red text; exit code 1."""

    def show(self, file: IO[Any] | None = None) -> None:
        err.print(Text("error: " + printable(self.message), style="bold red"), soft_wrap=True)


def told(error: FarmError) -> str:
    """What happened, with what the database itself said of it: who types commands on a farm's machine may know."""
    said = str(getattr(error.__cause__, "orig", None) or "").strip()
    return f"{error.detail} ({said})" if said and said not in error.detail else error.detail


class FarmGroup(click.Group):
    """A command group whose commands may raise our errors, and end quietly on Ctrl-C."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FarmError as error:
            raise Refusal(told(error)) from error
        except BrokenPipeError:
            raise  # click ends quietly
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise Refusal(f"{where}{error.strerror or error}") from error
        except KeyboardInterrupt:
            interrupted()


def interrupted() -> NoReturn:
    """End as a program does that was stopped with Ctrl-C."""
    print(file=sys.stderr)
    raise click.exceptions.Exit(130)


def open_farm() -> Farm:
    """The farm that the environment or the data folder names."""
    return Farm()


def duration(seconds: float) -> str:
    """`3.2 s`, `4 min 05 s`, `2 h 03 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
