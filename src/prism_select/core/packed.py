"""Packed matrices: a Linear whose matrix is kept in few bits, and made whenever it is used.

    y = x Wᵀ + b      W = unpack() + Σ left · right + δ
                      δ = 0: the parameter, so derivatives by it are those by W

Choices made here:
- δ has the shape and the dtype of W and takes no memory: it is one zero, seen at every place, as
  long as it is an nn.Parameter; tensors that stand in for it (`swapped`) are added;
- the backward pass makes the matrix again, so no graph keeps it;
- factors (of merged LoRA) are added in float32 or better.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Packed", "PackedLinear", "is_transposed"]


class Packed(NamedTuple):
    """A matrix of `bits` a number, which takes `bytes` with its scales."""

    unpack: Callable[[], Float[Tensor, "d_out d_in"]]
    shape: tuple[int, int]
    bits: int
    bytes: int


class PackedLinear(nn.Linear):
    """`like` has the dtype and the device of W; `transposed`: W is (d_in, d_out), as of Conv1D."""

    def __init__(
        self, packed: Packed, like: Tensor, bias: nn.Parameter | None, transposed: bool = False
    ) -> None:
        nn.Module.__init__(self)
        self.packed, self.transposed = packed, transposed
        self.out_features, self.in_features = packed.shape
        self.added: list[tuple[Tensor, Tensor]] = []
        shape = reversed(packed.shape) if transposed else packed.shape
        self.weight = nn.Parameter(like.new_zeros(()).expand(*shape), requires_grad=False)
        self.register_parameter("bias", bias)

    def add(self, left: Float[Tensor, "d_out rank"], right: Float[Tensor, "rank d_in"]) -> None:
        """From now on left · right is a part of the matrix."""
        self.added.append((left, right))

    def matrix(self) -> Tensor:
        """W at δ = 0."""
        made = self.packed.unpack()
        for left, right in self.added:
            made = torch.addmm(made.to(left), left, right)
        made = made.to(self.weight.dtype)
        return made.T if self.transposed else made

    def forward(self, input: Tensor) -> Tensor:
        offset: Any = self._parameters["weight"]
        if isinstance(offset, nn.Parameter) and torch.is_grad_enabled():
            output: Tensor = _Product.apply(input, offset, self.bias, self)  # type: ignore[no-untyped-call]
            return output
        matrix = self.matrix()
        if not isinstance(offset, nn.Parameter):
            matrix = matrix + offset
        return functional.linear(input, matrix.T if self.transposed else matrix, self.bias)


class _Product(torch.autograd.Function):
    """x Wᵀ + b at δ = 0, of which the graph keeps x at most."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, offset: Tensor, bias: Tensor | None, module: PackedLinear
    ) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None)
        matrix = module.matrix()
        return functional.linear(input, matrix.T if module.transposed else matrix, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,), module = gradients, ctx.module
        by_input = by_offset = by_bias = None
        if ctx.needs_input_grad[0]:
            matrix = module.matrix()
            by_input = gradient @ (matrix.T if module.transposed else matrix)
        rows = gradient.reshape(-1, module.out_features)
        if ctx.needs_input_grad[1]:
            inputs = ctx.saved_tensors[0].reshape(-1, module.in_features)
            by_offset = inputs.T @ rows if module.transposed else rows.T @ inputs
        if ctx.needs_input_grad[2]:
            by_bias = rows.sum(0)
        return by_input, by_offset, by_bias, None


def is_transposed(module: nn.Module) -> bool:
    """Whether a module with a formula keeps its matrix as (d_in, d_out): Conv1D does."""
    if isinstance(module, PackedLinear):
        return module.transposed
    return not isinstance(module, nn.Linear)
