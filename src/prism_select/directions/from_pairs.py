"""From pairs to directions.

    pairs → encoded answers → their products → slopes, of the gain or divided by the pairs'
    curvature → gradients C and R → diagnosis → DirectionSet

    one target         its direction C − R, and the half C of its chosen answers
    several targets    C − R of each, and the mean of their C (with `--combine max`: C of each)

Choices made here:
- products of the answers' gradients (answer_products.py) come first: whatever is said of the pairs,
  and what each counts, follows from them, so every run can say how far its pairs agree;
- in a mean over targets each counts alike, whatever its number of pairs;
- above `IN_FULL` selected numbers, or with --rank, directions are of low rank from the start
  (range_finder.py), as are those of groups in any case; a curvature of the pool needs them in full.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prism_select.core.gains import Slopes
from prism_select.core.gradients import norm
from prism_select.core.layers import Direction, Factored, Parameters
from prism_select.core.target_gradient import Target, weighted_gradient
from prism_select.data.encoding import Encoded
from prism_select.data.records import Pair
from prism_select.directions.answer_products import EXACT, AnswerProducts, answer_products
from prism_select.directions.common_part import without_common
from prism_select.directions.cross_validation import cross_validate, in_layers
from prism_select.directions.direction_set import (
    DirectionSet,
    FullDirection,
    GroupDirections,
    PairDiagnosis,
    mean_direction,
)
from prism_select.directions.layout import DirectionLayout
from prism_select.directions.pair_clusters import (
    PairClusters,
    cluster_coefficients,
    clusters_of,
)
from prism_select.directions.pair_diagnostics import PairWeights, diagnose
from prism_select.directions.pair_encoding import (
    EncodedPairs,
    as_side,
    encode_sides,
    notes_on,
    refuse_truncated,
    supervised_tokens,
)
from prism_select.directions.pair_folds import groups_of
from prism_select.directions.range_finder import low_rank_directions
from prism_select.directions.tuning import Tuning, tune
from prism_select.directions.way import way_of, with_way
from prism_select.directions.weighed_pairs import Targets, WeighedPairs, joined, weighed
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import adapter_names, beside_text, select_parameters
from prism_select.models.loading import LoadedModel
from prism_select.run.config import (
    BESIDE_PAIRS,
    TUNABLE,
    DirectionOptions,
    ScoreConfig,
    SelectConfig,
)
from prism_select.run.config_pairs import PairsConfig
from prism_select.run.errors import NotFinite
from prism_select.run.polarity import Polarity
from prism_select.run.progress import Progress
from prism_select.run.thresholds import UNCOVERED

__all__ = [
    "RANK",
    "direction_by_products",
    "directions_from_pairs",
    "products_of",
    "starting_rank",
]

RANK, IN_FULL = 64, 2**28  # numbers: a direction of as many takes 1 GB in float32
GROUP_RANK = 16  # of the direction of some pairs alone
COMPARED = 32  # rows

ONE_GROUP = (
    "--groups: the pairs' gradients do not part into groups, so the choice follows one direction; "
    "a number, --groups 4 say, asks for so many"
)


def directions_from_pairs(
    config: ScoreConfig | PairsConfig,
    loaded: LoadedModel,
    targets: Targets,
    progress: Progress,
    sample: Sequence[Encoded] = (),
) -> DirectionSet:
    """`sample` are rows on which a low rank is compared with the full direction. Raises BadRow for
    a pair that says nothing, BadFile for answers most of which are truncated, NotFinite for a pair
    whose gradient is lost."""
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
    every = [pair for pairs in targets.values() for pair in pairs]
    of_targets = [k for k, pairs in enumerate(targets.values()) for _ in pairs]
    with progress.task(f"direction from {len(every)} pairs", None):
        rank = starting_rank(config, weights)
        compared = sample[:COMPARED] if rank and 2 * len(every) + COMPARED <= EXACT else []
        with_rows = products_of(config, model, weights, [*encoded.values()], compared)
        products = with_rows.of(range(2 * len(every)))
        refuse_not_finite(every, products)
        tuning = None
        if config.tuned:
            fixed = set(TUNABLE) - {*config.tuned}
            start, groups = way_of(config), groups_of(every)
            tuning = tune(products, start, fixed, groups, config.seed, of_targets)
            line = tuned_in_words(config, tuning)
            progress.say(line)
            notes += [] if tuning else [line]
        if tuning:
            config = with_way(config, tuning.chosen.way, tuning.options)
            weights = select_parameters(model.network, config.layers)
            products, with_rows = (in_layers(p, config.layers) for p in (products, with_rows))
        parts = weighed(config, targets, encoded, products)
        clusters = clusters_in(config, parts)
        if clusters and clusters.count < 2 and getattr(config, "groups", None):
            notes += [ONE_GROUP]
        task = PairDirections(config, model, weights, parts, clusters)
        found = task.of_low_rank(rank) if rank else task.in_full()
        notes += found.notes
        full = full_direction(task, rank, with_rows, compared) if rank else None
    diagnoses = {name: diagnosed(config, parts[name], g) for name, g in found.gradients.items()}
    overall = next(iter(diagnoses.values()))
    if len(parts) > 1:
        overall = diagnosed(config, joined([*parts.values()], products), found.joint, of_targets)
    if tuning:
        overall = replace(overall, cross_validation=tuning.nested)
    cosines = None
    if config.curvature == "pairs":
        cosines = {name: parts[name].cosine for name in targets}
    lengths = [norm(direction) for direction in found.scores]
    layout = DirectionLayout(targets=list(parts), lengths=lengths, best=task.best)
    every_direction = [*found.scores, *found.halves]
    grouped = GroupDirections(clusters, found.groups) if clusters and found.groups else None
    return DirectionSet(
        weights, every_direction, layout, diagnoses, overall, notes, cosines, tuning, grouped, full
    )


def starting_rank(config: ScoreConfig | PairsConfig, weights: Parameters) -> int | None:
    """The rank that directions have from the start; None where they are made in full."""
    rank = "auto"
    if isinstance(config, ScoreConfig):
        rank = "full" if config.curvature in BESIDE_PAIRS else config.rank
    if rank == "auto":
        return RANK if sum(weight.numel() for weight in weights.values()) > IN_FULL else None
    return None if rank == "full" else int(rank)


def clusters_in(
    config: ScoreConfig | PairsConfig, parts: Mapping[str, WeighedPairs]
) -> PairClusters | None:
    """Of the only target, where the choice serves groups. Raises BadOption for more groups than
    pairs."""
    if not isinstance(config, SelectConfig) or not config.has_groups:
        return None
    (part,) = parts.values()
    return clusters_of(part.products, way_of(config), config.group_count, config.seed)


class Found(NamedTuple):
    """The gradient of each target, that of all, directions that rows are scored along, and their
    halves."""

    gradients: Mapping[str, Target]
    joint: Target
    scores: Sequence[Factored]
    halves: Sequence[Factored]
    groups: Sequence[Factored]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class PairDirections:
    """From weighed pairs to directions, in full or of low rank from the start."""

    config: ScoreConfig | PairsConfig
    model: CausalLM
    weights: Parameters
    parts: Mapping[str, WeighedPairs]
    clusters: PairClusters | None

    @property
    def best(self) -> bool:
        """Whether the highest score of several targets counts."""
        is_max = isinstance(self.config, ScoreConfig) and self.config.combine == "max"
        return is_max and len(self.parts) > 1

    def in_full(self) -> Found:
        config, model, weights = self.config, self.model, self.weights
        gradients = {n: gradient_of(config, model, weights, p) for n, p in self.parts.items()}
        notes = [note for n, g in gradients.items() for note in uncovered(self.parts[n], g)]
        joint = mean_target([*gradients.values()])
        halves = [gradient.chosen for gradient in (gradients.values() if self.best else [joint])]
        scores = [direction_of(config, gradient) for gradient in gradients.values()]
        return Found(gradients, joint, scores, halves, self.of_groups(), notes)

    def of_low_rank(self, rank: int) -> Found:
        parts, without_common = [*self.parts.values()], self.config.common == "remove"
        scores = [self.spread(part, part.coefficients(without_common)) for part in parts]
        halves = [self.spread(part, part.half) for part in parts]
        halves = halves if self.best else [torch.stack(halves).mean(0)]
        low = self.along(torch.stack([*scores, *halves]), rank)
        for direction in low[: len(parts)]:
            refuse_lost(norm(direction))
        gradients = {name: part.without_gradient for name, part in self.parts.items()}
        joint, groups = mean_target([*gradients.values()]), self.of_groups()
        return Found(gradients, joint, low[: len(parts)], low[len(parts) :], groups)

    def along(
        self, coefficients: Float[Tensor, "directions answers"], rank: int
    ) -> Sequence[Factored]:
        """Σ_a coefficient_a ∇mean_loglik(a) of low rank, for each row."""
        model, parts = self.model, self.parts.values()
        rows = [row for part in parts for row in part.encoded.chosen]
        rows += [row for part in parts for row in part.encoded.rejected]
        batch_tokens = self.config.tokens_on(model.device.type, model.size)
        side = as_side(rows, batch_tokens, model.device)
        return low_rank_directions(model, self.weights, side, coefficients, rank)

    def of_groups(self) -> Sequence[Factored]:
        """The direction of each group of pairs, of low rank in any case."""
        if self.clusters is None or self.clusters.count < 2:
            return []
        (part,) = self.parts.values()
        found, count = list[Tensor](), len(part.pairs)
        for group in range(self.clusters.count):
            pairs = self.clusters.members(group)
            every = torch.zeros(2 * count, dtype=torch.float64)
            own = cluster_coefficients(part.products, way_of(self.config), pairs)
            every[[*pairs, *(count + pair for pair in pairs)]] = own
            found.append(every)
        return self.along(torch.stack(found), GROUP_RANK)

    def spread(self, part: WeighedPairs, own: Float[Tensor, " some"]) -> Float[Tensor, " answers"]:
        """Numbers of a target's answers among those of all: the chosen ones come first."""
        sides = [
            torch.cat(
                [
                    half if other is part else torch.zeros(len(other.pairs)).double()
                    for other in self.parts.values()
                ]
            )
            for half in own.split(len(part.pairs))
        ]
        return torch.cat(sides)


def full_direction(
    task: PairDirections, rank: int, products: AnswerProducts, rows: Sequence[Encoded]
) -> FullDirection:
    """Of the first target; `products` are of its answers and then of the rows."""
    part = next(iter(task.parts.values()))
    own = task.spread(part, part.coefficients(task.config.common == "remove"))
    along = products.total[:, : len(own)] @ own
    length = float((own @ along[: len(own)]).sqrt()) if products.exact else math.nan
    scores = (along * products.tokens)[len(own) :]
    return FullDirection(rank, length, rows, scores.numpy())


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


def tuned_in_words(config: ScoreConfig | PairsConfig, tuning: Tuning | None) -> str:
    if tuning is None:
        return f"--tune {config.tune}: too few questions for cross-validation; nothing was tuned"
    chosen, first = tuning.chosen, tuning.tried[0]
    values = ", ".join(f"{name} {getattr(chosen.way, name)}" for name in tuning.options)
    return (
        f"tuned on the pairs, {len(tuning.tried)} ways: {values} (AUROC of held-out pairs "
        f"{chosen.auroc:.2f}, with the defaults {first.auroc:.2f}, at best {tuning.best.auroc:.2f})"
    )


def products_of(
    config: ScoreConfig | PairsConfig,
    model: CausalLM,
    weights: Parameters,
    encoded: Sequence[EncodedPairs],
    rows: Sequence[Encoded] = (),
) -> AnswerProducts:
    """Of the chosen answers of all targets, then of the rejected ones, then of other rows."""
    answers = [row for pairs in encoded for row in pairs.chosen]
    answers += [row for pairs in encoded for row in pairs.rejected]
    answers += rows
    side = as_side(answers, config.tokens_on(model.device.type, model.size), model.device)
    return answer_products(model, weights, side)


def gradient_of(
    config: ScoreConfig | PairsConfig,
    model: CausalLM,
    weights: Parameters,
    part: WeighedPairs,
) -> Target:
    """C and R of all pairs. Raises NotFinite where the direction is lost."""
    batch_tokens = config.tokens_on(model.device.type, model.size)
    chosen, rejected = (as_side(rows, batch_tokens, model.device) for rows in part.encoded)
    target = weighted_gradient(model, weights, (chosen, rejected), part.logliks, part.slopes)
    refuse_lost(norm(target.direction))
    return replace(target, weight=part.weight)


def refuse_lost(length: float) -> None:
    if not math.isfinite(length) or length == 0:
        raise NotFinite(
            f"the direction of the pairs has length {length}; try --dtype float32, other pairs or "
            "other --layers"
        )


def direction_by_products(
    config: ScoreConfig | PairsConfig,
    model: CausalLM,
    weights: Parameters,
    encoded: EncodedPairs,
    coefficients: Float[Tensor, " answers"],
) -> Direction:
    """Σ_a coefficient_a ∇mean_loglik(a); the chosen answers come first."""
    batch_tokens = config.tokens_on(model.device.type, model.size)
    chosen, rejected = (as_side(rows, batch_tokens, model.device) for rows in encoded)
    count, unknown = len(encoded.chosen), torch.zeros(0)  # log-likelihoods, not needed here
    up, down = (count * coefficients).split(count)
    slopes = Slopes(up, -down)  # of a mean over pairs
    target = weighted_gradient(model, weights, (chosen, rejected), (unknown, unknown), slopes)
    return target.direction


def uncovered(part: WeighedPairs, target: Target) -> list[str]:
    """A warning where the direction's length is not what the products say."""
    length = norm(target.direction)
    share = 1 - part.length / length if part.products.exact else 0.0
    if abs(share) < UNCOVERED:
        return []
    return [
        f"cross-validation and shares miss {abs(share):.0%} of the direction's length: some "
        "selected parameters are used in a way that they do not follow"
    ]


def refuse_not_finite(pairs: Sequence[Pair], products: AnswerProducts) -> None:
    count = len(pairs)
    finite = {
        "log-likelihood": products.mean_loglik.isfinite(),
        "gradient": products.total.diagonal().isfinite(),
    }
    for quantity, of_answers in finite.items():
        of_pairs = of_answers[:count] & of_answers[count:]
        for pair, is_finite in zip(pairs, of_pairs.tolist(), strict=True):
            if not is_finite:
                raise NotFinite(
                    f"{pair.chosen.file}:{pair.chosen.line}: the model gives this pair a "
                    f"{quantity} that is NaN or infinite; try --dtype float32, or leave the pair "
                    "out"
                )


def mean_target(targets: Sequence[Target]) -> Target:
    """All targets together: the mean of their gradients, each counted alike."""
    if len(targets) == 1:
        return targets[0]
    return Target(
        mean_direction([target.chosen for target in targets]),
        mean_direction([target.rejected for target in targets]),
        torch.cat([target.loglik_chosen for target in targets]),
        torch.cat([target.loglik_rejected for target in targets]),
        torch.cat([target.weight for target in targets]),
    )


def diagnosed(
    config: ScoreConfig | PairsConfig,
    part: WeighedPairs,
    target: Target,
    of_targets: Sequence[int] | None = None,
) -> PairDiagnosis:
    """`of_targets` is the target of each pair, where there are several."""
    alone, validation = any(pair.alone for pair in part.pairs), None
    if not alone:
        validation = cross_validate(
            part.products, way_of(config), groups_of(part.pairs), config.seed, of_targets
        )
    diagnosis = diagnose(
        target,
        PairWeights(part.products.total.numpy(), part.first_order, part.slopes),
        (supervised_tokens(part.encoded.chosen), supervised_tokens(part.encoded.rejected)),
        without_common=config.common == "remove",
        seed=config.seed,
    )
    cut = [
        [
            row.truncated and pair.alone in ("", side)
            for row, pair in zip(rows, part.pairs, strict=True)
        ]
        for side, rows in zip(("chosen", "rejected"), part.encoded, strict=True)
    ]
    diagnosis = diagnosis.without_comparisons if alone else diagnosis
    diagnosis = replace(diagnosis, truncated_chosen=sum(cut[0]), truncated_rejected=sum(cut[1]))
    return PairDiagnosis(part.pairs, target, diagnosis, cut[0], cut[1], validation)


def direction_of(config: DirectionOptions, target: Target) -> Direction:
    """C − R, with the common part projected out where `config` says so."""
    return (without_common(target) if config.common == "remove" else target).direction
