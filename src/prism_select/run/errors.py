"""Errors: everything that a user can mend, drawn as a tree.

    PrismError                   one line on stderr, exit code 2
    ├── BadOption                a value that is unknown, or contradicts another
    │   └── UnknownLayers        no weight of the model matches `--layers`
    ├── BadFile                  a file that cannot be used: file, line, what was found, what to do
    │   ├── BadRow               one row of a pool (quarantined) or of a target (stops)
    │   ├── EmptyInput           a pool or a target without a single usable row
    │   └── TooManyBadRows       more bad pool rows than `--max-bad` allows
    ├── BadModel                 no weights, no tokenizer, weights that cannot be loaded
    │   ├── MissingChatTemplate  conversations for a tokenizer that has no chat template
    │   └── Unreachable          an engine cannot reach a weight that has a direction
    ├── TooLarge                 a row that a device has no memory for
    ├── NotFinite                NaN or infinity where a number was due
    ├── EnginesDisagree          the fast engine fails its check against the definition
    ├── RunMismatch              a run folder that belongs to another command
    ├── PeerLost                 of several processes that score together, another one stopped
    └── DiskTrouble              no space left, or a folder that cannot be written

Choices made here: every message says what happened with the numbers, then what to try; the command
line alone catches them, once. Any other exception is a defect of ours: exit code 1.
"""

from collections.abc import Sequence
from typing import Any

__all__ = [
    "BadFile",
    "BadModel",
    "BadOption",
    "BadRow",
    "DiskTrouble",
    "EmptyInput",
    "EnginesDisagree",
    "MissingChatTemplate",
    "NotFinite",
    "PeerLost",
    "PrismError",
    "RunMismatch",
    "TooLarge",
    "TooManyBadRows",
    "UnknownLayers",
    "Unreachable",
    "out_of_memory",
]


class PrismError(Exception):
    """Root of the tree; its text is the one line that the user reads."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles an error whatever its constructor takes."""
        return _rebuilt, (type(self), self.args), self.__dict__


def _rebuilt(kind: type[PrismError], args: tuple[Any, ...]) -> PrismError:
    return kind.__new__(kind, *args)


class BadOption(PrismError):
    pass


class UnknownLayers(BadOption):
    def __init__(self, pattern: str, names: Sequence[str]) -> None:
        advice = "try all, late, last:N or another regular expression"
        if pattern == "adapter":
            advice = "an adapter counts where --adapter puts it on the model without merging it"
        super().__init__(
            f"--layers {pattern}: no weight matches; this model has {len(names)} weights, for "
            f"example {', '.join(names[:3])}; {advice}"
        )


class BadFile(PrismError):
    """`line` counts from 1, the index of an object from 0; None stands for the whole file."""

    def __init__(self, file: str, line: int | None, what: str, advice: str) -> None:
        self.file, self.line, self.what, self.advice = file, line, what, advice
        where = file if line is None else f"{file}:{line}"
        if file.startswith("memory:"):  # a Python object, whose rows have an index
            name = file.removeprefix("memory:")
            where = name if line is None else f"{name}[{line}]"
        super().__init__(f"{where}: {what}; {advice}")


class BadRow(BadFile):
    """`what` is also the reason that quarantine.jsonl gives."""


class EmptyInput(BadFile):
    pass


class TooManyBadRows(BadFile):
    pass


class BadModel(PrismError):
    pass


class MissingChatTemplate(BadModel):
    pass


class Unreachable(BadModel):
    """`names` are the weights that the engine could not reach."""

    def __init__(self, engine: str, names: Sequence[str], why: str) -> None:
        self.names = tuple(names)
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        super().__init__(
            f"engine {engine} cannot reach {shown}: {why}; "
            "try --engine difference, or leave these weights out with --layers"
        )


class TooLarge(PrismError):
    def __init__(self, what: str, device: str) -> None:
        super().__init__(
            f"{what} does not fit into the memory of {device}; start afresh with a smaller "
            "--max-length or --dtype bfloat16, and --overwrite or another --out"
        )


class NotFinite(PrismError):
    pass


class EnginesDisagree(PrismError):
    pass


class RunMismatch(PrismError):
    pass


class PeerLost(PrismError):
    pass


class DiskTrouble(PrismError):
    pass


def out_of_memory(error: BaseException) -> bool:
    """On whatever device: torch has a class of its own for every one but the CPU."""
    named = type(error).__name__ == "OutOfMemoryError"  # not imported: torch takes long
    return named or isinstance(error, MemoryError) or "can't allocate memory" in str(error)
