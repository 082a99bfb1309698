"""Curvature: what the gradient of the gain is divided by, once for each run: d = (H + λ)⁻¹ g.

    H = mean of ∇loglik ∇loglikᵀ over rows    labels drawn from the model: the Fisher, here also Gauss-Newton's matrix;
                                              labels as given: the empirical Fisher
    diagonal   the diagonal of H              eigenvalues = mean of squared gradients
    ekfac      (U ⊗ V) Λ (U ⊗ V)ᵀ             for each matrix, whose gradient is Σ_t l_t r_tᵀ; U, V: eigenvectors of
                                              Σ l lᵀ and Σ r rᵀ, Λ = mean of (Uᵀ ∇ V)²        (arXiv 1806.03884)
    cg         H itself                       by conjugate gradients on H v = mean of Jᵀ (diag p − p pᵀ) J v

Damping: λ = damping · mean eigenvalue, of each weight on its own. Choices made here: eigenvectors
in float64; of fused experts each has a basis, from its gradients; vectors, embeddings and matrices
with a side above `SIDE` keep a diagonal; rows of it that no example moved, such as words that none
holds, take the mean of the others; a weight whose gradients are all zero moves nothing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from prism_select.core.layers import (
    Direction,
    Inputs,
    Owner,
    Parameters,
    is_matrix,
    owners,
    sides,
    swapped,
    watching,
)
from prism_select.core.likelihood import Batch, LanguageModel, backward
from prism_select.core.target_gradient import differentiable, dot, minus, norm

__all__ = ["Block", "Blocks", "GaussNewton", "diagonal", "ekfac", "solve"]

SIDE = 8192


@dataclass(frozen=True, slots=True)
class Block:
    """The curvature of one weight: an eigenvalue for each number, in a basis of its rows and one of
    its columns where there are any."""

    eigenvalues: Float[Tensor, "*shape"]
    left: Float[Tensor, "*experts rows rows"] | None = None
    right: Float[Tensor, "*experts columns columns"] | None = None

    def solve(self, gradient: Tensor, damping: float) -> Tensor:
        damped = self.eigenvalues + damping * self.eigenvalues.mean()
        if self.left is None or self.right is None:
            return torch.where(damped > 0, gradient / damped, 0)
        moved = self.left.mT @ gradient @ self.right
        return self.left @ torch.where(damped > 0, moved / damped, 0) @ self.right.mT


Blocks: TypeAlias = Mapping[str, Block]


def solve(blocks: Blocks, direction: Direction, damping: float) -> Direction:
    return {name: blocks[name].solve(value, damping) for name, value in direction.items()}


def _gradients(
    model: LanguageModel, weights: Parameters, rows: Sequence[Batch], seed: int | None
) -> Iterator[Mapping[str, Tensor]]:
    """∇loglik of each example without its padding, in float32 or better; a seed draws its labels
    from the model."""
    device = rows[0].tokens.device
    draw = None if seed is None else torch.Generator(device).manual_seed(seed)
    with differentiable(weights):
        for batch in rows:
            for place, real in enumerate(batch.real):
                row = Batch(
                    *(
                        part[place : place + 1, real]
                        for part in (batch.tokens, batch.real, batch.supervised)
                    )
                )
                backward(model, row, torch.ones(1, device=device), draw=draw)
                yield {n: w.grad.to(_wide(w)) for n, w in weights.items() if w.grad is not None}
                for weight in weights.values():
                    weight.grad = None


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def diagonal(
    model: LanguageModel, weights: Parameters, rows: Sequence[Batch], seed: int | None = None
) -> Blocks:
    total = {name: torch.zeros_like(w, dtype=_wide(w)) for name, w in weights.items()}
    for gradient in _gradients(model, weights, rows, seed):
        for name, value in gradient.items():
            total[name].addcmul_(value, value)
    return {name: _by_number(value / sum(map(len, rows))) for name, value in total.items()}


def ekfac(
    model: LanguageModel, weights: Parameters, rows: Sequence[Batch], seed: int | None = None
) -> Blocks:
    """Two passes over the rows: for the bases, then for the eigenvalues in them."""
    bases = _bases(model, weights, rows, seed)
    total = {name: torch.zeros_like(w, dtype=_wide(w)) for name, w in weights.items()}
    moved: dict[str, Tensor] = {}

    def turn(name: str, left: Tensor, right: Tensor) -> None:
        moved[name] = moved.get(name, 0) + (left @ bases[name][0]).mT @ (right @ bases[name][1])

    for gradient in _uses(model, weights, rows, seed, turn):
        for name, value in gradient.items():
            moved[name] = bases[name][0].mT @ value @ bases[name][1] if name in bases else value
        for name, value in moved.items():
            total[name].addcmul_(value, value, value=1 / sum(map(len, rows)))
        moved.clear()
    return {
        name: Block(value, *bases[name]) if name in bases else _by_number(value)
        for name, value in total.items()
    }


def _by_number(moments: Tensor) -> Block:
    """A diagonal from the second moments of a weight's numbers."""
    still = (
        moments.flatten(1).eq(0).all(1)
        if moments.ndim > 1
        else torch.zeros(len(moments), dtype=torch.bool)
    )
    if still.any() and not still.all():
        moments = torch.where(
            still.view(-1, *[1] * (moments.ndim - 1)), moments[~still].mean(0), moments
        )
    return Block(moments)


def _bases(
    model: LanguageModel, weights: Parameters, rows: Sequence[Batch], seed: int | None
) -> Mapping[str, tuple[Tensor, Tensor]]:
    factors: dict[str, tuple[Tensor, Tensor]] = {}

    def add(name: str, left: Tensor, right: Tensor) -> None:
        before = factors.get(name, (0, 0))
        factors[name] = (before[0] + left.mT @ left, before[1] + right.mT @ right)

    based = {
        n: w for n, w in weights.items() if w.ndim == 3 or (w.ndim == 2 and max(w.shape) <= SIDE)
    }
    for gradient in _uses(model, based, rows, seed, add) if based else ():
        for name, value in gradient.items():
            if value.ndim == 3:
                add(name, value.mT, value)
    return {
        name: (_eigenvectors(left), _eigenvectors(right)) for name, (left, right) in factors.items()
    }


def _eigenvectors(factor: Tensor) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(factor.double())[1]
    return vectors.to(factor)


def _uses(
    model: LanguageModel,
    weights: Parameters,
    rows: Sequence[Batch],
    seed: int | None,
    use: Callable[[str, Tensor, Tensor], None],
) -> Iterator[Mapping[str, Tensor]]:
    """Example by example: `use` gets the name of each matrix and both sides of its gradient, once
    for each use; the gradients of all other weights are returned."""
    every = owners(model.network, weights)
    holders = [owner for owner in every if is_matrix(owner)]
    other = {name for owner in every if owner not in holders for name in owner.weights.values()}
    other |= {name for owner in holders for key, name in owner.weights.items() if key != "weight"}
    other |= {name for name, weight in weights.items() if max(weight.shape) > SIDE}
    holders = [owner for owner in holders if owner.weights["weight"] not in other]

    def visit(owner: Owner, inputs: Inputs, _: object, gradient: Tensor) -> None:
        left, right = (
            side.flatten(0, -2).to(_wide(side)) for side in sides(owner, inputs, gradient)
        )
        use(owner.weights["weight"], left, right)

    with watching(holders, [], visit):
        yield from _gradients(model, {name: weights[name] for name in other}, rows, seed)


class GaussNewton:
    """H itself. `blocks`, fitted on the same rows, give each weight's mean eigenvalue and
    precondition the solve."""

    def __init__(
        self, model: LanguageModel, weights: Parameters, rows: Sequence[Batch], blocks: Blocks
    ) -> None:
        self.model, self.weights, self.rows, self.blocks = model, weights, rows, blocks
        self.holders = owners(model.network, weights)

    def times(self, vector: Direction) -> Direction:
        """H · vector."""
        total = {name: torch.zeros_like(value) for name, value in vector.items()}
        with differentiable(self.weights):
            for batch in self.rows:
                self._descend(
                    batch, {name: value.to(self.weights[name]) for name, value in vector.items()}
                )
                for name, weight in self.weights.items():
                    if weight.grad is not None:
                        total[name] += weight.grad / sum(map(len, self.rows))
                        weight.grad = None
        return total

    def _descend(self, batch: Batch, vector: Direction) -> None:
        """Adds H · vector of one batch, times its size, to the weights' gradients."""
        with self._dual(vector):
            moved = forward_ad.unpack_dual(
                self.model.logits(self.model.hidden(batch)[:, :-1][batch.predicted])
            )
        chance = moved.primal.softmax(-1, dtype=_wide(moved.primal))
        push = chance * (moved.tangent - (chance * moved.tangent).sum(-1, keepdim=True))
        (
            self.model.logits(self.model.hidden(batch)[:, :-1][batch.predicted]) * push
        ).sum().backward()

    @contextmanager
    def _dual(self, vector: Direction) -> Iterator[None]:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            duals = {
                name: forward_ad.make_dual(w.detach(), vector[name])
                for name, w in self.weights.items()
            }
            with swapped(self.holders, duals):
                yield

    def solve(
        self, direction: Direction, damping: float, tolerance: float = 1e-4, steps: int = 200
    ) -> Direction:
        """By preconditioned conjugate gradients, until the residual is `tolerance` times the
        direction or `steps` are done; `residual` keeps that ratio."""
        ridge = {name: damping * block.eigenvalues.mean() for name, block in self.blocks.items()}
        found: Direction = {name: torch.zeros_like(value) for name, value in direction.items()}
        left: Direction = direction
        step = moved = solve(self.blocks, left, damping)
        for _ in range(steps):
            self.residual = norm(left) / (norm(direction) or 1.0)
            if self.residual <= tolerance:
                break
            product = {
                name: value + ridge[name] * step[name] for name, value in self.times(step).items()
            }
            size = dot(left, moved) / dot(step, product)
            before = dot(left, moved)
            found, left = minus(found, step, -size), minus(left, product, size)
            moved = solve(self.blocks, left, damping)
            step = minus(moved, step, -dot(left, moved) / before)
        return found
