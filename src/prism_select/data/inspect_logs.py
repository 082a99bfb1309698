"""Inspect logs: the samples of a log of inspect_ai, an .eval archive or a .json file.

    {"id": 1, "epoch": 1, "messages": [system, user, assistant], "output": {"completion": "5"},
     "scores": {"match": {"value": "I"}}}   →   prompt [system, user], answer "5", score 0

Choices made here:
- the prompt is what the model saw before its only answer; of a longer exchange, the sample's input;
- a letter is a number as Inspect converts it: C 1, P 0.5, I and N 0; NaN is Inspect's mark of a
  sample without a score;
- the score is the first scorer's, or that of the one named: NAME, or NAME.KEY of a score with keys;
- epochs come in order; a sample that failed has no answer;
- archives are packed with deflate or, since 2026, zstd, which Python's zipfile cannot read before
  3.14: pyarrow unpacks it.
"""

import io
import json
import re
import reprlib
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from prism_select.data.fields import is_empty, name_in
from prism_select.data.json_rows import json_row_of_line
from prism_select.data.logged_rows import (
    LoggedAnswer,
    content_of,
    named_advice,
    prompt_in,
    score_in,
    with_prompt,
)
from prism_select.data.records import Raw
from prism_select.data.remote import local
from prism_select.data.row_content import RowContent, Turns
from prism_select.data.streams import DAMAGED_ADVICE, decode, open_stream, reading
from prism_select.run.errors import BadFile, BadRow

__all__ = ["inspect_answer", "inspect_samples", "is_inspect_json"]

SAMPLE_BYTES = 1 << 28  # of one sample, unpacked
_HEAD = re.compile(rb'\s*\{\s*"version"\s*:\s*\d+\s*,\s*"status"\s*:')
_SAMPLE = re.compile(r"samples/.*?(?:_epoch_(\d+))?\.json")
_ZSTD = 93  # its number among the methods of zip archives
_FAILURES = (
    *(OSError, EOFError, RuntimeError, NotImplementedError, struct.error, zlib.error),
    *(zipfile.BadZipFile, pa.ArrowException),
)
_LETTERS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}
_WORDS = {"yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}
_ADVICE = "log the evaluation again"


def is_inspect_json(file: str) -> bool:
    with open_stream(file) as stream:
        return _HEAD.match(stream.peek(1 << 10)) is not None


def inspect_samples(file: str) -> Iterator[Raw]:
    """The samples, each with its number in the file, by epoch. Raises BadFile."""
    return _archived(file) if file.lower().endswith(".eval") else _written(file)


def _archived(file: str) -> Iterator[Raw]:
    with reading(file, _FAILURES, DAMAGED_ADVICE), zipfile.ZipFile(local(file)) as archive:
        infos = {info.filename: info for info in archive.infolist()}  # of two, the later counts
        matches = [match for match in map(_SAMPLE.fullmatch, infos) if match]
        samples = [
            (int(match[1] or 1), number, infos[match[0]])
            for number, match in enumerate(matches, start=1)
        ]
        for _, number, info in sorted(samples, key=lambda sample: sample[:2]):
            yield json_row_of_line(file, number, _unpacked(file, number, archive, info))


def _unpacked(file: str, number: int, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > SAMPLE_BYTES:
        what = f"sample {number}: {info.file_size:,} bytes, and at most {SAMPLE_BYTES:,} are read"
        raise BadFile(file, number, what, "leave it out")
    if info.compress_type != _ZSTD:
        return archive.read(info)
    with open(local(file), "rb") as stream:
        stream.seek(info.header_offset + 26)  # two lengths end the 30 bytes of a header
        stream.seek(sum(struct.unpack("<HH", stream.read(4))), io.SEEK_CUR)
        packed = pa.BufferReader(stream.read(info.compress_size))
    data: bytes = pa.input_stream(packed, compression="zstd").read(info.file_size)
    if zlib.crc32(data) != info.CRC:
        raise zipfile.BadZipFile(f"Bad CRC-32 for file {info.filename!r}")
    return data


def _written(file: str) -> Iterator[Raw]:
    with open_stream(file) as stream:
        text, problem = decode(stream.read(), "file")
    if problem:
        raise BadFile(file, None, problem, "write the log again as UTF-8")
    try:
        samples = json.loads(text).get("samples")
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else None
        what = f"broken JSON: {str(error).partition(':')[0]}"
        raise BadFile(file, line, what, _ADVICE) from None
    listed = samples if isinstance(samples, list) else []
    numbered = [(_epoch(sample), number, sample) for number, sample in enumerate(listed, start=1)]
    for _, number, sample in sorted(numbered, key=lambda entry: entry[:2]):
        fields = sample if isinstance(sample, Mapping) else None
        yield Raw(file, number, "", fields, None if fields is not None else "not an object")


def _epoch(sample: object) -> int:
    epoch = sample.get("epoch", 1) if isinstance(sample, Mapping) else 1
    return epoch if isinstance(epoch, int) else 1


def inspect_answer(raw: Raw, metric: str | None) -> LoggedAnswer | str:
    """The answer, or why the sample counts for nothing: it failed. Raises BadRow."""
    try:
        row = content_of(raw, ("id", "input", "output"))
        fields = raw.fields or {}
        if not is_empty(fields.get("error")):
            return "failed"
        prompt, choices = _prompt(raw, fields)
        answer = _completion(raw, row)
        metric, score = _score(row, fields, metric)
        name, epoch = name_in(fields["id"]) or "", str(fields.get("epoch", 1))
        return with_prompt(
            row,
            LoggedAnswer(prompt, answer, score, raw.file, raw.line, name, choices, epoch, metric),
        )
    except BadRow as problem:
        what = f"sample {raw.line}: {problem.what}"
        raise BadRow(problem.file, problem.line, what, problem.advice) from None


def _prompt(raw: Raw, fields: Mapping[str, Any]) -> tuple[Turns, tuple[str, ...]]:
    """The prompt, and the choices that it does not show."""
    messages = fields.get("messages")
    messages = messages if isinstance(messages, list) else []
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    if len(roles) > 1 and roles[-1] == "assistant" and "assistant" not in roles[:-1]:
        return prompt_in(raw, messages[:-1], "messages"), ()
    choices = fields.get("choices") or []
    return prompt_in(raw, fields["input"], "input"), tuple(map(str, choices))


def _completion(raw: Raw, row: RowContent) -> str:
    output = row.value("output")
    if not isinstance(output, Mapping):
        raise row.bad("output: not an object", _ADVICE)
    if "completion" in output:
        return row.string(output["completion"], "output.completion")
    try:  # of 2024
        message = output["choices"][0]["message"]
    except (LookupError, TypeError):
        raise row.bad("output: no completion", _ADVICE) from None
    return prompt_in(raw, message, "output")[0].text


def _score(
    row: RowContent, fields: Mapping[str, Any], metric: str | None
) -> tuple[str, float | None]:
    """Its name, empty where the sample has no score, and its value."""
    scores = fields.get("scores") or {}
    if not isinstance(scores, Mapping):
        raise row.bad("scores: not an object", _ADVICE)
    values = dict(_scalars(scores))
    if metric is not None and metric not in values:
        advice = named_advice(list(values)) if values else "score the log: inspect score"
        raise row.bad(f"no score {metric}", advice)
    if not values:
        return "", None
    name = metric or next(iter(values))
    return name, _number(row, values[name], f"score {name}")


def _scalars(scores: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each score by its name; a score with keys gives one for each."""
    for name, score in scores.items():
        value = score.get("value") if isinstance(score, Mapping) else score
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            yield name, value


def _number(row: RowContent, value: object, label: str) -> float | None:
    if is_empty(value):
        return None
    if not isinstance(value, str):
        return score_in(row, value, label)
    if value in _LETTERS:
        return _LETTERS[value]
    try:
        return score_in(
            row, _WORDS[value.lower()] if value.lower() in _WORDS else float(value), label
        )
    except ValueError:
        what = f"{label}: {reprlib.repr(value)}, neither C, P, I or N nor a number"
        advice = "name another score with --fields score=NAME, or convert it in the scorer"
        raise row.bad(what, advice) from None
