"""Rows and files that nobody would write: none of them ends in a traceback. `make fuzz` tries many
more."""

import gzip
import io
import json
import os
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fuzz import ENDINGS, read_all
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from made_run import write_run

from prism_select.report.run_page import write_report

NASTY = (
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "{{ 7 * 7 }}{% raw %}",
    '" onload="alert(1)',
    "javascript:alert(1)",
    "\u202egnp.exe",
    "\x1b[2J",
    "]]>",
    "\\u003c",
)
TRIES = int(os.environ.get("FUZZ", "150"))
SHARED = settings(max_examples=TRIES, deadline=None, suppress_health_check=list(HealthCheck))

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters())
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        key: SCALARS | st.sampled_from(["user", "assistant"])
        for key in ("role", "from", "content", "value")
    },
)
VALUES = st.recursive(
    SCALARS
    | st.lists(MESSAGE, max_size=3)
    | st.fixed_dictionaries({"text": SCALARS, "label": SCALARS}),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = (
    "messages prompt completion response instruction input output conversations text question "
    "choices answer system history tools images"
)
NAMES = st.sampled_from(
    [*FIELDS.split(), "answerKey", "chosen", "rejected", "id", "source"]
) | st.text(max_size=4)
ROWS = st.dictionaries(NAMES, VALUES, max_size=6)
LINES = (
    ROWS.map(lambda row: json.dumps(row).encode())
    | st.binary(max_size=60)
    | st.text(max_size=60).map(str.encode)
)

WHOLE: list[Mapping[str, Any]] = [
    {
        "id": f"row {row}",
        "prompt": f'"Question", {row}?\n',
        "completion": "x" * row,
        "source": "é\u2028",
    }
    for row in range(40)
]


def packed(data: bytes, ending: str) -> bytes:
    if ending.endswith("gz"):
        return gzip.compress(data, 1)
    return zstandard.compress(data) if ending.endswith("zst") else data


def sound(ending: str) -> bytes:
    """A good file of this kind."""
    if ending == "parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([dict(row) for row in WHOLE]), buffer)
        return buffer.getvalue()
    if ending == "arrow":
        table = pa.Table.from_pylist([dict(row) for row in WHOLE])
        with pa.BufferOutputStream() as buffer:
            with pa.ipc.new_stream(buffer, table.schema) as writer:
                writer.write_table(table, max_chunksize=7)
            return bytes(buffer.getvalue())
    if ending.startswith("csv"):
        cells = [list(WHOLE[0]), *([str(value) for value in row.values()] for row in WHOLE)]
        text = "\n".join(
            ",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in cells
        )
    else:
        text = json.dumps(WHOLE, indent=1) if ending.startswith("json.") or ending == "json" else ""
        text = text or "\n".join(json.dumps(row) for row in WHOLE)
    return packed(text.encode(), ending)


@given(
    st.lists(LINES, min_size=1, max_size=12),
    st.sampled_from(["jsonl", "json", "csv", "jsonl.gz", "csv.zst"]),
)
@SHARED
def test_no_row_ends_in_a_traceback(tmp_path: Path, lines: list[bytes], ending: str) -> None:
    path = tmp_path / f"pool.{ending}"
    path.write_bytes(packed(b"\n".join(lines), ending))
    read_all(path)


EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 30), st.binary(max_size=6)), min_size=1, max_size=6
)


@pytest.mark.parametrize("ending", ENDINGS)
@given(EDITS)
@SHARED
def test_no_damage_to_a_file_ends_in_a_traceback(tmp_path: Path, ending: str, edits: Any) -> None:
    data = sound(ending)
    for share, cut, put in edits:
        at = int(share * len(data))
        data = data[:at] + put + data[at + cut :]
    path = tmp_path / f"pool.{ending}"
    path.write_bytes(data)
    read_all(path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_files_that_are_damaged_are_good_before(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"pool.{ending}"
    path.write_bytes(sound(ending))
    assert read_all(path) == len(WHOLE)


NUMBERS = st.floats(-1e9, 1e9) | st.just(float("nan"))
TEXTS = st.text(max_size=40) | st.text(st.characters(), max_size=40) | st.sampled_from(NASTY)


@settings(
    SHARED, max_examples=max(10, TRIES // 10), phases=[Phase.generate]
)  # a page is slow to make smaller
@given(
    st.lists(st.tuples(TEXTS, TEXTS, TEXTS, TEXTS), min_size=3, max_size=6),
    st.lists(NUMBERS, min_size=6, max_size=6),
)
def test_no_text_of_a_pool_becomes_markup_of_the_page(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]], scores: list[float]
) -> None:
    """The page of odd rows has the tags of a page of plain ones, and its data the texts as they
    are."""
    folder = tmp_path_factory.mktemp("page")
    names = ("id", "source", "prompt", "completion")
    odd = [
        dict(
            zip(
                names, ("a" + text.encode("utf-8", "replace").decode() for text in row), strict=True
            )
        )
        for row in rows
    ]
    page = write_report(str(write_run(folder / "run", odd, scores[: len(odd)]))).read_text(
        encoding="utf-8"
    )
    seen = Scripts()
    seen.feed(page)
    assert sorted(seen.kinds) == ["", "", "application/json"]  # Vega, the page's own, and the data
    assert not seen.handlers and not seen.links
    text = json.dumps(json.loads(seen.data), ensure_ascii=False)
    if len(dict.fromkeys(row["id"] for row in odd)) == len(
        odd
    ):  # rows whose id repeats are quarantined
        for row, score in zip(odd, scores, strict=False):
            assert score != score or json.dumps(row["completion"], ensure_ascii=False)[1:-1] in text


class Scripts(HTMLParser):
    """Scripts of a page by their type, what stands in the one with data, and what could run or
    fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds, self.handlers, self.links, self.data = list[str](), list[str](), list[str](), ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "script":
            self.kinds.append(values.get("type") or "")
        self.handlers += [name for name in values if name.startswith("on")]
        self.links += [
            value
            for name in ("src", "href")
            if (value := values.get(name)) and not value.startswith("#")
        ]

    def handle_data(self, data: str) -> None:
        if self.kinds and self.kinds[-1] == "application/json" and not self.data:
            self.data = data
