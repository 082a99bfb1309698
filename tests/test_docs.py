"""The docs are held to the code: every command and option is there, and what is generated is up to
date."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from prism_select.cli.app import app
from prism_select.run.folder import SHARD

ROOT = Path(__file__).parent.parent
DOCS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}


def test_generated_pages_are_what_the_configs_and_results_say() -> None:
    spec = importlib.util.spec_from_file_location("make_pages", ROOT / "docs" / "make_pages.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, write in module.PAGES.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == write(), (
            "run python docs/make_pages.py"
        )


def test_every_command_is_in_the_docs_and_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in app.commands:
        assert f"prism {command}" in DOCS["index.md"]
        assert f"prism {command}" in readme


def test_every_column_of_the_scores_is_in_the_docs() -> None:
    assert all(f"`{name}`" in DOCS["output.md"] for name in {*SHARD.names, "verdict"} - {"reason"})


def test_the_tree_in_the_readme_is_the_tree() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(\w+)\.py\b", readme))
    source = ROOT / "src" / "prism_select"
    there = {path.stem for path in [*source.glob("*.py"), *(source / "core").glob("*.py")]}
    assert there - named == {"__init__", "__main__"}
    assert named <= there


def test_every_test_that_the_page_on_safety_names_is_there() -> None:
    named = re.findall(r"`(test_\w+)`", DOCS["safety.md"])
    there = "\n".join(
        path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")
    )
    assert len(named) > 30 and not [name for name in named if f"def {name}(" not in there]
    rows = [
        line for line in DOCS["safety.md"].splitlines() if re.match(r"\| (?!what|attack)\w", line)
    ]
    assert all("`test_" in line for line in rows) and len(rows) > 25


@pytest.mark.parametrize(
    ("page", "file", "figure", "line"),
    [
        (
            "README",
            "cost",
            "difference, one direction",
            "a score along one direction, all weights, float32, `difference` | {:.1f} forwards",
        ),
        (
            "README",
            "cost",
            "difference, one direction, late",
            "over the upper half of the blocks | {:.1f} forwards",
        ),
        (
            "README",
            "cost",
            "reverse, one target (score and chosen half)",
            "`reverse` | {:.1f} forwards",
        ),
        ("README", "cascade", "cost of a cascade, a row", "tiny model | {:.1f} forwards"),
        (
            "README",
            "quality",
            "gsm8k 5%: prism over random, gain",
            "random rows of as many tokens: GSM8K | {:.2f}",
        ),
        ("README", "quality", "arc 5%: prism over random, gain", "accuracy is no better | {:.2f}"),
        (
            "README",
            "quality",
            "truthfulqa 5%: prism over random, gain",
            "no gain: TruthfulQA | {:.2f}",
        ),
        (
            "README",
            "quality",
            "truthfulqa 5%: auroc of the truth, prism",
            "AUROC: TruthfulQA | {:.2f}",
        ),
        (
            "README",
            "quality",
            "polite 5%: auroc of the truth, prism",
            "the same: rude answers | {:.2f}",
        ),
        ("docs/comparison", "cost_peers", "beside peers: difference all", "`difference` {:.1f}"),
        ("docs/comparison", "cost_peers", "beside peers: reverse all", "`reverse` {:.1f}"),
        ("docs/comparison", "cost_peers", "beside peers: bergson", "bergson {:.1f},"),
        ("docs/comparison", "cost_peers", "beside peers: kronfluence", "kronfluence {:.1f},"),
        ("docs/comparison", "cost_peers", "beside peers: reference all", "row by row {:.1f};"),
    ],
)
def test_pages_say_what_was_measured(page: str, file: str, figure: str, line: str) -> None:
    told = json.loads(
        (ROOT / "benchmarks" / "results" / f"{file}.json").read_text(encoding="utf-8")
    )
    value = next(each["value"] for each in told["figures"] if each["name"] == figure)
    assert line.format(value) in (ROOT / f"{page}.md").read_text(encoding="utf-8")
