"""Gradient norms: ‖∇loglik‖ of each example over the selected parameters, in the pass that scores
it.

    matrix       ‖Σ_t l_t r_tᵀ‖² = Σ_ts (l_t · l_s)(r_t · r_s)    or formed, where that costs less
    embedding    Σ_w ‖Σ_{t: x_t = w} g_t‖²                        w: words
      tied       + 2 Σ_t g_t · Σ_s p_s[x_t] h_s    p: output gradients of the head, h: its inputs
    bias         ‖Σ_t g_t‖²
    elementwise  ‖Σ_t g_t ∘ ∂y_t/∂w‖²              gains of norms; tried once for each module
    otherwise    autograd, one example at a time

Choices made here:
- products are taken in the model's dtype, their sums in float32 or better, sums over parameters in
  float64;
- where a pass finds a parameter without a formula, the pass is repeated without it, and its
  gradients come from autograd from then on: a matrix that is used several times, for example;
- chunks of the head keep no logits beyond their end, except those of the example that continues in
  the next chunk.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from prism_select.core.blocks import watched, without_padding
from prism_select.core.engines import Scores, reverse
from prism_select.core.gradients import differentiable, take_gradients, wide_dtype
from prism_select.core.layers import (
    Factored,
    Inputs,
    Owner,
    Parameters,
    has_formula,
    outer_factors,
    owners,
    slice_examples,
    swapped,
    tangent_of,
    watching,
)
from prism_select.core.likelihood import Batch, LanguageModel, backward
from prism_select.run.errors import Unreachable, out_of_memory

__all__ = ["outer_squares", "with_norms"]

FORMED = 2**25  # numbers of the matrices that are formed at a time
BODY = -1  # where a parameter is used, if not in a chunk of the head

Call: TypeAlias = tuple[Inputs, Mapping[str, Any]]


def with_norms(
    model: LanguageModel, parameters: Parameters, directions: Sequence[Factored]
) -> Callable[[Batch], tuple[Scores, Float[Tensor, " batch"]]]:
    """The `reverse` engine; besides its scores ‖∇loglik‖ of each example over all `parameters`, in
    nats per unit of length. Without directions the scores are 0.

    Raises what `reverse` raises."""
    observer = _Observer(model, parameters)
    engine = reverse(observer, parameters, directions or [{}])

    def measure(batch: Batch) -> tuple[Scores, Float[Tensor, " batch"]]:
        while True:
            before = len(observer.without_formula)
            with observer.watching():
                scores = engine(batch)
            if len(observer.without_formula) == before:
                return scores, observer.norms()

    return measure


class _Observer:
    """A language model whose backward passes also leave the squared norms of their examples."""

    def __init__(self, model: LanguageModel, parameters: Parameters) -> None:
        self.model, self.network, self.vocabulary = model, model.network, model.vocabulary
        self.parameters = parameters
        self.holders = owners(model.network, parameters)
        embeddings = [owner for owner in self.holders if isinstance(owner.module, nn.Embedding)]
        self.embedded = {name for owner in embeddings for name in owner.weights.values()}
        self.without_formula = {
            name
            for owner in self.holders
            if not has_formula(owner.module) and owner not in embeddings
            for name in owner.weights.values()
            if parameters[name].ndim > 1
        }
        self.elementwise: dict[tuple[str, str, int], bool] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        linear = [owner for owner in self.holders if has_formula(owner.module)]
        with ExitStack() as hooks, watching(linear, [], self._visit):
            for owner in self.holders:
                if owner not in linear and self._remaining(owner):
                    hook = partial(self._after_forward, owner)
                    handle = owner.module.register_forward_hook(hook, with_kwargs=True)
                    hooks.callback(handle.remove)
            yield

    def hidden(self, batch: Batch) -> Float[Tensor, "batch time width"]:
        device, size = batch.tokens.device, len(batch)
        self.batch, self.in_head = batch, False
        self.body_rows = torch.arange(size, device=device).repeat_interleave(batch.tokens.shape[1])
        self.rows = self.body_rows  # the example of each row of the coming gradients
        self.unread: list[int] = batch.predicted.nonzero()[:, 0].tolist()  # by the head
        self.supervised: list[int] = batch.counts.tolist()
        self.squares = torch.zeros(size, dtype=torch.float64, device=device)
        self.sums: dict[str, Tensor] = {}  # gradients of vectors, over all uses
        self.uses: dict[str, set[int]] = {}  # of matrices: chunks of the head, or BODY
        self.crossed: dict[str, Tensor] = {}  # Σ_s p_s[x_t] h_s
        self.unfinished: dict[str, list[tuple[Tensor, ...]]] = {}
        states = self.model.hidden(batch)
        if states.requires_grad:
            states = states.view_as(states)  # a node of its own: its hook comes before the body's
            states.register_hook(self._enter_body)
        return states

    def logits(self, hidden: Float[Tensor, "rows width"]) -> Float[Tensor, "rows vocabulary"]:
        size = len(hidden)
        self.chunk, self.unread, self.in_head = self.unread[:size], self.unread[size:], True
        self.rows = torch.tensor(self.chunk, device=hidden.device)
        return self.model.logits(hidden)

    def _enter_body(self, _: Tensor) -> None:
        self.in_head, self.rows = False, self.body_rows

    def norms(self) -> Float[Tensor, " batch"]:
        device = self.squares.device
        squares = self.squares + sum(v.square().sum(1).to(device) for v in self.sums.values())
        if self.without_formula:
            squares = squares + self._autograd_squares()
        return squares.clamp(min=0).sqrt()

    def _autograd_squares(self) -> Float[Tensor, " batch"]:
        """Of the parameters without a formula, by the definition."""
        parameters = {name: self.parameters[name] for name in self.without_formula}
        squares, one = torch.zeros_like(self.squares), self.squares.new_ones(1)
        for example in range(len(self.batch)):
            with differentiable(parameters):
                backward(self.model, self.batch.rows(slice(example, example + 1)), one)
                for _, gradient in take_gradients(parameters):
                    square = gradient.to(wide_dtype(gradient)).square().sum()
                    squares[example] += square.to(squares)
        return squares

    def _remaining(self, owner: Owner) -> dict[str, str]:
        """The owner's parameters that have a formula, as far as is known."""
        named = owner.weights.items()
        return {key: name for key, name in named if name not in self.without_formula}

    def _refuse_mixed(self, owner: Owner, gradient: Tensor) -> int:
        """The number of the gradient's slices. Raises Unreachable where they do not belong to one
        example each."""
        slices: Tensor | None = self.rows
        if not self.in_head:
            slices = slice_examples(self.rows, len(self.batch), gradient)
        elif gradient.shape[:-1].numel() != len(self.rows):
            slices = None
        if slices is None:
            why = f"its output of shape {tuple(gradient.shape)} cannot be told apart by example"
            raise Unreachable("reverse", list(owner.weights.values()), why)
        return len(slices)

    def _note_use(self, name: str, tied: bool = False, chunks: bool = False) -> bool:
        """Whether a use of a matrix has a formula besides its earlier ones. An embedding may be
        `tied` to a head that came before it, and a head is used in several `chunks`."""
        use, earlier = len(self.unread) if self.in_head else BODY, self.uses.get(name, set())
        conflicts = earlier & {use, BODY} if tied or chunks else earlier
        uncrossed = tied and earlier and name not in self.crossed
        self.uses[name] = earlier | {use}
        if conflicts or uncrossed or name in self.sums:
            self.without_formula.add(name)
        return name not in self.without_formula

    def _add(self, name: str, gradient: Float[Tensor, "batch numbers"]) -> None:
        """Adds up a vector's gradients over all of its uses."""
        if name in self.uses:
            self.without_formula.add(name)
        self.sums[name] = self.sums.get(name, 0) + gradient

    def _visit(self, owner: Owner, inputs: Inputs, _: object, gradient: Tensor) -> None:
        """An output of Linear, Conv1D or Embedding."""
        slices, remaining = self._refuse_mixed(owner, gradient), self._remaining(owner)
        if type(owner.module) is nn.Embedding:
            if remaining:
                self._embedding(owner, inputs[0], gradient)
            return
        if "weight" in remaining and self._note_use(remaining["weight"], chunks=self.in_head):
            left, right = outer_factors(owner, inputs, gradient)
            if self.in_head:
                name = remaining["weight"]
                self._head_chunk(name, left.reshape(slices, -1), right.reshape(slices, -1))
            else:
                size = len(self.batch)
                by_example = (rows.reshape(size, -1, rows.shape[-1]) for rows in (left, right))
                self.squares += outer_squares(*by_example).to(self.squares)
        if "bias" in remaining:
            self._add(remaining["bias"], self._summed(gradient))

    def _summed(self, values: Float[Tensor, "*rows d"]) -> Float[Tensor, "batch d"]:
        """Sums over the rows of each example."""
        size, width = len(self.batch), values.shape[-1]
        values = values.to(wide_dtype(values))
        if not self.in_head:
            return values.reshape(size, -1, width).sum(1)
        rows = self.rows.to(values.device)
        return values.new_zeros(size, width).index_add_(0, rows, values.reshape(-1, width))

    def _head_chunk(
        self, name: str, left: Float[Tensor, "rows a"], right: Float[Tensor, "rows b"]
    ) -> None:
        """A chunk of the head, its rows in the order of their examples; only the last example may
        continue in the next chunk."""
        a, b, start = left.shape[1], right.shape[1], 0
        for example, count in Counter(self.chunk).items():
            l, r = left[start : start + count], right[start : start + count]  # noqa: E741
            start += count
            if name in self.embedded:
                self._cross(name, example, l, r)
            pieces = self.unfinished.pop(name, [])
            if self.supervised[example] * (a + b) > a * b:
                formed = (l.T @ r).to(wide_dtype(l))
                pieces = [(pieces[0][0] + formed,) if pieces else (formed,)]
            else:
                pieces.append((l, r))
            if self.unread[:1] == [example]:
                self.unfinished[name] = [tuple(t.clone() for t in piece) for piece in pieces]
            elif len(pieces[0]) == 1:
                self.squares[example] += pieces[0][0].square().sum().to(self.squares)
            else:
                left_rows, right_rows = (torch.cat(rows) for rows in zip(*pieces, strict=True))
                square = outer_squares(left_rows[None], right_rows[None])[0]
                self.squares[example] += square.to(self.squares)

    def _cross(
        self, name: str, example: int, left: Float[Tensor, "rows words"], right: Tensor
    ) -> None:
        if name not in self.crossed:
            shape = (*self.batch.tokens.shape, right.shape[1])
            self.crossed[name] = torch.zeros(shape, dtype=wide_dtype(right), device=right.device)
        words = self.batch.tokens[example].to(left.device)
        self.crossed[name][example] += left[:, words].T @ right

    def _embedding(
        self, owner: Owner, words: Int[Tensor, "*rows"], gradient: Float[Tensor, "*rows width"]
    ) -> None:
        """Of `words` that were looked up, and the gradient of what was found."""
        name, size, width = owner.weights["weight"], len(self.batch), gradient.shape[-1]
        if self.in_head:
            raise Unreachable("reverse", [name], "the output head looks up words")
        if not self._note_use(name, tied=True):
            return
        words = words.reshape(size, -1)
        gradient = gradient.reshape(size, -1, width).to(wide_dtype(gradient))
        (gradient,) = without_padding(owner.module, (words,), (gradient,))
        vocabulary = len(self.parameters[name])
        examples = torch.arange(size, device=words.device)[:, None]
        keys, index = (examples * vocabulary + words).unique(return_inverse=True)
        by_word = gradient.new_zeros(len(keys), width)
        by_word.index_add_(0, index.flatten(), gradient.flatten(0, 1))
        squares = by_word.square().sum(1).to(self.squares)
        self.squares.index_add_(0, (keys // vocabulary).to(squares.device), squares)
        if name in self.crossed:
            if words.equal(self.batch.tokens.to(words.device)):
                crossed = (gradient * self.crossed[name]).sum((1, 2))
                self.squares += 2 * crossed.to(self.squares)
            else:
                self.without_formula.add(name)

    def _after_forward(
        self, owner: Owner, _: nn.Module, args: Inputs, kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        """Watches each output of a module that may turn out elementwise, or an embedding."""
        if not torch.is_grad_enabled():
            return output
        call = tree_map_only(Tensor, Tensor.detach, (args, dict(kwargs)))
        arguments: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        outputs, shape = tree_flatten(output)
        for index, tensor in enumerate(outputs):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                show = partial(self._visit_module, owner, call, index)
                outputs[index] = watched(tensor, show, outputs, arguments)
        return tree_unflatten(outputs, shape)

    def _visit_module(self, owner: Owner, call: Call, index: int, gradient: Tensor) -> None:
        """One output of a module that is neither Linear, Conv1D nor Embedding itself."""
        self._refuse_mixed(owner, gradient)
        if isinstance(owner.module, nn.Embedding):
            self._looked_up(owner, call, index, gradient)
            return
        for name in self._remaining(owner).values():
            if self._is_elementwise(owner, name, call, index, gradient):
                ones = torch.ones_like(self.parameters[name])
                slope = tangent_of(owner, {name: ones}, *call)[index]
                self._add(name, self._summed(gradient.to(wide_dtype(gradient)) * slope))
            else:
                self.without_formula.add(name)

    def _looked_up(self, owner: Owner, call: Call, index: int, gradient: Tensor) -> None:
        """An embedding of a class of its own: what it does after its look-up is undone first."""
        name = owner.weights["weight"]
        leaf = self.parameters[name].detach().requires_grad_()
        replaced = swapped([owner], {name: leaf})
        with _Lookups() as lookups, torch.enable_grad(), _without_hooks(owner.module), replaced:
            output = tree_flatten(owner.module.forward(*call[0], **call[1]))[0][index]
        results = [result for _, result in lookups.seen]
        *gradients, direct = torch.autograd.grad(
            output, [*results, leaf], gradient, allow_unused=True
        )
        if len(gradients) != 1 or gradients[0] is None or direct is not None:
            self.without_formula.add(name)  # more than one look-up
            return
        self._refuse_mixed(owner, gradients[0])
        self._embedding(owner, lookups.seen[0][0], gradients[0])

    def _is_elementwise(
        self, owner: Owner, name: str, call: Call, index: int, gradient: Tensor
    ) -> bool:
        """Whether number i of each row of the output depends on number i of the parameter alone;
        tried once."""
        parameter, key = self.parameters[name], (owner.name, name, index)
        if parameter.shape != gradient.shape[-1:]:
            return False
        if key not in self.elementwise:
            draw = torch.Generator().manual_seed(0)
            signs = (torch.randint(0, 2, parameter.shape, generator=draw) * 2 - 1).to(parameter)
            try:
                slope, signed = (
                    tangent_of(owner, {name: move}, *call)[index]
                    for move in (torch.ones_like(signs), signs)
                )
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                slope = None  # no forward-mode derivative
            self.elementwise[key] = slope is not None and _near(signed, slope * signs)
        return self.elementwise[key]


class _Lookups(TorchFunctionMode):
    """Records the words that are looked up, and what is found, as the start of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = call(*args, **(kwargs or {}))
        if call is functional.embedding:
            result = result.detach().requires_grad_()
            self.seen.append((args[0], result))
        return result


def _near(a: Tensor, b: Tensor) -> bool:
    allowed: float = torch.finfo(a.dtype).eps ** 0.5
    return bool((a - b).float().norm() <= allowed * b.float().norm())


def outer_squares(
    left: Float[Tensor, "batch time a"], right: Float[Tensor, "batch time b"]
) -> Float[Tensor, " batch"]:
    """‖Σ_t l_t r_tᵀ‖² of each example."""
    (size, time, a), b, wide = left.shape, right.shape[2], wide_dtype(left)
    if left.dtype == torch.float16:  # squares leave its range
        left, right = left.to(wide), right.to(wide)
    if time * (a + b) <= a * b:
        return ((left @ left.mT).to(wide) * (right @ right.mT).to(wide)).sum((1, 2))
    step = max(1, FORMED // (a * b))
    formed = (left[i : i + step].mT @ right[i : i + step] for i in range(0, size, step))
    return torch.cat([matrix.to(wide).square().sum((1, 2)) for matrix in formed])


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Calls no forward hook inside the module: it runs for its own derivative alone."""
    hooks = {inner: inner._forward_hooks for inner in module.modules()}
    try:
        for inner in hooks:
            inner._forward_hooks = type(inner._forward_hooks)()
        yield
    finally:
        for inner, before in hooks.items():
            inner._forward_hooks = before
