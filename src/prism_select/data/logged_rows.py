"""Logged rows: one answer of a model to a question of a benchmark, as logs of answers have them.

    {"prompt": "2 + 2?", "response": "5", "score": 0}   →   LoggedAnswer("2 + 2?", "5", 0.0)

Choices made here:
- the prompt is text or messages; the answer may be empty, the prompt may not;
- a score is a number, true or false, and higher is better; NaN is refused, null is no score;
- two answers are to the same question where the texts of their prompts (and of the choices beside
  them) are equal but for white space, whichever tool wrote them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any

from prism_select.data.fields import explicit_id
from prism_select.data.messages import type_in_words
from prism_select.data.records import Raw
from prism_select.data.row_content import RowContent, Turns

__all__ = [
    "LoggedAnswer",
    "content_of",
    "logged_row",
    "named_advice",
    "prompt_in",
    "score_in",
    "with_prompt",
]


@dataclass(frozen=True)
class LoggedAnswer:
    """`line` counts from 1: the line of the file, or the number of the sample in a log of Inspect.
    `id` is the log's name of the question, if it has one; `repeat` tells its several rows of one
    question apart, by filter or epoch. `choices` are those that the prompt does not show. `metric`
    is the name of its score."""

    prompt: Turns
    answer: str
    score: float | None
    file: str
    line: int
    id: str = ""
    choices: tuple[str, ...] = ()
    repeat: str = ""
    metric: str = ""

    @property
    def question(self) -> str:
        """What it answers, the same in every log."""
        texts = (*(turn.shown for turn in self.prompt), *self.choices)
        return " ".join(" ".join(texts).split())


def logged_row(raw: Raw, metric: str | None) -> LoggedAnswer:
    """The answer in a row with prompt and response; its score is in the column `metric`. Raises
    BadRow."""
    row = content_of(raw, ("prompt", "response", *([metric] if metric else [])))
    score = (raw.fields or {}).get(metric or "score")
    return with_prompt(
        row,
        LoggedAnswer(
            prompt_in(raw, row.value("prompt"), "prompt"),
            row.text("response"),
            score_in(row, score, metric or "score"),
            raw.file,
            raw.line,
            explicit_id(raw) or "",
            metric=metric or "score",
        ),
    )


def named_advice(scores: Sequence[str]) -> str:
    """How to take another score of a log than its first."""
    return f"name a score that it has, as in --fields score={scores[0]}: {', '.join(scores)}"


def content_of(raw: Raw, needed: Iterable[str]) -> RowContent:
    """The row itself. Raises BadRow where it cannot be read or lacks one of these fields."""
    row = RowContent(raw, {})
    for name in needed:
        if name not in (raw.fields or {}):
            raise row.bad(f"missing field: {name}", "add it or remove the row")
    return row


def prompt_in(raw: Raw, value: Any, label: str) -> Turns:
    """The turns of a text or of messages. Raises BadRow, which calls them `label`."""
    return RowContent(replace(raw, fields={label: value}), {}).turns(label, "user")


def with_prompt(row: RowContent, answer: LoggedAnswer) -> LoggedAnswer:
    """The answer itself. Raises BadRow where its prompt says nothing."""
    if all(turn.is_blank for turn in answer.prompt):
        raise row.bad("empty prompt")
    return answer


def score_in(row: RowContent, value: object, label: str) -> float | None:
    """The score as a number, None for null. Raises BadRow."""
    if value is None:
        return None
    if not isinstance(value, bool | int | float):
        raise row.bad(f"{label}: {type_in_words(value)} where a number was expected")
    try:
        score = float(value)
    except OverflowError:
        score = inf
    if not isfinite(score):
        advice = "a question without a score has null there"
        raise row.bad(f"{label}: {score} where a finite number was expected", advice)
    return score
