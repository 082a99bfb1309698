"""Multiple choice: a question, its choices, and which of them is right.

    question "2 + 2?", choices ["4", "5"], answer 0  →  right "4", wrong "5"
    choices may also be {"text": ["4", "5"], "label": ["A", "B"]}

Choices made here:
- `answer` is a label, else the text of a choice, else a position from 0, else a letter from A;
- each wrong choice makes a pair with the right one;
- a right choice that occurs twice makes the row bad, since its twin would count as wrong.
"""

import re
import reprlib
from collections.abc import Mapping

from prism_select.data.messages import type_in_words
from prism_select.data.records import Turn
from prism_select.data.row_content import RowContent, Turns

__all__ = ["right_choice", "wrong_choices"]


def right_choice(row: RowContent) -> tuple[Turns, Turns]:
    """Question and right choice."""
    question, choices, right = _choices(row)
    return question, choices[right]


def wrong_choices(row: RowContent) -> list[tuple[Turns, Turns, Turns]]:
    """Question, right choice and wrong choice, for each wrong choice."""
    question, choices, right = _choices(row)
    return [
        (question, choices[right], choice) for index, choice in enumerate(choices) if index != right
    ]


def _choices(row: RowContent) -> tuple[Turns, list[Turns], int]:
    """Question, choices, and the index of the right one."""
    value, label = row.value("choices"), row.label("choices")
    columns = value if isinstance(value, Mapping) else {"text": value}
    texts, labels = (
        [] if column is None else column for column in (columns.get("text"), columns.get("label"))
    )
    if not isinstance(texts, list) or not isinstance(labels, list):
        raise row.bad(f"{label}: {type_in_words(value)} where a list of texts was expected")
    names = [row.string(text, f"{label}[{index}]").strip() for index, text in enumerate(texts)]
    if len(names) < 2:
        raise row.bad(f"{label}: {len(names)} where at least 2 are needed")
    if not all(names):
        raise row.bad(f"{label}[{names.index('')}]: empty choice")
    right = _right_index(row, names, [str(label).strip() for label in labels])
    if names.count(names[right]) > 1:
        raise row.bad(f"{label}: the right choice {reprlib.repr(names[right])} stands there twice")
    return row.turns("question", "user"), [(Turn("assistant", text),) for text in texts], right


def _right_index(row: RowContent, names: list[str], labels: list[str]) -> int:
    value, label = row.value("answer"), row.label("answer")
    if type(value) not in (int, str):
        raise row.bad(
            f"{label}: {type_in_words(value)} where a position, a letter or the text of a choice "
            "was expected"
        )
    name = str(value) if isinstance(value, int) else row.string(value, label).strip()
    for candidates in (labels, names if isinstance(value, str) else []):
        if name in candidates[: len(names)]:
            return candidates.index(name)
    if re.fullmatch(r"-?[0-9]{1,9}|[A-Za-z]", name):
        index = ord(name.upper()) - ord("A") if name.isalpha() else int(name)
        if 0 <= index < len(names):
            return index
        raise row.bad(
            f"{label}: {name} is out of range: there are {len(names)} choices",
            "count from 0, or from A",
        )
    raise row.bad(
        f"{label}: {reprlib.repr(name)} is not among the {len(names)} choices",
        "give its text or position",
    )
