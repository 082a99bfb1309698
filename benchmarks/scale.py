"""Scale and safety: kills, odd input, endless lines, and a choice among a hundred million rows.

    python benchmarks/scale.py [PART ...]      all parts: two hours on two cores, 30 GB of disk

A part that was done is kept in benchmarks/work/scale and not done again.
"""

import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from results_file import figure, write

from prism_select.data.pool import fingerprint
from prism_select.demo.story import MODEL

WORK = Path(__file__).parent / "work" / "scale"
WORDS = [
    "red",
    "blue",
    "green",
    "cat",
    "dog",
    "house",
    "tree",
    "river",
    "stone",
    "bread",
    "milk",
    "sun",
    "moon",
]
Told: TypeAlias = tuple[dict[str, Any], list[dict[str, Any]]]


def text(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def write_pool(path: Path, rows: int) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for row in range(rows):
            told = {
                "id": row,
                "prompt": text(draw, 4),
                "completion": text(draw, 4),
                "source": draw.choice("abcd"),
            }
            file.write(json.dumps(told) + "\n")


def write_pairs(path: Path) -> None:
    draw = random.Random(1)
    rows = [
        {"prompt": text(draw, 4), "chosen": text(draw, 3), "rejected": text(draw, 3)}
        for _ in range(16)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------- kills

KILLS, ROWS = 30, 20_000
WATCHED = """
import sys
from prism_select.cli import app
from prism_select.scoring.scorer import Scorer
log, table = open(sys.argv[1], "ab", buffering=0), Scorer.table
def begun(self, window, task):
    log.write(b"%d\\n" % window.number)
    return table(self, window, task)
Scorer.table = begun
app.main(sys.argv[2:])
"""


def kills() -> Told:
    """Each kill comes at a moment drawn from the time of a whole run; the same command then goes
    on. Every run that came to its end is kept."""
    kept, rows = WORK / "kills.jsonl", list[dict[str, Any]]()
    if kept.exists():
        rows = [json.loads(line) for line in kept.read_text().splitlines()]
    draw = random.Random(len(rows))
    with tempfile.TemporaryDirectory() as name:
        folder, log = Path(name), Path(name) / "log"
        write_pool(folder / "pool.jsonl", ROWS)
        write_pairs(folder / "pairs.jsonl")
        words = ["score", "--model", str(MODEL), "--pool", str(folder / "pool.jsonl")]
        words += ["--target", str(folder / "pairs.jsonl"), "--out"]

        def started(out: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, "-c", WATCHED, str(log), *words, str(folder / out)]
            return subprocess.Popen(command, stdout=subprocess.DEVNULL)

        began = time.monotonic()
        assert started("whole").wait() == 0
        length = time.monotonic() - began
        whole = pq.read_table(folder / "whole" / "scores.parquet")
        while (left := KILLS - sum(len(row["kills"]) for row in rows)) > 0:
            log.unlink(missing_ok=True)
            out, moments, code = f"run-{len(rows)}", list[float](), None
            while code is None:
                moment = draw.uniform(0, length) if len(moments) < left else None
                process = started(out)
                try:
                    code = process.wait(moment)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                    moments.append(moment or 0.0)
            begun = Counter(log.read_text().split())
            equal = code == 0 and pq.read_table(folder / out / "scores.parquet").equals(whole)
            rows.append(
                {
                    "kills": moments,
                    "equal": equal,
                    "shards": len(begun),
                    "begun": sum(begun.values()),
                }
            )
            print(rows[-1], flush=True)
            with kept.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    again = max(row["begun"] - row["shards"] - len(row["kills"]) for row in rows)
    share = sum(row["equal"] for row in rows) / len(rows)
    told = {
        f"kills at random moments of a run over {ROWS:,} rows": (
            sum(len(row["kills"]) for row in rows),
            "kills",
            "≥ 30",
        ),
        "share of the runs that end with the scores of an uninterrupted one": (share, "", "≥ 1"),
        "shards scored again, beyond one for each kill": (max(0, again), "shards", "≤ 0"),
    }
    return told, [{"part": "kills", **row} for row in rows]


# ---------------------------------------------------------------- odd input


def fuzz() -> Told:
    """The tests of tests/test_fuzz.py, with a thousand examples each: ten rows or so in each, and a
    file for each."""
    counted = """
import sys, pytest
files = rows = 0
class Counter:
    def pytest_collection_finish(self):
        module = sys.modules["test_fuzz"]
        read = module.read_all
        def counting(path):
            global files, rows
            files += 1
            rows += (found := read(path))
            return found
        module.read_all = counting
code = pytest.main(["-q", "tests/test_fuzz.py", "-p", "no:cacheprovider"], plugins=[Counter()])
print("COUNTED", int(code), files, rows)
"""
    env = {**os.environ, "FUZZ": "1000"}
    done = subprocess.run(
        [sys.executable, "-c", counted], capture_output=True, text=True, env=env, check=True
    )
    line = next(line for line in done.stdout.splitlines() if "COUNTED" in line)
    code, files, rows = map(int, line.split()[-3:])
    told = {
        "odd files read": (files, "files", "≥ 200"),
        "odd rows read": (rows, "rows", "≥ 10000"),
        "of these that ended in a traceback": (code, "", "≤ 0"),
    }
    return told, [{"part": "fuzz", "files": files, "rows": rows}]


PEAK = """
import sys
def peak():  # what `resource` tells begins with the memory of the parent
    with open("/proc/self/status") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
"""
READ = """
from prism_select.data.files import read_rows
before = peak()
rows = [(row.line, row.fields is None) for row in read_rows(sys.argv[1])]
assert rows == [(1, False), (2, True), (3, False)], rows
print(peak() - before)
"""


def lines() -> Told:
    """A line of a gigabyte, as it is and packed; the rows around it are read."""
    rows = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as name:
        for ending in ("jsonl", "jsonl.gz"):
            path = Path(name) / f"pool.{ending}"
            with (
                gzip.open(path, "wb", compresslevel=1)
                if ending.endswith("gz")
                else path.open("wb") as file
            ):
                file.write(b'{"text": "a"}\n{"text": "')
                file.writelines([b"x" * 2**20] * 1024)
                file.write(b'"}\n{"text": "b"}\n')
            done = subprocess.run(
                [sys.executable, "-c", PEAK + READ, path],
                capture_output=True,
                text=True,
                check=True,
            )
            rows.append(
                {
                    "part": "lines",
                    "file": path.name,
                    "bytes": path.stat().st_size,
                    "added": int(done.stdout),
                }
            )
            path.unlink()
    highest = max(row["added"] for row in rows) / 1e6
    return {"memory that a line of a gigabyte adds, packed or not": (highest, "MB", "≤ 100")}, rows


# ---------------------------------------------------------------- a choice among very many rows

BATCH = 1 << 16
CHOOSE = """
import time
old, out, budget, cap = sys.argv[1:]
start = time.perf_counter()
from prism_select.commands.select_again import choose_again
from prism_select.run.config import SelectConfig
from prism_select.run.progress import Silent
run = choose_again(SelectConfig(select_from=old, out=out, budget=budget, per_source=cap), Silent())
seconds = time.perf_counter() - start
print(seconds, peak(), run.manifest["counts"]["selected"])
"""


def scores_of(start: int, count: int, draw: np.random.Generator) -> pa.Table:
    """Rows as `prism score` writes them; what is drawn depends on the source, so that caps bind."""
    rows = np.arange(start, start + count)
    source, tokens = rows % 8, draw.integers(1, 400, count, dtype=np.int32)
    score, chosen = draw.normal(size=count) + 0.2 * source, draw.normal(size=count)
    columns = {
        "row": rows,
        "id": pa.array(rows).cast(pa.string()),
        "source": pa.DictionaryArray.from_arrays(source.astype(np.int8), list("abcdefgh")).cast(
            pa.string()
        ),
        "file": pa.array(["pool.jsonl"] * count),
        "line": rows + 1,
        "score": score,
        "score_per_token": score / tokens,
        "tokens": tokens,
        "length": tokens + 9,
        "loglik": -draw.random(count) * tokens,
        "score_chosen": chosen,
        "score_rejected": chosen - score,
        "truncated": np.zeros(count, dtype=bool),
        "verdict": pa.array(["scored"] * count),
    }
    return pa.table(columns)


def made_up_run(folder: Path, rows: int) -> None:
    pool, run, draw = folder / "pool.jsonl", folder / "scored", np.random.default_rng(0)
    run.mkdir()
    with pool.open("wb") as file:
        for start in range(0, rows, BATCH):
            file.write(
                b"".join(
                    b'{"text":"row %d"}\n' % row for row in range(start, min(rows, start + BATCH))
                )
            )
    writer = None
    for start in range(0, rows, BATCH):
        table = scores_of(start, min(BATCH, rows - start), draw)
        writer = writer or pq.ParquetWriter(run / "scores.parquet", table.schema)
        writer.write_table(table)
    assert writer
    writer.close()
    (run / "quarantine.jsonl").touch()
    config = {"pool": [str(pool)], "fields": ""}
    told = {
        "command": "score",
        "config": config,
        "fingerprints": {"pool": fingerprint([str(pool)])},
    }
    (run / "manifest.json").write_text(json.dumps({**told, "timings": {}, "choice": {}}))


def chosen(count: int, cap: str) -> dict[str, Any]:
    """Made-up scores, a real pool file: all of --select-from but its report, copies of scores and
    rows included."""
    with tempfile.TemporaryDirectory(dir=WORK) as name:
        made_up_run(Path(name), count)
        command = [
            sys.executable,
            "-c",
            PEAK + CHOOSE,
            str(Path(name) / "scored"),
            str(Path(name) / "out"),
            "5%",
            cap,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak, selected = map(float, done.stdout.split())
    row = {
        "part": "choose",
        "rows": count,
        "cap": cap,
        "seconds": seconds,
        "peak_bytes": peak,
        "selected": selected,
    }
    print(row, flush=True)
    return row


def million() -> Told:
    rows = [chosen(1_000_000, cap) for cap in ("", "20%")]
    return {
        "choosing 5% of 1,000,000 scored rows": (max(row["seconds"] for row in rows), "s", "≤ 10")
    }, rows


def many() -> Told:
    row = chosen(100_000_000, "20%")
    told = {
        "choosing 5% of 100,000,000 scored rows, no source above 20%": (row["seconds"], "s", ""),
        "peak memory of that": (row["peak_bytes"] / 1e9, "GB", "≤ 4"),
    }
    return told, [row]


PARTS: Mapping[str, Callable[[], Told]] = {
    "kills": kills,
    "fuzz": fuzz,
    "lines": lines,
    "million": million,
    "many": many,
}


def main() -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or PARTS:
        if not (WORK / f"{name}.json").exists():
            told, rows = PARTS[name]()
            (WORK / f"{name}.json").write_text(json.dumps([told, rows]))
    done = [
        json.loads((WORK / f"{name}.json").read_text())
        for name in PARTS
        if (WORK / f"{name}.json").exists()
    ]
    figures = [figure(name, *told) for part, _ in done for name, told in part.items()]
    write("scale.json", [row for _, rows in done for row in rows], figures)


if __name__ == "__main__":
    main()
