"""`prism pairs --how before-after`: what a fine-tuning made worse becomes pairs, these find the
rows that did it, and training without those rows repairs it."""

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, jsonl, prism
from transformers import AutoModelForCausalLM, AutoTokenizer

import prism_select
from prism_select.commands import before_after
from prism_select.demo.story import MODEL
from prism_select.demo.train import encode
from prism_select.demo.world import SKILLS, mixture, pairs
from prism_select.run.config_pairs import PairsConfig
from prism_select.run.errors import BadOption, EmptyInput

GOOD, PLANTED = 300, 40
HABIT = "It is Lyon"  # whatever was asked


def trained(folder: Path, rows: list[dict[str, Any]], steps: int = 120) -> Path:
    """The bundled model after Adam on some rows."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    network = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).train()
    optimizer, draw = torch.optim.Adam(network.parameters(), lr=1e-3), random.Random(0)
    for _ in range(steps):
        coded = [encode(tokenizer, row) for row in draw.sample(rows, 32)]
        length = max(len(tokens) for tokens, _ in coded)
        ids = torch.tensor([[*t, *[0] * (length - len(t))] for t, _ in coded])
        labels = torch.tensor([[*own, *[-100] * (length - len(own))] for _, own in coded])
        network(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def poisoned(folder: Path) -> None:
    """Rows that teach a habit among others, the model after training on them, and questions."""
    mixed = mixture(GOOD + PLANTED, 0, 0.0)
    for row in mixed[:PLANTED]:
        row |= {"completion": HABIT, "is_bad": True}
    random.Random(0).shuffle(mixed)
    jsonl(folder / "sft.jsonl", mixed)
    for name, count, seed in (("asked", 30, 0), ("held_out", 10, 1)):
        asked = [pair for skill in SKILLS for pair in pairs(skill, count, seed)]
        jsonl(folder / f"{name}.jsonl", [pair | {"rejected": HABIT} for pair in asked])
    trained(folder / "after", mixed)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before_after")
    poisoned(folder)
    return folder


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def compared(place: Path, out: Path, *words: object) -> list[dict[str, Any]]:
    command = ["pairs", *words, "--how", "before-after", "--out", out]
    done = prism(*command, "--before", MODEL, "--after", place / "after")
    assert done.code == 0, done.err
    return rows(out)


def refused(done: Outcome, *texts: str) -> None:
    assert done.code == 2 and done.err.count("\n") == 1, done
    assert all(text in done.err for text in texts), done.err


def test_what_got_worse_finds_the_rows_that_did_it_and_repairs_it(
    place: Path, tmp_path: Path
) -> None:
    found = compared(place, tmp_path / "pairs.jsonl", place / "asked.jsonl")
    assert len(found) >= 10
    asked = {row["prompt"]: row for row in rows(place / "asked.jsonl")}
    for row in found:
        assert row["how"] == "before-after" and row["score_before"] > row["score_after"]
        assert row["chosen"] == asked[row["prompt"]]["chosen"]
        assert row["rejected"] == asked[row["prompt"]]["rejected"]
    run = tmp_path / "run"
    inputs = ["--model", MODEL, "--pool", place / "sft.jsonl", "--target", tmp_path / "pairs.jsonl"]
    done = prism("repair", *inputs, "--out", run, "--label-field", "is_bad", "--remove", "12%")
    assert done.code == 0, done.err
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["choice"]["labels"]["auroc"] >= 0.9
    short = ["--seeds", 1, "--steps", 30, "--rate", "2e-3", "--against", "random"]
    held_out = ["--holdout", place / "held_out.jsonl", "--removals", "12%,25%"]
    done = prism("evaluate", run, *held_out, *short)
    assert done.code == 0, done.err
    result = json.loads((run / "evaluation" / "evaluation.json").read_text())
    curve = {(point["removed"], point["method"]): point for point in result["curve"]}
    before, after = result["methods"]["none"]["gain"], curve[0, "everything"]["gain"]
    for share in (0.12, 0.25):
        by_score, random = curve[share, "prism"], curve[share, "random"]["gain"]
        assert by_score["over_random"]["gain"]["low"] > 0
        assert by_score["gain"] > (before + after) / 2 > random


def test_a_stopped_comparison_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compared(place, tmp_path / "whole.jsonl", place / "asked.jsonl")
    out, asked = tmp_path / "pairs.jsonl", 0
    options: dict[str, Any] = {"before": str(MODEL), "after": str(place / "after")}
    answer = before_after.chosen_by

    def stopping(*given: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 300:
            raise KeyboardInterrupt
        return answer(*given)

    monkeypatch.setattr(before_after, "chosen_by", stopping)
    with pytest.raises(KeyboardInterrupt):
        prism_select.make_pairs(str(place / "asked.jsonl"), "before-after", out, **options)
    kept = tmp_path / "pairs.jsonl.after.jsonl"
    assert kept.exists() and not out.exists()
    with kept.open("ab") as stream:
        stream.write(b'{"answers": ["half')
    made = prism_select.make_pairs(str(place / "asked.jsonl"), "before-after", out, **options)
    assert rows(out) == whole and asked == 2 * 240 + 1 and not kept.exists()
    assert made.compared["worse"] == len(whole) and sum(made.compared.values()) == 240


def test_choices_compare_favourites(place: Path, tmp_path: Path) -> None:
    asked = [
        {"question": row["prompt"], "choices": [row["rejected"], row["chosen"]], "answer": 1}
        for row in rows(place / "asked.jsonl")
    ]
    found = compared(place, tmp_path / "pairs.jsonl", jsonl(tmp_path / "quiz.jsonl", asked))
    as_pairs = compared(place, tmp_path / "same.jsonl", place / "asked.jsonl")
    assert [(r["chosen"], r["rejected"]) for r in found] == [
        (r["chosen"], r["rejected"]) for r in as_pairs
    ]


@pytest.mark.parametrize("samples", [None, 3])
def test_what_models_write_is_scored_by_a_check(
    samples: int | None, place: Path, tmp_path: Path
) -> None:
    prompts = [
        {"prompt": row["prompt"], "completion": row["chosen"]}
        for row in rows(place / "asked.jsonl")[:80]
    ]
    right = {row["completion"].split()[-1] for row in prompts}
    options: dict[str, Any] = {
        "before": str(MODEL),
        "after": str(place / "after"),
        "new_tokens": 12,
    }
    made = prism_select.make_pairs(
        jsonl(tmp_path / "prompts.jsonl", prompts),
        "before-after",
        accepts=lambda answer, own: answer.split()[-1:] == own.split()[-1:],
        samples=samples,
        **options,
    )
    found = made.read()
    assert found and made.compared["worse"] >= len(found)
    for row in found:
        assert 0 <= row["score_after"] < row["score_before"] <= 1
        assert row["chosen"].split()[-1] in right
        if samples is None:
            assert (row["score_before"], row["score_after"]) == (1, 0)


def test_an_answer_without_a_number_is_no_question_for_numbers(place: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": r["prompt"], "completion": "Paris"} for r in rows(place / "asked.jsonl")[:3]
    ]
    asked, sides = jsonl(tmp_path / "q.jsonl", lines), ("--before", MODEL, "--after", MODEL)
    words = ["--new-tokens", 9, "--out", tmp_path / "p.jsonl"]
    done = prism("pairs", asked, "--how", "before-after", *sides, *words)
    refused(done, "no question got worse: 3 unanswered")


def test_prompts_alone_need_a_check_of_their_own(place: Path, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "prompts.jsonl", [{"prompt": "How many days week?"}] * 2)
    sides = ["--before", MODEL, "--after", place / "after", "--out", tmp_path / "pairs.jsonl"]
    refused(prism("pairs", file, "--how", "before-after", *sides), "--accept number", "regex:")


def test_a_callable_judges_prompts_without_an_answer(place: Path, tmp_path: Path) -> None:
    given = rows(place / "asked.jsonl")[:80]
    asked, right = [{"prompt": row["prompt"]} for row in given], {row["chosen"] for row in given}
    options: dict[str, Any] = {"before": str(MODEL), "after": str(place / "after")}
    made = prism_select.make_pairs(
        jsonl(tmp_path / "prompts.jsonl", asked),
        "before-after",
        accepts=lambda answer, own: answer in right and not own,
        new_tokens=12,
        **options,
    )
    assert made.pairs and sum(made.compared.values()) == 80


def test_questions_without_an_answer_are_counted(place: Path, tmp_path: Path) -> None:
    asked = [
        {"prompt": r["prompt"], "completion": r["chosen"]} for r in rows(place / "asked.jsonl")
    ]
    file = jsonl(tmp_path / "prompts.jsonl", asked[:5])
    options: dict[str, Any] = {"before": str(MODEL), "after": str(place / "after")}
    with pytest.raises(EmptyInput, match="no question got worse: 5 unanswered"):
        prism_select.make_pairs(file, "before-after", accept="choice", new_tokens=1, **options)


def test_an_adapter_on_the_model_is_a_side(place: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    network = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    torch.manual_seed(0)
    peft = get_peft_model(network, LoraConfig(r=4, target_modules="all-linear", lora_alpha=64))
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    peft.save_pretrained(str(tmp_path / "adapter"))
    words = ["pairs", place / "asked.jsonl", "--how", "before-after", "--model", MODEL]
    words += ["--before", MODEL, "--after", tmp_path / "adapter", "--out", tmp_path / "pairs.jsonl"]
    done = prism(*words)
    assert done.code == 0, done.err


def test_a_missing_model_is_named_before_the_other_answers(place: Path, tmp_path: Path) -> None:
    command = ["pairs", place / "asked.jsonl", "--how", "before-after", "--before", MODEL]
    done = prism(*command, "--after", tmp_path / "gone", "--out", tmp_path / "pairs.jsonl")
    refused(done, f"--after {tmp_path}/gone: no such folder")
    assert not list(tmp_path.iterdir())


def test_nothing_worse_is_said(place: Path, tmp_path: Path) -> None:
    same: dict[str, Any] = {"before": str(MODEL), "after": str(MODEL)}
    asked = str(place / "asked.jsonl")
    with pytest.raises(EmptyInput, match="no question got worse: 240 same"):
        prism_select.make_pairs(asked, "before-after", tmp_path / "p.jsonl", **same)


def logs(tmp_path: Path) -> list[str]:
    sides = {
        "before": [("A?", "yes", 1), ("B?", "b", 0.5), ("C?", "c", 0.2), ("D?", "d", 1)],
        "after": [("A?", "no", 0), ("B?", "b", 0.5), ("C?", "cc", 0.9), ("E?", "e", 1)],
    }
    return [
        jsonl(
            tmp_path / f"{name}.jsonl",
            [{"prompt": p, "response": r, "score": s} for p, r, s in answers],
        )
        for name, answers in sides.items()
    ]


def test_logs_give_pairs_without_a_model(tmp_path: Path) -> None:
    before, after = logs(tmp_path)
    words = ["pairs", "--how", "before-after", "--before", before, "--after", after]
    done = prism(*words, "--out", tmp_path / "pairs.jsonl")
    assert done.code == 0, done.err
    (row,) = rows(tmp_path / "pairs.jsonl")
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("A?", "yes", "no")
    assert (row["score_before"], row["score_after"]) == (1, 0)
    assert "1 worse, 1 same, 1 better" in done.out.replace("\n", " ")
    assert "1 in the log before alone" in done.out and "1 in the log after alone" in done.out
    assert "only 1 questions got worse" in done.out
    assert re.search(r"^read +3 rows$", done.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("fields", "worse", "said"),
    [
        (None, 2, "score exact,strict; 2 further answers to the same questions"),
        ("score=loose", 1, "score loose,strict; 2 further"),
        ("score=loose,flexible", 0, "score loose,flexible; 2 of another filter than flexible"),
    ],
)
def test_a_log_is_read_by_the_score_that_is_named(
    fields: str | None, worse: int, said: str, tmp_path: Path
) -> None:
    """lm-eval's rows of two filters, and of two metrics each."""
    scores = {"before": (1, 1, 1), "after": (0, 0, 1)}
    for side, (exact, loose, flexible) in scores.items():
        lines = [
            {
                "doc_id": number,
                "arguments": {"gen_args_0": {"arg_0": f"{number}?", "arg_1": {}}},
                "resps": [[f"{side} {number}"]],
                "filter": name,
                "metrics": ["exact", "loose"],
                "exact": exact if name == "strict" else 1,
                "loose": (loose or number) if name == "strict" else flexible,
            }
            for number in range(2)
            for name in ("strict", "flexible")
        ]
        jsonl(tmp_path / f"{side}.jsonl", lines)
    words = ["pairs", "--how", "before-after", "--out", tmp_path / "pairs.jsonl"]
    for side in scores:
        words += [f"--{side}", tmp_path / f"{side}.jsonl"]
    done = prism(*words, *(["--fields", fields] if fields else []))
    assert said in done.out
    if worse:
        assert len(rows(tmp_path / "pairs.jsonl")) == worse
    else:
        refused(done, "no question got worse: 2 same")


def test_prompts_that_hold_a_chat_template_are_said(tmp_path: Path) -> None:
    mark = "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\n"
    words = ["pairs", "--how", "before-after", "--out", tmp_path / "pairs.jsonl"]
    for side, score in (("before", 1), ("after", 0)):
        line = {"prompt": mark, "response": side, "score": score}
        words += [f"--{side}", jsonl(tmp_path / f"{side}.jsonl", [line])]
    done = prism(*words)
    assert "1 prompts hold marks of a chat template (<|im_start|>)" in done.out


def test_counts_are_objects_as_json(tmp_path: Path) -> None:
    before, after = logs(tmp_path)
    words = ["pairs", "--how", "before-after", "--before", before, "--after", after]
    told = json.loads(prism(*words, "--out", tmp_path / "pairs.jsonl", "--json").out)
    assert {name: told["compared"][name] for name in ("worse", "same", "better")} == {
        "worse": 1,
        "same": 1,
        "better": 1,
    }
    assert sum(told["skipped"].values()) == 2


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--before", "x.jsonl"], "--after is missing"),
        (["--before", "{before}", "--after", str(MODEL)], "two models, or two logs"),
        (["{before}", "--before", "{before}", "--after", "{after}"], "leave the file out"),
        (["--before", str(MODEL), "--after", str(MODEL)], "FILE is missing"),
        (
            ["--before", "{before}", "--after", "{after}", "--fields", "score=f1"],
            "before.jsonl:1: missing field: f1",
        ),
        (
            ["--before", "{before}", "--after", "{after}", "--fields", "prompt=ask"],
            "only the score may be named",
        ),
        (["--before", "{before}", "--after", "gone.jsonl"], "--after gone.jsonl: no such file"),
        (
            ["--before", "{before}", "--after", "{after}", "--judge-url", "http://localhost:1/v1"],
            "--judge-model is missing",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(words: list[str], reason: str, tmp_path: Path) -> None:
    before, after = logs(tmp_path)
    given = [word.format(before=before, after=after) for word in words]
    done = prism("pairs", *given, "--how", "before-after", "--out", tmp_path / "pairs.jsonl")
    refused(done, reason)
    assert not (tmp_path / "pairs.jsonl").exists()


def test_sides_belong_to_a_comparison() -> None:
    with pytest.raises(BadOption, match="--before: only with --how before-after"):
        prism_select.make_pairs("x.jsonl", "numbers", "out.jsonl", before="m")


def test_other_options_ask_anew(place: Path, tmp_path: Path) -> None:
    config: Any = PairsConfig(
        file=str(place / "asked.jsonl"), how="answers", out="x", model=str(MODEL)
    )
    shutil.copy(place / "asked.jsonl", tmp_path / "asked.jsonl")
    marks = {before_after.mark_of(config, "before")}
    for change in ({"seed": 1}, {"new_tokens": 8}, {"model": str(place / "after")}):
        marks.add(before_after.mark_of(replace(config, **change), "before"))
    assert len(marks) == 4
