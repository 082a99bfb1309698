"""Baseline scores: what each baseline computes, from the rows of a pool to a number for each.

    Texts       what is known of the rows without a model
    Material    the same rows with a model that reads them, and the target's pairs

Choices made here:
- the rows of the pool and of the target are in memory, encoded: nothing is streamed;
- one pass over the pool serves every baseline that reads losses or the last states, and another
  one all that read the states of every layer (hidden_states.py);
- gradients are exact, of the selected parameters, and come from the engine `reverse`;
- all pairs are one target.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from prism_select.core.engines import ENGINES
from prism_select.core.gradients import adding_gradients, minus, norm, zero_sum
from prism_select.core.layers import Direction, Parameters
from prism_select.core.likelihood import Batch, LanguageModel, backward, mean_logliks
from prism_select.core.target_gradient import target_gradient
from prism_select.data.batches import collate, plan_batches
from prism_select.data.encoding import Encoded
from prism_select.directions.pair_encoding import EncodedPairs, as_side
from prism_select.run.errors import BadOption
from prism_select.scoring.batched_engine import BatchedEngine, score_rows, without_norms
from prism_select.scoring.gradient_norms import with_norms
from prism_select.selection import hidden_state_baselines as states
from prism_select.selection.coverage import turns
from prism_select.selection.hidden_states import answer_states, layers_of, own_answers

__all__ = ["Floats", "Material", "Texts"]

Floats: TypeAlias = NDArray[np.float64]
States: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What is known of a pool without a model, row by row.

    `texts` are all turns of a row; `tokens` counts its supervised tokens; `target_texts` are the
    chosen answers of the target with their prompts.
    """

    texts: Sequence[str]
    sources: Sequence[str]
    tokens: NDArray[np.int64]
    target_texts: Sequence[str] = ()
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Material(Texts):
    """The same rows with a model to read them.

    `pairs` are the target's chosen and rejected answers, whose numbers may differ for `contrast`
    alone. `prefix` is what the tokenizer puts before every text (`Encoder.prefix`), `ends` are the
    tokens that end an answer, `folds` the pairs that are held out together, and `scores` PRISM's
    own of the rows.
    """

    model: LanguageModel
    weights: Parameters
    rows: Sequence[Encoded]
    pairs: EncodedPairs
    prefix: Sequence[int] = ()
    ends: Sequence[int] = ()
    folds: Sequence[NDArray[np.int64]] = ()
    scores: Floats | None = None
    likelihood: str = "token"
    batch_tokens: int = 512
    engine: str = "reverse"

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
        return next(self.model.network.parameters()).device

    @cached_property
    def pool_pass(self) -> tuple[Floats, Float[Tensor, "rows width"]]:
        """Losses and mean states of the pool, from one pass that all baselines share."""
        return self.forward_pass(self.rows)

    @cached_property
    def pool_states(self) -> States:
        return self.states(self.rows)

    @cached_property
    def pair_states(self) -> tuple[States, States]:
        return self.states(self.pairs.chosen), self.states(self.pairs.rejected)

    @cached_property
    def own_states(self) -> States:
        """Of the model's own answers to the prompts of the pool."""
        own = own_answers(self.model, self.rows, self.ends, self.batch_tokens, self.seed)
        return self.states(own)

    @torch.no_grad()
    def states(self, rows: Sequence[Encoded]) -> States:
        """[layer, row, width]: mean hidden states over the supervised tokens."""
        layers, order = layers_of(self.model.network), list[int]()
        means: list[list[Tensor]] = [[] for _ in layers]
        for indices, batch in self.batches(rows):
            order += indices
            for of_layer, mean in zip(means, answer_states(self.model, batch, layers), strict=True):
                of_layer.append(mean.float().cpu())
        back = torch.tensor(order).argsort()
        return torch.stack([torch.cat(of_layer)[back] for of_layer in means]).numpy()

    def forward_pass(self, rows: Sequence[Encoded]) -> tuple[Floats, Float[Tensor, "rows width"]]:
        """Of each row the mean loss per supervised token, and the position-weighted mean of the
        last hidden states."""
        pooling, losses, means = _Pooling(self.model), list[Tensor](), list[Tensor]()
        order = list[int]()
        for indices, batch in self.batches(rows):
            losses.append(-mean_logliks(pooling, batch))
            means.append(pooling.means.cpu())
            order += indices
        back = torch.tensor(order).argsort()
        return torch.cat(losses)[back].numpy(), torch.cat(means)[back]

    def batches(self, rows: Sequence[Encoded]) -> Iterator[tuple[list[int], Batch]]:
        """Batches of rows of similar length, each with the indices of its rows."""
        for indices in plan_batches([len(row.tokens) for row in rows], self.batch_tokens):
            yield indices, collate([rows[i] for i in indices], self.device)

    def direction(self, weighting: str) -> Direction:
        """The gradient of the gain of the pairs under a weighting (core/gains.py)."""
        chosen, rejected = (as_side(rows, self.batch_tokens, self.device) for rows in self.pairs)
        return target_gradient(
            self.model, self.weights, (chosen, rejected), weighting, likelihood=self.likelihood
        ).direction

    def along(self, directions: Sequence[Direction]) -> Floats:
        """[row, direction]: ∇loglik · direction."""
        measure = without_norms(ENGINES[self.engine](self.model, self.weights, directions))
        return score_rows(BatchedEngine(measure, self.batch_tokens), self.rows, self.device)[0]

    def cosines(self, direction: Direction) -> Floats:
        """Of ∇loglik and the direction; 0 for a row without a gradient."""
        measure = with_norms(self.model, self.weights, [direction])
        engine = BatchedEngine(measure, self.batch_tokens)
        scores, norms = score_rows(engine, self.rows, self.device)
        assert norms is not None
        return np.asarray(scores[:, 0] / np.where(norms > 0, norms, 1) / norm(direction))


class _Pooling:
    """A language model that also stores, of its last pass, Σ_t t h_t / Σ_t t over the positions
    t = 1, 2, … of each row."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.logits = model, model.logits
        self.network, self.vocabulary = model.network, model.vocabulary

    def hidden(self, batch: Batch) -> Float[Tensor, "batch time width"]:
        states = self.model.hidden(batch)
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        share = ((batch.positions + 1) * batch.real).to(wide)
        self.means = torch.einsum("bt,btw->bw", share / share.sum(1, keepdim=True), wide)
        return states


def random(texts: Texts) -> Floats:
    return np.random.default_rng(texts.seed).random(len(texts.tokens))


def random_by_source(texts: Texts) -> Floats:
    """However many rows are taken, the shares of two sources differ by one row at most."""
    drawn, offsets = np.random.default_rng(texts.seed).random((2, len(texts.tokens)))
    numbers, sources = np.zeros(len(drawn)), np.array(texts.sources, dtype=object)
    for source in dict.fromkeys(texts.sources):
        (rows,) = np.nonzero(sources == source)
        numbers[rows] = -(drawn[rows].argsort().argsort() + offsets[rows]) / len(rows)
    return numbers


def length(texts: Texts) -> Floats:
    return texts.tokens.astype(np.float64)


def bm25(texts: Texts) -> Floats:
    """Mean over the target's chosen answers of Σ_w idf(w) f / (f + k₁ (1 − b + b · words / mean)).

    w runs over the words of the answer, as often as they occur there; f counts w in the row, of
    `words` words; idf = ln(1 + (N − n + ½) / (n + ½)), where n of N rows have w; k₁ = 1.5,
    b = 0.75. Words are runs of letters and digits in lower case, none left out.
    """
    import bm25s

    rows = [_words(text) for text in texts.texts]
    if not any(rows):
        return np.zeros(len(rows))
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75, dtype="float64")
    index.index(rows, show_progress=False)
    query = index.get_tokens_ids([word for text in texts.target_texts for word in _words(text)])
    return np.asarray(index.get_scores_from_ids(query) / max(1, len(texts.target_texts)))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def loss_top(material: Material) -> Floats:
    return material.pool_pass[0]


def loss_mid(material: Material) -> Floats:
    loss = material.pool_pass[0]
    return -np.abs(loss - np.median(loss[np.isfinite(loss)]))


def ifd(material: Material) -> Floats:
    """Mean loss of the answer after its prompt / mean loss of the answer without it.

    Above 1 the prompt does not help: the authors' code drops the row, and here it comes after all
    others, as −IFD. An answer without its prompt is the supervised tokens of the row after what the
    tokenizer puts before every text; without any, the first token has no context and no loss. NaN
    where nothing remains, or a loss is 0.
    """
    with_prompt = material.pool_pass[0]
    answers = [_answer(row, material.prefix) for row in material.rows]
    without_prompt, _ = material.forward_pass(answers)
    nothing = np.full(len(with_prompt), np.nan)
    ratio = np.divide(with_prompt, without_prompt, out=nothing, where=without_prompt > 0)
    return np.asarray(np.where(ratio > 1, -ratio, ratio))


def _answer(row: Encoded, prefix: Sequence[int]) -> Encoded:
    answer = [token for token, counts in zip(row.tokens, row.supervised, strict=True) if counts]
    before = [] if answer[: len(prefix)] == [*prefix] else [*prefix]
    return Encoded([*before, *answer], [False] * len(before) + [True] * len(answer), row.truncated)


def rds(material: Material) -> Floats:
    """Each chosen answer of the target takes, in turn, the row of highest cosine that remains.

    Rows and answers, prompts included, are position-weighted means of their last hidden states. In
    the authors' code a target whose best row is taken already loses that turn.
    """
    pool, target = (
        torch.nn.functional.normalize(means.double(), dim=1)
        for means in (material.pool_pass[1], material.forward_pass(material.pairs[0])[1])
    )
    return turns((pool @ target.T).numpy())


def less(material: Material) -> Floats:
    """The direction is the mean gradient of the target's chosen answers, each a mean over its
    tokens. Exact, at one checkpoint: without LESS's random projection, its warm-up and its Adam
    moments. The authors' code was not compared. A row without a gradient gets 0."""
    return material.cosines(material.direction("unpaired"))


def probe(material: Material) -> Floats:
    return states.probe(*material.pair_states, material.pool_states, material.folds)


def probe_and_score(material: Material) -> Floats:
    assert material.scores is not None
    return standardised(probe(material)) + standardised(material.scores)


def standardised(values: Floats) -> Floats:
    """0 for all where they are equal."""
    centred = values - values.mean()
    return np.asarray(centred / (centred.std() or 1))


def vector_filter(material: Material) -> Floats:
    return states.vector_filter(*material.pair_states, material.pool_states, material.folds)


def projection_difference(material: Material) -> Floats:
    return states.projection_difference(
        *material.pair_states, material.pool_states, material.own_states, material.folds
    )


def concept_influence(material: Material) -> Direction:
    """The gradient of the mean projection of the target's chosen answers on the concept vector, at
    the best layer of those that the selected parameters reach.

    Concept Influence (arXiv 2602.14869) with flat curvature and the row's summed log-likelihood.
    Raises BadOption where no parameter reaches a layer.
    """
    layers, total = layers_of(material.model.network), zero_sum(material.weights)
    chosen = material.pairs.chosen
    with adding_gradients(total, material.weights):
        first = answer_states(material.model, collate(chosen[:1], material.device), layers)
        reached = [layer for layer, mean in enumerate(first) if mean.requires_grad]
        if not reached:
            raise BadOption(
                "concept-influence: no selected parameter is in a block; widen --layers"
            )
        concept = states.choose_vector(*material.pair_states, material.folds, min(reached))
        vector = torch.tensor(concept.linear.weight, device=material.device)
        for _, batch in material.batches(chosen):
            (mean,) = answer_states(material.model, batch, [layers[concept.layer]])
            (mean @ vector.to(mean)).sum().backward()
    return {name: value / len(chosen) for name, value in total.items()}


def first_order(material: Material) -> Direction:
    return material.direction("prism")


def uniform(material: Material) -> Direction:
    return material.direction("uniform")


def hard(material: Material) -> Direction:
    return material.direction("hard")


def unpaired(material: Material) -> Direction:
    return material.direction("unpaired")


def contrast(material: Material) -> Direction:
    """The mean ∇loglik of chosen answers minus that of rejected ones, which need not form pairs.

    Log-likelihoods are summed over tokens, so long answers count more, and no weight depends on the
    model's preference. Rows in place of IF-Guide's tokens, without curvature; read from the
    authors' code, the paper's own equation was not compared.
    """
    chosen, rejected = (_mean_gradient(material, rows) for rows in material.pairs)
    return minus(chosen, rejected)


def _mean_gradient(material: Material, rows: Sequence[Encoded]) -> Direction:
    """Mean ∇loglik, added up in float32 or better."""
    total = zero_sum(material.weights)
    with adding_gradients(total, material.weights):
        for indices, batch in material.batches(rows):
            backward(material.model, batch, torch.ones(len(indices), device=material.device))
    return {name: value / len(rows) for name, value in total.items()}
