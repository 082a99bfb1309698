"""Columns beside the text of a row: read, carried along or named, and never passed over."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import jsonl, prism, save_model

import prism_select
from prism_select.data.columns import UnreadColumns, column_warnings
from prism_select.data.files import read_rows
from prism_select.data.formats import detect_pool, detect_target, to_example, to_pairs
from prism_select.data.records import Example, Raw
from prism_select.data.targets import read_targets
from prism_select.run.errors import BadRow

# As the templates of Qwen 2.5 show tools: in the system turn, as JSON.
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% endif %}"
    "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if not (tools and loop.first and message.role == 'system') %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAIRS = [
    {"prompt": "Where is Rome?", "chosen": "In Italy, thank you.", "rejected": "no way"},
    {"prompt": "Say Paris", "chosen": "Please, Paris.", "rejected": "Go away."},
    {"prompt": "Water?", "chosen": "It boils at a hundred degrees.", "rejected": "At 7."},
]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}},
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "the time"}}
FRUIT = {"role": "user", "content": "Name a fruit."}
APPLE = {"role": "assistant", "content": "An apple."}
TWO = {"role": "user", "content": "And two?"}
PEARS = {"role": "assistant", "content": "Two pears."}
POLITE = {"role": "system", "content": "Be polite."}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("columns"), WITH_TOOLS)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    return jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", PAIRS)


def loglik(model: Path, messages: Sequence[Any], tools: Any, answers: Sequence[str]) -> float:
    """Of the tokens of these answers and their ends of turn, by transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModelForCausalLM.from_pretrained(model)
    text = str(tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False))
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = []
    for answer in answers:
        turn = f"<|im_start|>assistant\n{answer}<|im_end|>"
        assert text.count(turn) == 1
        end = text.index(turn) + len(turn)
        spans.append((end - len(answer) - len("<|im_end|>"), end))
    tokens = torch.tensor([coded.input_ids])
    with torch.no_grad():
        logits = network(tokens).logits[0].double().log_softmax(-1)
    return math.fsum(
        float(logits[index - 1, token])
        for index, (token, (start, end)) in enumerate(
            zip(coded.input_ids, coded.offset_mapping, strict=True)
        )
        if any(start < b and end > a for a, b in spans)
    )


# ---------------------------------------------------------------- system, history, tools

ALPACA = {"instruction": "And two?", "output": "Two pears."}
HISTORY = [["Name a fruit.", "An apple."]]
ROWS: dict[str, tuple[dict[str, Any], list[dict[str, str]], Any, list[str]]] = {
    "alpaca with a system text": (
        {**ALPACA, "input": "", "system": "Be polite."},
        [POLITE, TWO, PEARS],
        None,
        ["Two pears."],
    ),
    "alpaca with a history, whose answers are learned too": (
        {**ALPACA, "system": "Be polite.", "history": HISTORY},
        [POLITE, FRUIT, APPLE, TWO, PEARS],
        None,
        ["An apple.", "Two pears."],
    ),
    "a history as JSON text": (
        {"prompt": "And two?", "completion": "Two pears.", "history": json.dumps(HISTORY)},
        [FRUIT, APPLE, TWO, PEARS],
        None,
        ["An apple.", "Two pears."],
    ),
    "a history of messages": (
        {"question": "And two?", "answer": "Two pears.", "history": [FRUIT, APPLE]},
        [FRUIT, APPLE, TWO, PEARS],
        None,
        ["An apple.", "Two pears."],
    ),
    "a history before a prompt with an answer, which stays context": (
        {
            "prompt": [{**FRUIT, "content": "Hi."}, {**APPLE, "content": "Hello."}, TWO],
            "completion": "Two pears.",
            "history": HISTORY,
        },
        [
            FRUIT,
            APPLE,
            {"role": "user", "content": "Hi."},
            {"role": "assistant", "content": "Hello."},
            TWO,
            PEARS,
        ],
        None,
        ["An apple.", "Two pears."],
    ),
    "a system message that the conversation has already": (
        {"messages": [POLITE, FRUIT, APPLE], "system": "Be polite. "},
        [POLITE, FRUIT, APPLE],
        None,
        ["An apple."],
    ),
    "a system message before a history": (
        {"messages": [POLITE, TWO, PEARS], "history": HISTORY},
        [POLITE, FRUIT, APPLE, TWO, PEARS],
        None,
        ["An apple.", "Two pears."],
    ),
    "sharegpt with tools as JSON text": (
        {
            "conversations": [
                {"from": "human", "value": "Name a fruit."},
                {"from": "gpt", "value": "An apple."},
            ],
            "system": "Be polite.",
            "tools": json.dumps([WEATHER, CLOCK]),
        },
        [POLITE, FRUIT, APPLE],
        [WEATHER, CLOCK],
        ["An apple."],
    ),
    "tools as OpenAI lists them": (
        {"messages": [FRUIT, APPLE], "tools": [WEATHER]},
        [FRUIT, APPLE],
        [WEATHER],
        ["An apple."],
    ),
    "one tool, and one in JSON": (
        {"prompt": "Name a fruit.", "completion": "An apple.", "tools": [json.dumps(CLOCK)]},
        [FRUIT, APPLE],
        [CLOCK],
        ["An apple."],
    ),
    "nothing in any of them": (
        {**ALPACA, "system": " ", "history": "[]", "tools": "", "images": [], "videos": None},
        [TWO, PEARS],
        None,
        ["Two pears."],
    ),
    "the wrong one of a choice": (
        {"question": "And two?", "choices": ["Two pears.", "No."], "answer": 0, "system": "Hm."},
        [{"role": "system", "content": "Hm."}, TWO, PEARS],
        None,
        ["Two pears."],
    ),
}


@pytest.fixture(scope="module")
def scored(model: Path, pairs: str, tmp_path_factory: pytest.TempPathFactory) -> prism_select.Run:
    folder = tmp_path_factory.mktemp("scored")
    files = [jsonl(folder / f"{i}.jsonl", [row]) for i, (row, *_) in enumerate(ROWS.values())]
    return prism_select.score(str(model), files, pairs, out=folder / "run", layers="late")


@pytest.mark.parametrize("name", ROWS)
def test_system_history_and_tools_reach_the_model_as_a_template_renders_them(
    name: str, model: Path, scored: prism_select.Run
) -> None:
    _, messages, tools, answers = ROWS[name]
    by_hand = loglik(model, messages, tools, answers)
    found = scored.scores["loglik"][list(ROWS).index(name)].as_py()
    assert found == pytest.approx(by_hand, rel=1e-5)


def test_tools_of_a_table_go_without_the_nulls_that_it_fills_in(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(
        [{"prompt": "Name a fruit.", "completion": "An apple.", "tools": [WEATHER, CLOCK]}]
    )
    assert "description" in str(table["tools"][0].as_py()[0])  # null, and not of this tool
    pq.write_table(table, tmp_path / "pool.parquet")
    (raw,) = read_rows(str(tmp_path / "pool.parquet"))
    assert raw.fields is not None
    assert list(to_example(raw, detect_pool(raw.fields, {}), {}).tools) == [WEATHER, CLOCK]
    tool = {"name": "f", "default": None}
    row = Raw("pool.jsonl", 1, "", {"prompt": "a", "completion": "b", "tools": [tool]})
    assert to_example(row, detect_pool(row.fields or {}, {}), {}).tools == (tool,)


def roles(example: Example) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in example.turns]


@pytest.mark.parametrize(
    ("asked", "fields"),
    [
        ("And two?", {"prompt": "And two?"}),
        ("And\n\ntwo?", {"instruction": "And", "input": "two?"}),
        ("And two?", {"conversations": [{"from": "human", "value": "And two?"}]}),
    ],
)
def test_pairs_have_them_as_context_alone(asked: str, fields: dict[str, Any]) -> None:
    row = {
        **fields,
        "chosen": "Two pears.",
        "rejected": "No.",
        "system": "Be polite.",
        "history": HISTORY,
        "tools": [CLOCK],
    }
    (pair,) = to_pairs(Raw("pairs.jsonl", 1, "", row), detect_target(row, {}), {})
    prompt = [("system", "Be polite."), ("user", "Name a fruit."), ("assistant", "An apple.")]
    for side, answer in ((pair.chosen, "Two pears."), (pair.rejected, "No.")):
        assert roles(side) == [*prompt, ("user", asked), ("assistant", answer)]
        assert side.prompt_turns == 4 and side.tools == (CLOCK,)


def test_a_direction_of_pairs_with_a_system_text_is_that_of_its_messages(
    model: Path, tmp_path: Path
) -> None:
    pool = jsonl(tmp_path / "pool.jsonl", [{"prompt": "Name a fruit.", "completion": "An apple."}])
    columns = [{**pair, "system": "Be polite.", "tools": json.dumps([CLOCK])} for pair in PAIRS]
    turns = [
        {**pair, "prompt": [POLITE, {"role": "user", "content": pair["prompt"]}], "tools": [CLOCK]}
        for pair in PAIRS
    ]
    runs = [
        prism_select.score(str(model), pool, rows, out=tmp_path / name, layers="late")
        for name, rows in (("columns", columns), ("turns", turns), ("bare", PAIRS))
    ]
    first, second, third = (run.pairs["loglik_chosen"].to_pylist() for run in runs)
    assert first == second != third
    by_hand = loglik(
        model,
        [POLITE, {"role": "user", "content": "Say Paris"}, {**APPLE, "content": "Please, Paris."}],
        [CLOCK],
        ["Please, Paris."],
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    count = len(tokenizer("Please, Paris.<|im_end|>", add_special_tokens=False).input_ids)
    assert first[1] == pytest.approx(by_hand / count, rel=1e-5)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "two system texts": (
        {"messages": [POLITE, FRUIT, APPLE], "system": "Be rude."},
        "system: the conversation begins with another system message",
    ),
    "a number as system": ({**ALPACA, "system": 7}, "system: a number where text or"),
    "a system of another role": ({**ALPACA, "system": FRUIT}, "system: a message of another role"),
    "history that is no list": ({**ALPACA, "history": "{}x"}, "history: text that is no JSON"),
    "history of texts": ({**ALPACA, "history": ["a"]}, "history[0]: not a question and its answer"),
    "history of numbers": ({**ALPACA, "history": [["a", 1]]}, "history[0]: a number where text"),
    "history without an answer": (
        {**ALPACA, "history": [["a", ""]]},
        "history[0]: an empty answer",
    ),
    "history by name": ({**ALPACA, "history": 3}, "history: a number where a list of pairs"),
    "tools that are no JSON": ({**ALPACA, "tools": "weather"}, "tools: text that is no JSON"),
    "tools that are numbers": ({**ALPACA, "tools": [1]}, "tools: a number where a list of tools"),
    "tools that are no text": ({**ALPACA, "tools": [{"a": "\ud800"}]}, "tools: what cannot be"),
    "images": ({**ALPACA, "images": ["a.png", "b.png"]}, "images: 2 that a model of text cannot"),
    "a video": ({"text": "Look.", "videos": "a.mp4"}, "videos: 1 that a model of text cannot see"),
    "audio": ({"messages": [FRUIT, APPLE], "audios": [b""]}, "audios: 1 that a model of text"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_honoured_makes_its_row_bad(name: str) -> None:
    fields, what = BAD[name]
    with pytest.raises(BadRow) as caught:
        to_example(Raw("pool.jsonl", 3, "", fields), detect_pool(fields, {}), {})
    assert caught.value.what.startswith(what)


def test_a_row_with_images_is_quarantined_with_its_reason(
    model: Path, pairs: str, tmp_path: Path
) -> None:
    rows = [{**ALPACA, "images": []}, {**ALPACA, "images": ["a.png"]}]
    run = prism_select.score(
        str(model), jsonl(tmp_path / "pool.jsonl", rows), pairs, out=tmp_path / "run", max_bad="50%"
    )
    (bad,) = run.quarantine
    assert (bad["line"], bad["reason"]) == (2, "images: 1 that a model of text cannot see")


# ---------------------------------------------------------------- columns that nothing reads


def unread(rows: Sequence[dict[str, Any]], **mapping: Sequence[str]) -> list[str]:
    columns = UnreadColumns(mapping, detect_pool)
    for line, row in enumerate(rows, start=1):
        columns.add(Raw("pool.jsonl", line, "", row))
    return columns.by_file["pool.jsonl"]


QA = {"prompt": "Name a fruit.", "completion": "An apple."}


def test_every_column_of_any_row_is_read_or_named_once() -> None:
    assert unread([QA]) == []
    assert unread([{**QA, "id": 1, "source": "a", "system": "b", "history": [], "tools": []}]) == []
    assert unread([{**QA, "b": 1, "a": 2}, {**QA, "c": 0, "a": 3}]) == ["b", "a", "c"]
    assert unread([{**QA, "a": None, "b": math.nan, "c": "", "d": []}]) == []
    assert unread([{**QA, "a": None}, {**QA, "a": False}]) == ["a"]
    assert unread([{**QA, "input": "x", "answerKey": 1}]) == ["input", "answerKey"]
    assert unread([{"instruction": "a", "output": "b", "input": "c"}]) == []
    assert unread([{"question": "a", "choices": ["b", "c"], "answerKey": 1}]) == []
    assert unread([{"text": "a", "prompt": "b", "system": "c"}]) == ["prompt", "system"]
    assert unread([{"messages": [FRUIT, APPLE], **QA}]) == ["prompt", "completion"]


def test_mapped_columns_are_read_and_those_that_they_hide_are_not() -> None:
    row = {"ask": "a", "reply": {"text": "b", "score": 1}, "prompt": "c"}
    mapping = {"prompt": ["ask"], "completion": ["reply.text"]}
    assert unread([row], **mapping) == ["prompt"]
    assert unread([QA], **mapping) == []


def test_keys_without_end_do_not_fill_the_memory() -> None:
    rows = [{**QA, f"key {index}": 1} for index in range(3000)]
    assert 900 < len(unread(rows)) < 1100


def test_columns_that_trainers_heed_are_warnings() -> None:
    columns = {"a.jsonl": ["topic", "weight"], "b.jsonl": ["weight"], "c.jsonl": ["system_prompt"]}
    system, weight = column_warnings(columns)
    assert weight.startswith("the column weight of a.jsonl and 1 other file is not read")
    assert "--fields system=system_prompt" in system and "c.jsonl" in system


def test_each_file_is_told_once_what_of_it_is_not_read(model: Path, tmp_path: Path) -> None:
    pool = [
        jsonl(tmp_path / "a.jsonl", [{**QA, "topic": "x"}, {**QA, "weight": 2, "topic": "y"}]),
        jsonl(tmp_path / "b.jsonl", [{**QA, "system": "Be polite."}]),
        jsonl(tmp_path / "c.jsonl", [{"text": "Water boils.", "system": "Be polite."}]),
    ]
    rows = [{**pair, "how": "by hand", "mask": [1]} for pair in PAIRS]
    pairs = jsonl(tmp_path / "pairs.jsonl", rows)
    words = [word for file in pool for word in ("--pool", file)]
    done = prism(
        "select", "--model", model, *words, "--target", pairs, "--out", tmp_path / "run",
        "--layers", "late", "--budget", "2",
    )  # fmt: skip
    assert done.code == 0, done.err
    said = (done.out + done.err).replace("\n", " ")
    assert said.count("a.jsonl: prompt+completion; not read: topic, weight (kept in the output)")
    assert said.count("not read: topic") == 1
    assert (
        said.count("b.jsonl: prompt+completion ") == 1 and "b.jsonl: prompt+completion;" not in said
    )
    assert said.count("c.jsonl: text; not read: system (kept in the output)") == 1
    assert said.count("pairs.jsonl: prompt+chosen+rejected; not read: how, mask") == 1
    warnings = json.loads((tmp_path / "run/manifest.json").read_text())["warnings"]
    heeded = [line for line in warnings if "is not read" in line]
    assert [line.split(" of ")[0] for line in heeded] == [
        "the column system", "the column weight", "the column mask"
    ]  # fmt: skip
    kept = [json.loads(line) for line in (tmp_path / "run/selected.jsonl").read_text().splitlines()]
    everything = [json.loads(line) for file in pool for line in Path(file).read_text().splitlines()]
    assert len(kept) == 2 and all(row in everything for row in kept)


def test_a_label_that_repair_reads_is_not_called_unread(
    model: Path, pairs: str, tmp_path: Path
) -> None:
    rows = [{**QA, "is_bad": index % 2 == 0} for index in range(4)]
    done = prism(
        "repair", "--model", model, "--pool", jsonl(tmp_path / "a.jsonl", rows), "--target", pairs,
        "--out", tmp_path / "run", "--layers", "late", "--remove", "1", "--label-field", "is_bad",
    )  # fmt: skip
    assert done.code == 0 and "not read" not in done.out + done.err


def test_pairs_keep_tools_and_say_what_is_not_read(model: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "2 + 2?", "completion": "It is 4.", "tools": [CLOCK], "system": "Be polite."},
        {"prompt": "3 + 3?", "completion": "It is 6.", "topic": "sums"},
    ]
    file, out = jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "pairs.jsonl"
    done = prism("pairs", file, "--how", "numbers", "--out", out)
    assert done.code == 0, done.err
    said = " ".join((done.out + done.err).split())
    assert said.count("rows.jsonl: prompt+completion; not read: topic (not in the pairs)") == 1
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert first["tools"] == [CLOCK] and "tools" not in second
    assert first["prompt"] == [POLITE, {"role": "user", "content": "2 + 2?"}]
    (raw, _) = read_rows(str(out))
    (pair,) = to_pairs(raw, detect_target(raw.fields or {}, {}), {})
    assert pair.chosen.tools == (CLOCK,) and pair.chosen.turns[0].role == "system"
    weak = [{**QA, "weak": "A pear?"}, {**QA, "prompt": "And?", "weak": "Hm."}]
    done = prism(
        "pairs",
        jsonl(tmp_path / "weak.jsonl", weak),
        "--how",
        "weak",
        "--out",
        tmp_path / "w.jsonl",
    )
    assert done.code == 0 and "not read" not in done.out + done.err


def test_a_check_of_pairs_warns_of_columns_too(model: Path, tmp_path: Path) -> None:
    rows = [{**pair, "system_prompt": "Be polite."} for pair in PAIRS]
    found = prism_select.check_pairs(rows, str(model), layers="late")
    assert "the column system_prompt of memory:pairs is not read" in found["warnings"][0]


def test_a_target_may_be_named_by_a_whole_number_of_any_kind(tmp_path: Path) -> None:
    rows = [{**pair, "topic": topic} for pair, topic in zip(PAIRS, (1.0, 1, "two"), strict=True)]
    file = jsonl(tmp_path / "pairs.jsonl", rows)
    assert {name: len(found) for name, found in read_targets([file], {}, "topic").items()} == {
        "1": 2,
        "two": 1,
    }
    gap = jsonl(tmp_path / "gap.jsonl", [json.dumps({**PAIRS[0], "topic": math.nan})])
    with pytest.raises(BadRow, match="no text in the column topic"):
        read_targets([gap], {}, "topic")
