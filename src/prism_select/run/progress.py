"""Progress: what the steps report while they run. They never print; the command line decides what
is shown."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["Progress", "Silent", "Task"]


class Task(Protocol):
    def advance(self, rows: int, tokens: int = 0) -> None: ...


class Progress(Protocol):
    def say(self, line: str) -> None:
        """One line that the user should read: a choice that was made, or a warning."""

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Task]:
        """A step that may take long; `total` rows, or None where that is not known."""
        ...


class _Nothing:
    def advance(self, rows: int, tokens: int = 0) -> None:
        pass


class Silent:
    """For use from Python."""

    def say(self, line: str) -> None:
        pass

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Task]:
        yield _Nothing()
