"""The recipes name keys that the other tools document, and columns that selected.jsonl has."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import jsonl
from transformers import AutoTokenizer

import prism_select
from prism_select.data.encoding import Encoder
from prism_select.data.formats import Format, detect_pool, to_example
from prism_select.data.records import Raw
from prism_select.demo.story import MODEL

PAGE = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")
TALK = [("user", "What is the capital of France?"), ("assistant", "It is Paris")]
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": role, "content": text} for role, text in TALK]},
    "conversations": {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}[role], "value": text}
            for role, text in TALK
        ]
    },
    "prompt+completion": {"prompt": TALK[0][1], "completion": TALK[1][1]},
    "instruction+output": {"instruction": TALK[0][1], "input": "", "output": TALK[1][1]},
    "question+answer": {"question": TALK[0][1], "answer": TALK[1][1]},
    "text": {"text": "The capital of France is Paris."},
}
# What each tool documents of an entry, as far as the recipes need it: key → what its value names.
AXOLOTL = {
    "type": "",
    "field": "column",
    "field_messages": "column",
    "message_property_mappings": "keys",
    "field_instruction": "column",
    "field_input": "column",
    "field_output": "column",
    "format": "",
    "no_input_format": "",
}
LLAMA_FACTORY = {
    "formatting": "",
    "columns": "columns",
    "tags": "",
    "messages": "column",
    "prompt": "column",
    "query": "column",
    "response": "column",
    "role_tag": "key",
    "content_tag": "key",
    "user_tag": "role",
    "assistant_tag": "role",
    "system_tag": "",
}
TORCHTUNE = {
    "_component_": "",
    "conversation_column": "column",
    "conversation_style": "",
    "column_map": "columns",
    "input": "column",
    "output": "column",
    "column": "column",
    "train_on_input": "",
}
TOOLS = {"Axolotl": AXOLOTL, "LLaMA-Factory": LLAMA_FACTORY, "torchtune": TORCHTUNE}


def entries(tool: str) -> dict[str, dict[str, Any]]:
    """Of each pool format, the entry that the page gives."""
    part = PAGE.split(f"\n## {tool}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w+]+)` \| `(\{.*?\})`(?: \(.*\))? \|$", part, re.MULTILINE)
    parse = json.loads if tool == "LLaMA-Factory" else yaml.safe_load
    return {name: parse(text) for name, text in rows}


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """selected.jsonl of a pool with a file in every format."""
    folder = tmp_path_factory.mktemp("formats")
    pool = [jsonl(folder / f"{name}.jsonl", [row, row]) for name, row in ROWS.items()]
    target = jsonl(
        folder / "pairs.jsonl",
        [{"prompt": TALK[0][1], "chosen": "It is Paris", "rejected": "It is Lyon"}],
    )
    run = prism_select.select(
        model=str(MODEL), pool=pool, target=target, out=str(folder / "run"), budget="100%"
    )
    return list(run.selected)


def test_rows_of_every_format_come_out_as_they_went_in(chosen: list[dict[str, Any]]) -> None:
    assert [detect_pool(row, {}).name for row in chosen[::2]] == list(ROWS)
    assert all(row in chosen for row in ROWS.values()) and len(chosen) == 2 * len(ROWS)


def leaves(entry: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in entry.items():
        yield key, value
        if isinstance(value, dict) and key != "message_property_mappings":
            yield from leaves(value)


def wrong(tool: str, entry: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """Keys that the tool does not document, and columns, keys of a turn or roles that the row has
    not."""
    turn = (row.get("messages") or row.get("conversations") or [{}])[0]
    known = {"column": row.keys(), "key": turn.keys(), "role": {"user", "assistant"}}
    found = []
    for key, value in leaves(entry):
        kind = TOOLS[tool].get(key, "not documented")
        named = {*value.values()} if kind == "keys" else {value} if kind in known else set()
        if kind == "not documented" or named - {*known.get(kind, turn.keys())}:
            found.append(key)
    return found


@pytest.mark.parametrize("tool", TOOLS)
def test_a_recipe_names_documented_keys_and_columns_that_are_there(
    tool: str, chosen: list[dict[str, Any]]
) -> None:
    assert entries(tool).keys() == ROWS.keys()
    by_format = {detect_pool(row, {}).name: row for row in chosen}
    assert not {
        name: bad
        for name, entry in entries(tool).items()
        if (bad := wrong(tool, entry, by_format[name]))
    }


def test_what_is_wrong_in_a_recipe_is_noticed() -> None:
    row = ROWS["conversations"]
    assert wrong("LLaMA-Factory", {"columns": {"messages": "messages"}}, row) == ["messages"]
    assert wrong("Axolotl", {"message_property_mappings": {"role": "role"}}, row) == [
        "message_property_mappings"
    ]
    assert wrong("torchtune", {"source_column": "conversations"}, row) == ["source_column"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("format", ["prompt+completion", "messages"])
def test_trl_trains_on_the_tokens_that_were_scored(format: str, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    row = ROWS[format]
    if format == "prompt+completion":
        names: dict[str, Any] = {}
        exec(
            re.search(r"^def as_messages.*?^    return .*?$", PAGE, re.MULTILINE | re.DOTALL)[0],  # type: ignore[index]
            names,
        )
        row = names["as_messages"](row)
    settings = SFTConfig(
        output_dir=str(tmp_path),
        report_to="none",
        use_cpu=True,
        bf16=False,
        assistant_only_loss=format == "messages",
    )
    trainer = SFTTrainer(model=str(MODEL), args=settings, train_dataset=Dataset.from_list([row]))
    labels = trainer.data_collator([trainer.train_dataset[0]])["labels"][0].tolist()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    raw = Raw("pool.jsonl", 1, "", ROWS[format])
    scored = Encoder(tokenizer, "auto", 256).encode(to_example(raw, Format(format), {}))
    trained = [token for token in labels if token != -100]
    wanted = [
        token for token, counts in zip(scored.tokens, scored.supervised, strict=True) if counts
    ]
    assert trained[: len(wanted)] == wanted
    rest = tokenizer.decode(trained[len(wanted) :])  # the template writes it after an end of turn
    assert rest == ("\n" if format == "prompt+completion" else "")
