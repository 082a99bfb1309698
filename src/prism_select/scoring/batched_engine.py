"""TODO."""

from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prism_select.core.engines import Engine, Scores
from prism_select.core.likelihood import Batch
from prism_select.data.batches import collate, plan_batches
from prism_select.data.encoding import Encoded
from prism_select.directions.layout import Floats
from prism_select.run.errors import TooLarge, out_of_memory

__all__ = ["BatchedEngine", "Measure", "of_rows", "plainly"]

Measure: TypeAlias = Callable[
    [Batch], tuple[Scores, Float[Tensor, " batch"] | None]
]  # scores, and gradient norms


def plainly(engine: Engine) -> Measure:
    return lambda batch: (engine(batch), None)


class BatchedEngine:
    """A measure that takes as many rows of a batch together as fit: at most so many tokens, padding
    included, until that once was more than the device has memory for; then half, here and ever
    after. Raises TooLarge for a row that does not fit by itself."""

    def __init__(self, measure: Measure, tokens: int) -> None:
        self.measure, self.tokens = measure, tokens

    def __call__(self, batch: Batch) -> tuple[Scores, Float[Tensor, " batch"] | None]:
        parts, done, width = list[tuple[Scores, Tensor | None]](), 0, batch.tokens.shape[1]
        while done < len(batch):
            few = batch.rows(slice(done, done + max(1, self.tokens // width)))
            try:
                parts.append(self.measure(few))
                done += len(few)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if len(few) == 1:
                    raise TooLarge(f"a row of {width} tokens", str(few.tokens.device)) from None
                self.tokens = few.tokens.numel() // 2
        if len(parts) == 1:
            return parts[0]
        columns = zip(*((*scores, norms) for scores, norms in parts), strict=True)
        loglik, values, tokens, norms = (
            None if part[0] is None else torch.cat(part) for part in columns
        )
        return Scores(cast("Tensor", loglik), cast("Tensor", values), tokens), norms


def of_rows(
    measure: BatchedEngine, rows: Sequence[Encoded], device: torch.device
) -> tuple[Floats, Floats | None]:
    """Of each row the scores [row, direction], and the gradient's norm where it is measured."""
    order, found, lengths = list[int](), list[Floats](), list[Floats]()
    for few in plan_batches([len(row.tokens) for row in rows], measure.tokens):
        scores, norms = measure(collate([rows[i] for i in few], device))
        order += few
        found.append(scores.values.double().cpu().numpy())
        lengths += [] if norms is None else [norms.double().cpu().numpy()]
    back = np.argsort(order)
    return np.concatenate(found)[back], np.concatenate(lengths)[back] if lengths else None
