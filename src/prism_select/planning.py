"""Planning: what a run will cost, from a sample of its rows and a few seconds of its engine.

seconds = tokens · seconds per token of the engine on the sample (target included)
memory  = this process now, with the model in it + the directions + one batch's states
disk    = directions + 120 bytes a row
"""

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from prism_select.core.likelihood import Batch

__all__ = ["Plan", "make_plan", "peak_memory"]

BYTES_PER_ROW = 120  # of scores.parquet, measured on short ids


@dataclass(frozen=True)
class Plan:
    tokens: int
    seconds: float
    memory_bytes: int
    disk_bytes: int


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest so far: of the GPU where the model is on one, otherwise of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def make_plan(engine: Callable[[Batch], object], numbers: int, batch: Batch, rows: int, lengths: Sequence[int]) -> Plan:
    """`numbers` are those of all directions, `lengths` those of a sample of the pool's `rows` rows; `batch` is one full
    batch of that sample."""
    start = time.perf_counter()
    engine(batch)
    per_token = (time.perf_counter() - start) / batch.tokens.numel()
    tokens = round(sum(lengths) / max(1, len(lengths)) * rows)
    directions = numbers * 4
    device = batch.tokens.device
    return Plan(tokens, tokens * per_token, peak_memory(device) + directions, directions + rows * BYTES_PER_ROW)
