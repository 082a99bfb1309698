"""Check: how far an engine is from the definition, at run time on the user's own rows and in the
tests.

    disagreement = max over directions of ‖fast − slow‖ / ‖slow‖        no unit; 0 is perfect

Choices made here: norms over the checked rows, so that a row whose score is near zero cannot raise
a false alarm."""

import torch

from prism_select.core.engines import Engine
from prism_select.core.likelihood import Batch
from prism_select.run.errors import EnginesDisagree, NotFinite

__all__ = ["check", "disagreement", "tolerance"]


def tolerance(engine: str, dtype: torch.dtype) -> float:
    usual = {torch.float64: 1e-4, torch.float32: 1e-3}.get(dtype, 0.05)
    return {"reference": 0.0, "difference": 2e-2}.get(engine, usual)


def disagreement(fast: torch.Tensor, slow: torch.Tensor) -> float:
    """Of scores shaped (rows, directions)."""
    apart, size = (fast.double() - slow.double()).norm(dim=0), slow.double().norm(dim=0)
    return float((apart / size.clamp(min=1e-30)).max())


def check(engine: str, fast: Engine, slow: Engine, batch: Batch, dtype: torch.dtype) -> float:
    """The disagreement on `batch`. Raises EnginesDisagree above tolerance, NotFinite without
    numbers."""
    exact = slow(batch).values
    if not exact.isfinite().all():
        raise NotFinite(
            "the first rows of the pool have scores that are NaN or infinite; try --dtype float32"
        )
    apart, allowed = disagreement(fast(batch).values, exact), tolerance(engine, dtype)
    if not apart <= allowed:
        raise EnginesDisagree(
            f"engine {engine} and the definition differ by {apart:.1e} on the first {len(batch)} rows (allowed "
            f"{allowed:.0e}); try --dtype float32, or --engine reference to be exact and slow"
        )
    return apart
