"""Pairs are treated as rows are: what --max-length cuts is counted and said, and pairs that mostly
lose an answer's end are refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import transformers
from conftest import CHATML, Outcome, Row, jsonl, prism, save_model

LONG = " thank you very much" * 6
WORDS = ["Rome", "Paris", "Italy", "water", "France", "please", "polite", "word"]


def pairs_of(long_chosen: int, long_rejected: int, count: int = 8) -> list[Row]:
    """So many pairs with a long answer on either side; the others' answers are short."""
    return [
        {
            "prompt": f"{WORDS[index]}?",
            "chosen": "please" + LONG * (index < long_chosen),
            "rejected": "go away" + LONG * (count - index <= long_rejected),
        }
        for index in range(count)
    ]


ROWS: list[Row] = [
    {"prompt": f"Name {word}?", "completion": f"{word}, thank you"} for word in WORDS
]


@pytest.fixture(params=[None, CHATML], ids=["plain", "chat"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", request.param)


def run(model: Path, pairs: Sequence[Row], *more: object, command: str = "score") -> Outcome:
    folder = model.parent
    files = ["--pool", jsonl(folder / "pool.jsonl", ROWS)]
    files += ["--target", jsonl(folder / "pairs.jsonl", pairs), "--out", str(folder / "run")]
    return prism(command, "--model", model, *files, *more)


def full_length(model: Path, pair: Row, side: str) -> int:
    """Tokens of an answer with its prompt, by transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    if tokenizer.chat_template:
        turns = [("user", pair["prompt"]), ("assistant", pair[side])]
        messages = [{"role": role, "content": text} for role, text in turns]
        return len(tokenizer.apply_chat_template(messages, return_dict=False))
    text = f"{pair['prompt']}\n{pair[side]}{tokenizer.eos_token}"
    return len(tokenizer(text, add_special_tokens=True).input_ids)


def results(model: Path) -> tuple[Any, Any]:
    folder = model.parent / "run"
    manifest = json.loads((folder / "manifest.json").read_text())
    return pq.read_table(folder / "pairs.parquet"), manifest


@pytest.mark.parametrize(("long_chosen", "long_rejected"), [(3, 0), (0, 2), (4, 4), (1, 1)])
def test_truncated_answers_are_counted_marked_and_said(
    long_chosen: int, long_rejected: int, model: Path
) -> None:
    pairs = pairs_of(long_chosen, long_rejected)
    outcome = run(model, pairs, "--max-length", 48)
    assert outcome.code == 0 and not outcome.err, outcome.err
    table, manifest = results(model)
    exact = {
        s: [full_length(model, pair, s) > 48 for pair in pairs] for s in ("chosen", "rejected")
    }
    assert (sum(exact["chosen"]), sum(exact["rejected"])) == (long_chosen, long_rejected)
    for side, cut in exact.items():
        assert table[f"truncated_{side}"].to_pylist() == cut
        assert manifest["target"][f"truncated_{side}"] == sum(cut)
    either = [a or b for a, b in zip(exact["chosen"], exact["rejected"], strict=True)]
    assert table["truncated"].to_pylist() == either
    words = f"of 8 pairs {long_chosen} chosen and {long_rejected} rejected answers are truncated"
    assert any(line.startswith(words) for line in manifest["warnings"])
    assert words in outcome.out


def test_whole_pairs_are_not_mentioned(model: Path) -> None:
    assert run(model, pairs_of(3, 3)).code == 0
    table, manifest = results(model)
    assert not any(table["truncated"].to_pylist())
    assert manifest["target"]["truncated_chosen"] == 0
    assert not any("truncated" in line for line in manifest["warnings"])


@pytest.mark.parametrize(
    ("long_chosen", "long_rejected", "side", "count"),
    [(8, 0, "chosen", 8), (0, 5, "rejected", 5), (6, 3, "chosen", 6)],
)
def test_pairs_that_mostly_lose_an_answers_end_are_refused(
    long_chosen: int, long_rejected: int, side: str, count: int, model: Path
) -> None:
    pairs = pairs_of(long_chosen, long_rejected)
    words = f"pairs.jsonl: {count} of 8 {side} answers lose their end, being cut to 48 tokens"
    for command in ("score", "repair"):  # repair exchanges the two, and speaks as the file does
        outcome = run(model, pairs, "--max-length", 48, command=command)
        assert outcome.code == 2 and outcome.err.count("\n") == 1
        assert words in outcome.err and "raise --max-length" in outcome.err
    file = model.parent / "pairs.jsonl"
    outcome = prism("pairs", "--check", file, "--model", model, "--max-length", 48)
    assert outcome.code == 2 and words in outcome.err
    assert run(model, pairs, "--max-length", 400).code == 0


def test_in_repair_the_words_are_those_of_the_file_and_the_columns_those_of_the_direction(
    model: Path,
) -> None:
    assert run(model, pairs_of(3, 0), "--max-length", 48, command="repair").code == 0
    table, manifest = results(model)
    assert sum(table["truncated_rejected"].to_pylist()) == 3
    assert manifest["target"]["truncated_rejected"] == 3
    words = "of 8 pairs 3 chosen and 0 rejected answers are truncated"
    assert any(line.startswith(words) for line in manifest["warnings"])


def test_the_check_of_pairs_and_each_target_say_it_too(model: Path) -> None:
    folder = model.parent
    file, out = jsonl(folder / "pairs.jsonl", pairs_of(3, 1)), folder / "check.json"
    words = ["pairs", "--check", file, "--model", model, "--max-length", 48, "--out", out]
    assert prism(*words).code == 0
    checked = json.loads(out.read_text())
    assert (checked["truncated_chosen"], checked["truncated_rejected"]) == (3, 1)
    assert any("3 chosen and 1 rejected answers are truncated" in w for w in checked["warnings"])
    whole = jsonl(folder / "whole.jsonl", pairs_of(0, 0))
    rows = jsonl(folder / "pool.jsonl", ROWS)
    named = ["--target", f"cut={file}", "--target", f"whole={whole}", "--max-length", 48]
    outcome = prism("score", "--model", model, "--pool", rows, *named, "--out", folder / "run")
    assert outcome.code == 0
    _, manifest = results(model)
    assert manifest["target"]["targets"]["cut"]["truncated_chosen"] == 3
    assert manifest["target"]["targets"]["whole"]["truncated_chosen"] == 0
    assert manifest["target"]["truncated_chosen"] == 3
    warned = [line for line in manifest["warnings"] if "truncated" in line]
    assert len(warned) == 1 and warned[0].startswith("target cut: of 8 pairs 3 chosen")


def test_held_out_pairs_that_mostly_lose_their_ends_are_refused(model: Path) -> None:
    words = ["--max-length", 48, "--budget", "2"]
    assert run(model, pairs_of(1, 1), *words, command="select").code == 0
    held_out = [{**pair, "prompt": f"And {pair['prompt']}"} for pair in pairs_of(6, 0)]
    file = jsonl(model.parent / "holdout.jsonl", held_out)
    evaluate = ["evaluate", model.parent / "run", "--holdout", file, "--against", "random"]
    outcome = prism(*evaluate, "--seeds", 1, "--steps", 1)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "holdout.jsonl: 6 of 8 chosen answers lose their end" in outcome.err
