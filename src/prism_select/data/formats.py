"""Formats: what the fields of a row mean. The first two tables are all formats there are.

    pool row   → Example    a conversation and what is supervised in it
    target row → Pairs      a prompt, an answer that is wanted and one that is not; or a pool row,
                            whose answer is wanted

Choices made here:
- a format is called by the fields that it needs: prompt+completion needs `prompt` and `completion`;
- the first format in its table whose fields are all there is taken, so specific ones stand first;
- in a conversation every assistant turn is supervised; with a prompt of its own, only the answer;
- `system`, `history` and `tools` may stand beside any format but a bare text;
- a wrong choice of a multiple-choice row makes a pair: all pairs of a row carry its id.
"""

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from typing import NoReturn, TypeAlias

from prism_select.data.fields import Fields, Names, columns_of, is_empty, standard_fields
from prism_select.data.multiple_choice import right_choice, wrong_choices
from prism_select.data.records import Example, Pair, Raw
from prism_select.data.row_content import CONTEXT, MEDIA, RENAME_ADVICE, RowContent, Turns
from prism_select.data.shared_prompt import without_shared_prompt
from prism_select.run.errors import BadOption, BadRow

__all__ = [
    "POOL_FORMATS",
    "TARGET_FORMATS",
    "Format",
    "detect_anchors",
    "detect_pool",
    "detect_target",
    "fields_read",
    "parse_fields",
    "to_answer",
    "to_example",
    "to_pairs",
]

Answered: TypeAlias = tuple[Turns, Turns]  # prompt, answer
Compared: TypeAlias = tuple[Turns, Turns, Turns]  # prompt, chosen, rejected

POOL_FORMATS: Mapping[str, Callable[[RowContent], Answered]] = {
    "messages": lambda row: _conversation(row, "messages"),
    "prompt+completion": lambda row: (row.turns("prompt", "user"), row.answer("completion")),
    "prompt+response": lambda row: (row.turns("prompt", "user"), row.answer("response")),
    "instruction+output": lambda row: (row.instruction(), row.answer("output")),
    "instruction+response": lambda row: (row.instruction(), row.answer("response")),
    "conversations": lambda row: _conversation(row, "conversations"),
    "question+choices+answer": right_choice,
    "question+answer": lambda row: (row.turns("question", "user"), row.answer("answer")),
    "prompt+answer": lambda row: (row.turns("prompt", "user"), row.answer("answer")),
    "text": lambda row: ((), row.bare_text()),
}

TARGET_FORMATS: Mapping[str, Callable[[RowContent], list[Compared]]] = {
    "prompt+chosen+rejected": lambda row: _compared(row, row.turns("prompt", "user")),
    "instruction+chosen+rejected": lambda row: _compared(row, row.instruction()),
    "question+chosen+rejected": lambda row: _compared(row, row.turns("question", "user")),
    "conversations+chosen+rejected": lambda row: _compared(row, row.conversation("conversations")),
    "question+choices+answer": wrong_choices,
    "chosen+rejected": lambda row: [without_shared_prompt(row)],
}

FIELDS = sorted(
    {
        *("id", "source", "input", "weak", *CONTEXT),
        *"+".join([*POOL_FORMATS, *TARGET_FORMATS]).split("+"),
    }
)


def _conversation(row: RowContent, name: str) -> Answered:
    return (), row.supervised(row.conversation(name), name)


def _compared(row: RowContent, prompt: Turns) -> list[Compared]:
    return [(prompt, row.answer("chosen"), row.answer("rejected"))]


@dataclass(frozen=True, slots=True)
class Format:
    """A row of POOL_FORMATS or TARGET_FORMATS, by its name."""

    name: str


def to_example(raw: Raw, format: Format, mapping: Names) -> Example:
    """The example in a pool row. Raises BadRow where nothing in it can be scored."""
    row = RowContent(raw, mapping)
    example = row.example(*POOL_FORMATS[format.name](row))
    return example if format.name == "text" else row.in_context(example, True)


def to_pairs(raw: Raw, format: Format, mapping: Names) -> list[Pair]:
    """The pairs in a target row, at least one. Raises BadRow where there is none."""
    row = RowContent(raw, mapping)
    pairs = [row.pair(*compared) for compared in TARGET_FORMATS[format.name](row)]
    return [
        replace(
            pair,
            chosen=row.in_context(pair.chosen, False),
            rejected=row.in_context(pair.rejected, False),
        )
        for pair in pairs
    ]


def to_answer(raw: Raw, format: Format, mapping: Names) -> Pair:
    """The answer of a pool row, alone. Raises BadRow where there is none."""
    example = to_example(raw, format, mapping)
    return Pair(example, example, alone="chosen")


def fields_read(format: Format) -> set[str]:
    """The fields that a format reads, if a row has them."""
    names = {"id", "source", *MEDIA, *format.name.split("+")}
    if format.name != "text":
        names |= {*CONTEXT}
    if "instruction" in names:
        names.add("input")
    return names | {"answerKey"} if "answer" in names else names


def detect_pool(
    fields: Fields, mapping: Names, file: str = "row", line: int | None = None
) -> Format:
    """The format of a pool row. Raises BadRow, at `file` and `line`, where none fits."""
    return _detect(standard_fields(fields, mapping), POOL_FORMATS) or _unknown(
        fields, mapping, POOL_FORMATS, file, line
    )


def detect_target(
    fields: Fields, mapping: Names, file: str = "row", line: int | None = None
) -> Format:
    """The format of a target row. Raises BadRow, at `file` and `line`, where none fits, and where
    the prompt of the answers may stand in a column that `mapping` does not name."""
    format = _detect(standard_fields(fields, mapping), TARGET_FORMATS) or _unknown(
        fields, mapping, TARGET_FORMATS, file, line
    )
    missing = _missing(fields, mapping, ("prompt", "instruction", "question"))
    if format.name == "chosen+rejected" and missing and (spare := _unused(fields, mapping, format)):
        name = missing[0]
        advice = f"--fields {name}={mapping[name][0]},{name}={spare[0]},…"
        raise BadRow(
            file,
            line,
            f"{_no_columns(missing, mapping)}; not used are {', '.join(spare)}",
            f"name this file's own column as well: {advice}",
        )
    return format


def detect_anchors(
    fields: Fields, mapping: Names, file: str = "row", line: int | None = None
) -> Format:
    """The format of a target row, or else that of a pool row, whose answer stands alone. Raises
    BadRow, at `file` and `line`, where neither fits."""
    try:
        return detect_target(fields, mapping, file, line)
    except BadRow:
        if format := _detect(standard_fields(fields, mapping), POOL_FORMATS):
            return format
        raise


def _unused(fields: Fields, mapping: Names, format: Format) -> list[str]:
    """The columns of a target row that nothing reads."""
    read = fields_read(format)
    return [name for name in standard_fields(fields, mapping) if name not in read]


def _detect(fields: Fields, formats: Iterable[str]) -> Format | None:
    filled = {name for name, value in fields.items() if not is_empty(value)}
    # a table has the columns of all its rows: null where a row does not use them
    for names in (filled, fields.keys()):
        for name in formats:
            if names >= set(name.split("+")):
                return Format(name)
    return None


def _missing(fields: Fields, mapping: Names, names: Iterable[str]) -> list[str]:
    """Those of `names` that are mapped to columns of which this row has none."""
    present = columns_of(fields, mapping)
    return [name for name in dict.fromkeys(names) if name in mapping and name not in present]


def _no_columns(names: Iterable[str], mapping: Names) -> str:
    return ", ".join(
        f"no column {' or '.join(map(repr, mapping[name]))} for {name}" for name in names
    )


def _unknown(
    fields: Fields, mapping: Names, formats: Iterable[str], file: str, line: int | None
) -> NoReturn:
    columns = ", ".join(map(reprlib.repr, islice(fields, 12))) or "none"
    if missing := _missing(fields, mapping, "+".join(formats).split("+")):
        near = (get_close_matches(mapping[name][0], fields, 1) for name in missing)
        close = [(found or ["its own column"])[0] for found in near]
        instead = ",".join(f"{name}={column}" for name, column in zip(missing, close, strict=True))
        what = f"{_no_columns(missing, mapping)}; the fields are {columns}"
        advice = f"check --fields: {instead}, perhaps"
    else:
        what = f"no known format: the fields are {columns}; known are {', '.join(formats)}"
        advice = RENAME_ADVICE
        if "text" not in formats:
            advice = advice.replace("completion=response", "chosen=good,rejected=bad")
    raise BadRow(file, line, what, advice)


def parse_fields(text: str | None) -> dict[str, tuple[str, ...]]:
    """`prompt=ask,prompt=question,id=key` → {"prompt": ("ask", "question"), "id": ("key",)}. Raises
    BadOption for anything else, and for a field that no format has."""
    mapping: dict[str, tuple[str, ...]] = {}
    for entry in filter(str.strip, (text or "").split(",")):
        name, _, column = (side.strip() for side in entry.partition("="))
        if not name or not column:
            raise BadOption(
                f"--fields {text}: {entry.strip()!r} is not NAME=COLUMN; write prompt=question"
            )
        if name not in FIELDS:
            raise BadOption(
                f"--fields {text}: {name!r} is no field of a format; known are {', '.join(FIELDS)}"
            )
        if column in mapping.get(name, ()):
            raise BadOption(f"--fields {text}: {entry.strip()} is given twice; keep one")
        mapping[name] = (*mapping.get(name, ()), column)
    return mapping
