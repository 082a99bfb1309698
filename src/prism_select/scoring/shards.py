"""TODO."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prism_select.core.layers import Factored
from prism_select.data.bad_rows import refuse_bad_rows
from prism_select.data.pool import Pool, Survey
from prism_select.data.records import Pair
from prism_select.directions.layout import DirectionLayout
from prism_select.run.config import ScoreConfig
from prism_select.run.errors import BadRow
from prism_select.run.folder import Store, bad_rows_of
from prism_select.run.progress import Progress
from prism_select.scoring.processes import ProcessGroup
from prism_select.scoring.ray_actors import ActorPool
from prism_select.scoring.scorer import Scorer, Window

__all__ = ["Inputs", "Work", "going_on", "score_pool"]

WINDOW = 2048  # rows read, sorted by length, scored and written together


@dataclass(frozen=True)
class Inputs:
    pool: Pool
    survey: Survey
    targets: Mapping[str, Sequence[Pair]]
    fingerprints: Mapping[str, str]


@dataclass(frozen=True)
class Work:
    """What the leader tells the others: all that scoring takes but the model; `there` are shards
    already scored. A part of the rows may be `wanted`, in shards of a `kind` of their own."""

    inputs: Inputs
    directions: Sequence[Factored]
    lines: DirectionLayout
    engine: str
    there: Mapping[int, Path]
    kind: str = ""
    wanted: NDArray[np.bool_] | None = None
    bad: int = 0  # rows of the pool, in what was scored before


def going_on(store: Store, progress: Progress) -> dict[int, Path]:
    """The shards of an earlier start of the same command."""
    there, damaged = store.sound_shards()
    if there:
        progress.say(
            f"{len(there)} shards of {WINDOW} rows are there already: going on with the others"
        )
    if damaged:
        progress.say(
            f"shards that were damaged on the disk and are scored again: {', '.join(map(str, damaged))}"
        )
    return there


def score_pool(
    config: ScoreConfig,
    store: Store,
    work: Work,
    scorer: Scorer | ActorPool,
    processes: ProcessGroup,
    progress: Progress,
) -> tuple[list[Path], int]:
    """Every row that is wanted, window by window; returns the shards, those of all processes, and
    how many bad rows this one has met so far. Stops as soon as there are too many, or the pool
    changes; what is scored by then stays, since --max-bad may be raised for the same run."""
    pool, rows = work.inputs.pool, work.inputs.survey.rows
    wanted = rows if work.wanted is None else int(work.wanted.sum())
    windows, bad = 0, work.bad
    first: tuple[int, BadRow] | None = (
        None  # in the order of the pool, whatever that of the windows
    )
    with progress.task(f"scoring {work.kind}".rstrip(), wanted) as task:
        for window, table in scorer.tables(windows_of(work, processes), task):
            windows += 1
            task.advance(len(window.rows) * (table is None))
            pool.refuse_changes({raw.file for raw, _ in window.rows})
            shard = (
                store.write_shard(window.number, table, work.kind)
                if table
                else work.there.get(window.number)
            )
            found = bad_rows_of(shard) if shard else []
            bad += len(found)
            if found and (first is None or window.number < first[0]):
                first = window.number, found[0]
            refuse_bad_rows(config, bad, rows, first and first[1])
    pool.refuse_changes()
    scorer.sums = [sum(part) for part in zip(*processes.gather(scorer.sums), strict=True)]
    shards = store.present_shards(work.kind)
    if processes.size > 1:
        every = [row for number in range(windows) for row in bad_rows_of(shards[number])]
        refuse_bad_rows(config, len(every), rows, next(iter(every), None))
        processes.gather(None)  # all have read the shards before the leader drops them
    return [shards[number] for number in range(windows)], bad


def windows_of(work: Work, processes: ProcessGroup) -> Iterator[Window]:
    """The pool, or the part of it that is asked for, in windows; wanted are those that this process
    has to score, and that are not there already."""
    part = work.wanted
    asked = count() if part is None else np.flatnonzero(part).tolist()
    found = zip(asked, work.inputs.pool.rows(part), strict=False)
    for number in count():
        if not (window := list(islice(found, WINDOW))):
            return
        places, rows = zip(*window, strict=True)
        yield Window(number, places, rows, processes.has(number) and number not in work.there)
