"""Files as other tools leave them: data sets on the disk, clones, data frames; and rows written."""

import base64
import datetime
import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import jsonl, prism, prism_apart, save_model

import prism_select
from prism_select.data.files import (
    files_without_rows,
    find_files,
    names_of,
    read_rows,
    read_texts,
    rows_at,
)
from prism_select.data.formats import Format, to_example
from prism_select.data.object_rows import object_fingerprint
from prism_select.data.pool import Pool
from prism_select.data.records import Example
from prism_select.data.row_tables import in_schema, joint_schema, row_batches
from prism_select.run.errors import BadFile, BadOption, BadRow
from prism_select.run.objects import in_reach

PAIRS = [
    {"prompt": "Where is Rome?", "chosen": "In Italy, thank you.", "rejected": "no way"},
    {"prompt": "Say Paris", "chosen": "Please, Paris.", "rejected": "Go away."},
]
ROWS = [
    {"prompt": f"Question {n}?", "completion": f"Answer {n}.", "n": n, "tags": ["a", None][: n % 3]}
    for n in range(30)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", PAIRS)


def fields(*patterns: Path | str) -> list[Any]:
    files = find_files([str(pattern) for pattern in patterns])
    return [raw.fields for file in files for raw in read_rows(file)]


# ---------------------------------------------------------------- data sets on the disk


def one(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "one")
    return folder / "one"


def sharded(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "sharded", num_shards=4)
    return folder / "sharded"


def in_another_order(folder: Path) -> Path:
    rows = datasets.Dataset.from_list(ROWS).shuffle(seed=3).select(range(20))
    rows.save_to_disk(folder / "shuffled")
    return folder / "shuffled"


def with_a_cache_beside_it(folder: Path) -> Path:
    saved = datasets.load_from_disk(one(folder))
    mapped = saved.map(lambda row: {"prompt": row["prompt"] + "!"})
    assert mapped[0]["prompt"] == "Question 0?!"
    assert list((folder / "one").glob("cache-*.arrow"))
    return folder / "one"


def a_split(folder: Path) -> Path:
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=rows, test=rows.select([7, 8])).save_to_disk(folder / "dict")
    return folder / "dict" / "test"


@pytest.mark.parametrize("save", [one, sharded, in_another_order, with_a_cache_beside_it, a_split])
def test_a_data_set_on_the_disk_is_read_as_datasets_reads_it(save: Any, tmp_path: Path) -> None:
    folder = save(tmp_path)
    right = list(datasets.load_from_disk(folder))
    assert fields(folder) == right
    files = find_files([str(folder)])
    assert all(Path(file).name.startswith("data-") for file in files)
    skipped = {Path(file).name for file in files_without_rows([str(folder)])}
    assert {"state.json", "dataset_info.json"} <= skipped
    last = [raw.fields for raw in read_rows(files[-1])]
    some = list(rows_at(files[-1], [0, len(last) - 1]))
    assert [(at, raw.line, raw.fields) for at, raw in some] == [
        (at, at + 1, last[at]) for at in sorted({0, len(last) - 1})
    ]
    example = to_example(next(read_rows(files[0])), Format("prompt+completion"), {})
    assert example.source == ("dict" if save is a_split else folder.name)


def test_a_data_set_of_several_splits_is_refused_with_their_names(tmp_path: Path) -> None:
    split = a_split(tmp_path)
    with pytest.raises(BadFile) as caught:
        find_files([str(tmp_path / "dict")])
    assert "the splits test, train; give one of them" in str(caught.value)
    (split.parent / "train").rename(tmp_path / "elsewhere")
    assert fields(split.parent) == [ROWS[7], ROWS[8]]  # the only one that is left
    train = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))
    train.save_to_disk(tmp_path / "single")
    assert fields(tmp_path / "single") == ROWS
    assert names_of(find_files([str(tmp_path / "single")])[0])[1] == "single"


def test_an_arrow_file_is_a_stream_or_has_an_index(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    for name in ("file.arrow", "stream.arrow"):
        file = str(tmp_path / name)
        assert fields(file) == ROWS
        assert [raw.fields for _, raw in rows_at(file, [3, 20, 29])] == [
            ROWS[3], ROWS[20], ROWS[29]
        ]  # fmt: skip
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-300])
        with pytest.raises(BadFile, match="cannot be read"):
            fields(file)


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"_data_files": [1]}'])
def test_a_broken_state_of_a_data_set_is_one_line(state: str, tmp_path: Path) -> None:
    (one(tmp_path) / "state.json").write_text(state)
    with pytest.raises(BadFile, match=r"state\.json: not the state of a data set") as caught:
        find_files([str(tmp_path / "one")])
    assert "\n" not in str(caught.value)


def test_rows_in_the_order_of_an_index_file_are_refused(tmp_path: Path) -> None:
    state = one(tmp_path) / "state.json"
    old = {**json.loads(state.read_text()), "_indices_data_files": [{"filename": "indices.arrow"}]}
    state.write_text(json.dumps(old))
    with pytest.raises(BadFile, match="in the order of another file; save it again"):
        find_files([str(tmp_path / "one")])


def test_the_memory_for_a_data_set_on_the_disk_does_not_grow_with_it(tmp_path: Path) -> None:
    from conftest import PEAK

    texts = {"text": [f"{n:06d}" * 200 for n in range(50_000)]}
    datasets.Dataset.from_dict(texts).save_to_disk(tmp_path / "big")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "small")
    (big,), (small,) = find_files([str(tmp_path / "big")]), find_files([str(tmp_path / "small")])
    script = (
        "from prism_select.data.files import read_rows\n"
        "assert list(read_rows(sys.argv[2]))\nbefore = peak()\n"
        "assert sum(1 for _ in read_rows(sys.argv[1])) == 50_000\nprint(peak() - before)"
    )
    done = prism_apart("-c", PEAK + script, big, small, module=False)
    assert Path(big).stat().st_size > 60e6 and int(done.out) < 30e6


# ---------------------------------------------------------------- clones


def clone(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "data/train-00000-of-00001.parquet")
    (folder / "README.md").write_text("# A data set")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs")
    (folder / "dataset_infos.json").write_text(json.dumps({"default": {"splits": {}}}, indent=1))
    return folder


def test_the_metadata_of_a_clone_are_no_rows(tmp_path: Path) -> None:
    folder = clone(tmp_path / "clone")
    assert fields(folder) == ROWS
    names = [Path(file).name for file in files_without_rows([str(folder)])]
    assert names == ["README.md", "dataset_infos.json"]
    (folder / "dataset_info.json").write_text("{}")
    assert fields(f"{folder}/**/*") == ROWS
    assert fields(folder / "dataset_info.json") == [{}]  # who names it gets it
    jsonl(folder / "state.json", [{"text": "Ohio"}])  # no state of a data set beside it
    (folder / "dataset_info.json").unlink()
    assert len(fields(folder)) == 30
    (tmp_path / "states").mkdir()
    state = jsonl(tmp_path / "states/state.jsonl", [{"text": "Ohio"}])
    assert find_files([str(tmp_path / "states")]) == [state]


def test_files_that_are_not_read_are_said_once(model: Path, pairs: str, tmp_path: Path) -> None:
    folder = clone(tmp_path / "clone")
    done = prism(
        "score", "--model", model, "--pool", folder, "--target", pairs, "--out", tmp_path / "run",
        "--layers", "late",
    )  # fmt: skip
    assert done.code == 0, done.err
    said = (done.out + done.err).replace("\n", " ")
    assert said.count("files that are not read") == said.count("dataset_infos.json") == 1
    assert said.count("README.md") == 1
    assert prism_select.Run(tmp_path / "run").manifest["counts"]["scored"] == 30


POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.mark.parametrize(
    "name", ["x.jsonl", "x.json", "x.csv", "x.parquet", "x.arrow", "x.jsonl.gz", "x.csv.zst"]
)
def test_a_pointer_of_git_lfs_is_refused_with_advice(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(POINTER)
    for read in (read_rows, read_texts):
        with pytest.raises(BadFile, match=r"a pointer of Git LFS.*git lfs pull$"):
            list(read(str(tmp_path / name)))
    (tmp_path / name).write_text("/annex/objects/SHA256E-s12345--4d7a2146.jsonl\n")
    with pytest.raises(BadFile, match=r"a pointer of git-annex.*git annex get \.$"):
        list(read_rows(str(tmp_path / name)))


def test_a_clone_without_its_large_files_stops_before_a_model_is_loaded(
    pairs: str, model: Path, tmp_path: Path
) -> None:
    folder = clone(tmp_path / "clone")
    (folder / "data/train-00000-of-00001.parquet").write_text(POINTER)
    done = prism(
        "score", "--model", model, "--pool", folder, "--target", pairs, "--out", tmp_path / "run"
    )
    assert done.code == 2 and done.err.count("\n") == 1 and "git lfs pull" in done.err


# ---------------------------------------------------------------- empty cells and ids


def example_of(row: dict[str, Any], format: str = "instruction+output") -> Example:
    (raw,) = read_rows_of([row])
    return to_example(raw, Format(format), {})


def read_rows_of(rows: Any) -> list[Any]:
    with in_reach({"memory:pool": rows}):
        return list(read_rows("memory:pool"))


def test_bare_nan_is_an_empty_cell(tmp_path: Path) -> None:
    line = (
        '{"instruction": "a", "input": NaN, "output": "b", "id": NaN, "source": NaN, "x": -Infinity'
    )
    file = jsonl(tmp_path / "pool.jsonl", [line + "}"])
    (raw,) = read_rows(file)
    example = to_example(raw, Format("instruction+output"), {})
    assert [turn.text for turn in example.turns] == ["a", "b"]
    assert (example.id, example.source) == ("pool.jsonl:1", "pool")
    rows = [{"prompt": "a", "completion": "b", "system": math.nan, "history": math.nan}]
    (bare,) = read_rows(jsonl(tmp_path / "more.jsonl", [json.dumps(row) for row in rows]))
    assert len(to_example(bare, Format("prompt+completion"), {}).turns) == 2
    for name in ("prompt", "completion"):
        fields = {"prompt": "a", "completion": "b", name: math.nan}
        with pytest.raises(BadRow, match=f"{name}: NaN where text"):
            example_of(fields, "prompt+completion")


def test_a_column_without_values_names_no_format(tmp_path: Path) -> None:
    rows = [{"messages": math.nan, "prompt": "a", "completion": "b"}]
    file = jsonl(tmp_path / "pool.jsonl", rows)
    (row,) = Pool([file], {}).rows()
    assert isinstance(row[1], Example) and row[1].turns[1].text == "b"


@pytest.mark.parametrize(
    ("value", "identity"),
    [
        (1.0, "1"),
        (0.0, "0"),
        (-3.0, "-3"),
        (7, "7"),
        (np.int64(7), "7"),
        (np.float64(8.0), "8"),
        (np.float32("nan"), "pool:0"),
        (pd.NA, "pool:0"),
        ("1.0", "1.0"),
        (math.nan, "pool:0"),
        (None, "pool:0"),
    ],
)
def test_an_id_may_be_a_whole_number_of_any_kind(value: object, identity: str) -> None:
    row = {"instruction": "a", "output": "b", "id": value, "source": value}
    example = example_of(row)
    assert example.id == identity
    assert example.source == ("pool" if identity == "pool:0" else identity)


@pytest.mark.parametrize("value", [1.5, math.inf, 1e300, True, [1]])
def test_other_ids_make_their_row_bad(value: object) -> None:
    with pytest.raises(BadRow, match=r"id: .* where text was expected"):
        example_of({"instruction": "a", "output": "b", "id": value})


FRAME = pd.DataFrame(
    {"instruction": ["a", "b", "c"], "input": ["x", None, "z"], "output": "o", "id": [1, None, 3]}
)


def as_records(path: Path) -> str:
    return jsonl(path.with_suffix(".jsonl"), [json.dumps(row) for row in FRAME.to_dict("records")])


def as_lines(path: Path) -> str:
    FRAME.to_json(path.with_suffix(".jsonl"), orient="records", lines=True)
    return str(path.with_suffix(".jsonl"))


def as_parquet(path: Path) -> str:
    FRAME.to_parquet(path.with_suffix(".parquet"))
    return str(path.with_suffix(".parquet"))


def as_list(path: Path) -> str:
    with path.with_suffix(".json").open("w") as file:
        json.dump(FRAME.to_dict("records"), file)
    return str(path.with_suffix(".json"))


@pytest.mark.parametrize("write", [as_records, as_lines, as_parquet, as_list])
def test_a_data_frame_with_gaps_is_read_whichever_way_it_was_saved(
    write: Any, tmp_path: Path
) -> None:
    file = write(tmp_path / "pool")
    examples = [row for _, row in Pool([file], {}).rows()]
    line = 1 if file.endswith(".json") else 2  # an array on one line
    assert [isinstance(row, Example) and row.id for row in examples] == [
        "1", f"{Path(file).name}:{line}", "3"
    ]  # fmt: skip
    assert [row.turns[0].text for row in examples if isinstance(row, Example)] == [
        "a\n\nx", "b", "c\n\nz"
    ]  # fmt: skip


def test_two_files_may_count_from_0_and_one_may_not_count_twice(
    model: Path, pairs: str, tmp_path: Path
) -> None:
    rows = [{**ROWS[n], "id": n} for n in range(4)]
    first = jsonl(tmp_path / "a.jsonl", rows)
    second = jsonl(tmp_path / "b.jsonl", [{**row, "prompt": "Other?"} for row in rows])
    run = prism_select.select(
        str(model), [first, second], pairs, out=tmp_path / "run", budget=3, layers="late"
    )
    scores = run.scores
    assert scores["id"].to_pylist() == [*"0123"] * 2
    assert scores["verdict"].to_pylist().count("selected") == 3
    again = prism_select.select(select_from=run, out=tmp_path / "again", budget=5)
    chosen = [
        json.loads(line) for file in (first, second) for line in Path(file).read_text().splitlines()
    ]
    verdicts = again.scores["verdict"].to_pylist()
    assert list(again.selected) == [
        row for row, verdict in zip(chosen, verdicts, strict=True) if verdict == "selected"
    ]
    assert again.selected_dataset().to_list() == list(again.selected)
    page = again.report().read_text(encoding="utf-8")
    assert "the file has changed" not in page and "Other?" in page
    twice = jsonl(tmp_path / "c.jsonl", [*rows, {**rows[0], "id": 0.0}])
    (bad,) = (row for _, row in Pool([twice], {}).rows() if isinstance(row, BadRow))
    assert bad.line == 5 and bad.what == "duplicate id '0'"


def test_bad_rows_of_one_line_keep_their_own_reasons_when_rows_are_chosen_again(
    model: Path, pairs: str, tmp_path: Path
) -> None:
    rows = [ROWS[0], {"prompt": "a", "completion": 7}, {"prompt": "b", "completion": ""}, ROWS[1]]
    (tmp_path / "pool.json").write_text(json.dumps(rows))  # all of them on line 1
    run = prism_select.select(
        str(model), tmp_path / "pool.json", pairs, out=tmp_path / "run", layers="late",
        budget=1, max_bad="50%",
    )  # fmt: skip
    again = prism_select.select(select_from=run, out=tmp_path / "again", budget=2)
    first, second = ([row["reason"] for row in found.quarantine] for found in (run, again))
    assert first == second and first[1] == "empty completion" != first[0]


# ---------------------------------------------------------------- strict JSON

DAY = datetime.datetime(2026, 11, 30, 12, 5)
TYPED = pa.table(
    {
        "prompt": [f"Question {n}?" for n in range(6)],
        "completion": [f"Answer {n}." for n in range(6)],
        "number": [1.5, math.nan, math.inf, None, -math.inf, 0.0],
        "blob": [b"\x00\xff", b"", b"abc", None, b"\n", b"1"],
        "day": [DAY] * 6,
        "date": [DAY.date()] * 6,
        "nested": [{"scores": [0.5, math.nan]}] * 6,
        "price": [Decimal("1.10")] * 6,
        "small": pa.array(range(6), pa.int8()),
    }
)
RIGHT = [
    {
        "prompt": f"Question {n}?",
        "completion": f"Answer {n}.",
        "number": {0: 1.5, 5: 0.0}.get(n),
        "blob": ["AP8=", "", "YWJj", None, "Cg==", "MQ=="][n],
        "day": "2026-11-30T12:05:00",
        "date": "2026-11-30",
        "nested": {"scores": [0.5, None]},
        "price": "1.10",
        "small": n,
    }
    for n in range(6)
]


def strict(text: bytes | str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def in_parquet(folder: Path) -> Any:
    pq.write_table(TYPED, folder / "pool.parquet")
    return str(folder / "pool.parquet")


def on_the_disk(folder: Path) -> Any:
    datasets.Dataset(TYPED).save_to_disk(folder / "pool")
    return str(folder / "pool")


POOLS: dict[str, Any] = {
    "parquet": in_parquet,
    "arrow": on_the_disk,
    "table": lambda folder: TYPED,
    "dataset": lambda folder: datasets.Dataset(TYPED),
    "polars": lambda folder: pl.DataFrame(TYPED),
    "list": lambda folder: TYPED.to_pylist(),
}


@pytest.mark.parametrize("kind", POOLS)
def test_rows_of_tables_are_written_as_strict_json(
    kind: str, model: Path, pairs: str, tmp_path: Path
) -> None:
    pool = POOLS[kind](tmp_path)
    run = prism_select.select(
        str(model), pool, pairs, out=tmp_path / "run", budget="100%", layers="late"
    )
    lines = (tmp_path / "run/selected.jsonl").read_bytes().splitlines()
    assert [strict(line) for line in lines] == RIGHT
    assert list(run.selected) == RIGHT


def test_json_says_null_for_what_it_has_no_word_for() -> None:
    (raw,) = read_rows_of(
        [
            {
                "array": np.array([1.0, np.nan]),
                "gap": pd.NaT,
                "nothing": pd.NA,
                "key": {("a", 1): math.nan, 2: "\ud800"},
                "time": datetime.time(1, 2),
                "view": memoryview(b"abc"),
            }
        ]
    )
    assert strict(raw.text.encode("utf-8", "backslashreplace")) == {
        "array": [1.0, None],
        "gap": None,
        "nothing": None,
        "key": {"('a', 1)": None, "2": "\ud800"},
        "time": "01:02:00",
        "view": base64.b64encode(b"abc").decode(),
    }
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    (raw,) = read_rows_of([{"deep": deep}])
    assert raw.problem == "nested too deeply"
    with in_reach({"memory:a": [{"x": math.nan}], "memory:b": [{"x": None}]}):
        assert object_fingerprint("memory:a") == object_fingerprint("memory:b")


def test_rows_of_json_stay_as_they_came_to_the_byte(
    model: Path, pairs: str, tmp_path: Path
) -> None:
    lines = [
        '{"prompt":"a","completion":"b",  "x":NaN}',
        '{ "completion": "\\u00e9 c", "prompt": "d", "x": 1.10, "blob": "AP8=" }',
    ]
    file = jsonl(tmp_path / "pool.jsonl", lines)
    prism_select.select(str(model), file, pairs, out=tmp_path / "run", budget="100%", layers="late")
    assert (tmp_path / "run/selected.jsonl").read_bytes() == Path(file).read_bytes()


# ---------------------------------------------------------------- Parquet out


def equal(a: pa.Table, b: pa.Table) -> bool:
    """NaN is equal to NaN here."""
    return a.schema.equals(b.schema) and repr(a.to_pylist()) == repr(b.to_pylist())


@pytest.mark.parametrize("kind", ["parquet", "arrow", "table", "dataset", "polars"])
def test_chosen_rows_of_tables_keep_their_types_as_parquet(
    kind: str, model: Path, pairs: str, tmp_path: Path
) -> None:
    run = prism_select.repair(
        str(model), POOLS[kind](tmp_path), pairs, out=tmp_path / "run", remove=2, layers="late",
        output_format="parquet",
    )  # fmt: skip
    right = TYPED
    if kind == "polars":
        right = pl.DataFrame(TYPED).to_arrow()
    verdicts = run.scores["verdict"].to_pylist()
    for name, verdict in (("selected", "kept"), ("removed", "removed")):
        rows = [row for row, found in enumerate(verdicts) if found == verdict]
        assert equal(pq.read_table(tmp_path / "run" / f"{name}.parquet"), right.take(rows))
        assert not (tmp_path / "run" / f"{name}.jsonl").exists()
    assert len(list(run.selected)) == 4 and len(list(run.removed)) == 2
    assert run.manifest["config"]["output_format"] == "parquet"


def test_features_of_a_data_set_survive_as_parquet(model: Path, pairs: str, tmp_path: Path) -> None:
    kinds = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "completion": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["good", "bad"]),
        }
    )
    rows = [{"prompt": "a", "completion": f"b{n}", "kind": n % 2} for n in range(5)]
    datasets.Dataset.from_list(rows, features=kinds).save_to_disk(tmp_path / "pool")
    prism_select.select(
        str(model), str(tmp_path / "pool"), pairs, out=tmp_path / "run", budget=3, layers="late",
        output_format="parquet",
    )  # fmt: skip
    chosen = datasets.Dataset.from_parquet(
        str(tmp_path / "run/selected.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert chosen.features == kinds and len(chosen) == 3


def test_rows_of_json_get_the_types_that_fit_them_all(
    model: Path, pairs: str, tmp_path: Path
) -> None:
    first = [{**ROWS[0], "n": 1}, {**ROWS[1], "n": None, "extra": {"a": 1}}]
    second = [{**ROWS[2], "n": 2.5, "extra": {"b": "x"}}, {**ROWS[3], "n": math.nan}]
    files = [
        jsonl(tmp_path / "a.jsonl", first),
        jsonl(tmp_path / "b.jsonl", [json.dumps(row) for row in second]),
    ]
    prism_select.select(
        str(model), files, pairs, out=tmp_path / "run", budget="100%", layers="late",
        output_format="parquet",
    )  # fmt: skip
    table = pq.read_table(tmp_path / "run/selected.parquet")
    assert table["n"].type == pa.float64()
    assert repr(table["n"].to_pylist()) == "[1.0, None, 2.5, nan]"
    assert table["extra"].to_pylist() == [None, {"a": 1, "b": None}, {"a": None, "b": "x"}, None]
    assert table["tags"].to_pylist() == [[], ["a"], ["a", None], []]


def test_a_column_of_mixed_types_is_refused_and_the_scores_are_used_again(
    model: Path, pairs: str, tmp_path: Path
) -> None:
    rows = [{**ROWS[0], "x": 1}, {**ROWS[1], "x": "one"}, {**ROWS[2], "x": 2}]
    pool = jsonl(tmp_path / "pool.jsonl", rows)
    words = [
        "select", "--model", model, "--pool", pool, "--target", pairs, "--out", tmp_path / "run",
        "--layers", "late", "--budget", "3",
    ]  # fmt: skip
    done = prism(*words, "--output-format", "parquet")
    assert done.code == 2 and "give --output-format jsonl" in done.err and "\n" not in done.err[:-1]
    assert not list((tmp_path / "run").glob("selected.*"))
    done = prism(*words)
    assert done.code == 0 and "shards of 2048 rows are there already" in " ".join(
        (done.out + done.err).split()
    )
    assert list(prism_select.Run(tmp_path / "run").selected) == rows
    done = prism(*words, "--output-format", "parquet")
    assert done.code == 2 and "is complete, with its rows as jsonl" in done.err
    done = prism(
        "select", "--select-from", tmp_path / "run", "--out", tmp_path / "other", "--budget", "1",
        "--output-format", "parquet",
    )  # fmt: skip
    assert done.code == 0 and pq.read_table(tmp_path / "other/selected.parquet").num_rows == 1


def test_a_choice_of_nothing_is_an_empty_file(model: Path, pairs: str, tmp_path: Path) -> None:
    pool = jsonl(tmp_path / "pool.jsonl", ROWS[:4])
    run = prism_select.score(str(model), pool, pairs, out=tmp_path / "scores", layers="late")
    low = [n for n, score in enumerate(run.scores["score"].to_pylist()) if score < 0]
    bad = jsonl(tmp_path / "bad.jsonl", [ROWS[n] for n in low])
    run = prism_select.select(
        str(model), bad, pairs, out=tmp_path / "run", layers="late", budget="positive",
        output_format="parquet",
    )  # fmt: skip
    assert list(run.selected) == []


def test_rows_of_a_file_as_tables_are_those_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "hub").mkdir()
    rows = [{"text": f"text {n}", "n": n} for n in range(700)]
    files = [jsonl(tmp_path / "hub/train.jsonl", rows), f"hub:{tmp_path / 'hub'}"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=100)
    files.append(str(tmp_path / "rows.parquet"))
    pd.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    for file in files:
        batches = list(row_batches(file))
        assert sum(batch.rows for batch in batches) == 700
        tables = [batch.take(list(range(batch.rows))) for batch in batches]
        schema = joint_schema(table.schema for table in tables)
        assert pa.concat_tables(in_schema(table, schema) for table in tables).to_pylist() == rows
        assert schema.field("n").type == pa.int64()
    (first, *_) = row_batches(str(tmp_path / "rows.csv"))
    assert first.take([1]).to_pylist() == [{"text": "text 1", "n": "1"}]  # of CSV all is text


def test_lists_have_all_columns_of_all_rows_as_a_data_set(
    model: Path, pairs: str, tmp_path: Path
) -> None:
    rows = [{**ROWS[0]}, {**ROWS[1], "late": "here"}]
    run = prism_select.select(
        str(model), rows, pairs, out=tmp_path / "run", budget="100%", layers="late"
    )
    assert run.selected_dataset()["late"][:] == [None, "here"]
    mixed = [{**ROWS[0], "x": 1}, {**ROWS[1], "x": "one"}]
    run = prism_select.select(
        str(model), mixed, pairs, out=tmp_path / "mixed", budget="100%", layers="late"
    )
    with pytest.raises(BadOption, match=r"read selected\.jsonl instead"):
        run.selected_dataset()
