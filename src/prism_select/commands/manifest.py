"""Manifest: all that is known of a run except its rows. Its keys are stable, and the docs describe
them.

    record of a run → manifest.json        pairs → what the pairs say, and the warnings about them

Choices made here:
- entries of optional steps (rank, adapter, cascade) are there only where the step was;
- warnings come last, in the order of the steps that raise them.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import combinations
from typing import Any

import numpy as np

from prism_select.commands.scoring_steps import PoolScores
from prism_select.commands.steps import ExportedAdapter, RunDirections
from prism_select.core.check import tolerance
from prism_select.data.records import Pair
from prism_select.directions.direction_set import DirectionSet, GroupDirections, PairDiagnosis
from prism_select.directions.saved import held_out
from prism_select.directions.tuning import Trial, Tuning
from prism_select.models.layer_selection import adapter_names
from prism_select.models.loading import LoadedModel
from prism_select.models.quantised import quantised_entry
from prism_select.run.config import BESIDE_PAIRS, ScoreConfig
from prism_select.run.polarity import Polarity
from prism_select.run.thresholds import CHANCE_AUROC, CONFLICTING_COSINE, auroc_in_words
from prism_select.scoring.cost_plan import Plan
from prism_select.scoring.engine_choice import EngineCheck
from prism_select.selection.cascade import Search
from prism_select.selection.choice import Chosen
from prism_select.selection.figures import planted_recall

__all__ = [
    "RunRecord",
    "diagnosis_warnings",
    "manifest_of",
    "pair_warnings",
    "pairs_entry",
    "tuning_entry",
]

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "pyarrow", "numpy")
EXAMPLES, PROMPT = 3, 120  # pairs of a group that are shown, and characters of their prompts
SHOWN = 5  # pairs with the largest shares of the direction


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What the steps of a complete run found; `input_warnings` are about its files and what
    encoding does to their rows."""

    input_warnings: Sequence[str]
    fingerprints: Mapping[str, str]
    loaded: LoadedModel
    directions: RunDirections
    engine: EngineCheck
    adapter: ExportedAdapter | None
    scores: PoolScores
    chosen: Chosen
    timings: Mapping[str, float]
    plan: Plan
    memory_bytes: int


def manifest_of(config: ScoreConfig, record: RunRecord) -> dict[str, Any]:
    direction_set, model = record.directions.direction_set, record.loaded.model
    polarity = Polarity.of_config(config)
    target = _target_entry(config, record)
    return {
        "prism_version": version("prism-select"),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in LIBRARIES},
        },
        "command": config.command,
        "config": asdict(config),
        "fingerprints": dict(record.fingerprints),
        "model": {
            "architecture": type(model.network).__name__,
            "device": ", ".join(map(str, model.devices)),
            "quantised": quantised_entry(model.network),
            "template": record.loaded.encoder.template,
            "template_date": record.loaded.encoder.date.day,
            "adapter": _adapter_state(config, record.loaded),
            "counted_weights": list(direction_set.weights),
        },
        "score": _score_entry(config, polarity),
        "target": target,
        **_optional_entries(record),
        "engine": _engine_entry(record),
        "counts": dict(record.chosen.counts),
        "choice": _choice_entry(record),
        "padding": record.scores.counts.padding,
        "timings": dict(record.timings),
        "plan": {key: value for key, value in asdict(record.plan).items() if value != {}},
        "actual": {
            "seconds": record.timings["total"],
            "memory_bytes": record.memory_bytes,
            "tokens": record.scores.counts.tokens,
        },
        "warnings": [
            *record.input_warnings,
            *record.loaded.warnings,
            *pair_warnings(direction_set, polarity),
            *planted_warnings(target, record.chosen.counts),
            *_unreached_warnings(direction_set),
            *_repeat_warnings(record.engine),
            *_prediction_warnings(record.scores.search),
            *record.chosen.warnings,
        ],
    }


def _target_entry(config: ScoreConfig, record: RunRecord) -> dict[str, Any]:
    direction_set = record.directions.direction_set
    entry = pairs_entry(direction_set) or {"direction": config.direction}
    found = entry.get("cross_validation")
    if found and config.curvature not in BESIDE_PAIRS:
        scores = np.array(held_out(config, direction_set)["held_out_chosen"], dtype=np.float64)
        found |= planted_recall(scores, record.chosen.cutoff)
    return entry


def planted_warnings(target: Mapping[str, Any], counts: Mapping[str, int]) -> list[str]:
    """A warning where the budget takes no more of the held-out chosen answers than of any rows."""
    found = target.get("cross_validation") or {}
    chance = counts.get("selected", 0) / max(1, counts.get("scored", 1))
    if "planted_recall" not in found or found["planted_recall"] > chance or chance == 1:
        return []
    return [
        f"of held-out chosen answers the budget would take {found['planted_recall']:.0%}, no more "
        f"than of any rows ({chance:.0%}): this direction does not find answers like them"
    ]


def _choice_entry(record: RunRecord) -> dict[str, Any]:
    entry = dict(record.chosen.figures)
    if record.scores.groups:
        entry["coverage"] = {**entry["coverage"], "seconds": record.scores.group_seconds}
    return entry


def _adapter_state(config: ScoreConfig, loaded: LoadedModel) -> str | None:
    """How the model has the adapter of --adapter in it."""
    if not config.adapter:
        return None
    return "apart" if adapter_names(loaded.model.network) else "merged"


def _score_entry(config: ScoreConfig, polarity: Polarity) -> dict[str, Any]:
    common = ", without the common part" if config.common == "remove" else ""
    is_divided = config.curvature != "flat" and not config.direction
    divided = f", divided by the curvature ({config.curvature})" if is_divided else ""
    target = "a saved direction" if config.direction else f"the gradient of the mean gain{common}"
    step = "step, divided by the curvature, too," if is_divided else "SGD step"
    return {
        "definition": f"gradient of loglik (summed over supervised tokens) times {target}{divided}",
        "sign": "positive: training on the row moves the model towards the "
        f"{polarity.toward} answers of the target file",
        "unit": f"change of the gain (nats per token) per unit of learning rate, for one {step} "
        "on the row",
        "swapped": polarity.swapped,
    }


def _optional_entries(record: RunRecord) -> dict[str, Any]:
    curvature, rank = record.directions.curvature, record.directions.rank_check
    search = record.scores.search
    plain = "flat" if record.directions.direction_set.diagnoses else "as saved"
    entries = {
        "curvature": asdict(curvature) if curvature else {"name": plain},
        "tuning": tuning_entry(record.directions.direction_set.tuning),
        "rank": rank and asdict(rank),
        "adapter": record.adapter and asdict(record.adapter),
        "cascade": search and search.describe(),
    }
    return {name: entry for name, entry in entries.items() if entry is not None}


def _engine_entry(record: RunRecord) -> dict[str, Any]:
    check = record.engine
    return {
        "name": check.engine,
        "reason": check.reason,
        "dtype": check.dtype,
        "check": {
            "rows": check.rows,
            "disagreement": check.disagreement,
            "tolerance": tolerance(check.engine, record.loaded.model.dtype),
            "repeat": check.repeat,
        },
    }


def pairs_entry(direction_set: DirectionSet) -> dict[str, Any]:
    """What the pairs say, of all targets together and of each one; empty for a saved direction."""
    if direction_set.overall is None:
        return {}
    entry = _diagnosis_entry(direction_set.overall)
    if len(direction_set.diagnoses) > 1:
        entry["targets"] = {n: _diagnosis_entry(d) for n, d in direction_set.diagnoses.items()}
        entry["cosines"] = direction_set.cosines
    if direction_set.groups:
        entry |= _groups_entry(direction_set.overall.pairs, direction_set.groups)
    return entry


def _groups_entry(pairs: Sequence[Pair], groups: GroupDirections) -> dict[str, Any]:
    """How many pairs each group has, and prompts of a few of them."""
    of_pairs, entry = groups.clusters.of_pairs, dict[str, Any]()
    for number, name in enumerate(groups.names):
        members = np.flatnonzero(of_pairs == number).tolist()
        prompts = (pairs[pair].chosen.prompt for pair in members)
        texts = dict.fromkeys(" ".join(t.shown for t in turns)[-PROMPT:] for turns in prompts)
        entry[name] = {"pairs": len(members), "prompts": [*texts][:EXAMPLES]}
    return {"groups": entry, "silhouette": groups.clusters.silhouette}


def tuning_entry(tuning: Tuning | None) -> dict[str, Any] | None:
    """What was tried, simplest first, and what was chosen: the values of the tuned options, and the
    AUROC of held-out pairs that they were chosen by."""
    if tuning is None:
        return None

    def line(trial: Trial) -> dict[str, Any]:
        values = {name: getattr(trial.way, name) for name in tuning.options}
        return values | {"auroc": trial.auroc, "standard_error": trial.standard_error}

    return {
        "chosen": line(tuning.chosen),
        "best": line(tuning.best),
        "tried": [line(trial) for trial in tuning.tried],
    }


def _diagnosis_entry(pairs: PairDiagnosis) -> dict[str, Any]:
    entry = asdict(pairs.diagnosis)
    shares = entry.pop("shares")
    dominant = pairs.diagnosis.dominant[:SHOWN]
    found = pairs.cross_validation
    entry["cross_validation"] = found and {
        "auroc": found.auroc,
        "interval": list(found.interval),
        "paired": found.paired,
        "folds": found.folds,
        "by_answers": found.by_answers,
    }
    entry["dominant_pairs"] = [{"pair": i + 1, "share": shares[i]} for i in dominant]
    return entry


def pair_warnings(direction_set: DirectionSet, polarity: Polarity) -> list[str]:
    """What is wrong with the pairs, with the target file's own names for their answers."""
    return [*direction_set.warnings, *diagnosis_warnings(direction_set, polarity)]


def diagnosis_warnings(direction_set: DirectionSet, polarity: Polarity) -> list[str]:
    """Without what encoding does to the pairs."""
    several = len(direction_set.diagnoses) > 1
    warnings = [
        f"target {name}: {line}" if several else line
        for name, pairs in direction_set.diagnoses.items()
        for line in [*chance_warnings(pairs), *pairs.diagnosis.in_words(polarity)]
    ]
    for (a, first), (b, second) in combinations(enumerate(direction_set.diagnoses), 2):
        cosine = direction_set.cosines[a][b]
        if cosine < CONFLICTING_COSINE:
            warnings.append(
                f"targets {first} and {second} conflict: the cosine of their directions is "
                f"{cosine:.2f}"
            )
    return warnings


def chance_warnings(pairs: PairDiagnosis) -> list[str]:
    found = pairs.cross_validation
    if not found or found.interval[0] > CHANCE_AUROC:
        return []
    return [
        f"held-out pairs are ranked at chance (AUROC {auroc_in_words(found.auroc, found.interval)})"
        ": expect no more of the pool; give more or nearer pairs, or another model"
    ]


def _unreached_warnings(direction_set: DirectionSet) -> list[str]:
    names = direction_set.without_gradient
    if not names:
        return []
    shown = ", ".join(names[:3]) + ", …" * (len(names) > 3)
    return [
        f"{len(names)} of {len(direction_set.weights)} selected parameters have no gradient and "
        f"add nothing: {shown}"
    ]


def _repeat_warnings(check: EngineCheck) -> list[str]:
    """A warning where the same rows get other scores the second time."""
    if not check.repeat > 0:
        return []
    return [
        "the engine's kernels are not deterministic here: the same rows scored twice differ by "
        f"{check.repeat:.1e}, and so will two runs"
    ]


def _prediction_warnings(search: Search | None) -> list[str]:
    """A warning where some scores are predicted."""
    predicted = int((~search.tried).sum()) if search else 0
    if search is None or not predicted:
        return []
    return [
        f"{predicted:,} scores are predicted (exact is false), and none of these rows was chosen "
        "before one with an exact score; by a random sample as much as "
        f"{1 - search.recall.low:.0%} of the best {search.best:,} rows may be among them"
    ]
