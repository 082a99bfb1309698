"""Tuning: what is tried, that noise moves nothing, and that a gain does."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from made_answers import made_pairs, slow_direction
from numpy.typing import NDArray
from torch import Tensor

from prism_select.core.statistics import auroc
from prism_select.directions.answer_products import AnswerProducts
from prism_select.directions.cross_validation import cross_validate
from prism_select.directions.pair_folds import PairGroups, folds_of
from prism_select.directions.tuning import Tuning, auroc_parts, tune, ways_to_try
from prism_select.directions.way import Way

FIRST_ORDER = Way(curvature="flat")
APART = PairGroups(np.arange(40))


def tuned(products: AnswerProducts, start: Way = FIRST_ORDER, seed: int = 0) -> Tuning:
    found = tune(products, start, (), PairGroups(np.arange(len(products.tokens) // 2)), seed)
    assert found
    return found


def products_of(gradients: Tensor, like: AnswerProducts) -> AnswerProducts:
    """Half of the numbers in each of two blocks."""
    halves = gradients.split(gradients.shape[1] // 2, dim=1)
    blocks = {str(number): own @ own.T for number, own in enumerate(halves)}
    return AnswerProducts(blocks, like.mean_loglik, like.tokens)


def with_loud_directions(seed: int, pairs: int = 40) -> tuple[Tensor, AnswerProducts]:
    """Signal, beside six directions in which answers differ ten times as much by accident."""
    gradients, like = made_pairs(seed, 1.5, pairs)
    draw = torch.Generator().manual_seed(100 + seed)
    loud = torch.randn(2 * pairs, 6, generator=draw, dtype=torch.float64)
    gradients[:, 10:16] += 10 * loud
    return gradients, products_of(gradients, like)


def with_a_loud_signal(seed: int) -> tuple[Tensor, AnswerProducts]:
    """Signal in the direction in which pairs differ most."""
    gradients, like = made_pairs(seed, 0.0)
    draw = torch.Generator().manual_seed(100 + seed)
    size = 4 * torch.rand(80, generator=draw, dtype=torch.float64)
    gradients[:, 0] += torch.where(torch.arange(80) < 40, size, -size)
    return gradients, products_of(gradients, like)


def test_what_is_tried_has_the_figures_of_cross_validation() -> None:
    _, products = with_loud_directions(0)
    targets = [pair % 2 for pair in range(40)]
    for of_targets in (None, targets):
        found = tune(products, FIRST_ORDER, (), APART, 3, of_targets)
        assert found
        for trial in found.tried[::7]:
            validation = cross_validate(products, trial.way, APART, 3, of_targets)
            assert validation and trial.auroc == pytest.approx(validation.auroc)
        best = max(found.tried, key=lambda trial: trial.auroc)
        assert found.best == best and best.standard_error == 0


def test_the_simplest_ways_come_first() -> None:
    products = AnswerProducts(
        {name: torch.eye(8) for name in ("", *map(str, range(18)))}, torch.zeros(8), torch.ones(8)
    )
    ways = ways_to_try(products, FIRST_ORDER, ())
    assert ways[0] == FIRST_ORDER and len(set(ways)) == len(ways) == 180
    assert ways[1:3] == [replace(FIRST_ORDER, normalize=name) for name in ("tokens", "norm")]
    assert ways[4:7] == [Way(curvature="pairs", damping=damping) for damping in (1.0, 0.3, 0.1)]
    assert [way.layers for way in ways[9:12]] == ["last:12", "late", "last:6"]
    assert all(way.curvature == "flat" for way in ways if way.common == "remove")
    late = {str(number): torch.eye(8) for number in range(9, 18)}
    ways = ways_to_try(replace(products, blocks=late), Way(layers="late"), ())
    assert {way.layers for way in ways} == {"late", "last:6"} and ways[0].curvature == "pairs"


def test_what_the_user_has_set_stays() -> None:
    _, products = with_loud_directions(0)
    start = Way(weighting="unpaired", damping=0.05, curvature="flat", anchor=0.2, layers="late")
    ways = ways_to_try(products, start, {"weighting", "damping", "layers"})
    assert {(way.weighting, way.damping, way.anchor, way.layers) for way in ways} == {
        ("unpaired", 0.05, 0.2, "late")
    }
    assert {way.curvature for way in ways} == {"flat", "pairs"}
    assert {way.common for way in ways} == {"keep"}
    every = {"weighting", "damping", "layers", "curvature", "common", "normalize"}
    found = tune(products, start, every, APART, 0)
    alone = cross_validate(products, start, APART, 0)
    assert found and alone and found.chosen.way == start and len(found.tried) == 1
    assert found.nested.chosen == pytest.approx(alone.chosen)
    assert found.nested.auroc == alone.auroc


def resampled_error(scores: NDArray[np.float64], groups: NDArray[np.int64]) -> float:
    """Of the difference between the AUROCs of two rankings: groups drawn with replacement."""
    draw, differences = np.random.default_rng(0), []
    for _ in range(1500):
        drawn = draw.integers(groups.max() + 1, size=groups.max() + 1)
        pairs = np.concatenate([np.flatnonzero(groups == group) for group in drawn])
        labels = np.arange(2 * len(pairs)) < len(pairs)
        answers = np.concatenate([pairs, len(groups) + pairs])
        first, second = (auroc(own[answers], labels) for own in scores)
        differences.append(first - second)
    return float(np.std(differences))


def test_errors_of_differences_are_those_of_a_bootstrap_over_groups() -> None:
    draw = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 2)
    shared = draw.normal(size=60)[groups] + draw.normal(size=120)
    scores = np.concatenate([shared + 0.5, draw.normal(size=120)]) + draw.normal(size=(2, 240)) / 2
    scores = scores.round(1)  # with ties
    aurocs, parts = auroc_parts(scores, groups)
    labels = np.arange(240) < 120
    assert aurocs == pytest.approx([auroc(own, labels) for own in scores])
    assert parts.sum(1) == pytest.approx(0, abs=1e-12)
    error = np.linalg.norm(parts[0] - parts[1])
    assert error == pytest.approx(resampled_error(scores, groups), rel=0.1)


def test_noise_moves_nothing() -> None:
    stays, nested, best = 0, [], []
    for seed in range(20):
        gradients, like = made_pairs(seed, 0.0)
        found = tuned(products_of(gradients, like), seed=seed)
        stays += found.chosen.way == FIRST_ORDER
        nested.append(found.nested.auroc)
        best.append(max(trial.auroc for trial in found.tried))
    assert stays >= 17
    assert abs(np.mean(nested) - 0.5) < 0.03 < np.mean(best) - 0.5


def test_a_planted_gain_is_found_and_holds_on_new_answers() -> None:
    moves, gains, nested = 0, [], []
    for seed in range(20):
        gradients, products = with_loud_directions(seed)
        found = tuned(products, seed=seed)
        moves += found.chosen.way.curvature == "pairs"
        rows, fresh = with_loud_directions(1000 + seed, pairs=500)
        truth = [
            auroc(
                (rows @ slow_direction(way, gradients, products.mean_loglik)).numpy()
                * (fresh.tokens.numpy() if way.normalize == "none" else 1),
                np.arange(1000) < 500,
            )
            for way in (FIRST_ORDER, found.chosen.way)
        ]
        gains.append(truth[1] - truth[0])
        nested.append(found.nested.auroc - truth[1])
    assert moves >= 18 and np.mean(gains) > 0.1
    assert abs(np.mean(nested)) < 0.05


def test_first_order_wins_where_curvature_loses() -> None:
    for start, at_least in ((FIRST_ORDER, 9), (Way(damping=0.1), 7)):
        found = [tuned(with_a_loud_signal(seed)[1], start, seed) for seed in range(10)]
        assert sum(each.chosen.way.curvature == "flat" for each in found) >= at_least


def test_layers_without_signal_are_left_out() -> None:
    chosen = set()
    for seed in range(5):
        gradients, like = made_pairs(seed, 2.0)
        noise = 6 * made_pairs(50 + seed, 0.0)[0]
        chosen.add(tuned(products_of(torch.cat([noise, gradients], 1), like)).chosen.way.layers)
    assert chosen == {"last:1"}


def test_answers_of_a_fold_take_no_part_in_the_choice_of_their_way() -> None:
    _, products = with_loud_directions(1)
    fold = folds_of(APART, 0)[3]
    order = np.arange(80)
    order[[*fold, *(40 + fold)]] = [*(40 + fold), *fold]
    before, after = tuned(products).nested, tuned(products.of(order.tolist())).nested
    turned = np.array(after.rejected)[fold] / np.array(before.chosen)[fold]
    assert turned == pytest.approx(np.full(len(fold), turned[0])) and turned[0] > 0


def test_the_order_of_the_pairs_does_not_matter() -> None:
    _, products = with_loud_directions(2)
    order = np.random.default_rng(0).permutation(40)
    moved = tune(
        products.of([*order, *(40 + order)]), FIRST_ORDER, (), PairGroups(APART.of_pairs[order]), 0
    )
    found = tuned(products)
    assert moved and moved.chosen.way == found.chosen.way
    assert [trial.auroc for trial in moved.tried] == pytest.approx([t.auroc for t in found.tried])
    assert moved.nested.chosen == pytest.approx(np.array(found.nested.chosen)[order])


def test_too_few_groups_choose_nothing() -> None:
    _, products = made_pairs(0, 1.0, pairs=8)
    assert tune(products, FIRST_ORDER, (), PairGroups(np.arange(8) % 3), 0) is None
