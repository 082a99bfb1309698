"""lm-eval logs: the answer in a row of a sample file of lm-evaluation-harness (`--log_samples`).

    generation       arguments [context, settings]          resps [[text, …]]          → text
    multiple choice  arguments [context, continuation] …    resps [[[log p, …]]] …     → favourite

Choices made here:
- the answer is the whole response, not what a filter takes from it, and the first of several; the
  one space with which a model goes on behind "Answer:" is left out, as no row of a pool has it;
- the favourite has the largest log p; per letter or byte where the metric is acc_norm or acc_bytes;
- the score is the first of `metrics`, or the one named; NAME,FILTER, as lm-eval's tables have it,
  takes the rows of that filter;
- the bypass metric of `--predict_only` is no score;
- arguments are objects (from 0.4.3) or lists (before); a prompt without `--apply_chat_template`, or
  rendered by it for a local model, is one turn; messages for a server remain messages.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from prism_select.data.fields import Fields, name_in
from prism_select.data.logged_rows import (
    LoggedAnswer,
    content_of,
    named_advice,
    prompt_in,
    score_in,
    with_prompt,
)
from prism_select.data.records import Raw
from prism_select.data.row_content import RowContent, Turns

__all__ = ["is_lm_eval", "lm_eval_answer"]

_SPACE = re.compile(r"\A (?=\S)")
_NEEDED = ("doc_id", "arguments", "resps")
_NO_METRIC = {
    *(*_NEEDED, "doc", "target", "filtered_resps", "filter", "metrics"),
    *("doc_hash", "prompt_hash", "target_hash", "task_name"),
}
_LENGTHS: Mapping[str, Callable[[str], int]] = {
    "acc_norm": len,
    "acc_bytes": lambda text: len(text.encode()),
}


def is_lm_eval(fields: Fields) -> bool:
    return fields.keys() >= {*_NEEDED}


def lm_eval_answer(raw: Raw, metric: str | None) -> LoggedAnswer | str:
    """The answer, or why the row counts for nothing: another filter. Raises BadRow."""
    row = content_of(raw, _NEEDED)
    fields = raw.fields or {}
    filter_name = str(fields.get("filter", ""))
    name, _, wanted = (metric or "").partition(",")
    if wanted and wanted != filter_name:
        return f"of another filter than {wanted}"
    name = name or _first_metric(row, fields)
    context, continuations = _request(row, _requests(row))
    best = _favourite(row, continuations, name) if continuations else 0
    return with_prompt(
        row,
        LoggedAnswer(
            _prompt(row, raw, context),
            continuations[best].strip() if continuations else _SPACE.sub("", _response(row)),
            None if name in ("", "bypass") else _score(row, fields, name),
            raw.file,
            raw.line,
            name_in(fields["doc_id"]) or "",
            tuple(continuations),
            filter_name,
            ",".join(filter(None, (name, filter_name))),
        ),
    )


def _first_metric(row: RowContent, fields: Fields) -> str:
    """Its name, or nothing where the row has no metric."""
    names = fields.get("metrics", [name for name in fields if name not in _NO_METRIC])
    if not isinstance(names, list):
        raise row.bad("metrics: not a list of names")
    return row.string(names[0], "metrics[0]") if names else ""


def _score(row: RowContent, fields: Fields, name: str) -> float | None:
    others = [key for key in fields if key not in _NO_METRIC and key != name]
    advice = named_advice(others) if others else "log the task again"
    if name not in fields:
        raise row.bad(f"no metric {name}", advice)
    if isinstance(fields[name], list):
        raise row.bad(f"{name}: no number for each question", advice)
    return score_in(row, fields[name], name)


def _requests(row: RowContent) -> list[list[Any]]:
    """What the model was asked: for each request, its arguments."""
    requests = [_listed(request) for request in _listed(row.value("arguments"))]
    if not requests or not all(requests):
        raise row.bad("arguments: not a list of requests")
    if any(len(request) > 2 for request in requests):
        raise row.bad("the prompt has images or sound", "only text can be read")
    return requests


def _listed(value: object) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else []


def _request(row: RowContent, requests: list[list[Any]]) -> tuple[Any, list[str]]:
    """The context, and the continuations to choose from: none where an answer was generated."""
    context, advice = requests[0][0], "take a task that generates, or one of multiple choice"
    if len(requests[0]) == 2 and isinstance(requests[0][1], Mapping):
        return context, []
    asked = [request for request in requests if request[0] or not context]  # "": mutual information
    if len(requests[0]) < 2 or len(asked) < 2:
        raise row.bad("the log has likelihoods, and no answer of the model", advice)
    if any(request[0] != context for request in asked):
        raise row.bad("its choices stand in the prompt, which is another for each", advice)
    return context, [row.string(request[1], "arguments") for request in asked]


def _prompt(row: RowContent, raw: Raw, context: Any) -> Turns:
    if isinstance(context, list) and len(context) == 1:  # messages for a server, as JSON
        try:
            context = json.loads(context[0])
        except (TypeError, ValueError, RecursionError):
            raise row.bad("arguments: neither text nor messages") from None
    return prompt_in(raw, context, "arguments")


def _response(row: RowContent) -> str:
    return row.string(_first_response(row, 0), "resps")


def _first_response(row: RowContent, request: int) -> Any:
    try:
        return _listed(_listed(row.value("resps"))[request])[0]
    except IndexError:
        raise row.bad(f"resps: no response to request {request + 1}") from None


def _favourite(row: RowContent, continuations: list[str], metric: str) -> int:
    length = _LENGTHS.get(metric)
    values = [
        _log_likelihood(row, index) / (max(length(text.lstrip()), 1) if length else 1)
        for index, text in enumerate(continuations)
    ]
    return values.index(max(values))


def _log_likelihood(row: RowContent, request: int) -> float:
    try:
        value = float(_listed(_first_response(row, request))[0])
    except (IndexError, TypeError, ValueError, OverflowError):
        raise row.bad("resps: no log-likelihood where one was expected") from None
    if value != value:
        raise row.bad("resps: a log-likelihood is NaN", "run the model in float32, and log again")
    return value
