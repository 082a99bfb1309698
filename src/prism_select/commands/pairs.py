"""Making: the pairs file that `prism pairs` writes, and what `--check` says about one.

    OUT                  prompt, chosen, rejected, how, id, source, file, line
    OUT.skipped.jsonl    file, line, reason, raw: every row that gave no pair

Choices made here: a row draws from a generator of its own, seeded by --seed and its place, so what
`numbers` and `choices` make of it depends on no other row; the pairs stand in the order of the
rows."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeAlias

from prism_select.commands.manifest import target_of, warnings_of
from prism_select.data.bad_rows import refuse_bad_rows
from prism_select.data.encoding import Encoder
from prism_select.data.formats import Format, detect_target, parse_fields, to_pairs
from prism_select.data.pairing import (
    Accepts,
    NoPair,
    accepts_by,
    change_numbers,
    nearest,
    other_answers,
    parts_of,
)
from prism_select.data.pool import Pool
from prism_select.data.records import Example, Pair, Raw, Turn, is_text
from prism_select.data.targets import read_target
from prism_select.directions.from_pairs import aim_at
from prism_select.models.generation import favourite, prompt_of, sample
from prism_select.models.loading import load_model
from prism_select.run.config_pairs import PairsConfig
from prism_select.run.errors import BadOption, BadRow, EmptyInput
from prism_select.run.folder import Store, finite, json_line
from prism_select.run.progress import Progress

__all__ = ["Made", "check_pairs", "make_pairs"]

CHUNK = 16  # rows that the model answers at a time


Answer: TypeAlias = tuple[Sequence[Turn], str, str]  # prompt, chosen, rejected


Row: TypeAlias = tuple[Raw, Example | list[Pair]]


Result: TypeAlias = tuple[Raw, Example | Pair, list[Answer] | NoPair]


@dataclass(frozen=True)
class Made:
    """`skipped` counts rows by the reason why they gave no pair."""

    path: Path
    pairs: int
    rows: int
    skipped: Mapping[str, int]


def make_pairs(config: PairsConfig, progress: Progress, accepts: Accepts | None = None) -> Made:
    """Raises EmptyInput when no row gives a pair, TooManyBadRows as a pool does."""
    place = free(config, config.file, ".jsonl")
    accepts = accepts or accepts_by(config.accept)
    rows, skipped = read(config)
    count = len(rows) + len(skipped)
    if config.limit:
        random.Random(config.seed).shuffle(rows)
    written: list[tuple[Raw, dict[str, Any]]] = []
    with progress.task(f"pairs by {config.how}", len(rows)) as task:
        for raw, row, made in getattr(Ways(config, progress, accepts), config.how)(rows):
            task.advance(1)
            if isinstance(made, NoPair):
                skipped.append((raw, str(made)))
            else:
                written += [(raw, as_row(answer, config.how, row)) for answer in made]
            if config.limit and len(written) >= config.limit:
                written = written[: config.limit]
                break
    if not written:
        why = Counter(reason for _, reason in skipped).most_common(1)
        what = f"no row gives a pair; most often: {why[0][0]}" if why else "there are no rows"
        raise EmptyInput(
            config.file, None, what, "try another --how, or name the columns with --fields"
        )
    in_order = attrgetter("file", "line")
    written.sort(key=lambda item: in_order(item[0]))
    save(place, written, sorted(skipped, key=lambda item: in_order(item[0])))
    return Made(place, len(written), count, Counter(reason for _, reason in skipped))


def free(config: PairsConfig, source: str, ending: str) -> Path:
    """Where to write. Raises BadOption for a file that is there, and always for the one that is
    read."""
    place = Path(config.out)
    if place.suffix != ending:
        raise BadOption(f"--out {config.out}: give a name that ends in {ending}")
    if place.exists() and Path(source).exists() and place.samefile(source):
        raise BadOption(f"--out {config.out}: that is the file to read; give another name")
    if place.is_symlink():
        raise BadOption(
            f"--out {config.out}: a symbolic link; give the name of the file that it points to"
        )
    if place.exists() and not config.overwrite:
        raise BadOption(f"--out {config.out}: there already; give another name, or --overwrite")
    return place


def read(config: PairsConfig) -> tuple[list[Row], list[tuple[Raw, str]]]:
    """Good rows, and bad ones with their reasons."""
    mapping = parse_fields(config.fields)
    rows: list[Row] = []
    bad: list[tuple[Raw, str]] = []
    first: BadRow | None = None
    pool = Pool([config.file], mapping, config.max_row_bytes)
    for raw, row in compared(pool) if config.how == "choices" else pool.rows():
        if isinstance(row, BadRow):
            bad.append((raw, row.what))
            first = first or row
        else:
            rows.append((raw, row))
    if not rows and first:
        raise first
    refuse_bad_rows(config, len(bad), len(rows) + len(bad), first)
    return rows, bad


def compared(pool: Pool) -> Iterator[tuple[Raw, list[Pair] | BadRow]]:
    """Multiple-choice rows as a pair for each wrong choice."""
    for raw in pool.raw():
        try:
            fields, advice = raw.fields, "--how choices takes question, choices and answer"
            if (
                fields is not None
                and "choices" not in detect_target(fields, pool.mapping, raw.file, raw.line).name
            ):
                raise BadRow(raw.file, raw.line, "no choices", advice)
            yield raw, to_pairs(raw, Format("question+choices+answer"), pool.mapping)
        except BadRow as bad:
            yield raw, bad


class Ways:
    """A method for each --how: rows in, for each the pairs that were made of it, or why there are
    none."""

    def __init__(self, config: PairsConfig, progress: Progress, accepts: Accepts) -> None:
        self.config, self.progress, self.accepts = config, progress, accepts

    def draw(self, raw: Raw) -> random.Random:
        return random.Random(f"{self.config.seed}/{Path(raw.file).name}/{raw.line}")

    def numbers(self, rows: Sequence[tuple[Raw, Example]]) -> Iterator[Result]:
        for raw, example in rows:
            yield raw, example, attempt(example, partial(change_numbers, draw=self.draw(raw)))

    def weak(self, rows: Sequence[tuple[Raw, Example]]) -> Iterator[Result]:
        column = self.config.weak_field
        for raw, example in rows:
            value = (raw.fields or {}).get(column)
            text = value if isinstance(value, str) and value.strip() and is_text(value) else None
            yield (
                raw,
                example,
                attempt(example, partial(given, text=text, otherwise=f"no text in {column}")),
            )

    def swap(self, rows: Sequence[tuple[Raw, Example]]) -> Iterator[Result]:
        found = other_answers(
            [answer_of(example) for _, example in rows], random.Random(self.config.seed)
        )
        for (raw, example), other in zip(rows, found, strict=True):
            yield (
                raw,
                example,
                attempt(
                    example, partial(given, text=other, otherwise="every other answer is the same")
                ),
            )

    def choices(self, rows: Sequence[tuple[Raw, list[Pair]]]) -> Iterator[Result]:
        model, encoder = (
            load_model(self.config, self.progress) if self.config.favourite else (None, None)
        )
        for raw, pairs in rows:
            kept = pairs
            if self.config.wrong == "one":
                kept = [self.draw(raw).choice(pairs)]
            elif model and encoder:
                try:
                    kept = [pairs[favourite(model, encoder, [pair.rejected for pair in pairs])]]
                except BadRow as bad:
                    yield raw, pairs[0], NoPair(bad.what)
                    continue
            made: list[Answer] = [
                (*parts_of(pair.chosen), pair.rejected.turns[-1].text) for pair in kept
            ]
            yield raw, pairs[0], made

    def answers(self, rows: Sequence[tuple[Raw, Example]]) -> Iterator[Result]:
        model, encoder = load_model(self.config, self.progress)
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            asked = [self.prompt(encoder, example) for _, example in chunk]
            prompts = [prompt for prompt in asked if not isinstance(prompt, NoPair)]
            found = iter(sample(model, encoder, prompts, self.config) if prompts else [])
            for (raw, example), prompt in zip(chunk, asked, strict=True):
                if isinstance(prompt, NoPair):
                    yield raw, example, prompt
                else:
                    yield raw, example, attempt(example, partial(self.refused, found=next(found)))

    def prompt(self, encoder: Encoder, example: Example) -> Sequence[int] | NoPair:
        """The tokens before the answer, or why the model cannot be asked."""
        try:
            parts_of(example)
            return prompt_of(encoder, example, self.config.new_tokens)
        except NoPair as reason:
            return reason
        except BadRow as bad:
            return NoPair(bad.what)

    def refused(self, right: str, found: Sequence[str]) -> str:
        if not found:
            raise NoPair("no answer ended within --new-tokens; raise it, or give --stop")
        return nearest(right, [answer for answer in found if not self.accepts(answer, right)])


def given(_: str, text: str | None, otherwise: str) -> str:
    if text is None:
        raise NoPair(otherwise)
    return text


def answer_of(example: Example) -> str:
    """The last answer; nothing where there is none."""
    try:
        return parts_of(example)[1]
    except NoPair:
        return ""


def attempt(example: Example, rejected: Callable[[str], str]) -> list[Answer] | NoPair:
    try:
        prompt, chosen = parts_of(example)
        other = rejected(chosen)
        if not chosen.strip() or not other.strip():
            raise NoPair("an answer is empty")
        if other.strip() == chosen.strip():
            raise NoPair("the other answer is the same")
        return [(prompt, chosen, other)]
    except NoPair as reason:
        return reason


def as_row(answer: Answer, how: str, row: Example | Pair) -> dict[str, Any]:
    prompt, chosen, rejected = answer
    example = row.chosen if isinstance(row, Pair) else row
    alone = len(prompt) == 1 and prompt[0].role == "user"
    asked: Any = (
        prompt[0].text if alone else [{"role": turn.role, "content": turn.text} for turn in prompt]
    )
    origin = {
        "id": example.id,
        "source": example.source,
        "file": Path(example.file).name,
        "line": example.line,
    }
    return {"prompt": asked, "chosen": chosen, "rejected": rejected, "how": how, **origin}


def save(
    place: Path,
    written: Sequence[tuple[Raw, Mapping[str, Any]]],
    skipped: Sequence[tuple[Raw, str]],
) -> None:
    store = folder_of(place)
    store.write(
        f"{place.name}.skipped.jsonl",
        b"".join(json_line(raw.set_aside(reason)) for raw, reason in skipped),
    )
    store.write(place.name, b"".join(json_line(row) for _, row in written))


def folder_of(place: Path) -> Store:
    store = Store(str(place.parent))
    store.make()
    return store


def check_pairs(config: PairsConfig, progress: Progress) -> dict[str, Any]:
    """What a run's manifest says about its target, and its warnings, without a pool."""
    place = free(config, config.check, ".json") if config.out else None
    pairs = read_target(config.check, parse_fields(config.fields))
    model, encoder = load_model(config, progress)
    aim = aim_at(config, model, encoder, {"": pairs}, progress)
    told = finite({**target_of(aim), "warnings": warnings_of(aim, swapped=False)})
    if place:
        folder_of(place).write_json(place.name, told)
    return dict(told)
