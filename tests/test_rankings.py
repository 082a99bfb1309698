"""Baselines as choices: `select --rank-by` takes what a baseline ranks first, and says so in the
table."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import jsonl, prism

import prism_select
from prism_select.demo.story import MODEL
from prism_select.demo.world import DEMO_SKILL, pairs, pool
from prism_select.run.config import SelectConfig
from prism_select.run.errors import BadOption
from prism_select.run.folder import Run
from prism_select.run.options import options_of
from prism_select.selection.baselines import BASELINES


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rankings")
    rows = [*pool(60, 0), {"prompt": "", "completion": ""}]
    return {
        "model": str(MODEL),
        "pool": jsonl(folder / "pool.jsonl", rows),
        "target": jsonl(folder / "target.jsonl", pairs(DEMO_SKILL, 8, 0)),
        "max_bad": "5%",
    }


def chosen(run: Run) -> set[int]:
    table = run.scores.to_pylist()
    assert [row["verdict"] for row in table].count("quarantined") == 1
    return {row["row"] for row in table if row["verdict"] == "selected"}


@pytest.mark.parametrize("name", BASELINES)
def test_the_highest_of_a_baseline_are_chosen(
    files: dict[str, Any], tmp_path: Path, name: str
) -> None:
    run = prism_select.select(**files, out=str(tmp_path), budget="6", rank_by=name)
    ranking = run.scores["rank_by"].to_numpy(zero_copy_only=False)
    assert np.isnan(ranking[60]) and np.isfinite(ranking[:60]).all()
    assert chosen(run) == set(np.argsort(-ranking[:60], kind="stable")[:6].tolist())
    score = run.scores["score"].to_numpy(zero_copy_only=False)
    plain = prism_select.select(**files, out=str(tmp_path / "plain"), budget="6")
    assert score[:60].tolist() == plain.scores["score"].to_pylist()[:60]
    if name == "length":
        assert ranking[:60].tolist() == [float(n) for n in run.scores["tokens"].to_pylist()[:60]]


def test_a_repair_removes_what_a_baseline_ranks_first(
    files: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{**row, "bad": k % 3 == 0} for k, row in enumerate(pool(60, 0))]
    labelled = jsonl(tmp_path / "pool.jsonl", rows)
    given = {**files, "pool": labelled, "label_field": "bad", "remove": "6"}
    run = prism_select.repair(**given, out=str(tmp_path / "run"), rank_by="probe-and-score")
    ranking = run.scores["rank_by"].to_numpy(zero_copy_only=False)
    best = set(np.argsort(-ranking, kind="stable")[:6].tolist())
    assert {row["row"] for row in run.scores.to_pylist() if row["verdict"] == "removed"} == best
    bad = ranking[::3]
    above = bad[:, None] > np.delete(ranking, np.arange(0, 60, 3))
    found = run.manifest["choice"]["labels"]["auroc_rank_by"]
    assert found == pytest.approx(above.mean(), abs=1e-9)


def test_every_baseline_is_a_value_of_the_option() -> None:
    option = next(o for o in options_of(SelectConfig) if o.name == "rank_by")
    assert option.choices == list(BASELINES)


def test_a_choice_is_made_again_by_rankings_that_take_no_model(
    files: dict[str, Any], tmp_path: Path
) -> None:
    first = prism_select.select(**files, out=str(tmp_path / "a"), budget="6", rank_by="bm25")
    again = prism_select.select(
        select_from=str(first.path), out=str(tmp_path / "b"), budget="6", rank_by="length"
    )
    tokens = np.array(again.scores["tokens"].to_pylist()[:60])
    assert chosen(again) == set(np.argsort(-tokens, kind="stable")[:6].tolist())
    plain = prism_select.select(select_from=str(first.path), out=str(tmp_path / "c"), budget="6")
    score = np.array(plain.scores["score"].to_pylist()[:60])
    assert chosen(plain) == set(np.argsort(-score, kind="stable")[:6].tolist())
    assert "rank_by" not in plain.scores.column_names
    with pytest.raises(BadOption, match="--rank-by rds: needs the model"):
        prism_select.select(
            select_from=str(first.path), out=str(tmp_path / "d"), budget="6", rank_by="rds"
        )


def test_what_has_no_sign_or_no_pairs_is_refused(files: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="only scores have a sign"):
        prism_select.select(**files, out=str(tmp_path), budget="positive", rank_by="length")
    first = prism_select.select(**files, out=str(tmp_path / "a"), budget="6")
    given = {**files, "direction": str(first.path / "direction.safetensors")}
    del given["target"]
    with pytest.raises(BadOption, match="--rank-by bm25: needs pairs"):
        prism_select.select(**given, out=str(tmp_path / "b"), rank_by="bm25")
    done = prism("select", *words(given), "--out", tmp_path / "c", "--rank-by", "loss-top")
    assert done.code == 0, done.err
    done = prism("select", *words(given), "--out", tmp_path / "d", "--rank-by", "luck")
    assert (
        done.code == 2
        and "--rank-by luck: unknown; try one of random, random-by-source" in done.err
    )


def words(options: dict[str, Any]) -> list[str]:
    return [
        str(word)
        for name, value in options.items()
        if value
        for word in (f"--{name.replace('_', '-')}", value)
    ]
