"""What is supervised, on the chat templates of common model families: the answers as rendered and
their end of turn, by transformers and the documented form alone."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import CHATML, build_network, build_tokenizer, jsonl, prism
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import FAMILIES, MISTRAL_V3, Family, Message, call, tokenizer_of
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.encoding_notes import encoding_notes
from prism_select.data.formats import Format, to_example, to_pairs
from prism_select.data.messages import unread_keys
from prism_select.data.records import Example, Raw
from prism_select.directions.pair_encoding import encode_sides
from prism_select.run.errors import BadRow

TOKENIZERS = {name: tokenizer_of(family) for name, family in FAMILIES.items()}
ENCODERS = {name: Encoder(tokenizer, "auto", 4096) for name, tokenizer in TOKENIZERS.items()}


def row(messages: Sequence[Message], **fields: object) -> Example:
    raw = Raw("pool.jsonl", 7, "", {"messages": [dict(m) for m in messages], **fields})
    return to_example(raw, Format("messages"), {})


def asked(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    """A question, an answer, and so on."""
    roles = ["user", "assistant"] * len(texts)
    opening = [] if system is None else [{"role": "system", "content": system}]
    spoken = zip(roles, texts, strict=False)
    return [*opening, *({"role": role, "content": text} for role, text in spoken)]


def supervised(tokenizer: Any, coded: Encoded) -> list[str]:
    """The runs of supervised tokens, as texts."""
    texts, before = list[str](), False
    for token, inside in zip(coded.tokens, coded.supervised, strict=True):
        if inside:
            texts += [] if before else [""]
            texts[-1] += tokenizer.decode([token])
        before = inside
    return texts


def rendered(name: str, messages: Sequence[Message], **arguments: Any) -> str:
    text = TOKENIZERS[name].apply_chat_template(messages, tokenize=False, **arguments)
    return str(text)


def expected(name: str, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Tokens, and which of them have a character that the model writes."""
    pieces = FAMILIES[name].pieces(messages)
    own = [model for text, model in pieces for _ in text]
    tokenizer = TOKENIZERS[name]
    coded = tokenizer(
        "".join(text for text, _ in pieces),
        add_special_tokens=False,
        return_offsets_mapping=True,
    )
    return list(coded.input_ids), [any(own[a:b]) for a, b in coded.offset_mapping]


# ---------------------------------------------------------------- all families


@pytest.mark.parametrize("name", FAMILIES)
def test_a_template_renders_its_documented_form(name: str) -> None:
    system = "Be brief." if FAMILIES[name].system else None
    messages = asked("One?", "Two.", " Three? ", "Four.\n", system=system)
    assert "".join(text for text, _ in FAMILIES[name].pieces(messages)) == rendered(name, messages)


WORDS = [
    *("", " ", "\n", "\n\n", "a", "ok go", "é🙂", "Prism␟0␟zQ", "assistant", "user", "system"),
    *("<think>", "</think>", "[/INST]", "### Response:\n", "<|im_end|>", "</s>", "{{ 1 + 1 }}"),
]


@pytest.mark.parametrize("proof", ["by shape", "by row"])
@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_supervised_characters_are_those_of_the_answers_and_their_end_of_turn(
    name: str, proof: str, data: st.DataObject
) -> None:
    family = FAMILIES[name]
    own = [*family.tokens, family.bos, family.eos]
    texts = st.lists(st.sampled_from([*WORDS, *own]), max_size=4).map("".join)
    exchanges = data.draw(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
    system = data.draw(st.none() | texts) if family.system else None
    messages = asked(*(text for exchange in exchanges for text in exchange), system=system)
    if data.draw(st.booleans()):
        messages.append({"role": "user", "content": data.draw(texts)})
    turns = row([*messages, {"role": "assistant", "content": "x"}]).turns[:-1]
    encoder = ENCODERS[name]
    if proof == "by row":
        encoder = Encoder(TOKENIZERS[name], "auto", 4096)
        encoder._chat._shape = lambda roles: None  # type: ignore[assignment]
    coded = encoder.encode(Example(turns, "id", "source", "pool.jsonl", 7))
    tokens, supervised = expected(name, messages)
    assert list(coded.tokens) == tokens
    assert list(coded.supervised) == supervised
    assert tokens == TOKENIZERS[name].apply_chat_template(messages)["input_ids"]


def test_one_rendering_is_enough_for_rows_of_a_known_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, count = tokenizer_of(FAMILIES["Llama 3"]), [0]
    encoder, render = Encoder(tokenizer, "auto", 4096), tokenizer.apply_chat_template
    encoder.encode(row(asked("One?", "Two.", "Three?", "Four.")))

    def counted(*arguments: Any, **named: Any) -> Any:
        count[0] += 1
        return render(*arguments, **named)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counted)
    for number in range(10):
        encoder.encode(row(asked(f"One {number}?", " Two.", "Three?", f"{number}\n\n")))
    assert count == [10]


@pytest.mark.parametrize("name", ["Llama 3, early copies", "Mistral v3", "Qwen 3", "Phi-3"])
def test_ends_of_turn_may_be_left_out(name: str) -> None:
    encoder = Encoder(TOKENIZERS[name], "auto", 4096, skip_end=True)
    coded = encoder.encode(row(asked("One?", "Two.", "Three?", "Four.")))
    answers = supervised(TOKENIZERS[name], coded)
    assert [answer.rpartition("</think>")[2].strip() for answer in answers] == ["Two.", "Four."]


def test_the_page_says_what_counts() -> None:
    page = (Path(__file__).parents[1] / "docs" / "input.md").read_text()
    lines = page.partition("<!-- templates -->\n```\n")[2].partition("\n```")[0].splitlines()
    told = {line[:29].strip(): line[29:].split()[0] for line in lines}
    shown = {}
    for name, encoder in ENCODERS.items():
        coded = encoder.encode(row(asked("One?", "Two.", "Three?", "Four.")))
        answer = supervised(TOKENIZERS[name], coded)[-1]
        shown[name] = answer.replace(" ", "␣").replace("\n", "⏎")
    assert told == shown


TRL = ["cohere", "cohere2", "gemma", "gemma3", "llama3", "phi3", "phi3_5", "smolvlm"]
TRL += ["lfm2_v2", "qwen3_instruct_2507", "qwen3_vl", "idefics3"]


@pytest.mark.parametrize("name", TRL)
def test_marks_that_trl_ships_say_the_same(name: str) -> None:
    """Its templates for training enclose the same characters, and at most white space behind."""
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    plain, marked = (folder / f"{name}{ending}.jinja" for ending in ("", "_training"))
    if not marked.exists():
        pytest.skip(f"this version of TRL has no {marked.name}")
    tokens = sorted(set(re.findall(r"<\|[^|'\"<> ]+\|>|<[a-z]+_of_[a-z]+>", marked.read_text())))
    messages = asked("One?", "Two.", "Three?", "Four.")
    found = []
    for source in (plain, marked):
        family = Family(source.read_text(), lambda _: [], "<bos>", "</s>", tuple(tokens))
        coded = Encoder(tokenizer_of(family), "auto", 4096).encode(row(messages))
        found.append(supervised(tokenizer_of(family), coded))
    ours, theirs = found
    assert [answer.rstrip() for answer in theirs] == ours


# ---------------------------------------------------------------- unlike any family

HEADER = "{{- '<|im_start|>' + m.role + '\\n' }}"
LOOP = "{%- for m in messages %}" + HEADER
ANSWERED = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"
ODD = {
    "no closing, and a header behind everything": (
        LOOP + "{{- m.content + '\\n' }}{% endfor %}{{- '<|im_start|>assistant\\n' }}",
        ["Two.\n", "Four.\n"],
    ),
    "no closing at all": (
        LOOP + "{{- m.content }}{% endfor %}" + ANSWERED,
        ["Two.", "Four."],
    ),
    "the last answer is left open": (
        LOOP
        + "{{- m.content }}{% if not loop.last %}{{- '<|im_end|>' }}{% endif %}{% endfor %}"
        + ANSWERED,
        ["Two.<|im_end|>", "Four."],
    ),
    "the closing at the end is another": (
        LOOP
        + "{{- m.content + ('</s>' if loop.last and not add_generation_prompt else '<|im_end|>') }}"
        + "{%- endfor %}"
        + ANSWERED,
        ["Two.<|im_end|>", "Four.</s>"],
    ),
    "closed by words": (
        LOOP + "{{- m.content + ' END\\n' }}{% endfor %}" + ANSWERED,
        ["Two. END", "Four. END"],
    ),
    "an end of text behind the last turn": (
        LOOP + "{{- m.content + '<|im_end|>\\n' }}{% endfor %}{{- '</s>' }}",
        ["Two.<|im_end|>", "Four.<|im_end|>"],
    ),
    "texts as JSON": (
        LOOP + "{{- m.content | tojson + '<|im_end|>' }}{% endfor %}" + ANSWERED,
        ['"Two."<|im_end|>', '"Four."<|im_end|>'],
    ),
    "marks within a macro, where transformers counts wrong": (
        "{%- macro say(m) %}{% generation %}{{- m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% endmacro %}" + LOOP + "{%- if m.role == 'assistant' %}{{- say(m) }}"
        "{%- else %}{{- m.content + '<|im_end|>' }}{% endif %}{% endfor %}" + ANSWERED,
        ["Two.<|im_end|>", "Four.<|im_end|>"],
    ),
    "marks around the last answer alone": (
        LOOP + "{%- if loop.last %}{% generation %}{{- m.content }}{% endgeneration %}"
        "{%- else %}{{- m.content }}{% endif %}{{- '<|im_end|>' }}{% endfor %}",
        ["Four."],
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_templates_of_other_habits_are_followed(name: str) -> None:
    template, answers = ODD[name]
    tokenizer = build_tokenizer(template)
    messages = asked("One?", "Two.", "Three?", "Four.")
    coded = Encoder(tokenizer, "auto", 4096).encode(row(messages))
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    assert list(coded.tokens) == ids
    assert supervised(tokenizer, coded) == answers


def test_marks_are_those_of_transformers() -> None:
    tokenizer = TOKENIZERS["ChatML with marks"]
    messages = asked("One?", "Two.", "Three?", "Four.", system="Be brief.")
    masks = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
    coded = ENCODERS["ChatML with marks"].encode(row(messages))
    assert list(coded.supervised) == list(map(bool, masks["assistant_masks"]))
    messages[2]["weight"] = 0
    coded = ENCODERS["ChatML with marks"].encode(row(messages))
    assert supervised(tokenizer, coded) == ["Four.<|im_end|>"]
    bare = Encoder(tokenizer, "auto", 4096, skip_end=True).encode(row(messages))
    assert supervised(tokenizer, bare) == ["Four."]


def test_a_system_text_that_a_template_leaves_out_is_told() -> None:
    template = MISTRAL_V3.replace(  # as published: only where the user has the last word
        "{%- set last = seen.users == asked | length %}", "{%- set last = loop.last %}"
    )
    family = FAMILIES["Mistral v3"]
    encoder = Encoder(tokenizer_of(Family(template, family.pieces, "<s>", "</s>")), "auto", 4096)
    examples = [row(asked("One?", "Two.", system=text)) for text in ("Be brief.", "Be kind.")]
    rows = [encoder.encode(example) for example in examples]
    assert encoding_notes(encoder, examples, rows, "pool") == [
        "pool: what the system says is left out by the chat template in 2 of 2 rows"
    ]


@pytest.mark.parametrize("filter", ["upper", "replace('o', '0')", "length", "truncate(5)"])
def test_an_answer_that_a_template_changes_is_refused_or_told(filter: str) -> None:
    template = CHATML.replace("message['content']", f"(message['content'] | {filter} | string)")
    encoder = Encoder(build_tokenizer(template), "auto", 4096)
    example = row(asked("One?", "Two words, no more."))
    try:
        coded = encoder.encode(example)
    except BadRow as bad:
        assert "changes turn 2 beyond recognition" in bad.what
    else:
        assert (
            "pool: answers are changed by the chat template in 1 of 1 rows: scored is what it shows"
        ) in encoding_notes(encoder, [example], [coded], "pool")


# ---------------------------------------------------------------- masks

MASKS: list[Mapping[str, object]] = [
    {"weight": 0},
    {"weight": 0.0},
    {"train": False},
    {"training": False},
    {"loss": False},
    {"step_loss_mask": 0},
    {"weight": 1, "train": False},
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["ChatML", "ChatML with marks", "Mistral v3", "Gemma 3"])
def test_an_answer_that_says_so_is_not_supervised(name: str, mask: Mapping[str, object]) -> None:
    messages = asked("One?", "Two.", "Three?", "Four.")
    tokenizer, encode = TOKENIZERS[name], ENCODERS[name].encode
    both = supervised(tokenizer, encode(row(messages)))
    for masked, remaining in ((1, both[1:]), (3, both[:1])):
        changed = [{**m, **(mask if i == masked else {})} for i, m in enumerate(messages)]
        assert supervised(tokenizer, encode(row(changed))) == remaining


def test_masks_are_read_from_other_formats_and_for_plain_text() -> None:
    spoken = [
        {"from": "human", "value": "One?"},
        {"from": "gpt", "value": "Two.", "train": False},
        {"from": "human", "value": "Three?", "train": False},
        {"from": "gpt", "value": "Four.", "weight": 1, "train": True},
    ]
    raw = Raw("pool.jsonl", 7, "", {"conversations": spoken})
    example = to_example(raw, Format("conversations"), {})
    tokenizer = build_tokenizer()
    coded = Encoder(tokenizer, "plain", 4096).encode(example)
    assert supervised(tokenizer, coded) == ["Four.</s>"]
    assert unread_keys(spoken) == []


@pytest.mark.parametrize("mask", [{"weight": 0.5}, {"weight": 2}, {"train": "no"}, {"weight": []}])
def test_a_mask_between_is_refused(mask: Mapping[str, object]) -> None:
    with pytest.raises(BadRow, match=r"messages\[1\]: (weight|train) .* where 0, 1, true or false"):
        row([{"role": "user", "content": "One?"}, {**asked("", "Two.")[1], **mask}])


def test_a_row_none_of_whose_answers_counts_is_refused() -> None:
    with pytest.raises(BadRow, match="nothing is supervised: no answer in messages counts"):
        row([{"role": "user", "content": "One?"}, {**asked("", "Two.")[1], "weight": 0}])


def test_other_keys_of_messages_are_named() -> None:
    messages = [
        {"role": "user", "content": "One?", "train": True, "timestamp": 3, "name": "Ann"},
        {"role": "assistant", "content": "Two.", "train_detail": [], "weight": 1, "mask": None},
    ]
    assert unread_keys(messages) == ["train of user", "timestamp", "train_detail"]


# ---------------------------------------------------------------- thoughts


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_a_thought_beside_the_answer_is_rendered_and_supervised(key: str) -> None:
    messages = [*asked("One?"), {"role": "assistant", "content": "Two.", key: "hm"}]
    if key == "reasoning":  # transformers reads this name itself
        assert "hm" in rendered("Qwen 3", messages)
    coded = ENCODERS["Qwen 3"].encode(row(messages))
    assert list(coded.tokens) == TOKENIZERS["Qwen 3"].apply_chat_template(messages)["input_ids"]
    thought = "<think>\nhm\n</think>\n\n"
    assert supervised(TOKENIZERS["Qwen 3"], coded) == [f"{thought}Two.<|im_end|>"]
    assert (coded.losses, coded.thoughts) == ((), 1)


def test_thoughts_that_a_template_drops_are_counted() -> None:
    within = [row(asked("One?", f"<think>\nhm {i}\n</think>\n\nTwo.")) for i in range(8)]
    for name in ("DeepSeek R1", "Qwen 3"):
        rows = [ENCODERS[name].encode(example) for example in within]
        notes = encoding_notes(ENCODERS[name], within, rows, "pool")
        dropped = "pool: thoughts dropped by the chat template in 8 of 8 answers that have one: "
        assert notes == ([f"{dropped}they are not scored"] if name == "DeepSeek R1" else [])
    beside = row([*asked("One?"), {"role": "assistant", "content": "2", "reasoning": "hm"}])
    assert ENCODERS["ChatML"].encode(beside).losses == ("thought",)
    inner = row([*asked("One?", "<think>hm</think>Two.", "Three?", "<think>hm</think>Four.")])
    coded = ENCODERS["Qwen 3"].encode(inner)
    assert (coded.losses, coded.thoughts) == (("thought",), 2)
    assert supervised(TOKENIZERS["Qwen 3"], coded) == [
        "Two.<|im_end|>",
        "<think>\nhm\n</think>\n\nFour.<|im_end|>",
    ]


def test_a_thought_may_leave_the_empty_one_of_its_prompt() -> None:
    template = FAMILIES["Qwen 3"].jinja.replace(  # as Qwen 3.5 without thinking
        "enable_thinking is defined and not enable_thinking", "true"
    )
    family = FAMILIES["Qwen 3"]
    tokenizer = tokenizer_of(Family(template, family.pieces, "", "<|im_end|>", family.tokens))
    encoder = Encoder(tokenizer, "auto", 4096)
    prompt = tokenizer.apply_chat_template(
        asked("One?"), tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<think>\n\n</think>\n\n")
    plain, thought = (
        supervised(tokenizer, encoder.encode(row(asked("One?", answer))))
        for answer in ("Two.", "<think>\nhm\n</think>\n\nTwo.")
    )
    assert plain == ["Two.<|im_end|>"]
    assert thought == ["hm\n</think>\n\nTwo.<|im_end|>"]


def test_pairs_that_differ_in_what_a_template_drops_say_so() -> None:
    answers = {
        side: [{"role": "assistant", "content": "Two.", "reasoning_content": thought}]
        for side, thought in (("chosen", "one and one"), ("rejected", "who cares"))
    }
    raw = Raw("pairs.jsonl", 1, "", {"prompt": "One?", **answers})
    pairs = to_pairs(raw, Format("prompt+chosen+rejected"), {})
    chosen, rejected = encode_sides(pairs, ENCODERS["Qwen 3"])
    texts = [supervised(TOKENIZERS["Qwen 3"], side[0]) for side in (chosen, rejected)]
    assert texts == [
        [f"<think>\n{thought}\n</think>\n\nTwo.<|im_end|>"]
        for thought in ("one and one", "who cares")
    ]
    with pytest.raises(BadRow, match="same tokens: the template leaves out their thought; give"):
        encode_sides(pairs, ENCODERS["ChatML"])


# ---------------------------------------------------------------- tools

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
TOOL_TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "content": None, "tool_calls": [call("weather", city="Rome")]},
    {"role": "tool", "content": '{"sky": "blue"}', "tool_call_id": "c1", "name": "weather"},
    {"role": "assistant", "content": "Blue."},
]
TWICE = [*TOOL_TALK, {"role": "user", "content": "Oslo?"}, *TOOL_TALK[1:3]]
TWICE += [{"role": "assistant", "content": "Blue again."}]
CALLED = {
    "Qwen 2.5": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    "<|im_end|>",
    "Qwen 3": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    "<|im_end|>",
    "Llama 3.1": '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>',
    "Mistral v3": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}, "id": "c1"}]'
    "</s>",
}
SAID = {
    "Qwen 2.5": "{}<|im_end|>",
    "Qwen 3": "{}<|im_end|>",
    "Llama 3.1": "{}<|eot_id|>",
    "Mistral v3": " {}</s>",
}


def as_objects(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as transformers documents them: arguments as objects, no content of null."""
    made = []
    for message in messages:
        calls = [
            {**made, "function": {**made["function"], "arguments": {"city": "Rome"}}}
            for made in message.get("tool_calls", [])
        ]
        content = {"content": message["content"] or ""}
        made.append({**message, **content, **({"tool_calls": calls} if calls else {})})
    return made


@pytest.mark.parametrize("messages", [TOOL_TALK, TWICE], ids=["once", "twice"])
@pytest.mark.parametrize("name", CALLED)
def test_tool_calls_are_rendered_and_supervised(name: str, messages: Sequence[Message]) -> None:
    coded = ENCODERS[name].encode(row(messages, tools=[TOOL]))
    tokens = TOKENIZERS[name].apply_chat_template(as_objects(messages), tools=[TOOL])["input_ids"]
    assert list(coded.tokens) == tokens
    answers = [
        CALLED[name] if message.get("tool_calls") else SAID[name].format(message["content"])
        for message in messages
        if message["role"] == "assistant"
    ]
    answers[-1] = "<think>\n\n</think>\n\n" * (name == "Qwen 3") + answers[-1]
    assert supervised(TOKENIZERS[name], coded) == answers


def test_arguments_have_the_form_that_a_template_can_write() -> None:
    added, printed = (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
        "{%- for c in m.tool_calls or [] %}{{- c.function.name JOIN c.function.arguments }}"
        "{% endfor %}{{- m.content + '<|im_end|>' }}{% endfor %}".replace("JOIN", join)
        for join in ("+", "~")
    )
    for template in (added, printed):  # an object cannot be added; ~ writes it as Python does
        tokenizer = build_tokenizer(template)
        coded = Encoder(tokenizer, "auto", 4096).encode(row(TOOL_TALK))
        called = 'weather{"city": "Rome"}<|im_end|>'
        assert supervised(tokenizer, coded) == [called, "Blue.<|im_end|>"]


@pytest.mark.parametrize("name", ["ChatML", "Llama 3", "Gemma 3"])
def test_a_tool_call_that_a_template_does_not_show_is_refused(name: str) -> None:
    with pytest.raises(BadRow, match=r"the chat template (does not show the tool call|refuses)"):
        ENCODERS[name].encode(row(TOOL_TALK))
    with pytest.raises(BadRow, match="turn 2 is a tool call, which is not text"):
        Encoder(TOKENIZERS[name], "plain", 4096).encode(row(TOOL_TALK))


def test_older_forms_of_tool_calls_are_read() -> None:
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    old = {"role": "assistant", "content": None, "function_call": function}
    spoken = {
        "from": "function_call",
        "value": json.dumps({**function, "arguments": {"city": "Rome"}}),
    }
    texts = set()
    for message in (old, spoken, {"role": "assistant", "tool_calls": [function]}):
        coded = ENCODERS["Qwen 2.5"].encode(row([*TOOL_TALK[:1], message]))
        texts.update(supervised(TOKENIZERS["Qwen 2.5"], coded))
    assert texts == {CALLED["Qwen 2.5"]}


@pytest.mark.parametrize(
    "calls",
    [
        [{"id": 1}],
        [{"function": {"name": "f", "arguments": "not JSON"}}],
        [{"function": {"arguments": {}}}],
        "f()",
        [{"function": {"name": "f", "arguments": "[1]"}}],
    ],
)
def test_a_broken_tool_call_is_refused(calls: object) -> None:
    with pytest.raises(BadRow, match=r"tool.call"):
        row([*asked("Rome?"), {"role": "assistant", "content": "", "tool_calls": calls}])


def test_names_that_a_template_shows_are_shown_and_others_told() -> None:
    messages = [{"role": "user", "name": "Ann", "content": "One?"}, asked("", "Two.")[1]]
    named = build_tokenizer(
        CHATML.replace("+ '\\n' +", "+ ' ' + message.name | default('') + '\\n' +")
    )
    coded = Encoder(named, "auto", 4096).encode(row(messages))
    assert "user Ann\nOne?" in named.decode(coded.tokens) and coded.losses == ()
    assert ENCODERS["ChatML"].encode(row(messages)).losses == ("name",)


# ---------------------------------------------------------------- plain text


def spaced_tokenizer(kind: str) -> Any:
    """Of the kind of Llama 2, which puts a space before a text, with bytes for what it lacks."""
    letters = sorted({*map(chr, range(33, 127)), "\n", "▁"})
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("▁", "A"), ("▁", "N"), ("▁", "a"), ("▁", "▁")]
    vocabulary = {text: index for index, text in enumerate([*texts, *map("".join, merges)])}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    if kind == "prepend":
        core.normalizer = normalizers.Sequence(  # type: ignore[assignment, unused-ignore]
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace("▁", kind, split=False)  # type: ignore[assignment, unused-ignore]
    core.decoder = decoders.Sequence(  # type: ignore[assignment, unused-ignore]
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


PLAIN = [
    ("Name a fruit.", "An apple.", "Name a fruit.\nAn apple.</s>"),
    ("def f():\n", "    return 1", "def f():\n    return 1</s>"),
    ("Q: why? A:", " So.", "Q: why? A: So.</s>"),
    ("Q: why? A: ", "Never\n  mind.", "Q: why? A: Never\n  mind.</s>"),
    ("", "An apple.", "An apple.</s>"),
    ("é🙂", "🙂", "é🙂\n🙂</s>"),
]


@pytest.mark.parametrize("kind", ["prepend", "first", "always", "never", "bytes"])
@pytest.mark.parametrize(("prompt", "answer", "text"), PLAIN)
def test_plain_text_has_the_tokens_of_the_joined_text(
    kind: str, prompt: str, answer: str, text: str
) -> None:
    tokenizer = build_tokenizer() if kind == "bytes" else spaced_tokenizer(kind)
    raw = Raw("pool.jsonl", 7, "", {"prompt": prompt, "completion": answer})
    example = to_example(raw, Format("prompt+completion"), {})
    encoder = Encoder(tokenizer, "plain", 4096)
    coded = encoder.encode(example)
    own = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    prefix = [tokenizer.bos_token_id] if kind == "bytes" else []
    assert list(coded.tokens) == prefix + own.input_ids
    start = len(text) - len(answer) - len("</s>")
    assert list(coded.supervised) == [False] * len(prefix) + [
        end > start for _, end in own.offset_mapping
    ]
    assert encoder.misread(example) is None
    assert tokenizer.decode(own.input_ids) == text


def test_a_tokenizer_that_does_not_give_a_text_back_is_told() -> None:
    example = row(asked("One?", "Two.", "Three?", "Four."))
    spaced = Encoder(spaced_tokenizer("prepend"), "plain", 4096)  # a space behind each special one
    assert encoding_notes(spaced, [example], [spaced.encode(example)], "pool") == [
        "pool: the tokenizer changes texts: 'ne?\\nTwo.</s>Three?\\nFour.' reads back as "
        "'ne?\\nTwo.</s> Three?\\nFour'"
    ]
    lower = spaced_tokenizer("first")
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert "'Two.'" not in str(Encoder(lower, "plain", 4096).misread(example))
    assert "reads back as 'one?\\ntwo." in str(Encoder(lower, "plain", 4096).misread(example))
    assert ENCODERS["Llama 2"].misread(example) is None


def test_white_space_without_offsets_is_part_of_its_text() -> None:
    tokenizer = build_tokenizer()
    trimming = build_tokenizer()
    from tokenizers import processors

    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    for text in ("So.\n\nOr  not.", "\n\nYes \n", " a"):
        raw = Raw("pool.jsonl", 7, "", {"prompt": "Why?\n", "completion": text})
        example = to_example(raw, Format("prompt+completion"), {})
        plain, trimmed = (Encoder(t, "plain", 4096).encode(example) for t in (tokenizer, trimming))
        assert list(trimmed.tokens) == list(plain.tokens)[1:]  # without BOS
        assert list(trimmed.supervised) == list(plain.supervised)[1:]


# ---------------------------------------------------------------- repeated prompts


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "answers"),
    [
        ("Name a fruit.", "Name a fruit. An apple.", "Name a fruit. A car.",
         (" An apple.", " A car.")),
        ("Human: Hi\n\nAssistant:", "Human: Hi\n\nAssistant: Yes", "Human: Hi\n\nAssistant: No",
         (" Yes", " No")),
        (" Say it\n", "Say it\nyes", " Say it\nno", ("\nyes", "\nno")),
        ("Name a fruit.", "Name a fruit. An apple.", "A car.",
         ("Name a fruit. An apple.", "A car.")),
        ("Name a fruit", "Name a fruitcake", "Name a fruit. x",
         ("Name a fruitcake", "Name a fruit. x")),
        ("A", "A cat", "A dog", ("A cat", "A dog")),
        ("Say hi now", "Say hi now", "Say hi now!", ("Say hi now", "Say hi now!")),
    ],
)  # fmt: skip
def test_a_prompt_that_both_answers_repeat_is_cut_off(
    prompt: str, chosen: str, rejected: str, answers: tuple[str, str]
) -> None:
    raw = Raw("pairs.jsonl", 1, "", {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    (pair,) = to_pairs(raw, Format("prompt+chosen+rejected"), {})
    assert (pair.chosen.turns[1].text, pair.rejected.turns[1].text) == answers
    assert pair.repeated == ((chosen, rejected) != answers)


# ---------------------------------------------------------------- scores


def save(folder: Path, tokenizer: Any) -> Path:
    tokenizer.save_pretrained(folder)
    build_network(len(tokenizer)).save_pretrained(folder)
    return folder


def loglik(folder: Path, tokens: Sequence[int], supervised: Sequence[bool]) -> float:
    """By transformers alone."""
    network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logs = network(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    picked = [float(logs[i - 1, tokens[i]]) for i in range(1, len(tokens)) if supervised[i]]
    return sum(picked)


def pairs_file(folder: Path) -> str:
    pairs = [("One?", "Two.", "Nine."), ("Sky?", "Blue.", "Red."), ("Cat?", "Yes.", "No.")]
    return jsonl(
        folder / "pairs.jsonl",
        [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs],
    )


SCORED: list[tuple[str, list[dict[str, Any]]]] = [
    ("Llama 3, early copies", asked("One?", "Two.")),
    ("Mistral v3", asked("One?", "Two.", "Three?", "Four.", system="Be brief.")),
    ("Qwen 3", [*asked("One?"), {**asked("", "Two.")[1], "reasoning_content": "hm"}]),
    ("Gemma 3", [*asked("One?"), {**asked("", "Two.")[1], "weight": 0}, *asked("Three?", "Four.")]),
]


@pytest.mark.parametrize(("name", "messages"), SCORED)
def test_log_likelihoods_are_those_of_transformers(
    tmp_path: Path, name: str, messages: list[dict[str, Any]]
) -> None:
    folder = save(tmp_path / "model", TOKENIZERS[name])
    out = tmp_path / "run"
    pool = jsonl(tmp_path / "pool.jsonl", [{"messages": messages}] * 2)
    outcome = prism(
        *("score", "--model", folder, "--pool", pool, "--target", pairs_file(tmp_path)),
        *("--out", out, "--engine", "reverse", "--curvature", "flat"),
    )
    assert outcome.code == 0, outcome.err
    tokens, supervised = expected(name, messages)
    if messages[1].get("weight") == 0:
        first = supervised.index(True)
        last = next(i for i in range(first, len(supervised)) if not supervised[i])
        supervised = [inside and i >= last for i, inside in enumerate(supervised)]
    scores = pq.read_table(out / "scores.parquet").to_pylist()[0]
    assert scores["tokens"] == sum(supervised[1:]) and scores["length"] == len(tokens)
    assert scores["loglik"] == pytest.approx(loglik(folder, tokens, supervised), abs=1e-3)


def test_what_templates_drop_is_told_by_a_run(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", TOKENIZERS["DeepSeek R1"])
    draw, out = random.Random(0), tmp_path / "run"
    rows = [
        {"messages": [{**m, "seen": 1} for m in asked("One?", f"<think>hm</think>{draw.random()}")]}
        for _ in range(8)
    ]
    outcome = prism(
        *("score", "--model", folder, "--pool", jsonl(tmp_path / "pool.jsonl", rows)),
        *("--target", pairs_file(tmp_path), "--out", out, "--curvature", "flat"),
    )
    line = (
        "pool: thoughts dropped by the chat template in 8 of 8 answers that have one: they are "
        "not scored"
    )
    assert outcome.code == 0 and line in " ".join(outcome.out.split())
    assert line in json.loads((out / "manifest.json").read_text())["warnings"]
    assert "not read: messages.seen" in " ".join(outcome.out.split())


def test_a_base_model_scores_the_joined_text(tmp_path: Path) -> None:
    tokenizer = spaced_tokenizer("prepend")
    folder = save(tmp_path / "model", tokenizer)
    pool = jsonl(tmp_path / "pool.jsonl", [{"prompt": p, "completion": a} for p, a, _ in PLAIN])
    out = tmp_path / "run"
    outcome = prism(
        *("score", "--model", folder, "--pool", pool, "--target", pairs_file(tmp_path)),
        *("--out", out, "--curvature", "flat", "--template", "plain"),
    )
    assert outcome.code == 0, outcome.err
    scores = pq.read_table(out / "scores.parquet").to_pylist()
    for line, (_, answer, text) in zip(scores, PLAIN, strict=True):
        own = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        start = len(text) - len(answer) - len("</s>")
        supervised = [end > start for _, end in own.offset_mapping]
        assert line["loglik"] == pytest.approx(loglik(folder, own.input_ids, supervised), abs=1e-3)
