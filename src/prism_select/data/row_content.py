"""Row content: the fields of one row as texts, turns, examples and pairs.

    RowContent(raw, mapping).turns("prompt", "user") → (Turn("user", "1 + 1?"),)

Choices made here:
- whatever cannot be read is a BadRow with the field's name and the type of its value;
- texts are kept to the letter: spaces are stripped only to find out what is empty or equal;
- an answer that repeats the prompt (a whole conversation as `chosen`) starts after it; as text,
  where both answers of a pair do;
- answers in `history` are supervised in a pool, since trainers that know this column learn them;
- a row with images is bad: its text alone is another row.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

from prism_select.data.fields import (
    Names,
    columns_of,
    is_blank,
    is_empty,
    name_in,
    standard_fields,
    without_nulls,
)
from prism_select.data.files import is_table, names_of
from prism_select.data.messages import BadMessage, turn_of, type_in_words
from prism_select.data.records import Example, Pair, Raw, Role, Turn, is_text
from prism_select.run.errors import BadRow

__all__ = ["CONTEXT", "MEDIA", "RENAME_ADVICE", "RowContent", "Turns", "stripped"]

Turns: TypeAlias = tuple[Turn, ...]

CONTEXT = ("system", "history", "tools")  # fields of any format but a bare text
MEDIA = ("images", "videos", "audios")
RENAME_ADVICE = (
    "name its columns with --fields, for example --fields prompt=question,completion=response"
)
_MEND_ADVICE = "mend the row or remove it"


class RowContent:
    """One row under standard names. Every method raises BadRow for what it cannot read."""

    def __init__(self, raw: Raw, mapping: Names) -> None:
        self._raw, self._mapping = raw, mapping
        if raw.fields is None:
            raise self.bad(raw.problem or "the row could not be read")
        self._fields = standard_fields(raw.fields, mapping)
        if not self._fields.keys().isdisjoint(MEDIA):
            self._refuse_media()

    def bad(self, what: str, advice: str = _MEND_ADVICE) -> BadRow:
        return BadRow(self._raw.file, self._raw.line, what, advice)

    def label(self, name: str) -> str:
        """The field as messages call it: with its column, if that has another name."""
        columns = self._mapping.get(name, (name,))
        column = columns_of(self._raw.fields or {}, self._mapping).get(name, columns[0])
        return name if column == name else f"{name} (column {column!r})"

    def value(self, name: str) -> object:
        if name not in self._fields:
            raise self.bad(
                f"missing field: {self.label(name)}", f"add it, remove the row, or {RENAME_ADVICE}"
            )
        return self._fields[name]

    def string(self, value: object, label: str) -> str:
        if not isinstance(value, str):
            raise self.bad(f"{label}: {type_in_words(value)} where text was expected")
        if not is_text(value):
            raise self.bad(f"{label}: not valid text: lone surrogate")
        return value

    def text(self, name: str) -> str:
        return self.string(self.value(name), self.label(name))

    def name(self, name: str, default: str) -> str:
        """An id or a source: text or a whole number, as text."""
        value = self._fields.get(name)
        if is_empty(value):
            return default
        text = name_in(value)
        text = self.string(value if text is None else text, self.label(name))
        return text if text.strip() else default

    def turns(self, name: str, role: Role) -> Turns:
        """One turn of `role` for a text; the turns of a message or of a list of messages."""
        value, label = self.value(name), self.label(name)
        if isinstance(value, str):
            return (Turn(role, self.string(value, label)),)
        if not isinstance(value, list | Mapping):
            raise self.bad(
                f"{label}: {type_in_words(value)} where text or a list of messages was expected"
            )
        return self._messages([value] if isinstance(value, Mapping) else value, label)

    def conversation(self, name: str) -> Turns:
        return self._messages(self.value(name), self.label(name))

    def _messages(self, value: object, label: str) -> Turns:
        if not isinstance(value, list):
            raise self.bad(f"{label}: {type_in_words(value)} where a list of messages was expected")
        if not value:
            raise self.bad(f"{label}: an empty list where messages were expected")
        return tuple(
            self._message(message, f"{label}[{index}]") for index, message in enumerate(value)
        )

    def _message(self, value: object, label: str) -> Turn:
        try:
            return turn_of(value, lambda: is_table(self._raw.file))
        except BadMessage as problem:
            raise self.bad(label + problem.what, problem.advice) from None

    def instruction(self) -> Turns:
        """The fields instruction and input as one user turn."""
        context = "" if is_empty(self._fields.get("input")) else self.text("input")
        texts = (text for text in (self.text("instruction"), context) if text.strip())
        return (Turn("user", "\n\n".join(texts)),)

    def bare_text(self) -> Turns:
        return self.supervised((Turn("text", self.text("text")),), "text")

    def answer(self, name: str) -> Turns:
        return self.supervised(self.turns(name, "assistant"), name)

    def supervised(self, turns: Turns, name: str) -> Turns:
        """The turns themselves. Raises BadRow if there is no text in them to be supervised."""
        answers = [turn for turn in turns if turn.role in ("assistant", "text")]
        if turns and not answers:
            raise self.bad(f"nothing is supervised: no assistant turn in {self.label(name)}")
        if answers and not any(turn.supervised for turn in answers):
            what = f"no answer in {self.label(name)} counts, by their own weight or train"
            raise self.bad(f"nothing is supervised: {what}")
        if all(turn.is_blank for turn in answers if turn.supervised):
            raise self.bad(f"empty {self.label(name)}")
        return turns

    def in_context(self, example: Example, answers: bool) -> Example:
        """The example with its tools, and after the turns of the fields `system` and `history`.
        With `answers`, those of the history are supervised."""
        if self._fields.keys().isdisjoint(CONTEXT):
            return example
        system, history, tools = self._system(), self._history(), self._tools()
        opening = example.turns[: example.turns[0].role == "system"]
        if opening and system and stripped(opening) != stripped(system):
            what = "the conversation begins with another system message"
            raise self.bad(f"{self.label('system')}: {what}", "leave one of them out")
        prompt = example.turns[len(opening) : example.prompt_turns]
        start = (*(opening or system), *history, *prompt)
        prompt_turns = len(start) if example.prompt_turns else 0
        if history and answers:
            context = (replace(turn, supervised=False) for turn in prompt)
            start, prompt_turns = (*(opening or system), *history, *context), 0
        turns = start + example.turns[max(len(opening), example.prompt_turns) :]
        return replace(example, turns=turns, prompt_turns=prompt_turns, tools=tools)

    def _system(self) -> Turns:
        if is_blank(self._fields.get("system")):
            return ()
        turns = self.turns("system", "system")
        if any(turn.role != "system" for turn in turns):
            raise self.bad(f"{self.label('system')}: a message of another role")
        return turns

    def _history(self) -> Turns:
        """Earlier turns: pairs of a question and its answer, or messages."""
        value, label, turns = self._parsed("history"), self.label("history"), list[Turn]()
        if not isinstance(value, list):
            raise self.bad(f"{label}: {type_in_words(value)} where a list of pairs was expected")
        for index, entry in enumerate(value):
            name = f"{label}[{index}]"
            if isinstance(entry, Mapping):
                turns.append(self._message(entry, name))
                continue
            if not isinstance(entry, list | tuple) or len(entry) != 2:
                raise self.bad(f"{name}: not a question and its answer")
            texts = ["" if is_empty(text) else self.string(text, name) for text in entry]
            if any(map(str.strip, texts)):
                if not texts[1].strip():
                    raise self.bad(f"{name}: an empty answer")
                turns += [Turn("user", texts[0]), Turn("assistant", texts[1])]
        return tuple(turns)

    def _tools(self) -> tuple[Mapping[str, object], ...]:
        """The tools that a chat template may show, each as the object that describes it."""
        value, label = self._parsed("tools"), self.label("tools")
        entries = value if isinstance(value, list) else [value]
        filled = bool(entries) and is_table(self._raw.file)  # with null, where a tool lacks a key
        tools = list[Mapping[str, object]]()
        for entry in entries:
            tool = self._from_json(entry, label)
            if not isinstance(tool, Mapping):
                what = f"{type_in_words(tool)} where a list of tools was expected, each an object"
                raise self.bad(f"{label}: {what}")
            tool = without_nulls(tool) if filled else tool
            if not _is_json(tool):
                raise self.bad(f"{label}: what cannot be written as JSON")
            tools.append(tool)
        return tuple(tools)

    def _parsed(self, name: str) -> object:
        """The value of a field, which may also be the JSON text of it; an empty list where nothing
        stands there."""
        value = self._from_json(self._fields.get(name), self.label(name))
        return [] if is_blank(value) else value

    def _from_json(self, value: object, label: str) -> object:
        if not isinstance(value, str) or is_blank(value):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise self.bad(f"{label}: text that is no JSON") from None

    def _refuse_media(self) -> None:
        for name in MEDIA:
            value = self._fields.get(name)
            if not is_blank(value):
                count = len(value) if isinstance(value, list) else 1
                what = f"{count} that a model of text cannot see"
                raise self.bad(f"{self.label(name)}: {what}", "leave such rows out of the file")

    def example(self, prompt: Turns, answer: Turns) -> Example:
        raw, (name, stem) = self._raw, names_of(self._raw.file)
        identity, source = self.name("id", f"{name}:{raw.line}"), self.name("source", stem)
        if answer[0].role != "assistant":  # the answer may be the whole conversation
            for end in range(len(prompt), len(answer)) if prompt else ():
                if stripped(answer[end - len(prompt) : end]) == stripped(prompt):
                    prompt, answer = answer[:end], self.supervised(answer[end:], "answer")
                    break
        return Example(prompt + answer, identity, source, raw.file, raw.line, len(prompt))

    def pair(self, prompt: Turns, chosen: Turns, rejected: Turns) -> Pair:
        if stripped(chosen) == stripped(rejected):
            raise self.bad(
                "chosen is equal to rejected",
                "a pair must show a difference; mend the row or remove it",
            )
        answers = [without_prompt(prompt, answer) for answer in (chosen, rejected)]
        repeated = all(answers)
        if repeated:
            chosen, rejected = answers
        pair = Pair(self.example(prompt, chosen), self.example(prompt, rejected), repeated)
        if pair.chosen.prompt != pair.rejected.prompt:
            raise self.bad("chosen and rejected answer different prompts")
        return pair


def _is_json(value: object) -> bool:
    try:
        return is_text(json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError):
        return False


def without_prompt(prompt: Turns, answer: Turns) -> Turns:
    """An answer without the text of its prompt, where it begins with it; else none. A prompt of one
    word may begin an answer by chance."""
    if len(prompt) != 1 or len(answer) != 1 or len(prompt[0].text.split()) < 2:
        return ()
    asked, text = prompt[0].text.strip(), answer[0].text.lstrip()
    remainder = text[len(asked) :]
    word = re.match(r"\w\w", asked[-1:] + remainder[:1])
    if not text.startswith(asked) or not remainder.strip() or word:
        return ()
    return (replace(answer[0], text=remainder),)


def stripped(turns: Turns) -> list[tuple[Role, str, str]]:
    return [(turn.role, turn.text.strip(), turn.beside) for turn in turns]
