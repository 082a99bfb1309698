"""Progress: the steps of a run report it, and the command line shows it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["Progress", "Silent", "Task"]


class Task(Protocol):
    def advance(self, rows: int, tokens: int = 0) -> None: ...


class Progress(Protocol):
    def say(self, line: str) -> None:
        """Reports a choice or a warning to the user, in one line."""

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Task]:
        """A long step; `total` counts its rows, None if unknown."""
        ...


class _Nothing:
    def advance(self, rows: int, tokens: int = 0) -> None:
        pass


class Silent:
    """Shows nothing: for use from Python."""

    def say(self, line: str) -> None:
        pass

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Task]:
        yield _Nothing()
