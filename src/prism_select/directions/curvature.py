"""Curvature: the Hessian approximations that a direction is divided by: d = (H + λ)⁻¹ g.

    H = mean over rows of ∇loglik ∇loglikᵀ    labels drawn from the model: the Fisher matrix, which
                                              is here the Gauss-Newton matrix too

    flat        H = 0, and d = g
    pairs       H = mean over pairs of π D Dᵀ, of the target's own gradients: pair_curvature.py
    diagonal    the diagonal of H         eigenvalues = mean of squared gradients
    ekfac       (U ⊗ V) Λ (U ⊗ V)ᵀ        EK-FAC (arXiv 1806.03884), for a matrix whose gradient is
                                          Σ_t l_t r_tᵀ: U, V are the eigenvectors of Σ l lᵀ and of
                                          Σ r rᵀ, Λ = mean of (Uᵀ ∇ V)²
    adam        Adam's √v̂ at a checkpoint: adam_moments.py

    λ = damping · mean eigenvalue, of each parameter on its own

Choices made here:
- eigenvectors are computed in float64;
- each expert of a fused module has a basis of its own, from its gradients;
- vectors, embeddings, and matrices with a side above `SIDE` have a diagonal;
- rows of a diagonal that no example moved, such as words that none holds, take the mean of the
  others;
- a parameter whose gradients are all zero does not move.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from prism_select.core.gradients import differentiable, take_gradients, wide_dtype, zero_sum
from prism_select.core.layers import (
    Direction,
    Inputs,
    Owner,
    Parameters,
    is_matrix,
    outer_factors,
    owners,
    watching,
)
from prism_select.core.likelihood import Batch, LanguageModel, backward

__all__ = [
    "CURVATURES",
    "Block",
    "BlockCurvature",
    "Curvature",
    "Flat",
    "diagonal",
    "ekfac",
    "flat",
]

SIDE = 8192


class Curvature(Protocol):
    """A fitted Hessian approximation."""

    @property
    def rows(self) -> int:
        """How many it was fitted to."""

    @property
    def diagonal_matrices(self) -> Sequence[str]:
        """Matrices of which the diagonal alone is known."""

    def solve(self, direction: Direction, damping: float) -> Direction:
        """(H + λ)⁻¹ direction"""


class Flat:
    """No curvature: every direction stays as it is."""

    rows: int = 0
    diagonal_matrices: Sequence[str] = ()

    def solve(self, direction: Direction, damping: float) -> Direction:
        return direction


@dataclass(frozen=True, slots=True)
class Block:
    """The curvature of one parameter: an eigenvalue for each number, in the basis `left` of its
    rows and `right` of its columns; without them, in its own."""

    eigenvalues: Float[Tensor, "*shape"]
    left: Float[Tensor, "*experts rows rows"] | None = None
    right: Float[Tensor, "*experts columns columns"] | None = None

    def solve(self, gradient: Tensor, damping: float) -> Tensor:
        damped = self.eigenvalues + damping * self.eigenvalues.mean()
        if self.left is None or self.right is None:
            return torch.where(damped > 0, gradient / damped, 0)
        rotated = self.left.mT @ gradient @ self.right
        return self.left @ torch.where(damped > 0, rotated / damped, 0) @ self.right.mT


@dataclass(frozen=True)
class BlockCurvature:
    """A block for each parameter; between parameters H is taken as zero."""

    blocks: Mapping[str, Block]
    rows: int

    @property
    def diagonal_matrices(self) -> Sequence[str]:
        matrices = {
            name: block for name, block in self.blocks.items() if block.eigenvalues.ndim > 1
        }
        return sorted(name for name, block in matrices.items() if block.left is None)

    def solve(self, direction: Direction, damping: float) -> Direction:
        return {n: self.blocks[n].solve(value, damping) for n, value in direction.items()}


def flat(
    model: LanguageModel, weights: Parameters, rows: Sequence[Batch], seed: int | None = None
) -> Flat:
    return Flat()


def diagonal(
    model: LanguageModel, weights: Parameters, rows: Sequence[Batch], seed: int | None = None
) -> BlockCurvature:
    total = zero_sum(weights)
    for gradient in _example_gradients(model, weights, rows, seed):
        for name, value in gradient.items():
            total[name].addcmul_(value, value)
    count = sum(map(len, rows))
    blocks = {name: _diagonal_block(value / count) for name, value in total.items()}
    return BlockCurvature(blocks, count)


def ekfac(
    model: LanguageModel, weights: Parameters, rows: Sequence[Batch], seed: int | None = None
) -> BlockCurvature:
    """Two passes over the rows: one for the bases, one for the eigenvalues in them."""
    bases = _bases(model, weights, rows, seed)
    count = sum(map(len, rows))
    total = zero_sum(weights)
    rotated: dict[str, Tensor] = {}  # one example's gradients, in the bases

    def rotate(name: str, left: Tensor, right: Tensor) -> None:
        u, v = bases[name]
        rotated[name] = rotated.get(name, 0) + (left @ u).mT @ (right @ v)

    for gradient in _matrix_uses(model, weights, rows, seed, rotate):
        for name, value in gradient.items():
            rotated[name] = value
            if name in bases:
                u, v = bases[name]
                rotated[name] = u.mT @ value @ v
        for name, value in rotated.items():
            total[name].addcmul_(value, value, value=1 / count)
        rotated.clear()
    blocks = {
        name: Block(value, *bases[name]) if name in bases else _diagonal_block(value)
        for name, value in total.items()
    }
    return BlockCurvature(blocks, count)


Fit: TypeAlias = Callable[[LanguageModel, Parameters, Sequence[Batch], int | None], Curvature]
"""A seed draws the labels from the model; None takes those of the rows (the empirical Fisher)."""


CURVATURES: Mapping[str, Fit] = {
    "flat": flat,
    "pairs": flat,  # divided where the pairs are read: pair_curvature.py
    "adam": flat,  # read from a file: adam_moments.py
    "diagonal": diagonal,
    "ekfac": ekfac,
}


def _example_gradients(
    model: LanguageModel, weights: Parameters, rows: Sequence[Batch], seed: int | None
) -> Iterator[Mapping[str, Tensor]]:
    """∇loglik of each example without its padding, in float32 or better."""
    device = rows[0].tokens.device
    draw = None if seed is None else torch.Generator(device).manual_seed(seed)
    with differentiable(weights):
        for batch in rows:
            for row in _unpadded(batch):
                backward(model, row, torch.ones(1, device=device), draw=draw)
                yield {name: g.to(wide_dtype(g)) for name, g in take_gradients(weights)}


def _unpadded(batch: Batch) -> Iterator[Batch]:
    """Each row of a batch by itself."""
    for index, real in enumerate(batch.real):
        row = batch.rows(slice(index, index + 1))
        yield Batch(row.tokens[:, real], row.real[:, real], row.supervised[:, real])


def _diagonal_block(moments: Tensor) -> Block:
    """From the second moments of a parameter's numbers."""
    if moments.ndim > 1:
        unmoved = moments.flatten(1).eq(0).all(1)
        if unmoved.any() and not unmoved.all():
            mask = unmoved.view(-1, *[1] * (moments.ndim - 1))
            moments = torch.where(mask, moments[~unmoved].mean(0), moments)
    return Block(moments)


def _bases(
    model: LanguageModel, weights: Parameters, rows: Sequence[Batch], seed: int | None
) -> Mapping[str, tuple[Tensor, Tensor]]:
    """U and V of each matrix, and of each matrix of fused experts."""
    moments: dict[str, tuple[Tensor, Tensor]] = {}  # Σ l lᵀ, Σ r rᵀ

    def add(name: str, left: Tensor, right: Tensor) -> None:
        before = moments.get(name, (0, 0))
        moments[name] = (before[0] + left.mT @ left, before[1] + right.mT @ right)

    matrices = {
        n: w for n, w in weights.items() if w.ndim == 3 or (w.ndim == 2 and max(w.shape) <= SIDE)
    }
    for gradient in _matrix_uses(model, matrices, rows, seed, add) if matrices else ():
        for name, value in gradient.items():
            if value.ndim == 3:
                add(name, value.mT, value)
    return {
        name: (_eigenvectors(left), _eigenvectors(right)) for name, (left, right) in moments.items()
    }


def _eigenvectors(moments: Tensor) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(moments.double())[1]
    return vectors.to(moments)


def _matrix_uses(
    model: LanguageModel,
    weights: Parameters,
    rows: Sequence[Batch],
    seed: int | None,
    use: Callable[[str, Tensor, Tensor], None],
) -> Iterator[Mapping[str, Tensor]]:
    """Example by example: `use(name, l, r)` is called for each use of each matrix, without its
    gradient being formed. Yields the gradients of all parameters that are not such matrices."""
    selected = owners(model.network, weights)
    matrices = [owner for owner in selected if is_matrix(owner)]
    formed = {name for name, weight in weights.items() if max(weight.shape) > SIDE}
    for owner in selected:
        for key, name in owner.weights.items():
            if owner not in matrices or key != "weight":
                formed.add(name)
    matrices = [owner for owner in matrices if owner.weights["weight"] not in formed]

    def visit(owner: Owner, inputs: Inputs, _: object, gradient: Tensor) -> None:
        left, right = outer_factors(owner, inputs, gradient)
        left, right = left.flatten(0, -2), right.flatten(0, -2)
        use(owner.weights["weight"], left.to(wide_dtype(left)), right.to(wide_dtype(right)))

    with watching(matrices, [], visit):
        yield from _example_gradients(model, {n: weights[n] for n in formed}, rows, seed)
