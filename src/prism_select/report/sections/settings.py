"""Settings: definition of the score, cost, options, versions and fingerprints."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from prism_select.report.formatting import percent, significant
from prism_select.report.run_facts import RunFacts, effective_options
from prism_select.report.sections.section import Section
from prism_select.run.config import RepairConfig, ScoreConfig, SelectConfig
from prism_select.run.options import options_of

__all__ = ["SECTION", "Cost", "SettingFacts", "read"]

NamedTexts: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Cost:
    name: str
    planned: str
    measured: str


@dataclass(frozen=True)
class SettingFacts:
    """`changed` has the options with other values than their defaults."""

    score: NamedTexts
    cost: tuple[Cost, ...]
    seconds: NamedTexts
    changed: NamedTexts
    options: NamedTexts
    versions: NamedTexts


def read(run: RunFacts) -> SettingFacts:
    manifest = run.manifest
    options = {name: _written(value) for name, value in effective_options(manifest).items()}
    defaults = {
        option.name: _written(option.default)
        for kind in (ScoreConfig, SelectConfig, RepairConfig)
        for option in options_of(kind)
    }
    return SettingFacts(
        score=_score(manifest),
        cost=_cost(manifest["plan"], manifest["actual"]),
        seconds=tuple((step, significant(s)) for step, s in manifest["timings"].items()),
        changed=tuple(item for item in options.items() if item[1] != defaults.get(item[0])),
        options=tuple(options.items()),
        versions=_versions(manifest),
    )


def _written(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "–"
    if isinstance(value, float):
        return significant(value)
    return str(value) if value not in ("", None) else "–"


def _score(manifest: Mapping[str, Any]) -> NamedTexts:
    score, engine, curvature = (manifest[key] for key in ("score", "engine", "curvature"))
    figures = [
        f"{name} {_written(value)}"
        for name, value in curvature.items()
        if isinstance(value, float | int) and (value or name != "rows")
    ]
    return (
        ("definition", score["definition"]),
        ("sign", score["sign"]),
        ("unit", score["unit"]),
        ("engine", f"{engine['name']} in {engine['dtype']}: {engine['reason']}"),
        ("curvature", ", ".join([curvature["name"], *figures])),
        ("padding", percent(manifest["padding"])),
    )


def _cost(plan: Mapping[str, float], actual: Mapping[str, float]) -> tuple[Cost, ...]:
    seconds, memory = "seconds", "memory_bytes"
    return (
        Cost(seconds, significant(plan[seconds]), significant(actual[seconds])),
        Cost("memory, GB", significant(plan[memory] / 1e9), significant(actual[memory] / 1e9)),
        Cost("tokens", f"{plan['tokens']:,.0f}", f"{actual['tokens']:,.0f}"),
    )


def _versions(manifest: Mapping[str, Any]) -> NamedTexts:
    model, fingerprints = manifest["model"], manifest["fingerprints"]
    few = model.get("quantised")
    return (
        ("architecture", model["architecture"]),
        ("device", model["device"]),
        *((("matrices", f"{few['matrices']} in {few['bits']} bits"),) if few else ()),
        ("template", model["template"]),
        ("selected parameters", f"{len(model['counted_weights'])}"),
        ("PRISM", manifest["prism_version"]),
        *manifest["versions"].items(),
        *((f"fingerprint of the {name}", value) for name, value in fingerprints.items()),
    )


SECTION = Section("made", "How it was made", "How was it made?", read)
