"""The pairs' curvature against a dense solve, on a float64 transformer; and from end to end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import jsonl, prism, save_model
from tiny import Tiny, pairs_of
from torch import Tensor

from prism_select.core.gains import slopes
from prism_select.core.gradients import dot, minus, norm
from prism_select.core.layers import Direction, Parameters
from prism_select.core.likelihood import Batch
from prism_select.core.target_gradient import Side, Target, target_gradient, weighted_gradient
from prism_select.directions.answer_products import answer_products
from prism_select.directions.pair_curvature import pair_coefficients, pair_slopes
from prism_select.directions.way import Way
from prism_select.models.layer_selection import select_parameters
from prism_select.run.config import DirectionOptions

Sides = tuple[Side, Side]


def options(
    weighting: str = "prism", anchor: float = 0.0, likelihood: str = "token"
) -> DirectionOptions:
    settings: dict[str, Any] = {
        "weighting": weighting,
        "anchor": anchor,
        "likelihood": likelihood,
    }
    return DirectionOptions(**settings)


def divided(
    model: Tiny,
    sides: Sides,
    config: DirectionOptions,
    damping: float,
    weights: Parameters | None = None,
) -> Target:
    weights = weights or select_parameters(model.network, "all")
    count = len(sides[0].order)
    order = [*sides[0].order, *(count + pair for pair in sides[1].order)]
    answers = Side([*sides[0].batches, *sides[1].batches], order)
    found = answer_products(model, weights, answers)
    way = Way(
        likelihood=config.likelihood,
        weighting=config.weighting,
        anchor=config.anchor,
        damping=damping,
    )
    slope = pair_slopes(way, found)
    means = found.mean_loglik[:count], found.mean_loglik[count:]
    return weighted_gradient(model, weights, sides, means, slope)


def flat(direction: Direction) -> Tensor:
    return torch.cat([value.flatten() for value in direction.values()])


def mean_gradient(model: Tiny, weights: Parameters, row: Batch) -> Tensor:
    """∇mean_loglik of one row by autograd, written out again."""
    for weight in weights.values():
        weight.requires_grad_(True)
    logits = model.logits(model.hidden(row))[:, :-1][row.predicted]
    loglik = logits.log_softmax(-1).gather(1, row.tokens[:, 1:][row.predicted][:, None]).mean()
    gradients = torch.autograd.grad(loglik, list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    return torch.cat([gradient.flatten() for gradient in gradients])


def rows_of(side: Side) -> list[Batch]:
    rows = {
        pair: batch.rows(slice(index, index + 1))
        for batch, pairs in side
        for index, pair in enumerate(pairs)
    }
    return [rows[pair] for pair in sorted(rows)]


@pytest.mark.parametrize("likelihood", ["token", "sequence"])
@pytest.mark.parametrize("damping", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(
    ("weighting", "anchor"),
    [("prism", 0.0), ("uniform", 0.0), ("hard", 0.0), ("unpaired", 0.0), ("prism", 0.4)],
)
def test_the_direction_is_that_of_a_dense_solve(
    weighting: str, anchor: float, damping: float, likelihood: str
) -> None:
    model, sides = Tiny(), pairs_of(6)
    weights = select_parameters(model.network, "last")
    weights = {**weights, **select_parameters(model.network, r"blocks\.3\.(out|before)")}
    config = options(weighting, anchor, likelihood)
    target = target_gradient(model, weights, sides, weighting, anchor, likelihood)
    slope = slopes(weighting, target.loglik_chosen, target.loglik_rejected, anchor)
    chosen, rejected = (
        torch.stack(
            [
                mean_gradient(model, weights, row)
                * (row.counts[0] if likelihood == "sequence" else 1)
                for row in rows_of(side)
            ]
        )
        for side in sides
    )
    plain = (slope.chosen @ chosen - slope.rejected @ rejected) / len(chosen)
    assert norm_of(flat(target.direction) - plain) < 1e-9 * norm_of(plain)
    assert torch.equal(target.weight, slope.chosen)
    pi = slope.chosen
    differences = chosen - (slope.rejected / pi)[:, None] * rejected
    count, size = differences.shape
    moment = (differences.T * pi) @ differences / count
    mu = damping * (pi * differences.square().sum(1)).mean() / count
    exact = torch.linalg.solve(moment + mu * torch.eye(size, dtype=pi.dtype), pi @ differences)
    exact /= count
    found = divided(model, sides, config, damping, weights)
    alpha = pair_coefficients(differences @ differences.T, pi, damping)
    assert norm_of(flat(found.direction) - exact) < 1e-9 * norm_of(exact)
    assert norm_of(flat(found.chosen) - alpha @ chosen) < 1e-9 * norm_of(alpha @ chosen)


def norm_of(values: Tensor) -> float:
    return float(values.norm())


def test_a_large_damping_gives_the_first_order_direction() -> None:
    model, sides = Tiny(), pairs_of(5)
    weights = select_parameters(model.network, "all")
    first = target_gradient(model, weights, sides, "prism").direction
    found = divided(model, sides, options(), 1e9).direction
    assert dot(first, found) / (norm(first) * norm(found)) == pytest.approx(1, abs=1e-12)


def test_swapping_all_pairs_under_uniform_negates() -> None:
    model, (chosen, rejected) = Tiny(), pairs_of(5)
    found = divided(model, (chosen, rejected), options("uniform"), 0.1)
    swapped = divided(model, (rejected, chosen), options("uniform"), 0.1)
    assert norm_of(flat(found.direction) + flat(swapped.direction)) < 1e-12 * norm(found.direction)


def test_the_direction_does_not_depend_on_the_order_of_pairs_or_batches() -> None:
    model, sides = Tiny(), pairs_of(6)
    found = divided(model, sides, options(), 0.1).direction

    def reordered(side: Side) -> Side:
        rows, order = rows_of(side), [4, 0, 5, 2, 1, 3]
        return Side([rows[pair] for pair in order], list(range(6)))

    other = divided(model, (reordered(sides[0]), reordered(sides[1])), options(), 0.1).direction
    assert norm(minus(found, other)) < 1e-11 * norm(found)


def test_a_duplicate_pair_moves_the_direction_less_than_it_moves_the_sum() -> None:
    for seed in range(4):
        model, sides = Tiny(seed), pairs_of(6, seed)
        rows = [rows_of(side) for side in sides]
        doubled = (
            Side([*rows[0], rows[0][2]], list(range(7))),
            Side([*rows[1], rows[1][2]], list(range(7))),
        )
        weights = select_parameters(model.network, "all")
        sums = [target_gradient(model, weights, each, "prism") for each in (sides, doubled)]
        solved = [divided(model, each, options(), 0.1) for each in (sides, doubled)]
        moved = [angle(before.direction, after.direction) for before, after in (sums, solved)]
        assert 0 < moved[1] < moved[0]


def angle(a: Direction, b: Direction) -> float:
    return float(np.arccos(np.clip(dot(a, b) / (norm(a) * norm(b)), -1, 1)))


def test_a_pair_without_weight_has_no_coefficient() -> None:
    differences = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([0.5, 0.0, 0.2, 0.9], dtype=torch.float64)
    alpha = pair_coefficients(differences @ differences.T, weight, 0.1)
    three = differences[[0, 2, 3]]
    without = pair_coefficients(three @ three.T, weight[[0, 2, 3]], 0.1 * 3 / 4)
    assert alpha[1] == 0
    assert torch.allclose(alpha[[0, 2, 3]], without, rtol=1e-10)


PAIRS: list[dict[str, object]] = [
    {"prompt": f"Say {n}", "chosen": f"Please, {n}, thank you.", "rejected": f"no {n * 7}"}
    for n in range(8)
]
POOL: list[dict[str, object]] = [
    {"prompt": f"Question {n}?", "completion": f"Answer {n}" + ", please" * (n % 3)}
    for n in range(12)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair_curvature")
    save_model(folder / "model")
    jsonl(folder / "pool.jsonl", POOL)
    jsonl(folder / "pairs.jsonl", PAIRS)
    jsonl(folder / "more.jsonl", PAIRS[::-2])
    return folder


@pytest.mark.parametrize("command", ["select", "repair"])
def test_a_run_takes_the_pairs_curvature(command: str, folder: Path, tmp_path: Path) -> None:
    words = [command, "--model", folder / "model", "--pool", folder / "pool.jsonl"]
    words += ["--target", f"a={folder}/pairs.jsonl", "--target", f"b={folder}/more.jsonl"]
    done = prism(*words, "--curvature", "pairs", "--damping", "0.3", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    entry = json.loads((tmp_path / "run" / "manifest.json").read_text())["curvature"]
    assert entry["name"] == "pairs" and entry["damping"] == 0.3
    assert entry["rows"] == 12
    assert set(entry["cosine"]) == {"a", "b"} and all(0 < c < 1 for c in entry["cosine"].values())
    table = pq.read_table(tmp_path / "run" / "scores.parquet")
    score, chosen, rejected = (
        table[name].to_numpy() for name in ("score", "score_chosen", "score_rejected")
    )
    assert np.array_equal(chosen - score, rejected)
    plain = prism(*words, "--out", tmp_path / "flat")
    assert plain.code == 0, plain.err
    flat_score = pq.read_table(tmp_path / "flat" / "scores.parquet")["score"].to_numpy()
    assert np.corrcoef(score, flat_score)[0, 1] < 0.999
