"""Summaries: the table at the end of a command; each row is a name and a line.

    read       1,000 rows, 2 quarantined
    verdicts   50 selected, 948 over budget
    …

Choices made here:
- each function makes the rows of one subject, from the manifest or the result;
- a figure without a value (null) is "undefined": for example the AUROC of equal labels.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prism_select.run.config_evaluate import EvaluateConfig
from prism_select.run.config_pairs import PairsConfig
from prism_select.run.polarity import Polarity
from prism_select.run.thresholds import TARGET_AGREEMENT, auroc_in_words, no_validation_in_words

if TYPE_CHECKING:
    from prism_select.commands.pairs import MadePairs
    from prism_select.scoring.cost_plan import Plan
    from prism_select.scoring.model_plan import ModelPlan

__all__ = [
    "evaluation_summary",
    "failed_controls",
    "pairs_summary",
    "plan_summary",
    "run_summary",
]

SHOWN_SOURCES = 6
SHOWN_TARGETS = 8
RANKINGS = {"none": "the score", "tokens": "the score per token", "norm": "the cosine"}


def run_summary(path: Path, files: Sequence[str], manifest: Mapping[str, Any]) -> dict[str, str]:
    """The table of score, select and repair: rows, pairs, choice, computation, files."""
    target, engine, choice = manifest["target"], manifest["engine"], manifest["choice"]
    rows, polarity = dict[str, str](), Polarity.of_manifest(manifest)
    if "pairs" in target:
        rows |= _held_out(target, polarity)
    rows |= _counts(manifest["counts"])
    if "pairs" in target:
        rows |= _pairs(target, polarity)
    if "cosines" in target:
        rows |= _targets(target)
    if manifest["command"] != "score" and len(choice["sources"]) > 1:
        verb = "removed of" if manifest["command"] == "repair" else "chosen of"
        rows[verb] = _sources(choice["sources"])
    if coverage := choice.get("coverage"):
        rows["groups"] = _coverage(coverage)
    if labels := choice.get("labels"):
        rows |= _labels(labels)
    correlations = choice["rank_correlation_with_tokens"].items()
    rows["length"] = "rank correlation with tokens " + ", ".join(
        f"{_figure(value, '+.2f')} of {RANKINGS[name]}" for name, value in correlations
    )
    if "cosine" in manifest["curvature"]:
        rows["curvature"] = _curvature(manifest["curvature"], choice)
    if "rank" in manifest:
        rows["rank"] = _rank(manifest["rank"])
    if "cascade" in manifest:
        rows["cascade"] = _cascade(manifest["cascade"])
    check = f"off by {engine['check']['disagreement']:.1e}"
    rows["engine"] = f"{engine['name']} in {engine['dtype']}, {check}"
    seconds = manifest["timings"]
    rows["time"] = f"{seconds['total']:.1f} s, of which scoring {seconds['score']:.1f} s"
    rows |= _numbered("warning", manifest["warnings"])
    return rows | {"report": _page(path), "files": f"{path}: {', '.join(files)}"}


def plan_summary(plan: "Plan") -> dict[str, str]:
    """The table of --dry-run."""
    if hasattr(plan, "scoring_bytes"):
        return _model_plan(cast("ModelPlan", plan))
    return {
        "tokens": f"{plan.tokens:,}",
        "time": f"{plan.seconds:,.0f} s for the whole run, on this machine as it is now",
        "memory": f"{plan.memory_bytes / 1e9:.2f} GB at the highest{_by_device(plan)}",
        "disk": f"{plan.disk_bytes / 2**20:.1f} MiB in the run folder",
    }


def _by_device(plan: "Plan") -> str:
    found = (f"{device} {size / 1e9:.2f} GB" for device, size in plan.by_device.items())
    return f": {', '.join(found)}" if plan.by_device else ""


def _model_plan(plan: "ModelPlan") -> dict[str, str]:
    """The table of --dry-run of a model without weights."""
    (_, full), (rank, low) = plan.scoring_bytes.items()
    seconds, fewer = plan.seconds_per_million.values()
    rows = {
        "parameters": f"{plan.parameters:,}, of which selected {plan.selected:,}",
        "weights": f"{plan.weights_bytes / 1e9:.2f} GB in {plan.dtype}",
        "scoring": f"{full / 1e9:.2f} GB along full directions, {low / 1e9:.2f} GB along those of "
        f"{rank}, in a process of torchrun or Ray that scores alone",
        "batch": f"{plan.batch_bytes / 1e9:.2f} GB for {plan.batch_tokens:,} tokens "
        "(--batch-tokens), beside weights and directions",
        "tokens": f"{plan.tokens:,}, {plan.counted_by}",
        "time": f"{plan.seconds:,.0f} s for scoring, at an assumed 100 TFLOP/s achieved; a million "
        f"tokens take {seconds:,.1f} s, along {rank} {fewer:,.1f} s; at twice the speed, half",
        "memory": f"{plan.memory_bytes / 1e9:.2f} GB at the highest of a whole run"
        f"{_by_device(plan)}",
        "disk": f"{plan.disk_bytes / 2**20:.1f} MiB in the run folder",
        "estimate": "engine reverse on a device that is not here; nothing was loaded or timed",
    }
    if plan.not_counted:
        rows["not counted"] = ", ".join(plan.not_counted)
    return rows


def pairs_summary(config: PairsConfig, result: "MadePairs | Mapping[str, Any]") -> dict[str, str]:
    """The table of `prism pairs`: of a new file, or of a diagnosis."""
    if isinstance(result, Mapping):
        largest = ", ".join(
            f"{pair['pair']} ({_figure(pair['share'], '.0%')})" for pair in result["dominant_pairs"]
        )
        rows = _held_out(result, Polarity()) | _pairs(result, Polarity())
        rows |= {"largest shares": f"pairs {largest}"}
        return rows | _numbered("warning", result["warnings"])
    rows = {"read": f"{result.rows:,} rows", "pairs": f"{result.pairs:,} by {config.how}"}
    if result.compared:
        counts = (f"{count:,} {name}" for name, count in result.compared.items())
        rows["questions"] = ", ".join(counts)
    skipped = sorted(result.skipped.items(), key=lambda item: -item[1])
    rows |= _numbered("no pair", (f"{count:,} rows: {reason}" for reason, count in skipped))
    rows |= _numbered("warning", result.warnings)
    return rows | {"files": f"{result.path}, {result.path}.skipped.jsonl"}


def evaluation_summary(config: EvaluateConfig, result: Mapping[str, Any]) -> dict[str, str]:
    """The table of `prism evaluate`: methods, verdicts, shares removed, forecast, compute, labels,
    controls."""
    rows = _training(config, result)
    questions = result["questions"] < result["pairs"]
    for name, method in result["methods"].items():
        rows[name] = _method(method, questions)
    rows |= _numbered("verdict", map(_verdict, result["against"].values()))
    if result["curve"]:
        rows |= _removals(result)
    rows["forecast"] = _forecast(result["forecast"])
    if result["compute"]:
        rows["compute"] = result["compute"]["words"]
    if result["labels"]:
        best = sorted(result["labels"].items(), key=lambda item: -(item[1] or 0.0))
        rows["labels"] = "AUROC " + ", ".join(f"{_figure(value)} {name}" for name, value in best)
    rows |= _numbered("control", (control["words"] for control in result["controls"]))
    run = Path(config.run or "")
    rows |= {"report": _page(run), "files": f"{run}/evaluation"}
    return rows | {"time": f"{result['seconds']:.1f} s"}


def failed_controls(result: Mapping[str, Any]) -> set[str]:
    """Names of the rows of `evaluation_summary` with a failed control."""
    controls = enumerate(result["controls"], start=1)
    return {f"control {number}" for number, control in controls if not control["holds"]}


def _figure(value: float | None, spec: str = ".3f") -> str:
    return "undefined" if value is None else format(value, spec)


def _numbered(name: str, lines: Iterable[str]) -> dict[str, str]:
    return {f"{name} {number}": line for number, line in enumerate(lines, start=1)}


def _page(run: Path) -> str:
    page = run / "report.html"
    return str(page) if page.exists() else f"none; prism report {run} makes it"


def _counts(counts: Mapping[str, int]) -> dict[str, str]:
    """Rows read, and how many have each verdict."""
    marks = [f"{counts[name]:,} {name}" for name in ("quarantined", "truncated") if counts[name]]
    verdicts = [
        f"{count:,} {name}"
        for name, count in counts.items()
        if name not in ("read", "scored", "quarantined", "truncated")
        and (count or name not in ("near duplicate", "source cap"))
    ]
    if counts["quarantined"]:
        marks[0] += " (quarantine.jsonl says why)"
    return {
        "read": ", ".join([f"{counts['read']:,} rows", *marks]),
        "verdicts": ", ".join(verdicts) or f"{counts['scored']:,} scored",
    }


def _pairs(target: Mapping[str, Any], polarity: Polarity) -> dict[str, str]:
    """The diagnosis of the pairs: `target` of the manifest."""
    toward, away = polarity.toward, polarity.away
    alone = target.get("answers_alone", False)
    rows = {
        "pairs": f"{target['pairs']}, some or all of them an answer without a rejected one"
        if alone
        else f"{target['pairs']}, mean preference for the {toward} "
        f"{target['mean_preference']:.3f}, above one half in {target['preferred_share']:.0%}, "
        f"{target['effective_pairs']:.1f} effective",
    }
    if target["split_half_agreement"] is not None:
        low, high = target["agreement_spread"]
        needed = target["pairs_for_half_agreement"]
        advice = f"; about {needed:,} pairs for {TARGET_AGREEMENT:.2f}" if needed else ""
        rows["agreement"] = (
            f"two halves agree at {target['split_half_agreement']:.2f} "
            f"(splits {low:.2f} to {high:.2f}){advice}"
        )
    if alone:
        return rows
    rows["common part"] = (
        f"{target['common_part']:.1f} times what tells the two answers of a pair apart"
    )
    rows["answers"] = (
        f"{target['mean_tokens_chosen']:.0f} tokens {toward}, "
        f"{target['mean_tokens_rejected']:.0f} {away}, overlap {target['token_overlap']:.2f}, "
        f"{toward} longer in {target['chosen_longer_share']:.0%}"
    )
    return rows


def _held_out(target: Mapping[str, Any], polarity: Polarity) -> dict[str, str]:
    """What ranking to expect, from cross-validation on the pairs."""
    found, toward = target.get("cross_validation"), polarity.toward
    if not found:
        return {"held-out pairs": no_validation_in_words(target)}
    words = (
        f"AUROC {auroc_in_words(found['auroc'], found['interval'])}, the {toward} answer first in "
        f"{found['paired']:.0%}: expect a ranking of about that quality"
    )
    if "planted_recall" in found:
        low, high = found["planted_interval"]
        words += (
            f"; the budget would take {found['planted_recall']:.0%} [{low:.0%}, {high:.0%}] of "
            f"their {toward} answers"
        )
    if not found["by_answers"]:
        words += "; answers repeat, so new ones may rank worse"
    return {"held-out pairs": words}


def _targets(target: Mapping[str, Any]) -> dict[str, str]:
    """Several targets: their pairs, and the cosines of their directions."""
    names = list(target["targets"])
    sizes = [f"{name} {values['pairs']} pairs" for name, values in target["targets"].items()]
    rows = {"targets": ", ".join(sizes)}
    for index, cosines in enumerate(target["cosines"][: min(SHOWN_TARGETS, len(names) - 1)]):
        following = zip(cosines[index + 1 :], names[index + 1 :], strict=True)
        rows[f"cosine {names[index]}"] = ", ".join(
            f"{_figure(cosine, '+.2f')} {name}" for cosine, name in following
        )
    return rows


def _sources(sources: Mapping[str, Mapping[str, int]]) -> str:
    ordered = sorted(sources.items(), key=lambda item: -item[1]["chosen"])
    chosen = [(name, counts) for name, counts in ordered if counts["chosen"]]
    lines = [
        f"{name} {counts['chosen']:,} of {counts['pool']:,}"
        for name, counts in chosen[:SHOWN_SOURCES]
    ]
    if len(chosen) > SHOWN_SOURCES:
        lines.append(f"and {len(chosen) - SHOWN_SOURCES} sources more")
    return ", ".join(lines) or "no source"


def _coverage(coverage: Mapping[str, Any]) -> str:
    """Shares of the choice by group, and pairs that it hardly helps."""
    taken = sorted(coverage["by_group"].items(), key=lambda item: -item[1])
    chosen = sum(coverage["by_group"].values()) + coverage["by_score"]
    shares = [f"{count / max(1, chosen):.0%} ({name})" for name, count in taken[:SHOWN_SOURCES]]
    if len(taken) > SHOWN_SOURCES:
        shares.append("…")
    line = f"{len(taken)} of pairs, by {coverage['rule']}; shares of the choice: "
    line += ", ".join(shares)
    if "pairs" in coverage:
        line += (
            f"; {coverage['hardly_helped']} of {coverage['pairs']} pairs get less than a tenth of "
            "the mean help"
        )
    return line


def _labels(labels: Mapping[str, Any]) -> dict[str, str]:
    """How well a repair finds the rows marked by `--label-field`."""
    return {
        "ranking": f"{_by_baseline(labels)}AUROC {_figure(labels['auroc'])} "
        f"({_figure(labels['auroc_per_token'])} per token), average precision "
        f"{_figure(labels['average_precision'])} "
        f"({_figure(labels['average_precision_per_token'])})",
        "precision": f"{_figure(labels['precision_at_removed'])} of the {labels['removed']:,} "
        f"removed rows with a label are bad, as are {labels['bad']:,} of all {labels['rows']:,} "
        "with one",
    }


def _by_baseline(labels: Mapping[str, Any]) -> str:
    found = labels.get("auroc_rank_by")
    return "" if found is None else f"by --rank-by AUROC {_figure(found)}, by score "


def _curvature(curvature: Mapping[str, Any], choice: Mapping[str, Any]) -> str:
    cosines = ", ".join(
        f"{_figure(value, '.2f')} {name}".strip() for name, value in curvature["cosine"].items()
    )
    name, damping = curvature["name"], curvature["damping"]
    line = f"{name}, damping {damping:g}, cosine before and after {cosines}"
    for compared in choice.get("damping_overlap", ()):
        first, second = compared["dampings"]
        line += f"; best 5% by damping {first} and {second} share {compared['overlap']:.0%}"
    return line


def _rank(rank: Mapping[str, Any]) -> str:
    return (
        f"{rank['rank']}, {rank['energy_kept']:.1%} of the direction's energy, rank correlation "
        f"with the whole {_figure(rank['rank_correlation'], '.3f')} on {rank['rows']} rows"
    )


def _cascade(cascade: Mapping[str, Any]) -> str:
    recall, total = cascade["recall"], cascade["exact"] + cascade["guessed"]
    if not cascade["guessed"]:
        return f"predicted scores do not help here: all {total:,} rows were scored exactly"
    return (
        f"{cascade['exact']:,} of {total:,} rows scored exactly; they hold "
        f"{recall['estimate']:.0%} of the best {cascade['best']:,} [{recall['low']:.0%}, "
        f"{recall['high']:.0%}], estimated from a random sample"
    )


def _training(config: EvaluateConfig, result: Mapping[str, Any]) -> dict[str, str]:
    """The trainings, and the pairs they are measured on."""
    pairs = f"{result['pairs']} held out"
    if result["questions"] < result["pairs"]:
        pairs += f" of {result['questions']} questions"
    if result["pairs_left_out"]:
        pairs += f", {result['pairs_left_out']} left out that the run has seen"
    kind = "all parameters" if config.full else "LoRA"
    seeds = f"{config.seeds} seed{'s' * (config.seeds > 1)}"
    training = f"{result['steps']} steps at {result['rate']:g}, {kind}, {seeds}"
    if result.get("command") == "select":
        tokens = _mean(result["methods"]["prism"]["tokens"])
        training += f"; a ranking trains on the supervised tokens of the choice, {tokens:,.0f}"
    return {"pairs": pairs, "training": training}


def _method(method: Mapping[str, Any], questions: bool) -> str:
    """Figures of one method: means over its trainings."""
    accuracy = f"accuracy {method['accuracy']:.1%}, " if questions else ""
    line = (
        f"gain {method['gain']:.4f}, gap {method['gap']:+.4f}, win rate {method['win_rate']:.1%}, "
        f"{accuracy}log-likelihood of the chosen {method['loglik_chosen']:.4f}"
    )
    if "rows" in method:
        line += f"; {_mean(method['rows']):,.0f} rows"
    for task, values in method.get("tasks", {}).items():
        line += f", {task} {_mean(values):.4f}"
    return line


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _verdict(comparison: Mapping[str, Any]) -> str:
    words = str(comparison["words"])
    return words if "no gain" in words else f"prism is {words}"


def _removals(result: Mapping[str, Any]) -> dict[str, str]:
    """What each share of removed rows gives, and each task before and after training on everything
    and after training on the rest."""
    after, *points = [
        point for point in result["curve"] if point["method"] in ("everything", "prism")
    ]
    words = [
        f"{100 * point['removed']:.4g}% {_over(point['over_random']['gain'])}" for point in points
    ]
    rows = {"curve": f"removed rows, gain over random removal: {'; '.join(words)}"}
    for task, values in result["methods"]["none"].get("tasks", {}).items():
        repaired = ", ".join(
            f"{point['tasks'][task]:.4f} ({100 * point['removed']:.4g}%)" for point in points
        )
        rows[f"curve, {task}"] = (
            f"{_mean(values):.4f} before, {after['tasks'][task]:.4f} after everything, without "
            f"removed rows {repaired}"
        )
    return rows


def _over(gain: Mapping[str, float]) -> str:
    return f"{gain['difference']:+.2g} [{gain['low']:.2g}, {gain['high']:.2g}]"


def _forecast(forecast: Mapping[str, Any]) -> str:
    trainings, correlation = forecast["trainings"], forecast["rank_correlation"]
    if correlation is None:
        return f"none from {trainings} trainings: too few, or all alike"
    return (
        f"rank correlation {correlation:+.2f} between predicted and realised change of the gain, "
        f"over {trainings} trainings"
    )
