"""Norms: the length of each example's own gradient, ‖∇loglik‖ over the weights that count, in the
pass that scores it.

    matrix      ‖Σ_t l_t r_tᵀ‖² = Σ_ts (l_t · l_s)(r_t · r_s)     or the small gradient itself, where that costs less
    embedding   Σ_w ‖Σ_{t: x_t = w} g_t‖²                         w: words
      tied      + 2 Σ_t g_t · Σ_s p_s[x_t] h_s                    p: the head's output gradients, h: its inputs
    bias        ‖Σ_t g_t‖²
    the rest    gain of a norm: ‖Σ_t g_t ∘ ∂y_t/∂w‖² where the derivative is diagonal, which is tried;
                otherwise the module's own gradient, one example at a time

Choices made here: products in the model's dtype, sums of them in float32 or better, over the
weights in float64; the head's chunks keep no row of logits beyond their end, except of the example
that goes on in the next chunk; a large weight that is used several times, unless by an embedding
and a head, is refused by name."""

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
from prism_select.core.layers import (
    Direction,
    Factored,
    Inputs,
    Owner,
    Parameters,
    by_example,
    is_closed,
    owners,
    sides,
    swapped,
    tangent_of,
    watching,
)
from prism_select.core.likelihood import Batch, LanguageModel
from prism_select.run.errors import BadOption, Unreachable, out_of_memory

__all__ = ["with_norms"]

SMALL, FORMED = (
    2**14,
    2**25,
)  # numbers of a weight whose gradients are kept, and of those that are formed at a time


def with_norms(
    model: LanguageModel, weights: Parameters, directions: Sequence[Factored]
) -> Callable[[Batch], tuple[Scores, Float[Tensor, " batch"]]]:
    """The `reverse` engine, and beside its scores each example's ‖∇loglik‖ over all of `weights`,
    in nats per unit of length, whatever the directions lack; without directions, the norms and no
    scores but 0.

    Raises what `reverse` does, and BadOption for a large weight used several times in a way without
    formula."""
    observer = _Observer(model, weights)
    engine = reverse(observer, weights, directions or [{}])

    def scores(batch: Batch) -> tuple[Scores, Float[Tensor, " batch"]]:
        with observer.open():
            return engine(batch), observer.norms()

    return scores


Call: TypeAlias = tuple[Inputs, Mapping[str, Any]]


class _Observer:
    """A language model that knows, when a gradient comes, which example each of its rows belongs
    to."""

    def __init__(self, model: LanguageModel, weights: Parameters) -> None:
        self.model, self.network, self.vocabulary, self.weights = (
            model,
            model.network,
            model.vocabulary,
            weights,
        )
        self.holders = owners(model.network, weights)
        looked = (owner for owner in self.holders if isinstance(owner.module, nn.Embedding))
        self.embedded = {name for owner in looked for name in owner.weights.values()}
        self.diagonal: dict[tuple[str, str, int], bool] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        closed = [owner for owner in self.holders if is_closed(owner.module)]
        with ExitStack() as hooks, watching(closed, [], self._visit):
            for owner in self.holders:
                if owner not in closed:
                    hook = partial(self._called, owner)
                    hooks.callback(
                        owner.module.register_forward_hook(hook, with_kwargs=True).remove
                    )
            yield

    def hidden(self, batch: Batch) -> Float[Tensor, "batch time width"]:
        device = batch.tokens.device
        self.batch, self.in_head = batch, False
        self.every: Tensor = torch.arange(len(batch), device=device).repeat_interleave(
            batch.tokens.shape[1]
        )
        self.rows, self.ahead = self.every, batch.predicted.nonzero()[:, 0].tolist()
        self.totals: list[int] = batch.counts.tolist()
        self.squares = torch.zeros(len(batch), dtype=torch.float64, device=device)
        self.sums: dict[str, Tensor] = {}  # gradients of small weights, over all their uses
        self.used: dict[
            str, set[int]
        ] = {}  # when the others were used: in which chunk of the head, or -1
        self.crossed: dict[str, Tensor] = {}  # Σ_s p_s[x_t] h_s
        self.unfinished: dict[str, list[tuple[Tensor, ...]]] = {}
        states = self.model.hidden(batch)
        if states.requires_grad:
            states = states.view_as(
                states
            )  # a node of its own: its hook comes before those of the last module
            states.register_hook(self._enter_body)
        return states

    def logits(self, hidden: Float[Tensor, "rows width"]) -> Float[Tensor, "rows vocabulary"]:
        self.in_head, self.here, self.ahead = (
            True,
            self.ahead[: len(hidden)],
            self.ahead[len(hidden) :],
        )
        self.rows = torch.tensor(self.here, device=hidden.device)
        return self.model.logits(hidden)

    def _enter_body(self, _: Tensor) -> None:
        self.in_head, self.rows = False, self.every

    def norms(self) -> Float[Tensor, " batch"]:
        total = self.squares + sum(value.square().sum(1) for value in self.sums.values())
        return total.clamp(min=0).sqrt()

    def _place(self, owner: Owner, gradient: Tensor) -> Int[Tensor, " rows"]:
        place = self.rows if self.in_head else by_example(self.rows, len(self.batch), gradient)
        if place is None or (self.in_head and gradient.shape[:-1].numel() != len(place)):
            why = f"its output of shape {tuple(gradient.shape)} cannot be told apart by example"
            raise Unreachable("reverse", list(owner.weights.values()), why)
        return place

    def _once(self, name: str, tied: bool = False, chunks: bool = False) -> None:
        """Raises BadOption where a weight has other uses whose cross terms are not counted."""
        mark, before = (len(self.ahead) if self.in_head else -1), self.used.setdefault(name, set())
        others = before & {mark, -1} if tied or chunks else before
        if others or name in self.sums or (tied and before and name not in self.crossed):
            raise BadOption(
                f"--normalize norm: {name} is used several times in a way that has no formula; leave it out with "
                "--layers, or take --normalize tokens"
            )
        before.add(mark)

    def _add(self, name: str, gradient: Float[Tensor, "batch numbers"]) -> None:
        if name in self.used:
            self._once(name)
        self.sums[name] = self.sums.get(name, 0) + gradient

    def _visit(self, owner: Owner, inputs: Inputs, _: object, gradient: Tensor) -> None:
        place = self._place(owner, gradient)
        if type(owner.module) is nn.Embedding:
            self._embedding(owner, inputs[0], gradient)
            return
        if "weight" in owner.weights:
            name, (left, right) = owner.weights["weight"], sides(owner, inputs, gradient)
            if self.in_head:
                self._once(name, chunks=True)
                self._chunk(name, left.reshape(len(place), -1), right.reshape(len(place), -1))
            else:
                self._once(name)
                size = len(self.batch)
                self.squares += _squares(*(s.reshape(size, -1, s.shape[-1]) for s in (left, right)))
        if "bias" in owner.weights:
            self._add(owner.weights["bias"], self._summed(gradient))

    def _summed(self, values: Float[Tensor, "*rows d"]) -> Float[Tensor, "batch d"]:
        size, width = len(self.batch), values.shape[-1]
        values = values.to(_wide(values))
        if not self.in_head:
            return values.reshape(size, -1, width).sum(1)
        return values.new_zeros(size, width).index_add_(0, self.rows, values.reshape(-1, width))

    def _chunk(
        self, name: str, left: Float[Tensor, "rows a"], right: Float[Tensor, "rows b"]
    ) -> None:
        """One chunk of the head, its rows in the order of their examples; only the last of these
        may go on."""
        a, b, start = left.shape[1], right.shape[1], 0
        for example, count in Counter(self.here).items():
            l, r = left[start : start + count], right[start : start + count]  # noqa: E741
            start += count
            if name in self.embedded:
                self._cross(name, example, l, r)
            parts = self.unfinished.pop(name, [])
            if self.totals[example] * (a + b) > a * b:
                formed = (l.T @ r).to(_wide(l))
                parts = [(parts[0][0] + formed,) if parts else (formed,)]
            else:
                parts.append((l, r))
            if self.ahead[:1] == [example]:
                self.unfinished[name] = [tuple(each.clone() for each in part) for part in parts]
            elif len(parts[0]) == 1:
                self.squares[example] += parts[0][0].square().sum()
            else:
                left_rows, right_rows = (torch.cat(each) for each in zip(*parts, strict=True))
                self.squares[example] += _squares(left_rows[None], right_rows[None])[0]

    def _cross(
        self, name: str, example: int, left: Float[Tensor, "rows words"], right: Tensor
    ) -> None:
        if name not in self.crossed:
            shape = (*self.batch.tokens.shape, right.shape[1])
            self.crossed[name] = torch.zeros(shape, dtype=_wide(right), device=right.device)
        self.crossed[name][example] += left[:, self.batch.tokens[example]].T @ right

    def _embedding(
        self, owner: Owner, words: Int[Tensor, "*rows"], gradient: Float[Tensor, "*rows width"]
    ) -> None:
        name, size, width = owner.weights["weight"], len(self.batch), gradient.shape[-1]
        if self.in_head:
            raise Unreachable("reverse", [name], "the output head looks up words")
        self._once(name, tied=True)
        words, moved = (
            words.reshape(size, -1),
            gradient.reshape(size, -1, width).to(_wide(gradient)),
        )
        (moved,) = without_padding(owner.module, (words,), (moved,))
        examples = torch.arange(size, device=words.device)[:, None]
        keys, place = (examples * len(self.weights[name]) + words).unique(return_inverse=True)
        own = moved.new_zeros(len(keys), width).index_add_(0, place.flatten(), moved.flatten(0, 1))
        self.squares.index_add_(
            0, keys // len(self.weights[name]), own.square().sum(1).to(self.squares.dtype)
        )
        if name in self.crossed:
            if not words.equal(self.batch.tokens):
                raise Unreachable(
                    "reverse", [name], "its embedding looks up other words than those of the batch"
                )
            self.squares += 2 * (moved * self.crossed[name]).sum((1, 2))

    def _called(
        self, owner: Owner, _: nn.Module, args: Inputs, named: Mapping[str, Any], output: Any
    ) -> Any:
        """Watches each output of a module without formula."""
        if not torch.is_grad_enabled():
            return output
        call = tree_map_only(Tensor, Tensor.detach, (args, dict(named)))
        tensors, shape = tree_flatten(output)
        for place, tensor in enumerate(tensors):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                show = partial(self._rest, owner, call, place)
                tensors[place] = watched(tensor, show, tensors, {**dict(enumerate(args)), **named})
        return tree_unflatten(tensors, shape)

    def _rest(self, owner: Owner, call: Call, place: int, gradient: Tensor) -> None:
        self._place(owner, gradient)
        if isinstance(owner.module, nn.Embedding):
            self._looked_up(owner, call, place, gradient)
            return
        others = []
        for name in owner.weights.values():
            if self._is_diagonal(owner, name, call, place, gradient):
                tangent = tangent_of(owner, {name: torch.ones_like(self.weights[name])}, *call)[
                    place
                ]
                self._add(name, self._summed(gradient.to(_wide(gradient)) * tangent))
            elif self.weights[name].numel() <= SMALL:
                others.append(name)
                shape = len(self.batch), self.weights[name].numel()
                self._add(name, torch.zeros(shape, dtype=_wide(gradient), device=gradient.device))
            else:
                others.append(name)
                self._once(name)
        for example, name, value in (
            self._apart(owner, others, call, place, gradient) if others else ()
        ):
            if name in self.sums:
                self.sums[name][example] += value.flatten()
            else:
                self.squares[example] += value.to(_wide(value)).square().sum()

    def _apart(
        self, owner: Owner, names: Sequence[str], call: Call, place: int, gradient: Tensor
    ) -> Iterator[tuple[int, str, Tensor]]:
        """What an output's gradient gives the module's weights in the rows of each example: from
        its own inputs alone, where they lead to the same output, and else from all."""
        rows, (size, time) = self._place(owner, gradient), self.batch.tokens.shape
        whole = _again(
            owner, {name: self.weights[name].detach() for name in names}, call, place
        ).reshape(len(rows), -1)
        for example in rows.unique().tolist():

            def cut(tensor: Tensor, example: int = example) -> Tensor:
                each = {size: 1, size * time: time}.get(len(tensor) if tensor.ndim else 0, 0)
                return tensor[example * each : (example + 1) * each] if each else tensor

            leaves = {name: self.weights[name].detach().requires_grad_() for name in names}
            mine, moved = rows == example, gradient.reshape(len(rows), -1)
            output = _again(
                owner, leaves, call if self.in_head else tree_map_only(Tensor, cut, call), place
            )
            if output.numel() == whole[mine].numel() and _near(
                output.flatten(), whole[mine].flatten()
            ):
                moved = moved[mine]
            else:
                output, moved = _again(owner, leaves, call, place), moved * mine[:, None]
            if not output.requires_grad:
                return
            found = torch.autograd.grad(
                output, list(leaves.values()), moved.reshape(output.shape), allow_unused=True
            )
            yield from (
                (example, name, value)
                for name, value in zip(names, found, strict=True)
                if value is not None
            )

    def _looked_up(self, owner: Owner, call: Call, place: int, gradient: Tensor) -> None:
        """An embedding of a class of its own: what it does to the words it found is undone
        first."""
        leaf = self.weights[owner.weights["weight"]].detach().requires_grad_()
        with _Lookups() as lookups:
            output = _again(owner, {owner.weights["weight"]: leaf}, call, place)
        found = [each for _, each in lookups.seen]
        *moved, other = torch.autograd.grad(output, [*found, leaf], gradient, allow_unused=True)
        if len(moved) != 1 or moved[0] is None or other is not None:
            raise Unreachable(
                "reverse", list(owner.weights.values()), "its embedding is more than one look-up"
            )
        self._place(owner, moved[0])
        self._embedding(owner, lookups.seen[0][0], moved[0])

    def _is_diagonal(
        self, owner: Owner, name: str, call: Call, place: int, gradient: Tensor
    ) -> bool:
        """Whether number i of each row of the output depends on number i of the weight alone; tried
        once."""
        weight, mark = self.weights[name], (owner.name, name, place)
        if weight.shape != gradient.shape[-1:]:
            return False
        if mark not in self.diagonal:
            draw = torch.Generator().manual_seed(0)
            signs = (torch.randint(0, 2, weight.shape, generator=draw) * 2 - 1).to(weight)
            try:
                one, other = (
                    tangent_of(owner, {name: d}, *call)[place]
                    for d in (torch.ones_like(signs), signs)
                )
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                one = None  # no forward-mode derivative
            self.diagonal[mark] = one is not None and _near(other, one * signs)
        return self.diagonal[mark]


class _Lookups(TorchFunctionMode):
    """Notes the words that are looked up, and what is found, made the start of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = call(*args, **(kwargs or {}))
        if call is functional.embedding:
            found = found.detach().requires_grad_()
            self.seen.append((args[0], found))
        return found


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _near(a: Tensor, b: Tensor) -> bool:
    allowed: float = torch.finfo(a.dtype).eps ** 0.5
    return bool((a - b).float().norm() <= allowed * b.float().norm())


def _squares(
    left: Float[Tensor, "batch time a"], right: Float[Tensor, "batch time b"]
) -> Float[Tensor, " batch"]:
    """‖Σ_t l_t r_tᵀ‖² of each example."""
    (size, time, a), b, wide = left.shape, right.shape[2], _wide(left)
    if left.dtype == torch.float16:  # squares leave its range
        left, right = left.to(wide), right.to(wide)
    if time * (a + b) <= a * b:
        return ((left @ left.mT).to(wide) * (right @ right.mT).to(wide)).sum((1, 2))
    few = max(1, FORMED // (a * b))
    formed = (left[i : i + few].mT @ right[i : i + few] for i in range(0, size, few))
    return torch.cat([each.to(wide).square().sum((1, 2)) for each in formed])


@contextmanager
def _quiet(module: nn.Module) -> Iterator[None]:
    """No forward hook inside the module is called: it runs for its own derivative alone."""
    hooks = {part: part._forward_hooks for part in module.modules()}
    try:
        for part in hooks:
            part._forward_hooks = type(part._forward_hooks)()
        yield
    finally:
        for part, before in hooks.items():
            part._forward_hooks = before


def _again(owner: Owner, values: Direction, call: Call, place: int) -> Tensor:
    """One output of the module, with other values of its weights, in a graph of its own."""
    with torch.enable_grad(), _quiet(owner.module), swapped([owner], values):
        output: Tensor = tree_flatten(owner.module.forward(*call[0], **call[1]))[0][place]
    return output
