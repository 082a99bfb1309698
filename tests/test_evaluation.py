"""Evaluation: equal budgets, honest intervals, nothing trained twice, and controls that fail when
they should."""

import json
import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import jsonl, prism
from huggingface_hub import constants
from huggingface_hub.utils import _telemetry
from numpy.typing import NDArray
from trl.trainer.sft_trainer import SFTTrainer

import prism_select
from prism_select.core.engines import ENGINES
from prism_select.core.gradients import dot, norm
from prism_select.core.statistics import paired_interval
from prism_select.data.encoding import Encoder
from prism_select.data.pool import Pool
from prism_select.data.records import Example, Pair, Turn
from prism_select.data.targets import read_target
from prism_select.demo.story import MODEL
from prism_select.demo.world import DEMO_SKILL, mixture, pairs, pool
from prism_select.directions import preconditioning
from prism_select.directions.from_pairs import directions_from_pairs, products_of
from prism_select.directions.pair_directions import direction_by_products
from prism_select.directions.pair_encoding import as_side, encode_sides
from prism_select.directions.way import way_of
from prism_select.evaluation import controls, past_run, retraining
from prism_select.evaluation import evaluate as evaluation
from prism_select.evaluation import price as price_module
from prism_select.evaluation import trainings as trainings_module
from prism_select.evaluation.evaluate import evaluate
from prism_select.evaluation.lm_eval_tasks import fingerprints_of
from prism_select.evaluation.price import break_even, break_even_of
from prism_select.evaluation.retraining import Point, Retrainer, TrainedResult, TrainingJob, digest
from prism_select.evaluation.training_results import Difference, forecast_correlation, in_words
from prism_select.evaluation.trainings import rows_for_tokens
from prism_select.models import lora_training as warmup
from prism_select.models.layer_selection import select_parameters
from prism_select.models.loading import LoadedModel, load, load_model
from prism_select.models.lora_training import TrainingSettings, refuse_many_gpus, train
from prism_select.run.config import ScoreConfig
from prism_select.run.config_evaluate import EvaluateConfig
from prism_select.run.errors import BadOption, Unreachable
from prism_select.run.folder import Run, Store
from prism_select.run.progress import Silent

BUDGET = 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the demo world, and a complete run of select and of repair."""
    folder = tmp_path_factory.mktemp("evaluation")
    jsonl(folder / "pool.jsonl", pool(200, 0))
    jsonl(folder / "mixture.jsonl", mixture(120, 0))
    jsonl(folder / "target.jsonl", pairs(DEMO_SKILL, 16, 0))
    jsonl(folder / "held.jsonl", pairs(DEMO_SKILL, 24, 1))
    shared: dict[str, Any] = {"model": str(MODEL), "target": folder / "target.jsonl"}
    prism_select.select(
        pool=[str(folder / "pool.jsonl")],
        out=str(folder / "select"),
        budget=str(BUDGET),
        **shared,
    )
    prism_select.repair(
        pool=[str(folder / "mixture.jsonl")],
        out=str(folder / "repair"),
        remove="15%",
        **{**shared, "target": jsonl(folder / "more.jsonl", pairs(DEMO_SKILL, 32, 0))},
    )
    return folder


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainings_module, "SAMPLED", 100)
    monkeypatch.setattr(controls, "DRAWS", 4)
    monkeypatch.setattr(retraining, "POINTS", 1)


def config_of(place: Path, run: Path | None = None, **options: Any) -> EvaluateConfig:
    short: dict[str, Any] = {"seeds": 2, "steps": "2", "against": "random,length"}
    return EvaluateConfig(
        run=str(run or place / "select"), holdout=str(place / "held.jsonl"), **{**short, **options}
    )


@pytest.fixture(scope="module")
def told(place: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        few.__wrapped__(patch)  # type: ignore[attr-defined]
        return evaluate(config_of(place, against="random,length,everything", steps="10", rate=2e-3))


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[TrainingSettings]:
    """Those that were made."""
    made: list[TrainingSettings] = []

    def counted(retrainer: Retrainer, job: TrainingJob) -> list[Point]:
        made.append(job.settings)
        return train_job(retrainer, job)

    train_job = Retrainer.train
    monkeypatch.setattr(Retrainer, "train", counted)
    monkeypatch.setattr(evaluation, "run_controls", lambda *_: [])
    return made


# ---------------------------------------------------------------- what is compared


def test_the_choice_beats_random_and_the_whole_pool_on_held_out_pairs(told: dict[str, Any]) -> None:
    for baseline in ("random", "everything", "none"):
        assert told["against"][baseline]["gain"]["low"] > 0
        assert told["against"][baseline]["words"].startswith("better than ")
    assert told["forecast"]["rank_correlation"] > 0.5 and told["forecast"]["trainings"] == 8


def test_every_baseline_has_the_supervised_tokens_of_the_choice(
    place: Path, told: dict[str, Any]
) -> None:
    tokens = np.array(Run(place / "select").scores["tokens"].to_pylist())
    methods = told["methods"]
    for name in ("random", "length"):
        apart = np.array(methods[name]["tokens"]) - np.array(methods["prism"]["tokens"])
        assert (2 * np.abs(apart) <= tokens.max()).all()
    assert methods["prism"]["rows"] == [BUDGET] * 2 and methods["everything"]["rows"] == [200] * 2
    assert methods["length"]["rows"][0] < BUDGET  # longer rows, fewer of them
    assert (
        len(set(methods["random"]["predicted"])) == 2
        and len(set(methods["length"]["predicted"])) == 1
    )


@pytest.mark.parametrize("seed", range(20))
def test_a_budget_is_missed_by_half_a_row_at_most(seed: int) -> None:
    draw = np.random.default_rng(seed)
    tokens = draw.integers(1, 50, 40)
    budget = int(draw.integers(50, tokens.sum()))
    assert 2 * abs(tokens[: rows_for_tokens(tokens, budget)].sum() - budget) <= 50


def test_figures_follow_from_the_table_of_pairs(place: Path, told: dict[str, Any]) -> None:
    table = pq.read_table(place / "select" / "evaluation" / "methods.parquet").to_pylist()
    assert len(table) == 4 * 2 * told["pairs"]

    def softplus(name: str, column: str) -> NDArray[np.float64]:
        gaps = [row[column] for row in table if row["method"] == name]
        return np.asarray(np.logaddexp(0, np.array(gaps).reshape(2, -1)))

    assert told["methods"]["none"]["gain"] == pytest.approx(softplus("prism", "gap_before").mean())
    for name in ("prism", "random"):
        rows = [row for row in table if row["method"] == name]
        each = told["methods"][name]
        assert each["win_rate"] == pytest.approx(np.mean([row["gap"] > 0 for row in rows]))
        assert each["loglik_chosen"] == pytest.approx(
            np.mean([row["loglik_chosen"] for row in rows])
        )
        gains = softplus(name, "gap").mean(1) - softplus(name, "gap_before").mean(1)
        assert each["realised"] == pytest.approx(gains.tolist())
    apart = softplus("prism", "gap") - softplus("random", "gap")
    found = told["against"]["random"]["gain"]
    assert found["difference"] == pytest.approx(apart.mean())
    assert (found["low"], found["high"]) == pytest.approx(paired_interval(apart, 0))


def test_a_forecast_is_the_score_per_supervised_token(place: Path, told: dict[str, Any]) -> None:
    rows = [row for row in Run(place / "select").scores.to_pylist() if row["verdict"] == "selected"]
    wanted = sum(row["score"] for row in rows) / sum(row["tokens"] for row in rows)
    assert told["methods"]["prism"]["predicted"] == pytest.approx([wanted] * 2)


def test_pairs_that_the_run_has_seen_are_left_out(place: Path, told: dict[str, Any]) -> None:
    seen = {row["prompt"] for row in pairs(DEMO_SKILL, 16, 0)}
    held = [row for row in pairs(DEMO_SKILL, 24, 1) if row["prompt"] not in seen]
    assert (told["pairs"], told["pairs_left_out"]) == (len(held), 24 - len(held))
    assert 0 < len(held) < 24


def test_a_baseline_with_the_ranking_of_a_second_choice_is_its_equal(
    place: Path, tmp_path: Path, trainings: list[TrainingSettings]
) -> None:
    run = tmp_path / "again"
    again = {"select_from": str(place / "select"), "out": str(run), "combine": "mean"}
    prism_select.select(**again, budget="10")
    twin = np.array(Run(run).scores["score"].to_pylist())
    found = evaluate(config_of(place, run, against="twin", seeds=1), baselines={"twin": twin})
    assert found["methods"]["twin"]["rows"] == found["methods"]["prism"]["rows"] == [10]
    assert len(trainings) == 1
    assert found["against"]["twin"]["words"] == "no gain over twin shown: 0 [0, 0]"
    prism_select.select(**again, budget="10", overwrite=True)
    assert not (run / "evaluation").exists()


def test_repair_trains_on_what_is_kept_and_forecasts_the_wanted_answers(place: Path) -> None:
    found = evaluate(
        config_of(
            place,
            place / "repair",
            against="random,everything",
            steps="20",
            rate=1e-3,
            seeds=1,
            removals="off",
        )
    )
    methods = found["methods"]
    assert methods["prism"]["rows"] == methods["random"]["rows"] == [102]
    assert methods["everything"]["rows"] == [120]
    assert methods["prism"]["predicted"][0] > max(methods["random"]["predicted"])
    assert found["against"]["everything"]["gain"]["difference"] > 0
    assert [each["words"] for each in found["controls"] if not each["holds"]] == []


# ---------------------------------------------------------------- intervals and words


@pytest.mark.parametrize("seeds", [1, 40])
def test_the_interval_is_that_of_the_closed_form(seeds: int) -> None:
    """Differences that are a seed's part plus a pair's part have the variance of both means,
    added."""
    draw = np.random.default_rng(0)
    by_seed, by_pair = draw.normal(0, 1, (seeds, 1)), draw.normal(0.3, 2, (1, 200))
    low, high = paired_interval(by_seed + by_pair, 0, 20_000)
    spread = np.sqrt(by_seed.var() / seeds + by_pair.var() / 200)
    mean = (by_seed + by_pair).mean()
    assert [low, high] == pytest.approx(
        [mean - 1.96 * spread, mean + 1.96 * spread], abs=0.05 * spread
    )


def test_a_dear_training_of_fewer_points_than_another_has_a_curve() -> None:
    def tried(method: str, seed: int, *steps: int) -> TrainedResult:
        points = [Point(step, 0.0, np.zeros(2), np.zeros(2)) for step in steps]
        job = TrainingJob(method, np.arange(3), TrainingSettings(seed, steps[-1]))
        return TrainedResult(job, points)

    found = [
        tried("prism", 0, 4),
        tried("prism", 1, 4),
        tried("random", 0, 4),
        tried("random", 1, 4),
    ]
    found += [tried("random-priced", 0, 5, 9, 10), tried("random-priced", 1, 5, 9)]
    result = break_even_of(lambda job: job.settings.steps, 1.0, found, np.arange(2))
    assert [cost for cost, _ in result.curve] == [0, 1, 5, 6]


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ((0.041, 0.012, 0.070), "better than random by 0.041 [0.012, 0.07]"),
        ((-0.041, -0.07, -0.012), "worse than random by 0.041 [0.012, 0.07]"),
        ((0.003, -0.02, 0.03), "no gain over random shown: 0.003 [-0.02, 0.03]"),
        ((0.003, 0.0, 0.03), "no gain over random shown: 0.003 [0, 0.03]"),
        ((0.0, 0.0, 0.0), "no gain over random shown: 0 [0, 0]"),
        (
            (0.2, 0.2, 0.2),
            "+0.2 over random, and no verdict: one seed and one question have no interval",
        ),
    ],
)
def test_a_verdict_claims_only_what_its_interval_shows(
    figures: tuple[float, float, float], words: str
) -> None:
    assert in_words("random", Difference(*figures)) == words


# ---------------------------------------------------------------- training


def test_no_training_is_told_to_anyone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    started = list[bool]()
    monkeypatch.setattr(_telemetry, "_start_telemetry_thread", lambda: started.append(True))
    monkeypatch.setattr(_telemetry, "_TELEMETRY_QUEUE", Queue())
    config = ScoreConfig(model=str(MODEL), pool=["pool"], target=["pairs"], out="run")
    loaded = load_model(config, config.layers, Silent())
    row = loaded.encoder.encode(
        Example((Turn("user", "1 + 1"), Turn("assistant", "2")), "", "", "", 1)
    )
    train(loaded.model, loaded.encoder.tokenizer, [row], TrainingSettings(0, 1))
    assert not started


def test_several_gpus_are_refused_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refuse_many_gpus(torch.device("cpu"))
    with pytest.raises(BadOption, match="several are visible; name one in CUDA_VISIBLE_DEVICES"):
        refuse_many_gpus(torch.device("cuda", 1))


def test_what_is_finished_is_not_trained_again(
    place: Path, tmp_path: Path, trainings: list[TrainingSettings]
) -> None:
    run = shutil.copytree(
        place / "select", tmp_path / "run", ignore=shutil.ignore_patterns("evaluation")
    )

    def made(**options: Any) -> tuple[int, dict[str, Any]]:
        trainings.clear()
        found = evaluate(config_of(place, run, **{"against": "random", "steps": 3, **options}))
        return len(trainings), found

    first = made()
    assert first[0] == 4
    again = made()
    assert again[0] == 0 and again[1]["methods"] == first[1]["methods"]
    (run / "evaluation" / "retrained" / "random-1.parquet").unlink()
    assert made()[0] == 1
    assert made(seeds=1, against="random,length")[0] == 1
    assert made(steps="1", seeds=1)[0] == 2
    assert not list((run / "evaluation").rglob("*.part"))


@pytest.mark.parametrize("full", [False, True])
def test_a_training_repeats_and_leaves_the_model_as_it_was(full: bool) -> None:
    model, tokenizer = load(str(MODEL), "auto", torch.device("cpu"))
    encoder = Encoder(tokenizer, "auto", 64)
    loaded = LoadedModel(model, encoder)

    def example(prompt: str, answer: str) -> Example:
        return Example((Turn("user", prompt), Turn("assistant", answer)), "", "", "", 1)

    rows = [encoder.encode(example(row["prompt"], row["completion"])) for row in pool(16, 0)]
    asked = pairs(DEMO_SKILL, 4, 0)
    sides = [
        as_side([encoder.encode(example(p["prompt"], p[side])) for p in asked], 512, model.device)
        for side in ("chosen", "rejected")
    ]
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    retrainer = Retrainer(loaded, dict(enumerate(rows)), sides, Store("nowhere"), ())
    jobs = [
        TrainingJob("prism", np.arange(16), TrainingSettings(0, steps, 1e-3, full))
        for steps in (1, 1, 3)
    ]
    first, again, longer = (retrainer.train(job)[-1] for job in jobs)
    after = model.network.state_dict()
    assert after.keys() == before.keys() and all(
        torch.equal(after[name], before[name]) for name in before
    )
    assert not any(weight.requires_grad for weight in model.network.parameters())
    assert first.chosen.tolist() == again.chosen.tolist() != longer.chosen.tolist()


@pytest.mark.parametrize("full", [False, True])
def test_a_training_is_that_of_trls_own_trainer(
    monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    """The loss of core/likelihood.py, sent backward in parts, moves the weights as TRL's own loss
    does."""
    found, steps = [], list[int]()
    for stock in (False, True):
        model, tokenizer = load(str(MODEL), "auto", torch.device("cpu"))
        encoder = Encoder(tokenizer, "auto", 64)
        told = pool(24, 0)
        turns = [
            (Turn("user", row["prompt"]), Turn("assistant", row["completion"])) for row in told
        ]
        rows = [encoder.encode(Example(each, "", "", "", 1)) for each in turns]
        if stock:
            monkeypatch.setattr(warmup, "_trainer", lambda *_: SFTTrainer)
        learner = train(
            model,
            tokenizer,
            rows,
            TrainingSettings(0, 3, 1e-3, full),
            lambda step, _: steps.append(step),
        )
        found.append({name: weight.detach().clone() for name, weight in learner.named_parameters()})
    assert steps == [1, 2, 3]
    start = dict(load(str(MODEL), "auto", torch.device("cpu"))[0].network.named_parameters())
    moved, apart = (
        sum(
            float((weight - other.get(name, 0)).square().sum()) for name, weight in found[0].items()
        )
        for other in (start if full else {}, found[1])
    )
    assert 0 < apart**0.5 <= 0.01 * moved**0.5, (
        "the same but for the order of additions, which Adam makes larger"
    )


# -------------------------------------------------------- baselines, questions, curves, price


def test_named_baselines_rank_as_their_definitions_and_are_ranked_once(
    place: Path, tmp_path: Path, trainings: list[TrainingSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(
        place / "select", tmp_path / "run", ignore=shutil.ignore_patterns("evaluation")
    )
    names = ["random-by-source", "bm25", "uniform", "contrast"]
    first = evaluate(config_of(place, run, against=",".join(names), seeds=1))
    assert list(first["methods"]) == ["none", "prism", *names] and len(trainings) == 5
    table = pq.read_table(run / "evaluation" / "rankings.parquet")
    assert table.column_names == ["bm25", "uniform", "contrast"] and len(table) == 200
    tokens = np.array(Run(run).scores["tokens"].to_pylist())
    best = np.argsort(-table["bm25"].to_numpy(), kind="stable")[
        : first["methods"]["bm25"]["rows"][0]
    ]
    assert first["methods"]["bm25"]["tokens"] == [tokens[best].sum()]
    evaluate(config_of(place, run, against="length,bm25", seeds=1))
    table = pq.read_table(run / "evaluation" / "rankings.parquet")
    assert table.column_names == ["bm25", "uniform", "contrast", "length"]
    monkeypatch.setattr(trainings_module, "rankings", None)
    assert (
        evaluate(config_of(place, run, against=",".join(names), seeds=1))["methods"]
        == first["methods"]
    )


def test_several_pairs_of_a_question_count_as_one(
    place: Path, tmp_path: Path, trainings: list[TrainingSettings]
) -> None:
    """A question with three wrong choices has three pairs, and is right where all of them are."""
    held, seen = pairs(DEMO_SKILL, 40, 1), {row["prompt"] for row in pairs(DEMO_SKILL, 16, 0)}
    held = [row for row in held if row["prompt"] not in seen][:6]
    rows = [
        {
            "question": row["prompt"],
            "choices": [row["chosen"], row["rejected"], *others],
            "answer": 0,
        }
        for row, others in zip(
            held, [["It is 3"], [], ["Answer: yes", "mice"], [], [], []], strict=True
        )
    ]
    config = config_of(place, against="random", seeds=1, full=True)
    told = evaluate(replace(config, holdout=jsonl(tmp_path / "quiz.jsonl", rows)))
    assert (told["pairs"], told["questions"]) == (9, 6)
    table = pq.read_table(place / "select" / "evaluation" / "methods.parquet").to_pylist()
    ours = [row for row in table if row["method"] == "prism"]
    by_question = [
        [row["gap"] > 0 for row in ours if row["question"] == place] for place in range(6)
    ]
    assert [len(each) for each in by_question] == [2, 1, 3, 1, 1, 1]
    assert told["methods"]["prism"]["accuracy"] == pytest.approx(
        np.mean([all(each) for each in by_question])
    )
    assert told["methods"]["prism"]["win_rate"] == pytest.approx(
        np.mean([np.mean(each) for each in by_question])
    )


def test_a_learning_curve_starts_before_training_and_ends_at_its_figures(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retraining, "POINTS", 3)
    run = shutil.copytree(place / "select", tmp_path / "run")
    told = evaluate(config_of(place, run, against="random", seeds=1, steps="24", rate=2e-3))
    curve = pq.read_table(run / "evaluation" / "curves.parquet").to_pylist()
    ours = [row for row in curve if row["method"] == "prism"]
    assert [row["step"] for row in ours] == [0, 8, 16, 24]
    assert ours[0]["gain"] == pytest.approx(told["methods"]["none"]["gain"])
    assert ours[-1]["gain"] == pytest.approx(told["methods"]["prism"]["gain"])
    assert np.isnan(ours[0]["loss"]) and 0 < ours[-1]["loss"] < ours[1]["loss"]


def test_the_price_of_scoring_buys_random_rows_and_steps(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retraining, "POINTS", 2)
    run = shutil.copytree(
        place / "select", tmp_path / "run", ignore=shutil.ignore_patterns("evaluation")
    )
    (run / "evaluation").mkdir()
    past = past_run.open_run(config_of(place, run))
    mark = digest([past.mark])
    (run / "evaluation" / "price.json").write_text(json.dumps({"of": mark, "price": 0.9}))
    told = evaluate(config_of(place, run, against="random,random-priced", seeds=1, steps="4"))
    ours, dear = told["methods"]["prism"], told["methods"]["random-priced"]
    length = np.array(Run(run).scores["length"].to_pylist())
    spent = 3 * 4 * 8 * length[past.chosen].mean() / length.sum()
    assert told["compute"]["training"] == pytest.approx(spent) and told["compute"]["price"] == 0.9
    factor = 1 + 0.9 / spent
    rows = past.scored[
        trainings_module.ranking_by_counts(past, "random", 0)[past.scored].argsort()[::-1][
            : dear["rows"][0]
        ]
    ]
    assert dear["steps"] == round(
        (spent + 0.9) / (3 * 8 * length[rows].mean() / length.sum())
    )  # of rows of its own
    assert dear["tokens"][0] == pytest.approx(factor * ours["tokens"][0], abs=10)
    assert told["compute"]["curve"][0] == [0, pytest.approx(told["methods"]["random"]["gain"])]
    assert told["compute"]["curve"][-1][1] == pytest.approx(dear["gain"])
    assert "random-priced" in told["against"] and told["forecast"]["trainings"] == 2


def test_the_price_of_scoring_after_a_warm_up_is_told(
    place: Path, tmp_path: Path, trainings: list[TrainingSettings]
) -> None:
    shared: dict[str, Any] = {
        "model": str(MODEL),
        "target": place / "target.jsonl",
        "pool": place / "pool.jsonl",
    }
    run = prism_select.select(**shared, out=str(tmp_path / "run"), budget="20", warmup="10%")
    told = evaluate(config_of(place, run.path, against="random,random-priced"))
    assert told["compute"]["price"] > 0


def test_the_price_of_scoring_is_that_of_its_engine_and_its_target(
    place: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(
        place / "select", tmp_path / "run", ignore=shutil.ignore_patterns("evaluation")
    )
    price = evaluate(config_of(place, run, against="random,random-priced", seeds=1, steps="1"))[
        "compute"
    ]["price"]
    took = Run(run).manifest["timings"]
    whole = (took["target"] + took["curvature"] + took["score"]) / took["score"]
    assert (
        whole < price < 20 * whole
    )  # an engine takes longer than a forward pass, and not twenty times as long
    assert (
        evaluate(config_of(place, run, against="random,random-priced", seeds=1, steps="1"))[
            "compute"
        ]["price"]
        == price
    )


@pytest.mark.parametrize("scored", [1.0, 0.01, 0.0])
def test_the_price_of_a_run_that_was_stopped_is_that_of_the_whole(
    place: Path,
    tmp_path: Path,
    trainings: list[TrainingSettings],
    monkeypatch: pytest.MonkeyPatch,
    scored: float,
) -> None:
    """A manifest's time of scoring is that of the last start, which may have scored a part."""
    run = shutil.copytree(
        place / "select", tmp_path / "run", ignore=shutil.ignore_patterns("evaluation")
    )
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["timings"] |= {"target": 50.0, "curvature": 0.0, "score": 100 * scored + 1e-9}
    manifest["actual"]["tokens"] *= scored
    (run / "manifest.json").write_text(json.dumps(manifest))
    tokens, sample = manifest["actual"]["tokens"], list[int]()

    def timed(_: object, batch: Any) -> float:
        sample.append(int(batch.real.sum()))
        return 1e-3 * sample[-1]

    monkeypatch.setattr(price_module, "timed", timed)
    price = evaluate(config_of(place, run, against="random,random-priced", seeds=1, steps="1"))[
        "compute"
    ]["price"]
    total = np.nansum(Run(run).scores["length"].to_numpy())
    assert price == pytest.approx(1.5 if tokens else 1 + 50 / (1e-3 * total), rel=1e-6)


@pytest.mark.parametrize("against", ["random,random-priced", "random-priced"])
def test_a_price_that_buys_no_forward_pass_is_reported_all_the_same(
    place: Path, tmp_path: Path, trainings: list[TrainingSettings], against: str
) -> None:
    """Random rows may be so short that they cost less than the choice, however much more of them is
    read."""
    run = shutil.copytree(
        place / "select", tmp_path / "run", ignore=shutil.ignore_patterns("evaluation")
    )
    (run / "evaluation").mkdir()
    mark = digest([past_run.open_run(config_of(place, run)).mark])
    (run / "evaluation" / "price.json").write_text(json.dumps({"of": mark, "price": 1e-9}))
    told = evaluate(config_of(place, run, against=against, seeds=1))["compute"]
    assert (
        len(told["curve"]) == len(against.split(","))
        and "scoring took 0.0 × the cost of a forward pass" in told["words"]
    )


def test_the_choice_from_a_run_of_score_alone_is_evaluated(
    place: Path, tmp_path: Path, trainings: list[TrainingSettings]
) -> None:
    given = {
        "model": str(MODEL),
        "pool": str(place / "pool.jsonl"),
        "target": str(place / "target.jsonl"),
    }
    scored = prism_select.score(**given, out=str(tmp_path / "score"))
    prism_select.select(select_from=str(scored.path), out=str(tmp_path / "run"), budget="10")
    prism_select.select(select_from=str(tmp_path / "run"), out=str(tmp_path / "again"), budget="10")
    for name in ("run", "again"):
        found = evaluate(config_of(place, tmp_path / name, seeds=1, against="random,random-priced"))
        assert found["methods"]["prism"]["rows"] == [10] and found["compute"]["price"] > 1
    shutil.rmtree(tmp_path / "score")
    shutil.rmtree(tmp_path / "again" / "evaluation")
    with pytest.raises(
        BadOption, match="the run that took its scores is gone; leave random-priced out"
    ):
        evaluate(config_of(place, tmp_path / "again", seeds=1, against="random,random-priced"))


@pytest.mark.parametrize(
    ("curve", "wanted", "found"),
    [
        ([(0.0, 1.0), (1.0, 2.0), (3.0, 4.0)], 3.0, 2.0),
        ([(0.0, 1.0), (1.0, 2.0)], 0.5, 0.0),
        ([(0.0, 1.0), (1.0, 2.0)], 2.5, None),
        ([(0.0, 1.0), (1.0, 0.5), (2.0, 1.5)], 1.0, 0.0),
    ],
)
def test_the_break_even_is_where_the_curve_first_reaches_the_gain(
    curve: list[tuple[float, float]], wanted: float, found: float | None
) -> None:
    assert break_even(curve, wanted) == found


def test_tasks_of_ones_own_are_run_before_and_after(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracy by lm-eval is that of its definition: the answer of higher log-likelihood. The
    question that the run's target asks too is left out."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = pairs(DEMO_SKILL, 12, 3)
    rows: list[dict[str, Any]] = [
        {"q": row["prompt"], "choices": [row["rejected"], row["chosen"]], "answer": 1}
        for row in asked
    ]
    told = {
        **{
            "task": "quiz",
            "dataset_path": "json",
            "test_split": "test",
            "output_type": "multiple_choice",
        },
        "dataset_kwargs": {"data_files": {"test": str(jsonl(tmp_path / "quiz.jsonl", rows))}},
        **{"doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"},
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "quiz.yaml").write_text(json.dumps(told))  # JSON is YAML
    run = shutil.copytree(
        place / "select", tmp_path / "run", ignore=shutil.ignore_patterns("evaluation")
    )
    config = config_of(
        place, run, against="random", seeds=1, steps="20", rate=2e-3, tasks=f"quiz,{tmp_path}"
    )
    found = evaluate(config)
    methods = found["methods"]
    seen = {row["prompt"] for row in pairs(DEMO_SKILL, 16, 0)}
    rest = [row for row in rows if row["q"] not in seen]
    assert found["questions_left_out"] == {"quiz": len(rows) - len(rest)} == {"quiz": 1}
    model, tokenizer = load(str(MODEL), "auto", torch.device("cpu"))
    right = 0
    for row in rest:
        sums = []
        for choice in row["choices"]:
            start = len(tokenizer(row["q"])["input_ids"])
            tokens = torch.tensor([tokenizer(f"{row['q']} {choice}")["input_ids"]])
            network: Any = model.network
            logits = network(input_ids=tokens).logits[0, :-1].log_softmax(-1)
            sums.append(float(logits.gather(1, tokens[0, 1:, None])[start - 1 :].sum()))
        right += sums[1] > sums[0]
    assert methods["none"]["tasks"] == {"quiz acc": [pytest.approx(right / len(rest))]}
    assert set(methods["prism"]["tasks"]) == {"quiz acc"}
    monkeypatch.setattr(Retrainer, "train", None)
    assert evaluate(config)["methods"] == methods
    with pytest.raises(BadOption, match="--tasks nothing: lm-eval knows no such task"):
        evaluate(config_of(place, run, tasks="nothing"))


def test_a_task_that_was_edited_is_another(tmp_path: Path) -> None:
    (tmp_path / "quiz.yaml").write_text("task: quiz")
    before = fingerprints_of(("quiz", str(tmp_path)))
    assert fingerprints_of(("quiz", str(tmp_path))) == before
    (tmp_path / "quiz.yaml").write_text("task: quiz\noutput_type: generate_until")
    assert fingerprints_of(("quiz", str(tmp_path))) != before and fingerprints_of(()) == []


def test_labels_tell_every_ranking(place: Path, tmp_path: Path) -> None:
    given = {
        "model": str(MODEL),
        "pool": str(place / "mixture.jsonl"),
        "target": str(place / "target.jsonl"),
    }
    run = prism_select.repair(**given, out=str(tmp_path), remove="15%", label_field="is_bad")
    told = evaluate(
        config_of(
            place,
            tmp_path,
            against="length,uniform,random-priced",
            seeds=1,
            steps="1",
            removals="off",
        )
    )
    assert set(told["labels"]) == {"prism", "length", "uniform"}
    assert told["labels"]["prism"] == pytest.approx(run.manifest["choice"]["labels"]["auroc"])
    ours, dear, price = (
        told["methods"]["prism"],
        told["methods"]["random-priced"],
        told["compute"]["price"],
    )
    assert dear["rows"] == ours["rows"] and told["compute"]["curve"][-1][1] == pytest.approx(
        dear["gain"]
    )
    passes, past = told["compute"]["training"], past_run.open_run(config_of(place, tmp_path))
    kept = trainings_module.rows_of(past, trainings_module.ranking_by_counts(past, "random", 0))
    assert len(kept) == past.chosen.sum() and dear["steps"] > 1
    a_step = 3 * 8 * past.length[kept].mean() / past.length[past.scored].sum()
    assert dear["steps"] == round((passes + price) / a_step)


# ---------------------------------------------------------------- controls


def spoilt(place: Path, folder: Path, scores: NDArray[np.float64]) -> dict[str, Any]:
    """The controls of a run whose scores are others, by name."""
    run = shutil.copytree(
        place / "select", folder / "run", ignore=shutil.ignore_patterns("evaluation")
    )
    table = pq.read_table(run / "scores.parquet")
    column = table.column_names.index("score")
    pq.write_table(table.set_column(column, "score", pa.array(scores)), run / "scores.parquet")
    found = evaluate(config_of(place, run, steps="1", seeds=1, against="random"))
    assert json.loads((run / "evaluation" / "evaluation.json").read_text()) == found
    return {each["name"]: each for each in found["controls"]}


def test_the_controls_of_an_honest_run_hold(told: dict[str, Any]) -> None:
    assert len(told["controls"]) == 7
    assert [each["words"] for each in told["controls"] if not each["holds"]] == []


def test_a_broken_sign_is_reported(place: Path, tmp_path: Path) -> None:
    scores = Run(place / "select").scores
    found = spoilt(place, tmp_path, -np.array(scores["score"].to_pylist()))
    broken = {name for name, each in found.items() if not each["holds"]}
    turned = {
        "scored again",
        "swapped pairs, weighted alike",
        "swapped pairs, weighted by prism",
        "resampled pairs",
    }
    assert broken == turned
    assert all("FAILED" in found[name]["words"] for name in broken)
    assert found["scored again"]["value"] == pytest.approx(-1, abs=0.01)


def test_a_leaking_label_is_reported(place: Path, tmp_path: Path) -> None:
    """Scores that are the truth find all of it, and are still no scores of these pairs."""
    source = Run(place / "select").scores["source"].to_pylist()
    noise = np.random.default_rng(0).random(len(source)) / 2
    found = spoilt(place, tmp_path, np.array([name == DEMO_SKILL for name in source]) + noise)
    assert not found["scored again"]["holds"] and "FAILED" in found["scored again"]["words"]
    assert not found["swapped pairs, weighted alike"]["holds"]


def test_scores_that_are_lengths_are_reported(place: Path, tmp_path: Path) -> None:
    tokens = np.array(Run(place / "select").scores["tokens"].to_pylist(), dtype=float)
    found = spoilt(place, tmp_path, tokens)
    assert not found["length"]["holds"] and found["length"]["value"] == pytest.approx(1)
    assert (
        not found["scored again"]["holds"] and not found["swapped pairs, weighted alike"]["holds"]
    )


@pytest.mark.parametrize("curvature", ["flat", "ekfac"])
def test_controls_are_the_same_however_many_directions_are_held_at_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, curvature: str
) -> None:
    options: dict[str, Any] = {"curvature": curvature}
    config = ScoreConfig(
        model=str(MODEL),
        layers="last:1",
        pool=[str(place / "pool.jsonl")],
        target=[str(place / "target.jsonl")],
        out="nowhere",
        **options,
    )
    loaded = load_model(config, config.layers, Silent())
    rows = [
        loaded.encoder.encode(row)
        for _, row in Pool([str(place / "pool.jsonl")], {}).rows()
        if isinstance(row, Example)
    ]
    sample = controls.Sample(rows[:20], np.arange(20.0), 0.2)
    pairs = {"": read_target(config.target[0], {})[:6]}
    monkeypatch.setattr(controls, "DRAWS", 1)
    monkeypatch.setattr(preconditioning, "CURVATURE_ROWS", 8)
    found = []
    for numbers in (2**28, 1):
        monkeypatch.setattr(controls, "TOGETHER", numbers)
        found.append(
            [each.value for each in controls.run_controls(config, loaded, pairs, sample, Silent())]
        )
    assert found[0] == pytest.approx(found[1], abs=1e-9)


def test_half_of_the_pairs_is_swapped() -> None:
    answers = np.arange(12).reshape(2, 6)
    changed = controls.half_swapped(random.Random(0), answers)
    assert (changed[0] >= 6).sum() == 3
    assert np.array_equal(np.sort(changed, axis=0), answers)


@pytest.mark.parametrize("options", [{}, {"curvature": "pairs"}, {"common": "remove"}])
def test_the_direction_of_changed_pairs_is_that_of_a_run_with_them(
    options: dict[str, Any], place: Path
) -> None:
    named: dict[str, Any] = {"model": MODEL, "pool": "-", "target": "-", "out": "-"}
    config = ScoreConfig(**named, layers="late", **options)
    loaded = load_model(config, "late", Silent())
    own = read_target(str(place / "target.jsonl"), {})[:5]
    encoded = encode_sides(own, loaded.encoder)
    weights = select_parameters(loaded.model.network, "late")
    products = products_of(config, loaded.model, weights, [encoded])
    for moved in (
        controls.swapped(np.arange(10).reshape(2, 5)),
        np.array([[1, 1, 4, 3, 0], [6, 6, 9, 8, 5]]),
    ):
        sides = [*(pair.chosen for pair in own), *(pair.rejected for pair in own)]
        pairs = [Pair(sides[a], sides[b]) for a, b in moved.T.tolist()]
        expected = directions_from_pairs(config, loaded, {"": pairs}, Silent()).directions[0]
        counts = controls.changed(way_of(config), products, partial(put, moved))
        found = direction_by_products(config, loaded.model, weights, encoded, counts)
        assert dot(found, expected) == pytest.approx(norm(found) * norm(expected), rel=1e-5)
        assert norm(found) == pytest.approx(norm(expected), rel=1e-4)


def put(moved: NDArray[np.int64], _: object) -> NDArray[np.int64]:
    return moved


def test_scores_of_the_best_of_opposed_targets_are_found_again(place: Path, tmp_path: Path) -> None:
    held = [json.loads(line) for line in (place / "target.jsonl").read_text().splitlines()]
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in held[:10]]
    targets = [
        f"one={place / 'target.jsonl'}",
        f"other={jsonl(tmp_path / 'swapped.jsonl', swapped)}",
    ]
    shared: dict[str, Any] = {
        "model": str(MODEL),
        "target": targets,
        "pool": str(place / "pool.jsonl"),
    }
    run = prism_select.select(**shared, combine="max", out=str(tmp_path / "run"), budget="20")
    told = evaluate(config_of(place, run.path, against="random", seeds=1, steps="1"))
    assert {each["name"]: each["holds"] for each in told["controls"]}["scored again"]


def test_what_one_engine_cannot_reach_is_evaluated_by_that_of_the_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared: dict[str, Any] = {
        "model": str(MODEL),
        "target": place / "target.jsonl",
        "pool": place / "pool.jsonl",
    }
    run = prism_select.select(**shared, engine="difference", out=str(tmp_path / "run"), budget="20")

    def unreachable(*_: object) -> None:
        raise Unreachable("reverse", ["some.weight"], "no derivative")

    monkeypatch.setitem(ENGINES, "reverse", unreachable)
    told = evaluate(config_of(place, run.path, against="random,uniform", seeds=1, steps="1"))
    assert {each["name"]: each["holds"] for each in told["controls"]}["scored again"]


# ---------------------------------------------------------------- the command


def test_the_command_tells_verdicts_and_controls(place: Path, tmp_path: Path) -> None:
    run = shutil.copytree(place / "select", tmp_path / "run")
    done = prism(
        "evaluate",
        run,
        "--holdout",
        place / "held.jsonl",
        "--seeds",
        1,
        "--steps",
        1,
        "--against",
        "random",
    )
    assert done.code == 0, done.err
    assert "over random shown" in done.out or "than random by" in done.out
    assert "no training" in done.out and "scored again: holds" in done.out
    assert str(run / "report.html") in done.out.replace("\n", "")
    assert "Not judged yet" not in (run / "report.html").read_text()
    assert "Not judged yet" in (place / "select" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--against", "luck"),
            "--against luck: unknown; try some of everything, random-priced, random",
        ),
        (("--seeds", 0), "--seeds 0: must be at least 1"),
        (("--steps", "0epochs"), "no length above 0"),
        (("--holdout", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_is_refused(place: Path, words: tuple[object, ...], said: str) -> None:
    done = prism("evaluate", place / "select", "--holdout", place / "held.jsonl", *words)
    assert done.code == 2 and said in done.err


def test_only_a_complete_choice_of_the_same_files_can_be_evaluated(
    place: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadOption, match="no complete run"):
        evaluate(config_of(place, tmp_path / "none"))
    with pytest.raises(BadOption, match="in the run's target"):
        evaluate(EvaluateConfig(run=str(place / "select"), holdout=str(place / "target.jsonl")))
    again = prism_select.select(
        select_from=str(place / "select"), out=str(tmp_path / "again"), budget="9", rank_by="length"
    )
    with pytest.raises(BadOption, match="chosen by length; give a run that chose by its scores"):
        evaluate(config_of(place, again.path))
    run = shutil.copytree(place / "select", tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    for change, said in (
        ({"command": "score"}, "has chosen nothing"),
        ({"fingerprints": {**manifest["fingerprints"], "pool": "x"}}, "its pool has changed"),
        ({"fingerprints": {**manifest["fingerprints"], "target": "x"}}, "its target has changed"),
    ):
        (run / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(BadOption, match=said):
            evaluate(config_of(place, run))


def test_few_trainings_tell_no_forecast() -> None:
    up = np.arange(5.0)
    assert np.isnan(forecast_correlation(up[:4], up[:4])) and forecast_correlation(up, up) > 0.999
