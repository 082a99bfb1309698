"""The demo does its two jobs well, offline, and says so."""

from pathlib import Path

import pytest

from prism_select.cli.app import main
from prism_select.demo.story import run_demo
from prism_select.run.errors import BadOption
from prism_select.run.progress import Silent


def test_the_demo_finds_the_skill_and_the_wrong_answers(tmp_path: Path) -> None:
    figures = run_demo(str(tmp_path / "demo"), Silent())
    assert figures.chosen_share >= 4 * figures.pool_share
    assert figures.auroc >= 0.85


def test_the_demo_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BadOption, match="something else"):
        run_demo(str(tmp_path), Silent())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_demo_ends_with_figures_and_where_to_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # the second time, over the first
        with pytest.raises(SystemExit) as end:
            main(["demo", "--out", str(tmp_path / "demo")])
        assert not end.value.code
    told = capsys.readouterr().out.replace("\n", "")
    assert "Not judged yet" not in (tmp_path / "demo" / "select" / "report.html").read_text()
    for name in ("select", "repair"):
        page = tmp_path / "demo" / name / "report.html"
        assert page.exists() and str(page) in told
    assert "of the pool and" in told and "AUROC" in told
    assert str(tmp_path / "demo" / "select" / "selected.jsonl") in told
