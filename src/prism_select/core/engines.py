"""Engines: one directional derivative per example, four ways.

    score(z) = ∇loglik(z) · d = d/dε loglik(z; θ + ε d) at ε = 0

    reverse     one backward pass, no weight gradient kept: Σ over modules of output gradient · tangent
    forward     dual numbers through the whole model: one pass per direction
    difference  (loglik(θ + ε d) − loglik(θ − ε d)) / 2ε: two passes per direction, no graph, any architecture
    reference   the definition: one example at a time, autograd, dot product

Choices made here: every engine scores several directions at once, scaled to unit length before they
meet the model's dtype and back after, so that none under- or overflows; dot products add up in
float64; a weight that a direction lacks stays where it is. `difference` needs float32 or better,
since bfloat16 rounds a small step away."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel

from prism_select.core.blocks import blocks_below, running_once, same_when_run_once
from prism_select.core.layers import (
    Factored,
    Inputs,
    Owner,
    Parameters,
    by_example,
    dense,
    own_products,
    owners,
    swapped,
    watching,
)
from prism_select.core.likelihood import Batch, LanguageModel, backward, token_logliks
from prism_select.core.target_gradient import differentiable, dot, norm
from prism_select.run.errors import BadOption, Unreachable

__all__ = ["ENGINES", "Engine", "Scores", "difference", "forward", "reference", "reverse"]


class Scores(NamedTuple):
    """`values[b, k]`: score of example b along direction k, in nats per unit of that direction
    (positive: up). `tokens[b, t, k]`: what token t + 1, predicted at position t, adds to it; only
    some engines know."""

    loglik: Float[Tensor, " batch"]
    values: Float[Tensor, "batch directions"]
    tokens: Float[Tensor, "batch context directions"] | None = None


Engine: TypeAlias = Callable[[Batch], Scores]


def _unit(
    weights: Parameters, directions: Sequence[Factored]
) -> tuple[list[Factored], Float[Tensor, " directions"]]:
    """Directions of length one in the dtype of the weights, and the lengths that they had."""
    device = next(iter(weights.values())).device
    lengths = [norm(dense(direction)) or 1.0 for direction in directions]
    unit: list[Factored] = [
        {name: (value / length).to(weights[name]) for name, value in direction.items()}
        for direction, length in zip(directions, lengths, strict=True)
    ]
    return unit, torch.tensor(lengths, dtype=torch.float64, device=device)


def reverse(model: LanguageModel, weights: Parameters, directions: Sequence[Factored]) -> Engine:
    """No weight gradient is kept, and below the lowest weight that counts nothing is recorded.

    Raises Unreachable for a weight whose module is not called, has no derivative, or mixes its
    examples."""
    holders = owners(model.network, weights)
    unit, lengths = _unit(weights, directions)
    moving = {
        name: [k for k, direction in enumerate(unit) if name in direction] for name in weights
    }
    whole = {
        n: [d.flatten() for k in ks if isinstance(d := unit[k][n], Tensor)]
        for n, ks in moving.items()
    }
    several = {n: flat for n, flat in whole.items() if len(flat) == len(moving[n]) > 1}

    def scores(batch: Batch) -> Scores:
        total = lengths.new_zeros(len(batch), len(unit))
        places: list[
            Int[Tensor, " rows"]
        ] = []  # the last: which example each row of a gradient belongs to

        def visit(
            owner: Owner, inputs: Inputs, tangent: Callable[[int], Tensor], gradient: Tensor
        ) -> None:
            names = list(owner.weights.values())
            flats = several.get(names[0])
            if (
                flats
                and (found := own_products(owner, inputs, gradient, len(batch), flats)) is not None
            ):
                total[:, moving[names[0]]] += found.to(
                    total
                )  # from two directions on, cheaper than their tangents
                return
            place = by_example(places[-1], len(batch), gradient)
            if place is None:
                why = f"its output of shape {tuple(gradient.shape)} cannot be told apart by example"
                raise Unreachable("reverse", names, why)
            rows = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).reshape(
                len(place), -1
            )
            for k in sorted({k for name in names for k in moving[name]}):
                products = (rows * tangent(k).to(rows.dtype).reshape(rows.shape)).sum(1)
                total[:, k].index_add_(0, place, products.to(total.dtype))

        with watching(holders, unit, visit) as called:
            loglik = backward(model, batch, lengths.new_ones(len(batch)), places.append)
        if missed := [
            name for owner in holders if owner.name not in called for name in owner.weights.values()
        ]:
            raise Unreachable("reverse", missed, "the module that holds it was never called")
        return Scores(loglik, total * lengths)

    return scores


def forward(model: LanguageModel, weights: Parameters, directions: Sequence[Factored]) -> Engine:
    """Raises Unreachable where an operation of the model has no forward-mode derivative."""
    holders = owners(model.network, weights)
    unit, lengths = _unit(weights, directions)

    def along(batch: Batch, direction: Factored) -> Float[Tensor, "2 batch context"]:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), dual_level():
            with swapped(
                holders, {n: make_dual(weights[n].detach(), d) for n, d in dense(direction).items()}
            ):
                primal, tangent = unpack_dual(token_logliks(model, batch))
            return torch.stack([primal, torch.zeros_like(primal) if tangent is None else tangent])

    def scores(batch: Batch) -> Scores:
        try:
            parts = torch.stack([along(batch, direction) for direction in unit], dim=3)
        except (RuntimeError, NotImplementedError) as error:
            if "forward" not in str(error):
                raise
            raise Unreachable("forward", list(weights), str(error).splitlines()[0]) from error
        tokens = parts[1].to(lengths.dtype) * lengths
        return Scores(parts[0, :, :, 0].sum(1), tokens.sum(1), tokens)

    return scores


def difference(model: LanguageModel, weights: Parameters, directions: Sequence[Factored]) -> Engine:
    """Each direction's step is the smallest whose rounding noise, measured on the first batch, is
    below 3√ε of the scores: small, since a ReLU's kink or a router's switch inside it costs far
    more than noise does. The log-likelihood is the mean of both passes; blocks below all weights
    run once. Raises BadOption below float32."""
    if narrow := {
        str(w.dtype).removeprefix("torch.")
        for w in weights.values()
        if torch.finfo(w.dtype).bits < 32
    }:
        raise BadOption(
            f"--engine difference needs float32 or better, not {narrow.pop()}; try --dtype float32"
        )
    holders = owners(model.network, weights)
    unit, lengths = _unit(weights, directions)
    root = math.sqrt(max(torch.finfo(w.dtype).eps for w in weights.values()))
    least = root / 256 * (norm({name: w.detach() for name, w in weights.items()}) or 1.0)
    below = blocks_below(model.network, list(weights))
    steps: list[float] = []

    @torch.no_grad()
    def both(batch: Batch, direction: Factored, step: float) -> Float[Tensor, "2 batch context"]:
        found = []
        for signed in (step, -step):
            with swapped(
                holders,
                {n: torch.add(weights[n], d, alpha=signed) for n, d in dense(direction).items()},
            ):
                found.append(token_logliks(model, batch).to(lengths.dtype))
        return torch.stack(found)

    def get_ready(batch: Batch) -> None:
        found = []
        for direction in unit:
            near, far = (
                both(batch, direction, n * least).diff(dim=0).sum((0, 2)) / n for n in (1, 2)
            )
            noise = float((near - far).norm() / far.norm().clamp(min=1e-30))
            found.append(least * min(max(1.0, noise / (3 * root)), 2**14))
        if not same_when_run_once(below, lambda: both(batch, unit[0], found[0])):
            below.clear()
        steps.extend(found)

    def scores(batch: Batch) -> Scores:
        if not steps:
            get_ready(batch)
        with running_once(below):
            found = torch.stack(
                [both(batch, d, step) for d, step in zip(unit, steps, strict=True)], dim=3
            )
        tokens = (found[0] - found[1]) * lengths / (2 * lengths.new_tensor(steps))
        return Scores(found[..., 0].mean(0).sum(1), tokens.sum(1), tokens)

    return scores


def reference(model: LanguageModel, weights: Parameters, directions: Sequence[Factored]) -> Engine:
    """The definition. Slow, and nothing but memory for one more copy of the weights can make it
    fail."""

    def one(row: Batch) -> tuple[Tensor, list[float]]:
        with differentiable(weights):
            loglik = backward(model, row, torch.ones(1, device=row.tokens.device))
            moved = {name: w.grad for name, w in weights.items() if w.grad is not None}
            return loglik, [
                dot({n: g for n, g in moved.items() if n in d}, d) for d in map(dense, directions)
            ]

    def scores(batch: Batch) -> Scores:
        rows = [one(batch.rows(slice(i, i + 1))) for i in range(len(batch))]
        loglik = torch.cat([loglik for loglik, _ in rows])
        return Scores(
            loglik,
            torch.tensor([values for _, values in rows], dtype=torch.float64).to(loglik.device),
        )

    return scores


ENGINES: Mapping[str, Callable[[LanguageModel, Parameters, Sequence[Factored]], Engine]] = {
    make.__name__: make for make in (reverse, forward, difference, reference)
}
