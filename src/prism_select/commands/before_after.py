"""Before and after: which questions a fine-tuning made worse, and both answers to each.

    --before, --after    models                                      logs of answers
    a question           choices: each model's favourite             the same prompt in both
                         chosen and rejected: the same
                         a prompt: what each model writes
    its score            1 for the right favourite; 1 where          the log's own
                         --accept takes what was written, or the
                         judge's
    a pair               chosen: the answer before, rejected: the one after, where the score fell

Choices made here:
- one model is in memory at a time, and its answers are kept beside OUT until both are done: the
  same command goes on where it stopped;
- answers are greedy, or --samples drawn ones with the mean of their scores;
- of several answers the pair takes the best one before and the worst one after.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from prism_select.commands.pairs import (
    CHUNK,
    MadePairs,
    NewPair,
    Skipped,
    as_row,
    output_path,
    parent_store,
    write_pairs,
)
from prism_select.data.answer_logs import LoggedAnswer, is_answer_log, matched, read_answer_log
from prism_select.data.bad_rows import refuse_bad_rows
from prism_select.data.fields import standard_fields
from prism_select.data.formats import (
    detect_pool,
    detect_target,
    parse_fields,
    to_example,
    to_pairs,
)
from prism_select.data.judge import Judge
from prism_select.data.pairing import Accepts, NoPair, accepts_by, prompt_and_answer
from prism_select.data.pool import Pool, fingerprint
from prism_select.data.records import Example, Raw, Turn
from prism_select.models.generation import favourite, prompt_of, sample
from prism_select.models.loading import LoadedModel, fingerprint_of, load_model, weights_of
from prism_select.run.config_pairs import PairsConfig
from prism_select.run.errors import BadModel, BadOption, BadRow, EmptyInput
from prism_select.run.folder import json_line
from prism_select.run.progress import Progress
from prism_select.run.thresholds import WORSE_QUESTIONS

__all__ = ["pairs_before_after"]

SIDES = ("before", "after")
ASKED_WITH = (
    *("dtype", "quantize", "template", "template_date", "max_length", "skip_end"),
    *("fields", "seed", "samples", "new_tokens", "stop"),
)
LOGS = (".jsonl", ".json", ".eval")
TEMPLATE_MARK = re.compile(
    r"<\|(?:im_start|start_header_id|user|assistant|start_of_role|START_OF_TURN_TOKEN)\|>"
    r"|<start_of_turn>|\[INST\]|<｜User｜>"
)
UNWRITTEN = "…"  # stands for the answer of a row that has none


@dataclass(frozen=True)
class Question:
    """`choices` are answers to choose among, the right one first; without any, the model writes.
    `right` is the row's own answer, if it has one."""

    raw: Raw
    example: Example
    choices: Sequence[Example] = ()
    right: str | None = None


@dataclass(frozen=True)
class Answered:
    """What a model answers, each answer with its score, or why it cannot."""

    answers: Sequence[str]
    scores: Sequence[float] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Compared:
    """A question with both models' answers and scores."""

    raw: Raw
    example: Example
    before: Answered
    after: Answered


Comparisons: TypeAlias = tuple[list[Compared], list[Skipped], Mapping[str, int]]


def pairs_before_after(
    config: PairsConfig, progress: Progress, accepts: Accepts | None = None
) -> MadePairs:
    """Raises EmptyInput where no question got worse."""
    source = str(config.file or config.before)
    path = output_path(config, source, ".jsonl")
    by_logs = [is_log(config, side) for side in SIDES]
    if by_logs[0] != by_logs[1]:
        raise BadOption("--before and --after: give two models, or two logs of answers")
    if by_logs[0] and config.file:
        raise BadOption(f"{config.file}: logs hold the questions themselves; leave the file out")
    if not by_logs[0] and not config.file:
        raise BadOption("FILE is missing: the questions that both models answer")
    compare = compare_logs if by_logs[0] else compare_models
    compared, skipped, alone = compare(config, path, progress, accepts)
    rows = len(compared) + len(skipped)
    counts, written = Counter[str](alone), list[tuple[Raw, Mapping[str, Any]]]()
    for each in compared:
        change, row = outcome(each)
        counts[change] += 1
        if isinstance(row, NoPair):
            skipped.append((each.raw, str(row)))
        else:
            written.append((each.raw, row))
    if not written:
        advice = "nothing to repair shows in these questions; try others"
        raise EmptyInput(source, None, f"no question got worse: {in_words(counts)}", advice)
    if config.limit:
        written.sort(key=lambda row: row[1]["score_after"] - row[1]["score_before"])
        written = written[: config.limit]
    write_pairs(path, written, skipped)
    for side in SIDES:
        answers_file(path, side).unlink(missing_ok=True)
    reasons = dict(Counter(reason for _, reason in skipped))
    warnings = [*few_warnings(counts["worse"]), *template_warnings([row for _, row in written])]
    return MadePairs(path, len(written), rows, reasons, dict(counts), warnings)


def is_log(config: PairsConfig, side: str) -> bool:
    """Raises BadOption for a log that is not there."""
    name = str(getattr(config, side))
    if is_answer_log(name):
        return True
    if Path(name).suffix in LOGS and not Path(name).exists():
        raise BadOption(f"--{side} {name}: no such file; check the path")
    return False


def in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def few_warnings(worse: int) -> list[str]:
    if worse >= WORSE_QUESTIONS:
        return []
    return [
        f"only {worse} questions got worse: a direction of so few pairs is mostly theirs; ask more "
        "questions of the kind that went wrong"
    ]


def template_warnings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    prompts = [row["prompt"] for row in rows if isinstance(row["prompt"], str)]
    marks = [match[0] for match in map(TEMPLATE_MARK.search, prompts) if match]
    if not marks:
        return []
    return [
        f"{len(marks)} prompts hold marks of a chat template ({marks[0]}), which a run would put "
        "around them again; log both without --apply_chat_template, or through a server, which "
        "keeps messages, or give the two models and a file of questions"
    ]


def outcome(each: Compared) -> tuple[str, Mapping[str, Any] | NoPair]:
    """Worse, same or better, or why it cannot be said; and the row of a pair."""
    for side in (each.before, each.after):
        if side.scores is None or not side.answers:
            return "unanswered", NoPair(side.reason or "no answer has a score")
    before, after = (fmean(side.scores or ()) for side in (each.before, each.after))
    if after >= before:
        change = "same" if after == before else "better"
        return change, NoPair(f"it is {'as good' if change == 'same' else 'better'} after")
    good = max(zip(each.before.scores or (), each.before.answers, strict=True), key=first)[1]
    bad = min(zip(each.after.scores or (), each.after.answers, strict=True), key=first)[1]
    if not good.strip() or not bad.strip():
        return "worse", NoPair("an answer is empty")
    if good.strip() == bad.strip():
        return "worse", NoPair("both answers are the same, with other scores")
    prompt, _ = prompt_and_answer(each.example)
    row = as_row(NewPair(prompt, good, bad), "before-after", each.example)
    return "worse", {**row, "score_before": before, "score_after": after}


def first(scored: tuple[float, str]) -> float:
    return scored[0]


# --- logs ------------------------------------------------------------------------------------


def compare_logs(
    config: PairsConfig, path: Path, progress: Progress, accepts: Accepts | None
) -> Comparisons:
    metric = metric_of(config)
    logs = [read_answer_log(str(getattr(config, side)), metric) for side in SIDES]
    for side, log in zip(SIDES, logs, strict=True):
        progress.say(f"{side}: {log.words}")
    found = matched(*logs)
    questions = [question_of(after) for _, after in found.pairs]
    sides = [
        [Answered([a.answer], None if a.score is None else [a.score]) for a in answers]
        for answers in zip(*found.pairs, strict=True)
    ]
    if any(answered.scores is None for side in sides for answered in side) or judged(config):
        sides = [scored(config, path, questions, side, accepts, progress) for side in sides]
    alone = {
        "in the log before alone": found.before_only,
        "in the log after alone": found.after_only,
    }
    compared = [
        Compared(question.raw, question.example, before, after)
        for question, before, after in zip(questions, *sides, strict=True)
    ]
    return compared, [], {name: count for name, count in alone.items() if count}


def metric_of(config: PairsConfig) -> str | None:
    """The score that --fields names, as NAME or NAME,FILTER. Raises BadOption for other fields."""
    name = config.fields.strip().removeprefix("score=") if config.fields else None
    if name == "" or name == (config.fields or "").strip():
        raise BadOption(
            f"--fields {config.fields}: logs have columns of their own; only the score may be "
            "named, as in score=exact_match"
        )
    return name


def question_of(answer: LoggedAnswer) -> Question:
    name = f"{Path(answer.file).name}:{answer.line}"
    turns = (*answer.prompt, Turn("assistant", answer.answer or UNWRITTEN))
    example = Example(turns, name, "", answer.file, answer.line, len(answer.prompt))
    return Question(Raw(answer.file, answer.line, answer.answer, {}), example)


# --- models ----------------------------------------------------------------------------------


def compare_models(
    config: PairsConfig, path: Path, progress: Progress, accepts: Accepts | None
) -> Comparisons:
    questions, skipped = read_questions(config)
    writes = [not question.choices for question in questions]
    if any(writes) and not judged(config):
        accepts_by(config.accept)  # raises for a rule that is none
        if compares(config, accepts) and not any(q.right for q in questions if not q.choices):
            raise BadOption(
                f"--accept {config.accept}: compares with the rows' own answers, and they have "
                "none; give --accept regex:PATTERN or --judge-url"
            )
    marks = {side: mark_of(model_of(config, side), side) for side in SIDES}  # raises early
    sides = [answered_by(config, side, marks[side], path, questions, progress) for side in SIDES]
    if any(writes):
        sides = [scored(config, path, questions, side, accepts, progress) for side in sides]
    compared = [
        Compared(question.raw, question.example, before, after)
        for question, before, after in zip(questions, *sides, strict=True)
    ]
    return compared, skipped, {}


def read_questions(config: PairsConfig) -> tuple[list[Question], list[Skipped]]:
    """Raises what a pool raises for bad rows."""
    questions, bad, first_bad = list[Question](), list[Skipped](), None
    mapping = parse_fields(config.fields)
    for raw in Pool([str(config.file)], mapping).raw():
        try:
            questions.append(as_question(raw, mapping))
        except BadRow as row:
            bad.append((raw, row.what))
            first_bad = first_bad or row
    if not questions and first_bad:
        raise first_bad
    refuse_bad_rows(config, len(bad), len(questions) + len(bad), first_bad)
    if not questions:
        raise EmptyInput(str(config.file), None, "there are no rows", "give questions")
    return questions, bad


def as_question(raw: Raw, mapping: Mapping[str, Sequence[str]]) -> Question:
    """Raises BadRow."""
    if raw.fields is None:
        raise BadRow(raw.file, raw.line, raw.problem or "no JSON", "mend the row")
    fields = standard_fields(raw.fields, mapping)
    if "choices" in fields or {"chosen", "rejected"} <= fields.keys():
        pairs = to_pairs(raw, detect_target(raw.fields, mapping, raw.file, raw.line), mapping)
        choices = [pairs[0].chosen, *(pair.rejected for pair in pairs)]
        return Question(raw, pairs[0].chosen, choices)
    has_answer = any(name in fields for name in ("completion", "response", "answer", "output"))
    if "prompt" in fields and not has_answer:
        raw = replace(raw, fields={**raw.fields, "completion": UNWRITTEN})
    format = detect_pool(raw.fields or {}, mapping, raw.file, raw.line)
    example = to_example(raw, format, mapping)
    try:
        _, right = prompt_and_answer(example)
    except NoPair as reason:
        advice = "give a prompt, a question with choices, or chosen and rejected"
        raise BadRow(raw.file, raw.line, str(reason), advice) from None
    return Question(raw, example, right=None if right == UNWRITTEN else right)


def answered_by(
    config: PairsConfig,
    side: str,
    mark: str,
    path: Path,
    questions: Sequence[Question],
    progress: Progress,
) -> list[Answered]:
    """The answers of one model, from the file beside OUT as far as they are there."""
    own, file = model_of(config, side), answers_file(path, side)
    found = answers_in(file, mark)[: len(questions)]
    if len(found) < len(questions):
        with naming(side):
            loaded = load_model(own, own.layers, progress)
    with progress.task(f"answers {side}", len(questions)) as task:
        task.advance(len(found))
        if len(found) < len(questions):
            store = parent_store(path)
            if not found:
                store.write(file.name, json_line({"of": mark}))
            with file.open("ab") as stream:
                for answered in answers_of(loaded, own, questions[len(found) :]):
                    stream.write(json_line(asdict(answered)))
                    stream.flush()
                    found.append(answered)
                    task.advance(1)
    return found


def model_of(config: PairsConfig, side: str) -> PairsConfig:
    """The options with the model of one side: a model, or an adapter on --model."""
    name = str(getattr(config, side))
    values: dict[str, Any] = {"before": None, "after": None, "how": "answers"}
    if config.model and (Path(name) / "adapter_config.json").exists():
        return replace(config, **values, adapter=name)
    return replace(config, **values, model=name, adapter=None)


@contextmanager
def naming(side: str) -> Iterator[None]:
    """What is wrong with a model is said of the option that named it."""
    try:
        yield
    except BadModel as error:
        raise BadModel(str(error).replace("--model", f"--{side}", 1)) from None


def answers_file(path: Path, side: str) -> Path:
    return path.with_name(f"{path.name}.{side}.jsonl")


def mark_of(config: PairsConfig, side: str) -> str:
    """Of everything that answers depend on. Raises BadModel where there is no such model."""
    values = [repr(getattr(config, name)) for name in ASKED_WITH]
    with naming(side):
        weights_of(str(config.model))  # raises where there are none
        files = [fingerprint_of(config), fingerprint(Pool([str(config.file)], {}).files)]
    return hashlib.blake2b(json.dumps([*values, *files]).encode(), digest_size=16).hexdigest()


def answers_in(file: Path, mark: str) -> list[Answered]:
    """Those of an earlier start; without the last line where that was not written to its end."""
    if not file.exists():
        return []
    head, *lines = file.read_bytes().split(b"\n")[:-1] or [b""]
    if head + b"\n" != json_line({"of": mark}):
        return []
    file.write_bytes(b"".join(line + b"\n" for line in (head, *lines)))
    return [Answered(**json.loads(line)) for line in lines]


def answers_of(
    loaded: LoadedModel, config: PairsConfig, questions: Sequence[Question]
) -> Iterator[Answered]:
    for start in range(0, len(questions), CHUNK):
        chunk = questions[start : start + CHUNK]
        written = iter(write(loaded, config, [q for q in chunk if not q.choices]))
        yield from (chosen_by(loaded, q) if q.choices else next(written) for q in chunk)


def chosen_by(loaded: LoadedModel, question: Question) -> Answered:
    try:
        index = favourite(loaded, question.choices)
    except BadRow as bad:
        return Answered((), reason=bad.what)
    return Answered((question.choices[index].turns[-1].text,), (float(index == 0),))


def write(
    loaded: LoadedModel, config: PairsConfig, questions: Sequence[Question]
) -> list[Answered]:
    """What the model writes, greedily without --samples."""
    prompts = list[Sequence[int] | Answered]()
    for question in questions:
        try:
            prompts.append(prompt_of(loaded.encoder, question.example, config.new_tokens))
        except (NoPair, BadRow) as reason:
            what = reason.what if isinstance(reason, BadRow) else str(reason)
            prompts.append(Answered((), reason=what))
    asked = [prompt for prompt in prompts if not isinstance(prompt, Answered)]
    texts = iter(sample(loaded, asked, config) if asked else ())
    return [prompt if isinstance(prompt, Answered) else ended(next(texts)) for prompt in prompts]


def ended(answers: Sequence[str]) -> Answered:
    reason = "" if answers else "no answer ended within --new-tokens; raise it, or give --stop"
    return Answered(answers, reason=reason)


# --- scores ----------------------------------------------------------------------------------


def judged(config: PairsConfig) -> bool:
    return bool(config.judge_url)


def compares(config: PairsConfig, accepts: Accepts | None) -> bool:
    """Whether answers are compared with the row's own."""
    return accepts is None and config.accept in ("number", "choice")


def scored(
    config: PairsConfig,
    path: Path,
    questions: Sequence[Question],
    answered: Sequence[Answered],
    accepts: Accepts | None,
    progress: Progress,
) -> list[Answered]:
    """Answers with the scores of --accept or of the judge, where they have none or the judge is
    asked."""
    if judged(config):
        return by_judge(config, path, questions, answered, progress)
    check = accepts or accepts_by(config.accept)
    found = []
    for question, each in zip(questions, answered, strict=True):
        if each.scores is None and each.answers:
            if compares(config, accepts) and question.right is None:
                reason = f"no answer of its own for --accept {config.accept}"
                each = replace(each, reason=reason)
            else:
                each = checked(each, check, question.right or "")
        found.append(each)
    return found


def checked(each: Answered, check: Accepts, right: str) -> Answered:
    try:
        return replace(each, scores=[float(check(answer, right)) for answer in each.answers])
    except NoPair as reason:
        return replace(each, reason=str(reason))


def by_judge(
    config: PairsConfig,
    path: Path,
    questions: Sequence[Question],
    answered: Sequence[Answered],
    progress: Progress,
) -> list[Answered]:
    cache = path.with_name(f"{path.name}.judge.jsonl")
    judge = Judge(str(config.judge_url), str(config.judge_model), cache, progress)
    asked = [
        ("\n".join(turn.text for turn in question.example.turns[:-1]), answer, question.right)
        for question, each in zip(questions, answered, strict=True)
        if not question.choices
        for answer in each.answers
    ]
    scores = iter(judge.scores(asked))
    found = []
    for question, each in zip(questions, answered, strict=True):
        own = [next(scores) for _ in each.answers] if not question.choices else []
        if any(score is None for score in own):
            each = replace(each, scores=None, reason="the judge gave no score")
        elif own:
            each = replace(each, scores=[float(score or 0) for score in own])
        found.append(each)
    return found
