"""Directions of low rank from the start: those of the full gradients, cut, everywhere."""

import pytest
import torch
from test_answer_products import PAIRS, answers_of, gradients_of
from test_engines import ARCHITECTURES, network_of
from test_engines import V as VOCABULARY
from tiny import Tiny, batch_of
from torch import Tensor

from prism_select.core.check import disagreement
from prism_select.core.engines import reference, reverse
from prism_select.core.gradients import dot, norm
from prism_select.core.layers import Direction, Factored, Factors, Parameters, dense
from prism_select.core.likelihood import LanguageModel
from prism_select.core.target_gradient import Side
from prism_select.directions.low_rank import truncated
from prism_select.directions.range_finder import low_rank_directions
from prism_select.models.layer_selection import select_parameters


def coefficients_of(directions: int) -> Tensor:
    """The second half of the answers has none in the first direction."""
    draw = torch.Generator().manual_seed(3)
    made = torch.randn(directions, 2 * PAIRS, generator=draw, dtype=torch.float64)
    made[0, PAIRS:] = 0
    return made


def full_directions(
    model: LanguageModel, weights: Parameters, side: Side, coefficients: Tensor
) -> list[Direction]:
    gradients = gradients_of(model, weights, side)
    return [
        {name: (row @ own).reshape(weights[name].shape) for name, own in gradients.items()}
        for row in coefficients
    ]


def error_of(low: Factored, full: Direction) -> float:
    difference = {name: value.double() - full[name] for name, value in dense(low).items()}
    return norm(difference) / norm(full)


@pytest.mark.parametrize("layers", ["all", "late"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_rank_above_the_matrices_gives_the_full_direction(name: str, layers: str) -> None:
    model, side = network_of(name), answers_of(VOCABULARY)
    weights = select_parameters(model.network, layers)
    coefficients = coefficients_of(3)
    full = full_directions(model, weights, side, coefficients)
    every = low_rank_directions(model, weights, side, coefficients, 97)
    for low, exact in zip(every, full, strict=True):
        assert list(low) == list(exact)
        assert error_of(low, exact) < 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_a_low_rank_is_nearly_the_best_of_its_rank(tied: bool) -> None:
    model, side, rank = Tiny(tied=tied), answers_of(61), 4
    weights = select_parameters(model.network, "all")
    (full,) = full_directions(model, weights, side, coefficients_of(1))
    (low,) = low_rank_directions(model, weights, side, coefficients_of(1), rank)
    cut = {name for name, value in low.items() if isinstance(value, Factors)}
    assert "body.words.weight" in cut and "body.blocks.0.up.weight" in cut
    for name, value in low.items():
        if isinstance(value, Tensor):
            assert torch.allclose(value, full[name], rtol=1e-9, atol=1e-12)
            continue
        left, right = value
        assert left.shape[1] == rank == right.shape[0]
        best = norm(dense({name: truncated(full[name], rank)})) ** 2
        error = norm({name: left @ right - full[name]}) ** 2
        assert error <= 1.02 * (norm({name: full[name]}) ** 2 - best) + 1e-20


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_along_factors_are_those_along_their_product(name: str) -> None:
    model, batch = network_of(name), batch_of(16, 16, seed=9, vocabulary=VOCABULARY)
    weights = select_parameters(model.network, "all")
    low = low_rank_directions(model, weights, answers_of(VOCABULARY), coefficients_of(2), 3)
    exact = reference(model, weights, list(map(dense, low)))(batch).values
    assert disagreement(reverse(model, weights, low)(batch).values, exact) < 1e-4


def test_the_algebra_of_factors_is_that_of_their_products() -> None:
    model, side = network_of("llama, tied"), answers_of(VOCABULARY)
    weights = select_parameters(model.network, "all")
    a, b = low_rank_directions(model, weights, side, coefficients_of(2), 3)
    assert any(isinstance(value, Factors) for value in a.values())
    for one, other in ((a, b), (a, dense(b)), (dense(a), b)):
        assert dot(one, other) == pytest.approx(dot(dense(a), dense(b)), rel=1e-5)
