"""The paper's repair in small: fine-tune on a mix, pair the answers to questions that got worse,
rank the rows of the mix, take the worst out, train again.

    make paper DATA=folder      an hour and a half on two quiet cores; a stopped study resumes

Gemma-3-270M, bfloat16; two families of repair.py: TruthfulQA's right and wrong answers, polite and
rude ones. The model before has learned from good answers to other questions. A split draws the
questions that are asked and the pool; 1, 10, 20 or 50% of the pool's answers are bad.

Choices made here:
- pairs are both answers to the `WORSE` questions whose preference fell most: the gap of mean
  log-likelihoods, good minus bad. `prism pairs --how before-after` wants the favourite itself to
  change, which at this size happens to few of 90 questions (told in the rows);
- scores are taken at the model before;
- each training is an epoch of LoRA; its rate was set on a split that is in no figure, by whether
  the model after prefers good answers less often;
- as many rows are removed as are bad; held-out questions are in no pair and in no pool;
- at 1% two rows are bad, as one alone has no interval; intervals of an AUROC draw good and bad rows
  of every pool, those of trainings the seeds and the held-out questions;
- insecure code and wrong solutions are left out for their cost: their rows are long.
"""

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from real import WORK, model
from repair_gradients import SEED, encoded, mean_states, prepare, questions_of, rows_of
from repair_ways import (
    DEFAULT,
    DRAWS,
    FIRST_ORDER,
    Family,
    Floats,
    Setting,
    baselines,
    ranking_of,
)
from results_file import figure, write

from prism_select.core.statistics import auroc, paired_interval
from prism_select.core.target_gradient import pair_logliks
from prism_select.data.encoding import Encoded, Encoder
from prism_select.directions.pair_encoding import as_side
from prism_select.directions.pair_folds import folds_of
from prism_select.directions.way import Way
from prism_select.models.loading import load
from prism_select.models.lora_training import TrainingSettings, train
from prism_select.selection.hidden_state_baselines import projection_difference
from prism_select.selection.hidden_states import own_answers

HERE = WORK / "paper"
FAMILIES, MIXES, SPLITS, WORSE = ("truthfulqa", "polite"), (0.01, 0.1, 0.2, 0.5), 3, 20
ASKED, POOL, HELD_OUT, LEARNED = 90, 120, 80, 200
RATE = 1e-3
RETRAINED = (0.2, 0.5)
REMOVERS = ("prism", "linear probe", "random", "oracle")
WAYS = {
    "prism": DEFAULT,
    "prism, first order": FIRST_ORDER,
    "prism, first order, whole answers": Setting(
        "all", Way(likelihood="sequence", curvature="flat")
    ),
    "without π": Setting("all", Way(weighting="uniform")),
    "without π, first order": Setting("all", Way(weighting="uniform", curvature="flat")),
}
RIVALS = (
    "unpaired",
    "unpaired, cosine (LESS)",
    "contrast (IF-Guide)",
    "vector filter",
    "linear probe",
    "random",
)
TITLES = {"unpaired": "without π and pairs"}
Line = dict[str, Any]


class Mix(NamedTuple):
    """`asked` are (questions, 2), the rows of the good and of the bad answer; `pool` are rows."""

    family: Family
    split: int
    share: float
    asked: NDArray[np.int64]
    pool: NDArray[np.int64]

    @property
    def name(self) -> str:
        return f"{self.family.name}-{self.split}-{self.share:g}"

    @property
    def bad(self) -> NDArray[np.bool_]:
        return np.array([self.family.rows[row][1] for row in self.pool])


def mixes_of(family: Family, split: int) -> Iterator[Mix]:
    """More and more questions of one pool with a bad answer."""
    draw = np.random.default_rng(100 + split)
    asked, rest = np.split(draw.permutation(family.paired), [ASKED])
    pool = rest[:POOL]
    for share in MIXES:
        count = max(2, round(share * len(pool)))
        rows = np.concatenate([pool[:count, 1], pool[count:, 0]])
        yield Mix(family, split, share, asked, np.random.default_rng(split).permutation(rows))


def every_mix(family: Family) -> list[Mix]:
    return [mix for split in range(SPLITS) for mix in mixes_of(family, split)]


def other_rows(family: str, data: Path) -> tuple[list[Any], list[Any]]:
    """Of questions beyond the family's: both answers of the held-out ones, and the good answers
    that the model before learns from."""
    known = len({row[0] for row in rows_of(family, data)})
    beyond = questions_of(family, data, random.Random(SEED))[known:]
    held_out = [
        (0, bad, prompt, answers[bad])
        for prompt, *answers in beyond[:HELD_OUT]
        for bad in (False, True)
    ]
    learned = [(0, False, prompt, good) for prompt, good, _ in beyond[HELD_OUT:][:LEARNED]]
    return held_out, learned


@dataclass
class Trainings:
    """Those of one family; each is a file."""

    family: str
    data: Path

    def __post_init__(self) -> None:
        start = self.before if (self.before / "config.json").exists() else model()
        self.lm, self.tokenizer = load(str(start), "bfloat16", torch.device("cpu"))
        self.encoder = Encoder(self.tokenizer, "plain", 256, self.lm.vocabulary)
        held_out, learned = other_rows(self.family, self.data)
        self.held_out = [encoded(self.encoder, row) for row in held_out]
        if start != self.before:
            rows = [encoded(self.encoder, row) for row in learned]
            trained = train(self.lm, self.tokenizer, rows, TrainingSettings(0, rate=RATE))
            trained.merge_and_unload().save_pretrained(self.before)
            self.tokenizer.save_pretrained(self.before)
            self.__post_init__()

    @property
    def before(self) -> Path:
        return HERE / f"before-{self.family}"

    def after(self, mix: Mix, name: str, rows: NDArray[np.int64]) -> Mapping[str, Floats]:
        """Mean log-likelihoods of good and bad answers, (questions, 2), asked and held out, after
        training on `rows`; without any, of the model before."""
        path = HERE / f"{mix.name}-{name}.npz"
        if not path.exists():
            own = [encoded(self.encoder, mix.family.rows[row]) for row in rows.tolist()]
            asked = [
                encoded(self.encoder, mix.family.rows[row]) for row in mix.asked.ravel().tolist()
            ]
            settings = TrainingSettings(mix.split, rate=RATE)
            learner: Any = train(self.lm, self.tokenizer, own, settings) if own else None
            self.lm.network.eval().requires_grad_(False)
            found = {"asked": self.logliks(asked), "held_out": self.logliks(self.held_out)}
            if learner:
                learner.unload()
            np.savez(path, asked=found["asked"], held_out=found["held_out"])
            print(path.stem, flush=True)
        with np.load(path) as file:
            return dict(file)

    def logliks(self, answers: Sequence[Encoded]) -> Floats:
        side = as_side(answers, 512, self.lm.device)
        return np.asarray(pair_logliks(self.lm, side).numpy()).reshape(-1, 2)

    def own_states(self, rows: Sequence[Any]) -> Floats:
        """States of the model's own answers to the prompts of rows."""
        path = HERE / f"own-{self.family}.npy"
        if not path.exists():
            ends = [self.tokenizer.eos_token_id]
            asked = [encoded(self.encoder, row) for row in rows]
            np.save(path, mean_states(self.lm, own_answers(self.lm, asked, ends, 1024, 0)))
        return np.asarray(np.load(path), np.float64)


@dataclass
class Changed:
    """What a training on a mix did to the questions that are asked."""

    mix: Mix
    before: Mapping[str, Floats]
    after: Mapping[str, Floats]

    @property
    def fall(self) -> Floats:
        gaps = [side["asked"][:, 0] - side["asked"][:, 1] for side in (self.before, self.after)]
        return np.asarray(gaps[0] - gaps[1])

    @property
    def pairs(self) -> NDArray[np.int64]:
        worst = np.argsort(-self.fall, kind="stable")[:WORSE]
        return np.asarray(self.mix.asked[worst[self.fall[worst] > 0]])

    @cached_property
    def scores(self) -> dict[str, Floats]:
        return rankings(self.mix, self.pairs)

    @property
    def favourites(self) -> int:
        """Questions of which another answer is preferred, and it is the bad one."""
        good = [side["asked"][:, 0] > side["asked"][:, 1] for side in (self.before, self.after)]
        return int((good[0] & ~good[1]).sum())


def changed(mix: Mix, trainings: Trainings) -> Changed:
    before = trainings.after(mix._replace(share=0.0), "before", mix.pool[:0])
    return Changed(mix, before, trainings.after(mix, "mix", mix.pool))


def rankings(mix: Mix, pairs: NDArray[np.int64]) -> dict[str, Floats]:
    """Scores of all rows, high for bad ones; projection difference is apart."""
    folds = folds_of(mix.family.groups(pairs), mix.split)
    answers = np.concatenate([pairs[:, 1], pairs[:, 0]])
    found = {name: ranking_of(mix.family, way, answers, folds).rows for name, way in WAYS.items()}
    rivals = baselines(mix.family, answers, folds, mix.split)
    return found | {name: scores for name, scores, _ in rivals if name in RIVALS}


def moved(mix: Mix, pairs: NDArray[np.int64], own: Floats) -> Floats:
    """Projection difference of all rows."""
    states = mix.family.data["states"].astype(np.float64)
    bad, good = (states[:, pairs[:, side]] for side in (1, 0))
    folds = folds_of(mix.family.groups(pairs), mix.split)
    return projection_difference(bad, good, states, own, folds)


def drawn(scores: Floats, bad: NDArray[np.bool_], seed: Sequence[int]) -> Floats:
    """AUROCs of drawn rows, good and bad ones apart."""
    above = (scores[bad][:, None] > scores[~bad]) + (scores[bad][:, None] == scores[~bad]) / 2
    draw = np.random.default_rng(seed)
    of_bad, of_good = (draw.multinomial(n, [1 / n] * n, DRAWS) / n for n in above.shape)
    return np.asarray(((of_bad @ above) * of_good).sum(1))


def ranked(changes: Sequence[Changed], own: Floats) -> tuple[list[Line], dict[str, Floats]]:
    """A line for each mix and way, and the drawn AUROCs of mixes by way, (mixes, draws)."""
    lines, draws = list[Line](), dict[str, list[Floats]]()
    for place, change in enumerate(changes):
        mix = change.mix
        line = {
            "study": "rankings",
            "family": mix.family.name,
            "split": mix.split,
            "mix": mix.share,
            "pool": len(mix.pool),
            "bad": int(mix.bad.sum()),
            "pairs": len(change.pairs),
            "fell": int((change.fall > 0).sum()),
            "other favourite": change.favourites,
        }
        found = {"projection difference": moved(mix, change.pairs, own)}
        for name, scores in (change.scores | found).items():
            lines.append({**line, "way": name, "auroc": auroc(scores[mix.pool], mix.bad)})
            seed = [FAMILIES.index(mix.family.name), place]
            draws.setdefault(name, []).append(drawn(scores[mix.pool], mix.bad, seed))
    return lines, {name: np.array(values) for name, values in draws.items()}


def retrained(changes: Sequence[Changed], trainings: Trainings) -> Iterator[Line]:
    """Gaps and right preferences of held-out questions, before, after, and without the rows at the
    top of each ranking."""
    for change in changes:
        mix = change.mix
        scores = change.scores | {"oracle": mix.family.data["bad"].astype(float)}
        gaps = {"before": change.before, "after": change.after}
        for name in REMOVERS:
            kept = np.argsort(-scores[name][mix.pool], kind="stable")[mix.bad.sum() :]
            gaps[name] = trainings.after(mix, name.split()[0], mix.pool[np.sort(kept)])
        for name, found in gaps.items():
            gap = found["held_out"][:, 0] - found["held_out"][:, 1]
            line = {"family": mix.family.name, "split": mix.split, "mix": mix.share, "way": name}
            yield {"study": "retraining", **line, "gaps": [round(x, 4) for x in gap.tolist()]}


def ranking_figures(lines: Sequence[Line], draws: Mapping[str, Floats]) -> list[Line]:
    cells = [line for line in lines if line.get("way") == "prism"]
    over = f"mean over {len(cells)} pools of {len(FAMILIES)} families"
    figures, ours = [], draws["prism"].mean(0)
    for name, values in draws.items():
        mean = float(np.mean([line["auroc"] for line in lines if line.get("way") == name]))
        ends = np.quantile(values.mean(0), [0.025, 0.975]).tolist()
        figures.append(figure(f"{over}: {TITLES.get(name, name)}", mean, "AUROC", "", ends))
    middle = figures[0]["value"]
    for each, name in zip(figures[1:], list(draws)[1:], strict=True):
        ends = np.quantile(ours - draws[name].mean(0), [0.025, 0.975]).tolist()
        line = f"{over}: prism minus {TITLES.get(name, name)}"
        figures.append(figure(line, middle - each["value"], "AUROC", "", ends))
    for share in MIXES:
        own = [line["auroc"] for line in cells if line["mix"] == share]
        line = f"prism at {share:.0%} bad rows, mean over {len(own)} pools"
        figures.append(figure(line, float(np.mean(own)), "AUROC", ""))
    return figures


def training_figures(lines: Sequence[Line]) -> list[Line]:
    figures = []
    for family in FAMILIES:
        for share in RETRAINED:
            gaps = dict[str, list[list[float]]]()
            for line in lines:
                if (line["family"], line["mix"]) == (family, share):
                    gaps.setdefault(line["way"], []).append(line["gaps"])
            found = {name: np.array(values) for name, values in gaps.items()}
            where = f"{family}, {share:.0%} bad rows, held-out questions"
            for name, values in found.items():
                right = float((values > 0).mean())
                figures.append(figure(f"{where}: right preference, {name}", right, "share", ""))
                figures.append(
                    figure(
                        f"{where}: gap, {name}",
                        float(values.mean()),
                        "nats per token",
                        "",
                        paired_interval(values, 0),
                    )
                )
            for name in (*REMOVERS, "after"):
                if name != "random" and name in found:
                    over = found[name] - found["random"]
                    figures.append(
                        figure(
                            f"{where}: gap, {name} minus random removal",
                            float(over.mean()),
                            "nats per token",
                            "",
                            paired_interval(over, 0),
                        )
                    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    rows, trained, draws = list[Line](), list[Line](), list[dict[str, Floats]]()
    for name in FAMILIES:
        HERE.mkdir(parents=True, exist_ok=True)
        trainings = Trainings(name, data)
        for mix in every_mix(Family(name, rows_of(name, data), {})):
            changed(mix, trainings)
        prepare(name, data, HERE, trainings.before)
        family = Family.load(name, data, HERE)
        changes = [changed(mix, trainings) for mix in every_mix(family)]
        lines, own = ranked(changes, trainings.own_states(family.rows))
        rows += lines
        draws.append(own)
        trained += retrained([c for c in changes if c.mix.share in RETRAINED], trainings)
    every = {way: np.concatenate([own[way] for own in draws]) for way in draws[0]}
    figures = ranking_figures(rows, every) + training_figures(trained)
    write("paper.json", [*rows, *trained], figures)


if __name__ == "__main__":
    main()
