"""Gradients: what backward passes leave in the selected parameters, added up; and their algebra.

    dot(a, b) = Σ over parameters and their numbers of a · b      norm(a) = √dot(a, a)
    of matrices in factors, a = l r and b = m s: Σ (lᵀ m) ∘ (r sᵀ)

Choices made here:
- a gradient, a direction, and a step are all one type: a tensor for each parameter, by its name;
- gradients add up in float32 or better, whatever the model's dtype; a sum that is asked for in
  bfloat16 is rounded up or down by chance, so that what many small gradients add is right on
  average;
- each parameter forgets its gradient as soon as it is added, so no more than one is held;
- inner products add up in float64.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from prism_select.core.layers import Direction, Factored, Factors, Parameters

__all__ = [
    "adding_gradients",
    "differentiable",
    "dot",
    "minus",
    "norm",
    "take_gradients",
    "wide_dtype",
    "zero_sum",
]

PIECE = 2**20  # numbers


@contextmanager
def differentiable(weights: Parameters) -> Iterator[None]:
    """These parameters ask for gradients, and no others of the network. On leaving they are frozen
    and hold none."""
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        yield
    finally:
        for weight in weights.values():
            weight.requires_grad_(False).grad = None


def take_gradients(weights: Parameters) -> Iterator[tuple[str, Tensor]]:
    """The gradients of the backward passes since the last call, by name and in the model's dtype.
    Each parameter forgets its own as it is yielded."""
    for name, weight in weights.items():
        if weight.grad is not None:
            gradient, weight.grad = weight.grad, None
            yield name, gradient


def zero_sum(weights: Parameters, bfloat16: bool = False) -> dict[str, Tensor]:
    """A sum of no gradients yet. With `bfloat16` it is in that dtype where the parameter is."""
    return {
        name: torch.zeros(
            w.shape,
            dtype=w.dtype if bfloat16 and w.dtype == torch.bfloat16 else wide_dtype(w),
            device=w.device,
        )
        for name, w in weights.items()
    }


@contextmanager
def adding_gradients(total: Mapping[str, Tensor], weights: Parameters) -> Iterator[None]:
    """Within it the parameters ask for gradients, and backward passes add them to a sum that
    started as `zero_sum`."""
    draws = dict[torch.device, torch.Generator]()

    def add(name: str, weight: Tensor) -> None:
        gradient, weight.grad, own = weight.grad, None, total[name]
        assert gradient is not None
        if own.dtype == torch.bfloat16:
            draw = draws.setdefault(own.device, torch.Generator(own.device).manual_seed(0))
            _add_rounded(own, gradient, draw)
        else:
            own += gradient.to(own.dtype)

    with differentiable(weights), ExitStack() as hooks:
        for name, weight in weights.items():
            hook = weight.register_post_accumulate_grad_hook(partial(add, name))
            hooks.callback(hook.remove)
        yield


def _add_rounded(total: Tensor, gradient: Tensor, draw: torch.Generator) -> None:
    """A float32 is a bfloat16 and sixteen bits more: chance added to these carries as often as they
    are near to the next bfloat16."""
    parts = zip(total.view(-1).split(PIECE), gradient.reshape(-1).split(PIECE), strict=True)
    for part, added in parts:
        bits = (part.float() + added.float()).view(torch.int32)
        bits += torch.randint(
            2**16, bits.shape, generator=draw, dtype=torch.int32, device=bits.device
        )
        part.copy_((bits & -(2**16)).view(torch.float32))


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The tensor's own, or float32 where that is better."""
    return torch.promote_types(tensor.dtype, torch.float32)


def dot(a: Factored, b: Factored) -> float:
    return sum(_dot(value, b[name]) for name, value in a.items())


def _dot(a: Tensor | Factors, b: Tensor | Factors) -> float:
    """A piece at a time, so that no copy in float64 is large."""
    if isinstance(a, Factors) and isinstance(b, Factors):
        left = a.left.double().mT @ b.left.double()
        return float((left * (a.right.double() @ b.right.double().mT)).sum())
    if isinstance(a, Factors):
        a, b = b, a
    assert isinstance(a, Tensor)
    if isinstance(b, Factors):
        rows, right = max(1, PIECE // a.shape[1]), b.right.double().mT
        pairs = zip(a.split(rows), b.left.split(rows), strict=True)
        return sum(float(((x.double() @ right) * y.double()).sum()) for x, y in pairs)
    pairs = zip(a.flatten().split(PIECE), b.flatten().split(PIECE), strict=True)
    return sum(float(x.double() @ y.double()) for x, y in pairs)


def norm(a: Factored) -> float:
    return math.sqrt(dot(a, a))


def minus(a: Direction, b: Direction, times: float = 1.0) -> Direction:
    """a − times · b"""
    return {name: a[name] - times * b[name] for name in a}
