"""Select again: the scores of a complete run, new rules, a new run folder.

    OLD/scores.parquet + rules → OUT/scores.parquet, selected.jsonl, quarantine.jsonl, manifest.json

Choices made here:
- it needs no model and no torch, and takes seconds;
- the pool must be as it was, and a repair run is refused, because its scores point the other way;
- the manifest is that of the old run with a new choice; `scored_by` keeps the config of the run
  that took the scores.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prism_select.data.formats import parse_fields
from prism_select.data.pool import Pool, fingerprint
from prism_select.run.config import BESIDE_PAIRS, OutputOptions, ScoreConfig, SelectConfig
from prism_select.run.errors import BadOption, RunMismatch
from prism_select.run.folder import Run, Store
from prism_select.run.progress import Progress
from prism_select.selection.choice import Chosen, Known, choose_and_write
from prism_select.selection.figures import planted_recall
from prism_select.selection.ranking_columns import rank_rows, with_ranking
from prism_select.selection.rules import budget_limit

__all__ = ["choose_again", "refuse_other_format"]


def choose_again(config: SelectConfig, progress: Progress) -> Run:
    """Raises BadOption where the earlier run cannot be chosen from, RunMismatch where OUT holds
    another run."""
    earlier, store = Run(Path(str(config.select_from))), Store(str(config.out))
    manifest = manifest_to_choose_from(config, earlier, store)
    scored_by = manifest.get("scored_by", manifest["config"])
    pool = Pool(scored_by["pool"], parse_fields(scored_by["fields"]))
    refuse_unfit(config, earlier, manifest, pool)
    store.refuse_others(config, manifest["fingerprints"])
    if store.complete and not config.overwrite:
        refuse_other_format(config, store)
        progress.say(f"{store.path} is complete already; --overwrite starts it afresh")
        return Run(store.path)

    ranking = ranking_without_model(config, earlier)
    tables = partial(with_ranking, partial(score_tables, earlier), ranking)
    rows = rank_rows(config, tables())
    budget_limit(config, rows.ranking, rows.tokens)  # raises where the pool is too small
    store.begin(config, manifest["fingerprints"])
    start = time.perf_counter()
    best = manifest.get("cascade", {}).get("best")
    chosen = choose_and_write(config, store, tables, pool, Known(rows, best))
    for name in ("pairs.parquet", "direction.safetensors"):
        if (earlier.path / name).exists():
            store.write(name, (earlier.path / name).read_bytes())
    seconds = time.perf_counter() - start
    manifest = {**manifest, "target": target_entry(manifest, earlier, chosen, config.normalize)}
    store.write_json("manifest.json", new_manifest(config, manifest, chosen, seconds))
    store.drop_shards()
    return Run(store.path)


def refuse_other_format(config: ScoreConfig, store: Store) -> None:
    """Raises RunMismatch where a complete run has its chosen rows in another format."""
    if not isinstance(config, OutputOptions):
        return
    before = Run(store.path).manifest["config"].get("output_format", "jsonl")
    if before != config.output_format:
        raise RunMismatch(
            f"{store.path} is complete, with its rows as {before}: --output-format "
            f"{config.output_format} takes another --out, or --overwrite to start it afresh"
        )


def manifest_to_choose_from(config: SelectConfig, earlier: Run, store: Store) -> dict[str, Any]:
    """The manifest of the earlier run. Raises BadOption where there is none, or it is at OUT."""
    if not (earlier.path / "manifest.json").exists():
        raise BadOption(
            f"--select-from {earlier.path}: no complete run there; give the folder of one"
        )
    if store.path.resolve() == earlier.path.resolve():
        raise BadOption(
            f"--out {store.path}: it holds the scores to choose from; give another folder"
        )
    return earlier.manifest


def refuse_unfit(
    config: SelectConfig, earlier: Run, manifest: Mapping[str, Any], pool: Pool
) -> None:
    """Raises BadOption where the scores do not fit the pool or the rules."""
    reason, by_groups = "", "groups" in manifest["target"] and config.combine != "mean"
    if fingerprint(pool.files) != manifest["fingerprints"]["pool"]:
        reason = "the pool's files have changed since; score them again"
    elif manifest["command"] == "repair":
        reason = "a repair run, whose scores point to the unwanted answers"
    elif manifest.get("cascade") and config.amount.kind == "positive":
        reason = "its predicted scores have no sure sign; give the budget as a share, 5% say"
    elif by_groups and config.amount.kind == "positive":
        reason = "groups take rows in turn and know no positive ones; give a share"
    if reason:
        raise BadOption(f"--select-from {earlier.path}: {reason}")


def score_tables(earlier: Run) -> Iterator[pa.Table]:
    """The scores of the earlier run, group by group, without its choice and with its reasons."""
    reasons = (row["reason"] for row in earlier.quarantine)  # in the order of the pool, too
    file = pq.ParquetFile(earlier.path / "scores.parquet", pre_buffer=False)
    for group in file.iter_batches():
        table = pa.Table.from_batches([group])
        dropped = [name for name in ("verdict", "rank_by", "group") if name in table.column_names]
        column: list[str | None] = [None] * len(table)
        for row in np.flatnonzero(pc.equal(table["verdict"], "quarantined")).tolist():
            column[row] = next(reasons, None)
        table = table.drop_columns(dropped)
        yield table.append_column("reason", pa.array(column, pa.string()))


def ranking_without_model(config: SelectConfig, earlier: Run) -> NDArray[np.float64] | None:
    """The ranking of --rank-by. Raises BadOption for one that needs a model."""
    if config.rank_by is None:
        return None
    # torch comes with it: choices by the score go without
    from prism_select.selection.baselines import COUNT_BASELINES, count_ranking

    if config.rank_by not in COUNT_BASELINES:
        raise BadOption(
            f"--rank-by {config.rank_by}: needs the model; run prism select anew, without "
            "--select-from"
        )
    scores = earlier.columns("source", "tokens")
    sources = [name or "" for name in scores["source"].to_pylist()]
    tokens = np.nan_to_num(scores["tokens"].to_numpy()).astype(np.int64)
    return count_ranking(config.rank_by, sources, tokens, config.seed)


def target_entry(
    manifest: Mapping[str, Any], earlier: Run, chosen: Chosen, normalize: str
) -> dict[str, Any]:
    """That of the earlier run, with the planted recall of this choice; without it where rows are
    not ranked as held-out answers were."""
    target = dict(manifest["target"])
    if found := target.get("cross_validation"):
        scores = pq.read_table(earlier.path / "pairs.parquet")["held_out_chosen"].to_numpy()
        kept = {key: value for key, value in found.items() if not key.startswith("planted")}
        scored = manifest.get("scored_by", manifest["config"])
        same = scored["normalize"] == normalize and scored["curvature"] not in BESIDE_PAIRS
        target["cross_validation"] = kept | planted_recall(scores, chosen.cutoff if same else None)
    return target


def new_manifest(
    config: SelectConfig, manifest: Mapping[str, Any], chosen: Chosen, seconds: float
) -> dict[str, Any]:
    """The manifest of the earlier run, with what a choice changes; choosing took `seconds`."""
    overlap = {k: v for k, v in manifest["choice"].items() if k == "damping_overlap"}
    timings = {**dict.fromkeys(manifest["timings"], 0.0), "choose": seconds, "total": seconds}
    return {
        **manifest,
        "command": "select",
        "config": asdict(config),
        "counts": chosen.counts,
        "choice": {**chosen.figures, **overlap},
        "scored_by": manifest.get("scored_by", manifest["config"]),
        "timings": timings,
        "warnings": list(dict.fromkeys([*manifest["warnings"], *chosen.warnings])),
    }
