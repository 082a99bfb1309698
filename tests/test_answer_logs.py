"""Logs of answers: read from files of the real tools, matched, and refused with their line.

tests/logs holds files that the tools wrote for models with fixed answers:
    sums_*, choices_*.jsonl       lm-eval 0.4.13, simple_evaluate and save_results_samples
    facts_before.eval, *.json     inspect_ai 0.3.239, mockllm; events and tracebacks taken out
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import jsonl

from prism_select.data import inspect_logs
from prism_select.data.answer_logs import (
    AnswerLog,
    is_answer_log,
    matched,
    read_answer_log,
)
from prism_select.data.records import Turn
from prism_select.run.errors import BadFile, BadRow, EmptyInput

LOGS = Path(__file__).parent / "logs"
SUMS, CHOICES = "sums_before.jsonl", "choices_before.jsonl"
EVAL, JSON = "facts_before.eval", "facts_after.json"


def log_of(name: str, metric: str | None = None) -> AnswerLog:
    return read_answer_log(str(LOGS / name), metric)


def said(log: AnswerLog) -> list[tuple[str, str, float | None]]:
    return [(answer.id, answer.answer, answer.score) for answer in log.answers.values()]


def rows_in(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (LOGS / name).read_text().splitlines()]


def samples_in(name: str) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = json.loads((LOGS / name).read_text())["samples"]
    return samples


def archive(path: Path, samples: Sequence[Mapping[str, Any]], method: int = 8) -> str:
    """An .eval file with these samples, in this order."""
    with zipfile.ZipFile(path, "w", method) as written:
        written.writestr("header.json", "{}")
        for sample in samples:
            name = f"samples/{sample.get('id')}_epoch_{sample.get('epoch', 1)}.json"
            written.writestr(name, json.dumps(sample))
    return str(path)


def asked(id: object = 1, question: object = "1 + 1?", answer: object = "2", **more: Any) -> Any:
    """A sample of Inspect."""
    message = {"role": "assistant", "content": answer}
    output = {"completion": answer, "choices": [{"message": message}]}
    return {"id": id, "epoch": 1, "input": question, "output": output, **more}


def text(log: AnswerLog) -> list[str]:
    return [answer.prompt[-1].text for answer in log.answers.values()]


# lm-eval


def test_generated_answers_of_lm_eval_are_whole_responses() -> None:
    log = log_of(SUMS)
    assert log.format == "lm-eval"
    assert said(log) == [
        ("0", "It is #### 4", 1.0),
        ("1", "It is #### 7", 1.0),
        ("2", "Six", 0.0),
    ]
    first = next(iter(log.answers.values()))
    assert first.prompt == (Turn("user", "Question: What is 2 + 2?\nAnswer:"),)
    assert (first.file, first.line, first.repeat) == (str(LOGS / SUMS), 1, "strict-match")


def test_the_first_filter_counts_unless_another_is_named() -> None:
    assert sum(log_of(SUMS).left_out.values()) == 3  # rows of the second filter
    second = log_of(SUMS, "exact_match,flexible-extract")
    assert [answer.line for answer in second.answers.values()] == [4, 5, 6]
    assert second.left_out == {"of another filter than flexible-extract": 3}
    with pytest.raises(EmptyInput, match="no answer in this log: 6 of another filter than none"):
        log_of(SUMS, "exact_match,none")


def test_an_answer_begins_without_the_space_of_a_continuation(tmp_path: Path) -> None:
    first, second, third = rows_in(SUMS)[:3]
    first["resps"], second["resps"], third["resps"] = [[" 4"]], [["    return 4"]], [["\n4"]]
    log = read_answer_log(jsonl(tmp_path / "space.jsonl", [first, second, third]))
    assert [answer.answer for answer in log.answers.values()] == ["4", "    return 4", "\n4"]


def test_a_row_that_comes_twice_is_no_other_filter(tmp_path: Path) -> None:
    rows = [*rows_in(SUMS), rows_in(SUMS)[1]]
    with pytest.raises(BadRow, match=r"twice.jsonl:7: the same question as at 2"):
        read_answer_log(jsonl(tmp_path / "twice.jsonl", rows))


def test_the_favourite_choice_agrees_with_the_metric() -> None:
    assert said(log_of(CHOICES)) == [("0", "apple", 1.0), ("1", "copper", 1.0)]
    per_letter = log_of(CHOICES, "acc_norm")  # -4 / 5 letters lose against -6 / 15
    assert said(per_letter)[0] == ("0", "a long iron bar", 0.0)
    assert said(log_of("choices_after.jsonl"))[0] == ("0", "a long iron bar", 0.0)


def test_answers_before_and_after_are_matched_by_question() -> None:
    pairs = matched(log_of(SUMS), log_of("sums_after.jsonl"))
    assert (len(pairs.pairs), pairs.before_only, pairs.after_only) == (3, 0, 0)
    worse = [(b.answer, a.answer) for b, a in pairs.pairs if (b.score or 0) > (a.score or 0)]
    assert worse == [("It is #### 7", "Who knows?")]


def test_rows_of_older_lm_eval_have_lists_and_no_metrics(tmp_path: Path) -> None:
    row = rows_in(CHOICES)[0]
    arguments = [[*request.values()] for request in row["arguments"].values()]
    old = {**row, "arguments": arguments, "resps": [[[-4.0, False]], [[-6.0, False]]]}
    for name in ("metrics", "filter"):
        del old[name]
    assert said(read_answer_log(jsonl(tmp_path / "old.jsonl", [old]))) == [("0", "apple", 1.0)]


def test_requests_without_context_are_not_among_the_choices(tmp_path: Path) -> None:
    row = rows_in(CHOICES)[0]  # acc_mutual_info asks for each continuation alone, too
    for number in (0, 1):
        alone = {"arg_0": "", "arg_1": row["arguments"][f"gen_args_{number}"]["arg_1"]}
        row["arguments"][f"gen_args_{number + 2}"] = alone
        row["resps"].append([["-0.1", "False"]])
    assert said(read_answer_log(jsonl(tmp_path / "mutual.jsonl", [row])))[0][1] == "apple"


def test_messages_for_a_server_remain_messages(tmp_path: Path) -> None:
    row = rows_in(SUMS)[0]
    messages = [{"role": "system", "content": "Count."}, {"role": "user", "content": "2 + 2?"}]
    row["arguments"]["gen_args_0"]["arg_0"] = [json.dumps(messages)]
    log = read_answer_log(jsonl(tmp_path / "chat.jsonl", [row]))
    [answer] = log.answers.values()
    assert answer.prompt == (Turn("system", "Count."), Turn("user", "2 + 2?"))


def test_predictions_without_a_metric_have_no_score(tmp_path: Path) -> None:
    rows = [{**rows_in(SUMS)[0], "metrics": ["bypass"], "bypass": 999}]
    assert said(read_answer_log(jsonl(tmp_path / "only.jsonl", rows)))[0][2] is None


def test_equal_questions_with_other_choices_are_other_questions(tmp_path: Path) -> None:
    first, second = rows_in(CHOICES)
    for request in second["arguments"].values():
        request["arg_0"] = first["arguments"]["gen_args_0"]["arg_0"]
    log = read_answer_log(jsonl(tmp_path / "same.jsonl", [first, second]))
    assert len(log.answers) == 2


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"arguments": {}}, "arguments: not a list of requests"),
        ({"arguments": {"gen_args_0": {"arg_0": "a text"}}}, "likelihoods, and no answer"),
        ({"arguments": {"g": {"arg_0": "a", "arg_1": " b"}}}, "likelihoods, and no answer"),
        (
            {"arguments": [["Ann is", " old"], ["Bob is", " old"]]},
            "its choices stand in the prompt, which is another for each",
        ),
        ({"arguments": [["a", {}, {"visual": []}]]}, "the prompt has images or sound"),
        ({"arguments": [[7, {}]]}, "arguments: a number where text"),
        ({"arguments": [[["no messages"], {}]]}, "arguments: neither text nor messages"),
        ({"arguments": [["  ", {}]]}, "empty prompt"),
        ({"resps": []}, "resps: no response to request 1"),
        ({"resps": [[7]]}, "resps: a number where text was expected"),
        ({"arguments": [["a", " b"], ["a", " c"]]}, "resps: no log-likelihood"),
        (
            {"arguments": [["a", " b"], ["a", " c"]], "resps": [[["nan"]], [["-1"]]]},
            "a log-likelihood is NaN",
        ),
        ({"exact_match": float("nan")}, "exact_match: nan where a finite number"),
        ({"exact_match": [1, 0]}, "exact_match: no number for each question"),
        (
            {"metrics": ["bleu"]},
            "no metric bleu; name a score that it has, as in --fields score=exact_match",
        ),
        ({"metrics": "bleu"}, "metrics: not a list of names"),
    ],
)
def test_broken_rows_of_lm_eval_are_refused(
    change: Mapping[str, Any], what: str, tmp_path: Path
) -> None:
    first, second = rows_in(SUMS)[:2]
    path = jsonl(tmp_path / "samples.jsonl", [first, {**second, **change}])
    with pytest.raises(BadRow, match=f"samples.jsonl:2: .*{what}"):
        read_answer_log(path)


# Inspect


def test_the_archive_of_inspect_is_read_packed_with_zstd() -> None:
    with zipfile.ZipFile(LOGS / EVAL) as packed:
        assert {info.compress_type for info in packed.infolist()} == {93}
    log = log_of(EVAL)
    assert log.format == "inspect"
    assert said(log) == [("2", "Paris", 1.0), ("3", "white", 1.0), ("sum", "4", 1.0)]
    first = next(iter(log.answers.values()))
    assert first.prompt == (Turn("system", "Be terse."), Turn("user", "Capital of France?"))
    assert sum(log.left_out.values()) == 3  # the second epoch


def test_a_failed_sample_is_counted_and_its_question_stands_in_one_log() -> None:
    after = log_of(JSON)
    assert after.left_out == {"failed": 1}
    pairs = matched(log_of(EVAL), after)
    assert [(b.answer, a.answer) for b, a in pairs.pairs] == [("Paris", "Lyon"), ("4", "4")]
    assert (pairs.before_only, pairs.after_only) == (1, 0)
    turned = matched(after, log_of(EVAL))
    assert (turned.before_only, turned.after_only) == (0, 1)


def test_a_prompt_of_inspect_is_what_the_model_saw() -> None:
    [answer] = log_of("choices.json").answers.values()
    assert "A) apple\nB) iron" in answer.prompt[0].text
    assert (answer.answer, answer.score) == ("ANSWER: B", 0.0)


def test_the_prompt_of_a_longer_exchange_is_its_input(tmp_path: Path) -> None:
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": role} for role in roles]
    path = archive(tmp_path / "long.eval", [asked(messages=messages)])
    assert text(read_answer_log(path)) == ["1 + 1?"]


@pytest.mark.parametrize(
    ("metric", "score"),
    [(None, 1.0), ("includes", 1.0), ("manner.polite", 0.25), ("manner.short", 0.0)],
)
def test_a_scorer_is_chosen_by_name(metric: str | None, score: float) -> None:
    assert said(log_of(EVAL, metric))[0][2] == score


@pytest.mark.parametrize(
    ("value", "score"),
    [
        *(("C", 1.0), ("P", 0.5), ("I", 0.0), ("N", 0.0), ("yes", 1.0), ("False", 0.0)),
        *(("0.75", 0.75), (True, 1.0), (-2, -2.0), (None, None), (float("nan"), None)),
    ],
)
def test_values_of_inspect_become_numbers(
    value: object, score: float | None, tmp_path: Path
) -> None:
    path = archive(tmp_path / "log.eval", [asked(scores={"match": {"value": value}})])
    assert said(read_answer_log(path)) == [("1", "2", score)]


def test_the_first_epoch_counts_wherever_it_stands(tmp_path: Path) -> None:
    samples = [
        asked(answer="late", epoch=2, scores={"match": {"value": "C"}}),
        asked(answer="first", epoch=1, scores={"match": {"value": "I"}}),
    ]
    whole = {"version": 2, "status": "success", "samples": samples}
    (tmp_path / "log.json").write_text(json.dumps(whole))
    for path in (archive(tmp_path / "log.eval", samples), str(tmp_path / "log.json")):
        log = read_answer_log(path)
        assert said(log) == [("1", "first", 0.0)]
        assert [answer.line for answer in log.answers.values()] == [2]
        assert sum(log.left_out.values()) == 1


def test_logs_of_2024_have_the_completion_in_the_message(tmp_path: Path) -> None:
    sample = asked()
    del sample["output"]["completion"]
    assert said(read_answer_log(archive(tmp_path / "old.eval", [sample]))) == [("1", "2", None)]


@pytest.mark.parametrize(
    ("sample", "what"),
    [
        ({"id": 2, "input": "?"}, "missing field: output"),
        (asked(2, "2?", output={}), "output: no completion"),
        (asked(2, "2?", output=[]), "output: not an object"),
        (asked(2, "2?", 7), "output.completion: a number where text was expected"),
        (asked(2, " "), "empty prompt"),
        (asked(2, "2?", scores=[1]), "scores: not an object"),
        (asked(2, "2?", scores={"match": {"value": "X"}}), "score match: 'X', neither C, P, I"),
        (asked(2, "2?", scores={"match": {"value": [1]}}), "score match: a list where a number"),
        (asked(2, [{"role": "user", "content": [{"type": "image"}]}]), "a part of type 'image'"),
        (asked(2), "the same question as at 1"),
        (asked(1, "2?"), "the question 1 stands at 1 with another prompt"),
    ],
)
def test_broken_samples_are_refused(sample: Mapping[str, Any], what: str, tmp_path: Path) -> None:
    whole = {"version": 2, "status": "success", "samples": [asked(), sample]}
    (tmp_path / "log.json").write_text(json.dumps(whole))
    with pytest.raises(BadRow, match=f"log.json:2: .*{what}"):
        read_answer_log(str(tmp_path / "log.json"))


def test_an_unknown_scorer_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        BadRow, match=r"no score match; .* --fields score=includes: includes, manner.polite, "
    ):
        log_of(EVAL, "match")


def test_damaged_logs_of_inspect_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray((LOGS / EVAL).read_bytes())
    with zipfile.ZipFile(LOGS / EVAL) as packed:
        info = packed.getinfo("samples/2_epoch_1.json")
    broken = tmp_path / "broken.eval"
    for start, length in ((info.header_offset + 90, 60), (len(data) // 2, len(data))):
        damaged = data[:start] + bytes(length) + data[start + length :]
        broken.write_bytes(damaged[: len(data)])
        with pytest.raises(BadFile, match=r"broken.eval: cannot be read"):
            read_answer_log(str(broken))
    broken.write_bytes((LOGS / EVAL).read_bytes().replace(info.CRC.to_bytes(4, "little"), b"----"))
    with pytest.raises(BadFile, match="Bad CRC-32"):
        read_answer_log(str(broken))
    with zipfile.ZipFile(broken, "w") as written:
        written.writestr("samples/1_epoch_1.json", b'{"id": "\xff"}')
    with pytest.raises(BadRow, match=r"broken.eval:1: sample 1: invalid UTF-8 at byte 9"):
        read_answer_log(str(broken))
    (tmp_path / "cut.json").write_text((LOGS / JSON).read_text()[:-90])
    with pytest.raises(BadFile, match=r"cut.json:\d+: broken JSON"):
        read_answer_log(str(tmp_path / "cut.json"))
    monkeypatch.setattr(inspect_logs, "SAMPLE_BYTES", 100)
    with pytest.raises(BadFile, match=r"sample 1: .* bytes, and at most 100 are read"):
        log_of(EVAL)


def test_a_log_of_inspect_without_samples_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "header.json"
    path.write_text(json.dumps({"version": 2, "status": "started", "eval": {}}))
    for empty in (str(path), archive(tmp_path / "empty.eval", [])):
        with pytest.raises(EmptyInput, match="no answer in this log"):
            read_answer_log(empty)


# JSON lines

ROWS: list[dict[str, object]] = [
    {"prompt": "Say  hi", "response": "hi", "score": True},
    {"prompt": [{"role": "user", "content": "Go"}], "response": "", "score": 0.5},
    {"prompt": "No score", "response": "so be it"},
]


def test_json_lines_with_prompt_response_and_score(tmp_path: Path) -> None:
    log = read_answer_log(jsonl(tmp_path / "log.jsonl", ROWS))
    assert log.format == "jsonl"
    assert said(log) == [("", "hi", 1.0), ("", "", 0.5), ("", "so be it", None)]
    assert [answer.line for answer in log.answers.values()] == [1, 2, 3]
    array = tmp_path / "log.json"
    array.write_text(json.dumps(ROWS))
    assert said(read_answer_log(str(array))) == said(log)


def test_the_score_may_have_another_name(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "b", "harmless": 0.25, "score": 9}]
    assert said(read_answer_log(jsonl(tmp_path / "log.jsonl", rows), "harmless"))[0][2] == 0.25
    with pytest.raises(BadRow, match=r"log.jsonl:1: missing field: kind"):
        read_answer_log(jsonl(tmp_path / "log.jsonl", rows), "kind")


def test_logs_of_two_tools_match_but_for_white_space(tmp_path: Path) -> None:
    rows = [
        {"id": 2, "prompt": "Only here", "response": "x"},
        {"id": "sum", "prompt": " What is\n2 + 2? ", "response": "5", "score": 0},
    ]
    pairs = matched(log_of(EVAL), read_answer_log(jsonl(tmp_path / "log.jsonl", rows)))
    [(before, after)] = pairs.pairs
    assert (before.answer, after.answer) == ("4", "5")
    assert (pairs.before_only, pairs.after_only) == (2, 1)


def test_the_same_name_with_another_prompt_is_a_mismatch(tmp_path: Path) -> None:
    first, second = rows_in(SUMS)[:2]
    second["arguments"]["gen_args_0"]["arg_0"] = "With another template: 3 + 4"
    after = read_answer_log(jsonl(tmp_path / "after.jsonl", [first, second]))
    with pytest.raises(
        BadRow, match=r"after.jsonl:2: .*question 1 .*sums_before.jsonl:2; log both"
    ):
        matched(log_of(SUMS), after)
    with pytest.raises(BadFile, match=r"no question of .*sums_before"):
        matched(log_of(SUMS), read_answer_log(jsonl(tmp_path / "log.jsonl", ROWS)))


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "broken JSON"),
        ("[]", "an array where an object was expected"),
        (b'{"prompt": "\xff"}', "invalid UTF-8"),
        ({"response": "a"}, "missing field: prompt; add it or remove the row"),
        ({"prompt": "a"}, "missing field: response"),
        ({"prompt": 7, "response": "a"}, "prompt: a number where text or a list of messages"),
        ({"prompt": [], "response": "a"}, "prompt: an empty list"),
        ({"prompt": " \n", "response": "a"}, "empty prompt"),
        ({"prompt": "b", "response": None}, "response: null where text was expected"),
        ({"prompt": "b", "response": "\ud800"}, "response: not valid text: lone surrogate"),
        ({"prompt": "b", "response": "a", "score": "C"}, "score: text where a number"),
        ({"prompt": "b", "response": "a", "score": float("nan")}, "score: nan where a finite"),
        ({"prompt": "b", "response": "a", "score": 10**400}, "score: inf where a finite"),
        ({"prompt": "Say hi", "response": "a"}, "the same question as at 1; leave one"),
    ],
)
@pytest.mark.parametrize("number", [1, 2])
def test_broken_lines_are_refused(
    number: int, line: str | bytes | dict[str, object], what: str, tmp_path: Path
) -> None:
    shown = json.dumps(line) if isinstance(line, dict) else line
    data = shown.encode() if isinstance(shown, str) else shown
    first = json.dumps(ROWS[0]).encode()
    lines = [data, first] if number == 1 else [first, data]
    if "same question" in what:
        number = 2
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(BadRow, match=f"log.jsonl:{number}: .*{what}"):
        read_answer_log(str(path))


def test_files_that_are_no_logs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "results.json").write_text(json.dumps({"results": {}}, indent=2))
    pool = jsonl(tmp_path / "pool.jsonl", [{"text": "a", "source": "b"}])
    with pytest.raises(EmptyInput, match="an empty log"):
        read_answer_log(str(tmp_path / "empty.jsonl"))
    with pytest.raises(BadFile, match="the results of lm-eval without their samples"):
        read_answer_log(str(tmp_path / "results.json"))
    with pytest.raises(BadRow, match=r"pool.jsonl:1: .*its columns: text, source; give a sample"):
        read_answer_log(pool)
    with pytest.raises(BadFile, match="no such file"):
        read_answer_log(str(tmp_path / "gone.jsonl"))
    with pytest.raises(BadFile, match="by its ending"):
        read_answer_log(str(tmp_path / "model.gguf"))


def test_a_log_is_a_file_and_a_model_is_none(tmp_path: Path) -> None:
    for name in ("model.gguf", "rows.csv", "a.json", "a.jsonl.gz", "A.EVAL"):
        (tmp_path / name).touch()
    (tmp_path / "folder.json").mkdir()
    found = {path.name for path in tmp_path.iterdir() if is_answer_log(str(path))}
    assert found == {"a.json", "a.jsonl.gz", "A.EVAL"}
    assert not is_answer_log("google/gemma-3-270m")
    assert not is_answer_log(str(tmp_path / "gone.jsonl"))
