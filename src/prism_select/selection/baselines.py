"""Baselines: the rivals of PRISM. Each gives every row of a pool a number; the highest are taken
first.

    random      a number drawn                       random-by-source    the same share of every source
    length      supervised tokens                    bm25                words shared with the target
    loss-top    mean loss per supervised token       loss-mid            −|loss − median of the pool|
    ifd         loss after the prompt / loss alone   rds                 minus the turn in which a target takes the row
    uniform, hard, unpaired    ∇loglik · direction of another gain (core/gains.py)
    less        cosine of ∇loglik and the direction of the chosen answers
    contrast    ∇loglik · (mean ∇loglik of chosen answers − mean ∇loglik of rejected answers)

Choices made here: the rows of the pool are in memory, encoded, as are those of the target: nothing
is streamed. One pass over the pool serves every rival that only reads, another every rival that
goes along a direction. Gradients are exact and come from the engine `reverse`. Equal numbers keep
the order of the pool; NaN takes no part. All pairs are one target."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from prism_select.core.engines import ENGINES
from prism_select.core.layers import Direction, Parameters
from prism_select.core.likelihood import Batch, LanguageModel, backward, mean_logliks
from prism_select.core.target_gradient import differentiable, minus, norm, target_gradient
from prism_select.data.batches import collate, plan_batches
from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.pool import Pool
from prism_select.data.records import Example, Pair
from prism_select.data.targets import most_alike
from prism_select.directions.from_pairs import Coded, as_side, encode_sides
from prism_select.models.causal_lm import CausalLM
from prism_select.models.layer_selection import select_parameters
from prism_select.run.config import ScoreConfig
from prism_select.run.errors import BadOption, BadRow
from prism_select.scoring.batched_engine import BatchedEngine, of_rows, plainly
from prism_select.scoring.gradient_norms import with_norms
from prism_select.selection.rules import round_robin

__all__ = [
    "BASELINES",
    "COUNT_BASELINES",
    "TEXT_RIVALS",
    "Material",
    "Texts",
    "rank",
    "rankings",
    "refuse_baselines",
]

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What can be known of a pool without a model, row by row: its text, all turns of it; where it
    came from; how many of its tokens are supervised. `wanted` are the texts of the target's chosen
    sides, prompts included."""

    texts: Sequence[str]
    sources: Sequence[str]
    tokens: NDArray[np.int64]
    wanted: Sequence[str] = ()
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Material(Texts):
    """The same rows with a model to read them; `pairs` are the target's chosen and rejected sides,
    which may differ in number for `contrast` alone. `prefix` is what the tokenizer puts before
    every text (`Encoder.prefix`)."""

    model: LanguageModel
    weights: Parameters
    rows: Sequence[Encoded]
    pairs: Coded
    prefix: Sequence[int] = ()
    batch_tokens: int = 512
    engine: str = "reverse"

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    @cached_property
    def read(self) -> tuple[Floats, Float[Tensor, "rows width"]]:
        """Of each row of the pool, read once for all rivals."""
        return self.reading(self.rows)

    def reading(self, rows: Sequence[Encoded]) -> tuple[Floats, Float[Tensor, "rows width"]]:
        """Mean loss per supervised token, and the position-weighted mean of the last hidden
        states."""
        pooling, losses, means = _Pooling(self.model), list[Tensor](), list[Tensor]()
        order = list[int]()
        for places, batch in self.batches(rows):
            losses.append(-mean_logliks(pooling, batch))
            means.append(pooling.means.cpu())
            order += places
        back = torch.tensor(order).argsort()
        return torch.cat(losses)[back].numpy(), torch.cat(means)[back]

    def batches(self, rows: Sequence[Encoded]) -> Iterator[tuple[list[int], Batch]]:
        for places in plan_batches([len(row.tokens) for row in rows], self.batch_tokens):
            yield places, collate([rows[place] for place in places], self.device)

    def direction(self, weighting: str) -> Direction:
        chosen, rejected = (as_side(rows, self.batch_tokens, self.device) for rows in self.pairs)
        return target_gradient(self.model, self.weights, (chosen, rejected), weighting).direction

    def along(self, directions: Sequence[Direction]) -> Floats:
        """[row, direction]: ∇loglik · direction."""
        engine = ENGINES[self.engine](self.model, self.weights, directions)
        return of_rows(BatchedEngine(plainly(engine), self.batch_tokens), self.rows, self.device)[0]

    def cosines(self, direction: Direction) -> Floats:
        """Of ∇loglik and the direction; 0 for a row without a gradient."""
        measure = BatchedEngine(
            with_norms(self.model, self.weights, [direction]), self.batch_tokens
        )
        scores, norms = of_rows(measure, self.rows, self.device)
        assert norms is not None
        return np.asarray(scores[:, 0] / np.where(norms > 0, norms, 1) / norm(direction))


class _Pooling:
    """A language model that keeps, of its last pass, Σ_t t h_t / Σ_t t over the places t = 1, 2, …
    of each row."""

    def __init__(self, model: LanguageModel) -> None:
        self.network, self.vocabulary, self.model, self.logits = (
            model.network,
            model.vocabulary,
            model,
            model.logits,
        )

    def hidden(self, batch: Batch) -> Float[Tensor, "batch time width"]:
        states = self.model.hidden(batch)
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        share = ((batch.positions + 1) * batch.real).to(wide)
        self.means = torch.einsum("bt,btw->bw", share / share.sum(1, keepdim=True), wide)
        return states


def random(texts: Texts) -> Floats:
    """Every row alike: the same numbers for the same seed."""
    return np.random.default_rng(texts.seed).random(len(texts.tokens))


def random_by_source(texts: Texts) -> Floats:
    """Random within each source, and of each source the same share but for one row, however many
    rows are taken: stratified sampling with proportional allocation (Cochran 1977, chapter 5)."""
    drawn, offsets = np.random.default_rng(texts.seed).random((2, len(texts.tokens)))
    found, sources = np.zeros(len(drawn)), np.array(texts.sources, dtype=object)
    for source in dict.fromkeys(texts.sources):
        (there,) = np.nonzero(sources == source)
        found[there] = -(drawn[there].argsort().argsort() + offsets[there]) / len(there)
    return found


def length(texts: Texts) -> Floats:
    """Supervised tokens, the longest answer first. Source: Zhao et al. 2024 (arXiv 2402.04833), by
    whole rows."""
    return texts.tokens.astype(np.float64)


def bm25(texts: Texts) -> Floats:
    """Mean over the target's chosen sides of Σ_w idf(w) f / (f + k₁ (1 − b + b · words / mean
    words)), where w runs over the side's words, as often as they stand there, and f counts w in the
    row; idf = ln(1 + (N − n + ½) / (n + ½)), n of N rows have w; k₁ = 1.5, b = 0.75. Words are runs
    of letters and digits in lower case, none left out.

    Source: Robertson and Zaragoza 2009, with Lucene's idf, which is never negative; a rival of LESS
    (arXiv 2402.04333)."""
    import bm25s

    rows = [_words(text) for text in texts.texts]
    if not any(rows):
        return np.zeros(len(rows))
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75, dtype="float64")
    index.index(rows, show_progress=False)
    asked = index.get_tokens_ids([word for text in texts.wanted for word in _words(text)])
    return np.asarray(index.get_scores_from_ids(asked) / max(1, len(texts.wanted)))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def loss_top(material: Material) -> Floats:
    """Mean loss per supervised token, in nats: the rows of highest perplexity first. Source: arXiv
    2309.04564 (top)."""
    return material.read[0]


def loss_mid(material: Material) -> Floats:
    """The rows whose mean loss is nearest to the median of the pool. Source: arXiv 2309.04564
    (middle)."""
    loss = material.read[0]
    return -np.abs(loss - np.median(loss[np.isfinite(loss)]))


def ifd(material: Material) -> Floats:
    """Instruction-following difficulty: mean loss of the answer after its prompt / mean loss of the
    answer alone. Above 1 the prompt is no help, and the authors' code drops the row: here it comes
    after all others, turned to −IFD.

    Alone are the supervised tokens of a row, with what the tokenizer puts before every text;
    without any, the first has no context and no loss. NaN where that leaves nothing, or a loss of
    0. Source: Li et al. 2023 (arXiv 2308.12032)."""
    given, (alone, _) = (
        material.read[0],
        material.reading([_alone(row, material.prefix) for row in material.rows]),
    )
    found = np.divide(given, alone, out=np.full(len(given), np.nan), where=alone > 0)
    return np.asarray(np.where(found > 1, -found, found))


def _alone(row: Encoded, prefix: Sequence[int]) -> Encoded:
    answer = [token for token, counts in zip(row.tokens, row.supervised, strict=True) if counts]
    before = [] if answer[: len(prefix)] == [*prefix] else [*prefix]
    return Encoded([*before, *answer], [False] * len(before) + [True] * len(answer), row.truncated)


def rds(material: Material) -> Floats:
    """RDS+: rows and the target's chosen sides, prompts included, as position-weighted means of
    their last hidden states; each target takes, in turn, the row of highest cosine that is left.
    Source: Ivison et al. 2025 (arXiv 2503.01807); in their code a target whose best row is taken
    already loses that turn."""
    pool, target = (
        torch.nn.functional.normalize(means.double(), dim=1)
        for means in (material.read[1], material.reading(material.pairs[0])[1])
    )
    return round_robin((pool @ target.T).numpy())


def less(material: Material) -> Floats:
    """LESS: cosine of a row's gradient and the mean gradient of the target's chosen answers, each a
    mean over its tokens. Source: Xia et al. 2024 (arXiv 2402.04333). Here exact over the weights
    that count, at one checkpoint, and without their random projection, their warm-up and their Adam
    moments; their code was not compared. A row without a gradient gets 0."""
    return material.cosines(material.direction("unpaired"))


def uniform(material: Material) -> Direction:
    """PRISM's score with every pair weighted alike (core/gains.py)."""
    return material.direction("uniform")


def hard(material: Material) -> Direction:
    """PRISM's score with pairs weighted as in DPO, those not yet learned most (core/gains.py; arXiv
    2305.18290)."""
    return material.direction("hard")


def unpaired(material: Material) -> Direction:
    """PRISM's score with chosen answers alone (core/gains.py): what a first-order influence on
    their loss is."""
    return material.direction("unpaired")


def contrast(material: Material) -> Direction:
    """Two groups without pairs: ∇loglik(row) · (mean ∇loglik of chosen answers − mean ∇loglik of
    rejected ones), each mean over its own group. Log-likelihoods are summed over tokens, so long
    answers count more, and nothing is weighted by preference. Source: IF-Guide's differential
    attribution (arXiv 2506.01790), by rows, with a flat curvature, read from their code: the
    paper's own equation was not compared."""
    chosen, rejected = (_mean_gradient(material, rows) for rows in material.pairs)
    return minus(chosen, rejected)


def _mean_gradient(material: Material, rows: Sequence[Encoded]) -> Direction:
    """Mean ∇loglik, added up in float32 or better."""
    total = {
        name: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for name, weight in material.weights.items()
    }
    with differentiable(material.weights):
        for places, batch in material.batches(rows):
            backward(material.model, batch, torch.ones(len(places), device=material.device))
            for name, weight in material.weights.items():
                if weight.grad is not None:
                    total[name] += weight.grad.to(total[name].dtype)
                    weight.grad = None
    return {name: value / len(rows) for name, value in total.items()}


COUNT_BASELINES: Mapping[str, Callable[[Texts], Floats]] = {  # which need no text
    "random": random,
    "random-by-source": random_by_source,
    "length": length,
}


TEXT_RIVALS: Mapping[str, Callable[[Texts], Floats]] = {**COUNT_BASELINES, "bm25": bm25}


MODEL_RIVALS: Mapping[str, Callable[[Material], Floats]] = {
    "loss-top": loss_top,
    "loss-mid": loss_mid,
    "ifd": ifd,
    "rds": rds,
    "less": less,
}


GRADIENT_RIVALS: Mapping[str, Callable[[Material], Direction]] = {
    "uniform": uniform,
    "hard": hard,
    "unpaired": unpaired,
    "contrast": contrast,
}


BASELINES = (*TEXT_RIVALS, *MODEL_RIVALS, *GRADIENT_RIVALS)


def rank(names: Sequence[str], material: Material) -> dict[str, Floats]:
    """Of each rival, a number for each row."""
    found = {name: TEXT_RIVALS[name](material) for name in names if name in TEXT_RIVALS}
    found |= {name: MODEL_RIVALS[name](material) for name in names if name in MODEL_RIVALS}
    if along := [name for name in names if name in GRADIENT_RIVALS]:
        scores = material.along([GRADIENT_RIVALS[name](material) for name in along])
        found |= {name: scores[:, place] for place, name in enumerate(along)}
    return found


WITHOUT_TARGET = (*COUNT_BASELINES, "loss-top", "loss-mid", "ifd")


def refuse_baselines(
    option: str, names: Sequence[str], target: bool, known: Sequence[str] = BASELINES
) -> None:
    """Raises BadOption for a rival that nobody knows, or that needs pairs where there are none."""
    for name in names:
        if name not in known:
            raise BadOption(f"{option} {name}: unknown; try some of {', '.join(known)}")
        if name in BASELINES and name not in WITHOUT_TARGET and not target:
            raise BadOption(
                f"{option} {name}: needs pairs, and a saved direction has none; give --target"
            )


def rankings(
    names: Sequence[str],
    config: ScoreConfig,
    loaded: tuple[CausalLM, Encoder],
    pool: Pool,
    targets: Mapping[str, Sequence[Pair]],
) -> dict[str, Floats]:
    """Of each rival a number for every row of the pool, the highest first; `targets` are the pairs
    as the run has them, in repair exchanged already."""
    model, encoder = loaded
    pairs = [pair for each in targets.values() for pair in most_alike(each, config.nearest_share)]
    rows, texts, sources, places, count = list[Encoded](), list[str](), list[str](), list[int](), 0
    for count, (_, example) in enumerate(pool.rows(), start=1):
        with suppress(BadRow):
            if isinstance(example, Example):
                rows.append(encoder.encode(example))
                texts.append(example.text)
                sources.append(example.source or "")
                places.append(count - 1)
    material = Material(
        texts=texts,
        sources=sources,
        tokens=np.array([row.targets for row in rows]),
        wanted=[pair.chosen.text for pair in pairs],
        seed=config.seed,
        model=model,
        weights=select_parameters(model.network, config.layers),
        rows=rows,
        pairs=encode_sides(pairs, encoder),
        prefix=encoder.prefix,
        batch_tokens=config.tokens_on(model.device.type),
        engine=config.first_engine,
    )
    found = {name: np.full(count, np.nan) for name in names}
    for name, numbers in rank(names, material).items():
        found[name][places] = numbers
    return found
