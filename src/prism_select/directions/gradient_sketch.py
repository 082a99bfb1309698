"""Sketching: a small random picture of each pair's own gradient, taken while the direction is
computed.

    gradient of a row in one matrix = Σ_t g_t x_tᵀ      picture = Σ_t (P g_t)(Q x_t)ᵀ / p      P, Q: p random signs each

Inner products of pictures are those of gradients up to noise: without bias, and with a relative
error of about √(2/p) in one matrix, which many matrices average out. So whatever is linear in the
pairs (halves of them, resamples, the part they share) is known from one backward pass.

Choices made here: pictures cover the weights that have a closed form (Linear, Conv1D, Embedding);
of fused experts, norms and biases there is none, and `share` says how much of the weights they
cover in all their uses. All pictures together hold at most `NUMBERS` numbers."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from prism_select.core.layers import Owner, Parameters, by_example, is_closed, owners, watching
from prism_select.core.target_gradient import Observe

__all__ = ["Sketcher"]

NUMBERS, LONGEST = 2**25, 2**16  # of all pictures (128 MB), of one


class Sketcher:
    """`pictures["chosen"][q]` is that of pair q's part in C, slope and mean over pairs included;
    likewise rejected. Sketchers of the same seed and number of pairs `among` which theirs are make
    pictures that can be compared."""

    def __init__(
        self, network: nn.Module, weights: Parameters, pairs: int, seed: int, among: int = 0
    ) -> None:
        every = owners(network, weights)
        self.owners = [
            owner for owner in every if is_closed(owner.module) and "weight" in owner.weights
        ]
        names = sorted({owner.weights["weight"] for owner in self.owners})
        self.width = max(
            2, math.isqrt(min(LONGEST, NUMBERS // (2 * max(pairs, among))) // max(1, len(names)))
        )
        self.place = {name: i * self.width**2 for i, name in enumerate(names)}
        self.seed, self.signs = seed, dict[str, tuple[Tensor, Tensor]]()
        self.sketches = {
            side: torch.zeros(pairs, len(names) * self.width**2) for side in ("chosen", "rejected")
        }
        whole = {
            name
            for name in names
            if all(o in self.owners for o in every if name in o.weights.values())
        }
        self.share = sum(weights[name].numel() for name in whole) / sum(
            w.numel() for w in weights.values()
        )
        self._side, self._pairs, self._rows = (
            "chosen",
            list[int](),
            torch.zeros(0, dtype=torch.long),
        )

    @contextmanager
    def open(self) -> Iterator[Observe]:
        """While open, every backward pass is pictured; yields what `target_gradient` takes as
        `observe`."""

        def observe(side: str, pairs: Sequence[int]) -> Callable[[Tensor], None]:
            self._side, self._pairs = side, list(pairs)
            return lambda rows: setattr(self, "_rows", rows)

        with watching(self.owners, [], self._visit):
            yield observe

    def _visit(self, owner: Owner, inputs: tuple[Any, ...], _: object, gradient: Tensor) -> None:
        place = by_example(self._rows, len(self._pairs), gradient)
        if place is None:
            return
        if len(place) != len(self._rows):  # a slice per example: as many rows as it has tokens
            place = place.repeat_interleave(gradient[0].numel() // gradient.shape[-1])
        rows, columns = self._projections(owner.weights["weight"], owner.module.weight)  # type: ignore[arg-type]
        moved, given = gradient.to(rows.dtype), inputs[0]
        if (
            type(owner.module) is nn.Embedding
        ):  # its weight is (words, width): the input's side is that of the rows
            sides = functional.embedding(given, rows), moved @ columns
        elif isinstance(owner.module, nn.Linear):
            sides = moved @ rows, given.to(rows.dtype) @ columns
        else:  # Conv1D keeps (d_in, d_out)
            sides = given.to(rows.dtype) @ rows, moved @ columns
        outer = sides[0].reshape(-1, self.width, 1) * sides[1].reshape(-1, 1, self.width)
        found = outer.new_zeros(len(self._pairs), self.width**2).index_add_(
            0, place, outer.flatten(1)
        )
        start = self.place[owner.weights["weight"]]
        self.sketches[self._side][self._pairs, start : start + self.width**2] += (
            found.cpu() / self.width
        )

    def _projections(
        self, name: str, weight: Tensor
    ) -> tuple[Float[Tensor, "rows p"], Float[Tensor, "columns p"]]:
        if name not in self.signs:
            draw = torch.Generator().manual_seed(self.seed + self.place[name])
            drawn = [
                torch.randint(0, 2, (size, self.width), generator=draw) * 2.0 - 1
                for size in weight.shape
            ]
            self.signs[name] = (drawn[0].to(weight.device), drawn[1].to(weight.device))
        return self.signs[name]
