"""Files at an address: the same run as from a folder, and one line for what cannot be reached."""

import errno
import gzip
import json
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, cast
from zipfile import ZipFile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Row, jsonl, prism

from prism_select.commands.pipeline import run_worker
from prism_select.data.files import find_files, read_rows
from prism_select.data.pool import Pool
from prism_select.data.remote import local
from prism_select.run.config import ScoreConfig
from prism_select.run.errors import BadFile
from prism_select.scoring.shards import RunInputs, ScoringJob

ROWS: list[Row] = [
    {"prompt": f"Question {row}?", "completion": f"Answer {row}"} for row in range(20)
]
PAIRS: list[Row] = [
    {"prompt": "Rome?", "chosen": "In Italy, thank you.", "rejected": "no way"},
    {"prompt": "Zurich?", "chosen": "Please: in France.", "rejected": "go away"},
]


def text(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def bucket() -> Iterator[Any]:
    """An object store in memory."""
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/pool/a.jsonl", text(ROWS[:8]))
    store.pipe("/bucket/pool/deep/b.jsonl.gz", gzip.compress(text(ROWS[8:])))
    store.pipe("/bucket/pool/.hidden/c.jsonl", text(ROWS))
    store.pipe("/bucket/pool/notes.txt", b"no rows")
    store.pipe("/bucket/.data/c.jsonl", text(ROWS[:5]))
    store.pipe("/bucket/pairs.jsonl", text(PAIRS))
    yield store
    store.rm("/bucket", recursive=True)
    local.cache_clear()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which a web server shows it."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    folder = tmp_path / "web"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as serving:
        Thread(target=serving.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
    local.cache_clear()


def prompts(*patterns: str) -> list[object]:
    return [
        (raw.fields or {}).get("prompt") for file in find_files(patterns) for raw in read_rows(file)
    ]


@pytest.mark.parametrize(
    ("pattern", "rows"),
    [
        ("memory://bucket/pool/a.jsonl", ROWS[:8]),
        ("memory://bucket/pool", ROWS),
        ("memory://bucket/pool/", ROWS),
        ("memory://bucket/pool/*.jsonl", ROWS[:8]),
        ("memory://bucket/**/*.gz", ROWS[8:]),
        ("memory://bucket/.data/*.jsonl", ROWS[:5]),
    ],
)
def test_a_file_a_folder_and_a_glob_at_an_address_give_their_rows(
    bucket: Any, pattern: str, rows: list[Row]
) -> None:
    assert prompts(pattern) == [row["prompt"] for row in rows]
    assert prompts(pattern, pattern) == prompts(pattern)


def test_a_run_from_addresses_is_that_from_files(
    bucket: Any, tmp_path: Path, plain_model: Path
) -> None:
    pool, target = jsonl(tmp_path / "pool.jsonl", ROWS), jsonl(tmp_path / "pairs.jsonl", PAIRS)
    runs = {}
    for name, address, pairs in (
        ("here", pool, target),
        ("there", "memory://bucket/pool", "memory://bucket/pairs.jsonl"),
    ):
        words = [
            "--model",
            plain_model,
            "--pool",
            address,
            "--target",
            pairs,
            "--out",
            tmp_path / name,
        ]
        outcome = prism("select", *words, "--budget", "25%")
        assert outcome.code == 0, outcome.err
        runs[name] = (
            pq.read_table(tmp_path / name / "scores.parquet"),
            (tmp_path / name / "selected.jsonl").read_bytes(),
        )
    assert runs["here"][0]["score"].to_pylist() == pytest.approx(
        runs["there"][0]["score"].to_pylist(), rel=1e-5
    )
    assert runs["here"][1] == runs["there"][1]


def test_a_pool_that_changed_at_its_address_is_another_run(
    bucket: Any, tmp_path: Path, plain_model: Path
) -> None:
    words = [
        "--model",
        plain_model,
        "--pool",
        "memory://bucket/pool/a.jsonl",
        "--out",
        tmp_path / "run",
    ]
    words += ["--target", "memory://bucket/pairs.jsonl"]
    assert prism("score", *words).code == 0
    local.cache_clear()  # as in another process
    bucket.pipe("/bucket/pool/a.jsonl", text(ROWS[:7]))
    outcome = prism("score", *words)
    assert outcome.code == 2
    assert "pool" in outcome.err and len(outcome.err.strip().splitlines()) == 1


def test_files_of_a_web_server_are_read_whatever_their_format(server: tuple[Path, str]) -> None:
    folder, address = server
    jsonl(folder / "rows.jsonl", ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    expected = [row["prompt"] for row in ROWS]
    assert prompts(f"{address}/rows.jsonl") == prompts(f"{address}/rows.parquet") == expected


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("memory://bucket/nothing.jsonl", "nothing there; check the address and the network"),
        ("http://127.0.0.1:9/pool.jsonl", "nothing there (Cannot connect to host 127.0.0.1:9"),
        ("https://host/pool.jsonl?key=1", "…: an address with a key in it"),
        ("ftp://user:key=1@host/pool.jsonl", "…host/pool.jsonl: an address with a key in it"),
        (
            "memory://bucket/pool/notes.txt",
            "no file there, or none with an ending that can be read",
        ),
        ("bogus://bucket/pool.jsonl", "cannot be reached: Protocol not known: bogus"),
        ("s3://bucket/pool.jsonl", "cannot be reached: Install s3fs"),
    ],
)
def test_what_cannot_be_reached_is_one_line(bucket: Any, pattern: str, what: str) -> None:
    with pytest.raises(BadFile) as error:
        find_files([pattern])
    assert what in str(error.value) and str(error.value).startswith(pattern[:6])
    assert "key=1" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pattern_in_an_archive_is_refused(tmp_path: Path) -> None:
    with ZipFile(tmp_path / "pool.zip", "w") as archive:
        archive.writestr("a.jsonl", text(ROWS))
    with pytest.raises(
        BadFile, match="a pattern of a protocol whose paths do not say all; name its files"
    ):
        find_files([f"zip://*.jsonl::{tmp_path}/pool.zip"])


def test_a_key_in_the_address_of_a_direction_stands_nowhere(
    tmp_path: Path, plain_model: Path
) -> None:
    pool, secret = jsonl(tmp_path / "pool.jsonl", ROWS), "https://host/direction.safetensors?key=1"
    outcome = prism(
        "score",
        "--model",
        plain_model,
        "--pool",
        pool,
        "--direction",
        secret,
        "--out",
        tmp_path / "run",
    )
    assert (
        outcome.code == 2
        and "an address with a key in it" in outcome.err
        and "key=1" not in outcome.err
    )
    assert not (tmp_path / "run").exists()


def test_a_file_that_goes_before_it_is_read_is_one_line(bucket: Any) -> None:
    (file,) = find_files(["memory://bucket/pairs.jsonl"])
    bucket.rm("/bucket/pairs.jsonl")
    with pytest.raises(
        BadFile,
        match=r"memory://bucket/pairs.jsonl: nothing there; check the address and the network",
    ):
        list(read_rows(file))
    bucket.pipe("/bucket/pairs.jsonl", b"")


def test_no_room_for_a_copy_is_one_line(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(bucket), "get_file", full)
    with pytest.raises(
        BadFile, match=r"pairs.jsonl: no room for a copy in .*; set TMPDIR to a folder with room"
    ):
        local("memory://bucket/pairs.jsonl")


def test_a_direction_at_an_address_scores_as_its_file(
    bucket: Any, tmp_path: Path, plain_model: Path
) -> None:
    pool, target = jsonl(tmp_path / "pool.jsonl", ROWS), jsonl(tmp_path / "pairs.jsonl", PAIRS)
    words = ["--model", plain_model, "--pool", pool]
    assert prism("score", *words, "--target", target, "--out", tmp_path / "one").code == 0
    bucket.pipe(
        "/bucket/direction.safetensors", (tmp_path / "one" / "direction.safetensors").read_bytes()
    )
    outcome = prism(
        "score",
        *words,
        "--direction",
        "memory://bucket/direction.safetensors",
        "--out",
        tmp_path / "two",
    )
    assert outcome.code == 0, outcome.err
    one, two = (
        pq.read_table(tmp_path / name / "scores.parquet")["score"].to_pylist()
        for name in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-5)


def test_a_process_whose_copy_is_not_the_leaders_scores_nothing(
    bucket: Any, plain_model: Path
) -> None:
    address, unused = "memory://bucket/pool/a.jsonl", cast("Any", None)
    inputs = RunInputs(Pool([address], {}), unused, {}, {"pool": "that of the leader's copy"})
    world: Any = SimpleNamespace(
        receive=lambda: ScoringJob(inputs, unused, unused, "", {}), local_rank=1
    )
    config = ScoreConfig(
        model=str(plain_model), pool=address, target="memory://bucket/pairs.jsonl", out="run"
    )
    with pytest.raises(BadFile, match=r"a.jsonl: changed while the run was reading it"):
        run_worker(config, world)
