"""TODO."""

from collections.abc import Set
from contextlib import suppress
from functools import partial

from prism_select.data.bad_rows import refuse_bad_rows
from prism_select.data.encoded_rows import first_rows, targets_of
from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.fields import Names
from prism_select.data.files import readable
from prism_select.data.formats import parse_fields
from prism_select.data.pool import Pool, changed, fingerprint
from prism_select.data.targets import read_targets, seen_in_target, target_files
from prism_select.directions.preconditioning import curvature_file
from prism_select.models.loading import fingerprint_of, weights_of
from prism_select.run.config import RepairConfig, ScoreConfig, SelectConfig
from prism_select.run.errors import BadOption, BadRow
from prism_select.run.folder import Store
from prism_select.run.progress import Progress
from prism_select.scoring.shards import Inputs
from prism_select.selection.baselines import refuse_baselines
from prism_select.selection.choice import early_refusals, refuse_budget

__all__ = ["encode_sample", "read_inputs", "refuse_another_pool"]


def read_inputs(config: ScoreConfig, progress: Progress) -> Inputs:
    """Survey of the pool, pairs of the target: what is wrong with them is found before a model is
    loaded."""
    weights_of(config.model)  # raises where there are none
    mapping = parse_fields(config.fields)
    targets = (
        read_targets(config.target, mapping, config.target_by, config.max_row_bytes)
        if config.target
        else {}
    )
    if isinstance(config, RepairConfig):
        targets = {name: [pair.swapped for pair in pairs] for name, pairs in targets.items()}
    if isinstance(config, SelectConfig) and config.rank_by:
        refuse_baselines("--rank-by", [config.rank_by], bool(config.target))
    curvature_file(config)
    if config.layer_profile not in ("", "pool"):
        readable(config.layer_profile)
    pool = Pool(config.pool, mapping, config.max_row_bytes)
    with progress.task("reading the pool", None) as task:
        survey = pool.survey(
            config.seed, config.curvature_rows * (config.curvature != "flat"), task.advance
        )
    for file, name in survey.formats.items():
        progress.say(f"{file}: {name}")
    columns = set(survey.columns)
    for file, format, mapped, left in seen_in_target(
        config.target, mapping, config.target_by, config.max_row_bytes
    ):
        progress.say(
            f"{file}: {format.name}" + (f"; not used: {', '.join(left[:6])}" if left else "")
        )
        columns |= mapped
    refuse_columns(config, mapping, columns)
    refuse_bad_rows(config, survey.bad, survey.rows, survey.first_bad)
    early_refusals(config, survey.rows - survey.bad, pool)
    files = target_files(config.target) if config.target else [readable(config.direction)]
    prints = {
        "pool": fingerprint(pool.files),
        "target": fingerprint(files),
        "model": fingerprint_of(config),
    }
    return Inputs(pool, survey, targets, prints)


def refuse_another_pool(store: Store, inputs: Inputs) -> None:
    """Raises BadFile where the pool is no longer what it was at the start; its scores, of nobody
    knows what, go."""
    if fingerprint(inputs.pool.files) != inputs.fingerprints["pool"]:
        store.drop_shards()
        raise changed(inputs.pool.files)


def refuse_columns(config: ScoreConfig, mapping: Names, there: Set[str]) -> None:
    """Raises BadOption for a field of which no row has any column."""
    for name, columns in mapping.items():
        if not there & set(columns):
            where = "pool or target has" if config.target else "the pool has"
            raise BadOption(
                f"--fields {name}={columns[0]}: no row of {where} such a column; check the name"
            )


def encode_sample(config: ScoreConfig, inputs: Inputs, encoder: Encoder) -> list[Encoded]:
    """The rows of the survey's sample that can be encoded. What would stop the run hours later
    stops it here: too many rows that cannot be encoded, a conversation without a template, a budget
    larger than the pool."""
    survey, sample, bad = inputs.survey, list[Encoded](), list[BadRow]()
    for example in survey.sample:
        try:
            sample.append(encoder.encode(example))
        except BadRow as error:
            bad.append(error)
    if survey.conversation:
        with suppress(BadRow):
            encoder.encode(survey.conversation)
    refuse_bad_rows(
        config, survey.bad + len(bad), survey.rows, survey.first_bad or next(iter(bad), None)
    )
    sampled = [row.targets for row in sample] + [0] * len(bad)
    refuse_budget(
        config, sampled, survey.rows - survey.bad, partial(targets_of, inputs.pool, encoder)
    )
    return sample or first_rows(inputs.pool, encoder)
