"""Engines: one directional derivative for each example, four ways.

    score(z) = ∇loglik(z) · d = d/dε loglik(z; θ + ε d) at ε = 0

    reference   the definition: one example at a time, autograd, dot product
    reverse     one backward pass that keeps no gradient of a parameter: Σ over modules of output
                gradient · tangent
    forward     dual numbers through the whole model: one pass for each direction
    difference  (loglik(θ + ε d) − loglik(θ − ε d)) / 2ε: two passes for each direction, without a
                graph, for any architecture

core/check.py proves the others against `reference`, in each run on the user's own rows.

Choices made here:
- every engine scores several directions at once;
- directions are scaled to unit length before they meet the model's dtype, and scores back after, so
  nothing under- or overflows; `reverse` and `forward` take large ones as they are that are in the
  model's dtype and of a length below `SAFE` and above 1 / `SAFE`;
- dot products add up in float64; directions are where their parameters are, sums where the tokens
  are;
- a parameter that a direction lacks stays where it is;
- `difference` needs float32 or better, since bfloat16 rounds a small step away.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel

from prism_select.core.blocks import blocks_below, running_once, same_when_run_once
from prism_select.core.gradients import differentiable, dot, norm, take_gradients
from prism_select.core.joined_factors import join_factors, joined_products
from prism_select.core.layers import (
    Factored,
    Inputs,
    Owner,
    Parameters,
    dense,
    example_products,
    is_large,
    owners,
    slice_examples,
    swapped,
    watching,
)
from prism_select.core.likelihood import Batch, LanguageModel, backward, token_logliks
from prism_select.core.packed import PackedLinear
from prism_select.run.errors import BadOption, Unreachable

__all__ = ["ENGINES", "Engine", "Scores", "difference", "forward", "reference", "reverse"]


SAFE = 2.0**30
STEP_ROWS, STEP_POWERS = 8, range(-8, 4)  # of 4: what `difference` tries


class Scores(NamedTuple):
    """`values[b, k]`: score of example b along direction k, in nats per unit of that direction
    (positive: up). `tokens[b, t, k]`: what token t + 1, predicted at position t, adds to it; only
    some engines know."""

    loglik: Float[Tensor, " batch"]
    values: Float[Tensor, "batch directions"]
    tokens: Float[Tensor, "batch context directions"] | None = None


Engine: TypeAlias = Callable[[Batch], Scores]


def reference(model: LanguageModel, weights: Parameters, directions: Sequence[Factored]) -> Engine:
    """The definition. It is slow, and needs memory for one more copy of the parameters."""

    def score(row: Batch) -> tuple[Tensor, list[float]]:
        """loglik, shaped (1,), and the scores of one example along all directions."""
        with differentiable(weights):
            loglik = backward(model, row, torch.ones(1, device=row.tokens.device))
            gradient = dict(take_gradients(weights))
        moved = [{n: gradient[n] for n in gradient if n in d} for d in directions]
        return loglik, [dot(some, d) for some, d in zip(moved, directions, strict=True)]

    def scores(batch: Batch) -> Scores:
        rows = [score(batch.rows(slice(i, i + 1))) for i in range(len(batch))]
        loglik = torch.cat([loglik for loglik, _ in rows])
        values = torch.tensor([products for _, products in rows], dtype=torch.float64)
        return Scores(loglik, values.to(loglik.device))

    return scores


def reverse(model: LanguageModel, weights: Parameters, directions: Sequence[Factored]) -> Engine:
    """No gradient of a parameter is kept, and below the lowest selected parameter no graph.

    Raises Unreachable for a parameter whose module is not called, has no derivative, or mixes its
    examples."""
    holders = owners(model.network, weights)
    unit, lengths = _near_unit(weights, directions)
    moved_by = {name: [k for k, d in enumerate(unit) if name in d] for name in weights}
    flats, joined = _flat_directions(unit, moved_by), join_factors(holders, unit)

    def scores(batch: Batch) -> Scores:
        total = batch.tokens.new_zeros(len(batch), len(unit), dtype=torch.float64)
        examples: list[Int[Tensor, " rows"]] = []  # the last: of the rows of the coming gradients

        def visit(
            owner: Owner, inputs: Inputs, tangent: Callable[[int], Tensor], gradient: Tensor
        ) -> None:
            names = list(owner.weights.values())
            if names[0] in flats:  # from two directions on, cheaper than their tangents
                products = example_products(owner, inputs, gradient, len(batch), flats[names[0]])
                if products is not None:
                    total[:, moved_by[names[0]]] += products.to(total)
                    return
            index = slice_examples(examples[-1], len(batch), gradient)
            if index is None:
                why = f"its output of shape {tuple(gradient.shape)} cannot be told apart by example"
                raise Unreachable("reverse", names, why)
            index = index.to(total.device)
            if owner.weights.get("weight") in joined:
                for moved, products in joined_products(owner, inputs, gradient, joined, len(index)):
                    sums = total.new_zeros(len(batch), len(moved))
                    total[:, moved] += sums.index_add_(0, index, products.to(total))
                return
            wide = torch.promote_types(gradient.dtype, torch.float32)
            rows = gradient.to(wide).reshape(len(index), -1)
            for k in sorted({k for name in names for k in moved_by[name]}):
                products = (rows * tangent(k).to(rows.dtype).reshape(rows.shape)).sum(1)
                total[:, k].index_add_(0, index, products.to(total))

        with watching(holders, unit, visit) as called:
            loglik = backward(model, batch, total.new_ones(len(batch)), examples.append)
        silent = [owner for owner in holders if owner.name not in called]
        if missed := [name for owner in silent for name in owner.weights.values()]:
            raise Unreachable("reverse", missed, "the module that holds it was never called")
        return Scores(loglik, total * total.new_tensor(lengths))

    return scores


def _unit(
    weights: Parameters, directions: Sequence[Factored]
) -> tuple[list[dict[str, Any]], list[float]]:
    """Directions of length one in the dtype of the parameters, and the lengths that they had."""
    lengths = [norm(direction) or 1.0 for direction in directions]
    unit: list[dict[str, Any]] = [
        {name: (value / length).to(weights[name]) for name, value in direction.items()}
        for direction, length in zip(directions, lengths, strict=True)
    ]
    return unit, lengths


def _near_unit(
    weights: Parameters, directions: Sequence[Factored]
) -> tuple[list[dict[str, Any]], list[float]]:
    """As `_unit`, but large directions in full stay as they are, where they are in the dtype of the
    parameters and of a length that it can hold: there may be no room for a copy."""
    is_ready = is_large(weights) and all(
        isinstance(value, Tensor) and value.dtype == weights[name].dtype != torch.float16
        for direction in directions
        for name, value in direction.items()
    )
    if is_ready and all(1 / SAFE < norm(direction) < SAFE for direction in directions):
        return [dict(direction) for direction in directions], [1.0] * len(directions)
    return _unit(weights, directions)


def _flat_directions(
    unit: Sequence[Factored], moved_by: Mapping[str, Sequence[int]]
) -> Mapping[str, Sequence[Tensor]]:
    """Of each parameter that several directions move, none of them in factors: their tensors as
    vectors."""
    flats: dict[str, Sequence[Tensor]] = {}
    for name, numbers in moved_by.items():
        tensors = [value for k in numbers if isinstance(value := unit[k][name], Tensor)]
        if len(tensors) == len(numbers) > 1:
            flats[name] = [tensor.flatten() for tensor in tensors]
    return flats


def forward(model: LanguageModel, weights: Parameters, directions: Sequence[Factored]) -> Engine:
    """Raises Unreachable where an operation of the model has no forward-mode derivative."""
    holders = owners(model.network, weights)
    unit, lengths = _near_unit(weights, directions)

    def along(batch: Batch, direction: Factored) -> Float[Tensor, "2 batch context"]:
        """Token log-likelihoods, and their derivatives along the direction."""
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), dual_level():
            moved = dense(direction).items()
            duals = {n: make_dual(weights[n].detach().contiguous(), d) for n, d in moved}
            with swapped(holders, duals):
                primal, tangent = unpack_dual(token_logliks(model, batch))
            return torch.stack([primal, torch.zeros_like(primal) if tangent is None else tangent])

    def scores(batch: Batch) -> Scores:
        try:
            duals = torch.stack([along(batch, direction) for direction in unit], dim=3)
        except (RuntimeError, NotImplementedError) as error:
            if "forward" not in str(error):
                raise
            raise Unreachable("forward", list(weights), str(error).splitlines()[0]) from error
        primal, tangent = duals
        tokens = tangent.double() * tangent.new_tensor(lengths, dtype=torch.float64)
        return Scores(primal[:, :, 0].sum(1), tokens.sum(1), tokens)

    return scores


def difference(model: LanguageModel, weights: Parameters, directions: Sequence[Factored]) -> Engine:
    """If ε is too large, the linear approximation fails, and a ReLU's kink or a router's switch
    inside the step costs far more than noise does; if it is too small, rounding dominates. So each
    direction's ε is where the scores of the first rows change least from one ε to four times it:
    both faults together are smallest there. What is tried spans seven powers of ten around
    √(the dtype's own ε) · ‖θ‖, since norms of the parameters differ as much between models.

    The log-likelihood is the mean of both passes. Blocks below all selected parameters run once.
    Raises BadOption below float32."""
    _refuse_narrow(weights)
    holders = owners(model.network, weights)
    unit, lengths = _unit(weights, directions)
    root = math.sqrt(max(torch.finfo(w.dtype).eps for w in weights.values()))
    size = root * (_length(holders, weights) or 1.0)
    below = blocks_below(model.network, list(weights))
    steps: list[float] = []

    @torch.no_grad()
    def along(batch: Batch, direction: Factored, step: float) -> Float[Tensor, "2 batch context"]:
        """Token log-likelihoods after a step forth, and after a step back."""
        logliks = []
        for signed in (step, -step):
            moved = {n: torch.add(weights[n], d, alpha=signed) for n, d in dense(direction).items()}
            with swapped(holders, moved):
                logliks.append(token_logliks(model, batch).double())
        return torch.stack(logliks)

    def step_of(batch: Batch, direction: Factored) -> float:
        rows = batch.rows(slice(0, STEP_ROWS))
        tried = [size * 4.0**power for power in STEP_POWERS]
        found = [along(rows, direction, step).diff(dim=0).sum((0, 2)) / step for step in tried]
        changes = [
            float((near - far).norm() / far.norm().clamp(min=1e-30))
            for near, far in pairwise(found)
        ]
        return 2 * tried[changes.index(min(changes))]

    def get_ready(batch: Batch) -> None:
        chosen = [step_of(batch, direction) for direction in unit]
        if not same_when_run_once(below, lambda: along(batch, unit[0], chosen[0])):
            below.clear()
        steps.extend(chosen)

    def scores(batch: Batch) -> Scores:
        if not steps:
            get_ready(batch)
        with running_once(below):
            logliks = [along(batch, d, step) for d, step in zip(unit, steps, strict=True)]
        stacked = torch.stack(logliks, dim=3)
        forth, back = stacked
        tokens = (forth - back) * stacked.new_tensor(lengths) / (2 * stacked.new_tensor(steps))
        return Scores(stacked[..., 0].mean(0).sum(1), tokens.sum(1), tokens)

    return scores


def _length(holders: Sequence[Owner], weights: Parameters) -> float:
    """‖θ‖; the parameter of a packed matrix is an offset of zero, and its matrix counts."""
    packed = {
        owner.weights["weight"]: owner.module
        for owner in holders
        if isinstance(owner.module, PackedLinear) and "weight" in owner.weights
    }
    total = 0.0
    for name, weight in weights.items():
        values = packed[name].matrix() if name in packed else weight.detach()
        total += dot({name: values}, {name: values})
    return math.sqrt(total)


def _refuse_narrow(weights: Parameters) -> None:
    for weight in weights.values():
        if torch.finfo(weight.dtype).bits < 32:
            dtype = str(weight.dtype).removeprefix("torch.")
            raise BadOption(
                f"--engine difference needs float32 or better, not {dtype}; try --dtype float32"
            )


ENGINES: Mapping[str, Callable[[LanguageModel, Parameters, Sequence[Factored]], Engine]] = {
    make.__name__: make for make in (reverse, forward, difference, reference)
}
