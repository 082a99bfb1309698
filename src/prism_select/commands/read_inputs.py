"""Inputs: what is read before a model is loaded, so that what is wrong with it is found in seconds.

    pool → survey (formats, counts, bad rows, a sample)        target → pairs, by target
    sample + encoder → EncodedSample                           everything → fingerprints

Choices made here: whatever would stop the run hours later is looked for here, as far as one pass
over the pool and a sample of it can show it.
"""

import time
from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from prism_select.data.bad_rows import refuse_bad_rows
from prism_select.data.columns import column_warnings, format_line, in_words
from prism_select.data.encoded_rows import first_rows, supervised_tokens
from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.encoding_notes import encoding_notes
from prism_select.data.fields import Names
from prism_select.data.files import files_without_rows, readable
from prism_select.data.formats import parse_fields
from prism_select.data.pool import Pool, Survey, changed, fingerprint
from prism_select.data.targets import (
    TargetFile,
    read_pairs,
    survey_targets,
    target_files,
    target_patterns,
)
from prism_select.directions.adam_moments import moments_file
from prism_select.directions.preconditioning import CURVATURE_ROWS
from prism_select.models.loading import fingerprint_of, weights_of
from prism_select.models.without_weights import config_alone
from prism_select.run.config import OF_POOL, OutputOptions, RepairConfig, ScoreConfig
from prism_select.run.errors import BadOption, BadRow
from prism_select.run.folder import Store
from prism_select.run.progress import Progress
from prism_select.scoring.shards import RunInputs
from prism_select.selection.baselines import refuse_baselines
from prism_select.selection.choice import early_refusals, refuse_budget

__all__ = ["EncodedSample", "encode_sample", "read_inputs", "refuse_changed_pool"]

SHOWN_REASONS = 4


@dataclass(frozen=True)
class EncodedSample:
    """A uniform sample of the pool in tokens. `pool_rows` of the pool are good; encoding one of
    them takes `seconds_per_row`. `warnings` are about what encoding does to them."""

    rows: Sequence[Encoded]
    pool_rows: int
    seconds_per_row: float
    warnings: Sequence[str] = ()


def read_inputs(config: ScoreConfig, progress: Progress) -> RunInputs:
    """Raises PrismError for files that cannot be read, for options that do not fit them, and for
    too many bad rows."""
    if not (config.dry_run and config_alone(str(config.model))):
        weights_of(str(config.model))  # raises where there are none
    moments = [str(moments_file(config))] if config.curvature == "adam" else []
    mapping = parse_fields(config.fields)
    targets = read_pairs(config)
    if isinstance(config, OutputOptions) and config.rank_by:
        refuse_baselines("--rank-by", [config.rank_by], targets)
    pool = Pool.of(config)
    with progress.task("reading the pool", None) as task:
        rows = CURVATURE_ROWS if config.curvature in OF_POOL else 0
        survey = pool.survey(config.seed, rows, task.advance)
    targeted = list(survey_targets(config.target, mapping, config.target_by))
    warnings = _say_columns(config, survey, targeted, progress)
    columns = [survey.columns, *(target.columns for target in targeted)]
    _refuse_columns(config, mapping, set().union(*columns))
    refuse_bad_rows(config, survey.bad, survey.rows, survey.first_bad)
    progress.say(rows_in_words(survey))
    early_refusals(config, survey.rows - survey.bad, pool)
    files = target_files(config.target) if config.target else [readable(str(config.direction))]
    fingerprints = {
        "pool": fingerprint(pool.files),
        "target": fingerprint(files),
        "model": "+".join([fingerprint_of(config), *(fingerprint([file]) for file in moments)]),
    }
    return RunInputs(pool, survey, targets, fingerprints, warnings)


def _say_columns(
    config: ScoreConfig, survey: Survey, targets: Sequence[TargetFile], progress: Progress
) -> list[str]:
    """Reports the format of each file, and what in it is not read; returns warnings about that."""
    if files := files_without_rows([*config.pool, *target_patterns(config.target)]):
        progress.say(f"files that are not read: {in_words(files)}")
    label = config.label_field if isinstance(config, RepairConfig) else None
    unread = dict[str, Sequence[str]]()
    for file, name in survey.formats.items():
        unread[file] = [column for column in survey.unread[file] if column != label]
        progress.say(format_line(file, name, unread[file], "kept in the output"))
    for target in targets:
        unread[target.file] = target.unread
        progress.say(format_line(target.file, target.format, target.unread))
    return column_warnings(unread)


def rows_in_words(survey: Survey) -> str:
    """How many rows there are, and what is wrong with the bad ones."""
    often = sorted(survey.reasons.items(), key=lambda item: -item[1])
    shown = [f"{count:,} {reason}" for reason, count in often[:SHOWN_REASONS]]
    if others := survey.bad - sum(count for _, count in often[:SHOWN_REASONS]):
        shown.append(f"{others:,} others")
    bad = f", of which {survey.bad:,} bad: {'; '.join(shown)}" if survey.bad else ""
    return f"{survey.rows:,} rows{bad}"


def _refuse_columns(config: ScoreConfig, mapping: Names, columns: Set[str]) -> None:
    """Raises BadOption for a field of which no row has any column."""
    for name, names in mapping.items():
        if not columns & set(names):
            where = "pool or target has" if config.target else "the pool has"
            raise BadOption(
                f"--fields {name}={names[0]}: no row of {where} such a column; check the name"
            )


def refuse_changed_pool(store: Store, inputs: RunInputs) -> None:
    """Raises BadFile where the pool is no longer what it was at the start, and removes the shards,
    whose rows nobody knows."""
    if fingerprint(inputs.pool.files) != inputs.fingerprints["pool"]:
        store.drop_shards()
        raise changed(inputs.pool.files)


def encode_sample(config: ScoreConfig, inputs: RunInputs, encoder: Encoder) -> EncodedSample:
    """Raises PrismError for too many rows that cannot be encoded, for a conversation without a chat
    template, and for a budget larger than the pool."""
    survey, sample, bad = inputs.survey, list[Encoded](), list[BadRow]()
    start = time.perf_counter()
    for example in survey.sample:
        try:
            sample.append(encoder.encode(example))
        except BadRow as error:
            bad.append(error)
    if survey.conversation:
        with suppress(BadRow):
            encoder.encode(survey.conversation)
    first_bad = survey.first_bad or next(iter(bad), None)
    refuse_bad_rows(config, survey.bad + len(bad), survey.rows, first_bad)
    pool_rows = survey.rows - survey.bad
    tokens = [row.targets for row in sample] + [0] * len(bad)
    refuse_budget(config, tokens, pool_rows, partial(supervised_tokens, inputs.pool, encoder))
    rows = sample or first_rows(inputs.pool, encoder)
    seconds = time.perf_counter() - start
    notes = encoding_notes(encoder, survey.sample, rows, "pool")
    return EncodedSample(rows, pool_rows, seconds / max(1, len(survey.sample)), notes)
