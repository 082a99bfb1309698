"""Cascade: exact scores where the best rows may be, and predicted scores for the other rows.

    features of every row, from the lower blocks → score a random sample → predict → score the rows
    of the highest predicted scores → predict again, until the recall of the best m rows, estimated
    on the sample, reaches `RECALL`

Choices made here:
- a round scores half of the rows that the sample says are needed, since the next prediction is
  better;
- where more than `WORTH` of the pool is needed `PATIENCE` times in a row, the whole pool is scored:
  a first prediction learns from few rows, so one poor prediction proves nothing;
- the rows of a round are written down before it starts, so a run that was stopped goes on to the
  same end;
- rows are scored along one direction; only the best are scored along that of their chosen half too.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import Tensor

from prism_select.core.likelihood import Batch
from prism_select.data.encoding import Encoded
from prism_select.directions.layout import DirectionLayout
from prism_select.run.config import ScoreConfig
from prism_select.run.folder import SHARD, Store
from prism_select.scoring.batched_engine import BatchedEngine
from prism_select.scoring.scorer import Scorer
from prism_select.selection.cascade_prediction import (
    FEATURES,
    Prediction,
    Recall,
    cutoff_for,
    predict_scores,
    recall_of,
)
from prism_select.selection.rules import budget_limit

__all__ = ["Cascade", "FeatureScorer", "PoolFeatures", "Search"]

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
Rows: TypeAlias = NDArray[np.int64]

RECALL = 0.95  # of the best rows: the search ends where the estimate reaches it
SAMPLE, LEAST = 0.07, 500  # of the pool, and rows of it at least
WORTH, PATIENCE = 0.7, 3
STEP, LEAP = 0.02, 0.1  # of the pool: a round at least, and at most
LARGEST = float(np.finfo(np.float16).max)  # states of some models are larger

ROW_COLUMNS = ("row", "id", "source", "file", "line", "reason")
FEATURE_COLUMNS = (*ROW_COLUMNS, "tokens", "length", "truncated")


class FeatureScorer(Scorer):
    """Features in place of scores, of the rows that another scorer would score."""

    def __init__(self, extract: Callable[[Batch], Tensor], scorer: Scorer) -> None:
        tokens = scorer.config.tokens_on(
            scorer.loaded.model.device.type, scorer.loaded.model.size, graph=False
        )
        engine = BatchedEngine(scorer.engine.measure, tokens)
        super().__init__(scorer.loaded, engine, DirectionLayout(), scorer.config)
        self.extract = extract

    @property
    def schema(self) -> pa.Schema:
        described = [SHARD.field(name) for name in FEATURE_COLUMNS]
        return pa.schema([*described, pa.field("features", pa.list_(pa.float32(), FEATURES))])

    def batch_columns(self, rows: Sequence[Encoded], batch: Batch) -> dict[str, Any]:
        self.real += sum(len(row.tokens) for row in rows)
        self.computed += batch.tokens.numel()
        features = self.extract(batch).cpu().numpy().ravel()
        return {
            "features": pa.FixedSizeListArray.from_arrays(features, FEATURES),
            "tokens": [row.targets for row in rows],
            "length": [len(row.tokens) for row in rows],
            "truncated": [row.truncated for row in rows],
            "reason": [None] * len(rows),
        }


@dataclass(frozen=True)
class PoolFeatures:
    """Features of every row; `good` rows can be scored."""

    paths: Sequence[Path]
    good: Bools
    tokens: NDArray[np.int64]
    features: NDArray[np.float16]


@dataclass
class Search:
    """State of a search, of every row of the pool.

    `exact` scores are NaN where there is none; a `tried` row without one is bad; `halved` rows have
    scores along their halves already.
    """

    exact: Floats
    predicted: Floats
    tried: Bools
    halved: Bools
    best: int = 1  # how many rows are searched for
    recall: Recall = field(default_factory=lambda: Recall(0.0, 0.0, 0.0, 0.0))
    rounds: list[dict[str, float]] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the search."""
        recall = self.recall
        return {
            "best": self.best,
            "exact": int(np.isfinite(self.exact).sum()),
            "guessed": int((~self.tried).sum()),
            "rounds": self.rounds,
            "recall": {
                "wanted": RECALL,
                "estimate": recall.estimate,
                "low": recall.low,
                "high": recall.high,
            },
        }


@dataclass(frozen=True)
class Cascade:
    """A search with the scorers that it takes.

    `score(kind, scorer, rows)` scores the rows of a mask, or all for None, and returns their
    shards, which are named by their kind. `features` extracts features; `quick`, `half` and `full`
    score along the direction, along its chosen half, and along both.
    """

    config: ScoreConfig
    store: Store
    score: Callable[[str, Scorer, Bools | None], list[Path]]
    features: FeatureScorer
    quick: Scorer
    half: Scorer
    full: Scorer

    def run(self) -> tuple[list[Path], Search]:
        """A shard for each window of the pool, and how the search ended."""
        pool = self.extract()
        search = self.search(pool)
        best = np.zeros(len(pool.good), dtype=bool)
        order = np.argsort(-np.nan_to_num(search.exact, nan=-np.inf), kind="stable")
        best[order[: search.best]] = True
        best &= np.isfinite(search.exact)  # fewer than that may have been scored
        halves = _Shards(self.score("half", self.half, best & ~search.halved))
        exact = _Shards(search.paths)
        present, shards = self.store.present_shards(), list[Path]()
        for number, path in enumerate(pool.paths):
            shard = present.get(number) or self._write_window(number, path, halves, exact, search)
            shards.append(shard)
        return shards, search

    def extract(self) -> PoolFeatures:
        """Features of every row, in float16; those of bad rows are 0."""
        paths = self.score("features", self.features, None)
        tables, start = list[pa.Table](), 0
        total = sum(pq.read_metadata(path).num_rows for path in paths)
        features = np.empty((total, FEATURES), dtype=np.float16)
        for path in paths:
            table = pq.read_table(path, columns=["tokens", "reason", "features"])
            flat = table["features"].combine_chunks().values.to_numpy(zero_copy_only=False)
            values = np.nan_to_num(flat.reshape(-1, FEATURES)).clip(-LARGEST, LARGEST)
            features[start : start + len(table)] = values
            start += len(table)
            tables.append(table.drop_columns("features"))
        columns = pa.concat_tables(tables)
        tokens = columns["tokens"].fill_null(0).to_numpy().astype(np.int64)
        return PoolFeatures(paths, np.asarray(columns["reason"].is_null()), tokens, features)

    def search(self, pool: PoolFeatures) -> Search:
        """Round after round, until enough of the best rows have an exact score."""
        good, total = np.flatnonzero(pool.good), len(pool.good)
        draw, size = np.random.default_rng(self.config.seed), max(LEAST, round(SAMPLE * len(good)))
        sample = np.sort(draw.choice(good, min(size, len(good)), replace=False))
        whole_pool = len(sample) > WORTH * len(good)
        poor = 0  # rounds in a row after which too much was still needed
        search = Search(
            np.full(total, np.nan), np.full(total, np.nan), ~pool.good, np.zeros(total, dtype=bool)
        )
        reached = np.zeros(len(sample), dtype=bool)  # rows of the sample that rounds have reached
        rows = good if whole_pool else sample
        for number in count():
            self._score_round(number, rows, search, whole_pool)
            if number == 0:
                search.best = best_rows(self.config, search.exact[sample], pool, sample)
            scored = np.flatnonzero(np.isfinite(search.exact))
            unscored = np.flatnonzero(~search.tried)
            unpredicted = np.isin(scored, sample[~reached])
            search.recall = recall_of(search.exact[scored], unpredicted, len(unscored), search.best)
            search.rounds.append({"rows": len(rows), "recall": search.recall.estimate})
            if not len(unscored):
                return search
            prediction = predict_scores(pool.features, search.exact, sample, self.config.seed)
            search.predicted = prediction.rows
            if search.recall.estimate >= RECALL:
                return search
            unscored = unscored[np.argsort(-prediction.rows[unscored], kind="stable")]
            need = rows_needed(search, prediction, sample, reached, unscored)
            poor = poor + 1 if len(scored) + need > WORTH * len(good) else 0
            whole_pool = poor == PATIENCE
            smallest, largest = (math.ceil(share * len(good)) for share in (STEP, LEAP))
            size = len(unscored) if whole_pool else min(max(need // 2, smallest), largest)
            rows = unscored[:size]
            reached |= prediction.sample >= prediction.rows[rows[-1]]
        raise AssertionError("unreachable")

    def _score_round(self, number: int, rows: Rows, search: Search, whole_pool: bool) -> None:
        """Scores the rows of a round, or those that an earlier start has written down for it.

        A round over the whole pool takes scores along the halves too.
        """
        begun, _ = self.store.sound_shards("round")
        path = begun.get(number) or self.store.write_shard(
            number, pa.table({"row": np.sort(rows)}), "round"
        )
        rows = pq.read_table(path)["row"].to_numpy()
        mask = np.zeros(len(search.exact), dtype=bool)
        mask[rows] = True
        search.tried |= mask
        search.halved |= mask & whole_pool
        paths = self.score(f"exact{number}", self.full if whole_pool else self.quick, mask)
        ranking = self.config.ranking
        tables = [pq.read_table(path, columns=["row", ranking]) for path in paths]
        search.exact[rows] = pa.concat_tables(tables)[ranking].to_numpy()
        search.paths += paths

    def _write_window(
        self, number: int, features: Path, halves: "_Shards", exact: "_Shards", search: Search
    ) -> Path:
        """The final shard of a window: exact scores where there are some, else predicted ones."""
        predicted = self._predicted_table(features, search)
        rows = predicted["row"].to_numpy()
        tables = [*filter(None, [exact.at(rows)]), predicted]
        if half := halves.at(rows):
            chosen = half["score"]
            rejected = pc.subtract(chosen, tables[0]["score"])
            tables.insert(0, pa.table({"score_chosen": chosen, "score_rejected": rejected}))
        schema = self.full.schema
        columns = [
            pc.coalesce(
                *(table[column.name] for table in tables if column.name in table.column_names),
                pa.scalar(None, column.type),
            )
            for column in schema
        ]
        bad = pc.is_valid(columns[schema.get_field_index("reason")])
        for i, column in enumerate(schema):
            if column.name not in ROW_COLUMNS:  # a bad row has no numbers
                columns[i] = pc.if_else(bad, pa.scalar(None, column.type), columns[i])
        columns.append(pa.array(np.isfinite(search.exact[rows])))
        return self.store.write_shard(number, pa.table(columns, names=[*schema.names, "exact"]))

    def _predicted_table(self, features: Path, search: Search) -> pa.Table:
        """The rows of a shard of features, with predicted scores where none was tried."""
        table = pq.read_table(features).drop_columns("features")
        rows = table["row"].to_numpy()
        predicted = np.where(search.tried[rows], np.nan, search.predicted[rows])
        tokens = table["tokens"].fill_null(1).to_numpy()
        if self.config.normalize == "tokens":
            columns = {"score": predicted * tokens, "score_per_token": predicted}
        else:
            columns = {"score": predicted, "score_per_token": predicted / tokens}
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values, pa.float64(), from_pandas=True))
        return table


class _Shards:
    """Exact scores of some rows of the pool, read where a window needs them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        rows = [pq.read_table(path, columns=["row"])["row"].to_numpy() for path in paths]
        self.spans = [(path, span[0], span[-1]) for path, span in zip(paths, rows, strict=True)]

    def at(self, rows: Rows) -> pa.Table | None:
        """A line for each of these rows, which follow one another, null where it has no scores;
        None where none of them has."""
        tables = [
            pq.read_table(path)
            for path, low, high in self.spans
            if low <= rows[-1] and high >= rows[0]
        ]
        if not tables:
            return None
        table = pa.concat_tables(tables, promote_options="default")
        present = table["row"].to_numpy()
        inside = np.flatnonzero((present >= rows[0]) & (present <= rows[-1]))
        lines = np.full(len(rows), -1)
        lines[present[inside] - rows[0]] = inside
        return table.take(pa.array(lines, mask=lines < 0))


def rows_needed(
    search: Search, prediction: Prediction, sample: Rows, reached: Bools, unscored: Rows
) -> int:
    """How many rows must still be scored, by the sample, for a recall of `RECALL`."""
    reaches = ~reached & (search.exact[sample] >= search.recall.threshold)
    missable = int((1 - RECALL) * search.best * (~reached).sum() / len(unscored))
    cutoff = cutoff_for(prediction.sample, reaches, missable)
    return int((prediction.rows[unscored] >= cutoff).sum())


def best_rows(config: ScoreConfig, exact: Floats, pool: PoolFeatures, sample: Rows) -> int:
    """How many of the best rows the budget asks for; of one in tokens, estimated on the sample."""
    limit = budget_limit(config, np.where(pool.good, 0.0, np.nan), pool.tokens)
    if config.amount.kind != "tokens":
        return int(limit)
    order = np.argsort(-np.nan_to_num(exact, nan=-np.inf), kind="stable")
    spent = pool.tokens[sample[order]].cumsum() * (pool.good.sum() / len(sample))
    share = np.searchsorted(spent, limit, side="right") / len(sample)
    return max(1, round(float(share * pool.good.sum())))
