"""Terminal: what a run looks like while it goes on, and the table at its end.

Choices made here: everything a run tells goes to standard output, errors alone to standard error; a
bar where there is a terminal, a plain line every ten seconds where there is none; control
characters from files never reach the terminal. With --json standard output has the summary alone,
one JSON object, and all else goes to standard error; with --quiet the table at the end is all there
is. NO_COLOR is Rich's."""

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

from prism_select.run.progress import Silent, Task

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
        self.started = self.told = time.monotonic()
        self.rows = self.tokens = self.worked = 0

    def advance(self, rows: int, tokens: int = 0) -> None:
        self.rows, self.tokens = self.rows + rows, self.tokens + tokens
        self.worked += (
            rows if tokens else 0
        )  # what an earlier start has done took no time in this one
        if time.monotonic() - self.told > EVERY_SECONDS:
            self.tell()

    def tell(self) -> None:
        self.told = time.monotonic()
        seconds = self.told - self.started
        of = "" if self.total is None else f" of {self.total:,}"
        unit = " rows" if self.tokens or self.total is None else ""
        parts = [f"{self.rows:,}{of}{unit}"] * bool(self.rows)
        parts += [f"{self.tokens / seconds:,.0f} tokens/s"] * bool(self.tokens)
        if self.total and 0 < self.rows < self.total:
            parts.append(
                f"about {seconds * (self.total - self.rows) / (self.worked or self.rows):,.0f} s left"
            )
        line = f"{self.label}: {', '.join([*parts, f'{seconds:.0f} s so far'])}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Bar:
    def __init__(self, bars: Bars, label: str, total: int | None) -> None:
        self.bars, self.tokens, self.started = bars, 0, time.monotonic()
        self.id = bars.add_task(label, total=total, rate="")

    def advance(self, rows: int, tokens: int = 0) -> None:
        self.tokens += tokens
        rate = (
            f"{self.tokens / (time.monotonic() - self.started):,.0f} tokens/s"
            if self.tokens
            else ""
        )
        self.bars.update(self.id, advance=rows, rate=rate)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Who listened has left: the run goes on in silence."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Terminal:
    def __init__(self, json: bool = False, quiet: bool = False, silent: bool = False) -> None:
        console = _Console(stderr=json)
        plain = silent or not console.is_terminal
        self.console = _Console(color_system=None, stderr=json, quiet=silent) if plain else console
        self.json, self.quiet, self.silent = json, quiet, silent

    def say(self, line: str) -> None:
        if not self.quiet:
            self._line(line)

    def _line(self, line: str) -> None:
        self.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Task]:
        label = printable(label)
        if self.quiet:
            with Silent().task(label, total) as nothing:
                yield nothing
            return
        if not self.console.is_terminal:
            plain = _Plain(self.console, label, total)
            yield plain
            if time.monotonic() - plain.started > QUIET_SECONDS:
                plain.tell()
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
        self, told: Mapping[str, Any], rows: Mapping[str, str], red: Collection[str] = ()
    ) -> None:
        """The summary: `told` as JSON where that was asked for, else `rows` as a table."""
        if self.silent:
            return
        if self.json:
            from prism_select.run.folder import (
                finite,
            )  # pyarrow comes with it, and help goes without

            print(json.dumps(finite(told), ensure_ascii=True, default=str), file=sys.stdout)
        else:
            self.table(rows, red)

    def table(self, rows: Mapping[str, str], red: Collection[str] = ()) -> None:
        if not self.console.is_terminal:
            width = max(map(len, rows))
            for name, value in rows.items():
                self._line(f"{name:<{width}}  {value}")
            return
        table = Table.grid(padding=(0, 2))
        for name, value in rows.items():
            table.add_row(
                escape(name), escape(printable(value)), style="red" if name in red else None
            )
        self.console.print(table, highlight=False)
