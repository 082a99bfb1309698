"""Gradient sketch: a small random projection of each pair's own gradient, taken in the backward
pass that computes the direction.

    gradient of a row in one matrix   Σ_t g_t x_tᵀ
    its sketch                        Σ_t (P g_t)(Q x_t)ᵀ / p      P, Q: p random signs for a number

Inner products of sketches are those of gradients up to noise: they have no bias, and a relative
error of about √(2/p) in one matrix, which many matrices average out. So everything that is linear
in the pairs (their halves, their resamples, their common part) is known from one backward pass.

Choices made here:
- sketches cover the matrices of Linear, Conv1D and Embedding; fused experts, norms and biases have
  none, and `covered_share` says how much of the selected parameters they cover in all their uses;
- the sketches of a target hold at most `NUMBERS` numbers together.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from prism_select.core.layers import (
    Inputs,
    Owner,
    Parameters,
    has_formula,
    owners,
    slice_examples,
    watching,
)
from prism_select.core.target_gradient import Observe

__all__ = ["Sketcher"]

NUMBERS = 2**25  # of all sketches: 128 MB
LONGEST = 2**16  # numbers of one


class Sketcher:
    """`sketches["chosen"][q]` is the sketch of pair q's own part of C, with its slope and the mean
    over pairs in it; likewise "rejected". Sketches can be compared between sketchers of one seed
    and one total number of pairs (`among`)."""

    def __init__(
        self, network: nn.Module, weights: Parameters, pairs: int, seed: int, among: int = 0
    ) -> None:
        selected = owners(network, weights)
        self.owners = [o for o in selected if has_formula(o.module) and "weight" in o.weights]
        names = sorted({owner.weights["weight"] for owner in self.owners})
        numbers = min(LONGEST, NUMBERS // (2 * max(pairs, among)))
        self.width = max(2, math.isqrt(numbers // max(1, len(names))))
        self.offsets = {name: index * self.width**2 for index, name in enumerate(names)}
        self.sketches = {
            side: torch.zeros(pairs, len(names) * self.width**2) for side in ("chosen", "rejected")
        }
        uncovered = {n for o in selected if o not in self.owners for n in o.weights.values()}
        covered = sum(weights[name].numel() for name in names if name not in uncovered)
        self.covered_share = covered / sum(weight.numel() for weight in weights.values())
        self._seed, self._signs = seed, dict[str, tuple[Tensor, Tensor]]()
        self._side, self._pairs, self._examples = "chosen", list[int](), torch.zeros(0).long()

    @contextmanager
    def open(self) -> Iterator[Observe]:
        """While open, every backward pass is sketched; yields the `observe` of
        `target_gradient`."""

        def observe(side: str, pairs: Sequence[int]) -> Callable[[Tensor], None]:
            self._side, self._pairs = side, list(pairs)
            return lambda examples: setattr(self, "_examples", examples)

        with watching(self.owners, [], self._visit):
            yield observe

    def _visit(self, owner: Owner, inputs: Inputs, _: object, gradient: Tensor) -> None:
        examples = slice_examples(self._examples, len(self._pairs), gradient)
        if examples is None:
            return
        if len(examples) != len(self._examples):  # a slice is an example: repeated for its tokens
            tokens = gradient[0].numel() // gradient.shape[-1]
            examples = examples.repeat_interleave(tokens)
        left, right = self._projected(owner, inputs, gradient)
        outer = left.reshape(-1, self.width, 1) * right.reshape(-1, 1, self.width)
        sums = outer.new_zeros(len(self._pairs), self.width**2)
        sums.index_add_(0, examples, outer.flatten(1))
        start = self.offsets[owner.weights["weight"]]
        columns = slice(start, start + self.width**2)
        self.sketches[self._side][self._pairs, columns] += sums.cpu() / self.width

    def _projected(self, owner: Owner, inputs: Inputs, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """P g and Q x of each token, the rows' side of the matrix first."""
        module: Any = owner.module
        rows, columns = self._projections(owner.weights["weight"], module.weight)
        gradient = gradient.to(rows.dtype)
        if type(module) is nn.Embedding:  # (words, width): its rows are words
            return functional.embedding(inputs[0], rows), gradient @ columns
        if isinstance(module, nn.Linear):
            return gradient @ rows, inputs[0].to(rows.dtype) @ columns
        return inputs[0].to(rows.dtype) @ rows, gradient @ columns  # Conv1D keeps (d_in, d_out)

    def _projections(
        self, name: str, weight: Tensor
    ) -> tuple[Float[Tensor, "rows p"], Float[Tensor, "columns p"]]:
        if name not in self._signs:
            draw = torch.Generator().manual_seed(self._seed + self.offsets[name])
            rows, columns = (
                torch.randint(0, 2, (size, self.width), generator=draw) * 2.0 - 1
                for size in weight.shape
            )
            self._signs[name] = (rows.to(weight.device), columns.to(weight.device))
        return self._signs[name]
