"""The demo world and its bundled model: fair, repeatable, small."""

import json
from collections import Counter

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from prism_select.demo.train import MODEL_DIR, encode
from prism_select.demo.world import DEMO_SKILL, FACTS, SKILLS, corpus, mixture, pairs, pool

CONVERSATION = [
    {"role": "user", "content": "What is 7 + 5?"},
    {"role": "assistant", "content": "It is 12"},
]


def test_a_seed_fixes_everything_and_another_seed_changes_it() -> None:
    for make in (pool, mixture, corpus):
        assert make(200, 3) == make(200, 3)
        assert make(200, 3) != make(200, 4)
    assert pairs(DEMO_SKILL, 40, 3) == pairs(DEMO_SKILL, 40, 3)
    assert pairs(DEMO_SKILL, 40, 3) != pairs(DEMO_SKILL, 40, 4)


def test_there_are_eight_skills_with_enough_facts_and_each_subject_once() -> None:
    assert len(SKILLS) == 8
    assert DEMO_SKILL in SKILLS
    for facts in FACTS.values():
        assert len(facts) >= 20
        assert len({(fact.kind, fact.subject) for fact in facts}) == len(facts)


@pytest.mark.parametrize("skill", SKILLS)
def test_a_rejected_answer_is_the_mistake_in_the_words_of_the_chosen_one(skill: str) -> None:
    assert all(fact.right != fact.wrong for fact in FACTS[skill])
    for pair in pairs(skill, 60, 0):
        chosen, rejected = pair["chosen"], pair["rejected"]
        known = [
            fact
            for fact in FACTS[skill]
            if chosen.endswith(fact.right) and rejected.endswith(fact.wrong)
        ]
        assert any(
            chosen.removesuffix(fact.right) == rejected.removesuffix(fact.wrong) for fact in known
        )


def test_the_sums_are_right_and_their_mistakes_one_too_high() -> None:
    for fact in FACTS["arithmetic"]:
        first, sign, second = fact.subject.split()
        assert (
            int(fact.right)
            == int(first) + int(second) * (1 if sign == "+" else -1)
            == int(fact.wrong) - 1
        )


def test_pairs_and_rows_never_share_a_prompt() -> None:
    asked = {
        pair["prompt"] for skill in SKILLS for seed in range(2) for pair in pairs(skill, 100, seed)
    }
    for seed in range(2):
        assert asked.isdisjoint(row["prompt"] for row in pool(2000, seed))
        assert asked.isdisjoint(row["prompt"] for row in mixture(1200, seed))


def test_the_pool_holds_each_skill_alike_and_no_prompt_twice() -> None:
    rows = pool(2000, 0)
    assert set(Counter(row["source"] for row in rows).values()) == {250}
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == 2000
    assert max(Counter(row["source"] for row in pool(1001, 0)).values()) == 126


@pytest.mark.parametrize(
    ("count", "wrong", "expected"), [(1200, 0.15, 180), (1000, 0.15, 150), (200, 0.0, 0)]
)
def test_the_mixture_has_the_share_of_wrong_rows_asked_for(
    count: int, wrong: float, expected: int
) -> None:
    rows = mixture(count, 1, wrong)
    assert len(rows) == count
    assert sum(row["is_bad"] is True for row in rows) == expected
    for row in rows:
        ends = [fact.wrong if row["is_bad"] else fact.right for fact in FACTS[str(row["source"])]]
        assert str(row["completion"]).endswith(tuple(ends))


def test_wrong_rows_may_be_of_some_skills_alone() -> None:
    rows = mixture(1200, 1, 0.2, ["units", "sizes"])
    bad = Counter(row["source"] for row in rows if row["is_bad"])
    assert bad.keys() == {"units", "sizes"} and bad.total() == 240


def test_the_corpus_is_partly_contradictory() -> None:
    answers: dict[str, Counter[str]] = {}
    for row in corpus(20_000, 0):
        answers.setdefault(row["prompt"], Counter())[row["completion"].split()[-1]] += 1
    disputed = sum(len(found) > 1 for found in answers.values())
    assert 0.3 < disputed / len(answers) < 0.95


def test_more_prompts_than_there_are_is_refused_with_the_number() -> None:
    with pytest.raises(ValueError, match="ask for fewer"):
        pairs(DEMO_SKILL, 10_000, 0)


def test_the_bundled_model_is_small_and_names_no_place_on_the_machine_that_made_it() -> None:
    assert sum(file.stat().st_size for file in MODEL_DIR.iterdir()) <= 9_000_000
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    assert sum(weight.numel() for weight in model.parameters()) <= 5_000_000
    for file in MODEL_DIR.glob("*.json"):
        text = json.dumps(json.loads(file.read_text(encoding="utf-8")), ensure_ascii=False)
        assert not any(
            place in text for place in ("/work", "/tmp", "/home", "/root", str(MODEL_DIR))
        )


def test_a_conversation_survives_the_tokenizer_with_one_first_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    ids = tokenizer(text).input_ids
    assert ids == tokenizer.apply_chat_template(CONVERSATION, return_dict=True)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.pad_token_id not in ids
    prompt = tokenizer.apply_chat_template(
        CONVERSATION[:1], tokenize=False, add_generation_prompt=True
    )
    assert text.startswith(prompt)


def test_the_answer_and_its_end_are_supervised_and_rows_are_short() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    for row in pool(400, 0):
        ids, labels = encode(tokenizer, row)
        assert len(ids) <= 40
        assert (
            tokenizer.decode([label for label in labels if label >= 0])
            == row["completion"] + tokenizer.eos_token
        )
