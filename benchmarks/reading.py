"""Has reading become slower? Survey of a pool and encoding, by this source and an earlier one.

    git worktree add --detach DIR COMMIT
    python benchmarks/reading.py --before DIR        about two minutes

Each round runs both sources in processes of their own, one after the other, and the least processor
time of all rounds counts. Files have 20,000 short rows; encoding takes 400 rows of one exchange and
100 of four, with the tokenizer of the bundled model.

Choices made here: time is processor time, so a neighbour does little harm."""

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from results_file import figure, write

ROWS, ROUNDS = 20_000, 5
HERE = Path(__file__).parent.parent
WORDS = ["the", "capital", "of", "France", "is", "Paris", "and", "two", "plus", "three", "please"]
MEASURE = """
import json, random, sys, time
from pathlib import Path
from transformers import AutoTokenizer
import prism_select
from prism_select.data.encoding import Encoder
from prism_select.data.pool import Pool
from prism_select.data.records import Example, Turn
seconds = {}
for file in sys.argv[2:]:
    start = time.process_time()
    Pool([file], {}).survey(0)
    seconds[f"survey of {Path(file).name}"] = time.process_time() - start
draw, words = random.Random(1), sys.argv[1].split()
def text(least, most):
    return " ".join(draw.choices(words, k=draw.randint(least, most)))
tokenizer = AutoTokenizer.from_pretrained(Path(prism_select.__file__).parent / "demo" / "model")
for exchanges, count in ((1, 400), (4, 100)):
    rows = []
    for number in range(count):
        pairs = [(Turn("user", text(5, 60)), Turn("assistant", text(5, 120)))
                 for _ in range(exchanges)]
        turns = tuple(turn for pair in pairs for turn in pair)
        rows.append(Example(turns, "", "", "", number, int(exchanges == 1)))
    for template in ("chat", "plain"):
        times = []
        for _ in range(5):
            encoder, start = Encoder(tokenizer, template, 4096), time.process_time()
            for row in rows:
                encoder.encode(row)
            times.append(time.process_time() - start)
        seconds[f"encoding, {template}, {2 * exchanges} turns"] = min(times)
print(json.dumps(seconds))
"""


def pools(folder: Path) -> list[str]:
    """The same instructions as JSON lines, CSV and Parquet, and as messages."""
    draw = random.Random(0)
    rows = [
        {
            "prompt": " ".join(draw.choices(WORDS, k=30)),
            "completion": " ".join(draw.choices(WORDS, k=60)),
        }
        for _ in range(ROWS)
    ]
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in rows
    ]
    for name, lines in (("prompts.jsonl", rows), ("messages.jsonl", chats)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (folder / "prompts.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), folder / "prompts.parquet")
    return sorted(map(str, folder.iterdir()))


def measured(source: Path, files: list[str]) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, " ".join(WORDS), *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--before", type=Path, required=True, help="a worktree of an earlier commit"
    )
    before = parser.parse_args().before.resolve()
    commit = subprocess.run(
        ["git", "-C", str(before), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"before": [], "now": []})
    with tempfile.TemporaryDirectory() as folder:
        files = pools(Path(folder))
        for _ in range(ROUNDS):
            for when, source in (("before", before), ("now", HERE)):
                for name, value in measured(source, files).items():
                    times[name][when].append(value)
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "commit_before": commit,
            "seconds_before": min(both["before"]),
            "seconds_now": min(both["now"]),
        }
        for name, both in times.items()
    ]
    figures = [
        figure(row["name"], row["seconds_now"] / row["seconds_before"], "× before", "≤ 1.1")
        for row in rows
    ]
    write("reading.json", rows, figures)


if __name__ == "__main__":
    main()
