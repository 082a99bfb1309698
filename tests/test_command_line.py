"""The command line: the page at the end of every run, one JSON object, colours, and the nearest
name."""

import json
from pathlib import Path

import pytest
from conftest import Outcome, Row, jsonl, prism, prism_apart
from style import options_by_command

from prism_select.cli import terminal
from prism_select.cli.terminal import Terminal
from prism_select.run.config import SelectConfig

PAIRS: list[Row] = [
    {"prompt": f"Say {place}", "chosen": f"please {place}", "rejected": "no way"}
    for place in range(6)
]
POOL: list[Row] = [
    {"prompt": f"Say {place}", "completion": f"thank you {place}", "id": f"r{place}"}
    for place in range(8)
]


class Desk:
    """Files of a run, and its commands."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        pool, target = jsonl(folder / "pool.jsonl", POOL), jsonl(folder / "pairs.jsonl", PAIRS)
        self.words = ["--model", str(model), "--pool", pool, "--target", target]

    def call(self, command: str, *more: object, out: str = "run") -> Outcome:
        return prism(command, *self.words, "--out", self.folder / out, *more)


@pytest.fixture
def desk(tmp_path: Path, plain_model: Path) -> Desk:
    return Desk(tmp_path, plain_model)


@pytest.mark.parametrize("command", ["score", "select", "repair"])
def test_a_run_ends_with_its_page_and_names_it(desk: Desk, command: str) -> None:
    more = {"select": ("--budget", "50%"), "repair": ("--remove", "50%")}.get(command, ())
    done = desk.call(command, *more)
    assert done.code == 0, done.err
    page = desk.folder / "run" / "report.html"
    assert f"report          {page}" in done.out.splitlines()
    assert "<!doctype html>" in page.read_text() and "thank you" in page.read_text()


def test_a_complete_run_keeps_its_page_and_makes_one_that_is_missing(desk: Desk) -> None:
    page = desk.folder / "run" / "report.html"
    desk.call("score")
    before = page.stat().st_mtime_ns
    assert "complete already" in desk.call("score").out and page.stat().st_mtime_ns == before
    page.unlink()
    desk.call("score")
    assert page.exists()


def test_a_choice_made_again_has_a_page_of_its_own(desk: Desk) -> None:
    desk.call("select", "--budget", "50%")
    done = prism(
        "select",
        "--select-from",
        desk.folder / "run",
        "--out",
        desk.folder / "again",
        "--budget",
        "25%",
    )
    assert (
        done.code == 0
        and "2 of 8 rows were selected" in (desk.folder / "again" / "report.html").read_text()
    )


def test_json_is_the_summary_as_one_object_and_alone_on_standard_output(desk: Desk) -> None:
    for where in ("before", "after"):
        words = ("--json",) if where == "after" else ()
        done = desk.call("select", *words, "--budget", "50%", out=where)
        if where == "before":
            done = prism(
                "--json", "select", *desk.words, "--budget", "50%", "--out", desk.folder / "other"
            )
        told = json.loads(done.out)
        assert (
            done.out.count("\n") == 1
            and told["counts"]["selected"] == 4
            and told["command"] == "select"
        )
        assert "report.html" in told["files"] and Path(told["run"]).is_dir()
        assert "engine reverse" in done.err and "prism:" not in done.err


def test_json_of_a_plan_of_pairs_and_of_a_refusal(desk: Desk) -> None:
    plan = json.loads(desk.call("score", "--dry-run", "--json").out)
    assert plan["tokens"] > 0 and plan["memory_bytes"] > 0
    told = json.loads(
        prism("pairs", "--check", desk.folder / "pairs.jsonl", *desk.words[:2], "--json").out
    )
    assert told["pairs"] == 6 and "common_part" in told
    made = prism(
        "pairs",
        desk.folder / "pool.jsonl",
        "--how",
        "swap",
        "--out",
        desk.folder / "made.jsonl",
        "--json",
    )
    assert json.loads(made.out)["rows"] == 8
    refused = desk.call("select", "--budget", "nonsense", "--json")
    assert refused.code == 2 and refused.out == "" and refused.err.count("\n") == 1


def test_json_of_a_page_is_its_path(desk: Desk) -> None:
    scored = desk.call("score")
    assert "engine reverse" in scored.out and "LlamaForCausalLM" in scored.out and not scored.err
    page = json.loads(prism("--json", "report", desk.folder / "run").out)
    assert page == {"report": str(desk.folder / "run" / "report.html")}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["select", "--budgt", "5%"], "--budget"),
        (["reprt", "run"], "report"),
        (["evaluate", "run", "--holdut", "x"], "--holdout"),
    ],
)
def test_a_name_that_nobody_knows_is_answered_with_the_nearest(words: list[str], says: str) -> None:
    done = prism(*words)
    assert (
        done.code == 2
        and "Did you mean" in done.err
        and says in done.err
        and done.err.count("\n") == 1
    )


def test_an_unknown_option_of_a_config_file_is_answered_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('near_duplicate = 0.8\nmodel = "m"\n')
    done = prism("select", "--config", tmp_path / "c.toml")
    assert done.code == 2 and "did you mean near_duplicates?" in done.err


def test_no_color_takes_colours_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    Terminal().table({"control 1": "fails"}, {"control 1"})
    assert "\x1b[31m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    Terminal().table({"control 1": "fails"}, {"control 1"})
    told = capsys.readouterr().out
    assert "fails" in told and "\x1b[31m" not in told


def test_the_version_and_the_shell_s_completion_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prism("--version").out.startswith("prism, version ")
    monkeypatch.setenv("_PRISM_COMPLETE", "bash_source")
    assert "complete -o nosort" in prism_apart().out


@pytest.mark.parametrize(
    ("begun", "offered"),
    [
        ("--engine re", "plain,reverse\nplain,reference\n"),
        ("--pool po", "file,po\n"),
        ("--see", "plain,--seed\n"),
    ],
)
def test_completion_knows_values_and_files(
    begun: str, offered: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_PRISM_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", f"prism select {begun}")
    monkeypatch.setenv("COMP_CWORD", str(1 + len(begun.split())))
    assert prism_apart().out == offered


def test_help_shows_first_what_a_run_needs_and_last_what_it_rarely_does() -> None:
    text = prism("select", "--help").out
    titles = [line for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert titles == [
        "What a run needs:",
        *("Input:", "Target:", "Direction:", "Scoring:", "Choice:", "Running:"),
        "Rarely needed:",
    ]
    needed, common, rare = (
        " ".join(text.split(title)[1].split())
        for title in ("What a run needs:", "Input:", "Rarely needed:")
    )
    names = [word for word in needed.partition("Input:")[0].split() if word.startswith("--")]
    assert names == ["--model", "--pool", "--target", "--budget", "--out"]
    assert "--engine" in common and "One of prism, uniform" in common
    assert "[default: prism]" in common and "--cascade / --no-cascade" in rare
    example = "prism select --model MODEL --pool pool.jsonl --target pairs.jsonl --out run"
    assert f"For example: {example}" in rare
    assert "..." not in prism("--help").out.partition("Commands:")[2]


def test_help_explains_arguments_too() -> None:
    text = " ".join(prism("report", "--help").out.split())
    assert "What a run needs: RUNS Folder of a complete run" in text


def test_a_flag_of_a_config_file_can_be_taken_back(desk: Desk) -> None:
    (desk.folder / "c.toml").write_text("dry_run = true\n")
    plan = desk.call("score", "--config", desk.folder / "c.toml")
    assert plan.code == 0 and plan.out.splitlines()[-1].startswith("disk")
    assert not (desk.folder / "run").exists()
    done = desk.call("score", "--config", desk.folder / "c.toml", "--no-dry-run")
    assert done.code == 0 and (desk.folder / "run" / "manifest.json").exists()


def test_an_empty_text_is_as_no_value() -> None:
    assert SelectConfig(select_from="run", out="o", per_source="").per_source is None
    assert SelectConfig(select_from="run", out="o", pool="").pool == ()


def test_options_stay_few() -> None:
    assert len(set().union(*options_by_command().values())) <= 72


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("score", "--nearest 50%"),
        ("score", "--layer-profile pool"),
        ("score", "--curvature-rows 9"),
        ("select", "--recall 0.9"),
        ("score", "--quiet"),
        ("select", "--actors 2"),
        ("select", "--ray actors=2"),
        ("pairs", "--wrong each"),
        ("evaluate", "--epochs 3"),
        ("evaluate", "--board wandb"),
    ],
)
def test_an_option_that_is_gone_is_like_one_that_never_was(command: str, words: str) -> None:
    done = prism(command, *words.split())
    assert done.code == 2 and f"No such option '{words.split()[0]}'" in done.err


def test_a_long_step_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "EVERY_SECONDS", -1)
    monkeypatch.setattr(terminal, "QUIET_SECONDS", -1)
    with Terminal().task("trainings", 2) as task:
        task.advance(1)
        task.advance(1)
    assert capsys.readouterr().out.count("2 of 2") == 1
