"""Several targets, curvature, rank, norms, tokens and adapters, from end to end on a tiny model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Outcome, Row, jsonl, prism
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy.stats import spearmanr
from tiny import Tiny, batch_of, pairs_of
from torch.nn import functional

import prism_select
from prism_select.core.engines import forward
from prism_select.core.gradients import norm
from prism_select.core.statistics import overlap_of_best
from prism_select.core.target_gradient import target_gradient
from prism_select.directions import preconditioning
from prism_select.models.layer_selection import select_parameters
from prism_select.selection.coverage import turns

Floats = NDArray[np.float64]
ANSWERS = [
    "no way",
    "thank you very much",
    "It is in Italy",
    "five degrees",
    "go away now",
    "please, Paris",
    "a",
    "b c",
]
PAIRS: list[Row] = [
    {
        "prompt": f"Say {i}?",
        "chosen": ANSWERS[i % 8],
        "rejected": ANSWERS[(i + 3) % 8] + "!",
        "kind": "xyz"[i % 3],
    }
    for i in range(12)
]
POOL: list[Row] = [
    {
        "prompt": f"Where is {i}?",
        "completion": " ".join(ANSWERS[j % 8] for j in range(i % 5 + 1)),
        "bad": i % 3 == 0,
    }
    for i in range(30)
]


class Desk:
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.pool = jsonl(folder / "pool.jsonl", POOL)
        self.targets = {
            k: jsonl(folder / f"{k}.jsonl", [p for p in PAIRS if p["kind"] == k]) for k in "xyz"
        }
        self.all = jsonl(folder / "all.jsonl", PAIRS)

    def run(self, name: str, *words: object, command: str = "score") -> Outcome:
        target = [] if "--target" in words or "--direction" in words else ["--target", self.all]
        out = self.folder / name
        return prism(
            command, "--model", self.model, "--pool", self.pool, "--out", out, *target, *words
        )

    def done(self, name: str, *words: object, command: str = "score") -> prism_select.Run:
        outcome = self.run(name, *words, command=command)
        assert outcome.code == 0, outcome.err
        return prism_select.Run(self.folder / name)

    @property
    def named(self) -> list[object]:
        return [
            word for name, file in self.targets.items() for word in ("--target", f"{name}={file}")
        ]


@pytest.fixture
def desk(tmp_path: Path, plain_model: Path) -> Desk:
    return Desk(tmp_path, plain_model)


def column(run: prism_select.Run, name: str) -> Floats:
    return np.asarray(run.scores[name].to_numpy(), dtype=np.float64)


def apart(a: Floats, b: Floats) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# ---------------------------------------------------------------- several targets


def test_several_targets_in_one_pass_score_as_each_does_alone(desk: Desk) -> None:
    alone = {k: desk.done(f"alone-{k}", "--target", file) for k, file in desk.targets.items()}
    mean, best = desk.done("mean", *desk.named), desk.done("max", *desk.named, "--combine", "max")
    by = desk.done("by", "--target-by", "kind")
    each = np.column_stack([column(alone[k], "score") for k in "xyz"])
    for run in (mean, best, by):
        assert all(apart(column(run, f"score:{k}"), each[:, i]) < 1e-5 for i, k in enumerate("xyz"))
    assert (
        apart(column(mean, "score"), each.mean(1)) < 1e-5
        and apart(column(best, "score"), each.max(1)) < 1e-5
    )
    assert apart(column(by, "score"), each.mean(1)) < 1e-5
    chosen = np.column_stack([column(alone[k], "score_chosen") for k in "xyz"])
    assert apart(column(mean, "score_chosen"), chosen.mean(1)) < 1e-5
    assert (
        apart(
            column(best, "score_chosen"),
            np.take_along_axis(chosen, each.argmax(1)[:, None], 1)[:, 0],
        )
        < 1e-5
    )
    facts = mean.manifest["target"]
    assert facts["pairs"] == 12 and {
        k: t["pairs"] for k, t in facts["targets"].items()
    } == dict.fromkeys("xyz", 4)
    cosines, directions = (
        np.array(facts["cosines"]),
        [load_file(alone[k].path / "direction.safetensors") for k in "xyz"],
    )
    flat = [
        torch.cat([d[n].flatten().double() for n in sorted(d) if "/" not in n]) for d in directions
    ]
    exact = [[float(functional.cosine_similarity(a, b, dim=0)) for b in flat] for a in flat]
    assert np.allclose(cosines, exact, atol=1e-5)
    assert mean.pairs["target"].to_pylist() == [k for k in "xyz" for _ in range(4)]


def test_a_target_with_a_minus_points_away_from_what_is_chosen(desk: Desk) -> None:
    turned = [
        {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}
        for pair in PAIRS
        if pair["kind"] == "y"
    ]
    file, x, y = jsonl(desk.folder / "turned.jsonl", turned), desk.targets["x"], desk.targets["y"]
    signed = desk.done("signed", "--target", f"x={x}", "--target", f"-y={y}")
    plain = desk.done("plain", "--target", f"x={x}", "--target", f"y={file}")
    alone = desk.done("alone", "--target", f"-y={y}")
    assert apart(column(signed, "score"), column(plain, "score")) < 1e-5
    for run, name in ((signed, "score:-y"), (alone, "score")):
        assert apart(column(run, name), column(plain, "score:y")) < 1e-5


def test_targets_that_pull_against_each_other_are_told(desk: Desk) -> None:
    turned = jsonl(
        desk.folder / "turned.jsonl",
        [{**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in PAIRS],
    )
    words = [
        "--target",
        f"wanted={desk.all}",
        "--target",
        f"unwanted={turned}",
        "--target",
        f"x={desk.targets['x']}",
    ]
    warnings = desk.done("conflict", *words, "--weighting", "uniform").manifest["warnings"]
    lines = [line for line in warnings if "conflict" in line]
    assert (
        lines[0] == "targets wanted and unwanted conflict: the cosine of their directions is -1.00"
    )
    assert not any("wanted and wanted" in line or "unwanted and wanted" in line for line in lines)


def test_a_saved_direction_of_several_targets_scores_again(desk: Desk) -> None:
    first = desk.done("first", *desk.named, "--combine", "max")
    again = desk.done(
        "again", "--direction", first.path / "direction.safetensors", "--engine", "reverse"
    )
    for name in ("score", "score:x", "score:y", "score:z", "score_chosen"):
        assert (column(again, name) == column(first, name)).all(), name


def test_round_robin_takes_the_best_row_of_each_target_in_turn(desk: Desk) -> None:
    run = desk.done(
        "turn", *desk.named, "--combine", "round-robin", "--budget", "6", command="select"
    )
    each = {k: column(run, f"score:{k}") for k in "xyz"}
    expected = set[int]()
    for turn in range(6):
        scores = each["xyz"[turn % 3]]
        expected.add(
            max((i for i in range(len(POOL)) if i not in expected), key=lambda i: scores[i])
        )
    assert {
        i for i, v in enumerate(run.scores["verdict"].to_pylist()) if v == "selected"
    } == expected
    ranks = turns(np.array([[3.0, 1.0], [2.0, 9.0], [np.nan, 0.0], [1.0, 5.0]]))
    assert ranks[[0, 1, 3]].tolist() == [0, -1, -2] and np.isnan(ranks[2])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--target", "x={x}", "--target", "x={y}"], "two targets are called x"),
        (
            ["--target", "{x}", "--target", "{y}", "--target-by", "kind"],
            "it takes one target file, and here are 2",
        ),
        (["--target-by", "nothing"], "all.jsonl:1: no text in the column nothing"),
        (["--damping", "high"], "not one or several numbers above 0"),
        (["--damping", "0.1,1"], "--curvature pairs takes one value"),
        (["--curvature", "flat", "--damping", "0.1,1"], "flat has none to compare"),
        (["--curvature", "ekfac", "--damping", "0.1,1,1.0"], "the same value twice"),
        (["--tokens", "--engine", "reverse"], "does not tell tokens apart"),
        (["--normalize", "norm", "--engine", "difference"], "has no norms of gradients"),
        (["--normalize", "norm", "--tokens"], "no engine does both"),
        (["--rank", "-1"], "not a rank; try auto, full or 64"),
        (["--layers", "adapter"], "give its folder with --adapter"),
        (["--adapter", "absent"], "absent"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(desk: Desk, words: list[str], says: str) -> None:
    filled = [word.format(**desk.targets) for word in words]
    outcome = desk.run("refused", *filled)
    assert outcome.code == 2 and says in outcome.err and outcome.err.count("\n") == 1, outcome.err
    assert not (desk.folder / "refused").exists()


# ---------------------------------------------------------------- tokens


def test_a_tokens_score_is_its_own_derivative_and_belongs_to_the_token_predicted() -> None:
    model = Tiny()
    weights = select_parameters(model.network, "all")
    direction, batch = (
        target_gradient(model, weights, pairs_of(6), "prism").direction,
        batch_of(5, seed=8, left=True),
    )
    found = forward(model, weights, [direction])(batch)
    assert found.tokens is not None
    assert torch.allclose(found.tokens.sum(1), found.values, rtol=1e-10)
    for weight in weights.values():
        weight.requires_grad_(True)
    logliks = model.logits(model.hidden(batch)).log_softmax(-1)
    for b, t in batch.predicted.nonzero().tolist():
        one = logliks[b, t, batch.tokens[b, t + 1]]
        moved = torch.autograd.grad(
            one, list(weights.values()), retain_graph=True, allow_unused=True
        )
        exact = sum(
            (g * d).sum() for g, d in zip(moved, direction.values(), strict=True) if g is not None
        )
        assert torch.allclose(found.tokens[b, t, 0], torch.as_tensor(exact), rtol=1e-8, atol=1e-12)
    assert (found.tokens[:, :, 0][~batch.predicted] == 0).all()


@pytest.mark.parametrize("engine", ["auto", "difference"])
def test_token_scores_add_up_to_the_score_and_stand_beside_their_texts(
    desk: Desk, engine: str
) -> None:
    run = desk.done("tokens", "--tokens", "--engine", engine)
    plain = desk.done("plain")
    allowed = 1e-5 if engine == "auto" else 2e-2
    assert apart(column(run, "score"), column(plain, "score")) < allowed
    for row, one in zip(run.scores.to_pylist(), POOL, strict=True):
        assert len(row["token_scores"]) == len(row["token_texts"]) == row["tokens"]
        assert sum(row["token_scores"]) == pytest.approx(row["score"], rel=1e-5, abs=1e-5)
        assert "".join(row["token_texts"]) == f"{one['completion']}</s>"
    assert run.scores.schema.field("token_scores").type.value_type == "float"


# -------------------------------------------------------- curvature, rank and norms in a run


@pytest.mark.parametrize("curvature", ["diagonal", "ekfac"])
def test_each_damping_scores_as_it_does_alone(
    desk: Desk, curvature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preconditioning, "CURVATURE_ROWS", 12)
    run = desk.done("several", "--curvature", curvature, "--damping", "0.1,1,0.1")
    facts = run.manifest["curvature"]
    assert facts["name"] == curvature and facts["rows"] == 12 and 0 < facts["cosine"][""] < 1
    assert apart(column(run, "score_damping_0.1"), column(run, "score")) < 1e-6
    alone = desk.done("alone", "--curvature", curvature, "--damping", "1")
    assert apart(column(alone, "score"), column(run, "score_damping_1")) < 1e-5
    flat = desk.done("flat")
    assert apart(column(flat, "score"), column(run, "score")) > 0.1
    overlaps = {
        tuple(row["dampings"]): row["overlap"] for row in run.manifest["choice"]["damping_overlap"]
    }
    share = overlap_of_best(column(run, "score"), column(run, "score_damping_1"), 0.05)
    assert overlaps[("0.1", "1")] == share


def test_a_choice_made_again_keeps_what_scoring_said_of_dampings(desk: Desk) -> None:
    words = ["--curvature", "diagonal", "--damping", "0.5,0.1"]
    first = desk.done("first", *words, command="select")
    for before, after in (("first", "second"), ("second", "third")):
        outcome = prism(
            "select",
            "--select-from",
            desk.folder / before,
            "--budget",
            "3",
            "--out",
            desk.folder / after,
        )
        assert outcome.code == 0, outcome.err
        run = prism_select.Run(desk.folder / after)
        assert (
            run.manifest["choice"]["damping_overlap"] == first.manifest["choice"]["damping_overlap"]
        )
        assert run.manifest["scored_by"] == first.manifest["config"]
        assert len(list(run.selected)) == 3


def test_a_lower_rank_says_what_it_keeps(desk: Desk) -> None:
    whole, low = desk.done("whole"), desk.done("low", "--rank", "4")
    full = desk.done("full", "--rank", "64")
    facts = low.manifest["rank"]
    assert facts["rank"] == 4 and 0.2 < facts["energy_kept"] < 0.999
    exact = spearmanr(column(whole, "score"), column(low, "score")).statistic
    assert facts["rank_correlation"] == pytest.approx(exact, abs=1e-6)
    assert full.manifest["rank"]["energy_kept"] == pytest.approx(1) and facts["rows"] == 30
    assert apart(column(full, "score"), column(whole, "score")) < 1e-5


@pytest.mark.parametrize(
    "words",
    [
        ["--curvature", "flat", "--common", "remove"],
        ["--likelihood", "sequence", "--normalize", "norm"],
        ["--layers", "late", "--tune", "pairs"],
    ],
)
def test_a_rank_above_every_matrix_changes_no_score(desk: Desk, words: list[str]) -> None:
    whole, low = desk.done("whole", *words), desk.done("low", *words, "--rank", "99")
    for name in ("score", "score_chosen", "loglik"):
        assert apart(column(low, name), column(whole, name)) < 1e-4, name
    for key in ("common_part", "cross_validation", "split_half_agreement"):
        found, exact = (run.manifest["target"][key] for run in (low, whole))
        assert (
            found == pytest.approx(exact, rel=1e-3)
            if key != "cross_validation"
            else (found["auroc"] == exact["auroc"])
        )


@pytest.mark.parametrize("combine", ["mean", "max"])
def test_low_ranks_of_several_targets_are_saved_and_score_again(desk: Desk, combine: str) -> None:
    words = [*desk.named, "--combine", combine]
    low, whole = desk.done("low", *words, "--rank", "3"), desk.done("whole", *words)
    saved = load_file(low.path / "direction.safetensors")
    assert any(name.endswith(":left") for name in saved)
    assert all(min(value.shape) <= 3 for name, value in saved.items() if ":" in name.split("/")[-1])
    again = desk.done("again", "--direction", low.path / "direction.safetensors")
    for name in ("score", "score:x", "score:z", "score_chosen"):
        assert apart(column(again, name), column(low, name)) < 1e-6, name
        assert spearmanr(column(low, name), column(whole, name)).statistic > 0.8, name


def test_norm_ranks_by_the_cosine_with_each_rows_gradient(desk: Desk) -> None:
    words = ["--normalize", "norm", "--budget", "5", "--groups", "1"]
    run = desk.done("norm", *words, command="select")
    cosine, saved = column(run, "score_cosine"), load_file(run.path / "direction.safetensors")
    length = norm({name: value for name, value in saved.items() if "/" not in name})
    assert apart(cosine, column(run, "score") / column(run, "gradient_norm") / length) < 1e-6
    assert (np.abs(cosine) <= 1).all()
    selected = [
        i for i, verdict in enumerate(run.scores["verdict"].to_pylist()) if verdict == "selected"
    ]
    assert set(selected) == set(np.argsort(-cosine)[:5].tolist())
    assert set(run.manifest["choice"]["rank_correlation_with_tokens"]) == {"none", "tokens", "norm"}
    without = desk.done("without")
    outcome = prism(
        "select",
        "--select-from",
        without.path,
        "--normalize",
        "norm",
        "--out",
        desk.folder / "again",
    )
    assert outcome.code == 2 and "these scores were made without it" in outcome.err


# ---------------------------------------------------------------- adapters in a run


def test_an_exported_adapter_can_be_put_on_the_model_again(desk: Desk) -> None:
    adapter = desk.folder / "adapter"
    run = desk.done("export", "--save-adapter", adapter, "--rank", "8")
    assert 0 < run.manifest["adapter"]["energy_kept"] < 1
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 8
    before, merged = run.manifest["target"], desk.done("merged", "--adapter", adapter)
    assert merged.manifest["target"]["mean_preference"] > before["mean_preference"]
    assert merged.manifest["fingerprints"]["model"] != run.manifest["fingerprints"]["model"]
    apart_run = desk.done(
        "apart", "--adapter", adapter, "--layers", "adapter", "--engine", "reverse"
    )
    names: Any = apart_run.manifest["model"]["counted_weights"]
    assert names and all("lora_" in name for name in names)
