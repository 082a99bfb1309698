"""Cross-validation on the pairs, against a slow definition and against labelled pools."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from made_answers import made_pairs, slow_direction
from scipy.stats import binomtest
from torch import Tensor

import prism_select
from prism_select.core.statistics import auroc
from prism_select.data.records import Example, Pair, Turn
from prism_select.demo.story import MODEL
from prism_select.demo.world import SKILLS, pairs
from prism_select.directions.answer_products import AnswerProducts
from prism_select.directions.cross_validation import CrossValidation, cross_validate
from prism_select.directions.pair_folds import FOLDS, PairGroups, folds_of, groups_of
from prism_select.directions.way import Way

APART = PairGroups(np.arange(40))


def validated(products: AnswerProducts, way: Way, seed: int = 0) -> CrossValidation:
    groups = PairGroups(np.arange(len(products.tokens) // 2))
    found = cross_validate(products, way, groups, seed)
    assert found
    return found


WAYS: list[dict[str, Any]] = [
    {},
    {"curvature": "flat"},
    {"weighting": "hard", "damping": 1.0, "normalize": "tokens"},
    {"weighting": "uniform", "anchor": 0.3, "normalize": "norm"},
    {"common": "remove"},
    {"curvature": "flat", "common": "remove", "normalize": "norm"},
]


@pytest.mark.parametrize("options", WAYS)
def test_held_out_scores_are_those_of_a_slow_definition(options: dict[str, Any]) -> None:
    way = Way(**options)
    gradients, products = made_pairs(1, 1.0)
    found, count = validated(products, way), 40
    expected = torch.zeros(2 * count, dtype=torch.float64)
    for fold in folds_of(APART, 0):
        kept = [pair for pair in range(count) if pair not in fold]
        answers = [*kept, *(count + pair for pair in kept)]
        direction = slow_direction(way, gradients[answers], products.mean_loglik[answers])
        for answer in [*fold, *(count + fold)]:
            own = gradients[answer]
            times = {"none": float(products.tokens[answer]), "norm": 1 / float(own.norm())}
            along = own @ direction / direction.norm()
            expected[answer] = along * times.get(way.normalize, 1.0)
    assert np.allclose([*found.chosen, *found.rejected], expected, rtol=1e-8)
    labels = np.arange(2 * count) < count
    assert found.auroc == pytest.approx(auroc(expected.numpy(), labels))
    assert found.paired == np.mean(np.array(found.chosen) > np.array(found.rejected))
    assert found.folds == FOLDS and found.interval[0] < found.auroc < found.interval[1]


def test_the_direction_of_several_targets_is_their_mean() -> None:
    gradients, products = made_pairs(2, 1.0)
    targets = [pair % 3 for pair in range(40)]
    found = cross_validate(products, Way(), APART, 0, targets)
    assert found
    fold = folds_of(APART, 0)[0]
    direction = torch.zeros(60, dtype=torch.float64)
    for target in range(3):
        kept = [p for p in range(40) if p not in fold and targets[p] == target]
        answers = [*kept, *(40 + pair for pair in kept)]
        direction += slow_direction(Way(), gradients[answers], products.mean_loglik[answers])
    score = gradients[fold[0]] @ direction / direction.norm() * products.tokens[fold[0]]
    assert found.chosen[fold[0]] == pytest.approx(float(score), rel=1e-8)


def test_held_out_log_likelihoods_take_no_part() -> None:
    _, products = made_pairs(3, 1.0)
    before = validated(products, Way())
    fold = folds_of(APART, 0)[2]
    products.mean_loglik[fold] += 5.0
    after = validated(products, Way())
    assert np.allclose(np.array(before.chosen)[fold], np.array(after.chosen)[fold], rtol=1e-12)
    assert before.chosen != after.chosen


def test_swapping_all_pairs_turns_the_ranking() -> None:
    _, products = made_pairs(4, 0.5)
    turned = products.of([*range(40, 80), *range(40)])
    way = Way(weighting="uniform")
    assert validated(turned, way).auroc == pytest.approx(validated(products, way).auroc)
    found, other = validated(products, way), validated(turned, way)
    assert np.allclose(found.chosen, -np.array(other.rejected))


def truth(gradients: Tensor, products: AnswerProducts, way: Way, signal: float, seed: int) -> float:
    """AUROC of a labelled pool along the direction of all pairs."""
    direction = slow_direction(way, gradients, products.mean_loglik)
    rows, _ = made_pairs(1000 + seed, signal, pairs=1500)
    _, fresh = made_pairs(1000 + seed, signal, pairs=1500)
    return auroc((fresh.tokens * (rows @ direction)).numpy(), np.arange(3000) < 1500)


def test_the_truth_is_in_the_interval() -> None:
    for options in ({}, {"curvature": "flat", "weighting": "uniform"}):
        way, hits = Way(**options), 0  # type: ignore[arg-type]
        for seed in range(20):
            gradients, products = made_pairs(seed, 0.6)
            low, high = validated(products, way).interval
            hits += low <= truth(gradients, products, way, 0.6, seed) <= high
        assert hits >= 18


def test_pairs_turned_at_random_are_at_chance() -> None:
    found = []
    for seed in range(20):
        _, products = made_pairs(seed, 1.0)
        turn = np.random.default_rng(seed).random(40) < 0.5
        chosen = np.where(turn, np.arange(40) + 40, np.arange(40))
        found.append(validated(products.of([*chosen, *((chosen + 40) % 80)]), Way()))
    assert abs(np.mean([each.auroc for each in found]) - 0.5) < 0.04
    assert sum(low <= 0.5 <= high for low, high in (each.interval for each in found)) >= 16


def pair(question: str, chosen: str, rejected: str) -> Pair:
    def example(answer: str) -> Example:
        turns = (Turn("user", question), Turn("assistant", answer))
        return Example(turns, "", "", "pairs.jsonl", 1, 1)

    return Pair(example(chosen), example(rejected))


def test_pairs_that_repeat_a_question_or_an_answer_are_held_out_together() -> None:
    pairs = [pair(f"Question {n}?", f"yes {n}", f"no {n}") for n in range(6)]
    pairs += [pair("question  0?", "other", "another"), pair("Question 7?", "No 1", "something")]
    groups = groups_of(pairs)
    assert groups.by_answers and groups.count == 6
    assert groups.of_pairs[0] == groups.of_pairs[6] and groups.of_pairs[1] == groups.of_pairs[7]
    assert len(set(groups.of_pairs[:6])) == 6


def test_where_every_pair_has_the_same_refusal_questions_make_the_groups() -> None:
    pairs = [pair(f"Question {n}?", "I cannot help with that.", f"Do {n}") for n in range(9)]
    groups = groups_of([*pairs, pair("Question 3?", "I cannot help with that.", "Do what?")])
    assert not groups.by_answers and groups.count == 9
    assert groups.of_pairs[3] == groups.of_pairs[9]


def test_answers_that_leave_too_few_groups_are_not_held_out_together() -> None:
    pairs = [pair(f"Question {n}?", f"A {n // 2}", f"B {n // 2}") for n in range(6)]
    groups = groups_of(pairs)
    assert not groups.by_answers and groups.count == 6


def test_directions_are_of_the_upper_blocks_that_layers_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    gradients = torch.randn(5, 80, 9, generator=draw, dtype=torch.float64)
    names = ["", "0", "1", "2", "3"]
    _, like = made_pairs(0, 1.0)

    def products(kept: list[str]) -> AnswerProducts:
        blocks = {name: gradients[k] @ gradients[k].T for k, name in enumerate(names)}
        return AnswerProducts({name: blocks[name] for name in kept}, like.mean_loglik, like.tokens)

    every = products(names)
    for layers, kept in {"all": names, "late": names[3:], "last:3": names[2:]}.items():
        way = Way(layers=layers, normalize="norm")
        found, expected = validated(every, way), validated(products(kept), Way(normalize="norm"))
        assert np.allclose(found.chosen, expected.chosen, rtol=1e-12)
        again = validated(products(kept), way)
        assert again.chosen == found.chosen


def test_folds_do_not_depend_on_the_order_of_the_pairs() -> None:
    pairs = [pair(f"Question {n}?", f"yes {n}", f"no {n}") for n in range(20)]
    order = np.random.default_rng(0).permutation(20)
    moved = groups_of([pairs[n] for n in order])
    assert moved.of_pairs.tolist() == groups_of(pairs).of_pairs[order].tolist()
    folds = folds_of(groups_of(pairs), 1)
    assert sorted(map(len, folds)) == [2, 2, 2, 2, 3, 3, 3, 3]
    assert sorted(np.concatenate(folds).tolist()) == list(range(20))


def test_too_few_groups_say_nothing() -> None:
    _, products = made_pairs(0, 1.0, pairs=8)
    assert cross_validate(products, Way(), PairGroups(np.arange(8) % 3), 0) is None


def test_answers_without_a_gradient_are_ranked_at_chance() -> None:
    _, products = made_pairs(0, 1.0)
    empty = AnswerProducts({"": 0 * products.total}, products.mean_loglik, products.tokens)
    for normalize in ("none", "norm"):
        found = validated(empty, Way(curvature="flat", normalize=normalize))
        assert found.auroc == 0.5 and set(found.chosen) == {0.0}


def test_planted_answers_are_taken_as_often_as_new_ones_in_the_pool() -> None:
    """Of facts that no pair mentions, as held-out answers are."""
    shares, overlaps = [], 0
    for seed in range(5):
        of_facts: dict[tuple[str, str], dict[str, str]] = {}
        for skill in SKILLS:
            for each in pairs(skill, 20, seed):
                of_facts.setdefault((skill, each["chosen"].split()[-1]), each)
        dealt = [*of_facts.values()]
        random.Random(seed).shuffle(dealt)
        target, planted, others = dealt[:50], dealt[50:80], dealt[80:110]
        answers = [(each, "chosen", True) for each in planted]
        answers += [(each, side, False) for each in others for side in ("chosen", "rejected")]
        rows = [{"prompt": e["prompt"], "completion": e[s], "new": n} for e, s, n in answers]
        run = prism_select.select(str(MODEL), rows, target, budget="30%", layers="late")
        taken = sum(row["new"] for row in run.selected)
        found = run.manifest["target"]["cross_validation"]
        low, high = binomtest(taken, len(planted)).proportion_ci(method="wilson")
        overlaps += found["planted_interval"][0] <= high and low <= found["planted_interval"][1]
        shares.append((found["planted_recall"], taken / len(planted)))
    assert overlaps >= 4
    foretold, real = np.mean(shares, axis=0)
    assert abs(foretold - real) < 0.1 and 0.2 < real < 0.8
