"""TODO."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prism_select.run.config import sides_of
from prism_select.run.config_evaluate import EvaluateConfig
from prism_select.run.config_pairs import PairsConfig

__all__ = ["evaluation_summary", "failed", "pairs_summary", "summary"]


def _figure(value: float | None, spec: str = ".3f") -> str:
    """null in a manifest is a figure that has no value: the AUROC of labels that are all the same,
    say."""
    return "undefined" if value is None else format(value, spec)


def target_lines(target: Mapping[str, Any], swapped: bool) -> dict[str, str]:
    """What the pairs say, as the manifest's `target` has it; `swapped` pairs by the names of the
    target file."""
    sides = sides_of(swapped)
    rows = {
        "pairs": f"{target['pairs']}, mean preference for the {sides[0]} {target['mean_preference']:.3f}, above one "
        f"half in {target['preferred_share']:.0%}, {target['effective_pairs']:.1f} effective"
    }
    if target["split_half_agreement"] is not None:
        low, high = target["agreement_spread"]
        wanted = target["pairs_for_half_agreement"]
        more = f"; about {wanted:,} pairs for 0.50" if wanted else ""
        rows["agreement"] = (
            f"two halves agree at {target['split_half_agreement']:.2f} (splits {low:.2f} to {high:.2f}){more}"
        )
    rows["common part"] = (
        f"{target['common_part']:.1f} times what tells the two answers of a pair apart"
    )
    rows["answers"] = (
        f"{target['mean_tokens_chosen']:.0f} tokens {sides[0]}, {target['mean_tokens_rejected']:.0f} {sides[1]}, "
        f"overlap {target['token_overlap']:.2f}, {sides[0]} longer in {target['chosen_longer_share']:.0%}"
    )
    return rows


def pairs_summary(config: PairsConfig, told: Any) -> dict[str, str]:
    """The final table of `prism pairs`: of a file that was made, or of a diagnosis."""
    if config.check:
        warnings = {f"warning {place + 1}": line for place, line in enumerate(told["warnings"])}
        first = ", ".join(
            f"{each['pair']} ({_figure(each['share'], '.0%')})" for each in told["dominant_pairs"]
        )
        return {**target_lines(told, swapped=False), "largest shares": f"pairs {first}", **warnings}
    rows = {"read": f"{told.rows:,} rows", "pairs": f"{told.pairs:,} by {config.how}"}
    for place, (reason, count) in enumerate(
        sorted(told.skipped.items(), key=lambda item: -item[1])
    ):
        rows[f"no pair {place + 1}"] = f"{count:,} rows: {reason}"
    rows["files"] = f"{told.path}, {told.path}.skipped.jsonl"
    return rows


def several_lines(target: Mapping[str, Any]) -> dict[str, str]:
    """How several targets stand to each other: the cosines of their directions."""
    if "cosines" not in target:
        return {}
    names = list(target["targets"])
    rows = {
        "targets": ", ".join(
            f"{name} {told['pairs']} pairs" for name, told in target["targets"].items()
        )
    }
    for place, cosines in enumerate(target["cosines"][: min(8, len(names) - 1)]):
        others = zip(cosines[place + 1 :], names[place + 1 :], strict=True)
        rows[f"cosine {names[place]}"] = ", ".join(
            f"{_figure(c, '+.2f')} {other}" for c, other in others
        )
    return rows


def layers_line(told: Mapping[str, Any]) -> str:
    most = sorted(told["share"].items(), key=lambda item: -item[1])[:3]
    line = "most is added by " + ", ".join(f"{name} ({share:.0%})" for name, share in most)
    if "cuts" in told:
        by_name = {cut["name"]: cut["auroc"] for cut in told["cuts"]}
        best = f"--layers {told['suggestion']} ranks these {told['rows']} rows best, AUROC {told['cuts'][0]['auroc']:.3f}"
        line += f"; {best} (all: {by_name['all']:.3f})"
    return line


def curvature_line(told: Mapping[str, Any], choice: Mapping[str, Any]) -> str:
    cosines = ", ".join(
        f"{_figure(value, '.2f')} {name}".strip() for name, value in told["cosine"].items()
    )
    line = f"{told['name']}, damping {told['damping']:g}, cosine before and after {cosines}"
    if told["residual"] is not None:
        line += f", residual {told['residual']:.1e}"
    for pair in choice.get("damping_overlap", ()):
        a, b = pair["dampings"]
        line += f"; best 5% by damping {a} and {b} share {pair['overlap']:.0%}"
    return line


def cascade_line(told: Mapping[str, Any]) -> str:
    recall, rows = told["recall"], told["exact"] + told["guessed"]
    if not told["guessed"]:
        return f"a guess does not help here: all {rows:,} rows were scored exactly"
    return (
        f"{told['exact']:,} of {rows:,} rows scored exactly; they hold {recall['estimate']:.0%} of the best "
        f"{told['best']:,} [{recall['low']:.0%}, {recall['high']:.0%}], as a random sample tells it"
    )


def page_line(run: Path) -> str:
    page = run / "report.html"
    return str(page) if page.exists() else f"none; prism report {run} makes it"


def summary(path: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """The final table: what was read and chosen, what the pairs say, how it was computed, where the
    files are."""
    counts, target, engine, choice = (
        manifest[key] for key in ("counts", "target", "engine", "choice")
    )
    extra = [f"{counts[name]:,} {name}" for name in ("quarantined", "truncated") if counts[name]]
    rows = {"read": ", ".join([f"{counts['read']:,} rows", *extra])}
    told = {
        name: counts[name]
        for name in counts
        if name not in ("read", "scored", "quarantined", "truncated")
    }
    told = {
        name: count
        for name, count in told.items()
        if count or name not in ("near duplicate", "source cap")
    }
    rows["verdicts"] = (
        ", ".join(f"{count:,} {name}" for name, count in told.items())
        or f"{counts['scored']:,} scored"
    )
    if "pairs" in target:
        rows |= target_lines(target, manifest["score"]["swapped"])
    rows |= several_lines(target)
    if len(choice["sources"]) > 1 and manifest["command"] != "score":
        shares = sorted(choice["sources"].items(), key=lambda item: -item[1]["chosen"])
        told_of = [
            f"{name} {s['chosen']:,} of {s['pool']:,}" for name, s in shares[:6] if s["chosen"]
        ]
        left = sum(bool(s["chosen"]) for _, s in shares[6:])
        taken = "removed of" if manifest["command"] == "repair" else "chosen of"
        rows[taken] = (
            ", ".join([*told_of, *[f"and {left} sources more"] * bool(left)]) or "no source"
        )
    if labels := choice.get("labels"):
        rows["ranking"] = (
            f"AUROC {_figure(labels['auroc'])} ({_figure(labels['auroc_per_token'])} per token), average precision "
            f"{_figure(labels['average_precision'])} ({_figure(labels['average_precision_per_token'])})"
        )
        share = _figure(labels["precision_at_removed"])
        rows["precision"] = (
            f"{share} of the {labels['removed']:,} removed rows with a label are bad, as are {labels['bad']:,} of all "
            f"{labels['rows']:,} with one"
        )
    by_length = choice["rank_correlation_with_tokens"].items()
    rows["length"] = "rank correlation with tokens " + ", ".join(
        f"{_figure(r, '+.2f')} ({how})" for how, r in by_length
    )
    if manifest["curvature"]["name"] != "flat":
        rows["curvature"] = curvature_line(manifest["curvature"], choice)
    if cut := manifest.get("rank"):
        rows["rank"] = (
            f"{cut['rank']}, {cut['energy_kept']:.1%} of the direction's energy, rank correlation with the whole "
            f"{_figure(cut['rank_correlation'], '.3f')} on {cut['rows']} rows"
        )
    if "cascade" in manifest:
        rows["cascade"] = cascade_line(manifest["cascade"])
    if "layers" in manifest:
        rows["layers"] = layers_line(manifest["layers"])
    if "stable_share" in choice:
        rows["stability"] = (
            f"{choice['stable_share']:.0%} of the chosen rows are chosen in 90% or more of resamples of the pairs"
        )
    rows["engine"] = (
        f"{engine['name']} in {engine['dtype']}, off by {engine['check']['disagreement']:.1e}"
    )
    rows["time"] = (
        f"{manifest['timings']['total']:.1f} s, of which scoring {manifest['timings']['score']:.1f} s"
    )
    for place, line in enumerate(manifest["warnings"]):
        rows[f"warning {place + 1}"] = line
    rows["report"] = page_line(path)
    rows["files"] = f"{path}: " + ", ".join(sorted(p.name for p in path.iterdir() if p.is_file()))
    return rows


def evaluation_summary(config: EvaluateConfig, told: Mapping[str, Any]) -> dict[str, str]:
    """The final table of `prism evaluate`: each method, prism against each rival, the forecast, the
    controls."""
    left = (
        f", {told['pairs_left_out']} left out that the run has seen"
        if told["pairs_left_out"]
        else ""
    )
    kind = "all weights" if config.full else "LoRA"
    several = told["questions"] < told["pairs"]
    of = f" of {told['questions']} questions" if several else ""
    rows = {
        "pairs": f"{told['pairs']} held out{of}{left}",
        "training": f"{told['steps']} steps at {told['rate']:g}, {kind}, {config.seeds} seed{'s' * (config.seeds > 1)}",
    }
    for name, each in told["methods"].items():
        size = f"; {sum(each['rows']) / len(each['rows']):,.0f} rows" if "rows" in each else ""
        right = f"accuracy {each['accuracy']:.1%}, " if several else ""
        rows[name] = (
            f"gain {each['gain']:.4f}, gap {each['gap']:+.4f}, win rate {each['win_rate']:.1%}, {right}log-likelihood "
            f"of the chosen {each['loglik_chosen']:.4f}{size}"
        )
        for task, values in each.get("tasks", {}).items():
            rows[name] += f", {task} {sum(values) / len(values):.4f}"
    for place, each in enumerate(told["against"].values()):
        rows[f"verdict {place + 1}"] = (
            f"prism is {each['words']}" if "no gain" not in each["words"] else each["words"]
        )
    forecast = told["forecast"]
    rows["forecast"] = (
        f"none told from {forecast['trainings']} trainings: too few, or all alike"
        if forecast["rank_correlation"] is None
        else f"rank correlation {forecast['rank_correlation']:+.2f} between predicted and realised change of the gain, "
        f"over {forecast['trainings']} trainings"
    )
    if spent := told["compute"]:
        rows["compute"] = spent["words"]
    if lds := told["lds"]:
        rows["LDS"] = (
            f"{_figure(lds['lds'])} [{_figure(lds['low'])}, {_figure(lds['high'])}] over {config.lds} halves"
        )
    if told["labels"]:
        best = sorted(told["labels"].items(), key=lambda item: -(item[1] or 0.0))
        rows["labels"] = "AUROC " + ", ".join(f"{_figure(value)} {name}" for name, value in best)
    rows |= {f"control {place + 1}": each["words"] for place, each in enumerate(told["controls"])}
    files = {"report": page_line(Path(config.run)), "files": f"{config.run}/evaluation"}
    return rows | {"time": f"{told['seconds']:.1f} s", **files}


def failed(told: Mapping[str, Any]) -> set[str]:
    """The rows of the table that tell a control which failed."""
    return {
        f"control {place + 1}" for place, each in enumerate(told["controls"]) if not each["holds"]
    }
