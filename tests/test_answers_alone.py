"""Rows of answers alone as targets of --weighting unpaired: the gradient of their mean
log-likelihood, or minus that."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Outcome, jsonl, prism
from test_commands import PAIRS, POOL, Coded, Loop, plain

import prism_select
from prism_select.run.errors import BadOption

GOOD = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
BAD = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in PAIRS[:3]]
UNPAIRED = ("--weighting", "unpaired")


class Place:
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.pool = jsonl(folder / "pool.jsonl", POOL)
        self.pairs = jsonl(folder / "pairs.jsonl", PAIRS)
        self.good, self.bad = (
            jsonl(folder / f"{name}.jsonl", rows) for name, rows in (("good", GOOD), ("bad", BAD))
        )

    def call(self, command: str, out: Path, targets: list[str], *more: object) -> Outcome:
        words = [word for target in targets for word in ("--target", target)]
        files = ["--model", self.model, "--pool", self.pool, "--out", out]
        return prism(command, *files, *words, *more)

    def run(self, command: str, out: Path, targets: list[str], *more: object) -> Any:
        done = self.call(command, out, targets, *UNPAIRED, *more)
        assert done.code == 0, done.err
        return pq.read_table(out / "scores.parquet")["score"].to_numpy()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, plain_model: Path) -> Place:
    return Place(tmp_path_factory.mktemp("alone"), plain_model)


def apart(one: Any, other: Any) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def coded(naive: Loop, rows: list[Any]) -> list[Coded]:
    return [plain(naive.tokenizer, str(r["prompt"]), str(r["completion"])) for r in rows]


def by_definition(naive: Loop, rows: list[Any]) -> Any:
    """∇loglik(row) · mean ∇mean_loglik(answer), an answer at a time."""
    flat = torch.stack([naive.flat(naive.mean(answer)) for answer in coded(naive, rows)]).mean(0)
    return np.array([naive.score(row, naive.parts(flat)) for row in coded(naive, POOL)])


def test_a_signed_target_is_minus_the_mean_gradient_of_its_answers(
    place: Place, tmp_path: Path
) -> None:
    naive, flat = Loop(place.model), ("--curvature", "flat")
    good, bad = by_definition(naive, GOOD), by_definition(naive, BAD)
    alone = place.run("score", tmp_path / "good", [place.good], *flat)
    assert apart(alone, good) < 1e-4
    both = [f"good={place.good}", f"-bad={place.bad}"]
    assert apart(place.run("score", tmp_path / "both", both, *flat), (good - bad) / 2) < 1e-4
    table = pq.read_table(tmp_path / "both" / "scores.parquet")
    assert apart(table["score:good"].to_numpy(), good) < 1e-4
    assert apart(table["score:-bad"].to_numpy(), -bad) < 1e-4
    halves = [table[f"score_{side}"].to_numpy() for side in ("chosen", "rejected")]
    assert apart(halves[0], good / 2) < 1e-4 and apart(halves[1], bad / 2) < 1e-4
    repaired = place.run("repair", tmp_path / "repair", both, *flat)
    assert apart(repaired, (bad - good) / 2) < 1e-4


@pytest.mark.parametrize("curvature", ["pairs", "flat"])
def test_answers_alone_score_as_those_of_unpaired_pairs(
    curvature: str, place: Place, tmp_path: Path
) -> None:
    more = ("--curvature", curvature)
    paired = place.run("score", tmp_path / "pairs", [place.pairs], *more)
    assert apart(place.run("score", tmp_path / "good", [place.good], *more), paired) < 1e-6
    minus = place.run("score", tmp_path / "minus", [f"-good={place.good}"], *more)
    assert apart(minus, -paired) < 1e-6


def test_what_needs_two_answers_is_said_to_be_unknown(place: Place, tmp_path: Path) -> None:
    out, targets = tmp_path / "run", [f"good={place.good}", f"-bad={place.bad}"]
    done = place.call("select", out, targets, *UNPAIRED, "--budget", "5")
    assert done.code == 0, done.err
    assert "answers without rejected ones have none" in " ".join(done.out.split())
    assert "preference" not in done.out and "cosine good" in done.out
    target = json.loads((out / "manifest.json").read_text())["target"]
    assert target["answers_alone"] and target["cross_validation"] is None
    assert target["mean_preference"] is target["common_part"] is target["token_overlap"] is None
    assert target["effective_pairs"] == pytest.approx(8)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "answers without rejected ones" in page and 'data-chart="preferences"' not in page
    pairs = pq.read_table(out / "pairs.parquet").to_pydict()
    assert np.isnan(pairs["gap"]).all() and np.isfinite(pairs["loglik_chosen"][:5]).all()
    assert np.isnan(pairs["loglik_chosen"][5:]).all() and pairs["weight"] == [1.0] * 8


def test_conversations_and_mappings_are_answers_too(place: Place, tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": r["prompt"]},
                      {"role": "assistant", "content": r["completion"]}]}
        for r in GOOD
    ]  # fmt: skip
    named = [{"ask": row["prompt"], "chosen": row["completion"]} for row in GOOD]
    expected = place.run("score", tmp_path / "good", [place.good])
    files = jsonl(tmp_path / "chats.jsonl", chats), jsonl(tmp_path / "named.jsonl", named)
    fields = ("--fields", "prompt=ask,prompt=prompt,completion=chosen,completion=completion")
    assert apart(place.run("score", tmp_path / "named", [files[1]], *fields), expected) < 1e-6
    place.run("score", tmp_path / "chats", [files[0]], "--template", "plain")


def test_evaluation_goes_without_controls(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "run"
    place.run("select", out, [place.good], "--budget", "5")
    held_out = [{**row, "prompt": f"{row['prompt']} Now?"} for row in PAIRS]
    file = jsonl(tmp_path / "held.jsonl", held_out)
    short = ["--against", "random", "--seeds", 1, "--steps", 1]
    done = prism("evaluate", out, "--holdout", file, *short)
    assert done.code == 0, done.err
    result = json.loads((out / "evaluation" / "evaluation.json").read_text())
    assert result["controls"] == [] and "no controls" in done.out + done.err
    with pytest.raises(BadOption, match="--against less: needs pairs, and answers without"):
        prism_select.evaluate(str(out), file, against="less")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            (),
            "bad.jsonl:1: no known format of pairs: the fields are 'prompt', 'completion', an",
        ),
        ((*UNPAIRED, "--tune", "layers"), "--tune layers: answers without rejected ones have none"),
        ((*UNPAIRED, "--rank-by", "probe"), "--rank-by probe: needs pairs, and answers without"),
    ],
)
def test_what_needs_rejected_answers_is_refused(
    words: tuple[str, ...], reason: str, place: Place, tmp_path: Path
) -> None:
    done = place.call("select", tmp_path / "run", [place.bad], *words)
    assert done.code == 2 and done.err.count("\n") == 1 and reason in done.err, done.err
    done = prism("pairs", "--check", place.bad, "--model", place.model, *UNPAIRED)
    assert done.code == 2 and "add a rejected answer to each row" in done.err
