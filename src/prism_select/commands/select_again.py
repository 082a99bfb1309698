"""TODO."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prism_select.data.formats import parse_fields
from prism_select.data.pool import Pool, fingerprint
from prism_select.run.config import ROW_BYTES, SelectConfig
from prism_select.run.errors import BadOption
from prism_select.run.folder import Run, Store
from prism_select.run.progress import Progress
from prism_select.selection.choice import choose_and_write
from prism_select.selection.ranking_columns import columns_of, with_ranking
from prism_select.selection.rules import budget_of, limit_of

__all__ = ["choose_again"]


def choose_again(config: SelectConfig, progress: Progress) -> Run:
    """`--select-from`: the scores of a complete run, new rules, a new run folder. Needs no
    model."""
    old, store = Run(Path(config.select_from)), Store(config.out)
    if not (old.path / "manifest.json").exists():
        raise BadOption(f"--select-from {old.path}: no complete run there; give the folder of one")
    if store.path.resolve() == old.path.resolve():
        raise BadOption(
            f"--out {store.path}: it holds the scores to choose from; give another folder"
        )
    manifest = old.manifest
    scored_by = manifest.get("scored_by", manifest["config"])
    pool = Pool(
        scored_by["pool"],
        parse_fields(scored_by["fields"]),
        scored_by.get("max_row_bytes", ROW_BYTES),
    )
    if fingerprint(pool.files) != manifest["fingerprints"]["pool"]:
        raise BadOption(
            f"--select-from {old.path}: the pool's files have changed since; score them again"
        )
    if manifest["command"] == "repair":
        raise BadOption(
            f"--select-from {old.path}: a repair run, whose scores point to the unwanted answers"
        )
    if manifest.get("cascade") and config.budget.strip() == "positive":
        raise BadOption(
            f"--select-from {old.path}: its guesses have no sure sign; give the budget as a share, 5% say"
        )
    store.refuse_others(config, manifest["fingerprints"])
    if store.complete and not config.overwrite:
        progress.say(f"{store.path} is complete already; --overwrite starts it afresh")
        return Run(store.path)
    reasons = {(row["file"], row["line"]): row["reason"] for row in old.quarantine}
    ranking = drawn_again(config, old.columns("source", "tokens")) if config.rank_by else None

    def tables() -> Iterator[pa.Table]:
        for group in pq.ParquetFile(old.path / "scores.parquet", pre_buffer=False).iter_batches():
            table = pa.Table.from_batches([group])
            table = table.drop_columns(
                [name for name in ("verdict", "rank_by") if name in table.column_names]
            )
            found: list[str | None] = [None] * len(table)
            for row in np.flatnonzero(table["score"].is_null()).tolist():
                found[row] = reasons.get((table["file"][row].as_py(), table["line"][row].as_py()))
            yield table.append_column("reason", pa.array(found, pa.string()))

    ranked = partial(with_ranking, tables, ranking)
    columns, (option, budget) = columns_of(config, ranked()), budget_of(config)
    limit_of(option, budget, columns.ranking, columns.tokens)
    store.begin(config, manifest["fingerprints"])
    started = time.perf_counter()
    chosen = choose_and_write(
        config, store, ranked, pool, columns, manifest.get("cascade", {}).get("best")
    )
    for name in ("pairs.parquet", "direction.safetensors"):
        if (old.path / name).exists():
            store.write(name, (old.path / name).read_bytes())
    seconds = time.perf_counter() - started
    timings = {**dict.fromkeys(manifest["timings"], 0.0), "choose": seconds, "total": seconds}
    kept = {name: told for name, told in manifest["choice"].items() if name == "damping_overlap"}
    changed = {
        "config": asdict(config),
        "counts": chosen.counts,
        "choice": {**chosen.figures, **kept},
    }
    warnings = list(dict.fromkeys([*manifest["warnings"], *chosen.warnings]))
    settled = {
        "command": "select",
        "scored_by": scored_by,
        "timings": timings,
        "warnings": warnings,
    }
    store.write_json("manifest.json", {**manifest, **changed, **settled})
    store.drop_shards()
    return Run(store.path)


def drawn_again(config: SelectConfig, scores: pa.Table) -> NDArray[np.float64]:
    """A ranking that takes no model. Raises BadOption for any other."""
    from prism_select.selection.baselines import (
        COUNT_BASELINES,
        Texts,
    )  # torch comes with it: other choices go without  # torch comes with it: other choices go without

    if config.rank_by not in COUNT_BASELINES:
        raise BadOption(
            f"--rank-by {config.rank_by}: needs the model; run prism select anew, without --select-from"
        )
    sources = [name or "" for name in scores["source"].to_pylist()]
    tokens = np.nan_to_num(scores["tokens"].to_numpy()).astype(np.int64)
    return COUNT_BASELINES[config.rank_by](
        Texts(texts=(), sources=sources, tokens=tokens, seed=config.seed)
    )
