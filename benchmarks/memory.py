"""Peak memory against the size of the pool: a process each for 1,000 and for 100,000 rows, on the
bundled model.

python benchmarks/memory.py        about ten minutes on two cores
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from results_file import figure, write

SIZES = (1_000, 100_000)
SCRIPT = """
import resource, sys, prism_select
from pathlib import Path
folder = Path(sys.argv[1])
from prism_select.demo.story import MODEL
paths = {name: str(folder / f"{name}.jsonl") for name in ("pool", "target")}
prism_select.select(model=str(MODEL), out=str(folder / "run"), **paths)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
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


def text(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def measure(rows: int) -> dict[str, float]:
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "pool.jsonl").open("w") as pool:
            for i in range(rows):
                row = {
                    "id": i,
                    "prompt": text(draw, 4),
                    "completion": text(draw, 4),
                    "source": draw.choice("abcd"),
                }
                pool.write(json.dumps(row) + "\n")
        with (folder / "target.jsonl").open("w") as pairs:
            for _ in range(16):
                row = {"prompt": text(draw, 4), "chosen": text(draw, 3), "rejected": text(draw, 3)}
                pairs.write(json.dumps(row) + "\n")
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, name], check=True, capture_output=True, text=True
        )
        manifest = json.loads((folder / "run" / "manifest.json").read_text())
        return {
            "rows": rows,
            "peak_bytes": int(done.stdout),
            "seconds": manifest["timings"]["total"],
        }


def main() -> None:
    rows = [measure(size) for size in SIZES]
    added = (rows[1]["peak_bytes"] - rows[0]["peak_bytes"]) / 1e6
    write(
        "memory.json", rows, [figure("peak memory that 99,000 more rows add", added, "MB", "≤ 300")]
    )


if __name__ == "__main__":
    main()
