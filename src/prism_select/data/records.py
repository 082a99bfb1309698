"""Records: what a row means, whatever file it came from.

    Raw      a row of a file as it came: file and line, text, fields or what is wrong with it
    Example  turns of a conversation, of which the answers are supervised
    Pair     two examples with one prompt: `chosen` is wanted, `rejected` is not

Choices made here:
- a prompt with a completion is a conversation of two turns;
- a bare text is one turn with the role `text`: supervised from end to end, without a template.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

__all__ = ["BESIDE", "THOUGHTS", "Example", "Pair", "Raw", "Role", "Turn", "any_alone", "is_text"]

Role: TypeAlias = Literal["system", "user", "assistant", "tool", "text"]

THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of a thought beside the content
BESIDE = (*THOUGHTS, "tool_calls", "tool_call_id", "name")


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
    """A message. `beside` is the JSON object of what it says beside role and content: the keys of
    BESIDE. An assistant's turn is not supervised where its message says so."""

    role: Role
    text: str
    beside: str = ""
    supervised: bool = True

    @property
    def message(self) -> dict[str, Any]:
        """As a chat template takes it."""
        return {"role": self.role, "content": self.text, **self._extras}

    @property
    def shown(self) -> str:
        """All that it says: a thought or a call beside its text, too."""
        return "\n".join(filter(None, (self.text, self.beside))) if self.beside else self.text

    @property
    def thought(self) -> str:
        """The reasoning that a message carries beside its content."""
        return next((str(self._extras[key]) for key in THOUGHTS if key in self._extras), "")

    @property
    def calls(self) -> Sequence[Mapping[str, Any]]:
        """The tools that it calls."""
        return list(self._extras.get("tool_calls", ()))

    @property
    def is_blank(self) -> bool:
        """Whether it says nothing at all."""
        return not (self.text.strip() or self.thought.strip() or self.calls)

    @property
    def _extras(self) -> Mapping[str, Any]:
        return json.loads(self.beside) if self.beside else {}


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
    def supervised_turns(self) -> list[int]:
        """The indices of the turns that are supervised."""
        return [
            index
            for index, turn in enumerate(self.turns)
            if turn.role in ("assistant", "text") and turn.supervised and index >= self.prompt_turns
        ]

    @property
    def text(self) -> str:
        """All that its turns say."""
        return "\n".join(turn.shown for turn in self.turns)

    @property
    def conversation(self) -> bool:
        """Whether it has more than one prompt and one answer, so that only a chat template shows
        who speaks."""
        return len(self.turns) - self.prompt_turns > 1 or self.prompt_turns > 1


@dataclass(frozen=True, slots=True)
class Pair:
    """`repeated`: both answers began with the prompt again, which is cut off. `alone`: the side of
    the only answer, which then stands on the other side as well and counts nothing there."""

    chosen: Example
    rejected: Example
    repeated: bool = False
    alone: Literal["", "chosen", "rejected"] = ""

    @property
    def swapped(self) -> "Pair":
        """The pair that `repair` uses: it aims at the rejected answer."""
        other: dict[str, Literal["", "chosen", "rejected"]]
        other = {"chosen": "rejected", "rejected": "chosen"}
        return Pair(self.rejected, self.chosen, self.repeated, other.get(self.alone, ""))


def any_alone(targets: Mapping[str, Sequence[Pair]]) -> bool:
    """Whether a target has an answer without a rejected one."""
    return any(pair.alone for pairs in targets.values() for pair in pairs)


def is_text(value: str) -> bool:
    """Whether it can be encoded: a lone surrogate cannot."""
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)
