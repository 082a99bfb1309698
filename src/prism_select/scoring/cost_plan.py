"""Planning: what a run will cost, from the time that it has taken so far and a few seconds of its
engine.

seconds = so far (load, target, curvature) + the pool read twice more and encoded + tokens · seconds
per token
memory  = the peak of this process after the longest batch of a sample
disk    = directions + 120 bytes a row

Choices made here: the longest batch runs first and is not timed unless it is alone, so that what is
made once counts once; then batches of all lengths, for as long as `TIMED` in a plan and as `SHARE`
of the scoring in a run, whose pool may be so small that none follows."""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from prism_select.core.likelihood import Batch

__all__ = ["Plan", "make_plan", "peak_memory", "seconds_per_token", "timed"]

BYTES_PER_ROW = 120  # of scores.parquet, measured on short ids


TIMED, SHARE = 4.0, 0.02


@dataclass(frozen=True)
class Plan:
    """Of the whole run: supervised and other tokens without padding, wall time, peak memory, and
    what it writes."""

    tokens: int
    seconds: float
    memory_bytes: int
    disk_bytes: int


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest so far: of the GPU where the model is on one, otherwise of the
    process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path(
        "/proc/self/status"
    )  # Linux: what getrusage says there holds also for whoever started the process
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def timed(way: Callable[[Batch], object], batch: Batch) -> float:
    """Seconds, until a GPU is done with it, too."""
    start = time.perf_counter()
    way(batch)
    if batch.tokens.is_cuda:
        torch.cuda.synchronize(batch.tokens.device)
    return time.perf_counter() - start


def seconds_per_token(
    engine: Callable[[Batch], object], batches: Sequence[Batch], tokens: int, thorough: bool
) -> float:
    """Of an engine, by batches of a sample, the longest first, for a pool of so many tokens."""

    def measured(batch: Batch) -> tuple[float, int]:
        return timed(engine, batch), int(batch.real.sum())

    first = measured(batches[0])
    left = TIMED if thorough else min(TIMED, SHARE * first[0] / first[1] * tokens)
    found, middle = list[tuple[float, int]](), max(1, len(batches) // 2)
    for batch in [*batches[middle:], *batches[1:middle]]:  # the usual lengths before the long
        if left < first[0] * (not thorough):
            break
        found.append(measured(batch))
        left -= found[-1][0]
    seconds, real = (sum(part) for part in zip(*(found or [first]), strict=True))
    return float(seconds / real)


def make_plan(
    per_token: float,
    tokens: int,
    rows: int,
    numbers: int,
    other_seconds: float,
    device: torch.device,
) -> Plan:
    """`numbers` are those of all directions; `other_seconds` are spent outside the engine."""
    return Plan(
        tokens,
        other_seconds + tokens * per_token,
        peak_memory(device),
        numbers * 4 + rows * BYTES_PER_ROW,
    )
