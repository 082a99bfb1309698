"""Pairs: the file that `prism pairs` writes, and what `--check` says about one.

    rows → pairs by --how
           OUT                  prompt, tools, chosen, rejected, how, id, source, file, line
           OUT.skipped.jsonl    file, line, reason, raw: every row that gave no pair
    pairs → direction → do they agree, and what do they share?

Choices made here:
- each row draws from a generator of its own, seeded by --seed, file and line, so `numbers` makes
  the same pair of a row whatever the other rows are;
- pairs are written in the order of the rows.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from prism_select.commands.manifest import pair_warnings, pairs_entry, tuning_entry
from prism_select.data.bad_rows import refuse_bad_rows
from prism_select.data.columns import UnreadColumns, column_warnings, format_line
from prism_select.data.encoding import Encoder
from prism_select.data.fields import standard_fields
from prism_select.data.formats import (
    Format,
    detect_pool,
    parse_fields,
    to_pairs,
)
from prism_select.data.pairing import (
    Accepts,
    NoPair,
    accepts_by,
    change_numbers,
    nearest,
    prompt_and_answer,
    swapped_answers,
)
from prism_select.data.pool import Pool
from prism_select.data.records import Example, Pair, Raw, Turn, is_text
from prism_select.data.targets import read_target, survey_targets
from prism_select.directions.from_pairs import directions_from_pairs
from prism_select.models.generation import favourite, prompt_of, sample
from prism_select.models.loading import LoadedModel, load_model
from prism_select.run.config_pairs import PairsConfig
from prism_select.run.errors import BadOption, BadRow, EmptyInput
from prism_select.run.folder import Store, finite, json_line
from prism_select.run.polarity import Polarity
from prism_select.run.progress import Progress

__all__ = ["MadePairs", "check_pairs", "make_pairs"]

CHUNK = 16  # rows that the model answers at a time
SAMPLES = 8  # answers of each row


@dataclass(frozen=True)
class MadePairs:
    """`skipped` counts rows by the reason why they gave no pair."""

    path: Path
    pairs: int
    rows: int
    skipped: Mapping[str, int]
    compared: Mapping[str, int] = field(default_factory=dict)  # before-after: worse, same, better
    warnings: Sequence[str] = ()

    def read(self) -> list[dict[str, Any]]:
        """The pairs, as rows with prompt, chosen and rejected."""
        with self.path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class NewPair:
    """The texts of a pair: the turns of its prompt and its two answers."""

    prompt: Sequence[Turn]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class RowResult:
    """What was made of one row: pairs, or the reason why there are none."""

    raw: Raw
    example: Example
    pairs: Sequence[NewPair] | NoPair


Row: TypeAlias = tuple[Raw, Example | list[Pair]]
Skipped: TypeAlias = tuple[Raw, str]  # a row, and why it gave no pair


def make_pairs(
    config: PairsConfig, progress: Progress, accepts: Accepts | None = None
) -> MadePairs:
    """Raises EmptyInput when no row gives a pair, and TooManyBadRows as a run does."""
    file, how = str(config.file), str(config.how)
    path = output_path(config, file, ".jsonl")
    accepts = accepts or accepts_by(config.accept)
    rows, skipped = read_rows(config, file, progress)
    count = len(rows) + len(skipped)
    if config.limit:
        random.Random(config.seed).shuffle(rows)
    written: list[tuple[Raw, Mapping[str, Any]]] = []
    asks = how == "answers" or config.favourite
    loaded = load_model(config, config.layers, progress) if asks and rows else None
    with progress.task(f"pairs by {how}", len(rows)) as task:
        for result in MAKERS[how](PairMaker(config, accepts, loaded), rows):
            task.advance(1)
            if isinstance(result.pairs, NoPair):
                skipped.append((result.raw, str(result.pairs)))
            else:
                written += [(result.raw, as_row(p, how, result.example)) for p in result.pairs]
            if config.limit and len(written) >= config.limit:
                written = written[: config.limit]
                break
    if not written:
        what = "there are no rows"
        if skipped:
            (often, _), *_ = Counter(reason for _, reason in skipped).most_common(1)
            what = f"no row gives a pair; most often: {often}"
        raise EmptyInput(file, None, what, "try another --how, or name the columns with --fields")
    write_pairs(path, written, skipped)
    reasons = dict(Counter(reason for _, reason in skipped))
    return MadePairs(path, len(written), count, reasons)


def output_path(config: PairsConfig, source: str, ending: str) -> Path:
    """The path of --out. Raises BadOption where a file exists, unless --overwrite; always for the
    file that is read."""
    path = Path(str(config.out))
    if path.suffix != ending:
        raise BadOption(f"--out {config.out}: give a name that ends in {ending}")
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise BadOption(f"--out {config.out}: that is the file to read; give another name")
    if path.is_symlink():
        raise BadOption(
            f"--out {config.out}: a symbolic link; give the name of the file that it points to"
        )
    if path.exists() and not config.overwrite:
        raise BadOption(f"--out {config.out}: there already; give another name, or --overwrite")
    return path


def read_rows(
    config: PairsConfig, file: str, progress: Progress
) -> tuple[list[Row], list[Skipped]]:
    """Good rows, and bad ones with their reasons. Reports the columns that are not read."""
    rows, bad = list[Row](), list[Skipped]()
    first: BadRow | None = None
    mapping, choices = parse_fields(config.fields), config.how == "choices"
    pool, columns = Pool([file], mapping), UnreadColumns(mapping, detect_pool)
    for raw, row in choice_rows(pool) if choices else pool.rows():
        if isinstance(row, BadRow):
            bad.append((raw, row.what))
            first = first or row
        else:
            rows.append((raw, row))
            columns.add(raw)
    for name, unread in columns.by_file.items():
        unread = [column for column in unread if (config.how, column) != ("weak", "weak")]
        if unread:
            progress.say(format_line(name, columns.formats[name], unread, "not in the pairs"))
    if not rows and first:
        raise first
    refuse_bad_rows(config, len(bad), len(rows) + len(bad), first)
    return rows, bad


def choice_rows(pool: Pool) -> Iterator[tuple[Raw, list[Pair] | BadRow]]:
    """Multiple-choice rows, a pair for each wrong choice."""
    for raw in pool.raw():
        try:
            if raw.fields is not None:
                missing = {"question", "choices", "answer"} - standard_fields(
                    raw.fields, pool.mapping
                ).keys()
                if missing:
                    what = f"missing field: {', '.join(sorted(missing))}"
                    advice = "--how choices takes question, choices and answer; of right answers "
                    advice += "alone another --how makes pairs: answers with --model, or numbers"
                    raise BadRow(raw.file, raw.line, what, advice)
            yield raw, to_pairs(raw, Format("question+choices+answer"), pool.mapping)
        except BadRow as bad:
            yield raw, bad


@dataclass(frozen=True)
class PairMaker:
    """What the functions of `MAKERS` need. `accepts(answer, right)` says whether an answer of the
    model is right; `loaded` is that model, where one is asked."""

    config: PairsConfig
    accepts: Accepts
    loaded: LoadedModel | None = None

    def generator(self, raw: Raw) -> random.Random:
        return random.Random(f"{self.config.seed}/{Path(raw.file).name}/{raw.line}")


def by_numbers(maker: PairMaker, rows: Sequence[tuple[Raw, Example]]) -> Iterator[RowResult]:
    """The same answer with its numbers changed."""
    for raw, example in rows:
        change = partial(change_numbers, draw=maker.generator(raw))
        yield RowResult(raw, example, pair_with(example, change))


def by_weak(maker: PairMaker, rows: Sequence[tuple[Raw, Example]]) -> Iterator[RowResult]:
    """The answer of a weaker model, from a column."""
    mapping = parse_fields(maker.config.fields)
    column = " or ".join(mapping.get("weak", ("weak",)))
    for raw, example in rows:
        value = standard_fields(raw.fields or {}, mapping).get("weak")
        text = value if isinstance(value, str) and value.strip() and is_text(value) else None
        rejected = partial(text_or_no_pair, text=text, reason=f"no text in {column}")
        yield RowResult(raw, example, pair_with(example, rejected))


def by_swap(maker: PairMaker, rows: Sequence[tuple[Raw, Example]]) -> Iterator[RowResult]:
    """The answer of another row."""
    answers = [answer_of(example) for _, example in rows]
    swapped = swapped_answers(answers, random.Random(maker.config.seed))
    for (raw, example), text in zip(rows, swapped, strict=True):
        reason = "every other answer is the same"
        rejected = partial(text_or_no_pair, text=text, reason=reason)
        yield RowResult(raw, example, pair_with(example, rejected))


def by_choices(maker: PairMaker, rows: Sequence[tuple[Raw, list[Pair]]]) -> Iterator[RowResult]:
    """Each wrong choice; with a model only the one it likes best."""
    for raw, choices in rows:
        example, pairs = choices[0].chosen, choices
        if maker.loaded:
            try:
                pairs = [choices[favourite(maker.loaded, [pair.rejected for pair in choices])]]
            except BadRow as bad:
                yield RowResult(raw, example, NoPair(bad.what))
                continue
        yield RowResult(raw, example, [as_new_pair(pair) for pair in pairs])


def by_answers(maker: PairMaker, rows: Sequence[tuple[Raw, Example]]) -> Iterator[RowResult]:
    """The nearest of the model's own answers that are wrong."""
    loaded = maker.loaded
    assert loaded
    config = replace(maker.config, samples=maker.config.samples or SAMPLES)
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        prompts = [prompt_tokens(maker.config, loaded.encoder, example) for _, example in chunk]
        answered = [prompt for prompt in prompts if not isinstance(prompt, NoPair)]
        sampled = iter(sample(loaded, answered, config) if answered else [])
        for (raw, example), prompt in zip(chunk, prompts, strict=True):
            if isinstance(prompt, NoPair):
                yield RowResult(raw, example, prompt)
                continue
            rejected = partial(nearest_wrong, answers=next(sampled), accepts=maker.accepts)
            yield RowResult(raw, example, pair_with(example, rejected))


MAKERS: Mapping[str, Callable[[PairMaker, Sequence[Any]], Iterator[RowResult]]] = {
    "numbers": by_numbers,
    "choices": by_choices,
    "answers": by_answers,
    "weak": by_weak,
    "swap": by_swap,
}


def prompt_tokens(
    config: PairsConfig, encoder: Encoder, example: Example
) -> Sequence[int] | NoPair:
    """The tokens before the answer, or why the model cannot be asked."""
    try:
        prompt_and_answer(example)
        return prompt_of(encoder, example, config.new_tokens)
    except NoPair as reason:
        return reason
    except BadRow as bad:
        return NoPair(bad.what)


def nearest_wrong(right: str, answers: Sequence[str], accepts: Accepts) -> str:
    if not answers:
        raise NoPair("no answer ended within --new-tokens; raise it, or give --stop")
    return nearest(right, [answer for answer in answers if not accepts(answer, right)])


def text_or_no_pair(_: str, text: str | None, reason: str) -> str:
    if text is None:
        raise NoPair(reason)
    return text


def answer_of(example: Example) -> str:
    """The last answer; empty where there is none."""
    try:
        return prompt_and_answer(example)[1]
    except NoPair:
        return ""


def pair_with(example: Example, rejected: Callable[[str], str]) -> Sequence[NewPair] | NoPair:
    """The pair of a row's own answer and `rejected(answer)`."""
    try:
        prompt, chosen = prompt_and_answer(example)
        pair = NewPair(prompt, chosen, rejected(chosen))
        if not pair.chosen.strip() or not pair.rejected.strip():
            raise NoPair("an answer is empty")
        if pair.rejected.strip() == pair.chosen.strip():
            raise NoPair("the other answer is the same")
        return [pair]
    except NoPair as reason:
        return reason


def as_new_pair(pair: Pair) -> NewPair:
    prompt, chosen = prompt_and_answer(pair.chosen)
    return NewPair(prompt, chosen, pair.rejected.turns[-1].text)


def as_row(pair: NewPair, how: str, example: Example) -> dict[str, Any]:
    """A row of the pairs file."""
    prompt: Any = [turn.message for turn in pair.prompt]
    if len(pair.prompt) == 1 and pair.prompt[0].role == "user" and not pair.prompt[0].beside:
        prompt = pair.prompt[0].text
    return {
        "prompt": prompt,
        **({"tools": list(example.tools)} if example.tools else {}),
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "how": how,
        "id": example.id,
        "source": example.source,
        "file": Path(example.file).name,
        "line": example.line,
    }


def write_pairs(
    path: Path, written: Sequence[tuple[Raw, Mapping[str, Any]]], skipped: Sequence[Skipped]
) -> None:
    """Both files, in the order of the rows."""
    store = parent_store(path)
    quarantined = [(raw, raw.quarantined(reason)) for raw, reason in skipped]
    store.write(f"{path.name}.skipped.jsonl", in_lines(quarantined))
    store.write(path.name, in_lines(written))


def in_lines(rows: Sequence[tuple[Raw, Mapping[str, Any]]]) -> bytes:
    ordered = sorted(rows, key=lambda row: (row[0].file, row[0].line))
    return b"".join(json_line(line) for _, line in ordered)


def parent_store(path: Path) -> Store:
    store = Store(str(path.parent))
    store.make()
    return store


def check_pairs(config: PairsConfig, progress: Progress) -> dict[str, Any]:
    """What a run's manifest would say of these pairs, with its warnings; needs no pool."""
    file, mapping = str(config.check), parse_fields(config.fields)
    path = output_path(config, file, ".json") if config.out else None
    pairs = read_target(file, mapping)
    targets = list(survey_targets([file], mapping))
    for target in targets:
        if target.unread:
            progress.say(format_line(target.file, target.format, target.unread))
    loaded = load_model(config, config.layers, progress, [pair.chosen for pair in pairs])
    direction_set = directions_from_pairs(config, loaded, {"": pairs}, progress)
    warnings = [
        *column_warnings({target.file: target.unread for target in targets}),
        *loaded.warnings,
        *pair_warnings(direction_set, Polarity()),
    ]
    tuned = {"tuning": tuning_entry(direction_set.tuning)} if direction_set.tuning else {}
    checked = finite({**pairs_entry(direction_set), **tuned, "warnings": warnings})
    if path:
        parent_store(path).write_json(path.name, checked)
    return dict(checked)
