"""Cost plan: what a run will cost, from the time it has taken so far and a few seconds of its
engine.

    seconds = so far (load, target, curvature) + two more readings of the pool + its encoding
              + tokens · seconds per token
    memory  = peak of this process after the longest batch of a sample; of a model on several
              devices, the peaks of all
    disk    = directions + 120 bytes per row

Choices made here:
- the longest batch runs first, so that work done once per process is not counted per token; it is
  timed only where it is the only batch;
- the other batches run for `TIMED` seconds in a plan, and for a share of `SHARE` of the scoring
  time in a run; a small pool may leave time for none of them.
"""

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from prism_select.core.likelihood import Batch

__all__ = [
    "Plan",
    "make_plan",
    "peak_memory",
    "peaks_by_device",
    "seconds_per_token",
    "timed",
]

BYTES_PER_ROW = 120  # of scores.parquet, measured on short ids
TIMED, SHARE = 4.0, 0.02


@dataclass(frozen=True)
class Plan:
    """Of the whole run: tokens without padding, wall time, peak memory (in `by_device`, too, where
    a model is on several), bytes written."""

    tokens: int
    seconds: float
    memory_bytes: int
    disk_bytes: int
    by_device: Mapping[str, int] = field(default_factory=dict, kw_only=True)


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of the GPU where the model is on one, otherwise of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")  # Linux: getrusage would count the parent process too
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peaks_by_device(devices: Sequence[torch.device]) -> dict[str, int]:
    return {str(device): peak_memory(device) for device in devices}


def timed(engine: Callable[[Batch], object], batch: Batch) -> float:
    """Seconds for one batch, until a GPU has finished it too."""
    start = time.perf_counter()
    engine(batch)
    if batch.tokens.is_cuda:
        torch.cuda.synchronize(batch.tokens.device)
    return time.perf_counter() - start


def seconds_per_token(
    engine: Callable[[Batch], object], batches: Sequence[Batch], tokens: int, thorough: bool
) -> float:
    """Measured on batches of a sample, the longest first, for a pool of `tokens` tokens."""

    def measured(batch: Batch) -> tuple[float, int]:
        return timed(engine, batch), int(batch.real.sum())

    first = measured(batches[0])
    remaining = TIMED if thorough else min(TIMED, SHARE * first[0] / first[1] * tokens)
    timings, middle = list[tuple[float, int]](), max(1, len(batches) // 2)
    for batch in [*batches[middle:], *batches[1:middle]]:  # the usual lengths before the long
        if remaining < first[0] * (not thorough):
            break
        timings.append(measured(batch))
        remaining -= timings[-1][0]
    seconds, real = (sum(column) for column in zip(*(timings or [first]), strict=True))
    return float(seconds / real)


def make_plan(
    per_token: float,
    tokens: int,
    rows: int,
    numbers: int,
    other_seconds: float,
    devices: Sequence[torch.device],
) -> Plan:
    """`numbers`: of all directions together. `other_seconds`: spent outside the engine."""
    peaks = peaks_by_device(devices)
    return Plan(
        tokens,
        other_seconds + tokens * per_token,
        sum(peaks.values()),
        numbers * 4 + rows * BYTES_PER_ROW,
        by_device=peaks if len(peaks) > 1 else {},
    )
