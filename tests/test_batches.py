"""Conversations to tokens: what is supervised, what is added once, what is refused; and batches
that cover each row."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import CHATML, WORDS, build_network, build_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from prism_select.core.engines import ENGINES
from prism_select.data.batches import collate, plan_batches
from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.records import Example, Role, Turn
from prism_select.models.causal_lm import CausalLM
from prism_select.run.errors import BadModel, BadRow, MissingChatTemplate

BOS, EOS, END = "<s>", "</s>", "<|im_end|>"
PLAIN, CHAT = build_tokenizer(), build_tokenizer(CHATML)


def example(*turns: tuple[Role, str], prompt_turns: int = 0) -> Example:
    return Example(
        tuple(Turn(role, text) for role, text in turns),
        "id",
        "source",
        "pool.jsonl",
        7,
        prompt_turns,
    )


def prompted(prompt: str, answer: str) -> Example:
    return example(("user", prompt), ("assistant", answer), prompt_turns=1)


def encoder(tokenizer: Any = PLAIN, template: str = "auto", max_length: int = 512) -> Encoder:
    return Encoder(tokenizer, template, max_length)


def text_of(tokenizer: Any, encoded: Encoded) -> str:
    return str(tokenizer.decode(encoded.tokens, clean_up_tokenization_spaces=False))


def supervised_texts(tokenizer: Any, encoded: Encoded) -> list[str]:
    """The runs of supervised tokens, as text."""
    runs: list[list[int]] = []
    for index, (token, inside) in enumerate(zip(encoded.tokens, encoded.supervised, strict=True)):
        if inside and not (index and encoded.supervised[index - 1]):
            runs.append([])
        if inside:
            runs[-1].append(token)
    return [str(tokenizer.decode(run, clean_up_tokenization_spaces=False)) for run in runs]


# ---------------------------------------------------------------- plain


def test_plain_text_is_bos_prompt_line_break_answer_eos_and_the_answer_with_eos_is_supervised() -> (
    None
):
    got = encoder().encode(prompted("What is 2 + 2?", "It is 4."))
    assert text_of(PLAIN, got) == f"{BOS}What is 2 + 2?\nIt is 4.{EOS}"
    assert supervised_texts(PLAIN, got) == [f"It is 4.{EOS}"]
    assert got.targets == sum(got.supervised) and not got.truncated


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("Q: why?\n", "So.", "Q: why?\nSo."),
        ("Q: why? A:", " So.", "Q: why? A: So."),
        ("", "So.", "So."),
        ("Q", "\nSo.", "Q\nSo."),
    ],
)
def test_plain_text_gets_no_line_break_where_white_space_or_nothing_stands(
    prompt: str, answer: str, text: str
) -> None:
    assert text_of(PLAIN, encoder().encode(prompted(prompt, answer))) == f"{BOS}{text}{EOS}"


def test_special_tokens_that_the_text_carries_are_not_doubled() -> None:
    bare, marked = prompted("Hi", "Yes."), prompted(f"{BOS}Hi", f"Yes.{EOS}")
    assert encoder().encode(marked) == encoder().encode(bare)


def test_a_tokenizer_without_bos_gets_none() -> None:
    tokenizer = build_tokenizer(bos=False)
    assert text_of(tokenizer, encoder(tokenizer).encode(prompted("Hi", "Yes."))) == f"Hi\nYes.{EOS}"


def test_a_bare_text_is_supervised_from_end_to_end_but_for_the_first_token() -> None:
    for tokenizer in (PLAIN, CHAT):
        got = encoder(tokenizer).encode(example(("text", "Water boils.")))
        end = EOS if tokenizer is PLAIN else END
        assert text_of(tokenizer, got) == f"{BOS}Water boils.{end}"
        assert supervised_texts(tokenizer, got) == [f"Water boils.{end}"]
    no_bos = build_tokenizer(bos=False)
    got = encoder(no_bos).encode(example(("text", "Water boils.")))
    assert all(got.supervised) and got.targets == len(got.tokens) - 1


def test_plain_asked_for_joins_the_turns_and_supervises_every_answer() -> None:
    turns = example(
        ("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Four.")
    )
    got = encoder(template="plain").encode(turns)
    assert text_of(PLAIN, got) == f"{BOS}One?\nTwo.{EOS}Three?\nFour.{EOS}"
    assert supervised_texts(PLAIN, got) == [f"Two.{EOS}", f"Four.{EOS}"]


def test_turns_of_the_prompt_are_context_even_where_an_assistant_said_them() -> None:
    turns = example(
        ("user", "One?"),
        ("assistant", "Two."),
        ("user", "Three?"),
        ("assistant", "Four."),
        prompt_turns=3,
    )
    assert supervised_texts(PLAIN, encoder(template="plain").encode(turns)) == [f"Four.{EOS}"]
    assert supervised_texts(CHAT, encoder(CHAT).encode(turns)) == [f"Four.{END}"]


@pytest.mark.parametrize(
    "turns",
    [
        example(("user", "One?"), ("assistant", "Two.")),
        example(("system", "Be brief."), ("user", "One?"), ("assistant", "Two."), prompt_turns=2),
    ],
)
def test_a_conversation_needs_a_chat_template_or_a_decision(turns: Example) -> None:
    with pytest.raises(
        MissingChatTemplate, match=r"pool\.jsonl:7: .*no chat template.*--template plain"
    ):
        encoder().encode(turns)
    with pytest.raises(
        MissingChatTemplate, match="--template chat: the tokenizer has no chat template"
    ):
        encoder(template="chat")
    assert encoder(template="plain").encode(turns).targets


# ---------------------------------------------------------------- chat


def test_chat_is_the_template_of_the_tokenizer_and_supervises_answers_with_their_end_of_turn() -> (
    None
):
    turns = example(
        ("system", "Be brief."),
        ("user", "One?"),
        ("assistant", "Two."),
        ("user", "And?"),
        ("assistant", "No."),
    )
    got = encoder(CHAT).encode(turns)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns.turns]
    assert list(got.tokens) == CHAT.apply_chat_template(messages, return_dict=False)
    assert supervised_texts(CHAT, got) == [f"Two.{END}", f"No.{END}"]


def test_a_prompt_and_an_answer_are_a_conversation_of_two_turns() -> None:
    got = encoder(CHAT).encode(prompted("One?", "Two."))
    assert (
        text_of(CHAT, got)
        == "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>\n"
    )
    assert supervised_texts(CHAT, got) == [f"Two.{END}"]
    assert (
        text_of(CHAT, encoder(CHAT, template="plain").encode(prompted("One?", "Two.")))
        == f"{BOS}One?\nTwo.{END}"
    )


SHORT = [
    "a",
    "s",
    "assistant",
    "e",
    "im_end",
    "|",
    "<",
    "end|>",
    "user",
    "i",
    "1",
    "n\n<",
    "<|im",
    "stant\n",
]


@pytest.mark.parametrize("answer", SHORT)
def test_an_answer_that_also_occurs_in_the_template_is_found_where_it_stands(answer: str) -> None:
    turns = example(
        ("user", answer), ("assistant", answer), ("user", answer), ("assistant", answer)
    )
    assert supervised_texts(CHAT, encoder(CHAT).encode(turns)) == [f"{answer}{END}"] * 2


@pytest.mark.parametrize("answer", SHORT)
def test_an_assistant_that_speaks_first_is_supervised_without_its_header(answer: str) -> None:
    turns = example(("assistant", answer), ("user", "Why?"), ("assistant", "So."))
    assert supervised_texts(CHAT, encoder(CHAT).encode(turns)) == [f"{answer}{END}", f"So.{END}"]


def test_a_conversation_may_end_with_the_user_and_hold_an_empty_answer() -> None:
    turns = example(
        ("user", "One?"),
        ("assistant", ""),
        ("user", "Two?"),
        ("assistant", "Yes"),
        ("user", "Thanks"),
    )
    assert supervised_texts(CHAT, encoder(CHAT).encode(turns)) == [END, f"Yes{END}"]


BOS_TEMPLATE = "{{ bos_token }}" + CHATML
TRIMMING = CHATML.replace("message['content']", "message['content'] | trim")
SPACED = (  # no generation prompt, and a space before each answer
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
THINKING = (  # as reasoning models have it: the last answer alone gets an empty thought
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '(think)\\n\\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

NO_PROMPT = CHATML.partition("{% if add_generation_prompt %}")[0]
# the prompt begins a thought, full answers have none, and one that an answer brings is dropped
THOUGHTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{{ m['content'].split('</think>')[-1] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
LAST_THOUGHT = THOUGHTS.replace(  # the last answer alone has what the prompt begins
    "{{ m['content']",
    "{{ ('<think>\\n\\n</think>' if loop.last and m['role'] == 'assistant' else '') + m['content']",
)
TWO_ENDS = (  # the last turn ends in another token
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{{ '</s>' if loop.last and not add_generation_prompt else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
COLON = (  # the prompt ends in a space, which the first word of an answer takes
    "{% for m in messages %}"
    "{{ ('A: ' if m['role'] == 'assistant' else 'Q: ') + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)


def test_a_template_that_writes_bos_does_not_get_a_second_one() -> None:
    tokenizer = build_tokenizer(BOS_TEMPLATE)
    got = encoder(tokenizer).encode(prompted("One?", "Two."))
    assert (
        text_of(tokenizer, got).startswith(f"{BOS}<|im_start|>") and list(got.tokens).count(0) == 1
    )
    first = encoder(tokenizer).encode(
        example(("assistant", "s"), ("user", "Why?"), ("assistant", "So."))
    )
    assert supervised_texts(tokenizer, first) == [f"s{END}", f"So.{END}"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TRIMMING, [f"Two.{END}", f"a{END}"]),
        (SPACED, [f" Two.  {END}", f"  a {END}"]),
        (THINKING, [f"Two. {END}", f"(think)\n\n a{END}"]),
        (NO_PROMPT, [f"Two. {END}", f" a{END}"]),
        (THOUGHTS, [f"Two. {END}", f" a{END}"]),
        (LAST_THOUGHT, [f"Two. {END}", f"\n</think> a{END}"]),
        (TWO_ENDS, [f"Two. {END}", f" a{EOS}"]),
        (COLON, [f"Two. {END}", f" a{END}"]),
    ],
    ids=[
        "trims",
        "spaces",
        "thinks",
        "no prompt",
        "thought in the prompt",
        "last thought",
        "two ends",
        "colon",
    ],
)
def test_templates_of_other_habits_are_followed(template: str, expected: list[str]) -> None:
    tokenizer = build_tokenizer(template)
    turns = example(("user", "One?"), ("assistant", "Two. "), ("user", "a?"), ("assistant", " a"))
    assert supervised_texts(tokenizer, encoder(tokenizer).encode(turns)) == expected


def test_an_answer_whose_thought_a_template_drops_is_supervised_without_it() -> None:
    tokenizer = build_tokenizer(THOUGHTS)
    turns = example(
        ("user", "One?"), ("assistant", "<think>hm</think> So."), ("user", "a?"), ("assistant", "b")
    )
    assert supervised_texts(tokenizer, encoder(tokenizer).encode(turns)) == [
        f" So.{END}",
        f"b{END}",
    ]
    first = example(("assistant", "<b>"), ("user", "Why?"), ("assistant", "So."))
    tokenizer = build_tokenizer(LAST_THOUGHT)
    assert supervised_texts(tokenizer, encoder(tokenizer).encode(first)) == [
        f"<b>{END}",
        f"\n</think>So.{END}",
    ]


def test_a_word_that_takes_the_space_of_its_prompt_is_supervised() -> None:
    tokenizer = build_tokenizer(COLON)
    word = next(
        w for w in WORDS.split() if len(tokenizer(f" {w}", add_special_tokens=False).input_ids) == 1
    )
    got = encoder(tokenizer).encode(prompted("One?", word))
    assert supervised_texts(tokenizer, got) == [f" {word}{END}"] and got.targets == 2


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + CHATML,
        "{% if messages[0]['role'] == 'system' %}{{ 1 + 'x' }}{% endif %}" + CHATML,
        "{% if messages[0]['role'] == 'system' %}{{ messages[0].nothing.at_all }}{% endif %}"
        + CHATML,
    ],
    ids=["raises", "adds", "misses"],
)
def test_a_conversation_that_the_template_refuses_is_a_bad_row(template: str) -> None:
    tokenizer = build_tokenizer(template)
    refused = example(("system", "Be brief."), ("user", "One?"), ("assistant", "Two."))
    with pytest.raises(
        BadRow, match=r"pool\.jsonl:7: the chat template refuses it: .*--template plain"
    ):
        encoder(tokenizer).encode(refused)
    assert supervised_texts(tokenizer, encoder(tokenizer).encode(prompted("One?", "Two."))) == [
        f"Two.{END}"
    ]


def test_a_template_that_changes_an_answer_beyond_recognition_makes_a_bad_row() -> None:
    tokenizer = build_tokenizer(
        CHATML.replace("message['content']", "(message['content'] | upper)")
    )
    with pytest.raises(BadRow, match="changes turn 2 beyond recognition"):
        encoder(tokenizer).encode(prompted("One?", "two"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab <|>\n_éß漢🙂imsertuang", max_size=12), min_size=2, max_size=6))
def test_any_conversation_supervises_its_answers_and_nothing_else(texts: list[str]) -> None:
    roles: Sequence[Role] = ["user", "assistant"]
    turns = example(*((roles[index % 2], text.strip()) for index, text in enumerate(texts)))
    got = encoder(CHAT).encode(turns)
    assert supervised_texts(CHAT, got) == [
        f"{turn.text}{END}" for turn in turns.turns if turn.role == "assistant"
    ]


# ---------------------------------------------------------------- length


def test_a_long_row_loses_its_end_and_says_so() -> None:
    full = encoder().encode(prompted("What?", "word " * 40))
    cut = encoder(max_length=20).encode(prompted("What?", "word " * 40))
    assert cut.truncated and not full.truncated
    assert list(cut.tokens) == list(full.tokens[:20]) and list(cut.supervised) == list(
        full.supervised[:20]
    )
    assert encoder(max_length=len(full.tokens)).encode(prompted("What?", "word " * 40)) == full


def test_a_row_without_a_supervised_token_is_bad() -> None:
    with pytest.raises(
        BadRow, match=r"pool\.jsonl:7: nothing supervised is left of \d+ tokens after cutting to 8"
    ):
        encoder(max_length=8).encode(prompted("word " * 40, "Yes."))
    with pytest.raises(BadRow, match="nothing is supervised"):
        encoder(template="plain").encode(example(("user", "One?")))


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast, chat_template = False, None

    with pytest.raises(BadModel, match="Slow is a slow tokenizer"):
        encoder(Slow())


# ---------------------------------------------------------------- batches


@given(st.lists(st.integers(1, 300), max_size=80), st.integers(2, 500))
def test_batches_cover_each_row_once_and_keep_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[row] for row in batch)
        assert len(batch) * longest <= budget or len(batch) == 1
    longest_first = [lengths[batch[0]] for batch in batches]
    assert longest_first == sorted(longest_first, reverse=True)


def rows() -> list[Encoded]:
    answers = [
        "Paris",
        "It is five, thank you very much.",
        "no",
        "water boils at hundred degrees " * 3,
    ]
    return [
        encoder().encode(prompted("Tell me" + "!" * index, answer))
        for index, answer in enumerate(answers)
    ]


def test_padding_stands_on_the_side_asked_for_and_is_not_real() -> None:
    for side in ("left", "right"):
        batch = collate(rows(), side=side)
        for index, row in enumerate(rows()):
            assert batch.tokens[index][batch.real[index]].tolist() == list(row.tokens)
            assert batch.supervised[index][batch.real[index]].tolist() == list(row.supervised)
            assert not batch.supervised[index][~batch.real[index]].any()
            assert bool(batch.real[index, 0 if side == "right" else -1])
        assert batch.counts.tolist() == [row.targets for row in rows()]


@pytest.mark.parametrize("engine", ["reverse", "forward"])
def test_scores_do_not_depend_on_the_side_of_the_padding_or_on_the_company(engine: str) -> None:
    model = CausalLM(build_network(len(PLAIN)))
    weights = dict(model.network.named_parameters())
    draw = torch.Generator().manual_seed(1)
    direction = {
        name: torch.randn(weight.shape, generator=draw) for name, weight in weights.items()
    }
    scores = ENGINES[engine](model, weights, [direction])
    right, left = (scores(collate(rows(), side=side)).values[:, 0] for side in ("right", "left"))
    alone = torch.cat([scores(collate([row])).values[:, 0] for row in rows()])
    for other in (left, right):
        assert float((other - alone).norm() / alone.norm()) < 1e-5


def test_a_tokenizer_read_from_a_folder_encodes_the_same(
    plain_model: Path, chat_model: Path
) -> None:
    for folder, tokenizer in ((plain_model, PLAIN), (chat_model, CHAT)):
        loaded = transformers.AutoTokenizer.from_pretrained(str(folder))
        assert encoder(loaded).encode(prompted("One?", "Two.")) == encoder(tokenizer).encode(
            prompted("One?", "Two.")
        )
