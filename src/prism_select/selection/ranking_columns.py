"""TODO."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prism_select.run.config import ScoreConfig
from prism_select.run.errors import BadOption
from prism_select.selection.rules import round_robin

__all__ = ["Columns", "columns_of", "with_ranking"]


@dataclass(frozen=True)
class Columns:
    """What a choice needs of scores.parquet; not finite where a row could not be scored."""

    ranking: NDArray[np.float64]  # what the choice goes by, the highest first
    score: NDArray[np.float64]
    score_chosen: NDArray[np.float32]
    tokens: NDArray[np.int32]
    others: Mapping[
        str, NDArray[np.float64]
    ]  # scores along groups of pairs and with other dampings, and cosines
    source: NDArray[np.int32]
    sources: Sequence[str]  # what the numbers in `source` mean
    reasons: Mapping[int, str]
    truncated: int


def with_ranking(
    tables: Callable[[], Iterable[pa.Table]], ranking: NDArray[np.float64] | None
) -> Iterator[pa.Table]:
    """The tables, with a column `rank_by` where there is a ranking of all their rows."""
    start = 0
    for table in tables():
        if ranking is not None:
            part = ranking[start : start + len(table)]
            table = table.append_column("rank_by", pa.array(part, pa.float64(), from_pandas=True))
        start += len(table)
        yield table


def columns_of(config: ScoreConfig, tables: Iterable[pa.Table]) -> Columns:
    """Raises BadOption where the scores of an earlier run lack what the choice goes by. Columns
    grow in place: as lists of pieces they would take their memory twice."""
    more = re.compile(r"score:|score_cosine$|score_damping_|rank_by$|exact$")
    parts, sources, reasons = (
        defaultdict[str, bytearray](bytearray),
        dict[str, int](),
        dict[int, str](),
    )
    groups, start, truncated = list[Any](), 0, 0
    for table in tables:
        if config.ranking not in table.column_names:
            raise BadOption(
                f"--normalize {config.normalize}: these scores were made without it; score the pool again"
            )
        for name in {"score", config.ranking, *filter(more.match, table.column_names)}:
            parts[name] += np.asarray(table[name].to_numpy(), dtype=np.float64).data
        parts["score_chosen"] += np.asarray(table["score_chosen"].to_numpy(), dtype=np.float32).data
        parts["tokens"] += np.asarray(table["tokens"].fill_null(0).to_numpy(), dtype=np.int32).data
        parts["source"] += numbered(table["source"], sources).data
        if "score_groups" in table.column_names:
            groups += table["score_groups"].to_pylist()
        for row in np.flatnonzero(table["reason"].is_valid()).tolist():
            reasons[start + row] = table["reason"][row].as_py()
        truncated += table["truncated"].to_pylist().count(True)
        start += len(table)
    kinds = {"score_chosen": np.float32, "tokens": np.int32, "source": np.int32}
    whole: dict[str, Any] = {
        name: np.frombuffer(part, dtype=kinds.get(name, np.float64)) for name, part in parts.items()
    }
    others = {
        name: whole[name]
        for name in whole
        if more.match(name) and not re.match("score:|exact", name)
    }
    if groups:
        width = next((len(row) for row in groups if row), 0)
        others["score_groups"] = np.array([row or [np.nan] * width for row in groups])
    ranking = ranked_by(config, whole)
    return Columns(
        ranking,
        whole["score"],
        whole["score_chosen"],
        whole["tokens"],
        others,
        whole["source"],
        list(sources),
        reasons,
        truncated,
    )


def numbered(names: pa.ChunkedArray, known: dict[str, int]) -> NDArray[np.int32]:
    """Names as their places in `known`, which grows with them."""
    coded = names.combine_chunks().fill_null("").dictionary_encode()
    places = np.array(
        [known.setdefault(name, len(known)) for name in coded.dictionary.to_pylist()],
        dtype=np.int32,
    )
    found: NDArray[np.int32] = places[coded.indices.to_numpy()]
    return found


def ranked_by(config: ScoreConfig, whole: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    targets = [name for name in whole if name.startswith("score:")]
    if "rank_by" in whole:
        return last_where_unknown(whole["rank_by"], whole["score"])
    if "exact" in whole:
        return guesses_last(whole[config.ranking], whole["exact"] > 0)
    if config.combine == "round-robin" and len(targets) > 1:
        tokens = whole["tokens"]
        unit = np.maximum(1, tokens) if config.normalize == "tokens" else np.ones(len(tokens))
        return round_robin(np.column_stack([whole[name] / unit for name in targets]))
    return whole[config.ranking]


def guesses_last(ranking: NDArray[np.float64], exact: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Places, counted down from 0: exact numbers by their order, then guesses by theirs; NaN where
    there is neither."""
    order, known = np.lexsort((-ranking, ~exact)), np.isfinite(ranking)
    places = np.empty(len(ranking))
    places[order] = -np.arange(len(ranking))
    return np.where(known, places, np.nan)


def last_where_unknown(
    ranking: NDArray[np.float64], score: NDArray[np.float64]
) -> NDArray[np.float64]:
    """A ranking of the rows that have a score; those that it says nothing of come last."""
    known = ranking[np.isfinite(ranking)]
    last = known.min() - 1 if len(known) else 0.0
    return np.where(np.isfinite(score), np.where(np.isfinite(ranking), ranking, last), np.nan)
