"""Answer logs: what a model answered to each question of a benchmark, and how it scored.

    samples_TASK_….jsonl   lm-evaluation-harness with --log_samples     lm_eval_logs
    ….eval, ….json         inspect_ai                                   inspect_logs
    ….jsonl, ….json        rows with prompt, response and score         logged_rows

Choices made here:
- the format is told by the ending and by the first row;
- whatever cannot be read stops: a question that is lost unnoticed changes the pairs unnoticed;
- of several rows of one question, by filter or epoch, the first counts, with its own score: a mean
  would be the score of no answer; the others are counted;
- a question under one name with two prompts, in one log or between two, is refused: the logs are of
  different benchmarks, few-shot examples or templates.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

from prism_select.data.files import read_rows, readable
from prism_select.data.inspect_logs import inspect_answer, inspect_samples, is_inspect_json
from prism_select.data.lm_eval_logs import is_lm_eval, lm_eval_answer
from prism_select.data.logged_rows import LoggedAnswer, logged_row
from prism_select.data.records import Raw
from prism_select.data.remote import is_remote
from prism_select.data.streams import open_stream
from prism_select.run.errors import BadFile, BadRow, EmptyInput

__all__ = ["AnswerLog", "LoggedAnswer", "Matched", "is_answer_log", "matched", "read_answer_log"]

_Reader: TypeAlias = Callable[[Raw, str | None], LoggedAnswer | str]

_ENDING = re.compile(r"\.(?:eval|jsonl?(?:\.(?:gz|zst))?)$", re.IGNORECASE)
_READERS: Mapping[str, _Reader] = {
    "lm-eval": lm_eval_answer,
    "inspect": inspect_answer,
    "jsonl": logged_row,
}
_RESULTS = re.compile(rb'\s*\{\s*"results"\s*:')  # of lm-eval
_ADVICE = (
    "give a sample file of lm-eval (--log_samples), a log of Inspect, or JSON lines with prompt, "
    "response and score"
)


@dataclass(frozen=True)
class AnswerLog:
    """`answers` by question, in the order of the file (of Inspect, by epoch). `left_out` counts the
    rows without one, by the reason."""

    format: str
    answers: Mapping[str, LoggedAnswer]
    left_out: Mapping[str, int]

    @property
    def words(self) -> str:
        """What was read, by which score, and what was not."""
        metrics = {answer.metric for answer in self.answers.values() if answer.score is not None}
        scored = f", score {' and '.join(sorted(metrics))}" if metrics else ""
        left_out = "".join(f"; {count:,} {reason}" for reason, count in self.left_out.items())
        return f"{len(self.answers):,} answers, format {self.format}{scored}{left_out}"


@dataclass(frozen=True)
class Matched:
    """The answers before and after to each question of both logs, in the order of the second, and
    the number of questions in one log alone."""

    pairs: Sequence[tuple[LoggedAnswer, LoggedAnswer]]
    before_only: int
    after_only: int


def is_answer_log(path: str) -> bool:
    """Whether it is a file, or an address, that can be a log of answers, by its ending."""
    return _ENDING.search(path) is not None and (is_remote(path) or os.path.isfile(path))


def read_answer_log(path: str, metric: str | None = None) -> AnswerLog:
    """The answers of a log; `metric` names their score where the log has several. Raises BadRow for
    the first row that cannot be read, EmptyInput where there is no answer, BadFile."""
    format, rows = _rows(path)
    answers, left_out = dict[str, LoggedAnswer](), Counter[str]()
    by_id = dict[str, LoggedAnswer]()
    for raw in rows:
        answer = _READERS[format](raw, metric)
        reason = answer if isinstance(answer, str) else _repeats(answer, answers, by_id)
        if isinstance(answer, str) or reason:
            left_out[reason] += 1
            continue
        answers[answer.question] = answer
        if answer.id:
            by_id[answer.id] = answer
    if not answers:
        found = "".join(f": {count} {reason}" for reason, count in left_out.items())
        raise EmptyInput(path, None, f"no answer in this log{found}", _ADVICE)
    return AnswerLog(format, answers, dict(left_out))


def _rows(path: str) -> tuple[str, Iterator[Raw]]:
    """Format and rows. Raises BadFile for a file that is no log."""
    if not _ENDING.search(path):
        raise BadFile(path, None, "not a log of answers, by its ending", _ADVICE)
    readable(path)
    if path.lower().endswith(".eval") or is_inspect_json(path):
        return "inspect", inspect_samples(path)
    with open_stream(path) as stream:
        if _RESULTS.match(stream.peek(1 << 10)):
            raise BadFile(path, None, "the results of lm-eval without their samples", _ADVICE)
    rows = read_rows(path)
    first = next(rows, None)
    if first is None:
        raise EmptyInput(path, None, "an empty log", _ADVICE)
    fields = {"prompt": ""} if first.fields is None else first.fields
    if not is_lm_eval(fields) and fields.keys().isdisjoint(("prompt", "response")):
        shown = ", ".join(list(fields)[:5]) or "none"
        raise BadRow(path, first.line, f"no row of a log of answers; its columns: {shown}", _ADVICE)
    return "lm-eval" if is_lm_eval(fields) else "jsonl", chain([first], rows)


def _repeats(
    answer: LoggedAnswer, answers: Mapping[str, LoggedAnswer], by_id: Mapping[str, LoggedAnswer]
) -> str:
    """Why it counts for nothing: another filter or epoch of an answer before it. Raises BadRow
    where it may not stand beside them."""
    named, asked = by_id.get(answer.id), answers.get(answer.question)
    if named and named.question != answer.question:
        raise BadRow(
            answer.file,
            answer.line,
            f"the question {answer.id} stands at {named.line} with another prompt",
            "give the log of one task and one run",
        )
    if asked is None:
        return ""
    if named and named.repeat != answer.repeat:
        return "further answers to the same questions, by filter or epoch, left out"
    raise BadRow(
        answer.file,
        answer.line,
        f"the same question as at {asked.line}",
        "leave one of the two out",
    )


def matched(before: AnswerLog, after: AnswerLog) -> Matched:
    """Raises BadRow for a question under one name with two prompts, BadFile where the logs share no
    question."""
    _refuse_mismatch(before, after)
    pairs = [
        (before.answers[question], answer)
        for question, answer in after.answers.items()
        if question in before.answers
    ]
    if not pairs:
        files = [next(iter(log.answers.values())).file for log in (before, after)]
        what = f"no question of {files[0]} stands in it"
        raise BadFile(files[1], None, what, "give two logs of one benchmark, with equal prompts")
    return Matched(pairs, len(before.answers) - len(pairs), len(after.answers) - len(pairs))


def _refuse_mismatch(before: AnswerLog, after: AnswerLog) -> None:
    if before.format != after.format:
        return  # each tool has names of its own
    earlier = {answer.id: answer for answer in before.answers.values() if answer.id}
    for answer in after.answers.values():
        other = earlier.get(answer.id)
        if other and other.question != answer.question:
            raise BadRow(
                answer.file,
                answer.line,
                f"the question {answer.id} has another prompt than in {other.file}:{other.line}",
                "log both models with the same task, few-shot examples and template",
            )
