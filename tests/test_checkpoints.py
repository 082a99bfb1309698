"""--checkpoint: scores at several checkpoints are the weighted sum of the scores at each."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import jsonl, prism, save_model
from safetensors.torch import load_file, save_file

import prism_select
from prism_select.commands import checkpoints, pipeline
from prism_select.commands.checkpoints import WeightedCheckpoint, checkpoints_of
from prism_select.run.errors import BadOption, RunMismatch

PAIRS: list[dict[str, object]] = [
    {"prompt": f"Question {n}?", "chosen": f"Good {n}.", "rejected": f"Bad {n}, no!"}
    for n in range(6)
]
POOL: list[dict[str, object]] = [
    {"prompt": f"Question {n}?", "completion": f"Answer {n}" + ", please" * (n % 3)}
    for n in range(12)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for number, step in enumerate((4, 8)):
        at = folder / "trainer" / f"checkpoint-{step}"
        save_model(at)
        weights = load_file(at / "model.safetensors")
        draw = torch.Generator().manual_seed(number)
        moved = {n: w + 0.02 * torch.randn(w.shape, generator=draw) for n, w in weights.items()}
        save_file(moved, at / "model.safetensors", {"format": "pt"})
        log = [{"step": s, "learning_rate": 1e-3 / s} for s in range(1, step + 1)]
        (at / "trainer_state.json").write_text(json.dumps({"log_history": [*log, {"step": step}]}))
    jsonl(folder / "pool.jsonl", [*POOL, {"prompt": "", "completion": ""}])
    jsonl(folder / "pairs.jsonl", PAIRS)
    return folder


def files(place: Path) -> dict[str, Any]:
    return {"pool": place / "pool.jsonl", "target": place / "pairs.jsonl", "max_bad": "10%"}


def points(place: Path) -> list[str]:
    return [str(place / "trainer" / f"checkpoint-{step}") for step in (4, 8)]


def scores(run: Path, name: str = "score") -> Any:
    return pq.read_table(run / "scores.parquet")[name].to_numpy()


@pytest.mark.parametrize("command", ["select", "repair"])
def test_scores_are_the_weighted_sum_of_two_runs(command: str, place: Path, tmp_path: Path) -> None:
    run = getattr(prism_select, command)
    first, second = points(place)
    given = [f"{first}=0.25", f"{second}=3"]
    both = run(None, **files(place), checkpoint=given, normalize="norm", out=tmp_path / "both")
    alone = [
        run(point, **files(place), normalize="norm", out=tmp_path / str(k))
        for k, point in enumerate((first, second))
    ]
    for name in ("score", "score_chosen", "score_rejected", "score_per_token", "score_cosine"):
        expected = 0.25 * scores(alone[0].path, name) + 3 * scores(alone[1].path, name)
        assert np.array_equal(scores(both.path, name), expected, equal_nan=True)
    assert np.array_equal(scores(both.path, "loglik"), scores(alone[1].path, "loglik"), True)
    manifest = both.manifest
    assert [p["weight"] for p in manifest["checkpoints"]] == [0.25, 3]
    assert manifest["counts"]["quarantined"] == 1 and len([*both.quarantine]) == 1
    ranked = np.argsort(-np.nan_to_num(scores(both.path, "score_cosine"), nan=-np.inf))
    taken = [row["verdict"] in ("selected", "removed") for row in both.scores.to_pylist()]
    assert set(np.flatnonzero(taken)) == set(ranked[: sum(taken)])
    assert (both.path / "report.html").exists()


def test_a_trainers_folder_gives_its_checkpoints_with_their_learning_rates(place: Path) -> None:
    first, second = points(place)
    rates = [np.mean([1e-3 / s for s in steps]) for steps in ((1, 2, 3, 4), (5, 6, 7, 8))]
    found = checkpoints_of([str(place / "trainer")])
    assert [point.path for point in found] == [first, second]
    assert [point.weight for point in found] == pytest.approx(rates)
    assert checkpoints_of([f"{first}=2", second]) == [
        WeightedCheckpoint(first, 2.0),
        WeightedCheckpoint(second),
    ]
    with pytest.raises(BadOption, match="give each its weight"):
        checkpoints_of([f"{place / 'trainer'}=2"])
    with pytest.raises(BadOption, match="all weights are 0"):
        checkpoints_of([f"{first}=0"])


def test_a_stopped_run_goes_on_at_the_checkpoint_where_it_stopped(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {**files(place), "checkpoint": points(place), "out": tmp_path / "run"}
    calls, original = list[str](), pipeline.run

    def stopping(config: Any, progress: Any) -> Any:
        calls.append(config.model)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(config, progress)

    monkeypatch.setattr(pipeline, "run", stopping)
    with pytest.raises(KeyboardInterrupt):
        prism_select.score(**given)
    assert not (tmp_path / "run" / "manifest.json").exists()
    before = (tmp_path / "run" / "checkpoints" / "1" / "scores.parquet").stat().st_mtime_ns
    run = prism_select.score(**given)
    assert (run.path / "checkpoints" / "1" / "scores.parquet").stat().st_mtime_ns == before
    assert len(calls) == 4 and np.isfinite(scores(run.path)[:-1]).all()
    with pytest.raises(RunMismatch, match="checkpoint was"):
        prism_select.score(**{**given, "checkpoint": points(place)[:1]})


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--warmup", "5%"], "--checkpoint and --warmup"),
        (["--dry-run"], "--checkpoint and --dry-run"),
        (["--tokens"], "--checkpoint and --tokens"),
    ],
)
def test_what_is_of_one_model_is_refused(
    words: list[str], reason: str, place: Path, tmp_path: Path
) -> None:
    command = ["score", "--pool", place / "pool.jsonl", "--target", place / "pairs.jsonl"]
    done = prism(*command, "--out", tmp_path / "run", "--checkpoint", points(place)[0], *words)
    assert done.code == 2 and reason in done.err and not (tmp_path / "run").exists()


def test_evaluation_says_which_runs_it_takes(place: Path, tmp_path: Path) -> None:
    run = prism_select.select(
        **files(place), checkpoint=points(place), budget="3", out=tmp_path / "run"
    )
    with pytest.raises(BadOption, match="of several checkpoints"):
        prism_select.evaluate(run, place / "pairs.jsonl")
    assert checkpoints.FOLDER in {path.name for path in run.path.iterdir()}
