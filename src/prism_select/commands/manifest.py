"""Manifest: everything about a run that is not a row. Its keys are stable and described in the
docs."""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import combinations
from typing import Any

from prism_select.core.check import tolerance
from prism_select.directions.from_pairs import DirectionSet, PairDiagnosis
from prism_select.directions.saved import towards
from prism_select.models.causal_lm import CausalLM
from prism_select.run.config import RepairConfig, ScoreConfig, sides_of
from prism_select.scoring.cost_plan import Plan
from prism_select.scoring.engine_choice import Checked
from prism_select.selection.choice import Chosen

__all__ = ["Facts", "manifest_of", "target_of", "warnings_of"]

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "pyarrow", "numpy")


@dataclass(frozen=True)
class Facts:
    model: CausalLM
    template: str
    told: Mapping[str, Any]  # entries of steps that may be left out
    fingerprints: Mapping[str, str]
    timings: Mapping[str, float]
    plan: Plan
    actual: Mapping[str, float]
    padding: float


def manifest_of(
    config: ScoreConfig, aim: DirectionSet, checked: Checked, chosen: Chosen, facts: Facts
) -> dict[str, Any]:
    repair = isinstance(config, RepairConfig)
    return {
        "prism_version": version("prism-select"),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in LIBRARIES},
        },
        "command": config.command,
        "config": asdict(config),
        "fingerprints": dict(facts.fingerprints),
        "model": {
            "architecture": type(facts.model.network).__name__,
            "device": str(facts.model.device),
            "template": facts.template,
            "counted_weights": list(aim.weights),
        },
        "score": {
            "definition": "gradient of loglik (summed over supervised tokens) times the gradient of the mean gain"
            + (", without the common part" if config.common == "remove" else "")
            + (
                f", divided by the curvature ({config.curvature})"
                if config.curvature != "flat"
                else ""
            ),
            "sign": "positive: training on the row moves the model towards the "
            f"{towards(config)} answers of the target file",
            "unit": "change of the gain (nats per token) per unit of learning rate, for one SGD step on the row",
            "swapped": repair,
        },
        "target": target_of(aim) or {"direction": config.direction},
        **facts.told,
        "engine": {
            "name": checked.engine,
            "reason": checked.reason,
            "dtype": checked.dtype,
            "check": {
                "rows": checked.rows,
                "disagreement": checked.disagreement,
                "tolerance": tolerance(checked.engine, facts.model.dtype),
                "repeat": checked.repeat,
            },
        },
        "counts": dict(chosen.counts),
        "choice": dict(chosen.figures),
        "padding": facts.padding,
        "timings": dict(facts.timings),
        "plan": asdict(facts.plan),
        "actual": dict(facts.actual),
        "warnings": [
            *warnings_of(aim, repair),
            *unreached(aim),
            *restless(checked),
            *unsolved(facts.told["curvature"]),
            *missed(facts.told.get("cascade")),
            *chosen.warnings,
        ],
    }


def unreached(aim: DirectionSet) -> list[str]:
    names = aim.without_gradient
    few = ", ".join(names[:3]) + ", …" * (len(names) > 3)
    return [
        f"{len(names)} of {len(aim.weights)} counted weights have no gradient and add nothing: {few}"
    ] * bool(names)


def restless(checked: Checked) -> list[str]:
    """A warning where the same rows do not get the same scores each time."""
    line = (
        f"the engine's kernels are not deterministic here: the same rows scored twice differ by {checked.repeat:.1e}, "
        "and so will two runs"
    )
    return [line] * (checked.repeat > 0)


def unsolved(curvature: Mapping[str, Any]) -> list[str]:
    left = curvature.get("residual") or 0.0
    return [
        f"conjugate gradients stopped with {left:.0%} of the direction left: raise --damping"
    ] * (left > 0.1)


def missed(cascade: Mapping[str, Any] | None) -> list[str]:
    """A warning where many scores are guesses."""
    if not cascade or not cascade["guessed"]:
        return []
    low = cascade["recall"]["low"]
    return [
        f"{cascade['guessed']:,} scores are guesses (exact is false), and none of them was chosen before an exact one; "
        f"by a random sample as much as {1 - low:.0%} of the best {cascade['best']:,} rows may be among them"
    ]


def target_of(aim: DirectionSet) -> dict[str, Any]:
    """What the pairs say, of all targets together and of each; nothing for a saved direction."""
    if aim.whole is None:
        return {}
    told = told_of(aim.whole)
    if len(aim.said) > 1:
        told |= {
            "targets": {name: told_of(said) for name, said in aim.said.items()},
            "cosines": aim.cosines,
        }
    return told


def told_of(said: PairDiagnosis) -> dict[str, Any]:
    told = asdict(said.diagnosis)
    shares = told.pop("shares")
    return {
        **told,
        "dominant_pairs": [
            {"pair": i + 1, "share": shares[i]} for i in said.diagnosis.dominant[:5]
        ],
    }


def warnings_of(aim: DirectionSet, swapped: bool) -> list[str]:
    """`swapped` pairs are told by the names that the target file has for their answers."""
    if len(aim.said) < 2:
        return [
            line
            for said in aim.said.values()
            for line in said.diagnosis.in_words(sides_of(swapped))
        ]
    found = [
        f"target {name}: {line}"
        for name, said in aim.said.items()
        for line in said.diagnosis.in_words(sides_of(swapped))
    ]
    for (a, of_a), (b, of_b) in combinations(enumerate(aim.said), 2):
        if aim.cosines[a][b] < -0.1:
            found.append(
                f"targets {of_a} and {of_b} conflict: the cosine of their directions is {aim.cosines[a][b]:.2f}"
            )
    return found
