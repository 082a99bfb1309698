"""Each curvature against a dense construction of what it says it is, on a float64 transformer."""

from collections.abc import Iterator, Mapping

import torch
from tiny import Tiny, batch_of
from torch import Tensor
from torch.nn import functional

from prism_select.core.gradients import minus, norm
from prism_select.core.layers import Direction, Parameters
from prism_select.core.likelihood import Batch
from prism_select.directions.curvature import CURVATURES, diagonal, ekfac
from prism_select.models.layer_selection import select_parameters
from prism_select.run.config import ScoreConfig
from prism_select.run.options import options_of

PATTERN = r"blocks\.[01]\.(qkv|down|before)"


def rows_of(count: int = 5) -> list[Batch]:
    return [batch_of(1, 12, seed) for seed in range(count)]


def random_direction(weights: Parameters, seed: int = 0) -> Direction:
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.randn(w.shape, generator=draw, dtype=w.dtype) for n, w in weights.items()}


def example_gradients(
    model: Tiny, weights: Parameters, rows: list[Batch]
) -> Iterator[Mapping[str, Tensor]]:
    """∇loglik of each example by autograd, written out again."""
    for weight in weights.values():
        weight.requires_grad_(True)
    for row in rows:
        logits = model.logits(model.hidden(row))[:, :-1][row.predicted]
        loglik = logits.log_softmax(-1).gather(1, row.tokens[:, 1:][row.predicted][:, None]).sum()
        yield dict(zip(weights, torch.autograd.grad(loglik, list(weights.values())), strict=True))
    for weight in weights.values():
        weight.requires_grad_(False)


def distance(a: Direction, b: Direction) -> float:
    return norm(minus(a, b)) / norm(b)


def test_diagonal_is_autograds_second_moments() -> None:
    model, rows = Tiny(), rows_of()
    weights = select_parameters(model.network, "all")
    gradients = list(example_gradients(model, weights, rows))
    curvature = diagonal(model, weights, rows)
    blocks = curvature.blocks
    for name in weights:
        exact = torch.stack([gradient[name].square() for gradient in gradients]).mean(0)
        if exact.ndim > 1:  # positions that no row reaches take the mean of the others
            unmoved = exact.eq(0).all(1)
            assert unmoved.any() == (name == "body.positions.weight")
            exact = torch.where(unmoved[:, None], exact[~unmoved].mean(0), exact)
        assert torch.allclose(blocks[name].eigenvalues, exact, rtol=1e-10)
    direction = random_direction(weights)
    damped = {
        n: d / (blocks[n].eigenvalues + 0.1 * blocks[n].eigenvalues.mean())
        for n, d in direction.items()
    }
    assert distance(curvature.solve(direction, 0.1), damped) < 1e-12


def dense_ekfac(model: Tiny, name: str, weight: Tensor, rows: list[Batch]) -> Tensor:
    """(U ⊗ V) diag(mean (Uᵀ G V)²) (U ⊗ V)ᵀ as a matrix over vec(W), from layer inputs and output
    gradients."""
    module = model.network.get_submodule(name.removesuffix(".weight"))
    left, right, gradients = torch.zeros(2), torch.zeros(2), list[Tensor]()
    for row in rows:
        seen: dict[str, Tensor] = {}
        hook = module.register_forward_hook(lambda m, i, o, s=seen: s.update(x=i[0].detach(), y=o))
        weight.requires_grad_(True)
        logits = model.logits(model.hidden(row))[:, :-1][row.predicted]
        loglik = -functional.cross_entropy(
            logits, row.tokens[:, 1:][row.predicted], reduction="sum"
        )
        g, gradient = torch.autograd.grad(loglik, [seen["y"], weight])
        hook.remove()
        weight.requires_grad_(False)
        g, x = g[0, row.real[0]], seen["x"][0, row.real[0]]
        left = g.T @ g if left.ndim == 1 else left + g.T @ g
        right = x.T @ x if right.ndim == 1 else right + x.T @ x
        gradients.append(gradient)
    basis = torch.kron(torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1])
    values = torch.stack([(basis.T @ gradient.flatten()).square() for gradient in gradients]).mean(
        0
    )
    return basis @ torch.diag(values) @ basis.T


def test_ekfac_is_a_dense_construction_of_the_same_approximation() -> None:
    model, rows = Tiny(), rows_of(7)
    weights = select_parameters(model.network, PATTERN)
    direction = random_direction(weights)
    solved = ekfac(model, weights, rows).solve(direction, 0.1)
    matrices = [name for name, w in weights.items() if w.ndim == 2]
    assert len(matrices) == 4 and len(weights) == 10
    for name in matrices:
        dense = dense_ekfac(model, name, weights[name], rows)
        damping = 0.1 * dense.trace() / len(dense)
        exact = torch.linalg.solve(
            dense + damping * torch.eye(len(dense)), direction[name].flatten()
        )
        assert torch.allclose(
            solved[name].flatten(), exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max())
        )
    exact = diagonal(model, weights, rows).solve(direction, 0.1)
    for name in set(weights) - set(matrices):
        assert torch.allclose(solved[name], exact[name], rtol=1e-9)


def test_padding_is_no_part_of_ekfac() -> None:
    model, padded = Tiny(), batch_of(6, 12)
    weights = select_parameters(model.network, PATTERN)
    assert not padded.real.all()
    rows = [
        Batch(tokens[None, real], real[None, real], supervised[None, real])
        for tokens, real, supervised in zip(
            padded.tokens, padded.real, padded.supervised, strict=True
        )
    ]
    direction = random_direction(weights)
    one_by_one, together = (
        ekfac(model, weights, batches).solve(direction, 0.1) for batches in (rows, [padded])
    )
    assert distance(together, one_by_one) < 1e-9


def test_curvatures_are_looked_up_by_the_names_of_the_option_and_flat_changes_nothing() -> None:
    kinds = {option.name: option for option in options_of(ScoreConfig)}
    assert set(kinds["curvature"].choices) == set(CURVATURES)
    model = Tiny()
    weights = select_parameters(model.network, PATTERN)
    direction = random_direction(weights)
    assert CURVATURES["flat"](model, weights, rows_of(), 0).solve(direction, 0.1) is direction


def test_labels_are_drawn_from_the_model_by_a_seed() -> None:
    model, rows = Tiny(), rows_of()
    weights = select_parameters(model.network, PATTERN)
    direction = random_direction(weights)
    first, again, another = (
        diagonal(model, weights, rows, seed).solve(direction, 0.1) for seed in (0, 0, 1)
    )
    assert distance(first, again) == 0 < distance(first, another)
