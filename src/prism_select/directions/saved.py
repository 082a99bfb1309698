"""Saving: directions to a file and back, and what the pairs say to pairs.parquet.

    direction.safetensors    [LINE/]WEIGHT → tensor    no line: the score of the only target; chosen: half C; with
                             several targets target:NAME and chosen (or chosen:NAME) metadata: which
                             answers of the target file it points towards, and whether after a
                             warm-up; one entry alone, since the order of several is not the same in
                             every file

Choices made here: what is saved is what rows are scored along, with curvature and remedies in it,
before a cut to a rank; groups of pairs and other dampings are not."""

from pathlib import Path

import pyarrow as pa
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from prism_select.core.layers import Direction
from prism_select.core.target_gradient import norm
from prism_select.data.remote import local
from prism_select.directions.from_pairs import DirectionSet, PairDiagnosis
from prism_select.directions.layout import DirectionLayout
from prism_select.models.causal_lm import CausalLM
from prism_select.run.config import ScoreConfig, sides_of
from prism_select.run.errors import BadFile, BadModel, BadOption
from prism_select.run.folder import Store

__all__ = ["load_direction", "save_direction", "towards"]

WARMED = ", after a warm-up"


def towards(config: ScoreConfig) -> str:
    """Which answers of the target file a positive score moves the model towards."""
    return sides_of(config.command == "repair")[0]


def labels_of(lines: DirectionLayout) -> list[str]:
    """A name for each direction that is saved, in the order of `DirectionLayout`."""
    scores = [f"target:{name}" if name else "" for name in lines.targets]
    return scores + ([f"chosen:{name}" for name in lines.targets] if lines.best else ["chosen"])


def save_direction(store: Store, config: ScoreConfig, aim: DirectionSet) -> None:
    tensors = {
        f"{label}/{name}".lstrip("/"): value
        for label, direction in zip(labels_of(aim.lines), aim.directions, strict=False)
        for name, value in direction.items()
    }
    metadata = {"towards": towards(config) + WARMED * bool(config.warmup)}
    store.write_tensors("direction.safetensors", tensors, metadata)
    if aim.said:
        parts = [table_of(name, said) for name, said in aim.said.items()]
        store.write_table("pairs.parquet", pa.concat_tables(parts))


def table_of(name: str, said: PairDiagnosis) -> pa.Table:
    pairs = said.pairs
    return pa.table(
        {
            "target": [name or Path(pair.chosen.file).name.partition(".")[0] for pair in pairs],
            "prompt": [
                "\n".join(turn.text for turn in pair.chosen.turns[: pair.chosen.prompt_turns])
                for pair in pairs
            ],
            "loglik_chosen": said.target.mean_loglik_chosen.tolist(),
            "loglik_rejected": said.target.mean_loglik_rejected.tolist(),
            "gap": said.target.gap.tolist(),
            "weight": said.target.weight.tolist(),
            "share": list(said.diagnosis.shares),
            "line": [pair.chosen.line for pair in pairs],
        }
    )


def load_direction(file: str, model: CausalLM, side: str, warmed: bool = False) -> DirectionSet:
    """A direction.safetensors of an earlier run. Raises BadFile, BadModel when it is of another
    model, and BadOption when it points towards the other side than `side`, or was taken after a
    warm-up and the model is not `warmed`."""
    saved = read(file, side, warmed)
    known = dict(model.network.named_parameters())
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in saved.items():
        label, _, name = key.rpartition("/")
        found.setdefault(label, {})[name] = value.to(model.device)
    names = [label.removeprefix("target:") for label in found if not label.startswith("chosen")]
    lines = DirectionLayout(targets=names, best="chosen" not in found)
    directions: list[Direction] = [found.get(label, {}) for label in labels_of(lines)]
    weights = [name for name in known if directions and name in directions[0]]
    wrong = [
        name
        for direction in directions
        for name in sorted({*direction, *weights})
        if name not in known or name not in direction or known[name].shape != direction[name].shape
    ]
    if wrong or not weights:
        raise BadModel(
            f"--direction {file}: {(wrong or ['its list of weights'])[0]} does not fit this model; use its own model"
        )
    directions = [
        {name: direction[name] for name in weights} for direction in directions
    ]  # sums in the same order
    lengths = [norm(direction) for direction in directions[: len(names)]]
    lines = DirectionLayout(targets=names, lengths=lengths, best=lines.best)
    return DirectionSet({name: known[name] for name in weights}, directions, lines, {})


def read(file: str, side: str, warmed: bool) -> dict[str, Tensor]:
    try:
        saved = load_file(local(file))
        with safe_open(local(file), "pt") as opened:
            there = (opened.metadata() or {}).get("towards", side)
    except (OSError, SafetensorError) as error:
        raise BadFile(
            file, None, f"cannot be read ({error})", "give a run folder's direction.safetensors"
        ) from None
    if there.endswith(WARMED) and not warmed:
        raise BadOption(
            f"--direction {file}: it was taken after a warm-up, and fits no other checkpoint; give --target"
        )
    if there.removesuffix(WARMED) != side:
        raise BadOption(
            f"--direction {file}: it points towards the {there} answers, and this command needs the {side} ones; "
            "repair takes the direction of a repair run, score and select take that of score or select"
        )
    return dict(saved)
