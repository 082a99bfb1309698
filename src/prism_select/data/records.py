"""Records: what a row means, whatever file it came from.

    Raw      a row of a file, as it came: where it stood, its text, its fields or what is wrong with it
    Example  turns of a conversation; its assistant turns are what the model learns to say
    Pair     two examples with one prompt: `chosen` is what the user wants, `rejected` what they don't

Choices made here: a prompt with a completion is a conversation of two turns; a bare text is one
turn with the role `text`, supervised from end to end and never put through a template."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Example", "Pair", "Raw", "Role", "Turn", "is_text"]

Role: TypeAlias = Literal["system", "user", "assistant", "tool", "text"]


@dataclass(frozen=True, slots=True)
class Raw:
    """A row as it came. `fields` is None exactly when `problem` says why it could not be read."""

    file: str
    line: int
    text: str
    fields: Mapping[str, object] | None
    problem: str | None = None

    def set_aside(self, reason: str) -> dict[str, object]:
        """As a line of quarantine.jsonl, or of what was skipped."""
        return {"file": self.file, "line": self.line, "reason": reason, "raw": self.text}


@dataclass(frozen=True, slots=True)
class Turn:
    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Example:
    """What is scored: log-likelihoods are taken over the tokens of the assistant (or text) turns.

    The first `prompt_turns` turns are context only, also where an assistant said them.
    """

    turns: tuple[Turn, ...]
    id: str
    source: str
    file: str
    line: int
    prompt_turns: int = 0

    @property
    def text(self) -> str:
        return "\n".join(turn.text for turn in self.turns)

    @property
    def conversation(self) -> bool:
        """Whether there is more in it than one prompt and one answer: then it takes a template to
        tell who speaks."""
        return len(self.turns) - self.prompt_turns > 1 or self.prompt_turns > 1


@dataclass(frozen=True, slots=True)
class Pair:
    chosen: Example
    rejected: Example

    @property
    def swapped(self) -> "Pair":
        """As a repair aims: at the unwanted answer."""
        return Pair(self.rejected, self.chosen)


def is_text(value: str) -> bool:
    """Whether it can be written down: a lone surrogate cannot."""
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)
