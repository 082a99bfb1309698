"""TODO."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prism_select.core.check import check, disagreement
from prism_select.core.engines import ENGINES, Scores
from prism_select.core.layers import Factored, Parameters
from prism_select.core.likelihood import Batch
from prism_select.data.batches import collate
from prism_select.data.encoding import Encoded
from prism_select.models.causal_lm import CausalLM
from prism_select.run.config import ScoreConfig
from prism_select.run.errors import BadOption, Unreachable
from prism_select.scoring.batched_engine import BatchedEngine, Measure, plainly
from prism_select.scoring.gradient_norms import with_norms

__all__ = ["Checked", "choose_engine", "measure_by"]


@dataclass(frozen=True)
class Checked:
    """An engine, why it was taken, and how far it is from the definition."""

    engine: str
    reason: str
    dtype: str
    rows: int
    disagreement: float
    repeat: float  # between scores of the same rows, taken twice


def choose_engine(
    config: ScoreConfig,
    model: CausalLM,
    weights: Parameters,
    directions: Sequence[Factored],
    rows: Sequence[Encoded],
) -> tuple[BatchedEngine, Checked]:
    """The engine asked for, or the cheapest that reaches every weight and tells what is asked;
    checked against the definition either way, on those of `rows` that have a score."""
    order = engines_for(config, torch.finfo(model.dtype).bits < 32)
    slow = ENGINES["reference"](model, weights, directions)
    exact = slow(collate(rows, model.device))
    finite = exact.values.isfinite().all(dim=1) & exact.loglik.isfinite()
    kept = finite if finite.any() else ~finite  # where no row has a score, the check says so
    known = Scores(exact.loglik[kept], exact.values[kept])
    batch = collate(
        [row for row, keep in zip(rows, kept.tolist(), strict=True) if keep], model.device
    )
    dtype = str(model.dtype).removeprefix("torch.")
    why = f"asked for, {dtype}"
    for name in order:
        if config.engine == "auto" and name == "reverse":
            why = f"one backward pass reaches all {len(weights)} weights in {dtype}"
        if config.engine == "auto" and config.cascade and name == "difference":
            why = f"the cheapest along one direction at a time, {dtype}"
        measure = measure_by(config, name, model, weights, directions)
        try:
            return measure, Checked(
                name, why, dtype, len(batch), *apart(name, measure, known, batch, model.dtype)
            )
        except Unreachable as error:
            why = str(error).partition("; try")[0]
            if name == order[-1] and config.normalize == "norm":
                raise BadOption(f"--normalize norm: {why}; try --normalize tokens") from error
            if name == order[-1]:
                raise
    raise AssertionError("unreachable")


def apart(
    name: str, measure: Measure, known: Scores, batch: Batch, dtype: torch.dtype
) -> tuple[float, float]:
    """Of an engine's scores from the definition's, and from themselves when taken twice. Raises
    what `check` does."""
    (found, _), (again, _) = (measure(batch) for _ in range(2))
    return check(name, lambda _: found, lambda _: known, batch, dtype), disagreement(
        again.values, found.values
    )


def engines_for(config: ScoreConfig, narrow: bool) -> list[str]:
    """In the order in which they are tried; `narrow` is a dtype below float32."""
    if config.engine != "auto":
        return [config.engine]
    if config.tokens:
        return ["forward"] if narrow else ["forward", "difference"]
    if config.normalize == "norm":
        return ["reverse"]
    if config.cascade and not narrow:
        return ["difference"]
    return ["reverse", "forward" if narrow else "difference", "reference"]


def measure_by(
    config: ScoreConfig,
    engine: str,
    model: CausalLM,
    weights: Parameters,
    directions: Sequence[Factored],
) -> BatchedEngine:
    cosines = config.normalize == "norm"
    plain = (
        with_norms(model, weights, directions)
        if cosines
        else plainly(ENGINES[engine](model, weights, directions))
    )
    return BatchedEngine(plain, config.tokens_on(model.device.type, graph=engine != "difference"))
