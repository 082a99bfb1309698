"""The cascade on two mixed pools: how many rows must be scored exactly until most of the best ones
are found?

    python benchmarks/cascade.py --data DIR      an hour on two cores; a stopped study resumes

Pools: 10,540 short rows among which are worked math (`cascade`), or right answers to science
questions (`cascade-choices`). Targets: 40 worked solutions and the same with other numbers; 40
questions of ARC, all choices. Model: a Llama of 13M numbers, trained here from nothing on the same
rows for some minutes; float32.

Choices made here: every row is scored once, and ten cascades look scores up, so that their recall
is known; on the first pool, on which the cascade was made, two more are run, and the scoring of
each is put beside forward passes over the pool before and after it."""

import argparse
import random
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from gemma import general, put, quizzes, right, row, short
from real import WORK, lines, pair, save
from results_file import figure, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import prism_select
from prism_select.core.likelihood import token_logliks
from prism_select.data.batches import collate, plan_batches
from prism_select.data.encoding import Encoder
from prism_select.data.pairing import change_numbers
from prism_select.data.pool import Pool
from prism_select.data.records import Example
from prism_select.directions.layout import DirectionLayout
from prism_select.models.loading import LoadedModel, load
from prism_select.run.config import ScoreConfig, SelectConfig
from prism_select.run.folder import Store
from prism_select.run.progress import Silent
from prism_select.scoring.batched_engine import BatchedEngine
from prism_select.scoring.scorer import Scorer, Window
from prism_select.scoring.shards import WINDOW
from prism_select.selection.cascade import Cascade, FeatureScorer
from prism_select.selection.cascade_prediction import feature_extractor

Row = dict[str, Any]
VOCABULARY, WIDTH, BLOCKS, LENGTH = 4096, 320, 8, 160
STEPS, BATCH, MOST = 300, 16, 600
SEEDS, ROUNDS = 10, 2


def solutions(data: Path, draw: random.Random) -> tuple[list[Row], list[Row]]:
    """Pool and target."""
    train = short([(r["question"], r["answer"]) for r in lines(data / "gsm8k_train.jsonl")], MOST)
    words = [
        (f"{r['instruction']} {r['input']}", r["output"])
        for r in lines(data / "math_word_problems.json")
    ]
    words = short(words, MOST)
    rows = [row(*each, "gsm8k", is_wanted=True) for each in draw.sample(train, 4300)]
    rows += [row(*each, "math_word_problems", is_wanted=True) for each in draw.sample(words, 1000)]
    rows += general(data, draw, {"alpaca": 340, "dolly": 2700, "t0": 2200})
    draw.shuffle(rows)
    solved = [(r["prompt"], r["chosen"]) for r in lines(data / "gsm8k_model_pairs.jsonl")]
    return rows, [
        pair(q, right, change_numbers(right, draw)) for q, right in draw.sample(solved, 40)
    ]


def choices(data: Path, draw: random.Random) -> tuple[list[Row], list[Row]]:
    """Pool and target."""
    facts = draw.sample(right(lines(data / "openbookqa_train.jsonl"), MOST), 4300)
    rows = [row(*each, "openbookqa", is_wanted=True) for each in facts]
    rows += general(data, draw, {"alpaca": 340, "dolly": 2700, "t0": 2200})
    quiz = quizzes(data / "arc_easy_train.jsonl")
    draw.shuffle(quiz)
    rows += [row(*each, "arc", is_wanted=True) for each in right(quiz[40:], MOST)[:1000]]
    draw.shuffle(rows)
    return rows, [put(each) for each in quiz[:40]]


POOLS: Mapping[str, Callable[[Path, random.Random], tuple[list[Row], list[Row]]]] = {
    "cascade": solutions,
    "cascade-choices": choices,
}


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def trained(rows: list[Row], folder: Path) -> None:
    torch.manual_seed(0)
    texts = [f"{each['prompt']}{each['completion']}" for each in rows]
    tokenizer = tokenizer_of(texts)
    coded = [tokenizer(f"<s>{text}</s>").input_ids[:LENGTH] for text in texts]
    size = {
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
    }
    network = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), **size, bos_token_id=0, eos_token_id=1)
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    draw = random.Random(0)
    for step in range(STEPS):
        few = [torch.tensor(ids) for ids in draw.sample(coded, BATCH)]
        tokens = torch.nn.utils.rnn.pad_sequence(few, batch_first=True, padding_value=-100)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(tokens.clamp(min=0)).logits[:, :-1].flatten(0, 1)
        loss = cross_entropy(logits.float(), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(step, float(loss), flush=True)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def exact_run(folder: Path) -> prism_select.Run:
    """Every row scored, which takes longest: kept."""
    return prism_select.score(**shared(folder), engine="difference", out=str(folder / "exact"))


def shared(folder: Path) -> Row:
    files = {"model": "model", "pool": "pool.jsonl", "target": "pairs.jsonl"}
    return {
        **{option: str(folder / name) for option, name in files.items()},
        "max_length": LENGTH,
        "curvature": "flat",
    }


def forward_seconds(folder: Path) -> float:
    """One pass over the pool without a graph, for log-likelihoods alone."""
    model, tokenizer = load(str(folder / "model"), "float32", torch.device("cpu"))
    encoder = Encoder(tokenizer, "auto", LENGTH, model.vocabulary)
    every = [example for _, example in Pool([str(folder / "pool.jsonl")], {}).rows()]
    rows = [encoder.encode(example) for example in every if isinstance(example, Example)]
    start = time.perf_counter()
    with torch.no_grad():
        for few in plan_batches([len(each.tokens) for each in rows], 4096):
            token_logliks(model, collate([rows[place] for place in few]))
    return time.perf_counter() - start


def cascaded(folder: Path) -> prism_select.Run:
    """A real one, from nothing."""
    return prism_select.select(
        **shared(folder), cascade=True, out=str(folder / "cascade"), overwrite=True
    )


def features(folder: Path) -> list[Path]:
    """Features of every row, kept."""
    store = Store(str(folder / "features"))
    if not (there := store.present_shards("features")):
        store.shards.mkdir(parents=True, exist_ok=True)
        model, tokenizer = load(str(folder / "model"), "float32", torch.device("cpu"))
        config = ScoreConfig(**shared(folder), out=str(store.path))
        encoder, unused = Encoder(tokenizer, "auto", LENGTH, model.vocabulary), cast("Any", None)
        scorer = FeatureScorer(
            feature_extractor(model, 0),
            Scorer(
                LoadedModel(model, encoder), BatchedEngine(unused, 1), DirectionLayout(), config
            ),
        )
        rows = list(Pool(config.pool, {}).rows())
        with Silent().task("", None) as task:
            for start in range(0, len(rows), WINDOW):
                number, window = start // WINDOW, rows[start : start + WINDOW]
                indices = range(start, start + len(window))
                table = scorer.table(Window(number, indices, window, True), task)
                store.write_shard(number, table, "features")
        there = store.present_shards("features")
    return list(there.values())


def replayed(folder: Path, seed: int, exact: pa.Table, shards: list[Path]) -> Row:
    """A cascade whose scores are looked up: how much it scores, what it finds and what it says that
    it finds."""
    config = SelectConfig(**shared(folder), cascade=True, seed=seed, out=str(folder / "replay"))
    store = Store(str(folder / "replay"))
    shutil.rmtree(store.path, ignore_errors=True)
    store.shards.mkdir(parents=True)

    def through(kind: str, _: Any, wanted: Any) -> list[Path]:
        return (
            shards
            if wanted is None
            else [store.write_shard(0, exact.filter(pa.array(wanted)), kind)]
        )

    unused: Any = None
    cascade = Cascade(config, store, through, unused, unused, unused, unused)
    search = cascade.search(cascade.extract())
    scores = exact["score"].to_numpy()
    best = np.argsort(-scores, kind="stable")[: search.best]
    found = float(np.isfinite(search.exact[best]).mean())
    told = {
        "estimate": search.recall.estimate,
        "low": search.recall.low,
        "high": search.recall.high,
    }
    share = float(np.isfinite(search.exact).mean())
    return {"seed": seed, "exact share": share, "recall": found, **told, "rounds": search.rounds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data sets")
    parser.add_argument(
        "--replay", action="store_true", help="look scores up alone, and write nothing"
    )
    given = parser.parse_args()
    found = {
        name: replays(WORK / name, *make(given.data, random.Random(0)))
        for name, make in POOLS.items()
    }
    if given.replay:
        return
    folder = WORK / "cascade"
    forwards, took = [forward_seconds(folder)], list[float]()
    for _ in range(ROUNDS):
        run = cascaded(folder)
        took.append(run.manifest["timings"]["score"])
        forwards.append(forward_seconds(folder))
    costs = [
        2 * each / (before + after)
        for each, before, after in zip(took, forwards, forwards[1:], strict=False)
    ]
    figures = [
        figure(
            "cost of a cascade, a row", float(np.mean(costs)), "forwards", "≤ 0.8", spread(costs)
        )
    ]
    figures += [
        each
        for name, told in found.items()
        for each in figures_of(told, "" if name == "cascade" else name)
    ]
    rows = [{"run": run.manifest["cascade"], "seconds": took, "forward seconds": forwards}]
    write(
        "cascade.json",
        rows + [{"pool": name, **each} for name, told in found.items() for each in told],
        figures,
    )


def replays(folder: Path, pool: list[Row], target: list[Row]) -> list[Row]:
    folder.mkdir(parents=True, exist_ok=True)
    save(f"{folder.name}/pool.jsonl", pool), save(f"{folder.name}/pairs.jsonl", target)
    if not (folder / "model" / "model.safetensors").exists():
        trained(pool, folder / "model")
    exact, shards, found = exact_run(folder).scores, features(folder), list[Row]()
    for seed in range(SEEDS):
        found.append(replayed(folder, seed, exact, shards))
        print(folder.name, found[-1], flush=True)
    return found


def figures_of(told: list[Row], pool: str) -> list[Row]:
    """Bars are for the first pool alone, whose name is empty."""
    recalls, shares = ([each[key] for each in told] for key in ("recall", "exact share"))
    held = sum(each["low"] <= each["recall"] <= each["high"] for each in told)
    bars = ("", "") if pool else ("≥ 0.9", "≥ 9")
    of = f"{pool}: " if pool else ""
    return [
        figure(f"{of}rows scored exactly", float(np.mean(shares)), "share", "", spread(shares)),
        figure(
            f"{of}recall of the best 5%, lowest of 10 seeds",
            min(recalls),
            "share",
            bars[0],
            spread(recalls),
        ),
        figure(f"{of}seeds whose stated interval holds the true recall", held, "of 10", bars[1]),
    ]


def spread(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


if __name__ == "__main__":
    main()
