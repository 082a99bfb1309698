"""Formats: what the fields of a row mean.

    pool row   → Example   a conversation and what is supervised in it
    target row → Pairs     one prompt, an answer that is wanted and one that is not

A format is called by the fields that it needs: `prompt+completion` needs `prompt` and `completion`.

Choices made here: the first format of a list whose fields are all there is taken, so the more
specific ones stand first. In a conversation every assistant turn is supervised; where prompt and
answer come apart, only the answer is. An answer that repeats the prompt (a whole conversation as
`chosen`) is cut after it. Texts are kept to the letter: space is stripped only to find out what is
empty or equal."""

import os.path
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice, takewhile
from typing import NoReturn, TypeAlias

from prism_select.data.fields import Fields, Names, columns_of, standard_fields
from prism_select.data.records import Example, Pair, Raw, Role, Turn, is_text
from prism_select.run.errors import BadOption, BadRow

__all__ = [
    "Format",
    "detect_pool",
    "detect_target",
    "parse_fields",
    "to_example",
    "to_pairs",
    "unused",
]

_Turns: TypeAlias = tuple[Turn, ...]


_Answered: TypeAlias = tuple[_Turns, _Turns]  # prompt, answer


_Compared: TypeAlias = tuple[_Turns, _Turns, _Turns]  # prompt, chosen, rejected


_MEND = "mend the row or remove it"


_RENAME = "name its columns with --fields, for example --fields prompt=question,completion=response"


_ENDINGS = re.compile(r"\.(?:(?:jsonl|json|csv)(?:\.(?:gz|zst))?|parquet)$", re.IGNORECASE)


_HH_MARKER = "\n\nAssistant:"


_KINDS = {
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
    list: "a list",
}


_ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}


@dataclass(frozen=True, slots=True)
class Format:
    """Its name is the fields that it needs, joined by plus signs."""

    name: str


def detect_pool(
    fields: Fields, mapping: Names, file: str = "row", line: int | None = None
) -> Format:
    """The format of a pool row; raises BadRow, at `file` and `line`, when none fits."""
    return _detect(standard_fields(fields, mapping), _POOL) or _unknown(
        fields, mapping, _POOL, file, line
    )


def detect_target(
    fields: Fields, mapping: Names, file: str = "row", line: int | None = None
) -> Format:
    """The format of a target row; raises BadRow, at `file` and `line`, when none fits, or when
    answers are there whose prompt may stand in a column that `mapping` does not name."""
    format = _detect(standard_fields(fields, mapping), _TARGET) or _unknown(
        fields, mapping, _TARGET, file, line
    )
    lacking = _lacking(fields, mapping, ("prompt", "instruction", "question"))
    if format.name == "chosen+rejected" and lacking and (others := unused(fields, mapping, format)):
        name, what = lacking
        advice = f"name this file's own column as well: --fields {name}={mapping[name][0]},{name}={others[0]},…"
        raise BadRow(file, line, f"{what}; not used are {', '.join(others)}", advice)
    return format


def _lacking(fields: Fields, mapping: Names, names: Iterable[str]) -> tuple[str, str] | None:
    """The first of `names` that is mapped to columns of which this row has none, and that in
    words."""
    there = columns_of(fields, mapping)
    name = next((name for name in names if name in mapping and name not in there), None)
    return (name, f"no column {' or '.join(map(repr, mapping[name]))} for {name}") if name else None


def unused(fields: Fields, mapping: Names, format: Format) -> list[str]:
    """The columns of a target row that its format does not ask for."""
    asked = {*format.name.split("+"), "id", "source", "input", "answerKey"}
    return [name for name in standard_fields(fields, mapping) if name not in asked]


def _detect(named: Fields, formats: Iterable[str]) -> Format | None:
    filled = {name for name, value in named.items() if value is not None}
    for there in (
        filled,
        named.keys(),
    ):  # a table has every row's columns: null where a row does not use them
        for name in formats:
            if there >= set(name.split("+")):
                return Format(name)
    return None


def _unknown(
    fields: Fields, mapping: Names, formats: Iterable[str], file: str, line: int | None
) -> NoReturn:
    found = ", ".join(map(reprlib.repr, islice(fields, 12))) or "none"
    if lacking := _lacking(fields, mapping, "+".join(formats).split("+")):
        name, what = lacking
        near = get_close_matches(mapping[name][0], fields, 1) or ["its own column"]
        raise BadRow(
            file,
            line,
            f"{what}; the fields are {found}",
            f"check --fields: {name}={near[0]}, perhaps",
        )
    advice = (
        _RENAME
        if "text" in formats
        else _RENAME.replace("completion=response", "chosen=good,rejected=bad")
    )
    raise BadRow(
        file,
        line,
        f"no known format: the fields are {found}; known are {', '.join(formats)}",
        advice,
    )


def parse_fields(text: str | None) -> dict[str, tuple[str, ...]]:
    """`prompt=ask,prompt=question,id=key` → {"prompt": ("ask", "question"), "id": ("key",)}."""
    known = sorted(
        {"id", "source", "input", "weak"}.union(*(name.split("+") for name in (*_POOL, *_TARGET)))
    )
    mapping: dict[str, tuple[str, ...]] = {}
    for part in filter(str.strip, (text or "").split(",")):
        name, _, column = (side.strip() for side in part.partition("="))
        if not name or not column:
            raise BadOption(
                f"--fields {text}: {part.strip()!r} is not NAME=COLUMN; write prompt=question"
            )
        if name not in known:
            raise BadOption(
                f"--fields {text}: {name!r} is no field of a format; known are {', '.join(known)}"
            )
        if column in mapping.get(name, ()):
            raise BadOption(f"--fields {text}: {part.strip()} is given twice; keep one")
        mapping[name] = (*mapping.get(name, ()), column)
    return mapping


def to_example(raw: Raw, format: Format, mapping: Names) -> Example:
    """What a pool row says; raises BadRow where it says nothing that can be scored."""
    row = _Row(raw, mapping)
    return row.example(*_POOL[format.name](row))


def to_pairs(raw: Raw, format: Format, mapping: Names) -> list[Pair]:
    """The pairs of a target row: one, or one for every wrong choice. Raises BadRow where there is
    none.

    All pairs of a row carry its id.
    """
    row = _Row(raw, mapping)
    return [row.pair(*parts) for parts in _TARGET[format.name](row)]


class _Row:
    """One row under standard names. What cannot be read from it is raised as a BadRow."""

    def __init__(self, raw: Raw, mapping: Names) -> None:
        self._raw, self._mapping = raw, mapping
        if raw.fields is None:
            raise self.bad(raw.problem or "the row could not be read")
        self._fields = standard_fields(raw.fields, mapping)

    def bad(self, what: str, advice: str = _MEND) -> BadRow:
        return BadRow(self._raw.file, self._raw.line, what, advice)

    def label(self, name: str) -> str:
        columns = self._mapping.get(name, (name,))
        column = columns_of(self._raw.fields or {}, self._mapping).get(name, columns[0])
        return name if column == name else f"{name} (column {column!r})"

    def value(self, name: str) -> object:
        if name not in self._fields:
            raise self.bad(
                f"missing field: {self.label(name)}", f"add it, remove the row, or {_RENAME}"
            )
        return self._fields[name]

    def string(self, value: object, where: str) -> str:
        if not isinstance(value, str):
            raise self.bad(f"{where}: {_kind(value)} where text was expected")
        if not is_text(value):
            raise self.bad(f"{where}: not valid text: lone surrogate")
        return value

    def text(self, name: str) -> str:
        return self.string(self.value(name), self.label(name))

    def name(self, name: str, otherwise: str) -> str:
        """An id or a source: text or a whole number, as text."""
        value = self._fields.get(name)
        if value is None:
            return otherwise
        text = str(value) if type(value) is int else self.string(value, self.label(name))
        return text if text.strip() else otherwise

    def turns(self, name: str, role: Role) -> _Turns:
        """Text, which is one turn of `role`; a message; or a list of messages."""
        value, label = self.value(name), self.label(name)
        if isinstance(value, str):
            return (Turn(role, self.string(value, label)),)
        if not isinstance(value, list | Mapping):
            raise self.bad(f"{label}: {_kind(value)} where text or a list of messages was expected")
        return self.messages([value] if isinstance(value, Mapping) else value, label)

    def messages(self, value: object, label: str) -> _Turns:
        if not isinstance(value, list):
            raise self.bad(f"{label}: {_kind(value)} where a list of messages was expected")
        if not value:
            raise self.bad(f"{label}: an empty list where messages were expected")
        return tuple(
            self.message(message, f"{label}[{place}]") for place, message in enumerate(value)
        )

    def message(self, value: object, where: str) -> Turn:
        if not isinstance(value, Mapping):
            raise self.bad(f"{where}: {_kind(value)} where a message was expected")
        named = {key: content for key, content in value.items() if content is not None}
        role = named.get("role", named.get("from"))
        if not isinstance(role, str) or role not in _ROLES:
            what = "no role" if role is None else f"unknown role {reprlib.repr(role)}"
            raise self.bad(f"{where}: {what}", f"use one of {', '.join(_ROLES)}")
        if named.get("tool_calls") or named.get("function_call"):
            raise self.bad(
                f"{where}: a tool call, which is not text",
                "write the call into the content, as text",
            )
        content = named.get("content", named.get("value"))
        if not isinstance(content, list):
            return Turn(_ROLES[role], self.string(content, f"{where} content"))
        parts = [part if isinstance(part, Mapping) else {"type": _kind(part)} for part in content]
        other = [part.get("type") for part in parts if part.get("type") != "text"]
        if other:
            raise self.bad(
                f"{where} content: a part of type {reprlib.repr(other[0])} where text was expected"
            )
        return Turn(
            _ROLES[role],
            "".join(self.string(part.get("text"), f"{where} content") for part in parts),
        )

    def conversation(self, name: str) -> _Turns:
        return self.messages(self.value(name), self.label(name))

    def instruction(self) -> _Turns:
        given = self.text("input") if self._fields.get("input") is not None else ""
        return (
            Turn(
                "user",
                "\n\n".join(part for part in (self.text("instruction"), given) if part.strip()),
            ),
        )

    def bare(self) -> _Turns:
        return self.spoken((Turn("text", self.text("text")),), "text")

    def answer(self, name: str) -> _Turns:
        return self.spoken(self.turns(name, "assistant"), name)

    def spoken(self, turns: _Turns, name: str) -> _Turns:
        """The turns, if there is something in them for a model to learn to say."""
        said = [turn.text for turn in turns if turn.role in ("assistant", "text")]
        if turns and not said:
            raise self.bad(f"nothing is supervised: no assistant turn in {self.label(name)}")
        if not any(text.strip() for text in said):
            raise self.bad(f"empty {self.label(name)}")
        return turns

    def example(self, prompt: _Turns, answer: _Turns) -> Example:
        raw, name = self._raw, os.path.basename(self._raw.file.removeprefix("hub:").rstrip("/"))
        stem = name.partition(":")[0] if raw.file.startswith("hub:") else _ENDINGS.sub("", name)
        identity, source = self.name("id", f"{name}:{raw.line}"), self.name("source", stem)
        if (
            answer[0].role != "assistant"
        ):  # the answer may be the whole conversation, prompt included
            for cut in range(len(prompt), len(answer)) if prompt else ():
                if _stripped(answer[cut - len(prompt) : cut]) == _stripped(prompt):
                    prompt, answer = answer[:cut], self.spoken(answer[cut:], "answer")
                    break
        return Example(prompt + answer, identity, source, raw.file, raw.line, len(prompt))

    def pair(self, prompt: _Turns, chosen: _Turns, rejected: _Turns) -> Pair:
        if _stripped(chosen) == _stripped(rejected):
            raise self.bad(
                "chosen is equal to rejected",
                "a pair must show a difference; mend the row or remove it",
            )
        pair = Pair(self.example(prompt, chosen), self.example(prompt, rejected))
        if (
            pair.chosen.turns[: pair.chosen.prompt_turns]
            != pair.rejected.turns[: pair.rejected.prompt_turns]
        ):
            raise self.bad("chosen and rejected answer different prompts")
        return pair


def _kind(value: object) -> str:
    return (
        "an object" if isinstance(value, Mapping) else _KINDS.get(type(value), type(value).__name__)
    )


def _stripped(turns: _Turns) -> list[tuple[Role, str]]:
    return [(turn.role, turn.text.strip()) for turn in turns]


def _choices(row: _Row) -> tuple[_Turns, list[_Turns], int]:
    """The question, the choices as answers, and which of them is right."""
    value, label = row.value("choices"), row.label("choices")
    held = value if isinstance(value, Mapping) else {"text": value}
    texts, labels = ([] if part is None else part for part in (held.get("text"), held.get("label")))
    if not isinstance(texts, list) or not isinstance(labels, list):
        raise row.bad(f"{label}: {_kind(value)} where a list of texts was expected")
    names = [row.string(text, f"{label}[{place}]").strip() for place, text in enumerate(texts)]
    if len(names) < 2:
        raise row.bad(f"{label}: {len(names)} where at least 2 are needed")
    if not all(names):
        raise row.bad(f"{label}[{names.index('')}]: empty choice")
    right = _right_choice(row, names, [str(each).strip() for each in labels])
    if names.count(names[right]) > 1:
        raise row.bad(f"{label}: the right choice {reprlib.repr(names[right])} stands there twice")
    return row.turns("question", "user"), [(Turn("assistant", text),) for text in texts], right


def _right_choice(row: _Row, names: list[str], labels: list[str]) -> int:
    """A label says it first, then the text of a choice, then a position from 0, then a letter from
    A."""
    value, label = row.value("answer"), row.label("answer")
    if type(value) not in (int, str):
        raise row.bad(
            f"{label}: {_kind(value)} where a position, a letter or the text of a choice was expected"
        )
    name = str(value) if isinstance(value, int) else row.string(value, label).strip()
    for known in (labels, names if isinstance(value, str) else []):
        if name in known[: len(names)]:
            return known.index(name)
    if re.fullmatch(r"-?[0-9]{1,9}|[A-Za-z]", name):
        place = ord(name.upper()) - ord("A") if name.isalpha() else int(name)
        if 0 <= place < len(names):
            return place
        raise row.bad(
            f"{label}: {name} is out of range: there are {len(names)} choices",
            "count from 0, or from A",
        )
    raise row.bad(
        f"{label}: {reprlib.repr(name)} is not among the {len(names)} choices",
        "give its text or position",
    )


def _wrong_choices(row: _Row) -> list[_Compared]:
    question, choices, right = _choices(row)
    return [
        (question, choices[right], choice) for place, choice in enumerate(choices) if place != right
    ]


def _right_of_choices(row: _Row) -> _Answered:
    question, choices, right = _choices(row)
    return question, choices[right]


def _shared_prefix(row: _Row) -> list[_Compared]:
    """Turns part at the first that differs; texts after the last word, or dialogue marker, that
    they share."""
    chosen, rejected = row.answer("chosen"), row.answer("rejected")
    texts = [
        value for value in (row.value("chosen"), row.value("rejected")) if isinstance(value, str)
    ]
    if len(texts) == 1:
        raise row.bad("chosen and rejected: one is text, the other messages")
    if _stripped(chosen) == _stripped(rejected):
        return [((), chosen, rejected)]
    if texts:
        cut = _parting(*texts)
        prompt: _Turns = (Turn("user", texts[0][:cut]),) if texts[0][:cut].strip() else ()
        chosen, rejected = ((Turn("assistant", text[cut:]),) for text in texts)
    else:
        prompt = tuple(
            left
            for left, _ in takewhile(
                lambda two: two[0] == two[1], zip(chosen, rejected, strict=False)
            )
        )
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        if any(rest and rest[0].role != "assistant" for rest in (chosen, rejected)):
            raise row.bad("chosen and rejected answer different prompts")
    if not prompt:
        raise row.bad(
            "chosen and rejected share no prefix, so there is no prompt", "add a prompt to each row"
        )
    return [(prompt, row.spoken(chosen, "chosen"), row.spoken(rejected, "rejected"))]


def _parting(chosen: str, rejected: str) -> int:
    shared = os.path.commonprefix([chosen, rejected])
    marker = shared.rfind(_HH_MARKER)
    if marker >= 0:
        return marker + len(_HH_MARKER)
    room = (
        min(len(chosen.rstrip()), len(rejected.rstrip())) - 1
    )  # something of each answer must be left
    for boundary in (r".*\s", r".*\W"):
        if found := re.match(boundary, shared[:room], re.DOTALL):
            return found.end()
    return 0


def _preferred(prompt: Callable[[_Row], _Turns]) -> Callable[[_Row], list[_Compared]]:
    return lambda row: [(prompt(row), row.answer("chosen"), row.answer("rejected"))]


_POOL: dict[str, Callable[[_Row], _Answered]] = {
    "messages": lambda row: ((), row.spoken(row.conversation("messages"), "messages")),
    "prompt+completion": lambda row: (row.turns("prompt", "user"), row.answer("completion")),
    "prompt+response": lambda row: (row.turns("prompt", "user"), row.answer("response")),
    "instruction+output": lambda row: (row.instruction(), row.answer("output")),
    "instruction+response": lambda row: (row.instruction(), row.answer("response")),
    "conversations": lambda row: (
        (),
        row.spoken(row.conversation("conversations"), "conversations"),
    ),
    "question+choices+answer": _right_of_choices,
    "question+answer": lambda row: (row.turns("question", "user"), row.answer("answer")),
    "prompt+answer": lambda row: (row.turns("prompt", "user"), row.answer("answer")),
    "text": lambda row: ((), row.bare()),
}


_TARGET: dict[str, Callable[[_Row], list[_Compared]]] = {
    "prompt+chosen+rejected": _preferred(lambda row: row.turns("prompt", "user")),
    "instruction+chosen+rejected": _preferred(_Row.instruction),
    "question+chosen+rejected": _preferred(lambda row: row.turns("question", "user")),
    "conversations+chosen+rejected": _preferred(lambda row: row.conversation("conversations")),
    "question+choices+answer": _wrong_choices,
    "chosen+rejected": _shared_prefix,
}
