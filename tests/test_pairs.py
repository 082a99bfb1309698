"""`prism pairs`: good pairs from what people have, the same bytes for the same seed, and nothing
lost."""

import json
import os
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome, jsonl, prism
from hypothesis import given
from hypothesis import strategies as st

import prism_select
from prism_select.data.formats import Format, to_pairs
from prism_select.data.pairing import (
    NoPair,
    accepts_by,
    change_numbers,
    final_number,
    nearest,
    swapped_answers,
)
from prism_select.data.records import Raw
from prism_select.run.errors import BadOption, PrismError

SOLVED: list[dict[str, Any]] = [
    {
        "question": f"{a} and {b}?",
        "answer": f"First {a}+{b} is {a + b}.\n#### {a + b}",
        "weaker": f"It is {a}.",
    }
    for a, b in ((12, 30), (7, 8), (1, 9), (40, 2))
]
CHOICES: list[dict[str, Any]] = [
    {"question": "Which is a fruit?", "choices": ["stone", "apple", "car"], "answer": 1},
    {"question": "Which is wet?", "choices": ["water", "sand"], "answer": "A"},
]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def made(out: Path, *words: object) -> list[dict[str, Any]]:
    outcome = prism("pairs", *words, "--out", out)
    assert outcome.code == 0, outcome.err
    return rows(out)


def refused(outcome: Outcome, *texts: str) -> None:
    assert (
        outcome.code == 2 and outcome.err.count("\n") == 1 and outcome.err.startswith("prism: ")
    ), outcome
    assert all(text in outcome.err for text in texts), outcome.err


# ---------------------------------------------------------------- properties of the pure parts


@given(st.text(max_size=60), st.integers(0, 10**9), st.text(max_size=20), st.integers(0, 99))
def test_a_numbers_pair_always_differs_in_its_final_number(
    before: str, number: int, after: str, seed: int
) -> None:
    answer = f"{before} {number} {after}"
    changed = change_numbers(answer, random.Random(seed))
    assert final_number(changed) != final_number(answer)
    assert re.sub(r"[0-9]", "", changed) == re.sub(r"[0-9]", "", answer)  # nothing else is touched
    first = re.search(r"[0-9]", answer)
    assert first and changed[: first.start()] == answer[: first.start()]
    assert changed == change_numbers(answer, random.Random(seed))


@given(
    st.from_regex(r"[0-9]{1,3}(,[0-9]{3}){0,2}(\.[0-9]{1,3})?", fullmatch=True), st.integers(0, 9)
)
def test_numbers_with_separators_and_decimals_differ_too(number: str, seed: int) -> None:
    assert final_number(change_numbers(f"= {number}", random.Random(seed))) != final_number(
        f"= {number}"
    )


@given(st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=8, unique=True), st.data())
def test_choices_never_pair_the_right_answer_with_itself(
    choices: list[str], data: st.DataObject
) -> None:
    right = data.draw(st.integers(0, len(choices) - 1))
    fields = {"question": "q", "choices": choices, "answer": right}
    pairs = to_pairs(Raw("f", 1, "", fields), Format("question+choices+answer"), {})
    assert {pair.chosen.turns[-1].text for pair in pairs} == {choices[right]}
    assert sorted(pair.rejected.turns[-1].text for pair in pairs) == sorted(
        set(choices) - {choices[right]}
    )


@given(st.lists(st.text(min_size=1, max_size=4), max_size=12), st.integers(0, 99))
def test_swapped_answers_are_those_of_other_rows(answers: list[str], seed: int) -> None:
    found = swapped_answers(answers, random.Random(seed))
    for answer, other in zip(answers, found, strict=True):
        if other is None:
            assert not answer.strip() or len({wrong.strip() for wrong in answers} - {""}) == 1
        else:
            assert other in answers and other.strip() not in ("", answer.strip())


def test_numbers_are_compared_by_value() -> None:
    assert final_number("so 1,200 in all") == final_number("#### 1200.0") == "1200"
    assert (
        final_number("-3.50") == "-3.5"
        and final_number("none") is None
        and final_number("007") == "7"
    )
    assert final_number("\N{MINUS SIGN}5") == "-5" and final_number(
        "it is 03/4"
    ) == "3/4" != final_number("1/4")
    right = accepts_by("number")
    assert right("= 42.0", "#### 42") and not right("41", "42") and not right("no number", "42")
    assert accepts_by("choice")("B) apple", "B") and not accepts_by("choice")("apple", "pear")
    assert accepts_by("choice")("(B)", "B.") and not accepts_by("choice")("A battery", "A magnet")
    assert accepts_by("choice")(" An apple. ", "an apple") and not accepts_by("choice")(
        "Because", "B"
    )
    assert accepts_by("regex:^ye")("yes", "anything") and not accepts_by("regex:^ye")(
        "no", "anything"
    )
    for wrong in ("regex:(", "number?", ""):
        with pytest.raises(BadOption, match="--accept"):
            accepts_by(wrong)


def test_an_answer_without_a_number_cannot_be_compared_by_one() -> None:
    """No answer agrees with it, so the model's right ones would be its wrong ones."""
    with pytest.raises(NoPair, match="no number to compare with; give --accept choice"):
        accepts_by("number")("It is Paris", "Paris")
    assert not accepts_by("number")("It is Paris", "7")


def test_the_nearest_refused_answer_is_taken() -> None:
    assert nearest("2+3=5", ["a long way off", "2+3=6", "2+3=5", " "]) == "2+3=6"
    with pytest.raises(NoPair):
        nearest("2+3=5", ["2+3=5 ", ""])


# ---------------------------------------------------------------- the command


def test_numbers_from_the_command_line_are_a_target_file(tmp_path: Path, plain_model: Path) -> None:
    file = jsonl(tmp_path / "solved.jsonl", SOLVED)
    pairs = made(tmp_path / "pairs.jsonl", file, "--how", "numbers")
    assert [pair["chosen"] for pair in pairs] == [row["answer"] for row in SOLVED]
    assert all(
        pair["how"] == "numbers" and pair["prompt"] == row["question"]
        for pair, row in zip(pairs, SOLVED, strict=True)
    )
    assert [pair["line"] for pair in pairs] == [1, 2, 3, 4]
    pool = jsonl(tmp_path / "pool.jsonl", SOLVED)
    words = (
        "--model",
        plain_model,
        "--pool",
        pool,
        "--target",
        tmp_path / "pairs.jsonl",
        "--out",
        tmp_path / "run",
    )
    assert prism("score", *words).code == 0


def test_the_same_seed_makes_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "solved.jsonl", SOLVED)
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        made(tmp_path / f"{name}.jsonl", file, "--how", "numbers", "--seed", seed)
    contents = [(tmp_path / f"{name}.jsonl").read_bytes() for name in "abc"]
    assert contents[0] == contents[1] != contents[2]


def test_what_is_made_of_a_row_depends_on_no_other_row(tmp_path: Path) -> None:
    whole = made(tmp_path / "a.jsonl", jsonl(tmp_path / "rows.jsonl", SOLVED), "--how", "numbers")
    (tmp_path / "less").mkdir()
    less = made(
        tmp_path / "b.jsonl",
        jsonl(tmp_path / "less" / "rows.jsonl", SOLVED[:2]),
        "--how",
        "numbers",
    )
    assert less == whole[:2]


def test_choices_give_each_wrong_choice_or_with_a_model_its_favourite(
    tmp_path: Path, plain_model: Path
) -> None:
    file = jsonl(tmp_path / "quiz.jsonl", CHOICES)
    wrong = made(tmp_path / "each.jsonl", file, "--how", "choices")
    assert [(pair["chosen"], pair["rejected"]) for pair in wrong] == [
        ("apple", "stone"),
        ("apple", "car"),
        ("water", "sand"),
    ]
    words = ("--how", "choices", "--model", plain_model)
    liked = made(tmp_path / "liked.jsonl", file, *words)
    checked = prism_select.score(
        model=str(plain_model),
        pool=file,
        target=str(tmp_path / "each.jsonl"),
        out=str(tmp_path / "run"),
    ).pairs.to_pydict()
    best = max((0, 1), key=lambda i: checked["loglik_rejected"][i])
    assert liked[0]["rejected"] == wrong[best]["rejected"] and liked[1]["rejected"] == "sand"


def test_weak_answers_come_from_a_column_and_swapped_ones_from_other_rows(tmp_path: Path) -> None:
    file = jsonl(
        tmp_path / "solved.jsonl", [*SOLVED, {"question": "q", "answer": "a", "weaker": None}]
    )
    weak = made(tmp_path / "weak.jsonl", file, "--how", "weak", "--fields", "weak=weaker")
    assert [pair["rejected"] for pair in weak] == [row["weaker"] for row in SOLVED]
    lost = rows(tmp_path / "weak.jsonl.skipped.jsonl")
    assert [(row["line"], row["reason"]) for row in lost] == [(5, "no text in weaker")]
    swapped = made(tmp_path / "swap.jsonl", file, "--how", "swap")
    answers = {row["answer"] for row in SOLVED} | {"a"}
    assert all(pair["rejected"] in answers - {pair["chosen"]} for pair in swapped)
    assert len({pair["rejected"] for pair in swapped}) == 5


def test_answers_are_the_models_own_where_the_check_refuses_them(
    tmp_path: Path, plain_model: Path
) -> None:
    file = jsonl(tmp_path / "solved.jsonl", SOLVED)
    words = (
        "--how",
        "answers",
        "--model",
        plain_model,
        "--samples",
        3,
        "--new-tokens",
        9,
        "--stop",
        "e",
    )
    pairs = made(tmp_path / "a.jsonl", file, *words)
    assert (
        all(pair["rejected"].strip() and pair["rejected"] != pair["chosen"] for pair in pairs)
        and pairs
    )
    assert pairs == made(tmp_path / "b.jsonl", file, *words)
    refused(
        prism("pairs", file, *words, "--accept", "regex:", "--out", tmp_path / "c.jsonl"),
        "no row gives a pair",
        "the check refused none of the answers",
    )
    refused(
        prism("pairs", file, *words[:-2], "--out", tmp_path / "c.jsonl"),
        "no answer ended within --new-tokens",
    )
    before = prism_select.make_pairs(
        file,
        "answers",
        str(tmp_path / "d.jsonl"),
        accepts=lambda answer, right: False,
        **options(plain_model),
    )
    assert before.pairs and before.pairs + sum(before.skipped.values()) == len(SOLVED)


def options(model: Path) -> dict[str, Any]:
    return {"model": str(model), "samples": 3, "new_tokens": 9, "stop": "e"}


def test_conversations_keep_their_turns(tmp_path: Path) -> None:
    talk = [("user", "1+1?"), ("assistant", "2"), ("user", "and 3 more?"), ("assistant", "5")]
    messages = [{"role": role, "content": text} for role, text in talk]
    (pair,) = made(
        tmp_path / "p.jsonl",
        jsonl(tmp_path / "talk.jsonl", [{"messages": messages}]),
        "--how",
        "numbers",
    )
    assert pair["prompt"] == messages[:-1] and pair["chosen"] == "5" and pair["rejected"] != "5"


def test_a_limit_draws_rows_by_the_seed_and_keeps_their_order(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "solved.jsonl", SOLVED * 5)
    drawn = made(tmp_path / "p.jsonl", file, "--how", "numbers", "--limit", 7)
    places = [pair["line"] for pair in drawn]
    assert len(places) == 7 and places == sorted(places) and places != list(range(1, 8))


# ---------------------------------------------------------------- messy input


def test_rows_that_give_no_pair_are_counted_and_kept_with_their_reason(tmp_path: Path) -> None:
    messy: list[Any] = [
        SOLVED[0],
        {"question": "q", "answer": "none"},
        {"question": "", "answer": ""},
        "{broken",
        *SOLVED[1:],
    ]
    file = jsonl(tmp_path / "rows.jsonl", messy)
    outcome = prism(
        "pairs", file, "--how", "numbers", "--out", tmp_path / "p.jsonl", "--max-bad", "50%"
    )
    assert outcome.code == 0 and "its answer has no number" in outcome.out
    lost = rows(tmp_path / "p.jsonl.skipped.jsonl")
    assert [row["line"] for row in lost] == [2, 3, 4]
    assert lost[0]["reason"] == "its answer has no number" and lost[2]["raw"] == "{broken"
    assert len(rows(tmp_path / "p.jsonl")) + len(lost) == len(messy)


@pytest.mark.parametrize(
    ("lines", "words", "texts"),
    [
        ([*SOLVED, "{broken"], (), ("rows.jsonl:5", "--max-bad")),
        (["{broken"], (), ("rows.jsonl:1",)),
        ([{"text": "only 3 text"}], (), ("no row gives a pair", "bare text")),
        ([{"question": "q", "answer": "none"}], (), ("no row gives a pair", "no number")),
        ([{"q": "q", "a": "3"}], (), ("rows.jsonl:1", "no known format", "--fields")),
        (SOLVED, ("--how", "choices"), ("rows.jsonl:1: missing field: choices", "another --how")),
        ([*SOLVED, "{broken"], ("--bad-rows", "stop"), ("rows.jsonl:5",)),
        ([], (), ("no rows",)),
    ],
)
def test_input_that_cannot_be_used_is_one_line_and_writes_nothing(
    tmp_path: Path, lines: list[Any], words: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    file = jsonl(tmp_path / "rows.jsonl", lines)
    how = () if "--how" in words else ("--how", "numbers")
    refused(prism("pairs", file, *how, *words, "--out", tmp_path / "p.jsonl"), *texts)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("FILE", "--how", "numbers"), "--out is missing"),
        (("FILE", "--out", "p.jsonl"), "--how is missing"),
        (("FILE", "--how", "weak", "--out", "p.jsonl"), "no text in weak"),
        (("FILE", "--how", "weak", "--out", "p.jsonl", "--fields", "weak=no"), "no text in no"),
        (("FILE", "--how", "answers", "--out", "p.jsonl"), "--model is missing"),
        (("FILE", "--how", "number", "--out", "p.jsonl"), "try one of numbers"),
        (("FILE", "--how", "numbers", "--out", "p.csv"), ".jsonl"),
        (("FILE", "--how", "numbers", "--out", "p.jsonl", "--limit", "0"), "at least 1"),
        (("FILE", "--how", "numbers", "--out", "p.jsonl", "--accept", "x"), "--accept"),
        (("nowhere.jsonl", "--how", "numbers", "--out", "p.jsonl"), "nowhere.jsonl"),
        (("--check", "FILE"), "--model is missing"),
        ((), "give either FILE"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tmp_path: Path, words: tuple[str, ...], text: str
) -> None:
    file = jsonl(tmp_path / "rows.jsonl", SOLVED)
    refused(prism("pairs", *[file if word == "FILE" else word for word in words]), text)


def test_rows_that_cannot_be_asked_are_skipped_and_the_rest_goes_on(
    tmp_path: Path, plain_model: Path
) -> None:
    talk = [
        {"role": "user", "content": "2?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3?"},
    ]
    long = {
        "messages": [
            {"role": "user", "content": "why " * 600},
            {"role": "assistant", "content": "4"},
        ]
    }
    fine = {
        "messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    }
    file = jsonl(tmp_path / "rows.jsonl", [{"messages": talk}, long, fine])
    words = (
        "--how",
        "answers",
        "--model",
        plain_model,
        "--template",
        "plain",
        "--samples",
        9,
        "--new-tokens",
        9,
    )
    assert len(made(tmp_path / "p.jsonl", file, *words, "--stop", "e")) == 1
    lost = rows(tmp_path / "p.jsonl.skipped.jsonl")
    assert [row["line"] for row in lost] == [1, 2]


def test_what_cannot_be_an_answer_is_no_answer(tmp_path: Path) -> None:
    def row(text: str) -> dict[str, Any]:
        return {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
        }

    first = {"role": "assistant", "content": "yes"}
    empty = {"messages": [{"role": "user", "content": "q"}, first, *row("")["messages"]]}
    asks = {"messages": [*row("a")["messages"], {"role": "user", "content": "more?"}]}
    file = jsonl(tmp_path / "rows.jsonl", [row("one"), empty, asks, row("two")])
    pairs = made(tmp_path / "p.jsonl", file, "--how", "swap")
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [
        ("one", "two"),
        ("two", "one"),
    ]
    odd = jsonl(
        tmp_path / "odd.jsonl",
        [{**SOLVED[0], "weaker": "fine"}, '{"question": "q", "answer": "a", "weaker": "\\ud800"}'],
    )
    assert (
        len(
            made(
                tmp_path / "w.jsonl",
                odd,
                "--how",
                "weak",
                "--fields",
                "weak=weaker",
                "--max-bad",
                "60%",
            )
        )
        == 1
    )


def test_a_file_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.jsonl"))
    file = jsonl(place, SOLVED)
    refused(
        prism("pairs", file, "--how", "numbers", "--out", tmp_path / "p.jsonl"),
        "its name is not UTF-8; rename it",
    )


def test_what_is_read_is_never_written(tmp_path: Path, plain_model: Path) -> None:
    file = jsonl(tmp_path / "rows.jsonl", SOLVED)
    before = Path(file).read_bytes()
    refused(
        prism("pairs", file, "--how", "numbers", "--out", file, "--overwrite"), "the file to read"
    )
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps([{"prompt": "q", "chosen": "a", "rejected": "b"}]))
    content = pairs.read_bytes()
    refused(
        prism("pairs", "--check", pairs, "--model", plain_model, "--out", pairs), "the file to read"
    )
    report = tmp_path / "report.json"
    report.write_text("mine")
    refused(
        prism("pairs", "--check", pairs, "--model", plain_model, "--out", report), "there already"
    )
    assert (
        Path(file).read_bytes() == before
        and pairs.read_bytes() == content
        and report.read_text() == "mine"
    )


def test_one_pair_has_no_agreement_and_says_so_without_a_number(
    tmp_path: Path, plain_model: Path
) -> None:
    file = jsonl(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    outcome = prism("pairs", "--check", file, "--model", plain_model)
    assert outcome.code == 0 and "nan" not in outcome.out and "agree at" not in outcome.out
    assert prism_select.check_pairs(file, str(plain_model))["split_half_agreement"] is None
    norms = prism("pairs", "--check", file, "--model", plain_model, "--layers", "norm")
    assert norms.code == 0 and "nan" not in norms.out


def test_a_saved_direction_comes_with_its_own_settings(tmp_path: Path, plain_model: Path) -> None:
    pool = jsonl(tmp_path / "rows.jsonl", SOLVED)
    made(tmp_path / "pairs.jsonl", pool, "--how", "numbers")
    shared = ("--model", plain_model, "--pool", pool)
    first = prism(
        "score",
        *shared,
        "--target",
        tmp_path / "pairs.jsonl",
        "--out",
        tmp_path / "run",
        "--common",
        "remove",
    )
    assert first.code == 0
    again = (
        "score",
        *shared,
        "--direction",
        tmp_path / "run" / "direction.safetensors",
        "--out",
        tmp_path / "again",
    )
    for words in (
        ("--common", "remove"),
        ("--anchor", 3),
        ("--weighting", "hard"),
        ("--layers", "late"),
    ):
        refused(prism(*again, *words), words[0], "a saved direction has that in it")
    assert prism(*again).code == 0
    scores = [
        prism_select.Run(tmp_path / name).scores["score"].to_pylist() for name in ("run", "again")
    ]
    assert scores[0] == pytest.approx(scores[1])
    refused(prism(*again, "--seed", "-1"), "--seed")


def test_repair_speaks_of_the_answers_as_the_target_file_does(
    tmp_path: Path, plain_model: Path
) -> None:
    pool = jsonl(tmp_path / "rows.jsonl", SOLVED)
    rows_ = [
        {"prompt": f"q {i}", "chosen": "a much longer answer " * 2, "rejected": f"b {i}"}
        for i in range(12)
    ]
    file = jsonl(tmp_path / "pairs.jsonl", rows_)
    for command in ("score", "repair"):
        outcome = prism(
            command,
            "--model",
            plain_model,
            "--pool",
            pool,
            "--target",
            file,
            "--out",
            tmp_path / command,
        )
        assert "the chosen answer is the longer one in 100% of the pairs" in outcome.out, (
            outcome.out + outcome.err
        )


def test_a_file_that_is_there_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    file, out = jsonl(tmp_path / "rows.jsonl", SOLVED), tmp_path / "p.jsonl"
    out.write_text("mine")
    refused(prism("pairs", file, "--how", "numbers", "--out", out), "there already")
    assert out.read_text() == "mine"
    assert len(made(out, file, "--how", "numbers", "--overwrite")) == 4


# ---------------------------------------------------------------- the diagnosis


def test_the_check_says_what_a_run_says_without_a_pool(tmp_path: Path, plain_model: Path) -> None:
    made(tmp_path / "pairs.jsonl", jsonl(tmp_path / "rows.jsonl", SOLVED), "--how", "numbers")
    target, report = str(tmp_path / "pairs.jsonl"), tmp_path / "check.json"
    outcome = prism("pairs", "--check", target, "--model", plain_model, "--out", report)
    assert (
        outcome.code == 0 and "two halves agree at" in outcome.out and "common part" in outcome.out
    ), outcome.err
    report = json.loads(report.read_text())
    run = prism_select.score(
        model=str(plain_model),
        pool=str(tmp_path / "rows.jsonl"),
        target=target,
        out=str(tmp_path / "run"),
    )
    assert report.pop("warnings") == run.manifest["warnings"]
    assert report == run.manifest["target"]
    assert report["pairs"] == 4 and sum(run.pairs["share"].to_pylist()) == pytest.approx(1)
    assert prism_select.check_pairs(target, str(plain_model))["pairs"] == 4


def test_a_bad_pair_stops_the_check_at_its_line(tmp_path: Path, plain_model: Path) -> None:
    file = jsonl(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "a"}])
    refused(prism("pairs", "--check", file, "--model", plain_model), "pairs.jsonl:1", "equal")


@pytest.mark.parametrize("words", [("--common", "remove"), ("--anchor", "0.2"), ("--skip-end",)])
def test_remedies_change_the_scores_and_keep_the_halves_apart(
    tmp_path: Path, plain_model: Path, chat_model: Path, words: tuple[str, ...]
) -> None:
    pool = jsonl(tmp_path / "rows.jsonl", SOLVED)
    made(tmp_path / "pairs.jsonl", pool, "--how", "numbers")
    for model in (plain_model, chat_model):
        shared = ("--model", model, "--pool", pool, "--target", tmp_path / "pairs.jsonl")
        for name, extra in (("plain", ()), ("mended", words)):
            outcome = prism("score", *shared, "--out", tmp_path / model.name / name, *extra)
            assert outcome.code == 0, outcome.err
        plain, mended = (
            prism_select.Run(tmp_path / model.name / name).scores.to_pydict()
            for name in ("plain", "mended")
        )
        assert mended["score"] != pytest.approx(plain["score"], rel=1e-3)
        for score, chosen, rejected in zip(
            *(mended[n] for n in ("score", "score_chosen", "score_rejected")), strict=True
        ):
            assert chosen - rejected == pytest.approx(score, rel=1e-5)
        ends = 1 if words == ("--skip-end",) else 0
        assert [a - b for a, b in zip(plain["tokens"], mended["tokens"], strict=True)] == [
            ends
        ] * len(SOLVED)


def test_unpaired_has_no_common_part_to_remove(tmp_path: Path, plain_model: Path) -> None:
    file = jsonl(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    words = ("--weighting", "unpaired", "--common", "remove")
    refused(prism("pairs", "--check", file, "--model", plain_model, *words), "--common")
    refused(prism("pairs", "--check", file, "--model", plain_model, "--anchor", "-1"), "--anchor")


def test_made_says_where_and_how_many(tmp_path: Path) -> None:
    outcome = prism_select.make_pairs(
        jsonl(tmp_path / "rows.jsonl", SOLVED), "numbers", str(tmp_path / "p.jsonl")
    )
    assert (
        outcome.pairs == outcome.rows == 4
        and outcome.path == tmp_path / "p.jsonl"
        and not outcome.skipped
    )
    with pytest.raises(PrismError):
        prism_select.make_pairs(str(tmp_path / "rows.jsonl"), "numbers", str(tmp_path / "p.jsonl"))


# ---------------------------------------------------------------- the warm-up


def test_a_warm_up_moves_the_checkpoint_and_leaves_its_adapter(
    tmp_path: Path, chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    pool = jsonl(tmp_path / "rows.jsonl", SOLVED * 4)
    made(tmp_path / "pairs.jsonl", pool, "--how", "numbers", "--limit", 4)
    shared = (
        "--model",
        chat_model,
        "--pool",
        pool,
        "--target",
        tmp_path / "pairs.jsonl",
        "--layers",
        "late",
    )
    for name, words in (
        ("plain", ()),
        ("warm", ("--warmup", "60%")),
        ("again", ("--warmup", "60%")),
    ):
        outcome = prism("score", *shared, *words, "--out", tmp_path / name)
        assert outcome.code == 0 and "train_runtime" not in outcome.out, outcome.err
    assert not any((tmp_path / "temporary").iterdir())
    plain, warm, again = (prism_select.Run(tmp_path / name) for name in ("plain", "warm", "again"))
    logliks = [run.scores["loglik"].to_pylist() for run in (plain, warm, again)]
    assert sum(logliks[1]) > sum(logliks[0]) and logliks[1] == pytest.approx(logliks[2])
    weights = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(chat_model), tmp_path / "warm" / "adapter"
    )
    assert any("lora" in name for name, _ in weights.named_parameters())
    saved = ("--direction", tmp_path / "warm" / "direction.safetensors", "--out", tmp_path / "cold")
    refused(
        prism("score", "--model", chat_model, "--pool", pool, *saved), "after a warm-up", "--target"
    )
    (
        tmp_path / "warm" / "manifest.json"
    ).unlink()  # as if it had been stopped: the adapter is taken, not made again
    adapter = tmp_path / "warm" / "adapter" / "adapter_model.safetensors"
    before = adapter.stat().st_mtime_ns
    assert prism("score", *shared, "--warmup", "60%", "--out", tmp_path / "warm").code == 0
    assert adapter.stat().st_mtime_ns == before
    assert prism_select.Run(tmp_path / "warm").scores["score"].to_pylist() == pytest.approx(
        warm.scores["score"].to_pylist()
    )


def test_a_warm_up_that_cannot_be_is_refused(tmp_path: Path, plain_model: Path) -> None:
    pool = jsonl(tmp_path / "rows.jsonl", SOLVED)
    made(tmp_path / "pairs.jsonl", pool, "--how", "numbers")
    shared = (
        "--model",
        plain_model,
        "--pool",
        pool,
        "--target",
        tmp_path / "pairs.jsonl",
        "--out",
        tmp_path / "run",
    )
    refused(prism("score", *shared, "--warmup", "some"), "--warmup some")
    refused(prism("score", *shared, "--warmup", "0.001%"), "drew no row")
    assert not (tmp_path / "run").exists()
