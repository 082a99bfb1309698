"""The removal curve: its figures are those of separate trainings, nothing is trained twice, and the
page says what it shows."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Row, jsonl, prism
from made_run import made_curve, write_evaluation, write_run
from numpy.typing import NDArray

import prism_select
from prism_select.cli.summaries import evaluation_summary
from prism_select.demo.story import MODEL
from prism_select.demo.world import DEMO_SKILL, mixture, pairs, pool
from prism_select.evaluation import evaluate as evaluation
from prism_select.evaluation import retraining
from prism_select.evaluation.evaluate import evaluate
from prism_select.evaluation.lm_eval_tasks import is_seen
from prism_select.evaluation.past_run import open_run
from prism_select.evaluation.removal_curve import bad_rows, removal_jobs
from prism_select.evaluation.retraining import Point, Retrainer, TrainingJob
from prism_select.report.run_facts import read_run_facts
from prism_select.report.run_page import page_of
from prism_select.report.sections.training import SECTION
from prism_select.run.config_evaluate import REMOVALS, EvaluateConfig
from prism_select.run.errors import BadOption
from prism_select.run.folder import Run
from prism_select.run.progress import Silent
from prism_select.selection.baselines import BASELINES

ROWS = 80


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repair that removed 20% of rows with labels, another that removed 35%, and a choice."""
    folder = tmp_path_factory.mktemp("removals")
    held = pairs(DEMO_SKILL, 16, 1)
    jsonl(folder / "target.jsonl", pairs(DEMO_SKILL, 8, 0))
    jsonl(folder / "held.jsonl", held)
    shared: dict[str, Any] = {
        "model": str(MODEL),
        "pool": jsonl(folder / "mixture.jsonl", mixture(ROWS, 0)),
        "target": folder / "target.jsonl",
    }
    for share in (20, 35):
        prism_select.repair(
            **shared, out=str(folder / f"repair-{share}"), remove=f"{share}%", label_field="is_bad"
        )
    shared["pool"] = jsonl(folder / "pool.jsonl", pool(40, 0))
    prism_select.select(**shared, out=str(folder / "select"), budget="10")
    return folder


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrainingJob]:
    """Those that were made; controls are not measured."""
    made: list[TrainingJob] = []

    def counted(retrainer: Retrainer, job: TrainingJob) -> list[Point]:
        made.append(job)
        return train(retrainer, job)

    train = Retrainer.train
    monkeypatch.setattr(Retrainer, "train", counted)
    monkeypatch.setattr(evaluation, "run_controls", lambda *_: [])
    monkeypatch.setattr(retraining, "POINTS", 1)
    return made


def config_of(place: Path, run: str = "repair-20", **options: Any) -> EvaluateConfig:
    short: dict[str, Any] = {"seeds": 1, "steps": "2", "rate": 2e-3, "against": "random"}
    return EvaluateConfig(
        run=str(place / run), holdout=str(place / "held.jsonl"), **{**short, **options}
    )


def copied(place: Path, folder: Path) -> Path:
    """Another folder with the runs, without their evaluations."""
    for run in ("repair-20", "repair-35"):
        shutil.copytree(place / run, folder / run, ignore=shutil.ignore_patterns("evaluation"))
    shutil.copy(place / "held.jsonl", folder)
    return folder


def point_of(result: dict[str, Any], share: float, method: str) -> dict[str, Any]:
    (point,) = (p for p in result["curve"] if (p["removed"], p["method"]) == (share, method))
    return dict(point)


# ---------------------------------------------------------------- figures


def test_a_point_is_the_evaluation_of_a_run_that_removed_as_much(
    place: Path, trained: list[TrainingJob]
) -> None:
    """Means, and the interval of prism minus random, of two trainings each."""
    options: dict[str, Any] = {"seeds": 2, "against": "random,length,everything"}
    curve = evaluate(config_of(place, removals="20%,35%", **options))
    other = evaluate(config_of(place, "repair-35", removals="off", **options))
    measures = ("gain", "gap", "win_rate", "accuracy", "loglik_chosen")
    for share, result in ((0.2, curve), (0.35, other)):
        for name in ("prism", "random", "length"):
            point, method = point_of(curve, share, name), result["methods"][name]
            assert point["rows"] == method["rows"][0] == round((1 - share) * ROWS)
            for measure in measures:
                assert point[measure] == pytest.approx(method[measure], abs=1e-12)
        over = point_of(curve, share, "prism")["over_random"]
        assert over["gain"] == pytest.approx(result["against"]["random"]["gain"], abs=1e-12)
        assert "random removal" in over["words"]
    everything = point_of(curve, 0.0, "everything")
    assert everything["gain"] == pytest.approx(curve["methods"]["everything"]["gain"])
    assert everything["rows"] == ROWS and everything["over_random"] is None
    assert point_of(curve, 0.35, "random")["over_random"] is None
    low, high = everything["gain_interval"]
    assert low < everything["gain"] < high
    assert other["curve"] == []


def test_rows_are_those_that_the_ranking_puts_last(place: Path) -> None:
    """By the definition: sort by score, and leave out the first."""
    config = config_of(place, removals="10%,35%", seeds=2, against="length,everything")
    past = open_run(config)
    table = Run(place / "repair-20").scores
    score, tokens = (table[name].to_numpy() for name in ("score", "tokens"))
    jobs = removal_jobs(config, past, {"length": tokens.astype(float)}, None)
    rows: dict[tuple[float, str], list[list[int]]] = {}
    for each in jobs:
        rows.setdefault((each.share, each.ranking), []).append(each.job.rows.tolist())
    assert list(rows) == [
        (0.0, "everything"),
        *((share, name) for share in (0.1, 0.35) for name in ("prism", "random", "length")),
    ]
    for share in (0.1, 0.35):
        count = round(share * ROWS)
        for name, ranking in (("prism", score), ("length", tokens)):
            last = sorted(np.argsort(-ranking, kind="stable")[count:].tolist())
            assert rows[share, name] == [last, last]
        first, second = rows[share, "random"]
        assert first != second and len(first) == len(second) == ROWS - count
    assert rows[0.0, "everything"] == [list(range(ROWS))] * 2


def test_the_oracle_removes_bad_rows_first_and_then_others_at_random(place: Path) -> None:
    config = config_of(place, removals="5%,50%", seeds=3)
    past = open_run(config)
    labels = bad_rows(past)
    assert labels and labels[0].all()
    bad = set(np.flatnonzero(labels[1]).tolist())
    assert 0.05 * ROWS < len(bad) < 0.5 * ROWS
    jobs = [job for job in removal_jobs(config, past, {}, labels[1]) if job.ranking == "oracle"]
    removed = [set(range(ROWS)) - set(each.job.rows.tolist()) for each in jobs]
    assert [len(rows) for rows in removed] == [round(0.05 * ROWS)] * 3 + [ROWS // 2] * 3
    assert all(rows < bad for rows in removed[:3]) and all(rows > bad for rows in removed[3:])
    assert len(set(map(frozenset, removed))) == 6


# ---------------------------------------------------------------- what is trained


def test_nothing_is_trained_twice_and_what_is_finished_is_read(
    place: Path, tmp_path: Path, trained: list[TrainingJob]
) -> None:
    """Two shares of as many rows, the share of the run, and everything are one training each."""
    folder = copied(place, tmp_path)

    def made(**options: Any) -> tuple[int, dict[str, Any]]:
        trained.clear()
        result = evaluate(config_of(folder, **{"against": "random,everything", **options}))
        contents = {(job.rows.tobytes(), job.settings) for job in trained}
        assert len(contents) == len(trained)
        return len(trained), result

    count, first = made(removals="20%,10%,10.1%")
    # prism, random, everything; prism and random without 8 rows; the oracle without 16 and 8
    assert count == 7
    assert [point["removed"] for point in first["curve"][1::3]] == [0.1, 0.101, 0.2]
    again = made(removals="20%,10%,10.1%")
    assert again[0] == 0 and again[1]["curve"] == first["curve"]
    (folder / "repair-20" / "evaluation" / "retrained" / "prism-without-8-0.parquet").unlink()
    again = made(removals="20%,10%,10.1%")
    assert again[0] == 1 and again[1]["curve"] == first["curve"]
    assert made(removals="off")[0] == 0
    assert made(removals="20%,35%")[0] == 3


def test_the_default_shares_are_said_before_they_are_trained(
    place: Path, tmp_path: Path, trained: list[TrainingJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, int]] = []
    monkeypatch.setattr(Silent, "say", lambda _, line: said.append((line, len(trained))))
    result = evaluate(config_of(copied(place, tmp_path), steps="1"))
    ((line, before),) = ((line, count) for line, count in said if "curve" in line)
    assert line.startswith(f"{len(trained)} trainings, {len(trained) - 2} of them") and not before
    shares = [f"{100 * point['removed']:.4g}%" for point in result["curve"]]
    assert list(dict.fromkeys(shares)) == ["0%", *REMOVALS.split(",")]
    summary = evaluation_summary(config_of(place), result)
    assert summary["curve"].count("[") == 5 and "; 10% " in summary["curve"]
    assert "supervised tokens" not in summary["training"]  # as many rows, and not as many tokens


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        (None, [0.05, 0.1, 0.2, 0.35, 0.5]),
        ("10%, 5%,5.0%", [0.05, 0.1]),
        ("off", []),
        ("2.5%", [0.025]),
    ],
)
def test_shares_are_read(place: Path, text: str | None, shares: list[float]) -> None:
    assert config_of(place, removals=text).removal_shares == pytest.approx(shares)


@pytest.mark.parametrize("text", ["5,10", "5%,ten", "0%", "100%", "110%", ","])
def test_what_is_no_share_is_refused(place: Path, text: str) -> None:
    done = prism(
        *("evaluate", place / "repair-20", "--holdout", place / "held.jsonl"), "--removals", text
    )
    assert done.code == 2
    assert f"--removals {text}: not shares below 100%; try 5%,10%" in done.err


def test_a_run_of_select_has_no_curve(place: Path, trained: list[TrainingJob]) -> None:
    with pytest.raises(BadOption, match="is a run of select, which removes no rows; leave it out"):
        evaluate(config_of(place, "select", removals="5%"))
    assert evaluate(config_of(place, "select", removals="off"))["curve"] == []
    assert evaluate(config_of(place, "select"))["curve"] == []


# ---------------------------------------------------------------- questions that made pairs


def test_a_question_of_the_target_is_left_out_whatever_its_answers_are(
    place: Path, tmp_path: Path, trained: list[TrainingJob]
) -> None:
    seen = [json.loads(line) for line in (place / "target.jsonl").read_text().splitlines()]
    held = [json.loads(line) for line in (place / "held.jsonl").read_text().splitlines()]
    new = [row for row in held if row["prompt"] not in {row["prompt"] for row in seen}]
    others = [
        {"prompt": f" {row['prompt']}\n".replace(" ", "  "), "chosen": "Yes", "rejected": "No"}
        for row in seen
    ]
    holdout = jsonl(tmp_path / "holdout.jsonl", [*others, *new])
    config = EvaluateConfig(
        run=str(place / "repair-20"), holdout=holdout, seeds=1, steps="1", removals="off"
    )
    result = evaluate(config)
    assert (result["pairs"], result["pairs_left_out"]) == (len(new), len(seen))


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("Which is Finland's capital?", True),
        ("Question: Which is Finland's capital? Answer:", True),
        ("Which is Finland's", False),
        ("capital?", True),  # the end of a longer prompt, as after examples
        ("", False),
        ("Which is Canada's capital?", False),
    ],
)
def test_a_question_of_a_task_is_found_in_a_prompt_and_around_it(text: str, seen: bool) -> None:
    assert is_seen(text, frozenset({"Which is Finland's capital?"})) == seen


# ---------------------------------------------------------------- the page


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows: list[Row] = [{"prompt": f"Say {n}", "completion": "ok", "id": f"r{n}"} for n in range(12)]
    return write_run(tmp_path / "run", rows, np.arange(12.0).tolist(), "repair")


@pytest.mark.parametrize(
    ("last", "state", "words"),
    [
        ((0.02, 0.2), "holds", "Its interval over random removal, 0.1 [0.02, 0.2], excludes 0."),
        ((-0.02, 0.2), "review", "random removal, 0.1 [−0.02, 0.2], contains 0."),
        ((-0.3, -0.1), "failed", "random removal, 0.1 [−0.3, −0.1], is below 0."),
    ],
)
def test_the_page_says_where_the_repair_is_best(
    run: Path, last: tuple[float, float], state: str, words: str
) -> None:
    write_evaluation(run, curve=made_curve({0.05: (0.01, 0.2), 0.5: last}))
    facts = SECTION.read(read_run_facts(str(run)))
    assert facts and facts.removals and facts.removals.state == state
    best = "The repair is best without 50% of the rows: gain 1.2, after 0.7 with all rows and 0.8"
    assert facts.removals.words.startswith(best) and facts.removals.words.endswith(words)


def test_a_single_share_is_not_called_the_best(run: Path) -> None:
    write_evaluation(run, curve=made_curve({0.2: (0.01, 0.2)}))
    text = page_of(read_run_facts(str(run))).decode()
    assert "The repair was tried without 20% of the rows" in text
    assert "best share" not in text and "is best without" not in text


def test_the_page_says_that_no_share_shows_anything(run: Path) -> None:
    write_evaluation(run, curve=made_curve({0.05: (-0.1, 0.2), 0.5: (-0.1, 0.3)}))
    text = page_of(read_run_facts(str(run))).decode()
    assert "No share has an interval over random removal that excludes 0." in text
    assert 'data-chart="removals-0"' in text and 'data-chart="removals-1"' not in text
    write_evaluation(run)
    assert "How much to remove" not in page_of(read_run_facts(str(run))).decode()


def test_the_curve_of_the_page_starts_with_all_rows_and_mutes_random_removal(run: Path) -> None:
    write_evaluation(run, curve=made_curve({0.05: (0.01, 0.2), 0.2: (0.01, 0.2)}))
    charts = {chart.name: chart for chart in SECTION.fill(read_run_facts(str(run))).charts}
    spec = charts["removals-0"].spec
    line, before = spec["layer"]
    values = values_of(line["data"], spec)
    for name in ("prism", "random"):
        of_method = {row["removed"]: row["value"] for row in values if row["method"] == name}
        assert of_method == pytest.approx({0.0: 0.7, 0.05: 0.75, 0.2: 0.9})
    assert values_of(before["data"], spec)[0]["at"] == 0.8
    scale = line["encoding"]["color"]["scale"]
    assert scale["domain"] == ["prism", "random"] and scale["range"][1] == "var(--soft)"
    assert line["encoding"]["strokeDash"]["scale"]["range"] == [[1, 0], [6, 3]]
    assert "with all rows 0.700" in charts["removals-0"].text
    assert "prism 5% 0.750, 20% 0.900; random 5% 0.750" in charts["removals-0"].text


def test_a_method_looks_the_same_in_every_chart_and_like_no_other(run: Path) -> None:
    curve = made_curve({0.2: (0.01, 0.2)})
    curve += [{**point, "method": name} for point in curve[1:2] for name in BASELINES]
    write_evaluation(run, curve=curve)
    looks: dict[str, set[str]] = {}
    for chart in SECTION.fill(read_run_facts(str(run))).charts:
        layers = chart.spec.get("layer", [chart.spec])
        for encoding in (layer.get("encoding", {}) for layer in layers):
            if encoding.get("color", {}).get("field") == "method":
                scale = encoding["color"]["scale"]
                for name, colour in zip(scale["domain"], scale["range"], strict=True):
                    looks.setdefault(name, set()).add(colour)
            if chart.name == "removals-0" and "strokeDash" in encoding:
                ranges = (encoding[each]["scale"]["range"] for each in ("color", "strokeDash"))
                drawn = [(colour, *dash) for colour, dash in zip(*ranges, strict=True)]
    assert {len(colours) for colours in looks.values()} == {1}
    assert {"prism", "random", *BASELINES} <= {*looks} and len(drawn) == len({*drawn})


def values_of(data: dict[str, Any], spec: dict[str, Any]) -> list[dict[str, Any]]:
    return list(data["values"] if "values" in data else spec["datasets"][data["name"]])


def test_a_task_is_shown_before_after_and_repaired(run: Path) -> None:
    methods = made_methods()
    curve = made_curve({0.2: (0.01, 0.2), 0.35: (0.01, 0.2)}, "quiz acc")
    write_evaluation(run, curve=curve, methods=methods)
    text = page_of(read_run_facts(str(run))).decode()
    table = text.partition("How much to remove</h3>")[2].partition("</table>")[0]
    assert 'data-chart="removals-1"' in table
    assert [f"<td>{value:.4f}</td>" in table for value in (0.4, 0.25, 0.45, 0.6)] == [True] * 4
    rows = evaluation_rows({"methods": methods, "curve": curve})
    assert rows["curve, quiz acc"] == (
        "0.4000 before, 0.2500 after everything, without removed rows 0.4500 (20%), 0.6000 (35%)"
    )


def made_methods() -> dict[str, Any]:
    measures = {"gain": 0.8, "gap": 0.2, "win_rate": 0.8, "accuracy": 0.8, "loglik_chosen": -0.4}
    return {
        "none": {**measures, "tasks": {"quiz acc": [0.4]}},
        "prism": {**measures, "rows": [80], "predicted": [0.1], "realised": [0.1]},
    }


def evaluation_rows(result: dict[str, Any]) -> dict[str, str]:
    rest: dict[str, Any] = {
        **{"pairs": 5, "questions": 5, "pairs_left_out": 0, "steps": 1, "rate": 1e-3},
        **{"against": {}, "forecast": {"trainings": 0, "rank_correlation": None}},
        **{"compute": None, "labels": None, "controls": [], "seconds": 1.0},
    }
    return evaluation_summary(EvaluateConfig(run="run", holdout="pairs"), {**rest, **result})


def test_shares_count_scored_rows_alone(place: Path) -> None:
    """A row without a score takes no part, and no share counts it."""
    config = config_of(place, removals="50%")
    past = open_run(config)
    lost: NDArray[np.float64] = past.score.copy()
    lost[:20] = np.nan
    jobs = removal_jobs(config, replace(past, score=lost, ranking=lost), {}, None)
    assert {len(job.job.rows) for job in jobs[1:]} == {(ROWS - 20) // 2}
    assert min(job.job.rows.min() for job in jobs) >= 20
