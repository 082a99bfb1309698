"""Each curvature against a dense construction of what it says it is, on a float64 transformer."""

from collections.abc import Iterator, Mapping

import torch
from tiny import Tiny, batch_of
from torch import Tensor
from torch.nn import functional

from prism_select.core.layers import Direction, Parameters, owners, swapped
from prism_select.core.likelihood import Batch
from prism_select.core.target_gradient import minus, norm
from prism_select.directions.curvature import GaussNewton, diagonal, ekfac, solve
from prism_select.models.layer_selection import select_parameters

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


def close(a: Direction, b: Direction) -> float:
    return norm(minus(a, b)) / norm(b)


def test_diagonal_is_autograds_second_moments() -> None:
    model, rows = Tiny(), rows_of()
    weights = select_parameters(model.network, "all")
    every = list(example_gradients(model, weights, rows))
    blocks = diagonal(model, weights, rows)
    for name in weights:
        exact = torch.stack([each[name].square() for each in every]).mean(0)
        if exact.ndim > 1:  # places that no row is long enough for take the mean of the others
            still = exact.eq(0).all(1)
            assert still.any() == (name == "body.places.weight")
            exact = torch.where(still[:, None], exact[~still].mean(0), exact)
        assert torch.allclose(blocks[name].eigenvalues, exact, rtol=1e-10)
    direction = random_direction(weights)
    damped = {
        n: d / (blocks[n].eigenvalues + 0.1 * blocks[n].eigenvalues.mean())
        for n, d in direction.items()
    }
    assert close(solve(blocks, direction, 0.1), damped) < 1e-12


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
        g, own = torch.autograd.grad(loglik, [seen["y"], weight])
        hook.remove()
        weight.requires_grad_(False)
        g, x = g[0, row.real[0]], seen["x"][0, row.real[0]]
        left = g.T @ g if left.ndim == 1 else left + g.T @ g
        right = x.T @ x if right.ndim == 1 else right + x.T @ x
        gradients.append(own)
    basis = torch.kron(torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1])
    values = torch.stack([(basis.T @ own.flatten()).square() for own in gradients]).mean(0)
    return basis @ torch.diag(values) @ basis.T


def test_ekfac_is_a_dense_construction_of_the_same_approximation() -> None:
    model, rows = Tiny(), rows_of(7)
    weights = select_parameters(model.network, PATTERN)
    blocks, direction = ekfac(model, weights, rows), random_direction(weights)
    solved = solve(blocks, direction, 0.1)
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
    exact = solve(diagonal(model, weights, rows), direction, 0.1)
    for name in set(weights) - set(matrices):
        assert torch.allclose(solved[name], exact[name], rtol=1e-9)


def test_padding_is_no_part_of_ekfac() -> None:
    model, padded = Tiny(), batch_of(6, 12)
    weights = select_parameters(model.network, PATTERN)
    assert not padded.real.all()
    rows = [
        Batch(*(part[None, real] for part in (tokens, real, supervised)))
        for tokens, real, supervised in zip(
            padded.tokens, padded.real, padded.supervised, strict=True
        )
    ]
    direction = random_direction(weights)
    one_by_one, together = (
        solve(ekfac(model, weights, each), direction, 0.1) for each in (rows, [padded])
    )
    assert close(together, one_by_one) < 1e-9


def test_cg_is_a_dense_gauss_newton_solve() -> None:
    model, rows = Tiny(), rows_of(4)
    weights = select_parameters(model.network, r"blocks\.3\.(out|before|down\.bias)")
    direction = random_direction(weights)
    blocks = diagonal(model, weights, rows)
    newton = GaussNewton(model, weights, rows, blocks)
    found = newton.solve(direction, 0.1, 1e-10)
    assert newton.residual <= 1e-10
    sizes = [w.numel() for w in weights.values()]
    matrix = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    values = tuple(weights.values())
    for row in rows:

        def logits(*given: Tensor, row: Batch = row) -> Tensor:
            with swapped(owners(model.network, weights), dict(zip(weights, given, strict=True))):
                return model.logits(model.hidden(row))[:, :-1][row.predicted]

        jacobian = torch.cat(
            [
                part.flatten(2)
                for part in torch.func.jacrev(logits, tuple(range(len(values))))(*values)
            ],
            2,
        )
        chance = logits(*values).softmax(-1)
        middle = torch.diag_embed(chance) - chance[:, :, None] * chance[:, None]
        matrix += torch.einsum("nvi,nvw,nwj->ij", jacobian, middle, jacobian) / len(rows)
    ridge = torch.cat(
        [0.1 * blocks[n].eigenvalues.mean() * torch.ones(w.numel()) for n, w in weights.items()]
    )
    exact = torch.linalg.solve(
        matrix + torch.diag(ridge), torch.cat([direction[n].flatten() for n in weights])
    )
    flat = torch.cat([found[n].flatten() for n in weights])
    assert float((flat - exact).norm() / exact.norm()) < 1e-6
