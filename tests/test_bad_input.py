"""Bad input never passes in silence and never gives a traceback: one line that says where, what and
what to do."""

import errno
import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import Outcome, Row, jsonl, prism, prism_apart
from safetensors.torch import load_file, save_file

from prism_select.commands import pipeline
from prism_select.run.config import RepairConfig, ScoreConfig, SelectConfig
from prism_select.run.errors import PrismError
from prism_select.run.options import options_of
from prism_select.scoring import shards

GOOD: list[Row] = [
    {
        "prompt": f"Question {place}?",
        "completion": f"Answer {place}" + ", please" * (place % 3),
        "bad": place % 2 == 0,
    }
    for place in range(10)
]
PAIRS: list[Row] = [
    {"prompt": "Rome?", "chosen": "In Italy, thank you.", "rejected": "no way"},
    {"prompt": "Paris?", "chosen": "Please: in France.", "rejected": "go away"},
    {"prompt": "Water?", "chosen": "It boils at a hundred degrees.", "rejected": "It boils at 7."},
]
Line = Row | str | bytes


@dataclass
class Desk:
    """A folder with everything that a command needs, all of it good until a test spoils
    something."""

    folder: Path
    model: Path

    @property
    def out(self) -> Path:
        return self.folder / "run"

    def pool(self, lines: Iterable[Line], name: str = "pool.jsonl") -> str:
        return jsonl(self.folder / name, lines)

    def call(
        self, *more: object, command: str = "score", pool: str = "", target: str = ""
    ) -> Outcome:
        pool = pool or self.pool(GOOD)
        target = target or jsonl(self.folder / "pairs.jsonl", PAIRS)
        return prism(
            command,
            "--model",
            self.model,
            "--pool",
            pool,
            "--target",
            target,
            "--out",
            self.out,
            *more,
        )

    def refuses(self, says: str, *more: object, **named: Any) -> str:
        return refused(self.call(*more, **named), says, self.out)


def refused(done: Outcome, says: str, out: Path | None) -> str:
    """The one line, which holds `says` and leads nowhere but out; nothing was written."""
    assert done.code == 2, done
    assert (
        done.err.startswith("prism: ") and done.err.endswith("\n") and done.err.count("\n") == 1
    ), done.err
    assert says in done.err, done.err
    assert "Traceback" not in done.err + done.out
    assert out is None or not out.exists() or not any(out.iterdir())
    return done.err


@pytest.fixture
def desk(tmp_path: Path, plain_model: Path) -> Desk:
    return Desk(tmp_path, plain_model)


def scores(out: Path) -> dict[str, list[Any]]:
    return dict(pq.read_table(out / "scores.parquet").to_pydict())


# ---------------------------------------------------------------- rows of the pool

LONG = "word " * 200
BAD_ROWS: dict[str, tuple[Line, str]] = {
    "broken JSON": ('{"prompt": "a", "completion": ', "broken JSON: Expecting value at column 31"),
    "no JSON": ("prompt, completion", "broken JSON"),
    "an array": ('["a", "b"]', "an array where an object was expected"),
    "a number": ("7", "a number where an object was expected"),
    "number for text": (
        {"prompt": "a", "completion": 7},
        "completion: a number where text or a list of messages was expected",
    ),
    "null": ({"prompt": "a", "completion": None}, "completion: null where"),
    "list of texts": (
        {"prompt": ["a"], "completion": "b"},
        "prompt[0]: text where a message was expected",
    ),
    "unknown role": (
        {"prompt": [{"role": "cat", "content": "a"}], "completion": "b"},
        "prompt[0]: unknown role 'cat'",
    ),
    "missing field": ({"prompt": "a"}, "missing field: completion"),
    "other fields": ({"x": 1}, "missing field"),
    "empty completion": ({"prompt": "a", "completion": ""}, "empty completion"),
    "blank completion": ({"prompt": "a", "completion": " \n "}, "empty completion"),
    "nothing supervised": (
        {"prompt": "a", "completion": [{"role": "user", "content": "b"}]},
        "nothing is supervised: no assistant turn in completion",
    ),
    "too long": ({"prompt": LONG, "completion": "b"}, "nothing supervised is left of"),
    "invalid UTF-8": (b'{"prompt": "a", "completion": "\xff"}', "invalid UTF-8 at byte 32"),
    "lone surrogate": (
        '{"prompt": "a", "completion": "\\ud800"}',
        "completion: not valid text: lone surrogate",
    ),
    "duplicate id": ({"prompt": "a", "completion": "b", "id": "one"}, "duplicate id 'one'"),
    "list for id": (
        {"prompt": "a", "completion": "b", "id": [1]},
        "id: a list where text was expected",
    ),
}
NAMED: Row = {**GOOD[0], "id": "one"}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_stops_a_small_pool_with_file_line_and_reason(desk: Desk, name: str) -> None:
    line, reason = BAD_ROWS[name]
    pool = desk.pool([NAMED, *GOOD[1:5], line, *GOOD[5:]])
    said = desk.refuses(f"{pool}:6: {reason}", "--max-length", "150", pool=pool)
    assert (
        "the first of 1 bad rows found among 11, and --max-bad allows 1%" in said
        and "with --max-bad 10%" in said
    )
    said = desk.refuses(
        f"{pool}:6: {reason}",
        "--max-length",
        "150",
        "--bad-rows",
        "stop",
        "--max-bad",
        "90%",
        pool=pool,
    )
    assert "--max-bad" not in said and said.count(";") >= 1


def test_bad_rows_within_the_limit_are_set_aside_with_their_reasons_and_all_others_are_scored(
    desk: Desk,
) -> None:
    lines: list[Line] = [NAMED]
    for row, (line, _) in zip(GOOD[1:] * 2, BAD_ROWS.values(), strict=True):
        lines += [line, {**row}]
    pool = desk.pool(lines)
    done = desk.call("--max-bad", "50%", "--max-length", "150", pool=pool)
    assert done.code == 0 and done.err == ""
    quarantine = [
        json.loads(line) for line in (desk.out / "quarantine.jsonl").read_text().splitlines()
    ]
    assert [(row["file"], row["line"]) for row in quarantine] == [
        (pool, line) for line in range(2, 38, 2)
    ]
    for row, (line, reason) in zip(quarantine, BAD_ROWS.values(), strict=True):
        assert row.keys() == {"file", "line", "reason", "raw"} and row["reason"].startswith(
            reason.partition(":")[0]
        )
        assert reason in row["reason"] and pool not in row["reason"]
        raw = (
            line
            if isinstance(line, str)
            else json.dumps(line)
            if isinstance(line, dict)
            else "\\xff"
        )
        assert raw in row["raw"]
    found = scores(desk.out)
    assert found["verdict"] == ["scored", *["quarantined", "scored"] * 18]
    assert [score is None for score in found["score"]] == [False, *[True, False] * 18]
    told = json.loads((desk.out / "manifest.json").read_text())
    assert (
        told["counts"]["read"] == 37
        and told["counts"]["quarantined"] == 18
        and told["counts"]["scored"] == 19
    )
    assert "37 rows, 18 quarantined" in done.out
    clean = Desk(desk.folder / "clean", desk.model)
    clean.folder.mkdir()
    assert clean.call(pool=clean.pool([NAMED, *GOOD[1:] * 2])).code == 0
    ours = [score for score in found["score"] if score is not None]
    assert np.allclose(ours, scores(clean.out)["score"], rtol=1e-5)


@pytest.mark.parametrize(
    ("bad", "allowed", "code"), [(29, "29%", 0), (30, "29%", 2), (1, "0%", 2), (0, "0%", 0)]
)
def test_the_limit_of_bad_rows_is_kept_to_the_row(
    desk: Desk, bad: int, allowed: str, code: int
) -> None:
    lines: list[Line] = [
        *[{"prompt": "a"}] * bad,
        *[GOOD[place % 10] for place in range(100 - bad)],
    ]
    pool = desk.pool(sorted(lines, key=len, reverse=True))
    assert desk.call("--max-bad", allowed, "--dry-run", pool=pool).code == code


def test_rows_and_what_is_wrong_with_the_bad_ones_are_said_before_a_model_is_loaded(
    desk: Desk,
) -> None:
    pool = desk.pool([*GOOD, {"prompt": "a"}, {"prompt": "b"}, "{broken"])
    done = desk.call("--max-bad", "50%", "--dry-run", pool=pool)
    what = "13 rows, of which 3 bad: 2 missing field: completion; 1 broken JSON"
    assert what in done.out and done.out.index(what) < done.out.index("selected: ")


def test_bad_rows_that_show_late_stop_the_run_at_once_and_it_may_go_on_with_more_allowed(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "WINDOW", 20)
    monkeypatch.setattr("prism_select.data.pool.SAMPLE", 5)  # the sample does not show them
    pool = desk.pool([*GOOD * 4, *[{"prompt": LONG, "completion": "b"}] * 4, *GOOD * 5])
    words = ["--max-length", "150", "--seed", "3"]
    done = desk.call(*words, pool=pool)
    assert (
        done.code == 2
        and f"{pool}:41: nothing supervised is left" in done.err
        and done.err.count("\n") == 1
    )
    assert sorted(path.name[:9] for path in (desk.out / "shards").iterdir()) == [
        f"{k:08d}-" for k in range(3)
    ]
    assert not any(
        (desk.out / name).exists()
        for name in ("scores.parquet", "manifest.json", "quarantine.jsonl")
    )
    done = desk.call(*words, "--max-bad", "5%", pool=pool)
    assert done.code == 0 and "3 shards of 20 rows are there already" in done.out
    assert Counter(scores(desk.out)["verdict"]) == {"scored": 90, "quarantined": 4}


def test_an_empty_pool_is_refused(desk: Desk) -> None:
    for content in ([], ["", "   "]):
        pool = desk.pool(content)
        desk.refuses(f"{pool}: the pool has no rows; give a file with at least one", pool=pool)
    array = desk.folder / "pool.json"
    array.write_text(" [] ")
    desk.refuses(f"{array}: the pool has no rows", pool=str(array))


def test_a_pool_without_one_good_row_is_refused_whatever_is_allowed(desk: Desk) -> None:
    pool = desk.pool([{"prompt": "a"}, "{"])
    said = desk.refuses(f"{pool}:1: no known format", "--max-bad", "100%", pool=pool)
    assert "none of the pool's 2 rows is usable" in said and "prompt+completion" in said
    pool = desk.pool([{"prompt": LONG, "completion": "b"}] * 2)
    desk.refuses(
        f"{pool}:1: nothing supervised is left", "--max-bad", "100%", "--max-length", "9", pool=pool
    )


def test_formats_without_lines_name_the_row(desk: Desk) -> None:
    file = desk.folder / "pool.csv"
    file.write_text("prompt,completion\na,b\nc\nd,e\n")
    desk.refuses(f"{file}:3: 1 columns where the header has 2", pool=str(file))
    file = desk.folder / "pool.json"
    file.write_text('[{"prompt": "a", "completion": "b"},\n {"prompt": "c" "completion": "d"}]')
    desk.refuses(f"{file}:2: broken JSON array: Expecting ',' delimiter", pool=str(file))


# ---------------------------------------------------------------- rows of the target

BAD_PAIRS: dict[str, tuple[Line, str]] = {
    "broken JSON": ('{"prompt": "a", "chosen": "b", "rejected', "broken JSON: Unterminated string"),
    "an array": ('["a", "b"]', "an array where an object was expected"),
    "wrong type": ({"prompt": "a", "chosen": 7, "rejected": "c"}, "chosen: a number where"),
    "missing rejected": ({"prompt": "a", "chosen": "b"}, "missing field: rejected"),
    "missing prompt": ({"chosen": "b", "rejected": "c"}, "missing field: prompt"),
    "empty rejected": ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty rejected"),
    "equal": ({"prompt": "a", "chosen": "b", "rejected": "b "}, "chosen is equal to rejected"),
    "equal when cut": (
        {"prompt": "a", "chosen": LONG + "b", "rejected": LONG + "c"},
        "the same tokens",
    ),
    "nothing left": (
        {"prompt": LONG, "chosen": "b", "rejected": "c"},
        "nothing supervised is left of",
    ),
    "invalid UTF-8": (b'{"prompt": "a", "chosen": "b", "rejected": "\xff"}', "invalid UTF-8"),
    "lone surrogate": ('{"prompt": "a", "chosen": "b", "rejected": "\\udc00"}', "lone surrogate"),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_a_bad_pair_always_stops_with_file_line_and_reason(desk: Desk, name: str) -> None:
    line, reason = BAD_PAIRS[name]
    target = jsonl(desk.folder / "bad.jsonl", [*PAIRS[:2], line, PAIRS[2]])
    said = desk.refuses(f"{target}:3: ", "--max-bad", "100%", "--max-length", "150", target=target)
    assert reason in said
    desk.refuses(f"{target}:3: ", "--max-length", "150", target=target, command="repair")


def test_an_empty_target_is_refused(desk: Desk) -> None:
    target = jsonl(desk.folder / "none.jsonl", [])
    desk.refuses(
        f"{target}: the target has no pairs; give rows with prompt, chosen and rejected",
        target=target,
    )


def test_a_pool_given_as_target_is_refused_with_the_formats_that_are_known(desk: Desk) -> None:
    said = desk.refuses("pool.jsonl:1: no known format", target=desk.pool(GOOD))
    assert "the fields are 'prompt', 'completion'" in said and "prompt+chosen+rejected" in said


def test_a_mapped_column_that_is_not_there_is_named_with_one_that_is_near(desk: Desk) -> None:
    pool = desk.pool([{"q_text": "a", "reply": "b"}] * 3)
    said = desk.refuses(
        f"{pool}:1: no column 'replyy' for completion; the fields are 'q_text', 'reply'",
        "--fields",
        "prompt=q_text,completion=replyy",
        "--max-bad",
        "100%",
        pool=pool,
    )
    assert "check --fields: completion=reply, perhaps" in said
    said = desk.refuses("no column 'zzz' for prompt", "--fields", "prompt=zzz", pool=pool)
    assert "prompt=its own column" in said
    said = desk.refuses(
        "no column 'q_txt' for prompt, no column 'replyy' for completion; the fields are",
        "--fields",
        "completion=replyy,prompt=q_txt",
        pool=pool,
    )
    assert "check --fields: prompt=q_text,completion=reply, perhaps" in said


def test_a_model_that_is_not_there_is_told_before_the_pool_is_read(desk: Desk) -> None:
    words = ["--pool", desk.pool(["{"]), "--target", "t.jsonl", "--out", desk.out]
    refused(
        prism("score", "--model", "/no/where", *words),
        "--model /no/where: no such folder",
        desk.out,
    )


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("role", ["pool", "target"])
def test_files_that_are_missing_or_of_another_kind_are_refused(desk: Desk, role: str) -> None:
    named: dict[str, str] = {}

    def given(path: str) -> dict[str, Any]:
        return {**named, role: str(desk.folder / path)}

    (desk.folder / "notes.txt").write_text("a")
    (desk.folder / "empty").mkdir()
    (desk.folder / "x.jsonl.gz").write_bytes(b"not an archive")
    (desk.folder / "x.parquet").write_bytes(b"not a table")
    (desk.folder / "wide.jsonl").write_bytes('{"prompt": "a"}'.encode("utf-16"))
    desk.refuses("absent.jsonl: no such file or folder", **given("absent.jsonl"))
    desk.refuses("*.jsonlx: no such file or folder", **given("*.jsonlx"))
    desk.refuses(
        "notes.txt: no file here has an ending that can be read; supported are .jsonl",
        **given("notes.txt"),
    )
    desk.refuses("empty: no file here has an ending that can be read", **given("empty"))
    desk.refuses("x.jsonl.gz: cannot be read", **given("x.jsonl.gz"))
    desk.refuses("x.parquet: cannot be read", **given("x.parquet"))
    desk.refuses("wide.jsonl: the text is UTF-16, not UTF-8", **given("wide.jsonl"))


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no such file"), (b"not tensors", "cannot be read"), (b"", "cannot be read")],
    ids=["absent", "other", "empty"],
)
def test_a_direction_that_is_none_is_refused(desk: Desk, content: bytes | None, says: str) -> None:
    file = desk.folder / "direction.safetensors"
    if content is not None:
        file.write_bytes(content)
    words = [
        "--model",
        desk.model,
        "--pool",
        desk.pool(GOOD),
        "--out",
        desk.out,
        "--direction",
        file,
    ]
    refused(prism("score", *words), f"{file}: {says}", desk.out)


def test_a_direction_of_another_model_or_towards_the_other_answers_is_refused(
    desk: Desk, chat_model: Path
) -> None:
    assert desk.call().code == 0
    saved = desk.out / "direction.safetensors"
    other = desk.folder / "other.safetensors"
    save_file({name: value[:1].clone() for name, value in load_file(saved).items()}, other)
    words = [
        "--model",
        desk.model,
        "--pool",
        desk.pool(GOOD),
        "--out",
        desk.folder / "new",
        "--direction",
    ]
    refused(
        prism("score", *words, other),
        "does not fit this model; use its own model",
        desk.folder / "new",
    )
    said = refused(
        prism("repair", *words, saved), "it points towards the chosen answers", desk.folder / "new"
    )
    assert "repair takes the direction of a repair run" in said


# ---------------------------------------------------------------- options

CONFIGS = {kind.command: kind for kind in (ScoreConfig, SelectConfig, RepairConfig)}
CHOICES = [
    (command, option.name, option.choices)
    for command, kind in CONFIGS.items()
    for option in options_of(kind)
    if option.choices
]


def test_every_option_with_listed_values_is_among_those_tested() -> None:
    names = {name for _, name, _ in CHOICES}
    assert {
        "weighting",
        "likelihood",
        "engine",
        "normalize",
        "dtype",
        "device_map",
        "quantize",
        "template",
        "bad_rows",
        "common",
    } | {
        "curvature",
        "combine",
        "rank_by",
        "output_format",
    } == names


@pytest.mark.parametrize(
    ("command", "name", "choices"),
    CHOICES,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unknown_value_is_refused_with_those_that_are_known(
    desk: Desk, command: str, name: str, choices: list[str]
) -> None:
    flag = f"--{name.replace('_', '-')}"
    desk.refuses(
        f"{flag} nothing: unknown; try one of {', '.join(choices)}",
        flag,
        "nothing",
        command=command,
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--batch-tokens", "many"), "'many' is not a valid integer"),
        (("--batch-tokens", "1"), "--batch-tokens 1: must be at least 2"),
        (("--max-length", "0"), "--max-length 0: must be at least 2"),
        (("--max-length", "-5"), "--max-length -5: must be at least 2"),
        (("--seed", "x"), "'x' is not a valid integer"),
        (("--max-bad", "5"), "--max-bad 5: not a share; try 1%"),
        (("--max-bad", "101%"), "--max-bad 101%: not a share; try 1%"),
        (("--max-bad", "-1%"), "--max-bad -1%: not a share; try 1%"),
        (
            ("--fields", "prompt"),
            "--fields prompt: 'prompt' is not NAME=COLUMN; write prompt=question",
        ),
        (("--fields", "prompt=a,prompt=a"), "prompt=a is given twice; keep one"),
        (
            ("--fields", "id=nowhere"),
            "--fields id=nowhere: no row of pool or target has such a column",
        ),
        (("--fields", "promt=question"), "'promt' is no field of a format; known are"),
        (
            ("--layers", "["),
            "--layers [: no weight matches; this model has 39 weights, for example model.embed",
        ),
        (("--layers", "last:0"), "--layers last:0: no weight matches"),
        (("--layers", "vision"), "try all, late, last:N or another regular expression"),
        (("--device", "toaster"), "--device toaster: "),
        (("--device", "meta"), "--device meta: "),
        (
            ("--template", "chat"),
            "--template chat: the tokenizer has no chat template; try --template plain",
        ),
        (
            ("--engine", "difference", "--dtype", "bfloat16"),
            "needs float32 or better, not bfloat16; try --dtype",
        ),
        (("--colour", "red"), "No such option '--colour'"),
        (("--wieghting", "prism"), "--weighting"),
        (("extra",), "unexpected extra argument"),
        (("--config",), "'--config' requires an argument"),
        (
            ("--direction", "x.safetensors"),
            "give either --target PAIRS or --direction FILE, not both",
        ),
        (("--budget", "5%"), "No such option '--budget'"),
        (("--runtime", "spark"), "--runtime spark: unknown; try local, ray or ray:actors=4,GPU=1"),
        (("--runtime", "actors=4"), "--runtime actors=4: unknown; try local, ray or ray:actors=4"),
        (("--runtime", "ray:actors=0"), "not NAME=NUMBER above 0; try ray:actors=4,GPU=1,CPU=4"),
        (("--runtime", "ray:actors=1.5"), "--runtime ray:actors=1.5: not NAME=NUMBER above 0"),
        (("--runtime", "ray:GPU=many"), "--runtime ray:GPU=many: not NAME=NUMBER above 0"),
        (("--runtime", "ray:address"), "--runtime ray:address: not NAME=NUMBER above 0"),
        (("--rank", "0"), "--rank 0: not a rank; try auto, full or 64"),
        (("--damping", "0"), "--damping 0: not one or several numbers above 0; try 0.1 or 0.1,1"),
        (("--damping", "0.1,1"), "--damping 0.1,1: --curvature pairs takes one value; try 0.1"),
        (
            ("--layers", "adapter"),
            "--layers adapter: there is none; give its folder with --adapter",
        ),
    ],
    ids=" ".join,
)
def test_a_wrong_option_is_refused(desk: Desk, words: tuple[str, ...], says: str) -> None:
    desk.refuses(says, *words)


@pytest.mark.parametrize(
    "text", ["", "0", "0%", "101%", "-5", "5.5", "half", "5tokens", "9" * 5000]
)
def test_an_amount_that_is_none_is_refused(desk: Desk, text: str) -> None:
    for command, flag in (("select", "--budget"), ("repair", "--remove")):
        says = "not an amount; try 5%, 500 (rows), 200000tok (supervised tokens) or positive"
        desk.refuses(says, flag, text, command=command)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--per-source", "3"), "--per-source 3: not a share of the budget; try 30%"),
        (("--near-duplicates", "2"), "--near-duplicates 2.0: not between 0 and 1; try 0.8"),
        (("--near-duplicates", "0"), "--near-duplicates 0.0: not between 0 and 1; try 0.8"),
        (("--near-duplicates", "nan"), "--near-duplicates nan: not between 0 and 1; try 0.8"),
        (("--near-duplicates", "80%"), "'80%' is not a valid float"),
        (
            ("--select-from", "x"),
            "--select-from takes scores as they are: leave out --model, --target, --pool",
        ),
    ],
    ids=" ".join,
)
def test_a_wrong_option_of_select_is_refused(desk: Desk, words: tuple[str, ...], says: str) -> None:
    desk.refuses(says, *words, command="select")


@pytest.mark.parametrize(("command", "flag"), [("select", "--budget"), ("repair", "--remove")])
def test_a_budget_larger_than_the_pool_is_refused(desk: Desk, command: str, flag: str) -> None:
    desk.refuses(
        f"{flag} 11 rows: more than the pool's 10 rows; ask for less, or 100%",
        flag,
        "11",
        command=command,
    )
    said = desk.refuses(
        f"{flag} 100000 tokens: more than the pool's ", flag, "100000tok", command=command
    )
    there = int(said.split("the pool's ")[1].split()[0])
    desk.refuses(f"{flag} {there + 1} tokens: more than", flag, f"{there + 1}tok", command=command)
    assert desk.call(flag, f"{there}tok", "--dry-run", command=command).code == 0
    pool = desk.pool([*GOOD, {"prompt": LONG, "completion": "b"}])
    words = ["--max-bad", "50%", "--max-length", "150"]
    says = f"{flag} 11 rows: more than the pool's 10 rows"
    desk.refuses(says, flag, "11", *words, command=command, pool=pool)


@pytest.mark.parametrize("missing", ["--model", "--pool", "--out"])
def test_a_missing_option_is_named(desk: Desk, missing: str) -> None:
    given = {
        "--model": str(desk.model),
        "--pool": desk.pool(GOOD),
        "--target": "t.jsonl",
        "--out": str(desk.out),
    }
    words = [word for name, value in given.items() if name != missing for word in (name, value)]
    refused(
        prism("score", *words),
        f"{missing} is missing; prism score --help shows what a run needs",
        desk.out,
    )
    words = [word for name, value in given.items() if name != "--target" for word in (name, value)]
    refused(prism("score", *words), "give either --target PAIRS or --direction FILE", desk.out)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "RUN is missing; prism evaluate --help shows what it needs"),
        (("run",), "--holdout is missing; prism evaluate --help shows what it needs"),
        (("run", "--holdout", "h", "--against", ","), "--against is empty; try random,length"),
        (("run", "--holdout", "h", "--seeds", "0"), "--seeds 0: must be at least 1"),
        (("run", "--holdout", "h", "--seed", "-1"), "--seed -1: must be between 0 and 4294967295"),
        *(
            (("run", "--holdout", "h", "--steps", steps), f"--steps {steps}: no length above 0")
            for steps in ("0", "0epochs", "4.5", "epochs", "-3", "3 rows", "nan")
        ),
        *(
            (("run", "--holdout", "h", "--rate", rate), f"--rate {float(rate)}: must be above 0")
            for rate in ("0", "-1", "nan", "inf")
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_option_of_evaluate_is_refused(words: tuple[str, ...], says: str) -> None:
    refused(prism("evaluate", *words), says, None)


def test_an_unknown_command_is_refused_and_none_shows_the_help() -> None:
    refused(prism("scroe"), "No such command 'scroe'", None)
    done = prism()
    assert done.code == 0 and done.err == "" and done.out.startswith("Usage: prism ")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [*GOOD, {**GOOD[0], "bad": "perhaps"}],
            "pool.jsonl:11 has 'perhaps', neither true nor false",
        ),
        ([*GOOD, {**GOOD[0], "bad": [1]}], "pool.jsonl:11 has [1], neither true nor false"),
        (
            [{**row, "bad": 7} for row in GOOD],
            "pool.jsonl:1 has 7, neither true nor false; use true/false",
        ),
        (
            [{k: v for k, v in row.items() if k != "bad"} for row in GOOD],
            "no row of the pool has such a label",
        ),
        ([{**row, "bad": None} for row in GOOD], "no row of the pool has such a label"),
    ],
    ids=["late", "list", "number", "none", "empty"],
)
def test_labels_that_are_none_are_refused_before_anything_is_scored(
    desk: Desk, rows: list[Row], says: str
) -> None:
    where = says.replace("pool.jsonl", f"{desk.folder}/pool.jsonl")
    words = ("--label-field", "bad")
    message = f"--label-field bad: {where}"
    desk.refuses(message, *words, command="repair", pool=desk.pool(rows))


# ---------------------------------------------------------------- --config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('modle = "m"\n', "unknown option 'modle'; did you mean model?; known are "),
        ('budget = "5%"\n', "unknown option 'budget'"),
        ("model = m\n", "it must be a TOML file such as a run folder's config.toml"),
        ("seed = 'one'\n", "seed is 'one'; it must be of type int"),
        ("pool = 3\n", "pool is 3; it must be of type list"),
        ("overwrite = 'yes'\n", "overwrite is 'yes'; it must be of type bool"),
        ("engine = 'warp'\n", "--engine warp: unknown; try one of auto"),
        ("max_bad = '5'\n", "--max-bad 5: not a share"),
        (b"model = '\xff'\n", "it must be a TOML file"),
        (None, "No such file or directory"),
    ],
    ids=[
        "unknown",
        "of another command",
        "broken",
        "text",
        "number",
        "yes",
        "value",
        "share",
        "bytes",
        "absent",
    ],
)
def test_a_wrong_config_file_is_refused(desk: Desk, text: str | bytes | None, says: str) -> None:
    file = desk.folder / "config.toml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = desk.refuses(says, "--config", file)
    assert text is None or "--engine" in said or "--max-bad" in said or f"--config {file}: " in said


# ---------------------------------------------------------------- the model


def test_a_conversation_without_a_chat_template_is_refused_wherever_it_stands(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    pool = desk.pool([{"messages": turns}] * 3)
    said = desk.refuses(
        f"{pool}:1: 4 turns of conversation, and the tokenizer has no chat template", pool=pool
    )
    assert "--template plain" in said
    monkeypatch.setattr("prism_select.data.pool.SAMPLE", 1)  # the sample does not show it
    first, later = desk.pool(GOOD), desk.pool([{"messages": turns}], "later.jsonl")
    desk.refuses(f"{later}:1: 4 turns of conversation", "--pool", later, pool=first)
    target = jsonl(desk.folder / "t.jsonl", [{"prompt": turns[:3], "chosen": "a", "rejected": "b"}])
    desk.refuses(f"{target}:1: 4 turns of conversation", target=target)
    assert desk.call("--template", "plain", "--dry-run", pool=pool).code == 0


@pytest.fixture
def copied(desk: Desk) -> Desk:
    """The desk with a model of its own to spoil."""
    folder = desk.folder / "model"
    shutil.copytree(desk.model, folder)
    return Desk(desk.folder, folder)


def test_a_model_that_cannot_be_loaded_is_refused(copied: Desk) -> None:
    weights = copied.model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    copied.refuses(f"--model {copied.model}: ")
    weights.write_bytes(b"")
    copied.refuses(f"--model {copied.model}: ")
    weights.unlink()
    copied.refuses(f"--model {copied.model}: no weights; save it with save_pretrained(folder)")
    (copied.model / "pytorch_model.bin").write_bytes(b"anything")
    copied.refuses(f"--model {copied.model}: only pytorch_model.bin, a pickle, which is never read")
    weights.write_bytes(whole)
    (copied.model / "config.json").write_text("{")
    copied.refuses(f"--model {copied.model}: ")
    (copied.model / "config.json").unlink()
    copied.refuses(f"--model {copied.model}: ")


def test_weights_that_are_missing_are_never_made_up(copied: Desk) -> None:
    weights = copied.model / "model.safetensors"
    kept = {name: value for name, value in load_file(weights).items() if "lm_head" not in name}
    save_file(kept, weights, metadata={"format": "pt"})
    copied.refuses("its files hold no lm_head.weight (1 weights are missing and would be random)")


def test_a_model_without_a_tokenizer_is_refused(copied: Desk) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied.model / name).unlink()
    copied.refuses(f"--model {copied.model}: ")


@pytest.mark.parametrize("name", ["/absent/model", "./absent", "../absent/model", "a/b/c"])
def test_a_model_folder_that_is_not_there_is_refused(desk: Desk, name: str) -> None:
    Desk(desk.folder, Path(name)).refuses(f"--model {Path(name)}: ")
    words = [
        "--pool",
        desk.pool(GOOD),
        "--target",
        jsonl(desk.folder / "pairs.jsonl", PAIRS),
        "--out",
        desk.out,
    ]
    refused(
        prism("score", "--model", name, *words),
        "no such folder; check the path, or give a hub id",
        desk.out,
    )


def test_a_hub_model_without_a_hub_is_refused_at_once(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ConnectError(Exception):
        """As the hub's HTTP library calls it."""

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectError

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    words = (
        "--pool",
        desk.pool(GOOD),
        "--target",
        jsonl(desk.folder / "pairs.jsonl", PAIRS),
        "--out",
        desk.out,
    )
    told = refused(
        prism("score", "--model", "nobody/nothing", *words), "--model nobody/nothing: ", desk.out
    )
    assert (
        "no such folder here, and the hub cannot be reached; check the path, or the network" in told
    )


def test_a_file_that_is_no_model_is_refused(desk: Desk) -> None:
    file = Path(desk.pool(GOOD))
    Desk(desk.folder, file).refuses(
        f"--model {file}: a file that is not .gguf; give the model's folder"
    )


def test_tokens_that_the_model_does_not_know_are_refused(copied: Desk) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(copied.model))
    tokenizer.add_tokens(["Question"])
    tokenizer.save_pretrained(copied.model)
    said = copied.refuses(
        "pool.jsonl:1: the tokenizer makes token 320 of it, and the model knows 320"
    )
    assert "give a folder with the model's own tokenizer" in said


# ---------------------------------------------------------------- NaN


def spoil(folder: Path, name: str, row: int | None) -> None:
    """NaN in a weight, or in one row of it."""
    weights = load_file(folder / "model.safetensors")
    weights[name][... if row is None else row] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_model_of_nan_is_refused(copied: Desk) -> None:
    saved = copied.folder / "saved"
    assert copied.call("--out", saved).code == 0
    spoil(copied.model, "model.layers.1.mlp.up_proj.weight", None)
    said = copied.refuses(f"{copied.folder}/pairs.jsonl:1: ")
    assert "NaN or infinite; try --dtype float32" in said
    words = [
        "--model",
        copied.model,
        "--pool",
        copied.pool(GOOD),
        "--direction",
        saved / "direction.safetensors",
    ]
    refused(prism("score", *words, "--out", copied.out), "NaN or infinite", copied.out)


@pytest.mark.parametrize("engine", ["reverse", "forward", "difference", "reference"])
def test_a_row_whose_score_is_nan_is_set_aside_and_harms_no_other(
    copied: Desk, engine: str
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(copied.model))
    (letter,) = tokenizer("Z", add_special_tokens=False).input_ids
    odd: Row = {"prompt": "Z", "completion": "b"}
    pool = copied.pool([odd, *GOOD[:4], odd, *GOOD[4:]])
    words = ["--engine", engine, "--max-bad", "20%"]
    if engine == "difference":  # its steps are shares of the norm of the weights that count
        words += ["--layers", "layers"]
    clean = copied.folder / "clean"
    assert copied.call(*words, "--out", clean, pool=pool).code == 0
    spoil(copied.model, "model.embed_tokens.weight", letter)
    done = copied.call(*words, pool=pool)
    assert done.code == 0, done.err
    found = scores(copied.out)
    assert [row for row, verdict in enumerate(found["verdict"]) if verdict == "quarantined"] == [
        0,
        5,
    ]
    assert all(
        found[name][0] is None
        for name in ("score", "loglik", "tokens", "score_chosen", "truncated")
    )
    quarantine = [
        json.loads(line) for line in (copied.out / "quarantine.jsonl").read_text().splitlines()
    ]
    assert [row["line"] for row in quarantine] == [1, 6]
    assert all(
        row["reason"].startswith("its score is not finite (nan, log-likelihood nan)")
        for row in quarantine
    )
    good = [row for row in range(12) if row not in (0, 5)]
    ours, theirs = ([table["score"][row] for row in good] for table in (found, scores(clean)))
    apart = np.linalg.norm(np.subtract(ours, theirs)) / np.linalg.norm(theirs)
    assert apart < (2e-2 if engine == "difference" else 1e-4)


def test_infinite_scores_are_refused_too(copied: Desk) -> None:
    weights = load_file(copied.model / "model.safetensors")
    weights["lm_head.weight"] *= 1e38
    save_file(weights, copied.model / "model.safetensors", metadata={"format": "pt"})
    copied.refuses("try --dtype float32")


# ---------------------------------------------------------------- the run folder


def test_a_run_folder_of_another_configuration_is_refused_with_the_option_that_differs(
    desk: Desk,
) -> None:
    assert desk.call().code == 0
    before = {path.name: path.read_bytes() for path in desk.out.iterdir()}

    def differs(says: str, *words: object, **named: Any) -> None:
        done = desk.call(*words, **named)
        refused(done, f"{desk.out} belongs to another run: {says}", None)
        assert "use another --out, or --overwrite to start it afresh" in done.err

    differs('weighting was "prism" there and is "hard" here', "--weighting", "hard")
    differs('layers was "all" there and is "late" here', "--layers", "late")
    differs("max_length was 2048 there and is 100 here", "--max-length", "100")
    differs('command was "score" there and is "select" here', command="select")
    differs("pool contents was ", pool=desk.pool(GOOD[:9]))
    differs("target contents was ", target=jsonl(desk.folder / "pairs.jsonl", PAIRS[:2]))
    differs("pool was ", pool=desk.pool(GOOD, "other.jsonl"))
    long = ",".join(f"prompt=column{i}" for i in range(9))
    differs(
        'fields was not given there and is "prompt=column0,', "--fields", f"{long},prompt=prompt"
    )
    assert {path.name: path.read_bytes() for path in desk.out.iterdir()} == before
    assert (
        desk.call("--batch-tokens", "64", "--max-bad", "3%").code == 0
    )  # may change: the scores do not


def test_another_model_in_the_same_folder_is_another_run(copied: Desk) -> None:
    assert copied.call().code == 0
    assert copied.call("--model", f"{copied.model}/../{copied.model.name}").code == 0, (
        "the same, spelt otherwise"
    )
    spoil(copied.model, "model.embed_tokens.weight", 5)
    refused(copied.call(), f"{copied.out} belongs to another run: model contents was ", None)


@pytest.mark.parametrize("name", ["thesis.txt", "config.toml", "manifest.json", "shards.txt"])
def test_a_folder_that_is_no_run_is_left_alone_even_when_overwriting(desk: Desk, name: str) -> None:
    desk.out.mkdir()
    for content in ('[tool]\nx = "y"\n', "\x00 no toml {"):
        (desk.out / name).write_text(content)
        for words in ((), ("--overwrite",)):
            refused(
                desk.call(*words),
                f"{desk.out} holds {name} and no run; give an empty or new folder",
                None,
            )
        assert [path.name for path in desk.out.iterdir()] == [name] and (
            desk.out / name
        ).read_text() == content


def test_a_place_that_cannot_be_a_folder_is_refused(desk: Desk) -> None:
    file = Path(desk.pool(GOOD))
    for out in (file, file / "run"):
        refused(desk.call("--out", out), f"--out {out}: {file} is a file; give a folder", desk.out)
    refused(
        desk.call("--out", desk.folder / ("x" * 300)),
        "cannot be written (File name too long)",
        desk.out,
    )
    refused(desk.call("--out", "/proc/nothing/here"), "cannot be written", desk.out)


def test_choosing_again_is_refused_where_it_cannot_be_done(desk: Desk) -> None:
    new = desk.folder / "new"

    def refuses(says: str, *words: object, out: Path = new) -> None:
        refused(prism("select", *words, "--out", out), says, new)

    refuses(
        f"--select-from {desk.out}: no complete run there; give the folder of one",
        "--select-from",
        desk.out,
    )
    assert desk.call().code == 0
    again = ["--select-from", desk.out]
    refuses("takes seconds and has no plan: leave out --dry-run", *again, "--dry-run")
    refuses("more than the pool's 10 rows", *again, "--budget", "11")
    refuses("more than the pool's", *again, "--budget", "99999tok")
    refuses("leave out --model", *again, "--model", "m")
    refuses(
        "leave out --layers, --curvature",
        *again,
        "--layers",
        "late",
        "--curvature",
        "ekfac",
        "--seed",
        "3",
    )
    before = {path.name: path.read_bytes() for path in desk.out.iterdir()}
    refuses(
        "it holds the scores to choose from; give another folder",
        *again,
        "--overwrite",
        out=desk.out,
    )
    assert {path.name: path.read_bytes() for path in desk.out.iterdir()} == before
    repaired = desk.folder / "repaired"
    assert desk.call("--out", repaired, command="repair").code == 0
    refuses("a repair run, whose scores point to the unwanted answers", "--select-from", repaired)
    desk.pool(GOOD[:5])
    refuses("the pool's files have changed since; score them again", *again)


# ---------------------------------------------------------------- the disk


class Full:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


STAGES = [
    "config.toml",
    "direction.safetensors",
    "pairs.parquet",
    "00000000-*.parquet",
    "scores.parquet",
]


@pytest.mark.parametrize("name", [*STAGES, "selected.jsonl", "removed.jsonl", "manifest.json"])
def test_a_full_disk_at_any_file_leaves_no_half_of_it_and_the_run_can_go_on(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    opening = Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **named: Any) -> Any:
        file = opening(path, mode, *args, **named)
        return Full(file, 10) if path.match(f"{name}.part") else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        done = desk.call(command="repair")
    assert done.code == 2 and done.err.count("\n") == 1
    assert f"{desk.out}: no space left; free some and run the same command again" in done.err
    left = {path.name for path in desk.out.rglob("*") if path.is_file()}
    assert (
        not list(desk.out.rglob(name))
        and "manifest.json" not in left
        and not any(file.endswith(".part") for file in left)
    )
    assert desk.call(command="repair").code == 0
    assert Counter(scores(desk.out)["verdict"]) == {"removed": 1, "kept": 9}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "none", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(not shutil.which("mount"), reason="needs mount")
def test_a_really_full_disk_is_told_in_one_line(desk: Desk, small_disk: Path) -> None:
    out = small_disk / "run"
    done = desk.call("--out", out)
    assert (
        done.code == 2
        and done.err == f"prism: {out}: no space left; free some and run the same command again\n"
    )
    assert not [path for path in out.rglob("*.part")] and not (out / "manifest.json").exists()
    done = desk.call("--out", out, "--layers", r"layers\.3\.mlp\.up", "--overwrite")
    assert done.code == 0, done.err
    assert (
        f"no page was written: {out}: no space left" in done.out
        and f"prism report {out} makes it" in done.out
    )


# ---------------------------------------------------------------- the ways to end


def test_a_defect_is_one_line_and_exit_code_1_and_its_traceback_comes_when_asked_for(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("by zero\nand more")

    monkeypatch.setattr(pipeline, "read_inputs", broken)
    done = desk.call()
    assert done.code == 1 and done.err.count("\n") == 1
    assert done.err.startswith("prism: a defect of prism: ZeroDivisionError: by zero; add --debug")
    done = desk.call("--debug")
    assert done.code == 1 and "Traceback" in done.err and "in broken" in done.err


def test_control_characters_of_files_never_reach_the_terminal(desk: Desk) -> None:
    odd = "pool\x1b[31m\nred.jsonl"
    pool = desk.pool([{"prompt": "a"}], odd)
    said = desk.refuses("no known format", pool=pool)
    assert said.removesuffix("\n").isprintable()
    done = desk.call("--dry-run", pool=desk.pool(GOOD, odd))
    assert done.code == 0 and all(line.isprintable() for line in done.out.splitlines())


def test_a_process_of_its_own_ends_the_same_way(desk: Desk) -> None:
    pool = desk.pool([*GOOD, "{"])
    words = [
        "--model",
        desk.model,
        "--target",
        jsonl(desk.folder / "pairs.jsonl", PAIRS),
        "--out",
        desk.out,
    ]
    said = refused(
        prism_apart("score", *words, "--pool", pool), f"{pool}:11: broken JSON", desk.out
    )
    assert said == prism("score", *words, "--pool", pool).err


def test_errors_reach_a_caller_in_python_with_the_same_words(desk: Desk) -> None:
    import prism_select

    call: Callable[..., object] = prism_select.score
    pool = desk.pool([*GOOD, "{"])
    with pytest.raises(PrismError) as caught:
        call(
            model=str(desk.model),
            pool=[pool],
            target=jsonl(desk.folder / "pairs.jsonl", PAIRS),
            out=str(desk.out),
        )
    assert f"prism: {caught.value}\n" == desk.refuses("broken JSON", pool=pool)
    assert torch.is_grad_enabled()
