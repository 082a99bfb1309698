"""From pairs to directions.

    pairs → encoded sides → gradients C and R, with a sketch of each pair's own → diagnosis →
    DirectionSet

    one target         its direction C − R, and the half C of its chosen answers
    several targets    C − R of each, and the mean of their C (with `--combine max`: C of each)

Choices made here:
- a pair's gradient is sketched in the same backward pass (gradient_sketch.py), so every run can say
  how far its pairs agree;
- a pair whose two answers are the same tokens stops the run, because it says nothing; so do pairs
  that lose the end of most answers of one side, because they say how long an answer is;
- in a mean over targets each counts alike, whatever its number of pairs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor

from prism_select.core.gradients import norm
from prism_select.core.layers import Direction, Parameters
from prism_select.core.target_gradient import Side, Target, target_gradient
from prism_select.data.batches import collate, plan_batches
from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.encoding_notes import encoding_notes
from prism_select.data.records import Pair
from prism_select.directions.common_part import without_common
from prism_select.directions.direction_set import (
    DirectionSet,
    PairDiagnosis,
    mean_direction,
)
from prism_select.directions.gradient_sketch import Sketcher
from prism_select.directions.layout import DirectionLayout
from prism_select.directions.pair_curvature import divide_by_pairs
from prism_select.directions.pair_diagnostics import diagnose
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import adapter_names, beside_text, select_parameters
from prism_select.models.loading import LoadedModel
from prism_select.run.config import DirectionOptions, ScoreConfig
from prism_select.run.config_pairs import PairsConfig
from prism_select.run.errors import BadFile, BadRow, NotFinite
from prism_select.run.options import Options
from prism_select.run.polarity import Polarity
from prism_select.run.progress import Progress

__all__ = ["EncodedPairs", "as_side", "directions_from_pairs", "encode_sides", "supervised_tokens"]

Targets: TypeAlias = Mapping[str, Sequence[Pair]]


class EncodedPairs(NamedTuple):
    """Both answers of the same pairs, each with its prompt."""

    chosen: Sequence[Encoded]
    rejected: Sequence[Encoded]


@dataclass(frozen=True)
class TargetGradient:
    """The pairs of one target, the sum of their gradients, and a sketch of each pair's own."""

    pairs: Sequence[Pair]
    encoded: EncodedPairs
    target: Target
    sketches: Mapping[str, Tensor]
    covered_share: float  # of the selected parameters that sketches cover


def directions_from_pairs(
    config: ScoreConfig | PairsConfig, loaded: LoadedModel, targets: Targets, progress: Progress
) -> DirectionSet:
    """Raises BadRow for a pair that says nothing, BadFile for answers most of which are truncated,
    NotFinite for a pair whose gradient is lost."""
    model, encoder = loaded.model, loaded.encoder
    weights = select_parameters(model.network, config.layers)
    say_selected(model, weights, config.layers, progress)
    encoded = {name: encode_sides(pairs, encoder) for name, pairs in targets.items()}
    for name, pairs in targets.items():
        refuse_truncated(pairs, encoded[name], encoder, Polarity.of_config(config))
    notes = [
        note for name in targets for note in notes_on(name, targets[name], encoded[name], encoder)
    ]
    for note in notes:
        progress.say(note)
    count = sum(map(len, targets.values()))
    gradients: dict[str, TargetGradient] = {}
    with progress.task(f"direction from {count} pairs", None):
        for name, pairs in targets.items():
            sketcher = Sketcher(model.network, weights, len(pairs), config.seed, count)
            target = gradient_of(config, model, weights, encoded[name], sketcher)
            gradients[name] = TargetGradient(
                pairs, encoded[name], target, sketcher.sketches, sketcher.covered_share
            )
            refuse_not_finite(gradients[name])
    diagnoses = {name: diagnosed(config, g, config.seed) for name, g in gradients.items()}
    overall = next(iter(diagnoses.values()))
    if len(gradients) > 1:
        overall = diagnosed(config, joined(list(gradients.values())), config.seed)
    cosines = None
    if uses_pair_curvature(config):
        with progress.task("dividing by the pairs' curvature", None):
            gradients, cosines = divided(config, model, weights, gradients)
    joint = next(iter(gradients.values()))
    if len(gradients) > 1:
        joint = joined(list(gradients.values()))
    best = isinstance(config, ScoreConfig) and config.combine == "max" and len(gradients) > 1
    scores = [direction_of(config, g.target) for g in gradients.values()]
    halves = [g.target.chosen for g in (gradients.values() if best else [joint])]
    lengths = [norm(direction) for direction in scores]
    layout = DirectionLayout(targets=list(gradients), lengths=lengths, best=best)
    return DirectionSet(weights, [*scores, *halves], layout, diagnoses, overall, notes, cosines)


def say_selected(model: CausalLM, weights: Parameters, layers: str, progress: Progress) -> None:
    numbers = sum(weight.numel() for weight in weights.values())
    progress.say(f"selected: {len(weights)} parameters, {numbers:,} numbers ({layers})")
    is_beside = beside_text(model.network)
    if beside := sum(is_beside(name) for name, _ in model.network.named_parameters()):
        progress.say(
            f"not selected, since no text passes them: {beside} parameters beside the decoder"
        )
    if apart := len(adapter_names(model.network) - weights.keys()):
        progress.say(f"not selected: {apart} parameters of the adapter that is kept apart")


def encode_sides(pairs: Sequence[Pair], encoder: Encoder) -> EncodedPairs:
    """Raises BadRow for a pair whose two answers are the same tokens."""
    chosen = [encoder.encode(pair.chosen) for pair in pairs]
    rejected = [encoder.encode(pair.rejected) for pair in pairs]
    for pair, a, b in zip(pairs, chosen, rejected, strict=True):
        if a.tokens == b.tokens:
            raise BadRow(
                pair.chosen.file,
                pair.chosen.line,
                "chosen and rejected are the same tokens" + _lost(a, b),
                "give answers that differ, or raise --max-length",
            )
    return EncodedPairs(chosen, rejected)


def _lost(*answers: Encoded) -> str:
    """What the template leaves out of answers that differ in it."""
    losses = sorted({loss for answer in answers for loss in answer.losses})
    return f": the template leaves out their {' and '.join(losses)}" if losses else ""


def notes_on(
    name: str, pairs: Sequence[Pair], encoded: EncodedPairs, encoder: Encoder
) -> list[str]:
    """What encoding does to both sides of a target's pairs."""
    examples = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
    rows = [row for rows in zip(*encoded, strict=True) for row in rows]
    label = f"target {name}" if name else "pairs"
    notes = encoding_notes(encoder, examples, rows, label)
    if repeated := sum(pair.repeated for pair in pairs):
        notes.append(
            f"{label}: both answers begin with their prompt again in {repeated:,} of "
            f"{len(pairs):,} pairs: it is cut off"
        )
    return notes


def refuse_truncated(
    pairs: Sequence[Pair], encoded: EncodedPairs, encoder: Encoder, polarity: Polarity
) -> None:
    """Raises BadFile where more than half of the chosen or of the rejected answers lose their
    end."""
    names = (polarity.toward, polarity.away)
    counts = {
        name: sum(row.truncated for row in rows) for name, rows in zip(names, encoded, strict=True)
    }
    for name, count in counts.items():
        if 2 * count > len(pairs):
            raise BadFile(
                pairs[0].chosen.file,
                None,
                f"{count} of {len(pairs)} {name} answers lose their end, being cut to "
                f"{encoder.max_length} tokens with their prompts",
                "raise --max-length as far as the model goes, shorten the prompts, or leave long "
                "pairs out",
            )


def gradient_of(
    config: ScoreConfig | PairsConfig,
    model: CausalLM,
    weights: Parameters,
    encoded: EncodedPairs,
    sketcher: Sketcher,
) -> Target:
    """C and R of all pairs; the sketcher sketches each pair's share of them."""
    batch_tokens = config.tokens_on(model.device.type)
    chosen, rejected = (as_side(rows, batch_tokens, model.device) for rows in encoded)
    with sketcher.open() as observe:
        return target_gradient(
            model, weights, (chosen, rejected), config.weighting, config.anchor, observe
        )


def uses_pair_curvature(config: Options) -> TypeGuard[ScoreConfig]:
    return isinstance(config, ScoreConfig) and config.curvature == "pairs"


def divided(
    config: ScoreConfig,
    model: CausalLM,
    weights: Parameters,
    gradients: Mapping[str, TargetGradient],
) -> tuple[dict[str, TargetGradient], dict[str, float]]:
    """Each target's gradient divided by the curvature of its own pairs, and the cosine between
    before and after. Raises NotFinite where the direction is lost."""
    targets, cosines = dict[str, TargetGradient](), dict[str, float]()
    for name, gradient in gradients.items():
        batch_tokens, damping = config.tokens_on(model.device.type), config.dampings[0]
        chosen, rejected = (as_side(rows, batch_tokens, model.device) for rows in gradient.encoded)
        result = divide_by_pairs(
            config, model, weights, (chosen, rejected), gradient.target, damping
        )
        targets[name], cosines[name] = replace(gradient, target=result.target), result.cosine
        refuse_not_finite(targets[name])
    return targets, cosines


def target_of(
    config: ScoreConfig, model: CausalLM, weights: Parameters, encoded: EncodedPairs
) -> Target:
    """C and R of some pairs, divided by their curvature where the options say so."""
    batch_tokens = config.tokens_on(model.device.type)
    chosen, rejected = (as_side(rows, batch_tokens, model.device) for rows in encoded)
    sides = chosen, rejected
    target = target_gradient(model, weights, sides, config.weighting, config.anchor)
    if not uses_pair_curvature(config):
        return target
    return divide_by_pairs(config, model, weights, sides, target, config.dampings[0]).target


def as_side(rows: Sequence[Encoded], batch_tokens: int, device: torch.device) -> Side:
    """One side of the pairs, in batches of rows of like length."""
    plan = plan_batches([len(row.tokens) for row in rows], batch_tokens)
    batches = [collate([rows[pair] for pair in batch], device) for batch in plan]
    return Side(batches, [pair for batch in plan for pair in batch])


def refuse_not_finite(gradient: TargetGradient) -> None:
    """A pair whose gradient is not finite shows in its sketch."""
    sketched = torch.stack([sketch.isfinite().all(1) for sketch in gradient.sketches.values()])
    finite = {"log-likelihood": gradient.target.gap.isfinite(), "gradient": sketched.all(0)}
    for quantity, of_pairs in finite.items():
        for pair, is_finite in zip(gradient.pairs, of_pairs.tolist(), strict=True):
            if not is_finite:
                raise NotFinite(
                    f"{pair.chosen.file}:{pair.chosen.line}: the model gives this pair a "
                    f"{quantity} that is NaN or infinite; try --dtype float32, or leave the pair "
                    "out"
                )
    length = norm(gradient.target.direction)
    if not math.isfinite(length) or length == 0:
        raise NotFinite(
            f"the direction of the pairs has length {length}; try --dtype float32, other pairs or "
            "other --layers"
        )


def joined(gradients: Sequence[TargetGradient]) -> TargetGradient:
    """All targets together: the mean of their gradients, each counted alike."""
    targets = [gradient.target for gradient in gradients]
    target = Target(
        mean_direction([target.chosen for target in targets]),
        mean_direction([target.rejected for target in targets]),
        torch.cat([target.mean_loglik_chosen for target in targets]),
        torch.cat([target.mean_loglik_rejected for target in targets]),
        torch.cat([target.weight for target in targets]),
    )
    encoded = EncodedPairs(
        [row for gradient in gradients for row in gradient.encoded.chosen],
        [row for gradient in gradients for row in gradient.encoded.rejected],
    )
    sketches = {
        side: torch.cat([gradient.sketches[side] for gradient in gradients]) / len(gradients)
        for side in gradients[0].sketches
    }
    pairs = [pair for gradient in gradients for pair in gradient.pairs]
    return TargetGradient(pairs, encoded, target, sketches, gradients[0].covered_share)


def diagnosed(config: DirectionOptions, gradient: TargetGradient, seed: int) -> PairDiagnosis:
    diagnosis = diagnose(
        gradient.target,
        (gradient.sketches["chosen"].numpy(), gradient.sketches["rejected"].numpy()),
        (supervised_tokens(gradient.encoded.chosen), supervised_tokens(gradient.encoded.rejected)),
        gradient.covered_share,
        without_common=config.common == "remove",
        seed=seed,
    )
    cut = [[row.truncated for row in rows] for rows in gradient.encoded]
    diagnosis = replace(diagnosis, truncated_chosen=sum(cut[0]), truncated_rejected=sum(cut[1]))
    return PairDiagnosis(gradient.pairs, gradient.target, diagnosis, *cut)


def supervised_tokens(rows: Sequence[Encoded]) -> list[list[int]]:
    return [
        [token for token, counts in zip(row.tokens, row.supervised, strict=True) if counts]
        for row in rows
    ]


def direction_of(config: DirectionOptions, target: Target) -> Direction:
    """C − R, with the common part projected out where `config` says so."""
    return (without_common(target) if config.common == "remove" else target).direction
