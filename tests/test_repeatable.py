"""The same command gives the same scores, on any day: dates in templates are fixed and recorded,
and whatever makes other tokens makes another run."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from datetime import date, datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import CHATML, Outcome, build_network, build_tokenizer, jsonl, prism, save_model
from peft import LoraConfig, get_peft_model
from transformers.utils import chat_template_utils

import prism_select
from prism_select.commands import pipeline, scoring_steps
from prism_select.data import template_date
from prism_select.data.encoding import Encoder
from prism_select.data.records import Example, Turn
from prism_select.evaluation.evaluate import say_libraries
from prism_select.models.loading import model_fingerprint, object_fingerprint
from prism_select.run import folder as run_folder
from prism_select.run.config import ScoreConfig
from prism_select.run.objects import ModelObject
from prism_select.run.progress import Silent

HEAD = "{{ '<|im_start|>system\\nToday is ' + DAY + '<|im_end|>\\n' }}" + CHATML
ASKS = {  # how templates in use ask for today
    "Llama 3.2": HEAD.replace("DAY", 'strftime_now("%d %b %Y")'),
    "gpt-oss": HEAD.replace("DAY", 'strftime_now("%Y-%m-%d")'),
    "Granite 3": HEAD.replace("DAY", "strftime_now('%B %d, %Y')"),
    "Command R7B": HEAD.replace("DAY", 'strftime_now("%A, %B %d, %Y, %H:%M:%S")'),
    "Mistral Small": ("{%- set today = strftime_now('%Y-%m-%d') %}" + HEAD.replace("DAY", "today")),
    "Llama 3.3": (
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}"
        "{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
        + HEAD.replace("DAY", "date_string")
    ),
}
LLAMA_31 = (
    "{%- if not date_string is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    + HEAD.replace("DAY", "date_string")
)
FORMATS = {
    "Llama 3.2": "%d %b %Y",
    "gpt-oss": "%Y-%m-%d",
    "Granite 3": "%B %d, %Y",
    "Command R7B": "%A, %B %d, %Y, %H:%M:%S",
    "Mistral Small": "%Y-%m-%d",
    "Llama 3.3": "%d %b %Y",
}
ROWS = [
    {"prompt": f"Name {word}?", "completion": f"{word}, thank you"}
    for word in ("Rome", "Paris", "Italy", "water", "five", "three")
]
PAIRS = [
    {"prompt": f"{word}?", "chosen": "please, thank you", "rejected": "no way, go away"}
    for word in ("Rome", "Paris", "Italy", "water")
]
EXAMPLE = Example((Turn("user", "Rome?"), Turn("assistant", "In Italy.")), "", "", "", 0)
FIRST, LATER = "2026-03-09", "2027-10-30"


def set_clock(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    """Today is another day, for PRISM and for transformers."""
    now = datetime.fromisoformat(f"{day} 13:47:11")

    class Day(date):
        @classmethod
        def today(cls) -> Any:
            return date.fromisoformat(day)

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return now

    monkeypatch.setattr(template_date, "date", Day)
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


class Desk:
    def __init__(self, folder: Path, template: str) -> None:
        self.folder, self.out = folder, folder / "run"
        self.model = save_model(folder / "model", template)
        self.files = [
            "--pool",
            jsonl(folder / "pool.jsonl", ROWS),
            "--target",
            jsonl(folder / "pairs.jsonl", PAIRS),
        ]

    def score(self, *more: object, out: Path | None = None) -> Outcome:
        words = ["--model", self.model, *self.files, "--out", out or self.out]
        return prism("score", *words, *more)

    def scores(self, out: Path | None = None) -> list[float]:
        column: list[float] = pq.read_table((out or self.out) / "scores.parquet")[
            "score"
        ].to_pylist()
        return column

    def manifest(self) -> Any:
        return json.loads((self.out / "manifest.json").read_text())

    def reopen(self) -> None:
        """As a run is that was stopped after its first shard was begun."""
        (self.out / "manifest.json").unlink()
        shutil.rmtree(self.out / "shards", ignore_errors=True)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path, ASKS["Llama 3.2"])


@pytest.mark.parametrize("name", ASKS)
def test_a_template_that_asks_for_today_gets_the_given_day(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clock(monkeypatch, LATER)
    tokenizer = build_tokenizer(ASKS[name])
    text = tokenizer.decode(Encoder(tokenizer, "auto", 512, date=FIRST).encode(EXAMPLE).tokens)
    assert datetime.fromisoformat(FIRST).strftime(FORMATS[name]) in text
    text = tokenizer.decode(Encoder(tokenizer, "auto", 512).encode(EXAMPLE).tokens)
    assert datetime.fromisoformat(LATER).strftime(FORMATS[name]) in text
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert datetime.fromisoformat(f"{LATER} 13:47:11").strftime(FORMATS[name]) in rendered


def test_a_template_with_a_day_of_its_own_keeps_it_unless_one_is_given() -> None:
    tokenizer = build_tokenizer(LLAMA_31)
    own, given = Encoder(tokenizer, "auto", 512), Encoder(tokenizer, "auto", 512, date=FIRST)
    assert own.date.day is None and given.date.day == FIRST
    messages = [{"role": t.role, "content": t.text} for t in EXAMPLE.turns]
    exact = tokenizer.apply_chat_template(messages, return_dict=False)
    assert list(own.encode(EXAMPLE).tokens) == exact
    exact = tokenizer.apply_chat_template(messages, return_dict=False, date_string="09 Mar 2026")
    assert list(given.encode(EXAMPLE).tokens) == exact


@pytest.mark.parametrize("template", [CHATML, None])
def test_without_a_date_in_it_nothing_is_recorded_and_a_given_one_is_said(
    template: str | None, tmp_path: Path
) -> None:
    desk = Desk(tmp_path, template or CHATML)
    more = [] if template else ["--template", "plain"]
    assert desk.score(*more).code == 0
    assert "template_date" not in (desk.out / "config.toml").read_text()
    assert desk.manifest()["model"]["template_date"] is None
    outcome = desk.score(*more, "--template-date", FIRST, out=tmp_path / "other")
    assert f"--template-date {FIRST}: the template shows no date" in outcome.out
    assert desk.scores() == desk.scores(tmp_path / "other")


def test_the_day_of_the_first_start_is_recorded_and_kept(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clock(monkeypatch, FIRST)
    first = desk.score()
    assert first.code == 0 and f"the template's date is {FIRST}" in first.out
    config = (desk.out / "config.toml").read_text()
    assert f'template_date = "{FIRST}"' in config
    assert desk.manifest()["config"]["template_date"] == FIRST
    assert desk.manifest()["model"]["template_date"] == FIRST
    scores = desk.scores()
    set_clock(monkeypatch, LATER)
    assert "complete already" in desk.score().out
    desk.reopen()
    assert desk.score().code == 0 and desk.scores() == scores  # resumed on another day
    (desk.folder / "config.toml").write_text(config)
    again = prism("score", "--config", desk.folder / "config.toml", "--out", desk.folder / "again")
    assert again.code == 0 and desk.scores(desk.folder / "again") == scores
    assert desk.score("--overwrite").code == 0  # a new run, with a day of its own
    assert f'template_date = "{LATER}"' in (desk.out / "config.toml").read_text()
    assert desk.scores() != scores


def test_scores_are_those_of_the_recorded_day(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, LATER)
    assert desk.score("--template-date", FIRST).code == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(desk.model)
    network = transformers.AutoModelForCausalLM.from_pretrained(desk.model).eval()
    set_clock(monkeypatch, FIRST)
    logliks = []
    for row in ROWS:
        turns = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        text = prompt + row["completion"] + "<|im_end|>"
        ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        with torch.no_grad():
            logits = network(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        logliks.append(float(logits.gather(1, ids[1:, None])[start - 1 :].sum()))
    ours = pq.read_table(desk.out / "scores.parquet")["loglik"].to_pylist()
    assert ours == pytest.approx(logliks, rel=1e-5)


def test_another_day_is_another_run(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, FIRST)
    assert desk.score().code == 0
    outcome = desk.score("--template-date", LATER)
    assert outcome.code == 2 and f'template_date was "{FIRST}" there' in outcome.err
    # a run that was begun without a record of the day
    desk.reopen()
    config = desk.out / "config.toml"
    config.write_text(config.read_text().replace(f'template_date = "{FIRST}"\n', ""))
    outcome = desk.score()
    assert outcome.code == 2 and "template_date was not given there" in outcome.err


@pytest.mark.parametrize("day", ["tomorrow", "2026-02-30", "30.11.2026", "20261130", "2026-W48-1"])
def test_what_is_no_day_is_refused(day: str) -> None:
    words = ["--model", "x", "--pool", "x", "--target", "x", "--out", "x"]
    outcome = prism("score", *words, "--template-date", day)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert f"--template-date {day}: no day; try 2026-11-30" in outcome.err


def test_pairs_and_python_take_the_day_too(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, LATER)
    words = ["pairs", "--check", desk.folder / "pairs.jsonl", "--model", desk.model]
    outcome = prism(*words, "--template-date", FIRST)
    assert outcome.code == 0 and f"the template's date is {FIRST}" in outcome.out
    options = {"pool": ROWS, "target": PAIRS, "template_date": date.fromisoformat(FIRST)}
    run = prism_select.score(str(desk.model), **options, out=desk.folder / "python")
    assert run.manifest["config"]["template_date"] == FIRST


def test_other_processes_take_the_day_of_the_job(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_clock(monkeypatch, FIRST)
    jobs, real = list[Any](), scoring_steps.scoring_job

    def kept(*arguments: Any) -> Any:
        jobs.append(real(*arguments))
        return jobs[-1]

    monkeypatch.setattr(pipeline, "scoring_job", kept)
    assert desk.score().code == 0
    set_clock(monkeypatch, LATER)  # midnight has passed where another process starts
    config = ScoreConfig(
        model=str(desk.model), pool=(desk.files[1],), target=(desk.files[3],), out=str(desk.out)
    )
    assert scoring_steps.make_scorer(config, jobs[0]).loaded.encoder.date.day == FIRST


# Fingerprints: what makes other tokens or other logits


def touched(file: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def touch(folder: Path) -> None:
        (folder / file).write_text(change((folder / file).read_text()))

    return touch


def added(file: str) -> Callable[[Path], None]:
    def touch(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("a")

    return touch


@pytest.mark.parametrize(
    "touch",
    [
        touched("chat_template.jinja", lambda text: text.replace("user", "human") + "{# #}"),
        touched("tokenizer.json", lambda text: text.replace('"<s>"', '"<t>"')),
        touched("tokenizer_config.json", lambda text: text.replace("<|im_end|>", "</s>")),
        added("tokenizer.model"),
        added("merges.txt"),
        added("additional_chat_templates/tools.jinja"),
    ],
)
def test_files_that_make_tokens_are_in_the_fingerprint(
    touch: Callable[[Path], None], desk: Desk
) -> None:
    before = model_fingerprint(str(desk.model))
    assert model_fingerprint(str(desk.model)) == before
    touch(desk.model)
    assert model_fingerprint(str(desk.model)) != before


def test_all_of_a_long_vocabulary_is_in_the_fingerprint(desk: Desk) -> None:
    file = desk.model / "tokenizer.json"
    words = json.dumps({f"a{number:07}": number for number in range(200_000)})
    file.write_text(words)
    before = model_fingerprint(str(desk.model))
    file.write_text(words.replace("a0100000", "b0100000"))
    assert model_fingerprint(str(desk.model)) != before


def test_a_run_goes_on_only_with_its_own_template(desk: Desk) -> None:
    assert desk.score().code == 0
    desk.reopen()
    (desk.model / "chat_template.jinja").write_text(CHATML)
    outcome = desk.score()
    assert outcome.code == 2 and "model contents was" in outcome.err


def test_a_run_goes_on_only_with_its_own_libraries(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert desk.score().code == 0
    versions = desk.manifest()["versions"]
    assert versions["transformers"] == transformers.__version__
    assert f"transformers {versions['transformers']}" in (desk.out / "config.toml").read_text()
    monkeypatch.setattr(run_folder, "version", lambda name: "9.9")
    assert "complete already" in desk.score().out
    desk.reopen()
    outcome = desk.score()
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "libraries was" in outcome.err and "tokenizers 9.9" in outcome.err
    assert desk.score("--overwrite").code == 0


def test_an_evaluation_says_that_libraries_have_changed() -> None:
    lines = list[str]()

    class Listening(Silent):
        def say(self, line: str) -> None:
            lines.append(line)

    versions = {"transformers": "5.0.1", "tokenizers": version("tokenizers")}
    past: Any = SimpleNamespace(manifest={"versions": versions})
    say_libraries(past, Listening())
    assert len(lines) == 1
    assert f"transformers 5.0.1, and here is {transformers.__version__}" in lines[0]


def test_the_fingerprint_of_an_object_is_that_of_what_it_computes() -> None:
    tokenizer = build_tokenizer(CHATML)
    network = build_network(len(tokenizer))

    def adapted(alpha: int = 8, **more: Any) -> Any:
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], **more)
        return get_peft_model(deepcopy(network), config)

    def fingerprint(network: Any, template: str = CHATML) -> str:
        other = deepcopy(tokenizer)
        other.chat_template = template
        return object_fingerprint(ModelObject(network, other))

    rope = deepcopy(network)
    rope.config.rope_parameters = {**rope.config.rope_parameters, "rope_theta": 777.0}
    idle = adapted()
    idle.add_adapter("second", LoraConfig(r=4, target_modules=["k_proj"]))
    second = deepcopy(idle)
    second.set_adapter("second")
    different = [
        fingerprint(network),
        fingerprint(network, ASKS["gpt-oss"]),
        fingerprint(rope),
        fingerprint(adapted()),
        fingerprint(adapted(alpha=16)),
        fingerprint(adapted(use_rslora=True)),
        fingerprint(idle),
        fingerprint(second),
    ]
    assert len(set(different)) == len(different)
    assert fingerprint(deepcopy(network)) == different[0] and fingerprint(adapted()) == different[3]


def test_the_fingerprint_of_an_object_is_the_same_in_every_process(tmp_path: Path) -> None:
    """Sets have another order in each."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch\n"
        "from conftest import build_network, build_tokenizer\n"
        "from peft import LoraConfig, get_peft_model\n"
        "from prism_select.models.loading import object_fingerprint\n"
        "from prism_select.run.objects import ModelObject\n"
        "tokenizer = build_tokenizer()\n"
        "network = build_network(len(tokenizer))\n"
        "torch.manual_seed(0)\n"
        "names = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'up_proj', 'down_proj']\n"
        "adapted = get_peft_model(network, LoraConfig(r=2, target_modules=names))\n"
        "print(object_fingerprint(ModelObject(adapted, tokenizer)))\n"
    )

    def run(seed: str) -> str:
        words = [sys.executable, "-W", "ignore", "-c", code, str(Path(__file__).parent)]
        env = {**os.environ, "PYTHONHASHSEED": seed}
        return subprocess.run(words, capture_output=True, text=True, check=True, env=env).stdout

    assert run("1") == run("2")
