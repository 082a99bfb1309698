"""Answer products: inner products of the gradients of single answers, block by block.

    g_a = ∇mean_loglik(answer a)        G_ab = g_a · g_b, for each block and for the rest

    a matrix           g_a = Σ_t l_t r_tᵀ over the tokens of the answer. Factors l, r are collected
                       in a pass over the answers; then g of all answers is formed for some rows of
                       the matrix at a time, and multiplied with itself. Where tokens are few beside
                       its size, Σ_ts (l_t · l_s)(r_t · r_s) instead
    norms, biases      g_a of the module alone, in the same pass
    other parameters   g_a by autograd, an answer at a time: fused experts

Everything about pairs is linear in their answers: whatever weights the pairs get, the direction's
products with any answer, and its length, follow from G.

Choices made here:
- on a CPU one pass collects all factors, and those beyond `HELD` bytes wait in a temporary file, up
  to half of the free disk; on a GPU as many matrices are collected in a pass as `HELD`, or half of
  its weights, have room for;
- products are formed in float32 or better and add up in float64;
- above `EXACT` answers, gradients are multiplied with random signs and `FOLDED` numbers added up to
  one, before they are multiplied: without bias, with an error of one over the root of the numbers
  that remain. Other parameters are folded as far as `OTHERS` asks for.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prism_select.core.blocks import block_of
from prism_select.core.gradients import differentiable, take_gradients, wide_dtype
from prism_select.core.layers import (
    Inputs,
    Owner,
    Parameters,
    has_formula,
    outer_factors,
    owners,
    slice_examples,
    swapped,
    watching,
)
from prism_select.core.likelihood import LanguageModel, backward
from prism_select.core.packed import PackedLinear
from prism_select.core.target_gradient import Side
from prism_select.directions.tensor_shelf import Shelf, Shelved, free_disk

__all__ = [
    "AnswerProducts",
    "Piece",
    "answer_factors",
    "answer_products",
    "by_kind",
    "own_gradient",
    "used_elsewhere",
]

EXACT = 1024  # answers up to which products are exact
HELD = 2**26  # bytes of factors in memory
PIECE = 2**27  # bytes of a piece's factors
FORMED = 2**25  # numbers of all answers' gradients that are formed at a time: 128 MB in float32
FOLDED = 64  # numbers of a gradient that become one
TOKENS = 256  # that are multiplied at a time
OTHERS = 2**28  # numbers of all answers' gradients in other parameters


@dataclass(frozen=True)
class AnswerProducts:
    """`blocks` are by the number of the block in the stack, "" for parameters outside of it (for
    all, where products are not exact); `mean_loglik` in nats per token; `tokens` counts supervised
    tokens. All in float64 on the CPU."""

    blocks: Mapping[str, Float[Tensor, "answers answers"]]
    mean_loglik: Float[Tensor, " answers"]
    tokens: Int[Tensor, " answers"]
    exact: bool = True

    @cached_property
    def total(self) -> Float[Tensor, "answers answers"]:
        return torch.stack([*self.blocks.values()]).sum(0)

    def lengths(self, likelihood: str) -> Float[Tensor, " answers"]:
        """What turns the mean log-likelihood of a token into `likelihood`: token or sequence."""
        counts = self.tokens.double()
        return counts if likelihood == "sequence" else torch.ones_like(counts)

    def of(self, answers: Sequence[int]) -> "AnswerProducts":
        """Those of some answers."""
        kept = torch.tensor(answers, dtype=torch.long)
        blocks = {name: products[kept][:, kept] for name, products in self.blocks.items()}
        return AnswerProducts(blocks, self.mean_loglik[kept], self.tokens[kept], self.exact)


class Piece(NamedTuple):
    """Rows start to stop of a matrix; stop 0: all of a smaller parameter."""

    name: str
    start: int
    stop: int


class Factors(NamedTuple):
    """Of some answers, from `first` on in the order of the batches. `left` of an embedding are the
    rows of its tokens, counted from the start of the piece."""

    first: int
    left: Tensor  # (answers, tokens, rows), or (answers, tokens) of an embedding
    right: Float[Tensor, "answers tokens columns"]


class KeptFactors(NamedTuple):
    """Factors on the shelf."""

    first: int
    left: Tensor | Shelved
    right: Tensor | Shelved


def answer_products(model: LanguageModel, weights: Parameters, side: Side) -> AnswerProducts:
    """`side` holds the answers of both sides of the pairs; its order numbers them."""
    collection = Collection(model, weights, side)
    order = torch.tensor(side.order)
    block = block_of(model.network) if collection.exact else lambda name: ""
    back = order.argsort()
    sums = {
        block(name): torch.zeros(len(order), len(order), dtype=torch.float64) for name in weights
    }
    for name, products in collection.products():
        sums[block(name)] += products[back][:, back]
    counts = torch.cat([batch.counts.cpu() for batch in side.batches])
    means = collection.logliks / counts
    return AnswerProducts(sums, means[back], counts[back].long(), collection.exact)


class Collection:
    """Collects gradients of answers, or their factors, in passes over the batches.

    After `products`, `logliks` are summed over tokens, in the order of the batches; `exact` says
    whether nothing was folded."""

    def __init__(self, model: LanguageModel, weights: Parameters, side: Side) -> None:
        self.model, self.weights, self.side = model, weights, side
        self.owners = owners(model.network, weights)
        self.count = len(side.order)
        self.logliks = torch.zeros(self.count, dtype=torch.float64)
        self.exact = self.count <= EXACT
        self._matrices, self._small = by_kind(self.owners)
        self._lost = {name for name in weights if name not in self._matrices | self._small}
        self._visited = set[str]()
        self._factors = dict[Piece, list[KeptFactors]]()
        self._sums = dict[str, Tensor]()
        self._shelf = Shelf(HELD)
        self._first, self._size, self._examples = 0, 0, torch.zeros(0).long()

    def products(self) -> Iterator[tuple[str, Float[Tensor, "answers answers"]]]:
        """Products in a part of a parameter, by its name."""
        for pieces in self._passes():
            self._collect(pieces)
            unseen = {piece.name for piece in pieces} - self._visited
            self._lost |= used_elsewhere(self.model, self.weights, self.side, unseen)
            for piece in pieces:
                if piece.name not in self._lost:
                    yield piece.name, self._piece_products(piece)
        self._shelf.close()
        if self._lost:
            yield from self._row_by_row()

    def _passes(self) -> Iterator[list[Piece]]:
        tokens = sum(batch.tokens.numel() for batch in self.side.batches)
        room = room_for_factors(self.weights, self.owners)
        pieces, sizes = list[Piece](), Counter[torch.device]()
        for piece, needed in self._pieces(tokens):
            device = self.weights[piece.name].device
            if sizes[device] and sizes[device] + needed > room[device]:
                yield pieces
                pieces, sizes = [], Counter()
            pieces.append(piece)
            sizes[device] += needed
        if pieces:
            yield pieces

    def _pieces(self, tokens: int) -> Iterator[tuple[Piece, int]]:
        """With the bytes of its factors."""
        for name, weight in self.weights.items():
            if name in self._small:
                yield Piece(name, 0, 0), 4 * self.count * weight.numel()
            elif name in self._matrices:
                rows, columns = weight.shape
                bytes_of_row = tokens * weight.element_size()
                step = min(rows, max(-(-rows // 16), PIECE // bytes_of_row - columns))
                for start in range(0, rows, step):
                    stop = min(start + step, rows)
                    yield Piece(name, start, stop), bytes_of_row * (stop - start + columns)

    def _collect(self, pieces: Sequence[Piece]) -> None:
        """Collects in one pass over the batches."""
        names = {piece.name for piece in pieces}
        self._factors = {piece: [] for piece in pieces if piece.stop}
        self._shelf.close()
        self._shelf = Shelf(HELD)
        self._sums = {
            piece.name: _zeros(
                self.weights[piece.name], self.count, self.weights[piece.name].numel()
            )
            for piece in pieces
            if not piece.stop
        }
        users = [owner for owner in self.owners if names & {*owner.weights.values()}]
        self._first = 0
        with watching(users, [], self._visit):
            for batch, _ in self.side:
                self._size = len(batch)
                logliks = backward(self.model, batch, 1 / batch.counts.double(), self._set_examples)
                self.logliks[self._first : self._first + self._size] = logliks.cpu()
                self._first += self._size

    def _set_examples(self, examples: Tensor) -> None:
        self._examples = examples

    def _visit(self, owner: Owner, inputs: Inputs, _: object, gradient: Tensor) -> None:
        examples = slice_examples(self._examples, self._size, gradient)
        self._visited |= {*owner.weights.values()}
        for key, name in owner.weights.items():
            if examples is None:
                self._lost.add(name)
            elif name in self._sums:
                self._add_small(owner, key, inputs, gradient, examples)
        for piece, factors in self._factors.items():
            if examples is not None and piece.name == owner.weights.get("weight"):
                new = self._new_factors(piece, owner, inputs, gradient, examples)
                put = self._shelf.put
                factors += (KeptFactors(f.first, put(f.left), put(f.right)) for f in new)

    def _new_factors(
        self, piece: Piece, owner: Owner, inputs: Inputs, gradient: Tensor, examples: Tensor
    ) -> Iterator[Factors]:
        left, right = answer_factors(owner, inputs, gradient, piece)
        if gradient.ndim == 3 and len(gradient) == self._size:
            yield Factors(self._first, left, right)
            return
        if gradient.ndim == 3:  # a row for each token, in whatever shape
            left, right = left.flatten(0, 1), right.flatten(0, 1)
        for example in examples.unique().tolist():
            rows = examples == example
            yield Factors(self._first + example, left[rows][None], right[rows][None])

    def _add_small(
        self, owner: Owner, key: str, inputs: Inputs, gradient: Tensor, examples: Tensor
    ) -> None:
        name = owner.weights[key]
        total = self._sums[name]
        if len(inputs) != 1:
            self._lost.add(name)
            return
        if len(gradient) != len(examples):
            gradient = gradient.flatten(0, -2)
            inputs = (inputs[0].flatten(0, -2),)
        for example in examples.unique().tolist():
            rows = examples == example
            own: Tensor | None
            if has_formula(owner.module):
                own = gradient[rows].flatten(0, -2).sum(0, dtype=total.dtype)
            else:
                own = own_gradient(owner, key, inputs[0][rows], gradient[rows])
            if own is None:
                self._lost.add(name)
                return
            total[self._first + example] += own.flatten().to(total)

    def _piece_products(self, piece: Piece) -> Float[Tensor, "answers answers"]:
        if not piece.stop:
            return self._squared(self._sums.pop(piece.name))
        get = self._shelf.get
        factors = [Factors(f.first, get(f.left), get(f.right)) for f in self._factors.pop(piece)]
        rows, columns = piece.stop - piece.start, self.weights[piece.name].shape[1]
        sizes = [entry.right.shape[:2].numel() for entry in factors]
        dense = sum(n for n, f in zip(sizes, factors, strict=True) if f.left.ndim == 3)
        if self.exact and few_tokens(dense, sum(sizes), self.count, rows, columns):
            return _token_products(factors, self.count)
        products = torch.zeros(self.count, self.count, dtype=torch.float64)
        step = max(1, FORMED // (self.count * columns))
        formed = _zeros(self.weights[piece.name], self.count * min(step, rows) * columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            total = formed[: self.count * (stop - start) * columns].zero_()
            total = total.view(self.count, stop - start, columns)
            for entry in factors:
                _add(total, entry, start, stop)
            products += self._squared(total.flatten(1))
        return products

    def _squared(self, gradients: Float[Tensor, "answers numbers"]) -> Tensor:
        if not self.exact:
            gradients = _folded(gradients, max(1, FORMED // self.count // FOLDED))
        products = gradients.new_zeros(self.count, self.count)
        step = -(-self.count // 4)
        for start in range(0, self.count, step):  # the lower triangle is the upper one's
            products[start : start + step, start:] = (
                gradients[start : start + step] @ gradients[start:].T
            )
        return (products.triu() + products.triu(1).T).double().cpu()

    def _row_by_row(self) -> Iterator[tuple[str, Float[Tensor, "answers answers"]]]:
        """By autograd, an answer at a time."""
        some = {name: self.weights[name] for name in self.weights if name in self._lost}
        share = OTHERS // self.count / sum(weight.numel() for weight in some.values())
        gradients = dict[str, list[Tensor]]()
        with differentiable(some):
            for batch, _ in self.side:
                for row in range(len(batch)):
                    answer = batch.rows(slice(row, row + 1))
                    backward(self.model, answer, 1 / answer.counts.double())
                    found = dict(take_gradients(some))
                    for name, weight in some.items():
                        own = found.get(name, torch.zeros_like(weight)).flatten()
                        own = own.to(wide_dtype(own))[None]
                        if share < 1:
                            own = _folded(own, max(1, int(share * weight.numel())))
                        gradients.setdefault(name, []).append(own.cpu())
        self.exact &= share >= 1
        for name, rows in gradients.items():
            flat = torch.cat(rows)
            yield name, (flat @ flat.T).double()


def used_elsewhere(
    model: LanguageModel, weights: Parameters, side: Side, names: Set[str]
) -> set[str]:
    """Those of some parameters that have a gradient, though their modules are not called."""
    some = {name: weights[name] for name in names}
    if not some:
        return set()
    with differentiable(some):
        batch = side.batches[0]
        backward(model, batch, 1 / batch.counts.double())
        return {name for name, gradient in take_gradients(some) if gradient.any()}


def room_for_factors(weights: Parameters, holders: Sequence[Owner]) -> Mapping[torch.device, int]:
    """Bytes of factors that one pass collects on each device."""
    modules = ((owner.weights.get("weight"), owner.module) for owner in holders)
    packed = {n: m.packed.bytes for n, m in modules if isinstance(m, PackedLinear)}
    sizes = Counter[torch.device]()
    for name, weight in weights.items():
        sizes[weight.device] += packed.get(name, weight.nbytes)
    return {
        device: max(HELD, size // 2) if device.type == "cuda" else HELD + free_disk() // 2
        for device, size in sizes.items()
    }


def by_kind(selected: Sequence[Owner]) -> tuple[set[str], set[str]]:
    """The matrices whose gradient is Σ l rᵀ in all their uses, and the parameters whose gradient is
    one of a small module, all of whose input is one tensor."""
    matrix, small = defaultdict[str, list[bool]](list), defaultdict[str, list[bool]](list)
    for owner in selected:
        formula = has_formula(owner.module) or owner.scale != 0
        leaf = not any(True for _ in owner.module.children())
        for key, name in owner.weights.items():
            matrix[name].append(formula and key == "weight")
            small[name].append(key == "bias" if formula else leaf)
    return {n for n, uses in matrix.items() if all(uses)}, {n for n, u in small.items() if all(u)}


def few_tokens(dense: int, tokens: int, answers: int, rows: int, columns: int) -> bool:
    """Whether products token by token take less arithmetic than those of gradients formed; `dense`
    of the tokens are not those of an embedding."""
    return dense**2 * rows + tokens**2 * columns < (tokens + answers**2) * rows * columns


def _zeros(weight: Tensor, *shape: int) -> Tensor:
    return weight.new_zeros(shape, dtype=wide_dtype(weight))


def answer_factors(
    owner: Owner, inputs: Inputs, gradient: Tensor, piece: Piece
) -> tuple[Tensor, Tensor]:
    """l, cut to the rows of the piece, and r."""
    if owner.scale:
        module: Any = owner.module
        rows = inputs[0]
        outside = (rows < piece.start) | (rows >= piece.stop)
        if module.padding_idx is not None:
            outside |= rows == module.padding_idx
        rows = torch.where(outside, -1, rows - piece.start)
        return rows.expand(gradient.shape[:-1]), gradient * owner.scale
    left, right = outer_factors(owner, inputs, gradient)
    whole = left.shape[-1] == piece.stop - piece.start
    return left if whole else left[..., piece.start : piece.stop].clone(), right


def own_gradient(owner: Owner, key: str, inputs: Tensor, gradient: Tensor) -> Tensor | None:
    """The gradient of a small module's parameter, from some of its rows; None for a module of
    several outputs."""
    module: Any = owner.module
    weight = module._parameters[key].detach().requires_grad_()
    with torch.enable_grad(), swapped([Owner(owner.name, module, {key: key})], {key: weight}):
        output = module.forward(inputs)
    if not isinstance(output, Tensor):
        return None
    (own,) = torch.autograd.grad(output, weight, gradient)
    assert isinstance(own, Tensor)
    return own


def _add(total: Float[Tensor, "answers rows columns"], f: Factors, start: int, stop: int) -> None:
    """Adds Σ_t l_t r_tᵀ, for rows start to stop of a piece."""
    right, own = f.right.to(total.dtype), total[f.first : f.first + len(f.right)]
    if f.left.ndim == 3:
        own.baddbmm_(f.left[..., start:stop].to(total.dtype).mT, right)
        return
    inside = (f.left >= start) & (f.left < stop)
    answers, _ = inside.nonzero(as_tuple=True)
    rows = answers * own.shape[1] + f.left[inside] - start
    own.flatten(0, 1).index_add_(0, rows, right[inside])


def _token_products(factors: Sequence[Factors], count: int) -> Float[Tensor, "answers answers"]:
    """Σ_ts (l_t · l_s)(r_t · r_s) over the tokens of each two answers."""
    chunks = [*_chunks([f for f in factors if f.left.ndim == 3])]
    chunks += _chunks([f for f in factors if f.left.ndim == 2])
    products = torch.zeros(count, count, dtype=torch.float64)
    for i, first in enumerate(chunks):
        right = first.right.to(wide_dtype(first.right))
        left = first.left.to(right.dtype) if first.left.ndim == 2 else first.left
        for second in chunks[i:]:
            both = _left_products(left, second.left) * (right @ second.right.to(right).T)
            rows = both.new_zeros(count, both.shape[1]).index_add_(0, first.answers, both)
            sums = rows.new_zeros(count, count).index_add_(1, second.answers, rows).double().cpu()
            products += sums if second is first else sums + sums.T
    return products


class Tokens(NamedTuple):
    """Some tokens of some answers, with their factors."""

    answers: Int[Tensor, " tokens"]
    left: Tensor  # (tokens, rows), or (tokens,) of an embedding
    right: Float[Tensor, "tokens columns"]


def _chunks(factors: Sequence[Factors]) -> Iterator[Tokens]:
    """At least `TOKENS` tokens at a time."""
    parts, size = list[Tokens](), 0
    for entry in factors:
        answers = torch.arange(len(entry.right), device=entry.right.device) + entry.first
        answers = answers.repeat_interleave(entry.right.shape[1])
        parts.append(Tokens(answers, entry.left.flatten(0, 1), entry.right.flatten(0, 1)))
        size += len(answers)
        if size >= TOKENS:
            yield Tokens(*map(torch.cat, zip(*parts, strict=True)))
            parts, size = [], 0
    if parts:
        yield Tokens(*map(torch.cat, zip(*parts, strict=True)))


def _left_products(left: Tensor, other: Tensor) -> Float[Tensor, "tokens tokens"]:
    """l_t · l_s; an embedding's l is 1 at its row, and 0 where that is outside of the piece."""
    if left.ndim == 1:
        return (left[:, None] == other) & (other >= 0)
    if other.ndim == 1:
        return left[:, other.clamp(min=0)] * (other >= 0)
    return left @ other.to(left).T


def _folded(gradients: Float[Tensor, "answers numbers"], size: int) -> Tensor:
    """Multiplied with random signs, and folded into `size` numbers."""
    length = gradients.shape[1]
    if length <= size:
        return gradients
    draw = torch.Generator(gradients.device).manual_seed(length)
    signs = torch.randint(0, 2, (length,), generator=draw, device=gradients.device) * 2 - 1
    total = gradients.new_zeros(len(gradients), size)
    for start in range(0, length, size):
        part = slice(start, min(start + size, length))
        total[:, : part.stop - start] += gradients[:, part] * signs[part].to(gradients)
    return total
