"""Results: the JSON that every benchmark commits: machine, versions, raw rows, and figures that
hold or do not."""

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def figure(
    name: str, value: float, unit: str, wanted: str, interval: Sequence[float] | None = None
) -> dict[str, Any]:
    """`wanted` is "≥ 0.75", "≤ 300" or empty (nothing is asked); `interval` is the 95% interval, if
    there is one."""
    holds = None
    if wanted:
        sign, bar = wanted.split()
        holds = value >= float(bar) if sign == "≥" else value <= float(bar)
    made = {"name": name, "value": value, "unit": unit, "wanted": wanted, "holds": holds}
    return made | ({"interval": list(interval)} if interval else {})


def write(
    name: str, rows: Sequence[Mapping[str, Any]], figures: Sequence[Mapping[str, Any]]
) -> None:
    libraries = ("prism-select", "torch", "transformers", "numpy")
    processor = next(
        (x.split(":")[1].strip() for x in _cpuinfo() if x.startswith("model name")),
        platform.processor(),
    )
    content = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"system": platform.platform(), "processor": processor, "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in libraries},
        },
        "figures": list(figures),
        "rows": list(rows),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(
        json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    for line in figures:
        state = {True: "holds", False: "FALLS SHORT", None: ""}[line["holds"]]
        print(f"{line['name']}: {line['value']:.3f} {line['unit']} {line['wanted']} {state}")


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
