"""What sharpens a ranking? Curvature × common part × layers × normalisation × weighting, by two
repairs.

    python benchmarks/curvature.py --data DIR    about an hour on one core; a stopped study resumes

Gemma-3-270M (base), bfloat16, all 18 blocks. TruthfulQA: 80 pairs, the right and the wrong answers
of 150 other questions; polite and rude: 60 pairs, both answers to 100 other instructions. Which
rows are the unwanted answers?

Choices made here: every row is scored along both halves of the direction of each weighting, damping
and curvature, block by block, in one pass for each curvature; layers, common part and normalisation
follow from these sums, since each weight has its own curvature. Curvature is fitted on 128 rows of
the pool; intervals resample questions."""

import argparse
import itertools
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pairs import BATCH_TOKENS, Study
from real import WORK, Row, lines, pair, polite_rows, truthful_files
from results_file import figure, write

from prism_select.core.engines import reverse
from prism_select.core.layers import Direction, is_matrix, outer_factors, owners, watching
from prism_select.core.likelihood import Batch, backward
from prism_select.core.statistics import auroc
from prism_select.core.target_gradient import Target, target_gradient
from prism_select.data.batches import collate, plan_batches
from prism_select.data.encoding import Encoded
from prism_select.directions.curvature import CURVATURES, Curvature
from prism_select.directions.pair_encoding import as_side
from prism_select.models.layer_selection import select_parameters

CPU = torch.device("cpu")
FITTED = 128  # rows of the pool
WEIGHTINGS = ("prism", "uniform", "hard", "unpaired")
DAMPINGS: Mapping[str, Sequence[float]] = {
    "flat": (0.0,),
    "diagonal": (0.1, 1.0),
    "ekfac": (0.1, 1.0),
}
LAYERS = {
    "all blocks": range(18),
    "late": range(9, 18),
    "last:12": range(6, 18),
    "last:6": range(12, 18),
}
COMMON = ("keep", "remove", "remove after")
NORMALIZE = ("none", "tokens", "norm")


def polite_files(data: Path) -> tuple[list[Row], list[Row]]:
    rows = polite_rows(data)
    asked = list(dict.fromkeys(row[0] for row in rows))
    first, rest = set(asked[:60]), set(asked[60:160])
    pairs = [pair(*row) for row in rows if row[0] in first][:60]
    made = [pair(*row) for row in rows if row[0] in rest]
    return pairs, [
        {
            "prompt": r["prompt"],
            "completion": r[side],
            "question": r["prompt"],
            "is_bad": side == "rejected",
        }
        for r in made
        for side in ("chosen", "rejected")
    ]


def truthful(split: int, data: Path) -> tuple[list[Row], list[Row]]:
    pairs, pool = truthful_files(data, split)
    return lines(Path(pairs)), lines(Path(pool))


TASKS: Mapping[str, Callable[[Path], tuple[list[Row], list[Row]]]] = {
    "truthfulqa": partial(truthful, 0),
    "polite": polite_files,
}


WANTED = {"truthfulqa": "≥ 0.80", "polite": "≥ 0.75"}  # of the best, which looks better than it is


class Halves:
    """Both halves of the direction of each weighting, before any curvature; a repair aims at the
    unwanted answers."""

    def __init__(self, study: Study, pairs: Sequence[Row]) -> None:
        coded = [
            [study.encode(row["prompt"], row[side]) for row in pairs]
            for side in ("rejected", "chosen")
        ]
        aimed, other = (as_side(side, BATCH_TOKENS, CPU) for side in coded)
        self.of: dict[str, Target] = {
            name: target_gradient(study.model, study.weights, (aimed, other), name)
            for name in WEIGHTINGS[:3]
        }

    def solved(self, curvature: Curvature, damping: float) -> list[Direction]:
        """In bfloat16, to hold many: the engine would round them so anyway."""
        raw = [half for target in self.of.values() for half in (target.chosen, target.rejected)]
        divided = (curvature.solve(half, damping) for half in raw)
        return [{name: value.bfloat16() for name, value in half.items()} for half in divided]

    def grams(self, solved: Sequence[Direction], part: Mapping[str, int]) -> np.ndarray:
        """[weighting, raw half, solved half, block]: their inner products."""
        found = np.zeros((3, 2, 2, 1 + max(part.values())))
        for w, target in enumerate(self.of.values()):
            for i, raw in enumerate((target.chosen, target.rejected)):
                for j in range(2):
                    for name, value in raw.items():
                        found[w, i, j, part[name]] += float(
                            (value * solved[2 * w + j][name].float()).sum()
                        )
        return found


def squared_norms(study: Study, batch: Batch, part: Mapping[str, int]) -> np.ndarray:
    """[example, block], of matrices alone, which are all but 0.02% of the numbers."""
    total = np.zeros((len(batch), 1 + max(part.values())))

    def visit(owner: Any, inputs: Any, _: object, gradient: torch.Tensor) -> None:
        if gradient.ndim == 3 and len(gradient) == len(batch):
            left, right = outer_factors(owner, inputs, gradient)
            for row in range(len(batch)):
                own = (left[row].T @ right[row]).float()
                total[row, part[owner.weights["weight"]]] += float(own.square().sum())

    holders = [owner for owner in owners(study.model.network, study.weights) if is_matrix(owner)]
    with watching(holders, [], visit):
        backward(study.model, batch, torch.ones(len(batch)))
    return total


def measure(study: Study, task: str, data: Path) -> dict[str, dict[str, np.ndarray]]:
    """Scores of one task for each curvature, kept in files."""
    pairs, pool = TASKS[task](data)
    rows = [study.encode(row["prompt"], row["completion"]) for row in pool]
    part = {name: int(re.search(r"layers\.(\d+)\.", name)[1]) for name in study.weights}  # type: ignore[index]
    found: dict[str, dict[str, np.ndarray]] = {}
    halves: Halves | None = None
    for curvature in DAMPINGS:
        place = WORK / f"curvature-{task}-{curvature.replace(', ', '-')}.npz"
        if not place.exists():
            halves = halves or Halves(study, pairs)
            print(f"{task}: {curvature}", flush=True)
            np.savez(place, **scored(study, halves, rows, part, curvature))  # type: ignore[arg-type]
        found[curvature] = dict(np.load(place))
    told = {
        "tokens": np.array([row.targets for row in rows]),
        "bad": np.array([row["is_bad"] for row in pool]),
        "question": np.array([str(row["question"]) for row in pool]),
    }
    return found | {"rows": told}


def fitted(study: Study, rows: Sequence[Encoded], curvature: str) -> Curvature:
    drawn = random.Random(0).sample(rows, min(FITTED, len(rows)))
    batches = [collate([row], CPU) for row in drawn]
    return CURVATURES[curvature](study.model, study.weights, batches, 0)


def scored(
    study: Study, halves: Halves, rows: Sequence[Encoded], part: Mapping[str, int], curvature: str
) -> dict[str, np.ndarray]:
    """Damping by damping, since directions are large."""
    fit, count = fitted(study, rows, curvature), 1 + max(part.values())
    print("  fitted", flush=True)
    along, grams = list[np.ndarray](), list[np.ndarray]()
    squares = np.zeros((len(rows), count))
    for damping in DAMPINGS[curvature]:
        solved = halves.solved(fit, damping)
        grams.append(halves.grams(solved, part))
        split = [
            {n: d for n, d in whole.items() if part[n] == block}
            for whole in solved
            for block in range(count)
        ]
        engine = reverse(study.model, study.weights, split)
        del solved, split
        values = np.zeros((len(rows), 3, 2, count))
        for batch in plan_batches([len(row.tokens) for row in rows], BATCH_TOKENS):
            together = collate([rows[i] for i in batch], CPU)
            values[batch] = engine(together).values.numpy().reshape(len(batch), 3, 2, count)
            if curvature == "flat":
                squares[batch] = squared_norms(study, together, part)
        along.append(values)
        print(f"  damping {damping}", flush=True)
    return {"along": np.stack(along, axis=1), "grams": np.stack(grams), "squares": squares}


def score_of(found: Mapping[str, Mapping[str, np.ndarray]], way: Mapping[str, Any]) -> np.ndarray:
    """Scores of one way, from sums over its blocks."""
    here, raw = found[way["curvature"]], found["flat"]
    place = list(DAMPINGS[way["curvature"]]).index(way["damping"])
    blocks = list(LAYERS[way["layers"]])
    weighting = 1 if way["weighting"] == "unpaired" else WEIGHTINGS.index(way["weighting"])
    chosen, rejected = here["along"][:, place, weighting][:, :, blocks].sum(2).T
    score = chosen if way["weighting"] == "unpaired" else chosen - rejected
    if way["common"] != "keep":
        gram = (raw["grams"][0] if way["common"] == "remove" else here["grams"][place])[weighting][
            :, :, blocks
        ].sum(2)
        common, difference = np.array([0.5, 0.5]), np.array([1.0, -1.0])
        score = (
            score
            - (common @ gram @ difference) / (common @ gram @ common) * (chosen + rejected) / 2
        )
    if way["normalize"] == "tokens":
        score = score / found["rows"]["tokens"]
    elif way["normalize"] == "norm":
        score = score / np.sqrt(raw["squares"][:, blocks].sum(1))
    return np.asarray(score)


def resampled(score: np.ndarray, bad: np.ndarray, question: np.ndarray) -> tuple[float, float]:
    """95% percentile bootstrap of the AUROC over questions, 1,000 draws, seed 0."""
    names, place = np.unique(question, return_inverse=True)
    wins = (score[bad][:, None] > score[~bad]) + 0.5 * (score[bad][:, None] == score[~bad])
    of_bad, of_good = (np.eye(len(names))[place[side]] for side in (bad, ~bad))
    won, draw = of_bad.T @ wins @ of_good, np.random.default_rng(0)
    times = draw.multinomial(len(names), np.full(len(names), 1 / len(names)), 1000)
    found = ((times @ won) * times).sum(1) / ((times @ of_bad.sum(0)) * (times @ of_good.sum(0)))
    return float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))


def ways() -> list[Row]:
    return [
        {
            "curvature": curvature,
            "damping": damping,
            "common": common,
            "layers": layers,
            "normalize": normalize,
            "weighting": weighting,
        }
        for curvature, dampings in DAMPINGS.items()
        for damping, common, layers, normalize, weighting in itertools.product(
            dampings, COMMON, LAYERS, NORMALIZE, WEIGHTINGS
        )
        if not (weighting == "unpaired" and common != "keep")
        if not (curvature == "flat" and common == "remove after")
    ]


def title(way: Mapping[str, Any]) -> str:
    curvature = way["curvature"] + (f" {way['damping']}" if way["damping"] else "")
    common, normalize = f"common {way['common']}", f"normalize {way['normalize']}"
    return f"{curvature}, {way['layers']}, {common}, {normalize}, {way['weighting']}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the public data sets")
    chosen = parser.parse_args()
    study = Study()
    study.weights = select_parameters(study.model.network, r"layers\.\d+\.")
    rows, figures = list[Row](), list[Row]()
    for task in TASKS:
        found = measure(study, task, chosen.data)
        bad, question = found["rows"]["bad"], found["rows"]["question"]
        for way in ways():
            score = score_of(found, way)
            rows.append({"task": task, **way, "auroc": auroc(score, bad)})
            ends = resampled(score, bad, question)
            figures.append(
                figure(f"{task} repair, {title(way)}", rows[-1]["auroc"], "AUROC", "", ends)
            )
        few = [line for line in figures if line["name"].startswith(task)]
        best = max(few, key=lambda line: line["value"])
        name = best["name"].replace(f"{task} repair", f"{task} repair, best of {len(few)}")
        figures.append(figure(name, best["value"], "AUROC", WANTED[task], best["interval"]))
    (WORK / "curvature-rows.json").write_text(json.dumps(rows))
    write("curvature.json", rows, figures)


if __name__ == "__main__":
    main()
