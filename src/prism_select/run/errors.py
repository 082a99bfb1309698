"""Errors: everything a user can mend, as a tree.

    PrismError                   one line on stderr, exit code 2
    ├── BadOption                an unknown value, or two options that contradict
    │   └── UnknownLayers        no parameter of the model matches `--layers`
    ├── BadFile                  an unusable file: file, line, what was found, what to do
    │   ├── BadRow               one row of a pool (quarantined) or of a target (stops)
    │   ├── EmptyInput           a pool or a target without a single usable row
    │   └── TooManyBadRows       the share of bad rows exceeds `--max-bad`
    ├── BadModel                 missing weights or tokenizer, or unreadable weights
    │   ├── MissingChatTemplate  conversations, and a tokenizer without a chat template
    │   └── Unreachable          an engine cannot reach a parameter of the direction
    ├── TooLarge                 a row exceeds the memory of the device
    ├── NotFinite                a score or gradient is NaN or infinite
    ├── EnginesDisagree          the fast engine fails its check against the definition
    ├── RunMismatch              the run folder belongs to another configuration
    ├── PeerLost                 another process of a distributed run stopped
    └── DiskTrouble              no space left, or no permission to write

Choices made here:
- a message gives the facts with their numbers, then the remedy;
- only the command line catches these errors, once;
- any other exception is a defect of the program: exit code 1.
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
    """Root of the tree; its text is one line for the user."""

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
        if "://" not in file and file.startswith(
            "memory:"
        ):  # a Python object, whose rows have an index
            name = file.removeprefix("memory:")
            where = name if line is None else f"{name}[{line}]"
        super().__init__(f"{where}: {what}; {advice}")


class BadRow(BadFile):
    """`what` is also the reason in quarantine.jsonl."""


class EmptyInput(BadFile):
    pass


class TooManyBadRows(BadFile):
    pass


class BadModel(PrismError):
    pass


class MissingChatTemplate(BadModel):
    pass


class Unreachable(BadModel):
    """`names` are the unreachable parameters."""

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
    """Whether memory ran out on any device; torch has no class for the CPU."""
    named = type(error).__name__ == "OutOfMemoryError"  # not imported: torch takes long
    return named or isinstance(error, MemoryError) or "can't allocate memory" in str(error)
