"""Engine choice: the fastest engine that reaches every selected parameter, checked on the user's
rows.

    tried in order    reverse, difference (below float32: forward), reference
    one direction     difference first, of a model where cost matters
    --tokens          forward, difference
    --normalize norm  reverse
    --cascade         difference

Choices made here:
- an engine that the user names is the only one that is tried;
- an engine that cannot reach a parameter gives way to the next, and the reason is reported;
- in float32, along one direction in full of `COSTLY` numbers or more, `difference` costs half of
  `reverse` (benchmarks/results/cost.json); it gives way where it is off by more than `CLOSE`. That
  is a rule and no timing, so that the same command takes the same engine;
- the check compares with the definition, on rows whose scores are finite;
- of more than `CHECKED` selected numbers, parameters of so many are compared, drawn evenly: the
  definition needs their gradients in full. `reverse` itself runs along all of them; the engines
  that move whole parameters have room for the definition of all.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_select.core.check import check, disagreement
from prism_select.core.engines import ENGINES, Scores
from prism_select.core.layers import Factored, Parameters
from prism_select.core.likelihood import Batch
from prism_select.data.batches import collate
from prism_select.data.encoding import Encoded
from prism_select.models.causal_lm import CausalLM
from prism_select.run.config import ScoreConfig
from prism_select.run.errors import BadOption, Unreachable
from prism_select.scoring.batched_engine import BatchedEngine, without_norms
from prism_select.scoring.gradient_norms import with_norms

__all__ = ["EngineCheck", "choose_engine", "make_engine"]

CHECKED, COSTLY = 2**24, 2**22  # numbers
CLOSE = 1e-3


@dataclass(frozen=True)
class EngineCheck:
    """Why an engine was taken, and how its scores of `rows` rows disagree: with the definition, and
    with themselves when taken twice (`repeat`)."""

    engine: str
    reason: str
    dtype: str
    rows: int
    disagreement: float
    repeat: float


def choose_engine(
    config: ScoreConfig,
    model: CausalLM,
    parameters: Parameters,
    directions: Sequence[Factored],
    rows: Sequence[Encoded],
) -> tuple[BatchedEngine, EngineCheck]:
    """Raises what `check` raises, Unreachable where no engine reaches every parameter, and
    BadOption where none of them has norms."""
    names = _candidates(config, torch.finfo(model.dtype).bits < 32)
    is_cheaper = names[0] == "reverse" and is_cheapest_by_difference(config, parameters, directions)
    names = ["difference", *names] if is_cheaper else names
    dtype = str(model.dtype).removeprefix("torch.")
    reason = f"asked for, {dtype}"
    for place, name in enumerate(names):
        if config.engine == "auto" and name == "reverse" and place == 0:
            reason = f"one backward pass reaches all {len(parameters)} weights in {dtype}"
        if config.engine == "auto" and name == "difference" and place == 0:
            reason = f"the cheapest along one direction at a time, {dtype}"
        engine = make_engine(config, name, model, parameters, directions)
        some = checked_parameters(parameters) if name == "reverse" else parameters
        few = [{name: d[name] for name in some if name in d} for d in directions]
        batch, exact = _finite_rows(model, some, few, rows)
        try:
            (first, _), (second, _) = (engine(batch) for _ in range(2))
            compared = first
            if len(some) < len(parameters):
                compared, _ = make_engine(config, name, model, some, few)(batch)
            if is_cheaper and place == 0:
                off = disagreement(compared.values, exact.values)
                if not off <= CLOSE:
                    reason = f"difference would be off by {off:.0e}, {dtype}"
                    continue
            off = check(name, compared.values, exact.values, model.dtype)
            repeat = disagreement(second.values, first.values)
            return engine, EngineCheck(name, reason, dtype, len(batch), off, repeat)
        except Unreachable as error:
            reason = str(error).partition("; try")[0]
            if name == names[-1] and config.normalize == "norm":
                raise BadOption(f"--normalize norm: {reason}; try --normalize tokens") from error
            if name == names[-1]:
                raise
    raise AssertionError("unreachable")


def is_cheapest_by_difference(
    config: ScoreConfig, parameters: Parameters, directions: Sequence[Factored]
) -> bool:
    dtypes = {parameter.dtype for parameter in parameters.values()}
    is_full = all(isinstance(value, Tensor) for value in directions[0].values())
    return (
        config.engine == "auto"
        and config.normalize != "norm"
        and len(directions) == 1
        and is_full
        and dtypes == {torch.float32}
        and sum(parameter.numel() for parameter in parameters.values()) >= COSTLY
    )


def _finite_rows(
    model: CausalLM,
    parameters: Parameters,
    directions: Sequence[Factored],
    rows: Sequence[Encoded],
) -> tuple[Batch, Scores]:
    """Rows with a finite score, and their scores by the definition; all rows where none is finite,
    so that the check reports it."""
    exact = ENGINES["reference"](model, parameters, directions)(collate(rows, model.device))
    finite = exact.values.isfinite().all(dim=1) & exact.loglik.isfinite()
    checked = finite if finite.any() else ~finite
    remaining = [row for row, use in zip(rows, checked.tolist(), strict=True) if use]
    return collate(remaining, model.device), Scores(exact.loglik[checked], exact.values[checked])


def checked_parameters(parameters: Parameters) -> Parameters:
    """All of them, or as many as have `CHECKED` numbers, drawn evenly; one at least."""
    names, left, drawn = [*parameters], CHECKED, set[str]()
    random.Random(0).shuffle(names)
    for name in sorted(names, key=lambda name: parameters[name].numel() > CHECKED):
        if parameters[name].numel() <= left or not drawn:
            drawn.add(name)
            left -= parameters[name].numel()
    return {name: parameter for name, parameter in parameters.items() if name in drawn}


def _candidates(config: ScoreConfig, narrow: bool) -> list[str]:
    """Names of engines in the order in which they are tried; `narrow`: a dtype below float32."""
    if config.engine != "auto":
        return [config.engine]
    if config.tokens:
        return ["forward"] if narrow else ["forward", "difference"]
    if config.normalize == "norm":
        return ["reverse"]
    if config.cascade and not narrow:
        return ["difference"]
    return ["reverse", "forward" if narrow else "difference", "reference"]


def make_engine(
    config: ScoreConfig,
    name: str,
    model: CausalLM,
    parameters: Parameters,
    directions: Sequence[Factored],
) -> BatchedEngine:
    measure = (
        with_norms(model, parameters, directions)
        if config.normalize == "norm"
        else without_norms(ENGINES[name](model, parameters, directions))
    )
    return BatchedEngine(
        measure, config.tokens_on(model.device.type, model.size, graph=name != "difference")
    )
