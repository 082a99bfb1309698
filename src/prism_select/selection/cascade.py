"""Cascade: exact scores where the best rows may be, and guesses for the rest.

    look at every row, through the lower blocks → score a random sample → guess → score the rows
    guessed highest → guess again, until the recall of the best m rows, as the sample tells it,
    reaches `--recall`

Choices made here: rounds score half of what the sample says is still needed, since the guess that
follows is better; where that is more than `WORTH` of the pool `PATIENCE` times in a row, all of it
is scored and nothing is guessed (a first guess learns from few rows). What a round scores is
written down before it starts, so that a run that was stopped goes on to the same end. Rows are
scored along one direction; only the best along that of their chosen half too."""

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
from prism_select.selection.cascade_prediction import FEATURES, Recall, cut_for, guessed, recall_of
from prism_select.selection.rules import budget_of, limit_of

__all__ = ["Cascade", "FeatureScorer"]

Floats: TypeAlias = NDArray[np.float64]


Bools: TypeAlias = NDArray[np.bool_]


Rows: TypeAlias = NDArray[np.int64]


SAMPLE, LEAST = 0.07, 500  # of the pool, and rows of it at least


WORTH, PATIENCE = 0.7, 3  # see above


STEP, LEAP = 0.02, 0.1  # of the pool: a round at least, and at most


LARGEST = float(np.finfo(np.float16).max)  # states of some models are larger


NOTHING = Recall(0.0, 0.0, 0.0, 0.0)


PLACED = ("row", "id", "source", "file", "line", "reason")


SEEN = (*PLACED, "tokens", "length", "truncated")


class FeatureScorer(Scorer):
    """Features in place of scores, of what another scorer would score."""

    def __init__(self, look: Callable[[Batch], Tensor], scorer: Scorer) -> None:
        fitting = BatchedEngine(
            scorer.measure.measure, scorer.config.tokens_on(scorer.device.type, graph=False)
        )
        super().__init__(scorer.encoder, fitting, DirectionLayout(), scorer.config, scorer.device)
        self.look = look

    @property
    def schema(self) -> pa.Schema:
        kept = [SHARD.field(name) for name in SEEN]
        return pa.schema([*kept, pa.field("features", pa.list_(pa.float32(), FEATURES))])

    def _score(self, rows: Sequence[Encoded], batch: Batch) -> dict[str, Any]:
        self.real += sum(len(row.tokens) for row in rows)
        self.computed += batch.tokens.numel()
        return {
            "features": pa.FixedSizeListArray.from_arrays(
                self.look(batch).cpu().numpy().ravel(), FEATURES
            ),
            "tokens": [row.targets for row in rows],
            "length": [len(row.tokens) for row in rows],
            "truncated": [row.truncated for row in rows],
            "reason": [None] * len(rows),
        }


@dataclass(frozen=True)
class Seen:
    """What a look at every row gives; `good` rows can be scored."""

    paths: Sequence[Path]
    good: Bools
    tokens: NDArray[np.int64]
    features: NDArray[np.float16]


@dataclass
class Search:
    """How far it came: exact scores, NaN elsewhere, and a guess of each; `tried` rows that have
    none are bad; `halved` rows have their halves already."""

    exact: Floats
    guess: Floats
    tried: Bools
    halved: Bools
    best: int = 1  # how many rows are looked for
    recall: Recall = NOTHING
    rounds: list[dict[str, float]] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Cascade:
    """`through` scores the rows that are wanted (None: all) and returns their shards, which it
    names by their kind."""

    config: ScoreConfig
    store: Store
    through: Callable[[str, Scorer, Bools | None], list[Path]]
    looker: FeatureScorer
    quick: Scorer
    half: Scorer
    full: Scorer

    def run(self) -> tuple[list[Path], dict[str, Any]]:
        """A shard for each window of the pool, and what the manifest says."""
        seen = self.look()
        search = self.search(seen)
        best = np.zeros(len(seen.good), dtype=bool)
        best[
            np.argsort(-np.nan_to_num(search.exact, nan=-np.inf), kind="stable")[: search.best]
        ] = True
        best &= np.isfinite(search.exact)  # fewer than that may have been scored
        halves, exact = (
            _Shards(self.through("half", self.half, best & ~search.halved)),
            _Shards(search.paths),
        )
        there, shards = self.store.present_shards(), list[Path]()
        for number, path in enumerate(seen.paths):
            shards.append(there.get(number) or self._joined(number, path, halves, exact, search))
        return shards, told_of(self.config, search)

    def look(self) -> Seen:
        """Every row of the pool."""
        paths = self.through("look", self.looker, None)
        parts, start = list[pa.Table](), 0
        features = np.empty(
            (sum(pq.read_metadata(path).num_rows for path in paths), FEATURES), dtype=np.float16
        )
        for path in paths:
            table = pq.read_table(path, columns=["tokens", "reason", "features"])
            values = (
                table["features"]
                .combine_chunks()
                .values.to_numpy(zero_copy_only=False)
                .reshape(-1, FEATURES)
            )
            features[start : start + len(table)] = np.nan_to_num(values).clip(
                -LARGEST, LARGEST
            )  # bad rows: zeros
            start += len(table)
            parts.append(table.drop_columns("features"))
        whole = pa.concat_tables(parts)
        tokens = whole["tokens"].fill_null(0).to_numpy().astype(np.int64)
        return Seen(paths, np.asarray(whole["reason"].is_null()), tokens, features)

    def search(self, seen: Seen) -> Search:
        """Round after round, until enough of the best rows are found."""
        good = np.flatnonzero(seen.good)
        draw, size = np.random.default_rng(self.config.seed), max(LEAST, round(SAMPLE * len(good)))
        sample = np.sort(draw.choice(good, min(size, len(good)), replace=False))
        everything = len(sample) > WORTH * len(good)
        rows, poor = len(seen.good), 0  # rounds in a row after which too much was still needed
        search = Search(
            np.full(rows, np.nan), np.full(rows, np.nan), ~seen.good, np.zeros(rows, dtype=bool)
        )
        found, wanted = np.zeros(len(sample), dtype=bool), good if everything else sample
        for number in count():
            self._score(number, wanted, search, everything)
            if number == 0:
                search.best = best_of(self.config, search.exact[sample], seen, sample)
            known, left = np.flatnonzero(np.isfinite(search.exact)), np.flatnonzero(~search.tried)
            alike = np.isin(known, sample[~found])
            search.recall = recall_of(search.exact[known], alike, len(left), search.best)
            search.rounds.append({"rows": len(wanted), "recall": search.recall.estimate})
            if not len(left):
                return search
            guess = guessed(seen.features, search.exact, sample, self.config.seed)
            search.guess = guess.every
            if search.recall.estimate >= self.config.recall:
                return search
            reaches = ~found & (search.exact[sample] >= search.recall.threshold)
            missable = int((1 - self.config.recall) * search.best * (~found).sum() / len(left))
            left = left[np.argsort(-guess.every[left], kind="stable")]
            need = int((guess.every[left] >= cut_for(guess.sample, reaches, missable)).sum())
            poor = poor + 1 if len(known) + need > WORTH * len(good) else 0
            everything = poor == PATIENCE
            least, most = (math.ceil(share * len(good)) for share in (STEP, LEAP))
            wanted = left if everything else left[: min(max(need // 2, least), most)]
            found |= guess.sample >= guess.every[wanted[-1]]
        raise AssertionError("unreachable")

    def _score(self, number: int, rows: Rows, search: Search, everything: bool) -> None:
        """A round, of the rows that were written down for it where it was begun before; one of
        everything, with its halves."""
        begun, _ = self.store.sound_shards("wanted")
        path = begun.get(number) or self.store.write_shard(
            number, pa.table({"row": np.sort(rows)}), "wanted"
        )
        rows = pq.read_table(path)["row"].to_numpy()
        wanted = np.zeros(len(search.exact), dtype=bool)
        wanted[rows] = True
        search.tried |= wanted
        search.halved |= wanted & everything
        paths = self.through(f"exact{number}", self.full if everything else self.quick, wanted)
        search.exact[rows] = pa.concat_tables(
            pq.read_table(path, columns=["row", self.config.ranking]) for path in paths
        )[self.config.ranking].to_numpy()
        search.paths += paths

    def _joined(
        self, number: int, look: Path, halves: "_Shards", exact: "_Shards", search: Search
    ) -> Path:
        """The final shard of a window: exact scores where there are some, guesses elsewhere."""
        seen = pq.read_table(look).drop_columns("features")
        rows = seen["row"].to_numpy()
        guess = np.where(search.tried[rows], np.nan, search.guess[rows])
        tokens = seen["tokens"].fill_null(1).to_numpy()
        both = (
            (guess * tokens, guess)
            if self.config.normalize == "tokens"
            else (guess, guess / tokens)
        )
        for name, values in zip(("score", "score_per_token"), both, strict=True):
            seen = seen.append_column(name, pa.array(values, pa.float64(), from_pandas=True))
        tables = [*filter(None, [exact.at(rows)]), seen]
        if half := halves.at(rows):
            chosen = half["score"]
            told = {
                "score_chosen": chosen,
                "score_rejected": pc.subtract(chosen, tables[0]["score"]),
            }
            tables.insert(0, pa.table(told))
        columns = [
            pc.coalesce(
                *(t[part.name] for t in tables if part.name in t.column_names),
                pa.scalar(None, part.type),
            )
            for part in self.full.schema
        ]
        bad = pc.is_valid(columns[self.full.schema.get_field_index("reason")])
        for place, part in enumerate(self.full.schema):
            if part.name not in PLACED:  # a bad row has no numbers
                columns[place] = pc.if_else(bad, pa.scalar(None, part.type), columns[place])
        columns.append(pa.array(np.isfinite(search.exact[rows])))
        return self.store.write_shard(
            number, pa.table(columns, names=[*self.full.schema.names, "exact"])
        )


class _Shards:
    """Exact scores of some rows of the pool, read where a window needs them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        every = [(path, pq.read_table(path, columns=["row"])["row"].to_numpy()) for path in paths]
        self.spans = [(path, rows[0], rows[-1]) for path, rows in every]

    def at(self, rows: Rows) -> pa.Table | None:
        """A line for each of these rows, which follow one another, of nulls where nothing is known;
        None for none."""
        parts = [
            pq.read_table(path)
            for path, low, high in self.spans
            if low <= rows[-1] and high >= rows[0]
        ]
        if not parts:
            return None
        whole = pa.concat_tables(parts, promote_options="default")
        there = whole["row"].to_numpy()
        inside = np.flatnonzero((there >= rows[0]) & (there <= rows[-1]))
        places = np.full(len(rows), -1)
        places[there[inside] - rows[0]] = inside
        return whole.take(pa.array(places, mask=places < 0))


def best_of(config: ScoreConfig, exact: Floats, seen: Seen, sample: Rows) -> int:
    """How many of the best rows the budget asks for; of one in tokens, by the sample."""
    option, budget = budget_of(config)
    scores = np.where(seen.good, 0.0, np.nan)
    limit = limit_of(option, budget, scores, seen.tokens)
    if budget.kind != "tokens":
        return int(limit)
    order = np.argsort(-np.nan_to_num(exact, nan=-np.inf), kind="stable")
    spent = seen.tokens[sample[order]].cumsum() * (seen.good.sum() / len(sample))
    return max(
        1, round(float(np.searchsorted(spent, limit, side="right") / len(sample) * seen.good.sum()))
    )


def told_of(config: ScoreConfig, search: Search) -> dict[str, Any]:
    recall = {"wanted": config.recall, "estimate": search.recall.estimate}
    return {
        "best": search.best,
        "exact": int(np.isfinite(search.exact).sum()),
        "guessed": int((~search.tried).sum()),
        "rounds": search.rounds,
        "recall": {**recall, "low": search.recall.low, "high": search.recall.high},
    }
