"""Files to rows, and rows to examples and pairs: nothing is lost, nothing bad passes in silence."""

import csv
import gzip
import io
import json
import random
import sys
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]
import pytest
import zstandard
from conftest import PEAK, prism_apart
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prism_select.data import files, json_rows, streams
from prism_select.data.fields import Names, explicit_id
from prism_select.data.files import find_files, read_rows, read_texts
from prism_select.data.formats import (
    Format,
    detect_pool,
    detect_target,
    parse_fields,
    to_example,
    to_pairs,
)
from prism_select.data.records import Example, Pair, Raw, Turn
from prism_select.run.errors import BadFile, BadOption, BadRow, PrismError

FIXTURE_IS_SHARED = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(path: Path, data: bytes | str) -> str:
    data = data.encode() if isinstance(data, str) else data
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return str(path)


def rows(path: Path, data: bytes | str) -> list[Raw]:
    return list(read_rows(write(path, data)))


def problem(path: Path, data: bytes | str) -> str:
    (raw,) = rows(path, data)
    assert raw.fields is None and raw.problem is not None
    return raw.problem


def lines_and_fields(result: Iterable[Raw]) -> list[tuple[int, object]]:
    return [(raw.line, raw.fields) for raw in result]


# ---------------------------------------------------------------- finding files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".cache").mkdir()
    for name in (
        "b.jsonl",
        "a.csv",
        "deep/c.json.gz",
        "deep/er/d.PARQUET",
        "notes.md",
        ".cache/x.jsonl",
    ):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def names(files: list[str], folder: Path) -> list[str]:
    return [str(Path(file).relative_to(folder)) for file in files]


def test_a_folder_gives_its_supported_files_sorted_and_no_hidden_ones(folder: Path) -> None:
    assert names(find_files([str(folder)]), folder) == [
        "a.csv",
        "b.jsonl",
        "deep/c.json.gz",
        "deep/er/d.PARQUET",
    ]


def test_globs_match_at_any_depth_and_reach_into_folders(folder: Path) -> None:
    assert names(find_files([f"{folder}/**/*.json*"]), folder) == ["b.jsonl", "deep/c.json.gz"]
    assert names(find_files([f"{folder}/d*"]), folder) == ["deep/c.json.gz", "deep/er/d.PARQUET"]


def test_a_file_reached_twice_is_listed_once_where_it_came_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "link").symlink_to(folder / "deep")
    monkeypatch.chdir(folder)
    assert find_files(["deep/c.json.gz", "./deep", "link/*.gz", str(folder / "deep")]) == [
        "deep/c.json.gz",
        "./deep/er/d.PARQUET",
    ]


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path: Path) -> None:
    file = write(tmp_path / "pool[1].jsonl", "")
    assert find_files([file]) == [file]
    (tmp_path / "data[1]").mkdir()
    inner = write(tmp_path / "data[1]" / "x.jsonl", "")
    assert find_files([str(tmp_path / "data[1]")]) == [inner]


def test_hub_names_are_kept() -> None:
    assert find_files(["hub:org/name:test", "hub:org/name", "hub:org/name"]) == [
        "hub:org/name:test",
        "hub:org/name",
    ]


@pytest.mark.parametrize("name", ["missing.jsonl", "*.jsonlx", "notes.md", "empty", ""])
def test_a_pattern_that_reaches_nothing_is_refused(folder: Path, name: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(BadFile, match=r"no such file|ending"):
        find_files([str(folder / name) if name else ""])


def test_a_file_that_may_not_be_read_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(BadFile, match=r"a\.csv: permission denied"):
        find_files([str(folder)])


# ---------------------------------------------------------------- JSON lines


@pytest.mark.parametrize(
    "ending", ["jsonl", "jsonl.gz", "jsonl.zst", "json", "json.gz", "json.zst", "JSONL"]
)
def test_json_lines_keep_their_text_and_line_in_every_packing(tmp_path: Path, ending: str) -> None:
    result = rows(tmp_path / f"x.{ending}", '{"a":  "é\\u00e9"}\r\n\n  \n{"a": 2, "a": NaN}')
    assert [(raw.line, raw.text) for raw in result] == [
        (1, '{"a":  "é\\u00e9"}'),
        (4, '{"a": 2, "a": NaN}'),
    ]
    assert result[0].fields == {"a": "éé"}
    assert all(raw.file.endswith(ending) and raw.problem is None for raw in result)


def test_concatenated_archives_are_one_file(tmp_path: Path) -> None:
    for name, pack in (("x.jsonl.gz", gzip.compress), ("x.jsonl.zst", zstandard.compress)):
        (tmp_path / name).write_bytes(pack(b'{"a": 1}\n') + pack(b'{"a": 2}\n'))
        assert lines_and_fields(read_rows(str(tmp_path / name))) == [(1, {"a": 1}), (2, {"a": 2})]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path, name: str) -> None:
    (raw,) = rows(tmp_path / name, b'\xef\xbb\xbf{"a": 1}\n')
    assert (raw.text, raw.fields) == ('{"a": 1}', {"a": 1})
    assert rows(tmp_path / name, b"\xef\xbb\xbf") == []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.jsonl.gz"])
def test_utf_16_is_refused_by_name(tmp_path: Path, encoding: str, name: str) -> None:
    with pytest.raises(BadFile, match=r"UTF-16.*iconv"):
        rows(tmp_path / name, '{"a": 1}\n'.encode(encoding))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"a": 1 "b": 2}', "broken JSON: Expecting ',' delimiter at column 9"),
        (b'{"a": "x}', "broken JSON: Unterminated string starting at column 7"),
        (b'{"a": "x\0"}', "broken JSON: Invalid control character at column 9"),
        (b'{"a": 1} {"a": 2}', "broken JSON: Extra data at column 10"),
        ('{"é": "'.encode() + b'\xff\xfe"}', "invalid UTF-8 at byte 9 of the line"),
        (b"[1]", "an array where an object was expected"),
        (b'"x"', "a string where an object was expected"),
        (b" null", "null where an object was expected"),
        (b"-1", "a number where an object was expected"),
        (b"NaN", "a number where an object was expected"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "broken JSON: nested too deeply"),
    ],
)
def test_a_line_that_cannot_be_read_says_why_and_costs_only_itself(
    tmp_path: Path, line: bytes, expected: str
) -> None:
    first, bad, last = rows(tmp_path / "x.jsonl", b'{"n": 1}\n' + line + b'\n{"n": 3}\n')
    assert (first.fields, last.fields, last.line) == ({"n": 1}, {"n": 3}, 3)
    assert (bad.line, bad.fields, bad.problem) == (2, None, expected)
    assert bad.text == line.decode(errors="backslashreplace")


def test_numbers_of_any_size_are_accepted(tmp_path: Path) -> None:
    (raw,) = rows(
        tmp_path / "x.jsonl",
        '{"a": 1e999, "b": ' + "9" * 5000 + ', "c": -Infinity, "d": 12345678901234567890}',
    )
    assert raw.fields == {
        "a": float("inf"),
        "b": float("inf"),
        "c": float("-inf"),
        "d": 12345678901234567890,
    }


# ---------------------------------------------------------------- JSON arrays


def test_elements_of_an_array_come_with_their_true_lines_on_one_line(tmp_path: Path) -> None:
    result = rows(
        tmp_path / "x.json", '\n[\n {"a": 1,\n  "b": [\n 2]},{"a":"\\n"}\n\n , {"c":  3}\n]\n'
    )
    assert [(raw.line, raw.text) for raw in result] == [
        (3, '{"a": 1, "b": [2]}'),
        (5, '{"a":"\\n"}'),
        (7, '{"c":  3}'),
    ]


def test_the_text_of_a_pretty_printed_array_is_its_plain_dump(tmp_path: Path) -> None:
    value = {
        "id": "é,\u2028",
        "messages": [{"role": "user", "content": "a\nb"}],
        "n": [],
        "m": {"x": 1.0},
    }
    (raw,) = rows(tmp_path / "x.json", json.dumps([value], indent=4, ensure_ascii=False))
    assert raw.text == json.dumps(value, ensure_ascii=False)


@pytest.mark.parametrize("data", ["", " \n ", "[]", "\n[ \n ]\n"])
def test_an_empty_file_or_array_has_no_rows(tmp_path: Path, data: str) -> None:
    assert rows(tmp_path / "x.json", data) == []


@pytest.mark.parametrize(
    ("data", "line", "what"),
    [
        ('[\n{"a": 1}\n{"a": 2}]', 3, "Expecting ',' delimiter"),
        ('[\n{"a": 1},\n{"a"\n 2}]', 4, "Expecting ':' delimiter"),
        ('[\n{"a": 1},\n]', 3, "Expecting value"),
        ('[{"a": 1}\n', 2, "no end"),
        ('[{"a": 1},\n{"a": "tru', 2, "Unterminated string"),
        ('[{"a": 1}]\n{"a": 2}', 2, "more text after the end"),
        ("[\n\n" + "[" * 100_000, 3, "nested too deeply"),
        ("[", 1, "Expecting value"),
    ],
)
def test_a_broken_array_is_refused_with_its_line(
    tmp_path: Path, data: str, line: int, what: str
) -> None:
    with pytest.raises(BadFile, match=what) as caught:
        rows(tmp_path / "x.json", data)
    assert caught.value.line == line


def test_rows_before_the_break_of_an_array_are_still_given(tmp_path: Path) -> None:
    reading = read_rows(write(tmp_path / "x.json", '[{"a": 1}, oops]' + " " * 100))
    assert next(reading).fields == {"a": 1}
    with pytest.raises(BadFile):
        next(reading)


def test_bad_elements_of_a_sound_array_cost_only_themselves(tmp_path: Path) -> None:
    result = rows(tmp_path / "x.json", b'[{"a": 1},\n "x",\n{"b": "\xff"},\n{"a": "\xc3\xa9"}]')
    assert [(raw.line, raw.problem) for raw in result] == [
        (1, None),
        (2, "a string where an object was expected"),
        (3, "invalid UTF-8 at byte 8 of the row"),
        (4, None),
    ]
    assert result[2].text == '{"b": "\\xff"}'
    assert result[3].fields == {"a": "é"}


def test_a_json_file_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="neither a JSON array nor JSON lines"):
        rows(tmp_path / "x.json", '"a"')


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_an_array_does_not_depend_on_where_it_is_cut(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (streams, files, json_rows):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    values = [
        {"é": '😀\\"', "n": n, "x": -1.25e10, "t": [True, None], "long": "y" * 50} for n in range(9)
    ]
    result = rows(
        tmp_path / "x.json", "[1.5e3,\n" + ",\n".join(map(json.dumps, values)) + "\n,123456]"
    )
    assert [raw.fields for raw in result] == [None, *values, None]
    assert [raw.text for raw in (result[0], result[-1])] == ["1.5e3", "123456"]
    assert [raw.line for raw in result] == [*range(1, 11), 11]


def test_the_memory_for_an_array_does_not_grow_with_the_file(tmp_path: Path) -> None:
    element = json.dumps({"prompt": "x" * 500, "completion": "y" * 500})
    file = write(tmp_path / "x.json", "[" + ",\n".join([element] * 6000) + "]")
    tracemalloc.start()
    assert sum(1 for _ in read_rows(file)) == 6000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * streams.CHUNK_BYTES < Path(file).stat().st_size / 8


def test_a_break_in_a_long_array_is_found_without_reading_on(tmp_path: Path) -> None:
    file = write(tmp_path / "x.json", '[{"a" 1},' + '{"a": 1},\n' * 500_000)
    tracemalloc.start()
    with pytest.raises(BadFile, match=":1: broken JSON array"):
        list(read_rows(file))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * streams.CHUNK_BYTES


# ---------------------------------------------------------------- CSV


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "x.csv.zst"])
def test_csv_rows_start_where_they_start(tmp_path: Path, name: str) -> None:
    data = '\ufeffprompt, n\r\n"a\nb ""q""\rc",1\r\n\r\n é ,2.50\r\n"",\r\n'
    result = rows(tmp_path / name, data)
    assert lines_and_fields(result) == [
        (2, {"prompt": 'a\nb "q"\rc', "n": "1"}),
        (5, {"prompt": " é ", "n": "2.50"}),
        (6, {"prompt": "", "n": ""}),
    ]
    assert result[1].text == '{"prompt": " é ", "n": "2.50"}'


def test_csv_rows_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    result = rows(tmp_path / "x.csv", b'a,b\n1\n1,2,3\n\xff,2\n\0,2\n"x"y,2\n"1\n",2\n3,"4\n')
    assert [(raw.line, raw.problem) for raw in result] == [
        (2, "1 columns where the header has 2"),
        (3, "3 columns where the header has 2"),
        (4, "invalid UTF-8 at byte 1 of the row"),
        (5, "NUL byte"),
        (6, "broken CSV: ',' expected after '\"'"),
        (7, None),
        (9, "broken CSV: unexpected end of data"),
    ]
    assert (result[1].text, result[2].text, result[4].text) == ("1,2,3", "\\xff,2", '"x"y,2')


def test_a_csv_field_may_be_longer_than_the_default_limit(tmp_path: Path) -> None:
    long = "x" * 200_000
    (raw,) = rows(tmp_path / "x.csv", f"a\n{long}\n")
    assert raw.fields == {"a": long}


@pytest.mark.parametrize(
    ("header", "what"), [(b"a,b,a", "two columns"), (b"a,\xff", "UTF-8"), (b'"a"b', "broken CSV")]
)
def test_a_csv_header_must_name_the_columns(tmp_path: Path, header: bytes, what: str) -> None:
    with pytest.raises(BadFile, match=f"x.csv:2: the header: .*{what}"):
        rows(tmp_path / "x.csv", b"\n" + header + b"\n1,2,3\n")


def test_a_csv_of_a_header_alone_has_no_rows(tmp_path: Path) -> None:
    assert rows(tmp_path / "x.csv", "a,b\n") == rows(tmp_path / "x.csv", "") == []


# ---------------------------------------------------------------- parquet, damage, hub


def test_parquet_rows_are_numbered_over_batches(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"n": range(600), "m": [[{"role": "user", "content": "é"}]] * 600}), path
    )
    result = list(read_rows(str(path)))
    assert [(raw.line, raw.fields["n"]) for raw in result if raw.fields] == [
        (n + 1, n) for n in range(600)
    ]
    assert result[0].text == '{"n": 0, "m": [{"role": "user", "content": "é"}]}'


def test_the_memory_for_a_table_does_not_grow_with_the_file(tmp_path: Path) -> None:
    file, small, draw = tmp_path / "x.parquet", tmp_path / "small.parquet", random.Random(0)
    pq.write_table(pa.table({"text": ["a"]}), small)
    with pq.ParquetWriter(file, pa.schema([("text", pa.string())]), compression="none") as writer:
        for _ in range(60):
            writer.write_table(pa.table({"text": [draw.randbytes(1000).hex() for _ in range(500)]}))
    script = (
        "from prism_select.data.files import read_rows\n"
        "assert list(read_rows(sys.argv[2]))\nbefore = peak()\n"
        "assert sum(1 for _ in read_rows(sys.argv[1])) == 30_000\nprint(peak() - before)"
    )
    done = prism_apart("-c", PEAK + script, file, small, module=False)
    assert file.stat().st_size > 60e6 and int(done.out) < 30e6


def test_a_parquet_cell_that_is_not_utf8_costs_only_its_row(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    bad = pa.array([b"x", b"\xff"]).view(pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"a": bad, "b": [1, 2]}), path)
    good, wrong = read_rows(str(path))
    assert (good.fields, wrong.fields, wrong.line, wrong.text) == (
        {"a": "x", "b": 1},
        None,
        2,
        '{"a": null, "b": 2}',
    )
    assert wrong.problem and wrong.problem.startswith(
        "column 'a': 'utf-8' codec can't decode byte 0xff"
    )


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.json.gz", "x.csv.zst"])
def test_a_truncated_archive_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write(path, "[" + ",\n".join(f'{{"a": {n}}}' for n in range(9000)) + "]")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BadFile, match="cannot be read: Truncated"):
        list(read_rows(str(path)))
    path.write_bytes(b"")
    with pytest.raises(BadFile, match="archive is empty"):
        list(read_rows(str(path)))


def test_damaged_missing_and_mislabelled_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"n": range(600)}), path)
    path.write_bytes(path.read_bytes()[:-5])
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("x.parquet", "plain.jsonl.gz", "missing.jsonl", "missing.parquet", "folder.jsonl"):
        with pytest.raises(BadFile, match=r"cannot be read: .*cut short or damaged$"):
            list(read_rows(str(tmp_path / name)))
    with pytest.raises(BadFile, match="ending is not supported"):
        list(read_rows(str(tmp_path / "x.txt")))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        write(
            tmp_path / "set" / f"{split}.jsonl",
            "".join(f'{{"text": "{split} {n}"}}\n' for n in range(3)),
        )
    return tmp_path / "set"


def test_a_local_folder_is_read_as_a_hub_data_set(hub: Path) -> None:
    assert lines_and_fields(read_rows(f"hub:{hub}")) == [
        (n + 1, {"text": f"train {n}"}) for n in range(3)
    ]
    (first, *_) = read_rows(f"hub:{hub}:test")
    assert (first.file, first.text) == (f"hub:{hub}:test", '{"text": "test 0"}')
    example = to_example(first, Format("text"), {})
    assert (example.id, example.source) == ("set:test:1", "set")


@pytest.mark.parametrize("name", ["hub:{}:nosplit", "hub:{}/missing"])
def test_a_hub_data_set_that_cannot_be_loaded_is_refused_in_one_line(hub: Path, name: str) -> None:
    with pytest.raises(BadFile, match=r"cannot be read: .*check the name, the split") as caught:
        list(read_rows(name.format(hub)))
    assert "\n" not in str(caught.value)


def test_the_hub_needs_its_package_and_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadOption, match="names no data set"):
        list(read_rows("hub:"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadOption, match=r"pip install 'prism-select\[hub\]'"):
        list(read_rows("hub:org/name"))


# ---------------------------------------------------------------- properties

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
OBJECTS = st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=8)


@given(OBJECTS, st.sampled_from(["x.jsonl", "x.jsonl.gz", "x.jsonl.zst"]), st.booleans())
@FIXTURE_IS_SHARED
def test_any_objects_survive_json_lines(
    tmp_path: Path, objects: list[dict[str, Any]], name: str, escape: bool
) -> None:
    result = rows(
        tmp_path / name, "".join(json.dumps(one, ensure_ascii=escape) + "\n" for one in objects)
    )
    assert lines_and_fields(result) == list(enumerate(objects, start=1))
    assert [json.loads(raw.text) for raw in result] == objects


@given(OBJECTS, st.sampled_from([None, 0, 1]), st.sampled_from([3, 64, 1 << 16]), st.booleans())
@FIXTURE_IS_SHARED
def test_any_objects_survive_a_json_array(
    tmp_path: Path, objects: list[dict[str, Any]], indent: int | None, chunk: int, escape: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in (streams, files, json_rows):
            patch.setattr(module, "CHUNK_BYTES", chunk)
        text = json.dumps(objects, indent=indent, ensure_ascii=escape)
        result = rows(tmp_path / "x.json", text)
    assert [raw.fields for raw in result] == [json.loads(raw.text) for raw in result] == objects
    lines = text.split("\n")
    for raw, one in zip(result, objects, strict=True):
        remaining = "\n".join(lines[raw.line - 1 :])
        assert indent is None or json.JSONDecoder().raw_decode(remaining.strip())[0] == one
        assert "\n" not in raw.text


@given(
    st.lists(
        st.lists(
            st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=2, max_size=2
        )
    )
)
@FIXTURE_IS_SHARED
def test_any_cells_survive_csv(tmp_path: Path, cells: list[list[str]]) -> None:
    output = io.StringIO()
    csv.writer(output, quoting=csv.QUOTE_ALL).writerows([["a", "b"], *cells])
    assert [raw.fields for raw in rows(tmp_path / "x.csv", output.getvalue())] == [
        {"a": a, "b": b} for a, b in cells
    ]


ENDINGS = ["jsonl", "json", "csv", "parquet", "jsonl.gz", "json.zst"]
NEARLY = st.lists(
    st.sampled_from(
        [b"[", b"]", b"{", b"}", b'"', b",", b":", b"1", b"\n", b"\xff", b"a", b"\\", b"\0", b"\r"]
    )
)


@given(st.binary(max_size=80) | NEARLY.map(b"".join), st.sampled_from(ENDINGS), st.booleans())
@FIXTURE_IS_SHARED
def test_any_bytes_give_rows_or_a_prism_error(
    tmp_path: Path, data: bytes, ending: str, packed: bool
) -> None:
    path = tmp_path / f"x.{ending}"
    write(path, data) if packed else path.write_bytes(data)
    try:
        for raw in read_rows(str(path)):
            assert (raw.fields is None) == (raw.problem is not None)
            raw.text.encode()
            assert "\n" not in raw.text or ending == "csv"
    except PrismError as error:
        assert "\n" not in str(error)


FIELDS = st.sampled_from(
    [
        *(
            "messages",
            "prompt",
            "completion",
            "response",
            "instruction",
            "input",
            "output",
            "conversations",
            "text",
        ),
        *("question", "choices", "answer", "answerKey", "chosen", "rejected", "id", "source"),
        *("system", "history", "tools", "images", "audios"),
    ]
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        key: st.sampled_from(["user", "assistant", "gpt", "tool"]) | VALUES
        for key in ("role", "from")
    },
) | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text()})
CHOICES = st.fixed_dictionaries(
    {"text": st.lists(st.text()), "label": st.lists(st.text(max_size=1))}
)
CONTENT = (
    VALUES
    | st.text(st.characters())
    | st.lists(MESSAGE, max_size=3)
    | st.lists(st.text())
    | CHOICES
)


@given(
    st.dictionaries(FIELDS, CONTENT, max_size=8),
    st.dictionaries(FIELDS, st.lists(FIELDS, min_size=1, max_size=2), max_size=2),
)
@settings(max_examples=300, deadline=None)
def test_any_row_means_something_or_is_a_bad_row(fields: dict[str, Any], mapping: Names) -> None:
    raw = Raw("dir/pool.v1.jsonl.gz", 7, "", fields)
    try:
        check(to_example(raw, detect_pool(fields, mapping), mapping))
    except BadRow as error:
        str(error).encode()
    try:
        for pair in to_pairs(raw, detect_target(fields, mapping), mapping):
            for side in (pair.chosen, pair.rejected):
                check(side)
                assert (
                    side.prompt_turns > 0
                    and side.turns[: side.prompt_turns] == pair.chosen.turns[: side.prompt_turns]
                )
    except BadRow as error:
        str(error).encode()


def check(example: Example) -> None:
    supervised = [
        turn for turn in example.turns[example.prompt_turns :] if turn.role in ("assistant", "text")
    ]
    assert any(turn.text.strip() for turn in supervised)
    for text in (example.id, example.source, *(turn.text for turn in example.turns)):
        text.encode()


# ---------------------------------------------------------------- pool formats


def raw_of(**fields: Any) -> Raw:
    return Raw("dir/pool.v1.jsonl.gz", 7, "", fields)


def example_of(mapping: Names | None = None, **fields: Any) -> Example:
    raw = raw_of(**fields)
    return to_example(raw, detect_pool(fields, mapping or {}), mapping or {})


def pairs_of(mapping: Names | None = None, **fields: Any) -> list[Pair]:
    raw = raw_of(**fields)
    return to_pairs(raw, detect_target(fields, mapping or {}), mapping or {})


def turns_of(example: Example) -> tuple[list[str], int]:
    return [f"{turn.role}: {turn.text}" for turn in example.turns], example.prompt_turns


def message(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


def spoken(role: str, content: object) -> dict[str, object]:
    return {"from": role, "value": content}


DIALOGUE = [message("user", "u1"), message("assistant", "a1"), message("user", "u2")]

POOL = [
    ("messages", {"messages": [message("developer", "s"), *DIALOGUE, message("assistant", "a2")]},
     ["system: s", "user: u1", "assistant: a1", "user: u2", "assistant: a2"], 0),
    ("messages",
     {"messages": [message("user", [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]),
                               message("function", "f"), message("assistant", "a")], "prompt": "p",
                               "completion": "c"},
     ["user: xy", "tool: f", "assistant: a"], 0),
    ("prompt+completion", {"prompt": "p", "completion": " c"}, ["user: p", "assistant:  c"], 1),
    ("prompt+completion", {"prompt": DIALOGUE, "completion": [message("assistant", "a2")]},
     ["user: u1", "assistant: a1", "user: u2", "assistant: a2"], 3),
    ("prompt+completion", {"prompt": DIALOGUE, "completion": "a2"},
     ["user: u1", "assistant: a1", "user: u2", "assistant: a2"], 3),
    ("prompt+completion", {"prompt": "u1", "completion": DIALOGUE},
     ["user: u1", "assistant: a1", "user: u2"], 1),
    ("prompt+response", {"prompt": "p", "response": "c"}, ["user: p", "assistant: c"], 1),
    ("prompt+answer", {"prompt": "p", "answer": "c"}, ["user: p", "assistant: c"], 1),
    ("instruction+output",
     {"instruction": "i", "input": "", "output": "o", "chosen": "c", "rejected": "r"},
     ["user: i", "assistant: o"], 1),
    ("instruction+output", {"instruction": "i", "input": "n", "output": "o", "text": "t"},
     ["user: i\n\nn", "assistant: o"], 1),
    ("instruction+output", {"instruction": "i", "input": None, "output": "o"},
     ["user: i", "assistant: o"], 1),
    ("instruction+response", {"instruction": "i", "response": "o"}, ["user: i", "assistant: o"], 1),
    ("conversations",
     {"conversations": [spoken("system", "s"), spoken("human", "h"), spoken("gpt", "g"),
                                         spoken("observation", "t"), spoken("bot", "b")]},
     ["system: s", "user: h", "assistant: g", "tool: t", "assistant: b"], 0),
    ("conversations", {"conversations": DIALOGUE}, ["user: u1", "assistant: a1", "user: u2"], 0),
    ("question+answer", {"question": "q", "answer": "a"}, ["user: q", "assistant: a"], 1),
    ("question+choices+answer", {"question": "q", "choices": ["x", "y"], "answer": 1},
     ["user: q", "assistant: y"], 1),
    ("text", {"text": "t", "question": "q"}, ["text: t"], 0),
    ("prompt+completion", {"messages": None, "prompt": "p", "completion": "c"},
     ["user: p", "assistant: c"], 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "turns", "prompt_turns"), POOL)
def test_each_pool_format_is_detected_and_read(
    name: str, fields: dict[str, Any], turns: list[str], prompt_turns: int
) -> None:
    assert detect_pool(fields, {}).name == name
    assert turns_of(example_of(**fields)) == (turns, prompt_turns)


def test_an_unknown_pool_row_is_told_what_is_known() -> None:
    with pytest.raises(
        BadRow,
        match=r"x.jsonl:3: .*'prompt', 'zzz'; known are messages, prompt\+completion.*--fields",
    ):
        detect_pool({"prompt": 1, "zzz": 2}, {}, "x.jsonl", 3)
    with pytest.raises(BadRow, match=r"fields are none.*chosen=good"):
        detect_target({}, {})


def test_ids_and_sources_are_the_row_s_own_or_made_of_its_place() -> None:
    made = example_of(text="t", id=None, source=" ")
    assert (made.id, made.source, made.file, made.line) == (
        "pool.v1.jsonl.gz:7",
        "pool.v1",
        "dir/pool.v1.jsonl.gz",
        7,
    )
    own = example_of(text="t", id=0, source="s")
    assert (own.id, own.source) == ("0", "s")
    assert [explicit_id(raw_of(id=value)) for value in (5, "x", "", None, True, 1.5)] == [
        "5",
        "x",
        None,
        None,
        None,
        None,
    ]
    assert explicit_id(raw_of(uid=5), {"id": ("uid",)}) == "5"
    assert explicit_id(Raw("f", 1, "", None, "broken")) is None


BAD_POOL = [
    ("prompt+completion", {"prompt": "p"}, "missing field: completion"),
    ("prompt+completion", {"prompt": "p", "completion": 4},
     "completion: a number where text or a list of messages"),
    ("prompt+completion", {"prompt": True, "completion": "c"}, "prompt: true or false where"),
    ("prompt+completion", {"prompt": None, "completion": "c"}, "prompt: null where"),
    ("prompt+completion", {"prompt": "p", "completion": " \n"}, "empty completion"),
    ("prompt+completion", {"prompt": "p", "completion": []}, "completion: an empty list"),
    ("prompt+completion", {"prompt": "p", "completion": [message("user", "u")]},
     "nothing is supervised"),
    ("prompt+completion", {"prompt": "p", "completion": [message("assistant", " ")]},
     "empty completion"),
    ("prompt+completion", {"prompt": "p\ud800", "completion": "c"},
     "prompt: not valid text: lone surrogate"),
    ("messages", {"messages": "hello"}, "messages: text where a list"),
    ("messages", {"messages": {"role": "user"}}, "messages: an object where a list"),
    ("messages", {"messages": ["hi"]}, r"messages\[0\]: text where a message"),
    ("messages", {"messages": [message("user", "u")]}, "nothing is supervised: no assistant turn"),
    ("messages", {"messages": [message("narrator", "u")]},
     r"messages\[0\]: unknown role 'narrator'"),
    ("messages", {"messages": [{"content": "u"}]}, r"messages\[0\]: no role"),
    ("messages", {"messages": [message("user", None)]}, r"messages\[0\] content: null where text"),
    ("messages", {"messages": [message("user", 3)]}, r"messages\[0\] content: a number where text"),
    ("messages", {"messages": [message("user", [{"type": "image"}])]}, "a part of type 'image'"),
    ("messages", {"messages": [message("user", ["x"])]}, "a part of type 'text'|where text was"),
    ("messages", {"messages": [message("assistant", "\udfff")]}, "lone surrogate"),
    ("messages", {"messages": [{**message("assistant", ""), "tool_calls": [{"id": 1}]}]},
     "a tool call"),
    ("instruction+output", {"instruction": "i", "input": 3, "output": "o"},
     "input: a number where text"),
    ("instruction+output", {"instruction": ["i"], "output": "o"}, "instruction: a list where text"),
    ("text", {"text": "  "}, "empty text"),
    ("text", {"text": {}}, "text: an object where text"),
    ("text", {"text": "t", "id": 1.5}, "id: a number where text"),
    ("text", {"text": "t", "id": True}, "id: true or false where text"),
    ("text", {"text": "t", "source": ["s"]}, "source: a list where text"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "what"), BAD_POOL)
def test_each_bad_pool_row_says_what_was_found(
    name: str, fields: dict[str, Any], what: str
) -> None:
    with pytest.raises(BadRow, match=what) as caught:
        to_example(raw_of(**fields), Format(name), {})
    assert (caught.value.file, caught.value.line) == ("dir/pool.v1.jsonl.gz", 7)


def test_a_row_that_could_not_be_read_is_bad_with_its_problem() -> None:
    with pytest.raises(BadRow, match="f:3: broken JSON"):
        to_example(Raw("f", 3, "{", None, "broken JSON: x"), Format("text"), {})


# ---------------------------------------------------------------- target formats

HH = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: go\n\nAssistant:"

TARGET = [
    ("prompt+chosen+rejected", {"prompt": "p", "chosen": "c", "rejected": "r"}, ["user: p"], "c",
     "r"),
    ("prompt+chosen+rejected", {"prompt": DIALOGUE, "chosen": [message("assistant", "c")],
                                "rejected": message("assistant", "r")},
     ["user: u1", "assistant: a1", "user: u2"], "c", "r"),
    ("prompt+chosen+rejected", {"prompt": "u2", "chosen": [*DIALOGUE, message("assistant", "c")],
                                "rejected": [*DIALOGUE, message("assistant", "r")]},
     ["user: u1", "assistant: a1", "user: u2"], "c", "r"),
    ("instruction+chosen+rejected",
     {"instruction": "i", "input": "n", "output": "o", "chosen": "c", "rejected": "r"},
     ["user: i\n\nn"], "c", "r"),
    ("question+chosen+rejected", {"question": "q", "chosen": "c", "rejected": "r"}, ["user: q"],
     "c", "r"),
    ("conversations+chosen+rejected",
     {"conversations": [spoken("human", "h")], "chosen": spoken("gpt", "c"),
                                       "rejected": spoken("gpt", "r")}, ["user: h"], "c", "r"),
    ("chosen+rejected", {"chosen": "Sky? It is blue", "rejected": "Sky? It is bluish"},
     ["user: Sky? It is "],
     "blue", "bluish"),
    ("chosen+rejected", {"chosen": "Say it: yes", "rejected": "Say it: yes sir"},
     ["user: Say it: "], "yes", "yes sir"),
    ("chosen+rejected", {"chosen": "問：你好。答：是", "rejected": "問：你好。答：不"},
     ["user: 問：你好。答："], "是", "不"),
    ("chosen+rejected", {"chosen": f"{HH} I do it", "rejected": f"{HH} I do not"}, [f"user: {HH}"],
     " I do it", " I do not"),
    ("chosen+rejected", {"chosen": [*DIALOGUE, message("assistant", "c")],
                         "rejected": [*DIALOGUE, message("assistant", "r")]},
     ["user: u1", "assistant: a1", "user: u2"], "c", "r"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "prompt", "chosen", "rejected"), TARGET)
def test_each_target_format_is_detected_and_read(
    name: str, fields: dict[str, Any], prompt: list[str], chosen: str, rejected: str
) -> None:
    assert detect_target(fields, {}).name == name
    (pair,) = pairs_of(**fields)
    assert turns_of(pair.chosen) == ([*prompt, f"assistant: {chosen}"], len(prompt))
    assert turns_of(pair.rejected) == ([*prompt, f"assistant: {rejected}"], len(prompt))
    assert pair.chosen.id == pair.rejected.id == "pool.v1.jsonl.gz:7"


BAD_TARGET = [
    ({"prompt": "p", "chosen": "c", "rejected": " c\n"}, "chosen is equal to rejected"),
    ({"prompt": "p", "chosen": [message("assistant", "c")], "rejected": "c"},
     "chosen is equal to rejected"),
    ({"prompt": "p", "chosen": " ", "rejected": "r"}, "empty chosen"),
    ({"prompt": "p", "chosen": "c", "rejected": ""}, "empty rejected"),
    ({"prompt": "p", "chosen": "c", "rejected": None}, "rejected: null where"),
    ({"conversations": "h", "chosen": "c", "rejected": "r"}, "conversations: text where a list"),
    ({"chosen": "same", "rejected": "same "}, "chosen is equal to rejected"),
    ({"chosen": "abc", "rejected": "abd"}, "share no prefix"),
    ({"chosen": "x y", "rejected": [message("assistant", "x")]}, "one is text, the other messages"),
    ({"chosen": HH + " ", "rejected": HH + " no"}, "empty chosen"),
    ({"chosen": DIALOGUE[:2], "rejected": [*DIALOGUE, message("assistant", "x")]},
     "different prompts"),
    ({"chosen": DIALOGUE[:2], "rejected": [*DIALOGUE[:2], message("assistant", "x")]},
     "empty chosen"),
    ({"chosen": [message("assistant", "a")], "rejected": [message("assistant", "b")]},
     "share no prefix"),
    ({"prompt": "u1", "chosen": DIALOGUE[:2], "rejected": [message("system", "s"), *DIALOGUE[:2]]},
     "different prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "what"), BAD_TARGET)
def test_each_bad_target_row_says_what_was_found(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(BadRow, match=what):
        pairs_of(**fields)


# ---------------------------------------------------------------- multiple choice

HUB = {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        (["x", "y", "z"], 0, "x"),
        (["x", "y", "z"], "2", "z"),
        (["x", "y", "z"], "B", "y"),
        (["x", "y", "z"], "c", "z"),
        (["x", "y", "z"], " y ", "y"),
        (["1", "2", "0"], "2", "2"),
        (["1", "2", "0"], 2, "0"),
        (["B", "A", "C"], "A", "A"),
        (HUB, "1", "x"),
        (HUB, 3, "z"),
        (HUB, "y", "y"),
        ({"text": ["x", "y", "z"], "label": None}, 1, "y"),
    ],
)
def test_the_answer_is_a_label_a_text_a_position_or_a_letter(
    choices: Any, answer: object, right: str
) -> None:
    pairs = pairs_of(question="q", choices=choices, answer=answer)
    assert {pair.chosen.turns[1].text for pair in pairs} == {right}
    texts = choices["text"] if isinstance(choices, dict) else choices
    assert [pair.rejected.turns[1].text for pair in pairs] == [
        text for text in texts if text != right
    ]
    assert example_of(question="q", choices=choices, answerKey=answer).turns == (
        Turn("user", "q"),
        Turn("assistant", right),
    )


@pytest.mark.parametrize(
    ("choices", "answer", "what"),
    [
        (["x"], 0, "choices: 1 where at least 2"),
        ("xy", 0, "choices: text where a list"),
        ([1, 2], 0, r"choices\[0\]: a number where text"),
        (["x", " "], 0, r"choices\[1\]: empty choice"),
        (["x", "y"], 2, "answer: 2 is out of range: there are 2 choices"),
        (["x", "y"], -1, "answer: -1 is out of range"),
        (["x", "y"], "C", "answer: C is out of range"),
        (["x", "y"], "w" * 99, "answer: 'www.*is not among the 2 choices"),
        (["x", "y"], "²", "not among"),
        (["x", "y"], "9" * 5000, "not among"),
        (["x", "y"], True, "answer: true or false where"),
        (["x", "y"], 1.0, "answer: a number where a position"),
        (["x", "x ", "y"], 0, "the right choice 'x' stands there twice"),
    ],
)
def test_bad_choices_say_what_was_found(choices: Any, answer: object, what: str) -> None:
    with pytest.raises(BadRow, match=what):
        pairs_of(question="q", choices=choices, answer=answer)


# ---------------------------------------------------------------- mapped fields


def test_fields_can_be_mapped() -> None:
    assert parse_fields(" prompt = question, completion=the response,") == {
        "prompt": ("question",),
        "completion": ("the response",),
    }
    assert parse_fields("prompt=a,prompt=b") == {"prompt": ("a", "b")}
    assert parse_fields("") == {}


@pytest.mark.parametrize("text", ["prompt", "prompt=", "=x", "colour=x", "prompt=a,prompt=a"])
def test_a_bad_mapping_is_refused(text: str) -> None:
    with pytest.raises(BadOption, match="--fields"):
        parse_fields(text)


def test_a_mapped_column_hides_the_standard_one_and_is_named_in_errors() -> None:
    mapping = parse_fields("prompt=question,completion=response,source=family")
    fields = {"question": "q", "response": "r", "prompt": "hidden", "answer": "a", "family": "f"}
    assert detect_pool(fields, mapping).name == "prompt+completion"
    example = example_of(mapping, **fields)
    assert (turns_of(example), example.source) == ((["user: q", "assistant: r"], 1), "f")
    with pytest.raises(BadRow, match=r"missing field: completion \(column 'response'\)"):
        to_example(raw_of(question="q"), Format("prompt+completion"), mapping)


def test_a_mapping_for_other_columns_leaves_a_row_as_it_is() -> None:
    mapping = parse_fields("prompt=question,completion=response")
    assert turns_of(example_of(mapping, prompt="p", completion="c"))[0] == [
        "user: p",
        "assistant: c",
    ]


def test_a_field_may_have_a_column_in_each_file_and_within_an_object() -> None:
    mapping = parse_fields(
        "prompt=Frage,prompt=Aufgabe,completion=Antwort,source=meta.site.name,chosen=gut,rejected=falsch"
    )
    row = {"Frage": "q", "Antwort": "a", "meta": {"site": {"name": "s"}}, "Aufgabe": "not first"}
    example = example_of(mapping, **row)
    assert (turns_of(example), example.source) == ((["user: q", "assistant: a"], 1), "s")
    assert example_of(mapping, **{**row, "meta.site.name": "plain"}).source == "plain"
    assert example_of(mapping, **{**row, "meta": {"site": "no object"}}).source == "pool.v1"
    (pair,) = pairs_of(mapping, Aufgabe="x", gut="yes", falsch="no")
    assert [turn.text for turn in pair.chosen.turns] == ["x", "yes"]


def test_answers_whose_prompt_stands_in_a_column_without_a_name_are_refused() -> None:
    mapping = parse_fields("prompt=Frage,chosen=gut,rejected=falsch")
    with pytest.raises(
        BadRow, match="no column 'Frage' for prompt; not used are Aufgabe; name this file's own"
    ):
        pairs_of(mapping, Aufgabe="x", gut="It is good", falsch="It is bad")
    assert (
        len(pairs_of(mapping, Frage=None, gut="It is good", falsch="It is bad")) == 1
    )  # there, and empty in this row
    (pair,) = pairs_of(
        mapping, gut="It is good", falsch="It is bad"
    )  # nothing is left over: they begin alike
    assert pair.chosen.turns[0].text == "It is "


def test_one_column_may_serve_two_names() -> None:
    assert example_of({"prompt": ["x"], "completion": ["x"]}, x="t").turns == (
        Turn("user", "t"),
        Turn("assistant", "t"),
    )


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.csv"])
def test_rows_read_for_copying_are_those_that_are_read_for_their_meaning(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "ROW_BYTES", 200)
    lines = [
        b'{"a": "1"}',
        b"",
        b'{"a": "' + b"x" * 300 + b'"}',
        b"  ",
        b'{"a": "\xff"}\r',
        b"[1]",
        b'{"a": "2"}',
    ]
    data = (
        b"[" + b",".join(line for line in lines if line.strip()) + b"]"
        if name == "x.json"
        else b"\n".join(lines)
    )
    file = write(tmp_path / name, data.replace(b'"', b"") if name == "x.csv" else data)
    expected = [(raw.line, raw.text) for raw in read_rows(file)]
    result = read_texts(file)
    assert [(line, text.decode("utf-8", "backslashreplace")) for line, text in result] == expected
    assert len(expected) >= 3
