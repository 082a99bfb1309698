"""Layers: the modules that hold the selected parameters, and how a module's output gradient meets a
direction.

    y = f(x; W)       tangent = ∂f/∂W · D       part of one example's score = Σ ∂loglik/∂y · tangent

    Linear       tangent = x Dᵀ + d_bias        Conv1D    tangent = x D + d_bias
                 (packed ones alike)
    Embedding    tangent = D[x]                 D = L R   tangent = (x Rᵀ) Lᵀ
    the others   the module's own forward-mode derivative: norms, routers, fused experts, learned
                 positions

Choices made here:
- a tied parameter is one parameter, wherever it is used;
- a module that is never called, or whose output cannot be split by example, is reported by name and
  never skipped.
"""

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
from prism_select.core.packed import PackedLinear, is_transposed
from prism_select.run.errors import Unreachable, out_of_memory

__all__ = [
    "Direction",
    "Factored",
    "Factors",
    "Gradient",
    "Inputs",
    "Owner",
    "Parameters",
    "dense",
    "embedding_scale",
    "example_products",
    "has_formula",
    "is_large",
    "is_matrix",
    "outer_factors",
    "owners",
    "slice_examples",
    "swapped",
    "watching",
]

Parameters: TypeAlias = Mapping[str, nn.Parameter]
"""Selected parameters, by their names in the network."""

Direction: TypeAlias = Mapping[str, Tensor]
"""A tensor for each selected parameter."""


IN_FULL = 2**28  # numbers: a direction of as many takes 1 GB in float32
FORMED = 2**20  # numbers of all examples' gradients formed at a time: what a cache holds


class Factors(NamedTuple):
    """A matrix of low rank, left @ right, in the layout of its parameter."""

    left: Float[Tensor, "rows rank"]
    right: Float[Tensor, "rank columns"]

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self.left), self.right.shape[1]])

    def to(self, like: Tensor) -> "Factors":
        return Factors(self.left.to(like), self.right.to(like))

    def __truediv__(self, length: float) -> "Factors":
        return Factors(self.left / length, self.right)


Factored: TypeAlias = Mapping[str, Tensor | Factors]
"""A direction in which some matrices, whose owners all satisfy `is_matrix`, are in factors."""


class Owner(NamedTuple):
    """A module that holds selected parameters itself. `weights`: {the module's word for a
    parameter: its name in the network}; `scale` is c of a module whose output is c times the rows
    of its matrix, and 0 of others."""

    name: str
    module: nn.Module
    weights: Mapping[str, str]
    scale: float = 0.0


Inputs: TypeAlias = tuple[Any, ...]
Gradient: TypeAlias = Float[Tensor, "*rows d_out"]
Visit: TypeAlias = Callable[[Owner, Inputs, Callable[[int], Tensor], Gradient], None]


def dense(direction: Factored) -> Direction:
    return {n: d.left @ d.right if isinstance(d, Factors) else d for n, d in direction.items()}


def owners(network: nn.Module, weights: Parameters) -> Sequence[Owner]:
    """Every module that holds one of `weights` itself; a tied parameter has several owners."""
    names = {id(weight): name for name, weight in weights.items()}
    holders = []
    for path, module in network.named_modules():
        parameters = module._parameters.items()
        held = {key: names[id(weight)] for key, weight in parameters if id(weight) in names}
        if held:
            holders.append(Owner(path, module, held, embedding_scale(module)))
    return holders


def embedding_scale(module: nn.Module) -> float:
    """1 of an Embedding, more of those that scale their rows, 0 of other modules."""
    if type(module) is nn.Embedding:
        return 1.0
    if not isinstance(module, nn.Embedding):
        return 0.0
    if module.weight.is_meta:  # a plan: some number
        return 2.0
    tokens = torch.arange(min(8, module.num_embeddings), device=module.weight.device)
    with torch.no_grad():
        plain = functional.embedding(tokens, module.weight).double()
        try:
            output = module.forward(tokens).double()
        except (AttributeError, IndexError, RuntimeError, TypeError):  # it takes no tokens
            return 0.0
    scale = (output * plain).sum() / plain.square().sum()
    return float(scale) if torch.allclose(output, scale * plain, rtol=0.01) else 0.0


@contextmanager
def swapped(holders: Sequence[Owner], values: Direction) -> Iterator[None]:
    """Puts other tensors, dual numbers included, in place of the parameters for the length of the
    block."""
    saved = [(owner, dict(owner.module._parameters)) for owner in holders]
    uses = Counter(name for owner in holders for name in owner.weights.values())
    try:
        for owner, before in saved:
            new: dict[str, Any] = {k: values[n] for k, n in owner.weights.items() if n in values}
            if any(uses[name] > 1 for name in owner.weights.values()):  # tied
                new = padding_still(owner.module, new, before)
            owner.module._parameters.update(new)
        yield
    finally:
        for owner, parameters in saved:
            owner.module._parameters.update(parameters)


def is_large(selected: Parameters) -> bool:
    """Whether directions of all their numbers are too large to hold several of them."""
    return sum(parameter.numel() for parameter in selected.values()) > IN_FULL


def has_formula(module: nn.Module) -> bool:
    """Whether `tangent_of` has a formula for the module. A subclass may compute something else, so
    it has none."""
    has_one = type(module) in (nn.Linear, nn.Embedding, PackedLinear)
    return has_one or type(module).__name__ == "Conv1D"


def tangent_of(
    owner: Owner, direction: Factored, args: Inputs, kwargs: Mapping[str, Any]
) -> list[Any]:
    """∂output/∂weights · direction of one module at fixed arguments, one for each output; None for
    an output that does not move."""
    moves: dict[str, Any] = {k: direction[n] for k, n in owner.weights.items() if n in direction}
    is_low = isinstance(moves.get("weight"), Factors)
    if type(owner.module) is nn.Embedding or (owner.scale and is_low):
        return without_padding(owner.module, args, [_embedding_tangent(owner, moves, args[0])])
    if has_formula(owner.module):
        return [_linear_tangent(owner.module, moves, args[0])]
    return _forward_mode_tangents(owner, moves, args, kwargs)


def _has_formulas(owner: Owner, directions: Sequence[Factored]) -> bool:
    """Whether `tangent_of` has a formula along all directions. Of a module that scales its rows it
    has one along factors alone, since c is known to the dtype's rounding and no better."""
    if has_formula(owner.module):
        return True
    moves = [d[name] for d in directions for name in owner.weights.values() if name in d]
    return owner.scale != 0 and all(isinstance(move, Factors) for move in moves)


def _embedding_tangent(owner: Owner, moves: Mapping[str, Any], tokens: Tensor) -> Tensor | None:
    if "weight" not in moves:
        return None
    matrix = moves["weight"]
    rows = functional.embedding(tokens, matrix.left if isinstance(matrix, Factors) else matrix)
    return owner.scale * (rows @ matrix.right if isinstance(matrix, Factors) else rows)


def _linear_tangent(module: Any, moves: Mapping[str, Any], inputs: Tensor) -> Tensor:
    """Of Linear and Conv1D."""
    matrix = moves["weight"] if "weight" in moves else torch.zeros_like(module.weight)
    factors = list(matrix) if isinstance(matrix, Factors) else [matrix]
    steps = [f.T for f in factors] if is_transposed(module) else reversed(factors)
    tangent = inputs
    for step in steps:
        tangent = functional.linear(tangent, step)
    return tangent + moves["bias"] if "bias" in moves else tangent


def _forward_mode_tangents(
    owner: Owner, moves: Mapping[str, Any], args: Inputs, kwargs: Mapping[str, Any]
) -> list[Any]:
    module: Any = owner.module
    with torch.no_grad(), forward_ad.dual_level():
        duals = {
            owner.weights[key]: forward_ad.make_dual(module._parameters[key].detach(), move)
            for key, move in moves.items()
        }
        with swapped([owner], duals):
            outputs = tree_flatten(module.forward(*args, **kwargs))[0] if moves else []
        tangents = [
            forward_ad.unpack_dual(out).tangent if isinstance(out, Tensor) else None
            for out in outputs
        ]
    return without_padding(module, args, tangents)


@contextmanager
def watching(
    holders: Sequence[Owner], directions: Sequence[Factored], visit: Visit
) -> Iterator[set[str]]:
    """While open, each backward pass calls `visit(owner, inputs, tangent, gradient)` for each
    output of each owner; `tangent(k)` gives the output's tangent along `directions[k]`. Yields the
    names of the owners that were called so far.

    The graph starts at the first owner. Formulas are applied in the backward pass, forward-mode
    derivatives in the forward pass."""
    called: set[str] = set()
    busy = False  # a module's own derivative calls its children: they are not visited twice

    def after(
        owner: Owner, _: nn.Module, args: Inputs, kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        nonlocal busy
        if busy or not torch.is_grad_enabled():
            return output
        called.add(owner.name)
        inputs, named = tree_map_only(Tensor, Tensor.detach, (args, dict(kwargs)))
        ready: list[list[Any]] = []  # tangents of each direction, for each output
        busy = True
        try:
            if not _has_formulas(owner, directions):
                ready = [tangent_of(owner, d, inputs, named) for d in directions]
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            why = f"no forward-mode derivative ({str(error).splitlines()[0]})"
            raise Unreachable("reverse", list(owner.weights.values()), why) from error
        finally:
            busy = False

        def tangent(index: int, k: int) -> Tensor:
            tangents = ready[k] if ready else tangent_of(owner, directions[k], inputs, named)
            moved: Tensor = tangents[index]
            return moved

        def show(index: int, gradient: Tensor) -> None:
            visit(owner, inputs, partial(tangent, index), gradient)

        outputs, shape = tree_flatten(output)
        arguments: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        for index, tensor in enumerate(outputs):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            if ready and not any(tangents and tangents[index] is not None for tangents in ready):
                continue  # no direction moves this output
            outputs[index] = watched(tensor, partial(show, index), outputs, arguments)
        return tree_unflatten(outputs, shape)

    with ExitStack() as hooks:
        for owner in holders:
            hooks.enter_context(
                owner.module.register_forward_hook(partial(after, owner), with_kwargs=True)
            )
        yield called


def slice_examples(
    rows: Int[Tensor, " rows"], size: int, gradient: Gradient
) -> Int[Tensor, " slices"] | None:
    """The example that each slice of a gradient belongs to, on its device. A gradient has a slice
    for each of `size` examples, or one for each row, whose examples are `rows`; None where it has
    neither."""
    if gradient.ndim > 2 and len(gradient) == size:
        return torch.arange(size, device=gradient.device)
    return rows.to(gradient.device) if gradient.shape[:-1].numel() == len(rows) else None


def is_matrix(owner: Owner) -> bool:
    """Whether the module multiplies by a selected matrix, in a formula that is known."""
    is_linear = has_formula(owner.module) and type(owner.module) is not nn.Embedding
    return is_linear and "weight" in owner.weights


def outer_factors(owner: Owner, inputs: Inputs, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """l and r, row by row, where the gradient of the module's matrix is Σ_t l_t r_tᵀ."""
    return (inputs[0], gradient) if is_transposed(owner.module) else (gradient, inputs[0])


def example_products(
    owner: Owner, inputs: Inputs, gradient: Gradient, size: int, flats: Sequence[Tensor]
) -> Tensor | None:
    """[example, direction]: the gradient of a matrix for each example, times each of `flats`. It is
    formed for as many rows of the matrix at a time as a cache holds. None for other modules, or
    without a slice for each example."""
    by_example = gradient.ndim == 3 and len(gradient) == size
    if not by_example or not is_matrix(owner) or len(owner.weights) > 1:
        return None
    left, right = outer_factors(owner, inputs, gradient)
    rows = max(1, FORMED // (size * right.shape[-1]))
    total = left.new_zeros(size, len(flats), dtype=torch.float64)
    blocks = [flat.split(rows * right.shape[-1]) for flat in flats]
    for columns, *slices in zip(left.split(rows, 2), *blocks, strict=True):
        formed = (columns.transpose(1, 2) @ right).flatten(1)
        total += torch.stack([formed @ block for block in slices], dim=1)
    return total
