"""Terminal: progress while a command runs, and the table at its end.

    normal    progress and table on standard output, errors on standard error
    --json    one JSON object on standard output, progress on standard error

Choices made here:
- a terminal gets a bar, a file or pipe a line every ten seconds;
- control characters of files never reach the terminal;
- Rich reads NO_COLOR.
"""

import json
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table

from prism_select.run.progress import Task

__all__ = ["Terminal", "printable"]

QUIET_SECONDS, EVERY_SECONDS = 2.0, 10.0


def printable(text: str) -> str:
    """One line without control characters."""
    return "".join(
        letter if letter.isprintable() else " " if letter in "\n\r\t" else "�" for letter in text
    )


class _Plain:
    def __init__(self, console: Console, label: str, total: int | None) -> None:
        self.console, self.label, self.total = console, label, total
        self.started = self.printed = time.monotonic()
        self.rows = self.tokens = self.worked = 0
        self.shown = -1  # rows, in the last line

    def advance(self, rows: int, tokens: int = 0) -> None:
        self.rows, self.tokens = self.rows + rows, self.tokens + tokens
        # rows of an earlier start come without tokens: they took no time in this one
        self.worked += rows if tokens else 0
        if time.monotonic() - self.printed > EVERY_SECONDS:
            self.print()

    def print(self) -> None:
        self.printed, self.shown = time.monotonic(), self.rows
        seconds = self.printed - self.started
        figures = []
        if self.rows:
            of = "" if self.total is None else f" of {self.total:,}"
            unit = " rows" if self.tokens or self.total is None else ""
            figures.append(f"{self.rows:,}{of}{unit}")
        if self.tokens:
            figures.append(f"{self.tokens / seconds:,.0f} tokens/s")
        if self.total and 0 < self.rows < self.total:
            remaining = seconds * (self.total - self.rows) / (self.worked or self.rows)
            figures.append(f"about {remaining:,.0f} s left")
        line = ", ".join([*figures, f"{seconds:.0f} s so far"])
        self.console.print(f"{self.label}: {line}", markup=False, highlight=False, soft_wrap=True)


class _Bar:
    def __init__(self, bars: Bars, label: str, total: int | None) -> None:
        self.bars, self.tokens, self.started = bars, 0, time.monotonic()
        self.id = bars.add_task(label, total=total, rate="")

    def advance(self, rows: int, tokens: int = 0) -> None:
        self.tokens += tokens
        per_second = self.tokens / (time.monotonic() - self.started)
        rate = f"{per_second:,.0f} tokens/s" if self.tokens else ""
        self.bars.update(self.id, advance=rows, rate=rate)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """The reader of the pipe has ended: the run goes on in silence."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Terminal:
    def __init__(self, json: bool = False, silent: bool = False) -> None:
        console = _Console(stderr=json)
        plain = silent or not console.is_terminal
        self.console = _Console(color_system=None, stderr=json, quiet=silent) if plain else console
        self.json, self.silent = json, silent

    def say(self, line: str) -> None:
        self.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Task]:
        label = printable(label)
        if not self.console.is_terminal:
            plain = _Plain(self.console, label, total)
            yield plain
            if time.monotonic() - plain.started > QUIET_SECONDS and plain.shown < plain.rows:
                plain.print()
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=self.console, transient=True) as bars:
            yield _Bar(bars, label, total)

    def end(
        self, values: Mapping[str, Any], rows: Mapping[str, str], red: Collection[str] = ()
    ) -> None:
        """Prints the summary: with --json the `values`, else a table of `rows`."""
        if self.silent:
            return
        if self.json:
            from prism_select.run.folder import finite  # imports pyarrow; --help does without

            print(json.dumps(finite(values), ensure_ascii=True, default=str), file=sys.stdout)
        else:
            self.table(rows, red)

    def table(self, rows: Mapping[str, str], red: Collection[str] = ()) -> None:
        if not self.console.is_terminal:
            width = max(map(len, rows))
            for name, value in rows.items():
                self.say(f"{name:<{width}}  {value}")
            return
        table = Table.grid(padding=(0, 2))
        for name, value in rows.items():
            table.add_row(
                escape(name), escape(printable(value)), style="red" if name in red else None
            )
        self.console.print(table, highlight=False)
