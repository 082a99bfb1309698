"""Check: how far an engine is from the definition, on the user's own rows and in tests.

    disagreement = max over directions of ‖fast − slow‖ / ‖slow‖        without unit; 0 is perfect

Choices made here:
- norms are over the checked rows, so a row whose score is near zero raises no false alarm.
"""

import torch

from prism_select.run.errors import EnginesDisagree, NotFinite

__all__ = ["check", "disagreement", "tolerance"]


def tolerance(engine: str, dtype: torch.dtype) -> float:
    """The disagreement that rounding explains, for a model of this dtype."""
    by_dtype = {torch.float64: 1e-4, torch.float32: 1e-3}
    return {"reference": 0.0, "difference": 2e-2}.get(engine, by_dtype.get(dtype, 0.05))


def disagreement(fast: torch.Tensor, slow: torch.Tensor) -> float:
    """Of scores shaped (rows, directions)."""
    error = (fast.double() - slow.double()).norm(dim=0)
    size = slow.double().norm(dim=0)
    return float((error / size.clamp(min=1e-30)).max())


def check(engine: str, fast: torch.Tensor, slow: torch.Tensor, dtype: torch.dtype) -> float:
    """The disagreement of scores shaped (rows, directions) with those of the definition. Raises
    EnginesDisagree above the tolerance, NotFinite where the definition gives no number."""
    if not slow.isfinite().all():
        raise NotFinite(
            "the first rows of the pool have scores that are NaN or infinite; try --dtype float32"
        )
    error, allowed = disagreement(fast, slow), tolerance(engine, dtype)
    if not error <= allowed:
        raise EnginesDisagree(
            f"engine {engine} and the definition differ by {error:.1e} on the first {len(slow)} "
            f"rows (allowed {allowed:.0e}); try --dtype float32, or --engine reference to be exact "
            "and slow"
        )
    return error
