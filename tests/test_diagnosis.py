"""What a run says about its pairs, held to values that are known in closed form or computed the
slow way."""

import math

import numpy as np
import pytest
import torch
from tiny import Tiny, batch_of, pairs_of

from prism_select.core.engines import reverse
from prism_select.core.gains import Slopes, slopes
from prism_select.core.gradients import dot, norm
from prism_select.core.likelihood import Batch
from prism_select.core.target_gradient import Side, Target, target_gradient
from prism_select.directions.answer_products import answer_products
from prism_select.directions.common_part import common_of, without_common
from prism_select.directions.pair_diagnostics import (
    Diagnosis,
    PairWeights,
    diagnose,
    overlap,
    pairs_to_agree,
)
from prism_select.models.layer_selection import select_parameters
from prism_select.run.polarity import Polarity


def test_equal_pairs_agree_wholly_and_opposite_ones_leave_no_direction() -> None:
    model = Tiny()
    chosen, rejected = batch_of(1, 10, 1), batch_of(1, 12, 2)

    def repeated(batch: Batch, count: int) -> list[Batch]:
        return [batch] * count

    order = list(range(8))
    sides = Side(repeated(chosen, 8), order), Side(repeated(rejected, 8), order)
    weights = select_parameters(model.network, "all")
    target = target_gradient(model, weights, sides, "prism")
    answers = Side([*sides[0].batches, *sides[1].batches], list(range(16)))
    slope = slopes("prism", target.loglik_chosen, target.loglik_rejected)
    products = answer_products(model, weights, answers).total.numpy()
    tokens = [[1, 2, 3]] * 8
    pairs = PairWeights(products, slope, slope)
    diagnosis = diagnose(target, pairs, (tokens, tokens), False, 0)
    assert diagnosis.split_half_agreement == pytest.approx(1, abs=1e-6)
    assert np.allclose(diagnosis.shares, 1 / 8, atol=1e-6)
    assert diagnosis.pairs_for_half_agreement == 2
    assert diagnosis.effective_pairs == pytest.approx(8)
    assert diagnosis.common_part == pytest.approx(norm(common_of(target)) / norm(target.direction))
    assert diagnosis.mean_preference == pytest.approx(float(target.gap.sigmoid().mean()))


def diagnosed(
    chosen: np.ndarray,
    rejected: np.ndarray,
    without_common: bool = False,
    target: Target | None = None,
) -> Diagnosis:
    count = len(chosen)
    tokens, means = [[1, 2, 3]] * count, torch.zeros(count, dtype=torch.float64)
    target = target or Target(
        {"w": torch.ones(1)}, {"w": torch.zeros(1)}, means, means, torch.ones(count)
    )
    return diagnose(target, weighted(chosen, rejected), (tokens, tokens), without_common, 0)


def weighted(chosen: np.ndarray, rejected: np.ndarray) -> PairWeights:
    """Pairs that count alike, from the gradients of their answers."""
    answers, ones = np.concatenate([chosen, rejected]), torch.ones(len(chosen)).double()
    return PairWeights(answers @ answers.T, Slopes(ones, ones), Slopes(ones, ones))


@pytest.mark.parametrize("kappa", [3.0, 20.0, 100.0])
def test_a_planted_signal_is_found_with_the_agreement_that_theory_gives(kappa: float) -> None:
    """Pairs = signal + noise of κ times its power: m of them against m others agree at 1 / (1 +
    κ/m)."""
    draw, count, size = np.random.default_rng(1), 160, 20_000
    signal = np.zeros(size)
    signal[0] = 1.0
    pairs = signal + draw.normal(size=(count, size)) * math.sqrt(kappa / size)
    diagnosis = diagnosed(pairs, np.zeros_like(pairs))
    for m, agreement in diagnosis.agreement_by_pairs.items():
        assert agreement == pytest.approx(1 / (1 + kappa / m), abs=0.04), m
    assert set(diagnosis.agreement_by_pairs) == {80, 40, 20}
    assert diagnosis.pairs_for_half_agreement == pytest.approx(2 * kappa, rel=0.2)
    low, high = diagnosis.agreement_spread
    assert low <= diagnosis.split_half_agreement <= high


def test_a_common_part_hides_the_signal_until_it_is_removed() -> None:
    """Each pair's two answers share a part of random strength, so it is left in their difference as
    noise in one direction; removed out, the agreement is that of the signal alone."""
    draw, count, size = np.random.default_rng(2), 100, 20_000
    shared, signal = np.zeros((2, size))
    shared[0], signal[1] = 1.0, 1.0
    noise = draw.normal(size=(count, size)) * math.sqrt(10.0 / size)
    strength = draw.normal(size=(count, 1))
    chosen = (5 + strength) * shared + signal / 2 + noise / 2
    rejected = (5 - strength) * shared - signal / 2 - noise / 2
    plain, removed = diagnosed(chosen, rejected), diagnosed(chosen, rejected, without_common=True)
    assert removed.split_half_agreement == pytest.approx(1 / (1 + 10 / 50), abs=0.05)
    assert np.ptp(plain.agreement_spread) > np.ptp(removed.agreement_spread)
    assert sum(removed.shares) == pytest.approx(1)


def test_noise_alone_agrees_at_nothing_and_promises_no_number_of_pairs() -> None:
    pairs = np.random.default_rng(3).normal(size=(64, 20_000))
    diagnosis = diagnosed(pairs, np.zeros_like(pairs))
    assert abs(diagnosis.split_half_agreement) < 0.03
    assert any("mostly noise" in line for line in diagnosis.in_words(Polarity()))


def test_a_pair_of_large_share_is_named() -> None:
    pairs = np.random.default_rng(4).normal(size=(40, 5_000))
    pairs[17] *= 20
    diagnosis = diagnosed(pairs, np.zeros_like(pairs))
    assert diagnosis.dominant[0] == 17 and diagnosis.pairs_for_half_of_direction == 1
    assert any("18 (" in line for line in diagnosis.in_words(Polarity()))


def test_without_a_gradient_there_is_nothing_to_say() -> None:
    diagnosis = diagnosed(np.zeros((20, 0)), np.zeros((20, 0)))
    assert diagnosis.pairs_for_half_of_direction is None and math.isnan(
        diagnosis.split_half_agreement
    )
    assert not any("half" in line for line in diagnosis.in_words(Polarity()))


def test_the_longer_side_is_named_as_the_target_file_names_it() -> None:
    pairs, means = np.ones((12, 4)), torch.zeros(12, dtype=torch.float64)
    target = Target({"w": torch.ones(1)}, {"w": torch.zeros(1)}, means, means, torch.ones(12))
    tokens = [[1, 2, 3]] * 12, [[1]] * 12
    diagnosis = diagnose(target, weighted(pairs, 0 * pairs), tokens, False, 0)
    assert any(
        "the chosen answer is the longer one in 100%" in line
        for line in diagnosis.in_words(Polarity())
    )
    assert any(
        "the rejected answer is the longer one" in line
        for line in diagnosis.in_words(Polarity("rejected", "chosen"))
    )


def test_small_formulas() -> None:
    assert overlap([1, 2, 2, 3], [2, 3, 4]) == pytest.approx(4 / 7)
    assert overlap([1], [1]) == 1 and overlap([1], [2]) == 0
    assert pairs_to_agree({10: 0.5, 5: 1 / 3}) == 20
    assert pairs_to_agree({10: -0.01}) is None and pairs_to_agree({}) is None


def test_one_pair_has_a_diagnosis_without_agreement() -> None:
    diagnosis = diagnosed(np.ones((1, 4)), np.zeros((1, 4)))
    assert math.isnan(diagnosis.split_half_agreement) and diagnosis.pairs_for_half_agreement is None
    assert not any("agree" in line for line in diagnosis.in_words(Polarity()))


def test_the_common_part_is_removed_from_the_direction_and_the_chosen_half_stays() -> None:
    model, sides, batch = Tiny(), pairs_of(6), batch_of(10, seed=4)
    weights = select_parameters(model.network, "all")
    target = target_gradient(model, weights, sides, "prism")
    removed, common = without_common(target), common_of(target)
    assert abs(dot(removed.direction, common)) < 1e-12 * norm(removed.direction) * norm(common)
    assert norm(removed.direction) <= norm(target.direction)
    assert all(torch.equal(removed.chosen[name], target.chosen[name]) for name in weights)
    values = reverse(model, weights, [removed.direction, removed.chosen, removed.rejected])(
        batch
    ).values
    assert torch.allclose(values[:, 0], values[:, 1] - values[:, 2], rtol=1e-9, atol=1e-12)


def test_an_anchor_adds_the_likelihood_of_the_chosen_answers() -> None:
    model, sides = Tiny(), pairs_of(6)
    weights = select_parameters(model.network, "all")
    plain, unpaired = (
        target_gradient(model, weights, sides, name).direction for name in ("prism", "unpaired")
    )
    anchored = target_gradient(model, weights, sides, "prism", anchor=0.3).direction
    for name in weights:
        assert torch.allclose(
            anchored[name], plain[name] + 0.3 * unpaired[name], rtol=1e-9, atol=1e-14
        )
