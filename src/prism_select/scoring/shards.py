"""Shards: the pool in windows, each scored and written to disk as one file.

    pool → windows of `WINDOW` rows → tables → RUN/shards/00000000-….parquet, …

Choices made here:
- memory does not grow with the pool, and a run that was stopped goes on after its last shard;
- scoring stops as soon as there are too many bad rows, or the pool changes; finished shards stay,
  because --max-bad may be raised for the same run.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prism_select.core.layers import Factored
from prism_select.data.bad_rows import refuse_bad_rows
from prism_select.data.pool import Pool, Survey
from prism_select.data.records import Pair
from prism_select.directions.layout import DirectionLayout
from prism_select.run.config import RowOptions
from prism_select.run.errors import BadRow
from prism_select.run.folder import Store, bad_rows_of
from prism_select.run.progress import Progress
from prism_select.scoring.processes import ProcessGroup
from prism_select.scoring.ray_actors import ActorPool
from prism_select.scoring.scorer import Scorer, Window

__all__ = ["RunInputs", "ScoredShards", "ScoringJob", "finished_shards", "score_pool", "windows_of"]

WINDOW = 2048  # rows read, sorted by length, scored and written together


@dataclass(frozen=True)
class RunInputs:
    """What a run reads before it loads a model; `targets` are pairs by the name of their target.
    `warnings` are about the files."""

    pool: Pool
    survey: Survey
    targets: Mapping[str, Sequence[Pair]]
    fingerprints: Mapping[str, str]
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class ScoringJob:
    """All that scoring needs besides the model. `finished` are shards of an earlier start. A `mask`
    over the pool (None: every row) scores some rows only, in shards of their own `kind`. `bad_rows`
    were met before, under another kind. `settled` are options that the main process has found: the
    day that chat templates show, and what --tune has chosen."""

    inputs: RunInputs
    directions: Sequence[Factored]
    layout: DirectionLayout
    engine: str
    finished: Mapping[int, Path]
    kind: str = ""
    mask: NDArray[np.bool_] | None = None
    bad_rows: int = 0
    settled: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredShards:
    """Shards of all processes, and the bad rows that this process has met, earlier ones
    included."""

    paths: Sequence[Path]
    bad_rows: int


def finished_shards(store: Store, progress: Progress) -> Mapping[int, Path]:
    """The shards of an earlier start of the same command, by number."""
    finished, damaged = store.sound_shards()
    if finished:
        progress.say(
            f"{len(finished)} shards of {WINDOW} rows are there already: going on with the others"
        )
    if damaged:
        numbers = ", ".join(map(str, damaged))
        progress.say(f"shards that were damaged on the disk and are scored again: {numbers}")
    return finished


def score_pool(
    config: RowOptions,
    store: Store,
    job: ScoringJob,
    scorer: Scorer | ActorPool,
    processes: ProcessGroup,
    progress: Progress,
) -> ScoredShards:
    """Scores the windows that are for this process, and waits for the other processes. Raises what
    `refuse_bad_rows` raises, and BadFile where the pool changes."""
    pool, total = job.inputs.pool, job.inputs.survey.rows
    windows, bad_rows = 0, job.bad_rows
    first: tuple[int, BadRow] | None = None  # in the order of the pool, not of the windows' ends
    rows = total if job.mask is None else int(job.mask.sum())
    along = "along groups of pairs" if job.kind.startswith("group") else job.kind
    with progress.task(f"scoring {along}".rstrip(), rows) as task:
        for window, table in scorer.tables(windows_of(job, processes), task):
            windows += 1
            task.advance(len(window.rows) * (table is None))
            pool.refuse_changes({raw.file for raw, _ in window.rows})
            shard = job.finished.get(window.number)
            if table:
                shard = store.write_shard(window.number, table, job.kind)
            bad = bad_rows_of(shard) if shard else []
            bad_rows += len(bad)
            if bad and (first is None or window.number < first[0]):
                first = window.number, bad[0]
            refuse_bad_rows(config, bad_rows, total, first and first[1])
    pool.refuse_changes()
    scorer.sums = [sum(column) for column in zip(*processes.gather(scorer.sums), strict=True)]
    shards = store.present_shards(job.kind)
    if processes.size > 1:
        bad = [row for number in range(windows) for row in bad_rows_of(shards[number])]
        refuse_bad_rows(config, len(bad), total, next(iter(bad), None))
        processes.gather(None)  # all have read the shards before the main process drops them
    return ScoredShards([shards[number] for number in range(windows)], bad_rows)


def windows_of(job: ScoringJob, processes: ProcessGroup) -> Iterator[Window]:
    """The rows of a job in windows, those of other processes included."""
    indices = count() if job.mask is None else np.flatnonzero(job.mask).tolist()
    rows = zip(indices, job.inputs.pool.rows(job.mask), strict=False)
    for number in count():
        window = list(islice(rows, WINDOW))
        if not window:
            return
        numbers, contents = zip(*window, strict=True)
        to_score = processes.has(number) and number not in job.finished
        yield Window(number, numbers, contents, to_score)
