"""Arrays in, verdicts out: what must hold for any scores, costs, sources and rules."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from prism_select.run.config import ScoreConfig
from prism_select.run.errors import BadOption
from prism_select.run.options import Amount
from prism_select.selection import rules as selection
from prism_select.selection.figures import hidden_source_warnings
from prism_select.selection.near_duplicates import NearDuplicates, UnreadText
from prism_select.selection.ranking_columns import RankedRows, predicted_last
from prism_select.selection.rules import OUTCOMES, Rules, best_first, limit_of
from prism_select.selection.scores_file import Names, read_columns

ROWS = st.lists(
    st.tuples(
        st.sampled_from([-2.0, -0.5, 0.0, 0.5, 0.5, 1.0, 3.0, math.nan, math.inf, -math.inf])
        | st.floats(-9, 9),
        st.integers(1, 20),
        st.sampled_from("abc"),
    ),
    max_size=40,
)
Case = tuple[NDArray[np.float64], NDArray[np.int64], Sequence[str]]


def columns(rows: list[tuple[float, int, str]]) -> Case:
    scores, tokens, sources = zip(*rows, strict=True) if rows else ((), (), ())
    return np.array(scores, dtype=np.float64), np.array(tokens, dtype=np.int64), list(sources)


def choose(
    scores: NDArray[np.float64],
    tokens: NDArray[np.int64],
    sources: Sequence[str],
    rules: Rules,
    limit: float,
) -> list[str]:
    """Verdicts in words."""
    numbers = (
        np.unique(sources, return_inverse=True)[1] if len(sources) else np.zeros(0, dtype=np.int64)
    )
    return [OUTCOMES[code] for code in selection.choose(scores, tokens, numbers, rules, limit)]


def costs(budget: Amount, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    return tokens if budget.kind == "tokens" else np.ones_like(tokens)


BUDGETS = st.one_of(
    st.builds(Amount, st.just("share"), st.floats(0.01, 1)),
    st.builds(Amount, st.sampled_from(["rows", "tokens"]), st.integers(1, 400)),
    st.just(Amount("positive")),
)


@given(ROWS, BUDGETS, st.sampled_from([1.0, 0.5, 0.2]))
def test_a_choice_keeps_its_budget_its_caps_and_its_order(
    rows: list[tuple[float, int, str]], budget: Amount, cap: float
) -> None:
    scores, tokens, sources = columns(rows)
    finite = np.isfinite(scores)
    try:
        limit = limit_of("--budget", budget, scores, tokens)
    except BadOption:
        assert costs(budget, tokens)[finite].sum() < budget.value
        return
    verdicts = np.array(choose(scores, tokens, sources, Rules(budget, cap), limit), dtype=object)
    assert len(verdicts) == len(rows)
    assert set(verdicts.tolist()) <= {"taken", "over budget", "source cap", "quarantined"}
    assert ((verdicts == "quarantined") == ~finite).all()
    taken, over = verdicts == "taken", verdicts == "over budget"
    assert costs(budget, tokens)[taken].sum() <= limit
    by_source: dict[str, int] = defaultdict(int)
    for row in np.flatnonzero(taken):
        by_source[sources[int(row)]] += int(costs(budget, tokens)[row])
    assert all(spent <= cap * limit for spent in by_source.values())
    if cap == 1.0:
        assert not (verdicts == "source cap").any()
    if taken.any() and over.any():
        assert scores[over].max() <= scores[taken].min()
        equal = scores[taken].min()
        last_taken = np.flatnonzero(taken & (scores == equal)).max()
        assert (
            np.flatnonzero(over & (scores == equal)) > last_taken
        ).all()  # ties keep the order of the pool
    if budget.kind == "positive":
        assert (scores[taken] > 0).all()
        assert cap < 1 or taken.sum() == (scores[finite] > 0).sum()


@given(ROWS, st.integers(1, 40))
def test_rows_without_caps_fill_the_budget_exactly(
    rows: list[tuple[float, int, str]], count: int
) -> None:
    scores, tokens, sources = columns(rows)
    budget = Amount("rows", count)
    if count > np.isfinite(scores).sum():
        with pytest.raises(
            BadOption, match=rf"--budget {count} rows: more than the pool's \d+ rows"
        ):
            limit_of("--budget", budget, scores, tokens)
        return
    verdicts = choose(
        scores, tokens, sources, Rules(budget), limit_of("--budget", budget, scores, tokens)
    )
    best = np.argsort(-np.where(np.isfinite(scores), scores, -np.inf), kind="stable")[:count]
    assert {row for row, verdict in enumerate(verdicts) if verdict == "taken"} == set(best.tolist())


@given(ROWS, st.integers(1, 400))
def test_a_budget_of_tokens_stops_at_the_first_row_that_does_not_fit(
    rows: list[tuple[float, int, str]], count: int
) -> None:
    scores, tokens, sources = columns(rows)
    verdicts = choose(scores, tokens, sources, Rules(Amount("tokens", count)), count)
    over = [row for row, verdict in enumerate(verdicts) if verdict == "over budget"]
    taken = [row for row, verdict in enumerate(verdicts) if verdict == "taken"]
    if over:
        next_best = max(over, key=lambda row: (scores[row], -row))
        assert tokens[taken].sum() + tokens[next_best] > count


def test_a_share_is_of_the_rows_that_have_a_score_and_at_least_one_row() -> None:
    scores = np.array([1.0, 2.0, 3.0, 4.0, math.nan, math.nan])
    tokens = np.ones(6, dtype=np.int64)
    assert limit_of("--budget", Amount("share", 0.5), scores, tokens) == 2
    assert limit_of("--budget", Amount("share", 0.01), scores, tokens) == 1
    assert limit_of("--budget", Amount("positive"), -scores, tokens) == 0


def test_a_budget_of_exactly_the_pool_is_no_mistake_and_one_more_is() -> None:
    scores, tokens = np.array([1.0, -1.0, math.nan]), np.array([3, 4, 9])
    assert limit_of("--remove", Amount("tokens", 7), scores, tokens) == 7
    assert limit_of("--remove", Amount("rows", 2), scores, tokens) == 2
    with pytest.raises(
        BadOption, match="--remove 8 tokens: more than the pool's 7 tokens; ask for less"
    ):
        limit_of("--remove", Amount("tokens", 8), scores, tokens)
    with pytest.raises(BadOption, match="--remove 3 rows: more than the pool's 2 rows"):
        limit_of("--remove", Amount("rows", 3), scores, tokens)


def test_a_capped_source_makes_room_for_the_next_one() -> None:
    scores, tokens = np.array([9.0, 8.0, 7.0, 6.0, 5.0]), np.ones(5, dtype=np.int64)
    verdicts = choose(scores, tokens, list("aaaab"), Rules(Amount("rows", 4), per_source=0.5), 4)
    assert verdicts == ["taken", "taken", "source cap", "source cap", "taken"]


@pytest.mark.parametrize("percent", [7, 14, 28, 29, 55, 57, 58])
def test_a_cap_is_not_a_row_less_than_its_share(percent: int) -> None:
    rules = Rules(Amount("rows", 100), per_source=Amount.parse("--per-source", f"{percent}%").value)
    verdicts = choose(
        np.zeros(200), np.ones(200, dtype=np.int64), ["a"] * 100 + ["b"] * 100, rules, 100
    )
    assert verdicts[:100].count("taken") == percent


@given(ROWS, st.integers(1, 9))
def test_bands_give_every_row_with_a_score_once_the_best_first(
    rows: list[tuple[float, int, str]], count: int
) -> None:
    scores = columns(rows)[0]
    bands = [band.tolist() for band in best_first(scores, count)]
    best = np.argsort(-np.where(np.isfinite(scores), scores, -np.inf), kind="stable")
    assert [row for band in bands for row in band] == best[
        : int(np.isfinite(scores).sum())
    ].tolist()
    assert all(len(band) >= count for band in bands[:-1])


@pytest.mark.parametrize("budget", ["3000", "50%", "40000tok", "positive"])
@pytest.mark.parametrize("cap", [1.0, 0.2])
def test_a_choice_of_many_rows_in_bands_is_that_of_a_plain_walk(budget: str, cap: float) -> None:
    draw = np.random.default_rng(0)
    scores, tokens = draw.normal(size=9000).round(2), draw.integers(1, 30, 9000)
    sources, amount = draw.integers(0, 4, 9000), Amount.parse("--budget", budget)
    scores[draw.integers(9000, size=50)] = math.nan
    limit = limit_of("--budget", amount, scores, tokens)
    found = selection.choose(scores, tokens, sources, Rules(amount, cap), limit)
    spent, by_source, taken = 0.0, Counter[int](), set[int]()
    for row in np.argsort(-np.nan_to_num(scores, nan=-9), kind="stable").tolist():
        price = int(costs(amount, tokens)[row])
        if spent + price > limit or (amount.kind == "positive" and not scores[row] > 0):
            break
        if by_source[int(sources[row])] + price <= round(cap * limit, 6):
            taken.add(row)
            spent, by_source[int(sources[row])] = (
                spent + price,
                by_source[int(sources[row])] + price,
            )
    assert set(np.flatnonzero(found == 0).tolist()) == taken


# ---------------------------------------------------------------- near duplicates

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
TEXTS = [WORDS, WORDS.upper(), f"{WORDS} seventeen", "the capital of France is Paris", "", "no"]


def test_predicted_scores_come_after_every_exact_one_and_each_in_their_own_order() -> None:
    ranking, exact = (
        np.array([2e-17, -1e300, np.nan, 3e-17, 1.0, 2e-17]),
        np.array([0, 1, 1, 0, 1, 0], dtype=bool),
    )
    ranks = predicted_last(ranking, exact)
    assert np.isnan(ranks[2])
    assert np.argsort(-ranks, kind="stable").tolist() == [4, 1, 3, 0, 5, 2]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 9), st.sampled_from(TEXTS)), min_size=1, max_size=12))
def test_of_identical_texts_only_the_best_scored_stays(rows: list[tuple[float, str]]) -> None:
    scores = np.array([score for score, _ in rows])
    repeats = NearDuplicates(0.999, {row: text for row, (_, text) in enumerate(rows)})
    rules = Rules(Amount("share", 1.0), repeats=repeats)
    verdicts = choose(
        scores, np.ones(len(rows), dtype=np.int64), ["a"] * len(rows), rules, len(rows)
    )
    groups: dict[str, list[int]] = defaultdict(list)
    for row, (_, text) in enumerate(rows):
        groups[text.lower()].append(row)
    best = {max(group, key=lambda row: (scores[row], -row)) for group in groups.values()}
    assert {row for row, verdict in enumerate(verdicts) if verdict == "taken"} == best
    assert Counter(verdicts)["near duplicate"] == len(rows) - len(best)


def test_the_threshold_parts_near_duplicates_from_others() -> None:
    texts = {0: WORDS, 1: f"{WORDS} seventeen", 2: "the capital of France is Paris"}
    assert [NearDuplicates(0.8, texts)(row) for row in (0,)] == [False]
    strict, loose = NearDuplicates(0.999, texts), NearDuplicates(0.8, texts)
    assert [strict(row) for row in texts] == [False, False, False]
    assert [loose(row) for row in texts] == [False, True, False]


def test_a_near_duplicate_costs_nothing_and_a_row_over_budget_is_not_compared() -> None:
    scores, tokens = np.array([5.0, 4.0, 3.0, 2.0]), np.ones(4, dtype=np.int64)
    texts = {0: WORDS, 1: WORDS, 2: "the capital of France is Paris"}  # row 3 is never asked for
    rules = Rules(Amount("rows", 2), repeats=NearDuplicates(0.8, texts))
    assert choose(scores, tokens, list("aaaa"), rules, 2) == [
        "taken",
        "near duplicate",
        "taken",
        "over budget",
    ]
    with pytest.raises(UnreadText):
        choose(
            scores,
            tokens,
            list("aaaa"),
            Rules(Amount("rows", 3), repeats=NearDuplicates(0.8, texts)),
            3,
        )


# ---------------------------------------------------------------- columns of the scores


@pytest.mark.parametrize("size", [1, 2, 5])
def test_columns_are_the_same_however_the_rows_are_parted_into_tables(size: int) -> None:
    table = pa.table(
        {
            "score": pa.array([1.5, None, -2.0, 0.0, 4.0], pa.float64()),
            "tokens": pa.array([3, None, 1, 2, 7], pa.int32()),
            "exact": [True, False, True, True, False],
            "source": pa.array(["b", None, "a", "b", "c"], pa.string()),
            "unread": [0, 0, 0, 0, 0],
        }
    )
    types = {"score": np.float64, "tokens": np.int32, "exact": bool, "source": str}
    tables = (table.slice(start, size) for start in range(0, len(table), size))
    columns = read_columns(tables, types.get)
    assert len(columns) == 5 and set(columns) == {"score", "tokens", "exact"}
    assert np.isnan(columns["score"][1]) and columns["score"][[0, 2, 3, 4]].tolist() == [
        1.5,
        -2,
        0,
        4,
    ]
    assert columns["tokens"].tolist() == [3, 0, 1, 2, 7] and columns["tokens"].dtype == np.int32
    assert columns["exact"].tolist() == [True, False, True, True, False]
    source = columns.names["source"]
    assert [source[row] for row in range(5)] == ["b", "", "a", "b", "c"]
    assert source.equals("b").tolist() == [True, False, False, True, False]
    assert not source.equals("d").any()


# ---------------------------------------------------------------- amounts


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("5%", "share", 0.05),
        ("12.5%", "share", 0.125),
        ("100%", "share", 1.0),
        ("500", "rows", 500),
        ("1_000_000", "rows", 1_000_000),
        (" 200_000tok ", "tokens", 200_000),
        ("positive", "positive", 0),
    ],
)
def test_an_amount_is_a_share_rows_tokens_or_every_positive_row(
    text: str, kind: str, value: float
) -> None:
    assert Amount.parse("--budget", text) == Amount(kind, value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["", "0", "0%", "101%", "-5", "5.5", "5 %x", "tok", "0tok", "1e3", "nan%", "half", "9" * 5000],
)
def test_anything_else_is_no_amount(text: str) -> None:
    with pytest.raises(BadOption, match="not an amount; try 5%"):
        Amount.parse("--budget", text)


@pytest.mark.parametrize(("rejected", "warned"), [(3.0, True), (1.0, False)])
def test_a_source_of_highest_influence_on_chosen_answers_and_lowest_score_is_named(
    rejected: float, warned: bool
) -> None:
    """Math raises the chosen answers by 2 a token, chat by 0.1; what matters is what it does to the
    rejected ones."""
    count = 12
    tokens = np.full(2 * count, 4, dtype=np.int32)
    chosen = np.repeat([8.0, 0.4], count)
    score = chosen - np.repeat([4 * rejected, 0.0], count)
    codes = np.repeat(np.array([0, 1], dtype=np.int32), count)

    def ranked(chosen: NDArray[np.float64], rows: slice = slice(None)) -> RankedRows:
        return RankedRows(
            ranking=score[rows],
            score=score[rows],
            score_chosen=chosen[rows].astype(np.float32),
            tokens=tokens[rows],
            source=Names(codes[rows], ["math", "chat"]),
            extra={},
            reasons={},
            truncated=0,
        )

    for normalize, influence in (("none", "+8"), ("tokens", "+2")):
        warnings = hidden_source_warnings(config_of(normalize), ranked(chosen))
        assert bool(warnings) == warned
        start = f"source math has the highest influence on the chosen answers ({influence} a row"
        assert all(line.startswith(start) for line in warnings)
    assert not hidden_source_warnings(config_of("none"), ranked(chosen, slice(0, 9)))
    chosen[0] = np.nan  # as where only the best rows have halves
    assert not hidden_source_warnings(config_of("none"), ranked(chosen))


def config_of(normalize: str) -> ScoreConfig:
    return ScoreConfig(model="m", pool=["p"], target=["t"], out="o", normalize=normalize)  # type: ignore[arg-type]
