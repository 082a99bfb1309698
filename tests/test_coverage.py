"""Coverage: every group of pairs is served, whatever its size, its gradients and its place in the
ranking."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import jsonl
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import prism_select
from prism_select.commands import group_scoring, pipeline
from prism_select.demo import world
from prism_select.demo.train import MODEL_DIR
from prism_select.directions import pair_directions
from prism_select.directions.answer_products import AnswerProducts
from prism_select.directions.pair_clusters import clusters_of
from prism_select.directions.way import way_of
from prism_select.run.config import SelectConfig
from prism_select.run.errors import BadOption
from prism_select.run.options import Amount
from prism_select.run.thresholds import SILHOUETTE
from prism_select.selection.coverage import NEARLY, ORDERS, concave, in_turn
from prism_select.selection.rules import OUTCOMES, Rules, choose_along

Floats = NDArray[np.float64]
CONFIG = SelectConfig(model="m", pool="p", target="t", budget="5%", out="o")
COLUMNS = st.builds(
    lambda rows, groups, seed: np.random.default_rng(seed).integers(-3, 9, (rows, groups)) * 1.0,
    st.integers(0, 12),
    st.integers(1, 4),
    st.integers(0, 2**16),
)


def always(row: int) -> bool:
    return True


# ---------------------------------------------------------------- orders


@given(COLUMNS)
def test_groups_take_their_best_row_in_turn(columns: Floats) -> None:
    left, expected = [*range(len(columns))], list[tuple[int, int]]()
    while left:
        group = len(expected) % columns.shape[1]
        row = max(left, key=lambda row: (columns[row, group], -row))
        left.remove(row)
        expected.append((row, group))
    assert list(in_turn(columns, always)) == expected


@given(COLUMNS)
def test_each_concave_step_is_nearly_the_best_and_every_row_comes_once(columns: Floats) -> None:
    order = list(concave(columns, always))
    assert sorted(row for row, _ in order) == [*range(len(columns))]
    if not len(columns):
        return
    size = np.sqrt(np.square(columns).mean(0))
    shares = np.clip(columns / np.where(size > 0, size, 1), 0, None)
    got, left = np.zeros(columns.shape[1]), {*range(len(columns))}
    for row, _ in order:
        gains = {r: (np.sqrt(got + shares[r]) - np.sqrt(got)).sum() for r in left}
        assert gains[row] >= (1 - NEARLY) * max(gains.values()) - 1e-9
        got += shares[row]
        left.remove(row)


@pytest.mark.parametrize("rule", ORDERS)
def test_scaling_a_group_changes_nothing(rule: str) -> None:
    columns = np.random.default_rng(0).normal(size=(200, 3))
    order = [*ORDERS[rule](columns, always)]
    assert [*ORDERS[rule](columns * [1, 1024, 2**-20], always)] == order


def test_a_small_group_is_served_where_its_rows_help_no_other() -> None:
    columns = np.zeros((60, 2))
    columns[:50, 0], columns[50:, 1] = 5.0, 1.0
    for order in ORDERS.values():
        first = [row for row, _ in order(columns, always)][:10]
        assert 3 <= sum(row >= 50 for row in first) <= 7


@pytest.mark.parametrize("rule", ORDERS)
def test_a_row_that_is_passed_over_serves_nobody_and_costs_no_turn(rule: str) -> None:
    columns = np.array([[9.0, 0], [8, 0], [7, 0], [0, 5], [0, 4]])
    taken = [row for row, _ in ORDERS[rule](columns, lambda row: row > 0) if row > 0]
    assert {*taken[:2]} == {1, 3} and {*taken[:4]} == {1, 2, 3, 4}


@given(COLUMNS, st.sampled_from([*ORDERS]), st.booleans(), st.sampled_from([1.0, 0.5]))
def test_budgets_and_caps_hold(columns: Floats, rule: str, in_tokens: bool, cap: float) -> None:
    rows = len(columns)
    tokens, sources = np.arange(rows) % 4 + 1, np.arange(rows) % 2
    budget, limit = Amount("tokens" if in_tokens else "rows", 1), (2 * rows if in_tokens else rows)
    prices = tokens if in_tokens else np.ones(rows)

    def order(is_taken: Callable[[int], bool]) -> Any:
        return ORDERS[rule](columns, is_taken)

    codes, takers = choose_along(
        order, np.zeros(rows), tokens, sources, Rules(budget, cap), 0.6 * limit
    )
    taken = codes == OUTCOMES.index("taken")
    assert prices[taken].sum() <= 0.6 * limit
    assert ((takers >= 0) == taken).all()
    for source in (0, 1):
        assert prices[taken & (sources == source)].sum() <= round(cap * 0.6 * limit, 6)
    if cap == 1 and not in_tokens:
        assert taken.sum() == int(0.6 * rows)


# ---------------------------------------------------------------- a planted target

KINDS = {"Rome": 7, "Paris": 5, "Madrid": 3, "Cairo": 2}


def capital(row: dict[str, Any]) -> str:
    return str(row.get("completion", row.get("chosen"))).split()[-1]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Four kinds of pairs in unequal numbers, and a pool with six rows of each kind among 300."""
    folder, pairs, left = tmp_path_factory.mktemp("planted"), [], dict(KINDS)
    for pair in world.pairs("capitals", 144, 0):
        if left.get(capital(pair), 0):
            left[capital(pair)] -= 1
            pairs.append({**pair, "kind": capital(pair)})
    assert not any(left.values())
    rows = world.pool(1200, 0)
    others = [row for row in rows if row["source"] != "capitals"][:150]
    rows = [row for row in rows if row["source"] == "capitals"] + others
    return {
        "model": str(MODEL_DIR),
        "pool": jsonl(folder / "pool.jsonl", rows),
        "target": jsonl(folder / "pairs.jsonl", pairs),
    }


def select(files: dict[str, str], out: Path, **options: Any) -> prism_select.Run:
    return prism_select.select(**{**files, "budget": "16", "out": str(out), **options})


def verdicts(run: prism_select.Run) -> list[str]:
    return list(run.scores["verdict"].to_pylist())


def kinds_chosen(run: prism_select.Run) -> Counter[str]:
    return Counter(map(capital, run.selected))


@pytest.fixture(scope="module")
def covered(planted: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> prism_select.Run:
    return select(planted, tmp_path_factory.mktemp("covered") / "run", groups="auto")


def test_every_kind_of_a_planted_target_is_served(
    planted: dict[str, str], covered: prism_select.Run, tmp_path: Path
) -> None:
    before = kinds_chosen(select(planted, tmp_path / "before", groups=1))
    least = 16 / len(KINDS) / 2
    assert min(before[kind] for kind in KINDS) < least
    assert min(kinds_chosen(covered)[kind] for kind in KINDS) >= least
    again = select(planted, tmp_path / "concave", groups="auto", combine="concave")
    assert min(kinds_chosen(again)[kind] for kind in KINDS) >= least


def test_groups_are_the_planted_kinds_and_the_run_says_so(covered: prism_select.Run) -> None:
    groups, pairs = covered.manifest["target"]["groups"], covered.pairs
    assert sorted(entry["pairs"] for entry in groups.values()) == sorted(KINDS.values())
    assert set(pairs["group"].to_pylist()) == set(groups)
    assert all(len(set(each["prompts"])) == len(each["prompts"]) > 0 for each in groups.values())
    coverage = covered.manifest["choice"]["coverage"]
    chosen = Counter(covered.scores["group"].drop_null().to_pylist())
    assert coverage["by_group"] == chosen and sum(chosen.values()) == 16
    assert coverage["by_score"] == 0 and coverage["pairs"] == sum(KINDS.values())
    assert 0 <= coverage["hardly_helped"] < coverage["pairs"]
    assert 0 <= coverage["hardly_helped_by_twice"] < coverage["pairs"]
    table = covered.scores
    taken = np.array(verdicts(covered)) == "selected"
    assert (table["group"].is_valid().to_numpy() == taken).all()
    scored = table["score_group_1"].is_valid().to_numpy()
    assert scored.sum() == coverage["rows"] >= 64 and scored[taken].all()


@pytest.mark.parametrize(("rank", "off"), [(64, 1e-5), (pair_directions.GROUP_RANK, 0.01)])
def test_scores_along_groups_are_those_of_named_targets_and_so_is_the_choice(
    rank: int, off: float, planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_directions, "GROUP_RANK", rank)
    two = select(planted, tmp_path / "two", groups="auto", budget="25%")
    kind = {
        p["kind"]: g
        for p, g in zip(read(planted["target"]), two.pairs["group"].to_pylist(), strict=True)
    }
    one = select(planted, tmp_path / "one", target_by="kind", combine="round-robin", budget="25%")
    for name, group in kind.items():
        found, wanted = two.scores[f"score_group_{group}"], one.scores[f"score:{name}"]
        np.testing.assert_allclose(
            found.to_numpy(), wanted.to_numpy(), rtol=1e-4, atol=off * np.ptp(wanted.to_numpy())
        )
    assert verdicts(two) == verdicts(one)


def read(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def test_a_group_whose_pairs_are_given_twice_changes_no_choice(
    planted: dict[str, str], tmp_path: Path
) -> None:
    pairs = read(planted["target"])
    twice = [*pairs, *(pair for pair in pairs if pair["kind"] == "Rome")]
    doubled = {**planted, "target": jsonl(tmp_path / "twice.jsonl", twice)}
    once = select(planted, tmp_path / "once", groups="auto", budget="25%")
    more = select(doubled, tmp_path / "more", groups="auto", budget="25%")
    assert verdicts(more) == verdicts(once)
    assert more.scores["group"].equals(once.scores["group"])


def test_a_run_that_was_stopped_between_the_stages_goes_on(
    planted: dict[str, str],
    covered: prism_select.Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopping(config: Any, job: Any, loaded: Any = None) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "make_scorer", stopping)  # first called for the second stage
        with pytest.raises(KeyboardInterrupt):
            select(planted, tmp_path / "run", groups="auto")
    shards = sorted((tmp_path / "run" / "shards").iterdir())
    assert shards and not any(path.name.startswith("group") for path in shards)
    run = select(planted, tmp_path / "run", groups="auto")
    assert verdicts(run) == verdicts(covered)
    assert run.scores["score_group_1"].equals(covered.scores["score_group_1"])


def test_more_rows_are_scored_where_the_last_quarter_enters(
    planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_scoring, "BUDGETS", 1)
    grown = select(planted, tmp_path / "grown", groups="auto")
    assert 16 < grown.manifest["choice"]["coverage"]["rows"] <= 60
    monkeypatch.setattr(group_scoring, "MOST", 0.0)
    small = select(planted, tmp_path / "small", groups="auto")
    assert small.manifest["choice"]["coverage"]["rows"] == 16


def test_a_choice_made_again_is_that_of_the_run_or_the_old_one(
    planted: dict[str, str], covered: prism_select.Run, tmp_path: Path
) -> None:
    source = {"select_from": str(covered.path), "budget": "16"}
    same = prism_select.select(**source, out=str(tmp_path / "same"))
    assert verdicts(same) == verdicts(covered)
    assert same.scores["group"].equals(covered.scores["group"])
    old = prism_select.select(**source, combine="mean", out=str(tmp_path / "old"))
    assert verdicts(old) == verdicts(select(planted, tmp_path / "plain", groups=1))
    assert "coverage" not in old.manifest["choice"]
    again = prism_select.select(**source, combine="concave", out=str(tmp_path / "again"))
    fresh = select(planted, tmp_path / "fresh", groups="auto", combine="concave")
    assert verdicts(again) == verdicts(fresh)
    capped = prism_select.select(**source, per_source="50%", out=str(tmp_path / "capped"))
    assert max(Counter(row["source"] for row in capped.selected).values()) <= 8
    large = prism_select.select(**{**source, "budget": "50%"}, out=str(tmp_path / "large"))
    assert any("taken by their score alone" in w for w in large.manifest["warnings"])
    with pytest.raises(BadOption, match="groups take rows in turn"):
        prism_select.select(**{**source, "budget": "positive"}, out=str(tmp_path / "positive"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"groups": "many"}, "not a number of groups"),
        ({"groups": "0"}, "not a number of groups"),
        ({"groups": "40"}, "there are 17 pairs"),
        ({"groups": "auto", "target_by": "kind"}, "named targets are groups already"),
        ({"groups": "auto", "combine": "mean"}, "leave one out"),
        ({"groups": "auto", "budget": "positive"}, "leave one out"),
        ({"groups": "auto", "curvature": "diagonal"}, "leave one out"),
        ({"groups": "auto", "cascade": True}, "leave one out"),
        ({"groups": "auto", "rank_by": "length"}, "leave one out"),
        ({"combine": "concave", "target_by": "kind", "budget": "positive"}, "takes rows in turn"),
        ({"groups": "auto", "curvature": "adam"}, "--groups auto and --curvature adam"),
        ({"groups": "auto", "weighting": "unpaired"}, "--groups auto and --weighting unpaired"),
    ],
)
def test_what_groups_cannot_do_is_refused(
    planted: dict[str, str], tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadOption, match=says):
        select(planted, tmp_path / "run", **options)


def test_pairs_without_clear_groups_are_eight(planted: dict[str, str], tmp_path: Path) -> None:
    pairs = [pair for skill in world.SKILLS for pair in world.pairs(skill, 5, 0)]
    files = {**planted, "target": jsonl(tmp_path / "pairs.jsonl", pairs)}
    run = select(files, tmp_path / "run", groups="auto")
    assert run.manifest["target"]["silhouette"] < SILHOUETTE
    assert list(run.manifest["target"]["groups"]) == [*"12345678"]


@pytest.mark.parametrize(
    ("kinds", "common", "count", "asked"),
    [(1, 0.6, 1, None), (2, 2.0, 2, None), (40, 0.0, 8, None), (1, 0.6, 3, 3)],
)
def test_pairs_of_one_kind_are_one_group(
    kinds: int, common: float, count: int, asked: int | None
) -> None:
    draw = np.random.default_rng(0)
    of_kinds = draw.normal(size=(kinds, 300))[np.arange(40) % kinds]
    gradients = np.zeros((80, 300))  # of rejected answers: none
    gradients[:40] = common * of_kinds + draw.normal(size=(40, 300))
    blocks = {"": torch.from_numpy(gradients @ gradients.T)}
    products = AnswerProducts(blocks, -torch.ones(80).double(), torch.full((80,), 4))
    clusters = clusters_of(products, way_of(CONFIG), asked, 0)
    assert clusters.count == count
    if 1 < kinds < 8:
        assert len({*zip(clusters.of_pairs.tolist(), np.arange(40) % kinds, strict=True)}) == kinds


def test_few_pairs_are_one_group(planted: dict[str, str], tmp_path: Path) -> None:
    pairs = world.pairs("capitals", 3, 0)
    files = {**planted, "target": jsonl(tmp_path / "pairs.jsonl", pairs)}
    run = select(files, tmp_path / "run", groups="auto")
    assert "groups" not in run.manifest["target"] and "group" not in run.scores.column_names
    assert any("--groups: the pairs' gradients do not part" in w for w in run.manifest["warnings"])
    assert pq.read_table(run.path / "pairs.parquet").num_rows == len(pairs)
