"""Scores along the chosen half where they are taken after the choice."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_network, jsonl, prism
from safetensors.torch import load_file

import prism_select
from prism_select.commands import scoring_steps
from prism_select.core import engines, layers
from prism_select.core.engines import ENGINES
from prism_select.demo import world
from prism_select.demo.train import MODEL_DIR
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import select_parameters
from prism_select.run.errors import Unreachable
from prism_select.scoring import engine_choice
from prism_select.scoring.shards import score_pool
from prism_select.selection import half_columns

ROWS, SAMPLE = 120, 30


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, str]:
    monkeypatch.setattr(half_columns, "SMALL", SAMPLE)
    monkeypatch.setattr(half_columns, "FEWEST", SAMPLE)
    rows: list[Any] = world.pool(ROWS - 1, 0)
    return {
        "model": str(MODEL_DIR),
        "pool": jsonl(tmp_path / "pool.jsonl", [{"prompt": "", "completion": ""}, *rows]),
        "target": jsonl(tmp_path / "pairs.jsonl", world.pairs("capitals", 12, 0)),
    }


def columns(run: prism_select.Run) -> Mapping[str, Any]:
    table = run.scores
    return {
        name: table[name].to_numpy(zero_copy_only=False)
        for name in ("score", "score_chosen", "score_rejected", "verdict")
    }


@pytest.mark.parametrize("options", [{}, {"groups": 1, "normalize": "tokens"}, {"rank": 99}])
def test_chosen_rows_and_a_sample_have_the_halves_that_all_would_have(
    files: Mapping[str, str], tmp_path: Path, options: Mapping[str, Any]
) -> None:
    given: Mapping[str, Any] = {**files, "budget": "10%", "max_bad": "5%", **options}
    some = prism_select.select(**given, out=tmp_path / "some")
    every = prism_select.select(**given, out=tmp_path / "every", halves=True)
    assert some.scores.column_names == every.scores.column_names
    few, all_rows = columns(some), columns(every)
    has = np.isfinite(few["score_chosen"])
    chosen = few["verdict"] == "selected"
    assert has[chosen].all() and SAMPLE <= has.sum() <= SAMPLE + chosen.sum() < ROWS / 2
    assert (few["verdict"] == all_rows["verdict"]).all()
    assert np.isfinite(all_rows["score_chosen"]).sum() == ROWS - 1
    for name in ("score_chosen", "score_rejected"):
        assert np.allclose(few[name][has], all_rows[name][has], rtol=1e-4, atol=1e-6), name
    parts = few["score_chosen"] - few["score_rejected"]
    assert np.allclose(parts[has], few["score"][has], rtol=1e-9)


def test_a_run_stopped_among_the_halves_goes_on(
    files: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**files, "budget": "10%", "max_bad": "5%"}
    whole = prism_select.select(**given, out=tmp_path / "whole")
    with monkeypatch.context() as stopped:
        stopped.setattr(scoring_steps, "HalfColumns", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prism_select.select(**given, out=tmp_path / "run")
    found = dict[str, int]()

    def counted(*given: Any) -> Any:
        found[given[2].kind] = len(given[2].finished)
        return score_pool(*given)

    monkeypatch.setattr(scoring_steps, "score_pool", counted)
    run = prism_select.select(**given, out=tmp_path / "run")
    assert found["halves"] > 0  # scores of the first start
    for name, values in columns(whole).items():
        assert np.array_equal(columns(run)[name], values, equal_nan=name != "verdict"), name


def test_repair_has_the_halves_of_what_it_removes(files: Mapping[str, str], tmp_path: Path) -> None:
    run = prism_select.repair(**files, remove="10%", max_bad="5%", out=tmp_path / "run")
    found = columns(run)
    assert np.isfinite(found["score_chosen"][found["verdict"] == "removed"]).all()
    assert np.isnan(found["score_chosen"]).sum() > ROWS / 2
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert 'id="target"' in page and 'id="coverage"' not in page


def out_of_reach(*_: object) -> Any:
    def scores(_: object) -> None:
        raise Unreachable("reverse", ["some.weight"], "it is out of reach")

    return scores


@pytest.mark.parametrize(
    ("close", "reaches", "taken"),
    [
        (1.0, True, ("difference", "the cheapest along one direction")),
        (0.0, True, ("reverse", "difference would be off by")),
        (0.0, False, ("difference", "it is out of reach")),
    ],
)
def test_one_direction_of_a_large_model_takes_the_engine_that_is_cheapest_and_close(
    files: Mapping[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    close: float,
    reaches: bool,
    taken: tuple[str, str],
) -> None:
    given: Mapping[str, Any] = {**files, "max_bad": "5%"}
    exact = columns(prism_select.score(**given, out=tmp_path / "exact", engine="reverse"))
    monkeypatch.setattr(engine_choice, "COSTLY", 0)
    monkeypatch.setattr(engine_choice, "CLOSE", close)
    if not reaches:
        engines = {**ENGINES, "reverse": out_of_reach}
        monkeypatch.setattr(engine_choice, "ENGINES", engines)
    run = prism_select.score(**given, out=tmp_path / "run")
    name, reason = taken
    assert run.manifest["engine"]["name"] == name and reason in run.manifest["engine"]["reason"]
    found, wanted = (c["score"][1:] for c in (columns(run), exact))
    assert np.linalg.norm(found - wanted) < 1e-2 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("scored", "size"), [(150, 150), (1_500, 200), (9_000, 450), (50_000, 1_000)]
)
def test_the_sample_follows_the_pool(scored: int, size: int) -> None:
    is_scored = np.arange(scored + 10) >= 10
    mask = half_columns.sampled_rows(is_scored, 0)
    assert mask.sum() == size and not mask[:10].any()


# ---------------------------------------------------------------- a direction of all numbers


def large(files: Mapping[str, str], out: Path, **options: Any) -> prism_select.Run:
    given: dict[str, Any] = {**files, "budget": "10%", "max_bad": "5%", "rank": "full", **options}
    return prism_select.select(**given, out=out)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("common", ["keep", "remove"])
def test_a_direction_large_beside_the_model_is_one_sum(
    common: str,
    dtype: str,
    files: Mapping[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"common": common, "dtype": dtype, "engine": "reverse", "groups": 1}
    small = large(files, tmp_path / "small", halves=True, **options)
    monkeypatch.setattr(layers, "IN_FULL", 0)
    with_halves = large(files, tmp_path / "halves", halves=True, **options)
    run = large(files, tmp_path / "run", **options)
    saved, of_small = (load_file(folder.path / "direction.safetensors") for folder in (run, small))
    assert {tensor.dtype for tensor in saved.values()} == {getattr(torch, dtype)}
    assert len(saved) * 2 == len(of_small)
    table, expected, found = (columns(each) for each in (run, small, with_halves))
    scored = np.isfinite(expected["score"])
    off = {"float32": 1e-4, "bfloat16": 0.03}[dtype]

    def near(a: Any, b: Any) -> bool:
        return bool(np.linalg.norm((a - b)[scored]) < off * np.linalg.norm(b[scored]))

    for name in ("score", "score_chosen", "score_rejected"):
        assert near(found[name], expected[name]), name
    assert near(table["score"], expected["score"])
    assert np.isnan(table["score_chosen"].astype(float)).all()
    assert any("--halves takes it" in warning for warning in run.manifest["warnings"])
    again = large(
        {n: f for n, f in files.items() if n != "target"},
        tmp_path / "again",
        direction=str(run.path / "direction.safetensors"),
        **{name: value for name, value in options.items() if name != "common"},
    )
    assert (columns(again)["score"][scored] == table["score"][scored]).all()
    assert any("has no half C" in warning for warning in again.manifest["warnings"])
    assert prism("report", run.path).code == 0
    saved_file = run.path / "direction.safetensors"
    words = ["--model", files["model"], "--pool", files["pool"], "--direction", saved_file]
    for asked in (["--halves"], ["--cascade", "--budget", "5"]):
        kind = "select" if "--budget" in asked else "score"
        refused = prism(kind, *words, *asked, "--max-bad", "5%", "--out", tmp_path / "no")
        assert refused.code == 2 and "no chosen half" in refused.err, refused.err
        assert refused.err.count("\n") == 1 and not (tmp_path / "no").exists()


def test_a_cascade_has_halves_of_a_large_direction(
    files: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "IN_FULL", 0)
    run = large(files, tmp_path / "run", cascade=True, groups=1)
    assert np.isfinite(columns(run)["score_chosen"]).sum() >= 11


def test_pairs_that_a_large_direction_serves_in_groups_are_helped(
    files: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = large(files, tmp_path / "small", groups=2)
    monkeypatch.setattr(layers, "IN_FULL", 0)
    run = large(files, tmp_path / "run", groups=2)
    assert (columns(run)["verdict"] == columns(expected)["verdict"]).all()
    assert "hardly_helped" in run.manifest["choice"]["coverage"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_direction_is_scored_along_without_a_copy(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CausalLM(build_network(64).to(dtype))
    weights = select_parameters(model.network, "all")
    direction = {n: torch.randn(w.shape).to(dtype) for n, w in weights.items()}
    for large, copied in ((0, False), (layers.IN_FULL, True)):
        monkeypatch.setattr(layers, "IN_FULL", large)
        (unit,), (length,) = engines._near_unit(weights, [direction])
        own = [value is not direction[name] for name, value in unit.items()]
        assert all(own) if copied else not any(own)
        assert (length == 1.0) != copied
    monkeypatch.setattr(layers, "IN_FULL", 0)
    tiny = {name: value * 1e-12 for name, value in direction.items()}
    assert engines._near_unit(weights, [tiny])[1][0] < 1e-6
