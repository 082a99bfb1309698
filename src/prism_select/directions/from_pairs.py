"""Targeting: pairs to directions.

    one target         its direction d, and the half C of its chosen answers
    several targets    d of each, and the mean of their C (where the best target counts: C of each)
    groups of pairs    the mean over targets of a group's own d, which tells how far scores move with the pairs

Choices made here: every pair is pictured on the way (sketching.py), so that every run can say how
far its pairs agree; a pair whose two answers are the same tokens stops the run, since it says
nothing; in a mean of targets each counts alike, whatever its number of pairs."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeAlias

import torch
from torch import Tensor

from prism_select.core.layers import Direction, Parameters
from prism_select.core.target_gradient import (
    Observe,
    Side,
    Target,
    dot,
    minus,
    norm,
    target_gradient,
)
from prism_select.data.batches import collate, plan_batches
from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.records import Pair
from prism_select.data.targets import most_alike
from prism_select.directions.common_part import common_of, without_common
from prism_select.directions.gradient_sketch import Sketcher
from prism_select.directions.layout import DirectionLayout
from prism_select.directions.pair_diagnostics import Diagnosis, diagnose
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import beside_text, select_parameters
from prism_select.run.config import ModelOptions, ScoreConfig
from prism_select.run.errors import BadOption, BadRow, NotFinite
from prism_select.run.progress import Progress

__all__ = [
    "Coded",
    "DirectionSet",
    "PairDiagnosis",
    "aim_at",
    "answers",
    "as_side",
    "encode_sides",
    "joined",
]

Targets: TypeAlias = Mapping[str, Sequence[Pair]]


Coded: TypeAlias = tuple[Sequence[Encoded], Sequence[Encoded]]


@dataclass(frozen=True)
class PairDiagnosis:
    """What some pairs say."""

    pairs: Sequence[Pair]
    target: Target
    diagnosis: Diagnosis


@dataclass(frozen=True)
class DirectionSet:
    """The weights that count, and the directions that rows are scored along; `lines` tells which is
    what. `said` is by target, `whole` is of all together; a saved direction comes without them."""

    weights: Parameters
    directions: Sequence[Direction]
    lines: DirectionLayout
    said: Mapping[str, PairDiagnosis]
    whole: PairDiagnosis | None = None

    @property
    def direction(self) -> Direction:
        """Along which the score lies: the mean of the targets' own; where the best one counts, the
        first's."""
        few = self.directions[: 1 if self.lines.best else len(self.lines.targets)]
        return (
            few[0]
            if len(few) == 1
            else {name: torch.stack([each[name] for each in few]).mean(0) for name in few[0]}
        )

    @cached_property
    def without_gradient(self) -> list[str]:
        """Weights that count and are zero in every direction of a target: no pair has reached
        them."""
        few = self.directions[: len(self.lines.targets)]
        return [
            name for name in self.weights if not any(direction[name].any() for direction in few)
        ]

    @cached_property
    def cosines(self) -> list[list[float]]:
        """Between the directions of the targets."""
        few = self.directions[: len(self.lines.targets)]
        sizes = [norm(direction) or math.nan for direction in few]
        return [
            [dot(a, b) / (m * n) for b, n in zip(few, sizes, strict=True)]
            for a, m in zip(few, sizes, strict=True)
        ]


def aim_at(
    config: ModelOptions, model: CausalLM, encoder: Encoder, targets: Targets, progress: Progress
) -> DirectionSet:
    weights = select_parameters(model.network, config.layers)
    numbers = sum(weight.numel() for weight in weights.values())
    progress.say(f"counted: {len(weights)} weights, {numbers:,} numbers ({config.layers})")
    if beside := sum(map(beside_text(model.network), dict(model.network.named_parameters()))):
        progress.say(f"not counted, since no text passes them: {beside} weights beside the decoder")
    if config.nearest_share < 1:
        targets = {name: most_alike(pairs, config.nearest_share) for name, pairs in targets.items()}
    coded = {name: encode_sides(pairs, encoder) for name, pairs in targets.items()}
    parts = {name: groups_of(config, name, len(pairs)) for name, pairs in targets.items()}
    count = sum(map(len, targets.values()))
    found: dict[str, Gradients] = {}
    with progress.task(f"direction from {count} pairs", None):
        for name, sides in coded.items():
            sketcher = Sketcher(model.network, weights, len(targets[name]), config.seed, count)
            found[name] = gradients_of(config, (model, weights), sides, parts[name], sketcher)
            refuse_not_finite(found[name], targets[name])
    said = {name: found[name].said(config, pairs, coded[name]) for name, pairs in targets.items()}
    whole = next(iter(said.values()))
    if len(said) > 1:
        every = together(list(found.values()))
        pairs = [pair for few in targets.values() for pair in few]
        both = [[row for sides in coded.values() for row in sides[side]] for side in (0, 1)]
        whole = every.said(config, pairs, (both[0], both[1]))
        found[""] = every
    return aimed(config, weights, list(found.values()), said, whole)


@dataclass(frozen=True)
class Gradients:
    """The target of some pairs, the directions of groups of them with their sizes, and their
    pictures."""

    target: Target
    groups: Sequence[Direction]
    sizes: Sequence[int]
    sketches: Mapping[str, torch.Tensor]
    covered_share: float

    def said(self, config: ModelOptions, pairs: Sequence[Pair], sides: Coded) -> PairDiagnosis:
        sketches = self.sketches["chosen"].numpy(), self.sketches["rejected"].numpy()
        tokens = answers(sides[0]), answers(sides[1])
        removed = config.common == "remove"
        told = diagnose(sketches, tokens, self.target, self.covered_share, removed, config.seed)
        return PairDiagnosis(pairs, self.target, told)

    def without_common(self) -> "Gradients":
        common = common_of(self.target)
        size = dot(common, common) or 1.0
        groups = [minus(each, common, dot(each, common) / size) for each in self.groups]
        return replace(self, target=without_common(self.target), groups=groups)


def gradients_of(
    config: ModelOptions,
    counted: tuple[CausalLM, Parameters],
    sides: Coded,
    groups: Sequence[Sequence[int]],
    sketcher: Sketcher,
) -> Gradients:
    """Group by group: the gradients of all pairs are sums of theirs."""
    model, weights = counted
    total: Target | None = None
    kept: list[Direction] = []
    for members in groups:
        batched = [
            as_side([rows[i] for i in members], config.tokens_on(model.device.type), model.device)
            for rows in sides
        ]
        with sketcher.open() as observe:
            part = target_gradient(
                model,
                weights,
                (batched[0], batched[1]),
                config.weighting,
                config.anchor,
                partial(_among, observe, members),
            )
        for sketches in sketcher.sketches.values():
            sketches[list(members)] *= len(members) / len(sides[0])
        kept += [part.direction] if len(groups) > 1 else []
        total = part if total is None else joined(total, part)
    assert total is not None
    order = torch.tensor([pair for members in groups for pair in members]).argsort()
    total = replace(
        total,
        mean_loglik_chosen=total.mean_loglik_chosen[order],
        mean_loglik_rejected=total.mean_loglik_rejected[order],
        weight=total.weight[order],
    )
    return Gradients(
        total, kept, [len(members) for members in groups], sketcher.sketches, sketcher.share
    )


def _among(
    observe: Observe, members: Sequence[int], side: str, pairs: Sequence[int]
) -> Callable[[Tensor], None]:
    return observe(side, [members[pair] for pair in pairs])


def joined(a: Target, b: Target) -> Target:
    """The target of the pairs of `a` and `b`, in this order."""
    return _mean((a, b), (len(a.weight), len(b.weight)))


def together(each: Sequence[Gradients]) -> Gradients:
    """The mean over targets, each counted alike."""
    target = _mean([one.target for one in each], [1] * len(each))
    groups = [
        mean_of(few, [1] * len(each)) for few in zip(*(one.groups for one in each), strict=True)
    ]
    sizes = [sum(few) for few in zip(*(one.sizes for one in each), strict=True)] if groups else []
    sketches = {
        side: torch.cat([one.sketches[side] for one in each]) / len(each)
        for side in each[0].sketches
    }
    return Gradients(target, groups, sizes, sketches, each[0].covered_share)


def _mean(each: Sequence[Target], weights: Sequence[int]) -> Target:
    columns = [
        torch.cat([getattr(one, name) for one in each])
        for name in ("mean_loglik_chosen", "mean_loglik_rejected", "weight")
    ]
    halves = [
        mean_of([getattr(one, side) for one in each], weights) for side in ("chosen", "rejected")
    ]
    return Target(halves[0], halves[1], *columns)


def mean_of(directions: Sequence[Direction], weights: Sequence[int]) -> Direction:
    total = sum(weights)
    return {
        name: sum((w * d[name] for d, w in zip(directions, weights, strict=True)), torch.zeros(()))
        / total
        for name in directions[0]
    }


def aimed(
    config: ModelOptions,
    weights: Parameters,
    found: Sequence[Gradients],
    said: Mapping[str, PairDiagnosis],
    whole: PairDiagnosis,
) -> DirectionSet:
    """Directions in the order of `DirectionLayout`; the last of `found` is of all targets together."""
    used = [each.without_common() if config.common == "remove" else each for each in found]
    best = isinstance(config, ScoreConfig) and config.combine == "max" and len(said) > 1
    scores = [each.target.direction for each in used[: len(said)]]
    chosen = [each.target.chosen for each in (used[: len(said)] if best else used[-1:])]
    groups = used[-1].groups
    lines = DirectionLayout(
        targets=list(said),
        lengths=[norm(direction) for direction in scores],
        best=best,
        groups=used[-1].sizes if groups else (),
    )
    return DirectionSet(weights, [*scores, *chosen, *groups], lines, said, whole)


def groups_of(config: ModelOptions, name: str, pairs: int) -> list[list[int]]:
    """The pairs in random groups of even size, each at most one pair larger; all in one without
    --uncertainty."""
    count = config.uncertainty if isinstance(config, ScoreConfig) else 0
    if count > pairs:
        which = f"target {name} has" if name else "the target has"
        raise BadOption(
            f"--uncertainty {count}: {which} {pairs} pairs; ask for fewer groups, or give more pairs"
        )
    if not count:
        return [list(range(pairs))]
    order = random.Random(config.seed).sample(range(pairs), pairs)
    return [sorted(order[start::count]) for start in range(count)]


def encode_sides(pairs: Sequence[Pair], encoder: Encoder) -> Coded:
    """Raises BadRow for a pair whose two answers are the same tokens."""
    chosen, rejected = (
        [encoder.encode(getattr(pair, side)) for pair in pairs] for side in ("chosen", "rejected")
    )
    for pair, one, other in zip(pairs, chosen, rejected, strict=True):
        if one.tokens == other.tokens:
            advice = "give answers that differ, or raise --max-length"
            raise BadRow(
                pair.chosen.file,
                pair.chosen.line,
                "chosen and rejected are the same tokens",
                advice,
            )
    return chosen, rejected


def answers(rows: Sequence[Encoded]) -> list[list[int]]:
    """Supervised tokens of each row."""
    return [
        [token for token, counts in zip(row.tokens, row.supervised, strict=True) if counts]
        for row in rows
    ]


def as_side(rows: Sequence[Encoded], batch_tokens: int, device: torch.device) -> Side:
    batches = plan_batches([len(row.tokens) for row in rows], batch_tokens)
    return Side(
        [collate([rows[pair] for pair in batch], device) for batch in batches],
        [p for b in batches for p in b],
    )


def refuse_not_finite(found: Gradients, pairs: Sequence[Pair]) -> None:
    """A pair whose gradient is not finite shows in its picture."""
    seen = torch.stack([sketch.isfinite().all(1) for sketch in found.sketches.values()]).all(0)
    for finite, what in ((found.target.gap.isfinite(), "log-likelihood"), (seen, "gradient")):
        for pair, good in zip(pairs, finite.tolist(), strict=True):
            if not good:
                where = f"{pair.chosen.file}:{pair.chosen.line}"
                raise NotFinite(
                    f"{where}: the model gives this pair a {what} that is NaN or infinite; try --dtype float32, or "
                    "leave the pair out"
                )
    length = norm(found.target.direction)
    if not math.isfinite(length) or length == 0:
        raise NotFinite(
            f"the direction of the pairs has length {length}; try --dtype float32, other pairs or other --layers"
        )
