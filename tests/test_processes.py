"""Several processes score as one does: the same rows, the same files, each line said once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import Outcome, jsonl, prism

from prism_select.run.folder import Store
from prism_select.scoring import shards
from prism_select.scoring.processes import ProcessGroup, is_main_process, is_single_process

ROWS, WINDOW = 48, 5
DRIVER = """
import os, sys, time
from prism_select.cli import app
from prism_select.run.folder import Store
from prism_select.scoring import shards
from prism_select.scoring.scorer import Scorer
shards.WINDOW = 5
write = Store.write_shard
def counted(store, number, table, kind):
    with open(os.environ["LOG"], "a") as log:
        log.write(f"{os.environ['RANK']} {number}\\n")
    if os.environ.get("DIES") == f"{os.environ['RANK']} {number}":
        os._exit(9)
    return write(store, number, table, kind)
Store.write_shard = counted
read = shards.bad_rows_of
def slowly(shard):
    time.sleep(0.2 * (os.environ.get("SLOW") == os.environ["RANK"]))
    return read(shard)
shards.bad_rows_of = slowly
app.main(sys.argv[1:])
"""


class Desk:
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.log, self.driver = folder, folder / "log", folder / "driver.py"
        self.driver.write_text(DRIVER)
        rows: list[dict[str, object]] = [
            {"prompt": f"Question {row}?", "completion": f"Answer {row}"} for row in range(ROWS)
        ]
        rows[17] = {"prompt": "nothing"}
        pairs = [{"prompt": "Rome?", "chosen": "In Italy, thank you.", "rejected": "no way"}] * 2
        pool, target = jsonl(folder / "pool.jsonl", rows), jsonl(folder / "pairs.jsonl", pairs)
        self.words = ["--model", str(model), "--pool", pool, "--target", target, "--max-bad", "5%"]

    def together(self, *words: object, dies: str = "", slow: str = "") -> Outcome:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            self.driver,
        ]
        env = {**os.environ, "LOG": str(self.log), "DIES": dies, "SLOW": slow}
        env["OMP_NUM_THREADS"] = "1"
        outcome = subprocess.run(
            [*map(str, command), *map(str, words)],
            capture_output=True,
            text=True,
            env=env,
            timeout=300,
        )
        return Outcome(outcome.returncode, outcome.stdout, outcome.stderr)

    @property
    def written(self) -> list[tuple[int, int]]:
        """Rank and number of each shard, in the order of the numbers."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return sorted(
            ((int(rank), int(number)) for rank, number in lines), key=lambda pair: pair[1]
        )


@pytest.fixture
def desk(tmp_path: Path, plain_model: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr(shards, "WINDOW", WINDOW)
    return Desk(tmp_path, plain_model)


def test_two_processes_give_the_files_of_one(desk: Desk) -> None:
    single, both = desk.folder / "single", desk.folder / "both"
    options = ["--budget", "20%"]
    assert prism("select", *desk.words, *options, "--out", single).code == 0
    outcome = desk.together("select", *desk.words, *options, "--out", both)
    assert outcome.code == 0, outcome.err
    assert desk.written == [(number % 2, number) for number in range(10)]
    assert outcome.out.count("verdicts") == 1 and outcome.out.count("padding was") == 1
    assert {path.name for path in both.iterdir()} == {path.name for path in single.iterdir()}
    ours, theirs = (pq.read_table(out / "scores.parquet") for out in (both, single))
    assert ours.schema == theirs.schema
    for name in ours.column_names:
        if ours.schema.field(name).type == "double":
            a, b = (
                np.asarray(table[name].to_numpy(), dtype=np.float64) for table in (ours, theirs)
            )
            assert np.allclose(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)
        else:
            assert ours[name].equals(theirs[name])
    for name in ("selected.jsonl", "quarantine.jsonl", "direction.safetensors", "pairs.parquet"):
        assert (both / name).read_bytes() == (single / name).read_bytes()
    ours, theirs = (json.loads((out / "manifest.json").read_text()) for out in (both, single))
    assert ours["counts"] == theirs["counts"]
    assert ours["actual"]["tokens"] == theirs["actual"]["tokens"]
    again = desk.together("select", *desk.words, *options, "--out", both)
    assert again.code == 0 and again.out.count("is complete already") == 1
    assert desk.together("select", *desk.words, *options, "--dry-run").code == 0


def test_two_processes_score_along_groups_too(desk: Desk) -> None:
    single, both = desk.folder / "single", desk.folder / "both"
    pairs = [{"prompt": f"{x}?", "chosen": f"{x}, please", "rejected": "no"} for x in "abcdef"]
    target = jsonl(desk.folder / "kinds.jsonl", pairs)
    options = ["--target", target, "--groups", "2", "--budget", "20%"]
    words = desk.words[:4] + desk.words[6:]
    assert prism("select", *words, *options, "--out", single).code == 0
    outcome = desk.together("select", *words, *options, "--out", both)
    assert outcome.code == 0, outcome.err
    ours, theirs = (pq.read_table(out / "scores.parquet") for out in (both, single))
    assert ours["group"].equals(theirs["group"]) and 0 < len(ours["group"].drop_null()) < 12
    assert ours["score_group_2"].is_valid().equals(theirs["score_group_2"].is_valid())


def test_when_one_process_dies_the_others_stop_and_the_same_command_goes_on(desk: Desk) -> None:
    out, single = desk.folder / "run", desk.folder / "single"
    outcome = desk.together("score", *desk.words, "--out", out, dies="1 5")
    assert outcome.code != 0 and not (out / "manifest.json").exists()
    assert "a defect of prism" not in outcome.err
    finished = set(Store(str(out)).present_shards())
    assert finished >= {1, 3} and not finished & {5, 7, 9}
    desk.log.unlink()
    assert desk.together("score", *desk.words, "--out", out).code == 0
    assert {number for _, number in desk.written} == set(range(10)) - finished
    assert prism("score", *desk.words, "--out", single).code == 0
    ours, theirs = (
        pq.read_table(folder / "scores.parquet")["score"].to_numpy() for folder in (out, single)
    )
    assert np.allclose(ours, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_shards_stay_until_the_slowest_process_has_read_them(desk: Desk) -> None:
    outcome = desk.together("score", *desk.words, "--out", desk.folder / "run", slow="1")
    assert outcome.code == 0, outcome.err


def test_what_is_wrong_with_the_input_is_said_once(desk: Desk) -> None:
    outcome = desk.together("score", *desk.words, "--out", desk.folder / "run", "--max-bad", "0%")
    lines = [line for line in outcome.err.splitlines() if line.startswith("prism: ")]
    assert (
        outcome.code != 0
        and len(lines) == 1
        and "pool.jsonl:18: missing field: completion" in lines[0]
    )


def test_a_command_that_one_process_does_is_refused_for_several(desk: Desk) -> None:
    outcome = desk.together(
        "pairs", desk.words[3], "--how", "numbers", "--out", desk.folder / "new.jsonl"
    )
    assert (
        outcome.code != 0
        and "prism pairs: here one process does it all; start it without torchrun" in outcome.err
    )


def test_a_warm_up_is_refused_for_several(desk: Desk) -> None:
    outcome = desk.together("score", *desk.words, "--warmup", "50%", "--out", desk.folder / "run")
    assert (
        outcome.code != 0
        and outcome.err.count("--warmup: trains in one process; start the same command without")
        == 1
    )


def test_a_group_of_one_process_has_nothing_to_send() -> None:
    group = ProcessGroup()
    assert is_single_process() and is_main_process()
    assert all(group.has(number) for number in range(5))
    assert group.broadcast("word") == "word" and group.gather("word") == ["word"]
