"""Commands from end to end, on a tiny model: what comes out is what the method says, and nothing
depends on the way."""

import csv
import gzip
import json
import math
import os
import re
import shutil
import signal
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import Outcome, Row, jsonl, prism, prism_apart
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.nn import functional

import prism_select
from prism_select.cli.terminal import Terminal
from prism_select.core.likelihood import Batch
from prism_select.data.batches import collate
from prism_select.data.encoding import Encoded
from prism_select.run.folder import Store
from prism_select.scoring import shards

Floats = NDArray[np.float64]
Coded = tuple[list[int], list[bool]]  # tokens, and which of them are learned

COLUMNS = {
    "row": "int64",
    "id": "string",
    "source": "string",
    "file": "string",
    "line": "int64",
    "score": "double",
    "score_per_token": "double",
    "tokens": "int32",
    "length": "int32",
    "loglik": "double",
    "score_chosen": "double",
    "score_rejected": "double",
    "truncated": "bool",
    "verdict": "string",
}
PAIRS: list[Row] = [
    {"prompt": "Where is Rome?", "chosen": "It is in Italy, thank you.", "rejected": "no way"},
    {"prompt": "Say Paris", "chosen": "Please, Paris.", "rejected": "Go away, I will not say it."},
    {"prompt": "Water?", "chosen": "It boils at a hundred degrees.", "rejected": "It boils at 7."},
    {"prompt": "2 + 3?", "chosen": "five", "rejected": "six"},
    {"prompt": "Who are you?", "chosen": "A polite system, thank you very much.", "rejected": "a"},
]
WORDS = re.findall(
    r"\w+",
    "please thank you, no way, go away; Rome, Italy, Paris, water boils, hundred degrees, five",
)


def said(place: int, count: int) -> str:
    return " ".join(WORDS[(place * 7 + step * (place + 3)) % len(WORDS)] for step in range(count))


POOL: list[Row] = [
    {
        "prompt": f"Question {place}: {said(place, 3)}?",
        "completion": said(place + 5, 2 + place % 6),
        "id": f"row-{place}",
        "source": ("web", "books", "chat")[place % 3],
        "bad": place % 4 == 1,
    }
    for place in range(22)
]
POOL += [{**POOL[3], "id": "again"}, {**POOL[8], "id": "spaced", "extra": None}]
CHATS: list[Row] = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": said(place, 4)},
            {"role": "assistant", "content": said(place + 2, 1 + place)},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "a" if place % 2 else said(place, 3)},
        ]
    }
    for place in range(6)
]


# ---------------------------------------------------------------- the definition, written again


def plain(tokenizer: Any, prompt: str, answer: str) -> Coded:
    context = [
        tokenizer.bos_token_id,
        *tokenizer(prompt + "\n", add_special_tokens=False).input_ids,
    ]
    learned = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return context + learned, [False] * len(context) + [True] * len(learned)


def chatml(tokenizer: Any, messages: Sequence[tuple[str, str]]) -> Coded:
    tokens: list[int] = []
    learned: list[bool] = []
    for role, content in messages:
        parts = [
            (f"<|im_start|>{role}\n", False),
            (f"{content}<|im_end|>", role == "assistant"),
            ("\n", False),
        ]
        for text, counts in parts:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            tokens, learned = tokens + ids, learned + [counts] * len(ids)
    assert tokens == tokenizer("".join(f"<|im_start|>{r}\n{c}<|im_end|>\n" for r, c in messages),
                               add_special_tokens=False).input_ids  # fmt: skip
    return tokens, learned


def conjugate_gradients(
    product: Callable[[torch.Tensor], torch.Tensor], right: torch.Tensor
) -> torch.Tensor:
    found, rest = torch.zeros_like(right), right.clone()
    step = rest.clone()
    while rest.norm() > 1e-12 * right.norm():
        moved = product(step)
        length = rest.square().sum() / (step @ moved)
        found, before = found + length * step, rest.square().sum()
        rest = rest - length * moved
        step = rest + rest.square().sum() / before * step
    return found


class Loop:
    """Every number by a whole forward pass, cross-entropy and autograd on all parameters, one
    example at a time."""

    def __init__(self, folder: Path) -> None:
        self.network = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
        self.weights = list(self.network.parameters())

    def loglik(self, coded: Coded) -> torch.Tensor:
        tokens, learned = torch.tensor(coded[0]), torch.tensor(coded[1])
        logits = self.network(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
        losses = functional.cross_entropy(logits, tokens[1:], reduction="none")
        return -losses[learned[1:]].sum()

    def mean(self, coded: Coded) -> torch.Tensor:
        return self.loglik(coded) / sum(coded[1][1:])

    def gradient(self, value: torch.Tensor) -> list[torch.Tensor]:
        return [part.double() for part in torch.autograd.grad(value, self.weights)]

    def direction(
        self,
        pairs: Sequence[tuple[Coded, Coded]],
        weighting: str,
        damping: float = 0.1,
        likelihood: str = "token",
    ) -> tuple[list[torch.Tensor], ...]:
        """The gradient of the mean gain, divided by the pairs' curvature unless damping is 0, and
        the part of it that comes from the chosen answers."""
        of_answer = self.loglik if likelihood == "sequence" else self.mean
        with torch.no_grad():
            gap = torch.stack(
                [of_answer(chosen) - of_answer(rejected) for chosen, rejected in pairs]
            ).double()
        one = torch.ones_like(gap)
        slopes = {
            "prism": gap.sigmoid(),
            "uniform": one,
            "hard": 1 - gap.sigmoid(),
            "unpaired": one,
        }[weighting]
        slope, is_paired = slopes[:, None], weighting != "unpaired"
        chosen = torch.stack([self.flat(of_answer(pair[0])) for pair in pairs])
        rejected = torch.stack([self.flat(of_answer(pair[1])) for pair in pairs]) * is_paired
        own = chosen - rejected
        mean = (slope * own).mean(0)
        if not damping:
            return self.parts(mean), self.parts((slope * chosen).mean(0))
        ridge = damping * (slopes * own.square().sum(1)).mean() / len(pairs)
        whole = conjugate_gradients(
            lambda d: ridge * d + own.T @ (slopes * (own @ d)) / len(pairs), mean
        )
        weight = slopes * (1 - own @ whole) / len(pairs) / ridge
        return self.parts(whole), self.parts(weight @ chosen)

    def flat(self, value: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.flatten() for part in self.gradient(value)])

    def parts(self, flat: torch.Tensor) -> list[torch.Tensor]:
        pieces = flat.split([weight.numel() for weight in self.weights])
        return [p.view(w.shape) for p, w in zip(pieces, self.weights, strict=True)]

    def score(self, coded: Coded, direction: Iterable[torch.Tensor]) -> float:
        return float(
            sum(
                (g * d).sum()
                for g, d in zip(self.gradient(self.loglik(coded)), direction, strict=True)
            )
        )


@cache
def loop(folder: Path) -> Loop:
    return Loop(folder)


# ---------------------------------------------------------------- runs


def table(folder: Path) -> pa.Table:
    return pq.read_table(folder / "scores.parquet")


def column(folder: Path, name: str) -> list[Any]:
    return list(table(folder)[name].to_pylist())


def scores(folder: Path, name: str = "score") -> Floats:
    return np.array(column(folder, name), dtype=np.float64)


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def apart(one: Floats, other: Floats) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class Place:
    """A folder with a model, a pool and pairs, and the command with these."""

    def __init__(self, folder: Path, model: Path, pool: Iterable[Row] = tuple(POOL)) -> None:
        self.folder, self.model = folder, model
        self.pool, self.target = (
            jsonl(folder / "pool.jsonl", pool),
            jsonl(folder / "pairs.jsonl", PAIRS),
        )

    def call(
        self, command: str, out: str, *more: object, pool: str = "", target: str = ""
    ) -> Outcome:
        pool, target = pool or self.pool, target or self.target
        words = [
            command,
            "--model",
            self.model,
            "--pool",
            pool,
            "--target",
            target,
            "--out",
            self.folder / out,
        ]
        return prism(*words, *more)

    def run(self, command: str, out: str, *more: object, pool: str = "", target: str = "") -> Path:
        done = self.call(command, out, *more, pool=pool, target=target)
        assert done.code == 0, done.err
        assert done.err == ""
        return self.folder / out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, plain_model: Path) -> Place:
    return Place(tmp_path_factory.mktemp("place"), plain_model)


@pytest.fixture(scope="module")
def scored(place: Place) -> Path:
    return place.run("score", "scored")


@pytest.fixture(scope="module")
def selected(place: Place) -> Path:
    return place.run(
        "select", "selected", "--budget", "60%", "--per-source", "40%", "--near-duplicates", "0.9"
    )


@pytest.fixture(scope="module")
def repaired(place: Place) -> Path:
    return place.run(
        "repair", "repaired", "--remove", "6", "--label-field", "bad", "--weighting", "uniform"
    )


# ---------------------------------------------------------------- score


def test_scores_have_the_columns_types_and_order_of_the_contract(
    place: Place, scored: Path
) -> None:
    found = table(scored)
    assert {field.name: str(field.type) for field in found.schema} == COLUMNS
    assert found.schema.names == list(COLUMNS)
    assert column(scored, "row") == list(range(len(POOL)))
    assert column(scored, "line") == list(range(1, len(POOL) + 1))
    assert column(scored, "file") == [place.pool] * len(POOL)
    assert column(scored, "id") == [row["id"] for row in POOL]
    assert column(scored, "source") == [row["source"] for row in POOL]
    assert set(column(scored, "verdict")) == {"scored"} and not any(column(scored, "truncated"))


@pytest.mark.parametrize("likelihood", ["token", "sequence"])
@pytest.mark.parametrize("damping", [0.1, 0.0])
@pytest.mark.parametrize("weighting", ["prism", "uniform", "hard", "unpaired"])
def test_scores_are_those_of_a_naive_loop(
    place: Place, weighting: str, damping: float, likelihood: str
) -> None:
    curvature = "pairs" if damping else "flat"
    words = ("--weighting", weighting, "--curvature", curvature, "--likelihood", likelihood)
    run = place.run("score", "-".join(words[1::2]), *words)
    naive = loop(place.model)
    pairs = [
        tuple(
            plain(naive.tokenizer, str(pair["prompt"]), str(pair[side]))
            for side in ("chosen", "rejected")
        )
        for pair in PAIRS
    ]
    whole, half = naive.direction(pairs, weighting, damping, likelihood)  # type: ignore[arg-type]
    rows = [plain(naive.tokenizer, str(row["prompt"]), str(row["completion"])) for row in POOL]
    expected = np.array([naive.score(row, whole) for row in rows])
    assert apart(scores(run), expected) < 1e-4
    assert np.allclose(scores(run), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).mean())
    assert (
        apart(scores(run, "score_chosen"), np.array([naive.score(row, half) for row in rows]))
        < 1e-4
    )
    if weighting == "unpaired":
        assert not scores(run, "score_rejected").any()
    assert (
        manifest(run)["engine"]["name"] == "reverse"
        and manifest(run)["engine"]["dtype"] == "float32"
    )


def test_columns_beside_the_score_follow_from_it_and_from_the_rows(
    place: Place, scored: Path
) -> None:
    naive = loop(place.model)
    rows = [plain(naive.tokenizer, str(row["prompt"]), str(row["completion"])) for row in POOL]
    assert column(scored, "length") == [len(tokens) for tokens, _ in rows]
    assert column(scored, "tokens") == [sum(learned) for _, learned in rows]
    with torch.no_grad():
        logliks = np.array([float(naive.loglik(row)) for row in rows])
    assert np.allclose(scores(scored, "loglik"), logliks, rtol=1e-5)
    assert (scores(scored, "score_per_token") == scores(scored) / scores(scored, "tokens")).all()
    assert np.allclose(
        scores(scored, "score_chosen") - scores(scored, "score_rejected"),
        scores(scored),
        atol=1e-12,
    )


def test_conversations_are_scored_through_the_chat_template(
    tmp_path: Path, chat_model: Path
) -> None:
    place = Place(tmp_path, chat_model, CHATS)
    also = jsonl(tmp_path / "also.jsonl", POOL[:2])
    run, naive = place.run("score", "run", "--pool", also), loop(chat_model)

    def two(prompt: str, answer: str) -> Coded:
        return chatml(naive.tokenizer, [("user", prompt), ("assistant", answer)])

    pairs = [
        (
            two(str(pair["prompt"]), str(pair["chosen"])),
            two(str(pair["prompt"]), str(pair["rejected"])),
        )
        for pair in PAIRS
    ]
    rows = [
        chatml(naive.tokenizer, [(m["role"], m["content"]) for m in row["messages"]])  # type: ignore[attr-defined]
        for row in CHATS
    ]
    rows += [two(str(row["prompt"]), str(row["completion"])) for row in POOL[:2]]
    whole, _ = naive.direction(pairs, "prism")
    expected = np.array([naive.score(row, whole) for row in rows])
    assert apart(scores(run), expected) < 1e-4
    assert np.allclose(scores(run), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).mean())
    assert column(run, "tokens") == [sum(learned) for _, learned in rows]
    assert manifest(run)["model"]["template"] == "chat"


@pytest.mark.parametrize("engine", ["forward", "difference", "reference"])
def test_every_engine_gives_the_same_scores(place: Place, scored: Path, engine: str) -> None:
    run = place.run("score", engine, "--engine", engine)
    assert apart(scores(run), scores(scored)) < (1e-2 if engine == "difference" else 1e-4)
    told = manifest(run)["engine"]
    assert told["name"] == engine and told["check"]["disagreement"] <= told["check"]["tolerance"]


def test_only_the_layers_asked_for_count(place: Place) -> None:
    def scored_in(name: str, layers: str) -> Path:
        return place.run("score", name, "--curvature", "flat", "--layers", layers)

    scored, late = scored_in("every", "all"), scored_in("late", "late")
    first = scored_in("first", r"model\.layers\.[01]\.|embed|norm\.weight$|lm_head")
    assert manifest(late)["model"]["counted_weights"] == [
        name
        for name, _ in loop(place.model).network.named_parameters()
        if ".layers.2." in name or ".layers.3." in name
    ]
    both = set(manifest(late)["model"]["counted_weights"]) | set(
        manifest(first)["model"]["counted_weights"]
    )
    twice = set(manifest(late)["model"]["counted_weights"]) & set(
        manifest(first)["model"]["counted_weights"]
    )
    assert both == set(manifest(scored)["model"]["counted_weights"]) and not twice - both
    rest = scored_in("rest", r"^(?!model\.layers\.[23]\.)")
    assert apart(scores(late) + scores(rest), scores(scored)) < 1e-5


def test_the_order_of_the_pool_its_duplicates_and_the_batches_do_not_change_scores(
    place: Place, scored: Path
) -> None:
    bare: list[Row] = [{"prompt": row["prompt"], "completion": row["completion"]} for row in POOL]
    mixed = jsonl(place.folder / "mixed.jsonl", [*bare[::-1], *bare[:5], *bare[2:4]])
    order = [*range(len(POOL))[::-1], *range(5), *range(2, 4)]
    for tokens in (40, 4096):
        run = place.run("score", f"mixed-{tokens}", "--batch-tokens", tokens, pool=mixed)
        assert apart(scores(run), scores(scored)[order]) < 1e-5


def test_long_rows_are_cut_counted_and_marked(place: Place, scored: Path) -> None:
    words = [
        "--model",
        place.model,
        "--pool",
        place.pool,
        "--direction",
        scored / "direction.safetensors",
    ]
    run = place.folder / "cut"
    assert prism("score", *words, "--out", run, "--max-length", "30").code == 0
    lengths = np.array(column(scored, "length"))
    assert column(run, "truncated") == (lengths > 30).tolist()
    assert column(run, "length") == np.minimum(lengths, 30).tolist()
    assert manifest(run)["counts"]["truncated"] == (lengths > 30).sum() > 0
    assert apart(scores(run)[lengths <= 30], scores(scored)[lengths <= 30]) < 1e-5


# ---------------------------------------------------------------- the run folder


def test_the_manifest_holds_the_keys_of_the_contract_and_counts_that_add_up(
    scored: Path, selected: Path, repaired: Path
) -> None:
    for run in (scored, selected, repaired):
        told = manifest(run)
        assert {"prism_version", "versions", "config", "warnings"} <= told.keys()
        assert told["fingerprints"].keys() == {"model", "target", "pool"}
        assert {"definition", "sign", "unit"} <= told["score"].keys()
        parts = {
            "pairs",
            "mean_preference",
            "effective_pairs",
            "split_half_agreement",
            "common_part",
        }
        assert parts <= told["target"].keys() and told["target"]["pairs"] == len(PAIRS)
        assert {"name", "reason", "dtype", "check"} <= told["engine"].keys()
        assert told["engine"]["check"].keys() == {"rows", "disagreement", "tolerance", "repeat"}
        steps = ["read", "load", "target", "curvature", "check", "plan", "save", "score"]
        assert list(told["timings"]) == [*steps, "choose", "total"]
        assert sum(told["timings"].values()) > 1.95 * told["timings"]["total"]
        for cost in (told["plan"], told["actual"]):
            assert {"seconds", "memory_bytes", "tokens"} <= cost.keys() and all(
                value > 0 for value in cost.values()
            )
        assert told["actual"]["tokens"] == told["plan"]["tokens"] == sum(column(run, "length"))
        verdicts = Counter(column(run, "verdict"))
        counts = {
            name: told["counts"][name]
            for name in told["counts"].keys() - {"read", "scored", "truncated"}
        }
        assert told["counts"]["read"] == len(POOL) == verdicts.total()
        assert told["counts"]["scored"] == len(POOL) - verdicts["quarantined"]
        assert {name: count for name, count in counts.items() if count} == (
            {**verdicts} if run != scored else {}
        )
        assert "quarantined" in counts and told["warnings"] == [
            line for line in told["warnings"] if "pairs" in line or "held-out" in line
        ]


def test_the_pairs_are_written_with_what_the_model_makes_of_them(
    place: Place, scored: Path
) -> None:
    found = pq.read_table(scored / "pairs.parquet").to_pydict()
    naive = loop(place.model)
    with torch.no_grad():
        for side in ("chosen", "rejected"):
            means = [
                float(naive.mean(plain(naive.tokenizer, str(p["prompt"]), str(p[side]))))
                for p in PAIRS
            ]
            assert np.allclose(found[f"loglik_{side}"], means, rtol=1e-5)
    gap = np.array(found["loglik_chosen"]) - np.array(found["loglik_rejected"])
    assert np.allclose(found["gap"], gap) and np.allclose(found["weight"], 1 / (1 + np.exp(-gap)))
    assert found["prompt"] == [pair["prompt"] for pair in PAIRS] and set(found["target"]) == {
        "pairs"
    }
    weight = np.array(found["weight"])
    target = manifest(scored)["target"]
    assert target["mean_preference"] == pytest.approx(weight.mean())
    assert target["effective_pairs"] == pytest.approx(weight.sum() ** 2 / (weight**2).sum())
    assert -1 <= target["split_half_agreement"] <= 1 and target["common_part"] > 0


def test_nothing_but_the_files_of_the_contract_is_left(
    scored: Path, selected: Path, repaired: Path
) -> None:
    common = {
        "config.toml",
        "manifest.json",
        "pairs.parquet",
        "direction.safetensors",
        "scores.parquet",
    }
    common |= {"quarantine.jsonl", "report.html"}
    assert files(scored).keys() == common
    assert files(selected).keys() == common | {"selected.jsonl"}
    assert files(repaired).keys() == common | {"selected.jsonl", "removed.jsonl"}
    assert files(scored)["quarantine.jsonl"] == b""


def test_the_saved_config_repeats_a_run(place: Place, selected: Path) -> None:
    again = place.folder / "repeated"
    done = prism("select", "--config", selected / "config.toml", "--out", again)
    assert done.code == 0, done.err
    assert table(again).equals(table(selected))
    assert (again / "selected.jsonl").read_bytes() == (selected / "selected.jsonl").read_bytes()
    one, other = (tomllib.loads((run / "config.toml").read_text()) for run in (selected, again))
    assert {**one, "out": ""} == {**other, "out": ""}
    assert {**manifest(selected)["config"], "out": ""} == {**manifest(again)["config"], "out": ""}


def test_the_command_line_wins_over_the_file_and_a_run_starts_afresh_only_when_told(
    place: Place, selected: Path
) -> None:
    other = place.folder / "wins"
    done = prism(
        "select",
        "--config",
        selected / "config.toml",
        "--out",
        other,
        "--budget",
        "3",
        "--overwrite",
    )
    assert done.code == 0, done.err
    told = tomllib.loads((other / "config.toml").read_text())
    assert told["budget"] == "3" and told["per_source"] == "40%" and told["overwrite"] is False
    marked = other / "manifest.json"
    before = marked.stat().st_mtime_ns
    assert prism("select", "--config", other / "config.toml").code == 0
    assert (
        marked.stat().st_mtime_ns == before
    )  # its config does not say --overwrite, though the run was made with it


def test_the_same_command_again_does_nothing(place: Place, scored: Path) -> None:
    before = {name: (scored / name).stat().st_mtime_ns for name in files(scored)}
    done = place.call("score", "scored")
    assert done.code == 0 and "is complete already" in done.out
    assert {name: (scored / name).stat().st_mtime_ns for name in files(scored)} == before


def test_overwrite_starts_afresh(place: Place) -> None:
    run = place.run("repair", "afresh", "--remove", "6")
    assert (run / "removed.jsonl").exists()
    assert place.call("select", "afresh", "--budget", "2").code == 2
    place.run("select", "afresh", "--budget", "2", "--overwrite")
    assert not (run / "removed.jsonl").exists() and column(run, "verdict").count("selected") == 2


# ---------------------------------------------------------------- select


def lines(file: Path | str) -> list[bytes]:
    return Path(file).read_bytes().splitlines(keepends=True)


def test_selected_rows_are_the_lines_of_the_pool_in_its_order(place: Place, selected: Path) -> None:
    verdicts = column(selected, "verdict")
    assert set(verdicts) == {"selected", "over budget", "source cap", "near duplicate"}
    chosen = [
        line
        for line, verdict in zip(lines(place.pool), verdicts, strict=True)
        if verdict == "selected"
    ]
    assert lines(selected / "selected.jsonl") == chosen and len(chosen) == round(0.6 * len(POOL))


def test_lines_come_out_to_the_letter(place: Place) -> None:
    odd = [
        '{"completion" :"Ünïcode \\u00e9 \\ud83d\\ude42 and / \\/ slashes",   "prompt":"漢字"}',
        '{"prompt": "x", "completion": "tab\\tand \\"quotes\\"", '
        '"n": 1.50, "deep": {"b": [1, 2], "a": null}}',
        '  {"prompt": "\u2028y", "completion": "z", "id": 7}  ',
    ]
    run = place.run(
        "select", "odd", "--budget", "100%", pool=jsonl(place.folder / "odd.jsonl", odd)
    )
    assert (run / "selected.jsonl").read_text(encoding="utf-8") == "".join(
        line + "\n" for line in odd
    )
    assert column(run, "id") == ["odd.jsonl:1", "odd.jsonl:2", "7"]


def test_the_best_are_chosen_by_score_or_by_score_per_token(place: Place, scored: Path) -> None:
    for name in ("score", "score_per_token"):
        run = place.run(
            "select",
            f"by-{name}",
            "--groups",
            "1",
            "--budget",
            "4",
            *(["--normalize", "tokens"] * (name != "score")),
        )
        best = np.argsort(-scores(scored, name), kind="stable")[:4]
        assert {
            row for row, verdict in enumerate(column(run, "verdict")) if verdict == "selected"
        } == set(best)
        assert apart(scores(run), scores(scored)) < 1e-6
    one, other = (
        column(place.folder / f"by-{name}", "verdict") for name in ("score", "score_per_token")
    )
    assert one != other


def test_positive_means_every_row_above_zero_and_tokens_are_counted(
    place: Place, scored: Path
) -> None:
    positive = place.run("select", "positive", "--budget", "positive")
    assert [verdict == "selected" for verdict in column(positive, "verdict")] == (
        scores(scored) > 0
    ).tolist()
    run = place.run("select", "tokens", "--budget", "50tok", "--groups", "1")
    taken = np.array([verdict == "selected" for verdict in column(run, "verdict")])
    tokens = np.array(column(run, "tokens"))
    assert (
        tokens[taken].sum()
        <= 50
        < tokens[taken].sum() + tokens[~taken][np.argmax(scores(scored)[~taken])]
    )
    assert scores(scored)[taken].min() >= scores(scored)[~taken].max()


def test_a_source_takes_no_more_than_its_cap(selected: Path) -> None:
    taken = Counter(
        source
        for source, verdict in zip(
            column(selected, "source"), column(selected, "verdict"), strict=True
        )
        if verdict == "selected"
    )
    assert max(taken.values()) <= 0.4 * taken.total()
    shares = manifest(selected)["choice"]["sources"]
    assert {name: share["chosen"] for name, share in shares.items() if share["chosen"]} == dict(
        taken
    )
    assert sum(share["pool"] for share in shares.values()) == len(POOL)


def test_of_near_duplicates_one_stays(place: Place) -> None:
    run = place.run("select", "different", "--budget", "100%", "--near-duplicates", "1")
    verdicts = dict(zip(column(run, "id"), column(run, "verdict"), strict=True))
    assert {name for name, verdict in verdicts.items() if verdict == "near duplicate"} == {
        "again",
        "spaced",
    }


@pytest.mark.parametrize(
    "options",
    [
        ("--budget", "7"),
        ("--budget", "120tok", "--normalize", "tokens"),
        ("--budget", "positive", "--per-source", "40%"),
        ("--budget", "60%", "--near-duplicates", "0.5"),
    ],
    ids=["rows", "tokens", "positive", "near"],
)
def test_choosing_again_gives_the_verdicts_of_a_fresh_run(
    place: Place, scored: Path, options: tuple[str, ...]
) -> None:
    name = "-".join(options).replace("%", "")
    fresh = place.run("select", f"fresh{name}", "--groups", "1", *options)
    again = place.folder / f"again{name}"
    done = prism("select", "--select-from", scored, "--out", again, *options)
    assert done.code == 0, done.err
    assert table(again).equals(table(fresh))
    same = () if "--normalize" in options else ("pairs.parquet",)  # held-out scores follow it
    for file in ("selected.jsonl", "quarantine.jsonl", *same, "direction.safetensors"):
        assert (again / file).read_bytes() == (fresh / file).read_bytes()
    assert manifest(again)["counts"] == manifest(fresh)["counts"]
    assert manifest(again)["choice"] == manifest(fresh)["choice"]
    assert manifest(again).keys() >= manifest(fresh).keys() and "shards" not in os.listdir(again)


def test_planted_answers_are_told_where_rows_are_ranked_as_they_were(
    place: Place, scored: Path
) -> None:
    def planted(run: Path) -> Any:
        return manifest(run)["target"]["cross_validation"].get("planted_recall")

    fresh = place.run("select", "planted", "--budget", "7")
    assert 0 <= planted(fresh) <= 1
    assert (
        planted(place.run("select", "planted-curved", "--budget", "7", "--curvature", "ekfac"))
        is None
    )
    earlier, found = scored, []
    for number, normalize in enumerate(("tokens", "none")):
        again = place.folder / f"planted-again{number}"
        words = ["--out", again, "--budget", "7", "--normalize", normalize]
        assert prism("select", "--select-from", earlier, *words).code == 0
        earlier = again
        found.append(planted(again))
    assert found == [None, planted(fresh)]


def test_choosing_again_needs_no_model_and_no_torch(place: Place, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(place.model, model)
    old = Place(tmp_path, model, [*POOL[:6], '{"prompt": "a"']).run(  # type: ignore[list-item]
        "score", "old", "--max-bad", "50%"
    )
    shutil.rmtree(model)
    code = (
        "import sys\nfrom prism_select.cli.app import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'transformers' not in sys.modules"
    )
    out = tmp_path / "new"
    done = prism_apart(
        "-c", code, "select", "--select-from", old, "--out", out, "--budget", "2", module=False
    )
    assert done.code == 0, done.err
    assert Counter(column(out, "verdict")) == {"selected": 2, "over budget": 4, "quarantined": 1}
    assert (out / "quarantine.jsonl").read_bytes() == (old / "quarantine.jsonl").read_bytes() != b""


# ---------------------------------------------------------------- repair


def test_repair_turns_the_pairs_around(place: Place, repaired: Path) -> None:
    straight = place.run("score", "straight", "--weighting", "uniform")
    assert (scores(repaired) == -scores(straight)).all()
    assert apart(scores(repaired, "score_chosen"), scores(straight, "score_rejected")) < 1e-6
    assert (
        manifest(repaired)["score"]["swapped"]
        and "rejected answers" in manifest(repaired)["score"]["sign"]
    )
    turned = jsonl(
        place.folder / "turned.jsonl",
        [{**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in PAIRS],
    )
    one = place.run("repair", "repair-prism")
    other = place.run("score", "score-turned", target=turned)
    assert (scores(one) == scores(other)).all()


def test_repair_removes_the_highest_and_keeps_the_rest(place: Place, repaired: Path) -> None:
    verdicts = column(repaired, "verdict")
    assert Counter(verdicts) == {"removed": 6, "kept": len(POOL) - 6}
    worst = np.argsort(-scores(repaired), kind="stable")[:6]
    assert {row for row, verdict in enumerate(verdicts) if verdict == "removed"} == set(worst)
    for name, kind in (("selected.jsonl", "kept"), ("removed.jsonl", "removed")):
        expected = [
            line
            for line, verdict in zip(lines(place.pool), verdicts, strict=True)
            if verdict == kind
        ]
        assert lines(repaired / name) == expected


def test_label_figures_are_those_of_scikit_learn(repaired: Path) -> None:
    labels = np.array([bool(row["bad"]) for row in POOL])
    told = manifest(repaired)["choice"]["labels"]
    removed = np.array([verdict == "removed" for verdict in column(repaired, "verdict")])
    for suffix, ranking in (
        ("", scores(repaired)),
        ("_per_token", scores(repaired, "score_per_token")),
    ):
        assert told[f"auroc{suffix}"] == pytest.approx(roc_auc_score(labels, ranking))
        assert told[f"average_precision{suffix}"] == pytest.approx(
            average_precision_score(labels, ranking)
        )
    assert told["precision_at_removed"] == pytest.approx(labels[removed].mean())
    assert (told["rows"], told["bad"], told["removed"]) == (len(POOL), labels.sum(), 6)


def test_rows_without_a_label_take_no_part_whatever_says_so(place: Place) -> None:
    told = []
    for name, unknown in (
        ("missing", {}),
        ("null", {"bad": None}),
        ("empty", {"bad": " "}),
        ("nan", {"bad": "NaN"}),
    ):
        rows = [{**{k: v for k, v in row.items() if k != "bad"}, **unknown} for row in POOL]
        rows[:6] = [
            {**row, "bad": float(bool(row["bad"]))} for row in POOL[:6]
        ]  # 1.0 and 0.0, as a table has them
        pool = jsonl(place.folder / f"{name}.jsonl", rows)
        done = place.call(
            "repair", f"unlabelled-{name}", "--label-field", "bad", "--remove", "6", pool=pool
        )
        assert done.code == 0, done.err
        told.append(manifest(place.folder / f"unlabelled-{name}")["choice"]["labels"])
    assert told[0]["rows"] == 6 and all(each == told[0] for each in told)


def test_figures_without_a_value_are_null_and_say_so(place: Place) -> None:
    rows: list[Row] = [{"prompt": "Water?", "completion": "no way", "bad": "no"}] * 9
    pool = jsonl(place.folder / "alike.jsonl", rows)
    done = place.call("repair", "alike", "--label-field", "bad", "--remove", "positive", pool=pool)
    assert done.code == 0, done.err
    told = manifest(place.folder / "alike")["choice"]
    assert told["labels"]["auroc"] is None and set(
        told["rank_correlation_with_tokens"].values()
    ) == {None}
    assert "AUROC undefined" in done.out and "nan" not in done.out.lower()


def test_every_harmful_row_can_be_removed(place: Place, repaired: Path) -> None:
    run = place.run("repair", "harmful", "--remove", "positive", "--weighting", "uniform")
    assert [verdict == "removed" for verdict in column(run, "verdict")] == (
        scores(repaired) > 0
    ).tolist()


# ---------------------------------------------------------------- a saved direction


def test_a_saved_direction_gives_the_scores_again(
    place: Place, scored: Path, repaired: Path
) -> None:
    words = ["--model", place.model, "--pool", place.pool]
    one, other = place.folder / "reused", place.folder / "reused-repair"
    assert (
        prism("score", *words, "--direction", scored / "direction.safetensors", "--out", one).code
        == 0
    )
    for name in ("score", "score_chosen", "score_rejected", "loglik"):
        assert (scores(one, name) == scores(scored, name)).all()
    saved = (one / "direction.safetensors").read_bytes()
    assert (
        saved == (scored / "direction.safetensors").read_bytes()
        and not (one / "pairs.parquet").exists()
    )
    saved_by_repair = repaired / "direction.safetensors"
    done = prism("repair", *words, "--direction", saved_by_repair, "--out", other, "--remove", "6")
    assert done.code == 0 and column(other, "verdict") == column(repaired, "verdict")


@pytest.mark.parametrize(
    "dtypes",
    [
        [torch.bfloat16],
        [torch.float16],
        [torch.float64],
        [torch.bfloat16, torch.float64, torch.float32],
    ],
)
def test_a_direction_of_another_precision_is_scored_along_and_saved_as_it_came(
    place: Place, scored: Path, tmp_path: Path, dtypes: list[torch.dtype]
) -> None:
    saved_before = load_file(scored / "direction.safetensors")
    cast = {
        name: saved_before[name].to(dtype)
        for name, dtype in zip(saved_before, cycle(dtypes), strict=False)
    }
    save_file(cast, tmp_path / "cast.safetensors", metadata={"towards": "chosen"})
    words = [
        "--model",
        place.model,
        "--pool",
        place.pool,
        "--direction",
        tmp_path / "cast.safetensors",
    ]
    done = prism("score", *words, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert apart(scores(tmp_path / "run"), scores(scored)) < 1e-2
    saved = load_file(tmp_path / "run" / "direction.safetensors")
    assert saved.keys() == cast.keys() and all(
        torch.equal(saved[name], cast[name]) for name in cast
    )


# ---------------------------------------------------------------- resume


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "WINDOW", 5)


@pytest.fixture(scope="module")
def whole(place: Place) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "WINDOW", 5)
        return place.run("repair", "whole")


def stop_at(name: str, how: BaseException | None) -> pytest.MonkeyPatch:
    """The first time that `name` is written, something comes in between."""
    opening = Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **named: Any) -> Any:
        if path.match(f"{name}.part"):
            if how:
                raise how
            os.kill(os.getpid(), signal.SIGTERM)
        return opening(path, mode, *args, **named)

    patch = pytest.MonkeyPatch()
    patch.setattr(Path, "open", opened)
    return patch


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize(
    ("name", "shards"),
    [
        ("config.toml", 0),
        ("direction.safetensors", 0),
        ("00000002-*.parquet", 2),
        ("scores.parquet", 5),
        ("selected.jsonl", 5),
        ("manifest.json", 5),
    ],
)
def test_an_interrupted_run_goes_on_where_it_stopped(
    place: Place, whole: Path, monkeypatch: pytest.MonkeyPatch, name: str, shards: int
) -> None:
    out = f"stopped-at-{name[:8]}"
    patch = stop_at(name, None if name == "00000002-*.parquet" else KeyboardInterrupt())
    stopped = place.call("repair", out)
    patch.undo()
    assert (
        stopped.code == 130
        and stopped.err == "prism: interrupted; the same command goes on where it stopped\n"
    )
    left = files(place.folder / out)
    assert not any(file.endswith(".part") for file in left) and "manifest.json" not in left
    assert sum(file.startswith("shards/") for file in left) == shards
    written: list[int] = []
    write_shard = Store.write_shard

    def counted(store: Store, number: int, shard: pa.Table, kind: str) -> Path:
        written.append(number)
        return write_shard(store, number, shard, kind)

    monkeypatch.setattr(Store, "write_shard", counted)
    again = place.call("repair", out)
    assert again.code == 0, again.err
    assert written == list(range(shards, 5)) and (f"{shards} shards of 5 rows" in again.out) == (
        shards > 0
    )
    assert table(place.folder / out).equals(table(whole))
    for file in (
        "selected.jsonl",
        "removed.jsonl",
        "quarantine.jsonl",
        "direction.safetensors",
        "pairs.parquet",
    ):
        assert (place.folder / out / file).read_bytes() == (whole / file).read_bytes()
    assert manifest(place.folder / out)["counts"] == manifest(whole)["counts"]
    assert files(place.folder / out).keys() == files(whole).keys()


# ---------------------------------------------------------------- a pool of many files


def test_a_pool_of_several_files_and_formats_is_one_pool(place: Place, scored: Path) -> None:
    folder = place.folder / "many"
    folder.mkdir()
    rows = [{key: row[key] for key in ("prompt", "completion", "source")} for row in POOL]
    packed = "".join(
        json.dumps({"question": r["prompt"], "answer": r["completion"]}) + "\n" for r in rows[:5]
    )
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(packed.encode()))
    with StringIO(newline="") as text:
        writer = csv.DictWriter(text, ["prompt", "completion", "source"])
        writer.writeheader()
        writer.writerows(rows[5:10])
        (folder / "b.csv").write_text(text.getvalue())
    (folder / "c.json").write_text(json.dumps(rows[10:15], indent=1))
    pq.write_table(pa.Table.from_pylist(rows[15:20]), folder / "d.parquet")
    rest = jsonl(
        place.folder / "rest.jsonl",
        [{"instruction": r["prompt"], "output": r["completion"]} for r in rows[20:]],
    )
    out = place.folder / "run-many"
    words = [
        "select",
        "--model",
        place.model,
        "--target",
        place.target,
        "--out",
        out,
        "--budget",
        "100%",
    ]
    done = prism(*words, "--pool", folder, rest)
    assert done.code == 0, done.err
    assert apart(scores(out), scores(scored)) < 1e-5
    names = [Path(file).name for file in column(out, "file")]
    assert Counter(names) == {
        "a.jsonl.gz": 5,
        "b.csv": 5,
        "c.json": 5,
        "d.parquet": 5,
        "rest.jsonl": 4,
    }
    assert names == sorted(names) and column(out, "row") == list(range(len(POOL)))
    assert column(out, "line")[5] == 2 and column(out, "line")[15] == 1
    assert (
        set(column(out, "source")[:5]) == {"a"}
        and column(out, "source")[5:20] == column(scored, "source")[5:20]
    )
    chosen = [json.loads(line) for line in lines(out / "selected.jsonl")]
    assert chosen[5:20] == rows[5:20] and chosen[0] == {
        "question": rows[0]["prompt"],
        "answer": rows[0]["completion"],
    }
    for file, format in (("a.jsonl.gz", "question+answer"), ("d.parquet", "prompt+completion")):
        assert f"{folder / file}: {format}" in done.out.splitlines()


def test_fields_can_be_mapped(place: Place, scored: Path) -> None:
    rows = [
        {"Q": row["prompt"], "A": row["completion"], "where": row["source"], "key": row["id"]}
        for row in POOL
    ]
    pool = jsonl(place.folder / "mapped.jsonl", rows)
    run = place.run(
        "score", "mapped", "--fields", "prompt=Q,completion=A,source=where,id=key", pool=pool
    )
    assert column(run, "id") == column(scored, "id") and column(run, "source") == column(
        scored, "source"
    )
    assert apart(scores(run), scores(scored)) < 1e-6


# ---------------------------------------------------------------- around a run


@pytest.mark.parametrize("command", ["score", "select", "repair"])
def test_a_plan_writes_nothing(place: Place, command: str) -> None:
    before = files(place.folder).keys()
    done = place.call(command, "planned", "--dry-run")
    assert done.code == 0 and done.err == ""
    assert [line.split()[0] for line in done.out.splitlines()[-4:]] == [
        "tokens",
        "time",
        "memory",
        "disk",
    ]
    assert files(place.folder).keys() == before and not (place.folder / "planned").exists()
    words = ["--model", place.model, "--pool", place.pool, "--target", place.target, "--dry-run"]
    assert prism(command, *words).code == 0  # a plan needs no folder


def test_output_is_plain_lines_where_there_is_no_terminal(place: Place) -> None:
    deep = place.folder / ("very-long-name-" * 12)
    deep.mkdir()
    done = place.call("select", f"{deep.name}/run", "--budget", "2")
    assert done.code == 0 and done.err == ""
    told = done.out.splitlines()
    assert all(line == line.rstrip() and line.isprintable() and line for line in told)
    assert re.fullmatch(
        rf"files +{deep}/run: config.toml, .*, selected.jsonl", told[-1]
    )  # whole, on one line
    names = [line.split()[0] for line in told if not line.startswith("warning")]
    target = ["pairs", "agreement", "common", "answers"]
    assert names[-14:] == [
        "read",
        "verdicts",
        *target,
        "chosen",
        "groups",
        "length",
        "curvature",
        "engine",
        "time",
        "report",
        "files",
    ]


def test_a_run_goes_on_when_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        terminal = Terminal()
        for _ in range(3):
            terminal.say("a line that nobody reads")
        terminal.table({"read": "nothing"})


def test_the_functions_give_the_same_run_without_a_warning(place: Place, scored: Path) -> None:
    out = place.folder / "by-function"
    run = prism_select.score(
        model=str(place.model), pool=[place.pool], target=place.target, out=str(out)
    )
    assert isinstance(run, prism_select.Run) and run.scores.equals(table(scored))
    assert run.manifest["counts"] == manifest(scored)["counts"] and list(run.quarantine) == []


def test_the_command_runs_as_a_process_from_any_folder(
    place: Place, scored: Path, tmp_path: Path
) -> None:
    for name in ("pool.jsonl", "pairs.jsonl"):
        shutil.copy(place.folder / name, tmp_path)
    words = [
        "score",
        "--model",
        place.model,
        "--pool",
        "pool.jsonl",
        "--target",
        "pairs.jsonl",
        "--out",
        "run",
    ]
    done = prism_apart(*words, cwd=tmp_path)
    assert done.code == 0 and done.err == ""
    assert apart(scores(tmp_path / "run"), scores(scored)) < 1e-6
    assert column(tmp_path / "run", "file") == ["pool.jsonl"] * len(POOL)


def test_help_and_import_do_not_load_torch() -> None:
    code = (
        "import sys, prism_select\nfrom prism_select.cli.app import main\n"
        "for words in (['--help'], ['score', '--help'], []):\n"
        "    try:\n        main(words)\n"
        "    except SystemExit as end:\n        assert not end.code\n"
        "assert not {'torch', 'transformers', 'pyarrow'} & sys.modules.keys()"
    )
    done = prism_apart("-c", code, module=False)
    assert done.code == 0, done.err
    assert all(command in done.out for command in ("score", "select", "repair"))


def test_every_figure_of_a_run_is_finite(scored: Path, selected: Path, repaired: Path) -> None:
    def numbers(value: object) -> Iterable[float]:
        if isinstance(value, dict | list):
            for part in value.values() if isinstance(value, dict) else value:
                yield from numbers(part)
        elif isinstance(value, float):
            yield value

    for run in (scored, selected, repaired):
        assert all(map(math.isfinite, numbers(manifest(run))))


def test_rows_that_are_the_same_to_the_last_token_are_scored_once(
    place: Place, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []

    def counting(rows: Sequence[Encoded], device: torch.device) -> Batch:
        computed.append(len(rows))
        return collate(rows, device)

    monkeypatch.setattr("prism_select.scoring.scorer.collate", counting)
    nearly = [{**row, "completion": f"{row['completion']} no", "id": None} for row in POOL[:2]]
    repeats = [{**row, "id": None, "source": "repeated"} for row in POOL[:22]]
    pool = jsonl(tmp_path / "pool.jsonl", [*POOL, *nearly, *repeats])
    run = place.run("score", "same-tokens", pool=str(pool))
    assert sum(computed) == 22 + len(nearly)  # two rows of POOL repeat others, too
    score, first = column(run, "score"), column(scored, "score")
    assert score[len(POOL) + 2 :] == score[:22]
    assert score[:22] == pytest.approx(first[:22], rel=1e-4, abs=1e-5)
    assert column(run, "source")[-1] == "repeated" and manifest(run)["actual"]["tokens"] == sum(
        column(run, "length")
    )
