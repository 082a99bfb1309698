"""Records: what a row means, whatever file it came from.

    Raw      a row of a file as it came: file and line, text, fields or what is wrong with it
    Example  turns of a conversation, of which the answers are supervised
    Pair     two examples with one prompt: `chosen` is wanted, `rejected` is not

Choices made here:
- a prompt with a completion is a conversation of two turns;
- a bare text is one turn with the role `text`: supervised from end to end, without a template.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Example", "Pair", "Raw", "Role", "Turn", "is_text"]

Role: TypeAlias = Literal["system", "user", "assistant", "tool", "text"]


@dataclass(frozen=True, slots=True)
class Raw:
    """A row as it came. `fields` is None exactly when `problem` says why it cannot be read."""

    file: str
    line: int
    text: str
    fields: Mapping[str, object] | None
    problem: str | None = None

    def quarantined(self, reason: str) -> dict[str, object]:
        """The row as a line of quarantine.jsonl."""
        return {"file": self.file, "line": self.line, "reason": reason, "raw": self.text}


@dataclass(frozen=True, slots=True)
class Turn:
    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation. Its assistant (or text) turns are supervised, except among the first
    `prompt_turns`, which are context. A chat template may show the model its `tools`."""

    turns: tuple[Turn, ...]
    id: str
    source: str
    file: str
    line: int
    prompt_turns: int = 0
    tools: tuple[Mapping[str, object], ...] = ()

    @property
    def prompt(self) -> tuple[Turn, ...]:
        return self.turns[: self.prompt_turns]

    @property
    def answer(self) -> tuple[Turn, ...]:
        return self.turns[self.prompt_turns :]

    @property
    def text(self) -> str:
        return "\n".join(turn.text for turn in self.turns)

    @property
    def conversation(self) -> bool:
        """Whether it has more than one prompt and one answer, so that only a chat template shows
        who speaks."""
        return len(self.turns) - self.prompt_turns > 1 or self.prompt_turns > 1


@dataclass(frozen=True, slots=True)
class Pair:
    chosen: Example
    rejected: Example

    @property
    def swapped(self) -> "Pair":
        """The pair that `repair` uses: it aims at the rejected answer."""
        return Pair(self.rejected, self.chosen)


def is_text(value: str) -> bool:
    """Whether it can be encoded: a lone surrogate cannot."""
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)
