"""The report: its facts are those of the run folder, its page holds no markup but its own, and no
model is needed."""

import base64
import gzip
import hashlib
import html
import json
import math
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Row, jsonl, prism, prism_apart
from hypothesis import given
from hypothesis import strategies as st
from made_run import CONTROLS, PAIRS, TARGET, change, write_evaluation, write_run
from safetensors.torch import save_file
from scipy.stats import spearmanr

import prism_select
from prism_select.data.files import read_rows, rows_at
from prism_select.report.checks import checks_of, headline
from prism_select.report.comparison_page import compare
from prism_select.report.formatting import sentence, significant
from prism_select.report.page import in_json
from prism_select.report.pool_rows import CHARACTERS, PoolRow
from prism_select.report.run_facts import read_run_facts
from prism_select.report.run_page import page_of, write_report
from prism_select.report.sections import SECTIONS, choice, examples, scores, target
from prism_select.report.sections.layers import layer_shares
from prism_select.run.errors import BadOption

ROWS: list[Row] = [
    {
        "prompt": f"Say {place}",
        "completion": f"It is {place}.",
        "id": f"r{place}",
        "source": "ab"[place % 2],
    }
    for place in range(12)
]
SCORES = [5.0, -1.0, 4.0, 0.0, 3.0, -2.0, 2.0, -3.0, 1.0, -4.0, 0.5, -5.0]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", ROWS, SCORES)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A thousand rows, of which 333 were taken."""
    rows: list[Row] = [
        {"prompt": f"Say {place}", "completion": "ok", "id": f"r{place}"} for place in range(1000)
    ]
    return write_run(tmp_path / "run", rows, np.random.default_rng(0).normal(size=1000).tolist())


def page(run: Path) -> str:
    return page_of(read_run_facts(str(run))).decode()


def states(run: Path) -> dict[str, str]:
    return {check.name: check.state for check in checks_of(read_run_facts(str(run)))}


def score_facts(run: Path) -> scores.ScoreFacts:
    facts = scores.read(read_run_facts(str(run)))
    assert facts
    return facts


def shown_rows(run: Path) -> tuple[PoolRow, ...]:
    facts = examples.read(read_run_facts(str(run)))
    assert facts
    return facts.rows


def target_facts(run: Path) -> target.TargetFacts:
    facts = target.read(read_run_facts(str(run)))
    assert facts
    return facts


# ---------------------------------------------------------------- facts


def test_the_cut_off_is_the_lowest_score_that_was_chosen(run: Path) -> None:
    columns = read_run_facts(str(run)).columns
    assert columns.cutoff == 2.0 and columns.passed_over == 0
    assert columns.order.tolist() == [0, 2, 4, 6, 8, 10, 3, 1, 5, 7, 9, 11]
    table = pq.read_table(run / "scores.parquet")
    verdict = [
        "source cap" if row == 2 else value
        for row, value in enumerate(table["verdict"].to_pylist())
    ]
    pq.write_table(
        table.set_column(table.num_columns - 1, "verdict", pa.array(verdict)),
        run / "scores.parquet",
    )
    assert read_run_facts(str(run)).columns.passed_over == 1


def test_the_histogram_holds_every_scored_row_once_also_what_lies_far_out(large: Path) -> None:
    table = pq.read_table(large / "scores.parquet")
    scores = table["score"].to_numpy().copy()
    scores[[3, 7]] = 1e6, math.nan
    pq.write_table(table.set_column(5, "score", pa.array(scores)), large / "scores.parquet")
    found = score_facts(large).histogram
    assert sum(found.chosen) + sum(found.not_chosen) == 999
    assert sum(found.chosen) == 333 - (table["verdict"][7].as_py() == "selected")
    assert found.edges[-1] < 10 and found.beyond >= 1


@pytest.mark.parametrize("far", [3.0, 300.0])
def test_a_few_far_scores_leave_the_others_room(large: Path, far: float) -> None:
    """On a linear axis all but 40 of 1,000 rows would stand in one bar."""
    table = pq.read_table(large / "scores.parquet")
    values = np.random.default_rng(0).normal(size=len(table))
    values[:40] = np.linspace(-far, far, 40)
    pq.write_table(table.set_column(5, "score", pa.array(values)), large / "scores.parquet")
    facts = score_facts(large)
    drawn = {chart.name: json.dumps(chart.spec) for chart in scores.charts(facts)}
    found = facts.histogram
    assert (found.linear is None) == (far < 10)
    assert max(a + b for a, b in zip(found.chosen, found.not_chosen, strict=True)) < 150
    assert ("symlog" in drawn["spread"]) == (far > 10)


def test_a_budget_holds_the_influence_of_the_first_rows(run: Path) -> None:
    facts = score_facts(run)
    positive = [5, 4, 3, 2, 1, 0.5]
    assert facts.positive == 0.5
    assert facts.choice.influence == pytest.approx(sum(positive[:4]) / sum(positive))
    by_share = {budget.share: budget.influence for budget in facts.budgets}
    assert by_share[0.2] == pytest.approx((5 + 4) / sum(positive))  # 20% of 12 rows are 2
    assert by_share[0.5] == 1
    curve = [budget.influence for budget in facts.curve]
    assert curve[0] == 0 and curve[-1] == 1 and curve == sorted(curve)


def test_sources_have_their_own_quantiles_and_chosen_rows(run: Path) -> None:
    for source in score_facts(run).sources:
        values = [
            score for score, row in zip(SCORES, ROWS, strict=True) if row["source"] == source.name
        ]
        assert source.rows == len(values) == 6
        assert source.quantiles == pytest.approx(np.quantile(values, scores.QUANTILES))
        assert source.chosen == sum(score >= 2 for score in values)


def test_many_sources_are_joined_and_none_is_lost(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"prompt": "a", "completion": "b", "id": f"{i}", "source": f"s{i % 40}"} for i in range(200)
    ]
    run = write_run(tmp_path / "run", rows, [float(i) for i in range(200)])
    sources = score_facts(run).sources
    assert sum(source.rows for source in sources) == 200
    assert sources[-1].name == "28 others" and len(sources) == 13


def test_the_cells_of_the_influence_on_either_answer_hold_every_row(run: Path) -> None:
    cells = score_facts(run).cells
    assert sum(cell.rows for cell in cells) == 12
    assert all(cell.x[0] < cell.x[1] and cell.y[0] < cell.y[1] for cell in cells)


def test_a_run_without_any_score_has_a_page(run: Path) -> None:
    table = pq.read_table(run / "scores.parquet")
    nothing = pa.array([None] * 12, pa.float64())
    for name in ("score", "score_per_token", "score_chosen", "score_rejected"):
        table = table.set_column(table.schema.get_field_index(name), name, nothing)
    pq.write_table(
        table.set_column(table.num_columns - 1, "verdict", pa.array(["quarantined"] * 12)),
        run / "scores.parquet",
    )
    assert "No row of the pool has a score." in page(run)


def test_the_rows_shown_are_the_top_both_sides_of_the_cut_off_and_the_bottom(large: Path) -> None:
    columns = read_run_facts(str(large)).columns
    top, beside, bottom = examples.TOP, examples.BESIDE, examples.BOTTOM
    expected = {*range(top), *range(333 - beside, 333 + beside), *range(1000 - bottom, 1000)}
    assert [rank for _, rank in examples.shown_ranks(columns)] == sorted(expected)
    for row in shown_rows(large):
        assert row.score == columns.score[columns.order[row.rank - 1]]
        assert row.turns[0].text == f"Say {row.row}" and row.id == f"r{row.row}"
        assert (row.verdict == "selected") == (row.rank <= 333)


def test_a_small_pool_is_shown_in_full(run: Path) -> None:
    rows = shown_rows(run)
    assert [row.rank for row in rows] == list(range(1, 13))
    assert {row.group for row in rows} == {"top", "below the cut-off"}


def test_long_texts_are_truncated_and_say_how_long_they_were(tmp_path: Path) -> None:
    rows: list[Row] = [{"prompt": "p", "completion": "x" * 50_000, "id": str(i)} for i in range(6)]
    run = write_run(tmp_path / "run", rows, [float(i) for i in range(6)])
    answer = shown_rows(run)[0].turns[1]
    assert len(answer.text) == CHARACTERS - 1 and answer.characters == 50_000
    assert len(page(run)) < 1_200_000


def test_a_row_that_is_not_there_any_more_says_so(run: Path) -> None:
    pool = run.parent / "pool.jsonl"
    lines = pool.read_text().splitlines()
    pool.write_text("\n".join([lines[1], lines[0], "{broken", *lines[3:10]]) + "\n")
    os.utime(pool, (2e9, 2e9))
    missing = {row.row: row.missing for row in shown_rows(run)}
    assert missing[0] == "the file has changed: the row is r1 now" and "broken JSON" in missing[2]
    assert missing[10] == missing[11] == "the file has fewer rows than it had"
    assert not missing[3]
    warning = f"{pool} was written after the run"
    assert choice.read(read_run_facts(str(run))).warnings == (warning,) and warning in page(run)
    pool.unlink()
    assert all("no such file" in row.missing for row in shown_rows(run))


def test_scores_of_tokens_come_with_their_rows(tmp_path: Path) -> None:
    tokens: Any = {
        "token_scores": [[float(row), -1.0] for row in range(12)],
        "token_texts": [["It ", f"{row}"] for row in range(12)],
    }
    for row in shown_rows(write_run(tmp_path / "run", ROWS, SCORES, **tokens)):
        assert row.token_scores == (("It ", float(row.row)), (f"{row.row}", -1.0))


def test_pairs_are_shown_with_their_answers_as_the_target_file_has_them(run: Path) -> None:
    facts = target_facts(run)
    assert len(facts.preferences) == 12 and "not shown" not in facts.pair_words
    for pair in facts.pairs:
        assert pair.chosen[0].text.startswith("Right") and pair.rejected[0].text.startswith("Wrong")
        assert pair.preference == pytest.approx(1 / (1 + math.exp(-pair.gap)))
        assert pair.prompt == PAIRS[pair.number - 1]["prompt"]  # as a warning counts them
    jsonl(run.parent / "pairs.jsonl", [{"prompt": "Other?", "chosen": "a", "rejected": "b"}])
    assert not target_facts(run).pairs[0].chosen
    assert "Answers are not shown: the target&#39;s files have changed" in page(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_layers_share_the_squared_norm_of_the_direction(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {
        "model.embed_tokens.weight": torch.full((3, 1), 2.0),
        "model.layers.0.self_attn.q_proj.weight": torch.full((2, 2), 1.0),
        "model.layers.10.mlp.up_proj.weight": torch.full((4, 1), -1.0),
        "lm_head.base_layer.weight": torch.full((1, 4), 1.0),
        "chosen/lm_head.weight": torch.full((1, 4), 100.0),
    }
    save_file(
        {name: value.to(dtype) for name, value in weights.items()}, tmp_path / "d.safetensors"
    )
    shares = layer_shares(tmp_path / "d.safetensors")
    assert [(each.layer, each.kind) for each in shares] == [
        ("embed_tokens", "embed_tokens"),
        ("block 0", "q_proj"),
        ("block 10", "up_proj"),
        ("lm_head", "lm_head"),
    ]
    assert [each.share for each in shares] == pytest.approx([0.5, 1 / 6, 1 / 6, 1 / 6])


def test_several_targets_add_up_and_their_chosen_halves_are_left_out(tmp_path: Path) -> None:
    weights = {f"target:{name}/h.0.w.weight": torch.ones(2, 2) for name in ("math", "code")}
    weights |= {
        "target:math/h.1.w.weight": torch.ones(2, 2),
        "chosen:math/h.1.w.weight": torch.ones(9, 9),
    }
    save_file(weights, tmp_path / "d.safetensors")
    shares = layer_shares(tmp_path / "d.safetensors")
    assert [each.share for each in shares] == pytest.approx([2 / 3, 1 / 3])


def test_a_choice_made_again_keeps_the_texts_and_options_of_the_scores(run: Path) -> None:
    config = json.loads((run / "manifest.json").read_text())["config"]
    again = {
        **config,
        "model": None,
        "pool": [],
        "target": [],
        "select_from": "elsewhere",
        "budget": "7%",
    }
    change(run, scored_by=config, config=again)
    assert shown_rows(run)[0].turns and target_facts(run).pairs[0].chosen
    text = page(run)
    assert "elsewhere" in text and "7%" in text and str(run.parent / "pool.jsonl") in text


# ---------------------------------------------------------------- checks

AT_CHANCE = {**TARGET["cross_validation"], "auroc": 0.55, "interval": [0.48, 0.62]}


@pytest.mark.parametrize(
    ("changed", "check", "state"),
    [
        ({}, "", "not judged yet"),
        ({"target": {**TARGET, "cross_validation": AT_CHANCE}}, "held-out pairs", "review"),
        ({"target": {**TARGET, "cross_validation": None}}, "held-out pairs", "not judged yet"),
        ({"target": {**TARGET, "effective_pairs": 3.0}}, "effective pairs", "review"),
        (
            {"target": {**TARGET, "dominant_pairs": [{"pair": 5, "share": 0.42}]}},
            "effective pairs",
            "review",
        ),
        (
            {"target": {**TARGET, "dominant_pairs": [{"pair": 1, "share": None}]}},
            "",
            "not judged yet",
        ),
        ({"target": {**TARGET, "chosen_longer_share": 0.05}}, "length of the answers", "review"),
        (
            {"choice": {"rank_correlation_with_tokens": {"none": -0.9}}},
            "score against length",
            "review",
        ),
        (
            {"counts": {"read": 12, "truncated": 0, "selected": 4, "quarantined": 1, "scored": 11}},
            "rows",
            "review",
        ),
        (
            {
                "engine": {
                    "name": "e",
                    "dtype": "",
                    "check": {"rows": 8, "disagreement": 1, "tolerance": 0.1},
                }
            },
            "self-check",
            "failed",
        ),
    ],
)
def test_each_check_sees_what_it_is_for(
    run: Path, changed: dict[str, Any], check: str, state: str
) -> None:
    change(run, **changed)
    by_name = states(run)
    assert {name for name, found in by_name.items() if found != "holds"} == (
        {"controls", "does it help", check} - {""}
    )
    assert not check or by_name[check] == state
    worst = headline(checks_of(read_run_facts(str(run))))
    assert worst[0] == state and (state == "not judged yet" or check in worst[1])


def test_controls_and_verdicts_of_an_evaluation_are_judged(run: Path) -> None:
    write_evaluation(run)
    assert set(states(run).values()) == {"holds"}
    assert headline(checks_of(read_run_facts(str(run))))[1] == "Every check holds."
    assert (
        headline(checks_of(read_run_facts(str(run))), 2)[1]
        == "Every check holds; 2 warnings below."
    )
    broken = {
        "name": "swapped pairs",
        "holds": False,
        "words": "swapped pairs: FAILED, rank correlation 0.9, wanted -0.5 or less",
    }
    write_evaluation(run, controls=[*CONTROLS, broken])
    assert states(run)["controls"] == "failed"
    assert re.search(
        r'<tr class="red"><td><span class="state failed">failed</span></td>\s*<th[^>]*>swapped',
        page(run),
    )
    assert "<td>rank correlation 0.9, wanted −0.5 or less</td>" in page(run)
    assert headline(checks_of(read_run_facts(str(run))))[1].endswith("yet. Failed: controls.")
    for low, high, state in ((-0.1, 0.2, "review"), (-0.3, -0.1, "failed"), (0.1, 0.1, "review")):
        against = {
            "random": {"words": "words", "gain": {"difference": 0.0, "low": low, "high": high}}
        }
        write_evaluation(run, against=against)
        assert states(run)["does it help"] == state


# ---------------------------------------------------------------- the page


@given(st.text(), st.text())
def test_json_inside_the_page_means_the_same_and_holds_no_markup(key: str, text: str) -> None:
    found = in_json({key: text, "hard": "</script><!--&\u2028\u2029"})
    assert not set(found) & set("<>&\u2028\u2029")
    assert json.loads(found) == {key: text, "hard": "</script><!--&\u2028\u2029"}


def test_the_policy_allows_the_scripts_of_the_page_and_nothing_else(run: Path) -> None:
    text = page(run)
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1])  # type: ignore[index]
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    hashes = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts
    ]
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}'; "
        "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )
    outside = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert (
        not re.search(r"(?:src|href)=\"(?!#)", outside)
        and "url(" not in outside
        and "@import" not in outside
    )


def test_names_and_warnings_are_escaped_in_the_page(tmp_path: Path) -> None:
    bad = "<img src=x onerror=alert(1)>'\""
    rows: list[Row] = [{**row, "source": bad} for row in ROWS[:6]] + ROWS[6:]
    run = write_run(tmp_path / "run", rows, SCORES)
    change(run, warnings=[bad])
    assert "<img src=x" not in page(run) and "&lt;img src=x" in page(run)


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        ("pairs.parquet", "its pairs are not in this folder"),
        ("direction.safetensors", "There is no direction to read"),
        ("evaluation", "Not judged yet"),
    ],
)
def test_a_part_that_is_not_there_is_named_in_a_line(run: Path, gone: str, says: str) -> None:
    (run / gone).unlink(missing_ok=True)
    if gone == "pairs.parquet":
        change(run, target={"direction": "d.safetensors"})
    assert says in page(run)


def test_every_section_has_its_template_and_no_chart_or_table_has_a_name_twice(run: Path) -> None:
    write_evaluation(run)
    parts = Path(prism_select.__file__).parent / "report" / "templates" / "sections"
    assert {section.id for section in SECTIONS} == {file.stem for file in parts.iterdir()}
    sections = [section.fill(read_run_facts(str(run))) for section in SECTIONS]
    charts = [chart.name for section in sections for chart in section.charts]
    tables = [name for section in sections for name in section.tables]
    assert charts and tables and len({*charts, *tables}) == len(charts) + len(tables)


def test_the_page_answers_in_order_and_its_headings_do_not_skip(run: Path) -> None:
    write_evaluation(run)
    text = page(run)
    sections = re.findall(r"<section id=\"(\w+)\"", text)
    assert sections == [section.id for section in SECTIONS]
    assert sections[:3] == ["chosen", "coverage", "target"] and sections[-2:] == ["helps", "made"]
    levels = [
        int(level)
        for level in re.findall(
            r"<h([1-6])", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
        )
    ]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_the_same_folder_gives_the_same_page(run: Path) -> None:
    assert page(run) == page(run)


def test_a_number_is_written_with_the_digits_that_matter() -> None:
    written = sentence("<b> --common remove or well-known --warmup, at -0.96 in run-2")
    assert "&lt;b&gt;" in written and "at −0.96 in run-2" in written and "well-known" in written
    assert written.count('<span class="option">--') == 2
    shown = [significant(value) for value in (0.123456, -12345.6, 0.0, None, math.nan, 1e-7)]
    assert shown == ["0.123", "−12,346", "0", "–", "–", "1e−07"]


def test_the_runtime_of_the_charts_is_what_its_maker_makes() -> None:
    import importlib.util

    place = Path(__file__).parent.parent / "docs" / "make_vega.py"
    spec = importlib.util.spec_from_file_location("make_vega", place)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PLACE.read_text(encoding="utf-8") == module.runtime(), (
        "run python docs/make_vega.py"
    )
    assert "</script" not in module.runtime().lower()


# ---------------------------------------------------------------- two runs


def test_two_runs_are_compared_row_by_row(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", ROWS, SCORES)
    other = [-score for score in SCORES]
    other[0] = 9.0
    b = write_run(tmp_path / "b", ROWS, other)
    found = compare(str(a), str(b))
    assert (found.shared, found.only_a, found.only_b) == (1, 3, 3)
    assert found.chance == 4 * 4 / 12 and found.rows == 12
    assert found.correlation == pytest.approx(spearmanr(SCORES, other).statistic)
    half = next(best for best in found.best if best.share == 0.5)
    assert half.rows == 6 and half.chance == 0.5
    assert half.shared == len({0, 2, 4, 6, 8, 10} & {0, 1, 5, 7, 9, 11}) / 6
    rose = found.moved[0]
    assert (
        rose.row.row == 11
        and (rose.rank_a, rose.rank_b) == (12, 2)
        and rose.moved == pytest.approx(10 / 11)
    )
    chosen = {source.name: (source.chosen_a, source.chosen_b) for source in found.sources}
    assert chosen == {"a": (4, 1), "b": (0, 3)}
    assert not found.options


def test_options_that_differ_are_named(tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / name, ROWS, SCORES) for name in "ab")
    manifest = json.loads((b / "manifest.json").read_text())
    change(
        b,
        config={**manifest["config"], "layers": "late"},
        fingerprints={**manifest["fingerprints"], "model": "n"},
    )
    found = compare(str(a), str(b))
    assert found.options == (("layers", "all", "late"), ("fingerprint of the model", "m", "n"))
    assert not found.moved and found.correlation == pytest.approx(1)


def test_runs_of_other_pools_are_not_compared(tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / name, ROWS, SCORES) for name in "ab")
    change(b, fingerprints={"pool": "q", "target": "t", "model": "m"})
    with pytest.raises(BadOption, match="their pools are not the same"):
        compare(str(a), str(b))
    done = prism("report", a, b)
    assert done.code == 2 and done.err.count("\n") == 1 and not (a / "comparison.html").exists()


# ---------------------------------------------------------------- the command


def test_the_command_writes_the_page_and_names_it(run: Path, tmp_path: Path) -> None:
    done = prism("report", run)
    assert done.code == 0 and str(run / "report.html") in done.out.replace("\n", "")
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    elsewhere = prism("report", run, "--out", tmp_path / "page.html")
    assert (
        elsewhere.code == 0
        and (tmp_path / "page.html").read_bytes() == (run / "report.html").read_bytes()
    )
    assert prism_select.write_report(str(run)) == run / "report.html"
    both = prism("report", run, run, "--json")
    assert (
        json.loads(both.out) == {"report": str(run / "comparison.html")}
        and (run / "comparison.html").exists()
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give the folder of one run"),
        (["a", "b", "c"], "here are 3"),
        (["nowhere"], "no complete run there"),
    ],
)
def test_what_is_no_run_is_refused_in_a_line(words: list[str], says: str) -> None:
    done = prism("report", *words)
    assert done.code == 2 and says in done.err and done.err.count("\n") == 1


def test_an_unfinished_or_damaged_run_is_refused_in_a_line(run: Path) -> None:
    manifest = (run / "manifest.json").read_text()
    (run / "scores.parquet").rename(run / "scores.part")
    assert "scores.parquet is missing" in prism("report", run).err
    (run / "scores.part").rename(run / "scores.parquet")
    (run / "manifest.json").write_text("{")
    done = prism("report", run)
    assert done.code == 2 and "the run is damaged" in done.err and done.err.count("\n") == 1
    (run / "manifest.json").write_text('{"command": "pairs"}')
    assert prism("report", run).code == 2
    (run / "manifest.json").write_text(manifest)
    (run / "scores.parquet").write_bytes((run / "scores.parquet").read_bytes()[:-9])
    assert "the run is damaged" in prism("report", run).err


def test_a_page_needs_no_torch(run: Path) -> None:
    code = (
        "import sys\nfrom prism_select.cli.app import main\n"
        "for words in (['report', sys.argv[1]], ['report', sys.argv[1], sys.argv[1]]):\n"
        "    try:\n        main(words)\n"
        "    except SystemExit as end:\n        assert not end.code\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys(), 'torch came with it'"
    )
    done = prism_apart("-c", code, run, module=False)
    assert done.code == 0, done.err


# ---------------------------------------------------------------- some rows of a file


def files_of(folder: Path) -> list[str]:
    rows: list[Row] = [{"prompt": f"Say {place}", "completion": "ok"} for place in range(9)]
    lines = "\n\n".join(json.dumps(row) for row in rows) + "\n  \n{broken\n"
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "c.json").write_text(json.dumps(rows))
    (folder / "d.json").write_text(lines)
    (folder / "e.csv").write_text("prompt,completion\n" + 'a,"b\nc"\n' + "d,e\n" * 8)
    pq.write_table(pa.Table.from_pylist(rows), folder / "f.parquet", row_group_size=2)
    return sorted(str(path) for path in folder.iterdir())


def test_some_rows_of_a_file_are_those_among_all_of_them(tmp_path: Path) -> None:
    for file in files_of(tmp_path):
        every = list(read_rows(file))
        assert len(every) >= 9
        for places in ([], [0], [8], [1, 4, 5], range(len(every)), [3, 99]):
            assert list(rows_at(file, places)) == [
                (place, every[place]) for place in places if place < len(every)
            ]


def test_a_run_of_score_has_a_distribution_and_no_choice(run: Path) -> None:
    change(run, command="score")
    facts = score_facts(run)
    assert not any(facts.histogram.chosen) and math.isnan(facts.choice.influence)
    assert "12 rows were scored" in page(run)


def test_a_page_is_written_whole_or_not_at_all(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(str(run))
    before = (run / "report.html").read_bytes()
    monkeypatch.setattr("prism_select.report.run_page.page_of", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(str(run))
    assert (run / "report.html").read_bytes() == before and not list(run.glob("*.part"))
