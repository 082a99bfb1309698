"""TODO."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from prism_select.core.likelihood import mean_logliks
from prism_select.data.batches import collate, plan_batches
from prism_select.data.encoded_rows import CHECKED_ROWS
from prism_select.data.encoding import Encoder
from prism_select.directions.saved import load_direction, towards
from prism_select.evaluation.past_run import FinishedRun
from prism_select.evaluation.retraining import TrainedResult, TrainingJob, digest
from prism_select.evaluation.training_results import PRICED, Rows, means_of
from prism_select.evaluation.trainings import encoded_rows, sampled
from prism_select.models.causal_lm import CausalLM
from prism_select.run.errors import BadOption
from prism_select.run.folder import Run, Store
from prism_select.run.progress import Progress
from prism_select.scoring.cost_plan import timed
from prism_select.scoring.engine_choice import choose_engine
from prism_select.scoring.rank_check import reduced

__all__ = ["break_even", "break_even_of", "price_of"]

TIMED = 32  # rows on which scoring is timed against a forward pass


def price_of(
    past: FinishedRun, loaded: tuple[CausalLM, Encoder], store: Store, progress: Progress
) -> float:
    """What the scores cost, in forwards of the pool: the run's engine is timed against a forward
    pass on some of its rows, once for all evaluations, and the time of pairs and curvature is added
    as the run measured it beside that of scoring."""
    mark = digest([past.mark])
    if there := store.json_of("price.json", mark):
        return float(there["price"])
    took = Run(past.home).manifest["timings"]
    if not took["score"]:
        raise BadOption(
            f"{past.home}: the run that took its scores is gone; leave {PRICED} out of --against"
        )
    model, encoder = loaded
    places = sampled(past)
    rows = list(encoded_rows(past, [places[:: math.ceil(len(places) / TIMED)]], encoder).values())
    saved = str(past.home / "direction.safetensors")
    aim = load_direction(saved, model, towards(past.config), bool(past.config.warmup))
    directions = reduced(past.config, model, aim, rows)[0] if past.config.rank else aim.directions
    engine, _ = choose_engine(past.config, model, aim.weights, directions, rows[:CHECKED_ROWS])
    plan = plan_batches([len(row.tokens) for row in rows], engine.tokens)
    batches = [collate([rows[i] for i in batch], model.device) for batch in plan]
    seconds = np.zeros((4, 2))
    with progress.task("price of scoring", None):
        for times in seconds:
            times[:] = [
                sum(map(partial(timed, way), batches))
                for way in (engine, partial(mean_logliks, model))
            ]
    score, forward = np.median(seconds[1:], axis=0)
    every = past.length[past.scored].sum()
    share = (
        Run(past.home).manifest["actual"]["tokens"] / every
    )  # what the last start scored: less after a resume
    whole = took["score"] / share if share else score * every / sum(len(row.tokens) for row in rows)
    price = float(score / forward * (1 + (took["target"] + took["curvature"]) / whole))
    store.write_json("price.json", {"of": mark, "price": price})
    return price


def break_even_of(
    passes: Callable[[TrainingJob], float],
    price: float,
    found: Sequence[TrainedResult],
    question: Rows,
) -> dict[str, Any]:
    """At what price scoring would not pay: random's gain against the forwards that it took beyond
    those of the choice, at the points of its dearer trainings. Only at the last of these had the
    learning rate fallen to 0."""
    dear = [(lot, points) for lot, points in found if lot.method == PRICED]
    ours, plain = (
        [(lot, points) for lot, points in found if lot.method == name][: len(dear)]
        for name in ("prism", "random")
    )

    def gain(each: Sequence[TrainedResult], place: int) -> float:
        return float(
            means_of([points[min(place, len(points) - 1)] for _, points in each], question)["gain"]
        )

    spent, most = passes(ours[0][0]), passes(dear[0][0])
    curve, last = [(0.0, gain(plain, -1))] if plain else [], dear[0][1][-1]
    for place, point in enumerate(dear[0][1]):
        more = point.step / last.step * most - spent
        curve += [(more, gain(dear, place))] if more > 0 or point is last else []
    wanted = gain(ours, -1)
    found_at = break_even(curve, wanted)
    told = f"scoring took {price:.1f} forwards of the pool; random reaches the gain of prism "
    told += (
        "not even for that"
        if found_at is None
        else f"for {found_at:.1f} more than prism trains for"
    )
    return {
        "words": told,
        "price": price,
        "training": spent,
        "curve": curve,
        "gain": wanted,
        "break_even": found_at,
    }


def break_even(curve: Sequence[tuple[float, float]], wanted: float) -> float | None:
    """The first forwards at which a curve of (forwards, gain) reaches the gain wanted, between its
    points on a line; None where it never does."""
    if curve[0][1] >= wanted:
        return curve[0][0]
    for (a, low), (b, high) in pairwise(curve):
        if high >= wanted > low:
            return a + (b - a) * (wanted - low) / (high - low)
    return None
