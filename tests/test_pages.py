"""What the pages tell to type is typed: every block of bash and of Python, in order, on the bundled
model."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from conftest import jsonl, prism

from prism_select.cli.app import app
from prism_select.demo.story import MODEL
from prism_select.demo.world import FACTS, mixture, pairs, pool

ROOT = Path(__file__).parent.parent
THEIRS = {
    "--constraint",
    "--check",
    "--fix",
    "--no-isolation",
    "--log",  # --log_samples and --apply_chat_template of lm-eval
    "--apply",
    "--strict",
    "--small",  # of benchmarks/gpu.py
    "--enable-lora",
    "--max-lora-rank",
    "--lora-modules",
    "--nproc-per-node",
    "--nnodes",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--rdzv-id",
    "--head",
    "--port",
    "--address",
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What a page expects beside the files of `write_files`.
PRELUDES = {
    "evaluate.md": """
import prism_select
prism_select.select(model="MODEL", pool="pool.jsonl", target="pairs.jsonl", out="run", budget="20%")
""",
    "pairs.md": "Path('pairs.jsonl').unlink()",
    "went-wrong.md": """
from conftest import jsonl
from test_before_after import poisoned
poisoned(Path("."))
Path("after").rename("TUNED")
Path("asked.jsonl").rename("questions.jsonl")
scores = {"before": [1, 1, 1, 0], "after": [0, 0, 1, 0]}
for side, found in scores.items():
    rows = enumerate(found)
    rows = [{"prompt": f"Q{k}?", "response": side * (k + 1), "score": s} for k, s in rows]
    jsonl(Path(f"{side}.jsonl"), rows)
""",
}


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def write_files(folder: Path) -> None:
    """The files that the pages speak of, small."""
    (folder / "MODEL").symlink_to(MODEL)
    rows = pool(80, 0)
    jsonl(folder / "pool.jsonl", rows)
    jsonl(folder / "sft.jsonl", mixture(80, 0))
    jsonl(folder / "pairs.jsonl", pairs("capitals", 12, 0))
    jsonl(folder / "held_out.jsonl", pairs("capitals", 8, 1))
    sums = [fact for fact in FACTS["arithmetic"] if "+" in fact.subject]
    jsonl(
        folder / "solutions.jsonl",
        [
            {"question": f"What is {f.subject}?", "answer": f"{f.subject} makes {f.right}."}
            for f in sums
        ],
    )
    questions = [
        {
            "question": pair["prompt"],
            "choices": [pair["chosen"], pair["rejected"]],
            "answer": 0,
            "subject": skill,
        }
        for skill in ("capitals", "plurals")
        for pair in pairs(skill, 6, 0)
    ]
    jsonl(folder / "choices.jsonl", questions)
    odd = [f'"{row["prompt"]}","{row["completion"]}",{row["source"]}' for row in rows]
    jsonl(folder / "odd.csv", ["ask,reply,origin", *odd])
    dialogues = [
        [{"who": "user", "said": r["prompt"]}, {"who": "assistant", "said": r["completion"]}]
        for r in rows[:20]
    ]
    nested = [
        {"key": f"n{i}", "meta": {"site": "here"}, "dialogue": turns}
        for i, turns in enumerate(dialogues)
    ]
    jsonl(folder / "nested.jsonl", nested)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    yield tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore")  # those of the libraries that a reader meets, too
def test_what_a_page_says_to_type_works(page: Path, place: Path) -> None:
    names: dict[str, Any] = {"Path": Path}
    exec(PRELUDES.get(page.name, ""), names)
    del names["Path"]  # a page that needs it must say so
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, f"{page.name}: {text[:40]!r}", "exec"), names)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("prism "):
                result = prism(*shlex.split(line)[1:])
                assert result.code == 0, f"{line}\n{result.err}"
            else:
                subprocess.run(["bash", "-c", line], check=True, cwd=place)


def test_pages_with_something_to_type_are_many() -> None:
    assert sum(len(blocks(page)) for page in PAGES) > 15
    assert all(
        page.relative_to(ROOT / "docs").as_posix() in (ROOT / "mkdocs.yml").read_text()
        for page in PAGES[1:]
    )


def commands(page: Path) -> list[str]:
    """Lines of blocks without a mark that are commands of ours, what may be left out included."""
    unmarked = re.findall(
        r"^```\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    return [
        re.sub(r"[\[\]]", "", line)
        for text in unmarked
        for line in text.splitlines()
        if line.startswith("prism ")
    ]


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda page: page.name)
def test_commands_that_are_only_shown_have_options_that_exist(page: Path) -> None:
    for line in commands(page):
        name, *words = shlex.split(line, comments=True)[1:]
        command = app.commands[name]
        command.parse_args(click.Context(command), words)


def test_every_option_that_a_page_names_exists() -> None:
    options = {
        word
        for command in (app, *app.commands.values())
        for option in command.params
        for word in (*option.opts, *option.secondary_opts)
    }
    options |= {"--help", "--quick"} | THEIRS
    named = {
        (page.name, word)
        for page in PAGES
        for word in re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text())
    }
    assert not {(page, word) for page, word in named if word not in options}


def test_the_page_of_sources_names_every_paper_of_the_code_and_files_that_exist() -> None:
    page = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    papers = set(re.findall(r"(?:arXiv|abs/)\W*(\d{4}\.\d{5})", code, re.IGNORECASE))
    assert len(papers) > 8 and not {paper for paper in papers if paper not in page}
    files = set(re.findall(r"`([\w/]+\.py)`", page))
    assert files and all((ROOT / "src" / "prism_select" / file).exists() for file in files)
