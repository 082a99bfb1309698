"""The demo does its two jobs well, offline, and says so."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import prism

from prism_select.demo import story
from prism_select.run.errors import BadOption
from prism_select.run.progress import Silent


class Told(NamedTuple):
    """The demo's folder, its figures, and what it said."""

    folder: Path
    figures: dict[str, Any]
    words: str


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("story") / "demo"
    done = prism("demo", "--json", "--out", folder)
    assert done.code == 0, done.err
    return Told(folder, json.loads(done.out), done.err.replace("\n", ""))


def test_the_demo_finds_the_skill_and_it_helps(demo: Told) -> None:
    assert demo.figures["chosen_share"] >= 4 * demo.figures["pool_share"]
    accuracy = demo.figures["accuracy"]
    assert accuracy["prism"] >= accuracy["random"] + 0.1


def test_the_demo_repairs_a_fine_tuning_that_went_wrong(demo: Told) -> None:
    compared, accuracy = demo.figures["compared"], demo.figures["repaired"]
    assert sum(compared.values()) == 320 and compared["worse"] >= 30
    assert demo.figures["pairs_auroc"] >= 0.9 and demo.figures["auroc"] >= 0.9
    assert accuracy["after"] < accuracy["before"] - 0.3
    assert accuracy["random"] < accuracy["before"] - 0.3
    assert accuracy["repaired"] > accuracy["before"] - 0.1


def test_the_demo_ends_with_figures_and_where_to_look(demo: Told) -> None:
    for name, rows in (("select", "selected.jsonl"), ("repair", "removed.jsonl")):
        page = demo.folder / name / "report.html"
        assert "Not judged yet" not in page.read_text(encoding="utf-8")
        assert str(page) in demo.words and str(demo.folder / name / rows) in demo.words
    assert "Every check holds" in page.read_text(encoding="utf-8")
    assert "of the pool and" in demo.words and "AUROC" in demo.words
    shown = [f"{demo.figures['repaired'][name]:.1%} {name}" for name in ("before", "after")]
    assert ", ".join(shown) in demo.words


def test_without_training_the_demo_goes_over_an_earlier_one(
    demo: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(story, "find_spec", lambda name: None)
    figures = story.run_demo(str(demo.folder), Silent())
    assert not figures.accuracy and not figures.repaired
    assert figures.auroc == demo.figures["auroc"]
    assert figures.compared == demo.figures["compared"]


def test_the_demo_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BadOption, match="something else"):
        story.run_demo(str(tmp_path), Silent())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
