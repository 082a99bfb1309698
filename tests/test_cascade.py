"""The cascade: what it finds, what it says that it finds, and what it leaves in the files."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch

import prism_select
from prism_select.commands.pipeline import run
from prism_select.core.blocks import stack_of
from prism_select.core.engines import ENGINES
from prism_select.core.likelihood import Batch
from prism_select.demo import world
from prism_select.demo.train import MODEL_DIR
from prism_select.evaluation import past_run, trainings
from prism_select.models.loading import load
from prism_select.run.config import SelectConfig
from prism_select.run.config_evaluate import EvaluateConfig
from prism_select.run.errors import BadOption, TooManyBadRows
from prism_select.run.folder import Run, Store
from prism_select.run.progress import Silent, Task
from prism_select.selection import cascade as cascade_module
from prism_select.selection import cascade_prediction
from prism_select.selection.cascade import Cascade
from prism_select.selection.cascade_prediction import (
    FEATURES,
    Prediction,
    cutoff_for,
    feature_extractor,
    predict_scores,
    recall_of,
)

ROWS, BEST = 1500, 75
BLIND = {"pool": "pool.jsonl", "target": "pairs.jsonl"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("cascade")
    told: dict[str, Any] = {
        "pool": world.pool(ROWS, 0),
        "target": world.pairs(world.DEMO_SKILL, 40, 0),
    }
    for name, rows in told.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": str(MODEL_DIR), **{name: str(folder / f"{name}.jsonl") for name in told}}


@pytest.fixture(scope="module")
def everything(files: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> prism_select.Run:
    return prism_select.select(**files, out=str(tmp_path_factory.mktemp("every") / "run"))


@pytest.fixture(scope="module")
def cascade(files: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> prism_select.Run:
    return prism_select.select(
        **files, cascade=True, out=str(tmp_path_factory.mktemp("some") / "run")
    )


def test_exact_scores_are_those_of_a_run_without_it_and_most_of_the_best_have_one(
    everything: prism_select.Run, cascade: prism_select.Run
) -> None:
    full, some = everything.scores, cascade.scores
    exact, scores = some["exact"].to_numpy(), full["score"].to_numpy()
    assert 0.3 < exact.mean() < 0.7
    np.testing.assert_allclose(
        some["score"].to_numpy()[exact], scores[exact], atol=2e-3 * np.abs(scores).max()
    )
    best = np.argsort(-scores)[:BEST]
    told = cascade.manifest["cascade"]["recall"]
    assert exact[best].mean() >= 0.85
    assert told["low"] <= exact[best].mean() <= told["high"]
    assert np.corrcoef(some["score"].to_numpy()[~exact], scores[~exact])[0, 1] > 0.5
    for name in ("row", "id", "source", "file", "line", "tokens", "length", "truncated"):
        assert some[name].equals(full[name])


def test_the_chosen_are_exact_and_have_both_halves(cascade: prism_select.Run) -> None:
    table = cascade.scores
    chosen = np.array(table["verdict"].to_pylist()) == "selected"
    assert chosen.sum() == BEST == cascade.manifest["counts"]["selected"]
    assert table["exact"].to_numpy()[chosen].all()
    parts = [
        table[name].to_numpy()[chosen]
        for name in ("score", "score_chosen", "score_rejected", "loglik")
    ]
    assert np.isfinite(parts).all()
    np.testing.assert_allclose(parts[0], parts[1] - parts[2])
    predicted = ~table["exact"].to_numpy()
    assert table["loglik"].is_null().to_numpy()[predicted].all()
    assert np.isfinite(table["score_per_token"].to_numpy()).all()
    assert any("scores are predicted" in line for line in cascade.manifest["warnings"])


def test_where_a_low_recall_is_enough_no_predicted_row_has_halves(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cascade_module, "RECALL", 0.5)
    run = prism_select.select(**files, cascade=True, budget="60%", out=str(tmp_path / "run"))
    exact = run.scores["exact"].to_numpy()
    assert exact.sum() < 0.6 * ROWS
    for half in ("score_chosen", "score_rejected"):
        assert not run.scores[half].is_valid().to_numpy()[~exact].any()


def test_the_page_shows_a_run_with_predicted_scores(cascade: prism_select.Run) -> None:
    assert "scores are predicted" in (cascade.path / "report.html").read_text(encoding="utf-8")


def test_a_choice_made_again_takes_no_predicted_score_before_an_exact_one(
    cascade: prism_select.Run, tmp_path: Path
) -> None:
    again = prism_select.select(
        select_from=str(cascade.path), budget="30%", out=str(tmp_path / "again")
    ).scores
    exact, chosen = again["exact"].to_numpy(), np.array(again["verdict"].to_pylist()) == "selected"
    assert chosen.sum() == 0.3 * ROWS
    assert exact[chosen].all()
    more = prism_select.select(
        select_from=str(cascade.path), budget="90%", out=str(tmp_path / "more")
    ).scores
    chosen, score = np.array(more["verdict"].to_pylist()) == "selected", more["score"].to_numpy()
    assert exact.sum() < chosen.sum()
    assert (
        score[chosen & ~exact].min() >= score[~chosen & ~exact].max()
    )  # the best predicted, not the first
    warned = [
        any("searched for" in line for line in Run(tmp_path / name).manifest["warnings"])
        for name in ("again", "more")
    ]
    assert warned == [True, True] and not any(
        "looked for" in line for line in cascade.manifest["warnings"]
    )
    with pytest.raises(BadOption, match="predicted scores have no sure sign"):
        prism_select.select(
            select_from=str(cascade.path), budget="positive", out=str(tmp_path / "positive")
        )


def test_a_cap_that_takes_rows_from_below_those_searched_for_is_a_warning(
    files: dict[str, Any], tmp_path: Path
) -> None:
    run = prism_select.select(
        **files, cascade=True, per_source="40%", budget="3%", out=str(tmp_path / "run")
    )
    assert run.manifest["counts"]["source cap"]
    assert any("not among the best 45" in line for line in run.manifest["warnings"])


def test_every_engine_of_a_cascade_sees_the_same_rows_first(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, make = list[Any](), ENGINES["difference"]

    def watched(*given: Any) -> Any:
        engine, seen = make(*given), list[Any]()

        def scores(batch: Batch) -> Any:
            first.extend([batch.tokens.tolist()] * (not seen))
            seen.append(1)
            return engine(batch)

        return scores

    monkeypatch.setattr(
        "prism_select.scoring.engine_choice.ENGINES", {**ENGINES, "difference": watched}
    )
    prism_select.select(**files, cascade=True, out=str(tmp_path / "run"))
    assert len(first) >= 3 and all(rows == first[0] for rows in first)


@pytest.fixture
def blind(files: dict[str, Any], tmp_path: Path, plain_model: Path) -> dict[str, Any]:
    """A model that knows no Z, which stands in 6 of 900 rows; 6 others have no answer."""
    model, tokenizer = load(str(plain_model), "float32", torch.device("cpu"))
    (known,) = tokenizer("Z", add_special_tokens=False).input_ids
    network: Any = model.network
    network.get_input_embeddings().weight.data[known] = float("nan")
    network.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": f"{'Z' * (i % 150 == 50)}{i}?", "completion": f"{i % 7}" * (i % 150 != 60)}
        for i in range(900)
    ]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a?", "chosen": "3", "rejected": "no"}\n' * 3)
    return {
        "model": str(tmp_path / "model"),
        **{n: str(tmp_path / f) for n, f in BLIND.items()},
        "layers": "late",
    }


def test_rows_that_have_no_score_are_bad_rows_and_not_predicted(
    blind: dict[str, Any], tmp_path: Path
) -> None:
    found = prism_select.select(**blind, cascade=True, max_bad="2%", out=str(tmp_path / "run"))
    told, table = found.manifest["cascade"], found.scores
    tried = told["exact"] + sum(
        row["reason"].startswith("its score is not finite") for row in found.quarantine
    )
    assert told["exact"] + told["guessed"] + found.manifest["counts"]["quarantined"] == 900
    assert told["guessed"] == 900 - 6 - tried
    bad = np.array(table["verdict"].to_pylist()) == "quarantined"
    assert 6 < bad.sum() <= 12
    for name in ("tokens", "length", "truncated", "loglik", "score", "score_chosen"):
        assert not table[name].is_valid().to_numpy()[bad].any()


def test_bad_rows_of_all_passes_count_together(blind: dict[str, Any], tmp_path: Path) -> None:
    for cascade in (False, True):
        with pytest.raises(TooManyBadRows, match="bad rows found"):
            prism_select.select(
                **blind, cascade=cascade, max_bad="0.75%", out=str(tmp_path / f"run-{cascade}")
            )


def test_controls_ask_exact_scores_alone(cascade: prism_select.Run) -> None:
    past = past_run.open_run(EvaluateConfig(run=str(cascade.path), holdout="unread"))
    assert not past.exact.all() and past.exact[trainings.sampled(past)].all()


def test_states_too_large_for_what_keeps_them_stay_finite(tmp_path: Path) -> None:
    config = SelectConfig(model="m", pool="p", target="t", cascade=True, out=str(tmp_path))
    store, unused = Store(str(config.out)), cast("Any", None)
    store.shards.mkdir()
    rows = [[1e30] * FEATURES, [float("nan")] * FEATURES, [0.5] * FEATURES, None]
    features = pa.array(rows, pa.list_(pa.float32(), FEATURES))
    columns = {"tokens": [1, 1, 1, None], "reason": [None, None, None, "bad"], "features": features}
    path = store.write_shard(0, pa.table(columns), "features")
    pool = Cascade(config, store, lambda *_: [path], unused, unused, unused, unused).extract()
    assert np.isfinite(pool.features).all()
    assert pool.features[:, 0].tolist() == [np.finfo(np.float16).max, 0, 0.5, 0]
    assert pool.good.tolist() == [True, True, True, False]


class Stopping(Silent):
    """Stops at a row of a step that is counted."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, rows: int, tokens: int = 0) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def task(self, label: str, total: int | None) -> Any:
        found = super().task(label, total)
        return _Counted(found, self) if label.startswith("scoring") else found


class _Counted:
    def __init__(self, inner: Any, outer: Task) -> None:
        self.inner, self.outer = inner, outer

    def __enter__(self) -> Task:
        self.inner.__enter__()
        return self.outer

    def __exit__(self, *error: Any) -> Any:
        return self.inner.__exit__(*error)


@pytest.mark.parametrize("steps", [5, 10, 13])
def test_a_cascade_that_was_stopped_goes_on_to_the_same_end(
    files: dict[str, Any], cascade: prism_select.Run, tmp_path: Path, steps: int
) -> None:
    config = SelectConfig(**files, cascade=True, out=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        run(config, Stopping(steps))
    done = run(config)
    assert isinstance(done, Run)
    assert done.scores.equals(cascade.scores)
    assert not (done.path / "shards").exists()


def test_a_small_pool_is_scored_whole_and_once(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored, write = list[str](), Store.write_shard

    def watched(store: Store, number: int, table: pa.Table, kind: str = "") -> Path:
        scored.append(kind)
        return write(store, number, table, kind)

    monkeypatch.setattr(Store, "write_shard", watched)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(Path(files["pool"]).read_text().splitlines(keepends=True)[:200]))
    done = prism_select.select(
        **{**files, "pool": str(few)}, cascade=True, out=str(tmp_path / "run")
    )
    assert done.manifest["cascade"]["guessed"] == 0
    assert done.manifest["cascade"]["recall"]["estimate"] == 1
    assert "half" not in scored
    assert done.scores["exact"].to_numpy().all()
    assert np.isfinite(done.scores["score_chosen"].to_numpy()).all()


@pytest.mark.parametrize("poor", [1, 2, 99])
def test_a_prediction_that_stays_poor_ends_the_search_and_one_that_mends_does_not(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poor: int
) -> None:
    calls = list[int]()

    def predict(features: Any, exact: Any, sample: Any, seed: int) -> Prediction:
        calls.append(1)
        if len(calls) > poor:
            return predict_scores(features, exact, sample, seed)
        noise = np.random.default_rng(len(calls)).standard_normal(len(exact))
        return Prediction(noise, noise[sample])

    monkeypatch.setattr(cascade_module, "predict_scores", predict)
    told = prism_select.select(**files, cascade=True, out=str(tmp_path / "run")).manifest["cascade"]
    assert (told["guessed"] == 0) == (poor == 99) and told["recall"]["estimate"] >= 0.95
    assert max(each["rows"] for each in told["rounds"][1:3]) <= ROWS / 10


def test_bad_rows_are_set_aside(files: dict[str, Any], tmp_path: Path) -> None:
    mixed = tmp_path / "mixed.jsonl"
    rows = Path(files["pool"]).read_text().splitlines(keepends=True)
    mixed.write_text(
        "".join([*rows[:700], "not json\n", '{"prompt": "a", "completion": ""}\n', *rows[700:900]])
    )
    done = prism_select.repair(
        **{**files, "pool": str(mixed)},
        cascade=True,
        remove="400tok",
        max_bad="5%",
        out=str(tmp_path / "run"),
    )
    assert done.manifest["counts"]["quarantined"] == 2
    assert [row["line"] for row in done.quarantine] == [701, 702]
    assert done.scores["score"].is_null().to_pylist().count(True) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": "positive"}, "no sure sign"),
        ({"tokens": True}, "--cascade and --tokens"),
        ({"normalize": "norm"}, "--cascade and --normalize norm"),
        ({"rank_by": "bm25"}, "--cascade and --rank-by"),
    ],
)
def test_what_does_not_go_together(
    files: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadOption, match=words):
        SelectConfig(**files, cascade=True, out="run", **options)


def test_scores_alone_have_no_best_to_search_for(files: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match="score has none"):
        prism_select.score(**files, cascade=True, out="run")


def test_the_interval_of_the_recall_holds_the_truth() -> None:
    """In 95% of pools, whatever the prediction is worth."""
    draw, held = np.random.default_rng(0), 0
    for trial in range(200):
        scores = draw.standard_normal(4000)
        predicted = scores + draw.standard_normal(4000) * [0.5, 1, 2][trial % 3]
        sample = draw.choice(4000, 400, replace=False)
        cut = np.sort(predicted)[-800]
        exact = predicted >= cut
        exact[sample] = True
        unpredicted = np.zeros(4000, dtype=bool)
        unpredicted[sample] = predicted[sample] < cut
        told = recall_of(scores[exact], unpredicted[exact], int((~exact).sum()), 200)
        best = np.argsort(-scores)[:200]
        held += told.low <= exact[best].mean() <= told.high
        assert told.low <= told.estimate <= told.high
    assert held >= 185


def test_recall_by_hand() -> None:
    """Nine scores; of the two that the prediction would have left out, one reaches the best four;
    ten more are unscored."""
    exact = np.array([9.0, 8, 7, 6, 5, 4, 3, 2, 1])
    unpredicted = np.array([False, True, False, False, False, False, False, False, True])
    told = recall_of(exact, unpredicted, 10, 6)  # 9 alone is 1; with 8: 2 + 10 · 1/2 = 7 ≥ 6
    assert (told.estimate, told.threshold) == (2 / 6, 8.0)


def test_the_cut_leaves_out_no_more_than_may_be_missed() -> None:
    predicted, reaches = np.array([5.0, 4, 3, 2, 1]), np.array([True, False, True, True, False])
    assert [cutoff_for(predicted, reaches, count) for count in range(4)] == [2, 3, 5, np.inf]


def test_a_row_of_the_sample_is_predicted_without_its_own_score() -> None:
    """Of scores that nothing foretells, a prediction that had seen them would be right."""
    draw = np.random.default_rng(0)
    features, exact = draw.standard_normal((300, 258)).astype(np.float16), draw.standard_normal(300)
    told = predict_scores(features, exact, np.arange(300), 0)
    assert np.corrcoef(told.rows, exact)[0, 1] > 0.9
    assert abs(np.corrcoef(told.sample, exact)[0, 1]) < 0.15


def test_leaving_a_row_out_is_fitting_without_it() -> None:
    """The closed form, against fits without the row: centres and scales are then other, so only
    nearly."""
    draw = np.random.default_rng(1)
    features = draw.standard_normal((200, 258)).astype(np.float16)
    exact = features[:, 0].astype(float) + 0.5 * features[:, 1].astype(float) ** 2
    told = predict_scores(features, exact, np.arange(200), 0)
    slow = []
    for row in range(20):
        without = exact.copy()
        without[row] = np.nan
        slow.append(predict_scores(features, without, np.arange(1), 0).rows[row])
    np.testing.assert_allclose(told.sample[:20], slow, atol=0.1 * exact.std())


def test_rows_that_are_learned_from_a_few_at_a_time_teach_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = np.random.default_rng(2)
    features, exact = draw.standard_normal((300, 258)).astype(np.float16), draw.standard_normal(300)
    whole = predict_scores(features, exact, np.arange(300), 0)
    monkeypatch.setattr(cascade_prediction, "MANY", 32)
    parts = predict_scores(features, exact, np.arange(300), 0)
    np.testing.assert_allclose(parts.rows, whole.rows, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(parts.sample, whole.sample, rtol=1e-6, atol=1e-9)


def test_features_need_the_lower_blocks_alone_and_know_no_padding() -> None:
    model, _ = load(str(MODEL_DIR), "float32", torch.device("cpu"))
    _, blocks = stack_of(model.network)
    called: list[int] = []
    for place, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, place=place: called.append(place))
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 1000, (2, 9), generator=draw)
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[1, 5:] = False
    supervised = real.clone()
    supervised[:, :2] = False
    extract = feature_extractor(model, 0)
    whole = extract(Batch(tokens, real, supervised))
    alone = extract(Batch(tokens[1:, :5], real[1:, :5], supervised[1:, :5]))
    assert set(called) == {0}
    torch.testing.assert_close(whole[1:], alone, atol=1e-4, rtol=1e-4)
    other = tokens.clone()
    other[0, 5] = 7
    assert not extract(Batch(other, real, supervised))[0].allclose(whole[0])
