"""From pairs to directions.

    pairs → encoded answers → their products → slopes, of the gain or divided by the pairs'
    curvature → gradients C and R → diagnosis → DirectionSet

    one target         its direction C − R, and the half C of its chosen answers
    several targets    C − R of each, and the mean of their C (with `--combine max`: C of each)

Choices made here:
- products of the answers' gradients (answer_products.py) come first: whatever is said of the pairs,
  and what each counts, follows from them, so every run can say how far its pairs agree;
- in a mean over targets each counts alike, whatever its number of pairs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prism_select.core.gains import Slopes
from prism_select.core.gradients import norm
from prism_select.core.layers import Direction, Parameters
from prism_select.core.target_gradient import Target, weighted_gradient
from prism_select.data.records import Pair
from prism_select.directions.answer_products import AnswerProducts, answer_products
from prism_select.directions.common_part import without_common
from prism_select.directions.cross_validation import cross_validate, in_layers
from prism_select.directions.direction_set import (
    DirectionSet,
    GroupDirections,
    PairDiagnosis,
    mean_direction,
)
from prism_select.directions.layout import DirectionLayout
from prism_select.directions.pair_clusters import cluster_coefficients, clusters_of
from prism_select.directions.pair_curvature import pair_slopes
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
from prism_select.directions.tuning import Tuning, tune
from prism_select.directions.way import way_of, with_way
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import adapter_names, beside_text, select_parameters
from prism_select.models.loading import LoadedModel
from prism_select.run.config import TUNABLE, DirectionOptions, ScoreConfig, SelectConfig
from prism_select.run.config_pairs import PairsConfig
from prism_select.run.errors import NotFinite
from prism_select.run.polarity import Polarity
from prism_select.run.progress import Progress
from prism_select.run.thresholds import UNCOVERED

__all__ = ["direction_by_products", "directions_from_pairs", "products_of"]

Targets: TypeAlias = Mapping[str, Sequence[Pair]]

ONE_GROUP = (
    "--groups: the pairs' gradients do not part into groups, so the choice follows one direction; "
    "a number, --groups 4 say, asks for so many"
)


@dataclass(frozen=True)
class WeighedPairs:
    """Some pairs, the products of their answers, and what each pair counts: `first_order` are the
    slopes of the gain, `slopes` those after the pairs' curvature."""

    pairs: Sequence[Pair]
    encoded: EncodedPairs
    products: AnswerProducts
    first_order: Slopes
    slopes: Slopes
    likelihood: str

    @property
    def lengths(self) -> Float[Tensor, " answers"]:
        """What turns the mean log-likelihood of a token into the likelihood of the options."""
        return self.products.lengths(self.likelihood)

    @property
    def logliks(self) -> tuple[Tensor, Tensor]:
        """Of the chosen and of the rejected answers, by the likelihood of the options; NaN where
        there is none."""
        chosen, rejected = (self.lengths * self.products.mean_loglik).split(len(self.pairs))
        return (
            chosen.where(~self.is_alone("rejected"), math.nan),
            rejected.where(~self.is_alone("chosen"), math.nan),
        )

    @property
    def weight(self) -> Float[Tensor, " pairs"]:
        """Slope of the gain, by the log-likelihood of the chosen answer, or of the only one."""
        chosen, rejected = self.first_order
        slope = torch.where(self.is_alone("rejected"), rejected, chosen)
        return slope / self.lengths[: len(self.pairs)]

    def is_alone(self, side: str) -> Bool[Tensor, " pairs"]:
        """Whether a pair has no answer but that of this side."""
        return torch.tensor([pair.alone == side for pair in self.pairs])

    @property
    def length(self) -> float:
        """Of the direction, by the products."""
        direction = torch.cat([self.slopes.chosen, -self.slopes.rejected]) / len(self.pairs)
        return float((direction @ self.products.total @ direction).sqrt())

    @property
    def cosine(self) -> float:
        """Between the direction before the pairs' curvature and after it."""
        total = self.products.total
        a, b = (torch.cat([s.chosen, -s.rejected]) for s in (self.first_order, self.slopes))
        return float(a @ total @ b / ((a @ total @ a) * (b @ total @ b)).sqrt())


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
    every = [pair for pairs in targets.values() for pair in pairs]
    of_targets = [k for k, pairs in enumerate(targets.values()) for _ in pairs]
    with progress.task(f"direction from {len(every)} pairs", None):
        products = products_of(config, model, weights, [*encoded.values()])
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
            products = in_layers(products, config.layers)
        parts = weighed(config, targets, encoded, products)
        gradients = {name: gradient_of(config, model, weights, parts[name]) for name in targets}
        notes += [note for name, g in gradients.items() for note in uncovered(parts[name], g)]
        grouped: GroupDirections | None = None
        if isinstance(config, SelectConfig) and config.has_groups:
            (part,) = parts.values()
            grouped = group_directions(config, model, weights, part)
            notes += [ONE_GROUP] if grouped is None else []
    diagnoses = {name: diagnosed(config, parts[name], g) for name, g in gradients.items()}
    joint, overall = next(iter(gradients.values())), next(iter(diagnoses.values()))
    if len(gradients) > 1:
        joint = mean_target([*gradients.values()])
        overall = diagnosed(config, joined([*parts.values()], products), joint, of_targets)
    if tuning:
        overall = replace(overall, cross_validation=tuning.nested)
    cosines = None
    if config.curvature == "pairs":
        cosines = {name: parts[name].cosine for name in targets}
    best = isinstance(config, ScoreConfig) and config.combine == "max" and len(gradients) > 1
    scores = [direction_of(config, gradient) for gradient in gradients.values()]
    halves = [gradient.chosen for gradient in (gradients.values() if best else [joint])]
    lengths = [norm(direction) for direction in scores]
    layout = DirectionLayout(targets=list(gradients), lengths=lengths, best=best)
    return DirectionSet(
        weights, [*scores, *halves], layout, diagnoses, overall, notes, cosines, tuning, grouped
    )


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
) -> AnswerProducts:
    """Of the chosen answers of all targets, and then of the rejected ones."""
    answers = [row for pairs in encoded for row in pairs.chosen]
    answers += [row for pairs in encoded for row in pairs.rejected]
    side = as_side(answers, config.tokens_on(model.device.type), model.device)
    return answer_products(model, weights, side)


def weighed(
    config: ScoreConfig | PairsConfig,
    targets: Targets,
    encoded: Mapping[str, EncodedPairs],
    products: AnswerProducts,
) -> dict[str, WeighedPairs]:
    """Each target's pairs with their own curvature."""
    parts, start, count = dict[str, WeighedPairs](), 0, sum(map(len, targets.values()))
    for name, pairs in targets.items():
        chosen = range(start, start := start + len(pairs))
        own = products.of([*chosen, *(count + pair for pair in chosen)])
        way = replace(way_of(config), curvature="flat")
        first_order, slopes = pair_slopes(way, own), pair_slopes(way_of(config), own)
        if pairs[0].alone == "rejected":  # away from the only answer; both sides are the same
            first_order, slopes = Slopes(*reversed(first_order)), Slopes(*reversed(slopes))
        own_pairs = (pairs, encoded[name], own)
        parts[name] = WeighedPairs(*own_pairs, first_order, slopes, config.likelihood)
    return parts


def gradient_of(
    config: ScoreConfig | PairsConfig,
    model: CausalLM,
    weights: Parameters,
    part: WeighedPairs,
) -> Target:
    """C and R of all pairs. Raises NotFinite where the direction is lost."""
    batch_tokens = config.tokens_on(model.device.type)
    chosen, rejected = (as_side(rows, batch_tokens, model.device) for rows in part.encoded)
    target = weighted_gradient(model, weights, (chosen, rejected), part.logliks, part.slopes)
    length = norm(target.direction)
    if not math.isfinite(length) or length == 0:
        raise NotFinite(
            f"the direction of the pairs has length {length}; try --dtype float32, other pairs or "
            "other --layers"
        )
    return replace(target, weight=part.weight)


def group_directions(
    config: SelectConfig, model: CausalLM, weights: Parameters, part: WeighedPairs
) -> GroupDirections | None:
    """None where the pairs are one group. Raises BadOption for more groups than pairs."""
    way = way_of(config)
    clusters = clusters_of(part.products, way, config.group_count, config.seed)
    if clusters.count < 2:
        return None
    directions = list[Direction]()
    for group in range(clusters.count):
        pairs = clusters.members(group)
        own = EncodedPairs(*([side[pair] for pair in pairs] for side in part.encoded))
        counts = cluster_coefficients(part.products, way, pairs)
        directions.append(direction_by_products(config, model, weights, own, counts))
    return GroupDirections(clusters, directions)


def direction_by_products(
    config: ScoreConfig,
    model: CausalLM,
    weights: Parameters,
    encoded: EncodedPairs,
    coefficients: Float[Tensor, " answers"],
) -> Direction:
    """Σ_a coefficient_a ∇mean_loglik(a); the chosen answers come first."""
    batch_tokens = config.tokens_on(model.device.type)
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
    return Target(
        mean_direction([target.chosen for target in targets]),
        mean_direction([target.rejected for target in targets]),
        torch.cat([target.loglik_chosen for target in targets]),
        torch.cat([target.loglik_rejected for target in targets]),
        torch.cat([target.weight for target in targets]),
    )


def joined(parts: Sequence[WeighedPairs], products: AnswerProducts) -> WeighedPairs:
    """The pairs of all targets. Slopes are scaled, so that the mean over all pairs is that over
    targets."""
    pairs = [pair for part in parts for pair in part.pairs]
    encoded = EncodedPairs(
        [row for part in parts for row in part.encoded.chosen],
        [row for part in parts for row in part.encoded.rejected],
    )
    scales = [len(pairs) / len(part.pairs) / len(parts) for part in parts]

    def together(slopes: Sequence[Slopes]) -> Slopes:
        scaled = [(c * by, r * by) for (c, r), by in zip(slopes, scales, strict=True)]
        return Slopes(*map(torch.cat, zip(*scaled, strict=True)))

    first_order, slopes = (
        together([p.first_order for p in parts]),
        together([p.slopes for p in parts]),
    )
    return WeighedPairs(pairs, encoded, products, first_order, slopes, parts[0].likelihood)


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
