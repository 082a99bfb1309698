"""A direction of low rank: what it keeps, and that `reverse` scores along its factors as along
their product."""

import re

import pytest
import torch
from test_engines import V, network_of, target_of
from tiny import Tiny, batch_of

from prism_select.core.check import disagreement
from prism_select.core.engines import difference, forward, reference, reverse
from prism_select.core.gradients import norm
from prism_select.core.layers import Factors, dense
from prism_select.directions import low_rank
from prism_select.directions.low_rank import factor, truncated
from prism_select.models.layer_selection import select_parameters


@pytest.mark.parametrize("tied", [True, False])
def test_factors_score_like_their_product_to_rounding(tied: bool) -> None:
    model, batch = Tiny(tied=tied), batch_of(12, seed=7)
    weights = select_parameters(model.network, "all")
    target = target_of(model, weights, vocabulary=61)
    low = [
        factor(model.network, direction, 3).direction
        for direction in (target.direction, target.chosen, target.rejected)
    ]
    assert ("body.words.weight" in weights) and not isinstance(low[0]["body.words.weight"], Factors)
    for directions in (
        low[:2],
        [*low, target.direction],
    ):  # more than two at once take another road
        exact = reference(model, weights, list(map(dense, directions)))(batch).values
        assert disagreement(reverse(model, weights, directions)(batch).values, exact) < 1e-10
        assert disagreement(forward(model, weights, directions)(batch).values, exact) < 1e-10
        assert disagreement(reference(model, weights, directions)(batch).values, exact) < 1e-12
    assert disagreement(difference(model, weights, low)(batch).values, exact[:, :3]) < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama, tied", "mixtral"])
def test_factors_score_like_their_product_on_real_architectures(name: str) -> None:
    model, batch = network_of(name), batch_of(16, 16, seed=9, vocabulary=V)
    weights = select_parameters(model.network, "all")
    low = factor(model.network, target_of(model, weights).direction, 4).direction
    factored = {parameter for parameter, value in low.items() if isinstance(value, Factors)}
    assert factored and not any(re.search("emb|norm|experts", parameter) for parameter in factored)
    assert ("lm_head.weight" in factored) == ("lm_head.weight" in weights)
    exact = reference(model, weights, [dense(low)])(batch).values
    assert disagreement(reverse(model, weights, [low])(batch).values, exact) < 1e-4


def test_full_rank_gives_the_direction_as_it_is() -> None:
    model = Tiny()
    weights = select_parameters(model.network, "all")
    direction = target_of(model, weights, vocabulary=61).direction
    low = factor(model.network, direction, 64)
    assert low.direction == direction and low.energy_kept == 1
    for name in ("body.blocks.0.up.weight", "body.blocks.3.out.weight"):
        product = dense({name: truncated(direction[name], 64)})[name]
        assert torch.allclose(product, direction[name], rtol=0, atol=1e-14)


def test_the_energy_kept_is_that_of_the_squared_lengths_and_grows_with_the_rank() -> None:
    model = Tiny()
    weights = select_parameters(model.network, "all")
    direction = target_of(model, weights, vocabulary=61).direction
    shares = []
    for rank in (1, 2, 4, 8, 16):
        low = factor(model.network, direction, rank)
        assert low.energy_kept == pytest.approx(
            (norm(dense(low.direction)) / norm(direction)) ** 2, rel=1e-12
        )
        for name, energy in low.by_weight.items():
            best = 1.0
            if isinstance(low.direction[name], Factors):
                values = torch.linalg.svdvals(direction[name]).square()
                best = float(values[:rank].sum() / values.sum())
            assert energy == pytest.approx(best, rel=1e-9)
        shares.append(low.energy_kept)
    assert sorted(shares) == shares and shares[0] < 0.9 < shares[-2] < shares[-1] <= 1 + 1e-12


def test_a_large_matrix_is_cut_nearly_as_well_at_random_and_always_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = torch.Generator().manual_seed(0)
    scales = torch.arange(1, 201, dtype=torch.float64) ** -0.7
    left, right = (
        torch.linalg.qr(torch.randn(n, 200, generator=draw, dtype=torch.float64))[0]
        for n in (300, 500)
    )
    matrix = (left * scales) @ right.T
    exact, state = truncated(matrix, 16), torch.get_rng_state()
    monkeypatch.setattr(low_rank, "EXACT", 100)
    drawn = truncated(matrix, 16)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(truncated(matrix, 16).left, drawn.left)
    assert not torch.equal(drawn.left, exact.left)
    energy = [float((low.left @ low.right).square().sum()) for low in (drawn, exact)]
    assert energy[0] == pytest.approx(energy[1], rel=1e-3)
    assert torch.allclose(
        drawn.right @ drawn.right.T, torch.eye(16, dtype=torch.float64), atol=1e-12
    )
