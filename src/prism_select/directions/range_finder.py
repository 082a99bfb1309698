"""Range finder: directions of low rank, made without any matrix of full size.

    D = Σ_a v_a ∇mean_loglik(a) = Σ_t v_a(t) l_t r_tᵀ      over the tokens of all answers

    Y = D Ω      Ω (columns, width) random           Q = an orthonormal base of Y
    Z = Dᵀ Q                                         P = that of Z
    Y = D P, Q = that of Y, Z = Dᵀ Q                 D ≈ Q Zᵀ, cut to `rank`

Each line is a pass over the answers, for all matrices and all directions at once (randomized range
finder with a step of subspace iteration, arXiv 0909.4061). Memory: width (rows + columns) numbers a
matrix and direction, in float32 or better. A matrix is all that Linear, Conv1D or an embedding use
alone; whatever the weights of the answers are, the direction follows from them, so all targets,
halves and groups share the passes.

Choices made here:
- gradients of norms and biases add up in the first pass, as they are;
- other parameters (fused experts, matrices that are used past their module) come from autograd, in
  full, with a pass for each direction;
- the width is `MORE` above the rank;
- factors are kept in the dtype of their parameter, in which rows are scored anyway, and all that
  belongs to a parameter is on its device.
"""

from collections.abc import Iterator, Mapping, Set
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from prism_select.core.gradients import wide_dtype, zero_sum
from prism_select.core.layers import (
    Factored,
    Factors,
    Inputs,
    Owner,
    Parameters,
    has_formula,
    owners,
    slice_examples,
    watching,
)
from prism_select.core.likelihood import LanguageModel, backward
from prism_select.core.target_gradient import Side, add_answers
from prism_select.directions.answer_products import (
    Piece,
    answer_factors,
    by_kind,
    own_gradient,
    used_elsewhere,
)

__all__ = ["MORE", "low_rank_directions"]

Stack: TypeAlias = Mapping[str, Float[Tensor, "directions numbers width"]]


def low_rank_directions(
    model: LanguageModel,
    weights: Parameters,
    side: Side,
    coefficients: Float[Tensor, "directions answers"],
    rank: int,
) -> list[Factored]:
    """Σ_a coefficient_a ∇mean_loglik(a) for each row of coefficients; answers are numbered by the
    order of `side`. The same from run to run."""
    return RangeFinder(model, weights, side, coefficients).directions(rank)


MORE = 16


class Step(NamedTuple):
    """A pass: what the matrices are multiplied with, and the sums so far; those of norms and biases
    are `small`."""

    base: Stack
    total: Stack
    small: Stack
    transposed: bool


class RangeFinder:
    def __init__(
        self,
        model: LanguageModel,
        weights: Parameters,
        side: Side,
        coefficients: Float[Tensor, "directions answers"],
    ) -> None:
        self.model, self.weights, self.side = model, weights, side
        self.owners = owners(model.network, weights)
        self.device = next(iter(weights.values())).device
        dtype = wide_dtype(next(iter(weights.values())))
        self.coefficients = coefficients.to(self.device, dtype)
        self.visited, self.lost = set[str](), set[str]()
        self._scales = torch.zeros(0)  # [direction, example] of the batch at hand
        self._examples = torch.zeros(0).long()

    def directions(self, rank: int) -> list[Factored]:
        matrices, small = by_kind(self.owners)
        self.lost = self.weights.keys() - matrices - small
        sums = {name: self.zeros(name, weight.numel()) for name, weight in self.of(small)}
        left = self.bases(self.multiply(self.random(matrices, rank + MORE), False, sums))
        unseen = self.weights.keys() - self.visited - self.lost
        self.lost |= used_elsewhere(self.model, self.weights, self.side, unseen)
        bases = {name: left.pop(name) for name in [*left] if name not in self.lost}
        for transposed in (True, False):  # a pass holds one stack of bases beside its sums
            bases = self.bases(self.multiply(bases, transposed))
        left, products = bases, self.multiply(bases, True)
        every = range(len(self.coefficients))
        return [self.direction(number, rank, left, products, sums) for number in every]

    def of(self, names: Set[str]) -> Iterator[tuple[str, Tensor]]:
        """In the order of the parameters."""
        return ((name, weight) for name, weight in self.weights.items() if name in names)

    def zeros(self, name: str, *shape: int) -> Tensor:
        weight = self.weights[name]
        return weight.new_zeros(len(self.coefficients), *shape, dtype=wide_dtype(weight))

    def random(self, names: Set[str], width: int) -> Stack:
        """Ω of each matrix, the same for all directions."""
        draw, found = torch.Generator(self.device).manual_seed(0), dict[str, Tensor]()
        for name, weight in self.of(names):
            shape = 1, weight.shape[1], min(width, *weight.shape)
            drawn = torch.randn(shape, generator=draw, device=self.device, dtype=wide_dtype(weight))
            found[name] = drawn.to(weight.device).expand(len(self.coefficients), -1, -1)
        return found

    def bases(self, stack: dict[str, Tensor]) -> dict[str, Tensor]:
        """An orthonormal base of each, in its place and in the dtype that its factor will have."""
        for name, value in stack.items():
            stack[name] = torch.linalg.qr(value).Q.to(self.weights[name].dtype)
        return stack

    def direction(
        self, number: int, rank: int, left: Stack, products: Stack, sums: Stack
    ) -> Factored:
        own = self.by_autograd(number)
        direction: dict[str, Tensor | Factors] = {}
        for name, weight in self.weights.items():
            if name in own:
                direction[name] = own[name]
            elif name in left:
                found = cut(left[name][number], products[name][number], rank)
                direction[name] = found.to(weight)
            else:
                direction[name] = sums[name][number].reshape(weight.shape)
        return direction

    def multiply(
        self, base: Stack, transposed: bool, small: Stack | None = None
    ) -> dict[str, Tensor]:
        """D times the base of each matrix, or Dᵀ times it; adds the gradients of `small`."""
        total = {
            name: self.zeros(name, self.weights[name].shape[transposed], value.shape[2])
            for name, value in base.items()
        }
        step = Step(base, total, small or {}, transposed)
        names = total.keys() | step.small.keys()
        users = [owner for owner in self.owners if names & {*owner.weights.values()}]
        with watching(users, [], partial(self.visit, step)):
            for batch, answers in self.side:
                scales = self.coefficients[:, answers]
                if scales.any():
                    self._scales = scales
                    backward(self.model, batch, 1 / batch.counts.double(), self.set_examples)
        return total

    def set_examples(self, examples: Tensor) -> None:
        self._examples = examples

    def visit(
        self, step: "Step", owner: Owner, inputs: Inputs, _: object, gradient: Tensor
    ) -> None:
        examples = slice_examples(self._examples, self._scales.shape[1], gradient)
        self.visited |= {*owner.weights.values()}
        if examples is None:
            self.lost |= {*owner.weights.values()}
            return
        scales = self._scales.to(examples.device)[:, examples]  # [direction, slice]
        if gradient.ndim > 2 and len(gradient) != len(examples):
            gradient, inputs = gradient.flatten(0, -2), (inputs[0].flatten(0, -2), *inputs[1:])
        for key, name in owner.weights.items():
            if name in step.total:
                whole = Piece(name, 0, len(self.weights[name]))
                factors = answer_factors(owner, inputs, gradient, whole)
                add_products(step, name, factors, scales)
            elif name in step.small:
                own = scaled_gradients(owner, key, inputs, gradient, scales)
                if own is None:
                    self.lost.add(name)
                else:
                    step.small[name].add_(own)

    def by_autograd(self, number: int) -> dict[str, Tensor]:
        """Of the parameters that hooks do not follow, along one direction."""
        some = dict[str, Any](self.of(self.lost))
        total = zero_sum(some)
        if some:
            add_answers(total, self.model, some, self.side, self.coefficients[number])
        return total


def add_products(
    step: Step,
    name: str,
    factors: tuple[Tensor, Tensor],
    scales: Float[Tensor, "directions slices"],
) -> None:
    """Adds Σ_t l_t (r_t · base), each token as its slice is scaled; transposed: Σ_t r_t (l_t ·
    base). The l of an embedding are row numbers, −1 where it looks nothing up."""
    left, right = factors
    tokens, is_lookup = right.shape[:-1].numel(), left.ndim < right.ndim
    scales = scales.repeat_interleave(tokens // scales.shape[1], 1)
    right = right.reshape(tokens, -1).to(scales)
    left = left.reshape(tokens) if is_lookup else left.reshape(tokens, -1).to(scales)
    for total, base, scale in zip(step.total[name], step.base[name], scales, strict=True):
        base = base.to(scale)
        used = (scale != 0) & (left >= 0) if is_lookup else scale != 0
        rows, columns, by = left[used], right[used], scale[used][:, None]
        if step.transposed:
            total += columns.mT @ ((base[rows] if is_lookup else rows @ base) * by)
        elif is_lookup:
            total.index_add_(0, rows, columns @ base * by)
        else:
            total += rows.mT @ (columns @ base * by)


def scaled_gradients(
    owner: Owner,
    key: str,
    inputs: Inputs,
    gradient: Tensor,
    scales: Float[Tensor, "directions slices"],
) -> Float[Tensor, "directions numbers"] | None:
    """Of a norm or a bias, in each direction; None where the module has several inputs or
    outputs."""
    if len(inputs) != 1:
        return None
    found = list[Tensor]()
    for scale in scales.to(gradient):
        scaled = gradient * scale.reshape(-1, *[1] * (gradient.ndim - 1))
        if has_formula(owner.module):
            found.append(scaled.flatten(0, -2).sum(0, dtype=scales.dtype))
        elif (own := own_gradient(owner, key, inputs[0], scaled)) is not None:
            found.append(own.flatten().to(scales))
    return torch.stack(found) if found else None


def cut(
    left: Float[Tensor, "rows width"], products: Float[Tensor, "columns width"], rank: int
) -> Tensor | Factors:
    """The nearest matrix of rank `rank` to left · productsᵀ; whole where it has no more."""
    base, small = torch.linalg.qr(products)
    turn, values, right = torch.linalg.svd(small.mT, full_matrices=False)
    factors = Factors(left.to(turn) @ (turn[:, :rank] * values[:rank]), right[:rank] @ base.mT)
    if min(len(left), len(products)) <= rank:
        return factors.left @ factors.right
    return factors
