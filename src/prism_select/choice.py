"""Choice: scores in, verdicts and files out. Needs no model, so `--select-from` can choose again in seconds.

    scores + rules → verdict per row → scores.parquet   selected.jsonl   removed.jsonl   quarantine.jsonl

Choices made here: rows are copied from the pool as they came, in the order of the pool, in one pass that neither holds
nor understands them; texts are read again only for rows that could be chosen, and only when near-duplicates are looked
for. Of the scores, columns of numbers are held and the rest goes by; rank correlations of more than a million rows are
those of a million drawn from them.
"""

import re
import reprlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prism_select.config import ROW_BYTES, Amount, RepairConfig, ScoreConfig, SelectConfig
from prism_select.data.formats import parse_fields
from prism_select.data.inputs import Pool, changed, fingerprint
from prism_select.data.readers import read_texts
from prism_select.data.records import Example, Raw
from prism_select.errors import BadOption
from prism_select.progress import Progress
from prism_select.selection import (
    OUTCOMES,
    NearDuplicates,
    Rules,
    UnreadText,
    best_first,
    choose,
    limit_of,
    round_robin,
)
from prism_select.statistics import (
    auroc,
    average_precision,
    overlap_of_best,
    precision_at,
    rank_correlation,
    stable_share,
)
from prism_select.store import Run, Store, json_line

__all__ = [
    "Chosen",
    "Columns",
    "choose_again",
    "choose_and_write",
    "early_refusals",
    "hidden_sources",
    "refuse_budget",
    "with_ranking",
]

VERDICTS = {
    "score": ("scored", "quarantined"),
    "select": ("selected", "over budget", "near duplicate", "source cap", "quarantined"),
    "repair": ("removed", "kept", "quarantined"),
}
ENOUGH = 10
MANY = 1_000_000
GROUP, GROUP_BYTES = 1 << 16, 1 << 26
_TRUE, _FALSE = {"true", "t", "1", "1.0", "yes", "y", "bad"}, {"false", "f", "0", "0.0", "no", "n", "good"}
_UNKNOWN = {"", "none", "null", "nan"}


@dataclass(frozen=True)
class Columns:
    """What a choice needs of scores.parquet; not finite where a row could not be scored."""

    ranking: NDArray[np.float64]  # what the choice goes by, the highest first
    score: NDArray[np.float64]
    score_chosen: NDArray[np.float32]
    tokens: NDArray[np.int32]
    others: Mapping[str, NDArray[np.float64]]  # scores along groups of pairs and with other dampings, and cosines
    source: NDArray[np.int32]
    sources: Sequence[str]  # what the numbers in `source` mean
    reasons: Mapping[int, str]
    truncated: int


@dataclass(frozen=True)
class Verdicts:
    """One for each row: its place among `names`."""

    codes: NDArray[np.int8]
    names: Sequence[str]

    @property
    def counts(self) -> Counter[str]:
        numbers = counted(self.codes, len(self.names)).tolist()
        return Counter({name: count for name, count in zip(self.names, numbers, strict=True) if count})

    def among(self, *names: str) -> NDArray[np.bool_]:
        among: NDArray[np.bool_] = np.array([name in names for name in self.names])[self.codes]
        return among

    def texts(self, start: int, stop: int) -> pa.Array:
        return pa.DictionaryArray.from_arrays(self.codes[start:stop], list(self.names)).cast(pa.string())


@dataclass(frozen=True)
class Chosen:
    """What a choice adds to the manifest."""

    counts: Mapping[str, int]
    figures: Mapping[str, Any]
    warnings: Sequence[str]


def early_refusals(config: ScoreConfig, rows: int, pool: Pool) -> None:
    """What would stop the choice in the end, found before a model is loaded: `rows` of the pool are good."""
    option, budget = budget_of(config)
    if budget.kind == "rows":
        limit_of(option, budget, np.zeros(rows), np.zeros(rows, dtype=np.int64))
    if isinstance(config, RepairConfig) and config.label_field:
        labels_of(config.label_field, pool)


def refuse_budget(config: ScoreConfig, sampled: Sequence[int], rows: int, every: Callable[[], Iterator[int]]) -> None:
    """Raises BadOption when `rows` good rows do not fill the budget. `sampled` are the supervised tokens of a sample of
    them, 0 where a row cannot be encoded; only where twice the budget is more than they promise are the tokens of
    `every` row counted."""
    option, budget = budget_of(config)
    units = {"rows": [min(1, tokens) for tokens in sampled], "tokens": sampled}.get(budget.kind)
    if units and 2 * budget.value > sum(units) / len(units) * rows:
        tokens = np.fromiter(every(), dtype=np.int64)
        limit_of(option, budget, np.zeros(len(tokens)), tokens)


def budget_of(config: ScoreConfig) -> tuple[str, Amount]:
    """The option that says how much is chosen, and what it says."""
    if isinstance(config, SelectConfig):
        return "--budget", Amount.parse("--budget", config.budget)
    if isinstance(config, RepairConfig):
        return "--remove", Amount.parse("--remove", config.remove)
    return "", Amount("positive")


def choose_and_write(
    config: ScoreConfig,
    store: Store,
    tables: Callable[[], Iterable[pa.Table]],
    pool: Pool,
    columns: Columns | None = None,
    searched: int | None = None,
) -> Chosen:
    """Verdicts for the rows of `tables` (given as often as asked), and the files that follow from them. A cascade has
    `searched` for so many of the best rows."""
    columns = columns or columns_of(config, tables())
    verdicts = decide(config, columns, pool)
    figures: dict[str, Any] = summary_figures(config, columns, verdicts)
    if isinstance(config, RepairConfig) and config.label_field:
        figures["labels"] = label_figures(config.label_field, columns, verdicts, pool)
    write_choice(store, tables(), verdicts, columns, pool)
    verdict_counts = verdicts.counts
    counts = {
        "read": len(verdicts.codes),
        "truncated": columns.truncated,
        **{name: verdict_counts[name] for name in VERDICTS[config.command]},
    }
    counts["scored"] = counts["read"] - counts["quarantined"]
    warnings = [] if config.command == "repair" else hidden_sources(config, columns)
    return Chosen(counts, figures, [*warnings, *beyond(searched, columns, verdicts)])


def beyond(searched: int | None, columns: Columns, verdicts: Verdicts) -> list[str]:
    """A warning where more than a few rows are taken that a cascade has not searched for."""
    taken = columns.ranking[verdicts.among("selected", "removed")]  # places, counted down from 0
    below = 0 if searched is None else int((taken <= -searched).sum())
    if below <= 0.05 * len(taken):
        return []
    return [
        f"{below:,} of the {len(taken):,} rows that were taken are not among the best {searched:,} that the cascade "
        "looked for (a cap, near-duplicates or another budget): better ones may be among its guesses"
    ]


def choose_again(config: SelectConfig, progress: Progress) -> Run:
    """`--select-from`: the scores of a complete run, new rules, a new run folder. Needs no model."""
    old, store = Run(Path(config.select_from)), Store(config.out)
    if not (old.path / "manifest.json").exists():
        raise BadOption(f"--select-from {old.path}: no complete run there; give the folder of one")
    if store.path.resolve() == old.path.resolve():
        raise BadOption(f"--out {store.path}: it holds the scores to choose from; give another folder")
    manifest = old.manifest
    scored_by = manifest.get("scored_by", manifest["config"])
    pool = Pool(scored_by["pool"], parse_fields(scored_by["fields"]), scored_by.get("max_row_bytes", ROW_BYTES))
    if fingerprint(pool.files) != manifest["fingerprints"]["pool"]:
        raise BadOption(f"--select-from {old.path}: the pool's files have changed since; score them again")
    if manifest["command"] == "repair":
        raise BadOption(f"--select-from {old.path}: a repair run, whose scores point to the unwanted answers")
    if manifest.get("cascade") and config.budget.strip() == "positive":
        raise BadOption(f"--select-from {old.path}: its guesses have no sure sign; give the budget as a share, 5% say")
    store.refuse_others(config, manifest["fingerprints"])
    if store.complete and not config.overwrite:
        progress.say(f"{store.path} is complete already; --overwrite starts it afresh")
        return Run(store.path)
    reasons = {(row["file"], row["line"]): row["reason"] for row in old.quarantine}
    ranking = drawn_again(config, old.columns("source", "tokens")) if config.rank_by else None

    def tables() -> Iterator[pa.Table]:
        for group in pq.ParquetFile(old.path / "scores.parquet", pre_buffer=False).iter_batches():
            table = pa.Table.from_batches([group])
            table = table.drop_columns([name for name in ("verdict", "rank_by") if name in table.column_names])
            found: list[str | None] = [None] * len(table)
            for row in np.flatnonzero(table["score"].is_null()).tolist():
                found[row] = reasons.get((table["file"][row].as_py(), table["line"][row].as_py()))
            yield table.append_column("reason", pa.array(found, pa.string()))

    ranked = partial(with_ranking, tables, ranking)
    columns, (option, budget) = columns_of(config, ranked()), budget_of(config)
    limit_of(option, budget, columns.ranking, columns.tokens)
    store.begin(config, manifest["fingerprints"])
    started = time.perf_counter()
    chosen = choose_and_write(config, store, ranked, pool, columns, manifest.get("cascade", {}).get("best"))
    for name in ("pairs.parquet", "direction.safetensors"):
        if (old.path / name).exists():
            store.write(name, (old.path / name).read_bytes())
    seconds = time.perf_counter() - started
    timings = {**dict.fromkeys(manifest["timings"], 0.0), "choose": seconds, "total": seconds}
    kept = {name: told for name, told in manifest["choice"].items() if name == "damping_overlap"}
    changed = {"config": asdict(config), "counts": chosen.counts, "choice": {**chosen.figures, **kept}}
    warnings = list(dict.fromkeys([*manifest["warnings"], *chosen.warnings]))
    settled = {"command": "select", "scored_by": scored_by, "timings": timings, "warnings": warnings}
    store.write_json("manifest.json", {**manifest, **changed, **settled})
    store.drop_shards()
    return Run(store.path)


def drawn_again(config: SelectConfig, scores: pa.Table) -> NDArray[np.float64]:
    """A ranking that takes no model. Raises BadOption for any other."""
    from prism_select.baselines import COUNT_RIVALS, Texts  # torch comes with it: other choices go without

    if config.rank_by not in COUNT_RIVALS:
        raise BadOption(f"--rank-by {config.rank_by}: needs the model; run prism select anew, without --select-from")
    sources = [name or "" for name in scores["source"].to_pylist()]
    tokens = np.nan_to_num(scores["tokens"].to_numpy()).astype(np.int64)
    return COUNT_RIVALS[config.rank_by](Texts(texts=(), sources=sources, tokens=tokens, seed=config.seed))


def with_ranking(tables: Callable[[], Iterable[pa.Table]], ranking: NDArray[np.float64] | None) -> Iterator[pa.Table]:
    """The tables, with a column `rank_by` where there is a ranking of all their rows."""
    start = 0
    for table in tables():
        if ranking is not None:
            part = ranking[start : start + len(table)]
            table = table.append_column("rank_by", pa.array(part, pa.float64(), from_pandas=True))
        start += len(table)
        yield table


def columns_of(config: ScoreConfig, tables: Iterable[pa.Table]) -> Columns:
    """Raises BadOption where the scores of an earlier run lack what the choice goes by. Columns grow in place: as lists
    of pieces they would take their memory twice."""
    more = re.compile(r"score:|score_cosine$|score_damping_|rank_by$|exact$")
    parts, sources, reasons = defaultdict[str, bytearray](bytearray), dict[str, int](), dict[int, str]()
    groups, start, truncated = list[Any](), 0, 0
    for table in tables:
        if config.ranking not in table.column_names:
            raise BadOption(f"--normalize {config.normalize}: these scores were made without it; score the pool again")
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
    others = {name: whole[name] for name in whole if more.match(name) and not re.match("score:|exact", name)}
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
    places = np.array([known.setdefault(name, len(known)) for name in coded.dictionary.to_pylist()], dtype=np.int32)
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
    """Places, counted down from 0: exact numbers by their order, then guesses by theirs; NaN where there is neither."""
    order, known = np.lexsort((-ranking, ~exact)), np.isfinite(ranking)
    places = np.empty(len(ranking))
    places[order] = -np.arange(len(ranking))
    return np.where(known, places, np.nan)


def last_where_unknown(ranking: NDArray[np.float64], score: NDArray[np.float64]) -> NDArray[np.float64]:
    """A ranking of the rows that have a score; those that it says nothing of come last."""
    known = ranking[np.isfinite(ranking)]
    last = known.min() - 1 if len(known) else 0.0
    return np.where(np.isfinite(score), np.where(np.isfinite(ranking), ranking, last), np.nan)


def decide(config: ScoreConfig, columns: Columns, pool: Pool) -> Verdicts:
    """A verdict per row. Raises BadOption when the budget is larger than the pool."""
    if isinstance(config, SelectConfig):
        share = Amount.parse("--per-source", config.per_source).value if config.per_source else 1.0
        names = {"taken": "selected"}
        verdicts = _walk(config, columns, pool, share)
    elif isinstance(config, RepairConfig):
        names = {"taken": "removed", "over budget": "kept"}
        option, budget = budget_of(config)
        limit = limit_of(option, budget, columns.ranking, columns.tokens)
        verdicts = choose(columns.ranking, columns.tokens, columns.source, Rules(budget), limit)
    else:
        return Verdicts((~np.isfinite(columns.score)).astype(np.int8), ("scored", "quarantined"))
    return Verdicts(verdicts, [names.get(verdict, verdict) for verdict in OUTCOMES])


def _walk(config: SelectConfig, columns: Columns, pool: Pool, share: float) -> NDArray[np.int8]:
    (option, budget), ranking = budget_of(config), columns.ranking
    limit = limit_of(option, budget, ranking, columns.tokens)
    if not config.near_duplicates:
        return choose(ranking, columns.tokens, columns.source, Rules(budget, share), limit)
    per_row = max(1.0, float(columns.tokens.mean())) if budget.kind == "tokens" else 1.0
    count = int(2 * limit / per_row) + 100
    while True:
        wanted = set(next(best_first(ranking, count), np.zeros(0)).tolist())
        texts = {row: text for row, text in _texts(pool) if row in wanted}
        rules = Rules(budget, share, NearDuplicates(config.near_duplicates, texts))
        try:
            return choose(ranking, columns.tokens, columns.source, rules, limit)
        except UnreadText:
            count *= 4


def _texts(pool: Pool) -> Iterator[tuple[int, str]]:
    for row, (_, example) in enumerate(pool.rows()):
        yield row, example.text if isinstance(example, Example) else ""


def write_choice(store: Store, tables: Iterable[pa.Table], verdicts: Verdicts, columns: Columns, pool: Pool) -> None:
    """Everything of the run folder that follows from the verdicts, in the order of the pool."""
    start = 0
    with store.writing("scores.parquet") as file:
        writer: pq.ParquetWriter | None = None
        for table in in_groups(tables):
            names = verdicts.texts(start, start + len(table))
            start += len(table)
            table = table.drop_columns(["reason"]).append_column("verdict", names)
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
        if writer:
            writer.close()
    files = {"selected.jsonl": {"selected", "kept"}, "removed.jsonl": {"removed"}, "quarantine.jsonl": {"quarantined"}}
    present = {*verdicts.counts, "quarantined"}
    if "kept" in present or "removed" in present:
        present |= {"kept", "removed"}
    with ExitStack() as stack:
        places: dict[str, IO[bytes]] = {}
        for name, kinds in files.items():
            if kinds & present:
                places.update(dict.fromkeys(kinds, stack.enter_context(store.writing(name))))
        copy_rows(pool, verdicts, places, columns.reasons)
        pool.refuse_changes()


def in_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in groups that suit a file: 65,536 of them, or fewer where they take 64 MB."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= GROUP or sum(part.nbytes for part in held) >= GROUP_BYTES:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def copy_rows(pool: Pool, verdicts: Verdicts, places: Mapping[str, IO[bytes]], reasons: Mapping[int, str]) -> None:
    """Each row of the pool to the file of its verdict, where there is one. Raises BadFile where there are fewer rows
    than verdicts."""
    to = [places.get(name) for name in verdicts.names]
    aside = list(verdicts.names).index("quarantined")
    copied, codes = 0, iter(verdicts.codes.data)
    for file in pool.files:
        texts = read_texts(file, pool.row_bytes)  # first in the zip: a file that ends takes no code with it
        for (line, text), code in zip(texts, codes, strict=False):
            copied += 1
            if (place := to[code]) is None:
                continue
            if code == aside:
                raw = Raw(file, line, text.decode("utf-8", "backslashreplace"), None)
                place.write(json_line(raw.set_aside(reasons.get(copied - 1, ""))))
            else:
                place.write(text + b"\n")
    if copied < len(verdicts.codes):
        raise changed(pool.files)


def labels_of(field: str, pool: Pool) -> list[bool | None]:
    """Whether each row is known to be bad; None where it does not say. Raises BadOption for what is neither true nor
    false, and where no row says."""
    labels = list[bool | None]()
    for raw in pool.raw():
        text = str((raw.fields or {}).get(field)).strip().lower()
        if text not in _TRUE | _FALSE | _UNKNOWN:
            found = reprlib.repr((raw.fields or {})[field])
            raise BadOption(
                f"--label-field {field}: {raw.file}:{raw.line} has {found}, neither true nor false; use true/false, "
                "yes/no, 1/0 or bad/good"
            )
        labels.append(None if text in _UNKNOWN else text in _TRUE)
    if not any(label is not None for label in labels):
        raise BadOption(f"--label-field {field}: no row of the pool has such a label; check its name")
    return labels


def label_figures(field: str, columns: Columns, verdicts: Verdicts, pool: Pool) -> dict[str, Any]:
    """How well the ranking finds the rows that are known to be bad; rows without a score or a label are left out."""
    labels = labels_of(field, pool)
    usable = np.array([label is not None for label in labels]) & np.isfinite(columns.score)
    truth = np.array([bool(label) for label in labels])[usable]
    removed = verdicts.among("removed")[usable]
    per_token = (columns.score / np.maximum(1, columns.tokens))[usable]
    cosine = columns.others.get("score_cosine")
    return {
        "rows": int(usable.sum()),
        "bad": int(truth.sum()),
        "auroc": auroc(columns.score[usable], truth),
        "auroc_per_token": auroc(per_token, truth),
        "average_precision": average_precision(columns.score[usable], truth),
        "average_precision_per_token": average_precision(per_token, truth),
        "precision_at_removed": precision_at(removed, truth),
        "removed": int(removed.sum()),
        **({"auroc_cosine": auroc(cosine[usable], truth)} if cosine is not None else {}),
    }


def hidden_sources(config: ScoreConfig, columns: Columns) -> list[str]:
    """A warning where the source that raises the chosen answers most stands last, because it raises the rejected ones
    more: a gap alone may not be what the user wants. Means by source, of those with `ENOUGH` scored rows; none where
    only the best rows have halves."""
    size = len(columns.sources)
    count, raised, stands = np.zeros(size, dtype=np.int64), np.zeros(size), np.zeros(size)
    for some in slices(len(columns.score)):
        scored, source = np.isfinite(columns.score_chosen[some]), columns.source[some]
        if (np.isfinite(columns.score[some]) > scored).any():
            return []
        unit = np.maximum(1, columns.tokens[some]) if config.ranking == "score_per_token" else np.ones(len(scored))
        count += np.bincount(source[scored], minlength=size)
        raised += np.bincount(source[scored], (columns.score_chosen[some] / unit)[scored], size)
        stands += np.bincount(source[scored], (columns.score[some] / unit)[scored], size)
    means = {
        columns.sources[i]: (raised[i] / count[i], stands[i] / count[i])
        for i in np.flatnonzero(count >= ENOUGH).tolist()
    }
    if len(means) < 2:
        return []
    best = max(means, key=lambda name: means[name][0])
    if means[best][0] <= 0 or means[best][1] > min(mean for _, mean in means.values()):
        return []
    return [
        f"source {best} raises the chosen answers most ({means[best][0]:+.2g} a row on average) and still stands last "
        f"({means[best][1]:+.2g}), since it raises the rejected ones more; nearer negatives or --common remove may help"
    ]


def slices(rows: int) -> Iterator[slice]:
    """A million rows each."""
    return (slice(start, start + MANY) for start in range(0, rows, MANY))


def counted(codes: NDArray[Any], size: int, rows: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
    """How often each of `size` numbers stands in `codes`, or in those of some rows."""
    total = np.zeros(size, dtype=np.int64)
    for some in slices(len(codes)):
        total += np.bincount(codes[some] if rows is None else codes[some][rows[some]], minlength=size)
    return total


def summary_figures(config: ScoreConfig, columns: Columns, verdicts: Verdicts) -> dict[str, Any]:
    """Shares of each source in the pool and in the choice, and how far length, damping and the pairs decide."""
    scored, taken = np.isfinite(columns.score), verdicts.among("selected", "removed")
    read, chosen = (counted(columns.source, len(columns.sources), rows) for rows in (scored, taken))
    shares = {
        name: {"pool": int(read[i]), "chosen": int(chosen[i])} for i, name in enumerate(columns.sources) if read[i]
    }
    few = np.arange(min(len(scored), MANY))
    if len(scored) > MANY:
        few = np.unique(np.random.default_rng(config.seed).integers(len(scored), size=MANY))
    few = few[scored[few]]
    tokens = columns.tokens[few].astype(np.float64)
    by_length = {"none": columns.score[few], "tokens": columns.score[few] / np.maximum(1, tokens)}
    if "score_cosine" in columns.others:
        by_length["norm"] = columns.others["score_cosine"][few]
    figures: dict[str, Any] = {
        "sources": dict(sorted(shares.items())),
        "rank_correlation_with_tokens": {name: rank_correlation(s, tokens) for name, s in by_length.items()},
    }
    dampings = {name.removeprefix("score_damping_"): s for name, s in columns.others.items() if "_damping_" in name}
    if len(config.dampings) > 1:
        every = {f"{config.dampings[0]:g}": columns.score, **dampings}
        figures["damping_overlap"] = [
            {"dampings": [a, b], "overlap": overlap_of_best(every[a][scored], every[b][scored], 0.05)}
            for a, b in combinations(every, 2)
        ]
    if "score_groups" in columns.others and taken.any():
        unit = np.maximum(1, columns.tokens) if config.ranking == "score_per_token" else np.ones(len(scored))
        groups = (columns.others["score_groups"] / unit[:, None])[scored]
        figures["stable_share"] = stable_share(groups, taken[scored], config.seed)
    return figures
