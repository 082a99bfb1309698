"""--tune: what is chosen on the pairs, where it stands, and what stays as it was given."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import jsonl, prism, save_model

import prism_select
from prism_select import api
from prism_select.directions import tuning
from prism_select.run.config import TUNABLE, ScoreConfig
from prism_select.run.errors import BadOption
from prism_select.run.options import options_of as options_of_config

WORDS = ["moss", "tin", "gale", "pear", "wolf", "lamp", "reed", "snow", "clay", "fern"]
PAIRS: list[dict[str, object]] = [
    {"prompt": f"Who has the {a} {b}?", "chosen": f"Good {a}, {b}.", "rejected": f"Bad {b} of {a}!"}
    for k, a in enumerate(WORDS)
    for b in (WORDS[(k + 3) % 10],)
]
POOL: list[dict[str, object]] = [
    {"prompt": f"Where is {n}?", "completion": f"In the {n} box" + ", there" * (n % 4)}
    for n in range(12)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    save_model(folder / "model")
    jsonl(folder / "pool.jsonl", POOL)
    jsonl(folder / "pairs.jsonl", PAIRS)
    return folder


def run(folder: Path, out: Path, *more: object, command: str = "score") -> dict[str, Any]:
    words = [command, "--model", folder / "model", "--pool", folder / "pool.jsonl"]
    done = prism(*words, "--target", folder / "pairs.jsonl", "--out", out, *more)
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return found


def options_of(line: dict[str, Any]) -> set[str]:
    return line.keys() - {"auroc", "standard_error"}


@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_tuned_run_is_the_run_with_what_was_chosen(
    place: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "choice", lambda aurocs, *_: range(len(aurocs))[place])
    files = [str(folder / name) for name in ("model", "pool.jsonl", "pairs.jsonl")]
    tuned = prism_select.score(*files, tune="pairs", out=tmp_path / "tuned")
    entry = tuned.manifest["tuning"]
    assert entry["chosen"] == entry["tried"][place] and options_of(entry["chosen"]) == {*TUNABLE}
    given = {name: tuned.manifest["config"][name] for name in TUNABLE}
    assert given | {"damping": float(given["damping"])} == {
        name: entry["chosen"][name] for name in TUNABLE
    }
    plain = prism_select.score(*files, **given, out=tmp_path / "plain")
    assert plain.manifest["model"] == tuned.manifest["model"]
    for name in ("scores.parquet", "direction.safetensors"):
        assert (plain.path / name).read_bytes() == (tuned.path / name).read_bytes()
    best = max(line["auroc"] for line in entry["tried"])
    assert entry["best"]["auroc"] == best
    assert (place == 0) == (given == {name: defaults()[name] for name in TUNABLE})


def defaults() -> dict[str, Any]:
    return {option.name: option.default for option in options_of_config(ScoreConfig)}


def test_what_is_given_stays_even_as_the_default(folder: Path, tmp_path: Path) -> None:
    given = ["--layers", "all", "--normalize", "tokens", "--weighting", "uniform"]
    manifest = run(folder, tmp_path / "run", "--tune", "pairs", *given)
    assert options_of(manifest["tuning"]["chosen"]) == {"curvature", "damping", "common"}
    config = manifest["config"]
    assert (config["layers"], config["normalize"]) == ("all", "tokens")
    again = prism(
        *["score", "--config", tmp_path / "run" / "config.toml", "--out", tmp_path / "again"]
    )
    assert again.code == 0, again.err
    scores = [
        pq.read_table(tmp_path / name / "scores.parquet")["score"] for name in ("run", "again")
    ]
    assert scores[0].equals(scores[1])
    options = {"model": str(folder / "model"), "layers": "all", "curvature": "flat"}
    checked = api.check_pairs(str(folder / "pairs.jsonl"), tune="pairs", **options)
    assert options_of(checked["tuning"]["chosen"]) == {"weighting", "damping", "common"}


def test_names_say_what_is_tuned(folder: Path, tmp_path: Path) -> None:
    words = ["--tune", "layers, damping", "--curvature", "pairs"]
    tried = run(folder, tmp_path / "run", *words)["tuning"]["tried"]
    assert all(options_of(line) == {"layers", "damping"} for line in tried)
    assert {line["damping"] for line in tried} == {0.1, 0.3, 1.0}


def test_norms_are_tried_where_they_can_be_had() -> None:
    config = ScoreConfig(model="m", pool=("p",), target=("t",), out="o", tune="pairs")
    assert "normalize" in config.tuned
    assert all(
        "normalize" not in replace(config, **more).tuned
        for more in ({"engine": "forward"}, {"tokens": True}, {"normalize": "tokens"})
    )


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--tune", "colours"], "colours is unknown"),
        (["--tune", "pairs", "--curvature", "ekfac"], "leave one of both out"),
    ],
)
def test_what_cannot_be_tuned_is_refused(folder: Path, words: list[str], reason: str) -> None:
    command = ["score", "--model", folder / "model", "--pool", folder / "pool.jsonl"]
    done = prism(*command, "--target", folder / "pairs.jsonl", "--out", folder / "bad", *words)
    assert done.code == 2 and reason in done.err and not (folder / "bad").exists()


def test_a_saved_direction_is_not_tuned() -> None:
    with pytest.raises(BadOption, match="--tune"):
        ScoreConfig(model="m", pool=("p",), direction="d", out="o", tune="pairs")


def test_too_few_questions_leave_all_as_it_is(folder: Path, tmp_path: Path) -> None:
    few = jsonl(tmp_path / "few.jsonl", PAIRS[:3])
    files = [str(folder / "model"), str(folder / "pool.jsonl"), few]
    manifest = prism_select.score(*files, tune="pairs", out=tmp_path / "run").manifest
    assert "tuning" not in manifest
    assert any("nothing was tuned" in line for line in manifest["warnings"])


def test_held_out_scores_have_the_unit_of_the_scores(folder: Path, tmp_path: Path) -> None:
    manifest = run(folder, tmp_path / "run", "--tune", "pairs", command="select")
    pairs = pq.read_table(tmp_path / "run" / "pairs.parquet")
    found = manifest["target"]["cross_validation"]
    chosen, rejected = (pairs[f"held_out_{side}"].to_numpy() for side in ("chosen", "rejected"))
    assert found["auroc"] == pytest.approx(np.mean(chosen[:, None] > rejected), abs=1e-9)
    assert 0 <= found["planted_recall"] <= 1


def test_the_page_shows_what_was_tuned(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "run", "--tune", "pairs")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What was tuned" in page and "curvature and damping" in page
