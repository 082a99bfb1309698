"""Blocks: the stack of like modules that a network is built of, and how to run its lower part once.

Choices made here: nothing is asked of an architecture but that its blocks stand in a list. Whether each gives the next
nothing but its output cannot be seen from outside, so that is tried once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

from torch import Tensor, nn

__all__ = ["blocks_below", "running_once", "same_when_run_once", "stack_of"]


def stack_of(network: nn.Module) -> tuple[str, Sequence[nn.Module]]:
    """The blocks, and the name of their list: the longest list of modules that is in no other."""
    lists: dict[str, Any] = {name: part for name, part in network.named_modules() if isinstance(part, nn.ModuleList)}
    outermost = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    stack = max(outermost, key=lambda name: len(lists[name]), default="")
    return stack, lists.get(stack, [])


def blocks_below(network: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The blocks below all weights of these names; none where one of these is in no block."""
    stack, blocks = stack_of(network)
    places = [name.removeprefix(stack + ".").partition(".")[0] for name in names]
    return list(blocks[: min(map(int, places))]) if all(place.isdigit() for place in places) else []


@contextmanager
def running_once(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """While open, these blocks run in the first pass alone: in later ones each gives what the last of them gave."""
    kept: list[Any] = []

    def run(forward: Callable[..., Any], last: bool, *args: Any, **named: Any) -> Any:
        if not kept:
            output = forward(*args, **named)
            kept.extend([output] * last)
            return output
        return kept[0]

    with ExitStack() as patches:
        for block in blocks:
            swap = partial(run, block.forward, block is blocks[-1])
            patches.enter_context(mock.patch.object(block, "forward", swap))
        yield


def same_when_run_once(blocks: Sequence[nn.Module], run: Callable[[], Tensor]) -> bool:
    """Whether two passes give the same with these blocks run once: not where one gives those above more than its
    output."""
    if not blocks:
        return True
    with running_once(blocks):
        shared = run()
    return shared.equal(run())
