"""How much memory does a model need beyond its weights, and what does a low rank lose?

    make size DATA=…        twenty minutes on two cores; alone: python benchmarks/size.py --data DIR

A random Llama of 399 million numbers in bfloat16 (22 blocks, width 1,024, vocabulary 32,000), 24
rows and 12 pairs of a few dozen tokens; each way is a process of its own. Memory is the peak of
`prism score` less that of the same command on the bundled tiny model, over the bytes of the
weights. With --data: what rank 64 keeps on a model that has learned something; without it that
stays as it is on record.

Choices made here: a random model has the gradients of no real one, so what a rank keeps is measured
on Gemma-3-270M, against the full direction on the same rows."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from results_file import RESULTS, figure, write

from prism_select.demo.train import MODEL_DIR

Row = dict[str, Any]
WORK = Path(__file__).parent / "work" / "size"
SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 3840,
    "num_hidden_layers": 22,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
WAYS: Mapping[str, Row] = {
    "default": {},
    "late": {"layers": "late"},
    "full": {"rank": "full"},
}
WANTED = {"default": "≤ 1.6", "full": "≤ 3.0"}
SCRIPT = """
import json, sys, prism_select
print(json.dumps(dict(prism_select.score(**json.loads(sys.argv[1])).manifest)))
"""


def model() -> Path:
    folder = WORK / "llama-399m"
    if not (folder / "model.safetensors").exists():
        import torch
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
        network = LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16()
        folder.mkdir(parents=True, exist_ok=True)
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def files() -> Row:
    from prism_select.demo import world

    rows = {"pool": world.pool(60, 0)[:24], "target": world.pairs("capitals", 12, 0)}
    for name, some in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in some)
        (WORK / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return {name: str(WORK / f"{name}.jsonl") for name in rows}


def measured(model: Path, **options: Any) -> Row:
    """The manifest of a run, with the bytes of its folder."""
    with tempfile.TemporaryDirectory() as out:
        given = {**files(), "model": str(model), "dtype": "bfloat16", "out": out, **options}
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(given)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        size = sum(file.stat().st_size for file in Path(out).rglob("*") if file.is_file())
        return {**json.loads(done.stdout.splitlines()[-1]), "folder_bytes": size}


def sizes() -> Iterator[tuple[Row, list[Row]]]:
    weights = (model() / "model.safetensors").stat().st_size
    for way, options in WAYS.items():
        tiny, big = (measured(m, **options) for m in (Path(MODEL_DIR), model()))
        peaks = [run["actual"]["memory_bytes"] for run in (tiny, big)]
        row = {"way": way, "weights": weights, "tiny_peak": peaks[0], "peak": peaks[1]}
        row |= {"timings": big["timings"], "folder_bytes": big["folder_bytes"]}
        row |= {"engine": big["engine"]["name"]} if "name" in big["engine"] else {}
        ratio, folder = (peaks[1] - peaks[0]) / weights, big["folder_bytes"] / weights
        wanted = WANTED.get(way, "")
        yield (
            row,
            [
                figure(f"peak memory above a tiny run's, {way}", ratio, "× weights", wanted),
                figure(
                    f"run folder, {way}", folder, "× weights", "≤ 0.05" if way == "default" else ""
                ),
            ],
        )


def low_against_full(data: Path) -> tuple[Row, list[Row]]:
    """On Gemma-3-270M: scores of 400 rows along both directions, in one pass."""
    import coverage
    import numpy as np
    from real import lines

    from prism_select.commands.read_inputs import read_inputs
    from prism_select.core.engines import reverse
    from prism_select.core.statistics import rank_correlation
    from prism_select.data.records import Example
    from prism_select.directions.from_pairs import directions_from_pairs
    from prism_select.models.loading import load_model
    from prism_select.run.config import ScoreConfig
    from prism_select.run.progress import Silent
    from prism_select.scoring.batched_engine import BatchedEngine, score_rows, without_norms

    (scenario,) = [s for s in coverage.real_scenarios(data) if s.name == "gsm8k"]
    given: Row = {"model": str(scenario.model), "pool": scenario.pool, "target": scenario.target}
    given |= {"dtype": "bfloat16", "max_length": 256, "layers": "all", "out": "unused"}
    inputs = read_inputs(ScoreConfig(**given), Silent())
    loaded = load_model(ScoreConfig(**given), "all", Silent(), inputs.survey.sample)
    sets = [
        directions_from_pairs(ScoreConfig(**given, rank=rank), loaded, inputs.targets, Silent())
        for rank in ("full", "64", "16")
    ]
    rows = [row for _, row in inputs.pool.rows() if isinstance(row, Example)][:400]
    encoded = [loaded.encoder.encode(row) for row in rows]
    engine = reverse(loaded.model, sets[0].weights, [found.directions[0] for found in sets])
    batched = BatchedEngine(without_norms(engine), 512)
    scores, _ = score_rows(batched, encoded, loaded.model.device)
    best = [set(np.argsort(-column)[: len(rows) // 20].tolist()) for column in scores.T]
    row: Row = {"pool": len(lines(Path(scenario.pool))), "rows": len(rows)}
    figures = list[Row]()
    for k, rank in enumerate((64, 16), start=1):
        full = sets[k].full
        assert full
        energy = (sets[k].length / full.length) ** 2
        values = {
            "rank correlation with the full direction": rank_correlation(
                scores[:, 0], scores[:, k]
            ),
            "overlap of the best 5%": len(best[0] & best[k]) / len(best[0]),
            "share of the squared length kept": energy,
        }
        bars = {name: "" for name in values}
        if rank == 64:
            bars = dict(zip(values, ("≥ 0.99", "≥ 0.95", ""), strict=True))
        row[f"rank {rank}"] = values
        figures += [
            figure(f"Gemma-3-270M, all layers, rank {rank}: {name}", value, "", bars[name])
            for name, value in values.items()
        ]
    return row, figures


def on_record() -> tuple[Row, list[Row]]:
    """What was measured on Gemma before, with its date."""
    told = json.loads((RESULTS / "size.json").read_text(encoding="utf-8"))
    (row,) = [row for row in told["rows"] if "rank 64" in row]
    figures = [line for line in told["figures"] if line["name"].startswith("Gemma")]
    return {"measured": told["date"], **row}, figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the public data sets, for Gemma")
    given = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    measured_rows = [*sizes()]
    measured_rows.append(low_against_full(given.data) if given.data else on_record())
    rows = [row for row, _ in measured_rows]
    write("size.json", rows, [line for _, lines in measured_rows for line in lines])


if __name__ == "__main__":
    main()
