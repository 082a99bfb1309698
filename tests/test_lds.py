"""The linear datamodeling score: 1 where gains are sums of scores, nothing where they are noise, by
rank alone."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import rankdata

from prism_select.core.statistics import halves, lds

Floats = NDArray[np.float64]


@pytest.mark.parametrize("rows", [2, 9, 400])
def test_a_half_is_half_of_the_rows_and_no_row_is_favoured(rows: int) -> None:
    members = halves(rows, 1000, 0)
    assert (members.sum(1) == rows // 2).all()
    spread = math.sqrt(0.25 / 1000)
    assert np.abs(members.mean(0) - (rows // 2) / rows).max() < 5 * spread
    assert (members == halves(rows, 1000, 0)).all() and (members != halves(rows, 1000, 1)).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_where_gains_are_sums_of_scores_whatever_their_scale_the_lds_is_one(sign: int) -> None:
    scores, members = np.random.default_rng(0).normal(size=50), halves(50, 30, 0)
    found = lds(scores, members, np.exp(sign * (members @ scores) / 10), 0)
    assert found == pytest.approx({"lds": sign, "low": sign, "high": sign, "halves": 30})


def test_noise_in_the_gains_gives_the_rank_correlation_of_the_closed_form() -> None:
    """Sums of many scores and their noise are normal: ρ = 6/π asin(r/2), r their correlation
    (Pearson 1907)."""
    draw = np.random.default_rng(0)
    scores, members = draw.normal(size=400), halves(400, 4000, 0)
    foretold = members @ scores
    found = lds(scores, members, foretold + draw.normal(0, foretold.std(), 4000), 0, draws=200)
    wanted = 6 / math.pi * math.asin(math.sqrt(0.5) / 2)
    assert found["low"] < wanted < found["high"] and found["lds"] == pytest.approx(wanted, abs=0.03)


def test_an_interval_around_nothing_holds_nothing_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(100):
        draw = np.random.default_rng(seed)
        found = lds(
            draw.normal(size=60), halves(60, 40, seed), draw.normal(size=40), seed, draws=200
        )
        held += found["low"] < 0 < found["high"]
    assert 88 <= held <= 99


def test_more_halves_narrow_the_interval_by_their_square_root() -> None:
    draw = np.random.default_rng(0)
    found = [
        lds(draw.normal(size=60), halves(60, count, 0), draw.normal(size=count), 0)
        for count in (50, 800)
    ]
    wide, narrow = (each["high"] - each["low"] for each in found)
    assert wide / narrow == pytest.approx(4, rel=0.2)


def test_ties_share_their_rank() -> None:
    scores, members = np.array([1.0, 1.0, 0.0, 0.0]), halves(4, 24, 0)
    gains = np.round(np.random.default_rng(0).normal(size=24) + members @ scores)
    a, b = (rankdata(values) for values in (members @ scores, gains))
    assert lds(scores, members, gains, 0)["lds"] == pytest.approx(np.corrcoef(a, b)[0, 1])


def test_one_half_has_no_lds_and_two_leave_its_interval_without_width() -> None:
    """Of two halves, a resample with both in it has ρ = 1 here; the others have none, and are left
    out."""
    scores = np.arange(4.0)
    one, two = (
        lds(scores, members, members @ scores, 0) for members in (halves(4, 1, 0), halves(4, 2, 0))
    )
    assert math.isnan(one["lds"]) and math.isnan(one["low"]) and math.isnan(one["high"])
    assert two == pytest.approx({"lds": 1, "low": 1, "high": 1, "halves": 2})


def test_gains_that_never_change_and_scores_that_are_missing_have_no_lds() -> None:
    scores, members = np.arange(6.0), halves(6, 10, 0)
    assert math.isnan(lds(scores, members, np.ones(10), 0)["lds"])
    found = lds(np.where(scores == 2, np.nan, scores), members, members @ scores, 0)
    assert math.isnan(found["lds"]) and math.isnan(found["low"])
