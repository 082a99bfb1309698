"""Ways to rank a pool by pairs, tried on products of gradients that are kept on disk.

    split of the questions → direction of each way → scores of the pool → AUROC, precision
                           ↘ cross-validation on the pairs alone

Choices made here:
- the target is the first 20, 40 or 80 questions of a split, and the pool all beyond the first 80
  (polite: 60), so that targets of all sizes meet one pool;
- the pool is thinned to the bad share by leaving out answers; intervals draw its rows, each of
  another question, with replacement;
- layer and strength of the probe, and the layer of the vector filter, are those that rank held-out
  pairs best, in the same folds; projection difference and concept influence need the model again,
  and so does EK-FAC: they are left out."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from repair_gradients import FOLDER, Row, rows_of
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from prism_select.data.records import Example, Pair, Turn
from prism_select.directions.answer_products import AnswerProducts
from prism_select.directions.cross_validation import (
    direction_coefficients,
    held_out_scores,
    row_scale,
)
from prism_select.directions.pair_folds import PairGroups, folds_of, groups_of
from prism_select.directions.tuning import tune
from prism_select.directions.way import Way
from prism_select.selection.hidden_state_baselines import choose_probe, choose_vector

SIZES, SHARES, SPLITS, DRAWS = (20, 40, 80), (0.1, 0.3, 0.5), 3, 1000
LARGEST = {"polite": 60}
LAYERS = {"all": 18, "last 12": 12, "late": 9, "last 6": 6}
Floats = NDArray[np.float64]


class Setting(NamedTuple):
    layers: str
    way: Way

    @property
    def name(self) -> str:
        way = self.way
        curvature = f"pairs {way.damping:g}" if way.curvature == "pairs" else "flat"
        removed = ", common removed" if way.common == "remove" else ""
        whole = ", whole answers" if way.likelihood == "sequence" else ""
        return f"{way.weighting}{whole}, {curvature}{removed}, {self.layers}, {way.normalize}"


DEFAULT = Setting("all", Way())
FIRST_ORDER = Setting("all", Way(curvature="flat"))


def settings(blocks: int) -> list[Setting]:
    kinds: list[dict[str, Any]] = [
        {"curvature": "flat"},
        {"curvature": "flat", "common": "remove"},
        *({"curvature": "pairs", "damping": damping} for damping in (0.1, 0.3, 1.0)),
    ]
    product = itertools.product(
        [name for name, count in LAYERS.items() if count <= blocks],
        ("prism", "uniform", "hard"),
        kinds,
        ("none", "tokens", "norm"),
    )
    return [
        Setting(layers, Way(weighting=weighting, normalize=normalize, **kind))
        for layers, weighting, kind, normalize in product
    ] + [
        Setting(
            DEFAULT.layers, Way(likelihood="sequence", weighting=weighting, curvature=curvature)
        )
        for weighting in ("prism", "uniform", "hard")
        for curvature in ("flat", "pairs")
    ]


@dataclass(frozen=True)
class Family:
    """Rows and what is on disk about them."""

    name: str
    rows: Sequence[Row]
    data: Mapping[str, Any]

    @classmethod
    def load(cls, name: str, data: Path, folder: Path = FOLDER) -> "Family":
        rows = rows_of(name, data)
        with np.load(folder / f"{name}.npz") as file:
            family = cls(name, rows, {key: file[key] for key in file})
        assert family.data["question"].tolist() == [row[0] for row in rows]
        return family

    @cached_property
    def blocks(self) -> list[int]:
        return sorted(int(name.split()[1]) for name in self.data if name.startswith("block "))

    @cached_property
    def paired(self) -> NDArray[np.int64]:
        """Questions, (count, 2): the rows of the good answer and of the bad one."""
        questions = [row[0] for row in self.rows]
        return np.array(
            [(k, k + 1) for k, row in enumerate(questions[:-1]) if questions[k + 1] == row]
        )

    @cached_property
    def products(self) -> dict[str, Tensor]:
        every = np.stack([self.data[f"block {k}"] for k in self.blocks])
        return {
            name: torch.from_numpy(every[-count:].sum(0))
            for name, count in LAYERS.items()
            if count <= len(every)
        }

    def of(self, layers: str, rows: Sequence[int] | NDArray[np.int64]) -> AnswerProducts:
        kept = torch.as_tensor(np.asarray(rows))
        return AnswerProducts(
            {"": self.products[layers][kept][:, kept]},
            torch.from_numpy(self.data["mean_loglik"])[kept],
            torch.from_numpy(self.data["tokens"])[kept],
        )

    def by_block(self, rows: NDArray[np.int64]) -> AnswerProducts:
        own = np.ix_(rows, rows)
        return AnswerProducts(
            {str(k): torch.from_numpy(self.data[f"block {k}"][own]) for k in self.blocks},
            torch.from_numpy(self.data["mean_loglik"][rows]),
            torch.from_numpy(self.data["tokens"][rows]),
        )

    def groups(self, questions: NDArray[np.int64]) -> PairGroups:
        def example(row: int) -> Example:
            _, _, question, answer = self.rows[row]
            return Example((Turn("user", question), Turn("assistant", answer)), "", "", "", 0, 1)

        return groups_of([Pair(example(bad), example(good)) for good, bad in questions])


class Split(NamedTuple):
    """`pairs` are (questions, 2), good and bad; `pools` are rows, by the share of bad ones."""

    pairs: NDArray[np.int64]
    pools: dict[float, NDArray[np.int64]]


def split_of(family: Family, seed: int) -> Split:
    draw = np.random.default_rng(seed)
    largest = LARGEST.get(family.name, max(SIZES))
    questions = draw.permutation(family.paired)
    rest = questions[largest:]
    others = np.setdiff1d(np.arange(len(family.data["bad"])), family.paired.ravel())
    is_bad = family.data["bad"][others]
    good, bad = draw.permutation(others[~is_bad]), draw.permutation(others[is_bad])
    pools = {}
    for share in SHARES:
        count = round(share * len(rest))
        own = np.concatenate([rest[:count, 1], rest[count:, 0]])
        many = min(len(bad), round(len(good) * share / (1 - share)))
        few = min(len(good), round(many * (1 - share) / share))
        pools[share] = np.concatenate([own, bad[:many], good[:few]])
    return Split(questions[:largest], pools)


class Ranking(NamedTuple):
    """Scores of all rows and of held-out answers, bad ones first, both along directions of length
    one. A bad row should score high."""

    rows: Floats
    held: Floats | None = None


def ranking_of(
    family: Family, setting: Setting, answers: NDArray[np.int64], folds: list[NDArray[np.int64]]
) -> Ranking:
    products = family.of(setting.layers, answers)
    held = held_out_scores(products, setting.way, folds)
    coefficients = direction_coefficients(setting.way, products)
    return Ranking(_along(family, setting, answers, coefficients), held.numpy())


def _along(
    family: Family, setting: Setting, answers: NDArray[np.int64], coefficients: Tensor
) -> Floats:
    every = family.products[setting.layers]
    own = torch.from_numpy(answers)
    along = every[:, own] @ coefficients
    length = (coefficients @ every[own][:, own] @ coefficients).sqrt()
    scale = row_scale(setting.way, family.of(setting.layers, range(len(every))))
    return np.asarray((along / length * scale).numpy())


def contrast(family: Family, setting: Setting, answers: NDArray[np.int64]) -> Floats:
    """IF-Guide: gradients of bad answers minus those of good ones, summed over tokens."""
    tokens = torch.from_numpy(family.data["tokens"][answers]).double()
    sign = torch.ones(len(answers), dtype=torch.float64)
    sign[len(answers) // 2 :] = -1
    return _along(family, setting, answers, sign * tokens)


def standardised(scores: Floats) -> Floats:
    return np.asarray((scores - scores.mean()) / scores.std())


def baselines(
    family: Family, answers: NDArray[np.int64], folds: list[NDArray[np.int64]], seed: int
) -> Iterator[tuple[str, Floats, float]]:
    """Name, scores of all rows, and AUROC of held-out answers."""
    states = family.data["states"].astype(np.float64)
    bad, good = np.split(states[:, answers], 2, axis=1)
    linear, vector = choose_probe(bad, good, folds), choose_vector(bad, good, folds)
    of_probe = linear.linear(states[linear.layer])
    yield "linear probe", of_probe, linear.auroc
    yield "vector filter", vector.linear(states[vector.layer]), vector.auroc
    own = ranking_of(family, DEFAULT, answers, folds).rows
    yield "probe and score, standardised and added", standardised(of_probe) + standardised(own), nan
    for name, way in (("unpaired", Way()), ("unpaired, cosine (LESS)", Way(normalize="norm"))):
        way = replace(way, weighting="unpaired", curvature="flat")
        yield name, ranking_of(family, Setting(DEFAULT.layers, way), answers, folds).rows, nan
    yield "contrast (IF-Guide)", contrast(family, FIRST_ORDER, answers), nan
    yield "random", np.random.default_rng(seed).random(len(family.rows)), nan
    yield "tokens of the answer", family.data["tokens"].astype(float), nan


class Measure(NamedTuple):
    auroc: float
    low: float
    high: float
    precision: float


def measured(scores: Floats, bad: NDArray[np.bool_], times: Floats) -> Measure:
    """`times` says how often each row is drawn, (draws, rows)."""
    order = np.argsort(-scores, kind="stable")[: bad.sum()]
    above = (scores[bad][:, None] > scores[~bad]) + (scores[bad][:, None] == scores[~bad]) / 2
    drawn_bad, drawn_good = times[:, bad], times[:, ~bad]
    pairs = drawn_bad.sum(1) * drawn_good.sum(1)
    values = ((drawn_bad @ above) * drawn_good).sum(1) / np.maximum(pairs, 1)
    low, high = np.quantile(values[pairs > 0], [0.025, 0.975])
    return Measure(float(above.mean()), float(low), float(high), float(bad[order].mean()))


def held_out_auroc(held: Floats) -> float:
    bad, good = held.reshape(2, -1)
    return float(((bad[:, None] > good) + (bad[:, None] == good) / 2).mean())


def calibration(held: Floats, scores: Floats, bad: NDArray[np.bool_]) -> dict[str, Any]:
    """P(bad) of each row, and what it says of a pool. The error is the mean over fifths of the pool
    of |mean probability − bad share|, with the share as found, and as known; the interval of the
    expected number is over draws of pairs and of rows."""
    mean, deviation = held.mean(), held.std()
    pairs, rows = (held.reshape(2, -1) - mean) / deviation, (scores - mean) / deviation
    half = even_odds(pairs, rows)
    share = bad_share(half)
    found, known = moved(half, share), moved(half, float(bad.mean()))
    draw = np.random.default_rng(0)
    counts = []
    for _ in range(200):
        drawn = pairs[:, draw.integers(pairs.shape[1], size=pairs.shape[1])]
        own = rows[draw.integers(len(rows), size=len(rows))]
        counts.append(len(rows) * bad_share(even_odds(drawn, own)))
    above = found > 0.5
    return {
        "rows": len(bad),
        "bad": int(bad.sum()),
        "expected": float(found.sum()),
        "interval": [float(end) for end in np.quantile(counts, [0.025, 0.975])],
        "error": fifths_error(found, bad),
        "error_known_share": fifths_error(known, bad),
        "above_half": int(above.sum()),
        "bad_above_half": int(bad[above].sum()),
    }


def even_odds(pairs: Floats, rows: Floats) -> Floats:
    """P(bad) of rows if half of them were bad: logistic regression on held-out answers' scores."""
    labels = np.arange(pairs.size) < pairs.shape[1]
    fitted = LogisticRegression(C=1e3).fit(pairs.reshape(-1, 1), labels)
    return np.asarray(fitted.predict_proba(rows[:, None])[:, 1])


def moved(half: Floats, share: float) -> Floats:
    return share * half / (share * half + (1 - share) * (1 - half))


def bad_share(half: Floats) -> float:
    """By expectation maximisation (Saerens et al. 2002)."""
    share = 0.5
    for _ in range(300):
        share = float(moved(half, share).mean())
    return share


def fifths_error(probability: Floats, bad: NDArray[np.bool_]) -> float:
    fifths = np.array_split(np.argsort(probability, kind="stable"), 5)
    gaps = [len(part) * abs(probability[part].mean() - bad[part].mean()) for part in fifths]
    return float(sum(gaps) / len(bad))


class Trial(NamedTuple):
    """One ranking of one split with pairs of one size. `calibrated` is by the bad share, of the
    default way."""

    family: str
    name: str
    setting: Setting | None
    size: int
    split: int
    pool: dict[float, Measure]
    cv: float
    calibrated: Mapping[float, Mapping[str, Any]] | None = None


def trials_of(family: Family, splits: int = SPLITS) -> Iterator[Trial]:
    bad = family.data["bad"]
    for seed in range(splits):
        split = split_of(family, seed)
        times = {
            share: np.random.default_rng(0)
            .multinomial(len(pool), [1 / len(pool)] * len(pool), DRAWS)
            .astype(float)
            for share, pool in split.pools.items()
        }

        def pools(
            scores: Floats, split: Split = split, times: dict[float, Floats] = times
        ) -> dict[float, Measure]:
            return {
                share: measured(scores[rows], bad[rows], times[share])
                for share, rows in split.pools.items()
            }

        for size in sorted({min(size, len(split.pairs)) for size in SIZES}):
            pairs = split.pairs[:size]
            groups = family.groups(pairs)
            folds = folds_of(groups, seed)
            answers = np.concatenate([pairs[:, 1], pairs[:, 0]])
            for setting in settings(len(family.blocks)):
                rows, held = ranking_of(family, setting, answers, folds)
                assert held is not None
                cv = held_out_auroc(held)
                calibrated = None
                if setting == DEFAULT:
                    calibrated = {
                        share: calibration(held, rows[own], bad[own])
                        for share, own in split.pools.items()
                    }
                yield Trial(
                    family.name,
                    setting.name,
                    setting,
                    size,
                    seed,
                    pools(rows),
                    cv,
                    calibrated,
                )
            for name, scores, cv in baselines(family, answers, folds, seed):
                yield Trial(family.name, name, None, size, seed, pools(scores), cv)


def tuned(family: Family, splits: int = SPLITS) -> Iterator[dict[str, Any]]:
    """What --tune pairs chooses from all options, with the most pairs, and how it ranks."""
    bad = family.data["bad"]
    for seed in range(splits):
        split = split_of(family, seed)
        groups = family.groups(split.pairs)
        answers = np.concatenate([split.pairs[:, 1], split.pairs[:, 0]])
        found = tune(family.by_block(answers), DEFAULT.way, (), groups, seed)
        assert found
        line: dict[str, Any] = {"family": family.name, "split": seed, "tried": len(found.tried)}
        rows = split.pools[0.3]
        for name, trial in (("chosen", found.chosen), ("best", found.best)):
            layers = trial.way.layers.replace("last:", "last ")
            setting = Setting(layers, replace(trial.way, layers="all"))
            scores = ranking_of(family, setting, answers, []).rows[rows]
            times = np.ones((1, len(rows)))
            auroc = measured(scores, bad[rows], times).auroc
            line |= {
                name: setting.name,
                f"auroc of the {name}": auroc,
                f"cv of the {name}": trial.auroc,
            }
        yield line | {"nested": found.nested.auroc}
