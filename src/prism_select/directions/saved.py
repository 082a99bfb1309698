"""Saved directions: to a file and back; and what the pairs say, to pairs.parquet.

    direction.safetensors    [LABEL/]PARAMETER → tensor
        no label             the direction of the only target
        PARAMETER:left       of low rank: the matrix is left @ right
        target:NAME          that of one of several targets
        chosen               the half C, where the run has it; chosen:NAME where the best target
                             counts
    metadata `towards`       the answers of the target file that the direction points to, and
                             whether it was taken after a warm-up

Choices made here:
- what is saved is what rows are scored along: curvature and removed common part are in it, a low
  rank is where the direction has it from the start, and further dampings are not;
- metadata has one entry alone, since the order of several is not the same in every file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
from torch import Tensor

from prism_select.core.gradients import norm
from prism_select.core.layers import Factored, Factors
from prism_select.data.remote import local
from prism_select.directions.direction_set import DirectionSet, PairDiagnosis
from prism_select.directions.layout import DirectionLayout
from prism_select.directions.low_rank import beside
from prism_select.models.causal_lm import CausalLM
from prism_select.run.config import ScoreConfig
from prism_select.run.errors import BadFile, BadModel, BadOption
from prism_select.run.folder import Store
from prism_select.run.polarity import Polarity
from prism_select.run.tensor_files import read_tensors

__all__ = ["held_out", "load_direction", "save_direction"]

WARMED = ", after a warm-up"


def labels_of(layout: DirectionLayout) -> list[str]:
    """A label for each direction that is saved, in the order of the layout."""
    scores = [f"target:{name}" if name else "" for name in layout.targets]
    if not layout.halves:
        return scores
    return scores + ([f"chosen:{name}" for name in layout.targets] if layout.best else ["chosen"])


def save_direction(store: Store, config: ScoreConfig, direction_set: DirectionSet) -> None:
    labels = labels_of(direction_set.layout)
    tensors = {
        f"{label}/{name}".lstrip("/"): value
        for label, direction in zip(labels, direction_set.directions, strict=False)
        for name, value in tensors_of(direction)
    }
    metadata = {"towards": Polarity.of_config(config).toward + WARMED * bool(config.warmup)}
    store.write_tensors("direction.safetensors", tensors, metadata)
    if direction_set.diagnoses:
        tables = [table_of(name, pairs) for name, pairs in direction_set.diagnoses.items()]
        table = pa.concat_tables(tables)
        for name, values in held_out(config, direction_set).items():
            table = table.append_column(name, pa.array(values, pa.float64()))
        if groups := direction_set.groups:
            names = [groups.names[group] for group in groups.clusters.of_pairs]
            table = table.append_column("group", pa.array(names))
        store.write_table("pairs.parquet", table)


def tensors_of(direction: Factored) -> Iterator[tuple[str, Tensor]]:
    for name, value in direction.items():
        if isinstance(value, Factors):
            yield from zip((f"{name}:left", f"{name}:right"), value, strict=True)
        else:
            yield name, value


def with_factors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor | Factors]:
    """A direction of what `tensors_of` gives."""
    found: dict[str, Tensor | Factors] = {}
    for key, value in tensors.items():
        name, _, side = key.rpartition(":")
        if side == "left" and f"{name}:right" in tensors:
            found[name] = Factors(value, tensors[f"{name}:right"])
        elif side != "right":
            found[key] = value
    return found


def held_out(config: ScoreConfig, direction_set: DirectionSet) -> dict[str, list[float | None]]:
    """Scores of both answers of each pair along the direction of pairs that it is held out of, in
    the unit of the run's own."""
    assert direction_set.overall
    length = 1.0 if config.normalize == "norm" else direction_set.length
    found = direction_set.overall.cross_validation
    nothing: list[float | None] = [None] * len(direction_set.overall.pairs)
    return {
        "held_out_chosen": [length * score for score in found.chosen] if found else nothing,
        "held_out_rejected": [length * score for score in found.rejected] if found else nothing,
    }


def table_of(name: str, diagnosis: PairDiagnosis) -> pa.Table:
    """A row for each pair of a target. A target without a name takes that of its file."""
    chosen = [pair.chosen for pair in diagnosis.pairs]
    prompts = [[turn.text for turn in row.turns[: row.prompt_turns]] for row in chosen]
    target = diagnosis.target
    truncated = diagnosis.truncated_chosen, diagnosis.truncated_rejected
    return pa.table(
        {
            "target": [name or Path(row.file).name.partition(".")[0] for row in chosen],
            "prompt": ["\n".join(texts) for texts in prompts],
            "loglik_chosen": target.loglik_chosen.tolist(),
            "loglik_rejected": target.loglik_rejected.tolist(),
            "gap": target.gap.tolist(),
            "weight": target.weight.tolist(),
            "share": list(diagnosis.diagnosis.shares),
            "line": [row.line for row in chosen],
            "truncated": [a or b for a, b in zip(*truncated, strict=True)],
            "truncated_chosen": list(truncated[0]),
            "truncated_rejected": list(truncated[1]),
        }
    )


def load_direction(file: str, model: CausalLM, toward: str, warmed: bool = False) -> DirectionSet:
    """A direction.safetensors of an earlier run. Raises BadFile; BadModel when it is of another
    model; BadOption when it does not point `toward` these answers, or was taken after a warm-up and
    the model is not `warmed`."""
    by_label: dict[str, dict[str, Tensor]] = {}
    for key, value in read_saved(file, toward, warmed).items():
        label, _, name = key.rpartition("/")
        by_label.setdefault(label, {})[name] = value
    halves = [label for label in by_label if label.startswith("chosen")]
    targets = [label.removeprefix("target:") for label in by_label if label not in halves]
    is_best = bool(halves) and halves != ["chosen"]
    layout = DirectionLayout(targets=targets, best=is_best, halves=bool(halves))
    directions = [with_factors(by_label.get(label, {})) for label in labels_of(layout)]
    parameters = dict(model.network.named_parameters())
    names = [name for name in parameters if directions and name in directions[0]]
    for direction in directions:
        for name in sorted({*direction, *names}):
            if name not in parameters or name not in direction:
                raise of_another_model(file, name)
            if parameters[name].shape != direction[name].shape:
                raise of_another_model(file, name)
    if not names:
        raise of_another_model(file, "its list of parameters")
    # parameters in the model's order, so sums add up in the same one
    ordered = [{name: direction[name] for name in names} for direction in directions]
    moved = beside(ordered, parameters)
    lengths = [norm(direction) for direction in moved[: len(targets)]]
    layout = replace(layout, lengths=lengths)
    notes = [] if halves else [f"score_chosen and score_rejected are empty: {file} has no half C"]
    weights = {name: parameters[name] for name in names}
    return DirectionSet(weights, moved, layout, {}, warnings=notes)


def of_another_model(file: str, name: str) -> BadModel:
    return BadModel(f"--direction {file}: {name} does not fit this model; use its own model")


def read_saved(file: str, toward: str, warmed: bool) -> Mapping[str, Tensor]:
    try:
        saved = read_tensors(local(file))
    except (OSError, ValueError) as error:
        raise BadFile(
            file, None, f"cannot be read ({error})", "give a run folder's direction.safetensors"
        ) from None
    towards = saved.metadata.get("towards", toward)
    if towards.endswith(WARMED) and not warmed:
        raise BadOption(
            f"--direction {file}: it was taken after a warm-up, and fits no other checkpoint; give "
            "--target"
        )
    if towards.removesuffix(WARMED) != toward:
        raise BadOption(
            f"--direction {file}: it points towards the {towards} answers, and this command needs "
            f"the {toward} ones; repair takes the direction of a repair run, score and select take "
            "that of score or select"
        )
    return saved.tensors
