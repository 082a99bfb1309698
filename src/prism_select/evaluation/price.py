"""Price: what scoring cost, and at what price it would not pay.

    price = forward passes over the pool that take as long as scoring, with pairs and curvature
    a training step costs 3 forward passes over its rows

    break-even: random rows, trained on for this much longer than the choice, reach its gain

Choices made here:
- the engine of the run is timed against a forward pass on some rows, once for all evaluations; the
  time of pairs and curvature is that of the run, relative to its scoring;
- the gain of random rows is measured at the points of the random-priced trainings and is linear
  between them; only at their last point has the learning rate fallen to 0.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from prism_select.core.layers import Factored
from prism_select.core.likelihood import mean_logliks
from prism_select.data.batches import collate, plan_batches
from prism_select.data.encoded_rows import CHECKED_ROWS
from prism_select.directions.saved import load_direction
from prism_select.evaluation.past_run import FinishedRun
from prism_select.evaluation.retraining import TrainedResult, TrainingJob, digest
from prism_select.evaluation.training_results import PRICED, Rows, means_of
from prism_select.evaluation.trainings import encoded_rows, sampled
from prism_select.models.loading import LoadedModel
from prism_select.run.config import BESIDE_PAIRS
from prism_select.run.errors import BadOption
from prism_select.run.folder import Run, Store
from prism_select.run.polarity import Polarity
from prism_select.run.progress import Progress
from prism_select.scoring.cost_plan import timed
from prism_select.scoring.engine_choice import choose_engine
from prism_select.scoring.rank_check import cut_to_rank
from prism_select.selection.half_columns import halves_later

__all__ = ["BreakEven", "break_even", "break_even_of", "price_of"]

TIMED = 32  # rows on which scoring is timed against a forward pass


@dataclass(frozen=True)
class BreakEven:
    """All but `gain` and `words` in forward passes over the pool.

    `training` is what the choice trains for; `curve` has (cost beyond it, gain) of random rows;
    `break_even` is None where random rows do not reach the `gain` of the choice.
    """

    words: str
    price: float
    training: float
    curve: Sequence[tuple[float, float]]
    gain: float
    break_even: float | None


def price_of(past: FinishedRun, loaded: LoadedModel, store: Store, progress: Progress) -> float:
    """What the scores cost, in forward passes over the pool.

    Raises BadOption where the run that took the scores is gone.
    """
    mark = digest([past.mark])
    if stored := store.json_of("price.json", mark):
        return float(stored["price"])
    manifest = Run(past.home).manifest
    seconds = manifest["timings"]
    if not seconds["score"]:
        raise BadOption(
            f"{past.home}: the run that took its scores is gone; leave {PRICED} out of --against"
        )
    scoring, forward, tokens = time_scoring(past, loaded, progress)
    total = past.length[past.scored].sum()
    # what the last start scored: less than all after a resume
    share = manifest["actual"]["tokens"] / total
    score_seconds = seconds["score"] / share if share else scoring * total / tokens
    others_share = (seconds["target"] + seconds["curvature"]) / score_seconds
    price = float(scoring / forward * (1 + others_share))
    store.write_json("price.json", {"of": mark, "price": price})
    return price


def time_scoring(
    past: FinishedRun, loaded: LoadedModel, progress: Progress
) -> tuple[float, float, int]:
    """Seconds of scoring and of a forward pass on some rows, and the tokens of these rows."""
    config, model, sample = past.config, loaded.model, sampled(past)
    spread = sample[:: math.ceil(len(sample) / TIMED)]
    rows = list(encoded_rows(past, [spread], loaded.encoder).values())
    saved, toward = str(past.home / "direction.safetensors"), Polarity.of_config(config).toward
    direction_set = load_direction(saved, model, toward, bool(config.warmup))
    directions: Sequence[Factored] = direction_set.directions
    if config.rank_number and config.curvature in BESIDE_PAIRS:
        directions, _ = cut_to_rank(config, config.rank_number, model, direction_set, rows)
    if halves_later(config, direction_set.layout, len(past.scored)):
        directions = directions[: len(direction_set.layout.targets)]
    weights = direction_set.weights
    engine, _ = choose_engine(config, model, weights, directions, rows[:CHECKED_ROWS])
    plan = plan_batches([len(row.tokens) for row in rows], engine.tokens)
    batches = [collate([rows[i] for i in batch], model.device) for batch in plan]
    seconds = np.zeros((4, 2))
    with progress.task("price of scoring", None):
        for row in seconds:
            row[:] = [
                sum(map(partial(timed, function), batches))
                for function in (engine, partial(mean_logliks, model))
            ]
    scoring, forward = np.median(seconds[1:], axis=0)
    return float(scoring), float(forward), sum(len(row.tokens) for row in rows)


def break_even_of(
    cost: Callable[[TrainingJob], float],
    price: float,
    results: Sequence[TrainedResult],
    question: Rows,
) -> BreakEven:
    """The curve of random rows, and where it reaches the gain of prism.

    `cost` of a training is in forward passes over the pool.
    """
    priced = [result for result in results if result.job.method == PRICED]
    ours, random = (
        [result for result in results if result.job.method == name][: len(priced)]
        for name in ("prism", "random")
    )

    def gain(trained: Sequence[TrainedResult], index: int) -> float:
        points = [result.points[min(index, len(result.points) - 1)] for result in trained]
        return means_of(points, question)["gain"]

    training, longest, last = cost(ours[0].job), cost(priced[0].job), priced[0].final
    curve = [(0.0, gain(random, -1))] if random else []
    for index, point in enumerate(priced[0].points):
        beyond = point.step / last.step * longest - training
        if beyond > 0 or point is last:
            curve.append((beyond, gain(priced, index)))
    our_gain = gain(ours, -1)
    cost_to_match = break_even(curve, our_gain)
    words = (
        f"scoring took {price:.1f} × the cost of a forward pass over the pool; random rows reach "
        "the gain of prism "
    )
    if cost_to_match is None:
        words += "not even for that"
    else:
        words += f"for {cost_to_match:.1f} × that cost beyond what prism trains for"
    return BreakEven(words, price, training, curve, our_gain, cost_to_match)


def break_even(curve: Sequence[tuple[float, float]], gain: float) -> float | None:
    """The first cost at which a curve of (cost, gain), linear between its points, reaches a gain;
    None where it never does."""
    if curve[0][1] >= gain:
        return curve[0][0]
    for (a, low), (b, high) in pairwise(curve):
        if high >= gain > low:
            return a + (b - a) * (gain - low) / (high - low)
    return None
