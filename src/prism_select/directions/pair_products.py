"""Pair products: K_qr = D_q · D_r, inner products of the pairs' own gradients, exactly.

    D_q = ∇mean_loglik(chosen) − r_q ∇mean_loglik(rejected)

    a matrix           D_q = Σ_t l_t r_tᵀ over the tokens of the pair's two answers: factors l, r
                       are collected in a pass over the pairs; then D of all pairs is formed for
                       some rows of the matrix at a time, and multiplied with itself
    other parameters   D of each pair by autograd, one row at a time: norms, biases, experts

Choices made here:
- factors of as many matrices as fit into `FACTORS` are collected in one pass; a matrix that does
  not fit takes several passes, a range of its rows in each;
- products are formed in float32 or better and add up in float64.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prism_select.core.gradients import differentiable, take_gradients, wide_dtype
from prism_select.core.layers import (
    Inputs,
    Owner,
    Parameters,
    has_formula,
    outer_factors,
    owners,
    slice_examples,
    watching,
)
from prism_select.core.likelihood import Batch, LanguageModel, backward
from prism_select.core.target_gradient import Side

__all__ = ["pair_products"]

FACTORS = 2**30  # bytes of the factors that one pass collects
FORMED = 2**26  # numbers of all pairs' gradients that are formed at a time: 256 MB in float32


class Piece(NamedTuple):
    """Rows start to stop of a matrix."""

    name: str
    start: int
    stop: int


@dataclass
class Factors:
    """Of one piece: factors token by token, and the pair of each token. `left` of an embedding are
    the rows of its tokens, counted from the start of the piece."""

    pairs: list[Int[Tensor, " tokens"]] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)
    right: list[Float[Tensor, "tokens columns"]] = field(default_factory=list)


def pair_products(
    model: LanguageModel, weights: Parameters, sides: tuple[Side, Side], ratio: Sequence[float]
) -> Float[Tensor, "pairs pairs"]:
    """K in float64 on the CPU. `ratio` is r of each pair."""
    selected = owners(model.network, weights)
    with_formula = _with_formula(selected)
    products = torch.zeros(len(ratio), len(ratio), dtype=torch.float64)
    tokens = sum(int(batch.real.sum()) for side in sides for batch in side.batches)
    matrices = {name: weights[name] for name in weights if name in with_formula}
    for pieces in _passes(matrices, tokens):
        names = {piece.name for piece in pieces}
        users = [o for o in selected if o.weights.get("weight") in names]
        collector = Collector(users, pieces, weights, sides, ratio)
        for piece, factors in collector.collected(model):
            products += _piece_products(piece, factors, weights[piece.name], len(ratio))
    others = {name: weights[name] for name in weights if name not in with_formula}
    for some in _fitting(others, len(ratio)):
        differences = _differences(model, some, sides, ratio)
        products += (differences @ differences.T).double()
    return products


def _with_formula(selected: Sequence[Owner]) -> set[str]:
    """The matrices whose gradient is Σ l rᵀ in all their uses."""
    uses = defaultdict[str, list[bool]](list)
    for owner in selected:
        for key, name in owner.weights.items():
            uses[name].append(key == "weight" and has_formula(owner.module))
    return {name for name, formulas in uses.items() if all(formulas)}


def _passes(matrices: Parameters, tokens: int) -> Iterator[list[Piece]]:
    pieces, size = list[Piece](), 0
    for name, weight in matrices.items():
        rows, columns = weight.shape
        bytes_of_row = tokens * weight.element_size()
        step = max(1, min(rows, FACTORS // bytes_of_row - columns))
        for start in range(0, rows, step):
            piece = Piece(name, start, min(start + step, rows))
            needed = bytes_of_row * (piece.stop - start + columns)
            if pieces and size + needed > FACTORS:
                yield pieces
                pieces, size = [], 0
            pieces.append(piece)
            size += needed
    if pieces:
        yield pieces


class Collector:
    """Collects the factors of some pieces in one pass over both sides of the pairs."""

    def __init__(
        self,
        users: Sequence[Owner],
        pieces: Sequence[Piece],
        weights: Parameters,
        sides: tuple[Side, Side],
        ratio: Sequence[float],
    ) -> None:
        self.users, self.sides, self.weights = users, sides, weights
        self.factors = {piece: Factors() for piece in pieces}
        self._scales = [1.0] * len(ratio), [-times for times in ratio]
        self._pairs, self._examples = list[int](), torch.zeros(0).long()

    def collected(self, model: LanguageModel) -> Iterator[tuple[Piece, Factors]]:
        with watching(self.users, [], self._visit):
            for side, scales in zip(self.sides, self._scales, strict=True):
                for batch, pairs in side:
                    self._pairs = pairs
                    scale = torch.tensor([scales[pair] for pair in pairs], dtype=torch.float64)
                    scale = scale.to(batch.tokens.device) / batch.counts
                    backward(model, batch, scale, self._set_examples)
        yield from self.factors.items()

    def _set_examples(self, examples: Tensor) -> None:
        self._examples = examples

    def _visit(self, owner: Owner, inputs: Inputs, _: object, gradient: Tensor) -> None:
        examples = slice_examples(self._examples, len(self._pairs), gradient)
        assert examples is not None
        if len(examples) != len(self._examples):  # a slice is an example: repeated for its tokens
            examples = examples.repeat_interleave(gradient[0].numel() // gradient.shape[-1])
        moved = gradient.flatten(0, -2).ne(0).any(1)  # padding has no gradient
        pairs = torch.tensor(self._pairs)[examples.cpu()][moved.cpu()]
        name = owner.weights["weight"]
        for piece, factors in self.factors.items():
            if piece.name == name:
                left, right = _factors(owner, inputs, gradient, moved, piece)
                factors.pairs.append(pairs)
                factors.left.append(left)
                factors.right.append(right)


def _factors(
    owner: Owner, inputs: Inputs, gradient: Tensor, moved: Tensor, piece: Piece
) -> tuple[Tensor, Tensor]:
    """l, cut to the rows of the piece, and r, of the tokens that have a gradient."""
    if type(owner.module) is nn.Embedding:
        module: Any = owner.module
        rows = inputs[0].flatten()[moved]
        outside = (rows < piece.start) | (rows >= piece.stop)
        if module.padding_idx is not None:
            outside |= rows == module.padding_idx
        return torch.where(outside, -1, rows - piece.start), gradient.flatten(0, -2)[moved]
    left, right = outer_factors(owner, inputs, gradient)
    left = left.flatten(0, -2)[moved, piece.start : piece.stop]
    return left.clone(), right.flatten(0, -2)[moved]


def _piece_products(
    piece: Piece, factors: Factors, weight: Tensor, count: int
) -> Float[Tensor, "pairs pairs"]:
    """The products of all pairs' gradients in the rows of one piece."""
    products = torch.zeros(count, count, dtype=torch.float64)
    columns, dtype = weight.shape[1], wide_dtype(weight)
    step = max(1, FORMED // (count * columns))
    answers = list(_by_pair(factors))
    for start in range(0, piece.stop - piece.start, step):
        stop = min(start + step, piece.stop - piece.start)
        formed = weight.new_zeros(count, stop - start, columns, dtype=dtype)
        for pair, left, right in answers:
            _add(formed[pair], left, right.to(dtype), start, stop)
        flat = formed.flatten(1)
        products += (flat @ flat.T).double().cpu()
    return products


def _by_pair(factors: Factors) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The factors of each pair's tokens, batch by batch."""
    for pairs, left, right in zip(factors.pairs, factors.left, factors.right, strict=True):
        for pair in pairs.unique().tolist():
            tokens = (pairs == pair).to(right.device)
            yield pair, left[tokens], right[tokens]


def _add(total: Tensor, left: Tensor, right: Tensor, start: int, stop: int) -> None:
    """Adds Σ_t l_t r_tᵀ of some tokens, for rows start to stop of a piece."""
    if left.ndim > 1:
        total += left[:, start:stop].to(right.dtype).mT @ right
        return
    inside = (left >= start) & (left < stop)
    total.index_add_(0, left[inside] - start, right[inside])


def _fitting(parameters: Parameters, pairs: int) -> Iterator[Parameters]:
    """Parameters in groups whose gradients of all pairs take at most FORMED numbers."""
    group, size = dict[str, nn.Parameter](), 0
    for name, parameter in parameters.items():
        if group and size + parameter.numel() * pairs > FORMED:
            yield group
            group, size = {}, 0
        group[name] = parameter
        size += parameter.numel() * pairs
    if group:
        yield group


def _differences(
    model: LanguageModel, weights: Parameters, sides: tuple[Side, Side], ratio: Sequence[float]
) -> Float[Tensor, "pairs numbers"]:
    """D of each pair, one row at a time."""
    chosen, rejected = (_rows_by_pair(side) for side in sides)
    with differentiable(weights):
        differences = [
            _mean_gradient(model, weights, chosen[pair])
            - times * _mean_gradient(model, weights, rejected[pair])
            for pair, times in enumerate(ratio)
        ]
    return torch.stack(differences)


def _rows_by_pair(side: Side) -> Mapping[int, Batch]:
    return {
        pair: batch.rows(slice(index, index + 1))
        for batch, pairs in side
        for index, pair in enumerate(pairs)
    }


def _mean_gradient(
    model: LanguageModel, weights: Parameters, row: Batch
) -> Float[Tensor, " numbers"]:
    """∇mean_loglik of one row, flat; zero for parameters that it does not reach."""
    backward(model, row, 1 / row.counts.double())
    gradients = {name: g.to(wide_dtype(g)).flatten() for name, g in take_gradients(weights)}
    zeros = {name: w.new_zeros(w.numel(), dtype=wide_dtype(w)) for name, w in weights.items()}
    return torch.cat([gradients.get(name, zero) for name, zero in zeros.items()]).cpu()
