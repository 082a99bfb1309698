"""Gauss-Newton's matrix itself, by conjugate gradients: what diagonal and EK-FAC approximate.

H v = mean over rows of Jᵀ (diag p − p pᵀ) J v
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from prism_select.core.gradients import (
    differentiable,
    dot,
    minus,
    norm,
    take_gradients,
    wide_dtype,
)
from prism_select.core.layers import Direction, Parameters, owners, swapped
from prism_select.core.likelihood import Batch, LanguageModel
from prism_select.directions.curvature import BlockCurvature

__all__ = ["GaussNewton"]


class GaussNewton:
    """H itself. `blocks`, fitted on the same rows, give each weight's mean eigenvalue and
    precondition the solve."""

    def __init__(
        self,
        model: LanguageModel,
        weights: Parameters,
        rows: Sequence[Batch],
        blocks: BlockCurvature,
    ) -> None:
        self.model, self.weights, self.rows, self.blocks = model, weights, rows, blocks
        self.holders = owners(model.network, weights)

    def times(self, vector: Direction) -> Direction:
        """H · vector."""
        total = {name: torch.zeros_like(value) for name, value in vector.items()}
        with differentiable(self.weights):
            for batch in self.rows:
                self._descend(
                    batch, {name: value.to(self.weights[name]) for name, value in vector.items()}
                )
                for name, gradient in take_gradients(self.weights):
                    total[name] += gradient / sum(map(len, self.rows))
        return total

    def _descend(self, batch: Batch, vector: Direction) -> None:
        """Adds H · vector of one batch, times its size, to the weights' gradients."""
        with self._dual(vector):
            moved = forward_ad.unpack_dual(
                self.model.logits(self.model.hidden(batch)[:, :-1][batch.predicted])
            )
        chance = moved.primal.softmax(-1, dtype=wide_dtype(moved.primal))
        push = chance * (moved.tangent - (chance * moved.tangent).sum(-1, keepdim=True))
        (
            self.model.logits(self.model.hidden(batch)[:, :-1][batch.predicted]) * push
        ).sum().backward()

    @contextmanager
    def _dual(self, vector: Direction) -> Iterator[None]:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            duals = {
                name: forward_ad.make_dual(w.detach(), vector[name])
                for name, w in self.weights.items()
            }
            with swapped(self.holders, duals):
                yield

    def solve(
        self, direction: Direction, damping: float, tolerance: float = 1e-4, steps: int = 200
    ) -> Direction:
        """By preconditioned conjugate gradients, until the residual is `tolerance` times the
        direction or `steps` are done; `residual` keeps that ratio."""
        ridge = {
            name: damping * block.eigenvalues.mean() for name, block in self.blocks.blocks.items()
        }
        solution: Direction = {name: torch.zeros_like(value) for name, value in direction.items()}
        residual_vector: Direction = direction
        step = moved = self.blocks.solve(residual_vector, damping)
        for _ in range(steps):
            self.residual = norm(residual_vector) / (norm(direction) or 1.0)
            if self.residual <= tolerance:
                break
            product = {
                name: value + ridge[name] * step[name] for name, value in self.times(step).items()
            }
            size = dot(residual_vector, moved) / dot(step, product)
            before = dot(residual_vector, moved)
            solution, residual_vector = (
                minus(solution, step, -size),
                minus(residual_vector, product, size),
            )
            moved = self.blocks.solve(residual_vector, damping)
            step = minus(moved, step, -dot(residual_vector, moved) / before)
        return solution
