"""From pairs to directions.

    pairs → encoded answers → their products → slopes, of the gain or divided by the pairs'
    curvature → directions (pair_directions.py) → diagnosis → DirectionSet

    one target         its direction C − R, and the half C of its chosen answers
    several targets    C − R of each, and the mean of their C (with `--combine max`: C of each)

Choices made here:
- products of the answers' gradients (answer_products.py) come first: whatever is said of the pairs,
  and what each counts, follows from them, so every run can say how far its pairs agree;
- in a mean over targets each counts alike, whatever its number of pairs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from prism_select.core.gradients import norm
from prism_select.core.layers import Parameters, is_large
from prism_select.core.target_gradient import Target
from prism_select.data.encoding import Encoded
from prism_select.data.records import Pair
from prism_select.directions.answer_products import EXACT, AnswerProducts, answer_products
from prism_select.directions.cross_validation import cross_validate, in_layers
from prism_select.directions.direction_set import (
    DirectionSet,
    FullDirection,
    GroupDirections,
    PairDiagnosis,
)
from prism_select.directions.layout import DirectionLayout
from prism_select.directions.pair_clusters import PairClusters, clusters_of
from prism_select.directions.pair_diagnostics import PairWeights, diagnose
from prism_select.directions.pair_directions import RANK, PairDirections
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
from prism_select.directions.weighed_pairs import Targets, WeighedPairs, joined, weighed
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import adapter_names, beside_text, select_parameters
from prism_select.models.loading import LoadedModel
from prism_select.run.config import BESIDE_PAIRS, TUNABLE, ScoreConfig, SelectConfig
from prism_select.run.config_pairs import PairsConfig
from prism_select.run.errors import NotFinite
from prism_select.run.polarity import Polarity
from prism_select.run.progress import Progress

__all__ = ["directions_from_pairs", "products_of", "starting_rank"]

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
    diagnoses, overall = diagnoses_of(config, parts, products, of_targets)
    if tuning:
        overall = replace(overall, cross_validation=tuning.nested)
    cosines = None
    if config.curvature == "pairs":
        cosines = {name: parts[name].cosine for name in targets}
    lengths = [norm(direction) for direction in found.scores]
    layout = DirectionLayout(
        targets=list(parts), lengths=lengths, best=task.best, halves=bool(found.halves)
    )
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
        return RANK if is_large(weights) else None
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


def diagnoses_of(
    config: ScoreConfig | PairsConfig,
    parts: Mapping[str, WeighedPairs],
    products: AnswerProducts,
    of_targets: Sequence[int],
) -> tuple[dict[str, PairDiagnosis], PairDiagnosis]:
    """Of each target, and of all together."""
    targets = {name: part.without_gradient for name, part in parts.items()}
    diagnoses = {name: diagnosed(config, part, targets[name]) for name, part in parts.items()}
    if len(parts) == 1:
        return diagnoses, next(iter(diagnoses.values()))
    every_pair = joined([*parts.values()], products)
    return diagnoses, diagnosed(config, every_pair, of_all([*targets.values()]), of_targets)


def of_all(targets: Sequence[Target]) -> Target:
    """The pairs of all targets, without a gradient."""
    columns = zip(*((t.loglik_chosen, t.loglik_rejected, t.weight) for t in targets), strict=True)
    return Target({}, {}, *map(torch.cat, columns))


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
