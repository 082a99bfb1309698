"""Layers: which modules hold the weights that count, and how one's output gradient meets a
direction.

    y = f(x; W)       tangent = ∂f/∂W · D       contribution of one example = Σ ∂loglik/∂y · tangent

    Linear     tangent = x Dᵀ + d_bias          Conv1D     tangent = x D + d_bias
    Embedding  tangent = D[x]                   the rest   forward-mode derivative of the module itself:
    D = L R    tangent = (x Rᵀ) Lᵀ                         norms, routers, fused experts, learned positions

Choices made here: a tied weight is one weight, wherever it is used. A module that is never called,
or whose output cannot be told apart by example, is reported by name and never skipped."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from prism_select.core.blocks import padding_still, watched, without_padding
from prism_select.run.errors import Unreachable, out_of_memory

__all__ = [
    "Direction",
    "Factored",
    "Factors",
    "Inputs",
    "Owner",
    "Parameters",
    "by_example",
    "dense",
    "is_closed",
    "is_matrix",
    "own_products",
    "owners",
    "sides",
    "swapped",
    "watching",
]

Parameters: TypeAlias = Mapping[str, nn.Parameter]


Direction: TypeAlias = Mapping[str, Tensor]


class Factors(NamedTuple):
    """A matrix of low rank, left @ right, as its weight lies."""

    left: Float[Tensor, "rows rank"]
    right: Float[Tensor, "rank columns"]

    def to(self, like: Tensor) -> "Factors":
        return Factors(self.left.to(like), self.right.to(like))

    def __truediv__(self, length: float) -> "Factors":
        return Factors(self.left / length, self.right)


class Owner(NamedTuple):
    """A module and those of its own weights that count: {the module's word for it: its name in the
    network}."""

    name: str
    module: nn.Module
    weights: Mapping[str, str]


Factored: TypeAlias = Mapping[
    str, Tensor | Factors
]  # factors of matrices that `is_matrix` owners alone use


Inputs: TypeAlias = tuple[Any, ...]


Gradient: TypeAlias = Float[Tensor, "*rows d_out"]


Visit: TypeAlias = Callable[[Owner, Inputs, Callable[[int], Tensor], Gradient], None]


def dense(direction: Factored) -> Direction:
    return {n: d.left @ d.right if isinstance(d, Factors) else d for n, d in direction.items()}


def owners(network: nn.Module, weights: Parameters) -> Sequence[Owner]:
    """Every module that holds one of `weights` itself; a tied weight has several owners."""
    names = {id(weight): name for name, weight in weights.items()}
    found = (
        Owner(
            path,
            module,
            {key: names[id(w)] for key, w in module._parameters.items() if id(w) in names},
        )
        for path, module in network.named_modules()
    )
    return [owner for owner in found if owner.weights]


@contextmanager
def swapped(holders: Sequence[Owner], values: Direction) -> Iterator[None]:
    """Other tensors in place of the weights, dual numbers included, for the length of the block."""
    saved = [(owner, dict(owner.module._parameters)) for owner in holders]
    uses = Counter(name for owner in holders for name in owner.weights.values())
    try:
        for owner, before in saved:
            new: dict[str, Any] = {k: values[n] for k, n in owner.weights.items() if n in values}
            tied = any(uses[name] > 1 for name in owner.weights.values())
            owner.module._parameters.update(
                padding_still(owner.module, new, before) if tied else new
            )
        yield
    finally:
        for owner, parameters in saved:
            owner.module._parameters.update(parameters)


def is_closed(module: nn.Module) -> bool:
    """Whether `tangent_of` has a formula for the module; a subclass may compute something else."""
    return type(module) in (nn.Linear, nn.Embedding) or type(module).__name__ == "Conv1D"


def tangent_of(
    owner: Owner, direction: Factored, inputs: tuple[Any, ...], named: Mapping[str, Any]
) -> list[Any]:
    """∂output/∂weights · direction of one module at fixed inputs, one per output (None: it does not
    move)."""
    own: dict[str, Any] = {
        key: direction[name] for key, name in owner.weights.items() if name in direction
    }
    module: Any = owner.module
    if type(module) is nn.Embedding:
        return without_padding(module, inputs, [functional.embedding(inputs[0], own["weight"])])
    if is_closed(module):
        matrix, moved = (
            own["weight"] if "weight" in own else torch.zeros_like(module.weight),
            inputs[0],
        )
        steps = matrix if isinstance(matrix, Factors) else [matrix]
        for step in (
            reversed(steps) if isinstance(module, nn.Linear) else [part.T for part in steps]
        ):
            moved = functional.linear(moved, step)
        return [moved + own["bias"] if "bias" in own else moved]
    with torch.no_grad(), forward_ad.dual_level():
        duals = {
            owner.weights[k]: forward_ad.make_dual(module._parameters[k].detach(), d)
            for k, d in own.items()
        }
        with swapped([owner], duals):
            outputs = tree_flatten(module.forward(*inputs, **named))[0] if own else []
        found = [
            forward_ad.unpack_dual(out).tangent if isinstance(out, Tensor) else None
            for out in outputs
        ]
    return without_padding(module, inputs, found)


@contextmanager
def watching(
    holders: Sequence[Owner], directions: Sequence[Factored], visit: Visit
) -> Iterator[set[str]]:
    """While open, `visit(owner, inputs, tangent, gradient)` is called in each backward pass for
    each output of each owner; `tangent(k)` gives its tangent along `directions[k]`. Yields the
    names of the owners called so far. The graph starts at the first owner. Formulas are applied in
    the backward pass; other derivatives in the forward pass."""
    called: set[str] = set()
    busy = False  # a module's own derivative calls its children: they are not visited twice

    def after(
        owner: Owner, _: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any], output: Any
    ) -> Any:
        nonlocal busy
        if busy or not torch.is_grad_enabled():
            return output
        called.add(owner.name)
        inputs, words = tree_map_only(Tensor, Tensor.detach, (args, dict(named)))
        kept: list[list[Any]] = []
        busy = True
        try:
            kept = (
                []
                if is_closed(owner.module)
                else [tangent_of(owner, d, inputs, words) for d in directions]
            )
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            why = f"no forward-mode derivative ({str(error).splitlines()[0]})"
            raise Unreachable("reverse", list(owner.weights.values()), why) from error
        finally:
            busy = False
        tangents = (
            kept.__getitem__ if kept else lambda k: tangent_of(owner, directions[k], inputs, words)
        )
        tensors, shape = tree_flatten(output)
        for place, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor) or (
                kept and not any(k and k[place] is not None for k in kept)
            ):
                continue
            show = partial(
                lambda place, g: visit(owner, inputs, lambda n: tangents(n)[place], g), place
            )
            tensors[place] = watched(tensor, show, tensors, {**dict(enumerate(args)), **named})
        return tree_unflatten(tensors, shape)

    with ExitStack() as hooks:
        for owner in holders:
            hooks.enter_context(
                owner.module.register_forward_hook(partial(after, owner), with_kwargs=True)
            )
        yield called


def by_example(
    rows: Int[Tensor, " rows"], size: int, gradient: Gradient
) -> Int[Tensor, " rows"] | None:
    """Which of `size` examples each slice of a gradient belongs to: one slice per example, or one
    per row, of which `rows` tells; None where it is neither."""
    if gradient.ndim > 2 and len(gradient) == size:
        return torch.arange(size, device=gradient.device)
    return rows if gradient.shape[:-1].numel() == len(rows) else None


def is_matrix(owner: Owner) -> bool:
    """Whether the module multiplies by a matrix that counts, in a formula that is known."""
    return (
        is_closed(owner.module)
        and type(owner.module) is not nn.Embedding
        and "weight" in owner.weights
    )


def sides(owner: Owner, inputs: Inputs, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """l and r, row by row, where the gradient of the module's matrix is Σ_t l_t r_tᵀ."""
    return (gradient, inputs[0]) if type(owner.module) is nn.Linear else (inputs[0], gradient)


def own_products(
    owner: Owner, inputs: Inputs, gradient: Gradient, size: int, flats: Sequence[Tensor]
) -> Tensor | None:
    """[example, direction]: each example's own gradient of a matrix, as much as a cache holds at a
    time, times each of `flats`; None for other modules, or without a slice for each example."""
    if (
        gradient.ndim != 3
        or len(gradient) != size
        or not is_matrix(owner)
        or len(owner.weights) > 1
    ):
        return None
    left, right = sides(owner, inputs, gradient)
    few, total = (
        max(1, 2**20 // (size * right.shape[-1])),
        left.new_zeros(size, len(flats), dtype=torch.float64),
    )
    for part, *some in zip(
        left.split(few, 2), *(f.split(few * right.shape[-1]) for f in flats), strict=True
    ):
        own = (part.transpose(1, 2) @ right).flatten(1)
        total += torch.stack([own @ flat for flat in some], dim=1)
    return total
