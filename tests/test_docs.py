"""The docs are held to the code: every command and option is there, and what is generated is up to
date."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from prism_select.cli.app import app
from prism_select.report.sections import SECTIONS
from prism_select.run.folder import SHARD
from prism_select.selection.baselines import BASELINES

ROOT = Path(__file__).parent.parent
DOCS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def make_pages() -> Any:
    spec = importlib.util.spec_from_file_location("make_pages", ROOT / "docs" / "make_pages.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_what_the_configs_and_results_say(make_pages: Any) -> None:
    for name, page in make_pages.GENERATED.items():
        assert (ROOT / name).read_text(encoding="utf-8") == page(), "run docs/make_pages.py --quick"


def test_marked_figures_and_the_tree_are_what_results_and_packages_say(make_pages: Any) -> None:
    pages = make_pages.marked_pages()
    assert len(pages) > 25 and "README.md" in {page.name for page in pages}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert text == make_pages.remade(text, {"tree": make_pages.tree}), (
            f"{page}: run docs/make_pages.py --quick"
        )


def test_the_readme_shows_what_its_commands_print(make_pages: Any) -> None:
    """To rounding, and to another order of additions on another processor."""
    shown = re.search(r"<!-- made: output -->\n(.*?)\n<!-- end -->", README, re.DOTALL)
    assert shown
    printed = make_pages.output()
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown[1]), "run docs/make_pages.py"
    numbers, expected = ([float(x) for x in NUMBER.findall(t)] for t in (printed, shown[1]))
    assert numbers == pytest.approx(expected, rel=0.1, abs=0.02), "run docs/make_pages.py"


def test_the_table_of_memory_is_what_the_plan_says(make_pages: Any) -> None:
    """To what another version of torch or transformers may count."""
    shown = re.search(r"<!-- made: memory -->\n(.*?)\n<!-- end -->", DOCS["engines.md"], re.DOTALL)
    assert shown
    made = make_pages.memory()
    assert re.sub(r"[\d,]+ ", "# ", made) == re.sub(r"[\d,]+ ", "# ", shown[1])
    numbers, expected = (
        [float(x.replace(",", "")) for x in re.findall(r" ([\d,]+)(?= )", text)]
        for text in (made, shown[1])
    )
    assert len(expected) == 3 + 12 * 7 and numbers == pytest.approx(expected, rel=0.05, abs=1)


def test_a_figure_or_a_row_that_is_not_there_is_an_error(make_pages: Any) -> None:
    for spot in (
        "{{cost / no such figure / .1f}}",
        "{{quality / scenario=arc, method=none-such / gain / .2f}}",
    ):
        with pytest.raises(AssertionError):
            make_pages.filled(spot)


def test_every_command_is_in_the_docs_and_the_readme() -> None:
    for command in app.commands:
        assert f"prism {command}" in DOCS["index.md"]
        assert f"prism {command}" in README


def test_every_column_of_the_scores_is_in_the_docs() -> None:
    assert all(f"`{name}`" in DOCS["output.md"] for name in {*SHARD.names, "verdict"} - {"reason"})


def test_every_baseline_and_every_section_of_the_report_is_in_the_docs() -> None:
    lacking = [name for name in BASELINES if f"`{name}`" not in DOCS["evaluate.md"]]
    lacking += [each.title for each in SECTIONS if f"| {each.title} |" not in DOCS["report.md"]]
    assert not lacking, f"not in the tables of docs/evaluate.md or docs/report.md: {lacking}"


def test_files_that_the_page_for_contributors_names_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+/[\w.]*\.py)`", text)
    places = (ROOT, ROOT / "src" / "prism_select")
    assert len(named) > 25
    assert not [name for name in named if not any((at / name).exists() for at in places)]


def test_files_on_the_way_of_a_row_are_there() -> None:
    steps = re.findall(r"│ \w+ +([\w/]+\.py)|▼ \w+ +([\w/]+\.py)", README)
    files = [file for step in steps for file in step if file]
    assert len(files) == 9
    assert all((ROOT / "src" / "prism_select" / file).exists() for file in files)


def test_every_test_that_the_page_on_safety_names_is_there() -> None:
    named = re.findall(r"`(test_\w+)`", DOCS["safety.md"])
    tests = "\n".join(
        path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")
    )
    assert len(named) > 30 and not [name for name in named if f"def {name}(" not in tests]
    rows = [
        line for line in DOCS["safety.md"].splitlines() if re.match(r"\| (?!what|attack)\w", line)
    ]
    assert all("`test_" in line for line in rows) and len(rows) > 25
