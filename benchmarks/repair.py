"""Which direction finds the bad rows of a pool, and does cross-validation on the pairs foretell it?

    make repair DATA=folder        forty minutes on two cores; a stopped study resumes

Gemma-3-270M (base), bfloat16. Four families of pairs: TruthfulQA's right and wrong answers, polite
and rude ones, safe and insecure code, right and wrong solutions. Gradients are computed once
(repair_gradients.py), and every way is tried on their products (repair_ways.py).

Choices made here:
- figures are means over splits at a bad share of 30%, with 80 pairs (polite: 60);
- tuning (directions/tuning.py) reads the pairs that give the direction, and nothing else;
- `rows` keep every way at full size, and the default, first order and baselines at each size."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from repair_gradients import FAMILIES, FOLDER, prepare
from repair_ways import (
    DEFAULT,
    FIRST_ORDER,
    SHARES,
    SPLITS,
    Family,
    Setting,
    Trial,
    settings,
    trials_of,
    tuned,
)
from results_file import figure, write

from prism_select.core.statistics import rank_correlation

Line = dict[str, Any]
SHARE = 0.3
WANTED = {"truthfulqa": "≥ 0.79", "polite": "≥ 0.78", "code": "≥ 0.82"}
NAMES = {
    "truthfulqa": "TruthfulQA",
    "polite": "polite/rude",
    "code": "insecure code",
    "math": "wrong math",
}
BASELINES = (
    "linear probe",
    "vector filter",
    "unpaired",
    "unpaired, cosine (LESS)",
    "contrast (IF-Guide)",
    "random",
)
SUM = "probe and score, standardised and added"


def mean(values: Iterable[float]) -> float:
    return float(np.mean([*values]))


def largest(trials: Sequence[Trial]) -> list[Trial]:
    size = max(trial.size for trial in trials)
    return [trial for trial in trials if trial.size == size]


def truth(trials: Iterable[Trial], name: str) -> float:
    return mean(trial.pool[SHARE].auroc for trial in trials if trial.name == name)


def foretold(trials: Iterable[Trial], name: str) -> float:
    return mean(trial.cv for trial in trials if trial.name == name)


def summary(trials: Sequence[Trial]) -> Line:
    """Of one way, family and size, over splits."""
    measures = {f"{share:.0%}": [trial.pool[share] for trial in trials] for share in SHARES}
    ends = [mean(m.low for m in measures["30%"]), mean(m.high for m in measures["30%"])]
    line: Line = {
        "family": trials[0].family,
        "way": trials[0].name,
        "pairs": trials[0].size,
        **{f"auroc_{share}": mean(m.auroc for m in ms) for share, ms in measures.items()},
        "interval_30%": [round(end, 4) for end in ends],
        **{f"precision_{share}": mean(m.precision for m in ms) for share, ms in measures.items()},
        "cv": mean(trial.cv for trial in trials),
    }
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in line.items()
        if not (name == "cv" and np.isnan(value))
    }


def summaries(trials: Sequence[Trial]) -> list[Line]:
    full = {id(trial) for trial in largest(trials)}
    few = (DEFAULT, FIRST_ORDER, None)
    grouped = dict[tuple[str, int], list[Trial]]()
    for trial in trials:
        if id(trial) in full or trial.setting in few:
            grouped.setdefault((trial.name, trial.size), []).append(trial)
    return [{"study": "ways", **summary(group)} for group in grouped.values()]


def calibrated(trials: Sequence[Trial]) -> list[Line]:
    return [
        {"study": "probability", "family": t.family, "split": t.split, "share": share, **found}
        for t in largest(trials)
        for share, found in (t.calibrated or {}).items()
    ]


def one_change() -> dict[str, list[Setting]]:
    """The default way with one option changed."""
    layers, way = DEFAULT

    def changed(option: str, *values: Any) -> list[Setting]:
        return [Setting(layers, replace(way, **{option: value})) for value in values]

    return {
        "layers": [Setting(name, way) for name in ("all", "last 12", "late", "last 6")],
        "likelihood": changed("likelihood", "token", "sequence"),
        "first order's likelihood": [
            Setting(layers, replace(FIRST_ORDER.way, likelihood=likelihood))
            for likelihood in ("token", "sequence")
        ],
        "weighting": changed("weighting", "prism", "uniform", "hard"),
        "curvature": [FIRST_ORDER, *changed("damping", 0.1, 0.3, 1.0)],
        "normalize": changed("normalize", "none", "tokens", "norm"),
        "first order's common part": [
            Setting(layers, replace(FIRST_ORDER.way, common=common))
            for common in ("keep", "remove")
        ],
    }


def family_figures(name: str, trials: Sequence[Trial], choices: Sequence[Line]) -> list[Line]:
    title = f"{NAMES[name]}, bad share 30%, {trials[0].size} pairs"
    ways = [("default way", DEFAULT.name), ("first order", FIRST_ORDER.name)]
    figures = []
    for label, way in [*ways, *((baseline, baseline) for baseline in (*BASELINES, SUM))]:
        own = [trial.pool[SHARE] for trial in trials if trial.name == way]
        ends = mean(m.low for m in own), mean(m.high for m in own)
        wanted = WANTED.get(name, "") if way == DEFAULT.name else ""
        line = f"{title}: {label}, mean of {SPLITS} splits"
        figures.append(figure(line, mean(m.auroc for m in own), "AUROC", wanted, ends))
    for rule, label in (("chosen", "--tune pairs"), ("best", "the best way on held-out pairs")):
        aurocs = [line[f"auroc of the {rule}"] for line in choices if line["family"] == name]
        line = f"{title}: {label}, mean of {SPLITS} splits"
        figures.append(figure(line, mean(aurocs), "AUROC", ""))
    cv = foretold(trials, DEFAULT.name)
    return [*figures, figure(f"{title}: default way, held-out pairs", cv, "AUROC", "")]


def mean_figures(full: Mapping[str, Sequence[Trial]], choices: Sequence[Line]) -> list[Line]:
    over = f"mean over {len(full)} families, bad share 30%"
    scores = {name: everywhere(full, name) for name in (*BASELINES, SUM)}
    bar = max(scores[name] for name in BASELINES)
    own, first = everywhere(full, DEFAULT.name), everywhere(full, FIRST_ORDER.name)
    figures = [
        figure(f"{over}: default way", own, "AUROC", f"≥ {bar:.3f}"),
        figure(f"{over}: first order", first, "AUROC", ""),
        *(figure(f"{over}: {name}", value, "AUROC", "") for name, value in scores.items()),
    ]
    for rule, title in (("chosen", "--tune pairs"), ("best", "the best way on held-out pairs")):
        value = mean(line[f"auroc of the {rule}"] for line in choices)
        figures.append(figure(f"{over}: {title}", value, "AUROC", ""))
    gaps = [line["nested"] - line["auroc of the chosen"] for line in choices]
    line = f"{over}: held-out pairs in nested folds minus the pool, after tuning"
    figures.append(figure(line, mean(gaps), "AUROC", ""))
    for way, title in ((DEFAULT, "default way"), (FIRST_ORDER, "first order")):
        name = Setting(way.layers, replace(way.way, likelihood="sequence")).name
        line = f"{over}: {title}, likelihood of whole answers"
        figures.append(figure(line, everywhere(full, name), "AUROC", ""))
    return figures


def everywhere(full: Mapping[str, Sequence[Trial]], way: str) -> float:
    return mean(truth(trials, way) for trials in full.values())


def both(full: Mapping[str, Sequence[Trial]], ways: Sequence[str]) -> np.ndarray:
    """(families, ways, 2): AUROC of held-out pairs, and of the pool."""
    return np.array([[(foretold(ts, way), truth(ts, way)) for way in ways] for ts in full.values()])


def prediction_figures(full: Mapping[str, Sequence[Trial]], ways: Sequence[str]) -> list[Line]:
    found = both(full, ways)
    line = "rank correlation of held-out pairs with the pool's AUROC"
    every = rank_correlation(*found.reshape(-1, 2).T)
    return [
        figure(f"{line}, over families and ways", every, "", "≥ 0.8"),
        *(
            figure(f"{line}, over the ways of {NAMES[name]}", rank_correlation(*own.T), "", "")
            for name, own in zip(full, found, strict=True)
        ),
    ]


def comparisons(full: Mapping[str, Sequence[Trial]], ways: Sequence[str]) -> list[Line]:
    """Means over families: the default with one option changed, and the ways that held-out pairs
    rank first."""
    changes = [(option, s.name) for option, own in one_change().items() for s in own]
    values = both(full, [name for _, name in changes]).mean(0).tolist()
    lines = [
        {"study": "one option changed", "option": option, "way": way, "cv": cv, "auroc": auroc}
        for (option, way), (cv, auroc) in zip(changes, values, strict=True)
    ]
    means = both(full, ways).mean(0)
    for place in np.argsort(-means[:, 0])[:10]:
        cv, auroc = means[place].tolist()
        line = {"study": "best by held-out pairs", "way": ways[place], "cv": cv, "auroc": auroc}
        lines.append(line)
    return lines


def probability_figures(lines: Sequence[Line]) -> list[Line]:
    title = "probability of a row to be bad"
    held = [line["interval"][0] <= line["bad"] <= line["interval"][1] for line in lines]
    gaps = [(line["expected"] - line["bad"]) / line["rows"] for line in lines]
    return [
        figure(f"{title}: calibration error", mean(x["error"] for x in lines), "", "≤ 0.05"),
        figure(
            f"{title}: calibration error if the bad share were known",
            mean(x["error_known_share"] for x in lines),
            "",
            "",
        ),
        figure(f"{title}: expected minus true share of bad rows, mean", mean(gaps), "", ""),
        figure(f"{title}: the same without its sign", mean(map(abs, gaps)), "", ""),
        figure(f"{title}: intervals that hold the true number", mean(held), "share", "≥ 0.9"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kept", action="store_true", help="only families that are on disk")
    chosen = parser.parse_args()
    names = [n for n in FAMILIES if not chosen.kept or (FOLDER / f"{n}.npz").exists()]
    found = dict[str, list[Trial]]()
    rows, choices = list[Line](), list[Line]()
    for name in names:
        prepare(name, chosen.data)
        family = Family.load(name, chosen.data)
        found[name] = list(trials_of(family))
        choices += [{"study": "tuning", **line} for line in tuned(family)]
        rows += summaries(found[name])
    full = {name: largest(trials) for name, trials in found.items()}
    common = set.intersection(*({t.name for t in ts if t.setting} for ts in full.values()))
    ways = [setting.name for setting in settings(18) if setting.name in common]
    chances = [line for trials in found.values() for line in calibrated(trials)]
    figures = [
        line for name, trials in full.items() for line in family_figures(name, trials, choices)
    ]
    figures += mean_figures(full, choices) + prediction_figures(full, ways)
    figures += probability_figures(chances)
    write("repair.json", [*comparisons(full, ways), *choices, *chances, *rows], figures)


if __name__ == "__main__":
    main()
