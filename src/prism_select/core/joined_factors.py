"""Joined factors: several directions of low rank, through two products for all of them.

    D_k = l_k r_k      y = W x, g = ∂loglik/∂y: score along D_k = Σ_t Σ_j (l_kᵀ g_t)_j (r_k x_t)_j

The factors of all directions stand side by side, so that a matrix of a model costs two products of
as many columns as the ranks add up to, and nothing of the size of its output is made.

Choices made here:
- an embedding looks its rows of l up; a bias is its own factor;
- a matrix that one of the directions has in full is not joined: it goes by its tangent.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from prism_select.core.blocks import without_padding
from prism_select.core.layers import Factors, Gradient, Inputs, Owner, is_matrix, outer_factors

__all__ = ["Joined", "join_factors", "joined_products"]


class Joined(NamedTuple):
    """One parameter's factors along the directions that are numbered in `directions`; `right` is
    None of a bias."""

    directions: Sequence[int]
    ranks: Sequence[int]
    left: Float[Tensor, "rows columns"]
    right: Float[Tensor, "columns width"] | None = None


def join_factors(holders: Sequence[Owner], unit: Sequence[dict[str, Any]]) -> dict[str, Joined]:
    """Of each matrix that all directions which move it have in factors, and of its bias. The
    factors in `unit` become views, so that nothing is held twice."""
    found = dict[str, Joined]()
    for owner in holders:
        name, bias = owner.weights.get("weight", ""), owner.weights.get("bias", "")
        of_matrix = [(k, d[name]) for k, d in enumerate(unit) if name in d]
        if not of_matrix or not (is_matrix(owner) or owner.scale):
            continue
        if not all(isinstance(move, Factors) for _, move in of_matrix):
            continue
        if name not in found:
            found[name] = _join(name, of_matrix, unit)
        of_bias = [(k, d[bias]) for k, d in enumerate(unit) if bias in d]
        if of_bias:
            numbers, vectors = zip(*of_bias, strict=True)
            found[bias] = Joined(numbers, [1] * len(numbers), torch.stack(vectors, 1))
    return found


def _join(
    name: str, moves: Sequence[tuple[int, Factors]], unit: Sequence[dict[str, Any]]
) -> Joined:
    numbers = [k for k, _ in moves]
    ranks = [len(factors.right) for _, factors in moves]
    left, right = (torch.cat([f[side] for _, f in moves], 1 - side) for side in (0, 1))
    for k, rank, stop in zip(numbers, ranks, accumulate(ranks), strict=True):
        own = slice(stop - rank, stop)
        unit[k][name] = Factors(left[:, own], right[own])
    return Joined(numbers, ranks, left, right)


def joined_products(
    owner: Owner,
    inputs: Inputs,
    gradient: Gradient,
    joined: Mapping[str, Joined],
    slices: int,
) -> Iterator[tuple[Sequence[int], Float[Tensor, "slices directions"]]]:
    """Numbers of directions, and what each of `slices` equal pieces of the gradient adds along
    them: of the matrix, and of the bias."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    for name in owner.weights.values():
        if name not in joined:
            continue
        own = joined[name]
        left, right = _sides(owner, inputs, gradient.to(own.left.dtype), own)
        terms = left.to(wide) if right is None else left.to(wide) * right.to(wide)
        sums = terms.reshape(slices, -1, terms.shape[-1]).sum(1)
        yield own.directions, torch.stack([p.sum(1) for p in sums.split([*own.ranks], 1)], 1)


def _sides(
    owner: Owner, inputs: Inputs, gradient: Gradient, own: Joined
) -> tuple[Tensor, Tensor | None]:
    """lᵀ g and r x of each token."""
    if own.right is None:
        return gradient @ own.left, None
    if owner.scale:
        rows = owner.scale * functional.embedding(inputs[0], own.left)
        (rows,) = without_padding(owner.module, inputs, [rows])
        return rows, gradient @ own.right.mT
    left, right = outer_factors(owner, inputs, gradient)
    return left @ own.left, right @ own.right.mT
